"""Pictures of four patches of one pixel that hand-built networks look at, and the softmax of their closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

PATCHES = 4


def blank(count: int) -> Float[Tensor, "picture channel patch"]:
    """Pictures of zeros."""
    return torch.zeros(count, 3, PATCHES, dtype=torch.float64)


def as_pixels(pictures: Float[Tensor, "picture channel patch"]) -> Float[Tensor, "picture channel row column"]:
    """Pictures as models take them."""
    return pictures.reshape(len(pictures), 3, 2, 2)


def marked(moved: str) -> tuple[Float[Tensor, "picture channel patch"], Float[Tensor, "picture channel patch"]]:
    """Clean and corrupt pictures: a marked patch of colour +1 and another of −1, in every two places; marks in channel 0, colours in channel 1.

    ``moved`` is what the corrupt picture exchanges between the two: ``"mark"`` or ``"colour"``.
    """
    places = list(itertools.permutations(range(PATCHES), 2))
    clean = blank(len(places))
    for row, (first, second) in enumerate(places):
        clean[row, 0, first] = 1.0
        clean[row, 1, first], clean[row, 1, second] = 1.0, -1.0
    corrupt = clean.clone()
    channel = {"mark": 0, "colour": 1}[moved]
    for row, (first, second) in enumerate(places):
        corrupt[row, channel, [first, second]] = clean[row, channel, [second, first]]
    return clean, corrupt


def shares(scores: Sequence[float]) -> list[float]:
    """The softmax of a few scores."""
    sizes = [math.exp(score - max(scores)) for score in scores]
    return [size / sum(sizes) for size in sizes]


def pointed(beta: float) -> tuple[float, float]:
    """What a head gives to one of five tokens with a score ``beta`` above the others, ``e^β / (e^β + 4)``, and to each other one."""
    found = shares([beta, 0.0, 0.0, 0.0, 0.0])
    return found[0], found[1]
