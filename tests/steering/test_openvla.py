"""The same recipes on a policy that says its actions as tokens."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.data import reach
from circuitvision.errors import InputError
from circuitvision.openvla import ActionTokens, predict_action
from circuitvision.openvla.actions import unnormalise
from circuitvision.steering import (
    NeuronSet,
    act,
    closed_loop,
    inject,
    promoting_neurons,
    prompt_conditions,
    random_neurons,
    steering_response,
    transfer,
    value_vector_clusters,
)
from tests.zoo.openvla import openvla_inputs

KEY = "desk"


def policy(model: Any, inputs: Any, edits: Any) -> torch.Tensor:
    return act(model, inputs, edits, unnorm_key=KEY)


@pytest.fixture(scope="module")
def inputs(openvla: cv.HookedModel) -> dict[str, Any]:
    return openvla_inputs(openvla, 4, dtype=torch.float64)


@pytest.fixture(scope="module")
def others(openvla: cv.HookedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Other pictures under the same prompts."""
    pixels = openvla_inputs(openvla, 4, seed=3, dtype=torch.float64)["pixel_values"]
    return {**inputs, "pixel_values": pixels}


def test_it_acts_as_predict_action_does(openvla: cv.HookedModel, inputs: dict[str, Any]) -> None:
    found = policy(openvla, inputs, [])
    assert found.shape == (4, 1, 3)
    assert np.array_equal(found[:, 0].numpy(), predict_action(openvla, inputs, KEY))
    assert np.array_equal(found[:, 0].numpy(), predict_action(openvla.module, inputs, KEY))


def test_neurons_that_promote_an_action_bin_are_overwritten_at_the_prompt_and_at_every_decoding_step(
    openvla: cv.HookedModel, inputs: dict[str, Any]
) -> None:
    """With a large value all dimensions say the one token that the neurons' vectors promote behind the norm; the edit is there in every pass."""
    tower, tokens = openvla.language, ActionTokens.of(openvla.config)
    highest = max(tokens.ids, key=lambda one: openvla.action_values[one])
    chosen = promoting_neurons(tower, [highest], 6, against=[min(tokens.ids)], layers=2)
    (edit,) = chosen.edits(1e4)
    values: list[set[float]] = []
    first = chosen.places[0][1]
    watch = cv.edits.apply(edit.site, lambda value, hook: values.append(set(value[..., first].flatten().tolist())))
    steered = policy(openvla, inputs, [edit, watch])
    assert values == [{1e4}] * 3
    norm = openvla.module.language_model.model.norm.weight.detach()
    written = tower.blocks[2].W_out.detach()[[neuron for _, neuron in chosen]].sum(0) * norm
    says = int((written @ tower.W_U.detach()).argmax())
    expected = unnormalise(tokens.values([says] * 3), openvla.config, KEY)
    assert np.array_equal(steered.numpy()[:, 0], np.tile(expected, (4, 1)))
    # At the prompt alone the first dimension is steered, and the others follow as they would.
    prompt = policy(openvla, inputs, chosen.edits(1e4, steps="prefill"))
    assert torch.equal(prompt[..., 0], steered[..., 0])
    assert not torch.equal(prompt, steered)
    assert not torch.equal(steered, policy(openvla, inputs, []))


def test_the_response_has_every_set_and_own_values_move_nothing(
    openvla: cv.HookedModel, inputs: dict[str, Any]
) -> None:
    chosen = promoting_neurons(openvla.language, ["action 0.9"], 5)
    found = steering_response(openvla, inputs, chosen, 0, [0.0, 1e3], n_random=2, policy=policy, progress=False)
    assert found.axes["set"] == ["chosen", "random 0", "random 1"]
    assert found.values.shape == (3, 2, 4)
    assert found.values.abs().max() > 0
    same = steering_response(
        openvla, inputs, chosen, 0, [1.0], method="scale", n_random=1, policy=policy, progress=False
    )
    assert torch.equal(same.values, torch.zeros(2, 1, 4, dtype=torch.float64))


def test_metrics_of_its_actions_read_actions_and_not_the_tokens_that_say_them(
    openvla: cv.HookedModel, inputs: dict[str, Any]
) -> None:
    run = functools.partial(act, unnorm_key=KEY)
    group = promoting_neurons(openvla.language, ["action 0.9"], 5).edits(1e3)
    clean, steered = (run(openvla, inputs, edits) for edits in ([], group))
    named = {"dim": cv.metrics.action_dim(1), "far": "action_distance"}
    found = openvla.sweep(inputs, [group], named, run=run, progress=False)
    torch.testing.assert_close(found.values[0, 0], steered[:, 0, 1])
    torch.testing.assert_close(found.values[1, 0], (steered - clean)[:, 0].norm(dim=-1))
    assert float(found.values[1].max()) > 0


def test_another_pictures_keys_and_values_are_its_actions(
    openvla: cv.HookedModel, inputs: dict[str, Any], others: dict[str, Any]
) -> None:
    """Prompts are equal, so the picture enters through keys and values alone: all of them, or those of the patches, are the whole source run.

    The text's own carry what they read of the picture in the layers before.
    """
    a, b = policy(openvla, others, []), policy(openvla, inputs, [])
    differ = (a != b).flatten(1).any(1)
    assert int(differ.sum()) >= 3
    regions = {"all": None, "image": "patch"}
    if not bool(differ.all()):
        pytest.skip("the two pictures of a prompt give one action")
    found = inject(openvla, source=others, base=inputs, regions=regions, layers=["all", 0], policy=policy, progress=False)  # fmt: skip
    beta, residual = found.values[:2, 0, 0], found.residual[:2, 0, 0]
    torch.testing.assert_close(beta, torch.ones_like(beta), rtol=0, atol=1e-12)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-12)
    stream = inject(openvla, source=others, base=inputs, what="resid", layers=[0], policy=policy, progress=False)
    torch.testing.assert_close(stream.values[0, 0, 0], torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_prompts_and_clusters_have_their_shapes(openvla: cv.HookedModel, inputs: dict[str, Any]) -> None:
    said = {**inputs, "input_ids": inputs["input_ids"].roll(1, 0)}
    a, b = policy(openvla, inputs, []), policy(openvla, inputs, []) + 1
    found = prompt_conditions(openvla, {"right": inputs, "other": said}, a, b, policy=policy)
    torch.testing.assert_close(found.values[0], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found.values[1], transfer(policy(openvla, said, []), a, b).beta)
    clusters = value_vector_clusters(openvla.language, 4, draws=1)
    assert clusters.values.shape == (3, openvla.language.cfg.d_mlp)
    assert any("action" in word for words in clusters.words for word in words)
    assert isinstance(clusters.neurons(0), NeuronSet)


def test_episodes_run_with_a_policys_own_eyes_and_hands(openvla: cv.HookedModel, inputs: dict[str, Any]) -> None:
    starts = reach.sample_starts(4, seed=0)
    seen: list[int] = []

    def observe(model: Any, scenes: reach.ReachScenes, texts: Any, seed: int) -> dict[str, Any]:
        seen.append(len(texts))
        return inputs

    (random,) = random_neurons(openvla.language, promoting_neurons(openvla.language, ["action 0.9"], 5), 1)
    found = closed_loop(
        openvla, starts, {"nothing": [], "steered": random.edits(50.0)}, horizon=2, observe=observe, progress=False,
        decode=lambda model, actions: actions[..., :2].round().clamp(-1, 1).long().numpy(), unnorm_key=KEY,
    )  # fmt: skip
    assert found.values.shape == (2, 2, 4)
    assert seen == [4] * 4


def test_prompts_filled_up_on_the_right_are_refused(openvla: cv.HookedModel) -> None:
    padded = openvla_inputs(openvla, 3, padding="right", dtype=torch.float64)
    with pytest.raises(InputError, match="left"):
        policy(openvla, padded, [])
