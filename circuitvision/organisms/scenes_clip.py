"""scenes-clip: a small CLIP that tells which caption names two objects of a scene whose patches have to be bound.

``CLIPModel`` with a vision tower of four layers and a text tower of two, trained as :mod:`circuitvision.organisms.shapes_clip` is: beside the other
captions of the batch the loss sees wrong ones with one colour or one shape changed, or with the two colours exchanged. It learns in three stages:
patches their own colours and shapes (:mod:`circuitvision.organisms.patch_supervision`, which stays a second loss), then captions of scenes of two
objects, of which both are named, then of three, of which a caption leaves one out. Without the middle one it stays with what is in the scene, and
not with what belongs together.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from circuitvision.data import binding
from circuitvision.data.binding import (
    IMAGE_SIZE,
    OBJECTS,
    PATCH,
    TEST_PAIRS,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    Scene,
)
from circuitvision.data.captions import sample_retrievals, vocabulary
from circuitvision.data.generated import caption_pairs
from circuitvision.data.pairs import Pairs
from circuitvision.organisms import shapes_clip
from circuitvision.organisms.patch_supervision import (
    PATCHES,
    PatchHead,
    patch_loss,
    patch_targets,
    place_positions,
    training_scenes,
)
from circuitvision.organisms.shapes_clip import contrastive_loss, retrieved_right, scored
from circuitvision.organisms.training import Recipe, finished, fit, pixel_values, reproducible

WIDTH = 64
VISION = Recipe(steps=1200, batch=64, rate=3e-3)
TWO_OBJECTS = Recipe(steps=1500, batch=64, rate=2e-3)
RECIPE = Recipe(steps=8000, batch=64, rate=2e-3)
PATCH_WEIGHT = 0.3


def build() -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained model and its processor."""
    model, processor = shapes_clip.build(vocabulary("binding"), layers=4, image_size=IMAGE_SIZE, patch_size=PATCH)
    place_positions(model.vision_model.embeddings.position_embedding.weight)
    return model, processor


class Stream(shapes_clip.Stream):
    """An endless stream of training batches: scenes, true captions, and wrong captions that are nearly true."""

    pairs = TRAIN_PAIRS
    count = OBJECTS

    def scene(self) -> Scene:
        """One training picture of ``count`` objects; no held-out pair occurs in it in any role."""
        return binding.sample_scene(self.rng, count=self.count)


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken.

    ``steps`` is the length of each stage.
    """
    started = time.process_time()
    with reproducible(seed) as rng:
        model, processor = build()
        stream = Stream(rng, processor)
        head = PatchHead(WIDTH)

        def vision_loss() -> Float[Tensor, ""]:
            scenes = training_scenes(rng, VISION.batch)
            made = model.vision_model(pixel_values(binding.render(scenes)), output_hidden_states=True)
            return patch_loss(head, made.hidden_states[-1][:, -PATCHES:], patch_targets(scenes), others=0.0)

        def loss() -> Float[Tensor, ""]:
            scenes, inputs, also_true = stream.batch(RECIPE.batch)
            made = model(**inputs, output_hidden_states=True)
            features = made.vision_model_output.hidden_states[-1][:, -PATCHES:]
            patches = patch_loss(head, features, patch_targets(scenes), others=0.0)
            return contrastive_loss(made.logits_per_image, also_true) + PATCH_WEIGHT * patches

        label = f"scenes-clip seed {seed}"
        seen, whole = nn.ModuleList([model.vision_model, head]), nn.ModuleList([model, head])
        minutes = fit(seen, vision_loss, VISION, steps=steps, progress=progress, label=f"{label}, patches")
        watched = sample_retrievals(300, seed + 2_000_003, world="binding", subjects=VALIDATION_PAIRS, with_subject=3)
        for count, recipe in ((2, TWO_OBJECTS), (OBJECTS, RECIPE)):
            stream.count = count
            minutes += fit(
                whole,
                loss,
                recipe,
                steps=steps,
                progress=progress,
                label=f"{label}, {count} objects",
                check=lambda: float(retrieved_right(model, processor, watched).mean()),
            )
    spent = {"minutes": minutes, "cpu_minutes": (time.process_time() - started) / 60}
    return finished("scenes-clip", seed, out_dir, spent, evaluate, (model, processor), progress)


def evaluate(folder: Path, *, count: int = 2560, seed: int = 1_000_003) -> dict[str, Any]:
    """Score the model in ``folder`` as :func:`circuitvision.organisms.shapes_clip.evaluate` does.

    That is the share of new scenes for which the true caption of 16 distinct ones has the highest logit, on test, validation and trained pairs, and
    with colours exchanged.
    """
    return scored(folder, "binding", (TEST_PAIRS, VALIDATION_PAIRS, TRAIN_PAIRS), count, seed)


def pairs(count: int, seed: int) -> Pairs:
    """Two pictures and two captions, of which one is true of each; what changes is the colour of an object of a held-out pair; these take turns."""
    return caption_pairs(count, seed, world="binding", subjects=TEST_PAIRS, pairs=TRAIN_PAIRS)
