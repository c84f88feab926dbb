"""What a lens says in one number per layer: rank, identifiability, change rate, match rate, contrast between two sets of positions.

* identifiability of an answer at a place: ``1 - r/K`` with ``r`` = how many of the ``K`` columns are strictly higher (ties favour the answer):
  1 for the highest, ``1/K`` for the lowest, ``(K+1)/(2K)`` by chance;
* change rate at layer ``l``: share of positions whose value of the answer is higher after layer ``l`` than before it;
* top-k rate: share of positions where the answer is among the ``k`` highest columns, ``k/K`` by chance (Neo et al.: on the patches of an object);
* top-k agreement of two lenses: share of their ``k`` highest columns that both name;
* match rate of two lenses: share of positions whose highest columns agree. Of the stream with its attention and MLP outputs and the stream
  before: where a layer's answer comes from, and the share that agrees with none ("composition");
* contrast of positions: mean inside a selection minus mean outside, and how often a random selection of that size does as well (permutation
  test).

Positions are chosen by ``kinds``: kinds of positions, a selection (``tokens.image(0).box(…)``: the patches of an object), or a mask ``[row pos]``;
by default all but padding.

The decision layer is :func:`circuitvision.readout.probes.decisions.decision_layer` of a lens's highest columns.

Sources: Vilas et al. 2023, arXiv 2310.18969; Neo et al. 2024, arXiv 2410.07149. The former's released code compares a layer's answer twice
with attention and never with the MLP; here all are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.selection import Selection
from circuitvision.model.tokens import ABSENT
from circuitvision.provenance import with_provenance
from circuitvision.readout.lens.result import LensResult
from circuitvision.results import Result

Kinds = str | list[str] | Selection | Bool[Tensor, "row pos"] | None


@dataclass(frozen=True, eq=False)
class LensSummary(Result):
    """A summary of a lens: ``measure`` says what the values are, ``chance`` what they would be by chance (NaN: unknown)."""

    measure: str = ""
    chance: float = float("nan")
    tower: str = ""

    def highlights(self) -> dict[str, str]:
        """The measure at the first and at the last layer, the mean over everything else, beside chance."""
        axis = "layer" if "layer" in self.axes else next(iter(self.axes))
        lines = self.mean().movedim(list(self.axes).index(axis), 0).reshape(len(self.axes[axis]), -1).nanmean(1)
        ends = " … ".join(f"{float(lines[at]):.3g} ({axis} {self.axes[axis][at]})" for at in (0, -1))
        chance = "" if self.chance != self.chance else f", by chance {self.chance:.3g}"
        return {self.measure: ends + chance}


@dataclass(frozen=True)
class Difference:
    """A difference of means and its permutation test: ``p`` is the share of random selections with a difference at least as large."""

    inside: float
    outside: float
    p: float
    shuffles: int

    @property
    def value(self) -> float:
        """Mean inside minus mean outside."""
        return self.inside - self.outside


def rank(logits: Float[Tensor, "*batch n_out"], answer: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """1 plus how many columns are strictly higher than the answer's; 0 where the answer's value is not a number."""
    value = logits.gather(-1, answer[..., None])
    return (1 + (logits > value).sum(-1)).where(~value[..., 0].isnan(), 0)


def identifiability(ranks: Int[Tensor, "*batch"], n_outputs: int) -> Float[Tensor, "*batch"]:
    """``1 - (rank - 1)/K``: 1 for the highest column, ``1/K`` for the lowest, ``(K+1)/(2K)`` by chance; NaN where there is no rank."""
    return torch.where(ranks > 0, 1 - (ranks.double() - 1) / n_outputs, float("nan"))


@with_provenance
def lens_identifiability(result: LensResult, kinds: Kinds = None) -> LensSummary:
    """Identifiability of every target at every layer: the mean over the positions of some kinds (None: all but padding).

    Axes ``layer target example``. Raises InputError for a lens without targets, or no position of the kinds.
    """
    if not result.ranks.numel():
        raise InputError("This lens has no ranks; read it with targets=, and before taking a contrast.")
    mask = _mask(result, kinds)
    found = identifiability(result.ranks, result.n_outputs)
    axes = {name: labels for name, labels in result.axes.items() if name != "position"}
    chance = (result.n_outputs + 1) / (2 * result.n_outputs)
    return LensSummary(
        _mean(found, mask), axes, result.provenance, measure="identifiability", chance=chance, tower=result.tower
    )


@with_provenance
def change_rate(result: LensResult, kinds: Kinds = None) -> LensSummary:
    """Share of positions whose value of a target rises from one layer to the next: axes ``layer target example``, from the second layer on.

    NaN where a position of the kinds has no number before or after. Raises InputError for anything but the default sites, with targets.
    """
    _stream_only(result)
    rose = (result.values[1:] > result.values[:-1]).double()
    rose = rose.where(~(result.values[1:].isnan() | result.values[:-1].isnan()), float("nan"))
    axes = {
        name: labels[1:] if index == 0 else labels
        for index, (name, labels) in enumerate(result.axes.items())
        if name != "position"
    }
    return LensSummary(
        _mean(rose, _mask(result, kinds)),
        axes,
        result.provenance,
        measure="change rate",
        chance=0.5,
        tower=result.tower,
    )


@with_provenance
def top_k_rate(result: LensResult, k: int = 5, kinds: Kinds = None) -> LensSummary:
    """Share of positions where a target is among the ``k`` highest columns: axes ``layer target example``; NaN where one has no number.

    Raises InputError for a lens without targets, or a ``k`` beyond its columns.
    """
    if not result.ranks.numel():
        raise InputError("This lens has no ranks; read it with targets=, and before taking a contrast.")
    _check_k(k, result.n_outputs)
    inside = (result.ranks <= k).double().where(result.ranks > 0, float("nan"))
    axes = {name: labels for name, labels in result.axes.items() if name != "position"}
    return LensSummary(
        _mean(inside, _mask(result, kinds)),
        axes,
        result.provenance,
        measure=f"top-{k} rate",
        chance=k / result.n_outputs,
        tower=result.tower,
    )


@with_provenance
def top_k_agreement(first: LensResult, second: LensResult, k: int = 5, kinds: Kinds = None) -> LensSummary:
    """Share of the ``k`` highest columns that two lenses of the same sites and rows both name: axes ``layer example``; NaN where one has no number.

    Five columns are kept at every place, more with ``top_k=``. Raises InputError for lenses that do not fit, or a ``k`` beyond what is kept.
    """
    if first.best.shape != second.best.shape or first.n_outputs != second.n_outputs:
        raise InputError(
            f"The lenses have columns of {tuple(first.best.shape)} and {tuple(second.best.shape)} places, of {first.n_outputs} and "
            f"{second.n_outputs}; read the same sites of the same rows."
        )
    _check_k(k, min(first.ids.shape[-2], second.ids.shape[-2]))
    both = (first.ids[..., :k, None, :] == second.ids[..., None, :k, :]).any(-2).double().mean(-2)
    both = both.where(~(_lost(first) | _lost(second)), float("nan"))
    axes = {name: labels for name, labels in first.axes.items() if name not in ("position", "target", "rank")}
    values = _mean(both[..., None, :], _mask(first, kinds))[..., 0, :]
    return LensSummary(
        values,
        axes,
        first.provenance,
        measure=f"top-{k} agreement",
        chance=k / first.n_outputs,
        tower=first.tower,
    )


def _check_k(k: int, most: int) -> None:
    if not isinstance(k, int) or not 1 <= k <= most:
        raise InputError(
            f"k is a whole number from 1 to {most} here, not {k!r}; a lens keeps more columns with top_k=."
        )


@with_provenance
def match_rates(stream: LensResult, attention: LensResult, mlp: LensResult, kinds: Kinds = None) -> LensSummary:
    """How often the stream's highest column after a layer is that of its attention output, its MLP output, the stream before it, or of none.

    ``stream`` must start with the input of block 0; the others are lenses of ``attn_out`` and ``mlp_out``. Axes ``source layer example``; sources
    overlap, but for "none". NaN where a position of the kinds has no number. Raises InputError for other lenses, or of different rows.
    """
    layers = attention.axes.get("layer")
    if layers is None or mlp.axes.get("layer") != layers or stream.axes.get("layer") != ["input", *layers]:
        raise InputError("match_rates compares lenses of the same layers; the stream's starts with 'input'.")
    if not stream.best.shape[1:] == attention.best.shape[1:] == mlp.best.shape[1:]:
        raise InputError("match_rates compares lenses of the same rows and positions, without a head axis.")
    after, before = stream.best[1:], stream.best[:-1]
    same = [after == attention.best, after == mlp.best, after == before]
    none = ~(same[0] | same[1] | same[2])
    lost = _lost(stream)[1:] | _lost(stream)[:-1] | _lost(attention) | _lost(mlp)
    mask = _mask(stream, kinds)
    shares = [found.double().where(~lost, float("nan")) for found in (*same, none)]
    values = torch.stack([_mean(share[..., None, :], mask)[..., 0, :] for share in shares])
    axes = {"source": ["attention", "mlp", "stream before", "none"], "layer": layers}
    axes["example"] = stream.axes["example"]
    return LensSummary(values, axes, stream.provenance, measure="match rate", tower=stream.tower)


def _lost(result: LensResult) -> Bool[Tensor, "layer pos example"]:
    """Where a lens has no number: what stands highest there means nothing."""
    return result.values.isnan().any(-2)


@with_provenance
def similarity_change(branch: LensResult, stream: LensResult) -> LensSummary:
    """What a branch says of a target beside the stream it reads: ``lens(branch_l) - lens(stream before l)``; axes ``layer position target example``.

    Raises InputError for lenses of different towers, targets, measures, norms or rows.
    """
    for name in ("tower", "measure", "norm"):
        if getattr(branch, name) != getattr(stream, name):
            raise InputError(f"The lenses differ in {name}: {getattr(branch, name)!r} and {getattr(stream, name)!r}.")
    if branch.axes["example"] != stream.axes["example"]:
        raise InputError("The lenses are of other examples, or of their rows in another order.")
    if branch.axes.get("target") != stream.axes.get("target") or "target" not in branch.axes:
        raise InputError(f"The lenses have other targets: {branch.axes.get('target')} and {stream.axes.get('target')}.")
    layers = branch.axes.get("layer", [])
    if not layers or stream.axes.get("layer", [])[: len(layers)] != ["input", *layers[:-1]]:
        raise InputError("The stream's lens must start with 'input' and cover the branch's layers.")
    return LensSummary(
        branch.values - stream.values[: len(layers)],
        branch.axes,
        branch.provenance,
        measure="class similarity change",
        tower=branch.tower,
    )


def difference(
    values: Float[Tensor, "row pos"],
    inside: Bool[Tensor, "row pos"],
    among: Bool[Tensor, "row pos"],
    *,
    shuffles: int = 300,
    seed: int = 0,
) -> Difference:
    """Mean of the values inside a set of positions minus that of the others ``among`` which it lies, with a permutation test within rows.

    Raises InputError if either side is empty.
    """
    inside = inside & among
    if not bool(inside.any()) or not bool((among & ~inside).any()):
        raise InputError("Both sides of the difference need at least one position.")
    real = _gap(values, inside, among)
    generator = torch.Generator().manual_seed(seed)
    larger = 0
    for _ in range(shuffles):
        noise = torch.rand(values.shape, generator=generator).masked_fill(~among, 2.0)
        order = noise.argsort(-1).argsort(-1)
        larger += int(_gap(values, order < inside.sum(-1, keepdim=True), among) >= real)
    return Difference(
        float(values[inside].double().mean()),
        float(values[among & ~inside].double().mean()),
        (larger + 1) / (shuffles + 1),
        shuffles,
    )


def _gap(values: Tensor, inside: Tensor, among: Tensor) -> float:
    return float(values[inside].double().mean() - values[among & ~inside].double().mean())


def _mask(result: LensResult, kinds: Kinds) -> Float[Tensor, "row pos"]:
    if isinstance(kinds, Selection):
        if kinds.tower != result.tower:
            raise InputError(f"This is a lens of the {result.tower} tower, and a selection of the {kinds.tower} tower.")
        # A lens of patches alone lacks the tower's first positions.
        kinds = kinds.tensor[:, result.axes["position"]]
    if isinstance(kinds, Tensor):
        shape = (len(result.axes["example"]), len(result.axes["position"]))
        if kinds.dtype != torch.bool or tuple(kinds.shape) != shape:
            raise InputError(
                f"A mask of positions is bool [row pos] = {list(shape)}, not {kinds.dtype} {list(kinds.shape)}."
            )
        mask = kinds.cpu().double()
    else:
        wanted = [kinds] if isinstance(kinds, str) else kinds
        mask = torch.tensor(
            [[(kind in wanted) if wanted else kind not in ABSENT for kind in row] for row in result.kinds],
            dtype=torch.float64,
        )
    there = torch.tensor([any(kind not in ABSENT for kind in row) for row in result.kinds])
    if not bool(mask.any(1)[there].all()):
        what = "in the mask" if isinstance(kinds, Tensor) else f"of the kind {kinds!r}"
        raise InputError(f"A row of this lens has no position {what}.")
    return mask


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions, ``[… position target example]`` → ``[… target example]``. What lies outside the mask ``[row position]`` does not count,
    not even as a NaN."""
    weights = (mask / mask.sum(-1, keepdim=True)).T[:, None]
    return (values.double().where(weights > 0, 0.0) * weights).sum(-3)


def _stream_only(result: LensResult) -> None:
    layers = result.axes.get("layer", [])
    whole = layers[:1] == ["input"] and layers[1:] == list(range(len(layers) - 1))
    if not whole or "target" not in result.axes:
        raise InputError(
            "The change rate compares the stream of successive layers; read the lens with targets= and the default sites."
        )
