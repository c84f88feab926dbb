"""Attention patterns as a cache holds them: whose queries, whose keys, and which of them count.

Keys are not always the tower's own positions. An action tower looks at the cached positions of its prefix first, then at its own; a decoding
step of ``generate`` looks at the prompt and at what was generated since. :class:`Patterns` names every key, so that read-outs say "patch",
"text" or "this box" and never count columns.

Rows of padding are never queries, but where the family reads one whatever stands there (:func:`real_queries`). Masked keys hold exactly 0 in
every head, and that is how a read-out knows which keys a query could see.

Reading one out of a cache is in ``cache.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.model.dead import dead_positions
from circuitvision.model.positions import GENERATED, Positions, PositionsLike
from circuitvision.model.tokens import TokenMap, present
from circuitvision.provenance import describe
from circuitvision.readout.patch_coords import places_of
from circuitvision.readout.recorded import real_queries

PROBE = "probe"
"""The kind of the query of an attention pool, which is no position."""
EVERYTHING = "everything"
"""The span of all keys but padding."""


@dataclass(frozen=True)
class KeyBlock:
    """Keys ``[start, start + count)``: the positions of one tower from ``first`` on, or (``tokens`` None) generated ones."""

    tower: str
    tokens: TokenMap | None
    start: int
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Patterns:
    """The patterns of one tower in one pass, layer by layer."""

    model: Any
    inputs: Mapping[str, Any]
    tower: str
    layers: list[Any]
    sites: list[str]
    values: list[Tensor]
    own: TokenMap
    query_kind: np.ndarray
    blocks: tuple[KeyBlock, ...]
    n_passes: int = 1
    """How many passes of this tower the cache holds."""

    @property
    def example(self) -> list[int]:
        """Example of each row."""
        return [int(index) for index in self.own.example]

    @property
    def key_kind(self) -> np.ndarray:
        """Kind of every key, ``[row key]``."""
        rows = self.own.n_rows
        parts = [
            np.full((rows, block.count), GENERATED, dtype="<U12") if block.tokens is None else _columns(block, "kind")
            for block in self.blocks
        ]
        return np.concatenate(parts, axis=1)

    def places(self) -> Int[Tensor, "row key 4"]:
        """Image, tile, patch row and patch column of every key, −1 where it is no patch."""
        return self._of_keys(lambda tokens: places_of(tokens), -1)

    def boxes(self) -> Float[Tensor, "row key 4"]:
        """Pixels (left, top, right, bottom) of every key that is a patch, NaN elsewhere."""
        return self._of_keys(lambda tokens: torch.from_numpy(tokens.box.copy()), float("nan"))

    def shares(self) -> Float[Tensor, "row key 4"]:
        """Where every key that is a patch lies in the image or tile that the model read, as shares of it; NaN elsewhere."""
        return self._of_keys(lambda tokens: torch.from_numpy(tokens.shares), float("nan"))

    def frames(self) -> Float[Tensor, "row key 4"]:
        """The pixels that the whole image or tile of every key covers, NaN elsewhere."""
        return self._of_keys(lambda tokens: torch.from_numpy(tokens.frames), float("nan"))

    def _of_keys(self, of: Any, missing: float) -> Tensor:
        parts = []
        for block in self.blocks:
            if block.tokens is None:
                parts.append(torch.full((self.own.n_rows, block.count, 4), missing))
            else:
                parts.append(of(block.tokens)[:, block.first : block.first + block.count])
        dtype = next(part.dtype for part, block in zip(parts, self.blocks, strict=True) if block.tokens is not None)
        return torch.cat([part.to(dtype) for part in parts], dim=1)

    def each(
        self, queries: PositionsLike = None
    ) -> Iterator[tuple[Float[Tensor, "row head query key"], Bool[Tensor, "row query"]]]:
        """Of every layer the pattern in at least float32, and which queries count.

        Queries that count in no row are left out; where they count in another row only, the pattern is 0.
        """
        for number in range(len(self.values)):
            counted = torch.from_numpy(self.queries(queries, number))
            there = counted.any(0)
            pattern = self.layer(number, None if bool(there.all()) else there)
            counted = counted[:, there]
            if not bool(counted.all()):
                pattern = pattern.masked_fill(~counted[:, None, :, None], 0.0)
            yield pattern, counted

    def layer(self, number: int, queries: Bool[Tensor, " query"] | None = None) -> Float[Tensor, "row head query key"]:
        """The pattern of the ``number``-th layer (of some queries) on the CPU, in float32 or, where it is, float64."""
        value = self.values[number].detach()
        value = (value if queries is None else value[:, :, queries.to(value.device)]).cpu()
        return value if value.dtype == torch.float64 else value.float()

    def queries(self, spec: PositionsLike, number: int) -> np.ndarray:
        """Which queries of the ``number``-th layer count: bool ``[row query]``; see :func:`circuitvision.readout.attention_mass`.

        Raises InputError if none does, or if positions of another tower or run are asked for.
        """
        if self.layers[number] == "pool":
            if spec is not None:
                raise InputError("An attention pool has a single query, its probe; leave queries out.")
            return np.ones(self.query_kind.shape, dtype=bool)
        if spec is None:
            live = self._live(number)
            if live is None:
                raise InputError(
                    f"Which positions of the {self.tower} tower are read hangs on its words, which this cache does not know: give queries=."
                )
            found = live & self.real
            if self.model.towers[self.tower].cfg.attention != "bidirectional" and (self.query_kind == "text").any():
                found = last_of(found)
        else:
            found = self._asked(Positions.of(spec)) & self.real
        if not found.any():
            raise InputError(
                f"queries={_shown(spec)} leaves no position of the {self.tower} tower that is not padding; there are {_there(self.query_kind)}."
            )
        return found

    def _asked(self, positions: Positions) -> np.ndarray:
        """The queries of this pass that are asked for; a pass of ``generate`` holds the newest positions, the last of all that there are so far."""
        count = self.query_kind.shape[1]
        if not self._generated:
            selected = positions.mask if positions.tower == self.tower else None
            if selected is not None and selected.tensor.shape != self.own.kind.shape:
                raise InputError(
                    f"queries: {positions.text!r} is of another run: it has shape {tuple(selected.tensor.shape)}, the queries of this pass "
                    f"{self.query_kind.shape}."
                )
            return positions.resolve(self.own).numpy()
        if positions.kind == "last":
            return np.arange(count) == np.full((self.own.n_rows, 1), count - 1)
        new = sum(block.count for block in self.blocks if block.tokens is None)
        return positions.resolve(self.own, self.own.n_positions + new)[:, -count:].numpy()

    @property
    def _generated(self) -> bool:
        return self.query_kind.shape != self.own.kind.shape or GENERATED in self.query_kind

    @property
    def real(self) -> np.ndarray:
        """The queries of this pass that can count at all, ``[row query]``."""
        full = self.query_kind.shape == self.own.kind.shape and GENERATED not in self.query_kind
        return real_queries(self.model.towers[self.tower], self.own) if full else present(self.query_kind)

    def _live(self, number: int) -> np.ndarray | None:
        """The queries whose attention in this layer can reach the output; None where that hangs on inputs that are not known."""
        if GENERATED in self.query_kind:
            return np.ones(self.query_kind.shape, dtype=bool)
        tower = self.model.towers[self.tower]
        if not self.inputs and tower.output_head.table.pool in ("eos", "first_eos"):
            return None
        dead = dead_positions(tower, self.sites[number], self.own, self.inputs)
        return np.ones(self.query_kind.shape, dtype=bool) if dead is None else ~dead.numpy()

    def visible(self, pattern: Float[Tensor, "row head query key"]) -> Bool[Tensor, "row query key"]:
        """The keys that a query can see: those that are no padding and that some head of the layer gives more than 0."""
        return (pattern.amax(1) > 0) & torch.from_numpy(present(self.key_kind))[:, None]

    def alike(self, pattern: Float[Tensor, "row head query key"]) -> Float[Tensor, "row query key"]:
        """The attention of a head that looks at every key it can see alike."""
        seen = self.visible(pattern).to(pattern.dtype)
        return seen / seen.sum(-1, keepdim=True).clamp_min(1)

    def axes(self, n_heads: int) -> dict[str, list[Any]]:
        """The axes that results share: layer and head, before those of their own and :attr:`example`."""
        return {"layer": self.layers, "head": list(range(n_heads))}

    def provenance(self, method: str, queries: PositionsLike) -> dict[str, Any]:
        """Where a result read off these patterns comes from."""
        inputs = (self.inputs,) if self.inputs else ()
        text = f"{method}, tower={self.tower}, queries={described(queries)}"
        return describe(self.model, method=text, inputs=inputs)

    def dead_layers(self, queries: PositionsLike) -> list[Any]:
        """Those layers whose counted queries cannot reach the output, whatever their attention."""
        found = []
        for number, layer in enumerate(self.layers):
            dead = self.model.is_dead(self.sites[number], self.inputs)
            live = self._live(number)
            if dead or (live is not None and not (live & self.queries(queries, number)).any()):
                found.append(layer)
        return found

    def keys(self, spec: PositionsLike, name: str = "keys") -> np.ndarray:
        """Which keys a span holds: bool ``[row key]``; see :func:`keys_of`.

        Raises InputError if it holds none, or if it is of a tower or run whose positions these keys are not.
        """
        if spec is None or (isinstance(spec, str) and spec in (EVERYTHING, "all")):
            return present(self.key_kind)
        found = keys_of(Positions.of(spec), self.blocks, self.tower, self.own.n_rows, f"The span {name!r}")
        if not found.any():
            raise InputError(
                f"The span {name!r} is empty: no key of the {self.tower} tower is in it; there are {_there(self.key_kind)}."
            )
        return found


def keys_of(positions: Positions, blocks: Sequence[KeyBlock], tower: str, rows: int, what: str) -> np.ndarray:
    """Which keys these positions are, ``[row key]``.

    What names things (kinds, regions, functions) names them among all keys; what names places (numbers, slices, "last", masks) names the tower's own,
    or those of the tower said. A mask as wide as all keys together is of keys.

    Raises InputError for positions of a tower or run whose positions these keys are not.
    """
    widths = [block.start + block.count for block in blocks]
    if positions.kind == "mask" and not positions.tower and positions.mask is not None:
        mask = positions.mask.tensor.cpu().numpy()
        if mask.shape[-1] == widths[-1] and (mask.ndim == 1 or len(mask) in (1, rows)):
            return np.broadcast_to(mask, (rows, widths[-1])).copy()
    found, wanted = np.zeros((rows, widths[-1]), dtype=bool), positions.tower or ("" if positions.is_named else tower)
    known = {block.tower: block.tokens for block in blocks if block.tokens is not None}
    if wanted and wanted not in known:
        raise InputError(
            f"{what} is of the {wanted} tower, but the {tower} tower looks at positions of {' and '.join(known)}; select them in "
            f"model.tokens(inputs)[{list(known)[-1]!r}]."
        )
    new = sum(block.count for block in blocks if block.tokens is None)
    for block in blocks:
        tokens = known.get(tower) if block.tokens is None else block.tokens
        if tokens is None or wanted not in ("", tokens.tower):
            continue
        if positions.tower and positions.mask is not None and positions.mask.tensor.shape != tokens.kind.shape:
            raise InputError(
                f"{what} is of another run: it has shape {tuple(positions.mask.tensor.shape)}, the {tokens.tower} tower of this run "
                f"{tokens.kind.shape}."
            )
        resolved = positions.resolve(tokens, tokens.n_positions + (new if tokens.tower == tower else 0)).numpy()
        first = tokens.n_positions if block.tokens is None else block.first
        found[:, block.start : block.start + block.count] = resolved[:, first : first + block.count]
    return found


def _shown(spec: Any) -> str:
    return repr(described(spec)) if not isinstance(spec, str | int) else repr(spec)


def _there(kinds: np.ndarray) -> str:
    return ", ".join(dict.fromkeys(kinds.flatten().tolist()))


def last_of(mask: np.ndarray) -> np.ndarray:
    """The last position of every row that is in the mask."""
    found = np.zeros_like(mask)
    rows = np.flatnonzero(mask.any(1))
    found[rows, mask.shape[1] - 1 - mask[rows, ::-1].argmax(1)] = True
    return found


def described(spec: PositionsLike) -> str:
    """A choice of queries in a word or two."""
    return "default" if spec is None else Positions.of(spec).text


def warn_undefined(values: Tensor, why: str) -> None:
    """One warning where a result has entries without a value."""
    count = int(torch.isnan(values).sum())
    if count:
        warn(f"{count} of {values.numel()} values are NaN: {why}.")


def _columns(block: KeyBlock, name: str) -> np.ndarray:
    return getattr(block.tokens, name)[:, block.first : block.first + block.count]


def mean_query(
    pattern: Float[Tensor, "row head query key"], counted: Bool[Tensor, "row query"]
) -> Float[Tensor, "row head key"]:
    """The attention of the mean query that counts; NaN in a row without any."""
    weights = counted / counted.sum(-1, keepdim=True, dtype=torch.float64)
    return (weights.to(pattern.dtype)[:, None, None] @ pattern)[:, :, 0]
