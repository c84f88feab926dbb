"""What an edit is made of beside its positions: tensors held by reference, heads, and steps.

Everything here is immutable and compares by content. A tensor is held, not copied (a sweep of a thousand edits shares one source), so writing into
it afterwards would change every edit that holds it: a held tensor remembers its version, and using it after such a write is an error. A tensor that
requires a gradient is there to be written into, by an optimizer: the edit holds the tensor itself, and acts with the values it has in each run.

Positions are in :mod:`circuitvision.model.positions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from circuitvision.digests import of_tensor
from circuitvision.errors import InputError

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


ALL_STEPS = Steps()
