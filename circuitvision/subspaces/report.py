"""The illusion report of a subspace of a model: every intervention on held-out pairs, controls trained where there is nothing, and a verdict.

Interventions, statistics, flags and their order are those of :mod:`circuitvision.subspaces.illusion`; here they meet a model. Directions that are
taken from data (gradient, mean difference) and controls come from training pairs, everything is measured on others; natural ranges and components
are those of both. Of a metric the natural activations of a target are those of its bin, a quarter of the values; ``numbers["target bin width"]`` is
the width of the widest. Interchange accuracy stands beside the ratio of logit differences (FLDD), which overstates: a subspace may move half of the
logit difference and none of the answers.

Not covered: path restriction and ablation of the direction (edits do both).

Sources: Makelov et al. 2023 (arXiv 2311.17030); the reply of Wu et al. 2024 (arXiv 2401.12631); Grant et al. (ICLR 2026).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import metrics
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.model.names import is_component
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import standard_error
from circuitvision.subspaces import controls as control_runs
from circuitvision.subspaces import illusion as il
from circuitvision.subspaces.bases import orthonormal
from circuitvision.subspaces.behind import UnitsBehind, readers_of
from circuitvision.subspaces.das import DAS, DASResult, residual_site
from circuitvision.subspaces.kept import KeptRuns, kept_runs
from circuitvision.subspaces.pairs import Outcome, SitePairs, checked_pairs
from circuitvision.subspaces.training import Options

CLEAN, SOURCE, BEFORE, AFTER = "clean", "source run", "residual stream before", "residual stream after"
SHUFFLED, REDRAWN = "shuffled labels", "random weights"


@dataclass(frozen=True, eq=False)
class IllusionReport(Result):
    """Runs under every intervention: ``values`` ``[intervention example]`` is the logit difference answer − foil (or the metric).

    ``accuracy`` and ``two_way`` are of the same shape: 1 where the run gives the counterfactual answer of all classes, and of the two. ``effect``
    is the change towards the source run, in units of its mean over examples (``scale``). ``numbers`` holds the statistics by name, ``flags`` what
    was tested (None: could not be), ``label`` the verdict in a word and ``sentence`` in words, ``also`` what else holds where nothing was found.
    """

    accuracy: Tensor = field(default_factory=lambda: torch.zeros(0))
    two_way: Tensor = field(default_factory=lambda: torch.zeros(0))
    effect: Tensor = field(default_factory=lambda: torch.zeros(0))
    basis: Tensor = field(default_factory=lambda: torch.zeros(0))
    numbers: dict[str, float] = field(default_factory=dict)
    flags: dict[str, bool | None] = field(default_factory=dict)
    label: str = ""
    sentence: str = ""
    also: str = ""
    thresholds: dict[str, float] = field(default_factory=dict)
    readers: str = ""
    site: str = ""
    scale: float = 1.0
    train: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"accuracy": -1, "two_way": -1, "effect": -1, "groups": 0}

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """Refused: interventions of one subspace are read together."""
        raise InputError("An illusion report has interventions, not components: see .table().")

    @property
    def k(self) -> int:
        """Dimensions of the subspace."""
        return self.basis.shape[1]

    @property
    def fldd(self) -> Float[Tensor, " intervention"]:
        """``1 − mean LD_int / mean LD_clean``: 0 is no effect, 1 a tie, above 1 flipped; NaN where the clean one is within two standard errors of
        0."""
        mean = self.mean()
        clean = self.values[self.index_of("intervention", CLEAN)]
        small = abs(float(clean.double().mean())) <= 2 * float(standard_error(clean).nan_to_num(0.0))
        return torch.full_like(mean, math.nan) if small else 1 - mean / mean[self.index_of("intervention", CLEAN)]

    def of(self, intervention: str, quantity: str = "effect") -> float:
        """The mean of a quantity under an intervention."""
        return float(self.mean(quantity=quantity)[self.index_of("intervention", intervention)])

    def table(self) -> Any:
        """One row per intervention (random subspaces are one row each kind, the mean): ``E`` with its interval, FLDD, LD, and both accuracies."""
        import pandas as pd

        low, high = self.interval(quantity="effect")
        columns = {
            "E": self.mean(quantity="effect"), "low": low, "high": high, "fldd": self.fldd, "logit_diff": self.mean(),
            "accuracy": self.mean(quantity="accuracy"), "two_way": self.mean(quantity="two_way"),
        }  # fmt: skip
        frame = pd.DataFrame({name: value.numpy() for name, value in columns.items()})
        kinds = [
            name.rpartition(" ")[0] if name.rpartition(" ")[2].isdigit() else name for name in self.axes["intervention"]
        ]
        frame.insert(0, "intervention", kinds)
        return frame.groupby("intervention", sort=False, as_index=False).mean()

    def _long_frame(self) -> Any:
        """One row per intervention and example: ``value`` (the logit difference), ``accuracy``, ``two_way`` and ``effect``."""
        frame = super()._long_frame()
        for name in ("accuracy", "two_way", "effect"):
            frame[name] = getattr(self, name).double().flatten().numpy()
        return frame

    def highlights(self) -> dict[str, str]:
        """The verdict, the flags, and the three numbers that a reader compares first."""
        held = [f"{name} {il.FLAGS[name]}" for name, value in self.flags.items() if value]
        untested = [name for name, value in self.flags.items() if value is None]
        return {
            "verdict": f"{self.label}: {self.sentence}",
            "flags": "; ".join(held) or "none",
            "not tested": ", ".join(untested) or "none",
            "effect": f"subspace {self.of(il.SUBSPACE):.2f}, whole component {self.of(il.FULL):.2f}, source run 1",
            "interchange accuracy": f"subspace {self.of(il.SUBSPACE, 'accuracy'):.1%}, source run {self.of(SOURCE, 'accuracy'):.1%}",
            "readers": f"{self.readers}, rank {self.numbers.get('rank of readers', math.nan):.0f}",
        }


@with_provenance
def illusion_report(
    model: Any,
    pairs: Pairs,
    site: Any,
    direction: Tensor | DASResult,
    *,
    readers: Any = None,
    train: Pairs | None = None,
    positions: Any = None,
    heads: Any = None,
    joint: bool = False,
    metric: Any = None,
    position: Any = "last",
    n_random: int = 20,
    controls: bool = True,
    epochs: int = 10,
    rate: float = 0.03,
    units: bool = True,
    thresholds: il.Thresholds | None = None,
    batch_size: int | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    keep: bool = True,
    seed: int = 0,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> IllusionReport:
    """Is a variable mediated in this direction or subspace, or is the output only controllable from it?

    Args:
        model: the hooked model.
        pairs: what everything is measured on; those that a :class:`DASResult` of the same pairs was trained on are taken out.
        site: a site or component of any tower.
        direction: ``[d]``, a basis ``[d k]``, or a trained subspace.
        readers: what reads the site, see :mod:`circuitvision.subspaces.behind`; None: the site's own branch, or everything.
        train: pairs that directions and controls come from; None: half of ``pairs``, by groups (of a trained subspace its own training pairs).
        positions, heads, metric, position, align, allow_wrong, keep: as of :class:`DAS`.
        joint: whether positions and heads of an example are one entry, as of :class:`DAS`; a trained subspace says it by itself.
        n_random: random subspaces of each kind.
        controls: whether the same training is run on shuffled labels, and with the component's weights drawn anew; ``epochs`` and ``rate`` are its.
        units: whether units behind the site are watched.
        thresholds: of the flags.
        batch_size: how many pairs run at once; None: by memory.
        seed: of random subspaces, splits and controls.
        save_to, resume: a folder for the training of controls, as of :meth:`DAS.fit`.

    Raises:
        InputError: before anything long runs: see :class:`SitePairs`; a basis without full rank or of another width; more dimensions than pairs that
            controls are trained on; a source run that answers as the base run does.
    """
    pairs = checked_pairs(pairs, metric)
    basis = orthonormal(_basis_of(direction, site)).detach().cpu()
    learn, test = _two_sets(pairs, direction, train, seed)
    if controls and basis.shape[1] > len(learn):
        raise InputError(
            f"Controls of {basis.shape[1]} dimensions are trained on {len(learn)} pairs, which is too few: give more pairs, fewer dimensions, or "
            "controls=False."
        )
    shared = {
        "positions": positions, "heads": heads, "metric": metric, "position": position, "align": align, "allow_wrong": allow_wrong, "keep": keep,
        "joint": joint or (isinstance(direction, DASResult) and direction.joint),
    }  # fmt: skip
    options = Options(epochs, rate, 0.0, 1, False)
    told = {
        "pairs": [learn.digest, test.digest], "search": ["illusion_report", site, basis.shape[1], shared], "options": [epochs, rate, seed],
    }  # fmt: skip
    with (
        kept_runs(save_to, resume, model, told) as folder,
        Progress(4 + 2 * controls, "illusion report", progress) as bar,
    ):
        with SitePairs(model, learn, site, batch_size=batch_size, **shared) as learned:
            if learned.width != len(basis):
                raise InputError(f"The basis has {len(basis)} coordinates, {learned.site} has {learned.width}.")
            matrix, called = readers_of(model, learned.site, learned.heads, readers, **_laid(learned))
            if matrix is not None and len(matrix) != learned.width:
                raise InputError(f"readers read {len(matrix)} coordinates, {learned.site} has {learned.width}.")
            directions = _Directions.of(learned)
            bar.advance()
            with SitePairs(model, test, site, batch_size=batch_size, **shared) as held:
                runs = SourceShare(held)
                component = _component(held, learned, directions, matrix, runs.scale, units)
                bar.advance()
                trained, outcomes = (
                    _controls(model, learn, held, site, basis.shape[1], shared, options, folder, seed, bar)
                    if controls
                    else ({}, {})
                )
                found = il.illusion_statistics(
                    component, basis, n_random=n_random, controls=trained, effects=runs, seed=seed
                )
                if held.metric is not None:
                    found.numbers["target bin width"] = float(held.bins().diff().max())
                bar.advance()
        anchors = _anchors(model, test, component_site := held.site, shared)
        bar.advance()
    extra = {**outcomes, **anchors}
    found = dataclasses.replace(
        found, effects={**found.effects, **{name: runs.oriented(one) for name, one in extra.items()}}
    )
    every = {CLEAN: runs.clean, SOURCE: runs.source, **runs.outcomes, **extra}
    limits = thresholds or il.Thresholds()
    anchor = AFTER if AFTER in every else SOURCE
    flags = il.flags_of(
        found, limits, accuracy=float(every[il.SUBSPACE].accuracy.mean()), anchor=float(every[anchor].accuracy.mean()),
        controls=[name for name in (SHUFFLED, REDRAWN) if name in every], tie=runs.tie,
    )  # fmt: skip
    verdict = il.verdict_of(found, flags, limits)
    return IllusionReport(
        values=torch.stack([one.difference for one in every.values()]),
        axes={"intervention": list(every), "example": list(test.numbers)},
        provenance=describe(
            model, method="illusion_report", metric=metric or metrics.logit_diff(), seed=seed, site=component_site, dataset_sha256=pairs.digest,
            examples=len(test),
        ),
        accuracy=torch.stack([one.accuracy for one in every.values()]),
        two_way=torch.stack([one.two_way for one in every.values()]),
        effect=torch.stack([runs.oriented(one) for one in every.values()]) / runs.scale,
        basis=basis,
        numbers=found.numbers,
        flags=flags,
        label=verdict.label,
        sentence=verdict.sentence,
        also=verdict.also,
        thresholds=dataclasses.asdict(limits),
        readers=called,
        site=component_site,
        scale=runs.scale,
        train=list(learn.numbers),
        groups=[] if test.groups is None else list(test.groups),
    )  # fmt: skip


def _basis_of(direction: Any, site: Any) -> Any:
    """The basis of a direction, or of a subspace that was trained at this site."""
    if not isinstance(direction, DASResult):
        return direction
    if not direction.basis.numel():
        raise InputError("A non-linear map has no basis, and a report is about one: give a trained rotation.")
    if isinstance(site, str) and not is_component(site) and site != direction.site:
        raise InputError(f"The subspace was trained at {direction.site}: give .basis to try it at {site}.")
    return direction.basis


def _laid(data: SitePairs) -> dict[str, Any]:
    """How many positions an entry holds, and whether heads stand side by side in it."""
    return {
        "joint": data.joint,
        "places": len(data.parts[0].places[0]) // len(data.parts[0].batch) if data.joint else 1,
    }


def _two_sets(pairs: Pairs, direction: Any, train: Pairs | None, seed: int) -> tuple[Pairs, Pairs]:
    """Pairs that directions and controls come from, and pairs that are measured on."""
    if train is not None:
        return control_runs.split(checked_pairs(train, None if pairs.answers is not None else True), pairs, seed)
    if isinstance(direction, DASResult) and direction.provenance.get("dataset_sha256") == pairs.digest:
        known = set(direction.train)
        return pairs.at(direction.train), pairs.at([number for number in pairs.numbers if number not in known])
    return control_runs.split(pairs, 0.5, seed)


@dataclass(frozen=True)
class _Directions:
    """What training pairs say: the gradient of the effect, and the mean oriented difference."""

    gradient: Tensor
    difference: Tensor
    changes: tuple[Tensor, Tensor]
    by_target: dict[Any, Tensor]

    @classmethod
    def of(cls, learned: SitePairs) -> _Directions:
        """Of the entries of training pairs."""
        sign = _signs(learned)[learned.example][:, None]
        # A metric is oriented by the sign of what changes, its gradient by nothing.
        gradients = learned.gradients() * (1 if learned.metric is None else -1)
        change = (learned.source - learned.base) * sign
        told = learned.labels()[1]
        targets = [told[int(number)] for number in learned.example]
        by_target = {} if learned.metric is not None else {
            target: gradients[torch.tensor([one == target for one in targets])].mean(0) for target in dict.fromkeys(targets)
        }  # fmt: skip
        return cls(gradients.mean(0), change.mean(0), (change, gradients), by_target)


def _signs(data: SitePairs) -> Float[Tensor, " example"]:
    """+1 per example; of a metric the sign of what changes between the runs."""
    if data.metric is None:
        return torch.ones(data.n_examples, dtype=torch.float64)
    return (data.counterfactual().difference - data.clean().difference).sign()


class SourceShare:
    """Runs held-out pairs under named interventions, keeps what they gave, and returns oriented effects."""

    def __init__(self, held: SitePairs) -> None:
        self.held, self.clean, self.source = held, held.clean(), held.counterfactual()
        self.sign = -_signs(held) if held.metric is not None else torch.ones(held.n_examples, dtype=torch.float64)
        self.outcomes: dict[str, Outcome] = {}
        whole = self.oriented(self.source)
        self.scale = float(whole.mean())
        # Oriented changes of a metric are never below 0, so two standard errors of their mean say nothing.
        floor = (
            2 * float(standard_error(whole).nan_to_num(0.0))
            if held.metric is None
            else 1e-9 * float(self.clean.difference.abs().max())
        )
        if self.scale <= floor:
            raise InputError(
                "The source run answers as the base run does (within two standard errors), so no share of a difference can be told: take pairs "
                "whose answers differ, pairs.answered(model)."
            )

    @property
    def tie(self) -> float:
        """The effect of an undecided answer, in units of the source run's; NaN of a metric."""
        return math.nan if self.held.metric is not None else float(self.clean.difference.mean()) / self.scale

    def oriented(self, outcome: Outcome) -> Float[Tensor, " example"]:
        """The change towards the source run."""
        return self.sign * (self.clean.difference - outcome.difference)

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.held.with_values(list(values.values()))
        self.outcomes |= dict(zip(values, found, strict=True))
        return {name: self.oriented(self.outcomes[name]) for name in values}


def _component(
    held: SitePairs, learned: SitePairs, directions: _Directions, readers: Tensor | None, scale: float, units: bool
) -> il.Component:
    """The site on held-out pairs, with what training pairs say of directions, and the natural activations of both."""
    natural = torch.cat([held.base, held.source, learned.base, learned.source])
    labels: list[Any] = []
    for data in (held, learned):
        for side in data.labels(held.bins()):
            labels += [side[int(number)] for number in data.example]
    told = held.labels()[1]
    watched = UnitsBehind(held, learned) if units else None
    sign = -_signs(held) if held.metric is not None else torch.ones(held.n_examples, dtype=torch.float64)
    clean = held.clean().difference

    def clamped(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        assert watched is not None
        return sign * (clean - watched.clamped(values, low, high))

    return il.Component(
        held.base, held.source, lambda values: values[:, 0], directions.gradient, readers=readers, example=held.example,
        sign=_signs(held)[held.example], natural=natural, labels=labels, targets=[told[int(number)] for number in held.example],
        units=watched.read if watched else None, natural_units=watched.natural() if watched else None, clamped=clamped if watched else None,
        scale=scale, difference=directions.difference,
        changes=directions.changes, target_gradients=directions.by_target,
    )  # fmt: skip


def _controls(
    model: Any, learn: Pairs, held: SitePairs, site: Any, k: int, shared: dict[str, Any], options: Options, folder: KeptRuns, seed: int,
    bar: Progress,
) -> tuple[dict[str, Tensor], dict[str, Outcome]]:  # fmt: skip
    """A basis trained on shuffled labels, and what one trained with the component's weights drawn anew does there."""
    search = DAS(k, site, **{name: shared[name] for name in ("positions", "heads", "metric", "position", "joint")})
    wrong = {**shared, "allow_wrong": True}
    with SitePairs(model, learn, site, batch_size=20, permuted_labels=seed, **wrong) as learned:
        shuffled = search.train(learned, held, seed, options, folder.run(SHUFFLED)).columns
    bar.advance()
    if readers_of(model, held.site, held.heads, **_laid(held))[0] is None:
        # No component writes the stream alone, so there is none to draw anew.
        return {SHUFFLED: shuffled}, {}
    other = control_runs.reinitialised(model, seed, held.site)
    with (
        SitePairs(other, learn, site, batch_size=20, **wrong) as learned,
        SitePairs(other, held.pairs, site, **wrong) as there,
    ):
        redrawn = there.under(search.train(learned, there, seed, options, folder.run(REDRAWN)).columns)
        base = there.clean().difference
    bar.advance()
    # Its effect is that on its own base run, told on the scale of the model's own.
    moved = Outcome(held.clean().difference + redrawn.difference - base, redrawn.accuracy, redrawn.two_way)
    return {SHUFFLED: shuffled}, {REDRAWN: moved}


def _anchors(model: Any, test: Pairs, site: str, shared: dict[str, Any]) -> dict[str, Outcome]:
    """The whole residual stream just before the site's block and just behind it, at the same positions."""
    after = residual_site(model, site)
    if after is None:
        return {}
    before = after.replace("hook_resid_post", "hook_resid_pre")
    found = {}
    for name, place in ((BEFORE, before), (AFTER, after)):
        options = {**shared, "heads": None, "joint": False, "allow_wrong": True}
        if not model.is_dead(place):
            with SitePairs(model, test, place, **options) as beside:
                found[name] = beside.with_values([beside.source])[0]
    return found
