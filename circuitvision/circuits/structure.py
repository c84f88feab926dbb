"""What shape a scored graph has: how much passes from layer to layer, how deep the answer is made, and how alike two graphs are.

    ``Λ_ij = Σ |score|`` over the edges from layer ``i`` to layer ``j``,

layers of all towers in the order of computation, what enters a tower and connectors as layers of their own. *Deep-dominance bias* compares edges that
come out of late layers with those out of early ones, ``DDB = ln(Σ_deep Λ / Σ_shallow Λ)``. Bands of unequal width make it differ from 0 for a uniform
circuit (the published code takes four layers of twelve against three: ln(3/4) = -0.29), so the bands are equal here unless asked, and are returned.

Not covered: spectra of the graphs; sizes of other models (two graphs must have the same senders and slots).

Reference: Peng et al. 2026 (arXiv 2604.08192).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.circuits.edge_graph import split_slot
from circuitvision.errors import InputError
from circuitvision.model.names import TOWER_LETTERS, parse_id

MEASURES = ("spearman", "cosine", "l2", "jaccard")


class DepthBias(NamedTuple):
    """``ln(deep / shallow)`` and the layers that were summed."""

    value: float
    deep: list[int]
    shallow: list[int]


def layer_matrix(attribution: EdgeAttribution) -> pd.DataFrame:
    """``Λ``: the summed sizes of mean scores from layer (row) to layer (column), such as ``"v.0"``; inputs, outputs and connectors stand for
    themselves."""
    sizes = attribution.scores.abs().nan_to_num().double().numpy()
    rows = [_layer(name) for name in attribution.axes["sender"]]
    columns = [_layer(split_slot(name)[0]) for name in attribution.axes["slot"]]
    frame = pd.DataFrame(sizes, index=rows, columns=columns)
    by_row = frame.groupby(level=0, sort=False).sum()
    return by_row.T.groupby(level=0, sort=False).sum().T


def _layer(name: str) -> str:
    node = parse_id(name)
    if node.layer < 0:
        return name
    return f"{TOWER_LETTERS[node.tower]}.{node.layer}"


def depth_bias(
    attribution: EdgeAttribution, tower: str, *, tau: float = 0.3, outputs_only: bool = False, symmetric: bool = True
) -> DepthBias:
    """The deep-dominance bias of one tower's edges: late against early layers that edges come out of, natural logarithm.

    Args:
        attribution: the scores.
        tower: the name of the tower, such as ``"vision"``.
        tau: the share of layers in each band.
        outputs_only: whether only edges into what the output is read from count.
        symmetric: equal bands, ``ceil(tau · layers)`` at each end; False: the published bands, layers up to ``tau · layers`` against those from
            ``(1 - tau) · (layers - 1)`` on.

    Raises:
        InputError: a tower without edges, ``tau`` outside 0 to 0.5.
    """
    if not 0 < tau <= 0.5:
        raise InputError(f"tau={tau} is no share of layers: give one above 0, up to 0.5.")
    nodes = [parse_id(name) for name in attribution.axes["sender"]]
    layers = sorted({node.layer for node in nodes if node.tower == tower and node.layer >= 0})
    if not layers:
        known = ", ".join(sorted({node.tower for node in nodes}))
        raise InputError(f"No sender of the {tower} tower was scored; towers are {known}.")
    count = max(layers) + 1
    if symmetric:
        band = math.ceil(tau * count)
        shallow, deep = list(range(band)), list(range(count - band, count))
    else:
        shallow = [layer for layer in range(count) if layer <= tau * count]
        deep = [layer for layer in range(count) if layer >= (1 - tau) * (count - 1) + 1]
    sizes = attribution.scores.abs().nan_to_num().double()
    if outputs_only:
        last = [split_slot(name)[0].endswith(".logits") for name in attribution.axes["slot"]]
        sizes = sizes[:, torch.tensor(last)]
    by_sender = sizes.sum(1)

    def total(band: list[int]) -> float:
        held = [node.tower == tower and node.layer in band for node in nodes]
        return float(by_sender[torch.tensor(held)].sum())

    high, low = total(deep), total(shallow)
    value = math.log(high / low) if high > 0 and low > 0 else math.nan
    return DepthBias(value, deep, shallow)


def graph_similarity(one: EdgeAttribution, other: EdgeAttribution, measure: str = "spearman") -> float:
    """How alike the edge scores of two graphs are: rank correlation of sizes, cosine of scores, distance, or weighted Jaccard of sizes.

    ``"spearman"`` of ``|score|``, ``"cosine"`` and ``"l2"`` of signed scores, ``"jaccard"`` is ``Σ min / Σ max`` of sizes. Compared between data of
    one kind and of another, it says how much the mechanism shifts.

    Raises:
        InputError: graphs with other edges, an unknown measure.
    """
    if measure not in MEASURES:
        raise InputError(f"Unknown measure {measure!r}; choose one of {', '.join(map(repr, MEASURES))}.")
    same = all(one.axes[axis] == other.axes[axis] for axis in ("sender", "slot"))
    if not same or not bool((one.edges == other.edges).all()):
        raise InputError("The two graphs have other edges: score both in one model.")
    first, second = (_scores(found) for found in (one, other))
    if measure == "cosine":
        return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
    if measure == "l2":
        return float(np.linalg.norm(first - second))
    first, second = np.abs(first), np.abs(second)
    if measure == "jaccard":
        return float(np.minimum(first, second).sum() / np.maximum(first, second).sum())
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def _scores(found: EdgeAttribution) -> np.ndarray:
    held: Tensor = found.scores[found.edges]
    return held.double().numpy()
