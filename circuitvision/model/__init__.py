"""The core: one wrapper, one set of names, one mechanism for reading and writing activations."""

from __future__ import annotations

from circuitvision.model.cache import ActivationCache
from circuitvision.model.hooked import HookedModel
from circuitvision.model.hooks import HookPoint
from circuitvision.model.sweeps.result import SweepResult
from circuitvision.model.tokens import TokenMap
from circuitvision.model.tower import Tower
from circuitvision.model.tower_config import TowerConfig

__all__ = ["ActivationCache", "HookPoint", "HookedModel", "SweepResult", "TokenMap", "Tower", "TowerConfig"]
