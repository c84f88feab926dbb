"""Relevance: completeness on every family, known answers, naive twins, and nothing left behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.readout import chefer_relevance, gradient_times_activation, integrated_gradients, legrad, occlusion
from circuitvision.readout.relevance.result import Relevance
from tests.parts import module_of
from tests.readout.layouts import by_row
from tests.readout.relevance_models import TOWERS, inputs_of, metric, model_of
from tests.zoo import case, shared_model

# -- integrated gradients ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_integrated_gradients_add_up_to_what_the_metric_changes(name, tower):
    # Images of several sizes have no mean position by position.
    start = "own" if "siglip2" in name else "mean"
    result = integrated_gradients(
        model_of(name), inputs_of(name), metric, site=f"{tower}.hook_input", baseline=start, steps=64
    )
    change = result.metric_value - result.baseline_value
    sums = by_row(result).sum(1)
    if len(result.completeness_gap) < len(change):
        change, sums = change.sum(0, keepdim=True), sums.sum(0, keepdim=True)
    else:
        sums = torch.zeros_like(change).index_add(0, torch.tensor(result.axes["example"]), sums)
    assert bool(((sums - change).abs() <= 0.03 * change.abs() + 1e-7).all())
    torch.testing.assert_close(result.completeness_gap, sums - change, atol=1e-12, rtol=0)
    assert float(change.abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["vit", "clip", "llava-next-mistral", "pi0"])
def test_the_pixels_of_every_tile_and_camera_add_up_as_well(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = integrated_gradients(model_of(name), inputs_of(name), metric, site="pixels", baseline="own", steps=96)
    change = (result.metric_value - result.baseline_value).abs()
    assert bool((result.completeness_gap.abs() <= 0.05 * change).all())
    tokens = model_of(name).tokens(inputs_of(name))["vision"]
    assert by_row(result).shape[0] == tokens.n_rows
    patches = result.on_patches()
    torch.testing.assert_close(by_row(patches).nansum(1), by_row(result).sum((1, 2)))
    assert torch.equal(by_row(patches).isnan(), torch.from_numpy(tokens.kind != "patch"))


@pytest.mark.filterwarnings("ignore:In .* cases the integrated")
def test_a_gap_shrinks_with_steps_and_a_large_one_is_announced():
    model, inputs = model_of("siglip2-classifier"), inputs_of("siglip2-classifier")
    gaps = [
        integrated_gradients(model, inputs, metric, baseline="own", steps=steps).completeness_gap.abs().max().item()
        for steps in (16, 48, 128)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    with pytest.warns(UserWarning, match="miss the metric's change"):
        integrated_gradients(model, inputs, metric, baseline="own", steps=1, rule="midpoint")


@pytest.mark.parametrize("rule", ["gauss-legendre", "midpoint"])
@pytest.mark.parametrize("baseline", ["mean", "zero", 0.3])
def test_a_linear_read_out_is_exact_in_one_step(rule, baseline):
    site = "vision.ln_final.hook_normalized"
    result = integrated_gradients(
        model_of("vit"), inputs_of("vit"), metric, site=site, steps=1, rule=rule, baseline=baseline
    )
    torch.testing.assert_close(result.completeness_gap, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(by_row(result)[:, 0].abs().min()) > 1e-3
    assert float(by_row(result)[:, 1:].abs().max()) == 0.0


def test_gradient_times_activation_equals_it_for_a_linear_read_out_from_zero():
    model, inputs, site = model_of("vit"), inputs_of("vit"), "vision.ln_final.hook_normalized"
    first = gradient_times_activation(model, inputs, metric, site=site)
    torch.testing.assert_close(
        by_row(first), by_row(integrated_gradients(model, inputs, metric, site=site, baseline="zero", steps=3))
    )


@pytest.mark.parametrize("name", ["clip", "siglip2", "llava-clip-llama", "llava-next-mistral", "pi0"])
@pytest.mark.parametrize("tower", [0, -1])
def test_steps_in_one_batch_equal_one_at_a_time(name, tower):
    site = f"{case(name).towers[tower]}.hook_input"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"site": site, "baseline": "own", "steps": 5}
        together = integrated_gradients(model_of(name), inputs_of(name), metric, **options, steps_at_once=3)
        alone = integrated_gradients(model_of(name), inputs_of(name), metric, **options, steps_at_once=1)
    torch.testing.assert_close(by_row(together), by_row(alone), atol=1e-9, rtol=1e-7)


def test_the_midpoint_rule_errs_with_the_square_of_its_step():
    model, inputs = model_of("vit"), inputs_of("vit")
    gaps = [
        integrated_gradients(model, inputs, metric, steps=steps, rule="midpoint").completeness_gap.abs().max().item()
        for steps in (32, 64)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


def test_positions_that_stay_have_no_share():
    model, inputs = model_of("llava-clip-llama"), inputs_of("llava-clip-llama")
    patches = model.tokens(inputs)["language"].select("patch")
    result = integrated_gradients(model, inputs, metric, site="language.hook_input", positions=patches, steps=64)
    assert float(by_row(result)[~patches.tensor].abs().max()) == 0.0
    assert float(by_row(result)[patches.tensor].abs().min()) > 0.0
    change = result.metric_value - result.baseline_value
    assert bool((result.completeness_gap.abs() < 0.03 * change.abs()).all())


@pytest.mark.filterwarnings("ignore:In .* cases the integrated")
def test_a_data_set_is_a_baseline():
    model, inputs = model_of("vit"), inputs_of("vit")
    other = case("vit").inputs(model.module, batch=3, seed=5, dtype=torch.float64)
    _, cache_of_other = model.run_with_cache(other, names_filter="vision.hook_input")
    given = cache_of_other["vision.hook_input"].mean(0)
    by_data = integrated_gradients(model, inputs, metric, baseline=other)
    by_tensor = integrated_gradients(model, inputs, metric, baseline=given)
    torch.testing.assert_close(by_row(by_data), by_row(by_tensor))
    pixels = integrated_gradients(model, inputs, metric, site="pixels", baseline=other, steps=4)
    mean = other["pixel_values"].mean(0)
    same = integrated_gradients(model, inputs, metric, site="pixels", baseline=mean, steps=4)
    torch.testing.assert_close(by_row(pixels), by_row(same))


def test_the_mean_baseline_is_of_the_other_rows_alone():
    model, inputs = model_of("vit"), inputs_of("vit")
    _, found = model.run_with_cache(inputs, names_filter="vision.hook_input")
    swapped = found["vision.hook_input"].flip(0)
    torch.testing.assert_close(
        by_row(integrated_gradients(model, inputs, metric)),
        by_row(integrated_gradients(model, inputs, metric, baseline=swapped)),
    )


# -- gradient × activation -----------------------------------------------------------------------------------------------------------------


def test_gradient_times_pixel_is_autograd_on_the_bare_model():
    model, inputs = model_of("vit"), inputs_of("vit")
    pixels = inputs["pixel_values"].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(metric(model.module(pixel_values=pixels).logits).sum(), pixels)
    result = gradient_times_activation(model, inputs, metric, site="pixels")
    torch.testing.assert_close(by_row(result), (slope * pixels).sum(1).detach())
    assert result.on_image(1).shape == pixels.shape[-2:]


@pytest.mark.parametrize(("name", "site"), [("clip", "text.hook_input"), ("pi0", "language.blocks.1.hook_resid_pre")])
def test_gradient_times_activation_is_the_caches_gradient(name, site):
    model, inputs = model_of(name), inputs_of(name)
    _, found = model.run_with_cache(inputs, names_filter=site, incl_bwd=True, metric=metric)
    result = gradient_times_activation(model, inputs, metric, site=site)
    torch.testing.assert_close(by_row(result), (found[site] * found[f"{site}_grad"]).sum(-1))


def test_tiles_that_fill_up_a_batch_are_no_rows():
    name = "llava-next-llama"
    model, inputs = model_of(name), inputs_of(name, images=2)
    pixels = inputs["pixel_values"].clone().requires_grad_(True)
    logits = model.module(**{**inputs, "pixel_values": pixels}).logits
    (slope,) = torch.autograd.grad(metric(logits).sum(), pixels)
    maps = (slope * pixels).sum(2).detach()
    result = gradient_times_activation(model, inputs, metric, site="pixels")
    # Two images of five and three tiles in each prompt, padded to five.
    torch.testing.assert_close(by_row(result), torch.cat([maps[0], maps[1, :3], maps[2], maps[3, :3]]))
    assert result.axes["example"] == [0] * 8 + [1] * 8


@pytest.mark.parametrize("site", ["hook_z", "hook_result"])
def test_a_head_whose_output_nobody_reads_is_irrelevant(site):
    module = copy.deepcopy(shared_model("vit")).double().eval()
    model = cv.HookedModel(module)
    width = model.vision.cfg.d_head
    with torch.no_grad():
        module_of(model.vision.blocks[0], "o").weight[:, width : 2 * width] = 0
    result = gradient_times_activation(model, inputs_of("vit"), metric, site=f"vision.blocks.0.attn.{site}")
    assert list(result.axes) == ["position", "head", "example"]
    assert float(by_row(result)[..., 1].abs().max()) == 0.0
    assert float(by_row(result)[..., 0].abs().max()) > 0.0
    torch.testing.assert_close(by_row(result, "per_position"), by_row(result).sum(-1))


# -- occlusion -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "clip", "llava-clip-llama"])
def test_occlusion_is_a_naive_loop(name):
    model, inputs = model_of(name), inputs_of(name)
    site = "vision.hook_input"
    clean, found = model.run_with_cache(inputs, names_filter=site)
    result = occlusion(model, inputs, metric, baseline="zero")
    for position in range(found[site].shape[1]):
        if model.tokens(inputs)["vision"].kind[0, position] != "patch":
            assert bool(by_row(result)[:, position].isnan().all())
            continue
        emptied = found[site].clone()
        emptied[:, position] = 0
        edited = model.run_with_hooks(inputs, fwd_hooks=[(site, lambda value, hook, emptied=emptied: emptied)])
        torch.testing.assert_close(by_row(result)[:, position], metric(clean) - metric(edited))


def test_a_window_gives_each_patch_the_mean_of_the_windows_that_hold_it():
    model, inputs = model_of("vit"), inputs_of("vit")
    clean = metric(model(inputs))
    result = occlusion(model, inputs, metric, window=3, baseline="zero")
    total, count = torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(4, 4)
    tokens = model.tokens(inputs)["vision"]
    for top in range(2):
        for left in range(2):
            held = [
                position
                for position in tokens.positions("patch")
                if top <= tokens.patch_row[0, position] < top + 3 and left <= tokens.patch_col[0, position] < left + 3
            ]
            edit = edits.ablate("vision.hook_input", "zero", positions=held)
            lost = clean - metric(model.run(inputs, edit))
            total[:, top : top + 3, left : left + 3] += lost[:, None, None]
            count[top : top + 3, left : left + 3] += 1
    for row in range(2):
        torch.testing.assert_close(result.on_image(row), total[row] / count)


def test_each_tile_and_each_text_is_removed_for_itself():
    model, inputs = model_of("llava-next-mistral"), inputs_of("llava-next-mistral")
    result = occlusion(model, inputs, metric, baseline="zero")
    tokens = model.tokens(inputs)["vision"]
    row, position = 3, tokens.n_positions - 1
    mask = torch.zeros(tokens.n_rows, tokens.n_positions, dtype=torch.bool)
    mask[row, position] = True
    with torch.no_grad():
        lost = metric(model(inputs)) - metric(
            model.run(inputs, edits.ablate("vision.hook_input", "zero", positions=mask))
        )
    assert float(by_row(result)[row, position]) == pytest.approx(float(lost[result.axes["example"][row]]), rel=1e-9)
    model, inputs = model_of("clip"), inputs_of("clip")
    result = occlusion(model, inputs, metric, tower="text", baseline="zero")
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 2] = True
    with torch.no_grad():
        lost = metric(model(inputs)) - metric(
            model.run(inputs, edits.ablate("text.hook_input", "zero", positions=mask))
        )
    assert float(by_row(result)[1, 2]) == pytest.approx(float(lost.sum()), rel=1e-9)


# -- all of them ---------------------------------------------------------------------------------------------------------------------------

METHODS = {
    "gradient": gradient_times_activation,
    "integrated": lambda model, inputs, metric: integrated_gradients(model, inputs, metric, steps=3),
    "pixels": lambda model, inputs, metric: integrated_gradients(model, inputs, metric, site="pixels", steps=3),
    "legrad": legrad,
    "chefer": chefer_relevance,
    "occlusion": occlusion,
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.filterwarnings("ignore:In .* cases the integrated")
def test_nothing_is_left_behind_and_the_surroundings_do_not_matter(method):
    module = copy.deepcopy(shared_model("vit"))
    model, inputs = cv.HookedModel(module), case("vit").inputs(module, batch=2)
    expected = by_row(method(model, inputs, metric))
    modes = [part.training for part in module.modules()]
    with torch.no_grad():
        torch.testing.assert_close(by_row(method(model, inputs, metric)), expected, equal_nan=True)
    with torch.inference_mode():
        made = case("vit").inputs(module, batch=2)
        torch.testing.assert_close(by_row(method(model, made, metric)), expected, equal_nan=True)
    for parameter in module.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        parameter.requires_grad_(False)
    torch.testing.assert_close(by_row(method(model, inputs, metric)), expected, equal_nan=True)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not inputs["pixel_values"].requires_grad
    assert [part.training for part in module.modules()] == modes
    assert not model.engine.stack
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.filterwarnings("ignore:In .* cases the integrated")
def test_results_keep_what_drawing_needs(method, tmp_path):
    model = model_of("vit")
    result = method(model, inputs_of("vit"), cv.metrics.logit_diff(1, 2))
    for name in ("relevance.npz", "relevance.safetensors"):
        again = Relevance.load(result.save(tmp_path / name))
        torch.testing.assert_close(by_row(again), by_row(result), equal_nan=True)
        assert again.labels == result.labels
        torch.testing.assert_close(again.on_image(1), result.on_image(1), equal_nan=True)
    assert len(result.to_frame()) == by_row(result).numel()
    assert result.provenance["metric_units"] == "logit"
    value = cv.metrics.logit_diff(1, 2)(model(inputs_of("vit")))
    # Eager attention takes its softmax in float32.
    torch.testing.assert_close(result.metric_value, value, atol=1e-5, rtol=1e-5)


def test_words_bind_and_half_precision_gives_float32():
    entry = case("llava-clip-llama")
    module = copy.deepcopy(shared_model("llava-clip-llama")).bfloat16().eval()
    model = cv.HookedModel(module, entry.processor())
    inputs = entry.inputs(module, batch=2, dtype=torch.bfloat16)
    answer = cv.metrics.logit_diff("red", "blue")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for result in (
            integrated_gradients(model, inputs, answer, site="language.hook_input", steps=4),
            chefer_relevance(model, inputs, answer, tower="language"),
            occlusion(model, inputs, answer, tower="language"),
        ):
            assert by_row(result).dtype == torch.float32
            assert bool(by_row(result).isfinite().all())


def test_maps_are_placed_and_scaled():
    model, inputs = model_of("llava-clip-llama"), inputs_of("llava-clip-llama", images=2)
    result = occlusion(model, inputs, metric, tower="language", baseline="zero")
    tokens = model.tokens(inputs)["language"]
    grids = [result.on_image(1, image=image) for image in range(2)]
    for position in tokens.positions("patch", row=1):
        grid = grids[tokens.image_number[1, position]]
        value = grid[tokens.patch_row[1, position], tokens.patch_col[1, position]]
        assert value == by_row(result)[1, position]
    large = result.per_pixel(1, size=(9, 6), image=1)
    assert torch.equal(large[::3, ::2], grids[1])
    assert torch.equal(large[2::3, 1::2], grids[1])
    assert result.per_pixel(1, size=(30, 30), smooth=True).shape == (30, 30)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, i: gradient_times_activation(m, i, metric, site="vision.blocks.0.attn.hook_pattern"),
            "no value per",
        ),
        (lambda m, i: gradient_times_activation(m, i, metric, site="vision.hook_readout"), "no value per"),
        (lambda m, i: gradient_times_activation(m, i, metric, site="vision.blocks.*.hook_resid_pre"), "names 3 sites"),
        (lambda m, i: gradient_times_activation(m, i, cv.metrics.rank(1)), "no gradient"),
        (lambda m, i: integrated_gradients(m, i, metric, rule="simpson"), "rule"),
        (lambda m, i: integrated_gradients(m, i, metric, baseline="average"), "average"),
        (lambda m, i: integrated_gradients(m, i, metric, baseline=torch.zeros(3)), "broadcast"),
        (lambda m, i: integrated_gradients(m, i, metric, site="pixels", baseline="black"), "image_mean"),
        (lambda m, i: integrated_gradients(m, i, metric, positions=torch.ones(2, 3, dtype=torch.bool)), "3 entries"),
        (lambda m, i: integrated_gradients(m, {"pixel_values": i["pixel_values"][:1]}, metric), "needs another one"),
        (lambda m, i: legrad(m, i, metric, score="mean"), "score"),
        (lambda m, i: legrad(m, i, metric, layers=[7]), "layers"),
        (lambda m, i: legrad(m, i, metric, layers="pool"), "pool"),
        (lambda m, i: chefer_relevance(m, i, metric, tower="language"), "no tower"),
        (lambda m, i: occlusion(m, i, metric, window=9), "does not fit"),
        (lambda m, i: occlusion(m, i, metric, kinds="word"), "kinds"),
        (lambda m, i: occlusion(m, i, metric, kinds="text"), "no position"),
    ],
)
def test_meaningless_requests_are_refused(call, message):
    model = cv.HookedModel(shared_model("vit"))
    with pytest.raises(InputError, match=message):
        call(model, case("vit").inputs(model.module, batch=2))


def test_dead_sites_packed_pixels_and_foreign_read_outs_are_refused():
    llava = model_of("llava-clip-llama")
    last = llava.vision.cfg.n_layers - 1
    with pytest.raises(InputError, match="cannot reach the output"):
        gradient_times_activation(
            llava, inputs_of("llava-clip-llama"), metric, site=f"vision.blocks.{last}.hook_resid_post"
        )
    with pytest.raises(InputError, match="score='output'"):
        legrad(llava, inputs_of("llava-clip-llama"), metric)
    with pytest.raises(InputError, match="pixel_values"):
        gradient_times_activation(model_of("siglip2"), inputs_of("siglip2"), metric, site="pixels")
