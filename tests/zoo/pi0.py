"""PI0: a PaliGemma prefix read by a flow-matching action expert through shared keys and values.

The first rows see every camera, the last row of a larger batch has one camera less (its slot is masked), and language
may be padded. `PI0ImageProcessor` needs torchvision; SigLIP's image processor does the same job without it.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .images import picture, pixels
from .llava import IDS, build_config
from .registry import Case, register
from .text import BOS, IMAGE, N_TOKENS, pad_rows, shortened, tokenizer, words
from .vision import siglip_image_processor
from .weights import generator_for, randomise

CAMERAS = 2
STATE_DIM = 7
ACTION_DIM = 7
CHUNK = 4
VOCABULARY = N_TOKENS + 1024 + 128

PI0_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 32,
    "image_size": 12,
    "patch_size": 4,
    "vision_use_head": False,
}
SHARED: dict[str, Any] = {
    "model_type": "gemma",
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    **IDS,
}
PREFIX = SHARED | {"hidden_size": 28, "num_attention_heads": 3, "intermediate_size": 40}
# Gemma's head count and widths may differ between prefix and expert; layers, head size and key-value heads may not.
EXPERT = SHARED | {"hidden_size": 22, "num_attention_heads": 4, "intermediate_size": 36}


def pi0_inputs(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = CAMERAS,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """All that `forward` takes, `noise` and `timestep` among it; `images_per_prompt` is the number of cameras.

    With padding, the last of several rows lacks its last camera: fewer image tokens, pixel_attention_mask False there.
    """
    if image_size is not None:
        raise ValueError("PI0 takes square images of the configured size only")
    config = model.config
    vision = config.vlm_config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    image_token = config.vlm_config.image_token_id
    cameras = [images_per_prompt] * batch
    if padding and batch > 1 and images_per_prompt > 1:
        cameras[-1] -= 1
    generator = generator_for("pi0", str(seed))
    rows = [
        [image_token] * (patches * cameras[row]) + [BOS, *words(5 - shortened(row, padding), generator)]
        for row in range(batch)
    ]
    ids, mask = pad_rows(rows, patches * images_per_prompt + 6, padding)
    seen = torch.arange(images_per_prompt)[None, :] < torch.tensor(cameras)[:, None]
    shape = (batch, images_per_prompt, vision.num_channels, vision.image_size, vision.image_size)
    images = pixels(shape, generator, dtype) * seen[:, :, None, None, None]
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": images,
        "pixel_attention_mask": seen,
        "state": torch.randn((batch, config.max_state_dim), generator=generator).to(dtype),
        "noise": torch.randn((batch, config.chunk_size, config.max_action_dim), generator=generator).to(dtype),
        "timestep": (0.15 + 0.8 * torch.rand((batch,), generator=generator)).to(dtype),
    }
    return {name: tensor.to(model.device) for name, tensor in made.items()}


def pi0_processor() -> Any:
    images = siglip_image_processor(PI0_VISION["image_size"])
    images.image_seq_length = (PI0_VISION["image_size"] // PI0_VISION["patch_size"]) ** 2
    return transformers.PI0Processor(
        image_processor=images,
        tokenizer=tokenizer("plain", padding_side="right"),
        state_mean=[0.1] * 3,
        state_std=[0.5] * 3,
        actions_mean=[0.0] * 3,
        actions_std=[1.0] * 3,
        max_state_dim=STATE_DIM,
        chunk_size=CHUNK,
    )


def pi0_raw(batch: int = 1, seed: int = 0, images_per_prompt: int = CAMERAS) -> dict[str, Any]:
    """Keyword arguments for the processor: a list of camera pictures per prompt, a goal, a state of three numbers."""
    goals = ["reach the red circle", "move to the blue square", "go to the green cross"]
    return {
        "images": [[picture(seed + 3 * row + i) for i in range(images_per_prompt)] for row in range(batch)],
        "text": [goals[(seed + row) % 3] for row in range(batch)],
        "state": [[0.1 * row, -0.3, 0.2] for row in range(batch)],
    }


def _pi0_case(name: str, image_token: int, tags: set[str]) -> None:
    def config() -> Any:
        vlm = {
            "model_type": "paligemma",
            "vision_config": dict(PI0_VISION),
            "text_config": dict(PREFIX),
            "projection_dim": PREFIX["hidden_size"],
            "image_token_id": image_token,
        }
        return build_config(
            "pi0",
            vlm_config=vlm,
            dit_config=dict(EXPERT),
            chunk_size=CHUNK,
            max_state_dim=STATE_DIM,
            max_action_dim=ACTION_DIM,
            num_inference_steps=3,
        )

    both = {
        "samples_actions",
        "padding_left",
        "padding_right",
        "two_images",
        "gqa",
        "rectangular",
        "no_class_token",
        "prefix_bidirectional",
        "conversion_on_save",
    }
    in_vocabulary = image_token < VOCABULARY
    register(
        Case(
            name=name,
            family="pi0",
            build=lambda: randomise(transformers.PI0ForConditionalGeneration(config()), name),
            inputs=pi0_inputs,
            towers=("vision", "language", "action"),
            processor=pi0_processor if in_vocabulary else None,
            raw=pi0_raw if in_vocabulary else None,
            tags=frozenset(both | tags),
            # The expert reads the last prefix layer's keys and values only, and its own token table is never used.
            unused=r"dit\.embed_tokens|vlm\.language_model\.(norm|layers\.2\.(self_attn\.[qo]_proj|mlp|post_attention))",
        )
    )


_pi0_case("pi0", IMAGE, set())
_pi0_case("pi0-outside", VOCABULARY, {"out_of_vocabulary_image"})
