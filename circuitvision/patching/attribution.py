"""Attribution patching: first-order estimates of what activation patching would find, for every site at once.

Two runs differ in one thing, as in :mod:`circuitvision.patching.activation`. The effect of giving a cell ``c`` of the base run its value of the
source run is estimated from a gradient at the base run,

    ``effect(c) ≈ Σ_c (source - base) · ∂metric/∂activation``

summed over what the cell holds (positions, channels). It has the sign and units of ``PatchingResult.values``, so exact and estimated effects compare
cell by cell. One run of each side and one backward pass give every cell of every site of every tower. Three methods:

* ``"atp"``: the line above. Exact where the metric is linear in the cell; blind where the softmax of attention is saturated, and where a direct and
  an indirect effect cancel.
* ``"atp*"``: two repairs. *QK fix*: for queries and keys the pattern is recomputed exactly, with that head and position patched, and
  ``Σ (pattern' - pattern) · ∂metric/∂pattern`` taken. One more run gives the scores of all queries, one those of all keys: every attention output is
  held at its base value, so that each layer sees the base's stream; rotary, norms of queries and keys, masks and soft caps are the model's own.
  *GradDrop*: the estimate is made once for each layer of all towers, with no gradient through what that layer adds to the stream. The size is the
  mean of the sizes of these estimates (the paper's score; a component's own layer, without which it has no effect, does not count), the sign that of
  the estimate with nothing dropped (+ where that is 0). It is a score to rank by: where no paths cancel it is no better than the plain estimate.
* ``"ig"``: the gradient is the mean along the straight path of the *inputs* from base to source. What enters each tower (``{tower}.hook_input``, of
  a tower that a connector feeds ``{tower}.hook_embed``) is ``base + α (source - base)``; at the Gauss–Legendre nodes ``α`` every site's gradient is
  read and multiplied with that site's ``source - base`` (the inputs path of EAP-IG). Over the cells of the inputs themselves the estimates sum to
  the change of the metric along the path; ``completeness_gap`` says how far they miss it. Elsewhere no sum is promised.

A region is the sum over its positions, a group of neurons the sum over its coordinates, so that regions that share no position and neurons that share
no coordinate add up to the whole; but keys of a region under the QK fix, which are patched together in one softmax.

Not covered: paths of each site's own activation; norms over queries or keys of all heads together; windows of layers; groups of neurons of queries
and keys under the QK fix; denoising steps one at a time.

References: Nanda 2022 (attribution patching); Kramár et al. 2024 (arXiv 2403.00745) on AtP*; Hanna et al. 2024 (arXiv 2403.17806) on EAP-IG.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from circuitvision import metrics
from circuitvision.errors import InputError, warn
from circuitvision.metric_set import MetricSet
from circuitvision.model.state import refuse_inference, refuse_random, refuse_unwrapped
from circuitvision.model.weights import check_gradients
from circuitvision.patching.activation import (
    PatchingResult,
    dead_sites,
    every_metric,
    grid_of,
    head_counts,
    matching_sites,
    warn_of_equal_runs,
)
from circuitvision.patching.estimator import Estimator
from circuitvision.patching.kept_estimates import measured
from circuitvision.patching.runs import two_runs
from circuitvision.provenance import describe, with_provenance

METHODS = ("atp", "atp*", "ig")
ESTIMATED_AXES = ("layer", "site", "head", "position", "region", "neurons")


@dataclass(frozen=True, eq=False)
class AttributionResult(PatchingResult):
    """Estimated effects of patching, in the units and with the sign of a :class:`PatchingResult`'s.

    ``method`` is "atp", "atp*" or "ig". Of "ig", ``completeness_gap`` ``[example]`` (``[metric example]``) is by how much the estimates at the
    inputs miss the metric's change along the path. ``edits`` is empty: no cell was run.
    """

    method: str = "atp"
    completeness_gap: Tensor = field(default_factory=lambda: torch.zeros(0))

    _per_example: ClassVar[dict[str, int]] = {"base": -1, "source": -1, "groups": 0, "completeness_gap": -1}


@with_provenance
def attribution_patch(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    sites: str | Sequence[str],
    axes: Sequence[str] = ("layer", "head"),
    method: str = "atp",
    mode: str = "denoise",
    regions: Mapping[str, Any] | None = None,
    neurons: Any = None,
    nodes: int = 8,
    grad_drop: bool = True,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> AttributionResult:
    """Estimate what patching every cell of ``axes`` of the matching sites would do, from gradients instead of a run per cell.

    Runs of a batch: "atp" one of each side and one backward pass per metric; "atp*" up to two more runs, and a backward pass per layer behind the
    first site; "ig" ``nodes`` runs and backward passes. Texts of a dual encoder take a backward pass per image.

    Args:
        model: the hooked model.
        pairs, metric, sites, axes, mode, regions, neurons, clean, corrupt, align, allow_wrong: as of
            :func:`circuitvision.patching.activation_patch`. The metric is differentiable.
        method: ``"atp"``, ``"atp*"`` or ``"ig"``, see :mod:`circuitvision.patching.attribution`.
        nodes: Gauss–Legendre nodes of ``"ig"``.
        grad_drop: whether ``"atp*"`` drops layers; without it there is the QK fix alone.
        example_batch: how many pairs run together (None: by memory, for runs that keep their graph).
        save_to, resume: a folder for finished batches of examples, and whether to continue what it holds, see ``model.sweep``.
        progress: whether progress is shown.

    Raises:
        InputError: what ``activation_patch`` refuses; a metric without a gradient; an unknown method; ``"atp*"`` at queries or keys whose scores the
            model does not show.
        UnknownSiteError: ``sites`` matches nothing. UnsupportedModelError: a layer through which no gradient passes.
    """
    refuse_unwrapped(model)
    _check_method(method, nodes)
    refuse_random(model.module, "Attribution patching")
    names = matching_sites(model, sites)
    unknown = sorted(set(axes) - set(ESTIMATED_AXES))
    if unknown:
        raise InputError(
            f"Estimates have the axes {', '.join(ESTIMATED_AXES)}, not {unknown[0]!r}: take activation_patch."
        )
    grid = grid_of(model, names, axes, regions, neurons)
    check_gradients(model.module)
    if pairs is not None and example_batch is None and hasattr(pairs, "clean"):
        example_batch = graph_batch_size(model, pairs)
    runs = two_runs(model, pairs, metric, clean, corrupt, mode, align, example_batch, allow_wrong)
    check_metrics(runs.metrics, mode, method)
    first = runs.first_inputs()
    refuse_inference(model.module, first)
    dead = dead_sites(model, names, first)
    held = {name: model.positions(name, first) for name in names} if "position" in axes else {}
    without = [name for name, positions in held.items() if not positions]
    if without:
        raise InputError(f"{without[0]} has no positions in this model; leave 'position' out of axes.")
    labels, cells = grid.laid_out(head_counts(model, names) if "head" in axes else {}, held)
    runs.fixed_positions = held
    live = [name for name in names if name not in dead]
    estimator = Estimator(model, first, live, grid, method, nodes, grad_drop)
    found = measured(estimator, runs, mode, progress, save_to, resume)
    several = runs.metrics.several
    shape = (len(found.base), *map(len, labels.values()), found.base.shape[1])
    values = torch.full(shape, float("nan"), dtype=found.values.dtype)
    numbers = itertools.count()
    for cell in cells:
        dead_cell = cell.sites[0] in dead
        values[every_metric(cell.index)] = 0.0 if dead_cell else found.values[:, next(numbers)]
    gap = found.gap.new_zeros(0) if method != "ig" else found.gap if several else found.gap[0]
    result = AttributionResult(
        values=values if several else values[0],
        axes={**runs.metrics.axis, **labels, "example": found.examples},
        provenance=describe(
            model, method=estimator.told(mode), metric=runs.metrics, sites=grid.kind, **runs.described()
        ),
        base=found.base if several else found.base[0],
        source=found.source if several else found.source[0],
        mode=mode,
        site=grid.kind,
        dead=dead,
        groups=runs.groups,
        position_names=runs.position_names(held) if held else [],
        method=method,
        completeness_gap=gap,
    )
    warn_of_equal_runs(result, cells[0].index)
    return result


def _check_method(method: str, nodes: int) -> None:
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}; choose one of {', '.join(map(repr, METHODS))}.")
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise InputError(f"nodes={nodes!r} is not understood: a whole number from 1 on.")


def check_metrics(given: MetricSet, mode: str, method: str) -> None:
    """Raise InputError for metrics that count; warn of one that is at its minimum where its gradient is taken."""
    flat = [name for name, one in given.members.items() if isinstance(one, (metrics.Rank, metrics.Accuracy))]
    if flat:
        said = flat[0] or type(given.members[""]).__name__.lower()
        raise InputError(
            f"{said} counts, so its gradient is 0 everywhere: take logit_diff, logprob or prob here, or measure it with activation_patch."
        )
    if given.compares and mode == "noise" and method != "ig":
        warn(
            "kl compares with the run that is patched, where it is at its minimum: its gradient is 0 there, and so are all estimates. Take "
            "mode='denoise', method='ig', or another metric."
        )


def graph_batch_size(model: Any, pairs: Any) -> int:
    """How many pairs run together where a graph is kept: several activations for each one that a run without it holds."""
    from circuitvision.data.batches import automatic_size

    return max(1, automatic_size(model, pairs.clean[0]) // 4) if len(pairs) else 1
