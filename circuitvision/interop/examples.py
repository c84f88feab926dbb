"""Tokens that stand for inputs: how tools that pass one tensor around run models that read images, text and robot states.

TransformerLens's tools know a single input, ``tokens [batch, pos]``. They take the number of positions from its last
axis, pick and reorder examples by indexing it, and hand it back to be run. Given pixel values they would count image
columns; given text ids they would run a vision-language model without its image. So a view gives out *handles*:
``tokens[example, pos]`` holds the number of the example, once per position of the tower, and whoever runs the tokens
looks the example's whole inputs up again: pixels, text, masks, states, noise.

Rows of handles are examples, or, where a model compares two towers (CLIP, SigLIP), the images or texts of the tower
at hand, with all inputs of the other tower alongside.

Not covered: tokens whose positions were cut or edited (a handle says which example, not which words), and inputs that
are not batched along their first axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.packing.base import Compared

if TYPE_CHECKING:
    from circuitvision.model import Tower
    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True)
class Batch:
    """Inputs that were given together: their examples are numbered from ``first``."""

    first: int
    count: int
    positions: int
    inputs: dict[str, Any]


class Examples:
    """The inputs a view has seen, by example number; they stay in memory as long as the view does."""

    def __init__(self, model: Wrapped, tower: Tower) -> None:
        self.model, self.tower = model, tower
        self.batches: list[Batch] = []
        self.paired = tower.output_head.compares
        self.compared: Compared = "images" if tower.stack.image else "texts"

    def tokens(self, inputs: Mapping[str, Any]) -> Int[Tensor, "example pos"]:
        """Handles of the examples in ``inputs``; the same tensors get the same handles again.

        Raises InputError if these inputs do not run the tower.
        """
        batch = next((known for known in self.batches if _same(known.inputs, inputs)), None)
        if batch is None:
            maps = self.model.tokens(inputs)
            if self.tower.name not in maps:
                raise InputError(
                    f"These inputs do not run the {self.tower.name} tower; they hold {', '.join(inputs)}. Add what it reads."
                )
            found = maps[self.tower.name]
            count = found.n_rows if self.paired else found.n_examples
            first = self.batches[-1].first + self.batches[-1].count if self.batches else 0
            batch = Batch(first, count, found.n_positions, dict(inputs))
            self.batches.append(batch)
        numbers = torch.arange(batch.first, batch.first + batch.count, device=self.model.device)
        return numbers[:, None].expand(batch.count, batch.positions).clone()

    def inputs(self, tokens: Any) -> dict[str, Any]:
        """The whole inputs of the examples that ``tokens`` names, in its order; a mapping passes through as it is.

        Raises InputError for a tensor that is not made of these handles.
        """
        if isinstance(tokens, Mapping):
            return dict(tokens)
        numbers = self._numbers(tokens)
        parts: list[dict[str, Any]] = []
        for batch, chosen in itertools.groupby(numbers, self._batch_of):
            if tokens.shape[1] != batch.positions:
                raise InputError(
                    f"These tokens have {tokens.shape[1]} positions, their examples {batch.positions}: positions cannot be cut. "
                    "Call to_tokens on the inputs you mean."
                )
            parts.append(self._take(batch, [number - batch.first for number in chosen]))
        return parts[0] if len(parts) == 1 else self._joined(parts)

    def _numbers(self, tokens: Any) -> list[int]:
        known = self.batches[-1].first + self.batches[-1].count if self.batches else 0
        handles = (
            isinstance(tokens, Tensor)
            and not tokens.is_floating_point()
            and tokens.ndim == 2
            and tokens.numel() > 0
            and bool((tokens == tokens[:, :1]).all())
            and int(tokens.min()) >= 0
            and int(tokens.max()) < known
        )
        if not handles:
            raise InputError(
                "These are not tokens of this view. Make them with view.to_tokens(inputs), where inputs holds everything "
                "the model reads (model.inputs(images=…, text=…) makes it); they may then be indexed and reordered by rows."
            )
        return tokens[:, 0].tolist()

    def _batch_of(self, number: int) -> Batch:
        return next(batch for batch in self.batches if batch.first <= number < batch.first + batch.count)

    def _take(self, batch: Batch, index: list[int]) -> dict[str, Any]:
        if index == list(range(batch.count)):
            return batch.inputs
        return self.model.family.packing.take(self.model, batch.inputs, index, self.compared)

    def _joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        try:
            return self.model.family.packing.join(self.model, parts, self.compared)
        except InputError as error:
            raise InputError(
                f"These tokens come from several batches, which do not run as one; make one batch of all examples. {error}"
            ) from None


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)
