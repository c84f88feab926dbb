"""Figures of interactions: which two back each other up or need each other, what sets add, how an effect is shared out, who steps in for whom; and
of modulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitvision.patching.interaction_claims import interacts, repairs
from circuitvision.patching.modulation import modulates
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from torch import Tensor

    from circuitvision.patching.coalitions import (
        ConditionalEffects,
        Dividends,
        InteractionResult,
        PairInteractions,
        ShapleyValues,
    )
    from circuitvision.patching.modulation import ModulationResult

_MOST = 16
"""Bars of dividends, at most."""


def interactions(result: InteractionResult, metric: str | None = None, title: str | None = None) -> kit.Figure:
    """The interaction of every two components, the others removed; of drawn orders the Shapley values."""
    if result.orders:
        return shapley(result.shapley(), metric, title)
    return pairs(result.pairs(), metric, title)


def pairs(result: PairInteractions, metric: str | None = None, title: str | None = None) -> kit.Figure:
    """A heat map of every two components, each once; the effect of one alone stands with its name. Of several metrics one, the first if None."""
    one = _one(result, metric)
    names, mean, alone = one.axes["component"], one.shown(), one.shown("alone")
    below = torch.ones_like(mean, dtype=torch.bool).tril(-1)
    grid = mean.masked_fill(~below, torch.nan)[1:, :-1]
    words = kit.in_words(grid)
    words = [[word if column <= row else "" for column, word in enumerate(line)] for row, line in enumerate(words)]
    labels = [f"{name} ({kit.signed(value)})" for name, value in zip(names, alone.tolist(), strict=True)]
    down, across = labels[1:], labels[:-1]
    hover = [
        [f"{kit.escaped(names[row + 1])} × {kit.escaped(names[column])}" for column in range(len(across))]
        for row in range(len(down))
    ]
    figure = kit.heat(
        {"": grid}, ("", down), ("", across), unit="interaction", limit=kit.largest(grid, alone), words={"": words}, names={"": hover}, listed=True
    )  # fmt: skip
    figure.update_xaxes(tickangle=0 if len(across) <= 4 else -35, automargin=True)
    found = interacts(one)
    between = (
        ""
        if found.interval is None
        else "interaction {} (95%: {} to {})".format(*map(kit.number, (found.value, *found.interval)))
    )
    heading = style.titled(title or kit.escaped(found), between, *_notes(one, alone), kit.over(one))
    return kit.finish_heat(figure, heading, max(len(down), 2))


def dividends(result: Dividends, metric: str | None = None, title: str | None = None) -> kit.Figure:
    """The sets with the largest dividends as bars, with 95 % of their error."""
    one = _one(result, metric)
    top = one.top(_MOST)
    places = [one.axes["coalition"].index(name) for name, _ in top]
    said = (
        "None of them adds anything"
        if not top or top[0][1] == 0
        else f"{top[0][0]}: {kit.signed(top[0][1])} that none of its parts adds, the largest dividend"
    )
    left = len(one.axes["coalition"]) - len(top)
    notes = (f"the {len(top)} largest of {len(top) + left} sets" if left else "", kit.over(one))
    return _bars(
        one,
        places,
        [name for name, _ in top],
        style.titled(title or kit.escaped(said), *notes),
        "dividend",
        one.error()[places],
    )


def shapley(result: ShapleyValues, metric: str | None = None, title: str | None = None) -> kit.Figure:
    """Shapley values as bars, largest first, with 95 % of their error over examples, or of drawing orders where that is larger."""
    one = _one(result, metric)
    mean, names = one.shown(), one.axes["component"]
    places = mean.abs().nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
    errors = torch.maximum(one.error().nan_to_num(0.0), one.sampling_error.nan_to_num(0.0))[places]
    lead, total = float(mean[places[0]]), float(mean.nansum())
    said = f"{names[places[0]]} is given most: {kit.signed(lead)} of {kit.signed(total)} that all do together"
    drawn = f"{one.draws} random orders" if one.draws else "all coalitions"
    heading = style.titled(title or kit.escaped(said), drawn, kit.over(one))
    return _bars(one, places, [names[place] for place in places], heading, "Shapley value", errors)


def conditional(result: ConditionalEffects, metric: str | None = None, title: str | None = None) -> kit.Figure:
    """What taking away each component (down) costs with nothing else removed, and with each other one removed before (across)."""
    one = _one(result, metric)
    names, removed = one.axes["component"], one.axes["removed"]
    grid = one.shown()
    words = kit.in_words(grid, decimals=max(kit.decimals_of(grid), 1))
    words = [["" if column == row + 1 else word for column, word in enumerate(line)] for row, line in enumerate(words)]
    figure = kit.heat(
        {"": grid}, ("taking away", names), ("with this removed before", ["nothing", *removed[1:]]), unit="effect", words={"": words},
        hover="%{customdata[0]}, without %{customdata[1]}", listed=True,
    )  # fmt: skip
    figure.update_xaxes(tickangle=0 if len(removed) <= 5 else -35, automargin=True)
    heading = style.titled(title or kit.escaped(repairs(one)), kit.over(one))
    return kit.finish_heat(figure, heading, max(len(names), 2))


def modulation(result: ModulationResult, metric: str | None = None, title: str | None = None) -> kit.Figure:
    """The metric before, with the heads rescaled, and with each random set: the point apart from the cloud is the finding."""
    one = _one(result, metric)
    before, after, *random = one.mean().tolist()
    rows = ["before", f"{len(random)} random sets", "these heads"]
    figure = kit.Figure()
    figure.add_scatter(
        x=random, y=[rows[1]] * len(random), mode="markers", marker={"size": 12, "color": style.AGAINST, "opacity": 0.45},
        hovertemplate="%{x:.3g}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[before, after], y=[rows[0], rows[2]], mode="markers+text", marker={"size": 16, "color": [style.GREY, style.FOR]},
        text=[kit.number(before), kit.number(after)], textposition="top center", hovertemplate="%{x:.3g}<extra></extra>",
    )  # fmt: skip
    heading = style.titled(title or kit.escaped(modulates(one)), kit.over(one))
    style.layout(figure, heading, 240, showlegend=False, margin={"l": 140})
    figure.update_xaxes(
        title=kit.escaped(one.provenance.get("metric") or "metric"), gridcolor=style.FAINT, zeroline=False
    )
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1], range=[-0.4, 2.7], gridcolor=style.FAINT)
    return figure


def _bars(
    result: Any, places: Sequence[int], names: Sequence[str], title: str, what: str, errors: Tensor
) -> kit.Figure:
    values = result.shown()[list(places)].nan_to_num(0.0).tolist()
    spread = [1.96 * error if not math.isnan(error) else 0.0 for error in errors.tolist()]
    metric = kit.escaped(result.provenance.get("metric") or "metric")
    return kit.bars([kit.escaped(name) for name in names], values, title, f"{what}, in {metric}", errors=spread)


def _one(result: Any, metric: str | None) -> Any:
    """One of several metrics: the one named, else the first."""
    if not result.metrics:
        return result
    return result.of(result.metrics[0] if metric is None else metric)


def _notes(result: PairInteractions, alone: Tensor) -> list[str]:
    """What the signs mean: below 0 is backup where components raise the metric."""
    raises = float(alone.nansum()) >= 0
    low, high = ("backup", "cooperation") if raises else ("cooperation", "backup")
    found = [f"blue: {low}, orange: {high}", f"in brackets: alone, the rest {result.rest}"]
    if result.null.numel():
        largest = float(result.null.abs().nan_to_num(0.0).max())
        found.append(f"{len(result.null)} permuted pairings: at most {kit.number(largest, 2)}")
    return found
