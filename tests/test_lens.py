"""The logit lens: it ends in the model's own output, starts where the projector ends, and keeps track of patches."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout import logit_lens
from circuitvision.readout.lens.result import LensResult
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model

VLMS = ["llava-clip-llama", "llava-siglip-qwen2", "llava-next-mistral", "paligemma", "paligemma2"]


def run(name: str):
    entry = case(name)
    model = cv.HookedModel(shared_model(name), entry.processor() if entry.processor else None)
    inputs = entry.inputs(model.module)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    return model, logits, cache


@pytest.mark.parametrize("name", VLMS)
def test_the_language_lens_at_the_last_layer_is_the_models_output(name):
    model, logits, cache = run(name)
    result = logit_lens(model, cache, tower="language", targets={7: 7, 9: 9})
    torch.testing.assert_close(by_row(result)[-1], logits[..., [7, 9]], atol=1e-5, rtol=1e-4)
    assert result.axes["layer"] == ["input", *range(model.language.cfg.n_layers)]


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-siglip-qwen2", "paligemma"])
def test_the_vision_lens_at_its_last_layer_is_the_language_lens_at_its_input(name):
    model, _, cache = run(name)
    vision = logit_lens(model, cache, tower="vision", targets=[7])
    language = logit_lens(model, cache, tower="language", targets=[7])
    for row, example in enumerate(vision.axes["example"]):
        image = int(vision.places[row, 0, 0])
        torch.testing.assert_close(
            vision.patch_grid(vision.axes["layer"][-1], example, image),
            language.patch_grid("input", example, image),
            atol=1e-4,
            rtol=1e-3,
        )
    live = [name for name in model.vision.stream_sites() if ".blocks." in name]
    assert len(vision.axes["layer"]) == len(live) + 1


def test_patches_are_placed_in_reading_order_and_text_is_not_placed():
    model, _, cache = run("llava-clip-llama")
    language = logit_lens(model, cache, targets=[7])
    tokens = model.tokens(cache.inputs)["language"]
    for row in range(by_row(language).shape[1]):
        for position, (_, _, r, c) in enumerate(language.places[row].tolist()):
            assert (r >= 0) == (tokens.kind[row, position] == "patch")
            if r >= 0:
                assert language.patch_grid(0, row)[r, c] == by_row(language)[1, row, position, 0]


def test_tiles_are_told_apart():
    model, _, cache = run("llava-next-mistral")
    vision = logit_lens(model, cache, tower="vision", targets=[7])
    assert by_row(vision).shape[1] > len(set(vision.axes["example"]))
    first, second = (vision.patch_grid(0, tile=int(vision.places[row, -1, 1])) for row in range(2))
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_measures_and_top_k_agree_with_each_other():
    model, _, cache = run("paligemma2")
    everything = {token: token for token in range(model.language.W_U.shape[1])}
    probabilities = by_row(logit_lens(model, cache, targets=everything, measure="prob"))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]), atol=1e-4, rtol=0)
    logs = by_row(logit_lens(model, cache, targets=[7], measure="logprob"))
    torch.testing.assert_close(logs.exp()[..., 0], probabilities[..., 7])
    best = logit_lens(model, cache, top_k=3, measure="prob")
    assert torch.equal(by_row(best, "ids")[..., 0], probabilities.argmax(-1))
    torch.testing.assert_close(by_row(best)[..., 0], probabilities.max(-1).values)


def test_pooled_read_outs_have_one_value_per_row_beside_those_of_the_positions():
    model, logits, cache = run("vit")
    result = logit_lens(model, cache, tower="vision", targets={0: 0, 1: 1})
    assert torch.equal(by_row(result, "pooled")[-1], logits[:, :2])
    torch.testing.assert_close(by_row(result)[-1, :, 0], logits[:, :2], atol=1e-5, rtol=1e-4)
    assert by_row(result).shape[2] == model.vision.cfg.n_prefix + 16


def test_contrast_and_files(tmp_path):
    model, _, cache = run("llava-clip-llama")
    result = logit_lens(model, cache, targets={"red": "red", "blue": "blue"})
    difference = result.contrast("red", "blue")
    torch.testing.assert_close(by_row(difference)[..., 0], by_row(result)[..., 0] - by_row(result)[..., 1])
    again = LensResult.load(difference.save(tmp_path / "lens.npz"))
    assert torch.equal(again.places, difference.places)
    assert again.axes["target"] == ["red - blue"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tower": "sight", "targets": [1]}, "no tower"),
        ({}, "either"),
        ({"targets": [1], "top_k": 1}, "either"),
        ({"targets": [1], "measure": "bits"}, "measure"),
        ({"targets": ["crimson"]}, "crimson"),
    ],
)
def test_meaningless_requests_are_refused(options, message):
    model, _, cache = run("llava-clip-llama")
    with pytest.raises(InputError, match=message):
        logit_lens(model, cache, **options)


def test_a_cache_without_the_stream_is_refused():
    model, _, cache = run("llava-clip-llama")
    _, other = model.run_with_cache(cache.inputs, names_filter="vision.blocks.0.attn.hook_z")
    with pytest.raises(InputError, match="stream_sites"):
        logit_lens(model, other, targets=[1])
