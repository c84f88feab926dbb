"""The supported architectures: one short declarative file each. Importing this package fills the table the core works from.

What such a file is made of is here as well, for a family of one's own: ``docs/families.md`` has an example.
"""

from __future__ import annotations

from circuitvision.families import clip, deit, dinov2, dinov3, llava, openvla, paligemma, pi0, siglip, stacks, vit
from circuitvision.families.action_tokens import action_bins
from circuitvision.model.block_layout import MLP, Attention, BlockLayout, Branch, Fused, Gate, Module, Writer
from circuitvision.model.flow import Connector
from circuitvision.model.packing import AnyRes, Cameras, Flat, Inserted, Packed, Packing, Patches
from circuitvision.model.spec import (
    FAMILIES,
    Family,
    NormSpec,
    Readout,
    Stack,
    TowerSpec,
    register_family,
    register_norm,
    register_stack,
)

__all__ = [
    "MLP",
    "AnyRes",
    "Attention",
    "BlockLayout",
    "Branch",
    "Cameras",
    "Connector",
    "Family",
    "Flat",
    "Fused",
    "Gate",
    "Inserted",
    "Module",
    "NormSpec",
    "Packed",
    "Packing",
    "Patches",
    "Readout",
    "Stack",
    "TowerSpec",
    "Writer",
    "action_bins",
    "clip",
    "deit",
    "dinov2",
    "dinov3",
    "llava",
    "openvla",
    "paligemma",
    "pi0",
    "register_family",
    "register_norm",
    "register_stack",
    "siglip",
    "stacks",
    "vit",
]

SHIPPED = frozenset(FAMILIES)
"""The classes that the files here describe."""
