"""Graphs to files and back, bit for bit: GraphML, GEXF, JSON for d3 and for Cytoscape, a matrix of scores, and the JSON of EAP-IG.

=================  ==========================================================================================================================
``.graphml``       igraph, Gephi, yEd, graphology
``.gexf``          Gephi and graphology, with colours and places; a sidecar ``.meta.json`` (see :mod:`circuitvision.circuits.gexf`)
``.json``          NetworkX's node-link form with ``links``, readable by d3
``.cyjs``          Cytoscape and Cytoscape.js: ``cytoscape({elements: file.elements})``; edges have their ``uid`` as ``id``
``.npz``           ``scores`` ``[sender slot]`` and the ids beside it (see :mod:`circuitvision.circuits.matrix`); attributes of parts are not in it
=================  ==========================================================================================================================

All but ``.npz`` give back a ``networkx.MultiDiGraph`` of the schema with the same ids, slots, attributes and types as the graph that was written;
:func:`export_eap` writes what EAP-IG can hold. GraphML as NetworkX writes it repeats the slot as XML edge id, which is not unique; the edge's ``uid``
is written instead and the key restored from ``slot`` on reading. Attributes that older files lack are read with their defaults.

Not covered: the formats of attribution-graph viewers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx

from circuitvision.circuits import gexf, matrix
from circuitvision.circuits.layout import placed
from circuitvision.circuits.schema import ADDED, EDGE_DEFAULTS, GRAPH_DEFAULTS, NODE_DEFAULTS, validate
from circuitvision.errors import InputError
from circuitvision.files import reading, replacing, write_text

_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML file can hold, or what its readers turn into something else (a carriage return becomes a line feed)."""


def export(graph: nx.MultiDiGraph, path: str | Path) -> Path:
    """Write a circuit graph to ``.graphml``, ``.gexf``, ``.json``, ``.cyjs`` or ``.npz``, complete or not at all; returns the path. The graph is not
    changed.

    Raises:
        InputError: the graph breaks the schema, the suffix is another one, or the format cannot hold something in the graph.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(
            f"Graphs are exported as {', '.join(FORMATS)}, not {path.suffix or 'without a suffix'!r}; export_eap writes the files of EAP-IG."
        )
    validate(graph)
    FORMATS[path.suffix].write(graph, path)
    return path


def load(path: str | Path) -> nx.MultiDiGraph:
    """Read a graph written by :func:`export` and check it against the schema.

    Raises:
        InputError: there is no such file, it is damaged, or it is no graph of the schema.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    if path.suffix not in FORMATS:
        raise InputError(f"Graphs are read from {', '.join(FORMATS)}; {path.name} is none of these.")
    with reading(path, "a circuit graph"):
        read = FORMATS[path.suffix].read(path)
        graph = nx.MultiDiGraph(**_typed(GRAPH_DEFAULTS, read.graph))
        graph.add_nodes_from((node, _typed(NODE_DEFAULTS, data)) for node, data in read.nodes(data=True))
        graph.add_edges_from((a, b, data["slot"], _typed(EDGE_DEFAULTS, data)) for a, b, data in read.edges(data=True))
        validate(graph)
    return graph


def _typed(defaults: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes in the schema's order, with the defaults of those that older files lack; GraphML's own graph defaults are dropped."""
    unknown = {
        key: value
        for key, value in data.items()
        if key not in defaults and key not in ("node_default", "edge_default", "key")
    }
    known = {key: data.get(key, default) for key, default in defaults.items() if key in data or key in ADDED}
    return {**known, **unknown}


# -- GraphML, GEXF -----------------------------------------------------------------------------------------------------------------------------------


def _for_xml(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """A copy whose edges have their ``uid`` as key.

    Raises:
        InputError: a text that XML cannot hold.
    """
    everything = [
        ("the graph", graph.graph),
        *graph.nodes(data=True),
        *((d["uid"], d) for _, _, d in graph.edges(data=True)),
    ]
    for owner, data in everything:
        for key, value in data.items():
            if isinstance(value, str) and _NOT_XML.search(value):
                raise InputError(
                    f"{key} of {owner} holds a control character, which XML cannot hold; write .json, or take it out."
                )
    # Declaring every attribute in one fixed order makes equal graphs equal files.
    copy = nx.MultiDiGraph(**graph.graph)
    copy.add_nodes_from((node, dict(data)) for node, data in graph.nodes(data=True))
    copy.add_edges_from(
        (sender, receiver, data["uid"], dict(data)) for sender, receiver, data in graph.edges(data=True)
    )
    return copy


def _write_graphml(graph: nx.MultiDiGraph, path: Path) -> None:
    copy = _for_xml(graph)
    with replacing(path) as temporary:
        nx.write_graphml(copy, temporary, encoding="utf-8")


def _read_graphml(path: Path) -> nx.MultiDiGraph:
    return nx.read_graphml(path, force_multigraph=True)


# -- JSON --------------------------------------------------------------------------------------------------------------------------------------------


def _write_json(graph: nx.MultiDiGraph, path: Path) -> None:
    write_text(path, json.dumps(nx.node_link_data(graph, edges="links"), indent=1, allow_nan=False))


def _read_json(path: Path) -> nx.MultiDiGraph:
    held = json.loads(path.read_text(encoding="utf-8"))
    return nx.node_link_graph(held, directed=True, multigraph=True, edges="links")


def _write_cytoscape(graph: nx.MultiDiGraph, path: Path) -> None:
    """NetworkX's form, which ``networkx.cytoscape_graph`` reads too, with unique ids of edges and a place for every node."""
    held = nx.cytoscape_data(graph)
    held["data"] = dict(graph.graph)
    places = placed(graph)
    for element in held["elements"]["nodes"]:
        x, y = places[element["data"]["id"]]
        # Heights grow downwards there, and layers are read from below.
        element["position"] = {"x": x, "y": -y}
    for element in held["elements"]["edges"]:
        element["data"]["id"] = element["data"]["uid"]
    write_text(path, json.dumps(held, indent=1, allow_nan=False))


def _read_cytoscape(path: Path) -> nx.MultiDiGraph:
    held = json.loads(path.read_text(encoding="utf-8"))
    graph = nx.MultiDiGraph(**held["data"])
    for element in held["elements"]["nodes"]:
        data = element["data"]
        graph.add_node(data["id"], **{key: data[key] for key in data.keys() - {"id", "value", "name"}})
    for element in held["elements"]["edges"]:
        data = element["data"]
        graph.add_edge(
            data["source"], data["target"], **{k: data[k] for k in data.keys() - {"id", "source", "target", "key"}}
        )
    return graph


class _Format(NamedTuple):
    write: Callable[[nx.MultiDiGraph, Path], None]
    read: Callable[[Path], nx.MultiDiGraph]


FORMATS = {
    ".graphml": _Format(_write_graphml, _read_graphml),
    ".gexf": _Format(lambda graph, path: gexf.write(_for_xml(graph), path), gexf.read),
    ".json": _Format(_write_json, _read_json),
    ".cyjs": _Format(_write_cytoscape, _read_cytoscape),
    ".npz": _Format(matrix.write, matrix.read),
}
"""Writers and readers by suffix."""
