"""Edits in a run: the hooks of a batch of bound groups, each of which writes into its own rows of every tensor.

One hook per site serves all groups: each write gets the view of its own rows and the window of positions the pass covers. A single ``run`` is a batch
of one group, so there is one write path. The compiler's base acts in every group, before the group's own edits; where a resumed run has not repeated
the rows yet, no group has an edit and the base acts alone.
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
        self,
        binder: EditCompiler,
        groups: Sequence[CompiledEdits],
        first: Mapping[str, int] | None = None,
        rows: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        self.binder, self.groups, self.base = binder, list(groups), binder.base
        self.first = dict(first or {})
        """Tower -> the first position its resumed run computes."""
        self.rows = dict(rows or {})
        """(site, pass) -> how many rows a single run has at the sites of the base."""
        self.seen: dict[tuple[str, int], int] = {}
        """(site, pass) -> how many rows the values had that were written."""
        self.captured: list[dict[Any, Any]] = [dict(binder.values.given) for _ in groups]
        self.known: set[str] = set()
        """Sites whose value is known from the unedited run, and which the run does not reach."""

    def __provenance__(self) -> dict[str, Any]:
        return {"edits": [[*self.base.group, *group.group] for group in self.groups]}

    def hooks(self) -> dict[str, list[Hook]]:
        """One hook per site that some group writes, or whose value it needs later."""
        written = {name for group in (self.base, *self.groups) for name in group.writes}
        captured = {name for group in (self.base, *self.groups) for name in group.captures} - self.known
        sites = written | captured
        return {name: [self._hook] for name in self.binder.model.engine.points if name in sites}

    def _hook(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        place = (hook.name, hook.step)
        self.seen[place] = value.shape[0]
        alone = len(self.groups) > 1 and self.rows.get(place) == value.shape[0]
        groups = [CompiledEdits(())] if alone else self.groups
        rows = value.shape[0] // len(groups)
        first = self.first.get(SiteName.parse(hook.name).tower, 0)
        before, needed = (table.get(hook.name, []) for table in (self.base.writes, self.base.captures))
        wrote = False
        for number, group in enumerate(groups):
            edits = [*before, *group.writes.get(hook.name, ())]
            needs = [] if hook.name in self.known else [*needed, *group.captures.get(hook.name, ())]
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
def edited(binder: EditCompiler, bound: CompiledEdits | None = None) -> Iterator[dict[tuple[str, int], int]]:
    """The edits of one group, behind the base, act in every run inside the block; without a group the base alone.

    Gives how many rows each site had in each pass, filled by the runs.
    """
    bound = CompiledEdits(()) if bound is None else bound
    applier = EditApplier(binder, [bound])
    forward = applier.hooks()
    if not forward:
        yield applier.seen
        return
    exact = frozenset((*binder.base.sites, *bound.sites))
    with binder.model.engine.registered(Registration(forward=forward, exact=exact)):
        yield applier.seen


def _from_position_0(value: Tensor, window: PositionWindow) -> Tensor:
    """A copy of a window's values that is indexed by absolute positions."""
    if not window.first:
        return value.clone()
    before = value.new_zeros(value.shape[0], window.first, *value.shape[2:])
    return torch.cat([before, value], dim=1)
