# ruff: noqa: E501
"""Two studies that differ in one thing never have equal provenance, and a study that is repeated has the same."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import digests, edits, metrics, provenance, results
from circuitvision import readout as ro
from circuitvision.circuits import ablation_check, head_importance
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.model.edits.base import EditGroup
from circuitvision.patching import activation_patch
from circuitvision.results import Result
from tests.zoo import case, shared_model

Z = "language.blocks.1.attn.hook_z"
LIMIT = 0.0


@functools.cache
def _module(name: str) -> Any:
    return shared_model(name)


def wrapped(name: str, change: Callable[[Any], Any] | None = None) -> Any:
    module = _module(name)
    if change is not None:
        module = copy.deepcopy(module)
        change(module)
    processor = case(name).processor
    return cv.HookedModel(module, processor() if processor else None)


@functools.cache
def inputs_of(name: str, seed: int = 0, batch: int = 3, padding: str | None = None) -> dict[str, Any]:
    return case(name).inputs(_module(name), batch=batch, seed=seed, padding=padding)


def one_pixel(inputs: dict[str, Any]) -> dict[str, Any]:
    pixels = inputs["pixel_values"].clone()
    pixels.view(-1)[5] += 1e-6
    return {**inputs, "pixel_values": pixels}


def bits(provenance_: dict[str, Any]) -> str:
    return json.dumps(provenance.without_dates(provenance_), sort_keys=True)


def one_weight(module: Any) -> None:
    next(p for p in module.parameters() if p.ndim == 2).data[0, 0] += 1e-3


def all_weights(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.001)


VLM, VIT, DUAL = "llava-clip-llama", "vit", "clip"
KL_REFERENCE = wrapped(VLM)(inputs_of(VLM)).detach()


# -- sweeps ----------------------------------------------------------------------------------------------------------------


def of_answer(number: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits[:, -1, number]


def above_limit(logits: Tensor) -> Tensor:
    return logits[:, -1, 2] - LIMIT


def swept(
    change: Any = None,
    inputs: Any = None,
    group: Any = None,
    metric: Any = None,
    around: Any = None,
    dtype: torch.dtype | None = None,
    **keywords: Any,
) -> Any:
    model = wrapped(VLM, (lambda m: m.to(dtype)) if dtype else change)
    given = inputs_of(VLM) if inputs is None else inputs
    if dtype:
        given = {name: v.to(dtype) if v.is_floating_point() else v for name, v in given.items()}
    group = [edits.scale(Z, 0.5, heads=1)] if group is None else group
    metric = metrics.logit_diff(2, 3) if metric is None else metric
    with around(model) if around else contextlib.nullcontext():
        return model.sweep(given, [group], metric, progress=False, **keywords)


@functools.cache
def source(seed: int, site: str = Z) -> Tensor:
    model = wrapped(VLM)
    with torch.no_grad():
        return model.run_with_cache(inputs_of(VLM, seed), site)[1][site]


def hook_that_adds(number: float) -> Callable[[Tensor, Any], Tensor]:
    return lambda value, hook: value + number


def doubled(value: Tensor, hook: Any) -> Tensor:
    return 2 * value


def box(left: int) -> Any:
    tokens = wrapped(VLM).tokens(inputs_of(VLM))["language"]
    return tokens.image(0).box(left, 0, left + 8, 8)


def trained_mode(module: Any) -> None:
    module.model.language_model.train()


def of_class(place: int) -> Any:
    class Answer:
        number = place

        def __call__(self, logits: Tensor) -> Tensor:
            return logits[:, -1, self.number]

    return Answer()


def of_static_method(place: Callable[[], int]) -> Any:
    class Answer:
        number = staticmethod(place)

        def __call__(self, logits: Tensor) -> Tensor:
            return logits[:, -1, self.number()]

    return Answer()


def of_module(place: int) -> Callable[[Tensor], Tensor]:
    class Answer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number = place

        def forward(self, logits: Tensor) -> Tensor:
            return logits[:, -1, self.number]

    return Answer()


def of_a_file(place: int) -> Callable[[Tensor], Tensor]:
    """A metric that calls what a module of the user's own holds."""
    helpers, scope = types.ModuleType("helpers_of_somebody"), {"__name__": "helpers_of_somebody"}
    exec(f"NUMBER = {place}\ndef take(logits): return logits[:, -1, NUMBER]", scope)
    vars(helpers).update(scope)
    here = {"__name__": "notebook_of_somebody", "helpers": helpers}
    return eval("lambda logits: (lambda inner: helpers.take(inner))(logits)", here)


def other_forward(module: Any) -> None:
    inner = module.lm_head.forward
    module.lm_head.forward = lambda value: 2 * inner(value)


SWEEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "inputs": ({}, {"inputs": inputs_of(VLM, 1)}),
    "one pixel": ({}, {"inputs": one_pixel(inputs_of(VLM))}),
    "one word": ({}, {"inputs": {**inputs_of(VLM), "input_ids": inputs_of(VLM)["input_ids"].clone().index_fill_(1, torch.tensor([-1]), 2)}}),
    "the mask": ({}, {"inputs": {**inputs_of(VLM), "attention_mask": inputs_of(VLM)["attention_mask"].clone().index_fill_(1, torch.tensor([-1]), 0)}}),
    "answer": ({}, {"metric": metrics.logit_diff(4, 3)}),
    "foil": ({}, {"metric": metrics.logit_diff(2, 4)}),
    "answers per example": ({"metric": metrics.prob([1, 2, 3])}, {"metric": metrics.prob([1, 3, 2])}),
    "answers as a tensor": ({"metric": metrics.prob(torch.tensor([1, 2, 3]))}, {"metric": metrics.prob(torch.tensor([1, 3, 2]))}),
    "kind of metric": ({"metric": metrics.prob(2)}, {"metric": metrics.logprob(2)}),
    "place of the answer": ({}, {"metric": metrics.logit_diff(2, 3, position=3)}),
    "reference of kl": ({"metric": metrics.kl(KL_REFERENCE)}, {"metric": metrics.kl(KL_REFERENCE + 1)}),
    "function body": ({"metric": lambda x: x[:, -1, 2]}, {"metric": lambda x: x[:, -1, 3]}),
    "function closure": ({"metric": of_answer(2)}, {"metric": of_answer(3)}),
    "function default": ({"metric": lambda x, i=2: x[:, -1, i]}, {"metric": lambda x, i=3: x[:, -1, i]}),
    "partial": ({"metric": functools.partial(torch.mul, other=2.0)}, {"metric": functools.partial(torch.mul, other=3.0)}),
    "attribute of a metric's class": ({"metric": of_class(2)}, {"metric": of_class(3)}),
    "static method of a metric": ({"metric": of_static_method(lambda: 2)}, {"metric": of_static_method(lambda: 3)}),
    "attribute of a metric that is a module": ({"metric": of_module(2)}, {"metric": of_module(3)}),
    "function in a file of one's own": ({"metric": of_a_file(2)}, {"metric": of_a_file(3)}),
    "edit kind": ({}, {"group": [edits.ablate(Z, heads=1)]}),
    "edit number": ({}, {"group": [edits.scale(Z, 0.25, heads=1)]}),
    "edit heads": ({}, {"group": [edits.scale(Z, 0.5, heads=0)]}),
    "edit positions": ({}, {"group": [edits.scale(Z, 0.5, heads=1, positions=2)]}),
    "edit steps": ({}, {"group": [edits.scale(Z, 0.5, heads=1, steps="prefill")]}),
    "edit site": ({}, {"group": [edits.scale("language.blocks.0.attn.hook_z", 0.5, heads=1)]}),
    "edit tensor": ({"group": [edits.replace(Z, source(1))]}, {"group": [edits.replace(Z, source(2))]}),
    "edit tensor in one entry": ({"group": [edits.replace(Z, source(1))]}, {"group": [edits.replace(Z, source(1).clone().index_fill_(1, torch.tensor([1]), 0.0))]}),
    "edit tensor's type": ({"group": [edits.replace(Z, source(1))]}, {"group": [edits.replace(Z, source(1).double())]}),
    "source by site": ({"group": [edits.replace("language.blocks.*.attn.hook_z", {Z: source(1)})]}, {"group": [edits.replace("language.blocks.*.attn.hook_z", {Z: source(2)})]}),
    "mask": ({"group": [edits.scale(Z, 0.5, positions=torch.arange(16) > 4)]}, {"group": [edits.scale(Z, 0.5, positions=torch.arange(16) > 5)]}),
    "selection": ({"group": [edits.scale(Z, 0.5, positions=box(0))]}, {"group": [edits.scale(Z, 0.5, positions=box(8))]}),
    "keys": ({"group": [edits.block_attention("language", "last", [1])]}, {"group": [edits.block_attention("language", "last", [2])]}),
    "layers": ({"group": [edits.block_attention("language", "last", [1], layers=0)]}, {"group": [edits.block_attention("language", "last", [1], layers=1)]}),
    "seed of an edit": ({"group": [edits.ablate(Z, "resample", seed=0)]}, {"group": [edits.ablate(Z, "resample", seed=1)]}),
    "average": ({"group": [edits.ablate(Z, "mean")]}, {"group": [edits.ablate(Z, "mean", average="all")]}),
    "data set of means": ({"group": [edits.ablate(Z, "mean", dataset=inputs_of(VLM, 1))]}, {"group": [edits.ablate(Z, "mean", dataset=inputs_of(VLM, 2))]}),
    "function of apply": ({"group": [edits.apply(Z, hook_that_adds(1.0))]}, {"group": [edits.apply(Z, hook_that_adds(2.0))]}),
    "order of edits": (
        {"group": [edits.scale(Z, 0.5), edits.steer(Z, torch.ones(1))]},
        {"group": [edits.steer(Z, torch.ones(1)), edits.scale(Z, 0.5)]},
    ),
    "axes": ({}, {"axes": {"layer": [1]}}),
    "batch size": ({}, {"batch_size": 1}),
    "one weight": ({}, {"change": one_weight}),
    "a buffer that is not saved": ({}, {"change": lambda m: m.model.language_model.rotary_emb.inv_freq.mul_(1.5)}),
    "a setting of the configuration": ({}, {"change": lambda m: setattr(m.config.text_config, "rms_norm_eps", 1e-3)}),
    "a number in a layer": ({}, {"change": lambda m: setattr(m.model.language_model.layers[0].self_attn, "scaling", 0.7)}),
    "an epsilon in a layer": ({}, {"change": lambda m: setattr(m.model.language_model.norm, "variance_epsilon", 0.5)}),
    "a forward that was replaced": ({}, {"change": other_forward}),
    "implementation of attention": ({}, {"change": lambda m: m.set_attn_implementation("eager")}),
    "dtype": ({}, {"dtype": torch.float64}),
    "training": ({}, {"change": trained_mode}),
    "hooks around the run": ({}, {"around": lambda model: model.hooks([(Z, doubled)])}),
    "value of a hook": (
        {"around": lambda model: model.hooks([(Z, hook_that_adds(1.0))])},
        {"around": lambda model: model.hooks([(Z, hook_that_adds(2.0))])},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", SWEEPS)
def test_sweeps_that_differ_in_one_thing_have_other_provenance(what):
    if "closure" not in what and what in ("partial", "source by site"):
        one, other = SWEEPS[what]
        told = [json.dumps(digests.plain(made), sort_keys=True) for made in (one, other)]
        again = json.dumps(digests.plain(SWEEPS[what][0]), sort_keys=True)
        assert told[0] != told[1]
        assert told[0] == again
        return
    one, other = SWEEPS[what]
    first, again, second = swept(**one), swept(**one), swept(**other)
    assert bits(first.provenance) == bits(again.provenance)
    assert bits(first.provenance) != bits(second.provenance)
    assert torch.equal(first.values, again.values) or what == "training"


def test_a_global_that_a_metric_names_is_part_of_the_study(monkeypatch):
    first = swept(metric=above_limit)
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 1.0)
    assert bits(first.provenance) != bits(swept(metric=above_limit).provenance)


def test_three_studies_with_one_label_have_other_edits():
    first, second = (swept(group=[edits.replace(Z, source(seed), heads=1)]) for seed in (1, 2))
    assert first.labels == second.labels == [repr(group) for group in first.edits]
    assert first.edits != second.edits
    assert first.edits == swept(group=[edits.replace(Z, source(1).clone(), heads=1)]).edits


# -- every other result ----------------------------------------------------------------------------------------------------


def patched(clean: int = 1, corrupt: int = 2, metric: Any = None, **keywords: Any) -> Any:
    model = wrapped(VLM)
    given = {"sites": "language.blocks.*.attn.hook_z", **keywords}
    return activation_patch(
        model,
        metric=metric or metrics.logit_diff(2, 3),
        clean=inputs_of(VLM, clean),
        corrupt=inputs_of(VLM, corrupt),
        **given,
    )


def important(clean: int = 1, **keywords: Any) -> Any:
    model = wrapped(VLM)
    given = {"top_k": 1, "towers": ["language"], **keywords}
    return head_importance(
        model, metric=metrics.logit_diff(2, 3), clean=inputs_of(VLM, clean), corrupt=inputs_of(VLM, 2), **given
    )


def checked(clean: int = 1, answer: int = 2, heads: Any = ("l.a0.h1",), **keywords: Any) -> Any:
    pairs = Pairs(inputs=inputs_of(VLM, clean), corrupt_inputs=inputs_of(VLM, 2), answers=answer, foils=3)
    return ablation_check(wrapped(VLM), pairs, list(heads), **{"n_random": 2, **keywords})


def on_cache(
    function: Callable[..., Any], seed: int = 1, everything: bool = True, hooks: Any = (), **keywords: Any
) -> Any:
    model = wrapped(VLM)
    with torch.no_grad(), model.hooks(list(hooks)):
        _, cache = model.run_with_cache(inputs_of(VLM, seed), "**" if everything else None)
    return function(model, cache, **keywords)


def of_cache(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, cache, **keywords: function(model, cache, **{"tower": "language", **keywords})


def of_tower(function: Callable[..., Any], change: Any = None, **keywords: Any) -> Any:
    model = wrapped(VIT, change)
    return function(model.vision, **keywords)


def on_model(
    function: Callable[..., Any],
    name: str = VIT,
    seed: int = 1,
    metric: Any = None,
    change: Any = None,
    **keywords: Any,
) -> Any:
    return function(wrapped(name, change), inputs_of(name, seed), metric or metrics.prob(2), **keywords)


def curve(function: Callable[..., Any], scores: int = 0, **keywords: Any) -> Any:
    generator = torch.Generator().manual_seed(scores)
    length = wrapped(VIT).tokens(inputs_of(VIT, 1))["vision"].n_positions
    relevance = torch.randn(3, length, generator=generator)
    return on_model(
        lambda *given, **more: function(*given, relevance, **more), **{"random_orders": 1, "steps": 2, **keywords}
    )


LABELS = [0, 1] * 8


def probed(
    seed: int = 0, labels: Any = LABELS, name: str = VIT, inputs: int = 1, function: Any = None, **keywords: Any
) -> Any:
    data = inputs_of(name, inputs, 16)
    given = {"positions": "cls", "shuffles": 1, "penalty": 1.0, **keywords} if function is None else keywords
    return (function or ro.linear_probe)(
        wrapped(name),
        data,
        *([labels] if function is None else []),
        **given,
        **({"seed": seed} if function is None else {}),
    )


def vectors(seed: int = 0) -> dict[str, Tensor]:
    return {"a": torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)), "b": torch.eye(16)[:, :4] + 0.1}


def mean_lens(model: Any, cache: Any, **keywords: Any) -> Any:
    return ro.logit_lens(model, cache, "language", **{"targets": {2: 2, 3: 3}, **keywords})


def tuned(seed: int = 0, data: int = 1, **keywords: Any) -> Any:
    return ro.TunedLens.train(wrapped(VIT), inputs_of(VIT, data), steps=2, seed=seed, **keywords)


P = functools.partial
OTHERS: dict[str, tuple[Callable[..., Any], dict[str, dict[str, Any]]]] = {
    "activation_patch": (patched, {
        "clean": {"clean": 3}, "corrupt": {"corrupt": 3}, "metric": {"metric": metrics.logit_diff(3, 2)}, "mode": {"mode": "noise"},
        "axes": {"axes": ("layer",)}, "sites": {"sites": "language.blocks.*.attn.hook_v"},
    }),
    "head_importance": (important, {"clean": {"clean": 3}, "top_k": {"top_k": 2}, "mode": {"mode": "noise"}, "towers": {"towers": ["vision", "language"]}}),
    "ablation_check": (checked, {
        "pairs": {"clean": 3}, "answer": {"answer": 4}, "heads": {"heads": ("l.a0.h2",)}, "seed": {"seed": 1}, "draws": {"n_random": 1},
        "reference": {"reference": Pairs(inputs=inputs_of(VLM, 4), corrupt_inputs=inputs_of(VLM, 5))}, "place": {"position": 2},
    }),
    "logit_lens": (P(on_cache, mean_lens), {
        "inputs": {"seed": 2}, "targets": {"targets": {"two": 2, "four": 4}}, "norm": {"norm": "frozen"}, "measure": {"measure": "prob"},
        "sites": {"sites": "attn_out"}, "top_k": {"targets": None, "top_k": 3}, "hooks": {"hooks": [(Z, doubled)]},
        "value of a hook": {"hooks": [(Z, hook_that_adds(3.0))]},
    }),
    "contrast": (lambda foil=3: on_cache(mean_lens).contrast(2, foil), {"foil": {"foil": 2}}),
    "direct_attribution": (P(on_cache, P(ro.direct_attribution, direction=2, tower="language")), {
        "inputs": {"seed": 2}, "direction": {"direction": 3}, "by": {"by": "component"}, "position": {"position": 3},
    }),
    "source_attribution": (P(on_cache, P(ro.source_attribution, direction=2, tower="language")), {"inputs": {"seed": 2}, "direction": {"direction": 3}, "layers": {"layers": [0]}}),
    "log_prob_increase": (P(on_cache, P(ro.log_prob_increase, answer=2, tower="language")), {"inputs": {"seed": 2}, "answer": {"answer": 3}, "by": {"by": "component"}}),
    "attention_mass": (P(on_cache, of_cache(ro.attention_mass)), {
        "inputs": {"seed": 2}, "tower": {"tower": "vision"}, "queries": {"queries": "last"}, "layers": {"layers": [0]}, "spans": {"spans": {"a": [1]}},
    }),
    "attention_entropy": (P(on_cache, of_cache(ro.attention_entropy)), {"inputs": {"seed": 2}, "queries": {"queries": "last"}}),
    "attention_maps": (P(on_cache, of_cache(ro.attention_maps)), {"inputs": {"seed": 2}, "query": {"query": 3}}),
    "rollout": (P(on_cache, of_cache(ro.rollout)), {"inputs": {"seed": 2}, "residual": {"residual": 0.4}, "fusion": {"head_fusion": "max"}, "discard": {"discard": 0.1}}),
    "distance_profile": (P(on_cache, P(of_cache(ro.distance_profile), tower="vision")), {"inputs": {"seed": 2}, "metric": {"metric": "euclidean"}}),
    "position_pattern": (P(on_cache, P(of_cache(ro.position_pattern), tower="vision")), {"inputs": {"seed": 2}, "layers": {"layers": [0]}}),
    "gradient_times_activation": (P(on_model, ro.gradient_times_activation), {
        "inputs": {"seed": 2}, "metric": {"metric": metrics.prob(3)}, "site": {"site": "pixels"}, "weights": {"change": one_weight},
    }),
    "integrated_gradients": (P(on_model, P(ro.integrated_gradients, steps=4)), {"baseline": {"baseline": "zero"}, "steps": {"steps": 5}, "rule": {"rule": "midpoint"}}),
    "occlusion": (P(on_model, P(ro.occlusion, progress=False)), {"inputs": {"seed": 2}, "baseline": {"baseline": "zero"}, "window": {"window": 2}, "metric": {"metric": metrics.prob(3)}}),
    "legrad": (P(on_model, ro.legrad), {"inputs": {"seed": 2}, "layers": {"layers": [0]}, "metric": {"metric": metrics.prob(3)}}),
    "chefer_relevance": (P(on_model, ro.chefer_relevance), {"inputs": {"seed": 2}, "metric": {"metric": metrics.prob(3)}}),
    "perturbation_curve": (P(curve, ro.perturbation_curve), {
        "scores": {"scores": 1}, "order": {"order": "insertion"}, "metric": {"metric": metrics.prob(3)}, "inputs": {"seed": 2}, "baseline": {"baseline": "zero"}, "steps": {"steps": 3}, "orders": {"random_orders": 2}, "level": {"level": "pixel"},
    }),
    "linear_probe": (probed, {
        "seed": {"seed": 1}, "labels": {"labels": [1, 0] * 8}, "data": {"inputs": 2}, "split": {"test_share": 0.5}, "folds": {"folds": 4},
        "shuffles": {"shuffles": 3}, "penalty": {"penalty": 0.1}, "positions": {"positions": "patch"}, "groups": {"groups": [n // 2 for n in range(16)]},
    }),
    "linear_probe of vectors": (lambda data=0, **more: ro.linear_probe(None, vectors(data), LABELS, shuffles=1, penalty=1.0, **more), {"vectors": {"data": 1}, "seed": {"seed": 3}}),
    "collect": (P(probed, function=ro.collect, sites="vision.blocks.0.hook_resid_post"), {
        "data": {"inputs": 2}, "positions": {"positions": "cls"}, "site": {"sites": "vision.blocks.1.hook_resid_post"},
    }),
    "max_activating_examples": (P(probed, function=ro.max_activating_examples, site="vision.blocks.0.mlp.hook_post"), {
        "data": {"inputs": 2}, "top_k": {"top_k": 2}, "pool": {"pool": "mean"}, "through": {"through": torch.eye(40)[:3]}, "units": {"units": [0]},
    }),
    "pca": (lambda data=0, **more: ro.pca(vectors(data)["a"], **more), {"vectors": {"data": 1}, "components": {"n_components": 3}, "labels": {"labels": LABELS}}),
    "pca of sites": (lambda data=0, **more: ro.pca(vectors(data), **more), {"vectors": {"data": 1}}),
    "cka": (lambda data=0, **more: ro.cka(vectors(data), **more), {"vectors": {"data": 1}, "unbiased": {"unbiased": True}, "second": {"second": vectors(2)}}),
    "decision_layer": (lambda last=1, **more: ro.decision_layer([[0, 1], [1, 1], [1, last]], **{"k": 1, **more}), {"predictions": {"last": 0}, "k": {"k": 2}, "target": {"target": [1, 1]}}),
    "rank_components": (lambda scale=1.0, **more: ro.rank_components(torch.tensor([1.0, -2.0, 3.0]) * scale, **more), {"scores": {"scale": 2.0}, "by": {"by": "size"}, "labels": {"labels": ["a", "b", "c"]}}),
    "value_vectors": (P(of_tower, ro.value_vectors), {"weights": {"change": one_weight}, "top_k": {"top_k": 2}, "component": {"component": "ov"}, "layers": {"layers": [0]}, "targets": {"targets": [1, 2]}}),
    "class_value_agreement": (P(of_tower, P(ro.class_value_agreement, draws=2)), {"weights": {"change": one_weight}, "component": {"component": "ov"}, "seed": {"seed": 1}, "targets": {"targets": [1, 2]}}),
    "composition_scores": (P(of_tower, P(ro.composition_scores, draws=2)), {"weights": {"change": one_weight}, "kind": {"kind": "Q"}, "seed": {"seed": 1}, "gain": {"gain": False}}),
    "singular_vectors": (
        lambda head=0, change=None, **more: of_tower(lambda tower: ro.singular_vectors(ro.ov_circuit(tower, 0, head), **more), change),
        {"head": {"head": 1}, "k": {"k": 2}, "weights": {"change": all_weights}},
    ),
    "TunedLens": (tuned, {"seed": {"seed": 1}, "data": {"data": 2}, "rate": {"learning_rate": 1e-3}}),
    "bilinear_attribution": (
        lambda seed=1, **more: ro.bilinear_attribution(wrapped(DUAL), inputs_of(DUAL, seed), **more), {"inputs": {"seed": 2}, "by": {"by": "head"}},
    ),
}  # fmt: skip
PAIRS = [(name, what) for name, (_, variants) in OTHERS.items() for what in variants]


@functools.lru_cache(maxsize=4)
def _base(name: str) -> str:
    first, again = (OTHERS[name][0]() for _ in range(2))
    assert bits(first.provenance) == bits(again.provenance)
    return bits(first.provenance)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "what"), PAIRS)
def test_studies_that_differ_in_one_thing_have_other_provenance(name, what):
    make, variants = OTHERS[name]
    assert _base(name) != bits(make(**variants[what]).provenance)


def test_every_public_function_that_returns_a_result_describes_its_call():
    package = Path(cv.__file__).parent
    classes = {"Result", "Collected"}
    trees = {path: ast.parse(path.read_text()) for path in package.rglob("*.py") if "plots" not in path.parts}
    for _ in range(3):
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and {getattr(base, "id", "") for base in node.bases} & classes:
                    classes.add(node.name)
    names = re.compile(rf"\b({'|'.join(classes)})\b")
    missing = []
    for path, tree in trees.items():
        for owner in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))):
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef) or node.returns is None or node.name.startswith("_"):
                    continue
                marked = any("with_provenance" in ast.unparse(d) for d in node.decorator_list)
                if names.search(ast.unparse(node.returns)) and not marked:
                    missing.append(f"{path.name}:{getattr(owner, 'name', '')}.{node.name}")
    # What only reads files, chooses, joins or reduces by nothing that is given, or serves a public function that describes the call.
    assert sorted(missing) == [
        "acdc.py:.discovery_of",
        "activation.py:PatchingResult.flip_layer",
        "coalitions.py:ConditionalEffects.self_repair",
        "coalitions.py:InteractionResult.conditional",
        "coalitions.py:InteractionResult.dividends",
        "coalitions.py:InteractionResult.pairs",
        "coalitions.py:InteractionResult.shapley",
        "coalitions.py:InteractionResult.together",
        "collected.py:Collected.concat",
        "collected.py:Collected.load",
        "curves.py:Curve.advantage",
        "curves.py:Curve.area",
        "distance.py:DistanceProfile.over_heads",
        "edge_attribution.py:.result_of",
        "edge_attribution.py:EdgeAttribution.at_spans",
        "gradients.py:.result_at",
        "modulation.py:ModulationResult.change",
        "outcomes.py:.outcomes_of",
        "over_data.py:.over_data",
        "response.py:SteeringResponse.slopes",
        "result.py:SweepResult.rerun",
        "span_edges.py:.at_spans",
        "study.py:Study.result",
        "summaries.py:LensSummary.over_positions",
    ]


# -- digests ---------------------------------------------------------------------------------------------------------------


def test_digests_of_tensors_go_by_type_shape_and_bytes_alone():
    whole = torch.arange(24.0).reshape(4, 6)
    alike = [
        whole,
        whole.clone(),
        torch.stack([whole, whole])[1],
        whole.t().contiguous().t(),
        whole.requires_grad_(True),
    ]
    assert len({digests.of_tensor(tensor) for tensor in alike}) == 1
    plain = whole.detach()
    others = [
        plain.reshape(6, 4),
        plain.double(),
        plain.bfloat16(),
        plain.half(),
        plain > 3,
        plain[0, 0],
        plain[:0],
        plain.to("meta"),
        plain.int(),
    ]
    assert len({digests.of_tensor(tensor) for tensor in [plain, *others]}) == 1 + len(others)
    assert digests.of_tensor(torch.tensor(True)) != digests.of_tensor(torch.tensor([True]))


def test_a_write_changes_the_digest():
    tensor = torch.zeros(3)
    before = digests.of_tensor(tensor)
    tensor[1] = 1.0
    assert digests.of_tensor(tensor) != before


def test_weights_written_through_data_are_noticed():
    module = copy.deepcopy(_module(VIT))
    before = provenance.hash_weights(module)
    one_weight(module)
    assert provenance.hash_weights(module) != before


def test_large_weights_are_hashed_once(monkeypatch):
    module = torch.nn.Linear(1024, 1024)
    read: list[int] = []
    original = digests._hash_tensor
    monkeypatch.setattr(digests, "_hash_tensor", lambda tensor: read.append(tensor.numel()) or original(tensor))
    first = provenance.hash_weights(module)
    assert max(read) == 1024 * 1024
    read.clear()
    assert provenance.hash_weights(module) == first
    assert max(read) <= 1024
    module.weight.data.mul_(2.0)
    assert provenance.hash_weights(module) != first


def test_a_write_to_one_weight_reads_that_one_alone(monkeypatch):
    module = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(64, 64))
    first, read = provenance.hash_weights(module), []
    original = digests._hash_tensor
    monkeypatch.setattr(digests, "_hash_tensor", lambda tensor: read.append(tensor.numel()) or original(tensor))
    with torch.no_grad():
        module[1].weight.add_(1.0)
    second = provenance.hash_weights(module)
    assert second != first
    assert sorted(read)[-2:] == [1024, 64 * 64]
    weight = module[1].weight.data
    weight.copy_(weight.roll(8, 0))
    assert provenance.hash_weights(module) != second
    weight[3, 5] += 1e-3
    assert provenance.hash_weights(module) not in (first, second)


def test_weights_on_disk_are_hashed_once(monkeypatch, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    module = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(64, 64))
    expected = provenance.hash_weights(module)
    module = accelerate.disk_offload(module, tmp_path, execution_device="cpu")
    assert provenance.hash_weights(module) == expected
    read: list[int] = []
    original = digests._hash_tensor
    monkeypatch.setattr(digests, "_hash_tensor", lambda tensor: read.append(tensor.numel()) or original(tensor))
    assert provenance.hash_weights(module) == expected
    assert sum(read) <= provenance.SAMPLES


@pytest.mark.filterwarnings("ignore")
def test_scales_of_quantised_weights_count():
    """A weight times 1.5 is packed to the same bytes, with other scales."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def four_bits(weight: Tensor) -> Any:
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False)
        return layer.to("cpu")

    def packed(weight: Tensor) -> Any:
        layer = torch.nn.Linear(64, 64, bias=False)
        layer.weight.data.copy_(weight)
        return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, torch.qint8)

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for made in (four_bits, packed):
        first, again, other = (made(scale * weight) for scale in (1.0, 1.0, 1.5))
        values = torch.eye(64)
        assert not torch.allclose(first(values), other(values))
        assert provenance.hash_weights(first) == provenance.hash_weights(again) != provenance.hash_weights(other)


def test_dispatching_a_model_is_no_other_study():
    accelerate = pytest.importorskip("accelerate")
    module = copy.deepcopy(_module(VLM))
    expected = digests.settings_of(module)
    module = accelerate.dispatch_model(module, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert digests.settings_of(module) == expected


def test_functions_that_call_each_other_are_read_once(monkeypatch):
    lines = [f"def f{n}(x): return f{n + 1}(x) + f{n + 2}(x) + {n}" for n in range(20)]
    scope: dict[str, Any] = {"__name__": "somebody"}
    exec("\n".join([*lines, "def f20(x): return x", "def f21(x): return -x"]), scope)
    read: list[str] = []
    original = digests._code
    monkeypatch.setattr(digests, "_code", lambda code: read.append(code.co_name) or original(code))
    assert digests.plain(scope["f0"]) == digests.plain(scope["f0"])
    assert len(read) == 2 * 22
    assert digests.plain(scope["f20"])["sha256"] != digests.plain(scope["f21"])["sha256"]


def test_a_model_that_was_saved_and_loaded_has_the_same_settings(tmp_path):
    for name in (VIT, VLM, "vit-wide"):
        module = copy.deepcopy(_module(name))
        told = provenance._configuration(module)
        module.save_pretrained(tmp_path / name)
        assert provenance._configuration(module) == told
        again = type(module).from_pretrained(tmp_path / name).eval()
        assert digests.settings_of(again) == digests.settings_of(module)


def test_digests_are_the_same_in_another_process():
    value = "{'a': [1, 2.5, None, 'x'], 'b': {3, 1, 2}, 'f': (lambda x, k=frozenset({'p', 'q', 'r'}): x in {'u', 'v', 'w'})}"
    code = f"from circuitvision import digests; print(digests.of_json(digests.plain({value})))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment(seed)
        ).stdout
        for seed in "12"
    }
    assert len(found) == 1


def _environment(seed: str) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(cv.__file__).parents[1])}


def test_a_cache_is_its_run_until_somebody_writes_into_it():
    model = wrapped(VLM)
    with torch.no_grad():
        first, second = (model.run_with_cache(inputs_of(VLM), Z)[1] for _ in range(2))
    assert digests.plain(first) == digests.plain(second)
    first[Z].mul_(2.0)
    assert digests.plain(first) != digests.plain(second)
    assert digests.plain(second) != digests.plain(second.to(torch.float64))


def test_iterators_are_digested_while_they_are_read():
    model = wrapped(VIT)
    found = [
        ro.collect(model, iter([inputs_of(VIT, seed)]), "vision.blocks.0.hook_resid_post", positions="cls").provenance
        for seed in (1, 1, 2)
    ]
    assert bits(found[0]) == bits(found[1]) != bits(found[2])


# -- files that can be run again -------------------------------------------------------------------------------------------

_RERUN = """
import sys, torch, circuitvision as cv
from circuitvision.results import Result
from circuitvision.storage import inputs_of
from tests.zoo import case, shared_model
model = cv.HookedModel(shared_model(sys.argv[2]), None)
saved = Result.load(sys.argv[1])
again = saved.rerun(model, *inputs_of(sys.argv[1]), progress=False)
assert torch.equal(again.values, saved.values) and torch.equal(again.clean, saved.clean)
assert again.edits == saved.edits and again.labels == saved.labels and again.axes == saved.axes
same = [{k: v for k, v in r.provenance.items() if k not in ("created", "call", "cannot_restore")} for r in (again, saved)]
assert same[0] == same[1]
print("equal")
"""


@pytest.mark.parametrize("suffix", [".npz", pytest.param(".safetensors", marks=pytest.mark.slow)])
def test_a_saved_sweep_runs_again_in_another_process(tmp_path, suffix):
    groups = [
        [edits.replace(Z, source(1), heads=1, positions=torch.arange(16) > 4)],
        [edits.block_attention("language", "last", slice(1, 4), layers=[0]), edits.ablate(Z, "resample", seed=3)],
        [edits.ablate(Z, "mean", dataset=inputs_of(VLM, 5), heads=[0, 1])],
        [edits.steer("language.blocks.0.hook_resid_post", source(1, "language.blocks.0.hook_resid_post")[0, 0].bfloat16(), 2.0)],
    ]  # fmt: skip
    result = wrapped(VLM).sweep(
        inputs_of(VLM),
        groups,
        metrics.prob(torch.tensor([1, 2, 3])),
        axes={"a": [1, 2], "b": ["x", "y"]},
        progress=False,
    )
    path = result.save(tmp_path / f"sweep{suffix}", inputs=inputs_of(VLM))
    done = subprocess.run(
        [sys.executable, "-c", _RERUN, str(path), VLM],
        capture_output=True,
        text=True,
        env=_environment("0"),
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_a_result_takes_no_other_inputs_into_its_file(tmp_path):
    with pytest.raises(InputError, match="not the inputs"):
        swept().save(tmp_path / "s.npz", inputs=inputs_of(VLM, 2))
    assert not list(tmp_path.iterdir())


def test_sources_left_out_are_named_by_digest_and_put_back(tmp_path):
    result = swept(group=[edits.replace(Z, source(1), heads=1)])
    path = result.save(tmp_path / "s.safetensors", sources=False)
    assert path.stat().st_size < result.save(tmp_path / "whole.safetensors").stat().st_size
    loaded = Result.load(path)
    assert loaded.edits == result.edits
    assert repr(loaded.edits[0]) == repr(result.edits[0])
    with pytest.raises(InputError, match="digest"):
        loaded.rerun(wrapped(VLM), inputs_of(VLM))
    with pytest.raises(InputError, match="None of the sources"):
        edits.restore(loaded.edits, source(2))
    back = edits.restore(loaded.edits, {Z: source(1)})
    again = wrapped(VLM).sweep(inputs_of(VLM), back, metrics.logit_diff(2, 3), progress=False)
    assert torch.equal(again.values, result.values)


def test_functions_that_cannot_be_restored_are_named(tmp_path):
    result = swept(group=[edits.apply(Z, lambda value, hook: value * 0)], metric=lambda logits: logits[:, -1, 2])
    assert any("<lambda>" in name for name in result.provenance["cannot_restore"])
    loaded = Result.load(result.save(tmp_path / "s.npz"))
    assert torch.equal(loaded.values, result.values)
    with pytest.raises(InputError, match=r"test_provenance.*<lambda> has no import path"):
        loaded.rerun(wrapped(VLM), inputs_of(VLM))
    with pytest.raises(InputError, match=r"<lambda> has no import path"):
        loaded.rerun(wrapped(VLM), inputs_of(VLM), metric=metrics.prob(2))


def test_functions_with_a_name_come_back_unless_they_changed(tmp_path, monkeypatch):
    result = swept(group=[edits.apply(Z, doubled)], metric=above_limit)
    loaded = Result.load(result.save(tmp_path / "s.npz"))
    assert torch.equal(loaded.rerun(wrapped(VLM), inputs_of(VLM)).values, result.values)
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 1.0)
    with pytest.raises(InputError, match="above_limit is not what it was"):
        loaded.rerun(wrapped(VLM), inputs_of(VLM))


def test_patching_and_head_importance_keep_their_edits_by_digest(tmp_path):
    result = Result.load(patched().save(tmp_path / "p.npz"))
    model = wrapped(VLM)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs_of(VLM, 1), "language.blocks.*.attn.hook_z")
    again = model.sweep(inputs_of(VLM, 2), edits.restore(result.edits, cache), metrics.logit_diff(2, 3), progress=False)
    live = [
        n for n, layer in enumerate(result.axes["layer"]) if f"language.blocks.{layer}.attn.hook_z" not in result.dead
    ]
    effects = (again.values - again.clean).reshape(len(live), -1, again.values.shape[-1])
    assert torch.allclose(effects, result.values[live], atol=1e-6)
    assert torch.allclose(again.clean, result.base, atol=1e-6)
    for made in (important(), checked()):
        loaded = Result.load(made.save(tmp_path / "h.npz"))
        assert loaded.edits == made.edits
        assert all(isinstance(group, EditGroup) for group in loaded.edits)
    assert len(checked().edits) == len(checked().axes["condition"])


def test_the_command_is_recorded_without_paths_of_the_machine():
    with provenance.command(["circuitvision", "quickstart", "--clean", "/somewhere/private/photo.png"]):
        told = swept().provenance
    assert told["command"] == ["circuitvision", "quickstart", "--clean", "photo.png"]
    assert "command" not in swept().provenance
    assert "/" + "somewhere" not in json.dumps(told)


# -- mutants ---------------------------------------------------------------------------------------------------------------

BLIND: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "tensors are their shape": ("edit tensor", lambda m: m.setattr(digests, "of_tensor", lambda tensor: str(tensor.shape))),
    "functions are their name": ("function body", lambda m: m.setattr(digests._Reader, "_function", lambda self, f: digests.name_of(f))),
    "closures are left out": ("function closure", lambda m: m.setattr(digests._Reader, "_closure", lambda self, f: {})),
    "weights are not hashed": ("one weight", lambda m: m.setattr(provenance, "hash_weights", lambda module: "")),
    "the configuration is left out": ("a setting of the configuration", lambda m: m.setattr(provenance, "_configuration", lambda module: {})),
    "the state is left out": ("training", lambda m: m.setattr(provenance, "_module_state", lambda module, device: {})),
    "hooks are left out": ("hooks around the run", lambda m: m.setattr("circuitvision.model.hooks.HookEngine.active", lambda self: [])),
    "arguments are left out": ("edit heads", lambda m: m.setattr(provenance, "_arguments", lambda arguments: {})),
    "masks are their label": ("mask", lambda m: m.setattr("circuitvision.model.positions.Positions.__provenance__", lambda self: self.plain)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutant", BLIND)
def test_the_table_notices_what_a_provenance_leaves_out(mutant, monkeypatch):
    what, blind = BLIND[mutant]
    blind(monkeypatch)
    one, other = SWEEPS[what]
    assert bits(swept(**one).provenance) == bits(swept(**other).provenance)


def test_arrays_of_numpy_and_labels_count():
    assert digests.plain(np.arange(3)) != digests.plain(np.arange(3.0))
    assert results.as_builtin({"a": 1}) == {"a": 1}
