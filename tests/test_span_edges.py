"""Edges at spans: their sums are edges, and circuits, certificates and graphs are made of them."""

from __future__ import annotations

import networkx as nx
import pytest
import torch

import circuitvision as cv
from circuitvision.circuits import certify, discover, edge_attribution, export, load, schema
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from tests.edge_models import Example, double_throughout, score

pytestmark = pytest.mark.filterwarnings("ignore:The two runs do not differ")


def scored(name: str, spans: dict[str, object], **options: object) -> cv.circuits.EdgeAttribution:
    found = Example(name)
    given = {"clean": found.clean, "corrupt": found.corrupt, "metric": score, "progress": False, **options}
    return edge_attribution(found.model, spans=spans, **given)


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "clip", "pi0"])
def test_edges_at_spans_add_up_to_edges_and_paths_go_on(name):
    spans = {"patches": "patch"}
    with double_throughout():
        result = scored(name, spans)
    apart = result.at_spans()
    senders, slots = apart.axes["sender"], apart.axes["slot"]
    sums = torch.zeros_like(result.scores)
    for row, column in apart.edges.nonzero().tolist():
        sender, _, one = senders[row].rpartition("@")
        slot, _, other = slots[column].partition("@")
        where, mark, letter = other.partition("<")
        assert one == where
        at = result.place(f"{sender}->{slot}{mark}{letter}")
        sums[at] += apart.scores[row, column]
    torch.testing.assert_close(sums, result.scores.nan_to_num(), rtol=1e-9, atol=1e-12)
    # What lies on a path without spans lies on one with them, unless it carries nothing.
    whole = {name for name, size in result.ranking() if size != 0.0} & set(
        result.circuit(result.n_edges).pruned().edges
    )
    kept = {_bare(name) for name in apart.circuit(apart.n_edges).pruned().edges}
    assert kept == whole


def _bare(edge: str) -> str:
    sender, slot = edge.split("->")
    node, _, rest = slot.partition("@")
    return f"{sender.partition('@')[0]}->{node}{('<' + rest.partition('<')[2]) if '<' in rest else ''}"


def test_the_marker_pointer_reads_keys_at_the_patches_and_queries_at_the_class_token():
    known = handbuilt.build("marker-pointer")
    result = edge_attribution(
        known.model, known.pairs, known.metric, spans={"cls": "cls", "patches": "patch"}, progress=False
    ).at_spans()
    strong = {name for name, size in result.ranking() if abs(size) > 1e-9}
    assert "v.input@patches->v.a0.h0@patches<k>" in strong
    assert not any("h0@cls<k>" in name for name in strong)
    circuit = result.circuit(sorted(strong)).pruned()
    assert circuit.connected
    graph = circuit.to_networkx()
    schema.validate(graph)
    assert {data["span"] for _, data in graph.nodes(data=True)} <= {"cls", "patches"}


def test_discovery_its_resamples_and_certificates_are_of_spans(tmp_path):
    model, pairs = cv.organisms.load("shapes-vit"), cv.organisms.pairs("shapes-vit", 24, 0)
    result = edge_attribution(model, pairs, "logit_diff", spans={"cls": "cls"}, progress=False).at_spans()
    found = discover(result, "top", n_edges=12, bootstrap=20, progress=False)
    assert len(found.circuit) == 12
    assert all("@" in name for name in found.circuit.edges)
    graph = found.to_networkx()
    again = load(export(graph, tmp_path / "spans.graphml"))
    assert nx.utils.graphs_equal(again, graph)
    certificate = certify(result, "top", n_edges=12, runs=60, progress=False)
    # Subsets without an example, .9^24 of them, have no edge.
    assert 9.5 < float(certificate.share[result.edges].sum()) <= 12.0
    assert sum(certificate.certified(count=0)) > 0


def test_a_circuit_at_spans_is_no_mask_of_a_run():
    model, pairs = cv.organisms.load("shapes-vit"), cv.organisms.pairs("shapes-vit", 6, 0)
    result = edge_attribution(model, pairs, "logit_diff", spans={"cls": "cls"}, progress=False)
    with pytest.raises(InputError, match="span"):
        cv.circuits.evaluate(model, result.at_spans().circuit(5), pairs, "logit_diff", progress=False)
    plain = edge_attribution(model, pairs, "logit_diff", progress=False)
    with pytest.raises(InputError, match="spans="):
        plain.at_spans()
