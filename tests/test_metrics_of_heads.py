"""Metrics of heads that are no softmax: every metric of a multi-label and of a regression head, through methods, or one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import circuitvision as cv
from circuitvision import edits, metrics
from circuitvision.errors import InputError
from circuitvision.patching import activation_patch, modulate

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 12, "patch_size": 4,
}  # fmt: skip
HEADS = {
    "multi-label": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "yes or no": {"num_labels": 1, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 4, "problem_type": "regression"},
    "one value": {"num_labels": 1, "problem_type": "regression"},
}


def headed(kind: str) -> tuple[cv.HookedModel, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    module = ViTForImageClassification(ViTConfig(**SIZES, **HEADS[kind]))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    clean, corrupt = torch.randn(2, 3, 3, 12, 12, dtype=torch.float64)
    return cv.HookedModel(module.double().eval()), {"pixel_values": clean}, {"pixel_values": corrupt}


def truths(kind: str, out: Tensor, reference: Tensor) -> dict[str, Tensor | None]:
    """What every metric of column 0 (against column 1) is, from the bare output; None where it makes no sense."""
    own, several, yes_no = out[:, 0], out.shape[1] > 1, "regression" not in kind and kind != "one value"
    other = out[:, 1] if several else own
    ranked = several and yes_no
    p, q = reference.sigmoid(), out.sigmoid()
    m = (p + q) / 2

    def terms(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).sum(-1)

    best = out[:, 1:].max(1).values if several else own
    return {
        "logit": own,
        "logit_diff": own - other if several else None,
        "prob": own.sigmoid() if yes_no else None,
        "logprob": own.sigmoid().log() if yes_no else None,
        "kl": terms(p, q) if yes_no else None,
        "js": (terms(p, m) + terms(q, m)) / 2 if yes_no else None,
        "rank": 1.0 + (out > own[:, None]).sum(1) if ranked else None,
        "margin": own - best if ranked else None,
        "accuracy": (own > best).double() if ranked else None,
        "interchange_accuracy": (own > best).double() if ranked else None,
        "transfer_coefficient": ((out - out.flip(0)) * (reference - out.flip(0))).sum(1) / (reference - out.flip(0)).square().sum(1),
        "action_dim": None,
        "action_distance": None,
        "success": None,
    }  # fmt: skip


def made(name: str, out: Tensor, reference: Tensor) -> Any:
    answered: dict[str, Any] = {
        "logit_diff": {"answer": 0, "foil": 1},
        "interchange_accuracy": {"answer": 0, "foil": 1},
    }
    if name in ("kl", "js", "action_distance"):
        return getattr(metrics, name)(reference)
    if name == "transfer_coefficient":
        return metrics.transfer_coefficient(reference, out.flip(0))
    if name == "success":
        return metrics.success()
    return getattr(metrics, name)(**answered.get(name, {})) if name in answered else getattr(metrics, name)(0)


@pytest.mark.parametrize("kind", list(HEADS))
def test_every_metric_of_a_head_is_its_equation_or_one_clear_error(kind: str) -> None:
    model, clean, corrupt = headed(kind)
    with torch.no_grad():
        out, reference = model(clean), model(corrupt)
        bare, other = model.module(**clean).logits, model.module(**corrupt).logits
    expected = truths(kind, bare, other)
    assert set(metrics.NAMES) <= set(expected)
    for name, truth in expected.items():
        for metric in (made(name, out, reference), made(name, out, reference).bind(model)):
            if truth is None:
                with pytest.raises(InputError):
                    metric(out, clean)
            else:
                torch.testing.assert_close(metric(out, clean), truth.double(), rtol=1e-9, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("kind", list(HEADS))
def test_methods_measure_them(kind: str) -> None:
    model, clean, corrupt = headed(kind)
    group = [edits.ablate("vision.blocks.0.attn.hook_z", heads=1)]
    with torch.no_grad():
        edited = model.run(clean, group)
        out, reference = model.module(**clean).logits, model.module(**corrupt).logits
    named = {"logit": metrics.logit(0)}
    if kind in ("multi-label", "yes or no"):
        named |= {"prob": metrics.prob(0), "kl": "kl", "js": "js"}
    swept = model.sweep(clean, [group], named, progress=False)
    torch.testing.assert_close(swept.values[0, 0], edited[:, 0])
    patched = activation_patch(
        model, metric=named, clean=clean, corrupt=corrupt, sites="vision.blocks.*.hook_resid_post", axes=("layer",),
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(patched.values[0, -1] + patched.base[0], out[:, 0])
    torch.testing.assert_close(patched.base[0], reference[:, 0])
    if "prob" in named:
        torch.testing.assert_close(patched.values[1, -1] + patched.base[1], out[:, 0].sigmoid())
        torch.testing.assert_close(
            patched.values[2, -1] + patched.base[2], torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0
        )
    heads = modulate(model, clean, metrics.logit(0), heads={"vision L0H0": 1.0}, n_random=1, progress=False)
    torch.testing.assert_close(heads.values[0], out[:, 0])
    if kind != "multi-label":
        with pytest.raises(InputError):
            model.sweep(clean, [group], metrics.accuracy(0), progress=False)
