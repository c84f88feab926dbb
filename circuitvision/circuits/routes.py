"""Which edges of a scored graph carry most of its score, and the path through it whose weakest edge is strongest.

*Scored edges* are all but the links from a group's keys and values to the heads that look at them, whose score is not told apart by head and stands
at 0. The share of some edges is ``Σ |score| / Σ |score| of all scored edges``: a description of the list of scores, not of what the edges explain
together, which only running the model with the others patched tells.

The *strongest path* maximises ``min |score|`` over its edges, from what enters a tower to what is read out (the widest path; links count as wide as
what enters them). An edge straight from the input to the answer is a path too.

Not covered: paths by the effect of patching them (:func:`circuitvision.patching.path_patch`).
"""

from __future__ import annotations

import math

import networkx as nx

Edge = tuple[str, str, str]
"""Sender, receiver and slot."""
_ENTERS = ("input", "embed", "pos")
_READ_OUT = ("logit", "action")


def is_link(graph: nx.MultiDiGraph, edge: Edge) -> bool:
    """Whether an edge only says which heads look at a group's keys and values."""
    return graph.nodes[edge[0]]["kind"] == "kv_head" and graph.edges[edge]["weight"] == 0.0


def scored_edges(graph: nx.MultiDiGraph) -> list[Edge]:
    """All edges but links, the largest ``|score|`` first, ties by ``uid``."""
    edges = [edge for edge in graph.edges(keys=True) if not is_link(graph, edge)]
    return sorted(edges, key=lambda edge: (-graph.edges[edge]["weight"], graph.edges[edge]["uid"]))


def carrying(graph: nx.MultiDiGraph, share: float = 0.9, most: int = 60) -> list[Edge]:
    """The fewest edges that hold ``share`` of the sum of all ``|score|``, at most ``most`` of them; none of score 0."""
    edges = scored_edges(graph)
    total = math.fsum(graph.edges[edge]["weight"] for edge in edges)
    found: list[Edge] = []
    held = 0.0
    for edge in edges[:most]:
        weight = graph.edges[edge]["weight"]
        # Sums of other orders differ in the last digits.
        if weight == 0.0 or held >= share * total * (1 - 1e-12):
            break
        found.append(edge)
        held += weight
    return found


def share_of(graph: nx.MultiDiGraph, edges: list[Edge]) -> float:
    """``Σ |score|`` of some edges over that of all scored edges; NaN where all scores are 0."""
    total = math.fsum(graph.edges[edge]["weight"] for edge in scored_edges(graph))
    return math.fsum(graph.edges[edge]["weight"] for edge in edges) / total if total > 0 else math.nan


def strongest_path(graph: nx.MultiDiGraph) -> list[Edge]:
    """The edges of the path whose smallest ``|score|`` is largest; empty where none of a score above 0 leads from an input to what is read out.

    In a graph without inputs (or without a read-out) paths start where nothing enters (end where nothing leaves).
    """
    kinds = nx.get_node_attributes(graph, "kind")
    starts = {node for node in graph if kinds[node] in _ENTERS} or {node for node in graph if not graph.in_degree(node)}
    ends = [node for node in graph if kinds[node] in _READ_OUT] or [
        node for node in graph if not graph.out_degree(node)
    ]
    width = {node: math.inf if node in starts else 0.0 for node in graph}
    arrived: dict[str, Edge] = {}
    for node in nx.topological_sort(graph):
        for edge in sorted(graph.out_edges(node, keys=True)):
            wide = width[node] if is_link(graph, edge) else min(width[node], graph.edges[edge]["weight"])
            if edge[1] not in starts and wide > width[edge[1]]:
                width[edge[1]], arrived[edge[1]] = wide, edge
    node = max(ends, key=lambda end: width[end] if end in arrived else 0.0, default="")
    found: list[Edge] = []
    while node in arrived:
        found.append(arrived[node])
        node = arrived[node][0]
    return found[::-1]
