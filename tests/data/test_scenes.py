"""Scenes as values: seeded, complete ground truth, minimal pairs that change one cell, and errors that name the fix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitvision.data import captions, questions, scenes
from circuitvision.errors import InputError


def test_forty_pairs_split_three_ways_without_overlap() -> None:
    assert len(scenes.ALL_PAIRS) == 40
    assert len(scenes.TEST_PAIRS) == 5
    groups = [set(scenes.TEST_PAIRS), set(scenes.VALIDATION_PAIRS), set(scenes.TRAIN_PAIRS)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 40
    for color in scenes.COLORS:
        assert sum(pair[0] == color for pair in scenes.TRAIN_PAIRS) == 4
    for shape in scenes.SHAPES:
        assert sum(pair[1] == shape for pair in scenes.TRAIN_PAIRS) >= 6


def test_same_seed_same_scenes_other_seed_other_scenes() -> None:
    drawn = [[str(scene) for scene, _ in questions.sample_questions(50, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_pictures_of_all_named_objects_differ() -> None:
    pictures = set()
    for color, shape in scenes.ALL_PAIRS:
        for size in scenes.SIZES:
            pictures.add(scenes.Scene((scenes.SceneObject(color, shape, size, 0, 0),)).pixels.tobytes())
    assert len(pictures) == 40 * len(scenes.SIZES)


def test_masks_cover_exactly_what_is_not_background_and_boxes_frame_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = scenes.sample_scene(rng, count=(1, 6), sizes=tuple(scenes.SIZES), unnamed=0.3, blobs=0.3)
        painted = (scene.pixels != scenes.BACKGROUND).any(-1)
        assert (scene.masks.sum(0) == painted).all()
        for thing, mask, (left, top, right, bottom) in zip(scene.objects, scene.masks, scene.boxes, strict=True):
            framed = np.zeros_like(mask)
            framed[top:bottom, left:right] = True
            assert not (mask & ~framed).any()
            assert mask[top].any()
            assert mask[bottom - 1].any()
            assert mask[:, left].any()
            assert mask[:, right - 1].any()
            assert thing.patch == (top // scenes.CELL) * scenes.GRID + left // scenes.CELL


def test_the_image_shows_the_pixels() -> None:
    scene = scenes.sample_scene(np.random.default_rng(4))
    assert (np.asarray(scene.image) == scene.pixels).all()
    assert scene.pixels.shape == (64, 64, 3)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), attribute=st.sampled_from(["color", "shape", "size", "cell"]))
def test_minimal_pairs_change_one_attribute_and_no_pixel_outside_the_cell(seed: int, attribute: str) -> None:
    scene = scenes.sample_scene(np.random.default_rng(seed), count=(2, 5), sizes=tuple(scenes.SIZES))
    pair = scenes.minimal_pair(scene, seed, attribute=attribute)
    names = ("color", "shape", "size", "cell")
    assert [name for name in names if getattr(pair.before, name) != getattr(pair.after, name)] == [attribute]
    assert set(pair.clean.objects) - set(pair.corrupt.objects) == {pair.before}
    assert set(pair.corrupt.objects) - set(pair.clean.objects) == {pair.after}
    changed = (pair.clean.pixels != pair.corrupt.pixels).any(-1)
    assert changed.any()
    for thing in (pair.before, pair.after):
        rows, columns = slice(thing.row * 16, thing.row * 16 + 16), slice(thing.column * 16, thing.column * 16 + 16)
        changed[rows, columns] = False
    assert not changed.any()


def test_minimal_pair_takes_what_is_asked_for() -> None:
    scene = scenes.Scene(
        (scenes.SceneObject("red", "circle", "large", 0, 0), scenes.SceneObject("blue", "cross", "large", 2, 3))
    )
    pair = scenes.minimal_pair(scene, 0, attribute="color", index=0, to="green")
    assert (pair.after.color, pair.after.shape, pair.after.cell) == ("green", "circle", (0, 0))
    for seed in range(20):
        assert scenes.minimal_pair(scene, seed, index=0, distinct=True).after.color != "blue"
        assert scenes.minimal_pair(scene, seed, index=0, pairs=scenes.TRAIN_PAIRS).after.pair in scenes.TRAIN_PAIRS
    assert pair == scenes.minimal_pair(scene, 0, attribute="color", index=0, to="green")


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: scenes.SceneObject("reed", "circle", "large", 0, 0), "red"),
        (lambda: scenes.SceneObject("red", "circle", "large", 0, 4), "outside"),
        (lambda: scenes.SceneObject("unnamed", "circle", "large", 0, 0), "paint"),
        (lambda: scenes.Scene((scenes.SceneObject("red", "circle", "large", 0, 0),) * 2), "share a cell"),
        (lambda: scenes.sample_scene(np.random.default_rng(0), count=17), "between 1 and 16"),
        (lambda: scenes.sample_scene(np.random.default_rng(0), count=6, distinct=True), "between 1 and 5"),
        (lambda: scenes.minimal_pair(scenes.sample_scene(np.random.default_rng(0)), 0, attribute="hue"), "nearest"),
        (lambda: scenes.minimal_pair(scenes.sample_scene(np.random.default_rng(0)), 0, index=9), "does not exist"),
        (lambda: scenes.minimal_pair(scenes.sample_scene(np.random.default_rng(0)), 0, to="mauve"), "mauve"),
        (lambda: questions.sample_questions(1, 0, kinds=["colour"]), "color"),
    ],
)
def test_mistakes_are_named(attempt, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attempt()


def test_distinct_scenes_share_no_color_and_no_shape() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = scenes.sample_scene(rng, count=3, distinct=True, subject=("red", "circle"))
        assert len({thing.color for thing in scene.objects}) == len({thing.shape for thing in scene.objects}) == 3


def test_held_out_pairs_never_appear_unless_asked_for() -> None:
    rng = np.random.default_rng(2)
    held_out = {*scenes.TEST_PAIRS, *scenes.VALIDATION_PAIRS}
    for _ in range(300):
        assert not scenes.sample_scene(rng, count=(2, 4), unnamed=0.2, blobs=0.2).pairs & held_out
    for scene, _ in questions.sample_largest(100, 0, subjects=scenes.TRAIN_PAIRS, unnamed=0.2, blobs=0.2):
        assert not scene.pairs & held_out


def test_every_held_out_question_is_about_a_held_out_object() -> None:
    asked = questions.sample_questions(300, 11, subjects=scenes.TEST_PAIRS, distractors=scenes.TRAIN_PAIRS)
    assert all(
        question.subject.pair in scenes.TEST_PAIRS and question.subject in scene.objects for scene, question in asked
    )
    assert {question.kind for _, question in asked} == set(questions.KINDS)
    assert {question.subject.pair for _, question in asked} == set(scenes.TEST_PAIRS)


def test_retrievals_meet_their_promise() -> None:
    subjects = {f"{color} {shape}" for color, shape in scenes.TEST_PAIRS}
    for drawn in captions.sample_retrievals(60, 12):
        truth = drawn.captions[drawn.answer]
        assert any(subject in truth for subject in subjects)
        assert sum(any(subject in caption for caption in drawn.captions) for subject in subjects) >= 4
        words = truth.split()
        near = [
            caption.split()
            for caption, kind in zip(drawn.captions, drawn.kinds, strict=True)
            if kind in ("color", "shape")
        ]
        assert all(sum(a != b for a, b in zip(words, other, strict=True)) == 1 for other in near)
        assert sum(kind in captions.NEGATIVE_KINDS for kind in drawn.kinds) == 8


def test_every_word_is_in_the_vocabulary_once() -> None:
    words = questions.vocabulary()
    assert len(words) == len(set(words))
    for _, question in questions.sample_questions(100, 13):
        assert set(question.prompt.replace("<image>", "").split()) | {question.answer} <= set(words)
    known = captions.vocabulary()
    assert len(known) == len(set(known))
    for drawn in captions.sample_retrievals(20, 14):
        assert {word for caption in drawn.captions for word in caption.split()} <= set(known)
