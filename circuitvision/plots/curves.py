"""Figures that judge relevance maps: curves beside their random orders, pointing games beside chance."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.plots import style
from circuitvision.plots.relevance import names_of, together

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.relevance.curves import Curve
    from circuitvision.readout.relevance.pointing import PointingGame

COLORS = (style.FOR, style.AGAINST, "#2b8a3e", "#9c36b5", "#b07d00", "#0b8a8f")
"""One per method."""


def curve(
    result: Curve | Sequence[Curve],
    *,
    reverse: bool = True,
    beside: Curve | Sequence[Curve] = (),
    title: str | None = None,
) -> go.Figure:
    """The metric as places are removed or brought back, averaged over examples; random orders as a band (5 to 95 % of them).

    ``reverse`` draws the reverse order too, where there is a single result. The band is the first result's.

    Raises:
        InputError: curves of both kinds, or something that is none.
    """
    import plotly.graph_objects as go

    curves = together(result, beside, "Curve")
    if len({one.kind for one in curves}) > 1:
        raise InputError("Deletion and insertion go opposite ways: draw them in two figures.")
    lead = curves[0]
    shares = lead.axes["share"]
    figure = go.Figure()
    if lead.random.numel():
        low, middle, high = lead.random_band()
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=shares, y=low.tolist(), **band)
        figure.add_scatter(x=shares, y=high.tolist(), fill="tonexty", fillcolor="rgba(128,128,128,0.3)", **band)
        name = f"{len(lead.random)} random orders"
        figure.add_scatter(x=shares, y=middle.tolist(), mode="lines", line={"color": style.GREY, "width": 2}, name=name)
    for one, name, color in zip(curves, names_of(curves), COLORS * len(curves), strict=False):
        y = one.mean().tolist()
        figure.add_scatter(x=one.axes["share"], y=y, mode="lines", line={"color": color, "width": 3}, name=name)
    if reverse and len(curves) == 1 and lead.reverse.numel():
        y = lead.mean(quantity="reverse").tolist()
        figure.add_scatter(
            x=shares, y=y, mode="lines", line={"color": COLORS[1], "width": 2, "dash": "dot"}, name="reverse order"
        )
    unit = str(lead.provenance.get("metric_units") or "")
    verb = "removed" if lead.kind == "deletion" else "brought back"
    count = len(lead.examples)
    good = "lower is better" if lead.kind == "deletion" else "higher is better"
    over = f"mean of {count} examples" if count > 1 else "one example"
    note = f"{over}; {good}; removed = baseline “{html.escape(lead.baseline)}” at {lead.level}s"
    heading = f"{title or _curve_finding(curves)}<br><span style='font-size:12px'>{note}</span>"
    style.layout(figure, heading, 400, margin={"l": 64, "r": 20, "t": 88, "b": 96})
    figure.update_layout(
        legend={"orientation": "h", "y": -0.24, "x": 0.0, "yanchor": "top"},
        title={"y": 1.0, "yref": "container", "yanchor": "top", "pad": {"t": 14}},
    )
    figure.update_xaxes(title=f"share of places {verb}", tickformat=".0%", gridcolor=style.FAINT, zeroline=False)
    figure.update_yaxes(title=html.escape(unit) or "metric", gridcolor=style.FAINT, zerolinecolor=style.FAINT)
    return figure


def pointing(
    result: PointingGame | Sequence[PointingGame],
    *,
    beside: PointingGame | Sequence[PointingGame] = (),
    title: str | None = None,
) -> go.Figure:
    """How often each map's maximum lies on the object, with its 95 % interval, beside chance."""
    import plotly.graph_objects as go

    games = together(result, beside, "PointingGame")
    names = names_of(games)
    rates, ends = [game.rate for game in games], [game.interval().tolist() for game in games]
    figure = go.Figure()
    figure.add_scatter(
        x=rates,
        y=names,
        mode="markers",
        marker={"size": 13, "color": style.FOR},
        error_x={
            "array": [high - rate for rate, (_, high) in zip(rates, ends, strict=True)],
            "arrayminus": [rate - low for rate, (low, _) in zip(rates, ends, strict=True)],
            "color": style.FOR,
            "thickness": 2,
            "width": 6,
        },
        name="maximum on the object",
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
    )
    chance = {"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": style.GREY}}
    figure.add_scatter(
        x=[game.chance_rate for game in games],
        y=names,
        mode="markers",
        marker=chance,
        name="chance",
        hovertemplate="chance %{x:.1%}<extra></extra>",
    )
    best = max(range(len(games)), key=lambda number: rates[number])
    count = int((~games[best].values.isnan()).sum())
    where = f"points at the object in {rates[best]:.0%} of {count} pictures"
    if count == 1:
        where = "points at the object" if rates[best] else "does not point at the object"
        where += ", one picture"
    lead = f"{names[best]} {where}; chance is {games[best].chance_rate:.0%}"
    style.layout(figure, title or lead, 150 + 36 * len(games), margin={"l": 20, "r": 20, "t": 60, "b": 80})
    figure.update_layout(legend={"orientation": "h", "y": -60 / (36 * len(games) + 10), "x": 0.0, "yanchor": "top"})
    figure.update_xaxes(range=[-0.02, 1.03], tickformat=".0%", gridcolor=style.FAINT, zeroline=False)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], automargin=True, gridcolor=style.FAINT)
    return figure


def _curve_finding(curves: Sequence[Curve]) -> str:
    lead = max(curves, key=lambda one: float(one.advantage.mean()) if one.random.numel() else 0.0)
    way = f"{lead.kind.capitalize()} by {_plain(names_of(curves)[curves.index(lead)])}"
    if not lead.random.numel():
        return f"{way} has an area of {float(lead.auc().nanmean()):.3g}"
    told = findings.beats_random(lead)
    if len(lead.examples) == 1:
        own, random = lead.auc()[0], lead.auc("random")[:, 0]
        beaten = int((own < random if lead.kind == "deletion" else own > random).sum())
        return f"{way} beats {beaten} of {len(random)} random orders"
    better, examples = float((lead.advantage.values > 0).double().mean()), len(lead.examples)
    if not told.holds:
        return f"{way} is no better than random orders can be ({better:.0%} of {examples} examples)"
    return f"{way} beats random orders in {better:.0%} of {examples} examples"


def _plain(name: str) -> str:
    """A method's name inside a sentence: names of people and of methods keep their capitals."""
    return name if name[:2].isupper() or name.startswith(("LeGrad", "Chefer")) else name[:1].lower() + name[1:]
