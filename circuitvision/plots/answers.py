"""Figures of what a model answers to edited pictures, and with its language prior taken off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitvision.findings_of_answers import calibrates, understands
from circuitvision.plots import kit, style
from circuitvision.statistics import wilson

if TYPE_CHECKING:
    from circuitvision.data import EditOutcomes, PriorCalibration

_LOOKS = {
    "TU": ("right both times (TU)", style.FOR),
    "half": ("right once", "#f0c9a0"),
    "IG": ("wrong both times (IG)", "#9a9a9a"),
    "SB": ("the same answer (SB)", style.AGAINST),
    "same": ("the same answer, as it should be", "#f0c9a0"),
    "ID": ("another answer (ID)", "#5a5a5a"),
}
"""What each outcome is called and its colour: orange follows what is seen, blue does not, grey is noise."""
_LEAST = 0.06
"""Segments of at least this share have their number in them."""


def outcomes(result: EditOutcomes, title: str | None = None) -> kit.Figure:
    """A bar of 100 % for every type of question and kind of edit, divided by what became of the answers."""
    shares = result.shares()
    shares["row"] = [
        f"{f'{kit.escaped(name)}, ' if len(set(result.types)) > 1 else ''}{'asked' if kind else 'other'} object edited ({count})"
        for name, kind, count in zip(shares["type"], shares["touched"], shares["questions"], strict=True)
    ]
    rows = list(dict.fromkeys(shares["row"]))
    figure = kit.Figure()
    for outcome, (called, color) in _LOOKS.items():
        own = shares[(shares["outcome"] == outcome) & (shares["share"] > 0)]
        if not len(own):
            continue
        figure.add_bar(
            x=own["share"].tolist(), y=own["row"].tolist(), orientation="h", name=called, marker={"color": color, "line": {"width": 0}},
            text=[f"{share:.0%}" if share >= _LEAST else "" for share in own["share"]], textposition="inside", insidetextanchor="middle",
            customdata=list(zip(own["low"], own["high"], strict=True)),
            hovertemplate=f"{called}: %{{x:.0%}} (95%: %{{customdata[0]:.0%}} to %{{customdata[1]:.0%}})<extra>%{{y}}</extra>",
        )  # fmt: skip
    heading = style.titled(title or kit.escaped(understands(result)), "questions in brackets")
    style.layout(figure, heading, 130 + 40 * len(rows), barmode="stack", bargap=0.3, margin={"l": 20, "r": 20, "b": 90})
    figure.update_xaxes(range=[0, 1], tickformat=".0%", title="share of questions", showgrid=False, zeroline=False)
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1], automargin=True, showgrid=False)
    kit.legend_below(figure, 52)
    return figure


def calibration(result: PriorCalibration, title: str | None = None) -> kit.Figure:
    """How many answers are right with the picture, with the prior taken off, and without seeing, with Wilson's 95 % intervals; grey and dashed what
    guessing gives. Without answers, how probable each choice is in each of these."""
    heading = title or kit.escaped(calibrates(result))
    chance = 1 / len(result.axes["choice"])
    if not result.answers:
        made = result.probabilities()
        down, across = ("", made.axes["answer"]), ("choice", made.axes["choice"])
        figure = kit.heat(
            {"": made.mean()}, down, across, unit="probability", below_zero=False, share=True, limit=1.0, listed=True
        )
        return kit.finish_heat(figure, style.titled(heading, kit.over(result)), len(made.axes["answer"]))
    accuracy = result.accuracy()
    names, means = [kit.escaped(name) for name in accuracy.axes["answer"]], accuracy.mean().tolist()
    counts = torch.isfinite(accuracy.values).sum(-1).tolist()
    figure = kit.Figure()
    for number, (name, share, count) in enumerate(zip(names, means, counts, strict=True)):
        color = (style.AGAINST, style.FOR)[number] if number < 2 else style.GREY
        low, high = wilson(torch.tensor(share, dtype=torch.float64), count).nan_to_num(share).tolist()
        figure.add_scatter(
            x=[share], y=[name], mode="markers+text", text=[f"{share:.0%}" if share == share else "no single answer"],
            textposition="top center", marker={"size": 14, "color": color}, showlegend=False, hovertemplate="%{y}: %{x:.1%}<extra></extra>",
            error_x={"array": [high - share], "arrayminus": [share - low], "color": color, "thickness": 2, "width": 6},
        )  # fmt: skip
    figure.add_vline(x=chance, line={"color": style.GREY, "dash": "dash", "width": 1.5})
    figure.add_annotation(
        x=chance, y=1, yref="paper", yanchor="bottom", text="guessing", showarrow=False, font={"size": style.SMALL}
    )
    notes = (f"{len(result.examples)} questions", f"weight {result.weight:g}", "whiskers 95 %")
    style.layout(
        figure, style.titled(heading, *notes), 130 + 42 * len(names), above=18, margin={"l": 20, "r": 30, "b": 56}
    )
    figure.update_xaxes(
        range=[-0.03, 1.06], tickformat=".0%", title="right answers", gridcolor=style.FAINT, zeroline=False
    )
    figure.update_yaxes(
        categoryorder="array", categoryarray=names[::-1], automargin=True, gridcolor=style.FAINT,
        range=[-0.5, len(names) - 0.3],
    )  # fmt: skip
    return figure
