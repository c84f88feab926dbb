"""Where the parts of a circuit graph stand in its figures: towers are columns side by side, layers rows from below, heads and MLP in order in a row.

Places are in units of one head and one layer, ``y`` upwards. In a row heads stand at their number, an MLP right of them and a little above (it reads
what they wrote), groups of keys and values a little below. What enters a tower is below its first layer and what is read out above its last;
connectors stand half way up between towers. Rows of layers and columns of heads that no node of the graph has are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuitvision.circuits.layout import towers_of

if TYPE_CHECKING:
    import networkx as nx

_GAP = 1.8
"""Between towers, in widths of a head."""
_READ_OUT = ("logit", "action")
_LIFT = {
    "head": 0.0,
    "kv_head": -0.38,
    "bias": 0.0,
    "connector": 0.0,
    "input": 0.0,
    "embed": 0.0,
    "pos": 0.0,
    "logit": 0.0,
    "action": 0.0,
}
_PLAIN = 0.36
"""How far above its row stands what comes after the heads."""


@dataclass(frozen=True)
class Column:
    """A tower: from where to where it stands, and the name of each of its rows by height."""

    tower: str
    left: float
    right: float
    rows: dict[float, str]


@dataclass(frozen=True)
class Places:
    """``at`` maps ids of nodes to ``(x, y)``; ``columns`` are the towers from the left; ``height`` is the highest row."""

    at: dict[str, tuple[float, float]]
    columns: list[Column]
    height: float


def places_of(graph: nx.MultiDiGraph) -> Places:
    """Where every node of the graph stands."""
    towers: dict[str, list[str]] = {tower: [] for tower in towers_of(graph)}
    for node, tower in graph.nodes(data="tower"):
        towers[tower].append(node)
    rows = {tower: _rows(graph, nodes) for tower, nodes in towers.items()}
    height = float(max((len(found) for found in rows.values()), default=1) - 1)
    left = 0.0
    at: dict[str, tuple[float, float]] = {}
    columns = []
    for tower, own in rows.items():
        across, width = _across(graph, towers[tower])
        start = height / 2 if tower == "connector" else 0.0
        for number, row in enumerate(own.values()):
            for node in row:
                lift = _LIFT.get(graph.nodes[node]["kind"], _PLAIN)
                at[node] = (left + across[node], start + number + lift)
        names = {start + number: name for number, name in enumerate(own)}
        columns.append(Column(tower, left, left + width, names))
        left += width + _GAP
    return Places(at, columns, height)


def _rows(graph: nx.MultiDiGraph, nodes: Iterable[str]) -> dict[str, list[str]]:
    """The nodes of a tower by row, from below."""
    found = defaultdict(list)
    for node in nodes:
        data = graph.nodes[node]
        if data["kind"] in _READ_OUT:
            found[float("inf"), "out"].append(node)
        else:
            entry = "" if data["tower"] == "connector" else "in"
            found[float(data["layer"]), f"L{data['layer']}" if data["layer"] >= 0 else entry].append(node)
    return {name: found[level, name] for level, name in sorted(found)}


def _across(graph: nx.MultiDiGraph, nodes: list[str]) -> tuple[dict[str, float], float]:
    """Where the nodes of a tower stand from left to right, and how wide the tower is."""
    data = graph.nodes
    heads = [(data[node]["layer"], data[node]["head"]) for node in nodes if data[node]["kind"] == "head"]
    numbers = sorted({head for _, head in heads})
    # Heads that stand in the graph at several positions have no column of their number.
    single = len(set(heads)) == len(heads)
    found: dict[str, float] = {}
    middle = []
    for row in _rows(graph, nodes).values():
        order = sorted(row, key=lambda node: (data[node]["head"], data[node]["feature"], data[node]["pos"], node))
        if data[order[0]]["layer"] < 0 or data[order[0]]["kind"] in _READ_OUT:
            middle.append(order)
            continue
        own, groups = ([node for node in order if data[node]["kind"] == kind] for kind in ("head", "kv_head"))
        for place, node in enumerate(own):
            found[node] = float(numbers.index(data[node]["head"]) if single else place)
        taken = float(max(len(numbers) if single else len(own), len(groups)))
        for place, node in enumerate(groups):
            found[node] = taken * (place + 0.5) / len(groups) - 0.5
        rest = [node for node in order if node not in found]
        found |= {node: taken + place for place, node in enumerate(rest)}
    width = max([*found.values(), *(len(order) - 1.0 for order in middle), 0.0])
    for order in middle:
        found |= {node: (width - len(order) + 1) / 2 + place for place, node in enumerate(order)}
    return found, width
