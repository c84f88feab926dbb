"""What people hand in as metrics, answers, inputs and labels: truth values, numpy, lists, structures; each works, or gets one clear error."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import HookError, InputError
from circuitvision.patching.activation import activation_patch
from tests.zoo import case, shared_model


def vit(batch: int = 4) -> tuple[cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model("vit"))
    return cv.HookedModel(module), case("vit").inputs(module, batch=batch)


def without_heads(module: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits with the first block's attention output zeroed by a torch hook."""
    blocks = next(part for name, part in module.named_modules() if name.endswith(("layer", "layers")))
    parts = dict(blocks[0].named_modules())
    name = next(n for n in parts if "attention" in n and n.endswith(("output.dense", "o_proj")))
    handle = parts[name].register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        handle.remove()


GROUP = [edits.ablate("vision.blocks.0.hook_attn_out")]
FORMS: dict[str, Any] = {
    "truth values": lambda logits: logits.argmax(-1) == 1,
    "whole numbers": lambda logits: (logits.argmax(-1) == 1).long(),
    "a list": lambda logits: (logits.argmax(-1) == 1).tolist(),
    "an array": lambda logits: (logits.argmax(-1) == 1).numpy(),
    "tensors in a list": lambda logits: list((logits.argmax(-1) == 1).float()),
    "half": lambda logits: (logits.argmax(-1) == 1).to(torch.bfloat16),
}


def check_form(form: str) -> None:
    model, inputs = vit()
    truth = without_heads(model.module, inputs).argmax(-1) == 1
    with torch.no_grad():
        clean = model.module(**inputs).logits.argmax(-1) == 1
    found = model.sweep(inputs, [GROUP], FORMS[form], progress=False)
    assert found.values[0].tolist() == truth.double().tolist()
    assert found.effect[0].tolist() == (truth.double() - clean.double()).tolist()
    assert "SweepResult" in repr(found)
    assert cv.readout.rank_components(found).scores[0] == truth.double().mean() - clean.double().mean()
    assert float(found.to_frame()["effect"].mean()) == float(truth.double().mean() - clean.double().mean())
    assert found._repr_html_()
    assert found.plot() is not None


@pytest.mark.parametrize("form", FORMS)
def test_metrics_of_every_form_give_shares(form: str) -> None:
    check_form(form)


def test_truth_values_left_as_they_are_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitvision.metrics.evaluate", lambda metric, logits, inputs=None: metric(logits))
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        check_form("truth values")


def test_patching_and_relevance_with_truth_values() -> None:
    model, inputs = vit()
    other = {"pixel_values": inputs["pixel_values"].flip(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = activation_patch(
            model,
            metric=FORMS["truth values"],
            clean=inputs,
            corrupt=other,
            sites="vision.blocks.*.hook_mlp_out",
            axes=("layer",),
        )
    assert found.base.dtype == torch.float64
    for call in (
        lambda: model.run_with_cache(inputs, "vision.hook_input", incl_bwd=True, metric=FORMS["truth values"]),
        lambda: cv.readout.gradient_times_activation(model, inputs, FORMS["truth values"], site="vision.hook_input"),
    ):
        with pytest.raises(InputError, match="differentiable"):
            call()


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (lambda logits: logits.sum(), "one number per example"),
        (lambda logits: 3.0, "one number per example"),
        (lambda logits: logits[:3, 0], "returned 3 for an output of 4"),
        (lambda logits: logits[None, :, 0], "one number per example"),
        (lambda logits: {"a": logits[:, 0]}, "one number per example"),
        (lambda logits: logits[:, 0].to(torch.complex64), "one number per example"),
        (lambda logits: ["a"] * 4, "one number per example"),
        (lambda logits: None, "one number per example"),
        ({"a": cv.metrics.prob(1), "b": 3}, "A metric is a function"),
        ([cv.metrics.prob(1)], "holds their names"),
        ("prob", "has no answer"),
    ],
    ids=range(11),
)
def test_other_metrics_get_one_error(metric: Any, said: str) -> None:
    model, inputs = vit()
    with pytest.raises(InputError, match=said):
        model.sweep(inputs, [GROUP], metric, progress=False)
    assert model.engine.stack == []


def test_numbers_that_are_none_are_said_once() -> None:
    model, inputs = vit()
    with pytest.warns(UserWarning, match="not a number in 2 of 4 examples") as seen:
        model.sweep(
            inputs,
            [GROUP, []],
            lambda logits: logits[:, 0].index_fill(0, torch.tensor([0, 2]), float("nan")),
            progress=False,
        )
    assert len(seen) == 1


ANSWERS: list[Any] = [
    np.array([0, 1, 2, 1]),
    np.array([0, 1, 2, 1], dtype=np.uint8),
    [np.int64(0), np.int64(1), 2, 1],
    torch.tensor([0, 1, 2, 1]),
    list(torch.tensor([0, 1, 2, 1])),
]


@pytest.mark.parametrize("answers", ANSWERS, ids=lambda answers: type(answers).__name__)
def test_answers_of_every_form(answers: Any) -> None:
    model, inputs = vit()
    with torch.no_grad():
        logits = model(inputs)
    truth = logits.softmax(-1)[torch.arange(4), torch.tensor([0, 1, 2, 1])]
    for metric in (cv.metrics.prob(answers), cv.metrics.prob(answers).bind(model)):
        torch.testing.assert_close(metric(logits), truth)
    assert cv.metrics.logit_diff(answers, np.int64(3)).bind(model)(logits).shape == (4,)
    assert cv.metrics.logprob(np.int64(3))(logits).shape == (4,)
    words = np.array([model.module.config.id2label[number] for number in (0, 1, 2, 1)])
    torch.testing.assert_close(cv.metrics.prob(words).bind(model)(logits), truth)


@pytest.mark.parametrize("answers", [True, [True, False], np.array([True, False]), 1.0, [0.5, 1.0], np.array([0.5])])
def test_answers_that_are_no_ids(answers: Any) -> None:
    with pytest.raises(InputError, match="An answer is an id"):
        cv.metrics.prob(answers)


def test_outputs_as_transformers_returns_them() -> None:
    model, inputs = vit()
    with torch.no_grad():
        output = model.module(**inputs)
    for given in (output, dict(output), None):
        for metric in (cv.metrics.prob(1), cv.metrics.kl(output.logits), cv.metrics.action_dim(0)):
            with pytest.raises(InputError, match="reads the output tensor"):
                metric(given)
    with pytest.raises(InputError, match="reads the output tensor"):
        cv.metrics.kl(output)
    torch.testing.assert_close(cv.metrics.prob(1)(output.logits.numpy()), output.logits.softmax(-1)[:, 1])


def test_numpy_inputs_everywhere() -> None:
    model, inputs = vit()
    pixels = inputs["pixel_values"].numpy()
    with torch.no_grad():
        truth = model.module(**inputs).logits
        for given in ({"pixel_values": pixels}, {"pixel_values": pixels.astype(np.float64)}, pixels):
            torch.testing.assert_close(model(given), truth)
            _, cache = model.run_with_cache(given)
            assert isinstance(cache.inputs["pixel_values"], Tensor)
            torch.testing.assert_close(cv.readout.logit_lens(model, given, targets=[1]).pooled[-1, 0], truth[:, 1])
            assert model.tokens(given)["vision"].n_rows == 4
            model.sweep(given, [GROUP], cv.metrics.prob(1), progress=False)
    tokens = model.tokens(inputs["pixel_values"])
    assert tokens["vision"].n_rows == 4
    language = cv.HookedModel(shared_model("llava-clip-llama"))
    tensors = case("llava-clip-llama").inputs(language.module, batch=2, padding="left")
    arrays = {name: value.numpy() for name, value in tensors.items()}
    with torch.no_grad():
        logits = language(arrays)
        torch.testing.assert_close(logits, language.module(**tensors).logits)
        torch.testing.assert_close(cv.metrics.prob(5)(logits, arrays), cv.metrics.prob(5)(logits, tensors))


def test_empty_caches_are_said() -> None:
    model = cv.HookedModel(shared_model("llava-clip-llama"))
    ids = torch.tensor([[1, 7, 8, 9]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        with pytest.raises(HookError, match="vision"):
            model.run_with_cache(given, "vision.**")
        with pytest.warns(UserWarning, match="The cache is empty"), model.record("vision.**"):
            model(given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(model.run_with_cache(given)[1]) > 0


def test_labels_per_patch_are_told_how() -> None:
    model, inputs = vit(batch=6)
    n_patches = model.tokens(inputs)["vision"].n_positions - 1
    labels = np.random.default_rng(0).integers(0, 2, (6, n_patches))
    for given in (labels, labels.tolist(), torch.from_numpy(labels)):
        with pytest.raises(InputError, match="linear_probe"):
            cv.readout.linear_probe(model, inputs, given, positions="patch")
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    site = "vision.blocks.0.hook_resid_post"
    vectors = {site: cache[site][:, 1:].flatten(0, 1)}
    groups = np.repeat(np.arange(6), n_patches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cv.readout.linear_probe(None, vectors, labels.flatten(), groups=groups, shuffles=2)
    assert found.values.numel() >= 1
