"""Learned masks of shortcut heads: a step against plain hooks, the known heads of spurious-vit, the worst group beside selection by gain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import circuits, data, organisms
from circuitvision.circuits import HeadMask, learn_shortcut_heads, removal_curve, remove_heads, shortcut_heads
from circuitvision.circuits.head_masks import _gated, _HeadGates
from circuitvision.circuits.shortcuts import shortcut_search
from circuitvision.data import Side
from circuitvision.errors import InputError
from circuitvision.organisms.spurious_vit import SHORTCUT_HEADS
from tests.test_shortcut_heads import js

KNOWN = {circuits.head_id("vision", layer, head) for layer, head in SHORTCUT_HEADS}
WIDTH = 16


def drawn(count: int, seed: int) -> tuple[Side, list[Any]]:
    scenes = data.sample_backgrounds(count, seed)
    return data.background_side(scenes), [scene.group for scene in scenes]


@pytest.fixture(scope="module")
def model() -> cv.HookedModel:
    return organisms.load("spurious-vit")


def gates_of(count: int = 12, open_: int = 10) -> _HeadGates:
    return _HeadGates(torch.ones(count, dtype=torch.bool), open_, 0.5, 0.1, 1.0, 3)


def plain(model: cv.HookedModel, pixels: Tensor, gates: Tensor, means: list[Tensor]) -> Tensor:
    """Distributions of a forward pass in which every head writes its gate's share of its own, and the rest of its mean."""
    handles = []
    for layer in range(3):

        def mix(module: Any, given: Any, layer: int = layer) -> Any:
            share = gates[4 * layer : 4 * layer + 4].repeat_interleave(WIDTH).to(given[0])
            return (share * given[0] + (1 - share) * means[layer], *given[1:])

        handles.append(model.module.vit.layers[layer].attention.o_proj.register_forward_pre_hook(mix))
    found = model.module(pixel_values=pixels).logits.double().softmax(-1)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_a_step_is_that_of_plain_hooks_and_autograd(model: cv.HookedModel, ablation: str) -> None:
    side, _ = drawn(6, 15)
    found = shortcut_search(model, side, None, "dataset", 0, None, None, "last", 0, 6)
    batch = next(found.triples.batches(model, found.each))
    gates = gates_of()
    gains = gates.step(model, batch, _gated(found.heads, ablation, side), found.metric)
    again = gates_of()
    held: list[Tensor] = []
    handles = [
        model.module.vit.layers[layer].attention.o_proj.register_forward_pre_hook(
            lambda _, given: held.append(given[0])
        )
        for layer in range(3)
    ]
    pixels = batch.inputs["pixel_values"]
    with torch.no_grad():
        model.module(pixel_values=pixels[::3])
    for handle in handles:
        handle.remove()
    means = [one.mean(0) if ablation == "mean" else torch.zeros_like(one[0]) for one in held]
    share = again.drawn()

    def both(gates: Tensor) -> Tensor:
        full, front, back = (plain(model, pixels[part::3], gates, means) for part in range(3))
        return torch.stack([js(full, front), js(full, back)])

    with torch.no_grad():
        big, fig = both(torch.ones(12)).mean(-1)
    own = both(share)
    torch.testing.assert_close(gains, own.detach(), atol=1e-6, rtol=1e-4)
    loss = own[0].mean() / big + (fig - own[1].mean()) / fig
    (gradient,) = torch.autograd.grad(loss, again.alpha)
    torch.testing.assert_close(gates.alpha.grad, gradient, atol=1e-4, rtol=1e-3)
    assert float(gradient.abs().max()) > 1e-2
    assert not model.engine.handles


def test_the_known_heads_are_closed(model: cv.HookedModel) -> None:
    side, _ = drawn(60, 11)
    found = learn_shortcut_heads(model, side, n_heads=2, steps=60, example_batch=20, progress=False)
    assert isinstance(found, HeadMask)
    assert set(found.chosen) == KNOWN
    assert [name for name, _ in found.ranking()[:2]] == found.chosen
    assert found.values.shape == (2, 60, 60)
    assert torch.isfinite(found.values).sum(-1).tolist() == [[20] * 60] * 2
    same = learn_shortcut_heads(model, side, n_heads=2, steps=3, example_batch=20, progress=False)
    torch.testing.assert_close(same.values, found.values[:, :3], equal_nan=True)


def test_a_mask_is_stored(model: cv.HookedModel, tmp_path: Any) -> None:
    found = learn_shortcut_heads(model, drawn(6, 1)[0], n_heads=3, steps=2, progress=False)
    again = HeadMask.load(found.save(tmp_path / "mask.npz"))
    assert again.chosen == found.chosen
    torch.testing.assert_close(again.values, found.values, equal_nan=True)


@pytest.mark.parametrize("options", [{"n_heads": 0}, {"n_heads": 12}, {"n_heads": 2, "steps": 0}, {"n_heads": True}])
def test_what_cannot_be_learned_is_refused(model: cv.HookedModel, options: Any) -> None:
    with pytest.raises(InputError, match="n_heads"):
        learn_shortcut_heads(model, drawn(6, 1)[0], progress=False, **options)


@pytest.mark.slow
def test_a_learned_mask_beside_selection_by_gain(model: cv.HookedModel) -> None:
    """Chosen on validation pictures, both raise the worst group by as much; the mask, which puts the stronger head first, with one head fewer."""
    side, _ = drawn(120, 11)
    validation, groups = drawn(240, 12)
    test, test_groups = drawn(400, 13)
    learned = learn_shortcut_heads(model, side, n_heads=2, steps=60, example_batch=20, progress=False)
    found = []
    for ranking in (shortcut_heads(model, side, progress=False), learned.chosen):
        curve = removal_curve(model, validation, ranking, groups=groups, progress=False)
        found.append(remove_heads(model, test, curve, groups=test_groups, n_random=0, progress=False))
    by_gain, by_mask = found
    assert set(by_gain.heads) == set(learned.chosen) == KNOWN
    assert len(by_mask.heads) == 1
    assert set(by_mask.heads) < KNOWN
    assert by_gain.worst.tolist() == by_mask.worst.tolist()
    assert by_mask.rise()[1] >= 0.1
