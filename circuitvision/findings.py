"""Findings: what was found as a value with its numbers. :mod:`circuitvision.sentences` makes a sentence of it.

A :class:`Finding` says whether a claim holds, how large the effect is, how sure that is (an interval over examples, or that there is one pair), and
what chance or a control gives. A claim holds only where sign, size and interval allow it; where it does not, ``reason`` says why, and the sentence
gives the numbers without affirming anything. Figures, the command and the report print ``str(finding)``; programs look at its fields.

A share of a swing means something only where the swing does: below :data:`LEAST_SWING` of its unit, or below
:data:`LEAST_GAP` of the two values' size, there is no percentage. A share beyond :data:`OVERSHOOT` is no restored
answer, it is another one.

Maps are held against controls of their own: a share of attention against looking at every visible key alike, the largest share that one of many
heads gives a region against equal regions elsewhere in the picture, a map's peak against the spread of its cells, of which the largest of so many
random ones would be this high. Not covered: intervals of maps of one example, and controls for titles that only give numbers ("adds most: +0.3").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch

from circuitvision.model.names import spelled
from circuitvision.results import Result
from circuitvision.statistics import wilson

if TYPE_CHECKING:
    from circuitvision.circuits import AblationCheck, HeadImportance
    from circuitvision.readout.attention.distance import DistanceProfile
    from circuitvision.readout.probes.linear import ProbeResult
    from circuitvision.readout.relevance.curves import Curve
    from circuitvision.readout.weights.agreement import ClassValueAgreement
    from circuitvision.readout.weights.head_circuits import CompositionScores

LEAST_SWING = {"logit": 0.1, "nat": 0.1, "logprob": 0.1, "prob": 0.01}
LEAST_GAP = 0.01
"""Share of the metric's size by which two runs differ at least where a share of that is named."""
LEAST_SHARE = 0.05
OVERSHOOT = 1.1
ODDS = 3.0
"""How many times as likely as the second a target is, at least, where it is said to lead."""
ALONE = 0.1
"""How far above chance a share must be, at least, where one example shows it."""
EXPLAINED = 0.25
"""How much more than by chance of a head's attention an offset must explain, at least; random position embeddings explain some of it."""
NEARER, NEARER_ALONE = 0.1, 0.25
"""How much nearer than by chance patches must look, at least, as a share of that distance; and where one example shows it."""
NARROW = 0.5
"""Over what share of the keys that it can look at a head spreads its attention, at most, where it is said to be narrow."""
NOT_ASKED = "the model does not give the answers asked about"
OUTSTANDING = 2.0
"""How many times the usual value (of value vectors, contrasts, other places) the strongest one is, at least, where it is said to stand out."""


@dataclass(frozen=True)
class Finding:
    """One claim and its numbers. ``holds`` is None where nothing can be said; ``interval`` is 95 %, None of a single example."""

    claim: str
    holds: bool | None
    value: float = math.nan
    unit: str = ""
    interval: tuple[float, float] | None = None
    n: int = 1
    chance: float | None = None
    reason: str = ""
    about: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        from circuitvision.sentences import SENTENCES

        return SENTENCES[self.claim](self)

    @property
    def amount(self) -> str:
        """The value as it is read."""
        return self.number(self.value) + (f" {self.unit}" if self.unit not in ("", "share") else "")

    @property
    def sure(self) -> str:
        """The interval and the number of examples, or that there is one."""
        if self.interval is None:
            return "one pair" if self.n == 1 else f"{self.n} pairs"
        low, high = map(self.number, self.interval)
        return f"95%: {low} to {high}, {self.n} pairs"

    def number(self, value: float) -> str:
        """A value in the finding's unit."""
        text = f"{value:.0%}" if self.unit == "share" else f"{value:.3g}"
        return text.replace("-", "\N{MINUS SIGN}")


def swing(result: HeadImportance) -> Finding:
    """How far the metric moves between the two runs; holds where that is in the right direction and enough for shares to mean something."""
    value, unit = result.metric_clean - result.metric_corrupt, str(result.provenance.get("metric_units", ""))
    interval = _ends(result.interval(quantity="swing"))
    floor = max(LEAST_SWING.get(unit, 0.0), LEAST_GAP * (abs(result.metric_clean) + abs(result.metric_corrupt)))
    if not abs(value) > floor or (interval is not None and interval[0] <= 0 <= interval[1]):
        reason = "the two runs hardly differ"
    else:
        reason = "" if value > 0 else "the metric is higher on the corrupt run"
        if (
            not reason
            and str(result.provenance.get("metric", "")).startswith("logit_diff")
            and result.metric_clean <= 0
        ):
            reason = "the answer is not above the foil in the clean run"
    return Finding("swing", not reason, value, unit, interval, result.n_examples, reason=reason)


def has_shares(result: HeadImportance) -> bool:
    """Whether shares of the swing mean something: it is large enough and in the right direction."""
    found = swing(result)
    return found.value > 0 and "hardly" not in found.reason


def best_head(result: HeadImportance, asked: Finding | None = None) -> Finding:
    """The share of the swing that the strongest head moves on its own."""
    if not result.ranking():
        return _share(result, math.nan, None, "head", "no head", asked)
    name, share = result.best()
    error = result.restored_error[0] if result.metrics else result.restored_error
    return _share(result, share, around(share, float(error[result.place(name)])), "head", spelled(name), asked)


def largest_effect(result: HeadImportance) -> Finding:
    """How far the unit with the largest effect moves the metric, in its units; holds where the interval, as wide as the first of all units needs, is
    off 0."""
    ranked = result.ranking()
    name, _, value = ranked[0]
    at = result.place(name)
    error = result.error()[0] if result.metrics else result.error()
    interval = around(value, float(error[at]), len(ranked))
    reason = ""
    if value == 0.0:
        reason = "no unit moves it"
    elif interval is not None and interval[0] <= 0 <= interval[1]:
        reason = "its interval holds 0"
    unit = str(result.provenance.get("metric_units", ""))
    about = {
        "subject": spelled(name),
        "method": result.method,
        "metric": str(result.provenance.get("metric", "the metric")),
        "count": str(len(ranked)),
    }
    return Finding("largest effect", not reason, value, unit, interval, result.n_examples, reason=reason, about=about)


def together(result: HeadImportance, asked: Finding | None = None) -> Finding:
    """The share of the swing that all selected heads move together."""
    interval = around(result.joint, result.joint_error)
    return _share(result, result.joint, interval, "heads", f"the {len(result.selected)} heads in the graph", asked)


def _share(
    result: HeadImportance,
    share: float,
    interval: tuple[float, float] | None,
    claim: str,
    subject: str,
    asked: Finding | None,
) -> Finding:
    whole = swing(result)
    if not whole.holds:
        share = math.nan if whole.reason == "the two runs hardly differ" else share
        reason = whole.reason
    elif asked is not None and not asked.holds:
        reason = asked.reason
    elif share < 0:
        reason = "it moves the answer the other way"
    elif share < LEAST_SHARE or (interval is not None and interval[0] <= 0):
        reason = "it is too little to tell from none"
    else:
        reason = "it overshoots" if share > OVERSHOOT else ""
    about = {"subject": subject, "mode": result.mode, "metric": str(result.provenance.get("metric", "the metric"))}
    return Finding(claim, not reason, share, "share", interval, result.n_examples, reason=reason, about=about)


def carries(check: AblationCheck) -> Finding:
    """Whether ablating the heads costs the answer while random heads do not; ``value`` is the share of pairs it costs."""
    lost = check.intact - check.ablated
    (low, low_ablated), (high, high_ablated) = wilson(
        torch.tensor([check.intact, check.ablated]), check.n_pairs
    ).tolist()
    interval = (low - high_ablated, high - low_ablated) if check.n_pairs > 1 else None
    chance = check.intact - float(check.random.mean()) if len(check.random) else None
    if check.intact <= 0:
        reason = "the model gets no pair right"
    elif interval is None or interval[0] <= 0:
        reason = "too few pairs tell"
    else:
        spared = (
            "the answer survives in most pairs"
            if lost < 0.5 * check.intact
            else "random heads cost half as much or more, on average, or some as much"
        )
        reason = "" if check.carries_the_answer else spared
    return Finding(
        "carries",
        not reason,
        lost,
        "share",
        interval,
        check.n_pairs,
        chance,
        reason,
        {"heads": ", ".join(map(spelled, check.heads))},
    )


def leads(lines: Result, unit: str) -> Finding:
    """Whether one target stands above all others at the last layer: ``lines`` has the axes layer, target, example.
    ``value`` is the margin over the second; logits and probabilities need odds of :data:`ODDS` to one.
    """
    last = lines.mean()[-1]
    last = last.where(torch.isfinite(last), torch.full_like(last, -math.inf))
    if len(last) < 2 or not bool(torch.isfinite(last).any()):
        return Finding("leads", None, reason="there is nothing to lead")
    order = last.argsort(descending=True)
    margins = Result(lines.values[-1, order[0]] - lines.values[-1, order[1]], {"example": lines.axes["example"]})
    value, count = float(last[order[0]] - last[order[1]]), len(margins.examples)
    interval = _ends(margins.interval())
    enough = (
        last[order[0]] >= ODDS * last[order[1]]
        if unit == "prob"
        else value >= (math.log(ODDS) if unit in LEAST_SWING else 0.0)
    )
    sure = bool(enough) and value > 0 and (interval is None or interval[0] > 0)
    return Finding(
        "leads", sure, value, unit, interval, count, reason="" if sure else "the margin is too small to tell"
    )


def readable(result: ProbeResult) -> Finding:
    """Whether a probe's best layer is better than always saying the commonest label and than its control, by its interval and its p value."""
    best = int(result.values.nan_to_num(-math.inf).argmax())
    value, control = float(result.values[best]), float(result.control.nan_to_num(-math.inf)[best])
    low, high = float(result.low[best]), float(result.high[best])
    bound = max(result.chance, control)
    told = value > bound and not low <= bound
    if result.shuffled.shape[1] >= 19:
        told = told and float(result.p_value[best]) <= 0.05
    interval = (low, high) if low == low else None
    return Finding(
        "readable", told, value, "share" if result.classes else "R²", interval, result.predictions.shape[1], bound,
        "" if told else "it is no better than chance or shuffled labels",
    )  # fmt: skip


def beats_random(curve: Curve) -> Finding:
    """Whether an order is better than random ones: by the interval over examples, or of one example against all of at least 19 random orders."""
    if not curve.random.numel():
        return Finding("beats random", None, reason="no random order was drawn")
    advantage = curve.advantage
    count, interval = len(advantage.examples), _ends(advantage.interval())
    if interval is not None:
        return Finding("beats random", interval[0] > 0, float(advantage.mean()), "area", interval, count, 0.0)
    beaten, drawn = curve.beaten, len(curve.random)
    return Finding("beats random", beaten == drawn >= 19, beaten / drawn, "share", None, 1, 0.5)


def ranks_at(tower: str, word: str, layers: Sequence[str], grids: torch.Tensor, margin: float, unit: str) -> Finding:
    """Whether what a lens ranks first stands out where its value is highest: from the other patches (:func:`strongest_at`), and from what it ranks
    second there, by ``margin`` (see :func:`ranks_first`; NaN where only one was kept).
    """
    found, first = strongest_at(tower, word, layers, grids, unit), ranks_first(tower, word, "", "", margin, unit)
    told = bool(found.holds) and first.holds is not False
    return replace(found, claim="ranks at", holds=told, reason=found.reason or first.reason)


def points_at_classes(result: ClassValueAgreement) -> Finding:
    """Whether the value vectors of the layer farthest above chance point at the classes more than any draw of random rows does, with p up to 0.05."""
    _, middle, high = result.chance()
    means = result.over_classes()
    best = int((means - middle).argmax())
    told = float(means[best]) > high and float(result.p[best]) <= 0.05
    about = {"layer": str(result.axes["layer"][best]), "p": f"{float(result.p[best]):.2g}"}
    reason = "" if told else "random rows do as much"
    return Finding("points at classes", told, float(means[best]), chance=middle, reason=reason, about=about)


def composes(result: CompositionScores) -> Finding:
    """Whether the pair of heads with the highest composition score is above the highest of as many pairs of random heads (``chance``, Gaussian)."""
    found = result.top(1)
    if not found:
        return Finding("composes", None, about={"kind": result.kind}, reason="no pair of heads has a score")
    writer, reader, score = found[0]
    about = {"kind": result.kind, "pair": f"{writer} → {reader}"}
    if not result.random_mean:
        return Finding("composes", None, score, about=about)
    pairs = int(torch.isfinite(result.values).sum())
    chance = result.random_sd * math.sqrt(2 * math.log(max(pairs, 2)))
    reason = "" if score > chance else "random heads have as much"
    return Finding("composes", score > chance, score, chance=chance, reason=reason, about=about)


def agrees(measure: str, kind: str, layer: str, rate: float, chance: float) -> Finding:
    """Whether active value vectors agree with the class (or the layer's answer) more often than by chance, by :data:`ALONE` at least, where they do
    most.
    """
    told = None if rate != rate or chance != chance else rate - chance >= ALONE
    reason = "it is hardly more than chance" if told is False else ""
    about = {"measure": measure, "kind": kind, "layer": layer}
    return Finding("agrees", told, rate, "share", chance=chance, reason=reason, about=about)


# -- what maps of attention, weights and relevance show ------------------------------------------------------------------------------------------


def attends(
    head: str,
    to: str,
    share: float | Sequence[float],
    chance: float | None = None,
    error: float = math.nan,
    n: int = 1,
    tests: int = 1,
    claim: str = "attends",
    elsewhere: torch.Tensor | None = None,
) -> Finding:
    """Whether a head gives a place more of its attention than looking at all keys alike would (``chance``), as the first of so many (``tests``):
    the interval is that much wider. Nothing is said to be more than chance where chance is not known.

    Several shares are those of several passes, whose mean is the value. ``claim`` is "attends" of the head with the largest share, "attends too" of
    any other, and "rolls out" of attention multiplied up to a layer. ``elsewhere`` are the largest shares that any head gives to equal regions
    elsewhere: a share that is the largest of many heads must be :data:`OUTSTANDING` times as large, because some head of any model singles out some
    patch.
    """
    shares = [share] if isinstance(share, int | float) else list(share)
    share = sum(shares) / len(shares)
    said = percent(min(shares)), percent(max(shares))
    about = {"head": head, "to": to, "said": said[0] if said[0] == said[1] else " to ".join(said)}
    interval = around(share, error, tests)
    if share != share:
        return Finding(claim, None, reason="it has no attention", about=about)
    if chance is None or chance != chance:
        return Finding(claim, None, share, "share", interval, n, about=about)
    enough = share - chance >= LEAST_SHARE and (interval[0] > chance if interval else share - chance >= ALONE)
    reason = "" if enough else "it is hardly more than chance"
    if enough and elsewhere is not None and share < OUTSTANDING * float(elsewhere.max()):
        enough, reason = False, "other places get nearly as much"
    return Finding(claim, enough, share, "share", interval, n, chance, reason, about)


def differs(
    head: str, to: str, shares: Sequence[float], heads: torch.Tensor, elsewhere: torch.Tensor | None = None
) -> Finding:
    """Whether a head gives a place more (or less) attention than the mean head: by :data:`ALONE` of it, and more than the largest of so many random
    ones would (``chance``), by the spread of all ``heads``; of a region :data:`OUTSTANDING` times what any head differs by ``elsewhere``.
    """
    value = sum(shares) / len(shares)
    chance = _largest_of(heads.flatten())
    if elsewhere is not None:
        chance = max(chance, OUTSTANDING * float(elsewhere.abs().max()))
    told = abs(value) >= ALONE and abs(value) > chance
    said = percent(min(map(abs, shares))), percent(max(map(abs, shares)))
    about = {"head": head, "to": to, "said": said[0] if said[0] == said[1] else " to ".join(said)}
    reason = "" if told else "the heads hardly differ"
    return Finding("differs", told, value, "share", chance=chance, reason=reason, about=about)


def looks_near(profile: DistanceProfile) -> Finding:
    """Whether the patches of some layer look nearer than looking at all patches alike would: ``value`` is the mean distance in patches at the layer
    where it is smallest beside that, in the mean over heads, ``chance`` what looking at all alike gives there.

    The difference is asked for to be :data:`NEARER` of that, and its interval, wide enough for the first of so many layers, to leave 0 out; of one
    example :data:`NEARER_ALONE`. Layers that nothing reads are passed over.
    """
    of_layers, tests = profile.over_heads(), len(profile.axes["layer"])
    gap = Result(of_layers.values - profile.uniform_distance.double(), of_layers.axes)
    means, chances = of_layers.mean(), profile.mean(quantity="uniform_distance")
    unread = torch.tensor([name in profile.dead_layers for name in profile.axes["layer"]])
    shares = (gap.mean() / chances).masked_fill(unread & ~unread.all(), math.nan).nan_to_num(math.inf)
    at = int(shares.argmin())
    if not math.isfinite(float(shares[at])):
        return Finding("looks near", None, reason="no patch looks at patches", about={"tower": profile.tower})
    value, chance, share = float(means[at]), float(chances[at]), -float(shares[at])
    found = around(float(gap.mean()[at]), float(gap.error()[at]), tests)
    told = share >= NEARER_ALONE if found is None else share >= NEARER and found[1] < 0
    about = {"tower": profile.tower, "layer": str(profile.axes["layer"][at])}
    interval = None if found is None else (chance + found[0], chance + found[1])
    reason = "" if told else "it is hardly nearer than chance"
    return Finding("looks near", told, value, "patches", interval, len(profile.examples), chance, reason, about)


def adds(grid: torch.Tensor) -> Finding:
    """Whether a question adds attention somewhere: the largest contrast of a map stands out from its median (``chance``), see :func:`promotes`."""
    finite, (row, column) = grid[torch.isfinite(grid)].double(), _peak(grid)
    if not finite.numel():
        return Finding("adds", None, reason="no patch has a contrast")
    value, median = float(finite.max()), float(finite.median())
    told = value >= OUTSTANDING * median and value - median > _largest_of(finite)
    reason = "" if told else "others are nearly as large"
    about = {"at": f"row {row}, column {column}"}
    return Finding("adds", told, value, "times", chance=median, reason=reason, about=about)


def strongest_at(tower: str, name: str, layers: Sequence[str], grids: torch.Tensor, unit: str) -> Finding:
    """Whether what a lens says of a target stands out at a patch: ``grids`` is ``[layer row column]``. ``value`` is how much higher the highest value
    is than the median patch of its layer (of probabilities the ratio): odds of :data:`ODDS` to one are asked for, and more than the largest of so
    many draws would have.
    """
    layer, cell = divmod(_flat_peak(grids), grids[0].numel())
    own = grids[layer].double()
    row, column = divmod(cell, own.shape[-1])
    about = {"tower": tower, "name": name, "at": f"{layers[layer]}, patch row {row}, column {column}"}
    finite = own[torch.isfinite(own)]
    top, median = float(own[row, column]), float(finite.median())
    enough = ODDS if unit == "prob" else math.log(ODDS) if unit in LEAST_SWING else 0.0
    value = (top / median if median > 0 else math.inf) if unit == "prob" else top - median
    told = len(finite) > 1 and value >= enough and top - median > _largest_of(finite, len(grids))
    reason = "" if told else "other patches are nearly as high"
    shown = "times" if unit == "prob" else unit
    return Finding("strongest at", told, value, shown, chance=median, reason=reason, about=about)


def narrow(head: str, keys: float, of: float, relative: bool = False) -> Finding:
    """Whether the head with the lowest entropy looks at few keys: at half of the ``of`` it can look at, at most (of relative entropies, a share of
    what looking at all alike gives, 80 %).
    """
    told = keys <= (0.8 if relative else NARROW * of)
    reason = "" if told else "it looks at most of the keys"
    return Finding(
        "narrow", told, keys, "share" if relative else "keys", chance=of, reason=reason, about={"head": head}
    )


def peaks_inside(head: str, rate: float, chance: float, n: int, tests: int = 1) -> Finding:
    """Whether a head's attention is highest inside a region more often than by chance: by the binomial tail, times the number of heads."""
    told = rate == rate and _tail(round(rate * n), n, chance) * tests <= 0.05
    reason = "" if told else "it is no more than chance gives"
    return Finding("peaks inside", told, rate, "share", None, n, chance, reason, {"head": head})


def explained(head: str, share: float, chance: float) -> Finding:
    """Whether the offset between patches explains more of a head's attention than chance does."""
    told = share - chance >= EXPLAINED
    reason = "" if told else "it is little more than chance"
    return Finding("explained", told, share, "share", chance=chance, reason=reason, about={"head": head})


def promotes(vector: str, word: str, value: float, sizes: torch.Tensor) -> Finding:
    """Whether the strongest value vector stands out: :data:`OUTSTANDING` times the median of all (``sizes``, the largest absolute value of each; the
    median is ``chance``), and one half further from it, in robust standard deviations, than the largest of so many Gaussian draws lies.
    """
    median = sizes.double().median()
    told = value != 0 and abs(value) >= OUTSTANDING * float(median) and abs(value) - float(median) >= _largest_of(sizes)
    about = {"vector": vector, "word": word}
    return Finding(
        "promotes", told, value, chance=float(median), reason="" if told else "others are nearly as strong", about=about
    )


def among(vector: str, hits: int, asked: int, kept: int, largest: bool) -> Finding:
    """How many of the outputs asked for are among the ones a value vector ranks highest (lowest). What chance gives is not known, so nothing more is
    said.
    """
    about = {"vector": vector, "asked": str(asked), "kept": f"{kept} {'highest' if largest else 'lowest'}"}
    return Finding("among", None, hits, "outputs", about=about)


def stands_out(values: torch.Tensor, method: str, noun: str, metric: str) -> Finding:
    """Whether the largest absolute value of a map ``[row column]`` stands out from the others: ``value`` is how many times the median it is, and
    noise of so many cells would give ``chance``; one half more is asked for.
    """
    size = values.double().abs().nan_to_num(0.0)
    at, count = int(size.argmax()), int(torch.isfinite(values).sum())
    top, median = float(size.flatten()[at]), float(values.double().abs().nanmedian())
    expected = math.sqrt(2 * math.log(max(count, 2))) / NormalDist().inv_cdf(0.75)
    ratio = top / median if median > 0 else math.inf if top > 0 else math.nan
    row, column = divmod(at, values.shape[-1])
    about = {"method": method, "noun": noun, "metric": metric, "at": f"row {row}, column {column}"}
    told = count > 1 and ratio >= 1.5 * expected
    reason = "" if told else "others are nearly as large" if top > 0 else "all are 0"
    return Finding("stands out", told, ratio, "times", chance=expected, reason=reason, about=about)


def on_object(method: str, hits: int, n: int, chance: float) -> Finding:
    """Whether maps peak on the object more often than by chance, the share of places that show it. One map says where it peaks, no more."""
    told = None if n == 1 else _tail(hits, n, chance) <= 0.05
    reason = "it is no more than chance gives" if told is False else ""
    return Finding("on object", told, hits / n, "share", None, n, chance, reason, {"method": method, "hits": str(hits)})


def ranks_first(tower: str, word: str, where: str, since: str, margin: float, unit: str) -> Finding:
    """Whether what a lens ranks first at the last layer is clearly first: by odds of :data:`ODDS` to one over the second. ``margin`` is the distance
    (of probabilities the ratio); NaN where only one was kept, and then nothing is said about it.
    """
    about = {"tower": tower, "word": word, "where": where, "since": since}
    floor = ODDS if unit == "prob" else math.log(ODDS) if unit in LEAST_SWING else 0.0
    told = None if margin != margin else margin > 0 and margin >= floor
    reason = "the second is nearly as high" if told is False else ""
    return Finding("ranks first", told, margin, "times" if unit == "prob" else unit, reason=reason, about=about)


def _largest_of(values: torch.Tensor, times: int = 1) -> float:
    """How far from the median the largest of so many Gaussian draws with the values' robust standard deviation lies, and half as far again;
    ``times`` as many draws.
    """
    values = values.double()
    spread = float((values - values.median()).abs().median()) / NormalDist().inv_cdf(0.75)
    return 1.5 * math.sqrt(2 * math.log(max(len(values) * times, 2))) * spread


def _flat_peak(values: torch.Tensor) -> int:
    """Where the largest number stands."""
    return int(values.where(torch.isfinite(values), torch.full_like(values, -math.inf)).argmax())


def _peak(grid: torch.Tensor) -> tuple[int, int]:
    return divmod(_flat_peak(grid), grid.shape[-1])


def around(value: float, error: float, tests: int = 1) -> tuple[float, float] | None:
    """95 % around a value by its standard error, wider where it is the best of several; None where a single example has none."""
    z = NormalDist().inv_cdf(1 - 0.025 / tests)
    return None if error != error else (value - z * error, value + z * error)


def _ends(interval: torch.Tensor) -> tuple[float, float] | None:
    """An interval as a pair; None where a single example has none."""
    low, high = (float(end) for end in interval)
    return None if low != low else (low, high)


def _tail(hits: int, n: int, chance: float) -> float:
    """How likely so many hits or more are by chance (binomial)."""
    if hits <= 0 or chance >= 1:
        return 1.0
    if chance <= 0:
        return 0.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(chance) + (n - k) * math.log1p(-chance)
            for k in range(hits, n + 1)]  # fmt: skip
    return min(sum(map(math.exp, logs)), 1.0)


def percent(share: float) -> str:
    """A share in whole percent that says neither all nor nothing where it is not."""
    if 0.995 <= share < 1 - 1e-6:
        return "more than 99%"
    return "less than 1%" if 1e-6 < share < 0.005 else f"{share:.0%}"
