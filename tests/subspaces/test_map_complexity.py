"""What a class of maps finds where nothing was learned: bent maps find any answer in any network, rotations do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.subspaces import DAS, CouplingMap, illusion_report, reinitialised
from circuitvision.subspaces.das import PERMUTED, REINITIALISED
from tests.subspaces.common import pairs_of

SITE = "vision.blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def shapes() -> Any:
    model = cv.organisms.load("shapes-vit")
    with cv.progress.verbosity("quiet"):
        return model, cv.organisms.pairs("shapes-vit", 240, seed=3).answered(model)


@pytest.mark.slow
def test_a_bent_map_makes_a_network_without_training_answer_and_is_not_selective(shapes: Any) -> None:
    model, pairs = shapes
    untrained = reinitialised(model, 7)
    search = DAS(16, SITE, positions=0, map=lambda d: CouplingMap(d, layers=4, hidden=64))
    found = search.fit(untrained, pairs, epochs=20, rate=0.01, control=True, allow_wrong=True, progress=False)
    assert found.accuracy() > 0.8
    assert found.selectivity < 0.1
    straight = DAS(16, SITE, positions=0).fit(untrained, pairs, epochs=20, rate=0.1, allow_wrong=True, progress=False)
    assert straight.accuracy() < 0.6


@pytest.mark.slow
def test_a_rotation_finds_in_a_trained_network_what_it_does_not_find_without_training(shapes: Any) -> None:
    """Shuffled answers are the stronger control: the source's activation holds the true ones, whatever a basis was trained for."""
    model, pairs = shapes
    found = DAS(4, SITE, positions=0).fit(model, pairs, epochs=8, rate=0.1, control=True, progress=False)
    control = dict(zip(found.controls, found.control.mean(-1).tolist(), strict=True))
    assert found.accuracy() > 0.95
    assert found.accuracy() - control[REINITIALISED] > 0.5
    assert control[PERMUTED] < 0.6
    assert found.selectivity > 0.4


class _NoInverse(nn.Linear):
    def __init__(self, d: int) -> None:
        super().__init__(d, d)


class _WrongInverse(_NoInverse):
    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y


@pytest.mark.parametrize("made", [_NoInverse, _WrongInverse, lambda d: CouplingMap(d + 1)])
def test_a_map_that_is_not_invertible_is_refused_before_a_step(made: Any) -> None:
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    search = DAS(1, "vision.blocks.1.hook_resid_pre", positions=0, map=made)
    with pytest.raises(InputError, match="invertible"):
        search.fit(model, pairs, control=True, allow_wrong=True, progress=False)
    assert (model.engine.handles, model.engine.stack) == ([], [])


def test_a_bent_subspace_has_no_basis_to_report_on() -> None:
    model, pairs = pairs_of("vit", count=8, answers=[0] * 8, foils=[1] * 8)
    site, more = "vision.blocks.1.hook_resid_pre", {"allow_wrong": True, "progress": False}
    bent = DAS(1, site, positions=0, map=lambda d: CouplingMap(d, 2, 4)).fit(
        model, pairs, epochs=1, control=True, **more
    )
    with pytest.raises(InputError, match="no basis"):
        illusion_report(model, pairs, site, bent, positions=0, **more)
    straight = DAS(1, site, positions=0).fit(model, pairs, epochs=1, **more)
    with pytest.raises(InputError, match="trained at"):
        illusion_report(model, pairs, "vision.blocks.2.hook_resid_pre", straight, positions=0, **more)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rate": 0.0}, "rate"), ({"rate": float("nan")}, "rate"), ({"closeness": -1.0}, "closeness"), ({"seeds": []}, "seed"),
        ({"batch_size": 0}, "batch_size"), ({"epochs": 0}, "epochs"),
    ],
)  # fmt: skip
def test_training_that_cannot_be_meant_is_refused_before_a_run(options: Any, match: str) -> None:
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    runs = []
    handle = model.module.register_forward_hook(lambda *_: runs.append(1))
    try:
        with pytest.raises(InputError, match=match):
            DAS(1, "vision.blocks.1.hook_resid_pre", positions=0).fit(model, pairs, allow_wrong=True, **options)
    finally:
        handle.remove()
    assert not runs


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)

    def metric(output: torch.Tensor) -> torch.Tensor:
        return output[:, 0] * (float("nan") if output.requires_grad else 1.0)

    with pytest.raises(InputError, match="step 0"):
        DAS(1, "vision.blocks.1.hook_resid_pre", positions=0, metric=metric).fit(model, pairs, progress=False)
