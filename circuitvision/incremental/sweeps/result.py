"""The result of a sweep: metrics under each edit, what was computed for it, and the edits themselves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from circuitvision.digests import NamedFunction
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps.plan import Plan
from circuitvision.metrics.effects import restored_share
from circuitvision.model.edits.base import EditGroup
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.hooked import HookedModel


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult(Result):
    """The metric under each edit: ``values`` ``[edit example]``, or ``[*axes example]`` where axes were given; ``clean`` ``[example]`` without it,
    under the sweep's ``base`` of edits alone (without one, unedited). Several metrics (a mapping) lead: ``[metric *axes example]`` and ``[metric
    example]``.

    ``edits`` holds each group of edits in the order given (they print as their labels, and can be run again), ``labels`` names them, and ``plan``
    says what was computed for each. ``metric`` is the metric, or the name of the function that it was; a mapping of them for several. ``done``
    ``[*axes]`` is False where an interrupted sweep did not get to (values are NaN), and ``interrupted`` says by what.
    """

    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    edits: list[EditGroup] = field(default_factory=list)
    plan: list[Plan] = field(default_factory=list)
    done: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    interrupted: str = ""
    metric: Any = None
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The metric of the run that edits take their values from, in the shape of ``clean``; empty where there is none."""
    base: EditGroup = field(default_factory=EditGroup)
    """The edits that every run was under, ``clean`` included."""
    groups: list[Any] = field(default_factory=list)
    """What belongs together, one entry per example, where a data set says so."""

    _per_example: ClassVar[dict[str, int]] = {"clean": -1, "source": -1, "groups": 0}

    @property
    def labels(self) -> list[str]:
        """One line for each group of edits, told apart by a number where two are alike."""
        return list(self.axes["edit"]) if "edit" in self.axes else labels(self.edits)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, where several were measured; else empty."""
        return list(self.axes.get("metric", []))

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The axes of the edits: all but ``metric`` and ``example``."""
        return {name: entries for name, entries in self.axes.items() if name not in ("metric", "example")}

    def of(self, metric: str) -> Self:
        """The same sweep with one of its metrics, without the axis ``metric``.

        Raises:
            InputError: no such metric, or a sweep of a single one.
        """
        number = self.index_of("metric", metric)
        known = {"metric": metric, "metric_units": str(getattr(self.metric[metric], "units", ""))}
        return dataclasses.replace(
            self,
            values=self.values[number],
            axes={name: entries for name, entries in self.axes.items() if name != "metric"},
            provenance={**self.provenance, **known},
            clean=self.clean[number],
            source=self.source[number] if self.source.numel() else self.source,
            metric=self.metric[metric],
        )

    def one(self, metric: str | None = None) -> Self:
        """One metric of the sweep: the one named, else the first."""
        if not self.metrics:
            if metric is not None:
                raise InputError(f"This sweep has a single metric; leave metric={metric!r} out.")
            return self
        return self.of(self.metrics[0] if metric is None else metric)

    def rerun(self, model: HookedModel, inputs: Mapping[str, Any], metric: Any = None, **keywords: Any) -> SweepResult:
        """The same edits, metric and axes again, on a model and inputs; further keywords go to ``model.sweep``.

        Whether they are the same model and inputs is for ``provenance`` to say.

        Raises:
            InputError: the metric, or the function of an edit, is known by its name alone and cannot be imported; or an edit's tensor is not there.
        """
        metric = self.metric if metric is None else metric
        if isinstance(metric, Mapping):
            metric = {name: _resolved(one) for name, one in metric.items()}
        axes = None if list(self.grid) == ["edit"] else self.grid
        return model.sweep(inputs, self.edits, _resolved(metric), **{"axes": axes, "base": self.base, **keywords})

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The effects: what an edit does, not where it leaves the metric. Raises InputError for several metrics."""
        if self.metrics:
            raise InputError(
                f"This sweep measured {', '.join(self.metrics)}: rank one, result.of({self.metrics[0]!r})."
            )
        return self.effect, ("example",)

    def highlights(self) -> dict[str, str]:
        """The edits with the largest mean effect, beside the unedited metric; of several metrics the first."""
        shown = self.one()
        name = f" ({self.metrics[0]})" if self.metrics else ""
        found = {spelled_cell(cell): f"{value:+.4g}" for cell, value in shown.top(5)}
        return {**found, f"unedited{name}": f"{float(shown.mean(quantity='clean')):.4g}"}

    @property
    def effect(self) -> Tensor:
        """Change of the metric, ``values - clean``, in the shape of ``values``."""
        return self.values - self._clean_everywhere()

    @property
    def restored(self) -> Tensor:
        """How much of the way from the unedited run to the source's an edit goes, ``[*axes]``, see :func:`restored_share`.

        Raises:
            InputError: a sweep whose edits take no values from another side.
        """
        if not self.source.numel():
            raise InputError(
                "No edit of this sweep takes its values from a side of pairs, so there is nothing to restore."
            )
        lead = [len(self.metrics)] if self.metrics else []
        base, source = (found.view(*lead, *[1] * len(self.grid), -1) for found in (self.clean, self.source))
        return restored_share(self.effect, base.expand(self.values.shape), source.expand(self.values.shape))

    def _clean_everywhere(self) -> Tensor:
        """The unedited metric in as many axes as ``values``."""
        lead = [len(self.metrics)] if self.metrics else []
        return self.clean.view(*lead, *[1] * len(self.grid), -1)

    def top(self, count: int = 10, metric: str | None = None) -> list[tuple[dict[str, Any], float]]:
        """The edits with the largest absolute mean effect, strongest first, as (labels by axis, effect); of several metrics the one named, else the
        first."""
        chosen = self.one(metric)
        mean = chosen.mean(quantity="effect").flatten()
        cells = [dict(zip(chosen.grid, place, strict=True)) for place in itertools.product(*chosen.grid.values())]
        order = mean.abs().nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
        return [(cells[index], float(mean[index])) for index in order if not mean[index].isnan()][:count]

    def _long_frame(self) -> pd.DataFrame:
        """One row per metric, edit and example: ``value``, ``clean`` and ``effect``, their difference."""
        frame = super()._long_frame()
        frame["clean"] = self._clean_everywhere().double().expand(self.values.shape).flatten().numpy()
        frame["effect"] = frame["value"] - frame["clean"]
        return frame

    def __repr__(self) -> str:
        count = math.prod(len(entries) for entries in self.grid.values())
        size = " × ".join(f"{len(entries)} {name}s" for name, entries in self.grid.items() if name != "edit")
        best = self.top(1)
        strongest = f"; strongest: {spelled_cell(best[0][0])}, {best[0][1]:+.4g}" if best else ""
        strongest += f" {self.metrics[0]}" if best and self.metrics else ""
        state = f", interrupted by {self.interrupted}" if self.interrupted else ""
        measured = f", metrics {', '.join(self.metrics)}" if self.metrics else ""
        done = f"{int(self.done.sum())} of {count} edits{f' ({size})' if size else ''}"
        return f"SweepResult({done}, {self.clean.shape[-1]} examples{measured}{state}{strongest})"


def spelled_cell(cell: Mapping[str, Any]) -> str:
    """The labels of one cell in words; an edit's label as it is."""
    return ", ".join(str(label) if axis == "edit" else f"{axis} {label}" for axis, label in cell.items())


def labels(groups: Sequence[EditGroup]) -> list[str]:
    """One line for each group, a later one of the same words with its number."""
    found: dict[str, int] = {}
    named = []
    for text in map(repr, groups):
        found[text] = found.get(text, 0) + 1
        named.append(text if found[text] == 1 else f"{text} #{found[text]}")
    return named


def _resolved(metric: Any) -> Any:
    return metric.resolve() if isinstance(metric, NamedFunction) else metric
