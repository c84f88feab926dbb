"""Values as plain JSON that tells them apart: what a provenance is made of.

``plain(value)`` is the same in every process for equal values and differs for different ones. Numbers and words stay readable; tensors, arrays and
images become a digest over type, shape and bytes, and long lists a digest of what they hold. A function is its code with its defaults, the values
it closes over and the globals it names: two lambdas that differ in one number differ. Library functions (torch, numpy, this package, the standard
library) are their name; the versions stand beside them.

Classes say what they are through ``__provenance__()``. Not covered: objects whose state is neither in attributes nor in a known type (marked
``"opaque"`` with their class), and iterators, which cannot be read twice (:class:`Witness` digests them while they are consumed).
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import hashlib
import importlib
import json
import math
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from circuitvision.errors import InputError

MOST_ITEMS = 64
"""Longer lists and mappings are a digest of what they hold."""
_LIBRARIES = frozenset({"circuitvision", "torch", "numpy", "transformers", "PIL", "einops", "pandas", "sklearn"})
_SETTINGS = (bool, int, float, str, type(None), torch.dtype)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_NO_SETTING = frozenset({"training", "gradient_checkpointing", "name_or_path"})
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def of_json(value: Any) -> str:
    """SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_tensor(tensor: Tensor) -> str:
    """SHA-256 over type, shape and bytes, wherever the tensor lies and however it is strided; remembered until it is written into.

    A tensor on the meta device has no bytes.
    """
    version = None if tensor.is_inference() else tensor._version
    found = _known.get(tensor)
    if version is not None and found is not None and found[0] == version:
        return str(found[1])
    digest = _hash_tensor(tensor)
    if version is not None:
        _known[tensor] = (version, digest)
    return digest


def _hash_tensor(tensor: Tensor) -> str:
    found = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach()
    inner = getattr(flat, "__tensor_flatten__", None)
    if inner is not None:
        # A tensor that is made of others (torchao's quantised ones) is what those hold.
        found.update("|".join(_hash_tensor(getattr(flat, name)) for name in inner()[0]).encode())
        return found.hexdigest()
    if flat.is_meta:
        found.update(b"meta")
        return found.hexdigest()
    if flat.is_quantized:
        found.update(repr(flat.qscheme()).encode())
        flat = flat.dequantize()
    if flat.layout is not torch.strided:
        flat = flat.to_dense()
    flat = flat.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def of_array(array: np.ndarray) -> str:
    """SHA-256 over type, shape and bytes of an array of numbers, booleans or text."""
    found = hashlib.sha256(f"{array.dtype}|{array.shape}|".encode())
    found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON that differs wherever the value does; see the module. Never raises."""
    return _Reader().read(value)


class Witness(Iterator[Any]):
    """An iterator that digests what passes through it."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source, self._hash, self._count = source, hashlib.sha256(), 0

    def __next__(self) -> Any:
        item = next(self._source)
        self._hash.update(of_json(plain(item)).encode())
        self._count += 1
        return item

    def __provenance__(self) -> dict[str, Any]:
        """How many items were read, and the digest of them."""
        return {"iterator": self._count, "sha256": self._hash.hexdigest()}


class _Reader:
    """One walk through a value: what is being read is remembered, so that a value may hold itself, and code is read once."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.code: dict[int, Any] = {}

    def read(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if id(value) in self.open:
            return {"again": type(value).__qualname__}
        if id(value) in self.code:
            return self.code[id(value)]
        self.open.add(id(value))
        try:
            found = self._known_type(value)
            if isinstance(value, types.FunctionType | type):
                self.code[id(value)] = found
            return found
        except Exception as error:
            return {"opaque": name_of(type(value)), "because": type(error).__name__}
        finally:
            self.open.discard(id(value))

    def _known_type(self, value: Any) -> Any:
        told = getattr(type(value), "__provenance__", None)
        if told is not None:
            return self.read(told(value))
        if isinstance(value, Tensor):
            shape = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            return {"tensor": shape, "sha256": of_tensor(value)}
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                return {"array": list(value.shape), "items": self.read(value.ravel().tolist())}
            return {"array": f"{value.dtype} {list(value.shape)}", "sha256": of_array(value)}
        if isinstance(value, enum.Enum):
            return {"enum": f"{name_of(type(value))}.{value.name}"}
        if isinstance(value, np.generic | bool | int | float | str):
            return self.read(value.item() if isinstance(value, np.generic) else _builtin(value))
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, list | tuple):
            return self._items(type(value).__name__, [self.read(item) for item in value])
        if isinstance(value, set | frozenset):
            return self._items("set", sorted((self.read(item) for item in value), key=of_json))
        return self._object(value)

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        if all(isinstance(key, str) for key in value):
            found = {key: self.read(item) for key, item in value.items()}
        else:
            found = {of_json(self.read(key)): [self.read(key), self.read(item)] for key, item in value.items()}
        return found if len(found) <= MOST_ITEMS else {"mapping": len(found), "sha256": of_json(found)}

    def _items(self, kind: str, items: list[Any]) -> Any:
        if len(items) > MOST_ITEMS:
            return {kind: len(items), "sha256": of_json(items)}
        return {"set": items} if kind == "set" else items

    def _object(self, value: Any) -> Any:
        if isinstance(value, bytes | bytearray):
            return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
        if isinstance(value, torch.dtype | torch.device | torch.Size | torch.layout):
            return str(value)
        if isinstance(value, range | slice | complex | type(Ellipsis) | datetime.date | datetime.timedelta):
            return repr(value)
        if isinstance(value, Path):
            return value.name
        if isinstance(value, types.ModuleType):
            return self._python_module(value, set())
        if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):
            found = hashlib.sha256(f"{value.mode}|{value.size}|".encode() + value.tobytes()).hexdigest()
            return {"image": f"{value.mode} {list(value.size)}", "sha256": found}
        if hasattr(value, "to_numpy") and hasattr(value, "index"):
            labels = {
                name: self.read(list(getattr(value, name))) for name in ("index", "columns") if hasattr(value, name)
            }
            return {"table": labels, "items": self.read(value.to_numpy())}
        if isinstance(value, nn.Module):
            state = {name: self.read(item) for name, item in value.state_dict().items()}
            told = {"module": name_of(type(value)), "training": value.training, "sha256": of_json(state)}
            return {**told, "settings": of_json(self.settings(value)), **self._class_code(type(value))}
        if isinstance(value, torch.Generator):
            return {"generator": self.read(value.get_state())}
        if isinstance(value, np.random.Generator):
            return {"generator": self.read(dict(value.bit_generator.state))}
        if isinstance(value, type):
            return {"class": name_of(value), **self._class_code(value)}
        if callable(value) and not dataclasses.is_dataclass(value):
            told = self._callable(value)
            if told is not None:
                return told
        return self._instance(value)

    def _callable(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            given = {"args": self.read(value.args), "keywords": self.read(value.keywords)}
            return {"partial": self.read(value.func), **given}
        if isinstance(value, types.MethodType):
            return {"method": self.read(value.__func__), "of": self.read(value.__self__)}
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType):
            owner = getattr(value, "__self__", None)
            told = {"function": name_of(value)}
            return told if owner is None or isinstance(owner, types.ModuleType) else {**told, "of": self.read(owner)}
        return None

    def _function(self, function: types.FunctionType) -> dict[str, Any]:
        told: dict[str, Any] = {"function": name_of(function)}
        closure = self._closure(function)
        if _is_library(function.__module__) and not closure:
            return told
        code = function.__code__
        held = {
            "code": _code(code),
            "defaults": self.read(function.__defaults__),
            "keyword_defaults": self.read(function.__kwdefaults__),
            "closure": closure,
            "globals": {} if _is_library(function.__module__) else self._globals(function, code),
        }
        told["sha256"] = of_json(held)
        if closure:
            told["closure"] = closure
        return told

    def _closure(self, function: types.FunctionType) -> dict[str, Any]:
        found = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                found[name] = self.read(cell.cell_contents)
            except ValueError:
                found[name] = {"opaque": "empty cell"}
        return found

    def _globals(self, function: types.FunctionType, code: types.CodeType) -> dict[str, Any]:
        names, there = _names(code), function.__globals__
        return {name: self._named(there[name], names) for name in sorted(names) if name in there}

    def _named(self, value: Any, names: set[str]) -> Any:
        return self._python_module(value, names) if isinstance(value, types.ModuleType) else self.read(value)

    def _python_module(self, module: types.ModuleType, names: set[str]) -> dict[str, Any]:
        """A module by its name; of one that is no library's, also what code that reads ``names`` can take from it."""
        told: dict[str, Any] = {"module": module.__name__}
        if _is_library(module.__name__) or id(module) in self.open:
            return told
        self.open.add(id(module))
        try:
            held = {name: self._named(vars(module)[name], names) for name in sorted(names) if name in vars(module)}
        finally:
            self.open.discard(id(module))
        return {**told, "holds": held} if held else told

    def _class_code(self, cls: type) -> dict[str, Any]:
        if _is_library(cls.__module__):
            return {}
        code = {
            f"{base.__qualname__}.{name}": self._class_item(item)
            for base in cls.__mro__
            if not _is_library(base.__module__)
            for name, item in vars(base).items()
            if not (name.startswith("__") and name.endswith("__")) or isinstance(item, types.FunctionType)
        }
        return {"code": of_json(code)} if code else {}

    def _class_item(self, item: Any) -> Any:
        if isinstance(item, staticmethod | classmethod):
            return self.read(item.__func__)
        if isinstance(item, property):
            return [self.read(item.fget), self.read(item.fset)]
        if isinstance(item, functools.cached_property):
            return self.read(item.func)
        return {} if isinstance(item, types.MemberDescriptorType | types.GetSetDescriptorType) else self.read(item)

    def settings(self, module: nn.Module) -> dict[str, Any]:
        """What the parts of a module are besides their tensors: classes, numbers and words, functions, a forward put over their class's.

        Private names are left out, and what a run writes (``…_cached``).
        """
        found = {}
        for prefix, part in module.named_modules():
            held: list[Any] = [name_of(type(part))]
            for name, value in vars(part).items():
                if name[0] == "_" or name in _NO_SETTING or name.endswith("_cached"):
                    continue
                if type(value) in _SETTINGS:
                    held.append([name, repr(value)])
                elif isinstance(value, list | tuple) and all(type(item) in _SETTINGS for item in value):
                    held.append([name, repr(list(value))])
                elif isinstance(value, _CODE) and not (hasattr(type(part), name) and is_library(value)):
                    # Libraries put their own forward and to() in place of a class's, for offloading and tracing.
                    held.append([name, self.read(value)])
            found[prefix] = held
        return found

    def _instance(self, value: Any) -> dict[str, Any]:
        cls = type(value)
        told: dict[str, Any] = {"object": name_of(cls), **self._class_code(cls)}
        if dataclasses.is_dataclass(value):
            return {**told, "fields": {f.name: self.read(getattr(value, f.name)) for f in dataclasses.fields(value)}}
        slots = [name for base in cls.__mro__ for name in _slots(base) if hasattr(value, name)]
        fields = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
        if not fields and not _is_plain_object(cls):
            return {**told, "opaque": name_of(cls)}
        return {**told, "fields": {name: self.read(item) for name, item in fields.items()}}


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What decides a module's numbers besides its tensors, part by part; see :meth:`_Reader.settings`."""
    return _Reader().settings(module)


def _names(code: types.CodeType) -> set[str]:
    """Every name that code, and code inside it, reads."""
    return set(code.co_names).union(*(_names(item) for item in code.co_consts if isinstance(item, types.CodeType)))


def name_of(value: Any) -> str:
    """``module:qualified name`` of a function or class."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', None) or 'builtins'}:{name}"


def _builtin(value: Any) -> Any:
    return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))


def _slots(cls: type) -> list[str]:
    slots = cls.__dict__.get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if name not in ("__weakref__", "__dict__")]


def _is_plain_object(cls: type) -> bool:
    """Whether an instance without fields can have no state: its classes are written in Python."""
    return all(base is object or base.__flags__ & (1 << 9) for base in cls.__mro__)


@functools.cache
def _is_library(module: str | None) -> bool:
    root = (module or "builtins").split(".")[0]
    if root in _LIBRARIES or root in sys.stdlib_module_names - {"__main__"}:
        return True
    path = str(getattr(sys.modules.get(root), "__file__", "") or "")
    return "site-packages" in path or "dist-packages" in path


def is_library(function: Any) -> bool:
    """Whether a function, or the function behind a method or partial, belongs to a library."""
    function = getattr(function, "func", function)
    return _is_library(getattr(function, "__module__", None))


def _code(code: types.CodeType) -> dict[str, Any]:
    """What a code object does, without where it stands: bytes, constants and names."""
    constants = [_code(item) if isinstance(item, types.CodeType) else _constant(item) for item in code.co_consts]
    names = [list(code.co_names), list(code.co_varnames), list(code.co_freevars)]
    return {"code": code.co_code.hex(), "constants": constants, "names": names, "arguments": code.co_argcount}


def _constant(value: Any) -> Any:
    items = sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
    return [type(value).__name__, items]


@dataclasses.dataclass(frozen=True)
class NamedFunction:
    """A function, or another object, that a file knows by its name and the digest of its code."""

    name: str
    sha256: str = ""

    @classmethod
    def of(cls, function: Any) -> NamedFunction:
        """The name of a function; a NamedFunction as it is."""
        if isinstance(function, cls):
            return function
        told = plain(function)
        named = function if hasattr(function, "__qualname__") else type(function)
        return cls(name_of(named), of_json(told))

    @property
    def __name__(self) -> str:
        return self.name.rpartition(":")[2]

    def __provenance__(self) -> dict[str, Any]:
        return {"named": self.name, "sha256": self.sha256}

    def resolve(self) -> Any:
        """The function itself, imported by its name.

        Raises InputError, naming it, if it has no import path (a lambda, a function of a notebook or inside another), is gone, or computes something
        else today.
        """
        module, _, name = self.name.partition(":")
        if module == "__main__" or "<" in name:
            raise InputError(
                f"{self.name} has no import path, so a file cannot bring it back: give the function again."
            )
        try:
            found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise InputError(f"{self.name} cannot be imported here ({error}): give the function again.") from error
        if of_json(plain(found)) != self.sha256:
            raise InputError(f"{self.name} is not what it was when this was saved: give the function again.")
        return found

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.resolve()(*args, **keywords)
