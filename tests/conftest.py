"""Shared fixtures: determinism, one thread, the zoo's models and folders, and the CUDA marker."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path

# Set before anything imports huggingface_hub: a test that asks for a download must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from torch import nn

from tests.zoo import Case, saved_folder, shared_model

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


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def fresh_model() -> Callable[[Case], nn.Module]:
    """A copy of a case's model that the test may change."""
    return lambda case: copy.deepcopy(shared_model(case.name))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The folder a case's model and processor were saved to, one per session."""
    return lambda case: saved_folder(case, tmp_path_factory)
