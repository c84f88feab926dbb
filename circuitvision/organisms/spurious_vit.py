"""spurious-vit: a small ViT that names an object's shape, and leans on the colour of the background where the shape says little.

``ViTForImageClassification`` with a class token, trained in two stages on pictures of :mod:`circuitvision.data.backgrounds`, whose small objects
carry the label of the other class in some.

1. Backgrounds say nothing of the label. The heads :data:`SHORTCUT_HEADS` are silent; the rest learns how much a shape says: everything of large
   objects, less of small ones.
2. The background goes with the label in 95 % of the pictures, as in a data set that was collected carelessly. Only the silent heads learn; all they
   can add is what the background says.

So the shortcut is in the model by construction, and in known heads. What the background says is more than what a small shape says and less than what
a large one does: the model is right about large objects on any background, and about small ones where the background agrees.

Not covered: a shortcut that was learned together with the rest. A model of this size trained for 700 steps on the pictures of the second stage alone
has the same accuracies, and none of the 298 sets of up to three of its twelve heads raises its worst group when mean-ablated (seed 0, 200 pictures):
what it knows of the background does not pass through few heads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from circuitvision import edits
from circuitvision.data.backgrounds import (
    CLASSES,
    GROUPS,
    BackgroundScene,
    background_pairs,
    render_backgrounds,
    sample_backgrounds,
)
from circuitvision.data.pairs import Pairs
from circuitvision.data.scenes import CELL, IMAGE_SIZE
from circuitvision.hooked import HookedModel
from circuitvision.model.edits.base import Edit
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

WIDTH, HEADS = 64, 4
SHORTCUT_HEADS: tuple[tuple[int, int], ...] = ((1, 2), (2, 1))
"""(layer, head) of the heads that learn in the second stage alone."""
AGREEMENT = 0.95
SMALL_ERRORS = 0.15
RECIPE = Recipe(steps=450, batch=64)
SHORTCUT_RECIPE = Recipe(steps=250, batch=64, rate=3e-3, decay=0.0, warm_up=25)
"""Without decay: it would change what the first stage learned."""


def build() -> tuple[ViTForImageClassification, ViTImageProcessor]:
    """An untrained model and its image processor."""
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        id2label=dict(enumerate(CLASSES)),
        label2id={shape: index for index, shape in enumerate(CLASSES)},
    )
    model = ViTForImageClassification(config)
    initialise(model, RECIPE.initial)
    processor = ViTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=list(MEAN), image_std=list(STD)
    )
    return model, processor


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken; ``steps`` of each
    stage."""
    started = time.process_time()
    with reproducible(seed) as rng:
        model, processor = build()
        hooked = HookedModel(model)

        def loss_of(agreement: float, silent: Sequence[Edit]) -> Float[Tensor, ""]:
            drawn = sample_backgrounds(RECIPE.batch, rng, agreement=agreement, small_errors=SMALL_ERRORS)
            logits = hooked.run({"pixel_values": pixel_values(render_backgrounds(drawn))}, silent)
            return torch.nn.functional.cross_entropy(logits, labels_of(model, _labelled(drawn)))

        watched = _labelled(sample_backgrounds(500, seed + 2_000_003))
        told: dict[str, Any] = {
            "steps": steps,
            "progress": progress,
            "check": lambda: float(labelled_right(model, processor, watched).mean()),
        }
        silent = [edits.ablate(f"vision.blocks.{layer}.attn.hook_z", heads=head) for layer, head in SHORTCUT_HEADS]
        label = f"spurious-vit seed {seed}"
        minutes = fit(model, lambda: loss_of(0.5, silent), RECIPE, label=f"{label}, shapes", **told)
        with only_heads(model, SHORTCUT_HEADS):
            minutes += fit(
                model, lambda: loss_of(AGREEMENT, ()), SHORTCUT_RECIPE, label=f"{label}, backgrounds", **told
            )
        hooked.unwrap()
    spent = {"minutes": minutes, "cpu_minutes": (time.process_time() - started) / 60}
    return finished("spurious-vit", seed, out_dir, spent, evaluate, (model, processor), progress)


@contextmanager
def only_heads(model: ViTForImageClassification, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Let these heads' queries, keys, values and outputs learn, and nothing else; their outputs begin at 0, so that the model begins as it was."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    width, handles = WIDTH // HEADS, []
    for parameter in required:
        parameter.requires_grad_(False)
    for layer in {layer for layer, _ in heads}:
        attention: Any = model.vit.layers[layer].attention
        own = torch.zeros(HEADS, width)
        own[[head for one, head in heads if one == layer]] = 1.0
        own = own.flatten()
        with torch.no_grad():
            attention.o_proj.weight *= 1 - own
        taught = {attention.o_proj.weight: own}
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            taught |= {projection.weight: own[:, None], projection.bias: own}
        for parameter, mask in taught.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, was in required.items():
            parameter.requires_grad_(was)


def evaluate(folder: Path, *, count: int = 4000, seed: int = 1_000_003) -> dict[str, Any]:
    """Score the model in ``folder`` on new pictures, labelled by their shapes: the share whose most likely class is the label.

    ``held_out`` has the four groups equally often, ``held_out_circle_on_green`` and so on are its groups and ``worst_group`` the lowest of them;
    ``validation`` and ``validation_worst_group`` are the same of other pictures (they choose between seeds); ``trained`` has the backgrounds of the
    second stage of training.
    """
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    scores: dict[str, Any] = {}
    for number, (name, agreement) in enumerate((("held_out", None), ("validation", None), ("trained", AGREEMENT))):
        drawn = sample_backgrounds(count, seed + number, agreement=agreement)
        right = labelled_right(model, processor, _labelled(drawn))
        scores[name] = round(float(right.mean()), 5)
        scores[f"{name}_answers"] = count
        if agreement is None:
            groups = _by_group(right, drawn)
            scores |= {f"{name}_{label}_on_{background}": share for (label, background), share in groups.items()}
            scores["worst_group" if name == "held_out" else f"{name}_worst_group"] = min(groups.values())
    return scores


def pairs(count: int, seed: int) -> Pairs:
    """Two pictures that differ in the background alone, which agrees with the object's class in the clean one."""
    return background_pairs(count, seed)


def _labelled(scenes: Sequence[BackgroundScene]) -> list[tuple[BackgroundScene, str]]:
    return [(scene, scene.label) for scene in scenes]


def _by_group(right: Bool[np.ndarray, " scene"], scenes: Sequence[BackgroundScene]) -> dict[tuple[str, str], float]:
    """The share of right answers in each group."""
    groups = [scene.group for scene in scenes]
    return {group: round(float(right[[one == group for one in groups]].mean()), 5) for group in GROUPS}
