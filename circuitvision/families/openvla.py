"""OpenVLA: two vision backbones behind one projector, both read at the second-to-last block, and a causal language model whose tokens are actions."""

from __future__ import annotations

from typing import Any

from circuitvision.model.flow import Connector
from circuitvision.model.packing import Inserted
from circuitvision.model.spec import Family, Readout, TowerSpec, register_family


def own_class() -> Any:
    """The module made of transformers' parts."""
    from circuitvision.openvla import OpenVLAForActionPrediction

    return OpenVLAForActionPrediction


def load_processor(name: str) -> Any:
    """The processor of a folder, made with Pillow: the released one is remote code that needs torchvision and timm."""
    from circuitvision.openvla import OpenVLAProcessor

    return OpenVLAProcessor.from_pretrained(name)


def action_values(config: Any) -> dict[int, float]:
    """The bins of actions, by id."""
    from circuitvision.openvla import ActionTokens

    tokens = ActionTokens.of(config)
    return dict(zip(tokens.ids, tokens.values(tokens.ids).tolist(), strict=True))


def act(model: Any, inputs: Any, edits: Any, **options: Any) -> Any:
    """Greedy actions as a chunk of one step, in the units of a data set (``unnorm_key=``, where the model knows several)."""
    import torch

    from circuitvision.openvla import predict_action

    return torch.from_numpy(predict_action(model, inputs, edits=edits, **options))[:, None]


register_family(
    Family(
        name="openvla",
        classes=("OpenVLAForActionPrediction",),
        output="logits",
        connectors=(Connector(("vision", "vision_2"), "language", "projector"),),
        packing=Inserted(),
        image_token=("image_token_id",),
        processor=load_processor,
        own_class=own_class,
        action_values=action_values,
        act=act,
        towers=(
            TowerSpec(
                "vision", root="vision", config="vision_config", readout=Readout(normed=False), feature_layers=-2
            ),
            TowerSpec(
                "vision_2", root="vision_2", config="vision_2_config", readout=Readout(normed=False), feature_layers=-2
            ),
            TowerSpec(
                "language",
                root="language_model.model",
                config="text_config",
                runs="per_token",
                readout=Readout(head="language_model.lm_head"),
            ),
        ),
    )
)
