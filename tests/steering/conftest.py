"""Policies that the tests of steering share: the trained reach-pi0, and a tiny OpenVLA of random weights."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.data import reach
from tests.zoo import case


@pytest.fixture(scope="package")
def policy() -> cv.HookedModel:
    return cv.organisms.load("reach-pi0")


@pytest.fixture(scope="package")
def boards() -> reach.ReachScenes:
    return reach.sample_scenes(24, seed=1, split="test")


@pytest.fixture(scope="package")
def openvla() -> cv.HookedModel:
    model = cv.HookedModel(case("openvla").build().double())
    with torch.no_grad():
        # Larger weights of the head: actions of two pictures differ.
        model.module.language_model.lm_head.weight.mul_(8)
    return model
