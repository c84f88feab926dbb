"""Checks of what goes into a model, before anything runs: each mistake gets one message that names the fix."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError, nearest
from circuitvision.model.axes import new_positions, past_length
from circuitvision.model.cache import ActivationCache
from circuitvision.model.packing import ImageRun, laid_out

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped


def as_mapping(model: Wrapped, inputs: Any) -> dict[str, Any]:
    """The inputs as keyword arguments of the model; a single tensor or array is taken as images where the model reads nothing else.

    Prompts name every position that the model computes (:meth:`Packing.laid_out`).
    Arrays become tensors on the model's device, floats in its dtype; tensors stay as they are.
    """
    if isinstance(inputs, (Tensor, np.ndarray)):
        if not all(tower.stack.image for tower in model.towers.values()):
            raise InputError(
                f"A {model.family.name} model needs a mapping of tensors (model.inputs(images=…, text=…) makes one), not one tensor."
            )
        return {"pixel_values": as_tensor(model, "pixel_values", inputs)}
    refuse_cache(inputs)
    if hasattr(inputs, "batches"):
        raise InputError(
            f"This takes the inputs of a run, not a whole data set ({type(inputs).__name__}): give those of its batches, "
            "for batch in data.batches(model): … batch.inputs."
        )
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"Inputs must be a mapping of tensors, got {type(inputs).__name__}; model.inputs(images=…, text=…) makes one."
        )
    return laid_out(model, {name: as_tensor(model, name, value) for name, value in inputs.items()})


def as_tensor(model: Wrapped, name: str, value: Any) -> Any:
    """An array as a tensor for this model; anything else as it is. Raises InputError for lists of numbers or tensors among the inputs."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise InputError(f"{name} is an array of {value.dtype}; give numbers, one array for all examples.")
        tensor = torch.from_numpy(value.copy())
        return tensor.to(model.device, model.dtype) if tensor.is_floating_point() else tensor.to(model.device)
    if isinstance(value, (list, tuple)) and name in _TENSORS:
        raise InputError(
            f"{name} is a {type(value).__name__}; give one tensor or array for all examples (return_tensors='pt')."
        )
    return value


_TENSORS = frozenset(
    (
        "pixel_values",
        "input_ids",
        "attention_mask",
        "position_ids",
        "inputs_embeds",
        "pixel_attention_mask",
        "image_sizes",
        "spatial_shapes",
    )
)


def with_keywords(inputs: Mapping[str, Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with those given as keywords of the call; raises InputError for what is given both ways."""
    twice = sorted(inputs.keys() & keywords.keys())
    if twice:
        raise InputError(f"{twice[0]} is among the inputs and a keyword of the call: give it once.")
    return {**inputs, **keywords}


def split_keywords(model: Wrapped, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of ``generate`` or ``sample_actions``: those that the forward pass reads, and the others."""
    known = _named_inputs(_reading_classes(model))
    named = {name: value for name, value in keywords.items() if name in known}
    return named, {name: value for name, value in keywords.items() if name not in known}


def refuse_cache(inputs: Any) -> None:
    """Raise InputError for a cache where inputs are wanted: both are mappings of tensors."""
    if isinstance(inputs, ActivationCache):
        raise InputError("This is a cache, and inputs are wanted; those of its run are cache.inputs.")


def check(model: Wrapped, inputs: Mapping[str, Any]) -> None:
    """Raise InputError if these inputs cannot be what the model reads."""
    missing = [name for name in model.family.required if inputs.get(name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} missing: the model would draw them at random, and no two runs could be compared. "
            "model.inputs(…, seed=0) fills them."
        )
    lacking = [name for name in ("pixel_values", "input_ids") if inputs.get(name) is None] if model.is_dual else []
    if len(lacking) == 1:
        raise InputError(
            f"{lacking[0]} is missing: a {model.family.name} model compares images with texts, so a run takes both: model.inputs(images=…, text=…)."
        )
    if not any(isinstance(value, Tensor) for value in inputs.values()):
        raise InputError("The inputs hold no tensor; model.inputs(images=…, text=…) makes them.")
    check_keywords(model, inputs)
    _check_settings(model, inputs)
    _check_devices(model, inputs)
    _check_mask(model, inputs)
    _check_lengths(model, inputs)
    # What a cache holds was checked when it was filled.
    run = ImageRun(model, new_positions(inputs))
    if run.pixels is not None:
        run.packing.check(run)
    _check_image_tokens(model, run)


def check_keywords(model: Wrapped, keywords: Mapping[str, Any]) -> None:
    """Raise InputError for a keyword that nothing in the model reads, or that takes the names off its output."""
    check_names(model, keywords)
    if keywords.get("return_dict") is False:
        raise InputError(
            "return_dict=False returns a tuple without names; leave it out: the wrapper returns the output tensor."
        )


EVERYWHERE = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
"""Keywords that transformers takes from any call, whatever the signature says."""


def check_names(model: Wrapped, names: Iterable[str]) -> None:
    """Raise InputError for a keyword that nothing in the model reads: transformers would swallow it in silence."""
    known = _named_inputs(_reading_classes(model))
    for name in names:
        if name not in known and name not in _made_by(model.processor):
            near = ", ".join(nearest(name, known))
            raise InputError(f"Nothing in this model reads {name!r}. Nearest: {near}.")


def _reading_classes(model: Wrapped) -> tuple[type, ...]:
    reading = {type(part) for part in model.module.modules() if hasattr(part, "main_input_name")}
    return tuple({*reading, type(model._base)})


@lru_cache(maxsize=256)
def _named_inputs(classes: tuple[type, ...]) -> frozenset[str]:
    found = set(EVERYWHERE)
    for cls in classes:
        for method in (getattr(cls, "forward", None), getattr(cls, "get_image_features", None)):
            if method is not None:
                parameters = inspect.signature(method).parameters.values()
                found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return frozenset(found - {"self"})


def _made_by(processor: Any) -> set[str]:
    """What a processor makes, whether or not the model reads it."""
    parts = (processor, *(getattr(processor, name, None) for name in ("tokenizer", "image_processor")))
    return {name for part in parts for name in getattr(part, "model_input_names", None) or ()}


class Checked:
    """The inputs that passed :func:`check` last: sweeps run the same tensors again and again, and counting image tokens makes a GPU wait.

    The same inputs are the same tensor objects, unwritten since, and a model on the same device.
    """

    def __init__(self) -> None:
        # One assignment, so that another thread never sees half of it.
        self._kept: tuple[torch.device | None, dict[str, tuple[Any, Any]]] = (None, {})

    def __reduce__(self) -> tuple[type[Checked], tuple[()]]:
        # Another process, or a copy, has not seen these tensors.
        return Checked, ()

    def keep(self, model: Wrapped, inputs: Mapping[str, Any]) -> None:
        """Remember these inputs; only if every value shows whether it was changed since."""
        seen: dict[str, tuple[Any, Any]] = {}
        self._kept = None, {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and not value.is_inference():
                seen[name] = (weakref.ref(value), (value._version, value.shape))
            elif value is None or isinstance(value, (bool, int, float, str)):
                seen[name] = (None, value)
            else:
                return
        self._kept = model.device, seen

    def holds(self, model: Wrapped, inputs: Mapping[str, Any]) -> bool:
        """Whether these are the remembered inputs."""
        device, seen = self._kept
        if device is None or inputs.keys() != seen.keys():
            return False
        for name, value in inputs.items():
            tensor, state = seen[name]
            if tensor is None:
                if isinstance(value, Tensor) or value != state:
                    return False
            elif tensor() is not value or (value._version, value.shape) != state:
                return False
        return model.device == device


def _check_settings(model: Wrapped, inputs: Mapping[str, Any]) -> None:
    """Settings of the call that say which features leave a tower are ones that the projector can read."""
    for tower in model.towers.values():
        layers, select = tower.spec.feature_layers, tower.spec.feature_select
        if isinstance(layers, str) and inputs.get(layers) is not None:
            given, built = tower.feature_layers_in(inputs), tower.feature_layers_in()
            if len(given) != len(built):
                raise InputError(
                    f"{layers}={inputs[layers]!r} names {len(given)} hidden states, and the projector was built for {len(built)}."
                )
        if select is not None and inputs.get(select) not in (None, "default", "full"):
            raise InputError(f"{select}={inputs[select]!r} is not understood: 'default' (no class token) or 'full'.")


def bypassed_sites(model: Wrapped, inputs: Mapping[str, Any]) -> frozenset[str]:
    """Sites that these inputs leave out: with ``inputs_embeds`` no token is looked up. Raises InputError if one of them is asked for by name."""
    if inputs.get("inputs_embeds") is None or inputs.get("input_ids") is not None:
        return frozenset()
    sites = frozenset(f"{name}.hook_embed" for name, tower in model.towers.items() if not tower.stack.image)
    asked = sites & frozenset().union(*(one.exact for one in model.engine.stack))
    if asked:
        name = min(asked)
        raise InputError(f"{name} does not run: inputs_embeds takes its place. Take {name.removesuffix('embed')}input.")
    return sites


def _check_devices(model: Wrapped, inputs: Mapping[str, Any]) -> None:
    if hasattr(model.module, "hf_device_map"):
        return
    device = model.device
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.device != device:
            raise InputError(f"{name} is on {value.device}, the model on {device}; move it with .to('{device}').")


def _check_mask(model: Wrapped, inputs: Mapping[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    for name in ("input_ids", "inputs_embeds"):
        read = inputs.get(name)
        if isinstance(read, Tensor) and isinstance(mask, Tensor):
            _check_mask_of(model, inputs, name, read.shape[:2], mask)


def _check_mask_of(model: Wrapped, inputs: Mapping[str, Any], name: str, shape: tuple[int, ...], mask: Tensor) -> None:
    if mask.ndim == 4 and mask.dtype == torch.bool:
        _check_boolean(model)
    if mask.ndim != 2 or mask.shape == shape:
        return
    past = past_length(inputs)
    if mask.shape != (shape[0], past + shape[1]) or (past and past != _cached(inputs)):
        held = f" behind {_cached(inputs)} positions in past_key_values" if past else ""
        wanted = "it covers both" if past else "they must be equal"
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}, {name} {tuple(shape)}{held}; {wanted}.")


def _cached(inputs: Mapping[str, Any]) -> int:
    return int(inputs["past_key_values"].get_seq_length())


def _check_boolean(model: Wrapped) -> None:
    """Raise InputError where a boolean mask [row, head, query, key] would be added to scores as zeros and ones."""
    for tower in model.towers.values():
        implementation = getattr(tower.config, "_attn_implementation", None)
        if not tower.stack.image and implementation != "sdpa":
            raise InputError(
                f"A boolean attention_mask of four axes means 'may look' to sdpa alone; the {tower.name} tower runs {implementation!r} "
                "attention, which would add it as numbers. Give 0 where a query may look and the dtype's smallest number elsewhere."
            )


def _check_lengths(model: Wrapped, inputs: Mapping[str, Any]) -> None:
    """Texts fit the table of positions, where there is one."""
    ids = inputs.get("input_ids")
    for tower in model.towers.values():
        if tower.stack.position == "table" and isinstance(ids, Tensor):
            config: Any = tower.config
            room, length = int(config.max_position_embeddings), ids.shape[-1]
            if length > room:
                raise InputError(
                    f"The longest text takes {length} tokens, start and end included; the {tower.name} tower has room for {room}: shorten it."
                )


def _check_image_tokens(model: Wrapped, run: ImageRun) -> None:
    placeholders = run.placeholders
    if placeholders is None:
        return
    found = int(placeholders.sum())
    name = model.image_token or "the image token"
    if run.pixels is None:
        if found:
            raise InputError(f"The prompt holds {found} image tokens ({name}) but there are no pixel_values.")
    elif found == 0:
        raise InputError(f"There are images but no image token in the prompt: put {name} where each image belongs.")
    else:
        run.packing.check_tokens(run)


def drawn(model: Wrapped, inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The inputs with what the model would draw at random, drawn from ``seed``; as they are where it draws nothing, or all is given."""
    draw = model.family.drawn
    if draw is None or all(name in inputs for name in model.family.required):
        return dict(inputs)
    return {**draw(model.config, inputs, torch.Generator().manual_seed(seed)), **inputs}
