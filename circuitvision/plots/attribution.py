"""Figures of attributions: bars of the strongest terms, what a head takes from where, scores of heads by layer, and pairs of terms of two towers.

Orange adds to the direction, blue takes from it. Bars are means over rows with standard errors; what is not shown is gathered in one bar, so
that the bars add up to the total in the subtitle.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitvision.errors import InputError
from circuitvision.model.names import Component, component, head_name, is_component, spelled
from circuitvision.plots import _check_keywords, patches, style
from circuitvision.plots.lens_text import plain
from circuitvision.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.attribution.bilinear import BilinearAttribution
    from circuitvision.readout.attribution.direct import Attribution, SourceAttribution
    from circuitvision.readout.attribution.increase import LogProbIncrease, SourceIncrease
    from circuitvision.readout.ranks import Ranking

_MINUS = "\N{MINUS SIGN}"


def attribution(result: Attribution, view: str = "bars", **keywords: Any) -> go.Figure:
    """A figure of one attribution: ``view`` is "bars" or "heads" (see the functions of these names for keywords).

    Raises:
        InputError: no such view, a keyword that it does not take, or heads of an attribution that does not split them.
    """
    views: dict[str, Any] = {"bars": bars, "heads": heads}
    if view not in views:
        raise InputError(f"Unknown view {view!r}; choose one of {', '.join(views)}.")
    _check_keywords(views[view], f"{type(result).__name__} in the view {view!r}", keywords)
    return views[view](result, **keywords)


def heads(result: Attribution, row: int | None = None, title: str | None = None) -> go.Figure:
    """Layers × heads of direct attribution, of one row or the mean over examples.

    Raises:
        InputError: no such row, or an attribution by component, which has no heads.
    """
    values = result.mean() if row is None else result.values[:, result.row_number(row)].double()
    found = {
        (component(term).layer, component(term).head): float(value)
        for term, value in zip(result.axes["term"], values.tolist(), strict=True)
        if is_component(term) and component(term).kind == "head"
    }
    if not found:
        raise InputError("This attribution does not tell heads apart; make it with by='head'.")
    layers, across = (sorted({place[axis] for place in found}) for axis in (0, 1))
    grid = torch.tensor([[found.get((layer, head), math.nan) for head in across] for layer in layers])
    direction = _words(result.direction)
    title = title or nothing_found(grid, "head", f"adds anything to {direction}")
    if title is None:
        best = max(found, key=lambda place: abs(found[place]) if not math.isnan(found[place]) else -1.0)
        verb = "adds" if found[best] >= 0 else "takes"
        title = f"{head_name(*best, result.tower)} {verb} most of all heads: {_number(found[best])} of {direction}"
        rows, count = result.values.shape[1], len(result.examples)
        over = f"mean of {count} examples" if row is None and count > 1 else f"row {row or 0} of {rows}"
        title += f"<br><span style='font-size:12px'>all terms, MLPs and biases included, add up to {_total(result, row)}; {over}</span>"
    return _heat(grid, layers, across, "layer", "head", title, "direct")


def _total(result: Attribution, row: int | None) -> str:
    return _number(float(result.mean(quantity="total") if row is None else result.total[row]))


def bars(result: Attribution, count: int = 14, title: str | None = None) -> go.Figure:
    """The ``count`` strongest terms as bars, the rest as one; mean over examples, whiskers are standard errors."""
    mean, count_of = result.mean(), len(result.examples)
    order = mean.abs().nan_to_num(-1.0).argsort(descending=True)
    shown, rest = order[:count].tolist(), order[count:]
    names = [result.axes["term"][index] for index in shown]
    parts = result.values.double()
    parts = torch.cat([parts[shown], parts[rest].sum(0, keepdim=True)]) if len(rest) else parts[shown]
    names += [f"{len(rest)} others"] if len(rest) else []
    drawn = Result(parts, {"term": names, "example": result.axes["example"]})
    heights, errors = drawn.mean().tolist(), drawn.error().nan_to_num(0.0).tolist()
    total = float(result.mean(quantity="total"))
    direction = _words(result.direction)
    title = title or nothing_found(mean, "term", f"adds anything to {direction}")
    if title is None:
        share = (
            f", {heights[0] / total:.0%} of it".replace("-", _MINUS) if total and 0 < heights[0] / total < 10 else ""
        )
        verb = "adds" if heights[0] >= 0 else "takes"
        title = f"{html.escape(names[0])} {verb} most: {_number(heights[0])} of {direction}{share}"
    cap = " before the soft cap" if result.is_capped else ""
    note = f"all terms add up to {_number(total)}{cap}"
    note += f" ({_number(float(result.mean(quantity='capped')))} under it)" if cap else ""
    note += f"; mean of {count_of} examples ± standard error" if count_of > 1 else ""
    return _bars(
        names,
        heights,
        errors,
        count_of > 1,
        f"{title}<br><span style='font-size:12px'>{note}</span>",
        f"{direction}, directly{cap}",
    )


def ranked(result: Ranking, count: int = 14, title: str | None = None) -> go.Figure:
    """The first ``count`` components of a ranking as bars; those that stand out (mean + 2 sd) are counted in the title."""
    names = result.top(count)
    scores = result.scores
    heights = scores[:count].tolist()
    errors = (result.error() if "example" in result.axes else torch.full_like(scores, torch.nan)).nan_to_num(0.0)
    finite = bool(torch.isfinite(scores).any())
    outstanding = result.above_threshold() if finite and len(scores) > 1 else []
    title = title or nothing_found(scores, "component", "has a score other than 0")
    if title is None:
        title = f"{html.escape(names[0])} comes first: {_number(heights[0])}"
    note = f"{len(outstanding)} of {len(scores)} components at or beyond mean + 2 sd"
    heading = f"{title}<br><span style='font-size:12px'>{note}</span>"
    return _bars(names, heights, errors[:count].tolist(), bool(errors.any()), heading, "score")


def _bars(
    names: list[str], heights: list[float], errors: list[float], whiskers: bool, heading: str, across: str
) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Bar(
            x=heights,
            y=list(range(len(names))),
            orientation="h",
            marker={"color": [style.FOR if value >= 0 else style.AGAINST for value in heights], "line": {"width": 0}},
            error_x={"array": errors, "visible": whiskers, "color": style.GREY, "thickness": 1.5, "width": 5},
            customdata=[html.escape(name) for name in names],
            hovertemplate="%{customdata}: %{x:+.4g}<extra></extra>",
        )
    )
    for row, value in enumerate(heights):
        figure.add_annotation(x=1, xref="paper", xanchor="left", xshift=10, y=row, text=_number(value), showarrow=False)
    height = 150 + 26 * len(names)
    style.layout(figure, heading, height, showlegend=False, bargap=0.3, margin={"l": 110, "r": 75, "t": 84, "b": 50})
    figure.update_xaxes(
        title=across, gridcolor=style.FAINT, zeroline=True, zerolinecolor=style.GREY, rangemode="tozero"
    )
    ticks = [html.escape(name) for name in names]
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=ticks, autorange="reversed", showgrid=False, zeroline=False
    )
    return figure


def _given(heads: Sequence[Component], result: SourceAttribution | SourceIncrease) -> list[tuple[int, int]]:
    """Heads as (layer, head); InputError for one that the result does not hold."""
    found = [component(head) for head in ([heads] if is_component(heads) else heads)]
    for node in found:
        there = (
            node.tower in ("", result.tower) and node.layer in result.axes["layer"] and node.head in result.axes["head"]
        )
        if node.kind != "head" or not there:
            raise InputError(f"{spelled(node)} is not among the heads of this result, of the {result.tower} tower.")
    return [(node.layer, node.head) for node in found]


def sources(
    result: SourceAttribution | SourceIncrease,
    row: int = 0,
    heads: Sequence[Component] | None = None,
    picture: Any = None,
    box: patches.Box | None = None,
    image: int = 0,
    title: str | None = None,
    tile: int | None = None,
) -> go.Figure:
    """What the strongest heads (or those given, as ``(layer, head)`` or ``"L1H3"``) take from each image patch and word of one row.

    ``picture`` is ``[height width 3]`` or a PIL image; ``box`` (left, top, right, bottom) in its pixels or as shares of it. ``tile=None`` is
    the first tile there is of the image.

    Raises:
        InputError: no such row, image or tile, or no source position that is a patch.
    """
    from plotly.subplots import make_subplots

    from circuitvision.readout.patch_coords import extent_of, on_grid

    values = result.values[..., result.row_number(row)].double()
    layers = result.axes["layer"]
    strongest = _strongest(values, layers) if heads is None else _given(heads, result)
    places = result.places[row]
    if not bool((places[:, 2] >= 0).any()):
        raise InputError("No source position of this row is an image patch; use to_frame() for words.")
    pixels = None if picture is None else patches.as_picture(picture)
    box = patches.as_shares(box, pixels)
    maps = [
        on_grid(values[result.index_of("layer", layer), result.index_of("head", head)], places, image, tile)
        for layer, head in strongest
    ]
    limit = max(float(grid.abs().nan_to_num(0).max()) for grid in maps) or 1.0
    headings = [head_name(layer, head, result.tower) for layer, head in strongest]
    first = int(pixels is not None)
    figure = make_subplots(
        rows=1, cols=len(maps) + first, column_titles=["image"] * first + headings, horizontal_spacing=0.02
    )
    if pixels is not None:
        patches.add_picture(figure, pixels, 1)
        patches.mark(figure, box, pixels.shape[0], pixels.shape[1], 1, 1)
    for column, (grid, (layer, head)) in enumerate(zip(maps, strongest, strict=True), start=1 + first):
        patches.add_map(figure, grid, 1, column)
        extent = extent_of(result.shares, result.places, row, image, tile)
        patches.mark(figure, box, grid.shape[0], grid.shape[1], 1, column, extent=extent)
        _add_words(figure, result, values[result.index_of("layer", layer), result.index_of("head", head)], row, column)
    if title is None:
        title = _source_finding(result, values, strongest[0], row)
        title += style.which_row(row, len(result.axes["example"]))
    width = 940 / (len(maps) + first)
    style.layout(figure, title, int(162 + width), margin={"l": 10, "r": 40, "t": 102, "b": 50})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    bar = {"title": {"text": _words(result.direction), "side": "right"}, "thickness": 12, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": style.diverging(), "cmin": -limit, "cmax": limit, "colorbar": bar})
    return figure


def _strongest(values: torch.Tensor, layers: list[int], count: int = 4) -> list[tuple[int, int]]:
    order = values.abs().sum(-1).flatten().nan_to_num(-1.0).argsort(descending=True)[:count].tolist()
    return [(layers[at // values.shape[1]], at % values.shape[1]) for at in order]


def _source_finding(
    result: SourceAttribution | SourceIncrease, values: torch.Tensor, best: tuple[int, int], row: int
) -> str:
    share, places = values[result.axes["layer"].index(best[0]), best[1]], result.places[row]
    direction = _words(result.direction)
    nothing = nothing_found(share, "source", f"of {head_name(*best, result.tower)} adds anything to {direction}")
    if nothing is not None:
        return nothing
    if hasattr(result, "answer"):
        # Increases do not add up over sources: the strongest is named instead of a sum.
        at = int(share.abs().nan_to_num(-1.0).argmax())
        source = "an image patch" if int(places[at, 2]) >= 0 else html.escape(repr(result.words[row][at]))
        return f"What {head_name(*best, result.tower)} takes from {source} moves {direction} by {_number(float(share[at]))} nats"
    total = float(share.sum())
    image = float(share[places[:, 2] >= 0].sum())
    part = f"{image / total:.0%} of it from image patches".replace("-", _MINUS) if total else "nothing"
    return f"{head_name(*best, result.tower)} adds {_number(total)} to {direction}, {part}"


def _add_words(
    figure: go.Figure, result: SourceAttribution | SourceIncrease, share: torch.Tensor, row: int, column: int
) -> None:
    """Below a map, the word the head takes most from."""
    words = [at for at in range(len(share)) if int(result.places[row, at, 2]) < 0]
    if not words:
        return
    best = max(words, key=lambda at: float(share[at].abs().nan_to_num(-1.0)))
    word = plain(result.words[row][best]).strip() if result.words else ""
    text = f"{html.escape(repr(word)) if word else f'position {best}'} {_number(float(share[best]))}"
    where = {"xref": "x domain", "yref": "y domain", "x": 0.5, "y": -0.06, "yanchor": "top"}
    figure.add_annotation(text=text, showarrow=False, font={"size": 12}, row=1, col=column, **where)


def increase(result: LogProbIncrease, row: int | None = None, title: str | None = None) -> go.Figure:
    """Layers × heads (parts, or the strongest neurons) of log-probability increase, of one row or the mean over examples."""
    names = list(result.axes)
    values = result.mean() if row is None else result.values[..., result.row_number(row)].double()
    inner = names[1]
    labels = result.axes[inner]
    if inner == "neuron" and values.shape[1] > 24:
        keep = values.abs().nan_to_num(-1.0).max(0).values.argsort(descending=True)[:24].sort().values
        values, labels = values[:, keep], [labels[index] for index in keep.tolist()]
    best = divmod(int(values.abs().nan_to_num(-1.0).argmax()), values.shape[1])
    title = title or nothing_found(values, inner, f"moves log p({html.escape(result.answer)})")
    if title is None:
        title = (
            f"{inner} {labels[best[1]]} of layer {result.axes['layer'][best[0]]} moves log p({html.escape(result.answer)}) most: "
            f"{_number(float(values[best]))} nats"
        )
    return _heat(values, result.axes["layer"], labels, "layer", inner, title, "nats")


def bilinear(result: BilinearAttribution, image: int = 0, text: int = 0, title: str | None = None) -> go.Figure:
    """Terms of the image tower × terms of the text tower for one pair, or terms × prompts where the texts are not split.

    Raises:
        InputError: no such image or text.
    """
    for name, number, axis in (("image", image, "example"), ("text", text, "text")):
        if number not in range(len(result.axes[axis])):
            raise InputError(f"There is no {name} {number}; this result has {len(result.axes[axis])}, counted from 0.")
    if len(result.axes["text_term"]) == 1:
        values, across, name = result.values[:, 0, :, image].double(), result.axes["text"], "prompt"
    else:
        values, across, name = result.values[:, :, text, image].double(), result.axes["text_term"], "text term"
    best = divmod(int(values.abs().nan_to_num(-1.0).argmax()), values.shape[1])
    title = title or nothing_found(values, "pair of terms" if name == "text term" else "term", "adds anything")
    if title is None:
        title = (
            f"{result.axes['image_term'][best[0]]} with {html.escape(str(across[best[1]]))} adds most: {_number(float(values[best]))} "
            f"of {_number(float(result.total[text, image]))}"
            if name == "text term"
            else f"{result.axes['image_term'][best[0]]} moves {html.escape(str(across[best[1]]))!r} most: {_number(float(values[best]))}"
        )
        pair = f"image {image} of {len(result.axes['example'])}"
        pair += f", {html.escape(str(result.axes['text'][text]))!r}" if name == "text term" else ""
        title += f"<br><span style='font-size:12px'>{pair} (image= and text= show others)</span>"
    return _heat(values, result.axes["image_term"], across, "image term", name, title, "logit")


def _heat(
    values: torch.Tensor, down: list[Any], across: list[Any], down_name: str, across_name: str, title: str, unit: str
) -> go.Figure:
    import plotly.graph_objects as go

    limit = float(values.abs().nan_to_num(0.0, posinf=0.0).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values.numpy(),
            x=[html.escape(str(label)) for label in across],
            y=[html.escape(str(label)) for label in down],
            colorscale=style.diverging(),
            zmin=-limit,
            zmax=limit,
            xgap=2 if values.shape[1] <= 40 else 0,
            ygap=2 if values.shape[0] <= 40 else 0,
            hovertemplate=f"{down_name} %{{y}}, {across_name} %{{x}}<br>%{{z:+.4g}} {unit}<extra></extra>",
            colorbar={"title": unit, "thickness": 14, "outlinewidth": 0},
        )
    )
    style.layout(
        figure, title, 150 + min(max(26 * values.shape[0], 120), 620), margin={"l": 90, "r": 20, "t": 60, "b": 60}
    )
    figure.update_xaxes(title=across_name, type="category", showgrid=False, zeroline=False)
    # Layers rise, as in every other figure; terms are listed downwards.
    order = "reversed" if down_name != "layer" else True
    figure.update_yaxes(title=down_name, type="category", showgrid=False, zeroline=False, autorange=order)
    return figure


def nothing_found(values: torch.Tensor, what: str, does: str) -> str | None:
    """What to say where there is nothing to find: no finite value, or zeros alone."""
    finite = values[torch.isfinite(values)]
    if not finite.numel():
        return f"No {what} has a finite value"
    return None if bool(finite.any()) else f"No {what} {does}"


def _number(value: float) -> str:
    """Two decimals with a sign."""
    if math.isnan(value):
        return "no value"
    digits = f"{abs(value):.2f}" if abs(value) < 100 else f"{abs(value):.0f}"
    return digits if float(digits) == 0 else f"{'+' if value > 0 else _MINUS}{digits}"


def _words(direction: str) -> str:
    return html.escape(direction.replace(" - ", f" {_MINUS} "))
