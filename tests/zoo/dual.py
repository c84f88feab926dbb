"""Dual encoders: CLIP, SigLIP and SigLIP2, and the image classifiers that keep only their vision tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .images import picture
from .registry import Case, MakeInputs, register
from .text import N_TOKENS, PAD, pad_rows, shortened, tokenizer, vocabulary, words
from .vision import (
    CLIP_VISION,
    CLIP_VISION_TAGS,
    SIGLIP2_VISION,
    SIGLIP2_VISION_TAGS,
    SIGLIP_VISION,
    SIGLIP_VISION_TAGS,
    clip_image_processor,
    image_inputs,
    only_one_image,
    patch_inputs,
    raw_images,
    siglip2_image_processor,
    siglip_image_processor,
)
from .weights import generator_for, randomise

TEXT_EOS_LAST = vocabulary(eos_last=True)
TEXT_EOS = vocabulary()
PHRASES = [
    "a red circle",
    "the blue square on the left",
    "a picture of a green cross",
    "a yellow cross",
    "two large circle",
]


def _clip_texts(count: int, seed: int, padding: str | None) -> tuple[Tensor, Tensor]:
    generator = generator_for("clip texts", str(seed))
    rows = [
        [TEXT_EOS_LAST["<bos>"], *words(5 - shortened(row, padding), generator), TEXT_EOS_LAST["<eos>"]]
        for row in range(count)
    ]
    return pad_rows(rows, 7, padding)


def _siglip_texts(count: int, seed: int, padding: str | None) -> tuple[Tensor, Tensor]:
    generator = generator_for("siglip texts", str(seed))
    rows = [[*words(5 - shortened(row, padding), generator), TEXT_EOS["<eos>"]] for row in range(count)]
    return pad_rows(rows, 6, padding)


def dual_inputs(texts: Callable[..., tuple[Tensor, Tensor]], patches: bool, mask: bool) -> MakeInputs:
    """`batch` images against `batch` + 1 texts. SigLIP's processors give no text mask: padding is attended to."""

    def inputs(
        model: Any,
        batch: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        padding: str | None = None,
        images_per_prompt: int = 1,
        image_size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        only_one_image(images_per_prompt)
        if padding == "left":
            raise ValueError("dual encoders pad on the right: their text positions are absolute")
        make_images = patch_inputs if patches else image_inputs(interpolates=True)
        ids, attention_mask = texts(batch + 1, seed, padding)
        made = make_images(model, batch, seed, dtype, image_size=image_size)
        made["input_ids"] = ids.to(model.device)
        if mask:
            made["attention_mask"] = attention_mask.to(model.device)
        return made

    return inputs


def raw_pairs(size: tuple[int, int], **options: Any) -> Callable[..., dict[str, Any]]:
    """Keyword arguments for a dual encoder's processor: `batch` pictures and `batch` + 1 phrases."""

    def raw(batch: int = 1, seed: int = 0, images_per_prompt: int = 1) -> dict[str, Any]:
        only_one_image(images_per_prompt)
        texts = [PHRASES[(seed + index) % len(PHRASES)] for index in range(batch + 1)]
        return {"images": [picture(seed * 7 + index, size) for index in range(batch)], "text": texts, **options}

    return raw


def _dual_case(
    name: str,
    family: str,
    make: Callable[[], nn.Module],
    processor: Callable[[], Any],
    inputs: MakeInputs,
    raw: Callable[..., dict[str, Any]],
    tags: set[str],
    towers: tuple[str, ...] = ("vision", "text"),
    unused: str = "(?!)",
) -> None:
    register(
        Case(
            name=name,
            family=family,
            build=lambda: randomise(make(), name),
            inputs=inputs,
            towers=towers,
            processor=processor,
            raw=raw,
            tags=frozenset(tags),
            unused=unused,
        )
    )


# ---- CLIP

CLIP_TEXT: dict[str, Any] = {
    "vocab_size": N_TOKENS,
    "hidden_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": PAD,
    "bos_token_id": TEXT_EOS_LAST["<bos>"],
    "eos_token_id": TEXT_EOS_LAST["<eos>"],
}


def _clip_config(**text: Any) -> transformers.CLIPConfig:
    return transformers.CLIPConfig(text_config=CLIP_TEXT | text, vision_config=CLIP_VISION, projection_dim=12)


def _clip_processor() -> Any:
    return transformers.CLIPProcessor(
        image_processor=clip_image_processor(),
        tokenizer=tokenizer("bos_eos", eos_last=True, padding_side="right"),
    )


CLIP_INPUTS = dual_inputs(_clip_texts, patches=False, mask=True)
CLIP_RAW = raw_pairs((24, 30), padding=True)
_dual_case(
    "clip",
    "clip",
    lambda: transformers.CLIPModel(_clip_config()),
    _clip_processor,
    CLIP_INPUTS,
    CLIP_RAW,
    CLIP_VISION_TAGS | {"dual", "padding_right"},
)
_dual_case(
    "clip-argmax",
    "clip",
    lambda: transformers.CLIPModel(_clip_config(eos_token_id=2)),
    _clip_processor,
    CLIP_INPUTS,
    CLIP_RAW,
    CLIP_VISION_TAGS | {"dual", "padding_right", "argmax_pooling"},
)


def _with_labels(config: Any, count: int) -> Any:
    config.num_labels = count
    return config


_dual_case(
    "clip-classifier",
    "clip",
    lambda: transformers.CLIPForImageClassification(_with_labels(_clip_config(), 5)),
    clip_image_processor,
    image_inputs(interpolates=True),
    raw_images((24, 30)),
    (CLIP_VISION_TAGS | {"classifier"}) - {"any_size", "interpolates"},
    towers=("vision",),
    unused="post_layernorm",
)


# ---- MetaCLIP 2


def _metaclip2_config(**changes: Any) -> Any:
    # The released text tower has end-of-text id 2, and is read at the first one all the same.
    return transformers.MetaClip2Config(
        text_config=CLIP_TEXT | {"eos_token_id": 2} | changes, vision_config=CLIP_VISION, projection_dim=12
    )


def _metaclip2_texts(count: int, seed: int, padding: str | None) -> tuple[Tensor, Tensor]:
    """CLIP's texts with the id 2 as their end: no highest id, and twice in every other text."""
    ids, mask = _clip_texts(count, seed, padding)
    ids = torch.where(ids == 2, 3, ids)
    ids = torch.where(ids == TEXT_EOS_LAST["<eos>"], 2, ids)
    ids[::2, 2] = 2
    return ids, mask


_dual_case(
    "metaclip2",
    "metaclip_2",
    lambda: transformers.MetaClip2Model(_metaclip2_config()),
    _clip_processor,
    dual_inputs(_metaclip2_texts, patches=False, mask=True),
    CLIP_RAW,
    CLIP_VISION_TAGS | {"dual", "padding_right"},
)
_dual_case(
    "metaclip2-classifier",
    "metaclip_2",
    lambda: transformers.MetaClip2ForImageClassification(_with_labels(_metaclip2_config(), 5)),
    clip_image_processor,
    image_inputs(interpolates=True),
    raw_images((24, 30)),
    (CLIP_VISION_TAGS | {"classifier"}) - {"any_size", "interpolates"},
    towers=("vision",),
    unused="post_layernorm",
)


# ---- SigLIP and SigLIP2

SIGLIP_TEXT: dict[str, Any] = {
    "vocab_size": N_TOKENS,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 28,
    "max_position_embeddings": 12,
    "pad_token_id": PAD,
    "bos_token_id": TEXT_EOS["<bos>"],
    "eos_token_id": TEXT_EOS["<eos>"],
}


def _siglip_config() -> transformers.SiglipConfig:
    return transformers.SiglipConfig(text_config=SIGLIP_TEXT, vision_config=SIGLIP_VISION)


def _siglip2_config() -> transformers.Siglip2Config:
    return transformers.Siglip2Config(text_config=SIGLIP_TEXT, vision_config=SIGLIP2_VISION)


def _siglip_processor() -> Any:
    return transformers.SiglipProcessor(
        image_processor=siglip_image_processor(), tokenizer=tokenizer("eos", padding_side="right", mask=False)
    )


def _siglip2_processor() -> Any:
    return transformers.Siglip2Processor(
        image_processor=siglip2_image_processor(), tokenizer=tokenizer("eos", padding_side="right")
    )


_dual_case(
    "siglip",
    "siglip",
    lambda: transformers.SiglipModel(_siglip_config()),
    _siglip_processor,
    dual_inputs(_siglip_texts, patches=False, mask=False),
    raw_pairs((24, 30), padding="max_length", max_length=12),
    SIGLIP_VISION_TAGS | {"dual", "padding_right", "pooling_head"},
)
_dual_case(
    "siglip-classifier",
    "siglip",
    lambda: transformers.SiglipForImageClassification(_with_labels(_siglip_config(), 4)),
    siglip_image_processor,
    image_inputs(interpolates=True),
    raw_images((24, 30)),
    SIGLIP_VISION_TAGS | {"classifier"},
    towers=("vision",),
    unused=r"vision_model\.head",
)
_dual_case(
    "siglip2",
    "siglip2",
    lambda: transformers.Siglip2Model(_siglip2_config()),
    _siglip2_processor,
    dual_inputs(_siglip_texts, patches=True, mask=True),
    raw_pairs((12, 20), padding="max_length", max_length=12, patch_size=4, max_num_patches=20),
    SIGLIP2_VISION_TAGS | {"dual", "padding_right", "pooling_head"},
)
_dual_case(
    "siglip2-classifier",
    "siglip2",
    lambda: transformers.Siglip2ForImageClassification(_with_labels(_siglip2_config(), 4)),
    siglip2_image_processor,
    patch_inputs,
    raw_images((12, 20)),
    SIGLIP2_VISION_TAGS | {"classifier"},
    towers=("vision",),
    unused=r"vision_model\.head",
)
