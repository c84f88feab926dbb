"""What titles of maps affirm: the findings as values, on planted maps, on noise and on an untrained model; and the controls behind them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.readout import attention_contrast, attention_maps, distance_profile, logit_lens, rollout
from circuitvision.readout.attention.distance import DistanceProfile
from circuitvision.readout.patch_coords import entry_of, picture_of
from circuitvision.readout.weights.agreement import ClassValueAgreement
from circuitvision.readout.weights.head_circuits import CompositionScores
from tests.readout.test_attention import run
from tests.readout.test_attention_maps import made


def noise_of(seed: int = 0) -> torch.Generator:
    """Draws of its own for each test, whatever ran before."""
    return torch.Generator().manual_seed(seed)


def profile(means: list[list[float]], alike: float = 4.0, examples: int = 1, spread: float = 0.0, **more):
    """Mean distances ``[layer head]``, the same for every example but for a spread, beside what looking at all alike gives."""
    own = torch.tensor(means, dtype=torch.float64)[..., None].repeat(1, 1, examples)
    own += spread * torch.tensor([(-1.0) ** n for n in range(examples)])
    axes = {"layer": list(range(len(means))), "head": list(range(len(means[0]))), "distance": [0]}
    values = torch.zeros(*own.shape[:2], 1, examples)
    control = torch.full((len(means), examples), alike, dtype=torch.float64)
    return DistanceProfile(
        values, {**axes, "example": list(range(examples))}, tower="vision", mean_distance=own, uniform_distance=control, **more
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "holds", "layer", "value"),
    [
        (profile([[1.0, 3.0], [4.0, 4.0]]), True, "0", 2.0),
        (profile([[4.0, 4.2], [3.8, 3.9]]), False, "1", 3.85),
        # Beside one example a fifth is too little, over many it is enough, unless they disagree.
        (profile([[4.0], [3.2]]), False, "1", 3.2),
        (profile([[4.0], [3.2]], examples=12, spread=0.2), True, "1", 3.2),
        (profile([[4.0], [3.2]], examples=12, spread=2.0), False, "1", 3.2),
        (profile([[1.0], [2.0]], dead_layers=[0]), True, "1", 2.0),
        (profile([[8.0], [9.0]]), False, "0", 8.0),
    ],
)
def test_patches_look_near_where_that_is_nearer_than_chance(given, holds, layer, value):
    found = findings.looks_near(given)
    assert (found.holds, found.about["layer"]) == (holds, layer)
    assert (found.value, found.chance) == (pytest.approx(value), pytest.approx(4.0))
    assert (found.interval is None) is (found.n == 1)


def test_no_patch_that_looks_at_patches_is_nothing_to_say():
    found = findings.looks_near(profile([[math.nan]]))
    assert (found.holds, found.reason) == (None, "no patch looks at patches")


def test_a_floor_and_an_interval_decide_how_near_is_near(monkeypatch):
    one = profile([[3.9]])
    assert not findings.looks_near(one).holds
    monkeypatch.setattr(findings, "NEARER_ALONE", 0.0)
    assert findings.looks_near(one).holds


@pytest.mark.parametrize(
    ("shares", "chance", "holds"),
    [([0.5], 0.2, True), ([0.25], 0.2, False), ([0.9, 0.1], 0.2, True), ([0.5], None, None)],
)
def test_shares_of_passes_are_held_against_chance_in_their_mean(shares, chance, holds):
    found = findings.attends("vision L0H1", "the box", shares, chance, claim="attends too")
    assert (found.holds, found.value) == (holds, pytest.approx(sum(shares) / len(shares)))
    assert math.isnan(findings.attends("vision L0H1", "the box", [math.nan], 0.1).value)


def test_a_box_is_singled_out_where_no_equal_place_gets_nearly_as_much(monkeypatch):
    elsewhere = torch.tensor([0.05, 0.1, 0.3])
    assert findings.attends("h", "the box", 0.7, 0.06, elsewhere=elsewhere).holds
    found = findings.attends("h", "the box", 0.5, 0.06, elsewhere=elsewhere)
    assert (found.holds, found.reason) == (False, "other places get nearly as much")
    monkeypatch.setattr(findings, "OUTSTANDING", 1.0)
    assert findings.attends("h", "the box", 0.5, 0.06, elsewhere=elsewhere).holds


def test_a_head_differs_from_the_mean_head_where_it_stands_out_from_all():
    others = 0.05 * torch.randn(4, 8, generator=noise_of(1))
    others[2, 3] = 0.6
    assert findings.differs("h", "the box", [0.6], others).holds
    assert not findings.differs("h", "the box", [0.08], others * 0 + torch.eye(8)[:4] * 0.08).holds
    assert not findings.differs("h", "the box", [0.6], others, torch.tensor([0.1, 0.4])).holds
    wild = torch.randn(4, 8, generator=noise_of(2))
    assert not findings.differs("h", "the box", [float(wild.max())], wild).holds


def test_a_question_adds_where_one_patch_stands_out():
    grid = 1 + 0.1 * torch.randn(6, 6, generator=noise_of(3))
    assert findings.adds(grid).holds is False
    grid[4, 1] = 9.0
    found = findings.adds(grid)
    assert (found.holds, found.about["at"], found.value) == (True, "row 4, column 1", pytest.approx(9.0))
    assert findings.adds(grid * math.nan).holds is None


def test_a_target_stands_out_at_a_patch_of_its_own_layer():
    noise = torch.randn(3, 6, 6, generator=noise_of(4))
    grids, names = noise.clone(), ["input", "layer 0", "layer 1"]
    assert not findings.strongest_at("vision", "red", names, grids, "logit").holds
    # A layer that is higher everywhere is no patch that stands out.
    grids[2] += 20
    assert not findings.strongest_at("vision", "red", names, grids, "logit").holds
    grids[2, 3, 5] += 10
    found = findings.strongest_at("vision", "red", names, grids, "logit")
    assert (found.holds, found.about["at"]) == (True, "layer 1, patch row 3, column 5")
    assert found.value == pytest.approx(float(grids[2, 3, 5] - grids[2].median()))
    small = torch.full((1, 4, 4), 0.4)
    small[0, 1, 1] = 0.9
    assert not findings.strongest_at("vision", "red", ["input"], small, "prob").holds
    assert findings.strongest_at("vision", "red", ["input"], small**3, "prob").holds


def test_a_word_is_first_at_a_patch_where_it_leads_and_the_patch_stands_out():
    grids = torch.randn(1, 6, 6, generator=noise_of(5))
    grids[0, 2, 2] = 12.0
    asked = [findings.ranks_at("t", "red", ["input"], grids, margin, "logit").holds for margin in (5.0, 0.1, math.nan)]
    assert asked == [True, False, True]
    assert not findings.ranks_at("t", "red", ["input"], torch.randn(1, 6, 6, generator=noise_of(6)), 5.0, "logit").holds


def test_agreement_is_affirmed_above_chance_alone():
    assert findings.agrees("compositionality", "cls", "2", 0.7, 0.1).holds
    assert findings.agrees("compositionality", "cls", "2", 0.15, 0.1).holds is False
    assert findings.agrees("compositionality", "cls", "2", 0.7, math.nan).holds is None


@pytest.mark.parametrize(("score", "holds"), [(0.2, True), (0.02, False)])
def test_heads_compose_where_no_pair_of_random_heads_would(score, holds):
    values = torch.full((2, 2, 2, 2), math.nan)
    values[0, :, 1] = 0.0
    values[0, 1, 1, 0] = score
    axes = {"source_layer": [0, 1], "source_head": [0, 1], "layer": [0, 1], "head": [0, 1]}
    scores = CompositionScores(values, axes, tower="t", kind="Q", random_mean=0.1, random_sd=0.02)
    found = findings.composes(scores)
    assert (found.holds, found.value) == (holds, pytest.approx(score))
    assert findings.composes(dataclasses.replace(scores, random_mean=0.0)).holds is None
    assert findings.composes(dataclasses.replace(scores, values=values * math.nan)).holds is None


def test_value_vectors_point_at_classes_above_every_draw():
    values, random = torch.tensor([[0.2, 0.3], [0.6, 0.7]]), torch.tensor([[0.2, 0.3], [0.3, 0.4]])
    layers = {"layer": [0, 1], "class": ["a", "b"]}
    found = ClassValueAgreement(values, layers, random=random, p=torch.tensor([0.5, 0.01]))
    assert findings.points_at_classes(found).holds
    assert findings.points_at_classes(found).about["layer"] == "1"
    assert not findings.points_at_classes(dataclasses.replace(found, p=torch.tensor([0.5, 0.3]))).holds
    assert not findings.points_at_classes(dataclasses.replace(found, random=random + 0.5)).holds


# -- the controls -----------------------------------------------------------------------------------------------------------------


def test_uniform_attention_is_one_over_what_a_query_sees():
    model, _, cache = run("llava-clip-llama")
    maps = attention_maps(model, cache, tower="language", query="last")
    seen = maps.values[0].gt(0).any(0)
    torch.testing.assert_close(maps.uniform[0], seen / seen.sum(0, keepdim=True), check_dtype=False)
    share = maps.share_of(maps.patches())
    torch.testing.assert_close(share.values, (maps.values.double() * maps.patches().T).sum(-2))
    torch.testing.assert_close(
        share.uniform[0], (maps.patches().T & seen).sum(0) / seen.sum(0).double(), check_dtype=False
    )
    # Of the mean query: of the first positions, which see few keys, as well.
    every = attention_maps(model, cache, tower="language", query="text")
    torch.testing.assert_close(every.uniform.sum(-2), torch.ones_like(every.uniform[:, 0]))
    assert bool((every.head_contrast().uniform == 0).all())


def test_the_rollout_of_uniform_attention_is_known_in_closed_form():
    model, _, cache = run("vit")
    result = rollout(model, cache, residual=0.5)
    n = len(result.axes["key"])
    for layer in range(len(result.axes["layer"])):
        kept = 0.5 ** (layer + 1)
        expected = kept * torch.eye(n) + (1 - kept) / n
        torch.testing.assert_close(result.uniform[layer, ..., 0], expected, check_dtype=False)
    cls = result.of("cls")
    assert float(cls.uniform[1, 0, 0]) == pytest.approx(0.25 + 0.75 / n)
    assert result.take([0]).uniform.shape == result.take([0]).values.shape


def test_heads_are_averaged_by_the_result():
    model, _, cache = run("vit")
    mass = cv.readout.attention_mass(model, cache)
    torch.testing.assert_close(mass.over_heads().values, mass.values.double().mean(1))
    distances = distance_profile(model, cache)
    torch.testing.assert_close(distances.over_heads().mean(), distances.mean_distance.double().mean(1).mean(-1))


def test_a_region_is_moved_to_every_other_place():
    values = torch.rand(1, 2, 1, 16, generator=noise_of(7))
    maps = made(values)
    keys = maps.keys(cv.regions.box((0.0, 0.0, 8.0, 8.0)))
    moved = maps.share_elsewhere(keys, picture_of(maps))
    torch.testing.assert_close(moved, maps.values[..., 1:, 0].double())
    two = maps.share_elsewhere(maps.keys(cv.regions.box((0.0, 0.0, 16.0, 8.0))), picture_of(maps))
    grid = maps.grid(0, 1).double()
    assert float(two[0, 1, 2]) == pytest.approx(float(grid[0, 3] + grid[0, 0]))


# -- which picture ----------------------------------------------------------------------------------------------------------------


def test_examples_go_by_their_label_and_pictures_by_image_and_tile():
    maps = made(torch.rand(2, 2, 4, 16, generator=noise_of(8)))
    maps.places[:, :, 0] = torch.tensor([0, 1, 0, 1])[:, None]
    maps = dataclasses.replace(maps, axes={**maps.axes, "example": [7, 7, 3, 3]})
    assert [tuple(picture_of(maps, 7, image)) for image in (None, 0, 1)] == [(0, 0, 0), (0, 0, 0), (1, 1, 0)]
    assert tuple(picture_of(maps, 3, 1)) == (3, 1, 0)
    assert tuple(picture_of(maps)) == (0, 0, 0)
    assert (entry_of(maps, 3), entry_of(maps, 3, 1)) == (2, 3)
    assert maps.entries(7) == [0, 1]
    torch.testing.assert_close(maps.grid(0, 0, example=3, image=1).flatten(), maps.values[0, 0, :, 3].float())
    assert "example 3 of 2" in maps.plot(example=3, image=1).layout.title.text
    for wrong, message in (({"example": 0}, "no example 0"), ({"image": 2}, "image 2"), ({"tile": 1}, "tile 1")):
        with pytest.raises(InputError, match=message):
            maps.plot(**wrong)


# -- an untrained model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_no_map_of_an_untrained_model_is_affirmed(seed):
    from circuitvision.organisms.shapes_vit import build

    torch.manual_seed(seed)
    module, processor = build()
    model = cv.HookedModel(module.eval(), processor)
    scenes = [cv.data.scenes.sample_scene(np.random.default_rng(number)) for number in range(6)]
    inputs = model.inputs(images=[scene.image for scene in scenes])
    _, cache = model.run_with_cache(inputs)
    maps = attention_maps(model, cache)
    lens = logit_lens(model, cache, "vision", targets={0: 0, 1: 1})
    contrast = attention_contrast(
        attention_maps(model, cache, query="cls"), attention_maps(model, cache, query="patch")
    )
    distances = distance_profile(model, cache)
    assert findings.looks_near(distances).holds is False
    for example in range(6):
        assert findings.adds(contrast.grid(example)).holds is False
        box = scenes[example].objects[0].box
        figures = [
            maps.plot(example=example),
            maps.plot(example=example, box=box, picture=scenes[example].image),
            maps.head_contrast().plot(example=example, box=box, picture=scenes[example].image),
            rollout(model, cache).plot(example=example, box=box, picture=scenes[example].image),
            contrast.plot(example=example),
            distances.plot(),
            lens.plot(example=example),
        ]
        for figure in figures:
            assert figure.layout.title.text.startswith("No "), figure.layout.title.text
    ranked = logit_lens(model, cache, "vision", top_k=2).plot()
    assert ranked.layout.title.text.startswith("No patch")
