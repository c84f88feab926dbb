"""Shortcut heads: which heads let the background decide the answer, told by what hiding it does with each of them removed (CIGMA).

Every picture ``x`` runs beside two counterfactuals (:func:`circuitvision.data.mask_images`): ``x_F``, of which the foreground alone is left, and
``x_B``, of which the background alone is. With ``p`` the distribution of the answer and ``JS`` the Jensen–Shannon divergence in nats, the
*information gain* of each part of the picture is what hiding it changes,

    ``BIG(x) = JS(p(x), p(x_F))``   of the background,      ``FIG(x) = JS(p(x), p(x_B))``   of the foreground,

and a head's score is how much of the background's gain goes with the head, ``score(h) = BIG(x) − BIG(x; h removed)``, its
:attr:`~ShortcutHeads.foreground` the same of FIG. A shortcut head has a high score and a foreground near 0. No label is needed.

The removal is mean ablation of ``attn.hook_z`` (what a head always says stays); the paper zeroes the head's weights, which is ``ablation="zero"``.

*What stands where the background is hidden* matters. The paper fills in the mean colour of the picture itself; where the background is most of the
picture, that is the background's own colour, and BIG is 0 whatever the model does. The default is the mean colour of the whole data set.

Heads are scored one at a time, so of two heads that say the same each scores low if the answer saturates with one; saturated probabilities are flat
for JS. :func:`circuitvision.circuits.removal_curve` removes them one after another, and
:func:`circuitvision.circuits.learn_shortcut_heads` learns which go together. The paper scores pictures that are answered right; all count
here (``data[right]`` leaves others out).

Not covered: masks of pictures that are found by optimisation (CIGMA's own; give masks, or boxes), pictures too many to hold in memory with their
counterfactuals.

Reference: CIGMA (Maliha et al., CVPR 2026), of which no code is public.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.circuits.ablation import live_heads
from circuitvision.circuits.information_gain import InformationGain
from circuitvision.circuits.units import reads_images
from circuitvision.data import Pairs, Side, mask_images
from circuitvision.data.batches import automatic_size
from circuitvision.data.outcomes import choice_ids
from circuitvision.errors import InputError
from circuitvision.findings import Finding, around, percent
from circuitvision.metrics.position import Position
from circuitvision.model.edits.base import Edit, EditGroup, by_digest
from circuitvision.model.names import head_id, parse_id, site_of, spelled
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.progress import verbosity
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

ABLATIONS = ("mean", "zero")
RANKINGS = ("background", "difference")
LEAST_GAIN = 0.01
"""Information gain in nats (of ln 2 at most for a choice) below which hiding a part of the picture changes nothing worth a claim."""


@dataclass(frozen=True, eq=False)
class ShortcutHeads(Result):
    """What of the background's information gain goes with each head, in nats: ``values`` ``[tower layer head example]``, NaN where there is no such
    head or it cannot reach the output. ``foreground`` is the same of the foreground's gain.

    ``background_gain`` and ``foreground_gain`` ``[example]`` are BIG and FIG of the model as it is; ``edits`` removes each head, in the order of
    :attr:`heads`, with values by digest. ``groups`` says which examples belong together, where the data does.
    """

    foreground: Tensor = field(default_factory=lambda: torch.zeros(0))
    background_gain: Tensor = field(default_factory=lambda: torch.zeros(0))
    foreground_gain: Tensor = field(default_factory=lambda: torch.zeros(0))
    ablation: str = "mean"
    edits: list[EditGroup] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {
        "foreground": -1,
        "background_gain": -1,
        "foreground_gain": -1,
        "groups": 0,
    }

    @property
    def heads(self) -> list[str]:
        """The ids of the heads that were scored, in the model's order."""
        return [name for name, _ in self._cells()]

    @property
    def background_share(self) -> float:
        """``mean BIG / (mean BIG + mean FIG)``: 0 where only the foreground counts, 1 where only the background does; NaN where nothing does."""
        both = [float(self.mean(quantity=f"{part}_gain")) for part in ("background", "foreground")]
        return both[0] / sum(both) if sum(both) > 0 else math.nan

    def ranking(self, by: str = "background") -> list[tuple[str, float]]:
        """Every head as (id, score), highest first: its mean score, or the ``"difference"`` of that and its mean foreground.

        Raises:
            InputError: another ``by``.
        """
        if by not in RANKINGS:
            raise InputError(f"by={by!r} is not understood: {' or '.join(map(repr, RANKINGS))}.")
        means = self.mean() - (self.mean(quantity="foreground") if by == "difference" else 0.0)
        return sorted(((name, float(means[at])) for name, at in self._cells()), key=lambda entry: -entry[1])

    def top(self, count: int, by: str = "background") -> list[str]:
        """The ids of the ``count`` heads that rank highest."""
        return [name for name, _ in self.ranking(by)[:count]]

    def highlights(self) -> dict[str, str]:
        """What the highest head does."""
        return {"shortcut": str(reads_background(self))}

    def _cells(self) -> list[tuple[str, tuple[int, ...]]]:
        axes = [self.axes[name] for name in ("tower", "layer", "head")]
        there = torch.isfinite(self.mean()).nonzero().tolist()
        return [(head_id(*(labels[i] for labels, i in zip(axes, at, strict=True))), tuple(at)) for at in there]


@with_provenance
def shortcut_heads(
    model: Any,
    data: Side | Pairs,
    masks: Any = None,
    *,
    fill: Any = "dataset",
    image: int = 0,
    towers: Sequence[str] | None = None,
    ablation: str = "mean",
    reference: Side | Pairs | None = None,
    choices: Sequence[Any] | None = None,
    position: Position = "last",
    seed: int = 0,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> ShortcutHeads:
    """Remove every head in turn and measure what is left of the background's and the foreground's information gain: see the module.

    Args:
        model: the hooked model: a classifier, a dual encoder whose texts are the answers (the same for all pictures), or one that answers in words.
        data: pictures of a validation split, with their masks or boxes; of pairs the clean side.
        masks: what the foreground is, see :func:`circuitvision.data.mask_images`.
        fill: what stands where a part of the picture is hidden, likewise.
        image: which picture of each example.
        towers: the towers whose heads are removed; None: those that read pictures.
        ablation: ``"mean"``, per position over ``reference``, or ``"zero"``.
        reference: the examples whose mean replaces a head's output; ``data`` by default.
        choices: the answers to choose from, words or ids; None: every column of the output.
        position: where the answer is read.
        seed: of ``fill="noise"``.
        example_batch, save_to, resume, progress: as of ``model.sweep``.

    Raises:
        InputError: no mask, or one that is empty or leaves nothing over; an output that is no distribution, towers that are not there, dropout in
            training mode.
    """
    found = shortcut_search(model, data, masks, fill, image, towers, choices, position, seed, example_batch)
    side, heads, metric = found.side, found.heads, found.metric
    groups = [removed(name, ablation, side if reference is None else reference) for name in heads]
    with contextlib.nullcontext() if progress else verbosity("quiet"):
        swept = model.sweep(
            found.triples,
            groups,
            metric,
            empty="clean",
            example_batch=found.each,
            save_to=save_to,
            resume=resume,
            progress=progress,
        )
    intact = swept.clean.double().unflatten(-1, (-1, 3))[:, 1:].T
    without = swept.values.double().unflatten(-1, (-1, 3))[..., 1:].movedim(-1, 0)
    axes, scores = _laid_out(model, found.towers, heads, intact[:, None] - without)
    return ShortcutHeads(
        values=scores[0],
        axes={**axes, "example": list(side.numbers)},
        provenance=describe(
            model,
            method=f"shortcut_heads({ablation} ablation)",
            metric=metric,
            seed=seed,
            dataset_sha256=side.digest,
            examples=len(side),
        ),
        foreground=scores[1],
        background_gain=intact[0],
        foreground_gain=intact[1],
        ablation=ablation,
        edits=[by_digest(group) for group in groups],
        dead=_dead(model, found.towers, found.live),
        groups=[] if side.groups is None else list(side.groups),
    )


@dataclass(frozen=True)
class ShortcutSearch:
    """What a search for shortcut heads runs on: rows in threes, ``each`` of them at once, and the heads that can reach the output."""

    side: Side
    triples: Side
    metric: InformationGain
    towers: list[str]
    live: list[str]
    heads: list[str]
    each: int


def shortcut_search(
    model: Any,
    data: Any,
    masks: Any,
    fill: Any,
    image: int,
    towers: Sequence[str] | None,
    choices: Sequence[Any] | None,
    position: Position,
    seed: int,
    example_batch: int | None,
) -> ShortcutSearch:
    """The pictures beside their counterfactuals, and the heads. Raises InputError as :func:`shortcut_heads`."""
    refuse_unwrapped(model)
    refuse_random(model.module, "A search for shortcut heads")
    side = data.clean if isinstance(data, Pairs) else data
    if not isinstance(side, Side):
        raise InputError(f"Give pictures with masks, cv.data.Side(images, masks=…), not a {type(data).__name__}.")
    columns = None if choices is None else tuple(choice_ids(model, choices))
    triples = _triples(side, masks, fill, image, seed)
    live = live_heads(model, next(side[:1].batches(model, 1)).inputs)
    names = _towers(model, towers)
    heads = [name for name in live if parse_id(name).tower in names]
    if not heads:
        raise InputError(f"No head of {', '.join(names)} can reach the output; towers= names others.")
    each = 3 * max(1, automatic_size(model, side[0]) // 3 if example_batch is None else example_batch)
    metric = InformationGain(position=position, name="information gain", columns=columns)
    return ShortcutSearch(side, triples, metric, names, live, heads, each)


def removed(heads: str | Sequence[str], ablation: str, reference: Side | Pairs) -> tuple[Edit, ...]:
    """The edits that remove heads: one per layer. Raises InputError for another ablation."""
    if ablation not in ABLATIONS:
        raise InputError(f"ablation={ablation!r} is not understood: {' or '.join(map(repr, ABLATIONS))}.")
    layers: dict[str, list[int]] = {}
    for name in [heads] if isinstance(heads, str) else heads:
        layers.setdefault(site_of(name)[0], []).append(parse_id(name).head)
    over = reference if ablation == "mean" else None
    return tuple(edits.ablate(site, ablation, dataset=over, heads=numbers) for site, numbers in layers.items())


def _triples(side: Side, masks: Any, fill: Any, image: int, seed: int) -> Side:
    """Every picture, its foreground alone, its background alone: three rows that stand together."""
    kept = [
        mask_images(side, masks, keep=keep, fill=fill, image=image, seed=seed).corrupt
        for keep in ("foreground", "background")
    ]
    count = len(side)
    return Side.concat([side, *kept])[[part * count + row for row in range(count) for part in range(3)]]


def _towers(model: Any, towers: Sequence[str] | None) -> list[str]:
    if towers is None:
        return [name for name, tower in model.towers.items() if reads_images(tower)] or list(model.towers)
    asked = [towers] if isinstance(towers, str) else list(towers)
    unknown = [name for name in asked if name not in model.towers]
    if unknown or not asked:
        raise InputError(f"towers={towers!r}: this model has {', '.join(model.towers)}.")
    return asked


def _laid_out(
    model: Any, towers: Sequence[str], heads: Sequence[str], scores: Float[Tensor, "part head example"]
) -> tuple[dict[str, list[Any]], Float[Tensor, "part tower layer head example"]]:
    """Scores of heads at their places."""
    cfgs = [model.towers[name].cfg for name in towers]
    axes: dict[str, list[Any]] = {"tower": list(towers)}
    axes |= {name: list(range(max(getattr(cfg, f"n_{name}s") for cfg in cfgs))) for name in ("layer", "head")}
    shape = [len(scores), *map(len, axes.values()), scores.shape[-1]]
    values = torch.full(shape, math.nan, dtype=scores.dtype)
    for number, name in enumerate(heads):
        node = parse_id(name)
        values[:, towers.index(node.tower), node.layer, node.head] = scores[:, number]
    return axes, values


def _dead(model: Any, towers: Sequence[str], live: Sequence[str]) -> list[str]:
    """The sites of the layers without a live head."""
    layers = itertools.chain.from_iterable(
        ((name, layer) for layer in range(model.towers[name].cfg.n_layers)) for name in towers
    )
    return [f"{name}.blocks.{layer}.attn.hook_z" for name, layer in layers if head_id(name, layer, 0) not in live]


def reads_background(result: ShortcutHeads) -> Finding:
    """Whether the head that ranks highest lets the background in: hiding the background changes something (:data:`LEAST_GAIN`), the head's score has
    an interval above 0, as wide as the first of all heads needs, and is larger than what goes with it of the foreground's gain (``chance``)."""
    name, value = result.ranking()[0]
    at = dict(result._cells())[name]
    big = float(result.mean(quantity="background_gain"))
    beside = float(result.mean(quantity="foreground")[at])
    interval = around(value, float(result.error()[at]), len(result.heads))
    reason = ""
    if big < LEAST_GAIN:
        reason = "hiding the background hardly changes the answer"
    elif value <= 0 or (interval is not None and interval[0] <= 0):
        reason = "its interval holds 0"
    elif value <= beside:
        reason = "as much of the foreground goes with it"
    share = percent(value / big) if big > 0 else "nothing"
    about = {"head": spelled(name), "gain": f"{big:.2g}", "left": f"{big - value:.2g}", "share": share}
    return Finding("reads background", not reason, value, "nat", interval, len(result.examples), beside, reason, about)
