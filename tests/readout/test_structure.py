"""Principal components and CKA: planted structure is found, signs are fixed, what is undefined is NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.data.questions import sample_largest
from circuitvision.errors import InputError
from circuitvision.readout import cka, collect, pca
from circuitvision.readout.probes.structure import PCAResult
from tests.readout.layouts import by_row


def planted(count: int = 60, features: int = 9, seed: int = 0):
    """Rank-2 data: two orthonormal directions with weights 5 and 2, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(features, 2, generator=generator, dtype=torch.float64))[0].T
    weights = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    weights = torch.linalg.qr(weights - weights.mean(0))[0] * torch.tensor([5.0, 2.0])
    mean = torch.randn(features, generator=generator, dtype=torch.float64)
    return mean + weights @ directions, directions, weights, mean


# -- principal components ------------------------------------------------------------------------------------------------------------------


def test_planted_rank_two_data_are_recovered_with_their_signs():
    x, directions, weights, _ = planted()
    signs = torch.stack([direction[direction.abs().argmax()].sign() for direction in directions])
    found = pca(x, 2)
    torch.testing.assert_close(found.components, directions * signs[:, None])
    torch.testing.assert_close(by_row(found), weights * signs)
    torch.testing.assert_close(found.explained, torch.tensor([25 / 29, 4 / 29], dtype=torch.float64))
    torch.testing.assert_close(found.center, x.mean(0))
    torch.testing.assert_close(found.center + by_row(found) @ found.components, x)


@given(st.integers(0, 1000), st.integers(3, 12), st.integers(3, 12))
def test_components_are_orthonormal_and_signed_whatever_the_data(seed, count, features):
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = pca(x, 2)
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(2, dtype=torch.float64))
    for component in found.components:
        assert float(component[component.abs().argmax()]) > 0
    torch.testing.assert_close(by_row(found), found.transform(x))
    torch.testing.assert_close(pca(-x, 2).components, found.components)
    assert 0 < float(found.explained.sum()) <= 1 + 1e-12


def test_of_equal_loadings_the_first_is_positive_whatever_the_rounding():
    step = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for wobble in (1e-12, -1e-12):
        x = torch.outer(torch.linspace(-1, 1, 9, dtype=torch.float64), step * torch.tensor([1.0, 1.0 + wobble]))
        assert pca(x, 1).components[0, 0] > 0


def test_what_has_no_direction_is_nan():
    x, *_ = planted()
    with pytest.warns(UserWarning, match="spread in 2 directions, so 1"):
        three = pca(x, 3)
    assert three.components[2].isnan().all()
    assert not three.components[:2].isnan().any()
    assert float(three.explained[2]) == 0.0
    assert not by_row(three)[:, 2].any()
    with pytest.warns(UserWarning, match="0 directions"):
        flat = pca(torch.full((8, 3), 0.1) + 1e-9 * torch.randn(8, 3), 2)
    assert flat.explained.isnan().all()
    assert not by_row(flat).any()


def test_labels_are_kept_and_their_share_measured(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = ["a", "b"] * 20
    side = torch.tensor([1.0, -1.0] * 20)
    apart = torch.outer(side, torch.tensor([3.0, 0.0])) + 1e-3 * torch.randn(40, 2, generator=generator)
    assert float(pca(apart, 2, labels=labels).between) == pytest.approx(1.0)
    mixed = torch.randn(40, 2, generator=generator)
    assert float(pca(mixed, 2, labels=labels).between) < 0.2
    assert float(pca(apart, 2, labels=side.double()).between) == pytest.approx(1.0)
    assert math.isnan(float(pca(apart, 2).between))
    saved = PCAResult.load(pca(apart, 2, labels=labels, label_name="side").save(tmp_path / "pca.safetensors"))
    assert saved.labels == labels
    assert saved.plot().layout.title.text == "The side makes up 100% of the first 2 components"
    assert {trace.name for trace in saved.plot().data} == {"a", "b"}
    assert len(pca(mixed, 1).plot().data) == 1


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.randn(5, 3, 2), {}, "example feature"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), {}, "finite"),
        (torch.randn(5, 3), {"n_components": 4}, "at least as many"),
        (torch.randn(5, 3), {"labels": [0, 1]}, "2 labels for 5"),
    ],
)
def test_meaningless_components_are_refused(x, options, message):
    with pytest.raises(InputError, match=message):
        pca(x, **options)


def test_layers_of_different_widths_are_refused_and_must_be_named():
    with pytest.raises(InputError, match="one shape"):
        pca({"a": torch.randn(5, 3), "b": torch.randn(5, 4)})
    stream = pca({"a": torch.randn(9, 3), "b": torch.randn(9, 3)})
    with pytest.raises(InputError, match="Name the layer"):
        stream.transform(torch.randn(2, 3))
    with pytest.raises(InputError, match="3 features"):
        stream.transform(torch.randn(2, 5), layer="a")


@pytest.fixture(scope="module")
def shapes():
    model = cv.organisms.load("shapes-vit")
    drawn = sample_largest(80, 5)
    return model, model.inputs(images=[scene.image for scene, _ in drawn]), [shape for _, shape in drawn]


def test_the_stream_of_a_trained_model_layer_by_layer(shapes):
    model, inputs, labels = shapes
    with pytest.warns(UserWarning, match="0 directions"):
        found = pca(
            collect(model, inputs, model.vision.stream_sites(), positions="cls"), labels=labels, label_name="shape"
        )
    assert list(found.axes) == ["layer", "component", "example"]
    assert found.axes["layer"] == ["input", 0, 1, 2]
    assert found.explained[0].isnan().all()
    assert math.isnan(float(found.between[0]))
    assert float(found.between[3]) > 0.8
    vectors = collect(model, inputs, model.vision.stream_sites(), positions="cls")
    alone = pca(vectors["vision.blocks.1.hook_resid_post"], 2)
    torch.testing.assert_close(by_row(found)[2], by_row(alone))
    torch.testing.assert_close(found.transform(vectors["vision.blocks.1.hook_resid_post"], layer=1), by_row(alone))
    figure = found.plot()
    assert len(figure.data) == 4 * 5
    assert "all examples alike" in figure.layout.annotations[0].text


# -- CKA -----------------------------------------------------------------------------------------------------------------------------------


def test_cka_does_not_see_rotation_shift_and_scale():
    x = torch.randn(30, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0)
    assert cka(x, 3 * x @ rotation + 5, unbiased=True) == pytest.approx(1.0)
    assert cka(x, x @ torch.randn(6, 6, dtype=torch.float64)) < 0.999


@pytest.mark.parametrize("features", [4, 60])
def test_cka_equals_its_formula(features):
    x, y = torch.randn(20, features, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    y[:, 0] += x[:, 0]
    cx, cy = x - x.mean(0), y - y.mean(0)
    wanted = (cy.T @ cx).norm() ** 2 / ((cx.T @ cx).norm() * (cy.T @ cy).norm())
    assert cka(x, y) == pytest.approx(float(wanted))
    gram = [part @ part.T for part in (x, y)]
    hollow = [g.clone().fill_diagonal_(0) for g in gram]

    def hsic(k, l):  # noqa: E741
        n = len(k)
        return float((k @ l).trace() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(1)) / (n - 2))

    ratio = hsic(*hollow) / math.sqrt(hsic(hollow[0], hollow[0]) * hsic(hollow[1], hollow[1]))
    assert cka(x, y, unbiased=True) == pytest.approx(ratio)


def test_unrelated_wide_activations_look_alike_unless_the_estimate_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(20, 200, generator=generator) for _ in range(2)] for _ in range(20)]
    assert sum(cka(*pair) for pair in pairs) / 20 > 0.8
    assert abs(sum(cka(*pair, unbiased=True) for pair in pairs) / 20) < 0.02


def test_cka_of_what_does_not_vary_is_nan():
    with pytest.warns(UserWarning, match="does not vary"):
        assert math.isnan(cka(torch.ones(10, 3), torch.randn(10, 3)))
    with pytest.raises(InputError, match="same examples"):
        cka(torch.randn(5, 3), torch.randn(6, 3))
    with pytest.raises(InputError, match="at least 4"):
        cka(torch.randn(3, 3), torch.randn(3, 3), unbiased=True)
    with pytest.raises(InputError, match="same examples"):
        cka({"a": torch.randn(3, 3)}, unbiased=True)


def test_the_matrix_holds_every_pair(shapes):
    model, inputs, _ = shapes
    vectors = collect(model, inputs, model.vision.stream_sites(), positions="patch")
    found = cka(vectors)
    torch.testing.assert_close(by_row(found), by_row(found).T)
    torch.testing.assert_close(by_row(found).diagonal(), torch.ones(4, dtype=torch.float64))
    names = list(vectors)
    assert float(by_row(found)[0, 2]) == pytest.approx(cka(vectors[names[0]], vectors[names[2]]))
    assert "changes most between" in found.plot().layout.title.text
    other = cka(vectors, {"z": torch.randn(80, 3)})
    assert by_row(other).shape == (4, 1)
    assert "most alike" in other.plot().layout.title.text
