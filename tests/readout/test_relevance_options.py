"""Relevance where masks, padding, windows, regions and baselines differ: twins on the bare model, naive loops, and what is refused."""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import cache

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.readout import (
    chefer_relevance,
    gradient_times_activation,
    integrated_gradients,
    legrad,
    occlusion,
    perturbation_curve,
)
from circuitvision.readout.relevance.attention import _relevance_rollout
from circuitvision.readout.relevance.baselines import start_of
from circuitvision.readout.relevance.result import Relevance
from circuitvision.readout.relevance.variables import AttributionInput
from tests.readout.layouts import by_row, of_rows
from tests.readout.relevance_models import inputs_of, metric, model_of
from tests.zoo import case, shared_model

LLAVA = "llava-clip-llama"


@cache
def single() -> cv.HookedModel:
    """LLaVA in float32: its float64 run of a prompt padded on the left is NaN in transformers."""
    return cv.HookedModel(copy.deepcopy(shared_model(LLAVA)).eval())


def padded(side: str, extra: int = 3) -> tuple[dict, dict, slice]:
    """A batch whose first prompt is padded, that prompt alone, and where it stands in the batch."""
    base = case(LLAVA).inputs(shared_model(LLAVA), batch=2)
    ids = base["input_ids"]
    fill, length = torch.zeros(extra, dtype=ids.dtype), ids.shape[1]
    first = torch.cat([fill, ids[0]] if side == "left" else [ids[0], fill])
    both = torch.stack([first, torch.cat([ids[1], ids[1, -extra:]])])
    own = slice(extra, None) if side == "left" else slice(0, length)
    mask = torch.ones_like(both)
    mask[0] = 0
    mask[0, own] = 1
    pixels = base["pixel_values"]
    alone = {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1]), "pixel_values": pixels[:1]}
    return {"input_ids": both, "attention_mask": mask, "pixel_values": pixels}, alone, own


# -- attention under masks -----------------------------------------------------------------------------------------------------------------


def test_legrad_counts_no_look_that_the_causal_mask_forbids():
    module = copy.deepcopy(shared_model(LLAVA)).double().eval()
    module.set_attn_implementation("eager")
    output = module(**inputs_of(LLAVA), output_attentions=True)
    slopes = torch.autograd.grad(metric(output.logits).sum(), output.attentions)
    count = output.logits.shape[1]
    earlier = torch.ones(count, count, dtype=torch.float64).tril()
    expected = torch.stack([(slope.clamp(min=0) * earlier).mean((1, 2)) for slope in slopes]).mean(0)
    result = legrad(model_of(LLAVA), inputs_of(LLAVA), metric, tower="language", score="output")
    torch.testing.assert_close(by_row(result), expected)
    forbidden = torch.stack([(slope.clamp(min=0) * (1 - earlier)).sum() for slope in slopes]).sum()
    assert float(forbidden) > 0.0


def test_the_first_layer_asked_for_itself_keeps_to_the_mask_as_well():
    model, inputs = model_of(LLAVA), inputs_of(LLAVA)
    by_layer = legrad(model, inputs, metric, tower="language", layers=-1)
    by_output = legrad(model, inputs, metric, tower="language", layers=[-1], score="output")
    torch.testing.assert_close(by_row(by_layer), by_row(by_output), atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [legrad, chefer_relevance])
def test_padding_neither_looks_nor_is_looked_at(method, side):
    both, alone, own = padded(side)
    answer = cv.metrics.logit_diff(5, 7)
    options = {"score": "output"} if method is legrad else {}
    together = by_row(method(single(), both, answer, tower="language", **options))[0]
    expected = by_row(method(single(), alone, answer, tower="language", **options))[0]
    torch.testing.assert_close(together[own], expected, atol=3e-6, rtol=1e-4)
    outside = torch.ones(len(together), dtype=torch.bool)
    outside[own] = False
    assert float(together[outside].abs().max()) == 0.0


def test_chefer_relevance_of_padded_prompts_is_what_the_bare_model_gives():
    both, _, _ = padded("left")
    module = copy.deepcopy(shared_model(LLAVA)).eval()
    module.set_attn_implementation("eager")
    output = module(**both, output_attentions=True)
    logits = output.logits[:, -1]
    slopes = torch.autograd.grad((logits[:, 5] - logits[:, 7]).sum(), output.attentions)
    rolled = torch.eye(both["input_ids"].shape[1]).expand(2, -1, -1)
    for slope, pattern in zip(slopes, output.attentions, strict=True):
        rolled = rolled + (slope * pattern).clamp(min=0).mean(1) @ rolled
    expected = rolled[:, -1].detach().clone()
    expected[:, -1] -= 1
    result = chefer_relevance(single(), both, cv.metrics.logit_diff(5, 7), tower="language")
    torch.testing.assert_close(by_row(result), expected, atol=1e-6, rtol=1e-5)


def test_products_of_half_precision_are_taken_in_single():
    model = cv.HookedModel(copy.deepcopy(shared_model("vit")).to(torch.bfloat16).eval())
    inputs = case("vit").inputs(model.module, batch=2, dtype=torch.bfloat16)
    names = model.sites("vision.blocks.*.attn.hook_pattern")
    _, found = model.run_with_cache(inputs, names_filter=names, incl_bwd=True, metric=metric)
    shares = [(found[name].float() * found[f"{name}_grad"].float()).clamp(min=0).mean(1).cpu() for name in names]
    expected = _relevance_rollout(shares)[:, 0]
    expected[:, 0] -= 1
    torch.testing.assert_close(by_row(chefer_relevance(model, inputs, metric)), expected.detach(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("method", [gradient_times_activation, legrad, chefer_relevance])
def test_what_is_no_number_is_said_to_be_none(method):
    inputs = {"pixel_values": inputs_of("vit")["pixel_values"] * float("nan")}
    with pytest.warns(UserWarning, match="values are NaN: the metric or its gradient is no number"):
        result = method(model_of("vit"), inputs, metric)
    assert bool(by_row(result).isnan().all())


# -- occlusion -----------------------------------------------------------------------------------------------------------------------------


def lost_without(model, inputs, site, mask) -> torch.Tensor:
    with torch.no_grad():
        return metric(model(inputs)) - metric(model.run(inputs, edits.ablate(site, "zero", positions=mask)))


def test_windows_move_by_their_stride_and_end_at_the_border():
    model, inputs = model_of("vit"), inputs_of("vit")
    tokens = model.tokens(inputs)["vision"]
    result = occlusion(model, inputs, metric, window=2, stride=2, baseline="zero")
    wide = occlusion(model, inputs, metric, window=3, stride=2, baseline="zero")
    assert "stride 2" in result.method
    for found, starts, window in ((result, (0, 2), 2), (wide, (0, 1), 3)):
        total, count = torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(4, 4)
        for top, left in itertools.product(starts, starts):
            inside = (tokens.patch_row >= top) & (tokens.patch_row < top + window)
            inside &= (tokens.patch_col >= left) & (tokens.patch_col < left + window)
            lost = lost_without(model, inputs, "vision.hook_input", torch.from_numpy(inside))
            total[:, top : top + window, left : left + window] += lost[:, None, None]
            count[top : top + window, left : left + window] += 1
        for row in range(2):
            torch.testing.assert_close(found.on_image(row), total[row] / count)


def test_regions_are_removed_whole():
    model, inputs = model_of(LLAVA), inputs_of(LLAVA)
    tokens = model.tokens(inputs)["language"]
    words = torch.from_numpy(tokens.kind == "text")
    patches = tokens.image(0).box(0, 0, 8, 8)
    result = occlusion(model, inputs, metric, tower="language", regions=[words, patches], baseline="zero")
    assert "2 regions" in result.method
    for mask in (words, patches.tensor):
        lost = lost_without(model, inputs, "language.hook_input", mask)
        for row in range(2):
            held = by_row(result)[row, mask[row]]
            torch.testing.assert_close(held, lost[row].expand_as(held), atol=1e-9, rtol=1e-6)
    rest = ~(words | patches.tensor)
    assert bool(rest.any())
    assert bool(by_row(result)[rest].isnan().all())


def test_regions_that_meet_give_their_mean_and_single_patches_the_default():
    model, inputs = model_of("vit"), inputs_of("vit")
    tokens = model.tokens(inputs)["vision"]
    alone = [torch.arange(17).eq(position).expand(2, -1) for position in tokens.positions("patch")]
    plain = occlusion(model, inputs, metric, baseline="zero")
    assert torch.equal(
        by_row(occlusion(model, inputs, metric, regions=alone, baseline="zero"))[:, 1:], by_row(plain)[:, 1:]
    )
    pair = alone[2] | alone[3]
    both = by_row(occlusion(model, inputs, metric, regions=[alone[2], pair], baseline="zero"))
    torch.testing.assert_close(both[:, 3], (by_row(plain)[:, 3] + both[:, 4]) / 2)


def test_regions_of_texts_are_removed_text_by_text():
    model, inputs = model_of("clip"), inputs_of("clip")
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 1:3] = True
    result = occlusion(model, inputs, metric, tower="text", regions=[mask], baseline="zero")
    for row in range(3):
        only = torch.zeros_like(mask)
        only[row] = mask[row]
        lost = float(lost_without(model, inputs, "text.hook_input", only).sum())
        torch.testing.assert_close(by_row(result)[row, 1:3], torch.full((2,), lost, dtype=torch.float64))


# -- baselines -----------------------------------------------------------------------------------------------------------------------------


def test_the_mean_over_other_rows_leaves_padding_out():
    both, _, _ = padded("right")
    variable = AttributionInput(single(), both, cv.metrics.logit_diff(5, 7), "language.hook_input")
    with pytest.raises(InputError, match="No other example of the run has a value at position 16, where row 1 has one"):
        start_of(variable, "mean")
    needed = torch.zeros(2, 19, dtype=torch.bool)
    needed[:, :16] = True
    start = start_of(variable, "mean", needed)
    torch.testing.assert_close(start[0, :16], variable.value[1, :16])
    torch.testing.assert_close(start[1, :16], variable.value[0, :16])
    assert torch.equal(start[:, 16:], variable.value[:, 16:])
    # Patches can be removed whatever the prompts' lengths.
    result = occlusion(single(), both, cv.metrics.logit_diff(5, 7), tower="language", kinds="patch")
    assert bool(by_row(result)[:, :3].isfinite().any())


def test_the_mean_of_a_data_set_leaves_its_padding_out():
    both, _, _ = padded("right")
    variable = AttributionInput(single(), both, cv.metrics.logit_diff(5, 7), "language.hook_input")
    start = start_of(variable, both)
    torch.testing.assert_close(start[1, 16:], variable.value[1, 16:])
    torch.testing.assert_close(start[0, :16], variable.value[:, :16].mean(0))


def test_a_blurred_picture_keeps_areas_of_one_colour_and_spreads_a_dot():
    model, inputs = model_of("vit"), inputs_of("vit")
    picture = torch.full_like(inputs["pixel_values"], 0.7)
    flat = AttributionInput(model, {"pixel_values": picture}, metric, "pixels")
    torch.testing.assert_close(start_of(flat, "blur"), picture)
    dot = torch.zeros_like(picture)
    height, width = dot.shape[-2:]
    dot[..., height // 2, width // 2] = 1.0
    spread = start_of(AttributionInput(model, {"pixel_values": dot}, metric, "pixels"), "blur")[0, 0]
    away = (torch.arange(height) - height // 2).double()
    bell = torch.exp(-0.5 * (away / (height / 8)).square())
    bell[away.abs() > 3 * height / 8] = 0
    expected = bell / bell.sum()
    torch.testing.assert_close(spread, expected[:, None] * expected[None], atol=1e-7, rtol=1e-5)
    result = integrated_gradients(model, inputs, metric, site="pixels", baseline="blur", steps=32)
    change = (result.metric_value - result.baseline_value).abs()
    assert bool((result.completeness_gap.abs() < 0.05 * change).all())
    with pytest.raises(InputError, match="is not understood"):
        integrated_gradients(model, inputs, metric, baseline="blur")


def test_arrays_are_baselines_and_what_is_no_number_is_none():
    model, inputs = model_of("vit"), inputs_of("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_array = integrated_gradients(model, inputs, metric, baseline=np.full(24, 0.3), steps=4)
        by_number = integrated_gradients(model, inputs, metric, baseline=0.3, steps=4)
    assert torch.equal(by_row(by_array), by_row(by_number))
    assert "baseline given" in by_array.method
    with pytest.raises(InputError, match="no numbers"):
        integrated_gradients(model, inputs, metric, baseline=float("nan"))


# -- results and refusals ------------------------------------------------------------------------------------------------------------------


def test_the_strongest_positions_are_named():
    result = of_rows(
        Relevance,
        torch.tensor([[0.5, -2.0, 1.0]]),
        {"row": [0], "position": [0, 1, 2]},
        site="language.hook_input",
        places=torch.full((1, 3, 4), -1),
        labels=[["a", "red", "dog"]],
        completeness_gap=torch.tensor([0.01]),
    )
    assert result.top(2) == [("red", -2.0), ("dog", 1.0)]
    assert result.highlights() == {
        "strongest in example 0": "red -2, dog +1, a +0.5",
        "largest completeness gap": "0.01",
    }
    assert "red -2, dog +1" in result._repr_html_()
    for ask in (lambda: result.top(example=1), lambda: result.on_image(1)):
        with pytest.raises(InputError, match="no example 1"):
            ask()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i: legrad(m, i, metric, layers=[0.5]), "has layers 0 to 2"),
        (lambda m, i: legrad(m, i, metric, layers=True), "has layers 0 to 2"),
        (lambda m, i: legrad(m, i, metric, layers=3), "not all of those asked for"),
        (lambda m, i: integrated_gradients(m, i, metric, steps=1.5), "whole numbers"),
        (lambda m, i: integrated_gradients(m, i, metric, steps_at_once=0), "whole numbers"),
        (lambda m, i: integrated_gradients(m, i, metric, steps_at_once=-1), "whole numbers"),
        (lambda m, i: integrated_gradients(m, i, metric, positions="colour"), "not understood"),
        (lambda m, i: occlusion(m, i, metric, window=1.5), "whole numbers"),
        (lambda m, i: occlusion(m, i, metric, window=2, stride=3), "would leave patches out"),
        (lambda m, i: occlusion(m, i, metric, kinds=[]), "is not understood"),
        (lambda m, i: occlusion(m, i, metric, regions=[]), "regions is empty"),
        (lambda m, i: occlusion(m, i, metric, regions=[torch.zeros(2, 17, dtype=torch.bool)]), "no position"),
        (lambda m, i: occlusion(m, i, metric, regions=[torch.ones(2, 17)]), "not understood"),
        (lambda m, i: occlusion(m, i, metric, regions=[torch.ones(2, 5, dtype=torch.bool)]), "5 entries"),
        (lambda m, i: occlusion(m, i, metric, window=2, regions=[]), "leave kinds, window and stride out"),
        (lambda m, i: perturbation_curve(m, i, metric, torch.rand(2, 17), steps=2.5), "whole numbers"),
        (lambda m, i: perturbation_curve(m, i, metric, torch.rand(2, 17), random_orders=1.5), "whole numbers"),
        (lambda m, i: _relevance_rollout([]), "at least one layer"),
    ],
)
def test_meaningless_options_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(model_of("vit"), inputs_of("vit"))


def test_regions_of_another_tower_are_refused():
    model, inputs = model_of(LLAVA), inputs_of(LLAVA)
    words = model.tokens(inputs)["language"].select("text")
    with pytest.raises(InputError, match="language tower, not of vision"):
        occlusion(model, inputs, metric, tower="vision", regions=[words])


def test_tiles_that_fill_up_a_batch_are_in_no_mean():
    name = "llava-next-mistral"
    model = cv.HookedModel(shared_model(name))
    inputs = case(name).inputs(model.module, batch=3, padding="left")
    pixels = inputs["pixel_values"]
    real = pixels.abs().amax((-3, -2, -1)) > 0
    assert not bool(real.all()), "no tile of this run fills up anything"

    def score(logits):
        return logits[:, -1, 0]

    start = start_of(AttributionInput(model, inputs, score, "pixels"), "mean")
    for image, tile in real.nonzero().tolist():
        others = [row for row in range(len(pixels)) if row != image and real[row, tile]]
        torch.testing.assert_close(start[image, tile], pixels[others, tile].mean(0))
    of_data = start_of(AttributionInput(model, inputs, score, "pixels"), inputs)
    for tile in range(pixels.shape[1]):
        mean = pixels[real[:, tile], tile].mean(0)
        torch.testing.assert_close(of_data[real[:, tile], tile], mean.expand(int(real[:, tile].sum()), *mean.shape))


def test_a_tile_that_no_other_picture_has_has_no_mean():
    name = "llava-onevision"
    model = cv.HookedModel(shared_model(name))
    inputs = case(name).inputs(model.module, batch=3, padding="left")
    with pytest.raises(InputError, match="cut alike"):
        integrated_gradients(model, inputs, lambda logits: logits[:, -1, 0], site="pixels", steps=2)


def test_an_edit_without_a_number_costs_only_its_own_positions():
    model = model_of("vit")
    inputs = inputs_of("vit")

    whole = occlusion(model, inputs, lambda logits: logits[:, 0], baseline="zero")
    worst = float(by_row(whole)[0].nan_to_num(0.0).max())
    clean = float(model(inputs)[0, 0].detach())

    def undefined(logits):
        lost = clean - logits[:, 0]
        return torch.where((lost - worst).abs() < 1e-6, float("nan"), logits[:, 0])

    with pytest.warns(UserWarning, match="NaN"):
        found = occlusion(model, inputs, undefined, baseline="zero")
    there = ~by_row(whole).isnan()
    assert int(by_row(found)[there].isnan().sum()) == 1
    kept = there & ~by_row(found).isnan()
    torch.testing.assert_close(by_row(found)[kept], by_row(whole)[kept])


def test_a_text_that_is_read_at_its_padding_is_relevant_through_it():
    """SigLIP reads the last position of a text, which is padding where the prompt is short: its look at the words must count."""
    model, inputs = model_of("siglip2"), dict(inputs_of("siglip2"))
    mask = inputs["attention_mask"].clone()
    mask[:, 4:] = 0
    inputs["attention_mask"] = mask
    names = list(model.sites("text.blocks.*.attn.hook_pattern"))

    def score(logits):
        return logits[:, 0]

    found = legrad(model, inputs, score, tower="text", score="output")
    _, run = model.run_with_cache(inputs, names_filter=names, incl_bwd=True, metric=score)
    slopes = torch.stack([run[f"{name}_grad"].clamp_min(0).mean(1) for name in names]).mean(0)
    assert slopes[0, -1, :4].any()
    assert not slopes[:, -2].any()
    words = slopes[:, [0, 1, 2, 3, -1]].sum(1) / 5
    torch.testing.assert_close(by_row(found)[:, :4], words[:, :4])
    assert not by_row(found)[:, 4:].any()


def test_an_occlusion_keeps_the_edits_that_it_ran(tmp_path):
    model = single()
    inputs = case(LLAVA).inputs(shared_model(LLAVA), batch=1)
    metric = cv.metrics.logit_diff(5, 7)
    found = cv.readout.occlusion(model, inputs, metric, baseline="zero", progress=False)
    loaded = cv.load(found.save(tmp_path / "found.npz"))
    again = model.sweep(inputs, loaded.edits, metric, progress=False)
    patches = ~found.values.isnan()
    assert len(loaded.edits) == int(patches.sum())
    torch.testing.assert_close(
        (again.clean - again.values)[:, 0], found.values[patches].to(again.values), atol=1e-5, rtol=1e-4
    )
