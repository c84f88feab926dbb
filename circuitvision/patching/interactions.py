"""Interactions of components: which of them do the same work twice, and which are of no use without another.

``v(S)`` is the metric where exactly the components in ``S`` are intact and the other chosen ones are corrupted. All coalitions ``S`` that are asked
for are one sweep; what follows from them (pair interactions, dividends, Shapley values, conditional effects) is in
:mod:`circuitvision.patching.coalitions`.

* ``mode="denoise"``: in the corrupt run the components in ``S`` take their clean values. The others are *held* at the values of the corrupt run:
  unheld, a component that reads another one would follow it to its clean value, and a chain of two would look like two that back each other up.
* ``mode="noise"``: in the clean run the components outside ``S`` take their corrupt values.
* ``mode="ablate"``: in the one run the components outside ``S`` are ablated (``method``: zero, mean, resample). In both of these an intact component
  computes its value from what reaches it, so it may react: conditional effects measure self-repair. ``hold=True`` stops that as well.

Components outside the choice compute theirs in every mode.

The null permutes the pairing of the two runs: each example keeps its base run, answer and metric, and takes the other run's values from another
example (a random cycle through all examples, so none keeps its partner). Interactions that are as large there come from changing the components at
all, not from what they say about this example.

Not covered: a null of inputs in memory, of edits made by hand, and of ablation, which have no pairing; components that share entries of a site.

References: Harsanyi 1963; Shapley 1953; Castro et al. 2009 on drawing orders; McGrath et al. 2023 (arXiv 2307.15771) on self-repair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.data import Pairs
from circuitvision.errors import InputError, checked_seed
from circuitvision.metric_set import MetricSet
from circuitvision.model.edits.base import Edit, by_digest
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.activation import dead_sites, first_inputs
from circuitvision.patching.clean_answers import check_data
from circuitvision.patching.coalitions import ALL, NOTHING, Coalition, InteractionResult
from circuitvision.patching.components import Component, Place, components_of
from circuitvision.patching.runs import Groups, Measured, Runs, two_runs
from circuitvision.provenance import describe, with_provenance

MODES = ("denoise", "noise", "ablate")
MOST = 10
"""So many components have all their coalitions run, at most: 1024 of them."""


@with_provenance
def interactions(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    components: Any,
    order: int | str = 2,
    mode: str = "denoise",
    method: Any = "mean",
    hold: bool | None = None,
    reference: Any = None,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    draws: int = 64,
    permutations: int = 0,
    seed: int = 0,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> InteractionResult:
    """Run coalitions of components, and measure ``v(S)`` of each: see the module, and :class:`InteractionResult` for what follows from it.

    Args:
        model: the hooked model.
        pairs: a data set of pairs; with ``mode="ablate"`` a side of them does, and of pairs the clean one is run.
        metric: a metric, its name, or a mapping of several (see :mod:`circuitvision.metrics`).
        components: a list, or a mapping with names of your own. Each is a head, MLP, attention layer or neuron in any spelling (``"vision L1H3"``,
            ``"vision L2.mlp"``, ``"vision L2N118"``), a site or glob, a mapping ``{"site": …, "heads": …, "positions": …, "neurons": …}``, an edit
            made by hand, or a list of these, which counts as one. An edit is what the mode does to a component: it puts it back (``"denoise"``), or
            takes it away.
        order: ``2``: every single component and pair, intact alone and missing alone; ``"all"``: every coalition, of up to 10 components;
            ``"sampled"``: the coalitions of ``draws`` random orders, for Shapley values of many.
        mode: ``"denoise"``, ``"noise"`` or ``"ablate"``.
        method, reference: of ablation, as of :func:`circuitvision.edits.ablate`, and the data set of means and draws (None: what is run).
        hold: whether components that the mode does not change are held at their values in the base run; None: in ``"denoise"``, but for edits made by
            hand, which cannot be.
        clean, corrupt: in place of pairs, the inputs of the two runs, of the same shapes; ``clean`` alone for ablation.
        permutations: how many permuted pairings are run for a null, each the cost of the whole.
        seed: of drawn orders, permutations and resampling.
        align, allow_wrong, example_batch, save_to, resume, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: fewer than two components, too many for ``"all"``, components that share what they change, an unknown mode or order, a null where
            there is no pairing, runs that do not fit together, a component that cannot reach the output, clean runs that do not give the answer,
            dropout in training mode.
        UnknownSiteError: a component that the model does not have.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Interactions")
    chosen = components_of(model, components)
    by_hand = any(len(one.places) < len(one.parts) for one in chosen)
    held = (mode == "denoise" and not by_hand) if hold is None else hold
    _check(chosen, order, mode, held and by_hand, draws)
    _check_null(permutations, mode, pairs, by_hand)
    rng = np.random.default_rng(checked_seed(seed))
    orders = [rng.permutation(len(chosen)).tolist() for _ in range(draws)] if order == "sampled" else []
    coalitions = _coalitions(len(chosen), order, orders)
    ablation = {"method": method, "seed": seed}

    def runs_of(data: Any) -> Runs:
        if mode == "ablate":
            return _OneRun(model, data, metric, clean, reference, example_batch)
        # Of a permuted pairing the other run gives another example's answer.
        wrong = allow_wrong or data is not pairs
        return two_runs(model, data, metric, clean, corrupt, mode, align, example_batch, wrong)

    def measured(data: Any, folder: str) -> tuple[Runs, Measured, Tensor, list[list[Edit]]]:
        runs = runs_of(data)
        changes, holds = _edits(model, chosen, runs, mode, held, ablation)
        options = {
            "save_to": None if save_to is None else Path(save_to) / folder,
            "resume": resume,
            "progress": progress,
        }
        found, values = _values(runs, coalitions, changes, holds, mode, options)
        return runs, found, values, changes

    _check_live(model, chosen, runs_of(pairs))
    if mode == "ablate":
        check_data(model, pairs, MetricSet.of(metric), allow_wrong, example_batch)
    runs, found, values, changes = measured(pairs, "coalitions")
    null = [measured(_permuted(pairs, mode, rng), f"permuted {number}")[2] for number in range(permutations)]
    several = runs.metrics.several
    return InteractionResult(
        values=values if several else values[0],
        axes={**runs.metrics.axis, "coalition": _labels(coalitions, chosen), "example": found.examples},
        provenance=describe(
            model,
            method=f"interactions(mode={mode}{f', method={method}' if mode == 'ablate' else ''}, hold={held})",
            metric=runs.metrics,
            seed=seed,
            **runs.described(),
        ),
        components=[one.name for one in chosen],
        members=[sorted(own) for own in coalitions],
        orders=orders,
        null=torch.stack([own if several else own[0] for own in null]) if null else torch.zeros(0),
        mode=mode,
        hold=held,
        edits=[by_digest(group) for group in changes],
        groups=found.groups,
    )


# -- which coalitions ----------------------------------------------------------------------------------------------------------------------------


def _coalitions(count: int, order: int | str, orders: Sequence[Sequence[int]]) -> list[Coalition]:
    """The coalitions that are run, each once."""
    everyone = frozenset(range(count))
    if order == "sampled":
        found = [frozenset(own[:size]) for own in orders for size in range(count + 1)]
    else:
        sizes = range(count + 1) if order == "all" else range(3)
        found = [frozenset(own) for size in sizes for own in itertools.combinations(range(count), size)]
        found += [everyone - own for own in found]
    return sorted(dict.fromkeys(found), key=lambda own: (len(own), sorted(own)))


def _labels(coalitions: Sequence[Coalition], components: Sequence[Component]) -> list[str]:
    """What is intact, or, where that is more than half, what is not."""
    names, found = [one.name for one in components], []
    for own in coalitions:
        missing = [name for number, name in enumerate(names) if number not in own]
        intact = [name for number, name in enumerate(names) if number in own]
        if not intact or not missing:
            found.append(ALL if intact else NOTHING)
        else:
            found.append(f"all but {', '.join(missing)}" if len(missing) < len(intact) else " + ".join(intact))
    return found


def _check(components: Sequence[Component], order: Any, mode: str, holds_edits: bool, draws: int) -> None:
    if mode not in MODES:
        raise InputError(f"mode={mode!r} is not understood: {', '.join(map(repr, MODES))}.")
    if order not in (2, "all", "sampled"):
        raise InputError(f"order={order!r} is not understood: 2 (single ones and pairs), 'all', or 'sampled'.")
    if order == "all" and len(components) > MOST:
        raise InputError(
            f"All coalitions of {len(components)} components are 2^{len(components)} runs; up to {MOST} components are run so. Take order='sampled' "
            "for Shapley values, order=2 for pairs, or make groups: a list of components counts as one."
        )
    if order == "sampled" and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 2):
        raise InputError(f"draws={draws!r} is not understood: two orders at least.")
    if holds_edits:
        raise InputError(
            "hold=True needs to know where a component is, and an edit made by hand says only what it does: give sites, or hold=False."
        )


def _check_null(permutations: Any, mode: str, pairs: Any, by_hand: bool) -> None:
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 0:
        raise InputError(
            f"permutations={permutations!r} is not understood: how many permuted pairings are run, 0 for none."
        )
    if not permutations:
        return
    if mode == "ablate" or not isinstance(pairs, Pairs) or by_hand:
        raise InputError(
            "A null permutes which example of the one run takes values from which of the other: give pairs (cv.data.Pairs), mode 'denoise' or "
            "'noise', and no edits made by hand; or permutations=0."
        )
    if pairs.maps is not None or len(pairs) < 2:
        raise InputError(
            "A null needs two pairs at least, and pairs whose positions belong together by kind and not by maps of each pair."
        )


def _permuted(pairs: Pairs, mode: str, rng: np.random.Generator) -> Pairs:
    """The pairs with the examples of the source side permuted in one cycle; answers stay with the base side."""
    cycle = rng.permutation(len(pairs))
    taken = np.empty(len(pairs), dtype=int)
    taken[cycle] = np.roll(cycle, 1)
    source = pairs.clean if mode == "denoise" else pairs.corrupt
    moved = source._with(examples=tuple(source.examples[row] for row in taken), boxes=None, masks=None)
    return Pairs.from_sides(moved, pairs.corrupt) if mode == "denoise" else Pairs.from_sides(pairs.clean, moved)


# -- what is run ---------------------------------------------------------------------------------------------------------------------------------


def _edits(
    model: Any, components: Sequence[Component], runs: Runs, mode: str, hold: bool, ablation: Mapping[str, Any]
) -> tuple[list[list[Edit]], list[list[Edit]]]:
    """For each component the edits that change it, and those that hold it at its value in the base run (none, unless asked)."""
    sites = list(dict.fromkeys(place.site for one in components for place in one.places))
    if mode == "ablate":
        assert isinstance(runs, _OneRun)
        own = {**ablation, "dataset": runs.reference}

        def change(place: Place) -> Edit:
            return place.ablated(model, **own)
    else:
        sources = runs.sources(sites)

        def change(place: Place) -> Edit:
            return place.replaced(model, sources[place.site])

    values = runs.holds(sites) if hold else {}
    holds = [one.edited(lambda place: place.replaced(model, values[place.site])) if hold else [] for one in components]
    return [one.edited(change) for one in components], holds


def _check_live(model: Any, components: Sequence[Component], runs: Runs) -> None:
    """Raise InputError for a component that cannot reach the output at any of its places."""
    first = runs.first_inputs()
    for one in components:
        if one.places and len(one.places) == len(one.parts):
            dead_sites(model, [place.site for place in one.places], first)


def _values(
    runs: Runs,
    coalitions: Sequence[Coalition],
    changes: Sequence[list[Edit]],
    holds: Sequence[list[Edit]],
    mode: str,
    options: Mapping[str, Any],
) -> tuple[Measured, Tensor]:
    """The metric of every coalition, ``[metric coalition example]``; that in which nothing is changed is the base run itself."""
    groups: list[tuple[Edit, ...]] = []
    of_coalition = []
    for own in coalitions:
        changed = [(number in own) == (mode == "denoise") for number in range(len(changes))]
        of_coalition.append(len(groups) if any(changed) else None)
        if any(changed):
            groups.append(tuple(edit for number, told in enumerate(changed) if told for edit in changes[number]))
    # Held are all; what a coalition changes it sets behind that.
    measured = runs.measure(groups, [edit for own in holds for edit in own], **options)
    found = [measured.base if place is None else measured.values[:, place] for place in of_coalition]
    return measured, torch.stack(found, 1)


class _OneRun(Runs):
    """One run, of a data set or of inputs in memory, in which components are ablated."""

    def __init__(self, model: Any, data: Any, metric: Any, inputs: Any, reference: Any, size: int | None) -> None:
        if (data is None) == (inputs is None):
            raise InputError("Give pairs or a side of them, or the inputs of the run as clean=….")
        if metric is None:
            raise InputError("No metric was given: a metric, its name ('logit_diff'), or a mapping of several.")
        if data is not None and not hasattr(data, "batches"):
            raise InputError(
                f"A {type(data).__name__} is no data set: give cv.data.Pairs or Side, or inputs as clean=…."
            )
        self.model, self.size = model, size
        self.metrics = MetricSet.of(metric).bind(model) if data is None else MetricSet.of(metric)
        self.data = inputs if data is None else getattr(data, "clean", data)
        self.reference = reference if reference is not None or data is None else self.data

    def first_inputs(self, count: int = 1) -> Mapping[str, Any]:
        """The inputs of the run, of the first example at least."""
        return first_inputs(self.model, self.data)

    def holds(self, names: Sequence[str]) -> dict[str, Any]:
        """The run's own values."""
        if hasattr(self.data, "batches"):
            return dict.fromkeys(names, self.data)
        with torch.no_grad():
            _, cache = self.model.run_with_cache(self.data, names_filter=list(names))
        return {name: cache[name] for name in names}

    def measure(self, groups: Groups, base: Sequence[Edit] = (), **options: Any) -> Measured:
        """One sweep."""
        metric = dict(self.metrics.members) if self.metrics.several else self.metrics.members[""]
        swept = self.model.sweep(self.data, list(groups), metric, example_batch=self.size, base=base, **options)
        values, found = (swept.values, swept.clean) if self.metrics.several else (swept.values[None], swept.clean[None])
        return Measured(values, found, found, swept.axes["example"], swept.groups)

    def described(self) -> dict[str, Any]:
        """The digest of the data, or the inputs."""
        if hasattr(self.data, "batches"):
            return {"dataset_sha256": self.data.digest, "examples": len(self.data)}
        return {"inputs": [self.data]}
