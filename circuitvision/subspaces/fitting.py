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
from circuitvision.subspaces.kept import KeptRun

Report = Callable[[int, float, Tensor], None]
"""Called after each step with its number, its loss, and the basis then."""
SMALLEST = 1e-3
"""The smallest boundary, as a share of the columns."""
_MODULE, _ADAM, _LOSS, _RECORDS = "module.", "adam.", "loss", "records"


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
    kept: KeptRun | None = None,
) -> FittedBasis:
    """Minimise ``objective(basis, step)`` over orthonormal bases ``[d k]``; ``kept`` is where its state is kept and continued from.

    Raises:
        InputError: more dimensions than coordinates, no steps, an objective that is no number or does not depend on the basis.
    """
    held = OrthonormalBasis(d, k, seed, dtype, device)

    def after(step: int, loss: float) -> None:
        if report is not None:
            report(step, loss, held.weight.detach())

    losses = train(held, lambda step: objective(held.weight, step), steps, rate, after=after, kept=kept)
    return FittedBasis(held.weight.detach().clone(), torch.tensor(losses, dtype=torch.float64))


class _Bounded(nn.Module):
    """A basis and how many of its columns count."""

    def __init__(self, basis: OrthonormalBasis, start: float, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.basis = basis
        self.boundary = nn.Parameter(torch.tensor(float(start), dtype=dtype, device=device))


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
    kept: KeptRun | None = None,
) -> FittedBasis:
    """Minimise ``objective(basis, mask, step) + penalty · b`` over bases ``[d columns]`` and the boundary ``b``, see the module.

    ``temperature`` is annealed geometrically from the first to the second; ``start`` is the first boundary. Raises InputError as :func:`fit_basis`.
    """
    count = d if columns is None else columns
    held = _Bounded(OrthonormalBasis(d, count, seed, dtype, device), start, dtype, device)
    boundary, found = held.boundary, Records()

    def loss(step: int) -> Tensor:
        heat = temperature[0] * (temperature[1] / temperature[0]) ** (step / max(steps - 1, 1))
        share = boundary.clamp(SMALLEST, 1.0)
        places = torch.arange(count, dtype=dtype, device=boundary.device) + 0.5
        mask = torch.sigmoid((share * count - places) / heat)
        return objective(held.basis.weight, mask, step) + penalty * share

    def after(step: int, value: float) -> None:
        with torch.no_grad():
            boundary.clamp_(SMALLEST, 1.0)
        found.append(float(boundary.detach()))
        if report is not None:
            report(step, value, held.basis.weight.detach()[:, : int(hardened(count, found[-1]).sum())])

    groups: list[dict[str, Any]] = [
        {"params": list(held.basis.parameters())},
        {"params": [boundary], "lr": boundary_rate},
    ]
    losses = train(held, loss, steps, rate, groups=groups, after=after, kept=kept, records=found)
    return FittedBasis(
        held.basis.weight.detach().clone(),
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(found, dtype=torch.float64),
    )


def hardened(columns: int, boundary: float) -> Float[Tensor, " column"]:
    """The mask of 0 and 1 of a boundary: column ``i`` counts if ``i + ½ < b K``; the first always does."""
    mask = (torch.arange(columns) + 0.5 < boundary * columns).double()
    mask[0] = 1.0
    return mask


class Records(list[float]):
    """A number of every step, which is kept with the state of a training run."""


def train(
    held: nn.Module,
    objective: Callable[[int], Tensor],
    steps: int,
    rate: float,
    *,
    groups: list[dict[str, Any]] | None = None,
    after: Callable[[int, float], None] | None = None,
    kept: KeptRun | None = None,
    records: Records | None = None,
) -> list[float]:
    """Minimise ``objective(step)`` by Adam over a module's parameters, with the rate decayed linearly to 0, and return the loss of every step.

    ``groups`` are parameter groups in place of one, of which the first decays. ``after(step, loss)`` is called behind every step. What ``kept``
    holds is continued.
    """
    if steps < 1 or not (rate > 0 and math.isfinite(rate)):
        raise InputError(f"Training takes at least one step and a rate above 0, not {steps} and {rate}.")
    optimizer = torch.optim.Adam(groups or [{"params": list(held.parameters())}], lr=rate)
    losses, own = Records(), [] if records is None else records
    kept = kept or KeptRun()
    first = _continued(kept, held, optimizer, losses, own)
    with torch.enable_grad():
        for step in range(first, steps):
            optimizer.param_groups[0]["lr"] = rate * (1.0 - step / steps)
            losses.append(_step(optimizer, objective(step)))
            if not math.isfinite(losses[-1]):
                raise InputError(
                    f"The loss is {losses[-1]} in step {step}: lower the rate, or look at what is compared."
                )
            if after is not None:
                after(step, losses[-1])
            if kept.path is not None and ((step + 1) % kept.every == 0 or step + 1 == steps):
                kept.write(_state(held, optimizer, losses, own), step + 1)
    return losses


def _state(
    held: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float], records: list[float]
) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    found = {f"{_MODULE}{name}": value for name, value in held.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        found |= {f"{_ADAM}{number}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    return found | {
        _LOSS: torch.tensor(losses, dtype=torch.float64),
        _RECORDS: torch.tensor(records, dtype=torch.float64),
    }


def _continued(
    kept: KeptRun, held: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float], records: list[float]
) -> int:
    """Put what was kept into its place; how many steps are done."""
    there = kept.read()
    if there is None:
        return 0
    tensors, step = there
    held.load_state_dict(
        {name.removeprefix(_MODULE): value for name, value in tensors.items() if name.startswith(_MODULE)}
    )
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_ADAM):
            number, _, slot = name.removeprefix(_ADAM).partition(".")
            slots.setdefault(int(number), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    losses += tensors[_LOSS].tolist()
    records += tensors[_RECORDS].tolist()
    return step


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One step of what is trained; weights of a model that the loss came through get no gradient."""
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
