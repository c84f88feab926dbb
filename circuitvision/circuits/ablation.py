"""Does a set of heads carry the answer? Ablate it together, and ablate as many others for comparison.

A head is mean-ablated by replacing its ``attn.hook_z`` at every position by the mean over a reference set at that
position: what it says about *this* input is removed, what it always says stays. A set of heads carries the answer if
removing it destroys the answer, costs more than any set of as many random live heads, disjoint from it, and those cost
less than half as much on average. On average alone: some of them hold a head that every answer needs, such as one that
reads the question, without carrying this one.

What is counted is *pairs*: two inputs whose right answers differ, both answered right. A model that no longer sees the
difference gets none of them, whatever it says, while single answers could be right by a fixed guess. A drop means
little without the random sets beside it, since any damage costs something.

Pairs run in batches, one condition after the other, and of a batch only what was counted is kept.

Not covered: sets of anything but heads; inputs whose positions hold different things (prompts of other lengths are fine where they line up).

Reference: mean ablation and random controls as in Wang et al. 2022 (arXiv 2211.00593).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision import edits, metrics
from circuitvision.answers import check_complete
from circuitvision.data import Batch, Pairs, Side
from circuitvision.data.batches import automatic_size
from circuitvision.errors import InputError, checked_seed
from circuitvision.model.averages import Layout, Seen, Tally, check_one_thing
from circuitvision.model.data_means import data_means
from circuitvision.model.edits.base import Edit, EditGroup, by_digest
from circuitvision.model.names import Component, format_id, head_id, heads_of, parse_id, site_of, spelled
from circuitvision.model.sites import SiteName
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.model.tokens import TokenMap
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result


@dataclass(frozen=True, eq=False)
class AblationCheck(Result):
    """Pairs answered right with nothing ablated, with the heads ablated, and with each random set ablated.

    ``values`` ``[condition example]`` is 1 for a pair with both answers right and 0 for another; conditions are ``"intact"``, ``"heads"``,
    ``"random 1"`` …. ``logit_diff`` ``[condition example]`` is the margin of the right over the other answer, the mean of the two inputs.
    ``random_heads`` lists what was drawn, and ``edits`` holds the group of each condition, with the means by digest.
    """

    logit_diff: Tensor = field(default_factory=lambda: torch.zeros(0))
    heads: list[str] = field(default_factory=list)
    random_heads: list[list[str]] = field(default_factory=list)
    edits: list[EditGroup] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"logit_diff": -1}

    @property
    def n_pairs(self) -> int:
        """How many pairs were asked."""
        return len(self.examples)

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """Refused: conditions of one check are compared with "intact", not ranked among each other."""
        raise InputError("An ablation check has conditions, not components; its sets are beside its random ones.")

    @property
    def intact(self) -> float:
        """Share of pairs that the model as it is gets right."""
        return float(self.mean()[0])

    @property
    def ablated(self) -> float:
        """Share of pairs right with the heads ablated together."""
        return float(self.mean()[1])

    @property
    def random(self) -> Tensor:
        """Share of pairs right with each random set ablated."""
        return self.mean()[2:]

    @property
    def carries_the_answer(self) -> bool:
        """Ablating the heads costs at least half of the right pairs; every random set costs fewer, and on average less than half as many."""
        lost, others = self.intact - self.ablated, self.intact - self.random
        beyond_others = len(others) == 0 or (float(others.max()) < lost and 2 * float(others.mean()) < lost)
        return 0 < self.intact <= 2 * lost and beyond_others

    def summary(self) -> str:
        """One sentence with the numbers."""
        return (
            f"Of {self.n_pairs} pairs the model answers both images right in {self.intact:.0%}; with "
            f"{', '.join(map(spelled, self.heads))} mean-ablated together in {self.ablated:.0%}; with as many other heads, drawn "
            f"{len(self.random)} times, in {float(self.random.mean()):.0%} (at worst {float(self.random.min()):.0%})."
        )


@with_provenance
def ablation_check(
    model: Any,
    pairs: Pairs,
    heads: Component | Sequence[Component],
    *,
    reference: Pairs | Side | None = None,
    n_random: int = 20,
    seed: int = 0,
    position: metrics.Position = "last",
    batch_size: int | None = None,
    progress: bool = True,
) -> AblationCheck:
    """Mean-ablate ``heads`` together over all pairs, and ``n_random`` disjoint sets of as many live heads.

    Args:
        model: the hooked model.
        pairs: pairs with answers (right for the clean side) and foils (right for the corrupt side).
        heads: in any spelling of :mod:`circuitvision.model.names`, such as ``"vision L1H2"``, ``"v.a1.h2"`` or ``("vision", 1, 2)``.
        reference: the examples whose mean replaces a head's output (of pairs both sides); ``pairs`` by default.
        n_random: number of random sets; no set is drawn twice.
        seed: of the draws.
        position: where the answer is read.
        batch_size: how many pairs run at once; None: by memory.
        progress: whether to show it.

    Raises:
        InputError: dropout in training mode, no pairs, no heads, heads the model does not have or declares dead, too few
            other heads, pairs without answers and foils, or inputs whose positions do not line up.
    """
    refuse_unwrapped(model)
    if not isinstance(pairs, Pairs):
        raise InputError(
            f"Give pairs, cv.data.Pairs(images, texts, corrupt_images=…, answers=…, foils=…), not a {type(pairs).__name__}; tensors made by hand go "
            "in as inputs= and corrupt_inputs=."
        )
    if not len(pairs) or not len(heads):
        raise InputError("An ablation check needs at least one pair and one head.")
    if pairs.answers is None or pairs.foils is None:
        raise InputError("An ablation check counts right answers: give answers= and foils= when the pairs are made.")
    check_complete(pairs)
    refuse_random(model.module, "An ablation check")
    chosen = [format_id(node) for node in heads_of(heads, model.towers)]
    first = next(pairs[:1].batches(model, 1, None)).inputs
    live = live_heads(model, first)
    dead = [spelled(name) for name in chosen if name not in live]
    if dead:
        raise InputError(f"{dead[0]} cannot reach the output; the live heads are {', '.join(map(spelled, live))}.")
    draws = random_sets([name for name in live if name not in chosen], len(chosen), n_random, seed)
    conditions: dict[str, list[str]] = {"intact": [], "heads": chosen}
    conditions |= {f"random {number + 1}": draw for number, draw in enumerate(draws)}
    sites = sorted({_site(name) for names in conditions.values() for name in names})
    parts = []
    with torch.no_grad(), Progress(len(pairs) * len(conditions), "ablating", progress) as bar:
        means = _means(model, pairs if reference is None else reference, sites)
        for batch, columns in _batches(model, pairs, batch_size):
            parts.append(_score(model, batch, list(conditions.values()), means, position, columns))
            bar.advance(len(batch) * len(conditions))
    # [condition, (right, margin), pair]
    scores = torch.cat(parts, -1)
    return AblationCheck(
        values=scores[:, 0],
        axes={"condition": list(conditions), "example": list(pairs.numbers)},
        provenance=describe(
            model,
            method="ablation_check(mean per position)",
            seed=seed,
            dataset_sha256=pairs.digest,
            examples=len(pairs),
        ),
        logit_diff=scores[:, 1],
        heads=chosen,
        random_heads=draws,
        edits=[by_digest(_ablations(model.tokens(first), names, means)) for names in conditions.values()],
    )


def live_heads(model: Any, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """The ids of all heads whose output can reach the model's output (of a run with ``inputs``), in the model's order."""
    names = []
    for tower_name, tower in model.towers.items():
        for layer in range(tower.cfg.n_layers):
            if not model.is_dead(f"{tower_name}.blocks.{layer}.attn.hook_z", inputs):
                names += [head_id(tower_name, layer, head) for head in range(tower.cfg.n_heads)]
    return names


def _means(model: Any, data: Pairs | Side, sites: Sequence[str]) -> dict[str, Tally]:
    """The mean of every site over the examples, of pairs over both sides, per position; InputError where positions do not line up."""
    side = Side.concat([data.clean, data.corrupt]) if isinstance(data, Pairs) else data

    def check(key: Any, seen: Seen) -> None:
        for position, names in seen.names.items():
            check_one_thing(position, names)

    def clean(inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
        _, cache = model.run_with_cache(inputs, names_filter=list(names))
        return {name: cache[name] for name in names}

    found = data_means(model, side, [(site, "position") for site in sites], clean, check)
    return {site: tally for (site, _), (tally, _) in found.items()}


def _ablations(tokens: Mapping[str, TokenMap], names: Sequence[str], means: Mapping[str, Tally]) -> list[Edit]:
    """The edits that put some heads to their means, where a run with these positions has anything."""
    heads: dict[str, list[int]] = {}
    for name in names:
        heads.setdefault(_site(name), []).append(parse_id(name).head)
    group = []
    for site, numbers in heads.items():
        own = tokens.get(SiteName.parse(site).tower)
        source, there = means[site].source(None if own is None else Layout.of_tokens(own))
        everywhere = there is None or bool(there.all())
        group.append(edits.ablate(site, source, heads=numbers, positions=None if everywhere else there))
    return group


def _score(
    model: Any,
    batch: Batch,
    conditions: Sequence[Sequence[str]],
    means: Mapping[str, Tally],
    position: metrics.Position,
    columns: Tensor | None,
) -> Float[Tensor, "condition what pair"]:
    """Whether each pair of a batch is answered right on both inputs, and the margin of the right over the other answer, the mean of both inputs."""
    assert batch.other is not None
    found = []
    for inputs, answers, foils in (
        (batch.inputs, batch.answers, batch.foils),
        (batch.other, batch.foils, batch.answers),
    ):
        # An answer of several tokens is given with any of them.
        right = metrics.accuracy(position=position).bind(model, answers, combine=batch.combine)
        margin = metrics.logit_diff(position=position).bind(model, answers, foils, batch.combine)
        both: dict[str, Any] = {"right": right, "margin": margin}
        if columns is not None:
            both = {name: _of_columns(metric, columns) for name, metric in both.items()}
        tokens = model.tokens(inputs)
        groups = [_ablations(tokens, names, means) for names in conditions]
        swept = model.sweep(inputs, groups, both, empty="clean", progress=False)
        found.append(swept.values.double().movedim(0, 1))
    clean, corrupt = found
    return torch.stack([clean[:, 0] * corrupt[:, 0], (clean[:, 1] + corrupt[:, 1]) / 2], 1)


def _of_columns(metric: Any, columns: Int[Tensor, "pair text"]) -> Callable[[Tensor, Mapping[str, Any]], Tensor]:
    """A metric of each example's own columns alone."""
    return lambda logits, inputs: metric(logits.gather(1, columns.to(logits.device)), inputs)


def _batches(model: Any, pairs: Pairs, size: int | None) -> Iterator[tuple[Batch, Tensor | None]]:
    """The pairs in batches; of a dual encoder all pictures of a batch beside all its texts, with the columns of each pair's own."""
    texts = [one.text for side in (pairs.clean, pairs.corrupt) for one in side.examples]
    width = len(texts[0]) if isinstance(texts[0], tuple) else 0
    if not model.is_dual or not width or any(not isinstance(text, tuple) or len(text) != width for text in texts):
        yield from ((batch, None) for batch in pairs.batches(model, size, None))
        return
    size = size or automatic_size(model, pairs.clean[:1])
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        this, other = (
            model.inputs(
                images=[one.pictures for one in side.examples],
                text=[text for one in side.examples for text in one.text or ()],
            )
            for side in (part.clean, part.corrupt)
        )
        columns = torch.arange(len(part) * width).view(-1, width)
        yield Batch(this, list(part.numbers), other, list(part.answers or ()), list(part.foils or ())), columns


def random_sets(others: Sequence[str], size: int, number: int, seed: int) -> list[list[str]]:
    """Different sets of ``size`` of the other heads. Raises InputError where there are fewer than ``number``."""
    possible = math.comb(len(others), size)
    if possible < number:
        sets = "set" if possible == 1 else "sets"
        way = f"there are {possible} {sets}: n_random={possible}" if possible else "check fewer heads"
        raise InputError(
            f"{number} different random sets of {size} of the {len(others)} other live heads cannot be drawn; {way}."
        )
    generator = np.random.default_rng(checked_seed(seed))
    found: dict[tuple[int, ...], list[str]] = {}
    while len(found) < number:
        draw = tuple(sorted(generator.choice(len(others), size=size, replace=False).tolist()))
        found[draw] = [others[index] for index in draw]
    return list(found.values())


def _site(name: str) -> str:
    return site_of(name)[0]
