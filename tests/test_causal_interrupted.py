"""Ctrl-C in the middle of every long causal method: nothing is left hooked, and a folder continues with the numbers of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from tests.causal_methods import METHODS, SUBSPACES, Asked, setting, unchanged

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDERS = [name for name in METHODS if name not in SUBSPACES and name != "attribution_patch"]
"""The methods that take ``save_to``."""
METRIC = cv.metrics.logit_diff(3, 11)


def run(method: str, patch: pytest.MonkeyPatch, stop_at: int = 0, **more: Any) -> tuple[Any, int]:
    """A method's result and how often a metric was read; at one of these times Ctrl-C is pressed (0: never)."""
    model, pairs = setting()
    evaluate, calls = cv.metrics.registry.evaluate, []

    def interrupting(metric: Any, logits: Tensor, inputs: Any = None) -> Tensor:
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return evaluate(metric, logits, inputs)

    with patch.context() as patched:
        patched.setattr(cv.metrics, "evaluate", interrupting)
        found = METHODS[method](Asked(model, pairs, METRIC, allow_wrong=True, more=more))
    return found, len(calls)


@pytest.mark.parametrize("method", FOLDERS)
def test_what_was_measured_is_kept_and_the_rest_is_measured(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = run(method, monkeypatch)
    with unchanged(setting()[0]), pytest.raises(KeyboardInterrupt):
        run(method, monkeypatch, 1 + calls // 2, save_to=tmp_path / "kept")
    with unchanged(setting()[0]):
        again, rest = run(method, monkeypatch, save_to=tmp_path / "kept", resume=True)
    assert torch.equal(again.values, whole.values)
    assert rest < calls
    assert run(method, monkeypatch, save_to=tmp_path / "kept", resume=True)[1] <= 6


@pytest.mark.parametrize("method", ["attribution_patch", *SUBSPACES])
@pytest.mark.parametrize("place", ["while both sides are read", "in the middle"])
def test_without_a_folder_nothing_is_left_behind(method: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = setting()
    _, calls = run(method, monkeypatch)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        run(method, monkeypatch, 2 if place.startswith("while") else 1 + 2 * calls // 3)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    found, again = run(method, monkeypatch)
    assert again == calls
    assert bool(torch.isfinite(found.values).any())
