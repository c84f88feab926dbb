"""Training an orthonormal basis, and with it how many of its columns are needed, by any objective.

The basis is the weight of ``torch.nn.utils.parametrizations.orthogonal``, so it is orthonormal at every step; Adam, its rate decayed linearly to 0.
What is minimised is a function of the basis alone: :class:`circuitvision.subspaces.DAS` gives the loss of a model's runs under interchange, tests
give closed forms.

*Boundless*: a basis of ``K`` columns, of which the first ``b K`` count. Column ``i`` is swapped with weight ``m_i = σ((b K − i − ½) / T)``; ``T`` is
annealed and ``b`` learned under a penalty. pyvene's mask has a second factor ``σ(i / T)`` that leaves column 0 half swapped at every temperature;
there is none here, and what is reported is always the hardened mask, ``m_i = [i + ½ < b K]``.

Sources: Geiger et al. 2023 (arXiv 2303.02536); Wu et al. 2023 (arXiv 2305.08809).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from circuitvision.errors import InputError, checked_seed

Report = Callable[[int, float, Tensor], None]
"""Called after each step with its number, its loss, and the basis then."""
SMALLEST = 1e-3
"""The smallest boundary, as a share of the columns."""


@dataclass(frozen=True)
class FittedBasis:
    """A trained basis ``[d k]``, orthonormal columns, with the loss of every step; of a boundless one all columns and the boundary."""

    basis: Float[Tensor, "d k"]
    loss: Float[Tensor, " step"]
    boundary: Float[Tensor, " step"] | None = None

    @property
    def k(self) -> int:
        """How many columns count: of a boundless basis those before the hardened boundary."""
        if self.boundary is None:
            return self.basis.shape[1]
        return int(hardened(self.basis.shape[1], float(self.boundary[-1])).sum())

    @property
    def columns(self) -> Float[Tensor, "d k"]:
        """The columns that count."""
        return self.basis[:, : self.k]


class OrthonormalBasis(nn.Module):
    """A weight ``[d k]`` with orthonormal columns."""

    weight: Tensor

    def __init__(self, d: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> None:
        super().__init__()
        if not 1 <= k <= d:
            raise InputError(f"A subspace of {d} coordinates has 1 to {d} dimensions, not {k}.")
        generator = torch.Generator().manual_seed(checked_seed(seed))
        start = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
        self.weight = nn.Parameter(start.to(dtype))
        with torch.random.fork_rng(devices=[]):
            # The parametrisation draws the complement of its columns.
            torch.manual_seed(seed)
            orthogonal(self, "weight")
        self.to(device)


def fit_basis(
    objective: Callable[[Tensor, int], Tensor],
    d: int,
    k: int,
    *,
    steps: int = 300,
    rate: float = 0.01,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    report: Report | None = None,
) -> FittedBasis:
    """Minimise ``objective(basis, step)`` over orthonormal bases ``[d k]``.

    Raises:
        InputError: more dimensions than coordinates, no steps, an objective that is no number or does not depend on the basis.
    """
    return _fit(OrthonormalBasis(d, k, seed, dtype, device), objective, steps, rate, report)


def _fit(
    held: OrthonormalBasis, objective: Callable[[Tensor, int], Tensor], steps: int, rate: float, report: Report | None
) -> FittedBasis:
    losses = []
    with torch.enable_grad():
        optimizer, decay = _optimizer(held, steps, rate)
        for step in range(steps):
            losses.append(stepped(optimizer, objective(held.weight, step)))
            decay.step()
            if report is not None:
                report(step, losses[-1], held.weight.detach())
    return FittedBasis(held.weight.detach().clone(), torch.tensor(losses, dtype=torch.float64))


def fit_boundless(
    objective: Callable[[Tensor, Tensor, int], Tensor],
    d: int,
    columns: int | None = None,
    *,
    steps: int = 600,
    rate: float = 0.01,
    boundary_rate: float = 0.02,
    penalty: float = 0.1,
    temperature: tuple[float, float] = (50.0, 0.1),
    start: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    report: Report | None = None,
) -> FittedBasis:
    """Minimise ``objective(basis, mask, step) + penalty · b`` over bases ``[d columns]`` and the boundary ``b``, see the module.

    ``temperature`` is annealed geometrically from the first to the second; ``start`` is the first boundary. Raises InputError as :func:`fit_basis`.
    """
    count = d if columns is None else columns
    held = OrthonormalBasis(d, count, seed, dtype, device)
    boundary = nn.Parameter(torch.tensor(float(start), dtype=dtype, device=device))
    losses, found = [], []
    with torch.enable_grad():
        optimizer, decay = _optimizer(held, steps, rate, {"params": [boundary], "lr": boundary_rate})
        for step in range(steps):
            heat = temperature[0] * (temperature[1] / temperature[0]) ** (step / max(steps - 1, 1))
            share = boundary.clamp(SMALLEST, 1.0)
            places = torch.arange(count, dtype=dtype, device=boundary.device) + 0.5
            mask = torch.sigmoid((share * count - places) / heat)
            losses.append(stepped(optimizer, objective(held.weight, mask, step) + penalty * share))
            with torch.no_grad():
                boundary.clamp_(SMALLEST, 1.0)
            decay.step()
            found.append(float(boundary.detach()))
            if report is not None:
                report(step, losses[-1], held.weight.detach()[:, : int(hardened(count, found[-1]).sum())])
    return FittedBasis(
        held.weight.detach().clone(),
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(found, dtype=torch.float64),
    )


def hardened(columns: int, boundary: float) -> Float[Tensor, " column"]:
    """The mask of 0 and 1 of a boundary: column ``i`` counts if ``i + ½ < b K``; the first always does."""
    mask = (torch.arange(columns) + 0.5 < boundary * columns).double()
    mask[0] = 1.0
    return mask


def _optimizer(
    held: nn.Module, steps: int, rate: float, *others: dict[str, Any]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Adam over all parameters, with the rate decayed linearly to 0; other groups keep theirs."""
    if steps < 1 or not (rate > 0 and math.isfinite(rate)):
        raise InputError(f"Training takes at least one step and a rate above 0, not {steps} and {rate}.")
    optimizer = torch.optim.Adam([{"params": list(held.parameters())}, *others], lr=rate)
    falling = [lambda step: max(1.0 - step / steps, 0.0), *[lambda _: 1.0] * len(others)]
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)
    return optimizer, decay


def stepped(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One step of what is trained. Weights of a model that the loss came through get no gradient.

    Raises:
        InputError: a loss that is no number or does not depend on what is trained.
    """
    if loss.ndim:
        raise InputError(f"The objective is one number, not {tuple(loss.shape)}: take the mean over examples.")
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else []
    if all(gradient is None for gradient in found):
        raise InputError("The objective does not depend on the basis, so there is nothing to train.")
    for parameter, gradient in zip(trained, found, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return float(loss.detach())
