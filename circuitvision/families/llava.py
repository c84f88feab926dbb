"""LLaVA 1.5, LLaVA-NeXT, LLaVA-OneVision: a vision tower read at a feature layer, a projector, a causal language model."""

from __future__ import annotations

from typing import Any

from circuitvision.model.flow import Connector
from circuitvision.model.packing import AnyRes, Flat
from circuitvision.model.spec import Family, Readout, TowerSpec, register_family, saved_settings


def load_onevision_processor(name: str) -> Any:
    """The OneVision processor of a folder; without torchvision, one that leaves videos out (its video processor needs torchvision)."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaOnevisionProcessor

    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ImportError, ValueError, AttributeError):
        images, tokenizer = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    class ImagesOnly(LlavaOnevisionProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    config: Any = AutoConfig.from_pretrained(name)
    settings = {
        "num_image_tokens": (config.vision_config.image_size // config.vision_config.patch_size) ** 2,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
        **saved_settings(name),
    }
    return ImagesOnly(image_processor=images, tokenizer=tokenizer, **settings)


_TOWERS = (
    TowerSpec(
        "vision",
        root=("model.vision_tower.vision_model", "model.vision_tower"),
        config="vision_config",
        readout=Readout(normed=False),
        feature_layers="vision_feature_layer",
        feature_select="vision_feature_select_strategy",
    ),
    TowerSpec(
        "language",
        root="model.language_model",
        config="text_config",
        runs="per_token",
        readout=Readout(head="lm_head"),
    ),
)

for _name, _class, _packing in (
    ("llava", "LlavaForConditionalGeneration", Flat()),
    ("llava_next", "LlavaNextForConditionalGeneration", AnyRes()),
    ("llava_onevision", "LlavaOnevisionForConditionalGeneration", AnyRes()),
):
    register_family(
        Family(
            name=_name,
            classes=(_class,),
            output="logits",
            auto_class="AutoModelForImageTextToText",
            connectors=(Connector(("vision",), "language", "model.multi_modal_projector"),),
            packing=_packing,
            image_token=("image_token_id", "image_token_index"),
            processor=load_onevision_processor if _name == "llava_onevision" else None,
            towers=_TOWERS,
        )
    )
