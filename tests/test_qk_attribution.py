"""Terms of attention scores: they add up to the model's own score in every family, and name what a hand-built head looks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import circuitvision as cv
from circuitvision.circuits import qk_attribution
from circuitvision.circuits.qk_attribution import QKAttribution
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.organisms import handbuilt
from tests.edge_models import Example, double_throughout
from tests.real_text_models import TEXT, register_norms

FAMILIES = [
    ("vit", "v.a1.h2", 0, 3),
    ("dinov2", "v.a1.h1", 0, 2),
    ("clip", "t.a1.h0", 2, 1),
    ("llava-clip-llama", "l.a1.h1", "last", 3),
    ("pi0", "l.a1.h0", 4, 2),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda one: one[0])
def example(request: pytest.FixtureRequest) -> Iterator[tuple[Example, str, object, object]]:
    with double_throughout():
        name, *rest = request.param
        yield (Example(name), *rest)


def test_terms_add_up_to_the_score(example):
    found, head, query, key = example
    result = qk_attribution(found.model, found.clean, head, query=query, key=key)
    tower = {"v": "vision", "t": "text", "l": "language"}[head[0]]
    layer, number = int(head[3]), int(head[-1])
    site = f"{tower}.blocks.{layer}.attn.hook_attn_scores"
    _, cache = found.model.run_with_cache(found.clean, names_filter=[site])
    place = cache[site].shape[2] - 1 if query == "last" else query
    expected = cache[site][:, number, place, key]
    torch.testing.assert_close(result.score, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.values.sum((0, 1)) + result.position_bias, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.position_bias, torch.zeros_like(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.of_queries.sum(0), result.of_keys.sum(0), rtol=0, atol=1e-9)
    assert result.values.abs().max() > 1e-4


def test_another_key_is_taken_away(example):
    found, head, query, key = example
    both = [qk_attribution(found.model, found.clean, head, query=query, key=one) for one in (key, 1)]
    contrast = qk_attribution(found.model, found.clean, head, query=query, key=key, against=1)
    torch.testing.assert_close(contrast.values, both[0].values - both[1].values, rtol=0, atol=1e-12)


def test_one_term_carries_the_whole_contrast():
    """The head looks for the marked patch, which is 1 in three of the pictures and 2 in the last: the flag of the class token times the marker."""
    known = handbuilt.build("marker-pointer")
    inputs = next(iter(known.pairs.clean.batches(known.model, 4))).inputs
    result = qk_attribution(known.model, inputs, "v.a0.h0", query="cls", key=1, against=2)
    assert result.score.abs().min() > 1
    torch.testing.assert_close(result.values[0, 0], result.score, rtol=0, atol=1e-9)
    assert result.ranking(1)[0][:2] == ("v.input", "v.input")
    assert float(result.values.abs().sum() - result.values[0, 0].abs().sum()) < 1e-9
    assert (result.score > 0).tolist() == (result.pattern > 0.9).tolist()


def test_what_is_not_covered_is_refused():
    found = Example("paligemma2")
    with pytest.raises(UnsupportedModelError, match="not covered"):
        qk_attribution(found.model, found.clean, "l.a1.h0", query="last", key=2)
    plain = Example("vit")
    with pytest.raises(InputError, match="one position"):
        qk_attribution(plain.model, plain.clean, "v.a1.h0", query="patch", key=1)


def test_what_terms_do_to_the_pattern_is_its_slope(example):
    """Scaling one key component's share of the scores moves the pattern by its terms, to first order; what is the same at every key moves nothing."""
    found, head, query, key = example
    result = qk_attribution(found.model, found.clean, head, query=query, key=key)
    tower = {"v": "vision", "t": "text", "l": "language"}[head[0]]
    site = f"{tower}.blocks.{int(head[3])}.attn.hook_attn_scores"
    scores = found.model.run_with_cache(found.clean, names_filter=[site])[1][site][:, int(head[-1])].detach()
    place = scores.shape[1] - 1 if query == "last" else query
    row = scores[:, place]
    seen = [key for key in range(row.shape[1]) if bool((row[:, key] > -1e4).all())]
    others = {one: qk_attribution(found.model, found.clean, head, query=query, key=one).values.detach() for one in seen}
    step, values = 1e-6, result.values
    for i, j in ((0, 0), (values.shape[0] - 1, values.shape[1] - 1), (0, values.shape[1] - 1)):
        moved = row.clone()
        for number, one in others.items():
            moved[:, number] += step * one[i, j]
        slope = (moved.softmax(-1) - row.softmax(-1))[:, key] / step
        torch.testing.assert_close(result.on_pattern[i, j], slope, rtol=1e-4, atol=1e-8)


def test_a_query_term_without_keys_does_nothing_to_the_pattern():
    """Where keys are what biases and positions make them at every place alike, no term moves the pattern; of the marker's head the flag does all."""
    known = handbuilt.build("marker-pointer")
    inputs = next(iter(known.pairs.clean.batches(known.model, 4))).inputs
    result = qk_attribution(known.model, inputs, "v.a0.h0", query="cls", key=1)
    assert result.ranking(1, by="pattern")[0][:2] == ("v.input", "v.input")
    biases = result.axes["key"].index("bias")
    assert float(result.on_pattern[:, biases].abs().max()) < 1e-9
    whole = result.on_pattern.sum((0, 1))
    torch.testing.assert_close(whole, result.on_pattern[0, 0], rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="pattern"):
        result.ranking(by="size")


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_norms_of_queries_and_keys_are_held(name):
    register_norms()
    case = TEXT[name]
    case.register()
    model = cv.HookedModel(case.module().double())
    inputs = case.inputs()
    site = "language.blocks.1.attn.hook_attn_scores"
    scores = model.run_with_cache(inputs, names_filter=[site])[1][site]
    result = qk_attribution(model, inputs, "language L1H2", query=3, key=1)
    torch.testing.assert_close(result.score, scores[:, 2, 3, 1], rtol=0, atol=1e-9)
    torch.testing.assert_close(
        (result.values.sum((0, 1)) + result.position_bias).double(), result.score, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(result.position_bias, torch.zeros_like(result.score), rtol=0, atol=1e-5)
    assert float(result.values.abs().max()) > 1e-2


def pointer() -> QKAttribution:
    known = handbuilt.build("marker-pointer")
    inputs = next(iter(known.pairs.clean.batches(known.model, 4))).inputs
    return qk_attribution(known.model, inputs, "v.a0.h0", query="cls", key=1, against=2)


def test_what_is_gathered_adds_up_to_the_score(example):
    found, head, query, key = example
    result = qk_attribution(found.model, found.clean, head, query=query, key=key)
    rows = result.gathered(3)
    assert [row[:3] for row in rows[:-1]] == [pytest.approx(one) for one in result.ranking(3)]
    assert sum(row[2] for row in rows) == pytest.approx(float(result.score.mean()))
    first = result.values[result.index_of("query", rows[0][0]), result.index_of("key", rows[0][1])]
    assert rows[0][3] == pytest.approx(float(first.std() / len(first) ** 0.5), nan_ok=True)


def test_the_figure_says_what_draws_the_head_where_it_is_apart_from_zero():
    result = pointer()
    # Marked in three of four pictures: the one of the other sign leaves the mean no interval apart from 0.
    assert "No term" in result.plot().layout.title.text
    for row, said in (
        (0, "draws vision L0H0 to position 1 rather than to 2"),
        (3, "off position 1 and on 2"),
    ):
        alone = result.take(row)
        figure = alone.plot()
        assert said in figure.layout.title.text
        assert next(iter(figure.data[0].x)) == pytest.approx(float(alone.score[0]))
        assert len(figure.data[0].x) == 2  # terms of no size are gathered with the others
        assert "looking from cls" in figure.layout.title.text
    # The largest mean is of a term that comes and goes; the sure one is named.
    values = torch.zeros_like(result.values)
    values[0, 0], values[0, 1] = torch.tensor([40.0, -20.0, 0.0, 0.0]), torch.tensor([1.0, 1.01, 1.0, 1.01])
    sure = dataclasses.replace(result, values=values)
    assert sure.ranking(1)[0][:2] == ("v.input", "v.input")
    assert "input × biases draws" in sure.plot().layout.title.text
    alike = result.take([0, 0, 0])
    assert "draws" in alike.plot().layout.title.text
    nothing = dataclasses.replace(result, values=torch.zeros_like(result.values))
    assert "No term moves" in nothing.plot().layout.title.text
