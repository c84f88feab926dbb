"""Invertible maps in which coordinates are interchanged: what declares how much a search for a subspace may bend.

With an invertible ``φ`` the interchange of the first ``k`` coordinates is ``h' = φ⁻¹(φ(h_b) with the first k of φ(h_s))``; for an orthogonal ``φ`` it
is that of a subspace. With unrestricted maps any network realises any algorithm (the non-linear representation dilemma, NeurIPS 2025), so the
result of one says something only beside the same class fitted where there is nothing to find; :class:`circuitvision.subspaces.DAS` refuses it
without.

Not covered: maps that are not volume preserving.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError
from circuitvision.subspaces.fitting import OrthonormalBasis


class CouplingMap(nn.Module):
    """Additive coupling layers (Dinh et al. 2014, arXiv 1410.8516) behind a rotation: ``y₁ = x₁ + f(x₂)``, the halves in turn, ``f`` an MLP."""

    def __init__(self, d: int, layers: int = 4, hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.n_first = d // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rotation = OrthonormalBasis(d, d, seed)
            sizes = [(self.n_first, d - self.n_first), (d - self.n_first, self.n_first)]
            self.steps = nn.ModuleList(
                nn.Sequential(nn.Linear(sizes[n % 2][0], hidden), nn.ReLU(), nn.Linear(hidden, sizes[n % 2][1]))
                for n in range(layers)
            )

    def forward(self, x: Float[Tensor, "entry d"]) -> Float[Tensor, "entry d"]:
        """``φ(x)``."""
        x = x @ self.rotation.weight
        one, two = x[:, : self.n_first], x[:, self.n_first :]
        for number, step in enumerate(self.steps):
            one, two = (one, two + step(one)) if number % 2 == 0 else (one + step(two), two)
        return torch.cat([one, two], 1)

    def inverse(self, y: Float[Tensor, "entry d"]) -> Float[Tensor, "entry d"]:
        """``φ⁻¹(y)``."""
        one, two = y[:, : self.n_first], y[:, self.n_first :]
        for number in reversed(range(len(self.steps))):
            step = self.steps[number]
            one, two = (one, two - step(one)) if number % 2 == 0 else (one - step(two), two)
        return torch.cat([one, two], 1) @ self.rotation.weight.T


def check_invertible(map: nn.Module, x: Float[Tensor, "entry d"]) -> None:
    """Raise InputError for a map of another width, without ``inverse``, or whose ``inverse`` does not bring entries back."""
    try:
        with torch.no_grad():
            back = map.inverse(map(x))  # type: ignore[operator]
            close = back.shape == x.shape and float((back - x).norm()) <= 1e-3 * float(x.norm())
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"map= makes no invertible map of {x.shape[1]} coordinates ({error}).") from error
    if not close:
        raise InputError("map= makes no invertible map: its inverse(forward(x)) is not x.")


def interchanged_by(
    map: nn.Module, base: Float[Tensor, "entry d"], source: Float[Tensor, "entry d"], k: int
) -> Float[Tensor, "entry d"]:
    """``φ⁻¹`` of the base's coordinates with the first ``k`` of the source's."""
    own, other = map(base), map(source)
    return map.inverse(torch.cat([other[:, :k], own[:, k:]], 1))  # type: ignore[operator]
