"""Mechanistic circuit analysis of vision, vision-language and vision-language-action models.

``import circuitvision as cv`` loads nothing heavy: rooms and classes are imported when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuitvision import (
        circuits,
        data,
        edits,
        interop,
        metrics,
        organisms,
        patching,
        plots,
        readout,
        regions,
        steering,
        subspaces,
    )
    from circuitvision.hooked import HookedModel
    from circuitvision.loading import load
    from circuitvision.model import ActivationCache, HookPoint, TokenMap, Tower
    from circuitvision.model.picture_boxes import boxes_in_pictures
    from circuitvision.model.spec import register_family, register_norm, register_stack
    from circuitvision.progress import set_verbosity
    from circuitvision.results import Result
    from circuitvision.showing import show

__version__ = "0.1.0"

_ROOMS = (
    "circuits",
    "cli",
    "data",
    "edits",
    "errors",
    "families",
    "incremental",
    "interop",
    "metrics",
    "model",
    "openvla",
    "organisms",
    "patching",
    "plots",
    "readout",
    "regions",
    "steering",
    "studies",
    "subspaces",
)
_FUNCTIONS = {
    "boxes_in_pictures": "model.picture_boxes",
    "check_model": "checks.model",
    "load": "loading",
    "register_family": "model.spec",
    "register_norm": "model.spec",
    "register_stack": "model.spec",
    "set_verbosity": "progress",
    "show": "showing",
}
_CLASSES = {
    "checks.model": "ModelCheck",
    "circuits.ablation": "AblationCheck",
    "circuits.attention_edges": "AttentionEdges",
    "circuits.certificates": "Certificate",
    "circuits.circuit": "Circuit",
    "circuits.claims": "ClaimTests",
    "circuits.comparison": "CircuitAgreement DepthBias LayerMatrix",
    "circuits.computational_graph": "ComputationalGraph Receiver Sender",
    "circuits.discovery": "Discovery",
    "circuits.edge_attribution": "EdgeAttribution",
    "circuits.edge_runs": "Interchange",
    "circuits.evaluation": "CircuitEvaluation",
    "circuits.faithfulness_curve": "FaithfulnessCurve",
    "circuits.faithfulness_ratios": "Kept",
    "circuits.head_masks": "HeadMask",
    "circuits.importance": "HeadImportance",
    "circuits.minimality": "Minimality",
    "circuits.node_attention": "NodeAttention",
    "circuits.qk_attribution": "QKAttribution",
    "circuits.removal": "HeadRemoval",
    "circuits.shortcuts": "InformationGain ShortcutHeads",
    "data.backgrounds": "BackgroundScene",
    "data.batches": "Batch",
    "data.captions": "Caption Retrieval",
    "data.differences": "PictureDifferences",
    "data.generated": "LargestPair ReachPair",
    "data.outcomes": "EditOutcomes",
    "data.pairs": "Pairs Tally",
    "data.priors": "PriorCalibration",
    "data.questions": "Question QuestionPair",
    "data.reach": "Board Episodes ReachObject ReachScene ReachScenes",
    "data.scenes": "MinimalPair Scene SceneObject",
    "data.sides": "Example Side",
    "digests": "NamedFunction",
    "errors": "CircuitVisionError HookError InputError UnknownAttributeError UnknownExampleError UnknownSiteError UnsupportedModelError",
    "hooked": "HookedModel",
    "incremental.prepared": "PreparedRun",
    "incremental.sweeps.plan": "Plan",
    "incremental.sweeps.result": "SweepResult",
    "interop.transformer_lens_view": "TowerView",
    "metrics.actions": "ActionDim ActionEstimate Success",
    "metrics.answers": "Accuracy InterchangeAccuracy LogProb Logit LogitDiff Margin Prob Rank",
    "metrics.base": "Metric",
    "metrics.comparisons": "ActionDistance Comparison JS KL TransferCoefficient",
    "metrics.effects": "Transfer",
    "model.averages": "Layout",
    "model.cache": "ActivationCache",
    "model.columns": "Columns",
    "model.edits.base": "Edit EditGroup",
    "model.edits.values": "SideSource TensorRef",
    "model.flow": "Connector Flow",
    "model.head_forward": "HeadForward",
    "model.registrations": "HookPoint",
    "model.names": "NodeName",
    "model.norms": "Identity",
    "model.output_head": "LinearReadout OutputHead",
    "model.packing": "AnyRes Cameras Flat ImageRun ImageTokens Inserted Packed Packing Patches",
    "model.packing.batching": "Entries",
    "model.patches": "Frame PatchEmbedding",
    "model.positions": "Positions",
    "model.run_functions": "Generated",
    "model.regions": "Area HighNorm Region",
    "model.selection": "Selection",
    "model.slots": "SlotGradients",
    "model.spec": "Family NormSpec Readout Stack TowerSpec",
    "model.block_layout": "Attention BlockLayout Branch Fused Gate MLP Module Writer",
    "model.tokens": "TokenMap",
    "model.tower": "Tower",
    "model.tower_config": "TowerConfig",
    "model.wrapped": "Wrapped",
    "organisms.handbuilt.known": "HandBuilt",
    "openvla.actions": "ActionTokens",
    "openvla.configuration": "OpenVLAConfig",
    "openvla.modeling": "OpenVLAForActionPrediction",
    "openvla.processing": "OpenVLAImageProcessor OpenVLAProcessor",
    "patching.activation": "PatchingResult",
    "patching.knockout": "Knockout",
    "patching.tracing": "CausalTrace",
    "patching.coalitions": "CoalitionResult ConditionalEffects Dividends InteractionResult PairInteractions ShapleyValues",
    "patching.agreement": "Agreement",
    "patching.attribution": "AttributionResult",
    "patching.paths": "PathPatching",
    "patching.modulation": "ModulationResult",
    "plots.figure": "Figure",
    "readout.attention.contrast": "AttentionContrast",
    "readout.attention.distance": "DistanceProfile PositionPattern",
    "readout.attention.maps": "AttentionMaps",
    "readout.attention.mass": "AttentionSummary",
    "readout.attention.rollout": "AttentionRollout",
    "readout.attribution.bilinear": "BilinearAttribution",
    "readout.attribution.direct": "Attribution SourceAttribution",
    "readout.attribution.increase": "LogProbIncrease SourceIncrease",
    "readout.attribution.sources": "OverSources",
    "readout.lens.result": "LensResult",
    "readout.lens.summaries": "LensSummaries LensSummary PositionDifference",
    "readout.lens.tuned": "TunedLens",
    "readout.over_data": "DataReading",
    "readout.probes.collected": "Collected",
    "readout.probes.decisions": "DecisionLayers",
    "readout.probes.linear": "ProbeResult",
    "readout.probes.max_activating": "MaxActivatingExamples",
    "readout.probes.structure": "CKAResult PCAResult",
    "readout.ranks": "Ranking",
    "readout.relevance.curves": "Curve",
    "readout.relevance.pointing": "PointingGame",
    "readout.relevance.result": "Relevance",
    "readout.relevance.variables": "Place",
    "readout.weights.agreement": "ClassValueAgreement KeyValueAgreement",
    "readout.weights.head_circuits": "CompositionScores SingularVectors",
    "readout.weights.unembedding": "Unembedding",
    "readout.weights.value_vectors": "ValueVectors",
    "results": "Result",
    "steering.clusters": "ValueVectorClusters",
    "steering.directions": "Direction",
    "steering.injection": "InjectionResult",
    "steering.neurons": "NeuronSet",
    "steering.prompts": "PromptConditions",
    "steering.response": "SteeringResponse",
    "steering.rollouts": "ClosedLoop Rollouts",
    "studies.benchmark": "CircuitBenchmark",
    "subspaces.das": "BoundlessDAS DAS DASResult",
    "subspaces.fitting": "FittedBasis",
    "subspaces.illusion": "Component Statistics Thresholds Verdict",
    "subspaces.maps": "CouplingMap",
    "subspaces.pairs": "Outcome SiteBatch SitePairs",
    "subspaces.report": "IllusionReport",
    "subspaces.sweep": "SubspaceSweep",
}
"""Every class that a public function takes or returns, by the module where it is at home."""
_HOMES = {**_FUNCTIONS, **{name: home for home, names in _CLASSES.items() for name in names.split()}}

__all__ = [
    "ActivationCache",
    "HookPoint",
    "HookedModel",
    "Result",
    "TokenMap",
    "Tower",
    "boxes_in_pictures",
    "check_model",
    "circuits",
    "data",
    "edits",
    "interop",
    "load",
    "metrics",
    "organisms",
    "patching",
    "plots",
    "readout",
    "regions",
    "register_family",
    "register_norm",
    "register_stack",
    "set_verbosity",
    "show",
    "steering",
    "studies",
    "subspaces",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"circuitvision.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"circuitvision.{name}")
    from circuitvision.errors import UnknownAttributeError

    raise UnknownAttributeError(f"module 'circuitvision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_HOMES})
