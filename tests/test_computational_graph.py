"""The computational graph of models: which edges exist, by hand and by count."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.circuits import parse_id
from circuitvision.circuits.computational_graph import computational_graph
from circuitvision.circuits.edge_graph import split_slot
from circuitvision.errors import InputError, UnsupportedModelError
from tests.synthetic_blocks import SHAPES, Own, inputs_by_hand, register
from tests.zoo import case


def graph_of(name: str):
    found = case(name)
    module = found.build().eval()
    return computational_graph(cv.HookedModel(module), found.inputs(module, batch=2, seed=1))


def synthetic(shape: str):
    register()
    torch.manual_seed(0)
    module = Own(SHAPES[shape]).double().eval()
    return computational_graph(cv.HookedModel(module), inputs_by_hand(module, 2, 1, torch.float64))


def into(graph, slot: str) -> list[str]:
    column = graph.slot_ids.index(slot)
    return [graph.sender_ids[row] for row in graph.edges[:, column].nonzero().flatten().tolist()]


def behind(graph, slot: str) -> list[str]:
    row = graph.slot_ids.index(slot)
    return [graph.sender_ids[column] for column in graph.reads[row].nonzero().flatten().tolist()]


def test_a_serial_tower_has_as_many_edges_as_the_formula_says():
    graph, layers, heads = graph_of("vit"), 3, 4
    before = [1 + layer * (heads + 1) for layer in range(layers)]
    assert graph.n_edges == sum(3 * heads * count + count + heads for count in before) + 1 + layers * (heads + 1)
    assert len(graph.edge_names()) == graph.n_edges == len(set(graph.edge_names()))
    assert (len(graph.senders), len(graph.slots)) == (1 + layers * (heads + 1), layers * (3 * heads + 1) + 1)
    assert into(graph, "v.a0.h1<k>") == ["v.input"]
    assert into(graph, "v.m0") == ["v.input", *(f"v.a0.h{head}" for head in range(heads))]
    assert into(graph, "v.a1.h2<v>") == [*into(graph, "v.m0"), "v.m0"]
    assert into(graph, "v.logits") == graph.sender_ids
    for slot, nodes in (("v.a1.h2<q>", ["v.a1.h2"]), ("v.a1.h2<v>", ["v.a1.h2"]), ("v.m1", ["v.m1"]), ("v.logits", [])):
        assert behind(graph, slot) == nodes


def test_a_graph_of_two_towers_goes_through_the_connector_alone():
    graph = graph_of("llava-clip-llama")
    assert into(graph, "x.projector") == [name for name in graph.sender_ids if name.startswith("v.")]
    assert behind(graph, "x.projector") == ["x.projector"]
    assert into(graph, "l.kv0.g1<v>") == into(graph, "l.a0.h3<q>") == ["l.input", "x.projector"]
    # The block behind the feature layer cannot reach the output.
    assert not any(name.startswith(("v.a2", "v.m2")) for name in (*graph.sender_ids, *graph.slot_ids))
    assert behind(graph, "l.kv0.g1<k>") == ["l.a0.h2", "l.a0.h3"]
    assert behind(graph, "l.a0.h3<q>") == ["l.a0.h3"]


def test_an_action_expert_is_reached_through_the_prefixs_keys_and_values():
    graph = graph_of("pi0")
    assert behind(graph, "l.kv1.g0<k>") == [
        *(f"l.a1.h{head}" for head in range(3)),
        *(f"a.a1.h{head}" for head in range(4)),
    ]
    assert behind(graph, "l.kv2.g0<v>") == [f"a.a2.h{head}" for head in range(4)]
    assert behind(graph, "a.kv1.g0<v>" if "a.kv1.g0<v>" in graph.slot_ids else "a.a1.h0<v>") == [
        f"a.a1.h{head}" for head in range(4)
    ]
    # Of the last block of the prefix only keys and values are read.
    assert [name for name in graph.slot_ids if name.startswith(("l.a2", "l.m2", "l.kv2"))] == [
        "l.kv2.g0<k>",
        "l.kv2.g0<v>",
    ]
    assert not any(name.startswith("l.") for name in into(graph, "a.logits"))
    assert into(graph, "a.a0.h0<q>") == ["a.input"]


def test_the_two_streams_of_a_dual_encoder_are_two_slots_of_one_node():
    graph = graph_of("clip")
    assert {parse_id(split_slot(name)[0]) for name in graph.slot_ids[-2:]} == {parse_id("v.logits")}
    assert into(graph, "v.logits<txt>") == [name for name in graph.sender_ids if name.startswith("t.")]
    assert into(graph, "v.logits<img>") == [name for name in graph.sender_ids if name.startswith("v.")]


@pytest.mark.usefixtures("tables")
def test_branches_that_stand_side_by_side_do_not_read_each_other():
    graph = synthetic("parallel")
    assert into(graph, "v.m0") == into(graph, "v.a0.h0<q>") == ["v.input"]
    assert "v.a0.h0" in into(synthetic("plain"), "v.m0")


@pytest.mark.usefixtures("tables")
def test_what_no_sum_describes_is_refused():
    with pytest.raises(UnsupportedModelError, match="post-norm"):
        synthetic("post_norm")
    with pytest.raises(UnsupportedModelError, match="hidden states"):
        graph_of("llava-clip-llama-layers")


def test_edges_by_name():
    graph = graph_of("vit")
    row, column = graph.edge("v.a0.h1->v.m1")
    assert (graph.sender_ids[row], graph.slot_ids[column]) == ("v.a0.h1", "v.m1")
    assert graph.edge_names(graph.mask(["v.m0->v.a2.h1<k>", "v.input->v.m0"])) == ["v.input->v.m0", "v.m0->v.a2.h1<k>"]
    assert graph.mask(graph.edge_names()).equal(graph.edges)
    for wrong in ("v.a0.h9->v.m1", "v.a0.h1->v.m7", "v.m1->v.a0.h1<q>", "v.a0.h1"):
        with pytest.raises(InputError):
            graph.edge(wrong)


@pytest.mark.parametrize("name", ["vit", "clip", "pi0", "paligemma2"])
def test_ids_name_one_part_each_and_read_back(name):
    graph = graph_of(name)
    for ids in (graph.sender_ids, graph.slot_ids):
        assert len(set(ids)) == len(ids)
    assert [str(parse_id(one)) for one in graph.sender_ids] == graph.sender_ids
    assert all(str(parse_id(split_slot(one)[0])) == split_slot(one)[0] for one in graph.slot_ids)
