"""scenes-clip: a small CLIP that tells which caption names two objects of a scene whose patches have to be bound.

``CLIPModel`` with a vision tower of four layers and a text tower of two, trained as :mod:`circuitvision.organisms.shapes_clip` is: beside the other
captions of the batch the loss sees wrong ones with one colour or one shape changed, or with the two colours exchanged. The patches' own colours and
shapes are a second loss while training (:mod:`circuitvision.organisms.patch_supervision`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from circuitvision.data import binding
from circuitvision.data.binding import IMAGE_SIZE, PATCH, TEST_PAIRS, TRAIN_PAIRS, VALIDATION_PAIRS, Scene
from circuitvision.data.captions import sample_retrievals, vocabulary
from circuitvision.organisms import shapes_clip
from circuitvision.organisms.patch_supervision import PATCHES, PatchHead, patch_loss, patch_targets, place_positions
from circuitvision.organisms.shapes_clip import contrastive_loss, retrieved_right, scored
from circuitvision.organisms.training import Recipe, fit, pixel_values, report, reproducible, write_folder

WIDTH = 64
RECIPE = Recipe(steps=2500, batch=64, rate=2e-3)
PATCH_WEIGHT = 0.5


def build() -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained model and its processor."""
    model, processor = shapes_clip.build(vocabulary("binding"), layers=4, image_size=IMAGE_SIZE, patch_size=PATCH)
    place_positions(model.vision_model.embeddings.position_embedding.weight)
    return model, processor


class Stream(shapes_clip.Stream):
    """An endless stream of training batches: scenes, true captions, and wrong captions that are nearly true."""

    pairs = TRAIN_PAIRS

    def drawn(self, size: int) -> tuple[list[Scene], dict[str, Tensor], Bool[Tensor, "image text"]]:
        """Scenes, inputs for ``model.forward``, and which other texts are true of each."""
        scenes = [binding.sample_scene(self.rng) for _ in range(size)]
        inputs, also_true = self.texts(scenes)
        return scenes, {**inputs, "pixel_values": pixel_values(binding.render(scenes))}, also_true


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken."""
    started = time.process_time()
    with reproducible(seed) as rng:
        model, processor = build()
        stream = Stream(rng, processor)
        whole = nn.ModuleDict({"model": model, "head": PatchHead(WIDTH)})

        def loss() -> Float[Tensor, ""]:
            scenes, inputs, also_true = stream.drawn(RECIPE.batch)
            made = model(**inputs, output_hidden_states=True)
            features = made.vision_model_output.hidden_states[-1][:, -PATCHES:]
            patches = patch_loss(whole["head"], features, patch_targets(scenes), others=0.0)
            return contrastive_loss(made.logits_per_image, also_true) + PATCH_WEIGHT * patches

        watched = sample_retrievals(300, seed + 2_000_003, world="binding", subjects=VALIDATION_PAIRS, with_subject=3)
        minutes = fit(
            whole,
            loss,
            RECIPE,
            steps=steps,
            progress=progress,
            label=f"scenes-clip seed {seed}",
            check=lambda: float(retrieved_right(model, processor, watched).mean()),
        )
    spent = {"minutes": round(minutes, 2), "cpu_minutes": round((time.process_time() - started) / 60, 2)}
    write_folder(Path(out_dir), model, processor)
    scores = {"seed": seed, **spent, **evaluate(Path(out_dir))}
    if progress:
        report("scenes-clip", scores)
    return scores


def evaluate(folder: Path, *, count: int = 2560, seed: int = 1_000_003) -> dict[str, Any]:
    """Score the model in ``folder`` as :func:`circuitvision.organisms.shapes_clip.evaluate` does.

    That is the share of new scenes for which the true caption of 16 distinct ones has the highest logit, on test, validation and trained pairs, and
    with colours exchanged.
    """
    return scored(folder, "binding", (TEST_PAIRS, VALIDATION_PAIRS, TRAIN_PAIRS), count, seed)
