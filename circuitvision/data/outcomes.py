"""What becomes of a model's answers when the pictures are edited: true understanding, ignorance, stubbornness, indecision.

An edit that removes or changes the object that is asked about changes the right answer; an edit of something else does not. Of each question there
are the
answer before and after (BEAF, Ye-Bin et al. 2024, arXiv 2407.13442):

* the asked object is touched. ``TU``: right before and after. ``SB``: the same answer both times. ``IG``: wrong both times, with two answers.
``half``: right
  once, with two answers; where questions are answered by yes or no there is none;
* it is not. ``ID``: another answer; ``same``: none other.

Each question has one outcome of its kind, so the shares of a kind sum to 1 for every type of question. A model that ignores pictures has ``SB`` 1 and
``ID`` 0, one that sees has ``TU`` 1 and ``ID`` 0, and one that guesses is told from both by ``ID``.

Whether the object is touched is read from the pairs: the answer (right before) is the foil (right after) where it is not.

Of a head whose columns are each a yes or no (several labels, captions of SigLIP) the answer is the column that is highest.

Not covered: free text (give what was said to :func:`outcomes_of`), answers of several tokens in sequence, all labels above a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from circuitvision.data.batches import answer_ids
from circuitvision.data.pairs import Pairs
from circuitvision.errors import InputError
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import wilson

if TYPE_CHECKING:
    import pandas as pd

TOUCHED = ("TU", "SB", "IG", "half")
"""Outcomes where the asked object is touched."""
UNTOUCHED = ("ID", "same")
"""Outcomes where it is not."""


@dataclass(frozen=True, eq=False)
class EditOutcomes(Result):
    """The outcome of every edited pair: ``values`` ``[outcome example]`` are 1 for its own, 0 for the others of its kind, NaN for those of the other
    kind, so that a mean is a share.

    ``before`` and ``after`` are the answers given, ``types`` the type of every question, ``touched`` whether the asked object is.
    """

    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    touched: list[bool] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"before": 0, "after": 0, "types": 0, "touched": 0}

    def shares(self, level: float = 0.95) -> pd.DataFrame:
        """One row per type of question, kind and outcome: its share with Wilson's interval, of how many questions."""
        import pandas as pd

        rows = []
        for name in dict.fromkeys(self.types):
            for kind, words in ((True, TOUCHED), (False, UNTOUCHED)):
                own = [
                    n for n, (t, k) in enumerate(zip(self.types, self.touched, strict=True)) if (t, k) == (name, kind)
                ]
                if not own:
                    continue
                for word in words:
                    share = self.values[self.index_of("outcome", word), own].mean()
                    low, high = wilson(share, len(own), level).tolist()
                    rows.append([name, kind, word, float(share), low, high, len(own)])
        return pd.DataFrame(rows, columns=["type", "touched", "outcome", "share", "low", "high", "questions"])

    def highlights(self) -> dict[str, str]:
        """The share of every outcome over all types."""
        means = zip(self.axes["outcome"], self.mean().tolist(), strict=True)
        return {word: f"{share:.0%}" for word, share in means if share == share}


def outcomes_of(
    before: Sequence[Any],
    after: Sequence[Any],
    answers: Sequence[Any],
    foils: Sequence[Any],
    *,
    types: Sequence[str] | str = "all",
    touched: Sequence[bool] | None = None,
    examples: Sequence[int] | None = None,
) -> EditOutcomes:
    """The outcomes of answers that were given before and after an edit.

    Args:
        before, after: what was answered.
        answers, foils: what is right before and after; a set, list or tuple where several are.
        types: the type of every question, or one word for all.
        touched: whether the edit touches the asked object; None: where ``answers`` and ``foils`` differ.
        examples: numbers of the questions.

    Raises:
        InputError: columns of different lengths, no question, a touched question whose right answer stays the same.
    """
    count = len(before)
    types = [types] * count if isinstance(types, str) else [str(one) for one in types]
    columns = {
        "after": after,
        "answers": answers,
        "foils": foils,
        "types": types,
        "touched": touched,
        "examples": examples,
    }
    for name, held in columns.items():
        if held is not None and len(held) != count:
            raise InputError(f"There are {len(held)} {name} for {count} answers; give one for each.")
    if not count:
        raise InputError("There is no answer to judge.")
    right = [_set(one) for one in answers], [_set(one) for one in foils]
    kinds = [one != other for one, other in zip(*right, strict=True)] if touched is None else list(map(bool, touched))
    numbers = list(range(count)) if examples is None else list(examples)
    values = torch.full((len(TOUCHED) + len(UNTOUCHED), count), torch.nan, dtype=torch.float64)
    for n, kind in enumerate(kinds):
        if kind and right[0][n] & right[1][n]:
            raise InputError(
                f"The asked object of example {numbers[n]} is said to be touched, and {answers[n]!r} stays right: give what is right after "
                f"the edit as foil."
            )
        if kind:
            values[: len(TOUCHED), n] = 0.0
            hits = (before[n] in right[0][n]) + (after[n] in right[1][n])
            word = "SB" if before[n] == after[n] else ("IG", "half", "TU")[hits]
            values[TOUCHED.index(word), n] = 1.0
        else:
            values[len(TOUCHED) :, n] = 0.0
            values[len(TOUCHED) + int(before[n] == after[n]), n] = 1.0
    return EditOutcomes(
        values=values,
        axes={"outcome": [*TOUCHED, *UNTOUCHED], "example": numbers},
        provenance={"method": "outcomes_of"},
        before=[str(one) for one in before],
        after=[str(one) for one in after],
        types=types,
        touched=kinds,
    )


@with_provenance
def edit_outcomes(
    model: Any,
    pairs: Pairs,
    *,
    choices: Sequence[Any] | None = None,
    types: Sequence[str] | str = "all",
    touched: Sequence[bool] | None = None,
    size: int | None = None,
) -> EditOutcomes:
    """Ask a model about both pictures of every pair and say what became of its answers.

    Args:
        model: the hooked model.
        pairs: pictures before and after an edit, with the right answers as ``answers`` and ``foils``.
        choices: the answers to choose from, words or ids; None: whatever scores highest at the last position.
        types, touched: see :func:`outcomes_of`.
        size: how many pairs run at once; None: by memory.

    Raises:
        InputError: pairs without answers or foils, an answer that is not one token or not among the choices, a model without classes or tokens.
    """
    if pairs.answers is None or pairs.foils is None:
        raise InputError(
            "Outcomes need what is right before and after: give answers= and foils= when the pairs are made."
        )
    check_link(model, "outcomes")
    ids = None if choices is None else choice_ids(model, choices)
    before: list[int] = []
    after: list[int] = []
    answers: list[Any] = []
    foils: list[Any] = []
    with torch.no_grad(), Progress(len(pairs), "edit_outcomes", shown=len(pairs) > 1) as bar:
        for batch in pairs.batches(model, size, align=None):
            for found, inputs in ((before, batch.inputs), (after, batch.other)):
                found += given_of(model(inputs), inputs, ids)
            answers += batch.answers or []
            foils += batch.foils or []
            bar.advance(len(batch))
    if ids is not None:
        unknown = next((one for one in [*answers, *foils] if not _set(one) & set(ids)), None)
        if unknown is not None:
            raise InputError(
                f"The right answer {_words(model, [unknown])[0]!r} is not among the choices {list(choices or ())}."
            )
    made = outcomes_of(before, after, answers, foils, types=types, touched=touched, examples=pairs.numbers)
    words = {"before": _words(model, before), "after": _words(model, after)}
    return EditOutcomes(
        values=made.values,
        axes=made.axes,
        provenance=describe(model, method="edit_outcomes"),
        types=made.types,
        touched=made.touched,
        **words,
    )


def check_link(model: Any, what: str) -> None:
    """Raise InputError for an output in which nothing is the answer given: regression, actions, hidden states."""
    if model.link == "none":
        raise InputError(
            f"This model's output is numbers (regression, actions or hidden states) and names no answer, so it has no {what}: put its numbers into "
            "words and give those to outcomes_of."
        )


def choice_ids(model: Any, choices: Sequence[Any]) -> list[int]:
    """The column of the output of every choice.

    Raises:
        InputError: fewer than two choices, the same twice, a word of several tokens.
    """
    found = [answer_ids(one, model, None) for one in choices]
    if len(set(found)) < max(2, len(found)):
        raise InputError(f"choices={list(choices)!r} are not two or more different answers.")
    return found


def given_of(logits: torch.Tensor, inputs: Any, ids: Sequence[int] | None) -> list[int]:
    """What scores highest at the last position of every example, of all columns or of some."""
    from circuitvision import metrics

    scores = metrics.at_position(logits, "last", inputs)
    if scores.shape[-1] == 1:
        raise InputError(
            "This output has one column, which is the highest whatever the model says: compare its numbers."
        )
    return scores.argmax(-1).tolist() if ids is None else [ids[n] for n in scores[:, list(ids)].argmax(-1).tolist()]


def _set(answer: Any) -> set[Any]:
    return set(answer) if isinstance(answer, (list, tuple, set, frozenset)) else {answer}


def _words(model: Any, ids: Sequence[Any]) -> list[str]:
    if model.tokenizer is not None and not model.is_dual:
        return [str(word) for word in model.words([one[0] if isinstance(one, list) else one for one in ids])]
    labels = getattr(model.config, "id2label", None) or {}
    return [str(labels.get(one, one)) for one in ids]
