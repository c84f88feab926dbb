"""Weights as the model computes with them: what a module does to its input, not what its storage holds.

A parameter's tensor is not always what multiplies the input: a 4-bit layer stores packed bytes, an adapter adds to the layer it wraps, an
offloaded layer holds nothing until it runs. Whoever reads a weight asks here. The order of the answers:

* a plain linear map or embedding gives its live tensor, without a copy;
* a weight that can say its own value (``dequantize``) is asked for it;
* anything else is *measured*: the identity is pushed through the module, in the precision of the stream that it reads, with its biases left out
  (subtracting a large bias again would cost the weight's low bits). Dropout is off while measuring.

An 8-bit layer that also quantises its input is no linear map: the weight read here is the dequantised one, and the layer's own output differs
from ``x @ W + b`` by the rounding of the input.

Offloaded tensors are fetched through the hooks that accelerate put on the module, for as long as they are read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import UnsupportedModelError

BLOCK = 1024
"""Rows of the identity that are pushed through a module at once."""
_OLD_REPARAMETRIZATIONS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
_RANDOM = ("torch.nn.modules.dropout", "torch.nn.utils.parametrizations")
"""Where modules come from that draw, or move on, with each call in training mode."""


def linear_weight(
    module: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"] | None]:
    """Weight ``[d_in, d_out]`` and bias of a linear map, as it computes: ``module(x) = x @ weight + bias``.

    A plain ``nn.Linear`` gives live views. ``dtype`` and ``device`` are those of the stream that the module reads; they matter where the
    map has to be measured. Raises UnsupportedModelError for a module that cannot be measured, or whose weights are not in memory.
    """
    module = computing(module)
    if _is_plain(module, nn.Linear):
        with _still(module):
            return parameter(module, "weight").T, _optional(module, "bias")
    held = _held_by(module)
    if held is not None:
        return held[0].T, held[1]
    dtype, device = dtype or main_dtype(module), device or main_device(module)
    width = _features(module)
    with _measuring(module, device), _without_biases(module):
        rows = []
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            unit = torch.zeros(stop - start, width, dtype=dtype, device=device)
            unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
            rows.append(module.forward(unit))
        weight = rows[0] if len(rows) == 1 else torch.cat(rows)
        offset = module.forward(torch.zeros(1, width, dtype=dtype, device=device))
        weight = weight - offset if bool(offset.detach().any()) else weight
        _check_linear(module, weight, offset)
    return weight, linear_bias(module, dtype, device)


def passes_gradient(module: nn.Module) -> bool:
    """Whether autograd goes through a layer: not through the packed ones of ``torch.ao``, which drop the gradient without a word."""
    outer: Any = module
    return not (callable(getattr(outer, "weight", None)) and callable(getattr(outer, "bias", None)))


def check_gradients(module: nn.Module) -> None:
    """Raise UnsupportedModelError if some layer of a model drops gradients."""
    for name, part in module.named_modules():
        if not passes_gradient(part):
            raise UnsupportedModelError(
                f"{name} is a {type(part).__module__}.{type(part).__name__}, through which no gradient passes: what is behind it would count "
                "as having no effect. Take gradients of the model before it was quantised."
            )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that computes with its stored weight, so that it equals ``x @ W + b`` bit by bit."""
    return _is_plain(computing(module), nn.Linear)


def _check_linear(module: nn.Module, weight: Tensor, offset: Tensor) -> None:
    """Raise UnsupportedModelError if a module is not, to the rounding of an 8-bit input, the linear map that was measured."""
    with torch.no_grad():
        probe = (
            torch.arange(1, len(weight) + 1, dtype=torch.float32, device=weight.device).mul(2.4).sin()[None].to(weight)
        )
        found, expected = (module.forward(probe) - offset).float(), probe.float() @ weight.float()
        if float((found - expected).norm()) > 0.1 * float(found.norm() + expected.norm()):
            raise UnsupportedModelError(
                f"{type(module).__name__} is no linear map, so no weight says what it computes. Merge or remove what was put into it."
            )


def linear_bias(
    module: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Float[Tensor, " d_out"] | None:
    """The bias of a linear map as it computes, None where it has none; see :func:`linear_weight`."""
    module = computing(module)
    if _is_plain(module, nn.Linear):
        return _optional(module, "bias")
    held = _held_by(module)
    if held is not None:
        return held[1]
    dtype, device = dtype or main_dtype(module), device or main_device(module)
    with _measuring(module, device):
        zero = module.forward(torch.zeros(1, _features(module), dtype=dtype, device=device))[0]
    has_bias = bool(zero.detach().any()) or any(part._parameters.get("bias") is not None for part in module.modules())
    return zero if has_bias else None


def embedding_weight(
    module: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Float[Tensor, "n_in d_model"]:
    """What each input of an embedding becomes: rows by token id, or by ``channel·height·width`` of a patch for a convolution or linear map.

    A plain ``nn.Embedding`` gives its live weight. A factor that the module multiplies its rows with (Gemma's ``√d_model``) is left out.
    Raises as :func:`linear_weight`.
    """
    module = computing(module)
    base: Any = base_layer(module)
    if (_is_plain(module, nn.Embedding) or _is_scaled_table(module)) and base.max_norm is None:
        return parameter(module, "weight")
    if _is_plain(module, nn.Conv2d):
        return parameter(module, "weight").flatten(1).T
    if not isinstance(base, (nn.Embedding, nn.Conv2d)):
        return linear_weight(module, dtype, device)[0]
    dtype, device = dtype or main_dtype(module), device or main_device(module)
    with _measuring(module, device):
        if isinstance(base, nn.Embedding):
            ids = torch.arange(base.num_embeddings, device=device)
            rows = torch.cat([module.forward(part) for part in ids.split(BLOCK)])
            scale = getattr(base, "embed_scale", None)
            return rows if scale is None else rows / torch.as_tensor(scale).to(rows)
        shape = (int(base.in_channels), *base.kernel_size)
        width = math.prod(shape)
        with _without_biases(module):
            units = torch.eye(width, dtype=dtype, device=device).view(width, *shape)
            return torch.cat([module.forward(part) for part in units.split(BLOCK)]).flatten(1)


def parameter(module: nn.Module, name: str) -> Any:
    """A tensor that a module holds itself, fetched where it is offloaded; AttributeError where there is none.

    Raises UnsupportedModelError for a tensor without data whose module cannot fetch it.
    """
    module = computing(module)
    value = getattr(module, name)
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    with _fetched(module):
        value = getattr(module, name)
    if value.is_meta:
        raise UnsupportedModelError(
            f"The {name} of {type(module).__name__} is on the meta device and nothing there can fetch it: load the model with weights "
            "(from_pretrained), and offload by layers (device_map, cpu_offload, disk_offload), not by preloaded classes."
        )
    return value


def _optional(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return None if value is None else parameter(module, name)


def norm_weights(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Gain and bias of a norm, None where it has none."""
    module = computing(module)
    return _optional(module, "weight"), _optional(module, "bias")


def attention_weights(attention: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``in_proj_weight [3·d, d]``, its bias, ``out_proj.weight [d, d]`` and its bias of an ``nn.MultiheadAttention``, adapters included."""
    outer: Any = computing(attention)
    inner: Any = base_layer(outer)
    if outer is inner:
        out, out_bias = linear_weight(inner.out_proj)
        return parameter(inner, "in_proj_weight"), _optional(inner, "in_proj_bias"), out.T, out_bias
    # The adapter of this module merges itself for the length of each forward; its parts are never called.
    merges = not outer.disable_adapters and not outer.merged
    if merges:
        outer.merge(adapter_names=[name for name in outer.active_adapters if name in outer.lora_A])
    try:
        out_proj: Any = base_layer(inner.out_proj)
        return inner.in_proj_weight, inner.in_proj_bias, out_proj.weight, out_proj.bias
    finally:
        if merges:
            outer.unmerge()


def out_width(module: nn.Module) -> int:
    """How many features a linear map writes, or how many rows an embedding has."""
    base: Any = base_layer(computing(module))
    width = getattr(base, "out_features", getattr(base, "num_embeddings", None))
    return int(base.weight.shape[0] if width is None else width)


def in_width(module: nn.Module) -> int:
    """How many features a linear map reads, or how wide an embedding's rows are."""
    base: Any = base_layer(computing(module))
    width = getattr(base, "in_features", getattr(base, "embedding_dim", None))
    return int(base.weight.shape[1] if width is None else width)


def main_dtype(module: nn.Module) -> torch.dtype:
    """The precision a module computes in: that of its first parameter that is stored as a number of 16 bits or more; float32 without one."""
    for value in module.parameters():
        if value.is_floating_point() and value.dtype.itemsize >= 2:
            return value.dtype
    return torch.float32


def main_device(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its first parameter that is in memory, or the one its parameters are fetched to."""
    found = torch.device("cpu")
    for value in module.parameters():
        if not value.is_meta:
            return value.device
        found = value.device
    for part in module.modules():
        for hook in _hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                where = hook.execution_device
                return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
    return found


def computing(module: nn.Module) -> nn.Module:
    """The module that runs, where an adapter keeps whole replacements of a module beside the original."""
    outer: Any = module
    kept: Any = getattr(outer, "modules_to_save", None) if hasattr(outer, "original_module") else None
    if isinstance(kept, nn.ModuleDict):
        active = [] if outer.disable_adapters else [name for name in outer.active_adapters if name in kept]
        return computing(kept[active[0]] if active else outer.original_module)
    kept = getattr(outer, "ln_tuning_layers", None)
    if isinstance(kept, nn.ModuleDict):
        # A merged replacement has changed places with the original.
        swapped = outer.merged and outer.disable_adapters
        if swapped:
            return computing(kept[outer.merged_adapters[-1]])
        own = outer.disable_adapters or outer.merged or not outer.active_adapters
        return computing(outer.base_layer if own else kept[outer.active_adapters[0]])
    return module


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside an adapter's wrappers: what says how wide it is, not what computes."""
    inner: Any = module
    while True:
        held = getattr(inner, "_modules", {})
        found = held.get("base_layer", held.get("original_module"))
        if found is None:
            return inner
        inner = found


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """The tensors of a module and of all its parts in memory inside the block, where they are offloaded."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(_fetched(part))
        yield


@contextlib.contextmanager
def _fetched(module: nn.Module) -> Iterator[None]:
    """The module's own tensors in memory. Where they are already (inside its forward, say) nothing is touched."""
    missing = any(
        value is not None and value.is_meta for value in (*module._parameters.values(), *module._buffers.values())
    )
    hooks = [hook for hook in _hooks(module) if getattr(hook, "offload", False)] if missing else []
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, torch.empty(0))


def _hooks(module: nn.Module) -> list[Any]:
    """What accelerate put on a module: one hook, or a sequence of them."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def _features(module: nn.Module) -> int:
    width = getattr(module, "in_features", None)
    if width is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not say how many features it reads (in_features), so its weight cannot be measured."
        )
    return int(width)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes as ``kind`` does, with a weight that is stored as the numbers it stands for."""
    if type(module).forward is not kind.forward:
        return False
    if is_replaced(module) and not _hooks(module):
        return False
    weight: Any = module._parameters.get("weight")
    if weight is None:
        with _still(module):
            weight = getattr(module, "weight", None)
    return type(weight) in (nn.Parameter, Tensor) and _is_number(weight)


def is_replaced(module: nn.Module) -> bool:
    """Whether a module's own forward was replaced; nnsight's controllers call the one they stand for."""
    forward = module.__dict__.get("forward")
    return forward is not None and not type(forward).__module__.startswith("nnsight.")


def _is_scaled_table(module: nn.Module) -> bool:
    """Whether this is an embedding whose rows are multiplied with a constant, and nothing else."""
    stored = type(getattr(module, "weight", None))
    return isinstance(module, nn.Embedding) and hasattr(module, "embed_scale") and stored in (nn.Parameter, Tensor)


def _is_number(weight: Any) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize >= 2 and not weight.is_quantized


def _held_by(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """``[d_out, d_in]`` and bias of a module whose weight can say its own value."""
    stored: Any = getattr(module, "weight", None)
    if type(module).forward is nn.Linear.forward and not is_replaced(module) and isinstance(stored, Tensor):
        quantised = type(stored) not in (nn.Parameter, Tensor) and hasattr(type(stored), "dequantize")
        return (stored.dequantize(), _optional(module, "bias")) if quantised else None
    if callable(stored) and callable(getattr(module, "bias", None)):
        # The quantised modules of torch.ao pack both, and answer by calls.
        value, bias = stored(), module.bias()  # type: ignore[operator]
        if isinstance(value, Tensor) and hasattr(value, "dequantize"):
            return value.dequantize(), bias
    return None


@contextlib.contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Nothing random inside the block, and nothing that moves on with each call; weights that hooks compute before a forward are up to date."""
    random = [part for part in module.modules() if part.training and type(part).__module__ in _RANDOM]
    for part in random:
        part.training = False
    try:
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__ in _OLD_REPARAMETRIZATIONS:
                hook(module, None)  # type: ignore[arg-type]
        yield
    finally:
        for part in random:
            part.training = True


@contextlib.contextmanager
def _measuring(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Nothing random inside the block; what goes wrong there is one clear error."""
    if device.type == "meta":
        raise UnsupportedModelError(
            f"{type(module).__name__} is on the meta device: there are no weights to measure. Load the model with weights (from_pretrained)."
        )
    try:
        with _still(module):
            yield
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(
            f"The weight of {type(module).__name__} could not be measured on {device}: {reason} Dequantise or merge it first."
        ) from error


@contextlib.contextmanager
def _without_biases(module: nn.Module) -> Iterator[None]:
    held = [(part, part._parameters["bias"]) for part in module.modules() if part._parameters.get("bias") is not None]
    for part, _ in held:
        part._parameters["bias"] = None
    try:
        yield
    finally:
        for part, bias in held:
            part._parameters["bias"] = bias
