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

from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.model.names import head_name
from circuitvision.plots import kit, patches, style
from circuitvision.plots.attention_overlay import contrast, overlay, rollout

if TYPE_CHECKING:
    from circuitvision.readout.attention.distance import DistanceProfile, PositionPattern
    from circuitvision.readout.attention.mass import AttentionSummary

__all__ = ["contrast", "distance", "offsets", "overlay", "rollout", "spans", "summary"]

_ALL = "everything"
_OF_KIND = {"patch": style.FOR, "text": style.AGAINST, "cls": "#2b8a3e", "register": "#9c36b5", "other": style.GREY}
_MOST_PANELS = 6


def summary(result: AttentionSummary, *, span: str | None = None, title: str | None = None) -> kit.Figure:
    """Heat maps of layers × heads, one per span (or of one ``span``), averaged over examples; entropies and peaks have one.

    Shares are coloured from 0 to 1, entropies up to that of uniform attention.
    """
    shown = result if span is None else result.span(span)
    mean, error, alike = shown.mean(), shown.error(), shown.mean(quantity="uniform")
    names = [str(name) for name in shown.axes.get("span", ["only"]) if name != _ALL][:_MOST_PANELS]
    if "span" in shown.axes:
        at = [shown.axes["span"].index(name) for name in names]
        mean, error, alike = mean[..., at], error[..., at], alike[..., at]
    else:
        mean, error, alike = mean[..., None], error[..., None], alike[..., None]
    nats = result.measure == "entropy"
    top = max(float(alike.nan_to_num(0.0).max()), 1e-9) if nats else 1.0
    grids = {name: mean[..., number] for number, name in enumerate(names)}
    figure = kit.heat(
        grids, ("layer", result.axes["layer"]), ("head", result.axes["head"]), unit="nats" if nats else "share", limit=top, below_zero=False,
        share=not nats, marked=dict.fromkeys(names, result.dead_layers),
    )  # fmt: skip
    if span is not None:
        names = [span]
    elif "span" not in result.axes:
        names = [result.provenance.get("span", result.measure)]
    return kit.finish_heat(figure, title or _found(result, mean, error, alike, names), len(mean))


def _found(result: AttentionSummary, mean: Tensor, error: Tensor, alike: Tensor, names: list[str]) -> str:
    if not bool(torch.isfinite(mean).any()):
        return f"No head of the {result.tower} tower has a value"
    if result.measure in ("entropy", "relative entropy"):
        layer, head = divmod(int(mean[..., 0].nan_to_num(math.inf).argmin()), mean.shape[1])
        value, most = mean[layer, head, 0], alike[layer, 0]
        where = _head(result, layer, head)
        if result.measure == "entropy":
            keys, of = float(value.exp()), float(most.exp())
            note = f"spread over {_keys(keys)} keys (exp of its entropy), of {_keys(of)} it can look at"
            return style.titled(str(findings.narrow(where, keys, of)), note)
        note = f"its entropy is {kit.percent(float(value))} of what looking at all visible keys alike has"
        return style.titled(str(findings.narrow(where, float(value), 1.0, relative=True)), note, _notes(result))
    flat = int((mean - alike[:, None]).nan_to_num(-math.inf).argmax())
    layer, head, panel = (int(index) for index in torch.unravel_index(torch.tensor(flat), mean.shape))
    share, chance, tests = float(mean[layer, head, panel]), float(alike[layer, panel]), mean[..., 0].numel()
    where, count = _head(result, layer, head), len(result.examples)
    if result.measure == "peak":
        told = findings.peaks_inside(where, share, chance, count, tests)
        return style.titled(str(told), f"by chance {chance:.0%}", _notes(result))
    told = findings.attends(
        where, kit.escaped(names[panel]), share, chance, float(error[layer, head, panel]), count, tests
    )
    return style.titled(str(told), f"looking at all keys alike: {kit.percent(chance)}", _notes(result))


def _head(result: Any, layer: int, head: int) -> str:
    return head_name(result.axes["layer"][layer], result.axes["head"][head], result.tower)


def _notes(result: Any) -> str:
    queries = f"queries: {kit.escaped(result.queries)}" if result.queries and result.queries != "default" else ""
    return "; ".join(part for part in (kit.over(result), queries) if part)


def _keys(count: float) -> str:
    return f"{count:.0f}" if count >= 10 else f"{count:.1f}"


def _unread(result: Any) -> list[str]:
    return [f"{name}{' (unread)' if name in result.dead_layers else ''}" for name in result.axes["layer"]]


def spans(result: AttentionSummary, *, title: str | None = None) -> kit.Figure:
    """Stacked bars: of each layer the share of attention that each span gets, averaged over heads and examples, and uniform attention (as the first
    layer's heads could give it) below.

    What no span covers is "other". Raises InputError for a result without spans, and for spans that overlap.
    """
    if "span" not in result.axes:
        raise InputError("Stacked bars show shares of spans: take a result of attention_mass.")
    names = [name for name in result.axes["span"] if name != _ALL]
    index = [result.axes["span"].index(name) for name in names]
    drawn = result.over_heads()
    values, error = drawn.mean()[:, index], drawn.error()[:, index]
    alike = drawn.mean(quantity="uniform")[:, index]
    rows = torch.cat([alike[:1], values]).nan_to_num(0.0)
    if float(rows.sum(-1).max()) > 1.001:
        raise InputError(
            "These spans overlap: they get more than all of the attention. Stack spans without common keys."
        )
    labels = ["all alike", *(f"layer {name}" for name in _unread(result))]
    if bool((rows.sum(-1) < 0.999).any()):
        rows, names = torch.cat([rows, 1 - rows.sum(-1, keepdim=True)], dim=-1), [*names, "other"]
    figure = kit.Figure()
    free = itertools.cycle(color for color in style.PALETTE if color not in {_OF_KIND.get(str(name)) for name in names})
    for number, name in enumerate(names):
        shares = rows[:, number].tolist()
        figure.add_bar(
            y=labels, x=shares, name=kit.escaped(name), orientation="h", text=[f"{share:.0%}" if share >= 0.06 else "" for share in shares],
            marker={"color": _OF_KIND.get(str(name)) or next(free), "opacity": [0.75, *[1.0] * len(values)], "line": {"width": 0}},
            textposition="inside", insidetextanchor="middle", textangle=0, insidetextfont={"color": "#ffffff"},
            hovertemplate=f"{kit.escaped(name)} %{{x:.1%}}<extra>%{{y}}</extra>",
        )  # fmt: skip
    layer, span = divmod(int((values - alike).nan_to_num(-math.inf).argmax()), values.shape[1])
    told = findings.attends(
        f"Layer {result.axes['layer'][layer]} of the {result.tower} tower", kit.escaped(names[span]), float(values[layer, span]),
        float(alike[layer, span]), float(error[layer, span]), len(result.examples), len(values),
    )  # fmt: skip
    notes = (
        f"mean of {len(result.axes['head'])} heads, {_notes(result)}",
        "“all alike”: what a head gives that looks at every key alike",
    )
    heading = title or style.titled(str(told), *notes)
    style.layout(figure, heading, 80 + 34 * len(labels), above=26, barmode="stack", bargap=0.25, margin={"l": 110})
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"})
    figure.update_xaxes(range=[0, 1], tickformat=".0%", gridcolor=style.FAINT, zeroline=False)
    figure.update_yaxes(showgrid=False)
    return figure


def distance(result: DistanceProfile, *, title: str | None = None) -> kit.Figure:
    """Left: share of attention by distance, a line per head, coloured by layer, and beside it the keys that are no patches. Right: the mean distance
    of every head. Dashed: uniform attention."""
    labels = result.axes["distance"]
    rings = sum(isinstance(label, int) for label in labels)
    values, means = result.mean(), result.mean(quantity="mean_distance")
    # What a head that looks at all alike gives depends on the mask, which layers share.
    alike, alike_mean = result.mean(quantity="uniform")[0].tolist(), result.mean(quantity="uniform_distance")
    figure = kit.panels(1, 2, column_widths=[0.66, 0.34], horizontal_spacing=0.1)
    near, far = list(range(rings)), list(range(rings, len(labels)))
    for layer, (name, color) in enumerate(zip(result.axes["layer"], _ramp(len(values)), strict=True)):
        for head in range(values.shape[1]):
            shares = values[layer, head].tolist()
            look = {"legendgroup": str(name), "name": f"layer {name}", "row": 1, "col": 1}
            look["hovertemplate"] = (
                f"{head_name(name, result.axes['head'][head], result.tower)}: %{{y:.1%}}<extra></extra>"
            )
            figure.add_scatter(
                x=near, y=shares[:rings], mode="lines", line={"color": color, "width": 1.5}, showlegend=head == 0, **look
            )  # fmt: skip
            figure.add_scatter(
                x=far, y=shares[rings:], mode="markers", showlegend=False, marker={"color": color, "size": 7, "opacity": 0.8}, **look
            )  # fmt: skip
        figure.add_scatter(
            x=[layer + 0.5 * (head / max(values.shape[1] - 1, 1) - 0.5) for head in range(values.shape[1])], y=means[layer].tolist(),
            mode="markers", marker={"color": color, "size": 9, "opacity": 0.85}, showlegend=False, customdata=result.axes["head"],
            hovertemplate=f"layer {name} head %{{customdata}}: %{{y:.2f}} patches<extra></extra>", row=1, col=2,
        )  # fmt: skip
    kit.chance(figure, near, alike[:rings], "all alike", row=1, col=1)
    mark = {"color": style.GREY, "size": 9, "symbol": "line-ew", "line": {"width": 2, "color": style.GREY}}
    kit.chance(figure, far, alike[rings:], "all alike", mode="markers", marker=mark, showlegend=False, row=1, col=1)
    kit.chance(figure, range(len(means)), alike_mean.tolist(), "all alike", showlegend=False, row=1, col=2)
    told = findings.looks_near(result)
    notes = (f"mean over heads of the {result.tower} tower", kit.over(result), "dashed: looking at all patches alike")
    heading = title or style.titled(str(told), *notes)
    style.layout(figure, heading, 370, margin={"b": 100})
    kit.legend_below(figure, 54)
    figure.update_xaxes(**kit.axis(labels, f"{result.metric} distance in patches"), row=1, col=1)
    figure.update_xaxes(**kit.axis(_unread(result), "layer"), row=1, col=2)
    figure.update_yaxes(title="share of attention", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="mean distance", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(gridcolor=style.FAINT, zeroline=False)
    return figure


def offsets(result: PositionPattern, *, count: int = 6, title: str | None = None) -> kit.Figure:
    """Mean attention by offset from the query patch (the marked centre), of the ``count`` heads whose attention the offset explains best.

    Every panel has its own colours, from 0 to the head's largest mean.
    """
    explained = result.explained.double().nan_to_num(-1.0).flatten()
    order = [int(i) for i in explained.argsort(descending=True, stable=True)[:count] if explained[i] >= 0]
    if not order:
        raise InputError("No head of this result has attention that differs between patches; there is nothing to draw.")
    pairs = [divmod(index, result.values.shape[1]) for index in order]
    names = [
        style.titled(
            head_name(result.axes["layer"][layer], result.axes["head"][head], result.tower),
            f"{explained[index]:.0%} explained{', unread' if result.axes['layer'][layer] in result.dead_layers else ''}",
        )
        for index, (layer, head) in zip(order, pairs, strict=True)
    ]
    figure = kit.panels(1, len(order), subplot_titles=names, horizontal_spacing=0.03)
    rows, columns = result.axes["drow"], result.axes["dcol"]
    for column, (layer, head) in enumerate(pairs, start=1):
        grid = result.values[layer, head].double()
        patches.draw(
            figure, 1, column, grid, colorscale=style.sequential(), zmin=0, zmax=float(grid.nan_to_num(0.0).max()),
            showscale=False, x=columns, y=rows, hovertemplate="row %{y:+}, column %{x:+}<br>%{z:.1%}<extra></extra>",
        )  # fmt: skip
        figure.update_yaxes(range=[rows[-1] + 0.5, rows[0] - 0.5], row=1, col=column)
        centre = {"x0": -0.5, "x1": 0.5, "y0": -0.5, "y1": 0.5, "line": {"width": 2, "color": style.AGAINST}}
        figure.add_shape(type="rect", **centre, row=1, col=column)
    layer, head = pairs[0]
    told = findings.explained(_head(result, layer, head), float(explained[order[0]]), float(result.chance[layer]))
    note = f"offsets of key from query (blue); by chance {result.chance[layer]:.0%}"
    style.layout(
        figure,
        title or style.titled(str(told), note),
        int(80 + 860 / max(len(order), 3)),
        above=44,
        margin={"l": 34, "b": 40},
    )
    kit.bare(figure, tickangle=0)
    figure.update_xaxes(tickvals=[columns[0], 0, columns[-1]])
    figure.update_yaxes(tickvals=[rows[0], 0, rows[-1]])
    return figure


def _ramp(count: int) -> list[str]:
    """One colour per layer from the first to the last."""
    scale = [[0.0, "rgb(47,111,219)"], [1.0, "rgb(217,72,15)"]]
    return [
        "rgb({:.0f},{:.0f},{:.0f})".format(*style.color_at(scale, layer / max(count - 1, 1))[:3])
        for layer in range(count)
    ]
