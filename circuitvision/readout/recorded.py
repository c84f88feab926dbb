"""Reading a cache the same way whatever recorded it: with a row axis, one pass at a time, and knowing whose rows they are."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.axes import past_length
from circuitvision.model.cache import ActivationCache
from circuitvision.model.sites import SiteName
from circuitvision.model.tokens import TokenMap
from circuitvision.model.tower import Tower
from circuitvision.model.wrapped import Wrapped


def chosen_tower(model: Wrapped, tower: str | None) -> Tower:
    """The tower named, or the one whose head gives the output.

    Raises:
        InputError: no wrapped model, no such tower.
    """
    check_hooked(model)
    name = model.flow.answer if tower is None else tower
    if name not in model.towers:
        raise InputError(f"This model has no tower {name!r}; its towers are {', '.join(model.towers)}.")
    return model.towers[name]


def check_hooked(model: Any) -> None:
    """Raises InputError for anything but a wrapped model."""
    if not hasattr(model, "towers"):
        raise InputError(f"Give a wrapped model, cv.HookedModel(module, processor), not a {type(model).__name__}.")


def inputs_of(source: Any) -> Mapping[str, Any]:
    """The inputs of a run, given its cache or the inputs themselves (a tensor of images says nothing beside them)."""
    if isinstance(source, ActivationCache):
        return source.inputs
    return source if isinstance(source, Mapping) else {}


def held_as(cache: ActivationCache, name: str) -> str | None:
    """The stored site that a site is, or is derived from; None if the cache holds neither. Nothing is computed."""
    stored, site = set(cache), SiteName.parse(name)
    if name in stored:
        return name
    if cache.model is None or not site.is_derived or name not in cache.model.engine.points:
        return None
    assert site.layer is not None
    source, _ = cache.model.towers[site.tower].blocks[site.layer].derived(site.site)
    return source if source in stored else None


def recorded(cache: ActivationCache, name: str, step: int | None = None) -> Tensor:
    """A site of a cache as ``[row …]``, of one pass; see :meth:`ActivationCache.one_pass`.

    ``step`` may be left out where a tower ran once in a recording of several passes, as vision towers do in ``generate``.
    """
    source = held_as(cache, name)
    if source is not None and source != name:
        # What is derived is computed when the cache is asked for it, so it is asked once.
        cache = ActivationCache({name: cache[name]}, cache.model, cache.inputs, cache.has_batch_dim)
    try:
        return cache.one_pass(name, step)
    except InputError:
        if step is not None or source is None or len(cache[name]) != 1:
            raise
        return cache.one_pass(name, 0)


def pass_number(cache: ActivationCache, name: str, step: int | None) -> int | None:
    """The pass of a site that ``step`` means (negative ones count from the end), counted from 0; None where it was recorded in a single pass."""
    if step is None:
        return None
    stored = held_as(cache, name) or name
    value = cache[stored]
    several = isinstance(value, list) or value.ndim == cache.one_pass(stored, step).ndim + int(cache.has_batch_dim)
    return step % len(value) if several else None


def tokens_of(cache: ActivationCache, tower: str) -> TokenMap:
    """The token map of one tower of the run.

    Raises:
        InputError: the cache does not know its model or its inputs, or the inputs do not run the tower.
    """
    if cache.model is None or not cache.inputs:
        raise InputError(
            "This cache does not know its model and inputs (as after record(), or load() without them), so it cannot say what its positions are; "
            "set cache.model and cache.inputs, or give the inputs themselves."
        )
    maps = cache.model.tokens(cache.inputs)
    if tower not in maps:
        raise InputError(f"These inputs do not run the {tower} tower.")
    return maps[tower]


def behind_cache(tower: Any, cache: ActivationCache, length: int) -> int:
    """How many positions of the tower come before the ``length`` that a run behind a cache (``past_key_values``) computed; 0 in any other run."""
    past = 0 if tower.stack.image or not cache.inputs else past_length(cache.inputs)
    return past if past and tokens_of(cache, tower.name).n_positions - past == length else 0


def real_queries(tower: Any, tokens: TokenMap) -> Bool[np.ndarray, "row pos"]:
    """The positions whose attention counts: no padding, but the last one where the family reads it whatever stands there (SigLIP's texts)."""
    real = tokens.present
    if tower.output_head.table.pool == "last":
        real[:, -1] = True
    return real


def examples_of(cache: ActivationCache, tower: str, rows: int) -> tuple[Int[Tensor, " row"], int]:
    """Which example each row of a tower belongs to, and how many examples there are."""
    tokens = cache.model.tokens(cache.inputs).get(tower) if cache.model is not None and cache.inputs else None
    examples = torch.arange(rows) if tokens is None or tokens.n_rows != rows else torch.as_tensor(tokens.example)
    ids = cache.inputs.get("input_ids", cache.inputs.get("inputs_embeds"))
    dual = cache.model is not None and cache.model.is_dual
    count = int(examples.max()) + 1 if ids is None or dual else int(ids.shape[0])
    return examples, max(count, int(examples.max()) + 1)


def chosen_layers(layers: int | Sequence[int] | None, count: int) -> list[int]:
    """Numbers of layers (one or several, negative ones count from the end); None: all ``count``.

    Raises:
        InputError: none, what is no number, or one that does not exist.
    """
    if layers is None:
        return list(range(count))
    try:
        requested = [layers] if hasattr(layers, "__index__") else list(layers)  # type: ignore[arg-type]
        found = [None if isinstance(layer, bool) else operator.index(layer) for layer in requested]
    except TypeError:
        found = []
    numbers = [layer + count if layer < 0 else layer for layer in found if layer is not None]
    if not numbers or len(numbers) < len(found) or not all(0 <= layer < count for layer in numbers):
        raise InputError(f"layers={layers!r} does not name layers of 0 to {count - 1}; give numbers, such as [0, -1].")
    return numbers
