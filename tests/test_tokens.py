"""Token maps through the front door: real processors, words, boxes; the maps' values are checked in tests/conformance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.model.tokens import KINDS
from tests.conformance import checks_tokens
from tests.conformance.setting import Setting
from tests.zoo import CASES, Case, parametrize, shared_model


def wrapped(case: Case) -> cv.HookedModel:
    return cv.HookedModel(shared_model(case.name), case.processor() if case.processor else None)


def raw_inputs(case: Case, model: cv.HookedModel, batch: int = 2) -> dict[str, Any]:
    """Inputs made by `model.inputs` from pictures and sentences."""
    assert case.raw is not None
    raw = case.raw(batch=batch)
    if case.family == "pi0":
        state = model.processor(**raw, return_tensors="pt")["state"]
        return model.inputs(images=raw["images"], text=raw["text"], state=state)
    options = {name: value for name, value in raw.items() if name not in ("images", "text")}
    return model.inputs(images=raw["images"], text=raw.get("text"), **options)


@parametrize()
def test_maps_of_what_the_processor_made(case: Case) -> None:
    """Every tower of a run from raw pictures and text has a map of the run's own size, with kinds from the list."""
    if case.processor is None:
        pytest.skip("no processor can say an image token outside the vocabulary")
    model = wrapped(case)
    inputs = raw_inputs(case, model)
    maps = model.tokens(inputs)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, "*.hook_input")
    assert out.isfinite().all()
    assert set(maps) == set(case.towers)
    for name, tokens in maps.items():
        assert tokens.kind.shape == cache[f"{name}.hook_input"].shape[:2]
        assert set(np.unique(tokens.kind)) <= set(KINDS)
        assert len(tokens.labels(0)) == tokens.n_positions
        assert name in repr(tokens)
        assert "TokenMap" in tokens._repr_html_()


@parametrize("generates")
def test_words_are_found_at_their_position(case: Case) -> None:
    model = wrapped(case)
    inputs = raw_inputs(case, model)
    tokens = model.tokens(inputs)["language"]
    pieces = model.to_str_tokens(inputs)
    for row in range(tokens.n_rows):
        for word in ("circle", "square", "shape", "color"):
            expected = [p for p, piece in enumerate(pieces[row]) if piece.strip("▁Ġ ") == word]
            assert tokens.find(word, row=row) == expected
            for position in expected:
                assert int(inputs["input_ids"][row, position]) == model.token(word)
                assert tokens.kind[row, position] == "text"
        assert any(tokens.find(word, row=row) for word in ("circle", "square", "shape"))
        image = inputs["input_ids"][row] == model.image_token_id
        assert (
            tokens.positions("text", row=row)
            == ((inputs["attention_mask"][row] == 1) & ~image).nonzero().flatten().tolist()
        )


@parametrize("two_images", "generates", without=("resampled",))
def test_two_images_of_one_prompt_are_told_apart(case: Case) -> None:
    """Positions of image 1 change with image 1's pixels, those of image 0 do not; in every row, in prompt order."""
    model = cv.HookedModel(shared_model(case.name))
    inputs = case.inputs(model.module, batch=2, images_per_prompt=2)
    tokens, vision = model.tokens(inputs)["language"], model.tokens(inputs)["vision"]
    assert sorted(set(vision.example.tolist())) == [0, 1]
    for image in (0, 1):
        pixels = inputs["pixel_values"].clone()
        pixels[2 + image] = pixels[2 + image].flip(-1) * 0.7 + 0.1 * (pixels[2 + image] != 0)
        with torch.no_grad():
            _, one = model.run_with_cache(inputs, "language.hook_input")
            _, two = model.run_with_cache({**inputs, "pixel_values": pixels}, "language.hook_input")
        moved = (one["language.hook_input"] != two["language.hook_input"]).any(-1)
        expected = tokens.mask(["patch", "cls"], image=image)
        expected[0] = False
        assert torch.equal(moved, expected), f"image {image} of example 1"
        assert expected.any()


@pytest.mark.parametrize("size", [(8, 12), (16, 24), (24, 8)])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "siglip"])
def test_other_image_sizes_have_other_grids(name: str, size: tuple[int, int]) -> None:
    case = CASES[name]
    model = cv.HookedModel(shared_model(name))
    patch = model.vision.cfg.patch_size
    size = (size[0] // 4 * patch, size[1] // 4 * patch)
    inputs = case.inputs(model.module, batch=2, image_size=size)
    tokens = model.tokens(inputs)["vision"]
    patches = tokens.positions("patch", row=1)
    assert len(patches) == (size[0] // patch) * (size[1] // patch)
    assert tokens.patch_row[1, patches[-1]] == size[0] // patch - 1
    assert tokens.patch_col[1, patches[-1]] == size[1] // patch - 1
    assert tokens.box[1, patches[-1]].tolist() == [size[1] - patch, size[0] - patch, size[1], size[0]]
    with torch.no_grad():
        clean = model.run_with_cache(inputs, "vision.hook_embed")[1]["vision.hook_embed"]
        pixels = inputs["pixel_values"].clone()
        pixels[1, :, :patch, -patch:] += 1.0
        moved = (
            model.run_with_cache({**inputs, "pixel_values": pixels}, "vision.hook_embed")[1]["vision.hook_embed"]
            != clean
        )
    corner = tokens.in_box(size[1] - patch, 0, size[1], patch, row=1)
    assert len(corner) == 1
    hit = moved[1].any(-1).nonzero().flatten().tolist()
    assert [position + tokens.n_positions - moved.shape[1] for position in hit] == corner
    assert not moved[0].any()


def test_in_box_selects_overlapping_patches_of_one_image() -> None:
    case = CASES["llava-clip-llama"]
    model = cv.HookedModel(shared_model(case.name))
    inputs = case.inputs(model.module, batch=1, images_per_prompt=2)
    tokens = model.tokens(inputs)["language"]
    everywhere = tokens.in_box(0, 0, 12, 12)
    assert everywhere == tokens.positions("patch")
    assert tokens.in_box(0, 0, 12, 12, image=1) == tokens.positions("patch", image=1)
    top_left = tokens.in_box(0, 0, 4, 4, image=0)
    assert top_left == [tokens.positions("patch", image=0)[0]]
    assert len(tokens.in_box(3, 3, 5, 5, image=0)) == 4
    assert tokens.in_box(12, 0, 20, 4) == []
    assert tokens.labels()[top_left[0]] == "r0c0"
    with pytest.raises(InputError, match="patch"):
        tokens.positions("pathc")


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_is_the_last_real_position(side: str) -> None:
    for case in (CASES["llava-clip-llama"], CASES["paligemma"]):
        model = cv.HookedModel(shared_model(case.name))
        inputs = case.inputs(model.module, batch=3, padding=side)
        tokens = model.tokens(inputs)["language"]
        expected = [int(row.nonzero()[-1]) for row in inputs["attention_mask"]]
        assert tokens.last() == expected
        assert [tokens.last(row) for row in range(3)] == expected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llava-next-mistral", "llava-onevision", "paligemma", "pi0", "llava-clip-llama-full"])
def test_patch_positions_receive_the_projected_patch(name: str, batch: int) -> None:
    checks_tokens.patch_positions_carry_their_patch(Setting(CASES[name], batch=batch))


def test_tiled_and_newline_positions_of_llava_next() -> None:
    """A wide image: its unpadded rows each end in a newline, tiles lie side by side, and boxes are in its own pixels."""
    case = CASES["llava-next-llama"]
    model = cv.HookedModel(shared_model(case.name))
    inputs = case.inputs(model.module, batch=1, image_size=(12, 24))
    tokens = model.tokens(inputs)["language"]
    newlines = tokens.positions("newline")
    thumbnail, tiled = (
        tokens.positions("patch", tile=0),
        [p for p in tokens.positions("patch") if tokens.tile[0, p] > 0],
    )
    assert len(thumbnail) == 9
    assert len(newlines) == 3
    assert len(tiled) == 3 * 6
    rows = [tiled[6 * row : 6 * row + 6] for row in range(3)]
    for row, positions in enumerate(rows):
        assert positions[-1] + 1 == newlines[row]
        assert tokens.tile[0, positions].tolist() == [1, 1, 1, 2, 2, 2]
        lefts = tokens.box[0, positions, 0]
        assert np.allclose(lefts, [0, 4, 8, 12, 16, 20])
        assert np.allclose(tokens.box[0, positions, 1], 4 * row)
