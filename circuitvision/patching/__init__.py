"""Interventions that move values between runs, or take away what a run reads: activation patching, causal tracing, knockout."""

from __future__ import annotations

from circuitvision.patching.activation import PatchingResult, activation_patch
from circuitvision.patching.knockout import Knockout, knockout
from circuitvision.patching.tracing import CausalTrace, causal_trace

__all__ = ["CausalTrace", "Knockout", "PatchingResult", "activation_patch", "causal_trace", "knockout"]
