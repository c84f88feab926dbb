"""Figures of shortcut heads: which heads let the background in, and what removing them does to every group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitvision.circuits.removal import HEADS, INTACT, raises_worst
from circuitvision.circuits.shortcuts import reads_background
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from circuitvision.circuits.removal import HeadRemoval
    from circuitvision.circuits.shortcuts import ShortcutHeads


def scores(result: ShortcutHeads, title: str | None = None) -> kit.Figure:
    """Heat maps of layers and heads on one scale: what of the background's gain goes with each head, and beside it what of the foreground's."""
    grids, marked = {}, {}
    means = {"background": result.mean(), "foreground": result.mean(quantity="foreground")}
    several = len(result.axes["tower"]) > 1
    for number, tower in enumerate(result.axes["tower"]):
        for part, mean in means.items():
            there = torch.isfinite(mean[number])
            layers, heads = int(there.any(1).nonzero().max()) + 1, int(there.any(0).sum())
            name = f"{tower} tower: {part}" if several else part
            grids[name] = mean[number, :layers, :heads]
            marked[name] = [layer for layer in range(layers) if f"{tower}.blocks.{layer}.attn.hook_z" in result.dead]
    down, across = (("layer", result.axes["layer"]), ("head", result.axes["head"]))
    figure = kit.heat(grids, down, across, unit="nat", marked=marked, bar="gain that<br>goes, nat")
    whole = kit.number(result.mean(quantity="foreground_gain"), 2)
    notes = (f"the foreground's information gain is {whole} nat", kit.over(result))
    heading = style.titled(title or kit.escaped(reads_background(result)), *notes)
    return kit.finish_heat(figure, heading, max(len(grid) for grid in grids.values()))


def removal(result: HeadRemoval, title: str | None = None) -> kit.Figure:
    """The accuracy of every group before and after, with Wilson's intervals, and with each random set removed; of a curve, by how many heads."""
    heading = style.titled(title or kit.escaped(raises_worst(result)), *_notes(result))
    if result.is_curve:
        return _curve(result, heading)
    frame = result.report()
    frame = frame[frame.group.isin(result.group_names)]
    before = frame[frame.condition == INTACT].sort_values("accuracy", kind="stable")
    names = [str(name) for name in before.group]
    shown = [f"{kit.escaped(name)} ({count})" for name, count in zip(names, before.examples, strict=True)]
    figure = kit.Figure()
    drawn = frame[frame.condition.isin(result.random_sets)]
    if len(drawn):
        figure.add_scatter(
            x=drawn.accuracy.tolist(), y=[shown[names.index(name)] for name in drawn.group], mode="markers",
            marker={"size": 9, "color": style.AGAINST, "opacity": 0.3}, name=f"{len(result.random_sets)} random sets",
            hovertemplate="%{y}: %{x:.1%}<extra>random</extra>",
        )  # fmt: skip
    for condition, name, color in ((INTACT, "no head removed", style.GREY), (HEADS, _without(result), style.FOR)):
        own = frame[frame.condition == condition].set_index("group").loc[names]
        spread = {
            "array": (own.high - own.accuracy).tolist(), "arrayminus": (own.accuracy - own.low).tolist(), "color": color, "thickness": 2,
            "width": 5,
        }  # fmt: skip
        figure.add_scatter(
            x=own.accuracy.tolist(), y=shown, mode="markers", marker={"size": 14, "color": color}, error_x=spread, name=name,
            hovertemplate="%{y}: %{x:.1%}<extra>" + name + "</extra>",
        )  # fmt: skip
    style.layout(figure, heading, 150 + 34 * len(names), margin={"l": 20, "r": 20, "b": 86})
    figure.update_xaxes(
        range=[-0.03, 1.03], tickformat=".0%", title="accuracy", gridcolor=style.FAINT, zerolinecolor=style.FAINT
    )
    figure.update_yaxes(categoryorder="array", categoryarray=shown[::-1], automargin=True, gridcolor=style.FAINT)
    kit.legend_below(figure, 44)
    return figure


def _curve(result: HeadRemoval, heading: str) -> kit.Figure:
    """Worst group and average against how many heads are removed, with the other groups faint."""
    counts = [len(result.sets[name]) for name in result.axes["condition"]]
    figure = kit.Figure()
    for number, name in enumerate(result.group_names):
        figure.add_scatter(
            x=counts, y=result.by_group[:, number].tolist(), mode="lines", line={"color": style.FAINT, "width": 1.5}, name="each group",
            legendgroup="groups", showlegend=number == 0, hovertemplate=f"{kit.escaped(name)}: %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
    kit.line(figure, counts, result.average.tolist(), "all examples", style.AGAINST)
    kit.line(figure, counts, result.worst.tolist(), "worst group", style.FOR)
    if result.heads:
        figure.add_vline(x=len(result.heads), line={"color": style.GREY, "dash": "dash", "width": 1.5})
        figure.add_annotation(
            x=len(result.heads), y=1.02, yref="paper", yanchor="bottom", text="chosen", showarrow=False, font={"size": style.SMALL}
        )  # fmt: skip
    figure.update_yaxes(range=[-0.03, 1.05])
    figure.update_xaxes(dtick=max(1, len(counts) // 12))
    return kit.finish_lines(figure, heading, "accuracy", 340, x="heads removed", share=True, above=18)


def _without(result: HeadRemoval) -> str:
    names = raises_worst(result).about["heads"].split(", ")
    return f"without {kit.escaped(', '.join(names))}" if len(names) <= 4 else f"without {len(names)} heads"


def _notes(result: HeadRemoval) -> list[str]:
    notes = [f"{len(result.group_names)} groups", f"{len(result.examples)} examples"]
    return notes if result.is_curve else [*notes, "whiskers 95 %"]
