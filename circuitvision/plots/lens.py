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
        InputError: no such view or row, one that needs what the lens does not hold, or a lens with heads.
    """
    row = _row(result, keywords.get("row"))
    if view is None:
        placed = result.places.ndim == 3 and bool((result.places[row][:, 2] >= 0).any())
        view = "patches" if placed else "layers" if result.pooled.numel() else "table"
    if view not in _VIEWS:
        raise InputError(f"Unknown view {view!r}; choose one of {', '.join(_VIEWS)}.")
    views: dict[str, Any] = {"patches": over_image, "table": table, "layers": layers}
    return views[view](result, **keywords)


def over_image(
    result: LensResult,
    row: int = 0,
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

    row, shown = _row(result, row), _chosen_layers(result)
    name = html.escape(_target_name(result, 0 if target is None else result.target(target)))
    grids = [result.patch_grid(layer, row, image, tile, target) for layer in shown]
    hovers = [_grid_words(result, layer, row, image, tile) for layer in shown]
    pixels = None if picture is None else patches.as_picture(picture)
    box = patches.as_shares(box, pixels)
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
    if title is None:
        title = _patch_finding(result, shown, grids, name)
    style.layout(figure, title, int(150 + 1060 / columns), margin={"l": 10, "r": 30, "t": 96, "b": 20})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    bar = {
        "title": {"text": f"{_short(name, 34)} ({_unit(result)})", "side": "right"},
        "thickness": 12,
        "outlinewidth": 0,
    }
    signed = any(bool((grid < 0).any()) for grid in grids)
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
        target: label, or else number, of the target that colours the cells; of a lens by rank, the highest column's value does.
        title: by default from which layer on the last position says what the last layer says.
    """
    import plotly.graph_objects as go

    row, numbers = _row(result, row), result.axes["position"]
    chosen = _columns(result, row) if positions is None else [numbers.index(position) for position in positions]
    index = 0 if target is None else result.target(target)
    values = result.values[:, row][:, chosen][..., index].float()
    names = np.array([[_highest(result, layer, row, at)[0] for at in chosen] for layer in range(len(values))])
    hover = [
        [html.escape(", ".join(_highest(result, layer, row, at))) for at in chosen] for layer in range(len(values))
    ]
    labels = next(iter(result.axes.values()))
    signed = bool((values < 0).any())
    limit = float(values[torch.isfinite(values)].abs().max()) if bool(torch.isfinite(values).any()) else 0.0
    limit = limit or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values.numpy(),
            x=list(range(len(chosen))),
            y=[_layer_name(label) for label in labels],
            text=[[html.escape(_short(cell)) for cell in line] for line in _cells(result, names, values)],
            texttemplate="%{text}",
            customdata=hover,
            hovertemplate="%{y}, position %{x}<br>highest: %{customdata}<br>%{z:.3g}<extra></extra>",
            colorscale=style.legible(signed),
            zmin=-limit if signed else 0,
            zmax=limit,
            xgap=2,
            ygap=2,
            colorbar={
                "title": {
                    "text": f"{html.escape(_short(_target_name(result, index), 34))} ({_unit(result)})",
                    "side": "right",
                },
                "thickness": 12,
                "outlinewidth": 0,
            },
        )
    )
    said = bool(torch.isfinite(values[-1, -1]))
    style.layout(figure, title or _table_finding(names, labels, result, row, chosen, said), 150 + 34 * len(labels))
    words = result.words[row] if result.words else [""] * len(numbers)
    ticks = [html.escape(_plain(words[at])) or str(numbers[at]) for at in chosen]
    figure.update_xaxes(
        tickvals=list(range(len(chosen))), ticktext=ticks, showgrid=False, zeroline=False, side="bottom"
    )
    figure.update_yaxes(showgrid=False, zeroline=False)
    return figure


def layers(
    result: LensResult,
    rows: Sequence[int] | None = None,
    title: str | None = None,
    position: int | None = None,
    row: int | None = None,
) -> go.Figure:
    """Lines over layers, one per target: the pooled output's value (or a position's), the mean over ``rows`` (all; or of one ``row``)."""
    import plotly.graph_objects as go

    if row is not None and rows is not None:
        raise InputError("Give rows= or row=, not both.")
    rows = [
        _row(result, one)
        for one in (rows if rows is not None else [row] if row is not None else range(_n_rows(result)))
    ]
    if "target" not in result.axes:
        raise InputError("Lines over layers show targets; read the lens with targets=.")
    if position is None and not result.pooled.numel():
        raise InputError("This read-out does not pool; say which position= the lines show.")
    if position is not None and position not in result.axes["position"]:
        raise InputError(f"There is no position {position!r}; this lens has {result.axes['position']}.")
    values = result.pooled if position is None else result.values[:, :, result.axes["position"].index(position)]
    values = values.double()[:, rows]
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
    style.layout(figure, title or _lines_finding(result, mean), 380, margin={"l": 60, "r": 20, "t": 60, "b": 60})
    figure.update_yaxes(
        title=f"{result.measure} ({result.norm} norm)", gridcolor=style.FAINT, zerolinecolor=style.FAINT
    )
    figure.update_xaxes(showgrid=False, type="category")
    return figure


def _lines_finding(result: LensResult, mean: torch.Tensor) -> str:
    """Which target leads from which layer on; of a single target, where it is lowest and highest."""
    labels, finite = next(iter(result.axes.values())), torch.isfinite(mean)
    last = _layer_name(labels[-1])
    if not bool(finite.any()):
        return f"{result.tower}: no finite value at any layer"
    if mean.shape[1] == 1:
        line, name = mean[:, 0], html.escape(_target_name(result, 0))
        low, high = int(line.nan_to_num(float("inf")).argmin()), int(line.nan_to_num(-float("inf")).argmax())
        if float(line[low]) == float(line[high]):
            return f"{name} is {_value(line[low])} at every layer"
        return f"{name}: from {_value(line[low])} at {_layer_name(labels[low])} to {_value(line[high])} at {_layer_name(labels[high])}"
    ranked = mean.where(finite, -float("inf"))
    best = int(ranked[-1].argmax())
    if not bool(finite[-1].any()):
        return f"{result.tower}: no finite value at {last}"
    if int((ranked[-1] == ranked[-1, best]).sum()) > 1:
        return f"{result.tower}: no target leads at {last}"
    leads = (ranked.argmax(-1) == best) & finite[:, best]
    since = labels[len(labels) - int(leads.int().flip(0).cumprod(0).sum())]
    return f"{html.escape(_target_name(result, best))} leads from {_layer_name(since)} on"


def _value(value: Any) -> str:
    return f"{float(value):.3g}".replace("-", "\N{MINUS SIGN}")


def _n_rows(result: LensResult) -> int:
    return len(result.axes["row"])


def _row(result: LensResult, row: int | None) -> int:
    """The number of a row (None: the first).

    Raises:
        InputError: there is no such row, or the lens has heads, which no view shows.
    """
    if "head" in result.axes:
        raise InputError("Figures of a lens show one value per layer and position; read it at a site without heads.")
    row = 0 if row is None else row
    if row not in range(_n_rows(result)):
        raise InputError(f"There is no row {row}; this lens has {_n_rows(result)}, counted from 0.")
    return row


def _rising(colors: tuple[style.Color, style.Color] | None) -> list[list[float | str]]:
    red, green, blue = (colors or ((33, 87, 190), (208, 63, 8)))[1]
    return [[where, f"rgba({red},{green},{blue},{alpha})"] for where, alpha in ((0.0, 0.03), (0.5, 0.5), (1.0, 1.0))]


def _layer_name(layer: Any) -> str:
    return f"layer {layer}" if isinstance(layer, int) else str(layer)


def _unit(result: LensResult) -> str:
    return "model units" if result.columns == "actions" else result.measure


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _where(result: LensResult) -> str:
    """The tower, and which pass of it."""
    return result.tower if result.step is None else f"{result.tower}, pass {result.step}"


def _plain(piece: str) -> str:
    return piece.replace("▁", "").replace("Ġ", "").replace("</w>", "").replace("\n", "⏎")


def _target_name(result: LensResult, index: int) -> str:
    if "target" not in result.axes:
        return "highest" if index == 0 else f"rank {result.axes['rank'][index]}"
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
    """Where the value is highest; ``name`` is escaped."""
    stacked = torch.stack([grid.where(torch.isfinite(grid), -float("inf")) for grid in grids])
    finite = stacked[torch.isfinite(stacked)]
    if not finite.numel():
        return f"{result.tower}: {name} has no finite value at these patches"
    if finite.numel() > 1 and float(finite.min()) == float(finite.max()):
        return f"{result.tower}: {name} is {_value(finite[0])} at every patch"
    layer, cell = divmod(int(stacked.flatten(1).argmax()), stacked[0].numel())
    place = divmod(cell, stacked.shape[2])
    said = f"{name} is strongest" if name != "highest" else "The surest patch"
    return f"{_where(result)}: {said} at {_layer_name(shown[layer])}, patch row {place[0]}, column {place[1]}"


def _table_finding(
    names: np.ndarray, labels: Sequence[Any], result: LensResult, row: int, chosen: Sequence[int], said: bool
) -> str:
    read = _read_position(result, row, chosen)
    last = names[:, read]
    same = np.flip(np.cumprod(np.flip(last == last[-1]))).astype(bool)
    since = labels[int(np.argmax(same))]
    where = html.escape(_plain(result.words[row][chosen[read]])) if result.words else ""
    where = where or f"position {result.axes['position'][chosen[read]]}"
    if result.columns == "actions":
        return f"What the {_where(result)} tower says in action dimensions, layer by layer: {_target_name(result, 0)}"
    if not said:
        return f"At {where!r} the {_where(result)} tower has no finite value at {_layer_name(labels[-1])}"
    return f"At {where!r} the {_where(result)} tower says {html.escape(str(last[-1]))!r} from {_layer_name(since)} on"


def _read_position(result: LensResult, row: int, chosen: Sequence[int]) -> int:
    """The column of the table that a reader looks at first: the class token where there is one, else the last."""
    kinds = result.kinds[row] if result.kinds else []
    return next((column for column, at in enumerate(chosen) if kinds and kinds[at] == "cls"), len(chosen) - 1)


def _cells(result: LensResult, names: np.ndarray, values: torch.Tensor) -> list[list[str]]:
    """What stands in the cells: the highest column, or the value itself where columns are no alternatives."""
    if result.columns == "actions":
        return [[_value(value) for value in line] for line in values]
    return names.tolist()


def _columns(result: LensResult, row: int) -> list[int]:
    """Positions with words, or else all, but for padding; the last of them where there are many."""
    kinds = result.kinds[row] if result.kinds else [""] * len(result.axes["position"])
    text = [at for at, kind in enumerate(kinds) if kind == "text"]
    there = text or [at for at, kind in enumerate(kinds) if kind != "padding"]
    first = [at for at in there if kinds[at] == "cls"][:1]
    return [*first, *[at for at in there if at not in first][-(_MOST_COLUMNS - len(first)) :]]
