"""The gradient at every input slot of heads and MLPs, from a cache that holds gradients: nothing per head is kept by the forward pass.

What one head reads of the stream (``hook_q_input``, ``hook_k_input``, ``hook_v_input``) enters through the block's first norm and one projection, so

``gradient at the slot = J(x)ᵀ (g_q W_Qᵀ)``,

with ``x`` the stream, ``g_q`` the gradient at the projection's output and ``Jᵀ`` the norm's vector-Jacobian product at ``x``. Rotation, norms of
queries and keys, masks and keys that another tower reads are in ``g_q`` already. ``hook_mlp_in`` likewise, through the MLP's norm and its
input (and gate) weights. A key or value head that serves several query heads has one slot, whose gradient is that of all of them.

Recording the derived sites instead keeps ``row pos head d_model`` for every slot of every layer at once; here one slot is computed when it is read.
The sum over slots is the stream's own: ``g(resid_pre) = g(resid_mid) + Σ_heads g(q) + g(k) + g(v)``.

Not covered: a run whose slots were edited (the gradient is then that of the edited copy), blocks whose branches read something else than the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, UnknownSiteError, nearest
from circuitvision.model.branches import AttentionBranch, MLPBranch
from circuitvision.model.projections import Projection
from circuitvision.model.weights import main_device

if TYPE_CHECKING:
    from circuitvision.model.block import Block
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Tower


@dataclass(frozen=True)
class Slot:
    """Where an input slot begins and ends: the stream's site, the norm, and the projections behind it by the sites of their outputs."""

    stream: str
    norm: nn.Module | None
    reads: dict[str, Projection]
    has_heads: bool


def slots_of(block: Block) -> dict[str, Slot]:
    """The slots of a block by their sites, without its prefix: those that read the block's own stream."""
    found: dict[str, Slot] = {}
    for branch in block.branches:
        if isinstance(branch, AttentionBranch):
            for letter in branch.letters:
                reads = {f"{branch.name}.hook_{letter}": branch.projection(letter)}
                found[branch.slot(letter)] = Slot(branch.stream, branch.norm, reads, has_heads=True)
        elif isinstance(branch, MLPBranch):
            found[branch.read_site] = Slot(branch.stream, branch.norm, branch.inputs, has_heads=False)
    return found


def slot_sites(tower: Tower, layers: Sequence[int] | None = None) -> list[str]:
    """The sites that a run must record for :class:`SlotGradients` of these layers (None: all)."""
    names: dict[str, None] = {}
    for layer in range(tower.cfg.n_layers) if layers is None else layers:
        block = tower.blocks[layer]
        for slot in slots_of(block).values():
            names |= dict.fromkeys(f"{block.prefix}.{part}" for part in (slot.stream, *slot.reads))
    return list(names)


class SlotGradients(Mapping[str, Tensor]):
    """Gradients by slot name, ``[row pos head d_model]`` (``[row pos d_model]`` at ``hook_mlp_in``), layer by layer; each computed when it is read.

    It holds the slots for which the cache has the stream and the gradients behind the projections. Nothing computed is kept: of one
    layer after another, ``for name, gradient in slots.items()``, one tensor is alive at a time.

    Raises:
        InputError: a cache without gradients, or without what any slot needs.
    """

    def __init__(self, tower: Tower, cache: ActivationCache | Mapping[str, Tensor]) -> None:
        self.tower, self.cache = tower, cache
        stored = set(cache)
        self._slots = {
            f"{block.prefix}.{site}": (block, slot)
            for block in tower.blocks
            for site, slot in slots_of(block).items()
            if _needs(block, slot) <= stored
        }
        if not self._slots:
            raise InputError(
                f"This cache does not hold the gradients that slots of the {tower.name} tower follow from; record them with "
                "model.run_with_cache(inputs, tower.slot_sites(), incl_bwd=True, metric=…)."
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __getitem__(self, name: str) -> Float[Tensor, "row pos ... d_model"]:
        if name not in self._slots:
            near = ", ".join(nearest(str(name), self._slots))
            raise UnknownSiteError(f"{name!r} is no slot whose gradient follows from this cache. Nearest: {near}.")
        block, slot = self._slots[name]
        gradients = {read: self.cache[f"{block.prefix}.{read}_grad"] for read in slot.reads}
        place, home = main_device(block.module), next(iter(gradients.values())).device
        stream = self.cache[f"{block.prefix}.{slot.stream}"].to(place)
        gradients = {read: gradient.to(place) for read, gradient in gradients.items()}
        # Inference tensors cannot be tracked; copies made here can.
        with torch.inference_mode(False), torch.enable_grad(), self.tower.hooks_disabled():
            stream = stream.detach().clone().requires_grad_(True)
            normed = stream * 1 if slot.norm is None else slot.norm.forward(stream)
            if not slot.has_heads:
                entering = torch.stack(
                    [own.clone() @ _weight(slot.reads[read], own).T for read, own in gradients.items()]
                ).sum(0)
                found = torch.autograd.grad(normed, stream, entering)[0]
            else:
                ((read, gradient),) = gradients.items()
                found = self._per_head(slot.reads[read], gradient, normed, stream)
        return found.to(home)

    @staticmethod
    def _per_head(projection: Projection, gradient: Tensor, normed: Tensor, stream: Tensor) -> Tensor:
        """Head by head, so that what lies between is never there for all heads at once."""
        n_heads = gradient.shape[-2]
        weight = _weight(projection, gradient)
        found = gradient.new_empty(*gradient.shape[:-1], stream.shape[-1])
        for head, own in enumerate(rearrange(weight, "m (h d) -> h d m", h=n_heads)):
            entering = gradient[..., head, :].clone() @ own
            found[..., head, :] = torch.autograd.grad(normed, stream, entering, retain_graph=True)[0]
        return found

    def __repr__(self) -> str:
        return f"SlotGradients({len(self)} slots of the {self.tower.name} tower)"


def _needs(block: Block, slot: Slot) -> set[str]:
    return {f"{block.prefix}.{slot.stream}", *(f"{block.prefix}.{read}_grad" for read in slot.reads)}


def _weight(projection: Projection, like: Tensor) -> Tensor:
    with torch.no_grad():
        return projection.weight_and_bias(like.dtype, like.device)[0].to(like)
