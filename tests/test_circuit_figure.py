"""Circuit figures: which edges are drawn, where parts stand, and a page that holds the graph, loads nothing and interprets none of its texts."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision import plots
from circuitvision.circuits import NodeAttention, NodeName, add_edge, add_node, attention_of, new_graph, rank_edges
from circuitvision.circuits.routes import carrying, scored_edges, share_of, strongest_path
from circuitvision.errors import InputError
from circuitvision.findings_of_graphs import few_edges, main_path, noise_share
from circuitvision.plots.circuit_layout import places_of
from circuitvision.readout.attention.maps import attention_maps
from tests.test_graph_files import two_towers
from tests.zoo import case

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HEADS = {f"h{number}": NodeName("vision", "head", layer=0, head=number) for number in range(3)}


def small(scores: dict[str, float] | None = None, **attributes):
    """An input, three heads, an MLP, the answer; scores by "from->to[slot]"."""
    graph = new_graph("component", metric="logit_diff", metric_units="logit", n_examples=8)
    nodes = {
        "in": NodeName("vision", "input"),
        **HEADS,
        "m": NodeName("vision", "mlp", layer=0),
        "out": NodeName("vision", "logits"),
    }
    ids = {name: add_node(graph, node) for name, node in nodes.items()}
    chosen = scores or {
        "in->h0[v]": 5.0,
        "in->h0[q]": -3.0,
        "h0->m[in]": -2.0,
        "m->out[in]": 4.0,
        "in->out[in]": 1.0,
        "h1->out[in]": 0.0,
    }
    for name, score in chosen.items():
        first, second, slot = re.fullmatch(r"(\w+)->(\w+)\[(\w+)\]", name).groups()
        add_edge(graph, ids[first], ids[second], slot, score, **{"n": 8, "se": 0.1, **attributes})
    rank_edges(graph)
    return graph


def data_of(path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="graph">(.*?)</script>', text, re.DOTALL)[1])


def lines(figure) -> list:
    return [trace for trace in figure.data if trace.mode == "lines"]


def dumped(path, address: str = "") -> str:
    """The page after its script ran."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{path}{address}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


# -- which edges -------------------------------------------------------------------------------------------------------------------------------------


def test_the_fewest_edges_that_hold_a_share():
    graph = small()  # sizes 5 4 3 2 1 0, together 15
    sizes = [graph.edges[edge]["weight"] for edge in scored_edges(graph)]
    assert sizes == [5, 4, 3, 2, 1, 0]
    counts = {share: len(carrying(graph, share)) for share in (0.3, 0.34, 0.6, 0.61, 0.8, 0.9, 1.0)}
    assert counts == {0.3: 1, 0.34: 2, 0.6: 2, 0.61: 3, 0.8: 3, 0.9: 4, 1.0: 5}
    assert len(carrying(graph, 1.0, most=2)) == 2
    assert share_of(graph, carrying(graph, 0.6)) == pytest.approx(9 / 15)
    assert math.isnan(share_of(small({"in->out[in]": 0.0}), []))


def test_links_of_groups_have_no_score_and_no_place_in_counts():
    graph = new_graph("component")
    nodes = [
        NodeName("language", "input"),
        NodeName("language", "kv_head", layer=0, head=0),
        NodeName("language", "head", layer=0, head=1),
    ]
    first, group, head = (add_node(graph, node) for node in nodes)
    answer = add_node(graph, NodeName("language", "logits"))
    add_edge(graph, first, group, "k", -2.0)
    add_edge(graph, group, head, "k", 0.0)
    add_edge(graph, head, answer, "in", 1.0)
    assert len(scored_edges(graph)) == 2
    assert [edge[1] for edge in strongest_path(graph)] == [group, head, answer]
    assert len(lines(plots.circuit(graph, n=2))) == 3
    assert len(lines(plots.circuit(graph, n=1))) == 1


def test_the_strongest_path_is_the_widest():
    graph = small()
    assert [(edge[0], edge[1], edge[2]) for edge in strongest_path(graph)] == [
        ("v.input", "v.a0.h0", "v"),
        ("v.a0.h0", "v.m0", "in"),
        ("v.m0", "v.logits", "in"),
    ]
    assert [
        edge[:2] for edge in strongest_path(small({"in->h0[v]": 5.0, "h0->out[in]": 0.5, "in->out[in]": -1.0}))
    ] == [("v.input", "v.logits")]
    assert strongest_path(small({"in->h0[v]": 5.0})) == []


# -- what is said ------------------------------------------------------------------------------------------------------------------------------------


def test_scores_of_noise_are_not_said_to_be_carried_by_few():
    sizes = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs().sort(descending=True).values
    for part in (0.01, 0.1, 0.5):
        assert noise_share(part) == pytest.approx(float(sizes[: int(part * len(sizes))].sum() / sizes.sum()), abs=5e-3)
    noisy = small({f"h{a}->{b}[in]": 1.0 + 0.01 * a for a in range(3) for b in ("m", "out")})
    assert few_edges(noisy, scored_edges(noisy)[:3]).holds is False
    graph = small()
    assert few_edges(graph, scored_edges(graph)).holds is None
    sharp = small({"in->h0[v]": 9.0, "h0->out[in]": 9.0, "h1->out[in]": 0.1, "h2->out[in]": 0.1, "in->out[in]": 0.1})
    found = few_edges(sharp, carrying(sharp))
    assert found.holds
    assert found.value == pytest.approx(18 / 18.3)
    assert "2 of 5 edges" in str(found)
    assert "2 of 5 edges" in plots.circuit(sharp).layout.title.text


def test_a_path_holds_where_each_of_its_edges_is_apart_from_0():
    assert main_path(small()).holds
    assert main_path(small()).value == -2.0
    unsure = main_path(small(se=1.0))
    assert unsure.holds is False
    assert "not apart from 0" in str(unsure)
    assert main_path(small(n=1, se=0.0)).holds is None


# -- places ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, two_towers])
def test_towers_are_columns_and_layers_rise_without_two_nodes_at_one_place(make):
    graph = make()
    places = places_of(graph)
    assert places.at.keys() == set(graph)
    assert len(set(places.at.values())) == len(graph)
    for first, second in zip(places.columns, places.columns[1:], strict=False):
        assert first.right < second.left
    for column in places.columns:
        own = [node for node in graph if graph.nodes[node]["tower"] == column.tower]
        assert all(column.left <= places.at[node][0] <= column.right for node in own)
    for sender, receiver in graph.edges():
        if graph.nodes[sender]["tower"] == graph.nodes[receiver]["tower"]:
            assert places.at[sender][1] < places.at[receiver][1]
    heads = sorted(
        (data["head"], places.at[node])
        for node, data in graph.nodes(data=True)
        if data["kind"] == "head" and data["layer"] == 0 and data["tower"] == "vision"
    )
    assert [at for _, at in heads] == sorted(at for _, at in heads)
    assert len({height for _, (_, height) in heads}) <= 1


def test_heads_at_several_positions_do_not_cover_each_other():
    graph = new_graph("component")
    for pos in range(3):
        add_node(graph, NodeName("language", "head", layer=1, head=0, pos=pos))
    assert len(set(places_of(graph).at.values())) == 3


# -- figures -----------------------------------------------------------------------------------------------------------------------------------------


def test_the_figure_draws_so_many_edges_and_marks_signs_slots_and_verified_ones():
    graph = small()
    graph.edges["v.input", "v.a0.h0", "v"].update(verified=True, effect_verified=4.5, inclusion=0.97)
    figure = plots.circuit(graph)
    drawn = lines(figure)
    assert len(drawn) == 4
    assert [("217,72,15" in trace.line.color) for trace in drawn[::-1]] == [True, True, False, False]
    assert max(drawn, key=lambda trace: trace.line.width).text.startswith("vision input → vision L0H0 (v)")
    assert "97%" in drawn[-1].text
    assert sum(note.text == "✓" for note in figure.layout.annotations) == 1
    letters = next(trace for trace in figure.data if trace.mode == "text")
    assert sorted(letters.text) == ["q", "v"]
    assert len(lines(plots.circuit(graph, n=2))) == 2
    assert len(lines(plots.circuit(graph, n=99))) == 6
    for wrong in ({"n": 0}, {"n": True}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(InputError, match="not understood"):
            plots.circuit(graph, **wrong)


def test_edge_attribution_is_drawn_and_says_what_it_draws():
    known = cv.organisms.handbuilt.build("crossing")
    result = cv.circuits.edge_attribution(known.model, known.pairs, known.metric, progress=False)
    figure = result.plot()
    assert len(lines(figure)) == len(known.edges)
    assert {line.text.partition("<br>")[0].partition(" (")[0] for line in lines(figure)} == {
        "vision input → vision L0H0",
        "vision L0H0 → projector",
        "projector → language L0H0",
        "language L0H0 → answer",
    }
    assert len(lines(result.plot(n=2))) == 2
    with pytest.raises(InputError, match="does not take"):
        result.plot(edges=3)


@pytest.mark.parametrize("kind", ["component", "attribution", "head_importance"])
def test_a_graph_of_one_node_and_of_none(tmp_path, kind):
    graph = new_graph(kind)
    for _ in range(2):
        assert not lines(plots.circuit(graph))
        assert data_of(plots.write_circuit(graph, tmp_path / "page.html"))["edges"] == []
        if not graph:
            add_node(graph, NodeName("vision", "head", layer=0, head=0))


# -- the page ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, two_towers])
def test_the_page_holds_every_edge_and_loads_nothing(tmp_path, make):
    graph = make()
    path = plots.write_circuit(graph, tmp_path / "page.html")
    data = data_of(path)
    ids = [node["id"] for node in data["nodes"]]
    held = {(ids[edge["from"]], ids[edge["to"]], edge["slot"]): edge for edge in data["edges"] + data["links"]}
    assert held.keys() == set(graph.edges(keys=True))
    for edge, found in held.items():
        for key in ("score", "se", "n", "inclusion", "verified", "effect_verified", "ci_low", "ci_high"):
            assert found[key] == graph.edges[edge][key]
    assert data["count"] == len(carrying(graph))
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|@import|<link|src=[\"'](?!data:)", text)
    assert "default-src 'none'" in text
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_made_leaves_what_was_there(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(InputError, match="attention"):
        plots.write_circuit(small(), path, picture=np.zeros((4, 4, 3), np.uint8))
    graph = small()
    graph.nodes["v.m0"]["score"] = float("nan")
    with pytest.raises(InputError, match="score is nan"):
        plots.write_circuit(graph, path)
    assert path.read_text() == "before"


EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!-- <script>document.title='owned'</script>"


def evil_graph():
    graph = small()
    graph.graph["metric"] = graph.graph["metric_units"] = EVIL
    for node in graph:
        graph.nodes[node]["label"] = EVIL
    return graph


def test_texts_of_a_graph_are_no_markup(tmp_path):
    path = plots.write_circuit(evil_graph(), tmp_path / "page.html", title=EVIL)
    text = path.read_text(encoding="utf-8")
    assert "<img" not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert data_of(path)["nodes"][0]["label"] == EVIL
    figure = plots.circuit(evil_graph(), title=EVIL)
    assert "<img" not in figure.layout.title.text


def maps_of(graph) -> NodeAttention:
    heads = [node for node, data in graph.nodes(data=True) if data["kind"] == "head"]
    values = torch.arange(len(heads) * 6 * 2, dtype=torch.float64).reshape(len(heads), 2, 3, 2) / 100
    values[:, 1, 2] = float("nan")
    sizes, extents = torch.tensor([2, 3]).expand(2, len(heads), 2), torch.ones(2, len(heads), 2)
    axes = {"node": heads, "row": [0, 1], "column": [0, 1, 2], "example": ["a", "b"]}
    return NodeAttention(values, axes, {}, sizes, extents, {"vision": "cls"})


def test_attention_reaches_the_page_in_256_levels(tmp_path):
    import base64

    graph = small()
    found = maps_of(graph)
    picture = np.full((8, 12, 3), 200, np.uint8)
    data = data_of(plots.write_circuit(graph, tmp_path / "p.html", attention=found, picture=picture, example="b"))
    kept = data["attention"]["v.a0.h1"]
    levels = np.frombuffer(base64.b64decode(kept["levels"]), np.uint8) / 255 * kept["largest"]
    expected = found.grid("v.a0.h1", "b").nan_to_num(0.0).flatten().numpy()
    np.testing.assert_allclose(levels, expected, atol=kept["largest"] / 510 + 1e-12)
    assert kept["sum"] == pytest.approx(expected.sum())
    assert (kept["rows"], kept["columns"], data["queries"]) == (2, 3, {"vision": "cls"})
    assert data["picture"].startswith("data:image/png;base64,")
    with pytest.raises(InputError, match="another graph"):
        plots.write_circuit(new_graph("component"), tmp_path / "p.html", attention=found)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_in_a_browser_the_script_draws_what_is_asked_for(tmp_path):
    graph = evil_graph()
    graph.edges["v.input", "v.a0.h0", "v"]["verified"] = True
    path = plots.write_circuit(graph, tmp_path / "page.html", attention=maps_of(graph))
    page = dumped(path)
    assert len(re.findall(r'class="edge (?:for|against)', page)) == 4
    assert page.count('class="edge against') == 2
    assert page.count('class="tick"') == 1
    assert sorted(re.findall(r'class="slot"[^>]*>(\w)<', page)) == ["q", "v"]
    assert "owned" not in re.search(r"<title>(.*?)</title>", page)[1]
    assert "<img src=" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    more = dumped(path, "#n=1&theme=dark&node=v.a0.h0")
    assert 'data-theme="dark"' in more
    assert "1 of 6 edges drawn" in more
    # The largest, which is above 0, and two of the chosen head's own, which are below.
    assert [more.count(f'class="edge {sign} mine"') for sign in ("for", "against")] == [1, 2]
    assert "<canvas" in more


# -- attention of a model ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip-llama", "pi0"])
def test_attention_of_a_graph_is_that_of_its_heads(tmp_path, name):
    found = case(name)
    model = cv.HookedModel(found.build().eval())
    inputs = found.inputs(model.module, batch=2, seed=1)
    graph = new_graph("component")
    towers = [tower for tower in model.towers if model.towers[tower].cfg.n_heads]
    for tower in towers:
        add_node(graph, NodeName(tower, "head", layer=0, head=1))
    taken = attention_of(model, inputs, graph)
    assert len(taken.examples) == 2
    for node in taken.axes["node"]:
        tower = graph.nodes[node]["tower"]
        maps = attention_maps(model, inputs, tower=tower)
        for example in taken.examples:
            torch.testing.assert_close(
                taken.grid(node, example), maps.grid(0, 1, example), rtol=0, atol=0, equal_nan=True
            )
    assert len(taken.axes["node"]) == len(towers)
    again = cv.load(taken.save(tmp_path / "taken.npz"))
    torch.testing.assert_close(again.values, taken.values, rtol=0, atol=0, equal_nan=True)
    assert data_of(plots.write_circuit(graph, tmp_path / "p.html", attention=again))["attention"].keys() == set(
        taken.axes["node"]
    )
    with pytest.raises(InputError, match="no tower 'ear'"):
        attention_of(model, inputs, graph, queries={"ear": "last"})
    with pytest.raises(InputError, match="no attention to show"):
        attention_of(model, inputs, new_graph("component"))
