"""Points inside a block whose value no module hands over as it is: shares of projections, slots of heads, gates, and what is added between blocks.

*Derived* points compute their value from what a module reads (see ``points.py``). Two kinds are read at one module and written at a later one,
because the code between them belongs to no module: what a gated branch adds (``hidden + λ · out``) and what a tower's own code adds behind a block.
Their edits travel as a difference to the next module that holds the stream: ``stream + (edited − value)``, which is the stream itself, bit by
bit, wherever nothing was edited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from circuitvision.errors import HookError
from circuitvision.model.memory import match_memory_layout
from circuitvision.model.norms import Identity
from circuitvision.model.points import (
    Call,
    Callback,
    Output,
    Point,
    SavedInput,
    merge_heads,
    rebuilt_where,
    split_heads,
)
from circuitvision.model.projections import Projection
from circuitvision.model.weights import is_plain_linear, linear_weight


class _Beside(torch.autograd.Function):
    """Forward: the bits of ``actual``. Backward: the gradient goes to ``actual`` and, through ``function``, to ``value``; to no weight twice."""

    @staticmethod
    def forward(ctx: Any, actual: Tensor, value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(value)
        ctx.function = function
        return actual.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (value,) = ctx.saved_tensors
        with torch.enable_grad():
            value = value.detach().requires_grad_(True)
            (through,) = torch.autograd.grad(ctx.function(value), value, grads[0])
        return grads[0], through, None


class _Gate(torch.autograd.Function):
    """The identity; backward, only what ``holder["edited"]`` selects passes (nothing without it)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, holder: dict[str, Tensor]) -> Tensor:
        ctx.holder = holder
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        edited = ctx.holder.get("edited")
        return (torch.zeros_like(grads[0]) if edited is None else grads[0] * edited), None


def _kept_by(stash: SavedInput, name: str) -> Tensor:
    """What a norm was given; HookError where it has not run before the part that reads it."""
    if id(stash.module) not in stash.kept:
        raise HookError(
            f"{name}: {type(stash.module).__name__}, which the table names as the norm before it, has not run: is it another branch's norm?"
        )
    return stash.kept[id(stash.module)]


def _fired_beside(fire: Callback, stream: Tensor) -> tuple[Tensor, bool, Tensor]:
    """A copy of the stream behind the hooks of a slot, whether it may differ, and at which entries ``[… 1]`` it does.

    The unedited stream has its gradient already, through the norm; only an edited copy takes the norm's place in the backward pass.
    """
    holder: dict[str, Tensor] = {}
    tracked = torch.is_grad_enabled() and stream.requires_grad
    value, changed = fire(_Gate.apply(stream, holder) if tracked else stream)
    edited = (value != stream).any(-1, keepdim=True) if changed else torch.zeros(())
    if changed and bool(edited.any()):
        holder["edited"] = edited
    return value, changed, edited


def _read_of(out: Tensor, value: Tensor, edited: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``out`` where a slot was not edited, ``function(value)`` where it was; the slot has its gradient either way."""
    if torch.is_grad_enabled() and value.requires_grad:
        out = _Beside.apply(out, value, function)
    return torch.where(edited, function(value), out) if bool(edited.any()) else out


def _apart(value: Tensor) -> Tensor:
    """A tensor of its own where gradients are followed: what is subtracted again must not take its gradient away."""
    return value.clone() if torch.is_grad_enabled() and value.requires_grad else value


@dataclass(eq=False)
class ProjectionOutput(Output):
    """What one projection writes: the output of its module, or its share of a fused one."""

    projection: Projection | None = None

    @property
    def whole(self) -> bool:
        return False

    def apply(self, call: Call, fire: Callback) -> None:
        assert self.projection is not None
        out = call.tensor()
        value, changed = fire(split_heads(self.projection.take(out), self.n_heads))
        if changed:
            call.set_tensor(self.projection.put(out, merge_heads(value, self.n_heads)))


@dataclass(eq=False)
class HeadResult(Point):
    """Each head's share of the output projection: ``z_h W_O^h``, without the bias."""

    n_heads: int = 1
    derived = True

    def apply(self, call: Call, fire: Callback) -> None:
        z = split_heads(call.input(), self.n_heads)
        weight, bias = linear_weight(call.module, z.dtype, z.device)
        w_o = rearrange(weight, "(h d) m -> h d m", h=self.n_heads)
        result = torch.einsum("...hd,hdm->...hm", z, w_o)
        value, changed = fire(result)
        if changed:
            rebuilt = value.sum(-2) if bias is None else value.sum(-2) + bias
            if not is_plain_linear(call.module):
                # A layer that rounds its input keeps its own output where nothing was edited, and near it where little was.
                whole = result.sum(-2) if bias is None else result.sum(-2) + bias
                rebuilt = rebuilt + (call.tensor() - whole).detach()
            edited = (value != result).flatten(-2).any(-1, keepdim=True)
            call.set_tensor(rebuilt_where(edited, call.tensor(), rebuilt))


@dataclass(eq=False)
class HeadInput(Point):
    """What one head's query, key or value reads of the residual stream, before the norm: ``row pos head d_model``.

    Sits on the projection; its companion keeps the input of the norm between the stream and the projection (without a norm, of the projection). An
    edit replaces the whole path from the stream to the projection, so an edit of ``ln1`` in the same run does not reach the heads edited here.
    """

    projection: Projection | None = None
    n_heads: int = 1
    companions: tuple[SavedInput, ...] = ()
    derived = True

    def apply(self, call: Call, fire: Callback) -> None:
        assert self.projection is not None
        stash = self.companions[0]
        resid = _kept_by(stash, self.name)
        per_head = resid.unsqueeze(-2).expand(*resid.shape[:-1], self.n_heads, resid.shape[-1])
        before = call.tensor()
        out = split_heads(self.projection.take(before), self.n_heads)
        value, changed, edited = _fired_beside(fire, per_head)
        if changed:
            call.set_tensor(
                self.projection.put(before, merge_heads(_read_of(out, value, edited, self.projected), self.n_heads))
            )

    def projected(self, value: Tensor) -> Tensor:
        """Norm and projection of one stream per head: ``row pos head d_head``."""
        assert self.projection is not None
        norm = self.companions[0].module
        normed = value if norm is self.module else norm.forward(value.contiguous())
        weight, bias = self.projection.weight_and_bias(normed.dtype, normed.device)
        w = rearrange(weight, "m (h d) -> h m d", h=self.n_heads)
        out = torch.einsum("...hm,hmd->...hd", normed, w)
        return out if bias is None else out + rearrange(bias, "(h d) -> h d", h=self.n_heads)


@dataclass(eq=False)
class ReadInput(Point):
    """What a branch reads of the stream through a norm that others read through as well: ``row pos d_model``.

    Sits on the branch's own module; its companion keeps the input of the shared norm. An edit replaces what the branch reads by the norm of the
    edited stream.
    """

    companions: tuple[SavedInput, ...] = ()
    derived = True

    def apply(self, call: Call, fire: Callback) -> None:
        stash = self.companions[0]
        stream = _kept_by(stash, self.name)
        value, changed, edited = _fired_beside(fire, stream)
        if changed:
            call.set_input(_read_of(call.input(), value, edited, lambda own: stash.module.forward(own.contiguous())))


@dataclass(eq=False)
class Arrival(Point):
    """Where the edit of a point before it enters the stream: ``stream + difference``; not a site."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    how: Literal["in_place", "input", "output"] = "output"
    for_edits = True

    def apply(self, call: Call, fire: Callback) -> None:
        difference = self.kept.pop(id(self), None)
        if difference is None:
            return
        stream = call.tensor() if self.how == "output" else call.input()
        arrived = match_memory_layout(stream + difference, stream)
        if self.how == "output":
            call.set_tensor(arrived)
        elif self.how == "input":
            call.set_input(arrived)
        elif stream.is_leaf and stream.requires_grad:
            raise HookError(f"{self.name}: the stream is a leaf that requires grad; run under torch.no_grad().")
        else:
            # The skip path holds the same tensor.
            stream.copy_(arrived)


@dataclass(eq=False)
class GatedOutput(Point):
    """What a branch adds behind the gates that the block's own code multiplies it with; edits arrive at the next module of the stream."""

    gates: Identity = field(default_factory=Identity)
    companions: tuple[Arrival, ...] = ()
    derived = True
    arrives_later = True

    def apply(self, call: Call, fire: Callback) -> None:
        before = self.gates(call.tensor())
        value, changed = fire(_apart(before))
        if changed:
            arrival = self.companions[0]
            arrival.kept[id(arrival)] = value - before


@dataclass(eq=False)
class SavedOutput(Point):
    """Keeps a copy of what a module returns, for a point behind it; not a site."""

    kept: dict[int, Tensor] = field(default_factory=dict)

    def apply(self, call: Call, fire: Callback) -> None:
        self.kept[id(self.module)] = call.tensor().clone()


@dataclass(eq=False)
class Between(Point):
    """What is added to the stream between two blocks: what the second one reads minus what the first one left, ``row pos d_model``."""

    companions: tuple[SavedOutput, ...] = ()
    derived = True
    arrives_later = True

    def apply(self, call: Call, fire: Callback) -> None:
        saved = self.companions[0]
        entering = call.input()
        before = entering - saved.kept.pop(id(saved.module))
        value, changed = fire(_apart(before))
        if changed:
            call.set_input(match_memory_layout(entering + (value - before), entering))
