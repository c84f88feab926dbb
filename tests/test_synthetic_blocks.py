"""Blocks of every shape a table can describe: sites, gradients, sweeps and sums as the same weights multiplied by hand say."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from tests.synthetic_blocks import SHAPES, Own, by_hand, register

pytestmark = pytest.mark.usefixtures("tables")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def built(shape: str) -> tuple[Own, cv.HookedModel, dict[str, Tensor]]:
    register()
    torch.manual_seed(0)
    module = Own(SHAPES[shape]).double().eval()
    for parameter in module.parameters():
        # Gains and biases of their own: a norm that forgets them must be seen.
        parameter.data += 0.3 * torch.randn_like(parameter)
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return module, cv.HookedModel(module), {"pixel_values": pixels}


def changed(value: Tensor) -> Tensor:
    """An edit that is different at every entry, of row 0 and position 1 alone (of scores and patterns, query 1); scales stay positive."""
    out = value.clone()
    ramp = torch.linspace(0.9, 1.4, out[0].numel(), dtype=out.dtype).view_as(out[0])
    index = (0, slice(None), 1) if value.ndim == 4 and value.shape[-1] == value.shape[-2] == 5 else (0, 1)
    out[index] = out[index] * ramp[index[1:]] + 0.05 * ramp[index[1:]]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_every_site_reads_and_writes_as_by_hand(shape: str) -> None:
    module, model, inputs = built(shape)
    with torch.no_grad():
        expected, values = by_hand(module, inputs)
        torch.testing.assert_close(module(**inputs)["logits"], expected, **EXACT)
        sites = model.sites("vision.blocks.**")
        assert set(sites) == set(values)
        out, cache = model.run_with_cache(inputs, sites)
        torch.testing.assert_close(out, expected, **EXACT)
        for site in sites:
            torch.testing.assert_close(
                cache[site], values[site], **EXACT, msg=lambda text, site=site: f"{site}: {text}"
            )
        _, follows = model.run_with_cache(inputs)
        for site in sites:
            torch.testing.assert_close(follows[site], values[site], **EXACT)
        for site in sites:
            edited, _ = by_hand(module, inputs, {site: changed})
            found = model.run_with_hooks(inputs, [(site, lambda value, where: changed(value))])
            torch.testing.assert_close(found, edited, **EXACT, msg=lambda text, site=site: f"{site}: {text}")
            dead = model.is_dead(site)
            assert dead == bool(torch.equal(edited, expected)) or not dead, site


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sweep_is_the_loop_and_resumes(shape: str) -> None:
    _module, model, inputs = built(shape)
    with torch.no_grad():
        _out, cache = model.run_with_cache(inputs)
        sites = [site for site in model.sites("vision.blocks.**") if not site.endswith("hook_scale")]
        groups: list[Any] = [edits.replace(site, cache[site] * 1.2 + 0.1, positions=[1, 3]) for site in sites]
        groups += [[groups[3], groups[-2]], [groups[0], groups[5]]]
        result = model.sweep(inputs, groups, lambda logits: logits[:, 0], progress=False)
        for number, group in enumerate(groups):
            own = model.run(inputs, group if isinstance(group, list) else [group])
            torch.testing.assert_close(result.values[number], own[:, 0], **EXACT)
    assert not any(plan.in_full for plan in result.plan), [str(plan) for plan in result.plan if plan.in_full]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sweep_under_a_base_at_any_site_of_a_block_is_the_loop(shape: str) -> None:
    _module, model, inputs = built(shape)
    with torch.no_grad():
        sites = [
            site for site in model.sites("vision.blocks.**") if not site.endswith(("hook_scale", "scores", "pattern"))
        ]
        groups: list[Any] = [edits.scale(site, 1.2, positions=[1, 3]) for site in sites[::2]]
        for site in [one for one in sites if ".0." in one]:
            base = [edits.scale(site, 0.7)]
            kept = [group for group in groups if _accepted(model, inputs, [*base, group])]
            result = model.sweep(inputs, kept, lambda logits: logits[:, 0], progress=False, base=base)
            assert not any(plan.in_full for plan in result.plan), site
            for number, group in enumerate(kept):
                own = model.run(inputs, [*base, group])
                torch.testing.assert_close(result.values[number], own[:, 0], **EXACT, msg=f"{site} and {group}")


def _accepted(model: cv.HookedModel, inputs: Any, group: Any) -> bool:
    try:
        model.run(inputs, group)
    except cv.InputError:
        return False
    return True


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_at_every_site_are_autograds(shape: str) -> None:
    module, model, inputs = built(shape)
    sites = model.sites("vision.blocks.**")
    _, cache = model.run_with_cache(inputs, sites, incl_bwd=True, metric=lambda logits: logits[:, 2].sum())
    for site in sites:
        if "hook_q_input" in site or "hook_k_input" in site or "hook_v_input" in site:
            continue
        leaf: list[Tensor] = []

        def follow(value: Tensor, leaf: list[Tensor] = leaf) -> Tensor:
            leaf.append(value.detach().clone().requires_grad_(True))
            return leaf[0]

        logits, _ = by_hand(module, inputs, {site: follow})
        (expected,) = torch.autograd.grad(logits[:, 2].sum(), leaf[0], allow_unused=True)
        expected = torch.zeros_like(leaf[0]) if expected is None else expected
        torch.testing.assert_close(
            cache[f"{site}_grad"], expected, rtol=1e-8, atol=1e-10, msg=lambda text, site=site: f"{site}: {text}"
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_slots_and_parts_add_up(shape: str) -> None:
    _, model, inputs = built(shape)
    tower = model.vision
    slots = [site for layer in range(3) for site in model.sites(f"vision.blocks.{layer}.hook_?_input")]
    sites = [*tower.slot_sites(), *slots]
    _, cache = model.run_with_cache(inputs, sites, incl_bwd=True, metric=lambda logits: logits[:, 2].sum())
    gradients = tower.slot_gradients(cache)
    for site in slots:
        torch.testing.assert_close(gradients[site], cache[f"{site}_grad"], rtol=1e-8, atol=1e-11)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        parts, labels = cache.decompose_resid("vision", return_labels=True)
        torch.testing.assert_close(parts.sum(0), cache["vision.blocks.2.hook_resid_post"], **EXACT)
        assert len(labels) == len(parts) == len(set(labels))
        for layer in (1, 2):
            torch.testing.assert_close(
                cache.decompose_resid("vision", layer).sum(0), cache[f"vision.blocks.{layer}.hook_resid_pre"], **EXACT
            )
        for block in tower.blocks:
            for branch in block.branches:
                for site in branch.sites():
                    added = cache[f"{block.prefix}.{branch.added}"]
                    value = cache[f"{block.prefix}.{site}"]
                    torch.testing.assert_close(tower.written(f"{block.prefix}.{site}", value), added, **EXACT)
                    if site == branch.added:
                        continue
                    share = tower.written(f"{block.prefix}.{site}", value, frozen=cache)
                    share = share.sum(-2) if share.ndim == 4 else share
                    offset = tower.written_bias(f"{block.prefix}.{site}", frozen=cache)
                    torch.testing.assert_close(share + offset, added, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_terms_of_direct_attribution_add_up_or_are_refused(shape: str) -> None:
    _, model, inputs = built(shape)
    cache = model.run_with_cache(inputs)[1]
    if "post_norm" in shape:
        with pytest.raises(cv.errors.UnsupportedModelError, match="post-norm"):
            cv.readout.direct_attribution(model, cache, 2)
        return
    logits = model(inputs)[:, 2]
    for by in ("component", "head", "neuron"):
        found = cv.readout.direct_attribution(model, cache, 2, by=by)
        torch.testing.assert_close(found.values.sum(0).double(), logits, rtol=1e-5, atol=1e-6)
    parts = set(found.axes["term"])
    assert not any(name.endswith(".rest") for name in parts)


@functools.cache
def _weights() -> list[str]:
    return ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"]


@pytest.mark.parametrize("shape", ["fused", "fused_groups", "flat", "parallel_shared"])
def test_weights_of_fused_projections(shape: str) -> None:
    module, model, _inputs = built(shape)
    for layer, block in enumerate(model.vision.blocks):
        attn: Any = module.blocks[layer].attn
        for letter, n_heads in (("q", 4), ("k", 2), ("v", 2)):
            weight, bias = attn.weights(letter)
            name = letter.upper()
            assert torch.equal(getattr(block, f"W_{name}"), weight.unflatten(1, (n_heads, 3)).movedim(1, 0))
            assert torch.equal(getattr(block, f"b_{name}"), bias.view(n_heads, 3))
    assert all(getattr(model.vision, name).shape[0] == 3 for name in _weights())
