"""Is this the subspace you are looking for? Statistics of one subspace of one component, flags, and a verdict, on plain tensors.

A :class:`Component` is what is known of a site: the activations of base and source runs, a function that gives the effect of other values, the
gradient of the effect, and what reads the site. :func:`illusion_statistics` runs every intervention on it, :func:`flags_of` tests them in order,
and :func:`verdict_of` says in words whether the variable is *mediated here* in normal operation, or only *controllable from here*.

Effects are per example, oriented (positive towards the source run), and ``E`` is their mean over ``scale``: by default the mean effect of the source
run itself, so that ``E = 1`` does what the source does.

    F0 nothing found     ``E_v < .1``, or interchange accuracy below a tenth of the residual stream's
    F1 exceeds component the lower end of ``E_v − E_full`` is above .2: a part does what the whole does not
    F2 row collapse      ``E_row < .5 E_v``
    F3 off-distribution  more than half of the component's outputs outside their natural 1 … 99 %
    F4 dormant           natural deviation along the read part below .05 of that along the unread one, or ``d'`` below .2 of that along ``v``
    F5 geometry null     ``E_v`` within 10 % of ``E*`` and headroom above ``.5 E_v``
    F6 control matches   a control of shuffled labels or random weights reaches ``.5 E_v``
    F7 off-manifold      ``E_on < .4 E_v``
    F8 divergence        ``D > 3``
    F9 recruited         ``ρ > .5``

"illusion-consistent" is F1 with one of F2, F3, F4, F6, F7, F9; "faithful-consistent" is ``E_full`` and ``E_row`` at least ``.8 E_v`` and none of F3,
F4, F6, F7, F9; anything else is "undetermined". F2, F5, F8 and the share of ``v`` that is not read never decide alone: any useful distributed
direction has an unread part, in faithful and unfaithful cases alike.

Not covered: effects that are no numbers per example.

Sources: Makelov et al. 2023 (arXiv 2311.17030); the reply of Wu et al. 2024 (arXiv 2401.12631); Grant et al. (ICLR 2026).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.statistics import bootstrap_interval, seed_of_draw
from circuitvision.subspaces import divergence as shifts
from circuitvision.subspaces import geometry
from circuitvision.subspaces.bases import (
    interchanged,
    matched_random_basis,
    orthonormal,
    principal_components,
    random_basis,
)

NOTHING, ILLUSION, FAITHFUL, UNDETERMINED = (
    "nothing found",
    "illusion-consistent",
    "faithful-consistent",
    "undetermined",
)
FLAGS = {
    "F0": "nothing found",
    "F1": "exceeds the whole component",
    "F2": "row part collapses",
    "F3": "component output off-distribution",
    "F4": "causal part dormant",
    "F5": "no more than the geometry gives",
    "F6": "a control matches it",
    "F7": "effect carried off-manifold",
    "F8": "activations diverge",
    "F9": "effect runs through recruited units",
}
FULL, SUBSPACE, ROW, ROW_RAW, NULL = "full component", "subspace", "row part", "row part, not renormalised", "null part"
GRADIENT, DIFFERENCE, ON = "gradient", "mean difference", "on-manifold part"


@dataclass(frozen=True)
class Thresholds:
    """What each flag is tested against, see the module."""

    nothing: float = 0.1
    nothing_accuracy: float = 0.1
    exceeds: float = 0.2
    row: float = 0.5
    off_distribution: float = 0.5
    dormant: float = 0.05
    dormant_separation: float = 0.2
    geometry: float = 0.1
    headroom: float = 0.5
    control: float = 0.5
    on_manifold: float = 0.4
    divergence: float = 3.0
    recruited: float = 0.5
    faithful: float = 0.8


@dataclass(frozen=True)
class Component:
    """One site on some examples.

    Attributes:
        base, source: the chosen entries of the two runs, one row each.
        effect: other values of all entries → the effect per example, oriented towards the source run.
        gradient: of the effect, the mean over entries.
        readers: ``A`` with ``h A``, what reads the site; None: everything.
        example: which example each entry belongs to; None: one each.
        sign: of what changes between the runs of each entry; None: 1 (an effect that is oriented has it already).
        natural: activations of unedited runs; None: base and source.
        labels: what each natural activation says; targets: what each entry should say under interchange.
        units: values of all entries → units behind the site ``[example unit]``; natural_units: theirs in natural runs.
        clamped: values of all entries, lowest and highest value of every unit → the effect with units held inside.
        scale: what effects are divided by.
        difference: ``a``, where it is taken from other pairs.
        changes: differences and gradients ``[entry d]`` of each entry, of other pairs: what the geometry null is of where classes differ in theirs.
        target_gradients: the mean gradient by target, likewise.
    """

    base: Float[Tensor, "entry d"]
    source: Float[Tensor, "entry d"]
    effect: Callable[[Tensor], Tensor]
    gradient: Float[Tensor, " d"]
    readers: Float[Tensor, "d m"] | None = None
    example: Int[Tensor, " entry"] | None = None
    sign: Float[Tensor, " entry"] | None = None
    natural: Float[Tensor, "other d"] | None = None
    labels: Sequence[Any] | None = None
    targets: Sequence[Any] | None = None
    units: Callable[[Tensor], Tensor] | None = None
    natural_units: Float[Tensor, "run unit"] | None = None
    clamped: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    scale: float = 1.0
    difference: Float[Tensor, " d"] | None = None
    changes: tuple[Tensor, Tensor] | None = None
    target_gradients: Mapping[Any, Tensor] | None = None

    @property
    def all_natural(self) -> Float[Tensor, "other d"]:
        """Activations of unedited runs."""
        return torch.cat([self.base, self.source]).double() if self.natural is None else self.natural.double()

    @property
    def mean_difference(self) -> Float[Tensor, " d"]:
        """``a``: the mean oriented difference of the two runs, summed over the entries of an example."""
        if self.difference is not None:
            return self.difference.double()
        change = (self.source - self.base).double()
        return (change if self.sign is None else change * self.sign.double()[:, None]).mean(0)

    @property
    def per_example(self) -> float:
        """Entries of an example."""
        return 1.0 if self.example is None else len(self.example) / (int(self.example.max()) + 1)


@dataclass(frozen=True)
class Statistics:
    """Every effect per example, by intervention, and every number of the report, by name; NaN where it was not measured."""

    effects: dict[str, Float[Tensor, " example"]]
    numbers: dict[str, float]
    scale: float = 1.0

    def mean(self, name: str) -> float:
        """``E`` of an intervention; NaN if it was not run."""
        return float(self.effects[name].double().mean()) / self.scale if name in self.effects else math.nan

    def interval(self, name: str, beside: str | None = None) -> tuple[float, float]:
        """The 95 % bootstrap interval of an ``E``, or of its difference to another one's."""
        values = self.effects[name].double() - (0.0 if beside is None else self.effects[beside].double())
        low, high = (bootstrap_interval(values) / self.scale).tolist()
        return (low, high) if low == low else (float(values.mean()) / self.scale,) * 2


def values_of(component: Component, basis: Float[Tensor, "d k"]) -> dict[str, Tensor]:
    """What every intervention writes into the entries, by name; parts that a basis does not have are left out."""
    base, source = component.base.double(), component.source.double()
    cut = geometry.parts(orthonormal(basis), component.readers)
    found = {FULL: source, SUBSPACE: interchanged(base, source, cut.basis)}
    if cut.row.shape[1]:
        found[ROW] = interchanged(base, source, cut.row)
        found[ROW_RAW] = base + ((source - base) @ cut.row_raw) @ cut.row_raw.T
    if cut.null.shape[1]:
        found[NULL] = interchanged(base, source, cut.null)
    for name, direction in ((GRADIENT, component.gradient), (DIFFERENCE, component.mean_difference)):
        if float(direction.norm()) > 0:
            found[name] = interchanged(base, source, direction)
    components, _ = principal_components(component.all_natural)
    found[ON] = base + (found[SUBSPACE] - base) @ components @ components.T
    return found


def illusion_statistics(
    component: Component,
    basis: Tensor,
    *,
    n_random: int = 20,
    controls: Mapping[str, Tensor] | None = None,
    effects: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> Statistics:
    """Run every intervention on one subspace and measure it.

    Args:
        component: the site on some examples.
        basis: ``[d]`` or ``[d k]``.
        n_random: how many random subspaces of its size, isotropic and in the principal components each.
        controls: bases that training found where there is nothing to find, by name.
        effects: in place of ``component.effect``, all interventions at once.
        seed: of random subspaces and halves.

    Raises:
        InputError: a basis without full rank, or of another width.
    """
    columns = orthonormal(basis)
    if columns.shape[0] != component.base.shape[1]:
        raise InputError(f"The basis has {columns.shape[0]} coordinates, the site {component.base.shape[1]}.")
    base, source, k = component.base.double(), component.source.double(), columns.shape[1]
    values = values_of(component, columns)
    for number in range(n_random):
        values[f"random {number + 1}"] = interchanged(
            base, source, random_basis(len(columns), k, seed_of_draw(seed, number))
        )
        try:
            drawn = matched_random_basis(component.all_natural, k, seed_of_draw(seed, number))
        except InputError:
            continue
        values[f"matched random {number + 1}"] = interchanged(base, source, drawn)
    for name, other in (controls or {}).items():
        values[name] = interchanged(base, source, other)
    run = effects or (lambda named: {name: component.effect(value) for name, value in named.items()})
    measured = {name: value.detach().cpu().double() for name, value in run(values).items()}
    numbers = _geometry_numbers(component, columns)
    numbers |= _output_numbers(component, values[SUBSPACE]) | _natural_numbers(component, columns, seed)
    numbers |= _behind(component, values[SUBSPACE], measured[SUBSPACE])
    if component.targets is not None and component.labels is not None:
        numbers["divergence"] = shifts.divergence(
            values[SUBSPACE], component.targets, component.all_natural, component.labels, seed
        )
    changed = values[SUBSPACE] - base
    off = (values[SUBSPACE] - values[ON]).square().sum() / changed.square().sum().clamp_min(1e-300)
    numbers["off-manifold energy"] = float(off)
    return Statistics(measured, numbers, component.scale)


def _geometry_numbers(component: Component, basis: Float[Tensor, "d k"]) -> dict[str, float]:
    cut = geometry.parts(basis, component.readers)
    a, g = component.mean_difference, component.gradient.double()
    null = geometry.geometry_null(a, g)
    share = component.per_example / component.scale
    bound, full, best = null.bound, null.full, null.direction
    if component.changes is not None:
        bound, full, best = geometry.geometry_null_of(*component.changes, basis.shape[1])
    return {
        "row norm": cut.row_norm,
        "null norm": cut.null_norm,
        "rank of readers": float(cut.rank),
        "cos(v, g)": geometry.inside(basis, g),
        "cos(v, a)": geometry.inside(basis, a),
        "cos(v, v*)": geometry.inside(basis, best),
        "cos(a, g)": null.cosine,
        "E*": bound * share,
        "headroom": (bound - max(full, 0.0)) * share,
    }


def _output_numbers(component: Component, patched: Tensor) -> dict[str, float]:
    """The component's output along the gradient there, ``h · g`` (of several targets along each one's own): natural and patched."""
    targets = list(component.targets or [None] * len(patched))
    by_target = component.target_gradients or {}
    outside, gaps = 0, []
    for target in dict.fromkeys(targets):
        g = by_target.get(target, component.gradient).double()
        natural, here = component.all_natural @ g, torch.tensor([one == target for one in targets])
        found = patched.double()[here] @ g
        low, high = torch.quantile(natural, torch.tensor([0.01, 0.99], dtype=natural.dtype)).tolist()
        # Where activations never vary along g, rounding must not count.
        slack = 1e-9 * float(component.base.double().norm(dim=1).max() * g.norm())
        outside += int(((found < low - slack) | (found > high + slack)).sum())
        own = (
            natural[torch.tensor([label == target for label in component.labels or ()])]
            if component.labels
            else natural[:0]
        )
        if len(own) > 1 and float(own.std()) > 0:
            gaps.append(abs(float(found.mean() - own.mean())) / float(own.std()))
    return {
        "off-distribution share": outside / len(patched),
        "output distance": sum(gaps) / len(gaps) if gaps else math.nan,
    }


def _natural_numbers(component: Component, basis: Float[Tensor, "d k"], seed: int) -> dict[str, float]:
    """Dormancy: how activations vary, and separate classes, along the read part."""
    natural, cut = component.all_natural, geometry.parts(basis, component.readers)
    along = {
        name: geometry.deviation(natural, own) for name, own in (("row", cut.row), ("null", cut.null), ("v", basis))
    }
    apart = {
        name: geometry.separation(natural, own, component.labels) for name, own in (("row", cut.row), ("v", basis))
    }
    usual = math.nan
    if cut.row.shape[1]:
        space = (
            torch.eye(len(basis), dtype=torch.float64)
            if component.readers is None
            else geometry.span(component.readers)
        )
        drawn = [
            space @ random_basis(space.shape[1], min(cut.row.shape[1], space.shape[1]), seed_of_draw(seed, n))
            for n in range(50)
        ]
        usual = float(torch.tensor([geometry.deviation(natural, one) for one in drawn]).median())
    return {
        "deviation along row": along["row"],
        "deviation along null": along["null"],
        "deviation along v": along["v"],
        "deviation along row, of random rows": along["row"] / usual if usual else math.nan,
        "d' along row": apart["row"],
        "d' along v": apart["v"],
    }


def _behind(component: Component, patched: Tensor, effect: Float[Tensor, " example"]) -> dict[str, float]:
    """Units behind the site: how many are recruited, and the share of the effect that runs through them."""
    if component.units is None or component.clamped is None:
        return {"recruited units": math.nan, "rho": math.nan}
    natural = component.natural_units
    if natural is None:
        natural = torch.cat([component.units(component.base.double()), component.units(component.source.double())])
    low, high = shifts.natural_range(natural)
    outside = shifts.recruited(component.units(patched).double(), low, high)
    clamped = component.clamped(patched, low, high).detach().cpu()
    # A unit out of every hundred is outside at each end by how the range is made.
    return {
        "recruited units": float(outside.double().sum(1).mean()),
        "rho": shifts.recruitment(effect, clamped),
    }


# -- flags and verdict -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the numbers say: the flags that hold (with those that could not be tested), a label, and a sentence."""

    flags: list[str]
    untested: list[str]
    label: str
    sentence: str
    also: str = field(default="")


def flags_of(
    found: Statistics,
    thresholds: Thresholds | None = None,
    *,
    accuracy: float = math.nan,
    anchor: float = math.nan,
    controls: Sequence[str] = (),
    tie: float = math.nan,
) -> dict[str, bool | None]:
    """Every flag, None where it could not be tested.

    ``accuracy`` and ``anchor`` are interchange accuracies of the subspace and of the residual stream. ``tie`` is the ``E`` of an undecided answer,
    where controls are trained by cross-entropy: on shuffled labels that is the best they can do, and where the subspace goes beyond it, what counts
    is how far a control does.
    """
    limit, number = thresholds or Thresholds(), found.numbers
    v, row = found.mean(SUBSPACE), found.mean(ROW)
    nothing = v < limit.nothing or (accuracy < limit.nothing_accuracy * anchor)
    ratios = (
        _ratio(number["deviation along row"], number["deviation along null"]),
        _ratio(number["d' along row"], number["d' along v"]),
    )
    dormant = [
        ratio < bound
        for ratio, bound in zip(ratios, (limit.dormant, limit.dormant_separation), strict=True)
        if ratio == ratio
    ]
    floor = tie if v > tie else 0.0
    beside = [found.mean(name) - floor for name in controls]
    return {
        "F0": nothing,
        "F1": found.interval(SUBSPACE, FULL)[0] > limit.exceeds,
        "F2": _told(row, row < limit.row * v),
        "F3": number["off-distribution share"] > limit.off_distribution,
        "F4": any(dormant) if dormant else None,
        "F5": _told(
            number["E*"],
            abs(v - number["E*"]) <= limit.geometry * abs(number["E*"]) and number["headroom"] > limit.headroom * v,
        ),
        "F6": any(one >= limit.control * (v - floor) for one in beside) if beside else None,
        "F7": found.mean(ON) < limit.on_manifold * v,
        "F8": _told(number.get("divergence", math.nan), number.get("divergence", math.nan) > limit.divergence),
        "F9": _told(number["rho"], number["rho"] > limit.recruited),
    }


def _told(value: float, holds: bool) -> bool | None:
    return None if value != value else holds


def _ratio(one: float, other: float) -> float:
    return one / other if other == other and other > 0 else math.nan


def verdict_of(found: Statistics, flags: Mapping[str, bool | None], thresholds: Thresholds | None = None) -> Verdict:
    """The label and its sentence, by the order of the module."""
    limit = thresholds or Thresholds()
    held = [name for name, value in flags.items() if value]
    untested = [name for name, value in flags.items() if value is None]
    v, full, row = found.mean(SUBSPACE), found.mean(FULL), found.mean(ROW)
    decisive = {"F2", "F3", "F4", "F6", "F7", "F9"}
    illusion = "F1" in held and bool(decisive & set(held))
    faithful = (
        full >= limit.faithful * v and row >= limit.faithful * v and not {"F3", "F4", "F6", "F7", "F9"} & set(held)
    )
    said = f"{', '.join(FLAGS[name] for name in held if name != 'F0')}"
    if "F0" in held:
        also = f"Beside that: {said}." if said else ""
        return Verdict(
            held,
            untested,
            NOTHING,
            "No evidence that the variable is here: interchange in the subspace hardly changes the answer.",
            also,
        )
    if illusion:
        sentence = f"The output can be controlled from here, but nothing says that the variable is mediated here in normal operation ({said})."
        return Verdict(held, untested, ILLUSION, sentence)
    if faithful:
        sentence = "What is measured is consistent with the variable being mediated here in normal operation: the whole component does as much."
        return Verdict(held, untested, FAITHFUL, sentence)
    because = said or f"the whole component does {full:.2f}, the read part {row:.2f}, the subspace {v:.2f}"
    return Verdict(
        held,
        untested,
        UNDETERMINED,
        f"The output can be controlled from here; whether the variable is mediated here is undetermined ({because}).",
    )
