"""Models, runs and hand-made parts that several tests of the read-outs share."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

import circuitvision as cv
from tests.zoo import CASES, case, shared_model

NAMES = [entry.name for entry in (CASES.values() if isinstance(CASES, dict) else CASES)]


@functools.lru_cache(maxsize=4)
def run(
    name: str, dtype: torch.dtype = torch.float32, everything: bool = False, batch: int = 2
) -> tuple[cv.HookedModel, Tensor, Any]:
    """A case's model, its output and the cache of one run. Do not change any of them."""
    entry = case(name)
    module = shared_model(name)
    module = module if dtype == torch.float32 else copy.deepcopy(module).to(dtype)
    model = cv.HookedModel(module, entry.processor() if entry.processor else None)
    inputs = entry.inputs(model.module, batch=batch, dtype=dtype)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, "**" if everything else None)
    return model, out, cache


def outputs_at(model: cv.HookedModel, tower: str, out: Tensor, inputs: Any) -> Tensor:
    """The model's output as ``[row n_out]`` of a tower: at the last word, the first action, or pooled; of CLIP's text tower by text."""
    if tower == "text":
        return out.T
    if out.ndim == 2:
        return out
    position = 0 if tower == "action" else torch.as_tensor(model.tokens(inputs)[tower].last())
    return out[torch.arange(len(out)), position]


def hooked(name: str) -> tuple[cv.HookedModel, Any]:
    """A case's model, wrapped with its processor, and the case."""
    entry = case(name)
    return cv.HookedModel(shared_model(name), entry.processor() if entry.processor else None), entry


def gaussians(count: int, classes: int, apart: float, features: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around one centre per class, ``apart`` from the origin and 1 wide, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, features, generator=generator)
    centres = apart * centres / centres.norm(dim=1, keepdim=True)
    return centres[labels] + torch.randn(count, features, generator=generator), labels
