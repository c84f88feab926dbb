"""Evaluations of circuits: identities, hand-built circuits, ratios of means by scene, and the random circuits beside them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.circuits import CircuitEvaluation, edge_attribution, evaluate
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.circuits.connectivity import pruned, random_circuit
from circuitvision.circuits.faithfulness_ratios import Kept, area, distance_area, log_area
from circuitvision.circuits.random_circuits import connected_like, degree_matched
from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from circuitvision.results import Result
from tests.edge_models import FAMILIES, Example, double_throughout, score

pytestmark = [
    pytest.mark.filterwarnings("ignore:The two runs do not differ"),
    pytest.mark.filterwarnings("ignore:The circuit was found on examples"),
    pytest.mark.filterwarnings("ignore:.*random connected circuits have fewer edges"),
    pytest.mark.filterwarnings("ignore:No other circuit has nodes"),
    pytest.mark.filterwarnings("ignore:No faithfulness"),
]


@pytest.fixture(scope="module")
def known() -> handbuilt.HandBuilt:
    return handbuilt.build("and")


@pytest.fixture(scope="module")
def scored(known):
    return edge_attribution(known.model, known.pairs, known.metric, progress=False, allow_wrong=True)


@pytest.fixture(scope="module")
def evaluated(known, scored) -> CircuitEvaluation:
    return evaluate(
        known.model, scored.circuit(known.edges), known.pairs, known.metric, n_random=6, progress=False, allow_wrong=True
    )  # fmt: skip


# -- identities --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def example(request: pytest.FixtureRequest) -> Iterator[Example]:
    with double_throughout():
        yield Example(request.param)


def test_all_edges_are_faithful_and_none_is_not(example):
    scores = edge_attribution(example.model, metric=score, clean=example.clean, corrupt=example.corrupt, progress=False)
    full = scores.circuit(scores.edges)
    hooks = len(example.model.engine.active())
    before = of_json(plain(full)), full.mask.clone(), scores.values.clone()
    found = evaluate(
        example.model, full, metric=score, clean=example.clean, corrupt=example.corrupt, n_random=0, progress=False
    )  # fmt: skip
    # One example: with two the guard against a denominator near 0 speaks first.
    for number in (0, 1):
        f = found.take([number]).faithfulness
        torch.testing.assert_close(f[:, 0], torch.ones(3).double(), rtol=0, atol=1e-10)
        torch.testing.assert_close(f[:, 1], torch.zeros(3).double(), rtol=0, atol=1e-10)
    assert bool(found.faithfulness[:, 0].isnan().any()) == bool(found.reason)
    assert len(example.model.engine.active()) == hooks
    assert of_json(plain(full)) == before[0]
    assert bool((full.mask == before[1]).all())
    torch.testing.assert_close(scores.values, before[2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", handbuilt.names())
def test_known_circuits_are_faithful_and_leave_nothing_out_by_interchange(name):
    known = handbuilt.build(name)
    scores = edge_attribution(known.model, known.pairs, known.metric, progress=False, allow_wrong=True)
    circuit = scores.circuit(known.edges)
    options = {"ablations": ["interchange"], "n_random": 0, "progress": False, "allow_wrong": True}
    found = evaluate(known.model, circuit, known.pairs, known.metric, **options)
    assert found.faithfulness[0].tolist() == pytest.approx([1, 0], abs=1e-9)
    assert circuit.precision(known.edges) == circuit.recall(known.edges) == 1
    # Without one of its edges an AND keeps nothing.
    if name == "and":
        less = circuit.without(next(iter(circuit)))
        assert less.recall(known.edges) == pytest.approx(0.8)
        assert evaluate(known.model, less, known.pairs, known.metric, **options).faithfulness[0, 0] == pytest.approx(0)
        assert circuit.adding("v.input->v.m0").precision(circuit) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("name", "mean", "zero"),
    [("and", (1, 0), (1, 0)), ("or", (1, 0), (0, 1)), ("q-composition", (0, 0), (0, 0)), ("mlp-features", (1, 0), (1, 0))],
)  # fmt: skip
def test_other_ablations_ask_other_questions(name, mean, zero):
    """What a circuit of the *difference* leaves out may be needed all the same: queries that are alike in both runs (composition), and the bias that
    an OR of bits coded as 0 and 1 starts from."""
    known = handbuilt.build(name)
    scores = edge_attribution(known.model, known.pairs, known.metric, progress=False, allow_wrong=True)
    found = evaluate(
        known.model, scores.circuit(known.edges), known.pairs, known.metric, ablations=["mean", "zero"], n_random=0, progress=False,
        allow_wrong=True,
    )  # fmt: skip
    assert found.faithfulness.flatten().tolist() == pytest.approx([*mean, *zero], abs=1e-9)


# -- what is said ------------------------------------------------------------------------------------------------------------------------------


def test_a_table_beside_the_runs_it_is_made_of(known, scored, evaluated):
    runs = CircuitRuns(known.model, known.pairs, known.metric, allow_wrong=True)
    circuit = runs.mask(scored.circuit(known.edges))
    for number, ablation in enumerate(("interchange", "mean", "zero")):
        alone = runs.measure([circuit, runs.graph.edges & ~circuit], ablation, progress=False)
        torch.testing.assert_close(evaluated.values[number, :2], alone.values[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(evaluated.empty[number], alone.empty[0], rtol=0, atol=1e-12)
    table = evaluated.table()
    assert list(table.condition[:4]) == ["circuit", "complement", "random", "degree-matched"]
    assert table.runs.tolist() == [1, 1, 6, 6] * 3
    assert table.edges[:2].tolist() == [5, 13]
    assert table.reach[2] == pytest.approx(1 / 7)
    assert len(evaluated.to_frame()) == evaluated.values.numel()
    assert evaluated.variation.item() == pytest.approx(0, abs=1e-9)
    assert evaluated.completeness.tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    assert "complement" in evaluated._repr_html_()


def test_variation_is_the_spread_over_ablations(evaluated):
    import dataclasses

    values = evaluated.values.clone()
    for number, f in enumerate((1.0, 0.5, 0.75)):
        values[number, 0] = evaluated.empty[number] + f * (evaluated.clean - evaluated.empty[number])
    found = dataclasses.replace(evaluated, values=values)
    assert found.faithfulness[:, 0].tolist() == pytest.approx([1, 0.5, 0.75])
    assert found.variation.item() == pytest.approx(0.25 / 0.75)


def test_several_circuits_and_a_file(known, scored, evaluated, tmp_path):
    full = scored.circuit(scored.edges)
    found = evaluate(
        known.model, {"known": scored.circuit(known.edges), "all": full}, known.pairs, known.metric, n_random=6, progress=False, allow_wrong=True
    )  # fmt: skip
    assert found.circuits == ["known", "all"]
    torch.testing.assert_close(found.values[0], evaluated.values, rtol=0, atol=0)
    torch.testing.assert_close(found.faithfulness[1, :, 0], torch.ones(3).double(), rtol=0, atol=1e-12)
    assert list(found.table().circuit.unique()) == ["known", "all"]
    again = Result.load(found.save(tmp_path / "evaluation.npz"))
    assert isinstance(again, cv.CircuitEvaluation)
    torch.testing.assert_close(again.faithfulness, found.faithfulness, rtol=0, atol=0)
    assert again.provenance == found.provenance


# -- ratios of means ---------------------------------------------------------------------------------------------------------------------------


def test_a_ratio_of_means_is_no_mean_of_ratios():
    empty, clean = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 3.0, 0.5])
    values = torch.tensor([1.0, 1.0, 1.5, 0.5])
    kept = Kept.of(values, empty, clean, list(range(4)), [])
    assert kept.share.item() == pytest.approx(4 / 6.5)
    assert kept.share.item() != pytest.approx(float((values / clean).mean()))
    assert kept.reason() == ""
    opposite = Kept.of(values, empty, clean * torch.tensor([1, 1, -1, 1]), list(range(4)), [])
    assert opposite.share.isnan()
    assert "cannot be told from 0" in opposite.reason()


def test_groups_change_the_interval_and_not_the_share():
    rng = np.random.default_rng(0)
    clean = torch.tensor(rng.normal(3, 0.3, 60))
    scene = torch.tensor(rng.normal(0, 0.6, 12)).repeat_interleave(5)
    values, empty = clean * 0.7 + scene, torch.zeros(60).double()
    groups = [number // 5 for number in range(60)]
    alone, grouped = (Kept.of(values, empty, clean, list(range(60)), own) for own in ([], groups))
    assert alone.share.item() == pytest.approx(grouped.share.item())
    widths = [float(kept.interval(0.95, 2000, 0).diff(dim=0)) for kept in (alone, grouped)]
    assert widths[1] > 1.5 * widths[0]
    low, high = grouped.interval(0.95, 2000, 0).tolist()
    assert low < grouped.share.item() < high
    # To first order the interval is that of the standard error.
    assert (high - low) / 2 == pytest.approx(1.96 * grouped.error.item(), rel=0.25)


def test_unequal_groups_and_examples_without_a_value():
    clean = torch.tensor([1.0, 1.2, 0.9, 1.1, 1.0, math.nan])
    values = torch.tensor([1.0, 0.6, 0.9, math.nan, 0.5, 0.3])
    kept = Kept.of(values, torch.zeros(6), clean, list(range(6)), ["a", "a", "a", "b", "b", "b"])
    assert kept.share.item() == pytest.approx((1 + 0.6 + 0.9 + 0.5) / (1 + 1.2 + 0.9 + 1.0))


# -- areas -------------------------------------------------------------------------------------------------------------------------------------

KS = (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


def test_areas_of_curves_that_are_known():
    one = torch.ones(len(KS))
    assert area(one, KS).item() == pytest.approx(1, abs=1e-12)
    assert distance_area(one, KS).item() == 0
    assert log_area(one, KS).item() == pytest.approx(1, abs=1e-12)
    perfect = one.clone()
    perfect[0] = 0
    assert area(perfect, KS).item() == pytest.approx(1 - 0.0005, abs=1e-12)
    assert distance_area(perfect, KS).item() == pytest.approx(0.0005, abs=1e-12)
    line = torch.tensor(KS)
    assert area(line, KS).item() == pytest.approx(0.5)
    assert distance_area(line, KS).item() == pytest.approx(0.5)
    # f goes from 0 to 2: |1 − f| is two triangles of area ¼ each, and not the trapezoid's 1.
    assert distance_area(torch.tensor([0.0, 2.0]), [0, 1]).item() == pytest.approx(0.5)
    assert distance_area(torch.tensor([0.0, 4.0, 1.0]), [0, 0.5, 1]).item() == pytest.approx(
        0.5 * (1 + 9) / 8 + 0.5 * 1.5
    )


@given(st.lists(st.floats(-3, 4), min_size=2, max_size=6))
def test_the_distance_from_1_is_exact_wherever_the_line_crosses(values):
    ks = np.linspace(0, 1, len(values))
    fine = np.linspace(0, 1, 20_001)
    expected = np.trapezoid(np.abs(1 - np.interp(fine, ks, values)), fine)
    assert distance_area(torch.tensor(values), ks.tolist()).item() == pytest.approx(expected, abs=1e-3)


# -- random circuits ---------------------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 500), name=st.sampled_from(["q-composition", "crossing"]))
def test_degree_matched_circuits_have_the_circuits_degrees(seed, name):
    graph, mask = _graph(name, seed)
    (found,) = degree_matched(mask, graph, 1, seed)
    assert bool((found <= graph.edges).all())
    for dim in (0, 1):
        assert Counter(found.sum(dim).tolist()) == Counter(mask.sum(dim).tolist())


def test_heads_of_a_layer_change_places_with_all_their_edges():
    known = handbuilt.build("marker-pointer")
    graph = CircuitRuns(known.model, known.pairs, known.metric, allow_wrong=True).graph
    mask = graph.mask(known.edges)
    found = {frozenset(graph.edge_names(one)) for one in degree_matched(mask, graph, 20, 0)}
    other = frozenset(name.replace("a0.h0", "a0.h1") for name in known.edges)
    assert found == {frozenset(known.edges), other}


def test_groups_of_keys_stay_with_their_heads():
    from circuitvision.circuits.random_circuits import _exchanges

    senders = [f"l.a0.h{head}" for head in range(6)]
    slots = [f"l.a0.h{head}<q>" for head in range(6)] + [f"l.kv0.g{group}<k>" for group in range(3)]
    for seed in range(20):
        places = _exchanges(senders, slots, torch.Generator().manual_seed(seed))
        assert sorted(places) == sorted(places.values())
        for head in range(6):
            new = int(places[f"l.a0.h{head}"].rpartition("h")[2])
            assert places[f"l.kv0.g{head // 2}"] == f"l.kv0.g{new // 2}"


def test_connected_ones_have_the_size_and_lie_on_paths():
    graph, mask = _graph("q-composition", 3)
    for one in connected_like(mask, graph, 5, 0):
        assert bool((pruned(one, graph.reads) == one).all())
        assert int(one.sum()) == int(mask.sum())
    assert all(
        bool((connected_like(graph.edges, graph, 1, 0)[0] == pruned(graph.edges, graph.reads)).all()) for _ in (0,)
    )


@pytest.mark.parametrize("left_out", [0, 1, 5])
def test_connected_ones_are_as_large_as_nearly_the_whole_model(left_out):
    """Random walks hardly ever meet the last edges of a model with many."""
    senders, layers = 40, 13
    edges, reads = torch.ones(senders, senders, dtype=torch.bool), torch.zeros(senders, senders, dtype=torch.bool)
    # Sender 0 enters the model, slot i is what sender i + 1 is made of, and the last slot is the output's; three of each layer.
    reads[torch.arange(senders - 1), torch.arange(1, senders)] = True
    layer = torch.cat([torch.zeros(1), 1 + torch.arange(senders - 1) // 3]).long()
    edges = layer[:, None] < torch.cat([layer[1:], torch.tensor([layers + 1])])[None]
    wanted = int(pruned(edges, reads).sum()) - left_out
    found = random_circuit(edges, reads, wanted, torch.Generator().manual_seed(0))
    assert int(found.sum()) == wanted
    assert bool((pruned(found, reads) == found).all())


_graphs: dict = {}


def _graph(name, seed):
    if name not in _graphs:
        known = handbuilt.build(name)
        _graphs[name] = CircuitRuns(known.model, known.pairs, known.metric, allow_wrong=True).graph
    graph = _graphs[name]
    share = torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(seed))
    return graph, graph.edges & (share < 0.4)


# -- bad input ---------------------------------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_before_anything_runs(known, scored):
    given = (known.pairs, known.metric)
    circuit = scored.circuit(known.edges)
    for wrong, options, word in (
        (scored.circuit(0), {}, "no edges"),
        ({"a": circuit, "b": scored.circuit(0)}, {}, "'b' has no edges"),
        ({}, {}, "No circuit"),
        (["v.input->v.m0"], {}, "is no circuit"),
        (circuit, {"ablations": ["median"]}, "median"),
        (circuit, {"ablations": []}, "not understood"),
        (circuit, {"n_random": -1}, "n_random"),
        (circuit, {"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=word):
            evaluate(known.model, wrong, *given, progress=False, allow_wrong=True, **options)
    with pytest.raises(InputError, match="one metric"):
        evaluate(known.model, circuit, known.pairs, {"a": known.metric, "b": known.metric}, allow_wrong=True)
    other = handbuilt.build("and", noise=1e-3)
    with pytest.raises(InputError, match="other weights"):
        evaluate(other.model, circuit, other.pairs, other.metric, allow_wrong=True)
    assert not known.model.engine.active()


def test_discovery_and_test_on_the_same_examples_is_said(known, scored):
    options = {"n_random": 0, "ablations": ["interchange"], "progress": False, "allow_wrong": True}
    part = edge_attribution(known.model, known.pairs[:2], known.metric, progress=False, allow_wrong=True)
    for one in (scored, part):
        with pytest.warns(UserWarning, match="found on examples"):
            evaluate(known.model, one.circuit(known.edges), known.pairs, known.metric, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(known.model, part.circuit(known.edges), known.pairs[2:], known.metric, **options)


def test_runs_that_do_not_differ_have_no_faithfulness_and_a_reason(known, scored):
    inputs = next(iter(known.pairs.clean.batches(known.model, 4))).inputs
    with pytest.warns(UserWarning, match="No faithfulness"):
        found = evaluate(
            known.model, scored.circuit(known.edges), metric=lambda logits: logits[:, 0] * 0 + 1, clean=inputs, corrupt=inputs, n_random=0,
            progress=False,
        )  # fmt: skip
    assert bool(found.faithfulness.isnan().all())
    assert "interchange ablation" in found.reason
    assert "no faithfulness" in found._repr_html_()
