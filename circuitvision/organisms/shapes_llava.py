"""shapes-llava: a small LLaVA that answers questions about colour, shape and position of the objects in a scene.

``LlavaForConditionalGeneration`` with a CLIP vision tower of three layers (read at feature layer -2, so two are live) and a Llama of
three layers with grouped queries. The picture comes before the question, as in LLaVA.

Training packs several questions about one picture into a row (:mod:`circuitvision.organisms.llava`).

What makes it compose colours and shapes it never saw together: objects of unnamed colours (shape without a colour word), blobs (colour
without a shape word), an outline that is the same for every colour, and weight decay.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from circuitvision.data.generated import of_questions
from circuitvision.data.pairs import Pairs
from circuitvision.data.questions import (
    KINDS,
    Question,
    questions,
    sample_question_pairs,
    sample_questions,
    vocabulary,
)
from circuitvision.data.scenes import (
    CELL,
    GRID,
    IMAGE_SIZE,
    TEST_PAIRS,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    Pair,
    Scene,
    render,
    sample_scene,
)
from circuitvision.organisms import llava
from circuitvision.organisms.llava import IGNORED, PackedQuestions, answered_right
from circuitvision.organisms.training import Recipe, finished, fit, reproducible

RECIPE = Recipe(steps=6000, batch=40)
QUESTIONS_PER_IMAGE = 5
UNNAMED_RATE = BLOB_RATE = 0.2


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model and its processor."""
    return llava.build(
        vocabulary(),
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        width=64,
        vision={"intermediate_size": 128, "num_hidden_layers": 3},
        language={"intermediate_size": 128, "num_hidden_layers": 3},
        feature_layer=-2,
        initial=RECIPE.initial,
    )


class Stream:
    """An endless stream of training batches: packed questions about pictures of trained pairs, unnamed colours and blobs."""

    def __init__(self, rng: np.random.Generator, processor: LlavaProcessor, sizes: Sequence[str] = ("large",)) -> None:
        self.rng = rng
        self.sizes = sizes
        longest = max(len(question.text.split()) for _, question in _asked(10 * len(KINDS), 0, TEST_PAIRS))
        self.rows = PackedQuestions(processor, patches=GRID * GRID, per_image=QUESTIONS_PER_IMAGE, block=longest + 2)

    def batch(self, size: int) -> dict[str, Tensor]:
        """One batch for ``model.forward`` and its ``labels``; see :class:`~circuitvision.organisms.llava.PackedQuestions`."""
        scenes: list[Scene] = []
        asked: list[list[Question]] = []
        while len(scenes) < size:
            scene = self.scene()
            chosen = self.choose(questions(scene))
            if chosen:
                scenes.append(scene)
                asked.append(chosen)
        return self.rows.batch(render(scenes), asked)

    def scene(self) -> Scene:
        """One training picture; no held-out pair occurs in it in any role."""
        return sample_scene(self.rng, pairs=TRAIN_PAIRS, sizes=self.sizes, unnamed=UNNAMED_RATE, blobs=BLOB_RATE)

    def choose(self, possible: list[Question]) -> list[Question]:
        """Questions for one row, every kind equally likely (with repetition when the picture determines few)."""
        if not possible:
            return []
        kinds = sorted({question.kind for question in possible})
        chosen = []
        for _ in range(QUESTIONS_PER_IMAGE):
            kind = kinds[int(self.rng.integers(len(kinds)))]
            fitting = [question for question in possible if question.kind == kind]
            chosen.append(fitting[int(self.rng.integers(len(fitting)))])
        return chosen


def train(
    seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True, sizes: Sequence[str] = ("large",)
) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken."""
    started = time.process_time()
    with reproducible(seed) as rng:
        model, processor = build()
        stream = Stream(rng, processor, sizes)

        def loss() -> Float[Tensor, ""]:
            batch = stream.batch(RECIPE.batch)
            labels = batch.pop("labels")
            logits = model(**batch).logits
            return torch.nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED])

        watched = _asked(300, seed + 2_000_003, VALIDATION_PAIRS, sizes)
        minutes = fit(
            model,
            loss,
            RECIPE,
            steps=steps,
            progress=progress,
            label=f"shapes-llava seed {seed}",
            check=lambda: float(answered_right(model, processor, watched).mean()),
        )
    spent = {"minutes": minutes, "cpu_minutes": (time.process_time() - started) / 60}
    return finished(
        "shapes-llava", seed, out_dir, spent, lambda folder: evaluate(folder, sizes=sizes), (model, processor), progress
    )


def evaluate(
    folder: Path, *, count: int = 3000, seed: int = 1_000_003, sizes: Sequence[str] = ("large",)
) -> dict[str, Any]:
    """Score the model in ``folder``: the share of questions whose most likely next token is the answer.

    ``held_out`` is about objects of the five test pairs, ``validation`` about the three validation pairs (the score that chooses between
    seeds), ``trained`` about trained pairs; each on its own stream of new scenes, through the saved processor.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    scores: dict[str, Any] = {}
    groups: list[tuple[str, Sequence[Pair], int]] = [
        ("held_out", TEST_PAIRS, seed),
        ("validation", VALIDATION_PAIRS, seed + 1),
        ("trained", TRAIN_PAIRS, seed + 2),
    ]
    for group, subjects, stream in groups:
        asked = _asked(count, stream, subjects, sizes)
        right = answered_right(model, processor, asked)
        scores[group] = round(float(right.mean()), 5)
        scores[f"{group}_answers"] = count
        if group == "held_out":
            kinds = np.array([question.kind for _, question in asked])
            for kind in KINDS:
                scores[f"held_out_{kind}"] = round(float(right[kinds == kind].mean()), 5)
    return scores


def pairs(count: int, seed: int) -> Pairs:
    """Two pictures and a question about the colour of an object of a held-out pair; each of these pairs equally often, in turn."""
    each = -(-count // len(TEST_PAIRS))
    rows = [
        sample_question_pairs(each, seed * len(TEST_PAIRS) + number, subjects=[subject], distractors=TRAIN_PAIRS)
        for number, subject in enumerate(TEST_PAIRS)
    ]
    return of_questions([pair for column in zip(*rows, strict=True) for pair in column][:count])


def _asked(
    count: int, seed: int, subjects: Sequence[Pair], sizes: Sequence[str] = ("large",)
) -> list[tuple[Scene, Question]]:
    """Questions about some pairs, among objects of trained pairs."""
    return sample_questions(count, seed, subjects=subjects, distractors=TRAIN_PAIRS, sizes=sizes)
