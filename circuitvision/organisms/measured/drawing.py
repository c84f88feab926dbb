"""The data sets that an organism is measured on, each from a stream of random numbers of its own, and numbers with their intervals.

Everything is drawn from trained pairs of colour and shape unless it says otherwise. Streams differ by what they are for, so that no scene that
something is fitted on is asked about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from circuitvision.data import Pairs, Side
from circuitvision.data.binding import TRAIN_PAIRS, Scene
from circuitvision.data.binding_questions import (
    KINDS,
    Question,
    QuestionPair,
    sample_question_pairs,
    sample_questions,
)
from circuitvision.data.generated import of_questions
from circuitvision.metrics.effects import restored_error, restored_share
from circuitvision.progress import verbosity

STREAMS = ("asked", "reference", "texts", "pairs", "scenes", "last")
ROUNDS = 6
"""How many times as many pairs are drawn, at most, as are wanted."""
NORMAL = 1.96
"""Standard errors to either side of a 95 % interval."""
EQUAL = "the two runs do not differ within two standard errors"


def stream(seed: int, name: str, *more: int) -> np.random.Generator:
    """The random numbers for one purpose."""
    return np.random.default_rng([seed, STREAMS.index(name), *more])


def asked(count: int, rng: np.random.Generator) -> list[tuple[Scene, Question]]:
    """``count`` questions of each kind, the kinds in turn."""
    return sample_questions(count * len(KINDS), rng, subjects=TRAIN_PAIRS, distractors=TRAIN_PAIRS)


def side(drawn: Sequence[tuple[Scene, Question]]) -> Side:
    """Scenes with a question each as a data set."""
    return Side(
        [scene.image for scene, _ in drawn],
        [question.prompt for _, question in drawn],
        answers=[question.answer for _, question in drawn],
    )


@dataclass(frozen=True)
class Asked:
    """Minimal pairs of one kind of question that the model answers right on both sides, and out of how many."""

    pairs: Pairs | None
    drawn: int

    @property
    def count(self) -> int:
        """How many there are."""
        return 0 if self.pairs is None else len(self.pairs)

    @property
    def records(self) -> list[QuestionPair]:
        """What they were made from."""
        return [] if self.pairs is None else list(self.pairs.records or ())


def paired(model: Any, count: int, seed: int) -> dict[str, Asked]:
    """``count`` minimal pairs of each kind that the model answers right on both sides, fewer where it answers few."""
    found = {}
    for number, kind in enumerate(KINDS):
        rng, kept, drawn = stream(seed, "pairs", number), list[Pairs](), 0
        while drawn < ROUNDS * count and sum(map(len, kept)) < count:
            part = of_questions(
                sample_question_pairs(count, rng, kind=kind, subjects=TRAIN_PAIRS, distractors=TRAIN_PAIRS)
            )
            drawn += count
            with verbosity("quiet"):
                right = part.answered(model)
            kept += [right] if len(right) else []
        found[kind] = Asked(Pairs.concat(kept)[:count] if kept else None, drawn)
    return found


# -- numbers with intervals ----------------------------------------------------------------------------------------------------------------------


def number(value: float, low: float, high: float, count: int, reason: str = "") -> dict[str, Any]:
    """A number with its interval and over how many examples it goes; ``reason`` says why it is NaN."""
    found: dict[str, Any] = {"value": value, "low": low, "high": high, "n": count}
    return found | ({"reason": reason or "undefined"} if math.isnan(value) else {})


def share(effect: Tensor, base: Tensor, source: Tensor, reason: str = EQUAL) -> dict[str, Any]:
    """The mean effect ``[example]`` as a share of the mean difference of two runs, with a normal 95 % interval; see :func:`restored_share`."""
    there = effect.isfinite()
    effect, base, source = (one[there].double() for one in (effect, base, source))
    if len(effect) < 2:
        return number(math.nan, math.nan, math.nan, len(effect), "fewer than two examples")
    found, error = float(restored_share(effect, base, source)), float(restored_error(effect, base, source))
    return number(found, found - NORMAL * error, found + NORMAL * error, len(effect), reason)
