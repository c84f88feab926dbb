"""How a family packs images: which rows of the vision tower an image takes, which examples own it, and which patches every prompt position holds.

A family declares one :class:`Packing`; :class:`ImageRun` is that packing at work on the inputs of one run.
"""

from circuitvision.model.packing.any_resolution import AnyRes
from circuitvision.model.packing.base import Packing
from circuitvision.model.packing.run import ImageRun, ImageTokens, laid_out
from circuitvision.model.packing.standard import Cameras, Flat, Inserted, Packed, Patches

__all__ = [
    "AnyRes",
    "Cameras",
    "Flat",
    "ImageRun",
    "ImageTokens",
    "Inserted",
    "Packed",
    "Packing",
    "Patches",
    "laid_out",
]
