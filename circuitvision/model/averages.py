"""Averages and draws over what is there: means of activations for ablation, and other examples' values for resampling.

Positions of the kinds ``ABSENT`` (padding, empty cells of a grid, cameras that are not there) never count, on either side: they are in no mean, they
give no value to a real position, and nothing is written to them where the new value differs by position. Columns of padding therefore change nothing.

A mean per position is taken over positions that are the same thing: of one kind, and of one place in the grid where they are patches. Where rows do
not line up at a position that is asked for, it is refused before anything runs.

Rows are not examples: another example's value comes from a row of another example, of the same image and tile where there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.axes import axis_of, map_of, tower_of
from circuitvision.model.edits.values import TensorRef
from circuitvision.model.positions import Positions
from circuitvision.model.regions import Region
from circuitvision.model.selection import Selection
from circuitvision.model.sites import SiteName
from circuitvision.model.tokens import ABSENT, KINDS, TokenMap, present

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

Array = np.ndarray
Average = str | tuple[str, ...] | Positions
"""Over what a mean goes: "position", "all", "kind", the names of kinds, or a selection."""
WORDS = ("position", "all", "kind")


def average_of(spec: str | Iterable[str] | Selection | Region | Average) -> Average:
    """An average as a value: a word, a tuple of kinds, a selection, or a region; InputError for anything else."""
    if isinstance(spec, Positions) or (isinstance(spec, str) and spec in WORDS):
        return spec
    if isinstance(spec, Region):
        return Positions.of(spec)
    if isinstance(spec, Selection):
        return Positions("mask", mask=TensorRef(spec.tensor), tower=spec.tower, label=spec.label)
    kinds = (spec,) if isinstance(spec, str) else tuple(spec) if isinstance(spec, Iterable) else ()
    known = [kind for kind in KINDS if kind not in ABSENT]
    if not kinds or any(not isinstance(kind, str) or kind not in known for kind in kinds):
        raise InputError(
            f"average={spec!r} is not understood: 'position', 'all', 'kind', one or several kinds ({', '.join(known)}), a Selection, or a region."
        )
    return kinds


@dataclass(frozen=True, eq=False)
class Layout:
    """What the rows and positions of a site's values are, in one run."""

    tower: str
    example: Array
    """Example of each row."""
    there: Array
    """Which entries hold something: ``[row pos]``, or ``[row]`` where the site has no positions."""
    kind: Array | None = None
    """Kind of every position, ``[row pos]``; None where no token map says it."""
    unit: Array = field(default_factory=lambda: np.zeros(0))
    """Image and tile of each row, ``[row 2]``."""
    held: Array | None = None
    """The positions of the tower that the site holds, in order; None for all."""
    tokens: TokenMap | None = None
    donors: dict[int, list[list[int]]] = field(default_factory=dict)
    """By seed, what :func:`other_examples` found."""

    @functools.cached_property
    def place(self) -> Array | None:
        """Kind, and of patches row and column in their grid, ``[row pos]``: equal where two positions are the same thing."""
        return None if self.tokens is None else self.of_site(places(self.tokens))

    @classmethod
    def of(
        cls,
        model: Wrapped,
        maps: Mapping[str, TokenMap],
        site: str,
        shape: Sequence[int],
        settings: Mapping[str, Any],
    ) -> Layout:
        """The layout of values of a shape in a run with these settings; where no token map fits, every entry counts and every row is an example."""
        name = SiteName.parse(site)
        has_positions = len(shape) == (4 if name.has_heads else 3)
        owner = map_of(model, name)
        tokens = maps.get(owner)
        if tokens is None or tokens.n_rows != shape[0]:
            there = np.ones(tuple(shape[: 1 + has_positions]), dtype=bool)
            return cls(owner, np.arange(shape[0]), there, unit=np.zeros((shape[0], 2), dtype=int))
        if not has_positions:
            return cls(owner, tokens.example, _rows_there(tokens), unit=_units(tokens))
        axis = axis_of(model.towers[tower_of(model, name)], name, tokens, settings)
        if axis.absent or axis.count(tokens.n_positions) != shape[1]:
            there = np.repeat(_rows_there(tokens)[:, None], shape[1], axis=1)
            return cls(owner, tokens.example, there, unit=_units(tokens))
        return cls.of_tokens(tokens, axis.held)

    @classmethod
    def of_tokens(cls, tokens: TokenMap, held: Sequence[int] | None = None) -> Layout:
        """The layout of a tower's positions, or of those that a site holds."""
        columns = None if held is None else np.asarray(held, dtype=int)
        kind = tokens.kind if columns is None else tokens.kind[:, columns]
        return cls(tokens.tower, tokens.example, present(kind), kind, _units(tokens), columns, tokens)

    def of_site(self, mask: Array) -> Array:
        """The entries of the site's own axis, of a mask over all positions of the tower ``[row pos]``."""
        return mask if self.held is None else mask[:, self.held]

    def index(self, position: int) -> int | None:
        """Where a position of the tower stands in the site's own axis; None where the site does not hold it."""
        if self.held is None:
            return position if position < self.there.shape[1] else None
        found = np.flatnonzero(self.held == position)
        return int(found[0]) if len(found) else None


def places(tokens: TokenMap) -> Array:
    """What every position is, as text ``[row pos]``: its kind, and of a patch its row and column in the grid."""
    found = tokens.kind.astype(object)
    patches = tokens.kind == "patch"
    rows, cols = tokens.patch_row[patches], tokens.patch_col[patches]
    found[patches] = [f"patch r{row}c{col}" for row, col in zip(rows.tolist(), cols.tolist(), strict=True)]
    return found


def _rows_there(tokens: TokenMap) -> Array:
    """Which rows hold anything."""
    return np.asarray(tokens.present.any(axis=1))


def _units(tokens: TokenMap) -> Array:
    return np.stack([tokens.image_number.max(1), tokens.tile.max(1)], axis=1)


# -- means ---------------------------------------------------------------------------------------------------------------------------------


class Tally:
    """The mean of one site over several runs: sums in float64, and how many entries went into each.

    Sums per position are of the tower's positions: runs whose site holds others of them (a cache, ``logits_to_keep``) line up all the same.
    """

    def __init__(self, site: str, average: Average) -> None:
        self.site, self.average = site, average
        self.sums: dict[Any, Tensor] = {}
        self.counts: dict[Any, Tensor] = {}
        self.without_positions = False

    def add(
        self, value: Tensor, layout: Layout, examples: Sequence[int] | None = None, count: int | None = None
    ) -> None:
        """Count the values of one run, of all examples or of some of a data set's ``count``, by their places there."""
        exact = value.detach().double()
        self.without_positions = layout.there.ndim == 1
        if self.without_positions and isinstance(self.average, str):
            self._keep("rows", exact[torch.from_numpy(layout.there)])
        elif self.average == "position":
            self._keep_positions(exact, layout)
        else:
            for name, mask in self._masks(layout, examples, count).items():
                self._keep(name, exact[torch.from_numpy(mask).to(exact.device)])

    def _masks(self, layout: Layout, examples: Sequence[int] | None, count: int | None) -> dict[str, Array]:
        if self.average == "all" or layout.kind is None:
            if self.average not in ("all", "kind"):
                raise InputError(f"{self.site} has no positions whose kinds are known, so average='all' is the mean")
            return {"all": layout.there}
        if self.average == "kind":
            return {str(kind): layout.kind == kind for kind in np.unique(layout.kind) if kind not in ABSENT}
        if isinstance(self.average, Positions):
            own = self.average if examples is None else self.average.taken(examples, count)
            return {"all": selected(own, layout)}
        return {"all": np.isin(layout.kind, self.average)}

    def _keep(self, name: Any, entries: Tensor) -> None:
        total, count = entries.sum(0), torch.tensor(len(entries))
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def _keep_positions(self, exact: Tensor, layout: Layout) -> None:
        there = torch.from_numpy(layout.there).to(exact.device)
        wide = there.view(*there.shape, *[1] * (exact.ndim - 2))
        total, count = torch.where(wide, exact, 0.0).sum(0), there.sum(0)
        if layout.held is not None and layout.tokens is not None:
            total, count = (_spread(part, layout.held, layout.tokens.n_positions) for part in (total, count))
        if "position" in self.sums:
            if layout.kind is None and self.sums["position"].shape != total.shape:
                raise InputError(
                    f"{self.site} has {len(total)} positions in one part of the data set and {len(self.sums['position'])} in another; "
                    "a mean per position needs inputs of one size: use average='all'"
                )
            total, count = (_plus(a, b) for a, b in ((self.sums["position"], total), (self.counts["position"], count)))
        self.sums["position"], self.counts["position"] = total, count

    def mean(self, name: Any = None) -> Tensor:
        """The mean of a kind, of all, or of every position (0 where nothing was there); InputError where nothing counts."""
        name = next(iter(self.sums)) if name is None else name
        total, count = self.sums[name], self.counts[name].to(self.sums[name].device)
        if not bool((count > 0).any()):
            raise InputError(
                f"average={shown(self.average)}: no position of {self.site} in these inputs is one of them"
            )
        return total / count.clamp_min(1).view(*count.shape, *[1] * (total.ndim - count.ndim))

    def source(self, layout: Layout | None) -> tuple[Tensor, Array | None]:
        """What a run gets, broadcasting to the site, and which entries get it (None: all); its layout is None where no token map says it."""
        if self.average == "position" and not self.without_positions:
            mean = self.mean()
            if layout is None or layout.kind is None:
                return mean[None], None if layout is None or bool(layout.there.all()) else layout.there
            return _gathered(mean, layout)[None], layout.there
        if self.average == "kind" and layout is not None and layout.kind is not None:
            found = {kind: self.mean(kind) for kind in self.sums}
            one = next(iter(found.values()))
            out = one.new_zeros(*layout.kind.shape, *one.shape)
            for kind, mean in found.items():
                out[torch.from_numpy(layout.kind == kind).to(out.device)] = mean
            return out, layout.there
        mean = self.mean()
        return (mean if self.without_positions else mean[None]), None

    def counted(self, layout: Layout) -> Tensor:
        """How many entries went into the mean of each position that a run's site holds."""
        return _gathered(self.counts["position"], layout)


def _gathered(part: Tensor, layout: Layout) -> Tensor:
    """Of something for each position of a tower what a run's site holds; 0 behind its end."""
    held = np.arange(layout.there.shape[1]) if layout.held is None else layout.held
    missing = part.new_zeros(max(0, int(held.max(initial=-1)) + 1 - len(part)), *part.shape[1:])
    return torch.cat([part, missing])[torch.from_numpy(held).to(part.device)]


def _spread(part: Tensor, held: Array, length: int) -> Tensor:
    """What a site holds of each position, at its place among all positions of the tower; 0 elsewhere."""
    out = part.new_zeros(length, *part.shape[1:])
    out[torch.from_numpy(held).to(part.device)] = part
    return out


def _plus(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two tensors of which one may have more positions."""
    long, short = (one, other) if len(one) >= len(other) else (other, one)
    out = long.clone()
    out[: len(short)] += short
    return out


def selected(average: Positions, layout: Layout) -> Array:
    """The entries of a layout that a selection of its run holds; InputError for one of another tower or run."""
    if average.region is not None and layout.tokens is not None:
        return layout.of_site(average.resolve(layout.tokens).numpy()) & layout.there
    if average.mask is None:
        raise InputError(
            f"a mean over {average.text} needs to know what stands at which position, which is not known here"
        )
    mask = average.mask.tensor.cpu().numpy()
    if average.tower != layout.tower:
        raise InputError(f"the mean is over a selection of the {average.tower} tower, not of {layout.tower}")
    mask = layout.of_site(mask)
    if mask.shape != layout.there.shape:
        raise InputError(
            f"the mean is over a selection of {mask.shape[0]} rows and {mask.shape[1]} positions, the inputs have "
            f"{layout.there.shape[0]} and {layout.there.shape[1]}: select in the tokens of the data set, or name kinds"
        )
    return mask & layout.there


def shown(average: Average) -> str:
    """An average as it would be written by hand."""
    if isinstance(average, Positions):
        return average.label or (average.text if average.region is not None else "selection")
    return repr(average[0] if isinstance(average, tuple) and len(average) == 1 else average)


_FIX = "Take average='all' or 'kind', the mean over a kind such as average='patch', or inputs that line up."


class Seen:
    """What stands at every position of the inputs that a mean goes over: how many entries, and which things they are."""

    def __init__(self, layouts: Iterable[Layout] = ()) -> None:
        self.names: dict[int, set[str]] = {}
        self.counts: dict[int, int] = {}
        self.kinds: set[str] = set()
        self.unknown = False
        for layout in layouts:
            self.add(layout)

    def add(self, layout: Layout) -> None:
        """Note one run."""
        if layout.place is None or layout.kind is None:
            self.unknown = True
            return
        self.kinds |= {str(kind) for kind in np.unique(layout.kind[layout.there])}
        for column in np.flatnonzero(layout.there.any(0)).tolist():
            position = column if layout.held is None else int(layout.held[column])
            found = layout.place[layout.there[:, column], column]
            self.names.setdefault(position, set()).update(map(str, found))
            self.counts[position] = self.counts.get(position, 0) + len(found)


def check_aligned(run: Layout, data: Sequence[Layout] | Seen, wanted: Array, of_run: bool) -> None:
    """Raise InputError unless a mean per position exists at every wanted entry of a run, and is of one kind of thing.

    ``of_run``: the data are the run itself, whose single rows have no mean but their own value.
    """
    seen = data if isinstance(data, Seen) else Seen(data)
    if run.place is None or seen.unknown:
        return
    needed = wanted & run.there
    what = "run" if of_run else "data set"
    for position in np.flatnonzero(needed.any(0)).tolist():
        at = position if run.held is None else int(run.held[position])
        count, names = seen.counts.get(at, 0), seen.names.get(at, set())
        own = {str(name) for name in run.place[needed[:, position], position]}
        if not count:
            raise InputError(f"no row of the {what} has anything at position {at}, which is to be ablated. {_FIX}")
        check_one_thing(at, names | own)
        if of_run and count == 1:
            raise InputError(f"only one row has position {at}, and its mean is its own value. Pass dataset=…. {_FIX}")


def check_one_thing(position: int, names: set[str]) -> None:
    """Raise InputError where rows hold different things at a position."""
    if len(names) > 1:
        one, other = sorted(names)[:2]
        raise InputError(
            f"position {position} is {one!r} in one row and {other!r} in another, so a mean per position would mix them. {_FIX}"
        )


def check_kinds(run: Layout, data: Sequence[Layout] | Seen, wanted: Array) -> None:
    """Raise InputError where a run has a position of a kind that the data do not have."""
    seen = data if isinstance(data, Seen) else Seen(data)
    if run.kind is None or seen.unknown:
        return
    missing = sorted({str(kind) for kind in np.unique(run.kind[wanted & run.there])} - seen.kinds)
    if missing:
        raise InputError(f"the data set has no position of the kind {missing[0]!r}, which is to be ablated. {_FIX}")


# -- draws ---------------------------------------------------------------------------------------------------------------------------------


def other_examples(layout: Layout, seed: int) -> list[list[int]]:
    """For every row the rows of other examples, the one it takes its value from first.

    A random cycle through the examples leaves none in its place; a row comes from the same image and tile where the other example has them.
    """
    names = np.unique(layout.example)
    if len(names) == 1:
        what = "one row" if len(layout.example) == 1 else f"one example, of {len(layout.example)} rows"
        raise InputError(f"resampling takes another example's value, and there is only {what}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator).tolist()
    there = layout.there if layout.there.ndim == 1 else layout.there.any(1)
    found = []
    for row in range(len(layout.example)):
        at = order.index(int(np.searchsorted(names, layout.example[row])))
        donors: list[int] = []
        for step in range(1, len(order)):
            example = names[order[at - step]]
            rows = np.flatnonzero((layout.example == example) & there).tolist()
            donors += sorted(rows, key=lambda other: bool((layout.unit[other] != layout.unit[row]).any()))
        found.append(donors)
    return found


@dataclass(frozen=True, eq=False)
class Draw:
    """Where each entry of a site takes its value from: a row, and of it a position ``[row pos]`` (None: its own)."""

    rows: Array
    positions: Array | None = None
    there: Array | None = None
    """The entries that are drawn; None: all."""

    def take(self, value: Tensor) -> Tensor:
        """The drawn values."""
        rows = torch.from_numpy(self.rows).to(value.device)
        if self.positions is None:
            return value[rows]
        return value[rows[:, None], torch.from_numpy(self.positions).to(value.device)]


def draw(layout: Layout, wanted: Array, seed: int, from_end: bool = False) -> Draw:
    """Another example's entry for every wanted one: the ``i``-th of its kind takes the ``i``-th of its kind, counted from the end if asked.

    Raises InputError where no other example has as many positions of the kind.
    """
    if seed not in layout.donors:
        layout.donors[seed] = other_examples(layout, seed)
    donors = layout.donors[seed]
    if layout.kind is None:
        if not all(donors):
            raise InputError("no other example has a row to take a value from")
        rows = np.array([found[0] for found in donors])
        return Draw(rows, there=None if layout.there.all() else layout.there)
    if bool((layout.kind == layout.kind[:1]).all()):
        return Draw(np.array([found[0] for found in donors]), there=None if layout.there.all() else layout.there)
    needed = wanted & layout.there
    rows = np.arange(len(needed))
    positions = np.tile(np.arange(needed.shape[1]), (len(needed), 1))
    for row in np.flatnonzero(needed.any(1)).tolist():
        for donor in donors[row]:
            matched = match(layout.kind[row], needed[row], layout.kind[donor], from_end)
            if matched is not None:
                rows[row], positions[row, needed[row]] = donor, matched
                break
        else:
            kinds = ", ".join(sorted(set(layout.kind[row, needed[row]])))
            raise InputError(
                f"row {row} has more positions of the kind {kinds} than any other example, so some have no other value to take. "
                "Give prompts of one length, or positions= that other examples have"
            )
    return Draw(rows, positions, needed)


def match(kind: Array, needed: Array, other: Array, from_end: bool) -> Array | None:
    """For every needed position the one in another row that is the same of its kind; None where some has none."""
    found = np.full(kind.shape, -1)
    for name in set(kind[needed]):
        mine, theirs = np.flatnonzero(kind == name), np.flatnonzero(other == name)
        count = min(len(mine), len(theirs))
        if count:
            chosen = slice(-count, None) if from_end else slice(count)
            found[mine[chosen]] = theirs[chosen]
    matched = found[needed]
    return None if bool((matched < 0).any()) else matched
