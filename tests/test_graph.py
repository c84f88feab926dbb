"""Circuit graphs: ids that round-trip and never collide, a schema that rejects what breaks it, lossless files."""

from __future__ import annotations

import copy
import json

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvision.circuits import schema
from circuitvision.circuits.export import export, load
from circuitvision.errors import InputError
from circuitvision.model import names
from circuitvision.model.names import NodeName, format_edge, format_id, head_id, parse_edge, parse_id, site_of

NUMBER = st.integers(0, 10**6)
TOWER = st.sampled_from([tower for tower in names.TOWER_LETTERS if tower != "connector"])
LABEL = st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True)


@st.composite
def node_names(draw) -> NodeName:
    kind = draw(st.sampled_from(sorted(names._FORMS)))
    needed = names._FORMS[kind][1]
    numbers = {field: draw(NUMBER) for field in ("layer", "head", "feature") if field in needed}
    label = draw(LABEL) if "label" in needed else ""
    tower = "connector" if kind == "connector" else draw(TOWER)
    where = draw(st.sampled_from(["all", "position", "span"]))
    at = {"all": {}, "position": {"pos": draw(NUMBER)}, "span": {"span": draw(LABEL)}}[where]
    return NodeName(tower, kind, **numbers, label=label, **at)


@given(node_names())
def test_parsing_a_formatted_name_gives_it_back(node):
    assert parse_id(format_id(node)) == node


@given(node_names(), node_names(), st.sampled_from(names.SLOTS))
def test_parsing_a_formatted_edge_gives_it_back(sender, receiver, slot):
    text = format_edge(sender, receiver, slot)
    assert parse_edge(text) == (sender, receiver, slot)
    assert format_edge(format_id(sender), format_id(receiver), slot) == text


@given(st.text(max_size=20))
def test_what_parses_is_written_the_same_way(text):
    for parse, write in ((parse_id, format_id), (parse_edge, lambda ends: format_edge(*ends))):
        try:
            found = parse(text)
        except InputError:
            continue
        assert write(found) == text


@given(node_names(), node_names())
def test_different_names_have_different_ids(first, second):
    assert (format_id(first) == format_id(second)) == (first == second)


def test_ids_follow_the_eap_form():
    assert head_id("vision", 3, 5) == "v.a3.h5"
    assert format_id(NodeName("language", "feature", layer=2, feature=17, pos=9)) == "l.tc2.f17@9"
    assert parse_id("v2.m7") == NodeName("vision_2", "mlp", layer=7)
    assert parse_id("x.projector").kind == "connector"
    assert parse_id("l.a3.h1@image_0") == NodeName("language", "head", layer=3, head=1, span="image_0")
    assert (
        format_id(NodeName("vision", "dictionary", layer=2, label="resid_post", feature=7, span="image"))
        == "v.d2.resid_post.f7@image"
    )
    assert format_id(NodeName("decoder", "dictionary_error", layer=0, label="mlp_out", pos=3)) == "d.derr0.mlp_out@3"
    assert format_edge("v.input", "v.a0.h0", "v") == "v.input->v.a0.h0<v>"
    assert format_edge("v.a0.h0", "x.projector", "in") == "v.a0.h0->x.projector"
    assert parse_edge("t.m0->t.logits<txt>") == (NodeName("text", "mlp", layer=0), NodeName("text", "logits"), "txt")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v",
        "v.",
        "z.a0.h0",
        "v.a01.h0",
        "v.a0.h0@",
        "v.a0.h0@X",
        "v.a0.h0@1x",
        "v.a0.h0@x@1",
        "v.a0.h0@bild\u00e4",
        "v.d0.f1",
        "v.d0.1x.f1",
        "v.derr0",
        "x.a0.h0",
        "v.projector",
        "a0.h0",
        "v.a٣.h0",
        "v.m0@٣",
    ],
)
def test_what_is_no_id_is_refused(text):
    with pytest.raises(InputError):
        parse_id(text)


@pytest.mark.parametrize(
    "node",
    [
        NodeName("vision", "head", layer=1),
        NodeName("vision", "mlp", layer=1, head=2),
        NodeName("eye", "mlp", layer=1),
        NodeName("vision", "thing"),
        NodeName("vision", "connector", label="p"),
        NodeName("connector", "connector", label="P!"),
        NodeName("vision", "mlp", layer=1, pos=3, span="image"),
        NodeName("vision", "mlp", layer=1, span="the image"),
        NodeName("vision", "mlp", layer=1, span="3"),
        NodeName("vision", "dictionary", layer=1, feature=2),
    ],
)
def test_incomplete_or_overfull_names_are_refused(node):
    with pytest.raises(InputError):
        format_id(node)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "->",
        "v.m0",
        "v.m0->",
        "->v.m1",
        "v.m0->v.m1<in>",
        "v.m0->v.a1.h0<z>",
        "v.m0->v.a1.h0<k><q>",
        "v.m0->v.m1->v.m2",
        "v.m0-> v.m1",
    ],
)
def test_what_is_no_edge_is_refused(text):
    with pytest.raises(InputError):
        parse_edge(text)
    with pytest.raises(InputError):
        format_edge("v.m0", "v.m1", "z")


def test_a_span_is_no_site():
    with pytest.raises(InputError, match="image"):
        site_of("v.a1.h0@image")


def small_graph() -> nx.MultiDiGraph:
    graph = schema.new_graph(
        "head_importance", model_id="tiny", metric="logit_diff", metric_clean=2.0, metric_corrupt=-1.0, seed=0
    )
    first = schema.add_node(graph, NodeName("vision", "head", layer=0, head=1), score=1.5, influence=0.5)
    bridge = schema.add_node(graph, NodeName("connector", "connector", label="projector"), score=3.0)
    second = schema.add_node(graph, NodeName("language", "head", layer=1, head=0), score=0.1 + 0.2)
    answer = schema.add_node(graph, NodeName("language", "logits"), label="red − blue")
    schema.add_edge(graph, first, bridge, "in", 1.5)
    schema.add_edge(graph, bridge, second, "in", 1.0)
    schema.add_edge(graph, bridge, answer, "in", 2.0)
    schema.add_edge(graph, second, answer, "in", 0.1 + 0.2)
    schema.rank_edges(graph)
    return graph


def attribution_graph() -> nx.MultiDiGraph:
    graph = schema.new_graph("component")
    mlp = schema.add_node(graph, NodeName("vision", "mlp", layer=0))
    head = schema.add_node(graph, NodeName("vision", "head", layer=1, head=1))
    for slot, score in zip("qkv", (0.1, -1e-300, 3.0), strict=True):
        schema.add_edge(graph, mlp, head, slot, score)
    schema.rank_edges(graph)
    return graph


def same(first: nx.MultiDiGraph, second: nx.MultiDiGraph) -> bool:
    def listing(graph):
        return (
            repr(sorted(graph.graph.items())),
            {node: repr(sorted(data.items())) for node, data in graph.nodes(data=True)},
            {(a, b, key): repr(sorted(data.items())) for a, b, key, data in graph.edges(keys=True, data=True)},
        )

    return type(first) is type(second) and listing(first) == listing(second)


def test_a_good_graph_is_valid_and_ranked():
    graph = small_graph()
    schema.validate(graph)
    assert graph.edges["x.projector", "l.logits", "in"]["rank"] == 0
    assert graph.edges["v.a0.h1", "x.projector", "in"]["boundary"]
    assert graph.graph["edges_total"] == 4
    eap = attribution_graph().edges["v.m0", "v.a1.h1", "k"]
    assert (eap["eap_name"], eap["uid"]) == ("m0->a1.h1<k>", "v.m0|v.a1.h1|k")


BREAKS = {
    "cycle": lambda g: g.add_edge("l.logits", "v.a0.h1", "in", **g.edges["v.a0.h1", "x.projector", "in"]),
    "weight": lambda g: g.edges["x.projector", "l.logits", "in"].update(weight=9.0),
    "id": lambda g: g.add_node("nonsense", **g.nodes["l.logits"]),
    "layer attribute": lambda g: g.nodes["v.a0.h1"].update(layer=3),
    "nan": lambda g: g.nodes["v.a0.h1"].update(score=float("nan")),
    "missing": lambda g: g.nodes["v.a0.h1"].pop("modality"),
    "none": lambda g: g.nodes["v.a0.h1"].update(module=None),
    "extra": lambda g: g.nodes["v.a0.h1"].update(id="x"),
    "graph attribute": lambda g: g.graph.pop("metric"),
    "schema": lambda g: g.graph.update(schema="other/2"),
    "slot": lambda g: g.add_edge("v.a0.h1", "l.a1.h0", "q", **{**g.edges["x.projector", "l.a1.h0", "in"], "slot": "q"}),
    "score kind": lambda g: g.edges["x.projector", "l.logits", "in"].update(score_kind="vibes"),
    "boundary": lambda g: g.edges["v.a0.h1", "x.projector", "in"].update(boundary=False),
    "span attribute": lambda g: g.nodes["v.a0.h1"].update(span="image"),
    "interval": lambda g: g.edges["x.projector", "l.logits", "in"].update(ci_low=1.0, ci_high=0.5),
    "inclusion": lambda g: g.edges["x.projector", "l.logits", "in"].update(inclusion=1.5),
    "error": lambda g: g.edges["x.projector", "l.logits", "in"].update(se=-0.1),
    "loadings": lambda g: g.edges["x.projector", "l.logits", "in"].update(loadings_json="{half"),
    "sum of out-edges": lambda g: g.edges["v.a0.h1", "x.projector", "in"].update(score=1.4, weight=1.4),
}


@pytest.mark.parametrize("name", BREAKS)
def test_every_rule_of_the_schema_is_enforced(name):
    graph = small_graph()
    BREAKS[name](graph)
    with pytest.raises(InputError):
        schema.validate(graph)


def test_layers_may_not_fall_inside_a_tower():
    graph = attribution_graph()
    early = schema.add_node(graph, NodeName("vision", "head", layer=0, head=0))
    schema.add_edge(graph, "v.m0", early, "q", 1.0)
    with pytest.raises(InputError, match="layer"):
        schema.validate(graph)


def test_builders_refuse_doubles_unknown_attributes_and_missing_ends():
    graph = small_graph()
    with pytest.raises(InputError, match="already"):
        schema.add_node(graph, NodeName("language", "logits"))
    with pytest.raises(InputError, match="already"):
        schema.add_edge(graph, "v.a0.h1", "x.projector", "in", 1.0)
    with pytest.raises(InputError, match="before"):
        schema.add_edge(graph, "v.a0.h2", "x.projector", "in", 1.0)
    with pytest.raises(InputError, match="schema"):
        schema.add_node(graph, NodeName("vision", "mlp", layer=0), colour="red")
    with pytest.raises(InputError, match="kind"):
        schema.new_graph("picture")


@pytest.mark.parametrize("suffix", [".graphml", ".json"])
@pytest.mark.parametrize("build", [small_graph, attribution_graph])
def test_files_give_back_ids_slots_types_and_bits(tmp_path, suffix, build):
    graph = build()
    before = copy.deepcopy(graph)
    read = load(export(graph, tmp_path / f"g{suffix}"))
    assert same(graph, before)
    assert same(read, graph)


def test_json_is_strict_and_graphml_ids_are_unique(tmp_path):
    text = export(attribution_graph(), tmp_path / "g.json").read_text()
    assert json.loads(text, parse_constant=lambda value: pytest.fail(value))["multigraph"] is True
    lines = export(attribution_graph(), tmp_path / "g.graphml").read_text().split("<edge ")[1:]
    assert len({line.split("id=")[1].split('"')[1] for line in lines}) == 3


def test_export_and_load_refuse_bad_input(tmp_path):
    with pytest.raises(InputError, match="exported as"):
        export(small_graph(), tmp_path / "g.png")
    broken = small_graph()
    broken.graph.pop("metric")
    with pytest.raises(InputError, match="metric"):
        export(broken, tmp_path / "g.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no file"):
        load(tmp_path / "g.json")
    (tmp_path / "g.graphml").write_text("<nope")
    with pytest.raises(InputError, match="not a circuit graph"):
        load(tmp_path / "g.graphml")
