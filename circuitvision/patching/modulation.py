"""Modulation: every scored head is made louder or quieter by its score, all at once, and the metric is read again.

``z_h ← clip(1 + λ s_h, 0, 2) · z_h`` at every position, so a head with a positive score ``s_h`` (it helps) is amplified and one with a negative
score (it hurts) is damped. It is one ``edits.scale`` per layer; a factor of 1 is the identity and 0 is zero ablation. Beside it stand random heads:
the same factors on as many live heads of the same tower, drawn from those that have no score, or from all where these are too few.

Scores are divided by the largest absolute one (``normalise``): scores as they come, drops of a probability of the order of 0.01, would change a head
by a percent at ``λ = 1``. They must come from other examples than the ones that are asked: where both are the same data there is a warning.

Not covered: scores of the mean over other heads (they depend on the basis of the values, see :func:`circuitvision.edits.ablate`); single positions.

Reference: V-SEAM, Wang, Hu and Jiang 2025 (arXiv 2509.14837).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError, checked_seed, warn
from circuitvision.findings import Finding
from circuitvision.metric_set import MetricSet
from circuitvision.model.edits.base import Edit, EditGroup, by_digest
from circuitvision.model.names import format_id, head_id, heads_of, parse_id
from circuitvision.model.run_functions import RunFunction
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.activation import dead_sites, first_inputs
from circuitvision.patching.clean_answers import check_data
from circuitvision.patching.coalitions import CoalitionResult
from circuitvision.patching.interaction_claims import FEWEST
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

Factors = dict[str, float]


@dataclass(frozen=True, eq=False)
class ModulationResult(CoalitionResult):
    """The metric before and after: ``values`` ``[condition example]`` with the conditions ``"before"``, ``"heads"``, ``"random 1"`` …; several
    metrics lead. ``factors`` are those of the scored heads by id, ``random_factors`` those of each random set, and ``edits`` the edits of every
    condition but the first.
    """

    factors: Factors = field(default_factory=dict)
    random_factors: list[Factors] = field(default_factory=list)
    edits: list[EditGroup] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"groups": 0}

    def change(self) -> Result:
        """After minus before, ``[condition example]`` without the first condition; several metrics lead."""
        axes = {**self.axes, "condition": self.axes["condition"][1:]}
        values = self.values[..., 1:, :].double() - self.values[..., :1, :].double()
        return Result(values, axes, {**self.provenance, "method": "change by modulation"})

    def highlights(self) -> dict[str, str]:
        """What it does, of several metrics to the first."""
        return {"modulation": str(modulates(self))}


@with_provenance
def modulate(
    model: Any,
    data: Any,
    metric: Any = "accuracy",
    *,
    heads: Any,
    factor: float = 1.0,
    clip: tuple[float, float] = (0.0, 2.0),
    normalise: bool = True,
    steps: Any = None,
    run: RunFunction | None = None,
    n_random: int = 20,
    seed: int = 0,
    allow_wrong: bool = False,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> ModulationResult:
    """Rescale heads by their scores, and random heads by the same factors: see the module.

    Args:
        model: the hooked model.
        data: held-out examples: a side of a data set, pairs (their clean side), or inputs.
        metric: a metric, its name, or a mapping of several; answers are the data set's where it has none.
        heads: scores by head, in any spelling, or a result that ranks heads (``head_importance``, ``activation_patch``): its mean effects, with the
            opposite sign where they are of corrupting or ablating it, so that they are positive where a head helps.
        factor: ``λ``.
        clip: the smallest and the largest factor of a head.
        normalise: whether scores are divided by the largest absolute one.
        steps: the passes in which heads are rescaled, as of edits; None is every pass.
        run: what one run is, as of ``model.sweep``; None: one forward pass.
        n_random: how many random sets.
        seed: of the draws.
        allow_wrong: whether the clean runs may give other answers than the data set says, see :mod:`circuitvision.patching.clean_answers` (a metric
            such as accuracy counts them itself).
        example_batch, save_to, resume, progress: as of ``model.sweep``.

    Raises:
        InputError: no score, scores that are no numbers, heads that the model does not have or that cannot reach the output, dropout in training
            mode, clean runs that do not give the answer.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Modulation")
    scores = _scores(model, heads)
    sites = dict.fromkeys(_site(name) for name in scores)
    dead_sites(model, list(sites), first_inputs(model, data))
    check_data(model, data, MetricSet.of(metric), allow_wrong, example_batch, run=run)
    _warn_of_same_data(heads, data)
    largest = max(map(abs, scores.values())) if normalise else 1.0
    low, high = clip
    factors = {name: min(max(1.0 + factor * score / (largest or 1.0), low), high) for name, score in scores.items()}
    draws = _draws(model, factors, n_random, np.random.default_rng(checked_seed(seed)))
    groups = [_scaled(model, own, steps) for own in (factors, *draws)]
    swept = model.sweep(
        data, groups, metric, example_batch=example_batch, save_to=save_to, resume=resume, progress=progress, run=run
    )
    values = torch.cat([swept.clean.unsqueeze(-2), swept.values], -2)
    axes = {name: labels for name, labels in swept.axes.items() if name not in ("edit", "example")}
    conditions = ["before", "heads", *(f"random {number + 1}" for number in range(n_random))]
    told = {
        key: swept.provenance[key]
        for key in ("dataset_sha256", "metric", "metric_units", "metric_arguments", "run")
        if key in swept.provenance
    }
    return ModulationResult(
        values=values,
        axes={**axes, "condition": conditions, "example": swept.axes["example"]},
        provenance={**describe(model, method=f"modulate(factor={factor}, clip={clip})", seed=seed), **told},
        factors=factors,
        random_factors=draws,
        edits=[by_digest(group) for group in groups],
        groups=list(swept.groups),
    )


def _scores(model: Any, heads: Any) -> Factors:
    """Scores by the id of the head."""
    if isinstance(heads, Result):
        given = _of_result(model, heads)
    elif isinstance(heads, Mapping):
        given = {format_id(heads_of(name, model.towers)[0]): float(score) for name, score in heads.items()}
    else:
        raise InputError(
            "heads is a mapping of heads to scores, or a result that ranks heads, such as head_importance."
        )
    if not given or not all(map(math.isfinite, given.values())):
        raise InputError("Give at least one score, and numbers all of them.")
    return given


def _of_result(model: Any, result: Result) -> Factors:
    """The mean score of every head of a result."""
    values, outside = result.component_scores()
    axes = {name: labels for name, labels in result.axes.items() if name not in outside}
    if not {"layer", "head"} <= axes.keys() <= {"tower", "layer", "head"}:
        raise InputError(
            f"A {type(result).__name__} over {', '.join(axes)} does not rank heads: its axes must be layer and head (and tower)."
        )
    only = next(iter(model.towers)) if len(model.towers) == 1 else None
    if only is None and "tower" not in axes:
        raise InputError("The result does not say of which tower its heads are; give a mapping of heads to scores.")
    mean = values.detach().double().nanmean(-1) if "example" in outside else values.double()
    # What an ablation or a corrupt value does is the opposite of what the head does.
    mean = -mean if getattr(result, "mode", "denoise") == "noise" else mean
    found = {}
    for labels, score in zip(itertools.product(*axes.values()), mean.flatten().tolist(), strict=True):
        where = {"tower": only, **dict(zip(axes, labels, strict=True))}
        if not math.isnan(score):
            found[head_id(str(where["tower"]), where["layer"], where["head"])] = score
    return found


def _warn_of_same_data(heads: Any, data: Any) -> None:
    scored = str(heads.provenance.get("dataset_sha256") or "") if isinstance(heads, Result) else ""
    digests = {str(getattr(one, "digest", "")) for one in (data, getattr(data, "clean", None))}
    if scored and scored in digests:
        warn(
            "The heads were scored on the examples that are asked now, which favours them: modulate on held-out examples."
        )


def _draws(model: Any, factors: Factors, count: int, rng: np.random.Generator) -> list[Factors]:
    """The same factors on random live heads, tower by tower."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InputError(f"n_random={count!r} is not understood: how many random sets, 0 for none.")
    towers: dict[str, list[float]] = {}
    for name, own in factors.items():
        towers.setdefault(parse_id(name).tower, []).append(own)
    pools = {}
    for tower, wanted in towers.items():
        cfg = model.towers[tower].cfg
        layers = [layer for layer in range(cfg.n_layers) if not model.is_dead(f"{tower}.blocks.{layer}.attn.hook_z")]
        live = [head_id(tower, layer, head) for layer in layers for head in range(cfg.n_heads)]
        others = [name for name in live if name not in factors]
        pools[tower] = (
            others
            if len(others) >= len(wanted)
            else list(dict.fromkeys([*live, *(n for n in factors if parse_id(n).tower == tower)]))
        )
    return [
        {
            pools[tower][place]: own
            for tower, all_own in towers.items()
            for place, own in zip(rng.permutation(len(pools[tower])).tolist(), all_own, strict=False)
        }
        for _ in range(count)
    ]


def _scaled(model: Any, factors: Factors, steps: Any = None) -> tuple[Edit, ...]:
    """One edit per layer, with a factor for each of its heads."""
    layers: dict[str, Tensor] = {}
    for name, own in factors.items():
        node = parse_id(name)
        layers.setdefault(_site(name), torch.ones(model.towers[node.tower].cfg.n_heads, 1))[node.head] = own
    return tuple(edits.scale(site, own, steps=steps) for site, own in layers.items())


def _site(name: str) -> str:
    """Where a head's output stands."""
    node = parse_id(name)
    return f"{node.tower}.blocks.{node.layer}.attn.hook_z"


def modulates(result: ModulationResult) -> Finding:
    """Whether rescaling the heads changes the metric: the interval of the change leaves 0 out, and no random set of at least
    :data:`~circuitvision.patching.interaction_claims.FEWEST` changes it as much (``chance``: the most)."""
    if result.metrics:
        result = result.of(result.metrics[0])
    change = result.change()
    mean = change.mean()
    value, n = float(mean[0]), len(change.examples)
    low, high = change.interval()[:, 0].tolist()
    chance = float(mean[1:].abs().max()) if len(mean) > 1 else None
    before = float(result.mean()[0])
    about = {
        "heads": str(len(result.factors)),
        "before": f"{before:.3g}",
        "after": f"{before + value:.3g}",
        "draws": str(len(mean) - 1),
    }
    about["metric"] = str(result.provenance.get("metric") or "the metric")
    reason = ""
    if value == 0 or low <= 0 <= high:
        reason = "the interval of the change holds 0"
    elif chance is not None and abs(value) <= chance:
        reason = "random heads do as much"
    elif chance is not None and len(mean) - 1 < FEWEST:
        reason = "too few random sets tell"
    told = None if chance is None else not reason
    return Finding("modulates", told, value, "", None if low != low else (low, high), n, chance, reason, about)
