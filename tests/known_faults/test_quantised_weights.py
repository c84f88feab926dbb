"""Weights of quantised models: every read-out of a weight gives the dequantised numbers that the layer computes with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import UnsupportedModelError
from circuitvision.model import block_points, projections, weights
from tests.parts import has_part, module_of
from tests.zoo import case, shared_model

KINDS = ("nf4", "fp4", "int8", "dynamic", "torchao")
ROUNDED = ("int8", "dynamic")
"""Kinds whose layers round their input to 8 bits as well, so that they are ``x @ W + b`` only up to about 2 %."""
PARTS = {"q": "W_Q", "k": "W_K", "v": "W_V", "o": "W_O", "mlp_in": "W_in", "mlp_gate": "W_gate", "mlp_out": "W_out"}


def quantised(layer: nn.Linear, kind: str, compute: torch.dtype = torch.float32) -> nn.Module:
    bias = layer.bias is not None
    if kind in ("nf4", "fp4"):
        made: Any = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias, compute_dtype=compute, quant_type=kind
        )
    elif kind == "int8":
        made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False, threshold=6.0)
    elif kind == "dynamic":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)[0]
    else:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        held = nn.Sequential(copy.deepcopy(layer))
        quantize_(held, Int8WeightOnlyConfig())
        return held[0]
    made.load_state_dict(layer.state_dict())
    # Where the processor can, bitsandbytes repacks weights for bfloat16 on the first call, sizes of multiples of 32 only.
    made.support_avx512bf16_for_cpu = False
    return made.to("cpu").eval()


def dequantised(layer: Any, kind: str) -> Tensor:
    """``[d_in, d_out]`` from the library's own storage."""
    if kind in ("nf4", "fp4"):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).T
    if kind == "int8":
        state = layer.state if layer.state.CB is not None else layer.weight
        return (state.CB.float() * state.SCB[:, None] / 127).T
    return (layer.weight() if kind == "dynamic" else layer.weight).dequantize().T


def quantised_model(name: str, kind: str) -> nn.Module:
    """The case's model with every plain linear layer quantised, the heads and the projector among them."""
    module = copy.deepcopy(shared_model(name))
    for parent in list(module.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, key, quantised(child, kind))
    return module.eval()


def flat(weight: Tensor, part: str) -> Tensor:
    if part in ("q", "k", "v"):
        return weight.permute(1, 0, 2).flatten(1)
    return weight.flatten(0, 1) if part == "o" else weight


def check_weights(model: cv.HookedModel, kind: str) -> None:
    for owner in model.towers.values():
        for block in owner.blocks:
            for part, name in PARTS.items():
                if has_part(block, part):
                    expected = dequantised(module_of(block, part), kind)
                    found = flat(getattr(owner, name)[block.layer], part)
                    assert found.is_floating_point()
                    # An 8-bit layer of bitsandbytes computes in float16.
                    tolerance = 1e-3 if kind == "int8" else 1e-6
                    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), f"{owner.name} {name}"
                    assert torch.equal(found, flat(getattr(block, name).detach(), part))


def caught(check: Callable[[], None]) -> bool:
    try:
        check()
    except (AssertionError, RuntimeError, UnsupportedModelError):
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip", "llava-clip-llama", "paligemma", "pi0"])
def test_weights_are_the_dequantised_ones(name: str, kind: str) -> None:
    model = cv.HookedModel(quantised_model(name, kind))
    assert model.dtype == torch.float32
    with torch.no_grad():
        model(case(name).inputs(model.module, batch=1))
        check_weights(model, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vit", "llava-clip-llama"])
def test_the_unembedding_and_its_bias_give_the_output(name: str, kind: str) -> None:
    model = cv.HookedModel(quantised_model(name, kind))
    inputs, owner = case(name).inputs(model.module, batch=2), list(model.towers.values())[-1]
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs)
        head = model.module.classifier if name == "vit" else model.module.lm_head
        assert torch.allclose(owner.W_U, dequantised(head, kind), atol=1e-3 if kind == "int8" else 1e-6)
        assert cv.readout.unembedding_matrix(owner, gain=False).matrix.shape == owner.W_U.shape
        tolerance = 0.02 * float(out.abs().max()) if kind in ROUNDED else 1e-4
        assert (cache[f"{owner.name}.hook_readout"] @ owner.W_U + owner.b_U - out).abs().max() < tolerance


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "pi0"])
def test_results_values_and_attributions_are_those_of_the_layer(name: str, kind: str) -> None:
    model = cv.HookedModel(quantised_model(name, kind))
    inputs = case(name).inputs(model.module, batch=2)
    owner = list(model.towers.values())[-1]
    seen: list[Tensor] = []
    handle = module_of(owner.blocks[0], "o").register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, "**")
    handle.remove()
    result = cache[owner.name, "result", 0]
    assert torch.allclose(result.sum(-2) + owner.b_O[0], seen[0], atol=1e-5)
    rows = dequantised(module_of(owner.blocks[-1], "mlp_out"), kind)
    vectors = cv.readout.value_vectors(owner, layers=owner.cfg.n_layers - 1, top_k=1)
    expected = (rows @ cv.readout.unembedding_matrix(owner, gain=False).matrix).max(-1).values
    assert torch.allclose(vectors.values.flatten(), expected, atol=1e-5)
    for by in ("component", "head", "neuron"):
        found = cv.readout.direct_attribution(model, cache, (1, 2), by=by)
        assert torch.allclose(found.values.sum(0), found.total, atol=1e-5)
    if name == "vit":
        assert torch.allclose(found.total, out[:, 1] - out[:, 2], atol=1e-5)


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("name", ["vit", "deit-teacher", "dinov2", "llava-clip-llama"])
def test_attributions_sum_where_a_layer_rounds_its_input(name: str, kind: str) -> None:
    """A layer that rounds is no linear map: what it makes of the rounding stands under the bias, and the head's gradient is its weight."""
    model = cv.HookedModel(quantised_model(name, kind))
    inputs = case(name).inputs(model.module, batch=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, "**")
    for by in ("component", "head", "neuron"):
        found = cv.readout.direct_attribution(model, cache, (1, 2), by=by)
        assert torch.allclose(found.values.sum(0), found.total, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", *ROUNDED])
def test_small_edits_of_results_have_small_effects(kind: str) -> None:
    """A layer that rounds its input is not replaced by its weight where one head is scaled by a millionth."""
    model = cv.HookedModel(quantised_model("vit", kind))
    inputs = case("vit").inputs(model.module, batch=2)
    site = "vision.blocks.0.attn.hook_result"
    with torch.no_grad():
        clean, cache = model.run_with_cache(inputs, ["vision.blocks.0.hook_attn_out", site])
        with model.hooks([(site, lambda value, hook: value * (1 + 1e-6))]):
            _, edited = model.run_with_cache(inputs, "vision.blocks.0.hook_attn_out")
        name = "vision.blocks.0.hook_attn_out"
        assert (edited[name] - cache[name]).abs().max() < 1e-4
        gone = model.run(inputs, [edits.ablate(site, heads=[1])])
        handle = module_of(model.vision.blocks[0], "o").register_forward_hook(
            lambda module, args, out: out - cache[site][:, :, 1]
        )
        expected = model.module(**inputs).logits
        handle.remove()
    assert torch.allclose(gone, expected, atol=1e-5)
    assert not torch.allclose(gone, clean, atol=1e-3)


def test_gradients_that_a_packed_layer_would_drop_are_refused() -> None:
    model = cv.HookedModel(quantised_model("vit", "dynamic"))
    inputs = case("vit").inputs(model.module, batch=1)
    for attempt in (
        lambda: model.run_with_cache(inputs, incl_bwd=True, metric=lambda out: out[:, 0]),
        lambda: model.run_with_hooks(inputs, bwd_hooks=[("vision.hook_input", lambda grad, hook: None)]),
        lambda: cv.readout.gradient_times_activation(model, inputs, lambda out: out[:, 0]),
    ):
        with pytest.raises(UnsupportedModelError, match="no gradient passes"):
            attempt()
    assert not model.engine.handles


def test_a_large_bias_costs_no_bits_of_the_weight() -> None:
    """Qwen's key biases are hundreds of times its weights: in half precision, (W + b) - b would be noise."""
    layer = nn.Linear(48, 32, dtype=torch.bfloat16)
    layer.bias.data.fill_(300.0)
    made = quantised(layer.float(), "nf4", torch.bfloat16)
    made.bias.data = made.bias.data.bfloat16()
    expected = dequantised(made, "nf4").bfloat16()
    weight, bias = weights.linear_weight(made, torch.bfloat16)
    assert torch.equal(weight, expected)
    assert torch.equal(bias, torch.full((32,), 300.0, dtype=torch.bfloat16))
    subtracted = made(torch.eye(48, dtype=torch.bfloat16)) - made(torch.zeros(1, 48, dtype=torch.bfloat16))
    assert not torch.allclose(subtracted, expected, atol=1e-2)
    assert made.bias is not None


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16])
def test_every_compute_and_stream_precision(compute: torch.dtype, stream: torch.dtype) -> None:
    made = quantised(nn.Linear(40, 24), "nf4", compute)
    weight, _ = weights.linear_weight(made, stream)
    expected = dequantised(made, "nf4")
    assert weight.dtype == stream
    worst = max(torch.finfo(compute).eps, torch.finfo(stream).eps)
    assert torch.allclose(weight.float(), expected, rtol=worst, atol=1e-6)


def test_a_layer_that_was_repacked_gives_what_it_computes() -> None:
    """On processors with bfloat16 instructions bitsandbytes packs the bytes anew on the first call in eval mode; elsewhere it does not."""
    made = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(nn.Linear(64, 96).state_dict())
    made = made.to("cpu").eval()
    expected = dequantised(made, "nf4")
    for _ in range(2):
        weight, bias = weights.linear_weight(made, torch.float32)
        assert torch.allclose(weight, expected, atol=1e-3)
        assert torch.allclose(bias, made.bias, atol=2e-3)


class StoredInBytes(nn.Linear):
    """Weights kept in float8, computed in the precision of the input."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


class Doubling(nn.Linear):
    """Computes with another weight than the one it stores."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Kinked(nn.Linear):
    """No linear map at all."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def measured(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """By plain PyTorch: the identity and zero pushed through."""
    with torch.no_grad():
        zero = layer(torch.zeros(1, layer.in_features))
        return layer(torch.eye(layer.in_features)) - zero, zero[0]


@pytest.mark.parametrize("kind", ["bytes", "doubling", "parametrised", "spectral", "weight norm", "old weight norm"])
def test_other_ways_to_store_a_weight(kind: str) -> None:
    layer = nn.Linear(20, 12)
    if kind == "bytes":
        layer = StoredInBytes(layer)
    elif kind == "doubling":
        layer = Doubling(20, 12)
    elif kind == "parametrised":
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    elif kind == "spectral":
        nn.utils.parametrizations.spectral_norm(layer)
    elif kind == "weight norm":
        nn.utils.parametrizations.weight_norm(layer)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(layer)
        # The stored tensor is that of the last forward, until the next one.
        layer.weight_g.data.mul_(3.0)
    layer.eval()
    weight, bias = weights.linear_weight(layer)
    expected, offset = measured(layer)
    assert torch.allclose(weight, expected, atol=1e-6)
    assert bias is not None
    assert torch.allclose(bias, offset, atol=1e-6)


def test_reading_a_weight_changes_nothing_in_training_mode() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 12)).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    weights.linear_weight(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(part.training for part in layer.modules())


def test_what_is_no_linear_map_or_has_no_data_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no linear map"):
        weights.linear_weight(Kinked(8, 8))
    with pytest.raises(UnsupportedModelError, match="in_features"):
        weights.linear_weight(nn.Identity())
    with pytest.raises(UnsupportedModelError, match="meta device"):
        weights.linear_weight(nn.Linear(8, 8, device="meta"))


def test_plain_layers_are_not_copied() -> None:
    model = cv.HookedModel(copy.deepcopy(shared_model("vit")))
    block = model.vision.blocks[0]
    stored: Any = module_of(block, "q")
    assert block.W_Q.untyped_storage().data_ptr() == stored.weight.untyped_storage().data_ptr()
    assert block.W_Q.requires_grad


def test_mutant_reading_the_stored_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks notice weights that are read off the storage."""
    model = cv.HookedModel(quantised_model("vit", "nf4"))

    def stored(module: Any, dtype: Any = None, device: Any = None) -> tuple[Tensor, Any]:
        raw = module.weight.detach().float().flatten()
        need = module.in_features * module.out_features
        return raw.repeat(1 + need // len(raw))[:need].view(module.in_features, module.out_features), module.bias

    assert not caught(lambda: check_weights(model, "nf4"))
    monkeypatch.setattr(projections, "linear_weight", stored)
    assert caught(lambda: check_weights(model, "nf4"))


def test_mutant_subtracting_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of large biases notices a measurement with the bias left in."""
    import contextlib

    monkeypatch.setattr(weights, "_without_biases", lambda module: contextlib.nullcontext())
    assert caught(test_a_large_bias_costs_no_bits_of_the_weight)


def test_mutant_rebuilding_from_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of small edits notices an output rebuilt from the dequantised weight."""
    monkeypatch.setattr(block_points, "is_plain_linear", lambda module: True)
    assert caught(lambda: test_small_edits_of_results_have_small_effects("dynamic"))
