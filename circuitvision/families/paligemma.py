"""PaliGemma 1 (Gemma) and 2 (Gemma 2): a SigLIP tower, a linear projector, a prefix-bidirectional language model."""

from __future__ import annotations

from circuitvision.model.flow import Connector
from circuitvision.model.packing import Flat
from circuitvision.model.spec import Family, Readout, TowerSpec, register_family

register_family(
    Family(
        name="paligemma",
        classes=("PaliGemmaForConditionalGeneration",),
        output="logits",
        auto_class="AutoModelForImageTextToText",
        connectors=(Connector(("vision",), "language", "model.multi_modal_projector"),),
        packing=Flat(),
        image_token=("image_token_id", "image_token_index"),
        towers=(
            TowerSpec(
                "vision",
                root=("model.vision_tower.vision_model", "model.vision_tower"),
                config="vision_config",
                readout=Readout(),
            ),
            TowerSpec(
                "language",
                root="model.language_model",
                config="text_config",
                attention="by_mask",
                runs="per_token",
                readout=Readout(head="lm_head", finish="softcap"),
            ),
        ),
    )
)
