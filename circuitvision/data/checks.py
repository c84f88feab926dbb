"""What is wrong with a data set for a model, said before anything runs: answers without one id, prompts whose positions do not belong together.

Batches are made when they are asked for, so that a mistake in the last pair would be met hours into a run. Here answers and prompts of all examples
are cut into tokens, which costs little beside one run; pictures are not processed.

Not covered: pictures that take other numbers of positions on the two sides, and texts of dual encoders; both are met when their batch is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from circuitvision.data.batches import answer_ids, unequal
from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Example, Side
from circuitvision.errors import InputError


def check_answers(side: Side | Pairs, model: Any) -> None:
    """Raise InputError where an answer or foil has no id of its own, or several and no rule that makes them one; the message names the example."""
    seen: set[str] = set()
    for column in (side.answers, side.foils):
        for number, one in zip(side.numbers, column or (), strict=False):
            if repr(one) in seen:
                continue
            seen.add(repr(one))
            try:
                answer_ids(one, model, side.combine)
            except InputError as error:
                raise InputError(f"Example {number}: {error}") from error


def check_lengths(pairs: Pairs, model: Any, align: Any = "kind") -> None:
    """Raise InputError where the prompts of a pair have other numbers of tokens, and nothing says which positions belong together."""
    if align != "kind" or pairs.maps is not None or model.is_dual:
        return
    known: dict[str, int] = {}
    for number, one, other in zip(pairs.numbers, pairs.clean.examples, pairs.corrupt.examples, strict=True):
        here, there = (_length(each, model, known) for each in (one, other))
        if None not in (here, there) and here != there:
            raise unequal(number, "text", here, there)


def _length(example: Example, model: Any, known: dict[str, int]) -> int | None:
    """How many tokens of text an example's prompt has; None where that is not known."""
    if example.tensors is not None:
        return _length_of_ids(example.tensors, model)
    text = example.text
    if not isinstance(text, str) or model.tokenizer is None:
        return None
    if text not in known:
        known[text] = sum(int(one) != model.image_token_id for one in model.tokenizer(text)["input_ids"])
    return known[text]


def _length_of_ids(tensors: Mapping[str, Any], model: Any) -> int | None:
    ids, mask = (tensors.get(name) for name in ("input_ids", "attention_mask"))
    if not isinstance(ids, Tensor):
        return None
    there = torch.ones_like(ids) if not isinstance(mask, Tensor) or mask.shape != ids.shape else mask
    text = ids != model.image_token_id if model.image_token_id is not None else torch.ones_like(ids, dtype=torch.bool)
    return int((there.bool() & text).sum())
