"""The branches of a block: what each reads of the residual stream, and what it adds to it.

A branch computes ``added = then(inner @ W + b)``: ``inner`` is ``attn.hook_z`` (heads side by side) or ``mlp.hook_post``, ``then`` what follows
the projection: nothing, a LayerScale, a gate, or a norm (Gemma 2). This is the one place that knows what follows; reads, weights and attributions
ask it.

With a norm behind it, no head adds anything by itself: what it adds depends on the length of all heads together. Held at the denominators of a run
the branch is linear, and shares add up: ``added = Σ_h then.linear(z_h W_O^h, d) + bias``, where ``d`` is the denominator and ``bias`` what is
added whatever the heads do: the projection's bias through the same map, and the norm's own.

Not covered: branches whose output projection is no linear map (its rounding belongs to no head), gates that depend on the input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.model import block_layout
from circuitvision.model.block_layout import Gate
from circuitvision.model.norms import Identity, following
from circuitvision.model.projections import Projection, gated_columns, qkv_columns
from circuitvision.model.sites import SiteName
from circuitvision.model.spec import is_norm, require
from circuitvision.model.weights import main_device, out_width

if TYPE_CHECKING:
    from circuitvision.model.block import Block
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Tower


class Branch:
    """One branch of one block; ``block.branch("attn")``."""

    inner = ""
    """The site of what the output projection reads; "" where there is none."""

    def __init__(self, block: Block, layout: block_layout.Branch, number: int) -> None:
        self.block, self.layout, self.number, self.name = block, layout, number, layout.name
        self.core: Any = layout.core

    # -- modules and sites ---------------------------------------------------------------------------------------------------------------------

    def _module(self, path: str, what: str) -> nn.Module:
        return require(self.block.module, path, f"{what} of {self.name} in block {self.block.layer}")

    @property
    def module(self) -> nn.Module:
        """The attention module, the MLP, or whatever the branch is."""
        return self._module(self.core.module, "module")

    @property
    def norm(self) -> nn.Module | None:
        """The norm that the stream is read through, if there is one."""
        return None if self.layout.norm is None else self._module(self.layout.norm, "norm")

    @property
    def sum_norm(self) -> nn.Module | None:
        """The norm that the sum passes, if there is one."""
        return None if self.layout.sum_norm is None else self._module(self.layout.sum_norm, "sum_norm")

    @cached_property
    def norm_name(self) -> str:
        """How its norm is called in sites: ``ln1`` of the first branch; branches that read through one norm share the name."""
        layouts = self.block.layout.branches
        first = next(
            (number for number, one in enumerate(layouts) if one.norm and one.norm == self.layout.norm), self.number
        )
        return f"ln{first + 1}"

    @property
    def shares_norm(self) -> bool:
        """Whether a branch before it reads the stream through the same norm."""
        return self.norm_name != f"ln{self.number + 1}"

    @property
    def entry(self) -> nn.Module:
        """The module that first reads the stream: the norm, or else the branch itself."""
        return self.module if self.norm is None else self.norm

    @property
    def post_name(self) -> str:
        """How a norm behind the core is called in sites: ``ln1_post``."""
        return f"ln{self.number + 1}_post"

    @property
    def normalized(self) -> str:
        """The site behind the division of that norm."""
        return f"{self.post_name}.hook_normalized"

    @property
    def added(self) -> str:
        """The site of what is added to the stream."""
        return f"hook_{self.name}_out"

    @property
    def read_site(self) -> str:
        """The site of what it reads of the stream, where that is one value."""
        return f"hook_{self.name}_in"

    @cached_property
    def stream(self) -> str:
        """The site of the stream that it reads."""
        before = self.block.layout.branches[: self.number]
        if self.block.layout.parallel or not before:
            return "hook_resid_pre"
        return "hook_resid_mid" if len(before) == 1 else f"hook_resid_mid_{before[-1].name}"

    @property
    def output(self) -> nn.Module:
        """The last module of the core: its output projection, where it has one."""
        return self.module

    @property
    def returned_by(self) -> nn.Module:
        """The module that returns what the core computes: the whole of it, where that holds the output projection."""
        return self.module if self.holds_output else self.output

    @property
    def _then(self) -> list[nn.Module | Gate]:
        return [one if isinstance(one, Gate) else self._module(one, "then") for one in self.layout.then]

    @property
    def last(self) -> nn.Module | None:
        """The last module behind the output projection, if there is one."""
        modules = [one for one in self._then if isinstance(one, nn.Module)]
        return modules[-1] if modules else None

    @property
    def then(self) -> Identity:
        """What follows the output projection, as a map."""
        return following(self.block.module, self._then)

    @property
    def is_gated(self) -> bool:
        """Whether the block multiplies with parameters behind the last module, so that no module returns what is added."""
        return bool(self.layout.then) and isinstance(self.layout.then[-1], Gate)

    @property
    def gates(self) -> Identity:
        """What the block's code does to what the last module returns."""
        behind: list[nn.Module | Gate] = []
        for one in self._then:
            behind = [*behind, one] if isinstance(one, Gate) else []
        return following(self.block.module, behind)

    @property
    def post_norm(self) -> nn.Module | None:
        """The norm behind the core, if there is one."""
        return next((one for one in self._then if isinstance(one, nn.Module) and is_norm(one)), None)

    @property
    def holds_output(self) -> bool:
        """Whether the output projection is a part of :attr:`module`, so that handing that back hands back the whole core."""
        output = self.output
        return any(one is output for one in self.module.modules())

    # -- a value of a site ---------------------------------------------------------------------------------------------------------------------

    def sites(self) -> list[str]:
        """The sites whose values :meth:`written` takes, without the block's prefix."""
        found = [*self.inner_sites(), self.added]
        return [*found, self.normalized] if self.then.normed else found

    def inner_sites(self) -> list[str]:
        """The sites between its nonlinearity and its output projection."""
        return [self.inner] if self.inner else []

    def value_shape(self, site: str) -> tuple[int, ...]:
        """How a value of one of :meth:`sites` ends."""
        return (self.block.tower.cfg.d_model,)

    def written(self, site: str, value: Tensor) -> Float[Tensor, "... d_model"]:
        """What the branch adds when ``site`` has this value, as the model computes it, biases included."""
        then = self.then
        if site == self.added:
            return value
        if site == self.normalized:
            out, bias = then.gained(value), then.bias(value)
            return out if bias is None else out + bias
        return then(self.projected(site, value))

    def share(self, site: str, value: Tensor, denominator: Tensor | None) -> Tensor:
        """The linear part of :meth:`written` with the norm held at ``denominator``: heads keep their axis, biases are left out."""
        if site == self.added:
            return value
        if site == self.normalized:
            return self.then.gained(value)
        return self._share_of(site, value, denominator)

    def projected(self, site: str, value: Tensor) -> Float[Tensor, "... d_model"]:
        """What the output projection makes of a value of a site before it, bias included."""
        raise NotImplementedError

    def head_tangents(self, z: Tensor, change: Tensor) -> Tensor:
        """See :meth:`AttentionBranch.head_tangents`; only attention has heads."""
        raise NotImplementedError

    def _share_of(self, site: str, value: Tensor, denominator: Tensor | None) -> Tensor:
        raise NotImplementedError

    def denominator_in(
        self, cache: ActivationCache, read: Callable[[str], Tensor] | None = None
    ) -> Float[Tensor, "... 1"] | None:
        """What the norm behind the core divides by in a run: as recorded, or computed from what was; None where no norm follows.

        ``read`` reads a site of the cache in a way of its own (one pass, some positions). Raises InputError where the cache holds none of the
        sites that say it.
        """
        then = self.then
        if not then.normed:
            return None
        tower, stored = self.block.tower, set(cache)
        prefix, read = f"{tower.name}.blocks.{self.block.layer}", read or cache.__getitem__
        scale = f"{self.post_name}.hook_scale"
        for site in (scale, *self.inner_sites()):
            if f"{prefix}.{site}" in stored:
                value = read(f"{prefix}.{site}")
                with tower.hooks_disabled():
                    return value if site == scale else then.denominator(self.projected(site, value))
        raise InputError(
            f"{prefix}.{self.added} passes a norm, whose denominator this cache does not hold; add "
            f"{' or '.join(f'{prefix}.{site}' for site in (scale, *self.inner_sites()[:1]))} to names_filter."
        )

    def bias(self, like: Tensor, denominator: Tensor | None) -> Float[Tensor, "... d_model"]:
        """What the branch adds whatever its heads or neurons do, its norm held: ``[d_model]``, or ``[row pos d_model]`` where a norm follows."""
        return self.then.held(like.new_zeros(self.block.tower.cfg.d_model), denominator)


class ProjectedBranch(Branch):
    """A branch that ends in an output projection."""

    @property
    def out(self) -> Projection:
        """The output projection."""
        return Projection(self.output)

    def product(self, inner: Tensor, bias: bool = True) -> Float[Tensor, "... d_model"]:
        """The output projection of ``[... head d_head]`` or ``[... d_mlp]``, as a product with the weight it computes with."""
        weight, offset = self.out.weight_and_bias(inner.dtype, inner.device)
        out = inner @ weight.to(inner)
        return out if offset is None or not bias else out + offset.to(out)

    def bias(self, like: Tensor, denominator: Tensor | None) -> Float[Tensor, "... d_model"]:
        own = self.out.bias(like.dtype, like.device)
        whole = like.new_zeros(self.block.tower.cfg.d_model) if own is None else own.to(like)
        return self.then.held(whole, denominator)

    def _reads(self, path: str, fused: block_layout.Fused | None, what: str) -> nn.Module:
        return self._module(path or (fused.path if fused else ""), what)


class AttentionBranch(ProjectedBranch):
    """Attention: projections of queries, keys and values, and the output projection."""

    core: block_layout.Attention

    @property
    def inner(self) -> str:  # type: ignore[override]
        return f"{self.name}.hook_z"

    @property
    def result(self) -> str:
        """The site of each head's share of the output projection."""
        return f"{self.name}.hook_result"

    @property
    def output(self) -> nn.Module:
        return self._module(self.core.o, "o")

    @property
    def returned_by(self) -> nn.Module:
        return self.output

    @property
    def source(self) -> Tower | None:
        """The tower whose final stream keys and values are made of; None for the block's own."""
        return self.block.tower.siblings[self.core.keys_of] if self.core.keys_of else None

    def d_head_of(self) -> tuple[int, int]:
        """How many features the query projection (a fused one) writes, and how many heads share them."""
        n_heads, n_kv_heads = self.block.tower.n_heads
        fused = self.core.qkv
        return out_width(self._reads(self.core.q, fused, "q")), n_heads + 2 * n_kv_heads if fused else n_heads

    @property
    def d_head(self) -> int:
        """The width of one head."""
        width, count = self.d_head_of()
        return width // count

    def projection(self, letter: str) -> Projection:
        """The projection of queries ("q"), keys or values."""
        fused = self.core.qkv
        if fused is None:
            return Projection(self._module(getattr(self.core, letter), letter))
        n_heads, n_kv_heads = self.block.tower.n_heads
        return Projection(self._module(fused.path, "qkv"), qkv_columns(fused, letter, n_heads, n_kv_heads, self.d_head))

    @property
    def letters(self) -> str:
        """Which of queries, keys and values are made of the block's own stream."""
        return "q" if self.core.keys_of else "qkv"

    def heads_of(self, letter: str) -> int:
        """How many heads queries ("q"), keys or values have."""
        return self.block.tower.n_heads[letter != "q"]

    def slot(self, letter: str) -> str:
        """The site of what one head's projection reads of the stream: ``hook_q_input``; ``cross_attn.hook_q_input`` of another branch."""
        before = "" if self.name == "attn" else f"{self.name}."
        return f"{before}hook_{letter}_input"

    def head_norm(self, letter: str) -> nn.Module | None:
        """The norm of queries ("q"), keys or values, if there is one."""
        path = getattr(self.core, f"{letter}_norm")
        return self._module(path, f"{letter}_norm") if path else None

    def normed_heads(self, letter: str, value: Float[Tensor, "row pos head d_head"]) -> Tensor:
        """What scores and sums are made of: queries, keys or values behind their norm, before any rotation."""
        norm = self.head_norm(letter)
        if norm is None:
            return value
        with torch.no_grad(), self.block.tower.hooks_disabled():
            if in_features(norm) in (0, value.shape[-1]):
                return norm(value)
            return norm(value.flatten(-2)).unflatten(-1, value.shape[-2:])

    def head_results(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... head d_model"]:
        """``z_h W_O^h`` for every head."""
        n_heads = self.heads_of("q")
        if z.ndim < 2 or z.shape[-2] != n_heads:
            raise InputError(f"z is [… head d_head] of all {n_heads} heads; this one is {tuple(z.shape)}.")
        weight, _ = self.out.weight_and_bias(z.dtype, z.device)
        return torch.einsum("...hd,hdm->...hm", z, rearrange(weight.to(z), "(h d) m -> h d m", h=n_heads))

    def head_tangents(
        self, z: Float[Tensor, "... head d_head"], change: Float[Tensor, "... head d_head"]
    ) -> Float[Tensor, "... head d_model"]:
        """What a small change of each head alone adds: the derivative of :meth:`written` at ``z``, head by head, through a norm behind them too."""
        then, results = self.then, self.head_results(change)
        if not then.normed:
            return then.linear(results, None)
        whole = self.projected(self.inner, z).unsqueeze(-2).expand_as(results).contiguous()
        return torch.func.jvp(then, (whole,), (results.to(whole.dtype),))[1].to(change.dtype)

    def inner_sites(self) -> list[str]:
        return [self.inner, self.result]

    def value_shape(self, site: str) -> tuple[int, ...]:
        cfg = self.block.tower.cfg
        shapes = {self.inner: (cfg.n_heads, cfg.d_head), self.result: (cfg.n_heads, cfg.d_model)}
        return shapes.get(site, (cfg.d_model,))

    def projected(self, site: str, value: Tensor) -> Tensor:
        if site != self.result:
            return self.product(value.flatten(-2))
        total = value.sum(-2)
        own = self.out.bias(total.dtype, total.device)
        return total if own is None else total + own.to(total)

    def _share_of(self, site: str, value: Tensor, denominator: Tensor | None) -> Tensor:
        results = value if site == self.result else self.head_results(value)
        return self.then.linear(results, None if denominator is None else denominator.unsqueeze(-2))


class MLPBranch(ProjectedBranch):
    """An MLP: one or two input maps, and the output map."""

    core: block_layout.MLP

    @property
    def inner(self) -> str:  # type: ignore[override]
        return f"{self.name}.hook_post"

    @property
    def output(self) -> nn.Module:
        return self._module(self.core.fc_out, "fc_out")

    @property
    def fc_in(self) -> Projection:
        """The input map (gated: of the linear half)."""
        return self._input("in", self.core.fc_in)

    @property
    def gate(self) -> Projection | None:
        """The gate's map, if there is one."""
        return self._input("gate", self.core.gate) if self.core.is_gated else None

    def _input(self, part: str, path: str) -> Projection:
        fused = self.core.fused
        module = self._reads(path, fused, f"fc_{part}")
        return Projection(module, None if fused is None else gated_columns(fused, part, out_width(module)))

    @property
    def inputs(self) -> dict[str, Projection]:
        """The maps that read the stream, by the sites of what they write."""
        gate = self.gate
        if gate is None:
            return {f"{self.name}.hook_pre": self.fc_in}
        return {f"{self.name}.hook_pre": gate, f"{self.name}.hook_pre_linear": self.fc_in}

    def value_shape(self, site: str) -> tuple[int, ...]:
        cfg = self.block.tower.cfg
        return (cfg.d_mlp if site == self.inner else cfg.d_model,)

    def projected(self, site: str, value: Tensor) -> Tensor:
        return self.product(value)

    def _share_of(self, site: str, value: Tensor, denominator: Tensor | None) -> Tensor:
        return self.then.linear(self.product(value, bias=False), denominator)


KINDS: dict[type, type[Branch]] = {
    block_layout.Attention: AttentionBranch,
    block_layout.MLP: MLPBranch,
    block_layout.Module: Branch,
}


def branches_of(block: Block) -> list[Branch]:
    """The branches of a block, in the order in which they are added."""
    return [KINDS[type(one.core)](block, one, number) for number, one in enumerate(block.layout.branches)]


def in_features(norm: nn.Module) -> int:
    """How many features a norm normalises together, by the length of its gain; 0 where it has none."""
    gain = next(iter(norm.parameters()), None)
    return 0 if gain is None else int(gain.shape[-1])


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
    wanted = branch.value_shape(name)
    if tuple(value.shape[-len(wanted) :]) != wanted:
        raise InputError(f"A value of {name} ends in {list(wanted)}; this one is {list(value.shape)}.")
    with tower.hooks_disabled():
        if frozen is None:
            return branch.written(name, value)
        return branch.share(name, value, _denominator(branch, frozen, step))


def written_bias(
    tower: Tower, site: str, frozen: ActivationCache | None = None, step: int | None = None
) -> Float[Tensor, "... d_model"]:
    """See :meth:`Tower.written_bias`."""
    branch, name = branch_at(tower, site)
    if name == branch.added:
        raise InputError(
            f"{site} is what is added, biases included; ask for the bias of {branch.inner or 'another site'}."
        )
    if branch.then.normed and name != branch.normalized and frozen is None:
        raise InputError(
            f"In block {branch.block.layer} of the {tower.name} tower a norm follows, so what the bias adds depends on the run; give frozen=cache."
        )
    like = torch.empty(0, dtype=tower.dtype, device=main_device(branch.output))
    with tower.hooks_disabled():
        if name == branch.normalized:
            offset = branch.then.bias(like)
            return like.new_zeros(tower.cfg.d_model) if offset is None else offset
        denominator = None if frozen is None else _denominator(branch, frozen, step)
        return branch.bias(like if denominator is None else denominator, denominator)


def _denominator(branch: Branch, cache: ActivationCache, step: int | None) -> Tensor | None:
    return branch.denominator_in(cache, None if step is None else lambda name: cache.one_pass(name, step))
