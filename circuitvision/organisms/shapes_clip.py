"""shapes-clip: a small CLIP that tells which caption describes a scene of two objects.

``CLIPModel`` with a vision tower of three layers and a text tower of two. A caption names colour and shape of both objects. The
contrastive loss sees, besides the other captions of the batch, wrong captions made from each true one by changing one colour or one
shape, or by exchanging the two colours. Captions of the batch that happen to be true of another picture are
left out of that picture's loss.

No training caption, wrong ones included, names a held-out pair: otherwise held-out pairs would be learnt as never true.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from circuitvision.data.captions import (
    NEGATIVE_KINDS,
    ONE_ATTRIBUTE,
    Caption,
    Retrieval,
    negative,
    sample_retrievals,
    true_captions,
    vocabulary,
)
from circuitvision.data.generated import caption_pairs
from circuitvision.data.pairs import Pairs
from circuitvision.data.scenes import (
    CELL,
    IMAGE_SIZE,
    TEST_PAIRS,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    Pair,
    sample_scene,
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
    word_tokenizer,
)

RECIPE = Recipe(steps=2500, batch=64)
NEGATIVES_PER_IMAGE = 2
UNNAMED_RATE = BLOB_RATE = 0.2
FIRST_SCALE = 2.0


def build(
    words: Sequence[str] = tuple(vocabulary()), *, layers: int = 3, image_size: int = IMAGE_SIZE, patch_size: int = CELL
) -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained model that reads ``words``, with a vision tower of ``layers`` layers, and its processor."""
    tokenizer = word_tokenizer(words, wrap=True)
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}
    config = CLIPConfig(
        text_config={
            **shared,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 8,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**shared, "num_hidden_layers": layers, "image_size": image_size, "patch_size": patch_size},
        projection_dim=64,
    )
    model = CLIPModel(config)
    initialise(model, RECIPE.initial)
    with torch.no_grad():
        model.logit_scale.fill_(FIRST_SCALE)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return model, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


class Stream:
    """An endless stream of training batches: scenes, true captions, and wrong captions that are nearly true."""

    pairs: Sequence[Pair] = TRAIN_PAIRS
    """The pairs that pictures show and captions name."""

    def __init__(self, rng: np.random.Generator, processor: CLIPProcessor) -> None:
        self.rng = rng
        self.tokenizer = processor.tokenizer

    def batch(self, size: int) -> tuple[list[Any], dict[str, Tensor], Bool[Tensor, "image text"]]:
        """Scenes, inputs for ``model.forward`` (the first ``size`` texts are the true captions, in order), and which other texts are true too."""
        scenes = [self.scene() for _ in range(size)]
        inputs, also_true = self.texts(scenes)
        pictures = np.stack([scene.pixels for scene in scenes])
        return scenes, {**inputs, "pixel_values": pixel_values(pictures)}, also_true

    def texts(self, scenes: Sequence[Any]) -> tuple[dict[str, Tensor], Bool[Tensor, "image text"]]:
        """The true captions of scenes, in order, and wrong ones, tokenized; and which texts of the others are true of each."""
        size = len(scenes)
        truths = [true_captions(scene) for scene in scenes]
        captions = [self._pick(true_captions(scene, partial=False)) for scene in scenes]
        wrong = [made for caption in captions for made in self._wrong(caption)]
        texts = [str(caption) for caption in (*captions, *wrong)]
        also_true = torch.zeros(size, len(texts), dtype=torch.bool)
        for row, truth in enumerate(truths):
            known = {str(caption) for caption in truth}
            also_true[row] = torch.tensor([text in known for text in texts])
            also_true[row, row] = False
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt")), also_true

    def scene(self) -> Any:
        """One training picture of two objects; no held-out pair occurs in it in any role."""
        return sample_scene(self.rng, count=2, pairs=TRAIN_PAIRS, unnamed=UNNAMED_RATE, blobs=BLOB_RATE)

    def _pick(self, options: list[Caption]) -> Caption:
        return options[int(self.rng.integers(len(options)))]

    def _wrong(self, caption: Caption) -> list[Caption]:
        kinds = self.rng.permutation(len(NEGATIVE_KINDS))[:NEGATIVES_PER_IMAGE]
        made = [negative(caption, NEGATIVE_KINDS[kind], self.rng, self.pairs) for kind in kinds]
        return [wrong for wrong in made if wrong is not None]


def contrastive_loss(logits: Float[Tensor, "image text"], also_true: Bool[Tensor, "image text"]) -> Float[Tensor, ""]:
    """Cross-entropy of each picture over all texts and of each true caption over all pictures, other true matches left out."""
    size = logits.shape[0]
    logits = logits.masked_fill(also_true, float("-inf"))
    target = torch.arange(size)
    by_image = torch.nn.functional.cross_entropy(logits, target)
    by_text = torch.nn.functional.cross_entropy(logits[:, :size].T, target)
    return (by_image + by_text) / 2


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, and return its scores (see :func:`evaluate`) and the minutes taken."""
    started = time.process_time()
    with reproducible(seed) as rng:
        model, processor = build()
        stream = Stream(rng, processor)

        def loss() -> Float[Tensor, ""]:
            _, inputs, also_true = stream.batch(RECIPE.batch)
            return contrastive_loss(model(**inputs).logits_per_image, also_true)

        watched = sample_retrievals(300, seed + 2_000_003, subjects=VALIDATION_PAIRS, with_subject=3)
        minutes = fit(
            model,
            loss,
            RECIPE,
            steps=steps,
            progress=progress,
            label=f"shapes-clip seed {seed}",
            check=lambda: float(retrieved_right(model, processor, watched).mean()),
        )
    spent = {"minutes": minutes, "cpu_minutes": (time.process_time() - started) / 60}
    return finished("shapes-clip", seed, out_dir, spent, evaluate, (model, processor), progress)


def evaluate(folder: Path, *, count: int = 2500, seed: int = 1_000_003) -> dict[str, Any]:
    """Score the model in ``folder``: the share of new scenes for which the true caption of 16 distinct ones has the highest logit.

    Eight of the wrong captions differ from the true one in one word. ``held_out`` scenes hold an object of the five test pairs (and their
    captions name at least four of these pairs), ``validation`` scenes one of the three validation pairs (the score that chooses between
    seeds), ``trained`` scenes trained pairs only. In ``held_out_swaps`` some of the eight have the two colours exchanged instead, so that
    every word is right and only what belongs together is wrong.
    """
    return scored(folder, "shapes", (TEST_PAIRS, VALIDATION_PAIRS, TRAIN_PAIRS), count, seed)


def scored(folder: Path, world: str, splits: Sequence[Sequence[Pair]], count: int, seed: int) -> dict[str, Any]:
    """The scores of :func:`evaluate` in a world whose ``splits`` are the pairs for test, for validation and for training."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    scores: dict[str, Any] = {}
    test, validation, trained = splits
    groups: list[tuple[str, Sequence[Pair], int, int, Sequence[str]]] = [
        ("held_out", test, seed, 4, ONE_ATTRIBUTE),
        ("validation", validation, seed + 1, 3, ONE_ATTRIBUTE),
        ("trained", trained, seed + 2, 4, ONE_ATTRIBUTE),
        ("held_out_swaps", test, seed + 3, 4, NEGATIVE_KINDS),
    ]
    for group, subjects, stream, with_subject, kinds in groups:
        drawn = sample_retrievals(count, stream, world=world, subjects=subjects, with_subject=with_subject, kinds=kinds)
        scores[group] = round(float(retrieved_right(model, processor, drawn).mean()), 5)
        scores[f"{group}_answers"] = count
    return scores


@torch.no_grad()
def pairs(count: int, seed: int) -> Pairs:
    """Two pictures and two captions that differ in the colour of an object, of a held-out pair in the clean one."""
    return caption_pairs(count, seed, subjects=TEST_PAIRS, pairs=TRAIN_PAIRS)


def retrieved_right(
    model: CLIPModel, processor: CLIPProcessor, drawn: Sequence[Retrieval], batch: int = 50
) -> Bool[np.ndarray, scene]:
    """For every scene whether the caption with the highest logit is the true one."""
    found = []
    for start in range(0, len(drawn), batch):
        part = drawn[start : start + batch]
        texts = sorted({caption for one in part for caption in one.captions})
        column = {text: index for index, text in enumerate(texts)}
        inputs = processor(images=[one.scene.image for one in part], text=texts, padding=True, return_tensors="pt")
        logits = model(**inputs).logits_per_image
        for row, one in enumerate(part):
            choices = logits[row, [column[caption] for caption in one.captions]]
            found.append(int(choices.argmax()) == one.answer)
    return np.array(found)
