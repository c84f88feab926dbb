"""What tests of weights share: copies that may be changed, options that make a tower readable, planted value vectors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.model.spec import norm_spec
from tests.parts import has_part, module_of
from tests.zoo import case, shared_model


def hooked(name: str, double: bool = False) -> cv.HookedModel:
    """A copy that a test may change."""
    entry = case(name)
    module = copy.deepcopy(shared_model(name))
    return cv.HookedModel(module.double() if double else module, entry.processor() if entry.processor else None)


def options_for(tower) -> dict:
    """What a tower needs to be read at all, with as many columns as the space it ends in has dimensions."""
    readout = tower.spec.readout
    if tower.connector is not None:
        return {"matrix": torch.eye(tower.cfg.d_model)} if "llava" in tower.family.name else {}
    if readout is None or (readout.head is None and readout.tied_lens is None and readout.finish == "none"):
        return {"matrix": torch.eye(tower.cfg.d_model)}
    options: dict = {"part": "value_path"} if readout.pool == "attention" else {}
    if readout.finish == "contrast":
        width = tower.cfg.d_model if readout.head is None else tower.W_proj.shape[1]
        options["prompts"] = torch.eye(width)
    return options


def plant(tower, layer: int, neuron: int, direction: Tensor) -> None:
    """Make one neuron write ``direction`` to the stream (up to the denominator of a norm that may follow)."""
    block = tower.blocks[layer]
    if has_part(block, "mlp_add"):
        after = module_of(block, "mlp_add")
        gain = after.lambda1 if hasattr(after, "lambda1") else norm_spec(after).offset + after.weight
        direction = direction / gain
    with torch.no_grad():
        module_of(block, "mlp_out").weight[:, neuron] = direction.to(module_of(block, "mlp_out").weight)


def denominator(norm, x: Tensor) -> Tensor:
    spec = norm_spec(norm)
    centred = x - x.mean(-1, keepdim=True) if spec.centred else x
    return (centred.square().mean(-1, keepdim=True) + getattr(norm, spec.eps)).sqrt()


def close(found: Tensor, expected: Tensor, *norms) -> None:
    """Equal in float64, as far as norms that compute in float32 whatever they are given let them be."""
    rough = any(norm is not None and norm_spec(norm).upcast for norm in norms)
    tolerance = 1e-5 if rough else 1e-9
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def uncapped(tower, logits: Tensor) -> Tensor:
    cap = getattr(tower.config, "final_logit_softcapping", None) if tower.spec.readout.finish == "softcap" else None
    return logits if cap is None else cap * torch.atanh(logits / cap)


def run(model, name: str, batch: int = 2):
    inputs = case(name).inputs(model.module, batch=batch)
    with torch.no_grad():
        return model.run_with_cache(inputs)[1]
