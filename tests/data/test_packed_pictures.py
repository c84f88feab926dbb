"""Patches of pictures that a model tiles, and of the positions that its language tower reads: which pixels and which tokens an edit changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import circuitvision as cv
from circuitvision.data import Side
from tests.zoo import case, shared_model

TILED, WHOLE = "llava-next-mistral", "paligemma"


def shown(name: str) -> tuple[cv.HookedModel, Side]:
    one = case(name)
    model = cv.HookedModel(shared_model(name), one.processor() if one.processor else None)
    raw = one.raw(batch=2) if one.raw else {}
    images = [each[0] if isinstance(each, (list, tuple)) else each for each in raw["images"]]
    return model, Side(images, list(raw["text"]))


def inside(box: Any, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose middle lies in a box."""
    down, across = (np.arange(n) + 0.5 for n in size[::-1])
    left, top, right, bottom = box
    return ((down >= top) & (down < bottom))[:, None] & ((across >= left) & (across < right))[None]


@pytest.mark.parametrize("name", [TILED, WHOLE])
@pytest.mark.parametrize("tower", ["vision", "language"])
def test_exactly_the_pixels_of_a_patch_or_prompt_position_differ(name: str, tower: str) -> None:
    """Numbers count the positions of the tower that is named: patches tile by tile, or the image tokens of the prompt."""
    model, side = shown(name)
    (inputs,) = (batch.inputs for batch in side[:1].batches(model))
    tokens = model.tokens(inputs)[tower]
    size = side.examples[0].image.size
    every = cv.data.patch_boxes(side, model, tower=tower)[0]
    assert len(every) == int((tokens.kind[tokens.example == 0] == "patch").sum())
    readable = [number for number, box in enumerate(every) if np.isfinite(box).all()]
    for number in (readable[0], readable[len(readable) // 2], readable[-1]):
        pairs = cv.data.mask_patches(side, model, number, 0, tower=tower)
        differ = cv.data.picture_differences(pairs)
        assert np.array_equal(differ.masks[0], inside(every[number], size))
        # As a region the same pixels name the positions that read any of them, this one among them.
        marked = differ.region().where(tokens, [0])[tokens.kind == "patch"]
        left, top, right, bottom = differ.boxes[0] or (0, 0, 0, 0)
        meets = (every[:, 0] < right - 1e-6) & (every[:, 2] > left + 1e-6)
        meets &= (every[:, 1] < bottom - 1e-6) & (every[:, 3] > top + 1e-6)
        assert marked[number]
        assert marked.tolist() == meets.tolist()


def test_a_tile_is_seen_in_the_thumbnail_as_well() -> None:
    model, side = shown(TILED)
    (inputs,) = (batch.inputs for batch in side[:1].batches(model))
    tokens = model.tokens(inputs)["vision"]
    tiles = tokens.tile[tokens.kind == "patch"]
    boxes = cv.data.patch_boxes(side, model)[0]
    number = next(n for n in np.flatnonzero(tiles > 0) if np.isfinite(boxes[n]).all())
    changed = cv.data.changed_patches(model, cv.data.mask_patches(side, model, int(number), 0))[0]
    assert number in changed
    assert (tiles[changed] == 0).any()
    # Padding of a tile reads nothing, so nothing can be edited there.
    nothing = next(n for n in range(len(boxes)) if not np.isfinite(boxes[n]).all())
    assert nothing not in changed
    with pytest.raises(cv.InputError, match="padding"):
        cv.data.mask_patches(side, model, nothing, 0)


def test_tiles_that_change_places_keep_every_pixel() -> None:
    model, side = shown(TILED)
    boxes = cv.data.patch_boxes(side, model)[0]
    tall = [
        n for n, box in enumerate(boxes) if np.isfinite(box).all() and box[3] - box[1] == 8 and box[2] - box[0] == 8
    ]
    one = tall[0]
    other = next(n for n in tall[1:] if not (inside(boxes[n], (48, 26)) & inside(boxes[one], (48, 26))).any())
    pairs = cv.data.swap_patches(side, model, one, other)
    before, after = (np.asarray(part.examples[0].image) for part in (pairs.clean, pairs.corrupt))
    assert np.array_equal(np.sort(before.reshape(-1)), np.sort(after.reshape(-1)))
    own = inside(boxes[one], side.examples[0].image.size) | inside(boxes[other], side.examples[0].image.size)
    assert np.array_equal((before != after).any(-1) & ~own, np.zeros_like(own))
    back = cv.data.swap_patches(pairs.corrupt, model, one, other).corrupt
    assert np.array_equal(np.asarray(back.examples[0].image), before)
