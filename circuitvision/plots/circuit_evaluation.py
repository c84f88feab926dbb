"""Figures of evaluations of circuits: faithfulness beside random circuits, curves of it, edges that are needed, and the page that holds them."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvision.circuits.evaluation import CIRCUIT, COMPLEMENT, MATCHED, RANDOM
from circuitvision.circuits.evaluation_claims import comes_near, explains, needs
from circuitvision.files import write_text
from circuitvision.plots import kit, report, style

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.circuits.comparison import LayerMatrix
    from circuitvision.circuits.evaluation import CircuitEvaluation
    from circuitvision.circuits.faithfulness_curve import FaithfulnessCurve
    from circuitvision.circuits.minimality import Minimality

MOST_EDGES = 40
_LOOKS = {
    CIRCUIT: (style.FOR, "circle", 14, "circuit alone"),
    COMPLEMENT: (style.AGAINST, "diamond", 12, "all other edges alone"),
    RANDOM: (style.GREY, "circle-open", 8, "random connected circuits"),
    MATCHED: (style.GREY, "x-thin-open", 8, "random circuits of its degrees"),
}


def evaluation(result: CircuitEvaluation, title: str | None = None) -> kit.Figure:
    """Faithfulness under every ablation: the circuit with its 95 % interval, its complement, and every random circuit."""
    f, ends = result.faithfulness, result.faithfulness_interval()
    names = result.circuits
    if not names:
        f, ends = f[None], ends[:, None]
    rows = [
        (f"{kit.escaped(name)}, {ablation}" if names else ablation, number, at)
        for number, name in enumerate(names or [""])
        for at, ablation in enumerate(result.axes["ablation"])
    ]
    figure = kit.Figure()
    for kind in (MATCHED, RANDOM, COMPLEMENT, CIRCUIT):
        color, symbol, size, called = _LOOKS[kind]
        places = result.conditions(kind)
        points = [(row, number, at, place) for row, number, at in rows for place in places]
        if not points:
            continue
        x = [float(f[number, at, place]) for _, number, at, place in points]
        whiskers: dict[str, Any] = {}
        if kind == CIRCUIT:
            low, high = ([float(ends[end, number, at, place]) for _, number, at, place in points] for end in (0, 1))
            whiskers["error_x"] = {
                "array": [b - a for a, b in zip(x, high, strict=True)], "arrayminus": [a - b for a, b in zip(x, low, strict=True)],
                "color": color, "thickness": 2, "width": 6,
            }  # fmt: skip
        figure.add_scatter(
            x=x, y=[row for row, *_ in points], mode="markers", name=called, marker={"color": color, "symbol": symbol, "size": size},
            hovertemplate=f"{called}, %{{y}}: %{{x:.1%}}<extra></extra>", **whiskers,
        )  # fmt: skip
    for run, word in ((0.0, "empty run"), (1.0, "clean run")):
        figure.add_vline(x=run, line={"color": style.GREY, "dash": "dash", "width": 1.5})
        figure.add_annotation(
            x=run, y=1, yref="paper", yanchor="bottom", text=word, showarrow=False, font={"size": style.SMALL}
        )
    count = len(result.examples)
    heading = style.titled(
        title or kit.escaped(explains(result)), f"{count} examples" if count > 1 else "one example", _variation(result)
    )
    style.layout(figure, heading, 170 + 46 * len(rows), above=18, margin={"l": 20, "r": 30, "b": 96})
    kit.legend_below(figure, 52)
    figure.update_xaxes(title="faithfulness", tickformat=".0%", gridcolor=style.FAINT, zeroline=False)
    figure.update_yaxes(
        categoryorder="array", categoryarray=[row for row, *_ in rows][::-1], automargin=True, gridcolor=style.FAINT, type="category"
    )  # fmt: skip
    return figure


def _variation(result: CircuitEvaluation) -> str:
    own = result.variation.reshape(-1).tolist()
    return (
        "" if len(result.axes["ablation"]) < 2 else "variation over ablations " + ", ".join(f"{one:.2g}" for one in own)
    )


def curve(result: FaithfulnessCurve, title: str | None = None) -> kit.Figure:
    """``f(k)`` over the share of edges on a logarithmic axis, with 95 % bands, beside the range of random connected circuits.

    Shares of which no edge is left, and none at all, stand at the left end.
    """
    places = [number for number, k in enumerate(result.ks) if k > 0]
    ks = [result.ks[number] for number in places]
    f, (low, high) = result.faithfulness[:, places], result.faithfulness_interval()[:, :, places]
    figure = kit.Figure()
    random = result.random_faithfulness[:, places]
    if len(random):
        kit.band(figure, ks, random.min(0).values.tolist(), random.max(0).values.tolist())
        kit.chance(figure, ks, random.mean(0).tolist(), f"{len(random)} random connected circuits of each size")
    called = {"signed": "by signed score", "size": "by size of score"}
    for number, order in enumerate(result.axes["order"]):
        color = style.FOR if order == "size" else kit.color(number + 1)
        if bool(low[number].isfinite().all()):
            kit.band(figure, ks, low[number].tolist(), high[number].tolist(), color)
        kit.line(figure, ks, f[number].tolist(), called.get(order, kit.escaped(order)), color)
    figure.add_hline(y=1, line={"color": style.GREY, "dash": "dot", "width": 1.5})
    notes = (
        f"CPR {kit.number(result.cpr)}, CMD {kit.number(result.cmd)}, area over log k {kit.number(result.log_area)}",
        f"{result.ablation}, {len(result.examples)} examples, bands 95%",
    )
    heading = style.titled(title or kit.escaped(comes_near(result)), *notes)
    kit.finish_lines(figure, heading, "faithfulness", 380, x="share of edges", share=True)
    figure.update_xaxes(type="log", tickvals=ks, ticktext=[f"{k:.1%}" if k < 0.01 else f"{k:.0%}" for k in ks])
    return figure


def minimality(result: Minimality, title: str | None = None) -> kit.Figure:
    """By how much removing each edge alone changes the faithfulness, with 95 % intervals; the 40 largest of more edges."""
    frame = result.table()
    shown = frame.head(MOST_EDGES)
    figure = kit.Figure()
    figure.add_scatter(
        x=shown.change.tolist(), y=[kit.escaped(name) for name in shown.edge], mode="markers", marker={"size": 11, "color": style.FOR},
        showlegend=False, hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        error_x={
            "array": (shown.high - shown.change).fillna(0.0).tolist(), "arrayminus": (shown.change - shown.low).fillna(0.0).tolist(),
            "color": style.FOR, "thickness": 1.5, "width": 5,
        },
    )  # fmt: skip
    figure.add_vline(x=0, line={"color": style.GREY, "dash": "dash", "width": 1.5})
    notes = (
        f"faithfulness {kit.percent(result.faithfulness)}, {result.ablation}, {len(result.examples)} examples",
        f"{len(shown)} of {len(frame)} edges shown" if len(shown) < len(frame) else "",
    )
    heading = style.titled(title or kit.escaped(needs(result)), *(note for note in notes if note))
    style.layout(figure, heading, 130 + 26 * len(shown), margin={"l": 20, "r": 30, "b": 56})
    figure.update_xaxes(
        title="change of faithfulness without the edge", tickformat=".0%", gridcolor=style.FAINT, zeroline=False
    )
    figure.update_yaxes(autorange="reversed", automargin=True, gridcolor=style.FAINT, type="category")
    return figure


def layers(result: LayerMatrix, title: str | None = None) -> kit.Figure:
    """The share of all weight that leads from layer to layer."""
    share = result.share
    best = int(share.nan_to_num(0.0).argmax())
    row, column = divmod(best, share.shape[1])
    lead = f"{float(share[row, column]):.0%} of the weight leads from {result.axes['from'][row]} to {result.axes['to'][column]}"
    note = f"{int(result.edges.sum())} edges, weight is the size of the mean score"
    figure = kit.heat(
        {"": share}, ("from", result.axes["from"]), ("to", result.axes["to"]), unit="share of the weight", share=True
    )
    return kit.finish_heat(figure, style.titled(title or kit.escaped(lead), note), len(share))


def write_page(
    result: CircuitEvaluation,
    path: str | Path,
    curve_of: FaithfulnessCurve | None = None,
    minimality_of: Minimality | None = None,
) -> Path:
    """The evaluation on one page without network: the finding, figures, tables, and where they come from; with the curve and the minimality of the
    same circuit where they are given. Returns the path."""
    say = html.escape
    parts = [
        f"<h1>Does the circuit explain the model?</h1><p>{say(str(explains(result)))}</p>",
        f"<p class='soft'>{say(result.reason)}</p>" if result.reason else "",
        style.fragment(evaluation(result, title=" ")),
        "<h2>Faithfulness</h2>" + _table(result.table()),
        "<p class='soft'>Of random circuits the mean, and the range of 95% of them; “reach” is the share of them that is as near to the model as the "
        "circuit, itself counted.</p>",
    ]  # fmt: skip
    if curve_of is not None:
        parts += [
            f"<h2>By number of edges</h2><p>{say(str(comes_near(curve_of)))}</p>",
            style.fragment(curve(curve_of, title=" ")),
        ]
        parts += [_table(curve_of.areas()), _table(curve_of.table())]
    if minimality_of is not None:
        parts += [
            f"<h2>Without each edge</h2><p>{say(str(needs(minimality_of)))}</p>",
            style.fragment(minimality(minimality_of, title=" ")),
        ]
        parts += [_table(minimality_of.table())]
        if minimality_of.subset_eps is not None:
            smallest = [[len(one), ", ".join(one)] for one in minimality_of.subsets]
            parts += ["<h2>Smallest subsets that do as well</h2>" + report.table(("edges", ""), smallest)]
    known = [
        (key, value) for key, value in result.provenance.items() if isinstance(value, str | int | float) and value != ""
    ]
    parts.append(f"<details><summary>Where these numbers come from</summary>{report.table((), known)}</details>")
    return write_text(path, style.page("Evaluation of a circuit", "".join(parts)))


def _table(frame: pd.DataFrame) -> str:
    """A table of words and numbers; nothing stands for NaN."""
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return report.table([str(name).replace("_", " ") for name in frame.columns], rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{0.0 if abs(value) < 5e-10 else value:.3g}"
    return str(value)
