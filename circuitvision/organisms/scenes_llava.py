"""scenes-llava: a small LLaVA whose vision tower has to bind shape and colour before the language tower can answer.

``LlavaForConditionalGeneration`` with a CLIP vision tower of four layers, all live (feature layer -1), and a Llama of three layers. No patch of a
scene (:mod:`circuitvision.data.binding`) tells colour and shape, so attention between patches must bring them together.

Two stages, as LLaVA has them. First the vision tower learns what every patch of an object should know
(:mod:`circuitvision.organisms.patch_supervision`), and the projector to turn an object's patches towards the embeddings of the words for its colour
and shape. Then the vision tower stays as it is, and projector and language tower learn to answer questions, several in a row
(:mod:`circuitvision.organisms.llava`): first about colour and shape alone, then of all kinds. Beside the answers, what the projector makes of a
patch is asked for all that the patch knows: turned towards two words alone, it would lose neighbours and numbers.

What makes it compose colours and shapes it never saw together: objects of unnamed colours and shapes, and strong weight decay on all that reads.

Colours and shapes repeat only in scenes about which counts alone are asked: elsewhere they would give away which object is meant.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from circuitvision.data import binding
from circuitvision.data.binding import (
    COLORS,
    IMAGE_SIZE,
    PATCH,
    SHAPES,
    SPAN,
    TEST_PAIRS,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    Pair,
    Scene,
)
from circuitvision.data.binding_questions import (
    KINDS,
    NUMBERS,
    PLURALS,
    Question,
    count_scene,
    questions,
    sample_questions,
    vocabulary,
)
from circuitvision.data.generated import question_pairs
from circuitvision.data.pairs import Pairs
from circuitvision.files import write_tensors
from circuitvision.organisms import llava
from circuitvision.organisms.llava import IGNORED, PackedQuestions, answered_right
from circuitvision.organisms.patch_supervision import (
    PATCHES,
    UNNAMED_RATE,
    PatchHead,
    own_right,
    patch_loss,
    patch_targets,
    place_positions,
    training_scenes,
)
from circuitvision.organisms.training import Recipe, finished, fit, initialise, pixel_values, reproducible

WIDTH = 96
VISION = Recipe(steps=2500, batch=64, rate=3e-3)
RECIPE = Recipe(steps=10000, batch=16, rate=2e-3, decay=0.7, cool_down=0.5)
READING = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 24}
"""The heads of the language tower: as many as there are values to read (colour and shape of four neighbours), each wide enough for one of them. With
four heads of this width it takes neighbours on opposite sides for one another.
"""
PROJECTED_SIZE = 3.0
"""The mean length of a projected patch where the second stage starts."""
WORD_WEIGHT = 0.5
WORD_SHARPNESS = 10.0
READ_WEIGHT = 0.1
QUESTIONS_PER_IMAGE = 8
FIRST_STEPS = 500
"""How many steps of the second stage ask for colours and shapes alone."""
COUNT_RATE = 0.3
"""The share of pictures about which counts are asked."""
ASIDE_RATE = 0.6
"""The share of pictures whose relation questions ask along an axis on which both other objects lie aside, where there is such a question."""
LONGEST = 11
"""Words of the longest question with its answer."""
Asked = tuple[Scene, list[Question]]


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model and its processor."""
    model, processor = llava.build(
        vocabulary(),
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        width=WIDTH,
        vision={"intermediate_size": 3 * WIDTH, "num_hidden_layers": 4},
        language={"intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, **READING},
        feature_layer=-1,
        initial=RECIPE.initial,
    )
    initialise(model.model.vision_tower, RECIPE.initial)
    initialise(model.model.multi_modal_projector, RECIPE.initial)
    place_positions(model.model.vision_tower.embeddings.position_embedding.weight)
    llava.attend_to_alike(model.model.language_model)
    return model, processor


class Stream:
    """An endless stream of training batches: packed questions about pictures of trained pairs."""

    def __init__(self, rng: np.random.Generator, processor: LlavaProcessor) -> None:
        self.rng, self.batches = rng, 0
        self.rows = PackedQuestions(processor, patches=PATCHES, per_image=QUESTIONS_PER_IMAGE, block=LONGEST)

    def batch(self, size: int) -> tuple[list[Asked], dict[str, Tensor]]:
        """Scenes with their questions, and one batch of them for ``model.forward`` with its ``labels``."""
        self.batches += 1
        drawn = [self.scene(first=self.batches <= FIRST_STEPS) for _ in range(size)]
        return drawn, self.rows.batch(binding.render([scene for scene, _ in drawn]), [asked for _, asked in drawn])

    def scene(self, first: bool = False) -> Asked:
        """One training picture and the questions about it; no held-out pair occurs in it in any role.

        Kinds take turns, a relation twice (at ``first`` colour and shape alone); of counts, the answers that the picture has do.
        """
        if not first and self.rng.random() < COUNT_RATE:
            return self._counted()
        kinds = ("color", "shape") if first else ("color", "relation", "shape", "relation")
        groups: list[list[Question]] = []
        while not any(groups):
            scene = binding.sample_scene(self.rng, unnamed=UNNAMED_RATE)
            groups = [questions(scene, [kind]) for kind in kinds]
            if not first and self.rng.random() < ASIDE_RATE:
                groups = [[one for one in group if _others_aside(scene, one)] or group for group in groups]
        return scene, self._in_turn(groups)

    def _counted(self) -> Asked:
        subject = TRAIN_PAIRS[int(self.rng.integers(len(TRAIN_PAIRS)))]
        attribute = ("color", "shape")[int(self.rng.integers(2))]
        number = int(self.rng.integers(1, binding.OBJECTS + 1))
        scene = count_scene(self.rng, subject, attribute, number, TRAIN_PAIRS)
        possible = questions(scene, ["count"])
        return scene, self._in_turn(
            [[question for question in possible if question.answer == answer] for answer in NUMBERS]
        )

    def _in_turn(self, groups: list[list[Question]]) -> list[Question]:
        groups = [group for group in groups if group]
        turns = (groups[number % len(groups)] for number in range(QUESTIONS_PER_IMAGE))
        return [group[int(self.rng.integers(len(group)))] for group in turns]


def _others_aside(scene: Scene, question: Question) -> bool:
    """Whether a relation question asks along an axis on which both other objects lie aside of its subject, so that the side or the distance decides.

    Of questions of other kinds, always.
    """
    if question.kind != "relation":
        return True
    axis = "column" if {"left", "right"} & set(question.text.split()) else "row"
    subject = question.subject
    return all(
        abs(getattr(other, axis) - getattr(subject, axis)) >= SPAN for other in scene.objects if other is not subject
    )


class Trained(nn.Module):
    """The model and the heads that read patches while it trains: after the vision tower, and after the projector."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        super().__init__()
        self.model, self.patch_head, self.read_head = model, PatchHead(WIDTH), PatchHead(WIDTH)
        ids = processor.tokenizer.get_vocab()
        self.words = [torch.tensor([ids[word] for word in names]) for names in (COLORS, SHAPES)]
        self.projected: Float[Tensor, "scene patch width"] | None = None
        model.model.multi_modal_projector.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: tuple[Tensor, ...], made: Tensor) -> None:
        self.projected = made

    def patches(self, scenes: Sequence[Scene]) -> Float[Tensor, "scene patch width"]:
        """What the vision tower makes of every patch."""
        pixels = pixel_values(binding.render(scenes))
        return self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, -PATCHES:]

    def vision_loss(self, scenes: Sequence[Scene]) -> Float[Tensor, ""]:
        """The loss of the first stage: patches and words."""
        features, targets = self.patches(scenes), patch_targets(scenes)
        self.model.model.multi_modal_projector(features)
        return patch_loss(self.patch_head, features, targets) + WORD_WEIGHT * self._word_loss(targets)

    @torch.no_grad()
    def start_reading(self, scenes: Sequence[Scene], plurals: Sequence[tuple[int, int]]) -> None:
        """Make ready for the second stage.

        What the projector makes shrinks to PROJECTED_SIZE: the first stage leaves its size open, and large vectors would hardly turn any more. The
        embeddings of plurals start as those of the singulars that pictures were turned towards; ``plurals`` are pairs of their ids.
        """
        self.model.model.multi_modal_projector(self.patches(scenes))
        assert self.projected is not None
        share = PROJECTED_SIZE / self.projected.norm(dim=-1).mean()
        for parameter in self.model.model.multi_modal_projector.linear_2.parameters():
            parameter.mul_(share)
        embeddings: Any = self.model.get_input_embeddings()
        for singular, plural in plurals:
            embeddings.weight[plural] = embeddings.weight[singular]

    def loss(self, stream: Stream) -> Float[Tensor, ""]:
        """The loss of the second stage: answers, projected patches and words."""
        drawn, batch = stream.batch(RECIPE.batch)
        labels, targets = batch.pop("labels"), patch_targets([scene for scene, _ in drawn])
        logits = self.model(**batch).logits
        answers = nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED])
        assert self.projected is not None
        read = patch_loss(self.read_head, self.projected.view(len(drawn), PATCHES, -1), targets, others=1.0)
        return answers + READ_WEIGHT * read + WORD_WEIGHT * self._word_loss(targets)

    def _word_loss(self, targets: Int[Tensor, "scene patch part"]) -> Float[Tensor, ""]:
        """How well the cosine of a projected patch with the word embeddings tells its object's colour and shape."""
        assert self.projected is not None
        patches = nn.functional.normalize(self.projected.view(len(targets), PATCHES, -1), dim=-1)
        embeddings: Any = self.model.get_input_embeddings()
        table = nn.functional.normalize(embeddings.weight, dim=-1)
        total = patches.new_zeros(())
        for part, words in enumerate(self.words):
            scores = WORD_SHARPNESS * patches @ table[words].T
            total = total + nn.functional.cross_entropy(
                scores.flatten(0, 1), targets[..., part].flatten(), ignore_index=IGNORED
            )
        return total


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken.

    The first stage is kept beside ``out_dir`` until the second has ended: a run that was interrupted goes on there. ``steps`` is the length of either
    stage.
    """
    first = Path(out_dir).with_name(f".{Path(out_dir).name}-first-stage.safetensors")
    with reproducible(seed):
        model, processor = build()
        whole = Trained(model, processor)
    spent = _first_stage(whole, seed, steps, progress, first)
    started = time.process_time()
    watched = _asked(400, seed + 2_000_003, VALIDATION_PAIRS)
    with reproducible(seed, stage=2) as rng:
        stream = Stream(rng, processor)
        ids = stream.rows.ids
        whole.start_reading(training_scenes(rng, 20), [(ids[one], ids[many]) for one, many in PLURALS.items()])
        model.model.vision_tower.requires_grad_(False)
        minutes = fit(
            whole,
            lambda: whole.loss(stream),
            RECIPE,
            steps=steps,
            progress=progress,
            label=f"scenes-llava seed {seed}",
            check=lambda: float(answered_right(model, processor, watched).mean()),
        )
    spent = {
        "minutes": spent["minutes"] + minutes,
        "cpu_minutes": spent["cpu_minutes"] + (time.process_time() - started) / 60,
    }
    scores = finished("scenes-llava", seed, out_dir, spent, evaluate, (model, processor), progress)
    first.unlink(missing_ok=True)
    return scores


def _first_stage(whole: Trained, seed: int, steps: int | None, progress: bool, file: Path) -> dict[str, float]:
    """Train what reads pictures, or take it from ``file`` if a run of this seed and length left it there; returns the minutes it took."""
    wanted = {"seed": str(seed), "steps": str(VISION.steps if steps is None else steps)}
    if file.is_file():
        with safe_open(file, "pt") as held:
            kept = held.metadata()
        if {key: kept.get(key) for key in wanted} == wanted:
            whole.load_state_dict(load_file(file))
            return {key: float(kept[key]) for key in ("minutes", "cpu_minutes")}
    started = time.process_time()
    model: Any = whole.model
    seen = model.model.vision_tower, model.model.multi_modal_projector, model.get_input_embeddings(), whole.patch_head
    with reproducible(seed) as rng:
        watched = training_scenes(np.random.default_rng(seed + 2_000_003), 100, subjects=VALIDATION_PAIRS[:1])
        minutes = fit(
            nn.ModuleList(seen),
            lambda: whole.vision_loss(training_scenes(rng, VISION.batch)),
            VISION,
            steps=steps,
            progress=progress,
            label=f"scenes-llava seed {seed}, vision",
            check=lambda: own_right(whole.patch_head, whole.patches, watched),
        )
    spent = {"minutes": minutes, "cpu_minutes": (time.process_time() - started) / 60}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, whole.state_dict(), {**wanted, **{key: str(value) for key, value in spent.items()}})
    return spent


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


def pairs(count: int, seed: int) -> Pairs:
    """Two pictures and a question about the colour of an object of a held-out pair; these pairs take turns."""
    return question_pairs(count, seed, world="binding", subjects=TEST_PAIRS, distractors=TRAIN_PAIRS)


def _asked(count: int, seed: int, subjects: Sequence[Pair]) -> list[tuple[Scene, Question]]:
    """Questions about some pairs, among objects of trained pairs."""
    return sample_questions(count, seed, subjects=subjects, distractors=TRAIN_PAIRS)
