"""Figures of head effects: a grid of layers and heads per tower, on one colour scale; an ablation check as a strip."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import torch

from circuitvision import findings
from circuitvision.model.names import spelled
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from circuitvision.circuits.ablation import AblationCheck
    from circuitvision.circuits.importance import HeadImportance
    from circuitvision.patching.activation import PatchingResult


_ESTIMATES = {"atp": "attribution patching", "atp*": "AtP*", "ig": "integrated gradients"}


def head_importance(result: HeadImportance, title: str | None = None) -> kit.Figure:
    """Heat maps of every head's share of the answer, one per tower; of an ablation or an estimate, of its effect."""
    whole, lead = findings.swing(result), findings.best_head(result)
    # Shares of nothing are no shares: the effects themselves are shown.
    shares = result.method == "patch" and lead.value == lead.value
    if title is None and result.method != "patch":
        title = html.escape(str(findings.largest_effect(result)))
    elif title is None:
        title = html.escape(str(lead).replace(" of that", " of the difference"))
        if not whole.holds:
            title = f"{html.escape(str(whole))}<br>{title}"
    across = "head" if "head" in result.axes else "unit"
    grids = {}
    for number, tower in enumerate(result.axes["tower"]):
        present = torch.isfinite(result.effects[number])
        layers = int(present.any(1).sum())
        columns = int(present.any(0).sum()) if across == "head" else present.shape[1]
        grids[tower] = (result.shares if shares else result.effects)[number, :layers, :columns]
    unit = "share of the difference" if shares else whole.unit or "change"
    return _grids(
        grids,
        title,
        unit,
        result,
        ("layer", result.axes["layer"]),
        (across, result.axes[across]),
        shares,
    )


def patching(result: PatchingResult, title: str | None = None) -> kit.Figure:
    """Heat map of a patching result over two axes (one per tower, where there are several)."""
    axes = dict(result.cells)
    told = result.position_names if len(result.position_names) == len(axes.get("position", ())) else []
    if told:
        # Numbers tell apart words that stand twice.
        axes["position"] = [f"{label} {name}".strip() for label, name in zip(axes["position"], told, strict=True)]
    panel = next((name for name in ("tower", "site") if name in axes and len(axes) > 2), "")
    panels = axes.pop(panel, [""])
    values = result.restored[0] if result.metrics else result.restored
    values = values.movedim(list(result.cells).index(panel), 0) if panel else values[None]
    grids = {str(name): own.reshape(own.shape[0], -1) for name, own in zip(panels, values, strict=True)}
    down, *others = axes
    across = " and ".join(others) or "all"
    labels = axes[others[0]] if len(others) == 1 else range(values[0, 0].numel())
    if title is None:
        whole = torch.stack(list(grids.values())).nan_to_num(0.0)
        number, row, column = (int(index) for index in torch.unravel_index(whole.abs().argmax(), whole.shape))
        where = f"{panels[number]} {down} {axes[down][row]}, {across} {labels[column]}".strip()
        method = getattr(result, "method", "")
        largest = "largest estimated effect" if method else "largest effect"
        said = f"{html.escape(where)} has the {largest}: {style.signed_percent(float(whole[number, row, column]))}"
        if all(bool(grid.isnan().all()) for grid in grids.values()):
            said = "The two runs do not differ in the metric, so there is no share to show"
        by = f", estimated by {_ESTIMATES.get(method, method)}" if method else ""
        title = style.titled(said, f"{result.site}: share of the difference restored by each {down} and {across}{by}")
    figure = _grids(
        grids, title, "share of the difference", result, (down, axes[down]), (across, labels), True, panel or "tower"
    )
    if told and across == "position":
        ticks = _ticks(told)
        figure.update_xaxes(tickvals=ticks, ticktext=[html.escape(told[tick]) for tick in ticks], tickangle=-45)
    return figure


def _ticks(names: Sequence[str], room: int = 40) -> list[int]:
    """Which positions are named below a map: words, and of a picture's patches the first and the last."""
    inside = [
        0 < place < len(names) - 1
        and all("[" in one and one.startswith("image") for one in names[place - 1 : place + 2])
        for place in range(len(names))
    ]
    kept = [place for place in range(len(names)) if not inside[place]]
    return kept[:: max(1, -(-len(kept) // room))]


def ablation(result: AblationCheck, title: str | None = None) -> kit.Figure:
    """Right pairs with the heads ablated beside the random sets: the point apart from the cloud is the finding."""
    figure = kit.Figure()
    rows = ["nothing ablated", f"{len(result.random)} random sets", "these heads"]
    figure.add_scatter(
        x=result.random.tolist(), y=[rows[1]] * len(result.random), mode="markers",
        marker={"size": 12, "color": style.AGAINST, "opacity": 0.45},
        text=[", ".join(map(spelled, heads)) for heads in result.random_heads], hovertemplate="%{x:.1%}<br>%{text}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[result.intact, result.ablated], y=[rows[0], rows[2]], mode="markers+text",
        marker={"size": 16, "color": [style.GREY, style.FOR]}, text=[f"{result.intact:.0%}", f"{result.ablated:.0%}"],
        textposition="top center", hovertemplate="%{x:.1%}<extra></extra>",
    )  # fmt: skip
    told = findings.carries(result)
    heads = f"{len(result.heads)} head{'s' if len(result.heads) != 1 else ''}"
    others = "" if told.chance is None else f"; without as many others {result.intact - told.chance:.0%}"
    lead = f"Without {heads} {result.ablated:.0%} of pairs are right{others}"
    style.layout(
        figure, title or style.titled(lead, html.escape(told.reason)), 240, showlegend=False, margin={"l": 140}
    )
    across = f"pairs with both answers right, of {result.n_pairs}"
    figure.update_xaxes(range=[-0.03, 1.05], tickformat=".0%", title=across, gridcolor=style.FAINT)
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1], range=[-0.4, 2.7], gridcolor=style.FAINT)
    return figure


def _grids(
    grids: dict[str, Tensor],
    title: str,
    unit: str,
    result: HeadImportance | PatchingResult,
    down: tuple[str, object],
    across: tuple[str, object],
    share: bool = False,
    panel: str = "tower",
) -> kit.Figure:
    unread = {
        tower: [layer for layer in range(len(grid)) if f"{tower}.blocks.{layer}.attn.hook_z" in result.dead]
        for tower, grid in grids.items()
    }
    heading = {name: f"{name} tower" if name and panel == "tower" else name for name in grids}
    named = {heading[name]: grid for name, grid in grids.items()}
    marked = {heading[name]: layers for name, layers in unread.items()}
    figure = kit.heat(named, down, across, unit=unit, share=share, marked=marked)  # type: ignore[arg-type]
    return kit.finish_heat(figure, title, max(len(grid) for grid in grids.values()))
