"""Pairs drawn from the synthetic worlds: what is right and wrong about each is known, and so is where it stands.

Every function draws with the sampler of its world and keeps what was drawn as ``pairs.records``; keywords go to that sampler. Scenes are of the world
that ``world=`` names (:mod:`circuitvision.data.worlds`). Boxes and masks are those of the object that the answer is about, which is the one changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuitvision.data import binding, binding_questions, reach
from circuitvision.data.captions import Caption, true_captions
from circuitvision.data.pairs import Pairs
from circuitvision.data.questions import QuestionPair, largest
from circuitvision.data.scenes import MinimalPair, Pair, Scene
from circuitvision.data.sides import Side
from circuitvision.data.worlds import find_world
from circuitvision.errors import InputError, checked_seed

ATTRIBUTES = ("color", "shape")


@dataclass(frozen=True)
class LargestPair:
    """Two scenes whose largest objects have different shapes."""

    clean: Scene | binding.Scene
    corrupt: Scene | binding.Scene
    answer: str
    foil: str


@dataclass(frozen=True)
class ReachPair:
    """Two scenes of the grid world whose right first steps differ."""

    clean: reach.ReachScene
    corrupt: reach.ReachScene
    steps: tuple[tuple[int, int], tuple[int, int]]
    """The right first (row step, column step) of each."""


def question_pairs(count: int, seed: int, *, kind: str = "color", world: str = "shapes", **keywords: Any) -> Pairs:
    """Two pictures under one question, whose answers differ, for LLaVA-like models; see :func:`~circuitvision.data.sample_question_pairs` and
    :func:`circuitvision.data.binding_questions.sample_question_pairs`.

    Raises:
        InputError: no such world or kind of question.
    """
    return of_questions(find_world(world).sample_question_pairs(count, seed, kind=kind, **keywords))


def of_questions(drawn: Sequence[QuestionPair] | Sequence[binding_questions.QuestionPair]) -> Pairs:
    """Drawn questions about two scenes as a data set; see :func:`question_pairs`."""
    return Pairs(
        [pair.clean.image for pair in drawn],
        [pair.prompt for pair in drawn],
        corrupt_images=[pair.corrupt.image for pair in drawn],
        answers=[pair.answer for pair in drawn],
        foils=[pair.foil for pair in drawn],
        records=drawn,
        **_places(
            [_only_in(pair.clean, pair.corrupt) for pair in drawn],
            [_only_in(pair.corrupt, pair.clean) for pair in drawn],
        ),
    )


def caption_pairs(
    count: int,
    seed: int,
    *,
    attribute: str = "color",
    world: str = "shapes",
    subjects: Sequence[Pair] | None = None,
    **keywords: Any,
) -> Pairs:
    """Two pictures and two captions that name two of their objects, of which each picture makes one true: the answer is the true caption's column.
    For dual encoders.

    The true caption's place is drawn at random. With ``subjects`` the object that changes has one of these pairs of colour and shape in the clean
    picture, in turn. ``keywords`` go to :func:`~circuitvision.data.sample_scene` of the world.

    Raises:
        InputError: another attribute than color and shape, no such world.
    """
    if attribute not in ATTRIBUTES:
        raise InputError(f"attribute={attribute!r} is not understood: captions name {' and '.join(ATTRIBUTES)}.")
    there = find_world(world)
    rng = np.random.default_rng(checked_seed(seed))
    drawn: list[MinimalPair | binding.MinimalPair] = []
    texts: list[tuple[str, str]] = []
    answers: list[int] = []
    while len(drawn) < count:
        subject = None if subjects is None else subjects[len(drawn) % len(subjects)]
        scene = there.captioned(rng, subject=subject, **keywords)
        index = next((number for number, thing in enumerate(scene.objects) if thing.pair == subject), None)
        try:
            pair = there.minimal_pair(scene, rng, attribute=attribute, index=index)
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


def largest_pairs(count: int, seed: int, *, world: str = "shapes", **keywords: Any) -> Pairs:
    """Two pictures that differ in the shape of their largest object, which is the label, for classifiers that name it; see
    :func:`~circuitvision.data.sample_largest` and :func:`circuitvision.data.binding_questions.sample_large`.

    Raises:
        InputError: no such world.
    """
    there = find_world(world)
    rng = np.random.default_rng(checked_seed(seed))
    drawn: list[LargestPair] = []
    befores, afters = [], []
    while len(drawn) < count:
        ((scene, label),) = there.sample_labelled(1, rng, **keywords)
        winner = largest(scene)
        pair = there.minimal_pair(scene, rng, attribute="shape", index=scene.objects.index(winner))
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
    oriented: bool = False,
) -> Pairs:
    """Two observations of the grid world whose right first steps differ along one action dimension; see
    :func:`circuitvision.data.reach.contrast_pairs`.

    ``answers`` and ``foils`` are the right steps along ``dim`` (0 rows, 1 columns), −1, 0 or 1. A model's actions are normalised, and its output at
    one time of denoising is a velocity: :func:`circuitvision.metrics.action_estimate` turns it into steps. ``oriented``: of each two observations
    the clean one is that with the larger step, so that a mean over pairs does not add up effects in opposite directions.

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
    if oriented:
        behind = sides[0].expert()[:, 0, dim] < sides[1].expert()[:, 0, dim]
        both, rows = reach.concatenate(sides), np.arange(count)
        sides = [both[rows + count * swapped] for swapped in (behind, ~behind)]
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


def _only_in(scene: Scene | binding.Scene, other: Scene | binding.Scene) -> Any:
    """The object of a scene that the other does not have."""
    return next(thing for thing in scene.objects if thing not in other.objects)


def _places(befores: Sequence[Any], afters: Sequence[Any]) -> dict[str, Any]:
    return {
        "boxes": [thing.box for thing in befores],
        "corrupt_boxes": [thing.box for thing in afters],
        "masks": [thing.mask for thing in befores],
        "corrupt_masks": [thing.mask for thing in afters],
    }
