"""Figures of subspaces: interchange accuracy beside its ceiling and its controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitvision.plots import kit, style
from circuitvision.statistics import wilson
from circuitvision.subspaces import claims

if TYPE_CHECKING:
    from circuitvision.subspaces.das import DASResult


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
