"""Known answers of the causal methods that no other file holds: metrics at their fixed points, recorded tables, traps of published code."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision import metrics
from circuitvision.metrics import fldd
from circuitvision.subspaces import bases, divergence, fit_basis, fit_boundless, geometry, orthonormal, random_basis
from tests.sweeps.drawing import inputs_of, model_of

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# -- effect and divergence metrics -------------------------------------------------------------------------------------------------------------


def test_the_divergence_from_a_run_has_no_gradient_at_that_run() -> None:
    logits = drawn(3, 7).requires_grad_()
    value = metrics.kl(logits.detach())(logits)
    torch.testing.assert_close(value, torch.zeros(3, dtype=DOUBLE), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(3, 7, dtype=DOUBLE), atol=1e-12, rtol=0)
    (away,) = torch.autograd.grad(metrics.kl(drawn(3, 7, seed=1))(logits).sum(), logits)
    assert float(away.abs().max()) > 1e-2


RECORDED = [
    ("full MLP8", 3.632, -8.0, -0.07),
    ("DAS MLP8", 1.821, 45.9, 0.38),
    ("its row part", 2.918, 13.2, 0.11),
    ("its null part", 3.364, 0.0, 0.0),
    ("full resid_post 8", -0.723, 121.5, 1.0),
    ("DAS resid_post 8", -1.309, 138.9, 1.14),
    ("its name-mover row part", -0.874, 126.0, 1.04),
    ("its null part", 2.906, 13.6, 0.11),
    ("gradient", -0.320, 109.5, 0.90),
    ("mean difference", -0.650, 119.3, 0.98),
]
"""GPT-2-small, IOI: logit difference under each intervention (clean 3.364), FLDD in percent, effect in units of the full residual patch."""


@pytest.mark.parametrize(("name", "patched", "percent", "effect"), RECORDED)
def test_recorded_logit_differences_give_their_recorded_shares(
    name: str, patched: float, percent: float, effect: float
) -> None:
    clean, source = torch.full((50,), 3.364, dtype=DOUBLE), torch.full((50,), -0.723, dtype=DOUBLE)
    under = torch.full((50,), patched, dtype=DOUBLE)
    assert 100 * float(fldd(under, clean)) == pytest.approx(percent, abs=0.06), name
    assert float(metrics.restored_share(under - clean, clean, source)) == pytest.approx(effect, abs=0.006), name


def test_an_override_rate_is_a_step_and_the_transfer_coefficient_is_a_line() -> None:
    """Trajectories that share their mean (cosine .944): just past half-way every one counts as overridden."""
    shared, noise = drawn(1, 40), 0.24 * drawn(2, 2000, 40, seed=1)
    own, source = shared + noise[0], shared + noise[1]
    assert float(torch.cosine_similarity(own, source).mean()) == pytest.approx(0.944, abs=0.02)
    rates, betas = [], []
    for share in (0.0, 0.45, 0.55, 1.0):
        actions = own + share * (source - own)
        closer = torch.cosine_similarity(actions, source) > torch.cosine_similarity(actions, own)
        rates.append(float(closer.double().mean()))
        found = metrics.transfer(actions, source, own)
        betas.append(float(found.beta.mean()))
        assert float(found.residual.abs().max()) < 1e-6
    assert rates[1] < 0.01 < 0.99 < rates[2]
    assert betas == pytest.approx([0.0, 0.45, 0.55, 1.0], abs=1e-9)


# -- directions --------------------------------------------------------------------------------------------------------------------------------


def test_the_first_component_of_data_of_rank_one_is_their_direction_up_to_sign() -> None:
    direction = orthonormal(drawn(9))[:, 0]
    data = drawn(1, 9, seed=1) + 3.0 * drawn(50, 1, seed=2) * direction
    components, deviations = bases.principal_components(data)
    assert components.shape == (9, 1)
    assert abs(float(components[:, 0] @ direction)) == pytest.approx(1.0, abs=1e-12)
    assert float(deviations[0]) == pytest.approx(float((data @ direction).std()), rel=1e-12)


# -- traps -------------------------------------------------------------------------------------------------------------------------------------


def test_a_qr_of_centred_weights_would_read_a_direction_that_is_mapped_to_nothing() -> None:
    """Writing weights that are centred have rank m − 1: QR completes their span by an arbitrary direction, and the row part looks larger."""
    weights = drawn(32, 8)
    weights = weights - weights.mean(1, keepdim=True)
    found = geometry.parts(random_basis(32, seed=1), weights)
    assert found.rank == 7
    by_qr = torch.linalg.qr(weights)[0]
    of_qr = (by_qr.T @ random_basis(32, seed=1)).norm()
    assert float(of_qr) > found.row_norm + 1e-3
    # What is left of the span is all that acts.
    torch.testing.assert_close(found.basis.T @ weights, found.row_raw.norm() * found.row.T @ weights, atol=1e-9, rtol=0)


@pytest.mark.parametrize("heat", [50.0, 1.0, 0.05])
def test_the_first_column_of_a_boundless_basis_is_no_half_at_low_temperature(heat: float) -> None:
    """pyvene's mask ``σ(i / T) σ((b d − i) / T)`` gives coordinate 0 a half at most, at every temperature."""
    masks = []

    def objective(basis: torch.Tensor, mask: torch.Tensor, step: int) -> torch.Tensor:
        masks.append(mask.detach())
        return basis.square().sum() * 0 - mask.sum()

    fit_boundless(objective, 10, steps=2, temperature=(heat, heat), start=0.6, dtype=DOUBLE)
    places = torch.arange(10, dtype=DOUBLE)
    pyvene = torch.sigmoid(places / heat) * torch.sigmoid((6 - places) / heat)
    assert float(pyvene[0]) <= 0.5
    assert float(masks[0][0]) > 0.5
    if heat < 0.1:
        assert masks[0].tolist() == pytest.approx([1.0] * 6 + [0.0] * 4, abs=1e-3)


def test_sets_that_are_standardised_apart_hide_the_shift() -> None:
    natural, labels = drawn(200, 3), ["a"] * 200
    shifted = drawn(100, 3, seed=1) + 5.0
    apart = [(one - one.mean(0)) / one.std(0) for one in (shifted, natural)]
    assert divergence.divergence(apart[0], ["a"] * 100, apart[1], labels) < 1.5
    assert divergence.divergence(shifted, ["a"] * 100, natural, labels) > 3


# -- closeness -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0, 100.0])
def test_no_weight_of_closeness_makes_a_middle_mlp_mediate(weight: float) -> None:
    """``r = x + noise``, ``h = (r, 0)``, ``y = r + 2 h₂``: what flips the answer is never near natural activations, which do not use ``h₂``."""
    count = 200
    label = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).double()
    runs = [side + 0.3 * drawn(count, seed=seed) for side, seed in ((label, 1), (-label, 2))]
    base, source = (torch.stack([one, torch.zeros_like(one)], 1) for one in runs)
    natural, labels = torch.cat([base, source]), [*label.tolist(), *(-label).tolist()]
    means = torch.stack([natural[torch.tensor(labels) == side].mean(0) for side in (1.0, -1.0)])
    wanted = torch.where(label[:, None] < 0, means[0], means[1])

    def loss(basis: torch.Tensor, step: int) -> torch.Tensor:
        moved = bases.interchanged(base, source, basis)
        answer = torch.nn.functional.softplus(3 * label * (runs[0] + 2 * moved[:, 1])).mean()
        return answer + weight * ((moved - wanted) @ basis).square().sum(1).mean()

    found = fit_basis(loss, 2, 1, steps=200, rate=0.05, dtype=DOUBLE).basis
    moved = bases.interchanged(base, source, found)
    accuracy = float(((runs[0] + 2 * moved[:, 1]) * label < 0).double().mean())
    apart = divergence.divergence(moved[:100], (-label[:100]).tolist(), natural, labels)
    assert accuracy < 0.9 or apart > 3
    assert (accuracy > 0.99) is (weight <= 1.0)


# -- a mask that is optimised --------------------------------------------------------------------------------------------------------------------


def test_a_mask_trained_through_a_prepared_run_finds_the_one_patch_that_acts() -> None:
    """Behind the last normalisation DINOv2 is linear in its patches: where all but one are 0, a sparse mask that keeps the output keeps that one."""
    model, inputs = model_of("dinov2", DOUBLE), inputs_of("dinov2", DOUBLE, 1, None, 1)
    site, active = "vision.ln_final.hook_normalized", 7
    with torch.no_grad():
        values = model.run_with_cache(inputs, site)[1][site].clone()
    values[:, 1:] = 0.0
    values[:, 1 + active] = 3 * drawn(values.shape[-1], seed=4)
    mask = torch.zeros(values.shape[1] - 1, dtype=DOUBLE, requires_grad=True)
    optimiser = torch.optim.Adam([mask], lr=0.2)
    with model.prepared(inputs, site) as run, torch.enable_grad():
        wanted = run([cv.edits.replace(site, values)]).detach()
        nothing = run([cv.edits.replace(site, torch.cat([values[:, :1], 0 * values[:, 1:]], 1))]).detach()
        for _ in range(40):
            kept = torch.cat([torch.ones(1, dtype=DOUBLE), mask.sigmoid()])[None, :, None]
            away = run([cv.edits.replace(site, kept * values)]) - wanted
            loss = away.square().sum() / (nothing - wanted).square().sum() + 0.05 * mask.sigmoid().sum()
            optimiser.zero_grad()
            loss.backward(inputs=[mask])
            optimiser.step()
    kept = mask.detach().sigmoid()
    assert int(kept.argmax()) == active
    assert float(kept[active]) > 0.9
    assert float(kept.sum() - kept[active]) < 0.2
