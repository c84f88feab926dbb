"""Names and shapes of weights: from released OpenVLA checkpoints (timm's vision transformers) to transformers' modules, and back.

* ``attn.qkv`` is three projections in one, rows [q; k; v]; a LayerScale's gain is called ``scale_factor`` in released files;
* timm's DINOv2 adds positions to patches alone, transformers' to the class token too: the table gets a row of zeros in front, and on the way back
  that row is added to the class token;
* SigLIP's pooling head (``attn_pool``) and DINOv2's mask token are in one layout and not in the other; nothing in an OpenVLA reads them.

Not covered: checkpoints of another layout (the training code's own ``.pt`` files).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BLOCK = {
    "norm1": ("norm1", "layer_norm1"),
    "norm2": ("norm2", "layer_norm2"),
    "attn.proj": ("attention.o_proj", "self_attn.out_proj"),
    "ls1.scale_factor": ("layer_scale1.lambda1", ""),
    "ls2.scale_factor": ("layer_scale2.lambda1", ""),
    "mlp.fc1": ("mlp.fc1", "mlp.fc1"),
    "mlp.fc2": ("mlp.fc2", "mlp.fc2"),
}
"""Inside a block: released name → names in DINOv2 and in SigLIP."""
_AROUND = {
    "cls_token": ("embeddings.cls_token", ""),
    "reg_token": ("embeddings.register_tokens", ""),
    "pos_embed": ("embeddings.position_embeddings", "embeddings.position_embedding.weight"),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    "norm": ("layernorm", "post_layernorm"),
}
_TOWERS = (
    ("vision_backbone.featurizer.", "vision.", "encoder.layer", "attention"),
    ("vision_backbone.fused_featurizer.", "vision_2.", "encoder.layers", "self_attn"),
)
"""Released prefix, our prefix, path of the blocks, name of the attention."""
RELEASED = tuple(entry[0] for entry in _TOWERS)
"""Released prefixes of the two backbones."""
MASK_TOKEN = "vision.embeddings.mask_token"
_UNREAD = "vision_backbone.fused_featurizer.attn_pool."
_CLASS, _POSITIONS = "vision.embeddings.cls_token", "vision.embeddings.position_embeddings"


def _tables(index: int) -> tuple[dict[str, str], dict[str, str]]:
    """Released name → ours, of what is in a block and around the blocks."""
    inside = {name: ours[index] for name, ours in _BLOCK.items() if ours[index]}
    return inside, {name: ours[index] for name, ours in _AROUND.items() if ours[index]}


def _split_end(name: str, known: Mapping[str, str]) -> tuple[str, str] | None:
    """A name as an entry of a table and what follows it (``.weight``, ``.bias`` or nothing)."""
    if name in known:
        return name, ""
    stem, _, end = name.rpartition(".")
    return (stem, f".{end}") if stem in known and end in ("weight", "bias") else None


def from_released(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released weights under our names; a name that no released checkpoint has stays as it is."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.startswith(_UNREAD):
            continue
        tower = next((number for number, entry in enumerate(_TOWERS) if name.startswith(entry[0])), None)
        out.update({name: value} if tower is None else _vision_from(tower, name, value))
    return out


def _vision_from(index: int, name: str, value: Tensor) -> dict[str, Tensor]:
    released, ours, blocks, attention = _TOWERS[index]
    inside, around = _tables(index)
    rest = name.removeprefix(released)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", rest)
    if block is None:
        found = _split_end(rest, around)
        if found is None:
            return {name: value}
        if rest == "pos_embed":
            value = torch.cat([torch.zeros_like(value[:, :1]), value], 1) if index == 0 else value[0]
        return {f"{ours}{around[found[0]]}{found[1]}": value}
    layer, part = f"{ours}{blocks}.{block[1]}.", block[2]
    if part in ("attn.qkv.weight", "attn.qkv.bias"):
        end = part.rpartition(".")[2]
        thirds = zip("qkv", value.chunk(3), strict=True)
        return {f"{layer}{attention}.{letter}_proj.{end}": third for letter, third in thirds}
    found = _split_end(part, inside)
    return {name: value} if found is None else {f"{layer}{inside[found[0]]}{found[1]}": value}


def to_released(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the released names."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == MASK_TOKEN:
            continue
        tower = next((number for number, entry in enumerate(_TOWERS) if name.startswith(entry[1])), None)
        if tower is None:
            out[name] = value
        elif not re.search(r"\.[kv]_proj\.", name):
            if name == _CLASS:
                value = value + weights[_POSITIONS][:, :1]
            made, value = _vision_to(tower, name, value, weights)
            out[made] = value
    return out


def _vision_to(index: int, name: str, value: Tensor, weights: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    released, ours, blocks, attention = _TOWERS[index]
    inside, around = ({own: theirs for theirs, own in table.items()} for table in _tables(index))
    rest = name.removeprefix(ours)
    block = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", rest)
    if block is None:
        found = _split_end(rest, around)
        if found is None:
            return name, value
        if around[found[0]] == "pos_embed":
            value = value[:, 1:] if index == 0 else value[None]
        return f"{released}{around[found[0]]}{found[1]}", value
    layer, part = f"{released}blocks.{block[1]}.", block[2]
    if part.startswith(f"{attention}.q_proj."):
        thirds = [weights[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
        return f"{layer}attn.qkv.{part.rpartition('.')[2]}", torch.cat(thirds)
    found = _split_end(part, inside)
    return (name, value) if found is None else (f"{layer}{inside[found[0]]}{found[1]}", value)
