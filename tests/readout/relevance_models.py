"""Tiny models of every family in float64, and a metric that every number of an output moves."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor

import circuitvision as cv
from tests.zoo import CASES, case, shared_model

TOWERS = [(entry.name, tower) for entry in CASES.values() for tower in entry.towers]


@cache
def model_of(name: str) -> cv.HookedModel:
    entry = case(name)
    processor = entry.processor() if entry.processor else None
    return cv.HookedModel(copy.deepcopy(shared_model(name)).double().eval(), processor)


@cache
def inputs_of(name: str, batch: int = 2, images: int = 1):
    return case(name).inputs(model_of(name).module, batch=batch, dtype=torch.float64, images_per_prompt=images)


def metric(logits: Tensor, inputs=None) -> Tensor:
    """A weighted mean of every number of an example's output."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(logits.shape[1:], generator=generator, dtype=torch.float64).to(logits)
    return (logits * weights).flatten(1).mean(1)
