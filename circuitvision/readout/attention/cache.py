"""Finding the patterns of one tower in a cache: which tower, which layers, which pass, and what its keys are.

Caches hold one pass per tower, or several (``generate``, ``sample_actions``), and either all positions or, of a decoding pass, the newest alone.
Layers of one decoding pass may see different numbers of keys (full and sliding attention in turn): the keys are those of the layer that sees most.

Not covered: passes of beam search, and several batches recorded in one cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.positions import GENERATED
from circuitvision.model.sites import SiteName
from circuitvision.model.tokens import TokenMap
from circuitvision.readout.attention.patterns import PROBE, KeyBlock, Patterns
from circuitvision.readout.over_data import side_of
from circuitvision.readout.recorded import check_hooked


def patterns_in(model: Any, cache: Any, tower: str | None) -> ActivationCache:
    """The cache given, or that of a run of the inputs given, which records patterns (of one tower, or of all) and nothing else.

    Raises:
        InputError: no hooked model, a tower that it lacks, a cache of another model, a data set.
    """
    check_hooked(model)
    if tower is not None and tower not in model.towers:
        raise InputError(f"This model has no tower {tower!r}; its towers are {', '.join(model.towers)}.")
    if isinstance(cache, ActivationCache):
        if cache.model is None:
            return ActivationCache(dict(cache), model, cache.inputs, cache.has_batch_dim)
        if cache.model.module is not model.module:
            raise InputError("The cache is of another model than the one given; record it with this model.")
        return cache
    if side_of(cache) is not None:
        raise InputError(
            "Attention is read of one run: give the inputs of a batch (data.batches(model)), or its cache."
        )
    with torch.no_grad():
        names = [name for name in model.sites("**.hook_pattern") if tower in (None, SiteName.parse(name).tower)]
        return model.run_with_cache(cache, names_filter=names)[1]


def read(
    model: Any,
    cache: Any,
    tokens: Mapping[str, TokenMap] | TokenMap | None = None,
    tower: str | None = None,
    layers: Any = None,
    step: int | None = None,
) -> Patterns:
    """The patterns of one tower that a cache holds, or that a run of inputs has.

    ``tower`` None: the last tower of the model with patterns in the cache whose keys include image patches, or else the last with patterns.
    ``layers`` None: those in the cache that can reach the output; "pool" is the attention pool of a tower that has one.
    ``step`` chooses a pass of a cache that recorded ``generate`` or ``sample_actions``.

    Raises InputError, naming the ``names_filter`` to run with, if the patterns are not there.
    """
    tower = tokens.tower if tower is None and isinstance(tokens, TokenMap) else tower
    cache = patterns_in(model, cache, tower)
    maps = _maps(cache, tokens)
    there = [name for name in cache if SiteName.parse(name).site in ("attn.hook_pattern", "pool.attn.hook_pattern")]
    wanted = [name for name in cache.model.towers if tower in (None, name)]
    found = [name for name in wanted if any(SiteName.parse(site).tower == name for site in there)]
    if not found:
        glob = f"{tower or '*'}.blocks.*.attn.hook_pattern"
        raise InputError(f"The cache holds no attention patterns{f' of the {tower} tower' if tower else ''}; "
                         f"run with names_filter={glob!r}.")  # fmt: skip
    chosen_tower = next((name for name in reversed(found) if _sees_patches(cache.model, maps, name)), found[-1])
    return _of_tower(cache, maps, chosen_tower, there, layers, step)


def _sees_patches(model: Any, maps: Mapping[str, TokenMap], tower: str) -> bool:
    """Whether image patches are among the keys of a tower: its own positions, or those of a prefix that it reads."""
    prefix = [name for name, other in model.towers.items() if other.feeds_cache]
    seen = [tower] if model.towers[tower].stack.image else [tower, *prefix]
    return any(name in maps and (maps[name].kind == "patch").any() for name in seen)


def _maps(cache: Any, tokens: Mapping[str, TokenMap] | TokenMap | None) -> dict[str, TokenMap]:
    maps = cache.model.tokens(cache.inputs) if cache.inputs else {}
    if tokens is None:
        if not maps:
            raise InputError("This cache does not know its inputs; pass tokens=model.tokens(inputs).")
        return maps
    if isinstance(tokens, TokenMap):
        return {**maps, tokens.tower: tokens}
    if isinstance(tokens, Mapping) and all(isinstance(one, TokenMap) for one in tokens.values()):
        return {**maps, **tokens}
    raise InputError(f"tokens is model.tokens(inputs) or one TokenMap of it, not {type(tokens).__name__}.")


def _of_tower(
    cache: Any, maps: Mapping[str, TokenMap], tower: str, there: Sequence[str], layers: Any, step: int | None
) -> Patterns:
    if tower not in maps:
        raise InputError(f"tokens says nothing of the {tower} tower; pass tokens=model.tokens(inputs).")
    sites = _sites(cache.model, cache.inputs, tower, there, layers)
    passes = [_passes(cache, name) for name in sites.values()]
    number = _pass_number(passes[0], step, tower)
    values = [of_layer[number] for of_layer in passes]
    n_keys = max(value.shape[-1] for value in values)
    longest = next(of_layer for of_layer in passes if of_layer[number].shape[-1] == n_keys)
    kinds, blocks = _layout(cache.model, maps, tower, longest[: number + 1], pool="pool" in sites)
    return Patterns(
        model=cache.model,
        inputs=cache.inputs,
        tower=tower,
        layers=list(sites),
        sites=list(sites.values()),
        values=[_with_all_keys(value, n_keys) for value in values],
        own=maps[tower],
        query_kind=kinds,
        blocks=blocks,
        n_passes=len(passes[0]),
    )


def _with_all_keys(pattern: Tensor, n_keys: int) -> Tensor:
    """A layer's pattern over the keys of the layer that sees most: one that slides a window has dropped the first, and gives them nothing."""
    return torch.nn.functional.pad(pattern, (n_keys - pattern.shape[-1], 0))


def _sites(model: Any, inputs: Mapping[str, Any], tower: str, there: Sequence[str], layers: Any) -> dict[Any, str]:
    """The layers that are read and their sites."""
    pool = f"{tower}.pool.attn.hook_pattern"
    if isinstance(layers, str):
        if layers != "pool" or pool not in model.sites():
            raise InputError(
                f"layers={layers!r} is not understood: numbers of layers, or 'pool' where a tower has one."
            )
        if pool not in there:
            raise InputError(f"The cache holds no pattern of the pool; run with names_filter={pool!r}.")
        return {"pool": pool}
    in_cache = {}
    for name in there:
        layer = SiteName.parse(name).layer
        if SiteName.parse(name).tower == tower and layer is not None:
            in_cache[layer] = name
    glob = f"{tower}.blocks.*.attn.hook_pattern"
    if not in_cache:
        raise InputError(f"The cache holds the pool's pattern of the {tower} tower alone; pass layers='pool', or run "
                         f"with names_filter={glob!r}.")  # fmt: skip
    if layers is None:
        live = {layer: name for layer, name in sorted(in_cache.items()) if not model.is_dead(name, inputs)}
        return live or dict(sorted(in_cache.items()))
    count = model.towers[tower].cfg.n_layers
    listed = list(layers) if isinstance(layers, Iterable) else [layers]
    if not listed or any(not _is_whole(n) or not -count <= n < count for n in listed):
        raise InputError(f"layers={layers!r} is not understood: the {tower} tower has layers 0 to {count - 1}.")
    numbers = [int(layer) % count for layer in listed]
    missing = [layer for layer in numbers if layer not in in_cache]
    if missing:
        raise InputError(f"The cache holds no pattern of layer {missing[0]} of the {tower} tower; run with "
                         f"names_filter={glob!r}.")  # fmt: skip
    return {layer: in_cache[layer] for layer in dict.fromkeys(numbers)}


def _passes(cache: Any, name: str) -> list[Tensor]:
    value = cache[name]
    if isinstance(value, list):
        return value
    if not cache.has_batch_dim and value.ndim == 3:
        return [value[None]]
    return list(value) if value.ndim == 5 else [value]


def _pass_number(passes: Sequence[Tensor], step: int | None, tower: str) -> int:
    if step is None and len(passes) > 1:
        raise InputError(
            f"The cache holds {len(passes)} passes of the {tower} tower; choose one with step=0 (the first) to "
            f"step={len(passes) - 1}."
        )
    number = 0 if step is None else step
    if not _is_whole(number) or not -len(passes) <= number < len(passes):
        raise InputError(f"step={step!r} is outside the {len(passes)} passes of the {tower} tower in this cache.")
    return int(number) % len(passes)


def _is_whole(number: Any) -> bool:
    """Whether something is a whole number of any kind, and no truth value."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _layout(
    model: Any, maps: Mapping[str, TokenMap], tower: str, passes: Sequence[Tensor], pool: bool
) -> tuple[np.ndarray, tuple[KeyBlock, ...]]:
    """The kind of every query, and what the keys are, of the last of these passes."""
    own = maps[tower]
    rows, _, n_queries, n_keys = passes[-1].shape
    length = own.n_positions
    if rows != own.n_rows:
        raise InputError(f"The pattern has {rows} rows, the token map of the {tower} tower {own.n_rows}: tokens is of "
                         "another run.")  # fmt: skip
    if pool:
        return np.full((rows, 1), PROBE), (KeyBlock(tower, own, 0, 0, length),)
    if n_queries == length:
        before = n_keys - length
        if before == 0:
            return own.kind, (KeyBlock(tower, own, 0, 0, length),)
        for name, other in model.towers.items():
            if other.feeds_cache and name in maps and maps[name].n_positions == before:
                prefix = KeyBlock(name, maps[name], 0, 0, before)
                return own.kind, (prefix, KeyBlock(tower, own, before, 0, length))
    prompts = [number for number, one in enumerate(passes) if one.shape[-2] == length]
    if prompts and n_queries < length:
        seen = sum(one.shape[-2] for one in passes[prompts[-1] :])
        # A cache of a sliding window has dropped the first positions.
        first = seen - n_keys
        if 0 <= first <= length:
            prompt = KeyBlock(tower, own, 0, first, length - first)
            new = KeyBlock(tower, None, length - first, 0, seen - length)
            return np.full((rows, n_queries), GENERATED, dtype="<U12"), (prompt, new)
    raise InputError(
        f"A pattern of {n_queries} queries and {n_keys} keys does not fit the {length} positions of the {tower} tower; "
        "pass the tokens of the inputs this cache was made from."
    )
