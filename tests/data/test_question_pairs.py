"""Question pairs: every subject takes its turn, and the changed attribute is the one asked about."""

from __future__ import annotations

from collections import Counter

import pytest

from circuitvision.data.questions import sample_question_pairs
from circuitvision.data.scenes import TEST_PAIRS


@pytest.mark.parametrize("kind", ["color", "shape"])
def test_subjects_take_turns(kind: str) -> None:
    pairs = sample_question_pairs(4 * len(TEST_PAIRS), seed=1, kind=kind, subjects=TEST_PAIRS)
    counts = Counter(pair.question.subject.pair for pair in pairs)
    assert counts == dict.fromkeys(TEST_PAIRS, 4)
    assert all(pair.answer != pair.foil for pair in pairs)
