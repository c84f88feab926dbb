"""The steering response: an exact slope on a linear policy, identities, the controls, and what the trained policy does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.data import reach
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.steering import (
    NeuronSet,
    SteeringResponse,
    act,
    promoting_neurons,
    random_neurons,
    steering_response,
)
from circuitvision.steering.claims import steers
from tests.zoo import case, shared_model

SITE = "action.blocks.1.mlp.hook_post"


def linear(clip: float | None = None) -> Any:
    """A policy that is linear in the neurons of one layer: dimension 0 is Σ_i (i + 1) m_i at the first action, dimension 1 is 0."""

    def run(model: Any, inputs: Any, group: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            # After the others: what they left.
            model.run(inputs, [*group, edits.apply(SITE, lambda value, hook: seen.append(value.clone()))])
        value = seen[0][:, 1].double()
        moved = (value * torch.arange(1.0, value.shape[-1] + 1)).sum(-1)
        moved = moved if clip is None else moved.clamp(-clip, clip)
        return torch.stack([moved, torch.zeros_like(moved)], -1)[:, None]

    return run


def measured(model: cv.HookedModel, boards: reach.ReachScenes, **options: Any) -> SteeringResponse:
    chosen = NeuronSet.of(model.action, [(1, 2), (1, 5)])
    given = {"n_random": 3, "progress": False, "policy": linear()}
    return steering_response(model, cv.data.reach_side(boards), chosen, 0, **{**given, **options})


def test_the_slope_of_a_linear_policy_is_exact(policy: cv.HookedModel, boards: reach.ReachScenes) -> None:
    found = measured(policy, boards, scales=[-2.0, 0.5, 1.0, 4.0], method="add")
    assert found.axes["set"] == ["chosen", "random 0", "random 1", "random 2"]
    expected = [sum(neuron + 1 for _, neuron in one) for one in found.neurons]
    slopes = found.slopes()
    torch.testing.assert_close(slopes.mean(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-4)
    assert found.slope == pytest.approx(3 + 6, rel=1e-5)
    assert float(found.r_squared.min()) > 1 - 1e-9
    assert found.saturation() != found.saturation()
    # Overwriting moves by as much per unit of scale, from wherever the neurons were.
    overwritten = measured(policy, boards, scales=[-2.0, 0.5, 1.0, 4.0])
    assert overwritten.slope == pytest.approx(9, rel=1e-5)
    assert found.p_value == (1 + sum(one >= 9 for one in expected[1:])) / 4
    # A set of neurons that all move the output more than the chosen ones.
    larger = NeuronSet.of(policy.action, [(1, 90), (1, 91)])
    beaten = measured(policy, boards, scales=[0.0, 1.0], method="add", random=[larger])
    assert (beaten.p_value, beaten.axes["set"]) == (1.0, ["chosen", "random 0"])


def test_the_response_of_a_clipped_policy_saturates_where_it_is_clipped(
    policy: cv.HookedModel, boards: reach.ReachScenes
) -> None:
    one = boards[[0]]
    scales = [0.0, 10.0, 100.0, 1000.0, 2000.0, 4000.0]
    found = measured(policy, one, scales=scales, policy=linear(clip=900.0))
    assert found.saturation() == 100.0
    assert float(found.effect[3]) == pytest.approx(float(found.effect[5]))
    shuffled = measured(policy, one, scales=scales[::-1], policy=linear(clip=900.0))
    assert shuffled.saturation() == 100.0


@pytest.mark.parametrize(
    ("effect", "expected"),
    [([0.0, 1.0, 1.0, 1.0], 1.0), ([0.0, 1.0, 1.0, 2.0], None), ([0.0, 1.0, 2.0, 2.05], 2.0), ([0.0] * 4, None)],
)
def test_a_curve_is_saturated_where_it_stays_flat(effect: list[float], expected: float | None) -> None:
    """A plateau that it leaves again is none."""
    axes = {"set": ["chosen"], "scale": [0.0, 1.0, 2.0, 3.0], "example": [0]}
    found = SteeringResponse(torch.tensor(effect).view(1, 4, 1), axes, base=torch.zeros(1)).saturation()
    assert found == expected if expected is not None else found != found


def test_a_neurons_own_value_changes_nothing(policy: cv.HookedModel, boards: reach.ReachScenes) -> None:
    """Factor 1, and nothing added, are the unedited run bit for bit."""
    chosen = promoting_neurons(policy.action, [0], 6)
    inputs = next(cv.data.reach_side(boards).batches(policy)).inputs
    for method, scale in (("scale", 1.0), ("add", 0.0)):
        found = steering_response(policy, inputs, chosen, 0, [scale], method=method, n_random=2, progress=False)
        assert torch.equal(found.values, torch.zeros_like(found.values))


def test_deviations_count_from_each_neurons_own_mean(policy: cv.HookedModel, boards: reach.ReachScenes) -> None:
    found = measured(policy, boards, scales=[0.0, 1.0], units="deviation", n_random=1)
    side = cv.data.reach_side(boards)
    inputs = next(side.batches(policy)).inputs
    _, cache = policy.run_with_cache(inputs, SITE)
    value = cache[SITE].double()
    held = value.reshape(-1, value.shape[-1])[:, [2, 5]]
    torch.testing.assert_close(found.natural_mean, held.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.natural_std, held.std(0, correction=0), rtol=1e-4, atol=1e-6)
    expected = float((found.natural_std * torch.tensor([3.0, 6.0], dtype=torch.float64)).sum())
    assert found.slope == pytest.approx(expected, rel=1e-4)
    # At scale 0 every neuron has its natural mean.
    with torch.no_grad():
        own = policy.run_with_cache(inputs, SITE)[1][SITE][:, 1][:, [2, 5]].double()
    moved = ((found.natural_mean - own) * torch.tensor([3.0, 6.0], dtype=torch.float64)).sum(1)
    torch.testing.assert_close(found.values[0, 0], moved, rtol=1e-4, atol=1e-4)
    plain = measured(policy, boards, scales=[0.0, 1.0])
    torch.testing.assert_close(plain.deviations()[0], -found.natural_mean / found.natural_std, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.deviations(), torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64))


def test_natural_values_leave_padding_out(policy: cv.HookedModel, boards: reach.ReachScenes) -> None:
    chosen = NeuronSet.of(policy.language, [(0, 1), (0, 40)])
    side = cv.data.reach_side(boards)
    inputs = next(side.batches(policy)).inputs
    wide = {**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 6)),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 6))}  # fmt: skip
    found = [
        steering_response(policy, one, chosen, 0, [1.0], n_random=0, progress=False).natural_mean
        for one in (inputs, wide)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_batches_and_positions_per_example_give_what_one_run_gives(
    policy: cv.HookedModel, boards: reach.ReachScenes
) -> None:
    chosen = promoting_neurons(policy.language, ["red"], 8)
    side = cv.data.reach_side(boards)
    where = cv.regions.box(side.boxes, size=(16, 16))
    options: dict[str, Any] = {"n_random": 1, "progress": False, "scales": [8.0], "positions": where}
    whole = steering_response(policy, side, chosen, 1, **options)
    parts = steering_response(policy, side, chosen, 1, example_batch=7, **options)
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-4, atol=1e-4)
    assert whole.axes == parts.axes
    assert whole.values.abs().max() > 0.01


def test_neurons_that_promote_a_direction_move_the_robot_there_and_random_ones_do_not(
    policy: cv.HookedModel, boards: reach.ReachScenes
) -> None:
    """The velocity is noise minus action: neurons that lower it move the action up."""
    for dim, largest, sign in ((0, False, 1), (1, True, -1)):
        chosen = promoting_neurons(policy.action, [dim], 8, largest=largest, layers=2)
        found = steering_response(
            policy, cv.data.reach_side(boards[:10]), chosen, dim, [-4.0, 0.0, 4.0], n_random=19, progress=False
        )
        assert sign * found.slope > 0.15
        assert float(found.r_squared[0]) > 0.97
        assert found.p_value == 1 / 20
        told = steers(found)
        assert told.holds
        assert told.chance == pytest.approx(float(found.slopes().mean()[1:].abs().max()))


def test_a_random_set_is_found_to_steer_nothing(policy: cv.HookedModel, boards: reach.ReachScenes) -> None:
    chosen = promoting_neurons(policy.action, [1], 8, largest=False, layers=2)
    held = 0
    for drawn in random_neurons(policy.action, chosen, 3, seed=11):
        found = steering_response(
            policy, cv.data.reach_side(boards[:8]), drawn, 1, [-2.0, 2.0], n_random=19, progress=False, seed=5
        )
        held += bool(steers(found).holds)
    assert held <= 1


def test_fewer_random_sets_than_tell_affirm_nothing(policy: cv.HookedModel, boards: reach.ReachScenes) -> None:
    assert steers(measured(policy, boards, n_random=0)).holds is None
    found = steers(measured(policy, boards, n_random=3, scales=[0.0, 1.0]))
    assert not found.holds


def test_results_are_saved_joined_and_put_in_tables(
    policy: cv.HookedModel, boards: reach.ReachScenes, tmp_path: Any
) -> None:
    found = measured(policy, boards)
    again = cv.load(found.save(tmp_path / "response.npz"))
    assert isinstance(again, SteeringResponse)
    assert torch.equal(again.values, found.values)
    assert again.neurons == found.neurons
    assert set(found.to_frame().columns) == {"set", "scale", "example", "value"}
    assert len(found.to_frame()) == found.values.numel()
    part = found.take([0, 2])
    torch.testing.assert_close(part.base, found.base[[0, 2]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "set"},
        {"units": "sigma"},
        {"method": "scale", "units": "deviation"},
        {"scales": []},
        {"scales": [1.0, 1.0]},
    ],
)
def test_options_that_are_not_understood_are_refused_before_anything_runs(
    policy: cv.HookedModel, boards: reach.ReachScenes, wrong: dict[str, Any]
) -> None:
    def never(*_: Any) -> torch.Tensor:
        raise AssertionError

    with pytest.raises(InputError):
        measured(policy, boards, policy=never, **wrong)


def test_models_that_do_not_act_and_data_that_are_none_are_refused(policy: cv.HookedModel) -> None:
    still = cv.HookedModel(shared_model("vit"))
    with pytest.raises(UnsupportedModelError, match="policy"):
        act(still, case("vit").inputs(still.module))
    chosen = promoting_neurons(policy.action, [1], 4)
    with pytest.raises(InputError, match="inputs"):
        steering_response(policy, [1, 2], chosen, 0)
    with pytest.raises(InputError, match="NeuronSet"):
        steering_response(policy, {}, [(0, 1)], 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dimension"):
        steering_response(policy, {}, chosen, "logit_diff")
