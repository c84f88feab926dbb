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

import torch
from torch import Tensor

from circuitvision import findings, regions
from circuitvision.model.names import head_name
from circuitvision.plots import _check_keywords, kit, patches, style
from circuitvision.readout.patch_coords import PictureOf, extent_of, grid_of, picture_of

if TYPE_CHECKING:
    from circuitvision.readout.attention.contrast import AttentionContrast
    from circuitvision.readout.attention.maps import AttentionMaps
    from circuitvision.readout.attention.rollout import AttentionRollout

Box = patches.Box
_MOST_MAPS = 144
_MOST_NUMBERS = 500_000
"""How many values the slider's maps hold together, so that a page with many steps opens at once."""


@dataclass(frozen=True)
class _Drawn:
    """What an overlay shows: one picture's maps ``[step layer head down across]``, and how much of each head's attention the image or box gets."""

    result: AttentionMaps
    picture: PictureOf
    grids: Tensor
    strength: Tensor
    """``[step layer head]``."""
    alike: Tensor
    """The share that looking at all visible keys alike would give, ``[step layer]``."""
    steps: list[Any]
    what: str
    elsewhere: Tensor | None
    """Of a box, the shares of equal boxes elsewhere, ``[layer head place]``."""

    @property
    def signed(self) -> bool:
        return self.result.measure == "difference"

    def shown(self) -> list[tuple[int, int]]:
        """Layers and heads behind the slider: the strongest, if there are too many."""
        size = self.strength.abs().nan_to_num(0.0).amax(0)
        room = _MOST_NUMBERS // (self.grids.shape[0] * self.grids[0, 0, 0].numel())
        order = size.flatten().argsort(descending=True, stable=True)[: min(_MOST_MAPS, max(room, 1))]
        return [divmod(index, size.shape[1]) for index in sorted(order.tolist())]


def overlay(
    result: AttentionMaps,
    *,
    picture: Any = None,
    example: Any = None,
    image: int | None = None,
    tile: int | None = None,
    box: Box | None = None,
    step: int | None = None,
    title: str | None = None,
) -> kit.Figure:
    """One query's attention over an image, with a slider over layers and heads that opens at the head with the most attention in the box (or image).

    Args:
        result: maps of one query.
        picture: what the model saw, ``[height width 3]`` of whole numbers 0 … 255 or a PIL image of any size; None: the map alone.
        example, image, tile: which map is drawn; None: the first.
        box: an object, (left, top, right, bottom) in pixels of the picture or as shares of it (without a picture in pixels as the token map
            counts them); also sets what the grid of heads shows.
        step: number of the pass, as in ``axes["step"]``; None: all that were kept, with a second slider.

    Of an image in several tiles shares are of the tile that is drawn; of a box, with ``tile=None``, those of all tiles that show it.

    The query is outlined where it is a patch of this image. Of more than 144 heads (fewer with many steps), the strongest are behind the
    slider.
    """
    pixels = None if picture is None else patches.as_picture(picture)
    shown = picture_of(result, example, image, tile)
    result.pass_values(step)  # raises if there is none
    extent = extent_of(result, shown)
    box = patches.as_shares(box, pixels, _frame(result, shown))
    drawn = _drawn(result, box, shown, tile is not None, step)
    heads = drawn.shown()
    opened = max(heads, key=lambda at: float(drawn.strength[:, *at].mean().nan_to_num(-math.inf)))
    beside = len(result.axes["head"]) > 1
    sizes = {"column_widths": [0.56, 0.44], "horizontal_spacing": 0.12} if beside else {}
    figure = kit.panels(1, 2 if beside else 1, **sizes)
    _add_maps(figure, [of_step[opened] for of_step in drawn.grids], pixels, extent, signed=drawn.signed)
    size = patches.size_of(drawn.grids[0, 0, 0], pixels, extent)
    patches.mark(figure, box, size, 1, 1)
    if result.query_places[shown.entry, :2].tolist() == list(shown[1:]):
        query = _patch_box(result.query_places[shown.entry, 2:].tolist(), drawn.grids.shape[-2:], extent)
        patches.mark(figure, query, size, 1, 1, label="query", middle=True)
    if beside:
        _add_heads(figure, drawn, opened)
    sliders = [_head_slider(figure, drawn, heads, opened, beside, title)]
    sliders += [_step_slider(figure, drawn)] if len(drawn.steps) > 1 else []
    below = 130 + 70 * (len(sliders) - 1)
    figure.update_layout(sliders=sliders)
    margins = {"l": 20, "r": 30, "b": below}
    style.layout(figure, title or _heading(drawn, opened, opened), 370 + below, margin=margins, showlegend=False)
    figure.update_xaxes(visible=False, row=1, col=1)
    figure.update_yaxes(visible=False, row=1, col=1)
    return figure


def rollout(result: AttentionRollout, *, query: Any = None, **keywords: Any) -> kit.Figure:
    """The rollout of one query over the image, with a slider over layers; None takes "cls" where there is one, else "last".

    Other keywords as for :func:`overlay`.
    """
    if query is None:
        query = "cls" if any("cls" in kinds for kinds in result.kinds) else "last"
    _check_keywords(overlay, "AttentionRollout", keywords)
    return overlay(result.of(query), **keywords)


def contrast(
    result: AttentionContrast,
    *,
    picture: Any = None,
    example: Any = None,
    image: int | None = None,
    tile: int | None = None,
    box: Box | None = None,
    top_percent: float = 20.0,
    count: int = 3,
    title: str | None = None,
) -> kit.Figure:
    """The contrast of two queries over the image, with the boxes of its strongest regions (numbered, orange) and an object's box (blue).

    Arguments as for :func:`overlay` and :meth:`AttentionContrast.regions`.
    """
    shown = picture_of(result, example, image, tile)
    grid, frame, extent = result.grid(example, image, tile).double(), _frame(result, shown), extent_of(result, shown)
    pixels = None if picture is None else patches.as_picture(picture)
    figure = kit.panels()
    _add_maps(figure, [grid], pixels, extent, share=False)
    size = patches.size_of(grid, pixels, extent)
    patches.mark(figure, patches.as_shares(box, pixels, frame), size, 1, 1)
    found = result.regions(top_percent, count, example=example, image=image, tile=tile)
    for number, region in enumerate(found, start=1):
        patches.mark(figure, patches.as_shares(region.box, None, frame), size, 1, 1, style.FOR, str(number))
    if title is None:
        told = findings.adds(grid)
        there = f"contrast {told.value:.2g} there, median {told.chance:.2g}" if told.holds is not None else ""
        title = style.titled(str(told), there, f"λ = {result.epsilon:.2g}", kit.which(result, shown.entry))
    style.layout(figure, title, 460, margin={"l": 20, "b": 20})
    return kit.bare(figure, visible=False)


def _frame(result: AttentionMaps | AttentionContrast, shown: PictureOf) -> Box:
    """The pixels (left, top, right, bottom) that a picture covers, as the token map counts them."""
    here = shown.here(result)
    if result.frames.ndim == 3:
        left, top, right, bottom = result.frames[shown.entry, here][0].tolist()
    else:
        # Made by hand: the patches' boxes alone are known.
        boxes = result.boxes[shown.entry, here]
        left, top, right, bottom = [*boxes[:, :2].amin(0).tolist(), *boxes[:, 2:].amax(0).tolist()]
    return left, top, right, bottom


def _patch_box(place: Sequence[int], shape: Sequence[int], extent: tuple[float, float]) -> Box:
    """A patch as shares of the image."""
    down, across = (share / cells for share, cells in zip(extent, shape, strict=True))
    return place[1] * across, place[0] * down, (place[1] + 1) * across, (place[0] + 1) * down


def _drawn(result: AttentionMaps, box: Box | None, shown: PictureOf, of_tile: bool, step: int | None) -> _Drawn:
    """The maps of a picture, and how much of each head's attention the box, the image or the tile gets."""
    steps = result.axes.get("step", [None]) if step is None else [step]
    values = torch.stack([result.pass_values(number)[..., shown.entry] for number in steps])
    inside, what = result.patches(shown.image), "this image"
    tiles = result.places[..., 1]
    if box is not None:
        left, top, right, bottom = _frame(result, shown)
        wide, high = right - left, bottom - top
        pixels = (left + box[0] * wide, top + box[1] * high, left + box[2] * wide, top + box[3] * high)
        inside, what = result.keys(regions.box(pixels, image=shown.image)), "the box"
    several = len(set(tiles[shown.entry, result.patches(shown.image)[shown.entry]].tolist())) > 1
    if several and (box is None or of_tile):
        inside = inside & (tiles == shown.tile)
        what = f"{'the box in ' if box is not None else ''}tile {shown.tile} of this image"
    found = result.share_of(inside)
    numbers = [result.axes["step"].index(number) for number in steps] if "step" in result.axes else [0]
    share, alike = (held if "step" in result.axes else held[None] for held in (found.values, found.uniform))
    grids = grid_of(result, values, shown).double()
    elsewhere = None if box is None else result.share_elsewhere(inside, shown, steps)
    share, alike = share[numbers, ..., shown.entry], alike[numbers, ..., shown.entry]
    return _Drawn(result, shown, grids, share, alike, steps, what, elsewhere)


def _add_maps(
    figure: kit.Figure,
    maps: Sequence[Tensor],
    picture: patches.Pixels | None,
    extent: tuple[float, float],
    *,
    signed: bool = False,
    share: bool = True,
) -> None:
    """Picture (where given) and maps in the first panel, of which the first is seen; the maps are the last traces."""
    scale = style.diverging() if signed else style.sequential(over_picture=picture is not None)
    bar = kit.color_bar(tickformat=".2~%" if share else None, x=-0.02, xanchor="right", len=0.8)
    if picture is not None:
        patches.draw(figure, 1, 1, picture=picture)
    for number, grid in enumerate(maps):
        patches.draw(
            figure, 1, 1, grid, extent=extent, over=picture, opacity=0.55, number=".2%" if share else ".3g", colorscale=scale, colorbar=bar,
            visible=number == 0, **_limits(grid, signed),
        )  # fmt: skip


def _limits(grid: Tensor, signed: bool) -> dict[str, Any]:
    """The limits of a map's colours: from nothing, or from as far below 0, to its largest value."""
    top = max(float(grid.abs().nan_to_num(0.0).max()), 1e-9)
    return {"zmin": -top if signed else 0.0, "zmax": top}


def _add_heads(figure: kit.Figure, drawn: _Drawn, opened: tuple[int, int]) -> None:
    """The grid of heads of every step, of which the first is seen, with an outline around the head that is drawn."""
    axes, top = drawn.result.axes, max(float(drawn.strength.abs().nan_to_num(0.0).max()), 1e-9)
    room = drawn.strength[0].numel() <= kit.MOST_WORDS and len(axes["head"]) <= 16
    scale = style.legible(drawn.signed) if room else style.diverging() if drawn.signed else style.sequential()
    for number, grid in enumerate(drawn.strength):
        words = kit.in_words(grid, share=True) if room else None
        hover = "layer %{y} head %{x}<br>%{z:.1%}<extra></extra>"
        low = -top if drawn.signed else 0.0
        kit.cells(figure, grid, scale, low, top, words=words, column=2, visible=number == 0, hovertemplate=hover)
    figure.add_shape(type="rect", line={"width": 3, "color": style.AGAINST}, **_around(opened), row=1, col=2)
    measure = "above the mean" if drawn.signed else "of attention"
    figure.update_yaxes(**kit.axis(axes["layer"], "layer"), row=1, col=2)
    figure.update_xaxes(**kit.axis(axes["head"], f"head (share {measure} in {drawn.what})", room=16), row=1, col=2)


def _head_slider(
    figure: kit.Figure,
    drawn: _Drawn,
    shown: Sequence[tuple[int, int]],
    opened: tuple[int, int],
    beside: bool,
    title: str | None,
) -> dict[str, Any]:
    maps = [
        number for number, found in enumerate(figure.data) if found.type == "heatmap" and found.xaxis in ("x", None)
    ]
    around = len(figure.layout.shapes) - 1
    entries = []
    for at in shown:
        grids = [of_step[at] for of_step in drawn.grids]
        data: dict[str, Any] = {"z": [_plain(grid) for grid in grids]}
        limits = [_limits(grid, drawn.signed) for grid in grids]
        data.update({name: [one[name] for one in limits] for name in limits[0]})
        layout: dict[str, Any] = {} if title else {"title.text": style.broken(_heading(drawn, at, opened))[0]}
        if beside:
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


def told(drawn: _Drawn, at: tuple[int, int], opened: tuple[int, int]) -> findings.Finding:
    """The finding about one head's map; ``opened`` is the head that has most of all."""
    result, shares, alike = drawn.result, drawn.strength[:, *at].tolist(), float(drawn.alike[:, at[0]].mean())
    layer, head = result.axes["layer"][at[0]], result.axes["head"][at[1]]
    name, moved = head_name(layer, head, result.tower), drawn.elsewhere
    if drawn.signed:
        return findings.differs(name, drawn.what, shares, drawn.strength.mean(0), moved)
    best = None if moved is None else moved.amax((0, 1))
    if result.measure == "rollout":
        return findings.attends(str(layer), drawn.what, shares, alike, claim="rolls out", elsewhere=best)
    claim = "attends" if at == opened else "attends too"
    return findings.attends(name, drawn.what, shares, alike, claim=claim, elsewhere=best)


def _heading(drawn: _Drawn, at: tuple[int, int], opened: tuple[int, int]) -> str:
    """What the map of one head says; of several steps, how far it goes from one to another."""
    result, found = drawn.result, told(drawn, at, opened)
    notes = ["" if result.query in ("", "default") else f"query: {kit.escaped(result.query)}"]
    notes.append(kit.which(result, drawn.picture.entry))
    if found.value != found.value:
        return style.titled("This example has no attention to show", "no query of it counts", *notes)
    chance = "" if found.chance is None or drawn.signed else f"looking at all keys alike: {kit.percent(found.chance)}"
    several = f"over {len(drawn.steps)} steps; move the sliders for other heads and steps"
    hint = several if len(drawn.steps) > 1 else "move the slider for other heads"
    hint = f"{result.tower} tower" if result.measure == "rollout" else hint
    return style.titled(str(found), chance, hint, *notes)


def _around(at: tuple[int, int]) -> dict[str, float]:
    layer, head = at
    return {"x0": head - 0.5, "x1": head + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
