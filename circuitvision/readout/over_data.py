"""Reads over a data set: one batch at a time, one value per example, nothing else kept.

A lens or an attribution of one run has values per row and position. Over a data set positions differ from prompt to prompt, so the mean over the
chosen ones is kept (see :func:`circuitvision.readout.probes.collected.chosen`; several choices by name are the axis ``position``), rows of one
example (images, tiles, cameras) are averaged, and what is left is ``[… example]``: memory goes by examples times what is read, and not by positions
or batches.

Not covered: the highest columns at every place (``top_k``), which have no mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from circuitvision.answers import take
from circuitvision.data import Batch, Pairs, Side
from circuitvision.errors import InputError
from circuitvision.model.positions import warn_of_empty, without_any
from circuitvision.progress import Progress
from circuitvision.provenance import describe
from circuitvision.readout.probes.collected import chosen_at_site, position_label, positions_for
from circuitvision.results import Result
from circuitvision.statistics import by_example

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True, eq=False)
class DataReading(Result):
    """What a read says of every example of a data set: ``values`` ``[… example]``, in float64; labels of ``example`` are the numbers of the examples.

    ``positions`` says over which positions it is the mean (empty where the read has none), ``groups`` what belongs together (empty where the data
    set does not say).
    """

    tower: str = ""
    measure: str = ""
    positions: str = ""
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"groups": 0}


def side_of(source: Any) -> Side | None:
    """The data set that is read, where inputs may be one: of pairs their clean side; None for anything else."""
    return source.clean if isinstance(source, Pairs) else source if isinstance(source, Side) else None


def answers_of(batch: Batch) -> dict[str, Any] | None:
    """The answers and foils of a batch as targets: a column each, one per example; None where it has none."""
    found = {name: held for name, held in (("answer", batch.answers), ("foil", batch.foils)) if held is not None}
    return found or None


def of_batch(value: Any, rows: Sequence[int], count: int) -> Any:
    """What is given for a whole data set, for the examples at some of its places: lists have one entry per example, alone, in a pair or a mapping.

    Raises:
        InputError: a list of another length, which a batch might fit by accident.
    """
    if isinstance(value, Mapping):
        return {name: of_batch(one, rows, count) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(of_batch(one, rows, count) for one in value)
    if isinstance(value, list) and len(value) not in (1, count):
        raise InputError(f"A list has one entry per example, and {value!r:.60} has {len(value)} for {count} examples.")
    return value if isinstance(value, Tensor) and value.is_floating_point() else take(value, rows, count)


def over_data(
    model: Wrapped,
    data: Side,
    read: Callable[[Batch, list[int]], Result],
    *,
    positions: Any = None,
    batch_size: int | None = None,
    method: str = "read",
) -> DataReading:
    """A read of every example of a data set.

    Args:
        model: the hooked model.
        data: the data set.
        read: the result for a batch, given with the places of its examples in the data set; its values have an axis of examples, and may have one
            of positions.
        positions: over which positions the mean is taken, where there are several; a mapping holds one choice per tower, or several by name.
        batch_size: examples that run at once; None: by memory.
        method: for the provenance.

    Raises:
        InputError: no example; an example without such a position, or positions given one by one for another number of examples; rows that are
        no examples.
    """
    positions = positions_for(len(data), None, positions)
    parts: list[Tensor] = []
    empty: dict[str, int] = {}
    axes: dict[str, list[Any]] = {}
    first: Result | None = None
    done = 0
    with Progress(len(data), method, shown=len(data) > 1) as bar:
        for batch in data.batches(model, batch_size):
            rows = list(range(done, done + len(batch)))
            result = read(batch, rows)
            found, own, without = _by_example(model, result, batch, rows, positions)
            empty = {name: empty.get(name, 0) + count for name, count in without.items()}
            if first is not None and own != axes:
                raise InputError(
                    "Batches of this data set are read along different axes; read its parts by themselves."
                )
            first, axes = first or result, own
            parts.append(found.cpu())
            done += len(batch)
            bar.advance(len(batch))
    assert first is not None
    warn_of_empty(empty or {position_label(positions): _lost(parts)}, len(data))
    return DataReading(
        values=torch.cat(parts, -1),
        axes={**axes, "example": list(data.numbers)},
        provenance=describe(model, method=method, dataset_sha256=data.digest, examples=len(data)),
        tower=str(getattr(first, "tower", "")),
        measure=str(getattr(first, "measure", "") or getattr(first, "direction", "")),
        positions=position_label(positions) if "position" in first.axes else "",
        groups=[] if data.groups is None else list(data.groups),
    )


def _lost(parts: Sequence[Tensor]) -> int:
    """In how many examples there is no value."""
    return sum(int(part.isnan().flatten(0, -2).all(0).sum()) for part in parts)


def _by_example(
    model: Wrapped, result: Result, batch: Batch, rows: list[int], positions: Any
) -> tuple[Tensor, dict[str, list[Any]], dict[str, int]]:
    """Values ``[… example]`` of one batch: means over positions, then over the rows of an example; with the other axes, and in how many examples each
    choice of positions is empty."""
    axes = {name: list(labels) for name, labels in result.axes.items() if name != "example"}
    values, empty = result.values.double(), {}
    examples = np.array(result.axes["example"], dtype=int)
    if len(examples) and int(examples.max()) >= len(batch):
        raise InputError(
            "The rows of this tower are no examples of the data set (texts that images are compared with)."
        )
    if "position" in axes and all(isinstance(position, int) for position in axes["position"]):
        tower, at = str(getattr(result, "tower", "")), [int(position) for position in axes["position"]]
        tokens, axis = model.tokens(batch.inputs)[tower], list(axes).index("position")
        values, means = values.movedim(axis, -2), []
        several = isinstance(positions, Mapping) and not set(positions) & set(model.towers)
        for name, own in (positions if several else {position_label(positions): positions}).items():
            mask = chosen_at_site(tokens, at[0], own, range(rows[0], rows[-1] + 1))[:, at].to(values.device)
            # What is not chosen does not count, not even as a NaN.
            mean = torch.where(mask.T, values, 0.0).sum(-2) / mask.sum(1).clamp(min=1)
            means.append(mean.masked_fill(~mask.any(1), torch.nan))
            empty[name] = len(without_any(mask.cpu(), examples.tolist(), len(batch)))
        axes |= {"position": list(empty)}
        if not several:
            axes.pop("position")
        values = torch.stack(means, axis) if several else means[0]
    found = values.new_full((*values.shape[:-1], len(batch)), torch.nan)
    found[..., list(dict.fromkeys(examples.tolist()))] = by_example(values, examples.tolist())
    return found, axes, empty
