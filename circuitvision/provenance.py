"""Where a number came from: the function that was called with everything it was given, the model and its state, and versions.

:func:`with_provenance` marks the functions that return results. Before such a function runs it describes every argument (see
:mod:`circuitvision.digests`: inputs, answers, edits with their tensors, sources, masks, settings, the code of functions) and the model that is
measured, so that two studies that differ in one of these never have equal provenance, and it puts the description under ``"call"`` of every result
that comes back. ``"created"`` is the only entry that differs between two calls of one study.

``"cannot_restore"`` lists the functions and objects that the description names but cannot bring back. Not covered: the machine, nondeterministic
kernels, and weights that are written between a run and the reading of its cache.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import inspect
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from circuitvision import digests
from circuitvision.digests import of_json, of_tensor, plain

Function = TypeVar("Function", bound=Callable[..., Any])
SMALL = 2**20
"""Bytes up to which a weight is read anew for every result."""
SAMPLES = 1024
"""How many entries of a larger weight are read to notice a write that left no trace in its version."""
_SHOWN_ONLY = ("progress", "save_to", "resume")
"""Arguments that change no number."""
_weights: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, str]]] = WeakKeyDictionary()
_running: ContextVar[tuple[nn.Module, dict[str, Any]] | None] = ContextVar("running", default=None)
_command: ContextVar[tuple[str, ...]] = ContextVar("command", default=())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes."""
    return of_json({name: of_tensor(tensor) for name, tensor in tensors.items()})


def hash_inputs(*inputs: Mapping[str, Any]) -> str:
    """SHA-256 of everything in one or more input mappings, in the order given."""
    return of_json([{str(name): plain(value) for name, value in mapping.items()} for mapping in inputs])


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers; remembered until one of them is written or replaced.

    A write through ``.data`` leaves no trace in a tensor: weights up to :data:`SMALL` bytes are read anew each time, of larger ones a sample, so that
    a change of single entries of a large weight through ``.data`` may be missed. Offloaded weights are read from where they are kept; weights that
    are nowhere (the meta device) give ``"unavailable"``.
    """
    state = _state(module)
    if any(tensor.is_meta for tensor, _ in state.values()):
        return "unavailable"
    known, found = _weights.get(module, {}), {}
    for name, (tensor, kept) in state.items():
        # What is read from a file lies somewhere else each time.
        stamp = (0 if kept else tensor.data_ptr(), tensor.dtype, tensor.shape, *_stamp(tensor, kept))
        before = known.get(name)
        found[name] = before if before and before[0] == stamp else (stamp, digests._hash_tensor(tensor))
    _weights[module] = found
    return of_json({name: digest for name, (_, digest) in found.items()})


def _state(module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """Every parameter and buffer by name, those that are not saved among them, and whether it is offloaded; those as they are kept."""
    found: dict[str, tuple[Tensor, bool]] = {}
    for prefix, part in module.named_modules():
        stored = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                away = tensor.is_meta
                found[f"{prefix}.{name}"] = (_kept(stored, name, tensor), True) if away else (tensor, False)
                for what, beside in _beside(tensor):
                    found[f"{prefix}.{name}.{what}"] = (beside, False)
        for what, held in _packed(part):
            found[f"{prefix}.{what}"] = (held, True)
    return found


def _beside(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the attributes of a quantised weight (bitsandbytes' scales), which are no parameters."""
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        return
    for name, item in sorted(getattr(value, "__dict__", {}).items()):
        if isinstance(item, Tensor) and not name.startswith("_"):
            yield name, item
        elif name in ("quant_state", "state2") and item is not None:
            yield from ((f"{name}.{what}", tensor) for what, tensor in _beside(item))


def _packed(part: Any) -> Iterator[tuple[str, Tensor]]:
    """What a packed layer of ``torch.ao`` holds, in no parameter: whole numbers, scales, zero points and bias."""
    if not isinstance(part, nn.Module) or not str(type(part).__module__).startswith("torch.ao.nn."):
        return
    for what in ("weight", "bias"):
        held = getattr(part, what, None)
        held = held() if callable(held) else None
        if held is None:
            continue
        if not held.is_quantized:
            yield what, held
        else:
            rows = held.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
            scale = held.q_per_channel_scales() if rows else torch.tensor(held.q_scale())
            zero = held.q_per_channel_zero_points() if rows else torch.tensor(held.q_zero_point())
            yield from ((what, held.int_repr()), (f"{what}.scale", scale), (f"{what}.zero", zero))


def _kept(stored: Any, name: str, tensor: Tensor) -> Tensor:
    if stored is None:
        return tensor
    try:
        return stored[name]
    except KeyError:
        return tensor


def _stamp(tensor: Tensor, kept: bool = False) -> tuple[Any, ...]:
    """What changes when a tensor is written into: its version, and a weighted sum over the bits of all entries, or a digest of some."""
    version = -1 if kept or tensor.is_inference() else tensor._version
    flat = tensor.detach()
    if not _is_dense(flat):
        return version, digests._hash_tensor(tensor)
    flat = flat.view(-1)
    if tensor.nbytes > SMALL:
        return version, digests._hash_tensor(flat[:: max(1, flat.numel() // SAMPLES)])
    if tensor.nbytes % 8 or flat.storage_offset() * flat.itemsize % 8:
        return version, digests._hash_tensor(flat)
    bits = flat.view(torch.int64)
    weights = _weights_of_bits(bits.device)[: len(bits)]
    return version, int(bits.dot(weights) if bits.device.type == "cpu" else (bits * weights).sum())


@functools.lru_cache(maxsize=4)
def _weights_of_bits(device: torch.device) -> Tensor:
    """Odd numbers at random: any write to one place, and nearly every other, changes the sum."""
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randint(2**62, (SMALL // 8,), generator=generator) + 1).to(device)


def _is_dense(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized and tensor.is_contiguous()
    )


def _computed_in(module: nn.Module) -> torch.dtype:
    # Quantised weights are stored in bytes; the first number of 16 bits or more says what is computed in.
    floats = (value.dtype for value in module.parameters() if value.is_floating_point() and value.dtype.itemsize >= 2)
    return next(floats, torch.float32)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("circuitvision", "torch", "transformers", "numpy"):
        try:
            found[name] = _version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@functools.cache
def _version(name: str) -> str:
    return importlib.metadata.version(name)


def model_id(module: nn.Module) -> str:
    """The checkpoint's name; of a local folder only its own name (the hash says which weights), else the class."""
    name = str(getattr(getattr(module, "config", None), "_name_or_path", "") or type(module).__name__)
    return Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name


def describe_model(model: Any) -> dict[str, Any]:
    """The model that was measured and the state it was in: weights, configuration, dtype, device, mode, adapters, hooks around the run."""
    module = model.module
    running = _running.get()
    if running is not None and running[0] is module:
        return dict(running[1])
    # Offloaded weights are on no device; the model runs on one all the same.
    device = str(getattr(model, "device", None) or next(module.parameters()).device)
    device = "cpu" if device == "meta" else device
    engine = getattr(model, "engine", None)
    return {
        "model_id": model_id(module),
        "model_class": type(module).__name__,
        "family": str(getattr(model.family, "name", model.family)),
        "weights_sha256": hash_weights(module),
        "config_sha256": of_json(_configuration(module)),
        "dtype": str(_computed_in(module)).removeprefix("torch."),
        "device": device,
        "state": _module_state(module, device),
        "active_hooks": plain(engine.active() if engine is not None else []),
        "foreign_hooks": _foreign_hooks(module),
        "versions": versions(),
    }


def told_of_model(model: Any) -> dict[str, Any]:
    """What of a model must be equal for numbers to be joined with those of another call, by name: weights, state, versions."""
    state = describe_model(model)
    weights, found = state.pop("weights_sha256"), state.pop("versions")
    state.pop("model_id")
    return {
        "weights": weights,
        "model": of_json(state),
        "versions": {name: one for name, one in found.items() if name != "python"},
    }


def _configuration(module: nn.Module) -> Any:
    """The configuration without names of files and versions, which change no number."""
    config: Any = getattr(module, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    return plain(_without(told, ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")))


def _without(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return value


def _module_state(module: nn.Module, device: str) -> dict[str, Any]:
    """What decides a run besides weights and configuration; only what is not the default."""
    config: Any = getattr(module, "config", None)
    parts = {name: getattr(config, name, None) for name in ("text_config", "vision_config", "vlm_config")}
    attention = {"": config, **parts}
    training = [name for name, part in module.named_modules() if part.training]
    found: dict[str, Any] = {
        "attention": {name: getattr(part, "_attn_implementation", None) for name, part in attention.items() if part},
        "training": training if len(training) <= 8 else {"modules": len(training), "sha256": of_json(training)},
        "parts": of_json(digests.settings_of(module)),
        "adapters": _adapters(module),
        "autocast": torch.is_autocast_enabled(device.split(":")[0]),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if training:
        # Dropout draws from here: a study that is repeated with another draw is another one.
        found["random_state"] = of_tensor(torch.get_rng_state())
    return found


def _foreign_hooks(module: nn.Module) -> dict[str, Any]:
    """Torch hooks that somebody else put on the module and that are no library's."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values(), *part._backward_hooks.values()]
        own = [plain(hook) for hook in hooks if not digests.is_library(hook)]
        if own:
            found[name] = own
    return found


def _adapters(module: nn.Module) -> Any:
    """Which adapters act, how strongly, and where they were merged."""
    found = {}
    for name, part in module.named_modules():
        if hasattr(part, "active_adapters") and hasattr(part, "scaling"):
            settings = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
            found[name] = plain({setting: getattr(part, setting, None) for setting in settings})
    return {"layers": len(found), "sha256": of_json(found)} if found else {}


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
        metric: the metric with its words resolved; its ``name`` and ``units`` are recorded where it has them, and what it computes.
        inputs: the input mappings that were run.
        seed: the seed of whatever was random; None where nothing was.
        extra: further entries.
    """
    return {
        **describe_model(model),
        "dataset_sha256": hash_inputs(*inputs) if inputs else "",
        "metric": describe_metric(metric),
        "metric_units": str(getattr(metric, "units", "")),
        "metric_arguments": plain(metric),
        "method": method,
        "seed": seed,
        "created": _now(),
        **extra,
    }


def describe_metric(metric: Any) -> str:
    """A metric's own name, or that of the function."""
    if metric is None:
        return ""
    return str(getattr(metric, "name", None) or getattr(metric, "__name__", None) or type(metric).__name__)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def command(arguments: Sequence[str]) -> Iterator[None]:
    """Results made inside the block record this command; of paths in it only the last name."""
    token = _command.set(tuple(Path(word).name if "/" in word or "\\" in word else word for word in arguments))
    try:
        yield
    finally:
        _command.reset(token)


def with_provenance(function: Function) -> Function:
    """A function whose results say what it was called with, see the module."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            bound = signature.bind(*args, **keywords)
        except TypeError:
            return function(*args, **keywords)
        bound.apply_defaults()
        witnesses = _witness(bound.arguments)
        told = {} if witnesses else _arguments(bound.arguments)
        model = _model_in(bound.arguments)
        state = describe_model(model) if model is not None else {}
        token = _running.set((model.module, state) if model is not None else _running.get())
        try:
            result = function(*bound.args, **bound.kwargs)
        finally:
            _running.reset(token)
        told = _arguments(bound.arguments) if witnesses else told
        return _stamped(result, state, {"function": digests.name_of(function), "arguments": told})

    call._has_provenance = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _witness(arguments: dict[str, Any]) -> bool:
    """Put a witness in the place of every iterator, which can be read only once; whether there was one."""
    found = [name for name, value in arguments.items() if isinstance(value, Iterator)]
    for name in found:
        arguments[name] = digests.Witness(arguments[name])
    return bool(found)


def _arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: plain(value)
        for name, value in arguments.items()
        if name not in _SHOWN_ONLY and not isinstance(value, type)
    }


def _model_in(arguments: Mapping[str, Any]) -> Any:
    """The model that a call measures: an argument, or what a cache or tower among them belongs to."""
    for value in arguments.values():
        for found in (value, getattr(value, "model", None), _owner(value)):
            if (
                hasattr(found, "towers")
                and hasattr(found, "family")
                and isinstance(getattr(found, "module", None), nn.Module)
            ):
                return found
    return None


def _owner(value: Any) -> Any:
    owner = getattr(value, "owner", None)
    return owner() if callable(owner) and hasattr(value, "spec") else None


def _stamped(value: Any, state: Mapping[str, Any], call: dict[str, Any]) -> Any:
    """The same value, every result in it with the description of the call."""
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(_stamped(item, state, call) for item in value)
    if type(value) is dict:
        return {key: _stamped(item, state, call) for key, item in value.items()}
    known = getattr(value, "provenance", None)
    if not isinstance(known, dict) or not hasattr(type(value), "__dataclass_fields__"):
        return value
    lost = _lost(call)
    ran = {"command": list(_command.get())} if _command.get() else {}
    found = copy.copy(value)
    object.__setattr__(
        found,
        "provenance",
        {**state, **known, "created": known.get("created", _now()), "call": call, "cannot_restore": lost, **ran},
    )
    return found


def _lost(told: Any) -> list[str]:
    """Functions and objects that a description names and that nothing can bring back."""
    if isinstance(told, list):
        return sorted({name for item in told for name in _lost(item)})
    if not isinstance(told, Mapping):
        return []
    own = [told[word] for word in ("function", "opaque") if isinstance(told.get(word), str) and "arguments" not in told]
    own = [name for name in own if "sha256" in told or "opaque" in told or "<" in name]
    return sorted({*own, *(name for item in told.values() for name in _lost(item))})


def without_dates(provenance: Any) -> Any:
    """A provenance without the times at which it was written: what two calls of one study share."""
    if isinstance(provenance, Mapping):
        return {key: without_dates(item) for key, item in provenance.items() if key != "created"}
    return [without_dates(item) for item in provenance] if isinstance(provenance, list) else provenance
