"""How well estimates of patching agree with patching itself: whether they order cells alike, and what they would miss.

A cell's score is the mean over examples of the size of its effect (``E |effect|``, as Kramár et al. score nodes), or the size of the mean effect. Of
the scores of an estimate and of the exact effects:

* ``spearman``: the correlation of their ranks, ties at their mean rank, over the cells that have an effect: those whose exact score is above
  rounding. The order of the others says nothing, and that they are last in both would flatter any estimate;
* ``overlap``: the share of the ``k`` largest exact scores that are among the ``k`` largest estimates;
* ``false_negatives``: how many of the ``k`` largest exact scores are not even among the ``2 k`` largest estimates: what a search that verifies the
  first ``2 k`` would lose.

Not covered: which way a cell pushes (compare ``estimate.mean()`` with ``exact.mean()``); uncertainty over examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError

ROUNDING = 1e-6
"""Share of the largest exact score up to which a score is rounding."""


@dataclass(frozen=True)
class Agreement:
    """Of an estimate with the exact effects over ``cells`` cells, for the ``k`` strongest; ``spearman`` is NaN where either is constant."""

    spearman: float
    overlap: float
    false_negatives: int
    k: int
    cells: int

    def __str__(self) -> str:
        return (
            f"Spearman {self.spearman:.2f} over {self.cells} cells, {self.overlap:.0%} of the top {self.k} shared, "
            f"{self.false_negatives} of them outside the first {2 * self.k}"
        )


def agreement(estimate: Any, exact: Any, k: int = 10, *, by: str = "size", metric: str | None = None) -> Agreement:
    """How well an estimate agrees with the exact result of the same cells.

    Args:
        estimate, exact: results of :func:`circuitvision.patching.attribution_patch` and :func:`circuitvision.patching.activation_patch`, of the same
            axes.
        k: how many cells count as strong.
        by: ``"size"``, the mean size over examples, or ``"mean"``, the size of the mean.
        metric: which of several.

    Raises:
        InputError: results of other cells or examples, fewer than ``k`` cells that have an effect, an unknown ``by``.
    """
    if by not in ("size", "mean"):
        raise InputError(f"by={by!r} is not understood: 'size' (mean of sizes) or 'mean' (size of the mean).")
    if estimate.axes != exact.axes:
        raise InputError(
            f"The two results are not of the same cells and examples: {list(estimate.axes)} and {list(exact.axes)}, or other labels."
        )
    found, wanted = (_scores(one, by, metric) for one in (estimate, exact))
    there = ~(found.isnan() | wanted.isnan())
    found, wanted = found[there], wanted[there]
    acts = wanted > ROUNDING * wanted.amax() if len(wanted) else there[:0]
    cells = int(acts.sum())
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= cells:
        raise InputError(f"k={k!r} is outside the {cells} cells that have an effect.")
    strong = set(wanted.argsort(descending=True, stable=True)[:k].tolist())
    order = found.argsort(descending=True, stable=True).tolist()
    return Agreement(
        spearman=rank_correlation(found[acts], wanted[acts]),
        overlap=len(strong & set(order[:k])) / k,
        false_negatives=len(strong - set(order[: 2 * k])),
        k=k,
        cells=cells,
    )


def _scores(result: Any, by: str, metric: str | None) -> Float[Tensor, " cell"]:
    values = result.values.double()
    if result.metrics:
        values = values[0 if metric is None else result.index_of("metric", metric)]
    values = values.flatten(0, -2)
    return values.abs().nanmean(-1) if by == "size" else values.nanmean(-1).abs()


def rank_correlation(one: Float[Tensor, " cell"], other: Float[Tensor, " cell"]) -> float:
    """Spearman's correlation of two vectors; NaN where either is constant."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    ranks = ranks - ranks.mean(-1, keepdim=True)
    size = ranks.norm(dim=-1).prod()
    return float((ranks[0] * ranks[1]).sum() / size) if float(size) else float("nan")


def _ranks(values: Float[Tensor, " cell"]) -> Float[Tensor, " cell"]:
    """Ranks from 0 on, ties at their mean."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts + 1) / 2)[place]
