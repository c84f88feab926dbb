"""Files of circuit graphs: every format gives back ids, slots, scores and types to the last bit, and refuses what it cannot hold."""

from __future__ import annotations

import copy
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuitvision.circuits import schema
from circuitvision.circuits.eap import export_eap, load_eap
from circuitvision.circuits.export import FORMATS, export, load
from circuitvision.errors import InputError
from circuitvision.model.names import NodeName
from tests.test_graph import attribution_graph, same, small_graph

WHOLE = [suffix for suffix in FORMATS if suffix != ".npz"]
"""Formats that hold every attribute."""


def two_towers() -> nx.MultiDiGraph:
    """A vision tower of two layers, a projector, and a language tower whose four heads share two key heads."""
    towers = {
        "vision": {"n_layers": 2, "n_heads": 2, "d_model": 8, "parallel_attn_mlp": False},
        "language": {"n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "d_model": 16},
    }
    graph = schema.new_graph(
        "component", towers_json=json.dumps(towers), metric='Größe · 「a<b」 & "c"', name="a|b|c", seed=3
    )
    nodes = [
        NodeName("vision", "input"),
        *(NodeName("vision", "head", layer=layer, head=head) for layer in range(2) for head in range(2)),
        *(NodeName("vision", "mlp", layer=layer) for layer in range(2)),
        NodeName("connector", "connector", label="projector"),
        *(NodeName("language", "head", layer=0, head=head) for head in range(4)),
        *(NodeName("language", "kv_head", layer=0, head=group) for group in range(2)),
        NodeName("language", "logits"),
    ]
    for number, node in enumerate(nodes):
        schema.add_node(graph, node, score=math.sin(number), label=f"{node} über allem", in_circuit=number % 3 != 0)
    scores = iter(math.cos(number) * 10.0 ** (number % 7 - 3) for number in range(99))
    for sender, receiver, slots in [
        *(("v.input", f"v.a0.h{head}", "qkv") for head in range(2)),
        *((f"v.a0.h{head}", "v.m0", ["in"]) for head in range(2)),
        *((sender, f"v.a1.h{head}", "qkv") for sender in ("v.a0.h0", "v.m0") for head in range(2)),
        ("v.a1.h0", "x.projector", ["in"]),
        ("v.m1", "x.projector", ["in"]),
        *(("x.projector", f"l.a0.h{head}", "q") for head in range(4)),
        *(("x.projector", f"l.kv0.g{group}", "kv") for group in range(2)),
        ("l.a0.h3", "l.logits", ["in"]),
    ]:
        for slot in slots:
            extent = {
                "ci_low": -0.5,
                "ci_high": 1 / 3,
                "inclusion": 0.98,
                "verified": True,
                "effect_verified": 0.1 + 0.2,
            }
            extra = {"loadings_json": '{"a": [1.5, "<&>"]}', **extent} if slot == "k" else {}
            schema.add_edge(graph, sender, receiver, slot, next(scores), n=7, se=0.25, in_circuit=slot != "q", **extra)
    schema.rank_edges(graph)
    return graph


BUILDS = [small_graph, attribution_graph, two_towers]


@pytest.mark.parametrize("suffix", WHOLE)
@pytest.mark.parametrize("build", BUILDS)
def test_files_give_back_ids_slots_types_and_bits(tmp_path, suffix, build):
    graph = build()
    before = copy.deepcopy(graph)
    read = load(export(graph, tmp_path / f"g{suffix}"))
    assert same(graph, before)
    assert same(read, graph)
    assert list(read) == list(graph)


@pytest.mark.parametrize("build", BUILDS)
def test_a_matrix_gives_back_ids_slots_scores_and_the_circuit(tmp_path, build):
    graph = build()
    read = load(export(graph, tmp_path / "g.npz"))
    assert read.graph == graph.graph
    assert list(read) == list(graph)
    assert list(read.edges(keys=True)) == list(graph.edges(keys=True))
    kept = ("score", "weight", "in_circuit", "slot", "uid", "eap_name", "boundary", "rank")
    for a, b, key, data in graph.edges(keys=True, data=True):
        assert [data[name] for name in kept] == [read.edges[a, b, key][name] for name in kept]
    for node, data in graph.nodes(data=True):
        assert (data["score"], data["in_circuit"]) == (read.nodes[node]["score"], read.nodes[node]["in_circuit"])


def test_the_matrix_is_senders_by_slots(tmp_path):
    with np.load(export(two_towers(), tmp_path / "g.npz")) as held:
        row, column = list(held["senders"]).index("v.m0"), list(held["slots"]).index("v.a1.h1<k>")
        assert held["scores"][row, column] == two_towers().edges["v.m0", "v.a1.h1", "k"]["score"]
        assert np.isnan(held["scores"]).sum() == held["scores"].size - two_towers().number_of_edges()
        assert "x.projector" in held["senders"]
        assert "x.projector" in held["slots"]


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NUMBERS, min_size=4, max_size=4), TEXTS, st.sampled_from(WHOLE))
def test_any_number_and_any_text_comes_back(tmp_path, numbers, text, suffix):
    graph = attribution_graph()
    graph.graph.update(metric=text, metric_clean=numbers[0])
    graph.nodes["v.m0"].update(label=text, score=numbers[1])
    for data, score in zip((data for *_, data in graph.edges(data=True)), numbers[1:], strict=True):
        data.update(score=score, weight=abs(score), loadings_json=json.dumps([text]))
    assert same(load(export(graph, tmp_path / f"g{suffix}")), graph)


# -- what writers need -------------------------------------------------------------------------------------------------------------------------------

BAD_VALUES: dict[str, Any] = {
    "none": None,
    "list": [1.0, 2.0],
    "tuple": (1.0,),
    "dict": {"a": 1},
    "torch scalar": torch.tensor(1.0),
    "numpy float32": np.float32(1.0),
    "numpy float64": np.float64(1.0),
    "numpy bool": np.bool_(True),
    "whole number": 1,
    "nan": math.nan,
    "infinity": math.inf,
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("where", ["graph", "node", "edge"])
def test_values_that_some_format_cannot_hold_are_refused_by_all(tmp_path, suffix, name, where):
    graph = small_graph()
    owner, key = {
        "graph": (graph.graph, "metric_clean"),
        "node": (graph.nodes["l.a1.h0"], "activation"),
        "edge": (graph.edges["x.projector", "l.logits", "in"], "se"),
    }[where]
    owner[key] = BAD_VALUES[name]
    with pytest.raises(InputError, match=key):
        export(graph, tmp_path / f"g{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["id", "value", "key", "source", "target", "type", "name", "viz", "networkx_key"])
def test_names_that_formats_use_themselves_are_no_attributes(tmp_path, suffix, name):
    assert name not in schema.NODE_DEFAULTS
    assert name not in schema.EDGE_DEFAULTS
    for owner in ("nodes", "edges"):
        graph = small_graph()
        at = "v.a0.h1" if owner == "nodes" else ("x.projector", "l.logits", "in")
        getattr(graph, owner)[at][name] = "x"
        with pytest.raises(InputError, match=name):
            export(graph, tmp_path / f"g{suffix}")


def test_numbers_of_numpy_and_torch_become_those_of_python():
    graph = schema.new_graph("component", metric_clean=np.float32(0.5), steps=torch.tensor(3), seed=np.int64(4))
    node = schema.add_node(
        graph, NodeName("vision", "mlp", layer=0), score=torch.tensor(0.25, dtype=torch.float64), patch_row=np.int32(1)
    )
    head = schema.add_node(graph, NodeName("vision", "head", layer=1, head=0), activation=3)
    schema.add_edge(graph, node, head, "k", np.float64(2.0), se=torch.tensor(0.5), n=5.0)
    schema.validate(graph)
    held = [
        *graph.graph.values(),
        *graph.nodes[node].values(),
        *graph.nodes[head].values(),
        *graph.edges[node, head, "k"].values(),
    ]
    assert {type(value) for value in held} == {str, int, float, bool}


@pytest.mark.parametrize(
    "value", [None, [1.0], (1.0,), {"a": 1}, torch.tensor([1.0, 2.0]), np.array([1.0, 2.0]), "1.0", True, math.nan]
)
def test_builders_refuse_what_is_no_number(value):
    graph = schema.new_graph("component")
    with pytest.raises(InputError, match="activation"):
        schema.add_node(graph, NodeName("vision", "mlp", layer=0), activation=value)


@pytest.mark.parametrize("suffix", [".graphml", ".gexf"])
@pytest.mark.parametrize("text", ["a\0b", "a\x1bb", "a\rb", "\ufffe", "\ud800"])
def test_texts_that_xml_cannot_hold_are_refused(tmp_path, suffix, text):
    graph = small_graph()
    graph.nodes["l.logits"]["label"] = text
    with pytest.raises(InputError, match=r"label of l\.logits"):
        export(graph, tmp_path / f"g{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".graphml", ".gexf", ".json", ".cyjs"])
def test_parallel_edges_have_ids_of_their_own(tmp_path, suffix):
    path = export(attribution_graph(), tmp_path / f"g{suffix}")
    if suffix in (".json", ".cyjs"):
        held = json.loads(path.read_text(), parse_constant=lambda value: pytest.fail(value))
        links = held["links"] if suffix == ".json" else [element["data"] for element in held["elements"]["edges"]]
        ids = [link["uid"] if suffix == ".json" else link["id"] for link in links]
    else:
        ids = [edge.get("id") for edge in ElementTree.parse(path).iter() if edge.tag.endswith("}edge")]
    assert sorted(ids) == ["v.m0|v.a1.h1|k", "v.m0|v.a1.h1|q", "v.m0|v.a1.h1|v"]


def without(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in schema.ADDED}


def test_older_files_are_read_with_the_defaults_of_what_they_lack(tmp_path):
    graph = small_graph()
    held = nx.node_link_data(graph, edges="links")
    held["nodes"], held["links"] = [[without(data) for data in held[part]] for part in ("nodes", "links")]
    path = tmp_path / "g.json"
    path.write_text(json.dumps(held))
    assert "ci_low" not in path.read_text()
    assert same(load(path), graph)
    held["links"][0].pop("score")
    path.write_text(json.dumps(held))
    with pytest.raises(InputError, match="score"):
        load(path)


# -- GEXF --------------------------------------------------------------------------------------------------------------------------------------------


def test_gephi_gets_places_and_colours_and_the_name(tmp_path):
    path = export(two_towers(), tmp_path / "g.gexf")
    read = nx.read_gexf(path)
    places = {
        node: (data["viz"]["position"]["x"], data["viz"]["position"]["y"]) for node, data in read.nodes(data=True)
    }
    assert len(set(places.values())) == len(places)
    assert (
        places["v.input"][1] < places["v.a0.h0"][1] == places["v.a0.h1"][1] < places["v.m0"][1] < places["v.a1.h0"][1]
    )
    assert max(x for node, (x, _) in places.items() if node[0] == "v") < places["x.projector"][0] < places["l.a0.h0"][0]
    colours = {node: tuple(data["viz"]["color"][part] for part in "rgb") for node, data in read.nodes(data=True)}
    assert colours["v.a0.h0"] == colours["l.a0.h3"] != colours["v.m0"]
    signs: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}
    namespace = {"g": "http://www.gexf.net/1.2draft", "viz": "http://www.gexf.net/1.2draft/viz"}
    scores = {data["uid"]: data["score"] for *_, data in two_towers().edges(data=True)}
    for edge in ElementTree.parse(path).findall(".//g:edge", namespace):
        colour = edge.find("viz:color", namespace)
        assert colour is not None
        signs[scores[edge.attrib["id"]] >= 0].add(tuple(int(colour.attrib[part]) for part in "rgb"))
    assert len(signs[True]) == len(signs[False]) == 1
    assert signs[True] != signs[False]
    assert ElementTree.parse(path).find("g:graph", namespace).get("name") == "a|b|c"  # type: ignore[union-attr]


def test_the_sidecar_belongs_to_the_file(tmp_path):
    path = export(small_graph(), tmp_path / "g.gexf")
    assert {file.name for file in tmp_path.iterdir()} == {"g.gexf", "g.meta.json"}
    (tmp_path / "g.meta.json").unlink()
    with pytest.raises(InputError, match=r"g\.meta\.json"):
        load(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_are_one_clear_error(tmp_path, suffix):
    path = export(small_graph(), tmp_path / f"g{suffix}")
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(InputError, match="not a circuit graph"):
        load(path)


# -- EAP-IG ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
def test_eap_files_give_back_everything(tmp_path, build):
    graph = build()
    before = copy.deepcopy(graph)
    export_eap(graph, tmp_path)
    assert same(graph, before)
    assert same(load_eap(tmp_path), graph)


def test_eap_files_are_what_eap_ig_reads(tmp_path):
    """``Graph.from_json`` of that library: every node and edge by its name, ``in_graph`` of both, ``score`` of edges."""
    files = export_eap(two_towers(), tmp_path)
    assert [path.name for path in files] == ["circuit.v.json", "circuit.l.json"]
    vision, language = (json.loads(path.read_text()) for path in files)
    assert vision["cfg"] == {"n_layers": 2, "n_heads": 2, "d_model": 8, "parallel_attn_mlp": False}
    assert list(vision["nodes"]) == ["input", "a0.h0", "a0.h1", "a1.h0", "a1.h1", "m0", "m1"]
    edge = two_towers().edges["v.m0", "v.a1.h1", "k"]
    assert vision["edges"]["m0->a1.h1<k>"] == {"score": edge["score"], "in_graph": True}
    assert vision["edges"]["a0.h1->m0"]["in_graph"] is True
    assert not any(
        "projector" in name for held in (vision, language) for part in ("nodes", "edges") for name in held[part]
    )
    assert "score" not in language["nodes"]["logits"]
    assert "score" in language["nodes"]["a0.h3"]
    assert list(language["edges"]) == ["a0.h3->logits"]


def grouped() -> nx.MultiDiGraph:
    graph = schema.new_graph("component")
    schema.add_node(graph, NodeName("language", "mlp", layer=0))
    schema.add_node(graph, NodeName("language", "kv_head", layer=1, head=1))
    schema.add_edge(graph, "l.m0", "l.kv1.g1", "v", 0.7)
    return graph


def test_an_edge_into_shared_keys_is_written_for_every_head_of_the_group(tmp_path):
    with pytest.raises(InputError, match="n_kv_heads"):
        export_eap(grouped(), tmp_path)
    (path,) = export_eap(grouped(), tmp_path, towers={"language": {"n_layers": 2, "n_heads": 6, "n_kv_heads": 2}})
    held = json.loads(path.read_text())
    assert held["edges"] == {f"m0->a1.h{head}<v>": {"score": 0.7, "in_graph": True} for head in (3, 4, 5)}
    assert same(load_eap(tmp_path), grouped())
    held["edges"]["m0->a1.h4<v>"]["score"] = 0.8
    path.write_text(json.dumps(held))
    with pytest.raises(InputError, match="disagree"):
        load_eap(tmp_path)


def test_what_another_tool_changed_counts(tmp_path):
    path, _ = export_eap(two_towers(), tmp_path)
    held = json.loads(path.read_text())
    held["edges"]["m0->a1.h1<k>"] = {"score": -2.5, "in_graph": False}
    held["nodes"]["m1"]["in_graph"] = False
    path.write_text(json.dumps(held))
    read = load_eap(tmp_path)
    found = read.edges["v.m0", "v.a1.h1", "k"]
    assert (found["score"], found["weight"], found["in_circuit"]) == (-2.5, 2.5, False)
    assert read.nodes["v.m1"]["in_circuit"] is False


def test_eap_files_refuse_what_they_cannot_hold_and_name_what_is_missing(tmp_path):
    graph = attribution_graph()
    schema.add_node(graph, NodeName("vision", "head", layer=1, head=0, span="image"))
    with pytest.raises(InputError, match=r"v\.a1\.h0@image"):
        export_eap(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"meta\.json"):
        load_eap(tmp_path)
    export_eap(attribution_graph(), tmp_path)
    Path(tmp_path / "circuit.v.json").write_text("{")
    with pytest.raises(InputError, match="EAP-IG"):
        load_eap(tmp_path)
