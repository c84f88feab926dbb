"""The run that a lens reads: its sites as vectors of the stream, and what the tower's output head makes of them, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.links import Link, log_probabilities, probabilities
from circuitvision.model.cache import ActivationCache
from circuitvision.model.columns import Columns
from circuitvision.model.norms import upcast
from circuitvision.model.sites import SiteName
from circuitvision.model.tokens import TokenMap
from circuitvision.model.weights import main_device
from circuitvision.readout.recorded import examples_of, held_as, pass_number, recorded

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped
    from circuitvision.readout.lens.tuned import TunedLens

CHUNK_BYTES = 16 * 2**20
"""Logits held at once."""


class LensRun:
    """One recorded run of one tower, read by its output head with one norm, for targets or all columns."""

    def __init__(
        self,
        model: Wrapped,
        tower: Tower,
        cache: ActivationCache,
        norm: str = "own",
        targets: Columns | None = None,
        readout: Callable[[Tensor], Tensor] | None = None,
        tuned: TunedLens | None = None,
        step: int | None = None,
    ) -> None:
        self.model, self.tower, self.cache = model, tower, cache
        self.targets, self.custom, self.tuned, self.step = targets, readout, tuned, step
        self.kind = "columns" if readout is not None else tower.output_head.kind
        against = None if targets is None or readout is not None else targets.against
        norm = "own" if norm == "tuned" else norm
        final = self._final() if norm == "frozen" else None
        self.own = tower.output_head.in_run(cache, norm=norm, reference=final, against=against)
        self.head = self.own.reader()

    # -- what is read ------------------------------------------------------------------------------------------------------------------------

    def _final(self) -> Float[Tensor, "row pos d_model"]:
        """The residual that leaves the tower: frozen statistics are those it has there."""
        final = recorded(
            self.cache, self.tower.residual_name(max(self.tower.feature_layers_in(self.cache.inputs))), self.step
        )
        return self._moved(final)

    def site(self, name: str) -> Tensor:
        """A site of the cache as ``[row pos …]``; a head's share as it is added to the stream.

        That is through what follows its branch, with norms held at the denominators of this run, and without biases, which are no head's.
        """
        value = recorded(self.cache, name, self.step)
        parsed = SiteName.parse(name)
        if parsed.site != "attn.hook_result" or parsed.layer is None:
            return value
        branch = self.tower.blocks[parsed.layer].branch("attn")
        held = branch.denominator_in(self.cache, lambda site: self._moved(recorded(self.cache, site, self.step)))
        with self.tower.hooks_disabled():
            return branch.share(parsed.site, value if branch.last is None else self._moved(value), held)

    def shape(self, name: str) -> tuple[int, ...]:
        """Positions (and heads) of a site, without computing a derived one."""
        held = held_as(self.cache, name)
        if held is None or not name.endswith("attn.hook_result"):
            held = name
        return tuple(recorded(self.cache, held, self.step).shape[1:-1])

    def number_of_pass(self, name: str) -> int | None:
        """The pass read, counted from 0; None where the site was recorded in one pass."""
        return pass_number(self.cache, name, self.step)

    def columns(
        self, value: Float[Tensor, "row pos d_model"], name: str | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "row pos n_out"]]]:
        """The logits of every position of a site, a few rows and positions at a time: the rows, and their next positions.

        A read-out of the user's own is given the site whole.
        """
        if value.shape[-1] != self.tower.cfg.d_model or value.ndim != 3:
            raise InputError(
                f"The lens reads vectors of the stream [row pos {self.tower.cfg.d_model}]; {name or 'this site'} holds {tuple(value.shape)}."
            )
        value = self._carried(value, name)
        if self.custom is not None:
            yield slice(None), self._own_columns(value)
            return
        missing = self.missing(value)
        with torch.no_grad(), self.tower.hooks_disabled():
            value = self.own.projected(value, has_prefix=not missing)
        rows, width = self._at_once(value)
        for first in range(0, value.shape[0], rows):
            mine = slice(first, first + rows)
            for start in range(0, value.shape[1], width):
                piece = value[mine, start : start + width]
                # Hooks are quiet while a piece is read, and no longer: what is done with it may run the model.
                with self.tower.hooks_disabled():
                    found = self.head.positions(piece, start + missing, self._frozen(mine, start, piece, value))
                yield mine, found

    def _carried(self, value: Tensor, name: str | None) -> Tensor:
        """A value where the head is, and in the last layer's coordinates where the lens is tuned."""
        value = self._moved(value)
        return value if self.tuned is None else self.tuned.translate(value, name)

    def _own_columns(self, value: Tensor) -> Tensor:
        assert self.custom is not None
        with self.tower.hooks_disabled():
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
        with self.tower.hooks_disabled():
            for role in roles.unique().tolist():
                mine = (roles == role).nonzero().flatten()
                order.append(mine)
                vectors = values[mine.to(values.device), None].to(self.tower.dtype)
                found.append(self.head.positions(vectors, int(role))[:, 0])
        back = torch.cat(order).argsort()
        return torch.cat(found)[back.to(values.device)]

    def pooled(self, value: Float[Tensor, "row pos d_model"], name: str | None = None) -> Tensor | None:
        """The family's pooled output ``[row n_out]``; None where it does not pool, or where the vector is not read by its head."""
        if not self.own.pools or self.custom is not None or self.own.directed or self.missing(value):
            return None
        with self.tower.hooks_disabled():
            return self.own.logits(self._carried(value, name))

    # -- how it is read ----------------------------------------------------------------------------------------------------------------------

    def _frozen(self, rows: slice, start: int, piece: Tensor, value: Tensor) -> Tensor | None:
        """The reference at the positions of a piece: the site may lack the reference's first positions."""
        reference = self.head.reference
        if reference is None:
            return None
        first = reference.shape[1] - value.shape[1] + start
        return reference[rows, first : first + piece.shape[1]]

    def missing(self, value: Float[Tensor, "row pos width"]) -> int:
        """How many of the tower's first positions a site does not have: patch embeddings have no CLS, action embeddings no state."""
        tokens = self.tokens
        if tokens is None or tokens.n_rows != value.shape[0] or np.isin(tokens.kind, ("text", "unknown")).any():
            return 0
        return max(tokens.n_positions - value.shape[1], 0)

    @cached_property
    def tokens(self) -> TokenMap | None:
        """What the tower's positions are, where the cache knows its inputs."""
        return self.model.tokens(self.cache.inputs).get(self.tower.name) if self.cache.inputs else None

    def examples(self, rows: int) -> Int[Tensor, " row"]:
        """Which example each row belongs to.

        Raises:
            InputError: targets per example that are not one per example.
        """
        if self._examples is None or len(self._examples) != rows:
            examples, count = examples_of(self.cache, self.tower.name, rows)
            if self.targets is not None:
                self.targets.check(count)
            self._examples = examples
        return self._examples

    _examples: Tensor | None = None

    @property
    def link(self) -> Link:
        """What turns the columns into probabilities; a read-out of the user's own is taken to be one of several classes."""
        return "softmax" if self.custom is not None else self.own.link

    def _moved(self, value: Tensor) -> Tensor:
        """A value where the head is, in the model's precision: a cache may have been recorded on another device, or converted."""
        module = None if self.custom is not None else self.tower.reader.output_head.module
        return value.to(value.device if module is None else main_device(module), self.tower.dtype)

    @property
    def vectors_at_once(self) -> int:
        """How many vectors are read at once, so that their logits stay within ``CHUNK_BYTES``."""
        return max(1, CHUNK_BYTES // (4 * (self.own.size or 1024)))

    def _at_once(self, value: Tensor) -> tuple[int, int]:
        """How many rows, and how many positions of each, are read at once."""
        rows = max(1, min(value.shape[0], self.vectors_at_once))
        return rows, self.vectors_at_once // rows


def measured(logits: Tensor, measure: str, link: Link = "softmax") -> Tensor:
    """Logits as they are, log-probabilities or probabilities under the head's link; in float32 at least."""
    wide = upcast(logits)
    if measure == "logit":
        return wide
    return log_probabilities(wide, link) if measure == "logprob" else probabilities(wide, link)
