"""The frozen runs of path patching: batches that do not fit in memory, progress, and which edits every cell was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from circuitvision.incremental.resume import Resumer
from circuitvision.patching import path_runs
from circuitvision.patching.path_runs import Arrivals
from tests.test_path_patch import models, patched

OPTIONS = {"senders": "vision.blocks.*.attn.hook_z", "receivers": ["vision L2.mlp", "output"], "through": "vision.blocks.1.hook_mlp_out"}  # fmt: skip
TOO_MUCH = [
    torch.OutOfMemoryError("not enough"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", TOO_MUCH, ids=["gpu", "cpu", "python"])
def test_batches_are_halved_when_memory_runs_out(error, monkeypatch):
    model, _, clean, corrupt = models("vit")
    monkeypatch.setattr(Arrivals, "_batch_size", lambda self: 8)
    whole = patched(model, clean, corrupt, **OPTIONS)
    sizes: list[int] = []
    run = Resumer.run

    def small(self: Resumer, route: Any, copies: int, first: int) -> Tensor:
        sizes.append(copies)
        if copies > 2:
            raise error
        return run(self, route, copies, first)

    monkeypatch.setattr(Resumer, "run", small)
    found = patched(model, clean, corrupt, **OPTIONS)
    assert sizes[:4] == [8, 4, 2, 2]
    torch.testing.assert_close(found.values, whole.values, atol=1e-10, rtol=1e-9)
    assert model.engine.handles == []


def test_one_frozen_run_that_does_not_fit_raises(monkeypatch):
    model, _, clean, corrupt = models("vit")

    def never(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(Resumer, "run", never)
    with pytest.raises(torch.OutOfMemoryError):
        patched(model, clean, corrupt, **OPTIONS)
    assert model.engine.handles == []


def test_frozen_runs_are_counted(monkeypatch):
    counted: list[tuple[int, bool, list[int]]] = []

    class Counting(path_runs.Progress):
        def __init__(self, total: int, description: str, shown: bool = True) -> None:
            super().__init__(total, description, shown)
            counted.append((total, shown, []))

        def advance(self, count: int = 1, measured: bool = True) -> None:
            counted[-1][2].append(count)

    monkeypatch.setattr(path_runs, "Progress", Counting)
    model, _, clean, corrupt = models("vit")
    found = patched(model, clean, corrupt, **OPTIONS)
    ((total, shown, steps),) = counted
    assert (total, shown) == (sum(steps), False)
    assert total == len(found.axes["sender"])


def test_the_edits_of_every_cell_are_kept():
    model, _, clean, corrupt = models("vit")
    found = patched(model, clean, corrupt, senders=["vision L0H0", "vision L1H1"], receivers=["vision L1H0", "vision L2H1.q", "output"])  # fmt: skip
    # A head of layer 1 has no path to another one of it.
    assert [[cell.isnan().any() for cell in row] for row in found.values] == [[False] * 3, [True, False, False]]
    sites = [sorted({edit.site for edit in group}) for group in found.edits]
    inputs = [f"vision.blocks.1.hook_{letter}_input" for letter in "kqv"]
    query = ["vision.blocks.2.hook_q_input"]
    assert sites[:2] == [inputs, query]
    assert sites[3] == query
    assert len(sites) == 5
    assert [edit.heads for edit in found.edits[1]] == [(1,)]
    assert found.edits[1] != found.edits[3]
