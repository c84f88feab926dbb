"""Tests of what a circuit claims, on examples that its discovery did not see: one table, and no single verdict.

* *sign*: of the examples in which circuit and model differ, how often the circuit is better; a small p says *not* equivalent.
* *equivalence*: two one-sided t-tests of the paired difference, within ``margin`` of the gap between clean and empty run; a small p says equivalent.
* *independence*: whether what the complement adds to the empty run depends on the model's score (HSIC); a small p: something is left outside.
* *sufficiency*: faithfulness against unions of random paths of as many edges; a small p says better than chance.
* *partial necessity*: the loss when the circuit is removed, against removing as many random edges; a small p says that the model needs it, in part.
* *edges*: the mean squared change of the score without each edge, against that without a random added edge of a randomly inflated circuit (Holm).

That the first is not rejected is no evidence of equivalence, which the second asks for. Scores of one group (of one scene, say) are averaged first,
so that pairs of one scene count once.

Not covered: whether nodes mean what they are said to mean; other prompts, models, and kinds of ablation than those that were run.

Reference: Shi et al. 2024 (arXiv 2410.13032), with the tests written anew (:mod:`circuitvision.circuits.claim_statistics`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.circuits import claim_statistics as statistics
from circuitvision.circuits import connectivity
from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.circuits.evaluation import check_ablations, checked_circuits, checked_count, circuit_runs
from circuitvision.errors import InputError, checked_seed, warn
from circuitvision.metrics.effects import restored_share
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import by_example

Edges = Bool[Tensor, "sender slot"]


@dataclass(frozen=True, eq=False)
class ClaimTests(Result):
    """The scores that the tests read, ``values`` ``[condition example]``, and what the tests say.

    Conditions are ``"clean"``, ``"empty"``, ``"circuit"``, ``"complement"``, ``"random 1"`` … and ``"without random 1"`` …. ``table`` has a row for
    each question; ``edges`` one for each edge of the circuit: its mean squared change, p-value, and Holm's adjusted one. ``circuit`` names the edges.
    """

    table: list[dict[str, Any]] = field(default_factory=list)
    edges: list[dict[str, Any]] = field(default_factory=list)
    circuit: list[str] = field(default_factory=list)
    n_edges: int = 0
    ablation: str = "interchange"
    margin: float = 0.1
    alpha: float = 0.05
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"groups": 0}

    def p(self, question: str) -> float:
        """The p-value of a question: "sign", "equivalence", "independence", "sufficiency" or "partial necessity"."""
        for row in self.table:
            if row["question"] == question:
                return float(row["p"])
        raise InputError(
            f"There is no question {question!r}; those are {', '.join(row['question'] for row in self.table)}."
        )

    def faithfulness(self, condition: str = "circuit") -> float:
        """The faithfulness of a condition, a ratio of means over groups."""
        clean, empty, own = (self._scores(name) for name in ("clean", "empty", condition))
        return float(restored_share(own - empty, empty, clean))

    def _scores(self, condition: str) -> Float[Tensor, " unit"]:
        values = self.values[self.index_of("condition", condition)].double()
        return by_example(values, self.groups or list(range(len(values))))

    def drawn(self, kind: str = "random") -> list[float]:
        """The faithfulness of every random circuit ("random"), or of the model without it ("without random")."""
        names = [str(name) for name in self.axes["condition"] if str(name).startswith(f"{kind} ")]
        return [self.faithfulness(name) for name in names]

    @property
    def needed(self) -> list[str]:
        """The edges whose adjusted p-value is below ``alpha``."""
        return [row["edge"] for row in self.edges if row["p adjusted"] < self.alpha]

    def to_frame(self, by_example: bool = False) -> pd.DataFrame:
        """The table of questions, or with ``by_example`` the scores."""
        if by_example:
            return super().to_frame(by_example=True)
        return pd.DataFrame(self.table)

    def edge_frame(self) -> pd.DataFrame:
        """The table of edges."""
        return pd.DataFrame(self.edges)

    def highlights(self) -> dict[str, str]:
        """Every question's reading."""
        found = {str(row["question"]): str(row["reading"]) for row in self.table}
        return {**found, "edges needed": f"{len(self.needed)} of {len(self.edges)}"}


@with_provenance
def claim_tests(
    model: Any,
    circuit: Circuit,
    pairs: Any = None,
    metric: Any = None,
    *,
    ablation: str = "interchange",
    margin: float = 0.1,
    tolerance: float = 0.1,
    alpha: float = 0.05,
    n_random: int = 100,
    permutations: int = 1000,
    edges: Sequence[str] | None = None,
    seed: int = 0,
    discovered_on: Any = None,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> ClaimTests:
    """Test what a circuit claims; ``2 + 4 · n_random + edges`` runs of every example.

    Args:
        model: the hooked model.
        circuit: the circuit.
        pairs, metric, clean, corrupt: as of :func:`circuitvision.circuits.evaluate`; examples that the discovery did not see.
        ablation: what ablated edges carry.
        margin: of equivalence, as a share of the mean gap between the clean and the empty run.
        tolerance: of the sign test.
        alpha: the level, for what is put in words.
        n_random: how many random circuits, removals, and inflated circuits are drawn; of ``k`` edges none can be found needed with fewer than
            ``k / alpha``.
        permutations: of the test of independence.
        edges: the edges that are tested; None: all of the circuit.
        seed: of all draws.
        discovered_on: the pairs on which the circuit was found; none of them may be among these.
        align, allow_wrong, example_batch, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: pairs that are among those of the discovery, an edge that is not in the circuit, a margin that is not above 0, a tolerance
            outside 0 to 1/2, a level or a number of draws that is none, and what
            :func:`circuitvision.circuits.evaluate` refuses.
    """
    check_ablations([ablation])
    checked_circuits(circuit)
    _check_numbers(margin, tolerance, alpha, n_random, permutations)
    _check_apart(pairs, discovered_on)
    if isinstance(edges, str):
        raise InputError(f"Give the names of edges as a list, [{edges!r}].")
    tested = list(dict.fromkeys(circuit.edges if edges is None else edges))
    if tested and len(tested) / (1 + n_random) >= alpha:
        warn(
            f"With {n_random} draws no edge of {len(tested)} can have an adjusted p-value below {alpha:g}: take "
            f"n_random={math.ceil(len(tested) / alpha)}, or name fewer edges."
        )
    outside = [name for name in tested if name not in circuit]
    if outside:
        raise InputError(f"{outside[0]!r} is not in the circuit, so whether the circuit needs it cannot be asked.")
    runs = circuit_runs(model, [circuit], pairs, metric, clean, corrupt, align, allow_wrong, example_batch)
    masks = _Masks(runs, runs.mask(circuit), tested, n_random, checked_seed(seed))
    found = runs.measure(masks.every, ablation, progress=progress)
    runs.runs.warn()
    scores = dict(zip(masks.names, found.values[0].double(), strict=True))
    scores |= {"clean": found.clean[0].double(), "empty": found.empty[0].double()}
    groups = runs.runs.groups
    units = {name: by_example(one, groups or list(range(len(one)))) for name, one in scores.items()}
    kept = ["clean", "empty", "circuit", "complement", *masks.randoms, *masks.removals]
    return ClaimTests(
        values=torch.stack([scores[name] for name in kept]),
        axes={"condition": kept, "example": found.examples},
        provenance=describe(
            model,
            method=f"claim_tests(ablation={ablation}, n_random={n_random}, permutations={permutations})",
            metric=runs.runs.metrics,
            seed=seed,
            **runs.runs.described(),
        ),
        table=_table(units, masks, margin, tolerance, alpha, permutations, seed),
        edges=_edges(units, masks),
        circuit=circuit.edges,
        n_edges=runs.graph.n_edges,
        ablation=ablation,
        margin=margin,
        alpha=alpha,
        groups=groups,
    )


def _check_numbers(margin: float, tolerance: float, alpha: float, n_random: int, permutations: int) -> None:
    """Raise InputError for numbers that no test can be made with, before anything runs."""
    checked_count("n_random", n_random)
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 0:
        raise InputError(f"permutations={permutations!r} is no number of draws: give a whole number, 0 for none.")
    if not 0 < margin < math.inf or not 0 <= tolerance < 0.5 or not 0 < alpha < 1:
        raise InputError(
            f"margin={margin!r} must be above 0, tolerance={tolerance!r} lie in [0, 0.5), and alpha={alpha!r} between 0 and 1."
        )


def _check_apart(pairs: Any, others: Any) -> None:
    """Raise InputError where pairs are among those of the discovery."""
    if pairs is None or others is None:
        return
    known = {others[number : number + 1].digest for number in range(len(others))}
    same = [number for number in range(len(pairs)) if pairs[number : number + 1].digest in known]
    if same:
        raise InputError(
            f"{len(same)} of these {len(pairs)} pairs are among those that the circuit was found on, such as number {same[0]}: test it on others."
        )


class _Masks:
    """The edges of every run that the tests need, by name."""

    def __init__(self, runs: CircuitRuns, mask: Edges, tested: Sequence[str], count: int, seed: int) -> None:
        every, reads = runs.graph.edges, runs.graph.reads
        generator = torch.Generator().manual_seed(seed)
        self.tested = list(tested)
        made: dict[str, Edges] = {"circuit": mask, "complement": every & ~mask}
        # A circuit may hold edges that lie on no path of the model; what is drawn does not.
        size = min(int(mask.sum()), int(connectivity.pruned(every, reads).sum()))
        for number in range(1, count + 1):
            made[f"random {number}"] = connectivity.random_circuit(every, reads, size, generator)
        for number in range(1, count + 1):
            made[f"without random {number}"] = every & ~connectivity.random_circuit(every, reads, size, generator)
        for name in self.tested:
            made[f"without {name}"] = _dropped(mask, runs.graph.edge(name))
        self.inflated = 0
        if self.tested:
            for number in range(1, count + 1):
                inflated, added = _inflated(mask, every, reads, generator)
                if added is None:
                    break
                made[f"inflated {number}"], made[f"deflated {number}"] = inflated, _dropped(inflated, added)
                self.inflated = number
        self.names, self.every = list(made), list(made.values())
        self.randoms = [f"random {number}" for number in range(1, count + 1)]
        self.removals = [f"without random {number}" for number in range(1, count + 1)]


def _dropped(mask: Edges, place: tuple[int, int]) -> Edges:
    found = mask.clone()
    found[place] = False
    return found


def _inflated(
    mask: Edges, every: Edges, reads: Tensor, generator: torch.Generator, tries: int = 50
) -> tuple[Edges, tuple[int, int] | None]:
    """A circuit with the edges of a random path, and one of the edges that are new; None where no path adds any."""
    for _ in range(tries):
        new = [place for place in connectivity.random_path(every, reads, generator) if not bool(mask[place])]
        if new:
            found = mask.clone()
            for place in new:
                found[place] = True
            return found, new[int(torch.randint(len(new), (1,), generator=generator))]
    return mask, None


def _table(
    units: Mapping[str, Tensor],
    masks: _Masks,
    margin: float,
    tolerance: float,
    alpha: float,
    permutations: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A row for each question."""
    clean, empty, own, rest = (units[name] for name in ("clean", "empty", "circuit", "complement"))
    gap = float((clean - empty).nanmean())
    better = (own - clean) * (1 if gap >= 0 else -1)
    rounding = 1e-6 * float((clean.abs() + empty.abs()).nanmean())
    wins, losses = int((better > rounding).sum()), int((better < -rounding).sum())
    n = wins + losses
    sign = statistics.Tested(wins / n if n else math.nan, statistics.sign_test(wins, n, tolerance), n)
    width = margin * abs(gap)
    same = statistics.tost(own - clean, width) if width > 0 else statistics.Tested(math.nan, math.nan, 0)
    added = rest - empty
    added = torch.where(added.abs() > rounding, added, torch.zeros_like(added))
    left = statistics.hsic_test(clean, added, permutations, seed)

    def faithful(name: str) -> float:
        return float(restored_share(units[name] - empty, empty, clean))

    sufficient, needed = faithful("circuit"), 1 - faithful("complement")
    chance = statistics.share_at_least(sufficient, [faithful(name) for name in masks.randoms])
    damage = statistics.share_at_least(needed, [1 - faithful(name) for name in masks.removals])
    draws = len(masks.randoms)
    rows = {
        "sign": ("share of wins over the model", sign),
        "equivalence": (f"two one-sided t-tests, margin {margin:.0%} of the gap", same),
        "independence": ("HSIC of the model's score and what the complement adds", left),
        "sufficiency": (f"faithfulness, {draws} random circuits", statistics.Tested(sufficient, chance, draws)),
        "partial necessity": (f"loss without it, {draws} random removals", statistics.Tested(needed, damage, draws)),
    }
    return [
        {
            "question": question,
            "how": how,
            "statistic": tested.statistic,
            "p": tested.p,
            "n": tested.n,
            "reading": _reading(question, tested.p, alpha),
        }
        for question, (how, tested) in rows.items()
    ]


READINGS = {
    "sign": ("not equivalent to the model", "no difference in sign shown, which is no evidence of equivalence"),
    "equivalence": ("equivalent to the model within the margin", "not shown to be equivalent"),
    "independence": ("something is left outside", "no dependence shown"),
    "sufficiency": ("more faithful than chance", "no more faithful than random circuits of its size"),
    "partial necessity": ("removing it costs more than chance", "removing it costs no more than removing random edges"),
}
"""What a small p-value says, and what a large one does."""


def _reading(question: str, p: float, alpha: float) -> str:
    small, large = READINGS[question]
    return "not tested: too few examples or draws, or no gap" if math.isnan(p) else small if p < alpha else large


def _edges(units: Mapping[str, Tensor], masks: _Masks) -> list[dict[str, Any]]:
    """A row for each edge: the mean squared change of the score without it."""

    def change(one: str, other: str) -> float:
        return float((units[one] - units[other]).square().nanmean())

    others = [change(f"inflated {number}", f"deflated {number}") for number in range(1, masks.inflated + 1)]
    found = [change("circuit", f"without {name}") for name in masks.tested]
    values = [statistics.share_at_least(one, others) for one in found]
    return [
        {"edge": name, "change": one, "p": p, "p adjusted": adjusted}
        for name, one, p, adjusted in zip(masks.tested, found, values, statistics.holm(values), strict=True)
    ]
