"""Interventions that move values between runs, or take away what a run reads.

Whole cells: ``activation_patch``, its estimates from gradients ``attribution_patch`` (and how well they agree), ``causal_trace`` under noise. Routes:
``path_patch`` between components, ``knockout`` between positions. Several at once: ``interactions``, ``modulate``.
"""

from __future__ import annotations

from circuitvision.model.run_functions import Generated, generated
from circuitvision.patching.activation import (
    PatchingResult,
    activation_patch,
)
from circuitvision.patching.agreement import (
    Agreement,
    agreement,
)
from circuitvision.patching.attribution import (
    AttributionResult,
    attribution_patch,
)
from circuitvision.patching.coalitions import (
    ConditionalEffects,
    Dividends,
    InteractionResult,
    PairInteractions,
    ShapleyValues,
)
from circuitvision.patching.interactions import (
    interactions,
)
from circuitvision.patching.knockout import (
    Knockout,
    knockout,
)
from circuitvision.patching.modulation import (
    ModulationResult,
    modulate,
)
from circuitvision.patching.paths import (
    PathPatching,
    path_patch,
)
from circuitvision.patching.tracing import (
    CausalTrace,
    causal_trace,
)

__all__ = [
    "Agreement",
    "AttributionResult",
    "CausalTrace",
    "ConditionalEffects",
    "Dividends",
    "Generated",
    "InteractionResult",
    "Knockout",
    "ModulationResult",
    "PairInteractions",
    "PatchingResult",
    "PathPatching",
    "ShapleyValues",
    "activation_patch",
    "agreement",
    "attribution_patch",
    "causal_trace",
    "generated",
    "interactions",
    "knockout",
    "modulate",
    "path_patch",
]
