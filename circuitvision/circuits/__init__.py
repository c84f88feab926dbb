"""Circuits as NetworkX graphs: the schema, files, head importance, and whether a set of heads carries the answer."""

from __future__ import annotations

from circuitvision.circuits.ablation import AblationCheck, ablation_check, live_heads
from circuitvision.circuits.attention_edges import AttentionEdges, attention_edges
from circuitvision.circuits.computational_graph import ComputationalGraph, computational_graph
from circuitvision.circuits.edge_attribution import EdgeAttribution, edge_attribution
from circuitvision.circuits.edge_runs import Interchange
from circuitvision.circuits.export import export, load
from circuitvision.circuits.importance import HeadImportance, head_importance
from circuitvision.circuits.schema import add_edge, add_node, new_graph, rank_edges, validate
from circuitvision.model.names import NodeName, format_id, head_id, parse_id

__all__ = [
    "AblationCheck",
    "AttentionEdges",
    "ComputationalGraph",
    "EdgeAttribution",
    "HeadImportance",
    "Interchange",
    "NodeName",
    "ablation_check",
    "add_edge",
    "add_node",
    "attention_edges",
    "computational_graph",
    "edge_attribution",
    "export",
    "format_id",
    "head_id",
    "head_importance",
    "live_heads",
    "load",
    "new_graph",
    "parse_id",
    "rank_edges",
    "validate",
]
