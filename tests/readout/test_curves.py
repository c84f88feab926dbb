"""Insertion, deletion and pointing: closed forms for additive scores, naive twins, chance levels."""

from __future__ import annotations

import copy
import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitvision as cv
from circuitvision import regions
from circuitvision.data.questions import largest, sample_largest
from circuitvision.data.scenes import SHAPES
from circuitvision.errors import InputError
from circuitvision.readout import integrated_gradients, occlusion, perturbation_curve, pointing_game
from circuitvision.readout.relevance.curves import Curve
from circuitvision.readout.relevance.pointing import PointingGame, _on_object
from circuitvision.readout.relevance.result import Relevance
from tests.parts import module_of
from tests.readout.layouts import by_row, of_rows
from tests.zoo import case, shared_model

PATCHES = 16


@cache
def additive() -> tuple[cv.HookedModel, dict[str, Tensor], Tensor]:
    """A ViT whose blocks add nothing, so that a sum over positions is additive in them: the model, inputs, and what each patch weighs."""
    module = copy.deepcopy(shared_model("vit-headless")).double().eval()
    model = cv.HookedModel(module)
    with torch.no_grad():
        for block in model.vision.blocks:
            for part in (module_of(block, "o"), module_of(block, "mlp_out")):
                part.weight.zero_()
                part.bias.zero_()
    inputs = case("vit-headless").inputs(module, batch=3, dtype=torch.float64)
    found = occlusion(model, inputs, total, baseline="zero")
    return model, inputs, by_row(found)


def total(hidden: Tensor) -> Tensor:
    """Every position's own number, added up."""
    return hidden[..., :5].sum((1, 2))


def metric(logits: Tensor, inputs=None) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(logits.shape[1:], generator=generator, dtype=torch.float64).to(logits)
    return (logits * weights).flatten(1).mean(1)


# -- closed forms --------------------------------------------------------------------------------------------------------------------------


def test_deletion_of_an_additive_score_is_its_partial_sums():
    model, inputs, weights = additive()
    curve = perturbation_curve(model, inputs, total, weights, baseline="zero", steps=None, random_orders=0)
    ordered = weights[:, 1:].sort(descending=True).values
    expected = total(model(inputs)).detach()[:, None] - torch.cat([torch.zeros(3, 1), ordered.cumsum(1)], dim=1)
    torch.testing.assert_close(by_row(curve), expected)
    assert curve.axes["share"] == [step / PATCHES for step in range(PATCHES + 1)]
    area = (expected[:, :-1] + expected[:, 1:]).mean(1) / 2
    torch.testing.assert_close(curve.auc(), area)


def test_the_true_order_is_best_the_reverse_is_worst_and_random_ones_lie_on_a_line():
    model, inputs, weights = additive()
    curve = perturbation_curve(model, inputs, total, weights, baseline="zero", steps=None, random_orders=60)
    assert bool((curve.auc() < curve.auc("random")).all())
    assert bool((curve.auc("reverse") > curve.auc("random")).all())
    clean, empty = by_row(curve)[:, :1], by_row(curve)[:, -1:]
    line = clean + (empty - clean) * curve.shares
    scatter = by_row(curve, "random").std(0) / 60**0.5
    assert bool(((by_row(curve, "random").mean(0) - line).abs() <= 4.5 * scatter + 1e-9).all())
    torch.testing.assert_close(curve.advantage.values, curve.auc("random").mean(0) - curve.auc())
    # Exchanging any two neighbours of the order makes the area larger.
    order = weights[0, 1:].argsort(descending=True)
    for place in (0, 7, PATCHES - 2):
        swapped = order.clone()
        swapped[[place, place + 1]] = order[[place + 1, place]]
        scores = weights.clone()
        scores[0, 1 + swapped] = torch.arange(PATCHES, 0, -1, dtype=torch.float64)
        worse = perturbation_curve(model, inputs, total, scores, baseline="zero", steps=None, random_orders=0)
        assert float(worse.auc()[0]) > float(curve.auc()[0])


def test_insertion_is_deletion_of_the_reverse_order_read_backwards():
    model, inputs = cv.HookedModel(shared_model("vit")), case("vit").inputs(shared_model("vit"), batch=2)
    found = occlusion(model, inputs, metric)
    deleted = perturbation_curve(model, inputs, metric, found, steps=None, random_orders=3)
    inserted = perturbation_curve(model, inputs, metric, found, order="insertion", steps=None, random_orders=3)
    torch.testing.assert_close(by_row(inserted), by_row(deleted, "reverse").flip(-1))
    torch.testing.assert_close(by_row(inserted, "reverse"), by_row(deleted).flip(-1))
    torch.testing.assert_close(by_row(inserted)[:, -1], by_row(deleted)[:, 0])
    torch.testing.assert_close(inserted.advantage.values, inserted.auc() - inserted.auc("random").mean(0))
    assert inserted.kind == "insertion"


# -- naive twins ---------------------------------------------------------------------------------------------------------------------------


def test_token_curves_are_a_naive_loop_over_the_most_relevant():
    model, inputs = cv.HookedModel(shared_model("llava-clip-llama")), None
    inputs = case("llava-clip-llama").inputs(model.module, batch=2, images_per_prompt=2)
    site = "language.hook_input"
    found = occlusion(model, inputs, metric, tower="language")
    curve = perturbation_curve(
        model, inputs, metric, found, steps=6, random_orders=0, baseline="zero", kinds=("patch", "text")
    )
    kinds = model.tokens(inputs)["language"].kind
    _, kept = model.run_with_cache(inputs, names_filter=site)
    for number, share in enumerate(curve.axes["share"]):
        emptied = kept[site].clone()
        for row in range(2):
            ranked = sorted(
                (position for position in range(kinds.shape[1]) if kinds[row, position] in ("patch", "text")),
                key=lambda position, row=row: (-float(by_row(found)[row, position]), position),
            )
            emptied[row, ranked[: round(share * len(ranked))]] = 0
        edited = model.run_with_hooks(inputs, fwd_hooks=[(site, lambda value, hook, emptied=emptied: emptied)])
        torch.testing.assert_close(by_row(curve)[:, number], metric(edited).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "images"), [("vit-wide", 1), ("llava-clip-llama", 1), ("llava-clip-llama", 2), ("pi0", 1)]
)
def test_pixel_curves_fill_the_boxes_of_the_most_relevant_patches(name, images):
    model = cv.HookedModel(shared_model(name))
    inputs = case(name).inputs(model.module, batch=2, images_per_prompt=images)
    tokens = model.tokens(inputs)["vision"]
    scores = torch.rand(tokens.kind.shape, generator=torch.Generator().manual_seed(1))
    curve = perturbation_curve(model, inputs, metric, scores, level="pixel", baseline=0.25, steps=4, random_orders=1)
    for number, share in enumerate(curve.axes["share"]):
        pixels = inputs["pixel_values"].clone()
        pictures = pixels.view(-1, *pixels.shape[-3:])
        for example in range(2):
            places = [
                (row, position)
                for row in range(tokens.n_rows)
                for position in range(tokens.n_positions)
                if tokens.example[row] == example and tokens.kind[row, position] == "patch"
            ]
            places.sort(key=lambda place: -float(scores[place]))
            for row, position in places[: round(share * len(places))]:
                left, top, right, bottom = tokens.box[row, position].astype(int).tolist()
                pictures[row, :, top:bottom, left:right] = 0.25
        expected = metric(model({**inputs, "pixel_values": pixels})).detach()
        torch.testing.assert_close(by_row(curve)[:, number], expected, atol=1e-5, rtol=1e-4)


def test_pixels_of_tiles_are_those_of_their_rows():
    model = cv.HookedModel(shared_model("llava-next-llama"))
    inputs = case("llava-next-llama").inputs(model.module, batch=2, images_per_prompt=2)
    tokens = model.tokens(inputs)["vision"]
    scores = torch.full(tokens.kind.shape, float("nan"))
    scores[6, 5], scores[13, 2] = 1.0, 1.0
    curve = perturbation_curve(model, inputs, metric, scores, level="pixel", baseline=0.25, steps=1, random_orders=0)
    pixels = inputs["pixel_values"].clone()
    for (image, tile), (row, position) in {(1, 1): (6, 5), (3, 0): (13, 2)}.items():
        down, across = tokens.patch_row[row, position], tokens.patch_col[row, position]
        pixels[image, tile, :, 4 * down : 4 * down + 4, 4 * across : 4 * across + 4] = 0.25
    expected = metric(model({**inputs, "pixel_values": pixels})).detach()
    torch.testing.assert_close(by_row(curve)[:, 1], expected, atol=1e-5, rtol=1e-4)


def test_a_relevance_of_language_positions_removes_their_pixels():
    model = cv.HookedModel(shared_model("llava-clip-llama"))
    inputs = case("llava-clip-llama").inputs(model.module, batch=2)
    vision = torch.rand(model.tokens(inputs)["vision"].kind.shape, generator=torch.Generator().manual_seed(1))
    language = torch.full(model.tokens(inputs)["language"].kind.shape, float("nan"))
    language[model.tokens(inputs)["language"].mask("patch")] = vision[:, 1:].flatten()
    options = {"level": "pixel", "baseline": "zero", "steps": 3, "random_orders": 0}
    one = perturbation_curve(model, inputs, metric, vision, **options)
    other = perturbation_curve(model, inputs, metric, language, tower="language", **options)
    torch.testing.assert_close(by_row(one), by_row(other))


def test_equal_scores_go_in_the_order_of_positions_and_unmeasured_ones_stay():
    model, inputs, weights = additive()
    flat = torch.zeros_like(weights)
    flat[:, 3] = float("nan")
    curve = perturbation_curve(model, inputs, total, flat, baseline="zero", steps=None, random_orders=0)
    left = [position for position in range(1, PATCHES + 1) if position != 3]
    expected = total(model(inputs)).detach()[:, None] - torch.cat(
        [torch.zeros(3, 1), weights[:, left].cumsum(1)], dim=1
    )
    torch.testing.assert_close(by_row(curve), expected)


def test_a_map_of_pixels_ranks_patches_by_their_sum():
    model, inputs = cv.HookedModel(shared_model("vit")), case("vit").inputs(shared_model("vit"), batch=2)
    pixels = integrated_gradients(model, inputs, metric, site="pixels", baseline="zero")
    by_pixels = perturbation_curve(model, inputs, metric, pixels, steps=4, random_orders=0)
    by_patches = perturbation_curve(model, inputs, metric, by_row(pixels.on_patches()), steps=4, random_orders=0)
    assert torch.equal(by_row(by_pixels), by_row(by_patches))


def test_random_orders_follow_the_seed():
    model, inputs, weights = additive()
    first, again, other = (
        by_row(
            perturbation_curve(model, inputs, total, weights, baseline="zero", steps=4, random_orders=2, seed=seed),
            "random",
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, "level"),
        ({"baseline": "blur"}, "blur"),
        ({"kinds": "text"}, "no place"),
        ({"steps": 0}, "steps"),
        ({"tower": "language"}, "no site|No site|nearest|Nearest"),
    ],
)
def test_meaningless_curves_are_refused(options, message):
    model, inputs, weights = additive()
    with pytest.raises(cv.errors.CircuitVisionError, match=message):
        perturbation_curve(model, inputs, total, weights, **{"baseline": "zero", **options})


def test_scores_of_another_shape_and_unknown_orders_are_refused():
    model, inputs, weights = additive()
    with pytest.raises(InputError, match="rows and positions"):
        perturbation_curve(model, inputs, total, weights[:2], baseline="zero")
    curve = perturbation_curve(model, inputs, total, weights, baseline="zero", steps=2, random_orders=1)
    with pytest.raises(InputError, match="order"):
        curve.auc("best")
    words = case("llava-clip-llama").inputs(shared_model("llava-clip-llama"), batch=2)
    llava = cv.HookedModel(shared_model("llava-clip-llama"))
    scores = torch.rand(llava.tokens(words)["language"].kind.shape)
    with pytest.raises(InputError, match="no pixels"):
        perturbation_curve(llava, words, metric, scores, tower="language", kinds="text", level="pixel")


# -- pointing ------------------------------------------------------------------------------------------------------------------------------


def planted(values: Tensor) -> Relevance:
    """A relevance over square grids of patches, a row per map."""
    rows, side = values.shape[0], values.shape[1]
    places = torch.full((rows, side * side, 4), 0)
    for index, (down, across) in enumerate(itertools.product(range(side), repeat=2)):
        places[:, index, 2], places[:, index, 3] = down, across
    return of_rows(
        Relevance,
        values=values.flatten(1),
        axes={"row": list(range(rows)), "position": list(range(side * side))},
        method="planted",
        places=places,
        labels=[[""] * (side * side)] * rows,
    )


def test_pointing_counts_maxima_on_the_object_and_chance_is_its_share():
    values = torch.zeros(4, 4, 4)
    values[0, 1, 2] = 1.0  # on the object
    values[1, 3, 3] = 1.0  # beside it
    values[2, 1, 2], values[2, 0, 0] = 1.0, 1.0  # one of two maxima on it
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:32, 32:48] = True
    game = pointing_game(planted(values), [mask] * 4)
    assert by_row(game).tolist() == [1.0, 0.0, 0.5, 1 / 16]
    assert game.chance.tolist() == [1 / 16] * 4
    assert game.rate == pytest.approx((1 + 0.5 + 1 / 16) / 4)
    # A mask that touches a corner of a second patch makes two patches hits, unless more overlap is asked for.
    mask[32, 32] = True
    assert pointing_game(planted(values), [mask] * 4).chance_rate == 2 / 16
    assert pointing_game(planted(values), [mask] * 4, overlap=0.5).chance_rate == 1 / 16


def test_wilsons_interval_is_the_textbooks():
    values = torch.zeros(10, 2, 2)
    values[:, 0, 0] = 1.0
    mask = torch.tensor([[True, False], [False, False]])
    masks = [mask] * 8 + [mask.flip(0)] * 2
    game = pointing_game(planted(values), masks)
    assert game.rate == 0.8
    assert game.interval().tolist() == pytest.approx([0.4902, 0.9433], abs=2e-4)


def test_unmeasured_maps_are_left_out_with_a_warning():
    values = torch.zeros(2, 2, 2)
    values[0, 0, 0] = 1.0
    values[1] = float("nan")
    mask = regions.box((0, 0, 4, 4), size=(8, 8)).drawn(0)
    with pytest.warns(UserWarning, match="left out"):
        game = pointing_game(planted(values), [mask, mask])
    assert game.rate == 1.0
    assert game.chance_rate == 0.25


def test_masks_and_boxes_of_a_scene_agree():
    for scene, _ in sample_largest(5, 0):
        thing = largest(scene)
        assert thing is not None
        box = regions.box(thing.box, size=(64, 64)).drawn(0)
        assert bool((box | ~torch.from_numpy(thing.mask)).all())
        assert torch.equal(_on_object(box, (4, 4)) > 0, _on_object(torch.from_numpy(thing.mask), (4, 4)) > 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_cells_share_a_mask_out_exactly(down, across, high, wide, seed):
    mask = torch.rand(down * high, across * wide, generator=torch.Generator().manual_seed(seed)) > 0.5
    shares = _on_object(mask, (down, across))
    expected = mask.view(down, high, across, wide).double().mean((1, 3))
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize(
    ("masks", "message"),
    [([], "0 masks"), ([torch.zeros(4, 4)], "at least one pixel"), ([torch.ones(4)], "height width")],
)
def test_meaningless_masks_are_refused(masks, message):
    with pytest.raises(InputError, match=message):
        pointing_game(planted(torch.rand(1, 2, 2)), masks)


# -- on a model that learned something -----------------------------------------------------------------------------------------------------


@cache
def trained():
    model = cv.organisms.load("shapes-vit")
    drawn = sample_largest(16, 5)
    inputs = model.inputs(images=[scene.image for scene, _ in drawn])
    answers = [SHAPES.index(shape) for _, shape in drawn]
    foils = [(answer + 1) % len(SHAPES) for answer in answers]
    return model, drawn, inputs, cv.metrics.logit_diff(answers, foils)


@pytest.mark.filterwarnings("ignore:In .* cases the integrated")
def test_on_shapes_vit_integrated_gradients_find_the_largest_object():
    model, drawn, inputs, answer = trained()
    found = integrated_gradients(model, inputs, answer, steps=48)
    curve = perturbation_curve(model, inputs, answer, found, random_orders=6)
    assert float((curve.advantage.values > 0).double().mean()) > 0.9
    assert float(curve.auc().mean()) < float(curve.auc("random").mean(1).min())
    game = pointing_game(found, [largest(scene).mask for scene, _ in drawn])
    assert game.interval()[0] > 2 * game.chance_rate


def test_results_are_saved_and_drawn(tmp_path):
    model, drawn, inputs, answer = trained()
    found = occlusion(model, inputs, answer)
    scene = drawn[0][0]
    drawing = found.plot(picture=scene.pixels, box=largest(scene).box, beside=[found])
    assert "2 of 2 maps peak on the object" in drawing.layout.title.text
    assert "matters most" in found.plot(example=3).layout.title.text
    with pytest.raises(InputError, match="picture"):
        found.plot(box=largest(scene).box)
    with pytest.raises(InputError, match="per example"):
        found.plot(example=[0, 1], picture=[scene.pixels])
    curve = perturbation_curve(model, inputs, answer, found, steps=4, random_orders=3)
    again = Curve.load(curve.save(tmp_path / "curve.npz"))
    assert torch.equal(by_row(again, "random"), by_row(curve, "random"))
    assert "beats random orders" in curve.plot().layout.title.text
    game = pointing_game(found, [largest(scene).mask for scene, _ in drawn])
    assert torch.equal(PointingGame.load(game.save(tmp_path / "game.safetensors")).interval(), game.interval())
    assert "chance" in game.plot().layout.title.text


def test_words_are_drawn_below_the_map():
    entry = case("llava-clip-llama")
    model = cv.HookedModel(shared_model("llava-clip-llama"), entry.processor())
    inputs = entry.inputs(model.module, batch=2)
    found = occlusion(model, inputs, metric, tower="language")
    drawing = found.plot()
    kinds = {trace.type for trace in drawing.data}
    assert kinds == {"heatmap", "bar"}
    words = next(trace for trace in drawing.data if trace.type == "bar")
    tokens = model.tokens(inputs)["language"]
    assert len(words.y) == len(tokens.positions("text"))
    dual = cv.HookedModel(shared_model("clip"), case("clip").processor())
    texts = occlusion(dual, case("clip").inputs(dual.module, batch=2), metric, tower="text")
    assert "matters most" in texts.plot().layout.title.text
