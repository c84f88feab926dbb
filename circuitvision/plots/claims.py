"""Figures of a circuit's claim: how faithful it is among random circuits of its size, its curve, and the page of its tests."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from circuitvision.files import write_text
from circuitvision.plots import kit, report, style

if TYPE_CHECKING:
    from circuitvision.circuits.claims import ClaimTests
    from circuitvision.circuits.evaluation import CircuitEvaluation, FaithfulnessCurve

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


def evaluation(result: CircuitEvaluation, title: str | None = None) -> kit.Figure:
    """Faithfulness of a circuit and its complement under every ablation, beside random circuits."""
    figure = kit.Figure()
    names = [str(name) for name in result.axes["ablation"]]
    found, error = result.faithfulness, result.faithfulness_error
    for kind, color in (("random", style.AGAINST), ("rewired", style.GREY)):
        drawn = result.randoms(kind)
        figure.add_scatter(
            x=drawn.flatten().tolist(), y=[name for name in names for _ in range(drawn.shape[1])], mode="markers", name=f"{kind} circuits",
            marker={"size": 9, "color": color, "opacity": 0.35}, hovertemplate="%{x:.2f}<extra>" + kind + "</extra>",
        )  # fmt: skip
    for label, color, symbol in (("circuit", style.FOR, "diamond"), ("complement", style.FOR, "diamond-open")):
        column = result.index_of("condition", label)
        figure.add_scatter(
            x=found[:, column].tolist(), y=names, mode="markers", name=label, marker={"size": 15, "color": color, "symbol": symbol},
            error_x={"array": (1.96 * error[:, column]).nan_to_num().tolist(), "color": color, "thickness": 2, "width": 5},
            hovertemplate="%{x:.2f}<extra>" + label + "</extra>",
        )  # fmt: skip
    low, high = float(found[:, 0].min()), float(found[:, 0].max())
    kept = f"{low:.0%}" if high - low < 0.005 else f"{low:.0%} to {high:.0%}"
    told = f"{len(result.edges)} of {result.n_edges:,} edges alone keep {kept} of the answer"
    style.layout(
        figure,
        title or style.titled(kit.escaped(told), "bars: 95 % intervals", kit.over(result)),
        230 + 50 * len(names),
        margin={"l": 20, "r": 20, "b": 96},
    )
    figure.update_xaxes(
        title="faithfulness (0: nothing left, 1: the model)", gridcolor=style.FAINT, zerolinecolor=style.FAINT
    )
    figure.update_yaxes(automargin=True, gridcolor=style.FAINT, autorange="reversed")
    kit.legend_below(figure, 44)
    return figure


def curve(result: FaithfulnessCurve, title: str | None = None) -> kit.Figure:
    """Faithfulness of the strongest edges by their number, on a logarithmic axis, with random circuits of the same size."""
    figure = kit.Figure()
    found, error = result.faithfulness, result.faithfulness_error
    inner = [n for n, size in enumerate(result.sizes) if size]
    sizes = [result.sizes[n] for n in inner]
    for row in range(1, len(found)):
        figure.add_scatter(
            x=sizes, y=found[row, inner].tolist(), mode="lines", line={"color": style.AGAINST, "width": 1}, opacity=0.4,
            name="random circuits", showlegend=row == 1, hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        x=sizes, y=found[0, inner].tolist(), mode="lines+markers", name=f"edges by {result.rank}", line={"color": style.FOR, "width": 3},
        error_y={"array": (1.96 * error[0, inner]).nan_to_num().tolist(), "color": style.FOR, "thickness": 1.5},
        hovertemplate="%{x:,} edges: %{y:.2f}<extra></extra>",
    )  # fmt: skip
    figure.add_hline(y=1, line={"color": style.GREY, "dash": "dot"})
    enough = result.size_for(0.9)
    told = (
        f"{enough:,} of {result.sizes[-1]:,} edges keep 90 % of the answer"
        if enough
        else "No number of edges that was run keeps 90 % of the answer"
    )
    notes = (
        f"CPR {float(result.cpr[0]):.2f}, CMD {float(result.cmd[0]):.2f}, log area {float(result.log_area[0]):.2f}; {result.ablation} ablation",
        kit.over(result),
    )
    style.layout(figure, title or style.titled(kit.escaped(told), *notes), 420, margin={"l": 20, "r": 20, "b": 86})
    figure.update_xaxes(type="log", title="edges left", gridcolor=style.FAINT, zerolinecolor=style.FAINT)
    figure.update_yaxes(title="faithfulness", gridcolor=style.FAINT, zerolinecolor=style.FAINT, automargin=True)
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
