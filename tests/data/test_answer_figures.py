"""Figures of outcomes and of the language prior: a title affirms only what the numbers allow, and what is drawn are the result's numbers."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.data import EditOutcomes, PriorCalibration, outcomes_of
from circuitvision.findings_of_answers import calibrates, understands

DOUBLE = torch.float64


def judged(seen: int, stubborn: int, guessed: int, moved: int = 0, still: int = 0) -> EditOutcomes:
    """So many questions right both times, with one answer, wrong with two; and untouched ones whose answer moves or stays."""
    rows = [("yes", "no", "yes", "no")] * seen + [("yes", "yes", "yes", "no")] * stubborn
    rows += [("no", "yes", "yes", "no")] * guessed
    rows += [("yes", "no", "yes", "yes")] * moved + [("yes", "yes", "yes", "yes")] * still
    return outcomes_of(*map(list, zip(*rows, strict=True)))


@pytest.mark.parametrize(
    ("made", "holds", "words"),
    [
        (judged(36, 2, 2, 1, 39), True, ["follow what is seen", "90%", "2%"]),
        (judged(36, 2, 2), True, ["follow what is seen", "90%"]),
        (judged(36, 2, 2, 38, 2), False, ["90%", "95%"]),
        (judged(3, 35, 2, 0, 40), False, ["do not follow", "88%", "8%"]),
        (judged(20, 10, 10, 0, 40), False, ["50%"]),
        (judged(3, 0, 0, 0, 3), False, ["100%"]),
        (judged(0, 0, 0, 2, 6), None, ["25%"]),
    ],
)
def test_a_title_of_outcomes_affirms_what_the_intervals_allow(
    made: EditOutcomes, holds: bool | None, words: list[str]
) -> None:
    found = understands(made)
    assert found.holds is holds
    title = made.plot().layout.title.text.replace("<br>", " ")
    assert ("follow what is seen" in title) is (holds is True)
    assert all(word in title for word in words)
    count = sum(made.touched) or len(made.touched)
    assert f"{count} pairs" in title


def test_bars_are_the_shares_and_fill_the_axis() -> None:
    made = judged(6, 3, 1, 2, 8)
    figure = made.plot()
    shares = made.shares().set_index(["touched", "outcome"])["share"]
    drawn = {trace.name: dict(zip(trace.y, trace.x, strict=True)) for trace in figure.data}
    named = {name[name.rindex("(") + 1 : -1]: held for name, held in drawn.items() if name.endswith(")")}
    assert named["TU"] == {"asked object edited (10)": shares[True, "TU"]}
    assert named["ID"] == {"other object edited (10)": shares[False, "ID"]}
    sums: dict[str, float] = {}
    for held in drawn.values():
        for row, share in held.items():
            sums[row] = sums.get(row, 0.0) + share
    assert list(sums.values()) == pytest.approx([1.0, 1.0])


def calibrated(right: int, before: int, after: int, count: int = 40) -> PriorCalibration:
    """A calibration of two choices in which so many answers are right under the reference, before and after."""

    def scores(hits: int) -> torch.Tensor:
        first = torch.where(torch.arange(count) < hits, 1.0, -1.0).double()
        return torch.stack([first, -first])

    axes = {"choice": ["yes", "no"], "example": list(range(count))}
    return PriorCalibration(
        scores(after), axes, scores=scores(before), prior=scores(right)[None], references=["blank"], answers=[0] * count
    )


@pytest.mark.parametrize(
    ("made", "holds", "word"),
    [
        (calibrated(10, 20, 38), True, "helps"),
        (calibrated(10, 38, 20), False, "does harm"),
        (calibrated(10, 30, 31), False, "changes little"),
        (calibrated(10, 30, 30), False, "changes little"),
    ],
)
def test_a_title_of_calibration_says_which_way_accuracy_goes(made: PriorCalibration, holds: bool, word: str) -> None:
    found = calibrates(made)
    assert found.holds is holds
    assert found.value == pytest.approx(float(made.accuracy().mean()[1] - made.accuracy().mean()[0]))
    assert found.chance == 0.25
    figure = made.plot()
    assert word in figure.layout.title.text
    shown = [trace.x[0] for trace in figure.data]
    assert shown == pytest.approx(made.accuracy().mean().tolist())


def test_without_answers_the_prior_itself_is_drawn() -> None:
    made = calibrated(10, 20, 38)
    bare = PriorCalibration(made.values, made.axes, scores=made.scores, prior=made.prior, references=["blank"])
    found = calibrates(bare)
    assert found.holds is None
    assert found.value == bare.same_as_prior == pytest.approx(30 / 40)
    figure = bare.plot()
    assert "75%" in figure.layout.title.text
    probabilities = bare.probabilities()
    torch.testing.assert_close(probabilities.values.sum(1), torch.ones(3, 40, dtype=DOUBLE))
    torch.testing.assert_close(torch.tensor(figure.data[0].z, dtype=DOUBLE), probabilities.mean(), atol=1e-6, rtol=0)


def test_both_are_drawn_saved_and_listed(tmp_path) -> None:
    for made in (judged(6, 3, 1, 2, 8), calibrated(10, 20, 38)):
        again = cv.load(made.save(tmp_path / f"{type(made).__name__}.npz"))
        assert again.plot().layout.title.text == made.plot().layout.title.text
