"""Pictures, patch maps and boxes: the parts that every figure over an image is put together from.

A panel is one cell of a figure made by :func:`circuitvision.plots.kit.panels`. Row 0 is at the top, and cells are square. A box is (left,
top, right, bottom) as shares of the image, so that it fits the picture and any map of it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from circuitvision.data.pictures import prepared
from circuitvision.errors import InputError
from circuitvision.plots import kit, style

Box = tuple[float, float, float, float]
Pixels = np.ndarray[Any, Any]
_LONGEST_WORD = 8
_USUAL_WIDTH, _LETTER_WIDTH = 740, 0.7
"""Pixels of a figure on an ordinary page, and the width of a letter as a share of its size."""


def as_picture(picture: Any) -> Pixels:
    """A picture as ``[height width 3]`` of bytes: whatever :mod:`circuitvision.data.pictures` reads, grey or coloured.

    Raises:
        InputError: no picture, several of them, or one whose levels are not known (normalised pixel values).
    """
    found = prepared(picture, channels=3)
    if isinstance(found, list):
        raise InputError(f"One picture is drawn, and {len(found)} were given; choose one.")
    return np.asarray(found)


def draw(
    figure: kit.Figure,
    row: int,
    column: int,
    grid: Any = None,
    picture: Pixels | None = None,
    *,
    over: Pixels | None = None,
    box: Box | None = None,
    extent: tuple[float, float] = (1.0, 1.0),
    color: str = style.AGAINST,
    opacity: float = 0.6,
    **more: Any,
) -> None:
    """One panel: a picture, a map of patches, or the map laid over the picture, with a box around an object.

    ``over`` is a picture that the panel shows already. ``extent`` is how much of the picture's height and width the map covers, from the top left;
    other keywords are those of the map's cells:
    ``hover`` (a line of text per patch, shown with its place and value), ``unit``, ``number`` (the format of values), and Plotly's own.
    """
    if picture is not None:
        figure.add_trace(go.Image(z=picture, hoverinfo="skip"), row=row, col=column)
    under = picture if picture is not None else over
    if grid is not None:
        values = np.asarray(grid)
        place = {} if under is None else {"opacity": opacity, **_over(under, values.shape, extent)}
        figure.add_trace(_cells(values, **place, **more), row=row, col=column)
    square(figure, len(grid) if under is None else len(under), row, column)
    mark(figure, box, size_of(grid, under, extent), row, column, color)


def _cells(
    values: Pixels, hover: Sequence[Sequence[str]] | None = None, unit: str = "", number: str = ".3g", **heatmap: Any
) -> go.Heatmap:
    """A value per patch ``[rows columns]`` as coloured cells; on the figure's shared ``coloraxis`` unless the keywords say otherwise."""
    rows, columns = values.shape
    lines = [
        [f"patch row {r}, column {c}" + (f"<br>{hover[r][c]}" if hover is not None else "") for c in range(columns)]
        for r in range(rows)
    ]
    options: dict[str, Any] = {
        "xgap": 1 if columns <= 16 else 0, "ygap": 1 if rows <= 16 else 0, "customdata": lines,
        "hovertemplate": "%{customdata}<br>%{z:" + number + "}" + (f" {unit}" if unit else "") + "<extra></extra>",
        **({} if "colorscale" in heatmap else {"coloraxis": "coloraxis"}), **heatmap,
    }  # fmt: skip
    return go.Heatmap(z=values, **options)


def size_of(grid: Any, picture: Pixels | None, extent: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    """Height and width of the whole image in the units of a panel: pixels of the picture, or cells of the map."""
    if picture is not None:
        return picture.shape[0], picture.shape[1]
    return len(grid) / extent[0], len(grid[0]) / extent[1]


def add_words(figure: kit.Figure, grid: torch.Tensor, words: Sequence[Sequence[str]], scale: style.Scale, low: float, high: float,
              row: int, column: int) -> None:  # fmt: skip
    """Words on the cells of a map with an opaque scale: cut where they are long, in a size that fits the cells."""
    plain = [[html.unescape(word) for word in line] for line in words]
    short = [
        [word if len(word) <= _LONGEST_WORD else word[: _LONGEST_WORD - 1] + "…" for word in line] for line in plain
    ]
    left, right = next(figure.select_xaxes(row=row, col=column)).domain
    room = _USUAL_WIDTH * (right - left) / len(short[0])
    size = min(max(room / (_LETTER_WIDTH * max(3, *(len(word) for line in short for word in line))), 6.0), 13.0)
    kit.write(
        figure, grid, scale, low, high, [[html.escape(word) for word in line] for line in short], row, column, size
    )


def _over(picture: Pixels, shape: Sequence[int], extent: tuple[float, float]) -> dict[str, Any]:
    """Where the cells of a map stand in the pixels of the picture; a gap between them would show as lines."""
    steps = [pixels * share / cells for pixels, cells, share in zip(picture.shape[:2], shape, extent, strict=True)]
    down, across = ((np.arange(n) + 0.5) * step - 0.5 for n, step in zip(shape, steps, strict=True))
    return {"x": across, "y": down, "xgap": 0, "ygap": 0}


def square(figure: kit.Figure, height: int, row: int, column: int) -> None:
    """Row 0 at the top, square cells, in a panel ``height`` cells high."""
    axis = next(figure.select_xaxes(row=row, col=column)).plotly_name.replace("axis", "")
    figure.update_yaxes(
        range=[height - 0.5, -0.5], scaleanchor=axis, constrain="domain", constraintoward="top", row=row, col=column
    )
    figure.update_xaxes(constrain="domain", row=row, col=column)


def as_shares(box: Sequence[float] | None, picture: Pixels | None, frame: Box | None = None) -> Box | None:
    """A box as shares of the image: given so (nothing above 1), or in pixels of the picture; without one in those of ``frame``, the part (left, top,
    right, bottom) of the model's image that is shown.

    Raises:
        InputError: pixels of neither, or corners in the wrong order.
    """
    if box is None:
        return None
    left, top, right, bottom = (float(edge) for edge in box)
    if right <= left or bottom <= top:
        raise InputError(f"A box is (left, top, right, bottom) with left < right and top < bottom, not {tuple(box)}.")
    if max(left, top, right, bottom) <= 1.0:
        return left, top, right, bottom
    if picture is None and frame is None:
        raise InputError(
            f"The box {tuple(box)} is in pixels: give the picture as well, or the box as shares of the image."
        )
    x0, y0, x1, y1 = frame if picture is None and frame else (0.0, 0.0, picture.shape[1], picture.shape[0])  # type: ignore[union-attr]
    return (left - x0) / (x1 - x0), (top - y0) / (y1 - y0), (right - x0) / (x1 - x0), (bottom - y0) / (y1 - y0)


def mark(
    figure: kit.Figure,
    box: Box | None,
    size: tuple[float, float],
    row: int,
    column: int,
    color: str = style.AGAINST,
    label: str = "",
    middle: bool = False,
) -> None:
    """Draw a box over a panel whose whole image has this height and width (see :func:`size_of`), with a label in its corner or its middle."""
    if box is None:
        return
    height, width = size
    x0, y0, x1, y1 = (edge * length - 0.5 for edge, length in zip(box, (width, height, width, height), strict=True))
    where = {"row": row, "col": column}
    figure.add_shape(type="rect", x0=x0, x1=x1, y0=y0, y1=y1, line={"width": 2, "color": color}, **where)
    if label:
        place = {"x": (x0 + x1) / 2, "y": (y0 + y1) / 2} if middle else {"x": x0, "y": y0, "xanchor": "left"}
        look = {"font": {"color": "#ffffff", "size": style.SMALL}, "bgcolor": color, "borderpad": 2, "showarrow": False}
        figure.add_annotation(text=label, yanchor="middle" if middle else "top", **place, **look, **where)


def below(figure: kit.Figure, text: str, row: int, column: int, size: int = style.SMALL, **more: Any) -> None:
    """A line of text under a panel."""
    where = {"xref": "x domain", "yref": "y domain", "x": 0.5, "y": -0.04, "yanchor": "top"}
    figure.add_annotation(text=text, showarrow=False, font={"size": size}, **where, **more, row=row, col=column)


def finish(
    figure: kit.Figure, title: str, height: int, scale: style.Scale, low: float, high: float, bar: str, **more: Any
) -> kit.Figure:
    """Title, height and the one colour bar of maps that share their scale."""
    style.layout(figure, title, height, **more)
    kit.bare(figure, visible=False)
    figure.update_layout(
        coloraxis={"colorscale": scale, "cmin": low, "cmax": high, "colorbar": kit.color_bar(bar, x=1.01)}
    )
    return figure
