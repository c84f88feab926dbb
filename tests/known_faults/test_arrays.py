"""Arrays of numbers are taken wherever tensors are: inputs of every verb, data sets, values, positions, heads and steps of edits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits, metrics
from circuitvision.circuits import ablation_check, head_importance
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.patching import activation_patch
from circuitvision.readout import (
    attention_maps,
    collect,
    gradient_times_activation,
    integrated_gradients,
    legrad,
    logit_lens,
    max_activating_examples,
    occlusion,
    perturbation_curve,
)
from tests.readout.layouts import by_row
from tests.zoo import CASES, Case, parametrize, shared_model


def wrapped(name: str) -> cv.HookedModel:
    case = CASES[name]
    return cv.HookedModel(shared_model(name), case.processor() if case.processor else None)


def arrays(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as arrays, floats in numpy's own precision."""
    return {
        name: (value.numpy().astype(float) if value.is_floating_point() else value.numpy())
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def plain(value: Any) -> Any:
    """What a verb returned, as something to compare."""
    if isinstance(value, Tensor) or value is None:
        return value
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: str(item.labels()) for name, item in value.items()}
    if hasattr(value, "names"):
        return {name: value[name] for name in list(value)}
    return by_row(value)


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
    if isinstance(mine, (list, dict)):
        keys = mine if isinstance(mine, dict) else range(len(mine))
        return len(mine) == len(theirs) and all(same(mine[key], theirs[key]) for key in keys)
    return mine == theirs


@parametrize()
def test_every_verb_takes_arrays(case: Case) -> None:
    model = wrapped(case.name)
    inputs = case.inputs(model.module, batch=2)
    site = f"{next(iter(model.towers))}.blocks.0.hook_resid_post"
    metric: Callable[[Tensor], Tensor] = lambda out: out.flatten(1)[:, 0]  # noqa: E731
    edit = edits.ablate(site, positions=[1])
    verbs: dict[str, Callable[[Any], Any]] = {
        "call": model,
        "cache": lambda given: model.run_with_cache(given, "**.hook_z"),
        "hooks": lambda given: model.run_with_hooks(given, [(site, lambda v, hook: v * 2)]),
        "run": lambda given: model.run(given, [edit]),
        "sweep": lambda given: model.sweep(given, [edit], metric, progress=False),
        "tokens": model.tokens,
        "dead": lambda given: model.dead_positions(site, given),
    }
    if case.tags & {"generates"}:
        verbs["generate"] = lambda given: model.generate(given, max_new_tokens=2, do_sample=False)
    if case.tags & {"samples_actions"}:
        verbs["sample_actions"] = lambda given: model.sample_actions(given, num_steps=2)
    with torch.no_grad():
        for name, verb in verbs.items():
            assert same(plain(verb(inputs)), plain(verb(arrays(inputs)))), name


def test_one_array_is_the_images_of_a_vision_model() -> None:
    model = wrapped("vit")
    pixels = CASES["vit"].inputs(model.module, batch=2)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixels.numpy()), model(pixels))
        assert model.tokens(pixels)["vision"].n_rows == model.tokens(pixels.numpy())["vision"].n_rows == 2
    with pytest.raises(InputError, match="mapping"):
        wrapped("clip")(pixels.numpy())


def test_an_array_is_no_window_into_the_callers_memory() -> None:
    model = wrapped("vit")
    pixels = CASES["vit"].inputs(model.module)["pixel_values"].numpy().copy()
    _, cache = model.run_with_cache(pixels, "vision.hook_embed")
    before = cache.inputs["pixel_values"].clone()
    pixels[:] = 0
    assert torch.equal(cache.inputs["pixel_values"], before)
    pixels.flags.writeable = False
    model(pixels)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_values", [[0.0]]),
        ("input_ids", [[1, 2, 3]]),
        ("attention_mask", [np.ones(3)]),
        ("pixel_values", np.array([None, 1])),
        ("input_ids", np.array(["red"])),
    ],
)
def test_lists_and_arrays_of_other_things(name: str, value: Any) -> None:
    model = wrapped("llava-clip-llama")
    inputs = CASES["llava-clip-llama"].inputs(model.module)
    for verb in (model, model.tokens, model.generate):
        with pytest.raises(InputError) as caught:
            verb({**inputs, name: value})
        assert name in str(caught.value)


def test_readouts_and_methods_take_arrays_as_inputs() -> None:
    model = wrapped("vit")
    inputs = CASES["vit"].inputs(model.module, batch=2)
    other = {"pixel_values": inputs["pixel_values"].flip(0)}
    metric = metrics.logit_diff(0, 1)
    site = "vision.blocks.*.attn.hook_z"
    pairs = lambda make: Pairs(inputs=make(inputs), corrupt_inputs=make(other), answers=[0, 1], foils=[1, 0])  # noqa: E731
    methods: dict[str, Callable[[Any], Any]] = {
        "activation_patch": lambda make: activation_patch(
            model, metric=metric, clean=make(inputs), corrupt=make(other), sites=site
        ),
        "head_importance": lambda make: head_importance(model, metric=metric, clean=make(inputs), corrupt=make(other)),
        "ablation_check": lambda make: ablation_check(model, pairs(make), ["L0H1"], n_random=2),
        "gradient": lambda make: gradient_times_activation(model, make(inputs), metric),
        "legrad": lambda make: legrad(model, make(inputs), metric),
        "exemplars": lambda make: max_activating_examples(
            model, make(inputs), "vision.blocks.0.mlp.hook_post", top_k=2
        ),
        "collect": lambda make: collect(model, make(inputs), "vision.blocks.0.hook_resid_post"),
        "integrated": lambda make: integrated_gradients(
            model, make(inputs), metric, steps=8, baseline=make(other), site="pixels"
        ),
        "occlusion": lambda make: occlusion(model, make(inputs), metric, progress=False),
        "deletion": lambda make: perturbation_curve(
            model, make(inputs), metric, legrad(model, inputs, metric), random_orders=1, steps=2
        ),
        "logit_lens": lambda make: logit_lens(model, model.run_with_cache(make(inputs))[1], targets={0: 0, 1: 1}),
        "attention_maps": lambda make: attention_maps(model, model.run_with_cache(make(inputs))[1], tower="vision"),
        "mean over a data set": lambda make: model.run(
            make(inputs), edits.ablate("vision.blocks.1.hook_mlp_out", "mean", dataset=[make(other), make(inputs)])
        ),
    }
    for name, method in methods.items():
        mine, theirs = numbers(method(lambda given: given)), numbers(method(arrays))
        assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7)), name


def numbers(found: Any) -> Tensor:
    """The numbers of a result of any kind, in one tensor."""
    held = found if isinstance(found, Tensor) else by_row(found)
    return (
        held
        if isinstance(held, Tensor)
        else torch.cat([torch.as_tensor(v).flatten() for v in dict(found.items()).values()])
    )


def test_edits_take_arrays() -> None:
    model = wrapped("vit")
    inputs = CASES["vit"].inputs(model.module, batch=2)
    site, z = "vision.blocks.1.hook_resid_post", "vision.blocks.1.attn.hook_z"
    width, length = model.vision.cfg.d_model, model.tokens(inputs)["vision"].n_positions
    rng = np.random.default_rng(0)
    vector, basis = rng.normal(size=width).astype(np.float32), rng.normal(size=(width, 2)).astype(np.float32)
    mask = rng.integers(0, 2, (2, length)).astype(bool)
    for mine, theirs in [
        (edits.replace(site, vector), edits.replace(site, torch.from_numpy(vector))),
        (edits.ablate(site, vector), edits.ablate(site, torch.from_numpy(vector))),
        (edits.ablate(site, np.float32(2)), edits.ablate(site, 2.0)),
        (edits.steer(site, vector, scale=np.float32(2)), edits.steer(site, torch.from_numpy(vector), scale=2.0)),
        (edits.scale(z, np.float32(0.5), heads=np.array([1, 0])), edits.scale(z, 0.5, heads=[1, 0])),
        (edits.scale(z, np.int64(2), heads=torch.tensor([1])), edits.scale(z, 2, heads=1)),
        (
            edits.overwrite(site, np.array([1, 2]), np.array([0.5, 1.0], np.float32)),
            edits.overwrite(site, [1, 2], torch.tensor([0.5, 1.0])),
        ),
        (edits.project(site, basis, vector), edits.project(site, torch.from_numpy(basis), torch.from_numpy(vector))),
        (edits.ablate(site, positions=np.array([1, 2])), edits.ablate(site, positions=[1, 2])),
        (edits.ablate(site, positions=np.int64(1)), edits.ablate(site, positions=1)),
        (edits.ablate(site, positions=mask), edits.ablate(site, positions=torch.from_numpy(mask))),
        (edits.ablate(site, steps=np.array([0])), edits.ablate(site, steps=0)),
        (edits.ablate(site, steps=torch.tensor([0])), edits.ablate(site, steps=[0])),
        (
            edits.permute(site, np.array([1, 0]), positions=np.array([1, 2])),
            edits.permute(site, [1, 0], positions=[1, 2]),
        ),
        (
            edits.block_attention(
                "vision", queries=mask, keys=np.array([0]), layers=np.array([1]), heads=np.array([0])
            ),
            edits.block_attention("vision", queries=torch.from_numpy(mask), keys=0, layers=1, heads=0),
        ),
        (
            edits.add_attention_bias("vision", keys=1, bias=np.float32(1)),
            edits.add_attention_bias("vision", keys=1, bias=1.0),
        ),
    ]:
        assert mine == theirs, mine
        with torch.no_grad():
            assert torch.equal(model.run(inputs, mine), model.run(inputs, theirs))


def test_mutant_arrays_handed_on_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitvision.model import inputs

    monkeypatch.setattr(inputs, "as_tensor", lambda model, name, value: value)
    with pytest.raises((AssertionError, TypeError, AttributeError, RuntimeError, ValueError)):
        test_every_verb_takes_arrays(CASES["vit"])
