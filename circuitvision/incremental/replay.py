"""Handing back: forwards replaced on instances for the length of one run, and the structures that modules return.

A replaced forward leaves the module's torch hooks in place, those of other tools included: they act on what is handed back as they acted on what
was computed. It is replaced for the thread of the run alone; called from another one the module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from circuitvision.model.attention import PrefixKV


class CannotResume(Exception):
    """This model, or this call of it, is not one the incremental forward understands; the message says why."""


@dataclass(eq=False)
class BaseRun:
    """What the recorded run, unedited or under a base of edits, left behind, as far as resumed runs need it."""

    output: Tensor
    results: dict[int, Any] = field(default_factory=dict)
    """Module id -> what its forward returned."""
    arguments: dict[int, Tensor] = field(default_factory=dict)
    """Module id -> its first argument."""
    cached: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Block id -> the keys and values it left in the cache."""
    prefix_kv: dict[int, PrefixKV] = field(default_factory=dict)
    """Attention module id -> what entered its kernel."""
    rows: dict[tuple[str, int], int] = field(default_factory=dict)
    """(site, pass) -> how many rows each site of the base had."""
    versions: dict[int, int] = field(default_factory=dict)
    completing: set[int] = field(default_factory=set)
    """Ids of modules whose result completes a suffix of the positions, and is handed back by no other run."""


class Overrides:
    """Forwards replaced on instances, and torch hooks, for the length of one run."""

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Module, Any]] = []
        self._handles: list[Any] = []

    def forward(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace ``module.forward`` by ``make(original)``."""
        before = module.__dict__.get("forward")
        original = module.forward
        self._kept.append((module, before))
        module.__dict__["forward"] = _in_this_thread(make(original), original)

    def enter(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Change a module's arguments before any hook sees them."""
        own = _in_this_thread(hook, _nothing)
        self._handles.append(module.register_forward_pre_hook(own, prepend=True, with_kwargs=True))

    def leave(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Change a module's output after every hook has seen it."""
        self._handles.append(module.register_forward_hook(_in_this_thread(hook, _nothing)))

    def restore(self) -> None:
        """Put everything back."""
        for handle in self._handles:
            handle.remove()
        for module, before in reversed(self._kept):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
        self._kept.clear()
        self._handles.clear()


class ForeignHookDetector:
    """Notices hooks of others that change what a module is called with, or what it returns."""

    def __init__(self, model: nn.Module) -> None:
        self.changed = ""
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if module._forward_pre_hooks or module._forward_hooks:
                self._watch(name or type(module).__name__, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        seen: dict[str, Any] = {}

        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen["in"] = _stamps((args, kwargs))

        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._compare(name, seen["in"], (args, kwargs))

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            seen["out"] = _stamps(output)

        def left(module: nn.Module, args: Any, output: Any) -> None:
            self._compare(name, seen["out"], output)

        first, second, third, last = (_in_this_thread(hook, _nothing) for hook in (entering, entered, leaving, left))
        self._handles += [
            module.register_forward_pre_hook(first, prepend=True, with_kwargs=True),
            module.register_forward_pre_hook(second, with_kwargs=True),
            module.register_forward_hook(third, prepend=True),
            module.register_forward_hook(last),
        ]

    def _compare(self, name: str, before: Any, now: Any) -> None:
        if _stamps(now) != before:
            self.changed = name

    def close(self) -> None:
        """Remove every handle."""
        for handle in self._handles:
            handle.remove()


def _in_this_thread(here: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is ``here`` in the thread that makes it, and ``elsewhere`` in any other."""
    thread = get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return here(*args, **kwargs) if get_ident() == thread else elsewhere(*args, **kwargs)

    return chosen


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _stamps(value: Any) -> list[Any]:
    """Which tensors a structure holds, and how often each was written into."""
    if isinstance(value, Tensor):
        return [(id(value), None if value.is_inference() else value._version)]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [stamp for item in value for stamp in _stamps(item)] if isinstance(value, (tuple, list)) else []


def repeated(value: Any, copies: int) -> Any:
    """A tensor, or every tensor of a structure, repeated along its rows; a single row is only expanded, and left where others have several: it is
    shared by all."""
    if copies == 1 or value is None:
        return value
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        if value.shape[0] == 1:
            return value.expand(copies, *value.shape[1:])
        return value.repeat(copies, *([1] * (value.ndim - 1)))
    if isinstance(value, (tuple, list)):
        rows = [item.shape[0] if isinstance(item, Tensor) and item.ndim else 0 for item in value]
        shared = [own == 1 < max(rows, default=0) for own in rows]
        return type(value)(item if one else repeated(item, copies) for item, one in zip(value, shared, strict=True))
    if isinstance(value, Mapping):
        return type(value)(**{name: repeated(item, copies) for name, item in value.items()})
    raise CannotResume(f"a module returned a {type(value).__name__}, which cannot be repeated")


def rows_of_group(output: Tensor, unedited: Tensor, number: int, copies: int) -> Tensor:
    """The output of one group of ``copies``; dual encoders compare rows with columns, either of which may be repeated."""
    rows = unedited.shape[0]
    if output.shape[0] == rows * copies:
        output = output[number * rows : (number + 1) * rows]
    if output.ndim == 2 and output.shape[1] == unedited.shape[1] * copies:
        output = output[:, number * unedited.shape[1] : (number + 1) * unedited.shape[1]]
    return output


def is_plain(value: Any) -> bool:
    """Whether a module's result holds nothing but tensors, so that it can be handed back."""
    if value is None or isinstance(value, Tensor):
        return True
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return isinstance(value, Mapping) and all(map(is_plain, value.values()))


def tensors_of(clean: BaseRun) -> Iterator[Tensor]:
    """Every tensor that may be handed back."""
    for value in (*clean.results.values(), *clean.arguments.values()):
        yield from tensors_in(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a structure that show whether they were written into."""
    if isinstance(value, Tensor):
        if not value.is_inference():
            yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def fresh(value: Any) -> Any:
    """A structure of its own around the same tensors."""
    if isinstance(value, Mapping):
        return type(value)(**dict(value.items()))
    return list(value) if isinstance(value, list) else value
