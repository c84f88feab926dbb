"""What a lens says in one number per layer: the methods of :class:`~circuitvision.readout.lens.result.LensResult` that average over positions.

* identifiability of a target at a position: ``1 - r/K`` with ``r`` = how many of the ``K`` columns are strictly higher (ties favour the target):
  1 for the highest, ``1/K`` for the lowest, ``(K+1)/(2K)`` by chance;
* change rate at layer ``l``: share of positions whose value of the target is higher after layer ``l`` than before it;
* top-k rate: share of positions where the target is among the ``k`` highest columns, ``k/K`` by chance (Neo et al.: on the patches of an object);
* top-k agreement with another lens: share of the ``k`` highest columns that both name;
* match rates with lenses of the attention and MLP outputs: share of positions whose highest columns agree, and that agree with none;
* change from the stream: what a branch says of a target beside the stream it reads;
* position difference: mean inside some positions minus mean over the others, with a permutation test of the positions within rows.

``positions`` chooses what is averaged: kinds of positions, a selection (``tokens.image(0).box(…)``: the patches of an object), or a mask
``[row pos]``; by default all but padding. A mean is NaN where a position that counts has no number. The decision layer of a lens's highest
columns is :func:`circuitvision.readout.probes.decisions.decision_layer`.

Sources: Vilas et al. 2023, arXiv 2310.18969; Neo et al. 2024, arXiv 2410.07149. The former's released code compares a layer's answer twice
with attention and never with the MLP; here all are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.selection import Selection
from circuitvision.model.tokens import ABSENT
from circuitvision.provenance import with_provenance
from circuitvision.results import Result

LensPositions = str | list[str] | Selection | Bool[Tensor, "row pos"] | None


@dataclass(frozen=True, eq=False)
class LensSummary(Result):
    """A summary of a lens: ``measure`` says what the values are, ``chance`` what they would be by chance (NaN: unknown)."""

    measure: str = ""
    chance: float = float("nan")
    tower: str = ""

    def over_positions(self) -> LensSummary:
        """The mean over positions that have a value, as a result without the axis ``position``."""
        if "position" not in self.axes:
            return self
        axes = {name: labels for name, labels in self.axes.items() if name != "position"}
        return replace(self, values=self.values.double().nanmean(list(self.axes).index("position")), axes=axes)

    def highlights(self) -> dict[str, str]:
        """The measure at the first and at the last layer, the mean over everything else, beside chance."""
        axis = "layer" if "layer" in self.axes else next(iter(self.axes))
        lines = self.mean().movedim(list(self.axes).index(axis), 0).reshape(len(self.axes[axis]), -1).nanmean(1)
        ends = " … ".join(f"{float(lines[at]):.3g} ({axis} {self.axes[axis][at]})" for at in (0, -1))
        chance = "" if self.chance != self.chance else f", by chance {self.chance:.3g}"
        return {self.measure: ends + chance}


@dataclass(frozen=True)
class PositionDifference:
    """Means inside and outside some positions, ``[layer target]``; ``p`` is the share of random positions with at least this difference."""

    inside: Float[Tensor, "layer target"]
    outside: Float[Tensor, "layer target"]
    p: Float[Tensor, "layer target"]
    shuffles: int

    @property
    def value(self) -> Float[Tensor, "layer target"]:
        """Mean inside minus mean outside."""
        return self.inside - self.outside


class LensSummaries(Result):
    """The summaries of a lens, which its result inherits; the fields are those of the result."""

    tower: str
    measure: str
    norm: str
    ids: Tensor
    ranks: Tensor
    n_outputs: int
    kinds: list[list[str]]

    @with_provenance
    def identifiability(self, positions: LensPositions = None) -> LensSummary:
        """``1 - (rank - 1)/K`` of every target, axes ``layer target example``. Raises InputError for a lens without targets, or no such position."""
        _check_ranks(self)
        found = torch.where(self.ranks > 0, 1 - (self.ranks.double() - 1) / self.n_outputs, float("nan"))
        chance = (self.n_outputs + 1) / (2 * self.n_outputs)
        return _summary(self, _mean(found, _mask(self, positions)), "identifiability", chance)

    @with_provenance
    def change_rate(self, positions: LensPositions = None) -> LensSummary:
        """Share of positions whose value of a target rises from one layer to the next: axes ``layer target example``, from the second layer on.

        Raises InputError for anything but the default sites, with targets.
        """
        layers = self.axes.get("layer", [])
        if layers != ["input", *range(len(layers) - 1)] or "target" not in self.axes:
            raise InputError(
                "The change rate compares the stream of successive layers; read the lens with targets= and the default sites."
            )
        after, before = self.values[1:], self.values[:-1]
        rose = (after > before).double().where(~(after.isnan() | before.isnan()), float("nan"))
        return _summary(self, _mean(rose, _mask(self, positions)), "change rate", 0.5, layer=layers[1:])

    @with_provenance
    def top_k_rate(self, k: int = 5, positions: LensPositions = None) -> LensSummary:
        """Share of positions where a target is among the ``k`` highest columns: axes ``layer target example``.

        Raises InputError for a lens without targets, or a ``k`` beyond its columns.
        """
        _check_ranks(self)
        _check_k(k, self.n_outputs)
        inside = (self.ranks <= k).double().where(self.ranks > 0, float("nan"))
        return _summary(self, _mean(inside, _mask(self, positions)), f"top-{k} rate", k / self.n_outputs)

    @with_provenance
    def top_k_agreement(self, other: LensSummaries, k: int = 5, positions: LensPositions = None) -> LensSummary:
        """Share of the ``k`` highest columns that this lens and another of the same sites and rows both name: axes ``layer example``.

        Five columns are kept at every place, more with ``top_k=``. Raises InputError for lenses that do not fit, or a ``k`` beyond what is kept.
        """
        first, second = self.ids[..., 0, :], other.ids[..., 0, :]
        if first.shape != second.shape or self.n_outputs != other.n_outputs:
            raise InputError(
                f"The lenses have columns of {tuple(first.shape)} and {tuple(second.shape)} places, of {self.n_outputs} and "
                f"{other.n_outputs}; read the same sites of the same rows."
            )
        _check_k(k, min(self.ids.shape[-2], other.ids.shape[-2]))
        both = (self.ids[..., :k, None, :] == other.ids[..., None, :k, :]).any(-2).double().mean(-2)
        both = both.where(~(_lost(self) | _lost(other)), float("nan"))
        values = _mean(both[..., None, :], _mask(self, positions))[..., 0, :]
        return _summary(self, values, f"top-{k} agreement", k / self.n_outputs, last=False)

    @with_provenance
    def match_rates(self, attention: LensSummaries, mlp: LensSummaries, positions: LensPositions = None) -> LensSummary:
        """How often the highest column after a layer is that of its attention output, its MLP output, the stream before it, or of none.

        This lens starts with the input of block 0; the others are lenses of ``attn_out`` and ``mlp_out``. Axes ``source layer example``; sources
        overlap, but for "none". Raises InputError for other lenses, or of different rows.
        """
        layers = attention.axes.get("layer")
        if layers is None or mlp.axes.get("layer") != layers or self.axes.get("layer") != ["input", *layers]:
            raise InputError("match_rates compares lenses of the same layers; the stream's starts with 'input'.")
        best, of_attention, of_mlp = (lens.ids[..., 0, :] for lens in (self, attention, mlp))
        if not best.shape[1:] == of_attention.shape[1:] == of_mlp.shape[1:]:
            raise InputError("match_rates compares lenses of the same rows and positions, without a head axis.")
        after, before = best[1:], best[:-1]
        same = torch.stack([after == of_attention, after == of_mlp, after == before])
        same = torch.cat([same, ~same.any(0, keepdim=True)]).double()
        lost = _lost(self)[1:] | _lost(self)[:-1] | _lost(attention) | _lost(mlp)
        values = _mean(same.where(~lost, float("nan"))[..., None, :], _mask(self, positions))[..., 0, :]
        axes = {"source": ["attention", "mlp", "stream before", "none"], "layer": layers}
        axes["example"] = self.axes["example"]
        return LensSummary(values, axes, self.provenance, measure="match rate", tower=self.tower)

    @with_provenance
    def change_from(self, stream: LensSummaries) -> LensSummary:
        """What a branch says of a target beside the stream it reads, ``lens(branch_l) - lens(stream before l)``.

        Axes ``layer position target example``.

        Raises InputError for lenses of different towers, targets, measures, norms or rows.
        """
        for name in ("tower", "measure", "norm"):
            if getattr(self, name) != getattr(stream, name):
                raise InputError(f"The lenses differ in {name}: {getattr(self, name)!r} and {getattr(stream, name)!r}.")
        if self.axes["example"] != stream.axes["example"]:
            raise InputError("The lenses are of other examples, or of their rows in another order.")
        if self.axes.get("target") != stream.axes.get("target") or "target" not in self.axes:
            raise InputError(
                f"The lenses have other targets: {self.axes.get('target')} and {stream.axes.get('target')}."
            )
        layers = self.axes.get("layer", [])
        if not layers or stream.axes.get("layer", [])[: len(layers)] != ["input", *layers[:-1]]:
            raise InputError("The stream's lens must start with 'input' and cover the branch's layers.")
        values = self.values - stream.values[: len(layers)]
        return LensSummary(values, self.axes, self.provenance, measure="change from the stream", tower=self.tower)

    def position_difference(
        self,
        positions: LensPositions,
        among: LensPositions = None,
        *,
        shuffles: int = 300,
        seed: int = 0,
    ) -> PositionDifference:
        """Mean over the positions of all rows minus that over the others ``among`` which they lie, with a permutation test within rows.

        Raises InputError if either side is empty, or for a lens with a head axis.
        """
        if self.values.ndim != 4:
            raise InputError("The positions of a lens are compared without a head axis; read a site without heads.")
        pool = _mask(self, among).bool()
        inside = _mask(self, positions).bool() & pool
        if not bool(inside.any()) or not bool((pool & ~inside).any()):
            raise InputError("Both sides of the difference need at least one position.")

        by_row = self.values.movedim(-1, 1)

        def means(chosen: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(by_row[:, part].double().mean(1) for part in (chosen, pool & ~chosen))  # type: ignore[return-value]

        first, rest = means(inside)
        generator = torch.Generator().manual_seed(seed)
        larger = torch.zeros_like(first)
        for _ in range(shuffles):
            noise = torch.rand(pool.shape, generator=generator).masked_fill(~pool, 2.0)
            drawn, others = means(noise.argsort(-1).argsort(-1) < inside.sum(-1, keepdim=True))
            larger += (drawn - others) >= (first - rest)
        return PositionDifference(first, rest, (larger + 1) / (shuffles + 1), shuffles)


def _summary(
    lens: LensSummaries, values: Tensor, measure: str, chance: float, last: bool = True, **axes: list[Any]
) -> LensSummary:
    """A mean over positions: the lens's axes without that of positions (and without that of targets or ranks), some of them replaced."""
    left_out = ("position",) if last else ("position", "target", "rank")
    named = {name: axes.get(name, labels) for name, labels in lens.axes.items() if name not in left_out}
    return LensSummary(values, named, lens.provenance, measure=measure, chance=chance, tower=lens.tower)


def _check_ranks(lens: LensSummaries) -> None:
    if not lens.ranks.numel():
        raise InputError("This lens has no ranks; read it with targets=, and before taking a contrast.")


def _check_k(k: int, most: int) -> None:
    if not isinstance(k, int) or not 1 <= k <= most:
        raise InputError(
            f"k is a whole number from 1 to {most} here, not {k!r}; a lens keeps more columns with top_k=."
        )


def _lost(lens: LensSummaries) -> Bool[Tensor, "layer pos example"]:
    """Where a lens has no number: what stands highest there means nothing."""
    return lens.values.isnan().any(-2)


def _mask(lens: LensSummaries, positions: LensPositions) -> Float[Tensor, "row pos"]:
    if isinstance(positions, Selection):
        if positions.tower != lens.tower:
            raise InputError(
                f"This is a lens of the {lens.tower} tower, and a selection of the {positions.tower} tower."
            )
        # A lens of patches alone lacks the tower's first positions.
        positions = positions.tensor[:, lens.axes["position"]]
    if isinstance(positions, Tensor):
        shape = (len(lens.axes["example"]), len(lens.axes["position"]))
        if positions.dtype != torch.bool or tuple(positions.shape) != shape:
            raise InputError(
                f"A mask of positions is bool [row pos] = {list(shape)}, not {positions.dtype} {list(positions.shape)}."
            )
        mask = positions.cpu().double()
    else:
        kinds = [positions] if isinstance(positions, str) else positions
        counts = [[(kind in kinds) if kinds else kind not in ABSENT for kind in row] for row in lens.kinds]
        mask = torch.tensor(counts, dtype=torch.float64)
    present = torch.tensor([any(kind not in ABSENT for kind in row) for row in lens.kinds])
    if not bool(mask.any(1)[present].all()):
        which = "in the mask" if isinstance(positions, Tensor) else f"of the kind {positions!r}"
        raise InputError(f"A row of this lens has no position {which}.")
    return mask


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions, ``[… position target example]`` → ``[… target example]``. What lies outside the mask ``[row position]`` does not count,
    not even as a NaN."""
    weights = (mask / mask.sum(-1, keepdim=True)).T[:, None]
    return (values.double().where(weights > 0, 0.0) * weights).sum(-3)
