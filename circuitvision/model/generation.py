"""What a call of ``generate`` says of the run before it begins: how many passes it may have, and which cache it fills.

Not covered: continuous batching (``cache_implementation="paged"``), which runs many requests at once; edits of ``hook_rot_k`` where the cache keeps
other keys than attention gets (quantised, offloaded).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.axes import past_length
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.edits.binding import CompiledEdits


def setting(module: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """A setting of a generation: the call's own, or that of the configuration it uses."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    config = kwargs.get("generation_config") or getattr(module, "generation_config", None)
    return getattr(config, name, None)


def most_passes(module: Any, inputs: Mapping[str, Any], kwargs: Mapping[str, Any]) -> int | None:
    """The most passes of the language model: one for the prompt and one for every new token but the last; None where nothing says it."""
    new = setting(module, kwargs, "max_new_tokens")
    if new is not None:
        return int(new)
    length, ids = setting(module, kwargs, "max_length"), inputs.get("input_ids")
    if length is None or not isinstance(ids, Tensor):
        return None
    explicit = kwargs.get("max_length") is not None or kwargs.get("generation_config") is not None
    # What was not asked for may be a default that counts new tokens alone.
    return max(int(length) - ids.shape[1], 1) if explicit else None


def described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs as token maps read them: ids without a mask cover the whole sequence here, what a cache holds included."""
    ids = inputs.get("input_ids")
    if inputs.get("past_key_values") is None or inputs.get("attention_mask") is not None or not isinstance(ids, Tensor):
        return dict(inputs)
    return {**inputs, "attention_mask": torch.ones_like(ids)}


def check_cache(inputs: Mapping[str, Any], kwargs: Mapping[str, Any], hooked: bool) -> None:
    """Raise InputError for a run whose passes cannot be told from one another."""
    if hooked and kwargs.get("cache_implementation") == "paged":
        raise InputError(
            "cache_implementation='paged' runs many requests in one batch, where neither hooks nor edits know theirs: leave it out."
        )


def check_edits(bound: CompiledEdits, inputs: Mapping[str, Any], kwargs: Mapping[str, Any], module: Any) -> None:
    """Raise InputError for edits that the cache of this generation would lose."""
    if bound.writes and kwargs.get("use_cache") is False:
        raise InputError("Edits count positions by the cache: leave use_cache on.")
    rotated = [site for site in bound.sites if SiteName.parse(site).stage == "hook_rot_k"]
    if not rotated:
        return
    past, name = inputs.get("past_key_values"), str(setting(module, kwargs, "cache_implementation") or "")
    separate = "quantized" in name or "offloaded" in name
    if past is not None:
        separate = bool(getattr(past, "offloading", False)) or any(
            hasattr(layer, "_quantized_keys") for layer in past.layers
        )
        name = type(past).__name__
    if separate:
        raise InputError(
            f"{rotated[0]} cannot be edited with the cache {name!r}, which keeps other keys than attention gets; edit hook_k, or use another cache."
        )


__all__ = ["check_cache", "check_edits", "described", "most_passes", "past_length", "setting"]
