"""What results of steering show, as findings that are held against a control.

``steers`` against random sets of neurons or random directions, ``separates`` against kinds that changed places, ``injects`` against the region that
carries least, ``listens`` against the same scenes under another prompt, ``succeeds`` against another condition's interval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitvision.findings import ALONE, Finding
from circuitvision.statistics import wilson
from circuitvision.steering.injection import ALL

if TYPE_CHECKING:
    from torch import Tensor

    from circuitvision.steering.directions import Direction
    from circuitvision.steering.injection import InjectionResult
    from circuitvision.steering.prompts import PromptConditions
    from circuitvision.steering.response import SteeringResponse
    from circuitvision.steering.rollouts import ClosedLoop

FEWEST_DRAWS = 19
"""So many random sets must be beaten where p is to be .05."""


def steers(result: SteeringResponse) -> Finding:
    """Whether the chosen set moves the metric: the interval of its slope leaves 0 out, and no random set of at least :data:`FEWEST_DRAWS` has as
    large a slope (``chance``: the largest).
    """
    slopes = result.slopes()
    mean, interval = slopes.mean(), _ends(slopes.interval()[:, 0])
    draws = len(mean) - 1
    along = bool(result.site)
    unit = {"deviation": "standard deviation", "value": "unit of scale" if along else "unit of activation"}[
        result.units
    ]
    about = {
        "set": f"“{result.name}”",
        "metric": str(result.provenance.get("metric") or "the metric"),
        "unit": "unit of factor" if result.method == "scale" else unit,
        "draws": str(draws),
        "controls": "random directions" if along else "random sets",
    }
    if not draws:
        return Finding("steers", None, float(mean[0]), "slope", interval, len(slopes.examples), about=about)
    chance = float(mean[1:].abs().max())
    if interval is not None and interval[0] <= 0 <= interval[1]:
        reason = "its interval holds 0"
    elif not abs(float(mean[0])) > chance:
        reason = f"{about['controls']} do as much"
    else:
        reason = "" if draws >= FEWEST_DRAWS else f"too few {about['controls']} tell"
    return Finding("steers", not reason, float(mean[0]), "slope", interval, len(slopes.examples), chance, reason, about)


def separates(result: Direction) -> Finding:
    """Whether a direction tells the kinds apart: Wilson's interval of the share of held-out examples on their own side lies above one half, and it is
    longer than any direction of at least :data:`FEWEST_DRAWS` whose kinds changed places."""
    sides = result.sides()
    count = len(sides.examples)
    value = float(sides.mean()) if count else float("nan")
    low, high = wilson(torch.tensor(value), count).tolist()
    longest = float(result.random_norms.max()) if len(result.random_norms) else float("nan")
    about = {
        "name": str(result),
        "site": result.site,
        "cosine": f"{result.cosine:.2f}",
        "length": f"{result.norm:.2g}",
        "longest": f"{longest:.2g}",
    }
    if not low > 0.5:
        reason = "held-out examples lie on either side"
    elif not result.norm > longest:
        reason = "kinds that changed places give one as long"
    else:
        reason = "" if len(result.random_norms) >= FEWEST_DRAWS else "too few random directions tell"
    return Finding("separates", not reason, value, "share", (low, high) if count else None, count, 0.5, reason, about)


def injects(result: InjectionResult, region: str | None = None, control: str | None = None) -> Finding:
    """Whether a region (None: that of the largest β but "all") carries the source run over, all layers and steps at once (or the first there are):
    β is at least :data:`~circuitvision.findings.ALONE`, and its interval lies above that of the ``control`` (None: the region with the least β).
    """
    names = result.axes["region"]
    mean, ends = result.mean()[:, 0, 0], result.interval()[:, :, 0, 0]
    own = [number for number, name in enumerate(names) if name != ALL] or list(range(len(names)))
    best = result.index_of("region", region) if region is not None else max(own, key=lambda number: float(mean[number]))
    others = [number for number in own if number != best]
    least = min(others, key=lambda number: float(mean[number]), default=None)
    least = result.index_of("region", control) if control is not None else least
    value, interval = float(mean[best]), _ends(ends[:, best])
    about = {"region": str(names[best]), "control": "" if least is None else str(names[least])}
    chance = None if least is None else float(mean[least])
    above = 0.0 if least is None else float(ends[1, least].nan_to_num(float(mean[least])))
    told = value >= ALONE and (value if interval is None else interval[0]) > above
    reason = "" if told else "it is hardly more than the region that carries least"
    return Finding("injects", told, value, "β", interval, len(result.examples), chance, reason, about)


def listens(result: PromptConditions, right: str = "right", other: str = "other object") -> Finding:
    """Whether the action follows the prompt: β under the ``right`` one minus β under one that names the ``other`` object is above one half, with its
    interval.
    """
    difference = result.difference(right, other)
    value, interval = float(difference.mean()), _ends(difference.interval())
    means = result.mean()
    said = {name: f"{abs(float(means[result.index_of('condition', name)])):.2f}" for name in (right, other)}
    about = {"right": right, "other": other, "of right": said[right], "of other": said[other]}
    told = (value if interval is None else interval[0]) > 0.5
    reason = "" if told else "another prompt gives nearly the same action"
    return Finding("listens", told, value, "β", interval, len(difference.examples), 0.0, reason, about)


def succeeds(result: ClosedLoop, condition: str, control: str) -> Finding:
    """Whether two conditions differ in success: Wilson's intervals do not meet; ``value`` and ``chance`` are the shares of the two."""
    rate, ends = result.success_rate, result.success_interval()
    one, two = (result.index_of("condition", name) for name in (condition, control))
    apart = bool(ends[0, one] > ends[1, two]) or bool(ends[1, one] < ends[0, two])
    about = {"condition": condition, "control": control}
    interval = (float(ends[0, one]), float(ends[1, one]))
    reason = "" if apart else "their intervals meet"
    return Finding(
        "succeeds", apart, float(rate[one]), "share", interval, len(result.examples), float(rate[two]), reason, about
    )


def _ends(interval: Tensor) -> tuple[float, float] | None:
    low, high = (float(end) for end in interval)
    return None if low != low else (low, high)
