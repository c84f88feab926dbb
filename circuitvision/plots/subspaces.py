"""Figures of subspaces: interchange accuracy beside its ceiling and its controls; an illusion report as a figure and as a page; sweeps of sites."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from circuitvision.files import write_text
from circuitvision.plots import kit, report, style
from circuitvision.statistics import wilson
from circuitvision.subspaces import claims
from circuitvision.subspaces.illusion import FLAGS

if TYPE_CHECKING:
    from circuitvision.subspaces.das import DASResult
    from circuitvision.subspaces.report import IllusionReport
    from circuitvision.subspaces.sweep import SubspaceSweep


def das(result: DASResult, title: str | None = None) -> kit.Figure:
    """Held-out interchange accuracy of the subspace, of its ceilings and of its controls, with Wilson's 95 % intervals."""
    many = "1 dimension" if result.k == 1 else f"{result.k} dimensions"
    called = {"subspace": many, "full": "all of the site", "residual": "all of the stream there"}
    names = [called[name] for name in result.axes["intervention"]] + [f"{many}, {name}" for name in result.controls]
    shares = [*result.mean().tolist(), *(result.control.double().nanmean(-1).tolist() if result.controls else [])]
    count = len(result.examples)
    figure = kit.Figure()
    colors = (
        [style.FOR] + [style.AGAINST] * (len(result.axes["intervention"]) - 1) + [style.GREY] * len(result.controls)
    )
    for name, share, color in zip(names, shares, colors, strict=True):
        low, high = wilson(torch.tensor(share), count).tolist()
        figure.add_scatter(
            x=[share], y=[name], mode="markers+text", text=[f"{share:.0%}"], textposition="top center", marker={"size": 14, "color": color},
            error_x={"array": [high - share], "arrayminus": [share - low], "color": color, "thickness": 2, "width": 6}, showlegend=False,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )  # fmt: skip
    notes = (f"{count} held-out pairs", f"{len(result.train)} for training", "whiskers 95 %", "selectivity "
             f"{style.signed_percent(result.selectivity)}" if result.controls else "without controls")  # fmt: skip
    heading = style.titled(title or kit.escaped(str(claims.interchanges(result))), *notes)
    style.layout(figure, heading, 150 + 38 * len(names), margin={"l": 20, "r": 30, "b": 56})
    figure.update_xaxes(
        range=[-0.03, 1.06], tickformat=".0%", title="pairs with the counterfactual answer, of all classes", gridcolor=style.FAINT, zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=names[::-1],
        automargin=True,
        gridcolor=style.FAINT,
        range=[-0.5, len(names) - 0.3],
    )
    return figure


def illusion(result: IllusionReport, title: str | None = None) -> kit.Figure:
    """The effect of every intervention with its 95 % interval, and the interchange accuracy beside it; random subspaces are one row each kind."""
    table = result.table()
    table = table[~table["intervention"].isin(["clean", "source run"])]
    names = [kit.escaped(name) for name in table["intervention"]]
    colors = [_color(name) for name in table["intervention"]]
    figure = kit.Figure()
    spread = {
        "array": (table["high"] - table["E"]).fillna(0.0).tolist(), "arrayminus": (table["E"] - table["low"]).fillna(0.0).tolist(),
        "color": style.GREY, "thickness": 1.5, "width": 5,
    }  # fmt: skip
    figure.add_scatter(
        x=table["E"].tolist(), y=names, mode="markers", marker={"size": 13, "color": colors}, error_x=spread, showlegend=False,
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )  # fmt: skip
    for name, accuracy in zip(names, table["accuracy"], strict=True):
        figure.add_annotation(
            x=1, xref="paper", xanchor="left", xshift=10, y=name, text=kit.percent(accuracy), showarrow=False
        )
    figure.add_annotation(
        x=1, xref="paper", xanchor="left", xshift=10, y=1, yref="paper", yanchor="bottom", text="accuracy", showarrow=False,
        font={"size": style.SMALL},
    )  # fmt: skip
    for x, word in ((0.0, "base run"), (1.0, "source run")):
        figure.add_vline(x=x, line={"color": style.GREY, "dash": "dash", "width": 1.5})
        figure.add_annotation(
            x=x, y=1, yref="paper", yanchor="bottom", text=word, showarrow=False, font={"size": style.SMALL}
        )
    lead = kit.escaped(f"{result.label.capitalize()}: {result.sentence}")
    heading = title or style.titled(
        lead, kit.escaped(result.site), f"{len(result.examples)} held-out pairs, whiskers 95 %", result.also
    )
    style.layout(figure, heading, 150 + 28 * len(names), above=18, margin={"l": 20, "r": 90, "b": 56})
    figure.update_xaxes(title="effect, from the base run to the source run", gridcolor=style.FAINT, zeroline=False)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], automargin=True, gridcolor=style.FAINT)
    return figure


def _color(name: str) -> str:
    if name == "subspace":
        return style.FOR
    whole = name in ("full component", "row part", "on-manifold part") or name.startswith("residual stream")
    return style.AGAINST if whole else style.GREY


def sweep(result: SubspaceSweep, k: int | None = None, title: str | None = None) -> kit.Figure:
    """How much more a subspace of ``k`` dimensions (None: the smallest) does than its whole component, by layer and component.

    Raises:
        InputError: no such size.
    """
    size = min(result.axes["k"]) if k is None else k
    mean = result.mean()[:, :, result.index_of("k", size)]
    gap = mean[..., 0] - mean[..., 1]
    order = gap.nan_to_num(-1e9).flatten()
    best = int(order.argmax())
    layer, component = best // gap.shape[1], best % gap.shape[1]
    most = float(order[best])
    where = f"{result.tower} layer {result.axes['layer'][layer]}, {result.axes['component'][component]}"
    told = (
        f"In {where}, {size} {'dimension does' if size == 1 else 'dimensions do'} {most:.2f} more than the whole: not mediated there"
        if most > 0.2
        else "No subspace does clearly more than its whole component"
    )
    heading = title or style.titled(
        kit.escaped(told),
        kit.over(result),
        "effect of the subspace minus effect of the whole, in units of the source run's",
    )
    figure = kit.heat(
        {"": gap}, ("layer", result.axes["layer"]), ("component", result.axes["component"]), unit="effect beyond the whole", limit=1.0,
    )  # fmt: skip
    return kit.finish_heat(figure, heading, len(gap))


def write_page(result: IllusionReport, path: str | Path) -> Path:
    """The whole report on one page without network: verdict, figure, flags, interventions, numbers, and where they come from."""
    say = html.escape
    flags = [
        (name, FLAGS[name], {True: "holds", False: "does not hold", None: "not tested"}[value])
        for name, value in result.flags.items()
    ]
    table = result.table()
    rows = [[row["intervention"], *(f"{row[name]:.3g}" for name in table.columns[1:])] for _, row in table.iterrows()]
    known = [
        (key, value) for key, value in result.provenance.items() if isinstance(value, str | int | float) and value != ""
    ]
    parts = [
        f"<h1>{say(result.label.capitalize())}</h1><p>{say(result.sentence)} {say(result.also)}</p>",
        f"<p class='soft'>{say(result.site)}, {result.k} of {len(result.basis)} dimensions; read by {say(result.readers)}; "
        f"{len(result.examples)} held-out pairs, directions and controls from {len(result.train)} others.</p>",
        style.fragment(illusion(result, title=" ")),
        "<h2>Flags</h2>" + report.table(("flag", "what it says", "here"), flags),
        "<h2>Interventions</h2>" + report.table(list(table.columns), rows),
        "<h2>Numbers</h2>"
        + report.table(("name", "value"), [(name, f"{value:.4g}") for name, value in result.numbers.items()]),
        "<h2>Thresholds</h2>"
        + report.table(("name", "value"), [(name, f"{value:g}") for name, value in result.thresholds.items()]),
        f"<details><summary>Where these numbers come from</summary>{report.table((), known)}</details>",
    ]
    return write_text(path, style.page(f"Illusion report: {result.site}", "".join(parts)))
