"""Where edits meet a model: every mistake is found here, before anything runs; what comes out is a table of torch-ready writes.

Groups. A *group* is a sequence of edits that act together; the engine runs many groups in one batch, the rows of group ``i`` being block ``i`` of
every tensor. The *base* are edits that every run of a compiler is under; those of a group act after them, and may set what they changed.

What edits take from other runs is in ``given.py``, how a compiled group acts in a run in ``applying.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from circuitvision.errors import InputError, warn
from circuitvision.model.axes import past_length, tower_of
from circuitvision.model.edits.attention import DeleteTokens
from circuitvision.model.edits.base import Edit, naming
from circuitvision.model.edits.given import GivenValues
from circuitvision.model.edits.meeting import meets, rows_without_selection
from circuitvision.model.edits.values import ALL_STEPS
from circuitvision.model.edits.windows import Mode, RunWindows
from circuitvision.model.edits.writes import width_of
from circuitvision.model.positions import PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

Group = tuple[Edit, ...]


def _refuse_maker(given: Any) -> None:
    """Raise InputError for what makes edits in the place of edits: a set of neurons iterates over its members, which are not what is wrong."""
    if callable(getattr(given, "edits", None)):
        kind = type(given).__name__
        raise InputError(f"A {kind} is no edit: its edits(value) makes them, such as neurons.edits(4.0).")


def as_groups(edits_or_groups: Any) -> list[Group]:
    """A sequence of edits and groups as groups; InputError for anything else."""
    if isinstance(edits_or_groups, Edit) or not isinstance(edits_or_groups, Iterable):
        raise InputError("Give a list of edits, or of groups of edits; each entry is one run.")
    _refuse_maker(edits_or_groups)
    groups: list[Group] = []
    for entry in edits_or_groups:
        _refuse_maker(entry)
        group = (
            (entry,)
            if isinstance(entry, Edit)
            else tuple(entry)
            if isinstance(entry, Iterable) and not isinstance(entry, str)
            else (entry,)
        )
        wrong = [edit for edit in group if not isinstance(edit, Edit)]
        if wrong:
            raise InputError(
                f"{wrong[0]!r} is not an edit; circuitvision.edits makes them, such as edits.ablate('vision L1H3')."
            )
        groups.append(group)
    return groups


@dataclass(eq=False)
class CompiledEdits:
    """A group after it met a model and its inputs: which edit writes at which site, in order."""

    group: Group
    writes: dict[str, list[Edit]] = field(default_factory=dict)
    captures: dict[str, list[Edit]] = field(default_factory=dict)
    """Sites whose value an edit needs later in the pass, and those edits."""
    inputs: dict[str, Any] | None = None
    """The inputs of this group alone, where an edit changes them."""

    @property
    def sites(self) -> list[str]:
        """Every site that is written."""
        return list(self.writes)


class EditCompiler:
    """Binds groups of edits to one model, its inputs, and one kind of run."""

    def __init__(
        self,
        model: Wrapped,
        inputs: Mapping[str, Any],
        mode: Mode = "run",
        passes: int | None = None,
        settings: Mapping[str, Any] | None = None,
        warns_of_rows: bool = True,
        base: Group = (),
    ) -> None:
        self.model, self.inputs = model, inputs
        self.windows = RunWindows(model, inputs, mode, passes, settings)
        self.values = GivenValues(self.windows)
        self.warns_of_rows = warns_of_rows
        """Whether rows in which an edit selects nothing are warned of; a sweep gives them no value instead."""
        self.base = CompiledEdits(())
        if base:
            (self.base,) = self.bind([base])

    @property
    def run_inputs(self) -> Mapping[str, Any]:
        """The inputs that runs under the base have."""
        return self.inputs if self.base.inputs is None else self.base.inputs

    # -- binding ---------------------------------------------------------------------------------------------------------------------------

    def bind(self, groups: Sequence[Group]) -> list[CompiledEdits]:
        """Check every edit of every group, and work out what they need; InputError or UnknownSiteError names the edit."""
        bound = self.check(groups)
        self.values.prepare([edit for group in bound for edit in group.group])
        return bound

    def check(self, groups: Sequence[Group]) -> list[CompiledEdits]:
        """Check every edit of every group, without what they take from other runs: not to be run."""
        if (
            any(groups)
            and past_length(self.windows.settings)
            and any(t.feeds_cache for t in self.model.towers.values())
        ):
            raise InputError(
                "past_key_values hold the whole prefix of this model, whose positions edits cannot tell: leave them out, and give the "
                "prefix itself (input_ids and pixel_values)."
            )
        return [self._bind(group) for group in groups]

    def _bind(self, group: Group) -> CompiledEdits:
        bound = CompiledEdits(group)
        for edit in group:
            with naming(edit):
                self._bind_edit(bound, edit)
        self._refuse_conflicts(bound)
        return bound

    def _bind_edit(self, bound: CompiledEdits, edit: Edit) -> None:
        names = edit.sites(self.model)
        self._check_runs(names)
        self._check_steps(edit, list(dict.fromkeys(SiteName.parse(name).tower for name in names)))
        for name in names:
            edit.check(self.model, name, self.windows.of(name), self._n_heads(name), self.windows.grows(edit, name))
        exact = len(names) == 1 and edit.site == names[0]
        if exact and self.model.is_dead(names[0], self.inputs):
            warn(f"{names[0]} cannot reach the output of this model, so {edit!r} changes nothing.")
        if edit.does_nothing:
            return
        met = [name for name in names if self._meets(edit, name, self.windows.passes)]
        if not met:
            self._refuse_unmet(edit, names)
            warn(f"{edit!r} selects no position, so it changes nothing.")
            return
        if self.warns_of_rows:
            self._warn_of_rows(edit, met[0])
        for name in names:
            bound.writes.setdefault(name, []).append(edit)
        captured = edit.captured()
        if captured is not None:
            self._check_same_positions(captured, names)
            bound.captures.setdefault(captured, []).append(edit)
        if isinstance(edit, DeleteTokens) and edit.reindex:
            window = self.windows.of(names[0])
            assert window is not None
            bound.inputs = edit.change_inputs(self.model, bound.inputs or self.run_inputs, window)

    def _check_same_positions(self, captured: str, names: Sequence[str]) -> None:
        there = self.windows.of(captured)
        for name in names:
            here = self.windows.of(name)
            if here is None or there is None:
                continue
            if (here.axis.held, bool(here.axis.absent)) != (there.axis.held, bool(there.axis.absent)):
                raise InputError(f"{captured} has other positions than {name}: what is there is not what is here")

    # -- what is never met -----------------------------------------------------------------------------------------------------------------

    def _meets(self, edit: Edit, name: str, passes: int | None) -> bool:
        """Whether an edit comes to a position it selects, in the prompt or in one of so many passes."""
        window = self.windows.of(name)
        return window is None or meets(edit, window, passes, self.windows.repeats(window.tower))

    def _refuse_unmet(self, edit: Edit, names: Sequence[str]) -> None:
        """Raise InputError for an edit whose positions exist, but in no pass in which it acts: an empty choice only warns."""
        always = dataclasses.replace(edit, steps=ALL_STEPS)
        if edit.steps.kind != "all" and any(self._meets(always, name, self.windows.passes) for name in names):
            raise InputError(
                f"its positions are not computed in steps={edit.steps.plain!r}: step 0 computes the prompt, each later one a new position"
            )

    def warn_unmet(self, bound: CompiledEdits, passes: int) -> None:
        """Warn of edits that never acted because a run ended after so many passes, sooner than it might have."""
        for edit in bound.group:
            names = [name for name, listed in bound.writes.items() if edit in listed]
            if names and not any(self._meets(edit, name, passes) for name in names):
                warn(f"Generation ended after {passes} steps, so {edit!r} never acted: it changed nothing.")

    def rows_without_selection(self, edit: Edit, name: str) -> list[int]:
        """The rows of the batch in which an edit selects no position of the prompt; none where all rows are alike."""
        window = self.windows.of(name)
        return [] if window is None else rows_without_selection(edit, window)

    def _warn_of_rows(self, edit: Edit, name: str) -> None:
        window, rows = self.windows.of(name), self.rows_without_selection(edit, name)
        if rows and window is not None:
            warn(
                f"{edit!r} selects no position of the {window.tower} tower in {len(rows)} rows of the batch, which it leaves as they are."
            )

    def _check_runs(self, names: Sequence[str]) -> None:
        """Raise InputError if none of the sites is in a tower that these inputs run."""
        towers = {tower_of(self.model, SiteName.parse(name)) for name in names}
        images = [self.model.towers[tower].stack.image for tower in towers if tower in self.model.towers]
        if all(images) and self.windows.settings.get("pixel_values") is None:
            raise InputError(f"the {' and '.join(sorted(towers))} tower does not run: the inputs hold no pixel_values")

    def _check_steps(self, edit: Edit, towers: Sequence[str]) -> None:
        """Raise InputError for steps that a tower has none of, and for a number that the tower which runs several times does not come to."""
        kind, numbers = edit.steps.kind, edit.steps.numbers
        family = self.model.family
        denoising = family.tower_that_runs("per_denoising_step")
        several = {"generate": family.tower_that_runs("per_token"), "act": denoising}.get(self.windows.mode)
        for tower in towers if kind != "all" else ():
            if tower == denoising and kind != "numbers":
                raise InputError(f"steps={kind!r} means nothing to the {tower} tower: give numbers of denoising steps")
            passes = self.windows.passes if tower == several else 1
            if passes is None:
                continue
            times = "once here, as step 0" if passes == 1 else f"{passes} times here, from step 0"
            if not edit.steps.acts(0) and (passes == 1 or (numbers and min(numbers) >= passes)):
                raise InputError(f"steps={edit.steps.plain!r}: the {tower} tower runs {times}, so the edit never acts")
            if tower == several and numbers and numbers[-1] >= passes:
                raise InputError(f"the {tower} tower runs {times}: step {numbers[-1]} is never reached")

    def _n_heads(self, site: str) -> int | None:
        name = SiteName.parse(site)
        if not name.has_heads or name.tower not in self.model.towers:
            return None
        cfg = self.model.towers[name.tower].cfg
        return cfg.n_kv_heads if name.counts_key_heads else cfg.n_heads

    # -- conflicts -------------------------------------------------------------------------------------------------------------------------

    def _refuse_conflicts(self, bound: CompiledEdits) -> None:
        by_value: dict[str, list[tuple[int, str, Edit]]] = {}
        own = len(self.base.group)
        fires = {name: number for number, name in enumerate(self.model.engine.points)}
        for compiled, before in ((self.base, 0), (bound, own)):
            for name, edits in compiled.writes.items():
                found = [(before + compiled.group.index(edit), name, edit) for edit in edits]
                by_value.setdefault(same_value(self.model, name), []).extend(found)
        for entries in by_value.values():
            entries.sort(key=lambda entry: entry[0])
            for number, (place, name, later) in enumerate(entries):
                for earlier_place, earlier_name, earlier in entries[:number] if place >= own else ():
                    if fires[name] < fires[earlier_name] and self._overlap(name, later, earlier_name, earlier):
                        raise InputError(
                            f"{earlier_name} and {name} are two names of one value, and {name} comes first: "
                            f"{later!r} would act before {earlier!r}. Give both edits one name."
                        )
                    if later.sets and earlier_place >= own and self._overlap(name, later, earlier_name, earlier):
                        raise InputError(
                            f"{later!r} sets entries of {name} that {earlier!r} changed before it, which would be lost. "
                            "Put the one that sets first, or give them other heads, positions or steps."
                        )

    def _overlap(self, name: str, later: Edit, earlier_name: str, earlier: Edit) -> bool:
        if not later.steps.overlaps(earlier.steps):
            return False
        if later.heads is not None and earlier.heads is not None:
            count = self._n_heads(name) or 1
            if not {head % count for head in later.heads} & {head % count for head in earlier.heads}:
                return False
        mine, theirs = getattr(later, "neurons", None), getattr(earlier, "neurons", None)
        if mine is not None and theirs is not None:
            width = width_of(self.model, name) or 1 + max(map(abs, (*mine, *theirs)), default=0)
            if not {neuron % width for neuron in mine} & {neuron % width for neuron in theirs}:
                return False
        here, there = self.windows.of(name), self.windows.of(earlier_name)
        if here is None or there is None:
            return True
        one, other = later.positions.covers(here), earlier.positions.covers(there)
        if one.shape[1] != other.shape[1] or bool((one & other).any()):
            return True
        both_grow = min(self.windows.grows(later, name), self.windows.grows(earlier, earlier_name)) > 0
        return both_grow and _share_later(later, earlier, here)


def _share_later(one: Edit, other: Edit, prompt: PositionWindow) -> bool:
    """Whether two edits select a position in common behind the prompt."""
    ends = [n for edit in (one, other) for n in (*edit.positions.ints, *edit.positions.bounds[:2]) if n is not None]
    rest = dataclasses.replace(prompt, first=prompt.prompt, length=max([prompt.prompt, *ends]) - prompt.prompt + 2)
    found = [torch.zeros(rest.length, dtype=torch.bool) for _ in range(2)]
    for mask, edit in zip(found, (one, other), strict=True):
        chosen = edit.positions.choose(rest, rest.rows, "cpu")
        mask[slice(None) if chosen is None else chosen[1] if isinstance(chosen, tuple) else chosen] = True
    return bool((found[0] & found[1]).any())


def same_value(model: Wrapped, site: str) -> str:
    """One name for sites that are one value with two names."""
    name = SiteName.parse(site)
    if name.site == "hook_resid_pre" and name.layer is not None:
        return f"{name.tower}.blocks.{name.layer - 1}.hook_resid_post" if name.layer else f"{name.tower}.hook_input"
    return site
