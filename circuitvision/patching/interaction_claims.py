"""What interactions show, as findings: ``interacts`` of two components, ``repairs`` of one that does more once another is gone.

Both are of the pair that does most, so their intervals are as wide as the first of all pairs needs (Bonferroni), and an interaction must be something
beside what the two do. Where pairings were permuted, the interaction of pairs as they are must be larger than that of every permuted pairing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuitvision.findings import LEAST_SHARE, Finding

if TYPE_CHECKING:
    from circuitvision.patching.coalitions import ConditionalEffects, PairInteractions
    from circuitvision.results import Result

FEWEST = 19
"""So many permuted pairings must be beaten where p is to be .05."""


def interacts(result: PairInteractions) -> Finding:
    """What the pair with the largest interaction does. It holds if its interval leaves 0 out, it is at least
    :data:`~circuitvision.findings.LEAST_SHARE` of what the two do, and no permuted pairing, of at least :data:`FEWEST`, does as much (``chance``).

    ``about["kind"]`` is "backup", "cooperation", or "opposition" (together the two do less than one of them alone).
    """
    if result.metrics:
        result = result.of(result.metrics[0])
    lead = result.top(1)
    n = len(result.examples)
    if not lead:
        return Finding("interact", None, reason="no pair was measured")
    names = result.axes["component"]
    (one, two), value = lead[0]
    i, j = names.index(one), names.index(two)
    alone = result.shown("alone")[[i, j]].tolist()
    together = sum(alone) + (value if result.rest == "removed" else -value)
    ends = _ends(result, len(names), i, j)
    chance = float(result.null[:, i, j].abs().max()) if result.null.numel() else None
    reason = ""
    if value == 0 or abs(value) < LEAST_SHARE * max(map(abs, (*alone, together))):
        reason = "what they do together is what they do alone, added up"
    elif ends is not None and ends[0] <= 0 <= ends[1]:
        reason = "its interval holds 0"
    elif chance is not None and abs(value) <= chance:
        reason = "values of other examples do as much"
    elif chance is not None and len(result.null) < FEWEST:
        reason = "too few permuted pairings tell"
    about = {"pair": f"{one} and {two}", "kind": _kind_of(alone, value, together, result.rest), "rest": result.rest}
    about |= {"together": _signed(together), "alone": " and ".join(map(_signed, alone))}
    unit = str(result.provenance.get("metric_units") or "")
    return Finding("interact", not reason, value, unit, ends, n, chance, reason, about)


def _ends(result: Result, count: int, i: int, j: int) -> tuple[float, float] | None:
    """The interval of one pair, as wide as the first of all pairs of ``count`` components needs; None of a single example."""
    if len(result.examples) < 2:
        return None
    low, high = result.interval(level=1 - 0.1 / (count * (count - 1)))[:, i, j].tolist()
    return low, high


def _signed(value: float) -> str:
    return f"{value:+.2g}" if value else "0"


def _kind_of(alone: Sequence[float], value: float, together: float, rest: str) -> str:
    """How two components act on each other, by the effect of each without the other and of both."""
    total = sum(alone) or together
    towards = math.copysign(1.0, total)
    if value * towards > 0:
        return "cooperation"
    best = max(own * towards for own in alone)
    less = rest == "removed" and together * towards < best - LEAST_SHARE * abs(best)
    return "opposition" if less else "backup"


def repairs(result: ConditionalEffects) -> Finding:
    """Whether a component does more once another is gone, where it does so most: by its interval, and by at least
    :data:`~circuitvision.findings.LEAST_SHARE` of its effect. ``value`` is self-repair, the difference of the effects.
    """
    if result.metrics:
        result = result.of(result.metrics[0])
    more, effects = result.self_repair(), result.shown()
    mean = (effects[:, 1:] - effects[:, :1]).masked_fill(torch.eye(len(effects), dtype=torch.bool), torch.nan)
    if not bool(torch.isfinite(mean).any()):
        return Finding("repairs", None, reason="no pair was measured")
    names = result.axes["component"]
    towards = math.copysign(1.0, float(effects.nansum()))
    i, j = divmod(int((mean * towards).nan_to_num(-math.inf).argmax()), len(names))
    # Self-repair is the same both ways: the one that does less before is the one that steps in.
    i, j = sorted((i, j), key=lambda number: abs(float(effects[number, 0])))
    value, before, after = float(mean[i, j]), float(effects[i, 0]), float(effects[i, 1 + j])
    ends = _ends(more, len(names), i, j)
    reason = ""
    if value * towards <= LEAST_SHARE * max(abs(before), abs(after)):
        reason = "it does no more than before"
    elif ends is not None and ends[0] <= 0 <= ends[1]:
        reason = "the interval of the difference holds 0"
    about = {"one": names[i], "other": names[j], "before": _signed(before), "after": _signed(after)}
    unit = str(result.provenance.get("metric_units") or "")
    return Finding("repairs", not reason, value, unit, ends, len(result.examples), None, reason, about)
