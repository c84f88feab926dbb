"""Attention knockout: every cell is a run with blocked scores written by hand; routes that carry everything, and routes that carry nothing."""

from __future__ import annotations

import math

import pytest
import torch

import circuitvision as cv
from circuitvision import edits, regions
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.patching import Knockout, knockout
from circuitvision.patching.knockout import _with_controls
from tests.test_patching import hooked_pair

METRIC = logit_diff(3, 5)


def blocked_by_hand(model: cv.HookedModel, inputs, tower: str, layers, queries, keys, head=None) -> torch.Tensor:
    def block(scores, hook):
        scores = scores.clone()
        chosen = slice(None) if head is None else head
        part = scores[:, chosen]
        part[..., queries[:, None], keys[None, :]] = torch.finfo(scores.dtype).min
        scores[:, chosen] = part
        return scores

    hooks = [(f"{tower}.blocks.{layer}.attn.hook_attn_scores", block) for layer in layers]
    return METRIC(model.run_with_hooks(inputs, fwd_hooks=hooks), inputs) - METRIC(model(inputs), inputs)


@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma2"])
@pytest.mark.parametrize("window", [1, 2, "from"])
def test_a_cell_is_a_run_with_blocked_scores(name, window):
    model, inputs, _ = hooked_pair(name)
    tokens = model.tokens(inputs)["language"]
    count = model.language.cfg.n_layers
    found = knockout(
        model,
        inputs,
        METRIC,
        {"image to last": ("last", "patch"), "text to last": ("last", slice(0, 2))},
        window=window,
        progress=False,
    )
    assert isinstance(found, Knockout)
    assert list(found.axes) == ["route", "layer", "example"]
    last = torch.tensor([tokens.n_positions - 1])
    image = torch.tensor([n for n, kind in enumerate(tokens.kind[0]) if kind == "patch"])
    for row, keys in enumerate((image, torch.tensor([0, 1]))):
        for layer in range(count):
            layers = {1: [layer], 2: [layer, layer + 1], "from": list(range(layer, count))}[window]
            expected = blocked_by_hand(model, inputs, "language", [n for n in layers if n < count], last, keys)
            torch.testing.assert_close(found.effect[row, layer], expected, atol=1e-4, rtol=1e-3)


def test_heads_one_at_a_time_and_towers_of_ones_choice():
    model, inputs, _ = hooked_pair("vit")
    found = knockout(
        model,
        inputs,
        METRIC,
        {"patches to cls": ("cls", "patch")},
        tower="vision",
        layers=[1],
        heads=True,
        progress=False,
    )
    assert found.axes["head"] == list(range(model.vision.cfg.n_heads))
    positions = torch.arange(1, model.tokens(inputs)["vision"].n_positions)
    for head in found.axes["head"]:
        expected = blocked_by_hand(model, inputs, "vision", [1], torch.tensor([0]), positions, head)
        torch.testing.assert_close(found.effect[0, 0, head], expected, atol=1e-5, rtol=1e-3)


def test_an_answer_cut_off_from_the_image_does_not_depend_on_it():
    model, clean, corrupt = hooked_pair("llava-clip-llama")
    route = {"image to text": ("text", "patch")}
    both = [knockout(model, one, METRIC, route, layers="all", progress=False) for one in (clean, corrupt)]
    assert both[0].axes["layer"] == ["all"]
    torch.testing.assert_close(both[0].values, both[1].values, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both[0].clean, both[1].clean, atol=1e-4)


def test_a_future_key_is_no_route():
    model, inputs, _ = hooked_pair("llava-clip-llama")
    found = knockout(model, inputs, METRIC, {"text to image": ("patch", "last")}, progress=False)
    assert bool((found.effect.abs() < 1e-5).all())


def test_controls_are_as_many_other_keys_and_are_told_from_routes():
    model, inputs, _ = hooked_pair("llava-clip-llama")
    first = next(n for n, kind in enumerate(model.tokens(inputs)["language"].kind[0]) if kind == "patch")
    routes = {"patch to last": ("last", regions.at([first])), "image to last": ("last", "patch")}
    found = knockout(model, inputs, METRIC, routes, controls={"patch to last": 3}, progress=False)
    assert found.routes == list(routes)
    assert {name: len(labels) for name, labels in found.controls.items()} == {"patch to last": 3}
    drawn = [found.index_of("route", label) for label in found.controls["patch to last"]]
    expected = found.effect[0] - found.effect[drawn].mean(0)
    torch.testing.assert_close(found.beyond_controls("patch to last"), expected)
    with pytest.raises(InputError, match="no control"):
        found.beyond_controls("image to last")
    again = knockout(model, inputs, METRIC, routes, controls={"patch to last": 3}, progress=False)
    assert torch.equal(again.values, found.values)
    other = knockout(model, inputs, METRIC, routes, controls={"patch to last": 3}, seed=5, progress=False)
    assert not torch.equal(other.values[drawn], found.values[drawn])
    assert found.plot() is not None


def test_no_control_of_a_seed_is_one_of_the_next():
    model, inputs, _ = hooked_pair("llava-clip-llama")
    first = next(n for n, kind in enumerate(model.tokens(inputs)["language"].kind[0]) if kind == "patch")
    routes = {"patch to last": ("last", regions.at([first]))}
    drawn = [
        knockout(model, inputs, METRIC, routes, controls=6, seed=seed, progress=False).values[1:] for seed in (0, 1)
    ]
    assert not torch.equal(drawn[0][1:], drawn[1][:-1])


def test_a_route_is_blocked_under_a_base_of_edits():
    model, inputs, _ = hooked_pair("llava-clip-llama")
    base = edits.ablate("vision.blocks.0.attn.hook_z", heads=1)
    found = knockout(
        model, inputs, METRIC, {"image to last": ("last", "patch")}, layers=[1], base=[base], progress=False
    )
    blocked = edits.block_attention("language", "last", "patch", layers=1)
    with torch.no_grad():
        torch.testing.assert_close(found.values[0, 0], METRIC(model.run(inputs, [base, blocked]), inputs))
        torch.testing.assert_close(found.clean, METRIC(model.run(inputs, [base]), inputs))


def test_the_relative_effect_is_a_ratio_of_means():
    effect = torch.tensor([[[-0.2, -0.1, -0.3]]])
    clean = torch.tensor([0.5, 0.5, 0.8])
    found = Knockout(clean + effect, {"route": ["a"], "layer": [0], "example": [0, 1, 2]}, clean=clean)
    assert found.relative.item() == pytest.approx(-0.6 / 1.8)
    nothing = torch.tensor([0.5, -0.5, 0.1])
    unsure = Knockout(nothing + effect, {"route": ["a"], "layer": [0], "example": [0, 1, 2]}, clean=nothing)
    assert math.isnan(unsure.relative.item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routes": {}}, "routes maps"),
        ({"routes": {"a": ("last",)}}, "no pair"),
        ({"tower": "text"}, "no tower"),
        ({"layers": [17]}, "numbers from 0"),
        ({"layers": [0.7]}, "numbers from 0"),
        ({"controls": -1}, "controls="),
        ({"controls": 2}, "no region"),
        ({"window": 0}, "window"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(options, message):
    model, inputs, _ = hooked_pair("llava-clip-llama")
    given = {"routes": {"image to last": ("last", "patch")}, **options}
    with pytest.raises(InputError, match=message):
        knockout(model, inputs, METRIC, progress=False, **given)


def test_controls_of_keys_that_are_no_region_are_refused_and_asked_for_by_name():
    model, inputs, _ = hooked_pair("llava-clip-llama")
    first = next(n for n, kind in enumerate(model.tokens(inputs)["language"].kind[0]) if kind == "patch")
    routes = {"patch to last": ("last", regions.at([first])), "image to last": ("last", "patch")}
    with pytest.raises(InputError, match="image to last"):
        knockout(model, inputs, METRIC, routes, controls=3, progress=False)
    with pytest.raises(InputError, match="patch to last"):
        knockout(model, inputs, METRIC, routes, controls={"patch to lost": 3}, progress=False)
    found = knockout(model, inputs, METRIC, routes, controls={"patch to last": 2}, layers="all", progress=False)
    assert {name: len(labels) for name, labels in found.controls.items()} == {"patch to last": 2}


def test_controls_of_two_seeds_are_other_draws():
    keys = regions.at([3])
    drawn = [
        [pair[1].seed for pair in list(_with_controls({"a": ("last", keys)}, 4, seed)[0].values())[1:]]
        for seed in (0, 1, 2)
    ]
    assert len({one for own in drawn for one in own}) == 12


def test_a_route_beside_a_base_is_what_it_costs_under_the_base():
    model, inputs, _ = hooked_pair("llava-clip-llama")
    route = {"image to last": ("last", "patch")}
    base = [edits.ablate("language.blocks.0.mlp.hook_post", "zero")]
    found = knockout(model, inputs, METRIC, route, layers=[1], base=base, progress=False)
    blocked = edits.block_attention("language", "last", "patch", layers=[1])
    with torch.no_grad():
        clean = METRIC(model.run(inputs, base), inputs)
        both = METRIC(model.run(inputs, [*base, blocked]), inputs)
    torch.testing.assert_close(found.clean, clean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.values[0, 0], both, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(clean, METRIC(model(inputs), inputs), atol=1e-4)
