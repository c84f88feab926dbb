"""One call of ``model.sweep``: inputs in memory or a data set in batches, parts kept in a folder, and the result.

What is checked before anything runs: the metric, the edits, the axes, and that the folder holds this study or none. Values of all examples are kept,
activations only of the batch that runs: memory does not grow with the number of examples.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitvision import provenance
from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError, warn
from circuitvision.incremental.prepared import as_base
from circuitvision.incremental.sweeps.batches import unedited_examples
from circuitvision.incremental.sweeps.plan import Plan
from circuitvision.incremental.sweeps.result import SweepResult, labels
from circuitvision.incremental.sweeps.run import GroupRunner, Task
from circuitvision.incremental.sweeps.store import Part, Store, joined, orderly_stop
from circuitvision.metric_set import MetricSet
from circuitvision.model.edits.axes import check_axes
from circuitvision.model.edits.base import EditGroup, settled
from circuitvision.model.edits.binding import EditCompiler, Group, as_groups
from circuitvision.model.run_functions import RunFunction, checked_run, described_run
from circuitvision.progress import Progress
from circuitvision.results import check_labels
from circuitvision.storage import as_builtin

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True)
class Options:
    """How a sweep runs: what changes none of its numbers, but for ``empty``, and ``run``, which says what one run is."""

    batch_size: int | str = "auto"
    partial: bool = False
    empty: str = "nan"
    progress: bool = True
    save_to: str | Path | None = None
    resume: bool = False
    run: RunFunction | None = None

    def __post_init__(self) -> None:
        if self.empty not in ("nan", "clean"):
            raise InputError(f"empty={self.empty!r} is not understood: 'nan', or 'clean' for the unedited metric.")
        checked_run(self.run)
        if self.resume and self.save_to is None:
            raise InputError("resume=True continues a sweep from its folder: name it, save_to=folder.")


@dataclass
class Chunk:
    """The examples that run together: their inputs, edits and metrics. ``examples`` is None where the run itself says how many there are; ``others``
    give the metrics of further runs of the same examples, by name."""

    number: int
    inputs: dict[str, Any]
    groups: list[Group]
    metrics: MetricSet
    examples: list[int] | None = None
    others: dict[str, Callable[[MetricSet], Tensor]] = field(default_factory=dict)
    base: Group = ()


class Study:
    """Edits and metrics on inputs in memory, under a base of edits; a data set is the subclass's (``stream.py``)."""

    def __init__(
        self,
        model: Wrapped,
        inputs: Any,
        edits: Any,
        metric: Any,
        axes: Mapping[str, Sequence[Any]] | None,
        options: Options,
        base: Any = (),
    ) -> None:
        self.model, self.inputs, self.options = model, inputs, options
        self.metrics = MetricSet.of(metric)
        self.base = self._base(base)
        if options.run is not None and (base if callable(base) else self.base):
            raise InputError(
                "base= is of forward passes, and run= makes runs of its own: give the base's edits in every group."
            )
        self.groups = self._listed(edits)
        if not self.groups:
            raise InputError("There is no edit to sweep over.")
        self.axes = _checked_axes(axes, len(self.groups))
        self.parts: list[Part] = []
        self.plans: dict[int, Plan] = {}
        self.check_runs: Callable[[int, Tensor, Mapping[str, Tensor], list[int]], None] | None = None
        """Looks at the metrics of each batch's unedited and other runs, and whose they are, before anything is edited."""

    # -- what differs for a data set -------------------------------------------------------------------------------------------------------

    def _listed(self, edits: Any) -> list[Group]:
        if callable(edits):
            raise InputError(
                "Edits that are made for each batch need a data set (cv.data.Pairs); for inputs in memory give a list."
            )
        return as_groups(edits)

    def _base(self, base: Any) -> Group:
        if callable(base):
            raise InputError("A base that is made for each batch needs a data set (cv.data.Pairs); here give a list.")
        return as_base(base)

    def _chunks(self) -> Iterator[Callable[[], Chunk]]:
        """The batches of examples, each made when it is needed."""
        metrics = self._read_by_run(self.metrics.bind(self.model))
        yield lambda: Chunk(0, self.inputs, self.groups, metrics, base=self.base)

    def _read_by_run(self, metrics: MetricSet) -> MetricSet:
        """Bound metrics as they read the output of what one run is."""
        return metrics if self.options.run is None else metrics.of_marked()

    def _weight(self) -> int:
        """How many steps of progress one group makes."""
        return 1

    def _data_sha256(self) -> str:
        return provenance.hash_inputs(self.inputs)

    def _edits_told(self) -> Any:
        return plain(self.groups)

    def _base_told(self) -> Any:
        return plain(self.base)

    def _layout(self) -> dict[str, Any]:
        """What a folder keeps of how its parts were cut."""
        return {}

    def _use_layout(self, layout: Mapping[str, Any]) -> None:
        """Cut the parts as a folder's were."""

    def _n_examples(self) -> int:
        """How many examples there are, where that is known before a run; else 0."""
        return 0

    def _labels(self) -> list[Any]:
        """The labels of the axis ``example``, where they are known before a run."""
        return []

    def _groups_of_examples(self) -> list[Any]:
        return []

    def _bound(self) -> MetricSet:
        """The metrics as the result keeps them."""
        return self.metrics.bind(self.model)

    # -- the whole -------------------------------------------------------------------------------------------------------------------------

    def told(self) -> dict[str, Any]:
        """What must be equal for the numbers to be equal, by name."""
        base = self._base_told()
        return provenance.told_of_model(self.model) | {
            "inputs": self._data_sha256(),
            "edits": of_json(self._edits_told()),
            **({"base": of_json(base)} if base else {}),
            # Parts hold one row per metric, without names: their order belongs to the study.
            "metrics": of_json([self.metrics.names, plain(self.metrics)]),
            **({} if self.options.run is None else {"run": of_json(plain(self.options.run))}),
        }

    def result(self) -> SweepResult:
        """Run what is not finished and return the whole."""
        options, interrupted = self.options, ""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            store = None
            if options.save_to is not None:
                store = stack.enter_context(Store(options.save_to, self.told(), options.resume))
                self.parts = store.parts()
                self._use_layout(store.layout)
            bar = Progress(len(self.groups) * self._weight(), "sweep", options.progress)
            try:
                with orderly_stop() if store else contextlib.nullcontext(), bar:
                    for number, make in enumerate(self._chunks()):
                        self._run(number, make, store, bar)
            except (KeyboardInterrupt, Exception) as error:
                if not options.partial or not self.parts:
                    raise
                interrupted = f"{type(error).__name__}: {error}".rstrip(": ")
        return self._joined(interrupted)

    def _run(self, number: int, make: Callable[[], Chunk], store: Store | None, bar: Progress) -> None:
        """Run what is not finished of one batch of examples."""
        known = [part for part in self.parts if part.batch == number]
        done = {group for part in known for group in part.groups}
        for part in known:
            bar.advance(len(part.groups) * (1 if self._weight() == 1 else len(part.examples)), measured=False)
        if len(done) == len(self.groups):
            return
        chunk = make()
        options = self.options
        runner = GroupRunner(
            self.model, chunk.inputs, chunk.groups, chunk.metrics, options.batch_size, chunk.base, options.run
        )
        if number == 0:
            check_axes(runner.binder, self.axes, [task.bound for task in runner.tasks])
        if store is not None:
            store.begin(self._layout())
        try:
            clean, others, examples = self._start(number, chunk, runner)
        except InputError:
            if store is not None:
                store.take_back()
            raise
        unedited = {
            task.number: lost
            for task in runner.tasks
            if task.number not in done and (lost := self._unedited(runner.binder, task.bound.group)) is not None
        }
        lost = unedited_examples(runner.binder, chunk.base)
        if lost is not None and self.options.empty == "nan" and len(lost) == len(examples):
            clean[:, lost] = math.nan
        step = 1 if self._weight() == 1 else len(examples)
        for batch in runner.batches():
            waiting = [task for task in batch if task.number not in done]
            found: dict[int, tuple[Task, Tensor]] = {}
            try:
                for task, values in runner.measure(waiting) if waiting else ():
                    found[task.number] = (task, values)
                    bar.advance(step)
            finally:
                if found:
                    part = _part(number, examples, clean, found, unedited, others)
                    self.parts.append(part)
            if found and store is not None:
                store.write(part)

    @staticmethod
    def _unedited(binder: EditCompiler, group: Group) -> Tensor | None:
        """The examples in which a group selects no position, or the base selects none."""
        found = [lost for one in (group, binder.base.group) if (lost := unedited_examples(binder, one)) is not None]
        return torch.stack(found).any(0) if found else None

    def _start(self, number: int, chunk: Chunk, runner: GroupRunner) -> tuple[Tensor, dict[str, Tensor], list[int]]:
        """The metrics of a batch's unedited run and of its other runs, and whose they are."""
        clean = runner.start()
        others = {name: measure(runner.metrics) for name, measure in chunk.others.items()}
        examples = list(range(clean.shape[1])) if chunk.examples is None else chunk.examples
        if len(examples) != clean.shape[1]:
            raise InputError(
                f"The metric counts {clean.shape[1]} examples in a batch of {len(examples)}: a metric gives one number per example."
            )
        if self.check_runs is not None:
            self.check_runs(number, clean, others, examples)
        return clean, others, examples

    def _joined(self, interrupted: str) -> SweepResult:
        """All parts as one result, with what has to be said about them."""
        count = max((max(part.examples) for part in self.parts), default=-1) + 1
        whole = joined(self.parts, len(self.groups), max(count, self._n_examples()))
        values, measured, unedited = whole["values"], whole["done"], whole["unedited"]
        done = measured.all(-1)
        if interrupted:
            warn(
                f"The sweep was interrupted ({interrupted}) after {int(done.sum())} of {len(done)} edits; the others are NaN."
            )
        lost = int((values.isnan() & measured & ~unedited).any(0).any(0).sum())
        if lost:
            warn(
                f"The metric is not a number in {lost} of {values.shape[-1]} examples (of some runs), and so is what is made of them."
            )
        groups = settled(self.groups)
        if self.options.empty == "nan":
            _leave_out_unedited(values, unedited, groups)
        axes = self.axes or {"edit": labels(groups)}
        lead = self.metrics.axis
        shape = [*map(len, lead.values()), *map(len, axes.values())]
        plans = {
            number: plan for part in reversed(self.parts) for number, plan in zip(part.groups, part.plan, strict=True)
        }
        return SweepResult(
            values=values.view(*shape, -1),
            axes={**lead, **axes, "example": self._labels() or list(range(values.shape[-1]))},
            provenance=provenance.describe(
                self.model,
                method="sweep",
                metric=self._bound(),
                dataset_sha256=self._data_sha256(),
                **described_run(self.options.run),
            ),
            clean=self._lead(whole["clean"]),
            source=self._lead(whole["other.source"]) if "other.source" in whole else torch.zeros(0),
            groups=self._groups_of_examples(),
            edits=groups,
            base=settled([self.base])[0],
            plan=[plans.get(number, Plan(reason="not measured")) for number in range(len(groups))],
            done=done.view(*map(len, axes.values())),
            interrupted=interrupted,
            metric=self._bound().kept(),
        )

    def _lead(self, found: Tensor) -> Tensor:
        """Metrics as the leading axis, where there are several."""
        return found if self.metrics.several else found[0]


def _part(
    number: int,
    examples: list[int],
    clean: Tensor,
    found: Mapping[int, tuple[Task, Tensor]],
    unedited: Mapping[int, Tensor],
    others: dict[str, Tensor],
) -> Part:
    nowhere = torch.zeros(len(examples), dtype=torch.bool)
    empty = [unedited.get(group, nowhere) for group in found]
    return Part(
        batch=number,
        examples=examples,
        groups=list(found),
        values=torch.stack([values for _, values in found.values()], dim=1),
        clean=clean,
        unedited=torch.stack([one if len(one) == len(nowhere) else nowhere for one in empty]),
        plan=[task.plan for task, _ in found.values()],
        others=others,
    )


def _checked_axes(axes: Mapping[str, Sequence[Any]] | None, count: int) -> dict[str, list[Any]]:
    """The axes of the edits with their labels as plain values; empty where none were given."""
    if axes is None:
        return {}
    found = {str(name): [as_builtin(label) for label in entries] for name, entries in axes.items()}
    taken = [name for name in ("example", "metric") if name in found]
    if taken:
        raise InputError(f"The axis {taken[0]!r} is the sweep's own; call the axis of the edits something else.")
    if math.prod(map(len, found.values())) != count:
        sizes = " × ".join(f"{len(entries)} {name}" for name, entries in found.items())
        raise InputError(f"The axes describe {sizes}, but there are {count} edits; the last axis varies fastest.")
    check_labels(found)
    return found


def _leave_out_unedited(values: Tensor, unedited: Tensor, groups: Sequence[EditGroup]) -> None:
    """NaN where a group's masks select nothing in an example, and one warning that says in how many."""
    counts = unedited.sum(-1)
    if not bool(counts.any()):
        return
    values[:, unedited] = float("nan")
    number = int(counts.argmax())
    warn(
        f"{int((counts > 0).sum())} of {len(groups)} edits select no position in some of the {values.shape[-1]} examples, which are NaN and in no "
        f"mean: most often {groups[number]!r}, in {int(counts[number])}. empty='clean' keeps their unedited metric."
    )
