"""Mechanistic circuit analysis of vision, vision-language and vision-language-action models.

``import circuitvision as cv`` loads nothing heavy: rooms and classes are imported when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuitvision import circuits, data, edits, interop, metrics, organisms, patching, plots, readout, regions
    from circuitvision.model import ActivationCache, HookedModel, HookPoint, TokenMap, Tower
    from circuitvision.model.picture_boxes import boxes_in_pictures
    from circuitvision.model.spec import register_family, register_stack
    from circuitvision.progress import set_verbosity
    from circuitvision.showing import show

__version__ = "0.1.0"

_ROOMS = (
    "circuits",
    "cli",
    "data",
    "edits",
    "errors",
    "families",
    "interop",
    "metrics",
    "model",
    "organisms",
    "patching",
    "plots",
    "readout",
    "regions",
)
_CLASSES = ("ActivationCache", "HookPoint", "HookedModel", "TokenMap", "Tower")
_FUNCTIONS = {
    "boxes_in_pictures": "circuitvision.model.picture_boxes",
    "register_family": "circuitvision.model.spec",
    "register_stack": "circuitvision.model.spec",
    "set_verbosity": "circuitvision.progress",
    "show": "circuitvision.showing",
}

__all__ = [
    "ActivationCache",
    "HookPoint",
    "HookedModel",
    "TokenMap",
    "Tower",
    "boxes_in_pictures",
    "circuits",
    "data",
    "edits",
    "interop",
    "metrics",
    "organisms",
    "patching",
    "plots",
    "readout",
    "regions",
    "register_family",
    "register_stack",
    "set_verbosity",
    "show",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module("circuitvision.model"), name)
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"circuitvision.{name}")
    raise AttributeError(f"module 'circuitvision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_CLASSES, *_FUNCTIONS})
