"""Block layouts, stacks and norms shared by several families, keyed by the ``model_type`` of the config that builds them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from circuitvision.model.spec import NORMS, BlockLayout, NormSpec, Stack, register_stack

NORMS.update(
    {
        "LayerNorm": NormSpec(eps="eps", centred=True),
        "LlamaRMSNorm": NormSpec(eps="variance_epsilon", upcast=True),
        "MistralRMSNorm": NormSpec(eps="variance_epsilon", upcast=True),
        "Qwen2RMSNorm": NormSpec(eps="variance_epsilon", upcast=True),
        "GemmaRMSNorm": NormSpec(eps="eps", offset=1.0, upcast=True, gain_upcast=True),
        "Gemma2RMSNorm": NormSpec(eps="eps", offset=1.0, upcast=True, gain_upcast=True),
    }
)


def _separate(attention: str, output: str) -> dict[str, Any]:
    """The attention module at ``attention``, with projections of the names all these models use."""
    return {"attn": attention, "o": f"{attention}.{output}", **{part: f"{attention}.{part}_proj" for part in "qkv"}}


_TWO_LAYERS: dict[str, Any] = {"mlp": "mlp", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
_GATED: dict[str, Any] = {
    "mlp": "mlp",
    "mlp_gate": "mlp.gate_proj",
    "mlp_in": "mlp.up_proj",
    "mlp_out": "mlp.down_proj",
}

VIT_BLOCK = BlockLayout(
    ln1="layernorm_before", **_separate("attention", "o_proj"), ln2="layernorm_after", **_TWO_LAYERS
)
CLIP_BLOCK = BlockLayout(ln1="layer_norm1", **_separate("self_attn", "out_proj"), ln2="layer_norm2", **_TWO_LAYERS)
DINOV2_BLOCK = BlockLayout(
    ln1="norm1",
    **_separate("attention", "o_proj"),
    attn_add="layer_scale1",
    ln2="norm2",
    **_TWO_LAYERS,
    mlp_add="layer_scale2",
)
DINOV2_GATED_BLOCK = replace(DINOV2_BLOCK, **_GATED, act="silu")
LLAMA_BLOCK = BlockLayout(
    ln1="input_layernorm",
    **_separate("self_attn", "o_proj"),
    ln2="post_attention_layernorm",
    **_GATED,
    rotary=True,
)
DINOV3_BLOCK = replace(DINOV2_BLOCK, mlp_in="mlp.up_proj", mlp_out="mlp.down_proj", rotary=True)
DINOV3_GATED_BLOCK = replace(DINOV3_BLOCK, mlp_gate="mlp.gate_proj")
GEMMA2_BLOCK = replace(
    LLAMA_BLOCK,
    ln2="pre_feedforward_layernorm",
    attn_add="post_attention_layernorm",
    mlp_add="post_feedforward_layernorm",
)


def dinov2_block(block: nn.Module) -> BlockLayout:
    """The layout of one DINOv2 block: gated where the checkpoint uses SwiGLU."""
    return DINOV2_GATED_BLOCK if hasattr(block.mlp, "gate_proj") else DINOV2_BLOCK


def dinov3_block(block: nn.Module) -> BlockLayout:
    """The layout of one DINOv3 block: gated in its largest checkpoint."""
    return DINOV3_GATED_BLOCK if hasattr(block.mlp, "gate_proj") else DINOV3_BLOCK


VIT = Stack(
    blocks="layers",
    block=VIT_BLOCK,
    final_norm="layernorm",
    embed="embeddings.patch_embeddings",
    embeddings="embeddings",
    position="grid",
    position_weight="position_embeddings",
    prefix=("cls",),
    image=True,
)
DEIT = replace(VIT, prefix=("cls", "distillation"))
DINOV2 = replace(VIT, blocks="encoder.layer", block=dinov2_block, position="grid_always", prefix=("cls", "register"))
DINOV3 = Stack(
    blocks="model.layer",
    block=dinov3_block,
    final_norm="norm",
    embed="embeddings.patch_embeddings",
    embeddings="embeddings",
    position="rotary",
    prefix=("cls", "register"),
    image=True,
)
CLIP_VISION = Stack(
    blocks="encoder.layers",
    block=CLIP_BLOCK,
    final_norm="post_layernorm",
    embed="embeddings.patch_embedding",
    embeddings="embeddings",
    position="grid",
    position_weight="position_embedding",
    prefix=("cls",),
    image=True,
)
SIGLIP_VISION = replace(CLIP_VISION, prefix=())
SIGLIP2_VISION = replace(SIGLIP_VISION, position="resized", attention="by_mask")
SIGLIP_TEXT = Stack(
    blocks="encoder.layers",
    block=CLIP_BLOCK,
    final_norm="final_layer_norm",
    embed="embeddings.token_embedding",
    embeddings="embeddings",
    position="table",
    position_weight="position_embedding",
)
CLIP_TEXT = replace(SIGLIP_TEXT, attention="causal")
LLAMA = Stack(blocks="layers", block=LLAMA_BLOCK, final_norm="norm", embed="embed_tokens", attention="causal")
GEMMA2 = replace(LLAMA, block=GEMMA2_BLOCK)

register_stack(VIT, "vit")
register_stack(DEIT, "deit")
register_stack(DINOV2, "dinov2", "dinov2_with_registers")
register_stack(DINOV3, "dinov3_vit")
register_stack(CLIP_VISION, "clip_vision_model", "metaclip_2_vision_model")
register_stack(CLIP_TEXT, "clip_text_model", "metaclip_2_text_model")
register_stack(SIGLIP_VISION, "siglip_vision_model")
register_stack(SIGLIP2_VISION, "siglip2_vision_model")
register_stack(SIGLIP_TEXT, "siglip_text_model", "siglip2_text_model")
register_stack(LLAMA, "llama", "mistral", "qwen2", "gemma")
register_stack(GEMMA2, "gemma2")
