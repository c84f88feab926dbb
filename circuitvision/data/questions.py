"""Questions about scenes, each with the one word that answers it.

A question is asked only where the picture determines the answer: "the circle" is asked about when there is exactly one circle, "the left
object" when exactly one object lies in the left half. Its *subject* is the object it is about, so a question counts as held out when its
subject's colour-shape pair was never trained on.

Every word is one token of :func:`vocabulary`, split at blanks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuitvision.data.scenes import (
    ALL_PAIRS,
    BLOB,
    COLORS,
    SHAPES,
    SIZES,
    TEST_PAIRS,
    TRAIN_PAIRS,
    UNNAMED,
    MinimalPair,
    Pair,
    Scene,
    SceneObject,
    minimal_pair,
    recolor,
    sample_scene,
)
from circuitvision.errors import InputError, checked_seed, nearest

KINDS: tuple[str, ...] = ("color", "shape", "side", "height", "color_at", "shape_at")
SIDES = ("left", "right")
HEIGHTS = ("top", "bottom")
ANSWERS: tuple[str, ...] = (*COLORS, *SHAPES, *SIDES, *HEIGHTS)
_IN_TURN: tuple[Pair, ...] = tuple(
    (tuple(COLORS)[number % len(COLORS)], tuple(SHAPES)[number % len(SHAPES)]) for number in range(len(ALL_PAIRS))
)
"""All pairs, in an order in which colours and shapes both take turns (their numbers have no common factor)."""
WORDS = ("USER:", "ASSISTANT:", "what", "color", "shape", "is", "the", "object", "or", "?")


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the object it is about. ``kind`` is one of :data:`KINDS`."""

    kind: str
    text: str
    answer: str
    subject: SceneObject

    @property
    def prompt(self) -> str:
        """The text for a LLaVA processor, image placeholder included."""
        return prompt(self.text)


@dataclass(frozen=True)
class QuestionPair:
    """One question about two scenes that differ in one attribute of its subject, so that the answers differ.

    ``answer`` is right for ``clean``, ``foil`` for ``corrupt``.
    """

    clean: Scene
    corrupt: Scene
    question: Question
    answer: str
    foil: str

    @property
    def prompt(self) -> str:
        """The text for a LLaVA processor; the same for both scenes."""
        return self.question.prompt


def prompt(question: str) -> str:
    """Wrap a question as the models were trained on it: ``USER: <image> … ASSISTANT:``."""
    return f"USER: <image> {question} ASSISTANT:"


def vocabulary() -> list[str]:
    """Every word of every prompt and answer, each once, in a fixed order."""
    return list(dict.fromkeys((*WORDS, *ANSWERS)))


def questions(scene: Scene, kinds: Sequence[str] = KINDS) -> list[Question]:
    """Every question of the given kinds that the picture determines.

    Raises:
        InputError: no such kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"no question kind is called {kind!r}; nearest: {', '.join(nearest(kind, KINDS))}")
    found = []
    for thing in scene.objects:
        for name in _names(scene, thing):
            found += _about(thing, name, kinds)
        for place in _places(scene, thing):
            if "color_at" in kinds and thing.color != UNNAMED:
                found.append(Question("color_at", f"what color is the {place} object ?", thing.color, thing))
            if "shape_at" in kinds and thing.shape != BLOB:
                found.append(Question("shape_at", f"what shape is the {place} object ?", thing.shape, thing))
    return found


def sample_questions(
    count: int,
    seed: int,
    *,
    kinds: Sequence[str] = KINDS,
    subjects: Sequence[Pair] | None = None,
    distractors: Sequence[Pair] = ALL_PAIRS,
    sizes: Sequence[str] = ("large",),
) -> list[tuple[Scene, Question]]:
    """Draw scenes of two or three objects with one question each; kinds and subjects' pairs come up equally often.

    Args:
        subjects: the pairs of colour and shape that the questions are about: all by default, so that neither says what the other is. Pairs that no
            model here was trained on are ``TEST_PAIRS``, in which each shape has one colour.
        distractors: the pairs of the other objects: all by default; ``TRAIN_PAIRS`` are those trained on.
    """
    rng = np.random.default_rng(checked_seed(seed))
    subjects = _IN_TURN if subjects is None else subjects
    found: list[tuple[Scene, Question]] = []
    while len(found) < count:
        kind = kinds[len(found) % len(kinds)]
        subject = subjects[(len(found) // len(kinds)) % len(subjects)]
        scene = sample_scene(rng, pairs=distractors, subject=subject, sizes=sizes)
        fitting = [question for question in questions(scene, [kind]) if question.subject.pair == subject]
        if fitting:
            found.append((scene, fitting[int(rng.integers(len(fitting)))]))
    return found


def sample_question_pairs(
    count: int,
    seed: int,
    *,
    kind: str = "color",
    subjects: Sequence[Pair] | None = None,
    distractors: Sequence[Pair] = ALL_PAIRS,
    sizes: Sequence[str] = ("large",),
) -> list[QuestionPair]:
    """Draw minimal pairs with one question each whose answer the change flips.

    The changed attribute is the one asked about: the colour, the shape, or the cell (moved into the other half of the picture). The
    question still has exactly one answer in the corrupt scene, and the corrupt subject is drawn from ``subjects`` and ``distractors``: all pairs of
    colour and shape by default, so that neither says what the other is (in ``TEST_PAIRS`` each shape has one colour).
    The subjects of the clean scenes take turns, so that no fixed guess is right more often than one subject's share.
    """
    attribute = {"color": "color", "color_at": "color", "shape": "shape", "shape_at": "shape"}.get(kind, "cell")
    rng = np.random.default_rng(checked_seed(seed))
    subjects = _IN_TURN if subjects is None else subjects
    found: list[QuestionPair] = []
    while len(found) < count:
        subject = subjects[len(found) % len(subjects)]
        scene, question = sample_questions(
            1, int(rng.integers(2**31)), kinds=[kind], subjects=[subject], distractors=distractors, sizes=sizes
        )[0]
        index = scene.objects.index(question.subject)
        pair = _changed_answer(scene, question, index, attribute, rng, {*subjects, *distractors})
        if pair is None:
            continue
        twin = [
            other
            for other in questions(pair.corrupt, [kind])
            if other.text == question.text and other.subject == pair.after
        ]
        if twin and twin[0].answer != question.answer:
            found.append(QuestionPair(scene, pair.corrupt, question, question.answer, twin[0].answer))
    return found


def _changed_answer(
    scene: Scene, question: Question, index: int, attribute: str, rng: np.random.Generator, pairs: set[Pair]
) -> MinimalPair | None:
    try:
        return minimal_pair(scene, rng, attribute=attribute, index=index, pairs=pairs)
    except InputError:
        return None


def _names(scene: Scene, thing: SceneObject) -> list[str]:
    """The phrases that name this object and no other in the scene."""
    found = []
    if thing.shape != BLOB and len(scene.find(shape=thing.shape)) == 1:
        found.append(thing.shape)
    if thing.color != UNNAMED and len(scene.find(color=thing.color)) == 1:
        found.append(f"{thing.color} object")
    return found


def _places(scene: Scene, thing: SceneObject) -> list[str]:
    found = []
    if len(scene.find(side=thing.side)) == 1:
        found.append(thing.side)
    if len(scene.find(height=thing.height)) == 1:
        found.append(thing.height)
    return found


def _about(thing: SceneObject, name: str, kinds: Sequence[str]) -> list[Question]:
    """The questions about one named object; the name must not contain the answer."""
    found = []
    if "color" in kinds and thing.color != UNNAMED and name == thing.shape:
        found.append(Question("color", f"what color is the {name} ?", thing.color, thing))
    if "shape" in kinds and thing.shape != BLOB and name != thing.shape:
        found.append(Question("shape", f"what shape is the {name} ?", thing.shape, thing))
    if "side" in kinds:
        found.append(Question("side", f"is the {name} left or right ?", thing.side, thing))
    if "height" in kinds:
        found.append(Question("height", f"is the {name} top or bottom ?", thing.height, thing))
    return found


def largest(scene: Any) -> Any:
    """The one object of a scene of either world that is larger than every other, or None when two share the largest size.

    Size is extent, not area: a medium triangle is larger than a small square, and every large shape extends further than every medium one.
    """
    extents = [SIZES[thing.size] for thing in scene.objects]
    biggest = max(extents, default=0)
    found = [thing for thing, extent in zip(scene.objects, extents, strict=True) if extent == biggest]
    return found[0] if len(found) == 1 else None


def sample_largest(
    count: int,
    rng: np.random.Generator | int,
    *,
    subjects: Sequence[Pair] = TEST_PAIRS,
    distractors: Sequence[Pair] = TRAIN_PAIRS,
    unnamed: float = 0.0,
    blobs: float = 0.0,
) -> list[tuple[Scene, str]]:
    """Draw scenes of two to four objects of three sizes, one of them the largest, with that object's shape as the label.

    Args:
        subjects: the pairs the largest object may have, equally often (the held-out ones if not given).
        distractors: the pairs of the smaller objects.
        unnamed: probability of an object, the largest included, to get a colour without a name.
        blobs: probability of a smaller object to be a blob.
    """
    rng = np.random.default_rng(checked_seed(rng))
    found: list[tuple[Scene, str]] = []
    while len(found) < count:
        subject = subjects[int(rng.integers(len(subjects)))]
        scene = sample_scene(rng, count=(2, 4), pairs=distractors, subject=subject, sizes=tuple(SIZES), blobs=blobs)
        winner = largest(scene)
        if winner is None or winner.pair != subject:
            continue
        if unnamed:
            scene = Scene(tuple(recolor(thing, rng) if rng.random() < unnamed else thing for thing in scene.objects))
        found.append((scene, subject[1]))
    return found
