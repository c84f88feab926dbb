"""Knockout while a model says its answer: a greedy loop without cache, with masks by hand, is the oracle; so is forcing the text that was said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.metrics import action_dim, logit, logit_diff
from circuitvision.patching import Generated, generated, knockout, modulate
from circuitvision.steering import act
from tests.test_patching import hooked_pair
from tests.zoo import case

NEW = 4


def spoken(name: str, batch: int = 2) -> tuple[cv.HookedModel, dict[str, Any]]:
    """A model in float64 whose head is large enough for texts to change, and that never ends them."""
    model = cv.HookedModel(case(name).build().double())
    with torch.no_grad():
        model.towers["language"].output_head.module.weight.mul_(6)
    model.module.generation_config.eos_token_id = None
    return model, case(name).inputs(model.module, batch, 0, torch.float64)


def naive(
    model: cv.HookedModel, inputs: Mapping[str, Any], keys: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Greedy ids and logits of every new token without a cache; queries from ``first`` up to ``last`` do not see the keys, written into scores."""
    prompt = inputs["input_ids"].shape[1]

    def block(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        chosen = torch.arange(scores.shape[2])
        chosen = chosen[(chosen >= first) & (chosen < last)]
        scores[:, :, chosen[:, None], keys[None, :]] = torch.finfo(scores.dtype).min
        return scores

    hooks = [(f"language.blocks.{layer}.attn.hook_attn_scores", block) for layer in range(model.language.cfg.n_layers)]
    ids, said = inputs["input_ids"], []
    for _ in range(NEW):
        longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in inputs:
            longer["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, ids.shape[1] - prompt))
        with torch.no_grad():
            row = model.run_with_hooks(longer, fwd_hooks=hooks)[:, -1]
        said.append(row)
        ids = torch.cat([ids, row.argmax(-1, keepdim=True)], 1)
    return ids[:, prompt:], torch.stack(said, 1)


STEPS = {"prefill": (0, 1), "decode": (1, NEW), "all": (0, NEW)}


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-siglip-qwen2"])
@pytest.mark.parametrize("steps", list(STEPS))
def test_what_is_said_under_a_knockout_is_what_a_loop_without_cache_says(name: str, steps: str) -> None:
    model, inputs = spoken(name)
    prompt = inputs["input_ids"].shape[1]
    keys = torch.tensor(model.tokens(inputs)["language"].image(0).positions())
    # Queries behind the image: those of the prompt from its last position on, and those of new tokens.
    first, last = prompt - 1 + STEPS[steps][0], prompt - 1 + STEPS[steps][1]
    ids, logits = naive(model, inputs, keys, first, last)
    route = {"image to answer": (slice(prompt - 1, None), "patch")}
    found = knockout(
        model,
        inputs,
        {f"{place}: {token}": logit(token, position=place) for place in range(NEW) for token in (3, 5)},
        route,
        layers="all",
        steps=None if steps == "all" else steps,
        run=generated(NEW),
        progress=False,
    )
    expected = torch.stack([logits[:, place, token] for place in range(NEW) for token in (3, 5)])
    # transformers keeps the logits of a generation in float32.
    torch.testing.assert_close(found.values[:, 0, 0], expected.float(), rtol=1e-5, atol=1e-5)
    _, clean = naive(model, inputs, keys, 0, 0)
    torch.testing.assert_close(found.clean, torch.stack([clean[:, p, t] for p in range(NEW) for t in (3, 5)]).float())
    assert float((logits - clean).abs().amax((0, 2))[1:].min()) > 1e-3
    # Forcing the text that was said, in one pass, gives the same logits.
    text = torch.cat([inputs["input_ids"], ids], 1)
    forced = {**inputs, "input_ids": text, "attention_mask": torch.ones_like(text)}
    blocked = edits.block_attention("language", slice(first, last), keys.tolist())
    with torch.no_grad():
        whole = model.run(forced, [blocked])[:, prompt - 1 : prompt - 1 + NEW]
    torch.testing.assert_close(whole, logits, rtol=1e-8, atol=1e-8)


def test_steps_as_an_axis_say_when_the_image_is_read() -> None:
    model, inputs = spoken("llava-clip-llama")
    options: dict[str, Any] = {"layers": [0, 1], "run": generated(3), "progress": False}
    route = {"image": (None, "patch"), "text": ("text", "patch")}
    metric = logit_diff(3, 5, position=2)
    with pytest.raises(InputError, match="not computed in steps='decode'"):
        knockout(model, inputs, metric, route, steps="decode", **options)
    route["text"] = (slice(15, None), "patch")
    labels = {"prompt": "prefill", "answer": "decode", "second": 2, "all": "all"}
    found = knockout(model, inputs, metric, route, steps=labels, **options)
    assert found.axes["step"] == list(labels)
    for number, steps in enumerate(("prefill", "decode", 2, None)):
        alone = knockout(model, inputs, metric, route, steps=steps, **options)
        assert "step" not in alone.axes
        assert torch.equal(found.values[:, :, number], alone.values)
    assert found.plot() is not None
    assert "Generated" in str(found.provenance["run"])


def test_what_is_blocked_in_the_prompt_alone_changes_the_first_token_and_decoding_alone_does_not() -> None:
    model, inputs = spoken("llava-clip-llama")
    route = {"image": (None, "patch")}
    first = {"first": logit(3, position=0), "second": logit(3, position=1)}
    found = knockout(model, inputs, first, route, layers="all", steps=["decode"], run=generated(2), progress=False)
    assert bool((found.effect[0].abs() < 1e-5).all())
    assert bool((found.effect[1].abs() > 1e-3).all())


def test_behind_the_end_of_a_text_there_is_no_number() -> None:
    model, inputs = spoken("llava-clip-llama")
    free = generated(NEW)(model, inputs)
    said = free.argmax(-1)
    assert free.shape == (2, NEW, free.shape[-1])
    model.module.generation_config.eos_token_id = int(said[0, 1])
    found = generated(NEW)(model, inputs)
    ended = [(row == said[0, 1]).int().argmax().item() if bool((row == said[0, 1]).any()) else NEW for row in said]
    for row, end in enumerate(ended):
        torch.testing.assert_close(found[row, : end + 1], free[row, : end + 1])
        assert bool(found[row, end + 1 :].isnan().all())


def test_a_metric_without_a_position_and_models_that_say_nothing_are_refused() -> None:
    model, inputs = spoken("llava-clip-llama")
    with pytest.raises(InputError, match="position"):
        knockout(model, inputs, logit(3), {"image": (None, "patch")}, run=generated(2), progress=False)
    with pytest.raises(InputError):
        knockout(model, inputs, logit(3, 0), {"image": (None, "patch")}, steps=5, run=generated(2), progress=False)
    still, seen, _ = hooked_pair("vit")
    with pytest.raises(UnsupportedModelError):
        knockout(still, seen, logit(3), {"patches": ("cls", "patch")}, run=generated(2), progress=False)
    for wrong in (0, True, 1.5):
        with pytest.raises(InputError):
            generated(wrong)  # type: ignore[arg-type]
    assert generated(2) == Generated(2)
    assert not model.engine.stack


# -- the actions of a policy -----------------------------------------------------------------------------------------------------------------


def test_a_policy_is_kept_from_its_prefix_in_single_denoising_steps() -> None:
    model = cv.HookedModel(case("pi0").build().double())
    inputs = case("pi0").inputs(model.module, 2, 0, torch.float64)
    image = model.tokens(inputs)["language"].image(0)
    route = {"image to actions": (None, ("language", "patch")), "first camera": ("action", image)}
    found = knockout(
        model,
        inputs,
        action_dim(0),
        route,
        tower="action",
        layers=[1],
        steps=[0, 2, "all"],
        run=act,
        progress=False,
    )
    for row, (queries, keys) in enumerate(route.values()):
        for column, steps in enumerate((0, 2, None)):
            edit = edits.block_attention("action", queries, keys, layers=1, steps=steps)
            torch.testing.assert_close(found.values[row, 0, column], act(model, inputs, edit)[:, 0, 0])
    assert found.effect.abs().amin() > 0
    with pytest.raises(InputError, match="runs 3 times"):
        knockout(model, inputs, action_dim(0), route, tower="action", steps=[0, 3], run=act, progress=False)


def test_heads_of_a_policy_are_rescaled_in_single_denoising_steps() -> None:
    model = cv.HookedModel(case("pi0").build().double())
    inputs = case("pi0").inputs(model.module, 2, 0, torch.float64)
    heads = {"action L1H0": 1.0, "action L1H2": -0.5}
    options: dict[str, Any] = {"heads": heads, "n_random": 1, "progress": False, "run": act}
    found = modulate(model, inputs, action_dim(0), steps=1, **options)
    factor = torch.tensor([2.0, 1.0, 0.5, 1.0], dtype=torch.float64)[:, None]
    edit = edits.scale("action.blocks.1.attn.hook_z", factor, steps=1)
    torch.testing.assert_close(found.values[1], act(model, inputs, edit)[:, 0, 0])
    torch.testing.assert_close(found.values[0], act(model, inputs)[:, 0, 0])
    assert not torch.equal(modulate(model, inputs, action_dim(0), **options).values[1], found.values[1])
