"""Causal tracing: noise on what the question is about, and then the state that brings the answer back.

Three runs: clean; *corrupted*, with Gaussian noise added to the subject's positions where they enter the first block,

    ``x' = x + noise · σ · ε``,  ``ε ~ N(0, 1)``, ``σ`` the standard deviation of the subject's entries over the data,

and *restored*, the corrupted run in which one cell (a site, layers, positions) takes its clean value. ``values`` is the indirect effect
``metric(restored) - metric(corrupted)`` per example, a mean over the samples of noise; ``base`` is the corrupted metric, ``source`` the clean one,
their mean difference the total effect, and ``restored`` the share of it that a cell brings back.

A state restored early may act through the MLPs behind it. *Severed*, the MLPs (or attentions) at the same positions of all later layers keep their
corrupted outputs: what is lost beside the plain trace went through them.

The noise is the base of a sweep: a cell costs what it can change, not the whole model.

Noise is :func:`circuitvision.edits.add_noise`, the same in any batch; samples have the seeds behind the first. It is one corruption among several,
and an unnatural one: pairs that differ in a word or an object (:func:`circuitvision.patching.activation_patch`) test the same claim on inputs that
exist (Zhang and Nanda 2023, arXiv 2309.16042).

Reference: Meng et al. 2022 (arXiv 2202.05262); its defaults are 3 standard deviations, 10 samples, windows of 10 layers for MLPs and attention.

Not covered: noise in one tower and states of another through a cache; corruption of pixels (:mod:`circuitvision.data`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuitvision import edits
from circuitvision.data import embedding_std
from circuitvision.errors import InputError, checked_seed
from circuitvision.model.edits.base import Edit, by_digest, taken
from circuitvision.model.positions import Positions
from circuitvision.model.sites import SiteName
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.activation import (
    PatchingResult,
    dead_sites,
    every_metric,
    grid_of,
    head_counts,
    matching_sites,
    warn_of_equal_runs,
)
from circuitvision.patching.cells import Cell
from circuitvision.patching.runs import Sides, one_run
from circuitvision.provenance import describe, with_provenance


@dataclass(frozen=True, eq=False)
class CausalTrace(PatchingResult):
    """What restoring each cell brings back, see :class:`circuitvision.patching.PatchingResult`.

    ``base`` is the metric of the corrupted run and ``source`` that of the clean one. ``sigma`` is the standard deviation of the entries that noise
    was added to, ``noise`` how many of it; ``severed`` the site whose later outputs were held.
    """

    noise: float = 0.0
    sigma: float = 0.0
    samples: int = 0
    severed: str = ""


@with_provenance
def causal_trace(
    model: Any,
    data: Any,
    metric: Any,
    *,
    subject: Any,
    sites: str | Sequence[str],
    axes: Sequence[str] = ("layer", "position"),
    regions: Mapping[str, Any] | None = None,
    window: int | str = 1,
    severed: str = "",
    noise: float = 3.0,
    sigma: float | None = None,
    samples: int = 10,
    seed: int = 0,
    allow_wrong: bool = False,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> CausalTrace:
    """Corrupt the subject with noise, restore every cell of ``axes`` on its own, and measure how much of the answer comes back.

    Args:
        model: the hooked model.
        data: inputs, a data set, or pairs (their clean side).
        metric: a metric, its name, or a mapping of several.
        subject: the positions that get noise, in any spelling: ``regions.words("circle")``, ``"patch"``.
        sites: what is restored: ``"language.blocks.*.hook_resid_post"``; of one tower.
        axes, regions, window: as of :func:`circuitvision.patching.activation_patch`; windows are for MLPs and attentions.
        severed: a site of blocks, ``"hook_mlp_out"`` or ``"hook_attn_out"``, whose outputs behind a cell stay corrupted at its positions.
        noise: standard deviations of noise.
        sigma: the standard deviation itself; None: measured at the subject's positions over the data.
        samples: how many draws of noise are averaged.
        seed: of the noise.
        allow_wrong: whether the clean runs may give other answers than the data set says, see :mod:`circuitvision.patching.clean_answers`.
        example_batch, save_to, resume, progress: as of ``model.sweep``.

    Raises:
        InputError: sites of several towers, without the axes, or that cannot reach the output; a severed site that is none, noise that is not
            positive, a subject that is nowhere; clean runs that do not give the answer; dropout in training mode.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Causal tracing")
    if not all(0 < given < math.inf for given in (noise, 1.0 if sigma is None else sigma)):
        raise InputError(f"noise={noise!r} and sigma={sigma!r} are finite, positive numbers.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InputError(f"samples={samples!r} is a positive whole number, of draws of noise.")
    names = matching_sites(model, sites)
    towers = {SiteName.parse(name).tower for name in names}
    if len(towers) > 1 or not towers <= set(model.towers):
        raise InputError(f"A trace restores the sites of one tower; found {', '.join(sorted(towers))}.")
    tower = towers.pop()
    later = _later(model, tower, severed)
    grid = grid_of(model, names, axes, regions, None, window)
    runs = one_run(model, data, metric, example_batch, allow_wrong)
    first = runs.first_inputs()
    dead = dead_sites(model, names, first)
    held = {name: model.positions(name, first) for name in names} if "position" in axes else {}
    labels, cells = grid.laid_out(head_counts(model, names) if "head" in axes else {}, held)
    live = [cell for cell in cells if any(site not in dead for site in cell.sites)]
    where = Positions.of(subject)
    size = sigma if sigma is not None else embedding_std(model, data, f"{tower}.hook_input", positions=where)
    seed = checked_seed(seed)
    added = [
        edits.add_noise(f"{tower}.hook_input", noise * size, seed=seed + sample, positions=subject)
        for sample in range(samples)
    ]
    sources = runs.sources(names)
    runs.fixed_positions = held
    groups = [cell.patch(sources, dead) for cell in live]
    found = []
    for sample, corrupted in enumerate(added):
        folder = None if save_to is None else Path(save_to) / f"sample-{sample}"
        options: dict[str, Any] = {"base": [corrupted], "save_to": folder, "resume": resume, "progress": progress}
        if severed and live:
            make = _Severed(model, corrupted, live, tuple(dead), later)
            found.append(runs.measure_made(make, names, **options))
        else:
            found.append(runs.measure(groups, **options))
    base = torch.stack([one.base for one in found]).mean(0)
    restored = torch.stack([one.values for one in found]).mean(0)
    values = torch.full((len(base), *map(len, labels.values()), base.shape[1]), torch.nan, dtype=base.dtype)
    for cell in cells:
        values[every_metric(cell.index)] = 0.0
    for number, cell in enumerate(live):
        values[every_metric(cell.index)] = restored[:, number] - base
    result = CausalTrace(
        values=values if runs.metrics.several else values[0],
        axes={**runs.metrics.axis, **labels, "example": found[0].examples},
        provenance=describe(
            model,
            method=f"causal_trace(noise={noise:g} × {size:.4g}, samples={samples}{f', severed={severed}' if severed else ''})",
            metric=runs.metrics,
            sites=grid.kind,
            seed=seed,
            **runs.described(),
        ),
        base=base if runs.metrics.several else base[0],
        source=found[0].source if runs.metrics.several else found[0].source[0],
        mode="denoise",
        site=grid.kind,
        dead=dead,
        edits=[by_digest((added[0], *group)) for group in groups],
        groups=found[0].groups,
        position_names=runs.position_names(held) if held else [],
        noise=noise,
        sigma=size,
        samples=samples,
        severed=severed,
    )
    warn_of_equal_runs(result, cells[0].index)
    return result


@dataclass(frozen=True)
class _Severed:
    """Makes the edits of a batch: each cell restored, with the severed sites behind it as they are under the noise alone."""

    model: Any
    noise: Edit
    cells: Sequence[Cell]
    dead: tuple[str, ...]
    later: Callable[[Cell], list[str]]

    def __provenance__(self) -> dict[str, Any]:
        return {
            "cells": [[*cell.sites, *self.later(cell)] for cell in self.cells],
            "positions": [cell.positions for cell in self.cells],
            "severed under": self.noise,
        }

    def __call__(self, sides: Sides) -> list[tuple[Edit, ...]]:
        def here(group: Sequence[Edit]) -> tuple[Edit, ...]:
            return tuple(group) if sides.rows is None else taken(group, sides.rows, sides.count)

        later = sorted({site for cell in self.cells for site in self.later(cell)})
        with torch.no_grad(), self.model.record(later) as cache:
            self.model.run(sides.inputs, here([self.noise]))
        return [
            here(
                [
                    *cell.patch(sides.source, self.dead),
                    *(edits.replace(site, cache[site], positions=cell.positions) for site in self.later(cell)),
                ]
            )
            for cell in self.cells
        ]


def _later(model: Any, tower: str, severed: str) -> Callable[[Cell], list[str]]:
    """The severed sites behind a cell."""
    if not severed:
        return lambda cell: []
    if severed.startswith("hook_resid"):
        raise InputError(
            f"severed={severed!r} is the residual stream itself, without which no cell reaches the output: sever what blocks add to it, "
            "'hook_mlp_out' or 'hook_attn_out'."
        )
    there = set(model.sites(f"{tower}.blocks.*.{severed}"))
    count = model.towers[tower].cfg.n_layers

    def behind(cell: Cell) -> list[str]:
        last = max(SiteName.parse(site).layer or 0 for site in cell.sites)
        wanted = [f"{tower}.blocks.{layer}.{severed}" for layer in range(last + 1, count)]
        return [site for site in wanted if site in there]

    return behind
