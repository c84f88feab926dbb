"""Activation patching: which part of one run, put into another, moves the answer.

Two runs of the same shape, *clean* and *corrupt*, differ in one thing. One run is the *base*; for every cell of the requested axes one piece of it
takes the value it had in the other run, the *source*, and the metric is read again. The effect is ``metric(patched) - metric(base)`` per example,
and over examples

    ``restored = mean(metric(patched) - metric(base)) / mean(metric(source) - metric(base))``

``mode="denoise"`` patches clean values into the corrupt run: 1 restores the clean answer, 0 does nothing (is this piece *sufficient*?).
``mode="noise"`` patches corrupt values into the clean run: 1 destroys it completely (is it *necessary*?). Shares may be negative or exceed 1, and
they do not add up where pieces back each other up. They are a ratio of means and not a mean of ratios, which single examples with a small difference
would decide; where the two runs do not differ (within two standard errors) there is no share: NaN, with a warning.

Every cell is a group of ``edits.replace`` (of neurons ``edits.project``), and all cells are one ``model.sweep``: only what a cell can change is
computed. Pairs run in batches, their positions matched by kind.

A policy that denoises (not to be confused with ``mode="denoise"``) runs its action tower once per denoising step, and the axis ``"step"`` patches
them one at a time: what a site held in that step of the source run goes into the same step of the base run, and the metric reads the actions that
come out at the end. Pairs start both runs from the same noise. What runs once before (the prefix) is step 0, and acts on every denoising step through
its keys and values. Runs of several passes are whole runs, group by group.

Not covered: tensors of different shapes given as ``clean=`` and ``corrupt=`` (make them Pairs); tokens said in the source run.

Reference: Wang et al. 2022 (arXiv 2211.00593); Zhang and Nanda 2023 (arXiv 2309.16042) on the two modes and on what to divide by.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.metrics.effects import fldd, flip_layer, restored_share
from circuitvision.model.edits.base import EditGroup, by_digest
from circuitvision.model.edits.writes import width_of
from circuitvision.model.run_functions import RunFunction, act, described_run, refuse_still
from circuitvision.model.sites import SiteName
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.cells import Grid, neuron_groups, step_groups
from circuitvision.patching.runs import two_runs
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class PatchingResult(Result):
    """Effects of patching: ``values`` ``[*axes example]``, the change of the metric in its own units; several metrics lead, ``[metric *axes
    example]``.

    ``base`` and ``source`` ``[example]`` (``[metric example]``) are the metric of the two runs, and :attr:`restored` the share of their difference
    that each cell moves. Cells that do not exist (a tower with fewer layers or heads than another) are NaN. Sites listed in ``dead`` cannot reach the
    output: their effect is 0, without a run. ``edits`` is the edit of every cell that was run, in row-major order, with tensors by digest
    (:func:`circuitvision.edits.restore` puts them back). ``groups`` says which examples belong together, where the data does.
    """

    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    mode: str = "denoise"
    site: str = ""
    dead: list[str] = field(default_factory=list)
    edits: list[EditGroup] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    position_names: list[str] = field(default_factory=list)
    """What stands at each label of the axis ``position`` in the first examples (a word, ``image[2, 5]``); empty without it."""

    _per_example: ClassVar[dict[str, int]] = {"base": -1, "source": -1, "groups": 0}
    _of_first: ClassVar[tuple[str, ...]] = ("position_names",)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, where several were measured; else empty."""
        return list(self.axes.get("metric", []))

    @property
    def cells(self) -> dict[str, list[Any]]:
        """The axes of the cells: all but ``metric`` and ``example``."""
        return {name: labels for name, labels in self.axes.items() if name not in ("metric", "example")}

    @property
    def restored(self) -> Float[Tensor, "*axes"]:
        """The share of the source's answer that each cell restores (or destroys), see the module; NaN where the two runs do not differ."""
        return restored_share(self.values, self._everywhere(self.base), self._everywhere(self.source))

    @property
    def fldd(self) -> Float[Tensor, "*axes"]:
        """How far each cell takes a logit difference of the base run's answer away from it, see :func:`circuitvision.metrics.fldd`."""
        base = self._everywhere(self.base)
        return fldd(base + self.values, base)

    def flip_layer(self) -> Result:
        """The layer from which on patching no longer changes the answer, ``[*other axes example]``, of a metric whose sign tells two answers apart;
        see :func:`circuitvision.metrics.flip_layer`.

        Raises:
            InputError: no axis of layers.
        """
        axes = list(self.axes)
        if "layer" not in axes:
            raise InputError(f"These cells have no layers ({', '.join(self.cells)}): patch with axes=('layer', …).")
        patched = (self._everywhere(self.base) + self.values).movedim(axes.index("layer"), -2)
        left = {name: labels for name, labels in self.axes.items() if name != "layer"}
        known = {**self.provenance, "method": f"flip layer of {self.provenance.get('method', 'patching')}"}
        return Result(flip_layer(patched, self.axes["layer"]), left, known)

    def _everywhere(self, metric: Tensor) -> Tensor:
        """A run's metric in the shape of the values."""
        lead = [len(self.metrics)] if self.metrics else []
        return metric.view(*lead, *[1] * len(self.cells), -1).expand(self.values.shape)

    def _long_frame(self) -> pd.DataFrame:
        """One row per metric, cell and example: ``value`` (the effect), ``base`` and ``source``."""
        frame = super()._long_frame()
        for name, found in (("base", self.base), ("source", self.source)):
            frame[name] = self._everywhere(found).double().flatten().numpy()
        return frame

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The effects. Raises InputError for several metrics."""
        if self.metrics:
            raise InputError(f"Several metrics were measured ({', '.join(self.metrics)}); rank the result of one.")
        return self.values, ("example",)

    def top(self, count: int = 10, metric: str | None = None) -> list[tuple[dict[str, Any], float]]:
        """The cells that restore the largest share in absolute value, as (labels, share), strongest first; of several metrics the one named, else the
        first."""
        shares = self.restored
        if self.metrics:
            shares = shares[0 if metric is None else self.index_of("metric", metric)]
        flat = shares.flatten().nan_to_num(0.0)
        order = flat.abs().argsort(descending=True, stable=True)[:count].tolist()
        places = [dict(zip(self.cells, labels, strict=True)) for labels in itertools.product(*self.cells.values())]
        return [(places[index], float(flat[index])) for index in order]


@with_provenance
def activation_patch(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    sites: str | Sequence[str],
    axes: Sequence[str] = ("layer", "head"),
    mode: str = "denoise",
    regions: Mapping[str, Any] | None = None,
    neurons: Any = None,
    window: int | str = 1,
    steps: Any = None,
    run: RunFunction | None = None,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PatchingResult:
    """Patch every cell of ``axes`` of the matching sites, one at a time, and measure how much of the answer follows.

    Args:
        model: the hooked model.
        pairs: a data set of pairs, run ``example_batch`` at a time (None: by memory), positions matched as ``align`` says.
        metric: a metric, its name, or a mapping of several (see :mod:`circuitvision.metrics`); answers are the pairs' where it has none.
        sites: a glob or names, for example ``"vision.blocks.*.attn.hook_z"``.
        axes: ``"layer"``, ``"site"`` (of sites outside blocks, or of several kinds beside ``"layer"``) or both, then ``"head"``, ``"position"`` or
            ``"region"``, ``"neurons"`` and ``"step"`` as wanted. What is not an axis is patched whole: ``("layer", "head")`` patches all positions of
            one head.
            Sites of several towers add the axis ``"tower"``.
        mode: ``"denoise"`` or ``"noise"``.
        regions: of the axis ``"region"``, labels and the positions they stand for, in any spelling (``{"object": regions["box"], "last": "last"}``).
        neurons: of the axis ``"neurons"``, groups of coordinates of the sites: a list of them, a mapping with labels, or how many equal runs.
        window: layers patched together in the cell of one: how many around it (ROME patches 10), ``"up to"`` it or ``"from"`` it on.
        steps: of the axis ``"step"``, passes by number and ``"all"`` for all at once, or a mapping of labels to several (``{"early": (0, 1)}``);
            None is each alone.
        run: what one run is: None, one forward pass, or with the axis ``"step"`` :func:`circuitvision.steering.act`; else a function
            ``(model, inputs, edits)``, as of ``model.sweep``. Without the axis every pass is patched.
        clean, corrupt: in place of pairs, the inputs of the two runs, of the same shapes.
        allow_wrong: whether the clean runs may give other answers than the pairs say, see :mod:`circuitvision.patching.clean_answers`.
        save_to, resume: a folder for finished parts, and whether to continue what it holds, see ``model.sweep``.
        progress: whether progress is shown.

    Raises:
        InputError: dropout in training mode, runs that do not fit together, axes the site does not have, several kinds of site on one axis, an
            unknown mode or window, regions, neurons or steps without their axis, a step that is not there, sites that cannot reach the output, pairs
            whose clean runs do not give the answer.
        UnknownSiteError: ``sites`` matches nothing.
        UnsupportedModelError: steps of a model that does not act.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Patching")
    names = matching_sites(model, sites)
    grid = grid_of(model, names, axes, regions, neurons, window)
    if steps is not None and "step" not in axes:
        raise InputError("The axis 'step' and steps= belong together: steps= says what the axis holds.")
    if "step" in axes and run is None:
        refuse_still(model)
        run = act
    runs = two_runs(model, pairs, metric, clean, corrupt, mode, align, example_batch, allow_wrong, run)
    first = runs.first_inputs()
    dead = dead_sites(model, names, first)
    held = {name: model.positions(name, first) for name in names} if "position" in axes else {}
    without = [name for name, positions in held.items() if not positions]
    if without:
        raise InputError(f"{without[0]} has no positions in this model; leave 'position' out of axes.")
    passes = runs.passes(names) if "step" in axes else {}
    if passes:
        grid = replace(grid, steps=step_groups(steps, max(passes.values())))
    labels, cells = grid.laid_out(head_counts(model, names) if "head" in axes else {}, held, passes)
    sources = runs.sources(names)
    runs.fixed_positions = held
    patches = [(cell, cell.patch(sources, dead)) for cell in cells]
    live = [(cell, group) for cell, group in patches if group]
    measured = runs.measure([group for _, group in live], save_to=save_to, resume=resume, progress=progress)
    values = torch.full(
        (len(measured.base), *map(len, labels.values()), measured.base.shape[1]),
        float("nan"),
        dtype=measured.base.dtype,
    )
    for cell in cells:
        values[every_metric(cell.index)] = 0.0
    for number, (cell, _) in enumerate(live):
        values[every_metric(cell.index)] = measured.values[:, number] - measured.base
    result = PatchingResult(
        values=values if runs.metrics.several else values[0],
        axes={**runs.metrics.axis, **labels, "example": measured.examples},
        provenance=describe(
            model,
            method=f"activation_patch(mode={mode})",
            metric=runs.metrics,
            sites=grid.kind,
            **described_run(run),
            **runs.described(),
        ),
        base=measured.base if runs.metrics.several else measured.base[0],
        source=measured.source if runs.metrics.several else measured.source[0],
        mode=mode,
        site=grid.kind,
        dead=dead,
        edits=[by_digest(group) for _, group in live],
        groups=measured.groups,
        position_names=runs.position_names(held) if held else [],
    )
    warn_of_equal_runs(result, cells[0].index)
    return result


def grid_of(
    model: Any,
    names: Sequence[str],
    axes: Sequence[str],
    regions: Mapping[str, Any] | None = None,
    neurons: Any = None,
    window: int | str = 1,
) -> Grid:
    """What is patched. Raises InputError for axes that do not fit the sites."""
    if isinstance(axes, str):
        raise InputError(f"axes={axes!r} is one name; give the names as a tuple, axes=({axes!r},).")
    groups, width = {}, 0
    if neurons is not None:
        widths = {name: width_of(model, name) for name in names}
        if None in widths.values() or len(set(widths.values())) > 1:
            raise InputError(
                f"Neurons are coordinates of sites of one width in a tower, and these have {widths}: patch them apart."
            )
        width = widths[names[0]] or 0
        groups = neuron_groups(neurons, width)
    grid = Grid(tuple(names), tuple(axes), dict(regions or {}), groups, width, window)
    grid.check()
    return grid


def dead_sites(model: Any, names: Sequence[str], inputs: Mapping[str, Any]) -> list[str]:
    """Those sites that cannot reach the output in this run.

    Raises:
        InputError: none of them can.
    """
    found = [name for name in names if model.is_dead(name, inputs)]
    if len(found) == len(names):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(
            f"The output cannot depend on {names[0]}{others} in this run, so nothing would be measured: take sites in earlier layers, or of another "
            "tower (model.is_dead(site, inputs) tells)."
        )
    return found


def first_inputs(model: Any, data: Any) -> Mapping[str, Any]:
    """The inputs of the first example of a data set (of pairs the clean side), or inputs in memory themselves."""
    side = getattr(data, "clean", data)
    return next(iter(side[:1].batches(model))).inputs if hasattr(data, "batches") else data


def every_metric(place: tuple[int, ...]) -> tuple[Any, ...]:
    """The index of a cell in values of several metrics."""
    return (slice(None), *place)


def warn_of_equal_runs(result: Any, cell: tuple[int, ...]) -> None:
    """One warning where the two runs hardly differ in a metric."""
    shares = result.restored if result.metrics else result.restored[None]
    names = [name for number, name in enumerate(result.metrics or ["the metric"]) if shares[number][cell].isnan()]
    if names:
        warn(
            f"The two runs do not differ in {', '.join(names)} (within two standard errors of {result.values.shape[-1]} examples), so there is no "
            "share of a difference: restored is NaN. Take pairs whose answers differ (pairs.answered(model))."
        )


def matching_sites(model: Any, sites: str | Sequence[str]) -> list[str]:
    """The names that a glob, or a list of names and globs, stands for, in the model's order and each once."""
    patterns = [sites] if isinstance(sites, str) else list(sites)
    if not patterns:
        raise InputError("No site was named; give a glob such as 'vision.blocks.*.attn.hook_z'.")
    return list(dict.fromkeys(name for pattern in patterns for name in model.sites(pattern)))


def head_counts(model: Any, names: Sequence[str]) -> dict[str, int]:
    """How many heads each site has."""
    found = {}
    for name in names:
        site = SiteName.parse(name)
        cfg = model.towers[site.tower].cfg
        found[name] = cfg.n_kv_heads if site.counts_key_heads else cfg.n_heads
    return found
