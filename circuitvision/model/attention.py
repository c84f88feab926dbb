"""The attention function: how scores, pattern and rotated queries and keys become visible, for one run at a time.

Fused kernels never form scores, so a run that asks for them switches every attention module of the model to the function registered here. It calls
the *model file's own* ``eager_attention_forward`` and intercepts the one softmax inside it: the softmax's input is the scores (scaled, soft-capped
and masked, whatever the model does), its output the pattern. Nothing is re-implemented, so such a run equals the model's eager run bit for bit.

The mask half must be registered too: transformers builds no mask at all for a name it does not know. The eager mask is additive.

Keys and values arrive here after they entered the cache; a changed copy would be seen by this call alone. ``hook_rot_k`` is therefore written into
the tensor it arrives in, which is the cached one.

Eager runs have limits of their own: in float64 a left-padded decoder gives NaN, because eager attention takes its softmax in float32, where the
mask's minimum overflows. Run such inputs in float32, or leave scores and patterns out.

Not covered: caches of a fixed size (own positions are taken to be the last ones).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from circuitvision.errors import HookError

NAME = "circuitvision"
Fire = Callable[[Tensor], "tuple[Tensor, bool]"]


@runtime_checkable
class Suspendable(Protocol):
    """Whoever owns the hooks: while ``suspended``, none fires."""

    suspended: bool


@dataclass(frozen=True)
class Stages:
    """What to run inside one module's attention: ``fires`` by site name; ``only_reads`` if no fire can change its value."""

    fires: Mapping[str, Fire]
    only_reads: bool
    owner: Suspendable


_ACTIVE: dict[int, Stages] = {}


class _Softmax(TorchFunctionMode):
    """Runs the score and pattern hooks around the first softmax it sees."""

    def __init__(self, stages: Mapping[str, Fire], dtype: torch.dtype) -> None:
        super().__init__()
        self.stages, self.dtype, self.seen = stages, dtype, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (nn.functional.softmax, torch.softmax, Tensor.softmax):
            return func(*args, **kwargs)
        self.seen += 1
        if self.seen > 1:
            return func(*args, **kwargs)
        key = "input" if "input" in kwargs else None
        scores = kwargs[key] if key else args[0]
        if "hook_attn_scores" in self.stages:
            scores, _ = self.stages["hook_attn_scores"](scores)
        out = func(**{**kwargs, key: scores}) if key else func(scores, *args[1:], **kwargs)
        if "hook_pattern" in self.stages:
            out, _ = self.stages["hook_pattern"](out.to(self.dtype))
        return out


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention, with the hooks that are active for ``module``."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise HookError(
            f"{type(module).__name__} has no eager attention of its own, so its scores and pattern cannot be seen."
        )
    stages = _ACTIVE.get(id(module))
    if stages is None or stages.owner.suspended:
        return eager(module, query, key, value, attention_mask, **kwargs)
    fires = stages.fires
    if stages.only_reads and fires.keys() == {"hook_pattern"} and not module.training:
        # Without dropout the weights that eager attention returns are the pattern itself, so no softmax has to be intercepted.
        out = eager(module, query, key, value, attention_mask, **kwargs)
        fires["hook_pattern"](out[1])
        return out
    query, key = _rotated(query, key, fires)
    with _Softmax(fires, query.dtype) as mode:
        out = eager(module, query, key, value, attention_mask, **kwargs)
    if mode.seen != 1:
        raise HookError(
            f"{type(module).__name__} ran {mode.seen} softmaxes in one attention call; exactly one was expected."
        )
    return out


def _rotated(query: Tensor, key: Tensor, stages: Mapping[str, Fire]) -> tuple[Tensor, Tensor]:
    if "hook_rot_q" in stages:
        value, changed = stages["hook_rot_q"](query.transpose(1, 2))
        query = value.transpose(1, 2) if changed else query
    if "hook_rot_k" in stages:
        own = key[:, :, -query.shape[2] :]
        value, changed = stages["hook_rot_k"](own.transpose(1, 2))
        if changed:
            own.copy_(value.transpose(1, 2))
    return query, key


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)


class Switch:
    """Turns :func:`attention` on for one model; which modules hold a config is found once, when it is first used."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._holders: list[nn.Module] = []

    def _configs(self) -> list[Any]:
        if not self._holders:
            self._holders = [module for module in self.model.modules() if hasattr(module, "config")]
        configs = {id(holder.config): holder.config for holder in self._holders}
        return [config for config in configs.values() if hasattr(config, "_attn_implementation_internal")]

    @contextlib.contextmanager
    def on(self, active: dict[int, Stages]) -> Iterator[None]:
        """Use :func:`attention` in every attention module inside the block, then restore each config's own implementation.

        Raises HookError if another wrapper is already inside the attention of this model.
        """
        configs = self._configs()
        before = [config._attn_implementation_internal for config in configs]
        if _ACTIVE.keys() & active.keys():
            raise HookError(
                "Another wrapper already hooks the attention of this model; use one HookedModel per module."
            )
        try:
            for config in configs:
                config._attn_implementation_internal = NAME
            _ACTIVE.update(active)
            yield
        finally:
            for module_id in active:
                _ACTIVE.pop(module_id, None)
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation_internal = implementation
