"""The two runs of an experiment, clean and corrupt, from pairs or from inputs in memory: what is patched, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits, provenance
from circuitvision.data.batches import Batch
from circuitvision.data.checks import check_answers
from circuitvision.errors import InputError
from circuitvision.metric_set import MetricSet
from circuitvision.model.edits.base import Edit, EditGroup
from circuitvision.model.packing import laid_out
from circuitvision.model.run_functions import RunFunction, checked_run, values_of_passes
from circuitvision.model.sites import SiteName
from circuitvision.model.tokens import position_names
from circuitvision.patching.clean_answers import CleanAnswers

if TYPE_CHECKING:
    from circuitvision.incremental.sweeps.stream import DataStudy
    from circuitvision.incremental.sweeps.study import Study

Groups = Sequence[tuple[Edit, ...]]


@dataclass
class Sides:
    """One batch of examples for which edits are made: the base run's inputs, and values of the source run laid at the base run's positions.

    ``rows`` are the places of its examples in a data set of ``count``; None for inputs in memory.
    """

    inputs: Mapping[str, Any]
    source: Mapping[str, Tensor]
    rows: list[int] | None = None
    count: int = 0


@dataclass
class Measured:
    """Metrics of the base run under each group of edits, of the base run alone and of the source run."""

    values: Float[Tensor, "metric group example"]
    base: Float[Tensor, "metric example"]
    source: Float[Tensor, "metric example"]
    examples: list[Any]
    groups: list[Any] = field(default_factory=list)
    edits: list[EditGroup] = field(default_factory=list)
    """The groups that were run; of groups that were made for each batch those of the first."""


@dataclass
class RunBatch:
    """Some examples of both runs: inputs of the base run, and what the source run held at the base run's positions.

    ``values`` belong to whoever reads the batch. ``metrics`` are bound; ``source`` reads metrics of the source run. ``examples`` are the labels of
    the examples, None where the metric says how many there are; ``rows`` their places in a data set of ``count``.
    """

    inputs: Mapping[str, Any]
    values: dict[str, Tensor]
    metrics: MetricSet
    source: Callable[[MetricSet], Float[Tensor, "metric example"]]
    examples: list[Any] | None = None
    number: int = 0
    rows: list[int] | None = None
    """The places of its examples in a data set of ``count``; None for inputs in memory."""
    count: int = 0


class Runs:
    """A base run that is edited and a source run whose values it takes."""

    model: Any
    metrics: MetricSet
    run: RunFunction | None = None
    """What one run is; None: one forward pass."""
    fixed_positions: Mapping[str, Sequence[int]]
    """The positions of each site that edits name by number, which every example must have; empty where none does."""

    def first_inputs(self, count: int = 1) -> Mapping[str, Any]:
        """Inputs of the base run, of the first examples: so many of a data set, all that are in memory."""
        raise NotImplementedError

    def passes(self, names: Sequence[str]) -> dict[str, int]:
        """How often each site runs, as the base run of some examples shows."""
        if self.run is None:
            return dict.fromkeys(names, 1)
        of_tower = {SiteName.parse(name).tower: name for name in names}
        with torch.no_grad():
            _, found = values_of_passes(self.model, self.run, self.first_inputs(), list(of_tower.values()))
        return {name: len(found[of_tower[SiteName.parse(name).tower]]) for name in names}

    def position_names(self, held: Mapping[str, Sequence[int]], count: int = 8) -> list[str]:
        """What stands at the positions that any of the sites holds, in the first examples; none for sites of several towers."""
        towers = {SiteName.parse(site).tower for site in held}
        inputs = self.first_inputs(count)
        tokens = self.model.tokens(inputs).get(next(iter(towers))) if len(towers) == 1 else None
        places = sorted({place for own in held.values() for place in own})
        return [] if tokens is None or max(places, default=0) >= tokens.n_positions else position_names(tokens, places)

    def sources(self, names: Sequence[str]) -> dict[str, Any]:
        """What an edit takes as the source run's values at each site; a list where a run has several passes."""
        raise NotImplementedError

    def holds(self, names: Sequence[str]) -> dict[str, Any]:
        """The base run's own values at each site, as a source."""
        raise NotImplementedError

    def measure(self, groups: Groups, base: Sequence[Edit] = (), **options: Any) -> Measured:
        """Run the groups, under a base of edits; ``options`` go to the sweep."""
        raise NotImplementedError

    def study(self, names: Sequence[str]) -> Study:
        """What reads the examples of both runs, with the source run's values at these sites: what a folder is told of them."""
        raise NotImplementedError

    def told(self) -> list[str]:
        """What else a folder is told: digests of what the study does not hold."""
        return []

    def batches(
        self, names: Sequence[str], study: Study | None = None, done: Container[int] = ()
    ) -> Iterator[RunBatch]:
        """The examples of a study (None: of :meth:`study`), some at a time, with the source run's values at these sites; without batches done."""
        raise NotImplementedError

    @property
    def groups(self) -> list[Any]:
        """Which examples belong together, where the data says so."""
        return []

    def look(self, base: Tensor, source: Tensor, examples: Sequence[Any], first: bool) -> None:
        """See the metrics of both runs of a batch before it is edited; raises InputError where the clean run is not what it should be."""

    def warn(self) -> None:
        """Say what was seen in single examples, at the end."""

    def measure_made(
        self, make: Callable[[Sides], Groups], names: Sequence[str], base: Sequence[Edit] = (), **options: Any
    ) -> Measured:
        """Run the groups that ``make`` gives for each batch of examples, from the source's values at the sites ``names``."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """What a provenance says of the data."""
        raise NotImplementedError


def two_runs(
    model: Any,
    pairs: Any,
    metric: Any,
    clean: Any,
    corrupt: Any,
    mode: str,
    align: Any = "kind",
    size: int | None = None,
    allow_wrong: bool = False,
    run: RunFunction | None = None,
) -> Runs:
    """The two runs of pairs, or of ``clean`` and ``corrupt`` inputs; ``allow_wrong``: whether the clean runs may give other answers than the pairs';
    ``run`` says what a run is, as of ``model.sweep``.

    Raises:
        InputError: neither or both given, no metric, an unknown mode, inputs of different shapes.
    """
    if mode not in ("denoise", "noise"):
        raise InputError(
            f"Unknown mode {mode!r}; choose 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)."
        )
    if metric is None:
        raise InputError("No metric was given: a metric, its name ('logit_diff'), or a mapping of several.")
    given = MetricSet.of(metric)
    checked_run(run)
    if pairs is None and clean is not None and corrupt is not None:
        clean, corrupt = laid_out(model, clean), laid_out(model, corrupt)
        check_same_shapes(clean, corrupt)
        bound = given.bind(model)
        return InputRuns(model, bound if run is None else bound.of_marked(), clean, corrupt, mode, run)
    if pairs is None or clean is not None or corrupt is not None:
        raise InputError("Give pairs (cv.data.Pairs), or the inputs of both runs: clean=… and corrupt=….")
    if not (hasattr(pairs, "clean") and hasattr(pairs, "corrupt")):
        raise InputError(
            f"A {type(pairs).__name__} is no data set of pairs: give cv.data.Pairs, or inputs as clean=… and corrupt=…."
        )
    return PairRuns(model, given, pairs, mode, align, size, allow_wrong, run)


def one_run(model: Any, data: Any, metric: Any, size: int | None = None, allow_wrong: bool = False) -> Runs:
    """A run beside itself under a base of edits: what groups take from its source are its unedited values.

    ``data`` are inputs, or a data set (of pairs the clean side). Raises InputError without a metric.
    """
    if metric is None:
        raise InputError("No metric was given: a metric, its name ('logit_diff'), or a mapping of several.")
    given = MetricSet.of(metric)
    if hasattr(data, "batches"):
        return SideRuns(model, given, getattr(data, "clean", data), size, allow_wrong)
    inputs = laid_out(model, data)
    return InputRuns(model, given.bind(model), inputs, inputs, "denoise")


class InputRuns(Runs):
    """Two runs whose inputs are in memory."""

    def __init__(
        self, model: Any, metrics: MetricSet, clean: Any, corrupt: Any, mode: str, run: RunFunction | None = None
    ) -> None:
        self.model, self.metrics, self.mode, self.run = model, metrics, mode, run
        self.both = (clean, corrupt)
        self.base_inputs, self.source_inputs = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
        self.fixed_positions = {}
        self.source: Tensor | None = None
        self._base_cache: Any = {}

    def first_inputs(self, count: int = 1) -> Mapping[str, Any]:
        """The inputs of the base run."""
        return self.base_inputs

    def sources(self, names: Sequence[str]) -> dict[str, Any]:
        """The values of the source run; its metric is read on the way."""
        with torch.no_grad():
            cache: Any = {}
            if self.run is not None:
                output, cache = values_of_passes(self.model, self.run, self.source_inputs, names)
            elif names:
                output, cache = self.model.run_with_cache(self.source_inputs, names_filter=list(names))
            else:
                output = self.model(self.source_inputs)
            if self.mode == "denoise":
                self.metrics = self.metrics.against(output)
            elif self.metrics.compares:
                self.metrics = self.metrics.against(self._output(self.base_inputs))
            self.source = self.metrics(output, self.source_inputs)
        return {name: cache[name] for name in names}

    def _output(self, inputs: Mapping[str, Any], edits: Sequence[Edit] = ()) -> Tensor:
        """The output of a run under these edits."""
        found: Tensor = (
            self.model.run(inputs, list(edits)) if self.run is None else self.run(self.model, inputs, list(edits))
        )
        return found

    def holds(self, names: Sequence[str]) -> dict[str, Any]:
        """The values of the base run."""
        with torch.no_grad():
            _, cache = self.model.run_with_cache(self.base_inputs, names_filter=list(names))
        return {name: cache[name] for name in names}

    def measure(self, groups: Groups, base: Sequence[Edit] = (), **options: Any) -> Measured:
        """One sweep; the base run alone where there is no group."""
        assert self.source is not None
        several = self.metrics.several
        if not groups:
            with torch.no_grad():
                alone = self.metrics(self._output(self.base_inputs, base), self.base_inputs)
            return Measured(alone[:, None][:, :0], alone, self.source, list(range(alone.shape[1])))
        metric = dict(self.metrics.members) if several else self.metrics.members[""]
        options = options if self.run is None else {**options, "run": self.run}
        swept = self.model.sweep(self.base_inputs, list(groups), metric, base=base, **options)
        values, found = (swept.values, swept.clean) if several else (swept.values[None], swept.clean[None])
        return Measured(values, found, self.source, list(range(found.shape[1])), edits=swept.edits)

    def study(self, names: Sequence[str]) -> Study:
        """The base run's inputs."""
        from circuitvision.incremental.sweeps.study import Options, Study

        given = dict(self.metrics.members) if self.metrics.several else self.metrics.members[""]
        return Study(self.model, self.base_inputs, [()], given, None, Options())

    def told(self) -> list[str]:
        """The source run's inputs."""
        return [provenance.hash_inputs(self.source_inputs)]

    def batches(
        self, names: Sequence[str], study: Study | None = None, done: Container[int] = ()
    ) -> Iterator[RunBatch]:
        """One batch."""
        if 0 in done:
            return
        with torch.no_grad():
            output, values = self.model._values_at(self.source_inputs, names)
        metrics = self.metrics.against(output) if self.mode == "denoise" else self.metrics
        yield RunBatch(self.base_inputs, values, metrics, lambda found: found(output, self.source_inputs))

    def measure_made(
        self, make: Callable[[Sides], Groups], names: Sequence[str], base: Sequence[Edit] = (), **options: Any
    ) -> Measured:
        """One batch: the inputs themselves."""
        return self.measure(make(Sides(self.base_inputs, self.sources(names))), base, **options)

    def described(self) -> dict[str, Any]:
        """Both inputs."""
        return {"inputs": self.both}


class PairRuns(Runs):
    """The two sides of pairs, in batches."""

    def __init__(
        self,
        model: Any,
        metrics: MetricSet,
        pairs: Any,
        mode: str,
        align: Any,
        size: int | None,
        allow_wrong: bool = False,
        run: RunFunction | None = None,
    ) -> None:
        self.model, self.metrics, self.pairs, self.mode = model, metrics, pairs, mode
        self.answers = CleanAnswers.of(metrics, allow_wrong)
        self.align, self.size, self.run = align, size, run
        self.base, self.origin = (pairs.corrupt, pairs.clean) if mode == "denoise" else (pairs.clean, pairs.corrupt)
        self.maps = inverse_maps(pairs.maps) if mode == "denoise" else None
        self.fixed_positions = {}

    def first_inputs(self, count: int = 1) -> Mapping[str, Any]:
        """The inputs of the first examples."""
        return next(iter(self.base[:count].batches(self.model, count))).inputs

    def sources(self, names: Sequence[str]) -> dict[str, Any]:
        """The source side itself, which is read batch by batch."""
        return dict.fromkeys(names, self.origin)

    def holds(self, names: Sequence[str]) -> dict[str, Any]:
        """The base side itself."""
        return dict.fromkeys(names, self.base)

    def measure(self, groups: Groups, base: Sequence[Edit] = (), **options: Any) -> Measured:
        """One sweep over the data set."""
        return self._measured(list(groups) or [()], len(groups), base, options)

    def measure_made(
        self, make: Callable[[Sides], Groups], names: Sequence[str], base: Sequence[Edit] = (), **options: Any
    ) -> Measured:
        """One sweep whose edits are made batch by batch."""
        return self._measured(_MadeOfBatches(self, make, names), None, base, options)

    def _measured(self, groups: Any, count: int | None, base: Sequence[Edit], options: Mapping[str, Any]) -> Measured:
        swept = self._study(groups, base, **options).result()
        self.warn()
        values, found, source = swept.values, swept.clean, swept.source
        if not self.metrics.several:
            values, found, source = values[None], found[None], source[None]
        return Measured(values[:, :count], found, source, swept.axes["example"], swept.groups, swept.edits[:count])

    def _study(self, groups: Any, base: Sequence[Edit] = (), **options: Any) -> DataStudy:
        """The base side under these edits, or what makes them for a batch, beside the source side."""
        from circuitvision.incremental.sweeps.stream import DataStudy
        from circuitvision.incremental.sweeps.study import Options

        study = DataStudy(
            self.model,
            self.pairs if self.mode == "noise" else self.base,
            groups,
            self.metrics,
            None,
            Options(**options, run=self.run),
            self.size,
            self.align,
            source=self.origin,
            against_source=self.mode == "denoise",
            maps=self.maps,
            base=base,
        )
        study.check_batch = self._check_positions if self.fixed_positions else None
        study.check_runs = self._look_at
        return study

    def _look_at(self, number: int, base: Tensor, others: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        self.look(base, others["source"], [self.base.numbers[row] for row in rows], number == 0)

    def look(self, base: Tensor, source: Tensor, examples: Sequence[Any], first: bool) -> None:
        """See whether the clean runs of a batch give the answer."""
        self.answers.look(source if self.mode == "denoise" else base, examples, first)

    def warn(self) -> None:
        """Say in how many examples it does not."""
        self.answers.warn()

    def study(self, names: Sequence[str]) -> Study:
        """Both sides."""
        return self._study([tuple(edits.replace(name, self.origin) for name in names)])

    def batches(
        self, names: Sequence[str], study: Study | None = None, done: Container[int] = ()
    ) -> Iterator[RunBatch]:
        """The batches of both sides."""
        for number, make in enumerate((study or self.study(names))._chunks()):
            if number in done:
                continue
            with torch.no_grad():
                chunk = make()
            (group,) = chunk.groups
            values = {edit.site: edit.source.tensor for edit in group}  # type: ignore[attr-defined]
            rows = chunk.examples or []
            labels = [self.base.numbers[row] for row in rows]
            batch = RunBatch(
                chunk.inputs, values, chunk.metrics, chunk.others["source"], labels, number, rows, len(self.base)
            )
            # The batch alone holds the values, so that whoever reads it can let go of them.
            del chunk, group, values
            yield batch

    @property
    def groups(self) -> list[Any]:
        """The groups of the base side."""
        return [] if self.base.groups is None else list(self.base.groups)

    def _check_positions(self, inputs: Mapping[str, Any]) -> None:
        for name, expected in self.fixed_positions.items():
            found = self.model.positions(name, inputs)
            if list(found) != list(expected):
                raise InputError(
                    f"{name} has {len(found)} positions in some examples and {len(expected)} in the first, so a position number does not mean the "
                    "same in all: take prompts of one length, or leave 'position' out of axes."
                )

    def described(self) -> dict[str, Any]:
        """The digest of the pairs."""
        return {"dataset_sha256": self.pairs.digest, "examples": len(self.pairs)}


class SideRuns(PairRuns):
    """A side of a data set beside itself."""

    def __init__(self, model: Any, metrics: MetricSet, side: Any, size: int | None, allow_wrong: bool = False) -> None:
        check_answers(side, model)
        self.model, self.metrics, self.pairs, self.mode = model, metrics, side, "denoise"
        self.answers = CleanAnswers.of(metrics, allow_wrong)
        self.base = self.origin = side
        self.align, self.maps, self.size, self.run, self.fixed_positions = "kind", None, size, None, {}


class _MadeOfBatches:
    """Edits made for each batch of a data set; those of the batch that was counted are kept until it runs."""

    def __init__(self, runs: PairRuns, make: Callable[[Sides], Groups], names: Sequence[str]) -> None:
        self.runs, self.make, self.names = runs, make, list(names)
        self.counted: dict[tuple[Any, ...], Groups] | None = None

    def __provenance__(self) -> dict[str, Any]:
        return {"made": self.make}

    def __call__(self, batch: Batch) -> Groups:
        """The groups of one batch."""
        from circuitvision.incremental.sweeps.stream import laid_values

        key = tuple(batch.examples)
        if self.counted and key in self.counted:
            return self.counted.pop(key)
        model, side = self.runs.model, self.runs.base
        with torch.no_grad():
            one = self.runs.origin is side
            values = model._values_at(batch.inputs if one else batch.other, self.names)[1]
        source = {name: value if one else laid_values(model, batch, name, value) for name, value in values.items()}
        rows = {number: row for row, number in enumerate(side.numbers)}
        groups = self.make(Sides(batch.inputs, source, [rows[one] for one in batch.examples], len(side)))
        self.counted = {key: groups} if self.counted is None else {}
        return groups


def inverse_maps(maps: Any) -> Any:
    """Position maps the other way round: for every corrupt position the clean one that takes its values."""
    return None if maps is None else [None if own is None else _turned(own) for own in maps]


def _turned(own: Any) -> Any:
    if isinstance(own, Mapping):
        return {tower: _turned(one) for tower, one in own.items()}
    listed = [int(place) for place in own]
    if sorted(listed) != list(range(len(listed))):
        raise InputError(
            "A map of positions names one corrupt position twice, or leaves one out, so it cannot be turned round: patch with mode='noise', or give "
            "maps that pair positions one by one."
        )
    found = [0] * len(listed)
    for here, there in enumerate(listed):
        found[there] = here
    return found


def check_same_shapes(clean: Mapping[str, Any], corrupt: Mapping[str, Any]) -> None:
    """Raise InputError unless two input mappings have the same tensors of the same shapes."""
    for name in sorted({*clean, *corrupt}):
        first, second = clean.get(name), corrupt.get(name)
        if isinstance(first, Tensor) != isinstance(second, Tensor):
            raise InputError(f"Only one of the two inputs has {name!r}; make both in the same way.")
        if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape != second.shape:
            raise InputError(
                f"{name} is {tuple(first.shape)} in the clean inputs and {tuple(second.shape)} in the corrupt ones. "
                "Patching puts values of one run into the other: prompts need one token length, images one size."
            )
