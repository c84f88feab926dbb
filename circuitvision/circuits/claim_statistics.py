"""Statistics of a circuit's claim, on scores per example: equivalence, independence, and p-values of draws.

Every p-value of draws counts what was observed among them, ``(1 + how many are at least as extreme) / (1 + how many)``, so that none is 0.

Not covered: power; sequential testing.

Reference: Shi et al. 2024 (arXiv 2410.13032); Gretton et al. 2005 (HSIC); Schuirmann 1987 (TOST); Holm 1979; Benjamini and Hochberg 1995. The public
code of the first feeds its sign test the mean difference in place of the share of wins, and one kernel width to both variables of HSIC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError


class Tested(NamedTuple):
    """A statistic, its p-value, and how many examples (or draws) it rests on."""

    statistic: float
    p: float
    n: int


def sign_test(wins: int, n: int, tolerance: float = 0.1) -> float:
    """The p-value of ``wins`` of ``n`` under the hypothesis that each side wins with a probability within ``tolerance`` of 1/2.

    ``Σ C(n, j) (1/2 + e)^j (1/2 - e)^(n-j)`` over all ``j`` at least as far from ``n/2``. A small value says *not* equivalent; a large one is no
    evidence that they are equivalent, as few examples give it too. 1 for ``n = 0``.

    Raises:
        InputError: a tolerance outside 0 to 1/2, more wins than examples.
    """
    if not 0 <= tolerance < 0.5 or not 0 <= wins <= n:
        raise InputError(f"tolerance={tolerance} must lie in [0, 0.5), and wins={wins} in [0, {n}].")
    from scipy.stats import binom

    counts = np.arange(n + 1)
    as_far = np.abs(2 * counts - n) >= abs(2 * wins - n)
    return float(min(1.0, binom.pmf(counts[as_far], n, 0.5 + tolerance).sum()))


def tost(differences: Float[Tensor, " example"], margin: float) -> Tested:
    """Two one-sided t-tests: a small p-value says that the mean difference lies within ``margin`` of 0. The statistic is the smaller of both.

    NaN for fewer than two examples; with no spread p is 0 or 1.

    Raises:
        InputError: a margin that is not above 0.
    """
    if not margin > 0:
        raise InputError(f"margin={margin} must be above 0.")
    from scipy.stats import t

    held = differences.double()
    held = held[held.isfinite()]
    n = len(held)
    if n < 2:
        return Tested(math.nan, math.nan, n)
    mean, error = float(held.mean()), float(held.std()) / math.sqrt(n)
    if error <= 1e-12 * margin:
        inside = abs(mean) < margin
        return Tested(math.inf if inside else -math.inf, 0.0 if inside else 1.0, n)
    statistic = (margin - abs(mean)) / error
    return Tested(statistic, float(t.sf(statistic, n - 1)), n)


def hsic(first: Float[Tensor, " example"], second: Float[Tensor, " example"]) -> float:
    """``tr(K H L H) / (n - 1)²`` with Gaussian kernels, each of the median distance of its own variable; 0 where one does not vary."""
    kernels = [_kernel(one) for one in (first, second)]
    return float((_centred(kernels[0]) * kernels[1]).sum() / (len(first) - 1) ** 2)


def hsic_test(
    first: Float[Tensor, " example"], second: Float[Tensor, " example"], permutations: int = 1000, seed: int = 0
) -> Tested:
    """Whether two scores depend on each other: a small p-value says that they do. By permutations of one of them.

    NaN for fewer than four examples and without a permutation, p = 1 where one does not vary.
    """
    there = first.isfinite() & second.isfinite()
    first, second = first[there], second[there]
    n = len(first)
    if n < 4:
        return Tested(math.nan, math.nan, n)
    left, right = _centred(_kernel(first)), _kernel(second)
    observed = float((left * right).sum()) / (n - 1) ** 2
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(permutations):
        order = torch.randperm(n, generator=generator)
        drawn.append(float((left * right[order][:, order]).sum()) / (n - 1) ** 2)
    return Tested(observed, share_at_least(observed, drawn), n)


def _kernel(values: Float[Tensor, " example"]) -> Float[Tensor, "example example"]:
    held = values.double()
    away = (held[:, None] - held[None]).abs()
    apart = away[torch.triu(torch.ones_like(away), 1) > 0]
    width = float(apart.median()) if len(apart) else 0.0
    if width <= 0:
        width = float(apart[apart > 0].median()) if bool((apart > 0).any()) else 1.0
    return torch.exp(-away.square() / (2 * width**2))


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()


def share_at_least(observed: float, drawn: Sequence[float], rounding: float = 1e-9) -> float:
    """``(1 + how many draws are at least as large) / (1 + how many)``; equal within rounding counts.

    Draws that are no numbers do not count; NaN where what was observed is none, or without a draw.
    """
    drawn = [one for one in drawn if not math.isnan(one)]
    if math.isnan(observed) or not drawn:
        return math.nan
    edge = observed - rounding * max(1.0, abs(observed))
    return (1 + sum(one >= edge for one in drawn)) / (1 + len(drawn))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: of the whole family, the probability of any false rejection stays below the level. NaN stays NaN."""
    order = _ordered(values)
    found, largest = [math.nan] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[place]))
        found[place] = largest
    return found


def benjamini_hochberg(values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values: the expected share of false ones among the rejected stays below the level. NaN stays NaN."""
    order = _ordered(values)
    found, smallest = [math.nan] * len(values), 1.0
    for rank, place in zip(range(len(order), 0, -1), reversed(order), strict=True):
        smallest = min(smallest, values[place] * len(order) / rank)
        found[place] = smallest
    return found


def _ordered(values: Sequence[float]) -> list[int]:
    """The places of p-values from the smallest on; what was not tested is not of the family."""
    return [int(place) for place in np.argsort(values, kind="stable") if not math.isnan(values[place])]
