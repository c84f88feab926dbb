"""Figures of probes and of the geometry of activations: scores per layer beside their control, when predictions settle, components, similarity."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from circuitvision import findings
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from circuitvision.readout.probes.decisions import DecisionLayers
    from circuitvision.readout.probes.linear import ProbeResult
    from circuitvision.readout.probes.structure import CKAResult, PCAResult

_NAMED = {
    "red": "#e62828", "green": "#28b43c", "blue": "#2850e6", "yellow": "#f0dc28", "cyan": "#32d2dc", "orange": "#f58c1e", "purple": "#9632c8",
    "white": "#f5f5f5", "black": "#111111",
}  # fmt: skip
"""Labels that are colours are drawn in their colour."""
_PANELS_PER_ROW = 4
_ROOM = 0.12
"""Share of the axis that words below a band need."""
_LITTLE = 0.1
"""Below this share of the components' variance, labels are not what they show."""


def probe(result: ProbeResult | Mapping[str, ProbeResult], title: str | None = None) -> kit.Figure:
    """Held-out score per layer with its interval, a band for shuffled labels (mean ± 2 standard deviations) and a dashed line for chance.

    A mapping draws several probes over the same layers, each under its name.
    """
    several = isinstance(result, Mapping)
    results: dict[str, ProbeResult] = dict(result) if isinstance(result, Mapping) else {"held-out examples": result}
    figure = kit.Figure()
    for number, (name, own) in enumerate(results.items()):
        color = kit.color(number)
        _add_control(figure, own, color if several else style.GREY, f"{name}: " if several else "", not several)
        errors = ((own.values - own.low).tolist(), (own.high - own.values).tolist())
        kit.line(figure, list(map(str, own.layers)), own.values.tolist(), html.escape(name), color, errors=errors)
    first = next(iter(results.values()))
    grouped = f" in {first.independent} groups" if 0 < first.independent < len(first.held_out) else ""
    notes = [f"{len(first.held_out)} examples{grouped} held out, bars: 95% interval"]
    if first.shuffled.shape[1] > 1:
        notes.append(f"bands: {first.shuffled.shape[1]} shufflings of the labels ± 2 sd")
    notes.append("dashed: always the commonest label" if first.classes else "dashed: always the mean")
    heading = html.escape(title or _heading(results, several)).replace("&lt;br&gt;", "<br>")
    share = bool(first.classes)
    figure.update_layout(showlegend=several)
    unit = "right on held-out examples" if share else "R² on held-out examples"
    kit.finish_lines(figure, style.titled(heading, *notes), unit, x="layer", share=share, names=True)
    figure.update_yaxes(range=[-0.03, 1.05] if share else None, zeroline=False)
    return figure


def _add_control(figure: kit.Figure, result: ProbeResult, color: str, name: str, named: bool) -> None:
    layers, (low, high) = list(map(str, result.layers)), result.control_band
    if not bool(low.isnan().all()):
        kit.band(figure, layers, low.tolist(), high.tolist(), color, f"{name}shuffled labels")
        if named:
            # Below the band, where the line of chance does not run; above both where there is no room.
            room = not result.classes or float(low[-1]) > _ROOM
            figure.add_annotation(
                x=0.99, xref="paper", xanchor="right", y=float(low[-1]) if room else max(float(high[-1]), result.chance),
                yanchor="top" if room else "bottom", text="shuffled labels", showarrow=False, font={"size": style.SMALL},
            )  # fmt: skip
    kit.chance(figure, layers, [result.chance] * len(layers), "always the commonest label", color, showlegend=False)


def _heading(results: Mapping[str, ProbeResult], several: bool) -> str:
    """The earliest layer that is as good as the best, or that none is better than shuffled labels; of several probes in short."""
    if several:
        found = []
        for name, result in list(results.items())[:3]:
            told, layer = _earliest(result)
            place = f"{_score(result, float(result.values[layer]))} {_after(result.layers[layer])}"
            found.append(f"{name}: {place if told else 'not readable'}")
        return ";<br>".join("; ".join(found[first : first + 2]) for first in range(0, len(found), 2))
    (result,) = results.values()
    told, layer = _earliest(result)
    beside = ""
    if result.shuffled.shape[1]:
        beside = f", {_score(result, float(result.control[layer]))} with shuffled labels"
    value = _score(result, float(result.values[layer]))
    if not told:
        # With classes of unequal size, what is above its control may still be below the commonest label.
        beside = f"; always the commonest label scores {result.chance:.0%}" if result.classes else beside
        return f"No layer tells the {result.label_name}: {value} at most{beside}"
    right = " right" if result.classes else ""
    return f"The {result.label_name} can be read {_after(result.layers[layer])}: {value}{right}{beside}"


def _earliest(result: ProbeResult) -> tuple[bool, int]:
    """Whether the best layer is better than chance and shuffled labels, and the first layer that is as good, within its interval."""
    best = int(result.values.nan_to_num(-math.inf).argmax())
    told = bool(findings.readable(result).holds)
    value = float(result.values[best])
    floor = float(result.low[best].nan_to_num(value))
    return told, int((result.values >= floor).int().argmax()) if told else best


def _score(result: ProbeResult, value: float) -> str:
    return f"{value:.0%}" if result.classes else f"R² {value:.2f}".replace("-", "\N{MINUS SIGN}")


def _after(layer: Any) -> str:
    return "at the input" if layer == "input" else f"after layer {layer}" if isinstance(layer, int) else f"at {layer}"


def _place(layer: str) -> str:
    return "the input" if layer == "input" else f"layer {layer}" if layer.isdigit() else layer


def decisions(result: DecisionLayers, title: str | None = None) -> kit.Figure:
    """How many examples settle at each layer, right and wrong where the right answers are known, and how many never settle."""
    layers, never = list(map(str, result.layers[: len(result.layers) - result.k])), result.shares["never"]
    known, count = len(result.target) == len(result.values), len(result.values)
    groups = [("settles", result.settled(), style.AGAINST)]
    if known:
        groups = [("settles on the right answer", result.settled(wrong=False), style.AGAINST)]
        groups += [("settles on a wrong answer", result.settled(wrong=True), style.FOR)]
    figure = kit.Figure()
    for name, shares, color in groups:
        figure.add_bar(x=layers, y=shares.tolist(), name=name, marker={"color": color, "line": {"width": 0}})
    figure.add_bar(x=["never"], y=[never], name="never settles", marker={"color": style.GREY, "line": {"width": 0}})
    figure.update_traces(hovertemplate="%{x}: %{y:.1%}<extra>%{fullData.name}</extra>")
    if title is None:
        title = "No prediction settles"
        if result.median is not None:
            title = f"Half of the settled predictions are settled by {_place(layers[result.median])}"
            title += f"; {result.stable_but_wrong:.0%} of the settled are wrong" if known else ""
        title += f"; {never:.0%} never settle"
    heading = style.titled(
        title, f"settled: the same prediction for {result.k + 1} layers in a row", f"{count} examples"
    )
    options: dict[str, Any] = {"share": True, "names": True, "barmode": "stack", "bargap": 0.35}
    return kit.finish_lines(figure, heading, "share of examples", 280, x="settles at layer", **options)


def components(result: PCAResult, title: str | None = None) -> kit.Figure:
    """Scatter of the first two components, one panel per layer, coloured by label.

    Panels share no axes: each component is in its own units, and signs are fixed per layer.
    """
    layered = "layer" in result.axes
    layers = result.axes["layer"] if layered else [None]
    scores = result.values if layered else result.values[None]
    explained = result.explained if layered else result.explained[None]
    columns = min(len(layers), _PANELS_PER_ROW)
    rows = math.ceil(len(layers) / columns)
    figure = kit.panels(
        rows=rows,
        columns=columns,
        subplot_titles=[_panel_title(layer, shares) for layer, shares in zip(layers, explained, strict=True)],
        horizontal_spacing=0.03,
        vertical_spacing=0.16 / rows,
    )
    for number, own in enumerate(scores):
        across = own[0]
        down = own[1] if len(own) > 1 else torch.zeros_like(across)
        _add_points(figure, result, across, down, number // columns + 1, number % columns + 1, number == 0)
    height = int(66 + rows * (940 / columns if columns > 1 else 460) * 0.95)
    style.layout(figure, html.escape(title or _spread(result, layers)), height, above=44, margin={"l": 20, "b": 60})
    kit.bare(figure, showticklabels=False)
    figure.update_xaxes(zeroline=True, zerolinecolor=style.FAINT)
    figure.update_yaxes(zeroline=True, zerolinecolor=style.FAINT)
    legend = {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0, "itemsizing": "constant"}
    figure.update_layout(legend=legend)
    return figure


def _panel_title(layer: Any, shares: torch.Tensor) -> str:
    name = "" if layer is None else "input" if layer == "input" else f"layer {layer}"
    if bool(shares.isnan().all()):
        return style.titled(name, "all examples alike")
    return style.titled(name, " + ".join(f"{share:.0%}" for share in shares[:2].tolist()))


def _spread(result: PCAResult, layers: list[Any]) -> str:
    between = result.between.reshape(-1)
    kept = len(result.axes["component"])
    shown = f"the first {kept} components" if kept > 1 else "the first component"
    if result.labels and not bool(between.isnan().all()):
        best = int(between.nan_to_num(-1).argmax())
        if float(between[best]) < _LITTLE:
            return f"{shown[0].upper()}{shown[1:]} do not show the {result.label_name}: it makes up {float(between[best]):.0%} at most"
        place = "" if layers[best] is None else f" {_after(layers[best])}"
        return f"The {result.label_name} makes up {float(between[best]):.0%} of {shown}{place}"
    held = result.held.reshape(-1).nan_to_num(-1)
    best = int(held.argmax())
    place = "" if layers[best] is None else f" {_after(layers[best])}"
    return f"{shown[0].upper()}{shown[1:]} hold {float(held[best]):.0%} of the variance{place}"


def _add_points(
    figure: kit.Figure, result: PCAResult, across: torch.Tensor, down: torch.Tensor, row: int, column: int, first: bool
) -> None:
    """One layer's examples: a trace per label, or one whose colour is the label where these are numbers."""
    numbers = all(isinstance(label, float) for label in result.labels)
    labels = [None] if numbers else sorted(set(result.labels), key=str)
    named = all(str(label) in _NAMED for label in labels)
    for number, label in enumerate(labels):
        own = [n for n in range(len(across)) if numbers or result.labels[n] == label]
        paint: dict[str, Any] = {"color": _NAMED[str(label)] if named else kit.color(number)}
        if numbers:
            paint = {"color": style.AGAINST}
        if numbers and result.labels:
            bar = kit.color_bar(html.escape(result.label_name))
            paint = {"color": result.labels, "colorscale": "Viridis", "showscale": first, "colorbar": bar}
        said = [f"{n} {result.labels[n]}" if result.labels else str(n) for n in own]
        figure.add_scatter(
            x=across[own].tolist(), y=down[own].tolist(), mode="markers", name=html.escape(str(label)), legendgroup=str(label),
            showlegend=first and not numbers, marker={"size": 6, "opacity": 0.75, "line": {"width": 0.5, "color": style.GREY}, **paint},
            customdata=list(map(html.escape, said)), hovertemplate="example %{customdata}<extra></extra>", row=row, col=column,
        )  # fmt: skip


def cka(result: CKAResult, title: str | None = None) -> kit.Figure:
    """Heat map of linear CKA between sites; within one stream the title names where neighbours differ most."""
    from circuitvision.readout.probes.linear import layer_labels

    names, values = [result.axes["site"], result.axes["other"]], result.values
    labels = [list(map(str, layer_labels(own))) for own in names]
    towers = [own[0].partition(".")[0] for own in names]
    axes = [f"{tower if towers[0] != towers[1] else ''} layer".strip() for tower in towers]
    if title is None and result.same and len(values) > 1:
        steps = values.diagonal(1).nan_to_num(2.0)
        at = int(steps.argmin())
        title = f"The stream changes most between {_place(labels[0][at])} and {_place(labels[0][at + 1])}: CKA {float(steps[at]):.2f}"
    elif title is None:
        row, column = divmod(int(values.nan_to_num(-1.0).argmax()), values.shape[1])
        title = f"{_place(labels[0][row])} and {_place(labels[1][column])} (across) are most alike: CKA {float(values[row, column]):.2f}"
    words = (
        {"": [["" if v != v else f"{v:.2f}" for v in line] for line in values.tolist()]}
        if values.numel() <= kit.MOST_WORDS
        else False
    )
    figure = kit.heat(
        {"": values}, (axes[0], labels[0]), (axes[1], labels[1]), unit="CKA", limit=1.0, below_zero=False, words=words
    )
    return kit.finish_heat(figure, html.escape(title), len(values))
