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
from circuitvision.plots import _check_keywords, kit, patches, style
from circuitvision.plots import lens_text as text
from circuitvision.plots.lens_table import table
from circuitvision.readout.patch_coords import extent_of, on_grid
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.readout.lens.result import LensResult

_MOST_PANELS = 9
_VIEWS = ("patches", "table", "layers")


def lens(result: LensResult, view: str | None = None, **keywords: Any) -> kit.Figure:
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
) -> kit.Figure:
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
    row, shown = text.checked_row(result, row), text.layers(result, _MOST_PANELS)
    name = html.escape(text.target_name(result, 0 if target is None else result.target(target)))
    grids = [result.patch_grid(layer, row, image, tile, target) for layer in shown]
    words = [_grid_words(result, layer, row, image, tile) for layer in shown]
    pixels = None if picture is None else patches.as_picture(picture)
    box = patches.as_shares(box, pixels)
    extent = extent_of(result.shares, result.places, row, image, tile)
    headings = (["image"] if pixels is not None else []) + [kit.layer_name(layer) for layer in shown]
    figure = kit.panels(1, len(headings), column_titles=headings, horizontal_spacing=0.012)
    if pixels is not None:
        patches.add_picture(figure, pixels, 1)
        patches.mark(figure, box, pixels.shape[0], pixels.shape[1], 1, 1)
    by_rank = "rank" in result.axes
    limit, signed = kit.largest(*grids, robust=True), any(bool((grid < 0).any()) for grid in grids)
    low = -limit if signed else 0.0
    written = by_rank and grids[0].shape[1] * len(headings) <= 40
    scale = (
        style.legible(signed)
        if by_rank
        else style.diverging(*(colors or ()))
        if signed
        else style.sequential(True, *(colors or ())[1:])
    )
    for column, (grid, cells) in enumerate(zip(grids, words, strict=True), start=1 + (pixels is not None)):
        hover = [["highest: " + html.escape(", ".join(cell)) if cell else "" for cell in line] for line in cells]
        if pixels is None or by_rank:
            first = [[html.escape(cell[0]) if cell else "" for cell in line] for line in cells]
            patches.add_map(
                figure, grid, 1, column, hover=hover, unit=text.unit(result), text=first if written else None
            )
            if written:
                patches.add_words(figure, grid, first, scale, low, limit, 1, column)
            patches.mark(figure, box, grid.shape[0], grid.shape[1], 1, column, extent=extent)
        else:
            patches.add_overlay(
                figure, pixels, grid, 1, column, opacity=0.72, extent=extent, hover=hover, unit=text.unit(result)
            )
            patches.mark(figure, box, pixels.shape[0], pixels.shape[1], 1, column)
    if title is None:
        others = len(result.axes.get("target", ())) - 1
        more = f"{others} other target{'s' if others > 1 else ''} (target=)" if others > 0 else ""
        title = style.titled(
            _patch_found(result, shown, grids, words, name), style.which_row(row, text.n_rows(result)), more
        )
    style.layout(figure, title, int(40 + 720 / len(headings)), above=26, margin={"l": 10, "r": 30, "b": 20})
    kit.bare(figure, visible=False)
    bar = kit.color_bar(f"{text.short(name, 34)} ({text.unit(result)})")
    figure.update_layout(coloraxis={"colorscale": scale, "cmin": low, "cmax": limit, "colorbar": bar})
    return figure


def layers(
    result: LensResult,
    rows: Sequence[int] | None = None,
    title: str | None = None,
    position: int | str | None = None,
    row: int | None = None,
) -> kit.Figure:
    """Lines over layers, one per target: the pooled output's value, the mean over the examples of ``rows`` (all; or of one ``row``).

    Of a ``position`` instead: its number or name, or ``"last"``, the last of every row that is no padding. Of a lens of regions, without one: the
    first target, a line per region.
    """
    if row is not None and rows is not None:
        raise InputError("Give rows= or row=, not both.")
    asked = rows if rows is not None else [] if row is None else [row]
    rows = [text.checked_row(result, one) for one in asked] or list(range(text.n_rows(result)))
    if "target" not in result.axes:
        raise InputError("Lines over layers show targets; read the lens with targets=.")
    if position is None and _is_named(result):
        return _by_region(result, rows, title)
    if position is None and not result.pooled.numel():
        raise InputError("This read-out does not pool; say which position= the lines show.")
    at = None if position is None else [text.place_of(result, position, one) for one in rows]
    values = result.pooled[..., rows] if at is None else result.values[:, at, :, rows].movedim(0, -1)
    shown = [result.axes["example"][one] for one in rows]
    axes = {"layer": text.layers(result), "target": result.axes["target"], "example": shown}
    drawn = Result(values, axes)
    mean = drawn.mean()
    figure = kit.Figure()
    names = [html.escape(text.target_name(result, index)) for index in range(mean.shape[1])]
    for index, name in enumerate(names):
        kit.line(
            figure,
            map(kit.layer_name, text.layers(result)),
            mean[:, index].tolist(),
            name,
            style.PALETTE[index % len(style.PALETTE)],
        )
    if title is None:
        several = text.n_rows(result) > 1
        over = f"mean of {len(drawn.examples)} examples" if len(rows) > 1 else f"row {rows[0]} of {text.n_rows(result)}"
        found = _lines_where(result, rows, at, position) + _lines_found(result, mean, drawn)
        title = style.titled(found, f"{over} (row= or rows= show others)" if several else "")
    kit.finish_lines(figure, title, f"{text.unit(result)} ({result.norm} norm)", 320)
    figure.update_xaxes(type="category")
    return figure


def _by_region(result: LensResult, rows: Sequence[int], title: str | None) -> kit.Figure:
    """The first target at every region, a line for each."""
    target, names, axes = text.target_name(result, 0), result.axes["position"], list(result.axes)
    position, which = axes.index("position"), axes.index("target")
    read = dataclasses.replace(
        result,
        values=result.values.narrow(which, 0, 1).transpose(position, which),
        axes={**result.axes, "position": ["mean"], "target": names},
        names={},
        words=[],
    )
    title = title or f"{html.escape(target)} by layer, read at {html.escape(' and '.join(names))}"
    return layers(read, rows, title, "mean")


def _lines_where(result: LensResult, rows: Sequence[int], at: Sequence[int] | None, position: int | str | None) -> str:
    """Which position the lines are of, in front of what they say; nothing for the pooled output."""
    if at is None:
        return ""
    words = {text.plain(result.words[row][one]) if result.words else "" for row, one in zip(rows, at, strict=True)}
    word = words.pop() if len(words) == 1 else ""
    named = f"the {position} position" if isinstance(position, str) else f"position {position}"
    return f"At {html.escape(repr(word)) if word else named}, "


def _lines_found(result: LensResult, mean: torch.Tensor, drawn: Result) -> str:
    """Which target leads from which layer on; of a single target, where it is lowest and highest."""
    labels, finite = text.layers(result), torch.isfinite(mean)
    last = kit.layer_name(labels[-1])
    if not bool(finite.any()):
        return f"{result.tower}: no finite value at any layer"
    if mean.shape[1] == 1:
        line, name = mean[:, 0], html.escape(text.target_name(result, 0))
        low, high = int(line.nan_to_num(float("inf")).argmin()), int(line.nan_to_num(-float("inf")).argmax())
        if float(line[low]) == float(line[high]):
            return f"{name} is {kit.number(line[low])} at every layer"
        ends = [f"{kit.number(line[at])} at {kit.layer_name(labels[at])}" for at in (low, high)]
        return f"{name}: from {ends[0]} to {ends[1]}"
    ranked = mean.where(finite, -float("inf"))
    best = int(ranked[-1].argmax())
    if not bool(finite[-1].any()):
        return f"{result.tower}: no finite value at {last}"
    if int((ranked[-1] == ranked[-1, best]).sum()) > 1:
        return f"{result.tower}: no target leads at {last}"
    told, name = findings.leads(drawn, result.measure), html.escape(text.target_name(result, best))
    if not told.holds:
        return f"{result.tower}: {name} is first at {last}, by no more than {told.amount}"
    leads = (ranked.argmax(-1) == best) & finite[:, best]
    since = labels[len(labels) - int(leads.int().flip(0).cumprod(0).sum())]
    return f"{name} leads from {kit.layer_name(since)} on"


def _grid_words(result: LensResult, layer: Any, row: int, image: int, tile: int | None) -> list[list[list[str]]]:
    """The names of the highest columns of every patch of the grid."""
    places = result.places[row]
    where = on_grid(torch.arange(places.shape[0], dtype=torch.float64), places, image, tile).tolist()
    if not result.ids.numel():
        return [[[] for _ in line] for line in where]
    index = result.index(layer)  # NaN below: no position there
    return [[[] if at != at else text.highest(result, index, row, int(at)) for at in line] for line in where]


def _patch_found(
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
        return f"{result.tower}: {name} is {kit.number(finite[0])} at every patch"
    layer, cell = divmod(int(stacked.flatten(1).argmax()), stacked[0].numel())
    place = divmod(cell, stacked.shape[2])
    where = f"{kit.layer_name(shown[layer])}, patch row {place[0]}, column {place[1]}"
    if "rank" not in result.axes:
        return f"{text.tower_and_pass(result)}: {name} is strongest at {where}"
    there = words[layer][place[0]][place[1]]
    surest = f"ranks {html.escape(there[0])!r} first, highest" if there else "is highest"
    return f"{text.tower_and_pass(result)} {surest} at {where}"
