"""Findings affirm what sign, size and interval allow, and nothing about an untrained model: checked on values, not on sentences."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import circuitvision as cv
from circuitvision import findings, metrics
from circuitvision.circuits import AblationCheck, HeadImportance, head_importance
from circuitvision.data import TEST_PAIRS, TRAIN_PAIRS, sample_question_pairs
from circuitvision.metrics.effects import restored_error, restored_share
from circuitvision.quickstart import Reading, quickstart
from circuitvision.quickstart import findings as of_case
from circuitvision.readout import logit_lens
from circuitvision.readout.lens.result import LensResult
from circuitvision.readout.relevance.curves import Curve
from circuitvision.results import Result
from tests.readout.layouts import by_row, of_rows
from tests.zoo import case, shared_model


@pytest.fixture(scope="module")
def pair():
    return sample_question_pairs(1, seed=0, subjects=TEST_PAIRS, distractors=TRAIN_PAIRS)[0]


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """Three questions to the trained model: the right words, words that are no answer, and the right words the wrong way round."""
    out = tmp_path_factory.mktemp("trained")
    given = {"prompt": pair.prompt, "top_k": 2, "out": out}
    clean, corrupt = pair.clean.image, pair.corrupt.image
    return {
        "right": quickstart("shapes-llava", clean=clean, corrupt=corrupt, answer=pair.answer, foil=pair.foil, **given),
        "absent": quickstart("shapes-llava", clean=clean, corrupt=corrupt, answer="white", foil="orange", **given),
        "turned": quickstart("shapes-llava", clean=corrupt, corrupt=clean, answer=pair.answer, foil=pair.foil, **given),
    }


@pytest.fixture(scope="module", params=[0, 1])
def untrained(request, pair, tmp_path_factory):
    from circuitvision.organisms.shapes_llava import build

    torch.manual_seed(request.param)
    module, processor = build()
    model = cv.HookedModel(module.eval(), processor)
    given = {"clean": pair.clean.image, "corrupt": pair.corrupt.image, "prompt": pair.prompt}
    out = tmp_path_factory.mktemp("untrained")
    return model, quickstart(model, **given, answer=pair.answer, foil=pair.foil, top_k=2, out=out)


AFFIRMATIVE = ("answers", "head", "heads", "back up", "past heads", "at answer", "patches")


def test_a_model_that_answers_is_affirmed_with_its_numbers(trained):
    found = trained["right"].findings()
    for name in ("answers", "swing", "head", "heads", "at answer"):
        assert found[name].holds, name
    assert found["head"].value == pytest.approx(trained["right"].importance.best()[1])
    assert found["swing"].value > 10
    assert all(finding.interval is None and finding.n == 1 for finding in found.values())
    assert not trained["right"].cautions()


def test_words_that_the_model_never_says_are_not_affirmed(trained):
    found = trained["absent"].findings()
    assert not any(found[name].holds for name in AFFIRMATIVE)
    assert found["answers"].value < 0.01
    # The numbers are still there: half of what the fault affirmed is true, the swing and the head's share of it.
    assert found["head"].value == pytest.approx(trained["absent"].importance.best()[1])
    assert trained["absent"].cautions()[0] == str(found["answers"])


def test_a_swing_in_the_wrong_direction_is_no_restored_answer(trained):
    found = trained["turned"].findings()
    assert found["swing"].value < -10
    assert not any(found[name].holds for name in ("answers", "swing", "head", "heads", "at answer"))
    assert {share for _, _, share in trained["turned"].table()} == {"–"}


def test_nothing_is_affirmed_about_an_untrained_vlm(untrained):
    _, quick = untrained
    found = quick.findings()
    assert not [name for name in AFFIRMATIVE if found[name].holds]
    assert quick.cautions()


def test_no_title_affirms_anything_of_an_untrained_classifier():
    from circuitvision.organisms.shapes_vit import build

    torch.manual_seed(0)
    module, processor = build()
    model = cv.HookedModel(module.eval(), processor)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3)).astype(np.uint8)
    inputs = model.inputs(images=[Image.fromarray(image) for image in pixels])
    labels = list(range(module.config.num_labels))
    lens = logit_lens(model, inputs, targets={label: label for label in labels})
    told = findings.leads(targets_of(by_row(lens, "pooled")), lens.measure)
    answer = int(model(inputs)[0].argmax())
    scores = torch.randn(12, model.tokens(inputs)["vision"].n_positions)
    curve = cv.readout.perturbation_curve(model, inputs, metrics.prob(answer), scores, steps=3, random_orders=4)
    probe = cv.readout.linear_probe(
        None,
        {"noise": torch.randn(40, 6, generator=torch.Generator().manual_seed(1))},
        [0, 1] * 20,
        shuffles=19,
        penalty=1.0,
    )
    effects = head_importance(
        model,
        metric=metrics.logit_diff(*model(inputs)[0].topk(2).indices.tolist()),
        clean=_row(inputs, 0),
        corrupt=_row(inputs, 1),
        top_k=1,
    )
    assert not findings.beats_random(curve).holds
    assert not findings.readable(probe).holds
    assert not findings.swing(effects).holds
    assert not findings.best_head(effects).holds
    assert not told.holds
    assert told.value < math.log(3)
    for figure in (curve.plot(), probe.plot(), effects.plot()):
        assert figure.layout.title.text


def _row(inputs, row):
    return {name: value[row : row + 1] for name, value in inputs.items()}


# -- one finding at a time -----------------------------------------------------------------------------------------------------


def importance(
    clean: float, corrupt: float, shares, joint: float = 1.0, n: int = 1, error: float = 0.0, swing_error: float = 0.0
) -> HeadImportance:
    """A result of ``n`` examples with these means, and standard errors of the shares and of the swing."""
    # Half of the examples lie above the mean and half below it, of the swing in other pairs than of the effects.
    apart, wide = (torch.tensor([(-1.0) ** (i // of) for i in range(n)], dtype=torch.float64) for of in (1, 2))
    source = clean + swing_error * wide * (n - 1) ** 0.5
    spread = error * (clean - corrupt) * apart * (n - 1) ** 0.5
    values = torch.tensor([[shares]], dtype=torch.float64)[..., None] * (source - corrupt) + spread
    axes = {"tower": ["language"], "layer": [0], "head": list(range(len(shares))), "example": list(range(n))}
    return HeadImportance(
        values, axes, {"metric_units": "logit", "metric": "logit_diff(a - b)"}, base=torch.full((n,), corrupt, dtype=torch.float64),
        source=source, selected=["l.a0.h0"], together=joint * (source - corrupt) + spread,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("clean", "corrupt", "shares", "holds", "reason"),
    [
        (5.0, -5.0, [0.9, 0.1], True, ""),
        (5.0, -5.0, [0.3, 0.1], True, ""),
        (5.0, -5.0, [3.19, 0.1], False, "it overshoots"),
        (5.0, -5.0, [-0.4, -0.6], False, "the other way"),
        (5.0, -5.0, [0.03, 0.01], False, "too little"),
        (0.04, 0.01, [0.9, 0.1], False, "hardly differ"),
        (100.4, 100.0, [0.9, 0.1], False, "hardly differ"),
        (-5.0, 5.0, [0.9, 0.1], False, "higher on the corrupt"),
        (-1.0, -3.0, [0.9, 0.1], False, "not above the foil"),
    ],
)
def test_a_restored_answer_needs_sign_and_size(clean, corrupt, shares, holds, reason):
    found = findings.best_head(importance(clean, corrupt, shares))
    assert found.holds is holds
    assert reason in found.reason
    assert math.isnan(found.value) is ("hardly" in reason)
    assert math.isnan(found.value) or found.value == pytest.approx(max(shares))
    assert findings.together(importance(clean, corrupt, shares, joint=3.19)).holds is False


def test_shares_of_hardly_any_swing_are_not_drawn_as_shares():
    heat = importance(0.04, 0.01, [0.9, 0.1]).plot().data[0]
    assert np.allclose(heat.z, [[0.9 * 0.03, 0.1 * 0.03]])
    heat = importance(5.0, -5.0, [0.9, 0.1]).plot().data[0]
    assert np.allclose(heat.z, [[0.9, 0.1]])


def test_intervals_over_examples_decide_where_there_are_several():
    sure = findings.best_head(importance(5.0, -5.0, [0.5], n=20, error=0.05, swing_error=0.5))
    unsure = findings.best_head(importance(5.0, -5.0, [0.5], n=20, error=0.3, swing_error=0.5))
    assert (sure.holds, unsure.holds) == (True, False)
    assert sure.interval == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.02)
    assert not findings.swing(importance(5.0, -5.0, [0.5], n=20, swing_error=6.0)).holds


def test_standard_errors_of_shares_are_those_of_the_examples():
    """The ratio estimator's, worked out by hand from every example on its own."""
    module = shared_model("llava-clip-llama")
    model = cv.HookedModel(module, None)
    clean, corrupt = (case("llava-clip-llama").inputs(module, batch=5, seed=seed) for seed in (1, 2))
    options = {"metric": metrics.logit_diff(2, 3), "top_k": 1, "towers": ["language"]}
    result = head_importance(model, clean=clean, corrupt=corrupt, **options)
    singles = [head_importance(model, clean=_row(clean, n), corrupt=_row(corrupt, n), **options) for n in range(5)]
    gaps = torch.tensor([single.metric_clean - single.metric_corrupt for single in singles], dtype=torch.float64)
    effects = torch.stack([single.effects[0, :2] for single in singles]).double()
    assert torch.allclose(result.values[0, :2].movedim(-1, 0).double(), effects, rtol=1e-3, atol=1e-5)
    # With a difference of the runs that is sure, so that there are shares.
    sure = gaps + 10
    share = effects.mean(0) / sure.mean()
    spread = (effects - share * sure[:, None, None]).std(0) / 5**0.5 / sure.mean()
    base, source = (one.expand(*effects.shape[1:], 5) for one in (torch.zeros(5), sure))
    assert torch.allclose(restored_share(effects.movedim(0, -1), base, source), share)
    assert torch.allclose(restored_error(effects.movedim(0, -1), base, source), spread)
    assert result.swing_error == pytest.approx(float(gaps.std() / 5**0.5), rel=1e-3)
    assert math.isnan(singles[0].swing_error)
    assert not singles[0].share_errors()


def test_a_gap_that_is_noise_has_no_share():
    effect = torch.tensor([0.5, 0.4, 0.6])
    for gap in ([1.0, -1.2, 0.4], [0.0, 0.0, 0.0], [1e-6, 1e-6, 1e-6]):
        assert restored_share(effect, torch.full((3,), 5.0), 5.0 + torch.tensor(gap)).isnan()
    assert float(restored_share(effect, torch.zeros(3), torch.tensor([1.0, 0.9, 1.1]))) == pytest.approx(0.5)


def reading(says: str, answer: float, foil: float, chance: float = 0.02) -> Reading:
    return Reading(says, max(answer, foil), answer, foil, chance=chance)


@pytest.mark.parametrize(
    ("clean", "corrupt", "holds"),
    [
        (reading("red", 0.9, 0.0), reading("blue", 0.0, 0.9), True),
        (reading("red", 0.9, 0.0), reading("red", 0.9, 0.0), False),
        (reading("green", 0.1, 0.0), reading("blue", 0.0, 0.9), False),
        (reading("red", 0.04, 0.0), reading("blue", 0.0, 0.9), False),
    ],
)
def test_an_answer_is_given_when_it_is_said_more_surely_than_by_chance(clean, corrupt, holds):
    assert of_case.answers(clean, corrupt, "red", "blue").holds is holds


@pytest.mark.parametrize(("probability", "chance", "holds"), [(0.9, 0.5, True), (0.7, 0.5, False), (0.5, 0.2, True)])
def test_of_few_answers_the_odds_are_held_against_chance(probability, chance, holds):
    clean, corrupt = reading("a", probability, 0.1, chance), reading("b", 0.1, probability, chance)
    assert of_case.answers(clean, corrupt, "a", "b").holds is holds


@pytest.mark.parametrize(
    ("shares", "joint", "holds"), [([0.06, 0.04], 0.96, True), ([0.5, 0.2], 0.9, False), ([0.3], 1.9, False)]
)
def test_heads_back_each_other_up_where_together_they_move_far_more_than_any_alone(shares, joint, holds):
    result = importance(5.0, -5.0, shares, joint)
    found = of_case.back_each_other_up(findings.best_head(result), findings.together(result))
    assert found.holds is holds
    assert found.value == pytest.approx(joint)


def lens(last: list[float], patch: list[float]) -> LensResult:
    values = torch.tensor([patch, last]).T[:, None, :, None]
    places = torch.tensor([[[0, 0, 0, 0], [-1, -1, -1, -1]]])
    return of_rows(LensResult, values, {"layer": ["input", 0, 1][: len(last)], "row": [0], "position": [0, 1], "target": ["a - b"]},
        tower="language", places=places,
    )  # fmt: skip


def test_a_word_is_read_from_the_layer_where_both_runs_have_their_own_higher_to_the_end():
    asked = of_case.answers(reading("a", 0.9, 0.0), reading("b", 0.0, 0.9), "a", "b")
    clean, corrupt = lens([1.0, 3.0, 4.0], [0.0, 0.0, 0.0]), lens([1.0, -3.0, -4.0], [0.0, 0.0, 0.0])
    found = of_case.read_at_answer(clean, corrupt, asked, ("a", "b"))
    assert (found.holds, found.value, found.about["layer"]) == (True, 2, "0")
    # Far apart in the right direction, but both on one side: the sign of one run is wrong.
    one_sided = of_case.read_at_answer(
        lens([1.0, 9.0, 9.0], [0.0] * 3), lens([1.0, 3.0, 3.0], [0.0] * 3), asked, ("a", "b")
    )
    assert (one_sided.holds, one_sided.value) == (False, 0)
    assert not of_case.read_at_patches([clean], [corrupt], asked, ("a", "b")).holds
    seen = of_case.read_at_patches(
        [lens([1.0, 3.0, 4.0], [0.0, 5.0, 5.0])], [lens([1.0, -3.0, -4.0], [0.0, -5.0, -1.0])], asked, ("a", "b")
    )
    assert (seen.holds, seen.value) == (True, pytest.approx(2 / 3))


def check(intact: float, ablated: float, random: list[float], pairs: int) -> AblationCheck:
    axes = {
        "condition": ["intact", "heads", *(f"random {n}" for n in range(len(random)))],
        "example": list(range(pairs)),
    }
    shares = torch.tensor([intact, ablated, *random])[:, None]
    return AblationCheck((torch.arange(pairs) < (shares * pairs).round()).double(), axes, heads=["l.a0.h0"])


@pytest.mark.parametrize(
    ("result", "holds"),
    [
        (check(0.95, 0.05, [0.9, 0.95], 64), True),
        (check(0.95, 0.05, [0.9, 0.1], 64), False),
        (check(0.95, 0.9, [0.9, 0.95], 64), False),
        (check(1.0, 0.0, [1.0, 1.0], 1), False),
        (check(1.0, 0.0, [1.0, 1.0], 2), False),
        (check(0.0, 0.0, [0.0, 0.0], 64), False),
    ],
)
def test_heads_carry_an_answer_that_is_there_over_enough_pairs(result, holds):
    found = findings.carries(result)
    assert found.holds is holds
    assert found.value == pytest.approx(result.intact - result.ablated)
    assert (found.interval is None) is (result.n_pairs == 1)


def targets_of(values: Tensor) -> Result:
    """Values ``[layer row target]`` as a result."""
    layers, rows, targets = (list(range(size)) for size in values.shape)
    return Result(values.movedim(1, -1), {"layer": layers, "target": targets, "example": rows})


def test_a_target_leads_by_a_margin_with_an_interval():
    rows = torch.tensor([[3.0, 1.0], [3.2, 1.0], [2.9, 1.1]])
    assert findings.leads(targets_of(rows[None]), "logit").holds
    mixed = torch.tensor([[9.0, 1.0], [0.5, 3.9], [1.9, 1.1]])
    assert not findings.leads(targets_of(mixed[None]), "logit").holds
    close = torch.tensor([[2.0, 1.0]])
    assert not findings.leads(targets_of(close[None]), "logit").holds
    assert findings.leads(targets_of(close[None] * 2), "logit").holds
    assert not findings.leads(targets_of(close[None] / 4), "prob").holds
    assert findings.leads(targets_of(close[None]), "distance").holds


def test_a_curve_beats_random_orders_by_its_interval_or_all_of_many():
    shares = [0.0, 0.5, 1.0]
    random = torch.stack([torch.tensor([[1.0, 0.5 + 0.01 * n, 0.0]]).T for n in range(20)])
    single = Curve(torch.tensor([[1.0, 0.1, 0.0]]).T, {"share": shares, "example": [0]}, kind="deletion", random=random)
    assert findings.beats_random(single).holds
    assert not findings.beats_random(dataclasses.replace(single, random=random[:3])).holds
    assert not findings.beats_random(dataclasses.replace(single, values=torch.tensor([[1.0, 0.6, 0.0]]).T)).holds


# -- mutants -------------------------------------------------------------------------------------------------------------------


def test_findings_that_ignore_sign_floor_or_answer_are_noticed(trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(findings, "OVERSHOOT", math.inf)
        assert findings.best_head(importance(5.0, -5.0, [3.19])).holds
    with monkeypatch.context() as patch:
        patch.setattr(findings, "LEAST_SWING", {})
        patch.setattr(findings, "LEAST_GAP", 0.0)
        assert findings.best_head(importance(0.04, 0.01, [0.9])).holds
    with monkeypatch.context() as patch:
        patch.setattr(of_case, "answers", lambda *given: findings.Finding("answers", True))
        assert trained["absent"].findings()["patches"].holds
