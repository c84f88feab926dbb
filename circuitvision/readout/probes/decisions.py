"""The decision layer: how early a prediction that changes from layer to layer settles.

The decision layer of an example is the first anchor ``l`` in ``0 … T − k`` whose prediction equals those of the next ``k`` anchors, ``T``
being the last anchor. Where there is none, ``l* = T``; those examples never settled and are counted apart, because ``T`` would mix them with
late ones. Settled is not right, and a settled prediction may still be revised later. Predictions of probes, of a lens or of anything else will
do.

Reference: *When do models actually decide* (CVPR 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.provenance import with_provenance
from circuitvision.readout.probes.splitting import is_whole
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class DecisionLayers(Result):
    """The anchor at which each example's prediction settles: ``values`` ``[example]`` counts anchors from 0, ``T = len(layers) − 1`` is the last.

    Where ``stable`` is False no ``k + 1`` predictions in a row agreed, and the value is the fallback ``T``. ``decided`` is the prediction at
    that anchor, ``final`` the last one, ``target`` the right one (empty if none was given).
    """

    stable: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    decided: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    final: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    target: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    layers: list[Any] = field(default_factory=list)
    k: int = 2

    def _long_frame(self) -> pd.DataFrame:
        """One row per example: where it settles (the label of the anchor), whether it does, on what, and the last prediction."""
        frame = super()._long_frame()
        frame["layer"] = [self.layers[where] for where in self.values.tolist()]
        columns = {"stable": self.stable, "decided": self.decided, "final": self.final}
        columns |= {"target": self.target} if len(self.target) == len(self.values) else {}
        for name, column in columns.items():
            frame[name] = column.numpy()
        return frame

    def highlights(self) -> dict[str, str]:
        """Shares of the examples that settle early, in the middle, late and never."""
        return {name: f"{share:.0%}" for name, share in self.shares.items()}

    @property
    def wrong(self) -> Bool[Tensor, " example"]:
        """Settled, and on a wrong prediction. Raises InputError without targets."""
        if len(self.target) != len(self.values):
            raise InputError("Which decisions are wrong needs the right answers: decision_layer(…, target=…).")
        return self.stable & (self.decided != self.target)

    @property
    def stable_but_wrong(self) -> float:
        """Share of the settled examples that settled on a wrong prediction; NaN if none settled."""
        return float(self.wrong.double().sum() / self.stable.sum())

    @property
    def revised(self) -> float:
        """Share of the settled examples whose last prediction is another one; NaN if none settled."""
        return float((self.stable & (self.decided != self.final)).double().sum() / self.stable.sum())

    def settled(self, wrong: bool | None = None) -> Float[Tensor, " anchor"]:
        """Share of all examples that settle at each anchor where they can; on a wrong prediction (a right one) alone, where that is asked."""
        members = self.stable if wrong is None else self.wrong if wrong else self.stable & ~self.wrong
        anchors = len(self.layers) - self.k
        return torch.bincount(self.values[members], minlength=anchors)[:anchors].double() / len(self.values)

    @property
    def median(self) -> int | None:
        """The anchor by which half of the settled examples have settled; None if none has."""
        settled = self.values[self.stable].double()
        return int(settled.quantile(0.5, interpolation="lower")) if len(settled) else None

    @property
    def cumulative(self) -> Float[Tensor, " layer"]:
        """Share of all examples that have settled at or before each anchor; ends at the share that ever settles."""
        counts = torch.bincount(self.values[self.stable], minlength=len(self.layers))
        return counts.cumsum(0).double() / len(self.values)

    @property
    def shares(self) -> dict[str, float]:
        """Shares of all examples: settled early (``l* < .3 T``), in the middle, late (``l* ≥ .7 T``), and never."""
        last, settled = len(self.layers) - 1, self.values[self.stable].double()
        early, late = (settled < 0.3 * last).sum(), (settled >= 0.7 * last).sum()
        counts = {"early": early, "middle": len(settled) - early - late, "late": late}
        counts["never"] = (~self.stable).sum()
        return {name: float(count) / len(self.values) for name, count in counts.items()}


@with_provenance
def decision_layer(
    predictions: Int[Tensor, "layer example"] | np.ndarray | Sequence[Sequence[int]],
    k: int = 2,
    *,
    target: Int[Tensor, " example"] | Sequence[int] | None = None,
    layers: Sequence[Any] | None = None,
    examples: Sequence[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> DecisionLayers:
    """The first anchor from which on ``k + 1`` predictions in a row agree, per example.

    Args:
        predictions: class or token numbers, one row per anchor in the order of the model: probes' predictions, or a lens' top ids.
        k: how many further anchors must agree.
        target: the right predictions, for the share that settles on a wrong one.
        layers: labels of the anchors.
        examples: labels of the examples.
        provenance: of the predictions, kept with the result.

    Raises:
        InputError: predictions that are not whole numbers ``[layer example]``, too few anchors for ``k``, labels that do not fit.
    """
    predicted = torch.as_tensor(predictions).detach().cpu()
    if predicted.ndim != 2 or predicted.is_floating_point() or predicted.shape[1] == 0:
        raise InputError(
            f"Predictions must be whole numbers [layer example], not {predicted.dtype} {tuple(predicted.shape)}."
        )
    anchors, count = predicted.shape
    if not is_whole(k) or not 1 <= k < anchors:
        raise InputError(
            f"k={k!r} must be a whole number of at least 1, and less than the {anchors} anchors there are."
        )
    named = list(range(anchors)) if layers is None else list(layers)
    numbers = list(range(count)) if examples is None else list(examples)
    right = torch.zeros(0, dtype=torch.long) if target is None else torch.as_tensor(target).cpu()
    if len(named) != anchors or len(numbers) != count or len(right) not in (0, count):
        raise InputError(f"Labels and targets must fit {anchors} anchors and {count} examples.")
    agrees = torch.stack(
        [(predicted[first : first + k + 1] == predicted[first]).all(0) for first in range(anchors - k)]
    )
    stable = agrees.any(0)
    where = torch.where(stable, agrees.int().argmax(0), anchors - 1)
    if not bool(stable.any()):
        warn(f"No example's prediction agrees over {k + 1} anchors in a row.")
    return DecisionLayers(
        values=where,
        axes={"example": numbers},
        provenance={**(provenance or {}), "method": f"decision_layer(k={k})"},
        stable=stable,
        decided=predicted.gather(0, where[None])[0],
        final=predicted[-1],
        target=right,
        layers=named,
        k=k,
    )
