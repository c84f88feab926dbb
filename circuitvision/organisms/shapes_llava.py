"""shapes-llava: a small LLaVA that answers questions about colour, shape and position of the objects in a scene.

``LlavaForConditionalGeneration`` with a CLIP vision tower of three layers (read at feature layer -2, so two are live) and a Llama of
three layers with grouped queries. The picture comes before the question, as in LLaVA.

Training packs several questions about one picture into a row: every block of the attention mask holds one question, which sees the
picture and itself, at the positions it would have alone. So a row gives exactly the losses that separate prompts would.

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
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from circuitvision.data.generated import of_questions
from circuitvision.data.pairs import Pairs
from circuitvision.data.questions import (
    KINDS,
    Question,
    prompt,
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
    sample_scene,
)
from circuitvision.organisms.training import (
    EOS,
    IMAGE,
    MEAN,
    STD,
    Recipe,
    fit,
    pixel_values,
    report,
    reproducible,
    word_tokenizer,
    write_folder,
)

RECIPE = Recipe(steps=6000, batch=40)
QUESTIONS_PER_IMAGE = 5
UNNAMED_RATE = BLOB_RATE = 0.2
IGNORED = -100


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model and its processor."""
    tokenizer = word_tokenizer(vocabulary(), image_token=True)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        projection_dim=64,
        initializer_range=RECIPE.initial,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=RECIPE.initial,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=2,
        do_sample=False,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=list(MEAN),
            image_std=list(STD),
        ),
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


class Stream:
    """An endless stream of training batches: packed questions about pictures of trained pairs, unnamed colours and blobs."""

    def __init__(self, rng: np.random.Generator, processor: LlavaProcessor, sizes: Sequence[str] = ("large",)) -> None:
        self.rng = rng
        self.sizes = sizes
        self.ids = processor.tokenizer.get_vocab()
        self.head = [self.ids["USER:"], *[self.ids[IMAGE]] * (GRID * GRID)]
        longest = max(len(question.text.split()) for _, question in _asked(10 * len(KINDS), 0, TEST_PAIRS))
        self.block = longest + 2
        self.length = len(self.head) + QUESTIONS_PER_IMAGE * self.block
        self.positions, self.mask = self._layout()

    def batch(self, size: int) -> dict[str, Tensor]:
        """One batch for ``model.forward``, with ``labels`` already shifted: the label at a position is the token that follows."""
        scenes: list[Scene] = []
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        while len(scenes) < size:
            scene = self.scene()
            chosen = self.choose(questions(scene))
            if not chosen:
                continue
            row, label = list(self.head), [IGNORED] * len(self.head)
            for question in chosen:
                block, block_label = self._block(question)
                row += block
                label += block_label
            scenes.append(scene)
            rows.append(row)
            labels.append(label)
        return {
            "pixel_values": pixel_values(scenes),
            "input_ids": torch.tensor(rows),
            "position_ids": self.positions.expand(size, -1),
            "attention_mask": self.mask.expand(size, 1, -1, -1),
            "labels": torch.tensor(labels),
        }

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

    def _block(self, question: Question) -> tuple[list[int], list[int]]:
        """One question's tokens, padded to the block length, and the labels of the answer and of the end token after it."""
        words = prompt(question.text).split()[2:]
        tokens = [self.ids[word] for word in (*words, question.answer)]
        labels = [IGNORED] * (len(tokens) - 2) + [tokens[-1], self.ids[EOS]]
        missing = self.block - len(tokens)
        return tokens + [self.ids["<pad>"]] * missing, labels + [IGNORED] * missing

    def _layout(self) -> tuple[Int[Tensor, "1 pos"], Float[Tensor, "1 1 pos pos"]]:
        """Positions that restart with every question, and an additive mask: causal, and blind to the other questions."""
        start = len(self.head)
        owner = torch.cat([torch.zeros(start), 1 + torch.arange(QUESTIONS_PER_IMAGE).repeat_interleave(self.block)])
        within = torch.arange(self.block).repeat(QUESTIONS_PER_IMAGE) + start
        positions = torch.cat([torch.arange(start), within])[None]
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        seen: Bool[Tensor, "pos pos"] = causal & ((owner[None] == 0) | (owner[None] == owner[:, None]))
        mask = torch.zeros(self.length, self.length).masked_fill(~seen, torch.finfo(torch.float32).min)
        return positions, mask[None, None]


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
    spent = {"minutes": round(minutes, 2), "cpu_minutes": round((time.process_time() - started) / 60, 2)}
    write_folder(Path(out_dir), model, processor)
    scores = {"seed": seed, **spent, **evaluate(Path(out_dir), sizes=sizes)}
    if progress:
        report("shapes-llava", scores)
    return scores


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


@torch.no_grad()
def answered_right(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Sequence[tuple[Scene, Question]],
    batch: int = 100,
) -> Bool[np.ndarray, question]:
    """For every question whether the most likely token after the prompt is the answer."""
    found = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        inputs = processor(
            images=[scene.image for scene, _ in part],
            text=[question.prompt for _, question in part],
            padding=True,
            return_tensors="pt",
        )
        logits = model(**inputs).logits
        last = inputs["attention_mask"].sum(1) - 1
        said = logits[torch.arange(len(part)), last].argmax(-1)
        answers = processor.tokenizer.convert_tokens_to_ids([question.answer for _, question in part])
        found.append((said == torch.tensor(answers)).numpy())
    return np.concatenate(found)
