"""A lens as a table of layers × positions of one row: what stands highest at every place, the shade its value or a target's."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from circuitvision.errors import InputError
from circuitvision.plots import lens_text as text
from circuitvision.plots import style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.lens.result import LensResult

_MOST_COLUMNS = 24


def table(
    result: LensResult,
    row: int | None = None,
    positions: Sequence[int | str] | None = None,
    target: Any = None,
    title: str | None = None,
) -> go.Figure:
    """Layers × positions of one row; every cell names its highest column. Colour: its value, or a target's.

    Args:
        result: a lens over layers.
        row: which row.
        positions: numbers of the positions shown, or "last"; by default text, then whatever there is, at most the last 24.
        target: label, or else number, of the target that colours the cells; of a lens by rank, the highest column's value does.
        title: by default from which layer on the last position says what the last layer says.
    """
    import plotly.graph_objects as go

    if not result.ids.numel():
        raise InputError(
            "A mean over positions has no highest columns to name; choose view='layers', or read the lens without positions=."
        )
    row, numbers = text.checked_row(result, row), result.axes["position"]
    chosen = (
        _columns(result, row) if positions is None else [text.place_of(result, position, row) for position in positions]
    )
    if not chosen:
        raise InputError("Name at least one position.")
    index = 0 if target is None else result.target(target)
    values = result.values[:, chosen, index, row].float()
    names = np.array([[text.highest(result, layer, row, at)[0] for at in chosen] for layer in range(len(values))])
    labels = next(iter(result.axes.values()))
    name = f"{html.escape(text.short(text.target_name(result, index), 34))} ({text.unit(result)})"
    figure = go.Figure(
        go.Heatmap(
            z=values.numpy(),
            x=list(range(len(chosen))),
            y=[text.layer_name(label) for label in labels],
            text=[[html.escape(text.short(cell)) for cell in line] for line in _cells(result, names, values)],
            texttemplate="%{text}",
            customdata=_hovers(result, row, chosen),
            hovertemplate="%{y}, %{customdata}<br>%{z:.3g}<extra></extra>",
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": name, "side": "right"}, "thickness": 12, "outlinewidth": 0},
            **_scale(values),
        )
    )
    read = _read_position(result, row, chosen)
    said = bool(torch.isfinite(values[-1, read]))
    if title is None:
        title = _table_finding(names[:, read], result, row, chosen[read], said)
        title += style.which_row(row, text.n_rows(result))
    style.layout(figure, title, 150 + 34 * len(labels))
    words = result.words[row] if result.words else [""] * len(numbers)
    ticks = [html.escape(text.plain(words[at])) or str(numbers[at]) for at in chosen]
    figure.update_xaxes(
        tickvals=list(range(len(chosen))), ticktext=ticks, showgrid=False, zeroline=False, side="bottom"
    )
    figure.update_yaxes(showgrid=False, zeroline=False)
    return figure


def _hovers(result: LensResult, row: int, chosen: Sequence[int]) -> list[list[str]]:
    """The position's number and the five highest columns of every cell."""
    numbers = result.axes["position"]
    layers = range(len(next(iter(result.axes.values()))))
    return [
        [
            f"position {numbers[at]}<br>highest: {html.escape(', '.join(text.highest(result, layer, row, at)))}"
            for at in chosen
        ]
        for layer in layers
    ]


def _scale(values: torch.Tensor) -> dict[str, Any]:
    """From zero where nothing is below it, symmetric otherwise."""
    finite, signed = values[torch.isfinite(values)].abs(), bool((values < 0).any())
    limit = (float(finite.max()) if finite.numel() else 0.0) or 1.0
    return {"colorscale": style.legible(signed), "zmin": -limit if signed else 0, "zmax": limit}


def _table_finding(names: np.ndarray, result: LensResult, row: int, at: int, said: bool) -> str:
    """From which layer on the position ranks first what the last layer ranks first."""
    labels = next(iter(result.axes.values()))
    same = np.flip(np.cumprod(np.flip(names == names[-1]))).astype(bool)
    since = labels[int(np.argmax(same))]
    where = html.escape(text.plain(result.words[row][at])) if result.words else ""
    where = where or f"position {result.axes['position'][at]}"
    if result.columns == "actions":
        return f"What the {text.tower_in_pass(result)} says in action dimensions, layer by layer: {text.target_name(result, 0)}"
    if not said:
        return f"At {where!r} the {text.tower_in_pass(result)} has no finite value at {text.layer_name(labels[-1])}"
    says = f"At {where!r} the {text.tower_in_pass(result)} ranks {html.escape(str(names[-1]))!r} first"
    if since == labels[-1]:
        return f"{says} at {text.layer_name(since)} only"
    return f"{says} from {text.layer_name(since)} on"


def _read_position(result: LensResult, row: int, chosen: Sequence[int]) -> int:
    """The column of the table that a reader looks at first: the class token where there is one, else the last."""
    kinds = result.kinds[row] if result.kinds else []
    return next((column for column, at in enumerate(chosen) if kinds and kinds[at] == "cls"), len(chosen) - 1)


def _cells(result: LensResult, names: np.ndarray, values: torch.Tensor) -> list[list[str]]:
    """What stands in the cells: the highest column, or the value itself where columns are no alternatives."""
    if result.columns == "actions":
        return [[text.number(value) for value in line] for line in values]
    return names.tolist()


def _columns(result: LensResult, row: int) -> list[int]:
    """Positions with words, or else all, but for padding; the last of them where there are many."""
    kinds = result.kinds[row] if result.kinds else [""] * len(result.axes["position"])
    text = [at for at, kind in enumerate(kinds) if kind == "text"]
    there = text or [at for at, kind in enumerate(kinds) if kind != "padding"]
    first = [at for at in there if kinds[at] == "cls"][:1]
    return [*first, *[at for at in there if at not in first][-(_MOST_COLUMNS - len(first)) :]]
