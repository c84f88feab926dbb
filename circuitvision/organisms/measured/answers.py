"""Accuracy with and without the vision tower's attention, beside the best guess from the text.

Ablated means: the output of every head of every vision layer (``attn.hook_z``) is its mean over a data set of other scenes. The mean per position
keeps what each position has in all scenes; the mean over everything is one vector for all positions. Patches still go through embedding and MLPs, so
whatever a patch shows on its own still reaches the language tower.

The guess is the most likely answer to a question's text, fitted on other examples. ``P(answer | text)`` is counted with a back-off to the text with
colours and shapes left open, then to the kind, then to all questions: ``(count + strength · P_above) / (n + strength)``.

Reference: mean ablation as in Wang et al. 2022 (arXiv 2211.00593); the back-off is MacKay and Peto's 1995 (hierarchical Dirichlet) with one strength.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from circuitvision import edits
from circuitvision.data import Side
from circuitvision.data.binding import COLORS, SHAPES
from circuitvision.data.binding_questions import KINDS, PLURALS
from circuitvision.organisms.measured.drawing import asked, number, side, stream
from circuitvision.statistics import wilson

SITES = "vision.blocks.*.attn.hook_z"
STRENGTH = 5.0
MARGIN = 0.10
"""How far above the guess the ablated model may be."""
COLUMNS = ("intact", "mean per position", "mean over everything", "guess")
_OPEN = {
    **dict.fromkeys(COLORS, "<color>"),
    **dict.fromkeys(SHAPES, "<shape>"),
    **dict.fromkeys(PLURALS.values(), "<shapes>"),
}


class TextGuess:
    """The most likely answer to a question of which only kind and text are known; of equally likely ones the first in the alphabet."""

    def __init__(self, examples: Iterable[tuple[str, str, str]], strength: float = STRENGTH) -> None:
        """Count ``(kind, text, answer)``."""
        self.strength = strength
        self.counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for kind, text, answer in examples:
            for level in _levels(kind, text):
                self.counts[level][answer] += 1

    def probabilities(self, kind: str, text: str) -> dict[str, float]:
        """P(answer | text) of every answer there is."""
        known = sorted(self.counts[()])
        found = dict.fromkeys(known, 1 / len(known))
        for level in _levels(kind, text):
            counts = self.counts.get(level, Counter())
            total = counts.total() + self.strength
            found = {answer: (counts[answer] + self.strength * found[answer]) / total for answer in known}
        return found

    def __call__(self, kind: str, text: str) -> str:
        found = self.probabilities(kind, text)
        return max(found, key=found.__getitem__)


def _levels(kind: str, text: str) -> list[tuple[str, ...]]:
    """From all questions to this one text."""
    opened = " ".join(_OPEN.get(word, word) for word in text.split())
    return [(), (kind,), (kind, opened), (kind, opened, text)]


def measure(model: Any, questions: int, reference: int, texts: int, seed: int) -> dict[str, Any]:
    """Accuracy by kind of question: intact, with all vision attention at its mean (per position, and over everything), and of the guess."""
    drawn = asked(questions, stream(seed, "asked"))
    others = side(asked(-(-reference // len(KINDS)), stream(seed, "reference"))[:reference])
    swept = model.sweep(side(drawn), ablations(others), "accuracy")
    guess = TextGuess(
        (question.kind, question.text, question.answer)
        for _, question in asked(-(-texts // len(KINDS)), stream(seed, "texts"))[:texts]
    )
    guessed = torch.tensor([float(guess(asked.kind, asked.text) == asked.answer) for _, asked in drawn])
    right = torch.cat([swept.clean[None], swept.values, guessed[None]])
    kinds = [question.kind for _, question in drawn]
    return {
        "pairs": "trained",
        "reference_scenes": len(others),
        "texts": texts,
        "kinds": {kind: _row(right[:, [own == kind for own in kinds]]) for kind in KINDS},
    }


def ablations(others: Side) -> list[tuple[edits.Edit, ...]]:
    """All vision attention at its mean over other scenes: per position, and over everything."""
    return [(edits.ablate(SITES, "mean", dataset=others, average=average),) for average in ("position", "all")]


def _row(right: torch.Tensor) -> dict[str, Any]:
    """Shares of right answers ``[condition example]`` with Wilson's intervals."""
    means = right.double().mean(1)
    low, high = wilson(means, right.shape[1])
    ends = zip(COLUMNS, means.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: number(value, below, above, right.shape[1]) for name, value, below, above in ends}


def condition(found: dict[str, Any]) -> dict[str, Any]:
    """Whether the ablated accuracy (mean per position) of every kind is at most :data:`MARGIN` above the guess from the text."""
    above = {kind: row["mean per position"]["value"] - row["guess"]["value"] for kind, row in found["kinds"].items()}
    return {
        "says": f"with all vision attention at its mean accuracy is at most {MARGIN:.2f} above the guess from text",
        "above_guess": above,
        "met": all(value <= MARGIN for value in above.values()),
    }
