"""Tests run in any order: the check in ``conftest.py`` sees everything that one test could leave for the next."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import circuitvision as cv
from circuitvision.model.spec import FAMILIES
from tests.conftest import changes, world
from tests.zoo import shared_model

logging = transformers.utils.logging


LEFT: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "gradients": (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True), "gradients"),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32), "dtype"),
    "device": (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None), "device"),
    "threads": (lambda: torch.set_num_threads(2), lambda: torch.set_num_threads(1), "threads"),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
        "deterministic",
    ),
    "bars": (lambda: cv.set_verbosity("quiet"), lambda: cv.set_verbosity("normal"), "progress"),
    "notices": (logging.set_verbosity_info, logging.set_verbosity_error, "transformers"),
    "families": (lambda: FAMILIES.update(Mine=None), lambda: FAMILIES.pop("Mine"), "families"),
    "environment": (lambda: os.environ.update(MINE="1"), lambda: os.environ.pop("MINE"), "environment"),
    "numpy": (lambda: np.seterr(divide="ignore"), lambda: np.seterr(divide="warn"), "numpy"),
    "train": (lambda: shared_model("vit").train(), lambda: shared_model("vit").eval(), "shared models"),
    "frozen": (
        lambda: shared_model("vit").requires_grad_(False),
        lambda: shared_model("vit").requires_grad_(True),
        "shared models",
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_a_test_leaves_behind_is_seen(what: str) -> None:
    leave, undo, named = LEFT[what]
    shared_model("vit")
    before = world()
    assert changes(before, world()) == []
    leave()
    try:
        found = changes(before, world())
    finally:
        undo()
    assert len(found) == 1
    assert named in found[0]
    assert changes(before, world()) == []
