"""Attention rollout: the layers' attention multiplied up, from a position after the last layer to the positions before the first.

Each layer's attention, fused over heads, is mixed with the identity for the residual stream, and the mixtures are multiplied. That treats
attention as if it were all that moves information, and the MLPs, values and output weights as if they moved none: a picture of who could reach
whom, not of what did.

Not covered: towers that look at another tower's positions; passes of ``generate`` after the first.

Source: Abnar & Zuidema 2020 (arXiv 2005.00928), with the fusions of heads and the discarded share that open implementations added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.positions import Positions, PositionsLike
from circuitvision.model.tokens import TokenMap, present
from circuitvision.provenance import with_provenance
from circuitvision.readout.attention.cache import read
from circuitvision.readout.attention.maps import AttentionMaps, blocks_from, blocks_of, single_places
from circuitvision.readout.attention.patterns import Patterns, described, keys_of, mean_query, warn_undefined
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

_FUSIONS = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}


@dataclass(frozen=True, eq=False)
class AttentionRollout(Result):
    """Attention multiplied up over layers: ``values`` is ``[layer query key example]``, the product of all layers up to and with that one.

    Rows sum to 1; rows of padding that nothing reads are NaN. ``uniform``, of the same shape, is the rollout of heads that look at every visible key
    alike. :meth:`of` takes one query's row as maps that lie over the image.
    """

    tower: str = ""
    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0))
    shares: Tensor = field(default_factory=lambda: torch.zeros(0))
    frames: Tensor = field(default_factory=lambda: torch.zeros(0))
    kinds: list[list[str]] = field(default_factory=list)
    blocks: list[list[Any]] = field(default_factory=list)
    uniform: Tensor = field(default_factory=lambda: torch.zeros(0))

    _per_example: ClassVar[dict[str, int]] = {
        "places": 0,
        "boxes": 0,
        "shares": 0,
        "frames": 0,
        "kinds": 0,
        "uniform": -1,
    }

    @with_provenance
    def of(self, query: PositionsLike, tokens: Mapping[str, TokenMap] | None = None) -> AttentionMaps:
        """The rollout of a query ("cls", "last", a position, a kind, a mask), or the mean over several, as maps with one head, "rollout".

        ``tokens`` as of :meth:`AttentionMaps.keys`.

        Raises InputError if there is no such position.
        """
        there = self.values.isfinite().all(-2).any(0).T | torch.from_numpy(present(np.array(self.kinds)))
        blocks = blocks_from(self, tokens)
        counted = (
            torch.from_numpy(keys_of(Positions.of(query), blocks, self.tower, len(self.kinds), "The query")) & there
        )
        if not bool(counted.any()):
            raise InputError(f"query={described(query)!r} leaves no position that is not padding.")
        values, uniform = (
            mean_query(held.nan_to_num(0.0).movedim(-1, 0), counted).movedim(0, -1) if held.numel() else held
            for held in (self.values, self.uniform)
        )
        axes = {"layer": self.axes["layer"], "head": ["rollout"], "key": self.axes["key"]}
        axes["example"] = self.axes["example"]
        return AttentionMaps(
            values=values[:, None],
            uniform=uniform,
            axes=axes,
            provenance={**self.provenance, "query": described(query)},
            tower=self.tower,
            measure="rollout",
            query=described(query),
            places=self.places,
            boxes=self.boxes,
            shares=self.shares,
            frames=self.frames,
            kinds=self.kinds,
            blocks=self.blocks,
            query_places=single_places(counted, self.places),
        )


@with_provenance
def rollout(
    model: Wrapped,
    cache: ActivationCache | Mapping[str, Any],
    tokens: Mapping[str, TokenMap] | TokenMap | None = None,
    *,
    tower: str | None = None,
    residual: float = 0.5,
    head_fusion: str = "mean",
    discard: float = 0.0,
    layers: Any = None,
    step: int | None = None,
) -> AttentionRollout:
    """``R_l = Â_l R_{l−1}``, ``R_{−1} = I``, with ``Â = residual · I + (1 − residual) · A``, every row divided by its sum.

    ``A`` is the layer's attention fused over heads by ``head_fusion`` ("mean", "max" or "min"); ``discard`` then sets the lowest share of the
    keys that each query can see to 0 (padding and masked keys do not count). ``R[query, key]`` is how much of what stands at ``query`` after
    a layer came from ``key`` before the first one. A row in which nothing is left (``residual=0`` with ``"min"``) is NaN, with a warning.
    Layers must follow on each other.

    Raises:
        InputError: a tower whose keys are not its own positions, shares outside 0 … 1, an unknown fusion, missing layers.
    """
    numbers = isinstance(residual, Real) and isinstance(discard, Real)
    if not numbers or not 0 <= residual <= 1 or not 0 <= discard < 1:
        raise InputError(f"residual is a share from 0 to 1 and discard one below 1, not {residual!r} and {discard!r}.")
    if head_fusion not in _FUSIONS:
        raise InputError(f"Unknown head_fusion {head_fusion!r}; choose one of {', '.join(_FUSIONS)}.")
    patterns = read(model, cache, tokens, tower, layers, step)
    if len(patterns.blocks) != 1 or patterns.query_kind.shape != patterns.key_kind.shape:
        raise InputError(
            f"Rollout needs keys that are the queries of the layer before; in this pass the {patterns.tower} tower looks at "
            "other positions as well. Roll out a vision tower, or the prompt of a language tower."
        )
    steps = [int(layer) for layer in patterns.layers]
    if steps != list(range(steps[0], steps[0] + len(steps))):
        raise InputError(f"Layers {steps} do not follow on each other; cache them all, or name a range with layers=.")
    real = torch.from_numpy(patterns.real)
    stacked, uniform = _multiplied(patterns, real, head_fusion, discard, residual)
    warn_undefined(stacked[:, real], "no attention is left in a row; take residual > 0 or another head_fusion")
    positions = list(range(patterns.own.n_positions))
    return AttentionRollout(
        values=stacked.masked_fill(~real[None, :, :, None], float("nan")).movedim(1, -1),
        uniform=uniform.masked_fill(~real[None, :, :, None], float("nan")).movedim(1, -1),
        axes={"layer": steps, "query": positions, "key": positions, "example": patterns.example},
        provenance=patterns.provenance(f"rollout(residual={residual}, {head_fusion}, discard={discard})", "all"),
        tower=patterns.tower,
        places=patterns.places(),
        boxes=patterns.boxes().float(),
        shares=patterns.shares(),
        frames=patterns.frames(),
        kinds=patterns.key_kind.tolist(),
        blocks=blocks_of(patterns),
    )


def _multiplied(
    patterns: Patterns, real: Bool[Tensor, "row pos"], head_fusion: str, discard: float, residual: float
) -> tuple[Float[Tensor, "layer row query key"], Float[Tensor, "layer row query key"]]:
    """The products of the layers' mixtures, of the model's attention and of uniform attention."""
    depths: list[Tensor] = []
    alike: list[Tensor] = []
    for number in range(len(patterns.layers)):
        pattern = patterns.layer(number)
        fused = _FUSIONS[head_fusion](pattern)
        if discard:
            fused = _without_weakest(fused, patterns.visible(pattern), discard)
        for found, source in ((depths, fused), (alike, patterns.alike(pattern))):
            step_matrix = _mixed(source, residual)
            # Nothing real looks at padding; its own rows stay as they are.
            step_matrix = torch.where(real[..., None], step_matrix, torch.eye(real.shape[1], dtype=fused.dtype))
            found.append(step_matrix @ found[-1] if found else step_matrix)
    return torch.stack(depths), torch.stack(alike)


def _without_weakest(
    fused: Float[Tensor, "row query key"], visible: Bool[Tensor, "row query key"], discard: float
) -> Float[Tensor, "row query key"]:
    """Attention with the weakest share of each query's visible keys at 0; of a number that is not whole, the whole part."""
    # Rounding must not cost a key: 0.29 * 100 is just below 29.
    dropped = (discard * visible.sum(-1, keepdim=True).double() + 1e-9).floor()
    rank = fused.masked_fill(~visible, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
    return fused.masked_fill(rank < dropped, 0.0)


def _mixed(fused: Float[Tensor, "row query key"], residual: float) -> Float[Tensor, "row query key"]:
    """One layer's step: attention mixed with the identity, every row divided by its sum."""
    mixed = residual * torch.eye(fused.shape[-1], dtype=fused.dtype) + (1 - residual) * fused
    return mixed / mixed.sum(-1, keepdim=True)
