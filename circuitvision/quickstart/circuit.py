"""The circuit of edges of the main job, and the tests of what it claims, on pairs that the search did not see.

Edges are scored by the gradient along the path on which all of them are corrupted (``"mask-ig"``); the circuit is the smallest of :data:`SHARES` of
them that gives back :data:`ENOUGH` of the answer on the pairs it was found on, without edges that lead nowhere.

Not covered: a single pair, of which nothing can be tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitvision.circuits import Circuit, ClaimTests, EdgeAttribution, claim_tests, edge_attribution, export
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.data import Pairs
from circuitvision.plots.claims import write_page

SHARES = (0.05, 0.1, 0.2, 0.3)
ENOUGH = 0.9
STEPS = 5
PAIRS = 16
"""On how many pairs edges are scored, and on how many others the circuit is tested."""
RANDOM = 19
"""So many random circuits must be beaten where p is to be .05."""
TESTED = 3
"""How many of the strongest edges are tested one by one."""


@dataclass(frozen=True)
class EdgeCircuit:
    """The scores of all edges, the circuit, and its tests."""

    scores: EdgeAttribution
    circuit: Circuit
    tests: ClaimTests

    def said(self) -> list[tuple[str, str]]:
        """What the tests say: question and reading."""
        return [("edges", f"{len(self.circuit)} of {self.scores.n_edges}"), *self.tests.highlights().items()]

    def write(self, folder: Path) -> list[Path]:
        """Write ``edges.graphml`` and ``tests.html``; returns the paths."""
        graph = export(self.circuit.to_networkx(), folder / "edges.graphml")
        return [graph, write_page(self.tests, folder / "tests.html")]


def edge_circuit(model: Any, find: Pairs, check: Pairs, seed: int = 0) -> EdgeCircuit:
    """The circuit and its tests.

    Raises:
        UnsupportedModelError: a model whose parts do not read sums of what others write.
    """
    options: dict[str, Any] = {"allow_wrong": True}
    scores = edge_attribution(model, find, "logit_diff", method="mask-ig", steps=STEPS, **options)
    circuit = _smallest(model, scores, find)
    strongest = [name for name, _ in scores.ranking() if name in circuit][:TESTED]
    options |= {"n_random": RANDOM, "permutations": 200, "edges": strongest, "seed": seed, "discovered_on": find}
    return EdgeCircuit(scores, circuit, claim_tests(model, circuit, check, "logit_diff", **options))


def _smallest(model: Any, scores: EdgeAttribution, pairs: Pairs) -> Circuit:
    """The smallest circuit that gives back enough on these pairs, else the largest."""
    circuits = [scores.circuit(max(1, round(share * scores.n_edges))).pruned() for share in SHARES]
    circuits = [one for one in circuits if len(one)] or [scores.circuit(scores.n_edges)]
    runs = CircuitRuns(model, pairs, "logit_diff", allow_wrong=True)
    found = runs.measure([runs.mask(one) for one in circuits])
    gap = (found.clean - found.empty).mean()
    kept = ((found.values - found.empty[:, None]).mean(-1) / gap)[0].tolist()
    return next((one for one, share in zip(circuits, kept, strict=True) if share >= ENOUGH), circuits[-1])
