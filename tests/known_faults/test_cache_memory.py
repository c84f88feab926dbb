"""A cache keeps what was asked for and nothing else: no graph, no larger storage, no model and no inputs in a pickle."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.model import cache as caches
from circuitvision.model import gradients, registrations
from circuitvision.model.sites import SiteName
from tests.zoo import CASES, Case, case, parametrize, shared_model


def wrapped(name: str, dtype: torch.dtype = torch.float32) -> tuple[cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model(name)).to(dtype)
    return cv.HookedModel(module), CASES[name].inputs(module, batch=2, dtype=dtype)


def tensors(cache: Any) -> list[tuple[str, Tensor]]:
    parts = [(name, value if isinstance(value, list) else [value]) for name, value in cache.items()]
    return [(name, part) for name, values in parts for part in values]


def check_memory(cache: Any) -> None:
    for name, value in tensors(cache):
        assert not value.requires_grad, f"{name} holds a graph"
        assert value.untyped_storage().nbytes() <= value.nbytes, f"{name} keeps a larger tensor alive"


def check_values_are_alone(name: str) -> None:
    model, inputs = wrapped(name)
    check_memory(model.run_with_cache(inputs, "**")[1])
    with torch.no_grad():
        check_memory(model.run_with_cache(inputs, "**")[1])
    with torch.inference_mode():
        check_memory(model.run_with_cache(inputs, "**")[1])
    _, cache = model.run_with_cache(inputs, "**.hook_re*", incl_bwd=True, metric=lambda logits: logits[..., :1])
    check_memory(cache)


@parametrize()
def test_recorded_values_hold_nothing_else(case: Case) -> None:
    check_values_are_alone(case.name)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_recordings_of_generate_hold_nothing_else(implementation: str | None) -> None:
    """Rotated keys are views of the cache, that of every earlier position with them."""
    model, inputs = wrapped("llava-clip-llama")
    kept = {} if implementation is None else {"cache_implementation": implementation}
    with model.record(["language.blocks.0.attn.hook_k", "language.blocks.0.attn.hook_z"]) as cache:
        model.generate(inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **kept)
    check_memory(cache)
    with model.record("language.blocks.0.attn.hook_rot_k") as rotated:
        model.generate(inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    check_memory(rotated)


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def check_the_graph_goes() -> None:
    model, inputs = wrapped("vit")
    kept: list[weakref.ref[Saved]] = []

    def pack(value: Tensor) -> Saved:
        box = Saved(value.detach())
        kept.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.value):
        out, cache = model.run_with_cache(inputs, "vision.blocks.1.hook_resid_post")
    assert any(box() is not None for box in kept)
    del out
    gc.collect()
    assert all(box() is None for box in kept), "the cache keeps what the graph saved"
    assert len(cache) == 1


def test_a_cache_lets_go_of_the_run() -> None:
    """The graph of the output is gone with the output, whatever the cache holds."""
    check_the_graph_goes()


def test_gradients_flow_where_they_are_asked_for() -> None:
    """``keep_graph`` puts the recorded value on the path of the raw module's own gradient."""
    model, inputs = wrapped("vit", torch.float64)
    block = model.vision.blocks[1].module
    kept: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, args, out: kept.append(out))
    expected = model.module(**inputs).logits[:, 1].sum()
    handle.remove()
    (slope,) = torch.autograd.grad(expected, kept)
    out, cache = model.run_with_cache(
        inputs, ["vision.blocks.1.hook_resid_post", "vision.hook_readout"], keep_graph=True
    )
    found = torch.autograd.grad(out[:, 1].sum(), [cache["vision", "resid_post", 1], cache["vision", "readout"]])
    torch.testing.assert_close(found[0], slope)
    assert found[1].abs().max() > 0
    with model.record("vision.blocks.1.hook_resid_post", keep_graph=True) as recorded:
        out = model(inputs)
    torch.testing.assert_close(torch.autograd.grad(out[:, 1].sum(), recorded["vision", "resid_post", 1])[0], slope)
    assert not model.run_with_cache(inputs, device="cpu")[1]["vision", "resid_post", 1].requires_grad


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "clip"])
def test_values_are_those_of_the_graph(name: str) -> None:
    """Recording without a graph changes no value and no gradient of the output."""
    model, inputs = wrapped(name, torch.float64)
    weight = next(parameter for parameter in model.parameters() if parameter.ndim == 2)
    (expected,) = torch.autograd.grad(model(inputs).sum(), weight)
    sites = [site for site in model.sites() if not SiteName.parse(site).is_eager]
    out, cache = model.run_with_cache(inputs, sites)
    (found,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(found, expected)
    _, tracked = model.run_with_cache(inputs, sites, keep_graph=True)
    for site in cache:
        torch.testing.assert_close(cache[site], tracked[site].detach(), msg=site)


def check_pickling() -> None:
    model, inputs = wrapped("vit")
    site = "vision.blocks.1.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, [site, "vision.hook_readout"])
    assert all(cache.inputs[name] is value for name, value in inputs.items()), "inputs are known by reference"
    size = sum(value.nbytes for value in cache.values())
    text = pickle.dumps(cache)
    assert len(text) < size + 4096, "more than the values is pickled"
    again = pickle.loads(text)
    assert torch.equal(again[site], cache[site])
    assert (again.model, again.inputs) == (None, {})
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    assert buffer.tell() < size + 8192
    for twin in (copy.deepcopy(cache), copy.copy(cache)):
        assert twin.model is model
        assert twin.inputs.keys() == inputs.keys()
        assert all(twin.inputs[name] is value for name, value in inputs.items())
        assert torch.equal(twin["vision", "resid_post", 1], cache[site])
    assert copy.deepcopy(cache)[site] is not cache[site]
    assert copy.copy(cache)[site] is cache[site]


def test_a_pickled_cache_holds_neither_model_nor_inputs() -> None:
    check_pickling()


def test_a_cache_on_the_graph_can_be_copied() -> None:
    model, inputs = wrapped("vit")
    out, cache = model.run_with_cache(inputs, "vision.blocks.1.hook_resid_post", keep_graph=True)
    twin = copy.deepcopy(cache)
    assert torch.equal(twin["vision", "resid_post", 1], cache["vision", "resid_post", 1])
    assert out.requires_grad


def keep_views(patch: pytest.MonkeyPatch) -> None:
    """What is recorded stays a view."""
    patch.setattr(registrations, "compact", lambda value: value)


def keep_graphs(patch: pytest.MonkeyPatch) -> None:
    """What is recorded stays on the graph."""

    def record(self: Any, name: str, value: Tensor) -> None:
        self.values.setdefault(name, []).append(value)

    patch.setattr(registrations.Recorder, "record", record)


def keep_views_of_gradients(patch: pytest.MonkeyPatch) -> None:
    """Values recorded beside their gradients stay views."""
    patch.setattr(gradients, "owned", lambda value: value)


def pickle_all(patch: pytest.MonkeyPatch) -> None:
    """A cache is pickled with all it knows."""
    patch.delattr(caches.ActivationCache, "__getstate__")


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (keep_views, lambda: check_values_are_alone("vit")),
        (keep_graphs, lambda: check_values_are_alone("vit")),
        (keep_graphs, check_the_graph_goes),
        (keep_views_of_gradients, lambda: check_values_are_alone("vit")),
        (pickle_all, check_pickling),
    ],
)
def test_mutants_are_noticed(
    mutant: Callable[..., None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_an_unpickled_cache_does_what_a_cache_does() -> None:
    model = cv.HookedModel(shared_model("vit"))
    inputs = case("vit").inputs(model.module, batch=2)
    with torch.no_grad(), model.hooks([("vision.blocks.0.hook_resid_post", lambda value, hook: 2 * value)]):
        _, cache = model.run_with_cache(inputs, "vision.blocks.*.hook_resid_post")
    again = pickle.loads(pickle.dumps(cache))
    assert again.edited == cache.edited != frozenset()
    for copied in (again.to("cpu"), copy.deepcopy(again)):
        assert torch.equal(copied["vision.blocks.0.hook_resid_post"], cache["vision.blocks.0.hook_resid_post"])
    assert "ActivationCache" in repr(again)
