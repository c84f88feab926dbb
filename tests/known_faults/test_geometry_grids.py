"""Grids and positions of vision towers follow their embedding's own kernel and stride, and prompts given as embeddings have true token maps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model import packing, tokens, tower
from circuitvision.model.patches import PatchEmbedding
from tests.zoo import case, shared_model
from tests.zoo.weights import generator_for, randomise

SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator_for("grids"))


def vit(image: Any, patch: Any) -> cv.HookedModel:
    return cv.HookedModel(
        randomise(tf.ViTForImageClassification(tf.ViTConfig(**SMALL, image_size=image, patch_size=patch)), "grids")
    )


def dinov2(image: Any, patch: Any) -> cv.HookedModel:
    config = tf.Dinov2WithRegistersConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=image,
        patch_size=patch,
        num_register_tokens=2,
    )
    return cv.HookedModel(randomise(tf.Dinov2WithRegistersModel(config), "grids"))


def paint_every_pixel(model: cv.HookedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Each pixel moves the patches whose boxes hold it, and no other; measured on the convolution itself."""
    conv = next(part for part in model.module.modules() if isinstance(part, nn.Conv2d))
    found = model.tokens(inputs)["vision"]
    prefix = model.vision.cfg.n_prefix
    read = inputs["pixel_values"][:1]
    height, width = read.shape[-2:]
    with torch.no_grad():
        clean = conv(read)
        assert clean[0, 0].numel() == found.n_positions - prefix
        for row in range(height):
            for column in range(width):
                changed = read.clone()
                changed[0, :, row, column] += 3.0
                moved = (conv(changed) - clean)[0].abs().amax(0).flatten() > 1e-6
                box = found.box[0, prefix:]
                claimed = (box[:, 0] <= column) & (column < box[:, 2]) & (box[:, 1] <= row) & (row < box[:, 3])
                assert np.array_equal(moved.numpy(), claimed), (row, column)


@pytest.mark.parametrize(
    ("image", "patch", "grid"),
    [((24, 36), (12, 6), (2, 6)), ((23, 17), (6, 4), (3, 4)), ((20, 20), 6, (3, 3)), ((13, 29), (13, 4), (1, 7))],
)
def test_patches_with_two_sides(image: tuple[int, int], patch: Any, grid: tuple[int, int]) -> None:
    model = vit(image, patch)
    inputs = {"pixel_values": pixels(2, 3, *image)}
    assert model.vision.cfg.grid == grid
    assert model.vision.cfg.patch_size == patch
    paint_every_pixel(model, inputs)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, "vision.blocks.0.hook_resid_pre")
    found = model.tokens(inputs)["vision"]
    assert cache["vision.blocks.0.hook_resid_pre"].shape[1] == found.n_positions == 1 + grid[0] * grid[1]
    assert (found.patch_row.max() + 1, found.patch_col.max() + 1) == grid

    block = model.module.vit.layers[0]
    handle = block.register_forward_pre_hook(lambda module, args: (zeroed(args[0]), *args[1:]))
    with torch.no_grad():
        expected = model.module(**inputs).logits
    handle.remove()
    with torch.no_grad():
        edit = edits.ablate("vision.blocks.0.hook_resid_pre", "zero", positions="last")
        assert torch.allclose(model.run(inputs, [edit]), expected, atol=1e-6)


def zeroed(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[:, -1] = 0
    return value


@pytest.mark.parametrize("size", [(20, 20), (27, 41), (19, 22), (7, 50)])
@pytest.mark.parametrize(("image", "patch"), [(20, 5), ((20, 24), (5, 6))])
def test_dinov2_at_every_size_it_accepts(image: Any, patch: Any, size: tuple[int, int]) -> None:
    model = dinov2(image, patch)
    inputs = {"pixel_values": pixels(2, 3, *size)}
    with torch.no_grad():
        expected = model.module(**inputs).last_hidden_state
        assert torch.equal(model(inputs), expected)
    found = model.tokens(inputs)["vision"]
    assert expected.shape[1] == found.n_positions
    paint_every_pixel(model, inputs)


@pytest.mark.parametrize("name", ["vit", "deit", "clip", "siglip"])
def test_interpolated_positions_at_sizes_that_are_no_whole_number_of_patches(name: str) -> None:
    model = cv.HookedModel(shared_model(name))
    inputs = case(name).inputs(model.module, batch=2)
    inputs |= {"pixel_values": pixels(2, 3, 22, 31), "interpolate_pos_encoding": True}
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, "vision.hook_input")
    assert out.isfinite().all()
    assert cache["vision.hook_input"].shape[1] == model.tokens(inputs)["vision"].n_positions
    paint_every_pixel(model, inputs)


def test_the_real_geometry_of_siglip() -> None:
    """384 pixels in patches of 14: patch 26 reads columns 364 to 377, and nothing reads the last six."""
    config = tf.SiglipVisionConfig(**SMALL, image_size=384, patch_size=14, vision_use_head=False)
    found = cv.HookedModel(tf.SiglipVisionModel(config)).tokens({"pixel_values": torch.zeros(1, 3, 384, 384)})["vision"]
    assert found.box[0, 26].tolist() == [364, 0, 378, 14]
    assert found.in_box(378, 0, 384, 384) == []
    assert found.in_box(0, 378, 384, 384) == []
    assert found.in_box(377, 0, 384, 14) == [26]


def test_a_convolution_with_overlap_and_padding() -> None:
    """What a patch reads is the kernel's, which may be larger than the stride, and begin before the picture."""
    model = vit((20, 20), 4)
    model.module.vit.embeddings.patch_embeddings.projection = nn.Conv2d(3, 24, (6, 5), stride=(4, 3), padding=(1, 2))
    embedding = model.vision.patch_embedding
    assert embedding is not None
    assert embedding.grid(20, 20) == tuple(
        model.module.vit.embeddings.patch_embeddings.projection(torch.zeros(1, 3, 20, 20)).shape[-2:]
    )
    paint_every_pixel(model, {"pixel_values": pixels(1, 3, 20, 20)})


def test_sizes_that_the_tower_cannot_take_are_refused() -> None:
    """Smaller than a patch; a table of positions that transformers cannot stretch."""
    with pytest.raises(InputError, match="smaller than one patch of 5x5"):
        dinov2(20, 5)({"pixel_values": pixels(1, 3, 4, 30)})
    wide, inputs = vit((24, 36), (12, 6)), {"pixel_values": pixels(1, 3, 24, 48), "interpolate_pos_encoding": True}
    with pytest.raises((TypeError, RuntimeError)):
        wide.module(**inputs)
    with pytest.raises(InputError, match="cannot be stretched"):
        wide(inputs)


def test_flattened_patches_of_any_grid() -> None:
    """Every entry of a flattened patch moves that patch alone; rows that fill up the batch are padding; a mask that says otherwise is refused."""
    model = cv.HookedModel(shared_model("siglip2-vision"))
    inputs = case("siglip2-vision").inputs(model.module, batch=3)
    found = model.tokens(inputs)["vision"]
    for row, (rows, columns) in enumerate(inputs["spatial_shapes"].tolist()):
        count = rows * columns
        assert (found.kind[row, :count] == "patch").all()
        assert (found.kind[row, count:] == "padding").all()
        assert found.box[row, count - 1].tolist() == [4 * columns - 4, 4 * rows - 4, 4 * columns, 4 * rows]
        assert np.isnan(found.box[row, count:]).all()
    assert found.last() == [count - 1 for count in inputs["spatial_shapes"].prod(1).tolist()]
    other = inputs["pixel_attention_mask"].clone()
    other[0, -1] = 1
    with pytest.raises(InputError, match="disagree"):
        model({**inputs, "pixel_attention_mask": other})


# -- prompts given as embeddings -----------------------------------------------------------------------------------------------------------


def as_embeddings(model: cv.HookedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same prompts, looked up by hand."""
    made = {name: value for name, value in inputs.items() if name != "input_ids"}
    return {**made, "inputs_embeds": model.module.get_input_embeddings()(inputs["input_ids"]).detach()}


EMBEDDED = [
    "llava-clip-llama",
    "llava-clip-mistral-sliding",
    "paligemma",
    "llava-next-llama",
    "llava-onevision-resampled",
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_in_place_of_ids(name: str, side: str) -> None:
    """The mask says what is padding, image features are found as the model finds them, and the rest is unknown."""
    model = cv.HookedModel(copy.deepcopy(shared_model(name)))
    ids = case(name).inputs(model.module, batch=3, padding=side)
    given = as_embeddings(model, ids)
    by_ids, found = model.tokens(ids)["language"], model.tokens(given)["language"]
    same = by_ids.kind == found.kind
    assert set(found.kind[~same]) == {"unknown"}
    assert set(by_ids.kind[~same]) == {"text"}
    assert np.array_equal(found.kind == "padding", ids["attention_mask"].numpy() == 0)
    assert np.array_equal(found.box, by_ids.box, equal_nan=True)
    assert np.array_equal(found.image_number, by_ids.image_number)
    assert found.last() == [int(row.nonzero()[-1]) for row in ids["attention_mask"]]

    edit = [edits.ablate("language.blocks.0.hook_resid_pre", "zero", positions="last")]
    rows, last = torch.arange(3), torch.tensor(found.last())

    def zero_last(module: Any, args: Any, kwargs: Any) -> Any:
        value = (args[0] if args else kwargs["hidden_states"]).clone()
        value[rows, last] = 0
        return (value, *args[1:]), kwargs

    handle = model.language.blocks[0].module.register_forward_pre_hook(zero_last, with_kwargs=True)
    with torch.no_grad():
        expected = model.module(**given).logits
    handle.remove()
    metric = cv.metrics.logit_diff(5, 6)
    with torch.no_grad():
        edited, clean = model.run(given, edit), model(given)
        assert torch.allclose(edited[rows, last], expected[rows, last], atol=1e-5)
        swept = model.sweep(given, edit, metric, progress=False)
    difference = [(out[rows, last, 5] - out[rows, last, 6]).detach() for out in (expected, clean)]
    assert torch.allclose(swept.values[0], difference[0], atol=1e-5)
    assert torch.allclose(swept.clean, difference[1], atol=1e-5)


def test_a_cache_of_a_run_with_embeddings_leaves_out_the_lookup() -> None:
    model = cv.HookedModel(shared_model("llava-clip-llama"))
    ids = case("llava-clip-llama").inputs(model.module, batch=2, padding="right")
    given = as_embeddings(model, ids)
    with torch.no_grad():
        _, cache = model.run_with_cache(given)
        _, expected = model.run_with_cache(ids)
        for name, value in cache.items():
            assert torch.equal(value, expected[name]), name
        assert set(expected) - set(cache) == {"language.hook_embed"}
        with pytest.raises(InputError, match=r"language.hook_embed does not run: inputs_embeds.*language.hook_input"):
            model.run_with_cache(given, "language.hook_embed")
        with pytest.raises(InputError, match="inputs_embeds"):
            model.run(given, [edits.ablate("language.hook_embed", "zero")])
    assert not model.engine.stack
    words = {"inputs_embeds": given["inputs_embeds"], "attention_mask": given["attention_mask"]}
    assert set(model.tokens(words)) == {"language"}
    assert set(np.unique(model.tokens(words)["language"].kind)) == {"unknown", "padding"}
    with pytest.raises(InputError, match=r"attention_mask has shape .* inputs_embeds"):
        model({**given, "attention_mask": given["attention_mask"][:, 1:]})


def test_generation_from_embeddings_counts_positions_from_the_mask() -> None:
    model = cv.HookedModel(shared_model("llava-clip-llama"))
    ids = case("llava-clip-llama").inputs(model.module, batch=2, padding="left")
    given = as_embeddings(model, ids)
    edit = [edits.ablate("language.blocks.0.hook_resid_pre", "zero", positions="last")]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    length = ids["input_ids"].shape[1]
    for chosen in ([], edit):
        expected = model.generate(ids, edits=chosen, **options)[:, length:]
        assert torch.equal(model.generate(given, edits=chosen, **options), expected)


# -- mutants -------------------------------------------------------------------------------------------------------------------------------


def test_mutant_that_swaps_rows_and_columns_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PatchEmbedding.of.__func__  # type: ignore[attr-defined]

    def swapped(cls: Any, module: Any, config: Any) -> PatchEmbedding:
        found = whole(cls, module, config)
        return PatchEmbedding(found.kernel[::-1], found.stride[::-1], found.padding[::-1])

    monkeypatch.setattr(tower.PatchEmbedding, "of", classmethod(swapped))
    with pytest.raises((AssertionError, InputError)):
        test_patches_with_two_sides((23, 17), (6, 4), (3, 4))


def test_mutant_that_reads_one_patch_number_for_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(self: PatchEmbedding, height: int, width: int) -> tuple[int, int]:
        return height // self.kernel[0], width // self.kernel[0]

    monkeypatch.setattr(PatchEmbedding, "grid", one)
    with pytest.raises((AssertionError, InputError, ValueError)):
        test_patches_with_two_sides((24, 36), (12, 6), (2, 6))
    with pytest.raises((AssertionError, InputError, ValueError)):
        test_a_convolution_with_overlap_and_padding()


def test_mutant_that_looks_for_images_among_ids_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_ids(self: packing.ImageRun) -> Any:
        ids = self.inputs.get("input_ids")
        return None if ids is None else ids == self.model.image_token_id

    monkeypatch.setattr(packing.ImageRun, "placeholders", property(of_ids))
    with pytest.raises(AssertionError):
        test_embeddings_in_place_of_ids("llava-clip-llama", "right")


def test_mutant_that_forgets_the_mask_of_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokens._text_map

    def unmasked(model: Any, tower: Any, run: Any, pictures: Any) -> Any:
        run.inputs = {name: value for name, value in run.inputs.items() if name != "attention_mask"}
        return whole(model, tower, run, pictures)

    monkeypatch.setattr(tokens, "_text_map", unmasked)
    with pytest.raises(AssertionError):
        test_embeddings_in_place_of_ids("llava-clip-llama", "right")
