"""Bases of subspaces, and interchange inside them, on plain tensors.

A basis is ``[d k]``, columns; a direction ``[d]`` is one column. The interchange of two activations inside the span of an orthonormal ``V`` is

    ``h' = h_b + (h_s − h_b) V Vᵀ``:

``h' · v = h_s · v`` for every ``v`` of the span, and ``h' · u = h_b · u`` for every ``u`` orthogonal to it. Sign, scale and rotation of ``V``
inside its span do not matter. :func:`circuitvision.edits.project` writes the same at a site of a model.

Not covered: bases that differ from position to position.

Sources: Geiger et al. 2023 (arXiv 2303.02536); Makelov et al. 2023 (arXiv 2311.17030).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, checked_seed

RANK = 1e-6
"""Singular values below this share of the largest are zero."""


def orthonormal(basis: Tensor | np.ndarray) -> Float[Tensor, "d k"]:
    """Orthonormal columns of the span of a basis, in float64, on its autograd path.

    Raises:
        InputError: columns that are not linearly independent, more columns than coordinates, or not a number.
    """
    given: Any = torch.from_numpy(basis.copy()) if isinstance(basis, np.ndarray) else basis
    if not isinstance(given, Tensor) or given.ndim not in (1, 2) or given.numel() == 0:
        raise InputError(f"A basis is a tensor [d] or [d, k], not {tuple(getattr(given, 'shape', ()))}.")
    columns = given.double()[:, None] if given.ndim == 1 else given.double()
    if columns.shape[1] > columns.shape[0] or bool(columns.detach().isnan().any()):
        raise InputError(f"A basis is [d] or [d, k] with k <= d and without NaN, not {tuple(given.shape)}.")
    values = torch.linalg.svdvals(columns.detach())
    if float(values[-1]) <= RANK * float(values[0]):
        rank = int((values > RANK * values[0]).sum()) if float(values[0]) > 0 else 0
        raise InputError(
            f"The {columns.shape[1]} columns of the basis span {rank} dimensions: give linearly independent ones."
        )
    return torch.linalg.qr(columns)[0]


def interchanged(
    base: Float[Tensor, "entry d"], source: Float[Tensor, "entry d"], basis: Tensor
) -> Float[Tensor, "entry d"]:
    """``h_b + (h_s − h_b) V Vᵀ``; raises InputError for a basis without full rank."""
    columns = orthonormal(basis).to(base)
    return base + ((source - base) @ columns) @ columns.T


def span(basis: Float[Tensor, "d k"]) -> Float[Tensor, "d r"]:
    """Orthonormal columns of what a basis of any rank spans, by SVD; ``r`` is 0 where it is zero."""
    if not basis.numel():
        return basis.double()
    left, values, _ = torch.linalg.svd(basis.double(), full_matrices=False)
    return left[:, values > RANK * max(float(values[0]), 1.0)]


def mean_difference(
    base: Float[Tensor, "entry d"], source: Float[Tensor, "entry d"], sign: Float[Tensor, " entry"] | None = None
) -> Float[Tensor, " d"]:
    """``a = E[s (h_s − h_b)]``, with ``s`` the sign of what changes between the runs of an example (1 where it is left out)."""
    change = (source - base).double()
    return (change if sign is None else change * sign.double()[:, None]).mean(0)


def principal_components(
    natural: Float[Tensor, "entry d"], variance: float = 0.99, k: int | None = None
) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """Principal components of activations and their standard deviations: the ``k`` first, or as many as hold this share of the variance.

    Raises:
        InputError: fewer components than asked for.
    """
    centred = natural.double() - natural.double().mean(0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    there = int((values > 1e-9 * max(float(values[0]), 1e-30)).sum())
    if k is None:
        shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
        count = min(int((shares < variance - 1e-12).sum()) + 1, max(there, 1))
    elif k > there:
        raise InputError(f"The activations have {there} principal components, not {k}: give more examples, or fewer.")
    else:
        count = k
    return right[:count].T, values[:count] / max(len(natural) - 1, 1) ** 0.5


def random_basis(d: int, k: int = 1, seed: int = 0) -> Float[Tensor, "d k"]:
    """A subspace drawn from all of ``k`` dimensions alike (isotropic)."""
    generator = torch.Generator().manual_seed(checked_seed(seed))
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]


def matched_random_basis(natural: Float[Tensor, "entry d"], k: int = 1, seed: int = 0) -> Float[Tensor, "d k"]:
    """A subspace drawn inside the principal components that hold 99 % of the variance, each as likely as it varies."""
    components, deviations = principal_components(natural)
    generator = torch.Generator().manual_seed(checked_seed(seed))
    drawn = torch.randn(len(deviations), k, generator=generator, dtype=torch.float64)
    found = span(components @ (deviations.to(components)[:, None] * drawn.to(components)))
    if found.shape[1] < k:
        raise InputError(f"The activations vary in {components.shape[1]} dimensions, fewer than the {k} asked for.")
    return found
