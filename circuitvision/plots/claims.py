"""The figure of a circuit's claim, how faithful it is among random circuits of its size, and the page of its tests."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from circuitvision.files import write_text
from circuitvision.plots import kit, report, style

if TYPE_CHECKING:
    from circuitvision.circuits.claims import ClaimTests

KINDS = {
    "causal": ("sufficiency", "partial necessity", "equivalence"),
    "structural": ("edges",),
    "behavioural": ("sign", "independence"),
}
UNTESTED = (
    "whether the parts of the circuit represent what they are said to (representational evidence)",
    "other kinds of ablation, prompts and pictures than those that were run",
    "whether another circuit explains the model as well",
)


def claim(result: ClaimTests, title: str | None = None) -> kit.Figure:
    """The circuit's faithfulness beside those of random circuits, and what is left of the model without each."""
    figure = kit.Figure()
    rows = (
        ("random", "random circuits", "circuit", "edges alone"),
        ("without random", "random removals", "complement", "edges removed"),
    )
    for kind, name, own, label in rows:
        drawn = result.drawn(kind)
        figure.add_scatter(
            x=drawn, y=[label] * len(drawn), mode="markers", name=name,
            marker={"size": 10, "color": style.AGAINST, "opacity": 0.25},
            hovertemplate="%{x:.2f}<extra>" + name + "</extra>", showlegend=kind == "random",
        )  # fmt: skip
        figure.add_scatter(
            x=[result.faithfulness(own)], y=[label], mode="markers", name="the circuit's edges",
            marker={"size": 16, "color": style.FOR, "symbol": "diamond"},
            hovertemplate="%{x:.2f}<extra>" + own + "</extra>", showlegend=own == "circuit",
        )  # fmt: skip
    p, faithful = result.p("sufficiency"), result.faithfulness()
    better = p < result.alpha
    told = f"The circuit keeps {faithful:.0%} of the answer, {'more than' if better else 'no more than'} random circuits of its size do (p = {p:.3g})"
    note = f"{len(result.circuit)} of {result.n_edges:,} edges; {result.ablation} ablation"
    style.layout(
        figure,
        title or style.titled(kit.escaped(told), note, kit.over(result)),
        320,
        margin={"l": 20, "r": 20, "b": 86},
    )
    figure.update_xaxes(
        title="faithfulness (0: nothing left, 1: the model)", gridcolor=style.FAINT, zerolinecolor=style.FAINT
    )
    figure.update_yaxes(automargin=True, gridcolor=style.FAINT, autorange="reversed")
    kit.legend_below(figure, 44)
    return figure


def write_page(result: ClaimTests, path: str | Path) -> Path:
    """The claim sheet: claim, evidence by kind, edges, and what is not tested, on one page without network."""
    say = html.escape
    rows = {row["question"]: row for row in result.table}
    claimed = (
        f"{len(result.circuit)} of {result.n_edges:,} edges carry what the metric reads of the difference between the two runs "
        f"({result.ablation} ablation, level {result.alpha:g})."
    )
    parts = [f"<h1>A circuit and its claim</h1><p>{say(claimed)}</p>", style.fragment(claim(result))]
    for kind, questions in KINDS.items():
        shown = [
            (name, rows[name]["how"], f"{rows[name]['statistic']:.3g}", f"{rows[name]['p']:.3g}", rows[name]["reading"])
            for name in questions
            if name in rows
        ]
        if kind == "structural":
            told = f"{len(result.needed)} of {len(result.edges)} tested edges are needed (Holm)"
            shown = [("edges", "mean squared change without the edge, against added edges", "", "", told)]
        parts.append(
            f"<h2>{kind.capitalize()} evidence</h2>"
            + report.table(("question", "how", "statistic", "p", "reading"), shown)
        )
    edges = [
        (row["edge"], f"{row['change']:.3g}", f"{row['p']:.3g}", f"{row['p adjusted']:.3g}") for row in result.edges
    ]
    known = [
        (key, value) for key, value in result.provenance.items() if isinstance(value, str | int | float) and value != ""
    ]
    parts += [
        "<h2>What is not tested</h2><ul>" + "".join(f"<li>{say(one)}</li>" for one in UNTESTED) + "</ul>",
        f"<details><summary>Edges</summary>{report.table(('edge', 'mean squared change', 'p', 'p adjusted'), edges)}</details>",
        f"<details><summary>Where these numbers come from</summary>{report.table((), known)}</details>",
    ]
    return write_text(path, style.page("A circuit and its claim", "".join(parts)))
