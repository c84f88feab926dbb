"""Is every edge of a circuit needed? One sweep that removes each alone, and all subsets of a small circuit.

``effect of removing e = m(C − e) − m(C)`` per example, signed, in units of the metric; as a share of the model's own difference
``(m(C − e) − m(C)) / (m(clean) − m(empty))``, a ratio of means: the change of faithfulness. Names are those of *provable circuits* (2602.16823), what
is meant by them is weaker, measured on these examples alone:

* *locally minimal* within ``eps``: no single edge can be removed without changing the faithfulness by more than ``eps``;
* *subset-minimal* within ``eps``: no proper subset of its edges is as faithful as it is, within ``eps``. All subsets are looked at, from the smallest
  on, for circuits of up to :data:`MOST` edges; ``subsets`` lists those that are as faithful and hold no smaller one that is.

Edges that lie on no path within a subset carry the source run's values under ``"interchange"``, so that subsets with the same paths are one run.

Not covered: minimal cardinality beyond :data:`MOST` edges; guarantees over inputs that were not measured.

Reference: arXiv 2602.16823 (ICLR 2026) for the names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.circuits.connectivity import pruned
from circuitvision.circuits.evaluation import check_ablations, checked_circuits, circuit_runs, described
from circuitvision.circuits.faithfulness_ratios import Kept
from circuitvision.errors import InputError, warn
from circuitvision.provenance import with_provenance
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

MOST = 16
"""How many edges a circuit has at most whose subsets are all looked at."""
EPS = 0.05
Edges = Bool[Tensor, "sender slot"]


@dataclass(frozen=True, eq=False)
class Minimality(Result):
    """The metric of the circuit without each of its edges: ``values`` ``[edge example]``.

    ``whole`` ``[example]`` is the metric of the circuit, ``clean`` and ``empty`` those with all edges of the model and with none. ``subsets`` are the
    smallest subsets that are as faithful within ``subset_eps``, where they were looked for. ``groups`` says which examples belong together.
    """

    whole: Tensor = field(default_factory=lambda: torch.zeros(0))
    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    empty: Tensor = field(default_factory=lambda: torch.zeros(0))
    ablation: str = "interchange"
    subsets: list[list[str]] = field(default_factory=list)
    subset_eps: float | None = None
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"whole": -1, "clean": -1, "empty": -1, "groups": 0}

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The effects of removing each edge."""
        return self.effects, ("example",)

    @property
    def effects(self) -> Float[Tensor, "edge example"]:
        """What removing each edge does to the metric, without it minus with it."""
        return self.values - self.whole

    @property
    def kept(self) -> Kept:
        """The effects beside the difference of the clean and the empty run, per independent example."""
        empty, gap = torch.zeros_like(self.clean), self.clean - self.empty
        return Kept.of(self.effects, empty, gap, self.axes["example"], self.groups)

    @property
    def changes(self) -> Float[Tensor, " edge"]:
        """By how much removing each edge changes the faithfulness of the circuit: −1 takes all there is. NaN where :attr:`reason` says why."""
        return self.kept.share

    @property
    def faithfulness(self) -> float:
        """The faithfulness of the circuit itself."""
        return float(Kept.of(self.whole, self.empty, self.clean, self.axes["example"], self.groups).share)

    @property
    def reason(self) -> str:
        """Why there are no shares, in words; empty where there are."""
        return self.kept.reason()

    def removable(self, eps: float = EPS) -> list[str]:
        """The edges that can be removed, one alone, with a change of faithfulness of at most ``eps``. Raises InputError without shares."""
        if self.reason:
            raise InputError(f"What an edge takes from the faithfulness cannot be said: {self.reason}.")
        near = self.changes.abs() <= eps
        return [name for name, small in zip(self.axes["edge"], near.tolist(), strict=True) if small]

    def locally_minimal(self, eps: float = EPS) -> bool:
        """Whether no edge alone can be removed within ``eps``. Raises InputError without shares."""
        return not self.removable(eps)

    @property
    def subset_minimal(self) -> bool | None:
        """Whether no proper subset is as faithful within ``subset_eps``; None where subsets were not looked at."""
        return None if self.subset_eps is None else [set(one) for one in self.subsets] == [set(self.axes["edge"])]

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row per edge, the most needed first: the change of faithfulness with its interval, and of the metric."""
        import pandas as pd

        low, high = self.kept.interval(level, 2000, 0)
        frame = pd.DataFrame({
            "edge": self.axes["edge"], "change": self.changes.numpy(), "low": low.numpy(), "high": high.numpy(),
            "metric": self.mean(quantity="effects").numpy(),
        })  # fmt: skip
        return frame.sort_values("change", key=lambda column: -column.abs(), kind="stable").reset_index(drop=True)

    def highlights(self) -> dict[str, str]:
        """Which edges can be removed, and the smallest subsets."""
        if self.reason:
            return {"no faithfulness": self.reason}
        spare = self.removable()
        found = {
            "faithfulness": f"{self.faithfulness:.1%}",
            f"removable within {EPS:g}": f"{len(spare)} of {len(self.axes['edge'])} edges" + f" ({', '.join(spare[:3])})" * bool(spare),
        }  # fmt: skip
        if self.subset_eps is not None:
            sizes = ", ".join(str(len(one)) for one in self.subsets)
            found[f"smallest subsets within {self.subset_eps:g}"] = f"{len(self.subsets)}, of {sizes} edges"
        return found


@with_provenance
def minimality(
    model: Any,
    circuit: Circuit,
    pairs: Any = None,
    metric: Any = None,
    *,
    ablation: str = "interchange",
    subsets: bool = False,
    eps: float = EPS,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> Minimality:
    """What removing each edge of a circuit alone does, one run per edge; with ``subsets`` also which smaller circuits do as well.

    Args:
        model: the hooked model.
        circuit: the circuit.
        pairs: a data set of pairs that the circuit was not found on; ``clean`` and ``corrupt`` in their place are inputs of the same shapes.
        metric: a metric or its name.
        ablation: what edges outside the circuit carry: ``"interchange"``, ``"mean"`` or ``"zero"``.
        subsets: whether all subsets are looked at, ``2^edges`` of them less those that hold a smaller one that does as well.
        eps: how much faithfulness may change where a subset is said to do as well.
        align, allow_wrong, example_batch, progress: as of :func:`circuitvision.circuits.evaluate`.

    Raises:
        InputError: an empty circuit, one of other weights, an unknown ablation, several metrics; subsets of more than :data:`MOST` edges, or where
            faithfulness cannot be told.
    """
    check_ablations([ablation])
    (made,) = checked_circuits(circuit).values()
    if subsets and len(made) > MOST:
        raise InputError(
            f"{len(made)} edges have too many subsets: leave subsets out, or give a circuit of {MOST} edges at most."
        )
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise InputError(f"eps={eps!r} is no change of faithfulness: give a number from 0 on, below 1.")
    runs = circuit_runs(model, [made], pairs, metric, clean, corrupt, align, allow_wrong, example_batch)
    mask = runs.mask(made)
    edges = runs.graph.edge_names(mask)
    places = mask.nonzero().tolist()
    masks = [mask, *(_without(mask, place) for place in places)]
    found = runs.measure(masks, ablation, progress=progress)
    result = Minimality(
        values=found.values[0, 1:],
        axes={"edge": edges, "example": found.examples},
        provenance=described(runs, f"minimality(ablation={ablation})"),
        whole=found.values[0, 0],
        clean=found.clean[0],
        empty=found.empty[0],
        ablation=ablation,
        subsets=_smallest(runs, mask, ablation, eps, progress) if subsets else [],
        subset_eps=float(eps) if subsets else None,
        groups=runs.runs.groups,
    )
    if result.reason:
        warn(f"No faithfulness: {result.reason}. Take more examples, or a metric that tells the two runs apart.")
    return result


def _without(mask: Edges, *places: Iterable[int]) -> Edges:
    found = mask.clone()
    for place in places:
        found[tuple(place)] = False
    return found


def _smallest(runs: CircuitRuns, mask: Edges, ablation: str, eps: float, progress: bool) -> list[list[str]]:
    """The subsets that are as faithful as the circuit within ``eps`` and hold no smaller one that is; by size."""
    places = [tuple(place) for place in mask.nonzero().tolist()]
    known: dict[bytes, float] = {}
    (whole,) = _faithfulness(runs, [mask], ablation, known, progress)
    if whole != whole:
        raise InputError(
            "Faithfulness cannot be told on these examples, so subsets cannot be compared: take more of them."
        )
    found: list[set[int]] = []
    for size in range(len(places) + 1):
        chosen = [
            set(one)
            for one in itertools.combinations(range(len(places)), size)
            if not any(smaller <= set(one) for smaller in found)
        ]
        masks = [_without(mask, *(place for number, place in enumerate(places) if number not in one)) for one in chosen]
        for one, f in zip(chosen, _faithfulness(runs, masks, ablation, known, progress), strict=True):
            if abs(f - whole) <= eps:
                found.append(one)
    return [runs.graph.edge_names(_only(mask, [places[number] for number in one])) for one in found]


def _only(mask: Edges, places: Iterable[tuple[int, ...]]) -> Edges:
    found = torch.zeros_like(mask)
    for place in places:
        found[place] = True
    return found


def _faithfulness(
    runs: CircuitRuns, masks: list[Edges], ablation: str, known: dict[bytes, float], progress: bool
) -> list[float]:
    """The faithfulness of every mask; those that do the same run once."""
    kept = [pruned(mask, runs.graph.reads) if ablation == "interchange" else mask for mask in masks]
    keys = [mask.numpy().tobytes() for mask in kept]
    new = {key: mask for key, mask in zip(keys, kept, strict=True) if key not in known}
    if new:
        found = runs.measure(list(new.values()), ablation, progress=progress)
        shares = Kept.of(found.values[0], found.empty[0], found.clean[0], found.examples, runs.runs.groups).share
        known.update(zip(new, shares.tolist(), strict=True))
    return [known[key] for key in keys]
