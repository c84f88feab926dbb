"""Prompts without their pictures, and what that does to positions.

Leaving the picture out of a prompt takes its tokens out of the sequence: every token behind it stands that many positions earlier, rotary phases and
learned positions change with it, and a difference between the two runs mixes what the picture says with where the text stands. A blank picture of the
same size (:func:`circuitvision.data.blank_images`) moves nothing; report both (VHD, He et al. 2025, arXiv 2412.13949). The pairs made here carry
position maps, so that text is compared with text.

A processor that asks for a picture (PaliGemma's) is given it, and the positions of the picture are cut out of what it makes: the same text tokens
stay, as tensors in place of a prompt.

Not covered: models that themselves ask for a picture, and dual encoders, whose texts hold none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from circuitvision.data.batches import along_text, inputs_of
from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Example, Side
from circuitvision.errors import InputError

_REFUSALS = (InputError, KeyError, TypeError, ValueError)


def without_images(side: Side, model: Any) -> Pairs:
    """The same prompts without pictures and without the tokens that stand for them, where the model runs on such prompts.

    ``maps`` of the pairs say for every position of the language tower which one holds the same token in the prompt without; positions of the picture
    have none there and are given the last one before it. :func:`text_shift` says how far the text moved.

    Raises:
        InputError: a model that needs a picture, or examples without picture or prompt; the message names the example.
    """
    if model.is_dual or "language" not in model.towers:
        raise InputError(
            "Pictures are left out of prompts of a model that reads both in one sequence; take blank_images."
        )
    token = model.image_token
    examples, maps = [], []
    for row, (number, one) in enumerate(zip(side.numbers, side.examples, strict=True)):
        if one.tensors is not None or one.image is None or not isinstance(one.text, str):
            raise InputError(f"Example {number} is no picture with one prompt, so there is no picture to leave out.")
        shown = inputs_of(model, side[row])
        before = model.tokens(shown)["language"]
        bare = dataclasses.replace(one, image=None, text=_without(one.text, token))
        try:
            after = _read(model, side[row], bare)
        except _REFUSALS as error:
            try:
                bare = dataclasses.replace(bare, text=None, tensors=_cut(model, shown, before))
                after = _read(model, side[row], bare)
            except _REFUSALS:
                raise InputError(
                    f"This model does not take the prompt of example {number} without a picture ({error}): take blank_images, which moves no token."
                ) from error
        maps.append({"language": _map(before, after, number)})
        examples.append(bare)
    return Pairs.from_sides(side, side._with(examples=tuple(examples), boxes=None, masks=None), maps=maps)


def _read(model: Any, alone: Side, example: Example) -> Any:
    """The language tower's token map of one example."""
    return model.tokens(inputs_of(model, alone._with(examples=(example,))))["language"]


def _cut(model: Any, inputs: dict[str, Any], tokens: Any) -> dict[str, Any]:
    """The inputs of a prompt with a picture, without the picture and its positions; raises InputError where the model reads more than text."""
    if model.family.required:
        raise InputError(f"The model reads {', '.join(model.family.required)} beside its prompt.")
    keep = torch.from_numpy(tokens.kind[0] == "text")
    return {name: inputs[name][:, keep.to(inputs[name].device)] for name in along_text(model, inputs)}


def text_shift(pairs: Pairs, model: Any) -> list[int]:
    """Per pair by how many positions the last text token of the corrupt run stands earlier than that of the clean one (negative: later)."""
    found = []
    for row in range(len(pairs)):
        last = []
        for side in (pairs.clean, pairs.corrupt):
            tokens = model.tokens(inputs_of(model, side[row]))["language"]
            last.append(int(np.flatnonzero(tokens.kind[0] == "text")[-1]))
        found.append(last[0] - last[1])
    return found


def _without(text: str, token: str | None) -> str:
    """A prompt without the tokens of pictures and the white space behind each."""
    if not token:
        return text
    first, *rest = text.split(token)
    return first + "".join(part[1:] if part[:1].isspace() else part for part in rest)


def _map(tokens: Any, twin: Any, number: int) -> list[int]:
    """For every position the one of the same text token in the other run; positions of pictures take the last text before them."""
    here, there = np.flatnonzero(tokens.kind[0] == "text"), np.flatnonzero(twin.kind[0] == "text")
    # White space that stood beside a picture may have been a token of its own.
    pieces, others = tokens.text[0][here].tolist(), twin.text[0][there].tolist()
    if pieces != others:
        raise InputError(
            f"Without its picture the prompt of example {number} is cut into other tokens ({len(here)} of text before, {len(there)} after), "
            f"so positions do "
            "not belong together: put the picture's token at the beginning of the prompt, or take blank_images."
        )
    found = np.zeros(tokens.kind.shape[1], int)
    found[here] = there
    known = np.zeros_like(found)
    known[here] = here
    last = np.maximum.accumulate(known)
    return [int(found[place]) for place in last]
