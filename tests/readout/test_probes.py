"""Probes: known answers, a trained model, and the decision layer."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.data.questions import sample_largest
from circuitvision.errors import InputError
from circuitvision.plots import probes as figures
from circuitvision.readout import collect, decision_layer, linear_probe
from circuitvision.readout.probes.decisions import DecisionLayers
from circuitvision.readout.probes.fitting import fit, raw, standardiser
from circuitvision.statistics import wilson
from tests.readout.common import gaussians

# -- known answers -------------------------------------------------------------------------------------------------------------------------


def test_separable_classes_are_told_and_shuffled_ones_are_not():
    x, labels = gaussians(800, 4, apart=12.0)
    result = linear_probe(None, {"a": x}, labels, shuffles=20)
    assert float(result.values[0]) > 0.99
    assert abs(float(result.control[0]) - 0.25) < 3 * float(result.control_sd[0]) < 0.15
    assert float(result.p_value[0]) == pytest.approx(1 / 21)
    assert result.chance == pytest.approx(0.25)


def test_features_without_information_stay_at_chance_even_where_they_fit_the_training_part():
    x = torch.randn(200, 400, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(200) % 2
    with pytest.warns(UserWarning, match="140 training examples for 400 features"):
        result = linear_probe(None, {"a": x}, labels)
    assert float(result.train[0]) == 1.0
    assert abs(float(result.values[0]) - 0.5) < 0.2
    assert float(result.p_value[0]) > 0.05


def test_numbers_are_predicted_by_ridge_regression():
    x, _ = gaussians(400, 2, apart=1.0)
    y = x @ torch.arange(12.0) + 3
    result = linear_probe(None, {"a": x, "noise": torch.randn(400, 5)}, y.double(), penalty=1e-6)
    assert float(result.values[0]) > 0.999
    assert abs(float(result.values[1])) < 0.2
    assert result.classes == []
    assert abs(float(result.control[0])) < 0.2
    assert result.weights.numel() == 0
    alone = linear_probe(None, {"a": x}, y.double())
    torch.testing.assert_close(
        x[alone.held_out].double() @ alone.weights[0, 0] + alone.bias[0, 0], alone.predictions[0]
    )


@pytest.mark.parametrize(("examples", "features"), [(60, 8), (20, 50)])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_solution_is_stationary_for_tall_and_wide_features(examples, features, n_classes):
    """The promised objective, written out on standardised features, has no slope at the weights that are given back."""
    x, labels = gaussians(examples, n_classes, apart=2.0, features=features)
    x = (x * torch.logspace(-2, 2, features) + 7).double()
    z = (x - x.mean(0)) / x.std(0, unbiased=False)
    prepared, penalty = standardiser(x.numpy()), 0.03
    weights, bias = map(
        torch.from_numpy, raw(prepared, fit(prepared.transform(x.numpy()), labels.numpy(), n_classes, penalty))
    )
    full = (weights * x.std(0, unbiased=False)).requires_grad_(True)
    offset = (bias + weights @ x.mean(0)).requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(z @ full.T + offset, labels) + penalty / 2 * full.square().sum()
    for gradient in torch.autograd.grad(loss, (full, offset)):
        assert float(gradient.abs().max()) < 1e-3
    y = torch.randn(examples, dtype=torch.float64)
    weights, bias = map(torch.from_numpy, raw(prepared, fit(prepared.transform(x.numpy()), y.numpy(), 0, penalty)))
    normal = z.T @ z / examples + penalty * torch.eye(features)
    wanted = torch.linalg.solve(normal, z.T @ (y - y.mean()) / examples)
    torch.testing.assert_close(weights[0] * x.std(0, unbiased=False), wanted)
    assert float(bias[0] + weights[0] @ x.mean(0)) == pytest.approx(float(y.mean()))


def test_weights_act_on_activations_as_they_are():
    x, labels = gaussians(300, 3, apart=4.0)
    x = 100 + 5 * x
    result = linear_probe(None, {"a": x, "b": 2 * x}, labels, shuffles=2, penalty=1e-3)
    for site, values in enumerate((x, 2 * x)):
        logits = values[result.held_out].double() @ result.weights[site].T + result.bias[site]
        assert torch.equal(logits.argmax(-1), result.predictions[site])
    assert torch.equal(result.predictions[0], result.predictions[1])


def test_a_feature_that_is_constant_up_to_rounding_says_nothing():
    labels = torch.arange(200) % 2
    x = torch.full((200, 3), 5.0) + 1e-6 * labels[:, None]
    assert len(set(x[:, 0].tolist())) == 2
    result = linear_probe(None, {"a": x}, labels)
    assert float(result.values[0]) == result.chance
    small = 1e-20 * (labels[:, None] - 0.5) * torch.ones(200, 3)
    assert float(linear_probe(None, {"a": small}, labels).values[0]) == 1.0


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals(right, count, low, high):
    found = wilson(torch.tensor(right / count), count)
    assert (float(found[0]), float(found[1])) == pytest.approx((low, high), abs=1e-3)


# -- a trained model -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    model = cv.organisms.load("shapes-vit")
    drawn = sample_largest(240, 5)
    return model, model.inputs(images=[scene.image for scene, _ in drawn]), [shape for _, shape in drawn]


def test_the_class_token_learns_the_shape_in_the_first_block(shapes):
    model, inputs, labels = shapes
    result = linear_probe(model, inputs, labels, positions="cls", label_name="shape", shuffles=19, penalty=1e-3)
    assert result.layers == ["input", 0, 1, 2]
    assert len(result.predictions[0].unique()) == 1  # every image has the same class token there
    assert float(result.values[0]) <= 0.3
    assert float(result.values[1:].min()) > 0.9
    assert float(result.p_value[1]) == pytest.approx(0.05)
    assert (result.control - 0.2).abs().max() < 0.15
    settled = result.decisions(2)
    assert settled.axes["example"] == result.held_out.tolist()
    assert settled.stable_but_wrong < 0.1
    assert "shape can be read after layer 0" in figures.probe(result).layout.title.text
    assert result.plot().layout.yaxis.tickformat == ".0%"
    assert len(figures.probe({"a": result, "b": result}).data) == 6
    assert settled.plot().layout.title.text


# -- decision layers -----------------------------------------------------------------------------------------------------------------------


def test_the_decision_layer_of_the_paper():
    sequence = torch.tensor([[3], [1], [1], [1], [2], [2], [2]])
    two = decision_layer(sequence, 2)
    assert two.values.tolist() == [1]
    assert two.stable.tolist() == [True]
    assert two.decided.tolist() == [1]
    assert two.revised == 1.0
    with pytest.warns(UserWarning, match="agrees over 4"):
        three = decision_layer(sequence, 3)
    assert three.values.tolist() == [6]
    assert three.stable.tolist() == [False]
    assert three.cumulative.tolist() == [0.0] * 7
    assert three.shares == {"early": 0.0, "middle": 0.0, "late": 0.0, "never": 1.0}


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 1000))
def test_decision_layers_equal_the_definition(k, anchors, seed):
    if k >= anchors:
        k = anchors - 1
    predictions = torch.randint(0, 2, (anchors, 30), generator=torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = decision_layer(predictions, k, target=predictions[-1])
    for example, sequence in enumerate(predictions.T.tolist()):
        layers = [l for l in range(anchors - k) if len(set(sequence[l : l + k + 1])) == 1]  # noqa: E741
        assert int(found.values[example]) == (layers[0] if layers else anchors - 1)
        assert bool(found.stable[example]) == bool(layers)
        assert bool(found.wrong[example]) == (bool(layers) and sequence[layers[0]] != sequence[-1])
    assert float(found.cumulative[-1]) == pytest.approx(float(found.stable.double().mean()))
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_never_settled_examples_are_counted_apart_from_late_ones(tmp_path):
    sequences = [[0] * 7, [0, 1, 0, 0, 0, 1, 1], [0, 1, 2, 3, 5, 4, 4], [0, 1, 0, 1, 0, 1, 0]]
    found = decision_layer(torch.tensor(sequences).T, 1, target=torch.tensor([0, 1, 4, 0]), layers=["input", *range(6)])
    assert found.values.tolist() == [0, 2, 5, 6]
    assert found.stable.tolist() == [True, True, True, False]
    assert found.shares == {"early": 0.25, "middle": 0.25, "late": 0.25, "never": 0.25}
    assert found.stable_but_wrong == pytest.approx(1 / 3)
    assert found.cumulative.tolist() == [0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75]
    again = DecisionLayers.load(found.save(tmp_path / "decisions.npz"))
    assert torch.equal(again.stable, found.stable)
    assert again.layers == ["input", *range(6)]
    frame = again.to_frame()
    assert frame["layer"].tolist() == ["input", 1, 4, 5]
    assert frame["stable"].tolist() == [True, True, True, False]
    assert again.highlights()["never"] == "25%"
    bars = again.plot()
    assert sum(sum(bar.y) for bar in bars.data) == pytest.approx(1.0)


def test_early_ends_and_late_begins_where_it_is_said():
    settled = DecisionLayers(
        torch.tensor([2, 3, 6, 7]), {"example": list(range(4))}, stable=torch.ones(4, dtype=torch.bool), layers=list(range(11))
    )  # fmt: skip
    assert settled.shares == {"early": 0.25, "middle": 0.5, "late": 0.25, "never": 0.0}


def test_a_lens_gives_predictions_as_well(shapes):
    model, inputs, _ = shapes
    few = {"pixel_values": inputs["pixel_values"][:20]}
    vectors = collect(model, few, model.vision.stream_sites(), positions="cls")
    top = torch.stack([(vector @ model.vision.W_U).argmax(-1) for vector in vectors.values()])
    assert decision_layer(top, 1).values.shape == (20,)


@pytest.mark.parametrize(
    ("predictions", "options", "message"),
    [
        (torch.rand(4, 3), {}, "whole numbers"),
        (torch.zeros(4, dtype=torch.long), {}, "layer example"),
        (torch.zeros(3, 2, dtype=torch.long), {"k": 3}, "less than the 3 anchors"),
        (torch.zeros(3, 2, dtype=torch.long), {"k": 1.5}, "whole number"),
        (torch.zeros(3, 2, dtype=torch.long), {"target": torch.zeros(3)}, "must fit"),
        (torch.zeros(3, 2, dtype=torch.long), {"layers": [0]}, "must fit"),
    ],
)
def test_meaningless_decision_layers_are_refused(predictions, options, message):
    with pytest.raises(InputError, match=message):
        decision_layer(predictions, **options)


def test_wrong_needs_the_right_answers():
    with pytest.raises(InputError, match="target"):
        _ = decision_layer(torch.zeros(4, 2, dtype=torch.long)).wrong
