"""What differs between the two sides of pairs: which pixels, and which patches a model reads otherwise; the check of a minimal pair.

A semantic minimal pair is two pictures under one question that differ in one concept and nowhere else (NOTICE, Golovanevsky et al., arXiv
2406.16320). Whether
they do is a number here: a pixel *differs* if any of its channels differs by more than ``tolerance`` levels of 255, and what should have changed is
inside the boxes or masks of the two sides. :func:`minimal_pairs` refuses what is none.

Where texts differ is in :mod:`circuitvision.data.rewording`.

Not covered: pictures that differ by a shift or by compression alone (set ``tolerance``), videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image

from circuitvision.data.masking import levels_of, pictures_of, shares_of
from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Side
from circuitvision.errors import InputError

if TYPE_CHECKING:
    import pandas

    from circuitvision.model.regions import Region


@dataclass(frozen=True, eq=False)
class PictureDifferences:
    """Which pixels of the pictures of pairs differ.

    Attributes:
        pairs: the pairs.
        masks: per pair the pixels that differ, ``[height width]``.
        inside: per pair the share of those that lie inside the boxes or masks of either side; None where neither has any.
        image: which picture of each example.
    """

    pairs: Pairs
    masks: tuple[Bool[np.ndarray, "height width"], ...]
    inside: tuple[float, ...] | None
    image: int = 0

    @cached_property
    def share(self) -> tuple[float, ...]:
        """Per pair the share of all pixels that differ."""
        return tuple(float(mask.mean()) for mask in self.masks)

    @property
    def boxes(self) -> list[tuple[int, int, int, int] | None]:
        """Per pair the smallest box (left, top, right, bottom) around what differs."""
        return [_around(mask) for mask in self.masks]

    def region(self) -> Region:
        """What differs as a region: stands wherever positions are asked for, ``positions=differences.region()``."""
        from circuitvision import regions

        found = [mask if mask.any() else None for mask in self.masks]
        return regions.mask(found, size=[mask.shape for mask in self.masks], image=self.image).named("what differs")

    def to_frame(self) -> pandas.DataFrame:
        """One row per pair: the share of pixels that differ, the share of those inside, and the box around them."""
        import pandas as pd

        frame = pd.DataFrame({"example": list(self.pairs.numbers), "share": list(self.share), "box": self.boxes})
        if self.inside is not None:
            frame.insert(2, "inside", list(self.inside))
        return frame

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        inside = "" if self.inside is None else f", {np.nanmean(self.inside):.0%} of them inside"
        return f"PictureDifferences({len(self)} pairs: {np.mean(self.share):.1%} of the pixels differ{inside})"

    def _repr_html_(self) -> str:
        from circuitvision.data.showing import html

        sides = [self.pairs.clean, self.pairs.corrupt]
        drawn = [Image.fromarray(mask.astype(np.uint8) * np.uint8(255)) for mask in self.masks]
        return html([*sides, Side(drawn, name="what differs")])


def picture_differences(
    pairs: Pairs, *, masks: Any = None, corrupt_masks: Any = None, tolerance: int = 0, image: int = 0
) -> PictureDifferences:
    """Which pixels of the two pictures of every pair differ, and how many of them lie where the sides say the object is.

    Args:
        pairs: two pictures each, of one size.
        masks: where the difference should be in the clean picture, as of :func:`circuitvision.data.mask_images`; None: the side's own masks or boxes.
        corrupt_masks: likewise in the corrupt picture; None: the side's own, or else ``masks``.
        tolerance: levels (of 255) by which a channel may differ and count as equal.
        image: which picture of each example.

    Raises:
        InputError: pictures of two sizes, a pair without pictures; the message names the example.
    """
    before, after = (pictures_of(side, image) for side in (pairs.clean, pairs.corrupt))
    found = []
    for number, one, other in zip(pairs.numbers, before, after, strict=True):
        if one.size != other.size:
            raise InputError(
                f"The pictures of example {number} have two sizes ({one.width} × {one.height} and {other.width} × {other.height}), so their "
                f"pixels do not "
                "belong together: give both in one size."
            )
        first, second = (levels_of(each.convert("RGB")).astype(int) for each in (one, other))
        found.append((abs(first - second) > tolerance).any(-1))
    shares = [
        shares_of(side, own, pictures, image)
        for side, own, pictures in (
            (pairs.clean, masks, before),
            (pairs.corrupt, masks if corrupt_masks is None else corrupt_masks, after),
        )
        if own is not None or side.boxes is not None or side.masks is not None
    ]
    inside = None
    if shares:
        there = [np.any([share > 0 for share in each], 0) for each in zip(*shares, strict=True)]
        inside = tuple(
            float((mask & own).sum() / mask.sum()) if mask.any() else float("nan")
            for mask, own in zip(found, there, strict=True)
        )
    return PictureDifferences(pairs, tuple(found), inside, image)


def minimal_pairs(
    images: Any,
    corrupt_images: Any,
    texts: Any = None,
    *,
    inside: float = 1.0,
    most: float = 1.0,
    tolerance: int = 0,
    **columns: Any,
) -> Pairs:
    """Pairs of pictures that differ in one thing alone, checked.

    Args:
        images, corrupt_images: the two lists of pictures.
        texts: the question that both are asked.
        inside: at least this share of the pixels that differ must lie inside the boxes or masks (of either side), where there are any.
        most: at most this share of a picture's pixels may differ.
        tolerance: levels (of 255) by which a channel may differ and count as equal.
        columns: further columns of :class:`~circuitvision.data.Pairs`: answers, foils, boxes, corrupt_boxes, masks, …

    Raises:
        InputError: a pair of equal pictures or of two sizes, one that differs elsewhere or in too much; the message names the example. Bounds outside
            0 … 1.
    """
    for name, bound in (("inside", inside), ("most", most)):
        if not 0 <= bound <= 1:
            raise InputError(f"{name}={bound!r} is not understood: a share 0 … 1.")
    pairs = Pairs(images, texts, corrupt_images=corrupt_images, **columns)
    found = picture_differences(pairs, tolerance=tolerance)
    for row, number in enumerate(pairs.numbers):
        if not found.masks[row].any():
            raise InputError(f"The two pictures of example {number} are the same: a minimal pair differs in one thing.")
        if found.share[row] > most:
            raise InputError(
                f"The pictures of example {number} differ in {found.share[row]:.1%} of their pixels, more than most={most:g} allows: an edit that "
                "changes as much changes more than one thing."
            )
        if found.inside is not None and found.inside[row] < inside:
            raise InputError(
                f"{1 - found.inside[row]:.1%} of the pixels in which the pictures of example {number} differ lie outside its boxes or "
                f"masks: give the box of "
                f"all that was edited, or allow it with inside={np.floor(100 * found.inside[row]) / 100:g}."
            )
    return pairs


def changed_patches(model: Any, pairs: Pairs, *, image: int = 0, tower: str = "vision") -> list[list[int]]:
    """Per pair the patches whose embedding differs between the two runs, numbered in reading order over the picture (tile by tile).

    This is what the model is given, after its processor: where that resizes, an edit of one patch touches its neighbours by interpolation, and it
    shows here.

    Raises:
        InputError: a tower that does not read pictures, sides that give other numbers of patches.
    """
    if tower not in model.towers:
        raise InputError(f"This model has no tower {tower!r}; it has {', '.join(model.towers)}.")
    found: list[list[int]] = []
    site = f"{tower}.hook_input"
    for batch in pairs.batches(model, align=None):
        tokens, twin = (model.tokens(each)[tower] for each in (batch.inputs, batch.other))
        if tokens.kind.shape != twin.kind.shape or (tokens.kind != twin.kind).any():
            raise InputError(
                f"The sides of examples {batch.examples} give other numbers of patches: use pictures of one size."
            )
        with torch.no_grad():
            one, other = (
                model.run_with_cache(each, names_filter=[site])[1][site] for each in (batch.inputs, batch.other)
            )
        differ = (one != other).any(-1).cpu().numpy()
        there = (tokens.kind == "patch") & (tokens.image_number == image)
        for example in range(len(batch)):
            rows = tokens.example == example
            found.append(np.flatnonzero(differ[rows][there[rows]]).tolist())
    return found


def _around(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
