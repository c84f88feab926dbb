"""The pointing game: does the most relevant place lie on the object that the answer is about?

One yes or no per example, read off the map's maximum, against masks of the object (``scene.masks`` and ``thing.mask`` of the scene generator).
Chance is what a place drawn at random would score, so a large object is no success. Where several places share the maximum, the example counts
the share of them that lies on the object. Papers grant the maximum some pixels beside the object (15 of Pascal's, 40 of COCO's): ``tolerance``,
which raises chance as well.

A map that points at the object is not thereby faithful (the model may answer from the background), nor the reverse; deletion curves ask the
other question.

Reference: Zhang et al. 2016 (arXiv 1608.00507).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.model.positions import warn_of_empty
from circuitvision.model.regions import OfPictures, Region
from circuitvision.provenance import with_provenance
from circuitvision.readout.relevance.result import Relevance
from circuitvision.results import Groups, Result
from circuitvision.statistics import wilson


@dataclass(frozen=True, eq=False)
class PointingGame(Result):
    """Hits, ``values`` ``[example]`` in 0 … 1; NaN where a map has no value. ``chance`` ``[example]`` is what a random place would score."""

    method: str = ""
    chance: Tensor = field(default_factory=lambda: torch.zeros(0))

    _per_example: ClassVar[dict[str, int]] = {"chance": -1}

    def highlights(self) -> dict[str, str]:
        """How often the maximum lies on the object, beside chance."""
        low, high = self.interval().tolist()
        return {
            "on the object": f"{self.rate:.1%} (95 %: {low:.1%} to {high:.1%})",
            "chance": f"{self.chance_rate:.1%}",
        }

    @property
    def counted(self) -> int:
        """How many examples have a hit or a miss."""
        return int((~self.values.isnan()).sum())

    @property
    def rate(self) -> float:
        """Share of the examples whose maximum lies on the object."""
        return float(self.mean())

    @property
    def chance_rate(self) -> float:
        """Share that random places would hit."""
        return float(self.chance[~self.values.isnan()].mean())

    def interval(
        self,
        level: float = 0.95,
        group: Groups = None,
        draws: int = 2000,
        seed: int = 0,
        *,
        quantity: str = "values",
    ) -> Tensor:
        """Low and high end of Wilson's interval of :attr:`rate`; with ``group``, or of another quantity, of a bootstrap as of every result."""
        if group is not None or quantity != "values":
            return super().interval(level, group, draws, seed, quantity=quantity)
        return wilson(self.mean(), self.counted, level)


@with_provenance
def pointing_game(
    relevance: Relevance,
    masks: Any,
    *,
    image: int | None = None,
    tile: int | None = None,
    overlap: float = 0.0,
    tolerance: float = 0.0,
) -> PointingGame:
    """Whether the most relevant patch or pixel of each example lies on its object.

    Args:
        relevance: a result over patches or pixels.
        masks: one mask ``[height width]`` per example, in any resolution that covers the whole picture: bool arrays or tensors; or a region of
            ``cv.regions.mask(…)`` or ``cv.regions.box(…, size=(height, width))``, in which an example may have none.
        image: which image of each example (None: its first).
        tile: which tile of it (None: the whole image).
        overlap: a patch lies on the object if more than this share of its pixels does; 0 is any pixel.
        tolerance: how many pixels of the mask beside the object still count as the object, in a straight line.

    Raises:
        InputError: not one mask per example, or an empty one; no patch of that image; shares or pixels that make no sense.
    """
    if not isinstance(relevance, Relevance):
        raise InputError(f"relevance is a Relevance with places in the image, not {type(relevance).__name__}.")
    if not 0 <= overlap < 1 or not 0 <= tolerance < math.inf:
        raise InputError(f"overlap={overlap} is a share from 0 to below 1, tolerance={tolerance} pixels from 0 on.")
    examples = sorted(relevance.examples)
    grids = [relevance.on_image(example, image, tile) for example in examples]
    drawn = _drawn(masks, len(examples), tolerance)
    hits, chances = [], []
    for example, grid, mask in zip(examples, grids, drawn, strict=True):
        if mask is None:
            hits.append(float("nan"))
            chances.append(float("nan"))
            continue
        on = _on_object(mask, (grid.shape[0], grid.shape[1]), relevance.extent(example, image, tile)) > overlap
        there = ~grid.isnan()
        best = there & (grid == grid[there].max()) if bool(there.any()) else there
        hits.append(float(on[best].double().mean()) if bool(best.any()) else float("nan"))
        chances.append(float(on[there].double().mean()) if bool(there.any()) else float("nan"))
    lost = sum(mask is None for mask in drawn)
    warn_of_empty({getattr(masks, "label", "masks"): lost}, len(hits))
    empty = sum(map(math.isnan, hits)) - lost
    if empty:
        warn(f"{empty} of {len(hits)} maps have no value anywhere; they are left out.")
    method = relevance.method + (f", within {tolerance:g} pixels" if tolerance else "")
    return PointingGame(
        values=torch.tensor(hits, dtype=torch.float64),
        axes={"example": list(range(len(hits)))},
        provenance={**relevance.provenance, "method": f"pointing game of {method}"},
        method=method,
        chance=torch.tensor(chances, dtype=torch.float64),
    )


def _drawn(masks: Any, examples: int, tolerance: float) -> list[Bool[Tensor, "height width"] | None]:
    """The mask of every example, None where a region is empty."""
    if not isinstance(masks, Region):
        return list(_checked_masks(masks, examples, tolerance))
    if not isinstance(masks, OfPictures):
        raise InputError(f"{masks!r} is no part of a picture; give cv.regions.mask(…) or cv.regions.box(…, size=…).")
    if masks.n_examples not in (None, examples):
        raise InputError(f"There are masks of {masks.n_examples} examples for {examples}; give one per example.")
    drawn = [masks.drawn(example) for example in range(examples)]
    return [None if mask is None or not mask.any() else _grown(mask, tolerance) for mask in drawn]


def _checked_masks(masks: Any, examples: int, tolerance: float) -> list[Bool[Tensor, "height width"]]:
    """The masks as tensors, the object grown by the tolerance."""
    found = []
    for number, mask in enumerate(masks):
        array = np.asarray(mask)
        if array.ndim != 2 or array.dtype == object or not array.any():
            raise InputError(
                f"Mask {number} is [height width] with at least one pixel of the object, not {array.shape or type(mask).__name__} "
                "and empty. Give one mask per example."
            )
        found.append(_grown(torch.as_tensor(array).bool(), tolerance))
    if len(found) != examples:
        raise InputError(f"There are {len(found)} masks for {examples} examples; give one per example.")
    return found


def _grown(mask: Bool[Tensor, "height width"], by: float) -> Bool[Tensor, "height width"]:
    """The mask and all pixels whose middle is no farther than ``by`` from the middle of one of its pixels."""
    grown, height = mask.clone(), mask.shape[0]
    lines = mask.float()
    for down in range(-min(int(by), height - 1), min(int(by), height - 1) + 1):
        reach = math.isqrt(int(by**2 - down**2))
        beside = torch.nn.functional.max_pool1d(lines, 2 * reach + 1, stride=1, padding=reach) > 0
        grown[max(down, 0) : height - max(-down, 0)] |= beside[max(-down, 0) : height - max(down, 0)]
    return grown


def _on_object(
    mask: Bool[Tensor, "height width"], cells: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)
) -> Float[Tensor, "down across"]:
    """The share of each cell's pixels that are on the object; cells cover ``extent`` of the picture's height and width."""
    (down, across), (height, width) = (
        cells,
        (max(1, round(s * part)) for s, part in zip(mask.shape, extent, strict=True)),
    )
    # What lies past the last patch is in no cell.
    mask = mask[:height, :width]
    # Every pixel of the mask belongs to the cell that holds its middle, whatever the two resolutions are.
    rows = ((torch.arange(height) + 0.5) * down / height).long()
    columns = ((torch.arange(width) + 0.5) * across / width).long()
    cell = (rows[:, None] * across + columns[None]).flatten()
    total = torch.zeros(down * across, dtype=torch.float64).index_add(
        0, cell, torch.ones(len(cell), dtype=torch.float64)
    )
    inside = torch.zeros_like(total).index_add(0, cell, mask.flatten().double())
    return (inside / total.clamp_min(1)).view(down, across)
