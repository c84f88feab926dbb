"""Places and colours of a circuit graph in files for drawing programs: towers side by side, layers from below, one colour for every kind.

Not covered: figures of the library's own (:mod:`circuitvision.plots`).
"""

from __future__ import annotations

from collections import defaultdict

import networkx as nx

LAYER, COLUMN, GAP = 120.0, 60.0, 180.0
"""Heights of a layer, widths between parts of one layer and between towers, in the units of drawing programs."""
COLOURS = {
    "input": (120, 120, 120),
    "embed": (120, 120, 120),
    "pos": (120, 120, 120),
    "head": (0, 114, 178),
    "kv_head": (86, 180, 233),
    "mlp": (230, 159, 0),
    "neuron": (230, 159, 0),
    "feature": (0, 158, 115),
    "error": (187, 187, 187),
    "bias": (187, 187, 187),
    "connector": (204, 121, 167),
    "logit": (30, 30, 30),
    "action": (30, 30, 30),
}
"""Red, green and blue of every kind of node (Okabe and Ito 2008)."""
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
"""Colours of edges by the sign of their score."""


def placed(graph: nx.MultiDiGraph) -> dict[str, tuple[float, float]]:
    """Where every node stands: x by tower and place in its layer, y by how far it is computed, from below."""
    left = 0.0
    places: dict[str, tuple[float, float]] = {}
    for tower in towers_of(graph):
        rows = defaultdict(list)
        for node, data in graph.nodes(data=True):
            if data["tower"] == tower:
                rows[_height(data)].append(node)
        width = COLUMN * (max(map(len, rows.values())) - 1)
        for number, height in enumerate(sorted(rows)):
            row = sorted(rows[height], key=lambda node: (graph.nodes[node]["head"], graph.nodes[node]["feature"], node))
            start = left + (width - COLUMN * (len(row) - 1)) / 2
            places |= {node: (start + COLUMN * at, LAYER * number) for at, node in enumerate(row)}
        left += width + GAP
    return places


def _height(data: dict[str, object]) -> float:
    """The order of computation inside a tower; what is read out stands above every layer."""
    sublayer = float(str(data["sublayer"]))
    return float("inf") if data["kind"] in ("logit", "action") else sublayer


def towers_of(graph: nx.MultiDiGraph) -> list[str]:
    """Towers in the order in which edges lead through them."""
    present = {data["tower"]: None for _, data in graph.nodes(data=True)}
    order = nx.DiGraph()
    order.add_nodes_from(present)
    for sender, receiver in graph.edges():
        first, second = graph.nodes[sender]["tower"], graph.nodes[receiver]["tower"]
        if first != second:
            order.add_edge(first, second)
    # Two towers that read each other have no order; they stand as they were added.
    return list(nx.topological_sort(order)) if nx.is_directed_acyclic_graph(order) else list(present)
