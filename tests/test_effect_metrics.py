"""Metrics that compare runs and answers, and what is said of measured effects: values computed by hand, and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from circuitvision import metrics
from circuitvision.errors import InputError
from circuitvision.links import marked
from circuitvision.metrics import registry
from circuitvision.patching import PatchingResult
from circuitvision.storage import restored, stored


def _logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _of_probabilities(*rows: list[float]) -> torch.Tensor:
    return _logits(*rows).clamp_min(1e-300).log()


# -- divergences ---------------------------------------------------------------------------------------------------------------------------


def test_js_of_disjoint_distributions_is_ln_2_and_of_equal_ones_0():
    one, other = _of_probabilities([1.0, 0.0, 0.0]), _of_probabilities([0.0, 0.5, 0.5])
    assert metrics.js(one)(other).item() == pytest.approx(math.log(2), abs=1e-12)
    assert metrics.js(other)(one).item() == pytest.approx(math.log(2), abs=1e-12)
    assert metrics.js(one)(one).item() == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000))
def test_js_is_scipys_and_symmetric(classes, seed):
    rng = np.random.default_rng(seed)
    p, q = torch.from_numpy(rng.normal(size=(2, 3, classes)))
    expected = jensenshannon(p.softmax(-1).numpy(), q.softmax(-1).numpy(), axis=-1) ** 2
    assert torch.allclose(metrics.js(p)(q), torch.from_numpy(expected), atol=1e-12)
    assert torch.allclose(metrics.js(p)(q), metrics.js(q)(p), atol=1e-12)


def test_js_of_yes_or_no_columns_is_the_sum_of_theirs():
    p, q = _logits([0.3, -1.0]), _logits([2.0, 0.5])
    made = metrics.js(p)(marked(q.clone(), "sigmoid"))
    single = [
        jensenshannon([a.sigmoid(), 1 - a.sigmoid()], [b.sigmoid(), 1 - b.sigmoid()]) ** 2
        for a, b in zip(p[0], q[0], strict=True)
    ]
    assert made.item() == pytest.approx(sum(single), abs=1e-12)


def test_js_has_a_gradient_away_from_its_reference():
    reference = _logits([0.0, 1.0, 2.0])
    x = _logits([2.0, 0.0, 1.0]).requires_grad_()
    metrics.js(reference)(x).sum().backward()
    assert float(x.grad.norm()) > 0.01


# -- answers -------------------------------------------------------------------------------------------------------------------------------


def test_logit_is_the_number_itself_also_of_a_regression_head():
    value = marked(_logits([1.5], [-2.0]), "none")
    assert metrics.logit(0)(value).tolist() == [1.5, -2.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=5), st.data())
def test_margin_is_positive_exactly_where_the_answer_is_given(row, data):
    answer = data.draw(st.integers(0, len(row) - 1))
    logits = _logits([float(x) for x in row])
    margin = metrics.margin(answer)(logits)
    assert margin.item() == row[answer] - max(x for number, x in enumerate(row) if number != answer)
    assert bool(margin > 0) == bool(metrics.accuracy(answer)(logits) == 1)


def test_interchange_accuracy_of_all_classes_and_of_the_pair():
    logits = _logits([3.0, 1.0, 2.0], [1.0, 0.0, 5.0], [0.0, 2.0, 1.0], [4.0, 4.0, 0.0])
    assert metrics.interchange_accuracy(0, 1)(logits).tolist() == [1, 0, 0, 0]
    assert metrics.interchange_accuracy(0, 1, among="pair")(logits).tolist() == [1, 1, 0, 0]
    assert metrics.interchange_accuracy(0, 1, toward="foil")(logits).tolist() == [0, 0, 1, 0]
    assert metrics.interchange_accuracy(("red", "blue")).foil == "blue"
    for wrong in ({"toward": "clean"}, {"among": "two"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            metrics.interchange_accuracy(0, 1, **wrong)


# -- actions -------------------------------------------------------------------------------------------------------------------------------


def test_action_distance_by_hand():
    reference = marked(torch.zeros(1, 2, 3), "none")
    action = marked(torch.tensor([[[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]]]), "none")
    assert metrics.action_distance(reference)(action).tolist() == [7.0]
    assert metrics.action_distance(reference, step=0)(action).tolist() == [13.0]
    assert metrics.action_distance(reference, dims=[0, 1], step=0)(action).tolist() == [5.0]
    with pytest.raises(InputError, match="dimension 3"):
        metrics.action_distance(reference, dims=[3])(action)
    with pytest.raises(InputError, match="chunk of 2"):
        metrics.action_distance(reference, step=2)(action)
    with pytest.raises(InputError, match="tokens"):
        metrics.action_distance(reference)(marked(action.clone(), "softmax"))


# -- from one run to another ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.floats(-2, 2), st.integers(0, 1000))
def test_the_transfer_coefficient_of_a_point_on_the_way_is_its_share(alpha, seed):
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 4, 5, generator=rng, dtype=torch.float64)
    y = b + alpha * (a - b)
    beta, residual = metrics.transfer(y, a, b)
    assert torch.allclose(beta, torch.full((3,), alpha, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(residual, torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(metrics.transfer_coefficient(a, b)(marked(y, "none")), beta)


def test_what_moves_elsewhere_is_residual_and_equal_runs_have_no_share():
    a, b = _logits([2.0, 0.0], [1.0, 1.0]), _logits([0.0, 0.0], [1.0, 1.0])
    with pytest.warns(UserWarning, match="no β"):
        beta, residual = metrics.transfer(b + torch.tensor([1.0, 3.0], dtype=torch.float64), a, b)
    assert beta[0].item() == pytest.approx(0.5)
    assert residual[0].item() == pytest.approx(1.5)
    assert beta[1].isnan()


def test_taking_examples_takes_those_of_both_references():
    a, b = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = metrics.transfer_coefficient(a, b)
    y = a + b
    assert torch.allclose(whole.take([2, 0], 4)(y[[2, 0]]), whole(y)[[2, 0]])


def test_a_comparison_without_its_run_says_so():
    with pytest.raises(InputError, match="js has no reference"):
        metrics.js()(_logits([0.0, 1.0]))
    with pytest.raises(InputError, match="not the output's"):
        metrics.js(_logits([0.0, 1.0]))(_logits([0.0, 1.0, 2.0]))


# -- over examples -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patched", "expected"), [(2.0, 0.0), (0.0, 1.0), (-2.0, 2.0), (1.0, 0.5)])
def test_fldd_of_known_logit_differences(patched, expected):
    clean = torch.tensor([1.5, 2.5, 2.0, 2.0])
    found = metrics.fldd(clean - 2.0 + patched, clean)
    assert found.item() == pytest.approx(expected)


def test_fldd_divides_means_and_refuses_a_clean_difference_that_is_noise():
    clean = torch.tensor([1.0, 1.2, 0.9, 0.3])
    assert metrics.fldd(torch.zeros(4), clean).item() == pytest.approx(1.0)
    noise = torch.tensor([1.0, -1.1, 0.9, -0.7])
    assert metrics.fldd(torch.zeros(4), noise).isnan()


@pytest.mark.parametrize(
    ("row", "layer"),
    [
        ([1, 1, -1, -1], 2),
        ([1, -1, 1, -1], 3),
        ([-1, 1, 1, 1], 1),
        ([1, 1, 1, 1], None),
        ([1, float("nan"), -1, -1], None),
    ],
)
def test_flip_layer_of_known_answers(row, layer):
    found = metrics.flip_layer(torch.tensor(row, dtype=torch.float64)[:, None]).item()
    assert math.isnan(found) if layer is None else found == layer


def test_flip_layer_and_fldd_of_a_patching_result():
    base = torch.tensor([-2.0, -2.0, -2.5])
    effect = torch.tensor([[4.0, 4.0, 4.5], [1.0, 3.0, 4.5], [0.0, 0.0, 4.5]])
    result = PatchingResult(effect, {"layer": [3, 5, 7], "example": [0, 1, 2]}, base=base, source=-base)
    flips = result.flip_layer()
    assert flips.axes == {"example": [0, 1, 2]}
    assert flips.values[:2].tolist() == [5.0, 7.0]
    assert flips.values[2].isnan()
    assert torch.allclose(result.fldd, -effect.double().mean(-1) / base.double().mean(-1))
    several = PatchingResult(
        torch.stack([effect, -effect]),
        {"metric": ["a", "b"], "layer": [3, 5, 7], "example": [0, 1, 2]},
        base=torch.stack([base, -base]),
        source=torch.stack([-base, base]),
    )
    assert torch.equal(several.flip_layer().values[0], flips.values) or torch.allclose(
        several.flip_layer().values[0], flips.values, equal_nan=True
    )
    with pytest.raises(InputError, match="layer"):
        PatchingResult(effect, {"position": [0, 1, 2], "example": [0, 1, 2]}, base=base, source=-base).flip_layer()


# -- files and names -----------------------------------------------------------------------------------------------------------------------

EVERY = {
    "Accuracy": metrics.accuracy(1),
    "ActionDim": metrics.action_dim(1, step=None),
    "ActionDistance": metrics.action_distance(torch.ones(1, 2, 2), dims=[1], step=0),
    "ActionEstimate": metrics.action_estimate(1, step=None),
    "InterchangeAccuracy": metrics.interchange_accuracy(1, 0, toward="foil", among="pair"),
    "JS": metrics.js(torch.ones(1, 2)),
    "KL": metrics.kl(torch.ones(1, 2)),
    "LogProb": metrics.logprob(1),
    "Logit": metrics.logit(1),
    "LogitDiff": metrics.logit_diff(1, 0),
    "Margin": metrics.margin(1),
    "Prob": metrics.prob(1),
    "Rank": metrics.rank(1),
    "Success": metrics.success(),
    "TransferCoefficient": metrics.transfer_coefficient(torch.ones(1, 2), torch.zeros(1, 2)),
}


@pytest.mark.parametrize("name", sorted(registry._KINDS))
def test_every_metric_comes_back_from_a_file_as_it_was(name):
    metric, tensors = EVERY[name], {}
    output = torch.tensor([[[0.5, 2.0], [1.0, -1.0]]]) if name.startswith("Action") else torch.tensor([[0.5, 2.0]])
    output = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 2.0, 1.0]]]) if name == "Success" else output
    output = marked(output, "none" if name.startswith("Action") else "softmax")
    back = restored(stored(metric, tensors, True), tensors, {})
    assert type(back).__name__ == name
    start = {"noise": torch.ones(1, 2, 2), "timestep": torch.ones(1)}
    assert torch.equal(back(output, start), metric(output, start))


def test_names_are_those_of_the_functions():
    assert all(type(make()).function == name == make.__name__ for name, make in metrics.NAMES.items())
    assert all(callable(getattr(metrics, kind.function)) for kind in registry._KINDS.values())
