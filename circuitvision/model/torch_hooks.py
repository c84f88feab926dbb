"""Where a torch hook of ours stands among those of others on one module.

Handles come before the torch hooks of others, which see edited values: transformers records hidden states with hooks, LLaVA's projector reads
that record, and an edit made after the recording would be lost. They come after those of other wrappers, whose edits they see.

Not covered: hooks that others put first after ours were placed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Placed = tuple[Any, dict[int, bool], int]
"""A torch hook in place: the module's table of hooks, its table of those that want keywords, and the key in both. Torch's own handles hold weak
references to these tables, which costs a cached run more than its hooks do."""


def placed(hooks: Any, hook: Callable[..., Any], with_kwargs: dict[int, bool]) -> Placed:
    """Put a hook before those of others, but after those of other wrappers."""
    key = next_key()
    with_kwargs[key] = True
    if not hooks:
        hooks[key] = hook
        return hooks, with_kwargs, key
    ours = [other for other in hooks if getattr(hooks[other], "__module__", "") == hook.__module__]
    hooks[key] = hook
    for other in (key, *reversed(ours)):
        hooks.move_to_end(other, last=False)
    return hooks, with_kwargs, key


def placed_first(module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = False) -> Placed:
    """Put a hook before every other that runs before a module."""
    key, hooks = next_key(), module._forward_pre_hooks
    hooks[key] = hook
    hooks.move_to_end(key, last=False)  # type: ignore[attr-defined]
    if with_kwargs:
        module._forward_pre_hooks_with_kwargs[key] = True
    return hooks, module._forward_pre_hooks_with_kwargs, key


def next_key() -> int:
    """A number that no handle of torch has or will get."""
    key = RemovableHandle.next_id
    RemovableHandle.next_id = key + 1
    return key
