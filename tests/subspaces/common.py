"""Pairs of tiny models with random weights, of several families, for tests of subspaces."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import circuitvision as cv
from tests.sweeps.drawing import inputs_of, model_of
from tests.zoo import case

DOUBLE = torch.float64


@cache
def answers_of(name: str, seed: int, count: int, dtype: torch.dtype) -> list[int]:
    """What a tiny model answers to drawn inputs."""
    model = model_of(name, dtype)
    inputs = inputs_of(name, dtype, count, None, 1, seed)
    with torch.no_grad():
        rows = cv.metrics.at_position(model(inputs), "last", inputs)
    return rows.argmax(1).tolist()


def pairs_of(name: str, count: int = 4, dtype: torch.dtype = DOUBLE, **more: Any) -> tuple[Any, cv.data.Pairs]:
    """A tiny model, and pairs whose answers are what it gives on each side."""
    model = model_of(name, dtype)
    clean, corrupt = (inputs_of(name, dtype, count, None, 1, seed) for seed in (0, 1))
    if "answers" not in more:
        more |= {"answers": answers_of(name, 0, count, dtype), "foils": answers_of(name, 1, count, dtype)}
    if model.is_dual:
        texts = {key: value for key, value in clean.items() if key != "pixel_values"}
        clean, corrupt = (
            [{"pixel_values": one["pixel_values"][row : row + 1], **texts} for row in range(count)]
            for one in (clean, corrupt)
        )
    return model, cv.data.Pairs(inputs=clean, corrupt_inputs=corrupt, **more)


def acting(count: int = 4, dtype: torch.dtype = DOUBLE) -> tuple[Any, cv.data.Pairs]:
    """A tiny policy, and pairs without answers: what it does is a metric."""
    model = model_of("pi0", dtype)
    clean, corrupt = (inputs_of("pi0", dtype, count, None, 1, seed) for seed in (0, 1))
    return model, cv.data.Pairs(
        inputs=clean, corrupt_inputs={**corrupt, "noise": clean["noise"], "timestep": clean["timestep"]}
    )


__all__ = ["DOUBLE", "acting", "case", "pairs_of"]
