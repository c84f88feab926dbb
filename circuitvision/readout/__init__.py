"""Reading a model without changing it: what each place says, who wrote it, where it looks, what it depends on, what is in it.

``lens`` (the logit lens and its summaries), ``attribution`` (terms of the stream), ``weights`` (value vectors, circuits of heads),
``attention``, ``relevance`` (of pixels and tokens, with curves that check it), ``probes`` (probes, components, exemplars). What they share:
``targets`` (words, classes, prompts, directions), ``places`` (where positions lie in the image), ``recorded`` (reading caches), ``ranks``.
Everything public is named here.
"""

from __future__ import annotations

from circuitvision.readout.attention.distance import (
    DistanceProfile,
    PositionPattern,
    distance_profile,
    position_pattern,
)
from circuitvision.readout.attention.maps import AttentionMaps, attention_maps, head_contrast, peak_in
from circuitvision.readout.attention.mass import AttentionSummary, attention_entropy, attention_mass
from circuitvision.readout.attention.regions import AttentionContrast, Region, attention_contrast
from circuitvision.readout.attention.rollout import AttentionRollout, rollout
from circuitvision.readout.attribution.bilinear import BilinearAttribution, bilinear_attribution
from circuitvision.readout.attribution.direct import (
    Attribution,
    SourceAttribution,
    direct_attribution,
    source_attribution,
)
from circuitvision.readout.attribution.increase import LogProbIncrease, SourceIncrease, log_prob_increase
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.result import LensResult
from circuitvision.readout.lens.sites import lens_sites
from circuitvision.readout.lens.tuned import TunedLens
from circuitvision.readout.probes.collected import Collected, collect
from circuitvision.readout.probes.decisions import DecisionLayers, decision_layer
from circuitvision.readout.probes.exemplars import ExemplarIndex, exemplars
from circuitvision.readout.probes.linear import ProbeResult, linear_probe, probe_vectors
from circuitvision.readout.probes.structure import CKAResult, PCAResult, cka_matrix, linear_cka, pca, pca_of, stream_pca
from circuitvision.readout.ranks import Ranking, ranking
from circuitvision.readout.relevance.attention import chefer_relevance, legrad, relevance_rollout
from circuitvision.readout.relevance.curves import Curve, deletion_curve, insertion_curve
from circuitvision.readout.relevance.gradients import Relevance, gradient_times_activation, integrated_gradients
from circuitvision.readout.relevance.pointing import PointingGame, box_mask, pointing_game
from circuitvision.readout.relevance.removal import occlusion
from circuitvision.readout.targets import prompt_embeddings
from circuitvision.readout.weights.class_agreement import Agreement, agreement
from circuitvision.readout.weights.head_circuits import (
    CompositionScores,
    SingularVectors,
    composition_scores,
    full_ov,
    ov_circuit,
    qk_circuit,
    singular_vectors,
)
from circuitvision.readout.weights.key_values import TokenAgreement, compositionality, key_value_agreement
from circuitvision.readout.weights.rows import action_bins
from circuitvision.readout.weights.unembedding import Unembedding, unembedding_matrix
from circuitvision.readout.weights.value_vectors import ValueVectors, value_vectors

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
    "SourceIncrease",
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
    "chefer_relevance",
    "cka_matrix",
    "collect",
    "composition_scores",
    "compositionality",
    "decision_layer",
    "deletion_curve",
    "direct_attribution",
    "distance_profile",
    "exemplars",
    "full_ov",
    "gradient_times_activation",
    "head_contrast",
    "insertion_curve",
    "integrated_gradients",
    "key_value_agreement",
    "legrad",
    "lens_sites",
    "linear_cka",
    "linear_probe",
    "log_prob_increase",
    "logit_lens",
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
    "ranking",
    "relevance_rollout",
    "rollout",
    "singular_vectors",
    "source_attribution",
    "stream_pca",
    "unembedding_matrix",
    "value_vectors",
]
