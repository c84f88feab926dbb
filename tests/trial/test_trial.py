"""The trial: what an edit gives, in runs, in generation and in denoising, equals hand-written hooks on models of odd sizes."""

from __future__ import annotations

import pytest

from tests.trial import plain
from tests.trial.trial import KINDS, Outcome, compare, draw, tolerance


def _outcomes(first: int, last: int) -> list[Outcome]:
    return [compare(made) for made in map(draw, range(first, last)) if made is not None]


def _worst(outcomes: list[Outcome]) -> list[str]:
    """Every comparison that deviates by more than rounding."""
    return [
        f"{outcome.deviation:.3g}: {outcome.draw}"
        for outcome in outcomes
        if not outcome.refusal and not outcome.deviation <= tolerance(outcome.draw)
    ]


def _check(first: int, last: int) -> None:
    outcomes = _outcomes(first, last)
    assert not _worst(outcomes)
    compared = [outcome for outcome in outcomes if not outcome.refusal]
    assert len(compared) > 0.7 * (last - first), "most draws must be compared, not refused"
    assert sum(outcome.effect > 1e-3 for outcome in compared) > 0.5 * len(compared), "most edits must move the output"


def test_a_sample_of_edits_equals_hand_written_hooks() -> None:
    _check(0, 150)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_edits_equal_hand_written_hooks(block: int) -> None:
    _check(1000 + 250 * block, 1250 + 250 * block)


def test_every_kind_of_edit_is_drawn() -> None:
    assert {made.kind for made in map(draw, range(400)) if made is not None} == set(KINDS)


def test_a_wrong_head_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    split = plain._split
    monkeypatch.setattr(plain, "_split", lambda x, size: split(x, size).flip(2) if x.ndim == 3 else split(x, size))
    assert _worst(_outcomes(0, 40))
