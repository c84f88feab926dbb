"""What removing heads does to each group of examples: worst-group accuracy before and after, beside as many random heads.

A *group* is a part of the data on which a shortcut helps or hurts, such as (class, background); the accuracy of the worst one says how far a model
can be relied on where the shortcut fails (Sagawa et al. 2020, arXiv 1911.08731). Heads are removed together by mean ablation (or zero ablation), as
they were scored (:mod:`circuitvision.circuits.shortcuts`).

* :func:`removal_curve` removes the heads of a ranking one after another on a validation split; :attr:`HeadRemoval.best` is the set to take.
* :func:`remove_heads` removes that set on a test split, and random sets of as many live heads of the same towers: any removal changes something.

Intervals of a group's accuracy are Wilson's. That of the rise of the worst group draws examples anew within each group, before and after together,
and takes the worst group of each draw.

Not covered: finding the groups, and sets of heads with which none is gained one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits.ablation import live_heads, random_sets
from circuitvision.circuits.shortcuts import ShortcutHeads, removed
from circuitvision.data import Pairs, Side
from circuitvision.errors import InputError, checked_seed, warn
from circuitvision.findings import Finding, percent
from circuitvision.metrics import accuracy
from circuitvision.model.edits.base import EditGroup, by_digest
from circuitvision.model.names import Component, format_id, heads_of, parse_id, spelled
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.progress import verbosity
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import wilson

if TYPE_CHECKING:
    import pandas as pd

INTACT, HEADS = "intact", "heads"
MOST = 16
"""How many heads a curve removes at most, unless told otherwise: the paper's K."""
FEWEST_RANDOM = 19
"""So many random sets must be beaten where p is to be .05."""


@dataclass(frozen=True, eq=False)
class HeadRemoval(Result):
    """Whether each example is answered right under each condition: ``values`` ``[condition example]``, 1 or 0.

    Conditions are ``"intact"`` and, of :func:`remove_heads`, ``"heads"``, ``"random 1"`` …; of :func:`removal_curve` ``"1 head"``, ``"2 heads"`` ….
    ``sets`` are the ids of the heads that each removes, ``group_of`` the group of every example, ``edits`` the edits of each condition but the first,
    with values by digest. ``groups`` says which examples belong together, where the data does.
    """

    sets: dict[str, list[str]] = field(default_factory=dict)
    group_of: list[str] = field(default_factory=list)
    ablation: str = "mean"
    edits: list[EditGroup] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"group_of": 0, "groups": 0}

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """Refused: conditions of one check are compared with "intact", not ranked among each other."""
        raise InputError("A removal of heads has conditions, not components; result.worst says how each does.")

    @property
    def is_curve(self) -> bool:
        """Whether heads were removed one after another."""
        return HEADS not in self.sets

    @property
    def group_names(self) -> list[str]:
        """The groups, in order of first appearance."""
        return list(dict.fromkeys(self.group_of))

    @property
    def heads(self) -> list[str]:
        """The heads that are removed: of a curve those of :attr:`best`."""
        return self.best if self.is_curve else self.sets[HEADS]

    @property
    def random_sets(self) -> list[str]:
        """The conditions with random heads."""
        return [name for name in self.axes["condition"] if name.startswith("random ")]

    @property
    def by_group(self) -> Float[Tensor, "condition group"]:
        """The accuracy of every group under every condition."""
        return torch.stack([self.values[:, self._rows(name)].double().mean(-1) for name in self.group_names], -1)

    @property
    def worst(self) -> Float[Tensor, " condition"]:
        """The accuracy of the worst group under every condition."""
        return self.by_group.min(-1).values

    @property
    def average(self) -> Float[Tensor, " condition"]:
        """The accuracy over all examples under every condition."""
        return self.mean()

    @property
    def best(self) -> list[str]:
        """The smallest set whose worst group comes within one standard error of the best that any set reaches; empty where none beats the intact
        model."""
        worst = self.worst
        share = float(worst.max())
        group = int(self.by_group[int(worst.argmax())].argmin())
        count = len(self._rows(self.group_names[group]))
        enough = share - (share * (1 - share) / count) ** 0.5
        names = sorted(self.axes["condition"], key=lambda name: len(self.sets[name]))
        return next(self.sets[name] for name in names if float(worst[self.index_of("condition", name)]) >= enough)

    def rise(
        self, condition: str | None = None, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float, float]:
        """How much the worst group gains over the intact model, with the ends of its interval (see the module); ``condition`` is that of the heads,
        of a curve the best, if None.

        Raises:
            InputError: no such condition.
        """
        name = self._chosen if condition is None else condition
        rows = [self.index_of("condition", one) for one in (INTACT, name)]
        rng = np.random.default_rng(checked_seed(seed))
        drawn = []
        for group in self.group_names:
            own = self.values[rows][:, self._rows(group)].double().numpy()
            count = own.shape[1]
            drawn.append(rng.multinomial(count, np.full(count, 1 / count), size=draws) @ own.T / count)
        before, after = np.stack(drawn).min(0).T
        low, high = np.quantile(after - before, [(1 - level) / 2, (1 + level) / 2]).tolist()
        worst = self.worst
        return float(worst[rows[1]] - worst[rows[0]]), low, high

    def report(self, level: float = 0.95) -> pd.DataFrame:
        """One row per condition and group, the worst and all examples among them: accuracy with Wilson's interval, of how many examples."""
        import pandas as pd

        found = []
        shares, names = self.by_group, self.group_names
        for number, condition in enumerate(self.axes["condition"]):
            lowest = int(shares[number].argmin())
            parts = [(name, name, float(shares[number, at])) for at, name in enumerate(names)]
            parts += [("worst group", names[lowest], float(shares[number, lowest]))]
            parts += [("all", "", float(self.average[number]))]
            for shown, name, share in parts:
                count = len(self._rows(name)) if name else len(self.examples)
                low, high = wilson(torch.tensor(share), count, level).tolist()
                found.append([condition, shown, share, low, high, count])
        return pd.DataFrame(found, columns=["condition", "group", "accuracy", "low", "high", "examples"])

    def highlights(self) -> dict[str, str]:
        """What the removal does to the worst group."""
        return {"removal": str(raises_worst(self))}

    @property
    def _chosen(self) -> str:
        """The condition of :attr:`heads`."""
        return next(name for name, own in self.sets.items() if own == self.heads)

    def _rows(self, group: str) -> list[int]:
        return [row for row, name in enumerate(self.group_of) if name == group]


@with_provenance
def removal_curve(
    model: Any,
    data: Side | Pairs,
    ranking: ShortcutHeads | Component | Sequence[Component],
    *,
    groups: Sequence[Any] | None = None,
    most: int | None = None,
    ablation: str | None = None,
    reference: Side | Pairs | None = None,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> HeadRemoval:
    """Remove the heads of a ranking one after another, to choose how many on a validation split.

    Args:
        model: the hooked model.
        data: labelled pictures of a validation split; of pairs the clean side.
        ranking: a result that ranks heads, of which those with a score above 0 are taken, or heads in any spelling, highest first.
        groups: the group of every example, such as (class, background); None: its answer.
        most: how many heads to remove at most; None: half of the live ones, 16 at most.
        ablation: ``"mean"`` or ``"zero"``; None: as the heads were scored, else ``"mean"``.
        reference: the examples whose mean replaces a head's output; ``data`` by default.
        example_batch, save_to, resume, progress: as of ``model.sweep``.

    Raises:
        InputError: no answers, not one group per example, no head, heads that the model does not have or that cannot reach the output.
    """
    scored = isinstance(ranking, ShortcutHeads)
    ablation = ablation or (ranking.ablation if isinstance(ranking, ShortcutHeads) else "mean")
    heads: Any = [name for name, score in ranking.ranking() if score > 0] if scored else ranking  # type: ignore[union-attr]
    side, group_of, chosen, live = _checked(model, data, groups, heads)
    count = min(MOST, len(live) // 2) if most is None else most
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"most={most!r} is not understood: how many heads to remove at most.")
    taken = chosen[:count]
    sets = {f"{n} head{'s' if n > 1 else ''}": taken[:n] for n in range(1, len(taken) + 1)}
    options = {"example_batch": example_batch, "save_to": save_to, "resume": resume, "progress": progress}
    return _measured(model, side, group_of, sets, ablation, reference, None, "removal_curve", options)


@with_provenance
def remove_heads(
    model: Any,
    data: Side | Pairs,
    heads: HeadRemoval | Component | Sequence[Component],
    *,
    groups: Sequence[Any] | None = None,
    ablation: str | None = None,
    reference: Side | Pairs | None = None,
    n_random: int = 20,
    seed: int = 0,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> HeadRemoval:
    """Remove heads together on a test split, and random sets of as many live heads of the same towers that are none of them.

    Args:
        model: the hooked model.
        data: labelled pictures of a test split; of pairs the clean side.
        heads: a removal curve, whose best set is taken, or heads in any spelling.
        groups, ablation, reference: as of :func:`removal_curve`; ablation as there, of a curve the curve's.
        n_random: how many random sets, no two alike; 0 for none.
        seed: of the draws.
        example_batch, save_to, resume, progress: as of ``model.sweep``.

    Raises:
        InputError: as of :func:`removal_curve`; a curve on which no removal helps; too few other heads to draw from.
    """
    curve = heads if isinstance(heads, HeadRemoval) else None
    if curve is not None and not curve.heads:
        raise InputError(
            "No removal on that curve beats the intact model, so there is no set to take: give heads by name to remove them all the same."
        )
    given: Any = heads if curve is None else curve.heads
    side, group_of, chosen, live = _checked(model, data, groups, given)
    if curve is not None and curve.provenance.get("dataset_sha256") == side.digest:
        warn("The heads were chosen on the examples that are asked now, which favours them: remove them on others.")
    if isinstance(n_random, bool) or not isinstance(n_random, int) or n_random < 0:
        raise InputError(f"n_random={n_random!r} is not understood: how many random sets, 0 for none.")
    towers = {parse_id(name).tower for name in chosen}
    others = [name for name in live if name not in chosen and parse_id(name).tower in towers]
    draws = random_sets(others, len(chosen), n_random, seed) if n_random else []
    sets = {HEADS: chosen, **{f"random {number + 1}": draw for number, draw in enumerate(draws)}}
    ablation = ablation or (curve.ablation if curve is not None else "mean")
    options = {"example_batch": example_batch, "save_to": save_to, "resume": resume, "progress": progress}
    return _measured(model, side, group_of, sets, ablation, reference, seed, "remove_heads", options)


def _checked(model: Any, data: Any, groups: Any, heads: Any) -> tuple[Side, list[str], list[str], list[str]]:
    """The data, the group of every example, the heads by id, and the live heads; InputError before anything runs."""
    refuse_unwrapped(model)
    refuse_random(model.module, "A removal of heads")
    side = data.clean if isinstance(data, Pairs) else data
    if not isinstance(side, Side) or not len(side):
        raise InputError("Give labelled pictures, cv.data.Side(images, answers=…), at least one.")
    if side.answers is None:
        raise InputError("A removal of heads counts right answers: give answers= when the data set is made.")
    given = side.answers if groups is None else groups
    if isinstance(given, str) or not hasattr(given, "__len__") or len(given) != len(side):
        raise InputError(f"groups= has one entry for each of {len(side)} examples, such as (class, background).")
    chosen = [format_id(node) for node in heads_of(heads, model.towers)] if len(heads) else []
    if not chosen:
        raise InputError("There is no head to remove: none was given, or none scores above 0.")
    live = live_heads(model, next(side[:1].batches(model, 1)).inputs)
    dead = [spelled(name) for name in chosen if name not in live]
    if dead:
        raise InputError(f"{dead[0]} cannot reach the output; the live heads are {', '.join(map(spelled, live))}.")
    return side, [_named(one) for one in given], list(dict.fromkeys(chosen)), live


def _named(group: Any) -> str:
    return ", ".join(map(str, group)) if isinstance(group, (tuple, list)) else str(group)


def _measured(
    model: Any,
    side: Side,
    group_of: list[str],
    sets: Mapping[str, list[str]],
    ablation: str,
    reference: Any,
    seed: int | None,
    method: str,
    options: Mapping[str, Any],
) -> HeadRemoval:
    made = [removed(own, ablation, side if reference is None else reference) for own in sets.values()]
    with contextlib.nullcontext() if options["progress"] else verbosity("quiet"):
        swept = model.sweep(side, made, accuracy(), **options)
    return HeadRemoval(
        values=torch.cat([swept.clean[None], swept.values]),
        axes={"condition": [INTACT, *sets], "example": swept.axes["example"]},
        provenance=describe(
            model,
            method=f"{method}({ablation} ablation)",
            metric=accuracy(),
            seed=seed,
            dataset_sha256=side.digest,
            examples=len(side),
        ),
        sets={INTACT: [], **sets},
        group_of=group_of,
        ablation=ablation,
        edits=[by_digest(group) for group in made],
        groups=list(swept.groups),
    )


def raises_worst(result: HeadRemoval) -> Finding:
    """Whether removing the heads raises the worst group: the interval of the rise leaves 0 out, and no random set of at least :data:`FEWEST_RANDOM`
    raises it as much (``chance``: the most). Of a curve nothing is claimed: its set was chosen by this number."""
    value, low, high = result.rise()
    worst = result.worst
    at = [result.index_of("condition", name) for name in (INTACT, result._chosen)]
    before, after = (float(worst[number]) for number in at)
    draws = [float(worst[result.index_of("condition", name)]) for name in result.random_sets]
    chance = max(draws) - before if draws else None
    about = {
        "count": str(len(result.heads)),
        "heads": ", ".join(map(spelled, result.heads)),
        "before": percent(before),
        "after": percent(after),
        "random": percent(max(draws)) if draws else "",
        "draws": str(len(draws)),
        "curve": "yes" if result.is_curve else "",
    }
    reason = ""
    if low <= 0:
        reason = "the interval of the rise holds 0"
    elif chance is not None and value <= chance:
        reason = "random heads do as much"
    elif not result.is_curve and len(draws) < FEWEST_RANDOM:
        reason = "too few random sets tell"
    told = None if result.is_curve else not reason
    return Finding("raises worst", told, value, "share", (low, high), len(result.examples), chance, reason, about)
