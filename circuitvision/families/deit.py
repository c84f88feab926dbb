"""DeiT: ViT with a distillation token; the teacher variant averages two heads."""

from __future__ import annotations

from circuitvision.model.spec import Family, Readout, TowerSpec, register_family

register_family(
    Family(
        name="deit",
        classes=("DeiTForImageClassification",),
        output="logits",
        auto_class="AutoModelForImageClassification",
        towers=(TowerSpec("vision", root="deit", readout=Readout(pool="cls", head="classifier", reads=("cls",))),),
    )
)
register_family(
    Family(
        name="deit_with_teacher",
        classes=("DeiTForImageClassificationWithTeacher",),
        output="logits",
        auto_class="AutoModelForImageClassification",
        towers=(
            TowerSpec(
                "vision",
                root="deit",
                readout=Readout(
                    pool="cls+distillation",
                    head="cls_classifier",
                    second_head="distillation_classifier",
                    finish="mean_heads",
                    reads=("cls", "distillation"),
                ),
            ),
        ),
    )
)
register_family(
    Family(
        name="deit_headless",
        classes=("DeiTModel",),
        output="last_hidden_state",
        towers=(TowerSpec("vision"),),
    )
)
