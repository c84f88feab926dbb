"""CLIP: the dual encoder, its vision half alone, and the mean-pooled classifier built on it."""

from __future__ import annotations

from circuitvision.model.spec import Family, Readout, TowerSpec, register_family

register_family(
    Family(
        name="clip",
        classes=("CLIPModel",),
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
                readout=Readout(pool="eos", head="text_projection", finish="contrast", reads=("eos",)),
            ),
        ),
    )
)
register_family(
    Family(
        name="clip_classifier",
        classes=("CLIPForImageClassification",),
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
        name="clip_vision_projection",
        classes=("CLIPVisionModelWithProjection",),
        output="image_embeds",
        auto_class="CLIPVisionModelWithProjection",
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
        name="clip_vision",
        classes=("CLIPVisionModel",),
        output="last_hidden_state",
        auto_class="CLIPVisionModel",
        towers=(TowerSpec("vision", readout=Readout(normed=False)),),
    )
)
