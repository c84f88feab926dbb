"""How far the embeddings of a data set spread: the unit of the noise that corrupts a run.

ROME (Meng et al. 2022, arXiv 2202.05262) corrupts the subject of a prompt with normal noise of three times the standard deviation of the embeddings
of the subjects in a data set. ``cv.edits.add_noise(site, 3 * embedding_std(model, side), positions=…)`` is that edit, the same in every batch.

Not covered: a standard deviation per coordinate (noise is of one scale).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Side
from circuitvision.errors import InputError

if TYPE_CHECKING:
    from circuitvision.model.tokens import TokenMap


def embedding_std(
    model: Any,
    data: Side | Pairs | Mapping[str, Any],
    site: str = "language.hook_embed",
    *,
    positions: Any = None,
    size: int | None = None,
) -> float:
    """Standard deviation over all coordinates of a site at the positions of a data set that hold something, examples and coordinates together:
    ``√(Σ (x − x̄)² / n)`` with one mean ``x̄`` for all.

    Args:
        model: the hooked model.
        data: the data set, run in batches (of pairs the clean side), or inputs.
        site: where noise is to be added, ``[row pos d]``.
        positions: a kind ("text", "patch", several), a region, such as ``cv.regions.words(subjects)``, positions that were taken apart, or None for
            all.
        size: how many examples run at once; None: by memory.

    Raises:
        InputError: a site that has no positions, positions of another spelling, or that nothing holds.
    """
    count, total, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for inputs, rows, examples in _batches(model, data, size):
            tokens: TokenMap | None = model.tokens(inputs).get(site.split(".")[0])
            value = model.run_with_cache(inputs, names_filter=[site])[1][site].double().cpu()
            if tokens is None or value.ndim != 3 or tuple(value.shape[:2]) != tokens.kind.shape:
                raise InputError(
                    f"{site} is not [row pos d] over the positions of a tower: take its hook_embed or hook_input."
                )
            there = torch.from_numpy(tokens.present)
            if positions is not None:
                there = there & _chosen(positions, tokens, rows, examples)
            chosen = value[there]
            count += chosen.numel()
            total, square = total + chosen.sum(), square + chosen.square().sum()
    if not count:
        raise InputError(f"No position of this data set is one of positions={positions!r}: the subject is nowhere.")
    return float((square / count - (total / count) ** 2).clamp(min=0).sqrt())


def _chosen(positions: Any, tokens: TokenMap, rows: list[int], examples: int) -> torch.Tensor:
    """Which positions are meant, ``[row pos]``."""
    if hasattr(positions, "resolve"):
        return positions.taken(rows, examples).resolve(tokens)
    if hasattr(positions, "where"):
        return torch.from_numpy(positions.where(tokens, rows))
    kinds = list(positions) if isinstance(positions, Iterable) and not isinstance(positions, str) else [positions]
    if not all(isinstance(kind, str) for kind in kinds) or {"last", "all"} & {*kinds}:
        raise InputError(
            f"positions={positions!r} are no kinds and no region: numbers and other spellings go through Positions.of(positions)."
        )
    return torch.from_numpy(np.isin(tokens.kind, kinds))


def _batches(model: Any, data: Any, size: int | None) -> Iterator[tuple[Mapping[str, Any], list[int], int]]:
    """Inputs, the places of their examples in the data set, and how many that has."""
    if isinstance(data, Mapping):
        count = max(tokens.n_examples for tokens in model.tokens(data).values())
        yield data, list(range(count)), count
        return
    side = data.clean if isinstance(data, Pairs) else data
    place = {number: row for row, number in enumerate(side.numbers)}
    for batch in side.batches(model, size):
        yield batch.inputs, [place[number] for number in batch.examples], len(side)
