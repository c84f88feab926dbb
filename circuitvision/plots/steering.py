"""Figures of steering: effect against scale beside random sets, β by region and layer, β and success by condition, cohesion of clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from circuitvision.errors import InputError
from circuitvision.plots import kit, style
from circuitvision.steering import claims

if TYPE_CHECKING:
    from circuitvision.steering.clusters import ValueVectorClusters
    from circuitvision.steering.directions import Direction
    from circuitvision.steering.injection import InjectionResult
    from circuitvision.steering.prompts import PromptConditions
    from circuitvision.steering.response import SteeringResponse
    from circuitvision.steering.rollouts import ClosedLoop


def response(result: SteeringResponse, title: str | None = None) -> kit.Figure:
    """The mean effect against the scale with its 95 % interval; random controls as a band between the lowest and the highest, with their median.

    Along a direction its tangent at 0 is dotted."""
    order = result.scales.argsort()
    scales, effect = result.scales[order].tolist(), result.effect[order]
    low, high = result.interval()[:, 0, order]
    figure = kit.Figure()
    random = result.random[:, order]
    if len(random):
        kit.band(figure, scales, random.min(0).values.tolist(), random.max(0).values.tolist())
        kit.chance(
            figure,
            scales,
            random.median(0).values.tolist(),
            f"{len(random)} random directions of equal length"
            if result.site
            else f"{len(random)} random sets of {len(result.neurons[0])} neurons",
        )
    if result.site and sum(map(bool, scales)) > 1:
        slope = float(result.tangents().mean()[0])
        within = [scale for scale in scales if abs(slope * scale) <= 1.5 * float(effect.abs().max())]
        tangent = {"color": style.FOR, "dash": "dot", "width": 1.5}
        figure.add_scatter(
            x=within, y=[slope * scale for scale in within], mode="lines", line=tangent, name="tangent at 0"
        )
    whiskers = None if bool(low.isnan().any()) else ((effect - low).tolist(), (high - effect).tolist())
    kit.line(figure, scales, effect.tolist(), kit.escaped(result.name), style.FOR, errors=whiskers)
    place = {
        "overwrite": ("neurons set to", "activation"), "add": ("added to the neurons", "activation"), "scale": ("neurons multiplied by", ""),
    }.get(result.method, ("", ""))  # fmt: skip
    if result.site:
        length = float(result.vectors[0].double().norm())
        place = {
            "add": (f"how often the direction (length {length:.2g}) is added", ""),
            "norm_preserving": ("weight of the direction, lengths kept", ""),
            "project_out": ("share that is taken out along the direction", ""),
        }[result.method]
    unit = "natural standard deviations" if result.units == "deviation" else place[1]
    notes = (
        kit.over(result), f"R² {float(result.r_squared[0]):.2f}" if len(scales) > 2 else "", "whiskers 95 %",
        f"unsteered {float(result.mean(quantity='base')):.2g}".replace("-", kit.MINUS), _norms(result),
    )  # fmt: skip
    heading = style.titled(title or str(claims.steers(result)), *filter(None, notes))
    metric = kit.escaped(str(result.provenance.get("metric") or "metric"))
    across = f"{place[0]}, {unit}" if unit else place[0]
    return kit.finish_lines(figure, heading, f"change of {metric}", 340, x=across)


def direction(result: Direction, title: str | None = None) -> kit.Figure:
    """The held-out coordinates of every example along the direction, a row for each kind; 0 lies half-way between them.

    A vector of one's own has no examples: a message.
    """
    if not len(result.kinds):
        return kit.empty(f"{result} is a vector that was given: it has no examples.", title)
    figure = kit.Figure()
    kinds = list(dict.fromkeys(result.kinds))
    for kind in kinds:
        own = [value for value, of in zip(result.values.tolist(), result.kinds, strict=True) if of == kind]
        color = style.FOR if kind == result.toward else style.AGAINST
        figure.add_box(
            x=own, y=[kit.escaped(kind)] * len(own), orientation="h", boxpoints="all", pointpos=0, jitter=0.6, name=kit.escaped(kind),
            line={"color": "rgba(0,0,0,0)"}, fillcolor="rgba(0,0,0,0)", showlegend=False,
            marker={"color": color, "size": 7, "opacity": 0.7}, hovertemplate="%{x:.3g}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=0, line={"color": style.GREY, "dash": "dash", "width": 1.5})
    longest = (
        f", with kinds exchanged {float(result.random_norms.max()):.2g} at most" if len(result.random_norms) else ""
    )
    notes = (f"{len(result.examples)} examples", kit.escaped(result.site), f"length {result.norm:.2g}{longest}")
    heading = style.titled(title or kit.escaped(str(claims.separates(result))), *notes)
    style.layout(figure, heading, 150 + 60 * len(kinds), margin={"l": 20, "r": 20, "b": 56})
    figure.update_xaxes(
        title="coordinate along the direction of the other half, units of the site",
        gridcolor=style.FAINT,
        zeroline=False,
    )
    figure.update_yaxes(
        categoryorder="array", categoryarray=[kit.escaped(kind) for kind in kinds[::-1]], automargin=True
    )
    return figure


def _norms(result: SteeringResponse) -> str:
    """How long steered activations are at the outermost scale."""
    if not result.norm_ratio.numel():
        return ""
    place = int(result.scales.abs().argmax())
    ratio, scale = float(result.mean(quantity="norm_ratio")[place]), result.axes["scale"][place]
    return f"activations {ratio:.2g} times as long at {scale:g}".replace("-", kit.MINUS)


def injection(result: InjectionResult, step: int | str | None = None, title: str | None = None) -> kit.Figure:
    """β of every region (down) and layer (across); of several steps those of ``step``, the first there is if None. Several steps of one region: steps
    down.

    Raises:
        InputError: a step that is not there.
    """
    mean, axes = result.mean(), result.axes
    if len(axes["region"]) == 1 and len(axes["step"]) > 1 and step is None:
        grid, down = mean[0].T, ("step", axes["step"])
    else:
        grid, down = mean[..., 0 if step is None else result.index_of("step", step)], ("region", axes["region"])
    notes = [kit.over(result), "β 0: stays with its own run, 1: acts like the source"]
    if len(axes["step"]) > 1 and down[0] == "region":
        notes.append(f"step {axes['step'][0] if step is None else step}")
    heading = style.titled(title or str(claims.injects(result)), *notes)
    words = [
        [f"{0.0 if abs(value) < 0.005 else value:.2f}".replace("-", kit.MINUS) for value in line]
        for line in grid.tolist()
    ]
    below = bool((grid < -0.05).any())
    figure = kit.heat(
        {"": grid}, down, (f"layer of the {result.tower} tower", [_layer(one) for one in axes["layer"]]), unit="β", limit=1.0, below_zero=below,
        words={"": words}, listed=True, hover=f"{down[0]} %{{customdata[0]}}, %{{customdata[1]}}",
    )  # fmt: skip
    return kit.finish_heat(figure, heading, len(grid))


def conditions(result: PromptConditions, title: str | None = None) -> kit.Figure:
    """β under every prompt with its 95 % interval, between the other object (0) and the named one (1); the residual stands beside."""
    names = [kit.escaped(name) for name in result.axes["condition"]]
    mean, residual = result.mean(), result.mean(quantity="residual")
    low, high = result.interval()
    figure = kit.Figure()
    spread = {
        "array": (high - mean).nan_to_num(0.0).tolist(), "arrayminus": (mean - low).nan_to_num(0.0).tolist(), "color": style.FOR,
        "thickness": 2, "width": 6,
    }  # fmt: skip
    figure.add_scatter(
        x=mean.tolist(), y=names, mode="markers", marker={"size": 13, "color": style.FOR}, error_x=spread, showlegend=False,
        hovertemplate="%{y}: β %{x:.2f}<extra></extra>",
    )  # fmt: skip
    for row, name in enumerate(names):
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="left",
            xshift=10,
            y=name,
            text=f"residual {float(residual[row]):.2f}",
            showarrow=False,
        )
    for x, word in ((0.0, "the other object"), (1.0, "the named object")):
        figure.add_vline(x=x, line={"color": style.GREY, "dash": "dash", "width": 1.5})
        figure.add_annotation(
            x=x, y=1, yref="paper", yanchor="bottom", text=word, showarrow=False, font={"size": style.SMALL}
        )
    wanted = {"right", "other object"} <= set(result.axes["condition"])
    found = str(claims.listens(result)) if wanted else "How far the action goes towards the named object"
    heading = style.titled(title or found, kit.over(result))
    style.layout(figure, heading, 120 + 34 * len(names), above=18, margin={"l": 20, "r": 110, "b": 56})
    figure.update_xaxes(
        title="β, from the other object to the named one",
        gridcolor=style.FAINT,
        zeroline=False,
        range=[min(-0.1, float(low.nan_to_num(0.0).min())), 1.1],
    )
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], automargin=True, gridcolor=style.FAINT)
    return figure


def closed_loop(result: ClosedLoop, control: str | None = None, title: str | None = None) -> kit.Figure:
    """Left the success of every condition with Wilson's interval, right how far the gripper goes along each dimension, with its interval.

    The title compares the condition that succeeds least with the ``control`` (None: the first).

    Raises:
        InputError: a control that is no condition.
    """
    names = result.axes["condition"]
    control = names[0] if control is None else control
    if control not in names:
        raise InputError(f"There is no condition {control!r}; there are {', '.join(names)}.")
    rate, (low, high) = result.success_rate, result.success_interval()
    figure = kit.panels(
        1,
        2,
        subplot_titles=["episodes that succeed", "displacement, cells"],
        horizontal_spacing=0.08,
        shared_yaxes=True,
    )
    shown = [kit.escaped(name) for name in names]
    _points(figure, shown, rate, (low, high), "success", style.FOR, 1)
    mean, ends = result.mean(), result.interval()
    for number, dim in enumerate(result.axes["dim"]):
        _points(figure, shown, mean[:, number], ends[:, :, number], str(dim), kit.color(1 + number), 2)
    others = [name for name in names if name != control]
    worst = min(others, key=lambda name: float(rate[names.index(name)]), default=None)
    found = "Episodes by condition" if worst is None else str(claims.succeeds(result, worst, control))
    heading = style.titled(
        title or found, f"{len(result.examples)} episodes of {result.horizon} steps", "whiskers 95 %"
    )
    style.layout(figure, heading, 150 + 32 * len(names), above=26, margin={"l": 20, "r": 20, "b": 86})
    figure.update_xaxes(range=[-0.03, 1.03], tickformat=".0%", row=1, col=1)
    figure.update_xaxes(gridcolor=style.FAINT, zeroline=False)
    figure.update_xaxes(zeroline=True, zerolinecolor=style.GREY, zerolinewidth=1, row=1, col=2)
    figure.update_yaxes(categoryorder="array", categoryarray=shown[::-1], automargin=True, gridcolor=style.FAINT)
    kit.legend_below(figure, 36)
    return figure


def clusters(result: ValueVectorClusters, title: str | None = None, count: int = 16) -> kit.Figure:
    """How cohesive the first ``count`` clusters are, with their words; grey and dashed the most cohesive cluster among random value vectors."""
    shown = min(count, len(result.sizes))
    told = result.cohesive
    names = [
        f"{kit.escaped(' '.join(words[:3]))} ({size})"
        for words, size in zip(result.words[:shown], result.sizes[:shown], strict=True)
    ]
    values = result.cohesion[:shown].nan_to_num(0.0).tolist()
    held = f"{int(told.sum())} of {len(told)} clusters {'is' if int(told.sum()) == 1 else 'are'} more cohesive than any among random value vectors"
    figure = kit.bars(
        names,
        values,
        style.titled(title or held, f"{result.tower} tower", "neurons in brackets"),
        "mean cosine between members",
    )
    if result.random_cohesion.numel():
        limit = float(result.random_cohesion.nan_to_num(-torch.inf).max())
        figure.add_vline(x=limit, line={"color": style.GREY, "dash": "dash", "width": 1.5})
        figure.add_annotation(
            x=limit,
            y=1,
            yref="paper",
            yanchor="bottom",
            text="random vectors, at most",
            showarrow=False,
            font={"size": style.SMALL},
        )
    return figure


def _points(
    figure: kit.Figure, names: list[str], values: torch.Tensor, ends: Any, name: str, color: str, column: int
) -> None:
    low, high = ends
    spread = {
        "array": (high - values).nan_to_num(0.0).clamp(min=0).tolist(), "arrayminus": (values - low).nan_to_num(0.0).clamp(min=0).tolist(),
        "color": color, "thickness": 2, "width": 5,
    }  # fmt: skip
    figure.add_scatter(
        x=values.tolist(), y=names, mode="markers", marker={"size": 11, "color": color}, error_x=spread, name=name,
        hovertemplate=f"%{{y}}: {name} %{{x:.3g}}<extra></extra>", row=1, col=column,
    )  # fmt: skip


def _layer(label: int | str) -> str:
    return "all layers" if label == "all" else str(label)
