"""The base of the metrics: which position is read, how answers become ids, and what a method tells a metric before it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from jaxtyping import Float
from torch import Tensor

from circuitvision.answers import Answer, answer_ids, ids_of_rows, plain_answer, take
from circuitvision.errors import InputError
from circuitvision.links import Link, link_of
from circuitvision.metrics.position import Position, at_position, position_of

MetricType = TypeVar("MetricType", bound="Metric")


@dataclass(frozen=True, eq=False)
class Metric:
    """Base of the metrics: which position of the output is read, and how answers become ids."""

    position: Position = "last"
    name: str = ""
    combine: str = ""
    """How several tokens of an answer become one number: the ``"mean"`` over them, or their ``"joint"`` value, the sum of their log-probabilities, as
    data sets and :mod:`circuitvision.model.columns` say it."""
    link: Link | None = None
    """What turns the output into probabilities; None: what the output itself says (outputs of a wrapped model do), or else a softmax."""
    tokens: Any = field(default=None, repr=False, kw_only=True)
    """A function from inputs to token maps, of a metric that was bound to a model and needs them."""

    units: ClassVar[str] = ""
    function: ClassVar[str] = ""
    """The function of :mod:`circuitvision.metrics` that makes it."""
    _answers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for own in self._answers:
            object.__setattr__(self, own, plain_answer(getattr(self, own)))
        position = position_of(self.position)
        if position.kind not in ("ints", "last"):
            object.__setattr__(self, "position", position)

    def __provenance__(self) -> dict[str, Any]:
        fields = {entry.name: getattr(self, entry.name) for entry in own_fields(self)}
        return {"metric": type(self).__name__, **fields}

    def bind(
        self: MetricType, model: Any, answers: Any = None, foils: Any = None, combine: str | None = None
    ) -> MetricType:
        """The same metric with every word replaced by its id in ``model``, and the link of the model's head.

        A metric without an answer takes the ``answers`` and ``foils`` of a data set, one per example, or several that ``combine`` makes one of.

        Raises:
            InputError: a word that is not one piece of the vocabulary, a model whose answers have no words, no answer at all.
        """
        changes: dict[str, Any] = {}
        for name, there in (("answer", answers), ("foil", foils)):
            if name not in self._answers:
                continue
            own = getattr(self, name)
            found = plain_answer(there) if own is None else own
            if own is None and combine in ("mean", "joint"):
                changes["combine"] = combine
            if found is None:
                raise InputError(
                    f"{type(self).__name__} has no {name}, and no data set that has one: "
                    f"give it, as in metrics.{self.function}({', '.join(self._answers)})."
                )
            changes[name] = answer_ids(found, model)
        changes |= {"tokens": model.tokens} if position_of(self.position).is_named else {}
        return dataclasses.replace(self, link=self.link or getattr(model, "link", None), **changes)

    def of_marked(self: MetricType) -> MetricType:
        """The same metric, which takes from each output itself what its numbers are (see :mod:`circuitvision.links`), not from the model's head."""
        return dataclasses.replace(self, link=None)

    def against(self: MetricType, output: Tensor) -> MetricType:
        """The same metric; one that compares with another run, and was given none, compares with this output."""
        return self

    def take(self: MetricType, examples: Sequence[int], count: int) -> MetricType:
        """The same metric for some of ``count`` examples: its answers and positions per example are those examples'."""
        changes: dict[str, Any] = {name: take(getattr(self, name), examples, count) for name in self._answers}
        position = self.position
        own = position.taken(examples, count) if hasattr(position, "taken") else take(position, examples, count)
        return dataclasses.replace(self, position=own, **changes)

    def __call__(
        self, logits: Float[Tensor, "batch *pos classes"], inputs: Mapping[str, Any] | None = None
    ) -> Float[Tensor, " batch"]:
        raise NotImplementedError

    def _link(self, logits: Tensor) -> Link:
        return self.link or link_of(logits)

    def _chosen(self, logits: Tensor, answer: Answer | None, inputs: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
        """The output at the position read, ``[batch, classes]``, and every example's answer id, ``[batch]``."""
        rows = at_position(logits, self.position, inputs, self.tokens)
        return rows, ids_of_rows(answer, rows)


def own_fields(metric: Metric) -> list[dataclasses.Field[Any]]:
    """The fields of a metric but for those that a model gives it."""
    return [entry for entry in dataclasses.fields(metric) if entry.name not in ("tokens", "bins", "scale")]
