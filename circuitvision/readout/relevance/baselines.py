"""What *removed* means: the values that take the place of those that are taken out, one vocabulary for every method here.

* ``"mean"``: the mean over the rows of the *other* examples of the run at the same position (or pixel), so that nothing of the example itself is
  left in it, nor of its other images, tiles or cameras. What holds nothing does not count: padding, cells outside a grid, cameras that are not
  there, tiles that only fill up a batch. Positions must line up: the same kind, and of patches the same place in the grid;
* inputs of a data set: the mean over its rows at the same position, the same for every row; its prompts may be longer or shorter where they line up;
* ``"zero"``; of pixels this is the colour that the processor normalises to 0, and ``"black"`` is black;
* ``"own"``: the mean over the row's own positions of the same kind (every patch becomes the image's average patch), or the picture's own mean
  colour. It keeps the answer wherever an average keeps it: shapes-vit still names the right shape in 91 % of pictures when *all* of their
  patches are their own mean;
* ``"blur"``, of pixels: the picture through a Gaussian whose standard deviation is an eighth of its shorter side. What is large keeps its colour;
* a number, or a tensor or array that broadcasts to the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.averages import Tally, check_aligned
from circuitvision.model.tokens import ABSENT, present
from circuitvision.readout.relevance.variables import (
    PIXELS,
    AttributionInput,
    Place,
    differentiating,
    pixels_of,
    place_of,
    rows_of_pixels,
    usable,
    wide_type,
)

Baseline = str | float | Tensor | np.ndarray | Mapping[str, Any]
"""What values become where they are removed, see the module."""
_WORDS = ("mean", "zero", "own")
_BLUR = 8


def start_of(variable: AttributionInput, baseline: Baseline, needed: Bool[Tensor, "row pos"] | None = None) -> Tensor:
    """What the values of a variable become where they are removed, see the module; ``needed`` says where that is (None: everywhere).

    Raises:
        InputError: an unknown word; ``"mean"`` where no other row has a value; a data set whose values have another shape; ``"black"`` without a
        processor that says what black is; a tensor that does not broadcast, or holds no number.
    """
    value = variable.value
    of_pixels = variable.site == PIXELS
    if isinstance(baseline, Mapping):
        return _mean_of_data(variable, baseline, needed)
    if baseline is None:
        raise InputError(
            "Say what values become where they are removed: baseline='own', 'zero', inputs of a data set, …"
        )
    if not isinstance(baseline, str):
        return _broadcast(baseline, value)
    words = (*_WORDS, "black", "blur") if of_pixels else _WORDS
    if baseline not in words:
        raise InputError(
            f"baseline={baseline!r} is not understood: {', '.join(map(repr, words))}, inputs, a number, or a tensor."
        )
    if baseline == "zero":
        return torch.zeros_like(value)
    if baseline == "black":
        return _black(variable)
    if baseline == "blur":
        return _blurred(value)
    if baseline == "mean":
        return _mean_of_others(variable, needed)
    if of_pixels:
        return value.mean((-2, -1), keepdim=True).expand_as(value)
    return _mean_of_kind(value, variable.place)


def _mean_of_others(variable: AttributionInput, needed: Tensor | None) -> Tensor:
    value, example = variable.value, _example_of_row(variable)
    if len(example.unique()) == 1:
        raise InputError(
            "The mean over the other examples of the run needs another one. Give the inputs of a data set as baseline, 'zero', or 'own' (which keeps "
            "what an average keeps)."
        )
    if variable.site != PIXELS:
        _check_aligned(variable, [variable.place], needed)
    counted = _counted(variable.model, variable.inputs, value, variable.place, variable.site)
    sums = torch.where(counted, value, 0.0).to(wide_type(value))
    mean, others = _without_own(sums, counted, example.to(value.device))
    return _where_there(mean.to(value), others > 0, variable, needed, "other example of the run")


def _example_of_row(variable: AttributionInput) -> Tensor:
    """The example of every row of the values: of pixels, of every picture."""
    example = torch.from_numpy(variable.place.tokens.example)
    if variable.site != PIXELS:
        return example
    parts = variable.value.shape[1] if variable.value.ndim == 5 else 1
    rows = torch.tensor(rows_of_pixels(variable.model, variable.inputs))
    return torch.zeros(len(variable.value), dtype=example.dtype).index_copy(0, rows // parts, example)


def _without_own(sums: Tensor, counted: Tensor, example: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the rows of other examples, and over how many."""
    count = int(example.max()) + 1
    own, rows = (
        part.new_zeros(count, *part.shape[1:]).index_add_(0, example, part)[example] for part in (sums, counted.long())
    )
    others = counted.long().sum(0, keepdim=True) - rows
    return (sums.sum(0, keepdim=True) - own) / others.clamp_min(1), others


def _mean_of_data(variable: AttributionInput, inputs: Mapping[str, Any], needed: Tensor | None) -> Tensor:
    inputs = usable(variable.model, inputs)
    if variable.site == PIXELS:
        return _mean_of_pictures(variable, pixels_of(inputs), inputs, needed)
    with differentiating(False):
        _, cache = variable.model.run_with_cache(inputs, names_filter=[variable.site])
    found = cache[variable.site]
    if found.shape[2:] != variable.value.shape[2:]:
        raise InputError(
            f"The data set has values {tuple(found.shape)} at {variable.site}, the run {tuple(variable.value.shape)}."
        )
    place = place_of(variable.model, inputs, variable.site, found.shape)
    _check_aligned(variable, [place], needed)
    tally = Tally(variable.site, "position")
    tally.add(found, place.layout)
    source, _ = tally.source(variable.place.layout)
    there = tally.counted(variable.place.layout).to(source.device) > 0
    there = there.view(1, -1, *[1] * (variable.value.ndim - 2))
    mean = source.to(variable.value).expand_as(variable.value)
    return _where_there(mean, there, variable, needed, "row of the data set")


def _mean_of_pictures(
    variable: AttributionInput, found: Tensor, inputs: Mapping[str, Any], needed: Tensor | None
) -> Tensor:
    if found.shape[1:] != variable.value.shape[1:]:
        raise InputError(
            f"The data set has pixels {tuple(found.shape)}, the run {tuple(variable.value.shape)}: a mean needs images of one size."
        )
    place = place_of(variable.model, inputs, PIXELS, found.shape)
    counted = _counted(variable.model, inputs, found, place, PIXELS)
    sums = torch.where(counted, found, 0.0).to(wide_type(found)).sum(0, keepdim=True)
    mean = (sums / counted.sum(0, keepdim=True).clamp_min(1)).to(variable.value)
    there = (counted.sum(0, keepdim=True) > 0).to(variable.value.device)
    return _where_there(mean.expand_as(variable.value), there, variable, needed, "row of the data set")


def _check_aligned(variable: AttributionInput, data: Sequence[Place], needed: Tensor | None) -> None:
    run = variable.place.layout
    wanted = run.there if needed is None else needed.cpu().numpy()
    try:
        check_aligned(run, [place.layout for place in data], wanted, of_run=False)
    except InputError as error:
        what = str(error).split(" Take average=")[0].rstrip(".")
        raise InputError(
            f"A mean needs positions that line up: {what}. Give baseline='own', 'zero', or inputs of a data set that do."
        ) from error


def _counted(model: Any, inputs: Mapping[str, Any], value: Tensor, place: Place, site: str) -> Bool[Tensor, "row ..."]:
    """Where a value is of something that is there, with an axis of one for every further axis of the values."""
    if site == PIXELS:
        pictures = value.shape[:-3]
        real = torch.zeros(pictures.numel(), dtype=torch.bool)
        real[rows_of_pixels(model, inputs)] = torch.from_numpy(place.tokens.present.any(1))
        return real.view(*pictures, 1, 1, 1).to(value.device)
    real = torch.from_numpy(present(place.kind)).to(value.device)
    return real.view(*real.shape, *[1] * (value.ndim - 2))


def _where_there(mean: Tensor, there: Tensor, variable: AttributionInput, needed: Tensor | None, what: str) -> Tensor:
    """The mean, and the values as they are where there is none and none is needed."""
    if variable.site == PIXELS:
        real = _counted(variable.model, variable.inputs, variable.value, variable.place, PIXELS)
        if bool((real & ~there).any()):
            raise InputError(
                f"No {what} has as many tiles as some picture here: a mean needs pictures cut alike. Give baseline='own', 'zero', or inputs of a "
                "data set."
            )
        return torch.where(real, mean, variable.value)
    real = torch.from_numpy(present(variable.place.kind))
    wanted = real if needed is None else real & needed.cpu()
    missing = (wanted & ~there.reshape(there.shape[:2]).cpu()).nonzero().tolist()
    if missing:
        row, position = missing[0]
        raise InputError(
            f"No {what} has a value at position {position + variable.place.dropped}, where row {row} has one: a mean needs images of one size "
            "and prompts of one length. Give baseline='own', 'zero', or inputs of a data set."
        )
    there = there & real.to(there.device).view(*real.shape, *[1] * (mean.ndim - 2))
    return torch.where(there, mean, variable.value)


def _mean_of_kind(value: Tensor, place: Place) -> Tensor:
    out = value.clone()
    kinds = place.kind
    images = place.tokens.image_number[:, place.dropped :]
    for row in range(value.shape[0]):
        for kind, image in set(zip(kinds[row].tolist(), images[row].tolist(), strict=True)):
            if kind not in ABSENT:
                same = torch.from_numpy((kinds[row] == kind) & (images[row] == image)).to(value.device)
                out[row, same] = value[row, same].to(wide_type(value)).mean(0).to(value)
    return out


def _black(variable: AttributionInput) -> Tensor:
    processor = getattr(variable.model.processor, "image_processor", variable.model.processor)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None:
        raise InputError("Only a processor with image_mean and image_std knows which value is black; give a tensor.")
    black = -torch.tensor(mean) / torch.tensor(std)
    return _broadcast(black[:, None, None], variable.value)


def _blurred(value: Float[Tensor, "*picture channel height width"]) -> Tensor:
    """Both ways through a Gaussian, the border's colours going on beyond it."""
    height, width = value.shape[-2:]
    sigma = min(height, width) / _BLUR
    reach = math.ceil(3 * sigma)
    away = torch.arange(-reach, reach + 1, dtype=wide_type(value), device=value.device)
    bell = torch.exp(-0.5 * (away / sigma).square())
    bell = bell / bell.sum()
    planes = value.to(bell).reshape(-1, 1, height, width)
    planes = torch.nn.functional.pad(planes, [reach] * 4, mode="replicate")
    planes = torch.nn.functional.conv2d(planes, bell[None, None, :, None])
    planes = torch.nn.functional.conv2d(planes, bell[None, None, None])
    return planes.view(value.shape).to(value)


def _broadcast(baseline: float | Tensor | np.ndarray, value: Tensor) -> Tensor:
    try:
        broadcast = torch.as_tensor(baseline, dtype=value.dtype, device=value.device).detach().expand_as(value)
    except (RuntimeError, TypeError, ValueError) as error:
        shape = tuple(np.shape(baseline))
        raise InputError(
            f"A baseline of shape {shape} does not broadcast to the values, {tuple(value.shape)}."
        ) from error
    if not bool(broadcast.isfinite().all()):
        raise InputError("The baseline holds values that are no numbers (NaN or infinite).")
    return broadcast


def short_repr(baseline: Baseline) -> str:
    """A baseline in a word."""
    if isinstance(baseline, str):
        return baseline
    if isinstance(baseline, Mapping):
        return "mean of given inputs"
    return f"{baseline:g}" if isinstance(baseline, int | float) else "given"
