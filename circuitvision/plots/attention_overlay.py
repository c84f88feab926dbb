"""Attention laid over the picture: a map per head behind a slider, beside a grid of all heads; contrasts with their regions; rollouts.

Colours go from nothing to the largest value of the map that is shown, so maps of different heads cannot be compared by colour: the grid beside
the picture says how much of each head's attention the image, or the box, gets. A blue outline is the object's box or the query's patch.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.plots import patches, style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.attention.maps import AttentionMaps, Box
    from circuitvision.readout.attention.regions import AttentionContrast
    from circuitvision.readout.attention.rollout import AttentionRollout

_MOST_STEPS = 144
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


def overlay(
    result: AttentionMaps,
    picture: Any = None,
    box: Box | None = None,
    title: str | None = None,
    *,
    row: int = 0,
    image: int = 0,
    tile: int | None = None,
    step: int | None = None,
) -> go.Figure:
    """One row's attention over the image, with a slider over layers and heads that opens at the head with the most attention in the box (or image).

    Args:
        result: maps of one query.
        picture: what the row shows, ``[height width 3]`` of whole numbers 0 … 255 or a PIL image of any size; None: the map alone.
        box: an object, (left, top, right, bottom) in the frame of the maps' boxes or as shares of the map; also sets what the grid of heads
        shows. row: the row, and with ``image`` and ``tile`` the map of it, that is drawn. step: number of the pass, as in ``axes["step"]``;
        None: the first of those kept.

    Of an image in several tiles shares are of the tile that is drawn; of a box, with ``tile=None``, those of all tiles that show it.

    The query is outlined where it is a patch of this image. Of more than 144 heads, the strongest are behind the slider.
    """
    from plotly.subplots import make_subplots

    layers, heads = result.axes["layer"], result.axes["head"]
    grids = torch.stack(
        [torch.stack([result.grid(layer, head, row, image, tile, step) for head in heads]) for layer in layers]
    ).double()
    if box is not None and max(box) <= 1.0:
        box = _of_shares(_frame(result.places, result.boxes, row, image, tile), box)
    strength, what = _strength(result, box, row, image, tile, step)
    tile = _tile(result, row, image, tile)
    beside = len(heads) > 1
    figure = make_subplots(rows=1, cols=2 if beside else 1, column_widths=[0.56, 0.44] if beside else None,
                           horizontal_spacing=0.12)  # fmt: skip
    shown = _shown(strength)
    opened = max(shown, key=lambda at: float(strength[at].nan_to_num(-math.inf)))
    signed = result.measure == "difference"
    pixels = None if picture is None else patches.as_picture(picture)
    _add_base(figure, pixels, grids[opened], signed)
    frame = _frame(result.places, result.boxes, row, image, tile)
    height, width = grids.shape[-2:] if pixels is None else pixels.shape[:2]
    _outline(figure, frame, box, height, width)
    _mark_query(figure, result, row, image, tile, (height, width), grids.shape[-2:])
    if beside:
        top = float(strength.abs().nan_to_num(0.0).max())
        heads_panel(figure, strength, result.axes, 2, top, as_share=True, local=True, signed=signed)
        figure.add_shape(type="rect", line={"width": 3, "color": style.AGAINST}, **_around(opened), row=1, col=2)
        measure = "above the mean head" if signed else "of attention"
        figure.update_xaxes(title=f"head (share {measure} in {what})", row=1, col=2)
    figure.update_layout(sliders=[_slider(result, figure, grids, strength, shown, opened, what, title, signed)])
    heading = title or _heading(result, opened, strength, what)
    style.layout(figure, heading, 580, margin={"l": 20, "r": 30, "t": 90, "b": 130}, showlegend=False)
    figure.update_xaxes(visible=False, row=1, col=1)
    figure.update_yaxes(visible=False, row=1, col=1)
    return figure


def rollout(result: AttentionRollout, query: Any = None, title: str | None = None, **options: Any) -> go.Figure:
    """The rollout of one query over the image, with a slider over layers; None takes "cls" where there is one, else "last".

    ``options`` are those of :func:`overlay`.
    """
    if query is None:
        query = "cls" if any("cls" in kinds for kinds in result.kinds) else "last"
    return overlay(result.of(query), title=title, **options)


def contrast(
    result: AttentionContrast,
    picture: Any = None,
    box: Box | None = None,
    title: str | None = None,
    *,
    row: int = 0,
    image: int = 0,
    tile: int | None = None,
    top_percent: float = 20.0,
    count: int = 3,
) -> go.Figure:
    """The contrast of two queries over the image, with the boxes of its strongest regions (numbered, orange) and an object's box (blue).

    Arguments as for :func:`overlay` and :meth:`AttentionContrast.regions`.
    """
    from plotly.subplots import make_subplots

    grid = result.grid(row, image, tile).double()
    figure = make_subplots(rows=1, cols=1)
    pixels = None if picture is None else patches.as_picture(picture)
    _add_base(figure, pixels, grid, signed=False, as_share=False)
    frame = _frame(result.places, result.boxes, row, image, tile)
    height, width = grid.shape if pixels is None else pixels.shape[:2]
    _outline(figure, frame, box, height, width)
    for number, region in enumerate(result.regions(top_percent, count, row=row, image=image, tile=tile), start=1):
        _outline(figure, frame, region.box, height, width, style.FOR)
        left, top, _, _ = _shares(frame, region.box)
        figure.add_annotation(
            x=left * width - 0.5, y=top * height - 0.5, xanchor="left", yanchor="top", text=f"{number}", showarrow=False,
            font={"color": "#ffffff", "size": 13}, bgcolor=style.FOR, borderpad=2, row=1, col=1,
        )  # fmt: skip
    finite = grid[torch.isfinite(grid)]
    if title is None and finite.numel():
        r, c = divmod(int(grid.nan_to_num(-math.inf).argmax()), grid.shape[1])
        title = (
            f"The question adds most attention at patch row {r}, column {c}<br><span style='font-size:12px'>contrast "
            f"{finite.max():.2g} there, median {finite.median():.2g}; λ = {result.lam:.2g}</span>"
        )
    style.layout(figure, title or "No patch has a contrast", 540, margin={"l": 20, "r": 20, "t": 90, "b": 20})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


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
) -> None:
    """A grid of layers × heads in one panel, labelled where there is room; on the shared ``coloraxis``, or with colours of its own (``local``)."""
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
            **colors,
        ),
        row=1,
        col=column,
    )
    if layers * heads <= _MOST_LABELLED and heads * panels <= 32:
        for layer in range(layers):
            for head in range(heads):
                value = float(grid[layer, head])
                label = "–" if value != value else style.signed_percent(value) if as_share else f"{value:.1f}"
                strong = abs(value) > 0.45 * top
                figure.add_annotation(
                    x=head, y=layer, text=label, showarrow=False, row=1, col=column,
                    font={"size": 12, "color": "#ffffff"} if strong else {"size": 12},
                )  # fmt: skip
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


def _add_base(
    figure: go.Figure, picture: np.ndarray[Any, Any] | None, grid: Tensor, signed: bool, as_share: bool = True
) -> None:
    """Picture (where given) and map in the first panel; the map is the last trace."""
    values = grid.numpy()
    bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0, "x": -0.02, "xanchor": "right", "len": 0.8}
    if as_share:
        bar["tickformat"] = ".2~%"
    options: dict[str, Any] = {
        "colorscale": style.diverging() if signed else sequential(over_picture=picture is not None),
        **_range(grid, signed),
        "number": ".2%" if as_share else ".3g",
        "colorbar": bar,
    }
    if picture is None:
        patches.add_map(figure, values, 1, 1, **options)
    else:
        patches.add_overlay(figure, picture, values, 1, 1, opacity=0.55, **options)


def _range(grid: Tensor, signed: bool) -> dict[str, float]:
    top = max(float(grid.abs().nan_to_num(0.0).max()), 1e-9)
    return {"zmin": -top if signed else 0.0, "zmax": top}


def _tile(result: AttentionMaps, row: int, image: int, tile: int | None) -> int:
    """The tile that is drawn: the first of the image, unless another one is named."""
    if tile is not None:
        return tile
    number = result.axes["row"].index(row)
    return int(result.places[number, result.patches(image)[number], 1].min())


def _strength(
    result: AttentionMaps, box: Box | None, row: int, image: int, tile: int | None, step: int | None
) -> tuple[Tensor, str]:
    """How much of each head's attention the box, the image or the tile that is drawn gets, ``[layer head]``, and what that is in words."""
    number = result.axes["row"].index(row)
    tiles = result.places[number, :, 1]
    inside = result.patches(image)[number]
    several = len(set(tiles[inside].tolist())) > 1
    shown = _tile(result, row, image, tile)
    if box is not None:
        inside, what = result.keys(tuple(box), image)[number], "the box"
    else:
        what = "this image"
    if several and (box is None or tile is not None):
        inside = inside & (tiles == shown)
        what = f"{'the box in ' if box is not None else ''}tile {shown} of this image"
    return result.pass_values(step)[:, :, number].double()[..., inside].sum(-1), what


def _shown(strength: Tensor) -> list[tuple[int, int]]:
    heads = strength.shape[1]
    order = strength.abs().nan_to_num(0.0).flatten().argsort(descending=True, stable=True)[:_MOST_STEPS]
    return [divmod(index, heads) for index in sorted(order.tolist())]


def _slider(
    result: AttentionMaps,
    figure: go.Figure,
    grids: Tensor,
    strength: Tensor,
    shown: Sequence[tuple[int, int]],
    opened: tuple[int, int],
    what: str,
    title: str | None,
    signed: bool,
) -> dict[str, Any]:
    trace = next(number for number, found in enumerate(figure.data) if found.type == "heatmap")
    outline = len(figure.layout.shapes) - 1
    steps = []
    for at in shown:
        grid = grids[at]
        values = [[None if value != value else value for value in line] for line in grid.tolist()]
        data = {"z": [values], **{name: [value] for name, value in _range(grid, signed).items()}}
        layout: dict[str, Any] = {} if title else {"title.text": _heading(result, at, strength, what)}
        if len(result.axes["head"]) > 1:
            layout.update({f"shapes[{outline}].{side}": value for side, value in _around(at).items()})
        steps.append({"method": "update", "label": _label(result, at), "args": [data, layout, [trace]]})
    return {
        "active": list(shown).index(opened),
        "steps": steps,
        "currentvalue": {"visible": False},
        "pad": {"t": 58, "b": 0},
        "font": {"size": 11 if len(steps) <= 24 else 1},
        "minorticklen": 0,
    }


def _label(result: AttentionMaps, at: tuple[int, int]) -> str:
    layer, head = result.axes["layer"][at[0]], result.axes["head"][at[1]]
    return f"L{layer}H{head}" if len(result.axes["head"]) > 1 else f"layer {layer}"


def _heading(result: AttentionMaps, at: tuple[int, int], strength: Tensor, what: str) -> str:
    layer, head = result.axes["layer"][at[0]], result.axes["head"][at[1]]
    share = float(strength[at])
    query = "" if result.query in ("", "default") else f"; query: {escaped(result.query)}"
    if math.isnan(share):
        return f"This row has no attention to show: no query of it counts{query}"
    if result.measure == "rollout":
        return (
            f"Rolled out to layer {layer}, {percent(share)} comes from {what}"
            f"<br><span style='font-size:12px'>{result.tower} tower{query}</span>"
        )
    where = f"{result.tower} layer {layer} head {head}"
    if result.measure == "difference":
        said = f"{where} gives {what} {percent(abs(share))} {'more' if share >= 0 else 'less'} attention than the mean head"
    else:
        said = f"{where} gives {percent(share)} of its attention to {what}"
    return f"{said}<br><span style='font-size:12px'>move the slider for other heads{query}</span>"


def _around(at: tuple[int, int]) -> dict[str, float]:
    layer, head = at
    return {"x0": head - 0.5, "x1": head + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}


def _frame(places: Tensor, boxes: Tensor, row: int, image: int, tile: int | None) -> Box:
    """The pixels that the drawn map covers."""
    here = (places[row, :, 0] == image) & (places[row, :, 2] >= 0)
    here &= places[row, :, 1] == (int(places[row, here, 1].min()) if tile is None else tile)
    left, top = boxes[row, here, :2].amin(0).tolist()
    right, bottom = boxes[row, here, 2:].amax(0).tolist()
    return left, top, right, bottom


def _of_shares(frame: Box, box: Box) -> Box:
    """A box given as shares of the drawn map, in its pixels."""
    left, top, right, bottom = frame
    across, down = right - left, bottom - top
    return left + box[0] * across, top + box[1] * down, left + box[2] * across, top + box[3] * down


def _shares(frame: Box, box: Box) -> Box:
    left, top, right, bottom = frame
    across, down = right - left, bottom - top
    return (box[0] - left) / across, (box[1] - top) / down, (box[2] - left) / across, (box[3] - top) / down


def _outline(
    figure: go.Figure, frame: Box, box: Box | None, height: int, width: int, color: str = style.AGAINST
) -> None:
    if box is not None:
        patches.mark(figure, _shares(frame, box), height, width, 1, 1, color)


def _mark_query(
    figure: go.Figure,
    result: AttentionMaps,
    row: int,
    image: int,
    tile: int,
    size: tuple[int, int],
    grid: Sequence[int],
) -> None:
    place = result.query_places[result.axes["row"].index(row)].tolist()
    if place[2] < 0 or place[0] != image or place[1] != tile:
        return
    rows, columns = grid
    left, top = place[3] / columns, place[2] / rows
    corners = (left, top, left + 1 / columns, top + 1 / rows)
    patches.mark(figure, corners, size[0], size[1], 1, 1, style.AGAINST)
    figure.add_annotation(
        x=(left + 0.5 / columns) * size[1] - 0.5, y=(top + 0.5 / rows) * size[0] - 0.5, text="query", showarrow=False,
        font={"color": "#ffffff", "size": 12}, bgcolor=style.AGAINST, borderpad=2, row=1, col=1,
    )  # fmt: skip
