"""The two worlds of scenes by name: what captions and data sets of pairs need to know of each.

``"shapes"`` is :mod:`circuitvision.data.scenes`, one object to an image patch; ``"binding"`` is :mod:`circuitvision.data.binding`, three objects of
which no patch tells shape and colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuitvision.data import binding, binding_questions, questions, scenes
from circuitvision.data.scenes import Pair, check_name


@dataclass(frozen=True)
class World:
    """What can be drawn in one world, and which pairs of colour and shape are held out.

    ``captioned(rng, pairs=, subject=)`` draws a scene for captions: of ``pairs``, one object having ``subject`` where one is given.
    ``sample_labelled(count, rng)`` draws scenes with the shape of their largest object.
    """

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    all_pairs: tuple[Pair, ...]
    test_pairs: tuple[Pair, ...]
    train_pairs: tuple[Pair, ...]
    minimal_pair: Callable[..., Any]
    captioned: Callable[..., Any]
    sample_question_pairs: Callable[..., Any]
    sample_labelled: Callable[..., Any]


def _two_shapes(rng: np.random.Generator, **keywords: Any) -> scenes.Scene:
    return scenes.sample_scene(rng, count=2, **keywords)


def _bound(rng: np.random.Generator, *, subject: Pair | None = None, **keywords: Any) -> binding.Scene:
    subjects: Sequence[Pair] = () if subject is None else (subject,)
    return binding.sample_scene(rng, subjects=subjects, **keywords)


def _world(module: Any, **samplers: Callable[..., Any]) -> World:
    return World(
        tuple(module.COLORS),
        module.SHAPES,
        module.ALL_PAIRS,
        module.TEST_PAIRS,
        module.TRAIN_PAIRS,
        module.minimal_pair,
        **samplers,
    )


WORLDS: dict[str, World] = {
    "shapes": _world(
        scenes,
        captioned=_two_shapes,
        sample_question_pairs=questions.sample_question_pairs,
        sample_labelled=questions.sample_largest,
    ),
    "binding": _world(
        binding,
        captioned=_bound,
        sample_question_pairs=binding_questions.sample_question_pairs,
        sample_labelled=binding_questions.sample_large,
    ),
}


def find_world(name: str) -> World:
    """The world called ``name``.

    Raises:
        InputError: no such world.
    """
    check_name("world", name, WORLDS)
    return WORLDS[name]
