"""The attention function: how scores, pattern and rotated queries and keys become visible, for one run at a time.

Fused kernels never form scores, so a run that asks for them switches every attention module of the model to the function registered here. It calls
the *model file's own* ``eager_attention_forward`` and intercepts the one softmax inside it: the softmax's input is the scores (scaled, soft-capped
and masked, whatever the model does), its output the pattern. Nothing is re-implemented, so such a run equals the model's eager run bit for bit.

The mask half must be registered too: transformers builds no mask at all for a name it does not know. The eager mask is additive.

Keys and values arrive here after they entered the cache; a changed copy would be seen by this call alone. ``hook_rot_k`` is therefore written into
the tensor it arrives in, which is the cached one; where a cache of fixed size hands out a copy, the cache gets the edited keys as well.

A cache of fixed size hands out empty slots behind the tokens it holds. Before each call the cache itself is asked how many keys are tokens
(:class:`Slots`), and hooks see those alone: scores, patterns and keys have the shapes they have with a cache that grows.

Masks of the caller's own reach attention as they are. A boolean one (true: may look) is made additive, as sdpa understands it.

Eager runs have limits of their own: in float64 a left-padded decoder gives NaN, because eager attention takes its softmax in float32, where the
mask's minimum overflows. Run such inputs in float32, or leave scores and patterns out.

Resumed runs (see ``resume.py``) compute a suffix of the positions. Their attention modules carry a :class:`PrefixKV`, which in the unedited run keeps
the keys, values and mask that enter the kernel, and later puts the kept keys and values of the earlier positions before the suffix's own. The
kernel stays the module's own: eager, or sdpa under a second registered name.

The switch is a setting of the config, which all threads share. Only the thread that made it takes part: the masks and kernels of any other thread are
those of the implementation the config had before.

Not covered: edits of ``hook_rot_k`` in quantised and offloaded caches, which keep another copy of the keys than the one attention gets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from circuitvision.errors import HookError
from circuitvision.model.settings import entries

NAME = "circuitvision"
_IMPLEMENTATION = "_attn_implementation_internal"
"""The entry of a config that says which attention function its modules call."""
FUSED = "circuitvision_fused"
"""The name under which modules keep their sdpa kernel while taps are in place."""
Callback = Callable[[Tensor], "tuple[Tensor, bool]"]


@runtime_checkable
class Suspendable(Protocol):
    """Whoever owns the hooks: they fire only where it ``acts``."""

    def acts(self) -> bool:
        """Whether hooks fire in this thread, now."""
        ...


@dataclass(eq=False)
class Slots:
    """Which keys of one module's cache hold tokens in the current call."""

    layer: Any = None
    """The cache's layer, or None without a cache."""
    filled: int | None = None
    """Tokens seen so far, this call's included: where there are more keys, the others are empty slots behind them; None without a cache."""

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Ask the cache, before the module puts this call's keys into it (a forward pre-hook)."""
        self.forget()
        cache, index = kwargs.get("past_key_values"), getattr(module, "layer_idx", None)
        if cache is None or index is None or index >= len(cache.layers):
            return
        stream = args[0] if args else kwargs["hidden_states"]
        self.layer = cache.layers[index]
        self.filled = int(cache.get_seq_length(index)) + stream.shape[1]

    def forget(self) -> None:
        """Let go of the cache."""
        self.layer, self.filled = None, None

    def count(self, keys: int) -> int:
        """How many of so many keys are tokens."""
        return keys if self.filled is None else min(self.filled, keys)

    def keep(self, key: Tensor) -> None:
        """Put edited keys into the cache where attention got a copy of them; HookError where that is not possible."""
        if self.layer is None:
            return
        kept: Any = getattr(self.layer, "keys", None)
        if kept is None or kept.ndim != 4 or hasattr(self.layer, "_quantized_keys"):
            raise HookError(
                f"{type(self.layer).__name__} keeps other keys than attention gets, so hook_rot_k cannot be edited."
            )
        if kept.untyped_storage().data_ptr() == key.untyped_storage().data_ptr():
            return
        if kept.device != key.device or kept.dtype != key.dtype or kept.shape[2] > key.shape[2]:
            raise HookError(f"{type(self.layer).__name__} keeps its keys elsewhere, so hook_rot_k cannot be edited.")
        kept.copy_(key[:, :, -kept.shape[2] :])


@dataclass(frozen=True)
class AttentionHooks:
    """What to run inside one module's attention: ``fires`` by site name; ``only_reads`` if no fire can change its value."""

    fires: Mapping[str, Callback]
    only_reads: bool
    owner: Suspendable
    slots: Slots = field(default_factory=Slots)

    def fire(self, name: str, value: Tensor) -> Tensor:
        """Run the hooks of scores or a pattern ``[row head query key]``, on the keys that are tokens."""
        count = self.slots.count(value.shape[-1])
        if count == value.shape[-1]:
            return self.fires[name](value)[0]
        new, changed = self.fires[name](value[..., :count].contiguous())
        return torch.cat([new, value[..., count:]], dim=-1) if changed else value


@dataclass(eq=False)
class PrefixKV:
    """What enters one attention kernel: kept in the unedited run, and completed in a resumed one (``first > 0``)."""

    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    biased: bool = False
    """Whether the kernel is given a bias of the scores, made for all positions at once."""
    first: int = 0
    copies: int = 1

    def resumed(self, first: int, copies: int) -> PrefixKV:
        """The tap of a run that computes the positions from ``first`` on, for ``copies`` times the rows."""
        return dataclasses.replace(self, first=first, copies=copies)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        """Keys, values, mask and keywords for the kernel."""
        if self.first == 0:
            causal = kwargs.get("is_causal")
            self.causal = mask is None and bool(getattr(module, "is_causal", False) if causal is None else causal)
            self.biased = kwargs.get("position_bias") is not None
            self.key, self.value, self.mask = key, value, mask
            return key, value, mask, kwargs
        assert self.key is not None
        assert self.value is not None
        mask = self._mask(query, mask)
        # The mask says it all; the kernel's own causal rule would count queries from the first key.
        kwargs = {**kwargs, "is_causal": False} if "is_causal" in kwargs else kwargs
        return self._completed(self.key, key), self._completed(self.value, value), mask, kwargs

    def _completed(self, before: Tensor, own: Tensor) -> Tensor:
        before = before[:, :, : self.first]
        if before.shape[0] != own.shape[0]:
            before = (
                before.repeat(self.copies, 1, 1, 1) if before.shape[0] > 1 else before.expand(own.shape[0], -1, -1, -1)
            )
        return torch.cat([before, own], dim=2)

    def _mask(self, query: Tensor, mask: Tensor | None) -> Tensor | None:
        first, length = self.first, query.shape[2]
        if mask is None:
            if not self.causal:
                return None
            keys = torch.arange(first + length, device=query.device)
            return (keys[None] <= keys[first:, None])[None, None]
        mask = mask[:, :, first:] if mask.shape[2] != length else mask
        return mask.repeat(self.copies, 1, 1, 1) if 1 < mask.shape[0] < query.shape[0] else mask

    def farthest(self, real: Tensor) -> Tensor | None:
        """The last key that each position can see, over all rows, −1 where the position is padding in every row; None if the mask does not tell."""
        assert self.key is not None
        length = real.shape[1]
        if self.biased or self.key.shape[2] != length:
            return None
        if self.mask is None:
            return torch.arange(length) if self.causal else torch.full((length,), length - 1)
        mask = self.mask.detach().cpu()
        if mask.shape[-2:] != (length, length):
            return None
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = seen.any(1) & real[:, :, None]
        return torch.where(seen, torch.arange(length), -1).amax(dim=(0, 2))


_PREFIX_KV: dict[int, PrefixKV] = {}
_ACTIVE: dict[int, AttentionHooks] = {}
_SWITCHED: dict[int, tuple[int, str]] = {}
"""Config id -> the thread that switched it, and the implementation it had before."""
_LOCK = threading.Lock()


def _elsewhere(config: Any) -> str | None:
    """The implementation that a thread keeps while another one has switched ``config``; None in the thread that did."""
    switched = _SWITCHED.get(id(config))
    if switched is None:
        # Switched back since the name was looked up.
        current = getattr(config, _IMPLEMENTATION, NAME)
        return None if current in (NAME, FUSED) else current
    thread, before = switched
    return None if thread == get_ident() else before or "eager"


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the file that defines ``module``."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise HookError(
            f"{type(module).__name__} has no eager attention of its own, so its scores and pattern cannot be seen."
        )
    return eager


class _Softmax(TorchFunctionMode):
    """Runs the score and pattern hooks around the first softmax it sees."""

    def __init__(self, stages: AttentionHooks, dtype: torch.dtype) -> None:
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
        if "hook_attn_scores" in self.stages.fires:
            scores = self.stages.fire("hook_attn_scores", scores)
        out = func(**{**kwargs, key: scores}) if key else func(scores, *args[1:], **kwargs)
        if "hook_pattern" in self.stages.fires:
            out = self.stages.fire("hook_pattern", out.to(self.dtype))
        return out


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention, with the tap and the hooks that are active for ``module``."""
    eager = _eager_of(module)
    other = _elsewhere(getattr(module, "config", None))
    if other is not None:
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(other, eager)
        return kernel(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, hidden)
    stages = _ACTIVE.get(id(module))
    tap = _PREFIX_KV.get(id(module))
    if tap is not None and tap.first == 0:
        key, value, attention_mask, kwargs = tap(module, query, key, value, attention_mask, kwargs)
    if tap is not None and tap.first:
        if stages is not None:
            query, key = _rotated(query, key, stages)
        key, value, attention_mask, kwargs = tap(module, query, key, value, attention_mask, kwargs)
        if stages is not None:
            stages = dataclasses.replace(stages, fires=_without_rotated(stages.fires), only_reads=False)
    if stages is None or not stages.owner.acts():
        return eager(module, query, key, value, attention_mask, **kwargs)
    fires = stages.fires
    if stages.only_reads and fires.keys() == {"hook_pattern"} and not module.training:
        # Without dropout the weights that eager attention returns are the pattern itself, so no softmax has to be intercepted.
        out = eager(module, query, key, value, attention_mask, **kwargs)
        stages.fire("hook_pattern", out[1])
        return out
    query, key = _rotated(query, key, stages)
    with _Softmax(stages, query.dtype) as mode:
        out = eager(module, query, key, value, attention_mask, **kwargs)
    if mode.seen != 1:
        raise HookError(
            f"{type(module).__name__} ran {mode.seen} softmaxes in one attention call; exactly one was expected."
        )
    return out


def fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The module's own sdpa attention, with the tap that is active for it."""
    other = _elsewhere(getattr(module, "config", None))
    tap = None if other is not None else _PREFIX_KV.get(id(module))
    if tap is not None:
        key, value, attention_mask, kwargs = tap(module, query, key, value, attention_mask, kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _without_rotated(fires: Mapping[str, Callback]) -> dict[str, Callback]:
    return {name: fire for name, fire in fires.items() if name not in ("hook_rot_q", "hook_rot_k")}


def _rotated(query: Tensor, key: Tensor, stages: AttentionHooks) -> tuple[Tensor, Tensor]:
    fires = stages.fires
    if "hook_rot_q" in fires:
        value, changed = fires["hook_rot_q"](query.transpose(1, 2))
        query = value.transpose(1, 2) if changed else query
    if "hook_rot_k" in fires:
        end = stages.slots.count(key.shape[2])
        own = key[:, :, end - query.shape[2] : end]
        # A cache may write over its keys in later steps; what a hook keeps must not change.
        seen = own if stages.slots.layer is None else own.clone()
        value, changed = fires["hook_rot_k"](seen.transpose(1, 2))
        if changed:
            own.copy_(value.transpose(1, 2))
            stages.slots.keep(key)
    return query, key


def _mask_of(own: Callable[..., Any]) -> Callable[..., Any]:
    """The mask function ``own``, for the thread that switched the config; that of the config's own implementation for any other."""

    def mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
        other = _elsewhere(config)
        function = own if other is None else ALL_MASK_ATTENTION_FUNCTIONS[other]
        return function(*args, config=config, **kwargs)

    return mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask_of(eager_mask))
AttentionInterface.register(FUSED, fused)
AttentionMaskInterface.register(FUSED, _mask_of(sdpa_mask))


class AttentionBackend:
    """Turns :func:`attention` on for one model; which modules hold a config is found once, when it is first used."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._holders: list[nn.Module] = []

    def _configs(self) -> list[Any]:
        if not self._holders:
            self._holders = [module for module in self.model.modules() if hasattr(module, "config")]
        configs = {id(holder.config): holder.config for holder in self._holders}
        return [config for config in configs.values() if _IMPLEMENTATION in entries(config)]

    @contextlib.contextmanager
    def _implementations(self, choose: Callable[[str], str]) -> Iterator[None]:
        """Give every config the implementation that ``choose`` makes of its own inside the block, for this thread, then restore it.

        Raises HookError if another thread has switched one of them.
        """
        configs, thread = self._configs(), get_ident()
        with _LOCK:
            if any(_SWITCHED.get(id(config), (thread, ""))[0] != thread for config in configs):
                raise HookError(
                    "Another thread hooks the attention of this model. Use one thread at a time, or give each a copy of the model."
                )
            before = [(config, entries(config)[_IMPLEMENTATION], _SWITCHED.get(id(config))) for config in configs]
            for config, implementation, switched in before:
                _SWITCHED[id(config)] = switched or (thread, implementation)
                entries(config)[_IMPLEMENTATION] = choose(implementation)
        try:
            yield
        finally:
            with _LOCK:
                for config, implementation, switched in before:
                    entries(config)[_IMPLEMENTATION] = implementation
                    if switched is None:
                        del _SWITCHED[id(config)]
                    else:
                        _SWITCHED[id(config)] = switched

    @contextlib.contextmanager
    def with_prefix_kv(self, prefix_kv: Mapping[int, PrefixKV], eager: bool) -> Iterator[None]:
        """Put taps in place inside the block: every module keeps its own kernel, or takes the eager one.

        Raises HookError if taps of another sweep are in place.
        """
        if _PREFIX_KV.keys() & prefix_kv.keys():
            raise HookError("Another sweep already resumes runs of this model; let it end first.")
        own = {"sdpa": FUSED, "eager": NAME}
        with self._implementations(lambda implementation: NAME if eager else own.get(implementation, implementation)):
            try:
                _PREFIX_KV.update(prefix_kv)
                yield
            finally:
                for module_id in prefix_kv:
                    _PREFIX_KV.pop(module_id, None)

    @contextlib.contextmanager
    def on(self, active: dict[int, AttentionHooks]) -> Iterator[None]:
        """Use :func:`attention` in every attention module inside the block, then restore each config's own implementation.

        Raises HookError if another wrapper is already inside the attention of this model.
        """
        if _ACTIVE.keys() & active.keys():
            raise HookError(
                "Another wrapper already hooks the attention of this model; use one HookedModel per module."
            )
        with self._implementations(lambda implementation: NAME):
            try:
                _ACTIVE.update(active)
                yield
            finally:
                for module_id in active:
                    _ACTIVE.pop(module_id, None)
