"""Actions that a discretising policy writes as tokens: from ids of the vocabulary to values.

Not covered: other conventions than OpenVLA's (FAST's compressed chunks have no value per token).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError


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
