"""Tiny random models of sizes that the zoo does not hold, and inputs of uneven kind for them.

What is drawn on purpose: pictures that are no multiple of the patch, non-square pictures and patches, one key/value head for five, head sizes that
are not ``d_model / n_heads``, decoders that mix sliding and full attention, texts of other lengths on either side, prompts with several images and
with none of another's number, absent cameras, NaFlex grids of one row.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.text import BOS, EOS, IMAGE, PAD, pad_rows, words
from tests.zoo.weights import generator_for, randomise

VOCABULARY = 67
SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, **SPECIAL}


def _decoder(
    kind: str, width: int, layers: int, heads: int, kv: int, size: int, mlp: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "intermediate_size": mlp,
        **TEXT,
        **more,
    }


ONE_KV = _decoder("llama", 25, 3, 5, 1, 6, 23)
SLIDING = _decoder("mistral", 18, 3, 6, 2, 4, 31, sliding_window=7)
MIXED = _decoder("qwen2", 27, 4, 3, 1, 10, 19, use_sliding_window=True, sliding_window=5, max_window_layers=2) | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
}
CAPPED = _decoder(
    "gemma2",
    24,
    4,
    6,
    3,
    8,
    26,
    query_pre_attn_scalar=11,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=4.0,
    sliding_window=6,
)
PREFIX = _decoder("gemma", 25, 3, 5, 1, 8, 17)
EXPERT = _decoder("gemma", 18, 3, 2, 1, 8, 29)


def _tower(
    kind: str, width: int, layers: int, heads: int, mlp: int, side: int, patch: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "image_size": side,
        "patch_size": patch,
        **more,
    }


CLIP_EYE = _tower("clip_vision_model", 14, 4, 2, 33, 17, 5, hidden_act="quick_gelu")
SIGLIP_EYE = _tower("siglip_vision_model", 22, 3, 11, 13, 19, 6, vision_use_head=False)


def _labels(count: int) -> dict[str, Any]:
    return {"id2label": {i: f"c{i}" for i in range(count)}, "label2id": {f"c{i}": i for i in range(count)}}


def _vlm(cls: str, kind: str, vision: dict[str, Any], text: dict[str, Any], **more: Any) -> Any:
    config = tf.AutoConfig.for_model(kind, vision_config=dict(vision), text_config=dict(text), **more)
    return getattr(tf, cls)(config)


def _pinpoints(side: int) -> list[list[int]]:
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [side, 3 * side], [3 * side, side]]


def _vit() -> Any:
    sizes = {"hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 27}
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=(23, 15), patch_size=4, **sizes, **_labels(7)))


def _deit() -> Any:
    sizes = {"hidden_size": 33, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 14}
    return tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(image_size=18, patch_size=6, **sizes, **_labels(4)))


def _dinov2() -> Any:
    sizes = {"hidden_size": 28, "num_hidden_layers": 3, "num_attention_heads": 7, "mlp_ratio": 2}
    config = tf.Dinov2WithRegistersConfig(
        image_size=21, patch_size=7, num_register_tokens=3, use_swiglu_ffn=True, **sizes, **_labels(5)
    )
    return tf.Dinov2WithRegistersForImageClassification(config)


def _clip() -> Any:
    text = {"hidden_size": 26, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 11}
    text |= {"vocab_size": VOCABULARY, "max_position_embeddings": 17, **SPECIAL, "eos_token_id": VOCABULARY - 1}
    eye = {key: value for key, value in CLIP_EYE.items() if key != "model_type"}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=eye, projection_dim=13))


def _siglip(version: str = "Siglip", **vision: Any) -> Any:
    text = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 15}
    text |= {"vocab_size": VOCABULARY, "max_position_embeddings": 8, **SPECIAL}
    eye = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 35, **vision}
    config = getattr(tf, f"{version}Config")(text_config=text, vision_config=eye)
    return getattr(tf, f"{version}Model")(config)


def _pi0() -> Any:
    vlm = {"model_type": "paligemma", "vision_config": dict(SIGLIP_EYE), "text_config": dict(PREFIX)}
    vlm |= {"projection_dim": PREFIX["hidden_size"], "image_token_id": IMAGE}
    config = tf.AutoConfig.for_model(
        "pi0",
        vlm_config=vlm,
        dit_config=dict(EXPERT),
        chunk_size=3,
        max_state_dim=5,
        max_action_dim=6,
        num_inference_steps=3,
    )
    return tf.PI0ForConditionalGeneration(config)


# -- inputs -----------------------------------------------------------------------------------------------------------------------------------


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator_for("trial", str(seed)), dtype=torch.float64)


def _padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    ids, mask = pad_rows(rows, max(map(len, rows)), side)
    return {"input_ids": ids, "attention_mask": mask}


def _prompts(lengths: list[list[int]], side: str, seed: int) -> list[list[int]]:
    """Prompts with images of these lengths, words between and after them, every row of another length."""
    generator = generator_for("trial prompts", str(seed))
    rows = []
    for number, images in enumerate(lengths):
        row = [BOS, *words(1, generator)]
        for length in images:
            row += [IMAGE] * length + words(1, generator)
        rows.append(row + words(3 + 2 * number, generator))
    return rows


def _pictures(height: int, width: int) -> Callable[..., dict[str, Any]]:
    def make(module: Any, side: str, seed: int) -> dict[str, Any]:
        return {"pixel_values": _noise(3, 3, height, width, seed=seed)}

    return make


def _dual(module: Any, side: str, seed: int) -> dict[str, Any]:
    """Three images and two texts."""
    config = module.config
    eye, room = config.vision_config, config.text_config.max_position_embeddings
    generator = generator_for("trial texts", str(seed))
    texts = [[*words(2 + 3 * n, generator), config.text_config.eos_token_id] for n in range(2)]
    inputs: dict[str, Any] = {}
    if isinstance(module, tf.CLIPModel):
        inputs |= _padded([[BOS, *text] for text in texts], "right")
    else:
        inputs["input_ids"] = pad_rows(texts, room, "right")[0]
    if not isinstance(module, tf.Siglip2Model):
        return inputs | {"pixel_values": _noise(3, 3, eye.image_size, eye.image_size, seed=seed)}
    grids = ((1, 9), (4, 3), (5, 2))
    counts = torch.tensor([rows * cols for rows, cols in grids])
    mask = (torch.arange(14) < counts[:, None]).long()
    pixels = _noise(3, 14, 3 * eye.patch_size**2, seed=seed) * mask[..., None]
    return inputs | {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def _flat(module: Any, side: str, seed: int) -> dict[str, Any]:
    """Two prompts, one with two images and one with one."""
    eye = module.config.vision_config
    length = (eye.image_size // eye.patch_size) ** 2
    length += getattr(module.config, "vision_feature_select_strategy", "") == "full" and eye.model_type.startswith(
        "clip"
    )
    inputs: dict[str, Any] = _padded(_prompts([[length] * 2, [length]], side, seed), side)
    if isinstance(module, tf.PaliGemmaForConditionalGeneration):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs | {"pixel_values": _noise(3, 3, eye.image_size, eye.image_size, seed=seed)}


def _tiled(module: Any, side: str, seed: int) -> dict[str, Any]:
    """Two prompts of one tall and one wide photo."""
    config, eye = module.config, module.config.vision_config
    tools: Any = importlib.import_module(type(module.model).__module__)
    sizes = [(eye.image_size * 2 - 3, eye.image_size - 4), (eye.image_size - 2, eye.image_size * 3 - 5)]
    tiles = [tools.image_size_to_num_patches(list(size), config.image_grid_pinpoints, eye.image_size) for size in sizes]
    pixels = _noise(2, max(tiles), 3, eye.image_size, eye.image_size, seed=seed)
    for number, count in enumerate(tiles):
        pixels[number, count:] = 0
    with torch.no_grad():
        features = module.model.get_image_features(pixels.to(module.dtype), torch.tensor(sizes)).pooler_output
    rows = _prompts([[len(part)] for part in features], side, seed)
    return {**_padded(rows, side), "pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _cameras(module: Any, side: str, seed: int) -> dict[str, Any]:
    """Two examples of three cameras, one of which the second lacks in the middle."""
    config, eye = module.config, module.config.vlm_config.vision_config
    length = (eye.image_size // eye.patch_size) ** 2
    seen = torch.tensor([[True, True, True], [True, False, True]])
    generator = generator_for("trial goals", str(seed))
    rows = [[IMAGE] * (length * int(k.sum())) + [BOS, *words(3 + n, generator)] for n, k in enumerate(seen)]
    pixels = _noise(2, 3, 3, eye.image_size, eye.image_size, seed=seed) * seen[..., None, None, None]
    return {
        **_padded(rows, side),
        "pixel_values": pixels,
        "pixel_attention_mask": seen,
        "state": _noise(2, config.max_state_dim, seed=seed + 1),
        "noise": _noise(2, config.chunk_size, config.max_action_dim, seed=seed + 2),
        "timestep": torch.tensor([0.3, 0.8], dtype=torch.float64),
    }


@dataclass(frozen=True)
class Odd:
    """One model of the trial: how it is built, and how its inputs are made from a padding side and a seed."""

    build: Callable[[], Any]
    make: Callable[..., dict[str, Any]]


_CLIP_STYLE: dict[str, Any] = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
_SIGLIP_STYLE: dict[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_ID, _INDEX = {"image_token_id": IMAGE}, {"image_token_index": IMAGE}
_ONE = ("LlavaOnevisionForConditionalGeneration", "llava_onevision", SIGLIP_EYE, MIXED)
_NEXT = ("LlavaNextForConditionalGeneration", "llava_next", CLIP_EYE, SLIDING)
_LLAVA = ("LlavaForConditionalGeneration", "llava")
_PALI = ("PaliGemmaForConditionalGeneration", "paligemma", SIGLIP_EYE)

ODD: dict[str, Odd] = {
    "vit-23x15": Odd(_vit, _pictures(23, 15)),
    "deit-teacher-18": Odd(_deit, _pictures(18, 18)),
    "dinov2-registers-14x28": Odd(_dinov2, _pictures(14, 28)),
    "clip-3-images-2-texts": Odd(_clip, _dual),
    "siglip-23/4": Odd(lambda: _siglip(image_size=23, patch_size=4), _dual),
    "siglip2-1x9": Odd(lambda: _siglip("Siglip2", patch_size=3, num_patches=25), _dual),
    "llava-one-kv": Odd(lambda: _vlm(*_LLAVA, CLIP_EYE, ONE_KV, **_ID, **_CLIP_STYLE), _flat),
    "llava-two-layers-full": Odd(
        lambda: _vlm(
            *_LLAVA, CLIP_EYE, CAPPED, **_ID, vision_feature_layer=[-3, -1], vision_feature_select_strategy="full"
        ),
        _flat,
    ),
    "llava-next-sliding": Odd(
        lambda: _vlm(*_NEXT, **_INDEX, **_CLIP_STYLE, image_grid_pinpoints=_pinpoints(17)), _tiled
    ),
    "onevision-mixed": Odd(
        lambda: _vlm(
            *_ONE,
            **_INDEX,
            **_SIGLIP_STYLE,
            video_token_index=3,
            image_grid_pinpoints=_pinpoints(19),
            vision_aspect_ratio="anyres_max_9",
        ),
        _tiled,
    ),
    "onevision-resampled": Odd(
        lambda: _vlm(
            *_ONE,
            **_INDEX,
            **_SIGLIP_STYLE,
            video_token_index=3,
            image_grid_pinpoints=_pinpoints(19),
            vision_aspect_ratio="anyres_max_1",
        ),
        _tiled,
    ),
    "paligemma2-capped": Odd(
        lambda: _vlm(*_PALI, CAPPED, **_ID, projection_dim=CAPPED["hidden_size"], eos_token_id=EOS), _flat
    ),
    "pi0-three-cameras": Odd(_pi0, _cameras),
}


@functools.cache
def module_of(name: str, attention: str = "eager") -> Any:
    """The bare module in float64, its weights random: shared, so nothing may stay changed."""
    module = randomise(ODD[name].build(), name).double()
    module.set_attn_implementation(attention)
    if getattr(module, "generation_config", None) is not None:
        module.generation_config.eos_token_id = None
    return module


@functools.cache
def inputs_of(name: str, side: str, seed: int) -> dict[str, Any]:
    """Inputs of a model, texts filled up on ``side``."""
    return ODD[name].make(module_of(name), side, seed)
