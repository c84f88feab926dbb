"""Closed loop: episodes of a policy under edits, where they end and whether they succeed.

The policy sees the board, acts, its chunk is carried out, and it sees the board again (:func:`circuitvision.data.reach.run_episodes`). All conditions
start from the same boards and draw the same noise, so that they differ in the edits alone and differences are paired. Displacement is in cells,
(rows down, columns right); success is to rest on the goal at the end, with Wilson's interval.

Not covered: worlds other than the grid of :mod:`circuitvision.data.reach`; edits that remember earlier steps (give a function of the inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.data import reach
from circuitvision.errors import InputError, checked_seed
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import wilson
from circuitvision.steering.acting import act, policy_of

DIMS = ("down", "right")


@dataclass(frozen=True, eq=False)
class ClosedLoop(Result):
    """Displacement in cells from the first to the last step, ``values`` ``[condition dim example]``.

    ``success`` ``[condition example]`` is 1 where the episode ends on the goal, ``path`` ``[condition time dim example]`` the gripper's cells.
    """

    success: Tensor = field(default_factory=lambda: torch.zeros(0))
    path: Tensor = field(default_factory=lambda: torch.zeros(0))
    horizon: int = 8

    _per_example: ClassVar[dict[str, int]] = {"success": -1, "path": -1}

    @property
    def success_rate(self) -> Float[Tensor, " condition"]:
        """The share of episodes that end on the goal."""
        return self.mean(quantity="success")

    def success_interval(self, level: float = 0.95) -> Tensor:
        """Low and high end ``[2 condition]`` of Wilson's interval of :attr:`success_rate`."""
        return wilson(self.success_rate, len(self.examples), level)

    @with_provenance
    def reached(self, cells: Int[np.ndarray, "example 2"] | Tensor) -> Result:
        """Whether each episode ends on a cell of its own, ``[condition example]``; rows of −1 are no cell."""
        wanted = torch.as_tensor(cells).double()
        if wanted.shape != (self.path.shape[-1], 2):
            raise InputError(f"cells has shape {tuple(wanted.shape)}; give a (row, column) for each of the episodes.")
        found = (self.path[:, -1] == wanted.T).all(1).double()
        axes = {"condition": self.axes["condition"], "example": self.axes["example"]}
        return Result(found, axes, self.provenance)

    @with_provenance
    def beside(self, condition: str) -> Result:
        """How much further each condition goes than this one, ``[condition dim example]``: paired differences of displacement."""
        own = self.values[self.index_of("condition", condition)]
        return Result(self.values - own, self.axes, self.provenance)

    def table(self) -> Any:
        """One row per condition: success with Wilson's interval, and the mean displacement along each dimension with its interval."""
        import pandas as pd

        low, high = self.success_interval()
        frame = pd.DataFrame({"condition": self.axes["condition"], "success": self.success_rate.tolist()})
        frame["low"], frame["high"] = low.tolist(), high.tolist()
        mean, ends = self.mean(), self.interval()
        for number, dim in enumerate(self.axes["dim"]):
            frame[dim] = mean[:, number].tolist()
            frame[f"{dim}, low"], frame[f"{dim}, high"] = ends[0, :, number].tolist(), ends[1, :, number].tolist()
        return frame

    def highlights(self) -> dict[str, str]:
        """The success rate of the conditions."""
        return {
            f"success, {name}": f"{rate:.0%}"
            for name, rate in zip(self.axes["condition"], self.success_rate.tolist(), strict=True)
        }


@with_provenance
def closed_loop(
    model: Any,
    starts: reach.ReachScenes,
    conditions: Mapping[str, Any],
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    horizon: int = 8,
    seed: int = 0,
    observe: Callable[[Any, reach.ReachScenes, Sequence[str], int], Mapping[str, Any]] | None = None,
    decode: Callable[[Any, Tensor], Int[np.ndarray, "scene chunk 2"]] | None = None,
    progress: bool = True,
    **options: Any,
) -> ClosedLoop:
    """Run one episode from every start under every condition.

    Args:
        model: the hooked model, a policy.
        starts: the first boards (:func:`circuitvision.data.reach.sample_starts`).
        conditions: name → edits that act in every step of the loop, or a function ``edits(inputs)`` of what the policy sees then; ``[]`` for none.
        texts: condition → one prompt per episode, where it is not the board's own instruction.
        horizon: steps per episode.
        seed: of the noise, new at every call of the policy and the same in all conditions.
        observe: ``(model, scenes, texts, seed)`` → inputs; None is what reach-pi0 reads.
        decode: ``(model, actions)`` → whole steps ``[scene chunk 2]``; None is the processor's un-normalisation, rounded, as of reach-pi0.
        progress: whether progress is shown.
        options: of :func:`act`, such as ``unnorm_key``.

    Raises:
        InputError: no condition, prompts of a condition that is not there or of another number, dropout in training mode.
        UnsupportedModelError: a model that does not act.
    """
    policy_of(model, None)
    if hasattr(starts, "batches"):
        raise InputError(
            f"An episode starts from a board (reach.sample_starts), not from a {type(starts).__name__} of inputs."
        )
    texts = dict(texts or {})
    unknown = [name for name in texts if name not in conditions]
    if not conditions or unknown:
        raise InputError(
            f"There is no condition {unknown[0]!r}." if unknown else "Give at least one condition, {'none': []}."
        )
    wrong = [name for name, own in texts.items() if len(own) != len(starts)]
    if wrong:
        raise InputError(f"The condition {wrong[0]!r} has {len(texts[wrong[0]])} prompts for {len(starts)} episodes.")
    found = []
    for name in track(list(conditions), "episodes") if progress else list(conditions):
        policy = _policy(model, conditions[name], texts.get(name), seed, observe or seen, decode or steps_of, options)
        found.append(reach.run_episodes(policy, starts, horizon))
    path = torch.stack([torch.from_numpy(one.path).double().permute(1, 2, 0) for one in found])
    return ClosedLoop(
        values=path[:, -1] - path[:, 0],
        axes={"condition": list(conditions), "dim": list(DIMS), "example": list(range(len(starts)))},
        provenance=describe(model, method=f"closed_loop(horizon={horizon})", seed=seed),
        success=torch.stack([torch.from_numpy(one.success).double() for one in found]),
        path=path,
        horizon=horizon,
    )


def seen(model: Any, scenes: reach.ReachScenes, texts: Sequence[str], seed: int) -> Mapping[str, Any]:
    """What reach-pi0 reads of boards: one camera, the prompt, the gripper's place, noise."""
    images = [[image] for image in scenes.images()]
    return model.inputs(images=images, text=list(texts), state=scenes.gripper, seed=seed)


def steps_of(model: Any, actions: Float[Tensor, "scene chunk dim"]) -> Int[np.ndarray, "scene chunk 2"]:
    """Normalised actions as whole steps in −1, 0, 1 (down, right), by the processor's statistics where it has some."""
    mean, std = (
        torch.tensor(getattr(model.processor, f"actions_{name}", one)) for name, one in (("mean", 0.0), ("std", 1.0))
    )
    return (actions.detach().cpu().double() * std + mean)[..., :2].round().clamp(-1, 1).long().numpy()


def _policy(model: Any, edits: Any, texts: Any, seed: int, observe: Any, decode: Any, options: Any) -> reach.Policy:
    seeds = np.random.default_rng(checked_seed(seed))

    def policy(scenes: reach.ReachScenes) -> Int[np.ndarray, "scene chunk 2"]:
        told = scenes.instructions() if texts is None else texts
        inputs = observe(model, scenes, told, int(seeds.integers(2**31)))
        return decode(model, act(model, inputs, edits(inputs) if callable(edits) else edits, **options))

    return policy
