"""How one lens reads vectors of a tower: which columns, with which norm, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.heads import Reading, through_projector, unembedding
from circuitvision.model.tokens import TokenMap
from circuitvision.readout.recorded import recorded
from circuitvision.readout.targets import Targets, output_kind, output_size, reader_of

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel
    from circuitvision.model.tower import Tower
    from circuitvision.readout.lens.tuned import TunedLens

CHUNK_BYTES = 64 * 2**20
"""Logits held at once."""


class LensReader:
    """How one lens reads vectors of one tower: which columns, which norm, in which pieces."""

    def __init__(
        self,
        model: HookedModel,
        tower: Tower,
        cache: ActivationCache,
        norm: str = "own",
        targets: Targets | None = None,
        readout: Callable[[Tensor], Tensor] | None = None,
        tuned: TunedLens | None = None,
        step: int | None = None,
    ) -> None:
        self.model, self.tower, self.cache = model, tower, cache
        self.targets, self.custom, self.tuned, self.step = targets, readout, tuned, step
        self.kind = "columns" if readout is not None else output_kind(tower)
        against = None if targets is None else targets.against
        self.directions = against if self.kind in ("hidden", "embedding") or self._wide(against) else None
        self._check_width()
        self.norm = "own" if norm == "tuned" else norm
        self.reference = None
        if norm == "frozen":
            reference = self.site(tower.residual_name(max(tower.feature_layers)))
            self.reference = reference.to(self._device(reference), self._dtype())
        self.reading = Reading(
            reader_of(tower),
            cache,
            norm=self.norm,
            reference=self.reference,
            against=None if self.directions is not None else against,
        )

    def _check_width(self) -> None:
        if self.directions is None:
            return
        wanted = self.tower.cfg.d_model if self.kind != "embedding" else output_size(self.tower)
        if self.directions.shape[1] != wanted:
            raise InputError(
                f"Directions of the {self.tower.name} tower are [target {wanted}], not {tuple(self.directions.shape)}."
            )

    def _wide(self, against: Tensor | None) -> bool:
        """Whether the targets are directions of the stream itself, in a tower whose columns have names of their own."""
        return against is not None and self.kind in ("classes", "tokens", "actions")

    def site(self, name: str) -> Tensor:
        """A site of the cache as ``[row pos …]``, see :func:`recorded`."""
        return recorded(self.cache, name, self.step)

    def columns(
        self, value: Float[Tensor, "row pos d_model"], name: str | None = None
    ) -> Iterator[Float[Tensor, "row pos n_out"]]:
        """The logits of every position of a site, a few positions at a time."""
        if value.shape[-1] != self.tower.cfg.d_model or value.ndim != 3:
            raise InputError(
                f"The lens reads vectors of the stream [row pos {self.tower.cfg.d_model}]; this site holds {tuple(value.shape)}."
            )
        with self.tower.quiet():
            value = value.to(self._device(value), self._dtype())
            value = value if self.tuned is None else self.tuned.translate(value, name)
            if self.custom is not None:
                yield self._own_columns(value)
                return
            missing = self.missing(value)
            if reader_of(self.tower) is not self.tower and self.directions is None:
                assert self.tower.spec.readout is not None
                value = through_projector(self.tower, self.tower.spec.readout, value, self.cache, not missing)
            width = self._positions_at_once(value)
            for start in range(0, value.shape[1], width):
                piece = value[:, start : start + width]
                yield self._piece(piece, start + missing, self._frozen(start, piece.shape[1], value.shape[1]))

    def _own_columns(self, value: Tensor) -> Tensor:
        assert self.custom is not None
        out = self.custom(value)
        if not isinstance(out, Tensor) or out.ndim != 3 or out.shape[:2] != value.shape[:2]:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(
                f"readout=fn gives [row pos n_out] for [row pos d_model]; this one gave {shape} for {tuple(value.shape)}."
            )
        return out

    def at(
        self, values: Float[Tensor, "vector d_model"], numbers: Int[Tensor, " vector"]
    ) -> Float[Tensor, "vector n_out"]:
        """The logits of single vectors, each read as a position of the number given."""
        # Heads that read several pooled vectors tell at most the first two positions from the rest.
        roles = numbers.clamp(max=2)
        found, order = [], []
        with self.tower.quiet():
            for role in roles.unique().tolist():
                mine = (roles == role).nonzero().flatten()
                order.append(mine)
                found.append(self._piece(values[mine.to(values.device), None].to(self._dtype()), int(role), None)[:, 0])
        back = torch.cat(order).argsort()
        return torch.cat(found)[back.to(values.device)]

    def _frozen(self, start: int, length: int, whole: int) -> Tensor | None:
        """The reference at the positions of a piece: the site may lack the reference's first positions."""
        if self.reference is None:
            return None
        first = self.reference.shape[1] - whole + start
        return self.reference[:, first : first + length]

    def missing(self, value: Float[Tensor, "row pos width"]) -> int:
        """How many of the tower's first positions a site does not have: patch embeddings have no CLS, action embeddings no state."""
        tokens = self.tokens
        if tokens is None or tokens.n_rows != value.shape[0] or not (tokens.kind != "text").all():
            return 0
        return max(tokens.n_positions - value.shape[1], 0)

    @property
    def tokens(self) -> TokenMap | None:
        """What the tower's positions are, where the cache knows its inputs."""
        return self.model.tokens(self.cache.inputs).get(self.tower.name) if self.cache.inputs else None

    def _piece(self, piece: Tensor, start: int, frozen: Tensor | None) -> Tensor:
        if self.directions is not None and self.kind != "embedding":
            norm = self.tower.final_norm if self.norm == "own" and self.tower.spec.readout is None else None
            return (piece if norm is None else norm(piece)) @ self.directions.to(piece).T
        out = self.reading.positions(piece, start, frozen)
        return out if self.directions is None else out @ self.directions.to(out).T

    def pooled(self, value: Float[Tensor, "row pos d_model"], name: str | None = None) -> Tensor | None:
        """The family's pooled output ``[row n_out]``; None where it does not pool, or where the vector is not read by its head."""
        readout = self.tower.spec.readout
        pools = readout is not None and readout.pool not in ("none", "chunk")
        if not pools or self.custom is not None or self.directions is not None or self.missing(value):
            return None
        with self.tower.quiet():
            value = value.to(self._device(value), self._dtype())
            value = value if self.tuned is None else self.tuned.translate(value, name)
            out = self.reading.output(value)
        return out.T if self.kind == "images" and self.reading.against is None else out

    @property
    def pairwise(self) -> bool:
        """Whether every column is a yes or no of its own (SigLIP)."""
        return self.kind in ("texts", "images") and getattr(self.tower.module, "logit_bias", None) is not None

    def _device(self, value: Tensor) -> torch.device:
        """Where the head is: a cache may have been recorded on another device."""
        found = unembedding(reader_of(self.tower))
        head: Any = None if found is None else found[0]
        return value.device if head is None or self.custom is not None else head.weight.device

    def _dtype(self) -> torch.dtype:
        return next(self.tower.module.parameters()).dtype

    def _positions_at_once(self, value: Tensor) -> int:
        size = len(self.directions) if self.directions is not None else output_size(self.tower) or 1024
        return max(1, CHUNK_BYTES // (4 * size * value.shape[0]))


def measured(logits: Tensor, measure: str, pairwise: bool = False) -> Tensor:
    """Logits as they are, log-probabilities or probabilities; in float32 at least.

    ``pairwise`` says that every column is a yes or no of its own, as SigLIP is trained: the probability is a sigmoid, not a softmax over
    columns.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if pairwise and measure != "logit":
        return nn.functional.logsigmoid(wide) if measure == "logprob" else wide.sigmoid()
    return wide if measure == "logit" else wide.log_softmax(-1) if measure == "logprob" else wide.softmax(-1)
