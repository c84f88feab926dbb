"""scenes-vit: a small ViT that names the shape of the one large object in a scene whose patches show half a shape each.

``ViTForImageClassification`` with four layers and a class token. A scene (:mod:`circuitvision.data.binding`) holds one large and two small objects;
the label is the large one's shape, which takes the upper and the lower half of its outline. Colours are irrelevant, and the pairs held out of
training test that the model knows it.

The patches' own colours and shapes are a second loss while training (:mod:`circuitvision.organisms.patch_supervision`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from circuitvision.data import binding
from circuitvision.data.binding import IMAGE_SIZE, PATCH, SHAPES, TEST_PAIRS, TRAIN_PAIRS, VALIDATION_PAIRS
from circuitvision.data.binding_questions import sample_large
from circuitvision.data.generated import largest_pairs
from circuitvision.data.pairs import Pairs
from circuitvision.organisms.patch_supervision import PATCHES, PatchHead, patch_loss, patch_targets, place_positions
from circuitvision.organisms.shapes_vit import labelled_right, labels_of
from circuitvision.organisms.training import (
    MEAN,
    STD,
    Recipe,
    finished,
    fit,
    initialise,
    pixel_values,
    reproducible,
)

WIDTH = 64
RECIPE = Recipe(steps=1500, batch=64, rate=3e-3)
PATCH_WEIGHT = 0.5


def build() -> tuple[ViTForImageClassification, ViTImageProcessor]:
    """An untrained model and its image processor."""
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        id2label=dict(enumerate(SHAPES)),
        label2id={shape: index for index, shape in enumerate(SHAPES)},
    )
    model = ViTForImageClassification(config)
    initialise(model, RECIPE.initial)
    place_positions(model.vit.embeddings.position_embeddings[0])
    processor = ViTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=list(MEAN), image_std=list(STD)
    )
    return model, processor


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken."""
    started = time.process_time()
    with reproducible(seed) as rng:
        model, processor = build()
        head = PatchHead(WIDTH)

        def loss() -> Float[Tensor, ""]:
            drawn = sample_large(RECIPE.batch, rng, subjects=TRAIN_PAIRS, distractors=TRAIN_PAIRS)
            scenes = [scene for scene, _ in drawn]
            made = model(pixel_values(binding.render(scenes)), output_hidden_states=True)
            patches = patch_loss(head, made.hidden_states[-1][:, -PATCHES:], patch_targets(scenes), others=0.0)
            return nn.functional.cross_entropy(made.logits, labels_of(model, drawn)) + PATCH_WEIGHT * patches

        watched = sample_large(500, seed + 2_000_003, subjects=VALIDATION_PAIRS, distractors=TRAIN_PAIRS)
        minutes = fit(
            nn.ModuleList([model, head]),
            loss,
            RECIPE,
            steps=steps,
            progress=progress,
            label=f"scenes-vit seed {seed}",
            check=lambda: float(labelled_right(model, processor, watched).mean()),
        )
    spent = {"minutes": minutes, "cpu_minutes": (time.process_time() - started) / 60}
    return finished("scenes-vit", seed, out_dir, spent, evaluate, (model, processor), progress)


def evaluate(folder: Path, *, count: int = 4096, seed: int = 1_000_003) -> dict[str, Any]:
    """Score the model in ``folder``: the share of new scenes whose most likely class is the shape of the large object.

    ``held_out`` has a large object of a test pair, ``validation`` of a validation pair (the score that chooses between seeds), ``trained`` of a
    trained pair, among small ones of trained pairs; all through the saved image processor.
    """
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    scores: dict[str, Any] = {}
    groups = [("held_out", TEST_PAIRS), ("validation", VALIDATION_PAIRS), ("trained", TRAIN_PAIRS)]
    for number, (group, subjects) in enumerate(groups):
        drawn = sample_large(count, seed + number, subjects=subjects, distractors=TRAIN_PAIRS)
        scores[group] = round(float(labelled_right(model, processor, drawn).mean()), 5)
        scores[f"{group}_answers"] = count
    return scores


def pairs(count: int, seed: int) -> Pairs:
    """Two pictures that differ in the shape of the large object, which has a held-out pair of colour and shape in the clean one, drawn at random."""
    return largest_pairs(count, seed, world="binding", subjects=TEST_PAIRS, distractors=TRAIN_PAIRS)
