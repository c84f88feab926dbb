"""The base of every edit, and how its new values are written into a site's tensor.

An edit never holds a model. It meets one in two steps: ``plan`` (once, before anything runs: which sites, do heads and positions and sources exist)
and ``write`` (in every pass: change the selected entries of a tensor that is already the caller's own). Both see a :class:`PositionWindow`, so
the same edit acts in a whole run, in a decoding step, on the suffix of a resumed run, and on its own rows of a batch of many edits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuitvision.errors import CircuitVisionError, InputError
from circuitvision.model.edits.values import (
    ALL_STEPS,
    SideSource,
    Steps,
    TensorDigest,
    TensorRef,
    TensorRefMapping,
    short_repr,
)
from circuitvision.model.positions import ALL_POSITIONS, Chosen, Positions, PositionWindow, is_empty
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.registrations import HookPoint
    from circuitvision.model.wrapped import Wrapped

EDITS: dict[str, type[Edit]] = {}
"""Name of a kind of edit -> its class; files name kinds so."""


@dataclass(frozen=True)
class EditContext:
    """Where and when an edit writes: what its arithmetic may need beyond the values it replaces."""

    site: str
    hook: HookPoint
    window: PositionWindow
    index: tuple[Any, ...]
    """Selects the entries in the tensor of this pass."""
    absolute: tuple[Any, ...]
    """Selects the same entries in a tensor over all positions."""
    shape: torch.Size
    """Shape of the tensor of this pass."""
    given: Mapping[Any, Any]
    """Values worked out for this run: clean activations, dataset means, values captured earlier in the pass."""
    pooled: bool = False
    """Whether the site has no position axis in this model."""
    axis: int = 1
    """The axis of positions: queries, for scores and patterns."""

    def pick(self, source: Any, like: Tensor) -> Any:
        """The part of ``source`` (a number, or a tensor that broadcasts to the site over all positions) that belongs to the selected entries."""
        source = source.tensor if isinstance(source, TensorRef) else source
        if not isinstance(source, Tensor):
            return source
        source = source.to(like)
        if source.ndim <= 1 and source.numel() in (1, self.shape[-1]):
            return source
        shape = list(self.shape)
        if (
            source.ndim == len(shape)
            and 1 < source.shape[0] == self.window.rows < shape[0]
            and shape[0] % source.shape[0] == 0
        ):
            source = source.repeat_interleave(shape[0] // source.shape[0], dim=0)
        if not self.pooled:
            given = source_length(source, len(shape), self.axis)
            shape[self.axis] = self.window.index + self.window.count if given in (None, 1) else given
        try:
            return source.expand(shape)[self.absolute]
        except RuntimeError as error:
            raise InputError(
                f"a value of shape {tuple(source.shape)} does not fit {self.site}, whose shape is {tuple(self.shape)}"
            ) from error


def source_length(source: Any, ndim: int, axis: int = 1) -> int | None:
    """How many positions a value covers that broadcasts to a site of ``ndim`` axes; None if it has no position axis."""
    source = source.tensor if isinstance(source, TensorRef) else source
    if not isinstance(source, Tensor) or source.ndim < max(2, ndim - axis):
        return None
    return int(source.shape[source.ndim - ndim + axis])


@dataclass(frozen=True)
class Edit:
    """Something to change in a run: immutable, comparable, independent of any model.

    ``site`` is a name or a glob, ``heads`` count the site's own head axis, ``positions`` are absolute, ``steps`` the passes in which it acts.
    """

    site: str
    heads: tuple[int, ...] | None = None
    positions: Positions = ALL_POSITIONS
    steps: Steps = ALL_STEPS

    kind: ClassVar[str] = ""
    positions_name: ClassVar[str] = "positions"
    sets: ClassVar[bool] = False
    """Whether the new value forgets the old one, so that an earlier edit of the same entries would be lost."""
    reads_all: ClassVar[bool] = False
    """Whether the new values depend on entries that are not selected."""
    mixes_positions: ClassVar[bool] = False
    """Whether the new value of a position depends on other positions, selected or not."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.kind:
            EDITS[cls.kind] = cls

    # -- what it is ------------------------------------------------------------------------------------------------------------------------

    def sites(self, model: Wrapped) -> list[str]:
        """The sites of a model that this edit changes; UnknownSiteError if there is none."""
        return model.sites(self.site)

    @property
    def does_nothing(self) -> bool:
        """Whether the edit is known to be the identity, whatever it meets."""
        return False

    def values(self) -> dict[str, Any]:
        """The fields besides site, heads, positions and steps."""
        common = {"site", "heads", "positions", "steps"}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in common}

    def held(self) -> list[TensorRef]:
        """Every tensor the edit holds."""
        found: list[TensorRef] = []
        for value in self.values().values():
            if isinstance(value, TensorRef):
                found.append(value)
            elif isinstance(value, TensorRefMapping):
                found += [item for _, item in value.items if isinstance(item, TensorRef)]
        return found

    def __repr__(self) -> str:
        parts = [repr(self.site), *self._shown()]
        if self.heads is not None:
            parts.append(f"heads={short_repr(list(self.heads))}")
        if self.positions.plain is not None:
            parts.append(f"{self.positions_name}={short_repr(self.positions.plain)}")
        if self.steps.plain is not None:
            parts.append(f"steps={short_repr(self.steps.plain)}")
        return f"{self.kind}({', '.join(parts)})"

    def _shown(self) -> list[str]:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [f"{name}={short_repr(value)}" for name, value in self.values().items() if value != defaults[name]]

    def __provenance__(self) -> dict[str, Any]:
        """Its kind and every field that is not the default."""
        given = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {"edit": self.kind, **{name: value for name, (value, plain) in given.items() if value is not plain}}

    # -- meeting a model -------------------------------------------------------------------------------------------------------------------

    def captured(self) -> str | None:
        """A site whose value, in the edited run itself, this edit needs later in the same pass."""
        return None

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        """Raise InputError if this edit cannot act at ``site``.

        ``window`` is None where the shape is known only when the run gets there; ``grows`` is how many positions later passes add.
        """
        name = SiteName.parse(site)
        if self.heads is not None:
            if not name.has_heads:
                raise InputError(f"{site} has no heads")
            for head in self.heads:
                if n_heads is not None and not -n_heads <= head < n_heads:
                    raise InputError(f"head {head} is outside the {n_heads} heads of {site}")
        if name.is_pattern and not self.allows_patterns:
            raise InputError(
                f"{site} is [row head query key]: use block_attention, scale_attention, add_attention_bias, replace or apply"
            )
        if window is not None:
            self.positions.check(window, grows)
        numbers = (value for value in self.values().values() if isinstance(value, float))
        if any(math.isnan(number) for number in numbers) or any(tensor.has_nan for tensor in self.held()):
            raise InputError("its source holds NaN")

    allows_patterns: ClassVar[bool] = False

    def new(self, x: Tensor, at: EditContext) -> Tensor | float:
        """The new values of the selected entries ``x``, in their shape or broadcasting to it."""
        raise NotImplementedError

    def write(self, value: Tensor, window: PositionWindow, hook: HookPoint, given: Mapping[Any, Any]) -> None:
        """Change the selected entries of ``value`` (one run's rows of a site, the caller's own tensor) in place."""
        if not self.steps.acts(hook.step):
            return
        at = self._place(value, window, hook, given)
        if at is not None:
            old = value[at.index]
            # What a gradient needs later, of the edit's own tensors or of what comes before, must not be written over.
            old = old.clone() if torch.is_grad_enabled() else old
            value[at.index] = self._fitting(self.new(old, at), value)

    @staticmethod
    def _fitting(new: Any, value: Tensor) -> Any:
        return new.to(value) if isinstance(new, Tensor) else new

    def _place(
        self, value: Tensor, window: PositionWindow, hook: HookPoint, given: Mapping[Any, Any]
    ) -> EditContext | None:
        """The selected entries of this pass; None if there is none."""
        name = SiteName.parse(hook.name)
        axis = 2 if name.is_pattern else 1
        pooled = value.ndim < (4 if name.has_heads else 3)
        if pooled:
            if self.positions.kind != "all":
                raise InputError(f"{self!r}: {hook.name} has no positions in this run. Leave positions out.")
            everything = (slice(None),)
            return EditContext(hook.name, hook, window, everything, everything, value.shape, given, pooled=True)
        self._check_length(value.shape[axis], window, hook.name)
        chosen = self.positions.choose(window, value.shape[0], value.device)
        chosen = _before(chosen, self.source_end(hook.name, value.ndim, given), window)
        if is_empty(chosen):
            return None
        heads = self._head_index(value.shape[3 - axis], value.device) if name.has_heads else None
        here, absolute = (_index(chosen, heads, first, axis) for first in (0, window.index))
        return EditContext(hook.name, hook, window, here, absolute, value.shape, given, axis=axis)

    def _check_length(self, length: int, window: PositionWindow, site: str) -> None:
        """Raise InputError if a pass holds other positions than those worked out before the run: none of them could be told."""
        if self.positions.kind != "all" and length != window.count:
            raise InputError(
                f"{self!r}: {site} holds {length} positions in this pass, {window.count} were expected. Leave positions out."
            )

    def _head_index(self, count: int, device: torch.device) -> Chosen:
        if self.heads is None:
            return None
        found = [head % count for head in self.heads]
        if found == list(range(found[0], found[0] + len(found))):
            return slice(found[0], found[0] + len(found))
        return torch.tensor(found, device=device)

    def source_end(self, site: str, ndim: int, given: Mapping[Any, Any]) -> int | None:
        """The first position the edit's source says nothing about (a prompt's source does not cover what is generated later); None if it covers
        all."""
        return None


class EditGroup(tuple[Edit, ...]):
    """Edits that act together in one run; prints as they do."""

    __slots__ = ()

    def __repr__(self) -> str:
        return " + ".join(map(repr, self)) if self else "no edit"

    @classmethod
    def concat(cls, parts: Sequence[Sequence[EditGroup]]) -> list[EditGroup]:
        """The groups that several parts of a data set were run under: the same in each, but that a side as source is that part's own, and joined.

        Raises InputError for parts whose edits differ in anything else.
        """
        sides: dict[tuple[int, ...], SideSource] = {}

        def joined(*same: Edit) -> Edit:
            sources = [getattr(edit, "source", None) for edit in same]
            if all(isinstance(source, SideSource) for source in sources) and any(one != sources[0] for one in sources):
                found = [source.side for source in sources if isinstance(source, SideSource)]
                whole = sides.setdefault(tuple(map(id, found)), SideSource(type(found[0]).concat(found)))
                changes: dict[str, Any] = {"source": whole}
                same = tuple(dataclasses.replace(edit, **changes) for edit in same)
            for edit in same[1:]:
                if edit != same[0]:
                    raise InputError(f"The parts differ in edits: {same[0]!r} and {edit!r}.")
            return same[0]

        if len({tuple(map(len, groups)) for groups in parts}) > 1:
            raise InputError("The parts differ in edits: they have other numbers of them.")
        return [cls(map(joined, *groups)) for groups in zip(*parts, strict=True)]


def with_held(edit: Edit, change: Callable[[TensorRef], TensorRef]) -> Edit:
    """The same edit with every tensor it holds replaced; masks of positions stay."""

    def changed(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return change(value)
        if isinstance(value, TensorRefMapping):
            return TensorRefMapping(tuple((name, changed(item)) for name, item in value.items))
        return tuple(map(changed, value)) if isinstance(value, tuple) else value

    return dataclasses.replace(edit, **{name: changed(value) for name, value in edit.values().items()})


def by_digest(edits: Iterable[Edit]) -> EditGroup:
    """The same edits without their tensors, which are named by digest: what a result keeps of sources that it does not own."""
    return EditGroup(with_held(edit, TensorDigest.of_held) for edit in edits)


def taken(group: Iterable[Edit], examples: Sequence[int], count: int) -> tuple[Edit, ...]:
    """The same edits for a run of some of a data set's ``count`` examples, by their places there: positions given per example are theirs.

    Raises InputError where positions are given one by one for another number of examples.
    """
    found = []
    for edit in group:
        held = {name: getattr(edit, name, None) for name in ("positions", "keys")}
        changes: dict[str, Any] = {
            name: one.taken(examples, count) for name, one in held.items() if isinstance(one, Positions)
        }
        changes = {name: one for name, one in changes.items() if one is not held[name]}
        found.append(dataclasses.replace(edit, **changes) if changes else edit)
    return tuple(found)


def settled(groups: Iterable[Iterable[Edit]]) -> list[EditGroup]:
    """The same edits, of each trained tensor the values of this moment: what a result keeps of the edits it was made with."""
    kept: dict[int, TensorRef] = {}

    def own(ref: TensorRef) -> TensorRef:
        return kept.setdefault(id(ref), ref.settled()) if ref.trained else ref

    def one(edit: Edit) -> Edit:
        return with_held(edit, own) if any(ref.trained for ref in edit.held()) else edit

    return [EditGroup(map(one, group)) for group in groups]


def _before(chosen: Chosen, end: int | None, window: PositionWindow) -> Chosen:
    """Those chosen entries of a window that lie before an entry of the site's own axis."""
    if end is None or window.index + window.count <= end:
        return chosen
    room = max(end - window.index, 0)
    if chosen is None:
        return slice(0, room)
    if isinstance(chosen, slice):
        return slice(chosen.start, min(chosen.stop, room), chosen.step)
    if isinstance(chosen, tuple):
        keep = chosen[1] < room
        return chosen[0][keep], chosen[1][keep]
    return chosen[chosen < room]


def _index(chosen: Chosen, heads: Chosen, first: int, axis: int) -> tuple[Any, ...]:
    """One index of a tensor ``[row pos (head) …]``, or ``[row head pos …]``, its positions shifted by ``first``."""
    if isinstance(chosen, tuple):
        rows, columns = chosen[0], chosen[1] + first
        if heads is None:
            return (rows, columns) if axis == 1 else (rows, slice(None), columns)
        if isinstance(heads, Tensor):
            rows, columns = rows[:, None], columns[:, None]
        return (rows, columns, heads) if axis == 1 else (rows, heads, columns)
    if chosen is None:
        chosen = slice(first, None) if first else slice(None)
    elif isinstance(chosen, slice):
        chosen = slice(chosen.start + first, chosen.stop + first, chosen.step)
    else:
        chosen = chosen + first
    if heads is None:
        return (slice(None), chosen) if axis == 1 else (slice(None), slice(None), chosen)
    if isinstance(chosen, Tensor) and isinstance(heads, Tensor):
        chosen, heads = (chosen[:, None], heads) if axis == 1 else (chosen, heads[:, None])
    return (slice(None), chosen, heads) if axis == 1 else (slice(None), heads, chosen)


@contextlib.contextmanager
def naming(edit: Edit) -> Iterator[None]:
    """Errors name the edit."""
    try:
        yield
    except CircuitVisionError as error:
        text = str(error)
        raise type(error)(text if repr(edit) in text else f"{edit!r}: {text.rstrip('.')}.") from error
