"""Labels, honest splits and honest controls: which examples a probe is fitted and scored on.

Splits go by group, no group on both sides, and in proportion for every class as far as groups allow. Folds are scikit-learn's
(``StratifiedKFold``, ``StratifiedGroupKFold``, ``GroupKFold``); it has no split by share that does both, so that one is drawn here.

Shuffled labels keep what groups share: every group takes the labels of another one, in random order (repeated or cut to its size), within the
training and within the held-out examples. Where a group has one label, groups exchange their labels as wholes; where all groups hold the same
mixture, labels are shuffled within them. Example by example, many copies of one scene would look like many independent examples, and the
control would come out too narrow. Without groups every example is its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError, checked_seed, warn

Split = tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]
"""Numbers of the training and of the held-out examples."""
_DRAWS = 100
"""How many draws of groups a split by share is chosen from."""


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
) -> list[Split]:
    """Pairs (training examples, held-out examples): one by share, ``folds`` that hold out every example once, or what ``held_out`` names.

    Examples with the same entry of ``groups`` stay on one side.

    Raises:
        InputError: a share outside (0, 1), fewer than two folds, groups of another length or fewer than the folds, examples to hold out that
        are not there or beside folds or groups, a class that would be missing in training or held out.
    """
    count = len(targets.values)
    if held_out is not None:
        if folds is not None or groups is not None:
            raise InputError("held_out names the examples held out, so folds and groups have no say; leave them out.")
        return _checked(targets, [_named(held_out, count)], everything=False)
    if folds is None and not (isinstance(test_share, (int, float)) and 0 < test_share < 1):
        raise InputError(f"test_share={test_share!r} must lie between 0 and 1.")
    if folds is not None and not (is_whole(folds) and 2 <= folds <= count):
        raise InputError(f"folds={folds!r} must be a whole number between 2 and the {count} examples.")
    if groups is not None and len(groups) != count:
        raise InputError(f"There are {len(groups)} groups for {count} labels; give one per example.")
    numbers = group_numbers(groups, count)
    if numbers.max() + 1 < (folds or 2):
        raise InputError(f"{numbers.max() + 1} groups are too few for {folds or 2} parts; give more groups.")
    parts = folded(targets, numbers, folds, seed) if folds else [_by_share(targets, numbers, test_share, seed)]
    return _checked(targets, parts)


def _named(held_out: Any, count: int) -> Split:
    """The split that numbers or a mask of the examples held out make."""
    chosen = np.asarray(held_out)
    fits = chosen.ndim == 1 and (len(chosen) == count if chosen.dtype == bool else chosen.dtype.kind in "iu")
    if not fits or not (chosen.dtype == bool or ((chosen >= 0) & (chosen < count)).all()):
        raise InputError(f"held_out is a mask of the {count} examples, or some of their numbers.")
    test = np.zeros(count, dtype=bool)
    test[chosen] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def _by_share(targets: Targets, groups: Int[np.ndarray, " example"], share: float, seed: int) -> Split:
    """Groups drawn in proportion for what is commonest in them; of many draws the one nearest to the share, for every class and in all."""
    rng = np.random.default_rng(checked_seed(seed))
    counts = np.zeros((groups.max() + 1, max(1, len(targets.classes)) + 1))
    np.add.at(counts, (groups, targets.strata), 1)
    counts[:, -1] = np.bincount(groups)
    grouped, commonest, total = len(counts) < len(groups), counts[:, :-1].argmax(1), counts.sum(0)

    def some(own: np.ndarray) -> np.ndarray:
        wanted, few = int(share * len(own) + (rng.random() if grouped else 0.5)), int(len(own) > 1)
        return rng.permutation(own)[: np.clip(wanted, few, len(own) - few)]

    strata = [np.flatnonzero(commonest == kind) for kind in np.unique(commonest)]
    draws = [np.concatenate([some(own) for own in strata]) for _ in range(_DRAWS if grouped else 1)]
    draws = [drawn for drawn in draws if 0 < len(drawn) < len(counts)] or draws
    held = min(draws, key=lambda drawn: (np.square(counts[drawn].sum(0) - share * total) / total).sum())
    return np.flatnonzero(~np.isin(groups, held)), np.flatnonzero(np.isin(groups, held))


def folded(targets: Targets, groups: Int[np.ndarray, " example"], count: int, seed: int) -> list[Split]:
    """So many parts, each held out once, by groups; in proportion where there are classes with as many examples as parts."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedGroupKFold if len(np.unique(groups)) < len(groups) else StratifiedKFold
    if not targets.classes or np.bincount(targets.strata).max() < count:
        kind = GroupKFold
    state = np.random.RandomState(np.random.MT19937(checked_seed(seed)))  # a seed may be larger than scikit-learn's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rare classes, and of groups that split nothing
        return list(kind(count, shuffle=True, random_state=state).split(groups, targets.strata, groups))


def _inner(
    targets: Targets, groups: Int[np.ndarray, " example"], train: Int[np.ndarray, " train"], seed: int
) -> list[Split]:
    """Three folds of the training examples (their numbers within it), fewer where there are fewer groups."""
    own = np.unique(groups[train], return_inverse=True)[1]
    count = min(3, own.max() + 1)
    parts = folded(Targets(targets.values[train], targets.classes), own, count, seed) if count > 1 else []
    return [(first, second) for first, second in parts if len(first) > 1 and len(second)]


def _checked(targets: Targets, parts: list[Split], everything: bool = True) -> list[Split]:
    """The splits, if every class is there to train on, and (``everything``) held out somewhere."""
    advice = "gather more examples of it, leave it out, or use smaller groups or another seed"
    if any(len(train) < 2 or len(test) == 0 for train, test in parts):
        raise InputError(
            "A split leaves nothing to train on or nothing held out; give more examples or smaller groups."
        )
    for number, label in enumerate(targets.classes):
        own = targets.values.numpy() == number
        if not all(own[train].any() for train, _ in parts):
            raise InputError(f"No example of {label!r} would be left to train on; {advice}.")
        if everything and not any(own[test].any() for _, test in parts):
            raise InputError(f"No example of {label!r} would be held out; {advice}.")
    return parts


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
                row[side] = values[side[_exchanged(groups[side], rng)]]
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
    inner: list[list[Split]]
    """Per part, the folds of its training examples in which penalties are chosen; none where one is given."""
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
        inner = [_inner(targets, numbers, train, seed) if penalty is None else [] for train, _ in parts]
        return cls(targets, parts, inner, control, numbers, penalty, seed, settings)

    def warn_if_few(self, features: int) -> None:
        """Warn where some part has fewer training examples than features."""
        count = min(len(train) for train, _ in self.parts)
        if count < features:
            warn(
                f"{count} training examples for {features} features: a linear map can fit any labels on them, so the training score "
                "says nothing. Compare held-out scores with the control (selectivity), or gather more examples."
            )
