"""A split adds up to what the model said, in runs under hooks as well, or is refused. Truth: the bare module under the same torch hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.readout.attribution.increase import log_prob_increase
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model

Hook = Callable[[Tensor, Any], Tensor]


def built(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model(name)).to(dtype).eval()
    return cv.HookedModel(module), case(name).inputs(module, batch=2, dtype=dtype, **options)


def shifted(value: Tensor, hook: Any) -> Tensor:
    noise = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return value + 0.3 * noise.to(value)


LLAVA_SITES = [
    "language.blocks.0.hook_resid_pre",
    "language.blocks.0.hook_resid_mid",
    "language.blocks.1.hook_resid_pre",
    "language.blocks.1.hook_resid_post",
    "language.blocks.0.hook_attn_out",
    "language.blocks.1.hook_mlp_out",
    "language.blocks.1.attn.hook_z",
    "language.blocks.1.mlp.hook_post",
    "language.blocks.1.ln1.hook_normalized",
    "language.hook_input",
    "vision.blocks.0.hook_resid_post",
]


def check_sums(name: str, site: str, by: str) -> list[str]:
    model, inputs = built(name, **({"padding": "right"} if name.startswith(("llava", "pali")) else {}))
    with torch.no_grad(), model.hooks([(site, shifted)]):
        logits, cache = model.run_with_cache(inputs)
    found = cv.readout.direct_attribution(model, cache, (4, 1), by=by)
    said = cv.metrics.logit_diff(4, 1)(logits, inputs)
    if not found.is_capped:
        torch.testing.assert_close(found.total, said, rtol=0, atol=2e-6)
    torch.testing.assert_close(by_row(found).sum(0), found.total, rtol=0, atol=2e-6)
    return [term for term in found.axes["term"] if term.endswith(".rest")]


@pytest.mark.parametrize("by", ["component", "head", "neuron"])
@pytest.mark.parametrize("site", LLAVA_SITES)
def test_terms_of_a_run_under_hooks_add_up(site: str, by: str) -> None:
    rest = check_sums("llava-clip-llama", site, by)
    layer = site.split(".")[2] if ".blocks." in site else ""
    whole = by == "component" or (by == "head" and "mlp" in site)
    outside = {
        "hook_resid_pre": True,
        "hook_resid_mid": True,
        "hook_resid_post": True,
        "hook_attn_out": by != "component",
        "hook_mlp_out": not whole,
    }
    expected = (
        [f"language L{layer}.rest"] if site.startswith("language") and outside.get(site.rpartition(".")[2]) else []
    )
    assert rest == expected


def test_a_split_without_the_rest_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitvision.readout.attribution.direct.rest_of_stream", lambda stream, layer: None)
    with pytest.raises(AssertionError):
        check_sums("llava-clip-llama", "language.blocks.1.hook_resid_post", "component")


@pytest.mark.parametrize("name", ["vit", "dinov2", "deit-teacher", "paligemma2", "llava-siglip-qwen2"])
@pytest.mark.parametrize("by", ["component", "head"])
def test_other_families(name: str, by: str) -> None:
    tower = "vision" if name in ("vit", "dinov2", "deit-teacher") else "language"
    kinds = ("hook_resid_mid", "hook_attn_out", "hook_resid_post")
    for kind in kinds:
        rest = check_sums(name, f"{tower}.blocks.1.{kind}", by)
        assert rest == ([] if kind == "hook_attn_out" and by == "component" else [f"{tower} L1.rest"])


@pytest.mark.parametrize(
    "name", ["vit", "dinov2", "clip-classifier", "siglip-classifier", "paligemma2", "llava-clip-llama", "pi0"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_rest(name: str, dtype: torch.dtype) -> None:
    model, inputs = built(name, dtype)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    for by in ("component", "head", "neuron"):
        found = cv.readout.direct_attribution(model, cache, 3, by=by)
        assert not [term for term in found.axes["term"] if term.endswith(".rest")]


def test_the_rest_is_what_the_hook_added() -> None:
    model, inputs = built("llava-clip-llama")
    module, last = model.module, model.language.cfg.n_layers - 1
    with torch.no_grad(), model.hooks([(f"language.blocks.{last}.hook_resid_post", shifted)]):
        _, cache = model.run_with_cache(inputs)
    found = cv.readout.direct_attribution(model, cache, (7, 4))
    final = cache[f"language.blocks.{last}.hook_resid_post"][:, -1]
    norm = module.model.language_model.norm
    denominator = (final.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    direction = (module.lm_head.weight[7] - module.lm_head.weight[4]) * norm.weight / denominator
    added = shifted(torch.zeros_like(final), None)
    torch.testing.assert_close(found[f"L{last}.rest"], (direction * added).sum(-1).detach(), rtol=0, atol=1e-6)


@contextmanager
def torch_hook(module: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, out: change(out))
    try:
        yield
    finally:
        handle.remove()


def test_hooks_of_others_and_dropout() -> None:
    model, inputs = built("vit")
    embeddings = model.module.vit.embeddings
    block = model.vision.blocks[1].module
    with torch.no_grad(), torch_hook(block, lambda out: out * 1.5), torch_hook(embeddings, lambda out: out + 1):
        logits, cache = model.run_with_cache(inputs)
    found = cv.readout.direct_attribution(model, cache, (1, 2))
    torch.testing.assert_close(by_row(found).sum(0), logits[:, 1] - logits[:, 2], rtol=0, atol=1e-6)
    for part in model.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.4
            part.train()
    with torch.no_grad():
        torch.manual_seed(0)
        logits, cache = model.run_with_cache(inputs)
    found = cv.readout.direct_attribution(model, cache, (1, 2))
    torch.testing.assert_close(by_row(found).sum(0), logits[:, 1] - logits[:, 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "site", ["language.ln_final.hook_normalized", "language.ln_final.hook_scale", "language.hook_readout"]
)
@pytest.mark.parametrize("names", ["all", "few"])
def test_what_is_changed_behind_the_final_residual_is_refused(site: str, names: str) -> None:
    model, inputs = built("llava-clip-llama")
    few = [
        "language.hook_input",
        "language.blocks.*.hook_*_out",
        "language.blocks.*.hook_resid_*",
        "language.blocks.*.attn.hook_z",
    ]
    with torch.no_grad(), model.hooks([(site, lambda value, hook: value * 1.1)]):
        _, cache = model.run_with_cache(inputs, None if names == "all" else few)
    with pytest.raises(InputError, match="no term of the stream"):
        cv.readout.direct_attribution(model, cache, (7, 4))
    with pytest.raises(InputError, match="no term of the stream"):
        log_prob_increase(model, cache, 7)


def test_the_final_norm_of_another_tool_is_noticed_and_reading_is_no_edit() -> None:
    model, inputs = built("vit")
    with torch.no_grad(), torch_hook(model.module.vit.layernorm, lambda out: out + 0.5):
        _, cache = model.run_with_cache(inputs)
    with pytest.raises(InputError, match="no term of the stream"):
        cv.readout.direct_attribution(model, cache, 3)
    seen: list[Tensor] = []
    with torch.no_grad(), model.hooks([("vision.hook_readout", lambda value, hook: seen.append(value))]):
        logits, cache = model.run_with_cache(inputs)
    torch.testing.assert_close(cv.readout.direct_attribution(model, cache, 3).total, logits[:, 3], rtol=0, atol=1e-6)
    assert len(seen) == 1


def test_sources_add_up_to_their_head_or_are_refused() -> None:
    model, inputs = built("llava-clip-llama", torch.float32)
    site = "language.blocks.1.attn."
    heads = {name: lambda value, hook: value * 0.5 for name in ("hook_v", "hook_pattern")}
    for name, hook in heads.items():
        with torch.no_grad(), model.hooks([(site + name, hook)]):
            _, cache = model.run_with_cache(inputs)
        by_source = cv.readout.source_attribution(model, cache, (7, 4))
        by_head = cv.readout.direct_attribution(model, cache, (7, 4))
        for head in range(model.language.cfg.n_heads):
            torch.testing.assert_close(by_row(by_source)[1, head].sum(-1), by_head[f"L1H{head}"], rtol=1e-3, atol=1e-5)
    with torch.no_grad(), model.hooks([(site + "hook_z", shifted)]):
        _, cache = model.run_with_cache(inputs)
    for call in (
        lambda: cv.readout.source_attribution(model, cache, (7, 4)),
        lambda: log_prob_increase(model, cache, 7, by="source"),
    ):
        with pytest.raises(InputError, match="something else than pattern times values"):
            call()


@pytest.mark.parametrize("by", ["component", "head"])
def test_pairs_of_terms_of_a_dual_encoder(by: str) -> None:
    model, inputs = built("clip")
    hooks = [("vision.blocks.1.hook_resid_post", shifted), ("text.blocks.0.hook_attn_out", shifted)]
    with torch.no_grad(), model.hooks(hooks):
        logits, cache = model.run_with_cache(inputs)
    found = cv.readout.bilinear_attribution(model, cache, by=by)
    torch.testing.assert_close(found.values.sum((0, 1)).T + found.bias, logits, rtol=0, atol=1e-5)
    assert "vision L1.rest" in found.axes["image_term"]
    assert ("text L0.rest" in found.axes["text_term"]) == (by == "head")


def test_caches_know_which_sites_were_hooked() -> None:
    model, inputs = built("llava-clip-llama")
    site, other = "language.blocks.0.hook_mlp_out", "language.blocks.1.hook_mlp_out"
    with torch.no_grad():
        assert model.run_with_cache(inputs)[1].edited == frozenset()
        with model.hooks([(site, shifted)]):
            cache = model.run_with_cache(inputs)[1]
            with model.record([other]) as recorded:
                model.run(inputs, edits.scale(other, 2.0))
        assert cache.edited == {site}
        assert cache.detach().edited == {site}
        assert recorded.edited == {site, other}
        with model.record([other]) as recorded:
            model.generate(inputs, edits=[edits.scale(other, 2.0)], max_new_tokens=2, do_sample=False)
        assert recorded.edited == {other}


def test_passes_of_generation_under_edits() -> None:
    model, inputs = built("llava-clip-llama")
    model.module.generation_config.eos_token_id = None
    edit = edits.steer(
        "language.blocks.0.hook_resid_post", torch.ones(model.language.cfg.d_model, dtype=torch.float64), 0.2
    )
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "suppress_tokens": [model.module.config.image_token_id],
    }
    with torch.no_grad(), model.record() as cache:
        out: Any = model.generate(inputs, edits=[edit], return_dict_in_generate=True, output_logits=True, **options)
    for step in (0, 2):
        found = cv.readout.direct_attribution(model, cache, (7, 4), step=step)
        said = out.logits[step][:, 7] - out.logits[step][:, 4]
        torch.testing.assert_close(by_row(found).sum(0), said.double(), rtol=0, atol=2e-6)
        # The recording is the outer context: it saw block 0 before the edit, which shows in what block 1 adds to it.
        assert [term for term in found.axes["term"] if term.endswith(".rest")] == ["language L1.rest"]


def test_an_edit_of_the_final_residual_that_the_recording_did_not_see() -> None:
    model, inputs = built("llava-clip-llama")
    edit = edits.scale("language.blocks.1.hook_resid_post", 1.5, positions=-1)
    shift = edits.steer("language.blocks.1.hook_resid_post", torch.arange(model.language.cfg.d_model).double(), 1.0)
    with torch.no_grad(), model.record() as cache:
        model.run(inputs, [edit, shift])
    with pytest.raises(InputError, match="no term of the stream"):
        cv.readout.direct_attribution(model, cache, (7, 4))
