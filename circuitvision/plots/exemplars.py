"""The exemplar sheet: what excites a unit most, as thumbnails with the winning patch marked."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitvision.errors import InputError
from circuitvision.plots import kit, patches, style

if TYPE_CHECKING:
    from circuitvision.readout.probes.max_activating import MaxActivatingExamples

_DEFAULT_UNITS = 3


def max_activating_examples(
    result: MaxActivatingExamples,
    units: Any = None,
    pictures: Sequence[Any] | Mapping[int, Any] | None = None,
    count: int = 8,
    title: str | None = None,
) -> kit.Figure:
    """A row per unit: its ``count`` strongest examples, the place where it was most active boxed, its value below.

    ``pictures`` are the images by example number (arrays ``[height width 3]`` of 0 … 255, or Pillow images); without them the values are drawn as
    bars. Without ``units`` the most selective are shown, or those of the largest values. Words stand in for patches where a unit reads text.

    Raises:
        InputError: a unit that is not in the index, no picture of an example shown, or a count below 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"count={count!r} must be a whole number of at least 1.")
    rows = _rows(result, units)
    if title is None:
        title = _finding(result, rows[0])
    if pictures is None:
        return _bars(result, rows, count, title)
    return _sheet(result, rows, pictures, min(count, result.values.shape[1]), title)


def _rows(result: MaxActivatingExamples, units: Any) -> list[int]:
    if units is not None:
        asked = [units] if isinstance(units, (int, str)) else list(units)
        if not asked:
            raise InputError("Name at least one unit.")
        return [result.row(unit) for unit in asked]
    order = result.values[:, 0].nan_to_num(-torch.inf)
    if int((result.class_counts > 0).sum()) > 1 and not bool(result.selectivity.isnan().all()):
        order = result.selectivity.nan_to_num(-torch.inf)
    return order.argsort(descending=True, stable=True)[:_DEFAULT_UNITS].tolist()


def _sheet(result: MaxActivatingExamples, rows: list[int], pictures: Any, count: int, title: str) -> kit.Figure:
    figure = kit.panels(len(rows), count, horizontal_spacing=0.012, vertical_spacing=0.16 / len(rows))
    for number, row in enumerate(rows, start=1):
        where = {"xref": "x domain", "yref": "y domain", "x": -0.12, "y": 0.5, "xanchor": "right", "align": "right"}
        figure.add_annotation(text="<br>".join(_lines(result, row)), showarrow=False, **where, row=number, col=1)
        for column in range(1, count + 1):
            _add_exemplar(figure, result, row, column - 1, pictures, number, column)
    height = 50 + int(len(rows) * (790 / count + 34))
    style.layout(figure, title, height, margin={"l": 170, "b": 40}, showlegend=False)
    return kit.bare(figure, visible=False)


def _add_exemplar(
    figure: kit.Figure, result: MaxActivatingExamples, unit: int, rank: int, pictures: Any, row: int, column: int
) -> None:
    example = int(result.example[unit, rank])
    try:
        given = pictures[example]
    except (IndexError, KeyError) as error:
        raise InputError(
            f"There is no picture of example {example}; pictures are indexed by the number of the example."
        ) from error
    placed = not bool(result.boxes[unit, rank].isnan().any())
    box: Any = tuple(result.boxes[unit, rank].tolist()) if placed else None
    patches.draw(figure, row, column, picture=patches.as_picture(given), box=box, color=style.FOR)
    text = f"{float(result.values[unit, rank]):.2f}".replace("-", kit.MINUS)
    if not placed and result.tokens[unit][rank]:
        text += f"<br>{html.escape(result.tokens[unit][rank])}"
    patches.below(figure, text, row, column, hovertext=f"example {example}, {result.tokens[unit][rank]}")


def _bars(result: MaxActivatingExamples, rows: list[int], count: int, title: str) -> kit.Figure:
    names = [_lines(result, row)[0] for row in rows]
    figure = kit.panels(1, len(rows), subplot_titles=names, horizontal_spacing=0.14)
    for column, row in enumerate(rows, start=1):
        labels = [
            f"{example} {html.escape(piece)}"
            for example, piece in zip(result.example[row, :count].tolist(), result.tokens[row], strict=False)
        ]
        kit.add_bars(figure, labels, result.values[row, : len(labels)].tolist(), row=1, column=column)
    style.layout(
        figure,
        title,
        66 + 26 * min(count, result.values.shape[1]),
        above=26,
        showlegend=False,
        bargap=0.35,
        margin={"l": 20},
    )
    figure.update_xaxes(gridcolor=style.FAINT, rangemode="tozero", zeroline=False)
    return figure


def _lines(result: MaxActivatingExamples, row: int) -> list[str]:
    """Name and summary of a unit."""
    lines = [f"<b>{result.unit_kind} {result.axes['unit'][row]}</b>", f"active at {float(result.active[row]):.0%}"]
    if int((result.class_counts > 0).sum()) > 1:
        value = float(result.selectivity[row])
        text = "" if value != value else f" ({value:.2f})"
        lines.append(f"{html.escape(str(result.preferred[row]))}{text}")
    return lines


def _finding(result: MaxActivatingExamples, row: int) -> str:
    name = f"{result.unit_kind.capitalize()} {result.axes['unit'][row]}"
    notes = [
        ", ".join(result.sites[:2]),
        f"{result.count} examples, {result.pool} over positions",
        result.interrupted or "",
    ]
    notes = [html.escape(note) for note in notes]
    if int((result.class_counts > 0).sum()) > 1 and not bool(result.selectivity[row].isnan()):
        value = f"selectivity {float(result.selectivity[row]):.2f}"
        return style.titled(f"{name} is highest on {html.escape(str(result.preferred[row]))}: {value}", *notes)
    said = f"{name} is active at {float(result.active[row]):.0%} of positions, at most {float(result.maximum[row]):.3g}"
    return style.titled(said, *notes)
