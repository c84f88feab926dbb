"""Patches that a connector merges 2×2: the pixels of groups, and the positions that an edit of single patches reaches, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import circuitvision as cv
from circuitvision.data import Side
from circuitvision.errors import InputError
from tests import synthetic

pytestmark = pytest.mark.usefixtures("tables")
PATCH, ROWS, COLUMNS = synthetic.PATCH, 4, 6


class Processor:
    """Pictures scaled to the model's size, and prompts with six image tokens."""

    tokenizer = None

    def __init__(self) -> None:
        height, width = synthetic.SIZE
        self.image_processor = transformers.SiglipImageProcessor(size={"height": height, "width": width})

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        pictures = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return {**synthetic.prompts([[6]] * len(pictures)), "pixel_values": pictures}


def shown(cls: type[synthetic.Synthetic], scale: int = 1) -> tuple[cv.HookedModel, Side]:
    synthetic.register(cls)
    model = cv.HookedModel(synthetic.build(cls), Processor())
    rng = np.random.default_rng(0)
    height, width = (scale * size for size in synthetic.SIZE)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)) for _ in range(2)]
    return model, Side(images, ["what"] * 2)


def levels(side: Side) -> list[np.ndarray]:
    return [np.asarray(example.image) for example in side.examples]


def block(down: int, across: int, side: int) -> tuple[slice, slice]:
    return slice(down * side, (down + 1) * side), slice(across * side, (across + 1) * side)


@pytest.mark.parametrize("cls", [synthetic.Merging, synthetic.MergingBefore])
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(("tower", "group"), [("vision", 1), ("language", 2)])
def test_a_masked_position_is_its_block_of_pixels(cls: Any, scale: int, tower: str, group: int) -> None:
    model, side = shown(cls, scale)
    columns = COLUMNS // group
    edge = scale * PATCH * group
    assert len(cv.data.patch_boxes(side, model, tower=tower)[0]) == ROWS * COLUMNS // group**2
    for number in (0, columns - 1, columns + 1, ROWS * COLUMNS // group**2 - 1):
        pairs = cv.data.mask_patches(side, model, number, 7, tower=tower)
        for before, after in zip(levels(pairs.clean), levels(pairs.corrupt), strict=True):
            expected = before.copy()
            expected[block(*divmod(number, columns), edge)] = 7
            assert np.array_equal(after, expected)


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_exchanged_positions_are_exchanged_blocks_of_pixels(tower: str) -> None:
    model, side = shown(synthetic.Merging)
    group = 1 if tower == "vision" else 2
    columns = COLUMNS // group
    pairs = cv.data.swap_patches(side, model, [0, 1], [columns, 2 * columns - 1], tower=tower)
    for before, after in zip(levels(pairs.clean), levels(pairs.corrupt), strict=True):
        expected = before.copy()
        for one, other in ((0, columns), (1, 2 * columns - 1)):
            here, there = (block(*divmod(number, columns), PATCH * group) for number in (one, other))
            expected[here], expected[there] = before[there], before[here]
        assert np.array_equal(after, expected)


def test_a_masked_group_changes_its_own_patches_and_prompt_position_alone() -> None:
    """What enters the towers: four patches' embeddings, and the features of one group where no layer mixes patches yet."""
    model, side = shown(synthetic.Merging)
    pairs = cv.data.mask_patches(side, model, 4, 7, tower="language")
    with torch.no_grad():
        seen = []
        for part in (pairs.clean, pairs.corrupt):
            inputs = next(iter(part.batches(model))).inputs
            with model.record(["vision.blocks.0.hook_resid_pre"]) as cache:
                model(inputs)
            seen.append(cache["vision.blocks.0.hook_resid_pre"].clone())
    differ = (seen[0] != seen[1]).any(-1)
    assert [row.nonzero().flatten().tolist() for row in differ] == [[14, 15, 20, 21]] * 2
    tokens = model.tokens(inputs)["language"]
    position = int(np.flatnonzero(tokens.kind[0] == "patch")[4])
    assert [place for _, *place, _ in tokens.patches.of(0, position)] == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert cv.data.changed_patches(model, pairs)[0] == [14, 15, 20, 21]


def test_drawn_patches_go_by_the_seed_and_the_picture() -> None:
    model, side = shown(synthetic.Merging)

    def masked(given: Side, **options: Any) -> list[list[int]]:
        pairs = cv.data.mask_patches(given, model, fill=7, **options)
        edge = PATCH * (2 if options.get("tower") == "language" else 1)
        found = []
        for before, after in zip(levels(pairs.clean), levels(pairs.corrupt), strict=True):
            grid = (before != after).any(-1).reshape(before.shape[0] // edge, edge, -1, edge)
            # A random block differs from a grey one somewhere, and no pixel outside those drawn does.
            changed = grid.any((1, 3)).flatten()
            expected = before.copy()
            for number in np.flatnonzero(changed):
                expected[block(*divmod(int(number), before.shape[1] // edge), edge)] = 7
            assert np.array_equal(expected, after)
            found.append(np.flatnonzero(changed).tolist())
        return found

    first = masked(side, n=5)
    assert [len(own) for own in first] == [5, 5]
    assert first[0] != first[1]
    assert masked(side, n=5) == first == masked(side[[1, 0]], n=5)[::-1]
    assert masked(side, n=5, seed=1) != first
    assert [len(own) for own in masked(side, n=2, tower="language")] == [2, 2]
    assert all(set(own) <= {3, 4, 9} for own in masked(side, patches=[3, 4, 9], n=2))
    every = {number for seed in range(30) for own in masked(side, n=3, seed=seed) for number in own}
    assert every == set(range(ROWS * COLUMNS))
    for n in (0, 25, True, 1.0):
        with pytest.raises(InputError, match="n="):
            cv.data.mask_patches(side, model, fill=7, n=n)
