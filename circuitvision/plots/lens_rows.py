"""The lenses of several inputs side by side: for each layer a small map of the image, coloured by what its patches would answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitvision.plots import kit, patches, style
from circuitvision.plots import lens_text as text
from circuitvision.readout.patch_coords import extent_of, picture_of

if TYPE_CHECKING:
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
) -> kit.Figure:
    """Maps of every layer of every lens, a row per input, all on one colour scale.

    ``changed`` is a box (left, top, right, bottom) as shares of the image: what differs between the inputs.
    ``colors`` are those of the lowest and the highest value.
    """
    lenses, share = rows[0].lenses, max(2, _MOST_PANELS // len(rows[0].lenses))
    shown = [(which, layer) for which, lens in enumerate(lenses) for layer in text.layers(lens, share)]
    pictured = any(row.picture is not None for row in rows)
    headings = ["image"] * pictured + [f"{lenses[which].tower}<br>{kit.layer_name(layer)}" for which, layer in shown]
    figure = kit.panels(
        len(rows), len(headings), column_titles=headings, horizontal_spacing=0.012, vertical_spacing=0.16
    )
    # One outlying patch must not wash out the rest.
    limit = kit.largest(*[lens.values for row in rows for lens in row.lenses], robust=True)
    for number, row in enumerate(rows, start=1):
        where = {
            "xref": "x domain",
            "yref": "y domain",
            "x": -0.06,
            "y": 0.5,
            "xanchor": "right",
            "row": number,
            "col": 1,
        }
        figure.add_annotation(text=row.title, textangle=-90, showarrow=False, font={"size": 14}, **where)
        if row.picture is not None:
            patches.draw(figure, number, 1, picture=patches.as_picture(row.picture), box=changed)
        for column, (which, layer) in enumerate(shown, start=1 + pictured):
            lens = row.lenses[which]
            extent = extent_of(lens, picture_of(lens))
            patches.draw(figure, number, column, lens.patch_grid(layer), box=changed, extent=extent)
            _add_last(figure, lens, layer, number, column, limit, colors)
    target = str(lenses[0].axes.get("target", ["top"])[0]).replace(" - ", f" {kit.MINUS} ")
    height, margin = int(60 + len(rows) * (820 / len(headings) + 56)), {"l": 34, "r": 30, "b": 36}
    scale, bar = style.diverging(*(colors or ())), f"{target} ({lenses[0].measure})"
    return patches.finish(figure, title, height, scale, -limit, limit, bar, above=44, margin=margin)


def _add_last(
    figure: kit.Figure, lens: LensResult, layer: Any, row: int, column: int, limit: float, colors: Any
) -> None:
    """Below a map, the reading of the pooled output, or at the last position where that is a word and not a patch."""
    at = lens.axes["layer"].index(layer)
    if lens.pooled.numel() or lens.places[0, -1, 2] < 0:
        place, found = (
            ("pooled", lens.pooled[at, 0, 0]) if lens.pooled.numel() else ("last word", lens.values[at, -1, 0, 0])
        )
        value = float(found)
        said = f"{place}<br>{value:+.1f}".replace("-", kit.MINUS)
        patches.below(figure, said, row, column, borderpad=3, **style.tint(value / limit, colors))
