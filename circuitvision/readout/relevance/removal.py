"""Occlusion: what the metric loses when one place of the input is removed and everything else is kept.

``relevance = metric(unedited) - metric(place removed)``, one edit per place and all of them one ``model.sweep``: a real intervention, not a
first-order estimate. It finds what is *necessary* given all the rest: where two patches say the same, removing either alone changes little,
and both look irrelevant.

Patches are removed in windows of ``window × window`` that slide over the patch grid ``stride`` patches at a time and end flush with the border;
a patch gets the mean over the windows that hold it. Other positions (words) are removed one at a time. Or name the ``regions`` yourself: whole
objects, segments of the image, phrases. A region's number is then what each of its positions gets, not a share of it.

Not covered: windows over pixels (remove patches at ``hook_input``, or colour pixels with
:func:`~circuitvision.readout.relevance.curves.perturbation_curve`).

Reference: Zeiler and Fergus 2014 (arXiv 1311.2901).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.incremental.routes import rows_serve_all
from circuitvision.model.positions import Positions, PositionsLike, warn_of_empty, without_any
from circuitvision.model.regions import Region
from circuitvision.model.selection import Selection
from circuitvision.model.tokens import KINDS, present
from circuitvision.provenance import with_provenance
from circuitvision.readout.relevance.baselines import Baseline, short_repr, start_of
from circuitvision.readout.relevance.gradients import result_at
from circuitvision.readout.relevance.result import Relevance, warn_undefined
from circuitvision.readout.relevance.variables import (
    PIXELS,
    AttributionInput,
    Place,
    checked_tower,
    wide,
)


@with_provenance
def occlusion(
    model: Any,
    inputs: Mapping[str, Any],
    metric: Any,
    *,
    tower: str | None = None,
    kinds: Sequence[str] | str | None = None,
    window: int = 1,
    stride: int = 1,
    regions: Iterable[PositionsLike] | Mapping[str, PositionsLike] | None = None,
    baseline: Baseline = "mean",
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
        stride: how many patches it moves at a time; at most ``window``, so that every patch is removed.
        regions: what is removed together, instead of windows, one edit each: regions (the object of every example), kinds, selections, …, see
            :mod:`circuitvision.model.positions`. Positions in several get the mean of them, those in none are NaN.
        baseline: what a removed position becomes, see :mod:`circuitvision.readout.relevance.baselines`.
        site: where it is removed; by default what enters the tower.

    Raises:
        InputError: no such tower, kind or position; a window larger than the grid, a stride larger than the window; an empty region, or one of
            another tower or run.
    """
    place = AttributionInput(model, inputs, metric, site or f"{checked_tower(model, tower)}.hook_input")
    if place.site == PIXELS:
        raise InputError("Occlusion removes positions of a tower; perturbation_curve(level='pixel') colours pixels.")
    where = place.place
    if regions is None:
        masks = _one_by_one(model, where, kinds, window, stride)
        setting = f"window {window}" + (f", stride {stride}" if stride > 1 else "")
    elif kinds is not None or (window, stride) != (1, 1):
        raise InputError("regions say what is removed: leave kinds, window and stride out.")
    else:
        masks = _regions(where, regions)
        setting = f"{len(masks)} regions"
    alone = rows_serve_all(model, where.tokens.tower)
    removed = torch.stack([torch.from_numpy(mask) for full in masks for mask in _apart(full, alone)])
    source = start_of(place, baseline, removed.any(0))
    swept = model.sweep(
        place.inputs,
        [edits.replace(place.site, source, positions=mask) for mask in removed],
        metric,
        empty="clean",
        progress=progress,
    )
    lost = wide(swept.clean) - wide(swept.values)
    example = where.tokens.example.tolist()
    of_row = lost.sum(1, keepdim=True).expand(-1, len(example)) if alone else lost[:, example]
    counts = removed.sum(0)
    # No product: an edit whose loss is no number says nothing of positions that it left alone.
    values = torch.where(removed, of_row[..., None], 0.0).sum(0) / counts
    warn_undefined(values[counts > 0])
    values = torch.where(counts > 0, values, float("nan"))
    found = result_at(place, values, f"occlusion ({setting}, baseline {short_repr(baseline)})", metric)
    return replace(found, edits=swept.edits)


def _one_by_one(
    model: Any, where: Place, kinds: Sequence[str] | str | None, window: int, stride: int
) -> list[np.ndarray[Any, Any]]:
    """What each edit removes: one window of an image that every example has, or one other position of all rows."""
    tower = where.tokens.tower
    if kinds is None:
        kinds = ("patch",) if model.towers[tower].stack.image else ("patch", "text")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if not kinds or set(kinds) - set(KINDS):
        raise InputError(f"kinds={kinds} is not understood; kinds are {', '.join(KINDS)}.")
    if not all(isinstance(number, Integral) for number in (window, stride)) or not 1 <= stride <= window:
        raise InputError(
            f"window={window!r} with stride={stride!r}: whole numbers from 1 on, and a stride no larger than the window, which would leave patches "
            "out."
        )
    other = np.isin(where.kind, [kind for kind in kinds if kind != "patch"])
    masks = [*(_windows(where, window, stride) if "patch" in kinds else ()), *_columns(other)]
    if not masks:
        raise InputError(f"The {tower} tower has no position of the kinds {', '.join(kinds)} in this run.")
    return masks


def _regions(where: Place, regions: Iterable[PositionsLike]) -> list[np.ndarray[Any, Any]]:
    if isinstance(regions, Positions | Region | Selection | str):
        raise InputError(f"regions is a list of what is removed together, not one: [{regions!r}].")
    listed = list(regions.values() if isinstance(regions, Mapping) else regions)
    found = [_region(where, Positions.of(region)) for region in listed]
    if not found:
        raise InputError("regions is empty; leave it out, or give at least one region.")
    count = where.tokens.n_examples
    lost = [len(without_any(torch.from_numpy(mask), where.tokens.example, count)) for mask in found]
    warn_of_empty({Positions.of(one).text: n for one, n in zip(listed, lost, strict=True)}, count)
    return found


def _region(where: Place, region: Positions) -> np.ndarray[Any, Any]:
    """The positions of one region that are no padding."""
    mask = where.resolve(region).numpy() & present(where.kind)
    if not mask.any():
        raise InputError(f"{region.text!r} holds no position; leave empty regions out.")
    return mask


def _apart(mask: np.ndarray[Any, Any], alone: bool) -> list[np.ndarray[Any, Any]]:
    """A removal as it is, or for each row by itself where every row serves all examples."""
    if not alone:
        return [mask]
    rows = np.arange(len(mask))[:, None]
    return [mask & (rows == row) for row in np.flatnonzero(mask.any(1))]


def _columns(mask: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    for column in np.flatnonzero(mask.any(0)):
        only = np.zeros_like(mask)
        only[:, column] = mask[:, column]
        yield only


def _windows(where: Place, window: int, stride: int) -> Iterator[np.ndarray[Any, Any]]:
    """Windows of the patch grids, one image and tile of every example at a time: an example's effect then belongs to one row.

    Grids of different sizes have windows of their own. A position that mixes patches goes with every window that holds one of them.
    """
    tokens, first = where.tokens, where.dropped
    sets, views = tokens.patches, tokens.views
    patches = (sets.position >= first) & (tokens.kind[sets.row, sets.position] == "patch")
    alike: dict[tuple[int, ...], list[int]] = {}
    for view in np.unique(sets.source_row[patches]).tolist():
        key = (int(views.image[view]), int(views.tile[view]), *(int(cells) for cells in views.grid[view]))
        alike.setdefault(key, []).append(view)
    for (_, _, rows, columns), members in sorted(alike.items()):
        if window > min(rows, columns):
            raise InputError(f"A window of {window} × {window} does not fit the grid of {rows} × {columns} patches.")
        here = patches & np.isin(sets.source_row, members)
        for top, left in itertools.product(_starts(rows, window, stride), _starts(columns, window, stride)):
            inside = here & (sets.patch_row >= top) & (sets.patch_row < top + window)
            inside &= (sets.patch_col >= left) & (sets.patch_col < left + window)
            if inside.any():
                yield sets.mask(inside, tokens.kind.shape)[:, first:]


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last one ends at the border."""
    return sorted({*range(0, size - window + 1, stride), size - window})
