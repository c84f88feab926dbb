"""How one lens reads vectors of a tower: which columns, with which norm, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.heads import Reading, through_projector
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
        self.reference = self.site(tower.residual_name(max(tower.feature_layers))) if norm == "frozen" else None
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
        self, value: Float[Tensor, "row pos d_model"], layer: int | None = None
    ) -> Iterator[Float[Tensor, "row pos n_out"]]:
        """The logits of every position, a few positions at a time."""
        if value.shape[-1] != self.tower.cfg.d_model or value.ndim != 3:
            raise InputError(
                f"The lens reads vectors of the stream [row pos {self.tower.cfg.d_model}]; this site holds {tuple(value.shape)}."
            )
        with self.tower.quiet():
            value = value.to(self._dtype())
            value = value if self.tuned is None else self.tuned.translate(value, layer)
            if self.custom is not None:
                yield self.custom(value)
                return
            if reader_of(self.tower) is not self.tower and self.directions is None:
                assert self.tower.spec.readout is not None
                value = through_projector(self.tower, self.tower.spec.readout, value, self.cache)
            width, missing = self._positions_at_once(value), self.missing(value)
            for start in range(0, value.shape[1], width):
                yield self._piece(value[:, start : start + width], start + missing)

    def missing(self, value: Float[Tensor, "row pos width"]) -> int:
        """How many of the tower's first positions a site does not have (patch embeddings have no CLS, a projector drops it)."""
        tokens = self.model.tokens(self.cache.inputs).get(self.tower.name) if self.cache.inputs else None
        return 0 if tokens is None or tokens.n_rows != value.shape[0] else max(tokens.n_positions - value.shape[1], 0)

    def _piece(self, piece: Tensor, start: int) -> Tensor:
        if self.directions is not None and self.kind != "embedding":
            norm = self.tower.final_norm if self.norm == "own" and self.tower.spec.readout is None else None
            return (piece if norm is None else norm(piece)) @ self.directions.to(piece).T
        frozen = None if self.reference is None else self.reference[:, start : start + piece.shape[1]]
        out = self.reading.positions(piece, start, frozen)
        return out if self.directions is None else out @ self.directions.to(out).T

    def pooled(self, value: Float[Tensor, "row pos d_model"], layer: int | None = None) -> Tensor | None:
        """The family's pooled output ``[row n_out]``; None where it does not pool, or where the vector is not read by its head."""
        readout = self.tower.spec.readout
        pools = readout is not None and readout.pool not in ("none", "chunk")
        if not pools or self.custom is not None or self.directions is not None or self.missing(value):
            return None
        with self.tower.quiet():
            value = value.to(self._dtype())
            value = value if self.tuned is None else self.tuned.translate(value, layer)
            out = self.reading.output(value)
        return out.T if self.kind == "images" and self.reading.against is None else out

    def _dtype(self) -> torch.dtype:
        return next(self.tower.module.parameters()).dtype

    def _positions_at_once(self, value: Tensor) -> int:
        size = len(self.directions) if self.directions is not None else output_size(self.tower) or 1024
        return max(1, CHUNK_BYTES // (4 * size * value.shape[0]))


def measured(logits: Tensor, measure: str) -> Tensor:
    """Logits as they are, log-probabilities or probabilities; in float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if measure == "logit" else wide.log_softmax(-1) if measure == "logprob" else wide.softmax(-1)
