"""One result over the examples of several: what :meth:`circuitvision.results.Result.concat` does.

Parts are alike in everything but their examples: class, axes in their order, fields, model, weights, metric and method. Examples whose numbers
overlap are counted on, unless the parts were measured on the same data, which would count twice.

Not covered: parts along another axis than that of examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError
from circuitvision.results import EXAMPLE, Result, ResultType

_SAME = ("model_id", "weights_sha256", "config_sha256", "metric", "metric_units", "method")
"""What parts of one result share of where they come from."""


def joined(kind: type[ResultType], parts: Sequence[ResultType]) -> ResultType:
    """The parts as one result of their class; see the module.

    Raises:
        InputError: nothing to join; parts of other classes, models, methods, metrics, axes or settings; the same data twice.
    """
    if not parts:
        raise InputError("There is nothing to join; give at least one result.")
    first = parts[0]
    for part in parts:
        if not isinstance(part, kind) or type(part) is not type(first):
            raise InputError(f"A {type(first).__name__} and a {type(part).__name__} cannot be joined.")
        part.examples  # noqa: B018 (raises where there are none)
        _check_alike(first, part)
    labels = [part.axes[EXAMPLE] for part in parts]
    if len(set().union(*map(set, labels))) < sum(len(set(own)) for own in labels):
        _check_no_repeats(parts)
        labels = _counted_on(parts)
    names = {name for part in parts for name, _, _ in part._along_examples()}
    fields = _own_fields(parts)
    for name, dim in {"values": -1, **first._per_example}.items():
        pieces = [getattr(part, name) for part in parts]
        if name in names and isinstance(pieces[0], Tensor):
            fields[name] = torch.cat(pieces, dim=dim)
        elif name in names:
            fields[name] = [entry for piece in pieces for entry in piece]
    shared = {
        key: value
        for key, value in first.provenance.items()
        if all(part.provenance.get(key) == value for part in parts)
    }
    return dataclasses.replace(
        first,
        axes={**first.axes, EXAMPLE: [label for own in labels for label in own]},
        provenance={**shared, "parts": [part.provenance for part in parts]},
        **fields,
    )


def _joins(value: Any) -> bool:
    """Whether a field holds objects that know how those of several parts become one."""
    return isinstance(value, list) and bool(value) and hasattr(type(value[0]), "concat")


def _own_fields(parts: Sequence[Result]) -> dict[str, Any]:
    """The fields of which every part has its own, though they say the same: edits that read the part's own data."""
    fields = {entry.name: [getattr(part, entry.name) for part in parts] for entry in dataclasses.fields(parts[0])}
    return {name: type(own[0][0]).concat(own) for name, own in fields.items() if all(map(_joins, own))}


def _check_alike(first: Result, other: Result) -> None:
    """InputError unless two results differ in their examples alone."""
    for axis in dict.fromkeys([*first.axes, *other.axes]):
        if axis != EXAMPLE and first.axes.get(axis) != other.axes.get(axis):
            raise InputError(
                f"The parts differ in the axis {axis!r}: {_shown(first.axes.get(axis))} and {_shown(other.axes.get(axis))}."
            )
    if list(first.axes) != list(other.axes):
        raise InputError(f"The parts have their axes in another order: {list(first.axes)} and {list(other.axes)}.")
    for key in _SAME:
        if first.provenance.get(key) != other.provenance.get(key):
            raise InputError(
                f"The parts differ in {key}: {first.provenance.get(key)!r} and {other.provenance.get(key)!r}."
            )
    for entry in dataclasses.fields(first):
        if entry.name in ("values", "axes", "provenance", *first._per_example, *first._of_first):
            continue
        one, two = getattr(first, entry.name), getattr(other, entry.name)
        if _joins(one) and _joins(two):
            continue
        if of_json(plain(one)) != of_json(plain(two)):
            raise InputError(f"The parts differ in {entry.name}: {_shown(one)} and {_shown(two)}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _check_no_repeats(parts: Sequence[Result]) -> None:
    """InputError where parts with the same numbers were measured on the same data."""
    seen: set[str] = set()
    for part in parts:
        data = str(part.provenance.get("dataset_sha256") or "")
        if data and data in seen:
            raise InputError("Two of the parts are measurements of the same examples, which would count twice.")
        seen.add(data)


def _counted_on(parts: Sequence[Result]) -> list[list[int]]:
    """New numbers for the examples of every part, each part's after those of the part before."""
    found, total = [], 0
    for part in parts:
        numbers = {example: total + number for number, example in enumerate(part.examples)}
        found.append([numbers[label] for label in part.axes[EXAMPLE]])
        total += len(numbers)
    return found
