"""Metrics of a model's output: one number per example.

A metric is a callable ``metric(logits, inputs=None) -> [batch]``. It reads the family's natural output: ``[batch,
classes]`` of a classifier, ``[image, text]`` of a dual encoder, ``[batch, pos, vocab]`` of a vision-language model,
``[batch, chunk, action_dim]`` of an action model. Where the output has positions, ``position="last"`` means the last
*unmasked* one, taken from the attention mask in ``inputs``; padding on either side is therefore harmless, as long as
``inputs`` is passed. Any spelling of :mod:`circuitvision.model.positions` that names one position of an example will do; what is named by what is
there (kinds, regions, functions) needs ``metric.bind(model)``, as words do. An example without the position has no value.

Answers are ids (tokens, classes, or the column of a caption) or words of one piece, in the grammar of :mod:`circuitvision.answers`. Words need a
vocabulary: ``metric.bind(model)`` returns the same metric with ids; every function of the library that takes a model and a metric binds it itself.
A metric may be given by its name (``"logit_diff"``), and without an answer where a data set has one for each example; ``kl`` without a reference is
the divergence from the run that a method compares with. Several metrics of one run are a mapping, see :mod:`circuitvision.metric_set`.

Differences and probabilities are computed in float32 at least: subtracting two bfloat16 logits loses the answer's
last digits. Not covered: answers of several tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.answers import Answer, answer_ids, contrast, ids_of_rows, pick, plain_answer, short, take
from circuitvision.digests import NamedFunction, of_tensor
from circuitvision.errors import InputError
from circuitvision.links import Link, divergence, link_of, log_probabilities, probabilities
from circuitvision.storage import as_builtin, stored_as

Position = Any
"""Any spelling of :mod:`circuitvision.model.positions`."""
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
    _answers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for own in self._answers:
            object.__setattr__(self, own, plain_answer(getattr(self, own)))
        position = _positions(self.position)
        if position.kind not in ("ints", "last"):
            object.__setattr__(self, "position", position)

    def __provenance__(self) -> dict[str, Any]:
        fields = {entry.name: getattr(self, entry.name) for entry in _own_fields(self)}
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
                    f"{type(self).__name__} has no {name}, and no data set that has one: give it, as in metrics.{_made_by(self)}."
                )
            changes[name] = answer_ids(found, model)
        changes |= {"tokens": model.tokens} if _positions(self.position).is_named else {}
        return dataclasses.replace(self, link=self.link or getattr(model, "link", None), **changes)

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


@dataclass(frozen=True, eq=False)
class LogitDiff(Metric):
    """See :func:`logit_diff`."""

    answer: Answer | None = None
    foil: Answer | None = None

    units = "logit"
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
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """1 plus how many classes score strictly higher than the answer, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
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
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """1 where no other class scores as high as the answer (as any of its tokens), else 0, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        best = pick(rows, answer, "best")
        beaten = (_without(rows, answer) >= best[:, None]).any(dim=-1)
        return (~beaten & ~best.isnan()).to(rows.dtype)


@dataclass(frozen=True, eq=False)
class KL(Metric):
    """See :func:`kl`."""

    reference: Tensor | None = None

    units = "nat"

    def against(self, output: Tensor) -> KL:
        """The divergence from this output, where no reference was given."""
        return dataclasses.replace(self, reference=as_output(output).detach()) if self.reference is None else self

    def take(self, examples: Sequence[int], count: int) -> KL:
        """The same metric for some of the examples of its reference."""
        part = super().take(examples, count)
        if self.reference is None or len(self.reference) != count:
            return part
        rows = torch.as_tensor(list(examples), device=self.reference.device)
        return dataclasses.replace(part, reference=self.reference[rows])

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The divergence of the output from the reference at the position, per example."""
        logits = as_output(logits)
        if self.reference is None:
            raise InputError("This kl has no reference yet: give the logits of the run to compare with.")
        if self.reference.shape != logits.shape:
            raise InputError(
                f"The reference of kl has shape {tuple(self.reference.shape)}, not the output's {tuple(logits.shape)}."
            )
        rows = at_position(logits, self.position, inputs, self.tokens)
        reference = at_position(self.reference.to(logits.device), self.position, inputs, self.tokens)
        return divergence(reference, rows, self._link(logits))


@dataclass(frozen=True, eq=False)
class ActionDim(Metric):
    """See :func:`action_dim`."""

    dim: int = 0
    step: int | None = 0
    bins: Mapping[int, float] | None = None
    """Ids that say an action, with their values, where the output is of tokens."""

    units = "action_unit"

    def bind(self, model: Any, answers: Any = None, foils: Any = None, combine: str | None = None) -> ActionDim:
        """The same metric with the tokens by which ``model`` says actions, if it does."""
        return dataclasses.replace(super().bind(model), bins=self.bins or getattr(model, "action_values", None) or None)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """One coordinate of the action, per example."""
        logits = as_output(logits)
        if logits.ndim != 3:
            raise InputError(f"action_dim reads [batch, chunk, action_dim]; the output has {tuple(logits.shape)}.")
        if self.bins:
            return self._said(logits, inputs, self.bins)
        if not -logits.shape[-1] <= self.dim < logits.shape[-1]:
            raise InputError(f"Action dimension {self.dim} is outside the output's {logits.shape[-1]} dimensions.")
        if self.step is not None and not -logits.shape[1] <= self.step < logits.shape[1]:
            raise InputError(f"Step {self.step} is outside the output's chunk of {logits.shape[1]} steps.")
        chosen = _wide(logits[..., self.dim])
        return chosen.mean(dim=1) if self.step is None else chosen[:, self.step]

    def _said(self, logits: Tensor, inputs: Mapping[str, Any] | None, bins: Mapping[int, float]) -> Tensor:
        """The mean action over the bins, where the prompt has come to this dimension: behind as many action tokens."""
        batch, length = logits.shape[:2]
        ids, values = torch.tensor(list(bins)), torch.tensor(list(bins.values()), dtype=torch.float64)
        last = _last_unmasked(inputs, batch, length)
        read = None if inputs is None else inputs.get("input_ids")
        given = torch.zeros(batch, dtype=torch.long)
        if read is not None and tuple(read.shape) == (batch, length):
            spoken = torch.isin(read.cpu(), ids) & (torch.arange(length) <= last[:, None])
            # The action tokens at the end of each prompt, counted from its last position.
            ends = spoken.gather(1, (last[:, None] - torch.arange(length)).clamp_min(0))
            given = ends.int().cumprod(1).sum(1)
        if self.dim < 0 or bool((given < self.dim).any()):
            raise InputError(
                f"Action dimension {self.dim} is said behind {max(self.dim, 0)} action tokens, and the prompts end with {given.tolist()} of them: "
                "give prompts that hold the action so far (what generate returned), with their inputs."
            )
        rows = logits[torch.arange(batch, device=logits.device), (last - given + self.dim).to(logits.device)]
        shares = _wide(rows)[:, ids.to(logits.device)].softmax(-1)
        return shares @ values.to(shares)


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


def kl(reference: Float[Tensor, "batch *pos classes"] | None = None, position: Position = "last") -> KL:
    """KL(reference || output) in nats: 0 when the output equals the reference run's, whose logits are given; summed over yes-or-no classes.

    Without a reference a method takes the run that it compares with: a sweep its unedited run, patching the clean one. The gradient is zero at the
    reference itself, so first-order attribution there says nothing.
    """
    given = None if reference is None else as_output(reference).detach()
    return KL(position=position, name="kl(reference || output)", reference=given)


def action_dim(dim: int, step: int | None = 0) -> ActionDim:
    """One coordinate of an action or velocity in the model's units, at one step of the chunk or (None) its mean.

    Of a model that says actions as tokens: the mean of the bins' normalised values under the softmax over the bins alone, where the prompt has come
    to dimension ``dim``: at its last position if it ends with ``dim`` action tokens. Methods learn from the model which tokens those are.
    """
    return ActionDim(name=f"action_dim({dim}, step={'mean' if step is None else step})", dim=dim, step=step)


def _own_fields(metric: Metric) -> list[dataclasses.Field[Any]]:
    """The fields of a metric but for those that a model gives it."""
    return [entry for entry in dataclasses.fields(metric) if entry.name not in ("tokens", "bins")]


def _write(metric: Metric, tensors: dict[str, Tensor], sources: bool) -> dict[str, Any]:
    from circuitvision.model.edits.files import write_positions

    fields: dict[str, Any] = {}
    for entry in _own_fields(metric):
        value: Any = getattr(metric, entry.name)
        if entry.name == "position" and hasattr(value, "resolve"):
            value = {"positions": write_positions(value, tensors)}
        if isinstance(value, Tensor):
            digest = of_tensor(value)
            tensors[digest] = value
            value = {"tensor": digest}
        fields[entry.name] = value if isinstance(value, Mapping) else as_builtin(value)
    return {"metric": type(metric).__name__, "fields": fields}


def _read(data: Mapping[str, Any], tensors: Mapping[str, Tensor], objects: Mapping[str, Any]) -> Metric:
    from circuitvision.model.edits.files import read_positions

    fields: dict[str, Any] = {}
    for name, value in data["fields"].items():
        if isinstance(value, Mapping):
            value = read_positions(value["positions"], tensors) if "positions" in value else tensors[value["tensor"]]
        fields[name] = value
    return _KINDS[data["metric"]](**fields)


_KINDS: dict[str, type[Metric]] = {
    cls.__name__: cls for cls in (LogitDiff, Prob, LogProb, Rank, Accuracy, KL, ActionDim)
}
NAMES: dict[str, Callable[[], Metric]] = {
    "logit_diff": logit_diff,
    "prob": prob,
    "logprob": logprob,
    "rank": rank,
    "accuracy": accuracy,
    "kl": kl,
}
"""The metrics that a name stands for; answers come from a data set, the reference from the run compared with."""
stored_as("metric", Metric, _write, _read)


def is_own(metric: Any) -> bool:
    """Whether a metric is one of this module, which neither keeps nor writes into what it gets."""
    return type(metric) in _KINDS.values()


def kept(metric: Any) -> Any:
    """A metric as a result keeps it: one of this module as it is, another function by its name."""
    return metric if is_own(metric) or metric is None else NamedFunction.of(metric)


def by_name(metric: Any) -> Any:
    """The metric that a name stands for; anything else as it is. Raises InputError for an unknown name."""
    if not isinstance(metric, str):
        return metric
    if metric not in NAMES:
        if metric == "action_dim":
            raise InputError("Which dimension? Give the metric itself in place of its name: cv.metrics.action_dim(0).")
        raise InputError(f"There is no metric {metric!r}; the names are {', '.join(NAMES)}.")
    return NAMES[metric]()


def bind(metric: Any, model: Any, answers: Any = None, foils: Any = None, combine: str | None = None) -> Any:
    """One metric, or its name, with words resolved by ``model`` and the answers of a data set if it has none; a plain function is returned as it is.

    Raises:
        InputError: several metrics, an unknown name, an answer that is missing or has no id.
    """
    if isinstance(metric, Mapping | list | tuple):
        raise InputError(
            f"Give one metric, not {len(metric)} in a {type(metric).__name__}: measure once for each of them."
        )
    metric = by_name(metric)
    if not callable(metric):
        raise InputError(
            f"A metric is a function of the logits, such as metrics.logit_diff(answer, foil), not {metric!r:.80}."
        )
    if isinstance(metric, Metric):
        return metric.bind(model, answers, foils, combine)
    return metric.bind(model) if hasattr(metric, "bind") else metric


def _made_by(metric: Metric) -> str:
    """How a metric of this module is made."""
    name = next((name for name, make in NAMES.items() if type(make()) is type(metric)), type(metric).__name__)
    return f"{name}({', '.join(metric._answers)})"


def takes_inputs(function: Any) -> bool:
    """Whether a metric wants the run's inputs after the logits: its second positional parameter has no default, or is called ``inputs``.

    ``lambda logits, i=i: logits[:, i]`` keeps its ``i``.
    """
    import inspect

    try:
        called = function.forward if isinstance(function, torch.nn.Module) else function
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        return False
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 and (positional[1].default is positional[1].empty or positional[1].name == "inputs")


def call(metric: Any, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Any:
    """``metric(logits, inputs)`` if it takes the inputs, else ``metric(logits)``."""
    return metric(logits, inputs) if isinstance(metric, Metric) or takes_inputs(metric) else metric(logits)


def evaluate(metric: Any, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Float[Tensor, " batch"]:
    """Call a metric that takes ``(logits, inputs)`` or only ``(logits)``, and check that it gives one number per
    example.

    Truth values and whole numbers become float64 (a mean of truth values is a share); lists and arrays of numbers become tensors.

    Raises:
        InputError: the result is not a vector of real numbers, or not one per example.
    """
    found = call(metric, logits, inputs)
    values = _vector(found)
    if values is None:
        shape = tuple(found.shape) if hasattr(found, "shape") else type(found).__name__
        raise InputError(f"A metric returns one number per example, a tensor [batch]; this one returned {shape}.")
    # Dual encoders compare images with texts: either may be the examples.
    counts = logits.shape[:2] if logits.ndim == 2 else logits.shape[:1]
    if len(values) not in counts:
        raise InputError(
            f"A metric returns one number per example; this one returned {len(values)} for an output of {logits.shape[0]} examples."
        )
    return values if values.is_floating_point() else values.double()


def _vector(found: Any) -> Tensor | None:
    """What a metric returned as real numbers ``[example]``; None for anything else."""
    if isinstance(found, list | tuple) and found and all(isinstance(item, Tensor) and item.ndim == 0 for item in found):
        found = torch.stack(list(found))
    elif isinstance(found, list | tuple | np.ndarray):
        try:
            found = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            return None
    return found if isinstance(found, Tensor) and found.ndim == 1 and not found.is_complex() else None


def as_output(logits: Any) -> Tensor:
    """A model's output as a tensor (an array is one as well); InputError for anything else, such as the inputs, or an output with names."""
    if isinstance(logits, Tensor):
        return logits
    if isinstance(logits, np.ndarray):
        return torch.from_numpy(logits.copy())
    named = isinstance(logits, Mapping) and "logits" in logits
    fix = "take its 'logits'" if named else "call it as metric(model(inputs), inputs)"
    raise InputError(f"A metric reads the output tensor of a run, not a {type(logits).__name__}: {fix}.")


def at_position(
    logits: Float[Tensor, "batch *pos classes"],
    position: Position,
    inputs: Mapping[str, Any] | None = None,
    tokens: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Float[Tensor, "batch classes"]:
    """The output at one position of every example, in float32 at least; outputs without positions are returned whole.

    NaN where an example has none of the positions, with a warning. ``tokens`` (``model.tokens``) is needed for positions named by what is there.

    Positions are those of the prompt, also where the call kept only some of them (``logits_to_keep`` in ``inputs``); what a cache in
    ``past_key_values`` holds counts as its beginning.

    Raises:
        InputError: a position outside the output, several of one example, a mask of another length, an example that is all padding.
    """
    logits = as_output(logits)
    if logits.ndim == 2:
        return _wide(logits)
    if logits.ndim != 3:
        raise InputError(f"A metric reads [batch, classes] or [batch, pos, classes], not {tuple(logits.shape)}.")
    batch, length = logits.shape[:2]
    kept = _kept(inputs, length)
    whole = length if kept is None else _prompt_length(inputs)
    asked, empty = _positions(position), None
    if asked.kind == "last":
        index = _last_unmasked(inputs, batch, whole).to(logits.device)
    elif asked.kind == "ints" and len(asked.ints) == 1:
        index = torch.tensor(asked.ints, device=logits.device).expand(batch)
        _refuse_unknown_past(inputs, index)
    else:
        index, empty = (part.to(logits.device) for part in _one_each(asked, batch, whole, inputs, tokens))
    if bool(((index < -whole) | (index >= whole)).any()):
        raise InputError(f"Position {index.tolist()} is outside the output's {whole} positions.")
    if kept is not None:
        there = kept.to(logits.device) == index.remainder(whole)[:, None]
        if not bool(there.any(1).all()):
            raise InputError(
                f"The metric reads position {index.tolist()}, and logits_to_keep left positions {kept.tolist()}: keep the one that is read."
            )
        index = there.int().argmax(1)
    rows = _wide(logits[torch.arange(batch, device=logits.device), index])
    return rows if empty is None or not bool(empty.any()) else rows.masked_fill(empty[:, None], float("nan"))


def _positions(position: Position) -> Any:
    """A position as a value. The core reads metrics, and positions are the core's: each meets the other when it is used."""
    from circuitvision.model.positions import Positions

    return Positions.of(position)


def _one_each(
    asked: Any, batch: int, whole: int, inputs: Mapping[str, Any] | None, tokens: Any
) -> tuple[Tensor, Tensor]:
    """The one position of every example, and which examples have none."""
    from circuitvision.model.positions import warn_of_empty
    from circuitvision.model.regions import At

    if asked.kind == "mask" and asked.mask is not None:
        mask = asked.mask.tensor.cpu()
        if mask.shape[-1] != whole or (mask.ndim == 2 and len(mask) not in (1, batch)):
            raise InputError(f"A mask of positions is [{batch} {whole}] for this output, not {list(mask.shape)}.")
        mask = mask.expand(batch, whole)
    elif isinstance(asked.region, At):
        numbers = asked.region.numbers
        if asked.examples is not None:
            numbers = tuple(numbers[example] for example in asked.examples)
        if len(numbers) != batch:
            raise InputError(f"There are positions of {len(numbers)} examples, and the output has {batch}.")
        own = torch.tensor([0 if n is None else n for n in numbers])
        _refuse_unknown_past(inputs, own)
        empty = torch.tensor([n is None for n in numbers])
        warn_of_empty({asked.text: int(empty.sum())}, batch)
        return own, empty
    elif asked.is_named:
        if tokens is None or inputs is None:
            raise InputError(
                f"The metric reads position {asked.text!r}, which a token map tells: call metric.bind(model) first, and give the inputs."
            )
        fits = [m for m in tokens(inputs).values() if (m.n_rows, m.n_positions) == (batch, whole)]
        if not fits:
            raise InputError(f"The output's {batch} rows of {whole} positions are those of no tower; give a number.")
        mask = asked.resolve(fits[-1])
    else:
        mask = torch.zeros(batch, whole, dtype=torch.bool)
        for number in range(whole)[slice(*asked.bounds)] if asked.kind == "slice" else asked.ints:
            if not -whole <= number < whole:
                raise InputError(f"Position {number} is outside the output's {whole} positions.")
            mask[:, number] = True
        _refuse_unknown_past(inputs, mask.int().argmax(1))
    counts = mask.sum(1)
    if bool((counts > 1).any()):
        raise InputError(
            f"A metric reads one position of every example, and {asked.text!r} names {int(counts.max())}; a position of its own for each example is "
            "cv.regions.at(numbers)."
        )
    warn_of_empty({asked.text: int((counts == 0).sum())}, batch)
    return mask.int().argmax(1), counts == 0


def _read_length(inputs: Mapping[str, Any] | None) -> int:
    """How many positions the call itself gave the model; 0 where the inputs do not say."""
    given = {} if inputs is None else inputs
    found = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    return 0 if found is None else int(found.shape[1])


def _prompt_length(inputs: Mapping[str, Any] | None) -> int:
    """How many positions the prompt has, those in a cache included; 0 where the inputs do not say."""
    read = _read_length(inputs)
    mask = None if inputs is None or inputs.get("past_key_values") is None else inputs.get("attention_mask")
    return read if mask is None or mask.ndim != 2 else max(read, int(mask.shape[1]))


def _refuse_unknown_past(inputs: Mapping[str, Any] | None, index: Tensor) -> None:
    """Raise InputError for positions counted from the first one, where nothing says how many a cache held before the run made it longer."""
    if inputs is None or inputs.get("past_key_values") is None or inputs.get("attention_mask") is not None:
        return
    if bool((index >= 0).any()):
        raise InputError(
            "Positions count from the first one that past_key_values holds, whose number these inputs do not say: give attention_mask for the "
            "cache and the new positions, or count from the end (-1 is the last)."
        )


def _kept(inputs: Mapping[str, Any] | None, length: int) -> Tensor | None:
    """The positions of the prompt that an output of ``length`` positions holds, where it holds some of them only."""
    keep = None if inputs is None else inputs.get("logits_to_keep")
    whole, read = _prompt_length(inputs), _read_length(inputs)
    if not whole:
        return None
    if isinstance(keep, Tensor) and keep.ndim:
        return keep.remainder(read) + (whole - read)
    return torch.arange(whole - length, whole) if (keep is not None and int(keep)) or whole > read else None


def _last_unmasked(inputs: Mapping[str, Any] | None, batch: int, length: int) -> Tensor:
    mask = None if inputs is None else inputs.get("attention_mask")
    mask = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    if mask is None:
        return torch.full((batch,), length - 1)
    if tuple(mask.shape) != (batch, length):
        raise InputError(
            f"The attention mask has shape {tuple(mask.shape)}, the output {batch} examples of {length} positions; "
            "pass the inputs that the output was computed from, or name the position."
        )
    real = mask.bool()
    if not bool(real.any(dim=1).all()):
        raise InputError("The attention mask hides every position of an example, so it has no last one.")
    return (length - 1 - real.flip(1).int().argmax(dim=1)).cpu()


def _without(rows: Tensor, ids: Tensor) -> Tensor:
    """The output without each row's own answer."""
    own = torch.zeros_like(rows, dtype=torch.int).scatter_add_(1, ids.clamp(min=0), (ids >= 0).int())
    return rows.masked_fill(own > 0, -torch.inf)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
