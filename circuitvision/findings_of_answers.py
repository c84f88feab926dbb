"""What a model's answers to edited and to meaningless pictures show, as findings that are held against a control.

``understands`` holds answers that follow an edit of what is asked about against those that an edit of something else moves; ``calibrates`` holds the
answers with the language prior taken off against those with it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from circuitvision.findings import Finding, percent
from circuitvision.results import Result
from circuitvision.statistics import wilson

if TYPE_CHECKING:
    from circuitvision.data import EditOutcomes, PriorCalibration


def understands(result: EditOutcomes) -> Finding:
    """Whether the answers follow what is seen: more than half are right before and after an edit of the asked object (``TU``), and where other
    objects are edited the interval lies above that of the answers which this moves (``ID``; ``chance``: their share)."""
    touched, shares = sum(result.touched), dict(zip(result.axes["outcome"], result.mean().tolist(), strict=True))
    rest = len(result.touched) - touched
    moved = _ends(shares["ID"], rest)
    about = {"untouched": str(rest), "ID": percent(shares["ID"]) if rest else "", "SB": percent(shares["SB"])}
    if not touched:
        reason = "no edit touches what is asked about"
        return Finding("understands", None, shares["ID"], "share", moved, rest, None, reason, about)
    seen, stubborn = _ends(shares["TU"], touched), _ends(shares["SB"], touched)
    if seen[0] > 0.5:
        reason = "" if not rest or seen[0] > moved[1] else "edits of other objects move the answers as well"
    else:
        reason = "the answer stays the same" if stubborn[0] > 0.5 else "not more than half"
    told = Finding("understands", not reason, shares["TU"], "share", seen, touched, None, reason, about)
    return told if not rest else Finding(**{**vars(told), "chance": shares["ID"]})


def calibrates(result: PriorCalibration) -> Finding:
    """Whether taking the prior off makes more answers right: the interval of the change of accuracy, example by example, lies above 0 (``chance``:
    the accuracy under the reference that gives the most). Without answers the share that the prior gives as well, and nothing is affirmed."""
    if not result.answers:
        about, count = {"references": str(len(result.references))}, len(result.examples)
        value = result.same_as_prior
        return Finding("calibrates", None, value, "share", _ends(value, count), count, reason="no answers", about=about)
    accuracy = result.accuracy()
    names, means = accuracy.axes["answer"], accuracy.mean()
    change = accuracy.values[1] - accuracy.values[0]
    count = int(torch.isfinite(change).sum())
    low, high = Result(change, {"example": accuracy.axes["example"]}).interval().tolist()
    value = float(change.nanmean())
    before, after = (percent(float(means[number])) for number in (0, 1))
    about = {"before": before, "after": after, "weight": f"{result.weight:g}"}
    blind = [float(one) for one in means[2:] if not math.isnan(float(one))]
    reason = "" if low > 0 else "it does harm" if high < 0 else "the interval of the change holds 0"
    ends = None if low != low else (low, high)
    return Finding(
        "calibrates", not reason, value, "share", ends, count, max(blind, default=None), reason, {**about, "names": names[0]}
    )  # fmt: skip


def _ends(share: float, count: int) -> tuple[float, float]:
    low, high = wilson(torch.tensor(share, dtype=torch.float64), count).tolist()
    return low, high
