"""Results as the plain reference code of the tests writes them: row by row, as the model's own tensors are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from circuitvision.results import Result

_INSIDE = ("span", "query", "key", "distance", "position", "target", "rank", "down", "across", "share", "component")
"""Axes that come behind the rows in the model's tensors."""


def by_row(result: Any, name: str = "values") -> Any:
    """A field of a result with its last axis, the one of examples, where the model has its rows; of anything else the field as it is."""
    value = getattr(result, name)
    if (
        not isinstance(result, Result)
        or "example" not in result.axes
        or not isinstance(value, Tensor)
        or value.ndim < 2
    ):
        return value
    if name == "per_position":
        return value.T
    axes = [axis for axis in result.axes if not (axis == "head" and name == "uniform")]
    if name.startswith("pooled"):
        axes.remove("position")
    if name == "random":
        axes.insert(0, "order")
    return value.movedim(-1, next((number for number, axis in enumerate(axes) if axis in _INSIDE), -1))


def of_rows(cls: type[Result], values: Tensor, axes: dict[str, list[Any]], *more: Any, **fields: Any) -> Any:
    """A result of values with an axis ``row`` anywhere, which becomes its last axis, ``example``, with the same labels."""
    where = list(axes).index("row")
    named = {name: labels for name, labels in axes.items() if name != "row"} | {"example": axes["row"]}
    if "uniform" in fields:
        fields["uniform"] = fields["uniform"].movedim(where - 1, -1)
    return cls(values.movedim(where, -1), named, *more, **fields)
