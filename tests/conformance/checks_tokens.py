"""Token maps against values: a position said to be a patch carries that patch, and a pixel box holds the pixels that matter to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.conformance.cases import SHAPES
from tests.conformance.checks_model import image_token
from tests.conformance.setting import Setting, close, disturb, same


def positions_are_what_the_map_says(setting: Setting) -> None:
    """Rows, positions and kinds of every tower's map against the run: prefix kinds, padding, image and action positions."""
    model = setting.model()
    for options in _paddings(setting):
        inputs = setting.inputs(model, **options)
        maps = model.tokens(inputs)
        assert set(maps) == {*setting.case.towers, *(("projector",) if "merged" in setting.case.tags else ())}
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, ["*.hook_input", *["projector.hook_out"] * ("projector" in maps)])
        for name, tokens in maps.items():
            entering = cache["projector.hook_out" if name == "projector" else f"{name}.hook_input"]
            assert tokens.kind.shape == entering.shape[:2], (
                f"{name}: map {tokens.kind.shape}, run {tuple(entering.shape)}"
            )
            assert len(tokens.example) == entering.shape[0]
        _check_vision(setting, inputs, maps["vision"])
        if "language" in maps:
            _check_language(inputs, maps["language"], image_token(setting, model))
        elif "text" in maps and "attention_mask" in inputs:
            assert np.array_equal(maps["text"].kind == "padding", inputs["attention_mask"].numpy() == 0)
        if "action" in maps:
            assert maps["action"].kind[:, 0].tolist() == ["state"] * setting.batch
            assert set(maps["action"].kind[:, 1:].flatten()) == {"action"}


def _paddings(setting: Setting) -> list[dict[str, Any]]:
    sides = [side for side in ("left", "right") if f"padding_{side}" in setting.case.tags and setting.batch > 1]
    return [{}, *({"padding": side} for side in sides)]


def _check_vision(setting: Setting, inputs: dict[str, Any], tokens: Any) -> None:
    shape = SHAPES[setting.case.name]["vision"]
    assert not np.isin(tokens.kind[:, : shape.n_prefix], ["patch", "text", "padding"]).any()
    if shape.grid is not None:
        rows, columns = shape.grid
        expected = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
        for row in range(tokens.n_rows):
            found = np.stack([tokens.patch_row[row], tokens.patch_col[row]], axis=1)[shape.n_prefix :]
            assert np.array_equal(found, expected), "patches are numbered row by row"
    else:
        grids = inputs["spatial_shapes"] if "spatial_shapes" in inputs else inputs["image_grid_thw"][:, 1:]
        for row, (height, width) in enumerate(grids.tolist()):
            assert (tokens.kind[row] == "patch").sum() == height * width
            assert tokens.patch_row[row].max() == height - 1
            assert tokens.patch_col[row].max() == width - 1


def _check_language(inputs: dict[str, Any], tokens: Any, image_token: int | None) -> None:
    ids = inputs["input_ids"].numpy()
    mask = inputs["attention_mask"].numpy() if "attention_mask" in inputs else np.ones_like(ids)
    image = ids == image_token
    assert np.array_equal(tokens.kind == "padding", mask == 0)
    assert np.array_equal(tokens.image_number >= 0, image), "image positions are those of the image token"
    assert np.array_equal(np.isin(tokens.kind, ["patch", "newline", "cls"]), image)
    assert np.array_equal(tokens.kind == "text", (mask == 1) & ~image)
    for row in range(tokens.n_rows):
        assert tokens.last(row) == int(np.flatnonzero(mask[row])[-1])


def patch_positions_carry_their_patch(setting: Setting) -> None:
    """What enters the language tower at a position of kind patch is, bit for bit, the projector's row of that image, tile and patch."""
    if "language" not in setting.case.towers:
        return
    model = setting.model()
    if "resampled" in setting.case.tags:
        return
    counts = (1, 2) if "two_images" in setting.case.tags else (1,)
    for options in [option | {"images_per_prompt": n} for option in _paddings(setting) for n in counts]:
        inputs = setting.inputs(model, **options)
        maps = model.tokens(inputs)
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, ["projector.hook_out", "language.hook_input"])
        projected, entering = cache["projector.hook_out"], cache["language.hook_input"]
        vision, language = maps["vision"], maps["language"]
        projected = projected.reshape(vision.n_rows, -1, projected.shape[-1])
        if "merged" in setting.case.tags:
            _compare_merged(maps, projected, entering)
            continue
        rows = {
            (int(vision.example[row]), int(vision.image_number[row, -1]), int(vision.tile[row, -1])): row
            for row in range(vision.n_rows)
        }
        assert len(rows) == vision.n_rows, "two rows of the vision tower claim the same image and tile"
        for camera in (inputs["pixel_attention_mask"] == 0).nonzero().tolist() if setting.case.family == "pi0" else []:
            del rows[camera[0], camera[1], camera[1]]
        _compare_patches(setting, model, rows, projected, entering, language)


def _compare_merged(maps: Any, projected: Tensor, entering: Tensor) -> None:
    """The positions of an image in the prompt, in their order, are the real rows that leave the connector, with the same patches in them."""
    vision, language, merged = maps["vision"], maps["language"], maps["projector"]
    for row in range(vision.n_rows):
        example, image = int(vision.example[row]), int(vision.image_number[row, 0])
        places = np.flatnonzero(language.image_number[example] == image)
        real = np.flatnonzero(merged.kind[row] != "padding")
        assert len(places) == len(real) == (vision.kind[row] == "patch").sum() // 4
        for place, index in zip(places, real, strict=True):
            same(entering[example, place], projected[row, index], f"image {image} of {example}")
            assert language.patches.of(example, place) == merged.patches.of(row, index)
            assert np.array_equal(language.box[example, place], merged.box[row, index])


def _compare_patches(
    setting: Setting, model: Any, rows: dict[Any, int], projected: Tensor, entering: Tensor, language: Any
) -> None:
    n_columns = SHAPES[setting.case.name]["vision"].grid[1]  # type: ignore[index]
    kept = 0 if model.vision.n_dropped_in() else SHAPES[setting.case.name]["vision"].n_prefix
    seen: set[tuple[int, ...]] = set()
    newline = getattr(model.inner, "image_newline", None)
    for example, position in np.argwhere(language.image_number >= 0).tolist():
        kind = language.kind[example, position]
        if kind == "newline":
            same(entering[example, position], newline.detach(), "newline")
            continue
        key = (example, int(language.image_number[example, position]), int(language.tile[example, position]))
        index = 0
        if kind == "patch":
            index = (
                kept
                + int(language.patch_row[example, position]) * n_columns
                + int(language.patch_col[example, position])
            )
        close(
            entering[example, position],
            projected[rows[key], index],
            f"{language.labels(example)[position]} of {key}",
            1e-6,
        )
        assert (*key, index) not in seen, "two positions claim the same patch"
        seen.add((*key, index))
    n_rows_used = len({key[:3] for key in seen})
    assert n_rows_used >= len({key[:2] for key in rows}), "an image is missing from the prompt"


def a_box_holds_the_pixels_of_its_patch(setting: Setting) -> None:
    """Changing only the pixels inside a patch's box changes only that patch of hook_embed, in its own row."""
    model = setting.model()
    inputs = setting.inputs(model, batch=min(2, setting.batch))
    if "spatial_shapes" in inputs or (inputs["pixel_values"].ndim == 5 and "tiles" in setting.case.tags):
        return
    pixels = inputs["pixel_values"]
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    tokens = model.tokens(inputs)["vision"]
    n_prefix = SHAPES[setting.case.name]["vision"].n_prefix
    with torch.no_grad():
        _, clean = model.run_with_cache(inputs, "vision.hook_embed")
        for position in tokens.positions("patch", row=flat.shape[0] - 1):
            left, top, right, bottom = (round(edge) for edge in tokens.box[-1, position].tolist())
            assert 0 <= left < right <= flat.shape[-1]
            assert 0 <= top < bottom <= flat.shape[-2]
            changed = flat.clone()
            changed[-1, :, top:bottom, left:right] += torch.randn_like(changed[-1, :, top:bottom, left:right])
            edited = {**inputs, "pixel_values": changed.reshape(pixels.shape)}
            _, cache = model.run_with_cache(edited, "vision.hook_embed")
            moved = (cache["vision.hook_embed"] != clean["vision.hook_embed"]).any(-1)
            offset = moved.shape[1] - tokens.n_positions
            expected = torch.zeros_like(moved)
            expected[-1, position + offset] = True
            assert torch.equal(moved, expected), f"box of position {position} moves {moved.nonzero().tolist()}"
            assert offset in (0, -n_prefix)


def tiles_cover_the_image(setting: Setting) -> None:
    """Boxes of a tiled image: inside every tile row by row, the whole image in tile 0, and patches of the prompt inside the image."""
    if "tiles" not in setting.case.tags:
        return
    model = setting.model()
    inputs = setting.inputs(model)
    maps = model.tokens(inputs)
    for example, (height, width) in enumerate(inputs["image_sizes"].tolist()):
        rows = [row for row in range(maps["vision"].n_rows) if maps["vision"].example[row] == example]
        boxes = maps["vision"].box[rows[0]]
        boxes = boxes[~np.isnan(boxes[:, 0])]
        assert np.allclose([boxes[:, 0].min(), boxes[:, 1].min()], 0)
        assert np.allclose([boxes[:, 2].max(), boxes[:, 3].max()], [width, height])
        tiled = np.concatenate([maps["vision"].box[row] for row in rows[1:]])
        tiled = tiled[~np.isnan(tiled[:, 0])]
        assert tiled[:, 0].min() <= 1e-6
        assert tiled[:, 2].max() >= width - 1e-6
        assert tiled[:, 1].min() <= 1e-6
        assert tiled[:, 3].max() >= height - 1e-6
        if "resampled" in setting.case.tags:
            continue
        language = maps["language"]
        used = language.box[example][(language.kind[example] == "patch") & (language.tile[example] > 0)]
        centres = (used[:, :2] + used[:, 2:]) / 2
        size = used[0, 2:] - used[0, :2]
        assert (centres > -size).all()
        assert (centres < np.array([width, height]) + size).all()
        order = np.lexsort((used[:, 0].round(6), used[:, 1].round(6)))
        assert np.array_equal(order, np.arange(len(order))), "tiled patches enter the prompt row by row of the image"


def edits_of_padding_change_no_real_position(setting: Setting) -> None:
    """With left and right padding, edits at padding positions leave the output of real positions as it was."""
    if "language" not in setting.case.towers or setting.case.family == "pi0":
        return
    model = setting.model()
    for side in ("left", "right"):
        inputs = setting.inputs(model, batch=3, padding=side)
        padding = inputs["attention_mask"] == 0
        assert padding.any()
        for site in ("hook_resid_pre", "attn.hook_v", "attn.hook_k", "hook_mlp_out"):
            name = f"language.blocks.0.{site}"

            def at_padding(value: Tensor, padding: Tensor = padding) -> Tensor:
                return padding.view(*padding.shape, *[1] * (value.ndim - 2)).expand_as(value)

            with torch.no_grad():
                clean = model(inputs)
                out = model.run_with_hooks(inputs, [(name, disturb(where=at_padding))])
            same(out[~padding], clean[~padding], f"{name} edited at {side} padding")
