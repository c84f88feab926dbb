"""What results about subspaces show, as findings that are held against a ceiling and controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitvision.findings import Finding

if TYPE_CHECKING:
    from circuitvision.subspaces.das import DASResult


def interchanges(result: DASResult) -> Finding:
    """Whether a subspace carries the answer on held-out pairs: its accuracy is at least half of the ceiling, and its interval lies above every
    control (``chance``: the largest).
    """
    low, high = result.accuracy_interval()
    value, ceiling = result.accuracy(), result.ceiling
    chance = float(result.control.double().nanmean(-1).max()) if result.controls else None
    if value < 0.5 * ceiling or ceiling == 0:
        reason = "it is less than half of the ceiling"
    elif chance is not None and low <= chance:
        reason = "the same training finds as much where there is nothing to find"
    else:
        reason = "" if len(result.examples) > 1 else "one pair is too few"
    about = {"k": str(result.k), "site": result.site, "ceiling": f"{ceiling:.0%}"}
    return Finding("interchanges", not reason, value, "share", (low, high), len(result.examples), chance, reason, about)
