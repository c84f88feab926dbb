"""The estimates of attribution patching, batch by batch: at the base run, with queries and keys repaired and layers dropped, or along the path of the
inputs. What they mean is said in :mod:`circuitvision.patching.attribution`.

Not covered: more than one batch's graph at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision import edits, metrics
from circuitvision.errors import InputError
from circuitvision.metric_set import MetricSet
from circuitvision.model.edits.windows import RunWindows
from circuitvision.model.positions import Positions
from circuitvision.model.sites import SiteName
from circuitvision.patching.cells import Grid
from circuitvision.patching.estimates import Sums, Term, direct, key_fix, query_fix, wide
from circuitvision.patching.gradient_run import GradientRun, Layer, rows_of, values_under
from circuitvision.patching.runs import RunBatch

_QUERIES = ("hook_q", "hook_rot_q", "hook_q_input")
_KEYS = ("hook_k", "hook_rot_k", "hook_k_input")
Estimates = dict[str, Tensor]
"""By site ``[example *cells]``."""


@dataclass
class Estimated:
    """Estimates ``[metric cell example]`` of the cells of all live sites, in their order, of one batch or of all."""

    values: Tensor
    base: Tensor
    source: Tensor
    gap: Tensor
    examples: list[Any]


class Regions:
    """The positions of every region in one batch: called with a site, 0 and 1 ``[row pos region]`` (of one row where all are alike)."""

    def __init__(self, model: Any, batch: RunBatch, regions: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, batch.inputs
        self.windows = RunWindows(model, batch.inputs)
        chosen = [Positions.of(one) for one in regions.values()]
        self.chosen = chosen if batch.rows is None else [one.taken(batch.rows, batch.count) for one in chosen]
        self._found: dict[str, Tensor] = {}

    def __call__(self, site: str) -> Float[Tensor, "row pos region"]:
        """Raises InputError for a site without positions, and for positions that are not there."""
        if site not in self._found:
            window = self.windows.of(site)
            if window is None:
                raise InputError(
                    f"Positions of {site} are known only when the run gets there; leave 'region' out of axes."
                )
            masks = []
            for one in self.chosen:
                one.check(window, 0)
                masks.append(one.covers(window).expand(window.rows, -1))
            held = torch.stack(masks, -1)[:, self.model.positions(site, self.inputs)]
            self._found[site] = held.float()
        return self._found[site]

    def empty(self, site: str, count: int) -> Bool[Tensor, "example region"]:
        """Where no position of an example is in a region."""
        inside = self(site)
        held = torch.zeros(count, inside.shape[-1])
        return held.index_add_(0, rows_of(self.model, self.inputs, site, len(inside), count), inside.sum(1)) == 0


class Estimator:
    """The estimates of live sites, batch by batch; ``first`` are inputs of some examples."""

    def __init__(
        self,
        model: Any,
        first: Mapping[str, Any],
        names: list[str],
        grid: Grid,
        method: str,
        nodes: int,
        grad_drop: bool,
    ) -> None:
        self.model, self.names, self.grid, self.method, self.nodes = model, names, grid, method, nodes
        self.sums = Sums(grid.axes)
        self.entries = entries_of(model, first) if method == "ig" else []
        self.layers = _added(model) if method == "atp*" and grad_drop else {}
        stages = {name: SiteName.parse(name).stage for name in names} if method == "atp*" else {}
        self.queries = {name: patterns_of(model, name) for name, stage in stages.items() if stage in _QUERIES}
        self.keys = {name: patterns_of(model, name) for name, stage in stages.items() if stage in _KEYS}
        looked_at = [*self.queries.values(), *self.keys.values()]
        self.patterns = list(dict.fromkeys(pattern for found in looked_at for pattern in found))
        fixed = [*self.queries, *self.keys]
        if grid.neurons and fixed:
            raise InputError(
                f"method='atp*' recomputes the softmax for whole queries and keys, and neurons of {fixed[0]} are part of one: take method='atp'."
            )

    def told(self, mode: str) -> str:
        """What a provenance calls it."""
        more = f", nodes={self.nodes}" if self.method == "ig" else ""
        more += f", grad_drop={bool(self.layers)}" if self.method == "atp*" else ""
        return f"attribution_patch(method={self.method}, mode={mode}{more})"

    def read(self) -> list[str]:
        """The sites whose values in the source run are needed."""
        return list(dict.fromkeys([*self.names, *self.entries]))

    def batch(self, batch: RunBatch) -> Estimated:
        """The estimates of one batch."""
        self.sums = self._sums(batch)
        return self._along_path(batch) if self.method == "ig" else self._at_base(batch)

    def _sums(self, batch: RunBatch) -> Sums:
        """What the cells of this batch's examples hold."""
        neurons = None
        if self.grid.neurons:
            neurons = torch.stack([torch.eye(self.grid.width)[list(g)].sum(0) for g in self.grid.neurons.values()], 1)
        regions = Regions(self.model, batch, self.grid.regions) if self.grid.regions else None
        return Sums(self.grid.axes, regions, neurons)

    # -- at the base run -------------------------------------------------------------------------------------------------------------------

    def _at_base(self, batch: RunBatch) -> Estimated:
        plain = [name for name in self.names if name not in self.queries and name not in self.keys]
        holds = self._holds(batch.inputs)
        scores = [scores_of(pattern) for pattern in self.patterns]
        watched = list(dict.fromkeys([*plain, *self.patterns, *scores, *holds]))
        run = GradientRun(self.model, batch.inputs, watched, layers=self.layers)
        given = batch.metrics.against(run.output.detach())
        measured = differentiable(given, run)
        terms = self._fixed(batch, run, holds)
        for name in plain:
            away = wide(batch.values.pop(name)) - wide(run.values[name].detach())
            terms[name] = [direct(name, away, self.sums)]
        found: list[Estimates] = []
        for number, value in enumerate(measured):
            keep = number < len(measured) - 1
            run.dropped = None
            estimates = run.estimates(terms, value, keep or bool(self.layers)) if terms else {}
            found.append(self._with_drops(run, terms, value, estimates, keep) if self.layers and terms else estimates)
        return self._joined(found, given, batch, run.output.detach(), run.inputs)

    def _with_drops(
        self, run: GradientRun, terms: Mapping[str, Sequence[Term]], value: Tensor, estimates: Estimates, keep: bool
    ) -> Estimates:
        """The mean size over estimates with one layer dropped, with the sign of the estimate with none."""
        sizes = {name: torch.zeros_like(found) for name, found in estimates.items()}
        counts = dict.fromkeys(estimates, 0)
        reached = [layer for layer in self.layers if run.reaches(layer)]
        for layer in self.layers:
            run.dropped, last = layer, reached[-1:] == [layer]
            dropped = run.estimates(terms, value, keep or not last) if layer in reached else estimates
            for name, found in dropped.items():
                if _own_layer(name) != layer:
                    sizes[name] += found.abs()
                    counts[name] += 1
        signs = {name: torch.where(found < 0, -1.0, 1.0).to(found) for name, found in estimates.items()}
        return {
            name: sizes[name] / counts[name] * signs[name] if counts[name] else estimates[name] for name in estimates
        }

    def _holds(self, inputs: Mapping[str, Any]) -> list[str]:
        """The outputs of attention that keep each layer's stream the base's while queries or keys are the source's."""
        found = dict.fromkeys(pattern.replace("hook_pattern", "hook_z") for pattern in self.patterns)
        return [name for name in found if not self.model.is_dead(name, inputs)]

    def _fixed(self, batch: RunBatch, run: GradientRun, holds: Sequence[str]) -> dict[str, list[Term]]:
        """The terms of queries and keys, from runs with the source's."""
        held = [edits.replace(name, run.values[name].detach()) for name in holds]
        terms: dict[str, list[Term]] = {}
        for looked_at in (self.queries, self.keys):
            # Queries before and behind a rotation are patched in runs of their own: one would hide the other.
            for stage in dict.fromkeys(SiteName.parse(name).stage for name in looked_at):
                chosen = {name: found for name, found in looked_at.items() if SiteName.parse(name).stage == stage}
                wanted = list(dict.fromkeys(scores_of(pattern) for found in chosen.values() for pattern in found))
                writes = [edits.replace(name, batch.values[name]) for name in chosen]
                patched = values_under(self.model, batch.inputs, [*writes, *held], wanted)
                for name, patterns in chosen.items():
                    terms[name] = [self._term(name, pattern, batch, run, patched) for pattern in patterns]
        return terms

    def _term(self, name: str, pattern: str, batch: RunBatch, run: GradientRun, patched: Mapping[str, Tensor]) -> Term:
        scores, moved = run.values[scores_of(pattern)].detach(), patched[scores_of(pattern)]
        if name in self.queries:
            return query_fix(name, pattern, scores, moved, self.sums)
        count, heads = batch.values[name].shape[1:3]
        # The keys of a cache stand before a tower's own.
        first = scores.shape[-1] - count if SiteName.parse(pattern).tower == SiteName.parse(name).tower else 0
        return key_fix(name, pattern, scores, moved, slice(first, first + count), heads, self.sums)

    # -- along the path of the inputs ------------------------------------------------------------------------------------------------------

    def _along_path(self, batch: RunBatch) -> Estimated:
        names, entries = self.read(), self.entries
        with torch.no_grad():
            output, base = self.model._values_at(batch.inputs, names)
        given = batch.metrics.against(output)
        away = {name: wide(batch.values.pop(name)) - wide(base[name]) for name in names}
        base = {name: base[name] for name in entries}
        terms = {name: [direct(name, away[name], self.sums)] for name in self.names}
        # The whole of each input, under names that no site has.
        terms |= {f"{name} whole": [direct(name, away[name], Sums())] for name in entries}
        points, weights = np.polynomial.legendre.leggauss(self.nodes)
        found: list[Estimates] = [{} for _ in given.members]
        for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
            run = GradientRun(self.model, batch.inputs, names, path_edits(base, away, entries, float(point)))
            measured = differentiable(given, run)
            for number, value in enumerate(measured):
                for name, estimate in run.estimates(terms, value, number < len(measured) - 1).items():
                    found[number][name] = found[number].get(name, 0.0) + float(weight) * estimate
        with torch.no_grad():
            end = given(self.model.run(batch.inputs, path_edits(base, away, entries, 1.0)), batch.inputs)
        start = given(output, batch.inputs)
        reached = torch.stack([torch.stack([one[f"{name} whole"] for name in entries]).sum(0).cpu() for one in found])
        joined = self._joined([{n: one[n] for n in self.names} for one in found], given, batch, output, batch.inputs)
        joined.gap = reached - (end - start)
        return joined

    def _joined(
        self, found: Sequence[Estimates], given: MetricSet, batch: RunBatch, output: Tensor, inputs: Any
    ) -> Estimated:
        """The estimates of all metrics of a batch, with the metrics of its two runs; NaN where a region of an example is empty."""
        base, source = given(output, inputs), batch.source(given)
        cells = [self._by_cell(name, torch.stack([one[name].cpu() for one in found])) for name in self.names]
        values = torch.cat(cells, 1) if cells else base.cpu()[:, None][:, :0]
        examples = list(range(base.shape[1])) if batch.examples is None else batch.examples
        return Estimated(values, base, source, torch.zeros_like(base), examples)

    def _by_cell(self, name: str, values: Float[Tensor, "metric example ..."]) -> Float[Tensor, "metric cell example"]:
        """One site's estimates, cells in the order of the grid's."""
        if isinstance(self.sums.regions, Regions):
            axis = 2 + ("head" in self.grid.axes)
            empty = self.sums.regions.empty(name, values.shape[1])
            empty = empty.view(1, len(empty), *[1] * (axis - 2), -1, *[1] * (values.ndim - axis - 1))
            values = values.masked_fill(empty, float("nan"))
        return values.flatten(2).movedim(1, -1) if values.ndim > 2 else values[:, None]


def path_edits(
    base: Mapping[str, Tensor], away: Mapping[str, Tensor], entries: Sequence[str], point: float
) -> list[edits.Edit]:
    """The edits that put each input a share of the way to the source's."""
    return [
        edits.replace(name, (wide(base[name]) + point * away[name]).to(base[name].dtype))
        for name in entries
        if bool((away[name] != 0).any())
    ]


def differentiable(given: MetricSet, run: GradientRun) -> list[Tensor]:
    """Every metric of a run's output, per example, with a graph.

    Raises:
        InputError: a metric that gives no number per example, or none with a gradient.
    """
    found = []
    with torch.enable_grad():
        for name, metric in given.members.items():
            value = metrics.evaluate(metric, run.output, run.inputs)
            if not value.requires_grad:
                raise InputError(
                    f"The metric {name or getattr(metric, 'name', '') or 'given'} has no gradient: it must be computed from the output by "
                    "differentiable operations; truth values, ranks and detached tensors are not."
                )
            found.append(value)
    return found


# -- places --------------------------------------------------------------------------------------------------------------------------------


def entries_of(model: Any, inputs: Mapping[str, Any]) -> list[str]:
    """What enters each tower that runs: its stream, or its own embeddings where a connector feeds it."""
    tokens = model.tokens(inputs)
    found = [
        f"{name}.{'hook_embed' if model.flow.is_fed(name) else 'hook_input'}" for name in tokens if name in model.towers
    ]
    known = set(model.sites())
    return [name for name in found if name in known]


def _added(model: Any) -> dict[Layer, list[str]]:
    """The sites of what each layer adds to the stream, as far as it reaches the output."""
    known, found = set(model.sites()), {}
    for name, tower in model.towers.items():
        for layer in range(tower.cfg.n_layers):
            sites = [f"{name}.blocks.{layer}.{branch.added}" for branch in tower.blocks[layer].branches]
            live = [site for site in sites if site in known and not model.is_dead(site)]
            if live:
                found[name, layer] = live
    return found


def _own_layer(site: str) -> Layer | None:
    """The layer without which a site has no effect: that of its block, unless it is the stream itself."""
    name = SiteName.parse(site)
    return None if name.layer is None or name.site.startswith("hook_resid") else (name.tower, name.layer)


def scores_of(pattern: str) -> str:
    """The site of the scores that a pattern is the softmax of."""
    return pattern.replace("hook_pattern", "hook_attn_scores")


def patterns_of(model: Any, site: str) -> list[str]:
    """The patterns in which queries or keys act: their own, and for keys those of towers that see them through a cache.

    Raises:
        InputError: a site whose scores the model does not show.
    """
    name = SiteName.parse(site)
    letter = "attn" if not name.branch else name.branch
    found = [f"{name.tower}.blocks.{name.layer}.{letter}.hook_pattern"]
    if name.stage in _KEYS:
        found += [
            f"{other}.blocks.{name.layer}.{letter}.hook_pattern"
            for other in model.towers
            if model.flow.cache_of(other) == name.tower
        ]
    known = set(model.sites())
    live = [one for one in found if one in known and scores_of(one) in known and not model.is_dead(one)]
    if name.layer is None or not live:
        raise InputError(
            f"{site} acts through scores that this model does not show, so nothing can be recomputed: take method='atp'."
        )
    return live
