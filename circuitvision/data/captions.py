"""Captions of two-object scenes: which one stands where relative to the other.

A caption reads "red circle left of blue square". The relation is one of four; of each pair of objects two, four or more captions are
true, and :func:`true_captions` lists all of them, so that a wrong caption is known to be wrong. A phrase may leave out what has no name
("circle", "red object"), which training uses; a caption to be tested on names colour and shape of both objects.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from circuitvision.data.scenes import (
    ALL_PAIRS,
    BLOB,
    COLORS,
    SHAPES,
    TEST_PAIRS,
    TRAIN_PAIRS,
    UNNAMED,
    Pair,
    Scene,
    SceneObject,
    sample_scene,
)
from circuitvision.errors import InputError

RELATIONS: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NEGATIVE_KINDS: tuple[str, ...] = ("color", "shape", "relation", "swap")
WORDS = ("object", "of", "left", "right", "above", "below")


@dataclass(frozen=True)
class Caption:
    """What a caption says: the first object's pair, the relation, the second object's pair. A None in a pair is left unsaid."""

    first: tuple[str | None, str | None]
    relation: str
    second: tuple[str | None, str | None]

    def __str__(self) -> str:
        return f"{_phrase(self.first)} {self.relation} {_phrase(self.second)}"

    @property
    def pairs(self) -> set[tuple[str | None, str | None]]:
        """The two pairs the caption names."""
        return {self.first, self.second}


@dataclass(frozen=True)
class Retrieval:
    """One scene and captions to choose from; ``captions[answer]`` alone is true. ``kinds[i]`` says how caption ``i`` was made."""

    scene: Scene
    captions: tuple[str, ...]
    answer: int
    kinds: tuple[str, ...]


def vocabulary() -> list[str]:
    """Every word of every caption, each once, in a fixed order."""
    return [*WORDS, *COLORS, *SHAPES]


def relations(first: SceneObject, second: SceneObject) -> list[str]:
    """The relations in which ``first`` stands to ``second``: one, or two when they differ in row and in column."""
    found = []
    if first.column != second.column:
        found.append("left of" if first.column < second.column else "right of")
    if first.row != second.row:
        found.append("above" if first.row < second.row else "below")
    return found


def true_captions(scene: Scene, partial: bool = True) -> list[Caption]:
    """Every caption that is true of the scene, those that leave a colour or a shape unsaid included if ``partial``."""
    found = []
    for first in scene.objects:
        for second in scene.objects:
            if first is second:
                continue
            for relation in relations(first, second):
                for said_first in _sayings(first, partial):
                    for said_second in _sayings(second, partial):
                        found.append(Caption(said_first, relation, said_second))
    return found


def fullest_captions(scene: Scene) -> list[Caption]:
    """The true captions that say all that has a name: one per order of two objects and relation."""
    found = []
    for first in scene.objects:
        for second in scene.objects:
            if first is not second:
                found += [Caption(_sayings(first, False)[0], relation, _sayings(second, False)[0]) for relation in relations(first, second)]
    return found


def negative(caption: Caption, kind: str, rng: np.random.Generator, pairs: Sequence[Pair]) -> Caption | None:
    """A caption that differs from ``caption`` in one thing, or None if that is impossible.

    "color" and "shape" replace one word of one object, "relation" turns the relation round, "swap" exchanges the two colours (two words).
    Only ``pairs`` are named. The result may happen to be true of some scene: compare with :func:`true_captions`.
    """
    if kind == "relation":
        return replace(caption, relation=RELATIONS[caption.relation])
    if kind == "swap":
        first, second = (caption.second[0], caption.first[1]), (caption.first[0], caption.second[1])
        made = Caption(first, caption.relation, second)
        return made if None not in (*first, *second) and first in pairs and second in pairs and made != caption else None
    if kind not in ("color", "shape"):
        raise InputError(f"no kind of negative caption is called {kind!r}; there are {', '.join(NEGATIVE_KINDS)}")
    slot, which = int(rng.integers(2)), 0 if kind == "color" else 1
    old = (caption.first, caption.second)[slot]
    if old[which] is None:
        return None
    values = [value for value in (COLORS if which == 0 else SHAPES) if value != old[which]]
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
    captions: int = 16,
    subjects: Sequence[Pair] = TEST_PAIRS,
    others: Sequence[Pair] = TRAIN_PAIRS,
    sizes: Sequence[str] = ("large",),
    hard: int = 8,
    with_subject: int = 4,
) -> list[Retrieval]:
    """Draw scenes of two objects with distinct captions, exactly one of which is true.

    Args:
        captions: how many captions to choose from.
        subjects: the pairs of which one is in every scene (the held-out ones if not given); they come up equally often.
        others: the pairs of the second object.
        hard: how many wrong captions differ from the true one in one word or relation, or in exchanged colours.
        with_subject: at least this many of the distinct pairs named in each set of captions come from ``subjects``.
    """
    rng = np.random.default_rng(seed)
    found: list[Retrieval] = []
    while len(found) < count:
        subject = subjects[len(found) % len(subjects)]
        scene = sample_scene(rng, count=2, pairs=others, subject=subject, sizes=sizes)
        options = fullest_captions(scene)
        true = options[int(rng.integers(len(options)))]
        taken = {str(caption) for caption in true_captions(scene)}
        chosen: list[tuple[str, Caption]] = []

        def add(kind: str, caption: Caption | None, taken: set[str] = taken, chosen: list = chosen) -> None:
            if caption is not None and str(caption) not in taken:
                taken.add(str(caption))
                chosen.append((kind, caption))

        while len(chosen) < hard:
            kind = NEGATIVE_KINDS[int(rng.integers(len(NEGATIVE_KINDS)))]
            add(kind, negative(true, kind, rng, ALL_PAIRS))
        wanted = [pair for pair in subjects if pair != subject][: with_subject - 1]
        while len(chosen) < captions - 1:
            forced = wanted.pop() if wanted else subjects[int(rng.integers(len(subjects)))]
            distractor = sample_scene(rng, count=2, pairs=others, subject=forced, sizes=sizes)
            possible = fullest_captions(distractor)
            add("other", possible[int(rng.integers(len(possible)))])
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


@functools.cache
def _phrase(said: tuple[str | None, str | None]) -> str:
    color, shape = said
    return " ".join(word for word in (color, shape or "object") if word)


def _sayings(thing: SceneObject, partial: bool) -> list[tuple[str | None, str | None]]:
    """What can be said of an object: all that has a name first, then less."""
    color = None if thing.color == UNNAMED else thing.color
    shape = None if thing.shape == BLOB else thing.shape
    full = [(color, shape)]
    return full + [said for said in ((color, None), (None, shape), (None, None)) if said not in full] if partial else full
