"""CLIP and MetaCLIP 2: the dual encoder, its vision half alone, and the mean-pooled classifier built on it.

MetaCLIP 2 is built as CLIP is, but its text is read at the first end of text, whatever the id of it.
"""

from __future__ import annotations

from circuitvision.model.spec import Family, Readout, TowerSpec, register_family

for _name, _class, _end in (("clip", "CLIP", "eos"), ("metaclip_2", "MetaClip2", "first_eos")):
    register_family(
        Family(
            name=_name,
            classes=(f"{_class}Model",),
            output="logits_per_image",
            answer="vision",
            towers=(
                TowerSpec(
                    "vision",
                    root="vision_model",
                    config="vision_config",
                    readout=Readout(
                        pool="cls", head="visual_projection", finish="contrast", norm_first=False, reads=("cls",)
                    ),
                ),
                TowerSpec(
                    "text",
                    root="text_model",
                    config="text_config",
                    readout=Readout(pool=_end, head="text_projection", finish="contrast", reads=("eos",)),
                ),
            ),
        )
    )
    register_family(
        Family(
            name=f"{_name}_classifier",
            classes=(f"{_class}ForImageClassification",),
            output="logits",
            auto_class="AutoModelForImageClassification",
            towers=(
                TowerSpec(
                    "vision",
                    root="vision_model",
                    config="vision_config",
                    readout=Readout(pool="mean_patch", head="classifier", normed=False, reads=("patch",)),
                ),
            ),
        )
    )
    register_family(
        Family(
            name=f"{_name}_vision_projection",
            classes=(f"{_class}VisionModelWithProjection",),
            output="image_embeds",
            auto_class=f"{_class}VisionModelWithProjection",
            towers=(
                TowerSpec(
                    "vision",
                    root="vision_model",
                    readout=Readout(pool="cls", head="visual_projection", norm_first=False, reads=("cls",)),
                ),
            ),
        )
    )
    register_family(
        Family(
            name=f"{_name}_vision",
            classes=(f"{_class}VisionModel",),
            output="last_hidden_state",
            auto_class=f"{_class}VisionModel",
            towers=(TowerSpec("vision", readout=Readout(normed=False)),),
        )
    )
