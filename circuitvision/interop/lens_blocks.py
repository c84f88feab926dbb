"""A tower's blocks and weights the way TransformerLens's tools look for them: ``view.blocks[2].attn.W_O``, ``view.blocks[2].mlp.W_out``.

TransformerLens takes ``z @ W_O`` for what a head adds to the residual stream. Where a LayerScale follows the
projection, that holds for ``W_O`` times the scale, so ``W_O``, ``W_out`` and their biases are given with it: weights
*as the stream sees them*. Where a norm follows (Gemma 2), what a head adds is not linear in ``z``, and asking for
``W_O`` raises. Nothing else is folded.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import UnknownAttributeError, UnsupportedModelError
from circuitvision.model.block import Block


def _as_added(block: Block, branch: str, value: Tensor, what: str) -> Tensor:
    """A weight or bias of an output projection, times the LayerScale that follows it, where one does."""
    then = block.branch(branch).then
    if then.normed:
        raise UnsupportedModelError(
            f"Block {block.layer} of the {block.tower.name} tower normalises the output of its projection before adding it, so no "
            f"{what} maps single heads or neurons to what they add. Use hook_attn_out and hook_mlp_out, or the tower's own {what}."
        )
    return then.linear(value)


class AttentionView:
    """The attention of one block: ``W_Q W_K W_V W_O`` and biases, detached live views except where LayerScale is multiplied in."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Tensor:
        if name in ("W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V"):
            return getattr(self._block, name).detach()
        raise UnknownAttributeError(f"The attention of a block has no {name!r}.")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """What a head's z is multiplied with to give what it adds to the stream; UnsupportedModelError where a norm follows."""
        return _as_added(self._block, "attn", self._block.W_O.detach(), "W_O")

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """What attention adds whatever the heads do; UnsupportedModelError where a norm follows."""
        return _as_added(self._block, "attn", self._block.b_O.detach(), "b_O")


class MLPView:
    """The MLP of one block: ``W_in W_gate W_out`` and biases."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Tensor:
        if name in ("W_in", "W_gate", "b_in"):
            return getattr(self._block, name).detach()
        raise UnknownAttributeError(f"The MLP of a block has no {name!r}.")

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Row ``i`` is what neuron ``i`` adds to the stream; UnsupportedModelError where a norm follows."""
        return _as_added(self._block, "mlp", self._block.W_out.detach(), "W_out")

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """What the MLP adds whatever its neurons do; UnsupportedModelError where a norm follows."""
        return _as_added(self._block, "mlp", self._block.b_out.detach(), "b_out")


class BlockView:
    """One block: ``attn``, ``mlp``, and the norms as modules; ``submodules`` and ``hook_aliases`` say where attention's output is read."""

    def __init__(self, block: Block) -> None:
        self.attn, self.mlp = AttentionView(block), MLPView(block)
        self.submodules: dict[str, Any] = {"attn": self.attn, "mlp": self.mlp}
        self.hook_aliases = {"hook_attn_out": "attn.hook_out", "hook_mlp_out": "mlp.hook_out"}
        for branch in block.branches:
            if branch.norm is not None:
                self.submodules[branch.norm_name] = branch.norm
            if branch.post_norm is not None:
                self.submodules[branch.post_name] = branch.post_norm
                self.hook_aliases[branch.added] = f"{branch.post_name}.hook_out"

    def __getattr__(self, name: str) -> nn.Module:
        found: Any = self.__dict__.get("submodules", {}).get(name)
        if found is None:
            raise UnknownAttributeError(f"This block has no {name!r}.")
        return found
