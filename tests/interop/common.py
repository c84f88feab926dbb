"""What the interop tests share: wrapped copies after a warm-up forward, the order of a pass, and edits of every kind of value."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import circuitvision as cv
from tests.zoo import CASES, shared_model

MAIN = ("vit", "clip", "llava-clip-llama", "pi0")
"""The families a view is tested on site by site; every other case is tested on one site of each kind."""


def wrapped(name: str, batch: int = 2, warm: bool = True) -> tuple[cv.HookedModel, dict[str, Any]]:
    """A fresh wrapped copy of a case (after one forward: transformers then has its own capture hooks in place) and inputs."""
    module = copy.deepcopy(shared_model(name)).eval()
    inputs = CASES[name].inputs(module, batch=batch)
    if warm:
        with torch.no_grad():
            module(**inputs)
    return cv.HookedModel(module), inputs


def pass_order(model: cv.HookedModel, inputs: dict[str, Any], sites: Sequence[str]) -> list[str]:
    """The sites in the order in which a forward pass meets them."""
    met: list[str] = []
    model.run_with_hooks(inputs, [(list(sites), lambda value, hook: met.append(hook.name))])
    assert sorted(met) == sorted(sites)
    return met


def host(nn: Any, site: str) -> tuple[Any, str]:
    """The envoy that carries a site, and the site's name on it."""
    prefix, _, last = site.rpartition(".")
    return nn.get(prefix), last


def adding(noise: Tensor) -> Any:
    """A hook that adds ``noise``."""
    return lambda value, hook: value + noise
