"""Figures of what a lens adds up to: lines over layers with chance, and how far plain and tuned lenses are from the output."""

from __future__ import annotations

import html
import itertools
from typing import TYPE_CHECKING, Any

from circuitvision.plots import style
from circuitvision.plots.attribution import nothing_found
from circuitvision.plots.lens import PALETTE
from circuitvision.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.lens.summaries import LensSummary
    from circuitvision.readout.lens.tuned import TunedLens


def summary(result: LensSummary, title: str | None = None) -> go.Figure:
    """A lens summary as lines over layers, one per target, source or head (the mean over positions, where it has any).

    Whiskers are the standard error over examples, the dotted line is chance.
    """
    import plotly.graph_objects as go

    drawn, labels, lines = _lines(result)
    figure = go.Figure()
    mean, error = drawn.mean(), drawn.error().nan_to_num(0.0)
    for index, name in enumerate(lines):
        figure.add_trace(
            go.Scatter(
                x=labels,
                y=mean[:, index].tolist(),
                error_y={"array": error[:, index].tolist(), "thickness": 1.5, "width": 4},
                name=html.escape(name or result.measure),
                mode="lines+markers",
                line={"width": 3, "color": PALETTE[index % len(PALETTE)]},
            )
        )
    if result.chance == result.chance:
        figure.add_hline(
            y=result.chance,
            line={"dash": "dot", "color": style.GREY},
            annotation_text="chance",
            annotation_font_color=style.GREY,
        )
    title = title or nothing_found(mean, "layer", "has a value other than 0")
    if title is None:
        ends = f"{_plain(mean[0, 0])} to {_plain(mean[-1, 0])}"
        of = f" of {html.escape(lines[0])}" if lines[0] else ""
        title = f"{result.tower}: {result.measure}{of} goes from {ends}"
    style.layout(figure, title, 360, showlegend=len(lines) > 1)
    figure.update_yaxes(title=result.measure, gridcolor=style.FAINT, zerolinecolor=style.FAINT)
    figure.update_xaxes(type="category", showgrid=False)
    return figure


def _lines(result: LensSummary) -> tuple[Result, list[str], list[str]]:
    """What is drawn, ``[layer line example]``, the names of layers (or sites), and of lines ("" for the only one)."""
    order, values = list(result.axes), result.values.double()
    if "position" in order:
        values = values.nanmean(order.index("position"))
        order.remove("position")
    depth = order[0] if "layer" not in order else "layer"
    inner = [name for name in order if name not in (depth, "example")]
    values = values.permute([order.index(name) for name in (depth, *inner, "example")])
    labels = [f"layer {label}" if isinstance(label, int) else str(label) for label in result.axes[depth]]
    named = [[f"head {label}" if name == "head" else str(label) for label in result.axes[name]] for name in inner]
    lines = [", ".join(parts) for parts in itertools.product(*named)]
    axes = {depth: labels, "line": lines, "example": result.axes["example"]}
    return Result(values.reshape(len(labels), len(lines), -1), axes), labels, lines


def tuned(result: TunedLens, title: str | None = None) -> go.Figure:
    """The loss on positions held out, layer by layer, of the plain and of the tuned lens."""
    import plotly.graph_objects as go

    labels = [f"layer {layer}" if isinstance(layer, int) else str(layer) for layer in result.axes["layer"]]
    figure = go.Figure()
    for index, (name, color) in enumerate(zip(result.axes["lens"], (style.AGAINST, style.FOR), strict=True)):
        figure.add_trace(
            go.Scatter(
                x=labels,
                y=result.values[index].tolist(),
                name=name,
                mode="lines+markers",
                line={"width": 3, "color": color},
            )
        )
    if title is None:
        gain = result.values[0] - result.values[1]
        best = int(gain.argmax())
        title = (
            f"At {labels[best]} the tuned lens is {float(result.values[1, best]):.2f} from the {result.tower} tower's output, "
            f"the plain one {float(result.values[0, best]):.2f}"
        )
    style.layout(figure, title, 340)
    figure.update_yaxes(
        title="KL to the output, nats", gridcolor=style.FAINT, rangemode="tozero", zerolinecolor=style.FAINT
    )
    figure.update_xaxes(type="category", showgrid=False)
    return figure


def _plain(value: Any) -> str:
    return f"{float(value):.2f}".replace("nan", "no value").replace("-", "\N{MINUS SIGN}")
