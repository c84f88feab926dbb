"""Circuits as NetworkX graphs: schema, files, head importance, and the check that ablating a circuit destroys the
answer."""

from __future__ import annotations

from circuitvision.circuits.export import export, load
from circuitvision.circuits.names import NodeName, format_id, head_id, parse_id
from circuitvision.circuits.schema import add_edge, add_node, new_graph, rank_edges, validate

__all__ = [
    "NodeName",
    "add_edge",
    "add_node",
    "export",
    "format_id",
    "head_id",
    "load",
    "new_graph",
    "parse_id",
    "rank_edges",
    "validate",
]
