"""Reading a cache the same way whatever recorded it: with a row axis, and one pass at a time."""

from __future__ import annotations

from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.sites import SiteName


def recorded(cache: ActivationCache, name: str, step: int | None = None) -> Tensor:
    """A site of a cache as ``[row …]``, of one pass.

    Raises:
        InputError: the cache does not hold it, or holds several passes (``generate``, ``sample_actions``) and ``step`` does not say which.
    """
    if name not in cache:
        raise InputError(f"The cache does not hold {name}; add it to names_filter, or record all sites.")
    value = cache[name]
    ndim = (4 if SiteName.parse(name).has_heads else 3) - (not cache.has_batch_dim)
    if isinstance(value, list) or value.ndim == ndim + 1:
        if step is None:
            raise InputError("This cache holds several passes; say which with step=, counted from 0.")
        if not -len(value) <= step < len(value):
            raise InputError(f"There is no step {step}; this cache holds {len(value)} passes.")
        value = value[step]
    return value if cache.has_batch_dim else value[None]
