"""How curves and pointing games are judged: normalised areas, intervals, tolerance, what notebooks say, and figures that compare like with like."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitvision import regions
from circuitvision.errors import InputError
from circuitvision.readout import perturbation_curve, pointing_game
from circuitvision.readout.relevance.curves import Curve
from circuitvision.readout.relevance.pointing import PointingGame, _grown
from circuitvision.readout.relevance.result import Relevance
from tests.readout.layouts import by_row, of_rows
from tests.readout.relevance_models import inputs_of, metric, model_of


def curve_of(values, random=(), kind="deletion") -> Curve:
    values = torch.tensor(values, dtype=torch.float64)
    shares = [step / (values.shape[1] - 1) for step in range(values.shape[1])]
    axes = {"share": shares, "example": list(range(len(values)))}
    random = torch.tensor(random, dtype=torch.float64)
    random = random.transpose(1, 2) if random.numel() else random
    fields = {"kind": kind, "method": "LeGrad (all)", "baseline": "zero"}
    return Curve(values.T, axes, **fields, reverse=values.T + 0.5, random=random)


def test_a_normalised_area_is_of_the_way_from_everything_removed_to_the_unedited_run():
    deletion = curve_of([[5.0, 2.0, 1.0], [-1.0, -2.0, -3.0]])
    assert torch.equal(deletion.auc(), torch.tensor([2.5, -2.0], dtype=torch.float64))
    torch.testing.assert_close(deletion.auc(normalised=True), torch.tensor([0.375, 0.5], dtype=torch.float64))
    insertion = curve_of([[1.0, 4.0, 5.0]], kind="insertion")
    torch.testing.assert_close(insertion.auc(normalised=True), torch.tensor([0.625], dtype=torch.float64))
    # Areas of an output with another unit and another zero are the same.
    scaled = curve_of([[17.0, 8.0, 5.0], [-1.0, -4.0, -7.0]])
    torch.testing.assert_close(scaled.auc(normalised=True), deletion.auc(normalised=True))
    with pytest.warns(UserWarning, match="1 of 1 examples have no normalised area"):
        assert bool(curve_of([[1.0, 3.0, 1.0]]).auc(normalised=True).isnan().all())


@pytest.mark.parametrize("kind", ["deletion", "insertion"])
def test_random_orders_are_normalised_by_the_same_ends(kind):
    model, inputs = model_of("vit"), inputs_of("vit")
    curve = perturbation_curve(
        model, inputs, metric, torch.rand(2, 17), order=kind, baseline="own", random_orders=3, steps=4
    )
    ends = (by_row(curve)[:, 0], by_row(curve)[:, -1])
    whole, nothing = ends if curve.kind == "deletion" else ends[::-1]
    expected = (curve.auc("random") - nothing) / (whole - nothing)
    torch.testing.assert_close(curve.auc("random", normalised=True), expected)
    unedited = metric(model(inputs)).detach()
    torch.testing.assert_close(whole, unedited)


def test_the_interval_is_of_the_mean_advantage():
    random = [[[4.0, 4.0, 4.0]] * 3, [[6.0, 6.0, 6.0]] * 3]
    curve = curve_of([[4.0, 4.0, 4.0], [3.0, 3.0, 3.0], [2.0, 2.0, 2.0]], random)
    assert curve.advantage.values.tolist() == [1.0, 2.0, 3.0]
    low, high = curve.advantage.interval().tolist()
    assert 1.0 <= low < 2.0 < high <= 3.0
    assert curve_of([[4.0, 3.0, 3.0], [4.0, 3.0, 3.0]], [[[1.0] * 3] * 2], "insertion").advantage.values.tolist() == [
        2.25,
        2.25,
    ]
    assert all(math.isnan(end) for end in curve_of([[1.0, 0.0]], [[[1.0, 0.0]]]).advantage.interval().tolist())
    said = curve.highlights()
    assert said["area under the curve"] == "3"
    assert said["random orders"] == "5"
    assert said["better than random"].startswith("by 2 (95 %: ")
    assert said["better than random"].endswith(", in 3 of 3 examples")
    assert said["reverse order"] == "3.5"
    assert "better than random" in curve._repr_html_()
    assert "random orders" not in curve_of([[1.0, 0.0]]).highlights()


# -- pointing ------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 12), st.integers(0, 2**31))
def test_a_grown_mask_holds_what_is_near_enough(height, width, by, seed):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.2
    rows, columns = mask.nonzero(as_tuple=True)
    down = (torch.arange(height)[:, None, None] - rows).square()
    across = (torch.arange(width)[None, :, None] - columns).square()
    expected = (down + across <= by**2).any(-1) if len(rows) else mask
    assert torch.equal(_grown(mask, by), expected)


def test_tolerance_counts_near_misses_and_raises_chance():
    places = torch.stack([torch.zeros(16), torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1).long()
    values = torch.zeros(1, 16)
    values[0, 5] = 1.0
    result = of_rows(
        Relevance,
        values,
        {"row": [0], "position": list(range(16))},
        method="x",
        places=places[None],
        labels=[["p"] * 16],
    )
    # Patches are 4 × 4 pixels; the maximum is on rows and columns 4 to 7, the object on columns 10 and 11.
    mask = regions.box((10, 4, 12, 8), size=(16, 16)).drawn(0)
    plain, near = pointing_game(result, [mask]), pointing_game(result, [mask], tolerance=3)
    assert (plain.rate, near.rate) == (0.0, 1.0)
    assert near.chance_rate > plain.chance_rate == 1 / 16
    assert pointing_game(result, [mask], tolerance=2.9).rate == 0.0
    assert (plain.method, near.method) == ("x", "x, within 3 pixels")
    assert near.highlights()["on the object"].startswith("100.0% (95 %: 2")
    assert near.highlights()["chance"] == f"{near.chance_rate:.1%}"


def test_meaningless_pointing_is_refused():
    result = of_rows(Relevance, torch.zeros(1, 1), {"row": [0], "position": [0]}, places=torch.zeros(1, 1, 4).long())
    mask = [torch.ones(4, 4)]
    for call, message in (
        (lambda: pointing_game(torch.zeros(2, 3), mask), "not Tensor"),
        (lambda: pointing_game(result, mask, overlap=1.0), "from 0 to below 1"),
        (lambda: pointing_game(result, mask, tolerance=-1), "pixels from 0 on"),
        (lambda: pointing_game(result, [None]), "Mask 0"),
        (lambda: regions.box([(1, 2, 3)]), "left, top, right, bottom"),
        (lambda: pointing_game(result, regions.box([(0, 0, 1, 1)])), "size="),
        (lambda: pointing_game(result, regions.words("dog")), "no part of a picture"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# -- figures -------------------------------------------------------------------------------------------------------------------------------


def test_figures_compare_results_of_one_kind():
    curve = curve_of([[4.0, 2.0, 1.0]], [[[4.0, 3.0, 1.0]]])
    game = PointingGame(torch.ones(3).double(), {"example": [0, 1, 2]}, method="x", chance=torch.zeros(3).double())
    assert len(curve.plot(beside=curve).data) == len(curve.plot(beside=[curve]).data)
    assert len(game.plot(beside=game).data[0].x) == 2
    with pytest.raises(InputError, match="of the kind Curve; PointingGame is none"):
        curve.plot(beside=game)
    with pytest.raises(InputError, match="of the kind PointingGame"):
        game.plot(beside=[curve])
    with pytest.raises(InputError, match="opposite ways"):
        curve.plot(beside=curve_of([[1.0, 2.0, 4.0]], kind="insertion"))
    with pytest.raises(InputError, match="it takes reverse, beside, title"):
        curve.plot(overlay=True)


def test_a_box_in_shares_needs_no_picture_and_rows_are_checked():
    places = torch.stack([torch.zeros(4), torch.zeros(4), torch.arange(4) // 2, torch.arange(4) % 2], -1).long()
    result = of_rows(Relevance, torch.arange(4.0)[None], {"row": [0], "position": [0, 1, 2, 3]}, method="x", places=places[None],
        labels=[["p"] * 4],
    )  # fmt: skip
    figure = result.plot(box=(0.5, 0.5, 1.0, 1.0))
    (box,) = figure.layout.shapes
    assert (box.x0, box.x1, box.y0, box.y1) == (0.5, 1.5, 0.5, 1.5)
    assert "peaks on the object" in figure.layout.title.text
    tied = dataclasses.replace(result, values=torch.tensor([[3.0, 0.0, 1.0, 3.0]]).T)
    assert "peaks on the object" in tied.plot(box=(0.5, 0.5, 1.0, 1.0)).layout.title.text
    assert "peaks beside the object" in tied.plot(box=(0.5, 0.0, 1.0, 0.5)).layout.title.text
    assert "peaks beside the object" in result.plot(box=(0.0, 0.0, 0.5, 0.5)).layout.title.text
    with pytest.raises(InputError, match="in pixels: give the picture"):
        result.plot(box=(1, 1, 2, 2))
    with pytest.raises(InputError, match="There is no example 1"):
        result.plot(example=1)
    with pytest.raises(InputError, match="does not take overlay="):
        result.plot(overlay=False, picture=np.zeros((4, 4, 3), dtype=np.uint8))


def test_the_band_holds_nine_of_ten_random_orders_and_bars_end_at_the_interval():
    random = torch.arange(21.0)[:, None, None].expand(-1, 1, 3)
    low, high, middle, own, _ = curve_of([[4.0, 2.0, 1.0]], random.tolist()).plot().data
    assert (list(low.y), list(high.y), list(middle.y)) == ([1.0] * 3, [19.0] * 3, [10.0] * 3)
    assert list(own.y) == [4.0, 2.0, 1.0]
    hits = torch.tensor([1.0, 1.0, 0.0]).double()
    game = PointingGame(hits, {"example": [0, 1, 2]}, method="x", chance=torch.zeros(3).double())
    bars = game.plot().data[0].error_x
    assert (game.rate - bars.arrayminus[0], game.rate + bars.array[0]) == pytest.approx(tuple(game.interval().tolist()))


def test_zero_has_the_middle_colour_and_the_largest_value_the_full_one():
    places = torch.stack([torch.zeros(4), torch.zeros(4), torch.arange(4) // 2, torch.arange(4) % 2], -1).long()
    values = torch.tensor([[1.0, -3.0, 0.5, 0.0]])
    result = of_rows(
        Relevance, values, {"row": [0], "position": [0, 1, 2, 3]}, method="x", places=places[None], labels=[["p"] * 4]
    )
    (shown,) = result.plot().data
    assert (shown.zmin, shown.zmax) == (-3.0, 3.0)


def test_words_of_texts_that_all_images_are_compared_with_are_one_game():
    """One image and three texts: what the metric reads is the second text, and its words must be what is removed."""
    model = model_of("clip")
    inputs = dict(inputs_of("clip"))
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    tokens = model.tokens(inputs)["text"]

    def score(logits):
        return logits[:, 1]

    relevance = torch.zeros(tokens.kind.shape)
    relevance[1] = torch.arange(tokens.n_positions, 0, -1)
    steps = int((tokens.kind == "text").sum())
    curve = perturbation_curve(
        model, inputs, score, relevance, kinds="text", tower="text", baseline="zero", steps=None, random_orders=2
    )
    assert by_row(curve).shape == (1, steps + 1)
    embedded = []
    handle = model.module.text_model.embeddings.register_forward_hook(
        lambda module, args, out: out.masked_fill(removed[..., None], 0.0)
    )
    order = [(1, place) for place in range(tokens.n_positions) if tokens.kind[1, place] == "text"]
    try:
        for count in range(len(order) + 1):
            removed = torch.zeros(tokens.kind.shape, dtype=torch.bool)
            for unit in order[:count]:
                removed[unit] = True
            with torch.no_grad():
                embedded.append(float(score(model.module(**inputs).logits_per_image)))
    finally:
        handle.remove()
    torch.testing.assert_close(by_row(curve)[0, : len(order) + 1].double(), torch.tensor(embedded, dtype=torch.float64))
    assert abs(embedded[-1] - embedded[0]) > 1e-3


def test_a_game_without_any_value_has_a_row_in_a_notebook():
    nothing = torch.tensor([float("nan")])
    game = PointingGame(values=nothing, axes={"example": [0]}, provenance={}, chance=nothing)
    assert math.isnan(game.rate)
    assert all(math.isnan(end) for end in game.interval().tolist())
    assert "nan" in game.highlights()["on the object"]
    assert game._repr_html_()
