"""Linear probes: what a linear map can read off a site, layer by layer.

A probe is trained on one part of the examples and scored on the other. High accuracy alone says little: with many features and few examples a
linear map fits anything, so every probe has a *control*, the same probe on shuffled labels (whole groups are shuffled where there are groups,
see :mod:`circuitvision.readout.probes.splitting`), and chance is what always guessing the commonest training label would score. Where classes
are unequal in size, ``balanced`` says what accuracy hides. Readable is not used: a probe shows that information is there, edits show whether
the model reads it.

Not covered: probes with hidden layers, several labels per example.

Reference: Alain and Bengio 2016 (arXiv 1610.01644); Hewitt and Liang 2019 (arXiv 1909.03368) on controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName
from circuitvision.progress import track
from circuitvision.provenance import with_provenance
from circuitvision.readout.probes.collected import ByTower, Collected, collect, positions_for
from circuitvision.readout.probes.decisions import DecisionLayers, decision_layer
from circuitvision.readout.probes.fitting import CHOOSING, best_penalty, fit, raw, score, standardiser
from circuitvision.readout.probes.splitting import Plan, Split, Targets, bootstrapped
from circuitvision.readout.probes.streaming import Reading
from circuitvision.readout.recorded import inputs_of
from circuitvision.results import Result
from circuitvision.statistics import wilson

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True, eq=False)
class ProbeResult(Result):
    """Held-out scores of one probe per site: ``values`` ``[site]`` is the accuracy, or R² where labels are numbers (``classes`` is empty then).

    ``low`` and ``high`` are a 95% interval: Wilson's for accuracies, of R² the percentiles over held-out examples drawn again. ``independent``
    is the number of examples, or of groups, that the interval counts: examples of one group may be right or wrong together. ``train`` is the
    score on the training part, ``shuffled`` ``[site shuffle]`` the scores of the control, ``chance`` the accuracy of always guessing the
    commonest training label (0 for R²). ``predictions`` ``[site held_out]`` are class numbers (or values), ``target`` what they should be and
    ``held_out`` the examples they belong to. ``weights`` ``[site out feature]`` and ``bias`` ``[site out]`` give the probe's logits on
    activations as they are, ``x @ weights.T + bias``; empty where sites differ in width and with folds. ``penalty`` ``[site]`` is what was used
    (the geometric mean over folds).
    """

    low: Tensor = field(default_factory=lambda: torch.zeros(0))
    high: Tensor = field(default_factory=lambda: torch.zeros(0))
    train: Tensor = field(default_factory=lambda: torch.zeros(0))
    shuffled: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    chance: float = 0.0
    predictions: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    target: Tensor = field(default_factory=lambda: torch.zeros(0))
    held_out: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    independent: int = 0
    classes: list[Any] = field(default_factory=list)
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    bias: Tensor = field(default_factory=lambda: torch.zeros(0))
    penalty: Tensor = field(default_factory=lambda: torch.zeros(0))
    label_name: str = "label"
    positions: str = ""

    @property
    def control(self) -> Float[Tensor, " site"]:
        """Mean score on shuffled labels; NaN without shuffles."""
        return self.shuffled.mean(1) if self.shuffled.shape[1] else torch.full_like(self.values, torch.nan)

    @property
    def control_sd(self) -> Float[Tensor, " site"]:
        """Standard deviation of the scores on shuffled labels; NaN with fewer than two shuffles."""
        return self.shuffled.std(1) if self.shuffled.shape[1] > 1 else torch.full_like(self.values, torch.nan)

    @property
    def control_band(self) -> Float[Tensor, "end site"]:
        """The control and two standard deviations to either side of it: low end, high end (the control alone, where there is one shuffling)."""
        spread = 2 * self.control_sd.nan_to_num(0.0)
        return torch.stack([self.control - spread, self.control + spread])

    @property
    def selectivity(self) -> Float[Tensor, " site"]:
        """Score on the true labels minus that on shuffled ones (Hewitt and Liang 2019); NaN without shuffles."""
        return self.values - self.control

    @property
    def balanced(self) -> Float[Tensor, " site"]:
        """Balanced accuracy: the mean over held-out classes of the share of each that is right; one class guessed for all scores 1 / classes.

        NaN where labels are numbers.
        """
        if not self.classes:
            return torch.full_like(self.values, torch.nan)
        right = (self.predictions == self.target).double()
        return torch.stack([right[:, self.target == number].mean(1) for number in self.target.unique()]).mean(0)

    @property
    def p_value(self) -> Float[Tensor, " site"]:
        """Share of shufflings, the true labels counted as one, that score at least as high as the true labels."""
        return (1.0 + (self.shuffled >= self.values[:, None]).sum(1).double()) / (1 + self.shuffled.shape[1])

    @property
    def layers(self) -> list[Any]:
        """A short label per site: "input" and layer numbers for the stream of one tower, site names otherwise."""
        return layer_labels(self.axes["site"])

    @with_provenance
    def decisions(self, k: int = 2) -> DecisionLayers:
        """The decision layers of the held-out examples, see :func:`decision_layer`.

        Raises:
            InputError: labels are numbers, or there are too few sites.
        """
        if not self.classes:
            raise InputError("Decision layers need probes of classes; these labels are numbers.")
        return decision_layer(
            self.predictions,
            k,
            target=self.target,
            layers=self.layers,
            examples=self.held_out.tolist(),
            provenance=self.provenance,
        )

    def _long_frame(self) -> pd.DataFrame:
        """One row per site: score, interval, training and balanced score, control, selectivity and chance."""
        frame = super()._long_frame()
        columns = {"low": self.low, "high": self.high, "train": self.train, "balanced": self.balanced}
        columns |= {"control": self.control, "control_sd": self.control_sd, "selectivity": self.selectivity}
        columns |= {"p_value": self.p_value}
        for name, column in columns.items():
            frame[name] = column.numpy()
        frame["chance"] = self.chance
        return frame

    def highlights(self) -> dict[str, str]:
        """The best site with its interval, beside control and chance."""
        best = int(self.values.nan_to_num(-torch.inf).argmax())
        span = f"{float(self.values[best]):.3f} [{float(self.low[best]):.3f}, {float(self.high[best]):.3f}]"
        return {
            "best": f"{self.layers[best]}: {span}, n = {len(self.held_out)}",
            "shuffled labels": f"{float(self.control[best]):.3f}",
            "chance": f"{self.chance:.3f}",
        }


@with_provenance
def linear_probe(
    model: Wrapped | None,
    data: Any,
    labels: Sequence[Any] | Tensor | np.ndarray | None = None,
    *,
    tower: str | None = None,
    sites: str | Sequence[str] | None = None,
    positions: ByTower = None,
    batch_size: int = 32,
    label_name: str = "label",
    test_share: float = 0.3,
    folds: int | None = None,
    groups: Sequence[Any] | None = None,
    held_out: Sequence[int] | Sequence[bool] | Tensor | np.ndarray | None = None,
    shuffles: int = 20,
    penalty: float | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Train one linear probe per site on a data set's activations and score it on examples it never saw.

    Args:
        model: the hooked model; None where ``data`` are vectors.
        data: an iterable of model inputs, or one mapping of many examples; or vectors that are there already, so that one run serves several
            labels: what :func:`circuitvision.readout.collect` gave, or without a model ``{site: activations [example feature]}``.
        labels: one per example; None: those that stand beside collected vectors. Text, whole numbers and booleans are classes; floats are numbers,
            predicted by ridge regression.
        tower: whose residual stream is probed, after every layer that can reach the output; may be left out where there is one tower.
        sites: names or globs instead.
        positions: what stands for an example, see :func:`circuitvision.readout.probes.collected.chosen`.
        batch_size: examples that run at once.
        label_name: what the labels are, for titles.
        test_share: share of the examples held out, in proportion for every class.
        folds: instead, that many parts, each held out once.
        groups: one entry per example; None: of collected vectors their own. Equal entries stay on one side, are shuffled as wholes, and count once in
            the interval.
        held_out: instead, which examples are held out (a mask or numbers), for example all combinations that training must not see.
        shuffles: how often the control is drawn.
        penalty: weight of the squared weights, see :mod:`circuitvision.readout.probes.fitting`; None chooses it for each site, and once more
            for its control, within the training part.
        seed: of the split and the shuffles.

    Raises:
        InputError: labels that do not fit the data or the split, an example without such a position, vectors that are not finite.
        UnknownSiteError: no such site.
    """
    if isinstance(data, Collected):
        labels = (data.labels or None) if labels is None else labels
        # Where held_out names the examples, groups have no say; vectors made by hand have none.
        groups = (data.groups or None) if groups is None and held_out is None else groups
    if labels is None:
        raise InputError(
            "Give labels, one per example, or vectors that were collected with labels (collect(…, labels=…))."
        )
    count = len(Targets.of(labels).values)
    if model is None or isinstance(data, Collected):
        if tower is not None or sites is not None:
            raise InputError("tower= and sites= choose what is collected; these vectors are there already.")
        vectors = _checked(data, count)
        plan = Plan.of(labels, test_share, folds, groups, held_out, shuffles, penalty, seed)
        plan.warn_if_few(max(value.shape[1] for value in vectors.values()))
        return _probed(vectors, plan, label_name)
    names = _stream(model, tower, data) if sites is None else model.sites(sites)
    positions = positions_for(Reading(model, data, names, lambda *_: None).total, count, positions)
    plan = Plan.of(labels, test_share, folds, groups, held_out, shuffles, penalty, seed)
    if sites is None:
        plan.warn_if_few(model.towers[SiteName.parse(names[0]).tower].cfg.d_model)
    collected = collect(model, data, names, positions=positions, batch_size=batch_size, count=count)
    if sites is not None:
        plan.warn_if_few(max(value.shape[1] for value in collected.values()))
    return _probed(_checked(collected, count), plan, label_name)


def _stream(model: Wrapped, tower: str | None, data: Any) -> list[str]:
    """The stream of the tower named, or of the only one; InputError where there are several."""
    if tower is None and len(model.towers) == 1:
        (tower,) = model.towers
    if tower not in model.towers:
        raise InputError(f"Name the tower whose stream is read: {', '.join(model.towers)}.")
    first = data[0] if isinstance(data, list | tuple) and data else data
    return model.towers[tower].stream_sites(inputs_of(first))


def _probed(vectors: Mapping[str, Tensor], plan: Plan, label_name: str) -> ProbeResult:
    """Fit and score the probes of every site."""
    targets = plan.targets
    found = [_Site(vectors[name], plan) for name in track(list(vectors), "probe")]
    held_out = torch.from_numpy(np.concatenate([test for _, test in plan.parts]))
    order = held_out.argsort()
    held_out = held_out[order]
    scores = torch.stack([site.score for site in found])
    predictions = torch.stack([site.predictions[order] for site in found])
    groups = plan.groups[held_out.numpy()]
    independent = len(np.unique(groups))
    if targets.classes:
        low, high = wilson(scores, independent)
    else:
        low, high = bootstrapped(predictions, targets.values[held_out], groups, plan.seed)
    same = len(plan.parts) == 1 and len({site.weights.shape for site in found}) == 1
    known = vectors.provenance if isinstance(vectors, Collected) else {}
    return ProbeResult(
        values=scores,
        axes={"site": list(vectors)},
        provenance={
            **known,
            "method": f"linear_probe({plan.settings})",
            "metric": _measure(targets),
            "seed": plan.seed,
        },
        low=low,
        high=high,
        train=torch.stack([site.train for site in found]),
        shuffled=torch.stack([site.control for site in found]),
        chance=_chance(targets, plan.parts),
        predictions=predictions,
        target=targets.values[held_out],
        held_out=held_out,
        independent=independent,
        classes=targets.classes,
        weights=torch.stack([site.weights for site in found]) if same else torch.zeros(0),
        bias=torch.stack([site.bias for site in found]) if same else torch.zeros(0),
        penalty=torch.stack([site.penalty for site in found]),
        label_name=label_name,
        positions=vectors.positions if isinstance(vectors, Collected) else "",
    )


def _measure(targets: Targets) -> str:
    return "held-out accuracy" if targets.classes else "held-out R²"


def _checked(vectors: Any, count: int) -> Mapping[str, Tensor]:
    """The vectors as tensors; InputError where they do not fit the labels or hold no finite numbers."""
    if not isinstance(vectors, Mapping) or not vectors:
        raise InputError("Vectors are a mapping {site: activations [example feature]} of at least one site.")
    found = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in vectors.items()}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != count or value.shape[1] == 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name} is {shape} for {count} labels; it must be a tensor [example feature].")
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} holds values that are not finite; a probe would be undefined.")
    return vectors if isinstance(vectors, Collected) else found


def _chance(targets: Targets, parts: Sequence[Split]) -> float:
    if not targets.classes:
        return 0.0
    right = sum(int((targets.values[test] == targets.values[train].mode().values).sum()) for train, test in parts)
    return right / sum(len(test) for _, test in parts)


class _Site:
    """The probes of one site: true labels and shuffled ones, over all parts."""

    def __init__(self, x: Tensor, plan: Plan) -> None:
        values, n_classes = plan.targets.values.numpy(), len(plan.targets.classes)
        vectors = x.detach().cpu().double().numpy()
        predicted, trained, controls, wanted, penalties = [], [], [], [], []
        for (train, test), inner, control in zip(plan.parts, plan.inner, plan.shuffled, strict=True):
            own, drawn = vectors[train], control.numpy()
            strengths = [plan.penalty or 0.0] * 2
            if plan.penalty is None:
                rows = [values[None, train], drawn[:CHOOSING, train]]
                strengths = [best_penalty(own, row, n_classes, inner) for row in rows]
            prepared = standardiser(own)
            z, others = prepared.transform(own), prepared.transform(vectors[test])
            model = fit(z, values[train], n_classes, strengths[0])
            predicted.append(model.predict(others))
            trained.append(score(model.predict(z), values[train], n_classes))
            penalties.append(strengths[0])
            self.weights, self.bias = map(torch.from_numpy, raw(prepared, model))
            models = [fit(z, row, n_classes, strengths[1]) for row in drawn[:, train]]
            controls.append(np.array([one.predict(others) for one in models]).reshape(len(drawn), len(test)))
            wanted.append(drawn[:, test])
        found = np.concatenate(predicted)
        right = score(found, values[np.concatenate([test for _, test in plan.parts])], n_classes)
        self.predictions = torch.from_numpy(found)
        self.train = torch.tensor(np.mean(trained), dtype=torch.float64)
        self.penalty = torch.tensor(penalties, dtype=torch.float64)
        self.penalty = self.penalty[0] if len(penalties) == 1 else self.penalty.log().mean().exp()
        self.score = torch.tensor(right, dtype=torch.float64)
        self.control = torch.from_numpy(score(np.concatenate(controls, 1), np.concatenate(wanted, 1), n_classes))


def layer_labels(sites: Sequence[str]) -> list[Any]:
    """ "input" and layer numbers where the sites are one kind of site of one tower; the names otherwise."""
    names = [SiteName.parse(site) for site in sites]
    kinds = {name.site for name in names if name.layer is not None}
    others = {name.site for name in names if name.layer is None}
    labels = ["input" if name.layer is None else name.layer for name in names]
    plain = len({name.tower for name in names}) == 1 and len(kinds) == 1 and others <= {"hook_input"}
    return labels if plain and len(set(labels)) == len(labels) else list(sites)
