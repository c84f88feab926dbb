"""Closed-loop success as a metric: what recipes report is what episodes by hand give, paired by start and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.data import reach
from circuitvision.errors import InputError
from circuitvision.metrics import action_dim, success
from circuitvision.patching import activation_patch, knockout, modulate
from circuitvision.steering import Direction, closed_loop, promoting_neurons, rollouts, steering_response

LANGUAGE = ("action", ("language", "patch"))


@pytest.fixture(scope="module")
def starts() -> reach.ReachScenes:
    return reach.sample_starts(10, seed=5)


def test_a_sweep_reports_what_episodes_by_hand_give(policy: cv.HookedModel, starts: reach.ReachScenes) -> None:
    run = rollouts(starts, seed=3, horizon=6)
    push = edits.overwrite(
        "action.blocks.2.mlp.hook_post", promoting_neurons(policy.action, [0], 8, layers=2).layers[2], 4.0
    )
    blind = edits.block_attention("action", None, ("language", "patch"))
    found = policy.sweep(run.inputs(policy), [[], [push], [blind]], "success", run=run, progress=False)
    wanted = closed_loop(
        policy, starts, {"nothing": [], "push": [push], "blind": [blind]}, seed=3, horizon=6, progress=False
    )
    assert torch.equal(found.values.double(), wanted.success)
    assert torch.equal(found.clean.double(), wanted.success[0])
    assert float(found.clean.mean()) > 0.5
    assert float(found.mean()[2]) < float(found.clean.mean())
    down = policy.sweep(run.inputs(policy), [[push]], action_dim(0, step=-1), run=run, progress=False)
    torch.testing.assert_close(down.values[0].double(), wanted.path[1, -1, 0])
    change = wanted.success_beside("nothing")
    assert torch.equal(change.values[2], found.values[2].double() - found.clean.double())
    assert change.axes == {"condition": ["nothing", "push", "blind"], "example": list(range(10))}


def test_recipes_with_controls_report_success(policy: cv.HookedModel, starts: reach.ReachScenes, tmp_path: Any) -> None:
    run = rollouts(starts, horizon=4)
    inputs = run.inputs(policy)
    blocked = knockout(
        policy, inputs, "success", {"image": (None, ("language", "patch"))}, tower="action", layers="all", run=run,
        save_to=tmp_path, progress=False,
    )  # fmt: skip
    again = knockout(
        policy, inputs, "success", {"image": (None, ("language", "patch"))}, tower="action", layers="all", run=run,
        save_to=tmp_path, resume=True, progress=False,
    )  # fmt: skip
    assert torch.equal(blocked.values, again.values)
    assert set(blocked.values.unique().tolist()) <= {0.0, 1.0}
    other = rollouts(starts, horizon=5)
    with pytest.raises(InputError):
        knockout(
            policy, inputs, "success", {"image": (None, ("language", "patch"))}, tower="action", layers="all", run=other,
            save_to=tmp_path, resume=True, progress=False,
        )  # fmt: skip
    heads = modulate(policy, inputs, "success", heads={"action L1H0": -1.0}, n_random=2, run=run, progress=False)
    assert heads.axes["condition"] == ["before", "heads", "random 1", "random 2"]
    direction = Direction.of(policy, "action.blocks.1.hook_resid_post", torch.ones(policy.action.cfg.d_model))
    steered = steering_response(policy, inputs, direction, success(), [20.0], n_random=1, policy=run, progress=False)
    assert steered.values.shape == (2, 1, 10)
    assert torch.equal(steered.base, heads.values[0].double())


def test_what_is_no_episode_is_refused(policy: cv.HookedModel, starts: reach.ReachScenes) -> None:
    run = rollouts(starts, horizon=2)
    inputs = run.inputs(policy)
    with pytest.raises(InputError, match="rollouts"):
        policy.sweep(inputs, [[]], "success", progress=False)
    with pytest.raises(InputError, match="starts"):
        policy.sweep(rollouts(starts[:4]).inputs(policy), [[]], "success", run=run, progress=False)
    with pytest.raises(InputError, match="lend"):
        activation_patch(
            policy, metric="success", clean=inputs, corrupt=inputs, sites="action.blocks.*.hook_resid_pre",
            axes=("layer",), run=run, progress=False,
        )  # fmt: skip
    for wrong in (lambda: rollouts(inputs), lambda: rollouts(starts, texts=["one"]), lambda: rollouts(starts[:0])):
        with pytest.raises(InputError):
            wrong()
