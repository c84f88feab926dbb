"""DINOv3 ViT: positions are rotary and on patches alone, so images may have any size; keys without a bias; no head."""

from __future__ import annotations

from circuitvision.model.spec import Family, TowerSpec, register_family

register_family(
    Family(
        name="dinov3",
        classes=("DINOv3ViTModel",),
        output="last_hidden_state",
        towers=(TowerSpec("vision"),),
    )
)
