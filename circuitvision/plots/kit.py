"""What figures are put together from: panels, heat maps with words in their cells, bars, lines with chance, and the numbers in words.

Conventions, kept here so that every figure keeps them: layers rise from the bottom and run from left to right; terms and positions are listed from
the top; axes carry the labels of the result's axes, so regions and positions go by their names; orange is above zero and blue below; cells with
words have opaque colours and black or white words, whichever is easier to read; what chance gives is grey and dashed.

A figure computes nothing but the order of what it shows. Means and errors over examples are those of the result that it draws.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from circuitvision.findings import percent as percent
from circuitvision.plots import style
from circuitvision.plots.figure import Figure

if TYPE_CHECKING:
    from circuitvision.results import Result

MINUS = "\N{MINUS SIGN}"
MOST_WORDS = 200
"""Cells of a panel that have words in them, at most."""
_MOST_COLUMNS = 24
_MOST_TICKS = 24


# -- words ---------------------------------------------------------------------------------------------------------------------------------


def escaped(name: Any) -> str:
    """A name that somebody gave as text of a figure: no markup."""
    return html.escape(str(name), quote=False)


def number(value: Any, digits: int = 3) -> str:
    """A value in so many digits, with a proper minus sign."""
    return f"{float(value):.{digits}g}".replace("-", MINUS)


def signed(value: float) -> str:
    """Two decimals with a sign."""
    if math.isnan(value):
        return "no value"
    digits = f"{abs(value):.2f}" if abs(value) < 100 else f"{abs(value):.0f}"
    return digits if float(digits) == 0 else f"{'+' if value > 0 else MINUS}{digits}"


def direction(name: str) -> str:
    """The name of a direction such as "red - blue"."""
    return html.escape(name.replace(" - ", f" {MINUS} "))


def layer_name(layer: Any) -> str:
    """What a label of the axis of layers is called."""
    return f"layer {layer}" if isinstance(layer, int) else str(layer)


def nothing_found(values: Tensor, what: str, does: str) -> str | None:
    """What to say where there is nothing to find: no finite value, or zeros alone."""
    finite = values[torch.isfinite(values)]
    if not finite.numel():
        return f"No {what} has a finite value"
    return None if bool(finite.any()) else f"No {what} {does}"


def over(result: Result, example: Any = None) -> str:
    """A note: of which examples a figure shows the mean, or which one it shows."""
    count = len(result.examples)
    if example is None:
        return f"mean of {count} examples" if count > 1 else "one example"
    return f"example {example} of {count}"


def which(result: Result, entry: int, others: str = "example=") -> str:
    """A note: which of several examples a figure shows, by its place on the axis; nothing where there is no choice."""
    label, count = result.axes["example"][entry], len(result.examples)
    return f"example {label} of {count} ({others} shows another)" if count > 1 else ""


def color(number: int) -> str:
    """The colour of the n-th line or group."""
    return style.PALETTE[number % len(style.PALETTE)]


# -- panels --------------------------------------------------------------------------------------------------------------------------------


def panels(rows: int = 1, columns: int = 1, **options: Any) -> Figure:
    """An empty figure of panels; options as for ``plotly.subplots.make_subplots``."""
    from plotly.subplots import make_subplots

    return make_subplots(rows=rows, cols=columns, figure=Figure(), **options)


def empty(message: str, title: str | None = None) -> Figure:
    """A figure that says there is nothing to show."""
    figure = style.layout(Figure(), title or message, 40)
    return bare(figure, visible=False)


def bare(figure: Figure, **more: Any) -> Figure:
    """No lines on any axis."""
    figure.update_xaxes(showgrid=False, zeroline=False, **more)
    figure.update_yaxes(showgrid=False, zeroline=False, **more)
    return figure


def legend_below(figure: Figure, room: float = 56) -> None:
    """The legend in one line under the axis, ``room`` pixels below the panel."""
    height = figure.layout.height - figure.layout.margin.t - (figure.layout.margin.b or 0)
    figure.update_layout(
        legend={"orientation": "h", "y": -room / max(height, 1), "yanchor": "top", "x": 0, "traceorder": "normal"}
    )


def color_bar(title: str = "", tickformat: str | None = None, **more: Any) -> dict[str, Any]:
    """The look of a colour bar."""
    bar = {"title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0, "tickformat": tickformat}
    return {**bar, **more}


# -- heat maps -----------------------------------------------------------------------------------------------------------------------------


def largest(*grids: Tensor, robust: bool = False) -> float:
    """The largest absolute finite value, 1 if there is none or only zeros; ``robust`` leaves half a percent of outliers out."""
    values = torch.cat([grid.detach().double().flatten() for grid in grids]).abs()
    values = values[torch.isfinite(values)]
    found = float(values.quantile(0.995) if robust else values.max()) if values.numel() else 0.0
    return found or 1.0


def cells(
    figure: Figure,
    grid: Tensor,
    scale: style.Scale,
    low: float,
    high: float,
    *,
    words: Sequence[Sequence[str]] | None = None,
    row: int = 1,
    column: int = 1,
    size: float = style.SMALL,
    **trace: Any,
) -> None:
    """A value per cell ``[down across]`` at whole numbers, with words in the cells where they are given. A scale under words must be opaque."""
    down, across = grid.shape
    gaps = {"xgap": 2 if across <= 40 else 0, "ygap": 2 if down <= 40 else 0}
    own = {"colorscale": scale, "zmin": low, "zmax": high, "showscale": False}
    if trace.get("coloraxis"):
        own = {}
        figure.update_layout(coloraxis={"colorscale": scale, "cmin": low, "cmax": high})
    heat = go.Heatmap(z=grid.detach().float().numpy(), text=words, **{**gaps, **own, **trace})
    figure.add_trace(heat, row=row, col=column)
    if words is not None:
        write(figure, grid, scale, low, high, words, row, column, size, visible=trace.get("visible"))


def write(
    figure: Figure,
    grid: Tensor,
    scale: style.Scale,
    low: float,
    high: float,
    words: Sequence[Sequence[str]],
    row: int,
    column: int,
    size: float = style.SMALL,
    visible: bool | None = None,
) -> None:
    """Words in cells, black or white by the colour of their cell; a cell without a value has the page's colour, and its words the page's."""
    places = [(r, c) for r in range(grid.shape[0]) for c in range(grid.shape[1]) if words[r][c]]
    values = [float(grid[r, c]) for r, c in places]
    colors = [style.GREY if v != v else style.ink(scale, (v - low) / ((high - low) or 1.0)) for v in values]
    figure.add_scatter(
        x=[c for _, c in places], y=[r for r, _ in places], text=[words[r][c] for r, c in places], mode="text", meta="words",
        textfont={"color": colors, "size": size}, hoverinfo="skip", showlegend=False, visible=visible, row=row, col=column,
    )  # fmt: skip


def axis(labels: Sequence[Any], title: str | None, *, room: int = _MOST_TICKS, **more: Any) -> dict[str, Any]:
    """An axis of cells with the names of what they are; every n-th where there are more than ``room``."""
    names = [escaped(label) for label in labels]
    step = max(1, math.ceil(len(names) / max(room, 1)))
    ticks = list(range(0, len(names), step))
    return {
        "tickvals": ticks, "ticktext": [names[tick] for tick in ticks], "title": title, "range": [-0.5, len(names) - 0.5],
        "showgrid": False, "zeroline": False, **more,
    }  # fmt: skip


def heat(
    grids: Mapping[str, Tensor],
    down: tuple[str, Sequence[Any]],
    across: tuple[str, Sequence[Any]],
    *,
    unit: str,
    limit: float | None = None,
    below_zero: bool = True,
    share: bool = False,
    words: Mapping[str, Sequence[Sequence[str]]] | bool = True,
    marked: Mapping[str, Sequence[Any]] | None = None,
    names: Mapping[str, Sequence[Sequence[str]]] | None = None,
    hover: str = "",
    listed: bool = False,
    bar: str | None = None,
    in_row: int = 0,
) -> Figure:
    """Heat maps side by side on one colour scale, a panel per name; without title and height, which :func:`finish_heat` adds.

    Args:
        grids: name → values ``[down across]``; grids of fewer layers or heads than there are labels have the first ones.
        down, across: an axis' name and the labels of its cells.
        unit: what the values are counted in.
        limit: the value of the strongest colour (None: the largest there is).
        below_zero: whether the scale goes as far below zero.
        share: whether values are written as percentages.
        words: what stands in the cells; True: the values, where there is room.
        marked: name → labels of ``down`` that carry "(unread)".
        names: name → what hovering calls each cell; by default its labels, or ``hover``, a template over them.
        listed: whether ``down`` is a list, read from the top, and no stack of layers.
        bar: what stands at the colour bar (None: the unit).
        in_row: how many panels of one size stand in a row (0: all, as wide as they have columns).
    """
    columns = min(len(grids), in_row or len(grids))
    rows = math.ceil(len(grids) / columns)
    figure = _heat_panels(grids, rows, columns, not in_row)
    limit = largest(*grids.values()) if limit is None else limit
    low = -limit if below_zero else 0.0
    # One scale for all: opaque where words stand on it.
    written = words is not False and (words is not True or _has_room(grids, columns))
    scale = style.legible(below_zero) if written else style.diverging() if below_zero else style.sequential()
    form = ".1%" if share else "+.4g" if below_zero else ".4g"
    called = "%{customdata}" if names else hover or f"{down[0]} %{{customdata[0]}}, {across[0]} %{{customdata[1]}}"
    decimals = min(decimals_of(grid) for grid in grids.values())
    for number, (name, values) in enumerate(grids.items()):
        row, column = number // columns + 1, number % columns + 1
        unread = (marked or {}).get(name, ())
        side = [f"{label} (unread)" if label in unread else str(label) for label in down[1]][: len(values)]
        heads = [str(label) for label in across[1]][: values.shape[1]]
        own = None if not written else in_words(values, share, decimals) if words is True else words[name]  # type: ignore[index]
        cells(
            figure, values, scale, low, limit, words=own, row=row, column=column, coloraxis="coloraxis",
            customdata=names[name] if names else [[[escaped(label), escaped(head)] for head in heads] for label in side],
            hovertemplate=f"{called}<br>%{{z:{form}}} {unit}<extra>{escaped(name)}</extra>",
        )  # fmt: skip
        rising = axis(side, down[0] if column == 1 else None, room=(16 if len(side) > 32 else 32) if rows == 1 else 8)
        rising["range"] = rising["range"][:: -1 if listed else 1]
        rising["showticklabels"] = column == 1 or not in_row
        below = axis(heads, across[0] if number + columns >= len(grids) else None, room=32 // columns, tickangle=0)
        figure.update_yaxes(**rising, automargin=True, row=row, col=column)
        figure.update_xaxes(**below, row=row, col=column)
    bar = unit.partition(" of ")[0] if bar is None else bar
    figure.update_layout(coloraxis={"colorbar": color_bar(bar, ".0%" if share else ".3~g")})
    return figure


def _heat_panels(grids: Mapping[str, Tensor], rows: int, columns: int, widths: bool) -> Figure:
    """The panels of heat maps, one per name; ``widths``: as wide as they have columns."""
    tops = [max(grid.shape[1], 1) for grid in grids.values()]
    return panels(
        rows, columns, subplot_titles=[escaped(name) for name in grids] if len(grids) > 1 else None, vertical_spacing=0.24 / rows,
        column_widths=[top / sum(tops) for top in tops] if widths else None,
        horizontal_spacing=(0.1 / max(columns - 1, 1) if widths else 0.08 / columns) if columns > 1 else 0,
    )  # fmt: skip


def _has_room(grids: Mapping[str, Tensor], columns: int) -> bool:
    """Whether the cells of panels, so many in a row, are wide enough for words."""
    widest = sum(sorted((grid.shape[1] for grid in grids.values()), reverse=True)[:columns])
    return all(grid.numel() <= MOST_WORDS for grid in grids.values()) and widest <= _MOST_COLUMNS * 1.4


def grid(
    values: Tensor, down: tuple[str, Sequence[Any]], across: tuple[str, Sequence[Any]], title: str, **options: Any
) -> Figure:
    """One heat map with its title; options as for :func:`heat`."""
    return finish_heat(heat({"": values}, down, across, **options), title, len(values))


def finish_heat(figure: Figure, title: str, layers: int, rows: int = 1) -> Figure:
    """Title and height of rows of heat maps of so many layers."""
    tall = min(max(34 * layers, 110), 600 if rows == 1 else 300)
    above = 26 if any(note.yref == "paper" for note in figure.layout.annotations) else 0
    return style.layout(figure, title, 70 + rows * tall + (rows - 1) * 60, above=above)


def decimals_of(grid: Tensor) -> int:
    """As many decimals as give the largest value two digits."""
    return max(0, 1 - math.floor(math.log10(largest(grid))))


def in_words(grid: Tensor, share: bool = False, decimals: int | None = None) -> list[list[str]]:
    """Values as short words, with as many decimals as give the largest two digits; a dash where there is none."""
    decimals = decimals_of(grid) if decimals is None else decimals

    def word(value: float) -> str:
        if value != value:
            return "–"
        found = style.signed_percent(value) if share else f"{value:.{decimals}f}".replace("-", MINUS)
        return found.removeprefix(MINUS) if not any(digit in found for digit in "123456789") else found

    return [[word(value) for value in line] for line in grid.tolist()]


# -- bars and lines ------------------------------------------------------------------------------------------------------------------------


def bars(
    names: Sequence[str],
    values: Sequence[float],
    title: str,
    across: str,
    *,
    errors: Sequence[float] | None = None,
    words: Sequence[str] | None = None,
    beside: Sequence[str] | None = None,
    hover: Sequence[str] | None = None,
) -> Figure:
    """Bars from the top, orange above zero and blue below, with their values (``words``) at the right edge, or ``beside`` the bars."""
    figure = Figure()
    add_bars(figure, names, values, errors=errors, hover=hover)
    whiskers = errors is not None and any(error == error and error for error in errors)
    for row, text in enumerate(
        words if words is not None else [signed(value) for value in values] if beside is None else []
    ):
        figure.add_annotation(x=1, xref="paper", xanchor="left", xshift=10, y=row, text=text, showarrow=False)
    for row, text in enumerate(beside or ()):
        figure.add_annotation(x=max(values[row], 0), y=row, xanchor="left", xshift=8, text=text, showarrow=False)
    right = 20 if beside else 75
    style.layout(
        figure, title, 66 + 27 * max(len(names), 1), showlegend=False, bargap=0.3, margin={"l": 20, "r": right, "b": 50}
    )
    if not whiskers:
        figure.update_traces(error_x={"visible": False})
    figure.update_xaxes(
        title={"text": across, "font": {"size": style.TEXT}}, gridcolor=style.FAINT, zeroline=True, zerolinecolor=style.GREY,
        zerolinewidth=1, rangemode="tozero",
    )  # fmt: skip
    return figure


def add_bars(
    figure: Figure,
    names: Sequence[str],
    values: Sequence[float],
    *,
    errors: Sequence[float] | None = None,
    hover: Sequence[str] | None = None,
    row: int | None = None,
    column: int | None = None,
) -> None:
    """Bars in one panel, listed from the top by names that are text already."""
    spread = {"array": list(errors), "color": style.GREY, "thickness": 1.5, "width": 5} if errors is not None else None
    figure.add_bar(
        x=list(values), y=list(range(len(names))), orientation="h", error_x=spread, customdata=list(hover or names),
        marker={"color": [style.FOR if value >= 0 else style.AGAINST for value in values], "line": {"width": 0}},
        hovertemplate="%{customdata}: %{x:+.4g}<extra></extra>", row=row, col=column,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=list(names), range=[len(names) - 0.5, -0.5], automargin=True, showgrid=False,
        zeroline=False, tickfont={"size": style.SMALL}, row=row, col=column,
    )  # fmt: skip


def line(figure: Figure, x: Iterable[Any], y: Iterable[Any], name: str, color: str, **more: Any) -> None:
    """A line with markers and, with ``errors=(below, above)``, whiskers; other keywords go to the trace."""
    errors = more.pop("errors", None)
    bars = {} if errors is None else {"error_y": {
        "arrayminus": list(errors[0]), "array": list(errors[1]), "color": color, "thickness": 1.5, "width": 4,
    }}  # fmt: skip
    look = {"mode": "lines+markers", "line": {"color": color, "width": 2.5}, "marker": {"size": 7, "color": color}}
    extra = {"hovertemplate": f"{name}, %{{x}}: %{{y:.3g}}<extra></extra>"}
    figure.add_scatter(x=list(x), y=list(y), name=name, **{**look, **extra, **bars, **more})


def chance(
    figure: Figure, x: Iterable[Any], y: Iterable[Any], name: str = "chance", color: str = style.GREY, **more: Any
) -> None:
    """What chance gives: a grey dashed line."""
    look = {"mode": "lines", "line": {"color": color, "width": 1.5, "dash": "dash"}}
    figure.add_scatter(
        x=list(x), y=list(y), name=name, **{**look, "hovertemplate": f"{name}: %{{y:.3g}}<extra></extra>", **more}
    )


def band(
    figure: Figure,
    x: Sequence[Any],
    low: Sequence[float],
    high: Sequence[float],
    color: str = style.GREY,
    name: str = "",
) -> None:
    """A filled range between two lines."""
    rgb = ",".join(str(int(color[start : start + 2], 16)) for start in (1, 3, 5))
    figure.add_scatter(
        x=[*x, *list(x)[::-1]], y=[*low, *list(high)[::-1]], fill="toself", fillcolor=f"rgba({rgb},0.22)", line={"width": 0},
        mode="lines", hoverinfo="skip", showlegend=False, name=name,
    )  # fmt: skip


def finish_lines(
    figure: Figure, title: str, y: str, height: int = 330, *, x: str | None = None, share: bool = False, names: bool = False, **more: Any
) -> Figure:  # fmt: skip
    """Title, axes and, of several lines, a legend below; ``names``: what stands across are names, though they look like numbers."""
    style.layout(
        figure,
        title,
        height,
        margin={"l": 64, "r": 20, "b": 96 if figure.layout.showlegend is not False else 56},
        **more,
    )
    figure.update_yaxes(title=y, tickformat=".0%" if share else None, gridcolor=style.FAINT, zerolinecolor=style.FAINT)
    figure.update_xaxes(title=x, showgrid=False, zeroline=False, type="category" if names else None)
    legend_below(figure)
    return figure
