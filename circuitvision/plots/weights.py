"""Figures of what weights say: value vectors as rows of words, agreement beside chance, singular values, composition between heads."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitvision.model.names import head_name
from circuitvision.plots import style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitvision.readout.weights.agreement import ClassValueAgreement, KeyValueAgreement
    from circuitvision.readout.weights.head_circuits import CompositionScores, SingularVectors
    from circuitvision.readout.weights.value_vectors import ValueVectors

_OTHER = (110, 110, 110)
_NAMED = 24
"""How many heads an axis names one by one."""
_FINDINGS = {
    "key_value_agreement": "What is active promotes the true class",
    "compositionality": "What is active promotes what the layer answers",
}
_KINDS = {"patch": style.FOR, "cls": style.AGAINST, "text": style.AGAINST, "action": style.FOR}


def value_vectors(
    result: ValueVectors,
    targets: Sequence[int | str] | None = None,
    count: int = 12,
    title: str | None = None,
) -> go.Figure:
    """Value vectors as rows, their outputs as cells; the stronger the colour the larger the value, orange above zero and blue below.

    With ``targets`` the rows are what :meth:`ValueVectors.search` finds, and cells of other outputs are grey; without, they are the rows with the
    largest values. A result that keeps targets instead of a ranking has one column for each.
    """
    import plotly.graph_objects as go

    if targets is None and not result.ranked:
        targets = [int(column) for column in result.ids]
    places = _strongest(result, count) if targets is None else _found(result, targets, count)
    rows = [result.outputs(*place) for place in places]
    if not rows:
        return _empty("No value vector holds any of these outputs", title)
    asked = None if targets is None else {t if isinstance(t, str) else result.label(t) for t in targets}
    marked = [[asked is None or name in asked or _plain(name) in asked for name, _ in row] for row in rows]
    limit = max(max(abs(value) for row in rows for _, value in row), 1e-12)
    shade = [[value / limit for _, value in row] for row in rows]
    hover = [[[_shown(name), value] for name, value in row] for row in rows]
    figure = go.Figure()
    for mark, scale in ((True, style.diverging()), (False, style.diverging(_OTHER, _OTHER))):
        figure.add_heatmap(
            z=_only(shade, marked, mark),
            customdata=hover,
            colorscale=scale,
            zmin=-1,
            zmax=1,
            showscale=False,
            xgap=3,
            ygap=3,
            hoverongaps=False,
            hovertemplate="%{customdata[0]}<br>%{customdata[1]:.4g}<extra></extra>",
        )
    width = max(8, 104 // len(rows[0]))
    for row, line in enumerate(rows):
        for column, (name, value) in enumerate(line):
            text = _shown(name, width) if result.ranked else _signed(value)
            strong = abs(value) > 0.6 * limit
            font = {"size": 12, "color": "#ffffff"} if strong else {"size": 12}
            figure.add_annotation(x=column, y=row, text=text, showarrow=False, font=font)
    names = [_place_name(result, place) for place in places]
    unit = "cosine" if result.measure == "cosine" else "per unit of activation"
    order = f", {'highest' if result.largest else 'lowest'} outputs first" if result.ranked else ""
    note = f"{result.tower} tower{order}; strongest colour: {limit:.2g} {unit}"
    found = title or _value_title(result, names, rows, marked, targets)
    style.layout(figure, f"{found}<br><span style='font-size:12px'>{note}</span>", 150 + 30 * len(rows))
    ticks = [str(rank) for rank in result.axes["rank"]] if result.ranked else [_shown(n, width) for n, _ in rows[0]]
    figure.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, title="rank" if result.ranked else None)
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, autorange="reversed", automargin=True)
    _bare(figure)
    figure.update_layout(margin={"t": 80, "l": 20})
    return figure


def class_value_agreement(result: ClassValueAgreement, title: str | None = None) -> go.Figure:
    """Every class's agreement by layer, over the range that sets of random rows reach on average."""
    import plotly.graph_objects as go

    layers = result.axes["layer"]
    means = result.values.mean(-1)
    chance = result.random.mean(-1)
    low, high, middle = float(chance.min()), float(chance.max()), float(chance.mean())
    figure = go.Figure()
    figure.add_hrect(y0=low, y1=high, fillcolor=style.FAINT, line_width=0)
    figure.add_hline(y=middle, line={"color": style.GREY, "width": 1, "dash": "dot"})
    where = [index for index in range(len(layers)) for _ in result.axes["class"]]
    figure.add_scatter(
        x=where,
        y=result.values.flatten().tolist(),
        mode="markers",
        marker={"size": 9, "color": style.AGAINST, "opacity": 0.8},
        text=[f"{_shown(str(label))}: layer {layer}" for layer in layers for label in result.axes["class"]],
        hovertemplate="%{text}<br>cosine %{y:.3f}<extra></extra>",
        name="a class",
    )
    figure.add_scatter(
        x=list(range(len(layers))),
        y=means.tolist(),
        mode="lines+markers",
        marker={"size": 12, "color": style.FOR, "symbol": "diamond"},
        line={"color": style.FOR, "width": 2},
        hovertemplate="mean %{y:.3f}<extra></extra>",
        name="mean of the classes",
    )
    best = int((means - middle).argmax())
    if title is None:
        verb = (
            "point at the classes" if float(means[best]) > high else "point at the classes no more than random rows do"
        )
        beside = f"{float(means[best]):.2f} beside {middle:.2f} by chance, p = {float(result.p[best]):.2g}"
        title = f"Layer {layers[best]}'s value vectors {verb}: {beside}"
    note = f"{result.tower} tower, {result.component}; grey: the mean over classes of {len(result.random)} sets of random rows"
    heading = f"{title}<br><span style='font-size:12px'>{note}</span>"
    style.layout(figure, heading, 380, legend={"orientation": "h", "y": -0.22, "x": 0})
    figure.update_xaxes(
        tickvals=list(range(len(layers))),
        ticktext=[str(n) for n in layers],
        title="layer",
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(title="largest cosine with a value vector", gridcolor=style.FAINT, zeroline=False)
    figure.update_layout(margin={"t": 80})
    return figure


def key_value_agreement(result: KeyValueAgreement, title: str | None = None) -> go.Figure:
    """The rate by layer for every kind of position, as a line, and its chance level, dotted in the same colour."""
    import plotly.graph_objects as go

    summary = result.summary()
    layers = result.axes["layer"]
    figure = go.Figure()
    for number, (kind, part) in enumerate(summary.groupby("kind", sort=False)):
        color = _KINDS.get(str(kind), (style.GREY, style.FOR, style.AGAINST)[number % 3])
        for column, dash in (("rate", "solid"), ("chance", "dot")):
            figure.add_scatter(
                x=part["layer"],
                y=part[column],
                mode="lines+markers" if dash == "solid" else "lines",
                line={"color": color, "width": 2.5 if dash == "solid" else 1.5, "dash": dash},
                marker={"size": 9},
                name=f"{kind}" if dash == "solid" else f"{kind}, by chance",
                hovertemplate=f"{kind} {column}, layer %{{x}}: %{{y:.1%}}<extra></extra>",
            )
    if title is None:
        best = max(summary.to_dict("records"), key=lambda entry: entry["rate"] - entry["chance"])
        rates = f"{best['rate']:.0%}, by chance {best['chance']:.0%}"
        title = (
            f"{_FINDINGS.get(result.measure, 'Above chance')}, most at {best['kind']} of layer {best['layer']}: {rates}"
        )
    note = f"{result.tower} tower, {'neurons' if result.component == 'mlp' else 'channels of heads'}; dotted: by chance"
    heading = f"{title}<br><span style='font-size:12px'>{note}</span>"
    style.layout(figure, heading, 360, legend={"orientation": "h", "y": -0.24, "x": 0})
    figure.update_xaxes(title="layer", tickvals=layers if len(layers) <= 24 else None, showgrid=False, zeroline=False)
    unit = "share of active keys" if result.measure == "compositionality" else "share of tokens"
    figure.update_yaxes(tickformat=".0%", range=[0, 1.04], gridcolor=style.FAINT, zeroline=False, title=unit)
    figure.update_layout(margin={"t": 80})
    return figure


def singular_vectors(result: SingularVectors, count: int = 5, title: str | None = None) -> go.Figure:
    """Bars of the singular values, each with the ``count`` outputs its direction promotes most (and, where known, inputs it reads)."""
    import plotly.graph_objects as go

    shares = result.shares.tolist()
    texts = []
    for direction in range(len(shares)):
        heard, said = (_words(pairs[:count]) for pairs in (result.sources(direction), result.outputs(direction)))
        texts.append(f"{heard} → {said}" if heard else said)
    figure = go.Figure(
        go.Bar(
            x=result.values.tolist(),
            y=list(range(len(shares))),
            orientation="h",
            marker={"color": style.AGAINST, "line": {"width": 0}},
            customdata=[[share, text] for share, text in zip(shares, texts, strict=True)],
            hovertemplate="%{x:.4g}, %{customdata[0]:.1%} of the whole<br>%{customdata[1]}<extra></extra>",
        )
    )
    for direction, (share, text) in enumerate(zip(shares, texts, strict=True)):
        figure.add_annotation(
            x=float(result.values[direction]),
            y=direction,
            text=f"{share:.0%}" + (f"   {text}" if text else ""),
            showarrow=False,
            xanchor="left",
            xshift=8,
        )
    if title is None:
        title = (
            f"One direction holds {shares[0]:.0%} of the circuit" if shares[0] == shares[0] else "A circuit of zeros"
        )
        said = _words(result.outputs(0)[:3])
        title += f", and promotes {said}" if said else ""
    listed = (
        "; words: what comes out" + (", after what goes in" if result.input_ids.numel() else "")
        if result.labels
        else ""
    )
    note = f"singular values, with each direction's share of the squared norm{listed}"
    heading = f"{title}<br><span style='font-size:12px'>{note}</span>"
    style.layout(figure, heading, 150 + 34 * len(shares), bargap=0.4)
    # Words stand to the right of the bars.
    room = 1.2 + 1.2 * bool(result.labels) + 0.6 * bool(result.input_labels)
    top = float(result.values.max()) if len(shares) else 1.0
    figure.update_xaxes(range=[0, max(top, 1e-12) * room], title="singular value", showgrid=False, zeroline=False)
    figure.update_yaxes(autorange="reversed", title="direction", dtick=1, showgrid=False, zeroline=False)
    figure.update_layout(margin={"t": 80})
    return figure


def composition(result: CompositionScores, title: str | None = None) -> go.Figure:
    """Heat map of composition scores: heads that write down, heads of later layers that read across."""
    import plotly.graph_objects as go

    layers, heads = result.axes["layer"], result.axes["head"]
    if len(layers) < 2:
        return _empty("Composition needs heads of two layers", title)
    # The last layer writes to no other, the first reads from no other.
    values = result.values[:-1, :, 1:]
    grid = values.flatten(0, 1).flatten(1)
    writers = [head_name(layer, head, result.tower) for layer in layers[:-1] for head in heads]
    readers = [head_name(layer, head, result.tower) for layer in layers[1:] for head in heads]
    there = grid[grid.isfinite()]
    limit = max(float(there.abs().max()) if len(there) else 0.0, 1e-9)
    figure = go.Figure(
        go.Heatmap(
            z=grid.float().numpy(),
            colorscale=style.diverging(),
            zmin=-limit,
            zmax=limit,
            xgap=2 if len(readers) <= 40 else 0,
            ygap=2 if len(writers) <= 40 else 0,
            hoverongaps=False,
            customdata=[[f"{a} → {b}" for b in readers] for a in writers],
            hovertemplate="%{customdata}<br>%{z:+.3f}<extra></extra>",
            colorbar={
                "title": "score" + (" − chance" if result.random_mean else ""),
                "thickness": 14,
                "outlinewidth": 0,
            },
        )
    )
    for edge in range(1, len(layers) - 1):
        figure.add_vline(x=edge * len(heads) - 0.5, line={"color": style.GREY, "width": 1})
        figure.add_hline(y=edge * len(heads) - 0.5, line={"color": style.GREY, "width": 1})
    if title is None:
        title = _composition_finding(result, len(there))
    chance = f"; random heads: {result.random_mean:.3f} ± {result.random_sd:.3f}" if result.random_mean else ""
    heading = f"{title}<br><span style='font-size:12px'>{result.tower} tower, {result.kind}-composition{chance}</span>"
    style.layout(figure, heading, 190 + min(max(26 * len(writers), 130), 620))
    _head_axis(figure.update_xaxes, readers, layers[1:], len(heads), "head that reads")
    _head_axis(figure.update_yaxes, writers, layers[:-1], len(heads), "head that writes")
    figure.update_yaxes(autorange="reversed")
    _bare(figure)
    figure.update_layout(margin={"t": 80, "l": 80})
    return figure


def _composition_finding(result: CompositionScores, n_pairs: int) -> str:
    """The strongest pair, unless as many pairs of random heads would have had one as strong."""
    found = result.top(1)
    if not found:
        return "No pair of heads has a score"
    pair, score = f"{found[0][0]} → {found[0][1]}", _signed(found[0][2])
    # The largest of n Gaussian draws lies near this many standard deviations.
    expected = result.random_sd * math.sqrt(2 * math.log(max(n_pairs, 2)))
    if result.random_mean and found[0][2] <= expected:
        return f"No pair stands out from random heads in {result.kind}-composition; the first is {pair}, {score}"
    return f"{pair} composes most through {result.kind}: {score}" + (
        " above random heads" if result.random_mean else ""
    )


def _head_axis(update: Any, names: Sequence[str], layers: Sequence[int], n_heads: int, title: str) -> None:
    if len(names) <= _NAMED:
        update(tickvals=list(range(len(names))), ticktext=list(names), title=title, tickfont={"size": 11})
    else:
        middles = [number * n_heads + (n_heads - 1) / 2 for number in range(len(layers))]
        step = max(1, len(layers) // 16)
        update(tickvals=middles[::step], ticktext=[f"layer {n}" for n in layers[::step]], title=title)


def _found(result: ValueVectors, targets: Sequence[int | str], count: int) -> list[tuple[int, ...]]:
    rows = list(result.axes)[:-1]
    return [tuple(int(i) for i in place) for place in result.search(targets, count)[rows].itertuples(index=False)]


def _only(shade: list[list[float]], marked: list[list[bool]], mark: bool) -> list[list[float | None]]:
    """The cells whose mark is ``mark``; gaps elsewhere."""
    return [
        [value if flag is mark else None for value, flag in zip(line, flags, strict=True)]
        for line, flags in zip(shade, marked, strict=True)
    ]


def _strongest(result: ValueVectors, count: int) -> list[tuple[int, ...]]:
    size = result.values.abs().nan_to_num(0.0).amax(-1).flatten()
    order = size.argsort(descending=True, stable=True)[:count]
    return [
        (result.axes["layer"][index[0]], *index[1:])
        for index in (tuple(int(i) for i in torch.unravel_index(flat, result.values.shape[:-1])) for flat in order)
    ]


def _place_name(result: ValueVectors, place: tuple[int, ...]) -> str:
    letters = {"neuron": "N", "head": "H", "channel": " channel ", "coordinate": " coordinate "}
    parts = zip(list(result.axes)[1:-1], place[1:], strict=True)
    return f"{result.tower} L{place[0]}" + "".join(f"{letters[axis]}{index}" for axis, index in parts)


def _value_title(
    result: ValueVectors,
    names: list[str],
    rows: list[list[tuple[str, float]]],
    marked: list[list[bool]],
    targets: Sequence[int | str] | None,
) -> str:
    if targets is not None and result.ranked:
        which = "highest" if result.largest else "lowest"
        of = f"{sum(marked[0])} of the {len(targets)} outputs asked for"
        return f"{names[0]} promotes {of}, among its {len(rows[0])} {which}"
    name, value = max(rows[0], key=lambda pair: abs(pair[1]))
    return f"{names[0]} {'promotes' if value >= 0 else 'suppresses'} {_shown(name)} most: {_signed(value)}"


def _words(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(_shown(name, 16) for name, _ in pairs)


def _plain(name: str) -> str:
    return name.lstrip("▁Ġ ")


def _shown(name: str, width: int = 40) -> str:
    """A label as text: no markup, no mark of a leading space, not too long."""
    plain = _plain(name) or name
    plain = plain if plain.strip() else repr(plain)
    return html.escape(plain if len(plain) <= width else f"{plain[: width - 1]}…", quote=False)


def _signed(value: float) -> str:
    """Two decimals with a proper sign."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _bare(figure: go.Figure) -> None:
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)


def _empty(message: str, title: str | None) -> go.Figure:
    import plotly.graph_objects as go

    figure = style.layout(go.Figure(), title or message, 160)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure
