"""Offloaded models: weights, norms and read-outs are the real numbers, bit by bit those of the model in memory, and nothing stays loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn

import circuitvision as cv
from circuitvision.errors import UnsupportedModelError
from circuitvision.model import weights, wrapped
from tests.parts import module_of
from tests.zoo import case, shared_model

WAYS = ("cpu_offload", "disk_offload", "device_map")
STACKED = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "b_Q", "b_O", "b_out", "W_E", "W_pos", "W_U", "b_U", "W_proj")
EDITED = ("hook_normalized", "hook_scale", "hook_result", "_input", "pos_embed", "mlp_in")


def offloaded(name: str, way: str, folder: Path) -> Any:
    module = copy.deepcopy(shared_model(name))
    if way == "cpu_offload":
        return cpu_offload(module, execution_device="cpu")
    if way == "disk_offload":
        return disk_offload(module, str(folder), execution_device="cpu")
    module.save_pretrained(folder / "saved")
    parts = [part for part, child in module.named_children()]
    places = {part: ("disk", "cpu")[number % 2] for number, part in enumerate(parts)}
    return type(module).from_pretrained(folder / "saved", device_map=places, offload_folder=folder / "off").eval()


def raw(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of the model in memory, by path: the numbers every weight is compared with."""
    return dict(module.named_parameters())


def same_weights(model: cv.HookedModel, name: str) -> None:
    plain = cv.HookedModel(copy.deepcopy(shared_model(name)))
    inside = raw(plain.module)
    for key, owner in model.towers.items():
        for attribute in STACKED:
            try:
                expected = getattr(plain.towers[key], attribute)
            except AttributeError:
                continue
            assert torch.equal(getattr(owner, attribute), expected), f"{key} {attribute}"
        path = next(
            path for path, part in plain.module.named_modules() if part is module_of(plain.towers[key].blocks[0], "o")
        )
        found = owner.W_O[0].flatten(0, 1).T
        assert torch.equal(found, inside[f"{path}.weight"])


def caught(check: Callable[[], None]) -> bool:
    try:
        check()
    except (AssertionError, RuntimeError, NotImplementedError, UnsupportedModelError, cv.errors.InputError):
        return True
    return False


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["vit", "llava-clip-llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dinov2", "pi0"))]
)
def test_everything_is_what_it_is_in_memory(name: str, way: str, tmp_path: Path) -> None:
    module = offloaded(name, way, tmp_path)
    model, plain = cv.HookedModel(module), cv.HookedModel(copy.deepcopy(shared_model(name)))
    assert str(model.device) == "cpu"
    assert model.dtype == torch.float32
    inputs = case(name).inputs(plain.module, batch=2)
    empty = [path for path, value in module.named_parameters() if value.is_meta]
    assert empty
    same_weights(model, name)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, "**")
        expected, clean = plain.run_with_cache(inputs, "**")
        assert torch.equal(out, expected)
        for site in clean:
            assert torch.equal(cache[site], clean[site]), site
        for key in model.towers:
            stack, known = (found.stack_head_results(key) for found in (cache, clean))
            assert torch.equal(stack, known)
        for site in model.sites("**"):
            if any(kind in site for kind in EDITED) and ".blocks.1" not in site:
                hooks = [(site, lambda value, hook: value * 1.3)]
                assert torch.equal(model.run_with_hooks(inputs, hooks), plain.run_with_hooks(inputs, hooks)), site
    last = list(model.towers)[-1]
    for read in (
        lambda own, held: cv.readout.direct_attribution(own, held, (0, 1), by="neuron").values,
        lambda own, held: cv.readout.value_vectors(own.towers[last], top_k=2).values,
        lambda own, held: cv.readout.logit_lens(own, held, targets={0: 0, 1: 1}).values,
        lambda own, held: held.apply_ln_to_stack(held.decompose_resid(last), last, layer=0, bias=True),
    ):
        # Kernels round by where a tensor lies in memory, which loading decides.
        torch.testing.assert_close(read(model, cache), read(plain, clean), rtol=1e-5, atol=1e-6)
    assert [path for path, value in module.named_parameters() if value.is_meta] == empty


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_a_dual_encoder(way: str, tmp_path: Path) -> None:
    """Its logit scale lies on the root of the model, which holds parameters of its own."""
    model, plain = cv.HookedModel(offloaded("clip", way, tmp_path)), cv.HookedModel(copy.deepcopy(shared_model("clip")))
    inputs = case("clip").inputs(plain.module, batch=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        for name, owner in model.towers.items():
            site = f"{name}.blocks.{owner.cfg.n_layers - 1}.hook_resid_post"
            read = owner.readout(cache[site], context=cache)
            assert torch.allclose(read, plain(inputs), atol=1e-5)
        _, clean = plain.run_with_cache(inputs)
        assert all(torch.equal(cache[site], clean[site]) for site in clean)
    same_weights(model, "clip")


def test_an_adapter_on_an_offloaded_layer(tmp_path: Path) -> None:
    """The layer inside the adapter is fetched while it is measured."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    plain = get_peft_model(copy.deepcopy(shared_model("vit")), copy.deepcopy(config)).eval()
    held = get_peft_model(copy.deepcopy(shared_model("vit")), copy.deepcopy(config)).eval()
    held.load_state_dict(plain.state_dict())
    model = cv.HookedModel(cpu_offload(held, execution_device="cpu"))
    assert torch.allclose(model.vision.W_Q, cv.HookedModel(plain).vision.W_Q, atol=1e-6)


def test_weights_without_data_say_so() -> None:
    """A model built on the meta device has a shape and no numbers."""
    with torch.device("meta"):
        module = type(shared_model("vit"))(shared_model("vit").config)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        cv.HookedModel(module).vision.W_Q


def test_mutant_weights_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = cv.HookedModel(offloaded("vit", "cpu_offload", tmp_path))
    assert not caught(lambda: same_weights(model, "vit"))
    monkeypatch.setattr(weights, "_hooks", lambda module: [])
    assert caught(lambda: same_weights(model, "vit"))


def test_mutant_the_first_parameter_says_where_the_model_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = cv.HookedModel(offloaded("vit", "cpu_offload", tmp_path))
    inputs = case("vit").inputs(shared_model("vit"), batch=1)
    monkeypatch.setattr(wrapped, "main_device", lambda module: next(module.parameters()).device)
    assert caught(lambda: model(inputs))
