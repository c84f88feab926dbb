"""Which edges a circuit can do without: one by one, and as sets.

A circuit is *locally minimal* (for a tolerance) if no single edge can be removed without losing more than the tolerance of its faithfulness; that
takes one run per edge. *Subset-minimal* circuits keep a given faithfulness and no proper subset of them does; finding all of them takes every subset
that holds none found before, so it is offered for circuits of :data:`MOST` edges at most. Two subset-minimal circuits of one model are backups of
each other: an OR has two.

Not covered: guarantees over more inputs than those that are run (provable circuits).

Reference: Adolfi et al. 2024 (arXiv 2410.08025) for the hierarchy of minimality.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.evaluation import _runs_of, faithful_scores
from circuitvision.errors import InputError
from circuitvision.metrics.effects import restored_error, restored_share
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

MOST = 16
"""How many edges a circuit may have for all of its subsets to be tried."""


@dataclass(frozen=True, eq=False)
class Minimality(Result):
    """The metric of a circuit without each of its edges: ``values`` ``[edge example]``; ``whole`` ``[example]`` is that of the circuit.

    ``clean`` and ``empty`` ``[example]`` are the metric of the model and of the circuit without edges.
    """

    whole: Tensor = field(default_factory=lambda: torch.zeros(0))
    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    empty: Tensor = field(default_factory=lambda: torch.zeros(0))
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"whole": -1, "clean": -1, "empty": -1, "groups": 0}

    def _runs(self) -> tuple[Tensor, Tensor, Tensor]:
        values = self.values.double()
        empty, clean = self.empty.double().expand_as(values), self.clean.double().expand_as(values)
        return self.whole.double() - values, empty, clean

    @property
    def loss(self) -> Float[Tensor, " edge"]:
        """How much faithfulness each edge's removal costs; below 0 where the circuit is better without it."""
        return restored_share(*self._runs())

    @property
    def loss_error(self) -> Float[Tensor, " edge"]:
        """The standard error of :attr:`loss` over examples."""
        return restored_error(*self._runs())

    def removable(self, tolerance: float = 0.01) -> list[str]:
        """The edges whose removal changes faithfulness by no more than the tolerance, in either direction."""
        return [
            str(edge)
            for edge, loss in zip(self.axes["edge"], self.loss.abs().tolist(), strict=True)
            if loss <= tolerance
        ]

    def locally_minimal(self, tolerance: float = 0.01) -> bool:
        """Whether no single edge can be removed within the tolerance."""
        return not self.removable(tolerance)

    def highlights(self) -> dict[str, str]:
        """How many edges can be removed alone."""
        return {"edges": str(len(self.axes["edge"])), "removable alone": str(len(self.removable()))}


@with_provenance
def minimality(
    model: Any,
    circuit: Circuit,
    pairs: Any = None,
    metric: Any = None,
    *,
    ablation: str = "interchange",
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> Minimality:
    """Run a circuit without each of its edges, in one sweep. Arguments and errors as of :func:`circuitvision.circuits.evaluate`."""
    runs = _runs_of(model, circuit, pairs, metric, clean, corrupt, align, allow_wrong, example_batch)
    mask, names = runs.mask(circuit), circuit.edges
    without = []
    for name in names:
        one = mask.clone()
        one[runs.graph.edge(name)] = False
        without.append(one)
    found = runs.measure([mask, *without], ablation, progress=progress)
    runs.runs.warn()
    return Minimality(
        values=found.values[0, 1:],
        axes={"edge": names, "example": found.examples},
        provenance=describe(
            model, method=f"minimality(ablation={ablation})", metric=runs.runs.metrics, **runs.runs.described()
        ),
        whole=found.values[0, 0],
        clean=found.clean[0],
        empty=found.empty[0],
        groups=runs.runs.groups,
    )


def minimal_subcircuits(
    model: Any,
    circuit: Circuit,
    pairs: Any = None,
    metric: Any = None,
    *,
    faithfulness: float = 0.9,
    ablation: str = "interchange",
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> list[Circuit]:
    """All subsets of a circuit's edges with at least this faithfulness, of which no proper subset has it: by trying them, smaller ones first.

    Raises:
        InputError: more than :data:`MOST` edges, and what :func:`circuitvision.circuits.evaluate` refuses.
    """
    if len(circuit) > MOST:
        raise InputError(
            f"All subsets of {len(circuit)} edges are too many: give {MOST} at most, or use minimality, which removes one edge at a time."
        )
    runs = _runs_of(model, circuit, pairs, metric, clean, corrupt, align, allow_wrong, example_batch)
    found: list[frozenset[str]] = []
    for size in range(1, len(circuit) + 1):
        sets = [set(one) for one in itertools.combinations(circuit.edges, size)]
        tried = [one for one in sets if not any(known <= one for known in found)]
        if not tried:
            break
        scores = faithful_scores(runs.measure([runs.graph.mask(one) for one in tried], ablation, progress=progress))
        found += [frozenset(one) for one, score in zip(tried, scores.tolist(), strict=True) if score >= faithfulness]
    return [Circuit.of(circuit.attribution, sorted(one)) for one in found]
