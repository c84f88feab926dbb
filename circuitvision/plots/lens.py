"""Three views of a lens: layers × patches laid over the image, a table of layers × tokens, and lines of what the pooled output says layer by layer.

``lens(result)`` chooses: patches where the row has any, lines where the output is pooled and no patch is placed, the table otherwise. Hovering
over a cell names the highest columns there. Values are those of the result; nothing is read again.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from circuitvision.errors import InputError
from circuitvision.plots import patches, style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.lens.result import LensResult

_MOST_PANELS = 9
_MOST_COLUMNS = 24
_VIEWS = ("patches", "table", "layers")
PALETTE = ("#d9480f", "#2f6fdb", "#2b8a3e", "#9c36b5", "#b8860b", "#0b7285", "#c2255c", "#5f6368")


def lens(result: LensResult, view: str | None = None, **keywords: Any) -> go.Figure:
    """A figure of one lens: ``view`` is "patches", "table" or "layers" (see the functions of these names for keywords).

    Raises:
        InputError: no such view, or one that needs what the lens does not hold.
    """
    if view is None:
        row = keywords.get("row", 0)
        placed = result.places.ndim == 3 and bool((result.places[row][:, 2] >= 0).any())
        view = "patches" if placed else "layers" if result.pooled.numel() else "table"
    if view not in _VIEWS:
        raise InputError(f"Unknown view {view!r}; choose one of {', '.join(_VIEWS)}.")
    views: dict[str, Any] = {"patches": over_image, "table": table, "layers": layers}
    return views[view](result, **keywords)


def over_image(
    result: LensResult,
    row: int = 0,
    target: Any = 0,
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
        target: number or label of the target shown; of a lens by rank, the value of the highest column, whose name is written on the patch.
        picture: what the row shows, ``[height width 3]`` or a PIL image.
        box: an object, (left, top, right, bottom) as shares of the image.
        title: by default the layer and patch where the value is highest.
        image: number of the image within the example, with ``tile`` where there are several.
        colors: of the lowest and the highest value.
    """
    from plotly.subplots import make_subplots

    shown = _chosen_layers(result)
    index = target if isinstance(target, int) else result.target(target)
    grids = [result.patch_grid(layer, row, image, tile, index) for layer in shown]
    hovers = [_grid_words(result, layer, row, image, tile) for layer in shown]
    pixels = None if picture is None else np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    columns = len(shown) + (pixels is not None)
    headings = (["image"] if pixels is not None else []) + [_layer_name(layer) for layer in shown]
    figure = make_subplots(rows=1, cols=columns, column_titles=headings, horizontal_spacing=0.012)
    if pixels is not None:
        patches.add_picture(figure, pixels, 1)
        patches.mark(figure, box, pixels.shape[0], pixels.shape[1], 1, 1)
    limit = _limit(grids)
    by_rank = "rank" in result.axes
    for column, (grid, words) in enumerate(zip(grids, hovers, strict=True), start=1 + (pixels is not None)):
        hover = [["highest: " + html.escape(", ".join(cell)) if cell else "" for cell in line] for line in words]
        first = [[html.escape(cell[0]) if cell else "" for cell in line] for line in words]
        writes = by_rank and grid.shape[1] * columns <= 40
        extra: dict[str, Any] = {"written": first} if writes else {}
        if pixels is None or by_rank:
            patches.add_map(figure, grid, 1, column, hover=hover, unit=_unit(result), **extra)
            patches.mark(figure, box, grid.shape[0], grid.shape[1], 1, column)
        else:
            patches.add_overlay(figure, pixels, grid, 1, column, opacity=0.72, hover=hover, unit=_unit(result))
            patches.mark(figure, box, pixels.shape[0], pixels.shape[1], 1, column)
    name = _target_name(result, index)
    if title is None:
        title = _patch_finding(result, shown, grids, name)
    style.layout(figure, title, int(150 + 1060 / columns), margin={"l": 10, "r": 30, "t": 96, "b": 20})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    bar = {"title": {"text": f"{name} ({result.measure})", "side": "right"}, "thickness": 12, "outlinewidth": 0}
    signed = min(float(np.nanmin(grid)) for grid in grids) < 0
    scale = style.diverging(*(colors or ())) if signed else _rising(colors)
    scale = style.legible(signed) if by_rank else scale
    low = -limit if signed else 0.0
    figure.update_layout(coloraxis={"colorscale": scale, "cmin": low, "cmax": limit, "colorbar": bar})
    return figure


def table(
    result: LensResult,
    row: int = 0,
    positions: Sequence[int] | None = None,
    target: Any = None,
    title: str | None = None,
) -> go.Figure:
    """Layers × positions of one row; every cell names its highest column. Colour: its value, or a target's.

    Args:
        result: a lens over layers.
        row: which row.
        positions: numbers of the positions shown; by default text, then whatever there is, at most the last 24.
        target: number or label of the target that colours the cells; of a lens by rank, the highest column's value does.
        title: by default from which layer on the last position says what the last layer says.
    """
    import plotly.graph_objects as go

    if "head" in result.axes:
        raise InputError("The table shows layers by positions; read the lens at a site without heads.")
    numbers = result.axes["position"]
    chosen = _columns(result, row) if positions is None else [numbers.index(position) for position in positions]
    index = 0 if target is None else target if isinstance(target, int) else result.target(target)
    values = result.values[:, row][:, chosen][..., index].float()
    names = np.array([[_highest(result, layer, row, at)[0] for at in chosen] for layer in range(len(values))])
    hover = [
        [html.escape(", ".join(_highest(result, layer, row, at))) for at in chosen] for layer in range(len(values))
    ]
    labels = next(iter(result.axes.values()))
    signed = float(values.min()) < 0
    limit = float(values.abs().max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values.numpy(),
            x=list(range(len(chosen))),
            y=[_layer_name(label) for label in labels],
            text=[[html.escape(cell) for cell in line] for line in names],
            texttemplate="%{text}",
            customdata=hover,
            hovertemplate="%{y}, position %{x}<br>highest: %{customdata}<br>%{z:.3g}<extra></extra>",
            colorscale=style.legible(signed),
            zmin=-limit if signed else 0,
            zmax=limit,
            xgap=2,
            ygap=2,
            colorbar={
                "title": {"text": f"{_target_name(result, index)} ({result.measure})", "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
            },
        )
    )
    style.layout(figure, title or _table_finding(names, labels, result, row, chosen), 150 + 34 * len(labels))
    words = result.words[row] if result.words else [""] * len(numbers)
    ticks = [html.escape(_plain(words[at])) or str(numbers[at]) for at in chosen]
    figure.update_xaxes(
        tickvals=list(range(len(chosen))), ticktext=ticks, showgrid=False, zeroline=False, side="bottom"
    )
    figure.update_yaxes(showgrid=False, zeroline=False)
    return figure


def layers(
    result: LensResult, rows: Sequence[int] | None = None, title: str | None = None, position: int | None = None
) -> go.Figure:
    """Lines over layers, one per target: the pooled output's value (or a position's), the mean over rows."""
    import plotly.graph_objects as go

    if "target" not in result.axes or "head" in result.axes:
        raise InputError("Lines over layers show targets at sites without heads; read the lens with targets=.")
    if position is None and not result.pooled.numel():
        raise InputError("This read-out does not pool; say which position= the lines show.")
    values = result.pooled if position is None else result.values[:, :, result.axes["position"].index(position)]
    values = values.double() if rows is None else values.double()[:, list(rows)]
    labels = next(iter(result.axes.values()))
    figure = go.Figure()
    mean = values.mean(1)
    for index, name in enumerate(result.axes["target"]):
        color = PALETTE[index % len(PALETTE)]
        figure.add_trace(
            go.Scatter(
                x=[_layer_name(label) for label in labels],
                y=mean[:, index].tolist(),
                name=html.escape(_target_name(result, index)),
                mode="lines+markers",
                line={"width": 3, "color": color},
                marker={"size": 7},
                hovertemplate=f"{html.escape(str(name))}, %{{x}}: %{{y:.3g}}<extra></extra>",
            )
        )
    best = int(mean[-1].argmax())
    if title is None:
        ahead = (mean.argmax(-1) == best).int().flip(0).cumprod(0).sum()
        since = labels[len(labels) - int(ahead)]
        title = f"{html.escape(_target_name(result, best))} leads from {_layer_name(since)} on"
    style.layout(figure, title, 380, margin={"l": 60, "r": 20, "t": 60, "b": 60})
    figure.update_yaxes(
        title=f"{result.measure} ({result.norm} norm)", gridcolor=style.FAINT, zerolinecolor=style.FAINT
    )
    figure.update_xaxes(showgrid=False, type="category")
    return figure


def _rising(colors: tuple[style.Color, style.Color] | None) -> list[list[float | str]]:
    red, green, blue = (colors or ((33, 87, 190), (208, 63, 8)))[1]
    return [[where, f"rgba({red},{green},{blue},{alpha})"] for where, alpha in ((0.0, 0.03), (0.5, 0.5), (1.0, 1.0))]


def _layer_name(layer: Any) -> str:
    return f"layer {layer}" if isinstance(layer, int) else str(layer)


def _unit(result: LensResult) -> str:
    return result.measure


def _plain(piece: str) -> str:
    return piece.replace("▁", "").replace("Ġ", "").replace("</w>", "").replace("\n", "⏎")


def _target_name(result: LensResult, index: int) -> str:
    if "target" not in result.axes:
        return "highest"
    label = result.axes["target"][index]
    name = result.names.get(str(label), str(label)) if isinstance(label, int) else str(label)
    return name.replace(" - ", " \N{MINUS SIGN} ")


def _chosen_layers(result: LensResult) -> list[Any]:
    labels = next(iter(result.axes.values()))
    if len(labels) <= _MOST_PANELS:
        return labels
    return [labels[round(i * (len(labels) - 1) / (_MOST_PANELS - 1))] for i in range(_MOST_PANELS)]


def _highest(result: LensResult, layer: int, row: int, at: int) -> list[str]:
    return [_plain(result.names.get(str(int(number)), str(int(number)))) for number in result.ids[layer, row, at][:5]]


def _grid_words(result: LensResult, layer: Any, row: int, image: int, tile: int | None) -> list[list[list[str]]]:
    """The names of the highest columns of every patch of the grid."""
    from circuitvision.readout.places import on_grid

    places = result.places[row]
    where = on_grid(torch.arange(places.shape[0], dtype=torch.float64), places, image, tile)
    if not result.ids.numel():
        return [[[] for _ in line] for line in where.tolist()]
    index = result.index(layer)
    return [
        [[] if at != at else _highest(result, index, row, int(at)) for at in line]  # NaN: no position there
        for line in where.tolist()
    ]


def _limit(grids: Sequence[torch.Tensor]) -> float:
    values = torch.cat([grid.float().flatten() for grid in grids]).abs()
    values = values[torch.isfinite(values)]
    return (float(values.quantile(0.995)) if values.numel() else 0.0) or 1.0


def _patch_finding(result: LensResult, shown: Sequence[Any], grids: Sequence[torch.Tensor], name: str) -> str:
    stacked = torch.stack([grid.nan_to_num(-float("inf")) for grid in grids])
    layer, cell = divmod(int(stacked.flatten(1).argmax()), stacked[0].numel())
    place = divmod(cell, stacked.shape[2])
    said = f"{html.escape(name)} is strongest" if name != "highest" else "The surest patch"
    return f"{result.tower}: {said} at {_layer_name(shown[layer])}, patch row {place[0]}, column {place[1]}"


def _table_finding(
    names: np.ndarray, labels: Sequence[Any], result: LensResult, row: int, chosen: Sequence[int]
) -> str:
    last = names[:, -1]
    same = np.flip(np.cumprod(np.flip(last == last[-1]))).astype(bool)
    since = labels[int(np.argmax(same))]
    where = html.escape(_plain(result.words[row][chosen[-1]])) if result.words else ""
    where = where or f"position {result.axes['position'][chosen[-1]]}"
    return f"At {where!r} the {result.tower} tower says {html.escape(str(last[-1]))!r} from {_layer_name(since)} on"


def _columns(result: LensResult, row: int) -> list[int]:
    """Positions with words, or else all, but for padding; the last of them where there are many."""
    kinds = result.kinds[row] if result.kinds else [""] * len(result.axes["position"])
    text = [at for at, kind in enumerate(kinds) if kind == "text"]
    there = text or [at for at, kind in enumerate(kinds) if kind != "padding"]
    return there[-_MOST_COLUMNS:]
