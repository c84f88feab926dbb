"""Positions: one grammar for where, and what turns it into entries of a tensor.

``Positions.of`` reads every spelling: None (all), numbers (negative ones count from the end of the prompt), several numbers, slices and ranges,
``"last"`` (the last that is not padding), ``"all"`` (all that hold something), kinds, selections of a token map, booleans ``[pos]``, ``[row pos]`` or
``[example pos]``, functions of a token map that return one of these, and regions (:mod:`circuitvision.regions`). ``(tower, one of these)`` says whose
positions they are. A list (or a set) of numbers means all of them in every row; one per example is ``cv.regions.at(numbers)``.

``positions.resolve(tokens)`` is the booleans ``[row pos]`` of one run: what everything else reads. Edits meet a run pass by pass, and choose entries
of a site's own axis (``choose``).

Positions are absolute, and those of the tower: 0 is the first position of the row, padding included, and the positions that ``generate`` adds follow
the prompt's. A pass of a run covers a window ``[first, first + length)`` of them: all of the prompt in the first pass, one new position in each
decoding pass, the suffix in a resumed run. Selecting is the same in all three. A site that holds only some of the tower's positions says which
(:class:`circuitvision.model.axes.Axis`); selecting there maps to the site's own axis, and what is asked for by number but not held is an error.

Not covered: a choice of heads or layers (see ``heads_of``, ``chosen_layers``), and positions of a row that depend on what is generated.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.model.axes import ALL, Axis
from circuitvision.model.edits.values import TensorRef
from circuitvision.model.regions import Region
from circuitvision.model.selection import Selection

if TYPE_CHECKING:
    from circuitvision.model.tokens import TokenMap

PositionsLike = (
    int
    | slice
    | str
    | Iterable[int]
    | Iterable[str]
    | Tensor
    | Selection
    | Region
    | Callable[..., Any]
    | tuple[str, Any]
) | None
GENERATED = "generated"
"""The kind of positions that ``generate`` has added to the prompt."""
UNBOUNDED = 2**40
"""Positions that later passes add where nothing says when a run ends."""
_GRAMMAR = (
    "give numbers, a slice, 'last', 'all', kinds such as 'patch', a selection of a token map, booleans, a function of a token map, or a region "
    "of cv.regions"
)


@dataclass(frozen=True)
class PositionWindow:
    """Which positions one pass of one tower covers, for one run's rows."""

    tower: str
    rows: int
    """Rows of the tower in one run."""
    first: int
    length: int
    prompt: int
    """Positions of the prompt: negative positions count from here."""
    tokens: Any = None
    """TokenMap of the tower, where rows must be told from examples; None where it has no map."""
    axis: Axis = ALL
    """Which of the tower's positions the site holds."""
    prefix: PositionWindow | None = None
    """The positions of another tower whose cached keys come before this one's own."""
    crossed: bool = False
    """Whether the keys are those of ``prefix`` alone: cross-attention."""

    @property
    def columns(self) -> Tensor | None:
        """The positions of this pass that the site holds, counted from ``first``; None for all of them."""
        return self.axis.columns(self.first, self.length, self.prompt)

    @property
    def count(self) -> int:
        """How many entries the site's own axis has in this pass."""
        columns = self.columns
        return self.length if columns is None else len(columns)

    @property
    def index(self) -> int:
        """Where the first entry of this pass stands in the site's own axis."""
        return self.axis.index(self.first, self.prompt)

    def of_all(self, **changes: Any) -> PositionWindow:
        """The same window where every position of the tower is held: that of its keys."""
        return dataclasses.replace(self, axis=ALL, **changes)


Chosen = None | slice | Tensor | tuple[Tensor, Tensor]
"""Entries of a window's position axis: all (None), a slice, indices, or (row, position) pairs; an empty tensor for none."""
Kind = Literal["all", "there", "ints", "slice", "last", "kinds", "mask", "region", "function"]


@dataclass(frozen=True, repr=False)
class Positions:
    """A choice of positions, before it is known which run it meets; see the module."""

    kind: Kind = "all"
    ints: tuple[int, ...] = ()
    bounds: tuple[int | None, int | None, int | None] = (None, None, None)
    mask: TensorRef | None = None
    tower: str = ""
    """The tower whose positions these are, where that was said: by a selection, or by name."""
    label: str = field(default="", compare=False)
    """How a selection was made; says nothing of what it holds."""
    kinds: tuple[str, ...] = ()
    region: Region | None = None
    function: Callable[..., Any] | None = None
    examples: tuple[int, ...] | None = None
    """The numbers in the data set of the run's examples, where the run is some of them; see :meth:`taken`."""

    @classmethod
    def of(cls, spec: PositionsLike | Positions) -> Positions:
        """Any spelling of positions as a value; InputError for anything else."""
        if isinstance(spec, Positions):
            return spec
        if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str) and not _are_kinds(spec):
            found = cls.of(spec[1])
            if found.tower not in ("", spec[0]):
                raise InputError(f"positions={spec!r}: these were selected in the {found.tower} tower.")
            return dataclasses.replace(found, tower=spec[0])
        if spec is None:
            return cls()
        if isinstance(spec, Selection):
            return cls("mask", mask=TensorRef(spec.tensor), tower=spec.tower, label=spec.label)
        if isinstance(spec, Region):
            return cls("region", region=spec)
        if isinstance(spec, str):
            return cls("last") if spec == "last" else cls("there") if spec == "all" else cls._of_kinds((spec,), spec)
        if isinstance(spec, slice):
            return cls._of_slice(spec)
        if isinstance(spec, Mapping):
            raise InputError(f"positions={spec!r} are several with names, and one is taken here.")
        if isinstance(spec, Tensor | np.ndarray):
            tensor = spec if isinstance(spec, Tensor) else torch.from_numpy(spec.copy())
            if tensor.dtype == torch.bool:
                if tensor.ndim not in (1, 2):
                    raise InputError(f"A mask of positions is [pos] or [batch, pos], not {tuple(tensor.shape)}.")
                return cls("mask", mask=TensorRef(tensor))
            spec = tensor.flatten().tolist()
        if callable(spec):
            return cls("function", function=spec)
        if isinstance(spec, set | frozenset):
            spec = sorted(spec)
        return cls._of_several(tuple(spec) if isinstance(spec, Iterable) else (spec,), spec)

    @classmethod
    def _of_several(cls, entries: tuple[Any, ...], spec: Any) -> Positions:
        if entries and all(isinstance(entry, str) for entry in entries):
            return cls._of_kinds(entries, spec)
        if any(isinstance(n, bool) or not isinstance(n, int | np.integer) for n in entries):
            raise InputError(f"positions={spec!r:.80} is not understood: {_GRAMMAR}.")
        return cls("ints", ints=tuple(int(n) for n in entries))

    @classmethod
    def _of_kinds(cls, kinds: tuple[str, ...], spec: Any) -> Positions:
        if not _are_kinds(kinds):
            from circuitvision.model.tokens import KINDS

            raise InputError(f"positions={spec!r:.80} is not understood: kinds are {', '.join(KINDS)}; or {_GRAMMAR}.")
        return cls("kinds", kinds=tuple(dict.fromkeys(kinds)))

    @classmethod
    def _of_slice(cls, spec: slice) -> Positions:
        if any(not isinstance(n, int | np.integer | None) for n in (spec.start, spec.stop, spec.step)):
            raise InputError(f"positions={spec!r:.80} is not understood: a slice has whole numbers.")
        if spec.step is not None and spec.step < 1:
            raise InputError(f"positions={spec!r} runs backwards; give a positive step.")
        return cls("slice", bounds=(spec.start, spec.stop, spec.step))

    def __provenance__(self) -> Any:
        if self.kind == "mask":
            return {"mask": self.mask, "tower": self.tower, "label": self.label}
        if self.kind in ("region", "function"):
            return {self.kind: self.region or self.function, "tower": self.tower}
        return {"slice": list(self.bounds)} if self.kind == "slice" else self.plain

    @property
    def plain(self) -> Any:
        """As it would be written by hand; a mask, a region or a function as its label, name or shape."""
        found: Any = None if self.kind == "all" else self.kind
        if self.kind == "there":
            found = "all"
        elif self.kind == "ints":
            found = self.ints[0] if len(self.ints) == 1 else list(self.ints)
        elif self.kind == "slice":
            found = slice(*self.bounds)
        elif self.kind == "kinds":
            found = self.kinds[0] if len(self.kinds) == 1 else list(self.kinds)
        elif self.region is not None:
            found = self.region.label
        elif self.function is not None:
            found = getattr(self.function, "__name__", type(self.function).__name__)
        elif self.kind == "mask":
            return self.label or f"mask{list(self.mask.tensor.shape) if self.mask else ''}"
        return (self.tower, found) if self.tower else found

    @property
    def text(self) -> str:
        """A word or two for axes, figures and provenance."""
        found = self.plain[1] if self.tower and isinstance(self.plain, tuple) else self.plain
        if isinstance(found, slice):
            return ":".join(
                "" if n is None else str(n) for n in (found.start, found.stop, *[found.step] * bool(found.step))
            )
        return "+".join(map(str, found)) if isinstance(found, list) else "all" if found is None else str(found)

    def __repr__(self) -> str:
        return f"Positions({self.text!r})"

    @property
    def is_named(self) -> bool:
        """Whether positions are named by what is there, wherever it stands, and not by where they stand."""
        return self.kind in ("there", "kinds", "region", "function")

    @property
    def may_be_empty(self) -> bool:
        """Whether an example may have none of them without a mistake: it then has no value."""
        return self.kind in ("mask", "region", "function")

    @property
    def n_examples(self) -> int | None:
        """For how many examples they are given one by one; None where they serve any number."""
        if self.region is not None:
            return self.region.n_examples
        several = self.mask is not None and self.mask.tensor.ndim == 2 and self.mask.tensor.shape[0] > 1
        return int(self.mask.tensor.shape[0]) if several and self.mask is not None else None

    def taken(self, examples: Iterable[int], count: int | None = None) -> Positions:
        """The same for a run of some examples of the data set, by their places there: what is given per example is theirs.

        Raises InputError where it is given one by one for another number of examples than the data set's ``count``.
        """
        numbers = tuple(int(number) for number in examples)
        if self.kind == "mask" and numbers == tuple(range(count or 0)):
            return self  # the whole data set in one run, whose rows may be images
        if count is not None and self.n_examples not in (None, count):
            raise InputError(
                f"There are positions of {self.n_examples} examples for {count}; give one, or one row, per example."
            )
        if self.kind == "mask" and self.n_examples is not None:
            assert self.mask is not None
            if max(numbers, default=0) >= self.n_examples:
                raise InputError(
                    f"There are positions of {self.n_examples} examples, and example {max(numbers)} runs: give one row per example."
                )
            return dataclasses.replace(self, mask=TensorRef(self.mask.tensor[list(numbers)]))
        return dataclasses.replace(self, examples=numbers) if self.kind in ("region", "function") else self

    # -- booleans --------------------------------------------------------------------------------------------------------------------------

    def resolve(self, tokens: TokenMap, length: int | None = None) -> Bool[Tensor, "row pos"]:
        """Which positions of a run these are, ``[row pos]``; ``length`` counts positions that ``generate`` has added.

        Padding is among them only where it is named: by number, by a mask, or as a kind.

        Raises InputError for positions of another tower or run, or outside the row.
        """
        length = tokens.n_positions if length is None else length
        if self.tower not in ("", tokens.tower):
            raise InputError(f"positions={self.plain!r} are of the {self.tower} tower, not of {tokens.tower}.")
        mask = self._of_prompt(tokens, length)
        return torch.cat([mask, self._of_later(tokens, length)], dim=1) if length > tokens.n_positions else mask

    def _of_prompt(self, tokens: TokenMap, length: int) -> Tensor:
        shape = tokens.kind.shape
        if self.kind == "all":
            return torch.ones(shape, dtype=torch.bool)
        if self.kind == "there":
            return torch.from_numpy(tokens.present)
        if self.kind in ("ints", "slice"):
            outside = [n for n in self.ints if not -shape[1] <= n < length]
            if outside:
                raise InputError(f"position {outside[0]} is outside the {length} positions of the {tokens.tower} tower")
            return _numbered(self, shape[1], length)[: shape[1]].expand(shape).clone()
        if self.kind == "last":
            return torch.arange(shape[1]) == torch.tensor(tokens.last())[:, None]
        if self.kind == "kinds":
            return torch.from_numpy(np.isin(tokens.kind, self.kinds))
        if self.kind == "mask":
            return self._of_mask(tokens)
        known = _resolved.setdefault(tokens, {})
        if self not in known:
            known[self] = self._of_region(tokens) if self.region is not None else self._of_function(tokens)
        return known[self].clone()

    def _of_later(self, tokens: TokenMap, length: int) -> Tensor:
        """The positions behind the prompt."""
        later = torch.zeros(tokens.n_rows, length - tokens.n_positions, dtype=torch.bool)
        if self.kind in ("ints", "slice"):
            later |= _numbered(self, tokens.n_positions, length)[tokens.n_positions :]
        return later | (self.kind in ("all", "there") or GENERATED in self.kinds)

    def _of_mask(self, tokens: TokenMap) -> Tensor:
        assert self.mask is not None
        mask = self.mask.tensor.cpu()
        if mask.shape[-1] != tokens.n_positions:
            raise InputError(
                f"the mask of positions has {mask.shape[-1]} entries, the {tokens.tower} tower {tokens.n_positions} positions"
            )
        mask = mask[None] if mask.ndim == 1 else mask
        return (mask.expand(tokens.kind.shape) if len(mask) == 1 else self._rows_of(mask, tokens)).clone()

    def _rows_of(self, mask: Tensor, tokens: TokenMap) -> Tensor:
        """One mask row per row of the tower: rows are images or tiles in vision towers."""
        given = mask.shape[0]
        if not self.tower and not tokens.rows_are_examples:
            if given == tokens.n_examples == tokens.n_rows:
                raise InputError(
                    f"the mask of positions has {given} rows, which may be the examples or the rows of the {tokens.tower} tower, in another order: "
                    "give a selection of its tokens"
                )
            if given == tokens.n_examples:
                mask = mask[torch.as_tensor(tokens.example)]
        if mask.shape[0] != tokens.n_rows:
            raise InputError(
                f"the mask of positions has {given} rows; the run has {tokens.n_examples} examples and "
                f"{tokens.n_rows} rows in the {tokens.tower} tower"
            )
        return mask

    def _numbers(self, tokens: TokenMap) -> Sequence[int]:
        """The numbers in the data set of the run's examples."""
        if self.examples is None:
            return range(tokens.n_examples)
        if len(self.examples) != tokens.n_examples:
            raise InputError(
                f"positions are taken for {len(self.examples)} examples, and the run has {tokens.n_examples}."
            )
        return self.examples

    def _of_region(self, tokens: TokenMap) -> Tensor:
        assert self.region is not None
        given = self.region.n_examples
        if self.examples is None and given not in (None, tokens.n_examples):
            raise InputError(
                f"{self.region!r} is of {given} examples, and the run has {tokens.n_examples}: give one per example."
            )
        return torch.from_numpy(self.region.where(tokens, self._numbers(tokens)) & tokens.present)

    def _of_function(self, tokens: TokenMap) -> Tensor:
        assert self.function is not None
        takes_two = _takes_two(self.function)
        found = self.function(tokens, self._numbers(tokens)) if takes_two else self.function(tokens)
        own = Positions.of(found)
        if own.kind == "function":
            raise InputError(
                f"{self.plain} returns a function; a function of positions returns booleans, a selection, or other positions."
            )
        return dataclasses.replace(own, examples=self.examples if own.region is not None else None).resolve(tokens)

    # -- entries of a site -----------------------------------------------------------------------------------------------------------------

    def check(self, window: PositionWindow, grows: int) -> None:
        """Raise InputError unless every position named exists at the site; ``grows`` is how many positions later passes add to the prompt's."""
        if self.tower and self.tower != window.tower:
            raise InputError(f"the positions were selected in the {self.tower} tower, not in {window.tower}")
        if self.kind == "all":
            return
        if window.axis.absent:
            raise InputError(
                f"{window.axis.site} has no positions in this model: {window.axis.absent}. Leave positions out"
            )
        limit = window.prompt
        for position in self.ints:
            if not -limit <= position < limit + grows:
                later = f" and the {grows} that follow" if 0 < grows < UNBOUNDED else ""
                raise InputError(
                    f"position {position} is outside the {limit} positions of the {window.tower} tower{later}"
                )
        if self.mask is not None:
            self._check_mask(self.mask.tensor, window)
        elif self.is_named:
            self._as_mask(window, window.rows)
        if window.axis.held is not None and self.kind in ("ints", "last"):
            self._check_held(window)

    def _check_mask(self, mask: Tensor, window: PositionWindow) -> None:
        shape, limit = tuple(mask.shape), window.prompt
        if shape[-1] != limit:
            held = (
                f", of which {window.axis.site} holds {window.axis.said(limit)}" if window.axis.held is not None else ""
            )
            raise InputError(
                f"the mask of positions has {shape[-1]} entries, the {window.tower} tower {limit} positions{held}"
            )
        self._as_mask(window.of_all(first=0, length=limit), window.rows)

    def _check_held(self, window: PositionWindow) -> None:
        """Raise InputError for a position asked for by number, or as the last one, that the site does not hold."""
        assert window.axis.held is not None
        held, prompt = set(window.axis.held), window.prompt
        asked = [position + prompt if position < 0 else position for position in self.ints]
        if self.kind == "last":
            asked = [prompt - 1] if window.tokens is None else window.tokens.last()
        for row, position in enumerate(asked):
            if position < prompt and position not in held:
                whose = f", the last one of row {row}," if self.kind == "last" else ""
                raise InputError(
                    f"position {position}{whose} of the {window.tower} tower is not at {window.axis.site}, which holds "
                    f"{window.axis.said(prompt)} in this run"
                )

    def choose(self, window: PositionWindow, rows: int, device: torch.device | str) -> Chosen:
        """The entries of this window that are selected, in the site's own axis, for a tensor of ``rows`` rows."""
        if self.kind == "all":
            return None
        columns = window.columns
        if columns is None and self.kind in ("ints", "slice"):
            return self._uniform(window, device)
        first, length = window.first, window.length
        mask = self._as_mask(window, rows)[:, first : first + length]
        mask = mask if columns is None else mask[:, columns]
        if mask.shape[0] == 1:
            return mask[0].nonzero().flatten().to(device)
        found = mask.nonzero().to(device)
        return found[:, 0], found[:, 1]

    def _uniform(self, window: PositionWindow, device: torch.device | str) -> Chosen:
        """Numbers or a slice as entries of a window, the same in every row."""
        first, length, prompt = window.first, window.length, window.prompt
        if self.kind == "slice":
            start, stop, step = self.bounds
            step = 1 if step is None else step
            start = 0 if start is None else (start if start >= 0 else max(0, prompt + start))
            stop = first + length if stop is None else (stop if stop >= 0 else prompt + stop)
            begin = max(start, first + (start - first) % step)
            return slice(max(begin - first, 0), max(min(stop, first + length) - first, 0), step)
        wanted = {position if position >= 0 else prompt + position for position in self.ints}
        inside = sorted(position - first for position in wanted if first <= position < first + length)
        if inside and inside == list(range(inside[0], inside[-1] + 1)):
            return slice(inside[0], inside[-1] + 1)
        return torch.tensor(inside, dtype=torch.long, device=device)

    def _as_mask(self, window: PositionWindow, rows: int) -> Tensor:
        """Bool ``[rows or 1, positions so far]``."""
        seen = window.first + window.length
        if self.kind in ("ints", "slice"):
            mask = _numbered(self, window.prompt, seen)[None]
        elif window.tokens is not None:
            mask = self.resolve(window.tokens, max(seen, window.prompt))
        elif self.kind == "last":
            mask = (torch.arange(window.prompt) == window.prompt - 1)[None]
        elif self.mask is not None:
            mask = self.mask.tensor.cpu()
            mask = mask[None] if mask.ndim == 1 else mask
        else:
            raise InputError(
                f"what the positions of the {window.tower} tower are is not known here, so {self.plain!r} names none of them"
            )
        if mask.shape[0] != 1:
            if bool((mask == mask[:1]).all()):
                mask = mask[:1]
            elif mask.shape[0] != rows:
                # generate computes every row as often as there are beams or sequences, one after the other.
                if window.tokens is None or rows % mask.shape[0]:
                    raise InputError(f"the mask of positions has {mask.shape[0]} rows, the {window.tower} tower {rows}")
                mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)
        if seen > mask.shape[1]:
            mask = torch.cat([mask, mask.new_zeros(mask.shape[0], seen - mask.shape[1])], dim=1)
        return mask

    def lowest(self, window: PositionWindow) -> int:
        """The first position selected in any row (the prompt's length if none)."""
        found = self.covers(window).any(0).nonzero()
        return int(found[0]) if len(found) else window.prompt

    def covers(self, window: PositionWindow) -> Tensor:
        """Bool ``[rows or 1, prompt]``: the positions of the prompt that are selected, as far as the site holds them."""
        whole = window.of_all(first=0, length=window.prompt)
        chosen = self.choose(whole, window.rows, "cpu")
        out = torch.zeros(window.rows if isinstance(chosen, tuple) else 1, window.prompt, dtype=torch.bool)
        if isinstance(chosen, tuple):
            out[chosen] = True
        else:
            out[:, slice(None) if chosen is None else chosen] = True
        columns = window.axis.columns(0, window.prompt, window.prompt)
        if columns is not None:
            held = torch.zeros(window.prompt, dtype=torch.bool)
            held[columns] = True
            out &= held
        return out


_resolved: WeakKeyDictionary[Any, dict[Positions, Tensor]] = WeakKeyDictionary()
"""Token map -> the booleans of regions and functions there: a sweep asks for each in every pass."""


def _are_kinds(words: Iterable[Any]) -> bool:
    from circuitvision.model.tokens import KINDS

    return all(isinstance(word, str) and word in (*KINDS, GENERATED) for word in words)


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def _numbered(positions: Positions, prompt: int, length: int) -> Bool[Tensor, " pos"]:
    """Numbers or a slice as booleans over so many positions."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[positions._uniform(PositionWindow("", 1, 0, length, prompt), "cpu")] = True
    return mask


def is_empty(chosen: Chosen) -> bool:
    """Whether a choice selects nothing."""
    if chosen is None:
        return False
    if isinstance(chosen, slice):
        return chosen.stop <= chosen.start
    return (chosen[0] if isinstance(chosen, tuple) else chosen).numel() == 0


def without_any(mask: Bool[Tensor, "row pos"], example: Iterable[int], count: int) -> list[int]:
    """The examples in which a choice is empty, in all of their rows."""
    owners = torch.as_tensor(list(example), dtype=torch.long)
    has = torch.zeros(count, dtype=torch.bool)
    has[owners[mask.any(1)]] = True
    there = torch.zeros(count, dtype=torch.bool)
    there[owners] = True
    return (there & ~has).nonzero().flatten().tolist()


def in_every_example(spec: PositionsLike | Positions, count: int) -> Positions | None:
    """Positions of ``count`` examples as a value (None as None), where a list of numbers may be meant as one per example.

    A list of as many different numbers as there are examples warns: it names all of them in every example. A set says that without a warning.
    """
    if spec is None or isinstance(spec, Positions):
        return spec
    found = Positions.of(spec)
    ordered = isinstance(spec, list | tuple | np.ndarray | Tensor) and found.kind == "ints"
    if ordered and len(found.ints) == count > 1 and len(set(found.ints)) > 1:
        numbers = ", ".join(map(str, found.ints))
        warn(
            f"positions=[{numbers:.60}] of {count} examples names all of these positions in every example, which the set {{{numbers:.60}}} says "
            f"without this warning; one position per example is cv.regions.at([{numbers:.60}])."
        )
    return found


def warn_of_empty(empty: Mapping[str, int], count: int) -> None:
    """One warning of the choices that are empty in some examples, in how many each."""
    found = {label: number for label, number in empty.items() if number}
    if found:
        parts = ", ".join(f"{label} in {number}" for label, number in found.items())
        warn(f"Of {count} examples, positions are empty for {parts}: no value (NaN) there.")


ALL_POSITIONS = Positions()
