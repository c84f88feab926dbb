"""Block layouts, stacks and norms shared by several families, keyed by the ``model_type`` of the config that builds them."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from circuitvision.model.block_layout import MLP, Attention, BlockLayout, Branch
from circuitvision.model.spec import NORMS, NormSpec, Stack, register_stack

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


def _attention(module: str, output: str, rotary: bool = False) -> Attention:
    """The attention module at a path, with projections of the names all these models use."""
    q, k, v = (f"{module}.{part}_proj" for part in "qkv")
    return Attention(module, q=q, k=k, v=v, o=f"{module}.{output}", rotary=rotary)


def _block(attention: Attention, ln1: str, mlp: MLP, ln2: str, attn_then: str = "", mlp_then: str = "") -> BlockLayout:
    """A pre-norm block; ``attn_then`` and ``mlp_then`` are what follows its branches."""
    return BlockLayout(
        (
            Branch(attention, norm=ln1, then=(attn_then,) if attn_then else ()),
            Branch(mlp, norm=ln2, then=(mlp_then,) if mlp_then else ()),
        )
    )


_TWO_LAYERS = MLP("mlp", fc_in="mlp.fc1", fc_out="mlp.fc2")
_UP_DOWN = MLP("mlp", fc_in="mlp.up_proj", fc_out="mlp.down_proj")
_GATED = replace(_UP_DOWN, gate="mlp.gate_proj")
_LLAMA_ATTENTION = _attention("self_attn", "o_proj", rotary=True)
_SCALES = ("layer_scale1", "layer_scale2")

VIT_BLOCK = _block(_attention("attention", "o_proj"), "layernorm_before", _TWO_LAYERS, "layernorm_after")
CLIP_BLOCK = _block(_attention("self_attn", "out_proj"), "layer_norm1", _TWO_LAYERS, "layer_norm2")
DINOV2_BLOCK = _block(_attention("attention", "o_proj"), "norm1", _TWO_LAYERS, "norm2", *_SCALES)
DINOV2_GATED_BLOCK = _block(_attention("attention", "o_proj"), "norm1", replace(_GATED, act="silu"), "norm2", *_SCALES)
DINOV3_BLOCK = _block(_attention("attention", "o_proj", rotary=True), "norm1", _UP_DOWN, "norm2", *_SCALES)
DINOV3_GATED_BLOCK = _block(_attention("attention", "o_proj", rotary=True), "norm1", _GATED, "norm2", *_SCALES)
LLAMA_BLOCK = _block(_LLAMA_ATTENTION, "input_layernorm", _GATED, "post_attention_layernorm")
GEMMA2_BLOCK = _block(
    _LLAMA_ATTENTION,
    "input_layernorm",
    _GATED,
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
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
