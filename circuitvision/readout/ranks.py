"""Ranking components by a score: which stand out, which way they push, and what a random choice of as many would have scored.

Takes the scores of any result (direct attribution, log-probability increase, head importance, attention mass, the effects of a sweep) and
ranks components by the mean over the examples. Components that stand out are those at or beyond ``mean + 2 sd`` of all of them, as
NOTICE keeps heads. A score is only worth as much as its control: :meth:`Ranking.random_control` draws sets of components at random.

Source: Golovanevsky et al. 2024, arXiv 2406.16320 (the threshold).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.tokens import present
from circuitvision.provenance import with_provenance
from circuitvision.results import EXAMPLE, Result, component_name
from circuitvision.statistics import by_example


@dataclass(frozen=True, eq=False)
class Ranking(Result):
    """Scores ``[component example]``, the component with the strongest mean first; ``[component]`` where there are no examples (weights)."""

    by: str = "value"

    @property
    def scores(self) -> Float[Tensor, " component"]:
        """The mean over examples of each component."""
        return self.mean() if EXAMPLE in self.axes else self.values.double()

    def highlights(self) -> dict[str, str]:
        """The first components and their scores."""
        return {name: f"{value:+.4g}" for name, value in self._pairs()[:5]}

    def top(self, count: int) -> list[str]:
        """The first ``count`` components."""
        return self.axes["component"][:count]

    def above_threshold(self, deviations: float = 2.0) -> list[str]:
        """Components whose score is at least the mean plus ``deviations`` standard deviations of all (of sizes, where ranked by size)."""
        scores = self._sizes()
        if len(scores) < 2:
            raise InputError("Standing out needs at least two components.")
        there = scores[~scores.isnan()]
        limit = float(there.mean() + deviations * there.std(correction=0))
        names = self.axes["component"]
        if not len(there) or float(there.std(correction=0)) == 0.0:
            return []
        return [name for name, score in zip(names, scores.tolist(), strict=True) if score >= limit]

    def positive(self) -> list[str]:
        """Components with a score above zero, strongest first."""
        return [name for name, value in self._pairs() if value > 0]

    def negative(self) -> list[str]:
        """Components with a score below zero, most negative first."""
        return [name for name, value in sorted(self._pairs(), key=lambda pair: pair[1]) if value < 0]

    def random_control(self, count: int, draws: int = 1000, seed: int = 0) -> Tensor:
        """The summed score (size, where ranked by size) of ``count`` components drawn without replacement, ``[draw]``: what the top have to beat.

        Components without a score are left out.
        """
        scores = self._sizes()
        scores = scores[~scores.isnan()]
        if not 1 <= count <= len(scores):
            raise InputError(f"count={count} is outside the {len(scores)} components that have a score.")
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(draws, len(scores), generator=generator).argsort(-1)[:, :count]
        return scores[order].sum(-1)

    def removal(self) -> list[list[str]]:
        """The sets to remove one after the other: the first component, the first two, …"""
        return [list(names) for names in itertools.accumulate([name] for name in self.axes["component"])]

    def _sizes(self) -> Tensor:
        """What components are ordered by."""
        return self.scores.abs() if self.by == "size" else self.scores

    def _pairs(self) -> list[tuple[str, float]]:
        return list(zip(self.axes["component"], self.scores.tolist(), strict=True))


@with_provenance
def rank_components(scores: Result | Tensor, labels: Sequence[Any] | None = None, *, by: str | None = None) -> Ranking:
    """Rank components by their score, the mean over examples (of an example with several rows, over their mean); NaN does not count.

    Args:
        scores: a result whose axes other than example, position and step are components (layers × heads become ``"vision L1H3"``), or a tensor
            ``[component]`` or ``[component example]``. Of a sweep every axis but the examples is one of components, and the score is the effect:
            the metric under the edit minus the unedited one.
        labels: of a tensor's components.
        by: "value" (most positive first) or "size" (strongest first, whatever the sign); None: "size" for the effects of a sweep or of patching,
            else "value".

    Ties keep their order. NaN scores come last.

    Raises:
        InputError: another ``by``, labels that do not fit, nothing to rank.
    """
    if by is None:
        by = "size" if isinstance(scores, Result) and _has_baseline(scores) else "value"
    if by not in ("value", "size"):
        raise InputError(f"Components are ranked by 'value' or 'size', not by {by!r}.")
    provenance: dict[str, Any] = {}
    if isinstance(scores, Result):
        values, names = _flat(scores)
        examples = scores.examples if EXAMPLE in scores.axes else []
        provenance = scores.provenance
    else:
        values, examples = scores, list(range(scores.shape[-1])) if scores.ndim == 2 else []
        names = [str(label) for label in (labels if labels is not None else range(len(values)))]
    if values.ndim != 1 + bool(examples) or len(names) != len(values) or not len(names):
        raise InputError(f"There are {len(names)} labels for scores of shape {tuple(values.shape)}.")
    values = values.detach().cpu().double()
    axes: dict[str, list[Any]] = {"component": names, **({EXAMPLE: examples} if examples else {})}
    key = Ranking(values, axes, by=by)._sizes().nan_to_num(-math.inf)
    order = key.argsort(descending=True, stable=True)
    axes["component"] = [names[index] for index in order]
    return Ranking(values[order], axes, provenance, by)


def _has_baseline(result: Result) -> bool:
    """Whether a result's scores are differences from a baseline, whose sign is no order."""
    return type(result).component_scores is not Result.component_scores


def _flat(result: Result) -> tuple[Tensor, list[str]]:
    """Scores ``[component example]`` (``[component]`` where there are no examples) and the components' names."""
    names = list(result.axes)
    scores, others = result.component_scores()
    inner = [name for name in names if name not in others]
    # Positions stand beside the rows they are of.
    within = sorted((name for name in names if name in others and name != EXAMPLE), key=lambda name: name == "position")
    if not inner:
        raise InputError(f"The axes of this result ({', '.join(names)}) hold no components.")
    outer = [EXAMPLE] if EXAMPLE in names else []
    values = scores.permute([names.index(name) for name in (*inner, *within, *outer)]).flatten(0, len(inner) - 1)
    # Positions, steps and rows of one example are not independent: they are averaged before examples are compared.
    for axis in reversed(within):
        values = (_without_absent(result, values) if axis == "position" else values).nanmean(-1 - len(outer))
    if outer:
        values = by_example(values, result.axes[EXAMPLE])
    tower = str(getattr(result, "tower", ""))
    labels = [
        component_name(inner, labels, tower) for labels in itertools.product(*(result.axes[name] for name in inner))
    ]
    return values, labels


def _without_absent(result: Result, values: Tensor) -> Tensor:
    """Values ``[… position example]`` with NaN where a position holds nothing, as far as the result says so."""
    kinds = getattr(result, "kinds", None)
    if not kinds or values.shape[-2:] != np.shape(kinds)[::-1]:
        return values
    return values.masked_fill(~torch.from_numpy(present(np.array(kinds))).T, float("nan"))
