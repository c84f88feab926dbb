"""Metrics that compare a run with another one: divergences of two outputs, the distance of two actions, and how far a run went from one to another.

A comparison without a reference is made with the run that a method compares with: a sweep's unedited run; in patching the run that values come from
where the corrupt run is patched (``mode="denoise"``), the unedited clean run otherwise (``"noise"``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.links import divergence, shared_divergence
from circuitvision.metrics.base import Metric
from circuitvision.metrics.effects import transfer as transfer_of
from circuitvision.metrics.position import Position, as_output, at_position, wide


@dataclass(frozen=True, eq=False)
class Comparison(Metric):
    """Base of the metrics that compare with another run, the ``reference``."""

    reference: Tensor | None = None

    _references: ClassVar[tuple[str, ...]] = ("reference",)

    def against(self: Any, output: Tensor) -> Any:
        """The same metric, compared with this output where no reference was given."""
        return dataclasses.replace(self, reference=as_output(output).detach()) if self.reference is None else self

    def take(self: Any, examples: Sequence[int], count: int) -> Any:
        """The same metric for some of the examples of its reference."""
        part = super().take(examples, count)
        changes = {}
        for name in self._references:
            held = getattr(self, name)
            if held is not None and len(held) == count:
                changes[name] = held[torch.as_tensor(list(examples), device=held.device)]
        return dataclasses.replace(part, **changes)

    def _reference(self, logits: Tensor, name: str = "reference") -> Tensor:
        held = getattr(self, name)
        if held is None:
            raise InputError(f"This {self.function} has no {name} yet: give the logits of the run to compare with.")
        if held.shape != logits.shape:
            raise InputError(
                f"The {name} of {self.function} has shape {tuple(held.shape)}, not the output's {tuple(logits.shape)}."
            )
        return held.to(logits.device)

    def _both(self, logits: Tensor, inputs: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
        """The reference and the output at the position, ``[batch, classes]`` each."""
        logits = as_output(logits)
        reference = self._reference(logits)
        rows = at_position(logits, self.position, inputs, self.tokens)
        return at_position(reference, self.position, inputs, self.tokens), rows


@dataclass(frozen=True, eq=False)
class KL(Comparison):
    """See :func:`kl`."""

    units = "nat"
    function = "kl"

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The divergence of the output from the reference at the position, per example."""
        return divergence(*self._both(logits, inputs), self._link(logits))


@dataclass(frozen=True, eq=False)
class JS(Comparison):
    """See :func:`js`."""

    units = "nat"
    function = "js"

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The Jensen–Shannon divergence of output and reference at the position, per example."""
        return shared_divergence(*self._both(logits, inputs), self._link(logits))


@dataclass(frozen=True, eq=False)
class ActionDistance(Comparison):
    """See :func:`action_distance`."""

    dims: tuple[int, ...] | None = None
    step: int | None = None

    units = "action_unit"
    function = "action_distance"

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The distance of the action from the reference's, per example."""
        logits = as_output(logits)
        if logits.ndim != 3:
            raise InputError(f"action_distance reads [batch, chunk, action_dim]; the output has {tuple(logits.shape)}.")
        if self._link(logits) != "none":
            raise InputError(
                "This model says actions as tokens, which lie at no distance: compare its actions by cv.metrics.action_dim(number of the dimension)."
            )
        away = wide(logits) - wide(self._reference(logits))
        if self.dims is not None:
            outside = [dim for dim in self.dims if not -away.shape[-1] <= dim < away.shape[-1]]
            if outside:
                raise InputError(f"Action dimension {outside[0]} is outside the output's {away.shape[-1]} dimensions.")
            away = away[..., list(self.dims)]
        if self.step is not None and not -away.shape[1] <= self.step < away.shape[1]:
            raise InputError(f"Step {self.step} is outside the output's chunk of {away.shape[1]} steps.")
        lengths = away.norm(dim=-1)
        return lengths.mean(1) if self.step is None else lengths[:, self.step]


@dataclass(frozen=True, eq=False)
class TransferCoefficient(Comparison):
    """See :func:`transfer_coefficient`."""

    base: Tensor | None = None

    function = "transfer_coefficient"
    _references = ("reference", "base")

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """β of the output between base (0) and reference (1), per example."""
        logits = as_output(logits)
        three = [logits, self._reference(logits), self._reference(logits, "base")]
        if logits.ndim == 3 and self._link(logits) != "none":
            three = [at_position(one, self.position, inputs, self.tokens) for one in three]
        return transfer_of(*three).beta


def kl(reference: Float[Tensor, "batch *pos classes"] | None = None, position: Position = "last") -> KL:
    """KL(reference || output) in nats: 0 when the output equals the reference run's, whose logits are given; summed over yes-or-no classes.

    Without a reference a method takes the run that it compares with, see :mod:`circuitvision.metrics.comparisons`. The gradient is zero at the
    reference itself, so first-order attribution there says nothing.
    """
    return KL(position=position, name="kl(reference || output)", reference=_held(reference))


def js(reference: Float[Tensor, "batch *pos classes"] | None = None, position: Position = "last") -> JS:
    """Jensen–Shannon divergence in nats: the mean of KL(p || m) and KL(q || m) with ``m = (p + q) / 2``; symmetric, 0 … ln 2 (disjoint).

    Of yes-or-no classes the sum of theirs. Reference: Lin 1991.
    """
    return JS(position=position, name="js(reference, output)", reference=_held(reference))


def action_distance(
    reference: Float[Tensor, "batch chunk action_dim"] | None = None,
    *,
    dims: Sequence[int] | None = None,
    step: int | None = None,
) -> ActionDistance:
    """``‖a − a_ref‖₂`` over the action's dimensions (or ``dims`` of them) in the model's units, at one step of the chunk or (None) its mean.

    Raises:
        InputError: when called: an output that is no chunk of actions, or a step or dimension outside it.
    """
    chosen = None if dims is None else tuple(int(dim) for dim in dims)
    return ActionDistance(name="action_distance(reference, output)", reference=_held(reference), dims=chosen, step=step)


def transfer_coefficient(
    source: Float[Tensor, "batch *pos classes"], base: Float[Tensor, "batch *pos classes"], position: Position = "last"
) -> TransferCoefficient:
    """``β = ⟨y − b, a − b⟩ / ‖a − b‖²`` of an output ``y`` between those of a ``base`` run ``b`` (0) and a ``source`` run ``a`` (1).

    Of logits with positions those at the position are compared, of actions and hidden states all. Its residual is
    :func:`circuitvision.metrics.effects.transfer`'s.
    """
    return TransferCoefficient(
        position=position, name="transfer_coefficient(source, base)", reference=_held(source), base=_held(base)
    )


def _held(output: Any) -> Tensor | None:
    return None if output is None else as_output(output).detach()
