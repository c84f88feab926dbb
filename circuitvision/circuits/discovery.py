"""Circuits out of scores: which edges to keep, how sure that choice is, and what it would take to change it.

:func:`discover` reads the scores of examples (:class:`~circuitvision.circuits.edge_attribution.EdgeAttribution`) and runs no model, so that it can be
repeated on a thousand resamples. Methods:

* ``"top"``: the ``n_edges`` of largest mean score in size (``signed``: that work for the clean answer);
* ``"greedy"``: from the output backwards, always the largest edge into what is reached already;
* ``"threshold"``: all edges of at least ``threshold`` in size, then those that lie on no path are taken away until none is left;
* ``"interval"``: edges whose bootstrap interval excludes 0; a share ``positive`` of the budget is filled with the largest that work for the answer,
  the rest by size;
* ``"milp"``: the connected set of at most ``n_edges`` edges with the largest sum of sizes: an integer programme (HiGHS) in which every kept edge
  carries flow from a source to the output, so that no edge dangles.

``bootstrap`` repeats the choice on resampled examples (or groups of examples): ``inclusion`` is the share of circuits that hold an edge, their mean
pairwise Jaccard index stands beside that of random sets of their size, ``k²/n / (2k - k²/n)``. :func:`certify` drops each example with probability
``p`` and votes: an edge's place in the majority's circuit then cannot change under so many replaced, removed or added examples.

Not covered: methods that run the model for each choice (:mod:`circuitvision.circuits.acdc`, :mod:`circuitvision.circuits.edge_pruning`).

Reference: Hanna et al. 2024 (arXiv 2403.17806), greedy; Mueller et al. 2025 (arXiv 2504.13151); Méloux et al. 2025 (arXiv 2510.00845), stability.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.circuits import connectivity
from circuitvision.circuits.certificates import Certificate, radii
from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.computational_graph import ARROW
from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.errors import InputError, checked_seed, warn
from circuitvision.progress import Progress
from circuitvision.provenance import with_provenance
from circuitvision.results import Result
from circuitvision.statistics import by_example

METHODS = ("top", "greedy", "threshold", "interval", "milp")
Scores = Float[Tensor, "sender slot"]
Edges = Bool[Tensor, "sender slot"]


@dataclass(frozen=True, eq=False)
class Discovery(Result):
    """A circuit, and how often resamples of the examples give each edge: ``values`` ``[sender slot]``, NaN where there is no edge.

    ``values`` are inclusion frequencies over ``resamples`` circuits (of one: whether the edge is in it). ``attribution`` holds the scores, ``mask``
    ``[sender slot]`` the circuit of all examples. ``jaccard`` is the mean pairwise Jaccard index of the resampled circuits, ``chance`` that of random
    sets of their mean size.
    """

    attribution: EdgeAttribution | None = None
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))
    method: str = ""
    resamples: int = 0
    jaccard: float = math.nan
    chance: float = math.nan

    _per_example: ClassVar[dict[str, int]] = {}

    @property
    def circuit(self) -> Circuit:
        """The circuit that all examples give."""
        assert self.attribution is not None
        return Circuit(self.attribution, self.mask, self.values if self.resamples else None)

    @property
    def majority(self) -> Circuit:
        """The edges that more than half of the resampled circuits hold."""
        assert self.attribution is not None
        return Circuit(self.attribution, self.values.nan_to_num() > 0.5, self.values)

    def inclusion(self, edge: str) -> float:
        """The inclusion frequency of one edge. Raises InputError for what is no edge."""
        assert self.attribution is not None
        return float(self.values[self.attribution.place(edge)])

    def ranking(self, count: int | None = None) -> list[tuple[str, float, bool]]:
        """Edges by name with their inclusion frequency and whether the circuit of all examples holds them, the most frequent first.

        Edges that no resampled circuit holds are left out; ties stand in the order of mean scores.
        """
        assert self.attribution is not None
        share, size = self.values.nan_to_num(), self.attribution.scores.nan_to_num().abs()
        places = ((share > 0) | self.mask).nonzero()
        rows, columns = places.unbind(1)
        by_size = torch.argsort(-size[rows, columns], stable=True)
        order = by_size[torch.argsort(-share[rows, columns][by_size], stable=True)][:count]
        senders, slots = self.axes["sender"], self.axes["slot"]
        return [
            (f"{senders[row]}{ARROW}{slots[column]}", float(share[row, column]), bool(self.mask[row, column]))
            for row, column in places[order].tolist()
        ]

    def to_networkx(self) -> Any:
        """The circuit as a graph of schema ``circuitvision.graph/1``, with ``inclusion`` on its edges."""
        return self.circuit.to_networkx()

    def highlights(self) -> dict[str, str]:
        """How many edges, and how stable they are."""
        found = {"edges": str(len(self.circuit)), "method": self.method}
        if self.resamples:
            found["Jaccard"] = f"{self.jaccard:.2f} (chance {self.chance:.2f}) over {self.resamples} resamples"
        return found


@dataclass(frozen=True)
class Choice:
    """How edges are chosen from scores: the arguments of :func:`discover`, checked."""

    method: str
    n_edges: int
    threshold: float
    signed: bool
    prune: bool
    positive: float
    edges: Edges
    reads: Bool[Tensor, "slot sender"]
    favour: float
    """1 where a positive score works for the clean run's answer, -1 where a negative one does."""

    def of(self, mean: Scores, excludes_zero: Edges | None = None) -> Edges:
        """The mask of the edges that mean scores give."""
        mean = mean.nan_to_num().masked_fill(~self.edges, 0.0)
        weight = self.favour * mean if self.signed else mean.abs()
        if self.method == "greedy":
            return greedy(weight, self.edges, self.reads, self.n_edges)
        if self.method == "milp":
            return best_connected(weight.clamp_min(0), self.edges, self.reads, self.n_edges)
        if self.method == "threshold":
            found = self.edges & (weight >= self.threshold)
        elif self.method == "interval":
            assert excludes_zero is not None
            found = self._within(mean, excludes_zero)
        else:
            found = largest(weight, self.edges, self.n_edges)
        return connectivity.pruned(found, self.reads) if self.prune else found

    def _within(self, mean: Scores, allowed: Edges) -> Edges:
        """The budget's share of edges that work for the answer, then the rest by size."""
        allowed = allowed & self.edges
        first = largest(self.favour * mean, allowed & (self.favour * mean > 0), round(self.positive * self.n_edges))
        rest = largest(mean.abs(), allowed & ~first, self.n_edges - int(first.sum()))
        return first | rest


def largest(weight: Scores, allowed: Edges, count: int) -> Edges:
    """The mask of the ``count`` allowed edges of largest weight; ties by place."""
    found = torch.zeros_like(allowed)
    order = torch.argsort(weight.masked_fill(~allowed, -math.inf).flatten(), descending=True, stable=True)
    found.view(-1)[order[: min(count, int(allowed.sum()))]] = True
    return found


def greedy(weight: Scores, edges: Edges, reads: Bool[Tensor, "slot sender"], count: int) -> Edges:
    """Edges grown from the output backwards: always the one of largest weight into a slot that is reached.

    A sender that is reached opens the slots that it is made of.
    """
    found = torch.zeros_like(edges)
    opened: set[int] = set()
    waiting: list[tuple[float, int, int]] = []

    def reach(slots: list[int]) -> None:
        for slot in slots:
            if slot not in opened:
                opened.add(slot)
                for sender in edges[:, slot].nonzero().flatten().tolist():
                    heapq.heappush(waiting, (-float(weight[sender, slot]), sender, slot))

    reach(connectivity.outputs(reads).nonzero().flatten().tolist())
    while waiting and int(found.sum()) < count:
        _, sender, slot = heapq.heappop(waiting)
        found[sender, slot] = True
        reach(reads[:, sender].nonzero().flatten().tolist())
    return found


def best_connected(weight: Scores, edges: Edges, reads: Bool[Tensor, "slot sender"], count: int) -> Edges:
    """The at most ``count`` edges of largest total weight in which every edge lies on a path from a source to the output.

    Two flows make every kept edge reachable from a source and lead to an output: an edge may be kept only if one of the edges into what its sender is
    made of is, and one of those out of what its slot makes. The graph has no cycle, so that these local conditions are enough.

    Raises:
        InputError: the solver found no solution.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    useful = connectivity.pruned(edges, reads)
    places = useful.nonzero().tolist()
    number = {tuple(place): index for index, place in enumerate(places)}
    first, last = connectivity.sources(reads), connectivity.outputs(reads)
    made, makes = reads.T, reads
    rows: list[list[tuple[int, float]]] = [[(index, 1.0) for index in range(len(places))]]
    for index, (sender, slot) in enumerate(places):
        if not bool(first[sender]):
            before = [
                number[s, d]
                for d in made[sender].nonzero().flatten().tolist()
                for s in useful[:, d].nonzero().flatten().tolist()
            ]
            rows.append([(index, 1.0), *((other, -1.0) for other in before)])
        if not bool(last[slot]):
            behind = [
                number[s, d]
                for s in makes[slot].nonzero().flatten().tolist()
                for d in useful[s].nonzero().flatten().tolist()
            ]
            rows.append([(index, 1.0), *((other, -1.0) for other in behind)])
    matrix = lil_matrix((len(rows), len(places)))
    for row, entries in enumerate(rows):
        for column, value in entries:
            matrix[row, column] += value
    limits = np.array([float(count), *np.zeros(len(rows) - 1)])
    cost = -np.array([float(weight[place[0], place[1]]) for place in places])
    # The solver's tolerances are absolute: of weights as small as they are, nothing would be worth an edge.
    solved = milp(
        cost / max(float(np.abs(cost).max(initial=0.0)), 1e-300),
        constraints=LinearConstraint(matrix.tocsr(), -np.inf, limits),
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise InputError(f"The integer programme was not solved: {solved.message}")
    found = torch.zeros_like(edges)
    for place, kept in zip(places, solved.x > 0.5, strict=True):
        found[place[0], place[1]] = bool(kept)
    # An edge of no weight may be kept for nothing.
    return connectivity.pruned(found, reads)


@with_provenance
def discover(
    attribution: EdgeAttribution,
    method: str = "top",
    *,
    n_edges: int | None = None,
    threshold: float | None = None,
    signed: bool = False,
    prune: bool = False,
    positive: float = 0.5,
    bootstrap: int = 0,
    level: float = 0.95,
    groups: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Discovery:
    """The circuit that scores of edges give, and how stable it is over resampled examples.

    Args:
        attribution: scores per example.
        method: ``"top"``, ``"greedy"``, ``"threshold"``, ``"interval"`` or ``"milp"``, see the module.
        n_edges: how many edges; of ``"threshold"`` none is given.
        threshold: of ``"threshold"``, in units of the metric.
        signed: whether edges are ranked by how much they work for the clean run's answer, not by size.
        prune: whether edges on no path are taken away at the end; always of ``"threshold"``, and ``"milp"`` has none.
        positive: of ``"interval"``, the share of the budget for edges that work for the answer.
        bootstrap: how many resamples of the examples; 0 for none.
        level: of ``"interval"``, the level of the percentile interval (200 resamples).
        groups: what belongs together when examples are resampled; None: the attribution's groups, or single examples.
        seed: of the resamples.
        progress: whether to show it.

    Raises:
        InputError: a number of edges that there is not, no threshold, scores that are no finite numbers, several metrics, a number of resamples
            or a level that is none.
    """
    choice = _checked(attribution, method, n_edges, threshold, signed, prune, positive)
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int) or bootstrap < 0:
        raise InputError(f"bootstrap={bootstrap!r} is no number of resamples: give a whole number, 0 for none.")
    if not 0 < level < 1:
        raise InputError(f"level={level!r} must lie between 0 and 1, such as 0.95.")
    units = _units(attribution, groups)
    generator = np.random.default_rng(checked_seed(seed))
    draws = _resamples(units.shape[-1], bootstrap, generator)
    exclude = _excluding_zero(units, level, generator) if method == "interval" else None
    mask = choice.of(units.mean(-1), exclude)
    if not bool(mask.any()):
        warn("No edge was chosen, so the circuit is empty: lower the threshold, or ask for more edges.")
    found = []
    with Progress(bootstrap, "resampling", progress and bootstrap > 0) as bar:
        for draw in draws:
            own = units[..., torch.from_numpy(draw)]
            found.append(
                choice.of(own.mean(-1), _excluding_zero(own, level, generator) if method == "interval" else None)
            )
            bar.advance()
    inclusion = torch.stack(found).double().mean(0) if found else mask.double()
    jaccard, chance = stability(found, attribution.n_edges) if len(found) > 1 else (math.nan, math.nan)
    return Discovery(
        values=inclusion.masked_fill(~choice.edges, math.nan),
        axes={"sender": attribution.axes["sender"], "slot": attribution.axes["slot"]},
        provenance=_origin(
            attribution,
            f"discover(method={method}, n_edges={n_edges}, threshold={threshold}, bootstrap={bootstrap})",
            seed,
        ),
        attribution=attribution,
        mask=mask,
        method=method,
        resamples=bootstrap,
        jaccard=jaccard,
        chance=chance,
    )


@with_provenance
def certify(
    attribution: EdgeAttribution,
    method: str = "top",
    *,
    n_edges: int | None = None,
    threshold: float | None = None,
    signed: bool = False,
    prune: bool = False,
    drop: float = 0.9,
    runs: int = 1000,
    alpha: float = 0.05,
    level: str = "edge",
    seed: int = 0,
    progress: bool = True,
) -> Certificate:
    """How many examples could be replaced, removed or added without changing the majority's decision on each edge.

    The circuit is found on ``runs`` subsets of the examples, in each of which every example is dropped with probability ``drop``. With the lower
    Clopper–Pearson bound ``μ`` of the share of subsets that decide as the majority does (``alpha`` shared among both sides of all edges, as which
    side is the majority's is read from the same subsets), the decision holds for fewer than ``ln(3/2 - μ)/ln p`` replaced, ``ln(2(1 - μ))/ln p``
    removed and ``ln(1/(2μ))/ln p`` added examples.

    Args:
        attribution, method, n_edges, threshold, signed, prune: as of :func:`discover`, but ``"interval"``.
        drop: the probability ``p`` with which an example is left out.
        runs: how many subsets.
        alpha: the probability that any bound is wrong.
        level: ``"edge"``, or ``"node"``: whether any edge out of a sender is in the circuit, which takes a fraction of the memory and of ``alpha``.
        seed: of the subsets.
        progress: whether to show it.

    Raises:
        InputError: ``drop`` or ``alpha`` outside 0 to 1, no subsets, and what :func:`discover` refuses.

    Source: Certified Circuits (2026), the algebra written out in this library's tests.
    """
    if method == "interval":
        raise InputError("A certificate votes over subsets of examples: choose a method other than 'interval'.")
    if not 0 < drop < 1 or level not in ("edge", "node"):
        raise InputError(f"drop={drop} must lie between 0 and 1, and level={level!r} be 'edge' or 'node'.")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1 or not 0 < alpha < 1:
        raise InputError(f"runs={runs!r} must be a whole number from 1 on, and alpha={alpha!r} lie between 0 and 1.")
    choice = _checked(attribution, method, n_edges, threshold, signed, prune, 0.5)
    units = _units(attribution, list(range(len(attribution.examples))))
    generator = np.random.default_rng(checked_seed(seed))
    votes = torch.zeros(choice.edges.shape, dtype=torch.float64)
    nodes = torch.zeros(len(choice.edges), dtype=torch.float64)
    with Progress(runs, "certifying", progress) as bar:
        for _ in range(runs):
            kept = torch.from_numpy(generator.random(units.shape[-1]) >= drop)
            # Without an example there is no score, and so no edge.
            mask = choice.of(units[..., kept].mean(-1)) if bool(kept.any()) else torch.zeros_like(choice.edges)
            votes += mask
            nodes += mask.any(1)
            bar.advance()
    if level == "node":
        share, axes, there = nodes / runs, {"sender": attribution.axes["sender"]}, choice.edges.any(1)
    else:
        share, axes, there = votes / runs, {name: attribution.axes[name] for name in ("sender", "slot")}, choice.edges
    return Certificate(
        values=radii(share, runs, int(there.sum()), drop, alpha).masked_fill(~there, math.nan),
        axes={"change": ["replaced", "removed", "added"], **axes},
        provenance=_origin(attribution, f"certify(method={method}, drop={drop}, runs={runs}, level={level})", seed),
        share=share.masked_fill(~there, math.nan),
        drop=drop,
        runs=runs,
        alpha=alpha,
    )


def _checked(
    attribution: EdgeAttribution,
    method: str,
    n_edges: int | None,
    threshold: float | None,
    signed: bool,
    prune: bool,
    positive: float,
) -> Choice:
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}; choose one of {', '.join(map(repr, METHODS))}.")
    if not isinstance(attribution, EdgeAttribution):
        raise InputError(
            f"Give scores of edges, such as edge_attribution(model, pairs, metric), not a {type(attribution).__name__}."
        )
    if attribution.metrics:
        raise InputError(
            f"Several metrics were scored ({', '.join(attribution.metrics)}); score one to choose edges by."
        )
    held = attribution.totals[attribution.edges]
    if not bool(held.isfinite().all()):
        raise InputError("Some scores are no finite numbers; score the edges again, in float32.")
    if method == "threshold":
        if threshold is None or n_edges is not None or not threshold > 0:
            raise InputError(
                "method='threshold' takes threshold=…, above 0 and in units of the metric, and no n_edges."
            )
    elif (
        threshold is not None
        or isinstance(n_edges, bool)
        or not isinstance(n_edges, int)
        or not 0 < n_edges <= attribution.n_edges
    ):
        raise InputError(f"method={method!r} takes n_edges=…, from 1 to {attribution.n_edges}, and no threshold.")
    if not 0 <= positive <= 1:
        raise InputError(f"positive={positive} is no share of the budget.")
    return Choice(
        method,
        n_edges or 0,
        threshold or 0.0,
        signed,
        prune or method == "threshold",
        positive,
        attribution.edges,
        attribution.circuit([]).reads,
        attribution.favour,
    )


def _origin(attribution: EdgeAttribution, method: str, seed: int) -> dict[str, Any]:
    """The provenance of what was made of scores: that of the scores, with another method."""
    left = ("method", "seed", "call", "created", "cannot_restore", "command")
    known = {key: value for key, value in attribution.provenance.items() if key not in left}
    return {**known, "method": method, "seed": seed, "scores": attribution.provenance.get("method", "")}


def _units(attribution: EdgeAttribution, groups: Any) -> Float[Tensor, "sender slot unit"]:
    """The scores of examples, or of groups of them."""
    labels = groups if groups is not None else attribution.groups or list(range(attribution.values.shape[-1]))
    return by_example(attribution.totals.double(), list(labels))


def _resamples(count: int, times: int, generator: np.random.Generator) -> list[np.ndarray]:
    if times and count < 2:
        raise InputError(f"There is {count} example (or group), so none can be resampled; take bootstrap=0.")
    return [generator.integers(0, count, count) for _ in range(times)]


def _excluding_zero(units: Tensor, level: float, generator: np.random.Generator, times: int = 200) -> Edges:
    """The edges whose percentile interval of the mean does not hold 0."""
    count = units.shape[-1]
    weights = torch.from_numpy(generator.multinomial(count, np.full(count, 1 / count), times)).double() / count
    low, high = (1 - level) / 2, (1 + level) / 2
    found = torch.zeros(units.shape[:2], dtype=torch.bool)
    for row, own in enumerate(units.nan_to_num()):
        means = own @ weights.T
        bounds = torch.quantile(means, torch.tensor([low, high], dtype=means.dtype), dim=-1)
        found[row] = (bounds[0] > 0) | (bounds[1] < 0)
    return found


def stability(masks: list[Edges], n_edges: int) -> tuple[float, float]:
    """The mean pairwise Jaccard index of circuits, and that of random sets of their mean size ``k`` among ``n``: ``k²/n / (2k - k²/n)``."""
    rows = torch.stack([mask.flatten() for mask in masks]).double()
    both = rows @ rows.T
    size = rows.sum(1)
    either = size[:, None] + size[None] - both
    pairs = torch.triu_indices(len(masks), len(masks), 1)
    shares = (both / either)[pairs[0], pairs[1]]
    k = float(size.mean())
    overlap = k * k / n_edges
    return float(shares.nanmean()), overlap / (2 * k - overlap) if k else math.nan
