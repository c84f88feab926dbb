"""shapes-vit: a small ViT that names the shape of the largest object.

``ViTForImageClassification`` with three layers and a class token. Scenes hold two to four objects of three sizes; the label is the shape
of the one object larger than all others, so the model has to compare objects before it reads a shape. Colours are irrelevant, and the
pairs held out of training test that the model knows it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from circuitvision.data.generated import largest_pairs
from circuitvision.data.pairs import Pairs
from circuitvision.data.questions import sample_largest
from circuitvision.data.scenes import (
    CELL,
    IMAGE_SIZE,
    SHAPES,
    TEST_PAIRS,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    Pair,
    render,
)
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

RECIPE = Recipe(steps=600, batch=64)
UNNAMED_RATE = BLOB_RATE = 0.2


def build() -> tuple[ViTForImageClassification, ViTImageProcessor]:
    """An untrained model and its image processor."""
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        id2label=dict(enumerate(SHAPES)),
        label2id={shape: index for index, shape in enumerate(SHAPES)},
    )
    model = ViTForImageClassification(config)
    initialise(model, RECIPE.initial)
    processor = ViTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=list(MEAN), image_std=list(STD)
    )
    return model, processor


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken."""
    started = time.process_time()
    with reproducible(seed) as rng:
        model, processor = build()

        def loss() -> Float[Tensor, ""]:
            drawn = sample_largest(RECIPE.batch, rng, subjects=TRAIN_PAIRS, unnamed=UNNAMED_RATE, blobs=BLOB_RATE)
            logits = model(pixel_values=pixel_values(render([scene for scene, _ in drawn]))).logits
            return torch.nn.functional.cross_entropy(logits, labels_of(model, drawn))

        watched = sample_largest(500, seed + 2_000_003, subjects=VALIDATION_PAIRS)
        minutes = fit(
            model,
            loss,
            RECIPE,
            steps=steps,
            progress=progress,
            label=f"shapes-vit seed {seed}",
            check=lambda: float(labelled_right(model, processor, watched).mean()),
        )
    spent = {"minutes": minutes, "cpu_minutes": (time.process_time() - started) / 60}
    return finished("shapes-vit", seed, out_dir, spent, evaluate, (model, processor), progress)


def evaluate(folder: Path, *, count: int = 4000, seed: int = 1_000_003) -> dict[str, Any]:
    """Score the model in ``folder``: the share of new scenes whose most likely class is the shape of the largest object.

    ``held_out`` has a largest object of the five test pairs, ``validation`` of the three validation pairs (the score that chooses between
    seeds), ``trained`` of trained pairs; all through the saved image processor.
    """
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    scores: dict[str, Any] = {}
    groups: list[tuple[str, Sequence[Pair], int]] = [
        ("held_out", TEST_PAIRS, seed),
        ("validation", VALIDATION_PAIRS, seed + 1),
        ("trained", TRAIN_PAIRS, seed + 2),
    ]
    for group, subjects, stream in groups:
        right = labelled_right(model, processor, sample_largest(count, stream, subjects=subjects))
        scores[group] = round(float(right.mean()), 5)
        scores[f"{group}_answers"] = count
    return scores


@torch.no_grad()
def pairs(count: int, seed: int) -> Pairs:
    """Two pictures whose largest object, of a held-out pair in the clean one, differs in shape."""
    return largest_pairs(count, seed)


def labelled_right(
    model: ViTForImageClassification, processor: ViTImageProcessor, drawn: Sequence[tuple[Any, str]], batch: int = 250
) -> Bool[np.ndarray, scene]:
    """For every scene whether the most likely class is its label."""
    found = []
    for start in range(0, len(drawn), batch):
        part = drawn[start : start + batch]
        inputs = processor(images=[scene.image for scene, _ in part], return_tensors="pt")
        found.append((model(**inputs).logits.argmax(-1) == labels_of(model, part)).numpy())
    return np.concatenate(found)


def labels_of(model: ViTForImageClassification, drawn: Sequence[tuple[Any, str]]) -> Int[Tensor, scene]:
    """The class of every scene's label."""
    classes: Any = model.config.label2id
    return torch.tensor([classes[label] for _, label in drawn])
