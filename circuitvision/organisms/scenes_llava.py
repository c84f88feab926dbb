"""scenes-llava: a small LLaVA whose vision tower has to bind shape and colour before the language tower can answer.

``LlavaForConditionalGeneration`` with a CLIP vision tower of four layers, all live (feature layer -1), and a Llama of three layers with grouped
queries. No patch of a scene (:mod:`circuitvision.data.binding`) tells colour and shape, so attention between patches must bring them together.

Two stages. First the vision tower alone learns what every patch of an object should know (:mod:`circuitvision.organisms.patch_supervision`). Then the
whole model answers questions, several in a row (:mod:`circuitvision.organisms.llava`), with two losses beside it: that of the first stage, and one
that turns every object's projected patches towards the embeddings of the words for its colour and shape.

Colours and shapes repeat only in scenes about which counts alone are asked: elsewhere they would give away which object is meant.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from circuitvision.data import binding
from circuitvision.data.binding import (
    COLORS,
    IMAGE_SIZE,
    PATCH,
    SHAPES,
    TEST_PAIRS,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    Pair,
    Scene,
)
from circuitvision.data.binding_questions import (
    KINDS,
    NUMBERS,
    Question,
    count_scene,
    questions,
    sample_questions,
    vocabulary,
)
from circuitvision.organisms import llava
from circuitvision.organisms.llava import IGNORED, PackedQuestions, answered_right
from circuitvision.organisms.patch_supervision import (
    PATCHES,
    PatchHead,
    own_right,
    patch_loss,
    patch_targets,
    place_positions,
    training_scenes,
)
from circuitvision.organisms.training import Recipe, fit, initialise, pixel_values, report, reproducible, write_folder

WIDTH = 96
VISION = Recipe(steps=2500, batch=64, rate=3e-3)
RECIPE = Recipe(steps=3000, batch=16, rate=3e-3)
VISION_SHARE = 0.3
"""The vision tower's share of the learning rate in the second stage."""
PATCH_WEIGHT = WORD_WEIGHT = 0.5
WORD_SHARPNESS = 10.0
QUESTIONS_PER_IMAGE = 8
COUNT_RATE = 0.3
"""The share of pictures about which counts are asked."""
LONGEST = 11
"""Words of the longest question with its answer."""


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model and its processor."""
    model, processor = llava.build(
        vocabulary(),
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        width=WIDTH,
        vision={"intermediate_size": 3 * WIDTH, "num_hidden_layers": 4},
        language={"intermediate_size": 2 * WIDTH, "num_hidden_layers": 3},
        feature_layer=-1,
        initial=RECIPE.initial,
    )
    initialise(model.model.vision_tower, RECIPE.initial)
    initialise(model.model.multi_modal_projector, RECIPE.initial)
    place_positions(model.model.vision_tower.embeddings.position_embedding.weight)
    return model, processor


class Stream:
    """An endless stream of training batches: packed questions about pictures of trained pairs."""

    def __init__(self, rng: np.random.Generator, processor: LlavaProcessor) -> None:
        self.rng = rng
        self.rows = PackedQuestions(processor, patches=PATCHES, per_image=QUESTIONS_PER_IMAGE, block=LONGEST)

    def batch(self, size: int) -> tuple[list[Scene], dict[str, Tensor]]:
        """Scenes, and one batch about them for ``model.forward`` with its ``labels``."""
        drawn = [self.scene() for _ in range(size)]
        scenes = [scene for scene, _ in drawn]
        return scenes, self.rows.batch(binding.render(scenes), [asked for _, asked in drawn])

    def scene(self) -> tuple[Scene, list[Question]]:
        """One training picture and the questions about it; no held-out pair occurs in it in any role.

        Kinds take turns, a relation twice; of counts, the answers that the picture has do.
        """
        rng = self.rng
        if rng.random() < COUNT_RATE:
            subject = TRAIN_PAIRS[int(rng.integers(len(TRAIN_PAIRS)))]
            attribute, number = ("color", "shape")[int(rng.integers(2))], int(rng.integers(1, binding.OBJECTS + 1))
            scene = count_scene(rng, subject, attribute, number, TRAIN_PAIRS)
            possible = questions(scene, ["count"])
            groups = [[question for question in possible if question.answer == answer] for answer in NUMBERS]
        else:
            scene = binding.sample_scene(rng)
            turns = ("color", "relation", "shape", "relation")
            groups = [questions(scene, [kind]) for kind in turns]
        groups = [group for group in groups if group]
        turns_taken = (groups[number % len(groups)] for number in range(QUESTIONS_PER_IMAGE))
        return scene, [group[int(rng.integers(len(group)))] for group in turns_taken]


class Trained(nn.Module):
    """The model and the head that reads its patches while it trains."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        super().__init__()
        self.model, self.head = model, PatchHead(WIDTH)
        ids = processor.tokenizer.get_vocab()
        self.words = [torch.tensor([ids[word] for word in names]) for names in (COLORS, SHAPES)]
        self.projected: Float[Tensor, "scene patch width"] | None = None
        self.features: Float[Tensor, "scene patch width"] | None = None
        model.model.multi_modal_projector.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        self.features, self.projected = given[0], made

    def patches(self, scenes: Sequence[Scene]) -> Float[Tensor, "scene patch width"]:
        """What the vision tower makes of every patch."""
        pixels = pixel_values(binding.render(scenes))
        return self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, -PATCHES:]

    def vision_loss(self, scenes: Sequence[Scene]) -> Float[Tensor, ""]:
        """The loss of the first stage."""
        return patch_loss(self.head, self.patches(scenes), patch_targets(scenes))

    def loss(self, scenes: Sequence[Scene], batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """The loss of the second stage: answers, patches, and words."""
        labels, targets = batch.pop("labels"), patch_targets(scenes)
        logits = self.model(**batch).logits
        answers = nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED])
        assert self.features is not None
        patches = patch_loss(self.head, self.features.view(len(scenes), PATCHES, -1), targets)
        return answers + PATCH_WEIGHT * patches + WORD_WEIGHT * self._word_loss(targets)

    def _word_loss(self, targets: Tensor) -> Float[Tensor, ""]:
        """How well the cosine of a projected patch with the word embeddings tells its object's colour and shape."""
        assert self.projected is not None
        patches = nn.functional.normalize(self.projected.view(len(targets), PATCHES, -1), dim=-1)
        table = nn.functional.normalize(self.model.get_input_embeddings().weight, dim=-1)
        total = patches.new_zeros(())
        for part, words in enumerate(self.words):
            scores = WORD_SHARPNESS * patches @ table[words].T
            total = total + nn.functional.cross_entropy(
                scores.flatten(0, 1), targets[..., part].flatten(), ignore_index=IGNORED
            )
        return total


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken.

    ``steps`` is the length of either stage.
    """
    started = time.process_time()
    with reproducible(seed) as rng:
        model, processor = build()
        whole, stream = Trained(model, processor), Stream(rng, processor)
        seen = nn.ModuleDict({"vision": model.model.vision_tower, "head": whole.head})
        watched_scenes = training_scenes(np.random.default_rng(seed + 2_000_003), 100, subjects=VALIDATION_PAIRS[:1])
        minutes = fit(
            seen,
            lambda: whole.vision_loss(training_scenes(rng, VISION.batch)),
            VISION,
            steps=steps,
            progress=progress,
            label=f"scenes-llava seed {seed}, vision",
            check=lambda: own_right(whole.head, whole.patches, watched_scenes),
        )
        watched = _asked(400, seed + 2_000_003, VALIDATION_PAIRS)
        minutes += fit(
            whole,
            lambda: whole.loss(*stream.batch(RECIPE.batch)),
            RECIPE,
            steps=steps,
            progress=progress,
            label=f"scenes-llava seed {seed}",
            check=lambda: float(answered_right(model, processor, watched).mean()),
            slower={"model.model.vision_tower": VISION_SHARE, "head": VISION_SHARE},
        )
    spent = {"minutes": round(minutes, 2), "cpu_minutes": round((time.process_time() - started) / 60, 2)}
    write_folder(Path(out_dir), model, processor)
    scores = {"seed": seed, **spent, **evaluate(Path(out_dir))}
    if progress:
        report("scenes-llava", scores)
    return scores


def evaluate(folder: Path, *, count: int = 4096, seed: int = 1_000_003) -> dict[str, Any]:
    """Score the model in ``folder``: the share of questions whose most likely next token is the answer, in all and by kind.

    ``held_out`` is about objects of the test pairs, ``validation`` about the validation pairs (the score that chooses between seeds), ``trained``
    about trained pairs; each on its own stream of new scenes, through the saved processor. Kinds of question come up equally often.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    scores: dict[str, Any] = {}
    groups = [("held_out", TEST_PAIRS), ("validation", VALIDATION_PAIRS), ("trained", TRAIN_PAIRS)]
    for number, (group, subjects) in enumerate(groups):
        asked = _asked(count, seed + number, subjects)
        right = answered_right(model, processor, asked)
        scores[group] = round(float(right.mean()), 5)
        scores[f"{group}_answers"] = count
        kinds = np.array([question.kind for _, question in asked])
        for kind in KINDS:
            scores[f"{group}_{kind}"] = round(float(right[kinds == kind].mean()), 5)
    return scores


def _asked(count: int, seed: int, subjects: Sequence[Pair]) -> list[tuple[Scene, Question]]:
    """Questions about some pairs, among objects of trained pairs."""
    return sample_questions(count, seed, subjects=subjects, distractors=TRAIN_PAIRS)
