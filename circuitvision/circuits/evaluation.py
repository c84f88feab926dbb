"""Does a circuit explain the model: its faithfulness, what its complement can do, and circuits of the same size that are drawn at random.

    ``faithfulness(C) = (m(C) - m(empty)) / (m(clean) - m(empty))``

``m(C)`` is the metric of runs in which the edges of ``C`` alone work (:mod:`circuitvision.circuits.circuit_runs`), a ratio of means over examples,
1 with all edges and 0 with none by construction. It is no share: circuits whose missing edges work against the answer lie above 1. It depends on
what ablated edges carry, so three kinds stand beside each other. *Completeness* is the faithfulness of the complement: what the circuit leaves out.

:func:`faithfulness_curve` measures the ``n`` strongest edges for several ``n``, with both ends exact: ``cpr``, the area under it over the share of
edges (edges by signed score), ``cmd``, the area between it and 1 (by size), split where it crosses 1, and ``log_area``, over the logarithm of the
share, in which half of the area is not that of the second half of the edges.

Not covered: fitted ablations; weights of edges between 0 and 1.

Reference: Wang et al. 2022 (arXiv 2211.00593); Hanna et al. 2024 (arXiv 2403.17806); Mueller et al. 2025 (arXiv 2504.13151) for CPR and CMD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits import connectivity
from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.circuit_runs import ABLATIONS, CircuitRuns, CircuitScores
from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.errors import InputError, checked_seed, warn
from circuitvision.metrics.effects import restored_error, restored_share
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import by_example

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CIRCUIT, COMPLEMENT = "circuit", "complement"
RANKINGS = ("size", "signed")


@dataclass(frozen=True, eq=False)
class CircuitEvaluation(Result):
    """The metric of a circuit, its complement, and random circuits of its size: ``values`` ``[ablation condition example]``.

    ``clean`` ``[example]`` is the metric of the model itself, ``empty`` ``[ablation example]`` that with no edge left. Conditions are ``"circuit"``,
    ``"complement"``, ``"random 1"`` … (unions of random paths) and ``"rewired 1"`` … (the same number of edges out of every sender and into every
    slot). ``edges`` names those of the circuit, of ``n_edges`` that the model has; ``random_sizes`` are those of the random circuits.
    """

    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    empty: Tensor = field(default_factory=lambda: torch.zeros(0))
    corrupt: Tensor = field(default_factory=lambda: torch.zeros(0))
    edges: list[str] = field(default_factory=list)
    n_edges: int = 0
    random_sizes: list[int] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"clean": -1, "empty": -1, "corrupt": -1, "groups": 0}

    def _runs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a circuit adds to the empty one, the empty one, and the clean run, by group where the data has groups."""
        groups = self.groups or list(range(self.values.shape[-1]))
        values, empty, clean = (by_example(one.double(), groups) for one in (self.values, self.empty, self.clean))
        empty = empty.unsqueeze(1).expand_as(values)
        return values - empty, empty, clean.expand_as(values)

    @property
    def faithfulness(self) -> Float[Tensor, "ablation condition"]:
        """``(m(C) - m(empty)) / (m(clean) - m(empty))``, a ratio of means; NaN where the clean and the empty run do not differ."""
        return restored_share(*self._runs())

    @property
    def faithfulness_error(self) -> Float[Tensor, "ablation condition"]:
        """The standard error of :attr:`faithfulness`, over groups of examples where the data has them."""
        return restored_error(*self._runs())

    def of(self, condition: str = CIRCUIT, ablation: str | None = None) -> float:
        """The faithfulness of one condition, under one ablation (None: the first)."""
        row = 0 if ablation is None else self.index_of("ablation", ablation)
        return float(self.faithfulness[row, self.index_of("condition", condition)])

    @property
    def completeness(self) -> Float[Tensor, " ablation"]:
        """The faithfulness of the complement: near 0 where nothing is left out, unless both work alone."""
        return self.faithfulness[:, self.index_of("condition", COMPLEMENT)]

    def randoms(self, kind: str = "random") -> Float[Tensor, "ablation draw"]:
        """The faithfulness of random circuits (``"random"``) or of rewired ones (``"rewired"``)."""
        places = [n for n, label in enumerate(self.axes["condition"]) if str(label).startswith(f"{kind} ")]
        return self.faithfulness[:, places]

    @property
    def better_than_random(self) -> Float[Tensor, " ablation"]:
        """``(1 + how many random circuits are at least as faithful) / (1 + how many were drawn)``: the p-value of chance."""
        others = self.randoms()
        at_least = (others >= self.faithfulness[:, :1]).sum(-1)
        return (1 + at_least) / (1 + others.shape[-1])

    @property
    def variation(self) -> float:
        """The coefficient of variation of the circuit's faithfulness over the kinds of ablation; NaN for one kind."""
        own = self.faithfulness[:, 0]
        return float(own.std() / own.mean().abs()) if len(own) > 1 else math.nan

    def to_frame(self, by_example: bool = False) -> Any:
        """A table of faithfulness per ablation and condition, or with ``by_example`` the metric of every example."""
        if by_example:
            return super().to_frame(by_example=True)
        import pandas as pd

        found, error = self.faithfulness, self.faithfulness_error
        rows = [
            {
                "ablation": ablation,
                "condition": condition,
                "faithfulness": float(found[row, column]),
                "standard_error": float(error[row, column]),
                "metric": float(self.values[row, column].double().nanmean()),
            }
            for row, ablation in enumerate(self.axes["ablation"])
            for column, condition in enumerate(self.axes["condition"])
        ]
        return pd.DataFrame(rows)

    def highlights(self) -> dict[str, str]:
        """Faithfulness and completeness under each ablation, beside random circuits."""
        found = {"edges": f"{len(self.edges)} of {self.n_edges}"}
        others = self.randoms()
        for row, ablation in enumerate(self.axes["ablation"]):
            own = f"{self.faithfulness[row, 0]:.2f} (complement {self.completeness[row]:.2f}"
            found[str(ablation)] = own + (f", random {others[row].mean():.2f})" if others.shape[-1] else ")")
        return found


@with_provenance
def evaluate(
    model: Any,
    circuit: Circuit,
    pairs: Any = None,
    metric: Any = None,
    *,
    ablations: Sequence[str] = ABLATIONS,
    n_random: int = 10,
    seed: int = 0,
    reference: Any = None,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> CircuitEvaluation:
    """Measure a circuit, its complement, and random circuits of its size, under several kinds of ablation.

    Nothing that is given is changed. Examples should be others than those that the circuit was found on.

    Args:
        model: the hooked model.
        circuit: what is evaluated, such as ``edge_attribution(…).circuit(50)``.
        pairs: a data set of pairs; or ``clean`` and ``corrupt``, inputs of the same shapes.
        metric: one metric, or its name.
        ablations: what ablated edges carry: ``"interchange"``, ``"mean"``, ``"zero"`` (:mod:`circuitvision.circuits.circuit_runs`).
        n_random: how many unions of random paths, and how many rewired circuits, are measured beside it.
        seed: of their draws.
        reference: pairs whose mean ``"mean"`` takes; None: these.
        align, allow_wrong, example_batch, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: a circuit without edges, or of a model with other weights; several metrics; an unknown ablation.
    """
    runs = _runs_of(model, circuit, pairs, metric, clean, corrupt, align, allow_wrong, example_batch, reference)
    for ablation in ablations:
        _check_ablation(ablation)
    mask = runs.mask(circuit)
    generator = torch.Generator().manual_seed(checked_seed(seed))
    labels, masks = [CIRCUIT, COMPLEMENT], [mask, runs.graph.edges & ~mask]
    for number in range(n_random):
        labels.append(f"random {number + 1}")
        masks.append(connectivity.random_circuit(runs.graph.edges, runs.graph.reads, int(mask.sum()), generator))
    for number in range(n_random):
        labels.append(f"rewired {number + 1}")
        masks.append(connectivity.rewired(mask, runs.graph.edges, generator))
    found = [runs.measure(masks, ablation, progress=progress) for ablation in ablations]
    runs.runs.warn()
    return CircuitEvaluation(
        values=torch.stack([one.values[0] for one in found]),
        axes={"ablation": list(ablations), "condition": labels, "example": found[0].examples},
        provenance=describe(
            model,
            method=f"evaluate(ablations={', '.join(ablations)}, n_random={n_random})",
            metric=runs.runs.metrics,
            seed=seed,
            **runs.runs.described(),
        ),
        clean=found[0].clean[0],
        empty=torch.stack([one.empty[0] for one in found]),
        corrupt=found[0].corrupt[0],
        edges=circuit.edges,
        n_edges=runs.graph.n_edges,
        random_sizes=[int(one.sum()) for one in masks[2 : 2 + n_random]],
        groups=runs.runs.groups,
    )


def _check_ablation(ablation: str) -> None:
    if ablation not in ABLATIONS:
        raise InputError(f"Unknown ablation {ablation!r}; choose one of {', '.join(map(repr, ABLATIONS))}.")


def _runs_of(
    model: Any,
    circuit: Circuit,
    pairs: Any,
    metric: Any,
    clean: Any,
    corrupt: Any,
    align: Any,
    allow_wrong: bool,
    size: int | None,
    reference: Any = None,
) -> CircuitRuns:
    """The runs of one metric for a circuit with edges; warns where it was found on the same data."""
    if not isinstance(circuit, Circuit):
        raise InputError(
            f"Give a circuit, such as edge_attribution(…).circuit(50) or circuit_of_graph(graph), not a {type(circuit).__name__}."
        )
    if not len(circuit):
        raise InputError("The circuit has no edge, so there is nothing to evaluate.")
    given = {"clean": clean, "corrupt": corrupt, "align": align, "allow_wrong": allow_wrong, "example_batch": size}
    runs = CircuitRuns(model, pairs, metric, reference=reference, **given)
    if runs.runs.metrics.several:
        raise InputError("One metric is evaluated at a time: give one, not a mapping of several.")
    same = runs.runs.described().get("dataset_sha256")
    if same and same == circuit.attribution.provenance.get("dataset_sha256"):
        warn(
            "The circuit was found on these very examples, so this is not what it would do on others: evaluate it on a held-out part."
        )
    return runs


# -- curves ------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Result):
    """The metric of the strongest edges alone, for several numbers of them: ``values`` ``[condition share example]``.

    Conditions are ``"ranked"`` and ``"random 1"`` …, unions of random paths of the same size. ``share`` are the shares of the model's edges that the
    circuits really have, ``sizes`` their numbers of edges; the first is 0 (``empty``), the last 1 (``clean``). ``rank`` says how edges were ranked.
    """

    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    empty: Tensor = field(default_factory=lambda: torch.zeros(0))
    sizes: list[int] = field(default_factory=list)
    rank: str = "size"
    ablation: str = "interchange"
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"clean": -1, "empty": -1, "groups": 0}

    def _runs(self) -> tuple[Tensor, Tensor, Tensor]:
        groups = self.groups or list(range(self.values.shape[-1]))
        values, empty, clean = (by_example(one.double(), groups) for one in (self.values, self.empty, self.clean))
        return values - empty, empty.expand_as(values), clean.expand_as(values)

    @property
    def faithfulness(self) -> Float[Tensor, "condition share"]:
        """As of :class:`CircuitEvaluation`."""
        return restored_share(*self._runs())

    @property
    def faithfulness_error(self) -> Float[Tensor, "condition share"]:
        """The standard error of :attr:`faithfulness`."""
        return restored_error(*self._runs())

    @property
    def shares(self) -> np.ndarray:
        """The shares of edges, from 0 to 1."""
        return np.array(self.axes["share"], dtype=float)

    @property
    def cpr(self) -> Float[Tensor, " condition"]:
        """The area under the curve over the share of edges, from 0 to 1: 1 for a circuit that is faithful at every size."""
        return torch.tensor([area(self.shares, one.numpy()) for one in self.faithfulness])

    @property
    def cmd(self) -> Float[Tensor, " condition"]:
        """The area between the curve and 1, split where it crosses 1: 0 for a circuit that is faithful at every size."""
        return torch.tensor([area_beside(self.shares, one.numpy() - 1.0) for one in self.faithfulness])

    @property
    def log_area(self) -> Float[Tensor, " condition"]:
        """The mean of the curve over the logarithm of the share, from one edge to all."""
        inner = self.shares > 0
        points = np.log(self.shares[inner])
        width = points[-1] - points[0]
        return torch.tensor(
            [area(points, one.numpy()[inner]) / width if width else math.nan for one in self.faithfulness]
        )

    def size_for(self, faithfulness: float = 0.9) -> int | None:
        """The smallest number of ranked edges that were measured whose faithfulness is at least this; None where none is."""
        own = self.faithfulness[0]
        return next((size for size, value in zip(self.sizes, own.tolist(), strict=True) if value >= faithfulness), None)

    def highlights(self) -> dict[str, str]:
        """The three areas, beside those of random circuits."""
        found = {}
        for name, values in (("cpr", self.cpr), ("cmd", self.cmd), ("log area", self.log_area)):
            beside = f" (random {values[1:].mean():.3f})" if len(values) > 1 else ""
            found[name] = f"{values[0]:.3f}{beside}"
        return found


def area(points: np.ndarray, values: np.ndarray) -> float:
    """The area under straight lines between points."""
    return float(np.trapezoid(values, points))


def area_beside(points: np.ndarray, values: np.ndarray) -> float:
    """The area between straight lines and 0, of both signs counted, each line split where it crosses 0."""
    total = 0.0
    for width, left, right in zip(np.diff(points), values[:-1], values[1:], strict=True):
        if left * right >= 0:
            total += width * (abs(left) + abs(right)) / 2
        else:
            total += width * (left**2 + right**2) / (abs(left) + abs(right)) / 2
    return float(total)


@with_provenance
def faithfulness_curve(
    model: Any,
    attribution: EdgeAttribution,
    pairs: Any = None,
    metric: Any = None,
    *,
    shares: Sequence[float] = SHARES,
    rank: str | Callable[[EdgeAttribution, int], Circuit] = "size",
    ablation: str = "interchange",
    n_random: int = 0,
    seed: int = 0,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> FaithfulnessCurve:
    """How faithful the strongest edges are, for growing numbers of them.

    Args:
        model: the hooked model.
        attribution: the scores of its edges.
        pairs, metric, clean, corrupt: as of :func:`evaluate`.
        shares: shares of all edges; 0 and 1 are added.
        rank: ``"size"`` of the mean score, its ``"signed"`` value (those that work for the answer of the clean run first: the most negative change
            when they are corrupted), or a function of the attribution and a number of edges.
        ablation, n_random, seed: as of :func:`evaluate`.
        align, allow_wrong, example_batch, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: shares outside 0 to 1, and what :func:`evaluate` refuses.
    """
    if any(not 0 <= share <= 1 for share in shares):
        raise InputError("Shares of edges lie between 0 and 1.")
    _check_ablation(ablation)
    total = attribution.n_edges
    sizes = sorted({round(share * total) for share in (0.0, *shares, 1.0)})
    every = attribution.circuit(attribution.edges)
    runs = _runs_of(model, every, pairs, metric, clean, corrupt, align, allow_wrong, example_batch)
    masks = [runs.mask(one) for one in ranked(attribution, sizes, rank)]
    reads, edges = runs.graph.reads, runs.graph.edges
    generator = torch.Generator().manual_seed(checked_seed(seed))
    useful = int(connectivity.pruned(edges, reads).sum())
    none = torch.zeros_like(edges)
    for _ in range(n_random):
        masks += [
            none
            if not size
            else edges
            if size >= useful
            else connectivity.random_circuit(edges, reads, size, generator)
            for size in sizes
        ]
    found = runs.measure(masks, ablation, progress=progress)
    runs.runs.warn()
    named = rank if isinstance(rank, str) else getattr(rank, "__name__", "function")
    return FaithfulnessCurve(
        values=found.values[0].unflatten(0, (1 + n_random, len(sizes))),
        axes={
            "condition": ["ranked", *(f"random {number + 1}" for number in range(n_random))],
            "share": [size / total for size in sizes],
            "example": found.examples,
        },
        provenance=describe(
            model,
            method=f"faithfulness_curve(rank={named}, ablation={ablation}, n_random={n_random})",
            metric=runs.runs.metrics,
            seed=seed,
            **runs.runs.described(),
        ),
        clean=found.clean[0],
        empty=found.empty[0],
        sizes=sizes,
        rank=named,
        ablation=ablation,
        groups=runs.runs.groups,
    )


def ranked(
    attribution: EdgeAttribution, sizes: Sequence[int], rank: str | Callable[[EdgeAttribution, int], Circuit] = "size"
) -> list[Circuit]:
    """Circuits of the first edges of a ranking, see :func:`faithfulness_curve`.

    Raises:
        InputError: an unknown ranking.
    """
    if callable(rank):
        return [rank(attribution, size) if size else attribution.circuit([]) for size in sizes]
    if rank not in RANKINGS:
        raise InputError(
            f"Unknown ranking {rank!r}; choose one of {', '.join(map(repr, RANKINGS))}, or give a function."
        )
    order = signed_order(attribution) if rank == "signed" else [name for name, _ in attribution.ranking()]
    return [attribution.circuit(order[:size]) for size in sizes]


def signed_order(attribution: EdgeAttribution) -> list[str]:
    """Edges by how much they work for the clean run's answer, those that work most for it first."""
    return [name for name, score in sorted(attribution.ranking(), key=lambda entry: -attribution.favour * entry[1])]


def faithful_scores(found: CircuitScores) -> Float[Tensor, " circuit"]:
    """The faithfulness of every circuit that was measured, of the first metric."""
    values = found.values[0].double()
    empty, clean = found.empty[0].double().expand_as(values), found.clean[0].double().expand_as(values)
    return restored_share(values - empty, empty, clean)
