"""ViT: a CLS-pooled image classifier, or the headless encoder."""

from __future__ import annotations

from circuitvision.model.spec import Family, Readout, TowerSpec, register_family

register_family(
    Family(
        name="vit",
        classes=("ViTForImageClassification",),
        output="logits",
        auto_class="AutoModelForImageClassification",
        towers=(TowerSpec("vision", root="vit", readout=Readout(pool="cls", head="classifier", reads=("cls",))),),
    )
)
register_family(
    Family(
        name="vit_headless",
        classes=("ViTModel",),
        output="last_hidden_state",
        towers=(TowerSpec("vision"),),
    )
)
