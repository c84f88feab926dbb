"""How far patched activations are from natural ones, and which units behind them run outside what they ever do.

*Divergence* ``D = W₂(H', N_y) / W₂(N_y half, N_y half)``: patched activations against natural ones of the same target, over the distance of two
halves of the natural ones. Every coordinate is first scaled by the natural mean and standard deviation (standardising both sets by themselves would
hide a shift of the mean). ``W₂`` is exact, between sets of equal size. A region of natural values that is no box along the axes is left by any
interchange of coordinates, so ``D`` alone is no verdict.

*Recruitment*: a unit behind the site is recruited where its value under the edit lies outside the 1 … 99 % of its natural values, over all classes;
``ρ = 1 − E(effect with units clamped to that range) / E(effect)``. Near 1, the effect runs through what natural inputs never use.

Not covered: Sinkhorn and energy distances.

Source: Grant et al. (ICLR 2026) on divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError, checked_seed

MOST = 400
"""Activations of one set that are compared, at most."""
FEWEST = 4
"""Natural activations of a target that tell how much they differ among themselves, at least."""


def wasserstein2(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> float:
    """``W₂`` of two sets of as many points, by the best assignment; InputError for sets of other sizes."""
    from scipy.optimize import linear_sum_assignment

    if first.shape != second.shape or not len(first):
        raise InputError(f"W₂ is between sets of as many points, not {tuple(first.shape)} and {tuple(second.shape)}.")
    cost = torch.cdist(first.double(), second.double()).square().cpu().numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))


def gaussian_wasserstein2(
    mean: Float[Tensor, " d"],
    covariance: Float[Tensor, "d d"],
    other: Float[Tensor, " d"],
    of_other: Float[Tensor, "d d"],
) -> float:
    """``W₂`` of two Gaussians: ``W₂² = |m − m'|² + tr(C + C' − 2 (C^½ C' C^½)^½)``."""
    root = _root(covariance.double())
    cross = _root(root @ of_other.double() @ root)
    square = (mean - other).double().square().sum() + (
        covariance.double() + of_other.double() - 2 * cross
    ).diagonal().sum()
    return float(square.clamp_min(0).sqrt())


def _root(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)


def divergence(
    patched: Float[Tensor, "entry d"],
    targets: Sequence[Any],
    natural: Float[Tensor, "other d"],
    labels: Sequence[Any],
    seed: int = 0,
) -> float:
    """``D`` of the module, the mean over targets weighted by their patched activations; NaN where no target has enough natural ones."""
    rng = np.random.default_rng(checked_seed(seed))
    centre, spread = natural.double().mean(0), natural.double().std(0)
    spread = spread.clamp_min(1e-6 * float(spread.max().clamp_min(1e-30)))
    moved, there = (patched.double() - centre) / spread, (natural.double() - centre) / spread
    total = weight = 0.0
    for target in dict.fromkeys(targets):
        own = np.array([row for row, one in enumerate(labels) if one == target])
        here = np.array([row for row, one in enumerate(targets) if one == target])
        half = min(len(own) // 2, MOST)
        if half < FEWEST // 2:
            continue
        order = rng.permutation(own)
        one, two = there[torch.from_numpy(order[:half])], there[torch.from_numpy(order[half : 2 * half])]
        drawn = here[rng.permutation(len(here))] if len(here) >= half else here[rng.integers(len(here), size=half)]
        floor = wasserstein2(one, two)
        if floor > 0:
            found = wasserstein2(moved[torch.from_numpy(drawn[:half])], one) / floor
            total, weight = total + len(here) * found, weight + len(here)
    return total / weight if weight else float("nan")


def natural_range(
    natural: Float[Tensor, "example unit"], low: float = 0.01, high: float = 0.99
) -> tuple[Float[Tensor, " unit"], Float[Tensor, " unit"]]:
    """The 1st and 99th percentile of every unit over natural runs (interpolated)."""
    exact = natural.double()
    return torch.quantile(exact, low, dim=0), torch.quantile(exact, high, dim=0)


def recruited(
    units: Float[Tensor, "example unit"], low: Float[Tensor, " unit"], high: Float[Tensor, " unit"]
) -> Bool[Tensor, "example unit"]:
    """Which units lie outside their natural range, by more than rounding."""
    slack = 1e-6 * torch.maximum(low.abs(), high.abs()).clamp_min(1e-6)
    return (units < low - slack) | (units > high + slack)


def recruitment(effect: Float[Tensor, " example"], clamped: Float[Tensor, " example"]) -> float:
    """``ρ = 1 − Σ clamped / Σ effect``; NaN where there is no effect."""
    whole = float(effect.double().sum())
    if abs(whole) <= 1e-9 * max(float(effect.double().abs().sum()), 1e-30):
        return float("nan")
    return 1.0 - float(clamped.double().sum()) / whole
