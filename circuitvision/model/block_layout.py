"""What a transformer block is made of: a sequence of branches, each of which reads the residual stream and adds to it.

A :class:`Branch` is a core (:class:`Attention`, an :class:`MLP`, or any :class:`Module`), the norm that it reads the stream through, and what its
output passes before it is added: modules (LayerScale, a norm) and :class:`Gate` parameters. A :class:`BlockLayout` puts branches one behind the
other, or side by side (``parallel``). Where the sum itself is normalised (post-norm, as in BERT) the branch names that norm as ``sum_norm``.

The first branch reads ``hook_resid_pre``; the second one of a sequence reads ``hook_resid_mid``, the third ``hook_resid_mid_{name of the second}``;
parallel ones all read ``hook_resid_pre``. Norms are called ``ln1``, ``ln2``, … in the order of their branches, one behind a core ``ln1_post``.

All paths are relative to the block. A :class:`Writer` adds to the stream between two blocks, where no module of a block can be blamed for it.

Not covered: experts that are chosen token by token, branches that read another layer's stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from circuitvision.errors import InputError

_OF_ATTENTION = ("qkv", "groups")
_OF_MLP = ("gate_in", "in_gate")


@dataclass(frozen=True)
class Fused:
    """One linear map that writes several projections at once.

    ``order`` says how they lie side by side: one after the other in the order of the words (``"qkv"``; of an MLP ``"gate_in"`` or
    ``"in_gate"``), or key-value head by key-value head, with its queries, its key and its value (``"groups"``).
    """

    path: str
    order: Literal["qkv", "groups", "gate_in", "in_gate"] = "qkv"

    def __post_init__(self) -> None:
        if self.order not in (*_OF_ATTENTION, *_OF_MLP):
            raise InputError(
                f"{self!r}: order is one of {', '.join(map(repr, _OF_ATTENTION))} of queries, keys and values, or of "
                f"{', '.join(map(repr, _OF_MLP))} of a gated MLP."
            )


@dataclass(frozen=True)
class Attention:
    """Attention: the module that calls the attention function, and its projections.

    Attributes:
        module: the attention module.
        o: the output projection.
        q, k, v: the projections; or ``qkv``, one that holds all three.
        q_norm, k_norm, v_norm: norms of queries, keys and values, before they are rotated.
        heads_first: whether those norms see ``[row head pos d_head]`` instead of ``[row pos head d_head]``.
        rotary: whether queries and keys are rotated.
        keys_of: the tower whose final stream keys and values are made of (cross-attention); "" for this block's own.
    """

    module: str
    o: str
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: Fused | None = None
    q_norm: str = ""
    k_norm: str = ""
    v_norm: str = ""
    heads_first: bool = False
    rotary: bool = False
    keys_of: str = ""
    name = "attn"


@dataclass(frozen=True)
class MLP:
    """An MLP: its module and linear maps, a gate where there is one (or ``fused``, one map for gate and input).

    ``act`` is the activation, where the module fixes it whatever the config says.
    """

    module: str
    fc_out: str
    fc_in: str = ""
    gate: str = ""
    fused: Fused | None = None
    act: str | None = None
    name = "mlp"

    @property
    def is_gated(self) -> bool:
        """Whether a gate is multiplied with what ``fc_in`` writes."""
        return bool(self.gate or self.fused)


@dataclass(frozen=True)
class Module:
    """A module of which nothing is known but that it reads the stream and what it returns is added to it (an adapter)."""

    module: str
    name = ""


@dataclass(frozen=True)
class Gate:
    """A parameter of the block that the code multiplies a branch with: ``λ · out``, or ``tanh(λ) · out``."""

    parameter: str
    tanh: bool = False


@dataclass(frozen=True)
class Branch:
    """One branch of a block.

    Attributes:
        core: what it computes.
        norm: the norm before it; None for none.
        then: what its output passes before it is added, in order: paths of modules, and gates.
        sum_norm: the norm that the sum passes (post-norm blocks).
        name: in site names, as in ``cross_attn.hook_z`` and ``hook_cross_attn_out``; ``attn`` and ``mlp`` need none.
    """

    core: Attention | MLP | Module
    norm: str | None = None
    then: tuple[str | Gate, ...] = ()
    sum_norm: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.core.name)
        if not self.name.isidentifier():
            raise InputError(
                f"A branch needs a name for its sites, a Python identifier: Branch({self.core!r}, name=…)."
            )
        if self.norm and self.sum_norm:
            raise InputError(
                f"The branch {self.name} names a norm and a sum_norm: a block normalises what it reads, or the sum."
            )
        if not isinstance(self.then, tuple):
            raise InputError(f"then={self.then!r} is a tuple of paths and gates; one alone is written (…,).")
        core = self.core
        if isinstance(core, Attention) and bool(core.qkv) == all((core.q, core.k, core.v)):
            raise InputError(f"{core!r}: give q, k and v, or qkv=Fused(…).")
        if isinstance(core, MLP) and bool(core.fused) == bool(core.fc_in):
            raise InputError(f"{core!r}: give fc_in (and gate), or fused=Fused(…, order='gate_in').")
        if isinstance(core, Attention) and core.qkv and core.qkv.order not in _OF_ATTENTION:
            raise InputError(f"{core.qkv!r} is the map of an MLP: of attention, order is 'qkv' or 'groups'.")
        if isinstance(core, MLP) and core.fused and core.fused.order not in _OF_MLP:
            raise InputError(f"{core.fused!r} is the map of an attention: of an MLP, order is 'gate_in' or 'in_gate'.")


@dataclass(frozen=True)
class BlockLayout:
    """The branches of one transformer block, in the order in which they are added.

    Attributes:
        branches: each once; attention first where both kinds are there.
        parallel: whether all of them read what enters the block.
    """

    branches: tuple[Branch, ...]
    parallel: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.branches, tuple) or not all(isinstance(one, Branch) for one in self.branches):
            raise InputError("branches is a tuple of Branch(…); one alone is written (…,).")
        names = [branch.name for branch in self.branches]
        if not names or len(set(names)) < len(names):
            raise InputError(f"Branches need different names; these are {', '.join(names) or 'none'}.")
        if self.parallel and any(branch.sum_norm for branch in self.branches[:-1]):
            raise InputError("Parallel branches are added up once: only the last of them can name a sum_norm.")


@dataclass(frozen=True)
class Writer:
    """What the code of a tower adds to the stream between two blocks, at the site ``blocks.{layer}.{site}`` of the block before.

    ``layers`` are those blocks: numbers, or what gives them from the tower's config.
    """

    site: str
    layers: tuple[int, ...] | Callable[[Any], tuple[int, ...]]

    def layers_in(self, config: Any) -> tuple[int, ...]:
        """The blocks behind which it writes."""
        return self.layers(config) if callable(self.layers) else self.layers


Layout = BlockLayout | Callable[[nn.Module], BlockLayout]
