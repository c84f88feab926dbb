"""Prompt conditions and episodes in closed loop: does the robot listen, and where does it end."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.data import reach
from circuitvision.errors import InputError
from circuitvision.organisms import reach_pi0
from circuitvision.statistics import wilson
from circuitvision.steering import (
    PromptConditions,
    act,
    closed_loop,
    promoting_neurons,
    prompt_conditions,
    random_neurons,
    reworded,
)
from circuitvision.steering.claims import listens, succeeds


def in_units(model: cv.HookedModel, scenes: reach.ReachScenes) -> torch.Tensor:
    return model.processor.normalize(torch.tensor(scenes.expert(2)).float(), "actions")


def conditions(model: cv.HookedModel, scenes: reach.ReachScenes, **options: Any) -> PromptConditions:
    texts = reach.prompts(scenes, seed=0)
    other = reach.minimal_pairs(scenes, "goal", 0)
    with warnings.catch_warnings():
        # Two goals may ask for the same steps.
        warnings.simplefilter("ignore")
        sides = reworded(cv.data.reach_side(scenes), texts)
        return prompt_conditions(model, sides, in_units(model, scenes), in_units(model, other), **options)


@pytest.fixture(scope="module")
def two_objects(policy: cv.HookedModel) -> PromptConditions:
    board = reach.Board(n_objects=2)
    return conditions(policy, reach.sample_starts(120, seed=3, split=None, board=board))


def test_prompts_of_a_scene_say_what_they_are_called() -> None:
    scenes = reach.sample_scenes(30, seed=0)
    told = reach.prompts(scenes, seed=1)
    assert list(told) == ["right", "empty", "negated", "other object", "absent object"]
    for row in range(30):
        there = {reach.COLOR_NAMES[color] for color in scenes.colors[row]}
        goal = reach.COLOR_NAMES[scenes.goal[row]]
        assert told["right"][row] == f"reach {goal}"
        assert told["negated"][row] == f"reach not {goal}"
        assert told["other object"][row].split()[1] in there - {goal}
        assert told["absent object"][row].split()[1] not in there
    everything = reach.sample_scenes(3, seed=0, board=reach.Board(n_objects=4))
    assert "absent object" not in reach.prompts(everything)


def test_it_goes_where_the_prompt_says_and_nowhere_without_one(two_objects: PromptConditions) -> None:
    """METHODS2.md 9.4: with two objects β > .9 for the named one, about .5 without a prompt."""
    beta = dict(zip(two_objects.axes["condition"], two_objects.mean().tolist(), strict=True))
    residual = dict(zip(two_objects.axes["condition"], two_objects.mean(quantity="residual").tolist(), strict=True))
    assert beta["right"] > 0.9
    assert beta["empty"] == pytest.approx(0.5, abs=0.15)
    assert abs(beta["other object"]) < 0.1
    # Without a prompt that names an object of the scene it goes between them and aside.
    assert max(residual["right"], residual["other object"]) < 0.05
    assert min(residual[name] for name in ("empty", "negated", "absent object")) > 0.4
    told = listens(two_objects)
    assert told.holds
    assert told.value == pytest.approx(beta["right"] - beta["other object"])
    assert not listens(two_objects, other="negated").holds
    assert two_objects.texts[1] == ""


def test_a_policy_that_ignores_its_prompt_does_not_listen(policy: cv.HookedModel) -> None:
    """The mutant: every prompt becomes the same one."""
    scenes = reach.sample_starts(40, seed=4)

    def deaf(model: Any, inputs: Any, edits: Any) -> torch.Tensor:
        words = next(cv.data.reach_side(scenes).batches(model)).inputs
        return act(model, {**inputs, "input_ids": words["input_ids"], "attention_mask": words["attention_mask"]}, edits)

    found = conditions(policy, scenes, policy=deaf)
    torch.testing.assert_close(found.values, found.values[:1].expand_as(found.values), equal_nan=True)
    assert not listens(found).holds


def test_conditions_of_other_examples_are_refused(policy: cv.HookedModel, boards: reach.ReachScenes) -> None:
    side = cv.data.reach_side(boards)
    steps = in_units(policy, boards)
    with pytest.raises(InputError, match="other examples"):
        prompt_conditions(policy, {"right": side, "less": side[:5]}, steps, steps + 1)
    with pytest.raises(InputError, match="condition"):
        prompt_conditions(policy, {}, steps, steps)
    with pytest.raises(InputError, match="prompts"):
        reworded(side, {"right": ["reach red"]})
    with pytest.raises(InputError, match="shapes"):
        prompt_conditions(policy, {"right": side[:3]}, steps, steps + 1)


# -- in closed loop --------------------------------------------------------------------------------------------------------------------------------


def test_without_edits_episodes_are_those_of_the_organism(policy: cv.HookedModel) -> None:
    starts = reach.sample_starts(30, seed=5)
    found = closed_loop(policy, starts, {"nothing": []}, seed=7, progress=False)
    expected = reach.run_episodes(reach_pi0.policy(policy.module, policy.processor, 7), starts, reach_pi0.HORIZON)
    assert found.path.shape == (1, 9, 2, 30)
    assert found.axes["dim"] == ["down", "right"]
    # The organism's own policy draws another noise from the same seeds; both reach the goal.
    assert found.success_rate[0] > 0.9
    assert expected.success_rate > 0.9
    torch.testing.assert_close(found.values, found.path[:, -1] - found.path[:, 0])
    where = found.reached(starts.goal_cells())
    assert torch.equal(where.values, found.success)
    nowhere = found.reached(np.full((30, 2), -1))
    assert float(nowhere.values.sum()) == 0


def test_steering_displaces_the_gripper_and_costs_success_where_random_neurons_do_not(policy: cv.HookedModel) -> None:
    starts = reach.sample_starts(60, seed=6)
    right = promoting_neurons(policy.action, [1], 8, largest=False, layers=2)
    (random,) = random_neurons(policy.action, right, 1, seed=1)
    runs = {"nothing": [], "right": right.edits(4.0), "left": right.edits(-4.0), "random": random.edits(4.0)}
    found = closed_loop(policy, starts, runs, progress=False)
    gone = found.beside("nothing")
    mean, ends = gone.mean(), gone.interval()
    assert mean[1, 1] > 0.5
    assert ends[0, 1, 1] > 0
    assert mean[2, 1] < -0.5
    assert ends[1, 2, 1] < 0
    assert mean[3].abs().max() < 0.25
    assert succeeds(found, "right", "nothing").holds
    assert not succeeds(found, "random", "nothing").holds
    torch.testing.assert_close(found.success_interval(), wilson(found.success_rate, 60))
    table = found.table()
    assert list(table["condition"]) == list(runs)
    assert (table["low"] < table["high"]).all()
    assert table["success"].between(table["low"] - 1e-9, table["high"] + 1e-9).all()


def test_an_edit_may_follow_what_the_policy_sees_and_prompts_may_be_replaced(policy: cv.HookedModel) -> None:
    """Injecting another goal's prefix at every step takes the gripper there; so does saying it."""
    starts = reach.sample_starts(20, seed=8)
    other = reach.minimal_pairs(starts, "goal", 0)
    told = other.instructions()

    def elsewhere(inputs: Any) -> list[Any]:
        words = policy.inputs(images=[[image] for image in starts.images()], text=told, state=starts.gripper)
        ids = {**inputs, "input_ids": words["input_ids"]}
        site = "language.blocks.0.hook_resid_pre"
        _, cache = policy.run_with_cache(ids, site)
        return [cv.edits.replace(site, cache, positions=[18])]

    found = closed_loop(
        policy, starts, {"nothing": [], "injected": elsewhere, "said": []}, texts={"said": told}, progress=False
    )
    ended = found.reached(other.goal_cells()).mean()
    assert ended[1] > 0.9
    assert ended[2] > 0.9
    assert ended[0] < 0.2
    torch.testing.assert_close(found.path[1], found.path[2])


def test_episodes_that_cannot_run_are_refused(policy: cv.HookedModel) -> None:
    starts = reach.sample_starts(4, seed=0)
    with pytest.raises(InputError, match="condition"):
        closed_loop(policy, starts, {})
    with pytest.raises(InputError, match="'said'"):
        closed_loop(policy, starts, {"nothing": []}, texts={"said": ["reach red"] * 4})
    with pytest.raises(InputError, match="prompts"):
        closed_loop(policy, starts, {"nothing": []}, texts={"nothing": ["reach red"]})
    with pytest.raises(InputError, match="cells"):
        closed_loop(policy, starts, {"nothing": []}, horizon=1, progress=False).reached(np.zeros((2, 2)))
