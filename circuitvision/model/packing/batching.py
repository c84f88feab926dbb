"""Inputs taken apart, repeated and put together along the axis that holds examples.

Not covered: which axis that is, which is the packing's to say (:meth:`circuitvision.model.packing.base.Packing.entries`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuitvision.data.sides import same_as
from circuitvision.errors import InputError


@dataclass(frozen=True)
class Entries:
    """Where an input holds examples: the example of every entry along one axis."""

    owners: Sequence[int]
    axis: int = 0

    def of(self, examples: Sequence[int]) -> list[int]:
        """The entries of some examples, in the order of the examples."""
        held: dict[int, list[int]] = {}
        for entry, owner in enumerate(self.owners):
            held.setdefault(owner, []).append(entry)
        return [entry for example in examples for entry in held.get(example, ())]


def taken(value: Any, entries: Entries | None, examples: Sequence[int]) -> Any:
    """The entries of some examples; None where they have none, the value itself where all examples share it."""
    if entries is None:
        return value
    chosen = entries.of(examples)
    if not chosen:
        return None
    if not isinstance(value, Tensor):
        return type(value)(value[entry] for entry in chosen)
    if chosen == list(range(chosen[0], chosen[-1] + 1)):
        return value.narrow(entries.axis, chosen[0], len(chosen))
    return value.index_select(entries.axis, torch.tensor(chosen, device=value.device))


def repeated(value: Any, entries: Entries | None, copies: int) -> Any:
    """All entries ``copies`` times, one copy after the other."""
    if entries is None or copies == 1:
        return value
    if not isinstance(value, Tensor):
        return type(value)(list(value) * copies)
    return value.repeat(*(copies if axis == entries.axis else 1 for axis in range(value.ndim)))


def joined(name: str, values: Sequence[Any], entries: Entries | None) -> Any:
    """The entries of several inputs one after the other. Raises InputError for other shapes, and for different values of what is shared."""
    first = values[0]
    if entries is None:
        if all(value is first or same_as(first, value) for value in values):
            return first
        raise InputError(f"{name} differs between the inputs, and one run has one; run each by itself.")
    if not isinstance(first, Tensor):
        return type(first)(entry for value in values for entry in value)
    shapes = [(*value.shape[: entries.axis], *value.shape[entries.axis + 1 :]) for value in values]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(f"{name} has the shapes {[tuple(value.shape) for value in values]}, which do not join.")
    return torch.cat(list(values), entries.axis)
