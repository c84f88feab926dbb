"""Pairs drawn from either world: answers hold in the pictures, boxes and masks are the changed object's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import circuitvision as cv
from circuitvision.errors import InputError
from tests.data import binding_oracle, test_oracle

ORACLES: dict[str, Any] = {"shapes": test_oracle, "binding": binding_oracle}
MAKERS = {"question": cv.data.question_pairs, "caption": cv.data.caption_pairs, "largest": cv.data.largest_pairs}


def rows_of(pairs: cv.data.Pairs) -> list[tuple[Any, list[np.ndarray], Any, list[Any]]]:
    """Of every pair: record, both pictures, the clean text, and the answer of each side."""
    pictures = [[np.asarray(one.image) for one in side.examples] for side in (pairs.clean, pairs.corrupt)]
    texts = [one.text for one in pairs.clean.examples]
    assert texts == [one.text for one in pairs.corrupt.examples]
    answers = zip(pairs.answers, pairs.foils, strict=True)
    both = map(list, zip(*pictures, strict=True))
    return list(zip(pairs.records, both, texts, map(list, answers), strict=True))


@pytest.mark.parametrize("world", ORACLES)
@pytest.mark.parametrize("maker", MAKERS)
def test_the_masks_and_boxes_hold_what_changed(world: str, maker: str) -> None:
    pairs = MAKERS[maker](12, 1, world=world)
    assert len(pairs) == 12
    for number, (record, pictures, _, _) in enumerate(rows_of(pairs)):
        changed = (pictures[0] != pictures[1]).any(-1)
        masks = [side.masks[number] for side in (pairs.clean, pairs.corrupt)]
        assert changed.any()
        assert not (changed & ~masks[0] & ~masks[1]).any()
        for side, mask, picture in zip((pairs.clean, pairs.corrupt), masks, pictures, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert tuple(side.boxes[number]) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert (picture[mask] != (128, 128, 128)).any(-1).all()
        assert (record.clean.pixels == pictures[0]).all()
        assert (record.corrupt.pixels == pictures[1]).all()


@pytest.mark.parametrize("kind", ["color", "shape", "relation", "count"])
def test_questions_about_bound_scenes_are_answered_by_the_pictures(kind: str) -> None:
    for _, pictures, text, answers in rows_of(cv.data.question_pairs(12, 2, kind=kind, world="binding")):
        asked = text.removeprefix("USER: <image> ").removesuffix(" ASSISTANT:")
        assert [binding_oracle.answer(picture, asked) for picture in pictures] == answers


@pytest.mark.parametrize("attribute", ["color", "shape"])
@pytest.mark.parametrize("world", ORACLES)
def test_one_of_two_captions_is_true_of_each_picture(world: str, attribute: str) -> None:
    for _, pictures, texts, answers in rows_of(cv.data.caption_pairs(12, 3, attribute=attribute, world=world)):
        for picture, answer in zip(pictures, answers, strict=True):
            assert [ORACLES[world].holds(picture, text) for text in texts] == [answer == 0, answer == 1]


def test_the_label_is_the_shape_of_the_one_large_object() -> None:
    for _, pictures, _, answers in rows_of(cv.data.largest_pairs(12, 4, world="binding")):
        for picture, label in zip(pictures, answers, strict=True):
            assert [thing["shape"] for thing in binding_oracle.see(picture) if thing["size"] == "large"] == [label]


@pytest.mark.parametrize("maker", MAKERS)
def test_another_world_is_refused(maker: str) -> None:
    with pytest.raises(InputError, match="binding"):
        MAKERS[maker](1, 0, world="bindings")
