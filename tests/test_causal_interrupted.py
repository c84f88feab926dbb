"""Ctrl-C in the middle of every long causal method: nothing is left hooked, and a folder continues with the numbers of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from tests.causal_methods import METHODS, SUBSPACES, Asked, counted, setting

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDERS = [name for name in METHODS if name not in SUBSPACES and name != "attribution_patch"]
"""The methods that take ``save_to``."""
CALLS = {"count": 0, "last": 0}


def interrupting(logits: Tensor, inputs: Any) -> Tensor:
    """A metric that is interrupted by Ctrl-C at one of its calls; 0 for never."""
    CALLS["count"] += 1
    if CALLS["count"] == CALLS["last"]:
        raise KeyboardInterrupt
    rows = cv.metrics.at_position(logits, "last", inputs)
    return rows[:, 3] - 2 * rows[:, 11]


def run(method: str, stop_at: int = 0, **more: Any) -> tuple[Any, int]:
    """A method's result and how often its metric was called."""
    model, pairs = setting()
    CALLS.update(count=0, last=stop_at)
    found = METHODS[method](Asked(model, pairs, interrupting, allow_wrong=True, more=more))
    return found, CALLS["count"]


@pytest.mark.parametrize("method", FOLDERS)
def test_what_was_measured_is_kept_and_the_rest_is_measured(method: str, tmp_path: Path) -> None:
    whole, calls = run(method)
    with counted(setting()[0]), pytest.raises(KeyboardInterrupt):
        run(method, 1 + calls // 2, save_to=tmp_path / "kept")
    with counted(setting()[0]):
        again, rest = run(method, save_to=tmp_path / "kept", resume=True)
    assert torch.equal(again.values, whole.values)
    assert rest <= calls * 3 // 4
    with counted(setting()[0]) as runs:
        run(method, save_to=tmp_path / "kept", resume=True)
    assert runs.count <= 8


@pytest.mark.parametrize("method", ["attribution_patch", *SUBSPACES])
@pytest.mark.parametrize("place", ["while both sides are read", "in the middle"])
def test_without_a_folder_nothing_is_left_behind(method: str, place: str) -> None:
    model, _ = setting()
    _, calls = run(method)
    with counted(model), pytest.raises(KeyboardInterrupt):
        run(method, 2 if place.startswith("while") else 1 + 2 * calls // 3)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    found, again = run(method)
    assert again == calls
    assert bool(torch.isfinite(found.values).any())
