"""Labels, honest splits and honest controls: which examples a probe is fitted and scored on.

Splits are drawn group by group, largest first, each to the part that lacks most of its classes: stratified, and no group is on both sides.

Shuffled labels keep what groups share: every group takes the labels of another one, in random order (repeated or cut to its size), within the
training and within the held-out examples. Where a group has one label, groups exchange their labels as wholes; where all groups hold the same
mixture, labels are shuffled within them. Example by example, many copies of one scene would look like many independent examples, and the
control would come out too narrow. Without groups every example is its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError, checked_seed, warn

Split = tuple[Tensor, Tensor]
"""Numbers of the training and of the held-out examples."""


@dataclass(frozen=True)
class Targets:
    """What is to be told: class numbers and the classes' names, or numbers (``classes`` is empty)."""

    values: Tensor
    classes: list[Any]

    @classmethod
    def of(cls, labels: Sequence[Any] | Tensor | np.ndarray) -> Targets:
        """Labels of text, whole numbers or booleans are classes (sorted); floats are numbers to be predicted.

        Raises:
            InputError: labels of several types, of none of these, not finite, or all the same.
        """
        plain = _plain(labels)
        kinds = {type(label) for label in plain}
        if kinds <= {float, int} and float in kinds:
            values = torch.tensor(plain, dtype=torch.float64)
            if not bool(torch.isfinite(values).all()):
                raise InputError("Some labels are not finite numbers; leave those examples out.")
            found = cls(values, [])
        else:
            found = cls(*numbered(plain))
        if len(set(plain)) < 2:
            raise InputError("All labels are the same; there is nothing to tell apart.")
        return found

    @property
    def strata(self) -> Int[np.ndarray, " example"]:
        """What a split keeps in proportion: the class, or nothing for numbers."""
        return self.values.numpy() if self.classes else np.zeros(len(self.values), dtype=np.int64)


def numbered(labels: Sequence[Any] | Tensor | np.ndarray) -> tuple[Int[Tensor, " example"], list[Any]]:
    """Labels as numbers of their sorted classes, and the classes.

    Raises:
        InputError: labels that are not all text, all whole numbers or all booleans, or none.
    """
    plain = _plain(labels)
    kinds = {type(label) for label in plain}
    if len(kinds) != 1 or not kinds <= {str, int, bool}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise InputError(
            f"Labels are one flat sequence of text, whole numbers or booleans (classes), or of floats (numbers); found {found}."
        )
    classes = sorted(set(plain))
    number = {label: index for index, label in enumerate(classes)}
    return torch.tensor([number[label] for label in plain]), classes


def _plain(labels: Sequence[Any] | Tensor | np.ndarray) -> list[Any]:
    plain = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
    if isinstance(plain, str) or not isinstance(plain, Iterable):
        raise InputError(f"Labels are a sequence with one entry per example, not {plain!r}.")
    plain = list(plain)
    if any(isinstance(label, list | tuple) for label in plain):
        raise InputError(
            "Labels are one per example, and these have several each. For a label per patch probe the vectors themselves: "
            "linear_probe(None, {site: cache[site][:, n_prefix:].flatten(0, 1)}, labels.flatten(), groups=the image of each patch)."
        )
    return [_key(label) for label in plain]


def splits(
    targets: Targets,
    *,
    test_share: float = 0.3,
    folds: int | None = None,
    groups: Sequence[Any] | None = None,
    held_out: Sequence[int] | Sequence[bool] | Tensor | np.ndarray | None = None,
    seed: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (training examples, held-out examples): one by share, ``folds`` that hold out every example once, or what ``held_out`` names.

    Examples with the same entry of ``groups`` stay on one side.

    Raises:
        InputError: a share outside (0, 1), fewer than two folds, groups of another length, examples to hold out that are not there or beside
        folds or groups, a class that would be missing in training or held out.
    """
    count = len(targets.values)
    if held_out is not None:
        if folds is not None or groups is not None:
            raise InputError("held_out names the examples held out, so folds and groups have no say; leave them out.")
        return [_named(targets, held_out)]
    if folds is None and not (isinstance(test_share, (int, float)) and 0 < test_share < 1):
        raise InputError(f"test_share={test_share!r} must lie between 0 and 1.")
    if folds is not None and not (is_whole(folds) and 2 <= folds <= count):
        raise InputError(f"folds={folds!r} must be a whole number between 2 and the {count} examples.")
    if groups is not None and len(groups) != count:
        raise InputError(f"There are {len(groups)} groups for {count} labels; give one per example.")
    shares = np.array([1 - test_share, test_share]) if folds is None else np.full(folds, 1 / folds)
    part = torch.from_numpy(dealt(targets.strata, shares, groups, seed))
    numbers = [1] if folds is None else range(folds)
    found = [((part != number).nonzero().flatten(), (part == number).nonzero().flatten()) for number in numbers]
    _check_parts(targets, found)
    return found


def _named(targets: Targets, held_out: Any) -> tuple[Tensor, Tensor]:
    """The split that numbers or a mask of the examples held out make."""
    count, chosen = len(targets.values), torch.as_tensor(held_out)
    fits = chosen.ndim == 1 and not chosen.is_floating_point()
    if fits and chosen.dtype == torch.bool:
        fits, chosen = len(chosen) == count, chosen.nonzero().flatten()
    if not fits or not bool(((chosen >= 0) & (chosen < count)).all()):
        raise InputError(f"held_out is a mask of the {count} examples, or some of their numbers.")
    test = torch.zeros(count, dtype=torch.bool).index_fill_(0, chosen.long(), True)
    found = ((~test).nonzero().flatten(), test.nonzero().flatten())
    _check_parts(targets, [found], everything=False)
    return found


def dealt(
    strata: Int[np.ndarray, " example"], shares: np.ndarray, groups: Sequence[Any] | None, seed: int
) -> Int[np.ndarray, " example"]:
    """The part of every example: groups go, largest first and else in random order, where their classes are most wanting."""
    rng = np.random.default_rng(checked_seed(seed))
    group = group_numbers(groups, len(strata))
    counts = np.zeros((int(group.max()) + 1, int(strata.max()) + 1))
    np.add.at(counts, (group, strata), 1)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    lacking = shares[:, None] * counts.sum(0)
    part = np.zeros(len(counts), dtype=np.int64)
    for index in order:
        own = counts[index]
        # How much less the squared shortfall gets if this part takes the group.
        part[index] = int(np.argmax((own * (2 * lacking - own)).sum(1)))
        lacking[part[index]] -= own
    return part[group]


def is_whole(number: Any) -> bool:
    """Whether this is a whole number, and not True or False."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def group_numbers(groups: Sequence[Any] | None, count: int) -> Int[np.ndarray, " example"]:
    """The number of every example's group, in the order in which they first occur; without groups every example is its own."""
    numbers: dict[Any, int] = {}
    keys = range(count) if groups is None else groups
    return np.array([numbers.setdefault(_key(key), len(numbers)) for key in keys])


def _key(label: Any) -> Any:
    if not isinstance(label, (Tensor, np.ndarray, np.generic)):
        return label
    return label.item() if label.ndim == 0 else tuple(label.tolist())


def _check_parts(targets: Targets, parts: Sequence[tuple[Tensor, Tensor]], everything: bool = True) -> None:
    """Every class is there to train on, and (``everything``) held out somewhere."""
    advice = "gather more examples of it, leave it out, or use smaller groups or another seed"
    if any(len(train) < 2 or len(test) == 0 for train, test in parts):
        raise InputError(
            "A split leaves nothing to train on or nothing held out; give more examples or smaller groups."
        )
    for number, label in enumerate(targets.classes):
        own = targets.values == number
        if any(not bool(own[train].any()) for train, _ in parts):
            raise InputError(f"No example of {label!r} would be left to train on; {advice}.")
        if everything and not any(bool(own[test].any()) for _, test in parts):
            raise InputError(f"No example of {label!r} would be held out; {advice}.")


# -- controls and intervals ----------------------------------------------------------------------------------------------------------------


def shuffled(
    values: Tensor, parts: Sequence[Split], groups: Int[np.ndarray, " example"], shuffles: int, seed: int
) -> list[Float[Tensor, "shuffle example"]]:
    """Per part, labels shuffled within the training and within the held-out examples; see the module for what groups do."""
    rng = np.random.default_rng([checked_seed(seed), 1])
    found = []
    for part in parts:
        drawn = values.repeat(shuffles, 1)
        for row in drawn:
            for side in part:
                row[side] = values[side[torch.from_numpy(_exchanged(groups[side.numpy()], rng))]]
        found.append(drawn)
    return found


def _exchanged(groups: Int[np.ndarray, " example"], rng: np.random.Generator) -> Int[np.ndarray, " example"]:
    """Which example's label every example takes: those of another group, in random order."""
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    source = np.empty(len(groups), dtype=np.int64)
    for own, other in zip(members, rng.permutation(len(members)), strict=True):
        source[own] = np.resize(rng.permutation(members[other]), len(own))
    return source


def bootstrapped(
    predicted: Float[Tensor, "site example"],
    target: Float[Tensor, " example"],
    groups: Int[np.ndarray, " example"],
    seed: int,
    draws: int = 2000,
) -> tuple[Float[Tensor, " site"], Float[Tensor, " site"]]:
    """95% interval of R² over redrawn held-out groups (percentiles); NaN for a single group."""
    numbers = np.unique(groups, return_inverse=True)[1]
    count = int(numbers.max()) + 1
    if count < 2:
        return (torch.full((len(predicted),), torch.nan, dtype=torch.float64),) * 2
    rng = np.random.default_rng([checked_seed(seed), 2])
    drawn = torch.from_numpy(rng.multinomial(count, np.full(count, 1 / count), size=draws)[:, numbers]).double()
    total = drawn.sum(1)
    centred = target - target.mean()
    spread = drawn @ centred.square() - (drawn @ centred).square() / total
    missed = drawn @ (target - predicted).square().T
    found = 1 - missed / torch.where(spread > 0, spread, torch.nan)[:, None]
    low, high = torch.nanquantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype), dim=0)
    return low, high


# -- all of it together ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All that is known of a probe before any activation: targets, splits, shuffled labels and settings."""

    targets: Targets
    parts: list[Split]
    shuffled: list[Tensor]
    groups: np.ndarray
    penalty: float | None
    seed: int
    settings: str

    @classmethod
    def of(
        cls,
        labels: Any,
        test_share: float,
        folds: int | None,
        groups: Sequence[Any] | None,
        held_out: Any,
        shuffles: int,
        penalty: float | None,
        seed: int,
    ) -> Plan:
        """Check the settings and divide the examples."""
        targets = Targets.of(labels)
        if not (is_whole(shuffles) and shuffles >= 0 and is_whole(seed) and seed >= 0):
            raise InputError(f"shuffles={shuffles!r} and seed={seed!r} must be whole numbers that are not negative.")
        if penalty is not None and not (isinstance(penalty, (int, float)) and 0 < penalty < np.inf):
            raise InputError(f"penalty={penalty!r} must be a positive number, or None to choose it.")
        parts = splits(targets, test_share=test_share, folds=folds, groups=groups, held_out=held_out, seed=seed)
        numbers = group_numbers(groups, len(targets.values))
        divided = (
            "held_out=given" if held_out is not None else f"folds={folds}" if folds else f"test_share={test_share}"
        )
        settings = f"{divided}, shuffles={shuffles}, penalty={'chosen' if penalty is None else penalty}"
        settings += ", grouped" if groups is not None else ""
        control = shuffled(targets.values, parts, numbers, shuffles, seed)
        return cls(targets, parts, control, numbers, penalty, seed, settings)

    def warn_if_few(self, features: int) -> None:
        """Warn where some part has fewer training examples than features."""
        count = min(len(train) for train, _ in self.parts)
        if count < features:
            warn(
                f"{count} training examples for {features} features: a linear map can fit any labels on them, so the training score "
                "says nothing. Compare held-out scores with the control (selectivity), or gather more examples."
            )
