"""Graphs to files and back: GraphML and JSON, bit for bit.

Both readers return a ``networkx.MultiDiGraph`` of the schema with the same ids, slots, attributes and types as the
graph that was written. GraphML as NetworkX writes it repeats the slot as XML edge id, which is not unique; the
edge's ``uid`` is written instead and the key restored from ``slot`` on reading. JSON is NetworkX's node-link form
with ``links``, readable by d3.

Not covered: GEXF, Cytoscape and the formats of other circuit tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx

from circuitvision.circuits.schema import EDGE_DEFAULTS, GRAPH_DEFAULTS, NODE_DEFAULTS, validate
from circuitvision.errors import InputError
from circuitvision.files import reading, replacing, write_text


def export(graph: nx.MultiDiGraph, path: str | Path) -> Path:
    """Write a circuit graph to ``.graphml`` or ``.json``, complete or not at all; returns the path. The graph is not
    changed.

    Raises:
        InputError: the graph breaks the schema, or the suffix is another one.
    """
    path = Path(path)
    if path.suffix not in (".graphml", ".json"):
        raise InputError(f"Graphs are exported as .graphml or .json, not {path.suffix or 'without a suffix'!r}.")
    validate(graph)
    if path.suffix == ".json":
        return write_text(path, json.dumps(nx.node_link_data(graph, edges="links"), indent=1, allow_nan=False))
    # Declaring every attribute in one fixed order makes equal graphs equal files.
    copy = nx.MultiDiGraph(**graph.graph)
    copy.add_nodes_from((node, dict(data)) for node, data in graph.nodes(data=True))
    copy.add_edges_from(
        (sender, receiver, data["uid"], dict(data)) for sender, receiver, data in graph.edges(data=True)
    )
    with replacing(path) as temporary:
        nx.write_graphml(copy, temporary, encoding="utf-8")
    return path


def load(path: str | Path) -> nx.MultiDiGraph:
    """Read a graph written by :func:`export` and check it against the schema.

    Raises:
        InputError: no such file, another suffix, or content that is not a graph of the schema.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    with reading(path, "a circuit graph"):
        if path.suffix == ".json":
            read = nx.node_link_graph(
                json.loads(path.read_text(encoding="utf-8")), directed=True, multigraph=True, edges="links"
            )
        elif path.suffix == ".graphml":
            read = nx.read_graphml(path, force_multigraph=True)
        else:
            raise InputError(f"Graphs are read from .graphml or .json; {path.name} is neither.")
        graph = nx.MultiDiGraph(**_typed(GRAPH_DEFAULTS, read.graph))
        graph.add_nodes_from((node, _typed(NODE_DEFAULTS, data)) for node, data in read.nodes(data=True))
        graph.add_edges_from((a, b, data["slot"], _typed(EDGE_DEFAULTS, data)) for a, b, data in read.edges(data=True))
        validate(graph)
    return graph


def _typed(defaults: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Attributes in the schema's order; GraphML's own graph defaults are dropped."""
    unknown = {
        key: value
        for key, value in data.items()
        if key not in defaults and key not in ("node_default", "edge_default", "key")
    }
    return {**{key: data[key] for key in defaults if key in data}, **unknown}
