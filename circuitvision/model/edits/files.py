"""Edits as text: plain dictionaries, YAML and JSON, with tensors by reference.

A tensor is written as ``{tensor: <digest>}`` and stored once in a ``.safetensors`` file beside the text, however many edits hold it. Functions are
written by import path; dictionaries (SAEs, transcoders) by a name that the reader resolves with ``objects={name: dictionary}``. Nothing is
unpickled.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitvision.digests import NamedFunction, name_of, of_tensor
from circuitvision.errors import InputError
from circuitvision.files import reading, write_tensors, write_text
from circuitvision.model.edits.base import EDITS, Edit, EditGroup, by_digest, with_held
from circuitvision.model.edits.values import Steps, TensorDigest, TensorRef, TensorRefMapping
from circuitvision.model.positions import Positions
from circuitvision.model.regions import REGIONS, Region
from circuitvision.storage import stored_as

FORMAT = "circuitvision.edits/1"
Tensors = dict[str, Tensor]


def to_dict(edit: Edit, tensors: Tensors, strict: bool = True) -> dict[str, Any]:
    """An edit in Python's own types; the tensors it holds are put into ``tensors`` under their digests.

    Raises InputError for a function or dictionary that cannot be named; without ``strict`` those are named by what they were, and the edit says so
    when it is run.
    """
    out: dict[str, Any] = {"edit": edit.kind, "site": edit.site}
    if edit.heads is not None:
        out["heads"] = list(edit.heads)
    for name, positions in ((edit.positions_name, edit.positions), ("keys", getattr(edit, "keys", None))):
        if positions is not None and (positions.kind != "all" or positions.tower):
            out[name] = write_positions(positions, tensors)
    if edit.steps.kind != "all":
        out["steps"] = edit.steps.plain
    for name, value in edit.values().items():
        if name != "keys" and value is not None:
            out[name] = _plain(value, tensors, name, strict)
    return out


def from_dict(data: Mapping[str, Any], tensors: Mapping[str, Tensor], objects: Mapping[str, Any] | None = None) -> Edit:
    """The edit that :func:`to_dict` described.

    Raises InputError for an unknown kind, a missing tensor, or an object that ``objects`` does not hold.
    """
    fields = dict(data)
    kind = fields.pop("edit", None)
    if kind not in EDITS:
        raise InputError(f"{kind!r} is no kind of edit; known: {', '.join(sorted(EDITS))}.")
    cls = EDITS[kind]
    known = {*cls.__dataclass_fields__} - {"positions"} | {cls.positions_name}
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise InputError(f"{kind} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in (cls.positions_name, "keys"):
            values["keys" if name == "keys" else "positions"] = read_positions(value, tensors)
        elif name == "steps":
            values[name] = Steps.of(value)
        else:
            values[name] = _read(value, tensors, objects or {})
    return cls(**values)


def dump(edits: Edit | Sequence[Edit | Sequence[Edit]], tensors: Tensors) -> str:
    """Edits, or groups of edits, as YAML text; their tensors are put into ``tensors``."""
    import yaml

    return yaml.safe_dump(_document(edits, tensors), sort_keys=False, allow_unicode=True, default_flow_style=None)


def _document(edits: Edit | Sequence[Edit | Sequence[Edit]], tensors: Tensors) -> dict[str, Any]:
    listed = [
        to_dict(item, tensors) if isinstance(item, Edit) else [to_dict(edit, tensors) for edit in item]
        for item in ([edits] if isinstance(edits, Edit) else edits)
    ]
    return {"format": FORMAT, "edits": listed}


def parse(text: str, tensors: Mapping[str, Tensor], objects: Mapping[str, Any] | None = None) -> list[Any]:
    """What :func:`dump` wrote, or the same as JSON: edits, and lists of edits where there were groups."""
    import yaml

    try:
        # JSON is YAML but for numbers such as 1e-05, which YAML 1.1 reads as text.
        data = json.loads(text)
    except json.JSONDecodeError:
        data = yaml.safe_load(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"This is not a text of format {FORMAT!r}.")
    return [
        from_dict(item, tensors, objects)
        if isinstance(item, Mapping)
        else [from_dict(edit, tensors, objects) for edit in item]
        for item in data["edits"]
    ]


def save(path: str | Path, edits: Edit | Sequence[Edit | Sequence[Edit]]) -> Path:
    """Write edits to a ``.yaml`` or ``.json`` file, and the tensors they hold to the ``.safetensors`` file of the same name beside it.

    Raises InputError for another suffix, and where that file holds something else.
    """
    path = Path(path)
    tensors: Tensors = {}
    if path.suffix in (".yaml", ".yml"):
        text = dump(edits, tensors)
    elif path.suffix == ".json":
        text = json.dumps(_document(edits, tensors), indent=1)
    else:
        raise InputError(f"Edits are saved as .yaml or .json, not {path.suffix or 'without a suffix'!r}.")
    if tensors:
        write_tensors(path.with_suffix(".safetensors"), _of_both(path) | tensors)
    return write_text(path, text)


def _of_both(path: Path) -> Tensors:
    """The tensors that another text of edits of the same stem refers to, which the file beside them keeps."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    beside = path.with_suffix(".safetensors")
    others = [path.with_suffix(suffix) for suffix in (".yaml", ".yml", ".json") if suffix != path.suffix]
    if not beside.is_file() or not any(other.is_file() for other in others):
        return {}
    try:
        return load_file(beside)
    except SafetensorError:
        return {}


def load(path: str | Path, objects: Mapping[str, Any] | None = None) -> list[Any]:
    """Read what :func:`save` wrote. Raises InputError for a file of another format, or tensors that are not there."""
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    beside = path.with_suffix(".safetensors")
    tensors: Tensors = {}
    if beside.is_file():
        with reading(beside, "the tensors of these edits"):
            tensors = load_file(beside)
    with reading(path, "edits"):
        return parse(path.read_text(encoding="utf-8"), tensors, objects)


def _keep(value: TensorRef, tensors: Tensors) -> dict[str, Any]:
    name = value.digest()
    if isinstance(value, TensorDigest):
        shape, dtype = list(value._tensor.shape), str(value._tensor.dtype).removeprefix("torch.")
        return {"tensor": name, "shape": shape, "dtype": dtype}
    tensors.setdefault(name, value.tensor)
    return {"tensor": name}


def _plain(value: Any, tensors: Tensors, name: str, strict: bool = True) -> Any:
    if isinstance(value, TensorRef):
        return _keep(value, tensors)
    if isinstance(value, Positions):
        return {"selection": write_positions(value, tensors)}
    if isinstance(value, TensorRefMapping):
        return {"mapping": {key: _plain(item, tensors, name, strict) for key, item in value.items}}
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return [_plain(item, tensors, name, strict) for item in value]
    if name == "fn" and strict:
        return {"function": _import_path(value)}
    if name == "fn":
        named = NamedFunction.of(value)
        return {"function": named.name, "sha256": named.sha256}
    reference = getattr(value, "name", None)
    if isinstance(reference, str) and reference:
        return {"object": reference} if strict else {"object": reference, "later": True}
    if not strict:
        return {"object": name_of(type(value)), "later": True}
    raise InputError(f"A {type(value).__name__} is saved by its name; give it an attribute 'name'.")


def _import_path(function: Any) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or "<" in name:
        raise InputError(f"{name or function!r} has no import path, so it cannot be saved; define it in a module.")
    return f"{module}:{name}"


def _read(value: Any, tensors: Mapping[str, Tensor], objects: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_read(item, tensors, objects) for item in value)
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        if "shape" in value and value["tensor"] not in tensors:
            return TensorDigest(value["tensor"], value["shape"], getattr(torch, value["dtype"]))
        return TensorRef(_tensor(value["tensor"], tensors))
    if "selection" in value:
        return read_positions(value["selection"], tensors)
    if "mapping" in value:
        return TensorRefMapping(tuple((key, _read(item, tensors, objects)) for key, item in value["mapping"].items()))
    if "function" in value and "sha256" in value:
        return NamedFunction(value["function"], value["sha256"])
    if "function" in value:
        module, _, name = str(value["function"]).partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found
    if "object" in value:
        if value["object"] not in objects and value.get("later"):
            return NamedFunction(value["object"])
        if value["object"] not in objects:
            raise InputError(f"These edits use the dictionary {value['object']!r}; pass objects={{name: dictionary}}.")
        return objects[value["object"]]
    raise InputError(f"{dict(value)!r} is not a value of an edit.")


def _tensor(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise InputError(f"The tensor {name} is not there; keep the .safetensors file beside the text.")
    return tensors[name]


def _write_group(group: EditGroup, tensors: Tensors, sources: bool) -> list[dict[str, Any]]:
    return [to_dict(edit, tensors, strict=False) for edit in (group if sources else by_digest(group))]


def _read_group(data: Any, tensors: Mapping[str, Tensor], objects: Mapping[str, Any]) -> EditGroup:
    return EditGroup(from_dict(edit, tensors, objects) for edit in data)


stored_as("edits", EditGroup, _write_group, _read_group)


def restore(edits: Any, *sources: Any) -> Any:
    """Edits whose tensors are known by digest alone, with the tensors put back from where they are found.

    ``edits`` is an edit, a group, or a sequence of either, and what comes back has the same form; ``sources`` are caches, mappings or tensors. Raises
    InputError for a tensor that none of them holds.
    """
    if isinstance(edits, Edit):
        there = [t for source in sources for t in ([source] if isinstance(source, Tensor) else dict(source).values())]
        return with_held(edits, lambda value: _found(value, [t for t in there if isinstance(t, Tensor)]))
    return type(edits)(restore(edit, *sources) for edit in edits)


def _found(value: TensorRef, there: Sequence[Tensor]) -> TensorRef:
    if not isinstance(value, TensorDigest):
        return value
    alike = (t for t in there if t.shape == value._tensor.shape and t.dtype == value._tensor.dtype)
    found = next((t for t in alike if of_tensor(t) == value.digest()), None)
    if found is None:
        raise InputError(f"None of the sources holds the {value!r} with digest {value.digest()[:12]}….")
    return TensorRef.of(found)


def write_positions(positions: Positions, tensors: Tensors) -> Any:
    """Positions in Python's own types; masks and regions put their tensors into ``tensors``."""
    if positions.tower and positions.kind != "mask":
        plain = dataclasses.replace(positions, tower="")
        return {"tower": positions.tower, "positions": None if plain.kind == "all" else write_positions(plain, tensors)}
    if positions.kind == "slice":
        return {"slice": list(positions.bounds)}
    if positions.kind == "mask":
        assert positions.mask is not None
        found = {**_keep(positions.mask, tensors), "tower": positions.tower, "label": positions.label}
        return {key: value for key, value in found.items() if value}
    if positions.kind == "region":
        found = {"region": _region(positions.region, tensors), "examples": positions.examples}
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in found.items() if value is not None
        }
    if positions.kind == "function":
        return {"function": _import_path(positions.function)}
    return list(positions.ints) if positions.kind == "ints" else positions.plain


def _region(value: Any, tensors: Tensors) -> Any:
    """A region, or a field of one, as plain data."""
    if isinstance(value, Region):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        plain = {
            f.name for f in dataclasses.fields(value) if fields[f.name] is None is f.default or fields[f.name] == ""
        }
        return {"kind": value.kind, **{name: _region(v, tensors) for name, v in fields.items() if name not in plain}}
    if isinstance(value, TensorRef):
        return _keep(value, tensors)
    return [_region(item, tensors) for item in value] if isinstance(value, tuple) else value


def _read_region(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_read_region(item, tensors) for item in value)
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        return _read(value, tensors, {})
    fields = {name: _read_region(item, tensors) for name, item in value.items() if name != "kind"}
    if value.get("kind") not in REGIONS:
        raise InputError(f"{value.get('kind')!r} is no kind of region; known: {', '.join(sorted(REGIONS))}.")
    return REGIONS[value["kind"]](**fields)


def read_positions(value: Any, tensors: Mapping[str, Tensor]) -> Positions:
    """What :func:`write_positions` wrote."""
    if not isinstance(value, Mapping):
        return Positions.of(value)
    if "positions" in value:
        return dataclasses.replace(read_positions(value["positions"], tensors), tower=value["tower"])
    if "slice" in value:
        return Positions.of(slice(*value["slice"]))
    if "region" in value:
        examples = tuple(value["examples"]) if "examples" in value else None
        return Positions("region", region=_read_region(value["region"], tensors), examples=examples)
    if "function" in value:
        return Positions("function", function=_read(value, tensors, {}))
    mask = _read({key: item for key, item in value.items() if key in ("tensor", "shape", "dtype")}, tensors, {})
    return Positions("mask", mask=mask, tower=value.get("tower", ""), label=value.get("label", ""))
