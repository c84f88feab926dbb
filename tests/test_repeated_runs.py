"""What is kept between runs (plans, made hooks, checked inputs) must never show: a second run is as careful as the first."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import HookError, InputError
from tests.zoo import CASES, shared_model


def wrapped(name: str) -> tuple[cv.HookedModel, dict]:
    model = cv.HookedModel(copy.deepcopy(shared_model(name)))
    return model, CASES[name].inputs(model.module, batch=2, seed=0)


LLAVA = next(name for name, case in CASES.items() if case.family == "llava")
VIT = next(name for name, case in CASES.items() if case.family == "vit")


def test_inputs_written_after_a_run_are_checked_again() -> None:
    model, inputs = wrapped(LLAVA)
    with torch.no_grad():
        model(inputs)
        image = int((inputs["input_ids"][0] == model.image_token_id).nonzero()[0, 0])
        inputs["input_ids"][0, image] = 1
        with pytest.raises(InputError, match="image tokens"):
            model(inputs)
        inputs["input_ids"][0, image] = model.image_token_id
        model(inputs)
        with pytest.raises(InputError, match="attention_mask"):
            model({**inputs, "attention_mask": inputs["attention_mask"][:, :-1]})


def test_a_second_cache_holds_the_second_run() -> None:
    model, inputs = wrapped(LLAVA)
    glob = "*.blocks.*.hook_resid_post"
    changed = {**inputs, "pixel_values": inputs["pixel_values"] + 0.5}
    with torch.no_grad():
        _, first = model.run_with_cache(inputs, glob)
        before = {name: value.clone() for name, value in first.items()}
        _, second = model.run_with_cache(changed, glob)
        _, alone = cv.HookedModel(copy.deepcopy(model.module)).run_with_cache(changed, glob)
    for name in before:
        assert torch.equal(first[name], before[name])
        assert torch.equal(second[name], alone[name])
    assert not torch.equal(second["vision.blocks.0.hook_resid_post"], before["vision.blocks.0.hook_resid_post"])


def test_recorded_values_go_with_their_cache() -> None:
    model, inputs = wrapped(VIT)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, "vision.blocks.0.attn.hook_z")
    held = weakref.ref(cache["vision.blocks.0.attn.hook_z"])
    assert held() is not None
    del cache
    gc.collect()
    assert held() is None


def test_a_copy_made_after_a_cached_run_hooks_itself() -> None:
    model, inputs = wrapped(VIT)
    glob = "vision.blocks.*.hook_resid_post"
    with torch.no_grad():
        _, original = model.run_with_cache(inputs, glob)
        twin = copy.deepcopy(model)
        for weight in twin.parameters():
            weight.mul_(1.5)
        _, cache = twin.run_with_cache(inputs, glob)
        _, expected = cv.HookedModel(copy.deepcopy(twin.module)).run_with_cache(inputs, glob)
    for name in original:
        assert torch.equal(cache[name], expected[name])
        assert not torch.equal(cache[name], original[name])


def test_patterns_read_without_an_intercepted_softmax_are_those_an_identity_hook_sees() -> None:
    model, inputs = wrapped(LLAVA)
    seen = {}

    def keep(pattern: torch.Tensor, hook: cv.HookPoint) -> None:
        seen[hook.name] = pattern

    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, "**.hook_pattern")
        hooked = model.run_with_hooks(inputs, fwd_hooks=[("*.blocks.*.attn.hook_pattern", keep)])
    assert torch.equal(logits, hooked)
    assert seen.keys() == {name for name in cache if ".blocks." in name}
    for name, pattern in seen.items():
        assert torch.equal(pattern, cache[name])


def test_patterns_read_in_training_come_before_dropout() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, attention_probs_dropout_prob=0.5)
    model = cv.HookedModel(ViTModel(config)).train()
    with torch.no_grad():
        _, cache = model.run_with_cache({"pixel_values": torch.randn(2, 3, 8, 8)}, "vision.blocks.0.attn.hook_pattern")
    torch.testing.assert_close(cache["vision.blocks.0.attn.hook_pattern"].sum(-1), torch.ones(2, 2, 5))


def test_a_list_of_sites_is_not_the_models_own() -> None:
    model, _ = wrapped(VIT)
    model.sites().clear()
    assert model.sites()


def test_a_hook_between_two_cached_runs_leaves_no_trace() -> None:
    model, inputs = wrapped(VIT)
    site = "vision.blocks.1.hook_resid_post"

    def fail(value: torch.Tensor, hook: cv.HookPoint) -> torch.Tensor:
        return value[:, 1:]

    with torch.no_grad():
        _, before = model.run_with_cache(inputs, site)
        with pytest.raises(HookError):
            model.run_with_hooks(inputs, fwd_hooks=[(site, fail)])
        _, after = model.run_with_cache(inputs, site)
    assert torch.equal(before[site], after[site])
    assert not model.engine.handles


def test_torch_tables_are_as_before_a_run() -> None:
    model, inputs = wrapped(VIT)

    def tables() -> list[int]:
        names = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
        return [len(getattr(part, name)) for part in model.module.modules() for name in names]

    before = tables()
    with torch.no_grad():
        for _ in range(2):
            model.run_with_cache(inputs, "**")
            model.run_with_hooks(inputs, fwd_hooks=[("**.hook_resid_*", lambda value, hook: value * 2)])
    assert tables() == before
