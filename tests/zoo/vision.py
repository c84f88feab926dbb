"""Single-tower cases: ViT, DeiT, DINOv2 with and without registers, and the vision towers of CLIP, SigLIP, SigLIP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from .images import pair, picture, pixels
from .registry import Case, MakeInputs, register
from .weights import generator_for, randomise


def only_one_image(images_per_prompt: int) -> None:
    if images_per_prompt != 1:
        raise ValueError("this case takes one image per example")


def no_padding(padding: str | None) -> None:
    if padding is not None:
        raise ValueError("this case has no text to pad")


def image_inputs(interpolates: bool) -> MakeInputs:
    """Inputs of a model that reads pixel_values [batch channel height width]."""

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
        no_padding(padding)
        config = getattr(model.config, "vision_config", None) or model.config
        size = image_size or pair(config.image_size)
        generator = generator_for("image inputs", str(seed))
        made: dict[str, Any] = {
            "pixel_values": pixels((batch, config.num_channels, *size), generator, dtype, model.device)
        }
        if interpolates and size != pair(config.image_size):
            made["interpolate_pos_encoding"] = True
        return made

    return inputs


def patch_inputs(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = 1,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """SigLIP2's inputs: flattened patches, images of different grids padded to one length.

    Image i has a grid of 3 x 4, 2 x 5 or 4 x 4 patches in turn (or the grid of `image_size`).
    """
    only_one_image(images_per_prompt)
    no_padding(padding)
    config = getattr(model.config, "vision_config", None) or model.config
    grids = [(3, 4), (2, 5), (4, 4)]
    if image_size is not None:
        grids = [(image_size[0] // config.patch_size, image_size[1] // config.patch_size)]
    shapes = torch.tensor([grids[index % len(grids)] for index in range(batch)])
    counts = shapes.prod(1)
    # Two positions of padding even for one image, so that the mask always matters.
    width = int(counts.max()) + 2
    mask = (torch.arange(width)[None, :] < counts[:, None]).long()
    channels = config.num_channels * config.patch_size**2
    values = pixels((batch, width, channels), generator_for("patch inputs", str(seed)), dtype) * mask[..., None]
    made = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {name: tensor.to(model.device) for name, tensor in made.items()}


def raw_images(size: tuple[int, int] = (24, 24)) -> Callable[..., dict[str, Any]]:
    """Keyword arguments for an image processor."""

    def raw(batch: int = 1, seed: int = 0, images_per_prompt: int = 1) -> dict[str, Any]:
        only_one_image(images_per_prompt)
        return {"images": [picture(seed * 7 + index, size) for index in range(batch)]}

    return raw


def _vision_case(
    name: str,
    family: str,
    make: Callable[[], nn.Module],
    processor: Callable[[], Any] | None,
    tags: set[str],
    inputs: MakeInputs | None = None,
    picture_size: tuple[int, int] = (24, 24),
    unused: str = "(?!)",
) -> None:
    register(
        Case(
            name=name,
            family=family,
            build=lambda: randomise(make(), name),
            inputs=inputs or image_inputs(interpolates="interpolates" in tags),
            towers=("vision",),
            processor=processor,
            raw=raw_images(picture_size),
            tags=frozenset(tags),
            unused=unused,
        )
    )


def exact_size(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}


def _labels(count: int) -> dict[str, Any]:
    return {"id2label": {i: f"label {i}" for i in range(count)}, "label2id": {f"label {i}": i for i in range(count)}}


# ---- ViT and DeiT

VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
}
WIDE_VIT = VIT | {"image_size": (12, 20), "num_attention_heads": 3, "num_hidden_layers": 2}
VIT_TAGS = {"class_token", "any_size", "interpolates"}


def vit_config(**changes: Any) -> transformers.ViTConfig:
    return transformers.ViTConfig(**(VIT | changes))


def vit_processor(height: int = 16, width: int = 16) -> Any:
    return transformers.ViTImageProcessor(size=exact_size(height, width))


_vision_case(
    "vit",
    "vit",
    lambda: transformers.ViTForImageClassification(vit_config(**_labels(7))),
    vit_processor,
    VIT_TAGS | {"classifier"},
)
_vision_case(
    "vit-wide",
    "vit",
    lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**WIDE_VIT, **_labels(5), qkv_bias=False)),
    lambda: vit_processor(12, 20),
    # ViT interpolates square position grids only.
    {"class_token", "classifier", "non_square"},
)
_vision_case(
    "vit-headless",
    "vit",
    lambda: transformers.ViTModel(vit_config(), add_pooling_layer=False),
    vit_processor,
    VIT_TAGS | {"headless"},
)
_vision_case(
    "vit-pooler",
    "vit",
    lambda: transformers.ViTModel(vit_config(pooler_output_size=10)),
    vit_processor,
    VIT_TAGS | {"headless", "pooler"},
    unused="^pooler",
)


def _deit_config(**changes: Any) -> transformers.DeiTConfig:
    return transformers.DeiTConfig(**(VIT | {"hidden_size": 30, "num_attention_heads": 5} | changes))


def _deit_processor() -> Any:
    return transformers.DeiTImageProcessor(size=exact_size(18, 18), crop_size=exact_size(16, 16))


DEIT_TAGS = VIT_TAGS | {"distillation"}
_vision_case(
    "deit",
    "deit",
    lambda: transformers.DeiTForImageClassification(_deit_config(**_labels(6))),
    _deit_processor,
    DEIT_TAGS | {"classifier"},
)
_vision_case(
    "deit-teacher",
    "deit",
    lambda: transformers.DeiTForImageClassificationWithTeacher(_deit_config(**_labels(6))),
    _deit_processor,
    DEIT_TAGS | {"classifier"},
)
_vision_case(
    "deit-headless",
    "deit",
    lambda: transformers.DeiTModel(_deit_config(), add_pooling_layer=False),
    _deit_processor,
    DEIT_TAGS | {"headless"},
)


# ---- DINOv2

DINO: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "image_size": 20,
    "patch_size": 5,
}


def _dino_config(**changes: Any) -> transformers.Dinov2Config:
    return transformers.Dinov2Config(**(DINO | changes))


def _register_config(**changes: Any) -> transformers.Dinov2WithRegistersConfig:
    return transformers.Dinov2WithRegistersConfig(**(DINO | {"num_register_tokens": 3} | changes))


def _dino_processor() -> Any:
    return transformers.BitImageProcessor(size={"shortest_edge": 22}, crop_size=exact_size(20, 20))


DINO_TAGS = {"class_token", "any_size", "layerscale"}
_vision_case(
    "dinov2",
    "dinov2",
    lambda: transformers.Dinov2ForImageClassification(_dino_config(**_labels(5))),
    _dino_processor,
    DINO_TAGS | {"classifier"},
    unused="mask_token",
)
_vision_case(
    "dinov2-headless",
    "dinov2",
    lambda: transformers.Dinov2Model(_dino_config(num_hidden_layers=2)),
    _dino_processor,
    DINO_TAGS | {"headless"},
    unused="mask_token",
)
_vision_case(
    "dinov2-swiglu",
    "dinov2",
    lambda: transformers.Dinov2ForImageClassification(_dino_config(use_swiglu_ffn=True, **_labels(4))),
    _dino_processor,
    DINO_TAGS | {"classifier", "gated_vision"},
    unused="mask_token",
)
_vision_case(
    "dinov2-registers",
    "dinov2_with_registers",
    lambda: transformers.Dinov2WithRegistersForImageClassification(_register_config(**_labels(5))),
    _dino_processor,
    DINO_TAGS | {"classifier", "registers"},
    unused="mask_token",
)
_vision_case(
    "dinov2-registers-headless",
    "dinov2_with_registers",
    lambda: transformers.Dinov2WithRegistersModel(_register_config(num_hidden_layers=2)),
    _dino_processor,
    DINO_TAGS | {"headless", "registers"},
    unused="mask_token",
)


# ---- DINOv3

DINOV3: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_register_tokens": 2,
    "image_size": 20,
    "patch_size": 5,
}


def _dinov3_processor() -> Any:
    return transformers.BitImageProcessor(
        size={"height": 20, "width": 20},
        do_center_crop=False,
        resample=2,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


DINOV3_TAGS = {"rotary_vision", "class_token", "any_size", "layerscale", "registers", "headless"}
_vision_case(
    "dinov3",
    "dinov3",
    lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**DINOV3)),
    _dinov3_processor,
    DINOV3_TAGS,
    unused="mask_token",
)
_vision_case(
    "dinov3-gated",
    "dinov3",
    lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            **(DINOV3 | {"use_gated_mlp": True, "hidden_act": "silu", "num_hidden_layers": 2, "image_size": (15, 25)})
        )
    ),
    _dinov3_processor,
    DINOV3_TAGS | {"gated_vision", "non_square"},
    unused="mask_token",
)


# ---- CLIP, SigLIP and SigLIP2 vision towers alone

CLIP_VISION: dict[str, Any] = {
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 36,
    "image_size": 16,
    "patch_size": 4,
}
SIGLIP_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "image_size": 15,
    "patch_size": 5,
}
SIGLIP2_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "patch_size": 4,
    "num_patches": 16,
}


def clip_image_processor(size: int = 16) -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=exact_size(size, size))


def siglip_image_processor(size: int = 15) -> Any:
    return transformers.SiglipImageProcessor(size=exact_size(size, size))


def siglip2_image_processor() -> Any:
    return transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=20)


CLIP_VISION_TAGS = {"class_token", "any_size", "interpolates"}
SIGLIP_VISION_TAGS = {"no_class_token", "any_size", "interpolates"}
SIGLIP2_VISION_TAGS = {"no_class_token", "any_size", "packed_patches", "non_square"}

_vision_case(
    "clip-vision",
    "clip_vision_model",
    lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP_VISION)),
    clip_image_processor,
    CLIP_VISION_TAGS | {"headless"},
    unused="^post_layernorm",
)
_vision_case(
    "clip-vision-projection",
    "clip_vision_model",
    lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**CLIP_VISION | {"num_hidden_layers": 2}, projection_dim=14)
    ),
    clip_image_processor,
    CLIP_VISION_TAGS,
)
_vision_case(
    "siglip-vision",
    "siglip_vision_model",
    lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP_VISION)),
    siglip_image_processor,
    SIGLIP_VISION_TAGS | {"headless", "pooling_head"},
    unused="^head",
)
_vision_case(
    "siglip-vision-no-head",
    "siglip_vision_model",
    lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SIGLIP_VISION | {"num_hidden_layers": 2}, vision_use_head=False)
    ),
    siglip_image_processor,
    SIGLIP_VISION_TAGS | {"headless"},
)
_vision_case(
    "siglip2-vision",
    "siglip2_vision_model",
    lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SIGLIP2_VISION)),
    siglip2_image_processor,
    SIGLIP2_VISION_TAGS | {"headless", "pooling_head"},
    inputs=patch_inputs,
    picture_size=(12, 20),
    unused="^head",
)
