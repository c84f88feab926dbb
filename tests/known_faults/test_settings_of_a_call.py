"""Settings given with a call (``vision_feature_layer``, ``vision_feature_select_strategy``, ``logits_to_keep``, …) against plain PyTorch.

Truth comes from torch hooks on the raw module's own blocks, in float64, never from the library.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model import settings
from circuitvision.patching.activation import activation_patch
from tests.zoo import case, shared_model


def built(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model of the zoo in float64, and inputs."""
    entry = case(name)
    module = copy.deepcopy(shared_model(name)).double().eval()
    return module, entry.inputs(module, batch=2, dtype=torch.float64, **options)


def with_class_tokens(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompts with one more image token, as a processor makes them for "full"."""
    ids, mask, image = inputs["input_ids"], inputs["attention_mask"], module.config.image_token_id
    rows, masks = [], []
    for row, kept in zip(ids, mask, strict=True):
        at = int((row == image).nonzero()[0])
        rows.append(torch.cat([row[:at], row[at : at + 1], row[at:]]))
        masks.append(torch.cat([kept[:at], kept[at : at + 1], kept[at:]]))
    return {
        **inputs,
        "input_ids": torch.stack(rows),
        "attention_mask": torch.stack(masks),
        "vision_feature_select_strategy": "full",
    }


def vision_blocks(module: Any) -> Any:
    tower = module.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def by_hand(module: Any, inputs: dict[str, Any], part: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits with the output of one module changed."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    # prepend: transformers records hidden states with hooks of its own.
    handle = part.register_forward_hook(hook, prepend=True)
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        handle.remove()


def effects_by_hand(module: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        clean = module(**inputs).logits[:, -1, 7]
    mlps = [block.mlp for block in vision_blocks(module)]
    return torch.stack([by_hand(module, inputs, mlp, torch.zeros_like)[:, -1, 7] - clean for mlp in mlps])


# Patterns would make the run eager, whose softmax is in float32.
STREAM = ["vision.blocks.*.hook_resid_*", "projector.hook_out"]
CALLS = [{"vision_feature_layer": layer} for layer in (-1, 3, -2, 1)]


def check_sweep(call: dict[str, Any]) -> None:
    module, inputs = built("llava-clip-llama")
    inputs |= call
    truth = effects_by_hand(module, inputs)
    model = cv.HookedModel(module)
    found = model.sweep(
        inputs,
        [edits.ablate(f"vision.blocks.{layer}.hook_mlp_out") for layer in range(3)],
        lambda logits: logits[:, -1, 7],
        progress=False,
    )
    torch.testing.assert_close(found.effect, truth, rtol=0, atol=1e-10)
    dead = [model.is_dead(f"vision.blocks.{layer}.hook_mlp_out", inputs) for layer in range(3)]
    assert dead == (truth.abs().amax(1) == 0).tolist()


@pytest.mark.filterwarnings("ignore:.*cannot reach the output")
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_sweeps_and_dead_sites_follow_the_feature_layer_of_the_call(call: dict[str, Any]) -> None:
    check_sweep(call)


@pytest.mark.filterwarnings("ignore:.*cannot reach the output")
def test_reading_the_configuration_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def config_only(model: Any, inputs: Any, name: str) -> Any:
        return getattr(model.config, name, None)

    monkeypatch.setattr("circuitvision.model.tower.setting", config_only)
    with pytest.raises(AssertionError):
        check_sweep({"vision_feature_layer": -1})
    assert settings.setting is not config_only


@pytest.mark.parametrize("layers", [[-1, -1], [0, 2], [3, 1]], ids=str)
def test_lists_of_feature_layers(layers: list[int]) -> None:
    module, inputs = built("llava-clip-llama-layers")
    inputs["vision_feature_layer"] = layers
    truth = effects_by_hand(module, inputs)
    model = cv.HookedModel(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = [edits.ablate(f"vision.blocks.{layer}.hook_mlp_out") for layer in range(3)]
        found = model.sweep(inputs, groups, lambda logits: logits[:, -1, 7], progress=False)
    torch.testing.assert_close(found.effect, truth, rtol=0, atol=1e-10)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        last = max(layer % 4 for layer in layers)
        resid = cache["vision.blocks.2.hook_resid_post" if last == 3 else f"vision.blocks.{last}.hook_resid_pre"]
        said = model.vision.readout(resid, context=cache)
        torch.testing.assert_close(said.reshape(cache["projector.hook_out"].shape), cache["projector.hook_out"])


def check_full() -> None:
    module, inputs = built("llava-clip-llama")
    inputs = with_class_tokens(module, inputs)
    model = cv.HookedModel(module)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, STREAM)
        torch.testing.assert_close(logits, module(**inputs).logits, rtol=0, atol=0)
    tokens = model.tokens(inputs)["language"]
    first = int((inputs["input_ids"][0] == module.config.image_token_id).nonzero()[0])
    assert [str(kind) for kind in tokens.kind[0, first : first + 3]] == ["cls", "patch", "patch"]
    assert (tokens.patch_row[0, first + 1], tokens.patch_col[0, first + 1]) == (0, 0)
    # What is written at the class token of the feature layer reaches the output, and is not called dead.
    layer = vision_blocks(module)[1]
    moved = by_hand(module, inputs, layer, lambda out: torch.cat([out[:, :1] + 1, out[:, 1:]], 1)) - logits
    assert float(moved.abs().amax()) > 1e-3
    dead = model.dead_positions("vision.blocks.1.hook_resid_post", inputs)
    assert dead is None or not bool(dead[:, 0].any())
    resid = cache["vision.blocks.1.hook_resid_post"]
    with torch.no_grad():
        said = model.vision.readout(resid, context=cache)
    torch.testing.assert_close(said.reshape(cache["projector.hook_out"].shape), cache["projector.hook_out"])


def test_prompts_with_the_class_token_run() -> None:
    check_full()


def test_a_class_token_dropped_by_the_configuration_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitvision.model.tower import Tower

    monkeypatch.setattr(Tower, "n_dropped_in", lambda self, inputs=None: 1)
    with pytest.raises((AssertionError, InputError)):
        check_full()


def test_default_given_where_the_configuration_says_full() -> None:
    module, inputs = built("llava-clip-llama-full")
    ids, image = inputs["input_ids"], module.config.image_token_id
    at = int((ids[0] == image).nonzero()[0])
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([inputs[name][:, :at], inputs[name][:, at + 1 :]], 1)
    inputs["vision_feature_select_strategy"] = "default"
    model = cv.HookedModel(module)
    assert str(model.tokens(inputs)["language"].kind[0, at]) == "patch"
    dead = model.dead_positions("vision.blocks.1.hook_resid_post", inputs)
    assert dead is not None
    assert bool(dead[:, 0].all())


def test_keywords_of_the_call_are_part_of_its_inputs() -> None:
    module, inputs = built("llava-clip-llama")
    model = cv.HookedModel(module)
    with torch.no_grad():
        truth = module(**inputs, vision_feature_layer=-1).logits
        logits, cache = model.run_with_cache(inputs, STREAM, vision_feature_layer=-1)
        torch.testing.assert_close(logits, truth, rtol=0, atol=0)
        said = model.vision.readout(cache["vision.blocks.2.hook_resid_post"], context=cache)
        torch.testing.assert_close(said.reshape(cache["projector.hook_out"].shape), cache["projector.hook_out"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            found = model.run(inputs, edits.ablate("vision.blocks.2.hook_mlp_out"), vision_feature_layer=-1)
            hooked = model.run_with_hooks(
                inputs, [("vision.blocks.2.hook_mlp_out", lambda value, hook: value * 0)], vision_feature_layer=-1
            )
    by = by_hand(module, {**inputs, "vision_feature_layer": -1}, vision_blocks(module)[2].mlp, torch.zeros_like)
    torch.testing.assert_close(found, by, rtol=0, atol=1e-10)
    torch.testing.assert_close(hooked, by, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="give it once"):
        model({**inputs, "vision_feature_layer": -2}, vision_feature_layer=-1)


def test_lens_attention_and_streams_reach_as_far_as_the_call_says() -> None:
    module, inputs = built("llava-clip-llama")
    model = cv.HookedModel(module)
    for layer, expected in ((-1, 2), (-2, 1), (1, 0)):
        given = {**inputs, "vision_feature_layer": layer}
        with torch.no_grad():
            _, cache = model.run_with_cache(given)
        lens = cv.readout.logit_lens(model, cache, "vision", targets=[5])
        assert lens.axes["layer"] == ["input", *range(expected + 1)]
        assert cv.readout.attention_mass(model, cache, tower="vision").axes["layer"] == list(range(expected + 1))
        assert model.sites("vision.blocks.*.hook_resid_post")[expected] == model.vision.stream_sites(given)[-1]
        # A direction of the stream is read at the feature layer, and its terms add up to what is there.
        direction = torch.linspace(-1, 1, model.vision.cfg.d_model, dtype=torch.float64)
        shares = cv.readout.direct_attribution(model, cache, direction, "vision", position=3)
        post = cache[f"vision.blocks.{expected}.hook_resid_post"][:, 3] @ direction
        torch.testing.assert_close(shares.total, post)
        torch.testing.assert_close(shares.values.sum(0), post)


def test_patching_follows_the_feature_layer_of_the_call() -> None:
    module, inputs = built("llava-clip-llama")
    clean = {**inputs, "vision_feature_layer": -1}
    corrupt = {**clean, "pixel_values": clean["pixel_values"].flip(0) * 0.5}
    model = cv.HookedModel(module)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 7]

    found = activation_patch(
        model, metric=metric, clean=clean, corrupt=corrupt, sites="vision.blocks.*.hook_mlp_out", axes=("layer",)
    )
    assert found.dead == []
    kept: list[Tensor] = []
    handle = vision_blocks(module)[2].mlp.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        module(**clean)
        handle.remove()
        base = metric(module(**corrupt).logits)
    patched = metric(by_hand(module, corrupt, vision_blocks(module)[2].mlp, lambda out: kept[0])) - base
    torch.testing.assert_close(found.values[2].mean(), patched.mean(), rtol=0, atol=1e-10)
    assert float(patched.abs().amax()) > 1e-6


@pytest.mark.parametrize("name", ["llava-next-llama", "llava-onevision"])
def test_tiled_families(name: str) -> None:
    module, inputs = built(name)
    built_for = module.config.vision_feature_layer
    inputs["vision_feature_layer"] = -1 if built_for != -1 else -2
    truth = effects_by_hand(module, inputs)
    model = cv.HookedModel(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = [edits.ablate(f"vision.blocks.{layer}.hook_mlp_out") for layer in range(len(truth))]
        found = model.sweep(inputs, groups, lambda logits: logits[:, -1, 7], progress=False)
    torch.testing.assert_close(found.effect, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 9, 12])], ids=str)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_of_metrics_are_the_prompts(kept: Any, padding: str) -> None:
    module, inputs = built("llava-clip-llama", padding=padding)
    with torch.no_grad():
        whole = module(**inputs).logits
    model, given = cv.HookedModel(module), {**inputs, "logits_to_keep": kept}
    with torch.no_grad():
        logits = model(given)
    length = inputs["input_ids"].shape[1]
    left = kept.tolist() if isinstance(kept, Tensor) else list(range(length - kept, length))
    for position in left:
        for named in (position, position - length):
            found = cv.metrics.prob(5, position=named)(logits, given)
            torch.testing.assert_close(found, whole[:, position].softmax(-1)[:, 5])
    last = [int(row.nonzero()[-1]) for row in inputs["attention_mask"]]
    if all(position in left for position in last):
        found = cv.metrics.prob(5)(logits, given)
        torch.testing.assert_close(found, whole[torch.arange(2), torch.tensor(last)].softmax(-1)[:, 5])
    else:
        with pytest.raises(InputError, match="logits_to_keep"):
            cv.metrics.prob(5)(logits, given)
    with pytest.raises(InputError, match="logits_to_keep"):
        cv.metrics.prob(5, position=0)(logits, given)


def test_generation_takes_the_feature_layer_of_the_call() -> None:
    module, inputs = built("llava-clip-llama")
    module.generation_config.eos_token_id = None
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [module.config.image_token_id],
    }
    handle = vision_blocks(module)[2].mlp.register_forward_hook(lambda _, __, out: out * 0, prepend=True)
    truth = module.generate(**inputs, vision_feature_layer=-1, **options)
    handle.remove()
    model = cv.HookedModel(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot reach the output")
        edit = edits.ablate("vision.blocks.2.hook_mlp_out")
        with model.record("vision.blocks.2.hook_resid_post") as cache:
            found: Any = model.generate(inputs, edits=[edit], vision_feature_layer=-1, **options)
    for one, two in zip(found.logits, truth.logits, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    assert cache.inputs["vision_feature_layer"] == -1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"vision_feature_layer": 7}, "names no hidden states"),
        ({"vision_feature_layer": [0, 1]}, "the projector was built for 1"),
        ({"vision_feature_layer": "last"}, "names no hidden states"),
        ({"vision_feature_select_strategy": "cls"}, "not understood"),
    ],
    ids=str,
)
def test_settings_that_do_not_exist_get_one_error(call: dict[str, Any], said: str) -> None:
    module, inputs = built("llava-clip-llama")
    model = cv.HookedModel(module)
    with pytest.raises(InputError, match=said):
        model({**inputs, **call})
    with pytest.raises(InputError, match=said):
        model(inputs, **call)


def test_a_warning_without_inputs_says_what_may_make_the_site_matter() -> None:
    module, inputs = built("llava-clip-llama")
    model = cv.HookedModel(module)
    with (
        pytest.warns(UserWarning, match="unless the call sets vision_feature_layer"),
        model.hooks([("vision.blocks.2.hook_mlp_out", lambda value, hook: value * 0)]),
        torch.no_grad(),
    ):
        logits = model({**inputs, "vision_feature_layer": -1})
    by = by_hand(module, {**inputs, "vision_feature_layer": -1}, vision_blocks(module)[2].mlp, torch.zeros_like)
    torch.testing.assert_close(logits, by, rtol=0, atol=1e-10)


def test_larger_pictures_by_keyword() -> None:
    module, inputs = built("vit", image_size=(24, 24))
    assert inputs.pop("interpolate_pos_encoding")
    model = cv.HookedModel(module)
    with torch.no_grad():
        truth = module(**inputs, interpolate_pos_encoding=True).logits
        logits, cache = model.run_with_cache(inputs, "vision.blocks.*.hook_resid_*", interpolate_pos_encoding=True)
    torch.testing.assert_close(logits, truth, rtol=0, atol=0)
    assert cache.inputs["interpolate_pos_encoding"] is True
