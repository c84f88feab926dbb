"""What a model answers without seeing, and its answers with that taken off: calibration of the language prior.

With ``p(a | I, q)`` the probability of an answer among the choices and ``p_r(a | q)`` that under a reference picture ``r`` that says nothing, the
calibrated score is ``s(a) = log p(a | I, q) − w · mean_r log p_r(a | q)``: at ``w = 1`` the probability of each answer is multiplied by a number of
its own,
one over its prior (an affine map per answer without offset). A model that ignores its picture is left without any preference.

References: a picture of one colour (the mean of the data set, so that nothing of the example's own colours is left), uniform noise, and no picture
at all,
which moves the text (:func:`circuitvision.data.without_images`).

Sources: contextual calibration, Zhao et al. 2021 (arXiv 2102.09690); debiasing of answers by meaningless pictures and by none, Zhang et al. 2024
(arXiv
2403.05262).

Not covered: weights fitted to labels, calibration of every token of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.data.masking import blank_images, generator_of, pictures_of
from circuitvision.data.outcomes import check_link, choice_ids
from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Side
from circuitvision.data.without_images import without_images
from circuitvision.errors import InputError
from circuitvision.links import log_probabilities
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

REFERENCES = ("blank", "noise", "none")


@dataclass(frozen=True, eq=False)
class PriorCalibration(Result):
    """Answers with the language prior taken off: ``values`` ``[choice example]`` are calibrated scores, in nats.

    ``scores`` ``[choice example]`` are log-probabilities among the choices with the picture, ``prior`` ``[reference choice example]`` under each
    reference; ``references`` are their names, ``answers`` the number of the right choice of every example (-1: not among them).
    """

    scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    prior: Tensor = field(default_factory=lambda: torch.zeros(0))
    references: list[str] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    weight: float = 1.0

    _per_example: ClassVar[dict[str, int]] = {"scores": -1, "prior": -1, "answers": 0}

    @property
    def given(self) -> list[Any]:
        """What is answered after calibration, per example; of equal scores the first choice."""
        return [self.axes["choice"][number] for number in self.values.argmax(0).tolist()]

    @with_provenance
    def accuracy(self) -> Result:
        """1 where an answer is right, ``[answer example]``: "with the picture", "calibrated", and "without" of every reference; ``.interval()`` gives
        the bootstrap interval of the shares. NaN where the right answer is not among the choices, or where the highest score is shared.

        Raises:
            InputError: a data set without answers.
        """
        if not self.answers:
            raise InputError(
                "The data set holds no answers, so nothing says what is right: give answers= when it is made."
            )
        rows = self._rows()
        right = torch.stack([_right(scores, torch.tensor(self.answers)) for scores in rows.values()])
        return Result(right, {"answer": list(rows), "example": self.axes["example"]}, self.provenance)

    @property
    def same_as_prior(self) -> float:
        """The share of answers with the picture that the mean prior gives as well."""
        return float((self.prior.mean(0).argmax(0) == self.scores.argmax(0)).double().mean())

    @with_provenance
    def probabilities(self) -> Result:
        """How probable each choice is, ``[answer choice example]``: "with the picture", "calibrated" (of scores the softmax) and "without" of every
        reference."""
        rows = self._rows()
        values = torch.stack([one.softmax(0) for one in rows.values()])
        return Result(values, {"answer": list(rows), **self.axes}, self.provenance)

    def _rows(self) -> dict[str, Tensor]:
        """Scores ``[choice example]`` by what they are of."""
        rows = {"with the picture": self.scores, "calibrated": self.values}
        return rows | {f"without ({name})": own for name, own in zip(self.references, self.prior, strict=True)}

    def highlights(self) -> dict[str, str]:
        """How strong the prior is, and what calibration does to the answers."""
        found = {"answers that the prior gives as well": f"{self.same_as_prior:.0%}"}
        if self.answers:
            means = self.accuracy()
            found |= {
                f"right {name}": f"{value:.0%}"
                for name, value in zip(means.axes["answer"], means.mean().tolist(), strict=True)
            }
        return found


@with_provenance
def calibrate_prior(
    model: Any,
    side: Side | Pairs,
    choices: Sequence[Any],
    *,
    references: Sequence[str] | Mapping[str, Side] = ("blank", "noise"),
    weight: float = 1.0,
    size: int | None = None,
    seed: int = 0,
) -> PriorCalibration:
    """Scores of answers less what they are under pictures that say nothing; see the module for the equation.

    Args:
        model: the hooked model.
        side: pictures and questions; of pairs the clean side.
        choices: the answers to choose from: words of one token, ids or classes.
        references: "blank", "noise" and "none", or sides of your own by name, of the same examples.
        weight: how much of the prior is taken off; 0 leaves the scores.
        size: how many examples run at once; None: by memory.
        seed: of the noise.

    Raises:
        InputError: a model without classes or tokens, fewer than two choices, no such reference, a model that needs a picture ("none"),
            references of other examples.
    """
    data = side.clean if isinstance(side, Pairs) else side
    check_link(model, "prior")
    ids = choice_ids(model, choices)
    beside = _references(model, data, references, seed)
    scores: dict[str, Tensor] = {}
    with Progress(len(data) * (1 + len(beside)), "calibrate_prior", shown=len(data) > 1) as bar:
        for name, own in {"": data, **beside}.items():
            scores[name] = _log_probs(model, own, ids, size, bar)
    prior = torch.stack([scores[name] for name in beside])
    return PriorCalibration(
        values=scores[""] - weight * prior.mean(0),
        axes={"choice": [str(one) for one in choices], "example": list(data.numbers)},
        provenance=describe(model, method="calibrate_prior", seed=seed),
        scores=scores[""],
        prior=prior,
        references=list(beside),
        answers=_answers(model, data, ids),
        weight=float(weight),
    )


def _references(model: Any, side: Side, references: Sequence[str] | Mapping[str, Side], seed: int) -> dict[str, Side]:
    if isinstance(references, Mapping):
        found = dict(references)
        wrong = next((name for name, own in found.items() if len(own) != len(side)), None)
        if wrong is not None:
            raise InputError(f"The reference {wrong!r} has {len(found[wrong])} examples for {len(side)}.")
    else:
        listed = [references] if isinstance(references, str) else list(references)
        unknown = next((name for name in listed if name not in REFERENCES), None)
        if unknown is not None:
            raise InputError(
                f"references={unknown!r} is not understood: {', '.join(map(repr, REFERENCES))}, or sides by name."
            )
        found = {}
        for name in listed:
            if name == "none":
                found[name] = without_images(side, model).corrupt
            else:
                found[name] = blank_images(side, "dataset" if name == "blank" else _static(side, seed), image=0).corrupt
    if not found:
        raise InputError("Give at least one reference: the prior is what is answered without seeing.")
    return found


def _static(side: Side, seed: int) -> list[np.ndarray]:
    """Uniform noise in the size of every picture, drawn by what the example is."""
    return [
        generator_of(seed, example.digest).integers(
            0, 256, (one.height, one.width, 1 if one.mode == "L" else 3), np.uint8
        )
        for example, one in zip(side.examples, pictures_of(side), strict=True)
    ]


def _log_probs(
    model: Any, side: Side, ids: Sequence[int], size: int | None, bar: Progress
) -> Float[Tensor, "choice example"]:
    from circuitvision import metrics

    found = []
    with torch.no_grad():
        for batch in side.batches(model, size):
            scores = metrics.at_position(model(batch.inputs), "last", batch.inputs)[:, list(ids)]
            # Of columns that are each a yes or no, what each is among the choices.
            own = log_probabilities(scores.double(), model.link) if model.link == "sigmoid" else scores.double()
            found.append(own.log_softmax(-1).cpu())
            bar.advance(len(batch))
    return torch.cat(found).T.contiguous()


def _answers(model: Any, side: Side, ids: Sequence[int]) -> list[int]:
    from circuitvision.data.batches import answer_ids

    if side.answers is None:
        return []
    found = [answer_ids(one, model, side.combine) for one in side.answers]
    return [ids.index(one) if one in ids else -1 for one in found]


def _right(scores: Float[Tensor, "choice example"], answers: Tensor) -> Float[Tensor, " example"]:
    top = scores.max(0).values
    known = (answers >= 0) & ((scores >= top - 1e-9).sum(0) == 1)
    return torch.where(known, (scores.argmax(0) == answers).double(), torch.nan)
