"""Small linear models, scikit-learn's: what probes are made of.

Features are standardised with the mean and deviation of the training part alone; a feature that is constant there (up to rounding) becomes 0 and
cannot be used. Where there are more features than examples they are then rotated into their principal components, all of them, which changes
no solution and leaves no more unknowns than examples. The models, on standardised features ``z`` of ``n`` training examples:

* classes: multinomial logistic regression, ``mean cross entropy + penalty / 2 · ||W||²`` with a row of weights for every class, biases free:
  ``LogisticRegression(C=1 / (n · penalty))``; ``C = 2 / (n · penalty)`` for two classes, of which it has one row;
* numbers: ridge regression, ``mean squared error / 2 + penalty / 2 · ||w||²``, the intercept free: ``Ridge(alpha=n · penalty)``.

The penalty matters: too large a one hides what is there in small directions, too small a one fits noise. By default it is chosen for every
site, by three folds inside the training part, and once more for the shuffled labels (one for all of them, by the first few): a control under
the penalty that suits the true labels fits noise and scores below chance, which flatters the probe. Not covered: non-linear probes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from circuitvision.errors import warn

_CONSTANT = 1e-6
"""A feature whose deviation is below this share of its size is rounding noise around a constant."""
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""What a penalty is chosen from."""
CHOOSING = 3
"""How many shufflings the control's penalty is chosen by."""
_FINAL = {"tol": 1e-4, "max_iter": 1000}
_TO_CHOOSE = {"tol": 1e-3, "max_iter": 100}
"""L-BFGS stops where no entry of the gradient of the mean loss is larger than ``tol``, or after so many steps."""


def standardiser(x: Float[np.ndarray, "example feature"]) -> Any:
    """A fitted pipeline: scaler, and a rotation where there are more features than examples. Its ``transform`` takes other examples along."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    size = np.maximum(np.abs(scaler.mean_), np.sqrt(np.square(x).mean()))
    scaler.scale_[np.sqrt(scaler.var_) <= _CONSTANT * size] = np.inf
    if x.shape[1] <= x.shape[0]:
        return make_pipeline(scaler, "passthrough")
    with np.errstate(invalid="ignore"):  # all features constant: shares of no variance
        return make_pipeline(scaler, PCA(svd_solver="full").fit(scaler.transform(x)))


def fit(
    z: Float[np.ndarray, "example component"],
    labels: Shaped[np.ndarray, " example"],
    n_classes: int,
    penalty: float,
    final: bool = True,
) -> Any:
    """The model of ``n_classes`` classes, or of numbers (0), less exact if not ``final``. Labels of one class make a model that says so."""
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression, Ridge

    if not n_classes:
        return Ridge(alpha=len(z) * penalty).fit(z, labels)
    count, options = len(np.unique(labels)), _FINAL if final else _TO_CHOOSE
    if count < 2:
        return DummyClassifier().fit(z, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that did not suffice; said below
        model = LogisticRegression(C=(2 if count == 2 else 1) / (len(z) * penalty), **options).fit(z, labels)
    if final and model.n_iter_.max() >= options["max_iter"]:
        warn("A probe did not converge; raise the penalty.")
    return model


def best_penalty(
    x: Float[np.ndarray, "example feature"],
    rows: Shaped[np.ndarray, "problem example"],
    n_classes: int,
    folds: Sequence[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]],
) -> float:
    """The penalty of :data:`PENALTIES` with the least cross entropy, or squared error, over all rows of labels, in folds of these examples.

    Cross entropy and not accuracy, which many penalties share; a class that a fold cannot train on costs the same under each of them.
    """
    losses = dict.fromkeys(PENALTIES, 0.0)
    for train, test in folds:
        prepared = standardiser(x[train])
        z, others = prepared.transform(x[train]), prepared.transform(x[test])
        for labels in rows:
            for penalty in PENALTIES:
                model = fit(z, labels[train], n_classes, penalty, final=False)
                if n_classes:
                    right = (model.predict_proba(others) * (labels[test, None] == model.classes_)).sum(1)
                    losses[penalty] -= float(np.log(np.maximum(right, 1e-30)).sum())
                else:
                    losses[penalty] += float(np.square(model.predict(others) - labels[test]).sum())
    return min(PENALTIES, key=losses.__getitem__)


def raw(prepared: Any, model: Any) -> tuple[Float[np.ndarray, "out feature"], Float[np.ndarray, " out"]]:
    """The same linear map on features as they are: ``x @ weights.T + bias``; a row for each of two classes."""
    scaler, rotation = prepared[0], prepared[-1]
    weights, bias = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    if hasattr(model, "classes_") and len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    if hasattr(rotation, "components_"):
        weights = weights @ rotation.components_
        bias = bias - weights @ rotation.mean_
    weights = weights / scaler.scale_
    return weights, bias - weights @ scaler.mean_


def score(
    predicted: Shaped[np.ndarray, "problem example"], target: Shaped[np.ndarray, "problem example"], n_classes: int
) -> Float[np.ndarray, " problem"]:
    """Accuracy of class numbers; R² of values, ``1 − Σ (y − ŷ)² / Σ (y − ȳ)²``, NaN where they are all the same."""
    if n_classes:
        return (predicted == target).mean(-1)
    spread = np.square(target - target.mean(-1, keepdims=True)).sum(-1)
    return 1 - np.square(target - predicted).sum(-1) / np.where(spread > 0, spread, np.nan)
