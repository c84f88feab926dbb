"""Tests of a circuit's claim: published numbers of the statistics, true and wrong circuits of a hand-built network."""

from __future__ import annotations

import math

import pytest
import torch

import circuitvision as cv
from circuitvision.circuits import Circuit, claim_tests, edge_attribution
from circuitvision.circuits.claim_statistics import (
    benjamini_hochberg,
    holm,
    hsic,
    hsic_test,
    share_at_least,
    sign_test,
    tost,
)
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from circuitvision.results import Result

pytestmark = pytest.mark.filterwarnings("ignore:The circuit was found on")


# -- statistics --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "p"), [(50, 1.0), (60, 0.5433), (65, 0.1795), (70, 0.0248), (75, 0.0012)])
def test_the_sign_test_of_a_hundred(wins, p):
    assert sign_test(wins, 100, 0.1) == pytest.approx(p, abs=5e-5)


def test_two_circuits_that_are_the_same_are_not_different():
    assert sign_test(0, 0) == 1.0
    assert sign_test(10, 20) == 1.0
    with pytest.raises(InputError, match="tolerance"):
        sign_test(1, 2, 0.5)


def spread(n: int, seed: int = 0) -> torch.Tensor:
    """Numbers with mean exactly 0 and standard deviation exactly 1."""
    found = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (found - found.mean()) / found.std()


def test_two_one_sided_tests():
    found = tost(spread(100), 0.3)
    assert found.statistic == pytest.approx(3.0)
    assert found.p == pytest.approx(0.0017, abs=5e-5)
    assert tost(spread(20), 0.3).p == pytest.approx(0.098, abs=5e-4)
    assert tost(spread(100) + 0.4, 0.3).p > 0.8
    assert tost(torch.zeros(10), 0.1).p == 0.0
    assert tost(torch.full((10,), 0.2), 0.1).p == 1.0
    assert math.isnan(tost(torch.zeros(1), 0.1).p)
    with pytest.raises(InputError, match="margin"):
        tost(torch.zeros(5), 0.0)


def test_dependence_has_a_width_for_each_variable():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert hsic(x, y) == pytest.approx(hsic(7 * x - 3, y))
    assert hsic(x, y) == pytest.approx(hsic(x, -0.01 * y + 5))
    grid = torch.linspace(-1, 1, 60, dtype=torch.float64) + 0.3 * torch.randn(
        60, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    assert hsic_test(grid, 0.01 * grid.square() + 50, 500).p < 0.01
    assert hsic_test(x, torch.zeros(40)).p == 1.0

    def kernel(values: torch.Tensor) -> torch.Tensor:
        away = (values[:, None] - values[None]).abs()
        width = away[torch.triu(torch.ones(40, 40), 1) > 0].median()
        return torch.exp(-away.square() / (2 * width**2))

    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    expected = torch.trace(kernel(x) @ centre @ kernel(y) @ centre) / 39**2
    assert hsic(x, y) == pytest.approx(float(expected))


def test_independent_data_are_rejected_as_often_as_they_should_be():
    generator = torch.Generator().manual_seed(3)
    found = [
        hsic_test(torch.randn(25, generator=generator), torch.randn(25, generator=generator), 99, seed).p
        for seed in range(200)
    ]
    assert 0.02 <= sum(p <= 0.05 for p in found) / 200 <= 0.085


def test_families_of_p_values():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([]) == []
    # What was not tested is no member of the family, and no evidence.
    missing = [0.01, math.nan, 0.04, 0.03]
    assert holm(missing) == pytest.approx([0.03, math.nan, 0.06, 0.06], nan_ok=True)
    assert benjamini_hochberg(missing) == pytest.approx([0.03, math.nan, 0.04, 0.04], nan_ok=True)
    assert math.isnan(share_at_least(math.nan, [0.0, 1.0]))
    assert math.isnan(share_at_least(1.0, []))
    assert share_at_least(1.0, [math.nan] * 9 + [0.0]) == pytest.approx(1 / 2)
    assert share_at_least(1.0, [0.0, 1.0, 2.0]) == pytest.approx(3 / 4)
    assert share_at_least(3.0, [0.0, 1.0]) == pytest.approx(1 / 3)


# -- claims ------------------------------------------------------------------------------------------------------------------------------------


class Known:
    """A network whose circuit is known, with noise, so that other edges do a little."""

    def __init__(self, name: str = "and", noise: float = 0.003) -> None:
        self.known = handbuilt.build(name, noise=noise, seed=1)
        given = {"allow_wrong": True, "progress": False}
        self.scored = edge_attribution(self.known.model, self.known.pairs, self.known.metric, method="exact", **given)
        self.circuit = self.scored.circuit(self.known.edges)
        self.given = {
            "pairs": self.known.pairs,
            "metric": self.known.metric,
            "n_random": 80,
            "permutations": 200,
            **given,
        }

    def tests(self, circuit: Circuit, **options):
        return claim_tests(self.known.model, circuit, **{**self.given, **options})


@pytest.fixture(scope="module")
def pointer() -> Known:
    return Known("v-composition")


def test_the_true_circuit_passes(pointer):
    result = pointer.tests(pointer.circuit)
    assert result.faithfulness() == pytest.approx(1.0, abs=0.05)
    assert result.p("equivalence") < 0.05
    assert result.p("sufficiency") < 0.05
    assert result.p("partial necessity") < 0.05
    assert set(result.needed) == pointer.known.edges


def test_an_edge_that_does_nothing_is_not_needed(pointer):
    dead = next(name for name in pointer.scored.circuit(pointer.scored.edges) if name not in pointer.known.edges)
    result = pointer.tests(pointer.circuit.adding(dead))
    assert set(result.needed) == pointer.known.edges


def test_a_circuit_that_lacks_an_edge_or_is_drawn_fails(pointer):
    lacking = pointer.tests(pointer.circuit.without(pointer.circuit.edges[0]), edges=[])
    assert lacking.p("sufficiency") > 0.05
    assert lacking.p("equivalence") > 0.05
    others = [name for name in pointer.scored.circuit(pointer.scored.edges) if name not in pointer.known.edges]
    drawn = pointer.tests(pointer.scored.circuit(others[: len(pointer.known.edges)]), edges=[])
    assert drawn.p("sufficiency") > 0.05
    assert drawn.p("partial necessity") > 0.05


def test_the_whole_model_is_no_different_from_itself(pointer):
    every = pointer.scored.circuit(pointer.scored.edges)
    result = pointer.tests(every, edges=[], n_random=2)
    assert result.p("sign") == 1.0
    assert result.p("equivalence") < 1e-6
    assert result.p("independence") == 1.0


def test_tables_pages_and_files(pointer, tmp_path):
    with pytest.warns(UserWarning, match="n_random"):
        result = pointer.tests(pointer.circuit, n_random=5)
    frame = result.to_frame()
    assert list(frame.question) == ["sign", "equivalence", "independence", "sufficiency", "partial necessity"]
    assert set(result.edge_frame().edge) == pointer.known.edges
    page = cv.plots.write_page(result, tmp_path / "claim.html").read_text()
    assert "not tested" in page
    assert "<script src" not in page
    result.plot()
    result.save(tmp_path / "claim.npz")
    again = Result.load(tmp_path / "claim.npz")
    assert again.to_frame().equals(frame)
    with pytest.raises(InputError, match="question"):
        result.p("truth")


def test_examples_of_the_discovery_are_refused(pointer):
    pairs = pointer.known.pairs
    with pytest.raises(InputError, match="among those"):
        pointer.tests(pointer.circuit, discovered_on=pairs[:1])
    other = next(name for name in pointer.scored.circuit(pointer.scored.edges) if name not in pointer.circuit)
    with pytest.raises(InputError, match="not in the circuit"):
        pointer.tests(pointer.circuit, edges=[other])


@pytest.mark.parametrize(
    "options",
    [{"margin": 0.0}, {"margin": -1.0}, {"tolerance": 0.7}, {"alpha": 0}, {"alpha": 1.0}, {"n_random": -3}, {"permutations": -1}],
    ids=str,
)  # fmt: skip
def test_numbers_that_make_no_test_are_refused_before_anything_runs(pointer, options, monkeypatch):
    from circuitvision.circuits.circuit_runs import CircuitRuns

    monkeypatch.setattr(CircuitRuns, "measure", lambda *_args, **_keywords: pytest.fail("it ran"))
    with pytest.raises(InputError, match=next(iter(options))):
        pointer.tests(pointer.circuit, **options)


def test_nothing_is_said_of_what_was_not_drawn(pointer):
    result = pointer.tests(pointer.circuit, edges=[], n_random=0, permutations=0)
    frame = result.to_frame().set_index("question")
    for question in ("sufficiency", "partial necessity", "independence"):
        assert math.isnan(result.p(question))
        assert "not tested" in frame.reading[question]
    assert result.p("equivalence") < 0.05


def test_a_run_whose_metric_is_no_number_is_no_evidence():
    """Without the circuit the metric has no value: that the model needs it cannot be told from that."""
    from types import SimpleNamespace

    from circuitvision.circuits.claims import _table

    clean, empty = 1 + 0.1 * spread(12), 0.1 * spread(12, 1)
    units = {"clean": clean, "empty": empty, "circuit": clean, "complement": torch.full((12,), math.nan)}
    units |= {f"random {number}": empty for number in range(40)} | {f"removal {number}": clean for number in range(40)}
    drawn = SimpleNamespace(
        randoms=[name for name in units if name.startswith("random")],
        removals=[name for name in units if name.startswith("removal")],
    )
    rows = {row["question"]: row for row in _table(units, drawn, 0.1, 0.1, 0.05, 100, 0)}
    assert math.isnan(rows["partial necessity"]["p"])
    assert "not tested" in rows["partial necessity"]["reading"]
    assert rows["sufficiency"]["p"] == pytest.approx(1 / 41)


def test_an_edge_that_is_named_twice_is_tested_once(pointer):
    result = pointer.tests(pointer.circuit, edges=pointer.circuit.edges[:1] * 2, n_random=20)
    assert len(result.edges) == 1
    with pytest.raises(InputError, match="list"):
        pointer.tests(pointer.circuit, edges=pointer.circuit.edges[0])


@pytest.mark.parametrize("way", [1.0, -1.0])
def test_better_is_further_from_the_empty_run_whatever_the_sign_of_the_metric(way):
    from types import SimpleNamespace

    from circuitvision.circuits.claims import _table

    clean, empty = way * (1 + 0.1 * spread(12)), 0.1 * spread(12, 1)
    units = {"clean": clean, "empty": empty, "circuit": clean + 0.2 * way, "complement": empty}
    rows = {
        row["question"]: row for row in _table(units, SimpleNamespace(randoms=[], removals=[]), 0.1, 0.1, 0.05, 10, 0)
    }
    assert rows["sign"]["statistic"] == 1.0
    assert rows["sign"]["n"] == 12
