"""Runs of offloaded models: every site, edit and sweep as in the same model held in memory.

accelerate replaces forwards and fetches a module's weights while it runs, so sites that need weights must fetch them too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits, hooked
from tests.zoo import CASES, primary, shared_model

accelerate = pytest.importorskip("accelerate")

NAMES = ["vit", "dinov2-registers", "deit", "llava-clip-llama", "paligemma2", "pi0"]


def offloaded(module: nn.Module, how: str, folder: Path) -> nn.Module:
    if how == "cpu":
        return accelerate.cpu_offload(module, execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(module, folder, execution_device="cpu")
    places = ["cpu", "disk"]
    children = {name: places[number % 2] for number, (name, _) in enumerate(leaves(module))}
    return accelerate.dispatch_model(module, children, main_device="cpu", offload_dir=folder, force_hooks=True)


def leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The large parts that a device map names: blocks, and what stands beside them."""
    found: list[tuple[str, nn.Module]] = []

    def walk(prefix: str, part: nn.Module) -> None:
        for name, child in part.named_children():
            inside = any(isinstance(inner, nn.ModuleList) for inner in child.modules())
            own = any(True for _ in child.parameters(recurse=False))
            if inside and not own:
                walk(f"{prefix}{name}.", child)
            else:
                found.append((f"{prefix}{name}", child))

    walk("", module)
    return found


def pair(name: str, how: str, folder: Path) -> tuple[cv.HookedModel, cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model(name))
    inputs = CASES[name].inputs(module, batch=2)
    return cv.HookedModel(module), cv.HookedModel(offloaded(copy.deepcopy(module), how, folder)), inputs


def check_sites(name: str, how: str, folder: Path) -> None:
    model, away, inputs = pair(name, how, folder)
    with torch.no_grad():
        assert torch.equal(primary(away.module(**inputs)), primary(model.module(**inputs)))
        assert torch.equal(away(inputs), model(inputs))
        _, expected = model.run_with_cache(inputs, "**")
        _, found = away.run_with_cache(inputs, "**")
    assert list(found) == list(expected)
    for site in expected:
        torch.testing.assert_close(
            found[site], expected[site], rtol=1e-5, atol=1e-6, msg=lambda text, site=site: f"{site}: {text}"
        )


@pytest.mark.parametrize("how", ["cpu", "disk", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_site_of_an_offloaded_model(name: str, how: str, tmp_path: Path) -> None:
    check_sites(name, how, tmp_path)


@pytest.mark.parametrize("how", ["cpu", "mixed"])
@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "llava-clip-llama"])
def test_edits_and_sweeps_of_an_offloaded_model(name: str, how: str, tmp_path: Path) -> None:
    model, away, inputs = pair(name, how, tmp_path)
    tower = list(model.towers)[-1]
    places = [
        f"{tower}.blocks.1.hook_resid_pre",
        f"{tower}.blocks.0.attn.hook_result",
        f"{tower}.blocks.1.hook_q_input",
        f"{tower}.blocks.1.ln2.hook_normalized",
        f"{tower}.blocks.0.attn.hook_attn_scores",
        f"{tower}.hook_embed",
        "vision.blocks.0.mlp.hook_post",
    ]
    places += [site for site in ("vision.hook_pos_embed",) if site in model.sites()]
    listed = [edits.apply(site, lambda value, hook: 0.5 * value) for site in places]

    def metric(logits: Tensor) -> Tensor:
        return logits.flatten(1)[:, -1]

    with torch.no_grad():
        expected = torch.stack([metric(model.run(inputs, [edit])) for edit in listed])
        found = torch.stack([metric(away.run(inputs, [edit])) for edit in listed])
        swept = away.sweep(inputs, listed, metric, progress=False)
    assert (expected - metric(model(inputs)).detach()).abs().amax(1).gt(0).any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(swept.values, expected, rtol=1e-4, atol=1e-5)


def on_meta(patch: pytest.MonkeyPatch) -> None:
    """The model's device is that of its first parameter, wherever its data is."""
    patch.setattr(hooked.HookedModel, "device", property(lambda self: next(self.module.parameters()).device))


@pytest.mark.parametrize("mutant", [on_meta])
def test_mutants_are_noticed(mutant: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, cv.errors.CircuitVisionError, RuntimeError)):
        check_sites("vit", "cpu", tmp_path)
