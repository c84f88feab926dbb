"""Reading a model without changing it: what each position predicts, which components wrote it, where it attends, what it depends on.

``lens`` (the logit lens and its summaries), ``attribution`` (terms of the stream), ``weights`` (value vectors, circuits of heads), ``attention``,
``relevance`` (of pixels and tokens, with curves that check it), ``probes`` (probes, components, examples of largest activation). What they share:
``patch_coords`` (where positions lie in the image), ``recorded`` (reading caches), ``over_data`` (reads of data sets), ``ranks``; and a tower's
``output_head``. Everything public is named here; the classes of results are public in ``circuitvision`` itself.

Reads are called ``(model, inputs_or_cache, …)``, weights ``(tower, …)``, experiments ``(model, inputs, metric, …)``.
"""

from __future__ import annotations

from circuitvision.model.columns import prompt_embeddings
from circuitvision.readout.attention.contrast import attention_contrast
from circuitvision.readout.attention.distance import distance_profile, position_pattern
from circuitvision.readout.attention.maps import attention_maps
from circuitvision.readout.attention.mass import attention_entropy, attention_mass
from circuitvision.readout.attention.rollout import rollout
from circuitvision.readout.attribution.bilinear import bilinear_attribution
from circuitvision.readout.attribution.direct import direct_attribution, source_attribution
from circuitvision.readout.attribution.increase import log_prob_increase
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.tuned import TunedLens
from circuitvision.readout.probes.collected import Collected, collect
from circuitvision.readout.probes.decisions import decision_layer
from circuitvision.readout.probes.linear import linear_probe
from circuitvision.readout.probes.max_activating import max_activating_examples
from circuitvision.readout.probes.structure import cka, pca
from circuitvision.readout.ranks import rank_components
from circuitvision.readout.relevance.attention import chefer_relevance, legrad
from circuitvision.readout.relevance.curves import perturbation_curve
from circuitvision.readout.relevance.gradients import gradient_times_activation, integrated_gradients
from circuitvision.readout.relevance.pointing import pointing_game
from circuitvision.readout.relevance.removal import occlusion
from circuitvision.readout.weights.agreement import class_value_agreement, key_value_agreement
from circuitvision.readout.weights.head_circuits import composition_scores, ov_circuit, qk_circuit, singular_vectors
from circuitvision.readout.weights.unembedding import unembedding_matrix
from circuitvision.readout.weights.value_vectors import value_vectors

__all__ = [
    "Collected",
    "TunedLens",
    "attention_contrast",
    "attention_entropy",
    "attention_maps",
    "attention_mass",
    "bilinear_attribution",
    "chefer_relevance",
    "cka",
    "class_value_agreement",
    "collect",
    "composition_scores",
    "decision_layer",
    "direct_attribution",
    "distance_profile",
    "gradient_times_activation",
    "integrated_gradients",
    "key_value_agreement",
    "legrad",
    "linear_probe",
    "log_prob_increase",
    "logit_lens",
    "max_activating_examples",
    "occlusion",
    "ov_circuit",
    "pca",
    "perturbation_curve",
    "pointing_game",
    "position_pattern",
    "prompt_embeddings",
    "qk_circuit",
    "rank_components",
    "rollout",
    "singular_vectors",
    "source_attribution",
    "unembedding_matrix",
    "value_vectors",
]
