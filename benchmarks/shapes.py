"""The models the benchmarks run on: real transformers classes with random weights, in the shapes that matter.

Time and memory do not depend on the values of the weights, so nothing is downloaded. Two shapes are as wide as models in use, where a
forward pass is arithmetic; two are 12 layers of width 64, where it is mostly Python, and every microsecond of bookkeeping shows.

Not covered: 7B-sized models (the ratio to the bare forward only gets closer to one as the model grows).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stack:
    """Where one tower keeps its blocks, and their second norm and attention, by transformers' own module names."""

    tower: str
    blocks: str
    second_norm: str
    attention: str
    bridge_blocks: str
    bridge_has_mid: bool


@dataclass(frozen=True)
class Shape:
    """One model to measure: the module, its inputs, and the paths of its towers."""

    name: str
    title: str
    module: nn.Module
    inputs: dict[str, Tensor]
    stacks: tuple[Stack, ...]

    def twin(self, attention: str | None = None) -> nn.Module:
        """A copy of the module that shares the weights: another tool can wrap it and leave this one as it is."""
        twin: Any = copy.deepcopy(self.module, {id(weight): weight for weight in self.module.parameters()})
        if attention is not None:
            twin.set_attn_implementation(attention)
        return twin

    def blocks(self, module: nn.Module) -> list[tuple[Stack, nn.Module]]:
        """Every block of a twin, vision tower first."""
        return [(stack, block) for stack in self.stacks for block in getattr_path(module, stack.blocks)]

    @property
    def patched(self) -> tuple[Stack, int]:
        """The block whose output the patching variants edit: the middle of the last tower."""
        stack = self.stacks[-1]
        return stack, len(getattr_path(self.module, stack.blocks)) // 2


def getattr_path(root: Any, path: str) -> Any:
    """``root.a.b.c`` for the path ``"a.b.c"``."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def vit(name: str, title: str, batch: int, image_size: int, patch_size: int, **sizes: int) -> Shape:
    """A ViT classifier and random images for it."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(image_size=image_size, patch_size=patch_size, **sizes)
    stack = Stack("vision", "vit.layers", "layernorm_after", "attention", "blocks", bridge_has_mid=True)
    pixels = torch.randn(batch, 3, image_size, image_size)
    return Shape(name, title, ViTForImageClassification(config).eval(), {"pixel_values": pixels}, (stack,))


def llava(
    name: str,
    title: str,
    image_size: int,
    patch_size: int,
    n_words: int,
    vision: dict[str, int],
    text: dict[str, int],
    vocabulary: int = 1000,
) -> Shape:
    """A LLaVA 1.5 of a CLIP tower and a Llama, and one prompt: some words and one image."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    image_token = vocabulary - 1
    vision_config: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "image_size": image_size,
        "patch_size": patch_size,
        **vision,
    }
    text_config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **text,
    }
    config = LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_id=image_token)
    words = torch.randint(3, image_token, (n_words,))
    image = torch.full(((image_size // patch_size) ** 2,), image_token)
    ids = torch.cat([torch.tensor([1]), image, words])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, image_size, image_size),
    }
    stacks = (
        Stack(
            "vision",
            "model.vision_tower.encoder.layers",
            "layer_norm2",
            "self_attn",
            "vision_encoder.encoder_layers",
            bridge_has_mid=False,
        ),
        Stack(
            "language",
            "model.language_model.layers",
            "post_attention_layernorm",
            "self_attn",
            "blocks",
            bridge_has_mid=True,
        ),
    )
    return Shape(name, title, LlavaForConditionalGeneration(config).eval(), inputs, stacks)


def small_vit() -> Shape:
    """12 layers of width 64: one image, 17 positions."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 256}
    return vit("vit-small", "12-layer ViT, width 64, one 32-pixel image", 1, 32, 8, **sizes)


def small_llava() -> Shape:
    """2 + 8 layers of width 64: 16 image positions and 8 words."""
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    text = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 172}
    return llava("llava-small", "LLaVA of 2 + 8 layers, width 64, 25 positions", 32, 8, 8, vision, text)


def wide_vit() -> Shape:
    """The shape of ViT-B/16, four images of 224 pixels."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    return vit("vit-b16", "ViT-B/16, four 224-pixel images", 4, 224, 16, **sizes)


def wide_llava() -> Shape:
    """CLIP ViT-L blocks and Llama blocks of width 1024, four of each: 64 image positions and 31 words."""
    vision = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 4096}
    text = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 2816}
    return llava("llava-wide", "LLaVA of 4 + 4 layers, width 1024, 96 positions", 112, 14, 31, vision, text)


SHAPES: dict[str, Callable[[], Shape]] = {
    "vit-small": small_vit,
    "llava-small": small_llava,
    "llava-wide": wide_llava,
    "vit-b16": wide_vit,
}
"""In the order they are measured: cheap ones first, so that a mistake shows early."""
