"""A hook's answer takes the place of what it replaces in memory as well: order and alignment decide which kernel adds, and so the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.model.memory import ALIGNMENT, match_memory_layout
from tests.zoo import CASES, shared_model


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() % ALIGNMENT


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    skipped=st.integers(0, 5),
    swapped=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_values_move_to_the_strides_and_alignment_they_replace(shape, skipped, swapped, dtype):
    room = torch.randn(skipped + 3 * torch.Size(shape).numel()).to(dtype)
    like = room[skipped : skipped + torch.Size(shape).numel()].view(shape)
    like = like.transpose(0, -1) if swapped else like
    value = torch.randn(like.shape).to(dtype)
    placed = match_memory_layout(value, like)
    assert torch.equal(placed, value)
    assert placed.stride() == like.stride()
    assert _address(placed) == _address(like)
    assert match_memory_layout(like, like) is like


def test_gradients_pass_to_the_value_alone():
    like = torch.randn(5, 22)[1:]
    value = torch.randn(4, 22, requires_grad=True)
    placed = match_memory_layout(value, like)
    assert placed is not value
    assert _address(placed) == _address(like)
    weights = torch.randn(4, 22)
    (gradient,) = torch.autograd.grad((placed * weights).sum(), value)
    assert torch.equal(gradient, weights)


def test_what_has_no_memory_of_its_own_stays():
    row = torch.randn(1, 3).expand(4, 3)
    value = torch.randn(4, 3)
    assert match_memory_layout(value, row) is value
    assert match_memory_layout(torch.empty(0, 3), torch.empty(3, 0).T).shape == (0, 3)
    meta = torch.empty(2, 3, device="meta")
    assert match_memory_layout(meta, meta) is meta
    doubled = torch.func.vmap(lambda x: match_memory_layout(2 * x, x))(value)
    assert torch.equal(doubled, 2 * value)


@pytest.mark.parametrize("like", [torch.randn(3, 4).T, torch.randn(5, 3)[1:]], ids=["transposed", "shifted"])
def test_functional_transforms_pass_through(like):
    value = torch.randn(4, 3)
    assert torch.equal(
        torch.func.grad(lambda x: match_memory_layout(x * 2, like).sum())(value), torch.full((4, 3), 2.0)
    )
    out, slope = torch.func.jvp(lambda x: match_memory_layout(x * 2, like), (value,), (torch.ones(4, 3),))
    assert torch.equal(out, 2 * value)
    assert torch.equal(slope, torch.full((4, 3), 2.0))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_clone_at_any_site_leaves_the_bits_of_an_action(batch):
    """The chunk's positions are a slice: they begin at an address of their own."""
    model = cv.HookedModel(shared_model("pi0"))
    inputs = CASES["pi0"].inputs(model.module, batch=batch)
    with torch.no_grad():
        expected = model(inputs)
        for site in model.sites("action.*hook_readout") + model.sites("action.**.hook_resid_*"):
            assert torch.equal(model.run_with_hooks(inputs, [(site, lambda value, hook: value.clone())]), expected)
    out, _ = model.run_with_cache(
        inputs, "action.hook_readout", incl_bwd=True, metric=lambda velocity: velocity.sum((1, 2))
    )
    assert torch.equal(out, expected)
