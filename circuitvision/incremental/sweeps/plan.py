"""What a sweep computed for one group of edits, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from circuitvision.incremental.routes import CONNECTOR, END, WHOLE, ResumePlan, ResumePoint
from circuitvision.storage import as_builtin, stored_as

NOTHING = "nothing changes"
"""The reason of a group that needs no run: its edits do nothing."""


@dataclass(frozen=True)
class Plan:
    """Where a group's run was resumed: from ``part`` ("" for all, "after attention's pattern", "attn", "mlp", …, "its end") of block ``layer`` of
    ``tower`` on, for the positions from ``first`` on; ``layer`` -1 are the embeddings, None a tower without blocks (the projector).

    ``also`` names the places of other towers that the group edits as well. Where nothing could be resumed ``tower`` is empty, and ``reason`` says
    why: the whole model was run, or nothing at all (:data:`NOTHING`).
    """

    tower: str = ""
    layer: int | None = None
    part: str = ""
    first: int = 0
    reason: str = ""
    also: tuple[str, ...] = ()

    @property
    def in_full(self) -> bool:
        """Whether the whole model was run."""
        return not self.tower and self.reason != NOTHING

    @classmethod
    def of_route(cls, route: ResumePlan, first: int = 0) -> Plan:
        """The plan of a run that resumes where the group acts first."""
        start, *others = route.starts
        layer = None if start.is_connector else start.layer
        return cls(
            start.tower,
            layer,
            "" if layer is None else "its end" if start.is_end else start.place,
            first,
            also=tuple(map(str, others)),
        )

    def __repr__(self) -> str:
        return f"Plan({self})"

    def __str__(self) -> str:
        if not self.tower:
            return self.reason if self.reason == NOTHING else f"in full: {self.reason}"
        layer, part = CONNECTOR if self.layer is None else self.layer, END if self.part == "its end" else WHOLE
        start = ResumePoint(self.tower, layer, part, self.part)
        where = ", ".join([str(start), *self.also])
        return f"from {where}{f', positions {self.first}…' if self.first else ''}"


_FORMER = {"block": "", "o": "after attention's pattern", "post": "its end"}
"""What files of earlier versions call the parts of a block."""


def as_plain(plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    return as_builtin(dataclasses.asdict(plan))


def from_plain(data: Mapping[str, Any]) -> Plan:
    """The plan that :func:`as_plain` described."""
    part = _FORMER.get(data["part"], data["part"])
    return Plan(**{**data, "part": part, "also": tuple(data["also"])})


stored_as("plan", Plan, lambda plan, tensors, sources: as_plain(plan), lambda data, tensors, objects: from_plain(data))
