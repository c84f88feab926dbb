"""Circuit graphs as GEXF, for Gephi: nodes with places, colours and sizes, edges with colours by sign.

GEXF as NetworkX writes it drops every attribute of the graph but its name, so these lie in a sidecar: ``circuit.meta.json`` beside ``circuit.gexf``.
The two must stay together to be read again. Places and colours are for looking only and are dropped on reading.

Not covered: GEXF of other programs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx

from circuitvision.circuits.layout import COLOURS, NEGATIVE, POSITIVE, placed
from circuitvision.errors import InputError
from circuitvision.files import replacing, write_text

SMALLEST, LARGEST = 6.0, 40.0
"""Diameters of nodes."""


def sidecar(path: Path) -> Path:
    """Where the graph's own attributes lie."""
    return path.with_suffix(".meta.json")


def write(graph: nx.MultiDiGraph, path: Path) -> None:
    """Write a graph whose edges have unique keys, and its sidecar; attributes of nodes and edges are added to it."""
    places = placed(graph)
    scores = [abs(data["score"]) for _, data in graph.nodes(data=True)]
    largest = max(scores, default=0.0) or 1.0
    for node, data in graph.nodes(data=True):
        x, y = places[node]
        size = SMALLEST + (LARGEST - SMALLEST) * abs(data["score"]) / largest
        data["viz"] = {"position": {"x": x, "y": y, "z": 0.0}, "color": _colour(COLOURS[data["kind"]]), "size": size}
    for _, _, key, data in graph.edges(keys=True, data=True):
        data["id"] = key
        data["viz"] = {"color": _colour(POSITIVE if data["score"] >= 0 else NEGATIVE)}
    write_text(sidecar(path), json.dumps(graph.graph, indent=1, allow_nan=False))
    with replacing(path) as temporary:
        nx.write_gexf(graph, temporary, encoding="utf-8", version="1.2draft")


def _colour(rgb: tuple[int, int, int]) -> dict[str, Any]:
    return {**dict(zip("rgb", rgb, strict=True)), "a": 1.0}


def read(path: Path) -> nx.MultiDiGraph:
    """Read a graph and its sidecar.

    Raises:
        InputError: the sidecar is missing.
    """
    beside = sidecar(path)
    if not beside.is_file():
        raise InputError(
            f"{beside.name} is not beside {path.name}: it holds what GEXF cannot; keep the two files together."
        )
    held = nx.read_gexf(path)
    graph = nx.MultiDiGraph(**json.loads(beside.read_text(encoding="utf-8")))
    for node, data in held.nodes(data=True):
        graph.add_node(node, **{key: data[key] for key in data.keys() - {"viz"}})
    for sender, receiver, data in held.edges(data=True):
        graph.add_edge(sender, receiver, **{key: data[key] for key in data.keys() - {"viz", "id", "networkx_key"}})
    return graph
