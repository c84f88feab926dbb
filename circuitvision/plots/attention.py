"""Figures of attention in numbers: layers × heads, shares per layer, profiles by distance, patterns by offset.

Maps over the picture are in ``attention_overlay.py``; ``overlay``, ``contrast`` and ``rollout`` can be had from here. Examples are averaged for
display; what uniform attention would give is drawn beside or named in the title.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.names import head_name
from circuitvision.plots import patches, style
from circuitvision.plots.attention_overlay import contrast, overlay, rollout
from circuitvision.plots.attention_parts import escaped, head_labels, heads_panel, percent, sequential

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.attention.distance import DistanceProfile, PositionPattern
    from circuitvision.readout.attention.mass import AttentionSummary

__all__ = ["contrast", "distance", "offsets", "overlay", "rollout", "spans", "summary"]

_ALL = "everything"
_COLORS = ("#d9480f", "#2f6fdb", "#2b8a3e", "#9c36b5", "#b27300", "#0c8599", "#c2255c")
_OF_KIND = {"patch": "#d9480f", "text": "#2f6fdb", "cls": "#2b8a3e", "register": "#9c36b5", "other": style.GREY}
_MOST_PANELS = 6


def summary(result: AttentionSummary, *, span: str | None = None, title: str | None = None) -> go.Figure:
    """Heat maps of layers × heads, one per span (or of one ``span``), averaged over examples; entropies and peaks have one.

    Shares are coloured from 0 to 1, entropies up to that of uniform attention.
    """
    from plotly.subplots import make_subplots

    values, uniform, names = _panels(result, span)
    figure = make_subplots(
        rows=1,
        cols=len(names),
        subplot_titles=list(map(escaped, names)) if len(names) > 1 else None,
        horizontal_spacing=0.05,
    )
    nats = result.measure == "entropy"
    top = float(torch.nan_to_num(uniform, nan=0.0).max()) if nats else 1.0
    for column in range(len(names)):
        heads_panel(
            figure,
            values[..., column],
            result.axes,
            column + 1,
            top,
            as_share=not nats,
            unread=result.unread,
            first=column == 0,
            panels=len(names),
        )
        axis = str(column + 1) if column else ""
        for label in head_labels(values[..., column], top, axis, as_share=not nats, panels=len(names)):
            figure.add_annotation(**label)
    heading = title or _finding(result, values, uniform, names)
    style.layout(figure, heading, _height(values.shape[0]), margin={"l": 60, "r": 20, "t": 96, "b": 50})
    bar: dict[str, Any] = {"thickness": 14, "outlinewidth": 0, "title": "nats" if nats else "share"}
    if not nats:
        bar["tickformat"] = ".0%"
    scale = {"colorscale": sequential(), "cmin": 0, "cmax": max(top, 1e-9), "colorbar": bar}
    figure.update_layout(coloraxis=scale)
    return figure


def _panels(result: AttentionSummary, span: str | None) -> tuple[Tensor, Tensor, list[str]]:
    """Means over examples ``[layer head panel]``, of uniform attention ``[layer panel]``, and the panels' names."""
    if span is not None:
        result = result.span(span)
    values, uniform = result.mean(), result.mean(quantity="uniform")
    if "span" not in result.axes:
        return values[..., None], uniform[..., None], [span or result.measure]
    shown = [index for index, name in enumerate(result.axes["span"]) if name != _ALL][:_MOST_PANELS]
    names = [str(result.axes["span"][index]) for index in shown]
    return values[..., shown], uniform[..., shown], names


def _finding(result: AttentionSummary, values: Tensor, uniform: Tensor, names: list[str]) -> str:
    if not bool(torch.isfinite(values).any()):
        return f"No head of the {result.tower} tower has a value"
    if result.measure == "entropy":
        layer, head = divmod(int(values[..., 0].nan_to_num(math.inf).argmin()), values.shape[1])
        keys, alike = values[layer, head, 0].exp().item(), uniform[layer, 0].exp().item()
        return (
            f"{_head(result, layer, head)} has the narrowest attention<br><span style='font-size:12px'>spread over "
            f"{_plain(keys)} keys (exp of its entropy), of {_plain(alike)} it can look at</span>"
        )
    if result.measure == "relative entropy":
        layer, head = divmod(int(values[..., 0].nan_to_num(math.inf).argmin()), values.shape[1])
        return (
            f"{_head(result, layer, head)} has the narrowest attention<br><span style='font-size:12px'>its entropy is "
            f"{percent(values[layer, head, 0].item())} of what looking at all visible keys alike has; {_rows(result)}</span>"
        )
    above = (values - uniform[:, None]).nan_to_num(-math.inf)
    flat = int(above.argmax())
    layer, rest = divmod(flat, values.shape[1] * values.shape[2])
    head, panel = divmod(rest, values.shape[2])
    share, alike = values[layer, head, panel].item(), uniform[layer, panel].item()
    where = _head(result, layer, head)
    if result.measure == "peak":
        return (
            f"{where} peaks inside the region in {share:.0%} of examples"
            f"<br><span style='font-size:12px'>by chance {alike:.0%}; {_rows(result)}</span>"
        )
    span = names[panel] if "span" in result.axes else result.provenance.get("span", names[panel])
    return (
        f"{where} gives {percent(share)} of its attention to {escaped(span)}"
        f"<br><span style='font-size:12px'>looking at all keys alike: {percent(alike)}; {_rows(result)}</span>"
    )


def _head(result: Any, layer: int, head: int) -> str:
    return head_name(result.axes["layer"][layer], result.axes["head"][head], result.tower)


def _rows(result: Any) -> str:
    count = len(result.examples)
    queries = f"queries: {escaped(result.queries)}" if result.queries and result.queries != "default" else ""
    return "; ".join(part for part in (f"mean of {count} examples" if count > 1 else "1 example", queries) if part)


def _plain(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def _height(layers: int) -> int:
    return 180 + min(max(44 * layers, 110), 560)


def spans(result: AttentionSummary, *, title: str | None = None) -> go.Figure:
    """Stacked bars: of each layer the share of attention that each span gets, averaged over heads and examples, and uniform attention below.

    What no span covers is "other". Raises InputError for a result without spans, and for spans that overlap.
    """
    import plotly.graph_objects as go

    if "span" not in result.axes:
        raise InputError("Stacked bars show shares of spans: take a result of attention_mass.")
    names = [name for name in result.axes["span"] if name != _ALL]
    index = [result.axes["span"].index(name) for name in names]
    values = result.mean()[..., index].nanmean(1)
    alike = result.mean(quantity="uniform")[..., index].mean(0, keepdim=True)
    rows = torch.cat([values, alike]).nan_to_num(0.0)
    if float(rows.sum(-1).max()) > 1.001:
        raise InputError(
            "These spans overlap: they get more than all of the attention. Stack spans without common keys."
        )
    labels = [f"layer {layer}{' (unread)' if layer in result.unread else ''}" for layer in result.axes["layer"]]
    labels.append("all alike")
    if bool((rows.sum(-1) < 0.999).any()):
        rows, names = torch.cat([rows, 1 - rows.sum(-1, keepdim=True)], dim=-1), [*names, "other"]
    figure = go.Figure()
    free = itertools.cycle(color for color in _COLORS if color not in {_OF_KIND.get(str(name)) for name in names})
    for number, name in enumerate(names):
        shares = rows[:, number].tolist()
        color = _OF_KIND.get(str(name)) or next(free)
        figure.add_bar(
            y=labels,
            x=shares,
            name=escaped(name),
            orientation="h",
            marker={"color": color, "opacity": [1.0] * (len(labels) - 1) + [0.7], "line": {"width": 0}},
            text=[f"{share:.0%}" if share >= 0.06 else "" for share in shares],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont={"color": "#ffffff"},
            hovertemplate=f"{escaped(name)} %{{x:.1%}}<extra>%{{y}}</extra>",
        )
    above = (rows[:-1] - rows[-1:])[:, : len(index)]
    layer, span = divmod(int(above.argmax()), above.shape[1])
    heading = title or (
        f"Layer {result.axes['layer'][layer]} of the {result.tower} tower gives {percent(float(rows[layer, span]))} of its attention "
        f"to {escaped(names[span])}<br><span style='font-size:12px'>mean of {len(result.axes['head'])} heads, {_rows(result)}; "
        "“all alike”: what a head gives that looks at every key alike</span>"
    )
    style.layout(figure, heading, 150 + 34 * len(labels), barmode="stack", bargap=0.25)
    figure.update_layout(
        margin={"t": 110, "l": 110}, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "traceorder": "normal"}
    )
    figure.update_layout(title={"y": 1.0, "yref": "container", "yanchor": "top", "pad": {"t": 34}})
    figure.update_xaxes(range=[0, 1], tickformat=".0%", gridcolor=style.FAINT, zeroline=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def distance(result: DistanceProfile, *, title: str | None = None) -> go.Figure:
    """Left: share of attention by distance, a line per head, coloured by layer, and beside it the keys that are no patches. Right: the mean distance
    of every head. Dashed: uniform attention."""
    from plotly.subplots import make_subplots

    labels = result.axes["distance"]
    rings = sum(isinstance(label, int) for label in labels)
    values, means = result.mean(), result.mean(quantity="mean_distance")
    alike, alike_mean = result.mean(quantity="uniform"), result.mean(quantity="uniform_distance")
    figure = make_subplots(rows=1, cols=2, column_widths=[0.66, 0.34], horizontal_spacing=0.1)
    colors = _ramp(values.shape[0])
    for layer, name in enumerate(result.axes["layer"]):
        for head in range(values.shape[1]):
            shares = values[layer, head].tolist()
            hover = f"{head_name(name, result.axes['head'][head], result.tower)}: %{{y:.1%}}<extra></extra>"
            common = {"legendgroup": str(name), "name": f"layer {name}", "hovertemplate": hover}
            line = {"color": colors[layer], "width": 1.5}
            figure.add_scatter(
                x=list(range(rings)), y=shares[:rings], mode="lines", line=line, showlegend=head == 0, **common,
                row=1, col=1,
            )  # fmt: skip
            figure.add_scatter(
                x=list(range(rings, len(labels))), y=shares[rings:], mode="markers", showlegend=False, **common,
                marker={"color": colors[layer], "size": 7, "opacity": 0.8}, row=1, col=1,
            )  # fmt: skip
        spread = [layer + 0.5 * (head / max(values.shape[1] - 1, 1) - 0.5) for head in range(values.shape[1])]
        figure.add_scatter(
            x=spread,
            y=means[layer].tolist(),
            mode="markers",
            marker={"color": colors[layer], "size": 9, "opacity": 0.85},
            showlegend=False,
            customdata=result.axes["head"],
            hovertemplate=f"layer {name} head %{{customdata}}: %{{y:.2f}} patches<extra></extra>",
            row=1,
            col=2,
        )
    _add_alike(figure, alike.mean(0).tolist(), alike_mean.tolist(), rings, len(labels))
    heading = title or _distance_finding(result, means, alike_mean)
    style.layout(figure, heading, 400, legend={"orientation": "h", "y": -0.22, "x": 0.0}, margin={"t": 80, "b": 90})
    figure.update_xaxes(
        title=f"{result.metric} distance in patches",
        tickvals=list(range(len(labels))),
        ticktext=[str(label) for label in labels],
        gridcolor=style.FAINT,
        zeroline=False,
        row=1,
        col=1,
    )
    layers = [f"{name}{' (unread)' if name in result.unread else ''}" for name in result.axes["layer"]]
    figure.update_xaxes(
        title="layer", tickvals=list(range(len(layers))), ticktext=layers, showgrid=False, zeroline=False, row=1, col=2
    )
    figure.update_yaxes(title="share of attention", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="mean distance", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(gridcolor=style.FAINT, zeroline=False)
    return figure


def _add_alike(figure: go.Figure, profile: list[float], means: list[float], rings: int, count: int) -> None:
    dashed = {
        "line": {"color": style.GREY, "dash": "dash", "width": 2},
        "name": "all alike",
        "legendgroup": "all alike",
    }
    figure.add_scatter(x=list(range(rings)), y=profile[:rings], mode="lines", **dashed, row=1, col=1)
    if count > rings:
        figure.add_scatter(
            x=list(range(rings, count)), y=profile[rings:], mode="markers", showlegend=False, legendgroup="all alike",
            name="all alike", marker={"color": style.GREY, "size": 9, "symbol": "line-ew", "line": {"width": 2}},
            row=1, col=1,
        )  # fmt: skip
    figure.add_scatter(x=list(range(len(means))), y=means, mode="lines", **dashed, showlegend=False, row=1, col=2)


def _distance_finding(result: DistanceProfile, means: Tensor, alike: Tensor) -> str:
    of_layer = means.nanmean(-1)
    if not bool(torch.isfinite(of_layer).any()):
        return f"No patch of the {result.tower} tower looks at patches"
    names = result.axes["layer"]
    read = torch.tensor([math.nan if name in result.unread else 0.0 for name in names]).double()
    of_layer = of_layer + read if bool(torch.isfinite(of_layer + read).any()) else of_layer
    near, far = int(of_layer.nan_to_num(math.inf).argmin()), int(of_layer.nan_to_num(-math.inf).argmax())
    low, high = f"{of_layer[near]:.1f}", f"{of_layer[far]:.1f}"
    text = f"Patches look {low} patches far in layer {names[near]} and {high} in layer {names[far]}"
    if low == high:
        text = f"Patches look {low} patches far in {'every layer' if len(names) > 1 else f'layer {names[0]}'}"
    return (
        f"{text}<br><span style='font-size:12px'>mean over heads of the {result.tower} tower; looking at all patches "
        f"alike: {alike.nanmean():.1f}</span>"
    )


def offsets(result: PositionPattern, *, count: int = 6, title: str | None = None) -> go.Figure:
    """Mean attention by offset from the query patch (the marked centre), of the ``count`` heads whose attention the offset explains best.

    Every panel has its own colours, from 0 to the head's largest mean.
    """
    from plotly.subplots import make_subplots

    explained = result.explained.double().nan_to_num(-1.0).flatten()
    order = [int(i) for i in explained.argsort(descending=True, stable=True)[:count] if explained[i] >= 0]
    if not order:
        raise InputError("No head of this result has attention that differs between patches; there is nothing to draw.")
    pairs = [divmod(index, result.values.shape[1]) for index in order]
    names = [
        f"{head_name(result.axes['layer'][layer], result.axes['head'][head], result.tower)}<br><span style='font-size:12px'>"
        f"{explained[index]:.0%} explained{', unread' if result.axes['layer'][layer] in result.unread else ''}</span>"
        for index, (layer, head) in zip(order, pairs, strict=True)
    ]
    figure = make_subplots(rows=1, cols=len(order), subplot_titles=names, horizontal_spacing=0.03)
    rows, columns = result.axes["drow"], result.axes["dcol"]
    for column, (layer, head) in enumerate(pairs, start=1):
        grid = result.values[layer, head].double()
        patches.add_map(
            figure, grid.numpy(), 1, column, colorscale=sequential(), zmin=0, zmax=float(grid.nan_to_num(0.0).max()),
            showscale=False, x=columns, y=rows, hovertemplate="row %{y:+}, column %{x:+}<br>%{z:.1%}<extra></extra>",
        )  # fmt: skip
        figure.update_yaxes(range=[rows[-1] + 0.5, rows[0] - 0.5], row=1, col=column)
        square = {"x0": -0.5, "x1": 0.5, "y0": -0.5, "y1": 0.5, "line": {"width": 2, "color": style.AGAINST}}
        figure.add_shape(type="rect", **square, row=1, col=column)
    layer, head = pairs[0]
    heading = title or (
        f"Where the patch lies explains {explained[order[0]]:.0%} of the attention of {_head(result, layer, head)}"
        f"<br><span style='font-size:12px'>offsets of key from query (blue); by chance {result.chance[layer]:.0%}</span>"
    )
    style.layout(figure, heading, int(220 + 1000 / max(len(order), 3)), margin={"l": 34, "r": 20, "t": 130, "b": 40})
    figure.update_xaxes(dtick=max(1, len(columns) // 4), tickangle=0, showgrid=False, zeroline=False)
    figure.update_yaxes(dtick=max(1, len(rows) // 4), showgrid=False, zeroline=False)
    figure.update_layout(title={"y": 1.0, "yref": "container", "yanchor": "top", "pad": {"t": 14}})
    return figure


def _ramp(count: int) -> list[str]:
    """One colour per layer from the first to the last."""
    first, last = (47, 111, 219), (217, 72, 15)
    shares = [layer / max(count - 1, 1) for layer in range(count)]
    return [
        "rgb({},{},{})".format(*(round(a + (b - a) * share) for a, b in zip(first, last, strict=True)))
        for share in shares
    ]
