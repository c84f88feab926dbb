"""Circuits as sets of edges, and runs in which a circuit alone works."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.circuits import Circuit, circuit_of_graph, connectivity, edge_attribution
from circuitvision.circuits.circuit_runs import CircuitRuns
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from tests.edge_models import FAMILIES, Example, double_throughout, score

pytestmark = pytest.mark.filterwarnings("ignore:The two runs do not differ")


@pytest.fixture(scope="module", params=FAMILIES)
def example(request: pytest.FixtureRequest) -> Iterator[Example]:
    with double_throughout():
        yield Example(request.param)


@pytest.fixture(scope="module")
def known() -> handbuilt.HandBuilt:
    return handbuilt.build("marker-pointer")


@pytest.fixture(scope="module")
def scored(known):
    return edge_attribution(known.model, known.pairs, known.metric, progress=False, allow_wrong=True)


def runs_of(example: Example) -> CircuitRuns:
    return CircuitRuns(example.model, metric=score, clean=example.clean, corrupt=example.corrupt)


# -- runs --------------------------------------------------------------------------------------------------------------------------------------


def test_all_edges_are_the_clean_run_and_none_the_empty_one(example):
    runs = runs_of(example)
    every, none = runs.graph.edges, torch.zeros_like(runs.graph.edges)
    found = runs.measure([every, none], progress=False)
    assert (found.clean - found.corrupt).abs().max() > 1e-3
    torch.testing.assert_close(found.values[:, 0], found.clean, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.values[:, 1], found.corrupt, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.empty, found.corrupt, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_what_ablated_edges_carry(example, ablation):
    """All edges of the circuit are intact: the clean run; none: nothing of the examples is left, so that all are alike."""
    runs = runs_of(example)
    found = runs.measure([runs.graph.edges], ablation, progress=False)
    torch.testing.assert_close(found.values[:, 0], found.clean, rtol=0, atol=1e-11)
    assert (found.clean[:, 0] - found.clean[:, 1]).abs() > 1e-3
    torch.testing.assert_close(found.empty[:, 0], found.empty[:, 1], rtol=0, atol=1e-10)


def test_zeros_and_means_are_those_of_plain_pytorch():
    with double_throughout():
        found = Example("vit")
        runs, classifier = runs_of(found), found.module.classifier
        zero = runs.measure([], "zero", progress=False).empty
        # No head writes the bias of the attention's output.
        left = sum(
            value
            for name, value in found.module.named_parameters()
            if name.endswith(("o_proj.bias", "attention.output.dense.bias"))
        )
        normed = found.module.vit.layernorm(left[None])
        torch.testing.assert_close(zero[0, :1], score(classifier(normed)), rtol=0, atol=1e-11)
        # The sum of all that is written, in the mean over both sides, is the mean of the residual stream at its end.
        mean = runs.measure([], "mean", progress=False).empty
        ends = [
            found.module.vit(**side, output_hidden_states=True).hidden_states[-1]
            for side in (found.clean, found.corrupt)
        ]
        held = torch.cat(ends).mean(0)[:1]
        expected = score(classifier(found.module.vit.layernorm(held)))
        torch.testing.assert_close(mean[0, :1], expected, rtol=0, atol=1e-11)


def test_one_circuit_beside_others_is_the_circuit_alone(example):
    runs = runs_of(example)
    generator = torch.Generator().manual_seed(0)
    masks = [
        runs.graph.edges & (torch.rand(runs.graph.edges.shape, generator=generator) < share)
        for share in (0.3, 0.6, 0.9)
    ]
    together = runs.measure(masks, progress=False).values
    for number, mask in enumerate(masks):
        torch.testing.assert_close(
            runs.measure([mask], progress=False).values[:, 0], together[:, number], rtol=0, atol=1e-11
        )
        under = score(example.under((runs.graph.edges & ~mask).double()))
        torch.testing.assert_close(under, together[0, number], rtol=0, atol=1e-11)


def test_over_pairs_in_batches(known):
    runs = [
        CircuitRuns(known.model, known.pairs, known.metric, example_batch=size, allow_wrong=True) for size in (2, None)
    ]
    circuit = runs[0].graph.mask(known.edges)
    for ablation in ("interchange", "mean", "zero"):
        one, other = (found.measure([circuit], ablation, progress=False) for found in runs)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-11)
    found = runs[0].measure([circuit], progress=False)
    torch.testing.assert_close(found.values[:, 0], found.clean, rtol=0, atol=1e-9)


# -- sets of edges -----------------------------------------------------------------------------------------------------------------------------


def test_circuits_are_sets_of_edges(known, scored):
    circuit = scored.circuit(known.edges)
    assert set(circuit) == known.edges
    assert len(circuit) == len(known.edges)
    first = next(iter(circuit))
    assert first in circuit
    assert first not in circuit.without(first)
    assert circuit.without(first).adding(first) == circuit
    assert hash(circuit.without(first).adding(first)) == hash(circuit)
    assert circuit | circuit.complement() == scored.circuit(scored.edges)
    assert len(circuit & circuit.complement()) == 0
    assert circuit - circuit.without(first) == scored.circuit([first])
    assert circuit.jaccard(circuit) == 1
    assert circuit.jaccard(circuit.complement()) == 0
    assert scored.circuit(3).edges == sorted(
        (name for name, _ in scored.ranking(3)), key=scored.circuit(scored.edges).edges.index
    )
    assert circuit.connected
    assert circuit.attribution is circuit.without(first).attribution


def test_wrong_edges_are_refused(scored):
    with pytest.raises(InputError, match="no slot"):
        scored.circuit(["v.input->v.a0.h9<k>"])
    with pytest.raises(InputError, match="no edge"):
        scored.circuit(["v.m0->v.a0.h0<k>"])
    with pytest.raises(InputError, match="as a list"):
        scored.circuit("v.input->v.m0")
    with pytest.raises(InputError, match="cannot be taken"):
        scored.circuit(10_000)
    with pytest.raises(InputError, match="with a list"):
        scored.circuit(3) | ["v.input->v.m0"]
    with pytest.raises(InputError, match="no edge"):
        Circuit(scored, torch.ones_like(scored.edges))


def test_a_graph_and_a_file_give_the_circuit_again(known, scored, tmp_path):
    circuit = scored.circuit(known.edges)
    path = cv.circuits.export(circuit.to_networkx(), tmp_path / "circuit.graphml")
    again = circuit_of_graph(cv.circuits.load(path))
    assert set(again) == set(circuit)
    for edge in circuit:
        assert float(again.attribution.edge(edge)) == float(scored.edge(edge).mean())
    runs = CircuitRuns(known.model, known.pairs, known.metric, allow_wrong=True)
    assert bool((runs.mask(again) == runs.mask(circuit)).all())


@pytest.mark.parametrize("name", ["llava-clip-llama", "pi0"])
def test_reads_survive_a_graph(name):
    with double_throughout():
        found = Example(name)
        scored = edge_attribution(found.model, metric=score, clean=found.clean, corrupt=found.corrupt, progress=False)
    circuit = scored.circuit(scored.edges)
    again = circuit_of_graph(scored.to_networkx())
    assert set(again) == set(circuit)
    assert len(again.pruned()) == len(circuit.pruned())


def test_a_circuit_of_another_model_is_refused(known, scored):
    other = handbuilt.build("marker-pointer", noise=1e-3)
    with pytest.raises(InputError, match="other weights"):
        CircuitRuns(other.model, other.pairs, other.metric, allow_wrong=True).mask(scored.circuit(known.edges))


# -- paths -------------------------------------------------------------------------------------------------------------------------------------


def networkx_of(mask: torch.Tensor, reads: torch.Tensor) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_edges_from((("s", row), ("d", column)) for row, column in mask.nonzero().tolist())
    graph.add_edges_from((("d", row), ("s", column)) for row, column in reads.nonzero().tolist())
    return graph


@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.6))
def test_pruning_keeps_what_lies_on_paths_by_networkx(seed, share):
    scored = _graph()
    generator = torch.Generator().manual_seed(seed)
    mask = scored.edges & (torch.rand(scored.edges.shape, generator=generator) < share)
    reads = scored.circuit(0).reads
    graph = networkx_of(mask, reads)
    first = {("s", row) for row in connectivity.sources(reads).nonzero().flatten().tolist()} & set(graph)
    last = {("d", row) for row in connectivity.outputs(reads).nonzero().flatten().tolist()} & set(graph)
    begun = first.union(*(nx.descendants(graph, node) for node in first))
    led = last.union(*(nx.ancestors(graph, node) for node in last))
    expected = {
        (row, column) for row, column in mask.nonzero().tolist() if ("s", row) in begun and ("d", column) in led
    }
    kept = connectivity.pruned(mask, reads)
    assert set(map(tuple, kept.nonzero().tolist())) == expected
    assert bool((connectivity.pruned(kept, reads) == kept).all())


@given(seed=st.integers(0, 10_000), size=st.integers(1, 60))
def test_random_circuits_are_connected_and_of_the_size_asked_for(seed, size):
    scored = _graph()
    reads = scored.circuit(0).reads
    found = connectivity.random_circuit(scored.edges, reads, size, torch.Generator().manual_seed(seed))
    shortest = min(
        len(connectivity.random_path(scored.edges, reads, torch.Generator().manual_seed(one))) for one in range(200)
    )
    assert bool((connectivity.pruned(found, reads) == found).all())
    assert int(found.sum()) == size or (size < shortest and not found.any())


_known: list = []


def _graph():
    if not _known:
        with double_throughout():
            found = Example("llava-clip-llama")
            _known.append(
                edge_attribution(found.model, metric=score, clean=found.clean, corrupt=found.corrupt, progress=False)
            )
    return _known[0]
