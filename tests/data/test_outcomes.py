"""Outcomes of edited pairs and the language prior: answers counted by hand, models whose outcome is known, and a trained one."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.data import Pairs, Side, outcomes_of
from circuitvision.data.outcomes import TOUCHED, UNTOUCHED
from circuitvision.errors import InputError
from tests.zoo import case, shared_model
from tests.zoo.images import picture

ANSWERS = st.sampled_from(["yes", "no", "red"])


@given(st.lists(st.tuples(ANSWERS, ANSWERS, ANSWERS, ANSWERS, st.sampled_from(["color", "shape"])), min_size=1))
def test_shares_of_a_type_sum_to_one(rows: list[tuple[str, str, str, str, str]]) -> None:
    before, after, answers, foils, types = map(list, zip(*rows, strict=True))
    made = outcomes_of(before, after, answers, foils, types=types)
    sums = made.shares().groupby(["type", "touched"])["share"].sum()
    assert np.allclose(sums, 1.0)
    for n in range(len(rows)):
        own = made.values[: len(TOUCHED), n] if made.touched[n] else made.values[len(TOUCHED) :, n]
        assert float(own.sum()) == 1.0
        assert int(made.values[:, n].isnan().sum()) == (len(UNTOUCHED) if made.touched[n] else len(TOUCHED))


def outcome(before: str, after: str, answer: str, foil: str) -> str:
    made = outcomes_of([before], [after], [answer], [foil])
    return str(made.axes["outcome"][int(made.values[:, 0].nan_to_num(0).argmax())])


def test_outcomes_by_hand() -> None:
    assert outcome("yes", "no", "yes", "no") == "TU"
    assert outcome("no", "yes", "yes", "no") == "IG"
    assert outcome("yes", "yes", "yes", "no") == outcome("no", "no", "yes", "no") == "SB"
    assert outcome("red", "green", "red", "blue") == outcome("green", "blue", "red", "blue") == "half"
    assert outcome("red", "red", "red", "red") == outcome("blue", "blue", "red", "red") == "same"
    assert outcome("red", "blue", "red", "red") == "ID"


@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1))
def test_models_whose_outcome_is_known(rows: list[tuple[str, str]]) -> None:
    answers, foils = map(list, zip(*rows, strict=True))
    blind, seeing = (
        outcomes_of(["yes"] * len(rows), ["yes"] * len(rows), answers, foils),
        outcomes_of(answers, foils, answers, foils),
    )
    for made, word in ((blind, "SB"), (seeing, "TU")):
        means = dict(zip(made.axes["outcome"], made.mean().tolist(), strict=True))
        assert means[word] == 1.0 or math.isnan(means[word])
        assert means["ID"] == 0.0 or math.isnan(means["ID"])


def test_wilsons_interval_of_a_share() -> None:
    made = outcomes_of(["yes"] * 4, ["no"] * 3 + ["yes"], ["yes"] * 4, ["no"] * 4)
    row = made.shares().query("outcome == 'TU'").iloc[0]
    assert row["share"] == 0.75
    assert row["low"] == pytest.approx(0.3006, abs=1e-4)
    assert row["high"] == pytest.approx(0.9544, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"after": ["no"]}, "1 after for 2"),
        ({"touched": [True, True], "foils": ["yes", "no"]}, "example 0 is said to be touched"),
        ({"before": [], "after": [], "answers": [], "foils": []}, "no answer"),
        ({"types": ["a"]}, "1 types for 2"),
    ],
)
def test_columns_that_do_not_fit(changes: dict[str, Any], word: str) -> None:
    columns: dict[str, Any] = {
        "before": ["yes", "yes"],
        "after": ["no", "no"],
        "answers": ["yes"] * 2,
        "foils": ["no"] * 2,
    }
    columns |= changes
    given_columns = [columns.pop(name) for name in ("before", "after", "answers", "foils")]
    with pytest.raises(InputError, match=word):
        outcomes_of(*given_columns, **columns)


def mixed(count: int = 8) -> tuple[Pairs, list[str]]:
    """Edits of the asked object, then edits of another one."""
    touched = cv.data.question_pairs(count, seed=4, kind="color")
    assert touched.records is not None
    clean, corrupt, texts, answers = [], [], [], []
    for record in touched.records:
        # The question is about another object than the one that changes.
        other = next(one for one in record.clean.objects if one in record.corrupt.objects)
        clean.append(record.clean.image)
        corrupt.append(record.corrupt.image)
        texts.append(f"USER: <image> what color is the {other.shape} ? ASSISTANT:")
        answers.append(other.color)
    untouched = Pairs(clean, texts, corrupt_images=corrupt, answers=answers, foils=answers)
    both = Pairs(
        [one.image for side in (touched, untouched) for one in side.clean.examples],
        [one.text for side in (touched, untouched) for one in side.clean.examples],
        corrupt_images=[one.image for side in (touched, untouched) for one in side.corrupt.examples],
        answers=[*(touched.answers or ()), *answers],
        foils=[*(touched.foils or ()), *answers],
    )
    return both, ["asked"] * count + ["beside"] * count


def test_a_trained_model_understands_and_is_not_moved_by_other_objects() -> None:
    model = cv.organisms.load("shapes-llava")
    pairs, types = mixed()
    made = cv.data.edit_outcomes(model, pairs, types=types)
    assert made.touched == [True] * 8 + [False] * 8
    shares = made.shares().set_index(["type", "outcome"])["share"]
    assert shares["asked", "TU"] >= 0.75
    assert shares["beside", "ID"] <= 0.25
    single = cv.data.edit_outcomes(model, pairs, types=types, size=1)
    assert torch.equal(single.values.nan_to_num(9), made.values.nan_to_num(9))
    assert (single.before, single.after) == (made.before, made.after)
    blind = Pairs.from_sides(pairs.clean, pairs.clean)
    blind = blind._with(clean=blind.clean._with(foils=pairs.foils), corrupt=blind.corrupt._with(foils=pairs.foils))
    found = dict(zip(*[made.axes["outcome"], cv.data.edit_outcomes(model, blind).mean().tolist()], strict=True))
    assert found["SB"] == 1.0
    assert found["ID"] == 0.0


def test_choices_limit_what_may_be_answered() -> None:
    model = cv.organisms.load("shapes-llava")
    pairs, _ = mixed(4)
    colors = sorted({*(pairs.answers or ()), *(pairs.foils or ())})
    made = cv.data.edit_outcomes(model, pairs, choices=colors)
    assert {*made.before, *made.after} <= set(colors)
    with pytest.raises(InputError, match="not among the choices"):
        cv.data.edit_outcomes(model, pairs, choices=["circle", "square"])
    with pytest.raises(InputError, match="two or more"):
        cv.data.edit_outcomes(model, pairs, choices=["circle", "circle"])
    with pytest.raises(InputError, match="foils"):
        cv.data.edit_outcomes(
            model, Pairs([picture(0)], ["USER: <image> ?"], corrupt_images=[picture(1)], answers=["red"])
        )


def classifier(problem: str, labels: int) -> cv.HookedModel:
    made = copy.deepcopy(shared_model("vit"))
    made.config.problem_type, made.config.num_labels = problem, labels
    if labels == 1:
        made.classifier = torch.nn.Linear(made.classifier.in_features, 1)
    return cv.HookedModel(made, case("vit").processor())


def test_columns_of_yes_and_no_are_handled_and_numbers_are_refused() -> None:
    side = Side([picture(n) for n in range(3)], answers=[0, 1, 2])
    pairs = Pairs.from_sides(side, side._with(examples=side.examples[::-1]))
    pairs = pairs._with(clean=side._with(foils=(3, 2, 1)), corrupt=pairs.corrupt._with(foils=(3, 2, 1)))
    several = classifier("multi_label_classification", 5)
    assert several.link == "sigmoid"
    made = cv.data.edit_outcomes(several, pairs, choices=[0, 1, 2, 3])
    (batch,) = side.batches(several, 3)
    with torch.no_grad():
        logits = several(batch.inputs)[:, :4].double()
    assert [int(one.removeprefix("LABEL_")) for one in made.before] == logits.argmax(1).tolist()
    prior = cv.data.calibrate_prior(several, side, [0, 1, 2, 3])
    chances = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    torch.testing.assert_close(prior.scores.T.exp(), chances, atol=1e-6, rtol=1e-5)
    refused = [("regression", 5, "names no answer"), ("regression", 1, "names no answer")]
    for problem, labels, word in [*refused, ("multi_label_classification", 1, "one column")]:
        with pytest.raises(InputError, match=word):
            cv.data.edit_outcomes(classifier(problem, labels), pairs)
    with pytest.raises(InputError, match="no prior"):
        cv.data.calibrate_prior(classifier("regression", 5), side, [0, 1])


# -- the language prior --------------------------------------------------------------------------------------------------------------------


def test_a_model_that_ignores_its_picture_is_left_without_preference() -> None:
    model = cv.organisms.load("shapes-llava")
    side = cv.data.question_pairs(4, seed=6).clean
    blank = cv.data.blank_images(side, "dataset").corrupt
    made = cv.data.calibrate_prior(model, blank, ["red", "green", "blue"], references={"the same": blank})
    assert torch.allclose(made.values, torch.zeros_like(made.values), atol=1e-12)
    accuracy = made.accuracy()
    assert accuracy.values[accuracy.index_of("answer", "calibrated")].isnan().all()


def test_calibrated_scores_are_the_difference_of_log_probabilities() -> None:
    model = cv.organisms.load("shapes-llava")
    side = cv.data.question_pairs(5, seed=7).clean
    colors = sorted(cv.data.COLORS)
    made = cv.data.calibrate_prior(model, side, colors, references=("blank", "noise", "none"), weight=0.5, size=2)
    ids = [model.token(word) for word in colors]
    sides = [
        side,
        cv.data.blank_images(side, "dataset").corrupt,
        cv.data.without_images(side, model).corrupt,
    ]
    scores = []
    for each in sides:
        rows = []
        for one in each:
            (batch,) = one.batches(model, 1)
            rows.append(model(batch.inputs)[0, -1, ids].double().log_softmax(-1).detach())
        scores.append(torch.stack(rows, 1))
    assert torch.allclose(made.scores, scores[0], atol=1e-5)
    assert torch.allclose(made.prior[0], scores[1], atol=1e-5)
    assert torch.allclose(made.prior[2], scores[2], atol=1e-5)
    assert torch.allclose(made.values, made.scores - 0.5 * made.prior.mean(0))
    accuracy = made.accuracy()
    assert accuracy.mean()[accuracy.index_of("answer", "with the picture")] >= 0.8
    assert accuracy.mean()[accuracy.index_of("answer", "without (none)")] <= 0.6
    assert made.take([1, 3]).answers == [made.answers[1], made.answers[3]]


def test_a_prior_is_taken_off_exactly() -> None:
    """Scores that are evidence plus prior give the evidence back."""
    evidence, prior = torch.randn(3, 6, dtype=torch.float64), torch.randn(1, 3, 6, dtype=torch.float64)
    made = cv.PriorCalibration(
        values=(evidence + prior[0]) - prior.mean(0),
        axes={"choice": ["a", "b", "c"], "example": list(range(6))},
        scores=evidence + prior[0],
        prior=prior,
        references=["blank"],
        answers=evidence.argmax(0).tolist(),
    )
    assert made.accuracy().mean()[1] == 1.0
    assert made.given == [["a", "b", "c"][n] for n in evidence.argmax(0).tolist()]


def test_references_that_do_not_exist_or_fit() -> None:
    model = cv.organisms.load("shapes-llava")
    side = Side([picture(0), picture(1)], "USER: <image> red ? ASSISTANT:")
    for references, word in ((("fog",), "'fog'"), ({"mine": side[:1]}, "'mine' has 1"), ((), "at least one")):
        with pytest.raises(InputError, match=word):
            cv.data.calibrate_prior(model, side, ["red", "blue"], references=references)
    made = cv.data.calibrate_prior(model, side, ["red", "blue"])
    with pytest.raises(InputError, match="no answers"):
        made.accuracy()
