"""Language models of transformers for ``test_real_blocks.py``: packed projections, parallel blocks, norms of heads, sandwiches, post-norm."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from circuitvision.families import MLP, Attention, BlockLayout, Branch, Fused, NormSpec, Readout, Stack, register_norm
from tests.real_blocks import HEADS, INNER, SIZES, WIDTH, Case, Place, Seen, gained, heads, ids, share

D_HEAD = WIDTH // HEADS
GEMMA = NormSpec("eps", offset=1.0, upcast=True, gain_upcast=True)


def register_norms() -> None:
    register_norm(
        NormSpec("variance_epsilon", upcast=True),
        "Phi3RMSNorm",
        "Qwen3RMSNorm",
        "Qwen3VLTextRMSNorm",
        "MllamaTextRMSNorm",
    )
    register_norm(NormSpec("variance_epsilon", upcast=True), "InternVLVisionRMSNorm", "T5LayerNorm")
    register_norm(NormSpec("variance_epsilon", upcast=True, gain_upcast=True), "Olmo2RMSNorm")
    register_norm(NormSpec("variance_epsilon", centred=True, upcast=True, gain_upcast=True), "CohereLayerNorm")
    register_norm(GEMMA, "Gemma3RMSNorm")


def split(attention: str, o: str, **more: Any) -> Attention:
    q, k, v = (f"{attention}.{letter}_proj" for letter in "qkv")
    return Attention(attention, q=q, k=k, v=v, o=f"{attention}.{o}", rotary=True, **more)


GATED = MLP("mlp", fc_in="mlp.up_proj", fc_out="mlp.down_proj", gate="mlp.gate_proj")


def decoder(block: BlockLayout, norm: str = "norm", embed: str = "embed_tokens", **more: Any) -> Stack:
    return Stack(blocks="layers", block=block, final_norm=norm, embed=embed, attention="causal", **more)


def stream(block: nn.Module, second: nn.Module | None = None) -> dict[str, Place]:
    found = {"hook_resid_pre": Place(block, "in"), "hook_resid_post": Place(block)}
    return (
        found
        if second is None
        else {**found, "hook_resid_mid": Place(second, "skip"), "hook_mlp_in": Place(second, "in")}
    )


def gated_mlp(mlp: Any) -> dict[str, Place]:
    return {
        "mlp.hook_pre": Place(mlp.gate_proj),
        "mlp.hook_pre_linear": Place(mlp.up_proj),
        "mlp.hook_post": Place(mlp.down_proj, "in"),
    }


def separate(attention: Any, o: Any, n_kv: int) -> dict[str, Place]:
    counts = {"q": HEADS, "k": n_kv, "v": n_kv}
    found = {f"attn.hook_{one}": Place(getattr(attention, f"{one}_proj"), **heads(n)) for one, n in counts.items()}
    return {**found, "attn.hook_z": Place(o, "in", **heads(HEADS))}


# -- GPT-NeoX: a fused projection head by head, branches side by side or one behind the other


def neox(parallel: bool) -> Case:
    config = transformers.GPTNeoXConfig(
        **SIZES, use_parallel_residual=parallel, rotary_pct=0.5, tie_word_embeddings=False
    )
    attention = Attention(
        "attention", o="attention.dense", qkv=Fused("attention.query_key_value", "groups"), rotary=True
    )
    mlp = MLP("mlp", fc_in="mlp.dense_h_to_4h", fc_out="mlp.dense_4h_to_h")
    branches = (Branch(attention, norm="input_layernorm"), Branch(mlp, norm="post_attention_layernorm"))

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.gpt_neox.layers[layer]
        found = stream(block, None if parallel else block.post_attention_layernorm)
        for number, one in enumerate("qkv"):
            columns = [h * 3 * D_HEAD + number * D_HEAD + i for h in range(HEADS) for i in range(D_HEAD)]
            found[f"attn.hook_{one}"] = Place(block.attention.query_key_value, **share(columns, HEADS))
        return {
            **found,
            "ln1.hook_normalized": Place(block.input_layernorm, **gained(block.input_layernorm)),
            "ln2.hook_normalized": Place(block.post_attention_layernorm, **gained(block.post_attention_layernorm)),
            "attn.hook_z": Place(block.attention.dense, "in", **heads(HEADS)),
            "hook_attn_out": Place(block.attention.dense),
            "mlp.hook_pre": Place(block.mlp.dense_h_to_4h),
            "mlp.hook_post": Place(block.mlp.dense_4h_to_h, "in"),
            "hook_mlp_out": Place(block.mlp.dense_4h_to_h),
        }

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        attn = module.gpt_neox.layers[layer].attention
        return {"attn": Seen(attn, truth(module, layer)["attn.hook_v"], attn.dense)}

    return Case(
        build=lambda: transformers.GPTNeoXForCausalLM(config),
        stack=decoder(BlockLayout(branches, parallel=parallel), "final_layer_norm", "embed_in"),
        truth=truth,
        seen=seen,
        inputs=ids,
        root="gpt_neox",
    )


# -- Phi-3: queries, keys and values packed, gate and input packed


def phi3() -> Case:
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2)
    attention = Attention("self_attn", o="self_attn.o_proj", qkv=Fused("self_attn.qkv_proj"), rotary=True)
    mlp = MLP("mlp", fc_out="mlp.down_proj", fused=Fused("mlp.gate_up_proj", "gate_in"))
    block = BlockLayout((Branch(attention, norm="input_layernorm"), Branch(mlp, norm="post_attention_layernorm")))

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.model.layers[layer]
        places = {"q": (0, HEADS), "k": (WIDTH, 2), "v": (WIDTH + 2 * D_HEAD, 2)}
        found = {
            f"attn.hook_{one}": Place(block.self_attn.qkv_proj, **share(list(range(at, at + n * D_HEAD)), n))
            for one, (at, n) in places.items()
        }
        return {
            **stream(block, block.post_attention_layernorm),
            **found,
            "ln1.hook_normalized": Place(block.input_layernorm, **gained(block.input_layernorm)),
            "attn.hook_z": Place(block.self_attn.o_proj, "in", **heads(HEADS)),
            "hook_attn_out": Place(block.self_attn.o_proj),
            "mlp.hook_pre": Place(block.mlp.gate_up_proj, **share(list(range(INNER)))),
            "mlp.hook_pre_linear": Place(block.mlp.gate_up_proj, **share(list(range(INNER, 2 * INNER)))),
            "mlp.hook_post": Place(block.mlp.down_proj, "in"),
            "hook_mlp_out": Place(block.mlp),
        }

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        attn = module.model.layers[layer].self_attn
        return {"attn": Seen(attn, truth(module, layer)["attn.hook_v"], attn.o_proj)}

    return Case(lambda: transformers.Phi3ForCausalLM(config), decoder(block), truth, seen, ids, root="model")


# -- Cohere and Phi: parallel branches that share a norm, norms of heads


def cohere() -> Case:
    sizes = {**SIZES, "logit_scale": 1.0}
    config = transformers.CohereConfig(**sizes, num_key_value_heads=2, use_qk_norm=True, tie_word_embeddings=False)
    attention = split("self_attn", "o_proj", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    block = BlockLayout(
        (Branch(attention, norm="input_layernorm"), Branch(GATED, norm="input_layernorm")), parallel=True
    )

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.model.layers[layer]
        attn = block.self_attn
        return {
            **stream(block),
            **separate(attn, attn.o_proj, 2),
            **gated_mlp(block.mlp),
            "attn.q_norm.hook_normalized": Place(attn.q_norm, **gained(attn.q_norm)),
            "attn.k_norm.hook_normalized": Place(attn.k_norm, **gained(attn.k_norm)),
            "hook_attn_out": Place(attn.o_proj),
            "hook_mlp_out": Place(block.mlp),
        }

    return Case(lambda: transformers.CohereForCausalLM(config), decoder(block), truth, of_self_attn, ids, root="model")


def of_self_attn(module: Any, layer: int) -> dict[str, Seen]:
    attn = module.model.layers[layer].self_attn
    o = attn.dense if hasattr(attn, "dense") else attn.o_proj
    return {"attn": Seen(attn, Place(attn.v_proj, **heads(attn.v_proj.out_features // D_HEAD)), o)}


def phi() -> Case:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2 / 3}
    config = transformers.PhiConfig(
        **SIZES, num_key_value_heads=2, qk_layernorm=True, tie_word_embeddings=False, rope_parameters=rope
    )
    norms = {"q_norm": "self_attn.q_layernorm", "k_norm": "self_attn.k_layernorm"}
    attention = split("self_attn", "dense", **norms, heads_first=True)
    mlp = MLP("mlp", fc_in="mlp.fc1", fc_out="mlp.fc2")
    block = BlockLayout((Branch(attention, norm="input_layernorm"), Branch(mlp, norm="input_layernorm")), parallel=True)

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.model.layers[layer]
        attn = block.self_attn
        return {
            **stream(block),
            **separate(attn, attn.dense, 2),
            "attn.q_norm.hook_normalized": Place(attn.q_layernorm, **first(gained(attn.q_layernorm))),
            "attn.k_norm.hook_normalized": Place(attn.k_layernorm, **first(gained(attn.k_layernorm))),
            "hook_attn_out": Place(attn.dense),
            "mlp.hook_pre": Place(block.mlp.fc1),
            "mlp.hook_post": Place(block.mlp.fc2, "in"),
            "hook_mlp_out": Place(block.mlp),
        }

    return Case(
        lambda: transformers.PhiForCausalLM(config),
        decoder(block, "final_layernorm"),
        truth,
        of_self_attn,
        ids,
        root="model",
    )


def first(norm: dict[str, Any]) -> dict[str, Any]:
    """A norm that sees ``[row head pos d_head]``."""
    return {
        "take": lambda whole: norm["take"](whole).transpose(1, 2),
        "put": lambda whole, value: norm["put"](whole, value.transpose(1, 2)),
    }


# -- Qwen3, Gemma 3, OLMo 2: norms of heads before the rotation, norms behind branches


def qwen3() -> Case:
    config = transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)
    attention = split("self_attn", "o_proj", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    block = BlockLayout((Branch(attention, norm="input_layernorm"), Branch(GATED, norm="post_attention_layernorm")))

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.model.layers[layer]
        attn = block.self_attn
        return {
            **stream(block, block.post_attention_layernorm),
            **separate(attn, attn.o_proj, 2),
            **gated_mlp(block.mlp),
            "attn.q_norm.hook_normalized": Place(attn.q_norm, **gained(attn.q_norm)),
            "attn.k_norm.hook_normalized": Place(attn.k_norm, **gained(attn.k_norm)),
            "hook_attn_out": Place(attn.o_proj),
            "hook_mlp_out": Place(block.mlp),
        }

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        attn = module.model.layers[layer].self_attn
        return {"attn": Seen(attn, Place(attn.v_proj, **heads(2)), attn.o_proj)}

    return Case(lambda: transformers.Qwen3ForCausalLM(config), decoder(block), truth, seen, ids, root="model")


def gemma3() -> Case:
    config = transformers.Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=3,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
    )
    attention = split("self_attn", "o_proj", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", heads_first=True)
    block = BlockLayout(
        (
            Branch(attention, norm="input_layernorm", then=("post_attention_layernorm",)),
            Branch(GATED, norm="pre_feedforward_layernorm", then=("post_feedforward_layernorm",)),
        )
    )

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.model.layers[layer]
        attn, one = block.self_attn, lambda norm: gained(norm, 1.0)
        return {
            **stream(block, block.pre_feedforward_layernorm),
            **separate(attn, attn.o_proj, 2),
            **gated_mlp(block.mlp),
            "attn.q_norm.hook_normalized": Place(attn.q_norm, **first(one(attn.q_norm))),
            "attn.k_norm.hook_normalized": Place(attn.k_norm, **first(one(attn.k_norm))),
            "ln1_post.hook_normalized": Place(block.post_attention_layernorm, **one(block.post_attention_layernorm)),
            "hook_attn_out": Place(block.post_attention_layernorm),
            "hook_mlp_out": Place(block.post_feedforward_layernorm),
        }

    return Case(lambda: transformers.Gemma3ForCausalLM(config), decoder(block), truth, of_self_attn, ids, root="model")


def olmo2() -> Case:
    config = transformers.Olmo2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    attention = split("self_attn", "o_proj", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    block = BlockLayout(
        (Branch(attention, then=("post_attention_layernorm",)), Branch(GATED, then=("post_feedforward_layernorm",)))
    )

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.model.layers[layer]
        attn = block.self_attn
        found = {}
        for one, n in {"q": HEADS, "k": 2}.items():
            norm = getattr(attn, f"{one}_norm")
            own = gained(norm)
            found[f"attn.{one}_norm.hook_normalized"] = Place(
                norm,
                take=lambda whole, own=own, n=n: own["take"](whole).unflatten(-1, (n, -1)),
                put=lambda whole, value, own=own: own["put"](whole, value.flatten(-2)),
            )
        return {
            **stream(block, block.mlp),
            **separate(attn, attn.o_proj, 2),
            **gated_mlp(block.mlp),
            **found,
            "ln2_post.hook_normalized": Place(
                block.post_feedforward_layernorm, **gained(block.post_feedforward_layernorm)
            ),
            "hook_attn_out": Place(block.post_attention_layernorm),
            "hook_mlp_out": Place(block.post_feedforward_layernorm),
        }

    return Case(lambda: transformers.Olmo2ForCausalLM(config), decoder(block), truth, of_self_attn, ids, root="model")


# -- BERT: the sum is normalised, and no module holds the whole MLP


def bert() -> Case:
    config = transformers.BertConfig(**SIZES)
    three = {one: f"attention.self.{word}" for one, word in zip("qkv", ("query", "key", "value"), strict=True)}
    attention = Attention("attention.self", o="attention.output.dense", **three)
    mlp = MLP("intermediate", fc_in="intermediate.dense", fc_out="output.dense")
    block = BlockLayout(
        (Branch(attention, sum_norm="attention.output.LayerNorm"), Branch(mlp, sum_norm="output.LayerNorm"))
    )

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.encoder.layer[layer]
        attn, after = block.attention.self, block.attention.output
        return {
            **stream(block),
            **{f"attn.hook_{one}": Place(getattr(attn, three[one].split(".")[-1]), **heads(HEADS)) for one in "qkv"},
            "attn.hook_z": Place(after.dense, "in", **heads(HEADS)),
            "hook_attn_out": Place(after.dense),
            "ln1.hook_in": Place(after.LayerNorm, "in"),
            "ln1.hook_normalized": Place(after.LayerNorm, **gained(after.LayerNorm)),
            "hook_resid_mid": Place(after.LayerNorm),
            "hook_mlp_in": Place(block.intermediate, "in"),
            "mlp.hook_pre": Place(block.intermediate.dense),
            "mlp.hook_post": Place(block.output.dense, "in"),
            "hook_mlp_out": Place(block.output.dense),
            "ln2.hook_in": Place(block.output.LayerNorm, "in"),
        }

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        attn = module.encoder.layer[layer].attention
        return {"attn": Seen(attn.self, Place(attn.self.value, **heads(HEADS)), attn.output.dense)}

    return Case(
        build=lambda: transformers.BertModel(config, add_pooling_layer=False),
        stack=Stack(
            blocks="encoder.layer",
            block=block,
            final_norm=None,
            embed="embeddings.word_embeddings",
            embeddings="embeddings",
        ),
        truth=truth,
        seen=seen,
        inputs=ids,
        tower="text",
        output="last_hidden_state",
        readout=Readout(),
    )


TEXT: dict[str, Case] = {
    "gpt_neox parallel": neox(True),
    "gpt_neox": neox(False),
    "phi3": phi3(),
    "cohere": cohere(),
    "phi": phi(),
    "qwen3": qwen3(),
    "gemma3": gemma3(),
    "olmo2": olmo2(),
    "bert": bert(),
}
