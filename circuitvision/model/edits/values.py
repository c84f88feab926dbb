"""What an edit is made of: tensors held by reference, positions, steps, and how they select entries of a site.

Everything here is immutable and compares by content. A tensor is held, not copied (a sweep of a thousand edits shares one source), so writing into
it afterwards would change every edit that holds it: a held tensor remembers its version, and using it after such a write is an error. A tensor that
requires a gradient is there to be written into, by an optimizer: the edit holds the tensor itself, and acts with the values it has in each run.

Positions are absolute, and those of the tower: 0 is the first position of the row, padding included, and the positions that ``generate`` adds follow
the prompt's. A pass of a run covers a window ``[first, first + length)`` of them: all of the prompt in the first pass, one new position in each
decoding pass, the suffix in a resumed run. Selecting is the same in all three. A site that holds only some of the tower's positions says which
(:class:`circuitvision.model.axes.Axis`); selecting there maps to the site's own axis, and what is asked for by number but not held is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from circuitvision.digests import of_tensor
from circuitvision.errors import InputError
from circuitvision.model.axes import ALL, Axis
from circuitvision.model.selection import Selection

PositionsLike = int | slice | str | Iterable[int] | Tensor | Selection | tuple[str, Any] | None
StepsLike = int | str | Iterable[int] | Tensor | np.ndarray | None


class TensorRef:
    """A tensor inside a value: shared, compared by content, refused after a write in place unless it is trained."""

    __slots__ = ("__weakref__", "_has_nan", "_orthonormal", "_tensor", "_trained", "_version")
    _known: ClassVar[WeakValueDictionary[int, TensorRef]] = WeakValueDictionary()

    @classmethod
    def of(cls, tensor: Tensor) -> TensorRef:
        """The same object for the same tensor: what is looked up about a source is looked up once for a thousand edits."""
        found = cls._known.get(id(tensor))
        if (
            found is None
            or found._tensor is not tensor
            or (found._version is not None and found._version != tensor._version and not found.trained)
        ):
            found = cls._known[id(tensor)] = cls(tensor)
        return found

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version
        self._trained = tensor.requires_grad
        self._has_nan: bool | None = None
        self._orthonormal: Tensor | None = None

    @property
    def trained(self) -> bool:
        """Whether the tensor requires a gradient, or did when the edit was made: its values may change from run to run."""
        return self._trained or self._tensor.requires_grad

    @property
    def tensor(self) -> Tensor:
        """The tensor itself, on its autograd path; raises InputError if it was written into since the edit was made, unless it is trained."""
        if self._version is not None and self._tensor._version != self._version and not self.trained:
            raise InputError(
                f"A tensor of shape {tuple(self._tensor.shape)} was changed in place after an edit was made from it. "
                "Edits are values: make them from tensors that stay as they are (.clone())."
            )
        return self._tensor

    @property
    def has_nan(self) -> bool:
        """Whether any entry is not a number; looked up once, however many edits share the tensor, unless it is trained."""
        if self._has_nan is None or self.trained:
            self._has_nan = bool(torch.isnan(self._tensor).any()) if self._tensor.is_floating_point() else False
        return self._has_nan

    def orthonormal(self) -> Tensor:
        """Orthonormal columns ``[d, k]`` of the span of the tensor, ``[d]`` or ``[d, k]``, on its autograd path: ``Q`` of ``QR``, in float64."""
        if self._orthonormal is not None:
            self.tensor  # noqa: B018  (raises where it was written into)
            return self._orthonormal
        columns = self.tensor[:, None] if self.tensor.ndim == 1 else self.tensor
        found = torch.linalg.qr(columns.double())[0]
        if not self.trained:
            self._orthonormal = found
        return found

    def settled(self) -> TensorRef:
        """The values of this moment: what a result keeps of a tensor that is trained on after it."""
        return TensorRef(self._tensor.detach().clone()) if self.trained else self

    def digest(self) -> str:
        """A name that depends on type, shape and bytes alone: the reference under which files store the tensor."""
        return of_tensor(self.tensor)

    def __provenance__(self) -> Tensor:
        return self._tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorRef):
            return NotImplemented
        mine, theirs = self._tensor, other._tensor
        if isinstance(self, TensorDigest) or isinstance(other, TensorDigest):
            return self.digest() == other.digest()
        if mine is theirs:
            return True
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs.to(mine.device))

    def __hash__(self) -> int:
        return hash((str(self._tensor.dtype), tuple(self._tensor.shape)))

    def __repr__(self) -> str:
        if self._tensor.numel() == 1:
            return f"{float(self._tensor):g}"
        return f"tensor[{', '.join(map(str, self._tensor.shape))}]"

    def __deepcopy__(self, memo: Any) -> TensorRef:
        return self


class TensorDigest(TensorRef):
    """A tensor known by its digest alone: it compares and prints as the tensor does, and cannot be used until it is put back."""

    __slots__ = ("_digest",)

    def __init__(self, digest: str, shape: Iterable[int], dtype: torch.dtype) -> None:
        super().__init__(torch.empty(tuple(shape), dtype=dtype, device="meta"))
        self._digest, self._has_nan = digest, False

    @classmethod
    def of_held(cls, value: TensorRef) -> TensorRef:
        """What is left of a tensor when it is let go; a single number is kept."""
        if isinstance(value, cls) or value.tensor.numel() <= 1:
            return value
        return cls(value.digest(), value.tensor.shape, value.tensor.dtype)

    @property
    def trained(self) -> bool:
        """Never: it is what a tensor was."""
        return False

    @property
    def tensor(self) -> Tensor:
        """Raises InputError: the tensor is not there."""
        raise InputError(
            f"The {self!r} of this edit is known by its digest alone ({self._digest[:12]}…): put it back with "
            "circuitvision.edits.restore(edits, cache), from a cache or tensors that hold it."
        )

    def digest(self) -> str:
        """The digest of the tensor that was held."""
        return self._digest

    def __provenance__(self) -> Any:
        return {
            "tensor": f"{str(self._tensor.dtype).removeprefix('torch.')} {list(self._tensor.shape)}",
            "sha256": self._digest,
        }

    def __repr__(self) -> str:
        return f"tensor[{', '.join(map(str, self._tensor.shape))}]"


def held(value: Any) -> Any:
    """A tensor as :class:`TensorRef`, a sequence of numbers likewise, a number as it is; InputError for anything else."""
    if isinstance(value, TensorRef) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    if isinstance(value, np.generic):
        return held(value.item())
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())  # writes into an array leave no trace, so it is copied
    if isinstance(value, Tensor):
        return TensorRef.of(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, float)) for item in value):
        return TensorRef(torch.tensor(value))
    raise InputError(f"A value of an edit is a number or a tensor, not {type(value).__name__}.")


@dataclass(frozen=True, eq=False)
class SideSource:
    """A source that is one side of a data set: for each batch of examples the values they have there, which a sweep records when it gets to them."""

    side: Any

    @property
    def name(self) -> str:
        """What files call it."""
        return str(self.side.name) or "side"

    def __provenance__(self) -> Any:
        return self.side

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SideSource) and other.side is self.side

    def __hash__(self) -> int:
        return hash(id(self.side))

    def __repr__(self) -> str:
        return f"{self.name} side"


@dataclass(frozen=True)
class TensorRefMapping:
    """Tensors by name: the sources of an edit of several sites, or the inputs of a run."""

    items: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        # The order in which a mapping was filled is no part of what it says.
        object.__setattr__(self, "items", tuple(sorted(self.items, key=lambda item: item[0])))

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> TensorRefMapping:
        """Hold every tensor of a mapping; other values stay as they are."""
        pairs = ((str(name), held(v) if isinstance(v, (Tensor, np.ndarray)) else v) for name, v in mapping.items())
        return cls(tuple(pairs))

    def __provenance__(self) -> dict[str, Any]:
        return dict(self.items)

    def get(self, name: str) -> Any:
        """The value under a name, or None."""
        return next((value for key, value in self.items if key == name), None)

    def tensors(self) -> dict[str, Any]:
        """The mapping with plain tensors."""
        return {name: value.tensor if isinstance(value, TensorRef) else value for name, value in self.items}

    def __repr__(self) -> str:
        return f"{len(self.items)} tensors"


@dataclass(frozen=True)
class Steps:
    """Which passes of a tower an edit acts in."""

    kind: Literal["all", "prefill", "decode", "numbers"] = "all"
    numbers: tuple[int, ...] = ()

    @classmethod
    def of(cls, spec: StepsLike | Steps) -> Steps:
        """From None (all), ``"prefill"``, ``"decode"``, a number or several."""
        if isinstance(spec, Steps):
            return spec
        if spec is None:
            return cls()
        if isinstance(spec, str):
            if spec == "prefill":
                return cls("prefill")
            if spec == "decode":
                return cls("decode")
            raise InputError(f"steps={spec!r} is not understood: 'prefill', 'decode', a number, or several numbers.")
        if isinstance(spec, (Tensor, np.ndarray)):
            spec = spec.reshape(-1).tolist()
        numbers = tuple(spec) if isinstance(spec, Iterable) else (spec,)
        if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0 for n in numbers) or not numbers:
            raise InputError(f"steps={spec!r} is not understood: passes are counted 0, 1, 2, …")
        return cls("numbers", tuple(sorted({int(n) for n in numbers})))

    def __provenance__(self) -> Any:
        return self.plain

    def acts(self, step: int) -> bool:
        """Whether the pass of this number is one of them."""
        if self.kind == "numbers":
            return step in self.numbers
        return self.kind == "all" or (step == 0) == (self.kind == "prefill")

    def overlaps(self, other: Steps) -> bool:
        """Whether some pass is in both."""
        if "numbers" in (self.kind, other.kind):
            mine, theirs = (self, other) if self.kind == "numbers" else (other, self)
            return any(theirs.acts(number) for number in mine.numbers)
        return "all" in (self.kind, other.kind) or self.kind == other.kind

    @property
    def plain(self) -> Any:
        """As it would be written by hand."""
        if self.kind == "numbers":
            return self.numbers[0] if len(self.numbers) == 1 else list(self.numbers)
        return None if self.kind == "all" else self.kind


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


@dataclass(frozen=True)
class Positions:
    """A choice of positions, before it is known which run it meets."""

    kind: Literal["all", "ints", "slice", "last", "mask"] = "all"
    ints: tuple[int, ...] = ()
    bounds: tuple[int | None, int | None, int | None] = (None, None, None)
    mask: TensorRef | None = None
    tower: str = ""
    """The tower whose positions these are, where that was said: by a selection, or by name."""
    label: str = field(default="", compare=False)
    """How a selection was made; says nothing of what it holds."""

    @classmethod
    def of(cls, spec: PositionsLike | Positions) -> Positions:
        """From None (all), an int, a slice or range, several ints, ``"last"``, a bool tensor, or a selection of a TokenMap.

        ``(tower, one of these)`` says whose positions they are.
        """
        if isinstance(spec, Positions):
            return spec
        if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str):
            found = cls.of(spec[1])
            if found.tower not in ("", spec[0]):
                raise InputError(f"positions={spec!r}: these were selected in the {found.tower} tower.")
            return dataclasses.replace(found, tower=spec[0])
        if spec is None:
            return cls()
        if isinstance(spec, Selection):
            return cls("mask", mask=TensorRef(spec.tensor), tower=spec.tower, label=spec.label)
        if isinstance(spec, str):
            if spec != "last":
                raise InputError(f"positions={spec!r} is not understood: numbers, a slice, 'last', or a selection.")
            return cls("last")
        if isinstance(spec, slice):
            if any(not isinstance(n, (int, np.integer, type(None))) for n in (spec.start, spec.stop, spec.step)):
                raise InputError(f"positions={spec!r} is not understood: a slice has whole numbers.")
            if spec.step is not None and spec.step < 1:
                raise InputError(f"positions={spec!r} runs backwards; give a positive step.")
            return cls("slice", bounds=(spec.start, spec.stop, spec.step))
        if isinstance(spec, (Tensor, np.ndarray)):
            tensor = spec if isinstance(spec, Tensor) else torch.from_numpy(spec.copy())
            if tensor.dtype == torch.bool:
                if tensor.ndim not in (1, 2):
                    raise InputError(f"A mask of positions is [pos] or [batch, pos], not {tuple(tensor.shape)}.")
                return cls("mask", mask=TensorRef(tensor))
            spec = tensor.flatten().tolist()
        numbers = tuple(spec) if isinstance(spec, Iterable) else (spec,)
        if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in numbers):
            raise InputError(f"positions={spec!r} is not understood: numbers, a slice, 'last', or a selection.")
        return cls("ints", ints=tuple(int(n) for n in numbers))

    def __provenance__(self) -> Any:
        if self.kind == "mask":
            return {"mask": self.mask, "tower": self.tower, "label": self.label}
        return {"slice": list(self.bounds)} if self.kind == "slice" else self.plain

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
        if len(shape) == 2:
            self._rows_of(torch.zeros(shape[0], 1, dtype=torch.bool), window, window.rows)

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
        if self.kind in ("ints", "slice"):
            so_far = window.of_all(first=0, length=window.first + window.length)
            mask = torch.zeros(1, so_far.length, dtype=torch.bool)
            mask[:, self._uniform(so_far, "cpu")] = True
        elif self.kind == "last":
            if window.tokens is None:
                mask = torch.zeros(1, window.prompt, dtype=torch.bool)
                mask[:, -1] = True
            else:
                mask = torch.zeros(window.tokens.n_rows, window.prompt, dtype=torch.bool)
                mask[torch.arange(window.tokens.n_rows), torch.tensor(window.tokens.last())] = True
        else:
            assert self.mask is not None
            mask = self.mask.tensor.cpu()
            mask = mask[None] if mask.ndim == 1 else mask
        if mask.shape[0] != 1:
            mask = self._rows_of(mask, window, rows)
            if bool((mask == mask[:1]).all()):
                mask = mask[:1]
        seen = window.first + window.length
        if seen > mask.shape[1]:
            mask = torch.cat([mask, mask.new_zeros(mask.shape[0], seen - mask.shape[1])], dim=1)
        return mask

    def _rows_of(self, mask: Tensor, window: PositionWindow, rows: int) -> Tensor:
        """One mask row per tensor row: rows are images or tiles in vision towers, and beams in ``generate``."""
        given, tokens = mask.shape[0], window.tokens
        if tokens is not None and not self.tower and self.kind == "mask" and not tokens.rows_are_examples:
            if given == tokens.n_examples == tokens.n_rows:
                raise InputError(
                    f"the mask of positions has {given} rows, which may be the examples or the rows of the {window.tower} tower, in another order: "
                    "give a selection of its tokens"
                )
            if given == tokens.n_examples:
                mask = mask[torch.as_tensor(tokens.example)]
        if tokens is not None and mask.shape[0] != tokens.n_rows:
            raise InputError(
                f"the mask of positions has {given} rows; the run has {tokens.n_examples} examples and "
                f"{tokens.n_rows} rows in the {window.tower} tower"
            )
        if mask.shape[0] != rows:
            # generate computes every row as often as there are beams or sequences, one after the other.
            if tokens is None or rows % mask.shape[0]:
                raise InputError(f"the mask of positions has {given} rows, the {window.tower} tower {rows}")
            mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)
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

    @property
    def plain(self) -> Any:
        """As it would be written by hand; a mask as its label or shape."""
        found: Any = None if self.kind == "all" else self.kind
        if self.kind == "ints":
            found = self.ints[0] if len(self.ints) == 1 else list(self.ints)
        elif self.kind == "slice":
            found = slice(*self.bounds)
        elif self.kind == "mask":
            return self.label or f"mask{list(self.mask.tensor.shape) if self.mask else ''}"
        return (self.tower, found) if self.tower else found


def heads_of(spec: int | Iterable[int] | None) -> tuple[int, ...] | None:
    """Heads as a tuple in the order given, or None for all; InputError for anything but whole numbers."""
    if spec is None:
        return None
    numbers = tuple(spec) if isinstance(spec, Iterable) else (spec,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in numbers):
        raise InputError(f"heads={spec!r} is not understood: give head numbers.")
    return tuple(dict.fromkeys(int(n) for n in numbers))


def short_repr(value: Any) -> str:
    """``repr`` for one line: of a long sequence the ends and the length, of an object with a long ``repr`` its name or class."""
    text = repr(value)
    if isinstance(value, (list, tuple)):
        return text if len(text) <= 24 else f"[{value[0]!r}, …, {value[-1]!r}] ({len(value)})"
    if isinstance(value, str):
        return text if len(text) <= 40 else f"{text[:39]}…{text[-1]}"
    return text if len(text) <= 40 and "\n" not in text else str(getattr(value, "name", "") or type(value).__name__)


def is_empty(chosen: Chosen) -> bool:
    """Whether a choice selects nothing."""
    if chosen is None:
        return False
    if isinstance(chosen, slice):
        return chosen.stop <= chosen.start
    return (chosen[0] if isinstance(chosen, tuple) else chosen).numel() == 0


UNBOUNDED = 2**40
"""Positions that later passes add where nothing says when a run ends."""
ALL_POSITIONS = Positions()
ALL_STEPS = Steps()
