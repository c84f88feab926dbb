"""What a lens says in one number per layer: rank, identifiability, change rate, match rate, contrast between two sets of positions.

* identifiability of an answer at a place: ``1 - r/K`` with ``r`` = how many of the ``K`` columns are strictly higher (ties favour the answer):
  1 for the highest, ``1/K`` for the lowest, ``(K+1)/(2K)`` by chance;
* change rate at layer ``l``: share of positions whose value of the answer is higher after layer ``l`` than before it;
* match rate of two lenses: share of positions whose highest columns agree. Of the stream with its attention and MLP outputs and the stream
  before: where a layer's answer comes from, and the share that agrees with none ("composition");
* contrast of positions: mean inside a selection minus mean outside, and how often a random selection of that size does as well (permutation
  test).

The decision layer is :func:`circuitvision.readout.probes.linear.decision_layer` of a lens's highest columns.

Source: Vilas et al. 2023, arXiv 2310.18969. Their released code compares a layer's answer twice with attention and never with the MLP; here
all are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.readout.lens.result import LensResult
from circuitvision.results import Result


@dataclass(frozen=True, eq=False)
class LensSummary(Result):
    """A summary of a lens: ``measure`` says what the values are, ``chance`` what they would be by chance (NaN: unknown)."""

    measure: str = ""
    chance: float = float("nan")
    tower: str = ""


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


def lens_identifiability(result: LensResult, kinds: str | list[str] | None = None) -> LensSummary:
    """Identifiability of every target at every layer: the mean over the positions of some kinds (None: all but padding).

    Axes ``layer row target``. Raises InputError for a lens without targets, or no position of the kinds.
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


def change_rate(result: LensResult, kinds: str | list[str] | None = None) -> LensSummary:
    """Share of positions whose value of a target rises from one layer to the next: axes ``layer row target``, from the second layer on."""
    _stream_only(result)
    rose = (result.values[1:] > result.values[:-1]).double()
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


def match_rates(
    stream: LensResult, attention: LensResult, mlp: LensResult, kinds: str | list[str] | None = None
) -> LensSummary:
    """How often the stream's highest column after a layer is that of its attention output, its MLP output, the stream before it, or of none.

    ``stream`` must start with the input of block 0; the others are lenses of ``attn_out`` and ``mlp_out``. Axes ``source layer row``; sources
    overlap, but for "none".
    """
    layers = attention.axes["layer"]
    if mlp.axes["layer"] != layers or stream.axes["layer"] != ["input", *layers]:
        raise InputError("match_rates compares lenses of the same layers; the stream's starts with 'input'.")
    after, before = stream.best[1:], stream.best[:-1]
    same = [after == attention.best, after == mlp.best, after == before]
    none = ~(same[0] | same[1] | same[2])
    mask = _mask(stream, kinds)
    values = torch.stack([_mean(found.double()[..., None], mask)[..., 0] for found in (*same, none)])
    axes = {"source": ["attention", "mlp", "stream before", "none"], "layer": layers, "row": stream.axes["row"]}
    return LensSummary(values, axes, stream.provenance, measure="match rate", tower=stream.tower)


def similarity_change(branch: LensResult, stream: LensResult) -> LensSummary:
    """What a branch says of a target beside the stream it reads: ``lens(branch_l) - lens(stream before l)``; axes ``layer row position target``.

    Raises InputError for lenses of different towers, targets, measures, norms or rows.
    """
    for name in ("tower", "measure", "norm", "example"):
        if getattr(branch, name) != getattr(stream, name):
            raise InputError(f"The lenses differ in {name}: {getattr(branch, name)!r} and {getattr(stream, name)!r}.")
    if branch.axes.get("target") != stream.axes.get("target") or "target" not in branch.axes:
        raise InputError(f"The lenses have other targets: {branch.axes.get('target')} and {stream.axes.get('target')}.")
    layers = branch.axes["layer"]
    if stream.axes["layer"][: len(layers)] != ["input", *layers[:-1]]:
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


def _mask(result: LensResult, kinds: str | list[str] | None) -> Float[Tensor, "row pos"]:
    wanted = [kinds] if isinstance(kinds, str) else kinds
    mask = torch.tensor(
        [[(kind in wanted) if wanted else kind != "padding" for kind in row] for row in result.kinds],
        dtype=torch.float64,
    )
    if not bool(mask.any(1).all()):
        raise InputError(f"A row of this lens has no position of the kind {kinds!r}.")
    return mask


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions (second axis from the end)."""
    weights = (mask / mask.sum(-1, keepdim=True))[..., None]
    return (values.double() * weights).sum(-2)


def _stream_only(result: LensResult) -> None:
    layers = result.axes.get("layer", [])
    whole = layers[:1] == ["input"] and layers[1:] == list(range(len(layers) - 1))
    if not whole or "target" not in result.axes:
        raise InputError(
            "The change rate compares the stream of successive layers; read the lens with targets= and the default sites."
        )
