"""Resampling from a data set: for every example of a run another example to take values from.

The other example is drawn by the seed and by what the example itself is, so it is the same whichever batch the example runs in. It is never one with
the same content, and it has as many positions of every kind as are asked for: the ``i``-th of a kind takes the value of the ``i``-th of that kind.

Not covered: dual encoders, where an example is a row of one of two towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.data.batches import inputs_of
from circuitvision.data.sides import Side
from circuitvision.digests import of_json, of_tensor, plain
from circuitvision.errors import InputError
from circuitvision.model.averages import Array, Draw, match
from circuitvision.model.packing import ImageRun
from circuitvision.model.tokens import TokenMap

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

TRIES = 32
"""How many other examples are tried for each."""


@dataclass(frozen=True, eq=False)
class Donors:
    """The examples that values are taken from, one for each of a run: their inputs, and of every tower their token map and the row that each row of
    the run takes from."""

    inputs: dict[str, Any]
    maps: dict[str, TokenMap]
    rows: dict[str, Array]

    def draw(self, tokens: TokenMap, needed: Array, from_end: bool = False) -> Draw:
        """Where the wanted entries of a tower ``[row pos]`` take their values from."""
        rows, twin = self.rows[tokens.tower], self.maps[tokens.tower]
        positions = np.minimum(np.tile(np.arange(needed.shape[1]), (len(needed), 1)), twin.n_positions - 1)
        for row in np.flatnonzero(needed.any(1)).tolist():
            found = match(tokens.kind[row], needed[row], twin.kind[rows[row]], from_end)
            assert found is not None
            positions[row, needed[row]] = found
        return Draw(rows, positions, needed)


def donors_of(
    model: Wrapped,
    side: Side,
    inputs: Mapping[str, Any],
    maps: Mapping[str, TokenMap],
    needed: Mapping[str, Array],
    seed: int,
    from_end: bool = False,
) -> Donors:
    """For every example of a run another of a data set; ``needed`` are the wanted positions of every tower ``[row pos]``.

    Raises:
        InputError: no example of the data set is another one with as many positions of the wanted kinds.
    """
    if model.is_dual:
        raise InputError("resampling from a data set is for models whose examples are rows; resample within the run")
    own = [content_of(model, inputs, maps, example) for example in range(_count(maps))]
    found: list[int] = []
    for example, content in enumerate(own):
        order = np.random.default_rng([seed, int(content[:15], 16)]).permutation(len(side))[:TRIES]
        for number in order.tolist():
            made = inputs_of(model, side[number])
            there = model.tokens(made)
            if content_of(model, made, there, 0) != content and _serves(maps, there, example, needed, from_end):
                found.append(number)
                break
        else:
            raise InputError(
                f"none of {len(order)} examples of the data set is another one with as many positions of the kinds that are ablated in example "
                f"{example}. Give positions= that other examples have, or a larger data set"
            )
    made = inputs_of(model, side[found])
    there = model.tokens(made)
    return Donors(made, there, {name: _rows(tokens, there[name]) for name, tokens in maps.items()})


def _count(maps: Mapping[str, TokenMap]) -> int:
    return max(tokens.n_examples for tokens in maps.values())


def content_of(model: Wrapped, inputs: Mapping[str, Any], maps: Mapping[str, TokenMap], example: int) -> str:
    """What one example of a run is, however far its prompt, and the tiles of its images, are filled up."""
    told: dict[str, Any] = {}
    mask = inputs.get("attention_mask")
    of_images = model.family.packing.of_images
    run = ImageRun(model, inputs) if any(name in of_images for name in inputs) else None
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or not value.ndim or name in ("attention_mask", *model.family.required):
            continue
        if run is not None and name in of_images:
            told[name] = [of_tensor(one) for one in run.packing.content(run, name, value, example)]
        elif isinstance(mask, Tensor) and mask.ndim == 2 and value.shape[:2] == mask.shape:
            told[name] = of_tensor(value[example][mask[example].bool()])
        elif len(value) == _count(maps):
            told[name] = of_tensor(value[example])
    return of_json(plain(told))


def _serves(
    maps: Mapping[str, TokenMap],
    there: Mapping[str, TokenMap],
    example: int,
    needed: Mapping[str, Array],
    from_end: bool,
) -> bool:
    """Whether one other example has a row for each row of an example, and in it what is needed."""
    for name, tokens in maps.items():
        mine, twin = np.flatnonzero(tokens.example == example), there[name]
        if name not in needed or not needed[name][mine].any():
            continue
        if twin.n_rows != len(mine):
            return False
        wanted = needed[name]
        pairs = zip(mine, range(twin.n_rows), strict=True)
        if any(match(tokens.kind[row], wanted[row], twin.kind[other], from_end) is None for row, other in pairs):
            return False
    return True


def _rows(tokens: TokenMap, twin: TokenMap) -> Array:
    """For each row the row of the same example and number among the others; the first of the example where it has fewer."""
    found = np.zeros(tokens.n_rows, dtype=int)
    for example in np.unique(tokens.example):
        mine, others = np.flatnonzero(tokens.example == example), np.flatnonzero(twin.example == example)
        found[mine] = others[np.minimum(np.arange(len(mine)), len(others) - 1)]
    return found


def take(value: Tensor, rows: Array) -> Tensor:
    """The rows of a value that has no positions."""
    return value[torch.from_numpy(rows).to(value.device)]
