"""Where edits meet a model: every mistake is found here, before anything runs; what comes out is a table of torch-ready writes.

Groups. A *group* is a sequence of edits that act together; the engine runs many groups in one batch, the rows of group ``i`` being block ``i`` of
every tensor. One hook per site serves all groups: each write gets the view of its own rows and the window of positions the pass covers. A single
``run`` is a batch of one group, so there is one write path.

Values that many edits need are computed once: clean activations in one run, dataset means in one run per data set.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from circuitvision.errors import CircuitVisionError, InputError
from circuitvision.model.edits.attention import DeleteTokens
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.values import Window
from circuitvision.model.edits.writes import Ablate, width_of
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel
    from circuitvision.model.hooks import Hook, HookPoint

Group = tuple[Edit, ...]
Mode = Literal["run", "generate", "act"]


def as_groups(edits_or_groups: Any) -> list[Group]:
    """A sequence of edits and groups as groups; InputError for anything else."""
    if isinstance(edits_or_groups, Edit) or not isinstance(edits_or_groups, Iterable):
        raise InputError("Give a list of edits, or of groups of edits; each entry is one run.")
    groups: list[Group] = []
    for entry in edits_or_groups:
        group = (entry,) if isinstance(entry, Edit) else tuple(entry) if isinstance(entry, Iterable) else (entry,)
        wrong = [edit for edit in group if not isinstance(edit, Edit)]
        if wrong:
            raise InputError(f"{wrong[0]!r} is not an edit; circuitvision.edits makes them.")
        groups.append(group)
    return groups


@dataclass(eq=False)
class BoundGroup:
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


class Binder:
    """Binds groups of edits to one model, its inputs, and one kind of run."""

    def __init__(
        self, model: HookedModel, inputs: Mapping[str, Any], mode: Mode = "run", passes: int | None = None
    ) -> None:
        self.model, self.inputs, self.mode = model, inputs, mode
        self.passes = passes
        """Passes of the tower that runs several times, where their number is known."""
        self.given: dict[Any, Any] = {}
        self._windows: dict[str, Window | None] = {}
        self._maps: dict[str, Any] | None = None

    @property
    def maps(self) -> dict[str, Any]:
        """The token map of every tower, made once."""
        if self._maps is None:
            self._maps = self.model.tokens(self.inputs)
        return self._maps

    # -- windows ---------------------------------------------------------------------------------------------------------------------------

    def window(self, site: str) -> Window | None:
        """All positions of a site in the first pass; None where only the run itself can tell."""
        if site not in self._windows:
            self._windows[site] = self._window(SiteName.parse(site))
        return self._windows[site]

    def _window(self, name: SiteName) -> Window | None:
        tokens = self.maps.get(name.tower)
        if tokens is None or (name.may_be_pooled and not self._norms_positions(name)):
            return None
        length, shift = tokens.n_positions, 0
        pools = name.site.startswith("pool.")
        tower = self.model.towers[name.tower]
        if name.site == "hook_embed" and tower.stack.image:
            shift = tower.cfg.n_prefix
        return Window(name.tower, tokens.n_rows, 0, length - shift, length - shift, tokens, pools, shift)

    def _norms_positions(self, name: SiteName) -> bool:
        """Whether a site is of a final norm that every position passes, before any pooling."""
        readout = self.model.towers[name.tower].spec.readout
        return name.site.startswith("ln_final.") and (readout is None or (readout.normed and readout.norm_first))

    def passing(self, hook: HookPoint, value: Tensor, rows: int, first: int) -> Window:
        """The window of one pass, for ``value`` of one group."""
        name = SiteName.parse(hook.name)
        axis = 2 if name.is_pattern else 1
        known = self.window(hook.name)
        length = int(value.shape[axis]) if value.ndim > axis else 1
        if known is None:
            return Window(name.tower, rows, 0, length, length)
        if self.mode == "generate" and name.tower == "language" and length != (1 if hook.step else known.prompt):
            raise InputError(
                f"pass {hook.step} of the language tower holds {length} positions: edits count positions by the cache, so leave "
                "use_cache on, and prefill_chunk_size, prompt_lookup_num_tokens and assistant models off"
            )
        if self.mode == "generate" and name.tower == "language" and hook.step > 0:
            first = known.prompt + hook.step - 1
        elif length == known.length:
            # Embeddings, and what follows a pooled tower's last block, have all positions in a resumed run as well.
            first = 0
        if known.pools and name.is_pattern:
            length = 1
        return Window(known.tower, known.rows, first, length, known.prompt, known.tokens, known.pools, known.shift)

    # -- binding ---------------------------------------------------------------------------------------------------------------------------

    def bind(self, groups: Sequence[Group]) -> list[BoundGroup]:
        """Check every edit of every group, and work out what they need; InputError or UnknownSiteError names the edit."""
        bound = [self._bind(group) for group in groups]
        self._prepare([edit for group in bound for edit in group.group])
        return bound

    def _bind(self, group: Group) -> BoundGroup:
        bound = BoundGroup(group)
        for edit in group:
            try:
                self._bind_edit(bound, edit)
            except CircuitVisionError as error:
                text = str(error)
                message = text if repr(edit) in text else f"{edit!r}: {text.rstrip('.')}."
                raise type(error)(message) from error
        self._refuse_conflicts(bound)
        return bound

    def _bind_edit(self, bound: BoundGroup, edit: Edit) -> None:
        names = edit.sites(self.model)
        for name in names:
            self._check_steps(edit, SiteName.parse(name).tower)
            edit.check(self.model, name, self.window(name), self._n_heads(name), self._grows(edit, name))
        exact = len(names) == 1 and edit.site == names[0]
        if exact and self.model.is_dead(names[0]):
            warnings.warn(
                f"{names[0]} cannot reach the output of this model, so {edit!r} changes nothing.", stacklevel=6
            )
        if edit.does_nothing:
            return
        if not any(self._selects(edit, name) for name in names):
            warnings.warn(f"{edit!r} selects no position, so it changes nothing.", stacklevel=6)
            return
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
            if here is not None and there is not None and (here.shift, here.prompt) != (there.shift, there.prompt):
                raise InputError(f"{captured} has other positions than {name}: what is there is not what is here")

    def _selects(self, edit: Edit, name: str) -> bool:
        """Whether an edit selects any position of a site, in the prompt or later."""
        window = self.window(name)
        if window is None or edit.positions.kind == "all" or self._grows(edit, name):
            return True
        chosen = (edit.positions, getattr(edit, "keys", edit.positions))
        return all(
            positions.tower not in ("", window.tower) or bool(positions.covers(window).any()) for positions in chosen
        )

    def _check_steps(self, edit: Edit, tower: str) -> None:
        kind = edit.steps.kind
        if kind == "all":
            return
        if tower == "action" and kind != "numbers":
            raise InputError(f"steps={kind!r} means nothing to the action tower: give numbers of denoising steps")
        passes = self.passes if tower == {"generate": "language", "act": "action"}.get(self.mode) else 1
        if passes is not None and not any(edit.steps.acts(step) for step in range(passes)):
            times = "once here, as step 0" if passes == 1 else f"{passes} times here, from step 0"
            raise InputError(f"steps={edit.steps.plain!r}: the {tower} tower runs {times}, so the edit never acts")

    def _grows(self, edit: Edit, site: str) -> bool:
        return self.mode == "generate" and SiteName.parse(site).tower == "language" and edit.steps.kind != "prefill"

    def _n_heads(self, site: str) -> int | None:
        name = SiteName.parse(site)
        if not name.has_heads or name.tower not in self.model.towers:
            return None
        cfg = self.model.towers[name.tower].cfg
        return cfg.n_kv_heads if name.counts_key_heads else cfg.n_heads

    # -- conflicts -------------------------------------------------------------------------------------------------------------------------

    def _refuse_conflicts(self, bound: BoundGroup) -> None:
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
        return self._grows(later, name) and self._grows(earlier, earlier_name) and _share_later(later, earlier, here)

    # -- values needed ---------------------------------------------------------------------------------------------------------------------

    def _prepare(self, edits: Iterable[Edit]) -> None:
        wanted = [edit for edit in edits if isinstance(edit, Ablate) and edit.method in ("mean", "resample")]
        if not wanted:
            return
        sites = sorted({site for edit in wanted for site in edit.clean_sites(self.model)})
        clean = self._clean(self.inputs, sites)
        datasets: dict[Any, tuple[dict[str, Tensor], dict[str, int]]] = {}
        for edit in wanted:
            for site in edit.sites(self.model):
                if edit.method == "resample":
                    self.given[edit, site] = _resampled(clean[site], edit)
                elif edit.dataset is None:
                    self.given[edit, site] = _mean_of_run(clean[site], edit, site)
        for edit in wanted:
            if edit.method == "mean" and edit.dataset is not None:
                names = edit.sites(self.model)
                if edit.dataset not in datasets or not set(names) <= set(datasets[edit.dataset][0]):
                    everything = {n for e in wanted if e.dataset == edit.dataset for n in e.sites(self.model)}
                    datasets[edit.dataset] = self._totals(edit, sorted(everything))
                totals, rows = datasets[edit.dataset]
                for site in names:
                    self.given[edit, site] = _over_positions(totals[site] / rows[site], edit, site)

    def _clean(self, inputs: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Tensor]:
        # Sites that exist only in the eager run must not change the run that the others are read from.
        found: dict[str, Tensor] = {}
        for eager in (False, True):
            names = [site for site in sites if SiteName.parse(site).is_eager == eager]
            if names:
                with torch.no_grad():
                    _, cache = self.model.run_with_cache(dict(inputs), names_filter=names)
                found |= {site: cache[site] for site in names}
        return found

    def _totals(self, edit: Ablate, sites: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
        totals: dict[str, Tensor] = {}
        rows = dict.fromkeys(sites, 0)
        assert edit.dataset is not None
        for held in edit.dataset:
            for site, value in self._clean(held.tensors(), sites).items():
                total = value.double().sum(0)
                if site in totals and totals[site].shape != total.shape:
                    raise InputError(
                        f"{edit!r}: {site} has {total.shape[0]} positions in one part of the data set and "
                        f"{totals[site].shape[0]} in another; a mean per position needs inputs of one size."
                    )
                totals[site] = totals[site] + total if site in totals else total
                rows[site] += value.shape[0]
        return totals, rows


def _share_later(one: Edit, other: Edit, prompt: Window) -> bool:
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


def _over_positions(mean: Tensor, edit: Ablate, site: str) -> Tensor:
    """A mean over rows, averaged over positions too if the edit asks for it and the site has them in this model."""
    positions = mean.ndim == (3 if SiteName.parse(site).has_heads else 2)
    return mean.mean(0, keepdim=True) if edit.average == "all" and positions else mean


def _mean_of_run(clean: Tensor, edit: Ablate, site: str) -> Tensor:
    if clean.shape[0] == 1 and edit.average == "position":
        raise InputError(
            f"{edit!r}: the mean over a single row is its own value. Pass dataset=…, more examples, or average='all'."
        )
    return _over_positions(clean.mean(0), edit, site)


def _resampled(clean: Tensor, edit: Ablate) -> Tensor:
    rows = clean.shape[0]
    if rows == 1:
        raise InputError(f"{edit!r}: resampling takes another row's value, and there is only one row.")
    generator = torch.Generator().manual_seed(edit.seed)
    # A cycle through the rows in random order leaves none in its place.
    order = torch.randperm(rows, generator=generator)
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    return clean[source.to(clean.device)]


def _from_position_0(value: Tensor, window: Window) -> Tensor:
    """A copy of a window's values that is indexed by absolute positions."""
    if not window.first:
        return value.clone()
    before = value.new_zeros(value.shape[0], window.first, *value.shape[2:])
    return torch.cat([before, value], dim=1)


class Writer:
    """The hooks of a batch of bound groups: block ``i`` of every tensor's rows belongs to group ``i``."""

    def __init__(self, binder: Binder, groups: Sequence[BoundGroup], first: Mapping[str, int] | None = None) -> None:
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
                self._write(edit, view, window, hook, given)
                wrote = True
            for edit in needs:
                given[edit, hook.name] = _from_position_0(view, window)
        return value if wrote else None

    @staticmethod
    def _write(edit: Edit, view: Tensor, window: Window, hook: HookPoint, given: Mapping[Any, Any]) -> None:
        try:
            edit.write(view, window, hook, given)
        except CircuitVisionError as error:
            text = str(error)
            raise type(error)(text if repr(edit) in text else f"{edit!r}: {text.rstrip('.')}.") from error
