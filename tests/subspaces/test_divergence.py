"""Distances of patched from natural activations, against closed forms of Gaussians, and what standardising would hide."""

from __future__ import annotations

import math

import pytest
import torch

from circuitvision.errors import InputError
from circuitvision.subspaces.divergence import divergence, gaussian_wasserstein2, wasserstein2

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_a_shifted_gaussian_is_as_far_as_its_shift() -> None:
    shift, one = drawn(5), torch.eye(5, dtype=DOUBLE)
    assert gaussian_wasserstein2(torch.zeros(5, dtype=DOUBLE), one, shift, one) == pytest.approx(float(shift.norm()))
    points = drawn(60, 5, seed=1)
    assert wasserstein2(points, points + shift) == pytest.approx(float(shift.norm()))


@pytest.mark.parametrize(("r", "square"), [(0.0, 0.0), (0.5, 0.136), (0.9, 0.611), (0.99, 0.979)])
def test_patching_one_of_two_correlated_coordinates(r: float, square: float) -> None:
    """The pair (h₁, h₂) with correlation r becomes independent: W₂² = 4 − 2(√(1+r) + √(1−r))."""
    natural = torch.tensor([[1, r], [r, 1]], dtype=DOUBLE)
    zero = torch.zeros(2, dtype=DOUBLE)
    found = gaussian_wasserstein2(zero, torch.eye(2, dtype=DOUBLE), zero, natural) ** 2
    assert found == pytest.approx(4 - 2 * (math.sqrt(1 + r) + math.sqrt(1 - r)), abs=1e-9)
    assert found == pytest.approx(square, abs=1e-3)


def test_patched_samples_come_to_the_closed_form() -> None:
    r, count = 0.9, 400
    pairs = drawn(2, count, 2) @ torch.linalg.cholesky(torch.tensor([[1, r], [r, 1]], dtype=DOUBLE)).T
    patched = torch.stack([pairs[0, :, 0], pairs[1, :, 1]], 1)
    assert wasserstein2(patched, pairs[0]) ** 2 == pytest.approx(0.611, abs=0.2)


def test_sets_of_other_sizes_are_refused() -> None:
    with pytest.raises(InputError):
        wasserstein2(drawn(3, 2), drawn(4, 2))


def test_natural_activations_do_not_diverge_and_shifted_ones_do() -> None:
    natural, labels = drawn(200, 3), ["a"] * 100 + ["b"] * 100
    natural[100:] += 3
    again = drawn(50, 3, seed=4)
    assert divergence(again, ["a"] * 50, natural, labels) == pytest.approx(1.0, abs=0.35)
    assert divergence(again + 3, ["a"] * 50, natural, labels) > 3
    assert divergence(again + 3, ["b"] * 50, natural, labels) == pytest.approx(1.0, abs=0.35)
    assert math.isnan(divergence(again, ["c"] * 50, natural, labels))


def test_a_shift_of_the_mean_is_seen_and_the_scale_of_coordinates_is_not() -> None:
    natural, labels = drawn(200, 3), ["a"] * 200
    moved = drawn(60, 3, seed=2) + torch.tensor([4.0, 0, 0], dtype=DOUBLE)
    found = divergence(moved, ["a"] * 60, natural, labels)
    stretch = torch.tensor([1.0, 100.0, 0.01], dtype=DOUBLE)
    assert found > 3
    assert divergence(moved * stretch, ["a"] * 60, natural * stretch, labels) == pytest.approx(found, rel=1e-6)


def test_coordinates_are_scaled_by_natural_deviations() -> None:
    """One coordinate that varies a hundred times as much as it naturally does is far off, though by its own deviation it would be 1."""
    natural = drawn(200, 2)
    wide = drawn(60, 2, seed=3) * torch.tensor([1.0, 100.0], dtype=DOUBLE)
    assert divergence(wide, ["a"] * 60, natural, ["a"] * 200) > 50
