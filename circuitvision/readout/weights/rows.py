"""The rows that a tower's layers write, as they reach the residual stream, and their products with outputs in batches.

See :mod:`circuitvision.readout.weights.value_vectors` for what rows there are and what is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.model.norms import upcast

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower

_CHUNK = 2**24
"""Numbers that a batch of projections may hold: 64 MiB in float32."""


def written_rows(tower: Tower, layer: int, component: str = "mlp") -> Float[Tensor, "row d_model"]:
    """The value vectors of one layer as they are written to the stream (see the module), in float32 at least; heads one after another."""
    block = tower.blocks[layer]
    with torch.no_grad(), tower.hooks_disabled():
        if component == "mlp":
            rows = block.W_out
        elif component == "ov":
            rows = block.W_O.flatten(0, 1)
        else:
            values = upcast(block.W_V).repeat_interleave(tower.cfg.n_heads // tower.cfg.n_kv_heads, dim=0)
            rows = (values @ upcast(block.W_O)).flatten(0, 1)
        return block.branch(_branch(component)).then.linear(upcast(rows.detach()))


def is_normed(tower: Tower, component: str) -> bool:
    """Whether a norm stands between these rows and the stream, so that their length there depends on the input."""
    return tower.blocks[0].branch(_branch(component)).then.normed


def _branch(component: str) -> str:
    return "mlp" if component == "mlp" else "attn"


def projections(
    rows: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_model n_out"],
    measure: str = "logit",
    batch_size: int | None = None,
) -> Iterator[Float[Tensor, "batch n_out"]]:
    """``rows @ weight`` in batches; for ``measure="cosine"`` of unit rows and columns, NaN where one of them is zero."""
    step = batch_size or at_once(weight.shape[1])
    norms = weight.norm(dim=0) if measure == "cosine" else None
    for chunk in rows.split(step):
        chunk = chunk.to(weight)
        logits = chunk @ weight
        yield logits if norms is None else logits / (chunk.norm(dim=-1, keepdim=True) * norms)


def at_once(width: int) -> int:
    """How many rows (or columns) of ``width`` numbers a product may hold."""
    return max(1, _CHUNK // max(width, 1))
