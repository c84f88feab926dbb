"""Attention laid over the picture: a map per head behind a slider, beside a grid of all heads; contrasts with their regions; rollouts.

Colours go from nothing to the largest value of the map that is shown, so maps of different heads cannot be compared by colour: the grid beside
the picture says how much of each head's attention the image, or the box, gets. A blue outline is the object's box or the query's patch. Maps of
several passes (denoising steps, generated words) have a second slider for the pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision import findings, regions
from circuitvision.model.names import head_name
from circuitvision.plots import kit, patches, style
from circuitvision.plots.attention_parts import add_base, box_in_frame, color_range, frame_of, outline, shares_of
from circuitvision.readout.patch_coords import extent_of

if TYPE_CHECKING:
    from circuitvision.readout.attention.contrast import AttentionContrast
    from circuitvision.readout.attention.maps import AttentionMaps
    from circuitvision.readout.attention.rollout import AttentionRollout

Box = tuple[float, float, float, float]
_MOST_MAPS = 144
_MOST_NUMBERS = 500_000
"""How many values the slider's maps hold together, so that a page with many steps opens at once."""


@dataclass(frozen=True)
class _Drawn:
    """What an overlay shows: one row's maps ``[step layer head down across]``, and how much of each the image or box gets ``[step layer head]``."""

    result: AttentionMaps
    grids: Tensor
    strength: Tensor
    steps: list[Any]
    what: str
    alike: float
    """The share that looking at all visible keys alike would give."""
    row: int

    @property
    def signed(self) -> bool:
        return self.result.measure == "difference"

    @property
    def beside(self) -> bool:
        """Whether there is a grid of heads beside the map."""
        return len(self.result.axes["head"]) > 1

    @property
    def top(self) -> float:
        return float(self.strength.abs().nan_to_num(0.0).max())

    def shown(self) -> list[tuple[int, int]]:
        """Layers and heads behind the slider: the strongest, if there are too many."""
        size = self.strength.abs().nan_to_num(0.0).amax(0)
        room = _MOST_NUMBERS // (self.grids.shape[0] * self.grids[0, 0, 0].numel())
        order = size.flatten().argsort(descending=True, stable=True)[: min(_MOST_MAPS, max(room, 1))]
        return [divmod(index, size.shape[1]) for index in sorted(order.tolist())]

    def at(self, place: tuple[int, int]) -> Tensor:
        """One head's strength at every step."""
        return self.strength[:, place[0], place[1]]


def overlay(
    result: AttentionMaps,
    *,
    picture: Any = None,
    row: int = 0,
    image: int = 0,
    tile: int | None = None,
    box: Box | None = None,
    step: int | None = None,
    title: str | None = None,
) -> kit.Figure:
    """One row's attention over the image, with a slider over layers and heads that opens at the head with the most attention in the box (or image).

    Args:
        result: maps of one query.
        picture: what the row shows, ``[height width 3]`` of whole numbers 0 … 255 or a PIL image of any size; None: the map alone.
        row, image, tile: which map is drawn.
        box: an object, (left, top, right, bottom) in pixels of the picture or as shares of it (without a picture in pixels as the token map
            counts them); also sets what the grid of heads shows.
        step: number of the pass, as in ``axes["step"]``; None: all that were kept, with a second slider.

    Of an image in several tiles shares are of the tile that is drawn; of a box, with ``tile=None``, those of all tiles that show it.

    The query is outlined where it is a patch of this image. Of more than 144 heads (fewer with many steps), the strongest are behind the
    slider.
    """
    pixels = None if picture is None else patches.as_picture(picture)
    result.grid(result.axes["layer"][0], result.axes["head"][0], row, image, tile, step)
    frame = frame_of(result.places, result.frames, result.boxes, row, image, tile)
    box = box_in_frame(frame, box, pixels)
    drawn = _drawn(result, box, row, image, tile, step)
    shown = drawn.shown()
    opened = max(shown, key=lambda at: float(drawn.at(at).mean().nan_to_num(-math.inf)))
    sizes = {"column_widths": [0.56, 0.44], "horizontal_spacing": 0.12} if drawn.beside else {}
    figure = kit.panels(1, 2 if drawn.beside else 1, **sizes)
    maps = [of_step[opened] for of_step in drawn.grids]
    extent = extent_of(result.shares, result.places, row, image, tile)
    add_base(figure, pixels, maps, signed=drawn.signed, extent=extent)
    height, width = _size(maps[0], pixels, extent)
    outline(figure, frame, box, height, width)
    _mark_query(figure, result, row, image, _tile(result, row, image, tile), (height, width), maps[0].shape, extent)
    if drawn.beside:
        _add_heads(figure, drawn, opened)
    sliders = [_head_slider(figure, drawn, shown, opened, title)]
    sliders += [_step_slider(figure, drawn)] if len(drawn.steps) > 1 else []
    below = 130 + 70 * (len(sliders) - 1)
    figure.update_layout(sliders=sliders)
    margins = {"l": 20, "r": 30, "b": below}
    style.layout(figure, title or _heading(drawn, opened), 370 + below, margin=margins, showlegend=False)
    figure.update_xaxes(visible=False, row=1, col=1)
    figure.update_yaxes(visible=False, row=1, col=1)
    return figure


def rollout(
    result: AttentionRollout,
    *,
    query: Any = None,
    picture: Any = None,
    row: int = 0,
    image: int = 0,
    tile: int | None = None,
    box: Box | None = None,
    title: str | None = None,
) -> kit.Figure:
    """The rollout of one query over the image, with a slider over layers; None takes "cls" where there is one, else "last".

    Other arguments as for :func:`overlay`.
    """
    if query is None:
        query = "cls" if any("cls" in kinds for kinds in result.kinds) else "last"
    return overlay(result.of(query), picture=picture, row=row, image=image, tile=tile, box=box, title=title)


def contrast(
    result: AttentionContrast,
    *,
    picture: Any = None,
    row: int = 0,
    image: int = 0,
    tile: int | None = None,
    box: Box | None = None,
    top_percent: float = 20.0,
    count: int = 3,
    title: str | None = None,
) -> kit.Figure:
    """The contrast of two queries over the image, with the boxes of its strongest regions (numbered, orange) and an object's box (blue).

    Arguments as for :func:`overlay` and :meth:`AttentionContrast.regions`.
    """
    grid = result.grid(row, image, tile).double()
    figure = kit.panels()
    pixels = None if picture is None else patches.as_picture(picture)
    extent = extent_of(result.shares, result.places, row, image, tile)
    add_base(figure, pixels, [grid], as_share=False, extent=extent)
    frame = frame_of(result.places, result.frames, result.boxes, row, image, tile)
    height, width = _size(grid, pixels, extent)
    outline(figure, frame, box_in_frame(frame, box, pixels), height, width)
    for number, region in enumerate(result.regions(top_percent, count, row=row, image=image, tile=tile), start=1):
        outline(figure, frame, region.box, height, width, style.FOR)
        left, top, _, _ = shares_of(frame, region.box)
        figure.add_annotation(
            x=left * width - 0.5, y=top * height - 0.5, xanchor="left", yanchor="top", text=f"{number}", showarrow=False,
            font={"color": "#ffffff", "size": 13}, bgcolor=style.FOR, borderpad=2, row=1, col=1,
        )  # fmt: skip
    finite = grid[torch.isfinite(grid)]
    if title is None and finite.numel():
        r, c = divmod(int(grid.nan_to_num(-math.inf).argmax()), grid.shape[1])
        said = f"The question adds most attention at patch row {r}, column {c}"
        title = style.titled(
            said, f"contrast {finite.max():.2g} there, median {finite.median():.2g}", f"λ = {result.epsilon:.2g}"
        )
    style.layout(figure, title or "No patch has a contrast", 460, margin={"l": 20, "b": 20})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _drawn(result: AttentionMaps, box: Box | None, row: int, image: int, tile: int | None, step: int | None) -> _Drawn:
    steps = result.axes.get("step", [None]) if step is None else [step]
    layers, heads = result.axes["layer"], result.axes["head"]
    grids = [
        torch.stack(
            [torch.stack([result.grid(layer, head, row, image, tile, number) for head in heads]) for layer in layers]
        )
        for number in steps
    ]
    found = [_strength(result, box, row, image, tile, number) for number in steps]
    strength = torch.stack([one[0] for one in found])
    return _Drawn(result, torch.stack(grids).double(), strength, steps, found[0][1], found[0][2], row)


def _size(grid: Tensor, picture: np.ndarray[Any, Any] | None, extent: tuple[float, float]) -> tuple[float, float]:
    """Height and width of the whole image in the units of the panel: pixels of the picture, or cells of the map."""
    if picture is not None:
        return picture.shape[0], picture.shape[1]
    return grid.shape[0] / extent[0], grid.shape[1] / extent[1]


def _tile(result: AttentionMaps, row: int, image: int, tile: int | None) -> int:
    """The tile that is drawn: the first of the image, unless another one is named."""
    if tile is not None:
        return tile
    return int(result.places[row, result.patches(image)[row], 1].min())


def _strength(
    result: AttentionMaps, box: Box | None, row: int, image: int, tile: int | None, step: int | None
) -> tuple[Tensor, str, float]:
    """How much of each head's attention the box, the image or the tile that is drawn gets, ``[layer head]``, what that is in words, and how much of
    the visible keys it is.
    """
    tiles = result.places[row, :, 1]
    inside = result.patches(image)[row]
    several = len(set(tiles[inside].tolist())) > 1
    shown = _tile(result, row, image, tile)
    if box is not None:
        inside, what = result.keys(regions.box(box, image=image))[row], "the box"
    else:
        what = "this image"
    if several and (box is None or tile is not None):
        inside = inside & (tiles == shown)
        what = f"{'the box in ' if box is not None else ''}tile {shown} of this image"
    values = result.pass_values(step)[..., row].double()
    visible = (values != 0).flatten(0, 1).any(0)
    return values[..., inside].sum(-1), what, float((inside & visible).sum() / visible.sum().clamp_min(1))


def _add_heads(figure: kit.Figure, drawn: _Drawn, opened: tuple[int, int]) -> None:
    """The grid of heads of every step, of which the first is seen, with an outline around the head that is drawn."""
    axes, top = drawn.result.axes, max(drawn.top, 1e-9)
    room = drawn.strength[0].numel() <= kit.MOST_WORDS and len(axes["head"]) <= 16
    scale = style.legible(drawn.signed) if room else style.diverging() if drawn.signed else style.sequential()
    for number, grid in enumerate(drawn.strength):
        words = kit.in_words(grid, share=True) if room else None
        hover = "layer %{y} head %{x}<br>%{z:.1%}<extra></extra>"
        low = -top if drawn.signed else 0.0
        kit.cells(figure, grid, scale, low, top, words=words, column=2, visible=number == 0, hovertemplate=hover)
    figure.add_shape(type="rect", line={"width": 3, "color": style.AGAINST}, **_around(opened), row=1, col=2)
    measure = "above the mean head" if drawn.signed else "of attention"
    figure.update_yaxes(**kit.axis(axes["layer"], "layer"), row=1, col=2)
    figure.update_xaxes(**kit.axis(axes["head"], f"head (share {measure} in {drawn.what})", room=16), row=1, col=2)


def _head_slider(
    figure: kit.Figure, drawn: _Drawn, shown: Sequence[tuple[int, int]], opened: tuple[int, int], title: str | None
) -> dict[str, Any]:
    maps = [
        number for number, found in enumerate(figure.data) if found.type == "heatmap" and found.xaxis in ("x", None)
    ]
    around = len(figure.layout.shapes) - 1
    entries = []
    for at in shown:
        grids = [of_step[at] for of_step in drawn.grids]
        data: dict[str, Any] = {"z": [_plain(grid) for grid in grids]}
        limits = [color_range(grid, drawn.signed) for grid in grids]
        data.update({name: [one[name] for one in limits] for name in limits[0]})
        layout: dict[str, Any] = {} if title else {"title.text": style.broken(_heading(drawn, at))[0]}
        if drawn.beside:
            layout.update({f"shapes[{around}].{side}": value for side, value in _around(at).items()})
        entries.append({"method": "update", "label": _label(drawn.result, at), "args": [data, layout, maps]})
    return _slider(entries, list(shown).index(opened), 58)


def _step_slider(figure: kit.Figure, drawn: _Drawn) -> dict[str, Any]:
    """A slider that shows the traces of one step."""
    several = len(drawn.steps)
    kinds = [(found.type, found.xaxis) for found in figure.data]
    # Traces of one panel stand in the order of the steps.
    order = {number: sum(kind == kinds[number] for kind in kinds[:number]) for number in range(len(kinds))}
    entries = []
    for number, step in enumerate(drawn.steps):
        visible = [found.type == "image" or order[index] == number for index, found in enumerate(figure.data)]
        label = f"step {step}" if several <= 24 else str(step)
        entries.append({"method": "update", "label": label, "args": [{"visible": visible}, {}]})
    return _slider(entries, 0, 132)


def _slider(entries: list[dict[str, Any]], active: int, pad: int) -> dict[str, Any]:
    return {
        "active": active,
        "steps": entries,
        "currentvalue": {"visible": False},
        "pad": {"t": pad, "b": 0},
        "font": {"size": 11 if len(entries) <= 24 else 1},
        "minorticklen": 0,
    }


def _plain(grid: Tensor) -> list[list[float | None]]:
    """A map as numbers short enough for a page that holds many of them."""
    return [[None if value != value else float(f"{value:.7g}") for value in line] for line in grid.tolist()]


def _label(result: AttentionMaps, at: tuple[int, int]) -> str:
    layer, head = result.axes["layer"][at[0]], result.axes["head"][at[1]]
    return head_name(layer, head, result.tower) if len(result.axes["head"]) > 1 else f"layer {layer}"


def _heading(drawn: _Drawn, at: tuple[int, int]) -> str:
    """What the map of one head says; of several steps, how far it goes from one to another."""
    result, what, shares = drawn.result, drawn.what, drawn.at(at).tolist()
    layer, head = result.axes["layer"][at[0]], result.axes["head"][at[1]]
    notes = ["" if result.query in ("", "default") else f"query: {kit.escaped(result.query)}"]
    notes.append(style.which_row(drawn.row, len(result.axes["example"])))
    if any(math.isnan(share) for share in shares):
        return style.titled("This row has no attention to show", "no query of it counts", *notes)
    where = head_name(layer, head, result.tower)
    low, high = kit.percent(min(shares)), kit.percent(max(shares))
    share = low if low == high else f"{low} to {high}"
    several = f"over {len(shares)} steps; move the sliders for other heads and steps"
    hint = several if len(shares) > 1 else "move the slider for other heads"
    if result.measure == "rollout":
        said, hint = f"Rolled out to layer {layer}, {share} comes from {what}", f"{result.tower} tower"
    elif drawn.signed and len(shares) > 1:
        said, hint = f"{where} gives {what} {share} more attention than the mean head", "sliders: heads, steps"
    elif drawn.signed:
        more = "more" if shares[0] >= 0 else "less"
        said = f"{where} gives {what} {kit.percent(abs(shares[0]))} {more} attention than the mean head"
    elif len(shares) > 1:
        said = f"{where} gives {share} of its attention to {what}"
    else:
        told = findings.attends(where, what, shares[0])
        said, hint = str(told), f"looking at all keys alike: {kit.percent(drawn.alike)}; {hint}"
    return style.titled(said, hint, *notes)


def _around(at: tuple[int, int]) -> dict[str, float]:
    layer, head = at
    return {"x0": head - 0.5, "x1": head + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}


def _mark_query(
    figure: kit.Figure,
    result: AttentionMaps,
    row: int,
    image: int,
    tile: int,
    size: tuple[float, float],
    grid: Sequence[int],
    extent: tuple[float, float],
) -> None:
    place = result.query_places[row].tolist()
    if place[2] < 0 or place[0] != image or place[1] != tile:
        return
    rows, columns = (cells / share for cells, share in zip(grid, extent, strict=True))
    left, top = place[3] / columns, place[2] / rows
    corners = (left, top, left + 1 / columns, top + 1 / rows)
    patches.mark(figure, corners, size[0], size[1], 1, 1, style.AGAINST)
    figure.add_annotation(
        x=(left + 0.5 / columns) * size[1] - 0.5, y=(top + 0.5 / rows) * size[0] - 0.5, text="query", showarrow=False,
        font={"color": "#ffffff", "size": 12}, bgcolor=style.AGAINST, borderpad=2, row=1, col=1,
    )  # fmt: skip
