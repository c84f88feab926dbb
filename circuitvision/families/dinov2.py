"""DINOv2, with and without registers: the classifier reads CLS and the mean patch; LayerScale on both branches."""

from __future__ import annotations

from circuitvision.model.spec import Family, Readout, TowerSpec, register_family

_READOUT = Readout(pool="cls+mean_patch", head="classifier", reads=("cls", "patch"))

register_family(
    Family(
        name="dinov2",
        classes=("Dinov2ForImageClassification",),
        output="logits",
        auto_class="AutoModelForImageClassification",
        towers=(TowerSpec("vision", root="dinov2", readout=_READOUT),),
    )
)
register_family(
    Family(
        name="dinov2_with_registers",
        classes=("Dinov2WithRegistersForImageClassification",),
        output="logits",
        auto_class="AutoModelForImageClassification",
        towers=(TowerSpec("vision", root="dinov2_with_registers", readout=_READOUT),),
    )
)
register_family(
    Family(
        name="dinov2_headless",
        classes=("Dinov2Model", "Dinov2WithRegistersModel"),
        output="last_hidden_state",
        towers=(TowerSpec("vision"),),
    )
)
