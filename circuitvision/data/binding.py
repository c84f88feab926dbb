"""Scenes in which shape and colour have to be bound: no patch of the picture tells both.

An object covers 2 × 2 patches. Its shape is an outline with an upper and a lower half, each an arc, a corner or a slope; its colour is a wedge
in one quarter, where the outline is left out::

    arc over arc        circle      corner over corner   square     slope over slope    diamond
    arc over corner     arch        corner over slope    shield     slope over arc      drop
    corner over arc     cup         slope over corner    house

Each half belongs to two or three shapes, and the wedge looks the same in all of them. So one patch shows the colour or half a shape: to name the
shape a model joins patches of one object, and to name the object it joins them with the patch that holds the wedge. Objects stand at any of
7 × 7 places, in two sizes, a pixel off to any side.

8 colours × 8 shapes give 64 pairs. Sixteen (:data:`TEST_PAIRS`, two of every colour and of every shape) are for testing and eight
(:data:`VALIDATION_PAIRS`) for choosing between training runs; neither appears in any training picture, in any role.

Objects of an :data:`~circuitvision.data.scenes.UNNAMED` colour (a random one far from every named one) or shape (a random kind for every quarter,
left and right not alike) are for training alone: they keep a model from learning colour and shape as one feature.

As in :mod:`circuitvision.data.scenes`, a scene is a value and its picture a pure function of it: scenes that differ in one attribute of one object
(:func:`minimal_pair`) differ in pixels of that object's patches and nowhere else.

Not covered: overlap, rotation, texture.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from circuitvision.data.scenes import BACKGROUND, COLORS, OUTLINE, UNNAMED, as_png, check_name, unnamed_paint
from circuitvision.errors import InputError, checked_seed

PATCH = 8
GRID = 8
IMAGE_SIZE = PATCH * GRID
SPAN = 2
PLACES = GRID - SPAN + 1
WINDOW = SPAN * PATCH
ROOM = (GRID // SPAN) ** 2

HALVES: dict[str, tuple[str, str]] = {
    "circle": ("arc", "arc"),
    "square": ("corner", "corner"),
    "diamond": ("slope", "slope"),
    "arch": ("arc", "corner"),
    "shield": ("corner", "slope"),
    "drop": ("slope", "arc"),
    "cup": ("corner", "arc"),
    "house": ("slope", "corner"),
}
"""Every shape's upper and lower half."""
KINDS: tuple[str, ...] = ("arc", "corner", "slope")
SHAPES: tuple[str, ...] = tuple(HALVES)
SIZES: dict[str, int] = {"small": 12, "large": 14}
QUARTERS: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
SHIFTS: tuple[tuple[int, int], ...] = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
DIRECTIONS: tuple[str, ...] = ("left", "right", "above", "below")
OBJECTS = 3

Pair = tuple[str, str]
_COLORS = tuple(COLORS)
ALL_PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
TEST_PAIRS: tuple[Pair, ...] = tuple(
    (_COLORS[(number + step) % 8], shape) for step in (0, 3) for number, shape in enumerate(SHAPES)
)
VALIDATION_PAIRS: tuple[Pair, ...] = tuple((_COLORS[(number + 5) % 8], shape) for number, shape in enumerate(SHAPES))
TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in TEST_PAIRS + VALIDATION_PAIRS)


@dataclass(frozen=True)
class SceneObject:
    """One object: its attributes and where it stands.

    ``row`` and ``column`` count patches, from the top left, and name the first of the object's; ``quarter`` is where the wedge is;
    ``shift`` moves the drawing within its patches by pixels (down, right). ``paint`` is the fill of an object of unnamed colour, ``outline`` the kind
    of each quarter, in the order of :data:`QUARTERS`, of one of unnamed shape; both are None for named ones.
    """

    color: str
    shape: str
    quarter: str
    size: str
    row: int
    column: int
    shift: tuple[int, int] = (0, 0)
    paint: tuple[int, int, int] | None = None
    outline: tuple[str, str, str, str] | None = None

    def __post_init__(self) -> None:
        check_name("color", self.color, [*COLORS, UNNAMED])
        check_name("shape", self.shape, [*SHAPES, UNNAMED])
        check_name("quarter", self.quarter, QUARTERS)
        check_name("size", self.size, SIZES)
        if not (0 <= self.row < PLACES and 0 <= self.column < PLACES):
            raise InputError(
                f"An object cannot stand at ({self.row}, {self.column}): rows and columns run from 0 to {PLACES - 1}."
            )
        if self.shift not in SHIFTS:
            raise InputError(f"shift={self.shift} is not understood: (down, right), each -1, 0 or 1.")
        if (self.color == UNNAMED) != (self.paint is not None):
            raise InputError("give paint for an object of unnamed color, and only for one")
        if (self.shape == UNNAMED) != (self.outline is not None):
            raise InputError("give an outline for an object of unnamed shape, and only for one")

    @property
    def pair(self) -> Pair:
        """The colour and the shape."""
        return self.color, self.shape

    @property
    def cell(self) -> tuple[int, int]:
        """The row and the column of its first patch."""
        return self.row, self.column

    @property
    def patches(self) -> tuple[int, ...]:
        """The indices of its four patches, in reading order."""
        return tuple((self.row + down) * GRID + self.column + right for down in range(SPAN) for right in range(SPAN))

    @property
    def wedge_patch(self) -> int:
        """The patch that shows the colour."""
        return self.patches[QUARTERS.index(self.quarter)]

    @property
    def outline_patches(self) -> tuple[int, ...]:
        """The three patches that show the outline, in reading order."""
        return tuple(patch for patch in self.patches if patch != self.wedge_patch)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The red, green and blue levels of the wedge, 0 to 255."""
        return self.paint if self.paint is not None else COLORS[self.color]

    @property
    def kinds(self) -> tuple[str, str, str, str]:
        """What each quarter of the outline is, in the order of :data:`QUARTERS`."""
        if self.outline is not None:
            return self.outline
        upper, lower = HALVES[self.shape]
        return upper, upper, lower, lower

    @property
    def mask(self) -> Bool[np.ndarray, "height width"]:
        """Which pixels of the whole picture belong to the object: outline and wedge."""
        whole = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        whole[_window(self)] = _template(self.kinds, self.size, self.quarter, self.shift) > 0
        return whole

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The smallest box around the mask as (left, top, right, bottom); right and bottom are one past the last pixel, as in Pillow."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def overlaps(self, other: SceneObject) -> bool:
        """Whether the two would share a patch."""
        return abs(self.row - other.row) < SPAN and abs(self.column - other.column) < SPAN

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape} at row {self.row}, column {self.column}, wedge {self.quarter}"


@dataclass(frozen=True)
class Scene:
    """Objects that share no patch, in reading order."""

    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        for number, thing in enumerate(self.objects):
            for other in self.objects[:number]:
                if thing.overlaps(other):
                    raise InputError(f"Two objects share a patch: the {other} and the {thing}.")
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda thing: thing.cell)))

    @property
    def pixels(self) -> UInt8[np.ndarray, "height width channel"]:
        """The picture as levels 0 to 255."""
        return render([self])[0]

    @property
    def image(self) -> Image.Image:
        """The picture for any image processor."""
        return Image.fromarray(self.pixels)

    @property
    def masks(self) -> Bool[np.ndarray, "object height width"]:
        """One mask per object, in the order of ``objects``."""
        masks = [thing.mask for thing in self.objects]
        return np.stack(masks) if masks else np.zeros((0, IMAGE_SIZE, IMAGE_SIZE), dtype=bool)

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """One pixel box per object, in the order of ``objects``."""
        return [thing.box for thing in self.objects]

    @property
    def pairs(self) -> set[Pair]:
        """The colour-shape pairs in the scene."""
        return {thing.pair for thing in self.objects}

    def find(self, **attributes: Any) -> list[SceneObject]:
        """The objects that have all the given attributes (``color=``, ``shape=``, ``size=``, ``quarter=``, …)."""
        return [
            thing for thing in self.objects if all(getattr(thing, name) == value for name, value in attributes.items())
        ]

    def neighbor(self, thing: SceneObject, direction: str) -> SceneObject | None:
        """The nearest object wholly to one side ("left", "right", "above", "below"), or None where there is none or two are about as near.

        Only rows or only columns count. Two are about as near when neither is wholly beyond the other.
        """
        check_name("direction", direction, DIRECTIONS)
        axis, sign = (
            ("column" if direction in ("left", "right") else "row"),
            (-1 if direction in ("left", "above") else 1),
        )
        away = sorted(
            (sign * (getattr(other, axis) - getattr(thing, axis)), number) for number, other in enumerate(self.objects)
        )
        away = [(distance, number) for distance, number in away if distance >= SPAN]
        if not away or (len(away) > 1 and away[1][0] - away[0][0] < SPAN):
            return None
        return self.objects[away[0][1]]

    def __str__(self) -> str:
        return "; ".join(map(str, self.objects))

    def _repr_png_(self) -> bytes:
        """The picture, enlarged without blur: what notebooks show."""
        return as_png([self.pixels])


@dataclass(frozen=True)
class MinimalPair:
    """Two scenes that differ in one attribute of one object: ``before`` in ``clean``, ``after`` in ``corrupt``."""

    clean: Scene
    corrupt: Scene
    attribute: str
    before: SceneObject
    after: SceneObject

    def _repr_png_(self) -> bytes:
        """Both pictures side by side, clean first."""
        return as_png([self.clean.pixels, self.corrupt.pixels])


def render(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "scene height width channel"]:
    """Paint scenes: grey background, black outline, one flat wedge per object."""
    pictures = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    pictures[:] = BACKGROUND
    for picture, scene in zip(pictures, scenes, strict=True):
        for thing in scene.objects:
            levels = np.array([BACKGROUND, OUTLINE, thing.fill], dtype=np.uint8)
            picture[_window(thing)] = levels[_template(thing.kinds, thing.size, thing.quarter, thing.shift)]
    return pictures


def sample_scene(
    rng: np.random.Generator | int,
    *,
    count: int = OBJECTS,
    pairs: Sequence[Pair] = TRAIN_PAIRS,
    subjects: Sequence[Pair] = (),
    distinct: bool = True,
    unnamed: float = 0.0,
) -> Scene:
    """Draw a scene at random.

    Args:
        count: the number of objects.
        pairs: the colour-shape pairs the objects are drawn from, each equally likely.
        subjects: pairs that the first objects drawn have; the others are drawn from ``pairs``.
        distinct: no two objects share a colour or a shape.
        unnamed: probability of every object but the subjects to get an unnamed colour, and an unnamed shape.

    Raises:
        InputError: the request cannot be met (more objects than find room, or than distinct colours or shapes; subjects that share one).
    """
    rng = np.random.default_rng(checked_seed(rng))
    if not max(1, len(subjects)) <= count <= ROOM:
        raise InputError(
            f"count={count} must lie between 1 and {ROOM} objects, and be no less than the subjects ({len(subjects)})."
        )
    if distinct and any(len({pair[which] for pair in subjects}) < len(subjects) for which in (0, 1)):
        raise InputError(f"The subjects {list(subjects)} share a colour or a shape: give others, or distinct=False.")
    chosen = _choose_pairs(rng, count, pairs, subjects, distinct)
    things = [_place(pair, cell, rng) for pair, cell in zip(chosen, _cells(rng, count), strict=True)]
    if unnamed:
        things[len(subjects) :] = [unname(thing, rng, unnamed) for thing in things[len(subjects) :]]
    return Scene(tuple(things))


def unname(thing: SceneObject, rng: np.random.Generator, probability: float = 1.0) -> SceneObject:
    """The same object, each of its colour and its shape with this probability replaced by an unnamed one."""
    if rng.random() < probability:
        thing = replace(thing, color=UNNAMED, paint=unnamed_paint(rng))
    if rng.random() < probability:
        halves = rng.integers(len(KINDS), size=(2, 2))
        # The half without the wedge shows that left and right differ: else the outline could be taken for a named shape.
        whole = 1 if thing.quarter.startswith("top") else 0
        halves[whole] = rng.permutation(len(KINDS))[:2]
        top_left, top_right, bottom_left, bottom_right = (KINDS[kind] for kind in halves.flatten().tolist())
        thing = replace(thing, shape=UNNAMED, outline=(top_left, top_right, bottom_left, bottom_right))
    return thing


def place(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """A scene of objects with exactly these pairs, standing anywhere."""
    return Scene(tuple(_place(pair, cell, rng) for pair, cell in zip(pairs, _cells(rng, len(pairs)), strict=True)))


def minimal_pair(
    scene: Scene,
    rng: np.random.Generator | int,
    *,
    attribute: str = "color",
    index: int | None = None,
    to: Any = None,
    pairs: Iterable[Pair] | None = None,
    distinct: bool = False,
) -> MinimalPair:
    """Change exactly one attribute of exactly one object.

    Pixels outside the object's patches stay as they are (a new ``cell`` changes the old and the new patches).

    Args:
        rng: a generator or a seed, for what is not given.
        attribute: "color", "shape", "quarter", "size", "shift" or "cell".
        index: which object of ``scene.objects``; drawn at random if None.
        to: the new value; drawn from the possible ones if None.
        pairs: the pairs the changed object may have; all 64 if None.
        distinct: the new value must not be one that another object has (so that a question about it keeps one answer).

    Raises:
        InputError: no such attribute or object, the value is not a new one, or nothing is left to choose from.
    """
    rng = np.random.default_rng(checked_seed(rng))
    check_name("attribute", attribute, _VALUES)
    if index is None:
        index = int(rng.integers(len(scene.objects)))
    if not 0 <= index < len(scene.objects):
        raise InputError(f"object {index} does not exist: the scene has {len(scene.objects)} objects")
    before = scene.objects[index]
    others = [thing for position, thing in enumerate(scene.objects) if position != index]
    allowed = None if pairs is None else set(pairs)
    changes = [
        _changed(before, attribute, value) for value in _VALUES[attribute] if value != getattr(before, attribute)
    ]
    changes = [
        after
        for after in changes
        if not any(after.overlaps(other) for other in others)
        and (not distinct or all(getattr(after, attribute) != getattr(other, attribute) for other in others))
        and (allowed is None or after.pair in allowed)
        and (to is None or getattr(after, attribute) == to)
    ]
    if not changes:
        raise InputError(
            f"no new {attribute} is possible for the {before}" + (f" with to={to!r}" if to is not None else "")
        )
    after = changes[int(rng.integers(len(changes)))]
    return MinimalPair(scene, Scene((*others, after)), attribute, before, after)


_VALUES: dict[str, list[Any]] = {
    "color": list(COLORS),
    "shape": list(SHAPES),
    "quarter": list(QUARTERS),
    "size": list(SIZES),
    "shift": list(SHIFTS),
    "cell": [(row, column) for row in range(PLACES) for column in range(PLACES)],
}


def _changed(thing: SceneObject, attribute: str, value: Any) -> SceneObject:
    if attribute == "cell":
        return replace(thing, row=value[0], column=value[1])
    named = {"color": {"paint": None}, "shape": {"outline": None}}.get(attribute, {})
    return replace(thing, **{attribute: value}, **named)


def _choose_pairs(
    rng: np.random.Generator, count: int, pairs: Sequence[Pair], subjects: Sequence[Pair], distinct: bool
) -> list[Pair]:
    for _ in range(100):
        chosen = list(subjects)
        for _ in range(1000):
            if len(chosen) == count:
                return chosen
            if not pairs:
                break
            candidate = pairs[int(rng.integers(len(pairs)))]
            clash = any(candidate[0] == pair[0] or candidate[1] == pair[1] for pair in chosen)
            if not (distinct and clash):
                chosen.append(candidate)
    raise InputError(
        f"{count} objects cannot be drawn from {len(pairs)} pairs with subjects={subjects} and distinct={distinct}"
    )


def _cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Places for objects that share no patch."""
    for _ in range(1000):
        found: list[tuple[int, int]] = []
        for place in rng.integers(PLACES * PLACES, size=20 * count).tolist():
            row, column = divmod(place, PLACES)
            if all(abs(row - down) >= SPAN or abs(column - right) >= SPAN for down, right in found):
                found.append((row, column))
                if len(found) == count:
                    return found
    raise InputError(f"{count} objects of {SPAN} x {SPAN} patches find no room on {GRID} x {GRID} patches; draw fewer")


def _place(pair: Pair, cell: tuple[int, int], rng: np.random.Generator) -> SceneObject:
    quarter, size, shift = (int(rng.integers(number)) for number in (len(QUARTERS), len(SIZES), len(SHIFTS)))
    return SceneObject(*pair, QUARTERS[quarter], tuple(SIZES)[size], *cell, SHIFTS[shift])


def _window(thing: SceneObject) -> tuple[slice, slice]:
    top, left = thing.row * PATCH, thing.column * PATCH
    return slice(top, top + WINDOW), slice(left, left + WINDOW)


@functools.cache
def _template(
    kinds: tuple[str, str, str, str], size: str, quarter: str, shift: tuple[int, int]
) -> UInt8[np.ndarray, "window window"]:
    """What the pixels of an object's patches show: 0 background, 1 outline, 2 wedge."""
    axis = np.arange(WINDOW) + 0.5 - WINDOW / 2
    down, right = np.meshgrid(axis - shift[0], axis - shift[1], indexing="ij")
    body = _body(kinds, SIZES[size], down, right)
    inside = body
    for _ in range(2):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    vertical, horizontal = quarter.split()
    outwards = (-down if vertical == "top" else down), (-right if horizontal == "left" else right)
    there = (outwards[0] > 0) & (outwards[1] > 0)
    wedge = there & (np.minimum(*outwards) > 1) & ((outwards[0] - 1) ** 2 + (outwards[1] - 1) ** 2 <= 5**2)
    shown = np.where(wedge, 2, body & ~inside & ~there).astype(np.uint8)
    shown.flags.writeable = False
    return shown


def _body(
    kinds: tuple[str, str, str, str], extent: int, down: np.ndarray, right: np.ndarray
) -> Bool[np.ndarray, "window window"]:
    """The pixels inside an outline."""
    away, across = 2 * abs(down) / extent, 2 * abs(right) / extent
    inside = {
        "arc": away**2 + across**2 <= 1,
        "corner": np.maximum(away, across) <= 1,
        "slope": away + across <= 1 + 1 / extent,
    }
    upper, lower = (
        np.where(right < 0, inside[left_kind], inside[right_kind]) for left_kind, right_kind in (kinds[:2], kinds[2:])
    )
    return np.where(down < 0, upper, lower) & (np.maximum(away, across) <= 1)
