"""How far the embeddings of a data set spread: the unit of the noise that corrupts a run.

ROME (Meng et al. 2022, arXiv 2202.05262) corrupts the subject of a prompt with normal noise of three times the standard deviation of the embeddings
of the
subjects in a data set. ``cv.edits.add_noise(site, 3 * embedding_std(model, side), positions=…)`` is that edit, the same in every batch.

Not covered: a standard deviation per coordinate (noise is of one scale).
"""

from __future__ import annotations

from typing import Any

import torch

from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Side
from circuitvision.errors import InputError


def embedding_std(
    model: Any,
    side: Side | Pairs,
    site: str = "language.hook_embed",
    *,
    positions: Any = None,
    size: int | None = None,
) -> float:
    """Standard deviation over all coordinates of a site at the positions of a data set that hold something, examples and coordinates together:
    ``√(Σ (x − x̄)² / n)`` with one mean ``x̄`` for all.

    Args:
        model: the hooked model.
        side: the data set, run in batches; of pairs the clean side.
        site: where noise is to be added, ``[row pos d]``.
        positions: a kind ("text", "patch", several), a region, such as ``cv.regions.words(subjects)``, or None for all.
        size: how many examples run at once; None: by memory.

    Raises:
        InputError: a site that has no positions, or positions that nothing holds.
    """
    data = side.clean if isinstance(side, Pairs) else side
    rows = {number: row for row, number in enumerate(data.numbers)}
    count, total, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for batch in data.batches(model, size):
            tower = site.split(".")[0]
            tokens = model.tokens(batch.inputs).get(tower)
            value = model.run_with_cache(batch.inputs, names_filter=[site])[1][site].double().cpu()
            if tokens is None or value.ndim != 3 or tuple(value.shape[:2]) != tokens.kind.shape:
                raise InputError(
                    f"{site} is not [row pos d] over the positions of a tower: take its hook_embed or hook_input."
                )
            there = tokens.present.copy()
            if hasattr(positions, "where"):
                there &= positions.where(tokens, [rows[number] for number in batch.examples])
            elif positions is not None:
                kinds = [positions] if isinstance(positions, str) else list(positions)
                there &= sum(tokens.kind == kind for kind in kinds) > 0
            chosen = value[torch.from_numpy(there)]
            count += chosen.numel()
            total, square = total + chosen.sum(), square + chosen.square().sum()
    if not count:
        raise InputError(f"No position of this data set is one of positions={positions!r}.")
    return float((square / count - (total / count) ** 2).clamp(min=0).sqrt())
