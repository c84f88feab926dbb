"""Interventions that move values between runs: activation patching."""

from __future__ import annotations

from circuitvision.patching.activation import PatchingResult, activation_patch
from circuitvision.patching.knockout import Knockout, knockout

__all__ = ["Knockout", "PatchingResult", "activation_patch", "knockout"]
