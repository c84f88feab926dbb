"""Metrics of a model's output: one number per example.

A metric is a callable ``metric(logits, inputs=None) -> [batch]``. It reads the family's natural output: ``[batch,
classes]`` of a classifier, ``[image, text]`` of a dual encoder, ``[batch, pos, vocab]`` of a vision-language model,
``[batch, chunk, action_dim]`` of an action model. Where the output has positions, ``position="last"`` means the last
*unmasked* one, taken from the attention mask in ``inputs``; padding on either side is therefore harmless, as long as
``inputs`` is passed.

Answers are ids (tokens, classes, or the column of a caption) or words of one piece. Words need a vocabulary:
``metric.bind(model)`` returns the same metric with ids; every function of the library that takes a model and a
metric binds it itself.

Differences and probabilities are computed in float32 at least: subtracting two bfloat16 logits loses the answer's
last digits. Not covered: answers of several tokens.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.digests import NamedFunction, of_tensor
from circuitvision.errors import InputError
from circuitvision.links import Link, divergence, link_of, log_probabilities, probabilities
from circuitvision.storage import as_builtin, stored_as

Answer = int | str | Sequence[int | str] | Tensor
Position = int | str | Tensor
MetricType = TypeVar("MetricType", bound="Metric")


@dataclass(frozen=True, eq=False)
class Metric:
    """Base of the metrics: which position of the output is read, and how answers become ids."""

    position: Position = "last"
    name: str = ""
    link: Link | None = None
    """What turns the output into probabilities; None: what the output itself says (outputs of a wrapped model do), or else a softmax."""

    units: ClassVar[str] = ""
    _answers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in self._answers:
            object.__setattr__(self, field, _plain(getattr(self, field)))

    def bind(self: MetricType, model: Any) -> MetricType:
        """The same metric with every word replaced by its id in ``model``, and the link of the model's head.

        Raises:
            InputError: a word that is not one piece of the vocabulary, or a model whose answers have no words.
        """
        changes: dict[str, Any] = {field: answer_ids(getattr(self, field), model) for field in self._answers}
        link = self.link or getattr(model, "link", None)
        return dataclasses.replace(self, link=link, **changes)

    def __call__(
        self, logits: Float[Tensor, "batch *pos classes"], inputs: Mapping[str, Any] | None = None
    ) -> Float[Tensor, " batch"]:
        raise NotImplementedError

    def _link(self, logits: Tensor) -> Link:
        return self.link or link_of(logits)

    def _chosen(self, logits: Tensor, answer: Answer, inputs: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
        """The output at the position read, ``[batch, classes]``, and every example's answer id, ``[batch]``."""
        rows = at_position(logits, self.position, inputs)
        return rows, _ids_tensor(answer, rows)


@dataclass(frozen=True, eq=False)
class LogitDiff(Metric):
    """See :func:`logit_diff`."""

    answer: Answer = 0
    foil: Answer = 1

    units = "logit"
    _answers = ("answer", "foil")

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """``logits[answer] - logits[foil]`` at the position, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        return _pick(rows, answer) - _pick(rows, _ids_tensor(self.foil, rows))


@dataclass(frozen=True, eq=False)
class Prob(Metric):
    """See :func:`prob`."""

    answer: Answer = 0

    units = "prob"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The probability of the answer at the position, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        return _pick(probabilities(rows, self._link(logits)), answer)


@dataclass(frozen=True, eq=False)
class LogProb(Metric):
    """See :func:`logprob`."""

    answer: Answer = 0

    units = "nat"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The log-probability of the answer at the position, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        return _pick(log_probabilities(rows, self._link(logits)), answer)


@dataclass(frozen=True, eq=False)
class Rank(Metric):
    """See :func:`rank`."""

    answer: Answer = 0

    units = "rank"
    _answers = ("answer",)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """1 plus how many classes score strictly higher than the answer, per example."""
        rows, answer = self._chosen(logits, self.answer, inputs)
        return 1.0 + (rows > _pick(rows, answer)[:, None]).sum(dim=-1).to(rows.dtype)


@dataclass(frozen=True, eq=False)
class KL(Metric):
    """See :func:`kl`."""

    reference: Tensor | None = None

    units = "nat"

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The divergence of the output from the reference at the position, per example."""
        logits = as_output(logits)
        if self.reference is None or self.reference.shape != logits.shape:
            shape = None if self.reference is None else tuple(self.reference.shape)
            raise InputError(f"The reference of kl has shape {shape}, not the output's {tuple(logits.shape)}.")
        rows = at_position(logits, self.position, inputs)
        reference = at_position(self.reference.to(logits.device), self.position, inputs)
        return divergence(reference, rows, self._link(logits))


@dataclass(frozen=True, eq=False)
class ActionDim(Metric):
    """See :func:`action_dim`."""

    dim: int = 0
    step: int | None = 0

    units = "action_unit"

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """One coordinate of the action, per example."""
        logits = as_output(logits)
        if logits.ndim != 3:
            raise InputError(f"action_dim reads [batch, chunk, action_dim]; the output has {tuple(logits.shape)}.")
        if not -logits.shape[-1] <= self.dim < logits.shape[-1]:
            raise InputError(f"Action dimension {self.dim} is outside the output's {logits.shape[-1]} dimensions.")
        if self.step is not None and not -logits.shape[1] <= self.step < logits.shape[1]:
            raise InputError(f"Step {self.step} is outside the output's chunk of {logits.shape[1]} steps.")
        chosen = _wide(logits[..., self.dim])
        return chosen.mean(dim=1) if self.step is None else chosen[:, self.step]


def logit_diff(answer: Answer, foil: Answer, position: Position = "last") -> LogitDiff:
    """Logit of the answer minus logit of the foil: positive when the model prefers the answer.

    ``answer`` and ``foil`` are one id or word for the whole batch, or one per example.

    Raises:
        InputError: when called: an id outside the output, a word that was not bound, a mask that does not fit.
    """
    labels = (_label(answer), _label(foil))
    name = "logit_diff(answer - foil)" if labels == ("per example",) * 2 else f"logit_diff({labels[0]} - {labels[1]})"
    return LogitDiff(position=position, name=name, answer=answer, foil=foil)


def prob(answer: Answer, position: Position = "last") -> Prob:
    """Probability of the answer, in 0 … 1: among all classes, or of a yes where every class is a question of its own
    (see :mod:`circuitvision.links`).

    Raises:
        InputError: when called: an output that is no distribution.
    """
    return Prob(position=position, name=f"prob({_label(answer)})", answer=answer)


def logprob(answer: Answer, position: Position = "last") -> LogProb:
    """Log-probability of the answer in nats (0 is certain); see :func:`prob`."""
    return LogProb(position=position, name=f"logprob({_label(answer)})", answer=answer)


def rank(answer: Answer, position: Position = "last") -> Rank:
    """Rank of the answer, 1 for the highest logit; equal logits share the better rank."""
    return Rank(position=position, name=f"rank({_label(answer)})", answer=answer)


def kl(reference: Float[Tensor, "batch *pos classes"], position: Position = "last") -> KL:
    """KL(reference || output) in nats: 0 when the output equals the reference run's, whose logits are given; summed over yes-or-no classes.

    Its gradient is zero at the reference itself, so first-order attribution there says nothing.
    """
    return KL(position=position, name="kl(reference || output)", reference=as_output(reference).detach())


def action_dim(dim: int, step: int | None = 0) -> ActionDim:
    """One coordinate of an action or velocity in the model's units, at one step of the chunk or (None) its mean."""
    return ActionDim(name=f"action_dim({dim}, step={'mean' if step is None else step})", dim=dim, step=step)


def _write(metric: Metric, tensors: dict[str, Tensor], sources: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for entry in dataclasses.fields(metric):
        value = getattr(metric, entry.name)
        if isinstance(value, Tensor):
            digest = of_tensor(value)
            tensors[digest] = value
            value = {"tensor": digest}
        fields[entry.name] = value if isinstance(value, Mapping) else as_builtin(value)
    return {"metric": type(metric).__name__, "fields": fields}


def _read(data: Mapping[str, Any], tensors: Mapping[str, Tensor], objects: Mapping[str, Any]) -> Metric:
    fields: dict[str, Any] = {
        name: tensors[value["tensor"]] if isinstance(value, Mapping) else value
        for name, value in data["fields"].items()
    }
    return _KINDS[data["metric"]](**fields)


_KINDS: dict[str, type[Metric]] = {cls.__name__: cls for cls in (LogitDiff, Prob, LogProb, Rank, KL, ActionDim)}
stored_as("metric", Metric, _write, _read)


def kept(metric: Any) -> Any:
    """A metric as a result keeps it: one of this module as it is, another function by its name."""
    return metric if type(metric) in _KINDS.values() or metric is None else NamedFunction.of(metric)


def bind(metric: Any, model: Any) -> Any:
    """``metric`` with words resolved by ``model``; a plain function is returned as it is."""
    if isinstance(metric, Mapping | list | tuple):
        raise InputError(
            f"Give one metric, not {len(metric)} in a {type(metric).__name__}: measure once for each of them."
        )
    if not callable(metric):
        raise InputError(
            f"A metric is a function of the logits, such as metrics.logit_diff(answer, foil), not {metric!r:.80}."
        )
    return metric.bind(model) if hasattr(metric, "bind") else metric


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


def _plain(answer: Any) -> Any:
    """Answers with numpy's (and pandas') numbers, words and arrays as Python's; tensors stay.

    Raises:
        InputError: truth values, or numbers with a fraction, which are no ids.
    """
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, np.ndarray | np.generic) or (hasattr(answer, "tolist") and not isinstance(answer, str)):
        answer = answer.tolist()
    if isinstance(answer, str):
        return answer
    if isinstance(answer, Iterable) and not isinstance(answer, Mapping):
        return [_plain(item) for item in answer]
    if isinstance(answer, bool) or not hasattr(answer, "__index__"):
        raise InputError(f"An answer is an id (a whole number) or a word, not {answer!r}.")
    return operator.index(answer)


def answer_ids(answer: Answer, model: Any) -> int | list[int] | Tensor:
    """Ids of an answer given as id, word, or one of either per example.

    A word is looked up among the class names of the model's configuration, then in its tokenizer.

    Raises:
        InputError: a word without an id of its own.
    """
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, str):
        return _word_id(answer, model)
    found = _plain(answer)
    if isinstance(found, list):
        return [_word_id(item, model) if isinstance(item, str) else int(item) for item in found]
    return int(found)


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
    logits: Float[Tensor, "batch *pos classes"], position: Position, inputs: Mapping[str, Any] | None = None
) -> Float[Tensor, "batch classes"]:
    """The output at one position of every example, in float32 at least; outputs without positions are returned whole.

    Positions are those of the prompt, also where the call kept only some of them (``logits_to_keep`` in ``inputs``); what a cache in
    ``past_key_values`` holds counts as its beginning.

    Raises:
        InputError: a position outside the output, a mask of another length, an example that is all padding.
    """
    logits = as_output(logits)
    if logits.ndim == 2:
        return _wide(logits)
    if logits.ndim != 3:
        raise InputError(f"A metric reads [batch, classes] or [batch, pos, classes], not {tuple(logits.shape)}.")
    batch, length = logits.shape[:2]
    kept = _kept(inputs, length)
    whole = length if kept is None else _prompt_length(inputs)
    if isinstance(position, str):
        if position != "last":
            raise InputError(f"Unknown position {position!r}; give 'last', a whole number, or one per example.")
        index = _last_unmasked(inputs, batch, whole).to(logits.device)
    else:
        index = torch.as_tensor(position, device=logits.device).expand(batch)
        _refuse_unknown_past(inputs, index)
    if bool(((index < -whole) | (index >= whole)).any()):
        raise InputError(f"Position {index.tolist()} is outside the output's {whole} positions.")
    if kept is not None:
        there = kept.to(logits.device) == index.remainder(whole)[:, None]
        if not bool(there.any(1).all()):
            raise InputError(
                f"The metric reads position {index.tolist()}, and logits_to_keep left positions {kept.tolist()}: keep the one that is read."
            )
        index = there.int().argmax(1)
    return _wide(logits[torch.arange(batch, device=logits.device), index])


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


def _word_id(word: str, model: Any) -> int:
    labels = getattr(getattr(model.module, "config", None), "label2id", None) or {}
    if word in labels:
        return int(labels[word])
    towers = getattr(model, "towers", {})
    if "text" in towers and "language" not in towers:
        raise InputError(
            f"This model's output has one column per caption, so {word!r} has no id; give the caption's column."
        )
    return int(model.token(word))


def _ids_tensor(answer: Answer, rows: Tensor) -> Tensor:
    batch, classes = rows.shape
    items = [answer] if isinstance(answer, str) else answer
    if not isinstance(items, Tensor | int):
        words = [item for item in items if isinstance(item, str)]
        if words:
            raise InputError(f"{words[0]!r} is a word; call metric.bind(model) first, or give its id.")
    ids = torch.as_tensor(items, device=rows.device)
    whole = not ids.dtype.is_floating_point and ids.dtype != torch.bool
    if not whole or ids.ndim > 1 or (ids.ndim == 1 and len(ids) not in (1, batch)):
        raise InputError(f"Answers are one id, or one per example ({batch}); got {tuple(ids.shape)} of {ids.dtype}.")
    if bool(((ids < 0) | (ids >= classes)).any()):
        raise InputError(f"Answer {ids.tolist()} is outside the output's {classes} classes.")
    return ids.expand(batch)


def _pick(rows: Tensor, ids: Tensor) -> Tensor:
    return rows.gather(1, ids[:, None])[:, 0]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _label(answer: Answer) -> str:
    answer = _plain(answer)
    if isinstance(answer, str | int):
        return str(answer)
    items = answer.tolist() if isinstance(answer, Tensor) else list(answer)
    items = items if isinstance(items, list) else [items]
    return str(items[0]) if len(set(items)) == 1 else "per example"
