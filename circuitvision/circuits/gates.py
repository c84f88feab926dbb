"""Learned gates: how much of every component is kept, trained with a penalty on how many are.

Every component has a gate ``z`` in [0, 1] (hard concrete: ``z = clip(sigmoid((ln u - ln(1-u) + α) / β)(ζ - γ) + γ)`` with uniform ``u``), which is
exactly 0 or 1 with positive probability. A Lagrangian ``λ₁ (s - t) + λ₂ (s - t)²`` holds the expected share of open gates ``s`` at a target ``t``,
``λ`` trained upwards.

Not covered: what a gate does to a run (:mod:`circuitvision.circuits.edge_pruning`, :mod:`circuitvision.circuits.head_masks`).

Reference: Louizos et al. 2018 (arXiv 1712.01312); Cao et al. 2021 (arXiv 2104.03514).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError

TEMPERATURE, LOWEST, HIGHEST = 2 / 3, -0.1, 1.1


class Gates:
    """The gates of all components that are ``there``, of which ``count`` are to be open, and their optimiser."""

    def __init__(
        self, there: Bool[Tensor, "*cell"], count: int, start: float, rate: float, penalty_rate: float, seed: int
    ) -> None:
        self.there, self.target = there, count / int(there.sum())
        self.alpha = torch.full(there.shape, start, requires_grad=True)
        self.multipliers = torch.zeros(2, requires_grad=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimiser = torch.optim.Adam([self.alpha], lr=rate)
        self.ascent = torch.optim.SGD([self.multipliers], lr=penalty_rate, maximize=True)

    def drawn(self) -> Float[Tensor, "*cell"]:
        """How much of every component is kept, drawn."""
        u = torch.rand(self.alpha.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((u.log() - (1 - u).log() + self.alpha) / TEMPERATURE)
        return (soft * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)

    @property
    def open(self) -> Float[Tensor, ""]:
        """The expected share of gates that are not 0."""
        chance = torch.sigmoid(self.alpha - TEMPERATURE * math.log(-LOWEST / HIGHEST))
        return chance[self.there].mean()

    def descend(self, missed: Float[Tensor, ""]) -> None:
        """One step of Adam on what the drawn gates miss and the penalty, and one of the multipliers.

        Raises:
            InputError: a loss that is no finite number.
        """
        over = self.open - self.target
        loss = missed + self.multipliers[0] * over + self.multipliers[1] * over.square()
        if not bool(loss.isfinite()):
            raise InputError(
                "The metric is no finite number for some example, so no mask can be trained: leave such examples out, or take another metric."
            )
        grads = torch.autograd.grad(loss, [self.alpha, self.multipliers])
        for parameter, gradient in zip((self.alpha, self.multipliers), grads, strict=True):
            parameter.grad = gradient.to(parameter)
        self.optimiser.step()
        self.ascent.step()
