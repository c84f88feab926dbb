"""Does a circuit explain the model? Runs in which it works alone, beside its complement and beside circuits drawn at random.

    ``faithfulness f(C) = (m(C) − m(empty)) / (m(clean) − m(empty))``,  ``completeness f(all edges − C)``

as ratios of means (:mod:`circuitvision.circuits.faithfulness_ratios`): 1 keeps what the model does, 0 is the run without anything, above 1 is more
than the model does. A complement far above 0 says that what is left out carries the answer too. What edges outside the circuit carry is what
``ablation`` says (:mod:`circuitvision.circuits.circuit_runs`); how far faithfulness depends on that is its coefficient of variation over them.
Random connected circuits of the same size and degree-matched ones (:mod:`circuitvision.circuits.random_circuits`) are the same under all ablations;
faithfulness means nothing where they reach it too.

Not covered: values that are fitted (optimal ablation); tests of hypotheses; several metrics at once.

Reference: Wang et al. 2022 (arXiv 2211.00593); Hanna et al. 2024 (arXiv 2403.17806); Miller et al. 2024 (arXiv 2407.08734); Shi et al. 2024
(arXiv 2410.13032).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.circuit_runs import ABLATIONS, CircuitRuns
from circuitvision.circuits.faithfulness_ratios import Kept
from circuitvision.circuits.random_circuits import connected_like, degree_matched
from circuitvision.errors import InputError, warn
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

CIRCUIT, COMPLEMENT, RANDOM, MATCHED = "circuit", "complement", "random", "degree-matched"
KINDS = (CIRCUIT, COMPLEMENT, RANDOM, MATCHED)
Edges = Bool[Tensor, "sender slot"]


@dataclass(frozen=True, eq=False)
class CircuitEvaluation(Result):
    """The metric of runs in which edges work alone: ``values`` ``[ablation condition example]``; of several circuits ``[circuit ablation condition
    example]``.

    Conditions are ``"circuit"``, ``"complement"``, ``"random 1"`` … (connected, of the same size) and ``"degree-matched 1"`` …; ``sizes``
    ``[condition]`` (``[circuit condition]``) is how many edges each has, of ``n_edges``. ``clean`` ``[example]`` is the metric with all edges,
    ``empty`` ``[ablation example]`` that with none, ``corrupt`` ``[example]`` that of the corrupt run. ``groups`` says which examples belong
    together, where the data does; intervals of :attr:`faithfulness` draw these again.
    """

    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    empty: Tensor = field(default_factory=lambda: torch.zeros(0))
    corrupt: Tensor = field(default_factory=lambda: torch.zeros(0))
    sizes: Tensor = field(default_factory=lambda: torch.zeros(0))
    n_edges: int = 0
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"clean": -1, "empty": -1, "corrupt": -1, "groups": 0}

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """Refused: conditions of one evaluation are compared, not ranked among each other."""
        raise InputError("An evaluation of a circuit has conditions, not components: see .table().")

    @property
    def circuits(self) -> list[str]:
        """The names of the circuits, where several were given; else empty."""
        return list(self.axes.get("circuit", []))

    @property
    def kept(self) -> Kept:
        """The metrics that :attr:`faithfulness` is the ratio of, per independent example."""
        return Kept.of(self.values, self.empty[:, None], self.clean, self.axes["example"], self.groups)

    @property
    def faithfulness(self) -> Float[Tensor, "*circuit ablation condition"]:
        """``(m(C) − m(empty)) / (m(clean) − m(empty))`` of every condition, a ratio of means; NaN where :attr:`reason` says why."""
        return self.kept.share

    def faithfulness_interval(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Tensor:
        """Low and high end ``[2 *circuit ablation condition]`` of the bootstrap interval of :attr:`faithfulness`: groups (examples
        where there are none) are drawn again."""
        return self.kept.interval(level, draws, seed)

    @property
    def completeness(self) -> Float[Tensor, "*circuit ablation"]:
        """The faithfulness of the complement: near 0 where nothing that carries the answer was left out."""
        return self.faithfulness[..., self.index_of("condition", COMPLEMENT)]

    @property
    def variation(self) -> Float[Tensor, "*circuit"]:
        """The coefficient of variation of the circuit's faithfulness over ablations, ``sd / |mean|`` with ``n − 1``; NaN for fewer than two."""
        own = self.faithfulness[..., self.index_of("condition", CIRCUIT)]
        count = own.isfinite().sum(-1)
        mean = own.nanmean(-1, keepdim=True)
        spread = ((own - mean).square().nansum(-1) / (count - 1)).sqrt()
        return torch.where(count > 1, spread / mean.squeeze(-1).abs(), torch.nan)

    @property
    def reason(self) -> str:
        """Why there is no faithfulness under some ablation, in words; empty where there is one under all."""
        found = []
        for number, ablation in enumerate(self.axes["ablation"]):
            part = Kept.of(
                self.clean[None], self.empty[number][None], self.clean[None], self.axes["example"], self.groups
            )
            if part.reason():
                found.append(f"{ablation} ablation: {part.reason()}")
        return "; ".join(found)

    def as_faithful(self, kind: str = RANDOM) -> Float[Tensor, "*circuit ablation"]:
        """The share of random circuits that are at least as near to 1 as the circuit, ``(1 + how many) / (1 + all)``: small where it is better than
        chance.

        ``kind`` is ``"random"`` (connected) or ``"degree-matched"``. NaN where none was drawn, and without a faithfulness.
        """
        f, places = self.faithfulness, self.conditions(kind)
        own = f[..., self.index_of("condition", CIRCUIT)]
        # Circuits that do the same differ by rounding.
        near = (1 - f[..., places]).abs() <= (1 - own[..., None]).abs() + 1e-9
        share = (1 + near.sum(-1)).double() / (1 + len(places))
        return share.masked_fill(own.isnan(), torch.nan) if places else torch.full_like(own, torch.nan)

    def conditions(self, kind: str) -> list[int]:
        """The places of the conditions of a kind: ``"circuit"``, ``"complement"``, ``"random"`` or ``"degree-matched"``."""
        return [number for number, name in enumerate(self.axes["condition"]) if _kind(name) == kind]

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row per circuit, ablation and kind of condition: ``faithfulness`` with ``low`` and ``high`` (of random ones the mean, and the ends of
        ``level`` of *them*), the metric, how many edges and runs, and which share of runs reaches the circuit (:meth:`as_faithful`)."""
        import pandas as pd

        f, (low, high) = self.faithfulness, self.faithfulness_interval(level)
        metric, sizes = self.mean(), self.sizes
        if not self.circuits:
            f, low, high, metric, sizes = (one[None] for one in (f, low, high, metric, sizes))
        reach = {kind: self.as_faithful(kind).reshape(len(f), -1) for kind in (RANDOM, MATCHED)}
        rows = []
        for number, name in enumerate(self.circuits or [CIRCUIT]):
            for at, ablation in enumerate(self.axes["ablation"]):
                for kind in KINDS:
                    places = self.conditions(kind)
                    if not places:
                        continue
                    own = f[number, at, places]
                    drawn = kind in reach
                    tails = torch.quantile(own, own.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
                    pair = tails if drawn else [float(low[number, at, places[0]]), float(high[number, at, places[0]])]
                    rows.append([
                        name, ablation, kind, float(own.mean()), *pair, float(metric[number, at, places].mean()),
                        float(sizes[number, places].double().mean()), len(places), float(reach[kind][number, at]) if drawn else float("nan"),
                    ])  # fmt: skip
        columns = [
            "circuit",
            "ablation",
            "condition",
            "faithfulness",
            "low",
            "high",
            "metric",
            "edges",
            "runs",
            "reach",
        ]
        frame = pd.DataFrame(rows, columns=pd.Index(columns))
        return frame if self.circuits else frame.drop(columns="circuit")

    def highlights(self) -> dict[str, str]:
        """Faithfulness and completeness under every ablation, and how many random circuits reach it."""
        frame = self.table()
        found = {}
        for key, part in frame.groupby([*(["circuit"] if self.circuits else []), "ablation"], sort=False):
            rows = part.set_index("condition")
            first, rest = rows.loc[CIRCUIT], rows.loc[COMPLEMENT]
            said = f"{first.faithfulness:.1%} ({first.low:.1%} to {first.high:.1%}); complement {rest.faithfulness:.1%}"
            said += "".join(
                f"; {kind} {rows.loc[kind].faithfulness:.1%}" for kind in (RANDOM, MATCHED) if kind in rows.index
            )
            found[f"faithfulness, {', '.join(map(str, key))}"] = said
        found["variation over ablations"] = ", ".join(f"{one:.2g}" for one in self.variation.reshape(-1).tolist())
        return {**found, **({"no faithfulness": self.reason} if self.reason else {})}


def _kind(condition: str) -> str:
    name, _, number = condition.rpartition(" ")
    return name if number.isdigit() else condition


@with_provenance
def evaluate(
    model: Any,
    circuit: Circuit | Mapping[str, Circuit],
    pairs: Any = None,
    metric: Any = None,
    *,
    ablations: Sequence[str] = ABLATIONS,
    n_random: int = 20,
    n_matched: int | None = None,
    seed: int = 0,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> CircuitEvaluation:
    """How much of the model's answer circuits keep by themselves, beside their complements and random circuits.

    One run per condition and ablation, ``2 + n_random + n_matched`` conditions of each circuit.

    Args:
        model: the hooked model.
        circuit: a circuit, or several by name.
        pairs: a data set of pairs that the circuit was not found on; ``clean`` and ``corrupt`` in their place are inputs of the same shapes.
        metric: a metric or its name.
        ablations: what edges outside the circuit carry: ``"interchange"``, ``"mean"``, ``"zero"``.
        n_random: how many random connected circuits of the same size; ``n_matched`` how many degree-matched ones, None: as many.
        seed: of the random circuits.
        align, allow_wrong, example_batch, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: an empty circuit, one of other weights or of another graph, an unknown ablation, several metrics.
    """
    kinds = [ablations] if isinstance(ablations, str) else list(ablations)
    named = checked_circuits(circuit)
    counts = [
        checked_count("n_random", n_random),
        checked_count("n_matched", n_random if n_matched is None else n_matched),
    ]
    check_ablations(kinds)
    runs = circuit_runs(model, list(named.values()), pairs, metric, clean, corrupt, align, allow_wrong, example_batch)
    masks: list[Edges] = []
    for one in named.values():
        own = runs.mask(one)
        masks += [own, runs.graph.edges & ~own]
        masks += connected_like(own, runs.graph, counts[0], seed) + degree_matched(own, runs.graph, counts[1], seed)
    scores = [runs.measure(masks, kind, progress=progress) for kind in kinds]
    labels = [CIRCUIT, COMPLEMENT]
    labels += [f"{RANDOM} {number + 1}" for number in range(counts[0])]
    labels += [f"{MATCHED} {number + 1}" for number in range(counts[1])]
    values = torch.stack([one.values[0] for one in scores]).unflatten(1, (len(named), -1)).transpose(0, 1)
    sizes = torch.tensor([int(mask.sum()) for mask in masks]).unflatten(0, (len(named), -1))
    several = isinstance(circuit, Mapping)
    result = CircuitEvaluation(
        values=values if several else values[0],
        axes={
            **({"circuit": list(named)} if several else {}),
            "ablation": kinds,
            "condition": labels,
            "example": scores[0].examples,
        },
        provenance=described(runs, "evaluate", ablations=kinds, seed=seed),
        clean=scores[0].clean[0],
        empty=torch.stack([one.empty[0] for one in scores]),
        corrupt=scores[0].corrupt[0],
        sizes=sizes if several else sizes[0],
        n_edges=runs.graph.n_edges,
        groups=runs.runs.groups,
    )
    _warn_of_controls(result, masks)
    if result.reason:
        warn(f"No faithfulness under {result.reason}. Take more examples, or a metric that tells the two runs apart.")
    return result


def _warn_of_controls(result: CircuitEvaluation, masks: Sequence[Edges]) -> None:
    """Say where random circuits are no controls: smaller than the circuit, or the circuit itself."""
    sizes = result.sizes.reshape(-1, result.sizes.shape[-1])
    drawn, matched = (result.conditions(kind) for kind in (RANDOM, MATCHED))
    smaller = int((sizes[:, drawn] < sizes[:, :1]).sum())
    if smaller:
        warn(
            f"{smaller} of {sizes[:, drawn].numel()} random connected circuits have fewer edges than the circuit: no paths fit."
        )
    for number in range(len(sizes)):
        own = masks[number * sizes.shape[1] :][: sizes.shape[1]]
        if matched and all(bool((own[place] == own[0]).all()) for place in matched):
            warn("No other circuit has nodes of these degrees: the degree-matched ones are the circuit itself.")


# -- what all measurements of circuits check -------------------------------------------------------------------------------------------------------


def checked_circuits(given: Any) -> dict[str, Circuit]:
    """Circuits by name; one that was given alone bears none. Raises InputError for what is none, and for one without edges."""
    named = dict(given) if isinstance(given, Mapping) else {"": given}
    if not named:
        raise InputError("No circuit was given.")
    for name, one in named.items():
        if not isinstance(one, Circuit):
            raise InputError(
                f"A {type(one).__name__} is no circuit: take some edges of an attribution, scores.circuit(50), or read a file with "
                "cv.circuits.circuit_of_graph."
            )
        if not len(one):
            raise InputError(f"The circuit {name!r} has no edges.".replace(" ''", "") + " Take at least one edge.")
    return {str(name): one for name, one in named.items()}


def checked_count(name: str, count: Any) -> int:
    """How many random circuits; InputError for what is no whole number from 0 on."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InputError(f"{name}={count!r} is not understood: how many random circuits, 0 for none.")
    return count


def check_ablations(kinds: Sequence[str]) -> None:
    """Raise InputError for an ablation that there is not, that stands twice, or none at all."""
    unknown = [kind for kind in kinds if kind not in ABLATIONS]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        what = f"Unknown ablation {unknown[0]!r}" if unknown else f"ablations={list(kinds)!r} is not understood"
        raise InputError(f"{what}; give one or several of {', '.join(map(repr, ABLATIONS))}, each once.")


def circuit_runs(
    model: Any,
    circuits: Sequence[Circuit],
    pairs: Any,
    metric: Any,
    clean: Any,
    corrupt: Any,
    align: Any,
    allow_wrong: bool,
    example_batch: int | None,
) -> CircuitRuns:
    """Runs for these circuits, of one metric; warns where they were found on the examples that are measured.

    Raises:
        InputError: several metrics, and as of :class:`CircuitRuns`.
    """
    if isinstance(metric, Mapping):
        raise InputError("Faithfulness is the ratio of one metric's means: give one metric, and call once for each.")
    runs = CircuitRuns(
        model, pairs, metric, clean=clean, corrupt=corrupt, align=align, allow_wrong=allow_wrong, example_batch=example_batch
    )  # fmt: skip
    if runs.runs.metrics.several:
        raise InputError("Faithfulness is the ratio of one metric's means: give one metric, and call once for each.")
    for one in circuits:
        if pairs is not None and _found_on(one, pairs):
            warn(
                "The circuit was found on examples that it is now measured on, which favours it: split the pairs, and measure on those that the "
                "discovery did not see."
            )
            break
    return runs


def _found_on(circuit: Circuit, pairs: Any) -> bool:
    """Whether the data set that a circuit was found on is this one, or some examples of it."""
    digest = circuit.attribution.provenance.get("dataset_sha256", "")
    if not digest:
        return False
    numbers = list(dict.fromkeys(circuit.attribution.axes["example"]))
    if pairs.digest == digest:
        return True
    known = set(pairs.numbers)
    return all(number in known for number in numbers) and pairs.at(numbers).digest == digest


def described(runs: CircuitRuns, method: str, **told: Any) -> dict[str, Any]:
    """Provenance of a measurement of circuits."""
    return describe(runs.model, method=method, metric=runs.runs.metrics, **told, **runs.runs.described())
