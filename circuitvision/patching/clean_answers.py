"""Whether the clean run gives the answer that an experiment is about.

Effects are shares of an answer, which must be there to be taken away or brought back. Where a data set says what is right and the metric tells by
its sign whether it is given (``logit_diff``, ``margin``: above 0), the clean runs of the first batch are looked at before anything is edited. If the
model gets most of them wrong the request is refused; single ones are counted, and named in a warning at the end.

Not covered: metrics without such a sign (probabilities, ranks, divergences), and answers that a metric was given by hand, which may be any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import metrics
from circuitvision.data.checks import check_answers
from circuitvision.errors import InputError, warn
from circuitvision.metric_set import MetricSet

_SIGNED = (metrics.LogitDiff, metrics.Margin)


@dataclass
class CleanAnswers:
    """Counts in how many clean runs the answer is not given. ``which`` is the metric that tells, None where none does or it does not matter."""

    which: int | None
    wrong: list[Any] = field(default_factory=list)
    seen: int = 0

    @classmethod
    def of(cls, given: MetricSet, allow_wrong: bool) -> CleanAnswers:
        """For the metrics as they were given, before they are bound."""
        telling = [
            number
            for number, one in enumerate(given.members.values())
            if isinstance(one, _SIGNED) and all(getattr(one, name) is None for name in one._answers)
        ]
        return cls(telling[0] if telling and not allow_wrong else None)

    def look(self, clean: Float[Tensor, "metric example"], examples: Sequence[Any], first: bool) -> None:
        """Count one batch.

        Raises:
            InputError: the model gets most of the ``first`` batch wrong.
        """
        if self.which is None:
            return
        wrong = [label for label, value in zip(examples, clean[self.which].tolist(), strict=True) if value <= 0]
        self.seen += len(examples)
        self.wrong += wrong
        if first and 2 * len(wrong) > len(examples):
            raise InputError(
                f"The clean run does not give the answer in {len(wrong)} of the first {len(examples)} examples (the first is example {wrong[0]}), so "
                "there is no answer to follow: take those that the model tells apart, pairs.answered(model), or say allow_wrong=True."
            )

    def warn(self) -> None:
        """Say in how many of all examples it was not given."""
        if self.wrong:
            warn(
                f"The clean run does not give the answer in {len(self.wrong)} of {self.seen} examples (the first is example {self.wrong[0]}): "
                "pairs.answered(model) leaves them out."
            )


def check_data(
    model: Any, data: Any, given: MetricSet, allow_wrong: bool, size: int | None = None, base: Any = (), run: Any = None
) -> None:
    """Check the clean side of a data set for a method that runs it alone: the answers of all examples, and the clean runs of the first batch,
    under the edits of a base and by the run function (see ``model.sweep``) where there are such.

    Inputs in memory are left alone.

    Raises:
        InputError: as :func:`circuitvision.data.checks.check_answers` and :meth:`CleanAnswers.look`; a metric that gives no number per example.
    """
    if not hasattr(data, "batches"):
        return
    side = getattr(data, "clean", data)
    check_answers(side, model)
    chunk = first_chunk(model, data, given, size, base, run)
    with torch.no_grad():
        values = None
        if not chunk.metrics.compares:
            output = model.run(chunk.inputs, chunk.base) if run is None else run(model, chunk.inputs, list(chunk.base))
            values = chunk.metrics(output, chunk.inputs)
    if values is not None:
        examples = [side.numbers[row] for row in chunk.examples]
        CleanAnswers.of(given, allow_wrong).look(values, examples, first=True)


def first_chunk(model: Any, data: Any, given: MetricSet, size: int | None, base: Any, run: Any) -> Any:
    """The first batch of a data set as a sweep would run it: inputs, metrics bound to its answers, and the edits of the base for its examples."""
    from circuitvision.incremental.sweeps.stream import DataStudy
    from circuitvision.incremental.sweeps.study import Options

    study = DataStudy(model, data, [()], given, None, Options(run=run), size, base=base)
    return next(iter(study._chunks()))()
