"""A lens as a table of layers × positions of one example: what stands highest at every place, the shade its value or a target's."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.plots import kit, style
from circuitvision.plots import lens_text as text
from circuitvision.readout.patch_coords import entry_of

if TYPE_CHECKING:
    from circuitvision.readout.lens.result import LensResult

_MOST_COLUMNS = 24


def table(
    result: LensResult,
    example: Any = None,
    positions: Sequence[int | str] | None = None,
    target: Any = None,
    title: str | None = None,
    image: int | None = None,
    tile: int | None = None,
) -> kit.Figure:
    """Layers × positions of one example; every cell names its highest column. Colour: its value, or a target's.

    Args:
        result: a lens over layers.
        example, image, tile: which one; None: the first.
        positions: labels of the positions shown, or "last"; by default text, then whatever there is, at most the last 24.
        target: label, or else number, of the target that colours the cells; of a lens by rank, the highest column's value does.
        title: by default from which layer on the last position says what the last layer says.
    """
    text.check_heads(result)
    if not result.ids.numel():
        raise InputError(
            "A mean over positions has no highest columns to name; choose view='layers', or read the lens without positions=."
        )
    entry, labels = entry_of(result, example, image, tile), text.layers(result)
    chosen = (
        _columns(result, entry)
        if positions is None
        else [text.place_of(result, position, entry) for position in positions]
    )
    if not chosen:
        raise InputError("Name at least one position.")
    index = 0 if target is None else result.target(target)
    values = result.values[:, chosen, index, entry].float()
    names = np.array([[text.highest(result, layer, entry, at)[0] for at in chosen] for layer in range(len(labels))])
    # Where columns are no alternatives the value itself is what is read.
    words = (
        [[kit.number(value) for value in line] for line in values] if result.columns == "actions" else names.tolist()
    )
    signed, limit = bool((values < 0).any()), kit.largest(values)
    hover = [[_hover(result, layer, entry, at) for at in chosen] for layer in range(len(labels))]
    bar = kit.color_bar(f"{html.escape(text.short(text.target_name(result, index), 34))} ({text.unit(result)})")
    # Words keep inside their cells on a page of the usual width; hovering shows them whole.
    size = style.SMALL if len(chosen) <= 10 else 9
    width = max(5, min(22, int(1030 / len(chosen) / size)))
    figure = kit.panels()
    kit.cells(
        figure, values, style.legible(signed), -limit if signed else 0, limit, showscale=True, colorbar=bar, customdata=hover,
        words=[[html.escape(text.short(cell, width)) for cell in line] for line in words],
        hovertemplate="%{customdata}<br>%{z:.3g}<extra></extra>", size=size,
    )  # fmt: skip
    if title is None:
        title = style.titled(_found(result, names, entry, chosen), kit.which(result, entry))
    style.layout(figure, title, 90 + 34 * len(labels))
    ticks = [text.position_name(result, entry, at).removeprefix("position ") for at in chosen]
    figure.update_xaxes(**kit.axis(ticks, None, side="bottom"))
    figure.update_yaxes(**kit.axis([kit.layer_name(label) for label in labels], None, room=99, automargin=True))
    return figure


def _hover(result: LensResult, layer: int, entry: int, at: int) -> str:
    """The layer, the position's label and the five highest columns of a cell."""
    where = f"position {result.axes['position'][at]}"
    return f"{where}<br>{kit.layer_name(text.layers(result)[layer])}<br>highest: {html.escape(', '.join(text.highest(result, layer, entry, at)))}"


def _found(result: LensResult, names: np.ndarray, entry: int, chosen: Sequence[int]) -> str:
    """From which layer on the position that is read first ranks first what the last layer ranks first."""
    tower, labels = text.tower_and_pass(result, noun=True), text.layers(result)
    if result.columns == "actions":
        return f"What the {tower} says in action dimensions, layer by layer: {text.target_name(result, 0)}"
    kinds = result.kinds[entry] if result.kinds else []
    # The class token where there is one, else the last.
    read = next((column for column, at in enumerate(chosen) if kinds and kinds[at] == "cls"), len(chosen) - 1)
    at, where = chosen[read], html.escape(text.position_name(result, entry, chosen[read]))
    if not math.isfinite(float(result.values[-1, at, 0, entry])):
        return f"At {where!r} the {tower} has no finite value at {kit.layer_name(labels[-1])}"
    same = np.flip(np.cumprod(np.flip(names[:, read] == names[-1, read]))).astype(bool)
    since = labels[int(np.argmax(same))]
    when = f"at {kit.layer_name(since)} only" if since == labels[-1] else f"from {kit.layer_name(since)} on"
    margin = text.margin(result, -1, at, entry)
    word = html.escape(str(names[-1, read]))
    return str(findings.ranks_first(tower, word, repr(where), when, margin, result.measure))


def _columns(result: LensResult, entry: int) -> list[int]:
    """Positions with words, or else all, but for padding; the last of them where there are many."""
    kinds = result.kinds[entry] if result.kinds else [""] * len(result.axes["position"])
    words = [at for at, kind in enumerate(kinds) if kind == "text"]
    there = words or [at for at, kind in enumerate(kinds) if kind != "padding"]
    first = [at for at in there if kinds[at] == "cls"][:1]
    return [*first, *[at for at in there if at not in first][-(_MOST_COLUMNS - len(first)) :]]
