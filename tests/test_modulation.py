"""Heads rescaled by their scores: the identity, zero ablation, what is linear, clipping, and random heads beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.data import Side
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.patching import ModulationResult, activation_patch, modulate
from circuitvision.patching.modulation import modulates
from tests.sweeps.drawing import model_of
from tests.zoo import CASES

METRIC = logit_diff(1, 3)
EXACT = {"atol": 1e-9, "rtol": 0}


def vit(batch: int = 4) -> tuple[cv.HookedModel, dict[str, Any]]:
    model = model_of("vit", torch.float64)
    return model, CASES["vit"].inputs(model.module, batch=batch, seed=1, dtype=torch.float64)


def modulated(heads: Any, **more: Any) -> ModulationResult:
    model, inputs = vit()
    return modulate(model, inputs, METRIC, heads=heads, **{"n_random": 0, "progress": False, **more})


def run(*group: edits.Edit) -> torch.Tensor:
    model, inputs = vit()
    with torch.no_grad():
        return METRIC(model.run(inputs, list(group)), inputs)


def test_factor_0_is_the_identity_and_a_head_at_0_is_zero_ablated():
    same = modulated({"L0H1": 2.0, "L1H0": -1.0}, factor=0.0)
    torch.testing.assert_close(same.values[0], run(), **EXACT)
    torch.testing.assert_close(same.values[1], run(), **EXACT)
    silent = modulated({"L0H1": -3.0})
    assert silent.factors == {"v.a0.h1": 0.0}
    torch.testing.assert_close(
        silent.values[1], run(edits.ablate("vision.blocks.0.attn.hook_z", "zero", heads=1)), **EXACT
    )


def test_factors_are_scores_over_the_largest_and_clipped():
    found = modulated({"L0H1": 2.0, "L0H2": -1.0, "L1H0": 0.5}, factor=1.5)
    assert found.factors == pytest.approx({"v.a0.h1": 2.0, "v.a0.h2": 0.25, "v.a1.h0": 1.375})
    expected = run(
        edits.scale("vision.blocks.0.attn.hook_z", 2.0, heads=1),
        edits.scale("vision.blocks.0.attn.hook_z", 0.25, heads=2),
        edits.scale("vision.blocks.1.attn.hook_z", 1.375, heads=0),
    )
    torch.testing.assert_close(found.values[1], expected, **EXACT)
    raw = modulated({"L0H1": 0.02, "L0H2": -0.01}, normalise=False)
    assert raw.factors == pytest.approx({"v.a0.h1": 1.02, "v.a0.h2": 0.99})
    assert modulated({"L0H1": 1.0}, factor=9.0, clip=(0.0, 3.0)).factors == {"v.a0.h1": 3.0}


def test_what_attention_adds_is_affine_in_the_factor():
    model, inputs = vit()
    site, out = "vision.blocks.1.attn.hook_z", "vision.blocks.1.hook_attn_out"
    seen = []
    for factor in (0.0, 0.5, 2.0):
        _, cache = _run_with(model, inputs, edits.scale(site, factor, heads=2), out)
        seen.append(cache)
    torch.testing.assert_close(seen[1], seen[0] + 0.25 * (seen[2] - seen[0]), **EXACT)


def _run_with(model: cv.HookedModel, inputs: Any, edit: edits.Edit, site: str) -> tuple[Any, torch.Tensor]:
    held = {}
    with torch.no_grad(), model.hooks(fwd_hooks=[(site, lambda value, hook: held.__setitem__("out", value.clone()))]):
        logits = model.run(inputs, [edit])
    return logits, held["out"]


def test_random_sets_have_the_same_factors_on_other_heads():
    found = modulated({"L0H1": 1.0, "L2H2": -0.5}, n_random=5, seed=3)
    assert found.axes["condition"] == ["before", "heads", *(f"random {number}" for number in range(1, 6))]
    for own in found.random_factors:
        assert sorted(own.values()) == [0.5, 2.0]
        assert not set(own) & {"v.a0.h1", "v.a2.h2"}
    assert modulated({"L0H1": 1.0, "L2H2": -0.5}, n_random=5, seed=3).random_factors == found.random_factors
    # Where nearly all heads have a score, the scores change places.
    every = {(layer, head): float(layer - head) for layer in range(3) for head in range(4)}
    for own in modulated(every, n_random=2).random_factors:
        assert len(own) == 12


def test_results_of_rankings_are_scores_and_the_same_data_warns():
    model, inputs = vit()
    other = CASES["vit"].inputs(model.module, batch=4, seed=2, dtype=torch.float64)
    pairs = cv.data.Pairs(inputs=inputs, corrupt_inputs=other, answers=[1] * 4, foils=[3] * 4)
    ranked = activation_patch(
        model, pairs, "logit_diff", sites="vision.blocks.*.attn.hook_z", allow_wrong=True, progress=False
    )
    held_out = Side(inputs=other, answers=[1] * 4, foils=[3] * 4)
    asked = {"heads": ranked, "progress": False}
    found = modulate(model, held_out, ["accuracy", "logit_diff"], n_random=1, allow_wrong=True, **asked)
    mean = ranked.mean()
    assert found.factors["v.a1.h2"] == pytest.approx(min(max(1 + float(mean[1, 2] / mean.abs().max()), 0), 2))
    noised = activation_patch(
        model, pairs, "logit_diff", sites="vision.blocks.*.attn.hook_z", mode="noise", allow_wrong=True, progress=False
    )
    turned = modulate(model, held_out, "accuracy", heads=noised, n_random=0, progress=False)
    least = noised.mean()
    assert turned.factors["v.a1.h2"] == pytest.approx(min(max(1 - float(least[1, 2] / least.abs().max()), 0), 2))
    assert list(found.axes) == ["metric", "condition", "example"]
    assert found.change().values.shape == (2, 2, 4)
    with pytest.warns(UserWarning, match="held-out"):
        modulate(model, pairs, "logit_diff", n_random=0, allow_wrong=True, **asked)


def test_files_words_and_figures(tmp_path):
    model, _ = vit()
    inputs = CASES["vit"].inputs(model.module, batch=24, seed=1, dtype=torch.float64)
    found = modulate(model, inputs, METRIC, heads={"L0H1": 1.0}, n_random=19, progress=False)
    again = ModulationResult.load(found.save(tmp_path / "m.npz"))
    assert torch.equal(again.values, found.values)
    assert again.factors == found.factors
    told = modulates(found)
    assert told.value == pytest.approx(float(found.change().mean()[0]))
    assert told.chance == pytest.approx(float(found.change().mean()[1:].abs().max()))
    assert told.holds is (abs(told.value) > told.chance and not told.interval[0] <= 0 <= told.interval[1])
    figure = found.plot()
    assert list(figure.data[1].x) == pytest.approx(found.mean()[:2].tolist())
    assert modulates(modulated({"L0H1": 1.0})).holds is None


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ({}, {}, "at least one"),
        ({"L0H1": float("nan")}, {}, "numbers"),
        (["L0H1"], {}, "mapping"),
        ({"L9H1": 1.0}, {}, "no L9H1"),
        ({"L0H1": 1.0}, {"n_random": -1}, "n_random"),
    ],
)
def test_meaningless_requests_are_refused(heads, options, message):
    with pytest.raises(InputError, match=message):
        modulated(heads, **options)


def test_clean_runs_that_give_another_answer_are_refused_before_a_head_is_scaled(monkeypatch):
    model, inputs = vit()
    right = model(inputs).argmax(-1).tolist()
    worst = model(inputs).argmin(-1).tolist()
    asked = {"heads": {"L0H1": 1.0}, "n_random": 0, "progress": False}
    assert modulate(model, Side(inputs=inputs, answers=right, foils=worst), "logit_diff", **asked).values.shape == (
        2,
        4,
    )
    wrong = Side(inputs=inputs, answers=worst, foils=right)
    assert modulate(model, wrong, "logit_diff", allow_wrong=True, **asked).values.shape == (2, 4)
    monkeypatch.setattr(type(model), "sweep", lambda *_, **__: pytest.fail("swept"))
    with pytest.raises(InputError, match="allow_wrong"):
        modulate(model, wrong, "logit_diff", **asked)
