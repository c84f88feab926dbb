"""Attention by hand: eager attention of a model file with a function on its scores, knowing nothing of the library.

``scores_by_hand(module, fn)`` replaces ``eager_attention_forward`` in the model's file for the length of the block and makes the model use it. The
function gets ``[row head query key]`` after scaling and mask, and returns the scores to go on with.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.edits.common import set_attention

Scores = Callable[[nn.Module, Tensor], Tensor]


@contextlib.contextmanager
def scores_by_hand(
    model: nn.Module, attention: type[nn.Module], fn: Scores, of_pattern: bool = False
) -> Iterator[None]:
    """``fn(attention module, scores)`` in every module of one class, or of the pattern; the configs must hold no other eager attention."""
    file = sys.modules[attention.__module__]
    before: Any = file.eager_attention_forward  # type: ignore[attr-defined]

    def eager(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        if kwargs.get("softcap") is not None:
            scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[2]]
        pattern = fn(module, scores.softmax(-1)) if of_pattern else fn(module, scores).softmax(-1)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    file.eager_attention_forward = eager  # type: ignore[attr-defined]
    set_attention(model, "eager")
    try:
        yield
    finally:
        file.eager_attention_forward = before  # type: ignore[attr-defined]
        set_attention(model, "sdpa")


def hidden(scores: Tensor, where: Tensor) -> Tensor:
    """Scores hidden where ``where`` (broadcasting to them) holds and the mask leaves them visible."""
    floor = torch.finfo(scores.dtype).min
    return scores.masked_fill(where & (scores > floor / 2), floor)
