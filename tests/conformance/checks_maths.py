"""Promises 2 and 4: the residual stream adds up, every site follows from those before it even under edits, and gradients are right."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import circuitvision as cv
from tests.conformance.cases import BY_HAND
from tests.conformance.equations import Structure, norm_of
from tests.conformance.oracle import expected_sites
from tests.conformance.setting import (
    Setting,
    close,
    disturb,
    groups,
    in_cells,
    needs_eager,
    nothing,
    one_layer_each,
    position_axis,
    real_cells,
    same,
)

TOLERANCE = {torch.float64: 2e-5}
"""Decoders take norms and softmaxes in float32 whatever the dtype of the weights."""


def hold(
    model: cv.HookedModel,
    setting: Setting,
    inputs: dict[str, Any],
    cache: Any,
    edited: Iterable[str] = (),
    tower: str = "",
    kind: str = "",
) -> None:
    """Every equation holds in this cache (in one tower, if named), but for the definitions of the edited sites.

    Blocks that are written down by hand as well hold what the same weights give there, with the edited values in their place.
    """
    skip = set(edited)
    real = {name: real_cells(setting, model, inputs, name) for name in model.towers}
    multiplied = hold_by_hand(model, setting, inputs, cache, skip, tower)
    for equation in Structure(model, setting.case).equations(cache, tower, kind, multiplied):
        if equation.site in skip:
            continue
        value, expected, cells = cache[equation.site], equation.value, real[equation.site.partition(".")[0]]
        what = f"{equation.site} with {kind or 'nothing'} edited"
        if cells is not None and equation.where is None and position_axis(equation.site) == 1:
            value, expected = value[cells], expected[cells]
        if equation.exact:
            same(value, expected, what)
            continue
        if equation.where is not None:
            value, expected = value[equation.where], expected[equation.where]
        close(value, expected, what, TOLERANCE.get(setting.dtype, 1e-4))


def hold_by_hand(
    model: cv.HookedModel, setting: Setting, inputs: dict[str, Any], cache: Any, edited: set[str], only: str
) -> str:
    """Compare every block site of the tower that is multiplied by hand, and return its name; "" where there is none."""
    by_hand = BY_HAND.get(setting.case.name)
    name = "" if by_hand is None else setting.case.towers[-1]
    if by_hand is None or only not in ("", name):
        return name
    entry, first = f"{name}.hook_input", f"{name}.blocks.0.hook_resid_pre"
    change = {
        first if site == entry else site: lambda value, site=site: cache[site].to(value)
        for site in edited
        if site.startswith(f"{name}.")
    }
    _, values = by_hand(model.module, inputs, change)
    assert set(values) == set(model.sites(f"{name}.blocks.**")), "a site is not multiplied by hand"
    for site, expected in values.items():
        visible = expected > torch.finfo(expected.dtype).min / 4
        what = f"{site} with {sorted(edited)[:1] or 'nothing'} edited"
        assert cache[site].shape == expected.shape, what
        close(cache[site][visible], expected[visible], what, TOLERANCE.get(setting.dtype, 1e-4))
    return name


def sites_follow_from_those_before(setting: Setting) -> None:
    """resid_pre + attn_out = resid_mid, pattern @ v = z, post(Σ result + b_O) = attn_out, … in a clean run, from raw weights."""
    model = setting.model()
    with setting.mode():
        inputs = setting.inputs(model)
        _, cache = model.run_with_cache(inputs, "**")
        hold(model, setting, inputs, cache)


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
        real = in_cells(real_cells(setting, model, inputs, names[0]), names[0])

        def edit(value: Tensor, hook: Any, written: dict[str, Tensor] = written, real: Any = real) -> Tensor:
            written[hook.name] = disturb(seed=1, where=real)(value, hook)
            return written[hook.name].clone()

        with setting.mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with model.hooks([(name, edit) for name in names]):
                _, cache = model.run_with_cache(inputs, watched)
            for name in names:
                same(cache[name], written[name], f"{name} as edited")
            hold(model, setting, inputs, cache, names, tower, kind)


def inputs_and_writes_add_up_to_the_stream(setting: Setting) -> None:
    """hook_input + every attn_out, mlp_out and other write = resid_post at every position; a norm of the sum (post-norm) is passed on the way."""
    model = setting.model()
    with setting.mode():
        _, cache = model.run_with_cache(setting.inputs(model))
    for name, tower in model.towers.items():
        total = cache[f"{name}.hook_input"]
        for layer in range(tower.cfg.n_layers):
            norms = [branch.sum_norm for branch in tower.blocks[layer].branches]
            for number, site in enumerate(tower.added_in(layer)):
                total = total + cache[f"{name}.{site}"]
                norm = norms[number] if number < len(norms) else None
                total = total if norm is None else norm(total)
        same(total, cache[f"{name}.blocks.{tower.cfg.n_layers - 1}.hook_resid_post"], f"{name}: input and writes")
        parts = cache.decompose_resid(name)
        close(parts.sum(0), total, f"{name}: decompose_resid")
        stack = cache.accumulated_resid(name, incl_mid=True)
        n_mid = sum(site.startswith(f"{name}.") and "hook_resid_mid" in site for site in expected_sites(setting.case))
        assert len(stack) == tower.cfg.n_layers + n_mid + 1
        close(stack[-1], total, f"{name}: accumulated_resid")


def resid_mid_reaches_norm_and_skip_path(setting: Setting) -> None:
    """An edit between two branches changes what the next one reads and what the skip path carries, by the same bits, in either grad mode."""
    model = setting.model()
    inputs = setting.inputs(model)
    for name, tower in model.towers.items():
        seen: set[str] = set()
        for block in tower.blocks:
            for branch in block.branches:
                if "hook_resid_mid" in branch.stream and (kind := f"{branch.name} {branch.number}") not in seen:
                    seen.add(kind)
                    _edit_between(setting, model, inputs, f"{name}.blocks.{block.layer}", block, branch)
        assert seen, f"{name} has no stream between branches"


def _edit_between(
    setting: Setting, model: cv.HookedModel, inputs: dict[str, Any], p: str, block: Any, branch: Any
) -> None:
    site, later = f"{p}.{branch.stream}", block.branches[branch.number + 1 :]
    behind = f"{p}.{later[0].stream if later else 'hook_resid_post'}"
    if branch.sum_norm is not None:
        behind = f"{p}.ln{branch.number + 1}.hook_in"
    outs = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with model.hooks([(site, disturb())]):
                out, cache = model.run_with_cache(inputs, f"{p}.*")
                outs.append(out.detach())
                _, edited = model.run_with_cache(inputs, [f"{p}.*", f"{p}.ln*.*"])
            _, clean = model.run_with_cache(inputs, f"{p}.*")
        assert not torch.equal(edited[site], clean[site])
        cells = real_cells(setting, model, inputs, site)
        cells = torch.ones(clean[site].shape[:2], dtype=torch.bool) if cells is None else cells
        carried = edited[site] + edited[f"{p}.{branch.added}"]
        same(edited[behind][cells], carried[cells], f"{site}: skip path")
        if branch.norm is None:
            same(edited[f"{p}.{branch.read_site}"][cells], edited[site][cells], f"{site}: {branch.name}")
        else:
            _, x = norm_of(branch.norm, edited[site])
            ln = f"{p}.{branch.norm_name}"
            read = edited[f"{ln}.hook_normalized"] * edited[f"{ln}.hook_scale"]
            close(read[cells], x[cells], f"{site}: {ln} input")
        same(cache[site], edited[site], f"{site}: the same edit twice")
    same(outs[0], outs[1], f"{site}: edited output without and with grad")


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
