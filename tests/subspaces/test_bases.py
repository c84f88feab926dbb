"""Interchange in a subspace: what it moves, what it leaves, what does not matter, on tensors and at sites of models."""

from __future__ import annotations

import pytest
import torch

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.subspaces import (
    SitePairs,
    interchanged,
    matched_random_basis,
    mean_difference,
    orthonormal,
    principal_components,
    random_basis,
)
from tests.subspaces.common import DOUBLE, acting, pairs_of


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("k", [1, 3])
def test_the_span_takes_the_source_and_the_rest_stays(k: int) -> None:
    base, source, basis = drawn(5, 8), drawn(5, 8, seed=1), drawn(8, k, seed=2)
    found = interchanged(base, source, basis)
    torch.testing.assert_close(found @ basis, source @ basis)
    beside = torch.linalg.qr(torch.cat([basis, drawn(8, 8 - k, seed=3)], 1))[0][:, k:]
    torch.testing.assert_close(found @ beside, base @ beside)
    torch.testing.assert_close(interchanged(found, source, basis), found)


def test_a_whole_basis_is_the_source() -> None:
    base, source = drawn(5, 6), drawn(5, 6, seed=1)
    torch.testing.assert_close(interchanged(base, source, drawn(6, 6, seed=2)), source)


def test_sign_scale_and_rotation_inside_the_span_do_not_matter() -> None:
    base, source, basis = drawn(5, 8), drawn(5, 8, seed=1), drawn(8, 2, seed=2)
    wanted = interchanged(base, source, basis)
    for turned in (-basis, 7.0 * basis, basis @ drawn(2, 2, seed=4)):
        torch.testing.assert_close(interchanged(base, source, turned), wanted)


def test_a_direction_moves_by_its_share() -> None:
    """The three neurons of METHODS 12.3: h = x (1, 0, 1), y = h · (0, 2, 1)."""
    base, source = torch.tensor([[1.0, 0, 1]]), torch.tensor([[-1.0, 0, -1]])
    found = interchanged(base, source, torch.tensor([1.0, 1, 0]))
    torch.testing.assert_close(found, torch.tensor([[0.0, -1, 1]]))
    torch.testing.assert_close(found @ torch.tensor([0.0, 2, 1]), torch.tensor([-1.0]))


@pytest.mark.parametrize(
    "basis",
    [
        torch.zeros(4),
        torch.ones(4, 2),
        torch.ones(2, 4),
        torch.full((4,), torch.nan),
        torch.zeros(0),
        torch.ones(2, 2, 2),
    ],
)
def test_a_basis_without_full_rank_is_refused(basis: torch.Tensor) -> None:
    with pytest.raises(InputError):
        orthonormal(basis)


def test_mean_difference_takes_the_sign_of_what_changes() -> None:
    base, source = torch.zeros(2, 2), torch.tensor([[2.0, 0], [-2.0, 0]])
    assert mean_difference(base, source).tolist() == [0.0, 0.0]
    assert mean_difference(base, source, torch.tensor([1.0, -1.0])).tolist() == [2.0, 0.0]


def test_principal_components_hold_the_variance_asked_for() -> None:
    natural = drawn(200, 3) @ torch.diag(torch.tensor([10.0, 1.0, 0.01], dtype=DOUBLE))
    first, deviations = principal_components(natural, 0.9)
    assert first.shape == (3, 1)
    assert abs(float(first[0, 0])) > 0.99
    assert float(deviations[0]) == pytest.approx(float(natural[:, 0].std()), rel=0.05)
    assert principal_components(natural, 0.99999)[0].shape == (3, 2)
    with pytest.raises(InputError):
        principal_components(natural, k=4)


def test_random_bases_are_seeded_and_matched_ones_stay_where_activations_vary() -> None:
    natural = torch.cat([drawn(50, 3), torch.zeros(50, 5, dtype=DOUBLE)], 1)
    torch.testing.assert_close(random_basis(8, 2, 3), random_basis(8, 2, 3))
    assert not torch.allclose(random_basis(8, 2, 3), random_basis(8, 2, 4))
    found = matched_random_basis(natural, 2, 1)
    torch.testing.assert_close(found.T @ found, torch.eye(2, dtype=DOUBLE))
    assert float(found[3:].abs().max()) < 1e-9
    with pytest.raises(InputError):
        matched_random_basis(natural, 4)


# -- at sites of models ------------------------------------------------------------------------------------------------------------------------


PLACES = [
    ("vit", "vision.blocks.1.hook_resid_pre", 0, None),
    ("vit", "vision.blocks.0.mlp.hook_post", [0, 2], None),
    ("dinov2-swiglu", "vision.blocks.0.attn.hook_z", None, [1]),
    ("llava-clip-llama", "vision.blocks.0.hook_resid_post", "patch", None),
    ("llava-clip-llama", "projector.hook_out", None, None),
    ("llava-clip-llama", "language.blocks.1.attn.hook_v", "last", [0]),
    ("paligemma", "language.blocks.1.hook_mlp_out", "last", None),
    ("clip", "vision.blocks.1.hook_resid_pre", 0, None),
]


@pytest.mark.parametrize(("name", "site", "positions", "heads"), PLACES)
def test_the_edit_and_the_values_say_the_same_at_every_tower(name, site, positions, heads) -> None:
    model, pairs = pairs_of(name, answers=[0, 0, 0, 0], foils=[1, 1, 1, 1])
    with SitePairs(model, pairs, site, positions=positions, heads=heads, allow_wrong=True, batch_size=2) as data:
        basis = random_basis(data.width, 2, seed=5)
        by_edit = data.under(basis)
        by_value, whole = data.with_values([interchanged(data.base, data.source, basis), data.source])
        torch.testing.assert_close(by_edit.difference, by_value.difference)
        full = data.under(torch.eye(data.width, dtype=DOUBLE))
        torch.testing.assert_close(full.difference, whole.difference)
        again = data.with_values([data.base])[0]
        torch.testing.assert_close(again.difference, data.clean().difference)
        assert not torch.allclose(whole.difference, data.clean().difference)
        wanted = []
        for batch in pairs.batches(model, 2):
            moved = model.run_with_cache(batch.other, names_filter=site)[1][site].detach()
            moved = batch.matched(site.partition(".")[0], moved) if name != "clip" else moved
            run = model.run(batch.inputs, [edits.project(site, basis, moved, positions=positions, heads=heads)])
            wanted.append(cv_difference(run, batch.inputs))
        torch.testing.assert_close(by_edit.difference, torch.cat(wanted).double())


def cv_difference(output: torch.Tensor, inputs: dict) -> torch.Tensor:
    from circuitvision.metrics import logit_diff

    return logit_diff(0, 1)(output, inputs).detach()


def test_a_policy_is_measured_by_its_metric() -> None:
    from circuitvision.metrics import action_dim

    model, pairs = acting()
    with SitePairs(model, pairs, "action.blocks.0.hook_resid_post", metric=action_dim(0)) as data:
        full = data.with_values([data.source])[0]
        clean, source = data.clean().difference, data.counterfactual().difference
        near = (full.difference - source).abs() < (full.difference - clean).abs()
        assert full.accuracy.tolist() == near.double().tolist()
        assert data.counterfactual().accuracy.tolist() == [1.0] * 4


def test_gradients_are_those_of_the_effect() -> None:
    model, pairs = pairs_of("vit", answers=[0, 0, 0, 0], foils=[1, 1, 1, 1])
    with SitePairs(model, pairs, "vision.blocks.1.hook_resid_pre", positions=0, allow_wrong=True, batch_size=3) as data:
        step, way = 1e-6, drawn(*data.base.shape, seed=3)
        up, down = data.with_values([data.base + step * way, data.base - step * way])
        slope = (down.difference - up.difference) / (2 * step)
        torch.testing.assert_close((data.gradients() * way).sum(1), slope, rtol=1e-5, atol=1e-7)


def test_keeping_nothing_changes_nothing() -> None:
    model, pairs = pairs_of("vit", answers=[0, 0, 0, 0], foils=[1, 1, 1, 1])
    basis, found = random_basis(32, 2), []
    for keep in (True, False):
        with SitePairs(
            model, pairs, "vision.blocks.1.hook_mlp_out", positions=0, allow_wrong=True, batch_size=2, keep=keep
        ) as data:
            found.append(data.under(random_basis(data.width, 2)).difference)
            assert all((part.run is not None) == keep for part in data.parts)
    assert basis.shape == (32, 2)
    torch.testing.assert_close(*found)
    assert (model.engine.handles, model.engine.stack) == ([], [])
