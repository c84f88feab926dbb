"""Which heads carry the answer of a minimal pair: one at a time, and in groups.

``attn.hook_z`` of a head takes, at every position of the corrupt run, the value it has in the clean run; the share of the logit difference (answer
minus foil) that comes back is the head's normalised effect (:mod:`circuitvision.patching.activation`), a ratio of means with a normal 95 % interval.

A group's heads are patched together. Its *interaction* is the joint effect minus the sum of the effects of its heads alone: below 0 where heads do
the same work twice, above 0 where one is of no use without another. Groups are the heads of a layer, all heads of a tower, and the two, three and
four heads of a tower that have the largest effects alone (which favours effects that chance made large).

Not covered: groups across towers; heads that hold back an answer (effects below 0 are listed, and not counted).
"""

from __future__ import annotations

from typing import Any

import torch

from circuitvision import edits
from circuitvision.model.names import head_name
from circuitvision.organisms.measured.drawing import Asked, share
from circuitvision.patching.activation import PatchingResult, activation_patch

TOWERS = ("vision", "language")
EFFECT, LOWER, WANTED = 0.10, 0.05, 3
"""A head counts from this share on, if its lower bound is above the second; so many of each tower are wanted."""
TOGETHER = (2, 3, 4)
Head = tuple[str, int, int]


def measure(model: Any, asked: dict[str, Asked]) -> dict[str, Any]:
    """Effects of all heads and of groups of them, by kind of question."""
    return {
        "metric": "logit_diff",
        "mode": "denoise",
        "kinds": {kind: _kind(model, own) for kind, own in asked.items()},
    }


def _kind(model: Any, asked: Asked) -> dict[str, Any]:
    told: dict[str, Any] = {"drawn": asked.drawn, "n": asked.count, "single": [], "groups": []}
    if asked.pairs is None or asked.count < 2:
        return told | {"reason": "the model answers fewer than two of these pairs right on both sides"}
    pairs = asked.pairs
    alone = activation_patch(
        model,
        pairs,
        "logit_diff",
        sites=[f"{tower}.blocks.*.attn.hook_z" for tower in TOWERS],
        axes=("layer", "head"),
    )
    effects = {head: alone.values[_place(alone, head)] for head in _heads(model)}
    groups = _groups(effects)
    swept = model.sweep(pairs.corrupt, [_patched(heads, pairs) for _, _, heads in groups], "logit_diff")
    base, source = alone.base, alone.source
    single = [{"head": _name(head), "tower": head[0], **share(own, base, source)} for head, own in effects.items()]
    joint = []
    for (name, tower, heads), own in zip(groups, swept.effect, strict=True):
        rest = own - torch.stack([effects[head] for head in heads]).sum(0)
        joint.append(
            {"group": name, "tower": tower, "heads": [_name(head) for head in heads], **share(own, base, source)}
            | {"interaction": share(rest, base, source)}
        )
    return told | {"single": single, "groups": joint}


def _heads(model: Any) -> list[Head]:
    return [
        (tower, layer, head)
        for tower in TOWERS
        for layer in range(model.towers[tower].cfg.n_layers)
        for head in range(model.towers[tower].cfg.n_heads)
    ]


def _place(result: PatchingResult, head: Head) -> tuple[int, ...]:
    return tuple(result.index_of(axis, label) for axis, label in zip(("tower", "layer", "head"), head, strict=True))


def _name(head: Head) -> str:
    tower, layer, number = head
    return head_name(layer, number, tower)


def _groups(effects: dict[Head, torch.Tensor]) -> list[tuple[str, str, list[Head]]]:
    """Name, tower and heads of every group."""
    found = []
    for tower in TOWERS:
        own = [head for head in effects if head[0] == tower]
        for layer in sorted({head[1] for head in own}):
            found.append((f"{tower} L{layer}", tower, [head for head in own if head[1] == layer]))
        strongest = sorted(own, key=lambda head: -float(effects[head].mean()))
        found += [(f"{tower}, strongest {count}", tower, strongest[:count]) for count in TOGETHER if count < len(own)]
        found.append((f"all of {tower}", tower, own))
    return found


def _patched(heads: list[Head], pairs: Any) -> tuple[edits.Edit, ...]:
    """One edit for each layer that the group has heads in."""
    layers: dict[tuple[str, int], list[int]] = {}
    for tower, layer, head in heads:
        layers.setdefault((tower, layer), []).append(head)
    return tuple(
        edits.replace(f"{tower}.blocks.{layer}.attn.hook_z", pairs.clean, heads=numbers)
        for (tower, layer), numbers in layers.items()
    )


def counts(entry: dict[str, Any]) -> bool:
    """Whether an effect is at least :data:`EFFECT`, and its lower bound above :data:`LOWER`."""
    return entry["value"] >= EFFECT and entry["low"] > LOWER


def condition(found: dict[str, Any]) -> dict[str, Any]:
    """Whether at least three heads of each tower have an effect alone, in any kind of question.

    The heads of a layer of which none counts alone count as one where they do together, and their interaction is above 0.
    """
    by_kind: dict[str, dict[str, list[str]]] = {}
    for kind, told in found["kinds"].items():
        by_kind[kind] = {
            tower: [entry["head"] for entry in told["single"] if entry["tower"] == tower and counts(entry)]
            for tower in TOWERS
        }
        for group in told["groups"]:
            alone = set(by_kind[kind][group["tower"]]) & set(group["heads"])
            layer = group["group"].startswith(f"{group['tower']} L")
            if layer and counts(group) and group["interaction"]["low"] > 0 and not alone:
                by_kind[kind][group["tower"]].append(f"{group['group']} together")
    of_tower = {tower: sorted({head for kind in by_kind.values() for head in kind[tower]}) for tower in TOWERS}
    return {
        "says": f"at least {WANTED} heads of each tower have an effect of {EFFECT:.2f} (lower bound above {LOWER:.2f}) "
        "alone, in any kind of question",
        "by_kind": by_kind,
        "heads": of_tower,
        "met": all(len(heads) >= WANTED for heads in of_tower.values()),
    }
