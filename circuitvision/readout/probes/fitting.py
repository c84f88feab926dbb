"""Small linear models and honest splits: what probes are made of.

Features are standardised with the mean and deviation of the training part alone; a feature that is constant there (up to rounding) becomes 0 and
cannot be used. The models, on standardised features ``z``:

* classes: multinomial logistic regression, ``mean cross entropy + penalty / 2 · ||W||²`` (scikit-learn's ``C = 1 / (n · penalty)``), biases
  free;
* numbers: ridge regression, ``mean squared error / 2 + penalty / 2 · ||w||²``, the intercept free.

Both are solved in the principal components of the training features, where the problem is well conditioned and has no more unknowns than
examples: in closed form for numbers, by L-BFGS for classes. Many label vectors over the same features (shuffled labels) are solved together.

Splits are drawn group by group, largest first, each to the part that lacks most of its classes: stratified, and no group is on both sides.

The penalty matters: too large a one hides what is there in small directions, too small a one fits noise. By default it is chosen for every
site, by three folds inside the training part. Not covered: non-linear probes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError

_CONSTANT = 1e-6
"""A feature whose deviation is below this share of its size is rounding noise around a constant."""
_NEGLIGIBLE = 1e-12
"""Principal components below this share of the largest variance are left out."""
_NUMBERS_AT_ONCE = 2**24
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""What a penalty is chosen from."""
_FOLDS, _STEPS_TO_CHOOSE, _STEPS = 3, 100, 500


# -- labels and splits ---------------------------------------------------------------------------------------------------------------------


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
    return [_key(label) for label in (labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels)]


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
    if folds is None and not 0 < test_share < 1:
        raise InputError(f"test_share={test_share} must lie between 0 and 1.")
    if folds is not None and not 2 <= folds <= count:
        raise InputError(f"folds={folds} must lie between 2 and the {count} examples.")
    if groups is not None and len(groups) != count:
        raise InputError(f"There are {len(groups)} groups for {count} labels; give one per example.")
    shares = np.array([1 - test_share, test_share]) if folds is None else np.full(folds, 1 / folds)
    part = torch.from_numpy(_dealt(targets.strata, shares, groups, seed))
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


def _dealt(
    strata: Int[np.ndarray, " example"], shares: np.ndarray, groups: Sequence[Any] | None, seed: int
) -> Int[np.ndarray, " example"]:
    """The part of every example: groups go, largest first and else in random order, where their classes are most wanting."""
    rng = np.random.default_rng(seed)
    numbers: dict[Any, int] = {}
    keys = range(len(strata)) if groups is None else groups
    group = np.array([numbers.setdefault(_key(key), len(numbers)) for key in keys])
    counts = np.zeros((len(numbers), int(strata.max()) + 1))
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


def _key(label: Any) -> Any:
    return label.item() if isinstance(label, (Tensor, np.generic)) else label


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


def wilson(right: Float[Tensor, "*shape"], count: int, z: float = 1.96) -> tuple[Tensor, Tensor]:
    """Wilson's interval of a share ``right`` of ``count``: low and high end, 95% by default (Wilson 1927)."""
    share = right.double()
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)).sqrt()
    return (middle - half).clamp(min=0), (middle + half).clamp(max=1)


# -- the models ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Training features in their principal components: ``(x − mean) / scale @ basis``."""

    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]
    basis: Float[Tensor, "feature component"]
    rotated: Float[Tensor, "example component"]

    @classmethod
    def of(cls, x: Float[Tensor, "example feature"]) -> Features:
        """Standardise and rotate the training part."""
        x = x.double()
        mean = x.mean(0)
        deviation = x.std(0, unbiased=False)
        constant = deviation <= _CONSTANT * torch.maximum(mean.abs(), x.square().mean().sqrt())
        scale = torch.where(constant, torch.ones_like(deviation), deviation)
        z = torch.where(constant, torch.zeros_like(x), (x - mean) / scale)
        wide = z.shape[1] > z.shape[0]
        values, vectors = torch.linalg.eigh(z @ z.T if wide else z.T @ z)
        kept = values > _NEGLIGIBLE * values[-1].clamp(min=1e-300)
        values, vectors = values[kept], vectors[:, kept]
        basis = z.T @ (vectors / values.sqrt()) if wide else vectors
        basis = torch.where(constant[:, None], torch.zeros_like(basis), basis)
        return cls(mean, scale, basis, z @ basis)

    def of_others(self, x: Float[Tensor, "example feature"]) -> Float[Tensor, "example component"]:
        """Other examples in the same components."""
        return ((x.double() - self.mean) / self.scale) @ self.basis

    def raw(self, weights: Float[Tensor, "component out"], bias: Float[Tensor, " out"]) -> tuple[Tensor, Tensor]:
        """The same linear map on features as they are: ``x @ weights.T + bias``."""
        plain = (self.basis @ weights) / self.scale[:, None]
        return plain.T, bias - self.mean @ plain


def logistic(
    features: Features, labels: Int[Tensor, "problem example"], n_classes: int, penalty: float, steps: int = _STEPS
) -> tuple[Float[Tensor, "problem component out"], Float[Tensor, "problem out"]]:
    """Multinomial logistic regression of each row of labels on the same features: weights and biases."""
    each = max(1, _NUMBERS_AT_ONCE // (labels.shape[1] * n_classes))
    parts = [_logistic(features.rotated, own, n_classes, penalty, steps) for own in labels.split(each)]
    return torch.cat([weights for weights, _ in parts]), torch.cat([bias for _, bias in parts])


def _logistic(x: Tensor, labels: Tensor, n_classes: int, penalty: float, steps: int) -> tuple[Tensor, Tensor]:
    problems, count = labels.shape
    wanted = torch.nn.functional.one_hot(labels, n_classes).to(x)
    # A bound of the curvature makes every direction about as steep (Böhning 1992).
    stretch = (0.25 * x.square().mean(0) + penalty).rsqrt()[None, :, None]
    size = problems * x.shape[1] * n_classes
    unknown = x.new_zeros(size + problems * n_classes)

    def taken_apart(flat: Tensor) -> tuple[Tensor, Tensor]:
        weights = flat[:size].view(problems, x.shape[1], n_classes)
        return weights * stretch, flat[size:].view(problems, 1, n_classes)

    def loss() -> Tensor:
        weights, bias = taken_apart(unknown)
        logs = (x @ weights + bias).log_softmax(-1)
        rest = (logs.exp() - wanted) / count
        slope = (x.T @ rest + penalty * weights) * stretch
        unknown.grad = torch.cat([slope.flatten(), rest.sum(1).flatten()])
        return -(logs * wanted).sum() / count + penalty / 2 * weights.square().sum()

    solver = torch.optim.LBFGS(
        [unknown],
        max_iter=steps,
        max_eval=2 * steps,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    solver.step(loss)
    loss()
    if steps == _STEPS and (unknown.grad is None or not float(unknown.grad.abs().max()) < 1e-3):
        warnings.warn("A probe did not converge; raise the penalty.", stacklevel=2)
    weights, bias = taken_apart(unknown)
    return weights.clone(), bias[:, 0].clone()


def ridge(
    features: Features, labels: Float[Tensor, "problem example"], penalty: float
) -> tuple[Float[Tensor, "problem component out"], Float[Tensor, "problem out"]]:
    """Ridge regression of each row of labels on the same features: weights and intercepts (``out`` is 1)."""
    x = features.rotated
    middle = labels.mean(1, keepdim=True)
    weights = ((labels - middle) @ x / len(x)) / (x.square().mean(0) + penalty)
    return weights[:, :, None], middle


def fit(
    features: Features, labels: Tensor, targets: Targets, penalty: float, steps: int = _STEPS
) -> tuple[Float[Tensor, "problem component out"], Float[Tensor, "problem out"]]:
    """The model that suits the targets, one per row of ``labels``."""
    if targets.classes:
        return logistic(features, labels, len(targets.classes), penalty, steps)
    return ridge(features, labels, penalty)


def predict(
    x: Float[Tensor, "example component"], model: tuple[Tensor, Tensor], targets: Targets
) -> Float[Tensor, "problem example"] | Int[Tensor, "problem example"]:
    """Class numbers, or values, of other examples."""
    out = x @ model[0] + model[1][:, None]
    return out.argmax(-1) if targets.classes else out[..., 0]


def score(predicted: Tensor, target: Tensor, targets: Targets) -> Float[Tensor, "*shape"]:
    """Accuracy of class numbers, R² of values, over the last axis."""
    return (predicted == target).double().mean(-1) if targets.classes else r_squared(predicted, target)


def best_penalty(
    x: Float[Tensor, "example feature"], targets: Targets, groups: Sequence[Any] | None = None, seed: int = 0
) -> float:
    """The penalty of :data:`PENALTIES` with the least cross entropy, or squared error, in three folds of these examples.

    Cross entropy and not accuracy, which many penalties share.
    """
    part = torch.from_numpy(_dealt(targets.strata, np.full(_FOLDS, 1 / _FOLDS), groups, seed))
    inside = [((part != fold).nonzero().flatten(), (part == fold).nonzero().flatten()) for fold in range(_FOLDS)]
    inside = [(train, test) for train, test in inside if len(test) and len(train) > 1]
    features = [Features.of(x[train]) for train, _ in inside]
    best, reached = PENALTIES[0], torch.inf
    for penalty in PENALTIES:
        loss = 0.0
        for own, (train, test) in zip(features, inside, strict=True):
            weights, bias = fit(own, targets.values[None, train], targets, penalty, _STEPS_TO_CHOOSE)
            out, wanted = own.of_others(x[test]) @ weights[0] + bias[0], targets.values[test]
            if targets.classes:
                loss += float(torch.nn.functional.cross_entropy(out, wanted, reduction="sum"))
            else:
                loss += float((out[:, 0] - wanted).square().sum())
        if loss < reached:
            best, reached = penalty, loss
    return best


def r_squared(
    predicted: Float[Tensor, "*shape example"], target: Float[Tensor, "*shape example"]
) -> Float[Tensor, "*shape"]:
    """``1 − Σ (y − ŷ)² / Σ (y − ȳ)²``: 1 is perfect, 0 the mean of the targets; NaN where they are all the same."""
    spread = (target - target.mean(-1, keepdim=True)).square().sum(-1)
    return 1 - (target - predicted).square().sum(-1) / torch.where(spread > 0, spread, torch.nan)
