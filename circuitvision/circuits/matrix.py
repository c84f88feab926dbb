"""Circuit graphs as one matrix of scores: ``scores`` ``[sender slot]``, NaN where there is no edge.

The arrays of a file:

* ``senders`` and ``slots``: ids, a slot is its node with the letter behind it (``v.a1.h0<k>``; without one where it is the only one);
* ``scores`` float64 and ``in_circuit`` bool, both ``[sender slot]``; ``rows`` and ``columns`` of every edge in the order of the graph;
* ``nodes``: every id in the order of the graph, ``node_scores`` and ``node_in_circuit``;
* ``graph``: the attributes of the graph as JSON.

Read again, a graph has the same ids, slots and scores; other attributes of nodes and edges follow from the ids or are at their defaults.
"""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import numpy as np

from circuitvision.circuits import schema
from circuitvision.files import replacing
from circuitvision.model.names import parse_edge, parse_id


def write(graph: nx.MultiDiGraph, path: Path) -> None:
    """Write the matrix of a graph."""
    edges = [(sender, _slot(receiver, key), data) for sender, receiver, key, data in graph.edges(keys=True, data=True)]
    rows = {name: number for number, name in enumerate(dict.fromkeys(sender for sender, _, _ in edges))}
    columns = {name: number for number, name in enumerate(dict.fromkeys(slot for _, slot, _ in edges))}
    scores = np.full((len(rows), len(columns)), np.nan)
    included = np.zeros(scores.shape, dtype=bool)
    for sender, slot, data in edges:
        at = rows[sender], columns[slot]
        scores[at], included[at] = data["score"], data["in_circuit"]
    nodes = list(graph.nodes(data=True))
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            scores=scores,
            in_circuit=included,
            senders=_texts(rows),
            slots=_texts(columns),
            rows=np.array([rows[sender] for sender, _, _ in edges], dtype=np.int64),
            columns=np.array([columns[slot] for _, slot, _ in edges], dtype=np.int64),
            nodes=_texts(name for name, _ in nodes),
            node_scores=np.array([data["score"] for _, data in nodes], dtype=np.float64),
            node_in_circuit=np.array([data["in_circuit"] for _, data in nodes], dtype=bool),
            graph=np.array(json.dumps(graph.graph, allow_nan=False)),
        )


def read(path: Path) -> nx.MultiDiGraph:
    """Read a graph from its matrix."""
    with np.load(path, allow_pickle=False) as held:
        graph = nx.MultiDiGraph(**json.loads(str(held["graph"])))
        for name, score, included in zip(held["nodes"], held["node_scores"], held["node_in_circuit"], strict=True):
            schema.add_node(graph, parse_id(str(name)), score=float(score), in_circuit=bool(included))
        scores, included = held["scores"], held["in_circuit"]
        senders, slots = held["senders"], held["slots"]
        for row, column in zip(held["rows"], held["columns"], strict=True):
            sender, slot = str(senders[row]), str(slots[column])
            _, receiver, letter = parse_edge(f"{sender}->{slot}")
            given = {"in_circuit": bool(included[row, column])}
            schema.add_edge(graph, sender, str(receiver), letter, float(scores[row, column]), **given)
    total = graph.graph["edges_total"]
    schema.rank_edges(graph)
    graph.graph["edges_total"] = total
    return graph


def _slot(receiver: str, key: str) -> str:
    return receiver if key == "in" else f"{receiver}<{key}>"


def _texts(names: object) -> np.ndarray:
    return np.array(list(names), dtype=np.str_)  # type: ignore[call-overload]
