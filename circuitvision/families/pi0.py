"""PI0: a PaliGemma prefix that runs once, and an action expert that reads its keys and values at every denoising step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.flow import Connector
from circuitvision.model.packing import Cameras
from circuitvision.model.spec import Family, Readout, TowerSpec, register_family, saved_settings


def load_processor(name: str) -> Any:
    """The PI0 processor of a folder, with SigLIP's Pillow image processor: PI0's own needs torchvision, which has no CPU build."""
    from transformers import AutoConfig, AutoTokenizer, PI0Processor, SiglipImageProcessorPil

    config: Any = AutoConfig.from_pretrained(name)
    vision = config.vlm_config.vision_config
    images: Any = SiglipImageProcessorPil.from_pretrained(name)
    images.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    return PI0Processor(image_processor=images, tokenizer=AutoTokenizer.from_pretrained(name), **saved_settings(name))


def drawn(config: Any, inputs: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """The noise and timestep of one flow-matching evaluation at ``t = 1``, drawn on the CPU so that every device agrees.

    Raises:
        InputError: the robot's state is missing.
    """
    state = inputs.get("state")
    if state is None:
        raise InputError(
            "This model reads the robot's state; give state=array [batch, state_dim], which the processor normalises, "
            "or a tensor that is normalised already."
        )
    shape = (state.shape[0], int(config.chunk_size), int(config.max_action_dim))
    noise = torch.randn(shape, generator=generator).to(state.device, state.dtype)
    return {"noise": noise, "timestep": torch.ones(state.shape[0], device=state.device)}


def suffix_kinds(config: Any) -> tuple[str, ...]:
    """The state, and one position for each action of the chunk."""
    return ("state", *["action"] * int(config.chunk_size))


register_family(
    Family(
        name="pi0",
        classes=("PI0ForConditionalGeneration",),
        output="logits",
        auto_class="PI0ForConditionalGeneration",
        connectors=(
            Connector(("vision",), "language", "model.vlm.multi_modal_projector"),
            Connector(("language",), "action", via="cache"),
        ),
        packing=Cameras(),
        image_token=("vlm_config.image_token_id", "vlm_config.image_token_index"),
        required=("noise", "timestep"),
        processor=load_processor,
        drawn=drawn,
        suffix_kinds=suffix_kinds,
        towers=(
            TowerSpec(
                "vision",
                root=("model.vlm.vision_tower.vision_model", "model.vlm.vision_tower"),
                config="vlm_config.vision_config",
                readout=Readout(),
            ),
            TowerSpec(
                "language",
                root="model.vlm.language_model",
                config="vlm_config.text_config",
                attention="bidirectional",
                readout=Readout(tied_lens="model.vlm.language_model.embed_tokens", reads=()),
            ),
            TowerSpec(
                "action",
                root="model.dit",
                config="dit_config",
                attention="by_mask",
                runs="per_denoising_step",
                embed="embed_action_time",
                readout=Readout(pool="chunk", head="action_out_proj", reads=("action",)),
            ),
        ),
    )
)
