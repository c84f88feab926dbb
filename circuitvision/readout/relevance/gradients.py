"""Relevance: how much each image patch, word or pixel of the input did for a metric of the output.

One result type, :class:`~circuitvision.readout.relevance.result.Relevance`, for every method. Positive values support the metric, negative
ones work against it. Four kinds of method, with different claims:

* :func:`gradient_times_activation` (here): the first-order effect of scaling a value up. Cheap, local, and exact only for linear models.
* :func:`integrated_gradients` (here): the same gradient averaged along the straight way from a baseline. Values add up to what the metric
  changes between baseline and input (*completeness*); the result says how far they miss it.
* :func:`~circuitvision.readout.relevance.removal.occlusion`: what really happens when one place is removed, all else kept. Not additive.
* :func:`~circuitvision.readout.relevance.attention.legrad`, :func:`~circuitvision.readout.relevance.attention.chefer_relevance`: attention
  weighted by its gradient. Never negative, in no unit, comparable within one image only.

Whether a map tells what the model used is measured, not seen: :func:`~circuitvision.readout.relevance.curves.perturbation_curve`,
:func:`~circuitvision.readout.relevance.pointing.pointing_game`.

The metric is summed over examples before it is differentiated; examples of one run do not see each other, so each gets its own gradient. The
texts of a dual encoder are the exception: all images are compared with each, and their relevance is for the sum.

Not covered: baselines drawn from data (expected gradients), noise averaging, layer-wise relevance propagation.

References: Sundararajan et al. 2017 (arXiv 1703.01365) for integrated gradients, completeness, and the gradient times input it corrects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.incremental.routes import rows_serve_all
from circuitvision.model.positions import Positions, PositionsLike, warn_of_empty, without_any
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.patch_coords import places_of, shares_of
from circuitvision.readout.relevance.baselines import Baseline, short_repr, start_of
from circuitvision.readout.relevance.result import Relevance, warn_undefined
from circuitvision.readout.relevance.variables import (
    PIXELS,
    AttributionInput,
    image_tower,
    rows_of_pixels,
    wide,
)

LARGEST_GAP = 0.05
"""Share of the metric's change that the values may miss before integrated gradients warns."""


@with_provenance
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
    place = AttributionInput(model, inputs, metric, site or f"{image_tower(model)}.hook_input")
    _, slopes = place([place.value])
    values = wide(place.value) * wide(slopes[0])
    return _result(place, values, f"gradient × {_noun(place)}", metric)


@with_provenance
def integrated_gradients(
    model: Any,
    inputs: Mapping[str, Any],
    metric: Any,
    *,
    site: str | None = None,
    baseline: Baseline = "mean",
    positions: PositionsLike = None,
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
        baseline: ``x0``, see :mod:`circuitvision.readout.relevance.baselines`; by default the mean over the other rows of the run.
        positions: only these leave the baseline, the others are at their own value all the way: see
            :mod:`circuitvision.model.positions`. Only for sites.
        steps: points of the path.
        rule: ``"gauss-legendre"`` (exact for polynomials of degree ``2 steps - 1``) or ``"midpoint"``.
        steps_at_once: points that run as one batch; by default as many as make 1024 positions.

    Raises:
        InputError: as :func:`gradient_times_activation`; an unknown rule or baseline, positions of another shape.
    """
    _check_rule(rule, steps, steps_at_once)
    place = AttributionInput(model, inputs, metric, site or f"{image_tower(model)}.hook_input")
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
        f"integrated gradients{' of pixels' if place.site == PIXELS else ''} ({steps} × {rule}, baseline {short_repr(baseline)})",
        metric,
    )
    change = wide(place.metric_value) - wide(baseline_value)
    if rows_serve_all(model, result.tower):
        change = change.sum(0, keepdim=True)
    gap = _totals(result, model, len(change)) - change
    _warn_of_gap(gap, change)
    return dataclasses.replace(result, baseline_value=wide(baseline_value), completeness_gap=gap)


def _check_rule(rule: str, steps: int, steps_at_once: int | None) -> None:
    counts = [steps, steps if steps_at_once is None else steps_at_once]
    if rule not in ("gauss-legendre", "midpoint") or not all(isinstance(n, Integral) and n >= 1 for n in counts):
        raise InputError(
            f"rule={rule!r} with steps={steps!r} and steps_at_once={steps_at_once!r} is not understood: 'gauss-legendre' or 'midpoint', and whole "
            "numbers from 1 on."
        )


def _start(place: AttributionInput, baseline: Baseline, positions: PositionsLike) -> Tensor:
    if place.site == PIXELS:
        if positions is not None:
            raise InputError("positions chooses among the positions of a site; for pixels give a baseline tensor.")
        return start_of(place, baseline)
    if positions is None:
        return start_of(place, baseline)
    where = place.place
    mask = where.resolve(Positions.of(positions))
    if mask.shape[1] != place.value.shape[1]:
        raise InputError(f"{place.site} has no positions of its own; leave positions out.")
    warn_of_empty(
        {Positions.of(positions).text: len(without_any(mask, where.tokens.example, where.tokens.n_examples))},
        where.tokens.n_examples,
    )
    start = start_of(place, baseline, mask)
    return torch.where(mask.to(start.device).view(*mask.shape, *[1] * (start.ndim - 2)), start, place.value)


def _quadrature(steps: int, rule: str) -> tuple[list[float], list[float]]:
    """Nodes and weights on 0 … 1."""
    if rule == "midpoint":
        return [(step + 0.5) / steps for step in range(steps)], [1.0 / steps] * steps
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _warn_of_gap(gap: Tensor, change: Tensor) -> None:
    # A change of rounding size has no meaningful share; of NaN nothing is known, and the values say so themselves.
    missed = (gap.abs() > LARGEST_GAP * change.abs()) & (gap.abs() > 1e-6)
    if bool(missed.any()):
        worst = int((gap.abs() / change.abs().clamp_min(1e-12)).argmax())
        warn(
            f"In {int(missed.sum())} of {len(gap)} cases the integrated gradients miss the metric's change by more than "
            f"{LARGEST_GAP:.0%} (worst: {float(gap[worst]):+.3g} of {float(change[worst]):+.3g}). Take more steps, or a baseline that is no zero "
            "before a norm."
        )


def _totals(result: Relevance, model: Any, examples: int) -> Tensor:
    """What the values of each example add up to; of all rows, where they serve all examples."""
    sums = result.values.flatten(0, -2).sum(0)
    if rows_serve_all(model, result.tower):
        return sums.sum(0, keepdim=True)
    return torch.zeros(examples, dtype=sums.dtype).index_add(0, torch.tensor(result.axes["example"]), sums)


def _result(place: AttributionInput, values: Tensor, method: str, metric: Any) -> Relevance:
    """Contributions of single numbers, in the shape of the place, as a result."""
    warn_undefined(values)
    if place.site != PIXELS:
        return result_at(place, values.sum(-1), method, metric)
    maps = values.sum(-3)
    maps = maps.reshape(-1, *maps.shape[-2:])[rows_of_pixels(place.model, place.inputs)]
    return result_at(place, maps, method, metric)


def result_at(place: AttributionInput, values: Tensor, method: str, metric: Any) -> Relevance:
    """Values per position (and head), or per pixel, of a variable as a result."""
    where = place.place
    if place.site == PIXELS:
        axes = {"down": list(range(values.shape[1])), "across": list(range(values.shape[2]))}
    else:
        axes = {"position": list(range(where.dropped, where.tokens.n_positions))}
        axes |= {"head": list(range(values.shape[2]))} if values.ndim == 3 else {}
    return Relevance(
        values=values.movedim(0, -1),
        axes={**axes, "example": where.tokens.example.tolist()},
        provenance=describe(place.model, method=method, metric=metric, inputs=(place.inputs,), site=place.site),
        method=method,
        tower=where.tokens.tower,
        site=place.site,
        metric_value=wide(place.metric_value),
        places=places_of(where.tokens, where.dropped),
        shares=shares_of(where.tokens, where.dropped),
        labels=where.labels,
        kinds=where.kind.tolist(),
    )


def _noun(place: AttributionInput) -> str:
    return "pixel" if place.site == PIXELS else "activation"
