"""Figures of what a lens adds up to: lines over layers with chance, and how far plain and tuned lenses are from the output."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from circuitvision.plots import kit, style
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.readout.lens.summaries import LensSummary
    from circuitvision.readout.lens.tuned import TunedLens


def summary(result: LensSummary, title: str | None = None) -> kit.Figure:
    """A lens summary as lines over layers, one per target, source or head (the mean over positions, where it has any).

    Whiskers are the standard error over examples, the dashed line is chance.
    """
    drawn, labels, lines = _lines(result)
    mean, error, count = drawn.mean(), drawn.error(), len(drawn.examples)
    figure = kit.Figure()
    for index, name in enumerate(lines):
        color, own = kit.color(index), error[:, index].nan_to_num(0.0).tolist()
        name = kit.escaped(name or result.measure)
        kit.line(figure, labels, mean[:, index].tolist(), name, color, errors=(own, own) if count > 1 else None)
    if result.chance == result.chance:
        kit.chance(figure, labels, [result.chance] * len(labels))
    title = title or kit.nothing_found(mean, "layer", "has a value other than 0")
    if title is None:
        first, last = (
            f"{value:.2f}".replace("nan", "no value").replace("-", kit.MINUS) for value in mean[[0, -1], 0].tolist()
        )
        of = f" of {kit.escaped(lines[0])}" if lines[0] else ""
        title = f"{result.tower}: {result.measure}{of} goes from {first} to {last}"
    figure.update_layout(showlegend=len(figure.data) > 1)
    return kit.finish_lines(figure, title, result.measure, names=True)


def _lines(result: LensSummary) -> tuple[Result, list[str], list[str]]:
    """What is drawn, ``[layer line example]``, the names of layers (or sites), and of lines ("" for the only one)."""
    result = result.over_positions()
    order, values = list(result.axes), result.values.double()
    depth = order[0] if "layer" not in order else "layer"
    inner = [name for name in order if name not in (depth, "example")]
    values = values.permute([order.index(name) for name in (depth, *inner, "example")])
    named = [[f"head {label}" if name == "head" else str(label) for label in result.axes[name]] for name in inner]
    lines = [", ".join(parts) for parts in itertools.product(*named)]
    labels = [kit.layer_name(label) for label in result.axes[depth]]
    axes = {depth: labels, "line": lines, "example": result.axes["example"]}
    return Result(values.reshape(len(labels), len(lines), -1), axes), labels, lines


def tuned(result: TunedLens, title: str | None = None) -> kit.Figure:
    """The loss on positions held out, layer by layer, of the plain and of the tuned lens."""
    labels = [kit.layer_name(layer) for layer in result.axes["layer"]]
    figure = kit.Figure()
    for values, name, color in zip(result.values, result.axes["lens"], (style.AGAINST, style.FOR), strict=True):
        kit.line(figure, labels, values.tolist(), name, color)
    plain, own = result.values
    best = int((plain - own).argmax())
    ends = f"{float(own[best]):.2f} from the {result.tower} tower's output, the plain one {float(plain[best]):.2f}"
    said = f"At {labels[best]} the tuned lens is {ends}"
    kit.finish_lines(figure, title or said, "KL to the output, nats", names=True)
    figure.update_yaxes(rangemode="tozero")
    return figure
