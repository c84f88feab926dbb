"""First-order estimates of patching: what a site takes from the gradient of a metric.

An estimate is linear in a gradient. A :class:`Term` names the site whose gradient it reads (*watched*) and how that becomes one number per row and
cell:

* :func:`direct`: ``Σ_cell (source - base) · ∂metric/∂value``, of the site itself;
* :func:`query_fix`: ``Σ_cell (pattern' - pattern) · ∂metric/∂pattern``, where ``pattern'`` is the softmax of the scores of the source's queries;
* :func:`key_fix`: the same for keys. With all keys of a head patched, ``pattern'`` is one more softmax. With the key of one position ``j`` patched,
  each row of the pattern changes in closed form, for all ``j`` at once: ``p'_j = σ(s'_j - log Σ_{m≠j} e^{s_m})``, the other keys keep their
  proportions, and ``Σ_m (p'_m - p_m) g_m = (p'_j - p_j) (g_j - ḡ_{-j})`` with ``ḡ_{-j}`` the mean of ``g`` over the other keys as they are attended
  to. Where ``p_j`` is nearly 1 (the saturated case that all this is for) the others are summed without it, not by subtraction.

Everything is computed in float32 at least: products of bfloat16 would lose the small differences of which a cell is the sum.

Reference: Kramár et al. 2024 (arXiv 2403.00745), where the closed form for keys is an algorithm; GQA sums the heads that share a key.
Not covered: norms over the queries or keys of all heads together, where a head's scores depend on other heads'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.model.sites import SiteName

Scores = Float[Tensor, "row head query key"]


@dataclass(frozen=True)
class Term:
    """What the gradient at a watched site says of a cell: ``of(gradient)`` is ``[row *cells]``."""

    watched: str
    of: Callable[[Tensor], Tensor]


def wide(value: Tensor) -> Tensor:
    """A value in float32 at least."""
    return value if value.dtype == torch.float64 else value.float()


def cells_of(value: Tensor, site: str, axes: Sequence[str]) -> Float[Tensor, "row ..."]:
    """The sums of a site's values ``[row …]`` over everything but the row, the head and the position, as far as ``axes`` names these."""
    name = SiteName.parse(site)
    head, position = (1, 2) if name.is_pattern else (2, 1)
    kept = [0, *([head] if "head" in axes else []), *([position] if "position" in axes else [])]
    value = value.permute(*kept, *(axis for axis in range(value.ndim) if axis not in kept))
    return value.flatten(len(kept)).sum(-1) if value.ndim > len(kept) else value


def direct(site: str, away: Tensor, axes: Sequence[str]) -> Term:
    """The term of a site whose value in the source run is ``away`` (wide) from the base's."""
    return Term(site, lambda gradient: cells_of(away * wide(gradient), site, axes))


def query_fix(site: str, pattern: str, scores: Scores, patched: Scores, axes: Sequence[str]) -> Term:
    """The term of queries: ``patched`` are the scores of the source's queries and the base's keys."""
    moved = wide(patched).softmax(-1) - wide(scores).softmax(-1)
    return Term(pattern, lambda gradient: cells_of(moved * wide(gradient), pattern, axes))


def key_fix(pattern: str, scores: Scores, patched: Scores, own: slice, heads: int, axes: Sequence[str]) -> Term:
    """The term of the keys in the columns ``own``, of ``heads`` key heads; ``patched`` are the scores of the base's queries and the source's keys."""
    part = _one_key(scores, patched, own) if "position" in axes else _all_keys(scores, patched, own)

    def of(gradient: Tensor) -> Tensor:
        # [row head] or [row head key]: query heads that share a key head stand side by side.
        effect = part(wide(gradient)).unflatten(1, (heads, -1)).sum(2)
        return effect if "head" in axes else effect.sum(1)

    return Term(pattern, of)


def _all_keys(scores: Scores, patched: Scores, own: slice) -> Callable[[Tensor], Float[Tensor, "row head"]]:
    mixed = wide(scores).clone()
    mixed[..., own] = wide(patched)[..., own]
    moved = mixed.softmax(-1) - wide(scores).softmax(-1)
    return lambda gradient: (moved * gradient).sum((-2, -1))


def _one_key(scores: Scores, patched: Scores, own: slice) -> Callable[[Tensor], Float[Tensor, "row head key"]]:
    scores, patched = wide(scores), wide(patched)
    shares = scores.softmax(-1)
    largest = scores.argmax(-1, keepdim=True)
    rest = scores.scatter(-1, largest, float("-inf"))
    # A row with one visible key has no others: nothing can move there.
    rest_shares = rest.softmax(-1).nan_to_num(0.0)
    others = scores.logsumexp(-1, keepdim=True) + torch.log1p(-shares.scatter(-1, largest, 0.0))
    others = others.scatter(-1, largest, rest.logsumexp(-1, keepdim=True))
    moved = (torch.sigmoid(patched - others) - shares)[..., own]
    left = (1 - shares.scatter(-1, largest, 0.0))[..., own]

    def of(gradient: Tensor) -> Tensor:
        mean = (shares * gradient).sum(-1, keepdim=True)
        of_others = (mean - shares[..., own] * gradient[..., own]) / left
        without = (rest_shares * gradient).sum(-1, keepdim=True)
        is_largest = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, largest, True)[..., own]
        return (moved * (gradient[..., own] - torch.where(is_largest, without, of_others))).sum(-2)

    return of
