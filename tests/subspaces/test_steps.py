"""What a step of training leaves behind in the model, and what it does not compute."""

from __future__ import annotations

import pytest

from circuitvision.subspaces import DAS, BoundlessDAS, SitePairs
from tests.subspaces.common import pairs_of


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("search", [DAS, BoundlessDAS])
def test_weights_that_require_gradients_get_none_and_cost_no_positions(search: type, keep: bool) -> None:
    model, pairs = pairs_of("llava-clip-llama", 6)
    site = "language.blocks.0.hook_resid_post"
    weights = list(model.module.parameters())
    assert all(one.requires_grad for one in weights)
    options = {"epochs": 1, "batch_size": 2, "held_out": 0.34, "allow_wrong": True, "progress": False, "keep": keep}
    found = search(2, site, positions="last").fit(model, pairs, **options)
    assert len(found.loss[0]) == 2
    assert all(one.requires_grad and one.grad is None for one in weights)


def test_a_step_at_the_last_position_computes_that_position_alone() -> None:
    model, pairs = pairs_of("llava-clip-llama", 2)
    site = "language.blocks.0.hook_resid_post"
    with SitePairs(model, pairs, site, positions="last", allow_wrong=True) as data:
        data.gradients()
        (part,) = data.parts
        assert f"positions {part.inputs['input_ids'].shape[1] - 1}…" in part.run.plan
