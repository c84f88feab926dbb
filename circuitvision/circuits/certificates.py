"""How many examples a decision of a majority of subsets survives: the deletion certificate.

A decision is made on subsets in each of which every example is dropped with probability ``p``. Let a share ``P`` of the subsets of one data set
decide one way, and ``P'`` of those of another data set, which lacks ``a`` of its examples and has ``b`` others. On subsets without any of the
differing examples the two decide alike, so that ``P' ≥ p^(b-a) (P - 1 + p^a)``. With a lower bound ``μ`` of ``P`` the majority stays for

    ``a < ln(2(1 - μ)) / ln p`` removed,  ``b < ln(1 / (2μ)) / ln p`` added,  ``k < ln(3/2 - μ) / ln p`` replaced examples (``a = b = k``).

Not covered: changes of an example (it counts as replaced).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.results import Result


@dataclass(frozen=True, eq=False)
class Certificate(Result):
    """How many examples each edge's place in the majority's circuit survives: ``values`` ``[change sender slot]`` (or ``[change sender]``).

    Changes are ``"replaced"``, ``"removed"`` and ``"added"``; values are whole numbers, -1 where nothing is certified (too small a majority),
    NaN where there is no edge. ``share`` is the share of subsets whose circuit holds the edge.
    """

    share: Tensor = field(default_factory=lambda: torch.zeros(0))
    drop: float = 0.9
    runs: int = 0
    alpha: float = 0.05

    _per_example: ClassVar[dict[str, int]] = {}

    def certified(self, change: str = "replaced", count: int = 1) -> tuple[int, int]:
        """How many edges are certainly in the majority's circuit, and how many certainly out of it, under so many changed examples."""
        row = self.values[self.index_of("change", change)]
        sure = row.nan_to_num(-1.0) >= count
        return int((sure & (self.share > 0.5)).sum()), int((sure & (self.share <= 0.5)).sum())

    def highlights(self) -> dict[str, str]:
        """What is certain when one example is replaced."""
        held, out = self.certified()
        return {"certainly in": str(held), "certainly out": str(out), "for": "one replaced example"}


def clopper_pearson(
    count: Float[Tensor, "*axes"], total: int, alpha: float
) -> tuple[Float[Tensor, "*axes"], Float[Tensor, "*axes"]]:
    """The exact lower and upper bound of a share, each wrong with probability ``alpha`` at most."""
    from scipy.stats import beta

    hits = count.double().numpy()
    low = torch.as_tensor(beta.ppf(alpha, hits, total - hits + 1)).nan_to_num(0.0)
    high = torch.as_tensor(beta.ppf(1 - alpha, hits + 1, total - hits)).nan_to_num(1.0)
    return low, high


def radii(
    share: Float[Tensor, "*axes"], runs: int, components: int, drop: float, alpha: float
) -> Float[Tensor, change * axes]:
    """How many replaced, removed and added examples a majority survives, by its share of ``runs`` subsets; -1 where it is not certain at all.

    With probability ``1 - alpha`` the bounds of all ``components`` hold, whichever side each majority is on.

    Raises:
        InputError: ``alpha`` outside 0 to 1.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha={alpha} is no probability of an error.")
    # Which of the two bounds is taken is seen from the share itself, so that both must hold.
    low, high = clopper_pearson((share.nan_to_num() * runs).round(), runs, alpha / (2 * max(components, 1)))
    bound = torch.where(share > 0.5, low, 1 - high)
    return torch.stack([largest_below(limit) for limit in limits(bound, drop)])


def limits(bound: Float[Tensor, "*axes"], drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of replaced, removed and added examples below which a majority of at least ``bound`` stays; below 0 where it is none."""
    base = math.log(drop)
    replaced = (1.5 - bound).log() / base
    removed = (2 * (1 - bound)).clamp_min(0).log() / base
    added = (1 / (2 * bound)).log() / base
    return replaced, removed, added


def largest_below(limit: Tensor) -> Tensor:
    """The largest whole number below a limit; -1 for a limit at or below 0. No change at all is 0."""
    found = (limit - 1e-12).ceil() - 1
    return torch.where(limit > 0, found.clamp_min(0).nan_to_num(posinf=float("inf")), torch.full_like(found, -1.0))
