"""Metrics of an answer: how much the output prefers it, and whether it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuitvision.answers import Answer, contrast, ids_of_rows, pick, short
from circuitvision.errors import InputError
from circuitvision.links import check_ranked, log_probabilities, probabilities
from circuitvision.metrics.base import Metric
from circuitvision.metrics.position import Position


@dataclass(frozen=True, eq=False)
class LogitDiff(Metric):
    """See :func:`logit_diff`."""

    answer: Answer | None = None
    foil: Answer | None = None

    units = "logit"
    function = "logit_diff"
    _answers = ("answer", "foil")

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """``logits[answer] - logits[foil]`` at the position, per example; of joint tokens log-probabilities."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        foil = ids_of_rows(self.foil, rows)
        rows = log_probabilities(rows, self._link(logits)) if self.combine == "joint" else rows
        return pick(rows, answer, self.combine) - pick(rows, foil, self.combine)


@dataclass(frozen=True, eq=False)
class Prob(Metric):
    """See :func:`prob`."""

    answer: Answer | None = None

    units = "prob"
    function = "prob"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The probability of the answer at the position, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        if answer.shape[1] > 1:
            return pick(log_probabilities(rows, self._link(logits)), answer, self.combine).exp()
        return pick(probabilities(rows, self._link(logits)), answer, self.combine)


@dataclass(frozen=True, eq=False)
class LogProb(Metric):
    """See :func:`logprob`."""

    answer: Answer | None = None

    units = "nat"
    function = "logprob"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The log-probability of the answer at the position, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        return pick(log_probabilities(rows, self._link(logits)), answer, self.combine)


@dataclass(frozen=True, eq=False)
class Rank(Metric):
    """See :func:`rank`."""

    answer: Answer | None = None

    units = "rank"
    function = "rank"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """1 plus how many classes score strictly higher than the answer, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        check_ranked(self._link(logits), rows.shape[-1], "rank")
        if self.combine == "joint" and answer.shape[1] > 1:
            raise InputError(
                "The joint value of several tokens has no rank among single classes: combine='first' or 'mean'."
            )
        score = pick(rows, answer, self.combine)
        return 1.0 + (_without(rows, answer) > score[:, None]).sum(dim=-1).to(rows.dtype)


@dataclass(frozen=True, eq=False)
class Accuracy(Metric):
    """See :func:`accuracy`."""

    answer: Answer | None = None

    units = "share"
    function = "accuracy"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """1 where no other class scores as high as the answer (as any of its tokens), else 0, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        check_ranked(self._link(logits), rows.shape[-1], "accuracy")
        best = pick(rows, answer, "best")
        beaten = (_without(rows, answer) >= best[:, None]).any(dim=-1)
        return (~beaten & ~best.isnan()).to(rows.dtype)


@dataclass(frozen=True, eq=False)
class Logit(Metric):
    """See :func:`logit`."""

    answer: Answer | None = None

    units = "logit"
    function = "logit"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The output's own number for the answer at the position, per example."""
        return pick(*self._chosen(logits, self.answer, inputs), self.combine)


@dataclass(frozen=True, eq=False)
class Margin(Metric):
    """See :func:`margin`."""

    answer: Answer | None = None

    units = "logit"
    function = "margin"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """How far the answer is ahead of the best other class, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        check_ranked(self._link(logits), rows.shape[-1], "margin")
        return pick(rows, answer, "best") - _without(rows, answer).max(-1).values


@dataclass(frozen=True, eq=False)
class InterchangeAccuracy(Metric):
    """See :func:`interchange_accuracy`."""

    answer: Answer | None = None
    foil: Answer | None = None
    toward: str = "answer"
    among: str = "all"

    units = "share"
    function = "interchange_accuracy"
    _answers = ("answer", "foil")

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """1 where the output gives the source's answer, else 0, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        check_ranked(self._link(logits), rows.shape[-1], "accuracy")
        foil = ids_of_rows(self.foil, rows)
        wanted, other = (answer, foil) if self.toward == "answer" else (foil, answer)
        best = pick(rows, wanted, "best")
        rival = pick(rows, other, "best") if self.among == "pair" else _without(rows, wanted).max(-1).values
        return (best > rival).to(rows.dtype)


def logit_diff(answer: Any = None, foil: Any = None, position: Position = "last") -> LogitDiff:
    """Logit of the answer minus logit of the foil: positive when the model prefers the answer.

    ``answer`` and ``foil`` are one id or word for the whole batch, or lists with one per example; a tuple is both: ``logit_diff(("red", "blue"))``,
    and a list of tuples one contrast per example. Without them a data set gives both.

    Raises:
        InputError: a tuple that is no contrast; when called: an id outside the output, a word that was not bound, a mask that does not fit.
    """
    answer, foil = contrast(answer, foil)
    labels = (short(answer) or "answer", short(foil) or "foil")
    name = "logit_diff(answer - foil)" if labels == ("per example",) * 2 else f"logit_diff({labels[0]} - {labels[1]})"
    return LogitDiff(position=position, name=name, answer=answer, foil=foil)


def logit(answer: Answer | None = None, position: Position = "last") -> Logit:
    """The output's own number for the answer: a logit, or the value that a regression head gives (``logit(0)`` for a head of one column)."""
    return Logit(position=position, name=f"logit({short(answer) or 'answer'})", answer=answer)


def margin(answer: Answer | None = None, position: Position = "last") -> Margin:
    """``logits[answer] - max(logits of all others)``: positive where the answer is given, and by how much."""
    return Margin(position=position, name=f"margin({short(answer) or 'answer'})", answer=answer)


def interchange_accuracy(
    answer: Any = None, foil: Any = None, position: Position = "last", *, toward: str = "answer", among: str = "all"
) -> InterchangeAccuracy:
    """1 where an intervention makes the model give the answer of the run that values come from, else 0: interchange intervention accuracy.

    Args:
        answer, foil: what is right in the clean and in the corrupt run; without them a data set's.
        position: where the output is read.
        toward: ``"answer"`` where values come from the clean run (``mode="denoise"``), ``"foil"`` where they come from the corrupt one (``"noise"``).
        among: ``"all"`` classes of the output, of which it must be the first (Makelov et al. 2023), or the ``"pair"`` of answer and foil.

    A tie is not given. Source: Geiger et al. 2021 (arXiv 2106.02997).

    Raises:
        InputError: an unknown ``toward`` or ``among``.
    """
    if toward not in ("answer", "foil") or among not in ("all", "pair"):
        raise InputError(
            f"toward={toward!r} is 'answer' or 'foil', and among={among!r} is 'all' classes or the 'pair' of answer and foil."
        )
    answer, foil = contrast(answer, foil)
    return InterchangeAccuracy(
        position=position,
        name=f"interchange_accuracy({toward}, {among})",
        answer=answer,
        foil=foil,
        toward=toward,
        among=among,
    )


def prob(answer: Answer | None = None, position: Position = "last") -> Prob:
    """Probability of the answer, in 0 … 1: among all classes, or of a yes where every class is a question of its own
    (see :mod:`circuitvision.links`).

    Raises:
        InputError: when called: an output that is no distribution.
    """
    return Prob(position=position, name=f"prob({short(answer) or 'answer'})", answer=answer)


def logprob(answer: Answer | None = None, position: Position = "last") -> LogProb:
    """Log-probability of the answer in nats (0 is certain); see :func:`prob`."""
    return LogProb(position=position, name=f"logprob({short(answer) or 'answer'})", answer=answer)


def rank(answer: Answer | None = None, position: Position = "last") -> Rank:
    """Rank of the answer, 1 for the highest logit; equal logits share the better rank."""
    return Rank(position=position, name=f"rank({short(answer) or 'answer'})", answer=answer)


def accuracy(answer: Answer | None = None, position: Position = "last") -> Accuracy:
    """1 where the answer has the highest logit of all classes, else 0; an answer that shares the highest is not given. Its mean is the accuracy."""
    return Accuracy(position=position, name=f"accuracy({short(answer) or 'answer'})", answer=answer)


def _without(rows: Tensor, ids: Tensor) -> Tensor:
    """The output without each row's own answer."""
    own = torch.zeros_like(rows, dtype=torch.int).scatter_add_(1, ids.clamp(min=0), (ids >= 0).int())
    return rows.masked_fill(own > 0, -torch.inf)
