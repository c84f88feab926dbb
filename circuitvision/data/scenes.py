"""Synthetic scenes: coloured, outlined shapes on a grid, with the ground truth of every pixel.

A scene is a value: a tuple of objects, each with a colour, a shape, a size and a grid cell. Its picture is a pure function of those
attributes, so two scenes that differ in one attribute of one object differ in the pixels of that object's cell and nowhere else
(:func:`minimal_pair`), and every attribute can be read back off the pixels.

8 colours × 5 shapes give 40 pairs. Five of them (:data:`TEST_PAIRS`) are for testing and three (:data:`VALIDATION_PAIRS`) for choosing
between training runs; neither appears in any training image, in any role. Every colour misses exactly one shape, and no colour or shape is
itself unseen: what is tested is composition.

Two kinds of object exist for training alone, to keep a model from learning colour and shape as one feature: objects of an
:data:`UNNAMED` colour (a random colour far from every named one) and objects with a :data:`BLOB` for a shape (a random outline).

Not covered: overlap, rotation, texture, lighting. Cells are aligned with the image patches of the models trained on them.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from circuitvision.errors import InputError, checked_seed, nearest

GRID = 4
CELL = 16
IMAGE_SIZE = GRID * CELL

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 230),
    "yellow": (240, 220, 40),
    "cyan": (50, 210, 220),
    "orange": (245, 140, 30),
    "purple": (150, 50, 200),
    "white": (245, 245, 245),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")
SIZES: dict[str, int] = {"small": 9, "medium": 11, "large": 14}
BACKGROUND = (128, 128, 128)
OUTLINE = (0, 0, 0)
UNNAMED = "unnamed"
BLOB = "blob"
BLOB_COUNT = 4096

Pair = tuple[str, str]
ALL_PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
TEST_PAIRS: tuple[Pair, ...] = (
    ("red", "circle"),
    ("green", "square"),
    ("blue", "triangle"),
    ("yellow", "diamond"),
    ("cyan", "cross"),
)
VALIDATION_PAIRS: tuple[Pair, ...] = (("orange", "circle"), ("purple", "square"), ("white", "triangle"))
TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in TEST_PAIRS + VALIDATION_PAIRS)


@dataclass(frozen=True)
class SceneObject:
    """One object: its attributes and its cell (``row`` 0 is at the top, ``column`` 0 at the left).

    ``paint`` is the fill of an object of unnamed colour, ``blob`` the number of the outline of a blob; both are None for named objects.
    """

    color: str
    shape: str
    size: str
    row: int
    column: int
    paint: tuple[int, int, int] | None = None
    blob: int | None = None

    def __post_init__(self) -> None:
        check_name("color", self.color, [*COLORS, UNNAMED])
        check_name("shape", self.shape, [*SHAPES, BLOB])
        check_name("size", self.size, SIZES)
        if not (0 <= self.row < GRID and 0 <= self.column < GRID):
            raise InputError(f"cell ({self.row}, {self.column}) is outside the {GRID} x {GRID} grid")
        if (self.color == UNNAMED) != (self.paint is not None):
            raise InputError("give paint for an object of unnamed color, and only for one")
        if (self.shape == BLOB) != (self.blob is not None):
            raise InputError("give a blob number for a blob, and only for one")

    @property
    def pair(self) -> Pair:
        """The colour and the shape."""
        return self.color, self.shape

    @property
    def cell(self) -> tuple[int, int]:
        """The row and the column."""
        return self.row, self.column

    @property
    def patch(self) -> int:
        """The index of the object's cell in reading order: the image patch that holds it."""
        return self.row * GRID + self.column

    @property
    def fill(self) -> tuple[int, int, int]:
        """The red, green and blue levels inside the outline, 0 to 255."""
        return self.paint if self.paint is not None else COLORS[self.color]

    @property
    def side(self) -> str:
        """Which half of the picture, left or right."""
        return "left" if self.column < GRID // 2 else "right"

    @property
    def height(self) -> str:
        """Which half of the picture, top or bottom."""
        return "top" if self.row < GRID // 2 else "bottom"

    @property
    def mask(self) -> Bool[np.ndarray, "height width"]:
        """Which pixels of the whole picture belong to the object, outline included."""
        whole = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        body, _ = _template(self)
        whole[self.row * CELL : (self.row + 1) * CELL, self.column * CELL : (self.column + 1) * CELL] = body
        return whole

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The smallest box around the mask as (left, top, right, bottom); right and bottom are one past the last pixel, as in Pillow."""
        body, _ = _template(self)
        rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
        left, top = self.column * CELL, self.row * CELL
        return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape} at row {self.row}, column {self.column}"


@dataclass(frozen=True)
class Scene:
    """Objects in different cells of one grid, in reading order."""

    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.objects]
        if len(set(cells)) != len(cells):
            raise InputError(f"two objects share a cell: {sorted(cells)}")
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
        return (
            np.stack([thing.mask for thing in self.objects])
            if self.objects
            else np.zeros((0, IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        )

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """One pixel box per object, in the order of ``objects``."""
        return [thing.box for thing in self.objects]

    @property
    def pairs(self) -> set[Pair]:
        """The colour-shape pairs in the scene."""
        return {thing.pair for thing in self.objects}

    def find(self, **attributes: str) -> list[SceneObject]:
        """The objects that have all the given attributes (``color=``, ``shape=``, ``size=``, ``side=``, ``height=``)."""
        return [
            thing for thing in self.objects if all(getattr(thing, name) == value for name, value in attributes.items())
        ]

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


def as_png(pictures: Sequence[UInt8[np.ndarray, "height width channel"]], scale: int = 3) -> bytes:
    """Pictures of one height side by side as a PNG, every pixel enlarged to a square."""
    gap = np.full((pictures[0].shape[0], 4, 3), 255, dtype=np.uint8)
    row = np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(row.repeat(scale, 0).repeat(scale, 1)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def render(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "scene height width channel"]:
    """Paint scenes: grey background, black outline, one flat fill per object."""
    pictures = np.empty((len(scenes), GRID, CELL, GRID, CELL, 3), dtype=np.uint8)
    pictures[:] = BACKGROUND
    for picture, scene in zip(pictures, scenes, strict=True):
        for thing in scene.objects:
            body, inside = _template(thing)
            cell = picture[thing.row, :, thing.column]
            cell[body] = OUTLINE
            cell[inside] = thing.fill
    return pictures.reshape(len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3)


def sample_scene(
    rng: np.random.Generator,
    *,
    count: int | tuple[int, int] = (2, 3),
    pairs: Sequence[Pair] = TRAIN_PAIRS,
    subject: Pair | None = None,
    sizes: Sequence[str] = ("large",),
    distinct: bool = False,
    unnamed: float = 0.0,
    blobs: float = 0.0,
) -> Scene:
    """Draw a scene at random.

    Args:
        count: number of objects, or the (smallest, largest) number, both included.
        pairs: the colour-shape pairs the objects are drawn from, each equally likely.
        subject: a pair that one of the objects must have; the others never have it.
        sizes: the sizes, each equally likely.
        distinct: no two objects share a colour or a shape.
        unnamed: probability of an object to get a random colour without a name.
        blobs: probability of an object to get a random outline.

    Raises:
        InputError: the request cannot be met (more objects than cells, or than distinct colours or shapes).
    """
    low, high = (count, count) if isinstance(count, int) else count
    limit = min(len(SHAPES), len({color for color, _ in pairs})) if distinct else GRID * GRID
    if not 1 <= low <= high <= limit:
        raise InputError(f"count {count} must lie between 1 and {limit} objects")
    number = int(rng.integers(low, high + 1))
    chosen = _choose_pairs(rng, number, pairs, subject, distinct)
    cells = rng.permutation(GRID * GRID)[:number]
    objects = []
    for (color, shape), cell in zip(chosen, cells, strict=True):
        size = sizes[int(rng.integers(len(sizes)))]
        fixed = (color, shape) == subject
        paint = unnamed_paint(rng) if not fixed and rng.random() < unnamed else None
        blob = int(rng.integers(BLOB_COUNT)) if not fixed and rng.random() < blobs else None
        objects.append(
            SceneObject(
                color=color if paint is None else UNNAMED,
                shape=shape if blob is None else BLOB,
                size=size,
                row=int(cell) // GRID,
                column=int(cell) % GRID,
                paint=paint,
                blob=blob,
            )
        )
    return Scene(tuple(objects))


def minimal_pair(
    scene: Scene,
    rng: np.random.Generator | int,
    *,
    attribute: str = "color",
    index: int | None = None,
    to: str | tuple[int, int] | None = None,
    pairs: Iterable[Pair] | None = None,
    distinct: bool = False,
) -> MinimalPair:
    """Change exactly one attribute of exactly one object.

    Pixels outside the object's cell stay as they are (a new ``cell`` changes the old and the new cell).

    Args:
        rng: a generator or a seed, for what is not given.
        attribute: "color", "shape", "size" or "cell".
        index: which object of ``scene.objects``; drawn at random if None.
        to: the new value; drawn from the possible ones if None.
        pairs: the pairs the changed object may have; all 40 if None.
        distinct: the new value must not be one that another object has (so that a question about it keeps one answer).

    Raises:
        InputError: no such attribute or object, the value is not a new one, or nothing is left to choose from.
    """
    rng = np.random.default_rng(checked_seed(rng))
    check_name("attribute", attribute, ["color", "shape", "size", "cell"])
    if index is None:
        index = int(rng.integers(len(scene.objects)))
    if not 0 <= index < len(scene.objects):
        raise InputError(f"object {index} does not exist: the scene has {len(scene.objects)} objects")
    before = scene.objects[index]
    others = [thing for position, thing in enumerate(scene.objects) if position != index]
    changes = [
        _changed(before, attribute, value) for value in _values(attribute) if value != getattr(before, attribute)
    ]
    allowed = None if pairs is None else set(pairs)
    changes = [
        after
        for after in changes
        if (attribute != "cell" or all(after.cell != other.cell for other in others))
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


def recolor(thing: SceneObject, rng: np.random.Generator) -> SceneObject:
    """The same object in a random colour without a name."""
    return replace(thing, color=UNNAMED, paint=unnamed_paint(rng))


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known, with the nearest ones."""
    known = list(known)
    if name not in known:
        raise InputError(f"no {kind} is called {name!r}; nearest: {', '.join(nearest(str(name), known))}")


def _values(attribute: str) -> list[Any]:
    if attribute == "cell":
        return [(row, column) for row in range(GRID) for column in range(GRID)]
    return list({"color": COLORS, "shape": SHAPES, "size": SIZES}[attribute])


def _changed(thing: SceneObject, attribute: str, value: Any) -> SceneObject:
    if attribute == "cell":
        return replace(thing, row=value[0], column=value[1])
    if attribute == "color":
        return replace(thing, color=value, paint=None)
    if attribute == "shape":
        return replace(thing, shape=value, blob=None)
    return replace(thing, size=value)


def _choose_pairs(
    rng: np.random.Generator, number: int, pairs: Sequence[Pair], subject: Pair | None, distinct: bool
) -> list[Pair]:
    chosen: list[Pair] = [] if subject is None else [subject]
    for _ in range(10_000):
        if len(chosen) == number:
            return chosen
        candidate = pairs[int(rng.integers(len(pairs)))]
        clash = any(candidate[0] == pair[0] or candidate[1] == pair[1] for pair in chosen)
        if candidate != subject and not (distinct and clash):
            chosen.append(candidate)
    raise InputError(
        f"{number} objects cannot be drawn from {len(pairs)} pairs with subject={subject} and distinct={distinct}"
    )


def unnamed_paint(rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour too far from every named one, the background and the outline to be taken for it."""
    known = np.array([*COLORS.values(), BACKGROUND, OUTLINE])
    while True:
        paint = rng.integers(0, 256, size=3)
        if np.sqrt(((known - paint) ** 2).sum(1)).min() > 60:
            return int(paint[0]), int(paint[1]), int(paint[2])


def _template(thing: SceneObject) -> tuple[Bool[np.ndarray, "cell cell"], Bool[np.ndarray, "cell cell"]]:
    if thing.blob is not None:
        return blob_template(thing.blob, thing.size)
    return shape_template(thing.shape, thing.size)


@functools.cache
def shape_template(shape: str, size: str) -> tuple[Bool[np.ndarray, "cell cell"], Bool[np.ndarray, "cell cell"]]:
    """The pixels of one cell that a named shape covers: (with outline, fill alone)."""
    extent = SIZES[size]
    axis = (np.arange(extent) + 0.5) * 2 / extent - 1
    down, across = np.meshgrid(axis, axis, indexing="ij")
    bodies = {
        "circle": across**2 + down**2 <= 1,
        "square": np.maximum(abs(across), abs(down)) <= 0.92,
        "triangle": abs(across) <= (down + 1) / 2 + 0.02,
        "diamond": abs(across) + abs(down) <= 1.02,
        "cross": np.minimum(abs(across), abs(down)) <= (0.4 if extent > 12 else 0.3),
    }
    return _outlined(bodies[shape], extent)


@functools.lru_cache(maxsize=BLOB_COUNT * len(SIZES))
def blob_template(number: int, size: str) -> tuple[Bool[np.ndarray, "cell cell"], Bool[np.ndarray, "cell cell"]]:
    """The pixels of one cell that blob ``number`` covers: (with outline, fill alone).

    A blob is a closed curve around the centre whose radius is a random sum of the first few harmonics of the angle.
    """
    rng = np.random.default_rng([number, 20])
    extent = SIZES[size]
    axis = (np.arange(extent) + 0.5) * 2 / extent - 1
    down, across = np.meshgrid(axis, axis, indexing="ij")
    angle = np.arctan2(down, across)
    radius = np.full_like(angle, rng.uniform(0.65, 0.95))
    for harmonic in range(1, 7):
        radius += rng.normal(0, 0.22) * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    return _outlined(np.hypot(down, across) <= np.maximum(radius, 0.45), extent)


def _outlined(body: Bool[np.ndarray, "extent extent"], extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre a body in its cell and peel the outline off its fill."""
    margin = (CELL - extent) // 2
    covered = np.zeros((CELL, CELL), dtype=bool)
    covered[margin : margin + extent, margin : margin + extent] = body
    inside = covered
    for _ in range(2 if extent > 12 else 1):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    covered.flags.writeable = False
    inside.flags.writeable = False
    return covered, inside
