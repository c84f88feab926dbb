"""Read-outs call the model's modules for their arithmetic alone: hooks that are active must not see those calls."""

from __future__ import annotations

import torch

import circuitvision as cv
from tests.zoo import case, shared_model


def test_readout_inside_a_hook_context_fires_nothing() -> None:
    model = cv.HookedModel(shared_model("llava-clip-llama"))
    inputs = case("llava-clip-llama").inputs(model.module)
    _, cache = model.run_with_cache(inputs)
    resid = cache["language", "resid_post", -1]
    expected = model.language.readout(resid)
    seen = []
    with model.hooks([("language.ln_final.hook_normalized", lambda value, hook: seen.append(hook.name) or value * 2)]):
        assert torch.equal(model.language.readout(resid), expected)
        assert seen == []
        model(inputs)
    assert seen == ["language.ln_final.hook_normalized"]
