"""Figures of what weights say: value vectors as rows of words, agreement beside chance, singular values, composition between heads."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitvision import findings
from circuitvision.model.names import head_name
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from circuitvision.readout.weights.agreement import ClassValueAgreement, KeyValueAgreement
    from circuitvision.readout.weights.head_circuits import CompositionScores, SingularVectors
    from circuitvision.readout.weights.value_vectors import ValueVectors

_KINDS = {"patch": style.FOR, "cls": style.AGAINST, "text": style.AGAINST, "action": style.FOR}


def value_vectors(
    result: ValueVectors, targets: Sequence[int | str] | None = None, count: int = 12, title: str | None = None
) -> kit.Figure:
    """Value vectors as rows, their outputs as cells; the stronger the colour the larger the value, orange above zero and blue below.

    With ``targets`` the rows are what :meth:`ValueVectors.search` finds, and cells of other outputs have no colour; without, they are the rows with
    the largest values. A result that keeps targets instead of a ranking has one column for each.
    """
    if targets is None and not result.ranked:
        targets = [int(column) for column in result.ids]
    places = _strongest(result, count) if targets is None else _found(result, targets, count)
    rows = [result.outputs(*place) for place in places]
    if not rows:
        return kit.empty("No value vector holds any of these outputs", title)
    asked = None if targets is None else {t if isinstance(t, str) else result.label(t) for t in targets}
    marked = [[asked is None or name in asked or _plain(name) in asked for name, _ in row] for row in rows]
    limit = max(max(abs(value) for row in rows for _, value in row), 1e-12)
    shade = torch.tensor([[value / limit for _, value in row] for row in rows])
    width = max(8, 104 // len(rows[0]))
    words = [[_shown(name, width) if result.ranked else kit.signed(value) for name, value in row] for row in rows]
    hover = [[[_shown(name), value] for name, value in row] for row in rows]
    names = [_place_name(result, place) for place in places]
    figure = kit.panels()
    kit.cells(
        figure, shade.masked_fill(~torch.tensor(marked), math.nan), style.legible(signed=True), -1, 1, words=words, customdata=hover,
        hovertemplate="%{customdata[0]}<br>%{customdata[1]:.4g}<extra></extra>",
    )  # fmt: skip
    unit = "cosine" if result.measure == "cosine" else "per unit of activation"
    order = f", {'highest' if result.largest else 'lowest'} outputs first" if result.ranked else ""
    note = f"{result.tower} tower{order}; strongest colour: {limit:.2g} {unit}"
    found = title or _value_title(result, names, rows, marked, targets)
    style.layout(figure, style.titled(found, note), 66 + 30 * len(rows), margin={"l": 20})
    ticks = (
        [str(rank) for rank in result.axes["rank"]]
        if result.ranked
        else [html.unescape(_shown(n, width)) for n, _ in rows[0]]
    )
    figure.update_xaxes(**kit.axis(ticks, "rank" if result.ranked else None))
    figure.update_yaxes(**{**kit.axis(names, None, room=99, automargin=True), "range": [len(names) - 0.5, -0.5]})
    return figure


def class_value_agreement(result: ClassValueAgreement, title: str | None = None) -> kit.Figure:
    """Every class's agreement by layer, over the range that sets of random rows reach on average."""
    layers, means, (low, middle, high) = result.axes["layer"], result.over_classes(), result.chance()
    figure = kit.Figure()
    figure.add_hrect(y0=low, y1=high, fillcolor=style.FAINT, line_width=0)
    figure.add_hline(y=middle, line={"color": style.GREY, "width": 1.5, "dash": "dash"})
    figure.add_scatter(
        x=[index for index in range(len(layers)) for _ in result.axes["class"]], y=result.values.flatten().tolist(), mode="markers",
        marker={"size": 9, "color": style.AGAINST, "opacity": 0.8}, name="a class", hovertemplate="%{text}<br>cosine %{y:.3f}<extra></extra>",
        text=[f"{_shown(str(label))}: layer {layer}" for layer in layers for label in result.axes["class"]],
    )  # fmt: skip
    mark = {"size": 12, "color": style.FOR, "symbol": "diamond"}
    kit.line(figure, range(len(layers)), means.tolist(), "mean of the classes", style.FOR, marker=mark)
    note = f"{result.tower} tower, {result.component}; grey: the mean over classes of {len(result.random)} sets of random rows"
    heading = style.titled(title or str(findings.points_at_classes(result)), note)
    kit.finish_lines(figure, heading, "largest cosine")
    figure.update_xaxes(**kit.axis(layers, "layer"))
    return figure


def key_value_agreement(result: KeyValueAgreement, title: str | None = None) -> kit.Figure:
    """The rate by layer for every kind of position, as a line, and its chance level, dashed in the same colour."""
    summary, layers = result.summary(), result.axes["layer"]
    figure = kit.Figure()
    for number, (kind, part) in enumerate(summary.groupby("kind", sort=False)):
        color = _KINDS.get(str(kind), (style.GREY, style.FOR, style.AGAINST)[number % 3])
        kit.line(figure, part["layer"].tolist(), part["rate"].tolist(), f"{kind}", color)
        kit.chance(figure, part["layer"].tolist(), part["chance"].tolist(), f"{kind}, by chance", color)
    if title is None:
        best = max(summary.to_dict("records"), key=lambda entry: entry["rate"] - entry["chance"])
        told = findings.agrees(result.measure, best["kind"], str(best["layer"]), best["rate"], best["chance"])
        title = str(told)
    note = f"{result.tower} tower, {'neurons' if result.component == 'mlp' else 'channels of heads'}; dashed: by chance"
    unit = "share of active keys" if result.measure == "compositionality" else "share of tokens"
    kit.finish_lines(figure, style.titled(title, note), unit, x="layer", share=True)
    figure.update_xaxes(tickvals=layers if len(layers) <= 24 else None)
    figure.update_yaxes(range=[0, 1.04])
    return figure


def singular_vectors(result: SingularVectors, count: int = 5, title: str | None = None) -> kit.Figure:
    """Bars of the singular values, each with the ``count`` outputs its direction promotes most (and, where known, inputs it reads)."""
    shares, texts = result.shares.tolist(), []
    for direction in range(len(shares)):
        read, promoted = (_words(pairs[:count]) for pairs in (result.sources(direction), result.outputs(direction)))
        texts.append(f"{read} → {promoted}" if read else promoted)
    if title is None:
        title = (
            f"One direction holds {shares[0]:.0%} of the circuit" if shares[0] == shares[0] else "A circuit of zeros"
        )
        promoted = _words(result.outputs(0)[:3])
        title += f", and promotes {promoted}" if promoted else ""
    words = (
        "; words: what comes out" + (", after what goes in" if result.input_ids.numel() else "")
        if result.labels
        else ""
    )
    note = f"singular values, with each direction's share of the squared norm{words}"
    figure = kit.bars(
        [str(direction) for direction in range(len(shares))], result.values.tolist(), style.titled(title, note), "singular value",
        beside=[f"{share:.0%}" + (f"   {text}" if text else "") for share, text in zip(shares, texts, strict=True)],
        hover=[f"{share:.1%} of the whole, {text}" for share, text in zip(shares, texts, strict=True)],
    )  # fmt: skip
    figure.update_traces(marker={"color": style.AGAINST})
    # Words stand to the right of the bars.
    room = 1.2 + 1.2 * bool(result.labels) + 0.6 * bool(result.input_labels)
    top = float(result.values.max()) if len(shares) else 1.0
    figure.update_xaxes(range=[0, max(top, 1e-12) * room], showgrid=False, zeroline=False)
    figure.update_yaxes(title="direction")
    return figure


def composition(result: CompositionScores, title: str | None = None) -> kit.Figure:
    """Heat map of composition scores: heads that write, from the bottom up, heads of later layers that read across."""
    layers, heads = result.axes["layer"], result.axes["head"]
    if len(layers) < 2:
        return kit.empty("Composition needs heads of two layers", title)
    # The last layer writes to no other, the first reads from no other.
    grid = result.values[:-1, :, 1:].flatten(0, 1).flatten(1)
    # The tower stands in the note; labels with it would not fit side by side.
    writers = [head_name(layer, head) for layer in layers[:-1] for head in heads]
    readers = [head_name(layer, head) for layer in layers[1:] for head in heads]
    unit = "score" + (f" {kit.MINUS} chance" if result.random_mean else "")
    options: dict[str, Any] = {"unit": unit, "words": False, "hover": "%{customdata[0]} → %{customdata[1]}"}
    figure = kit.heat({"": grid}, ("head that writes", writers), ("head that reads", readers), **options)
    figure.update_traces(hoverongaps=False)
    for edge in range(1, len(layers) - 1):
        figure.add_vline(x=edge * len(heads) - 0.5, line={"color": style.GREY, "width": 1})
        figure.add_hline(y=edge * len(heads) - 0.5, line={"color": style.GREY, "width": 1})
    title = title or str(findings.composes(result))
    chance = f"random heads: {result.random_mean:.3f} ± {result.random_sd:.3f}" if result.random_mean else ""
    return kit.finish_heat(
        figure, style.titled(title, f"{result.tower} tower, {result.kind}-composition", chance), len(writers)
    )


def _found(result: ValueVectors, targets: Sequence[int | str], count: int) -> list[tuple[int, ...]]:
    rows = list(result.axes)[:-1]
    return [tuple(int(i) for i in place) for place in result.search(targets, count)[rows].itertuples(index=False)]


def _size(result: ValueVectors) -> torch.Tensor:
    """The largest absolute value of every value vector."""
    return result.values.double().abs().nan_to_num(0.0).amax(-1).flatten()


def _strongest(result: ValueVectors, count: int) -> list[tuple[int, ...]]:
    order = _size(result).argsort(descending=True, stable=True)[:count]
    places = (tuple(int(i) for i in torch.unravel_index(flat, result.values.shape[:-1])) for flat in order)
    return [(result.axes["layer"][place[0]], *place[1:]) for place in places]


def _place_name(result: ValueVectors, place: tuple[int, ...]) -> str:
    letters = {"neuron": "N", "head": "H", "channel": " channel ", "coordinate": " coordinate "}
    parts = zip(list(result.axes)[1:-1], place[1:], strict=True)
    return f"{result.tower} L{place[0]}" + "".join(f"{letters[axis]}{index}" for axis, index in parts)


def _value_title(
    result: ValueVectors, names: list[str], rows: list[Any], marked: list[list[bool]], targets: Any
) -> str:
    if targets is not None and result.ranked:
        return str(findings.among(names[0], sum(marked[0]), len(targets), len(rows[0]), result.largest))
    name, value = max(rows[0], key=lambda pair: abs(pair[1]))
    return str(findings.promotes(names[0], _shown(name), value, _size(result)))


def _words(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(_shown(name, 16) for name, _ in pairs)


def _plain(name: str) -> str:
    return name.lstrip("▁Ġ ")


def _shown(name: str, width: int = 40) -> str:
    """A label as text: no markup, no mark of a leading space, not too long."""
    plain = _plain(name) or name
    plain = plain if plain.strip() else repr(plain)
    return kit.escaped(plain if len(plain) <= width else f"{plain[: width - 1]}…")
