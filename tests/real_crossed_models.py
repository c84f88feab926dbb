"""Vision towers and decoders that read them, for ``test_real_blocks.py``: gates, cross-attention, writers between blocks."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from circuitvision.families import (
    MLP,
    Attention,
    BlockLayout,
    Branch,
    Connector,
    Flat,
    Gate,
    Readout,
    Stack,
    TowerSpec,
    Writer,
)
from tests.real_blocks import HEADS, INNER, LAYERS, SIZES, WIDTH, Case, Place, Seen, gained, heads, times
from tests.real_text_models import GATED, decoder, gated_mlp, separate, split, stream

VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
PICTURE = {"image_size": 8, "patch_size": 4}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-2, 2, 2 * 3 * 64).sin().mul(3).reshape(2, 3, 8, 8)}


def both() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 2, 7], [4, 4, 9, 8]]), **pixels()}


# -- InternVL's vision tower: bare parameters behind both branches, norms of all heads together


def internvl() -> Case:
    sizes = {
        name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    config = transformers.InternVLVisionConfig(
        **sizes, image_size=[8, 8], patch_size=[4, 4], use_qk_norm=True, use_mean_pooling=False, norm_type="rms_norm"
    )
    three = {one: f"attention.{one}_proj" for one in "qkv"}
    attention = Attention(
        "attention", o="attention.projection_layer", q_norm="attention.q_norm", k_norm="attention.k_norm", **three
    )
    mlp = MLP("mlp", fc_in="mlp.fc1", fc_out="mlp.fc2")
    block = BlockLayout(
        (
            Branch(attention, norm="layernorm_before", then=(Gate("lambda_1"),)),
            Branch(mlp, norm="layernorm_after", then=(Gate("lambda_2"),)),
        )
    )

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.encoder.layer[layer]
        attn = block.attention
        own = gained(attn.q_norm)
        return {
            **stream(block, block.layernorm_after),
            **separate(attn, attn.projection_layer, HEADS),
            "attn.q_norm.hook_normalized": Place(
                attn.q_norm,
                take=lambda whole: own["take"](whole).unflatten(-1, (HEADS, -1)),
                put=lambda whole, value: own["put"](whole, value.flatten(-2)),
            ),
            "hook_attn_out": Place(attn, **times(lambda: block.lambda_1)),
            "mlp.hook_pre": Place(block.mlp.fc1),
            "mlp.hook_post": Place(block.mlp.fc2, "in"),
            "hook_mlp_out": Place(block.mlp, **times(lambda: block.lambda_2)),
        }

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        attn = module.encoder.layer[layer].attention
        return {"attn": Seen(attn, Place(attn.v_proj, **heads(HEADS)), attn.projection_layer)}

    return Case(
        build=lambda: transformers.InternVLVisionModel(config),
        stack=Stack(
            blocks="encoder.layer",
            block=block,
            final_norm="layernorm",
            embed="embeddings.patch_embeddings",
            embeddings="embeddings",
            prefix=("cls",),
            image=True,
        ),
        truth=truth,
        seen=seen,
        inputs=pixels,
        tower="vision",
        output="last_hidden_state",
        readout=Readout(),
    )


# -- decoders that attend to a ViT


class Reader(nn.Module):
    """A ViT, a projector, and a decoder that is handed what the projector makes of it."""

    def __init__(self, config: Any, text: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.vision = transformers.ViTModel(config.vision_config, add_pooling_layer=False)
        self.projector = nn.Linear(VISION["hidden_size"], WIDTH)
        self.text = text

    def seen(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.vision(pixel_values).last_hidden_state)


class ReaderConfig(transformers.ViTConfig):
    model_type = "reader"

    def __init__(self, text_config: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.vision_config = transformers.ViTConfig(**VISION, **PICTURE)
        self.text_config = text_config
        self.image_token_id = 10


EYE = TowerSpec("vision", root="vision", config="vision_config", readout=Readout())
CROSSED: dict[str, Any] = {"connectors": (Connector(("vision",), "language", "projector", via="cross"),)}
OF_TEXT = {"config": "text_config"}


class MllamaReader(Reader):
    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        states = self.seen(pixel_values)
        # Without a mask its cross-attention is causal under sdpa and not under eager attention.
        mask = states.new_zeros(len(states), 1, input_ids.shape[1], states.shape[1])
        found = self.text(input_ids, cross_attention_states=states, cross_attention_mask=mask, use_cache=False)
        return {"logits": found.logits}


def mllama() -> Case:
    sizes = {**SIZES, "vocab_size": 11}
    config = transformers.models.mllama.MllamaTextConfig(
        **sizes, num_key_value_heads=2, cross_attention_layers=[1], rope_theta=1e4
    )
    across = Attention(
        "cross_attn",
        o="cross_attn.o_proj",
        **{one: f"cross_attn.{one}_proj" for one in "qkv"},
        q_norm="cross_attn.q_norm",
        k_norm="cross_attn.k_norm",
        heads_first=True,
        keys_of="vision",
    )

    def layout(block: nn.Module) -> BlockLayout:
        if not hasattr(block, "cross_attn"):
            first = Branch(split("self_attn", "o_proj"), norm="input_layernorm")
            return BlockLayout((first, Branch(GATED, norm="post_attention_layernorm")))
        gates = [(Gate(f"cross_attn_{one}_gate", tanh=True),) for one in ("attn", "mlp")]
        first = Branch(across, norm="input_layernorm", then=gates[0], name="cross_attn")
        return BlockLayout((first, Branch(GATED, norm="post_attention_layernorm", then=gates[1])))

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.text.model.layers[layer]
        found = {**stream(block, block.post_attention_layernorm), **gated_mlp(block.mlp)}
        if layer != 1:
            attn = block.self_attn
            own = {"hook_attn_out": Place(attn.o_proj), "hook_mlp_out": Place(block.mlp)}
            return {**found, **separate(attn, attn.o_proj, 2), **own}
        attn = block.cross_attn
        parts = separate(attn, attn.o_proj, 2)
        return {
            **found,
            **{f"cross_{site}": place for site, place in parts.items()},
            "hook_cross_attn_out": Place(attn, **times(lambda: block.cross_attn_attn_gate.tanh())),
            "hook_mlp_out": Place(block.mlp, **times(lambda: block.cross_attn_mlp_gate.tanh())),
        }

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        block = module.text.model.layers[layer]
        name = "cross_attn" if layer == 1 else "attn"
        attn = block.cross_attn if layer == 1 else block.self_attn
        return {name: Seen(attn, Place(attn.v_proj, **heads(2)), attn.o_proj)}

    return Case(
        build=lambda: MllamaReader(
            ReaderConfig(config), transformers.models.mllama.modeling_mllama.MllamaForCausalLM(config)
        ),
        stack=decoder(layout),
        truth=truth,
        seen=seen,
        inputs=both,
        root="text.model",
        readout=Readout(head="text.lm_head"),
        others=(EYE,),
        options=CROSSED,
        of_tower=OF_TEXT,
    )


class WhisperReader(Reader):
    def __init__(self, config: Any, text: nn.Module) -> None:
        super().__init__(config, text)
        self.head = nn.Linear(WIDTH, SIZES["vocab_size"])

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        found = self.text(input_ids=input_ids, encoder_hidden_states=self.seen(pixel_values), use_cache=False)
        return {"logits": self.head(found.last_hidden_state)}


def whisper() -> Case:
    config = transformers.WhisperConfig(
        vocab_size=11,
        d_model=WIDTH,
        decoder_layers=LAYERS,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=INNER,
        encoder_attention_heads=HEADS,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        activation_function="gelu",
    )
    own, across = (
        Attention(name, o=f"{name}.out_proj", **{one: f"{name}.{one}_proj" for one in "qkv"}, keys_of=keys)
        for name, keys in (("self_attn", ""), ("encoder_attn", "vision"))
    )
    block = BlockLayout(
        (
            Branch(own, norm="self_attn_layer_norm"),
            Branch(across, norm="encoder_attn_layer_norm", name="cross_attn"),
            Branch(MLP("fc1", fc_in="fc1", fc_out="fc2", act="gelu"), norm="final_layer_norm"),
        )
    )

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.text.layers[layer]
        own, across = block.self_attn, block.encoder_attn
        return {
            **stream(block),
            **separate(own, own.out_proj, HEADS),
            **{f"cross_{site}": place for site, place in separate(across, across.out_proj, HEADS).items()},
            "hook_resid_mid": Place(block.encoder_attn_layer_norm, "skip"),
            "hook_resid_mid_cross_attn": Place(block.final_layer_norm, "skip"),
            "hook_attn_out": Place(own.out_proj),
            "hook_cross_attn_out": Place(across),
            "mlp.hook_pre": Place(block.fc1),
            "mlp.hook_post": Place(block.fc2, "in"),
            "hook_mlp_out": Place(block.fc2),
        }

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        block = module.text.layers[layer]
        parts = {"attn": block.self_attn, "cross_attn": block.encoder_attn}
        return {name: Seen(one, Place(one.v_proj, **heads(HEADS)), one.out_proj) for name, one in parts.items()}

    return Case(
        build=lambda: WhisperReader(
            ReaderConfig(config), transformers.models.whisper.modeling_whisper.WhisperDecoder(config)
        ),
        stack=decoder(block, "layer_norm"),
        truth=truth,
        seen=seen,
        inputs=both,
        root="text",
        readout=Readout(head="head"),
        others=(EYE,),
        options=CROSSED,
        of_tower={**OF_TEXT, "n_heads": "decoder_attention_heads"},
    )


# -- Qwen3-VL's language tower: features of the vision tower are added behind its first blocks


class DeepReader(Reader):
    def __init__(self, config: Any, text: nn.Module) -> None:
        super().__init__(config, text)
        self.deep = nn.ModuleList(nn.Linear(VISION["hidden_size"], WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, SIZES["vocab_size"])

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        found = self.vision(pixel_values, output_hidden_states=True)
        states = [
            self.projector(found.last_hidden_state),
            *(one(state) for one, state in zip(self.deep, found.hidden_states, strict=False)),
        ]
        features = [state[:, 1:].flatten(0, 1) for state in states]
        holds = input_ids == 10
        embeds = self.text.embed_tokens(input_ids)
        embeds = embeds.masked_scatter(holds[..., None], features[0])
        out = self.text(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            visual_pos_masks=holds,
            deepstack_visual_embeds=features[1:],
            use_cache=False,
        )
        return {"logits": self.head(out.last_hidden_state)}


def qwen3_vl() -> Case:
    config = transformers.models.qwen3_vl.Qwen3VLTextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
    )
    attention = split("self_attn", "o_proj", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    block = BlockLayout((Branch(attention, norm="input_layernorm"), Branch(GATED, norm="post_attention_layernorm")))

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.text.layers[layer]
        attn = block.self_attn
        found = {
            **stream(block, block.post_attention_layernorm),
            **separate(attn, attn.o_proj, 2),
            **gated_mlp(block.mlp),
            "attn.q_norm.hook_normalized": Place(attn.q_norm, **gained(attn.q_norm)),
            "hook_attn_out": Place(attn.o_proj),
            "hook_mlp_out": Place(block.mlp),
        }
        return {**found, "hook_deepstack": deep(module, layer)} if layer < 2 else found

    def deep(module: Any, layer: int) -> Place:
        """What is added behind a block, seen at the map that makes it: zero at the positions of words."""

        def take(whole: Tensor) -> Tensor:
            out = whole.new_zeros(2, 6, WIDTH)
            out[:, 1:5] = whole[:, 1:]
            return out

        def put(whole: Tensor, value: Tensor) -> Tensor:
            return torch.cat([whole[:, :1], value[:, 1:5]], 1)

        return Place(module.deep[layer], "out", take, put)

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        attn = module.text.layers[layer].self_attn
        return {"attn": Seen(attn, Place(attn.v_proj, **heads(2)), attn.o_proj)}

    return Case(
        build=lambda: DeepReader(
            ReaderConfig(config), transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel(config)
        ),
        stack=decoder(block, writers=(Writer("hook_deepstack", (0, 1)),)),
        truth=truth,
        seen=seen,
        inputs=lambda: {"input_ids": torch.tensor([[1, 10, 10, 10, 10, 7], [4, 10, 10, 10, 10, 8]]), **pixels()},
        root="text",
        readout=Readout(head="head"),
        others=(EYE,),
        options={
            "connectors": (Connector(("vision",), "language", "projector"),),
            "image_token": ("image_token_id",),
            "packing": Flat(),
        },
        of_tower=OF_TEXT,
    )


# -- T5's decoder: each branch is a module with its norm inside, keys and values of another tower, no scale of the scores


class T5Reader(Reader):
    def __init__(self, config: Any, text: nn.Module) -> None:
        super().__init__(config, text)
        self.head = nn.Linear(WIDTH, SIZES["vocab_size"], bias=False)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        found = self.text(input_ids=input_ids, encoder_hidden_states=self.seen(pixel_values), use_cache=False)
        return {"logits": self.head(found.last_hidden_state)}


def t5() -> Case:
    config = transformers.T5Config(
        vocab_size=11,
        d_model=WIDTH,
        d_kv=8,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        is_decoder=True,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    places = {"attn": "layer.0.SelfAttention", "cross_attn": "layer.1.EncDecAttention"}
    own, across = (
        Attention(
            path, o=f"{path}.o", **{one: f"{path}.{one}" for one in "qkv"}, keys_of="" if name == "attn" else "vision"
        )
        for name, path in places.items()
    )
    inner = "layer.2.DenseReluDense"
    mlp = MLP(inner, fc_in=f"{inner}.wi_1", gate=f"{inner}.wi_0", fc_out=f"{inner}.wo", act="gelu_new")
    block = BlockLayout(
        (
            Branch(own, norm="layer.0.layer_norm"),
            Branch(across, norm="layer.1.layer_norm", name="cross_attn"),
            Branch(mlp, norm="layer.2.layer_norm"),
        )
    )

    def truth(module: Any, layer: int) -> dict[str, Place]:
        block = module.text.block[layer]
        own, across, mlp = block.layer[0].SelfAttention, block.layer[1].EncDecAttention, block.layer[2].DenseReluDense
        found = {}
        for name, one in (("attn", own), ("cross_attn", across)):
            found |= {f"{name}.hook_{letter}": Place(getattr(one, letter), **heads(HEADS)) for letter in "qkv"}
            found |= {f"{name}.hook_z": Place(one.o, "in", **heads(HEADS)), f"hook_{name}_out": Place(one.o)}
        return {
            **stream(block),
            **found,
            "hook_resid_mid": Place(block.layer[0]),
            "hook_resid_mid_cross_attn": Place(block.layer[1]),
            "mlp.hook_pre": Place(mlp.wi_0),
            "mlp.hook_pre_linear": Place(mlp.wi_1),
            "mlp.hook_post": Place(mlp.wo, "in"),
            "hook_mlp_out": Place(mlp),
        }

    def seen(module: Any, layer: int) -> dict[str, Seen]:
        block = module.text.block[layer]
        parts = {"attn": block.layer[0].SelfAttention, "cross_attn": block.layer[1].EncDecAttention}
        return {name: Seen(one, Place(one.v, **heads(HEADS)), one.o) for name, one in parts.items()}

    return Case(
        build=lambda: T5Reader(ReaderConfig(config), transformers.models.t5.modeling_t5.T5Stack(config)),
        stack=Stack(
            blocks="block", block=block, final_norm="final_layer_norm", embed="embed_tokens", attention="causal"
        ),
        truth=truth,
        seen=seen,
        inputs=both,
        root="text",
        readout=Readout(head="head"),
        others=(EYE,),
        options=CROSSED,
        of_tower={**OF_TEXT, "n_heads": "num_heads"},
    )


CASES: dict[str, Case] = {
    "internvl": internvl(),
    "mllama": mllama(),
    "whisper": whisper(),
    "qwen3_vl": qwen3_vl(),
    "t5": t5(),
}
