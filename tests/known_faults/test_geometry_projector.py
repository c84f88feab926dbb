"""The projector test: one projected patch is moved by a plain hook, and the prompt positions that move are the token map's sets, with their weights.

For every vision-language and action model of the zoo, every way of packing tiles, one and several images in a prompt, and settings given with the
call.
The bare model is run up to its language tower, in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.model import packing
from circuitvision.model.packing import any_resolution
from circuitvision.model.tokens import PatchSets
from tests.zoo import CASES, case, shared_model
from tests.zoo.llava import SIGLIP_TOWER, build_config, qwen2
from tests.zoo.text import IMAGE, UNKNOWN
from tests.zoo.weights import generator_for

from .test_geometry_paint import ODD_VLM, SIZES, made, odd_vlm, picture

READERS = [name for name in CASES if "language" in case(name).towers]
TILED = ["llava-next-mistral", "llava-next-llama", "llava-onevision", "llava-onevision-resampled"]


class _Entered(Exception):
    """Ends a forward pass where the language tower begins; carries what enters it."""


def entering(
    model: cv.HookedModel, inputs: dict[str, Any], row: int | None = None, feature: int = 0
) -> tuple[torch.Tensor, torch.Size]:
    """What enters the language tower `[row pos width]` when one feature of the projector's output is moved by 1, and the projector's shape."""
    module = model.module
    projector = next(part for name, part in module.named_modules() if name.endswith("projector"))
    language: Any = model.language.root
    shape: list[torch.Size] = []

    def move(mod: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        shape.append(out.shape)
        moved = out.clone()
        if row is not None:
            moved[row, feature] += 1.0
        return moved

    def stop(mod: Any, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Entered(kwargs["inputs_embeds"])

    handles = [projector.register_forward_hook(move), language.register_forward_pre_hook(stop, with_kwargs=True)]
    try:
        with torch.no_grad():
            module(**inputs)
    except _Entered as entered:
        return entered.args[0], shape[0]
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError("the language tower was not run")


def measured(model: cv.HookedModel, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The weight of every projected feature in every prompt position, `[row pos vision_row feature]`, and which positions are no patch's."""
    clean, shape = entering(model, inputs)
    weights = np.zeros((*clean.shape[:2], *shape[:2]))
    for row in range(shape[0]):
        for feature in range(shape[1]):
            moved, _ = entering(model, inputs, row, feature)
            weights[:, :, row, feature] = (moved - clean).mean(-1)
    # Some families scale what they read by a constant.
    largest = weights.max()
    unit = model.family.name in ("paligemma", "pi0")
    return weights / largest if unit else weights, clean.numpy()


def check(model: cv.HookedModel, inputs: dict[str, Any]) -> cv.TokenMap:
    """The token map's sets are what the model does; returns the map."""
    weights, _ = measured(model, inputs)
    tokens, vision = model.tokens(inputs)["language"], model.tokens(inputs)["vision"]
    prefix, dropped = model.vision.cfg.n_prefix, vision.n_positions - weights.shape[-1]
    claimed = np.zeros_like(weights)
    sets = tokens.patches
    claimed[sets.row, sets.position, sets.source_row, sets.source_position - dropped] = sets.weight
    of_prefix = max(prefix - dropped, 0)
    assert np.abs(weights[..., of_prefix:] - claimed[..., of_prefix:]).max() < 1e-7
    holds_prefix = (weights[..., :of_prefix] > 0.5).any((-1, -2))
    assert np.array_equal(np.isin(tokens.kind, vision.kind[0, :prefix]), holds_prefix)
    patches = claimed.reshape(*claimed.shape[:2], -1)
    assert np.array_equal(tokens.kind == "patch", (patches > 0).any(-1))
    absent = vision.kind == "dropped"
    assert not (weights > 0)[..., absent[:, dropped:]].any()
    for row, position in np.argwhere(tokens.kind == "patch"):
        held = tokens.patches.of(row, position)
        assert abs(sum(weight for *_, weight in held) - 1) < 1e-9
        source, down, across, _ = held[0]
        assert tokens.image_number[row, position] == vision.image_number[source, -1 if prefix == 0 else prefix]
        if len(held) == 1:
            assert (tokens.patch_row[row, position], tokens.patch_col[row, position]) == (down, across)
            assert np.array_equal(
                tokens.box[row, position],
                vision.box[
                    source, vision.positions("patch", row=source)[0] + down * len_columns(vision, source) + across
                ],
                equal_nan=True,
            )
        else:
            assert tokens.patch_row[row, position] == tokens.patch_col[row, position] == -1
    return tokens


def len_columns(vision: cv.TokenMap, row: int) -> int:
    return int(vision.patch_col[row].max()) + 1


def wide(name: str, **config: Any) -> cv.HookedModel:
    module = copy.deepcopy(shared_model(name)).double()
    for key, value in config.items():
        setattr(module.config, key, value)
    return cv.HookedModel(module)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", READERS)
def test_positions_hold_the_patches_that_move_them(name: str, count: int) -> None:
    """Two prompts of different lengths, padded; PI0's second one lacks a camera."""
    model = wide(name)
    inputs = case(name).inputs(model.module, batch=2, padding="right", images_per_prompt=count, dtype=torch.float64)
    tokens = check(model, inputs)
    assert (tokens.kind == "newline").any() == ("newline" in case(name).tags)


def test_any_camera_may_be_absent() -> None:
    """The prompt holds the tokens of the cameras that are there, in their order, whichever are missing."""
    model = wide("pi0")
    inputs = case("pi0").inputs(model.module, batch=2, padding="right", images_per_prompt=2, dtype=torch.float64)
    inputs["pixel_attention_mask"] = torch.tensor([[True, True], [False, True]])
    tokens = check(model, inputs)
    assert set(tokens.image_number[1][tokens.kind[1] == "patch"]) == {1}


@pytest.mark.parametrize("size", [(13, 24), (45, 90), (90, 31), (20, 21)])
@pytest.mark.parametrize("aspect", ["anyres_max_1", "anyres_max_2", "anyres_max_9"])
def test_every_way_of_packing_tiles(aspect: str, size: tuple[int, int]) -> None:
    model = wide("llava-onevision", vision_aspect_ratio=aspect)
    inputs = onevision_inputs(model, [[size]])
    tokens = check(model, inputs)
    mixed = (tokens.kind == "patch") & (tokens.patch_row < 0)
    assert mixed.any() == (aspect == "anyres_max_1" or (aspect == "anyres_max_2" and size == (20, 21)))


@pytest.mark.parametrize("size", [(45, 90), (90, 31), (20, 21)])
@pytest.mark.parametrize("name", ["llava-next-mistral", "llava-next-llama"])
def test_unpadded_tiles(name: str, size: tuple[int, int]) -> None:
    model = wide(name)
    check(model, case(name).inputs(model.module, batch=1, image_size=size, dtype=torch.float64))


def onevision_inputs(model: cv.HookedModel, prompts: list[list[tuple[int, int]]], **more: Any) -> dict[str, Any]:
    """Inputs by hand: one list of picture sizes per prompt; a picture alone in its prompt is cut into tiles."""
    from tests.zoo.anyres import tile_grid

    side = model.config.vision_config.image_size
    sizes = [size for prompt in prompts for size in prompt]
    tiles = [
        1 + int(np.prod(tile_grid(model.config, prompt[0]))) if len(prompt) == 1 else 1
        for prompt in prompts
        for _ in prompt
    ]
    pixels = torch.randn(
        len(sizes), max(tiles), 3, side, side, generator=generator_for("projector"), dtype=torch.float64
    )
    inputs = {
        "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.tensor([len(prompt) for prompt in prompts]),
        **more,
    }
    options = {"vision_aspect_ratio": more["vision_aspect_ratio"]} if "vision_aspect_ratio" in more else {}
    with torch.no_grad():
        made = model.module.model.get_image_features(
            pixels, inputs["image_sizes"], batch_num_images=inputs["batch_num_images"], **options
        )
    lengths = iter([len(one) for one in made.pooler_output])
    rows = [[1] + [token for _ in prompt for token in [IMAGE] * next(lengths) + [9]] for prompt in prompts]
    width = max(map(len, rows))
    inputs["input_ids"] = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    inputs["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return inputs


def test_one_prompt_with_one_image_and_one_with_several() -> None:
    """Alone, a picture is tiled; among others it is padded to a square and left whole."""
    model = wide("llava-onevision-resampled")
    inputs = onevision_inputs(model, [[(22, 45)], [(13, 24), (30, 11)]])
    tokens = check(model, inputs)
    vision = model.tokens(inputs)["vision"]
    assert vision.example.tolist()[-2:] == [1, 1]
    assert vision.image_number[-2:, 0].tolist() == [0, 1]
    # The picture of 13 x 24 lies in rows 5 to 17 of a square of 24: its first patch row reads three rows of it.
    assert np.allclose(vision.box[-2, 0], [0, 0, 8, 3])
    assert tokens.mask("newline", image=1, row=1).sum() == 1


def test_settings_given_with_the_call_pack_the_prompt() -> None:
    """Whether the class position is kept is read from the call before the config."""
    model = wide("llava-clip-llama")
    inputs = case("llava-clip-llama").inputs(model.module, batch=2, dtype=torch.float64)
    at = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    longer = {
        name: torch.cat([inputs[name][:, :at], inputs[name][:, at : at + 1], inputs[name][:, at:]], dim=1)
        for name in ("input_ids", "attention_mask")
    }
    full = {**inputs, **longer, "vision_feature_select_strategy": "full"}
    tokens = check(model, full)
    assert tokens.kind[0, at] == "cls"
    assert model(full).isfinite().all()


def test_an_aspect_ratio_given_with_the_call_is_used_or_refused() -> None:
    """As the model's own forward does: some versions forget it, and pack as the config says."""
    model = wide("llava-onevision")
    inputs = onevision_inputs(model, [[(45, 90)]])
    check(model, {**inputs, "vision_aspect_ratio": "anyres_max_9"})
    other = {**inputs, "vision_aspect_ratio": "anyres_max_1"}
    try:
        with torch.no_grad():
            model.module(**other)
    except ValueError:  # Used: these prompts hold the image tokens of another ratio.
        other = onevision_inputs(model, [[(45, 90)]], vision_aspect_ratio="anyres_max_1")
        assert (check(model, other).patch_row < 0).any()
    else:
        with pytest.raises(InputError, match=r"model.config.vision_aspect_ratio = 'anyres_max_1'"):
            model(other)


def test_selections_hold_every_position_that_mixes_a_patch_of_the_box() -> None:
    model = wide("llava-onevision-resampled")
    inputs = onevision_inputs(model, [[(30, 30)]])
    weights, _ = measured(model, inputs)
    tokens, vision = model.tokens(inputs)["language"], model.tokens(inputs)["vision"]
    box = (7.0, 2.0, 12.0, 14.0)
    with np.errstate(invalid="ignore"):
        hit = (
            (vision.box[..., 0] < box[2])
            & (vision.box[..., 2] > box[0])
            & (vision.box[..., 1] < box[3])
            & (vision.box[..., 3] > box[1])
        )
    expected = (weights[0][:, hit] > 1e-9).any(-1)
    assert np.array_equal(tokens.image(0).box(*box).mask[0], expected)
    assert tokens.in_box(*box) == np.flatnonzero(expected).tolist()
    of_row = (weights[0][:, vision.patch_row == 1] > 1e-9).any(-1)
    assert np.array_equal(tokens.image(0).patch(row=1).mask[0], of_row)
    one = (weights[0][:, (vision.patch_row == 1) & (vision.patch_col == 2)] > 1e-9).any(-1)
    assert np.array_equal(tokens.select("patch").patch(1, 2).mask[0], one)


@pytest.mark.parametrize("size", [(1500, 2000), (900, 1200), (1080, 1920)])
def test_large_photos_at_the_real_geometry(size: tuple[int, int]) -> None:
    """384 pixels in patches of 14, up to 36 tiles interpolated to 9: the weights give what the packing function gives for random features."""
    pins = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    tower = SIGLIP_TOWER | {
        "image_size": 384,
        "patch_size": 14,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }
    config = build_config(
        "llava_onevision", vision_config=tower, text_config=qwen2(), image_token_index=IMAGE, image_grid_pinpoints=pins,
        vision_feature_layer=-1, vision_feature_select_strategy="full", video_token_index=UNKNOWN, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    import transformers

    module = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    sizes = torch.tensor([size])
    tiles = transformers.models.llava_onevision.modeling_llava_onevision.image_size_to_num_patches(sizes[0], pins, 384)
    features = torch.randn(tiles, 729, 3, generator=generator_for("photo"), dtype=torch.float64)
    (packed,), _ = module.model.pack_image_features(
        [features], sizes, torch.zeros(3, dtype=torch.float64), "anyres_max_9"
    )
    model = cv.HookedModel(module)
    ids = torch.tensor([[1] + [IMAGE] * len(packed)])
    tokens = model.tokens({"pixel_values": torch.zeros(1, tiles, 3, 384, 384), "image_sizes": sizes, "input_ids": ids})[
        "language"
    ]
    sets = tokens.patches
    found = torch.zeros(len(packed), 3, dtype=torch.float64)
    held = features[sets.source_row, sets.source_position] * torch.from_numpy(sets.weight)[:, None]
    found.index_add_(0, torch.from_numpy(sets.position - 1), held)
    assert torch.allclose(found, packed, atol=1e-9)
    # Along a row of the packed grid boxes go from left to right and keep their height, inside the picture.
    row = np.flatnonzero(tokens.kind[0] == "newline")[:2]
    boxes = tokens.box[0, row[0] + 1 : row[1]]
    assert (np.diff(boxes[:, 0]) > 0).all()
    assert np.ptp(boxes[:, 1]) == 0
    assert np.nanmin(tokens.box) >= 0
    assert np.nanmax(tokens.box[..., 2]) <= size[1]
    assert np.nanmax(tokens.box[..., 3]) <= size[0]


def test_a_mixed_position_holds_its_patches_and_no_others() -> None:
    """Twice as many patches along each side as the packed grid has: every position is the mean of 2 x 2, and its box theirs."""
    model = odd_vlm(ODD_VLM[2])
    _, _, inputs = made(model, [picture(SIZES[0])], False)
    tokens = model.tokens(inputs)["language"]
    for row, position in np.argwhere((tokens.kind == "patch") & (tokens.patch_row < 0)):
        of = (tokens.patches.row == row) & (tokens.patches.position == position)
        corners = tokens.patches.box[of]
        assert np.allclose(tokens.box[row, position], [*np.nanmin(corners[:, :2], 0), *np.nanmax(corners[:, 2:], 0)])
    assert "[patches]" in tokens.labels()


def test_what_cannot_be_packed_is_refused() -> None:
    """Class positions among tiles, tiles that are missing, and image tokens in another prompt than their image."""
    model = wide("llava-next-llama")
    inputs = case("llava-next-llama").inputs(model.module, batch=1, dtype=torch.float64)
    with pytest.raises(InputError, match="'full' keeps 10 features of a tile of 9 patches"):
        model({**inputs, "vision_feature_select_strategy": "full"})
    with pytest.raises(InputError, match="image_sizes say that the images take"):
        model({**inputs, "pixel_values": inputs["pixel_values"][:, :-1]})
    with pytest.raises(InputError, match="image_sizes"):
        model({name: value for name, value in inputs.items() if name != "image_sizes"})
    model = wide("llava-clip-llama")
    inputs = case("llava-clip-llama").inputs(model.module, batch=2, dtype=torch.float64)
    ids = inputs["input_ids"].clone()
    free = (ids[1] != IMAGE).nonzero().flatten()[-1]
    ids[1, free], ids[0, (ids[0] == IMAGE).nonzero()[0]] = IMAGE, 9
    with pytest.raises(InputError, match="by prompt"):
        model({**inputs, "input_ids": ids})


def rounded(self: Any, run: Any) -> list[packing.ImageTokens]:
    """Patch numbers pushed through the packing function, and rounded."""
    out = []
    for image, (tiles, first) in enumerate(zip(run.tiles, run.firsts, strict=True)):
        one = any_resolution._OneImage(run, image)
        numbers = self._packed(
            one, lambda t, f: torch.arange(t * f).view(t, f, 1), torch.full((1,), -1.0, dtype=torch.float64)
        )[0][:, 0]
        newline = (numbers < 0).numpy()
        source = numbers.round().long().numpy()[~newline]
        per = run.n_features(first) - run.n_dropped
        out.append(
            packing.ImageTokens(
                newline,
                np.flatnonzero(~newline),
                source // per + first,
                source % per + run.n_dropped,
                np.ones(len(source)),
            )
        )
    return out


def test_mutant_that_rounds_interpolated_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.AnyRes, "tokens", rounded)
    with pytest.raises(AssertionError):
        test_every_way_of_packing_tiles("anyres_max_1", (45, 90))
    test_every_way_of_packing_tiles("anyres_max_9", (13, 24))


def test_mutant_that_finds_every_camera_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.Cameras, "present", lambda self, run: [True] * len(run.tiles))
    with pytest.raises((AssertionError, InputError)):
        test_any_camera_may_be_absent()


def test_mutant_that_reads_the_config_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.run, "setting", lambda model, inputs, name: getattr(model.config, name))
    with pytest.raises((AssertionError, InputError)):
        test_settings_given_with_the_call_pack_the_prompt()


def test_mutant_that_swaps_rows_and_columns_of_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PatchSets.joined.__func__  # type: ignore[attr-defined]

    def swapped(cls: Any, parts: Any) -> PatchSets:
        # Rows of the vision tower hold their own patches; what prompts hold is copied from there.
        return whole(cls, [(*part[:4], part[5], part[4], *part[6:]) if part[0] is part[2] else part for part in parts])

    monkeypatch.setattr(PatchSets, "joined", classmethod(swapped))
    with pytest.raises(AssertionError):
        test_selections_hold_every_position_that_mixes_a_patch_of_the_box()


def test_the_weights_are_found_where_rows_and_columns_do_not_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packing function that mixes patches in no orderly way is measured patch by patch."""
    model = wide("llava-onevision")
    shuffle = torch.randn(9, 9, generator=generator_for("shuffle"), dtype=torch.float64).abs()
    shuffle = shuffle / shuffle.sum(1, keepdim=True)
    plain = type(model.module.model).pack_image_features

    def mixed(self: Any, features: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, [torch.einsum("ij,tjd->tid", shuffle.to(one), one) for one in features], *args, **kwargs)

    monkeypatch.setattr(type(model.module.model), "pack_image_features", mixed)
    check(model, onevision_inputs(model, [[(13, 24)]]))


def test_an_absent_camera_is_no_image_of_its_example() -> None:
    """Its rows of the vision tower are of the kind "dropped", and no selection takes them."""
    model = wide("pi0")
    inputs = case("pi0").inputs(model.module, batch=2, padding="right", images_per_prompt=2, dtype=torch.float64)
    vision = model.tokens(inputs)["vision"]
    assert vision.kind[3].tolist() == ["dropped"] * 9
    assert not (vision.kind[:3] == "dropped").any()
    assert not vision.image(1).mask[3].any()
    assert vision.image(1).mask[1].all()
    assert not vision.select().mask[3].any()
    assert not (~vision.image(0)).mask[3].any()
    assert vision.in_box(0, 0, 12, 12, row=3) == []
