"""Groups of edits on inputs in memory: what is computed once, what again, and in which batches.

Groups of edits that begin at the same place form one *route* (``routes.py``); the groups of a route run in batches through the incremental forward
(``resume.py``). The unedited run, means and sources are computed once. A group that cannot be resumed runs in full, and its plan says why.

A sweep of a run function (``run=``, see :mod:`circuitvision.model.run_functions`) runs it whole, group by group.

When memory runs out a batch is halved, down to one group. Which groups share a batch follows from the groups and the batch size alone: a sweep that
is continued runs the same batches as one that was never interrupted, and so gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import CircuitVisionError, InputError, warn
from circuitvision.incremental.prepared import run_batch
from circuitvision.incremental.replay import CannotResume, rows_of_group
from circuitvision.incremental.resume import Resumer, blocked_by
from circuitvision.incremental.routes import (
    ResumePlan,
    is_unedited,
    lowest_position,
    route_of,
)
from circuitvision.incremental.sweeps.batches import (
    LARGE_SHARE,
    count_fitting,
    free_memory,
    halved,
    is_out_of_memory,
    size_of_route,
)
from circuitvision.incremental.sweeps.plan import NOTHING, Plan
from circuitvision.links import link_of, marked
from circuitvision.metric_set import MetricSet
from circuitvision.model.edits.applying import edited
from circuitvision.model.edits.binding import CompiledEdits, EditCompiler, Group
from circuitvision.model.run_functions import RunFunction, mode_of, passes_of
from circuitvision.model.state import refuse_random

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped


@dataclass(eq=False)
class Task:
    """One group on its way through a sweep."""

    number: int
    bound: CompiledEdits
    route: ResumePlan | None = None
    first: int = 0
    plan: Plan = field(default_factory=Plan)


class GroupRunner:
    """Measures groups of edits on one batch of examples: :meth:`start` once, then :meth:`measure` for each of :meth:`batches`."""

    def __init__(
        self,
        model: Wrapped,
        inputs: dict[str, Any],
        groups: Sequence[Group],
        metrics: MetricSet,
        batch_size: int | str = "auto",
        base: Group = (),
        run: RunFunction | None = None,
    ) -> None:
        if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"batch_size={batch_size!r} is not understood: 'auto', or how many edits run at once.")
        refuse_random(model.module, "A sweep")
        if inputs.get("past_key_values") is not None:
            raise InputError("The inputs hold past_key_values, which every run would extend: leave them out.")
        self.model, self.inputs, self.metrics, self.batch_size = model, inputs, metrics, batch_size
        self.run = run
        mode, passes = ("run", None) if run is None else (mode_of(model), passes_of(model, run))
        self.binder = EditCompiler(model, inputs, mode, passes, warns_of_rows=False, base=base)
        # A run function binds its edits itself; here they are checked, before any of them runs.
        bound = self.binder.bind(groups) if run is None else self.binder.check(groups)
        self.tasks = [Task(number, one) for number, one in enumerate(bound)]
        self.resumers: dict[bool, Resumer] = {}
        self.captured: dict[bool, dict[str, Tensor]] = {}
        self.logits: Tensor | None = None
        self.limit: int | None = None

    def start(self) -> Float[Tensor, "metric example"]:
        """Plan every group, record the run that only the base edits (nothing, without one), and return the metrics of it."""
        blocker = blocked_by(self.model) if self.run is None else "one run is several passes"
        for task in self.tasks:
            self._plan(task, blocker)
        self._warn_of_memory()
        return self._clean_metric()

    def _warn_of_memory(self) -> None:
        """One warning where what one run of all examples keeps is a large share of the memory that is free."""
        routes = {task.route for task in self.tasks if task.route is not None}
        needed = max((math.prod(size_of_route(self.binder, route)) for route in routes), default=0)
        free = free_memory(self.model.device)
        if free is not None and needed > LARGE_SHARE * free:
            count = max((tokens.n_examples for tokens in self.binder.windows.maps.values()), default=0)
            warn(
                f"One run of these {count} examples may keep about {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB that are free. The memory of "
                "a sweep grows with its examples: give a data set (cv.data.Pairs), which is run in batches, or fewer of them at once."
            )

    def _evaluate(self, logits: Tensor) -> Tensor:
        return self.metrics(logits if self.run else marked(logits, self.model.link), self.inputs)

    # -- planning --------------------------------------------------------------------------------------------------------------------------

    def _plan(self, task: Task, blocker: str) -> None:
        if not task.bound.writes:
            task.plan = Plan(reason=NOTHING)
        elif blocker:
            task.plan = Plan(reason=blocker)
        elif task.bound.inputs is not None:
            task.plan = Plan(reason="the edit changes the inputs")
        else:
            task.route = route_of(self.model, task.bound, self.binder.base)

    def _clean_metric(self) -> Tensor:
        """Record the unedited run that each implementation of attention needs, and the metric without edits."""
        for eager in sorted({task.route.eager for task in self.tasks if task.route is not None}):
            tasks = [task for task in self.tasks if task.route is not None and task.route.eager == eager]
            try:
                self._record(eager, tasks)
            except CannotResume as error:
                for task in tasks:
                    task.route, task.plan = None, Plan(reason=str(error))
        for task in self.tasks:
            if task.route is not None:
                self._describe(task, task.route)
        fused = self.resumers.get(False)
        if self.run is not None:
            self.logits = self.run(self.model, self.inputs, [])
        elif fused is not None and fused.clean is not None:
            self.logits = fused.clean.output
        else:
            self.logits = self._output_in_full(CompiledEdits(()))
        self.metrics = self.metrics.against(self.logits)
        # The metric may write into what it gets; the unedited output is needed again.
        return self._evaluate(_copied(self.logits))

    def _record(self, eager: bool, tasks: Sequence[Task]) -> None:
        resumer = Resumer(self.binder, eager)
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
    def _only_in(task: Task, tower: str) -> bool:
        """Whether the tower's positions can differ only where the edits say so."""
        assert task.route is not None
        return task.route.start_in(tower) is not None

    def _captured_before(self, task: Task) -> list[str]:
        """Sites whose value a group needs, and which lie before the place it is resumed from."""
        assert task.route is not None
        captured = {**self.binder.base.captures, **task.bound.captures}
        if not captured:
            return []
        writes = {site for other in self.tasks if other.route == task.route for site in other.bound.writes}
        return [site for site in captured if is_unedited(self.model, site, task.route, writes)]

    def _describe(self, task: Task, route: ResumePlan) -> None:
        resumer = self.resumers[route.eager]
        tower = resumer.sliced_tower(route)
        if task.first:
            start = route.start_in(tower)
            task.first = resumer.safe_start(tower, 0 if start is None else start.layer, task.first)
        task.plan = Plan.of_route(route, task.first)

    # -- batches ---------------------------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[list[Task]]:
        """The groups, in the batches that run together; late positions do not pay for early ones."""
        routes: dict[ResumePlan | None, list[Task]] = {}
        for task in self.tasks:
            routes.setdefault(task.route, []).append(task)
        for route, tasks in routes.items():
            if route is None:
                yield from ([task] for task in tasks)
                continue
            waiting = sorted(tasks, key=lambda task: (-task.first, task.number))
            size = size_of_route(self.binder, route)
            while waiting:
                if self.batch_size == "auto":
                    firsts = [task.first for task in waiting]
                    count = min(count_fitting(self.model.device, size, firsts), self.limit or len(waiting))
                else:
                    count = int(self.batch_size)
                yield waiting[:count]
                waiting = waiting[count:]

    # -- measuring -------------------------------------------------------------------------------------------------------------------------

    def measure(self, batch: Sequence[Task]) -> Iterator[tuple[Task, Float[Tensor, "metric example"]]]:
        """Run the groups of a batch, or of what is left of one, and read the metrics of each."""
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
                if is_out_of_memory(error):
                    self.limit = halved(size, error)
                    continue
                if not isinstance(error, CannotResume):
                    warn(f"A resumed run failed ({type(error).__name__}: {error}), so {len(part)} edits run in full.")
                for task in part:
                    task.plan = Plan(reason=str(error))
                    yield task, self._in_full(task)
            else:
                yield from self._metrics(part, route, output, first)
            waiting = waiting[size:]

    def _in_full(self, task: Task) -> Tensor:
        if not task.bound.writes:
            assert self.logits is not None
            return self._evaluate(_copied(self.logits))
        if self.run is not None:
            return self._evaluate(self.run(self.model, self.inputs, list(task.bound.group)))
        return self._evaluate(self._output_in_full(task.bound))

    def _output_in_full(self, bound: CompiledEdits) -> Tensor:
        inputs = self.binder.run_inputs if bound.inputs is None else bound.inputs
        with edited(self.binder, bound):
            return self.model._forward(dict(inputs), {})

    def _resumed(self, part: Sequence[Task], route: ResumePlan, first: int) -> Tensor:
        groups = [task.bound for task in part]
        return run_batch(self.resumers[route.eager], self.binder, groups, route, first, self.captured[route.eager])

    def _metrics(
        self, part: Sequence[Task], route: ResumePlan, output: Tensor, first: int
    ) -> Iterator[tuple[Task, Tensor]]:
        resumer = self.resumers[route.eager]
        assert resumer.clean is not None
        clean = resumer.clean.output
        if not first or not resumer.keeps_positions(resumer.sliced_tower(route)):
            for number, task in enumerate(part):
                yield task, self._evaluate(rows_of_group(output, clean, number, len(part)))
            return
        # One buffer serves the library's own metrics: they neither keep nor write into what they get. Only the suffix differs.
        shared = clean.clone() if self.metrics.reads_only else None
        rows = clean.shape[0]
        for number, task in enumerate(part):
            whole = clean.clone() if shared is None else shared
            whole[:, first:] = output[number * rows : (number + 1) * rows]
            yield task, self._evaluate(whole)


def _copied(output: Tensor) -> Tensor:
    return marked(output.clone(), link_of(output))
