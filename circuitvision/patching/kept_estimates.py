"""Estimates of all examples, batch by batch, with finished batches kept in a folder.

The folder is that of a sweep (:mod:`circuitvision.incremental.sweeps.store`): a part is a batch of examples with the estimates of all cells, written
when it is finished. What must be equal for parts to be joined is what a sweep asks, with cells, method and mode in the place of edits.

Not covered: a batch that is interrupted half-way, which is estimated again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError, warn
from circuitvision.incremental.sweeps.plan import Plan
from circuitvision.incremental.sweeps.store import Part, Store, joined, orderly_stop
from circuitvision.model.positions import Positions
from circuitvision.patching.estimator import Estimated, Estimator
from circuitvision.patching.runs import Runs
from circuitvision.progress import Progress

LARGEST_GAP = 0.05
"""Share of the metric's change along the path that integrated gradients may miss before a warning says so."""
ESTIMATED = Plan(reason="estimated from a gradient")


def measured(
    estimator: Estimator, runs: Runs, mode: str, progress: bool, save_to: str | Path | None = None, resume: bool = False
) -> Estimated:
    """The estimates of all batches; warns where integrated gradients miss much of the metric's change, and where regions are empty.

    Raises:
        InputError: ``resume`` without a folder, and what a sweep's folder refuses.
    """
    if resume and save_to is None:
        raise InputError("resume=True continues from a folder: name it, save_to=folder.")
    study = runs.study(estimator.read())
    parts: list[Part] = []
    with contextlib.ExitStack() as stack:
        store = None
        if save_to is not None:
            told = study.told()
            told["edits"] = of_json([told["edits"], *runs.told(), _told(estimator, mode)])
            store = stack.enter_context(Store(save_to, told, resume))
            parts = store.parts()
            study._use_layout(store.layout)
            stack.enter_context(orderly_stop())
        bar = stack.enter_context(Progress(study._n_examples(), "attribution patching", progress))
        for part in parts:
            bar.advance(len(part.examples), measured=False)
        for batch in runs.batches(estimator.read(), study, {part.batch for part in parts}):
            found = estimator.batch(batch)
            runs.look(found.base, found.source, found.examples, batch.number == 0)
            parts.append(_part(found, batch.number, batch.rows))
            if store is not None and parts[-1].groups:
                store.begin(study._layout())
                store.write(parts[-1])
            bar.advance(len(found.examples))
    runs.warn()
    whole = _whole(parts, study._labels())
    _warn(whole, estimator)
    return whole


def _told(estimator: Estimator, mode: str) -> dict[str, Any]:
    """What is estimated, and how, in plain values."""
    grid = estimator.grid
    return {
        "method": estimator.told(mode),
        "sites": estimator.names,
        "axes": list(grid.axes),
        "regions": {label: plain(Positions.of(one)) for label, one in grid.regions.items()},
        "neurons": {label: list(group) for label, group in grid.neurons.items()},
    }


def _part(found: Estimated, number: int, rows: list[int] | None) -> Part:
    cells, count = found.values.shape[1:]
    return Part(
        batch=number,
        examples=list(range(count)) if rows is None else rows,
        groups=list(range(cells)),
        values=found.values.to(
            torch.promote_types(torch.promote_types(found.base.dtype, torch.float32), found.values.dtype)
        ),
        clean=found.base.cpu(),
        unedited=found.values.isnan().any(0),
        plan=[ESTIMATED] * cells,
        others={"source": found.source.cpu(), "gap": found.gap.cpu()},
    )


def _whole(parts: list[Part], labels: list[Any]) -> Estimated:
    """All parts as one."""
    count = max(max(part.examples) for part in parts) + 1
    cells = parts[0].values.shape[1]
    found: Mapping[str, torch.Tensor] = joined(parts, cells, count)
    base = found["clean"]
    return Estimated(found["values"], base, found["other.source"], found["other.gap"], labels or list(range(count)))


def _warn(whole: Estimated, estimator: Estimator) -> None:
    change = whole.source - whole.base
    missed = (whole.gap.abs() > LARGEST_GAP * change.abs()) & (whole.gap.abs() > 1e-6 * (1 + whole.base.abs()))
    if bool(missed.any()):
        warn(
            f"In {int(missed.sum())} of {missed.numel()} cases the integrated gradients at the inputs miss the metric's change by more than "
            f"{LARGEST_GAP:.0%}: take more nodes."
        )
    empty = whole.values.isnan().all(0).any(0) if estimator.grid.regions and whole.values.shape[1] else torch.zeros(0)
    if bool(empty.any()):
        warn(
            f"Regions select no position in {int(empty.sum())} of {len(empty)} examples, whose cells are NaN and in no mean."
        )
