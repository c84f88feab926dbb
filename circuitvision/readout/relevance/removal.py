"""Occlusion: what the metric loses when one place of the input is removed and everything else is kept.

``relevance = metric(unedited) - metric(place removed)``, one edit per place and all of them one ``model.sweep``: a real intervention, not a
first-order estimate. It finds what is *necessary* given all the rest: where two patches say the same, removing either alone changes little,
and both look irrelevant.

Patches are removed in windows of ``window × window`` that slide over the patch grid one patch at a time; a patch gets the mean over the
windows that hold it. Other positions (words) are removed one at a time.

Not covered: windows over pixels (remove patches at ``hook_input``, or colour pixels with
:func:`~circuitvision.readout.relevance.curves.deletion_curve`).

Reference: Zeiler and Fergus 2014 (arXiv 1311.2901).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.tokens import KINDS
from circuitvision.readout.relevance.gradients import Relevance, result_at
from circuitvision.readout.relevance.variables import (
    PIXELS,
    Baseline,
    Place,
    Variable,
    brief,
    checked_tower,
    rows_serve_all,
    start_of,
    wide,
)


def occlusion(
    model: Any,
    inputs: Mapping[str, Any],
    metric: Any,
    *,
    tower: str | None = None,
    kinds: Sequence[str] | str | None = None,
    window: int = 1,
    with_: Baseline = "mean",
    site: str | None = None,
    progress: bool = True,
) -> Relevance:
    """``relevance[p] = metric(unedited) - metric(p removed)``, in the metric's units; positive where removing hurts.

    Positions of other kinds are NaN. In towers whose rows serve all examples (texts of a dual encoder) each row is removed for itself and the
    losses of all examples are summed.

    Args:
        model, inputs, metric: as in :func:`~circuitvision.readout.relevance.gradients.gradient_times_activation`.
        tower: whose positions; by default the first image tower's.
        kinds: kinds of positions to remove, see ``circuitvision.model.tokens.KINDS``: by default patches, and outside image towers words too.
        window: side of the sliding window of patches.
        with_: what a removed position becomes, see :mod:`circuitvision.readout.relevance.variables`.
        site: where it is removed; by default what enters the tower.

    Raises:
        InputError: no such tower, kind or position; a window larger than the grid.
    """
    place = Variable(model, inputs, metric, site or f"{checked_tower(model, tower)}.hook_input")
    if place.site == PIXELS:
        raise InputError("Occlusion removes positions of a tower; deletion_curve(level='pixel') colours pixels.")
    where = place.place
    tower = where.tokens.tower
    if kinds is None:
        kinds = ("patch",) if model.towers[tower].stack.image else ("patch", "text")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if set(kinds) - set(KINDS) or window < 1:
        raise InputError(f"kinds={kinds} with window={window} is not understood; kinds are {', '.join(KINDS)}.")
    alone = rows_serve_all(model, tower)
    masks = list(_removals(where, kinds, window, alone))
    if not masks:
        raise InputError(f"The {tower} tower has no position of the kinds {', '.join(kinds)} in this run.")
    removed = torch.stack(masks)
    source = start_of(place, with_)
    swept = model.sweep(
        place.inputs, [edits.replace(place.site, source, positions=mask) for mask in removed], metric, progress=progress
    )
    lost = wide(swept.clean) - wide(swept.values)
    example = where.tokens.example.tolist()
    of_row = lost.sum(1, keepdim=True).expand(-1, len(example)) if alone else lost[:, example]
    counts = removed.sum(0)
    values = torch.einsum("erp,er->rp", removed.to(of_row), of_row) / counts
    values = torch.where(counts > 0, values, float("nan"))
    return result_at(place, values, f"occlusion (window {window}, baseline {brief(with_)})", metric)


def _removals(where: Place, kinds: Sequence[str], window: int, alone: bool) -> Iterator[Bool[Tensor, "row pos"]]:
    """What each edit removes: one window of an image that every example has, or one other position of all rows."""
    other = np.isin(where.kind, [kind for kind in kinds if kind != "patch"])
    masks = [*(_windows(where, window) if "patch" in kinds else ()), *_columns(other)]
    for mask in masks:
        if not alone:
            yield torch.from_numpy(mask)
            continue
        for row in np.flatnonzero(mask.any(1)):
            only = np.zeros_like(mask)
            only[row] = mask[row]
            yield torch.from_numpy(only)


def _columns(mask: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    for column in np.flatnonzero(mask.any(0)):
        only = np.zeros_like(mask)
        only[:, column] = mask[:, column]
        yield only


def _windows(where: Place, window: int) -> Iterator[np.ndarray[Any, Any]]:
    tokens, first = where.tokens, where.dropped
    patches = where.kind == "patch"
    image, tile, down, across = (
        array[:, first:] for array in (tokens.image_number, tokens.tile, tokens.patch_row, tokens.patch_col)
    )
    for number, part in sorted(set(zip(image[patches].tolist(), tile[patches].tolist(), strict=True))):
        # One image and tile of every example at a time: an example's effect then belongs to one row.
        here = patches & (image == number) & (tile == part)
        rows, columns = int(down[here].max()) + 1, int(across[here].max()) + 1
        if window > min(rows, columns):
            raise InputError(f"A window of {window} × {window} does not fit the grid of {rows} × {columns} patches.")
        for top, left in itertools.product(range(rows - window + 1), range(columns - window + 1)):
            inside = (down >= top) & (down < top + window) & (across >= left) & (across < left + window)
            if (here & inside).any():
                yield here & inside
