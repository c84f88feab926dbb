"""The gradient at every input slot of heads and MLPs, from a cache that holds gradients: nothing per head is kept by the forward pass.

What one head reads of the stream (``hook_q_input``, ``hook_k_input``, ``hook_v_input``) enters through the block's first norm and one projection, so

``gradient at the slot = J(x)ᵀ (g_q W_Qᵀ)``,

with ``x`` the stream, ``g_q`` the gradient at the projection's output and ``Jᵀ`` the norm's vector-Jacobian product at ``x``. Rotation, norms of
queries and keys, masks and keys that another tower reads are in ``g_q`` already. ``hook_mlp_in`` likewise, through the second norm and the MLP's
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
from torch import Tensor

from circuitvision.errors import InputError, UnknownSiteError, nearest
from circuitvision.model.sites import SiteName
from circuitvision.model.weights import linear_weight, main_device

if TYPE_CHECKING:
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Block, Tower


@dataclass(frozen=True)
class Slot:
    """Where an input slot begins and ends: the stream's site, the norm, and the projections behind it with the sites of their outputs."""

    stream: str
    norm: str
    reads: dict[str, str]
    """Part of the layout -> the site of its output."""


SLOTS = {
    **{
        f"hook_{letter}_input": Slot("hook_resid_pre", "ln1", {letter: f"attn.hook_{letter}"})
        for letter in ("q", "k", "v")
    },
    "hook_mlp_in": Slot("hook_resid_mid", "ln2", {"mlp_in": "mlp.hook_pre"}),
}
GATED = Slot("hook_resid_mid", "ln2", {"mlp_gate": "mlp.hook_pre", "mlp_in": "mlp.hook_pre_linear"})


def slot_at(block: Block, site: str) -> Slot:
    """What a slot of a block is made of."""
    return GATED if site == "hook_mlp_in" and block.has("mlp_gate") else SLOTS[site]


def slot_sites(tower: Tower, layers: Sequence[int] | None = None) -> list[str]:
    """The sites that a run must record for :class:`SlotGradients` of these layers (None: all)."""
    names: dict[str, None] = {}
    for layer in range(tower.cfg.n_layers) if layers is None else layers:
        for site in SLOTS:
            slot = slot_at(tower.blocks[layer], site)
            names |= dict.fromkeys(
                f"{tower.name}.blocks.{layer}.{part}" for part in (slot.stream, *slot.reads.values())
            )
    return list(names)


class SlotGradients(Mapping[str, Tensor]):
    """Gradients by slot name, ``[row pos head d_model]`` (``[row pos d_model]`` at ``hook_mlp_in``), layer by layer; each computed when it is read.

    It holds the slots for which the cache has the stream and the gradients behind the projections. Nothing computed is kept: of one
    layer after another, ``for name, gradient in slots.items()``, one tensor is alive at a time.

    Raises:
        InputError: a cache without gradients, or without what any slot needs.
    """

    def __init__(self, tower: Tower, cache: ActivationCache) -> None:
        self.tower, self.cache = tower, cache
        stored = set(cache)
        self._names = [
            name
            for block in tower.blocks
            for site in SLOTS
            if self._needs(name := f"{tower.name}.blocks.{block.layer}.{site}") <= stored
        ]
        if not self._names:
            raise InputError(
                f"This cache does not hold the gradients that slots of the {tower.name} tower follow from; record them with "
                "model.run_with_cache(inputs, tower.slot_sites(), incl_bwd=True, metric=…)."
            )

    def _needs(self, name: str) -> set[str]:
        block, site = self._place(name)
        slot, prefix = slot_at(block, site), name.removesuffix(site)
        return {prefix + slot.stream, *(f"{prefix}{read}_grad" for read in slot.reads.values())}

    def _place(self, name: str) -> tuple[Block, str]:
        site = SiteName.parse(name)
        assert site.layer is not None
        return self.tower.blocks[site.layer], site.site

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Float[Tensor, "row pos ... d_model"]:
        if name not in self._names:
            near = ", ".join(nearest(str(name), self._names))
            raise UnknownSiteError(f"{name!r} is no slot whose gradient follows from this cache. Nearest: {near}.")
        block, site = self._place(name)
        slot, prefix = slot_at(block, site), name.removesuffix(site)
        gradients = {part: self.cache[f"{prefix}{read}_grad"] for part, read in slot.reads.items()}
        place, home = main_device(block.module), next(iter(gradients.values())).device
        stream = self.cache[prefix + slot.stream].to(place)
        gradients = {part: gradient.to(place) for part, gradient in gradients.items()}
        # Inference tensors cannot be tracked; copies made here can.
        with torch.inference_mode(False), torch.enable_grad(), self.tower.hooks_disabled():
            stream = stream.detach().clone().requires_grad_(True)
            normed = block.part(slot.norm).forward(stream)
            if site == "hook_mlp_in":
                entering = torch.stack([_behind(block, part, own) for part, own in gradients.items()]).sum(0)
                found = torch.autograd.grad(normed, stream, entering)[0]
            else:
                ((part, gradient),) = gradients.items()
                found = self._per_head(block, part, gradient, normed, stream)
        return found.to(home)

    @staticmethod
    def _per_head(block: Block, part: str, gradient: Tensor, normed: Tensor, stream: Tensor) -> Tensor:
        """Head by head, so that what lies between is never there for all heads at once."""
        n_heads = gradient.shape[-2]
        weight = _weight(block, part, gradient)
        found = gradient.new_empty(*gradient.shape[:-1], stream.shape[-1])
        for head, own in enumerate(rearrange(weight, "m (h d) -> h d m", h=n_heads)):
            entering = gradient[..., head, :].clone() @ own
            found[..., head, :] = torch.autograd.grad(normed, stream, entering, retain_graph=True)[0]
        return found

    def __repr__(self) -> str:
        return f"SlotGradients({len(self)} slots of the {self.tower.name} tower)"


def _weight(block: Block, part: str, like: Tensor) -> Tensor:
    with torch.no_grad():
        return linear_weight(block.part(part), like.dtype, like.device)[0].to(like)


def _behind(block: Block, part: str, gradient: Tensor) -> Tensor:
    return gradient.clone() @ _weight(block, part, gradient).T
