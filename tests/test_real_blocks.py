"""Blocks of real classes of transformers, described from outside by tables, against plain hooks on the bare modules."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.families import BlockLayout, Fused, Gate, Writer, register_norm
from circuitvision.model import spec
from tests.real_blocks import LAYERS, Case, Place
from tests.real_crossed_models import CASES as CROSSED
from tests.real_text_models import TEXT, register_norms

pytestmark = pytest.mark.usefixtures("tables")
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
CASES = {**TEXT, **CROSSED}


def built(name: str) -> tuple[Case, nn.Module, cv.HookedModel, dict[str, Tensor]]:
    register_norms()
    case = CASES[name]
    case.register()
    module = case.module()
    return case, module, cv.HookedModel(module), case.inputs()


def output(case: Case, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(**inputs)[case.output]


def raw(
    case: Case, module: nn.Module, inputs: dict[str, Tensor], place: Place, change: Any = None
) -> tuple[Tensor, Tensor]:
    """The output and the value at a place of the bare module, changed by plain hooks."""
    store: list[Tensor] = []
    with place.tapped(store, change):
        out = output(case, module, inputs)
    (value,) = store
    return out, value


def changed(value: Tensor, *where: Any) -> Tensor:
    """An edit that differs at every entry, of row 0 and position 1 alone (of patterns, query 1)."""
    out = value.clone()
    ramp = torch.linspace(0.8, 1.4, out[0].numel(), dtype=out.dtype).view_as(out[0])
    index = (slice(None), 1) if value.ndim == 4 and value.shape[-2] == 5 and value.shape[1] != 5 else (1,)
    out[(0, *index)] = out[(0, *index)] * ramp[index] + 0.05 * ramp[index]
    return out


def eager(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    @contextlib.contextmanager
    def switch() -> Any:
        configs = [part.config for part in module.modules() if hasattr(part, "config")]
        before = [config._attn_implementation_internal for config in configs]
        for config in configs:
            config._attn_implementation_internal = "eager"
        yield
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old

    return switch()


def places(case: Case, module: nn.Module, layer: int) -> dict[str, Place]:
    found = case.truth(module, layer)
    return {f"{case.tower}.blocks.{layer}.{site}": place for site, place in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_sites_hold_what_plain_hooks_see(name: str) -> None:
    case, module, model, inputs = built(name)
    with torch.no_grad(), eager(module):
        out, cache = model.run_with_cache(inputs, "**")
        torch.testing.assert_close(out, output(case, module, inputs), rtol=0, atol=0)
        for layer in range(LAYERS):
            for site, place in places(case, module, layer).items():
                _, value = raw(
                    case, module, inputs, Place(place.module, "in" if place.side == "skip" else place.side, place.take)
                )
                torch.testing.assert_close(cache[site], value, **CLOSE, msg=lambda text, site=site: f"{site}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_edits_do_what_plain_hooks_do(name: str) -> None:
    case, module, model, inputs = built(name)
    with torch.no_grad(), eager(module):
        clean = output(case, module, inputs)
        for layer in (0, LAYERS - 1):
            for site, place in places(case, module, layer).items():
                expected, _ = raw(case, module, inputs, place, changed)
                found = model.run_with_hooks(inputs, [(site, changed)])
                torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, site=site: f"{site}: {text}")
                assert (expected - clean).abs().max() > 1e-4, site


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_patterns_and_results(name: str) -> None:
    case, module, model, inputs = built(name)
    with torch.no_grad(), eager(module):
        _, cache = model.run_with_cache(inputs, "**")
        for layer in range(LAYERS):
            for branch, seen in case.seen(module, layer).items():
                stem = f"{case.tower}.blocks.{layer}.{branch}"
                found: list[Tensor] = []
                handle = seen.attention.register_forward_hook(
                    lambda module, args, output, found=found: found.append(output[-1])
                )
                _, v = raw(case, module, inputs, seen.v)
                handle.remove()
                (pattern,) = found
                torch.testing.assert_close(cache[f"{stem}.hook_pattern"], pattern, **CLOSE)
                n_heads = pattern.shape[1]
                shown = v.repeat_interleave(n_heads // v.shape[2], 2)
                moved = torch.einsum("bhqk,bkhd->bqhd", changed(pattern), shown)
                z = Place(seen.o, "in")
                expected, _ = raw(case, module, inputs, z, lambda value, moved=moved: moved.flatten(2))
                edited = model.run_with_hooks(inputs, [(f"{stem}.hook_pattern", changed)])
                torch.testing.assert_close(edited, expected, **CLOSE, msg=lambda text, stem=stem: f"{stem}: {text}")
                _, kept = raw(case, module, inputs, z)
                weight: Any = seen.o.weight
                parts = torch.einsum(
                    "bphd,hdm->bphm", kept.unflatten(-1, (n_heads, -1)), weight.T.unflatten(0, (n_heads, -1))
                )
                torch.testing.assert_close(cache[f"{stem}.hook_result"], parts, **CLOSE)
                bias: Any = 0 if seen.o.bias is None else seen.o.bias
                expected, _ = raw(
                    case,
                    module,
                    inputs,
                    Place(seen.o),
                    lambda value, parts=parts, bias=bias: changed(parts).sum(-2) + bias,
                )
                edited = model.run_with_hooks(inputs, [(f"{stem}.hook_result", changed)])
                torch.testing.assert_close(edited, expected, **CLOSE, msg=lambda text, stem=stem: f"{stem}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_what_branches_add(name: str) -> None:
    case, module, model, inputs = built(name)
    sites = {
        site: place
        for layer in range(LAYERS)
        for site, place in places(case, module, layer).items()
        if site.endswith(("_out", "hook_z", "hook_q", "hook_v"))
    }
    _, cache = model.run_with_cache(inputs, list(sites), incl_bwd=True, metric=lambda out: out[:, -1, 3].sum())
    for site, place in sites.items():
        leaf: list[Tensor] = []

        def follow(value: Tensor, leaf: list[Tensor] = leaf) -> Tensor:
            leaf.append(value.detach().clone().requires_grad_(True))
            return leaf[0]

        out, _ = raw(case, module, inputs, place, follow)
        (expected,) = torch.autograd.grad(out[:, -1, 3].sum(), leaf[0])
        torch.testing.assert_close(
            cache[f"{site}_grad"], expected, rtol=1e-3, atol=1e-5, msg=lambda text, site=site: f"{site}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_weights_and_what_is_written(name: str) -> None:
    case, module, model, inputs = built(name)
    tower = model.towers[case.tower]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        for layer, block in enumerate(tower.blocks):
            found = places(case, module, layer)
            stem = f"{case.tower}.blocks.{layer}"
            for letter, own in (("q", "Q"), ("k", "K"), ("v", "V")):
                place = found.get(f"{stem}.attn.hook_{letter}")
                if place is None:
                    continue
                _, value = raw(case, module, inputs, place)
                _, read = raw(case, module, inputs, Place(place.module, "in"))
                weight, bias = getattr(block, f"W_{own}"), getattr(block, f"b_{own}")
                torch.testing.assert_close(torch.einsum("bpm,hmd->bphd", read, weight) + bias, value, **CLOSE)
            for branch in block.branches:
                added = raw(case, module, inputs, found[f"{stem}.{branch.added}"])[1]
                for site in branch.sites():
                    value = cache[f"{stem}.{site}"]
                    torch.testing.assert_close(tower.written(f"{stem}.{site}", value), added, **CLOSE)
                    if site == branch.added:
                        continue
                    share = tower.written(f"{stem}.{site}", value, frozen=cache)
                    share = share.sum(-2) if share.ndim == 4 else share
                    offset = tower.written_bias(f"{stem}.{site}", frozen=cache)
                    torch.testing.assert_close(share + offset, added, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_is_the_loop_and_resumes(name: str) -> None:
    case, _, model, inputs = built(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        stems = [f"{case.tower}.blocks.{layer}." for layer in (0, LAYERS - 1)]
        sites = [site for site in cache if site.startswith(tuple(stems)) and "scale" not in site]
        groups = [edits.replace(site, cache[site] * 1.2 + 0.1, positions=[1, 3]) for site in sites]
        result = model.sweep(inputs, groups, lambda out: out[:, -1, 3], progress=False)
        for number, group in enumerate(groups):
            alone = model.run(inputs, [group])[:, -1, 3]
            torch.testing.assert_close(
                result.values[number], alone, **CLOSE, msg=lambda text, group=group: f"{group}: {text}"
            )
    assert not any(plan.in_full for plan in result.plan), {str(plan) for plan in result.plan if plan.in_full}


@pytest.mark.parametrize("name", CASES)
def test_the_right_table_holds(name: str) -> None:
    _, _, model, inputs = built(name)
    found = cv.check_model(model, inputs, layers=[1], progress=False)
    assert found.ok, str(found)


def lying(number: int, core: dict[str, Any] | None = None, **entries: Any) -> Any:
    """A change of one branch of a block's layout."""

    def change(block: BlockLayout) -> BlockLayout:
        branches = list(block.branches)
        branches[number] = replace(branches[number], **entries)
        branches[number] = replace(branches[number], core=replace(branches[number].core, **(core or {})))
        return replace(block, branches=tuple(branches))

    return change


PACKED = "attention.query_key_value"
LIES: dict[str, tuple[str, Any, str]] = {
    "gate and input of a fused MLP": ("phi3", lying(1, {"fused": Fused("mlp.gate_up_proj", "in_gate")}), "parts"),
    "gate and input": ("qwen3", lying(1, {"gate": "mlp.up_proj", "fc_in": "mlp.gate_proj"}), "parts"),
    "order of packed projections": ("phi3", lying(0, {"qkv": Fused("self_attn.qkv_proj", "groups")}), "attention"),
    "order of a fused projection": ("gpt_neox", lying(0, {"qkv": Fused(PACKED, "qkv")}), "attention"),
    "queries and keys": ("internvl", lying(0, {"q": "attention.k_proj", "k": "attention.q_proj"}), "attention"),
    "keys and values": ("internvl", lying(0, {"k": "attention.v_proj", "v": "attention.k_proj"}), "attention"),
    "norms of heads": ("internvl", lying(0, {"q_norm": "attention.k_norm", "k_norm": "attention.q_norm"}), "parts"),
    "no norm of heads": ("qwen3", lying(0, {"q_norm": "", "k_norm": ""}), "parts"),
    "heads first": ("qwen3", lying(0, {"heads_first": True}), "parts"),
    "heads not first": ("gemma3", lying(0, {"heads_first": False}), "parts"),
    "no gate": ("internvl", lying(0, then=()), "stream"),
    "another gate": ("internvl", lying(0, then=(Gate("lambda_2"),)), "stream"),
    "no norm behind": ("gemma3", lying(0, then=()), "stream"),
    "no norm before": ("qwen3", lying(0, norm=None), "parts"),
    "another branch's norm": ("gpt_neox parallel", lying(0, norm="post_attention_layernorm"), "sites"),
    "one behind the other": ("gpt_neox parallel", lambda block: replace(block, parallel=False), "parts"),
    "side by side": ("gpt_neox", lambda block: replace(block, parallel=True), "parts"),
    "no norm of the sum": ("bert", lying(1, sum_norm=None), "stream"),
    "another activation": ("gpt_neox", lying(1, {"act": "relu"}), "parts"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_block_is_named(lie: str) -> None:
    name, change, check = LIES[lie]
    register_norms()
    case = CASES[name]
    case.register(change(case.stack.block))
    found = cv.check_model(cv.HookedModel(case.module()), case.inputs(), layers=[0], progress=False)
    assert check in [one.name for one in found.checks if not one.ok], str(found)


@pytest.mark.parametrize(
    ("name", "norm", "entries"),
    [
        ("gemma3", "Gemma3RMSNorm", {"offset": 0.0}),
        ("qwen3", "Qwen3RMSNorm", {"centred": True}),
        ("cohere", "CohereLayerNorm", {"centred": False}),
    ],
)
def test_a_wrong_norm_is_named(name: str, norm: str, entries: dict[str, Any]) -> None:
    register_norms()
    register_norm(replace(spec.NORMS[norm], **entries), norm)
    CASES[name].register()
    found = cv.check_model(cv.HookedModel(CASES[name].module()), CASES[name].inputs(), layers=[0], progress=False)
    assert "norms" in [one.name for one in found.checks if not one.ok], str(found)


@pytest.mark.parametrize("layers", [(), (0,)])
def test_a_forgotten_writer_is_named(layers: tuple[int, ...]) -> None:
    register_norms()
    case = CASES["qwen3_vl"]
    case.register(writers=(Writer("hook_deepstack", layers),) if layers else ())
    found = cv.check_model(cv.HookedModel(case.module()), case.inputs(), progress=False)
    assert "changes the stream" in found.checks[0].problem


def test_a_norm_is_registered_by_names_of_classes() -> None:
    with pytest.raises(cv.errors.InputError, match="names of its classes"):
        register_norm(spec.NORMS["LayerNorm"])
