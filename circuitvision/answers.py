"""Answers of a metric: ids, words, and the one grammar in which they are given.

* an id (a whole number) or a word: the same for every example,
* a list, array or one-dimensional tensor of those: one per example,
* a tuple of two: a contrast, ``(answer, foil)``; a list of such tuples: one contrast per example.

What could be read two ways is refused: a tuple where one answer is wanted (two examples, or a contrast?), a dict (columns: several metrics).

Words need a vocabulary: class names of the model's configuration come before its tokenizer, of which a word must be one piece. An
answer of several tokens is a list of ids inside the list of examples, and is read at one position; which ids a word has is for a data set to say.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError

Answer = int | str | Sequence[int | str] | Tensor


def plain_answer(answer: Any) -> Any:
    """Answers with numpy's (and pandas') numbers, words and arrays as Python's; tensors stay, None stays.

    Raises:
        InputError: truth values or numbers with a fraction, which are no ids; a tuple or a dict, which is more than one answer.
    """
    if answer is None or isinstance(answer, Tensor | str):
        return answer
    if isinstance(answer, tuple):
        raise InputError(
            f"The tuple {answer!r:.60} is a contrast of two answers, and one is wanted here: logit_diff{answer!r:.60} for their difference, or a "
            f"list, {list(answer)!r:.60}, for one answer per example."
        )
    if isinstance(answer, Mapping):
        raise InputError(
            "A dict names several columns, and a metric gives one number: metric={'name': metric, …} measures several, a list gives one answer per "
            "example."
        )
    if isinstance(answer, np.ndarray | np.generic) or hasattr(answer, "tolist"):
        answer = answer.tolist()
    if isinstance(answer, str):
        return answer
    if isinstance(answer, Iterable):
        return [plain_answer(item) for item in answer]
    if isinstance(answer, bool) or not hasattr(answer, "__index__"):
        actions = (
            " An action is compared by cv.metrics.action_dim(number of the dimension)."
            if isinstance(answer, float)
            else ""
        )
        raise InputError(f"An answer is an id (a whole number) or a word, not {answer!r}.{actions}")
    return operator.index(answer)


def contrast(answer: Any, foil: Any) -> tuple[Any, Any]:
    """Answer and foil, given apart or as one contrast: a tuple of two, or a list of such tuples.

    Raises:
        InputError: a contrast beside a foil, or a tuple that has not two entries.
    """
    pairs = [answer] if isinstance(answer, tuple) else answer
    if not isinstance(pairs, list) or not any(isinstance(pair, tuple) for pair in pairs):
        return answer, foil
    wrong = [pair for pair in pairs if not isinstance(pair, tuple) or len(pair) != 2]
    if foil is not None or wrong:
        raise InputError(
            f"A contrast is a tuple of two, (answer, foil), without another foil; got {wrong[0] if wrong else answer!r:.60}. One answer and one foil "
            "per example are two lists, or a list of tuples."
        )
    if isinstance(answer, tuple):
        return answer
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def answer_ids(answer: Answer, model: Any) -> int | list[int] | Tensor:
    """Ids of an answer given as id, word, or one of either per example.

    A word is looked up among the class names of the model's configuration, then in its tokenizer.

    Raises:
        InputError: a word without an id of its own; None.
    """
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, str):
        return _word_id(answer, model)
    found = plain_answer(answer)
    if isinstance(found, list):
        return [answer_ids(item, model) for item in found]  # type: ignore[misc]
    if found is None:
        raise InputError("An answer is None: leave out the examples that have none, or give theirs.")
    return int(found)


def _word_id(word: str, model: Any) -> int:
    labels = getattr(getattr(model.module, "config", None), "label2id", None) or {}
    if word in labels:
        return int(labels[word])
    if getattr(model, "is_dual", False):
        raise InputError(
            f"This model's output has one column per caption, so {word!r} has no id; give the caption's column."
        )
    return int(model.token(word))


def ids_of_rows(answer: Answer | None, rows: Tensor) -> Int[Tensor, "batch token"]:
    """The ids of every row of an output ``[batch, classes]``, filled up with -1 where an answer has fewer tokens than others; one id serves all.

    Raises:
        InputError: no answer, a word, an id outside the output, or another number of ids than rows.
    """
    batch, classes = rows.shape
    if answer is None:
        raise InputError(
            "This metric has no answer yet: give it one, or measure on a data set whose examples have answers."
        )
    items = [answer] if isinstance(answer, str) else answer
    if not isinstance(items, Tensor | int):
        words = [item for item in items if isinstance(item, str)]
        if words:
            raise InputError(f"{words[0]!r} is a word; call metric.bind(model) first, or give its id.")
        if any(isinstance(item, list) for item in items):
            several = [item if isinstance(item, list) else [int(item)] for item in items]
            items = torch.tensor(_filled(several), device=rows.device)
    ids = torch.as_tensor(items, device=rows.device)
    whole = not ids.dtype.is_floating_point and ids.dtype != torch.bool
    if not whole or ids.ndim > 2 or (ids.ndim and len(ids) not in (1, batch)):
        raise InputError(f"Answers are one id, or one per example ({batch}); got {tuple(ids.shape)} of {ids.dtype}.")
    ids = ids if ids.ndim == 2 else ids.reshape(-1, 1)
    there = ids[ids >= 0] if ids.shape[1] > 1 else ids
    if bool(((there < 0) | (there >= classes)).any()):
        raise InputError(f"Answer {ids.flatten().tolist()} is outside the output's {classes} classes.")
    return ids.expand(batch, -1)


def _filled(items: list[list[int]]) -> list[list[int]]:
    width = max(map(len, items))
    return [[*item, *[-1] * (width - len(item))] for item in items]


def pick(
    values: Float[Tensor, "batch classes"], ids: Int[Tensor, "batch token"], combine: str
) -> Float[Tensor, " batch"]:
    """The value of every row's answer; of several tokens the ``"mean"``, the ``"best"``, or the ``"joint"`` one: the sum,
    of log-probabilities.

    Raises:
        InputError: several tokens, and no word on how they become one number.
    """
    if ids.shape[1] == 1:
        return values.gather(1, ids)[:, 0]
    if combine not in ("mean", "joint", "best"):
        raise InputError(
            "An answer has several tokens: combine='mean' or 'joint' of a data set says how they become one."
        )
    found = values.gather(1, ids.clamp(min=0))
    if combine == "mean":
        return found.masked_fill(ids < 0, torch.nan).nanmean(1)
    if combine == "joint":
        return found.masked_fill(ids < 0, 0.0).sum(1)
    return found.masked_fill(ids < 0, -torch.inf).max(1).values


def take(answer: Any, examples: Sequence[int], count: int) -> Any:
    """The answers of some of ``count`` examples; one answer serves all."""
    if isinstance(answer, Tensor) and answer.ndim and len(answer) == count > 1:
        return answer[torch.as_tensor(list(examples), device=answer.device)]
    if isinstance(answer, list) and len(answer) == count > 1:
        return [answer[number] for number in examples]
    return answer


def check_complete(data: Any, columns: Iterable[str] = ("answers", "foils")) -> None:
    """Raise InputError where some examples of a data set lack what the others have, before anything runs."""
    for column in columns:
        held = getattr(data, column)
        missing = [number for number, one in zip(data.numbers, held or (), strict=False) if one is None]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(held)} examples have no {column.removesuffix('s')} (the first is example {missing[0]}): leave them out, "
                "data.at(numbers of the others)."
            )


def short(answer: Any) -> str:
    """An answer in the name of a metric."""
    answer = plain_answer(answer)
    if answer is None:
        return ""
    if isinstance(answer, str | int):
        return str(answer)
    items = answer.tolist() if isinstance(answer, Tensor) else list(answer)
    items = items if isinstance(items, list) else [items]
    return str(items[0]) if len(set(map(str, items))) == 1 else "per example"
