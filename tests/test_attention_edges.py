"""Edges from position to position: their sums are the effects of slots, in float64."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision.circuits import attention_edges, export, load, schema
from circuitvision.circuits.attention_graph import graph_of
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.organisms import handbuilt
from circuitvision.patching import attribution_patch
from tests.edge_models import Example, double_throughout, score

pytestmark = pytest.mark.filterwarnings("ignore:The two runs do not differ")

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
"""Scores and patterns are read from a kernel whose softmax counts in single precision."""


def slots(found: Example, tower: str, letter: str) -> torch.Tensor:
    """The effect of every slot by position, ``[layer head position example]``."""
    result = attribution_patch(
        found.model, metric=score, clean=found.clean, corrupt=found.corrupt, sites=f"{tower}.blocks.*.attn.hook_{letter}", mode="noise",
        axes=("layer", "head", "position"), progress=False,
    )  # fmt: skip
    return result.values


@pytest.mark.parametrize(
    ("name", "tower"),
    [("vit", "vision"), ("llava-clip-llama", "language"), ("llava-clip-llama", "vision"), ("clip", "text")],
)
def test_sums_over_the_other_position_are_the_effects_of_slots(name, tower):
    with double_throughout():
        found = Example(name)
        if tower == "text":
            found.corrupt = {**found.clean, "input_ids": found.clean["input_ids"].roll(1, 0)}
        result = attention_edges(
            found.model, metric=score, clean=found.clean, corrupt=found.corrupt, tower=tower, progress=False
        )
        for number, letter in enumerate("qkv"):
            expected = slots(found, tower, letter)
            live = expected[: len(result.axes["layer"])]
            over = -2 if letter == "q" else -3
            sums = result.values[:, :, number].sum(over)
            sums = sums.unflatten(1, (live.shape[1], -1)).sum(2)
            assert live.abs().max() > 1e-3
            torch.testing.assert_close(sums, live, **CLOSE)


def test_spans_add_up_what_is_inside_them():
    found = Example("vit")
    given = {"metric": score, "clean": found.clean, "corrupt": found.corrupt, "progress": False}
    each = attention_edges(found.model, **given)
    some = attention_edges(found.model, spans={"cls": "cls"}, **given)
    assert some.axes["query"] == some.axes["key"] == ["cls", "rest"]
    torch.testing.assert_close(some.values[..., 0, 0, :], each.values[..., 0, 0, :], **CLOSE)
    torch.testing.assert_close(some.values[..., 0, 1, :], each.values[..., 0, 1:, :].sum(-2), **CLOSE)
    torch.testing.assert_close(some.sizes[..., 1, 1, :], each.values[..., 1:, 1:, :].abs().sum((-3, -2)), **CLOSE)
    ratio = each.mean().sum((-2, -1)).abs() / each.values.abs().mean(-1).sum((-2, -1))
    torch.testing.assert_close(some.cancellation, ratio, **CLOSE)
    assert (some.cancellation[some.cancellation.isfinite()] <= 1 + 1e-9).all()


def test_several_metrics_and_files(tmp_path):
    found = Example("vit")
    given = {"clean": found.clean, "corrupt": found.corrupt, "progress": False}
    result = attention_edges(found.model, metric={"a": score, "b": lambda logits: 2 * score(logits)}, **given)
    torch.testing.assert_close(result.values[1], 2 * result.values[0], **CLOSE)
    again = cv.Result.load(result.save(tmp_path / "edges.npz"))
    torch.testing.assert_close(again.sizes, result.sizes, rtol=0, atol=0)


def test_towers_that_share_keys_are_refused():
    found = Example("pi0")
    given = {"metric": score, "clean": found.clean, "corrupt": found.corrupt, "progress": False}
    for tower in ("language", "action"):
        with pytest.raises(UnsupportedModelError, match="shared"):
            attention_edges(found.model, tower=tower, **given)
    with pytest.raises(InputError, match="name one"):
        attention_edges(found.model, **given)


def test_the_graph_carries_what_each_head_has_of_an_edge(tmp_path):
    found = Example("llava-clip-llama")
    given = {"clean": found.clean, "corrupt": found.corrupt, "spans": {"image": "patch", "last": "last"}}
    result = attention_edges(found.model, metric=score, tower="language", progress=False, **given)
    graph = result.to_networkx()
    schema.validate(graph)
    assert {data["span"] for _, data in graph.nodes(data=True)} <= {"image", "last", "rest"}
    for sender, receiver, letter, data in graph.edges(keys=True, data=True):
        layer, key, query = graph.nodes[sender]["layer"], graph.nodes[sender]["span"], graph.nodes[receiver]["span"]
        place = [result.index_of(*one) for one in (("slot", letter), ("query", query), ("key", key))]
        expected = result.mean()[result.axes["layer"].index(layer), :, place[0], place[1], place[2]]
        loadings = json.loads(data["loadings_json"])
        assert data["score"] == pytest.approx(float(expected.sum()), rel=1e-6)
        assert sum(loadings.values()) == pytest.approx(data["score"], rel=1e-6, abs=1e-12)
        for name, value in loadings.items():
            assert value == pytest.approx(float(expected[int(name[1:])]), rel=1e-6)
        assert list(map(abs, loadings.values())) == sorted(map(abs, loadings.values()), reverse=True)
    assert result.to_networkx(3).number_of_edges() == 3
    few = graph_of(result, top=1)
    for sender, receiver, letter, data in few.edges(keys=True, data=True):
        loadings = json.loads(data["loadings_json"])
        assert list(loadings)[1:] == ["rest"]
        assert sum(loadings.values()) == pytest.approx(
            graph.edges[sender, receiver, letter]["score"], rel=1e-6, abs=1e-12
        )
    again = load(export(graph, tmp_path / "attention.graphml"))
    assert sorted(again.edges(keys=True)) == sorted(graph.edges(keys=True))
    with pytest.raises(InputError, match="n="):
        result.to_networkx(0)


def test_the_only_edges_of_the_marker_pointer_lead_from_the_marked_patch_to_the_class_token():
    known = handbuilt.build("marker-pointer")
    result = attention_edges(
        known.model, known.pairs, known.metric, spans={"cls": "cls", "patches": "patch"}, progress=False
    )
    graph = result.to_networkx()
    assert {(a, b) for a, b in graph.edges()} == {("v.kv0@patches", "v.a0@cls")}
    assert {next(iter(json.loads(data["loadings_json"]))) for *_, data in graph.edges(data=True)} == {"H0"}
