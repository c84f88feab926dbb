"""Figures of a sweep, in the metric's units: a grid of edits as a heat map, a list of edits as bars of the strongest."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuitvision.plots import style
from circuitvision.results import standard_error

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.model.sweep import SweepResult

_SHORT = 60
"""Characters of a label beside its bar, and how many there may be where fewer do not tell two labels apart."""
_LONGEST = 80


def sweep(result: SweepResult, title: str | None = None, count: int = 12) -> go.Figure:
    """A heat map of mean effects where the sweep has two axes, else bars of the ``count`` strongest edits.

    Whiskers are standard errors over examples. Labels leave out what all the shown edits have in common; hovering gives them in full. Edits without
    a value are left out, and the figure says so.
    """
    return _grid(result, title) if len(result.axes) == 3 else _bars(result, title, count)


def _grid(result: SweepResult, title: str | None) -> go.Figure:
    import plotly.graph_objects as go

    down, across, _ = result.axes
    mean = result.effect.detach().cpu().double().nanmean(-1)
    limit = max(float(mean.abs().nan_to_num(0.0).max()), 1e-12)
    metric, unit = _names(result)
    if title is None:
        row, column = divmod(int(mean.abs().nan_to_num(-1.0).argmax()), mean.shape[1])
        place = f"{down} {result.axes[down][row]}, {across} {result.axes[across][column]}"
        title = f"{_escape(place)} moves {metric} most: {_signed(float(mean[row, column]), limit)}{unit}"
    names = result.labels
    labels = [[_escape(names[r * mean.shape[1] + c]) for c in range(mean.shape[1])] for r in range(mean.shape[0])]
    figure = go.Figure(
        go.Heatmap(
            z=mean.numpy(),
            x=[str(label) for label in result.axes[across]],
            y=[str(label) for label in result.axes[down]],
            colorscale=style.diverging(),
            zmin=-limit,
            zmax=limit,
            xgap=2 if mean.shape[1] <= 40 else 0,
            ygap=2 if mean.shape[0] <= 40 else 0,
            customdata=labels,
            hovertemplate=f"%{{customdata}}<br>%{{z:+.4g}}{unit}<extra></extra>",
            colorbar={"title": f"change{f',{unit}' if unit else ''}", "thickness": 14, "outlinewidth": 0},
        )
    )
    heading = f"{title}<br><span style='font-size:12px'>{'; '.join(_notes(result, int(result.done.sum())))}</span>"
    style.layout(figure, heading, 70 + min(max(34 * mean.shape[0], 120), 560))
    figure.update_xaxes(title=across, type="category", showgrid=False, zeroline=False)
    figure.update_yaxes(title=down, type="category", showgrid=False, zeroline=False)
    return figure


def _names(result: SweepResult) -> tuple[str, str]:
    """The metric, and its unit with a space before it."""
    units = _escape(str(result.provenance.get("metric_units") or ""))
    return _escape(str(result.provenance.get("metric") or "the metric")), f" {units}" if units else ""


def _notes(result: SweepResult, shown: int) -> list[str]:
    """What a reader must know beside the figure: how many edits and examples, the unedited metric, an interruption."""
    there = int(torch.isfinite(result.effect).any(-1).sum())
    notes = [f"{shown} strongest of {there} edits" if shown < there else f"{there} edits"]
    if len(result.clean) > 1:
        notes.append(f"mean of {len(result.clean)} examples" + (" ± standard error" if len(result.axes) != 3 else ""))
    count = math.prod(result.values.shape[:-1])
    if there < count:
        notes.append(f"{count - there} without a value left out")
    notes.append(f"unedited {float(result.clean.double().mean()):.3g}".replace("-", "\N{MINUS SIGN}"))
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
