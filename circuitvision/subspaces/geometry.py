"""Where a subspace lies with respect to what is read behind it and to how activations vary: parts, null expectations, dormancy.

*Readers*: what reads the site linearly, ``A`` ``[d m]`` with ``h A``. ``P`` projects onto the span of its columns (by SVD: centred weights lose a
rank, and a QR would add a direction that ``A`` maps to 0). ``v_row = P v`` is read, ``v_null = v − v_row`` is not.

*Geometry null*: linearised, the effect of a unit direction is ``(v · a)(v · g)`` with ``a = E[s (h_s − h_b)]`` and ``g`` the gradient of the
effect. Its maximum is ``E* = (a · g + ‖a‖ ‖g‖) / 2``, at ``v* = unit(a/‖a‖ + g/‖g‖)``, never below ``a · g``, and more dimensions do not help. What
training finds near ``v*`` with an effect near ``E*`` has found ``a`` and ``g`` again; ``headroom = E* − max(a · g, 0)`` is what it finds for free.

Where differences and gradients are those of each example (several classes), ``a gᵀ`` is ``E[(h_s − h_b) gᵀ]``, and ``E*`` of ``k`` dimensions the sum
of the ``k`` largest positive eigenvalues of its symmetric part: the same number where all examples have one gradient.

*On-manifold*: the part of a change inside the principal components of natural activations that hold 99 % of the variance.

Source: Makelov et al. 2023 (arXiv 2311.17030); Wu et al. 2024 (arXiv 2401.12631).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.subspaces.bases import span


@dataclass(frozen=True)
class Parts:
    """A basis ``[d k]`` (orthonormal) and its parts in and beside the row space of the readers.

    ``row`` and ``null`` are orthonormal bases of what the parts span (``[d 0]`` for nothing), ``row_raw`` ``= P V`` is not renormalised.
    """

    basis: Float[Tensor, "d k"]
    row: Float[Tensor, "d r"]
    null: Float[Tensor, "d n"]
    row_raw: Float[Tensor, "d k"]
    row_norm: float
    null_norm: float
    rank: int


def parts(basis: Float[Tensor, "d k"], readers: Float[Tensor, "d m"] | None) -> Parts:
    """The parts of a basis; without readers everything is read."""
    basis = basis.double()
    if readers is None:
        return Parts(basis, basis, basis[:, :0], basis, 1.0, 0.0, basis.shape[0])
    space = span(readers.double() / max(float(readers.abs().max()), 1e-300))
    inside = space @ (space.T @ basis)
    beside = basis - inside
    count = basis.shape[1] ** 0.5
    norms = float(inside.norm()) / count, float(beside.norm()) / count
    # A part of rounding alone is none.
    row = span(inside) if norms[0] > 1e-6 else basis[:, :0]
    null = span(beside) if norms[1] > 1e-6 else basis[:, :0]
    return Parts(basis, row, null, inside, *norms, space.shape[1])


@dataclass(frozen=True)
class GeometryNull:
    """What optimisation finds for free, in the units of the effect; see the module."""

    bound: float
    full: float
    direction: Float[Tensor, " d"]
    cosine: float

    @property
    def headroom(self) -> float:
        """``E* − max(a · g, 0)``."""
        return self.bound - max(self.full, 0.0)


def geometry_null(a: Float[Tensor, " d"], g: Float[Tensor, " d"]) -> GeometryNull:
    """``E*``, ``a · g``, ``v*`` and ``cos(a, g)``; NaN where ``a`` or ``g`` is 0."""
    a, g = a.double(), g.double()
    sizes = float(a.norm()), float(g.norm())
    if min(sizes) == 0:
        return GeometryNull(0.0, 0.0, torch.full_like(a, math.nan), math.nan)
    best = a / sizes[0] + g / sizes[1]
    dot = float(a @ g)
    direction = best / best.norm() if float(best.norm()) > 1e-12 else torch.full_like(a, math.nan)
    return GeometryNull((dot + sizes[0] * sizes[1]) / 2, dot, direction, dot / (sizes[0] * sizes[1]))


def geometry_null_of(
    change: Float[Tensor, "entry d"], gradients: Float[Tensor, "entry d"], k: int = 1
) -> tuple[float, float, Float[Tensor, "d k"]]:
    """``E*`` of ``k`` dimensions, ``E[(h_s − h_b) · g]`` and the best basis, per entry; see the module."""
    change, gradients = change.double(), gradients.double()
    space = span(torch.cat([change, gradients]).T)
    if not space.shape[1]:
        return 0.0, 0.0, change.new_zeros(change.shape[1], 0)
    product = (change @ space).T @ (gradients @ space) / len(change)
    values, vectors = torch.linalg.eigh((product + product.T) / 2)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    return float(values.clamp_min(0).sum()), float(product.diagonal().sum()), space @ vectors


def inside(basis: Float[Tensor, "d k"], direction: Tensor) -> float:
    """The share of a direction's length, or of another basis, inside a subspace: of two directions the absolute cosine."""
    size = float(direction.norm())
    return float((basis.double().T @ direction.double()).norm()) / size if size > 0 else math.nan


def deviation(natural: Float[Tensor, "entry d"], basis: Float[Tensor, "d k"]) -> float:
    """The natural standard deviation inside a subspace, over its dimensions together; NaN of nothing."""
    if not basis.shape[1]:
        return math.nan
    return float((natural.double() @ basis.double()).var(0).sum().sqrt())


def separation(natural: Float[Tensor, "entry d"], basis: Float[Tensor, "d k"], labels: Sequence[Any] | None) -> float:
    """``d'``: the standard deviation between class means over that within classes; NaN without classes, and where nothing varies within them."""
    names = [] if labels is None else list(dict.fromkeys(labels))
    if labels is None or not basis.shape[1] or not 1 < len(names) < len(labels):
        return math.nan
    values = natural.double() @ basis.double()
    number = torch.tensor([names.index(label) for label in labels])
    means = torch.stack([values[number == one].mean(0) for one in range(len(names))])
    within = (values - means[number]).square().sum() / max(len(labels) - len(names), 1)
    between = means[number].var(0, correction=0).sum()
    # Features that are constant inside groups would give any number.
    if float(within) <= 1e-9 * float(between + within):
        return math.nan
    return float((between / within).sqrt())
