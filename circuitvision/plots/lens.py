"""Three views of a lens: layers × patches laid over the image, a table of layers × tokens, and lines of what the pooled output says layer by layer.

``lens(result)`` chooses: patches where the example has any, lines where the output is pooled and no patch is placed, the table otherwise. Hovering
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
from circuitvision.readout.patch_coords import PictureOf, extent_of, grid_of, picture_of
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.readout.lens.result import LensResult

_MOST_PANELS = 9
_VIEWS = ("patches", "table", "layers")


def lens(result: LensResult, view: str | None = None, **keywords: Any) -> kit.Figure:
    """A figure of one lens: ``view`` is "patches", "table" or "layers" (see the functions of these names for keywords).

    Raises:
        InputError: no such view or example, one that needs what the lens does not hold, a keyword that the view does not take, or a lens with heads.
    """
    text.check_heads(result)
    if view is None:
        asked = keywords.get("example")
        entry = result.entries(asked[0] if isinstance(asked, list | tuple) and asked else asked)[0]
        placed = result.places.ndim == 3 and bool((result.places[entry][:, 2] >= 0).any())
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
    example: Any = None,
    target: Any = None,
    picture: Any = None,
    box: patches.Box | None = None,
    title: str | None = None,
    image: int | None = None,
    tile: int | None = None,
) -> kit.Figure:
    """One example's lens at its image patches: a panel per layer (at most nine), on one colour scale, laid over the picture where it is given.

    Args:
        result: a lens with places.
        example, image, tile: which map is drawn; None: the first.
        target: label, or else number, of the target shown (None: the first); of a lens by rank, the value of the highest column, whose name is
            written on the patch.
        picture: what the model saw, ``[height width 3]`` or a PIL image.
        box: an object, (left, top, right, bottom) in pixels of the picture, or as shares of the image.
        title: by default the layer and patch where the value is highest.
    """
    text.check_heads(result)
    at, shown = picture_of(result, example, image, tile), text.layers(result, _MOST_PANELS)
    grids = torch.stack([result.patch_grid(layer, example, image, tile, target) for layer in shown])
    words = [_grid_words(result, layer, at) for layer in shown]
    pixels = None if picture is None else patches.as_picture(picture)
    first = 1 + (pixels is not None)
    headings = ["image"] * (first - 1) + [kit.layer_name(layer) for layer in shown]
    figure = kit.panels(1, len(headings), column_titles=headings, horizontal_spacing=0.012)
    by_rank, signed = "rank" in result.axes, bool((grids < 0).any())
    limit = kit.largest(grids, robust=True)
    low = -limit if signed else 0.0
    scale = style.legible(signed) if by_rank else style.diverging() if signed else style.sequential(True)
    options: dict[str, Any] = {"box": patches.as_shares(box, pixels), "extent": extent_of(result, at)}
    if pixels is not None:
        patches.draw(figure, 1, 1, picture=pixels, box=options["box"])
    for column, (grid, cells) in enumerate(zip(grids, words, strict=True), start=first):
        hover = [["highest: " + html.escape(", ".join(cell)) if cell else "" for cell in line] for line in cells]
        written = by_rank and grid.shape[1] * len(headings) <= 40
        names = [[html.escape(cell[0]) if cell else "" for cell in line] for line in cells] if written else None
        under = None if by_rank else pixels
        patches.draw(
            figure, 1, column, grid, under, opacity=0.72, hover=hover, unit=text.unit(result), text=names, **options
        )
        if names is not None:
            patches.add_words(figure, grid, names, scale, low, limit, 1, column)
    name = html.escape(text.target_name(result, 0 if target is None else result.target(target)))
    others = len(result.axes.get("target", ())) - 1
    more = f"{others} other target{'s' if others > 1 else ''} (target=)" if others > 0 else ""
    title = title or style.titled(str(_patch_found(result, shown, at, grids, name)), kit.which(result, at.entry), more)
    bar = f"{text.short(name, 34)} ({text.unit(result)})"
    margin = {"l": 10, "r": 30, "b": 20}
    return patches.finish(figure, title, int(40 + 720 / len(headings)), scale, low, limit, bar, above=26, margin=margin)


def layers(
    result: LensResult,
    example: Any = None,
    title: str | None = None,
    position: int | str | None = None,
    image: int | None = None,
    tile: int | None = None,
) -> kit.Figure:
    """Lines over layers, one per target: the pooled output's value, the mean over all examples (or of the ``example`` or examples named; of one
    ``image`` or ``tile`` alone where these are told apart).

    Of a ``position`` instead: its number or name, or ``"last"``, the last of every prompt that is no padding. Of a lens of regions, without one: the
    first target, a line per region.
    """
    text.check_heads(result)
    entries = text.entries(result, example, image, tile)
    if "target" not in result.axes:
        raise InputError("Lines over layers show targets; read the lens with targets=.")
    if position is None and _is_named(result):
        result, position, title = _by_region(result), "mean", title or _regions_title(result)
    if position is None and not result.pooled.numel():
        raise InputError("This read-out does not pool; say which position= the lines show.")
    at = None if position is None else [text.place_of(result, position, entry) for entry in entries]
    values = result.pooled[..., entries] if at is None else result.values[:, at, :, entries].movedim(0, -1)
    names, shown = text.layers(result), [result.axes["example"][entry] for entry in entries]
    drawn = Result(values, {"layer": names, "target": result.axes["target"], "example": shown})
    mean = drawn.mean()
    figure = kit.Figure()
    for index in range(mean.shape[1]):
        name = html.escape(text.target_name(result, index))
        kit.line(figure, map(kit.layer_name, names), mean[:, index].tolist(), name, kit.color(index))
    if title is None:
        several = len(drawn.examples) > 1
        note = kit.over(drawn) if several else kit.which(result, entries[0], "example=")
        found = _lines_where(result, entries, at, position) + _lines_found(result, mean, drawn)
        title = style.titled(found, f"{note} (example= shows one or some)" if several else note)
    return kit.finish_lines(figure, title, f"{text.unit(result)} ({result.norm} norm)", 320, names=True)


def _by_region(result: LensResult) -> LensResult:
    """The first target at every region, as a lens at one position with a target for each."""
    axes = list(result.axes)
    position, which = axes.index("position"), axes.index("target")
    return dataclasses.replace(
        result,
        values=result.values.narrow(which, 0, 1).transpose(position, which),
        axes={**result.axes, "position": ["mean"], "target": result.axes["position"]},
        names={},
        words=[],
    )


def _regions_title(result: LensResult) -> str:
    regions = html.escape(" and ".join(result.axes["position"]))
    return f"{html.escape(text.target_name(result, 0))} by layer, read at {regions}"


def _lines_where(
    result: LensResult, entries: Sequence[int], at: Sequence[int] | None, position: int | str | None
) -> str:
    """Which position the lines are of, in front of what they say; nothing for the pooled output."""
    if at is None:
        return ""
    words = {
        text.plain(result.words[entry][one]) if result.words else "" for entry, one in zip(entries, at, strict=True)
    }
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


def _grid_words(result: LensResult, layer: Any, at: PictureOf) -> list[list[list[str]]]:
    """The names of the highest columns of every patch of the grid."""
    where = grid_of(result, torch.arange(result.places.shape[1], dtype=torch.float64), at).tolist()
    if not result.ids.numel():
        return [[[] for _ in line] for line in where]
    index = result.index(layer)  # NaN below: no position there
    return [
        [[] if place != place else text.highest(result, index, at.entry, int(place)) for place in line]
        for line in where
    ]


def _patch_found(
    result: LensResult, shown: Sequence[Any], at: PictureOf, grids: torch.Tensor, name: str
) -> str | findings.Finding:
    """Where the value is highest, and of a lens by rank what is said there; ``name`` is escaped."""
    finite, tower = grids[torch.isfinite(grids)], text.tower_and_pass(result)
    if not finite.numel():
        return f"{result.tower}: {name} has no finite value at these patches"
    if finite.numel() > 1 and float(finite.min()) == float(finite.max()):
        return f"{result.tower}: {name} is {kit.number(finite[0])} at every patch"
    names = [kit.layer_name(layer) for layer in shown]
    if "rank" not in result.axes:
        return findings.strongest_at(tower, name, names, grids, result.measure)
    layer, cell = divmod(int(grids.nan_to_num(-float("inf")).argmax()), grids[0].numel())
    row, column = divmod(cell, grids.shape[-1])
    place = int(grid_of(result, torch.arange(result.places.shape[1], dtype=torch.float64), at)[row, column])
    index = result.index(shown[layer])
    word = html.escape(text.highest(result, index, at.entry, place)[0])
    margin = text.margin(result, index, place, at.entry)
    return findings.ranks_at(text.tower_and_pass(result, noun=True), word, names, grids, margin, result.measure)
