"""The pointing game: does the most relevant place lie on the object that the answer is about?

One yes or no per example, read off the map's maximum, against masks of the object (``scene.masks`` and ``thing.mask`` of the scene generator).
Chance is what a place drawn at random would score, so a large object is no success. Where several places share the maximum, the example counts
the share of them that lies on the object.

A map that points at the object is not thereby faithful (the model may answer from the background), nor the reverse; deletion curves ask the
other question.

Reference: Zhang et al. 2016 (arXiv 1608.00507).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.readout.probes.fitting import wilson
from circuitvision.readout.relevance.gradients import Relevance
from circuitvision.results import Result


@dataclass(frozen=True, eq=False)
class PointingGame(Result):
    """Hits, ``values`` ``[example]`` in 0 … 1; NaN where a map has no value. ``chance`` ``[example]`` is what a random place would score."""

    method: str = ""
    chance: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def rate(self) -> float:
        """Share of the examples whose maximum lies on the object."""
        return float(self.values.nanmean())

    @property
    def chance_rate(self) -> float:
        """Share that random places would hit."""
        return float(self.chance[~self.values.isnan()].mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of :attr:`rate`, 95 %."""
        low, high = wilson(torch.tensor(self.rate), int((~self.values.isnan()).sum()))
        return float(low), float(high)


def pointing_game(
    relevance: Relevance, masks: Any, *, image: int | None = None, tile: int | None = None, overlap: float = 0.0
) -> PointingGame:
    """Whether the most relevant patch or pixel of each example lies on its object.

    Args:
        relevance: a result over patches or pixels.
        masks: one mask ``[height width]`` per example, in any resolution that covers the whole picture: bool arrays or tensors;
            :func:`box_mask` makes one of a box.
        image: which image of each example (None: its first).
        tile: which tile of it (None: the whole image).
        overlap: a patch lies on the object if more than this share of its pixels does; 0 is any pixel.

    Raises:
        InputError: not one mask per example, or an empty one; no patch of that image.
    """
    rows = _first_rows(relevance, image)
    masks = [torch.as_tensor(np.asarray(mask)).bool() for mask in masks]
    if len(masks) != len(rows):
        raise InputError(f"There are {len(masks)} masks for {len(rows)} examples; give one per example.")
    hits, chances = [], []
    for number, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        if mask.ndim != 2 or not bool(mask.any()):
            raise InputError(
                f"Mask {number} is [height width] with at least one pixel of the object, not {tuple(mask.shape)} and empty."
            )
        grid = relevance.on_image(row, image, tile)
        on = _on_object(mask, grid.shape[0], grid.shape[1]) > overlap
        there = ~grid.isnan()
        best = there & (grid == grid[there].max()) if bool(there.any()) else there
        hits.append(float(on[best].double().mean()) if bool(best.any()) else float("nan"))
        chances.append(float(on[there].double().mean()) if bool(there.any()) else float("nan"))
    empty = sum(map(math.isnan, hits))
    if empty:
        warnings.warn(f"{empty} of {len(hits)} maps have no value anywhere; they are left out.", stacklevel=2)
    return PointingGame(
        values=torch.tensor(hits, dtype=torch.float64),
        axes={"example": list(range(len(hits)))},
        provenance={**relevance.provenance, "method": f"pointing game of {relevance.method}"},
        method=relevance.method,
        chance=torch.tensor(chances, dtype=torch.float64),
    )


def box_mask(box: Sequence[float], size: tuple[int, int]) -> Bool[Tensor, "height width"]:
    """The pixels inside a box (left, top, right, bottom; right and bottom are one past the last pixel) of a picture of ``size`` (height, width)."""
    left, top, right, bottom = (round(edge) for edge in box)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    return mask


def _first_rows(relevance: Relevance, image: int | None) -> list[int]:
    """The row of each example that holds the image asked for."""
    rows: dict[int, int] = {}
    for row, example in enumerate(relevance.example):
        numbers = relevance.places[row, relevance.places[row, :, 2] >= 0, 0]
        if len(numbers) and (image is None or bool((numbers == image).any())):
            rows.setdefault(example, row)
    missing = sorted(set(relevance.example) - set(rows))
    if missing or not rows:
        raise InputError(f"Example {missing[0] if missing else 0} has no patch of image {image}.")
    return [rows[example] for example in sorted(rows)]


def _on_object(mask: Bool[Tensor, "height width"], down: int, across: int) -> Float[Tensor, "down across"]:
    """The share of each cell's pixels that are on the object."""
    height, width = mask.shape
    # Every pixel of the mask belongs to the cell that holds its middle, whatever the two resolutions are.
    rows = ((torch.arange(height) + 0.5) * down / height).long()
    columns = ((torch.arange(width) + 0.5) * across / width).long()
    cell = (rows[:, None] * across + columns[None]).flatten()
    total = torch.zeros(down * across, dtype=torch.float64).index_add(
        0, cell, torch.ones(len(cell), dtype=torch.float64)
    )
    inside = torch.zeros_like(total).index_add(0, cell, mask.flatten().double())
    return (inside / total.clamp_min(1)).view(down, across)
