"""What the generator says about a picture can be read off the picture: an oracle sees pixels and text, nothing else.

The oracle knows the palette and what the five shapes look like (corners, row widths), not how they are drawn.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from circuitvision.data import captions, questions, scenes

BACKGROUND = (128, 128, 128)
NAMED = {
    (230, 40, 40): "red",
    (40, 180, 60): "green",
    (40, 80, 230): "blue",
    (240, 220, 40): "yellow",
    (50, 210, 220): "cyan",
    (245, 140, 30): "orange",
    (150, 50, 200): "purple",
    (245, 245, 245): "white",
}


def see(pixels: np.ndarray) -> list[dict]:
    """The objects in a picture: colour, shape, extent in pixels, cell, box."""
    return _see(pixels.tobytes(), pixels.shape)


@functools.lru_cache(maxsize=8)
def _see(levels: bytes, size: tuple[int, int, int]) -> list[dict]:
    pixels = np.frombuffer(levels, dtype=np.uint8).reshape(size)
    found = []
    side = pixels.shape[0] // 4
    for row in range(4):
        for column in range(4):
            cell = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side].astype(int)
            body = (cell != BACKGROUND).any(-1)
            if not body.any():
                continue
            rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
            cut = body[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            paints = {tuple(pixel) for pixel in np.unique(cell[body], axis=0) if pixel.any()}
            found.append(
                {
                    "color": NAMED.get(next(iter(paints)), "unnamed") if len(paints) == 1 else None,
                    "shape": see_shape(cut),
                    "extent": max(cut.shape),
                    "row": row,
                    "column": column,
                    "box": (
                        column * side + columns[0],
                        row * side + rows[0],
                        column * side + columns[-1] + 1,
                        row * side + rows[-1] + 1,
                    ),
                }
            )
    return found


def see_shape(cut: np.ndarray) -> str:
    """Name the shape of a cropped silhouette."""
    if cut.all():
        return "square"
    if cut[-1, 0] and cut[-1, -1] and not cut[0, 0]:
        return "triangle"
    widths = cut.sum(1)
    if len(set(widths)) == 2 and (cut == cut[::-1]).all() and widths[0] == widths[1]:
        return "cross"
    if (np.abs(np.diff(widths)) <= 2).all() and widths[0] <= 2:
        return "diamond"
    return "circle" if cut.mean() > 0.7 else "blob"


SMALLEST = {"small": 9, "medium": 11, "large": 12}


def see_size(thing: dict) -> str:
    """The size whose smallest extent the object reaches."""
    return [name for name, extent in SMALLEST.items() if thing["extent"] >= extent][-1]


def half(thing: dict) -> set[str]:
    return {"left" if thing["column"] < 2 else "right", "top" if thing["row"] < 2 else "bottom"}


def answer(pixels: np.ndarray, question: str) -> str:
    """Answer a question from pixels."""
    things = see(pixels)
    if match := re.fullmatch(r"what (color|shape) is the (left|right|top|bottom) object \?", question):
        (one,) = [thing for thing in things if match[2] in half(thing)]
        return one[match[1]]
    match = re.fullmatch(r"(?:what (color|shape) is|is) the (\w+)( object)?(?: (\w+) or (\w+))? \?", question)
    assert match is not None, question
    (one,) = [thing for thing in things if thing["color" if match[3] else "shape"] == match[2]]
    if match[1]:
        return one[match[1]]
    (place,) = half(one) & {match[4], match[5]}
    return place


def holds(pixels: np.ndarray, caption: str) -> bool:
    """Whether a caption is true of a picture."""
    said_first, said_second = (phrase.split() for phrase in caption.split(" and "))
    things = see(pixels)

    def fits(thing: dict, words: list[str]) -> bool:
        return all(word in ("object", thing["color"], thing["shape"]) for word in words)

    return any(
        fits(first, said_first) and fits(second, said_second)
        for first in things
        for second in things
        if first is not second
    )


def test_every_named_object_is_read_back_from_its_pixels() -> None:
    for color, shape in scenes.ALL_PAIRS:
        for size in scenes.SIZES:
            scene = scenes.Scene((scenes.SceneObject(color, shape, size, 1, 2),))
            (seen,) = see(scene.pixels)
            assert (seen["color"], seen["shape"], seen["row"], seen["column"]) == (color, shape, 1, 2)
            assert tuple(map(int, seen["box"])) == scene.boxes[0]
            assert see_size(seen) == size


def test_random_scenes_are_read_back_attribute_by_attribute() -> None:
    rng = np.random.default_rng(3)
    for _ in range(150):
        scene = scenes.sample_scene(rng, count=(1, 6), sizes=tuple(scenes.SIZES), unnamed=0.2)
        seen = [(thing["color"], thing["shape"], thing["row"], thing["column"]) for thing in see(scene.pixels)]
        assert seen == [(thing.color, thing.shape, thing.row, thing.column) for thing in scene.objects]


def test_every_answer_can_be_read_off_the_pixels() -> None:
    asked = questions.sample_questions(600, seed=5)
    assert [answer(scene.pixels, question.text) for scene, question in asked] == [
        question.answer for _, question in asked
    ]


def test_training_questions_are_answered_too_with_unnamed_colors_and_blobs_around() -> None:
    rng, count = np.random.default_rng(6), 0
    for _ in range(120):
        scene = scenes.sample_scene(rng, unnamed=0.2, blobs=0.0)
        for question in questions.questions(scene):
            count += 1
            assert answer(scene.pixels, question.text) == question.answer, (str(scene), question.text)
    assert count > 500


def test_contrast_pairs_have_two_different_right_answers() -> None:
    for kind in questions.KINDS:
        for pair in questions.sample_question_pairs(20, seed=7, kind=kind):
            assert answer(pair.clean.pixels, pair.question.text) == pair.answer != pair.foil
            assert answer(pair.corrupt.pixels, pair.question.text) == pair.foil


def test_exactly_one_of_sixteen_distinct_captions_is_true() -> None:
    drawn_both = captions.sample_retrievals(40, seed=8) + captions.sample_retrievals(
        30, seed=8, kinds=captions.NEGATIVE_KINDS
    )
    for drawn in drawn_both:
        pixels = drawn.scene.pixels
        assert len(set(drawn.captions)) == 16
        assert [holds(pixels, caption) for caption in drawn.captions] == [index == drawn.answer for index in range(16)]


def test_true_captions_are_all_the_true_ones() -> None:
    rng = np.random.default_rng(9)
    for _ in range(25):
        scene = scenes.sample_scene(rng, count=2, unnamed=0.2)
        known = {str(caption) for caption in captions.true_captions(scene)}
        assert all(holds(scene.pixels, caption) for caption in known)
        for caption in captions.true_captions(scene, partial=False):
            for kind in captions.NEGATIVE_KINDS:
                made = captions.negative(caption, kind, rng, scenes.ALL_PAIRS)
                assert made is None or holds(scene.pixels, str(made)) == (str(made) in known)


def test_the_largest_object_is_the_largest_in_pixels() -> None:
    for scene, label in questions.sample_largest(150, 10):
        things = see(scene.pixels)
        sizes = [list(SMALLEST).index(see_size(thing)) for thing in things]
        assert sizes.count(max(sizes)) == 1
        assert things[int(np.argmax(sizes))]["shape"] == label
