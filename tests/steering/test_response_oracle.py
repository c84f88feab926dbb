"""The steering response against a loop over plain PyTorch hooks, and clean runs that give another answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.steering import Direction, steering_response
from tests.sweeps.drawing import model_of
from tests.zoo import CASES

SCALES = (-2.0, 0.0, 0.5, 3.0)


def steered_by_hand(module: torch.nn.Module, block: torch.nn.Module, inputs: Any, vector: torch.Tensor) -> torch.Tensor:
    def move(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = block.register_forward_hook(move)
    try:
        with torch.no_grad():
            logits = module(**inputs).logits
    finally:
        handle.remove()
    return logits[:, 2] - logits[:, 4]


def test_every_number_is_that_of_a_loop_over_plain_hooks() -> None:
    model = model_of("vit", torch.float64)
    inputs = CASES["vit"].inputs(model.module, batch=3, seed=5, dtype=torch.float64)
    vector = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = Direction.of(model, "vision.blocks.1.hook_resid_post", vector)
    asked = {"n_random": 2, "seed": 3, "progress": False}
    found = steering_response(model, inputs, direction, logit_diff(2, 4), SCALES, **asked)
    block = next(part for name, part in model.module.named_modules() if name.endswith(("layer.1", "layers.1")))
    clean = steered_by_hand(model.module, block, inputs, torch.zeros(24, dtype=torch.float64))
    torch.testing.assert_close(found.base, clean)
    for row, own in enumerate(found.vectors.double()):
        moved = torch.stack([steered_by_hand(model.module, block, inputs, scale * own) - clean for scale in SCALES])
        torch.testing.assert_close(found.values[row], moved, atol=1e-10, rtol=1e-8)
    away = torch.tensor(SCALES, dtype=torch.float64)
    means = found.values[0].mean(-1)
    line = torch.linalg.lstsq(torch.stack([away, torch.ones(4, dtype=torch.float64)], 1), means[:, None]).solution
    assert found.slope == pytest.approx(float(line[0]), rel=1e-9)
    assert not block._forward_hooks


def test_clean_runs_that_give_another_answer_are_refused() -> None:
    model = model_of("vit", torch.float64)
    inputs = CASES["vit"].inputs(model.module, batch=3, seed=5, dtype=torch.float64)
    logits = model(inputs)
    wrong = cv.data.Side(inputs=inputs, answers=logits.argmin(-1).tolist(), foils=logits.argmax(-1).tolist())
    direction = Direction.of(model, "vision.blocks.1.hook_resid_post", torch.ones(24))
    asked = {"n_random": 0, "progress": False}
    with pytest.raises(InputError, match="allow_wrong"):
        steering_response(model, wrong, direction, "logit_diff", [1.0], **asked)
    found = steering_response(model, wrong, direction, "logit_diff", [1.0], allow_wrong=True, **asked)
    assert bool((found.base < 0).all())
