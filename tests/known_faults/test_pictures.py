"""Every kind of picture gives the tensors of the same picture as an 8-bit RGB image, or one error that names the fix.

The reference is each processor called by itself on PIL images of mode RGB.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import circuitvision as cv
from circuitvision.data import pictures
from circuitvision.errors import InputError
from tests.zoo import CASES, Case, shared_model

KINDS = (
    "vit-wide",
    "deit",
    "dinov2-registers",
    "clip",
    "siglip",
    "siglip2",
    "siglip2-vision",
    "llava-clip-llama",
    "llava-siglip-qwen2",
    "llava-next-mistral",
    "llava-onevision",
    "paligemma",
    "pi0",
)
"""One case of every processor kind."""

Turn = Callable[[Image.Image], Any]


def array(image: Image.Image) -> np.ndarray:
    return np.array(image)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(array(image)).permute(2, 0, 1)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


SAME: dict[str, Turn] = {
    "PIL": lambda image: image,
    "opaque RGBA": lambda image: image.convert("RGBA"),
    "uint8 HWC": array,
    "uint8 CHW": lambda image: array(image).transpose(2, 0, 1),
    "uint8 HWCA": lambda image: array(image.convert("RGBA")),
    "int64 HWC": lambda image: array(image).astype(np.int64),
    "float64 0…1": lambda image: array(image) / 255,
    "float32 0…1 CHW": lambda image: (array(image) / 255).astype(np.float32).transpose(2, 0, 1),
    "float32 0…255": lambda image: array(image).astype(np.float32),
    "torch uint8": tensor,
    "torch float 0…1": lambda image: tensor(image) / 255,
    "torch float16 0…1": lambda image: (tensor(image) / 255).half(),
    "torch float 0…255": lambda image: tensor(image).float(),
    "torch, not contiguous": lambda image: torch.from_numpy(array(image)).float() / 255,
    "data address": lambda image: "data:image/png;base64," + base64.b64encode(png(image)).decode(),
    "base64": lambda image: base64.b64encode(png(image)).decode(),
}


def over(turn: Turn, images: Any) -> Any:
    """``turn`` of every picture of a nested list."""
    return [over(turn, one) for one in images] if isinstance(images, (list, tuple)) else turn(images)


def wrapped(case: Case) -> cv.HookedModel:
    assert case.processor is not None
    return cv.HookedModel(shared_model(case.name), case.processor())


def raw(case: Case, batch: int = 2) -> dict[str, Any]:
    assert case.raw is not None
    return case.raw(batch=batch, seed=3)


def by_the_processor(model: cv.HookedModel, given: dict[str, Any]) -> dict[str, Any]:
    """What the processor makes of PIL images, with the padding that the library asks for."""
    options: dict[str, Any] = {"return_tensors": "pt"}
    if "text" in given:
        options["padding"] = model.family.text_padding
        if model.family.text_padding == "max_length":
            options["max_length"] = model.config.text_config.max_position_embeddings
    processor = getattr(model.processor, "image_processor", model.processor)
    options |= {name: getattr(processor, name) for name in model.family.image_settings}
    return dict(model.processor(**{**options, **given}))


@pytest.mark.parametrize("turn", SAME.values(), ids=SAME)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_is_the_same_picture(name: str, turn: Turn) -> None:
    case = CASES[name]
    model, given = wrapped(case), raw(case)
    expected = by_the_processor(model, given)
    made = model.inputs(**{**given, "images": over(turn, given["images"])})
    assert expected["pixel_values"].std() > 0.1
    # Half precision rounds before the eight bits do.
    atol = 3 / 255 if "float16" in str(getattr(turn(Image.new("RGB", (4, 4))), "dtype", "")) else 1e-6
    for part in ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_sizes", "input_ids"):
        if part in expected:
            torch.testing.assert_close(made[part], expected[part].to(made[part]), atol=4 * atol, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_lists_may_mix_kinds(name: str) -> None:
    case = CASES[name]
    model, given = wrapped(case), raw(case, batch=3)
    turns = iter([SAME["float64 0…1"], SAME["torch uint8"], SAME["opaque RGBA"]] * 4)
    made = model.inputs(**{**given, "images": over(lambda image: next(turns)(image), given["images"])})
    expected = by_the_processor(model, given)["pixel_values"]
    torch.testing.assert_close(made["pixel_values"], expected.to(made["pixel_values"]))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["vit-wide", "llava-next-mistral", "pi0"])
def test_pictures_on_a_gpu(name: str) -> None:
    for scale in (1, 255):
        test_every_kind_of_picture_is_the_same_picture(name, lambda image: tensor(image).cuda() / scale)


def test_files_are_read_and_turned_as_cameras_say(tmp_path: Path) -> None:
    case = CASES["vit-wide"]
    model, (image, *_) = wrapped(case), raw(case)["images"]
    expected = by_the_processor(model, {"images": [image]})["pixel_values"]
    path = tmp_path / "picture.png"
    image.save(path)
    for given in (path, str(path), [path]):
        assert torch.equal(model.inputs(images=given)["pixel_values"], expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 270 degrees
    image.rotate(90, expand=True).save(path, exif=exif)
    assert torch.equal(model.inputs(images=path)["pixel_values"], expected)


GREY = {
    "L": lambda grey: grey,
    "LA": lambda grey: grey.convert("LA"),
    "2-D uint8": array,
    "2-D float": lambda grey: array(grey) / 255,
    "1HW": lambda grey: array(grey)[None],
    "HW1": lambda grey: array(grey)[..., None],
    "torch HW": lambda grey: torch.from_numpy(array(grey)),
}


@pytest.mark.parametrize("turn", GREY.values(), ids=GREY)
@pytest.mark.parametrize("name", KINDS)
def test_grey_pictures_for_colour_models(name: str, turn: Turn) -> None:
    case = CASES[name]
    model, given = wrapped(case), raw(case)
    expected = by_the_processor(
        model, {**given, "images": over(lambda i: i.convert("L").convert("RGB"), given["images"])}
    )
    made = model.inputs(**{**given, "images": over(lambda i: turn(i.convert("L")), given["images"])})
    torch.testing.assert_close(made["pixel_values"], expected["pixel_values"].to(made["pixel_values"]))


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_without_alpha(mode: str) -> None:
    case = CASES["clip"]
    model, given = wrapped(case), raw(case)
    images = [image.convert(mode) for image in given["images"]]
    expected = by_the_processor(model, {**given, "images": [image.convert("RGB") for image in images]})
    assert torch.equal(model.inputs(**{**given, "images": images})["pixel_values"], expected["pixel_values"])
    if mode == "1":
        given["images"] = [np.array(image) for image in images]
        assert torch.equal(model.inputs(**given)["pixel_values"], expected["pixel_values"])


def clear(image: Image.Image) -> Image.Image:
    """The picture with one transparent pixel."""
    out = image.convert("RGBA")
    out.putpixel((1, 1), (0, 0, 0, 0))
    return out


def keyed(image: Image.Image) -> Image.Image:
    out = image.convert("P")
    out.info["transparency"] = out.getpixel((0, 0))
    return out


REFUSED: dict[str, tuple[Turn, str]] = {
    "transparent": (clear, ".convert('RGB')"),
    "transparent LA": (lambda i: clear(i).convert("LA"), ".convert('RGB')"),
    "transparent palette": (keyed, ".convert('RGB')"),
    "transparent array": (lambda i: array(clear(i)), ".convert('RGB')"),
    "I;16": (lambda i: Image.fromarray(array(i.convert("L")).astype(np.uint16) * 257), ".convert('RGB')"),
    "F": (lambda i: i.convert("F"), ".convert('RGB')"),
    "uint16": (lambda i: array(i).astype(np.uint16) * 257, "uint8"),
    "int above 255": (lambda i: array(i).astype(np.int64) + 1000, "uint8"),
    "negative": (lambda i: array(i) / 127.5 - 1, "pixel_values"),
    "above 255": (lambda i: array(i) * 1.5 + 200.0, "pixel_values"),
    "above 1": (lambda i: array(i) / 255 * 1.2, ".clip"),
    "NaN": (lambda i: array(i) * np.nan, "NaN"),
    "complex": (lambda i: array(i).astype(complex), "uint8"),
    "gradient": (lambda i: (tensor(i) / 255).requires_grad_(), ".detach()"),
    "five channels": (lambda i: np.zeros((5, 8, 8), np.uint8), "channels"),
    "one axis": (lambda i: np.zeros(9, np.uint8), "[height, width"),
    "nothing": (lambda i: np.zeros((0, 4, 3), np.uint8), "nothing"),
    "channels first or last": (lambda i: np.zeros((3, 9, 3), np.uint8), "input_data_format"),
    "numbers": (lambda i: [1, 2, 3], "np.asarray"),
    "None": (lambda i: None, "NoneType"),
    "no picture": (lambda i: object(), "object"),
    "absent file": (lambda i: "nowhere.png", "nowhere.png"),
}


@pytest.mark.parametrize(("turn", "names"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["vit-wide", "siglip2", "llava-next-mistral", "pi0"])
def test_what_would_lose_something_is_refused_with_the_fix(name: str, turn: Turn, names: str) -> None:
    case = CASES[name]
    model, given = wrapped(case), raw(case)
    with pytest.raises(InputError) as caught:
        model.inputs(**{**given, "images": over(turn, given["images"])})
    assert names in str(caught.value)


def test_the_channel_axis_can_be_said() -> None:
    model = wrapped(CASES["vit-wide"])
    picture = np.random.default_rng(0).integers(0, 255, (3, 9, 3), dtype=np.uint8)
    for layout, image in (("channels_last", picture), ("channels_first", picture.transpose(1, 2, 0))):
        expected = by_the_processor(model, {"images": [Image.fromarray(np.ascontiguousarray(image))]})["pixel_values"]
        assert torch.equal(model.inputs(images=picture, input_data_format=layout)["pixel_values"], expected)
    with pytest.raises(InputError, match="channels_first"):
        model.inputs(images=picture, input_data_format="first")


def test_the_range_of_floats_is_that_of_the_call() -> None:
    model, (bright, *_) = wrapped(CASES["vit-wide"]), raw(CASES["vit-wide"])["images"]
    dark = np.zeros((12, 20, 3))
    expected = by_the_processor(model, {"images": [bright, Image.fromarray(dark.astype(np.uint8))]})["pixel_values"]
    for scale in (1.0, 255.0):
        made = model.inputs(images=[array(bright) / scale, dark])["pixel_values"]
        assert torch.equal(made, expected)
    with pytest.raises(InputError, match="one range"):
        model.inputs(images=[array(bright) / 255, array(bright).astype(float)])
    with pytest.raises(InputError, match="do_rescale"):
        model.inputs(images=bright, do_rescale=False)


def test_a_stack_is_a_list_of_pictures() -> None:
    model, images = wrapped(CASES["vit-wide"]), raw(CASES["vit-wide"], batch=3)["images"]
    expected = by_the_processor(model, {"images": images})["pixel_values"]
    stack = torch.stack([tensor(image) for image in images])
    for given in (stack, stack / 255, stack.permute(0, 2, 3, 1).numpy()):
        assert torch.equal(model.inputs(images=given)["pixel_values"], expected)


@pytest.mark.parametrize("images", [[], (), [[], []]])
def test_lists_of_no_picture(images: Any) -> None:
    for name in ("vit", "llava-clip-llama", "pi0"):
        given = raw(CASES[name])
        with pytest.raises(InputError):
            wrapped(CASES[name]).inputs(**{**given, "images": images})


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    model = wrapped(CASES["vit"])
    note = tmp_path / "note.png"
    note.write_text("no picture")
    whole = tmp_path / "whole.png"
    raw(CASES["vit"])["images"][0].resize((64, 64)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:200])
    for path in (note, tmp_path / "half.png", tmp_path):
        for given in (path, str(path)):
            with pytest.raises(InputError) as caught:
                model.inputs(images=given)
            assert path.name in str(caught.value)
    for address in ("data:image/png;base64,AAAA", "http://127.0.0.1:9/picture.png", "A" * 4000):
        with pytest.raises(InputError):
            model.inputs(images=address)


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next-mistral", "llava-onevision", "paligemma"])
def test_prompts_name_as_many_pictures_as_there_are(name: str) -> None:
    case = CASES[name]
    model, given = wrapped(case), raw(case, batch=2)
    token = model.image_token
    flat = [image[0] if isinstance(image, list) else image for image in given["images"]]
    prompts = [f"{token} what color", f"{token} what color"]
    wrong = [
        (flat[:1], prompts),
        (flat, prompts[0]),
        (flat, [f"{token} {token} what", f"{token} what"]),
        ([flat, flat[:1]], [f"{token} what", f"{token} {token} what"]),
    ]
    for images, text in wrong:
        with pytest.raises(InputError) as caught:
            model.inputs(images=images, text=text)
        assert str(token) in str(caught.value)
    model(model.inputs(images=[[flat[0]], [flat[1]]], text=prompts))


@pytest.mark.parametrize("text", [3, [3], ["a", None], b"red", [["a"]]])
def test_texts_that_are_none(text: Any) -> None:
    model = wrapped(CASES["clip"])
    with pytest.raises(InputError, match="text"):
        model.inputs(text=text)


# ---- models of one channel, or of more than three


def model_of(channels: int) -> cv.HookedModel:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12}
    config = transformers.ViTConfig(image_size=12, patch_size=4, num_channels=channels, **sizes)  # type: ignore[arg-type]
    mean = [0.2 + 0.1 * index for index in range(channels)]
    processor = transformers.ViTImageProcessorPil(
        size={"height": 12, "width": 12}, image_mean=mean, image_std=[0.5] * channels
    )
    return cv.HookedModel(transformers.ViTForImageClassification(config).eval(), processor)


@pytest.mark.parametrize("turn", GREY.values(), ids=GREY)
def test_grey_pictures_for_a_grey_model(turn: Turn) -> None:
    model = model_of(1)
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12), dtype=np.uint8))
    made = model.inputs(images=[turn(grey), turn(grey)])
    expected = torch.from_numpy((array(grey) / 255 - 0.2) / 0.5).float().expand(2, 1, 12, 12)
    torch.testing.assert_close(made["pixel_values"], expected)
    assert model(made).shape[0] == 2


@pytest.mark.parametrize("turn", [SAME["PIL"], SAME["uint8 HWC"], SAME["torch float 0…1"]])
def test_colour_is_never_dropped_for_a_grey_model(turn: Turn) -> None:
    with pytest.raises(InputError) as caught:
        model_of(1).inputs(images=turn(Image.new("RGB", (12, 12), "red")))
    assert ".convert('L')" in str(caught.value)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_models_of_other_channels_want_pixel_values(channels: int) -> None:
    model = model_of(channels)
    for picture in (np.zeros((channels, 12, 12), np.uint8), Image.new("RGB", (12, 12))):
        with pytest.raises(InputError, match="pixel_values"):
            model.inputs(images=picture)
    assert model({"pixel_values": torch.zeros(1, channels, 12, 12)}).shape[0] == 1


def test_figures_of_a_grey_model() -> None:
    from circuitvision import metrics
    from circuitvision.readout import attention_maps, gradient_times_activation, max_activating_examples

    model = model_of(1)
    grey = np.random.default_rng(0).integers(0, 255, (12, 12), dtype=np.uint8)
    inputs = model.inputs(images=[grey, grey])
    _, cache = model.run_with_cache(inputs)
    maps = attention_maps(model, cache, query="cls")
    units = max_activating_examples(model, inputs, "vision.blocks.0.mlp.hook_post", top_k=1)
    pixels = gradient_times_activation(model, inputs, metrics.logit_diff(0, 1), site="pixels")
    for picture in (grey, grey[None], grey[..., None], grey / 255, Image.fromarray(grey)):
        for figure in (maps.plot(picture=picture), units.plot(pictures=[picture] * 2), pixels.plot(picture=picture)):
            drawn = [trace for trace in figure.data if trace.type == "image"]
            assert np.array_equal(np.asarray(drawn[0].z), np.repeat(grey[..., None], 3, axis=-1))


def test_a_real_model_of_digits() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "real"
    if not (folder / "vit_mnist").is_dir():
        pytest.skip("the folder of real models is not there")
    model = cv.HookedModel.from_pretrained(folder / "vit_mnist")
    with np.load(folder / "digits_256.npz") as file:
        images, labels = file["images"], file["labels"]
    flat = images.reshape(len(images), 28, 28)
    with torch.no_grad():
        right = (model(model.inputs(images=list(flat))).argmax(-1).numpy() == labels).mean()
        assert right == pytest.approx(0.918, abs=2e-3)
        with pytest.raises(InputError, match=r"list\(array\)"):
            model.inputs(images=flat)


# ---- mutants


def test_mutant_floats_rescaled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_holds_unit_floats", lambda arrays: False)
    with pytest.raises(AssertionError):
        test_every_kind_of_picture_is_the_same_picture("vit-wide", SAME["float64 0…1"])


def test_mutant_alpha_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_opaque", lambda image: image.convert("RGB"))
    with pytest.raises(pytest.fail.Exception):
        test_what_would_lose_something_is_refused_with_the_fix("vit-wide", *REFUSED["transparent"])


def test_mutant_channels_taken_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_channels_last", lambda array, layout: array)
    with pytest.raises((AssertionError, InputError)):
        test_every_kind_of_picture_is_the_same_picture("vit-wide", SAME["uint8 CHW"])
