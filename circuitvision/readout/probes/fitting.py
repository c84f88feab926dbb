"""Small linear models: what probes are made of.

Features are standardised with the mean and deviation of the training part alone; a feature that is constant there (up to rounding) becomes 0 and
cannot be used. The models, on standardised features ``z``:

* classes: multinomial logistic regression, ``mean cross entropy + penalty / 2 · ||W||²`` with a row of weights for every class, biases
  free (scikit-learn's ``C = 1 / (n · penalty)``; ``2 / (n · penalty)`` for two classes, of which it has one row);
* numbers: ridge regression, ``mean squared error / 2 + penalty / 2 · ||w||²``, the intercept free.

Both are solved in the principal components of the training features, where the problem is well conditioned and has no more unknowns than
examples: in closed form for numbers, by L-BFGS for classes. Many label vectors over the same features (shuffled labels) are solved together.

The penalty matters: too large a one hides what is there in small directions, too small a one fits noise. By default it is chosen for every
site, by three folds inside the training part, and once more for the shuffled labels (one for all of them, by the first few): a control under
the penalty that suits the true labels fits noise and scores below chance, which flatters the probe. Not covered: non-linear probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import warn
from circuitvision.readout.probes.splitting import Targets, dealt

_CONSTANT = 1e-6
"""A feature whose deviation is below this share of its size is rounding noise around a constant."""
_NEGLIGIBLE = 1e-12
"""Principal components below this share of the largest variance are left out."""
_NUMBERS_AT_ONCE = 2**24
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""What a penalty is chosen from."""
_FOLDS, _STEPS_TO_CHOOSE, _STEPS = 3, 100, 500
CHOOSING = 3
"""How many shufflings the control's penalty is chosen by."""


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
        warn("A probe did not converge; raise the penalty.")
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
    x: Float[Tensor, "example feature"],
    labels: Float[Tensor, "problem example"],
    targets: Targets,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> float:
    """The penalty of :data:`PENALTIES` with the least cross entropy, or squared error, over all rows of labels in three folds of these examples.

    Cross entropy and not accuracy, which many penalties share. ``targets`` are what the folds keep in proportion.
    """
    part = torch.from_numpy(dealt(targets.strata, np.full(_FOLDS, 1 / _FOLDS), groups, seed))
    inside = [((part != fold).nonzero().flatten(), (part == fold).nonzero().flatten()) for fold in range(_FOLDS)]
    losses = dict.fromkeys(PENALTIES, 0.0)
    for train, test in inside:
        if not len(test) or len(train) < 2:
            continue
        own = Features.of(x[train])
        others = own.of_others(x[test])
        for penalty in PENALTIES:
            weights, bias = fit(own, labels[:, train], targets, penalty, _STEPS_TO_CHOOSE)
            out, wanted = others @ weights + bias[:, None], labels[:, test]
            if targets.classes:
                loss = torch.nn.functional.cross_entropy(out.movedim(-1, 1), wanted, reduction="sum")
            else:
                loss = (out[..., 0] - wanted).square().sum()
            losses[penalty] += float(loss)
    return min(PENALTIES, key=lambda penalty: losses[penalty])


def r_squared(
    predicted: Float[Tensor, "*shape example"], target: Float[Tensor, "*shape example"]
) -> Float[Tensor, "*shape"]:
    """``1 − Σ (y − ŷ)² / Σ (y − ȳ)²``: 1 is perfect, 0 the mean of the targets; NaN where they are all the same."""
    spread = (target - target.mean(-1, keepdim=True)).square().sum(-1)
    return 1 - (target - predicted).square().sum(-1) / torch.where(spread > 0, spread, torch.nan)
