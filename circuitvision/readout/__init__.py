"""Reading activations without changing them: the logit lens."""

from __future__ import annotations

from circuitvision.readout.attention import AttentionSummary, attention_entropy, attention_mass
from circuitvision.readout.attention_distance import (
    DistanceProfile,
    PositionPattern,
    distance_profile,
    position_pattern,
)
from circuitvision.readout.attention_regions import AttentionContrast, Region, attention_contrast
from circuitvision.readout.attention_relevance import chefer_relevance, legrad, relevance_rollout
from circuitvision.readout.attention_rollout import AttentionRollout, rollout
from circuitvision.readout.attribution import Attribution, SourceAttribution, direct_attribution, source_attribution
from circuitvision.readout.bilinear import BilinearAttribution, bilinear_attribution
from circuitvision.readout.class_agreement import Agreement, agreement
from circuitvision.readout.collected import Collected, collect
from circuitvision.readout.curves import Curve, deletion_curve, insertion_curve
from circuitvision.readout.decisions import DecisionLayers, decision_layer
from circuitvision.readout.exemplars import ExemplarIndex, exemplars
from circuitvision.readout.head_circuits import (
    CompositionScores,
    SingularVectors,
    composition_scores,
    full_ov,
    ov_circuit,
    qk_circuit,
    singular_vectors,
)
from circuitvision.readout.head_maps import AttentionMaps, attention_maps, head_contrast, peak_in
from circuitvision.readout.increase import LogProbIncrease, log_prob_increase
from circuitvision.readout.key_values import TokenAgreement, compositionality, key_value_agreement
from circuitvision.readout.lens import LensResult, lens_sites, logit_lens
from circuitvision.readout.pointing import PointingGame, box_mask, pointing_game
from circuitvision.readout.probes import ProbeResult, linear_probe, probe_vectors
from circuitvision.readout.ranking import Ranking, ranking
from circuitvision.readout.relevance import Relevance, gradient_times_activation, integrated_gradients
from circuitvision.readout.removal import occlusion
from circuitvision.readout.structure import CKAResult, PCAResult, cka_matrix, linear_cka, pca, pca_of, stream_pca
from circuitvision.readout.summaries import (
    LensSummary,
    change_rate,
    difference,
    identifiability,
    lens_identifiability,
    match_rates,
    rank,
    similarity_change,
)
from circuitvision.readout.targets import prompt_embeddings
from circuitvision.readout.tuned import TunedLens
from circuitvision.readout.unembedding import Unembedding, unembedding_matrix
from circuitvision.readout.weights import ValueVectors, action_bins, value_vectors

__all__ = [
    "Agreement",
    "AttentionContrast",
    "AttentionMaps",
    "AttentionRollout",
    "AttentionSummary",
    "Attribution",
    "BilinearAttribution",
    "CKAResult",
    "Collected",
    "CompositionScores",
    "Curve",
    "DecisionLayers",
    "DistanceProfile",
    "ExemplarIndex",
    "LensResult",
    "LensSummary",
    "LogProbIncrease",
    "PCAResult",
    "PointingGame",
    "PositionPattern",
    "ProbeResult",
    "Ranking",
    "Region",
    "Relevance",
    "SingularVectors",
    "SourceAttribution",
    "TokenAgreement",
    "TunedLens",
    "Unembedding",
    "ValueVectors",
    "action_bins",
    "agreement",
    "attention_contrast",
    "attention_entropy",
    "attention_maps",
    "attention_mass",
    "bilinear_attribution",
    "box_mask",
    "change_rate",
    "chefer_relevance",
    "cka_matrix",
    "collect",
    "composition_scores",
    "compositionality",
    "decision_layer",
    "deletion_curve",
    "difference",
    "direct_attribution",
    "distance_profile",
    "exemplars",
    "full_ov",
    "gradient_times_activation",
    "head_contrast",
    "identifiability",
    "insertion_curve",
    "integrated_gradients",
    "key_value_agreement",
    "legrad",
    "lens_identifiability",
    "lens_sites",
    "linear_cka",
    "linear_probe",
    "log_prob_increase",
    "logit_lens",
    "match_rates",
    "occlusion",
    "ov_circuit",
    "pca",
    "pca_of",
    "peak_in",
    "pointing_game",
    "position_pattern",
    "probe_vectors",
    "prompt_embeddings",
    "qk_circuit",
    "rank",
    "ranking",
    "relevance_rollout",
    "rollout",
    "similarity_change",
    "singular_vectors",
    "source_attribution",
    "stream_pca",
    "unembedding_matrix",
    "value_vectors",
]
