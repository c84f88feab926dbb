"""Attention of inputs that are run, and of caches that do not belong to the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout import (
    attention_entropy,
    attention_maps,
    attention_mass,
    distance_profile,
    position_pattern,
    rollout,
)
from tests.zoo import case, shared_model


def of(name: str) -> tuple[cv.HookedModel, dict[str, Any], cv.ActivationCache]:
    model = cv.HookedModel(shared_model(name))
    inputs = case(name).inputs(model.module, batch=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="**.hook_pattern")
    return model, inputs, cache


@pytest.mark.parametrize("name", ["vit", "siglip", "llava-clip-llama", "pi0"])
@pytest.mark.filterwarnings("ignore:.*NaN")
def test_inputs_give_what_their_cache_gives(name: str) -> None:
    model, inputs, cache = of(name)
    reads: list[Any] = [attention_mass, attention_entropy, attention_maps]
    for tower in (None, *model.towers):
        for read in reads:
            from_run, from_cache = (read(model, one, tower=tower) for one in (inputs, cache))
            assert torch.equal(from_run.values.nan_to_num(-1), from_cache.values.nan_to_num(-1))
            assert from_run.axes == from_cache.axes
    for read in (distance_profile, position_pattern, rollout):
        assert torch.equal(
            read(model, inputs, tower="vision").values.nan_to_num(-1),
            read(model, cache, tower="vision").values.nan_to_num(-1),
        )


def test_a_map_of_tokens_says_the_tower_that_is_run() -> None:
    model, inputs, _ = of("llava-clip-llama")
    tokens = model.tokens(inputs)
    for read in (attention_mass, attention_maps):
        assert read(model, inputs, tokens["vision"]).tower == "vision"  # type: ignore[operator]


def test_the_pool_of_a_tower_is_read_from_inputs() -> None:
    model, inputs, cache = of("siglip")
    pooled = [attention_mass(model, one, tower="vision", layers="pool").values for one in (inputs, cache)]
    assert torch.equal(*pooled)


def test_what_is_no_run_of_this_model_is_refused() -> None:
    model, inputs, cache = of("vit")
    other = of("dinov2")[0]
    with pytest.raises(InputError, match="another model"):
        attention_mass(other, cache)
    with pytest.raises(InputError, match="wrapped model"):
        attention_mass(cache, model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batches"):
        attention_mass(model, cv.data.Side(inputs=inputs))  # type: ignore[arg-type]
