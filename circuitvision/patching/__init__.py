"""Interventions that move values between runs: activation patching."""

from __future__ import annotations

from circuitvision.patching.activation import PatchingResult, activation_patch

__all__ = ["PatchingResult", "activation_patch"]
