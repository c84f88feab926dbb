"""The gradient of a metric at every recorded site of a run; the parameters' own ``.grad`` is never touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from circuitvision import metrics
from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.memory import owned

Metric = Callable[..., Tensor]


def with_gradients(
    cache: ActivationCache,
    metric: Metric,
    logits: Tensor,
    mapping: Mapping[str, Any],
    device: torch.device | str | None,
) -> ActivationCache:
    """The cache with the gradient of the summed metric at every site under ``name + "_grad"``, all detached."""
    with torch.enable_grad():
        value = metrics.call(metric, logits, mapping)
        value = value.sum() if isinstance(value, Tensor) else value
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise InputError(
            "metric(logits) must be a tensor computed from the logits by differentiable operations; truth values and ranks are not."
        )
    names = [name for name in cache if cache[name].requires_grad]
    found = torch.autograd.grad(value, [cache[name] for name in names], allow_unused=True)
    values: dict[str, Any] = {name: owned(cache[name].detach()) for name in cache}
    for name, grad in zip(names, found, strict=True):
        values[f"{name}_grad"] = torch.zeros_like(values[name]) if grad is None else owned(grad.detach())
    out = ActivationCache(values, cache.model, cache.inputs, cache.has_batch_dim)
    return out if device is None else out.to(device)
