"""Faithfulness from metrics of runs: a ratio of means over examples, its interval by scene, and areas under curves of it.

    ``f = (mean m(C) − mean m(empty)) / (mean m(clean) − mean m(empty))``

Means are taken before the ratio, never after: single examples whose two runs hardly differ would decide a mean of ratios. What is drawn again for an
interval is what is independent: groups (scenes) where the data names them, else examples. A group counts by its examples, so that the ratio is the
same with groups and without, and its interval is not. Where the denominator cannot be told from 0 (within two standard errors, by group; within
rounding) the ratio is NaN.

Areas are those of MIB (Mueller et al. 2025, arXiv 2504.13151) with the ends that its code leaves out: a curve begins at no edge, where ``f = 0``, and
ends at all, where ``f = 1``, and between two points ``f`` is a line. The area of ``|1 − f|`` is split where the line crosses 1.

Not covered: several metrics at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, checked_seed
from circuitvision.metrics.effects import ROUNDING
from circuitvision.statistics import by_example, standard_error

_CELLS = 4096
"""How many cells are drawn at once."""


@dataclass(frozen=True)
class Kept:
    """The metric under circuits beside that of the clean and the empty run, per unit: an example, or a group of examples.

    Of a group these are sums, divided by the mean size of groups, and ``weight`` is its size in those units (1 of an example): means over units are
    means over examples.
    """

    values: Float[Tensor, "*axes unit"]
    empty: Float[Tensor, "*axes unit"]
    clean: Float[Tensor, "*axes unit"]
    weight: Float[Tensor, "*axes unit"]

    @classmethod
    def of(cls, values: Tensor, empty: Tensor, clean: Tensor, examples: Sequence[Any], groups: Sequence[Any]) -> Kept:
        """From metrics ``[*axes row]`` and the example of each row; ``groups`` has one entry per row or per example, or none."""
        three = [one.detach().cpu().double() for one in torch.broadcast_tensors(values, empty, clean)]
        there = three[0].isfinite() & three[1].isfinite() & three[2].isfinite()
        three = [by_example(one.masked_fill(~there, torch.nan), examples) for one in three]
        weight = torch.ones_like(three[0]).masked_fill(three[0].isnan(), torch.nan)
        if groups:
            own = list(groups)
            if len(own) == len(examples):
                own = list(dict(zip(examples, own, strict=True)).values())
            size = torch.tensor(list(Counter(own).values()), dtype=torch.float64)
            held = by_example(weight.nan_to_num(0.0), own) * size
            weight = (held / held.mean(-1, keepdim=True)).masked_fill(held == 0, torch.nan)
            three = [by_example(one, own) * weight for one in three]
        return cls(three[0], three[1], three[2], weight)

    @property
    def gap(self) -> Float[Tensor, "*axes unit"]:
        """What the clean run has above the empty one."""
        return self.clean - self.empty

    @property
    def gap_error(self) -> Float[Tensor, "*axes"]:
        """The standard error of the mean gap; that groups differ in size is no spread of it."""
        mean = self.gap.nanmean(-1, keepdim=True)
        return standard_error(self.gap - mean * self.weight)

    @property
    def share(self) -> Float[Tensor, "*axes"]:
        """The ratio of means; NaN where its denominator cannot be told from 0."""
        mean = self.gap.nanmean(-1)
        rounding = ROUNDING * (self.clean.abs() + self.empty.abs()).nanmean(-1)
        floor = torch.maximum(2 * self.gap_error.nan_to_num(0.0), rounding)
        return torch.where(mean.abs() > floor, (self.values - self.empty).nanmean(-1) / mean, torch.nan)

    @property
    def error(self) -> Float[Tensor, "*axes"]:
        """Its standard error to first order (Cochran 1977, section 6.3); NaN for one unit."""
        rest = self.values - self.empty - self.share[..., None] * self.gap
        return standard_error(rest) / self.gap.nanmean(-1).abs()

    def draws(self, draws: int, seed: int) -> Tensor:
        """The ratio ``[draw *axes]`` with units drawn again, the same ones in all cells; NaN where it is NaN, and for fewer than two units."""
        count, shape = self.values.shape[-1], self.values.shape[:-1]
        found = torch.full((draws, *shape), torch.nan, dtype=torch.float64)
        if count < 2:
            return found
        rng = np.random.default_rng(checked_seed(seed))
        drawn = torch.from_numpy(rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float))
        above, below = (one.reshape(-1, count) for one in (self.values - self.empty, self.gap))
        flat = found.view(draws, -1)
        for first in range(0, len(above), _CELLS):
            part = slice(first, first + _CELLS)
            flat[:, part] = (drawn @ above[part].nan_to_num().T) / (drawn @ below[part].nan_to_num().T)
        return found.masked_fill(self.share.isnan(), torch.nan)

    def interval(self, level: float, draws: int, seed: int) -> Tensor:
        """Low and high end ``[2 *axes]`` of the percentile bootstrap of :attr:`share`."""
        return ends(self.draws(draws, seed), level)

    def reason(self) -> str:
        """Why there is no ratio in some cells, in words; empty where there is one in all."""
        lost = self.share.isnan()
        if not bool(lost.any()):
            return ""
        gap = self.gap[lost][0]
        mean, error = float(gap.nanmean()), float(self.gap_error[lost][0])
        return (
            f"the clean run and the empty one differ by {mean:.3g} in the mean, which cannot be told from 0 (standard error {error:.2g}, "
            f"{int(gap.isfinite().sum())} independent examples)"
        )


def ends(drawn: Tensor, level: float) -> Tensor:
    """The percentiles ``[2 *axes]`` of ``[draw *axes]`` that hold ``level`` of the draws. Raises InputError for a level that is none."""
    if not (isinstance(level, float) and 0 < level < 1):
        raise InputError(f"An interval has a level between 0 and 1, not {level!r}.")
    points = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(drawn, points, dim=0)


def area(f: Float[Tensor, "*axes k"], ks: Sequence[float]) -> Float[Tensor, "*axes"]:
    """The area under ``f`` over the share of edges: of ``f ≡ 1`` it is 1. MIB's CPR."""
    return torch.trapezoid(f.double(), torch.tensor(ks, dtype=torch.float64))


def distance_area(f: Float[Tensor, "*axes k"], ks: Sequence[float]) -> Float[Tensor, "*axes"]:
    """The area of ``|1 − f|`` over the share of edges, exact for a curve of lines: 0 for ``f ≡ 1``. MIB's CMD."""
    away = 1 - f.double()
    first, second = away[..., :-1], away[..., 1:]
    width = torch.tensor(ks, dtype=torch.float64).diff()
    size = first.abs() + second.abs()
    # Of a line that crosses 0 the area is that of two triangles.
    crossing = torch.where(size > 0, (first.square() + second.square()) / (2 * size), 0.0)
    return (width * torch.where(first * second < 0, crossing, size / 2)).sum(-1)


def log_area(f: Float[Tensor, "*axes k"], ks: Sequence[float]) -> Float[Tensor, "*axes"]:
    """The mean of ``f`` over the logarithm of the share of edges, from the smallest share above 0 to all: 1 for ``f ≡ 1``."""
    places = [number for number, k in enumerate(ks) if k > 0]
    logs = torch.tensor([ks[number] for number in places], dtype=torch.float64).log()
    return torch.trapezoid(f.double()[..., places], logs) / (logs[-1] - logs[0])
