"""Edits in a run: the hooks of a batch of bound groups, each of which writes into its own rows of every tensor.

One hook per site serves all groups: each write gets the view of its own rows and the window of positions the pass covers. A single ``run`` is a batch
of one group, so there is one write path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitvision.model.edits.base import naming
from circuitvision.model.edits.binding import CompiledEdits, EditCompiler
from circuitvision.model.positions import UNBOUNDED, PositionWindow
from circuitvision.model.registrations import Registration
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.registrations import Hook, HookPoint


class EditApplier:
    """The hooks of a batch of bound groups: block ``i`` of every tensor's rows belongs to group ``i``."""

    def __init__(
        self, binder: EditCompiler, groups: Sequence[CompiledEdits], first: Mapping[str, int] | None = None
    ) -> None:
        self.binder, self.groups = binder, list(groups)
        self.first = dict(first or {})
        """Tower -> the first position its resumed run computes."""
        self.captured: list[dict[Any, Any]] = [dict(binder.values.given) for _ in groups]
        self.known: set[str] = set()
        """Sites whose value is known from the unedited run, and which the run does not reach."""

    def __provenance__(self) -> dict[str, Any]:
        return {"edits": [list(group.group) for group in self.groups]}

    def hooks(self) -> dict[str, list[Hook]]:
        """One hook per site that some group writes, or whose value it needs later."""
        written = {name for group in self.groups for name in group.writes}
        captured = {name for group in self.groups for name in group.captures} - self.known
        sites = written | captured
        return {name: [self._hook] for name in self.binder.model.engine.points if name in sites}

    def _hook(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        rows = value.shape[0] // len(self.groups)
        first = self.first.get(SiteName.parse(hook.name).tower, 0)
        wrote = False
        for number, group in enumerate(self.groups):
            edits = group.writes.get(hook.name, ())
            needs = () if hook.name in self.known else group.captures.get(hook.name, ())
            if not edits and not needs:
                continue
            view = value[number * rows : (number + 1) * rows]
            window = self.binder.windows.passing(hook, view, rows, first)
            given = self.captured[number]
            for edit in edits:
                with naming(edit):
                    if self.binder.windows.of(hook.name) is None and hook.step == 0:
                        edit.positions.check(window, UNBOUNDED)
                    edit.write(view, window, hook, given)
                wrote = True
            for edit in needs:
                given[edit, hook.name] = _from_position_0(view, window)
        return value if wrote else None


@contextlib.contextmanager
def edited(binder: EditCompiler, bound: CompiledEdits) -> Iterator[None]:
    """The edits of one group act in every run inside the block."""
    forward = EditApplier(binder, [bound]).hooks()
    if not forward:
        yield
        return
    with binder.model.engine.registered(Registration(forward=forward, exact=frozenset(bound.sites))):
        yield


def _from_position_0(value: Tensor, window: PositionWindow) -> Tensor:
    """A copy of a window's values that is indexed by absolute positions."""
    if not window.first:
        return value.clone()
    before = value.new_zeros(value.shape[0], window.first, *value.shape[2:])
    return torch.cat([before, value], dim=1)
