"""Edits, hooks and recordings under every implementation of the cache of keys and values: those of the one that grows, or a refusal by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import QuantizedCache, StaticCache
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model import attention
from tests.edits.common import apart, fresh, inputs_of, near, same, wrap
from tests.known_faults.raw_attention import scores_by_hand
from tests.parts import module_of

FULL, SLIDING, MIXED = "llava-clip-llama", "llava-clip-mistral-sliding", "llava-siglip-qwen2"
NEW = 6
ROTATED, PATTERN = "language.blocks.1.attn.hook_rot_k", "language.blocks.0.attn.hook_pattern"
SCORES = "language.blocks.1.attn.hook_attn_scores"
SAID: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def setting(name: str, padding: str = "left") -> tuple[cv.HookedModel, dict[str, Any], Any]:
    model = wrap(fresh(name))
    model.module.generation_config.eos_token_id = None
    if name == MIXED:
        # One full and one sliding layer.
        config = model.language.config
        config.sliding_window, config.layer_types = 5, ["full_attention", "sliding_attention"]
        model.language.root.has_sliding_layers = True  # type: ignore[assignment]
        for layer, block in enumerate(model.language.blocks):
            attn: Any = module_of(block, "attn")
            attn.sliding_window = 5 if layer else None
            block.module.attention_type = config.layer_types[layer]  # type: ignore[assignment]
    inputs = inputs_of(name, model, padding=padding)
    return model, inputs, model.tokens(inputs)["language"]


def generated(model: cv.HookedModel, inputs: dict[str, Any], chosen: list[edits.Edit], **more: Any) -> Tensor:
    """Logits ``[row, step, vocab]`` of every step."""
    out: Any = model.generate(inputs, edits=chosen, **SAID, **more)
    return torch.stack(out.logits, 1)


def groups_of(tokens: Any) -> dict[str, list[edits.Edit]]:
    n = tokens.n_positions
    block = edits.block_attention
    return {
        "nothing": [],
        "rotated keys": [edits.scale(ROTATED, -1.5)],
        "rotated keys later": [edits.scale(ROTATED, -1.5, steps="decode")],
        "rotated keys at": [edits.scale(ROTATED, -1.5, positions=[n - 2, n + 1])],
        "rotated queries": [edits.scale("language.blocks.0.attn.hook_rot_q", 2.0, positions=slice(n - 1, n + 3))],
        "keys by kind": [block("language", None, tokens.select("patch"), renormalise=False)],
        "queries by kind": [
            block("language", tokens.select("text"), tokens.select("patch"), layers=0, renormalise=False)
        ],
        "keys by number": [block("language", None, [n - 2, n, n + 1], renormalise=False)],
        "last key": [edits.add_attention_bias("language", None, "last", 2.0)],
        "new keys": [edits.scale_attention("language", None, slice(n, None), 0.2)],
        "scores": [edits.scale(SCORES.replace("attn_scores", "z"), 1.7, positions=[n - 1, n + 2])],
        "projected keys": [edits.scale("language.blocks.0.attn.hook_k", 1.7, positions=slice(n - 3, n + 2))],
    }


def runs(model: cv.HookedModel, inputs: dict[str, Any], implementation: str) -> Exception | None:
    """What the bare model raises with this cache, if it cannot use it."""
    try:
        model.module.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation=implementation)
    except Exception as error:
        return error
    return None


def growing_runs(name: str, padding: str) -> dict[str, Tensor]:
    """Logits of every group with the cache that grows."""
    model, inputs, tokens = setting(name, padding)
    found = {label: generated(model, inputs, group) for label, group in groups_of(tokens).items()}
    for label, logits in found.items():
        if label != "nothing":
            apart(logits, found["nothing"])
    return found


kept_runs = functools.cache(growing_runs)


def check_cache(name: str, padding: str, implementation: str, growing: dict[str, Tensor]) -> None:
    model, inputs, tokens = setting(name, padding)
    broken = runs(model, inputs, implementation)
    separate = "offloaded" in implementation or implementation == "quantized"
    for label, group in groups_of(tokens).items():
        if separate and any("rot_k" in edit.site for edit in group):
            with pytest.raises(InputError, match=f"cannot be edited with the cache '{implementation}'"):
                generated(model, inputs, group, cache_implementation=implementation)
            assert model.engine.handles == []
        elif broken is not None:
            with pytest.raises(type(broken)):
                generated(model, inputs, group, cache_implementation=implementation)
        else:
            # Empty slots behind the tokens make kernels add in another order.
            near(generated(model, inputs, group, cache_implementation=implementation), growing[label], 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ALL_CACHE_IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "padding"), [(FULL, "right"), (SLIDING, "left")])
def test_a_cache_changes_no_edit(name: str, padding: str, implementation: str) -> None:
    check_cache(name, padding, implementation, kept_runs(name, padding))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ALL_CACHE_IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "padding"), [(FULL, "left"), (SLIDING, "right"), (MIXED, "left"), (MIXED, "right")])
def test_a_cache_changes_no_edit_elsewhere(name: str, padding: str, implementation: str) -> None:
    check_cache(name, padding, implementation, kept_runs(name, padding))


@pytest.mark.parametrize("name", [FULL, SLIDING, MIXED])
def test_recordings_hold_no_empty_slots(name: str) -> None:
    model, inputs, _ = setting(name)
    sites = [ROTATED, PATTERN, SCORES]
    with model.record(sites) as growing:
        generated(model, inputs, [])
    with model.record(sites) as static:
        generated(model, inputs, [], cache_implementation="static")
    real = inputs["attention_mask"].bool()
    for site in sites:
        for step, (one, other) in enumerate(zip(static[site], growing[site], strict=True)):
            assert one.shape == other.shape
            # Padding queries share their row among all keys, empty slots included.
            kept = [
                value if step else value.transpose(1, 2)[real] if site != ROTATED else value[real]
                for value in (one, other)
            ]
            same(*kept)


def test_hooks_that_change_scores_change_what_they_see() -> None:
    model, inputs, tokens = setting(FULL)
    widths: list[int] = []

    def halve(value: Tensor, hook: Any) -> Tensor:
        widths.append(value.shape[-1])
        return value * 0.5

    found = []
    for more in ({}, {"cache_implementation": "static"}):
        with model.hooks([(SCORES, halve)]):
            found.append(generated(model, inputs, [], **more))
    same(*found)
    apart(found[0], generated(model, inputs, []))
    assert widths == 2 * [tokens.n_positions + step for step in range(NEW)]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        (FULL, {"cache_implementation": "static"}),
        (FULL, {}),
        (SLIDING, {}),
        (SLIDING, {"cache_implementation": "static"}),
    ],
)
@pytest.mark.parametrize("said", ["patch", "numbers"])
def test_keys_are_those_of_attention_by_hand(name: str, more: dict[str, Any], said: str) -> None:
    model, inputs, tokens = setting(name, "right")
    n = tokens.n_positions
    keys = torch.zeros(2, n + NEW, dtype=torch.bool)
    if said == "patch":
        keys[:, :n] = torch.from_numpy(tokens.kind == "patch")
    else:
        keys[:, [n - 3, n, n + 1]] = True
    passes: dict[int, int] = {}
    attention_class = type(module_of(model.language.blocks[0], "attn"))

    def fn(module: nn.Module, pattern: Tensor) -> Tensor:
        if module.__class__ is not attention_class:
            return pattern
        step = passes[id(module)] = passes.get(id(module), -1) + 1
        # A window's cache holds the newest keys; a cache of fixed size has empty ones behind them, which no query sees.
        count = pattern.shape[-1]
        held = min(count, 6 + pattern.shape[2] - 1) if name == SLIDING and step else min(count, n + step)
        where = torch.zeros(2, 1, 1, count, dtype=torch.bool)
        where[:, 0, 0, :held] = keys[:, n + step - held : n + step]
        return pattern.masked_fill(where, 0.0)

    with torch.no_grad(), scores_by_hand(model.module, attention_class, fn, of_pattern=True):
        out = model.module.generate(**inputs, **more, **SAID)
    said_keys = tokens.select("patch") if said == "patch" else [n - 3, n, n + 1]
    edit = edits.block_attention("language", None, said_keys, renormalise=False)
    near(generated(model, inputs, [edit], **more), torch.stack(out.logits, 1), 1e-5)
    assert set(passes.values()) == {NEW - 1}


@pytest.mark.cuda
@pytest.mark.parametrize("implementation", ["static", "offloaded", "offloaded_static"])
def test_a_cache_changes_no_edit_on_a_gpu(implementation: str) -> None:
    """Fixed caches compile the decoding steps there, unless hooks are in place."""
    model, inputs, tokens = setting(FULL)
    model.to("cuda")
    inputs = {key: value.to("cuda") for key, value in inputs.items()}
    for label, group in groups_of(tokens).items():
        if "offloaded" in implementation and "rotated keys" in label:
            continue
        growing = generated(model, inputs, group)
        near(generated(model, inputs, group, cache_implementation=implementation), growing, 1e-4)


def test_a_static_cache_of_ones_own() -> None:
    model, inputs, tokens = setting(SLIDING)
    for group in groups_of(tokens).values():
        cache = StaticCache(config=model.language.config, max_cache_len=tokens.n_positions + NEW + 3)
        same(generated(model, {**inputs, "past_key_values": cache}, group), generated(model, inputs, group))


def test_a_quantised_cache_of_ones_own() -> None:
    model, inputs, tokens = setting(FULL)

    def given() -> dict[str, Any]:
        return {**inputs, "past_key_values": QuantizedCache("fp8", model.language.config)}

    try:
        with torch.no_grad():
            bare = torch.stack(model.module.generate(**given(), **SAID).logits, 1)
    except Exception as error:
        with pytest.raises(type(error)):
            generated(model, given(), [])
        return
    same(generated(model, given(), []), bare)
    with pytest.raises(InputError, match="keeps other keys than attention gets"):
        generated(model, given(), [edits.scale(ROTATED, 2.0)])
    apart(generated(model, given(), groups_of(tokens)["keys by kind"]), bare)


def test_continuous_batching_is_refused_under_hooks() -> None:
    model, inputs, tokens = setting(FULL)
    with pytest.raises(InputError, match="paged"):
        generated(model, inputs, groups_of(tokens)["last key"], cache_implementation="paged")


def test_nothing_of_a_cache_is_kept_after_a_run() -> None:
    model, inputs, tokens = setting(FULL)
    generated(model, inputs, groups_of(tokens)["rotated keys"], cache_implementation="static")
    with model.record(PATTERN):
        generated(model, inputs, [])
    plans = model.engine._plans.values()
    slots = [stages.slots for plan in plans if plan.reading for stages in plan.reading.attention.values()]
    assert slots
    assert all(slot.layer is None for slot in slots)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", ["own keys at the end", "empty slots seen", "copies not kept"])
def test_a_mutant_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "copies not kept":
        monkeypatch.setattr(attention.Slots, "keep", lambda self, key: None)
        name = SLIDING
    else:
        monkeypatch.setattr(attention.Slots, "count", lambda self, keys: keys)
        name = FULL

    def check() -> None:
        if fault == "empty slots seen":
            test_recordings_hold_no_empty_slots(name)
        else:
            check_cache(name, "left", "static", growing_runs(name, "left"))

    with pytest.raises((AssertionError, InputError)):
        check()
