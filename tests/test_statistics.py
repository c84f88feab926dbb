"""Rows, examples and groups: means, standard errors and intervals against theory, against scipy, and by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import scipy.stats
import torch

from circuitvision import statistics
from circuitvision.errors import InputError
from circuitvision.results import Result
from circuitvision.statistics import auroc, bootstrap_interval, by_example, standard_error, wilson

NAN = float("nan")


def measured(values: torch.Tensor, labels: list | None = None, **fields) -> Result:
    examples = list(range(values.shape[-1])) if labels is None else labels
    axes = {f"axis {number}": list(range(size)) for number, size in enumerate(values.shape[:-1])}
    return Result(values, {**axes, "example": examples}, **fields)


def test_rows_of_one_example_are_averaged_first_by_hand():
    values = torch.tensor([[1.0, 3.0, 10.0, NAN, NAN, NAN], [2.0, NAN, 4.0, 8.0, 0.0, 1.0]])
    result = measured(values, [7, 7, 3, 3, 5, 5])
    assert result.examples == [7, 3, 5]
    assert torch.equal(result.mean(), torch.tensor([(2 + 10) / 2, (2 + 6 + 0.5) / 3], dtype=torch.float64))
    # Two images of an example count once: sd of (2, 10) and of (2, 6, 0.5), over √2 and √3.
    expected = [np.std([2, 10], ddof=1) / math.sqrt(2), np.std([2, 6, 0.5], ddof=1) / math.sqrt(3)]
    assert np.allclose(result.error().numpy(), expected, rtol=1e-14)
    low, high = result.interval()
    assert (low < result.mean()).all()
    assert (high > result.mean()).all()


@pytest.mark.parametrize("mutant", ["rows count as examples", "no degree of freedom is lost", "NaN counts as 0"])
def test_a_wrong_formula_is_seen(mutant, monkeypatch):
    if mutant == "rows count as examples":
        monkeypatch.setattr("circuitvision.results.by_example", lambda values, labels: values)
    elif mutant == "no degree of freedom is lost":
        wrong = lambda x: (x - x.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt() / (~x.isnan()).sum(-1).sqrt()  # noqa: E731
        monkeypatch.setattr("circuitvision.results.standard_error", wrong)
    else:
        monkeypatch.setattr("circuitvision.results.by_example", lambda x, labels: by_example(x.nan_to_num(0.0), labels))
    with pytest.raises(AssertionError):
        test_rows_of_one_example_are_averaged_first_by_hand()


def test_groups_are_what_the_error_counts():
    torch.manual_seed(0)
    values, groups = torch.randn(3, 12, dtype=torch.float64), [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    result = measured(values)
    means = torch.stack([values[:, [i for i, g in enumerate(groups) if g == one]].mean(-1) for one in range(4)], -1)
    assert torch.allclose(result.mean(groups), means.mean(-1), rtol=0, atol=1e-15)
    assert torch.allclose(result.error(groups), measured(means).error(), rtol=1e-13)
    assert torch.allclose(result.interval(group=groups), measured(means).interval(), rtol=1e-12)
    assert torch.equal(result.error(torch.tensor(groups)), result.error(dict(enumerate(groups))))
    rows = measured(values, [i // 2 for i in range(12)])
    per_example = [0, 0, 1, 1, 2, 2]
    assert torch.equal(rows.error(per_example), rows.error([g for g in per_example for _ in range(2)]))
    for wrong in ([0, 1], {0: "a"}, "nothing", [0, 1] * 6):
        with pytest.raises(InputError, match="group"):
            rows.error(wrong)


def test_an_interval_of_a_normal_sample_is_that_of_theory():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(400, 60, generator=generator, dtype=torch.float64) * 3 + 5
    low, high = bootstrap_interval(values)
    half = scipy.stats.norm.ppf(0.975) * standard_error(values)
    assert float(((high - low) / (2 * half)).mean()) == pytest.approx(1.0, abs=0.03)
    covered = float(((low < 5) & (high > 5)).double().mean())
    assert 0.92 < covered < 0.97
    narrow = bootstrap_interval(values, level=0.68)
    assert ((narrow[0] > low) & (narrow[1] < high)).all()


@pytest.mark.parametrize("kind", ["normal", "skewed", "few"])
def test_an_interval_is_that_of_scipy(kind):
    rng = np.random.default_rng(3)
    sample = {"normal": rng.normal(size=40), "skewed": rng.exponential(size=40) ** 2, "few": rng.normal(size=6)}[kind]
    ours = bootstrap_interval(torch.tensor(sample), draws=40_000).numpy()
    theirs = scipy.stats.bootstrap((sample,), np.mean, method="BCa", n_resamples=40_000, rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert np.abs(ours - [theirs.low, theirs.high]).max() < 0.03 * width


def test_an_interval_of_two_values_alike_in_number_is_symmetric():
    sample = 0.1 + 0.7 * torch.tensor([(-1.0) ** i for i in range(20)], dtype=torch.float64)
    low, high = bootstrap_interval(sample, draws=20_000)
    assert float(high - 0.1) == pytest.approx(float(0.1 - low), rel=0.15)


def test_intervals_leave_nan_out_and_know_when_they_know_nothing():
    torch.manual_seed(0)
    full = torch.randn(20, dtype=torch.float64)
    holes = torch.cat([full, torch.full((20,), NAN, dtype=torch.float64)])
    with_holes, without = bootstrap_interval(holes, draws=20_000), bootstrap_interval(full, draws=20_000)
    assert (with_holes - without).abs().max() < 0.1 * (without[1] - without[0])
    for one in ([1.0], [1.0, NAN], [NAN, NAN]):
        assert bootstrap_interval(torch.tensor(one)).isnan().all()
        assert standard_error(torch.tensor(one)).isnan()
    same = bootstrap_interval(torch.full((2, 9), 0.1, dtype=torch.float64))
    assert torch.allclose(same, torch.full_like(same, 0.1), atol=1e-15)
    for wrong in ({"level": 1.0}, {"level": 95}, {"draws": 3}):
        with pytest.raises(InputError, match="level"):
            bootstrap_interval(full, **wrong)


def test_thousands_of_cells_take_no_longer_than_they_must(monkeypatch):
    values = torch.randn(4000, 100, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    whole = bootstrap_interval(values)
    assert time.perf_counter() - start < 20
    monkeypatch.setattr(statistics, "_CELLS", 7)
    assert torch.allclose(bootstrap_interval(values[:50]), whole[:, :50], rtol=1e-12)


def test_by_example_keeps_what_needs_no_mean():
    values = torch.tensor([[1.0, NAN, math.inf]])
    assert by_example(values, ["b", "a", "c"]) is values
    assert by_example(torch.tensor([1, 2, 5]), ["b", "a", "b"]).tolist() == [3.0, 2.0]
    assert by_example(torch.tensor([1.0, math.inf, 5.0]), ["b", "a", "a"])[1] == math.inf
    with pytest.raises(InputError, match="labels"):
        by_example(values, [1])


def test_wilson_is_the_interval_of_scipy():
    for right, count in ((0, 5), (3, 9), (20, 20)):
        theirs = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
        ours = wilson(torch.tensor(right / count, dtype=torch.float64), count)
        assert np.allclose(ours.numpy(), [theirs.low, theirs.high], rtol=1e-12)
    assert wilson(torch.tensor(0.5), 0).isnan().all()


# -- AUROC -------------------------------------------------------------------------------------------------------------------------------------------


def test_auroc_by_hand():
    assert auroc([4.0, 3.0, 2.0, 1.0], [True, True, False, False]) == 1.0
    assert auroc([1.0, 2.0, 3.0, 4.0], [True, True, False, False]) == 0.0
    # Of the four couples two are won, one is lost and one is a tie.
    assert auroc([3.0, 1.0, 1.0, 2.0], [True, True, False, False]) == (2 + 0.5) / 4
    # One of five stands out, the others tie with everything that is not meant.
    assert auroc([1.0] + [0.0] * 16, [True] * 5 + [False] * 12) == pytest.approx(0.6)


@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_that_of_scikit_learn(seed):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 9, 60) / 3, rng.random(60) < 0.3
    assert auroc(scores.tolist(), labels.tolist()) == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)


@pytest.mark.parametrize(
    ("scores", "labels", "said"),
    [([1.0, 2.0], [True], "1 labels"), ([1.0, NAN], [True, False], "finite"), ([1.0, 2.0], [True, True], "one kind")],
)
def test_auroc_refuses_what_has_no_rank(scores, labels, said):
    with pytest.raises(InputError, match=said):
        auroc(scores, labels)
