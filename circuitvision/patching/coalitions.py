"""What a game of components says: pair interactions, Harsanyi dividends, Shapley values, conditional effects.

``v(S)`` is the metric where the components in ``S`` are intact and the other chosen ones are corrupted; an :class:`InteractionResult` holds it for
every coalition ``S`` that was run. All that follows is a sum of such values, per example, in the unit of the metric:

* pair interaction  ``I_ij = v(R∪ij) − v(R∪i) − v(R∪j) + v(R)``, with the rest ``R`` of the components removed (``R = ∅``) or intact;
* Harsanyi dividend ``w(T) = Σ_{S⊆T} (−1)^{|T|−|S|} v(S)``: what ``T`` adds that no part of it does; ``Σ_{T≠∅} w(T) = v(all) − v(∅)``;
* Shapley value     ``φ_i = Σ_{T∋i} w(T) / |T|``: every dividend shared out in equal parts; ``Σ_i φ_i = v(all) − v(∅)``;
* conditional effect ``E(i | j removed) = v(all∖j) − v(all∖ij)`` beside ``E(i | nothing removed) = v(all) − v(all∖i)``. Their difference is
  *self-repair*: by how much the one does more once the other is gone. It is ``−I_ij`` with the rest intact, so the same both ways.

Where effects are positive, a pair interaction below 0 is backup (both do the same work: OR has 1 and 1 alone and −1 together), above 0 cooperation
(one is of no use without the other: AND has 0, 0 and 1). Both parity (XOR: 1, 1, −2) and a head that undoes another go below backup: the two together
do less than one of them.

A value that was not measured is NaN, and so is what is made of it, in that example alone.

Not covered: interaction indices that average over the rest (Shapley–Taylor, Banzhaf), weights of examples.

References: Harsanyi 1963; Shapley 1953; Grabisch and Roubens 1999 on interactions; McGrath et al. 2023 (arXiv 2307.15771) on self-repair.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.metrics.effects import ROUNDING
from circuitvision.model.edits.base import EditGroup
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

Coalition = frozenset[int]
Kind = TypeVar("Kind", bound="CoalitionResult")
NOTHING, ALL = "none", "all"
RESTS = ("removed", "intact")


@dataclass(frozen=True, eq=False)
class CoalitionResult(Result):
    """What the results about coalitions share: they lead with the axis ``metric`` where several metrics were measured."""

    _metric_dims: ClassVar[dict[str, int]] = {}
    """Further fields with an entry per metric, and the dimension of it."""

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, where several were measured; else empty."""
        return list(self.axes.get("metric", []))

    def of(self: Kind, metric: str) -> Kind:
        """The same for one of several metrics, without the axis ``metric``. Raises InputError for another name."""
        number = self.index_of("metric", metric)
        held = {"values": 0, **self._metric_dims}
        cut = {
            name: getattr(self, name).select(dim, number) for name, dim in held.items() if getattr(self, name).numel()
        }
        axes = {name: labels for name, labels in self.axes.items() if name != "metric"}
        return dataclasses.replace(self, axes=axes, provenance={**self.provenance, "metric": metric}, **cut)

    def shown(self, quantity: str = "values") -> Tensor:
        """The mean over examples of one metric (of several the first), in which what is rounding beside the metric's ``size`` is 0."""
        one = self.of(self.metrics[0]) if self.metrics else self
        found = one.mean(quantity=quantity)
        return found.masked_fill(found.abs() <= ROUNDING * float(getattr(one, "size", 0.0)), 0.0)

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The values. Raises InputError for several metrics."""
        if self.metrics:
            raise InputError(
                f"Several metrics were measured ({', '.join(self.metrics)}): rank one, result.of({self.metrics[0]!r})."
            )
        return super().component_scores()


@dataclass(frozen=True, eq=False)
class InteractionResult(CoalitionResult):
    """``v(S)`` of every coalition that was run: ``values`` ``[coalition example]``; several metrics lead, ``[metric coalition example]``.

    Coalitions are labelled by what is intact: ``"none"``, ``"a"``, ``"a + b"``, ``"all but c"``, ``"all"``; ``members`` holds the numbers of their
    ``components``. ``orders`` are those in which components were put back where coalitions were drawn. ``null`` ``[permutation (metric) coalition
    example]`` is the same measured with permuted pairs (see :func:`interactions`). ``edits`` is what changes each component, with tensors by digest;
    ``hold`` says whether components that are not changed were held at their value in the base run. ``groups`` says which examples belong together.
    """

    components: list[str] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    orders: list[list[int]] = field(default_factory=list)
    null: Tensor = field(default_factory=lambda: torch.zeros(0))
    mode: str = "denoise"
    hold: bool = False
    edits: list[EditGroup] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"null": -1, "groups": 0}
    _metric_dims: ClassVar[dict[str, int]] = {"null": 1}

    @property
    def complete(self) -> bool:
        """Whether every coalition was run."""
        return len(self.members) == 2 ** len(self.components)

    def v(self, *intact: str) -> Float[Tensor, "*metric example"]:
        """The metric with exactly these components intact, in float64.

        Raises:
            InputError: an unknown component, or a coalition that was not run.
        """
        unknown = [name for name in intact if name not in self.components]
        if unknown:
            raise InputError(f"There is no component {unknown[0]!r}; there are {', '.join(self.components)}.")
        return _Game.of(self)(self.components.index(name) for name in intact)

    def together(self) -> Result:
        """What all components do together, ``v(all) − v(∅)``, and the sum of what each does alone: axes ``effect`` (``"together"``, ``"sum alone"``)
        and ``example`` (several metrics lead). Together minus the sum is the sum of all dividends of two or more components."""
        game = _Game.of(self)
        alone = game.alone("removed").sum(-2)
        return self._made(
            Result,
            torch.stack([game(game.all) - game(()), alone], -2),
            {"effect": ["together", "sum alone"]},
            "together",
        )

    def pairs(self, rest: str = "removed") -> PairInteractions:
        """The interaction of every two components, the other components ``"removed"`` or ``"intact"``; NaN of a component with itself.

        Raises:
            InputError: another word, or coalitions that were not run.
        """
        if rest not in RESTS:
            raise InputError(f"rest={rest!r} is not understood: {' or '.join(map(repr, RESTS))}.")
        game = _Game.of(self)
        null = torch.zeros(0)
        if self.null.numel():
            null = _Game(self.null.double(), self.members, game.count).pairs(rest).nanmean(-1)
        axes = {"component": self.components, "other": self.components}
        return self._made(
            PairInteractions, game.pairs(rest), axes, f"pairs, the rest {rest}", alone=game.alone(rest), null=null, rest=rest, mode=self.mode
        )  # fmt: skip

    def dividends(self) -> Dividends:
        """The Harsanyi dividend of every set of components all of whose parts were run: of all sets, or of single ones and pairs."""
        found = _Game.of(self).dividends()
        names = [self.axes["coalition"][self._place(own)] for own in found]
        values = torch.stack(list(found.values()), -2)
        return self._made(
            Dividends,
            values,
            {"coalition": names},
            "dividends",
            members=[sorted(own) for own in found],
            complete=self.complete,
        )

    def shapley(self) -> ShapleyValues:
        """The Shapley value of every component: exact where all coalitions were run, else the mean over the drawn orders, with its error.

        Raises:
            InputError: only pairs were run.
        """
        game = _Game.of(self)
        if self.orders:
            marginal = game.marginals(self.orders)
            over = marginal.nanmean(-1)
            error = over.std(0) / math.sqrt(len(over)) if len(over) > 1 else torch.full_like(over[0], torch.nan)
            values = marginal.mean(0)
        elif self.complete:
            values = game.shapley()
            error = torch.zeros(values.shape[:-1], dtype=values.dtype)
        else:
            raise InputError(
                "Shapley values need every coalition, or orders: interactions(…, order='all'), or order='sampled' for more than 10."
            )
        return self._made(
            ShapleyValues,
            values,
            {"component": self.components},
            "shapley",
            sampling_error=error,
            draws=len(self.orders),
        )

    def conditional(self) -> ConditionalEffects:
        """What taking one component away costs, ``E(i | j removed)``, with all others intact: nothing else removed first, then each other one."""
        game = _Game.of(self)
        axes = {"component": self.components, "removed": [NOTHING, *self.components]}
        return self._made(ConditionalEffects, game.conditional(), axes, "conditional", mode=self.mode)

    def highlights(self) -> dict[str, str]:
        """What all do together, the sum of what each does alone, and the pair that interacts most."""
        from circuitvision.patching.interaction_claims import interacts

        shown = self.of(self.metrics[0]) if self.metrics else self
        if shown.orders:
            return {"all together": f"{float(shown.together().mean()[0]):+.4g}"} if shown._has_single() else {}
        both = shown.together().mean().tolist()
        return {
            "all together": f"{both[0]:+.4g}",
            "sum of each alone": f"{both[1]:+.4g}",
            "pairs": str(interacts(shown.pairs())),
        }

    def _has_single(self) -> bool:
        return {(number,) for number in range(len(self.components))} <= {tuple(own) for own in self.members}

    def _place(self, own: Coalition) -> int:
        return self.members.index(sorted(own))

    def _made(self, kind: Any, values: Tensor, axes: Mapping[str, Sequence[str]], what: str, **more: Any) -> Any:
        """A result made of this one."""
        lead = {"metric": self.metrics} if self.metrics else {}
        told = {**self.provenance, "method": f"{self.provenance.get('method', 'interactions')}: {what}"}
        if kind is not Result:
            more["size"] = self.mean().abs().nanmean(-1)
        return kind(values, {**lead, **axes, "example": self.axes["example"]}, told, **more)

    def _long_frame(self) -> pd.DataFrame:
        """One row per coalition and example, with how many components are intact (``size``)."""
        frame = super()._long_frame()
        sizes = dict(zip(self.axes["coalition"], map(len, self.members), strict=True))
        return frame.assign(size=[sizes[label] for label in frame["coalition"]])


@dataclass(frozen=True, eq=False)
class PairInteractions(CoalitionResult):
    """Interactions of two, ``values`` ``[component other example]`` (symmetric, NaN of a component with itself), in the unit of the metric.

    ``alone`` ``[component example]`` is the effect of one: ``v(i) − v(∅)`` with the rest removed, ``v(all) − v(all∖i)`` with the rest intact.
    ``null`` ``[permutation component other]`` are the mean interactions of permuted pairs.
    """

    alone: Tensor = field(default_factory=lambda: torch.zeros(0))
    null: Tensor = field(default_factory=lambda: torch.zeros(0))
    size: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    rest: str = "removed"
    mode: str = "denoise"

    _per_example: ClassVar[dict[str, int]] = {"alone": -1}
    _metric_dims: ClassVar[dict[str, int]] = {"alone": 0, "null": 1, "size": 0}

    @property
    def p_value(self) -> Float[Tensor, "*metric component other"]:
        """The share of permuted pairings with as large a mean interaction, the pairing as it is counted among them; NaN without permutations."""
        found = self.mean()
        if not self.null.numel():
            return torch.full_like(found, torch.nan)
        count = (self.null.abs() >= found.abs()).sum(0)
        return ((1 + count) / (1 + len(self.null))).masked_fill(found.isnan(), torch.nan)

    def top(self, count: int = 10) -> list[tuple[tuple[str, str], float]]:
        """The pairs with the largest absolute mean interaction, strongest first; of several metrics the first."""
        mean = self.shown()
        names = self.axes["component"]
        pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names)) if not mean[i, j].isnan()]
        pairs.sort(key=lambda pair: -abs(float(mean[pair])))
        return [((names[i], names[j]), float(mean[i, j])) for i, j in pairs[:count]]

    def highlights(self) -> dict[str, str]:
        """The strongest pairs."""
        return {f"{one} × {two}": f"{value:+.4g}" for (one, two), value in self.top(5)}


@dataclass(frozen=True, eq=False)
class Dividends(CoalitionResult):
    """Harsanyi dividends, ``values`` ``[coalition example]``; ``complete``: of all sets, so that they add up to ``v(all) − v(∅)``."""

    members: list[list[int]] = field(default_factory=list)
    complete: bool = True
    size: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    _metric_dims: ClassVar[dict[str, int]] = {"size": 0}

    def top(self, count: int = 10) -> list[tuple[str, float]]:
        """The sets with the largest absolute mean dividend, strongest first; of several metrics the first."""
        mean = self.shown()
        order = mean.abs().nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
        return [(self.axes["coalition"][number], float(mean[number])) for number in order[:count]]


@dataclass(frozen=True, eq=False)
class ShapleyValues(CoalitionResult):
    """Shapley values, ``values`` ``[component example]``.

    Of ``draws`` orders (0: exact) ``sampling_error`` ``[component]`` is the standard error over the orders of the mean over examples, :meth:`error`
    that over examples. ``size`` is the metric's own, as of every result made of an :class:`InteractionResult`: the mean ``|v|`` over coalitions,
    beside which differences may be rounding.
    """

    sampling_error: Tensor = field(default_factory=lambda: torch.zeros(0))
    draws: int = 0
    size: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    _metric_dims: ClassVar[dict[str, int]] = {"sampling_error": 0, "size": 0}


@dataclass(frozen=True, eq=False)
class ConditionalEffects(CoalitionResult):
    """What taking a component away costs, ``values`` ``[component removed example]``: with nothing else removed (``"none"``), and with each other
    component removed before; NaN where the two are one."""

    mode: str = "denoise"
    size: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    _metric_dims: ClassVar[dict[str, int]] = {"size": 0}

    def self_repair(self) -> Result:
        """By how much a component does more once another is gone, ``E(i | j removed) − E(i | nothing removed)``: axes ``component``, ``removed``,
        ``example``. Above 0: the one stands in for the other."""
        more = self.values[..., 1:, :] - self.values[..., :1, :]
        return Result(
            more, {**self.axes, "removed": self.axes["removed"][1:]}, {**self.provenance, "method": "self-repair"}
        )


# -- the game ------------------------------------------------------------------------------------------------------------------------------------


class _Game:
    """Values ``[… coalition example]`` by their coalitions."""

    def __init__(self, values: Tensor, members: Iterable[Iterable[int]], count: int) -> None:
        self.values, self.count, self.all = values, count, frozenset(range(count))
        self.place = {frozenset(own): number for number, own in enumerate(members)}

    @classmethod
    def of(cls, result: InteractionResult) -> _Game:
        return cls(result.values.detach().cpu().double(), result.members, len(result.components))

    def __call__(self, coalition: Iterable[int]) -> Tensor:
        own = frozenset(coalition)
        if own not in self.place:
            raise InputError(
                f"No run has exactly {len(own)} of these {self.count} components intact: {sorted(own)}. Measure every coalition, order='all' (up to "
                "10 components), or every pair, order=2."
            )
        return self.values[..., self.place[own], :]

    def alone(self, rest: str) -> Tensor:
        """The effect of each, ``[… component example]``."""
        own = [
            self({i}) - self(()) if rest == "removed" else self(self.all) - self(self.all - {i})
            for i in range(self.count)
        ]
        return torch.stack(own, -2)

    def pairs(self, rest: str) -> Tensor:
        """``[… component other example]``."""
        shape = (*self.values.shape[:-2], self.count, self.count, self.values.shape[-1])
        found = torch.full(shape, torch.nan, dtype=torch.float64)
        for i in range(self.count):
            for j in range(i + 1, self.count):
                base = frozenset() if rest == "removed" else self.all - {i, j}
                own = self(base | {i, j}) - self(base | {i}) - self(base | {j}) + self(base)
                found[..., i, j, :] = found[..., j, i, :] = own
        return found

    def dividends(self) -> dict[Coalition, Tensor]:
        """Of every set all of whose parts are there, by size: of each what the dividends of its proper parts leave of ``v(T) − v(∅)``."""
        found: dict[Coalition, Tensor] = {}
        for own in sorted(self.place, key=lambda one: (len(one), sorted(one))):
            if own and all(len(own) == 1 or own - {one} in found for one in own):
                found[own] = self(own) - self(()) - sum(found[part] for part in _proper_parts(own))
        return found

    def shapley(self) -> Tensor:
        """``[… component example]``, from the dividends."""
        total = torch.zeros(*self.values.shape[:-2], self.count, self.values.shape[-1], dtype=torch.float64)
        for own, dividend in self.dividends().items():
            for one in own:
                total[..., one, :] += dividend / len(own)
        return total

    def marginals(self, orders: Sequence[Sequence[int]]) -> Tensor:
        """What each component adds when it is put back after those before it, ``[order … component example]``."""
        found = []
        for order in orders:
            steps = [self(order[:number]) for number in range(len(order) + 1)]
            added = torch.stack([after - before for before, after in itertools.pairwise(steps)], -2)
            found.append(added.index_select(-2, torch.tensor(order).argsort()))
        return torch.stack(found)

    def conditional(self) -> Tensor:
        """``[… component removed example]``, the first of ``removed`` is nothing."""
        shape = (*self.values.shape[:-2], self.count, 1 + self.count, self.values.shape[-1])
        found = torch.full(shape, torch.nan, dtype=torch.float64)
        for i in range(self.count):
            found[..., i, 0, :] = self(self.all) - self(self.all - {i})
            for j in range(self.count):
                if i != j:
                    found[..., i, 1 + j, :] = self(self.all - {j}) - self(self.all - {i, j})
        return found


def _proper_parts(own: Coalition) -> Iterable[Coalition]:
    """Every set between nothing and all of a coalition, both left out."""
    listed = sorted(own)
    for bits in range(1, 2 ** len(listed) - 1):
        yield frozenset(one for number, one in enumerate(listed) if bits >> number & 1)
