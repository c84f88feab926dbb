"""Faithfulness curves, minimality, and the agreement of circuits: identities, hand-built circuits, hand-computed numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.circuits import (
    compare_circuits,
    edge_attribution,
    evaluate,
    faithfulness_curve,
    layer_matrix,
    minimality,
)
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.circuits.evaluation_claims import comes_near, explains, needs
from circuitvision.circuits.faithfulness_curve import ranked_edges
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from circuitvision.plots.circuit_evaluation import write_page
from circuitvision.results import Result
from tests.edge_models import Example, double_throughout, score

pytestmark = [
    pytest.mark.filterwarnings("ignore:The circuit was found on examples"),
    pytest.mark.filterwarnings("ignore:.*the edges that should add up"),
]
QUIET = {"progress": False, "allow_wrong": True}


def built(name, **options):
    known = handbuilt.build(name, **options)
    return known, edge_attribution(known.model, known.pairs, known.metric, method="eap-ig", **QUIET)


@pytest.fixture(scope="module")
def either():
    return built("or")


@pytest.fixture(scope="module")
def noisy():
    return built("q-composition", noise=1e-2)


@pytest.fixture(scope="module")
def curve(noisy):
    known, scores = noisy
    return faithfulness_curve(known.model, scores, known.pairs, known.metric, n_random=3, **QUIET)


# -- curves ------------------------------------------------------------------------------------------------------------------------------------


def test_ends_are_exact_and_points_are_runs(noisy, curve):
    known, scores = noisy
    assert curve.faithfulness[:, 0].tolist() == [0, 0]
    assert curve.faithfulness[:, -1].tolist() == [1, 1]
    assert bool((curve.random_faithfulness[:, 0] == 0).all())
    assert bool((curve.random_faithfulness[:, -1] == 1).all())
    runs = CircuitRuns(known.model, known.pairs, known.metric, allow_wrong=True)
    for number, k in enumerate(curve.ks):
        count = round(k * scores.n_edges)
        assert curve.sizes[:, number].tolist() == [count, count]
        alone = runs.measure([runs.mask(scores.circuit(count))], progress=False).values[0, 0]
        torch.testing.assert_close(curve.values[curve.index_of("order", "size"), number], alone, rtol=0, atol=1e-9)


def test_areas_are_those_of_the_table(curve):
    table = curve.table()
    for order, name in (("signed", "cpr"), ("size", "cmd")):
        own = table[table.order == order]
        f = own.faithfulness.to_numpy() if name == "cpr" else np.abs(1 - own.faithfulness.to_numpy())
        fine = np.union1d(np.linspace(0, 1, 200_001), own.k)
        line = np.interp(fine, own.k, own.faithfulness)
        expected = np.trapezoid(line if name == "cpr" else np.abs(1 - line), fine)
        assert getattr(curve, name) == pytest.approx(expected, abs=1e-6)
        assert f.max() > 0.5
    areas = curve.areas().set_index("order")
    assert areas.loc["signed", "cpr"] == pytest.approx(curve.cpr)
    assert areas.loc["size", "cmd_low"] <= curve.cmd <= areas.loc["size", "cmd_high"]
    assert areas.loc["size", "log_area"] == pytest.approx(curve.log_area)
    assert areas.loc["random connected", "cmd"] > curve.cmd


def test_a_perfect_curve(curve):
    perfect = dataclasses.replace(curve, values=curve.clean.expand_as(curve.values))
    assert perfect.cpr == pytest.approx(1, abs=1e-12)
    assert perfect.cmd == pytest.approx(0, abs=1e-12)
    assert perfect.log_area == pytest.approx(1, abs=1e-12)


def test_the_signed_order_puts_last_what_works_against_the_answer(noisy):
    known, scores = noisy
    swing = float((scores.source - scores.base).mean())
    assert swing < 0
    ranked = [float(scores.scores[tuple(place)]) for place in ranked_edges(scores, True).tolist()]
    assert ranked == sorted(ranked)
    sizes = [abs(float(scores.scores[tuple(place)])) for place in ranked_edges(scores, False).tolist()]
    assert sizes == sorted(sizes, reverse=True)
    restored = edge_attribution(known.model, known.pairs, known.metric, mode="denoise", **QUIET)
    ranked = [float(restored.scores[tuple(place)]) for place in ranked_edges(restored, True).tolist()]
    assert ranked == sorted(ranked, reverse=True)


def test_selections(noisy):
    known, scores = noisy
    given = (known.model, scores, known.pairs, known.metric)

    def largest(attribution, count):
        return attribution.circuit(count)

    by_hand = faithfulness_curve(*given, ks=[0.1, 0.3], select=largest, n_random=0, **QUIET)
    top = faithfulness_curve(*given, ks=[0.1, 0.3], signed=False, n_random=0, **QUIET)
    assert by_hand.axes["order"] == ["largest"]
    assert by_hand.ks == [0, 0.1, 0.3, 1]
    torch.testing.assert_close(by_hand.values, top.values, rtol=0, atol=0)
    assert by_hand.cmd == top.cmd
    pruned = faithfulness_curve(*given, ks=[0.1, 0.3], signed=False, select="pruned", n_random=0, **QUIET)
    assert bool((pruned.sizes <= top.sizes).all())
    assert bool((pruned.sizes < top.sizes).any())
    # What lies on no path carries nothing.
    torch.testing.assert_close(pruned.values, top.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["llava-clip-llama", "pi0", "clip"])
@pytest.mark.filterwarnings("ignore:No faithfulness")
def test_models_of_several_towers(name):
    with double_throughout():
        found = Example(name)
        sides = {"metric": score, "clean": found.clean, "corrupt": found.corrupt, "progress": False}
        scores = edge_attribution(found.model, **sides)
        made = faithfulness_curve(found.model, scores, ks=[0.2], n_random=1, **sides)
        small = minimality(found.model, scores.circuit(3), **sides)
    one = made.take([0])
    assert one.faithfulness[0, 0] == 0
    assert one.faithfulness[0, -1] == 1
    assert len(small.axes["edge"]) == 3
    assert "output" in layer_matrix(scores).axes["to"]
    assert compare_circuits(scores, scores).spearman == pytest.approx(1)


# -- minimality --------------------------------------------------------------------------------------------------------------------------------


def branch(head: int) -> set[str]:
    return {f"v.input->v.a0.h{head}<v>", f"v.a0.h{head}->v.m0", "v.m0->v.logits"}


def test_or_is_minimal_with_one_branch_and_both_are_found(either):
    known, scores = either
    both = minimality(known.model, scores.circuit(known.edges), known.pairs, known.metric, subsets=True, **QUIET)
    assert not both.locally_minimal()
    assert set(both.removable()) == known.edges - {"v.m0->v.logits"}
    assert {frozenset(one) for one in both.subsets} == {frozenset(branch(0)), frozenset(branch(1))}
    assert both.subset_minimal is False
    one = minimality(known.model, scores.circuit(branch(0)), known.pairs, known.metric, subsets=True, **QUIET)
    assert one.locally_minimal()
    assert one.subset_minimal is True
    assert one.changes.tolist() == pytest.approx([-1, -1, -1])
    assert one.faithfulness == pytest.approx(1)
    assert minimality(known.model, scores.circuit(branch(0)), known.pairs, known.metric, **QUIET).subset_minimal is None


def test_effects_are_those_of_runs_without_the_edge(noisy):
    known, scores = noisy
    circuit = scores.circuit(8)
    found = minimality(known.model, circuit, known.pairs, known.metric, **QUIET)
    runs = CircuitRuns(known.model, known.pairs, known.metric, allow_wrong=True)
    assert found.axes["edge"] == circuit.edges
    for number, edge in enumerate(circuit.edges):
        pair = runs.measure([circuit.mask, circuit.without(edge).mask], progress=False).values[0]
        torch.testing.assert_close(found.effects[number], pair[1] - pair[0], rtol=0, atol=1e-9)
        gap = float((found.clean - found.empty).mean())
        assert found.changes[number].item() == pytest.approx(float((pair[1] - pair[0]).mean()) / gap, abs=1e-9)
    assert found.table().change.abs().is_monotonic_decreasing


@pytest.mark.parametrize("ablation", ["interchange", "zero"])
def test_smallest_subsets_by_brute_force(noisy, ablation):
    known, scores = noisy
    circuit = scores.circuit(known.edges).adding("v.input->v.m0")
    found = minimality(
        known.model, circuit, known.pairs, known.metric, ablation=ablation, subsets=True, eps=0.1, **QUIET
    )  # fmt: skip
    runs = CircuitRuns(known.model, known.pairs, known.metric, allow_wrong=True)
    subsets = [set(one) for size in range(5) for one in itertools.combinations(circuit.edges, size)]
    scored = runs.measure(
        [scores.circuit(sorted(one)).mask for one in subsets] + [circuit.mask], ablation, progress=False
    )
    f = (scored.values[0] - scored.empty[0]).mean(-1) / (scored.clean[0] - scored.empty[0]).mean()
    as_good = [one for one, own in zip([*subsets, set(circuit)], f.tolist(), strict=True) if abs(own - f[-1]) <= 0.1]
    expected = {frozenset(one) for one in as_good if not any(other < one for other in as_good)}
    assert {frozenset(one) for one in found.subsets} == expected


# -- agreement ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep():
    """Twelve layers of two heads, every edge with the same score but those out of layer 10."""
    senders = [
        "v.input",
        *(name for layer in range(12) for name in (f"v.a{layer}.h0", f"v.a{layer}.h1", f"v.m{layer}")),
    ]
    slots = ["v.logits"]
    values = torch.ones(len(senders), 1, 1, dtype=torch.float64)
    return cv.EdgeAttribution(
        values=values, axes={"sender": senders, "slot": slots, "example": [0]}, base=torch.zeros(1), source=torch.ones(1),
        reads={"v.logits": []},
    )  # fmt: skip


def test_bands_are_printed_and_an_even_circuit_shows_their_widths(deep):
    matrix = layer_matrix(deep)
    symmetric, published = (matrix.depth_bias(bands=bands) for bands in ("symmetric", "published"))
    assert (symmetric.shallow, symmetric.deep, symmetric.value) == ([0, 1, 2], [9, 10, 11], 0)
    assert (published.shallow, published.deep) == ([0, 1, 2, 3], [9, 10, 11])
    assert published.value == pytest.approx(math.log(3 / 4)) == published.even
    assert "9–11" in str(published)
    values = deep.values.clone()
    values[[name.startswith("v.a10") for name in deep.axes["sender"]]] = -4.0
    heavier = layer_matrix(dataclasses.replace(deep, values=values)).depth_bias(targets="output")
    assert heavier.value == pytest.approx(math.log((3 + 9 + 3) / 9))
    assert math.isnan(matrix.depth_bias(targets="deep").value)


def test_a_layer_matrix_sums_weights(noisy):
    _, scores = noisy
    for circuit in (scores, scores.circuit(10)):
        matrix = layer_matrix(circuit)
        mask = scores.edges if circuit is scores else circuit.mask
        assert float(matrix.values.sum()) == pytest.approx(float(scores.scores[mask].abs().sum()))
        assert int(matrix.edges.sum()) == int(mask.sum())
        assert float(matrix.share.sum()) == pytest.approx(1)
        expected = sum(
            abs(float(scores.scores[scores.place(name)]))
            for name in scores.circuit(mask)
            if name.startswith(("v.a0", "v.m0")) and name.partition("->")[2].startswith(("v.a1", "v.m1"))
        )
        cell = matrix.index_of("from", "vision 0"), matrix.index_of("to", "vision 1")
        assert float(matrix.values[cell]) == pytest.approx(expected)
    without = layer_matrix(scores, inputs=False)
    assert float(without.values[without.index_of("from", "vision in")].sum()) == 0
    with pytest.raises(InputError, match="language"):
        without.depth_bias("language")
    with pytest.raises(InputError, match="band empty"):
        without.depth_bias(share=0.2)
    with pytest.raises(InputError, match="targets"):
        without.depth_bias(targets="every")


def test_agreement_by_hand(noisy):
    _, scores = noisy
    same = compare_circuits(scores, scores)
    assert (same.spearman, same.cosine, same.weighted_jaccard, same.jaccard) == pytest.approx((1, 1, 1, 1))
    assert same.distance == same.spectra == 0
    turned = dataclasses.replace(scores, values=-2 * scores.values)
    other = compare_circuits(scores, turned)
    assert other.spearman == pytest.approx(1)
    assert other.cosine == pytest.approx(1)
    assert other.weighted_jaccard == pytest.approx(0.5)
    # A normalised Laplacian has no scale.
    assert other.spectra == pytest.approx(0, abs=1e-9)
    first, second = scores.circuit(6), scores.circuit(10) - scores.circuit(4)
    found = compare_circuits(first, second)
    assert found.jaccard == pytest.approx(2 / 10)
    expected = 6 * 6 / scores.n_edges
    assert found.chance == pytest.approx(expected / (12 - expected))
    shared = scores.scores[(first & second).mask].abs().sum()
    top = scores.scores[(first | second).mask].abs().sum()
    assert found.weighted_jaccard == pytest.approx(float(shared / top))
    from scipy.stats import spearmanr

    weights = [(scores.scores.nan_to_num().abs() * one.mask)[scores.edges].numpy() for one in (first, second)]
    assert found.spearman == pytest.approx(spearmanr(*weights).statistic)


def test_the_spectrum_of_a_path_is_known():
    """Two edges in a row: the normalised Laplacian of a path of three nodes has the eigenvalues 0, 1, 2."""
    from circuitvision.circuits.comparison import _spectrum, _weights

    made = cv.EdgeAttribution(
        values=torch.tensor([[[3.0], [math.nan]], [[math.nan], [3.0]]]),
        axes={"sender": ["v.input", "v.m0"], "slot": ["v.m0", "v.logits"], "example": [0]},
        base=torch.zeros(1),
        source=torch.ones(1),
    )
    torch.testing.assert_close(_spectrum(*_weights(made)), torch.tensor([0.0, 1.0, 2.0]).double(), atol=1e-12, rtol=0)


# -- figures, files, findings ------------------------------------------------------------------------------------------------------------------


def test_findings_are_tested_before_they_are_said(either):
    known, scores = either
    options = {"ablations": ["interchange", "zero"], **QUIET}
    found = evaluate(known.model, scores.circuit(known.edges), known.pairs, known.metric, n_random=19, **options)
    assert explains(found).holds == (float(found.as_faithful()[0]) == 1 / 20)
    assert not explains(found, ablation="zero").holds
    few = evaluate(known.model, scores.circuit(known.edges), known.pairs, known.metric, n_random=3, **options)
    assert not explains(few).holds
    assert "too few random" in explains(few).reason
    less = evaluate(known.model, scores.circuit(["v.m0->v.logits"]), known.pairs, known.metric, n_random=0, **options)
    assert explains(less).value == pytest.approx(0)
    assert not explains(less).holds
    swapped = dataclasses.replace(few, values=few.values[:, [0, 0, *range(2, few.values.shape[1])]])
    assert not explains(swapped).holds
    whole = minimality(known.model, scores.circuit(known.edges), known.pairs, known.metric, **QUIET)
    assert needs(whole).holds is False
    assert needs(minimality(known.model, scores.circuit(branch(1)), known.pairs, known.metric, **QUIET)).holds


def test_a_curve_no_better_than_random_is_not_affirmed(curve):
    assert comes_near(curve).holds
    flat = dataclasses.replace(curve, values=curve.random[:1].expand_as(curve.values).clone())
    assert not comes_near(flat).holds
    alone = dataclasses.replace(curve, random=torch.zeros(0))
    assert not comes_near(alone).holds


def test_files_figures_and_the_page(noisy, curve, tmp_path):
    known, scores = noisy
    circuit = scores.circuit(known.edges)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(known.model, circuit, known.pairs, known.metric, n_random=3, **QUIET)
        several = evaluate(
            known.model, {"a<b": circuit, "b": scores.circuit(9)}, known.pairs, known.metric, n_random=2, **QUIET
        )
    edges = minimality(known.model, circuit, known.pairs, known.metric, subsets=True, **QUIET)
    matrix = layer_matrix(circuit)
    for number, one in enumerate((found, several, curve, edges, matrix)):
        again = Result.load(one.save(tmp_path / f"{number}.npz"))
        assert type(again) is type(one)
        torch.testing.assert_close(again.values, one.values, rtol=0, atol=0)
        figure = one.plot()
        assert figure.layout.title.text
        assert (
            "<" not in figure.layout.title.text.replace("<br>", "").replace("<span", "").replace("</span", "")
            or one is several
        )
        assert one._repr_html_()
        assert len(one.to_frame())
    text = write_page(found, tmp_path / "page.html", curve, edges).read_text()
    assert "Without each edge" in text
    assert "By number of edges" in text
    assert "http://" not in text.split("<body>")[1]
    assert "a<b" not in write_page(several, tmp_path / "several.html").read_text().split("<body>")[1].replace(
        "\\u003c", ""
    )


def test_nothing_given_is_changed_and_nothing_left_hooked(noisy):
    known, scores = noisy
    circuit, before = scores.circuit(known.edges), len(known.model.engine.active())
    mask, values = circuit.mask.clone(), scores.values.clone()
    weights = cv.provenance.hash_weights(known.model.module)
    minimality(known.model, circuit, known.pairs, known.metric, subsets=True, **QUIET)
    faithfulness_curve(known.model, scores, known.pairs, known.metric, ks=[0.2], n_random=1, **QUIET)
    layer_matrix(circuit)
    compare_circuits(circuit, scores)
    assert bool((circuit.mask == mask).all())
    torch.testing.assert_close(scores.values, values, rtol=0, atol=0, equal_nan=True)
    assert len(known.model.engine.active()) == before
    assert cv.provenance.hash_weights(known.model.module) == weights


# -- bad input ---------------------------------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused(noisy):
    known, scores = noisy
    given = (known.pairs, known.metric)
    for options, word in (
        ({"ks": [0.5, 2]}, "shares"),
        ({"ks": [True]}, "shares"),
        ({"select": "best"}, "selection"),
        ({"signed": "yes"}, "signed"),
        ({"ablation": "median"}, "median"),
        ({"n_random": 1.5}, "n_random"),
    ):
        with pytest.raises(InputError, match=word):
            faithfulness_curve(known.model, scores, *given, **QUIET, **options)
    with pytest.raises(InputError, match="no scores of edges"):
        faithfulness_curve(known.model, scores.circuit(3), *given, **QUIET)
    with pytest.raises(InputError, match="no edges"):
        minimality(known.model, scores.circuit(0), *given, **QUIET)
    with pytest.raises(InputError, match="subsets"):
        minimality(known.model, scores.circuit(17), *given, subsets=True, **QUIET)
    with pytest.raises(InputError, match="eps"):
        minimality(known.model, scores.circuit(3), *given, eps=2, **QUIET)
    other, others = built("q-composition")
    with pytest.raises(InputError, match="other weights"):
        faithfulness_curve(other.model, scores, other.pairs, other.metric, **QUIET)
    with pytest.raises(InputError, match="different graphs"):
        compare_circuits(scores, built("or")[1])
    with pytest.raises(InputError, match="no circuit"):
        layer_matrix(torch.zeros(3))
    assert compare_circuits(scores, others).spearman < 1
