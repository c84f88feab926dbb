"""The boxes and masks of a data set as regions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import circuitvision as cv
from circuitvision.data import Pairs, Side
from circuitvision.errors import InputError
from circuitvision.model.positions import Positions
from tests.zoo import CASES, shared_model


def pictures(count: int = 3, width: int = 40, height: int = 20) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), (40 * n, 0, 0)) for n in range(count)]


BOXES = [(0, 0, 20, 10), [(20, 0, 40, 10), (0, 10, 5, 20)], None]


def test_boxes_of_either_side_are_a_region_of_that_side() -> None:
    other = [(20, 10, 40, 20)] * 3
    pairs = Pairs(pictures(), corrupt_images=pictures()[::-1], boxes=BOXES, corrupt_boxes=other)
    found = pairs.clean.regions()
    assert list(found) == ["box"]
    assert found["box"] == cv.regions.box(BOXES, size=[(20, 40)] * 3)
    assert found["box"].label == "box"
    assert pairs.corrupt.regions()["box"] == cv.regions.box(other, size=[(20, 40)] * 3)
    assert pairs.clean[1:].regions()["box"] == cv.regions.box(BOXES[1:], size=[(20, 40)] * 2)
    assert pairs.clean.regions(size=(10, 20), threshold=0.5)["box"] == cv.regions.box(
        BOXES, size=(10, 20), threshold=0.5
    )


def test_names_and_masks_are_regions_by_name() -> None:
    one, other = np.zeros((20, 40), bool), np.zeros((20, 40), bool)
    one[:5, :5], other[10:, 20:] = True, True
    boxes = [{"cup": (0, 0, 9, 9), "lid": (9, 9, 19, 19)}, {"cup": (1, 1, 5, 5)}, {}]
    side = Side(pictures(), boxes=boxes, masks=[one, [one, other], None])
    found = side.regions()
    assert list(found) == ["cup", "lid", "mask"]
    sizes = [(20, 40)] * 3
    assert found["lid"] == cv.regions.box([(9, 9, 19, 19), None, None], size=sizes)
    assert found["mask"] == cv.regions.mask([one, one | other, None], size=sizes)


def test_what_is_not_there_or_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="no boxes"):
        Side(pictures()).regions()
    twice: dict[str, Any] = {"boxes": [{"cup": (0, 0, 9, 9)}] * 3, "masks": [{"cup": np.ones((20, 40), bool)}] * 3}
    with pytest.raises(InputError, match="'cup'"):
        Side(pictures(), **twice).regions()


def test_tensors_made_by_hand_are_in_the_frame_of_what_the_model_reads() -> None:
    model = cv.HookedModel(shared_model("vit"))
    inputs = CASES["vit"].inputs(model.module, batch=2)
    height, width = inputs["pixel_values"].shape[-2:]
    side = Side(inputs=inputs, boxes=[(0, 0, width // 2, height), (width // 2, 0, width, height)])
    tokens = model.tokens(inputs)["vision"]
    inside = Positions.of(side.regions()["box"]).resolve(tokens)
    left = torch.from_numpy((tokens.kind == "patch") & (tokens.patch_col < tokens.patch_col.max() / 2))
    assert torch.equal(inside[0], left[0])
    assert torch.equal(inside[1], ~left[1] & torch.from_numpy(tokens.kind[1] == "patch"))
