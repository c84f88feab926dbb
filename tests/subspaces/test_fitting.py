"""Training of bases against closed forms: the best direction of a linear effect, orthonormality, and a planted number of dimensions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from circuitvision.errors import InputError
from circuitvision.subspaces import fit_basis, fit_boundless, random_basis
from circuitvision.subspaces.fitting import hardened, train

DOUBLE = torch.float64


def linear(d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, d, generator=generator, dtype=DOUBLE))  # type: ignore[return-value]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_linear_effect_is_maximised_in_closed_form(k: int, seed: int) -> None:
    a, g = linear(12, seed)
    bound = (a @ g + a.norm() * g.norm()) / 2
    found = fit_basis(
        lambda basis, _: -(a @ basis) @ (basis.T @ g), 12, k, steps=200, rate=0.1, seed=seed, dtype=DOUBLE
    )
    assert float(-found.loss[-1]) == pytest.approx(float(bound), abs=1e-6)
    best = a / a.norm() + g / g.norm()
    inside = found.basis.T @ (best / best.norm())
    assert float(inside.norm()) == pytest.approx(1.0, abs=1e-6)
    assert float((found.basis.T @ found.basis - torch.eye(k, dtype=DOUBLE)).abs().max()) < 1e-6


def test_training_in_float32_keeps_columns_orthonormal() -> None:
    a, g = (one.float() for one in linear(64, 0))
    found = fit_basis(lambda basis, _: -(a @ basis) @ (basis.T @ g), 64, 4, steps=200)
    assert float((found.basis.T @ found.basis - torch.eye(4)).abs().max()) < 1e-6


def test_seeds_decide_the_start() -> None:
    a, g = linear(8, 0)

    def objective(basis: torch.Tensor, step: int) -> torch.Tensor:
        return -(a @ basis) @ (basis.T @ g)

    one, two, other = (fit_basis(objective, 8, 1, steps=3, seed=seed, dtype=DOUBLE).basis for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("planted", [1, 3, 5])
def test_the_boundary_recovers_a_planted_number_of_dimensions(planted: int) -> None:
    """The answer is read from a planted subspace and from the rest, which must stay the base's."""
    d = 8
    inside = random_basis(d, planted, seed=7)
    base, source = torch.randn(2, 64, d, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def objective(basis: torch.Tensor, mask: torch.Tensor, step: int) -> torch.Tensor:
        values = base + (((source - base) @ basis) * mask) @ basis.T
        moved = (values - source) @ inside
        kept = (values - base) - (values - base) @ inside @ inside.T
        return moved.square().mean() + kept.square().mean()

    found = fit_boundless(objective, d, steps=150, rate=0.1, boundary_rate=0.02, penalty=0.01, dtype=DOUBLE)
    assert found.k == planted
    overlap = torch.linalg.svdvals(found.columns.T @ inside)
    assert float(overlap.min()) > 0.99


def test_a_hardened_mask_holds_nothing_but_0_and_1() -> None:
    for boundary in (1e-3, 0.3, 0.5, 1.0):
        mask = hardened(10, boundary)
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert mask[0] == 1.0
    assert hardened(10, 0.3).sum() == 3
    assert hardened(10, 1.0).sum() == 10


@pytest.mark.parametrize("fit", [fit_basis, fit_boundless])
def test_no_other_parameter_gets_a_gradient(fit: Any) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    fit(lambda basis, *rest: (basis.T @ weight @ basis).trace(), 6, 2, steps=2)
    assert weight.grad is None
    assert weight.requires_grad


def test_objectives_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(InputError):
        fit_basis(lambda basis, _: torch.zeros(()), 4, 1, steps=1)
    with pytest.raises(InputError):
        fit_basis(lambda basis, _: basis.sum(0), 4, 1, steps=1)
    with pytest.raises(InputError):
        fit_basis(lambda basis, _: basis.sum(), 4, 5, steps=1)
    with pytest.raises(InputError):
        fit_basis(lambda basis, _: basis.sum(), 4, 1, steps=0)


def test_the_rate_falls_linearly_to_0() -> None:
    """The oracle: Adam by hand, one number whose gradient keeps its sign, so that every step is as long as its rate."""
    held = torch.nn.Linear(1, 1, bias=False, dtype=DOUBLE)
    places: list[float] = []
    train(held, lambda _: held.weight.sum(), 4, 0.1, after=lambda *_: places.append(float(held.weight.detach())))
    lengths = [one - other for one, other in itertools.pairwise(places)]
    assert lengths == pytest.approx([0.075, 0.05, 0.025], rel=1e-6)
