"""Maps of relevance, beside the picture they are about.

A figure takes one result or several of one kind, side by side. Maps of different methods have different units, so each is coloured by its own
largest absolute value, written below it: compare where they are strong, not how strong they are.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.plots import kit, patches, style

if TYPE_CHECKING:
    from circuitvision.readout.relevance.result import Relevance

PixelBox = tuple[float, float, float, float]
_PANEL = 210


def relevance(
    result: Relevance | Sequence[Relevance],
    *,
    picture: Any = None,
    row: int | Sequence[int] = 0,
    image: int | None = None,
    tile: int | None = None,
    box: Any = None,
    beside: Relevance | Sequence[Relevance] = (),
    title: str | None = None,
) -> kit.Figure:
    """Maps over the patches (or pixels) of one row or several, a column per result; words as bars below.

    Args:
        result, beside: the results shown.
        picture: the picture ``[height width 3]`` of levels 0 … 255 (one per row), shown first and laid under the maps.
        row: the row of the tower, or several, one below the other.
        image, tile: which image and tile of the row.
        box: the object's box (left, top, right, bottom) in pixels of the picture or as shares of it (one per row), drawn over every panel.

    Raises:
        InputError: another number of pictures or boxes than of rows, a box in pixels without a picture, no such row, something that is no
        relevance of the same rows.
    """
    results = together(result, beside, "Relevance")
    rows = [row] if isinstance(row, int) else list(row)
    pictures, boxes = (
        _per_row(picture, rows, isinstance(row, int), "picture"),
        _per_row(box, rows, isinstance(row, int), "box"),
    )
    for one, line in itertools.product(results, rows):
        one.row_number(line)  # raises if there is none
    if not any(_patches(one, rows[0]) for one in results):
        return _words_alone(results, rows[0], title)
    figure, first, with_words = _panels(results, rows, pictures[0] is not None)
    for number, (line, one, frame) in enumerate(zip(rows, pictures, boxes, strict=True), start=1):
        shares = None if frame is None else _as_shares(frame, one)
        if one is not None:
            patches.add_picture(figure, one, number)
            patches.mark(figure, shares, one.shape[0], one.shape[1], number, 1, "#ffffff")
        for column, found in enumerate(results, start=first):
            _add_map(figure, found, line, (image, tile), one, shares, number, column)
            if with_words:
                _add_words(figure, found, line, len(rows) + 1, column)
    lead = _found(results, rows, pictures, boxes, (image, tile)) if title is None else title
    several = len(results[0].axes["example"])
    heading = style.titled(lead, _legend(results), style.which_row(rows[0], several) if len(rows) == 1 else "")
    words = max((len(_words(one, rows[0])[0]) for one in results), default=0) if with_words else 0
    shown = len(results) + (pictures[0] is not None)
    height = 60 + len(rows) * (min(_PANEL, 900 // shown) + 14) + (60 + 20 * words if words else 0)
    style.layout(figure, heading, height, above=44 if shown <= 3 else 66, margin={"l": 20, "b": 40}, showlegend=False)
    for number in range(1, len(rows) + 1):
        figure.update_xaxes(visible=False, row=number)
        figure.update_yaxes(visible=False, row=number)
    return figure


# -- maps ----------------------------------------------------------------------------------------------------------------------------------


def _panels(results: Sequence[Relevance], rows: Sequence[int], pictured: bool) -> tuple[kit.Figure, int, bool]:
    """The empty figure, the column of the first map, and whether there is a line of words below the maps."""
    with_words = len(rows) == 1 and any(_words(one, rows[0])[0] for one in results)
    count = len(results) + pictured
    headings = (["picture"] if pictured else []) + [_heading(one, count) for one in results]
    words = max((len(_words(one, rows[0])[0]) for one in results), default=0)
    heights = [_PANEL] * len(rows) + ([20 * words] if with_words else [])
    figure = kit.panels(
        rows=len(heights),
        columns=len(headings),
        column_titles=headings,
        row_heights=heights,
        horizontal_spacing=0.1 / len(headings) if with_words else 0.015,
        vertical_spacing=(0.09 if with_words else 0.05) if len(heights) > 1 else 0,
    )
    figure.update_annotations(font={"size": 12})
    return figure, 2 if pictured else 1, with_words


def _add_map(
    figure: kit.Figure,
    found: Relevance,
    line: int,
    which: tuple[int | None, int | None],
    picture: Any,
    box: patches.Box | None,
    row: int,
    column: int,
) -> None:
    grid = found.on_image(line, *which)
    limit = _limit(found, line)
    look: dict[str, Any] = {"colorscale": style.diverging(), "zmin": -limit, "zmax": limit, "showscale": False}
    unit = str(found.provenance.get("metric_units") or "")
    patches.below(figure, f"full colour: ±{limit:.2g}{_undrawn(found, line)}", row, column, style.TINY)
    extent = (1.0, 1.0) if found.of_pixels else found.extent(line, *which)
    if picture is None:
        patches.add_map(figure, grid.numpy(), row, column, unit=unit, **look)
        patches.mark(figure, box, grid.shape[0], grid.shape[1], row, column, extent=extent)
        return
    # A grey picture leaves the colours to the map.
    grey = picture.mean(-1, keepdims=True).repeat(3, -1)
    pale = (0.35 * grey + 0.65 * 245).astype(np.uint8)
    patches.add_overlay(figure, pale, grid.numpy(), row, column, opacity=0.75, extent=extent, unit=unit, **look)
    patches.mark(figure, box, pale.shape[0], pale.shape[1], row, column, "#111111")


def _limit(found: Relevance, line: int) -> float:
    """The largest absolute value of one row that is drawn, as patch or word: what full colour stands for."""
    if found.of_pixels:
        return max(float(found.values[..., line].abs().nan_to_num(0.0).max()), 1e-12)
    drawn = found.per_position[:, line][found.places[line, :, 0] >= 0].abs().nan_to_num(0.0).tolist()
    return max([*drawn, *(abs(value) for value in _words(found, line)[1]), 1e-12])


def _undrawn(found: Relevance, line: int) -> str:
    """The strongest position that is neither patch nor word (a class token, a register), where it is stronger than all that is drawn."""
    if found.of_pixels or not found.labels:
        return ""
    values = found.per_position[:, line].masked_fill(found.places[line, :, 0] >= 0, 0.0).nan_to_num(0.0)
    at = int(values.abs().argmax())
    if abs(float(values[at])) <= _limit(found, line):
        return ""
    value = f"{float(values[at]):+.2g}".replace("-", "\N{MINUS SIGN}")
    return f"<br>not drawn: {kit.escaped(found.labels[line][at])} {value}"


def _patches(found: Relevance, line: int) -> bool:
    return bool((found.places[line, :, 2] >= 0).any())


def _words(found: Relevance, line: int) -> tuple[list[str], list[float]]:
    """Text pieces that are no patch, with their values; none for towers that read images alone."""
    if found.of_pixels:
        return [], []
    values = found.per_position[:, line]
    shown = [
        number
        for number in range(values.shape[0])
        if found.places[line, number, 0] < 0
        and not values[number].isnan()
        and not found.labels[line][number].startswith("[")
    ]
    return [found.labels[line][number].strip("▁Ġ ") or "·" for number in shown], values[shown].tolist()


def _add_words(figure: kit.Figure, found: Relevance, line: int, row: int, column: int) -> None:
    words, values = _words(found, line)
    limit = _limit(found, line)
    kit.add_bars(figure, [kit.escaped(word) for word in words], values, row=row, column=column)
    low = -limit if min(values, default=0.0) < -0.05 * limit else -0.03 * limit
    figure.update_xaxes(range=[low, 1.03 * limit], visible=False, row=row, col=column)


def _words_alone(results: Sequence[Relevance], line: int, title: str | None) -> kit.Figure:
    """Bars of words, a panel per result, where nothing is over an image."""
    figure = kit.panels(1, len(results), column_titles=[_heading(one, len(results)) for one in results])
    figure.update_annotations(font={"size": 12})
    for column, found in enumerate(results, start=1):
        _add_words(figure, found, line, 1, column)
    words, values = _words(results[0], line)
    best = max(range(len(words)), key=lambda number: abs(values[number])) if words else 0
    lead = f"“{kit.escaped(words[best])}” matters most to {_metric(results[0])}" if words else "No word has a value"
    heading = style.titled(title or lead, _legend(results))
    style.layout(figure, heading, 40 + 24 * max(len(words), 1), above=40, margin={"l": 70, "b": 20}, showlegend=False)
    return figure


def _found(
    results: Sequence[Relevance],
    rows: Sequence[int],
    pictures: Sequence[Any],
    boxes: Sequence[Any],
    which: tuple[Any, Any],
) -> str:
    """What the maps say: whether they peak on the object, or where the first one peaks."""
    if any(box is None for box in boxes):
        noun = "pixel" if results[0].of_pixels else "patch"
        grid = results[0].on_image(rows[0], *which)
        return str(findings.stands_out(grid, _short(results[0].method), noun, _metric(results[0])))
    shares = [_as_shares(box, picture) for picture, box in zip(pictures, boxes, strict=True)]
    hits = [[_inside(one, line, which, box)[0] for line, box in zip(rows, shares, strict=True)] for one in results]
    chances = [_inside(one, line, which, box)[1] for one in results for line, box in zip(rows, shares, strict=True)]
    total, chance = sum(map(sum, hits)), sum(chances) / len(chances)
    told = findings.on_object(_short(results[0].method), total, len(chances), chance)
    never = [name for name, found in zip(names_of(results), hits, strict=True) if not any(found)]
    but = (
        f"; {' and '.join(never)} {'do' if len(never) > 1 else 'does'} not" if told.holds and 0 < len(never) < 3 else ""
    )
    return f"{told}{but} (chance {kit.percent(chance)})"


def _inside(found: Relevance, line: int, which: tuple[Any, Any], box: patches.Box) -> tuple[bool, float]:
    """Whether a cell with the largest value touches the box (of several that share it, a region removed whole, one is enough), and the share of
    cells that do.
    """
    grid = found.on_image(line, *which)
    down, across = (1.0, 1.0) if found.of_pixels else found.extent(line, *which)
    sizes = (grid.shape[1] / across, grid.shape[0] / down) * 2
    left, top, right, bottom = (edge * size for edge, size in zip(box, sizes, strict=True))
    rows, columns = torch.arange(grid.shape[0])[:, None], torch.arange(grid.shape[1])
    touched = (left < columns + 1) & (columns < right) & (top < rows + 1) & (rows < bottom)
    peaks = grid == grid.nan_to_num(-math.inf).max()
    return bool((peaks & touched).any()), float(touched.double().mean())


def _legend(results: Sequence[Relevance]) -> str:
    unit = str(results[0].provenance.get("metric_units") or "")
    parts = [f"{_metric(results[0])}{f', {kit.escaped(unit)}' if unit else ''}"]
    parts.append(
        f"<span style='color:{style.FOR}'>supports it</span>, <span style='color:{style.AGAINST}'>works against it</span>"
    )
    return "; ".join(parts)


def _heading(found: Relevance, panels: int) -> str:
    """The method, its settings smaller below, broken where a panel ends."""
    name, bracket, more = found.method.partition(" (")
    wide = [textwrap.wrap(part, max(12, letters // panels)) for part, letters in ((name, 120), (more.rstrip(")"), 140))]
    lines = [[kit.escaped(line) for line in part] for part in wide]
    return f"{'<br>'.join(lines[0])}<br><span style='font-size:{style.TINY}px'>{'<br>'.join(lines[1]) if bracket else ' '}</span>"


def _short(method: str) -> str:
    """The method without its settings, with a capital letter."""
    name = kit.escaped(method.partition(" (")[0])
    return name[:1].upper() + name[1:]


def together(result: Any, beside: Any, kind: str) -> list[Any]:
    """The results that one figure compares; InputError if one is of another kind."""
    parts = [[*one] if isinstance(one, Sequence) else [one] for one in (result, beside)]
    found = [*parts[0], *parts[1]]
    for one in found:
        if kind not in {cls.__name__ for cls in type(one).__mro__}:
            raise InputError(f"This figure compares results of the kind {kind}; {type(one).__name__} is none.")
    return found


def names_of(results: Sequence[Any]) -> list[str]:
    """Short names of the methods; whole ones where short ones are shared."""
    short = [_short(one.method) for one in results]
    whole = [kit.escaped(one.method[:1].upper() + one.method[1:]) for one in results]
    found = [one if short.count(one) == 1 else more for one, more in zip(short, whole, strict=True)]
    return [name if found.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(found, start=1)]


def _metric(found: Relevance) -> str:
    return kit.escaped(str(found.provenance.get("metric") or "the metric"))


def _per_row(given: Any, rows: Sequence[int], single: bool, name: str) -> list[Any]:
    if given is None:
        return [None] * len(rows)
    found = [given] if single else list(given)
    if len(found) != len(rows):
        raise InputError(f"Give one {name} per row: there are {len(rows)} rows and {len(found)} of them.")
    return [patches.as_picture(one) for one in found] if name == "picture" else found


def _as_shares(box: PixelBox, picture: Any) -> patches.Box:
    found = patches.as_shares(box, picture)
    assert found is not None
    return found
