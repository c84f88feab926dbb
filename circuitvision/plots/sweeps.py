"""Figures of a sweep, in the metric's units: edits by their axes as a line or heat maps, a list of edits as bars of the strongest."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuitvision.errors import InputError
from circuitvision.model.sweeps.result import spelled_cell
from circuitvision.plots import style
from circuitvision.results import standard_error

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.model.sweeps.result import SweepResult

_SHORT = 60
"""Characters of a label beside its bar, and how many there may be where fewer do not tell two labels apart."""
_LONGEST = 80
MOST_PANELS = 12
"""How many heat maps a figure holds, and how many stand in a row."""
PANELS_IN_ROW = 4


def sweep(result: SweepResult, title: str | None = None, count: int = 12, metric: str | None = None) -> go.Figure:
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


def _mean(result: SweepResult) -> torch.Tensor:
    return result.effect.detach().cpu().double().nanmean(-1)


def _heading(result: SweepResult, title: str | None, mean: torch.Tensor) -> str:
    """The title, by default the strongest cell, above what a reader must know beside it."""
    metric, unit = _names(result)
    best = result.top(1)
    if title is None:
        title = "No edit has a value"
        if best:
            largest = max(float(mean.abs().nan_to_num(0.0).max()), 1e-12)
            title = f"{_escape(spelled_cell(best[0][0]))} moves {metric} most: {_signed(best[0][1], largest)}{unit}"
    return f"{title}<br><span style='font-size:12px'>{'; '.join(_notes(result, int(result.done.sum())))}</span>"


def _line(result: SweepResult, title: str | None) -> go.Figure:
    import plotly.graph_objects as go

    ((name, entries),) = result.grid.items()
    mean, error = _mean(result), standard_error(result.effect.detach().cpu())
    metric, unit = _names(result)
    labels = [str(entry) for entry in entries]
    figure = go.Figure(
        go.Scatter(
            x=labels,
            y=mean.tolist(),
            mode="lines+markers",
            line={"color": style.FOR, "width": 2},
            error_y={"array": error.nan_to_num(0.0).tolist(), "visible": result.clean.shape[-1] > 1, "thickness": 1.2},
            customdata=[_escape(label) for label in result.labels],
            hovertemplate=f"%{{customdata}}<br>%{{y:+.4g}}{unit}<extra></extra>",
        )
    )
    style.layout(figure, _heading(result, title, mean), 380, showlegend=False)
    figure.update_xaxes(title=name, type="category", showgrid=False, zeroline=False)
    figure.update_yaxes(
        title=f"change of {metric}{f',{unit}' if unit else ''}",
        gridcolor=style.FAINT,
        zeroline=True,
        zerolinecolor=style.GREY,
    )
    return figure


def _grid(result: SweepResult, title: str | None) -> go.Figure:
    from plotly.subplots import make_subplots

    *lead, down, across = result.grid
    mean = _mean(result)
    panels = mean if lead else mean[None]
    heads = [f"{lead[0]} {entry}" for entry in result.grid[lead[0]]] if lead else []
    columns = min(len(panels), PANELS_IN_ROW)
    rows = math.ceil(len(panels) / columns)
    figure = make_subplots(
        rows, columns, subplot_titles=[_escape(head) for head in heads], shared_xaxes=True, shared_yaxes=True,
        horizontal_spacing=0.03, vertical_spacing=0.12 / rows,
    )  # fmt: skip
    names = [_escape(name) for name in result.labels]
    width = panels.shape[2]
    for number, panel in enumerate(panels):
        first = number * panel.numel()
        labels = [names[first + row * width : first + (row + 1) * width] for row in range(len(panel))]
        place = {"row": number // columns + 1, "col": number % columns + 1}
        figure.add_trace(_map(result, panel, labels), **place)
        figure.update_xaxes(
            title=across if place["row"] == rows else None, type="category", showgrid=False, zeroline=False, **place
        )
        figure.update_yaxes(
            title=down if place["col"] == 1 else None, type="category", showgrid=False, zeroline=False, **place
        )
    limit = max(float(mean.abs().nan_to_num(0.0).max()), 1e-12)
    _, unit = _names(result)
    bar = {"title": f"change{f',{unit}' if unit else ''}", "thickness": 14, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": style.diverging(), "cmin": -limit, "cmax": limit, "colorbar": bar})
    height = min(max(34 * panels.shape[1], 120), 560 if rows == 1 else 300)
    style.layout(figure, _heading(result, title, mean), (230 if lead else 190) + rows * height)
    if lead:
        figure.update_layout(margin={"t": 120})
    return figure


def _map(result: SweepResult, panel: torch.Tensor, labels: list[list[str]]) -> go.Heatmap:
    import plotly.graph_objects as go

    *_, down, across = result.grid
    return go.Heatmap(
        z=panel.numpy(),
        x=[str(label) for label in result.grid[across]],
        y=[str(label) for label in result.grid[down]],
        coloraxis="coloraxis",
        xgap=2 if panel.shape[1] <= 40 else 0,
        ygap=2 if panel.shape[0] <= 40 else 0,
        customdata=labels,
        hovertemplate=f"%{{customdata}}<br>%{{z:+.4g}}{_names(result)[1]}<extra></extra>",
    )


def _names(result: SweepResult) -> tuple[str, str]:
    """The metric, and its unit with a space before it."""
    units = _escape(str(result.provenance.get("metric_units") or ""))
    return _escape(str(result.provenance.get("metric") or "the metric")), f" {units}" if units else ""


def _notes(result: SweepResult, shown: int) -> list[str]:
    """What a reader must know beside the figure: how many edits and examples, the unedited metric, an interruption."""
    there = int(torch.isfinite(result.effect).any(-1).sum())
    notes = [f"{shown} strongest of {there} edits" if shown < there else f"{there} edits"]
    if len(result.clean) > 1:
        notes.append(f"mean of {len(result.clean)} examples" + ("" if len(result.grid) > 1 else " ± standard error"))
    count = math.prod(result.values.shape[:-1])
    if there < count:
        notes.append(f"{count - there} without a value left out")
    notes.append(f"unedited {float(result.clean.double().nanmean()):.3g}".replace("-", "\N{MINUS SIGN}"))
    if result.interrupted:
        notes.append(f"interrupted by {_escape(_middle(result.interrupted, _SHORT))}")
    return notes


def _bars(result: SweepResult, title: str | None, count: int) -> go.Figure:
    import plotly.graph_objects as go

    effect = result.effect.detach().cpu().double().flatten(0, -2)
    there = torch.isfinite(effect).any(-1).nonzero().flatten()
    examples = effect.shape[1]
    means = effect[there].nanmean(-1)
    order = means.abs().argsort(descending=True, stable=True)[:count]
    shown, values = there[order], means[order].tolist()
    names = result.labels
    labels = [names[index] for index in shown.tolist()]
    short = [_escape(label) for label in shortened(labels)]
    errors = standard_error(effect[shown]).nan_to_num(0.0).tolist() if examples > 1 else [0.0] * len(values)
    metric, unit = _names(result)
    written = [_signed(value, max(map(abs, values))) for value in values]
    figure = go.Figure(
        go.Bar(
            x=values,
            y=list(range(len(values))),
            orientation="h",
            marker={"color": [style.FOR if value >= 0 else style.AGAINST for value in values], "line": {"width": 0}},
            error_x={"array": errors, "visible": examples > 1, "color": style.GREY, "thickness": 1.5, "width": 5},
            customdata=[[_escape(label), error] for label, error in zip(labels, errors, strict=True)],
            hovertemplate="%{customdata[0]}<br>%{x:+.4g}"
            + (" ± %{customdata[1]:.2g}" if examples > 1 else "")
            + f"{unit}<extra></extra>",
        )
    )
    for row, text in enumerate(written):
        figure.add_annotation(x=1, xref="paper", xanchor="left", xshift=10, y=row, text=text, showarrow=False)
    if title is None:
        title = f"No edit moves {metric}" if values else "No edit has a value"
        if any(values):
            title = f"{short[0]}<br>moves {metric} most: {written[0]}{unit}"
    heading = f"{title}<br><span style='font-size:12px'>{'; '.join(_notes(result, len(values)))}</span>"
    style.layout(figure, heading, 70 + 28 * max(len(values), 1), showlegend=False, bargap=0.35)
    _bar_axes(figure, short, f"change of {metric}{f',{unit}' if unit else ''}")
    return figure


def _bar_axes(figure: go.Figure, labels: Sequence[str], title: str) -> None:
    figure.update_layout(
        margin={"b": 50, "l": 10, "r": 75},
    )
    figure.update_xaxes(
        title={"text": title, "font": {"size": 13}},
        rangemode="tozero",
        gridcolor=style.FAINT,
        zeroline=True,
        zerolinecolor=style.GREY,
        zerolinewidth=1,
    )
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=list(labels),
        tickfont={"size": 12},
        autorange="reversed",
        automargin=True,
        showgrid=False,
        zeroline=False,
        ticklabelstandoff=6,
    )


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
