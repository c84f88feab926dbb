"""Pairs drawn from the synthetic worlds: what is right and wrong about each is known, and so is where it stands.

Every function draws with the sampler of its world and keeps what was drawn as ``pairs.records``; keywords go to that sampler. Boxes and masks are
those of the object that the answer is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuitvision.data import reach
from circuitvision.data.captions import Caption, true_captions
from circuitvision.data.pairs import Pairs
from circuitvision.data.questions import QuestionPair, largest, sample_largest, sample_question_pairs
from circuitvision.data.scenes import MinimalPair, Pair, Scene, SceneObject, minimal_pair, sample_scene
from circuitvision.data.sides import Side
from circuitvision.errors import InputError, checked_seed

ATTRIBUTES = ("color", "shape")


@dataclass(frozen=True)
class LargestPair:
    """Two scenes whose largest objects have different shapes."""

    clean: Scene
    corrupt: Scene
    answer: str
    foil: str


@dataclass(frozen=True)
class ReachPair:
    """Two scenes of the grid world whose right first steps differ."""

    clean: reach.ReachScene
    corrupt: reach.ReachScene
    steps: tuple[tuple[int, int], tuple[int, int]]
    """The right first (row step, column step) of each."""


def question_pairs(count: int, seed: int, *, kind: str = "color", **keywords: Any) -> Pairs:
    """Two pictures under one question, whose answers differ; see :func:`~circuitvision.data.sample_question_pairs`. For LLaVA-like models."""
    return of_questions(sample_question_pairs(count, seed, kind=kind, **keywords))


def of_questions(drawn: Sequence[QuestionPair]) -> Pairs:
    """Drawn questions about two scenes as a data set; see :func:`question_pairs`."""
    return Pairs(
        [pair.clean.image for pair in drawn],
        [pair.prompt for pair in drawn],
        corrupt_images=[pair.corrupt.image for pair in drawn],
        answers=[pair.answer for pair in drawn],
        foils=[pair.foil for pair in drawn],
        records=drawn,
        **_places([pair.question.subject for pair in drawn], [_new(pair.clean, pair.corrupt) for pair in drawn]),
    )


def caption_pairs(
    count: int, seed: int, *, attribute: str = "color", subjects: Sequence[Pair] | None = None, **keywords: Any
) -> Pairs:
    """Two pictures of two objects and two captions, of which each picture makes one true: the answer is the true caption's column, for dual encoders.

    The true caption's place is drawn at random. With ``subjects`` the object that changes has one of these pairs of colour and shape in the clean
    picture, in turn. ``keywords`` go to :func:`~circuitvision.data.sample_scene`.

    Raises:
        InputError: another attribute than color and shape.
    """
    if attribute not in ATTRIBUTES:
        raise InputError(f"attribute={attribute!r} is not understood: captions name {' and '.join(ATTRIBUTES)}.")
    rng = np.random.default_rng(checked_seed(seed))
    drawn: list[MinimalPair] = []
    texts: list[tuple[str, str]] = []
    answers: list[int] = []
    while len(drawn) < count:
        subject = None if subjects is None else subjects[len(drawn) % len(subjects)]
        scene = sample_scene(rng, count=2, subject=subject, **keywords)
        index = next((n for n, thing in enumerate(scene.objects) if thing.pair == subject), None)
        try:
            pair = minimal_pair(scene, rng, attribute=attribute, index=index)
        except InputError:
            continue
        beside = next(thing for thing in scene.objects if thing is not pair.before)
        true, false = (str(Caption(changed.pair, beside.pair)) for changed in (pair.before, pair.after))
        if any(str(one) == false for one in true_captions(scene)) or any(
            str(one) == true for one in true_captions(pair.corrupt)
        ):
            continue
        answers.append(int(rng.integers(2)))
        texts.append((true, false) if answers[-1] == 0 else (false, true))
        drawn.append(pair)
    return Pairs(
        [pair.clean.image for pair in drawn],
        texts,
        corrupt_images=[pair.corrupt.image for pair in drawn],
        answers=answers,
        foils=[1 - answer for answer in answers],
        records=drawn,
        **_places([pair.before for pair in drawn], [pair.after for pair in drawn]),
    )


def largest_pairs(count: int, seed: int, **keywords: Any) -> Pairs:
    """Two pictures that differ in the shape of their largest object, which is the label: for classifiers that name it; see
    :func:`~circuitvision.data.sample_largest`."""
    rng = np.random.default_rng(checked_seed(seed))
    drawn: list[LargestPair] = []
    befores: list[SceneObject] = []
    afters: list[SceneObject] = []
    while len(drawn) < count:
        ((scene, label),) = sample_largest(1, rng, **keywords)
        winner = largest(scene)
        assert winner is not None
        pair = minimal_pair(scene, rng, attribute="shape", index=scene.objects.index(winner))
        drawn.append(LargestPair(scene, pair.corrupt, label, pair.after.shape))
        befores.append(winner)
        afters.append(pair.after)
    return Pairs(
        [pair.clean.image for pair in drawn],
        corrupt_images=[pair.corrupt.image for pair in drawn],
        answers=[pair.answer for pair in drawn],
        foils=[pair.foil for pair in drawn],
        records=drawn,
        **_places(befores, afters),
    )


def reach_pairs(
    count: int,
    seed: int,
    *,
    change: str = "goal",
    dim: int = 0,
    split: str | None = "test",
    board: reach.Board | None = None,
) -> Pairs:
    """Two observations of the grid world whose right first steps differ along one action dimension; see
    :func:`circuitvision.data.reach.contrast_pairs`.

    ``answers`` and ``foils`` are the right steps along ``dim`` (0 rows, 1 columns), −1, 0 or 1. A model's actions are normalised, and its output at
    one time of denoising is a velocity: a metric that is compared with answers must turn them into steps.

    Raises:
        InputError: another dimension, an unknown change or split.
    """
    if dim not in (0, 1):
        raise InputError(f"dim={dim!r} is no action dimension: 0 is the row step, 1 the column step.")
    kept: list[tuple[reach.ReachScenes, reach.ReachScenes]] = []
    missing, rng = count, np.random.default_rng(checked_seed(seed))
    while missing > 0:
        clean, corrupt = reach.contrast_pairs(
            missing + 8, int(rng.integers(2**31)), change=change, split=split, board=board
        )
        differ = clean.expert()[:, 0, dim] != corrupt.expert()[:, 0, dim]
        kept.append((clean[differ][:missing], corrupt[differ][:missing]))
        missing -= len(kept[-1][0])
    sides = [reach.concatenate(list(part)) for part in zip(*kept, strict=True)]
    steps = [side.expert()[:, 0] for side in sides]
    scenes = [[side.scene(row) for row in range(count)] for side in sides]
    boxes = [[scene.goal.box for scene in side] for side in scenes]
    records = [
        ReachPair(one, two, (tuple(here.tolist()), tuple(there.tolist())))  # type: ignore[arg-type]
        for one, two, here, there in zip(*scenes, *steps, strict=True)
    ]
    return Pairs(
        [[scene.image] for scene in scenes[0]],
        sides[0].instructions(),
        corrupt_images=[[scene.image] for scene in scenes[1]],
        corrupt_texts=sides[1].instructions(),
        settings={"state": sides[0].gripper},
        corrupt_settings={"state": sides[1].gripper},
        answers=steps[0][:, dim].astype(float),
        foils=steps[1][:, dim].astype(float),
        boxes=boxes[0],
        corrupt_boxes=boxes[1],
        records=records,
    )


def reach_side(scenes: reach.ReachScenes, texts: Sequence[str] | None = None) -> Side:
    """Boards of the grid world as a data set, with their instructions or with ``texts``; boxes are the goals'."""
    shown = [scenes.scene(row) for row in range(len(scenes))]
    return Side(
        [[scene.image] for scene in shown],
        scenes.instructions() if texts is None else list(texts),
        settings={"state": scenes.gripper},
        boxes=[scene.goal.box for scene in shown],
    )


def _new(clean: Scene, corrupt: Scene) -> SceneObject:
    """The object of the corrupt scene that the clean one does not have."""
    return next(thing for thing in corrupt.objects if thing not in clean.objects)


def _places(befores: Sequence[SceneObject], afters: Sequence[SceneObject]) -> dict[str, Any]:
    return {
        "boxes": [thing.box for thing in befores],
        "corrupt_boxes": [thing.box for thing in afters],
        "masks": [thing.mask for thing in befores],
        "corrupt_masks": [thing.mask for thing in afters],
    }
