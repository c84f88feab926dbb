"""Points: where the value of a site enters or leaves a module, how it is read there and how an edit is written back.

Every site is one :class:`Point` on one module of the model. Four mechanisms cover all of them:

* *direct*: the value is an argument or the output of the module, possibly with the head axis split off; an edit replaces it;
* *in place*: an edit of ``resid_mid`` is copied into the tensor that enters the second norm, because the skip path holds the same tensor and
  must see the edit too (replacing the norm's input would leave the skip path at its old value). ``resid_pre`` likewise: it is what its block reads,
  and where that is what the block before it left, whoever recorded that (hidden states) must see the edit;
* *derived*: the value is computed from what the module reads (a norm's scale, one head's share of the output); the module's output is
  rebuilt from it only if an edit really changed it, so that looking never changes a bit. With gradients on, the rebuilt value takes the place
  of the output in the backward pass alone;
* *attention*: scores, pattern and rotated queries and keys exist only inside the attention function (see ``attention.py``).

A point knows shapes and arithmetic, never an architecture: which module it sits on comes from the family table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from circuitvision.errors import HookError
from circuitvision.model.memory import match_memory_layout
from circuitvision.model.spec import NormSpec
from circuitvision.model.weights import (
    attention_weights,
    computing,
    embedding_weight,
    norm_weights,
    present,
)

Callback = Callable[[Tensor], "tuple[Tensor, bool]"]
"""Runs the hooks of a point on a value; returns the value to continue with and whether it may differ from the one given."""


@dataclass
class Call:
    """One call of a module, as its torch hook sees it; points of the same call share ``memo``."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    memo: dict[str, Any] = field(default_factory=dict)
    changed: bool = False

    def input(self, name: str = "hidden_states") -> Tensor:
        """The first positional argument, or the keyword ``name``, or the only tensor keyword."""
        if self.args:
            return self.args[0]
        if name in self.kwargs:
            return self.kwargs[name]
        return next(value for value in self.kwargs.values() if isinstance(value, Tensor))

    def set_input(self, value: Tensor, name: str = "hidden_states") -> None:
        """Replace what :meth:`input` returns."""
        if self.args:
            self.args = (value, *self.args[1:])
        else:
            key = name if name in self.kwargs else next(k for k, v in self.kwargs.items() if isinstance(v, Tensor))
            self.kwargs = {**self.kwargs, key: value}
        self.changed = True

    def tensor(self) -> Tensor:
        """The output, or its first element where the module returns a tuple."""
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def set_tensor(self, value: Tensor) -> None:
        """Replace what :meth:`tensor` returns."""
        self.output = (value, *self.output[1:]) if isinstance(self.output, tuple) else value
        self.changed = True


class _Substitute(torch.autograd.Function):
    """Forward: the bits of ``actual``. Backward: the gradient goes to ``rebuilt`` alone."""

    @staticmethod
    def forward(ctx: Any, actual: Tensor, rebuilt: Tensor) -> Tensor:
        return actual.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def substitute(actual: Tensor, rebuilt: Tensor) -> Tensor:
    """A tensor with the value of ``actual`` and the gradient of ``rebuilt`` (the same function, rounded differently)."""
    return _Substitute.apply(actual.detach(), rebuilt.to(actual.dtype))


def rebuilt_where(changed: Tensor, actual: Tensor, rebuilt: Tensor) -> Tensor:
    """``rebuilt`` where a derived value was changed, the bits of ``actual`` elsewhere: an edit of one position rounds no other one differently."""
    kept = substitute(actual, rebuilt)
    if not bool(changed.any()):
        return kept
    out = torch.where(changed, rebuilt, kept)
    # A mean over positions adds in the order of memory: the layout must stay the module's own.
    return out if out.stride() == actual.stride() else torch.empty_like(actual).copy_(out)


@dataclass(eq=False)
class Point:
    """One site at one module. ``order`` sorts the points that share a module and phase."""

    name: str
    module: nn.Module
    phase: Literal["pre", "post", "attention"]
    order: int = 0
    derived = False
    in_place = False
    for_edits = False
    """Whether it is there for the edits of another point alone, and not needed where values are only read."""
    arrives_later = False
    """Whether an edit is carried from the module that the value is read at to one behind it."""

    @property
    def whole(self) -> bool:
        """Whether the value is the module's first argument or its output just as it is."""
        return False

    def apply(self, call: Call, fire: Callback) -> None:
        """Fire the hooks on this site's value in ``call`` and write an edit back. Attention points are applied by the attention function."""
        raise NotImplementedError(f"{type(self).__name__} is not applied by a module hook.")


@dataclass(eq=False)
class AttentionStage(Point):
    """Scores, pattern or rotated queries and keys: applied inside the attention function."""

    in_place: bool = False  # type: ignore[misc]


@dataclass(eq=False)
class SavedInput(Point):
    """Keeps a module's input for a derived point of the same block; not a site."""

    kept: dict[int, Tensor] = field(default_factory=dict)

    def apply(self, call: Call, fire: Callback) -> None:
        self.kept[id(self.module)] = call.input()


def split_heads(value: Tensor, n_heads: int | None) -> Tensor:
    """The last axis as heads; as it is without a number of them."""
    return value if n_heads is None else value.unflatten(-1, (n_heads, -1))


def merge_heads(value: Tensor, n_heads: int | None) -> Tensor:
    """The inverse of :func:`split_heads`."""
    return value if n_heads is None else value.flatten(-2)


@dataclass(eq=False)
class Input(Point):
    """The module's first argument, with the head axis split off where ``n_heads`` is given."""

    n_heads: int | None = None
    keyword: str = "hidden_states"

    @property
    def whole(self) -> bool:
        return self.n_heads is None

    def apply(self, call: Call, fire: Callback) -> None:
        value, changed = fire(split_heads(call.input(self.keyword), self.n_heads))
        if changed:
            call.set_input(merge_heads(value, self.n_heads), self.keyword)


@dataclass(eq=False)
class BranchInput(Input):
    """The first argument of a module whose tensor others hold as well: hooks get the module's own branch, in values and in gradients."""

    def apply(self, call: Call, fire: Callback) -> None:
        shared = call.input(self.keyword)
        value, changed = fire(shared.clone() if torch.is_grad_enabled() and shared.requires_grad else shared)
        if changed:
            call.set_input(value, self.keyword)


@dataclass(eq=False)
class Output(Point):
    """The module's output: heads split off, or a convolution's map flattened to ``row pos d_model``."""

    n_heads: int | None = None

    @property
    def whole(self) -> bool:
        return self.n_heads is None

    def apply(self, call: Call, fire: Callback) -> None:
        out = call.tensor()
        grid = out.shape[-2:] if out.ndim == 4 else None
        value = rearrange(out, "b d h w -> b (h w) d") if grid else split_heads(out, self.n_heads)
        value, changed = fire(value)
        if changed:
            merged = rearrange(value, "b (h w) d -> b d h w", h=grid[0]) if grid else merge_heads(value, self.n_heads)
            call.set_tensor(merged)


@dataclass(eq=False)
class Lookup(Output):
    """A token embedding's output. A single token that is looked up beside the prompt has no position and fires nothing: models find the image's
    places among ``inputs_embeds`` that way."""

    @property
    def whole(self) -> bool:
        return False

    def apply(self, call: Call, fire: Callback) -> None:
        if call.tensor().ndim > 2:
            super().apply(call, fire)


@dataclass(eq=False)
class SharedInput(Point):
    """The module's input, edited in place so that whoever else holds the tensor sees the edit."""

    in_place = True

    @property
    def whole(self) -> bool:
        return True

    def apply(self, call: Call, fire: Callback) -> None:
        shared = call.input()
        value, changed = fire(shared)
        if changed:
            if shared.is_leaf and shared.requires_grad:
                raise HookError(
                    f"{self.name} is a leaf that requires grad and cannot be edited in place; run under torch.no_grad()."
                )
            shared.copy_(value)


@dataclass(eq=False)
class OwnOutput(Point):
    """Puts a copy in the place of what a module returns, so that the :class:`StreamInput` behind it may be written in place; not a site."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    for_edits = True

    def apply(self, call: Call, fire: Callback) -> None:
        value = call.tensor()
        own = self.kept[id(self.module)] = match_memory_layout(value.clone(), value)
        call.set_tensor(own)


@dataclass(eq=False)
class StreamInput(Point):
    """What a block reads of the stream, where another block comes before it.

    An edit is written into the tensor the block before left, so that it is the same value everywhere; where someone put another tensor in between,
    the block's own input is replaced.
    """

    companions: tuple[OwnOutput, ...] = ()
    in_place = True

    @property
    def whole(self) -> bool:
        return True

    def apply(self, call: Call, fire: Callback) -> None:
        entering = call.input()
        own = self.companions[0].kept.pop(id(self.companions[0].module), None)
        value, changed = fire(entering)
        if changed and own is entering:
            entering.copy_(value)
        elif changed:
            call.set_input(match_memory_layout(value, entering))

    def as_output(self) -> Output:
        """The same value where the block before leaves it, for tools that write to modules without hooks of ours."""
        return Output(self.name, self.companions[0].module, "post", order=1)


@dataclass(frozen=True)
class HeadAxis:
    """How a norm of queries, keys or values sees their heads: apart (before or behind the positions), or side by side in the last axis."""

    n_heads: int
    apart: bool
    first: bool

    def shown(self, value: Tensor) -> Tensor:
        """``[row pos head …]``; a scale that all heads share has one head."""
        if not self.apart:
            return split_heads(value, self.n_heads) if value.shape[-1] > 1 else value.unsqueeze(-2)
        return value.transpose(1, 2) if self.first else value

    def restored(self, value: Tensor) -> Tensor:
        """The inverse of :meth:`shown`."""
        if not self.apart:
            return value.flatten(-2)
        return value.transpose(1, 2) if self.first else value


@dataclass(eq=False)
class NormScale(Point):
    """The denominator of a norm: ``sqrt(mean(centred²) + eps)``; an edit divides by the new value instead."""

    spec: NormSpec = field(default_factory=lambda: NormSpec("eps"))
    heads: HeadAxis | None = None
    derived = True

    def apply(self, call: Call, fire: Callback) -> None:
        _, scale = norm_parts(call, self.spec)
        shown = scale if self.heads is None else self.heads.shown(scale)
        value, changed = fire(shown)
        if changed:
            value = value if self.heads is None else self.heads.restored(value)
            call.memo["scale"] = value
            call.memo.pop("normalized", None)
            rebuild_norm(call, self.spec, value != scale)


@dataclass(eq=False)
class NormNormalized(Point):
    """The normalised value before gain and bias; an edit goes through the norm's own gain and bias."""

    spec: NormSpec = field(default_factory=lambda: NormSpec("eps"))
    heads: HeadAxis | None = None
    derived = True

    def apply(self, call: Call, fire: Callback) -> None:
        before = normalized(call, self.spec)
        value, changed = fire(before if self.heads is None else self.heads.shown(before))
        if changed:
            value = value if self.heads is None else self.heads.restored(value)
            call.memo["normalized"] = value
            rebuild_norm(call, self.spec, (value != before).any(-1, keepdim=True))


def norm_parts(call: Call, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """Centred input and denominator of a norm call, in the precision the module itself uses."""
    if "centred" not in call.memo:
        x = call.input()
        call.memo["dtype"] = x.dtype
        x = x.float() if spec.upcast else x
        centred = x - x.mean(-1, keepdim=True) if spec.centred else x
        eps = getattr(computing(call.module), spec.eps)
        call.memo["centred"] = centred
        call.memo["scale"] = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt().to(call.memo["dtype"])
    return call.memo["centred"], call.memo["scale"]


def normalized(call: Call, spec: NormSpec) -> Tensor:
    """The normalised value of a norm call, before gain and bias."""
    centred, scale = norm_parts(call, spec)
    if "normalized" not in call.memo:
        call.memo["normalized"] = (centred / scale.to(centred.dtype)).to(call.memo["dtype"])
    return call.memo["normalized"]


def apply_gain(module: nn.Module, spec: NormSpec, value: Tensor) -> Tensor:
    """Gain and bias of a norm module on a normalised value."""
    weight, bias = norm_weights(module)
    if weight is None:
        return value
    if spec.gain_upcast:
        out = (value.float() * (spec.offset + weight.float())).to(value.dtype)
    else:
        out = value * (spec.offset + weight if spec.offset else weight)
    return out if bias is None else out + bias


def rebuild_norm(call: Call, spec: NormSpec, changed: Tensor) -> None:
    """Recompute a norm's output at the ``changed`` positions from the (edited) scale and normalised value in the call's memo."""
    call.memo["changed"] = changed = call.memo.get("changed", torch.zeros_like(changed)) | changed
    original = call.memo.setdefault("original", call.tensor())
    call.set_tensor(rebuilt_where(changed, original, apply_gain(call.module, spec, normalized(call, spec))))


@dataclass(eq=False)
class PositionEmbedding(Point):
    """What the embedding module adds for position; zero for tokens inserted afterwards (registers). An edit adds the difference."""

    kind: str = "table"
    weight: str = ""
    n_inserted: int = 0
    derived = True

    def apply(self, call: Call, fire: Callback) -> None:
        out = call.tensor()
        with torch.no_grad(), present(call.module):
            before = self.positions(call, out).to(out.dtype).expand_as(out).clone()
        if torch.is_grad_enabled() and out.requires_grad:
            before.requires_grad_(True)
        value, changed = fire(before)
        if changed:
            edited = not torch.equal(value, before)
            rebuilt = out + (value - before.detach())
            call.set_tensor(rebuilt if edited else substitute(out, rebuilt))

    def positions(self, call: Call, out: Tensor) -> Tensor:
        """The position embedding of this call, as the module computes it."""
        module: Any = call.module
        table = getattr(module, self.weight)
        table = embedding_weight(table, out.dtype, out.device) if isinstance(table, nn.Module) else table
        length = out.shape[1] - self.n_inserted
        if self.kind == "table":
            ids = call.kwargs.get("position_ids")
            return table[ids] if ids is not None else table[None, :length]
        if self.kind == "resized":
            shapes = call.args[1] if len(call.args) > 1 else call.kwargs["spatial_shapes"]
            side = int(table.shape[0] ** 0.5)
            return module.resize_positional_embeddings(table.reshape(side, side, -1), shapes, max_length=length)
        pixels = call.input("pixel_values")
        if self.kind == "grid_always" or call.kwargs.get("interpolate_pos_encoding"):
            found = module.interpolate_pos_encoding(out[:1, :length], pixels.shape[-2], pixels.shape[-1])
        else:
            found = table
        found = found if found.ndim == 3 else found[None]
        if not self.n_inserted:
            return found
        gap = found.new_zeros(found.shape[0], self.n_inserted, found.shape[-1])
        return torch.cat([found[:, :1], gap, found[:, 1:]], dim=1)


POOL_SITES = ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z")


@dataclass(eq=False)
class PoolAttention(Point):
    """One stage of an ``nn.MultiheadAttention`` pooling, recomputed from its weights: the stages share the call's memo in ``POOL_SITES`` order.

    q ``[row 1 head d_head]``, k, v ``[row pos head d_head]``, scores and pattern ``[row head 1 pos]``, z ``[row 1 head d_head]``.
    """

    stage: str = "hook_q"
    derived = True

    def apply(self, call: Call, fire: Callback) -> None:
        before = self.value(call)
        value, changed = fire(before)
        if not changed:
            return
        rows = (value != before).flatten(1).any(1).view(-1, 1, 1)
        edited = rows | call.memo.get("edited", torch.zeros_like(rows))
        call.memo.update({"edited": edited, self.stage: value})
        for later in POOL_SITES[POOL_SITES.index(self.stage) + 1 :]:
            if later not in ("hook_k", "hook_v") or self.stage not in ("hook_q", "hook_k"):
                call.memo.pop(later, None)
        module: Any = call.module
        z = merge_heads(self.stage_value(call, "hook_z"), module.num_heads)
        _, _, weight, bias = attention_weights(module)
        rebuilt = nn.functional.linear(z, weight, bias)
        original = call.memo.setdefault("original", call.tensor())
        call.set_tensor(rebuilt_where(edited, original, rebuilt))

    def value(self, call: Call) -> Tensor:
        """This stage's value in the current call."""
        return self.stage_value(call, self.stage)

    def stage_value(self, call: Call, stage: str) -> Tensor:
        """The value of any stage, computed from the stages before it, each at most once per call."""
        if stage in call.memo:
            return call.memo[stage]
        module: Any = call.module
        if stage in ("hook_q", "hook_k", "hook_v"):
            index = POOL_SITES.index(stage)
            source = call.args[index] if len(call.args) > index else call.kwargs[("query", "key", "value")[index]]
            weight, bias, _, _ = attention_weights(module)
            own = None if bias is None else bias.chunk(3)[index]
            value = split_heads(nn.functional.linear(source, weight.chunk(3)[index], own), module.num_heads)
        elif stage == "hook_attn_scores":
            q, k = self.stage_value(call, "hook_q"), self.stage_value(call, "hook_k")
            value = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            mask = call.kwargs.get("attn_mask")
            if mask is not None:
                mask = mask.view(value.shape[0], -1, *mask.shape[-2:]) if mask.ndim == 3 else mask
                floor = torch.finfo(value.dtype).min
                value = value.masked_fill(~mask, floor) if mask.dtype == torch.bool else (value + mask).clamp(min=floor)
        elif stage == "hook_pattern":
            value = self.stage_value(call, "hook_attn_scores").softmax(-1)
        else:
            value = torch.einsum(
                "bhqk,bkhd->bqhd", self.stage_value(call, "hook_pattern"), self.stage_value(call, "hook_v")
            )
        call.memo[stage] = value
        return value
