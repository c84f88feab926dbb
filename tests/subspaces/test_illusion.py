"""The illusion report on components whose answer is known: the four fixtures, six verdicts, and identities of the geometry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from circuitvision.subspaces import fit_basis, interchanged
from circuitvision.subspaces import illusion as il
from circuitvision.subspaces.divergence import natural_range, recruited, recruitment
from circuitvision.subspaces.geometry import geometry_null, inside, parts
from circuitvision.subspaces.illusion import (
    Component,
    Statistics,
    Thresholds,
    flags_of,
    illusion_statistics,
    verdict_of,
)

DOUBLE = torch.float64
N = 1000
ROOT = 2**-0.5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def neurons() -> Component:
    """Fixture 1: h = x (1, 0, 1), y = h · (0, 2, 1)."""
    x, other = drawn(N), drawn(N, seed=1)
    weight, shape = torch.tensor([0.0, 2, 1], dtype=DOUBLE), torch.tensor([1.0, 0, 1], dtype=DOUBLE)
    sign = (other - x).sign()
    return Component(
        x[:, None] * shape,
        other[:, None] * shape,
        lambda h: sign * (h @ weight - x),
        weight,
        readers=weight[:, None],
        sign=sign,
    )


def middle() -> Component:
    """Fixture 2: r = x u + noise, h = (r · u, 0), mlp_out = 2 h₂ u, y = (r + mlp_out) · u; the MLP mediates nothing."""
    x, other = drawn(N) + 0.1 * drawn(N, seed=2), drawn(N, seed=1) + 0.1 * drawn(N, seed=3)
    sign = (other - x).sign()

    def mlp(h: torch.Tensor) -> torch.Tensor:
        return 2 * h[:, 1:]

    def clamped(h: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return sign * mlp(h).clamp(low, high)[:, 0]

    base, source = (torch.stack([one, torch.zeros(N, dtype=DOUBLE)], 1) for one in (x, other))
    return Component(
        base, source, lambda h: sign * mlp(h)[:, 0], torch.tensor([0.0, 2], dtype=DOUBLE), readers=torch.tensor([[0.0], [2]], dtype=DOUBLE),
        sign=sign, units=mlp, clamped=clamped,
    )  # fmt: skip


def relay(d: int = 12, seed: int = 5) -> tuple[Component, torch.Tensor]:
    """Fixture 3: the same stream, and an MLP whose output map is (unit W_inᵀ u) uᵀ, so that it passes the feature on."""
    u = torch.eye(4, dtype=DOUBLE)[0]
    into = drawn(4, d, seed=seed)
    relayed = into.T @ u
    out = (relayed / relayed.norm())[:, None] * u[None]
    runs = [drawn(N, seed=n)[:, None] * u + 0.1 * drawn(N, 4, seed=n + 10) for n in (0, 1)]
    base, source = (r @ into for r in runs)
    sign = ((runs[1] - runs[0]) @ u).sign()
    return Component(
        base, source, lambda h: sign * ((h - base) @ out @ u), out @ u, readers=out, sign=sign
    ), relayed / relayed.norm()


def linear_mlp(d: int = 128, m: int = 16, seed: int = 0) -> Component:
    """A linear MLP with random weights: h = r W_in, y = h W_out · u, r = x u' + noise."""
    into, out = drawn(m, d, seed=seed) / m**0.5, drawn(d, m, seed=seed + 1) / d**0.5
    feature, read = torch.nn.functional.normalize(drawn(2, m, seed=seed + 2))
    x, other = drawn(N, seed=3), drawn(N, seed=4)
    base, source = ((one[:, None] * feature * 2 + 0.1 * drawn(N, m, seed=n)) @ into for n, one in ((5, x), (6, other)))
    sign = (other - x).sign()
    g = out @ read
    return Component(base, source, lambda h: sign * ((h - base) @ g), g, readers=out, sign=sign)


def best(component: Component) -> torch.Tensor:
    return geometry_null(component.mean_difference, component.gradient).direction


def judged(component: Component, basis: torch.Tensor, **options: Any) -> tuple[Statistics, il.Verdict]:
    found = illusion_statistics(component, basis, n_random=3, **options)
    controls = list(options.get("controls") or ())
    return found, verdict_of(found, flags_of(found, controls=controls))


def vector(*entries: float) -> torch.Tensor:
    return torch.tensor(entries, dtype=DOUBLE)


# -- fixture 1: exact numbers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "effect", "row", "raw", "null", "norm"),
    [
        (vector(1, 0, 0), 0, math.nan, math.nan, 0, 0),
        (vector(0, 1, 0), 0, 1, 0.8, 0, 0.894),
        (vector(0, 0, 1), 1, 1, 0.2, 0, 0.447),
        (vector(1, 1, 0), 1, 1, 0.4, 0, 0.632),
        (vector(1, 0, 1), 1, 1, 0.1, 0, 0.316),
    ],
)
def test_the_three_neurons_give_their_table(direction, effect, row, raw, null, norm) -> None:
    component = neurons()
    found = illusion_statistics(component, direction, n_random=0)
    whole = found.mean(il.FULL)
    assert found.mean(il.SUBSPACE) == pytest.approx(effect * whole, abs=1e-12)
    assert found.mean(il.ROW) == pytest.approx(row * whole, nan_ok=True)
    assert found.mean(il.ROW_RAW) == pytest.approx(raw * whole, nan_ok=True)
    if il.NULL in found.effects:
        assert found.mean(il.NULL) == pytest.approx(null, abs=1e-12)
    assert found.numbers["row norm"] == pytest.approx(norm, abs=5e-4)


@pytest.mark.parametrize(
    ("direction", "share"), [(vector(0, 0, 1), 0.5), (vector(1, 1, 0), 0.25), (vector(1, 0, 1), 1.0)]
)
def test_the_part_on_the_manifold_tells_the_directions_apart(direction: torch.Tensor, share: float) -> None:
    found = illusion_statistics(neurons(), direction, n_random=0)
    assert found.mean(il.ON) / found.mean(il.SUBSPACE) == pytest.approx(share)


def test_the_middle_mlp_is_controlled_and_mediates_nothing() -> None:
    found = illusion_statistics(middle(), vector(1, 1), n_random=0)
    assert found.mean(il.FULL) == found.mean(il.ROW) == found.mean(il.NULL) == 0.0
    assert found.mean(il.SUBSPACE) == pytest.approx(float((middle().source - middle().base)[:, 0].abs().mean()))
    assert found.numbers["rho"] == pytest.approx(1.0)
    assert found.numbers["deviation along row"] == 0.0


# -- the six verdicts --------------------------------------------------------------------------------------------------------------------------


def cases() -> dict[str, Any]:
    relayed, direction = relay()
    mlp = linear_mlp()
    return {
        "the intended neuron": (neurons(), vector(0, 0, 1), [], il.FAITHFUL),
        "a sum with a dormant one": (neurons(), vector(1, 1, 0), ["F7"], il.UNDETERMINED),
        "a disconnected neuron": (neurons(), vector(1, 0, 0), ["F0"], il.NOTHING),
        "a middle MLP": (middle(), vector(1, 1), ["F1", "F2", "F3", "F4", "F5", "F7", "F9"], il.ILLUSION),
        "a random linear MLP": (mlp, best(mlp), ["F1", "F2", "F3", "F5", "F7"], il.ILLUSION),
        "a faithful relay": (relayed, direction, [], il.FAITHFUL),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_the_six_verdicts(name: str) -> None:
    component, basis, flags, label = cases()[name]
    _, verdict = judged(component, basis)
    assert verdict.flags == flags
    assert verdict.label == label
    assert "F6" in verdict.untested


def test_words_tell_mediated_from_controllable() -> None:
    _, bad = judged(middle(), vector(1, 1))
    _, good = judged(*relay())
    assert "controlled from here" in bad.sentence
    assert "mediated here in normal operation" in good.sentence
    assert "controlled" not in good.sentence


def test_a_low_accuracy_comes_first_and_the_rest_is_said_too() -> None:
    """The stored numbers of GPT-2's MLP 8: effects −.07, .38 and .11, accuracy .043 where the residual stream has .544."""
    n = 100
    effects = {
        name: torch.full((n,), value, dtype=DOUBLE)
        for name, value in ((il.FULL, -0.07), (il.SUBSPACE, 0.38), (il.ROW, 0.11), (il.ON, 0.3))
    }
    names = (
        "off-distribution share",
        "deviation along row",
        "deviation along null",
        "d' along row",
        "d' along v",
        "E*",
        "headroom",
        "rho",
    )
    found = Statistics(effects, dict.fromkeys(names, math.nan))
    flags = flags_of(found, accuracy=0.043, anchor=0.544)
    verdict = verdict_of(found, flags)
    assert verdict.flags == ["F0", "F1", "F2"]
    assert verdict.label == il.NOTHING
    assert il.FLAGS["F1"] in verdict.also
    other = flags_of(found, accuracy=0.5, anchor=0.544)
    assert verdict_of(found, other).label == il.ILLUSION


def test_the_residual_stream_of_the_stored_table_is_faithful_as_far_as_it_was_tested() -> None:
    effects = {
        name: torch.full((10,), value, dtype=DOUBLE)
        for name, value in ((il.FULL, 1.0), (il.SUBSPACE, 1.14), (il.ROW, 1.04), (il.ON, 1.0))
    }
    names = (
        "off-distribution share",
        "deviation along row",
        "deviation along null",
        "d' along row",
        "d' along v",
        "E*",
        "headroom",
        "rho",
    )
    found = Statistics(effects, dict.fromkeys(names, math.nan))
    verdict = verdict_of(found, flags_of(found, accuracy=0.737, anchor=0.544))
    assert verdict.label == il.FAITHFUL
    assert {"F4", "F5", "F6", "F8", "F9"} <= set(verdict.untested)


def test_a_control_that_does_half_as_much_is_a_flag() -> None:
    component, direction = relay()
    _, verdict = judged(component, direction, controls={"shuffled labels": direction})
    assert "F6" in verdict.flags
    assert verdict.label == il.UNDETERMINED


def test_thresholds_are_parameters() -> None:
    found, _ = judged(neurons(), vector(1, 1, 0))
    assert not any(flags_of(found, Thresholds(on_manifold=0.2)).values())


def test_the_unread_share_and_the_row_part_never_decide_alone() -> None:
    """A direction with a large unread part in a component that relays all: F2 and F5 may hold, and no illusion is told."""
    component = neurons()
    found = illusion_statistics(component, vector(1, 0, 1), n_random=0)
    assert found.numbers["null norm"] > 0.9
    assert verdict_of(found, {**flags_of(found), "F2": True, "F5": True, "F8": True}).label != il.ILLUSION


# -- geometry ----------------------------------------------------------------------------------------------------------------------------------


def test_training_on_a_linear_mlp_finds_the_geometry_null() -> None:
    component = linear_mlp(d=24, m=6)
    a, g = component.mean_difference, component.gradient
    null = geometry_null(a, g)
    change, sign = (component.source - component.base), component.sign
    assert sign is not None

    def objective(basis: torch.Tensor, step: int) -> torch.Tensor:
        return -(sign * (change @ basis @ (basis.T @ g))).mean()

    trained = fit_basis(objective, 24, 1, steps=250, rate=0.1, dtype=DOUBLE)
    assert float(-trained.loss[-1]) == pytest.approx(null.bound, abs=1e-6)
    assert inside(trained.basis, null.direction) == pytest.approx(1.0, abs=1e-6)
    assert float(
        component.effect(interchanged(component.base, component.source, trained.basis)).mean()
    ) == pytest.approx(null.bound, abs=1e-6)
    found = illusion_statistics(component, trained.basis, n_random=0)
    assert found.mean(il.SUBSPACE) == pytest.approx(found.numbers["E*"], abs=1e-6)
    unread = parts(null.direction[:, None], component.readers).null_norm ** 2
    a_null = parts((a / a.norm())[:, None], component.readers).null_norm ** 2
    assert unread == pytest.approx(a_null / (2 * (1 + null.cosine)), abs=1e-9)
    assert null.bound >= null.full


def test_centred_readers_are_cut_by_their_rank() -> None:
    centred = drawn(32, 8)
    centred = centred - centred.mean(1, keepdim=True)
    found = parts(torch.nn.functional.normalize(drawn(32, 1, seed=1), dim=0), centred)
    assert found.rank == 7
    torch.testing.assert_close(found.null.T @ centred, torch.zeros(1, 8, dtype=DOUBLE), atol=1e-9, rtol=0)


def test_permuted_labels_train_nothing_in_the_faithful_relay() -> None:
    component, _ = relay()
    order = torch.roll(torch.arange(N), 1)
    wanted = component.effect(component.source)
    assert component.sign is not None
    target = (component.sign * wanted)[order]
    half = N // 2
    change, g = component.source - component.base, component.gradient

    def loss(goal: torch.Tensor) -> Any:
        return lambda basis, step: ((change @ basis @ (basis.T @ g))[:half] - goal[:half]).square().mean()

    true, shuffled = (
        fit_basis(loss(goal), 12, 1, steps=100, rate=0.1, dtype=DOUBLE).basis
        for goal in (component.sign * wanted, target)
    )
    effects = [
        component.effect(interchanged(component.base, component.source, one))[half:].mean() for one in (true, shuffled)
    ]
    assert float(effects[0]) == pytest.approx(float(wanted[half:].mean()), rel=0.05)
    assert abs(float(effects[1])) < 0.2 * float(effects[0])


# -- recruited units ---------------------------------------------------------------------------------------------------------------------------


def test_units_that_natural_inputs_never_use_carry_the_effect_in_one_case_and_not_in_the_other() -> None:
    weight = torch.tensor([[1, 0, 0, 0.5], [0, 1, 0, 0], [1, 1, -1, -1]], dtype=DOUBLE)
    bias = torch.tensor([-0.5, -0.5, 0], dtype=DOUBLE)

    def units(h: torch.Tensor) -> torch.Tensor:
        return (h @ weight.T + bias).relu()

    of_a = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=DOUBLE)
    of_b = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 1]], dtype=DOUBLE)
    assert units(of_a).sum(1).tolist() == [0.5, 0.5]
    assert units(of_b).sum(1).tolist() == [0.0, 0.0]
    difference = of_a.mean(0) - of_b.mean(0)
    assert difference.tolist() == [0.5, 0.5, 0.0, -0.5]
    patched = of_b + difference
    assert units(patched).sum(1).tolist() == [0.5, 0.25]
    low, high = natural_range(units(torch.cat([of_a, of_b])))
    outside = recruited(units(patched), low, high)
    assert outside.tolist() == [[False, False, True], [False, False, False]]
    clamped = units(patched).clamp(low, high).sum(1)
    shares = [recruitment(units(patched).sum(1)[n : n + 1], clamped[n : n + 1]) for n in (0, 1)]
    assert shares == pytest.approx([1.0, 0.0], abs=1e-9)
    alone = of_a.mean(0) - of_b[0]
    assert alone.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert float(units(of_b[:1] + alone).sum()) == 0.0
    direct = interchanged(of_b, of_b + difference, difference)
    torch.testing.assert_close(direct, of_b + difference)
