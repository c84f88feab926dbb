"""What the tests of edits share: wrapped tiny models, and plain torch hooks to compare with, which know nothing of circuitvision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import circuitvision as cv
from tests.parts import module_of
from tests.zoo import case, primary, shared_model

FAMILIES = ("vit", "dinov2", "clip", "llava-clip-llama", "paligemma", "pi0")
DOUBLE = torch.float64
MADE: list[cv.HookedModel] = []
"""Every model of a test; none may be left hooked."""


def set_attention(module: Any, implementation: str) -> None:
    """Give every part of a module this attention implementation."""
    for part in module.modules():
        if hasattr(getattr(part, "config", None), "_attn_implementation_internal"):
            part.config._attn_implementation_internal = implementation


def wrap(module: nn.Module) -> cv.HookedModel:
    """A wrapped module that is checked after the test."""
    model = cv.HookedModel(module)
    MADE.append(model)
    return model


def fresh(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> nn.Module:
    """A copy of a case's module that a test may change."""
    module = copy.deepcopy(shared_model(name)).to(dtype)
    if attention is not None:
        set_attention(module, attention)
    return module


@cache
def wrapped(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> cv.HookedModel:
    """One shared wrapped model: tests leave it as it was."""
    return wrap(fresh(name, dtype, attention))


def inputs_of(name: str, model: cv.HookedModel, **options: Any) -> dict[str, Any]:
    """A case's own inputs by hand, two examples unless told otherwise."""
    return case(name).inputs(model.module, **{"batch": 2, "dtype": model.dtype, **options})


def bare(model: cv.HookedModel, inputs: dict[str, Any]) -> Tensor:
    """The output of the module itself, without circuitvision."""
    return primary(model.module(**inputs))


def part(model: cv.HookedModel, tower: str, layer: int, name: str) -> nn.Module:
    """A module of a block: "q", "v", "o", "attn", "ln2", "mlp_in", "mlp_out"."""
    return module_of(model.towers[tower].blocks[layer], name)


def block(model: cv.HookedModel, tower: str, layer: int) -> nn.Module:
    """A block of a tower."""
    return model.towers[tower].blocks[layer].module


Fn = Callable[[Tensor], "Tensor | None"]


def _pre(fn: Fn) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _post(fn: Fn) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        new = fn(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


@contextmanager
def torch_hooks(*hooks: tuple[nn.Module, str, Fn]) -> Iterator[None]:
    """Plain torch hooks ``(module, "pre" or "post", fn)`` for the length of the block; ``fn`` returns the tensor to go on with, or None."""
    with ExitStack() as stack:
        for module, phase, fn in hooks:
            if phase == "pre":
                handle = module.register_forward_pre_hook(_pre(fn), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_post(fn))
            stack.callback(handle.remove)
        yield


@contextmanager
def seen(module: Any, phase: str = "post") -> Iterator[list[Tensor]]:
    """Every value that a module computes with ("pre") or hands on ("post"), after all hooks: taken around the calls, by no hook."""
    values: list[Tensor] = []
    name = "forward" if phase == "pre" else "_call_impl"
    call = getattr(module, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if phase == "pre":
            values.append((args[0] if args else kwargs["hidden_states"]).detach().clone())
            return call(*args, **kwargs)
        output = call(*args, **kwargs)
        values.append((output[0] if isinstance(output, tuple) else output).detach().clone())
        return output

    setattr(module, name, watched)
    try:
        yield values
    finally:
        delattr(module, name)


def run_and_see(
    model: cv.HookedModel, inputs: dict[str, Any], edits: list[Any], module: nn.Module, phase: str = "post"
) -> Tensor:
    """What passes a place in one run under edits (a mean is taken in runs of its own before)."""
    with seen(module, phase) as values:
        model.run(inputs, edits)
    return values[-1]


def pattern_under(model: cv.HookedModel, inputs: dict[str, Any], edits: list[Any], site: str) -> Tensor:
    """The attention pattern of one run under edits of scores."""
    with model.record(site) as cache:
        model.run(inputs, edits)
    return cache[site]


def near(one: Tensor, other: Tensor, tolerance: float = 1e-11) -> None:
    """Equal up to rounding, relative to the largest value."""
    assert one.shape == other.shape, f"{tuple(one.shape)} against {tuple(other.shape)}"
    gap, size = float((one - other).abs().max()), max(1.0, float(other.abs().max()))
    assert gap <= tolerance * size, f"differs by {gap:.3g}"


def apart(one: Tensor, other: Tensor, least: float = 1e-4) -> None:
    """Different by more than rounding."""
    gap = float((one - other).abs().max())
    assert gap > least, f"differs by {gap:.3g} only"


def same(one: Tensor, other: Tensor) -> None:
    """Equal bits."""
    assert one.shape == other.shape
    assert torch.equal(one, other), f"differs by {float((one - other).abs().max()):.3g}"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


class Dictionary:
    """A small sparse autoencoder; feature ``dead`` is never active."""

    name = "tiny"

    def __init__(self, width: int, count: int = 40, dead: int = 7) -> None:
        self.W_enc, self.W_dec = random(width, count, seed=3) / width**0.5, random(count, width, seed=4)
        self.b_enc, self.b_dec = random(count, seed=5), random(width, seed=6)
        self.b_enc[dead] = -1e6

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.W_dec + self.b_dec
