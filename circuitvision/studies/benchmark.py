"""How well methods find circuits that are known: every method on every hand-built network, and on trained organisms.

A method scores all edges. On hand-built networks (:mod:`circuitvision.organisms.handbuilt`) the area under the ROC curve says how well the sizes of
its scores tell the circuit's edges from all others: 1 for any that ranks them first, 1/2 for chance. It cannot see sign or scale. What a circuit of
the strongest edges does is measured everywhere: ``CPR``, ``CMD`` and the log area of :mod:`circuitvision.circuits.evaluation`; on organisms on pairs
that the scores did not see. ``passes`` counts forward and backward passes of a batch, ``seconds`` is the time of the scores alone, on this machine.

ACDC has no score of an edge: those of edges that it keeps are what they did at their turn, and 0 of the rest, at a threshold of half of the smallest
effect in the circuit, which is more than one knows of a model; learned masks are told the circuit's size.

Not covered: circuits with edges of one position; variance over training seeds of organisms.

Reference: Mueller et al. 2025 (arXiv 2504.13151), Gupta et al. 2024 (arXiv 2407.14494) for text models.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuitvision.circuits import acdc, edge_attribution, edge_pruning, faithfulness_curve
from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.errors import InputError, nearest
from circuitvision.files import write_text
from circuitvision.organisms import handbuilt, load
from circuitvision.organisms import pairs as pairs_of
from circuitvision.progress import Progress
from circuitvision.provenance import versions, with_provenance
from circuitvision.results import Result

STEPS = 8
COLUMNS = ("auroc", "cpr", "cmd", "log_area", "passes", "seconds")
ORGANISMS = ("scenes-vit", "shapes-llava")
SCORED: dict[str, dict[str, Any]] = {
    "eap": {"method": "eap"},
    "eap, qk-fix": {"method": "eap", "qk_fix": True},
    "eap-ig": {"method": "eap-ig", "steps": STEPS},
    "clean-corrupted": {"method": "clean-corrupted"},
    "mask-ig": {"method": "mask-ig", "steps": STEPS},
    "exact": {"method": "exact"},
}
METHODS = (*SCORED, "acdc", "edge-pruning", "random")
UNSIGNED = ("edge-pruning", "random")
"""Methods whose scores have no sign, and so no CPR."""
ON_ORGANISMS = ("eap", "eap-ig", "clean-corrupted", "mask-ig", "random")
"""What is run on trained models by itself: methods that need no run for every edge."""


@dataclass(frozen=True, eq=False)
class CircuitBenchmark(Result):
    """A row for each network, noise and method: ``values`` ``[row column]``.

    Rows are ``"network | noise | method"``; columns are ``"auroc"`` (NaN where the circuit is not known), ``"cpr"`` (NaN of scores without a sign),
    ``"cmd"``, ``"log_area"``, ``"passes"`` and ``"seconds"``.
    """

    def to_frame(self, by_example: bool = False) -> Any:
        """One row per network, noise and method."""
        import pandas as pd

        frame = pd.DataFrame(self.values.numpy(), columns=self.axes["column"])
        parts = [str(row).split(" | ") for row in self.axes["row"]]
        for number, name in enumerate(("network", "noise", "method")):
            frame.insert(number, name, [part[number] for part in parts])
        return frame

    def summary(self) -> Any:
        """The mean AUROC of each method over hand-built networks, without noise and with."""
        frame = self.to_frame()
        known = frame[frame.auroc.notna()]
        return known.pivot_table(index="method", columns="noise", values="auroc", sort=False)

    def highlights(self) -> dict[str, str]:
        """The mean AUROC of each method over everything that is known."""
        frame = self.to_frame()
        return {
            str(name): f"{value:.3f}"
            for name, value in frame.groupby("method", sort=False).auroc.mean().items()
            if value == value
        }

    def write(self, path: str | Path) -> Path:
        """Write the table as markdown."""
        frame, lines = self.to_frame(), ["# Circuits that are known, and what methods find of them", ""]
        found = ", ".join(f"{name} {version}" for name, version in versions().items())
        lines += [
            f"Made by `circuitvision benchmark circuits`; {found}.",
            "",
            "AUROC in the mean over hand-built networks:",
            "",
        ]
        lines += [*_table(self.summary().reset_index()), "", "Every row:", "", *_table(frame)]
        return write_text(Path(path), "\n".join(lines) + "\n")


def _table(frame: Any) -> list[str]:
    def shown(value: Any) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"
        return str(value)

    names = [str(name) for name in frame.columns]
    rows = [[shown(value) for value in row] for row in frame.itertuples(index=False)]
    return [
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


@with_provenance
def circuit_benchmark(
    networks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    *,
    organisms: Sequence[str] = ORGANISMS,
    noises: Sequence[float] = (0.0, 1e-3),
    seeds: Sequence[int] = (0,),
    pairs: int = 32,
    progress: bool = True,
) -> CircuitBenchmark:
    """Score every method on every known circuit, and on organisms.

    Args:
        networks: names of hand-built networks; None: all of them.
        methods: names of methods; None: all (of organisms those that need no run for every edge).
        organisms: names of trained models; empty for none.
        noises: standard deviations of what is added to the weights of hand-built networks.
        seeds: of the noise; numbers are means over them.
        pairs: how many pairs an organism is scored on, and as many others evaluated on.
        progress: whether to show it.

    Raises:
        InputError: a network, method or organism that there is not.
    """
    chosen = list(handbuilt.names() if networks is None else networks)
    given = list(METHODS if methods is None else methods)
    for names, known, what in ((chosen, handbuilt.names(), "hand-built network"), (given, METHODS, "method")):
        for name in names:
            if name not in known:
                raise InputError(f"There is no {what} {name!r}; nearest: {', '.join(nearest(name, known))}.")
    on_organisms = [name for name in given if methods is not None or name in ON_ORGANISMS]
    work = list(itertools.product(chosen, noises, given))
    rows: list[tuple[str, list[float]]] = []
    with Progress(len(work) + len(organisms) * len(on_organisms), "benchmark", progress) as bar:
        for name, noise, method in work:
            told = [_of_network(name, noise, seed, method) for seed in (seeds if noise else seeds[:1])]
            rows.append((f"{name} | {noise:g} | {method}", torch.tensor(told, dtype=torch.float64).nanmean(0).tolist()))
            bar.advance()
        for name in organisms:
            for method, told_of in _of_organism(name, on_organisms, pairs):
                rows.append((f"{name} | 0 | {method}", told_of))
                bar.advance()
    return CircuitBenchmark(
        values=torch.tensor([row for _, row in rows], dtype=torch.float64).reshape(-1, len(COLUMNS)),
        axes={"row": [name for name, _ in rows], "column": list(COLUMNS)},
        provenance={"method": "circuit_benchmark", "versions": versions()},
    )


def _of_network(name: str, noise: float, seed: int, method: str) -> list[float]:
    known = handbuilt.build(name, noise=noise, seed=seed)
    smallest = min(
        (abs(effect) for effect in known.effects.values() if effect), default=abs(known.corrupt - known.clean)
    )
    found, passes, seconds = _scored(known.model, known.pairs, known.metric, method, len(known.edges), 0.5 * smallest)
    scores = {edge: abs(value) for edge, value in found.ranking()}
    return [known.auroc(scores), *_areas(known.model, found, known.pairs, known.metric, method), passes, seconds]


def _of_organism(name: str, methods: Sequence[str], count: int) -> Iterator[tuple[str, list[float]]]:
    model = load(name)
    found_on, tested_on = pairs_of(name, count, 0), pairs_of(name, count, 1)
    for method in methods:
        found, passes, seconds = _scored(model, found_on, "logit_diff", method, 50, 0.05)
        yield method, [math.nan, *_areas(model, found, tested_on, "logit_diff", method), passes, seconds]


def _scored(
    model: Any, pairs: Any, metric: Any, method: str, n_edges: int, threshold: float
) -> tuple[EdgeAttribution, float, float]:
    """The scores of one method, how many passes of a batch it took, and seconds."""
    quiet: dict[str, Any] = {"progress": False, "allow_wrong": True}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method in SCORED:
            found = edge_attribution(model, pairs, metric, **SCORED[method], **quiet)
        elif method == "acdc":
            kept = acdc(model, pairs, metric, threshold=threshold, prune=False, **quiet)
            assert kept.attribution is not None
            values = kept.attribution.values * kept.mask[..., None]
            found = _with(kept.attribution, values)
        elif method == "edge-pruning":
            learned = edge_pruning(model, pairs, metric, n_edges=n_edges, **quiet).attribution
            assert learned is not None
            # Above 0 in order of the gates, which may be negative.
            found = _with(learned, learned.values.sigmoid())
        else:
            scored = edge_attribution(model, pairs, metric, **quiet)
            drawn = torch.rand(
                scored.edges.shape, generator=torch.Generator().manual_seed(0), dtype=scored.values.dtype
            )
            found = _with(scored, (drawn[..., None] + 0 * scored.values))
    return found, _passes(method, found), time.perf_counter() - started


def _with(scores: EdgeAttribution, values: torch.Tensor) -> EdgeAttribution:
    import dataclasses

    return dataclasses.replace(scores, values=values)


def _passes(method: str, found: EdgeAttribution) -> float:
    """Forward and backward passes of a batch."""
    counts: dict[str, Callable[[], float]] = {
        "eap": lambda: 3,
        "eap, qk-fix": lambda: 3 + 2 * len(found.axes["sender"]),
        "eap-ig": lambda: 3 + 2 * STEPS,
        "clean-corrupted": lambda: 7,
        "mask-ig": lambda: 2 + 2 * STEPS,
        "exact": lambda: 2 + found.n_edges,
        "acdc": lambda: 2 + found.n_edges,
        "edge-pruning": lambda: 600,
        "random": lambda: 0,
    }
    return float(counts[method]())


def _areas(model: Any, found: EdgeAttribution, pairs: Any, metric: Any, method: str) -> list[float]:
    """CPR by signed scores, CMD and the log area by size, by interchange."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curve = faithfulness_curve(model, found, pairs, metric, n_random=0, progress=False, allow_wrong=True)
    return [math.nan if method in UNSIGNED else curve.cpr, curve.cmd, curve.log_area]
