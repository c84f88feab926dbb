"""What is said over examples: rows averaged within examples, the standard error of a mean, and a bootstrap interval of it.

:func:`by_example` is the one place where rows (images, tiles, cameras of an example) become examples, :func:`standard_error` the one formula of a
standard error, :func:`bootstrap_interval` the one of an interval of a mean, :func:`wilson` that of a share, :func:`auroc` says how well
scores rank. The last axis is that of examples; a value that is NaN was not measured and never counts as 0.

Not covered: intervals of anything but means and shares; weights of examples.

Sources: Efron 1987 (BCa); Wilson 1927.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, checked_seed

_CELLS = 1024
"""How many cells are drawn at once: a few tens of MiB."""


def by_example(values: Float[Tensor, "*axes row"], labels: Sequence[Any]) -> Float[Tensor, "*axes example"]:
    """Values per row as values per example (or examples per group): the mean over the rows of each label, in order of first appearance.

    NaN does not count; a label whose rows are all NaN is NaN. Where no label repeats, the values are returned as they are.

    Raises:
        InputError: not one label per row.
    """
    if len(labels) != values.shape[-1]:
        raise InputError(f"There are {len(labels)} labels for {values.shape[-1]} rows.")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    if len(numbers) == len(labels):
        return values
    index = torch.tensor([numbers[label] for label in labels], device=values.device)
    exact = values if values.is_floating_point() else values.double()
    there = ~exact.isnan()
    shape = (*exact.shape[:-1], len(numbers))
    total = torch.zeros(shape, dtype=exact.dtype, device=exact.device).index_add(
        -1, index, exact.nan_to_num(0.0, math.inf, -math.inf)
    )
    return total / torch.zeros_like(total).index_add(-1, index, there.to(exact.dtype))


def standard_error(values: Float[Tensor, "*axes example"]) -> Float[Tensor, "*axes"]:
    """Standard error of the mean over the last axis (independent examples), without NaN: ``√(Σ(x − x̄)² / (n − 1) / n)``; NaN for fewer than two."""
    exact = values.double()
    count = (~exact.isnan()).sum(-1)
    spread = (exact - exact.nanmean(-1, keepdim=True)).square().nansum(-1) / (count - 1)
    return torch.where(count > 1, (spread / count).sqrt(), torch.nan)


def bootstrap_interval(
    values: Float[Tensor, "*axes example"], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Tensor:
    """Low and high end ``[2 *axes]`` of the BCa bootstrap interval of the mean over the last axis, without NaN; NaN for fewer than two examples.

    BCa (Efron 1987) corrects the percentiles for bias and skew; the acceleration of a mean is ``Σd³ / (6 (Σd²)^1.5)`` with ``d = x − x̄``. All
    cells are drawn with the same counts, so that a draw of all cells is a matrix product: ``scipy.stats.bootstrap`` computes the same interval
    of one cell, but copies every draw of every cell, and gives NaN for a cell with a NaN. A share that is 0 or 1 in all examples has no width:
    for shares near those ends take Wilson's interval of the counts (``scipy.stats.binomtest``).

    Raises:
        InputError: a level outside 0 … 1, or fewer than 100 draws.
    """
    if not (isinstance(level, float) and 0 < level < 1 and isinstance(draws, int) and draws >= 100):
        raise InputError(
            f"An interval has a level between 0 and 1 and at least 100 draws, not {level!r} and {draws!r}."
        )
    count, shape = values.shape[-1], values.shape[:-1]
    flat = values.detach().cpu().double().reshape(-1, count).numpy()
    found = np.full((2, len(flat)), np.nan)
    if count > 1:
        drawn = (
            np.random.default_rng(checked_seed(seed))
            .multinomial(count, np.full(count, 1 / count), size=draws)
            .astype(float)
        )
        for first in range(0, len(flat), _CELLS):
            found[:, first : first + _CELLS] = _bca(flat[first : first + _CELLS], drawn, level)
    return torch.from_numpy(found).reshape(2, *shape)


def _bca(cells: np.ndarray, drawn: np.ndarray, level: float) -> np.ndarray:
    """Ends ``[2 cell]`` of the intervals of the means of ``cells [cell example]``, of which ``drawn [draw example]`` says how often each is drawn."""
    from scipy.special import ndtr, ndtri

    there = ~np.isnan(cells)
    numbers, count = np.where(there, cells, 0.0), there.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = numbers.sum(1) / count
        means = (drawn @ numbers.T) / (drawn @ there.T)
        deviation = np.where(there, cells - mean[:, None], 0.0)
        square = (deviation**2).sum(1)
        acceleration = np.where(square > 0, (deviation**3).sum(1) / (6 * square**1.5), 0.0)
        # A draw may hold none of the examples that have a value: it says nothing.
        valid = (~np.isnan(means)).sum(0)
        # Of few distinct values many draws have the mean itself; rounding must not count them to one side.
        tie = 1e-12 * np.abs(numbers).max(1)
        below = ((means < mean - tie).sum(0) + (means <= mean + tie).sum(0)) / (2 * valid)
        bias = ndtri(below.clip(0.5 / valid, 1 - 0.5 / valid))
        z = bias + ndtri(np.array([[(1 - level) / 2], [(1 + level) / 2]]))
        share = ndtr(bias + z / (1 - acceleration * z))
    means.sort(axis=0)
    place = np.where(count > 1, share * (valid - 1), 0.0)
    low = np.floor(place).astype(int)
    ends = [np.take_along_axis(means, np.minimum(low + step, len(means) - 1), axis=0) for step in (0, 1)]
    between = place - low
    found = np.where(between > 0, ends[0] * (1 - between) + ends[1] * between, ends[0])
    return np.where(count > 1, found, np.nan)


def wilson(share: Float[Tensor, "*axes"], count: int, level: float = 0.95) -> Tensor:
    """Low and high end ``[2 *axes]`` of Wilson's interval of a ``share`` of ``count`` yes or no answers (Wilson 1927); NaN of nothing.

    Unlike a bootstrap it has a width where all answers are alike.
    """
    from scipy.special import ndtri

    exact = share.double()
    if count == 0:
        return torch.full((2, *exact.shape), torch.nan, dtype=torch.float64)
    z = float(ndtri((1 + level) / 2))
    middle = (exact + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (exact * (1 - exact) / count + z * z / (4 * count * count)).sqrt()
    return torch.stack([(middle - half).clamp(min=0), (middle + half).clamp(max=1)])


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The area under the ROC curve: the share of (positive, negative) couples in which the positive one has the higher score, ties counted half.

    ``(Σ ranks of the positives − P (P + 1) / 2) / (P N)`` with mean ranks of ties (Mann and Whitney 1947).

    Raises:
        InputError: not one label per score, a score that is not finite, or only one kind of label.
    """
    found, labels = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if found.shape != labels.shape or found.ndim != 1:
        raise InputError(f"There are {labels.size} labels for {found.size} scores.")
    if not np.isfinite(found).all():
        raise InputError("A score is not finite, and has no rank.")
    hits = int(labels.sum())
    if not 0 < hits < len(labels):
        raise InputError("All examples are of one kind; a ranking tells two kinds apart.")
    from scipy.stats import rankdata

    return float((rankdata(found)[labels].sum() - hits * (hits + 1) / 2) / (hits * (len(labels) - hits)))


def seed_of_draw(seed: int, number: int) -> int:
    """The seed of one of several draws under a seed: draws of other seeds are other draws, where ``seed + number`` would give them again.

    Raises:
        InputError: as :func:`checked_seed`.
    """
    return int(np.random.SeedSequence([int(checked_seed(seed)), number]).generate_state(1, np.uint64)[0] >> 1)
