"""Where a number came from: model, weights, data, metric, method, seed and versions.

Hashes are SHA-256 over the bytes of the tensors, so two results with equal hashes saw equal weights and equal inputs
whatever their files were called. Not covered: the hardware, and nondeterministic kernels.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_weights: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}|{tensors[name].dtype}|{tuple(tensors[name].shape)}|".encode())
        for tensor in _stored(tensors[name].detach()):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stored(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's numbers: itself, or what a quantised tensor is made of."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if inner is None else [part for name in inner()[0] for part in _stored(getattr(tensor, name))]


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of a module's state dict; remembered until a tensor of it is written or replaced.

    Weights that are not in memory (offloaded or on the meta device) give ``"unavailable"``.
    """
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in state.values()):
        return "unavailable"
    key = tuple((name, part.data_ptr(), part._version) for name, whole in state.items() for part in _stored(whole))
    known = _weights.get(module)
    if known is None or known[0] != key:
        known = (key, hash_tensors(state))
        _weights[module] = known
    return known[1]


def hash_inputs(*inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the tensors in one or more input mappings, in the order given."""
    tensors = {
        f"{number}.{name}": value
        for number, mapping in enumerate(inputs)
        for name, value in mapping.items()
        if isinstance(value, Tensor)
    }
    return hash_tensors(tensors)


def _computed_in(module: nn.Module) -> torch.dtype:
    # Quantised weights are stored in bytes; the first number of 16 bits or more says what is computed in.
    floats = (value.dtype for value in module.parameters() if value.is_floating_point() and value.dtype.itemsize >= 2)
    return next(floats, torch.float32)


def versions() -> dict[str, str]:
    """Versions of the packages a result depends on."""
    found = {}
    for name in ("circuitvision", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def model_id(module: nn.Module) -> str:
    """The checkpoint's name; of a local folder only its own name (the hash says which weights), else the class."""
    name = str(getattr(getattr(module, "config", None), "_name_or_path", "") or type(module).__name__)
    return Path(name).name if Path(name).is_dir() else name


def describe(
    model: Any,
    *,
    method: str,
    metric: Any = None,
    inputs: tuple[Mapping[str, Any], ...] = (),
    seed: int | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The provenance of one measurement, as plain values.

    Args:
        model: the hooked model that was measured.
        method: name of the function and its settings.
        metric: the metric; its ``name`` and ``units`` are recorded where it has them.
        inputs: the input mappings that were run.
        seed: the seed of whatever was random; None where nothing was.
        extra: further entries.
    """
    module = model.module
    return {
        "model_id": model_id(module),
        "model_class": type(module).__name__,
        "family": str(getattr(model.family, "name", model.family)),
        "weights_sha256": hash_weights(module),
        "dtype": str(_computed_in(module)).removeprefix("torch."),
        "dataset_sha256": hash_inputs(*inputs) if inputs else "",
        "metric": describe_metric(metric),
        "metric_units": str(getattr(metric, "units", "")),
        "method": method,
        "seed": seed,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **extra,
    }


def describe_metric(metric: Any) -> str:
    """A metric's own name, or that of the function."""
    if metric is None:
        return ""
    return str(getattr(metric, "name", None) or getattr(metric, "__name__", None) or type(metric).__name__)
