"""Metrics by name, as functions that are called, and in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.digests import NamedFunction, of_tensor
from circuitvision.errors import InputError
from circuitvision.metrics.actions import ActionDim, ActionEstimate, Success, success
from circuitvision.metrics.answers import (
    Accuracy,
    InterchangeAccuracy,
    Logit,
    LogitDiff,
    LogProb,
    Margin,
    Prob,
    Rank,
    accuracy,
    interchange_accuracy,
    logit,
    logit_diff,
    logprob,
    margin,
    prob,
    rank,
)
from circuitvision.metrics.base import Metric, own_fields
from circuitvision.metrics.comparisons import (
    JS,
    KL,
    ActionDistance,
    TransferCoefficient,
    action_distance,
    js,
    kl,
)
from circuitvision.storage import as_builtin, stored_as


def _write(metric: Metric, tensors: dict[str, Tensor], sources: bool) -> dict[str, Any]:
    from circuitvision.model.edits.files import write_positions

    fields: dict[str, Any] = {}
    for entry in own_fields(metric):
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
    cls.__name__: cls
    for cls in (
        Accuracy,
        ActionDim,
        ActionDistance,
        ActionEstimate,
        InterchangeAccuracy,
        JS,
        KL,
        LogProb,
        Logit,
        LogitDiff,
        Margin,
        Prob,
        Rank,
        Success,
        TransferCoefficient,
    )
}
NAMES: dict[str, Callable[[], Metric]] = {
    make.__name__: make
    for make in (
        logit_diff,
        logit,
        prob,
        logprob,
        rank,
        margin,
        accuracy,
        interchange_accuracy,
        kl,
        js,
        action_distance,
        success,
    )
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
