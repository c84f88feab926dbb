"""A scored circuit of any kind as a figure, and what its page shares with it: which edges are drawn, and the title.

Towers are columns side by side, layers rows from below. An edge is orange where its score is above 0 and blue below, wider the larger it is; the
letter where it arrives at a head is the slot, query, key or value. A tick marks edges whose effect an intervention verified. Drawn are the fewest
edges that hold 90 % of ``Σ |score|``, sixty at most; the title says how many of how many that are.

:func:`circuitvision.plots.write_circuit` writes the same as a page with a slider for the number of edges, see
:mod:`circuitvision.plots.circuit_page`. Not covered: attention, and highlighting a node, in this figure; the page has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuitvision.circuits.routes import Edge, carrying, is_link, scored_edges
from circuitvision.circuits.schema import validate
from circuitvision.errors import InputError
from circuitvision.findings_of_graphs import few_edges, main_path, spoken
from circuitvision.plots import kit, style
from circuitvision.plots.circuit_layout import Places, places_of

if TYPE_CHECKING:
    import networkx as nx

    from circuitvision.circuits import EdgeAttribution

MOST = 60
"""Edges that are drawn where the caller does not say how many."""
HEAD_SLOTS = ("q", "k", "v")
_STEPS = 24
_ARC = 0.5
"""How far above and below its ends a line between towers swings, in rows."""
_ROW, _TALLEST = 64, 900


@dataclass(frozen=True)
class Drawing:
    """A graph made ready: its scored edges by size, the first ``count`` of which are drawn, links between drawn edges, places, and what is said."""

    graph: nx.MultiDiGraph
    edges: list[Edge]
    count: int
    places: Places
    lead: str
    note: str

    @property
    def shown(self) -> list[Edge]:
        """The edges that are drawn."""
        return self.edges[: self.count]

    def links(self) -> list[Edge]:
        """Links of groups into which a drawn edge leads to heads from which one leads on."""
        reached, left = {edge[1] for edge in self.shown}, {edge[0] for edge in self.shown}
        every = self.graph.edges(keys=True)
        return [edge for edge in every if edge[0] in reached and edge[1] in left and is_link(self.graph, edge)]


def drawing(graph: nx.MultiDiGraph, n: int | None, share: float) -> Drawing:
    """Choose what is drawn of a graph.

    Raises:
        InputError: the graph breaks the schema, or ``n`` or ``share`` is none.
    """
    validate(graph)
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise InputError(f"n={n!r} is not understood: how many edges are drawn, a whole number from 1 on.")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(
            f"share={share!r} is not understood: a share of the sum of all |score|, above 0 and at most 1."
        )
    edges = scored_edges(graph)
    count = len(carrying(graph, share, MOST)) if n is None else min(n, len(edges))
    return Drawing(graph, edges, count, places_of(graph), str(few_edges(graph, edges[:count])), str(main_path(graph)))


def circuit(
    graph: nx.MultiDiGraph, *, n: int | None = None, share: float = 0.9, title: str | None = None
) -> kit.Figure:
    """The strongest edges of a graph of schema ``circuitvision.graph/1`` between its towers.

    Args:
        graph: of any kind.
        n: how many edges, the largest first; None: the fewest that hold ``share`` of the sum of all ``|score|``, at most 60.
        share: see ``n``.
        title: in place of the finding; plain text.

    Raises:
        InputError: the graph breaks the schema, or ``n`` or ``share`` is none.
    """
    drawn = drawing(graph, n, share)
    lead = kit.escaped(drawn.lead if title is None else title)
    if not graph:
        return kit.empty("The graph is empty" if title is None else lead)
    figure, places = kit.Figure(), drawn.places
    _columns(figure, places)
    for edge in drawn.links():
        _line(figure, drawn, edge, 0.8, style.FAINT)
    largest = max((graph.edges[edge]["weight"] for edge in drawn.shown), default=0.0) or 1.0
    for edge in reversed(drawn.shown):
        data = graph.edges[edge]
        strength = data["weight"] / largest
        color = "217,72,15" if data["score"] >= 0 else "47,111,219"
        _line(figure, drawn, edge, 0.8 + 6 * strength, f"rgba({color},{0.35 + 0.55 * strength:.2f})")
    _slots(figure, drawn)
    _nodes(figure, drawn)
    height = min(int(_ROW * (places.height + 2)), _TALLEST)
    notes = (kit.escaped(drawn.note), _legend(graph))
    style.layout(
        figure,
        style.titled(lead, *notes),
        height,
        showlegend=False,
        hovermode="closest",
        margin={"l": 10, "r": 10, "b": 10},
    )
    figure.update_xaxes(visible=False, range=[-1.2, max(column.right for column in places.columns) + 0.9])
    figure.update_yaxes(visible=False, range=[-0.7, places.height + 1.1])
    return figure


def edges(result: EdgeAttribution, *, n: int | None = None, share: float = 0.9, title: str | None = None) -> kit.Figure:
    """The strongest edges of an attribution (of the first metric), as :func:`circuit` draws them."""
    return circuit(result.to_networkx(), n=n, share=share, title=title)


def sign_words(graph: nx.MultiDiGraph) -> str:
    """What the sign of a score means, in words."""
    run = graph.graph["sign"].removeprefix("patched_minus_")
    return f"score: {graph.graph['metric'] or 'metric'} patched {kit.MINUS} {run}"


def _legend(graph: nx.MultiDiGraph) -> str:
    verified = sum(data["verified"] for _, _, data in graph.edges(data=True))
    ticks = f"✓ verified by intervention ({verified} of {graph.number_of_edges()})" if verified else ""
    return "; ".join(filter(None, [kit.escaped(sign_words(graph)), "orange above 0, blue below", ticks]))


def _columns(figure: kit.Figure, places: Places) -> None:
    for column in places.columns:
        figure.add_shape(
            type="rect", layer="below", line={"width": 0}, fillcolor="rgba(128,128,128,0.08)", x0=column.left - 0.6, x1=column.right + 0.6,
            y0=-0.6, y1=places.height + 0.65,
        )  # fmt: skip
        middle = (column.left + column.right) / 2
        figure.add_annotation(x=middle, y=places.height + 0.85, text=column.tower, showarrow=False)
        for height, name in column.rows.items() if column.tower != "connector" else ():
            figure.add_annotation(
                x=column.left - 0.62, y=height, text=name, showarrow=False, xanchor="right", font={"size": style.TINY}
            )


def curve(places: Places, edge: Edge, same: bool) -> list[tuple[float, float]]:
    """The four points of the Bézier line of an edge: upwards inside a tower, bowed past what stands between; sideways between towers."""
    (x0, y0), (x1, y1) = places.at[edge[0]], places.at[edge[1]]
    rise = y1 - y0
    if not same:
        reach = max(abs(x1 - x0) / 2, 0.8)
        # Up from the sender and from below into the receiver: past the heads beside them.
        return [(x0, y0), (x0 + reach, y0 + _ARC), (x1 - reach, y1 - _ARC), (x1, y1)]
    # What rises steeply over other rows would cross their nodes.
    bow = 0.22 * min(rise, 6.0) if rise > 1.2 and abs(x1 - x0) < 0.6 * rise else 0.0
    bow = -bow if x0 + x1 < 2 * _middle(places, x0) else bow
    return [(x0, y0), (x0 + bow, y0 + 0.4 * rise), (x1 + bow, y1 - 0.4 * rise), (x1, y1)]


def _middle(places: Places, x: float) -> float:
    column = min(places.columns, key=lambda one: abs(x - min(max(x, one.left), one.right)))
    return (column.left + column.right) / 2


def same_tower(graph: nx.MultiDiGraph, edge: Edge) -> bool:
    """Whether an edge stays in its tower."""
    return bool(graph.nodes[edge[0]]["tower"] == graph.nodes[edge[1]]["tower"])


def _line(figure: kit.Figure, drawn: Drawing, edge: Edge, width: float, color: str) -> None:
    corners = curve(drawn.places, edge, same_tower(drawn.graph, edge))
    shares = [step / _STEPS for step in range(_STEPS + 1)]
    weights = [((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3) for t in shares]
    xs, ys = (
        [sum(w * corner[axis] for w, corner in zip(four, corners, strict=True)) for four in weights] for axis in (0, 1)
    )
    figure.add_scatter(
        x=xs, y=ys, mode="lines", line={"width": width, "color": color}, text=edge_words(drawn.graph, edge), hovertemplate="%{text}<extra></extra>"
    )  # fmt: skip
    if drawn.graph.edges[edge]["verified"]:
        half = _STEPS // 2
        figure.add_annotation(x=xs[half], y=ys[half], text="✓", showarrow=False, font={"size": style.TEXT})


def edge_words(graph: nx.MultiDiGraph, edge: Edge) -> str:
    """An edge on hovering, as Plotly's text."""
    data, words = graph.edges[edge], kit.escaped
    slot = f" ({words(edge[2])})" if edge[2] != "in" else ""
    error = f" ± {kit.number(data['se'])}" if data["n"] > 1 else ""
    lines = [f"{words(spoken(graph, edge[0]))} → {words(spoken(graph, edge[1]))}{slot}"]
    lines.append("no score of its own" if is_link(graph, edge) else f"score {kit.number(data['score'])}{error}")
    if data["inclusion"] >= 0:
        lines.append(f"in {data['inclusion']:.0%} of bootstrapped circuits")
    if data["verified"]:
        lines.append(f"verified by intervention: {kit.number(data['effect_verified'])}")
    return "<br>".join(lines)


def _slots(figure: kit.Figure, drawn: Drawing) -> None:
    """The letter of every slot of a head or group that a drawn edge enters."""
    there = dict.fromkeys((edge[1], edge[2]) for edge in drawn.shown if edge[2] in HEAD_SLOTS)
    where = [(*drawn.places.at[node], slot) for node, slot in there]
    figure.add_scatter(
        x=[x + 0.16 * (HEAD_SLOTS.index(slot) - 1) for x, _, slot in where], y=[y - 0.22 for _, y, _ in where], mode="text",
        text=[slot for *_, slot in where], textfont={"size": style.TINY}, hoverinfo="skip",
    )  # fmt: skip


def _nodes(figure: kit.Figure, drawn: Drawing) -> None:
    """Discs of the nodes; those that a drawn edge touches are named."""
    graph, at = drawn.graph, drawn.places.at
    touched = {end for edge in drawn.shown for end in edge[:2]}
    marks = {
        "size": [13 if node in touched else 5 for node in at],
        "symbol": ["square" if graph.nodes[node]["kind"] == "mlp" else "circle" for node in at],
        "color": [style.GREY if node in touched else style.FAINT for node in at],
        "opacity": 1.0,
    }
    texts = [
        f"{kit.escaped(spoken(graph, node))}<br>{kit.escaped(node)}<br>score {kit.number(graph.nodes[node]['score'])}" for node in at
    ]  # fmt: skip
    figure.add_scatter(
        x=[x for x, _ in at.values()], y=[y for _, y in at.values()], mode="markers", marker=marks, text=texts,
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    for node in touched:
        x, y = at[node]
        figure.add_annotation(
            x=x, y=y, yshift=14, text=kit.escaped(short(graph, node)), showarrow=False, font={"size": style.TINY}
        )


def short(graph: nx.MultiDiGraph, node: str) -> str:
    """The name of a node without its tower, which its column says (of a group of keys and values without its layer too)."""
    if graph.nodes[node]["kind"] == "kv_head":
        return f"KV{graph.nodes[node]['head']}"
    return spoken(graph, node).removeprefix(f"{graph.nodes[node]['tower']} ")
