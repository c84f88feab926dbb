"""A hand-built vision transformer whose heads are the inputs of a gate: transformers' own ViT with weights set by hand.

Patch ``h`` of the picture is bit ``h``: 1 where its pixel is 1, 0 where it is −1. Head ``h`` of the one layer looks at patch ``h`` alone, from
every position, and writes the bit as ±1 into the stream. The MLP counts the bits and computes any function of the count; :func:`value` reads it off
the logit of class 1. The norms before attention and MLP see vectors of one length, so they only rescale; the last one is undone by :func:`value`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import circuitvision as cv

AND, OR, XOR = (0, 0, 1), (0, 1, 1), (0, 1, 0)
"""The value of a gate by how many of its two inputs are 1."""
SIDE = 3


def gate(values: Sequence[float]) -> cv.HookedModel:
    """The network of ``len(values) − 1`` heads whose logit is ``values[count of bits that are 1]``."""
    heads = len(values) - 1
    width = 6 * heads
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=heads + 1, hidden_act="relu", image_size=SIDE,
        patch_size=1, num_channels=1, layer_norm_eps=1e-12, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        module = ViTForImageClassification(config).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        _norms(module)
        _embed(module, heads)
        _attend(module, heads, width)
        _count(module, values, width)
    return cv.HookedModel(module)


def _pair(width: int, at: int) -> Tensor:
    """+1 and −1 in two neighbours: a direction whose mean is 0."""
    found = torch.zeros(width, dtype=torch.float64)
    found[at], found[at + 1] = 1.0, -1.0
    return found


def _norms(module: torch.nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.weight.fill_(1.0)


def _embed(module: ViTForImageClassification, heads: int) -> None:
    """The bit in coordinates 0 and 1, the number of the patch in a pair of its own."""
    embeddings = module.vit.embeddings
    width = module.config.hidden_size
    embeddings.patch_embeddings.projection.weight[:, 0, 0, 0] = _pair(width, 0)
    for head in range(heads):
        embeddings.position_embeddings[0, 1 + head] = _pair(width, 2 + 2 * head)


def _attend(module: ViTForImageClassification, heads: int, width: int) -> None:
    layer = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    query, key, value, out = (_only(layer, word) for word in ("q", "k", "v", "o"))
    size = width // heads
    scale = math.sqrt(width / 4)
    for head in range(heads):
        first = head * size
        query.bias[first] = 1e4
        key.weight[first, 2 + 2 * head] = 1.0
        value.weight[first, 0] = 1 / scale
        out.weight[:, first] = _pair(width, 2 + 2 * heads + 2 * head)


_NAMES = {
    "q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value"), "o": ("o_proj", "attention.output.dense"),
    "in": ("fc1", "intermediate.dense"), "out": ("fc2", "layer.0.output.dense", "layers.0.output.dense"),
}  # fmt: skip


def _only(layers: dict[str, torch.nn.Linear], word: str) -> torch.nn.Linear:
    """The one linear map that is called so, in any version of transformers."""
    found = [part for name, part in layers.items() if name.endswith(_NAMES[word])]
    if word == "out":
        found = [part for name, part in layers.items() if name.endswith(_NAMES[word]) and "attention" not in name]
    (part,) = found
    return part


def _count(module: ViTForImageClassification, values: Sequence[float], width: int) -> None:
    """Neuron ``t`` is ``relu(count − t)``, and the function is a sum of these; the last neuron is 1."""
    layers = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    first, second = _only(layers, "in"), _only(layers, "out")
    heads = len(values) - 1
    scale = math.sqrt(width / (2 * heads))
    for threshold in range(heads):
        for head in range(heads):
            first.weight[threshold, 2 + 2 * heads + 2 * head] = 0.5 / scale
        first.bias[threshold] = heads / 2 - threshold
    first.bias[heads] = 1.0
    slopes = [values[number + 1] - values[number] for number in range(heads)]
    way = _pair(width, 2 + 4 * heads)
    for threshold, (before, after) in enumerate(zip([0.0, *slopes], slopes, strict=False)):
        second.weight[:, threshold] = (after - before) * way
    second.weight[:, heads] = values[0] * way
    module.classifier.weight[1] = _pair(width, 2 + 4 * heads) / 2


def pictures(bits: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """One picture per row of bits."""
    pixels = torch.zeros(len(bits), 1, SIDE, SIDE, dtype=torch.float64)
    for row, own in enumerate(bits):
        for patch in range(SIDE * SIDE):
            pixels[row, 0, patch // SIDE, patch % SIDE] = 2.0 * (own[patch] if patch < len(own) else 0) - 1.0
    return {"pixel_values": pixels}


def value(logits: Tensor, heads: int) -> Tensor:
    """The gate's value of each picture: what the last norm divided by is undone. ``logit = m / √((m² + heads) / (3 heads))``."""
    found = logits[:, 1]
    return found.sign() * (found.square() * heads / (3 * heads - found.square())).sqrt()


def every_input(heads: int) -> list[tuple[int, ...]]:
    """All rows of bits."""
    return list(itertools.product((0, 1), repeat=heads))
