"""Figures of a sweep, in the metric's units: edits by their axes as a line or heat maps, a list of edits as bars of the strongest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuitvision.errors import InputError
from circuitvision.incremental.sweeps.result import spelled_cell
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from circuitvision.incremental.sweeps.result import SweepResult
    from circuitvision.patching.knockout import Knockout

_SHORT = 60
"""Characters of a label beside its bar, and how many there may be where fewer do not tell two labels apart."""
_LONGEST = 80
MOST_PANELS = 12
"""How many heat maps a figure holds, and how many stand in a row."""
PANELS_IN_ROW = 4


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
            title = f"{kit.escaped(spelled_cell(best[0][0]))} moves {metric} most: {_signed(best[0][1], kit.largest(mean))}{unit}"
    return style.titled(title, *_notes(result, int(result.done.sum())))


def _line(result: SweepResult, title: str | None) -> kit.Figure:
    ((name, entries),) = result.grid.items()
    mean, error = result.mean(quantity="effect"), result.error(quantity="effect")
    metric, unit = _names(result)
    spread = error.nan_to_num(0.0).tolist()
    figure = kit.Figure()
    kit.line(
        figure, map(str, entries), mean.tolist(), metric, style.FOR, errors=(spread, spread) if len(result.examples) > 1 else None,
        customdata=[kit.escaped(label) for label in result.labels], hovertemplate=f"%{{customdata}}<br>%{{y:+.4g}}{unit}<extra></extra>",
    )  # fmt: skip
    style.layout(figure, _heading(result, title, mean), 320, showlegend=False, margin={"l": 64})
    figure.update_xaxes(title=name, type="category", showgrid=False, zeroline=False)
    figure.update_yaxes(title=_change(metric, unit), gridcolor=style.FAINT, zeroline=True, zerolinecolor=style.GREY)
    return figure


def _grid(result: SweepResult, title: str | None) -> kit.Figure:
    *lead, down, across = result.grid
    mean, unit = result.mean(quantity="effect"), _names(result)[1]
    panels = [f"{lead[0]} {entry}" for entry in result.grid[lead[0]]] if lead else [""]
    size, width = mean.numel() // len(panels), mean.shape[-1]
    labels = [kit.escaped(label) for label in result.labels]
    names = {
        name: [labels[at : at + width] for at in range(number * size, (number + 1) * size, width)]
        for number, name in enumerate(panels)
    }
    figure = kit.heat(
        dict(zip(panels, mean if lead else mean[None], strict=True)), (down, result.grid[down]), (across, result.grid[across]),
        unit=unit.strip(), bar=f"change{f',{unit}' if unit else ''}", names=names, listed=down != "layer", in_row=PANELS_IN_ROW,
    )  # fmt: skip
    rows = math.ceil(len(panels) / PANELS_IN_ROW)
    return kit.finish_heat(figure, _heading(result, title, mean), mean.shape[-2], rows)


def _change(metric: str, unit: str) -> str:
    return f"change of {metric}{f',{unit}' if unit else ''}"


def _names(result: SweepResult) -> tuple[str, str]:
    """The metric, and its unit with a space before it."""
    units = kit.escaped(str(result.provenance.get("metric_units") or ""))
    return kit.escaped(str(result.provenance.get("metric") or "the metric")), f" {units}" if units else ""


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
        notes.append(f"interrupted by {kit.escaped(_middle(result.interrupted, _SHORT))}")
    return notes


def _bars(result: SweepResult, title: str | None, count: int) -> kit.Figure:
    mean, error = (found.flatten() for found in (result.mean(quantity="effect"), result.error(quantity="effect")))
    there = torch.isfinite(mean).nonzero().flatten()
    shown = there[mean[there].abs().argsort(descending=True, stable=True)[:count]]
    values, errors = mean[shown].tolist(), error[shown].nan_to_num(0.0).tolist()
    labels = [result.labels[index] for index in shown.tolist()]
    short = [kit.escaped(label) for label in shortened(labels)]
    metric, unit = _names(result)
    written = [_signed(value, max(map(abs, values))) for value in values]
    if title is None:
        title = f"No edit moves {metric}" if values else "No edit has a value"
        if any(values):
            title = f"{short[0]}<br>moves {metric} most: {written[0]}{unit}"
    heading = style.titled(title, *_notes(result, len(values)))
    spread = [f" (± {one:.2g}{unit})" if len(result.examples) > 1 else "" for one in errors]
    return kit.bars(
        short, values, heading, _change(metric, unit), words=written, errors=errors if len(result.examples) > 1 else None,
        hover=[kit.escaped(label) + more for label, more in zip(labels, spread, strict=True)],
    )  # fmt: skip


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


def _signed(value: float, largest: float) -> str:
    """A number with a proper sign and as many decimals as give the largest three digits."""
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0
    text = f"{abs(value):.{decimals}f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else chr(0x2212)}{text}"


def knockout(result: Knockout, title: str | None = None, metric: str | None = None) -> kit.Figure:
    """The change of the metric as each route is blocked, a line over windows of layers for each, controls as a grey band (lowest to highest mean).

    Results by head or step are heat maps, as of a sweep; all layers at once are bars.
    """
    shown = result.one(metric)
    if {"head", "step"} & set(shown.axes) or len(shown.axes["layer"]) == 1:
        return sweep(shown, title)
    mean = shown.mean(quantity="effect")
    name, unit = _names(shown)
    layers = list(map(str, shown.axes["layer"]))
    figure = kit.Figure()
    drawn = [shown.index_of("route", label) for labels in shown.controls.values() for label in labels]
    if drawn:
        band = mean[drawn]
        edges = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=layers, y=band.nan_to_num(0.0).amin(0).tolist(), **edges)
        figure.add_scatter(
            x=layers, y=band.nan_to_num(0.0).amax(0).tolist(), fill="tonexty", fillcolor="rgba(128,128,128,0.3)",
            **{**edges, "showlegend": True, "name": "as many random keys"},
        )  # fmt: skip
    error = shown.error(quantity="effect").nan_to_num(0.0)
    for number, route in enumerate(shown.routes):
        row = shown.index_of("route", route)
        spread = error[row].tolist()
        kit.line(
            figure, layers, mean[row].tolist(), kit.escaped(route), kit.color(number), errors=(spread, spread) if len(shown.examples) > 1 else None,
        )  # fmt: skip
    own = mean[[shown.index_of("route", route) for route in shown.routes]].nan_to_num(0.0)
    row, column = divmod(int(own.abs().argmax()), own.shape[1])
    where, cost = f"layer {layers[column]}", _signed(float(own[row, column]), kit.largest(own))
    lead = f"Blocking “{kit.escaped(shown.routes[row])}” at {where} moves {name} most: {cost}{unit}"
    if not bool(own.any()):
        lead = f"No blocked route moves {name}"
    together = f"{shown.window} layers at a time" if shown.window != 1 else "one layer at a time"
    heading = style.titled(title or lead, together, *_notes(shown, int(shown.done.sum()))[1:])
    style.layout(figure, heading, 340, margin={"l": 64})
    figure.update_xaxes(title=f"layer of the {shown.tower} tower", type="category", showgrid=False, zeroline=False)
    figure.update_yaxes(title=_change(name, unit), gridcolor=style.FAINT, zeroline=True, zerolinecolor=style.GREY)
    return figure
