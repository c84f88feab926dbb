"""Rankings by known answers: an additive toy, the two-sigma rule, the random control."""

from __future__ import annotations

import pytest
import torch

from circuitvision.errors import InputError
from circuitvision.readout.attribution.direct import direct_attribution
from circuitvision.readout.attribution.increase import log_prob_increase
from circuitvision.readout.ranks import rank_components
from circuitvision.results import Result
from tests.readout.common import run
from tests.readout.layouts import of_rows


def test_an_additive_toy_is_ranked_by_its_weights():
    """y = Σ c_h: leaving h out costs c_h, so the ranking of the costs is the sort of c."""
    weights = torch.randn(40, generator=torch.Generator().manual_seed(0))
    total = weights.sum()
    costs = torch.stack([total - (total - weights[index]) for index in range(40)])
    found = rank_components(costs)
    assert found.axes["component"] == [str(index) for index in weights.argsort(descending=True).tolist()]
    assert found.positive() == [str(i) for i in weights.argsort(descending=True).tolist() if weights[i] > 0]
    assert found.negative()[0] == str(int(weights.argmin()))
    assert rank_components(costs, by="size").top(1) == [str(int(weights.abs().argmax()))]


def test_one_among_143_zeros_stands_out_alone():
    scores = torch.zeros(144)
    scores[17] = 1.0
    assert rank_components(scores).above_threshold() == ["17"]
    assert rank_components(torch.ones(5)).above_threshold() == []


def test_the_random_control_has_the_mean_of_the_scores():
    scores = torch.randn(50, generator=torch.Generator().manual_seed(1))
    found = rank_components(scores)
    single = found.random_control(1, draws=20_000)
    assert float(single.mean()) == pytest.approx(float(scores.mean()), abs=0.03)
    five = found.random_control(5, draws=20_000)
    assert float(five.mean()) == pytest.approx(5 * float(scores.mean()), abs=0.1)
    everything = found.random_control(50, draws=3)
    assert everything.tolist() == pytest.approx([float(scores.double().sum())] * 3)
    assert float(scores.sort(descending=True).values[:5].sum()) > float(five.quantile(0.99))
    assert torch.equal(found.random_control(3, seed=4), found.random_control(3, seed=4))


def test_removal_takes_one_more_each_time():
    found = rank_components(torch.tensor([1.0, 3.0, 2.0]), ["a", "b", "c"])
    assert found.removal() == [["b"], ["b", "c"], ["b", "c", "a"]]


def test_means_and_errors_over_examples_and_nan_last():
    found = rank_components(torch.tensor([[1.0, 3.0], [float("nan"), 1.0], [5.0, 5.0]]))
    assert found.axes["component"] == ["2", "0", "1"]
    assert found.error()[0] == 0.0
    assert float(found.error()[1]) == pytest.approx(1.0)


def test_results_name_their_components():
    model, _, cache = run("llava-clip-llama", everything=True)
    heads = rank_components(log_prob_increase(model, cache, 3), by="size")
    assert all(name.startswith("language L") and "H" in name for name in heads.axes["component"])
    terms = direct_attribution(model, cache, (3, 4))
    assert rank_components(terms, by="size").top(3) == [name for name, _ in terms.top(3)]


def test_meaningless_requests_are_refused():
    with pytest.raises(InputError, match="value"):
        rank_components(torch.ones(3), by="name")
    with pytest.raises(InputError, match="labels"):
        rank_components(torch.ones(3), ["a"])
    with pytest.raises(InputError, match="components"):
        rank_components(of_rows(Result, torch.ones(3), {"row": [0, 1, 2]}))
    with pytest.raises(InputError, match="count"):
        rank_components(torch.ones(3)).random_control(4)


def test_the_figure_shows_the_first_components():
    figure = rank_components(torch.tensor([1.0, -3.0, 2.0]), ["a", "b", "c"]).plot(count=2)
    assert list(figure.data[0].x) == [2.0, 1.0]
    assert list(figure.data[0].customdata) == ["c", "a"]
