"""The supported architectures: one short declarative file each. Importing this package fills the table the core works from."""

from __future__ import annotations

from circuitvision.families import clip, deit, dinov2, llava, paligemma, pi0, siglip, stacks, vit

__all__ = ["clip", "deit", "dinov2", "llava", "paligemma", "pi0", "siglip", "stacks", "vit"]
