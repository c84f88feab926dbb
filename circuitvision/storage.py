"""How a result lies in a file: its tensors under their names, and everything else as one JSON text beside them.

Two containers, ``.npz`` and ``.safetensors``: one file each, so that numbers and labels cannot be separated. The JSON part is an entry of the
archive, respectively of the safetensors header. Nothing is ever unpickled. Objects that are neither tensors nor JSON (edits, metrics, functions)
have a kind of their own, see :func:`stored_as`. Not covered: results too large for memory.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.digests import NamedFunction
from circuitvision.errors import InputError
from circuitvision.files import format_of, reading, replacing, write_tensors

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "circuitvision.result/1"
META = "circuitvision_json"
HELD, INPUTS, _KIND = "held.", "inputs.", "circuitvision_kind"
_HOMES = {"edits": "circuitvision.model.edits.files", "metric": "circuitvision.metrics"}
"""Where kinds are at home that a file may hold before their module was imported."""
_kinds: dict[str, tuple[type, Callable[..., Any], Callable[..., Any]]] = {}


def stored_as(kind: str, cls: type, write: Callable[..., Any], read: Callable[..., Any]) -> None:
    """Let results hold objects of a class: ``write(value, tensors, sources)`` gives plain data and puts tensors into a mapping by digest (without
    ``sources`` only what is needed to know what the object was), ``read(data, tensors, objects)`` gives the object back.
    """
    _kinds[kind] = (cls, write, read)


def stored(value: Any, tensors: dict[str, Tensor], sources: bool) -> Any:
    """A field in JSON form; objects of the kinds that have one say which they are."""
    for kind, (cls, write, _) in _kinds.items():
        if isinstance(value, cls):
            return {_KIND: kind, "data": write(value, tensors, sources)}
    if isinstance(value, Mapping):
        return {str(key): stored(item, tensors, sources) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [stored(item, tensors, sources) for item in value]
    return as_builtin(value)


def restored(value: Any, tensors: Mapping[str, Tensor], objects: Mapping[str, Any]) -> Any:
    """What :func:`stored` was given."""
    if isinstance(value, list):
        return [restored(item, tensors, objects) for item in value]
    if not isinstance(value, dict):
        return value
    if _KIND in value:
        importlib.import_module(_HOMES.get(value[_KIND], __name__))
        return _kinds[value[_KIND]][2](value["data"], tensors, objects)
    return {key: restored(item, tensors, objects) for key, item in value.items()}


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


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to a ``.npz`` or ``.safetensors`` file, complete or not at all; InputError for another suffix."""
    text = json.dumps(header)
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {name: _to_numpy(tensor) for name, tensor in tensors.items()}
        arrays[META] = np.frombuffer(text.encode(), dtype=np.uint8)
        with replacing(path) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, **arrays)
    elif path.suffix == ".safetensors":
        write_tensors(path, tensors, {META: text})
    else:
        raise InputError(
            f"Results are saved as .npz or .safetensors, their values alone as .csv or .parquet, not "
            f"{path.suffix or 'without a suffix'!r}."
        )


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file, whatever its name.

    Raises:
        InputError: no file of a result, or a damaged one.
    """
    kind = format_of(path)
    if kind not in ("npz", "safetensors"):
        raise InputError(
            f"{path} is not a result saved by circuitvision: it is neither .npz nor .safetensors, or damaged."
        )
    with reading(path, "a result"):
        if kind == "npz":
            with np.load(path, allow_pickle=False) as arrays:
                header = dict(json.loads(bytes(arrays[META]).decode()))
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != META}, header
        from safetensors import safe_open

        with safe_open(path, framework="pt") as archive:
            header = dict(json.loads((archive.metadata() or {})[META]))
            return {name: archive.get_tensor(name) for name in archive.keys()}, header  # noqa: SIM118


def write_table(frame: pd.DataFrame, path: Path, provenance: Mapping[str, Any]) -> Path:
    """Write a frame to a ``.csv`` or ``.parquet`` file, complete or not at all; InputError without pyarrow for the latter."""
    if path.suffix == ".csv":
        with replacing(path) as temporary:
            frame.to_csv(temporary, index=False)
        return path
    try:
        importlib.import_module("pyarrow")
    except ImportError as error:
        raise InputError(
            "Parquet files are written with pyarrow, which is not installed: pip install pyarrow."
        ) from error
    # A column of Parquet has one type; labels such as "input", 0, 1 have two.
    mixed = [name for name in frame if frame[name].dtype == object and len({type(one) for one in frame[name]}) > 1]
    frame = frame.astype(dict.fromkeys(mixed, str))
    frame.attrs = {"provenance": dict(provenance)}
    with replacing(path) as temporary:
        frame.to_parquet(temporary, index=False, engine="pyarrow")
    return path


def inputs_of(path: str | Path) -> list[dict[str, Any]]:
    """The inputs that a result was saved with, in the order of the call; empty if it was saved without."""
    tensors, header = read(Path(path))
    found = [dict(one) for one in header.get("inputs", [])]
    for name, tensor in tensors.items():
        if name.startswith(INPUTS):
            number, _, own = name.removeprefix(INPUTS).partition(".")
            found[int(number)][own] = tensor.to(getattr(torch, header["dtypes"][name]))
    return found


def _to_numpy(tensor: Tensor) -> np.ndarray:
    # numpy has no bfloat16; float32 holds every bfloat16 exactly and the header remembers the type.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


stored_as(
    "function",
    NamedFunction,
    lambda value, tensors, sources: {"name": value.name, "sha256": value.sha256},
    lambda data, tensors, objects: NamedFunction(**data),
)
