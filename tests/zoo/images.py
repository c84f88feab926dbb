"""Pixels: random tensors in model space, and small PIL pictures for the processors."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

COLORS = ["red", "green", "blue", "yellow"]


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) of a size that a config states as one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def pixels(
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random pixel values with the variance of normalised images; drawn in float32 so that dtypes agree."""
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def picture(index: int = 0, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """A PIL image of (height, width) with one coloured square and a gradient; differs for every index."""
    height, width = size
    image = Image.new("RGB", (width, height))
    image.putdata(
        [
            ((7 * x + 31 * index) % 256, (11 * y) % 256, (5 * x + 3 * y + 17 * index) % 256)
            for y in range(height)
            for x in range(width)
        ]
    )
    left, top = (5 * index) % max(1, width // 2), (3 * index) % max(1, height // 2)
    ImageDraw.Draw(image).rectangle((left, top, left + width // 3, top + height // 3), fill=COLORS[index % 4])
    return image
