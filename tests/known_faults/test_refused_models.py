"""Models whose structure the tables cannot say: refused with one clear error, instead of effects that come out as zero."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import UnsupportedModelError
from circuitvision.families.stacks import LLAMA
from circuitvision.model import inputs as input_checks
from circuitvision.model import packing, spec, stream
from circuitvision.model.flow import Connector
from circuitvision.model.spec import Family, NormSpec, Readout, TowerSpec
from tests.zoo import Case, parametrize, shared_model

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

pytestmark = pytest.mark.usefixtures("tables")


# ---- writers between blocks


def deepstack() -> nn.Module:
    torch.manual_seed(0)
    text = {
        **SIZES,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "intermediate_size": 24,
        "patch_size": 4,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)).eval()


def wrapped_deepstack(monkeypatch: pytest.MonkeyPatch) -> tuple[cv.HookedModel, dict[str, Tensor]]:
    monkeypatch.setattr(input_checks, "check", lambda model, inputs: None)
    spec.NORMS["Qwen3VLTextRMSNorm"] = NormSpec(eps="variance_epsilon", upcast=True)
    spec.register_stack(LLAMA, "qwen3_vl_text")
    tower = TowerSpec("language", root="model.language_model", config="text_config", readout=Readout(head="lm_head"))
    spec.register_family(
        Family(name="deep", classes=("Qwen3VLForConditionalGeneration",), output="logits", towers=(tower,))
    )
    ids = torch.tensor([[1, 62, 60, 60, 60, 60, 63, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 60).long()}
    torch.manual_seed(1)
    inputs |= {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return cv.HookedModel(deepstack()), inputs


def refused_calls(model: cv.HookedModel, inputs: dict[str, Tensor]) -> list[Any]:
    site = "language.blocks.0.hook_resid_post"
    return [
        lambda: model.run_with_cache(inputs, "language.blocks.2.hook_mlp_out"),
        lambda: model.run_with_hooks(inputs, [(site, lambda value, hook: value)]),
        lambda: model.sweep(inputs, [edits.ablate(site)], lambda logits: logits[:, -1, 0], progress=False),
        lambda: model(inputs),
    ]


def test_a_writer_between_blocks_is_refused_before_a_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wrapped_deepstack(monkeypatch)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = model.module(**text).logits
        out, _ = model.run_with_cache(text, "**.hook_resid_*")
        assert torch.equal(out, expected), "without pictures nothing is written"
        for call in refused_calls(model, inputs):
            with pytest.raises(UnsupportedModelError, match="language tower between blocks 0 and 1"):
                call()
    blocks = model.module.model.language_model.layers
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_the_site_is_what_the_block_reads_even_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: nobody watches. The names still hold what they say, and a sum over the stream is off."""
    monkeypatch.setattr(stream, "_same", lambda entering, left: True)
    model, inputs = wrapped_deepstack(monkeypatch)
    read: list[Tensor] = []
    block = model.module.model.language_model.layers[1]
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    handle.remove()
    assert torch.equal(cache["language", "resid_pre", 1], read[0])
    assert not torch.equal(cache["language", "resid_post", 0], read[0])
    off = (cache.decompose_resid("language", 1).sum(0) - cache["language", "resid_pre", 1]).abs().max()
    assert off > 1e-3


@parametrize()
def test_no_shipped_family_is_refused(case: Case) -> None:
    module = shared_model(case.name)
    with torch.no_grad():
        cv.HookedModel(module)(case.inputs(module, batch=2))


# ---- several backbones


class TwoEyesConfig(PretrainedConfig):
    model_type = "two_eyes"
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": ViTConfig,
        "vision_2_config": SiglipVisionConfig,
        "text_config": LlamaConfig,
    }

    def __init__(self, **kwargs: Any) -> None:
        sizes = {**SIZES, "image_size": 32, "patch_size": 8}
        self.vision_config = ViTConfig(**sizes)
        self.vision_2_config = SiglipVisionConfig(**sizes, vision_use_head=False)
        self.text_config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64, pad_token_id=0)
        self.image_token_id = 60
        super().__init__(**kwargs)


class Inner(nn.Module):
    def __init__(self, config: TwoEyesConfig) -> None:
        super().__init__()
        self.eye = ViTModel(config.vision_config, add_pooling_layer=False)
        self.eye2 = SiglipVisionModel(config.vision_2_config)
        self.projector = nn.Linear(64, 32)
        self.language_model = LlamaModel(config.text_config)


class TwoEyes(PreTrainedModel):
    config_class = TwoEyesConfig
    base_model_prefix = "model"

    def __init__(self, config: TwoEyesConfig) -> None:
        super().__init__(config)
        self.model = Inner(config)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Any = None, pixel_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        inner = self.model
        seen = [inner.eye(pixel_values).last_hidden_state[:, 1:], inner.eye2(pixel_values).last_hidden_state]
        embedded = inner.language_model.embed_tokens(input_ids)
        embedded = embedded.masked_scatter((input_ids == 60)[..., None], inner.projector(torch.cat(seen, -1)))
        out = inner.language_model(inputs_embeds=embedded, attention_mask=attention_mask)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state))


def two_eyes(*sources: str) -> None:
    connectors = (Connector(sources, "language", "model.projector"),) if sources else ()
    spec.register_family(
        Family(
            name="two_eyes",
            classes=("TwoEyes",),
            output="logits",
            connectors=connectors,
            packing=packing.Flat(),
            image_token=("image_token_id",),
            towers=(
                TowerSpec("vision", root="model.eye", config="vision_config", readout=Readout()),
                TowerSpec("vision_2", root="model.eye2", config="vision_2_config", readout=Readout()),
                TowerSpec(
                    "language", root="model.language_model", config="text_config", readout=Readout(head="lm_head")
                ),
            ),
        )
    )


@pytest.mark.parametrize(("sources", "lost"), [(("vision",), "vision_2"), (("vision_2",), "vision"), ((), "vision")])
def test_a_tower_that_leads_nowhere_is_refused_at_wrapping(sources: tuple[str, ...], lost: str) -> None:
    two_eyes(*sources)
    with pytest.raises(UnsupportedModelError, match=f"how its {lost} tower reaches language"):
        cv.HookedModel(TwoEyes(TwoEyesConfig()).eval())


def test_without_the_refusal_a_sweep_says_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitvision.model import layout

    monkeypatch.setattr(layout, "refuse_unread", lambda family, towers: None)
    two_eyes("vision")
    torch.manual_seed(0)
    model = cv.HookedModel(TwoEyes(TwoEyesConfig()).eval())
    ids = torch.tensor([[1] + [60] * 16 + [3, 4]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)}
    edit = edits.ablate("vision_2.blocks.0.hook_resid_post")
    with torch.no_grad():
        expected = model.run(inputs, [edit])[:, -1, 0] - model(inputs)[:, -1, 0]
        swept = model.sweep(inputs, [edit], lambda logits: logits[:, -1, 0], progress=False)
    assert expected.abs().max() > 1e-3
    assert not torch.allclose(swept.effect[0], expected, rtol=1e-3)


# ---- families of one's own


def test_what_is_registered_first_hides_nothing_shipped_and_is_not_undone() -> None:
    code = (
        "from circuitvision.model.spec import *\n"
        "register_family(Family(name='mine', classes=('MyModel',), output='logits', towers=(TowerSpec('vision'),)))\n"
        "register_stack(Stack(blocks='layers', block=None, final_norm=None, embed='e'), 'mine')\n"
        "llama = Stack(blocks='layers', block=None, final_norm=None, embed='mine')\n"
        "register_stack(llama, 'llama')\n"
        "from circuitvision.model import spec\n"
        "spec.load_tables()\n"
        "assert 'ViTForImageClassification' in spec.FAMILIES and 'MyModel' in spec.FAMILIES\n"
        "assert 'mine' in spec.STACKS and 'LayerNorm' in spec.NORMS\n"
        "assert spec.STACKS['llama'] is llama\n"
        "print('all')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "all\n", found.stderr
