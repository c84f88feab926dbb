"""What figures of attention are put together from: a map over the picture, and the frame that boxes are drawn in.

A frame is the part of the model's image that a map covers, (left, top, right, bottom) in the pixels that the token map counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.plots import kit, patches, style

if TYPE_CHECKING:
    Box = tuple[float, float, float, float]


def add_base(
    figure: kit.Figure,
    picture: np.ndarray[Any, Any] | None,
    maps: Sequence[Tensor],
    *,
    signed: bool = False,
    as_share: bool = True,
    extent: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Picture (where given) and maps in the first panel, of which the first is seen; the maps are the last traces.

    ``extent`` is how much of the picture's height and width the maps cover.
    """
    scale = style.diverging() if signed else style.sequential(over_picture=picture is not None)
    bar = kit.color_bar(tickformat=".2~%" if as_share else None, x=-0.02, xanchor="right", len=0.8)
    if picture is not None:
        patches.add_picture(figure, picture, 1)
    for number, grid in enumerate(maps):
        options: dict[str, Any] = {
            "colorscale": scale,
            **color_range(grid, signed),
            "colorbar": bar,
            "visible": number == 0,
        }
        if picture is not None:
            options.update(**patches.over(picture, grid.shape, extent), opacity=0.55)
        patches.add_map(figure, grid.numpy(), 1, 1, number=".2%" if as_share else ".3g", **options)
    if picture is not None:
        patches.square(figure, picture.shape[0], 1, 1)


def color_range(grid: Tensor, signed: bool) -> dict[str, float]:
    """The limits of a map's colours: from nothing, or from as far below 0, to its largest value."""
    top = max(float(grid.abs().nan_to_num(0.0).max()), 1e-9)
    return {"zmin": -top if signed else 0.0, "zmax": top}


# -- frames and boxes ----------------------------------------------------------------------------------------------------------------------


def frame_of(places: Tensor, frames: Tensor, boxes: Tensor, row: int, image: int, tile: int | None) -> Box:
    """The pixels that the map of a row's image (and tile; None: its first) covers."""
    here = (places[row, :, 0] == image) & (places[row, :, 2] >= 0)
    here &= places[row, :, 1] == (int(places[row, here, 1].min()) if tile is None else tile)
    if frames.ndim == 3:
        left, top, right, bottom = frames[row, here][0].tolist()
    else:
        # Made by hand, or by a version that kept the patches' boxes alone.
        (left, top), (right, bottom) = boxes[row, here, :2].amin(0).tolist(), boxes[row, here, 2:].amax(0).tolist()
    return left, top, right, bottom


def box_in_frame(frame: Box, box: Box | None, picture: np.ndarray[Any, Any] | None) -> Box | None:
    """A box in the frame's pixels: given in pixels of the picture, as shares of it, or, without a picture, in the frame's own pixels.

    Raises:
        InputError: corners in the wrong order.
    """
    if box is None:
        return None
    left, top, right, bottom = (float(edge) for edge in box)
    if right <= left or bottom <= top:
        raise InputError(f"A box is (left, top, right, bottom) with left < right and top < bottom, not {tuple(box)}.")
    if picture is None and max(box) > 1.0:
        return left, top, right, bottom
    shares = patches.as_shares(box, picture)
    assert shares is not None
    x0, y0, x1, y1 = frame
    across, down = x1 - x0, y1 - y0
    return x0 + shares[0] * across, y0 + shares[1] * down, x0 + shares[2] * across, y0 + shares[3] * down


def shares_of(frame: Box, box: Box) -> Box:
    """A box in the frame's pixels as shares of it."""
    left, top, right, bottom = frame
    across, down = right - left, bottom - top
    return (box[0] - left) / across, (box[1] - top) / down, (box[2] - left) / across, (box[3] - top) / down


def outline(
    figure: kit.Figure, frame: Box, box: Box | None, height: float, width: float, color: str = style.AGAINST
) -> None:
    """Draw a box over the first panel."""
    if box is not None:
        patches.mark(figure, shares_of(frame, box), height, width, 1, 1, color)
