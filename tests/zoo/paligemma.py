"""PaliGemma 1 (Gemma) and 2 (Gemma 2): a SigLIP tower, a linear projector, image and prompt bidirectional."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .images import pixels
from .llava import IDS, SIGLIP_TOWER, build_config, gemma, raw_prompts
from .registry import Case, register
from .text import BOS, EOS, IMAGE, N_TOKENS, pad_rows, shortened, tokenizer, words
from .vision import siglip_image_processor
from .weights import generator_for, randomise

# The processor appends 1024 location and 128 segmentation tokens to the tokenizer.
EXTRA_TOKENS = 1024 + 128
VOCABULARY = N_TOKENS + EXTRA_TOKENS + 3
PALI_VISION = SIGLIP_TOWER | {"hidden_size": 20, "num_attention_heads": 5, "intermediate_size": 32}


def paligemma_inputs(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = 1,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Images first, then <bos> and the prompt; token_type_ids are 0 everywhere, as the processor gives at inference."""
    if image_size is not None:
        raise ValueError("PaliGemma takes square images of the configured size only")
    vision = model.config.vision_config
    count = images_per_prompt * (vision.image_size // vision.patch_size) ** 2
    generator = generator_for("paligemma prompts", str(seed))
    rows = [[IMAGE] * count + [BOS, *words(6 - shortened(row, padding), generator)] for row in range(batch)]
    ids, mask = pad_rows(rows, count + 7, padding)
    shape = (batch * images_per_prompt, vision.num_channels, vision.image_size, vision.image_size)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "token_type_ids": torch.zeros_like(ids).to(model.device),
        "pixel_values": pixels(shape, generator_for("paligemma images", str(seed)), dtype, model.device),
    }


def paligemma_processor() -> Any:
    images = siglip_image_processor(PALI_VISION["image_size"])
    images.image_seq_length = (PALI_VISION["image_size"] // PALI_VISION["patch_size"]) ** 2
    return transformers.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer("plain"))


def gemma2(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    other = {"head_dim": 8, "intermediate_size": 36, "query_pre_attn_scalar": 12, "max_position_embeddings": 256}
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
    return {"model_type": "gemma2", **sizes, **other, **caps, **IDS, "vocab_size": VOCABULARY, **changes}


def _paligemma_case(name: str, language: dict[str, Any], tags: set[str]) -> None:
    def config() -> Any:
        made = build_config(
            "paligemma",
            vision_config=dict(PALI_VISION),
            text_config=dict(language),
            projection_dim=language["hidden_size"],
            image_token_id=IMAGE,
            eos_token_id=EOS,
        )
        if "softcap" in tags:
            # Before 5.23 an in-memory Gemma 2 took sdpa, which ignores the soft cap, and was another model than its eager self.
            made.text_config._attn_implementation = "eager"
        return made

    both = {
        "generates",
        "padding_left",
        "padding_right",
        "two_images",
        "gqa",
        "rectangular",
        "no_class_token",
        "prefix_bidirectional",
        "tied",
    }
    register(
        Case(
            name=name,
            family="paligemma",
            build=lambda: randomise(transformers.PaliGemmaForConditionalGeneration(config()), name),
            inputs=paligemma_inputs,
            towers=("vision", "language"),
            processor=paligemma_processor,
            raw=raw_prompts(nested=True),
            tags=frozenset(both | tags),
        )
    )


_paligemma_case("paligemma", gemma(vocab_size=VOCABULARY), set())
_paligemma_case("paligemma2", gemma2(), {"sandwich", "softcap"})
_paligemma_case("paligemma2-sliding", gemma2(sliding_window=6), {"sandwich", "softcap", "sliding"})
