"""Where edits meet a model: every mistake is found here, before anything runs; what comes out is a table of torch-ready writes.

Groups. A *group* is a sequence of edits that act together; the engine runs many groups in one batch, the rows of group ``i`` being block ``i`` of
every tensor. One hook per site serves all groups: each write gets the view of its own rows and the window of positions the pass covers. A single
``run`` is a batch of one group, so there is one write path.

Values that many edits need are computed once: clean activations in one run, dataset means in one run per data set.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from circuitvision.data.sides import Side
from circuitvision.errors import CircuitVisionError, InputError, warn
from circuitvision.model.averages import Draw, Layout, Seen, Tally, check_aligned, check_kinds, check_one_thing, draw
from circuitvision.model.axes import axis_of, map_of, past_length, prefix_of, tower_of
from circuitvision.model.edits.attention import DeleteTokens
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.meeting import meets, rows_without_selection
from circuitvision.model.edits.values import ALL_STEPS, TensorRefMapping
from circuitvision.model.edits.writes import THERE, Ablate, width_of
from circuitvision.model.positions import UNBOUNDED, PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel
    from circuitvision.model.hooks import Hook, HookPoint
    from circuitvision.model.tokens import TokenMap

Group = tuple[Edit, ...]
Mode = Literal["run", "generate", "act"]


def as_groups(edits_or_groups: Any) -> list[Group]:
    """A sequence of edits and groups as groups; InputError for anything else."""
    if isinstance(edits_or_groups, Edit) or not isinstance(edits_or_groups, Iterable):
        raise InputError("Give a list of edits, or of groups of edits; each entry is one run.")
    groups: list[Group] = []
    for entry in edits_or_groups:
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
        model: HookedModel,
        inputs: Mapping[str, Any],
        mode: Mode = "run",
        passes: int | None = None,
        settings: Mapping[str, Any] | None = None,
        warns_of_rows: bool = True,
    ) -> None:
        self.model, self.inputs, self.mode = model, inputs, mode
        self.warns_of_rows = warns_of_rows
        """Whether rows in which an edit selects nothing are warned of; a sweep gives them no value instead."""
        self.passes = passes
        """The most passes of the tower that runs several times, where their number is known."""
        self.settings = {**inputs, **(settings or {})}
        """Everything the model is called with."""
        self.given: dict[Any, Any] = {}
        self._drawn: dict[Any, Tensor] = {}
        self._draws: dict[Any, Draw] = {}
        self._layouts: dict[Any, Layout] = {}
        self._aligned: set[Any] = set()
        """Means that were found to exist, so that a thousand edits of one tower ask once."""
        self._windows: dict[str, PositionWindow | None] = {}
        self._maps: dict[str, Any] | None = None

    @property
    def maps(self) -> dict[str, Any]:
        """The token map of every tower, made once."""
        if self._maps is None:
            self._maps = self.model.tokens(self.inputs)
        return self._maps

    # -- windows ---------------------------------------------------------------------------------------------------------------------------

    def window(self, site: str) -> PositionWindow | None:
        """The positions of a site's tower in the first pass; None where only the run itself can tell."""
        if site not in self._windows:
            self._windows[site] = self._window(SiteName.parse(site))
        return self._windows[site]

    def _window(self, name: SiteName) -> PositionWindow | None:
        tower = map_of(self.model, name)
        tokens = self.maps.get(tower)
        if tokens is None:
            return None
        length = tokens.n_positions
        axis = axis_of(
            self.model.towers[tower_of(self.model, name)], name, tokens, self.settings, self.mode == "generate"
        )
        prefix = self.maps.get(prefix_of(self.model, tower))
        before = None
        if prefix is not None:
            before = PositionWindow(prefix.tower, prefix.n_rows, 0, prefix.n_positions, prefix.n_positions, prefix)
        return PositionWindow(tower, tokens.n_rows, 0, length, length, tokens, axis, before)

    def passing(self, hook: HookPoint, value: Tensor, rows: int, first: int) -> PositionWindow:
        """The window of one pass, for ``value`` of one group."""
        name = SiteName.parse(hook.name)
        axis = 2 if name.is_pattern else 1
        known = self.window(hook.name)
        length = int(value.shape[axis]) if value.ndim > axis else 1
        if known is None:
            return PositionWindow(name.tower, rows, 0, length, length)
        if known.axis.absent:
            return dataclasses.replace(known, first=0, length=length)
        repeats = self._repeats(name.tower)
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

    # -- binding ---------------------------------------------------------------------------------------------------------------------------

    def bind(self, groups: Sequence[Group]) -> list[CompiledEdits]:
        """Check every edit of every group, and work out what they need; InputError or UnknownSiteError names the edit."""
        if any(groups) and past_length(self.settings) and any(t.feeds_cache for t in self.model.towers.values()):
            raise InputError(
                "past_key_values hold the whole prefix of this model, whose positions edits cannot tell: leave them out, and give the "
                "prefix itself (input_ids and pixel_values)."
            )
        bound = [self._bind(group) for group in groups]
        self._prepare([edit for group in bound for edit in group.group])
        return bound

    def _bind(self, group: Group) -> CompiledEdits:
        bound = CompiledEdits(group)
        for edit in group:
            with _naming(edit):
                self._bind_edit(bound, edit)
        self._refuse_conflicts(bound)
        return bound

    def _bind_edit(self, bound: CompiledEdits, edit: Edit) -> None:
        names = edit.sites(self.model)
        self._check_runs(names)
        self._check_steps(edit, list(dict.fromkeys(SiteName.parse(name).tower for name in names)))
        for name in names:
            edit.check(self.model, name, self.window(name), self._n_heads(name), self._grows(edit, name))
        exact = len(names) == 1 and edit.site == names[0]
        if exact and self.model.is_dead(names[0], self.inputs):
            warn(f"{names[0]} cannot reach the output of this model, so {edit!r} changes nothing.")
        if edit.does_nothing:
            return
        met = [name for name in names if self._meets(edit, name, self.passes)]
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
            window = self.window(names[0])
            assert window is not None
            bound.inputs = edit.change_inputs(self.model, bound.inputs or self.inputs, window)

    def _check_same_positions(self, captured: str, names: Sequence[str]) -> None:
        there = self.window(captured)
        for name in names:
            here = self.window(name)
            if here is None or there is None:
                continue
            if (here.axis.held, bool(here.axis.absent)) != (there.axis.held, bool(there.axis.absent)):
                raise InputError(f"{captured} has other positions than {name}: what is there is not what is here")

    # -- what is never met -----------------------------------------------------------------------------------------------------------------

    def _repeats(self, tower: str) -> bool:
        """Whether a tower adds positions, pass by pass."""
        return self.mode == "generate" and tower == self.model.family.tower_that_runs("per_token")

    def _meets(self, edit: Edit, name: str, passes: int | None) -> bool:
        """Whether an edit comes to a position it selects, in the prompt or in one of so many passes."""
        window = self.window(name)
        return window is None or meets(edit, window, passes, self._repeats(window.tower))

    def _refuse_unmet(self, edit: Edit, names: Sequence[str]) -> None:
        """Raise InputError for an edit whose positions exist, but in no pass in which it acts: an empty choice only warns."""
        always = dataclasses.replace(edit, steps=ALL_STEPS)
        if edit.steps.kind != "all" and any(self._meets(always, name, self.passes) for name in names):
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
        window = self.window(name)
        return [] if window is None else rows_without_selection(edit, window)

    def _warn_of_rows(self, edit: Edit, name: str) -> None:
        window, rows = self.window(name), self.rows_without_selection(edit, name)
        if rows and window is not None:
            warn(
                f"{edit!r} selects no position of the {window.tower} tower in {len(rows)} rows of the batch, which it leaves as they are."
            )

    def _check_runs(self, names: Sequence[str]) -> None:
        """Raise InputError if none of the sites is in a tower that these inputs run."""
        towers = {tower_of(self.model, SiteName.parse(name)) for name in names}
        images = [self.model.towers[tower].stack.image for tower in towers if tower in self.model.towers]
        if all(images) and self.settings.get("pixel_values") is None:
            raise InputError(f"the {' and '.join(sorted(towers))} tower does not run: the inputs hold no pixel_values")

    def _check_steps(self, edit: Edit, towers: Sequence[str]) -> None:
        """Raise InputError for steps that a tower has none of, and for a number that the tower which runs several times does not come to."""
        kind, numbers = edit.steps.kind, edit.steps.numbers
        family = self.model.family
        denoising = family.tower_that_runs("per_denoising_step")
        several = {"generate": family.tower_that_runs("per_token"), "act": denoising}.get(self.mode)
        for tower in towers if kind != "all" else ():
            if tower == denoising and kind != "numbers":
                raise InputError(f"steps={kind!r} means nothing to the {tower} tower: give numbers of denoising steps")
            passes = self.passes if tower == several else 1
            if passes is None:
                continue
            times = "once here, as step 0" if passes == 1 else f"{passes} times here, from step 0"
            if not edit.steps.acts(0) and (passes == 1 or (numbers and min(numbers) >= passes)):
                raise InputError(f"steps={edit.steps.plain!r}: the {tower} tower runs {times}, so the edit never acts")
            if tower == several and numbers and numbers[-1] >= passes:
                raise InputError(f"the {tower} tower runs {times}: step {numbers[-1]} is never reached")

    def _grows(self, edit: Edit, site: str) -> int:
        """How many positions later passes add to those of the prompt, where the edit acts in them."""
        if not self._repeats(SiteName.parse(site).tower) or edit.steps.kind == "prefill":
            return 0
        return UNBOUNDED if self.passes is None else max(self.passes - 1, 0)

    def _n_heads(self, site: str) -> int | None:
        name = SiteName.parse(site)
        if not name.has_heads or name.tower not in self.model.towers:
            return None
        cfg = self.model.towers[name.tower].cfg
        return cfg.n_kv_heads if name.counts_key_heads else cfg.n_heads

    # -- conflicts -------------------------------------------------------------------------------------------------------------------------

    def _refuse_conflicts(self, bound: CompiledEdits) -> None:
        by_value: dict[str, list[tuple[str, Edit]]] = {}
        order = list(bound.group)
        fires = {name: number for number, name in enumerate(self.model.engine.points)}
        for name, edits in bound.writes.items():
            by_value.setdefault(_same_value(self.model, name), []).extend((name, edit) for edit in edits)
        for entries in by_value.values():
            entries.sort(key=lambda entry: order.index(entry[1]))
            for number, (name, later) in enumerate(entries):
                for earlier_name, earlier in entries[:number]:
                    if fires[name] < fires[earlier_name] and self._overlap(name, later, earlier_name, earlier):
                        raise InputError(
                            f"{earlier_name} and {name} are two names of one value, and {name} comes first: "
                            f"{later!r} would act before {earlier!r}. Give both edits one name."
                        )
                    if later.sets and self._overlap(name, later, earlier_name, earlier):
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
        here, there = self.window(name), self.window(earlier_name)
        if here is None or there is None:
            return True
        one, other = later.positions.covers(here), earlier.positions.covers(there)
        if one.shape[1] != other.shape[1] or bool((one & other).any()):
            return True
        both_grow = min(self._grows(later, name), self._grows(earlier, earlier_name)) > 0
        return both_grow and _share_later(later, earlier, here)

    # -- values needed ---------------------------------------------------------------------------------------------------------------------

    def _prepare(self, edits: Iterable[Edit]) -> None:
        wanted = [edit for edit in edits if isinstance(edit, Ablate) and edit.method in ("mean", "resample")]
        if not wanted:
            return
        self._give_data_draws([edit for edit in wanted if edit.method == "resample" and edit.dataset is not None])
        resampled = [edit for edit in wanted if edit.method == "resample" and edit.dataset is None]
        draws = {(edit, site): self._draw(edit, site) for edit in resampled for site in edit.sites(self.model)}
        by_data: dict[Any, list[Ablate]] = {}
        for edit in wanted:
            if edit.method == "mean":
                by_data.setdefault(edit.dataset, []).append(edit)
        streamed = {data: by_data.pop(data) for data in list(by_data) if isinstance(data, Side)}
        for side, group in streamed.items():
            self._give_data_means(side, group)
        parts = {data: self._parts(data) for data in by_data}
        for data, group in by_data.items():
            for edit in group:
                with _naming(edit):
                    self._check_means(edit, parts[data])
        sites = sorted({site for _, site in draws} | {s for e in by_data.get(None, ()) for s in e.sites(self.model)})
        clean = self._clean(self.inputs, sites)
        for (edit, site), drawn in draws.items():
            with _naming(edit):
                self._give_draw(edit, site, clean[site], drawn)
        for data, group in by_data.items():
            self._give_means(group, parts[data], clean if data is None else None)

    def _parts(self, data: tuple[TensorRefMapping, ...] | None) -> list[tuple[dict[str, Any], dict[str, TokenMap]]]:
        """The inputs that a mean goes over, and their token maps."""
        if data is None:
            return [(dict(self.inputs), self.maps)]
        listed = [part.tensors() for part in data]
        return [(inputs, self.model.tokens(inputs)) for inputs in listed]

    def _covered(self, edit: Edit, window: PositionWindow) -> Any:
        """The entries of a site's own axis that an edit selects in the prompt, of every row."""
        covered = edit.positions.covers(window).expand(window.rows, -1)
        held = window.axis.held
        return (covered if held is None else covered[:, list(held)]).numpy()

    def _data_layouts(
        self, site: str, window: PositionWindow, parts: Sequence[tuple[dict[str, Any], dict[str, TokenMap]]]
    ) -> list[Layout]:
        """The layouts of a site in the inputs that a mean goes over."""
        name, own = SiteName.parse(site), window.tower
        tower = self.model.towers[tower_of(self.model, name)]
        return [
            Layout.of_tokens(maps[own], axis_of(tower, name, maps[own], inputs).held)
            for inputs, maps in parts
            if own in maps
        ]

    def _give_data_draws(self, edits: Sequence[Ablate]) -> None:
        """Values of other examples of a data set; edits of one seed take those of one example."""
        from circuitvision.model.data_draws import donors_of, take

        groups: dict[Any, list[Ablate]] = {}
        for edit in edits:
            groups.setdefault((edit.dataset, edit.seed, edit.positions.kind == "last"), []).append(edit)
        for (side, seed, last), group in groups.items():
            entries = [(edit, site, self.window(site)) for edit in group for site in edit.sites(self.model)]
            needed: dict[str, Any] = {}
            for edit, _, window in entries:
                if window is not None and window.tokens is not None:
                    covered = edit.positions.covers(window).expand(window.rows, -1).numpy()
                    wanted = covered & window.tokens.present[:, : covered.shape[1]]
                    needed[window.tower] = needed.get(window.tower, False) | wanted
            with _naming(group[0]):
                donors = donors_of(self.model, side, self.inputs, self.maps, needed, seed, last)
            values = self._clean(donors.inputs, sorted({site for _, site, _ in entries}))
            for edit, site, window in entries:
                value = values[site]
                layout = Layout.of(self.model, donors.maps, site, value.shape, donors.inputs)
                if window is None or window.tokens is None or window.axis.absent or layout.kind is None:
                    self._give(edit, site, take(value, donors.rows[layout.tower]), None)
                    continue
                if window.axis.held is not None or layout.held is not None:
                    raise InputError(
                        f"{edit!r}: {site} holds some positions of its tower only; resample it within the run."
                    )
                found = donors.draw(window.tokens, needed[window.tower], last)
                self._give(edit, site, found.take(value), found.there)

    def _give_data_means(self, side: Side, group: Sequence[Ablate]) -> None:
        """The means over a data set, which is run in batches once; what does not line up is told before the batch that shows it runs."""
        from circuitvision.model.data_means import data_means

        wanted = {(site, edit.average): edit for edit in group for site in edit.sites(self.model)}

        def check(key: Any, seen: Seen) -> None:
            window = self.window(key[0])
            if key[1] != "position" or window is None or window.tokens is None or window.axis.absent:
                return
            with _naming(wanted[key]):
                covered, run = self._covered(wanted[key], window), self._layout(window)
                for column in np.flatnonzero((covered & run.there).any(0)).tolist():
                    position = column if run.held is None else int(run.held[column])
                    check_one_thing(position, seen.names.get(position, set()))

        found = data_means(self.model, side, list(wanted), self._clean, check)
        for edit in group:
            for site in edit.sites(self.model):
                tally, seen = found[site, edit.average]
                with _naming(edit):
                    self._check_mean(edit, site, seen)
                    self._give(edit, site, *tally.source(self._own_layout(site, None)))

    def _check_means(self, edit: Ablate, parts: Sequence[tuple[dict[str, Any], dict[str, TokenMap]]]) -> None:
        """Raise InputError where a mean cannot be what was asked for, as far as the token maps tell."""
        for site in edit.sites(self.model):
            window = self.window(site)
            if window is None or window.tokens is None or window.axis.absent:
                continue
            place = window.tower if window.axis.held is None else site
            key = (place, edit.dataset, edit.average, edit.positions, self._grows(edit, site))
            if key not in self._aligned:
                self._check_mean(edit, site, self._data_layouts(site, window, parts))
                self._aligned.add(key)

    def _check_mean(self, edit: Ablate, site: str, data: Sequence[Layout] | Seen) -> None:
        window = self.window(site)
        if window is None or window.tokens is None or window.axis.absent:
            return
        run = self._layout(window)
        if edit.average == "position":
            if edit.dataset is None and window.rows == 1:
                raise InputError(_ONE_ROW)
            wanted = edit.positions.ints if self._grows(edit, site) else ()
            if any(position >= window.prompt for position in wanted):
                raise InputError("a mean per position covers the prompt: take average='all' at generated positions")
            check_aligned(run, data, self._covered(edit, window), of_run=edit.dataset is None)
        elif edit.average == "kind":
            check_kinds(run, data, self._covered(edit, window))

    def _draw(self, edit: Ablate, site: str) -> Draw | None:
        """Where a resampled site takes its values from; None where only its values can tell."""
        window = self.window(site)
        if window is None or window.tokens is None or window.axis.absent:
            return None
        key = (site if window.axis.held is not None else window.tower, edit.positions, edit.seed)
        if key not in self._draws:
            with _naming(edit):
                layout = self._layout(window)
                last = edit.positions.kind == "last"
                self._draws[key] = draw(layout, self._covered(edit, window), edit.seed, last)
        return self._draws[key]

    def _give_draw(self, edit: Ablate, site: str, value: Tensor, found: Draw | None) -> None:
        if found is None:
            layout = Layout.of(self.model, self.maps, site, value.shape, self.inputs)
            found = draw(layout, np.ones_like(layout.there), edit.seed)
        else:
            value = self._as_held(site, value)
        key = (site, found.rows.tobytes(), None if found.positions is None else found.positions.tobytes())
        if key not in self._drawn:
            self._drawn[key] = found.take(value)
        self._give(edit, site, self._drawn[key], found.there)

    def _give_means(
        self,
        group: Sequence[Ablate],
        parts: Sequence[tuple[dict[str, Any], dict[str, TokenMap]]],
        clean: Mapping[str, Tensor] | None,
    ) -> None:
        wanted = {(site, edit.average): edit for edit in group for site in edit.sites(self.model)}
        tallies = {key: Tally(*key) for key in wanted}
        for inputs, maps in parts:
            values = self._clean(inputs, sorted({site for site, _ in wanted})) if clean is None else clean
            for key, tally in tallies.items():
                value = values[key[0]]
                with _naming(wanted[key]):
                    if clean is not None and value.shape[0] == 1 and key[1] == "position":
                        raise InputError(_ONE_ROW)
                    tally.add(value, Layout.of(self.model, maps, key[0], value.shape, inputs))
        sources: dict[Any, tuple[Tensor, Any]] = {}
        for edit in group:
            for site in edit.sites(self.model):
                with _naming(edit):
                    key = (site, edit.average)
                    if key not in sources:
                        sources[key] = tallies[key].source(self._own_layout(site, clean))
                    self._give(edit, site, *sources[key])

    def _own_layout(self, site: str, clean: Mapping[str, Tensor] | None) -> Layout | None:
        """The layout of a site in the run that is edited; None where only the run itself can tell."""
        window = self.window(site)
        if window is None or window.tokens is None or window.axis.absent:
            return None if clean is None else Layout.of(self.model, self.maps, site, clean[site].shape, self.inputs)
        return self._layout(window)

    def _as_held(self, site: str, value: Tensor) -> Tensor:
        """Of the values of a single run the positions that the edited run's site holds: ``generate`` reads one where a run reads them all."""
        window = self.window(site)
        assert window is not None
        layout = Layout.of(self.model, self.maps, site, value.shape, self.inputs)
        if layout.kind is None or window.count == value.shape[1]:
            return value
        held = range(window.prompt) if window.axis.held is None else window.axis.held
        return value[:, [index for position in held if (index := layout.index(position)) is not None]]

    def _layout(self, window: PositionWindow) -> Layout:
        """The layout of a tower's positions in the run that is edited, made once."""
        key = (window.tower, None if window.axis.held is None else tuple(window.axis.held))
        if key not in self._layouts:
            self._layouts[key] = Layout.of_tokens(window.tokens, window.axis.held)
        return self._layouts[key]

    def _give(self, edit: Ablate, site: str, value: Tensor, there: Any) -> None:
        self.given[edit, site] = value
        if there is not None:
            # As many axes as the value, so that both broadcast alike.
            self.given[edit, site, THERE] = torch.from_numpy(there).view(*there.shape, *[1] * (value.ndim - there.ndim))

    def _clean(self, inputs: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Tensor]:
        # Sites that exist only in the eager run must not change the run that the others are read from.
        found: dict[str, Tensor] = {}
        for eager in (False, True):
            names = [site for site in sites if SiteName.parse(site).is_eager == eager]
            if names:
                given = dict(inputs)
                if given.get("past_key_values") is not None:
                    # The run makes the cache longer; the edited run needs it as it was.
                    given["past_key_values"] = copy.deepcopy(given["past_key_values"])
                with torch.no_grad():
                    _, cache = self.model.run_with_cache(given, names_filter=names)
                found |= {site: cache[site] for site in names}
        return found


_ONE_ROW = "the mean over a single row is its own value. Pass dataset=…, more examples, or average='all'"


@contextlib.contextmanager
def _naming(edit: Edit) -> Iterator[None]:
    """Errors name the edit."""
    try:
        yield
    except CircuitVisionError as error:
        text = str(error)
        raise type(error)(text if repr(edit) in text else f"{edit!r}: {text.rstrip('.')}.") from error


def _share_later(one: Edit, other: Edit, prompt: PositionWindow) -> bool:
    """Whether two edits select a position in common behind the prompt."""
    ends = [n for edit in (one, other) for n in (*edit.positions.ints, *edit.positions.bounds[:2]) if n is not None]
    rest = dataclasses.replace(prompt, first=prompt.prompt, length=max([prompt.prompt, *ends]) - prompt.prompt + 2)
    found = [torch.zeros(rest.length, dtype=torch.bool) for _ in range(2)]
    for mask, edit in zip(found, (one, other), strict=True):
        chosen = edit.positions.choose(rest, rest.rows, "cpu")
        mask[slice(None) if chosen is None else chosen[1] if isinstance(chosen, tuple) else chosen] = True
    return bool((found[0] & found[1]).any())


def _same_value(model: HookedModel, site: str) -> str:
    """One name for sites that are one value with two names."""
    name = SiteName.parse(site)
    if name.site == "hook_resid_pre" and name.layer is not None:
        return f"{name.tower}.blocks.{name.layer - 1}.hook_resid_post" if name.layer else f"{name.tower}.hook_input"
    return site


def _from_position_0(value: Tensor, window: PositionWindow) -> Tensor:
    """A copy of a window's values that is indexed by absolute positions."""
    if not window.first:
        return value.clone()
    before = value.new_zeros(value.shape[0], window.first, *value.shape[2:])
    return torch.cat([before, value], dim=1)


class EditApplier:
    """The hooks of a batch of bound groups: block ``i`` of every tensor's rows belongs to group ``i``."""

    def __init__(
        self, binder: EditCompiler, groups: Sequence[CompiledEdits], first: Mapping[str, int] | None = None
    ) -> None:
        self.binder, self.groups = binder, list(groups)
        self.first = dict(first or {})
        """Tower -> the first position its resumed run computes."""
        self.captured: list[dict[Any, Any]] = [dict(binder.given) for _ in groups]
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
            window = self.binder.passing(hook, view, rows, first)
            given = self.captured[number]
            for edit in edits:
                with _naming(edit):
                    if self.binder.window(hook.name) is None and hook.step == 0:
                        edit.positions.check(window, UNBOUNDED)
                    edit.write(view, window, hook, given)
                wrote = True
            for edit in needs:
                given[edit, hook.name] = _from_position_0(view, window)
        return value if wrote else None
