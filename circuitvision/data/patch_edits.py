"""Patches of pictures replaced or exchanged, on the grid that a model cuts them into, in the pixels of the original pictures.

A patch is numbered in reading order over the picture that it is of (tile by tile where a model tiles it), as the positions of kind "patch" are; what
pixels it reads comes from :func:`circuitvision.boxes_in_pictures`, which follows the processor's resizing, padding and cropping. A pixel belongs to a
patch if its middle does. Where the processor resizes, interpolation carries a little of an edit into the patches beside it:
:func:`circuitvision.data.changed_patches` says into which.

Where a connector merges patches, a position behind it is a group of them: ``tower="language"`` masks or exchanges whole groups, whose box is that of
all their patches, and ``tower="vision"`` single patches.

Not covered: groups of patches that are no rectangle, processors without a known way back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from circuitvision.data.batches import inputs_of
from circuitvision.data.masking import baselines_of, edited, generator_of, levels_of, pictures_of
from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Side
from circuitvision.digests import of_array, of_json
from circuitvision.errors import InputError


def patch_boxes(side: Side, model: Any, *, image: int = 0, tower: str = "vision") -> list[Float[np.ndarray, "patch 4"]]:
    """Per example the pixels (left, top, right, bottom) of its picture that every patch reads; NaN for patches of padding.

    Raises:
        InputError: a model without a processor or without such a tower.
    """
    return [boxes for _, boxes in _grids(side, model, image, tower, None)]


def mask_patches(
    side: Side,
    model: Any,
    patches: Any = None,
    fill: Any = "mean",
    *,
    n: int | None = None,
    image: int = 0,
    tower: str = "vision",
    seed: int = 0,
    radius: float | None = None,
) -> Pairs:
    """Some patches of every picture replaced; with other pictures as ``fill`` they come from there, in the same place.

    Args:
        side: the data set.
        model: the hooked model, whose grid it is.
        patches: numbers for all examples, a list of numbers per example, or a region (:mod:`circuitvision.regions`); None: every patch.
        n: mask so many of them, drawn by the seed and by what each picture is, so not by its place in the data set (a control of equal size); of
            patches that read no pixel (padding) none is drawn. None: all of them.
        fill: what stands there, as of :func:`circuitvision.data.mask_images`.
        image: which picture of each example.
        tower: the tower that reads it.
        seed, radius: of the fill, and of the draw.

    Raises:
        InputError: patches that are not there or read no pixel, fewer than are to be drawn, and pictures in which nothing changes; the message names
            the example.
    """
    pictures = pictures_of(side, image)
    baselines = baselines_of(side, fill, pictures, image, seed, radius)
    made = []
    grids = _grids(side, model, image, tower, patches)
    for number, (chosen, boxes), picture, baseline in zip(side.numbers, grids, pictures, baselines, strict=True):
        levels = levels_of(picture).copy()
        for patch in chosen if n is None else _drawn(chosen, boxes, levels, n, seed, number):
            own = _pixels(boxes, patch, levels.shape, number)
            levels[own] = baseline[own].astype(np.uint8)
        made.append(levels)
    return edited(side, made, pictures, image, name="patches masked")


def swap_patches(side: Side, model: Any, one: Any, other: Any, *, image: int = 0, tower: str = "vision") -> Pairs:
    """Patches of every picture exchanged: the ``n``-th of ``one`` with the ``n``-th of ``other``.

    All pixels of a picture stay in it, so what a bag of patches could know is unchanged where the grid falls on whole pixels. Contents are scaled
    where two patches read other numbers of pixels.

    Args:
        one, other: a number, numbers for all examples, or a list of numbers per example; as many of each, none twice.

    Raises:
        InputError: patches that are not there or named twice, other numbers of them, and pictures in which nothing changes; the message names the
            example.
    """
    pictures = pictures_of(side, image)
    firsts, seconds = (_grids(side, model, image, tower, each) for each in (one, other))
    made = []
    for number, (here, boxes), (there, _), picture in zip(side.numbers, firsts, seconds, pictures, strict=True):
        if len(here) != len(there) or len({*here, *there}) != len(here) + len(there):
            raise InputError(
                f"In example {number} patches {here} and {there} cannot change places: give as many of each, and none twice."
            )
        levels, before = levels_of(picture).copy(), levels_of(picture)
        for first, second in zip(here, there, strict=True):
            places = [_pixels(boxes, patch, before.shape, number) for patch in (first, second)]
            for place, source in (places, places[::-1]):
                levels[place] = _scaled(before[source], before[place].shape)
        made.append(levels)
    return edited(side, made, pictures, image, name="patches exchanged")


def _drawn(
    chosen: Sequence[int], boxes: Float[np.ndarray, "patch 4"], levels: np.ndarray, n: int, seed: int, number: int
) -> list[int]:
    """``n`` of the chosen patches of one picture."""
    readable = [patch for patch in chosen if np.isfinite(boxes[patch]).all()]
    if isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= len(readable):
        raise InputError(f"n={n!r}: draw from 1 to {len(readable)} patches, which example {number} has to choose from.")
    # Not the stream that fills with noise.
    generator = generator_of(seed, of_json(["patches", of_array(levels)]))
    return sorted(int(patch) for patch in generator.choice(readable, n, replace=False))


def _scaled(levels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if levels.shape == shape:
        return levels
    grey = levels.shape[-1] == 1
    picture = Image.fromarray(levels[..., 0] if grey else levels).resize(
        (shape[1], shape[0]), Image.Resampling.BILINEAR
    )
    return levels_of(picture)


def _grids(
    side: Side, model: Any, image: int, tower: str, patches: Any
) -> list[tuple[list[int], Float[np.ndarray, "patch 4"]]]:
    """Per example the chosen patches (all, for None) and the pixels of every one."""
    from circuitvision import boxes_in_pictures

    if tower not in model.towers:
        raise InputError(f"This model has no tower {tower!r}; it has {', '.join(model.towers)}.")
    pictures = pictures_of(side, image)
    found: list[tuple[list[int], Float[np.ndarray, "patch 4"]]] = []
    known: dict[Any, tuple[np.ndarray, Any, np.ndarray]] = {}
    for row, (number, picture) in enumerate(zip(side.numbers, pictures, strict=True)):
        example = side.examples[row]
        alone = not isinstance(example.image, (list, tuple))
        # The grid hangs on the size of the picture alone.
        key = picture.size if alone else row
        if key not in known:
            shown = picture if alone else _shown(side, row)
            inputs = inputs_of(model, side[row])
            tokens = model.tokens(inputs)[tower]
            there = (tokens.kind == "patch") & (tokens.image_number == image)
            boxes = boxes_in_pictures(model, [shown] if alone else shown, inputs, tower=tower)[there]
            if not len(boxes):
                raise InputError(f"The {tower} tower reads no patch of picture {image} of example {number}.")
            known[key] = boxes, tokens, there
        boxes, tokens, there = known[key]
        found.append((_numbers(patches, row, len(side), number, boxes, tokens, there), boxes))
    return found


def _shown(side: Side, row: int) -> list[Image.Image]:
    count = len(side.examples[row].image)
    return [pictures_of(side[row], number)[0] for number in range(count)]


def _numbers(
    patches: Any, row: int, count: int, number: int, boxes: Float[np.ndarray, "patch 4"], tokens: Any, there: np.ndarray
) -> list[int]:
    """The patches asked for in one example."""
    if patches is None:
        return list(range(len(boxes)))
    if hasattr(patches, "where"):
        chosen = np.flatnonzero(patches.where(tokens, [row])[there]).tolist()
    else:
        listed: list[Any] = [patches] if isinstance(patches, (int, np.integer)) else list(patches)
        own: Any = listed
        if listed and not all(isinstance(one, (int, np.integer)) for one in listed):
            if len(listed) != count:
                raise InputError(
                    f"There are lists of patches for {len(listed)} of {count} examples; give one per example."
                )
            own = [listed[row]] if isinstance(listed[row], (int, np.integer)) else list(listed[row])
        chosen = [int(one) for one in own]
    outside = [one for one in chosen if not 0 <= one < len(boxes)]
    if outside:
        raise InputError(f"Example {number} has no patch {outside[0]}: its picture is cut into {len(boxes)}.")
    if not chosen:
        raise InputError(f"No patch is chosen in example {number}: leave it out, or say which.")
    return chosen


def _pixels(boxes: Float[np.ndarray, "patch 4"], patch: int, shape: Sequence[int], number: int) -> tuple[slice, slice]:
    """The pixels of a picture whose middle a patch reads."""
    if not np.isfinite(boxes[patch]).all():
        raise InputError(f"Patch {patch} of example {number} reads padding alone, so there is nothing to change.")
    left, top, right, bottom = (math.ceil(edge - 0.5 - 1e-9) for edge in boxes[patch])
    rows, columns = slice(max(0, top), min(bottom, shape[0])), slice(max(0, left), min(right, shape[1]))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        raise InputError(
            f"Patch {patch} of example {number} reads less than a pixel of its picture, which the processor makes larger: scale the picture up first."
        )
    return rows, columns
