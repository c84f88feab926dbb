"""The paint test: pixels of the original picture are changed, and the patch embeddings that move are those whose boxes hold them.

The pictures go through the real processor of every model of the zoo (and of some odd ones), with nearest-neighbour resampling, so that a tensor's
pixel reads one pixel of the picture and the answer is exact. What moves is read by a plain hook on the embedding module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

import circuitvision as cv
from circuitvision.model import packing, patches
from circuitvision.model.picture_boxes import boxes_in_pictures
from tests.zoo import CASES, case, shared_model
from tests.zoo.llava import SIGLIP_TOWER, build_config, llama, qwen2
from tests.zoo.text import IMAGE, UNKNOWN, tokenizer
from tests.zoo.vision import exact_size, siglip_image_processor
from tests.zoo.weights import randomise

SIZES = [(37, 53), (61, 40)]
"""(height, width) of the pictures; no multiple of any patch, and not square."""


class _Seen(Exception):
    """Ends a forward pass where the patch embeddings are known."""


def picture(size: tuple[int, int]) -> np.ndarray:
    """A dark picture with a little texture, ``[height width 3]``."""
    return np.random.default_rng(size[0]).integers(40, 60, (*size, 3), dtype=np.uint8)


def odd(name: str) -> cv.HookedModel:
    """A tower whose picture is no whole number of patches, with its processor."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 12,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    if name == "vit, 25x31 in patches of 6x4":
        config = tf.ViTConfig(**sizes, image_size=(25, 31), patch_size=(6, 4))
        module, images = tf.ViTModel(config), tf.ViTImageProcessor(size=exact_size(25, 31))
    elif name == "siglip, 23 in patches of 6":
        config = tf.SiglipVisionConfig(**sizes, image_size=23, patch_size=6, vision_use_head=False)
        module, images = tf.SiglipVisionModel(config), siglip_image_processor(23)
    elif name == "clip, cropped to 22 in patches of 5":
        config = tf.CLIPVisionConfig(**sizes, image_size=22, patch_size=5)
        images = tf.CLIPImageProcessor(size={"shortest_edge": 26}, crop_size=exact_size(22, 22))
        module = tf.CLIPVisionModel(config)
    elif name == "dinov2, any size":
        module = tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=20, patch_size=5))
        images = tf.BitImageProcessor(size={"shortest_edge": 41}, do_center_crop=False)
    elif name == "siglip2, patches of 3":
        module = tf.Siglip2VisionModel(tf.Siglip2VisionConfig(**sizes, patch_size=3, num_patches=16))
        images = tf.Siglip2ImageProcessor(patch_size=3, max_num_patches=40)
    else:
        raise KeyError(name)
    return cv.HookedModel(randomise(module, name), images)


def odd_vlm(name: str) -> cv.HookedModel:
    """A model with an unusual way from picture to tensor: padded to a square, scaled inside a frame, or tiles of 23 pixels in patches of 6."""
    tower = SIGLIP_TOWER | {"image_size": 23, "patch_size": 6}
    grid = (tower["image_size"] // tower["patch_size"]) ** 2
    if name.startswith("llava"):
        config = build_config(
            "llava", vision_config=tower, text_config=llama(), image_token_id=IMAGE, vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )  # fmt: skip
        images: Any = tf.LlavaImageProcessor(do_pad=True, size={"shortest_edge": 23}, crop_size=exact_size(23, 23))
        if "framed" in name:
            images = siglip_image_processor(23)
            images.size, images.do_pad, images.pad_size = {"max_height": 23, "max_width": 23}, True, exact_size(23, 23)
        processor = tf.LlavaProcessor(
            image_processor=images, tokenizer=tokenizer("bos"), patch_size=6, vision_feature_select_strategy="full"
        )
        return cv.HookedModel(randomise(tf.LlavaForConditionalGeneration(config), name), processor)
    from tests.zoo.anyres import _images_only, pinpoints

    config = build_config(
        "llava_onevision", vision_config=tower, text_config=qwen2(), image_token_index=IMAGE, image_grid_pinpoints=pinpoints(23),
        vision_feature_layer=-1, vision_feature_select_strategy="full", video_token_index=UNKNOWN, vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    images = tf.LlavaOnevisionImageProcessor(size=exact_size(23, 23), image_grid_pinpoints=pinpoints(23))
    processor = _images_only(tf.LlavaOnevisionProcessor)(
        image_processor=images, tokenizer=tokenizer("plain"), num_image_tokens=grid, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return cv.HookedModel(randomise(tf.LlavaOnevisionForConditionalGeneration(config), name), processor)


ODD = [
    "vit, 25x31 in patches of 6x4",
    "siglip, 23 in patches of 6",
    "clip, cropped to 22 in patches of 5",
    "dinov2, any size",
    "siglip2, patches of 3",
]
ODD_VLM = ["llava, padded to a square", "llava, framed", "onevision, 23 in patches of 6"]


def zoo_model(name: str) -> cv.HookedModel:
    found = CASES["pi0"] if case(name).processor is None else case(name)
    assert found.processor is not None
    return cv.HookedModel(shared_model(name), found.processor())


def nearest(model: cv.HookedModel) -> cv.HookedModel:
    """The model with a processor that reads one pixel of the picture per pixel of the tensor."""
    images = getattr(model.processor, "image_processor", model.processor)
    images.resample = Image.Resampling.NEAREST
    return model


def made(
    model: cv.HookedModel, pictures: list[np.ndarray], together: bool
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The pictures as `model.inputs` takes them (one per example, or all in one prompt), its other arguments, and what it made."""
    text, images = None, list(pictures)
    token = model.image_token or ""
    if "text" in model.towers:
        text = ["a red circle", "the blue square"][: len(images)]
    elif "language" in model.towers:
        text = [token * len(images) + "what ?"] if together else [token + "what ?" for _ in images]
        images = [images] if together else [[one] for one in images]
        if model.family.name in ("llava", "llava_next"):
            images = [image for row in images for image in row]
    options: dict[str, Any] = {}
    if "action" in model.towers:
        text = [one.replace(token, "") for one in text or []]
        options["state"] = torch.zeros(len(text), model.config.max_state_dim)
    return images, options, model.inputs(images=images, text=text, **options)


def embeddings(model: cv.HookedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """What a plain hook sees leave the patch embedding of the bare module: `[row patch width]`."""
    root: Any = model.vision.root
    found = root.embeddings
    module = next(part for name, part in found.named_children() if name.startswith("patch_embedding"))
    kept: list[torch.Tensor] = []

    def stop(mod: Any, args: Any, out: torch.Tensor) -> None:
        kept.append(out.detach().clone())
        raise _Seen

    handle = module.register_forward_hook(stop)
    try:
        with torch.no_grad():
            model.module(**inputs)
    except _Seen:
        pass
    finally:
        handle.remove()
    value = kept[0].flatten(2).transpose(1, 2) if kept[0].ndim == 4 else kept[0]
    return value


def painted(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where[..., None], 255 - image, image)


def inside(size: tuple[int, int], box: Any) -> np.ndarray:
    """The pixels of a picture whose squares overlap a box."""
    left, top, right, bottom = box
    down, across = np.arange(size[0])[:, None], np.arange(size[1])[None]
    return (down + 1 > top + 1e-9) & (down < bottom - 1e-9) & (across + 1 > left + 1e-9) & (across < right - 1e-9)


def strips(box: Any, step: tuple[float, float]) -> Iterator[tuple[float, float, float, float]]:
    """The outermost row or column of tensor pixels at each side of a box; one more, where the picture ends between two."""
    left, top, right, bottom = box
    across, down = (min(2 * step[0], right - left), min(2 * step[1], bottom - top))
    yield from [
        (left, top, left + across, bottom),
        (left, top, right, top + down),
        (right - across, top, right, bottom),
        (left, bottom - down, right, bottom),
    ]


def check_paint(model: cv.HookedModel, together: bool = False, sizes: list[tuple[int, int]] = SIZES) -> None:
    """Every corner and a middle patch of every row reads what is in its box up to the border, and nothing outside it."""
    pictures = [picture(size) for size in sizes]
    images, _options, inputs = made(nearest(model), pictures, together)
    tokens = model.tokens(inputs)["vision"]
    boxes = boxes_in_pictures(model, images, inputs)
    clean = embeddings(model, inputs)
    prefix = model.vision.cfg.n_prefix
    assert clean.shape[1] == tokens.n_positions - prefix
    seen = 0
    for row in range(tokens.n_rows):
        own = np.flatnonzero(np.isin(tokens.kind[row], ["patch"]))
        assert np.isnan(boxes[row, [p for p in range(tokens.n_positions) if p not in own]]).all()
        number = int(tokens.example[row]) if not together else int(tokens.image_number[row, own[0]])
        corners = {own[0], own[-1]}
        if tokens.n_rows <= 4:
            last = tokens.patch_col[row, own] == tokens.patch_col[row, own].max()
            corners |= {own[len(own) // 2], own[last][0], own[last][1]}
        for position in sorted(corners):
            box = boxes[row, position]

            def moved(where: np.ndarray, row: int = row, position: int = position, number: int = number) -> bool:
                changed = [painted(one, where) if n == number else one for n, one in enumerate(pictures)]
                # Examples do not see each other: the one that is changed runs alone.
                first = 0 if together else int(np.flatnonzero(tokens.example == number)[0])
                now = embeddings(model, made(model, changed if together else changed[number : number + 1], together)[2])
                return bool((now[row - first, position - prefix] - clean[row, position - prefix]).abs().max() > 1e-4)

            size = sizes[number]
            if np.isnan(box).any():
                assert not moved(np.ones(size, bool)), f"row {row}, position {position} reads no picture"
                continue
            seen += 1
            assert 0 <= box[0] < box[2] <= size[1]
            assert 0 <= box[1] < box[3] <= size[0]
            assert moved(inside(size, box)), f"row {row}, position {position}: nothing in its box {box} moves it"
            assert not moved(~inside(size, box)), f"row {row}, position {position} reads pixels outside its box {box}"
            read = tokens.patches.pixels[(tokens.patches.row == row) & (tokens.patches.position == position)][0]
            step = ((box[2] - box[0]) / (read[2] - read[0]), (box[3] - box[1]) / (read[3] - read[1]))
            sides = list(strips(box, (max(step[0], 1.0), max(step[1], 1.0))))
            for strip in sides[:2] if position == own[0] else sides[2:] if position == own[-1] else []:
                assert moved(inside(size, strip)), (
                    f"row {row}, position {position}: its box {box} is too large, {strip}"
                )
    assert seen >= 3 * len(pictures)


@pytest.mark.parametrize("name", list(CASES))
def test_a_box_holds_what_its_patch_reads_of_the_picture(name: str) -> None:
    check_paint(zoo_model(name))


@pytest.mark.parametrize("name", [name for name in CASES if "two_images" in case(name).tags])
def test_several_pictures_of_one_prompt(name: str) -> None:
    check_paint(zoo_model(name), together=True)


@pytest.mark.parametrize("name", ODD)
def test_pictures_that_are_no_whole_number_of_patches(name: str) -> None:
    check_paint(odd(name), sizes=SIZES if "any size" not in name else SIZES[:1] * 2)


@pytest.mark.parametrize("together", [False, True], ids=["one each", "together"])
@pytest.mark.parametrize("name", ODD_VLM)
def test_pictures_that_are_padded_before_or_after(name: str, together: bool) -> None:
    check_paint(odd_vlm(name), together)


@pytest.mark.parametrize("name", ["llava-next-llama", "llava-onevision", "onevision, 23 in patches of 6"])
def test_tiles_are_counted_in_the_original_picture_without_a_processor(name: str) -> None:
    """Where a model tiles pictures, the boxes of its token map are those in the picture."""
    model = odd_vlm(name) if name in ODD_VLM else zoo_model(name)
    for together in (False, True):
        images, _, inputs = made(model, [picture(size) for size in SIZES], together)
        for tower in ("vision", "language"):
            tokens = model.tokens(inputs)[tower]
            assert np.allclose(tokens.box, boxes_in_pictures(model, images, inputs, tower), equal_nan=True)


def test_wrong_pictures_are_refused() -> None:
    model = zoo_model("vit")
    _, _, inputs = made(model, [picture(size) for size in SIZES], False)
    with pytest.raises(cv.errors.InputError, match="pictures were given"):
        boxes_in_pictures(model, [picture(SIZES[0])], inputs)
    with pytest.raises(cv.errors.InputError, match="processor"):
        boxes_in_pictures(cv.HookedModel(shared_model("vit")), [picture(size) for size in SIZES], inputs)


def image_over_grid(self: Any, grid: tuple[int, int], height: int, width: int) -> np.ndarray:
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    dy, dx = height / grid[0], width / grid[1]
    return np.stack([columns * dx, rows * dy, (columns + 1) * dx, (rows + 1) * dy], axis=1)


def rows_for_columns(self: Any, height: int, width: int) -> tuple[int, int]:
    return (width - self.kernel[1]) // self.stride[1] + 1, (height - self.kernel[0]) // self.stride[0] + 1


def first_frame(self: Any, run: Any, image: int, tile: int) -> Any:
    return FRAME(self, run, 0, tile)


FRAME = packing.AnyRes.frame
MUTANTS: list[tuple[str, type, str, Callable[..., Any]]] = [
    ("siglip, 23 in patches of 6", patches.PatchEmbedding, "boxes", image_over_grid),
    ("vit, 25x31 in patches of 6x4", patches.PatchEmbedding, "boxes", image_over_grid),
    ("vit, 25x31 in patches of 6x4", patches.PatchEmbedding, "grid", rows_for_columns),
]


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "fault"), MUTANTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_mutants_of_the_patch_embedding(
    name: str, owner: type, attribute: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = odd(name)
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check_paint(model)


def test_mutant_that_takes_every_frame_from_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.AnyRes, "frame", first_frame)
    with pytest.raises(AssertionError):
        test_tiles_are_counted_in_the_original_picture_without_a_processor("llava-next-llama")


def test_mutant_that_forgets_what_the_processor_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches.Frame, "boxes", lambda self, boxes: boxes)
    with pytest.raises(AssertionError):
        check_paint(odd("clip, cropped to 22 in patches of 5"))
