"""Which pairs a model tells apart: the clean run gives the answer and the corrupt run the foil.

Means over pairs that a model gets wrong mix what it does with what it does not do, so experiments are run on the others, and the share that was left
out is told. A run *gives* what scores highest at the position that metrics read (the last that is not padding).

Not covered: sampled text, and answers of several tokens in sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from circuitvision.data.batches import Batch, answer_ids, fits, pair_batches
from circuitvision.data.pairs import Pairs, Tally
from circuitvision.errors import InputError
from circuitvision.progress import Progress, verbosity_level

CLEAN, CORRUPT = "clean wrong", "corrupt wrong"
NO_TOKEN, LAYOUT = "answer or foil is not one token", "token counts differ"


def answered(pairs: Pairs, model: Any, metric: Any = None, size: int | None = None) -> Pairs:
    """See :meth:`Pairs.answered`."""
    if pairs.answers is None and metric is None:
        raise InputError("These pairs hold no answers: give answers= (and foils=) when they are made, or a metric.")
    dropped: dict[str, list[int]] = {}
    usable = [row for row in range(len(pairs)) if _readable(pairs, row, model)]
    _note(dropped, NO_TOKEN, [pairs.numbers[row] for row in range(len(pairs)) if row not in set(usable)])
    kept: list[int] = []
    given: dict[str, dict[str, int]] = {}
    if usable:
        kept, given = _told_apart(pairs[usable], model, metric, size, dropped)
    found = pairs[[row for row, number in enumerate(pairs.numbers) if number in set(kept)]]
    tally = Tally(len(pairs), {reason: tuple(numbers) for reason, numbers in dropped.items() if numbers}, given)
    if verbosity_level() != "quiet":
        print(tally)
    return found._with(tally=tally)


def _note(dropped: dict[str, list[int]], reason: str, numbers: Sequence[int]) -> None:
    dropped.setdefault(reason, []).extend(numbers)


def _readable(pairs: Pairs, row: int, model: Any) -> bool:
    """Whether answer and foil have ids in this model."""
    for held in (pairs.answers, pairs.foils):
        if held is not None and held[row] is None:
            return False
        if held is not None:
            try:
                answer_ids(held[row], model, pairs.combine)
            except InputError:
                return False
    return True


def _told_apart(
    pairs: Pairs, model: Any, metric: Any, size: int | None, dropped: dict[str, list[int]]
) -> tuple[list[int], dict[str, dict[str, int]]]:
    """The numbers of the pairs that are kept, and what the model gave on the others, by reason."""
    kept: list[int] = []
    instead: dict[str, Counter[int]] = {CLEAN: Counter(), CORRUPT: Counter()}
    aligns = pairs.maps is None
    with torch.no_grad(), Progress(len(pairs), "answered", shown=len(pairs) > 1) as bar:
        for batch in pair_batches(pairs, model, size, None, 0):
            assert batch.other is not None
            (clean, corrupt), tops = _right(model, batch, metric)
            fitting = fits(model.tokens(batch.inputs), model.tokens(batch.other)) if aligns else [True] * len(batch)
            for row, number in enumerate(batch.examples):
                reason = (
                    LAYOUT
                    if row >= len(fitting) or not fitting[row]
                    else CLEAN
                    if not clean[row]
                    else CORRUPT
                    if not corrupt[row]
                    else None
                )
                if reason is None:
                    kept.append(number)
                else:
                    _note(dropped, reason, [number])
                    if tops is not None and reason in instead:
                        instead[reason][tops[reason == CORRUPT][row]] += 1
            bar.advance(len(batch))
    return kept, {
        reason: {_word(model, top): count for top, count in tops.most_common()}
        for reason, tops in instead.items()
        if tops
    }


def _word(model: Any, column: int) -> str:
    """The class or token of a column of the output."""
    if model.tokenizer is not None and not model.is_dual:
        return str(model.tokenizer.convert_ids_to_tokens(column))
    return str((getattr(model.config, "id2label", None) or {}).get(column, column))


def _right(
    model: Any, batch: Batch, metric: Any
) -> tuple[tuple[list[bool], list[bool]], tuple[list[int], list[int]] | None]:
    """Whether each clean run gives its answer, and each corrupt run its foil (without foils: something else than the answer); and what each gave,
    without a metric."""
    outs = [model(batch.inputs), model(batch.other)]
    numbers = isinstance((batch.answers or [None])[0], float)
    if metric is None and numbers:
        raise InputError(
            "The answers are numbers, so a metric must say what is compared with them: metric=cv.metrics.action_dim(…)."
        )
    if metric is not None:
        clean, corrupt = (
            _score(metric, model, batch, out, made) for out, made in zip(outs, (batch.inputs, batch.other), strict=True)
        )
        if not numbers:
            return ((clean > 0).tolist(), (corrupt < 0).tolist()), None
        answers, foils = torch.tensor(batch.answers), torch.tensor(batch.foils)
        nearer = [(score - answers).abs() < (score - foils).abs() for score in (clean, corrupt)]
        return (nearer[0].tolist(), (~nearer[1]).tolist()), None
    clean, corrupt = (_given(out, made) for out, made in zip(outs, (batch.inputs, batch.other), strict=True))
    assert batch.answers is not None
    tops = (clean.tolist(), corrupt.tolist())
    first = [top in _set(answer) for top, answer in zip(tops[0], batch.answers, strict=True)]
    if batch.foils is None:
        second = [top not in _set(answer) for top, answer in zip(tops[1], batch.answers, strict=True)]
    else:
        second = [top in _set(foil) for top, foil in zip(tops[1], batch.foils, strict=True)]
    return (first, second), tops


def _set(answer: Any) -> set[int]:
    return set(answer) if isinstance(answer, list) else {answer}


def _given(logits: Tensor, inputs: Any) -> Tensor:
    from circuitvision import metrics

    return metrics.at_position(logits, "last", inputs).argmax(-1)


def _score(metric: Any, model: Any, batch: Batch, logits: Tensor, inputs: Any) -> Tensor:
    from circuitvision import metrics

    if metric == "logit_diff":
        if batch.answers is None or batch.foils is None:
            raise InputError("logit_diff compares answers with foils: give both when the pairs are made.")
        metric = metrics.logit_diff(batch.answers, batch.foils)
    bound: Callable[..., Any] = metrics.bind(metric, model)
    return metrics.evaluate(bound, logits, inputs).detach().cpu()
