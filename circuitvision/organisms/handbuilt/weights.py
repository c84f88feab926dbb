"""Weights set by hand: named directions of a residual stream, and heads and neurons that read and write them.

*Directions.* A direction is +1 in one coordinate and −1 in the next one, so that the mean of every sum of directions is 0 and centring changes
nothing. It is read as half the difference of its two coordinates.

*Norms.* Every norm has ``eps = 2**60`` and gain ``2**30``. Beside such an epsilon the variance of a stream of ordinary size is lost in rounding,
``(x − mean) / sqrt(var + 2**60) * 2**30`` is ``x − mean`` to the last bit, and an RMS norm is the identity: norms are there, and do nothing.

*Heads.* The score of key ``j`` for query ``i`` is a sum of products ``(query terms at i) · (key terms at j)``, one per head dimension; the factor
``1 / sqrt(d_head)`` is undone in the query weights.

*Noise.* :func:`add_noise` adds to every weight and bias of attention, MLPs, connector and read-out, not to norms and embeddings.

Not covered: rotary positions (a language tower chooses head dimensions that do not turn, see ``d_first``), gated MLPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

EPSILON, GAIN = 2.0**60, 2.0**30
ONE = "1"
"""The name of the constant 1, for biases."""
SATURATED = 40.0
"""A score beside zeros whose softmax weight is 1 to the last bit of a float64."""
Terms = Mapping[str, float]
"""Coefficients of directions, by name; :data:`ONE` is the constant 1."""


@dataclass(frozen=True)
class HeadWeights:
    """One head. ``qk`` are (query terms, key terms), ``ov`` (value terms, what one unit of it writes); one head dimension for each."""

    qk: Sequence[tuple[Terms, Terms]]
    ov: Sequence[tuple[Terms, Terms]]


@dataclass(frozen=True)
class Neuron:
    """One ReLU neuron: what it reads, with a bias, and what one unit of it writes."""

    reads: Terms
    writes: Terms


class Directions:
    """Named directions of a stream whose width ``n_heads`` divides.

    Args:
        names: of the directions.
        n_heads: of the tower.
        d_head: the smallest head dimension that will do.
    """

    def __init__(self, names: Iterable[str], n_heads: int, d_head: int = 1) -> None:
        self.names = list(names)
        self.d_head = max(math.ceil(2 * len(self.names) / n_heads), d_head)
        # The width must be even for directions to be pairs.
        self.d_head += self.d_head * n_heads % 2
        self.width = self.d_head * n_heads

    def vector(self, terms: Terms) -> Float[Tensor, " d"]:
        """What a sum of directions writes."""
        found = torch.zeros(self.width, dtype=torch.float64)
        for name, weight in terms.items():
            at = 2 * self.names.index(name)
            found[at] += weight
            found[at + 1] -= weight
        return found

    def reader(self, terms: Terms) -> tuple[Float[Tensor, " d"], float]:
        """What reads a sum of directions, and its bias."""
        return self.vector({name: weight for name, weight in terms.items() if name != ONE}) / 2, terms.get(ONE, 0.0)


@torch.no_grad()
def clear(module: nn.Module) -> None:
    """Every parameter 0, and every norm one that does nothing."""
    for parameter in module.parameters():
        parameter.zero_()
    for part in module.modules():
        if _is_norm(part):
            part.weight.fill_(GAIN)  # type: ignore[operator, union-attr]


def _is_norm(part: nn.Module) -> bool:
    return isinstance(part, nn.LayerNorm) or type(part).__name__.endswith("RMSNorm")


@torch.no_grad()
def write_heads(block: Any, directions: Directions, heads: Sequence[HeadWeights], d_first: int = 0) -> None:
    """Set the heads of a block; those that are not given do nothing. ``d_first`` is the first head dimension that is used."""
    query, key, value = (block.attn.projection(letter).module for letter in "qkv")
    out = block.attn.output
    size = directions.d_head
    for number, head in enumerate(heads):
        first = number * size + d_first
        for row, (asked, offered) in enumerate(head.qk, start=first):
            _set_row(query, row, directions.reader(asked), math.sqrt(size))
            _set_row(key, row, directions.reader(offered))
        for row, (read, written) in enumerate(head.ov, start=first):
            _set_row(value, row, directions.reader(read))
            out.weight[:, row] = directions.vector(written)


@torch.no_grad()
def write_neurons(block: Any, directions: Directions, neurons: Sequence[Neuron]) -> None:
    """Set the neurons of a block's MLP, which must have no gate."""
    first, second = block.mlp.fc_in.module, block.mlp.output
    for row, neuron in enumerate(neurons):
        _set_row(first, row, directions.reader(neuron.reads))
        second.weight[:, row] = directions.vector(neuron.writes)


@torch.no_grad()
def write_readout(linear: nn.Linear, directions: Directions, terms: Terms) -> None:
    """Logit 1 minus logit 0 is the sum of ``terms``; every other logit is 0."""
    vector, _ = directions.reader(terms)
    linear.weight[1], linear.weight[0] = vector / 2, -vector / 2


def _set_row(linear: nn.Linear, row: int, reader: tuple[Tensor, float], scale: float = 1.0) -> None:
    weight, bias = reader
    linear.weight[row] = scale * weight
    if bias:
        linear.bias[row] = scale * bias


@torch.no_grad()
def add_noise(modules: Iterable[nn.Module], size: float, seed: int) -> None:
    """Add normal noise of standard deviation ``size`` to every weight and bias of the linear maps in ``modules``."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Linear):
                for parameter in part.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(noise.to(parameter), alpha=size)
