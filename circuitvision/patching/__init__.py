"""Interventions that move values between runs: activation patching, interactions of components, modulation."""

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
from circuitvision.patching.modulation import ModulationResult, modulate

__all__ = [
    "ConditionalEffects",
    "Dividends",
    "InteractionResult",
    "ModulationResult",
    "PairInteractions",
    "PatchingResult",
    "ShapleyValues",
    "activation_patch",
    "interactions",
    "modulate",
]
