"""Closed loop: episodes of a policy under edits, where they end and whether they succeed.

The policy sees the board, acts, its chunk is carried out, and it sees the board again (:func:`circuitvision.data.reach.run_episodes`). All conditions
start from the same boards and draw the same noise, so that they differ in the edits alone and differences are paired. Displacement is in cells,
(rows down, columns right); success is to rest on the goal at the end, with Wilson's interval.

*As a metric.* Success belongs to an episode, not to a forward pass: what an edit changes is what the policy sees next. So there are two parts.
:func:`rollouts` is a run function, whose one run is an episode from each start under the edits, and ``metrics.success()`` reads its end. Every
recipe that takes ``run=`` (``model.sweep``, ``knockout``, ``modulate``; ``steering_response`` calls it ``policy=``) reports success so, per episode,
with its intervals and its random controls, all runs paired by start and noise. What takes values from another run cannot: after the first step the
two runs see different boards. :func:`closed_loop` compares a few conditions by hand, edits that are functions of what is seen among them.

Not covered: worlds other than the grid of :mod:`circuitvision.data.reach`; edits that remember earlier steps (give a function of the inputs); data
sets in batches as starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.data import reach
from circuitvision.errors import InputError, checked_seed
from circuitvision.links import marked
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import wilson
from circuitvision.steering.acting import act, n_examples, policy_of

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
    def success_beside(self, condition: str) -> Result:
        """How much oftener the episodes of each condition succeed than those of this one, ``[condition example]``: paired differences, −1, 0 or 1."""
        own = self.success[self.index_of("condition", condition)]
        axes = {"condition": self.axes["condition"], "example": self.axes["example"]}
        return Result(self.success - own, axes, self.provenance)

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


@dataclass(frozen=True, eq=False)
class Rollouts:
    """See :func:`rollouts`."""

    starts: reach.ReachScenes
    texts: tuple[str, ...] | None = None
    horizon: int = 8
    seed: int = 0
    observe: Any = None
    decode: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    lends: ClassVar[bool] = False
    """Whether what it computed at a site belongs to the same pass of another run."""

    def __provenance__(self) -> dict[str, Any]:
        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "starts"}
        return {"rollouts": given, "starts": [self.starts.images(), self.starts.instructions()]}

    def inputs(self, model: Any) -> dict[str, Any]:
        """What the policy sees of the starts: the data that recipes are called with."""
        told = self.starts.instructions() if self.texts is None else self.texts
        return dict((self.observe or seen)(model, self.starts, told, self.seed))

    def __call__(self, model: Any, inputs: Mapping[str, Any], edits: Any = ()) -> Float[Tensor, "example time channel"]:
        """The episodes from the starts. Raises InputError for inputs of another number of examples."""
        count = n_examples(inputs)
        if count != len(self.starts):
            raise InputError(
                f"There are {len(self.starts)} starts and inputs of {count} examples: give the inputs of the starts, rollouts.inputs(model)."
            )
        policy = _policy(
            model, edits, self.texts, self.seed, self.observe or seen, self.decode or steps_of, self.options
        )
        found = reach.run_episodes(policy, self.starts, self.horizon)
        path = torch.from_numpy(found.path).double()
        goal = torch.zeros_like(path[..., :1])
        goal[:, -1, 0] = torch.from_numpy(found.success).double()
        return marked(torch.cat([path, goal], -1), "none")


def rollouts(
    starts: reach.ReachScenes,
    *,
    texts: Sequence[str] | None = None,
    horizon: int = 8,
    seed: int = 0,
    observe: Callable[[Any, reach.ReachScenes, Sequence[str], int], Mapping[str, Any]] | None = None,
    decode: Callable[[Any, Tensor], Int[np.ndarray, "scene chunk 2"]] | None = None,
    **options: Any,
) -> Rollouts:
    """A run function whose one run is an episode from every start: ``model.sweep(run.inputs(model), groups, "success", run=run)``.

    It returns ``[example time 3]``: the gripper's row and column at each time, and at the last whether it rests on the goal, which
    ``metrics.success()`` reads. Noise is drawn anew at every call of the policy, and is the same in all runs.

    Args:
        starts: the first boards (:func:`circuitvision.data.reach.sample_starts`).
        texts: one prompt per episode, where it is not the board's own instruction.
        horizon, seed, observe, decode, options: as of :func:`closed_loop`.

    Raises:
        InputError: no start, prompts of another number; when called: inputs of another number of examples.
        UnsupportedModelError: when called: a model that does not act.
    """
    if not isinstance(starts, reach.ReachScenes) or not len(starts):
        raise InputError(f"An episode starts from a board (reach.sample_starts), not from a {type(starts).__name__}.")
    if texts is not None and len(texts) != len(starts):
        raise InputError(f"There are {len(texts)} prompts for {len(starts)} episodes.")
    return Rollouts(starts, None if texts is None else tuple(texts), horizon, seed, observe, decode, options)


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
