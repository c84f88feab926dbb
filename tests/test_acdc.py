"""Discovery by running the model: ACDC beside a loop by hand, learned masks, what is kept when it is interrupted."""

from __future__ import annotations

import json
import math

import pytest
import torch

from circuitvision.circuits import acdc, edge_pruning, evaluate
from circuitvision.circuits.acdc import FILE, visited
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.circuits.gates import Gates
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from tests.edge_models import Example, double_throughout, score

pytestmark = pytest.mark.filterwarnings("ignore:The circuit was found on")
OPEN = 0.15
"""How far the expected share of open gates may be from the share that is asked for, after a short training."""
QUIET = {"allow_wrong": True, "progress": False}


def by_hand(runs: CircuitRuns, threshold: float, order: str = "reverse", seed: int = 0) -> set[str]:
    """One decision after another, a run of its own for each."""
    mask = runs.graph.edges.clone()
    current = float(runs.measure([mask], progress=False).values[0, 0].mean())
    for row, column in visited(runs.graph, order, seed):
        tried = mask.clone()
        tried[row, column] = False
        value = float(runs.measure([tried], progress=False).values[0, 0].mean())
        if abs(value - current) < threshold:
            mask, current = tried, value
    return set(runs.graph.edge_names(mask))


@pytest.mark.parametrize(("order", "threshold"), [("reverse", 0.02), ("random", 0.3)])
def test_many_at_once_are_one_after_another(order, threshold):
    known = handbuilt.build("or", noise=0.05, seed=1)
    runs = CircuitRuns(known.model, known.pairs, known.metric, allow_wrong=True)
    given = {"threshold": threshold, "order": order, "seed": 3, "prune": False}
    result = acdc(known.model, known.pairs, known.metric, **given, **QUIET)
    assert set(result.circuit) == by_hand(runs, threshold, order, 3)
    assert 0 < len(result.circuit) < runs.graph.n_edges


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "clip", "pi0"])
def test_what_was_removed_adds_up_in_every_family(name):
    with double_throughout():
        found = Example(name)
        given = {"metric": score, "clean": found.clean, "corrupt": found.corrupt}
        runs = CircuitRuns(found.model, **given)
        threshold = 0.5 * float((found.base - found.other).mean().abs())
        result = acdc(found.model, threshold=threshold, prune=False, progress=False, **given)
        kept = runs.measure([runs.mask(result.circuit)], progress=False).values[0, 0]
        moved = result.attribution.values.nan_to_num().masked_fill(result.circuit.mask[..., None], 0.0).sum((0, 1))
        torch.testing.assert_close(kept.double(), found.base + moved, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["marker-pointer", "and", "v-composition", "saturated-keys"])
def test_known_circuits_are_found(name):
    known = handbuilt.build(name)
    smallest = min(abs(effect) for effect in known.effects.values())
    result = acdc(known.model, known.pairs, known.metric, threshold=0.5 * smallest, **QUIET)
    assert set(result.circuit) == known.edges


def test_of_an_or_one_branch_is_left():
    known = handbuilt.build("or")
    result = acdc(known.model, known.pairs, known.metric, threshold=0.1, **QUIET)
    assert set(result.circuit) < known.edges
    found = evaluate(
        known.model, result.circuit, known.pairs, known.metric, ablations=["interchange"], n_random=0, **QUIET
    )
    assert float(found.faithfulness[0, 0]) == pytest.approx(1.0, abs=1e-9)


def test_decisions_are_kept_and_taken_over(tmp_path):
    known = handbuilt.build("and")
    given = {"threshold": 0.1, "save_to": tmp_path, **QUIET}
    whole = acdc(known.model, known.pairs, known.metric, **given)
    path = tmp_path / FILE
    held = json.loads(path.read_text())
    with pytest.raises(InputError, match="resume"):
        acdc(known.model, known.pairs, known.metric, **given)
    path.write_text(json.dumps({**held, "removed": held["removed"][:5], "effects": held["effects"][:5]}))
    again = acdc(known.model, known.pairs, known.metric, resume=True, **given)
    assert again.circuit == whole.circuit
    torch.testing.assert_close(again.attribution.values, whole.attribution.values, equal_nan=True)
    with pytest.raises(InputError, match="another study"):
        acdc(known.model, known.pairs, known.metric, resume=True, **{**given, "threshold": 0.2})
    with pytest.raises(InputError, match="save_to"):
        acdc(known.model, known.pairs, known.metric, threshold=0.1, resume=True, **QUIET)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    known = handbuilt.build("and")
    whole = acdc(known.model, known.pairs, known.metric, threshold=0.1, **QUIET)
    measure, calls = CircuitRuns.measure, []

    def interrupted(self, *args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, *args, **keywords)

    monkeypatch.setattr(CircuitRuns, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        acdc(known.model, known.pairs, known.metric, threshold=0.1, save_to=tmp_path, **QUIET)
    assert len(json.loads((tmp_path / FILE).read_text())["removed"]) > 0
    again = acdc(known.model, known.pairs, known.metric, threshold=0.1, save_to=tmp_path, resume=True, **QUIET)
    assert again.circuit == whole.circuit


def test_a_rise_of_a_distance_counts_and_a_fall_does_not():
    known = handbuilt.build("and")
    result = acdc(known.model, known.pairs, "kl", threshold=1e-4, **QUIET)
    assert set(result.circuit) == known.edges
    with pytest.raises(InputError, match="threshold"):
        acdc(known.model, known.pairs, known.metric, threshold=0.0, **QUIET)
    with pytest.raises(InputError, match="order"):
        acdc(known.model, known.pairs, known.metric, threshold=0.1, order="topological", **QUIET)


@pytest.mark.parametrize("name", ["marker-pointer", "marker-colour", "and"])
def test_learned_masks_find_known_circuits(name):
    known = handbuilt.build(name)
    state = {key: value.clone() for key, value in known.model.module.state_dict().items()}
    result = edge_pruning(known.model, known.pairs, known.metric, n_edges=len(known.edges), steps=120, **QUIET)
    assert set(result.circuit) == known.edges
    alpha = result.attribution.values[..., 0][result.attribution.edges]
    expected = torch.sigmoid(alpha + 2 / 3 * math.log(11))
    assert float(expected.mean()) == pytest.approx(len(known.edges) / result.attribution.n_edges, abs=OPEN)
    assert all(torch.equal(value, state[key]) for key, value in known.model.module.state_dict().items())
    assert all(parameter.grad is None for parameter in known.model.module.parameters())


def test_learned_masks_are_the_same_again():
    known = handbuilt.build("and", noise=1e-3)
    one, other, third = (
        edge_pruning(known.model, known.pairs, known.metric, n_edges=4, steps=5, seed=seed, **QUIET)
        for seed in (0, 0, 1)
    )
    torch.testing.assert_close(one.attribution.values, other.attribution.values, equal_nan=True)
    assert not torch.equal(one.attribution.values.nan_to_num(), third.attribution.values.nan_to_num())
    with pytest.raises(InputError, match="n_edges"):
        edge_pruning(known.model, known.pairs, known.metric, n_edges=0, **QUIET)


def test_gates_are_open_as_often_as_expected():
    """Hard concrete gates: exactly 0 and exactly 1 with positive probability, and the penalty counts what is not 0."""
    edges = torch.ones(1, 7, dtype=torch.bool)
    gates = Gates(edges, 3, 0.0, 0.1, 1.0, 0)
    for level in (-3.0, -1.0, 0.0, 1.5):
        with torch.no_grad():
            gates.alpha.fill_(level)
        drawn = torch.stack([gates.drawn().detach() for _ in range(800)])
        assert float((drawn > 0).double().mean()) == pytest.approx(float(gates.open.detach()), abs=0.03)
        assert bool((drawn == 0).any())
        assert bool((drawn == 1).any())
    assert gates.target == pytest.approx(3 / 7)


@pytest.mark.parametrize(
    "options",
    [{"n_edges": 2.5}, {"n_edges": True}, {"steps": 1.5}, {"rate": math.nan}, {"penalty_rate": 0.0}, {"start": math.inf}],
    ids=str,
)  # fmt: skip
def test_masks_that_cannot_be_trained_are_refused(options):
    known = handbuilt.build("and")
    with pytest.raises(InputError, match=next(iter(options))):
        edge_pruning(known.model, known.pairs, known.metric, **{"n_edges": 4, "steps": 2, **QUIET, **options})


def test_a_metric_without_a_value_decides_nothing():
    known = handbuilt.build("and")

    def metric(logits: torch.Tensor) -> torch.Tensor:
        value = logits[:, 1] - logits[:, 0]
        return torch.where(torch.arange(len(value)) == 0, math.nan, value)

    with pytest.raises(InputError, match="finite"):
        acdc(known.model, known.pairs, metric, threshold=0.1, **QUIET)
    with pytest.raises(InputError, match="finite"):
        edge_pruning(known.model, known.pairs, metric, n_edges=4, steps=2, **QUIET)
    assert not known.model.engine.active()
