"""DINOv3: its image processor without torchvision, and images of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import circuitvision as cv
from circuitvision.families.dinov3 import image_processor
from tests.zoo import case

STORED = np.load(Path(__file__).parent / "fixtures" / "dinov3_processor.npz")
"""Pictures, and what transformers' DINOv3ViTImageProcessor makes of them with torchvision 0.28.0."""


def processor_of(pixels: np.ndarray) -> Any:
    return image_processor(size={"height": pixels.shape[1], "width": pixels.shape[2]})


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_processor_gives_what_the_original_gives(number: int) -> None:
    picture, pixels = STORED[f"picture{number}"], STORED[f"pixels{number}"]
    made = processor_of(pixels)(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(made.numpy(), pixels, rtol=0, atol=2e-6)


def test_resizing_pixels_of_eight_bits_is_noticed() -> None:
    picture, pixels = STORED["picture0"], STORED["pixels0"]
    small = Image.fromarray(picture).resize(pixels.shape[2:0:-1], Image.Resampling.BILINEAR)
    made = processor_of(pixels)(images=small, do_resize=False, return_tensors="pt")["pixel_values"][0]
    assert np.abs(made.numpy() - pixels).max() > 1e-3


def test_a_folder_brings_its_processor(tmp_path: Path) -> None:
    module = case("dinov3").build()
    module.save_pretrained(tmp_path)
    processor_of(STORED["pixels0"]).save_pretrained(tmp_path)
    model = cv.HookedModel.from_pretrained(tmp_path)
    inputs = model.inputs(images=Image.fromarray(STORED["picture0"]))
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), STORED["pixels0"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(5, 5), (15, 30), (23, 41)])
def test_images_of_any_size_run_and_are_laid_out(size: tuple[int, int]) -> None:
    module = case("dinov3").build().double().eval()
    model = cv.HookedModel(module)
    inputs = {"pixel_values": torch.randn(2, 3, *size, dtype=torch.float64)}
    rows, columns = size[0] // 5, size[1] // 5
    with torch.no_grad():
        assert torch.equal(model(inputs), module(**inputs).last_hidden_state)
        tokens = model.tokens(inputs)["vision"]
        assert (tokens.kind[0] == "patch").sum() == rows * columns
        assert tokens.patch_row.max() == rows - 1
        # Pixels of one patch move that patch alone before block 0.
        _, clean = model.run_with_cache(inputs, "vision.hook_input")
        painted = {"pixel_values": inputs["pixel_values"].clone()}
        painted["pixel_values"][:, :, 5 * (rows - 1) : 5 * rows, 5 * (columns - 1) : 5 * columns] += 1
        _, moved = model.run_with_cache(painted, "vision.hook_input")
        changed = (moved["vision.hook_input"] - clean["vision.hook_input"]).abs().amax(-1) > 1e-9
    last = (tokens.patch_row == rows - 1) & (tokens.patch_col == columns - 1)
    assert np.array_equal(changed.numpy(), last)


def test_heads_of_a_run_of_another_size_are_swept_exactly() -> None:
    module = case("dinov3-gated").build().double().eval()
    model = cv.HookedModel(module)
    inputs = {"pixel_values": torch.randn(1, 3, 10, 35, dtype=torch.float64)}
    heads = [cv.edits.ablate(f"L{layer}H{head}") for layer in (0, 1) for head in range(3)]
    with torch.no_grad():
        swept = model.sweep(inputs, heads, lambda out: out[:, 0, 0], progress=False)
        loop = torch.stack([model.run(inputs, [head])[:, 0, 0] for head in heads])
    torch.testing.assert_close(swept.values, loop, rtol=1e-10, atol=1e-12)
    assert not any(plan.in_full for plan in swept.plan)


def test_coordinates_that_are_drawn_in_training_mode_are_noticed() -> None:
    module = case("dinov3").build().train()
    model = cv.HookedModel(module)
    inputs = {"pixel_values": torch.randn(1, 3, 20, 20)}
    with pytest.warns(UserWarning, match="rope_embeddings draws random numbers"):
        assert not torch.equal(model(inputs), model(inputs))
    with pytest.raises(cv.errors.InputError, match="rope_embeddings"):
        model.sweep(inputs, [cv.edits.ablate("L0H0")], lambda out: out[:, 0, 0], progress=False)
    module.config.pos_embed_rescale = None
    assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("size", [(3, 3), (4, 40), (40, 4)])
def test_an_image_smaller_than_a_patch_is_refused(size: tuple[int, int]) -> None:
    model = cv.HookedModel(case("dinov3").build().eval())
    with pytest.raises(cv.errors.InputError, match="smaller than one patch"):
        model({"pixel_values": torch.randn(1, 3, *size)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(20, 20), (11, 37)])
def test_heads_in_half_precision_equal_hooks(dtype: torch.dtype, size: tuple[int, int]) -> None:
    module = case("dinov3-gated").build().to(dtype).eval()
    model = cv.HookedModel(module)
    inputs = {"pixel_values": torch.randn(2, 3, *size).to(dtype)}

    def without(part: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        kept = args[0].clone()
        kept[:, :, 8:16] = 0
        return (kept,)

    with torch.no_grad():
        handle = module.model.layer[1].attention.o_proj.register_forward_pre_hook(without)
        expected = module(**inputs).last_hidden_state
        handle.remove()
        assert torch.equal(model.run(inputs, [cv.edits.ablate("L1H1")]), expected)
        assert not torch.equal(model(inputs), expected)
