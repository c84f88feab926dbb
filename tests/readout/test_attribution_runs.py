"""Attribution of runs out of the ordinary: decoding and denoising steps, padding, half precision, inference mode, incomplete caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.attribution.bilinear import bilinear_attribution
from circuitvision.readout.attribution.direct import direct_attribution, source_attribution
from circuitvision.readout.attribution.increase import log_prob_increase
from circuitvision.readout.recorded import chosen_layers
from tests.readout.common import run
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-clip-mistral-sliding"])
def test_a_decoding_step_is_split_over_the_prompt_and_what_was_generated(name):
    """Only positions that are read are computed with, and the pattern reaches back into the key-value cache."""
    model, _, cache = run(name)
    with model.record(["language.**"]) as passes:
        model.generate(cache.inputs, max_new_tokens=4, do_sample=False)
    prompt = cache.inputs["input_ids"].shape[1]
    for step in range(4):
        heads = direct_attribution(model, passes, (7, 11), step=step)
        sources = source_attribution(model, passes, (7, 11), step=step)
        assert sources.axes["position"] == list(range(prompt + step))
        assert sources.places.shape[1] == len(sources.words[0]) == prompt + step
        assert sources.words[0][prompt:] == [f"generated {n}" for n in range(1, step + 1)]
        torch.testing.assert_close(by_row(heads).sum(0), heads.total, atol=1e-5, rtol=1e-5)
        for layer in range(model.language.cfg.n_layers):
            for head in range(model.language.cfg.n_heads):
                share = by_row(sources)[layer, head].sum(-1)
                torch.testing.assert_close(share, heads[f"L{layer}H{head}"], atol=1e-5, rtol=1e-4)
        scores = log_prob_increase(model, passes, 7, by="source", step=step)
        assert scores.places.shape[1] == by_row(scores).shape[-1] == prompt + step
    alone = cv.ActivationCache({site: passes[site][2:] for site in passes}, model, passes.inputs)
    with pytest.raises(InputError, match="passes before this one"):
        source_attribution(model, alone, (7, 11), step=0)


def test_every_denoising_step_is_split():
    model, _, cache = run("pi0", torch.float64)
    velocities = []
    handle = model.module.action_out_proj.register_forward_hook(
        lambda module, args, out: velocities.append(out.detach())
    )
    with model.record("**") as passes:
        model.sample_actions(cache.inputs, num_steps=3)
    handle.remove()
    # Position 0 is the state: action 2 is position 3.
    for step, velocity in enumerate(velocities):
        found = direct_attribution(model, passes, 1, step=step, position=3, by="neuron")
        torch.testing.assert_close(found.total, velocity[:, 2, 1], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(by_row(found).sum(0), found.total, atol=1e-11, rtol=1e-9)
        sources = source_attribution(model, passes, 1, step=step, position=3)
        torch.testing.assert_close(by_row(sources)[1, 2].sum(-1), found["L1H2"], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma2"])
def test_rows_of_different_lengths_are_read_each_at_its_own_last_word(name, padding):
    entry = case(name)
    model = cv.HookedModel(shared_model(name), entry.processor())
    inputs = entry.inputs(model.module, batch=2, padding=padding)
    if padding == "right":
        last = inputs["attention_mask"].sum(-1) - 1
        assert last[0] != last[1]
    together = direct_attribution(model, inputs, (7, 11), by="neuron")
    torch.testing.assert_close(by_row(together).sum(0), together.total, atol=2e-5, rtol=1e-5)
    sources = source_attribution(model, inputs, (7, 11))
    for head in range(model.language.cfg.n_heads):
        torch.testing.assert_close(by_row(sources)[1, head].sum(-1), together[f"L1H{head}"], atol=2e-5, rtol=1e-4)
    hidden = inputs["attention_mask"] == 0
    assert float(by_row(sources)[:, :, hidden].abs().max()) == 0.0


@pytest.mark.parametrize("name", ["vit", "dinov2-swiglu", "siglip", "llava-clip-llama"])
def test_half_precision_has_the_same_terms_and_adds_up_as_far_as_its_stream_does(name):
    model, _, cache = run(name, torch.bfloat16)
    found = direct_attribution(model, cache, (0, 1))
    wide = direct_attribution(*[run(name)[index] for index in (0, 2)], (0, 1))
    assert found.axes["term"] == wide.axes["term"]
    assert by_row(found).dtype == torch.float32
    scale = float(by_row(wide).abs().max())
    assert float((by_row(found).sum(0) - found.total).abs().max()) < 0.02 * scale
    assert float((by_row(found) - by_row(wide)).abs().max()) < 0.1 * scale


def test_inputs_in_place_of_a_cache_give_the_same():
    for name in ("dinov2", "pi0", "clip", "paligemma2"):
        model, _, cache = run(name, everything=True)
        tower = list(model.towers)[-1]
        found = direct_attribution(model, cache.inputs, (0, 1), tower, by="neuron")
        torch.testing.assert_close(by_row(found), by_row(direct_attribution(model, cache, (0, 1), tower, by="neuron")))
        source_attribution(model, cache.inputs, (0, 1), tower)


def test_caches_and_models_that_do_not_belong_together_are_refused():
    model, _, cache = run("vit")
    _, _, other = run("vit-wide")
    for call in (direct_attribution, source_attribution, log_prob_increase):
        with pytest.raises(InputError, match="another model"):
            call(model, other, 1)
        with pytest.raises(InputError, match="wrapped model"):
            call(model.module, cache, 1)
    clip, _, _ = run("clip")
    with pytest.raises(InputError, match="another model"):
        bilinear_attribution(clip, other)


def test_what_is_not_finite_is_said():
    model, _, cache = run("vit")
    values = dict(cache.items())
    values["vision.blocks.2.hook_resid_post"] = cache["vision.blocks.2.hook_resid_post"].clone()
    values["vision.blocks.2.hook_resid_post"][1] = torch.nan
    with pytest.warns(UserWarning, match="not finite in 1 of 2 rows"):
        found = direct_attribution(model, cv.ActivationCache(values, model, cache.inputs), (0, 1))
    assert found.total.isnan().tolist() == [False, True]


def test_a_cache_without_what_is_needed_says_so():
    model, _, cache = run("vit")
    _, small = model.run_with_cache(cache.inputs, names_filter="vision.blocks.*.hook_resid_post")
    with pytest.raises(InputError, match=r"hook_input|hook_z"):
        direct_attribution(model, small, (0, 1))
    keep = [name for name in cache if "pattern" not in name]
    without = cv.ActivationCache({name: cache[name] for name in keep}, model, cache.inputs)
    with pytest.raises(InputError, match="hook_pattern"):
        source_attribution(model, without, (0, 1))


def test_works_on_caches_of_inference_mode_and_leaves_no_gradient():
    model, _, cache = run("dinov2")
    with torch.inference_mode():
        _, made = model.run_with_cache(cache.inputs)
        inside = direct_attribution(model, made, (0, 1))
    torch.testing.assert_close(by_row(inside), by_row(direct_attribution(model, cache, (0, 1))))
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("layers", [-1, np.int64(2), [2], torch.tensor([2]), range(2, 3)])
def test_layers_are_numbers_of_any_whole_type(layers):
    assert chosen_layers(layers, 3) == [2]


@pytest.mark.parametrize("layers", [3, [], "all", [0, True], 1.0, [0.5], [-4]])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(InputError, match="does not name layers of 0 to 2"):
        chosen_layers(layers, 3)
