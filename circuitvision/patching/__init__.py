"""Interventions that move values between runs: activation patching, and its estimates from gradients."""

from __future__ import annotations

from circuitvision.patching.activation import PatchingResult, activation_patch
from circuitvision.patching.agreement import Agreement, agreement
from circuitvision.patching.attribution import AttributionResult, attribution_patch

__all__ = [
    "Agreement",
    "AttributionResult",
    "PatchingResult",
    "activation_patch",
    "agreement",
    "attribution_patch",
]
