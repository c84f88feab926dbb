"""Pictures with foreground, background or patches replaced, and what differs in pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import circuitvision as cv
from circuitvision.data import Pairs, Side
from circuitvision.data.masking import FILLS
from circuitvision.errors import InputError
from tests.zoo import case, shared_model
from tests.zoo.images import picture


def levels(side: Side, row: int = 0) -> np.ndarray:
    return np.asarray(side.examples[row].image).astype(int)


def drawn(seed: int, height: int, width: int, grey: bool = False) -> np.ndarray:
    shape = (height, width) if grey else (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=40)
@given(
    st.integers(0, 2**16), st.integers(1, 12), st.integers(2, 12), st.booleans(), st.sampled_from([*FILLS, 7, "other"]),
    st.booleans(),
)  # fmt: skip
def test_foreground_and_background_less_the_picture_are_the_baseline(
    seed: int, height: int, width: int, grey: bool, fill: Any, soft: bool
) -> None:
    rng = np.random.default_rng(seed)
    shown = [Image.fromarray(drawn(seed + n, height, width, grey)) for n in range(2)]
    masks = [rng.random((height, width)) if soft else rng.random((height, width)) < 0.5 for _ in range(2)]
    for mask in masks:
        mask[0, 0], mask[0, 1] = True, False
    side = Side(shown)
    fill = [Image.fromarray(255 - np.asarray(one)) for one in shown] if fill == "other" else fill
    try:
        front, back = (cv.data.mask_images(side, masks, keep=keep, fill=fill).corrupt for keep in cv.data.masking.KEEP)
        blank = cv.data.blank_images(side, fill).corrupt
    except InputError as error:
        # A picture that is its own baseline has nothing to mask.
        if "Nothing changes" not in str(error):
            raise
        return
    for row in range(2):
        whole = levels(side, row)
        assert np.array_equal(levels(front, row) + levels(back, row) - whole, levels(blank, row))
        assert front.examples[row].image.mode == ("L" if grey else "RGB")
        kept = masks[row] == 1
        assert np.array_equal(levels(front, row)[kept], whole[kept])
        gone = masks[row] == 0
        assert np.array_equal(levels(front, row)[gone], levels(blank, row)[gone])


def test_baselines_by_hand() -> None:
    left = np.zeros((2, 2, 3), np.uint8)
    left[0, 0] = (40, 80, 120)
    right = np.full((2, 2, 3), 100, np.uint8)
    right[1] = (20, 20, 20)
    side = Side([Image.fromarray(left), Image.fromarray(right)])
    assert levels(cv.data.blank_images(side).corrupt)[1, 1].tolist() == [10, 20, 30]
    assert levels(cv.data.blank_images(side, "dataset").corrupt)[0, 0].tolist() == [35, 40, 45]
    assert levels(cv.data.blank_images(side, (1, 2, 3)).corrupt, 1)[0, 0].tolist() == [1, 2, 3]
    swapped = cv.data.blank_images(side, side[[1, 0]]).corrupt
    assert np.array_equal(levels(swapped, 0), right)
    half = cv.data.mask_images(side, np.array([[0.25, 0.0], [0.0, 1.0]]), fill=0).corrupt
    assert levels(half)[0, 0].tolist() == [10, 20, 30]


def test_noise_goes_by_the_picture_and_the_seed_alone() -> None:
    side = Side([picture(n) for n in range(3)])
    one, other = (cv.data.blank_images(part, "noise").corrupt for part in (side, side[[2, 0]]))
    assert np.array_equal(levels(one, 2), levels(other, 0))
    assert np.array_equal(levels(one, 0), levels(other, 1))
    assert (levels(one, 0) != levels(cv.data.blank_images(side, "noise", seed=1).corrupt, 0)).mean() > 0.5


def test_boxes_masks_names_and_other_sizes() -> None:
    shown = [picture(n, (10, 20)) for n in range(2)]
    box = [(0, 0, 5, 10), (5, 0, 20, 2)]
    by_box = cv.data.mask_images(Side(shown, boxes=box), fill=0)
    mask = np.zeros((2, 10, 20), bool)
    mask[0, :, :5], mask[1, :2, 5:] = True, True
    for other in (
        cv.data.mask_images(Side(shown), list(mask), fill=0),
        cv.data.mask_images(Side(shown, masks=list(mask), boxes=box), fill=0),
        cv.data.mask_images(Side(shown, boxes=[{"cup": one, "lid": (0, 0, 1, 1)} for one in box]), "cup", fill=0),
        cv.data.mask_images(Side(shown), cv.regions.box(box), fill=0),
        cv.data.mask_images(Side([np.asarray(one) for one in shown]), list(mask), fill=0),
        cv.data.mask_images(Side([[picture(9), one] for one in shown], boxes=box), fill=0, image=1),
    ):
        for row in range(2):
            found = other.corrupt.examples[row].image
            found = found[1] if isinstance(found, list) else found
            assert np.array_equal(np.asarray(found), levels(by_box.corrupt, row))
    small = np.zeros((5, 10), bool)
    small[:, :5] = True
    assert (levels(cv.data.mask_images(Side(shown), small, fill=0).corrupt)[:, 10:] == 0).all()
    assert np.array_equal(
        levels(cv.data.mask_images(Side(shown), small, fill=0).corrupt)[:, :10], levels(Side(shown))[:, :10]
    )
    fitted = cv.data.blank_images(Side(shown), picture(5, (30, 30))).corrupt.examples[0].image
    assert fitted.size == (20, 10)


SHOWN = [picture(n, (10, 20)) for n in range(2)]
RGBA = np.dstack([np.asarray(SHOWN[1]), np.full((10, 20), 90, np.uint8)])


@pytest.mark.parametrize(
    ("side", "changes", "word"),
    [
        (Side(SHOWN), {"masks": [np.ones((10, 20), bool), np.zeros((10, 20), bool)]}, "example 1 is empty"),
        (Side(SHOWN, boxes=[(0, 0, 4, 4), None]), {}, "Example 1 has no box"),
        (Side(SHOWN), {}, "no boxes"),
        (Side(SHOWN), {"masks": np.full((10, 20), 1.5)}, "example 0 holds 1.5"),
        (Side(SHOWN), {"masks": [np.ones((10, 20))]}, "1 masks for 2"),
        (Side(SHOWN, boxes=[{"a": (0, 0, 4, 4), "b": (0, 0, 2, 2)}] * 2), {}, "say which"),
        (Side([SHOWN[0], RGBA], boxes=[(0, 0, 4, 4)] * 2), {}, "Example 1.*transparent"),
        (Side([SHOWN[0], SHOWN[1].convert("L")], boxes=[(0, 0, 4, 4)] * 2), {"fill": SHOWN[0]}, "example 1 is grey"),
        (Side(SHOWN, boxes=[(0, 0, 4, 4)] * 2), {"fill": "sky"}, "'sky'"),
        (Side(SHOWN, boxes=[(0, 0, 4, 4)] * 2), {"fill": 300}, "no colour"),
        (Side(SHOWN, boxes=[(0, 0, 4, 4)] * 2), {"fill": [SHOWN[0]]}, "1 pictures for 2"),
        (Side(SHOWN, boxes=[(0, 0, 4, 4)] * 2), {"keep": "all"}, "'all'"),
        (Side(SHOWN, boxes=[(0, 0, 20, 10)] * 2), {}, "Nothing changes.*example 0"),
        (Side(SHOWN, boxes=[(0, 0, 4, 4)] * 2), {"image": 1}, "Example 0 has no picture 1"),
        (Side(inputs={"pixel_values": torch.zeros(2, 3, 8, 8)}), {}, "made by hand"),
        (Side(SHOWN, boxes=[(0, 0, 4, 4)] * 2), {"fill": "noise", "seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_what_cannot_be_masked_is_refused_by_name(side: Side, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        cv.data.mask_images(side, **changes)


# -- patches -------------------------------------------------------------------------------------------------------------------------------


def vit() -> cv.HookedModel:
    one = case("vit")
    return cv.HookedModel(shared_model("vit"), one.processor())


def grid_pictures(model: cv.HookedModel, count: int = 2) -> tuple[list[Image.Image], tuple[int, int], tuple[int, int]]:
    """Pictures of the size that the model reads, the size of a patch and of the grid (down, across)."""
    pixels = model.inputs(images=picture(0))["pixel_values"].shape[-2:]
    size = (int(pixels[0]), int(pixels[1]))
    tokens = model.tokens(model.inputs(images=picture(0)))["vision"]
    rows, columns = int(tokens.patch_row.max()) + 1, int(tokens.patch_col.max()) + 1
    shown = [Image.fromarray(drawn(n, *size)) for n in range(count)]
    return shown, (size[0] // rows, size[1] // columns), (rows, columns)


def test_patches_are_those_of_the_models_own_grid() -> None:
    model = vit()
    shown, (tall, wide), (rows, columns) = grid_pictures(model)
    side = Side(shown)
    for patch in range(rows * columns):
        row, column = divmod(patch, columns)
        inside = np.zeros((rows * tall, columns * wide), bool)
        inside[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide] = True
        masked = cv.data.mask_patches(side, model, patch, 0)
        found = cv.data.picture_differences(masked).masks[0]
        assert not (found & ~inside).any()
        assert (levels(masked.corrupt)[inside] == 0).all()
    pairs = cv.data.mask_patches(side, model, [[0], [1, rows * columns - 1]], "blur")
    assert cv.data.changed_patches(model, pairs) == [[0], [1, rows * columns - 1]]
    box = cv.regions.box((0, 0, wide, tall), size=(rows * tall, columns * wide))
    assert cv.data.changed_patches(model, cv.data.mask_patches(side, model, box, 0)) == [[0], [0]]


def test_swapped_patches_keep_every_pixel_and_back_is_as_before() -> None:
    model = vit()
    shown, _, _ = grid_pictures(model)
    side = Side(shown)
    pairs = cv.data.swap_patches(side, model, [0, 1], [2, 3])
    assert cv.data.changed_patches(model, pairs) == [[0, 1, 2, 3]] * 2
    for row in range(2):
        assert np.array_equal(np.sort(levels(pairs.corrupt, row).reshape(-1)), np.sort(levels(side, row).reshape(-1)))
    back = cv.data.swap_patches(pairs.corrupt, model, [0, 1], [2, 3]).corrupt
    assert np.array_equal(levels(back), levels(side))
    beside = cv.data.mask_patches(side, model, [3], side[[1, 0]])
    assert cv.data.changed_patches(model, beside) == [[3], [3]]
    (box,) = {tuple(boxes[3]) for boxes in cv.data.patch_boxes(side, model)}
    left, top, right, bottom = map(int, box)
    assert np.array_equal(levels(beside.corrupt)[top:bottom, left:right], levels(side, 1)[top:bottom, left:right])


def test_a_picture_of_another_size_is_cut_in_its_own_pixels() -> None:
    model = vit()
    shown, (tall, wide), (rows, columns) = grid_pictures(model)
    double = [one.resize((one.width * 2, one.height * 2), Image.Resampling.NEAREST) for one in shown]
    boxes = cv.data.patch_boxes(Side(double), model)[0]
    assert np.allclose(boxes[columns + 1], (2 * wide, 2 * tall, 4 * wide, 4 * tall))
    pairs = cv.data.mask_patches(Side(double), model, [columns + 1], 0)
    assert cv.data.picture_differences(pairs).boxes[0] == (2 * wide, 2 * tall, 4 * wide, 4 * tall)
    tiny = [one.resize((2, 2)) for one in shown]
    with pytest.raises(InputError, match="less than a pixel"):
        cv.data.mask_patches(Side(tiny), model, [rows * columns // 2 + 1], 0)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda side, model: cv.data.mask_patches(side, model, 999), "Example 0 has no patch 999"),
        (lambda side, model: cv.data.mask_patches(side, model, []), "No patch"),
        (lambda side, model: cv.data.mask_patches(side, model, [[0]]), "lists of patches for 1 of 2"),
        (lambda side, model: cv.data.swap_patches(side, model, [0, 1], [1, 2]), "example 0.*none twice"),
        (lambda side, model: cv.data.mask_patches(side, model, [0], tower="text"), "'text'"),
    ],
)
def test_patches_that_cannot_be_edited_are_named(call: Any, word: str) -> None:
    model = vit()
    with pytest.raises(InputError, match=word):
        call(Side(grid_pictures(model)[0]), model)


# -- what differs ----------------------------------------------------------------------------------------------------------------------------


def edited(box: tuple[int, int, int, int], by: int = 9) -> tuple[list[np.ndarray], list[np.ndarray]]:
    before = [np.full((8, 10, 3), 90, np.uint8) for _ in range(2)]
    after = [one.copy() for one in before]
    left, top, right, bottom = box
    for one in after:
        one[top:bottom, left:right, 1] += by
    return before, after


def test_minimal_pairs_differ_inside_their_boxes() -> None:
    before, after = edited((2, 1, 5, 4))
    pairs = cv.data.minimal_pairs(before, after, "which ?", boxes=[(2, 1, 5, 4)] * 2, answers=["a", "b"])
    found = cv.data.picture_differences(pairs)
    assert found.boxes == [(2, 1, 5, 4)] * 2
    assert found.share == (9 / 80,) * 2
    assert found.inside == (1.0, 1.0)
    assert found.to_frame()["inside"].tolist() == [1.0, 1.0]
    assert "what differs" in found._repr_html_()
    partly = cv.data.picture_differences(
        pairs, masks=cv.regions.box((0, 0, 3, 8)), corrupt_masks=cv.regions.box((0, 0, 3, 8))
    )
    assert partly.inside == (3 / 9,) * 2


def test_the_union_of_both_sides_boxes_counts_and_small_changes_can_be_allowed() -> None:
    before, after = edited((2, 1, 5, 4), by=2)
    moved: dict[str, Any] = {"boxes": [(2, 1, 3, 4)] * 2, "corrupt_boxes": [(3, 1, 5, 4)] * 2}
    assert len(cv.data.minimal_pairs(before, after, **moved)) == 2
    after[0][7, 9] += 1
    with pytest.raises(InputError, match=r"10.0%.*example 0"):
        cv.data.minimal_pairs(before, after, **moved)
    assert len(cv.data.minimal_pairs(before, after, tolerance=1, **moved)) == 2
    assert len(cv.data.minimal_pairs(before, after, inside=0.9, **moved)) == 2


@pytest.mark.parametrize(
    ("change", "columns", "word"),
    [
        (lambda after, before: [after[0], before[1]], {}, "example 1 are the same"),
        (lambda after, before: [after[0], after[1][:5]], {}, "example 1 have two sizes"),
        (lambda after, before: after, {"boxes": [(2, 1, 5, 4), (0, 0, 3, 3)]}, "example 1 differ lie outside"),
        (lambda after, before: after, {"most": 0.1}, "example 0 differ in 11"),
        (lambda after, before: after, {"inside": 2}, "inside=2"),
    ],
)
def test_what_is_no_minimal_pair_is_refused_by_name(change: Any, columns: dict[str, Any], word: str) -> None:
    before, after = edited((2, 1, 5, 4))
    with pytest.raises(InputError, match=word):
        cv.data.minimal_pairs(before, change(after, before), **columns)


def test_drawn_pairs_are_minimal_and_the_model_sees_the_patches_that_differ() -> None:
    model = cv.organisms.load("shapes-llava")
    pairs = cv.data.question_pairs(6, seed=3)
    found = cv.data.picture_differences(pairs)
    assert found.inside == (1.0,) * 6
    assert max(found.share) < 0.05
    (batch,) = pairs.batches(model, 6)
    tokens = model.tokens(batch.inputs)["vision"]
    marked = found.region().where(tokens, range(6))
    seen = cv.data.changed_patches(model, pairs)
    assert [np.flatnonzero(row[tokens.kind[n] == "patch"]).tolist() for n, row in enumerate(marked)] == seen


def test_an_organism_loses_the_answer_without_the_foreground_and_keeps_it_without_the_background() -> None:
    model = cv.organisms.load("scenes-llava")
    pairs = cv.organisms.pairs("scenes-llava", 24, 5)
    side = pairs.clean

    def right(data: Side) -> float:
        shown = Pairs.from_sides(side, data)
        made = cv.data.edit_outcomes(model, shown, touched=[False] * len(side))
        return float(np.mean([one == answer for one, answer in zip(made.after, side.answers or (), strict=True)]))

    grey = tuple(int(level) for level in np.asarray(side.examples[0].image)[0, 0])
    kept, lost = (cv.data.mask_images(side, keep=keep, fill=grey).corrupt for keep in ("foreground", "background"))
    assert right(kept) > right(lost) + 0.3
