"""LLaVA 1.5: a CLIP or SigLIP tower, a two-layer projector, and LLaMA, Mistral, Qwen2 or Gemma behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from .images import picture, pixels
from .registry import Case, register
from .text import BOS, EOS, IMAGE, N_TOKENS, PAD, pad_rows, shortened, tokenizer, words
from .vision import clip_image_processor, siglip_image_processor
from .weights import generator_for, randomise

IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
# The table is a little longer than the tokenizer, as in released checkpoints.
LANGUAGE: dict[str, Any] = {"vocab_size": N_TOKENS + 3, "max_position_embeddings": 256, **IDS}

CLIP_TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 36,
    "image_size": 12,
    "patch_size": 4,
}
SIGLIP_TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "image_size": 15,
    "patch_size": 5,
    "vision_use_head": False,
}


def llama(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {"model_type": "llama", "head_dim": 6, "intermediate_size": 48, **sizes, **LANGUAGE, **changes}


def mistral(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
    other = {"model_type": "mistral", "head_dim": 8, "intermediate_size": 40, "sliding_window": None}
    return {**other, **sizes, **LANGUAGE, **changes}


def qwen2(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
    return {"model_type": "qwen2", "intermediate_size": 44, **sizes, **LANGUAGE, **changes}


def gemma(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
    return {"model_type": "gemma", "head_dim": 8, "intermediate_size": 40, **sizes, **LANGUAGE, **changes}


def build_config(kind: str, **entries: Any) -> Any:
    """A transformers config of `kind` whose sub-configs are given as dictionaries with a model_type."""
    return transformers.AutoConfig.for_model(kind, **entries)


def features_per_image(config: Any) -> int:
    """How many language positions one image takes: patches, and the class token when every feature is kept."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    has_class = vision.model_type == "clip_vision_model"
    return patches + int(has_class and config.vision_feature_select_strategy == "full")


def prompt_rows(
    image_tokens: list[list[int]], seed: int, padding: str | None, image_token: int = IMAGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts <bos> word [image] word word ... ; `image_tokens[row]` are the lengths of its images.

    Rows differ in length only through `padding` and through their images; width is that of the longest full row.
    """
    generator = generator_for("prompts", str(seed))
    rows, width = [], 0
    for row, lengths in enumerate(image_tokens):
        before = words(1, generator)
        after = [words(2, generator) for _ in lengths[:-1]]
        question = words(5, generator)
        ids = [BOS, *before]
        for index, length in enumerate(lengths):
            ids += [image_token] * length
            ids += after[index] if index < len(after) else []
        width = max(width, len(ids) + len(question))
        rows.append(ids + question[: len(question) - shortened(row, padding)])
    return pad_rows(rows, width, padding)


def llava_inputs(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = 1,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """pixel_values [batch * images channel height width], ids and mask [batch pos]; images flat, in prompt order."""
    if image_size is not None:
        raise ValueError("LLaVA 1.5 takes square images of the configured size only")
    vision = model.config.vision_config
    count = features_per_image(model.config)
    ids, mask = prompt_rows([[count] * images_per_prompt] * batch, seed, padding)
    shape = (batch * images_per_prompt, vision.num_channels, vision.image_size, vision.image_size)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "pixel_values": pixels(shape, generator_for("llava images", str(seed)), dtype, model.device),
    }


def raw_prompts(size: tuple[int, int] = (24, 24), nested: bool = False) -> Callable[..., dict[str, Any]]:
    """Keyword arguments for a vision-language processor; `nested` gives one list of images per prompt."""
    questions = ["what color is the circle ?", "which shape is on the left ?", "is the square red ?"]

    def raw(batch: int = 1, seed: int = 0, images_per_prompt: int = 1) -> dict[str, Any]:
        pictures = [[picture(seed + 3 * row + i, size) for i in range(images_per_prompt)] for row in range(batch)]
        texts = ["<image>" * images_per_prompt + questions[(seed + row) % 3] for row in range(batch)]
        images = pictures if nested else [image for row in pictures for image in row]
        return {"images": images, "text": texts, "padding": True}

    return raw


def unused_vision(vision: dict[str, Any], feature_layer: int | list[int]) -> str:
    """Parameters behind the last feature layer: the blocks after it, and the final norm always."""
    last = feature_layer if isinstance(feature_layer, int) else max(feature_layer)
    layers = vision["num_hidden_layers"]
    after = [str(layer) for layer in range(layers + 1 + last, layers)]
    blocks = [rf"encoder\.layers\.({'|'.join(after)})\."] if after else []
    return rf"vision_tower\.({'|'.join([*blocks, 'post_layernorm'])})"


def _llava_case(
    name: str,
    vision: dict[str, Any],
    language: dict[str, Any],
    tags: set[str],
    **options: Any,
) -> None:
    """A case; `options` are fields of LlavaConfig."""
    clip = vision["model_type"] == "clip_vision_model"
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default" if clip else "full"} | options

    def config() -> Any:
        return build_config(
            "llava", vision_config=dict(vision), text_config=dict(language), image_token_id=IMAGE, **settings
        )

    def processor() -> Any:
        make = clip_image_processor if clip else siglip_image_processor
        return transformers.LlavaProcessor(
            image_processor=make(vision["image_size"]),
            tokenizer=tokenizer("bos"),
            patch_size=vision["patch_size"],
            vision_feature_select_strategy=settings["vision_feature_select_strategy"],
            num_additional_image_tokens=int(clip),
        )

    both = {"generates", "padding_left", "padding_right", "two_images", "gqa"}
    register(
        Case(
            name=name,
            family="llava",
            build=lambda: randomise(transformers.LlavaForConditionalGeneration(config()), name),
            inputs=llava_inputs,
            towers=("vision", "language"),
            processor=processor,
            raw=raw_prompts(),
            tags=frozenset(both | {"class_token" if clip else "no_class_token"} | tags),
            unused=unused_vision(vision, settings["vision_feature_layer"]),
        )
    )


_llava_case("llava-clip-llama", CLIP_TOWER, llama(), {"rectangular"})
_llava_case("llava-clip-mistral", CLIP_TOWER, mistral(), {"rectangular"})
_llava_case("llava-clip-mistral-sliding", CLIP_TOWER, mistral(sliding_window=6), {"rectangular", "sliding"})
_llava_case("llava-clip-gemma", CLIP_TOWER, gemma(), {"rectangular", "tied"}, tie_word_embeddings=True)
_llava_case("llava-siglip-qwen2", SIGLIP_TOWER, qwen2(), {"full_features"})
_llava_case("llava-siglip-llama", SIGLIP_TOWER, llama(), {"rectangular", "full_features"}, vision_feature_layer=-1)
_llava_case(
    "llava-clip-llama-layers", CLIP_TOWER, llama(), {"rectangular", "feature_list"}, vision_feature_layer=[-2, -1]
)
_llava_case(
    "llava-clip-llama-full",
    CLIP_TOWER,
    llama(),
    {"rectangular", "full_features"},
    vision_feature_select_strategy="full",
)
