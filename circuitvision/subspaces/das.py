"""Distributed alignment search: the subspace of a site in which interchange makes a model give the counterfactual answer.

:class:`DAS` trains an orthonormal basis ``V`` of ``k`` columns so that base runs with ``h' = h_b + (h_s − h_b) V Vᵀ`` answer as the source would;
:class:`BoundlessDAS` learns ``k`` as well. Training and held-out pairs share no group. A step costs what lies behind the site: each batch of pairs
is a prepared run that is kept, see :mod:`circuitvision.subspaces.training` for the loss and its ``closeness``. With ``joint`` the basis is one over
all chosen positions and heads of an example side by side, in that order; without it each position and head takes part by itself, in the same basis.

What a trained subspace says is limited by what the same training finds where there is nothing: ``control=True`` fits the same class of maps on a
re-initialised copy of the model and on permuted labels, and :attr:`DASResult.selectivity` is the interchange accuracy minus the larger of the two. A
non-linear map (``map=``) is refused without it. Nothing is chosen on held-out pairs: of several seeds the one of the lowest training loss counts.

Not covered: several sites at once (heads of one layer are one site), counterfactuals of more than one source, choosing the site.

Sources: Geiger et al. 2023 (arXiv 2303.02536); Wu et al. 2023 (arXiv 2305.08809); Grant et al. 2026 on divergence; the non-linear representation
dilemma (NeurIPS 2025) on controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision import metrics
from circuitvision.data import Pairs
from circuitvision.errors import InputError, checked_seed
from circuitvision.model.sites import SiteName
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import wilson
from circuitvision.subspaces import controls
from circuitvision.subspaces.fitting import FittedBasis, fit_basis, fit_boundless, train
from circuitvision.subspaces.kept import KeptRun, kept_runs
from circuitvision.subspaces.maps import check_invertible, interchanged_by
from circuitvision.subspaces.pairs import Outcome, SiteBatch, SitePairs, checked_pairs
from circuitvision.subspaces.training import Fit, Options, Schedule, apart, by_map, target_means

SUBSPACE, FULL, RESIDUAL = "subspace", "full", "residual"
REINITIALISED, PERMUTED = "re-initialised", "permuted labels"
MapMaker = Callable[[int], nn.Module]
"""A function of the width of a site that makes an invertible map, with ``forward`` and ``inverse``."""


@dataclass(frozen=True, eq=False)
class DASResult(Result):
    """A trained subspace on held-out pairs: ``values`` ``[intervention example]`` is 1 where the run gives the counterfactual answer of all classes.

    Interventions are ``"subspace"``, ``"full"`` (everything at the chosen entries of the site), the ceiling of any basis of it, and ``"residual"``
    (the stream behind the site's block, at the same positions; left out where the site is in no block). ``two_way`` is 1 where the counterfactual
    answer is above the base's, ``logit_diff`` their difference, both of the same shape; ``clean`` and ``counterfactual`` ``[example]`` are that
    difference in the unedited runs. ``basis`` ``[d k]`` has orthonormal columns (empty for a non-linear map). ``loss`` ``[seed step]`` is of
    training; ``reported`` ``[seed report]`` the held-out accuracy on the way, after the epochs of ``reported_at``; ``by_seed`` ``[seed]`` the last.
    ``control`` ``[control example]`` is the accuracy of the controls. ``train`` and ``examples`` are the numbers of the pairs; ``groups`` those of
    the held-out ones.
    """

    basis: Tensor = field(default_factory=lambda: torch.zeros(0))
    two_way: Tensor = field(default_factory=lambda: torch.zeros(0))
    logit_diff: Tensor = field(default_factory=lambda: torch.zeros(0))
    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    counterfactual: Tensor = field(default_factory=lambda: torch.zeros(0))
    loss: Tensor = field(default_factory=lambda: torch.zeros(0))
    reported: Tensor = field(default_factory=lambda: torch.zeros(0))
    reported_at: list[int] = field(default_factory=list)
    by_seed: Tensor = field(default_factory=lambda: torch.zeros(0))
    seeds: list[int] = field(default_factory=list)
    control: Tensor = field(default_factory=lambda: torch.zeros(0))
    controls: list[str] = field(default_factory=list)
    train: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    site: str = ""
    heads: list[int] = field(default_factory=list)
    joint: bool = False
    k: int = 0
    boundary: Tensor = field(default_factory=lambda: torch.zeros(0))
    map_class: str = "linear"
    n_parameters: int = 0

    _per_example: ClassVar[dict[str, int]] = {
        "two_way": -1, "logit_diff": -1, "clean": -1, "counterfactual": -1, "control": -1, "groups": 0,
    }  # fmt: skip

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """Refused: interventions of one subspace are compared with its ceiling, not ranked."""
        raise InputError("A trained subspace has interventions, not components: compare it with its ceiling.")

    def accuracy(self, intervention: str = SUBSPACE, two_way: bool = False) -> float:
        """The share of held-out pairs that an intervention turns into the counterfactual answer."""
        found = self.mean(quantity="two_way" if two_way else "values")
        return float(found[self.index_of("intervention", intervention)])

    def accuracy_interval(self, intervention: str = SUBSPACE, two_way: bool = False) -> tuple[float, float]:
        """Wilson's 95 % interval of :meth:`accuracy`."""
        share = torch.tensor(self.accuracy(intervention, two_way))
        low, high = wilson(share, len(self.examples)).tolist()
        return low, high

    @property
    def ceiling(self) -> float:
        """The accuracy of interchanging all of the residual stream there, or (outside blocks) all of the site."""
        return self.accuracy(RESIDUAL if RESIDUAL in self.axes["intervention"] else FULL)

    @property
    def selectivity(self) -> float:
        """The accuracy minus the larger one of the two controls; NaN without them."""
        if not self.controls:
            return float("nan")
        return self.accuracy() - float(self.control.double().nanmean(-1).max())

    @property
    def effect(self) -> Float[Tensor, " intervention"]:
        """How far each intervention goes from the base run to the source run, ``mean(LD − LD_int) / mean(LD − LD_source)``; NaN where the runs do not
        differ (within two standard errors)."""
        from circuitvision.metrics.effects import restored_share

        base, source = (one.expand(self.logit_diff.shape) for one in (self.clean, self.counterfactual))
        return restored_share(self.logit_diff - base, base, source)

    def highlights(self) -> dict[str, str]:
        """The accuracy, its ceiling, and the selectivity."""
        low, high = self.accuracy_interval()
        found = {
            "interchange accuracy": f"{self.accuracy():.1%} ({low:.1%} … {high:.1%}) of {len(self.examples)} held-out pairs",
            "ceiling": ", ".join(f"{name} {self.accuracy(name):.1%}" for name in self.axes["intervention"][1:]),
            "dimensions": f"{self.k} of {len(self.basis) or '?'}, {self.map_class}, {self.n_parameters} parameters",
        }
        if self.controls:
            found["selectivity"] = f"{self.selectivity:.1%}"
        return found


@dataclass(frozen=True)
class DAS:
    """A search for the ``k`` dimensions of a site that carry what answer and foil differ in.

    Attributes:
        k: how many dimensions.
        site: a site, or a component, of any tower.
        positions, heads: which entries, as of :mod:`circuitvision.edits`; the basis is that of one entry, and all share it, unless ``joint``.
        metric: where the output has no classes: what is compared, one number per example (see :class:`circuitvision.subspaces.SitePairs`).
        position: where the answer is read.
        map: in place of a rotation, a function of the width that makes an invertible map, such as :class:`circuitvision.subspaces.CouplingMap`.
        joint: whether the chosen positions and heads of an example are one entry, side by side.
    """

    k: int
    site: Any
    positions: Any = None
    heads: Any = None
    metric: Any = None
    position: Any = "last"
    map: MapMaker | None = None
    joint: bool = False

    name: ClassVar[str] = "DAS"

    @with_provenance
    def fit(
        self,
        model: Any,
        pairs: Pairs,
        *,
        held_out: float | Pairs = 0.25,
        epochs: int = 20,
        rate: float = 0.01,
        batch_size: int = 20,
        seeds: int | Sequence[int] = 0,
        closeness: float = 0.0,
        control: bool = False,
        reports: int = 5,
        align: Any = "kind",
        allow_wrong: bool = False,
        keep: bool = True,
        save_to: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> DASResult:
        """Train on pairs and measure on held-out ones.

        Args:
            model: the hooked model.
            pairs: with answers and foils (or a metric); the clean side is the base, the corrupt side the source.
            held_out: the share that is held out, by groups where the pairs have them; or pairs.
            epochs, rate, batch_size: of Adam; the rate falls linearly to 0.
            seeds: of the start, of the order of batches and of the split (which takes the first).
            closeness: the weight λ of the distance to natural activations, see the module; of a basis, not of a map.
            control: whether to fit the same on a re-initialised copy and on permuted labels.
            reports: how often the held-out accuracy is measured on the way.
            align: how positions of the two sides are matched, see ``Pairs.batches``.
            allow_wrong: whether pairs that the model gets wrong may be among them.
            keep: whether prepared runs and activations of all batches are kept in memory.
            save_to, resume: a folder in which every training run is kept at the end of each epoch, and continued from with ``resume=True``.

        Raises:
            InputError: before anything is trained: see :class:`circuitvision.subspaces.SitePairs`; more dimensions than training pairs or
                coordinates; a non-linear map without ``control``; a share that holds out nothing.
        """
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise InputError(f"k={self.k!r} is no number of dimensions: give 1 or more.")
        if self.map is not None and not control:
            raise InputError(
                "A non-linear map can make any network give any answer, so its accuracy alone says nothing: fit it with control=True."
            )
        if self.map is not None and closeness:
            raise InputError("closeness is a distance along the columns of a basis, and a map has none: leave it out.")
        options = Options(epochs, rate, closeness, reports, progress)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is at least 1.")
        tried = [int(checked_seed(seed)) for seed in ([seeds] if isinstance(seeds, int) else seeds)]
        if not tried:
            raise InputError("There is no seed: give one, or several.")
        learn, test = controls.split(checked_pairs(pairs, self.metric), held_out, tried[0])
        self._check_count(len(learn))
        where = {
            "positions": self.positions, "heads": self.heads, "metric": self.metric, "position": self.position, "align": align,
            "joint": self.joint,
        }  # fmt: skip

        def both(model: Any, wrong: bool, permuted: int | None = None) -> tuple[SitePairs, SitePairs]:
            shared = {**where, "allow_wrong": wrong, "keep": keep}
            first = SitePairs(model, learn, self.site, batch_size=batch_size, permuted_labels=permuted, **shared)
            try:
                return first, SitePairs(model, test, self.site, **shared)
            except BaseException:
                first.close()
                raise

        told = {
            "pairs": [learn.digest, test.digest], "search": [self.name, self],
            "options": [epochs, rate, batch_size, closeness, reports, tried[0], align],
        }  # fmt: skip
        with kept_runs(save_to, resume, model, told) as folder:
            learned, held = both(model, allow_wrong)
            with learned, held:
                self._check_width(learned.width)
                _check_positions_of(learned)
                fits = [self._train(learned, held, seed, options, folder.run(f"seed {seed}")) for seed in tried]
                best = min(fits, key=lambda fit: fit.final_loss)
                outcomes = {SUBSPACE: best.outcome(held), FULL: held.with_values([held.source])[0]}
                found = _Measured(outcomes, held.clean(), held.counterfactual(), held.site, held.heads)
            residual = residual_site(model, found.site)
            if residual is not None:
                beside_site = {**where, "heads": None, "joint": False, "allow_wrong": True, "keep": keep}
                with SitePairs(model, test, residual, **beside_site) as beside:
                    outcomes[RESIDUAL] = beside.with_values([beside.source])[0]
            accuracy: dict[str, Tensor] = {}
            if control:
                for name, other, seed in (
                    (REINITIALISED, controls.reinitialised(model, tried[0]), None), (PERMUTED, model, tried[0]),
                ):  # fmt: skip
                    learned, held = both(other, True, seed)
                    with learned, held:
                        fit = self._train(learned, held, tried[0], options, folder.run(name))
                        accuracy[name] = fit.outcome(held).accuracy
        return self._result(model, pairs, learn, test, fits, best, found, accuracy, tried)

    # -- training ------------------------------------------------------------------------------------------------------------------------------

    def _check_count(self, count: int) -> None:
        if self.k > count:
            raise InputError(
                f"{self.k} dimensions are more than the {count} training pairs: give more pairs, or fewer dimensions."
            )

    def _check_width(self, width: int) -> None:
        if self.k > width:
            raise InputError(f"{self.k} dimensions are more than the {width} coordinates of {self.site}.")

    def train(
        self, learned: SitePairs, held: SitePairs, seed: int, options: Options, kept: KeptRun | None = None
    ) -> FittedBasis:
        """The basis trained on pairs that are prepared at the site, see :meth:`fit`."""
        return self._train(learned, held, seed, options, kept).fitted

    def _train(
        self, learned: SitePairs, held: SitePairs, seed: int, options: Options, kept: KeptRun | None = None
    ) -> Fit:
        """One training run, continued where it was kept."""
        schedule = Schedule(learned, held, seed, options, kept)
        means = None if options.closeness == 0 else target_means(learned)

        def loss(part: SiteBatch, edit: Any, columns: Tensor) -> Tensor:
            rows = learned._rows(part.run([edit]), part.inputs, part.batch)
            found = learned.loss(part, rows)
            if means is not None:
                found = found + options.closeness * apart(part.source.float(), means[part.entries], columns)
            return found

        with schedule:
            if self.map is not None:
                return self._train_map(learned, seed, schedule, loss)
            return self._train_basis(learned, seed, schedule, loss)

    def _train_basis(self, learned: SitePairs, seed: int, schedule: Schedule, loss: Any) -> Fit:
        def objective(basis: Tensor, step: int) -> Tensor:
            part = schedule.part(step)
            return loss(part, learned.projection(part, basis), basis)

        device = learned.model.device
        fitted = fit_basis(
            objective, learned.width, self.k, steps=schedule.steps, rate=schedule.options.rate, seed=seed, device=device,
            report=lambda step, _, basis: schedule.report(step, lambda held: held.under(basis)), kept=schedule.kept,
        )  # fmt: skip
        return Fit(fitted, schedule.reported, fitted.basis.numel())

    def _train_map(self, learned: SitePairs, seed: int, schedule: Schedule, loss: Any) -> Fit:
        assert self.map is not None
        device = learned.model.device
        found = self.map(learned.width).to(device)
        check_invertible(found, learned.base[:8].float().to(device))

        def objective(step: int) -> Tensor:
            part = schedule.part(step)
            values = interchanged_by(found, part.base.float(), part.source.float(), self.k)
            return loss(part, learned.replacement(part, values), torch.zeros(learned.width, 1, device=device))

        losses = train(
            found, objective, schedule.steps, schedule.options.rate, kept=schedule.kept,
            after=lambda step, _: schedule.report(step, lambda held: by_map(held, found, self.k)),
        )  # fmt: skip
        empty = FittedBasis(torch.zeros(0, 0), torch.tensor(losses, dtype=torch.float64))
        count = sum(one.numel() for one in found.parameters())
        return Fit(empty, schedule.reported, count, lambda held: by_map(held, found, self.k))

    # -- the result ----------------------------------------------------------------------------------------------------------------------------

    def _result(
        self, model: Any, pairs: Pairs, learn: Pairs, test: Pairs, fits: list[Fit], best: Fit, found: _Measured,
        accuracy: dict[str, Tensor], seeds: list[int],
    ) -> DASResult:  # fmt: skip
        outcomes = list(found.outcomes.values())
        boundary = best.fitted.boundary
        return DASResult(
            values=torch.stack([one.accuracy for one in outcomes]),
            axes={"intervention": list(found.outcomes), "example": list(test.numbers)},
            provenance=describe(
                model, method=f"{self.name}(k={self.k})", metric=self.metric or metrics.accuracy(), seed=seeds[0], site=found.site,
                dataset_sha256=pairs.digest, examples=len(pairs),
            ),
            basis=best.fitted.columns.double().cpu(),
            two_way=torch.stack([one.two_way for one in outcomes]),
            logit_diff=torch.stack([one.difference for one in outcomes]),
            clean=found.clean.difference,
            counterfactual=found.counterfactual.difference,
            loss=torch.stack([fit.fitted.loss for fit in fits]),
            reported=torch.tensor([list(fit.reported.values()) for fit in fits], dtype=torch.float64),
            reported_at=list(best.reported),
            by_seed=torch.tensor([list(fit.reported.values())[-1] for fit in fits], dtype=torch.float64),
            seeds=seeds,
            control=torch.stack(list(accuracy.values())) if accuracy else torch.zeros(0),
            controls=list(accuracy),
            train=list(learn.numbers),
            groups=[] if test.groups is None else list(test.groups),
            site=found.site,
            heads=list(found.heads or ()),
            joint=self.joint,
            k=self.k if self.map is not None else best.fitted.k,
            boundary=torch.zeros(0) if boundary is None else boundary,
            map_class="linear" if self.map is None else getattr(self.map, "__name__", type(self.map).__name__),
            n_parameters=best.n_parameters,
        )  # fmt: skip


@dataclass(frozen=True)
class BoundlessDAS(DAS):
    """DAS that learns how many dimensions it needs: ``k`` is the most there may be, and the result's is the hardened boundary.

    Attributes:
        penalty: the weight of the boundary ``b`` (a share of the ``k`` columns) in the loss.
        temperature: of the soft boundary, first and last.
    """

    penalty: float = 0.1
    temperature: tuple[float, float] = (50.0, 0.1)

    name: ClassVar[str] = "BoundlessDAS"

    def _train_basis(self, learned: SitePairs, seed: int, schedule: Schedule, loss: Any) -> Fit:
        def objective(basis: Tensor, mask: Tensor, step: int) -> Tensor:
            part = schedule.part(step)
            change = (part.source - part.base).to(basis)
            values = part.base.to(basis) + ((change @ basis) * mask) @ basis.T
            return loss(part, learned.replacement(part, values), basis * mask)

        fitted = fit_boundless(
            objective, learned.width, self.k, steps=schedule.steps, rate=schedule.options.rate, penalty=self.penalty,
            temperature=self.temperature, seed=seed, device=learned.model.device,
            report=lambda step, _, basis: schedule.report(step, lambda held: held.under(basis)), kept=schedule.kept,
        )  # fmt: skip
        return Fit(fitted, schedule.reported, fitted.basis.numel() + 1)


@dataclass(frozen=True)
class _Measured:
    outcomes: dict[str, Outcome]
    clean: Outcome
    counterfactual: Outcome
    site: str
    heads: tuple[int, ...] | None


def _check_positions_of(learned: SitePairs) -> None:
    if learned.positions.n_examples is not None:
        raise InputError(
            "Positions are given per example, and the pairs are split: give a region, a kind, or a function of the token map."
        )


def residual_site(model: Any, site: str) -> str | None:
    """The stream behind the block of a site; None where it is in no block."""
    name = SiteName.parse(site)
    if name.layer is None or name.tower not in model.towers:
        return None
    found = f"{name.tower}.blocks.{name.layer}.hook_resid_post"
    return found if found in model.sites(f"{name.tower}.blocks.{name.layer}.*") else None
