"""Pictures of one object on a coloured background that goes with the object's class as often as is asked for.

After Waterbirds (Sagawa et al. 2020, arXiv 1911.08731): two classes, told by the object's shape, and two backgrounds, each of which goes with one
class; ``(class, background)`` is one of four *groups*. The object's colour, size and place say nothing of its class.

Labels are noisy as in Colored MNIST (Arjovsky et al. 2019, arXiv 1907.02893), where both cues predict the label and neither alone decides it: of the
pictures with a small object a share is labelled as the other class, and the background goes with the *label*. A model that fits such labels needs the
background for small objects and the shape for large ones. Test pictures are labelled by their shape.

Not covered: textured or photographed backgrounds, several objects, more than two classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from circuitvision.data.pairs import Pairs
from circuitvision.data.scenes import GRID, DrawnScene, Scene, SceneObject, check_name, render
from circuitvision.data.sides import Side
from circuitvision.errors import InputError, checked_seed

CLASSES: dict[str, str] = {"circle": "blue", "square": "green"}
"""The classes, which are shapes, each with the background that goes with it."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"blue": (60, 90, 160), "green": (70, 135, 75)}
PAINTS: tuple[str, ...] = ("red", "yellow", "orange", "purple", "white")
"""Colours of objects: those that are no background's."""
SIZES: tuple[str, ...] = ("small", "large")
SHADE = 25
"""How many levels lighter or darker than its named colour a background may be."""
Group = tuple[str, str]
GROUPS: tuple[Group, ...] = tuple((label, background) for label in CLASSES for background in BACKGROUNDS)
"""All (class, background)."""


@dataclass(frozen=True)
class BackgroundScene(DrawnScene):
    """One object on a background. ``label`` is the class in the data set, ``shade`` is added to the background's levels."""

    thing: SceneObject
    background: str
    label: str
    shade: int = 0

    def __post_init__(self) -> None:
        check_name("background", self.background, BACKGROUNDS)
        check_name("class", self.label, CLASSES)
        check_name("class", self.thing.shape, CLASSES)

    @property
    def objects(self) -> tuple[SceneObject, ...]:  # type: ignore[override]
        """The one object."""
        return (self.thing,)

    @property
    def group(self) -> Group:
        """The class and the background."""
        return self.label, self.background

    @property
    def agrees(self) -> bool:
        """Whether the background is the one that goes with the class."""
        return CLASSES[self.label] == self.background

    @property
    def pixels(self) -> UInt8[np.ndarray, "height width channel"]:
        """The picture as levels 0 to 255."""
        return render_backgrounds([self])[0]

    def __str__(self) -> str:
        return f"{self.thing} on {self.background}"


def render_backgrounds(scenes: Sequence[BackgroundScene]) -> UInt8[np.ndarray, "scene height width channel"]:
    """Paint the objects, and every pixel that is none's in the background's colour."""
    pictures = render([Scene((scene.thing,)) for scene in scenes])
    for picture, scene in zip(pictures, scenes, strict=True):
        picture[~scene.thing.mask] = np.array(BACKGROUNDS[scene.background]) + scene.shade
    return pictures


def sample_backgrounds(
    count: int,
    rng: np.random.Generator | int,
    *,
    agreement: float | None = None,
    small_errors: float = 0.0,
    sizes: Sequence[str] = SIZES,
) -> list[BackgroundScene]:
    """Draw pictures with their labels.

    Args:
        count: how many.
        rng: a generator or a seed.
        agreement: probability that the background is the one that goes with the label; None: the four groups in turn, equally often.
        small_errors: probability that a picture with a small object is labelled as the other class.
        sizes: the sizes of objects, each equally likely.

    Raises:
        InputError: a probability outside 0 … 1.
    """
    rng = np.random.default_rng(checked_seed(rng))
    for name, share in (("agreement", agreement), ("small_errors", small_errors)):
        if share is not None and not 0 <= share <= 1:
            raise InputError(f"{name}={share!r} is no probability: give 0 … 1.")
    found = []
    labels = list(CLASSES)
    for number in range(count):
        label = labels[int(rng.integers(2))]
        background = CLASSES[label]
        if agreement is None:
            label, background = GROUPS[number % len(GROUPS)]
        elif rng.random() >= agreement:
            background = _other(BACKGROUNDS, background)
        size = sizes[int(rng.integers(len(sizes)))]
        mistaken = size == "small" and rng.random() < small_errors
        shape = _other(CLASSES, label) if mistaken else label
        place = int(rng.integers(GRID * GRID))
        thing = SceneObject(PAINTS[int(rng.integers(len(PAINTS)))], shape, size, *divmod(place, GRID))
        found.append(BackgroundScene(thing, background, label, int(rng.integers(-SHADE, SHADE + 1))))
    return found


def background_side(scenes: Sequence[BackgroundScene], texts: Any = None, answers: Sequence[Any] | None = None) -> Side:
    """Pictures as a data set with the masks of their objects; answers are the labels, or ``answers`` beside ``texts`` (dual encoders)."""
    return Side(
        [scene.image for scene in scenes],
        texts,
        answers=[scene.label for scene in scenes] if answers is None else answers,
        boxes=[scene.thing.box for scene in scenes],
        masks=[scene.thing.mask for scene in scenes],
    )


def background_pairs(count: int, seed: int, **keywords: Any) -> Pairs:
    """Pairs of pictures that differ in their background alone: clean on the one that goes with the class, corrupt on the other.

    The answer is the object's class. The foil is the class that the corrupt background goes with: who reads the background changes its answer.
    ``keywords`` go to :func:`sample_backgrounds`.
    """
    scenes = sample_backgrounds(count, checked_seed(seed), **{"agreement": 1.0, **keywords})
    others = [dataclasses.replace(scene, background=_other(BACKGROUNDS, scene.background)) for scene in scenes]
    where: dict[str, Any] = {
        "boxes": [scene.thing.box for scene in scenes],
        "masks": [scene.thing.mask for scene in scenes],
    }
    return Pairs(
        [scene.image for scene in scenes],
        corrupt_images=[scene.image for scene in others],
        answers=[scene.label for scene in scenes],
        foils=[_other(CLASSES, scene.label) for scene in scenes],
        records=list(zip(scenes, others, strict=True)),
        **where,
        **{f"corrupt_{name}": held for name, held in where.items()},
    )


def _other(names: Iterable[str], name: str) -> str:
    """The other one of two."""
    return next(other for other in names if other != name)
