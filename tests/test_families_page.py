"""The example of ``docs/families.md`` runs, and what it describes is right: against plain PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.model.spec import FAMILIES, POOLS

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    shipped = dict(FAMILIES)
    torch.manual_seed(0)
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, found)
        yield found
    finally:
        for name in FAMILIES.keys() - shipped.keys():
            del FAMILIES[name]


def test_a_head_of_ones_own(names: dict[str, Any]) -> None:
    model, logits, cache = names["model"], names["logits"], names["cache"]
    inputs = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    with torch.no_grad():
        torch.testing.assert_close(logits, model.module(**inputs)["logits"])
        torch.testing.assert_close(names["answer"].values.sum(), logits[0, 0])
        block = model.module.backbone.layers[1].attention.o_proj
        handle = block.register_forward_pre_hook(lambda module, args: (args[0] * torch.tensor([0.0] * 8 + [1.0] * 8),))
        expected = model.module(**inputs)["logits"]
        handle.remove()
        torch.testing.assert_close(model.run(inputs, edits.ablate("L1H0")), expected)
        assert not torch.equal(expected, logits)
    lens = cv.readout.logit_lens(model, cache, targets={0: 0, 1: 1})
    torch.testing.assert_close(lens.values[-1, 0, :, 0], logits[0, :2].detach())
    assert len(model.sites()) == len({*model.sites()})


def test_blocks_of_ones_own(names: dict[str, Any]) -> None:
    model, pixels, stream = names["own"], names["pixels"], names["stream"]
    expected = []
    with torch.no_grad():
        for layer in (0, 1):
            for head in (0, 1):
                kept = torch.ones(16)
                kept[8 * head : 8 * head + 8] = 0
                proj = model.module.blocks[layer].attn.proj
                handle = proj.register_forward_pre_hook(lambda module, args, kept=kept: (args[0] * kept,))
                expected.append(model.module(**pixels)["logits"][:, 0])
                handle.remove()
        torch.testing.assert_close(names["without"].values, torch.stack(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            stream["vision.blocks.0.hook_resid_post"], stream["vision.blocks.1.hook_resid_pre"], rtol=0, atol=0
        )
        last = model.module.head(model.module.norm(stream["vision.blocks.1.hook_resid_post"])[:, 0])
        torch.testing.assert_close(last, model.module(**pixels)["logits"])


def test_two_backbones(names: dict[str, Any]) -> None:
    module, prompt = names["eyes"].module, names["prompt"]
    expected = []
    with torch.no_grad():
        for tower in (module.eye, module.eye_2, module.language_model):
            output = next(part for name, part in tower.named_modules() if name.endswith(("o_proj", "out_proj")))
            for head in (0, 1):
                kept = torch.ones(16)
                kept[8 * head : 8 * head + 8] = 0
                handle = output.register_forward_pre_hook(lambda part, args, kept=kept: (args[0] * kept,))
                expected.append(module(**prompt)["logits"][:, -1, 0])
                handle.remove()
    torch.testing.assert_close(names["effects"].values, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert len({round(float(value), 6) for value in torch.stack(expected)}) == 6


def test_a_packing_of_ones_own(names: dict[str, Any]) -> None:
    """The corner is patch 0 of a row, and, mirrored, the last of the first four; painting its pixels changes these two positions."""
    model, shown, module = names["ways"], names["shown"], names["ways"].module
    tokens = model.tokens(shown)["language"]
    assert tokens.in_box(0, 0, 8, 8, row=1) == [1, 20]
    assert tokens.patches.of(1, 20) == [(3, 0, 0, 1.0)]
    assert model.tokens(shown)["vision"].example.tolist() == [0, 0, 1, 1]
    block = module.language_model.layers[0]

    def blank(part: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(1, torch.tensor([1, 20]), 0.0)

    with torch.no_grad():
        handle = block.register_forward_hook(blank)
        expected = module(**shown)["logits"]
        handle.remove()
        torch.testing.assert_close(names["edited"], expected)
        torch.testing.assert_close(model(names["second"]), model(shown)[1:])
        painted = {**shown, "pixel_values": shown["pixel_values"].clone()}
        painted["pixel_values"][1, :, :8, :8] += 1.0
        silent = [("vision.blocks.*.hook_attn_out", lambda value, hook: torch.zeros_like(value))]
        with model.hooks(silent):
            seen = [
                model.run_with_cache(one, "language.hook_input")[1]["language.hook_input"] for one in (shown, painted)
            ]
    changed = (seen[0] != seen[1]).any(-1).nonzero().tolist()
    assert changed == [[1, 1], [1, 20]]


def test_every_pooling_rule_is_named() -> None:
    assert all(f"`{rule}`" in PAGE for rule in POOLS)
