"""What a direction of a tower's residual stream says about the output: ``OutputHead.matrix`` with named columns.

What is compared here are directions, not effects: by what the final norm divides depends on the rest of the stream (see
:mod:`circuitvision.model.output_head`, also for parts and the gain of norms). Dual encoders have one column per prompt, ``W_proj @ e`` for the
unit-length embedding ``e`` of a text, before the logit scale; vision towers of a VLM go on through the projector into the language tower's words.

Not covered: projectors with a non-linearity, for which a matrix of one's own can be given.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, nearest
from circuitvision.model.columns import prompt_embeddings, word_ids
from circuitvision.model.norms import upcast
from circuitvision.model.output_head import OutputHead, model_of
from circuitvision.model.tower import Tower

Prompts = Sequence[str] | Tensor


@dataclass(frozen=True, eq=False)
class Unembedding:
    """A matrix from the residual stream to outputs, and what its columns are called."""

    matrix: Float[Tensor, "d_model n_out"]
    label: Callable[[int], str]
    """The name of a column: a class, a text piece, a prompt, an action's coordinate, or its number."""
    find: Callable[[Sequence[int | str]], list[int]]
    """The columns of ids or names; raises InputError for one that is not there."""
    gain: bool = False
    """Whether the final norm's centring and gain are in the matrix."""
    part: str = ""
    """Which position of a head that reads two; empty for all others."""


def unembedding_matrix(
    tower: Tower,
    *,
    gain: bool = True,
    prompts: Prompts | None = None,
    matrix: Float[Tensor, "d_model n_out"] | None = None,
    names: Sequence[str] | None = None,
    part: str | None = None,
) -> Unembedding:
    """The linear part of a tower's read-out, ``[d_model n_out]``, in float32 at least (see the module for conventions).

    Args:
        tower: the tower, of a wrapped model that is still held by a variable.
        gain: whether the final norm's centring and gain are part of the matrix.
        prompts: for dual encoders, the texts to read as, or embeddings in the shared space, ``[prompt d_shared]``.
        matrix: instead of the tower's own head, a matrix that reads the stream behind the final norm.
        names: what the columns of ``matrix`` are called; their numbers if left out.
        part: which position of a head that reads two; None takes the first (``"cls"``, ``"mean"``).

    Raises:
        InputError: a tower without a linear read-out, a dual encoder without prompts, prompts elsewhere, a part that is
        not there, a matrix of the wrong shape.
    """
    device, head = model_of(tower).device, tower.output_head
    called: Sequence[str] | None
    if matrix is not None:
        weight, chosen = upcast(matrix.detach()).to(device), ""
        if weight.ndim != 2 or weight.shape[0] != tower.cfg.d_model:
            raise InputError(f"matrix has shape {tuple(weight.shape)}; it must be [{tower.cfg.d_model}, n_out].")
        called = [str(column) for column in range(weight.shape[1])] if names is None else list(names)
        if len(called) != weight.shape[1]:
            raise InputError(f"{len(called)} names were given for the {weight.shape[1]} columns of matrix.")
        with torch.no_grad(), tower.hooks_disabled():
            weight = head.before_norm(weight) if gain else weight
    else:
        chosen = head.part(part)
        head, called = _read_as(head, prompts)
        weight = torch.cat([chunk for _, chunk in head.chunks(part=part, gain=gain)], dim=1)
    return Unembedding(weight.contiguous(), *_labels(called, head, weight.shape[1]), gain, chosen)


def column_number(target: Any) -> int:
    """A target given as a whole number of any kind (Python's, numpy's, a tensor's); InputError for anything else."""
    try:
        if not isinstance(target, bool):
            return operator.index(target)
    except TypeError:
        pass
    raise InputError(f"{target!r} is no output: outputs are whole numbers or names.")


def _read_as(head: OutputHead, prompts: Prompts | None) -> tuple[OutputHead, Sequence[str] | None]:
    """The head as it is, or the shared space read by prompts, which then name the columns."""
    name = head.tower.name
    if not (head.compares or head.kind == "embedding") and prompts is not None:
        raise InputError(
            f"The {name} tower of {head.tower.family.name} does not end in a space shared with text; leave prompts out."
        )
    if prompts is None:
        if head.compares:
            raise InputError(
                f"The {name} tower ends in a space shared with the other one; give prompts=['a red circle', …] to read it."
            )
        return head, None
    if isinstance(prompts, Tensor):
        embeddings, names = prompts, [f"prompt {number}" for number in range(len(prompts))]
    elif isinstance(prompts, str):
        raise InputError(f"prompts is a list of texts; write [{prompts!r}].")
    else:
        embeddings, names = prompt_embeddings(head.model, prompts), list(prompts)
    if embeddings.ndim != 2 or embeddings.shape[1] != head.width:
        raise InputError(
            f"Embeddings of prompts have shape {tuple(embeddings.shape)}; they must be [prompt, {head.width}]."
        )
    dtype = torch.promote_types(head.tower.dtype, torch.float32)
    units = nn.functional.normalize(embeddings.detach().to(head.model.device, dtype), dim=-1)
    return head.in_run(None, against=units), names


def _labels(
    names: Sequence[str] | None, head: OutputHead, n_out: int
) -> tuple[Callable[[int], str], Callable[[Sequence[int | str]], list[int]]]:
    """How columns are named and found: by ``names``, or as the tower's own outputs are."""
    model = head.model  # Held by the names, because a tower alone does not keep its wrapper.

    def label(column: int) -> str:
        return head.names([int(column)])[str(int(column))] if names is None else names[column]

    def one(target: int | str) -> int:
        if not isinstance(target, str):
            column = column_number(target)
        elif names is None and head.kind in ("classes", "tokens"):
            column = word_ids(model, target)[0]
        else:
            known = names or [label(number) for number in range(n_out)]
            if target not in known:
                raise InputError(f"{target!r} is no output here; nearest: {', '.join(nearest(target, known))}.")
            column = known.index(target)
        if not 0 <= column < n_out:
            raise InputError(f"Output {column} is outside the {n_out} outputs of the {head.tower.name} tower.")
        return column

    def find(targets: Sequence[int | str]) -> list[int]:
        if isinstance(targets, str) or not len(targets):
            raise InputError(f"Targets are a list of one or more outputs, such as ['red', 'blue']; got {targets!r}.")
        return [one(target) for target in targets]

    return label, find
