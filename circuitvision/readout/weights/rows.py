"""The rows that a tower's layers write, as they reach the residual stream, and their products with outputs in batches.

See :mod:`circuitvision.readout.weights.value_vectors` for what rows there are and what is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.readout.weights.unembedding import wide

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower

_CHUNK = 2**24
"""Numbers that a batch of projections may hold: 64 MiB in float32."""


def written_rows(tower: Tower, layer: int, of: str = "mlp") -> Float[Tensor, "row d_model"]:
    """The value vectors of one layer as they are written to the stream (see the module), in float32 at least; heads one after another."""
    block = tower.blocks[layer]
    with torch.no_grad(), tower.hooks_disabled():
        if of == "mlp":
            rows = block.W_out
        elif of == "ov":
            rows = block.W_O.flatten(0, 1)
        else:
            values = wide(block.W_V).repeat_interleave(tower.cfg.n_heads // tower.cfg.n_kv_heads, dim=0)
            rows = (values @ wide(block.W_O)).flatten(0, 1)
        return block.branch(_branch(of)).then.linear(wide(rows.detach()))


def is_normed(tower: Tower, of: str) -> bool:
    """Whether a norm stands between these rows and the stream, so that their length there depends on the input."""
    return tower.blocks[0].branch(_branch(of)).then.normed


def _branch(of: str) -> str:
    return "mlp" if of == "mlp" else "attn"


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


def action_bins(
    ids: Int[Tensor, "*batch token"], n_vocab: int, *, n_bins: int = 256, low: float = -1.0, high: float = 1.0
) -> Float[Tensor, "*batch token"]:
    """The action that a token of a discretising policy stands for; NaN for tokens that are no action.

    The last ``n_bins`` ids of the vocabulary (padding rows not counted) are the edges of ``linspace(low, high, n_bins)``, counted from the
    end: id ``t`` is bin ``n_vocab - t - 1``, clipped to the last of the ``n_bins - 1`` centres. Convention of OpenVLA (Kim et al. 2024, arXiv
    2406.09246).

    Of value vectors: ``action_bins(value_vectors(tower).ids, n_vocab)`` says what each neuron moves, and the mean of its ``isfinite()`` over
    ranks is each neuron's share of action tokens.

    Raises:
        InputError: bins that the vocabulary has no room for, or fewer than two edges.
    """
    if not 2 <= n_bins <= n_vocab:
        raise InputError(f"n_bins={n_bins}: give 2 or more edges, and no more than the {n_vocab} tokens there are.")
    edges = torch.linspace(low, high, n_bins, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    number = n_vocab - ids.cpu() - 1
    action = centres[number.clamp(0, n_bins - 2)].float()
    return torch.where((number >= 0) & (number < n_bins), action, torch.nan)
