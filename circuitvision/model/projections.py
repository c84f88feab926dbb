"""The linear maps of a block, one object each, whether a module of its own holds them or a share of a fused one.

Weights follow TransformerLens: row vectors, ``out = x @ weight + bias``. Of a plain module of its own the weight is a live view, and so is a
contiguous share of a plain fused one; a share that is scattered (head by head) is a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.model.block_layout import Fused
from circuitvision.model.weights import in_width, linear_bias, linear_weight, main_device, out_width

Columns = slice | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map: its module, and which of that module's outputs are its own (None: all)."""

    module: nn.Module
    columns: Columns | None = None

    @property
    def in_width(self) -> int:
        """How many features it reads."""
        return in_width(self.module)

    @property
    def out_width(self) -> int:
        """How many features it writes."""
        if self.columns is None:
            return out_width(self.module)
        return (
            len(range(*self.columns.indices(out_width(self.module))))
            if isinstance(self.columns, slice)
            else len(self.columns)
        )

    def weight_and_bias(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"] | None]:
        """As :func:`~circuitvision.model.weights.linear_weight`, of its own outputs."""
        weight, bias = linear_weight(self.module, dtype, device)
        return self.take(weight), None if bias is None else self.take(bias)

    def bias(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Float[Tensor, " d_out"] | None:
        """The bias as it computes, None where it has none."""
        bias = linear_bias(self.module, dtype, device)
        return None if bias is None else self.take(bias)

    def bias_or_zeros(self, dtype: torch.dtype) -> Float[Tensor, " d_out"]:
        """The bias, zeros where it has none."""
        bias = self.bias(dtype)
        return torch.zeros(self.out_width, dtype=dtype, device=main_device(self.module)) if bias is None else bias

    def take(self, output: Float[Tensor, "... d_module"]) -> Float[Tensor, "... d_out"]:
        """Its own share of what the module writes."""
        if self.columns is None:
            return output
        return output[..., self.columns if isinstance(self.columns, slice) else list(self.columns)]

    def put(self, output: Float[Tensor, "... d_module"], value: Float[Tensor, "... d_out"]) -> Tensor:
        """What the module writes, with its own share replaced."""
        if self.columns is None:
            return value
        changed = output.clone()
        changed[..., self.columns if isinstance(self.columns, slice) else list(self.columns)] = value
        return changed


def qkv_columns(fused: Fused, letter: str, n_heads: int, n_kv_heads: int, d_head: int) -> Columns:
    """The outputs of a fused projection that are queries ("q"), keys or values."""
    queries, keys = n_heads * d_head, n_kv_heads * d_head
    if fused.order == "qkv":
        start, length = {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}[letter]
        return slice(start, start + length)
    per_group = n_heads // n_kv_heads
    wide = (per_group + 2) * d_head
    first, count = {"q": (0, per_group), "k": (per_group, 1), "v": (per_group + 1, 1)}[letter]
    return tuple(
        group * wide + first * d_head + number for group in range(n_kv_heads) for number in range(count * d_head)
    )


def gated_columns(fused: Fused, part: str, width: int) -> Columns:
    """The outputs of a fused projection of ``width`` features that are the gate ("gate") or the other input ("in")."""
    half = width // 2
    first = fused.order.startswith(part)
    return slice(0, half) if first else slice(half, width)
