"""The core: one set of names, one mechanism for reading and writing activations. :class:`circuitvision.HookedModel` wraps a model with it."""

from __future__ import annotations

from circuitvision.model.cache import ActivationCache
from circuitvision.model.registrations import HookPoint
from circuitvision.model.tokens import TokenMap
from circuitvision.model.tower import Tower
from circuitvision.model.tower_config import TowerConfig

__all__ = ["ActivationCache", "HookPoint", "TokenMap", "Tower", "TowerConfig"]
