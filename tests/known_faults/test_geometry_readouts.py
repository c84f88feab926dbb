"""What is drawn, summed or removed over patches uses the pixels that patches read: pictures that are no whole number of patches, and mixed tiles."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import circuitvision as cv
from circuitvision import readout
from circuitvision.errors import InputError
from circuitvision.model.patches import PatchEmbedding
from circuitvision.model.tokens import TokenMap
from circuitvision.readout.patch_coords import extent_of, picture_of
from circuitvision.readout.probes.strongest import box_shares
from circuitvision.readout.relevance.attention import _read_by
from circuitvision.readout.relevance.boxes import Boxes
from circuitvision.readout.relevance.variables import PIXELS, place_of
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model
from tests.zoo.weights import generator_for, randomise

from .test_geometry_projector import measured, onevision_inputs, wide

HEIGHT, WIDTH = 25, 31
PATCH = (6, 4)


def uneven() -> tuple[cv.HookedModel, dict[str, torch.Tensor]]:
    """A ViT that reads 24 x 28 of 25 x 31 pixels, in 4 x 7 patches; two pictures."""
    config = tf.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=9, image_size=(HEIGHT, WIDTH), patch_size=PATCH,
        id2label={0: "a", 1: "b", 2: "c"},
    )  # fmt: skip
    module = randomise(tf.ViTForImageClassification(config), "uneven").double()
    pixels = torch.randn(2, 3, HEIGHT, WIDTH, generator=generator_for("uneven"), dtype=torch.float64)
    return cv.HookedModel(module), {"pixel_values": pixels}


def first_class(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0]


def in_patches(values: torch.Tensor) -> torch.Tensor:
    """Sums over the patches of a picture, by slicing: `[row down across]`."""
    read = values[:, : 4 * PATCH[0], : 7 * PATCH[1]]
    return read.reshape(len(read), 4, PATCH[0], 7, PATCH[1]).sum((2, 4))


def test_pixels_are_summed_over_the_patch_that_reads_them() -> None:
    model, inputs = uneven()
    result = readout.gradient_times_activation(model, inputs, first_class, site="pixels")
    pixels = inputs["pixel_values"].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model.module(pixel_values=pixels).logits[:, 0].sum(), pixels)
    expected = in_patches((pixels * slope).sum(1).detach())
    found = result.on_patches()
    assert torch.allclose(by_row(found)[:, 1:].view(2, 4, 7), expected, atol=1e-12)
    assert by_row(found)[:, 0].isnan().all()
    assert torch.allclose(found.on_image(1), expected[1], atol=1e-12)


def test_pixels_of_removed_patches_are_those_they_read() -> None:
    model, inputs = uneven()
    place = place_of(model, inputs, PIXELS, inputs["pixel_values"].shape)
    boxes = Boxes(model, inputs, place, inputs["pixel_values"])
    embedding = model.module.vit.embeddings.patch_embeddings.projection
    for position in (1, 7, 8, 28):
        mask = torch.zeros(2, 29, dtype=torch.bool)
        mask[1, position] = True
        inside = boxes.of(mask)
        assert not inside[0].any()
        assert inside[1].sum() == PATCH[0] * PATCH[1]
        with torch.no_grad():
            clean = embedding(inputs["pixel_values"])
            moved = embedding(inputs["pixel_values"] + inside * 1.0) - clean
            beside = embedding(inputs["pixel_values"] + ~inside * 1.0) - clean
        assert beside[1].abs().amax(0).flatten()[position - 1] < 1e-9
        assert (moved[1].abs().amax(0).flatten() > 1e-9).nonzero().flatten().tolist() == [position - 1]


def test_pixels_of_a_mixed_position_are_those_of_all_its_patches() -> None:
    model = wide("llava-onevision-resampled")
    inputs = onevision_inputs(model, [[(30, 30)]])
    weights, _ = measured(model, inputs)
    tokens = model.tokens(inputs)["language"]
    place = place_of(model, inputs, "language.hook_input", (1, tokens.n_positions, 32))
    boxes = Boxes(model, inputs, place, inputs["pixel_values"])
    position = int(np.flatnonzero((tokens.kind[0] == "patch") & (tokens.patch_row[0] < 0))[0])
    mask = torch.zeros(1, tokens.n_positions, dtype=torch.bool)
    mask[0, position] = True
    inside = boxes.of(mask)[0, :, 0]
    expected = torch.zeros_like(inside)
    for tile, patch in np.argwhere(weights[0, position] > 1e-9):
        down, across = divmod(int(patch), 3)
        expected[tile, down * 5 : down * 5 + 5, across * 5 : across * 5 + 5] = True
    assert torch.equal(inside, expected)
    assert expected.any()


def test_the_pointing_game_looks_at_the_pixels_of_the_peak() -> None:
    """An object in the last pixels that patch (3, 6) reads is hit by it; one in pixels that nothing reads is hit by none."""
    model, inputs = uneven()
    result = readout.gradient_times_activation(model, inputs, first_class)
    values = torch.zeros_like(by_row(result))
    values[:, 1 + 3 * 7 + 6] = 1.0
    peak = result.__class__(**{**vars(result), "values": values.T})
    corner = np.zeros((HEIGHT, WIDTH), bool)
    corner[23, 27] = True
    past = np.zeros((HEIGHT, WIDTH), bool)
    past[24, 28:] = True
    hits = readout.pointing_game(peak, [corner, past])
    assert by_row(hits).tolist() == [1.0, 0.0]
    assert hits.chance.tolist() == [1 / 28, 0.0]
    # The same object in a mask of twice the resolution.
    assert by_row(readout.pointing_game(peak, [corner.repeat(2, 0).repeat(2, 1), past])).tolist() == [1.0, 0.0]


def test_a_map_is_stretched_over_what_its_patches_read() -> None:
    model, inputs = uneven()
    result = readout.gradient_times_activation(model, inputs, first_class)
    whole = result.per_pixel(1, size=(HEIGHT, WIDTH))
    expected = result.on_image(1).repeat_interleave(PATCH[0], 0).repeat_interleave(PATCH[1], 1)
    assert torch.equal(whole[:24, :28], expected)
    assert whole[24:].isnan().all()
    assert whole[:, 28:].isnan().all()
    figure = result.plot(example=1, picture=np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    assert np.allclose(heat.x, np.arange(7) * PATCH[1] + PATCH[1] / 2 - 0.5)
    assert np.allclose(heat.y, np.arange(4) * PATCH[0] + PATCH[0] / 2 - 0.5)


def test_attention_is_drawn_over_what_its_patches_read() -> None:
    model, inputs = uneven()
    _, cache = model.run_with_cache(inputs)
    maps = readout.attention_maps(model, cache, query="cls")
    assert extent_of(maps, picture_of(maps)) == pytest.approx((24 / 25, 28 / 31))
    figure = maps.plot(picture=np.zeros((HEIGHT, WIDTH, 3), np.uint8), box=(0, 0, WIDTH, HEIGHT))
    heat = next(trace for trace in figure.data if trace.type == "heatmap" and trace.opacity)
    assert np.allclose(heat.x, np.arange(7) * PATCH[1] + PATCH[1] / 2 - 0.5)
    box = figure.layout.shapes[0]
    assert (box.x0, box.x1, box.y0, box.y1) == pytest.approx((-0.5, WIDTH - 0.5, -0.5, HEIGHT - 0.5))


def test_a_cut_picture_keeps_what_the_regions_read() -> None:
    model, inputs = uneven()
    _, cache = model.run_with_cache(inputs)
    maps = readout.attention_maps(model, cache, query="cls")
    contrast = readout.attention_contrast(maps, maps, epsilon=1.0)
    values = torch.full_like(by_row(contrast), 0.0)
    values[:, (contrast.places[0, :, 2] == 3) & (contrast.places[0, :, 3] == 6)] = 1.0
    one = contrast.__class__(**{**vars(contrast), "values": values.T})
    picture = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
    assert np.array_equal(one.focus(picture, top_percent=1.0), picture[18:24, 24:28])
    assert one.regions(1.0)[0].box == (24.0, 18.0, 28.0, 24.0)


def test_boxes_of_exemplars_are_shares_of_the_picture() -> None:
    model, inputs = uneven()
    shares = box_shares(model.tokens(inputs)["vision"])
    assert shares[0, 1 + 3 * 7 + 6].tolist() == pytest.approx([24 / 31, 18 / 25, 28 / 31, 24 / 25])
    tiled = wide("llava-onevision")
    inputs = onevision_inputs(tiled, [[(22, 45)], [(13, 24), (30, 11)]])
    tokens = tiled.tokens(inputs)["vision"]
    found = box_shares(tokens)
    size = np.array([24, 13, 24, 13])
    assert np.allclose(found[-2].numpy(), tokens.box[-2] / size, equal_nan=True, atol=1e-6)


def test_windows_fit_the_grid_of_every_row() -> None:
    """Two pictures of 3 x 4 and 2 x 5 patches: each has the windows that it has alone, and one that does not fit the smaller is refused."""
    model = cv.HookedModel(copy.deepcopy(shared_model("siglip2-classifier")).double())
    inputs = case("siglip2-classifier").inputs(model.module, batch=2, dtype=torch.float64)
    for window, stride in ((1, 1), (2, 1), (2, 2)):
        both = readout.occlusion(
            model, inputs, first_class, window=window, stride=stride, baseline="zero", progress=False
        )
        for row in (0, 1):
            alone = readout.occlusion(
                model, {name: value[row : row + 1] for name, value in inputs.items()}, first_class,
                window=window, stride=stride, baseline="zero", progress=False,
            )  # fmt: skip
            assert torch.allclose(by_row(both)[row], by_row(alone)[0], equal_nan=True, atol=1e-9)
    with pytest.raises(InputError, match="3 × 3 does not fit the grid of 2 × 5"):
        readout.occlusion(model, inputs, first_class, window=3, baseline="zero", progress=False)


def test_windows_over_mixed_positions_take_all_that_hold_a_patch() -> None:
    model = wide("llava-onevision-resampled")
    inputs = onevision_inputs(model, [[(30, 30)]])
    tokens = model.tokens(inputs)["language"]
    result = readout.occlusion(
        model,
        inputs,
        lambda logits: logits[:, -1, 7],
        tower="language",
        kinds="patch",
        window=2,
        stride=2,
        baseline="zero",
        progress=False,
    )
    assert torch.equal(~by_row(result).isnan(), torch.from_numpy(tokens.kind == "patch"))


def test_relevance_is_handed_on_by_the_weights_of_mixed_positions() -> None:
    model = wide("llava-onevision-resampled")
    inputs = onevision_inputs(model, [[(30, 30)]])
    weights, _ = measured(model, inputs)
    metric = cv.metrics.bind(lambda logits: logits[:, -1, 7], model)
    found = readout.chefer_relevance(model, inputs, metric, tower="language")
    expected = torch.einsum("rp,rpvf->vf", by_row(found), torch.from_numpy(weights).to(by_row(found)))
    assert torch.allclose(_read_by(model, inputs, metric, "vision", "language"), expected, atol=1e-9)


def test_readouts_see_mixed_positions_as_patches_of_the_image() -> None:
    """They lie on no grid, which is said, but count as image patches in a share of the attention."""
    model = wide("llava-onevision-resampled")
    inputs = onevision_inputs(model, [[(30, 30)]])
    _, cache = model.run_with_cache(inputs)
    maps = readout.attention_maps(model, cache, tower="language", query="last")
    tokens = model.tokens(inputs)["language"]
    assert torch.equal(maps.patches(0)[0], torch.from_numpy(tokens.kind[0] == "patch")[maps.axes["key"]])
    assert maps.grid(0, 0).shape == (3, 3)
    with pytest.raises(InputError, match="positions that mix patches lie on no grid"):
        maps.grid(0, 0, tile=1)


def test_mutant_that_cuts_the_picture_into_equal_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(self: Any, grid: tuple[int, int], height: int, width: int) -> np.ndarray:
        rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
        dy, dx = height / grid[0], width / grid[1]
        return np.stack([columns * dx, rows * dy, (columns + 1) * dx, (rows + 1) * dy], axis=1)

    monkeypatch.setattr(PatchEmbedding, "boxes", equal)
    for check in (
        test_pixels_are_summed_over_the_patch_that_reads_them,
        test_pixels_of_removed_patches_are_those_they_read,
        test_the_pointing_game_looks_at_the_pixels_of_the_peak,
        test_a_map_is_stretched_over_what_its_patches_read,
        test_a_cut_picture_keeps_what_the_regions_read,
    ):
        with pytest.raises(AssertionError):
            check()


def test_mutant_that_hands_relevance_on_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = cv.HookedModel.tokens

    def heavy(self: Any, inputs: Any) -> dict[str, TokenMap]:
        maps = tokens(self, inputs)
        maps["language"].patches.weight[:] = 1.0
        return maps

    monkeypatch.setattr(cv.HookedModel, "tokens", heavy)
    with pytest.raises(AssertionError):
        test_relevance_is_handed_on_by_the_weights_of_mixed_positions()
