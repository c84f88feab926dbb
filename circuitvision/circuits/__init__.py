"""Circuits as NetworkX graphs: the schema, files, head importance, whether a set of heads carries the answer, and heads that carry a shortcut."""

from __future__ import annotations

from circuitvision.circuits.ablation import AblationCheck, ablation_check, live_heads
from circuitvision.circuits.acdc import acdc
from circuitvision.circuits.attention_edges import AttentionEdges, attention_edges
from circuitvision.circuits.certificates import Certificate
from circuitvision.circuits.circuit import Circuit, circuit_of_graph
from circuitvision.circuits.claims import ClaimTests, claim_tests
from circuitvision.circuits.comparison import CircuitAgreement, DepthBias, LayerMatrix, compare_circuits, layer_matrix
from circuitvision.circuits.computational_graph import ComputationalGraph, computational_graph
from circuitvision.circuits.discovery import Discovery, certify, discover
from circuitvision.circuits.eap import export_eap, load_eap
from circuitvision.circuits.edge_attribution import EdgeAttribution, edge_attribution
from circuitvision.circuits.edge_pruning import edge_pruning
from circuitvision.circuits.edge_runs import Interchange
from circuitvision.circuits.evaluation import CircuitEvaluation, evaluate
from circuitvision.circuits.export import export, load
from circuitvision.circuits.faithfulness_curve import FaithfulnessCurve, faithfulness_curve
from circuitvision.circuits.head_masks import HeadMask, learn_shortcut_heads
from circuitvision.circuits.importance import HeadImportance, head_importance
from circuitvision.circuits.minimality import Minimality, minimality
from circuitvision.circuits.node_attention import NodeAttention, attention_of
from circuitvision.circuits.qk_attribution import QKAttribution, qk_attribution
from circuitvision.circuits.removal import HeadRemoval, removal_curve, remove_heads
from circuitvision.circuits.schema import add_edge, add_node, new_graph, rank_edges, validate
from circuitvision.circuits.shortcuts import InformationGain, ShortcutHeads, shortcut_heads
from circuitvision.model.names import NodeName, format_edge, format_id, head_id, parse_edge, parse_id

__all__ = [
    "AblationCheck",
    "AttentionEdges",
    "Certificate",
    "Circuit",
    "CircuitAgreement",
    "CircuitEvaluation",
    "ClaimTests",
    "ComputationalGraph",
    "DepthBias",
    "Discovery",
    "EdgeAttribution",
    "FaithfulnessCurve",
    "HeadImportance",
    "HeadMask",
    "HeadRemoval",
    "InformationGain",
    "Interchange",
    "LayerMatrix",
    "Minimality",
    "NodeAttention",
    "NodeName",
    "QKAttribution",
    "ShortcutHeads",
    "ablation_check",
    "acdc",
    "add_edge",
    "add_node",
    "attention_edges",
    "attention_of",
    "certify",
    "circuit_of_graph",
    "claim_tests",
    "compare_circuits",
    "computational_graph",
    "discover",
    "edge_attribution",
    "edge_pruning",
    "evaluate",
    "export",
    "export_eap",
    "faithfulness_curve",
    "format_edge",
    "format_id",
    "head_id",
    "head_importance",
    "layer_matrix",
    "learn_shortcut_heads",
    "live_heads",
    "load",
    "load_eap",
    "minimality",
    "new_graph",
    "parse_edge",
    "parse_id",
    "qk_attribution",
    "rank_edges",
    "removal_curve",
    "remove_heads",
    "shortcut_heads",
    "validate",
]
