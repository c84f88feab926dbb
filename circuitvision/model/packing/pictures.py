"""Checks of pictures against the towers that read them: channels, and sizes that a tower has positions for.

Not covered: pictures that arrive as flattened patches, which have neither.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError
from circuitvision.model.patches import pair

if TYPE_CHECKING:
    from circuitvision.model.packing.run import ImageRun
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped


def check_pictures(run: ImageRun) -> None:
    """Raise InputError for pictures whose channels or size a tower cannot read."""
    model, pixels = run.model, run.pixels
    assert pixels is not None
    towers = [tower for tower in model.towers.values() if tower.stack.image]
    if run.tower.stack.position != "resized":
        channels = run.packing.channels(towers)
        if pixels.shape[-3] != channels:
            raise InputError(
                f"pixel_values has {pixels.shape[-3]} channels, the model reads {channels}; its layout is {run.packing.layout}."
            )
    for tower in towers:
        _check_size(model, tower, run, (int(pixels.shape[-2]), int(pixels.shape[-1])))


def _check_size(model: Wrapped, tower: Tower, run: ImageRun, size: tuple[int, int]) -> None:
    """Raise InputError for pictures of a size that a tower has no positions for."""
    config: Any = tower.config
    expected = pair(getattr(config, "image_size", size))
    if tower.stack.position == "resized":
        return
    assert tower.patch_embedding is not None
    if min(tower.patch_embedding.grid(*size)) < 1:
        raise InputError(
            f"The image is {size[0]}x{size[1]} pixels, smaller than one patch ({tower.cfg.patch_size}) of the {tower.name} tower: give a larger one."
        )
    if tower.stack.position == "rotary":
        return
    always = tower.stack.position == "grid_always"
    if always or run.inputs.get("interpolate_pos_encoding"):
        _check_interpolation(tower, size, expected, always)
    elif size != expected:
        hint = "" if model.image_token_id is not None else ", or pass interpolate_pos_encoding=True"
        raise InputError(
            f"The image is {size[0]}x{size[1]} pixels, the model reads {expected[0]}x{expected[1]}: resize it (model.inputs does){hint}."
        )


def _check_interpolation(tower: Tower, size: tuple[int, int], expected: tuple[int, int], always: bool) -> None:
    """Raise InputError where the position table cannot be stretched to a picture of this size."""
    assert tower.patch_embedding is not None
    rows, columns = tower.patch_embedding.grid(*size)
    table = tower.cfg.grid or (rows, columns)
    count = table[0] * table[1]
    as_it_is = always and rows * columns == count and size[0] == size[1]
    stretched = math.isqrt(count) ** 2 == count and (always or isinstance(tower.config.patch_size, int))
    if as_it_is or stretched:
        return
    raise InputError(
        f"This tower's position table ({table[0]}x{table[1]} patches of {tower.cfg.patch_size}) cannot be stretched to a picture of "
        f"{size[0]}x{size[1]} pixels: transformers stretches square tables of square patches only. Resize the picture to "
        f"{expected[0]}x{expected[1]} and leave interpolate_pos_encoding out."
    )
