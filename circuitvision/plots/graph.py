"""A circuit graph drawn left to right: towers are bands, layers are columns, edges are as wide as their effect."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuitvision.model.names import spelled
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    import networkx as nx

_PIXELS_PER_ROW = 88
_CONNECTOR = "connector"


def circuit(graph: nx.MultiDiGraph, title: str | None = None, min_share: float = 0.01) -> kit.Figure:
    """The nodes of the circuit and their edges, those below ``min_share`` of the whole effect left out.

    Node area is the size of its effect; orange supports the answer, blue opposes it, in nodes and edges alike.
    """
    nodes = {name: data for name, data in graph.nodes(data=True) if data["in_circuit"]}
    scale = graph.graph["metric_clean"] - graph.graph["metric_corrupt"] or 1.0
    # Effects are measured from the run that is patched: from the clean one when it is being destroyed.
    scale = -scale if graph.graph["sign"] == "patched_minus_clean" else scale
    places, bands = _place(nodes, _ranks(graph, nodes))
    figure = kit.Figure()
    heights = [y for _, y in places.values()]
    for sender, receiver, data in sorted(graph.edges(data=True), key=lambda edge: edge[2]["weight"]):
        if sender in places and receiver in places and data["weight"] >= min_share * abs(scale):
            share, others = data["score"] / scale, list(places.values())
            heights += _edge(figure, places[sender], places[receiver], f"{sender} → {receiver}", share, others)
    # Lines bow past the nodes between their ends, and may leave the box around all nodes.
    top, bottom = max(heights), min(heights)
    _bands(figure, bands, top, bottom)
    _nodes(figure, nodes, places, scale)
    height = int(_PIXELS_PER_ROW * (top - bottom + 2.2) + 20)
    style.layout(
        figure,
        title or main_route(graph),
        height,
        showlegend=False,
        margin={"l": 10, "r": 10, "b": 10},
        hovermode="closest",
    )
    figure.update_xaxes(visible=False, range=[-0.7, max(x for x, _ in places.values()) + 1.1])
    figure.update_yaxes(visible=False, range=[bottom - 1.0, top + 1.2])
    return figure


def main_route(graph: nx.MultiDiGraph) -> str:
    """The way from the first node of the circuit to the answer that follows the strongest edge out of every node, in words."""
    inside = [name for name, data in graph.nodes(data=True) if data["in_circuit"] and graph.out_degree(name)]
    if not inside:
        return "No node of this graph sends anything to another"
    images = [name for name in inside if graph.nodes[name]["kind"] == "input"]
    node = max(images or inside, key=lambda name: abs(graph.nodes[name]["score"]))
    route = [node]
    while graph.out_degree(node):
        node = max(graph.out_edges(node, data=True), key=lambda edge: edge[2]["weight"])[1]
        route.append(node)
    return "Main route: " + " → ".join(_spoken(name, graph.nodes[name]) for name in route)


def _spoken(name: str, data: dict[str, Any]) -> str:
    if data["kind"] in ("input", "connector"):
        return str(data["label"])
    return "answer" if data["kind"] in ("logit", "action") else spelled(name)


def _ranks(graph: nx.MultiDiGraph, nodes: Mapping[str, Any]) -> dict[str, float]:
    """Where every node stands from left to right: towers in the order in which they run, a connector behind what it reads, the answer last."""
    towers = list(json.loads(graph.graph["towers_json"]))
    towers += [data["tower"] for data in nodes.values() if data["tower"] not in (*towers, _CONNECTOR)]
    order = {tower: float(rank) for rank, tower in reversed(list(enumerate(towers)))}
    ranks = {}
    for name, data in nodes.items():
        before = [
            order[nodes[one]["tower"]]
            for one in graph.predecessors(name)
            if one in nodes and nodes[one]["tower"] in order
        ]
        connector = max(before, default=0.0) + 0.5
        ranks[name] = math.inf if data["kind"] in ("logit", "action") else order.get(data["tower"], connector)
    return ranks


def _place(
    nodes: Mapping[str, Any], ranks: Mapping[str, float]
) -> tuple[dict[str, tuple[float, float]], list[tuple[str, float, float]]]:
    """Coordinates of every node, and the horizontal extent of every tower."""
    columns: dict[tuple[float, float], list[str]] = {}
    for name, data in nodes.items():
        columns.setdefault((ranks[name], data["sublayer"]), []).append(name)
    places: dict[str, tuple[float, float]] = {}
    extents: dict[str, tuple[float, float]] = {}
    x, previous = 0.0, -1.0
    for column, (rank, sublayer) in enumerate(sorted(columns)):
        x += 0.0 if previous < 0 else (1.25 if rank != previous else 1.0)
        previous = rank
        names = sorted(columns[rank, sublayer], key=lambda name: nodes[name]["head"])
        for number, name in enumerate(names):
            # Columns alternate by a quarter so that an edge to a far column does not run through the nodes between.
            fixed = rank == math.inf or nodes[name]["tower"] == _CONNECTOR
            shift = 0.0 if fixed else (0.25 if column % 2 else -0.25)
            places[name] = (x, (len(names) - 1) / 2 - number + shift)
            band = "answer" if rank == math.inf else nodes[name]["tower"]
            low, high = extents.get(band, (x, x))
            extents[band] = (min(low, x), max(high, x))
    return places, [(band, low, high) for band, (low, high) in extents.items()]


def _bands(figure: kit.Figure, bands: list[tuple[str, float, float]], top: float, bottom: float) -> None:
    top, bottom = top + 0.95, bottom - 0.85
    look = {"type": "rect", "layer": "below", "line": {"width": 0}, "fillcolor": "rgba(128,128,128,0.09)"}
    for band, low, high in bands:
        tower = band not in (_CONNECTOR, "answer")
        if tower:
            figure.add_shape(x0=low - 0.42, x1=high + 0.42, y0=bottom, y1=top, **look)
        name = f"{band} tower" if tower else band
        figure.add_annotation(x=(low + high) / 2, y=top, yshift=12, text=name, showarrow=False, font={"size": 14})


def _edge(
    figure: kit.Figure,
    start: tuple[float, float],
    end: tuple[float, float],
    name: str,
    share: float,
    others: Sequence[tuple[float, float]],
) -> list[float]:
    """Draw an edge; returns the heights that it passes."""
    xs, ys = _curve(start, end, others)
    color, strength = "217,72,15" if share >= 0 else "47,111,219", min(abs(share), 1.0)
    line = {"width": 1 + 13 * strength, "color": f"rgba({color},{0.25 + 0.45 * strength:.2f})"}
    text = f"{name}<br>{style.signed_percent(share)} of the answer"
    figure.add_scatter(x=xs, y=ys, mode="lines", line=line, text=text, hovertemplate="%{text}<extra></extra>")
    return ys


def _curve(
    start: tuple[float, float], end: tuple[float, float], others: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """A smooth line from left to right, bowed just far enough to pass the nodes between its ends and their labels."""
    (x0, y0), (x1, y1) = start, end
    steps = [step / 24 for step in range(25)]
    between = [(x, y) for x, y in others if x0 + 0.1 < x < x1 - 0.1]

    def height(t: float, bow: float) -> float:
        return y0 + (y1 - y0) * (3 * t * t - 2 * t**3) + bow * 4 * t * (1 - t)

    def clearance(bow: float) -> float:
        # A node's label hangs below it, so what matters is the distance from a point a little under its centre.
        return min((abs(height((x - x0) / (x1 - x0), bow) - (y - 0.2)) for x, y in between), default=1.0)

    bows = sorted((step / 8 for step in range(-20, 21)), key=abs)
    bow = next((bow for bow in bows if clearance(bow) >= 0.45), max(bows, key=clearance))
    return [x0 + (x1 - x0) * t for t in steps], [height(t, bow) for t in steps]


def _nodes(figure: kit.Figure, nodes: dict[str, Any], places: dict[str, tuple[float, float]], scale: float) -> None:
    shares = {name: nodes[name]["score"] / scale for name in places}
    plain = {name: nodes[name]["kind"] in ("logit", "action") for name in places}
    marker = {
        "size": [26 if plain[name] else _diameter(share) for name, share in shares.items()],
        "color": [style.GREY if plain[name] else style.FOR if share >= 0 else style.AGAINST for name, share in shares.items()],
        "line": {"width": 1.5, "color": "rgba(255,255,255,0.8)"}, "opacity": 1.0,
    }  # fmt: skip
    percents = {name: style.signed_percent(share) for name, share in shares.items()}
    figure.add_scatter(
        x=[x for x, _ in places.values()], y=[y for _, y in places.values()], mode="markers", marker=marker,
        text=[f"{name}<br>{nodes[name]['label']}<br>{percents[name]} of the answer" for name in places],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    for name, (x, y) in places.items():
        label, kind = nodes[name]["label"], nodes[name]["kind"]
        short = label.split(" ")[-1] if kind == "head" else label if kind == "input" else name.split(".", 1)[1]
        text = (
            label.replace("(", "<br>(").replace(" - ", f" {kit.MINUS} ")
            if plain[name]
            else f"{short}<br>{percents[name]}"
        )
        beside = {"xshift": 18, "xanchor": "left", "align": "left"}
        where = beside if plain[name] else {"yshift": -20 - _diameter(shares[name]) / 2}
        figure.add_annotation(x=x, y=y, text=text, showarrow=False, font={"size": style.SMALL}, **where)


def _diameter(share: float) -> float:
    return 14 + 34 * min(abs(share), 1.0) ** 0.5
