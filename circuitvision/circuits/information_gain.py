"""Information gain: how far a change of the input moves the distribution of the answer, as a metric and as the two runs of an experiment.

With ``p`` the distribution of the answer and ``JS`` the Jensen–Shannon divergence in nats (at most ln 2 for a choice),

    ``gain(x → x') = JS(p(x), p(x'))``.

The rows of an example stand together: first ``x``, then what it was changed into. A sweep over them gives, for each edit, the gain that is left under
it, since the edit acts on every one of these rows.

Reference: CIGMA (Maliha et al., CVPR 2026).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.data import Pairs, Side
from circuitvision.data.batches import automatic_size
from circuitvision.errors import InputError
from circuitvision.links import shared_divergence
from circuitvision.metric_set import MetricSet
from circuitvision.metrics.base import Metric
from circuitvision.metrics.position import as_output, at_position
from circuitvision.model.edits.base import Edit
from circuitvision.patching.runs import Groups, Measured, SideRuns


@dataclass(frozen=True, eq=False)
class InformationGain(Metric):
    """Of rows that stand ``count`` by ``count`` — an input and what it was changed into — 0 and the gain of every change in nats, over some columns
    of the output or all."""

    columns: tuple[int, ...] | None = None
    count: int = 3

    units = "nat"
    function = "information_gain"

    def __call__(
        self, logits: Float[Tensor, "batch *pos classes"], inputs: Mapping[str, Any] | None = None
    ) -> Float[Tensor, " batch"]:
        """One number per row. Raises InputError for a batch that cuts an example in two."""
        rows = at_position(as_output(logits), self.position, inputs, self.tokens)
        rows = rows if self.columns is None else rows[:, list(self.columns)]
        if len(rows) % self.count:
            raise InputError(
                f"An information gain compares {self.count} rows that stand together, and a batch has {len(rows)}: give an example_batch that fits."
            )
        given, *others = rows.double().unflatten(0, (-1, self.count)).unbind(1)
        link = self._link(logits)
        gains = [shared_divergence(given, other, link) for other in others]
        return torch.stack([torch.zeros_like(gains[0]), *gains], 1).flatten()


class GainRuns(SideRuns):
    """Both sides of pairs as one run, whose metric is the gain of each pair; the other run is one without a gain, 0."""

    def __init__(self, model: Any, pairs: Pairs, metrics: MetricSet, size: int) -> None:
        count = len(pairs)
        rows = [part * count + row for row in range(count) for part in range(2)]
        super().__init__(model, metrics, Side.concat([pairs.clean, pairs.corrupt])[rows], size, allow_wrong=True)
        self.given = pairs

    def measure(self, groups: Groups, base: Sequence[Edit] = (), **options: Any) -> Measured:
        """One sweep; of every pair the gain that is left."""
        found = super().measure(groups, base, **options)
        left = found.base[..., 1::2]
        return dataclasses.replace(
            found,
            values=found.values[..., 1::2],
            base=left,
            source=torch.zeros_like(left),
            examples=list(self.given.numbers),
            groups=self.groups,
        )

    @property
    def groups(self) -> list[Any]:
        """The groups of the pairs."""
        return [] if self.given.clean.groups is None else list(self.given.clean.groups)

    def described(self) -> dict[str, Any]:
        """The digest of the pairs."""
        return {"dataset_sha256": self.given.digest, "examples": len(self.given)}


def gain_runs(model: Any, pairs: Any, position: Any = "last", size: int | None = None) -> GainRuns:
    """The runs in which the information gain of pairs is measured, over every column of the output.

    ``size`` is how many pairs run at once; None: by memory.

    Raises:
        InputError: something else than pairs, or pairs whose sides cannot stand in one batch.
    """
    if not isinstance(pairs, Pairs) or not len(pairs):
        raise InputError("An information gain is of pairs: give cv.data.Pairs of an input and what it is changed into.")
    each = max(1, automatic_size(model, pairs.clean[0]) // 2) if size is None else size
    metric = InformationGain(position=position, name="information gain", count=2)
    return GainRuns(model, pairs, MetricSet.of(metric), 2 * each)
