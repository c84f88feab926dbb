"""`from_pretrained` on a saved folder of every case gives the model that was saved, with a processor that makes its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvision as cv
from tests.conformance.setting import bare_module, close, same
from tests.zoo import Case, loading_options, parametrize


@parametrize()
def test_a_saved_folder_is_the_model_that_was_saved(case: Case, folder_of: Callable[[Case], Path]) -> None:
    bare = copy.deepcopy(bare_module(case.name, torch.float32))
    model = cv.HookedModel.from_pretrained(folder_of(case), **loading_options(case))
    original = cv.HookedModel(bare)
    assert type(model.module) is type(bare)
    assert model.family is original.family
    assert model.sites() == original.sites()
    assert not model.module.training
    inputs = case.inputs(bare, batch=2)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, "**.hook_resid_post")
        expected, expected_cache = original.run_with_cache(inputs, "**.hook_resid_post")
    same(out, expected, "output of the loaded model")
    for name in cache:
        same(cache[name], expected_cache[name], name)


@parametrize()
def test_a_saved_folder_brings_its_processor(case: Case, folder_of: Callable[[Case], Path]) -> None:
    if case.processor is None or case.raw is None:
        pytest.skip("no processor can say an image token outside the vocabulary")
    model = cv.HookedModel.from_pretrained(folder_of(case))
    assert model.processor is not None
    raw = case.raw(batch=2)
    options: dict[str, Any] = {name: value for name, value in raw.items() if name not in ("images", "text")}
    if case.family == "pi0":
        options["state"] = torch.randn(2, model.config.max_state_dim)
    inputs = model.inputs(images=raw["images"], text=raw.get("text"), **options)
    with torch.no_grad():
        out = model(inputs)
    assert out.isfinite().all()
    if case.family != "pi0" and case.name != "siglip2":
        by_hand = dict(case.processor()(**raw, return_tensors="pt"))
        with torch.no_grad():
            close(out, model(by_hand), "inputs of the loaded processor and of the saved one")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_folder_loads_in_the_dtype_asked_for(dtype: torch.dtype, folder_of: Callable[[Case], Path]) -> None:
    from tests.zoo import CASES

    for name in ("vit", "llava-clip-llama", "pi0"):
        model = cv.HookedModel.from_pretrained(folder_of(CASES[name]), dtype=dtype)
        assert model.dtype == dtype
        inputs = CASES[name].inputs(model.module, batch=1, dtype=dtype)
        with torch.no_grad():
            out, cache = model.run_with_cache(inputs)
        assert out.isfinite().all()
        assert cache["vision", "resid_post", 0].dtype == dtype
