"""What is different on a GPU: kernels, device maps, half precision there, batches sized to its memory. Skipped where there is none."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from tests.conformance.promises import PROMISES
from tests.zoo import case, shared_model

pytestmark = pytest.mark.cuda
NAMES = ("vit", "clip", "llava-clip-llama", "pi0")


def on_gpu(name: str, dtype: torch.dtype = torch.float32) -> tuple[cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model(name)).to("cuda", dtype)
    return cv.HookedModel(module), moved(case(name).inputs(module, batch=2, dtype=dtype))


def moved(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_looking_changes_nothing_and_the_stream_adds_up(name: str, dtype: torch.dtype) -> None:
    model, inputs = on_gpu(name, dtype)
    names = model.sites("**.hook_resid_*") + model.sites("**.hook_*_out")
    with torch.no_grad():
        plain = model(inputs)
        out, cache = model.run_with_cache(inputs, names)
    assert plain.device.type == "cuda"
    assert torch.equal(out, plain)
    for tower in model.towers:
        pre, add, mid = (cache[tower, kind, 0] for kind in ("resid_pre", "attn_out", "resid_mid"))
        assert torch.equal(pre + add, mid)
        assert torch.equal(mid + cache[tower, "mlp_out", 0], cache[tower, "resid_post", 0])


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_processor(name: str) -> None:
    model, inputs = on_gpu(name)
    plain = cv.HookedModel(copy.deepcopy(shared_model(name)))
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, "**")
        expected, clean = plain.run_with_cache(
            {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, "**"
        )
    assert torch.allclose(out.cpu(), expected, atol=1e-2)
    assert set(cache) == set(clean)
    for tower, owner in model.towers.items():
        assert torch.equal(owner.W_O.cpu(), plain.towers[tower].W_O)


def test_the_zoo_is_still_green_beside_a_gpu() -> None:
    """The processor's own promises do not depend on a GPU being there."""
    from tests.conformance.setting import Setting

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PROMISES["bare output"](Setting(case("vit")))


@pytest.mark.parametrize("batch_size", ["auto", 3])
@pytest.mark.parametrize("name", ["vit", "llava-clip-llama"])
def test_a_sweep_equals_single_runs(name: str, batch_size: Any) -> None:
    model, inputs = on_gpu(name)
    tower = list(model.towers)[-1]
    groups = [edits.ablate(f"{tower}.blocks.0.attn.hook_z", heads=[head]) for head in range(4)]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits.flatten(1)[:, -1]

    with torch.no_grad():
        found = model.sweep(inputs, groups, metric, batch_size=batch_size, progress=False)
        expected = torch.stack([metric(model.run(inputs, [group])) for group in groups])
    assert torch.allclose(found.values.to(expected), expected, atol=1e-4)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    """Real memory: the process may take little more than it has, so that all edits at once cannot fit."""
    model, _ = on_gpu("vit")
    inputs = moved(case("vit").inputs(model.module, batch=64))
    groups = [edits.scale("vision.blocks.0.hook_resid_pre", 1 + number / 100) for number in range(64)]
    total = torch.cuda.get_device_properties(0).total_memory
    with torch.no_grad():
        expected = model.sweep(inputs, groups, lambda out: out[:, 0], batch_size=4, progress=False).values
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
        try:
            found = model.sweep(inputs, groups, lambda out: out[:, 0], batch_size=64, progress=False).values
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("language", ["cuda:0", "cpu", "disk"])
def test_device_maps(language: str, tmp_path: Any) -> None:
    """Towers on the GPU, the language model there, in memory or on disk: the same output and weights."""
    plain = shared_model("llava-clip-llama")
    plain.save_pretrained(tmp_path / "saved")
    places = {
        "model.vision_tower": "cuda:0",
        "model.multi_modal_projector": "cuda:0",
        "model.language_model": language,
        "lm_head": "cuda:0",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cv.HookedModel.from_pretrained(
            tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "off")
        )
    inputs = case("llava-clip-llama").inputs(plain, batch=2)
    assert model.device.type == "cuda"
    with torch.no_grad():
        out, cache = model.run_with_cache(moved(inputs))
        assert torch.allclose(out.cpu(), plain(**inputs).logits, atol=1e-2)
        result = cache["language", "result", 0]
    owner = cv.HookedModel(copy.deepcopy(plain)).language
    assert torch.equal(model.language.W_Q.cpu(), owner.W_Q)
    summed = result.sum(-2).cpu() + model.language.b_O[0].cpu()
    assert torch.allclose(summed, cache["language", "attn_out", 0].cpu(), atol=1e-2)
