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
from circuitvision.model.cache import ActivationCache
from circuitvision.model.tokens import Packing

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel


def as_mapping(model: HookedModel, inputs: Any) -> dict[str, Any]:
    """The inputs as keyword arguments of the model; a single tensor or array is taken as images where the model reads nothing else.

    Arrays become tensors on the model's device, floats in its dtype; tensors stay as they are.
    """
    if isinstance(inputs, (Tensor, np.ndarray)):
        if list(model.towers) != ["vision"]:
            raise InputError(
                f"A {model.family.name} model needs a mapping of tensors (model.inputs(images=…, text=…) makes one), not one tensor."
            )
        return {"pixel_values": as_tensor(model, "pixel_values", inputs)}
    refuse_cache(inputs)
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"Inputs must be a mapping of tensors, got {type(inputs).__name__}; model.inputs(images=…, text=…) makes one."
        )
    return {name: as_tensor(model, name, value) for name, value in inputs.items()}


def as_tensor(model: HookedModel, name: str, value: Any) -> Any:
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


def refuse_cache(inputs: Any) -> None:
    """Raise InputError for a cache where inputs are wanted: both are mappings of tensors."""
    if isinstance(inputs, ActivationCache):
        raise InputError("This is a cache, and inputs are wanted; those of its run are cache.inputs.")


def check(model: HookedModel, inputs: Mapping[str, Any]) -> None:
    """Raise InputError if these inputs cannot be what the model reads."""
    missing = [name for name in model.family.required if inputs.get(name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} missing: the model would draw them at random, and no two runs could be compared. "
            "model.inputs(…, seed=0) fills them."
        )
    check_names(model, inputs)
    if inputs.get("return_dict") is False:
        raise InputError(
            "return_dict=False returns a tuple without names; leave it out: the wrapper returns the output tensor."
        )
    _check_devices(model, inputs)
    _check_mask(inputs)
    _check_lengths(model, inputs)
    pixels = inputs.get("pixel_values")
    if isinstance(pixels, Tensor):
        _check_images(model, inputs, pixels)
    if inputs.get("input_ids") is not None and model.image_token_id is not None:
        _check_image_tokens(model, inputs, pixels)


EVERYWHERE = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
"""Keywords that transformers takes from any call, whatever the signature says."""


def check_names(model: HookedModel, names: Iterable[str]) -> None:
    """Raise InputError for a keyword that nothing in the model reads: transformers would swallow it in silence."""
    known = _named_inputs(tuple({type(part) for part in model.module.modules() if hasattr(part, "main_input_name")}))
    for name in names:
        if name not in known and name not in _made_by(model.processor):
            near = ", ".join(nearest(name, known))
            raise InputError(f"Nothing in this model reads {name!r}. Nearest: {near}.")


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
        self._device: torch.device | None = None
        self._seen: dict[str, tuple[Any, Any]] = {}

    def __reduce__(self) -> tuple[type[Checked], tuple[()]]:
        # Another process, or a copy, has not seen these tensors.
        return Checked, ()

    def keep(self, model: HookedModel, inputs: Mapping[str, Any]) -> None:
        """Remember these inputs; only if every value shows whether it was changed since."""
        self._device, self._seen = None, {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and not value.is_inference():
                self._seen[name] = (weakref.ref(value), (value._version, value.shape))
            elif value is None or isinstance(value, (bool, int, float, str)):
                self._seen[name] = (None, value)
            else:
                return
        self._device = model.device

    def holds(self, model: HookedModel, inputs: Mapping[str, Any]) -> bool:
        """Whether these are the remembered inputs."""
        if self._device is None or inputs.keys() != self._seen.keys():
            return False
        for name, value in inputs.items():
            tensor, state = self._seen[name]
            if tensor is None:
                if isinstance(value, Tensor) or value != state:
                    return False
            elif tensor() is not value or (value._version, value.shape) != state:
                return False
        return model.device == self._device


def _check_devices(model: HookedModel, inputs: Mapping[str, Any]) -> None:
    if hasattr(model.module, "hf_device_map"):
        return
    device = model.device
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.device != device:
            raise InputError(f"{name} is on {value.device}, the model on {device}; move it with .to('{device}').")


def _check_mask(inputs: Mapping[str, Any]) -> None:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; they must be equal."
        )


def _check_lengths(model: HookedModel, inputs: Mapping[str, Any]) -> None:
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


def _check_images(model: HookedModel, inputs: Mapping[str, Any], pixels: Tensor) -> None:
    tower = next(tower for tower in model.towers.values() if tower.stack.image)
    if tower.stack.position == "resized":
        absent = [name for name in ("pixel_attention_mask", "spatial_shapes") if name not in inputs]
        if absent:
            raise InputError(
                f"This tower reads patches of any grid and needs {' and '.join(absent)} beside pixel_values."
            )
        return
    if pixels.ndim not in (4, 5):
        raise InputError(f"pixel_values must be [image, channel, height, width], got shape {tuple(pixels.shape)}.")
    config: Any = tower.config
    channels = getattr(config, "num_channels", 3)
    if pixels.shape[-3] != channels:
        raise InputError(
            f"pixel_values has {pixels.shape[-3]} channels, the model reads {channels}; its layout is [image, channel, height, width]."
        )
    height, width = pixels.shape[-2:]
    patch = tower.cfg.patch_size or 1
    if tower.stack.position == "grid_always" or inputs.get("interpolate_pos_encoding"):
        if height % patch or width % patch:
            raise InputError(
                f"An image of {height}x{width} pixels is not a whole number of patches of {patch}; resize it to multiples of {patch}."
            )
        return
    assert tower.cfg.grid is not None
    expected = (tower.cfg.grid[0] * patch, tower.cfg.grid[1] * patch)
    size = getattr(config, "image_size", expected)
    expected = (size, size) if isinstance(size, int) else tuple(size)
    if (height, width) != expected:
        free = model.family.image_layout == "single"
        hint = "resize it (model.inputs does)" + (", or pass interpolate_pos_encoding=True" if free else "")
        raise InputError(f"The image is {height}x{width} pixels, the model reads {expected[0]}x{expected[1]}: {hint}.")


def _check_image_tokens(model: HookedModel, inputs: Mapping[str, Any], pixels: Any) -> None:
    ids: Tensor = inputs["input_ids"]
    counts = ids.eq(model.image_token_id or 0).sum(-1)
    found = int(counts.sum())
    name = model.image_token or "the image token"
    if pixels is None:
        if found:
            raise InputError(f"The prompt holds {found} image tokens ({name}) but there are no pixel_values.")
        return
    if found == 0:
        raise InputError(f"There are images but no image token in the prompt: put {name} where each image belongs.")
    packing = Packing(model, inputs)
    if packing.layout == "cameras":
        return
    if packing.layout == "flat":
        expected = sum(len(order) for order, _ in (packing.order(image) for image in range(len(packing.tiles))))
    else:
        expected = sum(len(packing.order(image)[0]) for image in range(len(packing.tiles)))
    if found != expected:
        raise InputError(
            f"The prompts hold {found} image tokens, {len(packing.tiles)} image(s) make {expected}: "
            f"repeat {name} once per patch token (the processor does), and give as many images as the prompts name."
        )


def seeded_noise(model: HookedModel, inputs: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """The noise and timestep of one flow-matching evaluation at ``t = 1``, drawn from ``seed`` on the CPU so that every device agrees."""
    state: Tensor = inputs["state"]
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    shape = (state.shape[0], int(config.chunk_size), int(config.max_action_dim))
    noise = torch.randn(shape, generator=generator).to(model.device, state.dtype)
    return {"noise": noise, "timestep": torch.ones(state.shape[0], device=model.device)}
