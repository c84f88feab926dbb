"""What an edit can change: from the sites of a group of edits to the place where a run can be resumed.

A *route* says, for every tower, from which block on, and from which part of that block, its values can differ from the unedited run's. It follows
from the order of the parts of a block and from how towers feed each other (``vision`` → ``projector`` → ``language`` → ``action``; the two towers
of a dual encoder do not feed each other; PI0's prefix feeds block ``l`` of the action expert through the keys and values of its own block ``l``,
and nothing else).

Under a base of edits a route says where values can differ from the base's run: it follows from the group's own edits.

Not covered: what the output reads. A route goes forward from the edit only; values that change but are never read are computed all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.model.block import Block
from circuitvision.model.branches import AttentionBranch, Branch
from circuitvision.model.edits.attention import AttentionEdit, DeleteTokens
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.binding import CompiledEdits, EditCompiler
from circuitvision.model.flow import Flow
from circuitvision.model.positions import PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

WHOLE, END = 0, 10_000
"""Where inside a block a run resumes: the whole block, or behind it. Between them each branch has two places: before its output projection
(:func:`_before_output`) and behind its core (:func:`_behind_core`)."""
EMBED = -1
"""The block number of what comes before block 0: embeddings."""
CONNECTOR = -2
"""The block number of a connector, which has no blocks."""


@dataclass(frozen=True, order=True)
class ResumePoint:
    """The first place of one tower that can differ: the parts of ``layer`` from a place in it on."""

    tower: str
    layer: int
    part: int = WHOLE
    place: str = field(default="", compare=False)
    """The place inside the block, in words."""

    @property
    def is_whole(self) -> bool:
        """Whether all of the block can differ."""
        return self.part == WHOLE

    @property
    def is_end(self) -> bool:
        """Whether nothing inside the block can differ."""
        return self.part == END

    @property
    def branch(self) -> int:
        """The number of the branch inside or behind which it is; −1 for none."""
        return -1 if self.is_end else (self.part + 1) // 2 - 1

    @property
    def at_output(self) -> bool:
        """Whether it is before the output projection of that branch, not behind its core."""
        return not self.is_end and self.part % 2 == 1

    @property
    def is_connector(self) -> bool:
        """Whether it is a connector, not a place in a tower."""
        return self.layer == CONNECTOR

    def __str__(self) -> str:
        if self.is_connector:
            return f"the {self.tower}"
        if self.layer < 0:
            return f"the embeddings of {self.tower}"
        place = "its end" if self.is_end else self.place
        return f"{self.tower} block {self.layer}{f' ({place})' if place else ''}"


@dataclass(frozen=True)
class ResumePlan:
    """Where one group of edits acts first, in every tower it edits first; groups of one route run in one batch."""

    starts: tuple[ResumePoint, ...]
    eager: bool
    later: tuple[ResumePoint, ...] = ()
    """The first edit in each tower behind the first edited one, where towers read more of each other than their streams."""

    def start_in(self, tower: str) -> ResumePoint | None:
        """The start in a tower; None where the tower is not where the edits begin."""
        return next((start for start in self.starts if start.tower == tower), None)


def start_of(model: Wrapped, site: str) -> ResumePoint:
    """The first place that an edit of ``site`` can change."""
    name = SiteName.parse(site)
    if name.tower not in model.towers:
        return ResumePoint(name.tower, CONNECTOR, WHOLE if name.site == "hook_in" else END)
    tower = model.towers[name.tower]
    if name.layer is None:
        if name.site in ("hook_embed", "hook_pos_embed"):
            return ResumePoint(name.tower, EMBED)
        if name.site == "hook_input":
            return ResumePoint(name.tower, 0)
        return ResumePoint(name.tower, tower.cfg.n_layers - 1, END)
    if name.site == "hook_resid_pre" and name.layer > 0:
        return ResumePoint(name.tower, name.layer - 1, END)
    return ResumePoint(name.tower, name.layer, *_part(tower.blocks[name.layer], name.site))


def _before_output(branch: Branch) -> tuple[int, str]:
    words = f"after {'attention' if branch.name == 'attn' else branch.name}'s pattern"
    return 1 + 2 * branch.number, words if isinstance(branch, AttentionBranch) else f"{branch.name}_out"


def _behind_core(branch: Branch | None) -> tuple[int, str]:
    return (WHOLE, "") if branch is None else (2 + 2 * branch.number, branch.name)


def _part(block: Block, site: str) -> tuple[int, str]:
    """The place in a block from which on an edit of a site can change it."""
    if site == "hook_resid_post" or f"blocks.{block.layer}.{site}" in block.tower.writers.get(block.layer, ()):
        return END, ""
    for branch in block.branches:
        before = block.branches[branch.number - 1] if branch.number else None
        if site in branch.inner_sites():
            return _before_output(branch)
        if site == branch.added:
            return _before_output(branch) if branch.last is None and branch.inner else _behind_core(branch)
        if site.startswith((f"{branch.post_name}.", *((f"ln{branch.number + 1}.",) if branch.layout.sum_norm else ()))):
            return _behind_core(branch)
        own = (f"{branch.name}.", f"{branch.norm_name}.")
        slots = [branch.slot(letter) for letter in branch.letters] if isinstance(branch, AttentionBranch) else []
        if site.startswith(own) or site in (branch.read_site, branch.stream, *slots):
            return _behind_core(before)
    raise UnknownSiteError(f"{block.prefix}.{site} belongs to no branch of its block.")


def rows_serve_all(model: Wrapped, tower: str) -> bool:
    """Whether every example's output depends on every row of a tower: the texts that a dual encoder compares its images with."""
    return model.is_dual and tower in model.towers and not model.towers[tower].stack.image


def route_of(model: Wrapped, group: CompiledEdits, base: CompiledEdits) -> ResumePlan:
    """The route of a bound group of edits beside a base."""
    starts: dict[str, ResumePoint] = {}
    for site in group.sites:
        start = start_under(model, start_of(model, site), base)
        known = starts.get(start.tower)
        starts[start.tower] = start if known is None else min(start, known)
    return _plan(model, starts, starts.values(), [group, base], base)


def start_under(model: Wrapped, start: ResumePoint, base: CompiledEdits) -> ResumePoint:
    """The last place, not behind ``start``, from which a run under a base of edits can be resumed.

    It is before the branch of an output projection at which the base acts itself, whose recorded argument and result are edited already, and before
    an edit of the base that needs more of a module than what it returned.
    """
    if start.is_connector or start.layer == EMBED:
        return start
    for site in base.sites:
        here = start_of(model, site)
        if here.tower != start.tower:
            continue
        if here == start and start.at_output:
            branches = model.towers[start.tower].blocks[start.layer].branches
            before = branches[start.branch - 1] if start.branch else None
            return start_under(model, ResumePoint(start.tower, start.layer, *_behind_core(before)), base)
        if here < start and _is_lost(model, site, here, start):
            return start_under(model, here, base)
    return start


def _is_lost(model: Wrapped, site: str, here: ResumePoint, start: ResumePoint) -> bool:
    """Whether an edit of a site before a start does not arrive where a run is resumed there."""
    point = model.engine.points[site]
    if point.arrives_later:
        return start.layer <= here.layer + 1
    # The output projection hands back what it returned, and says nothing of what heads had in it.
    branches = model.towers[start.tower].blocks[start.layer].branches
    return point.derived and any(point.module is one.output and not one.holds_output for one in branches)


def _plan(
    model: Wrapped,
    starts: Mapping[str, ResumePoint],
    edited: Iterable[ResumePoint],
    groups: Sequence[CompiledEdits],
    base: CompiledEdits,
) -> ResumePlan:
    """The plan that resumes in the towers of ``starts`` that no other of them reaches."""
    eager = any(SiteName.parse(site).is_eager for group in groups for site in (*group.sites, *group.captures))
    edited = [*edited, *(start_of(model, site) for site in base.sites if model.engine.points[site].arrives_later)]
    first = model.flow.first_of(starts)
    later: dict[str, ResumePoint] = {}
    if len(first) == 1 and not model.flow.only_streams:
        for here in edited:
            if here.tower != first[0]:
                later[here.tower] = min(here, later.get(here.tower, here))
    return ResumePlan(tuple(starts[tower] for tower in first), eager, tuple(sorted(later.values())))


def plan_behind(
    model: Wrapped, starts: Collection[ResumePoint], groups: Sequence[CompiledEdits], base: CompiledEdits
) -> ResumePlan:
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
    edited = [start_of(model, site) for group in groups for site in group.writes]
    return _plan(model, first, edited, [*groups, base], base)


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
    entering = here == start and not here.is_whole
    first = min(map(order_of.__getitem__, writes), default=0)
    return here < start or (entering and order_of[site] < first)


def reached_through_cache(route: ResumePlan, model: Wrapped, tower: str) -> int:
    """The first block of ``tower`` that is edited, or reads changed keys or values of a tower before it; 0 where everything before it changed."""
    start = route.starts[0]
    if len(route.starts) > 1:
        return 0
    if model.flow.cache_of(tower) == start.tower:
        reached = max(start.layer, 0) if start.is_whole else start.layer + 1
    elif _only_attends(model.flow, tower, start.tower):
        crossed = [
            n for other in model.towers[tower].crossed_towers for n in model.towers[tower].layers_that_see(other)
        ]
        reached = min(crossed)
    else:
        return 0
    return min([reached, *(max(here.layer, 0) for here in route.later if here.tower == tower)])


def _only_attends(flow: Flow, tower: str, start: str) -> bool:
    """Whether what changed in a tower or connector reaches another tower through cross-attention alone."""
    into = [one for one in flow.connectors if one.target == tower]
    changed = [
        one
        for one in into
        if one.name == start or any(name == start or flow.reaches(start, name) for name in one.sources)
    ]
    return bool(changed) and all(one.via == "cross" for one in changed)


def lowest_position(binder: EditCompiler, group: CompiledEdits, tower: str) -> int:
    """The first position of ``tower`` that any edit of a group can change: directly, or through what the base makes of it at earlier ones."""
    lowest: int | None = None
    for site, edits in binder.base.writes.items():
        if SiteName.parse(site).tower == tower and any(_mixes(edit, site) for edit in edits):
            return 0
    for site, edits in group.writes.items():
        if SiteName.parse(site).tower != tower:
            continue
        window = binder.windows.of(site)
        for edit in edits:
            found = 0 if window is None else _lowest(edit, window)
            lowest = found if lowest is None else min(lowest, found)
    return 0 if lowest is None else lowest


def _mixes(edit: Edit, site: str) -> bool:
    """Whether an edit can carry a value to an earlier position. Edits of attention leave hidden what the mask hides."""
    return edit.mixes_positions or SiteName.parse(site).is_pattern != isinstance(edit, AttentionEdit)


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
