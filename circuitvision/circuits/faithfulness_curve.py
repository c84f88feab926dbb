"""Faithfulness by how many edges a circuit has: ``f(k)``, its areas (CPR, CMD), and the same of random connected circuits.

    ``f(k) = (m(C_k) − m(empty)) / (m(clean) − m(empty))``,  ``CPR = ∫ f dk``,  ``CMD = ∫ |1 − f| dk``,  ``k`` from 0 to 1

``C_k`` are the ``round(k E)`` edges of the ``E`` that are chosen first. CPR asks how much performance edges carry, and orders them by their score
with its sign (those that raise the metric when they are left first); CMD asks how well they stand for the model, and orders by size. Both orders are
measured unless one is asked for. ``f(0) = 0`` and ``f(1) = 1`` exactly; MIB's code begins at ``k = .001``, where a perfect curve has a CPR of .999.
Half of the area lies between ``k = .5`` and 1: the area over ``log k`` says more of small circuits.

The signed order puts those edges first whose patching moves the metric the way that the other run does, whichever run was patched and whichever way
that is: an edge that works against the answer comes last.

Not covered: orders of nodes. What a function (``select``) or pruning chooses may be smaller than asked for; areas go by the number asked for,
``sizes`` says what there is.

Reference: Mueller et al. 2025 (MIB, arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.circuits.evaluation import check_ablations, checked_count, circuit_runs, described
from circuitvision.circuits.faithfulness_ratios import Kept, area, distance_area, ends, log_area
from circuitvision.circuits.random_circuits import connected_like
from circuitvision.errors import InputError, warn
from circuitvision.provenance import with_provenance
from circuitvision.results import Result
from circuitvision.statistics import seed_of_draw

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
"""MIB's shares of edges, and none."""
SIGNED, SIZE = "signed", "size"
Edges = Bool[Tensor, "sender slot"]
Select = Callable[[EdgeAttribution, int], Any]


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Result):
    """The metric by the share of edges: ``values`` ``[order k example]``, orders ``"signed"`` and ``"size"``, or the name of a function.

    ``random`` ``[draw k example]`` is the same of random connected circuits. ``sizes`` ``[order k]`` is how many edges there are, of ``n_edges``.
    ``clean`` and ``empty`` ``[example]`` are the metric with all edges and with none. ``groups`` says which examples belong together.
    """

    random: Tensor = field(default_factory=lambda: torch.zeros(0))
    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    empty: Tensor = field(default_factory=lambda: torch.zeros(0))
    sizes: Tensor = field(default_factory=lambda: torch.zeros(0))
    n_edges: int = 0
    ablation: str = "interchange"
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"random": -1, "clean": -1, "empty": -1, "groups": 0}

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """Refused: points of a curve are no components."""
        raise InputError("A curve has shares of edges, not components: see .table().")

    @property
    def ks(self) -> list[float]:
        """The shares of edges."""
        return [float(k) for k in self.axes["k"]]

    @property
    def kept(self) -> Kept:
        """The metrics that :attr:`faithfulness` is the ratio of, per independent example."""
        return Kept.of(self.values, self.empty, self.clean, self.axes["example"], self.groups)

    @property
    def faithfulness(self) -> Float[Tensor, "order k"]:
        """``f(k)`` of every order, a ratio of means; NaN where :attr:`reason` says why."""
        return self.kept.share

    @property
    def random_faithfulness(self) -> Float[Tensor, "draw k"]:
        """``f(k)`` of random connected circuits; no rows where none were drawn."""
        if not self.random.numel():
            return torch.zeros(0, len(self.ks), dtype=torch.float64)
        return Kept.of(self.random, self.empty, self.clean, self.axes["example"], self.groups).share

    def faithfulness_interval(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Tensor:
        """Low and high end ``[2 order k]`` of the bootstrap interval of :attr:`faithfulness`, groups (or examples) drawn again."""
        return self.kept.interval(level, draws, seed)

    @property
    def reason(self) -> str:
        """Why there is no faithfulness, in words; empty where there is."""
        return self.kept.reason()

    @property
    def cpr(self) -> float:
        """The area under ``f(k)``, edges by their signed score: 1 for ``f ≡ 1``, unbounded above. Of the other order if that alone was measured."""
        return float(area(self._curve(SIGNED), self.ks))

    @property
    def cmd(self) -> float:
        """The area of ``|1 − f(k)|``, edges by the size of their score: 0 for ``f ≡ 1``. Of the other order if that alone was measured."""
        return float(distance_area(self._curve(SIZE), self.ks))

    @property
    def log_area(self) -> float:
        """The mean of ``f`` over ``log k`` from the smallest share above 0, edges by size (of the other order if that alone was measured)."""
        return float(log_area(self._curve(SIZE), self.ks))

    def _curve(self, order: str) -> Float[Tensor, " k"]:
        orders = self.axes["order"]
        return self.faithfulness[orders.index(order) if order in orders else 0]

    def areas(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
        """One row per order, and one of random circuits: ``cpr``, ``cmd`` and ``log_area``, each with the ends of its interval.

        Intervals are of examples (groups) drawn again; of random circuits the mean, and the ends of ``level`` of them.
        """
        import pandas as pd

        drawn, f = self.kept.draws(draws, seed), self.faithfulness
        measures = {"cpr": area, "cmd": distance_area, "log_area": log_area}
        rows = []
        for number, order in enumerate(self.axes["order"]):
            row: dict[str, Any] = {"order": order}
            for name, measure in measures.items():
                low, high = ends(measure(drawn[:, number], self.ks), level).tolist()
                row |= {name: float(measure(f[number], self.ks)), f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        if self.random.numel():
            row = {"order": "random connected"}
            for name, measure in measures.items():
                own = measure(self.random_faithfulness, self.ks)
                low, high = ends(own, level).tolist()
                row |= {name: float(own.mean()), f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row per order and share of edges: faithfulness with its interval, how many edges, and that of random circuits."""
        import pandas as pd

        f, (low, high) = self.faithfulness, self.faithfulness_interval(level)
        chance = self.random_faithfulness.mean(0) if self.random.numel() else torch.full((len(self.ks),), torch.nan)
        rows = [
            [order, k, int(self.sizes[row, at]), *(float(one[row, at]) for one in (f, low, high)), float(chance[at])]
            for row, order in enumerate(self.axes["order"])
            for at, k in enumerate(self.ks)
        ]
        return pd.DataFrame(rows, columns=pd.Index(["order", "k", "edges", "faithfulness", "low", "high", "random"]))

    def highlights(self) -> dict[str, str]:
        """The areas."""
        found = {"CPR": f"{self.cpr:.3f}", "CMD": f"{self.cmd:.3f}", "area over log k": f"{self.log_area:.3f}"}
        if self.random.numel():
            own = self.random_faithfulness
            found["of random circuits"] = (
                f"CPR {float(area(own, self.ks).mean()):.3f}, CMD {float(distance_area(own, self.ks).mean()):.3f}"
            )
        return {**found, **({"no faithfulness": self.reason} if self.reason else {})}


@with_provenance
def faithfulness_curve(
    model: Any,
    attribution: EdgeAttribution,
    pairs: Any = None,
    metric: Any = None,
    *,
    ks: Sequence[float] = SHARES,
    signed: bool | None = None,
    select: str | Select = "top",
    ablation: str = "interchange",
    n_random: int = 5,
    seed: int = 0,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> FaithfulnessCurve:
    """How faithful circuits of growing size are that are made of an attribution.

    Args:
        model: the hooked model.
        attribution: scores of its edges, of one metric or the first of several.
        pairs: a data set of pairs that were not scored; ``clean`` and ``corrupt`` in their place are inputs of the same shapes.
        metric: a metric or its name.
        ks: shares of edges; 0 and 1 are added, without runs of their own.
        signed: whether edges are ordered by their signed score (True), by its size (False), or both are measured (None).
        select: ``"top"``, the first edges of the order; ``"pruned"``, those of them that lie on a path; or ``select(attribution, n)``, which gives a
            circuit of about ``n`` edges (``signed`` is not asked then).
        ablation: what other edges carry: ``"interchange"``, ``"mean"`` or ``"zero"``.
        n_random: how many random connected circuits of each size.
        seed, align, allow_wrong, example_batch, progress: as of :func:`circuitvision.circuits.evaluate`.

    Raises:
        InputError: shares outside 0 … 1, scores of other weights, an unknown ablation, several metrics, a selection of something else than edges.
    """
    if not isinstance(attribution, EdgeAttribution):
        raise InputError(
            f"A {type(attribution).__name__} has no scores of edges: give what cv.circuits.edge_attribution returns."
        )
    check_ablations([ablation])
    shares, count = _checked_shares(ks), checked_count("n_random", n_random)
    runs = circuit_runs(
        model, [Circuit.of(attribution, 0)], pairs, metric, clean, corrupt, align, allow_wrong, example_batch
    )
    chosen = _chosen(attribution, shares, signed, select)
    masks = {order: [runs.mask(one) for one in own] for order, own in chosen.items()}
    drawn = [
        _random(runs, round(k * runs.graph.n_edges), count, seed_of_draw(seed, number))
        for number, k in enumerate(shares)
    ]
    found = _measured(runs, [*masks.values(), *(list(own) for own in zip(*drawn, strict=True))], ablation, progress)
    values, random = found.values[: len(masks)], found.values[len(masks) :]
    result = FaithfulnessCurve(
        values=values,
        axes={"order": list(masks), "k": shares, "example": found.examples},
        provenance=described(runs, f"faithfulness_curve(ablation={ablation})", seed=seed),
        random=random,
        clean=found.clean,
        empty=found.empty,
        sizes=torch.tensor([[int(mask.sum()) for mask in own] for own in masks.values()]),
        n_edges=runs.graph.n_edges,
        ablation=ablation,
        groups=runs.runs.groups,
    )
    if result.reason:
        warn(f"No faithfulness: {result.reason}. Take more examples, or a metric that tells the two runs apart.")
    return result


@dataclass(frozen=True)
class _Points:
    values: Float[Tensor, "curve k example"]
    clean: Float[Tensor, " example"]
    empty: Float[Tensor, " example"]
    examples: list[Any]


def _measured(runs: CircuitRuns, curves: Sequence[Sequence[Edges]], ablation: str, progress: bool) -> _Points:
    """The metric at every point; circuits that stand in several places run once, all edges and none not at all."""
    every: dict[bytes, Edges] = {}
    keys: list[bytes] = []
    for mask in (mask for own in curves for mask in own):
        key = mask.numpy().tobytes()
        keys.append(key)
        if 0 < int(mask.sum()) < runs.graph.n_edges:
            every.setdefault(key, mask)
    scores = runs.measure(list(every.values()), ablation, progress=progress)
    clean, empty = scores.clean[0], scores.empty[0]
    known = dict(zip(every, scores.values[0], strict=True))
    full = runs.graph.edges.numpy().tobytes()
    values = torch.stack([known.get(key, clean if key == full else empty) for key in keys])
    return _Points(values.unflatten(0, (len(curves), -1)), clean, empty, scores.examples)


def _checked_shares(ks: Sequence[float]) -> list[float]:
    shares = [ks] if isinstance(ks, int | float) else list(ks)
    if any(isinstance(k, bool) or not isinstance(k, int | float) or not 0 <= k <= 1 for k in shares):
        raise InputError(f"ks={shares!r} are no shares of the edges: give numbers from 0 to 1.")
    return sorted({0.0, 1.0, *map(float, shares)})


def _random(runs: CircuitRuns, n_edges: int, count: int, seed: int) -> list[Edges]:
    """Random connected circuits of a size; none of the edges, or all, at the ends."""
    graph = runs.graph
    if n_edges in (0, graph.n_edges):
        return [graph.edges if n_edges else torch.zeros_like(graph.edges)] * count
    like = torch.zeros_like(graph.edges)
    like[tuple(graph.edges.nonzero()[:n_edges].T)] = True
    return connected_like(like, graph, count, seed)


def _chosen(
    attribution: EdgeAttribution, shares: Sequence[float], signed: bool | None, select: str | Select
) -> dict[str, list[Circuit]]:
    """The circuits of every order, by share."""
    counts = [round(k * attribution.n_edges) for k in shares]
    if callable(select):
        made = [_selected(attribution, select, count) for count in counts]
        return {getattr(select, "__name__", "selection").strip("<>"): made}
    if select not in ("top", "pruned"):
        raise InputError(
            f"Unknown selection {select!r}; give 'top', 'pruned', or a function of the scores and a number of edges."
        )
    if signed not in (True, False, None):
        raise InputError(f"signed={signed!r} is not understood: True, False, or None for both.")
    found = {}
    for order, asked in ((SIGNED, True), (SIZE, False)):
        if signed in (asked, None):
            ranked = ranked_edges(attribution, asked)
            found[order] = [_first(attribution, ranked, count, select == "pruned") for count in counts]
    return found


def ranked_edges(attribution: EdgeAttribution, signed: bool) -> Float[Tensor, "edge 2"]:
    """The places ``[edge 2]`` of all edges, those first that carry most: of the metric's change between the two runs (``signed``), or either way.

    Ties stand in the order of the axes.
    """
    places = attribution.edges.nonzero()
    scores = attribution.scores[places[:, 0], places[:, 1]].double()
    # Leaving out what carries the answer moves the metric as the other run does.
    change = (attribution.source - attribution.base).double()
    change = change[0] if attribution.metrics else change
    way = -1.0 if float(change.nanmean()) < 0 else 1.0
    return places[torch.argsort(-(way * scores if signed else scores.abs()), stable=True)]


def _first(attribution: EdgeAttribution, ranked: Tensor, count: int, prune: bool) -> Circuit:
    mask = torch.zeros_like(attribution.edges)
    mask[tuple(ranked[:count].T)] = True
    made = Circuit(attribution, mask)
    return made.pruned() if prune and 0 < count < attribution.n_edges else made


def _selected(attribution: EdgeAttribution, select: Select, count: int) -> Circuit:
    """What a function gives; nothing is asked for the ends."""
    if count in (0, attribution.n_edges):
        return Circuit.of(attribution, attribution.edges if count else 0)
    made = select(attribution, count)
    return made if isinstance(made, Circuit) else Circuit.of(attribution, made)
