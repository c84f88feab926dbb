"""The two branches of a block, from the value before the output projection to what is added to the residual stream.

A branch computes ``added = then(inner @ W + b)``: ``inner`` is ``attn.hook_z`` (heads side by side) or ``mlp.hook_post``, ``then`` what follows
the projection: nothing, a LayerScale, or a norm (Gemma 2). This is the one place that knows what follows; reads, weights and attributions ask it.

With a norm behind it, no head adds anything by itself: what it adds depends on the length of all heads together. Held at the denominators of a run
the branch is linear, and shares add up: ``added = Σ_h then.linear(z_h W_O^h, d) + bias``, where ``d`` is the denominator and ``bias`` what is
added whatever the heads do: the projection's bias through the same map, and the norm's own.

Not covered: branches whose output projection is no linear map (its rounding belongs to no head), gates that depend on the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.model.norms import Identity, following
from circuitvision.model.sites import SiteName
from circuitvision.model.weights import linear_bias, linear_weight, main_device

if TYPE_CHECKING:
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Block, Tower


@dataclass(frozen=True)
class BranchNames:
    """What a branch's parts are called in a block's layout, and its sites."""

    output: str
    """The output projection, in the layout."""
    then: str
    """The module that follows it, in the layout."""
    norm: str
    """The stem of the sites of a norm that follows."""
    inner: str
    """The site of what the output projection reads."""
    added: str
    """The site of what is added to the stream."""

    @property
    def normalized(self) -> str:
        """The site behind the norm's division."""
        return f"{self.norm}.hook_normalized"


BRANCHES = {
    "attn": BranchNames("o", "attn_add", "ln1_post", "attn.hook_z", "hook_attn_out"),
    "mlp": BranchNames("mlp_out", "mlp_add", "ln2_post", "mlp.hook_post", "hook_mlp_out"),
}
RESULT = "attn.hook_result"


class Branch:
    """One branch ("attn" or "mlp") of one block; ``block.branch(name)``."""

    def __init__(self, block: Block, name: str) -> None:
        self.block, self.name, self.names = block, name, BRANCHES[name]

    @property
    def output(self) -> nn.Module:
        """The output projection."""
        return self.block.part(self.names.output)

    @property
    def last(self) -> nn.Module | None:
        """The module behind the output projection, if there is one."""
        return self.block.part(self.names.then) if self.block.has(self.names.then) else None

    @property
    def then(self) -> Identity:
        """What follows the output projection, as a map."""
        return following(self.last)

    # -- before what follows -----------------------------------------------------------------------------------------------------------------

    def product(self, inner: Tensor, bias: bool = True) -> Float[Tensor, "... d_model"]:
        """The output projection of ``[... head d_head]`` or ``[... d_mlp]``, as a product with the weight it computes with."""
        inner = self._flat(inner)
        weight, offset = linear_weight(self.output, inner.dtype, inner.device)
        out = inner @ weight.to(inner)
        return out if offset is None or not bias else out + offset.to(out)

    def head_results(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... head d_model"]:
        """``z_h W_O^h`` for every head."""
        n_heads = self.block.tower.cfg.n_heads
        if z.ndim < 2 or z.shape[-2] != n_heads:
            raise InputError(f"z is [… head d_head] of all {n_heads} heads; this one is {tuple(z.shape)}.")
        weight, _ = linear_weight(self.output, z.dtype, z.device)
        return torch.einsum("...hd,hdm->...hm", z, rearrange(weight.to(z), "(h d) m -> h d m", h=n_heads))

    def _flat(self, inner: Tensor) -> Tensor:
        return inner.flatten(-2) if self.name == "attn" else inner

    # -- with the denominator of a run ---------------------------------------------------------------------------------------------------------

    def denominator_in(
        self, cache: ActivationCache, read: Callable[[str], Tensor] | None = None
    ) -> Float[Tensor, "... 1"] | None:
        """What the norm behind the projection divides by in a run: as recorded, or computed from what was; None where no norm follows.

        ``read`` reads a site of the cache in a way of its own (one pass, some positions). Raises InputError where the cache holds none of the
        sites that say it.
        """
        then = self.then
        if not then.normed:
            return None
        tower, stored = self.block.tower, set(cache)
        prefix, read = f"{tower.name}.blocks.{self.block.layer}", read or cache.__getitem__
        ways: dict[str, Callable[[Tensor], Tensor | None]] = {
            f"{self.names.norm}.hook_scale": lambda scale: scale,
            self.names.inner: lambda inner: then.denominator(self.product(inner)),
        }
        if self.name == "attn":
            ways[RESULT] = lambda results: then.denominator(self._with_bias(results.sum(-2)))
        for site, of in ways.items():
            if f"{prefix}.{site}" in stored:
                with tower.hooks_disabled():
                    return of(read(f"{prefix}.{site}"))
        raise InputError(
            f"{prefix}.{self.names.added} passes a norm, whose denominator this cache does not hold; add {prefix}.{self.names.norm}.hook_scale or "
            f"{prefix}.{self.names.inner} to names_filter."
        )

    def bias(self, like: Tensor, denominator: Tensor | None) -> Float[Tensor, "... d_model"]:
        """What the branch adds whatever its heads or neurons do, its norm held: ``[d_model]``, or ``[row pos d_model]`` where a norm follows."""
        own = linear_bias(self.output, like.dtype, like.device)
        whole = like.new_zeros(self.block.tower.cfg.d_model) if own is None else own.to(like)
        return self.then.held(whole, denominator)

    def _with_bias(self, total: Tensor) -> Tensor:
        own = linear_bias(self.output, total.dtype, total.device)
        return total if own is None else total + own.to(total)

    # -- a value of a site ---------------------------------------------------------------------------------------------------------------------

    def written(self, site: str, value: Tensor) -> Float[Tensor, "... d_model"]:
        """What the branch adds when ``site`` has this value, as the model computes it, biases included."""
        then = self.then
        if site == self.names.added:
            return value
        if site == self.names.normalized:
            out, bias = then.gained(value), then.bias(value)
            return out if bias is None else out + bias
        return then(self._with_bias(value.sum(-2)) if site == RESULT else self.product(value))

    def share(self, site: str, value: Tensor, denominator: Tensor | None) -> Tensor:
        """The linear part of :meth:`written` with the norm held at ``denominator``: heads keep their axis, biases are left out."""
        then = self.then
        if site == self.names.added:
            return value
        if site == self.names.normalized:
            return then.gained(value)
        if self.name == "mlp":
            return then.linear(self.product(value, bias=False), denominator)
        results = value if site == RESULT else self.head_results(value)
        return then.linear(results, None if denominator is None else denominator.unsqueeze(-2))

    def sites(self) -> list[str]:
        """The sites whose values :meth:`written` takes, without the block's prefix."""
        found = [self.names.inner, *([RESULT] if self.name == "attn" else []), self.names.added]
        return [*found, self.names.normalized] if self.then.normed else found


def branch_at(tower: Tower, site: str) -> tuple[Branch, str]:
    """The branch that a site of a tower belongs to, and the site without the block's prefix; the tower's name may be left out.

    Raises UnknownSiteError for a site that is no part of a branch behind its nonlinearity.
    """
    name = SiteName.parse(site if site.startswith(f"{tower.name}.") else f"{tower.name}.{site}")
    if name.layer is not None and name.layer < len(tower.blocks):
        for branch in tower.blocks[name.layer].branches:
            if name.site in branch.sites():
                return branch, name.site
    offered = [site for branch in tower.blocks[0].branches for site in branch.sites()]
    raise UnknownSiteError(
        f"{site!r} holds nothing that a branch of the {tower.name} tower adds to its stream. Give blocks.L.SITE, with L from 0 to "
        f"{len(tower.blocks) - 1} and SITE one of {', '.join(offered)}."
    )


def written(
    tower: Tower, site: str, value: Tensor, frozen: ActivationCache | None = None, step: int | None = None
) -> Float[Tensor, "... d_model"]:
    """See :meth:`Tower.written`."""
    branch, name = branch_at(tower, site)
    _check_shape(branch, name, value)
    with tower.hooks_disabled():
        return (
            branch.written(name, value)
            if frozen is None
            else branch.share(name, value, _denominator(branch, frozen, step))
        )


def written_bias(
    tower: Tower, site: str, frozen: ActivationCache | None = None, step: int | None = None
) -> Float[Tensor, "... d_model"]:
    """See :meth:`Tower.written_bias`."""
    branch, name = branch_at(tower, site)
    if name == branch.names.added:
        raise InputError(f"{site} is what is added, biases included; ask for the bias of {branch.names.inner}.")
    if branch.then.normed and name != branch.names.normalized and frozen is None:
        raise InputError(
            f"In block {branch.block.layer} of the {tower.name} tower a norm follows, so what the bias adds depends on the run; give frozen=cache."
        )
    like = torch.empty(0, dtype=tower.dtype, device=main_device(branch.output))
    with tower.hooks_disabled():
        if name == branch.names.normalized:
            offset = branch.then.bias(like)
            return like.new_zeros(tower.cfg.d_model) if offset is None else offset
        denominator = None if frozen is None else _denominator(branch, frozen, step)
        return branch.bias(like if denominator is None else denominator, denominator)


def _denominator(branch: Branch, cache: ActivationCache, step: int | None) -> Tensor | None:
    return branch.denominator_in(cache, None if step is None else lambda name: cache.one_pass(name, step))


def _check_shape(branch: Branch, site: str, value: Tensor) -> None:
    cfg = branch.block.tower.cfg
    wanted = {
        "attn.hook_z": (cfg.n_heads, cfg.d_head),
        RESULT: (cfg.n_heads, cfg.d_model),
        "mlp.hook_post": (cfg.d_mlp,),
    }.get(site, (cfg.d_model,))
    if tuple(value.shape[-len(wanted) :]) != wanted:
        raise InputError(f"A value of {site} ends in {list(wanted)}; this one is {list(value.shape)}.")
