"""Circuits from scores: known circuits, brute force, and certificates against all subsets."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitvision.circuits import certify, connectivity, discover, edge_attribution
from circuitvision.circuits.certificates import clopper_pearson, largest_below, limits, radii
from circuitvision.circuits.discovery import Discovery, best_connected, greedy, stability
from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from circuitvision.results import Result

READS = {"v.a0.h0<v>": ["v.a0.h0"], "v.a0.h1<v>": ["v.a0.h1"], "v.m0": ["v.m0"], "v.logits": []}
SENDERS, SLOTS = ["v.input", "v.a0.h0", "v.a0.h1", "v.m0"], list(READS)
EDGES = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
EDGES[1, 1] = False


def table(values: torch.Tensor, base: float = 1.0, source: float = 0.0, **options) -> EdgeAttribution:
    """Scores of a small graph, ``[sender slot example]``."""
    count = values.shape[-1]
    return EdgeAttribution(
        values=values.double().masked_fill(~EDGES[..., None], math.nan),
        axes={"sender": SENDERS, "slot": SLOTS, "example": list(range(count))},
        base=torch.full((count,), base),
        source=torch.full((count,), source),
        reads=READS,
        **options,
    )


def drawn(seed: int, examples: int = 6) -> EdgeAttribution:
    return table(torch.randn(4, 4, examples, generator=torch.Generator().manual_seed(seed)))


# -- known circuits ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["marker-pointer", "marker-colour", "and", "v-composition", "crossing"])
@pytest.mark.parametrize("method", ["top", "greedy", "threshold", "interval", "milp"])
def test_known_circuits_are_found(name, method):
    known = handbuilt.build(name)
    scored = edge_attribution(known.model, known.pairs, known.metric, method="exact", allow_wrong=True, progress=False)
    size = {"threshold": 1e-6} if method == "threshold" else {"n_edges": len(known.edges)}
    found = discover(scored, method, **size)
    assert set(found.circuit) == known.edges
    assert found.circuit.connected


@pytest.mark.parametrize(("method", "reached"), [("exact", False), ("eap-ig", True), ("mask-ig", True)])
def test_an_or_is_missed_by_single_edges(method, reached):
    known = handbuilt.build("or")
    scored = edge_attribution(known.model, known.pairs, known.metric, method=method, allow_wrong=True, progress=False)
    found = discover(scored, "top", n_edges=len(known.edges))
    assert (set(found.circuit) == known.edges) == reached


@pytest.mark.parametrize(("options", "reached"), [({}, False), ({"qk_fix": True}, True), ({"method": "exact"}, True)])
@pytest.mark.filterwarnings("ignore:No edge was chosen")
def test_saturated_keys_are_found_by_the_fix(options, reached):
    known = handbuilt.build("saturated-keys")
    scored = edge_attribution(known.model, known.pairs, known.metric, allow_wrong=True, progress=False, **options)
    found = discover(scored, "threshold", threshold=0.5 * min(abs(effect) for effect in known.effects.values()))
    assert (set(found.circuit) == known.edges) == reached


# -- choices -----------------------------------------------------------------------------------------------------------------------------------


def brute(weight: torch.Tensor, count: int, reads: torch.Tensor) -> float:
    places, best = EDGES.nonzero().tolist(), 0.0
    for size in range(1, count + 1):
        for chosen in itertools.combinations(places, size):
            mask = torch.zeros_like(EDGES)
            for row, column in chosen:
                mask[row, column] = True
            if bool((connectivity.pruned(mask, reads) == mask).all()):
                best = max(best, float(weight[mask].sum()))
    return best


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 9))
def test_the_integer_programme_is_the_best_of_all_sets(seed, count):
    scored = drawn(seed)
    reads, weight = scored.circuit([]).reads, scored.scores.abs().nan_to_num()
    best = best_connected(weight, EDGES, reads, count)
    assert int(best.sum()) <= count
    assert bool((connectivity.pruned(best, reads) == best).all())
    assert float(weight[best].sum()) == pytest.approx(brute(weight, count, reads))
    grown = greedy(weight, EDGES, reads, count)
    assert int(grown.sum()) == min(count, int(EDGES.sum()))
    kept = connectivity.pruned(grown, reads)
    assert float(weight[kept].sum()) <= float(weight[best].sum()) + 1e-9


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e9])
def test_the_integer_programme_does_not_depend_on_the_unit_of_scores(size):
    """Probabilities have small effects: a solver's absolute tolerance must not eat them."""
    scored = drawn(3)
    reads, weight = scored.circuit([]).reads, scored.scores.abs().nan_to_num()
    best = best_connected(weight * size, EDGES, reads, 4)
    assert float(weight[best].sum()) == pytest.approx(brute(weight, 4, reads))
    assert not bool(best_connected(weight * 0, EDGES, reads, 4).any())


@given(seed=st.integers(0, 10_000), count=st.integers(1, 9))
def test_the_largest_are_taken_by_size_or_by_sign(seed, count):
    scored = drawn(seed)
    by_size = discover(scored, "top", n_edges=count).circuit
    assert set(by_size) == {name for name, _ in scored.ranking(count)}
    for mode, base, source in (("noise", 1.0, 0.0), ("noise", 0.0, 1.0), ("denoise", 0.0, 1.0)):
        own = table(scored.values.nan_to_num(), base, source, mode=mode)
        assert own.favour == (1.0 if source > base else -1.0)
        signed = discover(own, "top", n_edges=count, signed=True).circuit
        ordered = sorted(own.ranking(), key=lambda entry: -own.favour * entry[1])
        assert set(signed) == {name for name, _ in ordered[:count]}


def test_only_edges_whose_interval_excludes_zero():
    values = torch.zeros(4, 4, 40)
    values[0, 0], values[1, 3] = -1.0, -0.5
    values[3, 3] = 20 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    values[3, 3] -= values[3, 3].mean() + 0.7
    scored = table(values)
    assert float(scored.scores.abs().nan_to_num()[3, 3]) == pytest.approx(0.7, abs=1e-4)
    assert set(discover(scored, "interval", n_edges=3).circuit) == {"v.input->v.a0.h0<v>", "v.a0.h0->v.logits"}
    assert "v.m0->v.logits" in discover(scored, "top", n_edges=3).circuit


def test_thresholds_prune_to_a_fixed_point():
    values = torch.zeros(4, 4, 2)
    values[1, 2], values[3, 3], values[0, 3] = 1.0, 1.0, 1.0
    # The head is read by the MLP, and nothing is read by the head: both of its edges go, the MLP's with them.
    assert discover(table(values), "threshold", threshold=0.5).circuit.edges == ["v.input->v.logits"]
    with pytest.warns(UserWarning, match="empty"):
        discover(table(values), "threshold", threshold=5.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "best"}, "Unknown method"),
        ({"n_edges": 0}, "n_edges"),
        ({"n_edges": 99}, "n_edges"),
        ({"method": "threshold"}, "threshold"),
        ({"n_edges": 2, "threshold": 1.0}, "threshold"),
        ({"method": "top", "n_edges": 2, "bootstrap": -1}, "bootstrap"),
        ({"method": "top", "n_edges": 2, "bootstrap": 2.5}, "bootstrap"),
        ({"method": "interval", "n_edges": 2, "level": 95}, "level"),
    ],
)
def test_what_makes_no_sense_is_refused(options, match):
    with pytest.raises(InputError, match=match):
        discover(drawn(0), **options)
    if "method" not in options:
        with pytest.raises(InputError, match=match):
            certify(drawn(0), **options)


def test_scores_that_are_no_numbers_are_refused():
    values = torch.randn(4, 4, 3)
    values[0, 0, 1] = math.inf
    with pytest.raises(InputError, match="finite"):
        discover(table(values), n_edges=2)
    with pytest.raises(InputError, match="resampled"):
        discover(drawn(0, 1), n_edges=2, bootstrap=5)


# -- stability ---------------------------------------------------------------------------------------------------------------------------------


def test_stability_of_resamples():
    steady = torch.zeros(4, 4, 8)
    steady[0, 0], steady[1, 3] = -1.0, -2.0
    found = discover(table(steady), n_edges=2, bootstrap=20)
    assert found.jaccard == 1.0
    assert found.inclusion("v.a0.h0->v.logits") == 1.0
    assert found.majority == found.circuit
    data = found.to_networkx().edges["v.a0.h0", "v.logits", "in"]
    assert data["inclusion"] == 1.0
    loose = discover(drawn(1, 12), n_edges=3, bootstrap=50)
    assert loose.jaccard < 1.0
    share = loose.values[EDGES]
    assert float(share.sum()) == pytest.approx(3.0)
    again = discover(drawn(1, 12), n_edges=3, bootstrap=50)
    assert bool((loose.values[EDGES] == again.values[EDGES]).all())


def test_groups_are_drawn_together():
    values = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(3))
    twice = values.repeat_interleave(2, -1)
    one = discover(table(values), n_edges=3, bootstrap=30)
    both = discover(table(twice), n_edges=3, bootstrap=30, groups=[n // 2 for n in range(12)])
    torch.testing.assert_close(one.values, both.values, equal_nan=True)


@pytest.mark.parametrize(("n", "k", "chance"), [(144, 10, 0.036), (156, 16, 0.054), (32491, 325, 0.005)])
def test_the_index_of_random_sets(n, k, chance):
    generator = torch.Generator().manual_seed(0)
    masks = []
    for _ in range(30):
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.randperm(n, generator=generator)[:k]] = True
        masks.append(mask[None])
    found, expected = stability(masks, n)
    assert expected == pytest.approx(chance, abs=5e-4)
    assert found == pytest.approx(expected, abs=0.012)


def test_results_are_saved_and_read_again(tmp_path):
    found = discover(drawn(1, 12), n_edges=3, bootstrap=10)
    path = tmp_path / "found.npz"
    found.save(path)
    again = Result.load(path)
    assert isinstance(again, Discovery)
    assert set(again.circuit) == set(found.circuit)
    assert again.inclusion(found.circuit.edges[0]) == found.inclusion(found.circuit.edges[0])


def test_the_figure_of_stability_says_how_many_edges_come_back():
    scores = torch.zeros(4, 4, 12, dtype=torch.float64)
    places = EDGES.nonzero().tolist()
    for size, (row, column) in enumerate(places[:2]):
        scores[row, column] = 5.0 + size
    scores += 0.01 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stable = discover(table(scores), n_edges=2, bootstrap=40)
    assert [one[1:] for one in stable.ranking()] == [(1.0, True), (1.0, True)]
    assert stable.ranking()[0][0] == table(scores).ranking(1)[0][0]
    figure = stable.plot()
    assert "2 of 2 edges" in figure.layout.title.text
    assert list(figure.data[0].y) == [1.0, 1.0]
    assert list(figure.data[2].y) == [stable.jaccard, stable.chance]
    # One edge, and noise for the second: a resample gives another one, which stands behind those of the circuit.
    noise = drawn(3, 6)
    loose = discover(noise, n_edges=3, bootstrap=60)
    shares = [share for _, share, _ in loose.ranking()]
    assert shares == sorted(shares, reverse=True)
    assert {edge for edge, _, own in loose.ranking() if own} == set(loose.circuit)
    drawn_shares = sorted([*loose.plot().data[0].y, *loose.plot().data[1].y], reverse=True)
    assert drawn_shares == shares
    unlike = dataclasses.replace(loose, jaccard=loose.chance + 0.05)
    assert "hardly more alike" in unlike.plot().layout.title.text
    assert "bootstrap" in discover(noise, n_edges=3).plot().layout.title.text


# -- certificates ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mu", "drop", "replaced", "removed", "added"),
    [
        (0.9, 0.5, 0.74, 2.3, 0.85),
        (0.9, 0.9, 4.9, 15, 5.6),
        (0.9, 0.95, 10, 31, 11),
        (0.99, 0.5, 0.97, 5.6, 0.99),
        (0.99, 0.9, 6.4, 37, 6.5),
        (0.99, 0.95, 13, 76, 13),
    ],
)
def test_limits_of_the_certificate(mu, drop, replaced, removed, added):
    found = [float(one) for one in limits(torch.tensor(mu, dtype=torch.float64), drop)]
    assert found == [pytest.approx(one, rel=0.05) for one in (replaced, removed, added)]


def test_whole_numbers_below_a_limit():
    given_limits = torch.tensor([0.74, 2.3, 5.0, 0.0, -1.0, math.inf])
    assert largest_below(given_limits).tolist() == [0, 2, 4, -1, -1, math.inf]


def share_of_subsets(decide, examples: tuple[int, ...], drop: float) -> float:
    total = 0.0
    for size in range(len(examples) + 1):
        for kept in itertools.combinations(examples, size):
            total += decide(frozenset(kept)) * (1 - drop) ** size * drop ** (len(examples) - size)
    return total


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), drop=st.sampled_from([0.5, 0.7, 0.9]))
def test_no_certified_majority_is_overturned(seed, drop):
    """All subsets of five examples, random functions of sets: the exact share as its own lower bound."""
    generator = np.random.default_rng(seed)
    bias = generator.random()
    votes = {
        frozenset(kept): generator.random() < bias
        for size in range(8)
        for kept in itertools.combinations(range(7), size)
    }
    whole = tuple(range(5))
    share = share_of_subsets(votes.__getitem__, whole, drop)
    yes = share > 0.5
    bound = torch.tensor(share if yes else 1 - share, dtype=torch.float64)
    replaced, removed, added = (int(min(largest_below(one), torch.tensor(9.0))) for one in limits(bound, drop))
    changes = [(count, 0) for count in range(1, min(removed, 5) + 1)] + [
        (0, count) for count in range(1, min(added, 2) + 1)
    ]
    changes += [(count, count) for count in range(1, min(replaced, 2) + 1)]
    for gone, new in changes:
        for left in itertools.combinations(whole, 5 - gone):
            others = left + tuple(range(5, 5 + new))
            assert (share_of_subsets(votes.__getitem__, others, drop) > 0.5) == yes


def test_an_edge_that_hangs_on_one_example_is_voted_out():
    values = torch.zeros(4, 4, 5)
    values[0, 3], values[1, 3, 0] = 0.1, 100.0
    found = certify(table(values), "threshold", threshold=0.05, drop=0.7, runs=400)
    place = SENDERS.index("v.a0.h0"), SLOTS.index("v.logits")
    direct = SENDERS.index("v.input"), SLOTS.index("v.logits")
    assert float(found.share[place]) == 0.0, "a head that reads nothing is pruned"
    assert float(found.share[direct]) == pytest.approx(1 - 0.7**5, abs=0.06)
    values[0, 0, 0] = 100.0
    found = certify(table(values), "threshold", threshold=0.05, drop=0.7, runs=400)
    assert float(found.share[place]) == pytest.approx(0.3, abs=0.08)
    held, _ = found.certified("removed", 1)
    assert held == 1
    nodes = certify(table(values), "threshold", threshold=0.05, drop=0.7, runs=400, level="node")
    assert list(nodes.axes) == ["change", "sender"]


def test_exact_bounds_of_shares():
    low, high = clopper_pearson(torch.tensor([0.0, 5.0, 10.0]), 10, 0.025)
    assert low.tolist() == pytest.approx([0.0, 0.187086, 0.691503], abs=1e-6)
    assert high.tolist() == pytest.approx([0.308497, 0.812914, 1.0], abs=1e-6)


@pytest.mark.parametrize("options", [{"runs": 0}, {"runs": -1}, {"runs": 2.5}, {"alpha": 0}, {"alpha": 1.0}])
def test_a_certificate_of_no_subsets_is_refused(options):
    with pytest.raises(InputError, match="runs"):
        certify(drawn(0), n_edges=2, **options)


@pytest.mark.parametrize("chance", [0.5, 0.52, 0.7])
def test_bounds_hold_on_either_side_as_often_as_alpha_says(chance):
    """What is counted is exact: the probability of all numbers of votes whose bound is wrong."""
    from scipy.stats import binom

    runs, alpha, drop = 400, 0.1, 0.9
    votes = torch.arange(runs + 1, dtype=torch.float64)
    removed = radii(votes / runs, runs, 1, drop, alpha)[1]
    share = torch.where(votes > runs / 2, torch.tensor(chance), torch.tensor(1 - chance)).double()
    true = largest_below(limits(share, drop)[1])
    wrong = float(binom.pmf(votes[removed > true].numpy(), runs, chance).sum())
    assert 0 < wrong <= alpha
