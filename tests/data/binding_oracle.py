"""Reads a scene of three objects off its pixels, and answers from what it read.

It knows the palette and what arcs, corners and slopes look like, not how they are drawn: the corner that is cut off a wedge says in which quarter it
is, its opposite corner where the object's middle is, and the outline opposite says how large the object is and how it bends.
"""

from __future__ import annotations

import functools
import re

import numpy as np

PATCH, GRID = 8, 8
BACKGROUND, OUTLINE = (128, 128, 128), (0, 0, 0)
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
BENDS = {
    ("arc", "arc"): "circle",
    ("corner", "corner"): "square",
    ("slope", "slope"): "diamond",
    ("arc", "corner"): "arch",
    ("corner", "slope"): "shield",
    ("slope", "arc"): "drop",
    ("corner", "arc"): "cup",
    ("slope", "corner"): "house",
}
NUMBERS = ("zero", "one", "two", "three")


def see(pixels: np.ndarray) -> list[dict]:
    """Colour, shape, quarter, size, cell, shift and patches of every object, in reading order."""
    return _see(pixels.tobytes())


@functools.lru_cache(maxsize=8)
def _see(levels: bytes) -> list[dict]:
    pixels = np.frombuffer(levels, dtype=np.uint8).reshape(PATCH * GRID, PATCH * GRID, 3)
    found = []
    for row in range(GRID):
        for column in range(GRID):
            patch = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            if (patch == BACKGROUND).all():
                continue
            colors = {tuple(level) for level in patch.reshape(-1, 3).tolist()} - {BACKGROUND, OUTLINE}
            if colors:
                (color,) = colors
                found.append({"color": NAMED[color], **_see_object(pixels, row, column, color)})
    return sorted(found, key=lambda thing: thing["cell"])


def _see_object(pixels: np.ndarray, row: int, column: int, color: tuple[int, ...]) -> dict:
    """The object whose wedge is in a patch."""
    patch = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    wedge = (patch == color).all(-1)
    rows, columns = np.flatnonzero(wedge.any(1)), np.flatnonzero(wedge.any(0))
    cut = wedge[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ((vertical, horizontal),) = [
        (vertical, horizontal) for vertical in (0, -1) for horizontal in (0, -1) if not cut[vertical, horizontal]
    ]
    upper, left = vertical == 0, horizontal == 0
    cell = (row if upper else row - 1, column if left else column - 1)
    # The middle of the object lies a pixel beyond the corner opposite the one that is cut off.
    middle = (
        row * PATCH + (rows[-1] + 2 if upper else rows[0] - 1),
        column * PATCH + (columns[-1] + 2 if left else columns[0] - 1),
    )
    black = (pixels == OUTLINE).all(-1)
    window = np.zeros_like(black)
    window[cell[0] * PATCH : (cell[0] + 2) * PATCH, cell[1] * PATCH : (cell[1] + 2) * PATCH] = True
    black &= window
    bends, reach = [], 0
    for down in (-1, 1):
        # The half's quarter without the wedge: sideways away from it, or either side.
        across = 1 if left else -1
        quarter = _quarter(black, middle, down, across)
        reach = max(reach, *(int(np.flatnonzero(quarter.any(axis)).max()) + 1 for axis in (0, 1)))
        bends.append(quarter)
    return {
        "shape": BENDS[tuple(_bend(quarter, reach) for quarter in bends)],  # type: ignore[index]
        "quarter": f"{'top' if upper else 'bottom'} {'left' if left else 'right'}",
        "size": {6: "small", 7: "large"}[reach],
        "cell": cell,
        "shift": tuple(int(middle[axis] - (cell[axis] + 1) * PATCH) for axis in (0, 1)),
        "patches": tuple((cell[0] + step) * GRID + cell[1] + side for step in (0, 1) for side in (0, 1)),
    }


def _quarter(black: np.ndarray, middle: tuple[int, int], down: int, across: int) -> np.ndarray:
    """One quarter of the outline, turned so that the middle is at [0, 0]."""
    rows = black[middle[0] :] if down > 0 else black[: middle[0]][::-1]
    return (rows[:, middle[1] :] if across > 0 else rows[:, : middle[1]][:, ::-1])[:8, :8]


def _bend(quarter: np.ndarray, reach: int) -> str:
    """How an outline comes from the side to the end: how far out it is on the diagonal."""
    out = int(np.flatnonzero(np.diagonal(quarter)).max()) + 1
    return "corner" if out == reach else "slope" if out <= reach / 2 + 0.5 else "arc"


def neighbor(things: list[dict], thing: dict, direction: str) -> dict | None:
    """The one object beyond ``thing`` on a side that has all others on that side beyond itself."""
    axis = 0 if direction in ("above", "below") else 1

    def beyond(far: dict, near: dict) -> bool:
        ends = [{one["cell"][axis], one["cell"][axis] + 1} for one in (far, near)]
        return max(ends[0]) < min(ends[1]) if direction in ("left", "above") else min(ends[0]) > max(ends[1])

    there = [other for other in things if beyond(other, thing)]
    nearest = [one for one in there if all(other is one or beyond(other, one) for other in there)]
    return nearest[0] if nearest else None


def answer(pixels: np.ndarray, question: str) -> str:
    """Answer a question from pixels; fails where it has no answer or two."""
    things = see(pixels)
    if match := re.fullmatch(r"how many (\w+)( objects)? are there \?", question):
        name = match[1] if match[2] else {"arches": "arch"}.get(match[1], match[1].removesuffix("s"))
        return NUMBERS[sum(thing["color" if match[2] else "shape"] == name for thing in things)]
    if match := re.fullmatch(r"what (color|shape) is (left|right|above|below)(?: of)? the (\w+) (\w+) \?", question):
        (one,) = [thing for thing in things if (thing["color"], thing["shape"]) == (match[3], match[4])]
        other = neighbor(things, one, match[2])
        assert other is not None, question
        return other[match[1]]
    match = re.fullmatch(r"what (color|shape) is the (\w+)( object)? \?", question)
    assert match is not None, question
    (one,) = [thing for thing in things if thing["color" if match[3] else "shape"] == match[2]]
    return one[match[1]]


def holds(pixels: np.ndarray, caption: str) -> bool:
    """Whether a caption that names two objects is true of a picture."""
    named = [tuple(phrase.split()) for phrase in caption.split(" and ")]
    there = [(thing["color"], thing["shape"]) for thing in see(pixels)]
    return all(there.count(pair) >= named.count(pair) for pair in named)  # type: ignore[arg-type]
