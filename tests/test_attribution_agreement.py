"""The agreement of two results on numbers worked out by hand, and the benchmark that tabulates it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from circuitvision.errors import InputError
from circuitvision.patching import PatchingResult, agreement
from circuitvision.patching.agreement import rank_correlation


def result(*rows: list[float]) -> PatchingResult:
    """Effects ``[cell example]``."""
    values = torch.tensor(rows, dtype=torch.float64)
    axes = {"layer": list(range(len(values))), "example": list(range(values.shape[1]))}
    return PatchingResult(values, axes, base=torch.zeros(values.shape[1]), source=torch.ones(values.shape[1]))


def column(*numbers: float) -> PatchingResult:
    return result(*([number] for number in numbers))


def test_equal_effects_agree():
    told = agreement(column(5, -4, 3, 2, 1), column(5, -4, 3, 2, 1), 2)
    assert (told.spearman, told.overlap, told.false_negatives, told.k, told.cells) == (pytest.approx(1.0), 1.0, 0, 2, 5)


def test_what_is_shared_and_what_is_missed():
    exact = column(9, 8, 7, 6, 5, 4, 3, 2)
    # The first two of eight come last; with k = 2 neither is among the first four.
    told = agreement(column(1, 2, 9, 8, 7, 6, 5, 4), exact, 2)
    assert (told.overlap, told.false_negatives) == (0.0, 2)
    # The second stands third: not shared, not missed.
    told = agreement(column(9, 7, 8, 1, 1, 1, 1, 1), exact, 2)
    assert (told.overlap, told.false_negatives) == (0.5, 0)


def test_ranks_of_ties_are_their_mean():
    one, other = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    # Ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3: 4.5 / sqrt(4.5 · 5).
    assert rank_correlation(one, other) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(one, -other) == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(one, torch.zeros(4)) != rank_correlation(one, torch.zeros(4))


def test_sizes_and_means_differ_where_examples_push_both_ways():
    exact = result([4.0, -4.0], [1.0, 1.0], [0.5, 0.5])
    estimate = result([0.1, 0.1], [1.0, 1.0], [0.5, 0.5])
    assert agreement(estimate, exact, 1).overlap == 0.0
    assert agreement(estimate, exact, 1, by="mean").overlap == 1.0


def test_cells_without_an_effect_have_no_rank_but_can_be_taken_for_strong_ones():
    nothing = float("nan")
    exact = column(3, 1e-9, nothing, 2, 1)
    # Rounding at the cell without an effect, whichever way it falls, changes nothing.
    for rounding in (0.0, 1e-8):
        told = agreement(column(1, rounding, nothing, 2, 3), exact, 1)
        assert (told.cells, told.spearman) == (3, pytest.approx(-1.0))
    assert agreement(column(3, 9, nothing, 2, 1), exact, 1).overlap == 0.0


@pytest.mark.parametrize(
    ("estimate", "options", "message"),
    [(column(1, 2), {}, "same cells"), (column(1, 2, 3), {"k": 4}, "outside"), (column(1, 2, 3), {"by": "x"}, "by=")],
)
def test_what_cannot_be_compared_is_refused(estimate, options, message):
    with pytest.raises(InputError, match=message):
        agreement(estimate, column(1, 2, 3), **{"k": 1, **options})


@pytest.mark.slow
def test_the_benchmark_writes_its_table(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "attribution_agreement.py"
    command = [sys.executable, str(script), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "attribution_agreement-cpu.json").read_text())
    rows = found["models"]["shapes-vit"]["rows"]
    assert {row["method"] for row in rows} == {"AtP", "AtP + QK fix", "AtP*", "IG"}
    assert all(-1 <= row["spearman"] <= 1 and 0 <= row["overlap"] <= 1 for row in rows)
    assert "| shapes-vit | queries and keys | AtP + QK fix |" in (tmp_path / "attribution_agreement-cpu.md").read_text()
