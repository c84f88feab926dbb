"""Blocks of real classes of transformers, described from outside, and where plain hooks on the bare modules find the value of each site.

A :class:`Case` is a tiny model with its table. Its ``truth`` gives for one block, by site, the :class:`Place` of the value: a module, its input or
output, how the site's value is taken from it and put back. Nothing of a table is used for it, so both can be held against each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from circuitvision.families import Family, Readout, Stack, TowerSpec, register_family

Change = Callable[[Tensor], Tensor]


def same(value: Tensor) -> Tensor:
    return value


def put_whole(whole: Tensor, value: Tensor) -> Tensor:
    return value.reshape(whole.shape)


@dataclass(frozen=True)
class Place:
    """Where the value of a site is: of a module, ``"out"`` or ``"in"`` (``"skip"``: written in place, for the skip path holds it too)."""

    module: nn.Module
    side: str = "out"
    take: Change = same
    put: Callable[[Tensor, Tensor], Tensor] = put_whole

    @contextlib.contextmanager
    def tapped(self, store: list[Tensor], change: Change | None = None) -> Iterator[None]:
        """Keep the value of each call, and change it."""

        def new(whole: Tensor) -> Tensor | None:
            store.append(self.take(whole))
            if change is None:
                return None
            return self.put(whole, change(self.take(whole)))

        def entering(module: nn.Module, args: Any, kwargs: Any) -> Any:
            name = None if args else next(one for one in ("hidden_states", "input", "x") if one in kwargs)
            whole = args[0] if name is None else kwargs[name]
            found = new(whole)
            if found is None:
                return None
            if self.side == "skip":
                whole.copy_(found)
                return None
            return ((found, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: found})

        def leaving(module: nn.Module, args: Any, output: Any) -> Any:
            found = new(output[0] if isinstance(output, tuple) else output)
            if found is None:
                return None
            return (found, *output[1:]) if isinstance(output, tuple) else found

        if self.side == "out":
            handle = self.module.register_forward_hook(leaving)
        else:
            handle = self.module.register_forward_pre_hook(entering, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def heads(n_heads: int) -> dict[str, Any]:
    """Side by side in the last axis."""
    return {"take": lambda whole: whole.unflatten(-1, (n_heads, -1))}


def share(columns: list[int], n_heads: int = 0) -> dict[str, Any]:
    """Some columns of what a module writes, as heads where they are such."""

    def put(whole: Tensor, value: Tensor) -> Tensor:
        out = whole.clone()
        out[..., columns] = value.flatten(-2) if n_heads else value
        return out

    return {
        "take": lambda whole: whole[..., columns].unflatten(-1, (n_heads, -1)) if n_heads else whole[..., columns],
        "put": put,
    }


def times(factor: Callable[[], Tensor]) -> dict[str, Any]:
    """What a module returns, multiplied by a parameter."""
    return {"take": lambda whole: factor() * whole, "put": lambda whole, value: value / factor()}


def gained(norm: Any, offset: float = 0.0) -> dict[str, Any]:
    """What a norm returns, without its gain and bias."""
    bias = getattr(norm, "bias", None)
    bias = 0 if bias is None else bias
    return {
        "take": lambda whole: (whole - bias) / (offset + norm.weight),
        "put": lambda whole, value: (value * (offset + norm.weight) + bias).reshape(whole.shape),
    }


@dataclass(frozen=True)
class Seen:
    """The attention of one branch, for its pattern: which module returns it, its values, its output projection."""

    attention: nn.Module
    v: Place
    o: nn.Module


@dataclass(frozen=True)
class Case:
    """A tiny model, the table that describes it, and the truth about its blocks."""

    build: Callable[[], nn.Module]
    stack: Stack
    truth: Callable[[nn.Module, int], dict[str, Place]]
    seen: Callable[[nn.Module, int], dict[str, Seen]]
    inputs: Callable[[], dict[str, Tensor]]
    root: str = ""
    tower: str = "language"
    output: str = "logits"
    readout: Readout = field(default_factory=lambda: Readout(head="lm_head"))
    others: tuple[TowerSpec, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    of_tower: dict[str, Any] = field(default_factory=dict)

    def register(self, block: Any = None, **stack: Any) -> None:
        """Put its table into the registry, with another block or other entries of the stack."""
        whole = replace(self.stack, **({} if block is None else {"block": block}), **stack)
        spec = TowerSpec(self.tower, root=self.root, readout=self.readout, stack=whole, **self.of_tower)
        cls = type(self.build()).__name__
        register_family(
            Family(name=f"own_{cls}", classes=(cls,), output=self.output, towers=(*self.others, spec), **self.options)
        )

    def module(self) -> nn.Module:
        """The model, with gains, biases and gates of their own: a table that forgets one must be seen."""
        torch.manual_seed(0)
        module = self.build().eval()
        for parameter in module.parameters():
            parameter.data += 0.25 * torch.randn_like(parameter)
        return module


def ids() -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 8, 6]]),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
    }


WIDTH, HEADS, INNER, LAYERS = 24, 4, 20, 3
SIZES = {
    "vocab_size": 11,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
