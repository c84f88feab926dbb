"""Subspaces of activations: which directions of a site carry what a model answers, and what a claim about one is worth.

``bases`` are chosen without training, :class:`DAS` and :class:`BoundlessDAS` train one by interchange between the two sides of pairs, at any site
of any tower; ``controls`` hold it against training where there is nothing to find. All interchange is :func:`circuitvision.edits.project` in
prepared runs.
"""

from __future__ import annotations

from circuitvision.subspaces.bases import (
    interchanged,
    matched_random_basis,
    mean_difference,
    orthonormal,
    principal_components,
    random_basis,
)
from circuitvision.subspaces.controls import reinitialised
from circuitvision.subspaces.das import DAS, BoundlessDAS, DASResult
from circuitvision.subspaces.fitting import FittedBasis, fit_basis, fit_boundless
from circuitvision.subspaces.illusion import (
    Component,
    Statistics,
    Thresholds,
    Verdict,
    flags_of,
    illusion_statistics,
    verdict_of,
)
from circuitvision.subspaces.maps import CouplingMap
from circuitvision.subspaces.pairs import Outcome, SitePairs
from circuitvision.subspaces.report import IllusionReport, illusion_report
from circuitvision.subspaces.sweep import SubspaceSweep, subspace_sweep

__all__ = [
    "DAS",
    "BoundlessDAS",
    "Component",
    "CouplingMap",
    "DASResult",
    "FittedBasis",
    "IllusionReport",
    "Outcome",
    "SitePairs",
    "Statistics",
    "SubspaceSweep",
    "Thresholds",
    "Verdict",
    "fit_basis",
    "fit_boundless",
    "flags_of",
    "illusion_report",
    "illusion_statistics",
    "interchanged",
    "matched_random_basis",
    "mean_difference",
    "orthonormal",
    "principal_components",
    "random_basis",
    "reinitialised",
    "subspace_sweep",
    "verdict_of",
]
