"""Reading a cache the same way whatever recorded it: with a row axis, one pass at a time, and knowing whose rows they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.tokens import TokenMap


def recorded(cache: ActivationCache, name: str, step: int | None = None) -> Tensor:
    """A site of a cache as ``[row …]``, of one pass; see :meth:`ActivationCache.one_pass`."""
    return cache.one_pass(name, step)


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


def examples_of(cache: ActivationCache, tower: str, rows: int) -> tuple[Int[Tensor, " row"], int]:
    """Which example each row of a tower belongs to, and how many examples there are."""
    tokens = cache.model.tokens(cache.inputs).get(tower) if cache.model is not None and cache.inputs else None
    owners = torch.arange(rows) if tokens is None or tokens.n_rows != rows else torch.as_tensor(tokens.example)
    ids = cache.inputs.get("input_ids")
    dual = cache.model is not None and "text" in cache.model.towers
    count = int(owners.max()) + 1 if ids is None or dual else int(ids.shape[0])
    return owners, max(count, int(owners.max()) + 1)


def chosen_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    """Numbers of layers (negative ones count from the end); None: all ``count``.

    Raises:
        InputError: none, or one that does not exist.
    """
    if layers is None:
        return list(range(count))
    found = [int(layer) + count if layer < 0 else int(layer) for layer in layers]
    if not found or not all(0 <= layer < count for layer in found):
        raise InputError(f"layers={list(layers)} does not name layers of 0 to {count - 1}.")
    return found
