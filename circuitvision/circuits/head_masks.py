"""A learned mask of shortcut heads: which go together so that hiding the background changes little and hiding the foreground still does.

Every live head has a gate ``z`` (:mod:`circuitvision.circuits.gates`) and writes ``z`` of what it says, ``1 - z`` of what stands in its place when it
is removed (:func:`circuitvision.circuits.shortcut_heads`: its mean, or 0). On the pictures and their two counterfactuals, with BIG and FIG as there,
the loss is

    ``mean BIG(z) / mean BIG + (mean FIG - mean FIG(z)) / mean FIG``

plus the penalty that holds the expected number of closed gates at ``n_heads``. The gradient goes to all heads at once, where scores of single heads
miss what two of them do together. It is a search and no measurement: what is closed beside the heads that matter is arbitrary, more so where more
heads are asked for than there are. Check what it chose as any set of heads, on other pictures, by :func:`circuitvision.circuits.removal_curve` and
:func:`circuitvision.circuits.remove_heads`.

Not covered: masks of pictures (CIGMA's own optimisation: give masks, or boxes), gates of other components.

Reference: the counterfactuals CIGMA (Maliha et al., CVPR 2026); the gates Cao et al. 2021 (arXiv 2104.03514).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.circuits.gates import Gates
from circuitvision.circuits.shortcuts import InformationGain, removed, shortcut_search
from circuitvision.data import Pairs, Side
from circuitvision.errors import InputError, checked_seed
from circuitvision.metric_set import MetricSet
from circuitvision.metrics.position import Position
from circuitvision.model.edits.base import Edit
from circuitvision.model.names import parse_id, site_of
from circuitvision.model.state import refuse_inference
from circuitvision.model.weights import check_gradients
from circuitvision.patching.estimator import differentiable
from circuitvision.patching.gradient_run import GradientRun
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

PARTS = ["background", "foreground"]


@dataclass(frozen=True, eq=False)
class HeadMask(Result):
    """The mean information gains in nats while the gates were trained: ``values`` ``[part step example]``, of the background and of the
    foreground, of the examples of each step's batch (NaN of all others).

    ``closed`` ``[head]`` is ``-α`` of every head of ``heads``: above 0 where a gate is more closed than open.
    """

    heads: list[str] = field(default_factory=list)
    closed: Tensor = field(default_factory=lambda: torch.zeros(0))
    n_heads: int = 0
    ablation: str = "mean"

    def ranking(self) -> list[tuple[str, float]]:
        """Every head as (id, ``-α``), the most closed first."""
        order = self.closed.argsort(descending=True, stable=True).tolist()
        return [(self.heads[number], float(self.closed[number])) for number in order]

    @property
    def chosen(self) -> list[str]:
        """The ids of the ``n_heads`` heads whose gates are most closed."""
        return [name for name, _ in self.ranking()[: self.n_heads]]

    def highlights(self) -> dict[str, str]:
        """The heads."""
        return {"heads to remove": ", ".join(self.chosen)}


@with_provenance
def learn_shortcut_heads(
    model: Any,
    data: Side | Pairs,
    masks: Any = None,
    *,
    n_heads: int,
    steps: int = 60,
    rate: float = 0.1,
    start: float = 0.0,
    penalty_rate: float = 1.0,
    fill: Any = "dataset",
    image: int = 0,
    towers: Sequence[str] | None = None,
    ablation: str = "mean",
    reference: Side | Pairs | None = None,
    choices: Sequence[Any] | None = None,
    position: Position = "last",
    seed: int = 0,
    example_batch: int | None = None,
    progress: bool = True,
) -> HeadMask:
    """The ``n_heads`` heads whose removal together takes most of the background's information gain and least of the foreground's, by a learned mask.

    Args:
        model: the hooked model; its weights are not changed.
        data, masks, fill, image, towers, ablation, reference, choices, position: as of :func:`circuitvision.circuits.shortcut_heads`.
        n_heads: how many heads the mask closes.
        steps: of Adam, each on one batch of pictures.
        rate, penalty_rate: learning rates of the gates, and of the multipliers.
        start: ``α`` of every gate at the beginning.
        seed: of the gates, and of ``fill="noise"``.
        example_batch: how many pictures are trained on together.
        progress: whether progress is shown.

    Raises:
        InputError: as of ``shortcut_heads``; fewer heads than are to be removed, no step, pictures in which hiding either part changes nothing.
    """
    check_gradients(model.module)
    found = shortcut_search(model, data, masks, fill, image, towers, choices, position, seed, example_batch)
    over = found.side if reference is None else reference
    if isinstance(n_heads, bool) or not isinstance(n_heads, int) or not 0 < n_heads < len(found.heads) or steps < 1:
        raise InputError(
            f"n_heads={n_heads!r} must lie between 1 and {len(found.heads) - 1}, one less than the live heads, and steps={steps} be 1 or more."
        )
    gates = _HeadGates(
        torch.ones(len(found.heads), dtype=torch.bool), len(found.heads) - n_heads, start, rate, penalty_rate, checked_seed(seed)
    )  # fmt: skip
    made = _gated(found.heads, ablation, over)
    rows = {number: row for row, number in enumerate(found.triples.numbers)}
    values = torch.full((2, steps, len(found.side)), torch.nan, dtype=torch.float64)
    taken = 0
    with Progress(steps, "learned mask of heads", progress) as bar:
        while taken < steps:
            for batch in found.triples.batches(model, found.each):
                refuse_inference(model.module, batch.inputs)
                own = [rows[number] // 3 for number in batch.examples[::3]]
                values[:, taken, own] = gates.step(model, batch, made, found.metric)
                taken += 1
                bar.advance()
                if taken == steps:
                    break
    return HeadMask(
        values=values,
        axes={"part": PARTS, "step": list(range(steps)), "example": list(found.side.numbers)},
        provenance=describe(
            model,
            method=f"learn_shortcut_heads({ablation} ablation, n_heads={n_heads}, steps={steps}, rate={rate})",
            metric=found.metric,
            seed=seed,
            dataset_sha256=found.side.digest,
            examples=len(found.side),
        ),
        heads=list(found.heads),
        closed=-gates.alpha.detach().double(),
        n_heads=n_heads,
        ablation=ablation,
    )


class _HeadGates(Gates):
    """The gates of heads."""

    def step(
        self, model: Any, batch: Any, made: Sequence[_Gated], metric: InformationGain
    ) -> Float[Tensor, "part example"]:
        """One step of Adam on a batch of triples; the gains of its pictures under the gates that were drawn."""
        bound = MetricSet.of(metric).bind(model, batch.answers, batch.foils, batch.combine)
        with torch.no_grad():
            intact = _gains(bound(model.run(batch.inputs, []), batch.inputs)[0]).mean(-1)
            removal = GradientRun(
                model, batch.inputs, [], [one.removal for one in made], read=[one.site for one in made]
            )
            without = {site: value.detach() for site, value in removal.values.items()}
        if bool((intact <= 0).any()):
            raise InputError(
                "Hiding the background, or the foreground, changes nothing in these pictures: give another fill, or masks."
            )
        with torch.enable_grad():
            drawn = self.drawn()
            for one in made:
                one.gates, one.without = drawn, without[one.site]
            run = GradientRun(model, batch.inputs, [], [one.edit for one in made])
            gains = _gains(differentiable(bound, run)[0])
            big, fig = gains.mean(-1)
            self.descend(big / intact[0] + (intact[1] - fig) / intact[1])
        return gains.detach().cpu().double()


def _gains(rows: Float[Tensor, " row"]) -> Float[Tensor, "part example"]:
    return rows.unflatten(0, (-1, 3))[:, 1:].T


class _Gated:
    """The edits by which the heads of one site write a share of their own, and the rest of what stands there when they are removed."""

    def __init__(self, numbers: Sequence[int], heads: Sequence[int], site: str, removal: Edit) -> None:
        self.numbers, self.heads, self.site, self.removal = list(numbers), list(heads), site, removal
        self.gates, self.without = torch.ones(0), torch.ones(0)
        self.edit = edits.apply(site, self.mixed)

    def mixed(self, value: Tensor, hook: Any) -> Tensor:
        share = torch.ones(value.shape[-2], device=value.device, dtype=value.dtype)
        share = share.index_put((torch.tensor(self.heads),), self.gates[self.numbers].to(value))[:, None]
        return share * value + (1 - share) * self.without.to(value)


def _gated(heads: Sequence[str], ablation: str, over: Side | Pairs) -> list[_Gated]:
    """The edits of every site with gated heads."""
    layers: dict[str, list[int]] = {}
    for number, name in enumerate(heads):
        layers.setdefault(site_of(name)[0], []).append(number)
    found = []
    for site, numbers in layers.items():
        (removal,) = removed([heads[number] for number in numbers], ablation, over)
        found.append(_Gated(numbers, [int(parse_id(heads[number]).head or 0) for number in numbers], site, removal))
    return found
