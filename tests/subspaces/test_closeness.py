"""Closeness to natural activations on the fixtures: it brings the faithful relay nearer at no cost, and cannot save the MLP in the middle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from circuitvision.subspaces import fit_basis, interchanged
from circuitvision.subspaces.divergence import divergence
from circuitvision.subspaces.training import apart
from tests.subspaces.test_illusion import DOUBLE, N, drawn

Fixture = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, Callable[[torch.Tensor, slice], torch.Tensor]]
NOISE = 0.3
TRAIN, HELD = slice(0, N // 2), slice(N // 2, N)


def values() -> list[torch.Tensor]:
    """A feature of two values, of base and source."""
    return [torch.where(drawn(N, seed=seed) > 0, 1.0, -1.0).double() for seed in (0, 1)]


def relay(d: int = 12) -> Fixture:
    """Fixture 3: the MLP passes the feature on."""
    u, into = torch.eye(4, dtype=DOUBLE)[0], drawn(4, d, seed=5)
    relayed = into.T @ u
    x = values()
    stream = [one[:, None] * u + NOISE * drawn(N, 4, seed=n + 10) for n, one in enumerate(x)]
    base, source = (one @ into for one in stream)
    return x, base, source, lambda h, rows: stream[0][rows] @ u + h @ relayed / relayed.norm()


def middle() -> Fixture:
    """Fixture 2: the second neuron is always 0, and the MLP mediates nothing."""
    x = values()
    stream = [one + NOISE * drawn(N, seed=n + 10) for n, one in enumerate(x)]
    base, source = (torch.stack([one, torch.zeros(N, dtype=DOUBLE)], 1) for one in stream)
    return x, base, source, lambda h, rows: stream[0][rows] + 2 * h[:, 1]


def trained(fixture: Fixture, k: int, weight: float) -> tuple[float, float]:
    """Held-out interchange accuracy and divergence of a subspace trained with this closeness."""
    x, base, source, output = fixture
    natural, said = torch.cat([base, source]), torch.cat(x) > 0
    means = torch.where(x[1][:, None] > 0, natural[said].mean(0), natural[~said].mean(0))

    def objective(basis: torch.Tensor, step: int) -> torch.Tensor:
        own = base[TRAIN] + ((source - base)[TRAIN] @ basis) @ basis.T
        wrong = torch.nn.functional.softplus(-2 * output(own, TRAIN) * x[1][TRAIN]).mean()
        return wrong + weight * apart(source[TRAIN], means[TRAIN], basis)

    fitted = fit_basis(objective, base.shape[1], k, steps=150, rate=0.05, dtype=DOUBLE)
    patched = interchanged(base, source, fitted.basis)[HELD]
    accuracy = (output(patched, HELD).sign() == x[1][HELD]).double().mean()
    return float(accuracy), divergence(patched, (x[1][HELD] > 0).tolist(), natural, said.tolist())


def test_in_the_faithful_relay_divergence_falls_and_accuracy_stays() -> None:
    """Of two dimensions, of which one is free; where the one that is needed is all there is, nothing can fall."""
    (free, far), (near, closer) = (trained(relay(), 2, weight) for weight in (0.0, 0.1))
    assert free > 0.95
    assert near > free - 0.02
    assert closer < 0.8 * far
    (one, alone), (other, beside) = (trained(relay(), 1, weight) for weight in (0.0, 0.1))
    assert other == pytest.approx(one, abs=0.02)
    assert beside == pytest.approx(alone, rel=0.05)


def test_too_much_closeness_leaves_the_base_run_where_it_is() -> None:
    """The span then holds nothing that varies: what is written is natural of the base's value, and far from the target's."""
    accuracy, far = trained(relay(), 1, 10.0)
    assert accuracy < 0.55
    assert far > 3


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0, 10.0, 100.0, 1000.0])
def test_in_the_middle_mlp_no_closeness_gives_accuracy_and_natural_activations(weight: float) -> None:
    accuracy, far = trained(middle(), 1, weight)
    assert accuracy < 0.6 or far > 3
    assert (accuracy > 0.9) == (weight <= 10)
