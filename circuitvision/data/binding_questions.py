"""Questions about scenes of :mod:`circuitvision.data.binding`, each with the one word that answers it.

Four kinds: the colour of a named shape, the shape of a named colour, colour or shape of the nearest object on one side of another
(:meth:`~circuitvision.data.binding.Scene.neighbor`), and how many objects have a colour or a shape. The first three are asked where no two objects
share a colour or a shape, counts in scenes where they may. A question is asked only where the picture determines the answer.

Every word is one token of :func:`vocabulary`, split at blanks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from circuitvision.data.binding import (
    ALL_PAIRS,
    COLORS,
    DIRECTIONS,
    OBJECTS,
    SHAPES,
    MinimalPair,
    Pair,
    Scene,
    SceneObject,
    minimal_pair,
    place,
    sample_scene,
)
from circuitvision.data.questions import prompt
from circuitvision.data.scenes import UNNAMED, check_name
from circuitvision.errors import InputError, checked_seed

KINDS: tuple[str, ...] = ("color", "shape", "relation", "count")
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three")
ANSWERS: tuple[str, ...] = (*COLORS, *SHAPES, *NUMBERS)
TRIES = 200
"""How often a draw may fail in a row before it is given up."""
PLURALS: dict[str, str] = {shape: shape + ("es" if shape.endswith("ch") else "s") for shape in SHAPES}
WORDS = (
    "USER:",
    "ASSISTANT:",
    "what",
    "color",
    "shape",
    "is",
    "the",
    "object",
    "of",
    "how",
    "many",
    "objects",
    "are",
    "there",
    "?",
)


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    ``kind`` is one of :data:`KINDS`; ``subject`` is the object that the text names (of a count: one of those counted, None for none), ``holder`` the
    one whose attribute is the answer: the subject itself, or its neighbour in a question about a relation.
    """

    kind: str
    text: str
    answer: str
    subject: SceneObject | None
    holder: SceneObject | None

    @property
    def prompt(self) -> str:
        """The text for a LLaVA processor, image placeholder included."""
        return prompt(self.text)


def vocabulary() -> list[str]:
    """Every word of every prompt and answer, each once, in a fixed order."""
    return list(dict.fromkeys((*WORDS, *DIRECTIONS, *ANSWERS, *PLURALS.values())))


def questions(scene: Scene, kinds: Sequence[str] = KINDS) -> list[Question]:
    """Every question of the given kinds that the scene answers.

    Counts ask for every colour and shape, those that the scene does not have included.

    Raises:
        InputError: no such kind.
    """
    for kind in kinds:
        check_name("kind of question", kind, KINDS)
    found: list[Question] = []
    for thing in scene.objects:
        color = thing.color != UNNAMED and len(scene.find(color=thing.color)) == 1
        shape = thing.shape != UNNAMED and len(scene.find(shape=thing.shape)) == 1
        if "color" in kinds and shape and thing.color != UNNAMED:
            found.append(Question("color", f"what color is the {thing.shape} ?", thing.color, thing, thing))
        if "shape" in kinds and color and thing.shape != UNNAMED:
            found.append(Question("shape", f"what shape is the {thing.color} object ?", thing.shape, thing, thing))
        if "relation" in kinds and color and shape:
            found += _relations(scene, thing)
    if "count" in kinds:
        found += [_count(scene, attribute, value) for attribute in ("color", "shape") for value in _VALUES[attribute]]
    return found


_VALUES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "shape": SHAPES}


def _relations(scene: Scene, thing: SceneObject) -> list[Question]:
    found = []
    for direction in DIRECTIONS:
        other = scene.neighbor(thing, direction)
        if other is not None:
            where = f"{direction} of" if direction in ("left", "right") else direction
            for attribute in ("color", "shape"):
                if getattr(other, attribute) == UNNAMED:
                    continue
                text = f"what {attribute} is {where} the {thing.color} {thing.shape} ?"
                found.append(Question("relation", text, getattr(other, attribute), thing, other))
    return found


def _count(scene: Scene, attribute: str, value: str) -> Question:
    there = scene.find(**{attribute: value})
    what = f"{value} objects" if attribute == "color" else PLURALS[value]
    one = there[0] if there else None
    return Question("count", f"how many {what} are there ?", NUMBERS[len(there)], one, one)


def count_scene(rng: np.random.Generator, subject: Pair, attribute: str, number: int, pairs: Sequence[Pair]) -> Scene:
    """A scene with an object of the pair ``subject``, and with ``number`` objects, from 1 up, that have its colour or its shape.

    The others that share the attribute, and those that do not, are drawn from ``pairs``.

    Raises:
        InputError: no such attribute, a number that is not from 1 to 3, or ``pairs`` lacks those that share the attribute or those that do not.
    """
    check_name("attribute", attribute, _VALUES)
    if not 1 <= number <= OBJECTS:
        raise InputError(f"number={number} must lie between 1 and {OBJECTS}: the subject is counted.")
    which = ("color", "shape").index(attribute)
    alike = [pair for pair in pairs if pair[which] == subject[which]]
    unlike = [pair for pair in pairs if pair[which] != subject[which]]
    if (number > 1 and not alike) or (number < OBJECTS and not unlike):
        wanted = "more" if number > 1 and not alike else "other"
        raise InputError(f"The pairs hold no {wanted} objects than {subject[which]!r} ones to draw: give more pairs.")
    drawn = [alike[int(rng.integers(len(alike)))] for _ in range(number - 1)]
    drawn += [unlike[int(rng.integers(len(unlike)))] for _ in range(OBJECTS - number)]
    return place(rng, [subject, *drawn])


@dataclass(frozen=True)
class QuestionPair:
    """One question about two scenes that differ in one attribute of one object, so that the answers differ.

    ``answer`` is right for ``clean``, ``foil`` for ``corrupt``; ``changed`` is what was changed.
    """

    clean: Scene
    corrupt: Scene
    question: Question
    answer: str
    foil: str
    changed: MinimalPair

    @property
    def prompt(self) -> str:
        """The text for a LLaVA processor; the same for both scenes."""
        return self.question.prompt


def sample_questions(
    count: int,
    seed: int | np.random.Generator,
    *,
    kinds: Sequence[str] = KINDS,
    subjects: Sequence[Pair] = ALL_PAIRS,
    distractors: Sequence[Pair] = ALL_PAIRS,
) -> list[tuple[Scene, Question]]:
    """Draw scenes with one question each; kinds, subjects, and the answers of counts come up equally often.

    Args:
        subjects: the pairs of colour and shape that the questions are about. In every other question about a relation the subject is what the text
            names, in the rest what holds the answer; of a count it is one of those counted, and for "zero" an object of the scene. Each subject takes
            every role and every number in turn.
        distractors: the pairs of the other objects.

    Raises:
        InputError: no such kind, no subjects, or the pairs leave nothing to ask or nothing to draw.
    """
    rng = np.random.default_rng(checked_seed(seed))
    if not kinds:
        raise InputError(f"There are no kinds of question: give some of {', '.join(KINDS)}.")
    for kind in kinds:
        check_name("kind of question", kind, KINDS)
    turns = [_in_turn(rng, subjects) for _ in kinds]
    found: list[tuple[Scene, Question]] = []
    misses = 0
    while len(found) < count:
        number, turn = len(found) % len(kinds), len(found) // len(kinds)
        around, place = divmod(turn, len(subjects))
        # Every subject meets every variant of a kind: the variants move on by one with each round of the subjects.
        drawn = _draw(rng, kinds[number], turns[number][place], distractors, place + around)
        if drawn is not None:
            found.append(drawn)
        misses = 0 if drawn is not None else misses + 1
        if misses == TRIES:
            raise InputError(
                f"No scene answers a question of the kind {kinds[number]!r} about a {' '.join(turns[number][place])}: give other distractors."
            )
    return found


def _in_turn(rng: np.random.Generator, subjects: Sequence[Pair]) -> list[Pair]:
    if not subjects:
        raise InputError("There are no subjects: give at least one pair of colour and shape.")
    return [subjects[number] for number in rng.permutation(len(subjects))]


def _draw(
    rng: np.random.Generator, kind: str, subject: Pair, distractors: Sequence[Pair], variant: int
) -> tuple[Scene, Question] | None:
    if kind == "count":
        return _draw_count(rng, subject, distractors, variant)
    scene = sample_scene(rng, pairs=distractors, subjects=(subject,))
    possible = questions(scene, [kind])
    role = "holder" if kind == "relation" and variant % 2 else "subject"
    fitting = [question for question in possible if getattr(question, role).pair == subject]
    return (scene, fitting[int(rng.integers(len(fitting)))]) if fitting else None


def _draw_count(
    rng: np.random.Generator, subject: Pair, distractors: Sequence[Pair], variant: int
) -> tuple[Scene, Question]:
    attribute, number = ("color", "shape")[variant // 4 % 2], variant % 4
    if number:
        scene = count_scene(rng, subject, attribute, number, distractors)
        return scene, _count(scene, attribute, subject[attribute == "shape"])
    scene = count_scene(rng, subject, attribute, int(rng.integers(1, OBJECTS + 1)), distractors)
    absent = [value for value in _VALUES[attribute] if not scene.find(**{attribute: value})]
    return scene, _count(scene, attribute, absent[int(rng.integers(len(absent)))])


def sample_question_pairs(
    count: int,
    seed: int | np.random.Generator,
    *,
    kind: str = "color",
    subjects: Sequence[Pair] = ALL_PAIRS,
    distractors: Sequence[Pair] = ALL_PAIRS,
) -> list[QuestionPair]:
    """Draw minimal pairs with one question each whose answer the change flips.

    What changes is the attribute asked about, of the object that holds the answer (of a count: the colour or shape of one that is counted). The
    changed object has a pair of ``subjects`` or ``distractors`` again, and in both scenes the question has one answer.

    Raises:
        InputError: no such kind, no subjects, or the pairs leave nothing that flips an answer.
    """
    rng = np.random.default_rng(checked_seed(seed))
    found: list[QuestionPair] = []
    misses = 0
    while len(found) < count:
        # A round of its own draws every answer of a count, of which "zero" has nothing to change.
        drawn = sample_questions(
            max(8, 2 * (count - len(found))), rng, kinds=[kind], subjects=subjects, distractors=distractors
        )
        pairs = [_flipped(scene, question, rng, {*subjects, *distractors}) for scene, question in drawn]
        found += [pair for pair in pairs if pair is not None]
        misses = 0 if any(pairs) else misses + len(drawn)
        if misses >= TRIES:
            raise InputError(
                f"No change to another pair of the subjects or distractors flips the answer to a question of the kind {kind!r}: give more of them."
            )
    return found[:count]


def _flipped(scene: Scene, question: Question, rng: np.random.Generator, pairs: set[Pair]) -> QuestionPair | None:
    if question.holder is None:
        return None
    attribute = "color" if question.answer in COLORS or " objects " in question.text else "shape"
    index = scene.objects.index(question.holder)
    try:
        changed = minimal_pair(
            scene, rng, attribute=attribute, index=index, pairs=pairs, distinct=question.kind != "count"
        )
    except InputError:
        return None
    twin = [other for other in questions(changed.corrupt, [question.kind]) if other.text == question.text]
    return QuestionPair(scene, changed.corrupt, question, question.answer, twin[0].answer, changed)


def sample_large(
    count: int,
    rng: np.random.Generator | int,
    *,
    subjects: Sequence[Pair] = ALL_PAIRS,
    distractors: Sequence[Pair] = ALL_PAIRS,
) -> list[tuple[Scene, str]]:
    """Draw scenes of one large object among small ones, with the large one's shape as the label: for classifiers.

    Args:
        subjects: the pairs the large object has, equally often.
        distractors: the pairs of the small ones.

    Raises:
        InputError: no subjects, or too few distractors to draw from.
    """
    rng = np.random.default_rng(checked_seed(rng))
    turns = _in_turn(rng, subjects)
    found = []
    for turn in range(count):
        subject = turns[turn % len(turns)]
        scene = sample_scene(rng, pairs=distractors, subjects=(subject,))
        sized = [replace(thing, size="large" if thing.pair == subject else "small") for thing in scene.objects]
        found.append((Scene(tuple(sized)), subject[1]))
    return found
