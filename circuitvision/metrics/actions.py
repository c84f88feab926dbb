"""Metrics of an action, one of its coordinates, and of an episode, whether it succeeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.metrics.base import Metric
from circuitvision.metrics.position import as_output, last_unmasked, wide

DimType = TypeVar("DimType", bound="ActionDim")


@dataclass(frozen=True, eq=False)
class ActionDim(Metric):
    """See :func:`action_dim`."""

    dim: int = 0
    step: int | None = 0
    bins: Mapping[int, float] | None = None
    """Ids that say an action, with their values, where the output is of tokens."""

    units = "action_unit"
    function = "action_dim"

    def bind(self: DimType, model: Any, answers: Any = None, foils: Any = None, combine: str | None = None) -> DimType:
        """The same metric with the tokens by which ``model`` says actions, if it does."""
        return dataclasses.replace(super().bind(model), bins=self.bins or getattr(model, "action_values", None) or None)

    def of_marked(self: DimType) -> DimType:
        """The same metric of an output that holds the actions themselves, unless tokens say them."""
        return dataclasses.replace(super().of_marked(), bins=None)

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
        chosen = wide(logits[..., self.dim])
        return chosen.mean(dim=1) if self.step is None else chosen[:, self.step]

    def _said(self, logits: Tensor, inputs: Mapping[str, Any] | None, bins: Mapping[int, float]) -> Tensor:
        """The mean action over the bins, where the prompt has come to this dimension: behind as many action tokens."""
        batch, length = logits.shape[:2]
        ids, values = torch.tensor(list(bins)), torch.tensor(list(bins.values()), dtype=torch.float64)
        last = last_unmasked(inputs, batch, length)
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
        shares = wide(rows)[:, ids.to(logits.device)].softmax(-1)
        return shares @ values.to(shares)


def action_dim(dim: int, step: int | None = 0) -> ActionDim:
    """One coordinate of an action or velocity in the model's units, at one step of the chunk or (None) its mean.

    Of a model that says actions as tokens: the mean of the bins' normalised values under the softmax over the bins alone, where the prompt has come
    to dimension ``dim``: at its last position if it ends with ``dim`` action tokens. Methods learn from the model which tokens those are.
    """
    return ActionDim(name=f"action_dim({dim}, step={'mean' if step is None else step})", dim=dim, step=step)


@dataclass(frozen=True, eq=False)
class ActionEstimate(ActionDim):
    """See :func:`action_estimate`."""

    scale: tuple[float, float] | None = None
    """Mean and standard deviation of the action's coordinate, where the model's processor normalises by them."""
    velocity: bool = True

    function = "action_estimate"

    def bind(self, model: Any, answers: Any = None, foils: Any = None, combine: str | None = None) -> ActionEstimate:
        """The same metric with the statistics by which the model's processor normalises actions, if it does."""
        bound, processor = super().bind(model), getattr(model, "processor", None)
        mean, std = (getattr(processor, name, None) for name in ("actions_mean", "actions_std"))
        if self.scale is not None or mean is None or std is None or not -len(std) <= self.dim < len(std):
            return bound
        return dataclasses.replace(bound, scale=(float(mean[self.dim]), float(std[self.dim])))

    def of_marked(self) -> ActionEstimate:
        """The same metric of an output that holds the actions themselves."""
        return dataclasses.replace(super().of_marked(), velocity=False)

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The coordinate that one step of denoising reaches, per example."""
        logits = as_output(logits)
        if self.velocity and not self.bins:
            noise, time = ((inputs or {}).get(name) for name in ("noise", "timestep"))
            if noise is None or time is None or tuple(noise.shape) != tuple(logits.shape):
                raise InputError(
                    "action_estimate reads a velocity [batch, chunk, action_dim] and where it starts: the output of one forward pass, and its "
                    "inputs with noise and timestep. Of other outputs take cv.metrics.action_dim."
                )
            rate = wide(logits)
            logits = noise.to(rate) - time.to(rate).view(-1, 1, 1) * rate
        mean, std = self.scale or (0.0, 1.0)
        return super().__call__(logits, inputs) * std + mean


def action_estimate(dim: int, step: int | None = 0) -> ActionEstimate:
    """One coordinate of the action that a flow-matching policy heads for, at one step of the chunk or (None) its mean: ``x_t − t·v(x_t, t)``.

    One Euler step from noise ``x_t`` at time ``t`` to the action at time 0, as π0 counts it. The output of one forward pass is the velocity ``v``,
    which points from the action to the noise, so its own sign is the opposite. In the robot's units where the model's processor holds the statistics
    of actions (``a·std + mean``), else normalised; of actions themselves (``run=``) or tokens that say them it is :func:`action_dim` in those units.

    Raises:
        InputError: when called: inputs without ``noise`` and ``timestep``, an output of another shape than the noise.

    Reference: Black et al. 2024 (arXiv 2410.24164), π0; Lipman et al. 2023 (arXiv 2210.02747), flow matching.
    """
    name = f"action_estimate({dim}, step={'mean' if step is None else step})"
    return ActionEstimate(name=name, dim=dim, step=step)


@dataclass(frozen=True, eq=False)
class Success(Metric):
    """See :func:`success`."""

    units = "share"
    function = "success"

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """1 where the episode succeeds, else 0, per episode."""
        logits = as_output(logits)
        told = logits[:, -1, -1] if logits.ndim == 3 and logits.shape[-1] == 3 else None
        if told is None or not bool(((told == 0) | (told == 1)).all()):
            raise InputError(
                f"Success is read off episodes [episode time 3], not off an output of shape {list(logits.shape)}: say what one run is, "
                "run=cv.steering.rollouts(starts)."
            )
        return told


def success() -> Success:
    """1 where an episode in closed loop ends with success, else 0; its mean is the success rate.

    An episode is no forward pass: it is what ``circuitvision.steering.rollouts(starts)`` makes of one run, given as ``run=``.

    Raises:
        InputError: when called: an output that is no episode.
    """
    return Success(name="success")
