"""Figures of steering: what they draw is what the results say, and titles affirm only what their control allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.results import Result
from circuitvision.steering import ClosedLoop, InjectionResult, PromptConditions, SteeringResponse, ValueVectorClusters
from circuitvision.steering.claims import injects, listens, steers, succeeds

SEED = torch.Generator().manual_seed(0)


def response(slope: float, random: float, draws: int = 19) -> SteeringResponse:
    """A chosen set of one slope among random sets of up to another, on 12 examples that differ a little."""
    scales = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    slopes = torch.cat([torch.tensor([slope]), torch.linspace(-random, random, draws)]).double()
    noise = 0.01 * torch.randn(draws + 1, 1, 12, generator=SEED, dtype=torch.float64)
    values = (slopes[:, None, None] + noise) * scales[:, None]
    axes = {"set": ["chosen", *map(str, range(draws))], "scale": scales.tolist(), "example": list(range(12))}
    return SteeringResponse(
        values, axes, {"metric": "height"}, base=torch.zeros(12), neurons=[[[0, 1]]] * (draws + 1), tower="action", name="up"
    )  # fmt: skip


def injection(word: float, text: float) -> InjectionResult:
    values = torch.tensor([1.0, word, text])[:, None, None, None] + 0.02 * torch.randn(3, 2, 1, 20, generator=SEED)
    axes = {"region": ["all", "word", "text"], "layer": ["all", 0], "step": ["all"], "example": list(range(20))}
    return InjectionResult(values, axes, residual=values, override=values, tower="language")


def loop(first: float, second: float, count: int = 50) -> ClosedLoop:
    success = torch.stack([torch.arange(count) < share * count for share in (first, second)]).double()
    axes = {"condition": ["nothing", "steered"], "dim": ["down", "right"], "example": list(range(count))}
    return ClosedLoop(torch.randn(2, 2, count, generator=SEED), axes, success=success, path=torch.zeros(2, 9, 2, count))


def title(figure: object) -> str:
    return figure.layout.title.text  # type: ignore[attr-defined]


def test_a_response_is_a_line_over_a_band_of_its_random_sets() -> None:
    found = response(0.5, 0.1)
    figure = found.plot()
    line = next(trace for trace in figure.data if trace.name == "up")
    assert list(line.x) == [-2.0, 0.0, 1.0, 3.0]
    torch.testing.assert_close(torch.tensor(line.y, dtype=torch.float64), found.effect)
    band = next(trace for trace in figure.data if trace.fill == "toself")
    assert max(band.y) == pytest.approx(float(found.random.max()))
    assert min(band.y) == pytest.approx(float(found.random.min()))
    assert str(steers(found)) in title(figure).replace("<br>", " ")


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (response(0.5, 0.1), True),
        (response(-0.5, 0.1), True),
        (response(0.5, 0.6), False),
        (response(0.0, 0.0), False),
        (response(0.5, 0.1, draws=18), False),
        (response(0.5, 0.1, draws=0), None),
    ],
)
def test_what_steers_beats_every_random_set(found: SteeringResponse, holds: bool | None) -> None:
    told = steers(found)
    assert told.holds is holds
    assert ("No clear" in str(told)) == (holds is False)
    assert ("No clear" in title(found.plot())) == (holds is False)


def test_regions_stand_down_and_layers_across() -> None:
    found = injection(0.9, 0.0)
    heat = next(trace for trace in found.plot().data if trace.type == "heatmap")
    torch.testing.assert_close(torch.tensor(heat.z).double(), found.mean()[..., 0], rtol=1e-4, atol=1e-4)
    assert "Word" in title(found.plot())
    assert injects(found).holds
    assert not injects(injection(0.02, 0.0)).holds
    assert not injects(injection(0.9, 0.9)).holds
    assert "No region" in title(injection(0.02, 0.0).plot())
    with pytest.raises(InputError, match="step"):
        found.plot(step=4)


def test_conditions_stand_between_the_two_objects() -> None:
    values = torch.tensor([1.0, 0.5, 0.0])[:, None] + 0.05 * torch.randn(3, 15, generator=SEED)
    axes = {"condition": ["right", "empty", "other object"], "example": list(range(15))}
    found = PromptConditions(values, axes, residual=values.abs(), texts=["a", "", "b"])
    assert listens(found).holds
    points = found.plot().data[0]
    torch.testing.assert_close(torch.tensor(points.x, dtype=torch.float64), found.mean())
    assert list(points.y) == axes["condition"]
    deaf = PromptConditions(values[[0, 0, 0]], axes, residual=values.abs(), texts=["a", "", "b"])
    assert not listens(deaf).holds
    assert "does not follow" in title(deaf.plot())


def test_success_is_compared_by_wilsons_intervals() -> None:
    found = loop(1.0, 0.4)
    assert succeeds(found, "steered", "nothing").holds
    assert not succeeds(loop(1.0, 0.98), "steered", "nothing").holds
    rates = next(trace for trace in found.plot().data if trace.name == "success")
    assert list(rates.x) == [1.0, 0.4]
    # A share of 1 has a width.
    assert rates.error_x.arrayminus[0] > 0.05
    with pytest.raises(InputError, match="condition"):
        found.plot(control="else")


def test_clusters_stand_beside_random_vectors() -> None:
    found = ValueVectorClusters(
        torch.tensor([[0, 0, 1, 1]]), {"layer": [0], "neuron": [0, 1, 2, 3]}, words=[["<b>"], ["red"]], sizes=[2, 2],
        cohesion=torch.tensor([0.9, 0.2]), random_cohesion=torch.tensor([[0.5, 0.3]]), tower="language",
    )  # fmt: skip
    assert found.cohesive.tolist() == [True, False]
    figure = found.plot()
    assert title(figure).startswith("1 of 2")
    assert "&lt;b&gt;" in figure.layout.yaxis.ticktext[0]
    assert found.search(["red"]) == [1]


@pytest.mark.parametrize(
    "found", [response(0.5, 0.1), injection(0.9, 0.0), loop(1.0, 0.4)], ids=lambda one: type(one).__name__
)
def test_results_are_saved_taken_apart_and_joined(found: Result, tmp_path: Path) -> None:
    again = cv.load(found.save(tmp_path / "result.npz"))
    assert type(again) is type(found)
    assert torch.equal(again.values, found.values)
    first, second = found.take([0, 1, 2]), found.take(range(3, len(found.examples)))
    whole = type(found).concat([first, second])
    assert torch.equal(whole.values, found.values)
    for name in found._per_example:
        if getattr(found, name).numel():
            assert torch.equal(getattr(whole, name), getattr(found, name))
    assert len(found.to_frame()) == found.values.numel()
    assert "<table" in found._repr_html_()
