"""Shared fixtures: determinism, one thread, the zoo's models and folders, the CUDA marker, and a check that tests leave nothing behind.

Tests run in any order. What a test could leave for the next one is in :func:`world`; a test that changes it fails, and a module that changes it
when it is imported ends the session. Warning filters are not in it: pytest gives every test its own.
"""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Set before anything imports huggingface_hub: a test that asks for a download must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from torch import nn

from circuitvision import progress
from circuitvision.model import attention, spec
from circuitvision.model.spec import FAMILIES, NORMS, STACKS, load_tables
from tests.zoo import Case, saved_folder, shared_model
from tests.zoo.registry import BUILT, fingerprint

# How long a draw takes says something of the machine, not of the code.
settings.register_profile("circuitvision", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("circuitvision")


def pytest_configure(config: pytest.Config) -> None:
    # Tiny tensors: more threads cost more than they compute.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


_OF_LIBRARIES = ("PYTEST_", "TORCH", "_TORCH", "TRITON", "KMP_", "CUDA_")
"""Starts of the names of variables that libraries set for themselves when they are first used."""


def world() -> dict[str, Any]:
    """Everything outside a test that a test could change, by name."""
    logging = transformers.utils.logging
    plotly: Any = sys.modules.get("plotly.io")
    return {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
        "progress bars": progress._state["level"],
        "logging of transformers": (logging.get_verbosity(), logging.is_progress_bar_enabled()),
        "families": {**FAMILIES},
        "stacks": {**STACKS},
        "norms": {**NORMS},
        "attention under hooks": {
            name: bool(getattr(attention, name, None)) for name in ("_TAPS", "_ACTIVE", "_SWITCHED")
        },
        "environment": {name: value for name, value in os.environ.items() if not name.startswith(_OF_LIBRARIES)},
        "working directory": os.getcwd(),
        "floating-point errors of numpy": np.geterr(),
        "template of plotly": plotly and plotly.templates.default,
        "shared models": [name for name, (model, built) in BUILT.items() if fingerprint(model) != built],
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, named; a thing that was not loaded before is no change."""
    return [name for name, value in before.items() if value is not None and value != after[name]]


def pytest_sessionstart(session: pytest.Session) -> None:
    load_tables()
    session.config.stash[_WORLD] = world()


def pytest_collection_finish(session: pytest.Session) -> None:
    found = changes(session.config.stash[_WORLD], world())
    if found:
        raise pytest.UsageError(f"Importing the tests changed: {', '.join(found)}. Change it inside a test, and back.")


_WORLD = pytest.StashKey[dict[str, Any]]()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = world()
    yield
    found = changes(before, world())
    if found:
        pytest.fail(f"The test changed, and did not change back: {', '.join(found)}.", pytrace=False)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families, stacks and norms that a test registers are gone afterwards."""
    spec.load_tables()
    for name in ("FAMILIES", "STACKS", "NORMS"):
        monkeypatch.setattr(spec, name, dict(getattr(spec, name)))


@pytest.fixture
def fresh_model() -> Callable[[Case], nn.Module]:
    """A copy of a case's model that the test may change."""
    return lambda case: copy.deepcopy(shared_model(case.name))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The folder a case's model and processor were saved to, one per session."""
    return lambda case: saved_folder(case, tmp_path_factory)
