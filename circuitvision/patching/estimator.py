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
from torch import Tensor

from circuitvision import edits, metrics
from circuitvision.errors import InputError, warn
from circuitvision.metric_set import MetricSet
from circuitvision.model.sites import SiteName
from circuitvision.patching.estimates import Term, direct, key_fix, query_fix, wide
from circuitvision.patching.gradient_run import GradientRun, Layer, values_under
from circuitvision.patching.runs import RunBatch, Runs
from circuitvision.progress import Progress

LARGEST_GAP = 0.05
"""Share of the metric's change along the path that integrated gradients may miss before a warning says so."""
_QUERIES = ("hook_q", "hook_rot_q", "hook_q_input")
_KEYS = ("hook_k", "hook_rot_k", "hook_k_input")
Estimates = dict[str, Tensor]
"""By site ``[example *cells]``."""


@dataclass
class Estimated:
    """Estimates by site ``[metric example *cells]``, of one batch or of all."""

    values: Estimates
    base: Tensor
    source: Tensor
    gap: Tensor
    examples: list[Any]

    def dtype(self) -> torch.dtype:
        """The type that holds them all."""
        found = torch.promote_types(self.base.dtype, torch.float32)
        for value in self.values.values():
            found = torch.promote_types(found, value.dtype)
        return found


def measured(estimator: Estimator, runs: Runs, progress: bool) -> Estimated:
    """The estimates of all batches; warns where integrated gradients miss much of the metric's change."""
    parts: list[Estimated] = []
    with Progress(0, "attribution patching", progress) as bar:
        for batch in runs.batches(estimator.read()):
            parts.append(estimator.batch(batch))
            bar.advance(len(parts[-1].examples))
    whole = Estimated(
        values={name: torch.cat([part.values[name] for part in parts], 1) for name in parts[0].values},
        base=torch.cat([part.base for part in parts], 1),
        source=torch.cat([part.source for part in parts], 1),
        gap=torch.cat([part.gap for part in parts], 1),
        examples=[label for part in parts for label in part.examples],
    )
    change = whole.source - whole.base
    missed = (whole.gap.abs() > LARGEST_GAP * change.abs()) & (whole.gap.abs() > 1e-6 * (1 + whole.base.abs()))
    if bool(missed.any()):
        warn(
            f"In {int(missed.sum())} of {missed.numel()} cases the integrated gradients at the inputs miss the metric's change by more than "
            f"{LARGEST_GAP:.0%}: take more nodes."
        )
    return whole


class Estimator:
    """The estimates of live sites, batch by batch; ``first`` are inputs of some examples."""

    def __init__(
        self,
        model: Any,
        first: Mapping[str, Any],
        names: list[str],
        axes: tuple[str, ...],
        method: str,
        nodes: int,
        grad_drop: bool,
    ) -> None:
        self.model, self.names, self.axes, self.method, self.nodes = model, names, axes, method, nodes
        self.entries = entries_of(model, first) if method == "ig" else []
        self.layers = _added(model) if method == "atp*" and grad_drop else {}
        stages = {name: SiteName.parse(name).stage for name in names} if method == "atp*" else {}
        self.queries = {name: patterns_of(model, name) for name, stage in stages.items() if stage in _QUERIES}
        self.keys = {name: patterns_of(model, name) for name, stage in stages.items() if stage in _KEYS}
        looked_at = [*self.queries.values(), *self.keys.values()]
        self.patterns = list(dict.fromkeys(pattern for found in looked_at for pattern in found))

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
        return self._along_path(batch) if self.method == "ig" else self._at_base(batch)

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
            terms[name] = [direct(name, away, self.axes)]
        found: list[Estimates] = []
        for number, value in enumerate(measured):
            keep = number < len(measured) - 1
            run.dropped = None
            estimates = run.estimates(terms, value, keep or bool(self.layers)) if terms else {}
            found.append(self._with_drops(run, terms, value, estimates, keep) if self.layers and terms else estimates)
        return _joined(found, given, batch, run.output.detach(), run.inputs)

    def _with_drops(
        self, run: GradientRun, terms: Mapping[str, Sequence[Term]], value: Tensor, estimates: Estimates, keep: bool
    ) -> Estimates:
        """The mean size over estimates with one layer dropped, with the sign of the estimate with none."""
        sizes = {name: torch.zeros_like(found) for name, found in estimates.items()}
        counts = dict.fromkeys(estimates, 0)
        for number, layer in enumerate(self.layers):
            run.dropped = layer
            for name, found in run.estimates(terms, value, keep or number < len(self.layers) - 1).items():
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
            return query_fix(name, pattern, scores, moved, self.axes)
        count, heads = batch.values[name].shape[1:3]
        # The keys of a cache stand before a tower's own.
        first = scores.shape[-1] - count if SiteName.parse(pattern).tower == SiteName.parse(name).tower else 0
        return key_fix(pattern, scores, moved, slice(first, first + count), heads, self.axes)

    # -- along the path of the inputs ------------------------------------------------------------------------------------------------------

    def _along_path(self, batch: RunBatch) -> Estimated:
        names, entries = self.read(), self.entries
        with torch.no_grad():
            output, base = self.model._values_at(batch.inputs, names)
        given = batch.metrics.against(output)
        away = {name: wide(batch.values.pop(name)) - wide(base[name]) for name in names}
        base = {name: base[name] for name in entries}
        terms = {name: [direct(name, away[name], self.axes)] for name in self.names}
        # The whole of each input, under names that no site has.
        terms |= {f"{name} whole": [direct(name, away[name], ())] for name in entries}
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
        joined = _joined([{n: one[n] for n in self.names} for one in found], given, batch, output, batch.inputs)
        joined.gap = reached - (end - start)
        return joined


def path_edits(
    base: Mapping[str, Tensor], away: Mapping[str, Tensor], entries: Sequence[str], point: float
) -> list[edits.Edit]:
    """The edits that put each input a share of the way to the source's."""
    return [
        edits.replace(name, (wide(base[name]) + point * away[name]).to(base[name].dtype))
        for name in entries
        if bool((away[name] != 0).any())
    ]


def _joined(found: Sequence[Estimates], given: MetricSet, batch: RunBatch, output: Tensor, inputs: Any) -> Estimated:
    """The estimates of all metrics of a batch, with the metrics of its two runs."""
    base, source = given(output, inputs), batch.source(given)
    values = {name: torch.stack([one[name].cpu() for one in found]) for name in found[0]}
    examples = list(range(base.shape[1])) if batch.examples is None else batch.examples
    return Estimated(values, base, source, torch.zeros_like(base), examples)


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
