"""What figures of attention are put together from: a map over the picture, the grid of heads beside it, and the frame that boxes are drawn in.

A frame is the part of the model's image that a map covers, (left, top, right, bottom) in the pixels that the token map counts.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.plots import patches, style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    Box = tuple[float, float, float, float]

_MOST_LABELLED = 120


def sequential(over_picture: bool = False) -> list[list[float | str]]:
    """A colour scale to orange from a faint grey, or over a picture from nothing."""
    lowest = "rgba(208,63,8,0)" if over_picture else "rgba(128,128,128,0.1)"
    return [[0.0, lowest], [0.3, "rgba(208,63,8,0.45)"], [1.0, "rgba(208,63,8,1)"]]


def escaped(name: Any) -> str:
    """A name that somebody gave as text of a figure: no markup."""
    return html.escape(str(name), quote=False)


def percent(share: float) -> str:
    """A share in whole percent that says neither all nor nothing where it is not."""
    if 0.995 <= share < 1 - 1e-6:
        return "more than 99%"
    return "less than 1%" if 1e-6 < share < 0.005 else f"{share:.0%}"


# -- heads ---------------------------------------------------------------------------------------------------------------------------------


def heads_panel(
    figure: go.Figure,
    grid: Tensor,
    axes: dict[str, list[Any]],
    column: int,
    top: float,
    *,
    as_share: bool,
    unread: Sequence[Any] = (),
    first: bool = True,
    local: bool = False,
    signed: bool = False,
    panels: int = 1,
    visible: bool = True,
) -> None:
    """A grid of layers × heads in one panel; on the shared ``coloraxis``, or with colours of its own (``local``)."""
    import plotly.graph_objects as go

    layers, heads = grid.shape
    top = max(top, 1e-9)
    colors: dict[str, Any] = {"coloraxis": "coloraxis"}
    if local:
        colors = {"colorscale": style.diverging() if signed else sequential(), "showscale": False}
        colors.update(zmin=-top if signed else 0, zmax=top)
    shape = ".1%" if as_share else ".2f"
    figure.add_trace(
        go.Heatmap(
            z=grid.numpy(),
            xgap=2 if heads <= 40 else 0,
            ygap=2 if layers <= 40 else 0,
            hovertemplate=f"layer %{{y}} head %{{x}}<br>%{{z:{shape}}}<extra></extra>",
            visible=visible,
            **colors,
        ),
        row=1,
        col=column,
    )
    every_layer, every_head = (1 if layers <= 16 else 4), (1 if heads * panels <= 32 else 4)
    names = [f"{name} (unread)" if name in unread else str(name) for name in axes["layer"]]
    figure.update_yaxes(
        title="layer" if first else None, tickvals=list(range(0, layers, every_layer)), ticktext=names[::every_layer],
        showgrid=False, zeroline=False, row=1, col=column,
    )  # fmt: skip
    figure.update_xaxes(
        title="head", tickvals=list(range(0, heads, every_head)),
        ticktext=[str(name) for name in axes["head"][::every_head]], showgrid=False, zeroline=False,
        tickangle=0, row=1, col=column,
    )  # fmt: skip


def head_labels(grid: Tensor, top: float, axis: str, *, as_share: bool, panels: int = 1) -> list[dict[str, Any]]:
    """The values of a grid of heads as annotations on the axes of that number ("", "2", …); none where there is no room."""
    layers, heads = grid.shape
    if layers * heads > _MOST_LABELLED or heads * panels > 32:
        return []
    found = []
    for layer, line in enumerate(grid.tolist()):
        for head, value in enumerate(line):
            label = "–" if value != value else style.signed_percent(value) if as_share else f"{value:.1f}"
            # Words on strong cells are white on every page; on faint ones they have the page's colour.
            font = {"size": 12, "color": "#ffffff"} if abs(value) > 0.45 * max(top, 1e-9) else {"size": 12}
            place = {"x": head, "y": layer, "xref": f"x{axis}", "yref": f"y{axis}"}
            found.append({"text": label, "showarrow": False, "font": font, **place})
    return found


# -- maps ----------------------------------------------------------------------------------------------------------------------------------


def add_base(
    figure: go.Figure,
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
    bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0, "x": -0.02, "xanchor": "right", "len": 0.8}
    if as_share:
        bar["tickformat"] = ".2~%"
    if picture is not None:
        patches.add_picture(figure, picture, 1)
    for number, grid in enumerate(maps):
        options: dict[str, Any] = {
            "colorscale": style.diverging() if signed else sequential(over_picture=picture is not None),
            **color_range(grid, signed),
            "number": ".2%" if as_share else ".3g",
            "colorbar": bar,
            "visible": number == 0,
        }
        if picture is not None:
            # Cells of the map in pixels of the picture; a gap between them would show as lines.
            steps = [
                pixels * share / cells
                for pixels, cells, share in zip(picture.shape[:2], grid.shape, extent, strict=True)
            ]
            down, across = ((np.arange(n) + 0.5) * step - 0.5 for n, step in zip(grid.shape, steps, strict=True))
            options.update(x=across, y=down, xgap=0, ygap=0, opacity=0.55)
        patches.add_map(figure, grid.numpy(), 1, 1, **options)
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
    return (
        x0 + shares[0] * (x1 - x0),
        y0 + shares[1] * (y1 - y0),
        x0 + shares[2] * (x1 - x0),
        y0 + shares[3] * (y1 - y0),
    )


def shares_of(frame: Box, box: Box) -> Box:
    """A box in the frame's pixels as shares of it."""
    left, top, right, bottom = frame
    across, down = right - left, bottom - top
    return (box[0] - left) / across, (box[1] - top) / down, (box[2] - left) / across, (box[3] - top) / down


def outline(
    figure: go.Figure, frame: Box, box: Box | None, height: float, width: float, color: str = style.AGAINST
) -> None:
    """Draw a box over the first panel."""
    if box is not None:
        patches.mark(figure, shares_of(frame, box), height, width, 1, 1, color)
