"""Interventions that move values between runs: activation patching, path patching."""

from __future__ import annotations

from circuitvision.patching.activation import PatchingResult, activation_patch
from circuitvision.patching.paths import PathPatching, path_patch

__all__ = ["PatchingResult", "PathPatching", "activation_patch", "path_patch"]
