"""What the LLaVA organisms share: an untrained model with its processor, training rows that pack several questions, and scoring.

A row holds one picture and several questions about it: every block of the attention mask holds one question, which sees the picture and itself, at
the positions it would have alone. So a row gives exactly the losses that separate prompts would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from circuitvision.organisms.training import EOS, IMAGE, MEAN, PAD, STD, pixel_values, word_tokenizer

IGNORED = -100


class Asked(Protocol):
    """A question with its one-word answer."""

    @property
    def prompt(self) -> str:
        """The text for the processor."""

    @property
    def answer(self) -> str:
        """The word that answers it."""


def build(
    words: Sequence[str],
    *,
    image_size: int,
    patch_size: int,
    width: int,
    vision: dict[str, Any],
    language: dict[str, Any],
    feature_layer: int,
    initial: float,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model that reads ``words``, and its processor.

    ``vision`` and ``language`` are the sizes of the towers, in the words of their configurations; both have 4 heads where nothing else is said, the
    language tower 2 key-value heads.
    """
    tokenizer = word_tokenizer(words, image_token=True)
    vision_config = CLIPVisionConfig(
        hidden_size=width,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=width,
        initializer_range=initial,
        **vision,
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        max_position_embeddings=128,
        initializer_range=initial,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{"num_attention_heads": 4, "num_key_value_heads": 2, **language},
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch_size) ** 2,
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
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=list(MEAN),
            image_std=list(STD),
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


class PackedQuestions:
    """Training rows of one picture and ``per_image`` questions, each in a block of ``block`` tokens."""

    def __init__(self, processor: LlavaProcessor, *, patches: int, per_image: int, block: int) -> None:
        self.ids = processor.tokenizer.get_vocab()
        self.head = [self.ids["USER:"], *[self.ids[IMAGE]] * patches]
        self.per_image, self.block = per_image, block
        self.length = len(self.head) + per_image * block
        self.positions, self.mask = self._layout()
        self._blocks: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def batch(
        self, pictures: UInt8[np.ndarray, "row height width channel"], asked: Sequence[Sequence[Asked]]
    ) -> dict[str, Tensor]:
        """One batch for ``model.forward``, with ``labels`` already shifted: the label at a position is the token that follows."""
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        for chosen in asked:
            blocks = [self._block(question) for question in chosen]
            rows.append(self.head + [token for tokens, _ in blocks for token in tokens])
            labels.append([IGNORED] * len(self.head) + [label for _, block in blocks for label in block])
        return {
            "pixel_values": pixel_values(pictures),
            "input_ids": torch.tensor(rows),
            "position_ids": self.positions.expand(len(rows), -1),
            "attention_mask": self.mask.expand(len(rows), 1, -1, -1),
            "labels": torch.tensor(labels),
        }

    def _block(self, question: Asked) -> tuple[list[int], list[int]]:
        """One question's tokens, padded to the block length, and the labels of the answer and of the end token after it."""
        key = question.prompt, question.answer
        if key not in self._blocks:
            tokens = [self.ids[word] for word in (*question.prompt.split()[2:], question.answer)]
            labels = [IGNORED] * (len(tokens) - 2) + [tokens[-1], self.ids[EOS]]
            missing = self.block - len(tokens)
            self._blocks[key] = tokens + [self.ids[PAD]] * missing, labels + [IGNORED] * missing
        return self._blocks[key]

    def _layout(self) -> tuple[Int[Tensor, "1 pos"], Float[Tensor, "1 1 pos pos"]]:
        """Positions that restart with every question, and an additive mask: causal, and blind to the other questions."""
        start = len(self.head)
        owner = torch.cat([torch.zeros(start), 1 + torch.arange(self.per_image).repeat_interleave(self.block)])
        within = torch.arange(self.block).repeat(self.per_image) + start
        positions = torch.cat([torch.arange(start), within])[None]
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        seen: Bool[Tensor, "pos pos"] = causal & ((owner[None] == 0) | (owner[None] == owner[:, None]))
        mask = torch.zeros(self.length, self.length).masked_fill(~seen, torch.finfo(torch.float32).min)
        return positions, mask[None, None]


@torch.no_grad()
def attend_to_alike(language: Any) -> None:
    """Start every head of a Llama so that positions attend to those with like content and pass that content on.

    The query map becomes the key map, and the output map the transposed value map, each plus half of what it was. So a word meets the patches whose
    vectors lie along its own before anything is learned.

    Reference: Trockman and Kolter 2023 (arXiv 2305.09828), who start all of W_Q W_K^T and W_V W_O near a multiple of the identity.
    """
    config = language.config
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for layer in language.layers:
        attention = layer.self_attn
        for head in range(config.num_attention_heads):
            mine, shared = (slice(number * size, (number + 1) * size) for number in (head, head // group))
            query, output = attention.q_proj.weight, attention.o_proj.weight
            query[mine] = 0.5 * query[mine] + attention.k_proj.weight[shared]
            output[:, mine] = 0.5 * output[:, mine] + attention.v_proj.weight[shared].T


@torch.no_grad()
def answered_right(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Sequence[tuple[Any, Asked]],
    batch: int = 100,
) -> Bool[np.ndarray, question]:
    """For every (scene, question) whether the most likely token after the prompt is the answer."""
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
