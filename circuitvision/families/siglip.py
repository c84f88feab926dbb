"""SigLIP and SigLIP2: dual encoders with an attention-pooling head, their vision halves, and the mean-pooled classifier."""

from __future__ import annotations

from circuitvision.model.packing import Packing, Patches
from circuitvision.model.spec import Family, Readout, TowerSpec, register_family

_TEXT = TowerSpec(
    "text",
    root="text_model",
    config="text_config",
    readout=Readout(pool="last", head="text_model.head", finish="contrast", reads=("last",)),
)


def _vision(root: str, config: str) -> TowerSpec:
    pool_module = f"{root}.head" if root else "head"
    return TowerSpec(
        "vision",
        root=root,
        config=config,
        readout=Readout(pool="attention", pool_module=pool_module, finish="contrast") if root else Readout(),
    )


for _name, _prefix, _packing in (("siglip", "Siglip", Packing()), ("siglip2", "Siglip2", Patches())):
    register_family(
        Family(
            name=_name,
            classes=(f"{_prefix}Model",),
            packing=_packing,
            output="logits_per_image",
            answer="vision",
            text_padding="max_length",
            image_settings=("patch_size", "max_num_patches") if _name == "siglip2" else (),
            towers=(_vision("vision_model", "vision_config"), _TEXT),
        )
    )
    register_family(
        Family(
            name=f"{_name}_vision",
            classes=(f"{_prefix}VisionModel",),
            packing=_packing,
            output="last_hidden_state",
            auto_class=f"{_prefix}VisionModel",
            towers=(_vision("", ""),),
        )
    )
    register_family(
        Family(
            name=f"{_name}_classifier",
            classes=(f"{_prefix}ForImageClassification",),
            packing=_packing,
            output="logits",
            auto_class="AutoModelForImageClassification",
            towers=(
                TowerSpec(
                    "vision",
                    root="vision_model",
                    config="vision_config",
                    readout=Readout(pool="mean", head="classifier"),
                ),
            ),
        )
    )
