"""Which positions of its tower a pass of a run computes: what edits choose their positions among.

Not covered: runs whose later passes hold several positions (prefill in chunks, prompt lookup, assistant models), which are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.axes import axis_of, crossed_tower, map_of, prefix_of, tower_of
from circuitvision.model.edits.base import Edit
from circuitvision.model.positions import UNBOUNDED, PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.registrations import HookPoint
    from circuitvision.model.wrapped import Wrapped

Mode = Literal["run", "generate", "act"]


class RunWindows:
    """The windows of one kind of run of a model on its inputs, by site."""

    def __init__(
        self,
        model: Wrapped,
        inputs: Mapping[str, Any],
        mode: Mode = "run",
        passes: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.inputs, self.mode = model, inputs, mode
        self.passes = passes
        """The most passes of the tower that runs several times, where their number is known."""
        self.settings = {**inputs, **(settings or {})}
        """Everything the model is called with."""
        self._windows: dict[str, PositionWindow | None] = {}
        self._maps: dict[str, Any] | None = None

    @property
    def maps(self) -> dict[str, Any]:
        """The token map of every tower, made once."""
        if self._maps is None:
            self._maps = self.model.tokens(self.inputs)
        return self._maps

    def of(self, site: str) -> PositionWindow | None:
        """The positions of a site's tower in the first pass; None where only the run itself can tell."""
        if site not in self._windows:
            self._windows[site] = self._made(SiteName.parse(site))
        return self._windows[site]

    def _made(self, name: SiteName) -> PositionWindow | None:
        tower = map_of(self.model, name)
        tokens = self.maps.get(tower)
        if tokens is None:
            return None
        length = tokens.n_positions
        axis = axis_of(
            self.model.towers[tower_of(self.model, name)], name, tokens, self.settings, self.mode == "generate"
        )
        crossed = crossed_tower(self.model, name) if name.is_pattern else ""
        prefix = self.maps.get(crossed or prefix_of(self.model, tower))
        if crossed and prefix is not None and prefix.n_rows != tokens.n_rows:
            raise InputError(
                f"{name}: the {crossed} tower runs {prefix.n_rows} rows for {tokens.n_rows} of the {tower} tower, so its keys are several rows' "
                "positions side by side, which edits cannot tell apart: give one image for each example"
            )
        before = None
        if prefix is not None:
            before = PositionWindow(prefix.tower, prefix.n_rows, 0, prefix.n_positions, prefix.n_positions, prefix)
        return PositionWindow(tower, tokens.n_rows, 0, length, length, tokens, axis, before, bool(crossed))

    def passing(self, hook: HookPoint, value: Tensor, rows: int, first: int) -> PositionWindow:
        """The window of one pass, for ``value`` of one group."""
        name = SiteName.parse(hook.name)
        axis = 2 if name.is_pattern else 1
        known = self.of(hook.name)
        length = int(value.shape[axis]) if value.ndim > axis else 1
        if known is None:
            return PositionWindow(name.tower, rows, 0, length, length)
        if known.axis.absent:
            return dataclasses.replace(known, first=0, length=length)
        repeats = self.repeats(name.tower)
        if repeats and length != (1 if hook.step else known.count):
            raise InputError(
                f"pass {hook.step} of the {name.tower} tower holds {length} positions: edits count positions by the cache, so leave "
                "use_cache on, and prefill_chunk_size, prompt_lookup_num_tokens and assistant models off"
            )
        if repeats and hook.step > 0:
            return dataclasses.replace(known, first=known.prompt + hook.step - 1, length=1)
        # Embeddings, and what follows a pooled tower's last block, have all positions in a resumed run as well.
        first = 0 if length == known.count else first
        return dataclasses.replace(known, first=first, length=known.prompt - first)

    def repeats(self, tower: str) -> bool:
        """Whether a tower adds positions, pass by pass."""
        return self.mode == "generate" and tower == self.model.family.tower_that_runs("per_token")

    def grows(self, edit: Edit, site: str) -> int:
        """How many positions later passes add to those of the prompt, where the edit acts in them."""
        if not self.repeats(SiteName.parse(site).tower) or edit.steps.kind == "prefill":
            return 0
        return UNBOUNDED if self.passes is None else max(self.passes - 1, 0)
