"""The lenses of several inputs side by side: for each layer a small map of the image, coloured by what its patches would answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from circuitvision.plots import patches, style
from circuitvision.readout.patch_coords import extent_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.lens.result import LensResult

_MOST_PANELS = 9


@dataclass(frozen=True)
class LensRow:
    """One input's row of the figure: its name, its picture ``[height width 3]``, and its lenses of one target each."""

    title: str
    picture: np.ndarray[Any, Any] | None
    lenses: Sequence[LensResult]


def lens_rows(
    rows: Sequence[LensRow],
    title: str,
    changed: tuple[float, float, float, float] | None = None,
    colors: tuple[style.Color, style.Color] | None = None,
) -> go.Figure:
    """Maps of every layer of every lens, a row per input, all on one colour scale.

    ``changed`` is a box (left, top, right, bottom) as shares of the image: what differs between the inputs.
    ``colors`` are those of the lowest and the highest value.
    """
    from plotly.subplots import make_subplots

    panels = _panels(rows[0].lenses)
    pictured = any(row.picture is not None for row in rows)
    headings = (["image"] if pictured else []) + [heading for heading, _, _ in panels]
    figure = make_subplots(
        rows=len(rows),
        cols=len(headings),
        column_titles=headings,
        horizontal_spacing=0.012,
        vertical_spacing=0.16,
    )
    limit = max((_limit(row.lenses) for row in rows), default=1.0) or 1.0
    for number, row in enumerate(rows, start=1):
        first = {"row": number, "col": 1}
        where = {"xref": "x domain", "yref": "y domain", "x": -0.06, "y": 0.5, "xanchor": "right"}
        figure.add_annotation(text=row.title, textangle=-90, showarrow=False, font={"size": 14}, **where, **first)
        if row.picture is not None:
            pixels = patches.as_picture(row.picture)
            patches.add_picture(figure, pixels, number)
            patches.mark(figure, changed, pixels.shape[0], pixels.shape[1], number, 1)
        for column, (_, which, layer) in enumerate(panels, start=2 if pictured else 1):
            grid = row.lenses[which].patch_grid(layer)
            patches.add_map(figure, grid, number, column)
            _add_last(figure, row.lenses[which], layer, number, column, limit, colors)
            extent = extent_of(row.lenses[which].shares, row.lenses[which].places, 0, 0)
            patches.mark(figure, changed, grid.shape[0], grid.shape[1], number, column, extent=extent)
    width = 1060 / len(headings)
    style.layout(figure, title, int(140 + len(rows) * (width + 46)), margin={"l": 34, "r": 30, "t": 104, "b": 36})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    bar = {
        "title": {"text": _target(rows[0].lenses[0]), "side": "right"},
        "thickness": 14,
        "outlinewidth": 0,
        "x": 1.01,
    }
    figure.update_layout(
        coloraxis={"colorscale": style.diverging(*(colors or ())), "cmin": -limit, "cmax": limit, "colorbar": bar}
    )
    return figure


def _panels(lenses: Sequence[LensResult]) -> list[tuple[str, int, Any]]:
    """(heading, lens, layer) of the maps shown: all layers, or as many evenly spaced ones as fit."""
    share = max(2, _MOST_PANELS // len(lenses))
    panels = []
    for which, result in enumerate(lenses):
        layers = result.axes["layer"]
        if len(layers) > share:
            layers = [layers[round(i * (len(layers) - 1) / (share - 1))] for i in range(share)]
        panels += [
            (f"{result.tower}<br>{'input' if layer == 'input' else f'layer {layer}'}", which, layer) for layer in layers
        ]
    return panels


def _add_last(
    figure: go.Figure,
    result: LensResult,
    layer: Any,
    row: int,
    column: int,
    limit: float,
    colors: tuple[style.Color, style.Color] | None,
) -> None:
    """Below a map, the reading at the last position, where that is a word and not a patch."""
    if result.places[0, -1, 2] >= 0:
        return
    value = float(result.values[result.axes["layer"].index(layer), -1, 0, 0])
    text = f"last word {value:+.1f}".replace("-", "\N{MINUS SIGN}")
    where = {"xref": "x domain", "yref": "y domain", "x": 0.5, "y": -0.06, "yanchor": "top"}
    paint = style.tint(value / limit, colors)
    figure.add_annotation(
        text=text, showarrow=False, font={"size": 12}, borderpad=3, **paint, **where, row=row, col=column
    )


def _limit(lenses: Sequence[LensResult]) -> float:
    values = torch.cat([result.values.float().flatten() for result in lenses]).abs()
    values = values[torch.isfinite(values)]
    # A robust maximum: one outlying patch must not wash out the rest.
    return float(values.quantile(0.995)) if values.numel() else 0.0


def _target(result: LensResult) -> str:
    target = str(result.axes.get("target", ["top"])[0]).replace(" - ", " − ")
    return f"{target} ({result.measure})"
