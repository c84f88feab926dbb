"""The first stage of training on bound scenes: a vision tower learns what every patch of an object should know.

A linear head reads every patch of every object: its object's colour and shape, colour and shape of the nearest object on each of the four sides, and
how many others share its colour or its shape. What a patch cannot know (background, no neighbour on that side, no name) is left out of the loss: a
class "nothing there" would teach a model to see nothing in pairs it never saw. The head is thrown away when training ends.

Learned position embeddings start as waves over rows and columns, so that patches near each other start alike; they train on from there.

Reference: dense targets for patches beside the main loss, as in token labelling (Jiang et al. 2021, arXiv 2104.10858).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitvision.data import binding
from circuitvision.data.binding import COLORS, DIRECTIONS, GRID, SHAPES, Scene
from circuitvision.data.scenes import UNNAMED

IGNORED = -100
PATCHES = GRID * GRID
OWN = 2
"""The first parts: the patch's own colour and shape."""
PARTS: tuple[int, ...] = (
    *(len(COLORS), len(SHAPES)) * (1 + len(DIRECTIONS)),
    binding.OBJECTS,
    binding.OBJECTS,
)
"""How many values each part of what a patch knows can take: own colour, own shape, the same of four neighbours, others alike in colour, in shape."""
OTHERS_WEIGHT = 0.3
REPEATS = 0.3
"""The share of scenes in which colours and shapes may occur twice."""
UNNAMED_RATE = 0.2
"""How often a colour, and a shape, is one without a name."""
_COLOR = {name: number for number, name in enumerate(COLORS)} | {UNNAMED: IGNORED}
_SHAPE = {name: number for number, name in enumerate(SHAPES)} | {UNNAMED: IGNORED}


class PatchHead(nn.Module):
    """Reads all parts off the vectors of patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(PARTS))

    def forward(self, features: Float[Tensor, "scene patch width"]) -> tuple[Float[Tensor, "scene patch value"], ...]:
        """The scores of every part."""
        return self.linear(self.norm(features)).split(PARTS, -1)


def patch_targets(scenes: Sequence[Scene]) -> Int[Tensor, "scene patch part"]:
    """What every patch of an object should know, as numbers; IGNORED where there is nothing to know."""
    found = np.full((len(scenes), PATCHES, len(PARTS)), IGNORED)
    for row, scene in zip(found, scenes, strict=True):
        for thing in scene.objects:
            known = [_COLOR[thing.color], _SHAPE[thing.shape]]
            for direction in DIRECTIONS:
                other = scene.neighbor(thing, direction)
                known += [IGNORED, IGNORED] if other is None else [_COLOR[other.color], _SHAPE[other.shape]]
            known += [_others(scene, "color", thing.color), _others(scene, "shape", thing.shape)]
            row[list(thing.patches)] = known
    return torch.from_numpy(found)


def _others(scene: Scene, attribute: str, value: str) -> int:
    return IGNORED if value == UNNAMED else len(scene.find(**{attribute: value})) - 1


def patch_loss(
    head: PatchHead,
    features: Float[Tensor, "scene patch width"],
    targets: Int[Tensor, "scene patch part"],
    others: float = OTHERS_WEIGHT,
) -> Float[Tensor, ""]:
    """The sum of the parts' cross-entropies; what is not the patch's own colour and shape counts ``others``."""
    total = features.new_zeros(())
    for part, scores in enumerate(head(features)):
        wanted = targets[..., part]
        weight = 1.0 if part < OWN else others
        if weight and (wanted != IGNORED).any():
            total = total + weight * nn.functional.cross_entropy(
                scores.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED
            )
    return total


def training_scenes(rng: np.random.Generator, count: int, **keywords: Any) -> list[Scene]:
    """Scenes of trained pairs, some with colours and shapes that occur twice, some with unnamed ones."""
    return [
        binding.sample_scene(rng, distinct=rng.random() >= REPEATS, unnamed=UNNAMED_RATE, **keywords)
        for _ in range(count)
    ]


@torch.no_grad()
def own_right(
    head: PatchHead, features: Callable[[Sequence[Scene]], Float[Tensor, "scene patch width"]], scenes: Sequence[Scene]
) -> float:
    """The share of objects' patches whose own colour and shape the head both reads right."""
    targets, scores = patch_targets(scenes), head(features(scenes))
    known = targets[..., 0] != IGNORED
    right = torch.stack([scores[part].argmax(-1) == targets[..., part] for part in range(OWN)]).all(0)
    return float(right[known].float().mean())


@torch.no_grad()
def place_positions(table: Float[Tensor, "position width"], size: float = 0.5) -> None:
    """Start position embeddings as waves over rows and columns: sin and cos of ``π k x / (2 · GRID)`` for ``k = 1, 2, …``, times ``size``.

    The rows of ``table`` are the patches in reading order, after those of other tokens.
    """
    half = table.shape[1] // 2
    angles = torch.arange(GRID).float()[:, None] * torch.pi * torch.arange(1, half // 2 + 1) / (2 * GRID)
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    waves = torch.cat([axis[:, None].expand(GRID, GRID, half), axis[None].expand(GRID, GRID, half)], -1)
    table[-PATCHES:] = waves.reshape(PATCHES, -1) * size
