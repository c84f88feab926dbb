"""What each unit of head importance scores, by one method: see :mod:`circuitvision.circuits.importance`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits.information_gain import gain_runs
from circuitvision.circuits.path_effects import ROUNDING, PathEffects
from circuitvision.circuits.units import HOOKS, Unit
from circuitvision.data import Pairs, Side
from circuitvision.errors import InputError
from circuitvision.metric_set import MetricSet
from circuitvision.model.edits.base import Edit
from circuitvision.model.sites import SiteName
from circuitvision.patching.attribution import attribution_patch
from circuitvision.patching.components import Place
from circuitvision.patching.paths import path_patch
from circuitvision.patching.runs import Measured, Runs, one_run, two_runs

ABLATIONS = ("zero", "mean", "resample")
ESTIMATES = ("attribution", "direct")
METHODS = ("patch", *ABLATIONS, *ESTIMATES, "information_gain")


@dataclass(frozen=True)
class Asked:
    """What a caller of head importance gave of the runs."""

    pairs: Any
    metric: Any
    clean: Mapping[str, Any] | None
    corrupt: Mapping[str, Any] | None
    mode: str
    align: Any
    example_batch: int | None
    reference: Any
    average: Any
    seed: int

    def ablated(self, method: str) -> bool:
        """Whether units are ablated, in the clean run."""
        return method in ABLATIONS or method == "information_gain"

    def runs(self, model: Any, method: str) -> Runs:
        """The two runs, or the one. Whether the clean run gives the answer is a finding of the result."""
        if method == "information_gain":
            first = next(iter(MetricSet.of("kl" if self.metric is None else self.metric).members.values()))
            return gain_runs(model, self.pairs, getattr(first, "position", "last"), self.example_batch)
        if self._alone(method):
            data = self.pairs if self.clean is None else self.clean
            return one_run(model, data, self.metric, self.example_batch, allow_wrong=True)
        mode = "noise" if self.ablated(method) else self.mode
        return two_runs(
            model,
            self.pairs,
            self.metric,
            self.clean,
            self.corrupt,
            mode,
            self.align,
            self.example_batch,
            allow_wrong=True,
        )

    def check_apart(self, runs: Runs, method: str) -> None:
        """Raise InputError for two runs that do not differ, where one is patched into the other."""
        if self.ablated(method):
            return
        measured = runs.measure([], progress=False)
        gap, size = (measured.source - measured.base).abs(), measured.source.abs() + measured.base.abs()
        if not bool((gap > ROUNDING * size).any()):
            raise InputError("The metric does not differ between the two runs, so no head can restore anything.")

    def told(self, measured: Measured, method: str) -> Measured:
        """What was measured, with NaN for a second run that an ablation did not have."""
        if not self._alone(method):
            return measured
        return dataclasses.replace(measured, source=torch.full_like(measured.source, torch.nan))

    def _alone(self, method: str) -> bool:
        """Whether there is one run."""
        single = self.clean is not None or isinstance(self.pairs, Side)
        return method in ABLATIONS and self.corrupt is None and single

    def change(self, model: Any, runs: Runs, method: str, sites: Sequence[str]) -> Callable[[Place], Edit]:
        """What a change of a place is: the other run's value, or an ablation."""
        sources = runs.sources([] if self.ablated(method) else sites)
        if not self.ablated(method):
            return lambda place: place.replaced(model, sources[place.site])
        word = "mean" if method == "information_gain" else method
        options: dict[str, Any] = {} if word == "zero" else {"dataset": self._reference(word)}
        options |= {"average": self.average} if word == "mean" else {"seed": self.seed} if word == "resample" else {}

        def ablated(place: Place) -> Edit:
            if word == "zero" or SiteName.parse(place.site).layer is not None:
                return place.ablated(model, word, **options)
            # Pictures at the entrance of a tower have no position that means the same in all, and no counterpart to be drawn.
            return place.ablated(model, "mean", dataset=self._reference("mean"), average="all")

        return ablated

    def _reference(self, word: str) -> Any:
        """What means go over, or draws are of: of pairs both sides, unless told otherwise."""
        given = self.pairs if self.reference is None else self.reference
        if isinstance(given, Pairs):
            return Side.concat([given.clean, given.corrupt])
        if given is None and word == "mean":
            return [one for one in (self.clean, self.corrupt) if one is not None]
        return given


def scores(
    model: Any,
    asked: Asked,
    method: str,
    units: Sequence[Unit],
    effects: PathEffects,
    options: Mapping[str, Any],
) -> Float[Tensor, "metric unit example"]:
    """The score of every unit that can reach the output.

    Raises:
        InputError: units that a method does not define.
    """
    if method not in ESTIMATES:
        return effects.effects([([unit], ()) for unit in units], "units")[1]
    given = {"clean": asked.clean, "corrupt": asked.corrupt, "align": asked.align, "mode": asked.mode}
    given |= {"example_batch": asked.example_batch, "allow_wrong": True}
    if method == "direct":
        return _direct(model, asked, units, {**given, **options})
    return _estimated(model, asked, units, {**given, **options})


def _direct(model: Any, asked: Asked, units: Sequence[Unit], options: Mapping[str, Any]) -> Tensor:
    within = [unit.id for unit in units if unit.kind not in ("head", "mlp")]
    if within:
        raise InputError(
            f"{within[0]} writes nothing into the stream by itself, so it has no direct effect: method='direct' is of 'heads' and 'mlps'."
        )
    parts: dict[str, Tensor] = {}
    for tower, own in itertools.groupby(sorted(units, key=_of), lambda unit: unit.tower):
        # Towers of a dual encoder end in outputs of their own.
        members = list(own)
        found = path_patch(
            model,
            asked.pairs,
            asked.metric,
            senders={unit.id: [unit.id] for unit in members},
            receivers="output",
            axes=("sender",),
            **_inside(options, f"{tower} direct"),
        )
        # Without an axis of receivers there is one entry. Where no path leads to the output, nothing arrives.
        values = (found.values if found.metrics else found.values[None])[:, :, 0].nan_to_num(0.0)
        labels = found.axes["sender"]
        parts |= {unit.id: values[:, labels.index(unit.id)] for unit in members}
    return torch.stack([parts[unit.id] for unit in units], 1)


def _estimated(model: Any, asked: Asked, units: Sequence[Unit], options: Mapping[str, Any]) -> Tensor:
    parts: dict[str, Tensor] = {}
    for (tower, kind), own in itertools.groupby(sorted(units, key=_of), _of):
        members = list(own)
        if kind == "kv_head":
            sites = [f"{tower}.blocks.*.attn.hook_{stage}" for stage in ("k", "v")]
            more: dict[str, Any] = {"axes": ("site", "layer", "head")}
        else:
            sites = [f"{tower}.blocks.*.{HOOKS[kind]}"]
            more = {"axes": ("layer", "head") if kind == "head" else ("layer",)}
        if kind == "neuron_group":
            groups = {unit.label: unit.places[0].neurons for unit in members}
            more = {"axes": ("layer", "neurons"), "neurons": groups}
        found = attribution_patch(
            model, asked.pairs, asked.metric, sites=sites, **more, **_inside(options, f"{tower} {kind}")
        )
        values = found.values if found.metrics else found.values[None]
        # Keys and values of a group are changed together: to first order, the sum.
        values = values.sum(1) if kind == "kv_head" else values
        for unit in members:
            row = found.axes["layer"].index(unit.layer)
            own_values = values[:, row]
            if kind == "neuron_group":
                own_values = own_values[:, found.axes["neurons"].index(unit.label)]
            elif kind != "mlp":
                own_values = own_values[:, found.axes["head"].index(unit.places[0].heads[0])]  # type: ignore[index]
            parts[unit.id] = own_values
    return torch.stack([parts[unit.id] for unit in units], 1)


def _of(unit: Unit) -> tuple[str, str]:
    return unit.tower, unit.kind


def _inside(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    folder = options.get("save_to")
    return {**options, "save_to": None if folder is None else Path(folder) / name}
