"""Relevance: how much each image patch, word or pixel of the input did for a metric of the output.

One result type, :class:`Relevance`, for every method. Positive values support the metric, negative ones work against it. Four kinds of method,
with different claims:

* :func:`gradient_times_activation` (here): the first-order effect of scaling a value up. Cheap, local, and exact only for linear models.
* :func:`integrated_gradients` (here): the same gradient averaged along the straight way from a baseline. Values add up to what the metric
  changes between baseline and input (*completeness*); the result says how far they miss it.
* :func:`~circuitvision.readout.relevance.removal.occlusion`: what really happens when one place is removed, all else kept. Not additive.
* :func:`~circuitvision.readout.relevance.attention.legrad`, :func:`~circuitvision.readout.relevance.attention.chefer_relevance`: attention
  weighted by its gradient. Never negative, in no unit, comparable within one image only.

Whether a map tells what the model used is measured, not seen: :func:`~circuitvision.readout.relevance.curves.deletion_curve`,
:func:`~circuitvision.readout.relevance.pointing.pointing_game`.

The metric is summed over examples before it is differentiated; examples of one run do not see each other, so each gets its own gradient. The
texts of a dual encoder are the exception: all images are compared with each, and their relevance is for the sum.

Not covered: baselines drawn from data (expected gradients), noise averaging, layer-wise relevance propagation.

References: Sundararajan et al. 2017 (arXiv 1703.01365) for integrated gradients, completeness, and the gradient times input it corrects.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.selection import Selection
from circuitvision.progress import track
from circuitvision.provenance import describe
from circuitvision.readout.places import on_grid, places_of
from circuitvision.readout.relevance.variables import (
    PIXELS,
    Baseline,
    Variable,
    brief,
    image_tower,
    rows_of_pixels,
    rows_serve_all,
    start_of,
    wide,
)
from circuitvision.results import Result

LARGEST_GAP = 0.05
"""Share of the metric's change that the values may miss before integrated gradients warns."""


@dataclass(frozen=True, eq=False)
class Relevance(Result):
    """Relevance of every position of a tower, ``[row position]``, or of every pixel, ``[row down across]``.

    At sites with heads there is one more axis, ``head``. Rows are the tower's: images, tiles or cameras of a vision tower, examples of a
    language tower; ``example`` says whose each is. ``site`` is where the values were, or ``"pixels"``. Positions that were not measured are
    NaN.

    ``places`` (``[row position 4]``: image, tile, patch row, patch column, -1 where a position is no patch) and ``labels`` name the positions;
    for pixels, those of the image tower's patches. ``metric_value`` is the metric per example, ``baseline_value`` that of the baseline, and
    ``completeness_gap`` the sum of an example's values minus the difference of the two; both are empty where a method has none.
    """

    method: str = ""
    tower: str = ""
    site: str = ""
    metric_value: Tensor = field(default_factory=lambda: torch.zeros(0))
    baseline_value: Tensor = field(default_factory=lambda: torch.zeros(0))
    completeness_gap: Tensor = field(default_factory=lambda: torch.zeros(0))
    places: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 4, dtype=torch.long))
    example: list[int] = field(default_factory=list)
    labels: list[list[str]] = field(default_factory=list)

    @property
    def of_pixels(self) -> bool:
        """Whether the values are of pixels, not of positions."""
        return self.site == PIXELS

    @property
    def per_position(self) -> Float[Tensor, "row position"]:
        """Values summed over heads, and for pixels over each patch; what was not measured stays NaN."""
        if self.of_pixels:
            return self.on_patches().values
        return self.values if self.values.ndim == 2 else self.values.sum(-1)

    def on_image(self, row: int = 0, image: int | None = None, tile: int | None = None) -> Float[Tensor, "down across"]:
        """One row's values on the patch grid of one of its images (``None``: its first), or its pixels; NaN where nothing was measured.

        Raises:
            InputError: no position of the row is a patch of that image and tile.
        """
        if not self.of_pixels:
            return on_grid(self.per_position[row], self.places[row], self._image(row, image), tile)
        on_grid(torch.zeros(self.places.shape[1]), self.places[row], self._image(row, image), tile)
        return self.values[row]

    def per_pixel(
        self,
        row: int = 0,
        size: tuple[int, int] = (224, 224),
        image: int | None = None,
        tile: int | None = None,
        smooth: bool = False,
    ) -> Float[Tensor, "height width"]:
        """The map of :meth:`on_image` scaled to ``size`` (height, width): every pixel has its patch's value, or with ``smooth`` one interpolated
        between patches. For showing and for masks; the values no longer add up to the metric.
        """
        grid = self.on_image(row, image, tile)[None, None]
        if smooth:
            return torch.nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0]
        return torch.nn.functional.interpolate(grid, size=size, mode="nearest-exact")[0, 0]

    def on_patches(self) -> Relevance:
        """Pixels summed over each patch, which keeps what they add up to; a relevance of positions is returned as it is."""
        if not self.of_pixels:
            return self
        patches = self.places[..., 2] >= 0
        rows, columns = ((self.places[..., axis].amax(1) + 1).tolist() for axis in (2, 3))
        values = torch.full(self.places.shape[:2], float("nan"), dtype=self.values.dtype)
        for row, (down, across) in enumerate(zip(rows, columns, strict=True)):
            height, width = self.values.shape[1] // down, self.values.shape[2] // across
            whole = self.values[row, : down * height, : across * width]
            sums = whole.reshape(down, height, across, width).sum((1, 3))
            here = patches[row]
            values[row, here] = sums[self.places[row, here, 2], self.places[row, here, 3]]
        axes = {"row": self.axes["row"], "position": list(range(values.shape[1]))}
        return dataclasses.replace(self, values=values, axes=axes, site=f"{PIXELS} of patches")

    def _image(self, row: int, image: int | None) -> int:
        numbers = self.places[row, self.places[row, :, 2] >= 0, 0]
        return image if image is not None else int(numbers.min()) if len(numbers) else 0


def gradient_times_activation(
    model: Any, inputs: Mapping[str, Any], metric: Any, *, site: str | None = None
) -> Relevance:
    """``relevance[p] = Σ_d x[p, d] · ∂metric/∂x[p, d]``: how fast the metric would grow if the values of a position were scaled up.

    In the metric's units. One run forward and backward.

    Args:
        model: the hooked model.
        inputs: inputs of one run.
        metric: ``metric(logits, inputs) -> [example]``, see :mod:`circuitvision.metrics`.
        site: where the values are: a name, or ``"pixels"`` (as the processor normalised them, so a pixel of its mean colour is 0). By default
        what enters the first image tower. ``"language.hook_input"`` gives every image patch and word of the prompt.

    Raises:
        InputError: a site that is not one value per position, or is dead; a metric without a gradient.
    """
    place = Variable(model, inputs, metric, site or f"{image_tower(model)}.hook_input")
    _, slopes = place([place.value])
    values = wide(place.value) * wide(slopes[0])
    return _result(place, values, f"gradient × {_noun(place)}", metric)


def integrated_gradients(
    model: Any,
    inputs: Mapping[str, Any],
    metric: Any,
    *,
    site: str | None = None,
    baseline: Baseline = "mean",
    positions: Selection | Tensor | None = None,
    steps: int = 64,
    rule: str = "gauss-legendre",
    steps_at_once: int | None = None,
) -> Relevance:
    """The metric's change from a baseline ``x0`` to the input ``x``, shared out over positions.

    ``relevance[p] = Σ_d (x - x0)[p, d] · ∫₀¹ ∂metric/∂x[p, d] (x0 + α (x - x0)) dα``, in the metric's units. The values of an example sum to
    ``metric(x) - metric(x0)``; how far they miss it is the result's ``completeness_gap``, and more than 5 % of the change is announced by a
    warning.

    A zero baseline at a site before a layer norm is a bad choice: the norm makes the metric depend on the direction alone, so that all of the
    change happens in the last step before zero, where no rule of a few steps sees it.

    Args:
        model, inputs, metric, site: as in :func:`gradient_times_activation`.
        baseline: ``x0``, see :mod:`circuitvision.readout.relevance.variables`; by default the mean over the other rows of the run.
        positions: only these leave the baseline, the others are at their own value all the way: a selection of a token map or a bool mask ``[row
            position]``. Only for sites.
        steps: points of the path.
        rule: ``"gauss-legendre"`` (exact for polynomials of degree ``2 steps - 1``) or ``"midpoint"``.
        steps_at_once: points that run as one batch; by default as many as make 1024 positions.

    Raises:
        InputError: as :func:`gradient_times_activation`; an unknown rule or baseline, positions of another shape.
    """
    if rule not in ("gauss-legendre", "midpoint") or steps < 1:
        raise InputError(
            f"rule={rule!r} with {steps} steps is not understood: 'gauss-legendre' or 'midpoint', 1 or more."
        )
    place = Variable(model, inputs, metric, site or f"{image_tower(model)}.hook_input")
    start = _start(place, baseline, positions)
    nodes, weights = _quadrature(steps, rule)
    away = wide(place.value) - wide(start)
    (baseline_value,), _ = place([start], gradients=False)
    total = torch.zeros_like(away)
    batch = steps_at_once or place.at_once()
    for first in track(range(0, steps, batch), "integrated gradients"):
        part = slice(first, first + batch)
        points = [wide(start) + alpha * away for alpha in nodes[part]]
        _, slopes = place(points)
        total += torch.einsum("s,s...->...", torch.tensor(weights[part], dtype=total.dtype), wide(slopes).to(total))
    result = _result(
        place,
        away * total,
        f"integrated gradients{' of pixels' if place.site == PIXELS else ''} ({steps} × {rule}, baseline {brief(baseline)})",
        metric,
    )
    change = wide(place.metric_value) - wide(baseline_value)
    gap = _totals(result, model, len(change)) - (change.sum(0, keepdim=True) if _shared(result, model) else change)
    _warn_of_gap(gap, change.sum(0, keepdim=True) if _shared(result, model) else change)
    return dataclasses.replace(result, baseline_value=wide(baseline_value), completeness_gap=gap)


def _start(place: Variable, baseline: Baseline, positions: Selection | Tensor | None) -> Tensor:
    if place.site == PIXELS:
        if positions is not None:
            raise InputError("positions chooses among the positions of a site; for pixels give a baseline tensor.")
        return start_of(place, baseline)
    start = start_of(place, baseline)
    if positions is None:
        return start
    where = place.place
    mask = positions.tensor if isinstance(positions, Selection) else positions
    mask = mask[:, where.dropped :] if mask.shape[-1] == where.tokens.n_positions else mask
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(place.value.shape[:2]):
        raise InputError(
            f"positions is a bool mask of {tuple(place.value.shape[:2])} rows and positions at {place.site}, "
            f"not {mask.dtype} of {tuple(mask.shape)}."
        )
    return torch.where(mask.to(start.device).view(*mask.shape, *[1] * (start.ndim - 2)), start, place.value)


def _quadrature(steps: int, rule: str) -> tuple[list[float], list[float]]:
    """Nodes and weights on 0 … 1."""
    if rule == "midpoint":
        return [(step + 0.5) / steps for step in range(steps)], [1.0 / steps] * steps
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _warn_of_gap(gap: Tensor, change: Tensor) -> None:
    missed = gap.abs() > LARGEST_GAP * change.abs()
    # A change of rounding size has no meaningful share.
    missed &= gap.abs() > 1e-6
    if bool(missed.any()):
        worst = int((gap.abs() / change.abs().clamp_min(1e-12)).argmax())
        warnings.warn(
            f"In {int(missed.sum())} of {len(gap)} cases the integrated gradients miss the metric's change by more than "
            f"{LARGEST_GAP:.0%} (worst: {float(gap[worst]):+.3g} of {float(change[worst]):+.3g}). Take more steps, or a baseline that is no zero "
            "before a norm.",
            stacklevel=3,
        )


def _shared(result: Relevance, model: Any) -> bool:
    return rows_serve_all(model, result.tower)


def _totals(result: Relevance, model: Any, examples: int) -> Tensor:
    """What the values of each example add up to; of all rows, where they serve all examples."""
    sums = result.values.flatten(1).sum(1)
    if _shared(result, model):
        return sums.sum(0, keepdim=True)
    return torch.zeros(examples, dtype=sums.dtype).index_add(0, torch.tensor(result.example), sums)


def _result(place: Variable, values: Tensor, method: str, metric: Any) -> Relevance:
    """Contributions of single numbers, in the shape of the place, as a result."""
    if place.site != PIXELS:
        return result_at(place, values.sum(-1), method, metric)
    maps = values.sum(-3)
    maps = maps.reshape(-1, *maps.shape[-2:])[rows_of_pixels(place.model, place.inputs)]
    return result_at(place, maps, method, metric)


def result_at(place: Variable, values: Tensor, method: str, metric: Any) -> Relevance:
    """Values per position (and head), or per pixel, of a variable as a result."""
    where, axes = place.place, {"row": list(range(values.shape[0]))}
    if place.site == PIXELS:
        axes |= {"down": list(range(values.shape[1])), "across": list(range(values.shape[2]))}
    else:
        axes |= {"position": list(range(where.dropped, where.tokens.n_positions))}
        axes |= {"head": list(range(values.shape[2]))} if values.ndim == 3 else {}
    return Relevance(
        values=values,
        axes=axes,
        provenance=describe(place.model, method=method, metric=metric, inputs=(place.inputs,), site=place.site),
        method=method,
        tower=where.tokens.tower,
        site=place.site,
        metric_value=wide(place.metric_value),
        places=places_of(where.tokens, where.dropped),
        example=where.tokens.example.tolist(),
        labels=where.labels,
    )


def _noun(place: Variable) -> str:
    return "pixel" if place.site == PIXELS else "activation"
