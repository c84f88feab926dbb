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

from circuitvision.errors import InputError
from circuitvision.model.pictures import prepared
from circuitvision.plots import kit, style

Box = tuple[float, float, float, float]
_LONGEST_WORD = 8
_USUAL_WIDTH, _LETTER_WIDTH = 740, 0.7
"""Pixels of a figure on an ordinary page, and the width of a letter as a share of its size."""


def as_picture(picture: Any) -> np.ndarray[Any, Any]:
    """A picture as ``[height width 3]`` of bytes: whatever :mod:`circuitvision.model.pictures` reads, grey or coloured.

    Raises:
        InputError: no picture, several of them, or one whose levels are not known (normalised pixel values).
    """
    found = prepared(picture, channels=3)
    if isinstance(found, list):
        raise InputError(f"One picture is drawn, and {len(found)} were given; choose one.")
    return np.asarray(found)


def add_picture(figure: kit.Figure, picture: np.ndarray[Any, Any], row: int, column: int = 1) -> None:
    """An image ``[height width 3]`` of whole numbers 0 … 255 (see :func:`as_picture`)."""
    figure.add_trace(go.Image(z=picture, hoverinfo="skip"), row=row, col=column)
    square(figure, picture.shape[0], row, column)


def add_map(
    figure: kit.Figure,
    grid: Any,
    row: int,
    column: int,
    hover: Sequence[Sequence[str]] | None = None,
    unit: str = "",
    number: str = ".3g",
    **heatmap: Any,
) -> None:
    """A value per patch ``[rows columns]`` as coloured cells; on the figure's shared ``coloraxis`` unless the keywords say otherwise.

    ``hover`` is a line of text per patch, shown with its place and value. ``number`` is the format of the values.
    """
    values = np.asarray(grid)
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
    figure.add_trace(go.Heatmap(z=values, **options), row=row, col=column)
    square(figure, rows, row, column)


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


def add_overlay(
    figure: kit.Figure,
    picture: np.ndarray[Any, Any],
    grid: Any,
    row: int,
    column: int,
    opacity: float = 0.6,
    extent: tuple[float, float] = (1.0, 1.0),
    **more: Any,
) -> None:
    """The picture with a patch map laid over it that covers ``extent`` of its height and width, from the top left."""
    add_picture(figure, picture, row, column)
    values = np.asarray(grid)
    add_map(figure, values, row, column, opacity=opacity, **over(picture, values.shape, extent), **more)
    square(figure, picture.shape[0], row, column)


def over(picture: np.ndarray[Any, Any], shape: Sequence[int], extent: tuple[float, float]) -> dict[str, Any]:
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


def as_shares(box: Sequence[float] | None, picture: np.ndarray[Any, Any] | None) -> Box | None:
    """A box as shares of the image: given so (nothing above 1), or in pixels of the picture.

    Raises:
        InputError: pixels without a picture, or corners in the wrong order.
    """
    if box is None:
        return None
    left, top, right, bottom = (float(edge) for edge in box)
    if right <= left or bottom <= top:
        raise InputError(f"A box is (left, top, right, bottom) with left < right and top < bottom, not {tuple(box)}.")
    if max(left, top, right, bottom) <= 1.0:
        return left, top, right, bottom
    if picture is None:
        raise InputError(
            f"The box {tuple(box)} is in pixels: give the picture as well, or the box as shares of the image."
        )
    height, width = picture.shape[:2]
    return left / width, top / height, right / width, bottom / height


def mark(
    figure: kit.Figure,
    box: Box | None,
    rows: float,
    columns: float,
    row: int,
    column: int,
    color: str = style.AGAINST,
    extent: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Draw a box over a picture, or a map of ``rows`` × ``columns`` cells that cover ``extent`` of the image's height and width."""
    if box is None:
        return
    rows, columns = rows / extent[0], columns / extent[1]
    x0, y0, x1, y1 = (edge * size - 0.5 for edge, size in zip(box, (columns, rows, columns, rows), strict=True))
    figure.add_shape(type="rect", x0=x0, x1=x1, y0=y0, y1=y1, line={"width": 2, "color": color}, row=row, col=column)


def below(figure: kit.Figure, text: str, row: int, column: int, size: int = style.SMALL, **more: Any) -> None:
    """A line of text under a panel."""
    where = {"xref": "x domain", "yref": "y domain", "x": 0.5, "y": -0.04, "yanchor": "top"}
    figure.add_annotation(text=text, showarrow=False, font={"size": size}, **where, **more, row=row, col=column)
