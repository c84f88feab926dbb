"""LLaVA-NeXT and LLaVA-OneVision: one image becomes a thumbnail and several tiles.

The language model sees the thumbnail's patches, then the patches of all tiles in image order, without the padding and
with a learned newline after every row. Tiles are padded to the largest count of the batch; the model drops that padding
before its vision tower, whose rows are therefore the real tiles of all images, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers.image_processing_utils import select_best_resolution

from .images import pixels
from .llava import (
    CLIP_TOWER,
    SIGLIP_TOWER,
    build_config,
    llama,
    mistral,
    prompt_rows,
    qwen2,
    raw_prompts,
    unused_vision,
)
from .registry import Case, register
from .text import IMAGE, UNKNOWN, tokenizer
from .vision import exact_size
from .weights import generator_for, randomise

# (height, width) of the images in a prompt, in turn: wide, tall, and square ones; none fills its tiles exactly.
SIZES = [(13, 24), (22, 10), (20, 21)]


def pinpoints(tile: int) -> list[list[int]]:
    """Resolutions an image may be fitted to: 1 x 2, 2 x 1, 2 x 2 and 1 x 3 tiles."""
    return [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile], [tile, 3 * tile]]


def tile_grid(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles for an image of `size` (height, width)."""
    tile = config.vision_config.image_size
    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    return height // tile, width // tile


def patch_grid(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches left after the padding is cut off, and after OneVision's resampling."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = (side * count for count in tile_grid(config, size))
    height, width = size
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    if config.model_type == "llava_onevision":
        limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (limit * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return rows, columns


def anyres_inputs(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = 1,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """pixel_values [images tiles channel height width], image_sizes [images 2], and prompts with matching lengths.

    `image_size` is the original size of every image; without it, images take `SIZES` in turn (over the whole batch with
    padding, so that rows differ in length; over each prompt without, so that they do not).
    """
    config = model.config
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    # OneVision cuts an image into tiles only when it is alone in its prompt.
    tiled = images_per_prompt == 1 or config.model_type == "llava_next"
    sizes: list[tuple[int, int]] = []
    tiles: list[int] = []
    lengths: list[list[int]] = []
    for row in range(batch):
        lengths.append([])
        for index in range(images_per_prompt):
            size = image_size or SIZES[(index + (row if padding else 0)) % len(SIZES)]
            rows, columns = patch_grid(config, size)
            sizes.append(size)
            tiles.append(1 + math.prod(tile_grid(config, size)) if tiled else 1)
            lengths[-1].append(side**2 + (rows * (columns + 1) if tiled else 1))
    ids, mask = prompt_rows(lengths, seed, padding)
    shape = (len(sizes), max(tiles), vision.num_channels, vision.image_size, vision.image_size)
    real = torch.arange(max(tiles))[None, :] < torch.tensor(tiles)[:, None]
    values = pixels(shape, generator_for("anyres images", str(seed)), dtype) * real[:, :, None, None, None]
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": values,
        "image_sizes": torch.tensor(sizes),
    }
    if config.model_type == "llava_onevision":
        made["batch_num_images"] = torch.tensor([images_per_prompt] * batch)
    return {name: tensor.to(model.device) for name, tensor in made.items()}


def next_processor(vision: dict[str, Any]) -> Any:
    side = vision["image_size"]
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": side}, crop_size=exact_size(side, side), image_grid_pinpoints=pinpoints(side)
    )
    return transformers.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer("bos"),
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _images_only(processor_class: type) -> type:
    """`processor_class` without its video part, under the same name.

    OneVision's processor insists on a video processor, and every video processor on torchvision.
    """

    class ImagesOnly(processor_class):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, **options: Any) -> None:
            super().__init__(image_processor, tokenizer, None, **options)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    ImagesOnly.__name__ = processor_class.__name__
    return ImagesOnly


def onevision_processor(vision: dict[str, Any], aspect: str) -> Any:
    side = vision["image_size"]
    images = transformers.LlavaOnevisionImageProcessor(
        size=exact_size(side, side), image_grid_pinpoints=pinpoints(side)
    )
    return _images_only(transformers.LlavaOnevisionProcessor)(
        image_processor=images,
        tokenizer=tokenizer("plain"),
        num_image_tokens=(side // vision["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect,
    )


def _anyres_case(
    name: str,
    family: str,
    make: Callable[[Any], Any],
    processor: Callable[[], Any] | None,
    tags: set[str],
    nested: bool,
    **entries: Any,
) -> None:
    side = entries["vision_config"]["image_size"]

    def build() -> Any:
        config = build_config(family, image_token_index=IMAGE, image_grid_pinpoints=pinpoints(side), **entries)
        return randomise(make(config), name)

    both = {
        "generates",
        "padding_left",
        "padding_right",
        "two_images",
        "gqa",
        "any_size",
        "non_square",
        "tiles",
        "newline",
    }
    register(
        Case(
            name=name,
            family=family,
            build=build,
            inputs=anyres_inputs,
            towers=("vision", "language"),
            processor=processor,
            raw=raw_prompts((26, 48), nested=nested),
            tags=frozenset(both | tags),
            unused=unused_vision(entries["vision_config"], entries["vision_feature_layer"]),
        )
    )


for _name, _language in (("llava-next-mistral", mistral()), ("llava-next-llama", llama())):
    _anyres_case(
        _name,
        "llava_next",
        transformers.LlavaNextForConditionalGeneration,
        partial(next_processor, CLIP_TOWER),
        {"class_token", "rectangular"},
        nested=False,
        vision_config=dict(CLIP_TOWER),
        text_config=_language,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )

ONEVISION: dict[str, Any] = {
    "vision_config": SIGLIP_TOWER,
    "text_config": qwen2(),
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    # No video token exists in this vocabulary; the id must only differ from the image token's.
    "video_token_index": UNKNOWN,
}
for _name, _aspect, _tags in (
    ("llava-onevision", "anyres_max_9", set()),
    ("llava-onevision-resampled", "anyres_max_1", {"resampled"}),
):
    _anyres_case(
        _name,
        "llava_onevision",
        transformers.LlavaOnevisionForConditionalGeneration,
        partial(onevision_processor, SIGLIP_TOWER, _aspect),
        {"no_class_token", "full_features"} | _tags,
        nested=True,
        vision_aspect_ratio=_aspect,
        **ONEVISION,
    )
