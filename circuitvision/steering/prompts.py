"""Does it listen? One scene under several prompts, and how far the action follows the object that the right prompt names.

With ``a`` the trajectory towards the named object and ``b`` one towards another, β (:func:`circuitvision.metrics.transfer`) is 1 where a policy
goes to the named object, 0 where it goes to the other one, and near one half with a large residual where it goes by neither. A policy that listens
has β near 1 under the right prompt, near 0 when the prompt names the other object, and loses both when the prompt is empty; one that ignores the
prompt has the same β under all of them. A prompt may be decodable and ignored: :func:`circuitvision.readout.linear_probe` says the one, this the
other.

:func:`reworded` makes the conditions of a data set. ``circuitvision.data.reach.prompts`` has those of the grid world.

Reference: Swann et al. 2026 (arXiv 2603.19183) and Grant et al. 2026 (arXiv 2603.19233), where policies follow vision while their prompts decode.

Not covered: prompts of different lengths for policies that say tokens, see :mod:`circuitvision.steering.acting`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.data.sides import Side
from circuitvision.errors import InputError
from circuitvision.metrics.effects import transfer
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.steering.acting import Policy, parts, policy_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class PromptConditions(Result):
    """β towards the named object, ``values`` ``[condition example]``, and its ``residual`` of the same shape.

    ``actions`` ``[condition step dim example]`` are those of the policy, ``texts`` the first prompt of every condition.
    """

    residual: Tensor = field(default_factory=lambda: torch.zeros(0))
    actions: Tensor = field(default_factory=lambda: torch.zeros(0))
    texts: list[str] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"residual": -1, "actions": -1}

    def table(self) -> pd.DataFrame:
        """One row per condition: β with its interval and the residual."""
        frame = self.mean_frame().rename(columns={"mean": "beta"})
        frame["residual"] = self.mean(quantity="residual").numpy()
        frame["first prompt"] = self.texts
        return frame

    @with_provenance
    def difference(self, condition: str, other: str) -> Result:
        """β under one condition minus β under another, per example. Raises InputError for a condition that is not there."""
        one, two = (self.values[self.index_of("condition", name)] for name in (condition, other))
        return Result(one - two, {"example": self.axes["example"]}, self.provenance)

    def highlights(self) -> dict[str, str]:
        """β of every condition."""
        return {
            f"β, {name}": f"{value:.2f}"
            for name, value in zip(self.axes["condition"], self.mean().tolist(), strict=True)
        }


def reworded(side: Side, texts: Mapping[str, str | Sequence[str]]) -> dict[str, Side]:
    """The same examples under other prompts: per condition one text for all, or one per example.

    Raises:
        InputError: another number of texts than examples, or examples made of tensors.
    """
    found = {}
    for name, given in texts.items():
        listed = [given] * len(side) if isinstance(given, str) else list(given)
        if len(listed) != len(side):
            raise InputError(f"The condition {name!r} has {len(listed)} prompts for {len(side)} examples.")
        if any(one.tensors is not None for one in side.examples):
            raise InputError("These examples are tensors made by hand: make the inputs of every condition instead.")
        examples = tuple(dataclasses.replace(one, text=text) for one, text in zip(side.examples, listed, strict=True))
        found[name] = side._with(examples=examples, name=name)
    return found


@with_provenance
def prompt_conditions(
    model: Any,
    conditions: Mapping[str, Any],
    towards: Float[Tensor, "example step dim"],
    away: Float[Tensor, "example step dim"],
    *,
    policy: Policy | None = None,
    trajectory: Callable[[Tensor], Tensor] | None = None,
    example_batch: int | None = None,
    seed: int = 0,
) -> PromptConditions:
    """Act under every prompt, from the same scenes and noise, and measure β towards the named object.

    Args:
        model: the hooked model, a policy.
        conditions: name → a side (see :func:`reworded`) or inputs, of the same examples in the same order.
        towards: the trajectories to the object that the right prompt names, in the units of ``trajectory``.
        away: those to another object; examples where both are the same are NaN.
        policy: in place of :func:`act`, a function ``(model, inputs, edits)`` that returns actions.
        trajectory: what of the actions is compared; None is all of them, in the model's units (``model.processor.normalize(steps, "actions")`` turns
            steps into those of PI0).
        example_batch: how many examples of a data set run at once; None: by memory.
        seed: of the noise of a data set's examples.

    Raises:
        InputError: no condition, conditions of other examples, trajectories of another shape, dropout in training mode.
        UnsupportedModelError: a model that does not act.
    """
    run = policy_of(model, policy)
    if not conditions:
        raise InputError("Give at least one condition: {'right': side, 'empty': …}, as reworded makes them.")
    shown = trajectory or (lambda actions: actions)
    beta, residual, actions, texts = [], [], [], []
    labels: list[Any] = []
    for name, data in conditions.items():
        pieces = list(parts(model, data, example_batch, seed))
        own = [label for part in pieces for label in part.labels]
        if labels and own != labels:
            raise InputError(f"The condition {name!r} has other examples than the first one.")
        labels = own
        made = shown(torch.cat([run(model, part.inputs, []) for part in pieces])).detach().cpu()
        found = transfer(made, towards, away)
        beta.append(found.beta)
        residual.append(found.residual)
        actions.append(made.double().movedim(0, -1))
        texts.append(str(data.examples[0].text) if isinstance(data, Side) else "")
    return PromptConditions(
        values=torch.stack(beta),
        axes={"condition": list(conditions), "example": labels},
        provenance=describe(model, method="prompt_conditions", seed=seed),
        residual=torch.stack(residual),
        actions=torch.stack(actions),
        texts=texts,
    )
