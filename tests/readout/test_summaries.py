"""Rank, identifiability, change and match rates by known answers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.result import LensResult
from tests.readout.common import run
from tests.readout.layouts import by_row, of_rows


def lens_of(logits: torch.Tensor, targets: list[int]) -> LensResult:
    """A lens whose columns are these at every position of a model."""
    model, _, cache = run("vit")
    named = {number: number for number in targets}
    return logit_lens(model, cache, "vision", targets=named, readout=lambda h: logits.expand(*h.shape[:2], -1))


def test_the_best_is_1_the_worst_is_one_over_k_and_a_random_order_is_in_the_middle():
    lens = lens_of(torch.tensor([3.0, 1.0, 2.0, 0.0]), [0, 1, 2, 3])
    assert by_row(lens, "ranks")[0, 0, 0].tolist() == [1, 3, 2, 4]
    found = by_row(lens.identifiability())
    assert found[..., 0].unique().tolist() == [1.0]
    assert float(found[0, 0, 3]) == pytest.approx(1 / 4)
    assert float(found.mean()) == pytest.approx((4 + 1) / (2 * 4))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 50), st.integers(0, 10_000))
def test_the_mean_over_all_columns_is_k_plus_1_over_2k(size, seed):
    logits = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).float()
    found = lens_of(logits, list(range(size))).identifiability()
    assert float(by_row(found).mean()) == pytest.approx((size + 1) / (2 * size)) == found.chance


def test_ties_favour_the_answer():
    assert by_row(lens_of(torch.tensor([1.0, 1.0, 0.0]), [1]), "ranks").unique().tolist() == [1]


def test_a_lens_of_a_model():
    model, out, cache = run("vit")
    label = out.argmax(-1).tolist()
    result = logit_lens(model, cache, "vision", targets={"label": label})
    summary = result.identifiability("cls")
    assert list(summary.axes) == ["layer", "target", "example"]
    assert by_row(summary)[-1].tolist() == [[1.0], [1.0]]
    assert summary.chance == pytest.approx((out.shape[-1] + 1) / (2 * out.shape[-1]))
    patches = result.identifiability("patch")
    n = model.vision.cfg.n_prefix
    assert float(by_row(patches)[1, 0, 0]) == pytest.approx(
        float((1 - (by_row(result, "ranks")[1, 0, n:, 0].double() - 1) / out.shape[-1]).mean())
    )
    rises = result.change_rate("patch")
    assert rises.axes["layer"] == result.axes["layer"][1:]
    wanted = (by_row(result)[1, 0, n:, 0] > by_row(result)[0, 0, n:, 0]).double().mean()
    assert float(by_row(rises)[0, 0, 0]) == pytest.approx(float(wanted))


def test_match_rates_count_the_mlp_as_well():
    model, _, cache = run("vit")
    stream, attention, mlp = (
        logit_lens(model, cache, "vision", top_k=1, sites=sites)
        for sites in (["vision.hook_input", "resid_post"], "attn_out", "mlp_out")
    )
    found = stream.match_rates(attention, mlp)
    layer, row = 1, 0
    best = stream.best[layer + 1, :, row]
    others = (attention.best[layer], mlp.best[layer], stream.best[layer])
    by_hand = [best == other[:, row] for other in others]
    for index, same in enumerate(by_hand):
        assert float(by_row(found)[index, layer, row]) == pytest.approx(float(same.double().mean()))
    neither = ~(by_hand[0] | by_hand[1] | by_hand[2])
    assert float(by_row(found)[3, layer, row]) == pytest.approx(float(neither.double().mean()))
    branch, before = (logit_lens(model, cache, "vision", targets=[0], sites=sites) for sites in ("mlp_out", None))
    change = branch.change_from(before)
    assert list(change.axes) == ["layer", "position", "target", "example"]
    torch.testing.assert_close(by_row(change)[1], by_row(branch)[1] - by_row(before)[1])


def test_a_difference_of_positions_is_found_and_a_null_is_not():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, 20, 30, 1, generator=generator)
    inside = torch.zeros(20, 30, dtype=torch.bool)
    inside[:, 4:8] = True
    axes = {"layer": ["input", 0], "row": list(range(20)), "position": list(range(30)), "target": ["red"]}
    kinds = [["cls", *["patch"] * 29]] * 20
    lens = of_rows(LensResult, values, axes, tower="vision", kinds=kinds)
    null = lens.position_difference(inside, shuffles=200)
    assert float(null.p.min()) > 0.02
    values[1, inside] += 1.0
    real = lens.position_difference(inside, shuffles=200)
    assert float(real.p[1, 0]) == pytest.approx(1 / 201)
    assert float(real.p[0, 0]) == float(null.p[0, 0])
    assert float(real.value[1, 0]) == pytest.approx(float(null.value[1, 0]) + 1.0, abs=1e-5)
    patches = lens.position_difference(inside, "patch", shuffles=0)
    outside = ~inside
    outside[:, 0] = False
    assert float(patches.outside[1, 0]) == pytest.approx(float(values[1, outside].mean()), abs=1e-6)
    assert patches.p.unique().tolist() == [1.0]
    with pytest.raises(InputError, match="at least one"):
        lens.position_difference(None)


def test_summaries_refuse_what_they_cannot_read():
    model, _, cache = run("vit")
    without = logit_lens(model, cache, "vision", top_k=2)
    with pytest.raises(InputError, match="targets="):
        without.identifiability()
    with pytest.raises(InputError, match="targets="):
        without.change_rate()
    read = logit_lens(model, cache, "vision", targets=[0])
    with pytest.raises(InputError, match="kind"):
        read.identifiability("newline")
    with pytest.raises(InputError, match="same layers"):
        read.match_rates(read, read)


def test_top_k_by_hand_on_the_patches_of_an_object():
    model, out, cache = run("vit")
    size = out.shape[-1]
    result = logit_lens(model, cache, "vision", targets={0: 0, 3: 3})
    inside = torch.zeros(2, by_row(result).shape[2], dtype=torch.bool)
    inside[0, [2, 3]] = inside[1, [5, 9, 11]] = True
    found = result.top_k_rate(2, inside)
    assert list(found.axes) == ["layer", "target", "example"]
    assert found.chance == pytest.approx(2 / size)
    for row in range(2):
        logits = model.module.classifier(
            model.vision.final_norm(cache["vision.blocks.1.hook_resid_post"][row, inside[row]])
        )
        wanted = (logits.topk(2).indices == 3).any(-1).double().mean()
        assert float(by_row(found)[2, row, 1]) == pytest.approx(float(wanted))
    assert bool((by_row(result.top_k_rate(size)) == 1).all())
    assert by_row(result.top_k_rate(1, "cls"))[-1, 0, 0] == float(out[0].argmax() == 0)
    means = by_row(result.identifiability(inside))[1, 0, 0]
    assert float(means) == pytest.approx(
        float((1 - (by_row(result, "ranks")[1, 0, [2, 3], 0].double() - 1) / size).mean())
    )
    for wrong in (0, size + 1, 1.5):
        with pytest.raises(InputError, match="whole number"):
            result.top_k_rate(wrong)
    for mask in (inside[:, 1:], inside.float()):
        with pytest.raises(InputError, match="A mask of positions"):
            result.top_k_rate(2, mask)
    with pytest.raises(InputError, match="no position in the mask"):
        result.top_k_rate(2, inside & False)


def test_top_k_agreement_counts_what_both_name():
    model, _, cache = run("vit")
    own, frozen = (logit_lens(model, cache, "vision", top_k=3, norm=norm) for norm in ("own", "frozen"))
    found = own.top_k_agreement(frozen, 3)
    assert list(found.axes) == ["layer", "example"]
    wanted = [
        len(set(a.tolist()) & set(b.tolist())) / 3
        for a, b in zip(by_row(own, "ids")[1, 0], by_row(frozen, "ids")[1, 0], strict=True)
    ]
    assert float(by_row(found)[1, 0]) == pytest.approx(sum(wanted) / len(wanted))
    assert by_row(found)[-1].tolist() == [1.0, 1.0]
    assert float(by_row(found)[0].mean()) < 1
    with pytest.raises(InputError, match="from 1 to 3"):
        own.top_k_agreement(frozen, 4)
    with pytest.raises(InputError, match="same rows"):
        own.top_k_agreement(frozen.take(0), 2)


def test_patches_of_an_object_are_selected_by_its_box_in_either_tower():
    model = cv.organisms.load("shapes-llava")
    pair = cv.data.sample_question_pairs(1, seed=3)[0]
    inputs = model.inputs(images=[pair.clean.image], text=[pair.prompt])
    left, top, right, bottom = pair.clean.boxes[0]
    for tower in ("language", "vision"):
        result = logit_lens(model, inputs, tower, targets={"red": "red", "blue": "blue"})
        chosen = model.tokens(inputs)[tower].image(0).box(left, top, right, bottom)
        numbers = [result.axes["position"].index(number) for number in chosen.positions(0)]
        assert 0 < len(numbers) < 16
        found = by_row(result.identifiability(chosen))
        wanted = (1 - (by_row(result, "ranks")[:, :, numbers].double() - 1) / result.n_outputs).mean(2)
        torch.testing.assert_close(found, wanted)
        with pytest.raises(InputError, match="selection of the"):
            result.change_rate(model.tokens(inputs)["vision" if tower == "language" else "language"].image(0))


def test_matches_are_unknown_where_a_lens_has_no_number():
    model, _, cache = run("vit")
    lenses = [
        logit_lens(model, cache, "vision", top_k=1, sites=sites)
        for sites in (["vision.hook_input", "resid_post"], "attn_out", "mlp_out")
    ]
    whole = by_row(lenses[0].match_rates(*lenses[1:], positions="patch"))
    assert whole.isfinite().all()
    for lens, layer, lost in ((0, 1, [0, 1]), (1, 2, [2]), (2, 0, [0])):
        values = by_row(lenses[lens])
        kept = values[layer, 1, 4].clone()
        values[layer, 1, 4] = float("nan")
        found = by_row(lenses[0].match_rates(*lenses[1:], positions="patch"))
        assert found[:, lost, 1].isnan().all()
        there = ~found.isnan()
        assert int((~there).sum()) == 4 * len(lost)
        assert torch.equal(found[there], whole[there])
        assert by_row(lenses[0].match_rates(*lenses[1:], positions="cls")).isfinite().all()
        values[layer, 1, 4] = kept
