"""Interventions that move values between runs: activation patching, interactions of components."""

from __future__ import annotations

from circuitvision.patching.activation import PatchingResult, activation_patch
from circuitvision.patching.coalitions import (
    ConditionalEffects,
    Dividends,
    InteractionResult,
    PairInteractions,
    ShapleyValues,
)
from circuitvision.patching.interactions import interactions

__all__ = [
    "ConditionalEffects",
    "Dividends",
    "InteractionResult",
    "PairInteractions",
    "PatchingResult",
    "ShapleyValues",
    "activation_patch",
    "interactions",
]
