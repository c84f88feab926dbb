"""LLaVA 1.5, LLaVA-NeXT, LLaVA-OneVision: a vision tower read at a feature layer, a projector, a causal language model."""

from __future__ import annotations

from circuitvision.model.spec import Family, Readout, TowerSpec, register_family

_TOWERS = (
    TowerSpec(
        "vision",
        root=("model.vision_tower.vision_model", "model.vision_tower"),
        config="vision_config",
        readout=Readout(finish="projector", normed=False),
        feature_layers="vision_feature_layer",
        feature_select="vision_feature_select_strategy",
    ),
    TowerSpec("language", root="model.language_model", config="text_config", readout=Readout(head="lm_head")),
)

for _name, _class, _layout in (
    ("llava", "LlavaForConditionalGeneration", "flat"),
    ("llava_next", "LlavaNextForConditionalGeneration", "anyres"),
    ("llava_onevision", "LlavaOnevisionForConditionalGeneration", "anyres"),
):
    register_family(
        Family(
            name=_name,
            classes=(_class,),
            output="logits",
            auto_class="AutoModelForImageTextToText",
            projector="model.multi_modal_projector",
            image_layout=_layout,  # type: ignore[arg-type]
            image_token=("image_token_id", "image_token_index"),
            towers=_TOWERS,
        )
    )
