"""Faithfulness of circuits: ends that hold by construction, areas by hand, known circuits of hand-built networks."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuitvision.circuits import connectivity, edge_attribution, evaluate, faithfulness_curve
from circuitvision.circuits.evaluation import area_beside, signed_order
from circuitvision.circuits.minimality import minimal_subcircuits, minimality
from circuitvision.circuits.structure import depth_bias, graph_similarity, layer_matrix
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from tests.edge_models import Example, double_throughout, score

pytestmark = pytest.mark.filterwarnings("ignore:The circuit was found on these very examples")


class Known:
    """A hand-built network with exact scores of its edges."""

    def __init__(self, name: str, method: str = "exact", **options) -> None:
        self.known = handbuilt.build(name, **options)
        given = {"allow_wrong": True, "progress": False}
        self.given = {"pairs": self.known.pairs, "metric": self.known.metric, **given}
        self.scored = edge_attribution(self.known.model, self.known.pairs, self.known.metric, method=method, **given)
        self.circuit = self.scored.circuit(self.known.edges)


@pytest.fixture(scope="module")
def pointer() -> Known:
    return Known("marker-pointer")


@pytest.fixture(scope="module")
def either() -> Known:
    return Known("or")


# -- evaluation --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["marker-pointer", "and", "v-composition", "crossing"])
def test_a_known_circuit_is_faithful_and_its_complement_does_nothing(name):
    found = Known(name)
    result = evaluate(found.known.model, found.circuit, n_random=3, ablations=["interchange"], **found.given)
    assert result.of("circuit") == pytest.approx(1.0, abs=1e-9)
    assert float(result.completeness[0]) == pytest.approx(0.0, abs=1e-9)
    assert set(result.random_sizes) == {len(found.circuit)}


@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero"])
def test_all_edges_are_faithful_under_every_ablation(pointer, ablation):
    every = pointer.scored.circuit(pointer.scored.edges)
    result = evaluate(pointer.known.model, every, n_random=0, ablations=[ablation], **pointer.given)
    assert result.of("circuit", ablation) == pytest.approx(1.0, abs=1e-9)
    assert float(result.completeness[0]) == pytest.approx(0.0, abs=1e-9)


def test_nothing_that_is_given_changes(pointer):
    mask, hooks = pointer.circuit.mask.clone(), _hooks(pointer.known.model.module)
    digest = {name: value.clone() for name, value in pointer.known.model.module.state_dict().items()}
    scores = pointer.scored.values.clone()
    evaluate(pointer.known.model, pointer.circuit, n_random=2, **pointer.given)
    assert bool((pointer.circuit.mask == mask).all())
    assert _hooks(pointer.known.model.module) == hooks
    assert all(torch.equal(value, digest[name]) for name, value in pointer.known.model.module.state_dict().items())
    torch.testing.assert_close(pointer.scored.values, scores, equal_nan=True)


def _hooks(module: torch.nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())


def test_faithfulness_is_a_ratio_of_means_over_groups(pointer):
    result = evaluate(
        pointer.known.model, pointer.circuit.without(pointer.circuit.edges[0]), n_random=2, **pointer.given
    )
    kept = result.values[0, 0] - result.empty[0]
    gap = result.clean - result.empty[0]
    assert result.of() == pytest.approx(float(kept.mean() / gap.mean()))
    frame = result.to_frame()
    assert len(frame) == 3 * 6
    assert list(result.randoms().shape) == list(result.randoms("rewired").shape) == [3, 2]
    at_least = int((result.randoms()[0] >= result.of()).sum())
    assert float(result.better_than_random[0]) == pytest.approx((1 + at_least) / 3)


def test_wrong_circuits_are_refused(pointer):
    with pytest.raises(InputError, match="no edge"):
        evaluate(pointer.known.model, pointer.scored.circuit([]), **pointer.given)
    with pytest.raises(InputError, match="circuit_of_graph"):
        evaluate(pointer.known.model, ["v.input->v.m0"], **pointer.given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ablation"):
        evaluate(pointer.known.model, pointer.circuit, ablations=["median"], **pointer.given)
    several = {**pointer.given, "metric": {"a": "logit_diff", "b": "logit_diff"}}
    with pytest.raises(InputError, match="One metric"):
        evaluate(pointer.known.model, pointer.circuit, **several)


@pytest.mark.filterwarnings("default:The circuit was found on these very examples")
def test_the_data_of_discovery_are_told(pointer):
    with pytest.warns(UserWarning, match="held-out"):
        evaluate(pointer.known.model, pointer.circuit, n_random=0, ablations=["zero"], **pointer.given)


# -- curves ------------------------------------------------------------------------------------------------------------------------------------


def test_both_ends_of_a_curve_are_exact():
    with double_throughout():
        found = Example("llava-clip-llama")
        given = {"metric": score, "clean": found.clean, "corrupt": found.corrupt, "progress": False}
        scored = edge_attribution(found.model, **given)
        for ablation in ("interchange", "zero"):
            curve = faithfulness_curve(
                found.model, scored, shares=(0.02, 0.3), ablation=ablation, n_random=2, rank="signed", **given
            )
            assert curve.sizes[0] == 0
            assert curve.sizes[-1] == scored.n_edges
            torch.testing.assert_close(curve.values[0, 0], curve.empty, rtol=0, atol=1e-10)
            torch.testing.assert_close(curve.values[:, -1], curve.clean.expand(3, -1), rtol=0, atol=1e-10)
            assert curve.faithfulness.shape == (3, 4)


def test_areas_of_a_curve_that_is_always_faithful(pointer):
    curve = faithfulness_curve(pointer.known.model, pointer.scored, shares=(0.5,), **pointer.given)
    flat = type(curve)(
        values=curve.clean.expand(1, len(curve.sizes), -1),
        axes=curve.axes,
        clean=curve.clean,
        empty=curve.empty,
        sizes=curve.sizes,
    )
    assert float(flat.cpr) == pytest.approx(1.0, abs=1e-10)
    assert float(flat.cmd) == pytest.approx(0.0, abs=1e-10)
    assert float(flat.log_area) == pytest.approx(1.0, abs=1e-10)


@given(
    left=st.floats(-3, 3),
    right=st.floats(-3, 3),
)
def test_the_area_beside_is_that_of_a_fine_grid(left, right):
    fine = np.linspace(0, 1, 20_001)
    expected = np.trapezoid(np.abs(left + (right - left) * fine), fine)
    assert area_beside(np.array([0.0, 1.0]), np.array([left, right])) == pytest.approx(expected, abs=1e-6)


def test_a_known_circuit_is_reached_with_its_own_edges(pointer):
    share = len(pointer.known.edges) / pointer.scored.n_edges
    curve = faithfulness_curve(pointer.known.model, pointer.scored, shares=(share,), rank="size", **pointer.given)
    assert float(curve.faithfulness[0, 1]) == pytest.approx(1.0, abs=1e-9)
    assert curve.size_for(0.99) == len(pointer.known.edges)
    # Edges that work for the answer come first, whichever run was patched.
    assert set(signed_order(pointer.scored)[: len(pointer.known.edges)]) == pointer.known.edges
    back = edge_attribution(pointer.known.model, method="exact", mode="denoise", **pointer.given)
    assert set(signed_order(back)[:2]) <= pointer.known.edges


# -- minimality --------------------------------------------------------------------------------------------------------------------------------


def test_a_dead_edge_can_be_removed(pointer):
    dead = next(name for name in pointer.scored.circuit(pointer.scored.edges) if name not in pointer.known.edges)
    result = minimality(pointer.known.model, pointer.circuit.adding(dead), **pointer.given)
    assert result.removable() == [dead]
    assert minimality(pointer.known.model, pointer.circuit, **pointer.given).locally_minimal()


def test_an_or_has_two_minimal_circuits(either):
    whole = minimality(either.known.model, either.circuit, **either.given)
    assert not whole.locally_minimal()
    found = minimal_subcircuits(either.known.model, either.circuit, **either.given)
    assert len(found) == 2
    assert {frozenset(one) for one in found} == {frozenset(one) for one in found if one.connected}
    assert set(found[0]) | set(found[1]) == either.known.edges
    for one in found:
        assert minimality(either.known.model, one, **either.given).locally_minimal()


def test_an_and_has_one(pointer):
    both = Known("and")
    found = minimal_subcircuits(both.known.model, both.circuit, **both.given)
    assert [set(one) for one in found] == [both.known.edges]
    with pytest.raises(InputError, match="too many"):
        minimal_subcircuits(pointer.known.model, _many(), **pointer.given)


def _many():
    with double_throughout():
        found = Example("vit")
        scored = edge_attribution(found.model, metric=score, clean=found.clean, corrupt=found.corrupt, progress=False)
    return scored.circuit(20)


# -- structure ---------------------------------------------------------------------------------------------------------------------------------


def test_a_uniform_graph_has_no_depth_bias_in_equal_bands():
    with double_throughout():
        found = Example("vit")
        scored = edge_attribution(found.model, metric=score, clean=found.clean, corrupt=found.corrupt, progress=False)
    matrix = layer_matrix(scored)
    assert matrix.to_numpy().sum() == pytest.approx(float(scored.scores.abs().nansum()))
    assert matrix.loc["v.0", "v.1"] == pytest.approx(
        sum(
            abs(value)
            for name, value in scored.ranking()
            if name.startswith(("v.a0.", "v.m0->")) and name.partition("->")[2].startswith(("v.a1.", "v.m1"))
        )
    )
    bias = depth_bias(scored, "vision")
    assert not set(bias.deep) & set(bias.shallow)
    assert len(bias.deep) == len(bias.shallow)
    assert math.isfinite(bias.value)
    for measure in ("spearman", "cosine", "jaccard"):
        assert graph_similarity(scored, scored, measure) == pytest.approx(1.0)
    assert graph_similarity(scored, scored, "l2") == 0
    with pytest.raises(InputError, match="vision"):
        depth_bias(scored, "language")


@given(seed=st.integers(0, 1000))
def test_rewiring_keeps_degrees(seed):
    edges = torch.rand(9, 12, generator=torch.Generator().manual_seed(7)) < 0.7
    mask = edges & (torch.rand(9, 12, generator=torch.Generator().manual_seed(seed)) < 0.3)
    found = connectivity.rewired(mask, edges, torch.Generator().manual_seed(seed))
    assert bool((found <= edges).all())
    assert bool((found.sum(0) == mask.sum(0)).all())
    assert bool((found.sum(1) == mask.sum(1)).all())


def test_graphs_of_circuits_are_acyclic(pointer):
    assert nx.is_directed_acyclic_graph(pointer.circuit.to_networkx())
