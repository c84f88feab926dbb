"""Automatic circuit discovery (ACDC): edges are removed one after another, each if the metric can do without it.

Edges are visited from the output backwards, slot by slot, and into each slot from the latest sender to the earliest (or in an order drawn by
``seed``). An edge is removed, with all that were removed before it, and the metric is read over the whole data set; where it moves by less than
``threshold`` the edge stays removed. The outcome depends on the order: what is visited first of two backups goes. So the order is in the result, and
a circuit says what is enough for the metric and not all that carries it: of an OR one branch is left or none, of edges that cancel neither.

Whether an edge goes is decided on means of the metric. As most edges go, the removals of the next edges are measured in one sweep, each on top of
the ones before, as if all were accepted; up to the first that is not they are exactly the runs that one decision after another would make.

Not covered: thresholds that change on the way; splitting an edge by position.

Reference: Conmy et al. 2023 (arXiv 2304.14997).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.circuits.computational_graph import ComputationalGraph
from circuitvision.circuits.discovery import Discovery
from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.circuits.edge_attribution import result_of as scores_of
from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError, checked_seed, warn
from circuitvision.files import reading, write_text
from circuitvision.progress import Progress
from circuitvision.provenance import hash_weights, with_provenance

ORDERS = ("reverse", "random")
MOST = 64
"""How many removals are measured at once."""
FILE = "acdc.json"


@with_provenance
def acdc(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    threshold: float,
    ablation: str = "interchange",
    order: str = "reverse",
    seed: int = 0,
    prune: bool = True,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Discovery:
    """The circuit that ACDC leaves, one run per edge at most.

    Scores of the result are what each edge's removal did to the metric at its turn, ``[sender slot example]``, signed "without minus with".

    Args:
        model: the hooked model.
        pairs: a data set of pairs; or ``clean`` and ``corrupt``, inputs of the same shapes.
        metric: one metric. Of ``"kl"`` and ``"js"``, which measure a distance from the clean output, only a rise counts; of others a move either way.
        threshold: how far the metric's mean may move with one more edge removed, in its own units.
        ablation: what removed edges carry: ``"interchange"``, ``"mean"`` or ``"zero"``.
        order: ``"reverse"`` of the order of computation, or ``"random"`` within each slot.
        seed: of ``"random"``.
        prune: whether edges that lie on no path of what is left are taken away at the end.
        align, allow_wrong, example_batch, progress: as of :func:`circuitvision.patching.activation_patch`.
        save_to, resume: a folder in which decisions are kept, and whether those in it are taken over.

    Raises:
        InputError: a threshold that is no number above 0, several metrics, a folder of another study, a metric that is no finite number for some
            example.
    """
    if not 0 < threshold < float("inf"):
        raise InputError(f"threshold={threshold} must be above 0, in units of the metric.")
    if order not in ORDERS:
        raise InputError(f"Unknown order {order!r}; choose one of {', '.join(map(repr, ORDERS))}.")
    given = {"clean": clean, "corrupt": corrupt, "align": align, "allow_wrong": allow_wrong}
    runs = CircuitRuns(model, pairs, metric, example_batch=example_batch, **given)
    if runs.runs.metrics.several:
        raise InputError("One metric decides: give one, not a mapping of several.")
    edges = visited(runs.graph, order, seed)
    told = {
        "threshold": threshold,
        "ablation": ablation,
        "order": order,
        "seed": seed,
        "weights": hash_weights(model.module),
    }
    told |= {"data": plain(runs.runs.described()), "metric": plain(runs.runs.metrics)}
    kept = _Decisions(save_to, of_json(told), resume)
    state = _State(runs, edges, threshold, ablation, kept)
    with Progress(len(edges), "ACDC", progress) as bar:
        bar.advance(state.done, measured=False)
        while state.done < len(edges):
            bar.advance(state.step())
    mask = runs.graph.edges.clone()
    for (row, column), removed in zip(edges, kept.removed, strict=True):
        mask[row, column] = not removed
    if not bool(mask.any()):
        warn("Every edge was removed, so the circuit is empty: lower the threshold.")
    method = f"acdc(threshold={threshold}, ablation={ablation}, order={order})"
    scores = scores_of(model, runs.graph, runs.runs, state.scores(), method, seed)
    return discovery_of(scores, mask, method, prune, seed)


def discovery_of(scores: EdgeAttribution, mask: Tensor, method: str, prune: bool, seed: int) -> Discovery:
    """A discovery of a mask ``[sender slot]``, of scores that a method gave on the way."""
    circuit = scores.circuit(mask)
    circuit = circuit.pruned() if prune else circuit
    return Discovery(
        values=circuit.mask.double().masked_fill(~scores.edges, float("nan")),
        axes={"sender": scores.axes["sender"], "slot": scores.axes["slot"]},
        provenance={**scores.provenance, "method": method, "seed": seed},
        attribution=scores,
        mask=circuit.mask,
        method=method.partition("(")[0],
    )


def visited(graph: ComputationalGraph, order: str, seed: int) -> list[tuple[int, int]]:
    """Every edge as (sender, slot), slots from the last, senders into each from the last or in a drawn order."""
    generator = torch.Generator().manual_seed(checked_seed(seed))
    places: list[tuple[int, int]] = []
    for column in reversed(range(len(graph.slots))):
        rows = graph.edges[:, column].nonzero().flatten().flip(0)
        if order == "random":
            rows = rows[torch.randperm(len(rows), generator=generator)]
        places += [(row, column) for row in rows.tolist()]
    return places


class _Decisions:
    """Which of the edges were removed, in their order, kept in a file if there is a folder."""

    def __init__(self, folder: str | Path | None, digest: str, resume: bool) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self.digest = digest
        self.removed: list[bool] = []
        self.effects: list[list[float]] = []
        if self.path is None:
            if resume:
                raise InputError(
                    "There is nothing to resume from: give save_to=…, the folder of the run that was interrupted."
                )
            return
        if self.path.is_file():
            with reading(self.path, "decisions of ACDC"):
                held = json.loads(self.path.read_text())
                if not resume:
                    raise InputError(f"{self.path} holds decisions already: take resume=True, or another folder.")
                if held["of"] != digest:
                    raise InputError(
                        f"{self.path} is of another study (its model, data or arguments differ): take another folder."
                    )
                self.removed, self.effects = list(held["removed"]), list(held["effects"])

    def add(self, removed: list[bool], effects: list[list[float]]) -> None:
        """More decisions, written at once."""
        self.removed += removed
        self.effects += effects
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({"of": self.digest, "removed": self.removed, "effects": self.effects}))


class _State:
    """How far the edges were visited."""

    def __init__(
        self, runs: CircuitRuns, edges: list[tuple[int, int]], threshold: float, ablation: str, kept: _Decisions
    ) -> None:
        self.runs, self.edges, self.threshold, self.ablation, self.kept = runs, edges, threshold, ablation, kept
        self.rises = runs.runs.metrics.compares
        self.ahead = 4

    @property
    def done(self) -> int:
        """How many edges were decided on."""
        return len(self.kept.removed)

    @property
    def mask(self) -> Bool[Tensor, "sender slot"]:
        """What is left so far."""
        found = self.runs.graph.edges.clone()
        for (row, column), removed in zip(self.edges, self.kept.removed, strict=False):
            found[row, column] = not removed
        return found

    def step(self) -> int:
        """Decide on the next edges, up to the first that is kept; how many were decided on."""
        current = self.mask
        masks = [current]
        for row, column in self.edges[self.done : self.done + self.ahead]:
            current = current.clone()
            current[row, column] = False
            masks.append(current)
        measured = self.runs.measure(masks, self.ablation, progress=False)
        self.last = measured
        values = measured.values[0].double()
        lost = ~values.isfinite().all(0)
        if bool(lost.any()):
            raise InputError(
                f"The metric is no finite number for {int(lost.sum())} of {len(lost)} examples, so it decides on no edge: leave those out, or take "
                "another metric."
            )
        effects = values.diff(dim=0)
        moves = effects.mean(-1) if self.rises else effects.mean(-1).abs()
        fits = (moves < self.threshold).tolist()
        count = fits.index(False) + 1 if False in fits else len(fits)
        self.kept.add(fits[:count], effects[:count].tolist())
        self.ahead = (
            min(2 * self.ahead, MOST) if count == len(fits) and fits[-1] else max(1, min(self.ahead, 2 * count))
        )
        return count

    def scores(self) -> tuple[Tensor, Any]:
        """What each removal did ``[metric sender slot example]``, and runs of no mask for the metrics of both sides."""
        measured = self.runs.measure([], self.ablation, progress=False)
        values = torch.zeros(1, *self.runs.graph.edges.shape, measured.clean.shape[-1], dtype=torch.float64)
        for (row, column), effect in zip(self.edges, self.kept.effects, strict=True):
            values[0, row, column] = torch.tensor(effect, dtype=torch.float64)
        return values, measured
