"""Every site as a function of the sites before it, computed by the tests' own maths from the raw weights of the module.

An equation must hold in a clean run and in any edited run whose cache sees the edit, except the one that defines the edited site itself. So an edit
that reaches the wrong head or position, that reaches one of two consumers, or that is thrown away, breaks an equation next to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import circuitvision as cv
from tests.parts import has_part, module_of


@dataclass(frozen=True)
class Equation:
    """`site` must hold `value`, bit for bit where `exact`; `where` masks entries that are not defined by it."""

    site: str
    value: Tensor
    exact: bool = False
    where: Tensor | None = None


def norm_of(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Denominator and normalised value of a LayerNorm or of an RMSNorm."""
    centred = x - x.mean(-1, keepdim=True) if isinstance(module, torch.nn.LayerNorm) else x
    eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)
    scale = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scale, centred


def gained(module: Any, normalized: Tensor) -> Tensor:
    """Gain and bias of a norm."""
    offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
    out = normalized * (offset + module.weight)
    bias = getattr(module, "bias", None)
    return out if bias is None else out + bias


def norm_equations(prefix: str, module: Any, x: Tensor, cache: Any) -> Iterator[Equation]:
    scale, centred = norm_of(module, x)
    yield Equation(f"{prefix}.hook_scale", scale)
    yield Equation(f"{prefix}.hook_normalized", centred / cache[f"{prefix}.hook_scale"])


def activation(name: str, x: Tensor) -> Tensor:
    """The activation functions of the zoo's configs."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "gelu_pytorch_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "gelu":
        return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))
    raise AssertionError(f"unknown activation {name!r}")


class Structure:
    """The structural equations of a model, given the cache of one forward pass."""

    def __init__(self, model: cv.HookedModel, case: Any) -> None:
        self.model, self.case = model, case

    def equations(self, cache: Any, only: str = "", edited: str = "", without: str = "") -> Iterator[Equation]:
        """The equations of a run, of one tower if `only` names it, not of `without`; `edited` is the kind of site that was changed."""
        for name, tower in self.model.towers.items():
            if only not in ("", name) or name == without:
                continue
            for block in tower.blocks:
                yield from self.attention_half(name, tower, block, cache, edited)
                yield from self.mlp_half(name, tower, block, cache)

    def attention_half(self, name: str, tower: Any, block: Any, cache: Any, edited: str) -> Iterator[Equation]:
        p, cfg = f"{name}.blocks.{block.layer}", tower.cfg
        resid = cache[f"{p}.hook_resid_pre"]
        before = f"{name}.hook_input" if block.layer == 0 else f"{name}.blocks.{block.layer - 1}.hook_resid_post"
        yield Equation(f"{p}.hook_resid_pre", cache[before], exact=True)
        ln1 = module_of(block, "ln1")
        yield from norm_equations(f"{p}.ln1", ln1, resid, cache)
        entering = gained(ln1, cache[f"{p}.ln1.hook_normalized"])
        for letter, weight, bias in (
            ("q", block.W_Q, block.b_Q),
            ("k", block.W_K, block.b_K),
            ("v", block.W_V, block.b_V),
        ):
            own = f"{p}.hook_{letter}_input"
            yield Equation(own, resid.unsqueeze(-2).expand_as(cache[own]), exact=True)
            if edited == f"hook_{letter}_input":
                scale, centred = norm_of(ln1, cache[own])
                value = torch.einsum("rphm,hmd->rphd", gained(ln1, centred / scale), weight) + bias
            else:
                value = torch.einsum("rpm,hmd->rphd", entering, weight) + bias
            yield Equation(f"{p}.attn.hook_{letter}", value)
        yield from self.inside_attention(name, tower, p, cache)
        z = cache[f"{p}.attn.hook_z"]
        yield Equation(f"{p}.attn.hook_result", torch.einsum("rphd,hdm->rphm", z, block.W_O))
        summed = cache[f"{p}.attn.hook_result"].sum(-2) + block.b_O
        yield from self.added(p, block, "attn_add", "ln1_post", "hook_attn_out", summed, cache)
        yield Equation(f"{p}.hook_resid_mid", resid + cache[f"{p}.hook_attn_out"], exact=True)
        assert cfg.n_heads == z.shape[-2]

    def inside_attention(self, name: str, tower: Any, p: str, cache: Any) -> Iterator[Equation]:
        cfg = tower.cfg
        q, k = cache[f"{p}.attn.hook_q"], cache[f"{p}.attn.hook_k"]
        if cfg.rotary:
            # A rotation keeps lengths; what it does to directions shows in the scores.
            for letter, value in (("q", q), ("k", k)):
                rotated = cache[f"{p}.attn.hook_rot_{letter}"]
                yield Equation(
                    f"{p}.attn.hook_rot_{letter}", rotated * (value.norm(dim=-1) / rotated.norm(dim=-1))[..., None]
                )
            q, k = cache[f"{p}.attn.hook_rot_q"], cache[f"{p}.attn.hook_rot_k"]
        k, v = (
            self.with_cached(name, p, k, "hook_rot_k", cache),
            self.with_cached(name, p, cache[f"{p}.attn.hook_v"], "hook_v", cache),
        )
        repeat = cfg.n_heads // cfg.n_kv_heads
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
        query_scale = getattr(tower.config, "query_pre_attn_scalar", None) or cfg.d_head
        scores = torch.einsum("rqhd,rkhd->rhqk", q, k) * query_scale**-0.5
        cap = getattr(tower.config, "attn_logit_softcapping", None)
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        seen = cache[f"{p}.attn.hook_attn_scores"]
        visible = seen > max(torch.finfo(torch.float32).min, torch.finfo(seen.dtype).min) / 4
        yield Equation(f"{p}.attn.hook_attn_scores", scores, where=visible)
        pattern = cache[f"{p}.attn.hook_pattern"]
        yield Equation(
            f"{p}.attn.hook_pattern", seen.softmax(-1), where=visible.any(-1, keepdim=True).expand_as(pattern)
        )
        yield Equation(f"{p}.attn.hook_z", torch.einsum("rhqk,rkhd->rqhd", pattern, v))

    def with_cached(self, name: str, p: str, own: Tensor, site: str, cache: Any) -> Tensor:
        """Cached positions first, then the tower's own: PI0's expert reads the prefix."""
        if name != "action":
            return own
        prefix = cache[p.replace("action", "language", 1) + f".attn.{site}"]
        return torch.cat([prefix, own], dim=1)

    def added(
        self, p: str, block: Any, add: str, norm_name: str, site: str, summed: Tensor, cache: Any
    ) -> Iterator[Equation]:
        """What a branch adds: itself, times LayerScale, or through a norm of its own."""
        if not has_part(block, add):
            yield Equation(f"{p}.{site}", summed)
            return
        module: Any = module_of(block, add)
        if hasattr(module, "lambda1"):
            yield Equation(f"{p}.{site}", summed * module.lambda1)
            return
        yield from norm_equations(f"{p}.{norm_name}", module, summed, cache)
        yield Equation(f"{p}.{site}", gained(module, cache[f"{p}.{norm_name}.hook_normalized"]))

    def mlp_half(self, name: str, tower: Any, block: Any, cache: Any) -> Iterator[Equation]:
        p = f"{name}.blocks.{block.layer}"
        mid = cache[f"{p}.hook_resid_mid"]
        yield Equation(f"{p}.hook_mlp_in", mid, exact=True)
        ln2 = module_of(block, "ln2")
        yield from norm_equations(f"{p}.ln2", ln2, cache[f"{p}.hook_mlp_in"], cache)
        entering = gained(ln2, cache[f"{p}.ln2.hook_normalized"])
        pre = cache[f"{p}.mlp.hook_pre"]
        act = activation(tower.cfg.act, pre)
        linear = entering @ block.W_in + block.b_in
        if tower.cfg.gated_mlp:
            gate_bias = getattr(module_of(block, "mlp_gate"), "bias", None)
            gate = entering @ block.W_gate
            yield Equation(f"{p}.mlp.hook_pre", gate if gate_bias is None else gate + gate_bias)
            yield Equation(f"{p}.mlp.hook_pre_linear", linear)
            yield Equation(f"{p}.mlp.hook_post", act * cache[f"{p}.mlp.hook_pre_linear"])
        else:
            yield Equation(f"{p}.mlp.hook_pre", linear)
            yield Equation(f"{p}.mlp.hook_post", act)
        written = cache[f"{p}.mlp.hook_post"] @ block.W_out + block.b_out
        yield from self.added(p, block, "mlp_add", "ln2_post", "hook_mlp_out", written, cache)
        yield Equation(f"{p}.hook_resid_post", mid + cache[f"{p}.hook_mlp_out"], exact=True)
