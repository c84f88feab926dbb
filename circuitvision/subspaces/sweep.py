"""A subspace trained at every site and of every size asked for, beside the whole site: one site is no finding.

Where a subspace does more than its whole component, the component does not mediate what the subspace controls: such places are what
:func:`circuitvision.subspaces.illusion_report` is asked about.

Not covered: several towers in one sweep; sites outside blocks.

Source: the reply of Wu et al. 2024 (arXiv 2401.12631), which asks for sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from circuitvision import metrics
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName
from circuitvision.patching.activation import dead_sites, matching_sites
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.subspaces import controls as control_runs
from circuitvision.subspaces.das import DAS
from circuitvision.subspaces.kept import kept_runs
from circuitvision.subspaces.pairs import SitePairs, checked_pairs
from circuitvision.subspaces.report import SourceShare
from circuitvision.subspaces.training import Options


@dataclass(frozen=True, eq=False)
class SubspaceSweep(Result):
    """Subspaces trained at many sites: ``values`` ``[layer component k intervention example]``, the effect on held-out pairs in units of the source
    run's.

    Interventions are ``"subspace"`` and ``"full"``; ``accuracy`` has the same shape. Sites that do not exist, or cannot reach the output, are NaN.
    """

    accuracy: Tensor = field(default_factory=lambda: torch.zeros(0))
    tower: str = ""
    train: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"accuracy": -1}

    def exceeds(self) -> list[tuple[dict[str, Any], float]]:
        """Where a subspace does more than the whole component, by how much, most first: candidates for :func:`illusion_report`."""
        mean = self.mean()
        gap = (mean[..., 0] - mean[..., 1]).nan_to_num(-math.inf)
        names = ("layer", "component", "k")
        order = gap.flatten().argsort(descending=True).tolist()
        found = []
        for flat in order:
            place = torch.unravel_index(torch.tensor(flat), gap.shape)
            if math.isfinite(float(gap[place])) and float(gap[place]) > 0:
                found.append(
                    (
                        {name: self.axes[name][int(one)] for name, one in zip(names, place, strict=True)},
                        float(gap[place]),
                    )
                )
        return found


@with_provenance
def subspace_sweep(
    model: Any,
    pairs: Pairs,
    sites: str | Sequence[str],
    ks: int | Sequence[int] = 1,
    *,
    positions: Any = None,
    metric: Any = None,
    position: Any = "last",
    held_out: float | Pairs = 0.25,
    epochs: int = 10,
    rate: float = 0.03,
    batch_size: int = 20,
    seed: int = 0,
    align: Any = "kind",
    allow_wrong: bool = False,
    keep: bool = True,
    joint: bool = False,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> SubspaceSweep:
    """Train a subspace of every size at every site of one tower (a glob or names), and measure it and the whole site on held-out pairs.

    ``joint`` is as of :class:`DAS`, ``save_to`` and ``resume`` as of :meth:`DAS.fit`.

    Raises:
        InputError: as of :meth:`DAS.fit`; sites of several towers, outside blocks, or none that can reach the output.
    """
    names = matching_sites(model, sites)
    parsed = [SiteName.parse(name) for name in names]
    if len({name.tower for name in parsed}) != 1 or any(name.layer is None for name in parsed):
        raise InputError(
            "A sweep of subspaces is over sites in the blocks of one tower: give 'TOWER.blocks.*.SITE', or a list of such."
        )
    sizes = [ks] if isinstance(ks, int) else list(ks)
    if not sizes or min(sizes) < 1:
        raise InputError(f"ks={ks!r} is no number of dimensions: give 1 or more, or several such.")
    options = Options(epochs, rate, 0.0, 1, False)
    train, test = control_runs.split(checked_pairs(pairs, metric), held_out, seed)
    if max(sizes) > len(train):
        raise InputError(f"{max(sizes)} dimensions are more than the {len(train)} training pairs.")
    layers = sorted({int(name.layer or 0) for name in parsed})
    components = list(dict.fromkeys(name.site for name in parsed))
    shape = (len(layers), len(components), len(sizes), 2, len(test))
    effects, accuracy = (
        torch.full(shape, math.nan, dtype=torch.float64),
        torch.full(shape, math.nan, dtype=torch.float64),
    )
    dead = dead_sites(model, names, next(iter(pairs[:1].batches(model))).inputs)
    shared = {
        "positions": positions,
        "metric": metric,
        "position": position,
        "align": align,
        "allow_wrong": allow_wrong,
        "keep": keep,
        "joint": joint,
    }
    told = {
        "pairs": [train.digest, test.digest], "search": ["subspace_sweep", positions, metric, position, align, joint],
        "options": [epochs, rate, batch_size, seed],
    }  # fmt: skip
    with (
        kept_runs(save_to, resume, model, told) as folder,
        Progress(len(names) * len(sizes), "subspaces", progress) as bar,
    ):
        for site, name in zip(names, parsed, strict=True):
            if site in dead:
                continue
            place = layers.index(int(name.layer or 0)), components.index(name.site)
            with (
                SitePairs(model, train, site, batch_size=batch_size, **shared) as learned,
                SitePairs(model, test, site, **shared) as held,
            ):
                runs = SourceShare(held)
                whole = held.with_values([held.source])[0]
                for number, k in enumerate(sizes):
                    kept = folder.run(f"{site} {k}")
                    outcome = held.under(DAS(k, site, metric=metric).train(learned, held, seed, options, kept).columns)
                    for column, one in enumerate((outcome, whole)):
                        effects[(*place, number, column)] = runs.oriented(one) / runs.scale
                        accuracy[(*place, number, column)] = one.accuracy
                    bar.advance()
    return SubspaceSweep(
        values=effects,
        axes={
            "layer": layers,
            "component": components,
            "k": sizes,
            "intervention": ["subspace", "full"],
            "example": list(test.numbers),
        },
        provenance=describe(
            model,
            method="subspace_sweep",
            metric=metric or metrics.logit_diff(),
            seed=seed,
            dataset_sha256=pairs.digest,
            examples=len(test),
        ),
        accuracy=accuracy,
        tower=parsed[0].tower,
        train=list(train.numbers),
    )
