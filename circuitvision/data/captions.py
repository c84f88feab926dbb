"""Captions that name two objects of a scene, true and nearly true.

A caption reads "red circle and blue square"; the order says nothing. Scenes are of either world (:mod:`circuitvision.data.worlds`): of two objects,
or of three, of which a caption names any two. A phrase may leave out what has no name ("circle", "red object"),
which training uses; a caption to be tested on names colour and shape of both objects. :func:`true_captions` lists every caption that is
true of a scene, so that a wrong caption is known to be wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from circuitvision.data import binding
from circuitvision.data.scenes import BLOB, COLORS, SHAPES, UNNAMED, Pair, Scene, SceneObject
from circuitvision.data.worlds import World, find_world
from circuitvision.errors import InputError, checked_seed

NEGATIVE_KINDS: tuple[str, ...] = ("color", "shape", "swap")
ONE_ATTRIBUTE: tuple[str, ...] = ("color", "shape")
WORDS = ("object", "and")
_NAMES: tuple[str, ...] = tuple(dict.fromkeys((*COLORS, *SHAPES, *binding.SHAPES)))
_TRIES = 1000


@dataclass(frozen=True)
class Caption:
    """What a caption says: the pairs of two objects. A None in a pair is left unsaid."""

    first: tuple[str | None, str | None]
    second: tuple[str | None, str | None]

    def __str__(self) -> str:
        return f"{_phrase(self.first)} and {_phrase(self.second)}"

    @property
    def pairs(self) -> set[tuple[str | None, str | None]]:
        """The two pairs the caption names."""
        return {self.first, self.second}


@dataclass(frozen=True)
class Retrieval:
    """One scene and captions to choose from; ``captions[answer]`` alone is true. ``kinds[i]`` says how caption ``i`` was made."""

    scene: Scene | binding.Scene
    captions: tuple[str, ...]
    answer: int
    kinds: tuple[str, ...]


def vocabulary(world: str = "shapes") -> list[str]:
    """Every word of every caption of a world, each once, in a fixed order."""
    there = find_world(world)
    return [*WORDS, *there.colors, *there.shapes]


def true_captions(scene: Scene | binding.Scene, partial: bool = True) -> list[Caption]:
    """Every caption that is true of the scene, those that leave a colour or a shape unsaid included if ``partial``.

    Without ``partial`` a caption says all that has a name.
    """
    return [
        Caption(said_first, said_second)
        for first in scene.objects
        for second in scene.objects
        if first is not second
        for said_first in _sayings(first, partial)
        for said_second in _sayings(second, partial)
    ]


def negative(caption: Caption, kind: str, rng: np.random.Generator, pairs: Sequence[Pair]) -> Caption | None:
    """A caption made wrong on purpose, or None if that is impossible.

    "color" and "shape" replace one word of one object; "swap" exchanges the two colours, so that every word stays and only what belongs
    together changes. Only ``pairs`` are named. The result may happen to be true of some scene: compare with :func:`true_captions`.

    Raises:
        InputError: no such kind.
    """
    if kind == "swap":
        first, second = (caption.second[0], caption.first[1]), (caption.first[0], caption.second[1])
        made = Caption(first, second)
        return made if first in pairs and second in pairs and made.pairs != caption.pairs else None
    if kind not in ONE_ATTRIBUTE:
        raise InputError(f"no kind of negative caption is called {kind!r}; there are {', '.join(NEGATIVE_KINDS)}")
    slot, which = int(rng.integers(2)), ONE_ATTRIBUTE.index(kind)
    old = (caption.first, caption.second)[slot]
    if old[which] is None:
        return None
    # In one order whatever the order of the pairs, so that a seed's draws do not hang on it.
    values = sorted({pair[which] for pair in pairs} - {old[which]}, key=_NAMES.index)
    options = [(value, old[1]) if which == 0 else (old[0], value) for value in values]
    options = [option for option in options if None in option or option in pairs]
    if not options:
        return None
    new = options[int(rng.integers(len(options)))]
    return replace(caption, first=new) if slot == 0 else replace(caption, second=new)


def sample_retrievals(
    count: int,
    seed: int,
    *,
    world: str = "shapes",
    captions: int = 16,
    subjects: Sequence[Pair] | None = None,
    others: Sequence[Pair] | None = None,
    hard: int = 8,
    kinds: Sequence[str] = ONE_ATTRIBUTE,
    with_subject: int = 4,
    **keywords: Any,
) -> list[Retrieval]:
    """Draw scenes with distinct captions, exactly one of which is true.

    Args:
        world: "shapes" (scenes of two objects, both named) or "binding" (of three, two of them named).
        captions: how many captions to choose from.
        subjects: the pairs of which one is in every scene and in its true caption (the held-out ones if not given); they come up equally often.
        others: the pairs of the other objects (the trained ones if not given).
        hard: how many wrong captions are made from the true one.
        kinds: how they are made, each equally likely (see :func:`negative`); by default one word is wrong.
        with_subject: at least this many of the distinct pairs named in each set of captions come from ``subjects``.
        keywords: go to the world's ``sample_scene`` (``sizes=`` of shapes).

    Raises:
        InputError: no such world or kind, or too few wrong captions can be made ("swap" alone makes one).
    """
    there = find_world(world)
    rng = np.random.default_rng(checked_seed(seed))
    subjects = there.test_pairs if subjects is None else subjects
    others = there.train_pairs if others is None else others
    found: list[Retrieval] = []
    while len(found) < count:
        subject = subjects[len(found) % len(subjects)]
        scene, true = _captioned(there, rng, subject, others, keywords)
        taken = {str(caption) for caption in true_captions(scene)}
        chosen: list[tuple[str, Caption]] = []

        def add(kind: str, caption: Caption | None, taken: set[str] = taken, chosen: list = chosen) -> None:
            if caption is not None and str(caption) not in taken:
                taken.add(str(caption))
                chosen.append((kind, caption))

        for _ in range(_TRIES):
            if len(chosen) >= hard:
                break
            kind = kinds[int(rng.integers(len(kinds)))]
            add(kind, negative(true, kind, rng, there.all_pairs))
        wanted = [pair for pair in subjects if pair != subject][: with_subject - 1]
        for _ in range(_TRIES):
            if not hard <= len(chosen) < captions - 1:
                break
            forced = wanted.pop() if wanted else subjects[int(rng.integers(len(subjects)))]
            add("other", _captioned(there, rng, forced, others, keywords)[1])
        if len(chosen) < max(hard, captions - 1):
            raise InputError(
                f"Found only {len(chosen)} wrong captions for {str(true)!r}, where captions={captions} and hard={hard} ask for more, "
                f"{hard} of the kinds {', '.join(kinds)}: ask for fewer, or give more kinds, subjects or others."
            )
        order = rng.permutation(captions)
        listed = [("true", true), *chosen]
        found.append(
            Retrieval(
                scene,
                tuple(str(listed[index][1]) for index in order),
                int(np.flatnonzero(order == 0)[0]),
                tuple(listed[index][0] for index in order),
            )
        )
    return found


def _captioned(
    world: World, rng: np.random.Generator, subject: Pair, others: Sequence[Pair], keywords: dict[str, Any]
) -> tuple[Scene | binding.Scene, Caption]:
    """A scene with an object of the pair ``subject``, and a caption that names it."""
    scene = world.captioned(rng, pairs=others, subject=subject, **keywords)
    options = [caption for caption in true_captions(scene, partial=False) if subject in caption.pairs]
    return scene, options[int(rng.integers(len(options)))]


@functools.cache
def _phrase(said: tuple[str | None, str | None]) -> str:
    color, shape = said
    return " ".join(word for word in (color, shape or "object") if word)


def _sayings(thing: SceneObject | binding.SceneObject, partial: bool) -> list[tuple[str | None, str | None]]:
    """What can be said of an object: all that has a name first, then less."""
    color = None if thing.color == UNNAMED else thing.color
    shape = None if thing.shape == BLOB else thing.shape
    full = [(color, shape)]
    return (
        full + [said for said in ((color, None), (None, shape), (None, None)) if said not in full] if partial else full
    )
