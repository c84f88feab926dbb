"""Figures of a sweep, in the metric's units: edits by their axes as a line or heat maps, a list of edits as bars of the strongest."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuitvision.errors import InputError
from circuitvision.model.sweeps.result import spelled_cell
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from circuitvision.model.sweeps.result import SweepResult

_SHORT = 60
"""Characters of a label beside its bar, and how many there may be where fewer do not tell two labels apart."""
_LONGEST = 80
MOST_PANELS = 12
"""How many heat maps a figure holds, and how many stand in a row."""
PANELS_IN_ROW = 4
_MOST_COLUMNS = 32
"""Cells of a row of panels that have words in them, at most."""


def sweep(result: SweepResult, title: str | None = None, count: int = 12, metric: str | None = None) -> kit.Figure:
    """The mean effects by the axes of the sweep: a line for one, a heat map for two, heat maps side by side for three; where no axes were given bars
    of the ``count`` strongest edits.

    Of several metrics ``metric`` is shown, the first by default. Bands and whiskers are standard errors over examples. Labels leave out what all the
    shown edits have in common; hovering gives them in full. Edits without a value are left out, and the figure says so.

    Raises:
        InputError: no such metric, more than three axes, or more than :data:`MOST_PANELS` labels on the first of three.
    """
    shown = result.one(metric)
    axes = shown.grid
    if list(axes) == ["edit"]:
        return _bars(shown, title, count)
    if len(axes) > 3 or (len(axes) == 3 and len(next(iter(axes.values()))) > MOST_PANELS):
        sizes = " × ".join(f"{len(entries)} {name}" for name, entries in axes.items())
        raise InputError(
            f"A figure shows up to three axes, the first of three with up to {MOST_PANELS} labels; this sweep has {sizes}: sweep over fewer of them."
        )
    return _line(shown, title) if len(axes) == 1 else _grid(shown, title)


def _heading(result: SweepResult, title: str | None, mean: torch.Tensor) -> str:
    """The title, by default the strongest cell, above what a reader must know beside it."""
    metric, unit = _names(result)
    best = result.top(1)
    if title is None:
        title = "No edit has a value"
        if best:
            title = f"{_escape(spelled_cell(best[0][0]))} moves {metric} most: {_signed(best[0][1], kit.largest(mean))}{unit}"
    return style.titled(title, *_notes(result, int(result.done.sum())))


def _line(result: SweepResult, title: str | None) -> kit.Figure:
    ((name, entries),) = result.grid.items()
    mean, error = result.mean(quantity="effect"), result.error(quantity="effect")
    metric, unit = _names(result)
    spread = error.nan_to_num(0.0).tolist()
    figure = kit.Figure()
    kit.line(
        figure, map(str, entries), mean.tolist(), metric, style.FOR, errors=(spread, spread) if len(result.examples) > 1 else None,
        customdata=[_escape(label) for label in result.labels], hovertemplate=f"%{{customdata}}<br>%{{y:+.4g}}{unit}<extra></extra>",
    )  # fmt: skip
    style.layout(figure, _heading(result, title, mean), 320, showlegend=False, margin={"l": 64})
    figure.update_xaxes(title=name, type="category", showgrid=False, zeroline=False)
    figure.update_yaxes(title=_change(metric, unit), gridcolor=style.FAINT, zeroline=True, zerolinecolor=style.GREY)
    return figure


def _grid(result: SweepResult, title: str | None) -> kit.Figure:
    *lead, down, across = result.grid
    mean = result.mean(quantity="effect")
    grids = mean if lead else mean[None]
    columns = min(len(grids), PANELS_IN_ROW)
    rows = math.ceil(len(grids) / columns)
    figure = kit.panels(
        rows, columns, subplot_titles=[_escape(f"{lead[0]} {entry}") for entry in result.grid[lead[0]]] if lead else None,
        horizontal_spacing=0.08 / columns, vertical_spacing=0.24 / rows,
    )  # fmt: skip
    height, width = grids.shape[1:]
    names = [[_escape(name) for name in result.labels[at : at + width]] for at in range(0, mean.numel(), width)]
    unit, limit = _names(result)[1], kit.largest(mean)
    written = height * width <= kit.MOST_WORDS and columns * width <= _MOST_COLUMNS
    scale = style.legible(signed=True) if written else style.diverging()
    words = kit.in_words(grids.flatten(0, 1)) if written else None
    side = kit.axis(result.grid[down], down, room=24 if rows == 1 else 8, automargin=True)
    if down != "layer":
        side["range"] = side["range"][::-1]
    for number, grid in enumerate(grids):
        own = slice(number * height, (number + 1) * height)
        place = {"row": number // columns + 1, "column": number % columns + 1}
        at = {"row": place["row"], "col": place["column"]}
        kit.cells(
            figure, grid, scale, -limit, limit, words=words and words[own], **place, coloraxis="coloraxis",
            customdata=names[own], hovertemplate=f"%{{customdata}}<br>%{{z:+.4g}}{unit}<extra></extra>",
        )  # fmt: skip
        below = number + columns >= len(grids)
        figure.update_xaxes(
            **kit.axis(result.grid[across], across if below else None, room=32 // columns, tickangle=0), **at
        )
        outer = {} if place["column"] == 1 else {"title": None, "showticklabels": False}
        figure.update_yaxes(**{**side, **outer}, **at)
    figure.update_layout(coloraxis={"colorbar": kit.color_bar(f"change{f',{unit}' if unit else ''}")})
    tall = min(max(34 * height, 110), 600 if rows == 1 else 300)
    return style.layout(
        figure, _heading(result, title, mean), 70 + rows * tall + (rows - 1) * 60, above=26 * bool(lead)
    )


def _change(metric: str, unit: str) -> str:
    return f"change of {metric}{f',{unit}' if unit else ''}"


def _names(result: SweepResult) -> tuple[str, str]:
    """The metric, and its unit with a space before it."""
    units = _escape(str(result.provenance.get("metric_units") or ""))
    return _escape(str(result.provenance.get("metric") or "the metric")), f" {units}" if units else ""


def _notes(result: SweepResult, shown: int) -> list[str]:
    """What a reader must know beside the figure: how many edits and examples, the unedited metric, an interruption."""
    there = int(torch.isfinite(result.effect).any(-1).sum())
    notes = [f"{shown} strongest of {there} edits" if shown < there else f"{there} edits"]
    if len(result.examples) > 1:
        notes.append(f"mean of {len(result.examples)} examples" + ("" if len(result.grid) > 1 else " ± standard error"))
    count = math.prod(result.values.shape[:-1])
    if there < count:
        notes.append(f"{count - there} without a value left out")
    notes.append(f"unedited {float(result.mean(quantity='clean')):.3g}".replace("-", "\N{MINUS SIGN}"))
    if result.interrupted:
        notes.append(f"interrupted by {_escape(_middle(result.interrupted, _SHORT))}")
    return notes


def _bars(result: SweepResult, title: str | None, count: int) -> kit.Figure:
    mean, error = (found.flatten() for found in (result.mean(quantity="effect"), result.error(quantity="effect")))
    there = torch.isfinite(mean).nonzero().flatten()
    examples, means = len(result.examples), mean[there]
    order = means.abs().argsort(descending=True, stable=True)[:count]
    shown, values = there[order], means[order].tolist()
    names = result.labels
    labels = [names[index] for index in shown.tolist()]
    short = [_escape(label) for label in shortened(labels)]
    errors = error[shown].nan_to_num(0.0).tolist()
    metric, unit = _names(result)
    written = [_signed(value, max(map(abs, values))) for value in values]
    figure = kit.Figure()
    kit.add_bars(figure, short, values, errors=errors)
    figure.update_traces(
        error_x={"visible": examples > 1}, customdata=[[_escape(label), error] for label, error in zip(labels, errors, strict=True)],
        hovertemplate="%{customdata[0]}<br>%{x:+.4g}" + (" ± %{customdata[1]:.2g}" if examples > 1 else "") + f"{unit}<extra></extra>",
    )  # fmt: skip
    for row, text in enumerate(written):
        figure.add_annotation(x=1, xref="paper", xanchor="left", xshift=10, y=row, text=text, showarrow=False)
    if title is None:
        title = f"No edit moves {metric}" if values else "No edit has a value"
        if any(values):
            title = f"{short[0]}<br>moves {metric} most: {written[0]}{unit}"
    heading = style.titled(title, *_notes(result, len(values)))
    style.layout(
        figure, heading, 70 + 28 * max(len(values), 1), showlegend=False, bargap=0.35, margin={"l": 10, "r": 75}
    )
    figure.update_xaxes(
        title={"text": _change(metric, unit), "font": {"size": style.TEXT}}, rangemode="tozero", gridcolor=style.FAINT, zeroline=True,
        zerolinecolor=style.GREY, zerolinewidth=1,
    )  # fmt: skip
    figure.update_yaxes(ticklabelstandoff=6)
    return figure


def shortened(labels: Sequence[str]) -> list[str]:
    """Labels of edits without the arguments all of them share, then shortened in the middle, as little as it takes to tell them apart."""
    found = _without_shared(labels) if len(labels) > 1 else list(labels)
    for width in range(_SHORT, _LONGEST + 1, 4):
        short = [_middle(label, width) for label in found]
        if len(set(short)) == len(set(found)):
            break
    return short


def _without_shared(labels: Sequence[str]) -> list[str]:
    """``kind(…, what differs, …)`` for every edit of every label."""
    groups = [[_call(edit) for edit in _split(label, " + ")] for label in labels]
    shared = set.intersection(*({(kind, part) for kind, parts in group for part in parts} for group in groups))
    found = []
    for group in groups:
        edits = []
        for kind, parts in group:
            kept: list[str] = []
            for part in parts:
                if (kind, part) not in shared:
                    kept.append(part)
                elif kept[-1:] != ["…"]:
                    kept.append("…")
            edits.append(f"{kind}({', '.join(kept)})" if parts else kind)
        found.append(" + ".join(edits))
    return found if len(set(found)) == len(set(labels)) else list(labels)


def _call(edit: str) -> tuple[str, tuple[str, ...]]:
    """``kind(argument, argument)`` taken apart."""
    kind, bracket, rest = edit.partition("(")
    if not bracket or not rest.endswith(")"):
        return edit, ()
    return kind, tuple(_split(rest[:-1], ", "))


def _split(text: str, mark: str) -> list[str]:
    """Cut at a mark outside all brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and index >= start and text.startswith(mark, index):
            parts.append(text[start:index])
            start = index + len(mark)
    return [*parts, text[start:]]


def _middle(label: str, width: int) -> str:
    if len(label) <= width:
        return label
    tail = (width - 1) // 2
    return f"{label[: width - 1 - tail]}…{label[-tail:]}"


def _escape(text: str) -> str:
    return html.escape(text, quote=False)


def _signed(value: float, largest: float) -> str:
    """A number with a proper sign and as many decimals as give the largest three digits."""
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0
    text = f"{abs(value):.{decimals}f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else chr(0x2212)}{text}"
