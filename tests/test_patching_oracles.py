"""Patching and estimates against plain PyTorch hooks: texts of a dual encoder, and a policy whose actions are tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from circuitvision.metrics import logit_diff
from circuitvision.patching import activation_patch, attribution_patch
from tests.sweeps.drawing import inputs_of, model_of

DOUBLE = torch.float64


def output_of(block: torch.nn.Module, run: Any) -> Tensor:
    held: list[Any] = []
    handle = block.register_forward_hook(lambda _, __, out: held.append(out) or None)
    run()
    handle.remove()
    return held[0][0] if isinstance(held[0], tuple) else held[0]


def under(block: torch.nn.Module, value: Tensor, run: Any) -> Tensor:
    def put(_: Any, __: Any, out: Any) -> Any:
        return (value, *out[1:]) if isinstance(out, tuple) else value

    handle = block.register_forward_hook(put)
    found = run()
    handle.remove()
    return found


def by_hand(model: Any, tower: str, clean: Any, corrupt: Any, read: Any) -> tuple[Tensor, Tensor]:
    """Per layer and position the effect of denoising the stream behind each block, and its first-order estimate."""
    exact, estimated = [], []
    for layer in range(model.towers[tower].cfg.n_layers - 1):
        block = model.towers[tower].blocks[layer].module
        with torch.no_grad():
            good, bad = (output_of(block, lambda one=one: model.module(**one)) for one in (clean, corrupt))
            base = read(model.module(**corrupt))
        rows = []
        for place in range(good.shape[1]):
            mixed = bad.clone()
            mixed[:, place] = good[:, place]
            with torch.no_grad():
                rows.append(read(under(block, mixed, lambda: model.module(**corrupt))) - base)
        exact.append(torch.stack(rows))
        start = bad.detach().clone().requires_grad_()
        per_image = []
        for value in read(under(block, start, lambda: model.module(**corrupt))):
            (gradient,) = torch.autograd.grad(value, start, retain_graph=True)
            per_image.append(((good - bad) * gradient).sum((0, 2)))
        estimated.append(torch.stack(per_image, -1))
    return torch.stack(exact), torch.stack(estimated).detach()


@pytest.mark.parametrize(("name", "tower"), [("clip", "text"), ("siglip", "text"), ("openvla", "language")])
def test_cells_are_those_of_plain_hooks(name: str, tower: str) -> None:
    model = model_of(name, DOUBLE)
    clean = inputs_of(name, DOUBLE, 2, None, 1, 0)
    corrupt = {**clean}
    ids = clean["input_ids"].clone()
    # Another word in the middle of every text.
    ids[:, -3] = torch.where(ids[:, -3] == 20, 21, 20)
    corrupt["input_ids"] = ids
    columns = (0, 1) if model.is_dual else (3, 5)

    def read(output: Any) -> Tensor:
        rows = output.logits_per_image if model.is_dual else output.logits[:, -1]
        return rows[:, columns[0]] - rows[:, columns[1]]

    exact, estimated = by_hand(model, tower, clean, corrupt, read)
    assert float(exact.abs().max()) > 1e-4
    layers = range(len(exact))
    asked = {
        "metric": logit_diff(*columns), "clean": clean, "corrupt": corrupt, "axes": ("layer", "position"), "progress": False,
        "sites": [f"{tower}.blocks.{layer}.hook_resid_post" for layer in layers],
    }  # fmt: skip
    patched = activation_patch(model, **asked)
    torch.testing.assert_close(patched.values, exact, atol=1e-8, rtol=1e-5)
    guessed = attribution_patch(model, **asked)
    torch.testing.assert_close(guessed.values, estimated, atol=1e-8, rtol=1e-5)
    assert model.engine.handles == []
