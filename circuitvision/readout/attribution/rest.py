"""What a run did to its stream that no term says: edits, hooks of others, dropout; and whether its head read the stream at all.

A split promises that its terms add up to the value explained. In a run as the model file wrote it they do. What a hook puts into the stream is no
attention's and no MLP's: it becomes a term of its own, ``L{layer}.rest``, so that the sum still holds (of an edit inside a recording that began
before it, the block after). What is changed behind the final residual (``ln_final``, ``hook_readout``) has no term: there the split is refused.

Bounds are those of rounding, element by element: the spacing of the stream's numbers for each of its additions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName
from circuitvision.readout.recorded import held_as, recorded

if TYPE_CHECKING:
    from circuitvision.readout.attribution.terms import Stream


def spacing(value: Tensor) -> float:
    """The relative spacing of a tensor's numbers; of a converted cache that of the precision it was recorded in."""
    for coarse in (torch.bfloat16, torch.float16, torch.float32):
        finer = torch.finfo(coarse).eps > torch.finfo(value.dtype).eps
        if finer and torch.equal(value.to(coarse).to(value.dtype).nan_to_num(0.0), value.nan_to_num(0.0)):
            return torch.finfo(coarse).eps
    return torch.finfo(value.dtype).eps


def rest_of_stream(stream: Stream, layer: int) -> Float[Tensor, "row here d_model"] | None:
    """What a block's output holds beyond its input, attention and MLP; None where that is rounding, or where the cache does not hold all of them."""
    before = "hook_input" if layer == 0 else f"blocks.{layer - 1}.hook_resid_post"
    names = [f"blocks.{layer}.hook_resid_post", before, *stream.tower.writers.get(layer - 1, ())]
    names += [f"blocks.{layer}.{branch.added}" for branch in stream.tower.blocks[layer].branches]
    if not all(held_as(stream.cache, f"{stream.tower.name}.{name}") for name in names):
        return None
    after, *parts = (stream.site(name)[:, stream.here] for name in names)
    found = after - sum(parts)
    bound = (len(parts) - 1) * spacing(after) * (after.abs() + sum(part.abs() for part in parts))
    return found if bool((found.abs() > bound).any()) else None


def is_rest(stream: Stream, layer: int, branch: str, gap: Float[Tensor, " row"], sizes: Float[Tensor, " row"]) -> bool:
    """Whether what a branch wrote differs from the sum of its shares by more than the rounding of a matrix product, and of a norm after it."""
    rounds = torch.float32 if stream.tower.blocks[layer].branch(branch).layout.then else torch.float64
    eps = max(spacing(stream.final), torch.finfo(rounds).eps)
    return bool((gap.abs() > min(512 * eps, 0.02) * sizes).any())


def check_head_reads_stream(stream: Stream) -> None:
    """Raise InputError where the head of the run read something else than its final residual: a hook changed what lies between them."""
    tower, name = stream.tower, f"{stream.tower.name}.hook_readout"
    advice = "an edit there is no term of the stream. Split a run without it, or edit the last hook_resid_post instead."
    if not held_as(stream.cache, name):
        behind = [site for site in sorted(stream.cache.edited) if _is_behind(site, tower.name)]
        if behind:
            raise InputError(f"{behind[0]} was hooked in this run, behind the final residual: {advice}")
        return
    read = recorded(stream.cache, name, stream.step).to(stream.final.device)
    with torch.no_grad(), tower.hooks_disabled():
        expected = tower.output_head.in_run(stream.cache).pooled(stream.final)
    if expected.shape != read.shape:
        return
    wide = torch.promote_types(read.dtype, torch.float32)
    gap = (expected.to(wide) - read.to(wide)).abs()
    coarse = max(spacing(read), spacing(stream.final), torch.finfo(next(tower.module.parameters()).dtype).eps)
    if float(gap.nan_to_num(0.0).amax()) > min(1000 * coarse, 0.05) * max(
        float(read.abs().nan_to_num(0.0).amax()), 1e-12
    ):
        raise InputError(
            f"The {tower.name} tower's head did not read what its final norm makes of the final residual in this run: a hook changed it in "
            f"between, and {advice} "
            f"Without a hook, the readout in the table of the {tower.family.name} family is not this model's (pool, head, normed)."
        )


def _is_behind(site: str, tower: str) -> bool:
    name = SiteName.parse(site)
    return name.tower == tower and name.layer is None and name.site.startswith(("ln_final.", "pool.", "hook_readout"))


def check_sources(
    by_source: Float[Tensor, "head row source"], by_head: Float[Tensor, "head row"], layer: int, eps: float
) -> None:
    """Raise InputError where what a layer's heads took from their sources is not what they wrote."""
    gap = (by_source.sum(-1) - by_head).abs()
    sizes = by_source.abs().sum(-1) + by_head.abs()
    if bool((gap > max(1e-4, min(16 * eps, 0.05)) * sizes).any()):
        raise InputError(
            f"In layer {layer} of this run heads wrote something else than pattern times values: a hook changed attn.hook_z, or dropout is on. "
            "Split such a run by head, with direct_attribution."
        )
