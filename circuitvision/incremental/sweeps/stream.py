"""A sweep over a data set: examples in batches, sources captured batch by batch, answers from the data.

For each batch of examples the side that edits take their values from is run once, and only the sites that some edit reads are kept. Values are laid
at the positions that belong together (``Batch.matched``). Everything of a batch is gone before the next one is made.

Positions that edits are given per example (regions, masks) are those of the data set, and each batch takes its own; an edit that a function makes for
a batch has those of the batch.

A side as source stands for its own run, without the base. Several bases are several sweeps.

Not covered: edits with sources on two other sides, and examples whose runs differ in what an edit of fixed positions means (make the edits for
each batch, with a function).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from circuitvision import provenance
from circuitvision.answers import check_complete
from circuitvision.digests import plain
from circuitvision.errors import InputError
from circuitvision.incremental.prepared import as_base
from circuitvision.incremental.sweeps.study import Chunk, Options, Study
from circuitvision.links import marked
from circuitvision.metric_set import MetricSet
from circuitvision.model.axes import axis_of, map_of, tower_of
from circuitvision.model.edits.base import Edit, taken
from circuitvision.model.edits.binding import Group, as_groups
from circuitvision.model.edits.values import SideSource, TensorRef, TensorRefMapping
from circuitvision.model.run_functions import per_pass, values_of_passes
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.data.batches import Batch
    from circuitvision.model.wrapped import Wrapped


class DataStudy(Study):
    """Edits and metrics on a data set: a side of pairs, or pairs, which stand for their clean side.

    ``edits`` is a list, or a function of a batch that returns one of the same length for every batch. ``example_batch`` is how many examples run
    together (a folder keeps the number it began with), ``align`` how positions of two sides are matched (see ``Pairs.batches``), ``maps`` the
    position of the source for each of the side that runs. ``source`` is a side whose metrics are measured even if no edit reads it. With
    ``against_source`` metrics that compare with another run compare with the source's, not with the unedited one.
    """

    def __init__(
        self,
        model: Wrapped,
        data: Any,
        edits: Any,
        metric: Any,
        axes: Mapping[str, Sequence[Any]] | None,
        options: Options,
        example_batch: int | None = None,
        align: Any = "kind",
        source: Any = None,
        against_source: bool = False,
        maps: Any = None,
        base: Any = (),
    ) -> None:
        self.side = getattr(data, "clean", data)
        if not len(self.side):
            raise InputError("The data set holds no example.")
        if example_batch is not None and (
            isinstance(example_batch, bool) or not isinstance(example_batch, int) or example_batch < 1
        ):
            raise InputError(f"example_batch={example_batch!r} is not understood: how many examples run at once.")
        self.data, self.make = data, edits if callable(edits) else None
        self.example_batch, self.align, self.against_source = example_batch, align, against_source
        self.model, self.source, self.maps = model, source, maps
        self.check_batch: Callable[[Mapping[str, Any]], None] | None = None
        """Looks at the inputs of each batch before it runs."""
        self._check_data()
        self.make_base = base if callable(base) else None
        super().__init__(model, self.side, edits, metric, axes, options, base)
        check_complete(self.side, self.metrics.asks())
        listed = [self.base, *self.groups]
        found = {edit_source for group in listed for edit in group if (edit_source := _side_of(edit))}
        sides = [one.side for one in found]
        others = [one for one in sides if one is not self.side]
        if source is None and others:
            self.source = others[0]
            self._check_data()
        wrong = [one for one in others if one is not self.source]
        if wrong:
            raise InputError(
                f"Edits take their values from two sides ({self.source!r} and {wrong[0]!r}); a sweep reads one: make two sweeps."
            )

    def _check_data(self) -> None:
        """Raise InputError for answers that are not one, and for sides whose prompts have other lengths, of all examples before any runs."""
        from circuitvision.data.checks import check_answers, check_lengths

        check_answers(self.side, self.model)
        if self.source is not None and len(self.source) == len(self.side):
            check_lengths(self._pairs(), self.model, self.align)

    # -- what a data set says --------------------------------------------------------------------------------------------------------------

    def _listed(self, edits: Any) -> list[Group]:
        if self.make is None:
            return as_groups(edits)
        return as_groups(self.make(next(self._batches(self.example_batch))))

    def _base(self, base: Any) -> Group:
        if self.make_base is not None:
            base = self.make_base(next(self._batches(self.example_batch)))
        return as_base(base)

    def _weight(self) -> int:
        return len(self.side)

    def _n_examples(self) -> int:
        return len(self.side)

    def _labels(self) -> list[Any]:
        return list(self.side.numbers)

    def _groups_of_examples(self) -> list[Any]:
        return [] if self.side.groups is None else list(self.side.groups)

    def _data_sha256(self) -> str:
        told = [
            self.side.digest,
            *([] if self.source is None else [self.source.digest, plain(self.align), plain(self.maps)]),
        ]
        return provenance.of_json(told)

    def told(self) -> dict[str, Any]:
        found = super().told()
        if self.model.family.drawn is not None:
            # Noise that a model starts from is drawn by the numbers of the examples, which say nothing of what they hold.
            found["noise"] = list(self.side.numbers)
        return found

    def _edits_told(self) -> Any:
        return [plain(self.make), len(self.groups)] if self.make is not None else plain(self.groups)

    def _base_told(self) -> Any:
        return plain(self.base) if self.make_base is None else plain(self.make_base)

    def _bound(self) -> MetricSet:
        return self.metrics

    # -- batches ---------------------------------------------------------------------------------------------------------------------------

    def _layout(self) -> dict[str, Any]:
        """How many examples run together, which a folder keeps: its parts are batches of so many."""
        if self.example_batch is None:
            from circuitvision.data.batches import automatic_size

            self.example_batch = automatic_size(self.model, self.side[0])
        return {"example_batch": self.example_batch}

    def _use_layout(self, layout: Mapping[str, Any]) -> None:
        self.example_batch = layout.get("example_batch", self.example_batch)

    def _batches(self, size: int | None) -> Iterator[Batch]:
        if self.source is None or self.source is self.side:
            if (self.make or self.make_base) and hasattr(self.data, "corrupt"):
                return self.data.batches(self.model, size, self.align)
            return self.side.batches(self.model, size)
        return self._pairs().batches(self.model, size, self.align)

    def _pairs(self) -> Any:
        """The side that runs with the one that edits read."""
        from circuitvision.data import Pairs

        if getattr(self.data, "corrupt", None) is self.source:
            return self.data
        return Pairs.from_sides(self.side, self.source, maps=self.maps)

    def _chunks(self) -> Iterator[Callable[[], Chunk]]:
        size = self._layout()["example_batch"]
        rows = {number: row for row, number in enumerate(self.side.numbers)}
        for number, batch in enumerate(self._batches(size)):
            yield lambda number=number, batch=batch: self._chunk(number, batch, [rows[one] for one in batch.examples])  # type: ignore[misc]

    def _chunk(self, number: int, batch: Batch, rows: list[int]) -> Chunk:
        count = len(self.side)
        groups: list[Group] = [taken(group, rows, count) for group in self.groups] if self.make is None else []
        if self.make is not None:
            groups = as_groups(self.make(batch))
            if len(groups) != len(self.groups):
                raise InputError(
                    f"The function made {len(groups)} edits for one batch and {len(self.groups)} for another: it makes as many for each."
                )
        base = taken(self.base, rows, count) if self.make_base is None else as_base(self.make_base(batch))
        metrics = self.metrics.take(rows, count)
        metrics = self._read_by_run(metrics.bind(self.model, batch.answers, batch.foils, batch.combine))
        inputs = self.model._checked(batch.inputs)
        if self.check_batch is not None:
            self.check_batch(inputs)
        _check_ends(inputs, [base, *groups])
        chunk = Chunk(number, inputs, groups, metrics, rows, base=base)
        held = self._held(chunk, self.side, batch, batch.inputs)
        if self.source is not None and self.source is not self.side:
            held |= self._held(chunk, self.source, batch, batch.other)
        if held:
            chunk.groups = [tuple(own for edit in group for own in self._filled(edit, held)) for group in chunk.groups]
            chunk.base = tuple(own for edit in chunk.base for own in self._filled(edit, held))
        return chunk

    def _held(self, chunk: Chunk, side: Any, batch: Batch, inputs: Any) -> dict[tuple[int, str], list[Tensor]]:
        """Run one side of a batch, and return the values that edits take from it, at the positions of the side that is edited: one for each pass
        where a run has several."""
        wanted = sorted(
            {
                site
                for group in (chunk.base, *chunk.groups)
                for edit in group
                if (source := _side_of(edit)) is not None and source.side is side
                for site in edit.sites(self.model)
            }
        )
        of_source = side is self.source
        if not wanted and not of_source:
            return {}
        run, found = self.options.run, {}
        if run is None:
            output, values = self.model._values_at(inputs, wanted)
            found = {name: [value] for name, value in values.items()}
        else:
            output, found = values_of_passes(self.model, run, inputs, wanted)
        if of_source:
            output = marked(output, self.model.link) if run is None else output
            if self.against_source:
                chunk.metrics = chunk.metrics.against(output)
            chunk.others["source"] = lambda metrics: metrics(output, inputs)
        laid = {
            name: [value if side is self.side else laid_values(self.model, batch, name, value) for value in passes]
            for name, passes in found.items()
        }
        return {(id(side), name): passes for name, passes in laid.items()}

    def _filled(self, edit: Edit, held: Mapping[tuple[int, str], list[Tensor]]) -> list[Edit]:
        """The edit with the values of this batch; of runs of several passes one edit for each."""
        side = _side_of(edit)
        if side is None:
            return [edit]
        names = edit.sites(self.model)
        found = {name: held[id(side.side), name] for name in names}
        if self.options.run is not None:
            return list(per_pass(edit, found))
        refs = {name: TensorRef.of(value) for name, (value,) in found.items()}
        source = refs[names[0]] if names == [edit.site] else TensorRefMapping(tuple(refs.items()))
        return [dataclasses.replace(edit, source=source)]  # type: ignore[call-arg]


def laid_values(model: Wrapped, batch: Batch, site: str, value: Tensor) -> Tensor:
    """The values of the other run of a batch at a site, at the positions of this run.

    Raises:
        InputError: a site that holds some positions only, of two runs whose positions do not stand in one order.
    """
    name = SiteName.parse(site)
    tower = map_of(model, name)
    tokens = model.tokens(batch.inputs).get(tower)
    if tokens is None or tower not in batch.maps:
        return value
    axis = axis_of(model.towers[tower_of(model, name)], name, tokens, batch.inputs)
    if axis.absent and not name.is_pattern:
        return value
    held = list(range(tokens.n_positions)) if axis.held is None else list(axis.held)
    first = held[0] if held else 0
    if held != list(range(first, tokens.n_positions)):
        moved = (batch.maps[tower][:, held] != held).any()
        if moved:
            raise InputError(
                f"{site} holds some positions of the {tower} tower only, and those of the two sides do not stand in one order: take a site "
                "that holds them all, or align='index'."
            )
        return value
    return batch.matched(tower, value, (2, 3) if name.is_pattern else (1,), dropped=first)


def _side_of(edit: Edit) -> SideSource | None:
    source = getattr(edit, "source", None)
    return source if isinstance(source, SideSource) else None


def _check_ends(inputs: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Raise InputError where positions count from the end of prompts that others of their batch are longer than: what fills up would be named."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or bool(mask.bool().all()):
        return
    for edit in itertools.chain.from_iterable(groups):
        for chosen in (edit.positions, getattr(edit, "keys", None)):
            bounds = getattr(chosen, "bounds", (None, None, None))[:2]
            if chosen is not None and min([*chosen.ints, *(end for end in bounds if end is not None)], default=0) < 0:
                raise InputError(
                    f"{edit!r} counts positions from the end of the row, and the prompts of this data set have different lengths: "
                    "take 'last', a kind, a function of the tokens, or cv.regions.at with one number per example."
                )
