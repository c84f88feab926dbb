"""Figures that judge relevance maps: curves beside their random orders, pointing games beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.plots import kit, style
from circuitvision.plots.relevance import names_of, together

if TYPE_CHECKING:
    from circuitvision.readout.relevance.curves import Curve
    from circuitvision.readout.relevance.pointing import PointingGame


def curve(
    result: Curve | Sequence[Curve],
    *,
    reverse: bool = True,
    beside: Curve | Sequence[Curve] = (),
    title: str | None = None,
) -> kit.Figure:
    """The metric as places are removed or brought back, averaged over examples; random orders as a band (5 to 95 % of them).

    ``reverse`` draws the reverse order too, where there is a single result. The band is the first result's.

    Raises:
        InputError: curves of both kinds, or something that is none.
    """
    curves = together(result, beside, "Curve")
    if len({one.kind for one in curves}) > 1:
        raise InputError("Deletion and insertion go opposite ways: draw them in two figures.")
    lead = curves[0]
    shares = lead.axes["share"]
    figure = kit.Figure()
    if lead.random.numel():
        low, middle, high = lead.random_band()
        edges = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=shares, y=low.tolist(), **edges)
        figure.add_scatter(x=shares, y=high.tolist(), fill="tonexty", fillcolor="rgba(128,128,128,0.3)", **edges)
        kit.chance(figure, shares, middle.tolist(), f"{len(lead.random)} random orders")
    for number, (one, name) in enumerate(zip(curves, names_of(curves), strict=True)):
        y = one.mean().tolist()
        kit.line(figure, one.axes["share"], y, name, kit.color(number), mode="lines")
    if reverse and len(curves) == 1 and lead.reverse.numel():
        y = lead.mean(quantity="reverse").tolist()
        dotted = {"color": style.AGAINST, "width": 2, "dash": "dot"}
        kit.line(figure, shares, y, "reverse order", style.AGAINST, mode="lines", line=dotted)
    verb, good = ("removed", "lower") if lead.kind == "deletion" else ("brought back", "higher")
    count = len(lead.examples)
    notes = (
        f"mean of {count} examples" if count > 1 else "one example", f"{good} is better",
        f"removed = baseline “{kit.escaped(lead.baseline)}” at {lead.level}s",
    )  # fmt: skip
    unit = kit.escaped(lead.provenance.get("metric_units") or "metric")
    kit.finish_lines(
        figure, style.titled(title or _curve_found(curves), *notes), unit, 320, x=f"share of places {verb}"
    )
    figure.update_xaxes(tickformat=".0%", gridcolor=style.FAINT, showgrid=True)
    return figure


def pointing(
    result: PointingGame | Sequence[PointingGame],
    *,
    beside: PointingGame | Sequence[PointingGame] = (),
    title: str | None = None,
) -> kit.Figure:
    """How often each map's maximum lies on the object, with its 95 % interval, beside chance."""
    games = together(result, beside, "PointingGame")
    names = names_of(games)
    rates, ends = [game.rate for game in games], [game.interval().tolist() for game in games]
    figure = kit.Figure()
    spread = {
        "array": [high - rate for rate, (_, high) in zip(rates, ends, strict=True)],
        "arrayminus": [rate - low for rate, (low, _) in zip(rates, ends, strict=True)], "color": style.FOR, "thickness": 2, "width": 6,
    }  # fmt: skip
    figure.add_scatter(
        x=rates, y=names, mode="markers", marker={"size": 13, "color": style.FOR}, error_x=spread, name="maximum on the object",
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
    )  # fmt: skip
    chance = {"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": style.GREY}}
    by_chance = [game.chance_rate for game in games]
    kit.chance(figure, by_chance, names, mode="markers", marker=chance, hovertemplate="chance %{x:.1%}<extra></extra>")
    best = max(range(len(games)), key=lambda number: rates[number])
    count = games[best].counted
    where = f"points at the object in {rates[best]:.0%} of {count} pictures"
    if count == 1:
        where = f"{'points' if rates[best] else 'does not point'} at the object, one picture"
    lead = f"{names[best]} {where}; chance is {games[best].chance_rate:.0%}"
    style.layout(figure, title or lead, 90 + 36 * len(games), margin={"l": 20, "b": 80})
    kit.legend_below(figure, 40)
    figure.update_xaxes(range=[-0.02, 1.03], tickformat=".0%", gridcolor=style.FAINT, zeroline=False)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], automargin=True, gridcolor=style.FAINT)
    return figure


def _curve_found(curves: Sequence[Curve]) -> str:
    lead = max(curves, key=lambda one: float(one.advantage.mean()) if one.random.numel() else 0.0)
    way = f"{lead.kind.capitalize()} by {_plain(names_of(curves)[curves.index(lead)])}"
    if not lead.random.numel():
        return f"{way} has an area of {float(lead.area.mean()):.3g}"
    told = findings.beats_random(lead)
    if len(lead.examples) == 1:
        return f"{way} beats {lead.beaten} of {len(lead.random)} random orders"
    better, examples = lead.better, len(lead.examples)
    if not told.holds:
        return f"{way} is no better than random orders can be ({better:.0%} of {examples} examples)"
    return f"{way} beats random orders in {better:.0%} of {examples} examples"


def _plain(name: str) -> str:
    """A method's name inside a sentence: names of people and of methods keep their capitals."""
    return name if name[:2].isupper() or name.startswith(("LeGrad", "Chefer")) else name[:1].lower() + name[1:]
