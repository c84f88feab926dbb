"""What every measurement returns: a tensor with named axes, and where it came from.

A result is a frozen dataclass. ``values`` holds the numbers, ``axes`` names each dimension and labels every index of
it, and ``provenance`` says which model, data, metric and versions made it. Subclasses add fields; tensors among them
are stored as tensors, everything else as JSON, so ``Result.load`` gives back the subclass that was saved without
unpickling anything.

Two containers: ``.npz`` and ``.safetensors``. Both are one file, so that numbers and labels cannot be separated: the
JSON part is an entry of the archive, respectively of the safetensors header. Not covered: results too large for memory.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from circuitvision.digests import NamedFunction, of_json, plain
from circuitvision.errors import InputError, nearest
from circuitvision.files import replacing
from circuitvision.provenance import hash_inputs, without_dates

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

ResultType = TypeVar("ResultType", bound="Result")
_FORMAT = "circuitvision.result/1"
_META = "circuitvision_json"
_HELD, _INPUTS, _KIND = "held.", "inputs.", "circuitvision_kind"
_HOMES = {"edits": "circuitvision.model.edits.files", "metric": "circuitvision.metrics"}
"""Where kinds are at home that a file may hold before their module was imported."""
_kinds: dict[str, tuple[type, Callable[..., Any], Callable[..., Any]]] = {}


@dataclass(frozen=True, eq=False)
class Result:
    """Numbers with named axes.

    ``axes`` has one entry per dimension of ``values``, in order; its labels are strings, whole numbers, floats or
    booleans.

    Raises:
        InputError: the axes do not describe the shape of ``values``.
    """

    values: Tensor
    axes: dict[str, list[Any]]
    provenance: dict[str, Any] = field(default_factory=dict)

    _classes: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        Result._classes[cls.__name__] = cls
        if "__repr__" not in cls.__dict__:
            # A dataclass would print every tensor it holds.
            cls.__repr__ = Result.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        axes = {str(name): [as_builtin(label) for label in labels] for name, labels in self.axes.items()}
        shape = tuple(len(labels) for labels in axes.values())
        if shape != tuple(self.values.shape):
            raise InputError(
                f"{type(self).__name__}: values have shape {tuple(self.values.shape)} but the axes "
                f"{', '.join(f'{name} ({len(labels)})' for name, labels in axes.items())} describe {shape}."
            )
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "provenance", as_builtin(dict(self.provenance)))

    def __repr__(self) -> str:
        said = [getattr(self, field, None) for field in ("tower", "site", "measure")]
        where = ", ".join(word for word in said if isinstance(word, str) and word)
        axes = " × ".join(f"{name} {len(labels)}" for name, labels in self.axes.items())
        return f"{type(self).__name__}({where}{': ' if where else ''}{axes})"

    def __provenance__(self) -> dict[str, Any]:
        """What it holds as a digest, and where that came from."""
        held = {
            entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "provenance"
        }
        return {"result": type(self).__name__, "sha256": of_json(plain(held)), "from": without_dates(self.provenance)}

    def to_frame(self) -> pd.DataFrame:
        """One row per value: a column for each axis and the column ``value`` (long form, in row-major order)."""
        import pandas as pd

        index = pd.MultiIndex.from_product(list(self.axes.values()), names=list(self.axes))
        flat = self.values.detach().cpu()
        flat = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
        return pd.DataFrame({"value": flat.reshape(-1).numpy()}, index=index).reset_index()

    def plot(self, **keywords: Any) -> go.Figure:
        """The Plotly figure made for this kind of result; keywords go to it (a wrong one raises an InputError that lists them)."""
        from circuitvision import plots

        return plots.plot(self, **keywords)

    def save(
        self,
        path: str | Path,
        *,
        sources: bool = True,
        inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> Path:
        """Write this result to one ``.npz`` or ``.safetensors`` file, complete or not at all; returns the path.

        Edits are written as edits. The tensors that they hold come with them, once each; without ``sources`` only their digests do, and
        :func:`circuitvision.edits.restore` puts them back. Inputs are not kept by a result, only their digests: give them again to have them in the
        file (:func:`inputs_of` reads them).

        Raises:
            InputError: another suffix, or inputs that are not those of this result.
        """
        path = Path(path)
        tensors, plain = _split_fields(self, sources)
        given = [] if inputs is None else [inputs] if isinstance(inputs, Mapping) else list(inputs)
        if given and hash_inputs(*given) != self.provenance.get("dataset_sha256"):
            raise InputError("These are not the inputs that this result was measured on (in the order of the call).")
        others = [{name: as_builtin(v) for name, v in one.items() if not isinstance(v, Tensor)} for one in given]
        for number, one in enumerate(given):
            named = {f"{_INPUTS}{number}.{name}": v for name, v in one.items() if isinstance(v, Tensor)}
            tensors |= {name: tensor.detach().cpu() for name, tensor in named.items()}
        header = {
            "inputs": others,
            "module": type(self).__module__,
            "format": _FORMAT,
            "class": type(self).__name__,
            "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
            "fields": plain,
        }
        text = json.dumps(header)
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {name: _to_numpy(tensor) for name, tensor in tensors.items()}
            with replacing(path) as temporary, temporary.open("wb") as handle:
                arrays[_META] = np.frombuffer(text.encode(), dtype=np.uint8)
                np.savez_compressed(handle, **arrays)
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            with replacing(path) as temporary:
                save_file(
                    {name: t.contiguous().clone() for name, t in tensors.items()}, temporary, metadata={_META: text}
                )
        else:
            raise InputError(f"Results are saved as .npz or .safetensors, not {path.suffix or 'without a suffix'!r}.")
        return path

    @classmethod
    def load(cls: type[ResultType], path: str | Path, objects: Mapping[str, Any] | None = None) -> ResultType:
        """Read what :meth:`save` wrote, as the class that was saved. Nothing is unpickled, and no function imported before it is used.

        ``objects`` gives back the dictionaries (SAEs, transcoders) that edits name.

        Raises:
            InputError: not a result file, or one of a class that is not a ``cls``.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"There is no file {path}.")
        tensors, header = _read(path)
        if header.get("format") != _FORMAT:
            raise InputError(f"{path} is of format {header.get('format')!r}; this version reads {_FORMAT!r}.")
        if str(header.get("module", "")).startswith("circuitvision."):
            importlib.import_module(header["module"])
        found = Result._classes.get(header["class"], Result if header["class"] == "Result" else None)
        if found is None:
            raise InputError(f"{path} holds a {header['class']}; import the module that defines it before loading.")
        if not issubclass(found, cls):
            raise InputError(
                f"{path} holds a {found.__name__}, not a {cls.__name__}; load it with {found.__name__}.load."
            )
        tensors = {name: tensor.to(getattr(torch, header["dtypes"][name])) for name, tensor in tensors.items()}
        held = {name.removeprefix(_HELD): t for name, t in tensors.items() if name.startswith(_HELD)}
        own: dict[str, Any] = {name: t for name, t in tensors.items() if not name.startswith((_HELD, _INPUTS))}
        fields = {name: _restored(value, held, objects or {}) for name, value in header["fields"].items()}
        return found(**own, **fields)

    def index_of(self, axis: str, label: Any) -> int:
        """Where a label stands on an axis. A label that is not there is never taken for a place.

        Raises:
            InputError: no such axis or label; the nearest labels are named.
        """
        if axis not in self.axes:
            raise InputError(f"A {type(self).__name__} has no axis {axis!r}; its axes are {', '.join(self.axes)}.")
        labels, label = self.axes[axis], as_builtin(label)
        for number, known in enumerate(labels):
            if known == label and isinstance(known, bool) == isinstance(label, bool):
                return number
        raise InputError(
            f"There is no {axis} {label!r} in this {type(self).__name__}; {_nearest_labels(label, labels)}."
        )

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """What a ranking of components reads: one number per component and example, with this result's axes, and which of these are no components.

        Results with a baseline give the difference from it.

        Raises:
            InputError: a result without components.
        """
        return self.values, ("row", "example", "position", "step")

    def highlights(self) -> dict[str, str]:
        """What a reader wants to see first, by name, for the table that notebooks show; nothing by default."""
        return {}

    def _repr_html_(self) -> str:
        """A short table for notebooks: shape, range, highlights, and provenance without its hashes."""
        finite = self.values[torch.isfinite(self.values)]
        span = f"{finite.min():.4g} … {finite.max():.4g}" if finite.numel() else "no finite value"
        known = {key: value for key, value in self.provenance.items() if isinstance(value, str | int | float)}
        rows = {
            "axes": " × ".join(f"{name} {len(labels)}" for name, labels in self.axes.items()),
            "range": span,
            **self.highlights(),
            **{key: value for key, value in known.items() if value != "" and not key.endswith("sha256")},
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(str(key))}</th><td style='text-align:left'>"
            f"{html.escape(str(value))}</td></tr>"
            for key, value in rows.items()
        )
        return f"<table><caption>{html.escape(type(self).__name__)}</caption>{cells}</table>"


def _nearest_labels(label: Any, labels: list[Any], count: int = 5) -> str:
    """Labels like one that is missing, in words."""
    if len(labels) <= count:
        return f"there are {', '.join(map(repr, labels))}" if labels else "there are none"
    numbers = [known for known in labels if isinstance(known, int | float) and not isinstance(known, bool)]
    if isinstance(label, int | float) and numbers:
        near = sorted(numbers, key=lambda known: abs(known - label))[:count]
    else:
        words = {str(known): known for known in labels}
        near = [words[word] for word in nearest(str(label), words, count)]
    return f"nearest of {len(labels)}: {', '.join(map(repr, near))}"


def by_example(values: Tensor, example: Sequence[int] | None) -> Tensor:
    """Values ``[… row]`` as ``[… example]``: the mean over the rows of each example, without those that hold NaN.

    Rows of one example (its images, tiles, cameras) are not independent: an error over examples counts them once.
    """
    if not example or len(example) != values.shape[-1] or len(set(example)) == len(example):
        return values
    names = sorted(set(example))
    rows = [[row for row, owner in enumerate(example) if owner == name] for name in names]
    return torch.stack([values[..., own].nanmean(-1) for own in rows], dim=-1)


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean over the last axis (independent examples), without NaN; NaN where there are fewer than two."""
    exact = values.double()
    count = (~exact.isnan()).sum(-1)
    spread = (exact - exact.nanmean(-1, keepdim=True)).square().nansum(-1) / (count - 1)
    return torch.where(count > 1, (spread / count).sqrt(), torch.nan)


def inputs_of(path: str | Path) -> list[dict[str, Any]]:
    """The inputs that a result was saved with, in the order of the call; empty if it was saved without."""
    tensors, header = _read(Path(path))
    found = [dict(one) for one in header.get("inputs", [])]
    for name, tensor in tensors.items():
        if name.startswith(_INPUTS):
            number, _, own = name.removeprefix(_INPUTS).partition(".")
            found[int(number)][own] = tensor.to(getattr(torch, header["dtypes"][name]))
    return found


def stored_as(kind: str, cls: type, write: Callable[..., Any], read: Callable[..., Any]) -> None:
    """Let results hold objects of a class: ``write(value, tensors, sources)`` gives plain data and puts tensors into a mapping by digest (without
    ``sources`` only what is needed to know what the object was), ``read(data, tensors, objects)`` gives the object back.
    """
    _kinds[kind] = (cls, write, read)


def _stored(value: Any, tensors: dict[str, Tensor], sources: bool) -> Any:
    """A field in JSON form; objects of the kinds that have one say which they are."""
    for kind, (cls, write, _) in _kinds.items():
        if isinstance(value, cls):
            return {_KIND: kind, "data": write(value, tensors, sources)}
    if isinstance(value, Mapping):
        return {str(key): _stored(item, tensors, sources) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(item, tensors, sources) for item in value]
    return as_builtin(value)


def _restored(value: Any, tensors: Mapping[str, Tensor], objects: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors, objects) for item in value]
    if not isinstance(value, dict):
        return value
    if _KIND in value:
        importlib.import_module(_HOMES.get(value[_KIND], __name__))
        return _kinds[value[_KIND]][2](value["data"], tensors, objects)
    return {key: _restored(item, tensors, objects) for key, item in value.items()}


def as_builtin(value: Any) -> Any:
    """The same value made of Python's own types, which JSON, GraphML and a reader of either can hold.

    Tensors and arrays of one number become numbers, larger ones nested lists; tuples become lists; mapping keys
    become strings.

    Raises:
        InputError: a type with no such form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        # numpy.float64 and string enums pass isinstance while being other types.
        for builtin in (bool, int, float, str):
            if isinstance(value, builtin):
                return value if type(value) is builtin else builtin(value)
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): as_builtin(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [as_builtin(item) for item in items]
    if isinstance(value, Path):
        return str(value)
    raise InputError(
        f"{type(value).__name__} cannot be stored in a result; give numbers, strings, lists or mappings of them."
    )


def _split_fields(result: Result, sources: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a result, those that its edits hold among them, and its other fields in JSON form."""
    tensors: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for entry in dataclasses.fields(result):
        value = getattr(result, entry.name)
        if isinstance(value, Tensor):
            tensors[entry.name] = value.detach().cpu()
        else:
            plain[entry.name] = _stored(value, held, sources)
    tensors |= {f"{_HELD}{name}": tensor.detach().cpu() for name, tensor in held.items()}
    return tensors, plain


def _to_numpy(tensor: Tensor) -> np.ndarray:
    # numpy has no bfloat16; float32 holds every bfloat16 exactly and the header remembers the type.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                header = json.loads(bytes(archive[_META]).decode())
                return {name: torch.from_numpy(archive[name]) for name in archive.files if name != _META}, header
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as archive:
                header = json.loads((archive.metadata() or {})[_META])
                return {name: archive.get_tensor(name) for name in archive.keys()}, header  # noqa: SIM118
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a result saved by circuitvision ({error}).") from error
    except Exception as error:  # safetensors and zipfile raise types of their own for damaged files
        if type(error).__module__.split(".")[0] in ("safetensors", "zipfile", "builtins", "safetensors_rust"):
            raise InputError(f"{path} is damaged or not a result file ({error}).") from error
        raise
    raise InputError(f"Results are .npz or .safetensors files; {path.name} is neither.")


stored_as(
    "function",
    NamedFunction,
    lambda value, tensors, sources: {"name": value.name, "sha256": value.sha256},
    lambda data, tensors, objects: NamedFunction(**data),
)
