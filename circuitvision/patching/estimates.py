"""First-order estimates of patching: what a site takes from the gradient of a metric.

An estimate is linear in a gradient. A :class:`Term` names the site whose gradient it reads (*watched*) and how that becomes one number per row and
cell:

* :func:`direct`: ``Σ_cell (source - base) · ∂metric/∂value``, of the site itself; a region is the sum over its positions, a group of neurons the sum
  over its coordinates;
* :func:`query_fix`: ``Σ_cell (pattern' - pattern) · ∂metric/∂pattern``, where ``pattern'`` is the softmax of the scores of the source's queries;
* :func:`key_fix`: the same for keys. With all keys of a head patched, ``pattern'`` is one more softmax. With the key of one position ``j`` patched,
  each row of the pattern changes in closed form, for all ``j`` at once: ``p'_j = σ(s'_j - log Σ_{m≠j} e^{s_m})``, the other keys keep their
  proportions, and ``Σ_m (p'_m - p_m) g_m = (p'_j - p_j) (g_j - ḡ_{-j})`` with ``ḡ_{-j}`` the mean of ``g`` over the other keys as they are attended
  to. Where ``p_j`` is nearly 1 (the saturated case that all this is for) the others are summed without it, not by subtraction. The keys of a
  region are patched together: one softmax for each region, as with all keys.

Everything is computed in float32 at least: products of bfloat16 would lose the small differences of which a cell is the sum.

Reference: Kramár et al. 2024 (arXiv 2403.00745), where the closed form for keys is an algorithm; GQA sums the heads that share a key.
Not covered: norms over the queries or keys of all heads together, where a head's scores depend on other heads'.
"""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True)
class Sums:
    """What a cell holds of a site, as far as ``axes`` name heads, positions, regions and neurons; all of the rest.

    ``regions`` gives 0 and 1 ``[row pos region]`` (or of one row for all) of a site's positions, ``neurons`` are 0 and 1 ``[width group]``.
    """

    axes: tuple[str, ...] = ()
    regions: Callable[[str], Float[Tensor, "row pos region"]] | None = None
    neurons: Float[Tensor, "width group"] | None = None

    def of(self, value: Tensor, site: str, positions_of: str = "") -> Float[Tensor, "row ..."]:
        """The sums ``[row head position neurons]`` of a site's values ``[row …]``; ``positions_of`` is a site whose positions they have."""
        name = SiteName.parse(site)
        head, position = (1, 2) if name.is_pattern else (2, 1)
        by_position = "position" in self.axes or self.regions is not None
        kept = [0, *([head] if "head" in self.axes else []), *([position] if by_position else [])]
        value = value.permute(*kept, *(axis for axis in range(value.ndim) if axis not in kept))
        if self.neurons is not None:
            value = value @ self.neurons.to(value)
            value = value.flatten(len(kept), -2).sum(-2) if value.ndim > len(kept) + 1 else value
        else:
            value = value.flatten(len(kept)).sum(-1) if value.ndim > len(kept) else value
        if self.regions is None:
            return value
        inside = self.regions(positions_of or site).to(value).expand(len(value), -1, -1)
        return torch.einsum("rhp...,rpk->rhk..." if "head" in self.axes else "rp...,rpk->rk...", value, inside)


def direct(site: str, away: Tensor, sums: Sums) -> Term:
    """The term of a site whose value in the source run is ``away`` (wide) from the base's."""
    return Term(site, lambda gradient: sums.of(away * wide(gradient), site))


def query_fix(site: str, pattern: str, scores: Scores, patched: Scores, sums: Sums) -> Term:
    """The term of queries: ``patched`` are the scores of the source's queries and the base's keys.

    Rows of a pattern are apart, so a region is a sum.
    """
    moved = wide(patched).softmax(-1) - wide(scores).softmax(-1)
    return Term(pattern, lambda gradient: sums.of(moved * wide(gradient), pattern, site))


def key_fix(site: str, pattern: str, scores: Scores, patched: Scores, own: slice, heads: int, sums: Sums) -> Term:
    """The term of the keys in the columns ``own``, of ``heads`` key heads; ``patched`` are the scores of the base's queries and the source's keys."""
    if sums.regions is not None:
        part = _keys_of_regions(scores, patched, own, sums.regions(site))
    else:
        part = _one_key(scores, patched, own) if "position" in sums.axes else _all_keys(scores, patched, own)

    def of(gradient: Tensor) -> Tensor:
        # [row head] or [row head key]: query heads that share a key head stand side by side.
        effect = part(wide(gradient)).unflatten(1, (heads, -1)).sum(2)
        return effect if "head" in sums.axes else effect.sum(1)

    return Term(pattern, of)


def _all_keys(scores: Scores, patched: Scores, own: slice) -> Callable[[Tensor], Float[Tensor, "row head"]]:
    mixed = wide(scores).clone()
    mixed[..., own] = wide(patched)[..., own]
    moved = mixed.softmax(-1) - wide(scores).softmax(-1)
    return lambda gradient: (moved * gradient).sum((-2, -1))


def _keys_of_regions(
    scores: Scores, patched: Scores, own: slice, inside: Float[Tensor, "row pos region"]
) -> Callable[[Tensor], Float[Tensor, "row head region"]]:
    scores, patched = wide(scores), wide(patched)
    shares, moved = scores.softmax(-1), []
    for region in inside.to(device=scores.device, dtype=torch.bool).unbind(-1):
        mixed = scores.clone()
        mixed[..., own] = torch.where(region[:, None, None], patched[..., own], scores[..., own])
        moved.append(mixed.softmax(-1) - shares)
    return lambda gradient: torch.stack([(one * gradient).sum((-2, -1)) for one in moved], -1)


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
