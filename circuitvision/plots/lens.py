"""Three views of a lens: layers × patches laid over the image, a table of layers × tokens, and lines of what the pooled output says layer by layer.

``lens(result)`` chooses: patches where the row has any, lines where the output is pooled and no patch is placed, the table otherwise. Hovering
over a cell names the highest columns there. Values are those of the result; nothing is read again.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.plots import _check_keywords, patches, style
from circuitvision.plots import lens_text as text
from circuitvision.plots.lens_table import table
from circuitvision.readout.patch_coords import extent_of
from circuitvision.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.lens.result import LensResult

_MOST_PANELS = 9
_VIEWS = ("patches", "table", "layers")
PALETTE = ("#d9480f", "#2f6fdb", "#2b8a3e", "#9c36b5", "#b8860b", "#0b7285", "#c2255c", "#5f6368")


def lens(result: LensResult, view: str | None = None, **keywords: Any) -> go.Figure:
    """A figure of one lens: ``view`` is "patches", "table" or "layers" (see the functions of these names for keywords).

    Raises:
        InputError: no such view or row, one that needs what the lens does not hold, a keyword that the view does not take, or a lens with heads.
    """
    row = text.checked_row(result, keywords.get("row"))
    if view is None:
        placed = result.places.ndim == 3 and bool((result.places[row][:, 2] >= 0).any())
        view = "patches" if placed else "layers" if result.pooled.numel() or _is_named(result) else "table"
    if view not in _VIEWS:
        raise InputError(f"Unknown view {view!r}; choose one of {', '.join(_VIEWS)}.")
    views: dict[str, Any] = {"patches": over_image, "table": table, "layers": layers}
    _check_keywords(views[view], f"LensResult in the view {view!r}", keywords)
    return views[view](result, **keywords)


def _is_named(result: LensResult) -> bool:
    """Whether the positions of a lens are regions and other choices by name, and not single ones."""
    return "position" in result.axes and all(isinstance(label, str) for label in result.axes["position"])


def over_image(
    result: LensResult,
    row: int | None = None,
    target: Any = None,
    picture: Any = None,
    box: patches.Box | None = None,
    title: str | None = None,
    image: int = 0,
    tile: int | None = None,
    colors: tuple[style.Color, style.Color] | None = None,
) -> go.Figure:
    """One row's lens at its image patches: a panel per layer (at most nine), on one colour scale, laid over the picture where it is given.

    Args:
        result: a lens with places.
        row: which row.
        target: label, or else number, of the target shown (None: the first); of a lens by rank, the value of the highest column, whose name is
            written on the patch.
        picture: what the row shows, ``[height width 3]`` or a PIL image.
        box: an object, (left, top, right, bottom) in pixels of the picture, or as shares of the image.
        title: by default the layer and patch where the value is highest.
        image: number of the image within the example, with ``tile`` where there are several.
        colors: of the lowest and the highest value.
    """
    from plotly.subplots import make_subplots

    row, shown = text.checked_row(result, row), _chosen_layers(result)
    name = html.escape(text.target_name(result, 0 if target is None else result.target(target)))
    grids = [result.patch_grid(layer, row, image, tile, target) for layer in shown]
    hovers = [_grid_words(result, layer, row, image, tile) for layer in shown]
    pixels = None if picture is None else patches.as_picture(picture)
    box = patches.as_shares(box, pixels)
    extent = extent_of(result.shares, result.places, row, image, tile)
    columns = len(shown) + (pixels is not None)
    headings = (["image"] if pixels is not None else []) + [text.layer_name(layer) for layer in shown]
    figure = make_subplots(rows=1, cols=columns, column_titles=headings, horizontal_spacing=0.012)
    if pixels is not None:
        patches.add_picture(figure, pixels, 1)
        patches.mark(figure, box, pixels.shape[0], pixels.shape[1], 1, 1)
    by_rank = "rank" in result.axes
    for column, (grid, words) in enumerate(zip(grids, hovers, strict=True), start=1 + (pixels is not None)):
        hover = [["highest: " + html.escape(", ".join(cell)) if cell else "" for cell in line] for line in words]
        first = [[html.escape(cell[0]) if cell else "" for cell in line] for line in words]
        writes = by_rank and grid.shape[1] * columns <= 40
        extra: dict[str, Any] = {"written": first} if writes else {}
        if pixels is None or by_rank:
            patches.add_map(figure, grid, 1, column, hover=hover, unit=text.unit(result), **extra)
            patches.mark(figure, box, grid.shape[0], grid.shape[1], 1, column, extent=extent)
        else:
            look: dict[str, Any] = {"opacity": 0.72, "hover": hover, "unit": text.unit(result)}
            patches.add_overlay(figure, pixels, grid, 1, column, extent=extent, **look)
            patches.mark(figure, box, pixels.shape[0], pixels.shape[1], 1, column)
    if title is None:
        others = len(result.axes.get("target", ())) - 1
        more = f"{others} other target{'s' if others > 1 else ''} (target=)" if others > 0 else ""
        title = _patch_finding(result, shown, grids, hovers, name) + style.which_row(row, text.n_rows(result), more)
    style.layout(figure, title, int(160 + 1060 / columns), margin={"l": 10, "r": 30, "t": 106, "b": 20})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_layout(coloraxis=_color_axis(grids, f"{text.short(name, 34)} ({text.unit(result)})", by_rank, colors))
    return figure


def _color_axis(
    grids: Sequence[torch.Tensor], name: str, opaque: bool, colors: tuple[style.Color, style.Color] | None
) -> dict[str, Any]:
    """One scale for all panels: from zero where nothing is below it, symmetric otherwise; ``opaque`` where words stand on the cells."""
    limit, signed = _limit(grids), any(bool((grid < 0).any()) for grid in grids)
    scale = style.diverging(*(colors or ())) if signed else _rising(colors)
    bar = {"title": {"text": name, "side": "right"}, "thickness": 12, "outlinewidth": 0}
    low = -limit if signed else 0.0
    return {"colorscale": style.legible(signed) if opaque else scale, "cmin": low, "cmax": limit, "colorbar": bar}


def layers(
    result: LensResult,
    rows: Sequence[int] | None = None,
    title: str | None = None,
    position: int | str | None = None,
    row: int | None = None,
) -> go.Figure:
    """Lines over layers, one per target: the pooled output's value, the mean over the examples of ``rows`` (all; or of one ``row``).

    Of a ``position`` instead: its number or name, or ``"last"``, the last of every row that is no padding. Of a lens of regions, without one: the
    first target, a line per region.
    """
    import plotly.graph_objects as go

    if row is not None and rows is not None:
        raise InputError("Give rows= or row=, not both.")
    chosen = rows if rows is not None else [row] if row is not None else range(text.n_rows(result))
    rows = [text.checked_row(result, one) for one in chosen]
    if "target" not in result.axes:
        raise InputError("Lines over layers show targets; read the lens with targets=.")
    if position is None and _is_named(result):
        target, regions = text.target_name(result, 0), result.axes["position"]
        by_region = dataclasses.replace(
            result,
            values=result.values[..., :1].transpose(-1, -2),
            axes={**result.axes, "position": ["mean"], "target": regions},
            names={},
            words=[],
        )
        return layers(
            by_region,
            rows,
            title or f"{html.escape(target)} by layer, read at {html.escape(' and '.join(regions))}",
            "mean",
        )
    if position is None and not result.pooled.numel():
        raise InputError("This read-out does not pool; say which position= the lines show.")
    at = None if position is None else [text.place_of(result, position, one) for one in rows]
    values = result.pooled[..., rows] if at is None else result.values[:, at, :, rows].movedim(0, -1)
    labels = next(iter(result.axes.values()))
    figure = go.Figure()
    shown = [result.axes["example"][one] for one in rows]
    drawn = Result(values, {"layer": labels, "target": result.axes["target"], "example": shown})
    mean = drawn.mean()
    for index, name in enumerate(result.axes["target"]):
        color = PALETTE[index % len(PALETTE)]
        figure.add_trace(
            go.Scatter(
                x=[text.layer_name(label) for label in labels],
                y=mean[:, index].tolist(),
                name=html.escape(text.target_name(result, index)),
                mode="lines+markers",
                line={"width": 3, "color": color},
                marker={"size": 7},
                hovertemplate=f"{html.escape(str(name))}, %{{x}}: %{{y:.3g}}<extra></extra>",
            )
        )
    if title is None:
        title = _lines_where(result, rows, at, position) + _lines_finding(result, mean, drawn)
        if text.n_rows(result) > 1:
            over = (
                f"mean of {len(drawn.examples)} examples"
                if len(rows) > 1
                else f"row {rows[0]} of {text.n_rows(result)}"
            )
            title += f"<br><span style='font-size:12px'>{over} (row= or rows= show others)</span>"
    style.layout(figure, title, 388, margin={"l": 60, "r": 20, "t": 68, "b": 60})
    figure.update_yaxes(
        title=f"{text.unit(result)} ({result.norm} norm)", gridcolor=style.FAINT, zerolinecolor=style.FAINT
    )
    figure.update_xaxes(showgrid=False, type="category")
    return figure


def _lines_where(result: LensResult, rows: Sequence[int], at: Sequence[int] | None, position: int | str | None) -> str:
    """Which position the lines are of, in front of what they say; nothing for the pooled output."""
    if at is None:
        return ""
    words = {text.plain(result.words[row][one]) if result.words else "" for row, one in zip(rows, at, strict=True)}
    word = words.pop() if len(words) == 1 else ""
    named = f"the {position} position" if isinstance(position, str) else f"position {position}"
    return f"At {html.escape(repr(word)) if word else named}, "


def _lines_finding(result: LensResult, mean: torch.Tensor, drawn: Result) -> str:
    """Which target leads from which layer on; of a single target, where it is lowest and highest."""
    labels, finite = next(iter(result.axes.values())), torch.isfinite(mean)
    last = text.layer_name(labels[-1])
    if not bool(finite.any()):
        return f"{result.tower}: no finite value at any layer"
    if mean.shape[1] == 1:
        line, name = mean[:, 0], html.escape(text.target_name(result, 0))
        low, high = int(line.nan_to_num(float("inf")).argmin()), int(line.nan_to_num(-float("inf")).argmax())
        if float(line[low]) == float(line[high]):
            return f"{name} is {text.number(line[low])} at every layer"
        ends = [f"{text.number(line[at])} at {text.layer_name(labels[at])}" for at in (low, high)]
        return f"{name}: from {ends[0]} to {ends[1]}"
    ranked = mean.where(finite, -float("inf"))
    best = int(ranked[-1].argmax())
    if not bool(finite[-1].any()):
        return f"{result.tower}: no finite value at {last}"
    if int((ranked[-1] == ranked[-1, best]).sum()) > 1:
        return f"{result.tower}: no target leads at {last}"
    told = findings.leads(drawn, result.measure)
    if not told.holds:
        return f"{result.tower}: {html.escape(text.target_name(result, best))} is first at {last}, by no more than {told.amount}"
    leads = (ranked.argmax(-1) == best) & finite[:, best]
    since = labels[len(labels) - int(leads.int().flip(0).cumprod(0).sum())]
    return f"{html.escape(text.target_name(result, best))} leads from {text.layer_name(since)} on"


def _rising(colors: tuple[style.Color, style.Color] | None) -> list[list[float | str]]:
    red, green, blue = (colors or ((33, 87, 190), (208, 63, 8)))[1]
    return [[where, f"rgba({red},{green},{blue},{alpha})"] for where, alpha in ((0.0, 0.03), (0.5, 0.5), (1.0, 1.0))]


def _chosen_layers(result: LensResult) -> list[Any]:
    labels = next(iter(result.axes.values()))
    if len(labels) <= _MOST_PANELS:
        return labels
    return [labels[round(i * (len(labels) - 1) / (_MOST_PANELS - 1))] for i in range(_MOST_PANELS)]


def _grid_words(result: LensResult, layer: Any, row: int, image: int, tile: int | None) -> list[list[list[str]]]:
    """The names of the highest columns of every patch of the grid."""
    from circuitvision.readout.patch_coords import on_grid

    places = result.places[row]
    where = on_grid(torch.arange(places.shape[0], dtype=torch.float64), places, image, tile)
    if not result.ids.numel():
        return [[[] for _ in line] for line in where.tolist()]
    index = result.index(layer)
    return [
        [[] if at != at else text.highest(result, index, row, int(at)) for at in line]  # NaN: no position there
        for line in where.tolist()
    ]


def _limit(grids: Sequence[torch.Tensor]) -> float:
    values = torch.cat([grid.float().flatten() for grid in grids]).abs()
    values = values[torch.isfinite(values)]
    return (float(values.quantile(0.995)) if values.numel() else 0.0) or 1.0


def _patch_finding(
    result: LensResult,
    shown: Sequence[Any],
    grids: Sequence[torch.Tensor],
    words: Sequence[list[list[list[str]]]],
    name: str,
) -> str:
    """Where the value is highest, and of a lens by rank what is said there; ``name`` is escaped."""
    stacked = torch.stack([grid.where(torch.isfinite(grid), -float("inf")) for grid in grids])
    finite = stacked[torch.isfinite(stacked)]
    if not finite.numel():
        return f"{result.tower}: {name} has no finite value at these patches"
    if finite.numel() > 1 and float(finite.min()) == float(finite.max()):
        return f"{result.tower}: {name} is {text.number(finite[0])} at every patch"
    layer, cell = divmod(int(stacked.flatten(1).argmax()), stacked[0].numel())
    place = divmod(cell, stacked.shape[2])
    where = f"{text.layer_name(shown[layer])}, patch row {place[0]}, column {place[1]}"
    if "rank" not in result.axes:
        return f"{text.tower_and_pass(result)}: {name} is strongest at {where}"
    there = words[layer][place[0]][place[1]]
    surest = f"ranks {html.escape(there[0])!r} first, highest" if there else "is highest"
    return f"{text.tower_and_pass(result)} {surest} at {where}"
