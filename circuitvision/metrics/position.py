"""The position of an output that a metric reads.

:func:`at_position` takes one position of every example out of ``[batch pos classes]``. Positions are those of the prompt, whatever part of it the
call computed; what is named by what is there (kinds, regions, functions) needs a token map.

Not covered: several positions of one example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError

Position = Any
"""Any spelling of :mod:`circuitvision.model.positions`."""


def as_output(logits: Any) -> Tensor:
    """A model's output as a tensor (an array is one as well); InputError for anything else, such as the inputs, or an output with names."""
    if isinstance(logits, Tensor):
        return logits
    if isinstance(logits, np.ndarray):
        return torch.from_numpy(logits.copy())
    named = isinstance(logits, Mapping) and "logits" in logits
    fix = "take its 'logits'" if named else "call it as metric(model(inputs), inputs)"
    raise InputError(f"A metric reads the output tensor of a run, not a {type(logits).__name__}: {fix}.")


def at_position(
    logits: Float[Tensor, "batch *pos classes"],
    position: Position,
    inputs: Mapping[str, Any] | None = None,
    tokens: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Float[Tensor, "batch classes"]:
    """The output at one position of every example, in float32 at least; outputs without positions are returned whole.

    NaN where an example has none of the positions, with a warning. ``tokens`` (``model.tokens``) is needed for positions named by what is there.

    Positions are those of the prompt, also where the call kept only some of them (``logits_to_keep`` in ``inputs``); what a cache in
    ``past_key_values`` holds counts as its beginning.

    Raises:
        InputError: a position outside the output, several of one example, a mask of another length, an example that is all padding.
    """
    logits = as_output(logits)
    if logits.ndim == 2:
        return wide(logits)
    if logits.ndim != 3:
        raise InputError(f"A metric reads [batch, classes] or [batch, pos, classes], not {tuple(logits.shape)}.")
    batch, length = logits.shape[:2]
    kept = _kept(inputs, length)
    whole = length if kept is None else _prompt_length(inputs)
    asked, empty = position_of(position), None
    if asked.kind == "last":
        index = last_unmasked(inputs, batch, whole).to(logits.device)
    elif asked.kind == "ints" and len(asked.ints) == 1:
        index = torch.tensor(asked.ints, device=logits.device).expand(batch)
        _refuse_unknown_past(inputs, index)
    else:
        index, empty = (part.to(logits.device) for part in _one_each(asked, batch, whole, inputs, tokens))
    if bool(((index < -whole) | (index >= whole)).any()):
        raise InputError(f"Position {index.tolist()} is outside the output's {whole} positions.")
    if kept is not None:
        there = kept.to(logits.device) == index.remainder(whole)[:, None]
        if not bool(there.any(1).all()):
            raise InputError(
                f"The metric reads position {index.tolist()}, and logits_to_keep left positions {kept.tolist()}: keep the one that is read."
            )
        index = there.int().argmax(1)
    rows = wide(logits[torch.arange(batch, device=logits.device), index])
    return rows if empty is None or not bool(empty.any()) else rows.masked_fill(empty[:, None], float("nan"))


def position_of(position: Position) -> Any:
    """A position as a value. The core reads metrics, and positions are the core's: each meets the other when it is used."""
    from circuitvision.model.positions import Positions

    return Positions.of(position)


def _one_each(
    asked: Any, batch: int, whole: int, inputs: Mapping[str, Any] | None, tokens: Any
) -> tuple[Tensor, Tensor]:
    """The one position of every example, and which examples have none."""
    from circuitvision.model.positions import warn_of_empty
    from circuitvision.model.regions import At

    if asked.kind == "mask" and asked.mask is not None:
        mask = asked.mask.tensor.cpu()
        if mask.shape[-1] != whole or (mask.ndim == 2 and len(mask) not in (1, batch)):
            raise InputError(f"A mask of positions is [{batch} {whole}] for this output, not {list(mask.shape)}.")
        mask = mask.expand(batch, whole)
    elif isinstance(asked.region, At):
        numbers = asked.region.numbers
        if asked.examples is not None:
            numbers = tuple(numbers[example] for example in asked.examples)
        if len(numbers) != batch:
            raise InputError(f"There are positions of {len(numbers)} examples, and the output has {batch}.")
        own = torch.tensor([0 if n is None else n for n in numbers])
        _refuse_unknown_past(inputs, own)
        empty = torch.tensor([n is None for n in numbers])
        warn_of_empty({asked.text: int(empty.sum())}, batch)
        return own, empty
    elif asked.is_named:
        if tokens is None or inputs is None:
            raise InputError(
                f"The metric reads position {asked.text!r}, which a token map tells: call metric.bind(model) first, and give the inputs."
            )
        fits = [m for m in tokens(inputs).values() if (m.n_rows, m.n_positions) == (batch, whole)]
        if not fits:
            raise InputError(f"The output's {batch} rows of {whole} positions are those of no tower; give a number.")
        mask = asked.resolve(fits[-1])
    else:
        mask = torch.zeros(batch, whole, dtype=torch.bool)
        for number in range(whole)[slice(*asked.bounds)] if asked.kind == "slice" else asked.ints:
            if not -whole <= number < whole:
                raise InputError(f"Position {number} is outside the output's {whole} positions.")
            mask[:, number] = True
        _refuse_unknown_past(inputs, mask.int().argmax(1))
    counts = mask.sum(1)
    if bool((counts > 1).any()):
        raise InputError(
            f"A metric reads one position of every example, and {asked.text!r} names {int(counts.max())}; a position of its own for each example is "
            "cv.regions.at(numbers)."
        )
    warn_of_empty({asked.text: int((counts == 0).sum())}, batch)
    return mask.int().argmax(1), counts == 0


def _read_length(inputs: Mapping[str, Any] | None) -> int:
    """How many positions the call itself gave the model; 0 where the inputs do not say."""
    given = {} if inputs is None else inputs
    found = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    return 0 if found is None else int(found.shape[1])


def _prompt_length(inputs: Mapping[str, Any] | None) -> int:
    """How many positions the prompt has, those in a cache included; 0 where the inputs do not say."""
    read = _read_length(inputs)
    mask = None if inputs is None or inputs.get("past_key_values") is None else inputs.get("attention_mask")
    return read if mask is None or mask.ndim != 2 else max(read, int(mask.shape[1]))


def _refuse_unknown_past(inputs: Mapping[str, Any] | None, index: Tensor) -> None:
    """Raise InputError for positions counted from the first one, where nothing says how many a cache held before the run made it longer."""
    if inputs is None or inputs.get("past_key_values") is None or inputs.get("attention_mask") is not None:
        return
    if bool((index >= 0).any()):
        raise InputError(
            "Positions count from the first one that past_key_values holds, whose number these inputs do not say: give attention_mask for the "
            "cache and the new positions, or count from the end (-1 is the last)."
        )


def _kept(inputs: Mapping[str, Any] | None, length: int) -> Tensor | None:
    """The positions of the prompt that an output of ``length`` positions holds, where it holds some of them only."""
    keep = None if inputs is None else inputs.get("logits_to_keep")
    whole, read = _prompt_length(inputs), _read_length(inputs)
    if not whole:
        return None
    if isinstance(keep, Tensor) and keep.ndim:
        return keep.remainder(read) + (whole - read)
    return torch.arange(whole - length, whole) if (keep is not None and int(keep)) or whole > read else None


def last_unmasked(inputs: Mapping[str, Any] | None, batch: int, length: int) -> Tensor:
    """The last position of every example that the attention mask in ``inputs`` leaves; the last of all without one."""
    mask = None if inputs is None else inputs.get("attention_mask")
    mask = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    if mask is None:
        return torch.full((batch,), length - 1)
    if tuple(mask.shape) != (batch, length):
        raise InputError(
            f"The attention mask has shape {tuple(mask.shape)}, the output {batch} examples of {length} positions; "
            "pass the inputs that the output was computed from, or name the position."
        )
    real = mask.bool()
    if not bool(real.any(dim=1).all()):
        raise InputError("The attention mask hides every position of an example, so it has no last one.")
    return (length - 1 - real.flip(1).int().argmax(dim=1)).cpu()


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: differences of half precision lose the last digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
