"""What a patch reads: the pixels under the patch embedding's own kernel, and where the pixels of a tensor lie in a picture.

A patch embedding is a convolution (kernel and stride per axis, possibly padding) or, where the processor has cut the picture up already, a linear
map of flattened patches. Rows and columns of the patch grid follow from its arithmetic, ``floor((size - kernel) / stride) + 1``, so pixels past the
last whole patch belong to no patch.

Boxes are (left, top, right, bottom); right and bottom are one past the last pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from circuitvision.errors import InputError

Array = np.ndarray


def pair(value: Any) -> tuple[int, int]:
    """(vertical, horizontal) of a setting that is one number or two."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


@dataclass(frozen=True)
class PatchEmbedding:
    """How pictures are cut into patches; every pair is (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, module: nn.Module, config: Any) -> PatchEmbedding:
        """Read off the convolution inside an embedding module, or off the config where patches arrive flattened."""
        # An adapter wraps the convolution, which then comes first among its parts.
        conv = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
        if conv is None:
            return cls(pair(config.patch_size), pair(config.patch_size))
        reach = [1 + pair(conv.dilation)[axis] * (pair(conv.kernel_size)[axis] - 1) for axis in (0, 1)]
        # The only padding spelled as a word that goes with a stride is "valid": none.
        padding = (0, 0) if isinstance(conv.padding, str) else pair(conv.padding)
        return cls((reach[0], reach[1]), pair(conv.stride), padding)

    @property
    def patch_size(self) -> int | tuple[int, int]:
        """The kernel: one number for square patches, else (height, width)."""
        return self.kernel[0] if self.kernel[0] == self.kernel[1] else self.kernel

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of a picture; InputError if it is smaller than one patch."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        rows, columns = ((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in sizes)
        if rows < 1 or columns < 1:
            raise InputError(
                f"An image of {height}x{width} pixels is smaller than one patch of {self.kernel[0]}x{self.kernel[1]}; enlarge it."
            )
        return rows, columns

    def boxes(self, grid: tuple[int, int], height: int, width: int) -> Array:
        """The pixels that every patch of a grid reads, row by row: ``[patch 4]``."""
        rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
        top = rows * self.stride[0] - self.padding[0]
        left = columns * self.stride[1] - self.padding[1]
        boxes = np.stack([left, top, left + self.kernel[1], top + self.kernel[0]], axis=1).astype(float)
        return boxes.clip(0, [width, height, width, height])


@dataclass(frozen=True)
class Frame:
    """Where the pixels of one tensor lie in a picture of ``size`` (height, width).

    The edge of column ``c`` is at ``origin[1] + c * step[1]``, that of row ``r`` at ``origin[0] + r * step[0]``.
    """

    size: tuple[float, float]
    origin: tuple[float, float] = (0.0, 0.0)
    step: tuple[float, float] = (1.0, 1.0)

    def area(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The box of a whole tensor, padding included."""
        (top, left), (down, across) = self.origin, self.step
        return left, top, left + width * across, top + height * down

    def boxes(self, boxes: Array) -> Array:
        """Boxes of the tensor's pixels in the picture, ``[… 4]``: cut at its edges, NaN where nothing of it is read (padding)."""
        (top, left), (down, across), (height, width) = self.origin, self.step, self.size
        found = boxes * [across, down, across, down] + [left, top, left, top]
        found = found.clip(0, [width, height, width, height])
        nothing = (found[..., 2] <= found[..., 0]) | (found[..., 3] <= found[..., 1])
        return np.where(nothing[..., None], np.nan, found)


def union(boxes: Array, groups: Array, count: int) -> Array:
    """The smallest box around the boxes of each group, ``[count 4]``; NaN where a group has none."""
    found = np.full((count, 4), np.nan)
    np.fmin.at(found[:, :2], groups, boxes[:, :2])
    np.fmax.at(found[:, 2:], groups, boxes[:, 2:])
    return found
