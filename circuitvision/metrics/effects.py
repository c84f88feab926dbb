"""What is said of measured effects: shares of a difference, flips, and transfer from one run to another.

A metric gives one number per example and run; these functions compare runs over examples. Ratios are ratios of means and never means of ratios, which
single examples with a small denominator would decide; where a denominator cannot be told from 0 (within two standard errors, or within rounding)
the ratio is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.statistics import standard_error

ROUNDING = 1e-5
"""Share of the metric's size below which the difference of two runs is rounding."""


class Transfer(NamedTuple):
    """How far an output went from ``b`` to ``a``, per example: :func:`transfer`."""

    beta: Float[Tensor, " example"]
    residual: Float[Tensor, " example"]


def restored_share(
    effect: Float[Tensor, "*axes example"],
    base: Float[Tensor, "*axes example"],
    source: Float[Tensor, "*axes example"],
) -> Float[Tensor, "*axes"]:
    """The normalised effect as a ratio of means: ``mean(effect) / mean(source - base)`` over the examples that have all three, in float64.

    1 where an edit makes the base what the source is, 0 where it does nothing. NaN where the two runs do not differ: where the denominator is within
    two standard errors of 0, or within rounding (:data:`ROUNDING` of the metric's size).
    """
    there = effect.isfinite() & base.isfinite() & source.isfinite()
    effect, base, source = (value.double().masked_fill(~there, torch.nan) for value in (effect, base, source))
    gap = source - base
    return _ratio(effect, gap, (source.abs() + base.abs()).nanmean(-1))


def restored_error(
    effect: Float[Tensor, "*axes example"],
    base: Float[Tensor, "*axes example"],
    source: Float[Tensor, "*axes example"],
) -> Float[Tensor, "*axes"]:
    """The standard error of :func:`restored_share` to first order: that of ``effect - share * gap``, by the size of the mean gap; NaN for one
    example.

    Source: the ratio estimator, Cochran, Sampling Techniques (1977), section 6.3.
    """
    share = restored_share(effect, base, source)
    gap = source.double() - base.double()
    rest = effect.double() - share[..., None] * gap
    return standard_error(rest) / gap.masked_fill(~rest.isfinite(), torch.nan).nanmean(-1).abs()


def share_of_mean(
    effect: Float[Tensor, "*axes example"], base: Float[Tensor, "*axes example"]
) -> Float[Tensor, "*axes"]:
    """``mean(effect) / mean(base)`` over the examples that have both: a change as a share of what was there; NaN where that cannot be told from 0."""
    there = effect.isfinite() & base.isfinite()
    effect, base = (value.double().masked_fill(~there, torch.nan) for value in (effect, base))
    return _ratio(effect, base, base.abs().nanmean(-1))


def fldd(patched: Float[Tensor, "*axes example"], clean: Float[Tensor, "*axes example"]) -> Float[Tensor, "*axes"]:
    """Fractional logit difference decrease, ``1 - mean(patched) / mean(clean)``, of logit differences in favour of the unpatched run's answer.

    0 where nothing happens, 1 at a tie, 2 where the preference is turned round exactly. It is no evidence that the *answer* changes: Makelov et al.
    2023 (arXiv 2311.17030) report 46 % beside an interchange accuracy of 4 %, so read it beside that. NaN where the clean difference cannot be told
    from 0.
    """
    return share_of_mean(clean - patched, clean.expand_as(patched))


def _ratio(
    above: Float[Tensor, "*axes example"], below: Float[Tensor, "*axes example"], size: Float[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    floor = torch.maximum(2 * standard_error(below).nan_to_num(0.0), ROUNDING * size)
    return torch.where(below.nanmean(-1).abs() > floor, above.nanmean(-1) / below.nanmean(-1), torch.nan)


def flip_layer(
    values: Float[Tensor, "*axes layer example"], layers: Sequence[int] | None = None, threshold: float = 0.0
) -> Float[Tensor, "*axes example"]:
    """The first layer from which on patching leaves the answer what it is at the last one, per example.

    ``values`` are those of a metric that tells two answers apart by ``threshold`` (a logit difference by 0), patched at one layer at a time. Patched
    early, positions still hand on what they hold, and the answer is the source's; from the flip on it has been read, and stays the base's (PopVQA,
    Cohen et al. 2024, arXiv 2412.14133). NaN where the answer is the same at all layers, or one is NaN.

    Raises:
        InputError: a threshold that is no number, or not one label per layer.
    """
    count = values.shape[-2]
    labels = list(range(count)) if layers is None else [int(layer) for layer in layers]
    if len(labels) != count:
        raise InputError(f"There are {len(labels)} layers for {count} of the values.")
    over = values > threshold
    other = over != over[..., -1:, :]
    # The last layer whose answer differs from the end's; the flip is right behind it.
    last = count - 1 - other.flip(-2).int().argmax(-2)
    there = other.any(-2) & ~values.isnan().any(-2)
    found = torch.tensor(labels, dtype=torch.float64)[(last + 1).clamp(max=count - 1).cpu()]
    return found.masked_fill(~there.cpu(), torch.nan)


def transfer(
    y: Float[Tensor, "example ..."], a: Float[Tensor, "example ..."], b: Float[Tensor, "example ..."]
) -> Transfer:
    """The transfer coefficient ``β = ⟨y − b, a − b⟩ / ‖a − b‖²`` and the residual ``‖y − b − β (a − b)‖ / ‖a − b‖``, in float64, per example.

    0 stays ``b``, 1 becomes ``a``, and the residual is what moved in no such direction. NaN, with a warning, where ``a`` and ``b`` do not differ (by
    more than rounding: 1e-6 of their size). Source: Grant et al. 2026 (arXiv 2603.19233) on injection between episodes, whose override rate
    saturates where β does not.

    Raises:
        InputError: outputs of different shapes.
    """
    if not y.shape == a.shape == b.shape:
        raise InputError(f"Outputs of shapes {tuple(y.shape)}, {tuple(a.shape)}, {tuple(b.shape)} do not compare.")
    moved, way = ((one.double() - b.double()).flatten(1) for one in (y, a))
    length = way.norm(dim=1)
    size = torch.maximum(*(one.double().flatten(1).norm(dim=1) for one in (a, b)))
    same = length <= 1e-6 * size
    if bool(same.any()):
        warn(f"In {int(same.sum())} of {len(same)} examples the two runs do not differ: no β, NaN.")
    length = length.masked_fill(same, torch.nan)
    beta = (moved * way).sum(1) / length.square()
    return Transfer(beta, (moved - beta[:, None] * way).norm(dim=1) / length)
