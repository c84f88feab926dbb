"""Circuits as NetworkX graphs: the schema, files, head importance, whether a set of heads carries the answer, and heads that carry a shortcut."""

from __future__ import annotations

from circuitvision.circuits.ablation import AblationCheck, ablation_check, live_heads
from circuitvision.circuits.attention_edges import AttentionEdges, attention_edges
from circuitvision.circuits.computational_graph import ComputationalGraph, computational_graph
from circuitvision.circuits.eap import export_eap, load_eap
from circuitvision.circuits.edge_attribution import EdgeAttribution, edge_attribution
from circuitvision.circuits.edge_runs import Interchange
from circuitvision.circuits.export import export, load
from circuitvision.circuits.importance import HeadImportance, head_importance
from circuitvision.circuits.node_attention import NodeAttention, attention_of
from circuitvision.circuits.removal import HeadRemoval, removal_curve, remove_heads
from circuitvision.circuits.schema import add_edge, add_node, new_graph, rank_edges, validate
from circuitvision.circuits.shortcuts import InformationGain, ShortcutHeads, shortcut_heads
from circuitvision.model.names import NodeName, format_edge, format_id, head_id, parse_edge, parse_id

__all__ = [
    "AblationCheck",
    "AttentionEdges",
    "ComputationalGraph",
    "EdgeAttribution",
    "HeadImportance",
    "HeadRemoval",
    "InformationGain",
    "Interchange",
    "NodeAttention",
    "NodeName",
    "ShortcutHeads",
    "ablation_check",
    "add_edge",
    "add_node",
    "attention_edges",
    "attention_of",
    "computational_graph",
    "edge_attribution",
    "export",
    "export_eap",
    "format_edge",
    "format_id",
    "head_id",
    "head_importance",
    "live_heads",
    "load",
    "load_eap",
    "new_graph",
    "parse_edge",
    "parse_id",
    "rank_edges",
    "removal_curve",
    "remove_heads",
    "shortcut_heads",
    "validate",
]
