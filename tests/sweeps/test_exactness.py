"""A sweep equals one naive run per edit: random families, towers, edits, layers, heads, positions, batch sizes and padding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import circuitvision as cv
from tests.sweeps.drawing import metric, sweeps

SETTINGS = settings(
    deadline=None,
    derandomize=True,
    print_blob=False,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check(drawn: tuple[cv.HookedModel, Any, Any], tolerance: float, batch_size: Any = "auto") -> None:
    model, inputs, groups = drawn
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        naive = torch.stack([metric(model.run(inputs, group), inputs) for group in groups])
        swept = model.sweep(inputs, groups, metric, batch_size=batch_size, progress=False)
        clean = metric(model(inputs), inputs)
    assert not [plan for plan in swept.plan if plan.in_full and "changes the inputs" not in plan.reason], swept.plan
    assert model.engine.handles == []
    assert model.engine.stack == []
    assert_close(swept.values, naive, clean, tolerance, f"{groups}\n{swept.plan}")


def assert_close(found: Tensor, expected: Tensor, clean: Tensor, tolerance: float, what: str) -> None:
    """Equal up to rounding; where the model's own run is not a number, so is the sweep's."""
    assert torch.equal(found.isnan(), expected.isnan()), what
    scale = torch.maximum(expected.abs(), clean.abs()).nan_to_num(0.0).clamp_min(1.0)
    gap = ((found - expected).abs() / scale).nan_to_num(0.0)
    assert float(gap.max()) <= tolerance, f"differs by {float(gap.max()):.3g}: {what}"


@given(sweeps(torch.float64))
@settings(SETTINGS, max_examples=250)
def test_a_sweep_equals_the_naive_loop_in_float64(drawn: Any) -> None:
    check(drawn, 1e-11)


@given(sweeps(torch.float32))
@settings(SETTINGS, max_examples=120)
def test_a_sweep_equals_the_naive_loop_in_float32(drawn: Any) -> None:
    check(drawn, 1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    @given(sweeps(torch.float64))
    @settings(SETTINGS, max_examples=40)
    def inner(drawn: Any) -> None:
        check(drawn, 1e-11, batch_size)

    inner()


@pytest.mark.slow
@given(sweeps(torch.float64))
@settings(SETTINGS, max_examples=5000)
def test_a_sweep_equals_the_naive_loop_thoroughly(drawn: Any) -> None:
    check(drawn, 1e-11)
