"""Figures of head effects: a grid of layers and heads per tower, on one colour scale; an ablation check as a strip."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitvision import findings
from circuitvision.model.names import spelled
from circuitvision.plots import style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.circuits.ablation import AblationCheck
    from circuitvision.circuits.importance import HeadImportance
    from circuitvision.patching.activation import PatchingResult

_MOST_LABELLED = 200


def head_importance(result: HeadImportance, title: str | None = None) -> go.Figure:
    """Heat maps of every head's share of the answer, one per tower."""
    towers, shares, effects = result.axes["tower"], result.shares, result.effects
    grids = {}
    shares, effects = result.shares, result.effects
    for number, tower in enumerate(towers):
        present = torch.isfinite(effects[number])
        layers, heads = int(present.any(1).sum()), int(present.any(0).sum())
        grids[tower] = shares[number, :layers, :heads]
    whole, lead = findings.swing(result), findings.best_head(result)
    if title is None:
        title = html.escape(str(lead).replace(" of that", " of the difference"))
        if not whole.holds:
            title = f"{html.escape(str(whole))}<br>{title}"
    if lead.value != lead.value:
        # Shares of nothing are no shares: the effects themselves are shown.
        for number, tower in enumerate(towers):
            grids[tower] = effects[number, : grids[tower].shape[0], : grids[tower].shape[1]]
        return _grids(grids, title, whole.unit or "change", result.dead, share=False)
    return _grids(grids, title, "share of the difference", result.dead)


def patching(result: PatchingResult, title: str | None = None) -> go.Figure:
    """Heat map of a patching result over two axes (one per tower, where there are several)."""
    values = result.restored[0] if result.metrics else result.restored
    axes = list(result.cells)
    if axes[0] == "tower":
        grids = {
            tower: values[number].reshape(values.shape[1], -1) for number, tower in enumerate(result.axes["tower"])
        }
        axes = axes[1:]
    else:
        grids = {"": values.reshape(values.shape[0], -1)}
    across = " and ".join(axes[1:]) or "all"
    name = title or f"{result.site}: share restored by each {axes[0]} and {across}"
    return _grids(grids, name, "share", result.dead, axes[0], across)


def ablation(result: AblationCheck, title: str | None = None) -> go.Figure:
    """Right pairs with the heads ablated beside the random sets: the point apart from the cloud is the finding."""
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = ["nothing ablated", f"{len(result.random)} random sets", "these heads"]
    figure.add_scatter(
        x=result.random.tolist(),
        y=[rows[1]] * len(result.random),
        mode="markers",
        marker={"size": 12, "color": style.AGAINST, "opacity": 0.45},
        text=[", ".join(map(spelled, heads)) for heads in result.random_heads],
        hovertemplate="%{x:.1%}<br>%{text}<extra></extra>",
    )
    figure.add_scatter(
        x=[result.intact, result.ablated],
        y=[rows[0], rows[2]],
        mode="markers+text",
        marker={"size": 16, "color": [style.GREY, style.FOR]},
        text=[f"{result.intact:.0%}", f"{result.ablated:.0%}"],
        textposition="top center",
        hovertemplate="%{x:.1%}<extra></extra>",
    )
    told = findings.carries(result)
    heading = title or (
        f"Without {len(result.heads)} heads {result.ablated:.0%} of pairs are right; "
        f"without as many others {float(result.random.mean()):.0%}"
        + ("" if told.holds else f"<br><span style='font-size:12px'>{html.escape(told.reason)}</span>")
    )
    style.layout(figure, heading, 290, showlegend=False)
    figure.update_xaxes(
        range=[-0.03, 1.05],
        tickformat=".0%",
        title=f"pairs with both answers right, of {result.n_pairs}",
        gridcolor=style.FAINT,
    )
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1], range=[-0.4, 2.7], gridcolor=style.FAINT)
    figure.update_layout(margin={"l": 140})
    return figure


def _grids(
    grids: dict[str, Any],
    title: str,
    measure: str,
    dead: Sequence[str],
    down: str = "layer",
    across: str = "head",
    share: bool = True,
) -> go.Figure:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    form = ".1%" if share else ".3g"
    widths = [grid.shape[1] for grid in grids.values()]
    figure = make_subplots(
        rows=1,
        cols=len(grids),
        subplot_titles=[f"{tower} tower" if tower else "" for tower in grids],
        column_widths=[width / sum(widths) for width in widths],
        horizontal_spacing=0.12 if len(grids) > 1 else 0.0,
    )
    finite = torch.cat([grid[torch.isfinite(grid)] for grid in grids.values()])
    limit = max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-9)
    for column, (tower, grid) in enumerate(grids.items(), start=1):
        figure.add_trace(
            go.Heatmap(
                z=grid.float().numpy(),
                coloraxis="coloraxis",
                xgap=3 if grid.shape[1] <= 40 else 0,
                ygap=3 if grid.shape[0] <= 40 else 0,
                hovertemplate=f"{tower} {down} %{{y}} {across} %{{x}}<br>{measure} %{{z:{form}}}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        if grid.numel() <= _MOST_LABELLED:
            _label_cells(figure, grid, limit, column, share)
        names = [
            f"{layer} (unread)" if f"{tower}.blocks.{layer}.attn.hook_z" in dead else str(layer)
            for layer in range(grid.shape[0])
        ]
        shown = range(len(names)) if len(names) <= 16 else range(0, len(names), 4)
        figure.update_yaxes(title=down, tickvals=list(shown), ticktext=[names[i] for i in shown], row=1, col=column)
        figure.update_xaxes(title=across, dtick=1 if grid.shape[1] <= 16 else 4, row=1, col=column)
    tallest = max(grid.shape[0] for grid in grids.values())
    style.layout(figure, title, 170 + min(max(46 * tallest, 120), 560))
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    bar = {"title": measure, "tickformat": ".0%" if share else ".2g", "thickness": 14, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": style.diverging(), "cmin": -limit, "cmax": limit, "colorbar": bar})
    return figure


def _label_cells(figure: go.Figure, grid: Any, limit: float, column: int, share: bool) -> None:
    """Percentages, or numbers, in the cells: white on strong colours, else in the page's text colour (a theme may change it)."""
    for layer in range(grid.shape[0]):
        for head in range(grid.shape[1]):
            value = float(grid[layer, head])
            if value != value:
                continue
            strong = abs(value) > 0.5 * limit
            figure.add_annotation(
                x=head,
                y=layer,
                text=style.signed_percent(value) if share else f"{value:.2g}".replace("-", "\N{MINUS SIGN}"),
                showarrow=False,
                font={"size": 12, "color": "#ffffff"} if strong else {"size": 12},
                row=1,
                col=column,
            )
