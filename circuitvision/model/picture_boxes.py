"""From the tensors a model reads back to the original pictures: what the processor's resizing, padding, cropping and cutting did to places.

Token maps count pixels of the tensor (of the original picture only where a model tiles it). The way back is found by sending *coordinates* through
the processor in place of colours. Every step of the processor is run as it is, but for resizing, which stands for what it does to places: the edge of
column ``c`` of ``n`` comes from ``c / n`` of the width. What interpolation reads beyond a pixel's own square (one or two pixels of the picture, more
where it shrinks) is not in a box.

Not covered: processors that rotate, flip or draw at random; processors without a ``resize`` of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.image_utils import get_image_size, infer_channel_dimension_format, load_image

from circuitvision.errors import InputError
from circuitvision.model.packing import ImageRun
from circuitvision.model.patches import Array, Frame, union

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

_PICTURE = -1.0
"""Marks what is picture: no processor pads with a negative level."""


def boxes_in_pictures(
    model: Wrapped, images: Any, inputs: Mapping[str, Any], tower: str = "vision", **options: Any
) -> Float[np.ndarray, "row pos 4"]:
    """The pixels (left, top, right, bottom) of the original pictures that every position of a tower reads, NaN where it reads none.

    A position that mixes patches has the smallest box around all of them. Patches of padding, and of cameras that are absent, have no box; a box ends
    where its picture ends.

    Args:
        images: the pictures as they were given to ``model.inputs``, nested alike.
        inputs: what ``model.inputs`` made of them.
        tower: whose positions.
        options: what ``model.inputs`` was given beside them for the image processor.

    Raises:
        InputError: pictures that are not those of the inputs; a model without a processor, or one whose resizing is not known.
    """
    tokens = model.tokens(inputs)[tower]
    frames = picture_frames(model, images, inputs, **options)
    sets, shape = tokens.patches, tokens.kind.shape
    boxes = np.full((len(sets.row), 4), np.nan)
    for row, frame in enumerate(frames):
        if frame is not None:
            own = sets.source_row == row
            boxes[own] = frame.boxes(sets.pixels[own])
    return union(boxes, sets.row * shape[1] + sets.position, shape[0] * shape[1]).reshape(*shape, 4)


def picture_frames(model: Wrapped, images: Any, inputs: Mapping[str, Any], **options: Any) -> list[Frame | None]:
    """Where the pixels of every row of the vision tower lie in its original picture; None where it shows nothing of one.

    Raises:
        InputError: as :func:`boxes_in_pictures`.
    """
    run = ImageRun(model, inputs)
    sizes = [_size(image) for image in _flat(images)]
    traced = [
        list(zip(*axes, strict=True))
        for axes in zip(*(_traced(model.processor, images, axis, options) for axis in (0, 1)), strict=True)
    ]
    there = [image for image, present in enumerate(run.present) if present]
    if len(traced) != len(there) or len(sizes) != len(there):
        raise InputError(
            f"The inputs hold {len(there)} images, and {len(sizes)} pictures were given; give those they were made of."
        )
    frames: list[Frame | None] = [None] * run.n_rows
    for image, size, tiles in zip(there, sizes, traced, strict=True):
        first, count = run.firsts[image], run.tiles[image]
        shapes = {tile[0].shape[-2:] for tile in tiles[:count]}
        if len(tiles) < count or shapes != {tuple(run.packing.size(run, first))}:
            raise InputError(
                "These pictures give tensors of another size than the inputs hold; give those they were made of."
            )
        for tile, (down, across) in enumerate(tiles[:count]):
            frames[first + tile] = _frame(down, across, size)
    return frames


def picture_frame(processor: Any, size: tuple[int, int]) -> tuple[Frame | None, tuple[int, int]]:
    """Where the pixels of the tensor that a processor makes of one untiled picture of ``size`` (height, width) lie in it, and the tensor's size.

    Raises:
        InputError: a processor whose resizing is not known.
    """
    blank = np.zeros((*size, 3), np.uint8)
    down, across = (_traced(processor, [blank], axis, {})[0][0] for axis in (0, 1))
    return _frame(down, across, size), (int(down.shape[-2]), int(down.shape[-1]))


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
    else:
        yield image_of(images)


def image_of(image: Any) -> Any:
    """A picture that is a file or an address, loaded; any other as it is. Raises InputError for a data set."""
    if hasattr(image, "batches"):
        raise InputError(
            "Give the pictures of the inputs, not a data set: those of one batch are [data.examples[row].images for row in rows]."
        )
    if isinstance(image, Tensor):
        return image.detach().cpu()
    return load_image(str(image)) if isinstance(image, str) or hasattr(image, "__fspath__") else image


def _size(image: Any) -> tuple[int, int]:
    if hasattr(image, "convert"):
        return image.height, image.width
    array = np.asarray(image)
    if array.ndim == 2:
        return array.shape
    return get_image_size(array, infer_channel_dimension_format(array, num_channels=(1, 3, 4)))


def _coordinates(images: Any, axis: int) -> Any:
    """Pictures of coordinates in place of pictures: channels are the middle of every pixel along an axis, its size, and the mark."""
    if isinstance(images, (list, tuple)):
        return [_coordinates(image, axis) for image in images]
    height, width = _size(image_of(images))
    middle = np.arange((height, width)[axis]) + 0.5
    middle = np.broadcast_to(middle[:, None] if axis == 0 else middle, (height, width))
    return np.stack([middle, np.ones((height, width)), np.full((height, width), _PICTURE)])


def _traced(processor: Any, images: Any, axis: int, options: Mapping[str, Any]) -> list[list[Array]]:
    """What the processor makes of coordinates: for every image its tiles, ``[3 height width]``."""
    processor = getattr(processor, "image_processor", processor)
    if processor is None or not hasattr(processor, "resize"):
        raise InputError(
            "Only a processor says where tensors lie in the original picture: wrap the model with one, cv.HookedModel(module, processor)."
        )
    tracer = copy.copy(processor)

    def resize(image: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
        blank = (
            torch.zeros(image.shape, dtype=torch.uint8)
            if isinstance(image, Tensor)
            else np.zeros(image.shape, np.uint8)
        )
        new = tuple(processor.resize(blank, size, *args, **kwargs).shape[-2:])
        array = np.asarray(image)
        flat = np.stack([_resized(one, new, axis) for one in array.reshape(-1, *array.shape[-3:])])
        out = flat.reshape(*array.shape[:-2], *new)
        return torch.from_numpy(out) if isinstance(image, Tensor) else out

    tracer.resize = resize
    plain = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": False, "input_data_format": "channels_first"}
    made = tracer(_coordinates(images, axis), **{**options, **plain})
    if "spatial_shapes" in made:
        return [[_unflattened(*one)] for one in zip(made["pixel_values"], made["spatial_shapes"], strict=True)]
    arrays = [np.asarray(image) for image in made["pixel_values"]]
    return [list(array) if array.ndim == 4 else [array] for array in arrays]


def _unflattened(patches: Any, grid: Any) -> Array:
    rows, columns = (int(cells) for cells in grid)
    values = np.asarray(patches)[: rows * columns]
    side = round((values.shape[1] / 3) ** 0.5)
    cut = values.reshape(rows, columns, side, side, 3)
    return cut.transpose(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)


def _resized(image: Array, size: tuple[int, ...], axis: int) -> Array:
    """Coordinates at another size: a line through those that are picture, whatever lies around them."""
    out = np.zeros((3, *size))
    marked = image[2] == _PICTURE
    if not marked.any():
        return out
    spans, middles = [], []
    for old, new, lines in zip(image.shape[1:], size, (marked.any(1), marked.any(0)), strict=True):
        first, last = np.flatnonzero(lines)[[0, -1]]
        step = old / new
        middle = (np.arange(new) + 0.5) * step - 0.5
        middles.append((middle - first, step))
        spans.append((middle + step / 2 > first - 0.5) & (middle - step / 2 < last + 0.5))
    top, left = (int(np.flatnonzero(lines)[0]) for lines in (marked.any(1), marked.any(0)))
    away, step = middles[axis]
    line = image[0, top, left] + away * image[1, top, left]
    inside = spans[0][:, None] & spans[1][None]
    out[0] = np.where(inside, line[:, None] if axis == 0 else line, 0.0)
    out[1] = np.where(inside, image[1, top, left] * step, 0.0)
    out[2] = np.where(inside, _PICTURE, 0.0)
    return out


def _frame(down: Array, across: Array, size: tuple[int, int]) -> Frame | None:
    origin, steps = [], []
    for axis, image in enumerate((down, across)):
        marked = np.argwhere(image[2] == _PICTURE)
        if not len(marked):
            return None
        place = tuple(marked[0])
        middle, step = image[0][place], image[1][place]
        origin.append(float(middle - (place[axis] + 0.5) * step))
        steps.append(float(step))
    return Frame((float(size[0]), float(size[1])), (origin[0], origin[1]), (steps[0], steps[1]))
