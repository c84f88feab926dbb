"""One transformer block of a tower: its branches, and live views of the weights of its attention and MLP.

Weights follow TransformerLens: row vectors, so ``q = x @ W_Q[head] + b_Q[head]``; those of the branches called ``attn`` and ``mlp``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import UnknownAttributeError, UnknownSiteError
from circuitvision.model.block_layout import BlockLayout
from circuitvision.model.branches import AttentionBranch, Branch, MLPBranch, branches_of
from circuitvision.model.projections import Projection

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower


class Block:
    """One transformer block of a tower."""

    def __init__(self, tower: Tower, layer: int, module: nn.Module, layout: BlockLayout) -> None:
        self.tower, self.layer, self.module, self.layout = tower, layer, module, layout
        self.branches: list[Branch] = branches_of(self)
        """Its branches, in the order in which they are added."""

    @property
    def prefix(self) -> str:
        """What its sites begin with."""
        return f"{self.tower.name}.blocks.{self.layer}"

    def has(self, name: str) -> bool:
        """Whether it has a branch of this name."""
        return any(branch.name == name for branch in self.branches)

    def branch(self, name: str) -> Branch:
        """The branch of a name, "attn" or "mlp"; UnknownAttributeError if there is none."""
        for branch in self.branches:
            if branch.name == name:
                return branch
        raise UnknownAttributeError(
            f"Block {self.layer} of the {self.tower.name} tower has no branch {name!r}; it has "
            f"{', '.join(branch.name for branch in self.branches)}."
        )

    @property
    def attentions(self) -> list[AttentionBranch]:
        """Its branches of attention."""
        return [branch for branch in self.branches if isinstance(branch, AttentionBranch)]

    @property
    def attn(self) -> AttentionBranch:
        """Its attention; UnknownAttributeError for a block without one."""
        found = self.branch("attn")
        assert isinstance(found, AttentionBranch)
        return found

    @property
    def mlp(self) -> MLPBranch:
        """Its MLP; UnknownAttributeError for a block without one."""
        found = self.branch("mlp")
        assert isinstance(found, MLPBranch)
        return found

    @property
    def sums(self) -> bool:
        """Whether what leaves it is what enters it plus what its branches add: no norm is on the way."""
        return all(branch.sum_norm is None for branch in self.branches)

    def derived(self, site: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The full name of the site that a derived one follows from, and how: shares of heads, and what slots read.

        Raises UnknownSiteError for a site that is not derived.
        """
        for branch in self.branches:
            if isinstance(branch, AttentionBranch):
                if site == branch.result:
                    return f"{self.prefix}.{branch.inner}", branch.head_results
                for letter in branch.letters:
                    if site == branch.slot(letter):
                        return f"{self.prefix}.{branch.stream}", partial(_for_each_head, branch.heads_of(letter))
            elif site == branch.read_site:
                return f"{self.prefix}.{branch.stream}", _itself
        raise UnknownSiteError(f"{self.prefix}.{site} follows from no other site.")

    def branches_before(self, branch: Branch) -> list[Branch]:
        """Those whose share is in the stream that a branch reads."""
        return [] if self.layout.parallel else self.branches[: branch.number]

    def _weight(self, projection: Projection) -> Tensor:
        return projection.weight_and_bias(self.tower.dtype)[0]

    def _per_head(self, letter: str) -> Tensor:
        attn = self.attn
        return rearrange(self._weight(attn.projection(letter)), "m (h d) -> h m d", h=attn.heads_of(letter))

    def _bias_per_head(self, letter: str) -> Tensor:
        attn = self.attn
        bias = attn.projection(letter).bias_or_zeros(self.tower.dtype)
        return bias.view(attn.heads_of(letter), -1)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights of each head."""
        return self._per_head("q")

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key weights of each key/value head."""
        return self._per_head("k")

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value weights of each key/value head."""
        return self._per_head("v")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of each head, before LayerScale or a post norm."""
        return rearrange(self._weight(self.attn.out), "(h d) m -> h d m", h=self.attn.heads_of("q"))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights of the MLP (gated: of the linear branch)."""
        return self._weight(self.mlp.fc_in)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Gate weights of a gated MLP; AttributeError for a plain one."""
        gate = self.mlp.gate
        if gate is None:
            raise UnknownAttributeError(f"The {self.tower.name} tower has no gated MLP, so it has no W_gate.")
        return self._weight(gate)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights of the MLP: row ``i`` is what neuron ``i`` writes (before LayerScale or a post norm)."""
        return self._weight(self.mlp.out)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query biases."""
        return self._bias_per_head("q")

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """Key biases."""
        return self._bias_per_head("k")

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """Value biases."""
        return self._bias_per_head("v")

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias of attention."""
        return self.attn.out.bias_or_zeros(self.tower.dtype)

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias of the MLP."""
        return self.mlp.fc_in.bias_or_zeros(self.tower.dtype)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias of the MLP."""
        return self.mlp.out.bias_or_zeros(self.tower.dtype)


def _itself(value: Tensor) -> Tensor:
    return value


def _for_each_head(n_heads: int, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... head d_model"]:
    return stream.unsqueeze(-2).expand(*stream.shape[:-1], n_heads, stream.shape[-1])
