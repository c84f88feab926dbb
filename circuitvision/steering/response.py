"""The steering response: how far a metric of the actions moves as neurons are set to larger and larger values, beside random sets of equal size.

Every set is edited at every position and every pass of the policy (each denoising step, each decoding step), and the effect is
``metric(steered) − metric(unsteered)`` per example, the same noise in both. Over the scales ``s`` it gives

* the *slope*, the least-squares slope of the effect on ``s`` per example, and *R²* of that line through the mean effect: steering that works is
  monotone and, while it lasts, linear;
* the *saturation*: the scale after which the curve is flat;
* a *p* value: the share of random sets whose slope is as large, ``(1 + #{|slope_r| ≥ |slope|}) / (1 + R)``.

Overwriting sets neurons to one constant whatever their natural scale is: ``natural_mean`` and ``natural_std`` keep that scale, and with
``units="deviation"`` scales count natural standard deviations from each neuron's natural mean, for random sets theirs.

Reference: Haon et al. 2025 (arXiv 2509.00328).

Not covered: scales that differ between neurons in one call (give :meth:`NeuronSet.edits` one value each), several metrics at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import metrics
from circuitvision.errors import InputError
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.steering.acting import Part, Policy, parts, passes, policy_of
from circuitvision.steering.neurons import METHODS, NeuronSet, random_neurons

CHOSEN = "chosen"
SCALES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
FLAT = 0.1
"""Share of the steepest local slope below which the curve counts as flat."""


@dataclass(frozen=True, eq=False)
class SteeringResponse(Result):
    """Effects of steering, ``values`` ``[set scale example]``: the first set is ``"chosen"``, the others are random ones of equal size.

    ``base`` ``[example]`` is the metric without steering. ``neurons`` holds every set as ``[layer, neuron]``; ``natural_mean`` and ``natural_std``
    are those of the chosen neurons' own values over positions, passes and examples.
    """

    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    neurons: list[list[list[int]]] = field(default_factory=list)
    natural_mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    natural_std: Tensor = field(default_factory=lambda: torch.zeros(0))
    tower: str = ""
    name: str = ""
    method: str = "overwrite"
    units: str = "value"

    _per_example: ClassVar[dict[str, int]] = {"base": -1}

    @property
    def scales(self) -> Float[Tensor, " scale"]:
        """The scales as numbers."""
        return torch.tensor(self.axes["scale"], dtype=torch.float64)

    @property
    def effect(self) -> Float[Tensor, " scale"]:
        """The mean effect of the chosen set."""
        return self.mean()[0]

    @property
    def random(self) -> Float[Tensor, "draw scale"]:
        """The mean effects of the random sets."""
        return self.mean()[1:]

    def slopes(self) -> Result:
        """The least-squares slope of the effect on the scale, ``[set example]``: ``Σ (s − s̄) e / Σ (s − s̄)²``. Raises InputError for one scale."""
        away = self._away()
        values = torch.einsum("s,ase->ae", away, self.values.double()) / away.square().sum()
        axes = {"set": self.axes["set"], "example": self.axes["example"]}
        return Result(values, axes, {**self.provenance, "method": "slopes of a steering response"})

    @property
    def slope(self) -> float:
        """The mean slope of the chosen set."""
        return float(self.slopes().mean()[0])

    @property
    def r_squared(self) -> Float[Tensor, " set"]:
        """How much of the variance over scales of each set's mean effect a line explains; NaN where nothing moves."""
        away, mean = self._away(), self.mean()
        centred = mean - mean.mean(-1, keepdim=True)
        line = (centred @ away)[:, None] / away.square().sum() * away
        return 1 - (centred - line).square().sum(-1) / centred.square().sum(-1)

    @property
    def p_value(self) -> float:
        """The share of random sets with as large a slope, counting the chosen one itself; NaN without random sets."""
        found = self.slopes().mean().abs()
        if len(found) < 2:
            return float("nan")
        return (1 + int((found[1:] >= found[0]).sum())) / len(found)

    def saturation(self, share: float = FLAT) -> float:
        """The smallest scale of the chosen curve from which on every local slope, rising along the scales, is at most ``share`` of the steepest;
        NaN if it never gets flat."""
        order = self.scales.argsort()
        scales, effect = self.scales[order], self.effect[order]
        local = ((effect[1:] - effect[:-1]) / (scales[1:] - scales[:-1])).abs()
        if not len(local) or not bool(local.max() > 0):
            return float("nan")
        flat = (local <= share * local.max()).flip(0).int().cumprod(0).flip(0).bool()
        return float(scales[int(flat.int().argmax())]) if bool(flat.any()) else float("nan")

    def deviations(self) -> Float[Tensor, "scale neuron"]:
        """Where each scale puts every chosen neuron, in natural standard deviations from its natural mean (of overwritten neurons)."""
        if self.method != "overwrite":
            raise InputError(f"Neurons that are edited by {self.method!r} are put nowhere; only 'overwrite' sets them.")
        if self.units == "deviation":
            return self.scales[:, None].expand(-1, len(self.natural_mean))
        return (self.scales[:, None] - self.natural_mean) / self.natural_std

    def highlights(self) -> dict[str, str]:
        """Slope, R², p value and saturation."""
        return {
            "slope": f"{self.slope:+.3g} per unit of scale",
            "R²": f"{float(self.r_squared[0]):.2f}",
            "p (random sets)": f"{self.p_value:.3g}",
            "saturation": f"{flat:.3g}" if (flat := self.saturation()) == flat else "not reached",
        }

    def _away(self) -> Tensor:
        if len(self.axes["scale"]) < 2:
            raise InputError("A slope needs at least two scales.")
        return self.scales - self.scales.mean()


@with_provenance
def steering_response(
    model: Any,
    data: Any,
    neurons: NeuronSet,
    metric: Any,
    scales: Sequence[float] = SCALES,
    *,
    method: str = "overwrite",
    units: str = "value",
    n_random: int = 20,
    random: Sequence[NeuronSet] | None = None,
    match: str = "layer",
    positions: Any = None,
    steps: Any = None,
    policy: Policy | None = None,
    example_batch: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SteeringResponse:
    """Steer by a set of neurons and by random ones, at every scale, and measure how far the actions move: ``(1 + n_random) · len(scales)`` runs.

    Args:
        model: the hooked model, a policy.
        data: inputs, or a data set (of pairs the clean side).
        neurons: the set, such as :func:`promoting_neurons` or ``clusters.neurons(3)``.
        metric: of actions ``[example step dim]``, one number per example: a function, ``cv.metrics.action_dim(1, step=None)``, or a dimension's
            number, which is its mean over the chunk.
        scales: the values.
        method: ``"overwrite"``, ``"add"`` or ``"scale"``, see :meth:`NeuronSet.edits`.
        units: ``"value"``, or ``"deviation"``: natural standard deviations (from the natural mean, where neurons are overwritten).
        n_random, match, seed: how many random sets, and how they are drawn, see :func:`random_neurons`.
        random: in place of these, sets of one's own as the control.
        positions, steps: where the neurons are edited; None is everywhere and at every step.
        policy: in place of :func:`act`, a function ``(model, inputs, edits)`` that returns actions.
        example_batch: how many examples of a data set run at once; None: by memory.
        progress: whether progress is shown.

    Raises:
        InputError: an unknown method or units, no scale or one twice, dropout in training mode, an unknown neuron.
        UnsupportedModelError: a model that does not act.
    """
    run = policy_of(model, policy)
    _check(neurons, scales, method, units, model)
    tower = model.towers[neurons.tower]
    sets = [neurons, *(random_neurons(tower, neurons, n_random, seed=seed, match=match) if random is None else random)]
    measure = metric_of_actions(metric)
    pieces = list(parts(model, data, example_batch, seed))
    natural = _natural(model, pieces, sets if units == "deviation" else sets[:1], run)
    base = [_measured(measure, run(model, part.inputs, []), part) for part in pieces]
    values = torch.empty(len(sets), len(scales), sum(map(len, base)), dtype=base[0].dtype)
    for number, one in enumerate(track(sets, "steering") if progress else sets):
        for place, scale in enumerate(scales):
            value = _value(float(scale), method, units, natural[number] if units == "deviation" else None)
            group = one.edits(value, method, positions=positions, steps=steps)
            found = [_measured(measure, run(model, part.inputs, part.own(group)), part) for part in pieces]
            values[number, place] = torch.cat(found) - torch.cat(base)
    names = [CHOSEN, *(f"random {number}" for number in range(len(sets) - 1))]
    labels = [label for part in pieces for label in part.labels]
    return SteeringResponse(
        values=values,
        axes={"set": names, "scale": [float(scale) for scale in scales], "example": labels},
        provenance=describe(
            model, method=f"steering_response(method={method}, units={units})", metric=measure, seed=seed
        ),
        base=torch.cat(base),
        neurons=[[list(place) for place in one] for one in sets],
        natural_mean=natural[0][0],
        natural_std=natural[0][1],
        tower=neurons.tower,
        name=str(neurons),
        method=method,
        units=units,
    )


def metric_of_actions(metric: Any) -> Any:
    """A metric of actions: a dimension's number is its mean over the chunk."""
    if isinstance(metric, int) and not isinstance(metric, bool):
        return replace(metrics.action_dim(metric, step=None), name=f"action dim {metric}")
    if not callable(metric):
        raise InputError(f"A metric of actions is a function of them, or a dimension's number, not {metric!r:.80}.")
    return metric


def _check(neurons: Any, scales: Sequence[float], method: str, units: str, model: Any) -> None:
    if not isinstance(neurons, NeuronSet):
        raise InputError(
            f"neurons is a NeuronSet (promoting_neurons, clusters.neurons(3), NeuronSet.of), not a {type(neurons).__name__}."
        )
    if neurons.tower not in model.towers:
        raise InputError(f"The neurons are of the tower {neurons.tower!r}; this model has {', '.join(model.towers)}.")
    if method not in METHODS or units not in ("value", "deviation") or (method, units) == ("scale", "deviation"):
        raise InputError(
            f"method={method!r} with units={units!r} is not understood: 'overwrite' and 'add' in units of 'value' or 'deviation', 'scale' in 'value'."
        )
    if not len(scales) or len({float(scale) for scale in scales}) < len(scales):
        raise InputError("Give at least one scale, and each of them once.")


def _measured(metric: Any, actions: Tensor, part: Part) -> Tensor:
    return metrics.evaluate(metric, actions, part.inputs).detach().cpu().double()


def _value(scale: float, method: str, units: str, natural: tuple[Tensor, Tensor] | None) -> Any:
    """What the neurons get at a scale."""
    if natural is None or units == "value":
        return scale
    mean, spread = natural
    return mean + scale * spread if method == "overwrite" else scale * spread


def _natural(model: Any, pieces: Sequence[Part], sets: Sequence[NeuronSet], run: Policy) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the neurons' own values over everything but padding, of every set in its order."""
    sites = {layer: site for one in sets for layer, site in one.sites.items()}
    moments = {layer: torch.zeros(3, sets[0].d_mlp, dtype=torch.float64) for layer in sites}
    for part in pieces:
        there = torch.from_numpy(model.tokens(part.inputs)[sets[0].tower].kind != "padding")
        with model.record(list(sites.values())) as cache:
            run(model, part.inputs, [])
        for layer, site in sites.items():
            for value in passes(cache[site], site):
                own = value.detach().cpu().double()
                own = own[there] if own.shape[:-1] == there.shape else own.flatten(0, -2)
                moments[layer] += torch.stack([torch.full_like(own[0], len(own)), own.sum(0), own.square().sum(0)])
    found = []
    for one in sets:
        count, total, square = torch.stack([moments[layer][:, neuron] for layer, neuron in one], 1)
        mean = total / count
        found.append((mean, (square / count - mean.square()).clamp(min=0).sqrt()))
    return found
