"""OpenVLA: DINOv2 and SigLIP side by side, a three-layer projector, LLaMA; patches behind the first token of a prompt."""

from __future__ import annotations

from typing import Any

import torch

from circuitvision import openvla

from .images import picture, pixels
from .llava import llama
from .registry import Case, register
from .text import BOS, N_TOKENS, PAD, pad_rows, shortened, tokenizer, words
from .weights import generator_for, randomise

DINO: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 3,
    "patch_size": 4,
    "num_register_tokens": 2,
}
SIGLIP: dict[str, Any] = {
    "hidden_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "intermediate_size": 36,
    "patch_size": 4,
}
STATISTICS: dict[str, Any] = {
    "desk": {"action": {"q01": [-1.0, -2.0, 0.0], "q99": [1.0, 2.5, 1.0], "mask": [True, True, False]}},
    "floor": {"action": {"q01": [-0.5, 0.0], "q99": [0.5, 4.0]}},
}


def config() -> openvla.OpenVLAConfig:
    return openvla.OpenVLAConfig(
        text_config=llama(num_hidden_layers=3),
        vision_config=DINO,
        vision_2_config=SIGLIP,
        image_sizes=(12, 12),
        norm_stats=STATISTICS,
        n_action_bins=16,
        # The table is three rows longer than the tokenizer.
        pad_to_multiple_of=3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=2,
    )


def openvla_inputs(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = 1,
    image_size: tuple[int, int] | None = None,
    named: bool = True,
) -> dict[str, Any]:
    """pixel_values [batch 6 height width], ids and mask [batch pos]; without ``named``, ids as released ones are: the patches not among them."""
    height, width = image_size or (12, 12)
    generator = generator_for("openvla prompts", str(seed))
    patches = [model.config.image_token_id] * ((height // 4) * (width // 4)) if named else []
    full = [words(6, generator) for _ in range(batch)]
    rows = [[BOS, *patches, *text[: 6 - shortened(row, padding)]] for row, text in enumerate(full)]
    ids, mask = pad_rows(rows, 7 + len(patches), padding)
    shape = (batch, 6, height, width)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "pixel_values": pixels(shape, generator_for("openvla images", str(seed)), dtype, model.device),
        **({} if image_size is None else {"interpolate_pos_encoding": True}),
    }


def raw(batch: int = 1, seed: int = 0, images_per_prompt: int = 1) -> dict[str, Any]:
    pictures = [picture(seed + 3 * row, (24, 18)) for row in range(batch)]
    tasks = ["reach the red circle", "move to the left square", "go to the blue star on top"]
    texts = [openvla.processing.prompt(tasks[(seed + row) % 3]) for row in range(batch)]
    return {"images": pictures, "text": texts, "padding": True}


def processor() -> openvla.OpenVLAProcessor:
    return openvla.OpenVLAProcessor(openvla.OpenVLAImageProcessor(12), tokenizer("bos"))


assert config().text_config.vocab_size == N_TOKENS + 3

register(
    Case(
        name="openvla",
        family="openvla",
        build=lambda: randomise(openvla.OpenVLAForActionPrediction(config()), "openvla"),
        inputs=openvla_inputs,
        towers=("vision", "vision_2", "language"),
        processor=processor,
        raw=raw,
        tags=frozenset(
            {
                *("generates", "padding_left", "padding_right", "gqa", "rectangular", "layerscale", "registers"),
                *("class_token", "any_size", "interpolates", "out_of_vocabulary_image", "conversion_on_save"),
            }
        ),
        unused=r"mask_token|vision\.(encoder\.layer\.2\.|layernorm)|vision_2\.(encoder\.layers\.3\.|post_layernorm)",
    )
)
