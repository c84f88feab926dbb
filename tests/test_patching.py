"""Activation patching: effects known in closed form on an additive model, and requests that cannot be meant."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.patching import PatchingResult, activation_patch
from tests.toy_model import ToyModel
from tests.zoo import case, shared_model

VISION = torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 5.0]], dtype=torch.float64)
LANGUAGE = torch.tensor([[0.25, 0.0]], dtype=torch.float64)
CLEAN = {"picture": torch.tensor([2.0, 4.0], dtype=torch.float64)}
CORRUPT = {"picture": torch.tensor([-1.0, 1.0], dtype=torch.float64)}
METRIC = logit_diff(0, 1)


def model() -> ToyModel:
    return ToyModel(VISION, LANGUAGE)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_effects_of_an_additive_model_are_the_shares_of_its_heads(mode):
    vision = activation_patch(model(), CLEAN, CORRUPT, METRIC, sites="vision.blocks.*.attn.hook_z", mode=mode)
    torch.testing.assert_close(vision.mean(), VISION / VISION.sum())
    assert vision.axes == {"layer": [0, 1], "head": [0, 1, 2], "example": [0, 1]}
    language = activation_patch(model(), CLEAN, CORRUPT, METRIC, sites="language.blocks.*.attn.hook_z", mode=mode)
    torch.testing.assert_close(language.mean(), LANGUAGE / 0.75)


def test_raw_effects_are_in_units_of_the_metric():
    result = activation_patch(model(), CLEAN, CORRUPT, METRIC, sites="vision.blocks.*.attn.hook_z")
    torch.testing.assert_close(
        result.mean(quantity="raw"), VISION * 0.75 * 3.0
    )  # picture differs by 3 in both examples
    torch.testing.assert_close(result.source - result.base, torch.full((2,), 22.5, dtype=torch.float64))
    assert result.top(2)[0] == ({"layer": 1, "head": 2}, pytest.approx(0.5))


def test_whole_layers_and_sites_outside_blocks():
    whole = activation_patch(model(), CLEAN, CORRUPT, METRIC, sites="vision.blocks.*.attn.hook_z", axes=("layer",))
    torch.testing.assert_close(whole.mean(), VISION.sum(1) / VISION.sum())
    bridge = activation_patch(model(), CLEAN, CORRUPT, METRIC, sites="projector.hook_out", axes=("site",))
    assert bridge.mean().tolist() == [1.0]
    assert bridge.axes == {"site": ["projector.hook_out"], "example": [0, 1]}
    positions = activation_patch(model(), CLEAN, CORRUPT, METRIC, sites="projector.hook_out", axes=("site", "position"))
    assert positions.mean().tolist() == [[1.0]]


def test_several_towers_share_one_result_with_holes():
    both = activation_patch(model(), CLEAN, CORRUPT, METRIC, sites="*.blocks.*.attn.hook_z")
    assert both.axes == {"tower": ["vision", "language"], "layer": [0, 1], "head": [0, 1, 2], "example": [0, 1]}
    torch.testing.assert_close(both.mean()[0], VISION / VISION.sum())
    assert both.mean()[1].isnan().tolist() == [[False, False, True], [True, True, True]]


def test_a_run_patched_into_itself_changes_nothing_and_is_degenerate():
    with pytest.warns(UserWarning, match="2 of 2 examples"):
        result = activation_patch(model(), CLEAN, CLEAN, METRIC, sites="vision.blocks.*.attn.hook_z")
    assert result.values.isnan().all()
    assert (result.raw == 0).all()


def test_degenerate_examples_are_left_out_of_the_mean():
    half = {"picture": torch.tensor([2.0, 1.0], dtype=torch.float64)}
    with pytest.warns(UserWarning, match="1 of 2"):
        result = activation_patch(model(), half, CORRUPT, METRIC, sites="vision.blocks.*.attn.hook_z")
    torch.testing.assert_close(result.mean(), VISION / VISION.sum())
    assert result.values[..., 1].isnan().all()


def test_one_run_per_cell_and_no_more():
    toy = model()
    activation_patch(toy, CLEAN, CORRUPT, METRIC, sites="vision.blocks.*.attn.hook_z")
    assert toy.runs == 6 + 2


def test_dead_sites_cost_no_run_and_have_no_effect():
    toy = model()
    toy.dead = {"vision.blocks.1.attn.hook_z"}
    result = activation_patch(toy, CLEAN, CORRUPT, METRIC, sites="vision.blocks.*.attn.hook_z")
    assert toy.runs == 3 + 2
    assert result.dead == ["vision.blocks.1.attn.hook_z"]
    assert (result.values[1] == 0).all()


def test_results_survive_a_file(tmp_path):
    result = activation_patch(model(), CLEAN, CORRUPT, METRIC, sites="vision.blocks.*.attn.hook_z")
    again = PatchingResult.load(result.save(tmp_path / "p.npz"))
    assert torch.equal(again.values, result.values)
    assert (again.mode, again.site) == ("denoise", "attn.hook_z")
    assert again.provenance["dataset_sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode"),
        ({"axes": ("head",)}, "axes"),
        ({"axes": ("layer", "layer")}, "axes"),
        ({"axes": ("layer", "neuron")}, "axes"),
        ({"sites": "projector.hook_out"}, "'site'"),
        ({"sites": "projector.hook_out", "axes": ("site", "head")}, "no heads"),
        ({"sites": []}, "No site"),
        ({"corrupt": {"picture": torch.zeros(3)}}, "one size"),
        ({"corrupt": {"image": torch.zeros(2)}}, "Only one"),
    ],
)
def test_meaningless_requests_are_refused_before_anything_runs(options, message):
    toy = model()
    arguments = {"clean": CLEAN, "corrupt": CORRUPT, "sites": "vision.blocks.*.attn.hook_z", **options}
    with pytest.raises(InputError, match=message):
        activation_patch(toy, metric=METRIC, **arguments)
    assert toy.runs == 0


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next-mistral", "paligemma2"])
@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_on_real_models_the_last_residual_is_everything_at_the_last_position(name, mode):
    model, clean, corrupt = hooked_pair(name)
    site = f"language.blocks.{model.language.cfg.n_layers - 1}.hook_resid_post"
    result = activation_patch(
        model, clean, corrupt, logit_diff(7, 9), sites=site, axes=("layer", "position"), mode=mode
    )
    expected = torch.zeros(result.values.shape)
    expected[0, -1] = 1.0
    torch.testing.assert_close(result.values, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma"])
def test_on_real_models_the_projector_is_everything_and_a_head_is_what_a_hook_by_hand_writes(name):
    model, clean, corrupt = hooked_pair(name)
    whole = activation_patch(model, clean, corrupt, logit_diff(7, 9), sites="projector.hook_out", axes=("site",))
    assert whole.values.item() == pytest.approx(1.0, abs=1e-3)
    heads = activation_patch(model, clean, corrupt, logit_diff(7, 9), sites="vision.blocks.0.attn.hook_z")
    _, cache = model.run_with_cache(clean, names_filter="vision.blocks.0.attn.hook_z")

    def by_hand(tensor, hook):
        edited = tensor.clone()
        edited[:, :, 1] = cache[hook.name][:, :, 1]
        return edited

    logits = model.run_with_hooks(corrupt, fwd_hooks=[("vision.blocks.0.attn.hook_z", by_hand)])
    expected = logit_diff(7, 9)(logits, corrupt) - logit_diff(7, 9)(model(corrupt), corrupt)
    torch.testing.assert_close(heads.raw[0, 1], expected)


def hooked_pair(name):
    entry = case(name)
    model = cv.HookedModel(shared_model(name), entry.processor() if entry.processor else None)
    clean = entry.inputs(model.module, batch=1)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(clean["pixel_values"].shape, generator=generator)
    return model, clean, {**clean, "pixel_values": pixels}
