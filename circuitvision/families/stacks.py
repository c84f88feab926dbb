"""Block layouts, stacks and norms shared by several families, keyed by the ``model_type`` of the config that builds them."""

from __future__ import annotations

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

VIT_BLOCK = BlockLayout(
    ln1="layernorm_before",
    attn="attention",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    o="attention.o_proj",
    ln2="layernorm_after",
    mlp="mlp",
    mlp_in="mlp.fc1",
    mlp_out="mlp.fc2",
)
CLIP_BLOCK = BlockLayout(
    ln1="layer_norm1",
    attn="self_attn",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.out_proj",
    ln2="layer_norm2",
    mlp="mlp",
    mlp_in="mlp.fc1",
    mlp_out="mlp.fc2",
)
_DINOV2: dict[str, Any] = {
    "ln1": "norm1",
    "attn": "attention",
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
    "attn_add": "layer_scale1",
    "ln2": "norm2",
    "mlp": "mlp",
    "mlp_add": "layer_scale2",
}
DINOV2_BLOCK = BlockLayout(**_DINOV2, mlp_in="mlp.fc1", mlp_out="mlp.fc2")
DINOV2_GATED_BLOCK = BlockLayout(
    **_DINOV2, mlp_gate="mlp.gate_proj", mlp_in="mlp.up_proj", mlp_out="mlp.down_proj", act="silu"
)
_LLAMA: dict[str, Any] = {
    "ln1": "input_layernorm",
    "attn": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp": "mlp",
    "mlp_gate": "mlp.gate_proj",
    "mlp_in": "mlp.up_proj",
    "mlp_out": "mlp.down_proj",
}
LLAMA_BLOCK = BlockLayout(**_LLAMA, ln2="post_attention_layernorm", rotary=True)
GEMMA2_BLOCK = BlockLayout(
    **_LLAMA,
    ln2="pre_feedforward_layernorm",
    attn_add="post_attention_layernorm",
    mlp_add="post_feedforward_layernorm",
    rotary=True,
)


def dinov2_block(block: nn.Module) -> BlockLayout:
    """The layout of one DINOv2 block: gated where the checkpoint uses SwiGLU."""
    return DINOV2_GATED_BLOCK if hasattr(block.mlp, "gate_proj") else DINOV2_BLOCK


VIT = register_stack(
    Stack(
        blocks="layers",
        block=VIT_BLOCK,
        final_norm="layernorm",
        embed="embeddings.patch_embeddings",
        embeddings="embeddings",
        position="grid",
        position_weight="position_embeddings",
        prefix=("cls",),
        image=True,
    ),
    "vit",
)
DEIT = register_stack(
    Stack(
        blocks="layers",
        block=VIT_BLOCK,
        final_norm="layernorm",
        embed="embeddings.patch_embeddings",
        embeddings="embeddings",
        position="grid",
        position_weight="position_embeddings",
        prefix=("cls", "distillation"),
        image=True,
    ),
    "deit",
)
DINOV2 = register_stack(
    Stack(
        blocks="encoder.layer",
        block=dinov2_block,
        final_norm="layernorm",
        embed="embeddings.patch_embeddings",
        embeddings="embeddings",
        position="grid_always",
        position_weight="position_embeddings",
        prefix=("cls", "register"),
        image=True,
    ),
    "dinov2",
    "dinov2_with_registers",
)
CLIP_VISION = register_stack(
    Stack(
        blocks="encoder.layers",
        block=CLIP_BLOCK,
        final_norm="post_layernorm",
        embed="embeddings.patch_embedding",
        embeddings="embeddings",
        position="grid",
        position_weight="position_embedding",
        prefix=("cls",),
        image=True,
    ),
    "clip_vision_model",
)
CLIP_TEXT = register_stack(
    Stack(
        blocks="encoder.layers",
        block=CLIP_BLOCK,
        final_norm="final_layer_norm",
        embed="embeddings.token_embedding",
        embeddings="embeddings",
        position="table",
        position_weight="position_embedding",
        attention="causal",
    ),
    "clip_text_model",
)
SIGLIP_VISION = register_stack(
    Stack(
        blocks="encoder.layers",
        block=CLIP_BLOCK,
        final_norm="post_layernorm",
        embed="embeddings.patch_embedding",
        embeddings="embeddings",
        position="grid",
        position_weight="position_embedding",
        image=True,
    ),
    "siglip_vision_model",
)
SIGLIP2_VISION = register_stack(
    Stack(
        blocks="encoder.layers",
        block=CLIP_BLOCK,
        final_norm="post_layernorm",
        embed="embeddings.patch_embedding",
        embeddings="embeddings",
        position="resized",
        position_weight="position_embedding",
        attention="by_mask",
        image=True,
    ),
    "siglip2_vision_model",
)
SIGLIP_TEXT = register_stack(
    Stack(
        blocks="encoder.layers",
        block=CLIP_BLOCK,
        final_norm="final_layer_norm",
        embed="embeddings.token_embedding",
        embeddings="embeddings",
        position="table",
        position_weight="position_embedding",
    ),
    "siglip_text_model",
    "siglip2_text_model",
)
LLAMA = register_stack(
    Stack(blocks="layers", block=LLAMA_BLOCK, final_norm="norm", embed="embed_tokens", attention="causal"),
    "llama",
    "mistral",
    "qwen2",
    "gemma",
)
GEMMA2 = register_stack(
    Stack(blocks="layers", block=GEMMA2_BLOCK, final_norm="norm", embed="embed_tokens", attention="causal"),
    "gemma2",
)
