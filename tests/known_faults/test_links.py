"""Probabilities under the head's own link: softmax, a sigmoid per column, or none. Truth: torch's functions on the bare model's output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification

import circuitvision as cv
from circuitvision import edits, links
from circuitvision.errors import InputError
from circuitvision.readout.attribution.increase import log_prob_increase
from circuitvision.readout.lens.tuned import TunedLens
from tests.zoo import case, shared_model

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": (20, 12),
    "patch_size": 4,
}


def classifier(kind: str = "vit", **options: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    if kind == "vit":
        module: Any = ViTForImageClassification(ViTConfig(**SIZES, **options))
    else:
        sizes = {**SIZES, "image_size": 20, "mlp_ratio": 2}
        sizes.pop("intermediate_size")
        module = Dinov2ForImageClassification(Dinov2Config(**sizes, **options))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    side = (20, 12) if kind == "vit" else (20, 20)
    return module.double().eval(), {"pixel_values": torch.randn(3, 3, *side, dtype=torch.float64)}


MULTI: dict[str, Any] = {"num_labels": 5, "problem_type": "multi_label_classification"}
EVERY_METRIC: list[Callable[[Tensor], Any]] = [
    lambda logits: cv.metrics.prob(0),
    lambda logits: cv.metrics.logprob(0),
    lambda logits: cv.metrics.kl(logits * 0.5),
]


def check_multi_label(kind: str) -> None:
    module, inputs = classifier(kind, **MULTI)
    model = cv.HookedModel(module)
    assert model.link == "sigmoid"
    with torch.no_grad():
        bare = module(**inputs).logits
        logits = model(inputs)
    for metric in (cv.metrics.prob(2), cv.metrics.prob(2).bind(model)):
        torch.testing.assert_close(metric(logits), bare[:, 2].sigmoid())
    torch.testing.assert_close(cv.metrics.logprob(2)(logits), bare[:, 2].sigmoid().log())
    other = bare.flip(1)
    p, q = other.sigmoid(), bare.sigmoid()
    by_hand = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
    torch.testing.assert_close(cv.metrics.kl(other)(logits), by_hand)
    # Sweeps, and a user's own function that uses a metric without binding it.
    group = [edits.ablate("vision.blocks.0.attn.hook_z", heads=1)]
    with torch.no_grad():
        edited = model.run(inputs, group)
    for metric in (cv.metrics.prob(1), lambda out: cv.metrics.prob(1)(out)):
        found = model.sweep(inputs, [group], metric, progress=False)
        torch.testing.assert_close(found.values[0], edited[:, 1].sigmoid())
        torch.testing.assert_close(found.clean, bare[:, 1].sigmoid())
    for measure, truth in (("prob", bare.sigmoid()), ("logprob", bare.sigmoid().log())):
        lens = cv.readout.logit_lens(model, inputs, targets={0: 0, 4: 4}, measure=measure)
        torch.testing.assert_close(lens.pooled[-1].T, truth[:, [0, 4]])
        best = cv.readout.logit_lens(model, inputs, top_k=2, measure=measure)
        torch.testing.assert_close(best.pooled[-1].T, truth.topk(2).values)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_every_label_of_a_multi_label_head_is_a_question_of_its_own(kind: str) -> None:
    check_multi_label(kind)


def test_assuming_a_softmax_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitvision.model.output_head.OutputHead.link", "softmax")
    with pytest.raises(AssertionError):
        check_multi_label("vit")


def test_one_yes_or_no_is_a_sigmoid() -> None:
    module, inputs = classifier(num_labels=1, problem_type="multi_label_classification")
    model = cv.HookedModel(module)
    with torch.no_grad():
        torch.testing.assert_close(cv.metrics.prob(0)(model(inputs)), module(**inputs).logits[:, 0].sigmoid())


def test_the_score_of_a_term_under_a_sigmoid() -> None:
    module, inputs = classifier(**MULTI)
    model = cv.HookedModel(module)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        found = log_prob_increase(model, cache, 3, by="component")
        mid = cache["vision.blocks.1.hook_resid_mid"][:, 0]
        post = mid + cache["vision.blocks.1.hook_mlp_out"][:, 0]
        scale = cache["vision.blocks.1.hook_resid_post"][:, 0]
        norm, head = module.vit.layernorm, module.classifier

        def said(x: Tensor) -> Tensor:
            width = (scale - scale.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True).add(norm.eps).sqrt()
            normed = (x - x.mean(-1, keepdim=True)) / width * norm.weight + norm.bias
            return torch.nn.functional.logsigmoid(head(normed)[:, 3])

    torch.testing.assert_close(found.values[1, 1], said(post) - said(mid))


NO_DISTRIBUTION = [
    {"num_labels": 1},
    {"num_labels": 1, "problem_type": "regression"},
    {"num_labels": 4, "problem_type": "regression"},
]


@pytest.mark.parametrize("options", NO_DISTRIBUTION, ids=str)
def test_regression_has_no_probabilities(options: dict[str, Any]) -> None:
    module, inputs = classifier(**options)
    model = cv.HookedModel(module)
    assert model.link == "none"
    with torch.no_grad():
        logits = model(inputs)
    for make in EVERY_METRIC:
        for metric in (make(logits), make(logits).bind(model)):
            with pytest.raises(InputError, match="no distribution"):
                metric(logits)
    runs: list[int] = []
    module.register_forward_hook(lambda *_: runs.append(1))
    for measure in ("prob", "logprob"):
        with pytest.raises(InputError, match="no distribution"):
            cv.readout.logit_lens(model, inputs, targets=[0], measure=measure)
    with pytest.raises(InputError, match="no distribution"):
        log_prob_increase(model, inputs, 0)
    assert runs == []
    lens = cv.readout.logit_lens(model, inputs, targets=[0])
    torch.testing.assert_close(lens.pooled[-1, 0], logits[:, 0])
    # A tuned lens of numbers is trained on numbers, not on a divergence that is 0 everywhere.
    tuned = TunedLens.train(model, inputs, steps=3, held_out=0.4)
    assert float(tuned.values[0, 0]) > 0


def test_bare_outputs_of_one_column_are_refused() -> None:
    logits = torch.randn(4, 1)
    for make in EVERY_METRIC:
        with pytest.raises(InputError, match="one column"):
            make(logits)(logits)
    assert cv.metrics.logit_diff(0, 0)(logits).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("vit", "softmax"),
        ("vit-headless", "none"),
        ("clip-vision", "none"),
        ("clip-vision-projection", "none"),
        ("siglip-vision", "none"),
        ("dinov2-headless", "none"),
        ("deit-teacher", "softmax"),
        ("clip", "softmax"),
        ("clip-classifier", "softmax"),
        ("siglip", "sigmoid"),
        ("siglip2", "sigmoid"),
        ("siglip-classifier", "softmax"),
        ("llava-clip-llama", "softmax"),
        ("paligemma2", "softmax"),
        ("pi0", "none"),
    ],
)
def test_the_link_of_every_family(name: str, link: str) -> None:
    module = copy.deepcopy(shared_model(name))
    model, inputs = cv.HookedModel(module), case(name).inputs(module, batch=2)
    assert model.link == link
    with torch.no_grad():
        logits = model(inputs)
    assert links.link_of(logits) == link
    if link == "none":
        for make in EVERY_METRIC:
            with pytest.raises(InputError, match="no distribution"):
                make(logits)(logits)
    elif name.startswith("siglip") and link == "sigmoid":
        torch.testing.assert_close(cv.metrics.prob(1)(logits), module(**inputs).logits_per_image[:, 1].sigmoid())


def test_one_caption_has_no_probability_under_a_softmax() -> None:
    module = shared_model("clip")
    model, inputs = cv.HookedModel(module), case("clip").inputs(module, batch=2)
    one = {**inputs, "input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    with torch.no_grad(), pytest.raises(InputError, match="one column"):
        cv.metrics.prob(0)(model(one), one)
