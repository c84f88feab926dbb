"""Maximally activating examples: for every unit the examples on which it is most active, in one pass over a data set of any length.

A unit is a neuron (``mlp.hook_post``), a coordinate of any site without heads, a head of a site with heads (by the length of its vector), a
direction or a feature of a dictionary (``through``). A unit's value on an example is its largest (``pool="max"``) or mean (``pool="mean"``)
activation over the chosen positions, padding never among them; the position kept is where it is most active, for either pool.

Only the ``top_k`` best per unit are kept, with sums for the means, so memory does not grow with the data set. Equal values go to the example
with the lower number, whatever the batches, so an index equals a full sort, and indices of two halves merge into the index of the whole.

They show what a unit's strongest responses look like and nothing about the rest: read them beside ``active`` and, with labels,
``selectivity`` (Morcos et al. 2018, arXiv 1803.06959) and ``class_entropy``. Coordinates of the residual stream are not neurons; a few are
large on every image.

Not covered: examples from the middle of the range, attention patterns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.probes.collected import ByTower, position_label, positions_for
from circuitvision.readout.probes.splitting import is_whole, numbered
from circuitvision.readout.probes.streaming import Reading
from circuitvision.readout.probes.strongest import Best, Sums, UnitReader, Units
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.model.wrapped import Wrapped

_POOLS = ("max", "mean")


class Encoder(Protocol):
    """Anything that turns activations into features, such as a dictionary."""

    def encode(self, x: Float[Tensor, "pos d_in"]) -> Float[Tensor, "pos feature"]:
        """The features of every position."""
        ...


@dataclass(frozen=True, eq=False)
class MaxActivatingExamples(Result):
    """The strongest examples of every unit: ``values`` ``[unit rank]``, strongest first.

    ``example`` and ``position`` ``[unit rank]`` say where, ``places`` ``[unit rank 4]`` its image, tile, patch row and column (−1 where it is no
    patch), ``boxes`` ``[unit rank 4]`` its (left, top, right, bottom) as shares of that image (NaN likewise) and ``tokens`` its label (a word,
    or the patch). Over all ``count`` examples: ``average`` and ``maximum`` of the unit's value, and ``active``, the share of all positions where
    it is above ``threshold``. With labels, ``class_means`` ``[class unit]`` is its mean response in every class, values below 0 counting as 0
    (the negative tail of an activation function is no response). ``ranges`` lists the examples seen, and ``interrupted`` is not empty where
    the data set was not finished.
    """

    example: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    position: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    places: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 4, dtype=torch.long))
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 4))
    tokens: list[list[str]] = field(default_factory=list)
    average: Tensor = field(default_factory=lambda: torch.zeros(0))
    maximum: Tensor = field(default_factory=lambda: torch.zeros(0))
    active: Tensor = field(default_factory=lambda: torch.zeros(0))
    count: int = 0
    n_positions: int = 0
    ranges: list[list[int]] = field(default_factory=list)
    classes: list[Any] = field(default_factory=list)
    class_means: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    class_counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    sites: list[str] = field(default_factory=list)
    unit_kind: str = "unit"
    pool: str = "max"
    threshold: float = 0.0
    top_k: int = 10
    interrupted: str = ""

    @property
    def selectivity(self) -> Float[Tensor, " unit"]:
        """``(μ_max − μ_rest) / (μ_max + μ_rest)`` of the class means, ``μ_rest`` the mean of the other classes' means: 1 fires for one class alone.

        NaN where the unit never fires. Raises InputError without labels.
        """
        means = self._means()
        best = means.max(0).values
        rest = (means.sum(0) - best) / max(len(means) - 1, 1)
        return (best - rest) / (best + rest)

    @property
    def class_entropy(self) -> Float[Tensor, " unit"]:
        """Entropy of the class means as shares of their sum, in nats: 0 for one class alone, ``ln`` of the number of classes for all alike.

        NaN where the unit never fires. Raises InputError without labels.
        """
        means = self._means()
        shares = means / means.sum(0)
        return torch.special.entr(shares).sum(0)

    @property
    def preferred(self) -> list[Any]:
        """The class of the largest mean, per unit. Raises InputError without labels."""
        best = self._means().argmax(0).tolist()
        seen = [label for label, count in zip(self.classes, self.class_counts.tolist(), strict=True) if count]
        return [seen[index] for index in best]

    def _means(self) -> Float[Tensor, "class unit"]:
        """The means of the classes that were seen."""
        seen = self.class_counts > 0
        if int(seen.sum()) < 2:
            raise InputError("Selectivity compares classes: max_activating_examples(…, labels=…) with at least two.")
        return self.class_means[seen]

    def _long_frame(self) -> pd.DataFrame:
        """One row per unit and rank: value, example, position and its label; with labels also the unit's preferred class and selectivity."""
        frame = super()._long_frame()
        frame["example"] = self.example.flatten().numpy()
        frame["position"] = self.position.flatten().numpy()
        frame["token"] = [token for unit in self.tokens for token in unit]
        if int((self.class_counts > 0).sum()) > 1:
            ranks = self.values.shape[1]
            frame["preferred"] = np.repeat(np.array(self.preferred, dtype=object), ranks)
            frame["selectivity"] = self.selectivity.repeat_interleave(ranks).numpy()
        return frame

    def highlights(self) -> dict[str, str]:
        """How much was seen, and the unit whose strongest example is strongest."""
        best = int(self.values[:, 0].argmax())
        seen = f"{self.count} examples, {self.n_positions} positions" + (
            f" ({self.interrupted})" if self.interrupted else ""
        )
        strongest = f"{self.unit_kind} {self.axes['unit'][best]}: {float(self.values[best, 0]):.3g} on example {int(self.example[best, 0])}"
        return {"seen": seen, "strongest": strongest}

    def row(self, unit: Any) -> int:
        """The index of a unit's label on the unit axis; InputError if there is no such unit."""
        return self.index_of("unit", unit)

    @with_provenance
    def merge(self, other: MaxActivatingExamples) -> MaxActivatingExamples:
        """The index of both data sets together; number the second with ``max_activating_examples(…, start=…)``.

        Raises:
            InputError: other units, sites or settings, or examples that both have seen.
        """
        for name in ("sites", "unit_kind", "pool", "threshold", "top_k"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(f"These indices differ in {name}: {getattr(self, name)} and {getattr(other, name)}.")
        if self.axes["unit"] != other.axes["unit"] or bool(self.classes) != bool(other.classes):
            raise InputError("These indices are of other units, or only one of them has labels.")
        if self.provenance.get("weights_sha256") != other.provenance.get("weights_sha256"):
            raise InputError("These indices are of models with different weights.")
        ranges = _joined_ranges([*self.ranges, *other.ranges])
        classes = sorted({*self.classes, *other.classes})
        mine, theirs = _state(self, classes), _state(other, classes)
        digests = [str(index.provenance.get("dataset_sha256", "")) for index in (self, other)]
        return _index(
            mine[0].merged(theirs[0], self.top_k),
            mine[1] + theirs[1],
            units=self.axes["unit"],
            provenance={**self.provenance, "dataset_sha256": hashlib.sha256("".join(digests).encode()).hexdigest()},
            ranges=ranges,
            classes=classes,
            sites=self.sites,
            unit_kind=self.unit_kind,
            pool=self.pool,
            threshold=self.threshold,
            top_k=self.top_k,
            interrupted="; ".join(filter(None, (self.interrupted, other.interrupted))),
        )


@with_provenance
def max_activating_examples(
    model: Wrapped,
    dataset: Any,
    site: str | Sequence[str],
    *,
    top_k: int = 10,
    units: Sequence[int] | None = None,
    pool: str = "max",
    positions: ByTower = "all",
    through: Float[Tensor, "unit d_in"] | np.ndarray | Encoder | Callable[[Tensor], Tensor] | None = None,
    labels: Sequence[Any] | Tensor | np.ndarray | None = None,
    threshold: float = 0.0,
    batch_size: int = 32,
    start: int = 0,
) -> MaxActivatingExamples:
    """Index the strongest examples of every unit of a site over a data set. Ctrl-C returns what was seen so far.

    Args:
        model: the hooked model.
        dataset: an iterable of model inputs, or one mapping of many examples.
        site: a name, or names or a glob of one kind of site: units are then labelled ``"layer.unit"``.
        top_k: examples kept per unit.
        units: numbers of the units; all by default.
        pool: ``"max"`` or ``"mean"`` over an example's positions.
        positions: where units are read, see :func:`circuitvision.readout.probes.collected.chosen`; by default everywhere but padding.
        through: directions (a unit's activation is ``x · direction``), a function or module of ``x [pos d_in]``, or anything with ``.encode(x)``.
        labels: one class per example, for selectivity.
        threshold: a unit is active above it.
        batch_size: examples that run at once.
        start: the number of the data set's first example, for indices to be merged.

    Raises:
        InputError: settings that make no sense, labels or positions that do not fit the data set, activations that are not finite.
        UnknownSiteError: no such site.
    """
    if pool not in _POOLS or not (is_whole(top_k) and top_k >= 1 and is_whole(start) and start >= 0):
        raise InputError(
            f"pool={pool!r} must be 'max' or 'mean', top_k={top_k!r} a whole number of at least 1, start={start!r} one that is not negative."
        )
    if threshold != threshold:
        raise InputError("threshold is not a number; a unit is active above it.")
    kept = Units(model.sites(site), units, through)
    codes, classes = (None, []) if labels is None else numbered(labels)
    reader = UnitReader(kept, pool, positions, threshold, start, codes, len(classes), top_k)
    reading = Reading(model, dataset, kept.sites, reader, batch_size=batch_size, description="max activating examples")
    labelled = None if codes is None else len(codes)
    positions = positions_for(reading.total, labelled, positions)
    best, sums, interrupted = _streamed(reading, kept.sites, top_k)
    positions_for(None if interrupted else sums.count, labelled, positions)
    settings = f"pool={pool}, positions={position_label(positions)}, top_k={top_k}, units={kept.kind}"
    return _index(
        best,
        sums,
        units=kept.labels(len(best.values)),
        provenance=describe(model, method=f"max_activating_examples({settings})", dataset_sha256=reading.digest),
        ranges=[[start, start + sums.count]],
        classes=classes,
        sites=kept.sites,
        unit_kind=kept.kind,
        pool=pool,
        threshold=threshold,
        top_k=top_k,
        interrupted=interrupted,
    )


def _streamed(reading: Reading, sites: Sequence[str], top_k: int) -> tuple[Best, Sums, str]:
    """The state after the whole data set, or after the batches before Ctrl-C, and a note of that."""
    state: tuple[Best, Sums] | None = None
    try:
        for _, found in reading:
            best = Best.of_units([found[name][0] for name in sites])
            sums = Sums.of_units([found[name][1] for name in sites])
            # One assignment: an interruption leaves the state before a batch or after it.
            state = (best, sums) if state is None else (state[0].merged(best, top_k), state[1] + sums)
    except KeyboardInterrupt:
        if state is None:
            raise
        note = f"stopped by hand after {state[1].count} examples"
        warn(f"The index was {note} and covers those alone.")
        return *state, note
    assert state is not None
    return *state, ""


def _index(best: Best, sums: Sums, *, units: list[Any], classes: list[Any], **settings: Any) -> MaxActivatingExamples:
    labelled = bool(classes)
    return MaxActivatingExamples(
        values=best.values,
        axes={"unit": units, "rank": list(range(1, best.values.shape[1] + 1))},
        example=best.example,
        position=best.position,
        places=best.places,
        boxes=best.boxes,
        tokens=best.tokens.tolist(),
        average=sums.total / sums.count,
        maximum=sums.maximum,
        active=sums.active.double() / sums.n_positions,
        count=sums.count,
        n_positions=sums.n_positions,
        classes=classes,
        class_means=sums.by_class / sums.class_counts[:, None] if labelled else torch.zeros(0, 0),
        class_counts=sums.class_counts,
        **settings,
    )


def _state(index: MaxActivatingExamples, classes: Sequence[Any]) -> tuple[Best, Sums]:
    """What an index was made of, its class sums laid out by ``classes``."""
    by_class = torch.zeros(len(classes), len(index.average), dtype=torch.float64)
    counts = torch.zeros(len(classes), dtype=torch.long)
    for number, label in enumerate(index.classes):
        counts[classes.index(label)] = index.class_counts[number]
        by_class[classes.index(label)] = index.class_means[number].nan_to_num(0.0) * index.class_counts[number]
    tokens = np.empty(index.values.shape, dtype=object)
    tokens[:] = index.tokens
    return (
        Best(index.values, index.example, index.position, index.places, index.boxes, tokens),
        Sums(
            index.count,
            index.n_positions,
            index.average * index.count,
            index.maximum,
            (index.active * index.n_positions).round().long(),
            by_class,
            counts,
        ),
    )


def _joined_ranges(ranges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ranges of examples in order, neighbours joined; InputError where two overlap."""
    found: list[list[int]] = []
    for first, last in sorted((first, last) for first, last in ranges):
        if found and first < found[-1][1]:
            raise InputError(
                f"Both indices have seen example {first}; number the second data set with max_activating_examples(…, start={found[-1][1]})."
            )
        if found and first == found[-1][1]:
            found[-1][1] = last
        else:
            found.append([first, last])
    return found
