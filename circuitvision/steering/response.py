"""The steering response: how far a metric moves as activations are moved along a direction, or neurons set to a value, beside random controls.

A direction is added at its site (``edits.steer``), beside random directions of equal length; neurons are set, beside random sets of equal size. Both
act at every position and every pass (each denoising step, each decoding step) unless some are named, and the effect is ``metric(steered) −
metric(unsteered)`` per example, the same noise in both. Over the scales ``s`` it gives

* the *slope*, the least-squares slope of the effect on ``s`` per example, and *R²* of that line through the mean effect: steering that works is
  monotone and, while it lasts, linear; a *p* value: the share of controls whose slope is as large, ``(1 + #{|slope_r| ≥ |slope|}) / (1 + R)``;
* the *tangent*, the slope at scale 0, where scale 0 changes nothing: of the parabola through 0 and the effects at the two scales nearest to it, exact
  up to the third derivative of the curve;
* the *linear range*, the scales up to which the mean effect stays near its tangent, and the *saturation*, the scale after which the curve is flat;
* the *norm ratio* ``‖h'‖ / ‖h‖`` of the steered activations: far from 1 they are nothing that the model ever made (off the manifold).

Overwriting sets neurons to one constant whatever their natural scale is: ``natural_mean`` and ``natural_std`` keep that scale, and with
``units="deviation"`` scales count natural standard deviations from each neuron's natural mean, for random sets theirs.

Reference: Haon et al. 2025 (arXiv 2509.00328); Turner et al. 2023 (arXiv 2308.10248).

Not covered: scales that differ between neurons in one call (give :meth:`NeuronSet.edits` one value each), several metrics at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits, metrics
from circuitvision.errors import InputError
from circuitvision.metric_set import MetricSet
from circuitvision.model.edits.writes import steered
from circuitvision.model.positions import Positions
from circuitvision.model.run_functions import RunFunction, act, acts
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.clean_answers import check_data
from circuitvision.provenance import with_provenance
from circuitvision.readout.probes.streaming import Batch, Reading
from circuitvision.results import Result
from circuitvision.steering.acting import Part, parts, passes
from circuitvision.steering.directions import MODES, Direction, random_directions
from circuitvision.steering.neurons import METHODS, NeuronSet, random_neurons

CHOSEN = "chosen"
SCALES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
CURVED = 0.25
"""Share of the tangent by which a curve that leaves it differs."""
SAME_LENGTH = 1e-3
"""Relative difference of lengths up to which directions count as equally long: what half precision rounds."""
FLAT = 0.1
"""Share of the steepest local slope below which the curve counts as flat."""


@dataclass(frozen=True, eq=False)
class SteeringResponse(Result):
    """Effects of steering, ``values`` ``[set scale example]``: the first set is ``"chosen"``, the others are random ones of equal size or length.

    ``base`` ``[example]`` is the metric without steering. Of neurons ``neurons`` holds every set as ``[layer, neuron]``; ``natural_mean`` and
    ``natural_std`` are those of the chosen neurons' own values over positions, passes and examples. Of directions ``vectors`` ``[set *head d]`` are
    theirs at ``site``, and ``norm_ratio`` ``[scale example]`` is that of the chosen one.
    """

    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    neurons: list[list[list[int]]] = field(default_factory=list)
    natural_mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    natural_std: Tensor = field(default_factory=lambda: torch.zeros(0))
    tower: str = ""
    name: str = ""
    method: str = "overwrite"
    units: str = "value"
    site: str = ""
    vectors: Tensor = field(default_factory=lambda: torch.zeros(0))
    norm_ratio: Tensor = field(default_factory=lambda: torch.zeros(0))

    _per_example: ClassVar[dict[str, int]] = {"base": -1, "norm_ratio": -1}

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

    @with_provenance
    def tangents(self) -> Result:
        """The slope of the effect at scale 0, ``[set example]``, see the module.

        Raises:
            InputError: fewer than two scales other than 0, or a method by which scale 0 is a change (overwriting, scaling).
        """
        if self.method in ("overwrite", "scale"):
            raise InputError(
                f"Under {self.method!r} scale 0 is itself a change, so there is no tangent there: take slopes()."
            )
        near = sorted((abs(scale), place) for place, scale in enumerate(self.axes["scale"]) if scale)[:2]
        if len(near) < 2:
            raise InputError("A tangent needs two scales besides 0, of which one may be negative.")
        one, two = (place for _, place in near)
        s, t = float(self.scales[one]), float(self.scales[two])
        effect = self.values.double()
        values = (effect[:, one] * t * t - effect[:, two] * s * s) / (s * t * t - t * s * s)
        axes = {"set": self.axes["set"], "example": self.axes["example"]}
        return Result(values, axes, {**self.provenance, "method": "tangents of a steering response"})

    def linear_range(self, share: float = CURVED) -> tuple[float, float]:
        """The lowest and the highest scale up to which, from 0 on, the mean effect stays within this share of its tangent at 0: where the curve
        leaves it. An end is 0 where it leaves at the first scale, and the outermost scale where it never does."""
        slope = float(self.tangents().mean()[0])
        kept = [0.0, 0.0]
        for end, sign in enumerate((-1.0, 1.0)):
            side = sorted((abs(s), place) for place, s in enumerate(self.axes["scale"]) if s * sign > 0)
            for scale, place in side:
                line = slope * sign * scale
                if abs(float(self.effect[place]) - line) > share * abs(line):
                    break
                kept[end] = sign * scale
        return kept[0], kept[1]

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
        """Slope, R², p value and saturation; of a direction the range in which it is linear, and its norm ratio at the largest scale."""
        found = {
            "slope": f"{self.slope:+.3g} per unit of scale",
            "R²": f"{float(self.r_squared[0]):.2f}",
            "p (random sets)": f"{self.p_value:.3g}",
            "saturation": f"{flat:.3g}" if (flat := self.saturation()) == flat else "not reached",
        }
        if self.norm_ratio.numel():
            last = int(self.scales.abs().argmax())
            ratio = float(self.mean(quantity="norm_ratio")[last])
            found["norm ratio"] = f"{ratio:.2f} at scale {float(self.scales[last]):.3g}"
        return found

    def _away(self) -> Tensor:
        if len(self.axes["scale"]) < 2:
            raise InputError("A slope needs at least two scales.")
        return self.scales - self.scales.mean()


@with_provenance
def steering_response(
    model: Any,
    data: Any,
    chosen: NeuronSet | Direction,
    metric: Any,
    scales: Sequence[float] = SCALES,
    *,
    method: str | None = None,
    units: str = "value",
    n_random: int = 20,
    random: Sequence[NeuronSet] | Sequence[Direction] | None = None,
    match: str = "layer",
    positions: Any = None,
    steps: Any = None,
    policy: RunFunction | None = None,
    example_batch: int | None = None,
    seed: int = 0,
    allow_wrong: bool = False,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> SteeringResponse:
    """Steer along a direction, or by a set of neurons, and along random ones, at every scale, and measure how far the metric moves: one sweep of
    ``(1 + n_random) · len(scales)`` runs.

    Args:
        model: the hooked model.
        data: inputs, or a data set (of pairs the clean side). What a model starts from at random is each example's own, the same in all runs.
        chosen: a direction (:func:`steering_direction`, :meth:`Direction.of`), or a set of neurons (:func:`promoting_neurons`).
        metric: a metric or its name; of a policy one of actions ``[example step dim]``: a function, ``cv.metrics.action_dim(1, step=None)``, or a
            dimension's number, which is its mean over the chunk.
        scales: the values.
        method: of neurons ``"overwrite"`` (None), ``"add"`` or ``"scale"``, see :meth:`NeuronSet.edits`; of a direction the ``mode`` of
            ``edits.steer``: ``"add"`` (None), ``"norm_preserving"`` or ``"project_out"``.
        units: ``"value"``: of neurons the activation, of a direction multiples of it. ``"deviation"``: natural standard deviations (of overwritten
            neurons from the natural mean; along a direction that was built from data, those within its kinds).
        n_random, match, seed: how many random controls, and how neurons are drawn, see :func:`random_neurons`; directions are of equal length.
        random: in place of these, controls of one's own: directions of the same site, heads and length, or as many neurons of the same tower.
        positions, steps: where it is steered; None is everywhere and at every step.
        policy: what one run is, a function ``(model, inputs, edits)``; None is :func:`act` for a model that acts, else one forward pass.
        allow_wrong: whether the clean runs may give other answers than the data set says, see :mod:`circuitvision.patching.clean_answers`.
        example_batch, save_to, resume, progress: as of ``model.sweep``.

    Raises:
        InputError: an unknown method or units, no scale or one twice, dropout in training mode, an unknown neuron, a site that is not there,
            controls of another site, length or size, clean runs that do not give the answer.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Steering")
    run = act if policy is None and acts(model) else policy
    method = _checked(model, chosen, scales, method, units)
    if isinstance(chosen, Direction):
        sets: list[Any] = [chosen, *(random_directions(chosen, n_random, seed) if random is None else random)]
    else:
        tower = model.towers[chosen.tower]
        sets = [
            chosen,
            *(random_neurons(tower, chosen, n_random, seed=seed, match=match) if random is None else random),
        ]
    _check_controls(chosen, sets[1:])
    measure = metric_of_actions(metric) if acts(model) else metric
    check_data(model, data, MetricSet.of(measure), allow_wrong, example_batch, run=run)
    natural = _natural_of(model, data, sets, run, units, example_batch)
    groups = [
        one.edits(_value(float(scale), method, units, there), method, positions=positions, steps=steps)
        for one, there in zip(sets, natural, strict=True)
        for scale in scales
    ]
    names = [CHOSEN, *(f"random {number}" for number in range(len(sets) - 1))]
    axes: dict[str, list[Any]] = {"set": names, "scale": [float(scale) for scale in scales]}
    swept = model.sweep(
        data,
        groups,
        measure,
        axes=axes,
        run=run,
        example_batch=example_batch,
        save_to=save_to,
        resume=resume,
        progress=progress,
    )
    given = {"method": f"steering_response(method={method}, units={units})", "seed": seed}
    if isinstance(chosen, Direction):
        own: dict[str, Any] = {
            "site": chosen.site,
            "vectors": torch.stack([one.vector for one in sets]),
            "norm_ratio": norm_ratios(model, data, chosen, groups[: len(scales)], positions, example_batch),
        }
    else:
        own = {
            "neurons": [[list(place) for place in one] for one in sets],
            "natural_mean": natural[0][0],
            "natural_std": natural[0][1],
        }
    return SteeringResponse(
        values=swept.values.double() - swept.clean.double(),
        axes={**axes, "example": swept.axes["example"]},
        provenance={**swept.provenance, **given},
        base=swept.clean.double(),
        tower=chosen.tower,
        name=str(chosen),
        method=method,
        units=units,
        **own,
    )


def metric_of_actions(metric: Any) -> Any:
    """A metric of actions: a dimension's number is its mean over the chunk."""
    if isinstance(metric, int) and not isinstance(metric, bool):
        return replace(metrics.action_dim(metric, step=None), name=f"action dim {metric}")
    if not callable(metric):
        raise InputError(f"A metric of actions is a function of them, or a dimension's number, not {metric!r:.80}.")
    return metric


def _checked(model: Any, chosen: Any, scales: Sequence[float], method: str | None, units: str) -> str:
    """The method, where everything fits; raises InputError."""
    if not isinstance(chosen, (NeuronSet, Direction)):
        raise InputError(
            f"Steering is by a NeuronSet (promoting_neurons, NeuronSet.of) or a Direction (steering_direction, Direction.of), not a "
            f"{type(chosen).__name__}."
        )
    if chosen.tower not in model.towers:
        raise InputError(f"What steers is of the tower {chosen.tower!r}; this model has {', '.join(model.towers)}.")
    known = MODES if isinstance(chosen, Direction) else METHODS
    method = known[0] if method is None else method
    if (
        method not in known
        or units not in ("value", "deviation")
        or (method != "add" and units == "deviation" and method not in ("overwrite",))
    ):
        raise InputError(
            f"method={method!r} with units={units!r} is not understood: {', '.join(map(repr, known))} in units of 'value', 'add' and 'overwrite' in "
            "those of 'deviation' as well."
        )
    if units == "deviation" and isinstance(chosen, Direction) and chosen.natural_deviation != chosen.natural_deviation:
        raise InputError("A direction of one's own has no natural deviation: give units='value'.")
    if not len(scales) or len({float(scale) for scale in scales}) < len(scales):
        raise InputError("Give at least one scale, and each of them once.")
    return method


def _check_controls(chosen: NeuronSet | Direction, controls: Sequence[Any]) -> None:
    """Raise InputError for controls that another place, length or size would tell from what is steered by."""
    for one in controls:
        if isinstance(chosen, NeuronSet) and isinstance(one, NeuronSet):
            if (one.tower, len(one)) != (chosen.tower, len(chosen)):
                raise InputError(
                    f"Controls are {len(chosen)} neurons of the {chosen.tower} tower, and {str(one)!r:.60} is {len(one)} of {one.tower}."
                )
            continue
        if not isinstance(chosen, Direction) or not isinstance(one, Direction):
            raise InputError(
                f"Controls of a {type(chosen).__name__} are {type(chosen).__name__}s, and {one!r:.60} is not."
            )
        if one.vector.shape != chosen.vector.shape:
            raise InputError(
                f"Controls are directions of the shape {list(chosen.vector.shape)}, and {str(one)!r} has {list(one.vector.shape)}."
            )
        if (one.site, one.heads) != (chosen.site, chosen.heads):
            raise InputError(
                f"Controls are directions at {chosen.site} (heads {chosen.heads}), and {str(one)!r} is at {one.site} ({one.heads})."
            )
        if not math.isclose(one.norm, chosen.norm, rel_tol=SAME_LENGTH):
            raise InputError(
                f"Controls are as long as the direction, {chosen.norm:.4g}, and {str(one)!r} is {one.norm:.4g} long: scale its vector to that."
            )


def _value(scale: float, method: str, units: str, natural: tuple[Tensor, Tensor]) -> Any:
    """What is given to the neurons, or along the direction, at a scale."""
    if units == "value":
        return scale
    mean, spread = natural
    return mean + scale * spread if method == "overwrite" else scale * spread


def _natural_of(
    model: Any, data: Any, sets: Sequence[Any], run: RunFunction | None, units: str, size: int | None
) -> list[tuple[Any, Any]]:
    """Mean and spread of every set's own values; along a direction no mean, and the spread as a share of its length."""
    if isinstance(sets[0], Direction):
        spread = sets[0].natural_deviation / sets[0].norm
        return [(torch.zeros(0), float(spread) if units == "deviation" else torch.zeros(0))] * len(sets)
    pieces = list(parts(model, data, size))
    found = _natural(model, pieces, sets if units == "deviation" else sets[:1], run or forward)
    return found if units == "deviation" else found * len(sets)


def norm_ratios(
    model: Any,
    data: Any,
    chosen: Direction,
    groups: Sequence[Sequence[edits.Edit]],
    positions: Any,
    example_batch: int | None = None,
) -> Float[Tensor, "scale example"]:
    """``‖h'‖ / ‖h‖`` of the steered activations, the mean over the steered positions (and heads) of each example, in one forward pass."""
    heads = slice(None) if chosen.heads is None else chosen.heads
    moves: list[Any] = [group[0] for group in groups]

    def reduce(site: str, value: Tensor, batch: Batch) -> Tensor:
        tokens, dropped = batch.layout(site, value)
        mask = torch.from_numpy(tokens.present.any(1, keepdims=True) if dropped is None else tokens.present)
        if dropped is not None:
            asked = Positions.of(positions).taken(batch.examples).resolve(tokens)
            mask = (mask & asked)[:, dropped:]
            value = value[mask.to(value.device)]
        example = torch.from_numpy(tokens.example)[mask.nonzero()[:, 0]]
        own = value.detach().cpu().double()
        own = own[:, heads] if own.ndim > 2 else own
        before = own.norm(dim=-1).clamp_min(1e-300)
        found = torch.full((len(moves), len(batch.examples)), torch.nan, dtype=torch.float64)
        for number, edit in enumerate(moves):
            after = steered(own, edit.direction.tensor.double(), edit.scale, edit.mode).norm(dim=-1)
            ratio = (after / before).flatten(1).mean(1) if own.ndim > 2 else after / before
            sums = torch.zeros(len(batch.examples), dtype=torch.float64).index_add_(0, example, ratio)
            found[number] = sums / torch.bincount(example, minlength=len(batch.examples))
        return found

    reading = Reading(model, data, [chosen.site], reduce, batch_size=example_batch or 32, description="norms")
    return torch.cat([found[chosen.site] for _, found in reading], dim=-1)


def forward(model: Any, inputs: Any, group: Any) -> Tensor:
    """One forward pass as a run function."""
    found: Tensor = model.run(inputs, group)
    return found


def _natural(
    model: Any, pieces: Sequence[Part], sets: Sequence[NeuronSet], run: RunFunction
) -> list[tuple[Tensor, Tensor]]:
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
