"""What evaluations of circuits show, as findings that are held against random circuits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuitvision.findings import Finding, percent

if TYPE_CHECKING:
    from circuitvision.circuits.evaluation import CircuitEvaluation
    from circuitvision.circuits.faithfulness_curve import FaithfulnessCurve
    from circuitvision.circuits.minimality import Minimality

KEEPS, AT_MOST = 0.8, 1.2
"""Between what faithfulness, with its interval, a circuit is said to keep the answer."""
LEFT = 0.2
"""Up to what faithfulness of the complement nothing is said to be left out."""
FEWEST_RANDOM = 19
"""So many random circuits must be beaten where p is to be .05."""


def explains(result: CircuitEvaluation, circuit: str | None = None, ablation: str | None = None) -> Finding:
    """Whether a circuit keeps the answer: its interval lies in :data:`KEEPS` … :data:`AT_MOST`, its complement keeps at most :data:`LEFT` of it, and
    none of at least :data:`FEWEST_RANDOM` random connected circuits is as near to 1 (``chance``: the mean of these). Of the first circuit and
    ablation where none is named.

    Raises:
        InputError: no such circuit or ablation.
    """
    named = result.circuits[0] if result.circuits and circuit is None else circuit
    ablation = result.axes["ablation"][0] if ablation is None else ablation
    at = result.index_of("ablation", ablation)
    place = (result.index_of("circuit", named), at) if result.circuits else (at,)
    f, ends, reach = result.faithfulness[place], result.faithfulness_interval()[:, *place], result.as_faithful()[place]
    low, high = (float(end) for end in ends[:, 0])
    value, left, drawn = float(f[0]), float(f[1]), result.conditions("random")
    sizes = result.sizes[place[0]] if result.circuits else result.sizes
    about = {
        "circuit": f"The circuit {named!r}" if named else "The circuit", "edges": f"{int(sizes[0])} of {result.n_edges} edges", "ablation": ablation,
        "left": percent(left), "draws": str(len(drawn)), "others": ", ".join(
            f"{percent(float(share))} under {name}"
            for name, share in zip(result.axes["ablation"], result.faithfulness[(*place[:-1], slice(None), 0)], strict=True) if name != ablation
        ),
    }  # fmt: skip
    if value != value:
        reason = "the clean run and the empty one do not differ enough"
    elif low != low:
        reason = "one example is too few"
    elif low < KEEPS or high > AT_MOST:
        reason = "that is not what the model does" if value < KEEPS or value > AT_MOST else "the examples are too few"
    elif len(drawn) < FEWEST_RANDOM:
        reason = "too few random circuits tell"
    elif float(reach) > 1 / (1 + len(drawn)) + 1e-9:
        reason = "random circuits of its size do as well"
    else:
        reason = "" if left <= LEFT else f"what is left out keeps {percent(left)} too"
    chance = float(f[drawn].mean()) if drawn else None
    interval = None if low != low else (low, high)
    return Finding("explains", not reason, value, "share", interval, len(result.examples), chance, reason, about)


def comes_near(result: FaithfulnessCurve) -> Finding:
    """Whether the edges that are chosen first stand for the model better than random ones: the interval of CMD lies below every random connected
    circuit's (``chance``: the smallest of these)."""
    from circuitvision.circuits.faithfulness_ratios import distance_area

    areas = result.areas().set_index("order")
    order = "size" if "size" in areas.index else result.axes["order"][0]
    row: Any = areas.loc[order]
    drawn = distance_area(result.random_faithfulness, result.ks).tolist()
    table = result.table()
    near = table[(table.order == order) & (table.k > 0) & ((1 - table.faithfulness).abs() <= 0.1)]
    # From there on every larger circuit is near, too.
    far = table[(table.order == order) & ~((1 - table.faithfulness).abs() <= 0.1)]
    near = near[near.k > far.k.max()] if len(far) else near
    first = near.iloc[0] if len(near) else None
    about = {
        "ablation": result.ablation,
        "k": "" if first is None else f"{first.k:.3g}",
        "edges": "" if first is None else str(int(first.edges)),
    }
    if row.cmd != row.cmd:
        reason = "the clean run and the empty one do not differ enough"
    elif row.cmd_low != row.cmd_low:
        reason = "one example is too few"
    elif not drawn:
        reason = "no random circuits were drawn"
    else:
        reason = "" if row.cmd_high < min(drawn) else "random circuits come as near"
    interval = None if row.cmd_low != row.cmd_low else (float(row.cmd_low), float(row.cmd_high))
    chance = min(drawn) if drawn else None
    return Finding("comes near", not reason, float(row.cmd), "", interval, len(result.examples), chance, reason, about)


def needs(result: Minimality) -> Finding:
    """How many edges can be removed, one alone, with hardly a change of faithfulness; holds where none can."""
    from circuitvision.circuits.minimality import EPS

    if result.reason:
        return Finding(
            "needs", None, n=len(result.examples), reason="the clean run and the empty one do not differ enough"
        )
    spare = result.removable()
    about = {
        "edges": str(len(result.axes["edge"])),
        "spare": str(len(spare)),
        "eps": percent(EPS),
        "first": spare[0] if spare else "",
    }
    return Finding("needs", not spare, float(len(spare)), "", None, len(result.examples), None, "", about)
