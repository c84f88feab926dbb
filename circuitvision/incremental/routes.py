"""What an edit can change: from the sites of a group of edits to the place where a run can be resumed.

A *route* says, for every tower, from which block on, and from which part of that block, its values can differ from the unedited run's. It follows
from the order of the parts of a block and from how towers feed each other (``vision`` → ``projector`` → ``language`` → ``action``; the two towers
of a dual encoder do not feed each other; PI0's prefix feeds block ``l`` of the action expert through the keys and values of its own block ``l``,
and nothing else).

Not covered: what the output reads. A route goes forward from the edit only; values that change but are never read are computed all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuitvision.errors import InputError
from circuitvision.model.edits.attention import AttentionEdit, DeleteTokens
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.binding import CompiledEdits, EditCompiler
from circuitvision.model.flow import Flow
from circuitvision.model.positions import PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

PARTS = ("block", "o", "attn", "mlp_out", "mlp", "post")
"""Where inside a block a run resumes: the whole block; its output projection; after attention; the MLP's output map; after the MLP; after the
block."""
EMBED = -1
"""The block number of what comes before block 0: embeddings."""
CONNECTOR = -2
"""The block number of a connector, which has no blocks."""


@dataclass(frozen=True, order=True)
class ResumePoint:
    """The first place of one tower that can differ: parts of ``layer`` from ``PARTS[part]`` on."""

    tower: str
    layer: int
    part: int

    @property
    def name(self) -> str:
        """The part's name."""
        return PARTS[self.part]

    @property
    def is_connector(self) -> bool:
        """Whether it is a connector, not a place in a tower."""
        return self.layer == CONNECTOR

    def __str__(self) -> str:
        if self.is_connector:
            return f"the {self.tower}"
        if self.layer < 0:
            return f"the embeddings of {self.tower}"
        after = {"block": "", "o": " (after attention's pattern)", "post": " (its end)"}
        return f"{self.tower} block {self.layer}{after.get(self.name, f' ({self.name})')}"


@dataclass(frozen=True)
class ResumePlan:
    """Where one group of edits acts first, in every tower it edits first; groups of one route run in one batch."""

    starts: tuple[ResumePoint, ...]
    eager: bool
    later: ResumePoint | None = None
    """The first edit in a tower that the first edited one reaches only through its keys and values."""

    def start_in(self, tower: str) -> ResumePoint | None:
        """The start in a tower; None where the tower is not where the edits begin."""
        return next((start for start in self.starts if start.tower == tower), None)


def start_of(model: Wrapped, site: str) -> ResumePoint:
    """The first place that an edit of ``site`` can change."""
    name = SiteName.parse(site)
    if name.tower not in model.towers:
        return ResumePoint(name.tower, CONNECTOR, PARTS.index("block" if name.site == "hook_in" else "post"))
    tower = model.towers[name.tower]
    if name.layer is None:
        if name.site in ("hook_embed", "hook_pos_embed"):
            return ResumePoint(name.tower, EMBED, 0)
        if name.site == "hook_input":
            return ResumePoint(name.tower, 0, 0)
        return ResumePoint(name.tower, tower.cfg.n_layers - 1, PARTS.index("post"))
    if name.site == "hook_resid_pre" and name.layer > 0:
        return ResumePoint(name.tower, name.layer - 1, PARTS.index("post"))
    return ResumePoint(name.tower, name.layer, PARTS.index(_part(model, name)))


def _part(model: Wrapped, name: SiteName) -> str:
    assert name.layer is not None
    block = model.towers[name.tower].blocks[name.layer]
    if name.site in ("attn.hook_z", "attn.hook_result"):
        return "o"
    if name.site == "hook_attn_out":
        return "o" if block.branch("attn").last is None else "attn"
    if name.site in ("hook_resid_mid", "hook_mlp_in", "mlp.hook_pre", "mlp.hook_pre_linear"):
        return "attn"
    if name.site.startswith(("ln1_post", "ln2.")):
        return "attn"
    if name.site == "mlp.hook_post":
        return "mlp_out"
    if name.site == "hook_mlp_out":
        return "mlp_out" if block.branch("mlp").last is None else "mlp"
    if name.site.startswith("ln2_post"):
        return "mlp"
    return "post" if name.site == "hook_resid_post" else "block"


def rows_serve_all(model: Wrapped, tower: str) -> bool:
    """Whether every example's output depends on every row of a tower: the texts that a dual encoder compares its images with."""
    return model.is_dual and tower in model.towers and not model.towers[tower].stack.image


def route_of(model: Wrapped, group: CompiledEdits) -> ResumePlan:
    """The route of a bound group."""
    starts: dict[str, ResumePoint] = {}
    for site in group.sites:
        start = start_of(model, site)
        known = starts.get(start.tower)
        starts[start.tower] = start if known is None else min(start, known)
    eager = any(SiteName.parse(site).is_eager for site in (*group.sites, *group.captures))
    return _plan(model, starts, starts.values(), eager)


def _plan(model: Wrapped, starts: Mapping[str, ResumePoint], edited: Iterable[ResumePoint], eager: bool) -> ResumePlan:
    """The plan that resumes in the towers of ``starts`` that no other of them reaches."""
    first = model.flow.first_of(starts)
    later = None
    if len(first) == 1 and model.flow.feeds_cache(first[0]):
        later = min((here for here in edited if here.tower != first[0]), default=None)
    return ResumePlan(tuple(starts[tower] for tower in first), eager, later)


def plan_behind(model: Wrapped, starts: Collection[ResumePoint], groups: Sequence[CompiledEdits]) -> ResumePlan:
    """The plan that runs several groups in one batch from the latest of the given starts that is behind none of their edits.

    Raises InputError, naming the edit, for a site before every start.
    """
    order = model.flow.stages
    first: dict[str, ResumePoint] = {}
    for group in groups:
        for site, edits in group.writes.items():
            here = start_of(model, site)
            before = [one for one in starts if _is_behind(here, one, model.flow)]
            if not before:
                where = ", ".join(map(str, sorted(starts)))
                raise InputError(
                    f"{edits[0]!r} acts at {site}, which lies before {where}, where this prepared run starts, and is not computed again: "
                    f"prepare it with start={site!r}."
                )
            start = max(before, key=lambda one: (order.index(one.tower), one))
            first[start.tower] = min(start, first.get(start.tower, start))
    if not first:
        start = min(starts, key=lambda one: (order.index(one.tower), one))
        first[start.tower] = start
    eager = any(SiteName.parse(site).is_eager for group in groups for site in (*group.sites, *group.captures))
    edited = [start_of(model, site) for group in groups for site in group.writes]
    return _plan(model, first, edited, eager)


def _is_behind(here: ResumePoint, start: ResumePoint, flow: Flow) -> bool:
    """Whether what can be edited at ``here`` is computed again by a run that resumes at ``start``."""
    return start <= here if here.tower == start.tower else flow.reaches(start.tower, here.tower)


def is_unedited(model: Wrapped, site: str, plan: ResumePlan, writes: Iterable[str]) -> bool:
    """Whether a site, in a run that resumes by a plan, has its unedited value and is not computed again; ``writes`` are the edited sites."""
    here = start_of(model, site)
    start = plan.start_in(here.tower)
    if start is None:
        apart = not model.flow.is_reached(here.tower, [one.tower for one in plan.starts])
        return apart or (not here.is_connector and here.layer < reached_through_cache(plan, model, here.tower))
    # A value that enters the place where the run resumes is not computed again.
    order_of = {name: number for number, name in enumerate(model.engine.points)}
    entering = here == start and here.name != "block"
    first = min(map(order_of.__getitem__, writes), default=0)
    return here < start or (entering and order_of[site] < first)


def reached_through_cache(route: ResumePlan, model: Wrapped, tower: str) -> int:
    """The first block of ``tower`` that is edited, or reads changed keys or values of a tower before it; 0 where everything before it changed."""
    start = route.starts[0]
    if len(route.starts) > 1 or model.flow.cache_of(tower) != start.tower:
        return 0
    reached = max(start.layer, 0) if start.name == "block" else start.layer + 1
    return reached if route.later is None else min(reached, max(route.later.layer, 0))


def lowest_position(binder: EditCompiler, group: CompiledEdits, tower: str) -> int:
    """The first position of ``tower`` that any edit of a group can change directly."""
    lowest: int | None = None
    for site, edits in group.writes.items():
        if SiteName.parse(site).tower != tower:
            continue
        window = binder.windows.of(site)
        for edit in edits:
            found = 0 if window is None else _lowest(edit, window)
            lowest = found if lowest is None else min(lowest, found)
    return 0 if lowest is None else lowest


def _lowest(edit: Edit, window: PositionWindow) -> int:
    if edit.reads_all:
        return 0
    first = edit.positions.lowest(window)
    if isinstance(edit, DeleteTokens) or not isinstance(edit, AttentionEdit):
        return first
    if edit.keys.tower and edit.keys.tower != window.tower:
        return first
    # A query before every key it is kept from loses nothing, where no position sees a later one.
    return max(first, edit.keys.lowest(window)) if edit.keys.kind != "all" else first
