"""Training of one subspace on pairs: which batch comes in which step, what is minimised, and what a training run leaves.

A step costs what lies behind the site: each batch of pairs is a prepared run that is kept, and batches come in another order in every epoch. The
order of an epoch depends on the seed and the epoch alone, so a run that is continued sees what it would have seen.

The loss is cross-entropy towards the counterfactual answer plus ``closeness · |(h' − m) V|²``, with ``m`` the mean natural activation of what the
counterfactual answer is (:func:`apart`). Inside the span ``h'`` is ``h_s``: what closeness holds down is how far sources of one answer lie apart
along ``V``, and nothing outside the span.

Not covered: losses of other kinds; :func:`circuitvision.subspaces.fit_basis` takes any.

Sources: Geiger et al. 2023 (arXiv 2303.02536); Grant et al. (ICLR 2026) on closeness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError
from circuitvision.progress import Progress
from circuitvision.subspaces.fitting import FittedBasis
from circuitvision.subspaces.kept import KeptRun
from circuitvision.subspaces.maps import interchanged_by
from circuitvision.subspaces.pairs import Outcome, SiteBatch, SitePairs


@dataclass(frozen=True)
class Options:
    """How a basis is trained."""

    epochs: int
    rate: float
    closeness: float
    reports: int
    progress: bool

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise InputError(f"epochs={self.epochs!r} is a whole number, at least 1.")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise InputError(f"rate={self.rate} is a number above 0.")
        if not (self.closeness >= 0 and math.isfinite(self.closeness)):
            raise InputError(f"closeness={self.closeness} is 0 or more.")


@dataclass(frozen=True)
class Fit:
    """One training run: its basis (or what acts in place of one), and the held-out accuracy on the way, by epoch."""

    fitted: FittedBasis
    reported: dict[int, float]
    n_parameters: int
    act: Callable[[SitePairs], Outcome] | None = None

    @property
    def final_loss(self) -> float:
        """The mean training loss of the last tenth of the steps."""
        return float(self.fitted.loss[-max(1, len(self.fitted.loss) // 10) :].mean())

    def outcome(self, held: SitePairs) -> Outcome:
        """What held-out runs give under it."""
        return held.under(self.fitted.columns) if self.act is None else self.act(held)


class Schedule:
    """Which batch comes in which step, and when held-out pairs are asked."""

    def __init__(
        self, learned: SitePairs, held: SitePairs, seed: int, options: Options, kept: KeptRun | None = None
    ) -> None:
        self.learned, self.held, self.options = learned, held, options
        self.batches = len(learned.parts)
        self.steps = options.epochs * self.batches
        self.kept = kept or KeptRun()
        self.kept.every = self.batches
        asked = np.linspace(0, options.epochs, max(options.reports, 1) + 1)[1:]
        self.epochs = {max(1, round(float(epoch))) for epoch in asked}
        self._rng = np.random.default_rng(seed)
        self._orders: list[list[int]] = []
        self._bar = Progress(self.steps, "DAS", options.progress)
        self._one: Iterator[SiteBatch] | None = None

    def __enter__(self) -> Schedule:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)
        self._let_go()

    def _let_go(self) -> None:
        if self._one is not None:
            self._one.close()  # type: ignore[attr-defined]
            self._one = None

    def part(self, step: int) -> SiteBatch:
        """The batch of a step; where runs are not kept, with a run of its own until the next step."""
        epoch, place = divmod(step, self.batches)
        while len(self._orders) <= epoch:
            self._orders.append(self._rng.permutation(self.batches).tolist())
        if step > self._bar.done:
            self._bar.advance(step - self._bar.done, measured=False)
        part = self.learned.parts[self._orders[epoch][place]]
        if part.run is None or self._one is not None:
            self._let_go()
            self._one = self.learned.running(part)
            next(self._one)
        return part

    @property
    def reported(self) -> dict[int, float]:
        """The held-out accuracy after some epochs."""
        return {int(epoch): float(found) for epoch, found in self.kept.beside.items()}

    def report(self, step: int, act: Callable[[SitePairs], Outcome]) -> None:
        """Count a step; at the end of some epochs, the held-out accuracy."""
        self._bar.advance()
        epoch, rest = divmod(step + 1, self.batches)
        if rest == 0 and epoch in self.epochs:
            found = float(act(self.held).accuracy.mean())
            self.kept.beside[str(epoch)] = found
            self._bar.describe(f"DAS, {found:.1%} of held-out pairs")


def by_map(held: SitePairs, map: nn.Module, k: int) -> Outcome:
    """What held-out runs give where the first ``k`` coordinates behind an invertible map change places."""
    device = held.model.device
    with torch.no_grad():
        values = interchanged_by(map, held.base.float().to(device), held.source.float().to(device), k)
    return held.with_values([values.cpu()])[0]


def apart(source: Float[Tensor, "entry d"], means: Tensor, basis: Float[Tensor, "d k"]) -> Tensor:
    """``E|(h_s − m) V|²``: what is written inside the span, against the mean ``m`` of what each entry should say."""
    return ((source - means.to(source)).to(basis) @ basis).square().sum(1).mean()


def target_means(learned: SitePairs) -> Float[Tensor, "entry d"]:
    """For every entry the mean natural activation (of both sides) where what is told is its counterfactual answer."""
    own, target = learned.labels()
    natural, labels = torch.cat([learned.base, learned.source]), [*own, *target]
    labels_of = [labels[int(n)] for n in learned.example] + [target[int(n)] for n in learned.example]
    sums: dict[Any, Tensor] = {}
    for label in dict.fromkeys(labels_of):
        sums[label] = natural[torch.tensor([one == label for one in labels_of])].mean(0)
    return torch.stack([sums[target[int(n)]] for n in learned.example])
