"""The settings of one run: what its call says, or else what the configuration says.

transformers lets a call override some settings of the configuration (``vision_feature_layer``, ``vision_feature_select_strategy``,
``vision_aspect_ratio``). Whatever depends on one of them asks :func:`setting` with the inputs of the run, never the configuration alone; without
inputs the answer is that of a run that leaves the setting to the configuration. Settings given as keywords of a call become part of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitvision.errors import InputError


def setting(model: Any, inputs: Mapping[str, Any] | None, name: str) -> Any:
    """A setting of a run of ``model`` (anything with a ``config``) with ``inputs``; None where neither knows it."""
    value = None if inputs is None else inputs.get(name)
    return getattr(model.config, name, None) if value is None else value


def entries(config: Any) -> dict[str, Any]:
    """What a configuration holds. Attributes of one, ``__dict__`` among them, take it microseconds each, and every run asks."""
    return object.__getattribute__(config, "__dict__")


def hidden_states(value: Any, count: int) -> list[int]:
    """The numbers of the hidden states that a feature layer (a number or several, negative ones from the end) names among ``count``.

    Raises:
        InputError: what is no number, or one that does not exist.
    """
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    whole = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    if not numbers or len(whole) < len(numbers) or not all(-count <= number < count for number in whole):
        raise InputError(
            f"vision_feature_layer={value!r} names no hidden states of this tower: it has {count}, from 0 (what enters block 0), or -1 (the last)."
        )
    return [number % count for number in whole]
