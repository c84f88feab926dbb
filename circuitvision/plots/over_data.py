"""Figures of reads over a data set: lines by layer or site, one per target, or bars of the strongest terms.

Whiskers are 95 % intervals over examples (see ``Result.interval``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from torch import Tensor

    from circuitvision.readout.over_data import DataReading

_ALONG = ("layer", "site")


def reading(result: DataReading, title: str | None = None, count: int = 12) -> kit.Figure:
    """The means over examples: lines along layers or sites, a panel for each choice of positions, or bars of the ``count`` strongest terms.

    Raises:
        InputError: a reading along other axes.
    """
    axes = {name: labels for name, labels in result.axes.items() if name != "example"}
    along = next((name for name in _ALONG if name in axes), None)
    if along is not None and set(axes) <= {along, "position", "target"}:
        return _lines(result, along, title)
    if list(axes) == ["term"]:
        return _bars(result, title, count)
    raise InputError(f"There is no figure of a reading along {', '.join(axes)}; use to_frame() or mean_frame().")


def _lines(result: DataReading, along: str, title: str | None) -> kit.Figure:
    entries, targets = result.axes[along], result.axes.get("target", [result.measure])
    places = result.axes.get("position", [result.positions])
    shape = (len(entries), len(places), len(targets))
    mean, ends = result.mean().reshape(shape), result.interval().reshape(2, *shape)
    figure = kit.panels(
        1,
        len(places),
        shared_yaxes=True,
        subplot_titles=[kit.escaped(place) for place in places] if len(places) > 1 else None,
    )
    names = [kit.layer_name(entry) if along == "layer" else str(entry) for entry in entries]
    for column in range(len(places)):
        for number, target in enumerate(targets):
            y, low, high = (one[:, column, number] for one in (mean, *ends))
            kit.line(
                figure, names, y.tolist(), kit.escaped(target), kit.color(number), errors=_whiskers(y, low, high),
                xaxis=f"x{column + 1}" if column else "x", yaxis=f"y{column + 1}" if column else "y",
                legendgroup=str(target), showlegend=column == 0,
            )  # fmt: skip
    words = " and ".join(str(target) for target in targets[:3]) + (" …" if len(targets) > 3 else "")
    at = f" (positions: {kit.escaped(result.positions)})" if len(places) == 1 and result.positions else ""
    lead = (
        title
        or f"{kit.escaped(result.measure.capitalize())} of {kit.escaped(words)} by {along} of the {result.tower} tower{at}"
    )
    heading = style.titled(lead, f"{kit.over(result)}, whiskers are 95 % intervals")
    figure.update_layout(showlegend=len(targets) > 1)
    kit.finish_lines(figure, heading, "", 360, names=True, above=26 if len(places) > 1 else 0)
    figure.update_layout(yaxis_title=kit.escaped(result.measure))
    return figure


def _bars(result: DataReading, title: str | None, count: int) -> kit.Figure:
    terms, mean, (low, high) = result.axes["term"], result.mean(), result.interval()
    finite = mean.nan_to_num(0.0)
    order = finite.abs().argsort(descending=True, stable=True)[:count].tolist()
    wide = _whiskers(mean, low, high)
    halves = [max(wide[0][at], wide[1][at]) for at in order]
    best: Any = order[0] if order else None
    sure = best is not None and bool(low[best] * high[best] > 0)
    lead = title or (
        f"{kit.escaped(terms[best])} {'adds most to' if mean[best] > 0 else 'takes most from'} {kit.direction(result.measure)}: "
        f"{kit.signed(float(mean[best]))}"
        if sure
        else f"No term of {kit.direction(result.measure)} is surely other than 0"
    )
    heading = style.titled(lead, f"{kit.over(result)}, {len(order)} of {len(terms)} terms, whiskers are 95 % intervals")
    return kit.bars(
        [kit.escaped(terms[at]) for at in order],
        [float(finite[at]) for at in order],
        heading,
        kit.escaped(result.measure),
        errors=halves,
    )


def _whiskers(mean: Tensor, low: Tensor, high: Tensor) -> tuple[list[float], list[float]]:
    return (mean - low).nan_to_num(0.0).clamp(min=0).tolist(), (high - mean).nan_to_num(0.0).clamp(min=0).tolist()
