"""Promises 2 and 4: the residual stream adds up, every site follows from those before it even under edits, and gradients are right."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import circuitvision as cv
from tests.conformance.equations import Structure
from tests.conformance.setting import Setting, close, disturb, groups, needs_eager, nothing, one_layer_each, same

TOLERANCE = {torch.float64: 2e-5}
"""Decoders take norms and softmaxes in float32 whatever the dtype of the weights."""


def hold(
    model: cv.HookedModel, setting: Setting, cache: Any, edited: Iterable[str] = (), tower: str = "", kind: str = ""
) -> None:
    """Every equation holds in this cache (in one tower, if named), but for the definitions of the edited sites."""
    skip = set(edited)
    for equation in Structure(model, setting.case).equations(cache, tower, kind):
        if equation.site in skip:
            continue
        value, expected = cache[equation.site], equation.value
        what = f"{equation.site} with {kind or 'nothing'} edited"
        if equation.exact:
            same(value, expected, what)
            continue
        if equation.where is not None:
            value, expected = value[equation.where], expected[equation.where]
        close(value, expected, what, TOLERANCE.get(setting.dtype, 1e-4))


def sites_follow_from_those_before(setting: Setting) -> None:
    """resid_pre + attn_out = resid_mid, pattern @ v = z, post(Σ result + b_O) = attn_out, … in a clean run, from raw weights."""
    model = setting.model()
    with setting.mode():
        _, cache = model.run_with_cache(setting.inputs(model), "**")
        hold(model, setting, cache)


def edits_land_where_they_were_made(setting: Setting) -> None:
    """The same equations in runs where one kind of site is edited in every block: all consumers see the edit, nothing else does."""
    model = setting.model()
    inputs = setting.inputs(model, batch=setting.batch if setting.thorough else 2)
    for key, names in groups(model).items():
        if ".blocks." not in key and not key.endswith("hook_input"):
            continue
        tower, kind = key.split(".")[0], key.split(".blocks.")[-1]
        watched = [f"{tower}.**"] + ["language.**"] * (tower == "action")
        written: dict[str, Tensor] = {}

        def edit(value: Tensor, hook: Any, written: dict[str, Tensor] = written) -> Tensor:
            written[hook.name] = disturb(seed=1)(value, hook)
            return written[hook.name].clone()

        with setting.mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with model.hooks([(name, edit) for name in names]):
                _, cache = model.run_with_cache(inputs, watched)
            for name in names:
                same(cache[name], written[name], f"{name} as edited")
            hold(model, setting, cache, names, tower, kind)


def inputs_and_writes_add_up_to_the_stream(setting: Setting) -> None:
    """hook_input + every attn_out + every mlp_out = resid_post at every position, images and text alike."""
    model = setting.model()
    with setting.mode():
        _, cache = model.run_with_cache(setting.inputs(model))
    for name, tower in model.towers.items():
        total = cache[f"{name}.hook_input"]
        for layer in range(tower.cfg.n_layers):
            for site in ("hook_attn_out", "hook_mlp_out"):
                total = total + cache[f"{name}.blocks.{layer}.{site}"]
        same(total, cache[f"{name}.blocks.{tower.cfg.n_layers - 1}.hook_resid_post"], f"{name}: input and writes")
        parts = cache.decompose_resid(name)
        close(parts.sum(0), total, f"{name}: decompose_resid")
        stack = cache.accumulated_resid(name, incl_mid=True)
        assert len(stack) == 2 * tower.cfg.n_layers + 1
        close(stack[-1], total, f"{name}: accumulated_resid")


def resid_mid_reaches_norm_and_skip_path(setting: Setting) -> None:
    """An edit of resid_mid changes what ln2 reads and what the skip path carries, by the same bits, in either grad mode."""
    model = setting.model()
    inputs = setting.inputs(model)
    for name, tower in model.towers.items():
        p = f"{name}.blocks.0"
        outs = []
        for grad in (False, True):
            with torch.set_grad_enabled(grad), model.hooks([(f"{p}.hook_resid_mid", disturb())]):
                out, cache = model.run_with_cache(inputs, f"{p}.*")
                outs.append(out.detach())
            with torch.set_grad_enabled(grad):
                _, clean = model.run_with_cache(inputs, [f"{p}.*", f"{p}.ln2.*"])
                with model.hooks([(f"{p}.hook_resid_mid", disturb())]):
                    _, edited = model.run_with_cache(inputs, [f"{p}.*", f"{p}.ln2.*"])
            mid = edited[f"{p}.hook_resid_mid"]
            assert not torch.equal(mid, clean[f"{p}.hook_resid_mid"])
            same(edited[f"{p}.hook_resid_post"], mid + edited[f"{p}.hook_mlp_out"], f"{p}: skip path")
            x = mid - mid.mean(-1, keepdim=True) if tower.cfg.norm == "LayerNorm" else mid
            close(edited[f"{p}.ln2.hook_normalized"] * edited[f"{p}.ln2.hook_scale"], x, f"{p}: ln2 input")
            same(cache[f"{p}.hook_resid_mid"], mid, f"{p}: the same edit twice")
        same(outs[0], outs[1], f"{p}: edited output without and with grad")


def metric_of(out: Tensor) -> Tensor:
    """A fixed random projection of the output."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator).to(out.dtype)


def gradients_match_finite_differences(setting: Setting) -> None:
    """At every site the gradient predicts the change of the output for a small step along itself and along a random direction."""
    model = setting.model()
    inputs = setting.inputs(model, batch=1)
    clean = model(inputs)
    weights = metric_of(clean)
    before = [parameter.grad for parameter in model.parameters()]

    def metric(logits: Tensor) -> Tensor:
        return (logits * weights).sum()

    out, cache = model.run_with_cache(inputs, "**", incl_bwd=True, metric=metric)
    assert not out.requires_grad
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True)), "parameters' .grad was touched"
    wrong = []
    for name in model.sites() if setting.thorough else one_layer_each(model):
        grad, value = cache[f"{name}_grad"], cache[name]
        if model.is_dead(name):
            assert not grad.any(), f"{name} is declared dead but has a gradient"
            continue
        wrong += _compare(model, inputs, metric, name, value, grad)
    assert not wrong, f"{len(wrong)} gradients differ from finite differences: " + "; ".join(wrong[:8])


def _compare(model: cv.HookedModel, inputs: Any, metric: Any, name: str, value: Tensor, grad: Tensor) -> list[str]:
    size = float(grad.norm())
    if not size > 0:
        return [f"{name} has a zero gradient"]
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(value.shape, generator=generator).to(value.dtype)
    finite = value[value.abs() < 1e30]
    length = float(finite.norm()) or 1.0
    direction = grad / size + random / random.norm()
    step = 5e-5 * length * direction
    with torch.no_grad():
        ends = [
            float(metric(model.run_with_hooks(inputs, [(name, lambda v, hook, s=s: v + s * step)]))) for s in (1, -1)
        ]
    measured, predicted = (ends[0] - ends[1]) / 2, float((grad * step).sum())
    allowed = 0.01 * size * float(step.norm())
    return (
        [] if abs(measured - predicted) <= allowed else [f"{name}: {measured:.4g} measured, {predicted:.4g} predicted"]
    )


def values_do_not_depend_on_grad_mode(setting: Setting) -> None:
    """Output and every site have the same bits under no_grad, with grad, and while gradients are recorded."""
    model = setting.model()
    inputs = setting.inputs(model)
    for names in (None, "**"):
        with torch.no_grad():
            out, plain = model.run_with_cache(inputs, names)
        with torch.enable_grad():
            out_grad, with_grad = model.run_with_cache(inputs, names)
            out_bwd, backward = model.run_with_cache(inputs, names, incl_bwd=True, metric=lambda logits: logits.sum())
            out_hooked = model.run_with_hooks(inputs, [(names or "**.hook_resid_*", nothing)])
        same(out_grad.detach(), out, "output with grad")
        same(out_bwd, out, "output with recorded gradients")
        if names == "**":
            same(out_hooked.detach(), out, "output with hooks and grad")
        for name in plain:
            same(with_grad[name].detach(), plain[name], f"{name} with grad")
            same(backward[name], plain[name], f"{name} with recorded gradients")
        wanted = {f"{name}_grad" for name in plain}
        assert set(backward) == set(plain) | wanted, "a gradient is missing"


def backward_hooks_see_the_gradient(setting: Setting) -> None:
    """A backward hook gets what incl_bwd records, and what it returns replaces the gradient that flows on."""
    model = setting.model()
    inputs = setting.inputs(model, batch=1)
    tower = next(iter(model.towers))
    site, upstream = f"{tower}.blocks.0.hook_resid_post", f"{tower}.blocks.0.hook_mlp_out"
    seen: dict[str, Tensor] = {}

    def look(grad: Tensor, hook: Any) -> None:
        seen[hook.name] = grad.clone()

    def stop(grad: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(grad)

    weights = metric_of(model(inputs).detach())
    _, cache = model.run_with_cache(inputs, [site, upstream], incl_bwd=True, metric=lambda out: (out * weights).sum())
    with torch.enable_grad():
        out = model.run_with_hooks(inputs, bwd_hooks=[(site, look), (upstream, look)])
        torch.autograd.grad(
            (out * weights).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        close(seen[site], cache[f"{site}_grad"], site)
        close(seen[upstream], cache[f"{upstream}_grad"], upstream)
        assert seen[site].abs().max() > 0
        out = model.run_with_hooks(inputs, bwd_hooks=[(site, stop), (upstream, look)])
        torch.autograd.grad(
            (out * weights).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
    assert not seen[upstream].any(), "a replaced gradient still flows"
    assert not needs_eager(site)
