"""Sweeps: one metric under many edits, computing only what each edit can change.

Groups of edits that begin at the same place form one *route* (``routes.py``); the groups of a route run in batches through the incremental forward
(``resume.py``). The unedited run, means and sources are computed once. A group that cannot be resumed runs in full, and the result's ``plan`` says
why.

The batch size goes by memory and by how many positions a batch computes: beyond a few thousand rows a matrix product gets no faster. When memory
runs out the batch is halved, down to one group.

Positions: groups of one route are ordered by their first position and cut into batches that share a suffix, so that late positions do not pay for
early ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from circuitvision import metrics
from circuitvision.digests import NamedFunction
from circuitvision.errors import CircuitVisionError, InputError, warn
from circuitvision.links import marked
from circuitvision.model.edits.axes import check_axes
from circuitvision.model.edits.base import Edit, EditGroup
from circuitvision.model.edits.binding import CompiledEdits, EditApplier, EditCompiler, as_groups
from circuitvision.model.hooks import Registration
from circuitvision.model.replay import CannotResume
from circuitvision.model.resume import Resumer
from circuitvision.model.routes import (
    PARTS,
    ResumePlan,
    ResumePoint,
    is_dual,
    lowest_position,
    reached_through_cache,
    route_of,
    rows_serve_all,
    stages,
    start_of,
)
from circuitvision.model.state import refuse_random
from circuitvision.progress import Progress
from circuitvision.provenance import describe
from circuitvision.results import Result
from circuitvision.storage import as_builtin

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.model.hooked import HookedModel

POSITIONS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
"""How many positions an automatic batch computes: what keeps the device busy."""
_HARMLESS = ("NoneType", "AlignDevicesHook", "SequentialHook")
"""What accelerate may have put on a module: hooks that move tensors between devices change no value."""
SPARE_POSITIONS = 64
"""How many positions a batch may compute for groups that begin later than its first; another run costs about as much."""
LARGE_SHARE = 0.5
"""Share of the free memory that a single run of all examples may take before a sweep warns."""
SHARE_OF_MEMORY = 0.4
"""Share of the free memory of a GPU that a batch's activations may take."""


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult(Result):
    """The metric under each edit: ``values`` ``[edit example]``, or ``[*axes example]`` where axes were given; ``clean`` ``[example]`` without any
    edit.

    ``edits`` holds each group of edits in the order given (they print as their labels, and can be run again), ``labels`` names them, and ``plan``
    says what was computed for each. ``metric`` is the metric, or the name of the function that it was. ``done`` is False where an interrupted sweep
    did not get to (values are NaN), and ``interrupted`` says by what.
    """

    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    edits: list[EditGroup] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    done: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    interrupted: str = ""
    metric: Any = None

    _per_example: ClassVar[dict[str, int]] = {"clean": -1}

    @property
    def labels(self) -> list[str]:
        """One line for each group of edits, told apart by a number where two are alike."""
        return list(self.axes["edit"]) if "edit" in self.axes else labels(self.edits)

    def rerun(self, model: HookedModel, inputs: Mapping[str, Any], metric: Any = None, **keywords: Any) -> SweepResult:
        """The same edits, metric and axes again, on a model and inputs; further keywords go to ``model.sweep``.

        Whether they are the same model and inputs is for ``provenance`` to say.

        Raises:
            InputError: the metric, or the function of an edit, is known by its name alone and cannot be imported; or an edit's tensor is not there.
        """
        metric = self.metric if metric is None else metric
        if isinstance(metric, NamedFunction):
            metric = metric.resolve()
        given = {name: entries for name, entries in self.axes.items() if name != "example"}
        axes = None if list(given) == ["edit"] else given
        return model.sweep(inputs, self.edits, metric, **{"axes": axes, **keywords})

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The effects: what an edit does, not where it leaves the metric."""
        return self.effect, ("example",)

    def highlights(self) -> dict[str, str]:
        """The edits with the largest mean effect, beside the unedited metric."""
        found = {name: f"{value:+.4g}" for name, value in self.top(5)}
        return {**found, "unedited": f"{float(self.mean(quantity='clean')):.4g}"}

    @property
    def effect(self) -> Tensor:
        """Change of the metric, ``values - clean``, in the shape of ``values``."""
        return self.values - self.clean

    def top(self, count: int = 10) -> list[tuple[str, float]]:
        """The edits with the largest absolute mean effect, strongest first."""
        mean, names = self.mean(quantity="effect").flatten(), self.labels
        order = mean.abs().nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
        found = [(names[index], float(mean[index])) for index in order if not mean[index].isnan()]
        return found[:count]

    def _long_frame(self) -> pd.DataFrame:
        """One row per edit and example: ``value``, ``clean`` and ``effect``, their difference."""
        frame = super()._long_frame()
        frame["clean"] = self.clean.double().repeat(len(frame) // max(1, len(self.clean))).numpy()
        frame["effect"] = frame["value"] - frame["clean"]
        return frame

    def __repr__(self) -> str:
        best = self.top(1)
        strongest = f"; strongest: {best[0][0]}, {best[0][1]:+.4g}" if best else ""
        state = f", interrupted by {self.interrupted}" if self.interrupted else ""
        return f"SweepResult({int(self.done.sum())} of {math.prod(self.values.shape[:-1])} edits, {len(self.clean)} examples{state}{strongest})"


@dataclass(eq=False)
class _Task:
    """One group on its way through a sweep."""

    number: int
    bound: CompiledEdits
    route: ResumePlan | None = None
    first: int = 0
    note: str = ""


class Sweep:
    """One call of ``model.sweep``."""

    def __init__(
        self,
        model: HookedModel,
        inputs: dict[str, Any],
        edits_or_groups: Any,
        metric: Any,
        batch_size: int | str,
        partial: bool,
        progress: bool,
        axes: Mapping[str, Sequence[Any]] | None,
        empty: str = "nan",
    ) -> None:
        if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"batch_size={batch_size!r} is not understood: 'auto', or how many edits run at once.")
        if empty not in ("nan", "clean"):
            raise InputError(f"empty={empty!r} is not understood: 'nan', or 'clean' for the unedited metric.")
        self.empty = empty
        self.model, self.inputs = model, inputs
        self.metric = metrics.bind(metric, model)
        self.batch_size, self.partial, self.progress = batch_size, partial, progress
        refuse_random(model.module, "A sweep")
        if inputs.get("past_key_values") is not None:
            raise InputError("The inputs hold past_key_values, which every run would extend: leave them out.")
        groups = as_groups(edits_or_groups)
        if not groups:
            raise InputError("There is no edit to sweep over.")
        self.axes: dict[str, list[Any]] = (
            {}
            if axes is None
            else {str(name): [as_builtin(label) for label in labels] for name, labels in axes.items()}
        )
        if "example" in self.axes:
            raise InputError("The axis of examples is the sweep's own; call the axis of the edits something else.")
        if axes is not None and math.prod(len(labels) for labels in self.axes.values()) != len(groups):
            sizes = " × ".join(f"{len(labels)} {name}" for name, labels in self.axes.items())
            raise InputError(
                f"The axes describe {sizes}, but there are {len(groups)} edits; the last axis varies fastest."
            )
        self.binder = EditCompiler(model, inputs, warns_of_rows=False)
        bound_groups = self.binder.bind(groups)
        check_axes(self.binder, self.axes, bound_groups)
        self.tasks = [_Task(number, bound) for number, bound in enumerate(bound_groups)]
        self._order = {name: number for number, name in enumerate(model.engine.points)}
        self.resumers: dict[bool, Resumer] = {}
        self.captured: dict[bool, dict[str, Tensor]] = {}
        self.logits: Tensor | None = None
        self.values: Tensor | None = None
        self.limit: int | None = None

    # -- the whole -------------------------------------------------------------------------------------------------------------------------

    def result(self) -> SweepResult:
        """Run everything and return the result."""
        blocker = self._cannot_resume()
        for task in self.tasks:
            self._plan(task, blocker)
        interrupted = ""
        self._warn_of_memory()
        with torch.no_grad():
            clean = self._clean_metric()
            self.values = torch.full(
                (len(self.tasks), len(clean)),
                float("nan"),
                dtype=clean.dtype if clean.is_floating_point() else torch.float64,
            )
            done = torch.zeros(len(self.tasks), dtype=torch.bool)
            try:
                with Progress(len(self.tasks), "sweep", self.progress) as bar:
                    for batch in self._batches():
                        for task, value in self._measure(batch):
                            self.values[task.number], done[task.number] = value, True
                            bar.advance()
            except (KeyboardInterrupt, Exception) as error:
                if not self.partial:
                    raise
                interrupted = f"{type(error).__name__}: {error}".rstrip(": ")
                warn(
                    f"The sweep was interrupted ({interrupted}) after {int(done.sum())} of {len(done)} edits; the others are NaN."
                )
        lost = int(self.values[done].isnan().any(0).sum())
        if lost:
            warn(
                f"The metric is not a number in {lost} of {len(clean)} examples (of some runs), and so is what is made of them."
            )
        groups = [EditGroup(task.bound.group) for task in self.tasks]
        if self.empty == "nan":
            self._leave_out_unedited(groups)
        axes = self.axes or {"edit": labels(groups)}
        shape = [len(entries) for entries in axes.values()]
        return SweepResult(
            values=self.values.view(*shape, len(clean)),
            axes={**axes, "example": list(range(len(clean)))},
            provenance=describe(self.model, method="sweep", metric=self.metric, inputs=(self.inputs,)),
            clean=clean,
            edits=groups,
            plan=[task.note for task in self.tasks],
            done=done.view(shape),
            interrupted=interrupted,
            metric=metrics.kept(self.metric),
        )

    def _warn_of_memory(self) -> None:
        """One warning where what one run of all examples keeps is a large share of the memory that is free."""
        routes = {task.route for task in self.tasks if task.route is not None}
        needed = max((math.prod(self._size(route)) for route in routes), default=0)
        free = free_memory(self.model.device)
        if free is not None and needed > LARGE_SHARE * free:
            warn(
                f"One run of these {self._n_examples()} examples may keep about {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB that are free. "
                "The memory of a sweep grows with its examples: sweep over smaller batches of them, and join the values."
            )

    def _n_examples(self) -> int:
        return max((tokens.n_examples for tokens in self.binder.maps.values()), default=0)

    def _leave_out_unedited(self, groups: Sequence[EditGroup]) -> None:
        """NaN where a group's masks select nothing in an example, and one warning that says in how many."""
        assert self.values is not None
        lost: dict[int, int] = {}
        for task in self.tasks:
            unedited = unedited_examples(self.binder, task.bound.group)
            if unedited is not None and len(unedited) == self.values.shape[1] and bool(unedited.any()):
                self.values[task.number, unedited] = float("nan")
                lost[task.number] = int(unedited.sum())
        if lost:
            number, count = max(lost.items(), key=lambda item: item[1])
            warn(
                f"{len(lost)} of {len(self.tasks)} edits select no position in some of the {self.values.shape[1]} examples, which are NaN and in no "
                f"mean: most often {groups[number]!r}, in {count}. empty='clean' keeps their unedited metric."
            )

    def _evaluate(self, logits: Tensor) -> Tensor:
        logits = marked(logits, self.model.link)
        return metrics.evaluate(self.metric, logits, self.inputs).detach().cpu().clone()

    # -- planning --------------------------------------------------------------------------------------------------------------------------

    def _cannot_resume(self) -> str:
        """Why no run of this sweep can be resumed; "" if they can."""
        if self.model.engine.stack:
            return "other hooks are active, whose effect may be anywhere"
        if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
            return "hooks on all modules are active, whose effect may be anywhere"
        for module in self.model.module.modules():
            if module.training:
                return "the model is in training mode"
            hook = type(getattr(module, "_hf_hook", None)).__name__
            if hook not in _HARMLESS or (hook == "NoneType" and _is_replaced(module)):
                return "forwards of the model were replaced"
        return ""

    def _plan(self, task: _Task, blocker: str) -> None:
        if not task.bound.writes:
            task.note = "nothing changes"
        elif blocker:
            task.note = f"in full: {blocker}"
        elif task.bound.inputs is not None:
            task.note = "in full: the edit changes the inputs"
        else:
            task.route = route_of(self.model, task.bound)

    def _clean_metric(self) -> Tensor:
        """Record the unedited run that each implementation of attention needs, and the metric without edits."""
        for eager in sorted({task.route.eager for task in self.tasks if task.route is not None}):
            tasks = [task for task in self.tasks if task.route is not None and task.route.eager == eager]
            try:
                self._record(eager, tasks)
            except CannotResume as error:
                for task in tasks:
                    task.route, task.note = None, f"in full: {error}"
        for task in self.tasks:
            if task.route is not None:
                self._describe(task, task.route)
        fused = self.resumers.get(False)
        if fused is not None and fused.clean is not None:
            self.logits = fused.clean.output
        else:
            self.logits = self.model._forward(self.inputs, {})
        # The metric may write into what it gets; the unedited output is needed again.
        return self._evaluate(self.logits.clone())

    def _record(self, eager: bool, tasks: Sequence[_Task]) -> None:
        resumer = Resumer(self.model, self.inputs, self.binder.maps, eager)
        starts = {start for task in tasks if task.route for start in task.route.starts}
        prefix_kv: dict[str, int] = {}
        for task in tasks:
            assert task.route is not None
            tower = resumer.sliced_tower(task.route)
            if tower:
                task.first = lowest_position(self.binder, task.bound, tower) if self._only_in(task, tower) else 0
                if task.first:
                    start = task.route.start_in(tower)
                    layer = 0 if start is None else max(start.layer, 0)
                    prefix_kv[tower] = min(prefix_kv.get(tower, layer), layer)
        captures = sorted({site for task in tasks for site in self._captured_before(task)})
        self.captured[eager] = resumer.record(starts, prefix_kv, captures)
        self.resumers[eager] = resumer

    @staticmethod
    def _only_in(task: _Task, tower: str) -> bool:
        """Whether the tower's positions can differ only where the edits say so."""
        assert task.route is not None
        return task.route.start_in(tower) is not None

    def _captured_before(self, task: _Task) -> list[str]:
        """Sites whose value a group needs, and which lie before the place it is resumed from."""
        assert task.route is not None
        return [site for site in task.bound.captures if self._is_before(site, task.route)]

    def _is_before(self, site: str, route: ResumePlan) -> bool:
        here = start_of(self.model, site)
        start = route.start_in(here.tower)
        if start is None:
            order = stages(self.model)
            apart = is_dual(self.model) or order.index(here.tower) < order.index(route.starts[0].tower)
            return apart or here.layer < reached_through_cache(route, self.model, here.tower)
        # A value that enters the place where the run resumes is not computed again.
        entering = here == start and here.name != "block"
        return here < start or (entering and self._order[site] < self._first_point(route))

    def _first_point(self, route: ResumePlan) -> int:
        return min(self._order[site] for task in self.tasks if task.route == route for site in task.bound.writes)

    def _describe(self, task: _Task, route: ResumePlan) -> None:
        resumer = self.resumers[route.eager]
        tower = resumer.sliced_tower(route)
        if task.first:
            start = route.start_in(tower)
            task.first = resumer.safe_start(tower, 0 if start is None else start.layer, task.first)
        where = ", ".join(_place(start) for start in route.starts)
        task.note = f"from {where}{f', positions {task.first}…' if task.first else ''}"

    # -- batches ---------------------------------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[_Task]]:
        routes: dict[ResumePlan | None, list[_Task]] = {}
        for task in self.tasks:
            routes.setdefault(task.route, []).append(task)
        for route, tasks in routes.items():
            if route is None:
                yield from ([task] for task in tasks)
                continue
            waiting = sorted(tasks, key=lambda task: (-task.first, task.number))
            while waiting:
                count = self._count(route, waiting)
                yield waiting[:count]
                waiting = waiting[count:]

    def _count(self, route: ResumePlan, waiting: Sequence[_Task]) -> int:
        """How many of the waiting groups, latest first, run in the next batch."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        rows, length, width = self._size(route)
        device = self.model.device
        positions = POSITIONS_PER_BATCH.get(device.type, POSITIONS_PER_BATCH["cpu"])
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            positions = min(positions, int(SHARE_OF_MEMORY * free / width))
        count, needed = 1, 0
        for number, task in enumerate(waiting, start=1):
            computed = rows * (length - task.first) * number
            needed += rows * (length - task.first)
            if computed > positions or computed - needed > max(SPARE_POSITIONS, needed // 4):
                break
            count = number
        return min(count, self.limit or count)

    def _size(self, route: ResumePlan) -> tuple[int, int, int]:
        """Rows, positions and bytes per position of the largest tower a route computes."""
        found = []
        maps = self.binder.maps
        seen = False
        for name in self.model.towers:
            seen = seen or any(start.tower in (name, "projector") for start in route.starts)
            if seen and name in maps:
                cfg = self.model.towers[name].cfg
                tokens = maps[name]
                bytes_each = 2 if self.model.dtype in (torch.bfloat16, torch.float16) else 4
                width = bytes_each * (12 * cfg.d_model + 3 * cfg.d_mlp + 2 * cfg.n_heads * tokens.n_positions)
                found.append((tokens.n_rows, tokens.n_positions, width))
        return max(found, key=lambda size: size[0] * size[1] * size[2])

    # -- measuring -------------------------------------------------------------------------------------------------------------------------

    def _measure(self, batch: Sequence[_Task]) -> Iterator[tuple[_Task, Tensor]]:
        (route,) = {task.route for task in batch}
        if route is None:
            for task in batch:
                yield task, self._in_full(task)
            return
        waiting = list(batch)
        while waiting:
            size = min(len(waiting), self.limit or len(waiting))
            part = waiting[:size]
            first = min(task.first for task in part)
            try:
                output = self._resumed(part, route, first)
            except CircuitVisionError:
                raise
            except (CannotResume, MemoryError, RuntimeError, ValueError, TypeError, IndexError) as error:
                if _is_out_of_memory(error):
                    self._halve(size, error)
                    continue
                if not isinstance(error, CannotResume):
                    warn(f"A resumed run failed ({type(error).__name__}: {error}), so {len(part)} edits run in full.")
                for task in part:
                    task.note = f"in full: {error}"
                    yield task, self._in_full(task)
            else:
                yield from self._metrics(part, route, output, first)
            waiting = waiting[size:]

    def _halve(self, size: int, error: BaseException) -> None:
        if size == 1:
            raise error
        self.limit = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _in_full(self, task: _Task) -> Tensor:
        if not task.bound.writes:
            assert self.logits is not None
            return self._evaluate(self.logits.clone())
        inputs = self.inputs if task.bound.inputs is None else task.bound.inputs
        with self.model._edited(self.binder, task.bound):
            logits = self.model._forward(inputs, {})
        return self._evaluate(logits)

    def _resumed(self, part: Sequence[_Task], route: ResumePlan, first: int) -> Tensor:
        resumer = self.resumers[route.eager]
        tower = resumer.sliced_tower(route) if first else ""
        writer = EditApplier(self.binder, [task.bound for task in part], {tower: first} if tower else {})
        for number, task in enumerate(part):
            for site in self._captured_before(task):
                value = self.captured[route.eager][site]
                for edit in task.bound.captures[site]:
                    writer.captured[number][edit, site] = value
                writer.known.add(site)
        registration = Registration(forward=writer.hooks(), exact=frozenset(s for t in part for s in t.bound.writes))
        with self.model.engine.registered(registration):
            output = resumer.run(route, len(part), first)
        assert resumer.clean is not None
        clean, cut = resumer.clean.output, bool(first) and resumer.keeps_positions(resumer.sliced_tower(route))
        wanted = (len(part) * clean.shape[0], clean.shape[1] - first, *clean.shape[2:]) if cut else clean.shape
        found = output.shape if cut else _own_rows(output, clean, 0, len(part)).shape
        if tuple(found) != tuple(wanted):
            raise CannotResume(f"the output has shape {tuple(found)}, not {tuple(wanted)}")
        return output

    def _metrics(
        self, part: Sequence[_Task], route: ResumePlan, output: Tensor, first: int
    ) -> Iterator[tuple[_Task, Tensor]]:
        resumer = self.resumers[route.eager]
        assert resumer.clean is not None
        clean = resumer.clean.output
        if not first or not resumer.keeps_positions(resumer.sliced_tower(route)):
            for number, task in enumerate(part):
                yield task, self._evaluate(_own_rows(output, clean, number, len(part)))
            return
        # One buffer serves the library's own metrics: they neither keep nor write into what they get. Only the suffix differs.
        shared = clean.clone() if isinstance(self.metric, metrics.Metric) else None
        rows = clean.shape[0]
        for number, task in enumerate(part):
            whole = clean.clone() if shared is None else shared
            whole[:, first:] = output[number * rows : (number + 1) * rows]
            yield task, self._evaluate(whole)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else None
    except (AttributeError, OSError, ValueError):
        return None


def unedited_examples(binder: EditCompiler, group: Sequence[Edit]) -> Tensor | None:
    """The examples in which no edit of a group selects a position, ``[example]``; None where some edit is not by mask or selection."""
    found: Tensor | None = None
    for edit in group:
        chosen = [
            one for one in (edit.positions, getattr(edit, "keys", None)) if one is not None and one.kind == "mask"
        ]
        if not chosen:
            return None
        for name in edit.sites(binder.model):
            window = binder.window(name)
            if window is None or window.tokens is None or rows_serve_all(binder.model, window.tower):
                return None
            acts = torch.ones(window.rows, dtype=torch.bool)
            for one in chosen:
                if one.tower in ("", window.tower):
                    acts &= one.covers(window).any(1)
            edited = torch.zeros(window.tokens.n_examples, dtype=torch.bool)
            edited[torch.as_tensor(window.tokens.example)[acts]] = True
            found = edited if found is None else found | edited
    return None if found is None else ~found


def labels(groups: Sequence[EditGroup]) -> list[str]:
    """One line for each group, a later one of the same words with its number."""
    found: dict[str, int] = {}
    named = []
    for text in map(repr, groups):
        found[text] = found.get(text, 0) + 1
        named.append(text if found[text] == 1 else f"{text} #{found[text]}")
    return named


def _own_rows(output: Tensor, clean: Tensor, number: int, copies: int) -> Tensor:
    """The output of one group; dual encoders compare rows with columns, either of which may be repeated."""
    rows = clean.shape[0]
    if output.shape[0] == rows * copies:
        output = output[number * rows : (number + 1) * rows]
    if output.ndim == 2 and output.shape[1] == clean.shape[1] * copies:
        output = output[:, number * clean.shape[1] : (number + 1) * clean.shape[1]]
    return output


def _is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _place(start: ResumePoint) -> str:
    if start.tower == "projector":
        return "the projector"
    if start.layer < 0:
        return f"the embeddings of {start.tower}"
    after = {"block": "", "o": " (after attention's pattern)", "post": " (its end)"}
    return f"{start.tower} block {start.layer}{after.get(PARTS[start.part], f' ({start.name})')}"


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
