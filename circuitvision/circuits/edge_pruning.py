"""Circuits by learned masks: how much of every edge to keep is trained, with a penalty on how many edges are kept.

Every edge has a gate ``z`` in [0, 1] (hard concrete: ``z = clip(sigmoid((ln u - ln(1-u) + α) / β)(ζ - γ) + γ)`` with uniform ``u``, so that gates are
exactly 0 or 1 with positive probability) and carries ``z`` of what its sender writes in this very run, ``1 - z`` of what it has in the source run
(:mod:`circuitvision.circuits.edge_runs`). The loss is the squared distance of the metric from the clean run's, in units of the gap between both runs,
plus a Lagrangian ``λ₁ (s - t) + λ₂ (s - t)²`` that holds the expected share of open gates ``s`` at the share asked for, ``λ`` trained upwards. The
circuit is the ``n_edges`` of largest ``α``, hardened: that is what has to be evaluated.

Not covered: gates of nodes; training of the model's weights, which stay as they are.

Reference: Cao et al. 2021 (arXiv 2104.03514), subnetwork probing; Louizos et al. 2018 (arXiv 1712.01312); Bhaskar et al. 2024 (arXiv 2406.16778).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from circuitvision.circuits.acdc import discovery_of
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.circuits.discovery import Discovery, largest
from circuitvision.circuits.edge_attribution import result_of as scores_of
from circuitvision.circuits.edge_runs import Interchange
from circuitvision.circuits.gates import Gates
from circuitvision.errors import InputError, checked_seed
from circuitvision.model.state import refuse_inference
from circuitvision.model.weights import check_gradients
from circuitvision.patching.attribution import check_metrics
from circuitvision.patching.estimator import differentiable
from circuitvision.patching.gradient_run import GradientRun
from circuitvision.progress import Progress
from circuitvision.provenance import with_provenance


@with_provenance
def edge_pruning(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    n_edges: int,
    steps: int = 200,
    rate: float = 0.1,
    start: float = 2.0,
    penalty_rate: float = 1.0,
    seed: int = 0,
    prune: bool = False,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> Discovery:
    """The circuit of ``n_edges`` edges that learned masks leave.

    Scores of the result are ``α``, the same for all examples: above 0 where a gate is more open than closed.

    Args:
        model: the hooked model; its weights are not changed.
        pairs, metric, clean, corrupt: as of :func:`circuitvision.circuits.edge_attribution`.
        n_edges: how many edges the circuit has.
        steps: of Adam, each on one batch of examples.
        rate, penalty_rate: learning rates of the gates, and of the multipliers.
        start: ``α`` of every edge at the beginning.
        seed: of the gates.
        prune: whether edges on no path are taken away at the end.
        align, allow_wrong, example_batch, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: more edges than there are, several metrics, a metric without a gradient or that is no finite number, rates that are not above 0.
    """
    whole = [isinstance(one, int) and not isinstance(one, bool) for one in (n_edges, steps)]
    if not all(whole) or not 0 < rate < math.inf or not 0 < penalty_rate < math.inf or not math.isfinite(start):
        raise InputError(
            f"n_edges={n_edges!r} and steps={steps!r} must be whole numbers, rate={rate!r} and penalty_rate={penalty_rate!r} above 0, and "
            f"start={start!r} finite."
        )
    check_gradients(model.module)
    given = {"clean": clean, "corrupt": corrupt, "align": align, "allow_wrong": allow_wrong}
    runs = CircuitRuns(model, pairs, metric, example_batch=example_batch, **given)
    refuse_inference(model.module, runs.runs.first_inputs())
    check_metrics(runs.runs.metrics, "denoise", "ig")
    if runs.runs.metrics.several:
        raise InputError("One metric is trained for: give one, not a mapping of several.")
    if not 0 < n_edges <= runs.graph.n_edges or steps < 1:
        raise InputError(
            f"n_edges={n_edges} must lie between 1 and {runs.graph.n_edges}, and steps={steps} be 1 or more."
        )
    gates = _EdgeGates(runs.graph.edges, n_edges, start, rate, penalty_rate, checked_seed(seed))
    taken = 0
    with Progress(steps, "edge pruning", progress) as bar:
        while taken < steps:
            for batch in runs.runs.batches(runs.graph.sites):
                gates.step(runs, batch)
                taken += 1
                bar.advance()
                if taken == steps:
                    break
    measured = runs.measure([], progress=False)
    runs.runs.warn()
    alpha = gates.alpha.detach().double()
    values = alpha[None, :, :, None].expand(1, -1, -1, measured.clean.shape[-1])
    method = f"edge_pruning(n_edges={n_edges}, steps={steps}, rate={rate})"
    scores = scores_of(model, runs.graph, runs.runs, (values, measured), method, seed)
    return discovery_of(scores, largest(alpha, runs.graph.edges, n_edges), method, prune, seed)


class _EdgeGates(Gates):
    """The gates of all edges."""

    def step(self, runs: CircuitRuns, batch: Any) -> None:
        """One step of Adam on a batch."""
        with torch.no_grad():
            output = runs.model.run(batch.inputs, [])
        metrics = batch.metrics.against(output)
        clean, corrupt = metrics(output, batch.inputs)[0], batch.source(metrics)[0]
        gap = (clean - corrupt).mean().square().clamp_min(1e-12)
        with torch.enable_grad():
            away = (1 - self.drawn()) * self.there
            made = Interchange(runs.model, runs.graph, batch.inputs, batch.values).edits(away)
            run = GradientRun(runs.model, batch.inputs, [], made)
            (value,) = differentiable(metrics, run)
            self.descend((value - clean.to(value)).square().mean() / gap.to(value))
