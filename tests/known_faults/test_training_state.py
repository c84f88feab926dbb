"""The state of the module: gradient checkpointing under hooks, and dropout in training mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import HookError, InputError
from circuitvision.model import state
from tests.zoo import CASES, primary, shared_model

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
SITE = "vision.blocks.0.attn.hook_z"


def zero_head(value: Tensor, hook: Any = None) -> Tensor:
    value = value.clone()
    value[:, :, 0] = 0
    return value


def checkpointed(name: str = "vit", off: str = "") -> tuple[cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model(name)).double()
    inputs = CASES[name].inputs(module, batch=2, dtype=torch.float64)
    module.gradient_checkpointing_enable()
    module.train()
    if off == "disable":
        module.gradient_checkpointing_disable()
    elif off == "eval":
        module.eval()
    return cv.HookedModel(module), inputs


def by_hand(model: cv.HookedModel, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and gradient under a hook on the raw module, without checkpointing."""
    module = copy.deepcopy(model.module).eval()
    attention = module.vit.layers[0].attention

    def ablate(part: nn.Module, args: Any) -> Any:
        return (zero_head(args[0].unflatten(-1, (4, -1))).flatten(-2),)

    handle = attention.o_proj.register_forward_pre_hook(ablate)
    out = primary(module(**inputs))
    out.pow(2).sum().backward()
    handle.remove()
    return out.detach(), attention.q_proj.weight.grad


def check_gradients_are_right_or_refused() -> None:
    for off in ("", "disable", "eval"):
        model, inputs = checkpointed(off=off)
        expected, slope = by_hand(model, inputs)
        weight = model.module.vit.layers[0].attention.q_proj.weight
        if not off:
            with pytest.raises(HookError, match="gradient_checkpointing_disable"):
                model.run(inputs, [edits.ablate(SITE, "zero", heads=0)])
            continue
        out = model.run(inputs, [edits.ablate(SITE, "zero", heads=0)])
        out.pow(2).sum().backward()
        torch.testing.assert_close(out.detach(), expected)
        torch.testing.assert_close(weight.grad, slope)


def test_gradients_under_checkpointing_are_right_or_refused() -> None:
    check_gradients_are_right_or_refused()


def test_without_the_refusal_the_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.ModuleState, "_refuse_checkpointing", lambda self: None)
    model, inputs = checkpointed()
    expected, slope = by_hand(model, inputs)
    out = model.run(inputs, [edits.ablate(SITE, "zero", heads=0)])
    out.pow(2).sum().backward()
    torch.testing.assert_close(out.detach(), expected)
    off = (model.module.vit.layers[0].attention.q_proj.weight.grad - slope).abs().max()
    assert off > 1e-3 * slope.abs().max()
    with pytest.raises(pytest.fail.Exception):
        check_gradients_are_right_or_refused()


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "clip", "dinov2"])
def test_whatever_hooks_is_refused_in_every_tower(name: str) -> None:
    model, inputs = checkpointed(name)
    for tower in model.towers:
        site = f"{tower}.blocks.0.attn.hook_z"
        calls: list[Callable[[], Any]] = [
            lambda site=site: model.run_with_hooks(inputs, [(site, zero_head)]),
            lambda site=site: model.run_with_hooks(inputs, bwd_hooks=[(site, lambda grad, hook: None)]),
            lambda site=site: model.run_with_cache(inputs, site),
            lambda site=site: model.run_with_cache(inputs, site, incl_bwd=True, metric=lambda logits: logits.sum()),
            lambda site=site: model.run(inputs, [edits.ablate(site, heads=0)]),
        ]
        for call in calls:
            with pytest.raises(HookError, match=r"Gradient checkpointing is on in .*eval"):
                call()
        with model.hooks([(site, zero_head)]), pytest.raises(HookError, match="Gradient checkpointing"):
            model.module(**inputs)
        with torch.no_grad():
            once = model.run_with_hooks(inputs, [(site, zero_head)])
        model.eval()
        torch.testing.assert_close(once, model.run_with_hooks(inputs, [(site, zero_head)]).detach())
        model.train()
    assert not model.engine.handles
    model(inputs).sum().backward()


def test_checkpointing_of_one_tower_is_found() -> None:
    model, inputs = checkpointed("llava-clip-llama")
    model.module.gradient_checkpointing_disable()
    for block in model.vision.blocks:
        block.module.gradient_checkpointing = True
    with pytest.raises(HookError, match=r"vision_tower.*layers\.0"):
        model.run_with_cache(inputs, "language.blocks.0.hook_resid_post")


@pytest.mark.parametrize("method", ["chefer", "integrated"])
def test_gradient_read_outs_are_refused(method: str) -> None:
    from circuitvision import readout

    model, inputs = checkpointed()
    metric = cv.metrics.logit_diff(0, 1)
    call = {
        "chefer": lambda: readout.chefer_relevance(model, inputs, metric),
        "integrated": lambda: readout.integrated_gradients(model, inputs, metric, site="vision.hook_input"),
    }[method]
    with pytest.raises(HookError, match="Gradient checkpointing"):
        call()


# ---- dropout


def vit(**rates: float) -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=40, **rates))


def dinov2(**rates: float) -> nn.Module:
    torch.manual_seed(0)
    return Dinov2ForImageClassification(Dinov2Config(**SIZES, **rates))


def clip(**rates: float) -> nn.Module:
    torch.manual_seed(0)
    text = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "vocab_size": 50,
    }
    return CLIPModel(
        CLIPConfig(text_config={**text, **rates}, vision_config={**SIZES, "intermediate_size": 40}, projection_dim=8)
    )


PICTURES = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))}
PAIRS = {**PICTURES, "input_ids": torch.tensor([[1, 5, 49], [1, 7, 49]])}
DROPPING: list[tuple[str, Callable[..., nn.Module], dict[str, float], dict[str, Tensor], str]] = [
    ("hidden", vit, {"hidden_dropout_prob": 0.3}, PICTURES, "dropout"),
    ("attention", vit, {"attention_probs_dropout_prob": 0.3}, PICTURES, r"layers\.0\.attention"),
    ("stochastic depth", dinov2, {"drop_path_rate": 0.5}, PICTURES, "drop_path"),
    ("another tower", clip, {"attention_dropout": 0.3}, PAIRS, "text_model"),
]


def check_dropout_is_told_and_refused(make: Any, rates: Any, inputs: Any, part: str) -> None:
    model = cv.HookedModel(make(**rates)).train()
    site = "vision.blocks.0.hook_resid_post"
    with torch.no_grad():
        with pytest.warns(UserWarning, match=rf"{part}.*draws random numbers.*eval"):
            first = model(inputs)
        assert not torch.equal(first, model(inputs)), "the state is what it says"
        for call in (
            lambda: model.sweep(inputs, [edits.ablate(site)], lambda logits: logits[:, 0], progress=False),
            lambda: cv.patching.activation_patch(
                model, metric=lambda logits: logits[:, 0], clean=inputs, corrupt=inputs, sites=site, axes=("layer",)
            ),
            lambda: cv.readout.integrated_gradients(
                model, inputs, lambda logits: logits[:, 0], site="vision.hook_input"
            ),
        ):
            with pytest.raises(InputError, match=rf"{part}.*model\.eval"):
                call()


@pytest.mark.parametrize(
    ("make", "rates", "inputs", "part"), [case[1:] for case in DROPPING], ids=[c[0] for c in DROPPING]
)
def test_dropout_in_training_mode_is_told_and_comparisons_are_refused(
    make: Any, rates: Any, inputs: Any, part: str
) -> None:
    check_dropout_is_told_and_refused(make, rates, inputs, part)


@pytest.mark.parametrize(
    ("make", "rates", "inputs", "part"), [case[1:] for case in DROPPING], ids=[c[0] for c in DROPPING]
)
def test_only_modules_looked_at_would_miss_numbers(
    make: Any, rates: Any, inputs: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant: a rate is a Dropout module's, and never a number kept by attention or stochastic depth; for those two, the reverse."""

    def half(module: nn.Module) -> Any:
        modules = isinstance(module, nn.Dropout)
        return [module.p] if modules and part != "dropout" else []

    monkeypatch.setattr(state, "_rates", half)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_dropout_is_told_and_refused(make, rates, inputs, part)


def test_one_warning_for_a_model_until_it_leaves_training_mode() -> None:
    model = cv.HookedModel(vit(hidden_dropout_prob=0.3)).train()

    def count() -> int:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            model(PICTURES)
            model.run_with_cache(PICTURES, "**.hook_resid_post")
            model.run(PICTURES, [edits.ablate("vision.blocks.0.hook_mlp_out")])
        return sum("random numbers" in str(one.message) for one in caught)

    assert [count(), count()] == [1, 0]
    model.eval()
    assert count() == 0
    model.train()
    assert count() == 1


def test_a_single_part_in_training_mode_is_noticed() -> None:
    model = cv.HookedModel(vit(hidden_dropout_prob=0.3)).eval()
    model.module.vit.layers[1].train()
    with pytest.warns(UserWarning, match=r"layers\.1"):
        model(PICTURES)


def test_training_mode_without_dropout_says_nothing_and_sweeps() -> None:
    model = cv.HookedModel(vit()).train()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(PICTURES)
        swept = model.sweep(
            PICTURES, [edits.ablate("vision.blocks.0.hook_mlp_out")], lambda logits: logits[:, 0], progress=False
        )
        expected = model.run(PICTURES, [edits.ablate("vision.blocks.0.hook_mlp_out")])[:, 0]
    torch.testing.assert_close(swept.values[0], expected)


def test_dropout_of_an_adapter_is_noticed() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.4)
    model = cv.HookedModel(peft.get_peft_model(vit(), config))
    model.train()
    with pytest.warns(UserWarning, match="lora_dropout"):
        model(PICTURES)
