"""Where patches look relative to where they are: attention by distance, and by offset on the patch grid.

A head that looks at a fixed offset (the patch to the left) or at a fixed radius reads position; one whose attention moves with the content
does not. :func:`distance_profile` keeps the distance alone, :func:`position_pattern` the offset, and says how much of the attention the offset
explains.

Distances and offsets are in patches, between patches of one image and tile. Everything else as in ``mass.py``.

Not covered: positions of text; a head that looks at a fixed place of the image instead of a fixed offset.

Sources: distance profiles, Li et al., "How does attention work in vision transformers?" (TVCG 2023); mean attention distance, Dosovitskiy et
al. 2020 (arXiv 2010.11929). The share explained by the offset is the ordinary share of variance between groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.names import head_name
from circuitvision.model.positions import PositionsLike
from circuitvision.model.tokens import ABSENT, TokenMap
from circuitvision.provenance import with_provenance
from circuitvision.readout.attention.cache import read
from circuitvision.readout.attention.patterns import Patterns, warn_undefined
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True, eq=False)
class DistanceProfile(Result):
    """Attention from patches by distance: ``values`` is ``[layer head distance example]``, masses that sum to 1 over ``distance``.

    The labels of ``distance`` are patches (0 is the query's own patch) and then, by kind, the keys that are no patch of the query's image
    ("cls", "register", "text", …; "other patch" for another image or tile). ``uniform`` ``[layer distance example]`` is the profile of a head that
    looks at every visible key alike: rings grow with distance and end at the border. ``mean_distance`` ``[layer head example]`` is the distance in
    patches that a unit of patch-to-patch attention covers, ``uniform_distance`` ``[layer example]`` the same of uniform attention.
    """

    tower: str = ""
    metric: str = "chebyshev"
    mean_distance: Tensor = field(default_factory=lambda: torch.zeros(0))
    uniform: Tensor = field(default_factory=lambda: torch.zeros(0))
    uniform_distance: Tensor = field(default_factory=lambda: torch.zeros(0))
    dead_layers: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"mean_distance": -1, "uniform": -1, "uniform_distance": -1}

    def over_heads(self) -> Result:
        """The mean distance of each layer, ``[layer example]``: the mean over heads that have one."""
        axes = {name: self.axes[name] for name in ("layer", "example")}
        return Result(self.mean_distance.double().nanmean(1), axes, self.provenance)

    def highlights(self) -> dict[str, str]:
        """The heads that look nearest and farthest, in means over examples."""
        means = self.mean(quantity="mean_distance")
        found = {}
        for name, order in (
            ("nearest", means.nan_to_num(float("inf")).argmin()),
            ("farthest", means.nan_to_num(-1.0).argmax()),
        ):
            layer, head = divmod(int(order), means.shape[1])
            where = head_name(self.axes["layer"][layer], self.axes["head"][head], self.tower)
            found[name] = f"{where}: {float(means[layer, head]):.2f} patches"
        alike = self.mean(quantity="uniform_distance").nanmean()
        return {**found, "all patches alike": f"{float(alike):.2f} patches"}


@with_provenance
def distance_profile(
    model: Wrapped,
    cache: ActivationCache | Mapping[str, Any],
    tokens: Mapping[str, TokenMap] | TokenMap | None = None,
    *,
    tower: str | None = None,
    metric: str = "chebyshev",
    queries: PositionsLike = "patch",
    layers: Any = None,
    step: int | None = None,
) -> DistanceProfile:
    """How far patches look: attention from patch to patch by distance on the grid, other keys beside it; the shares add up to 1.

    Distance is in patches, between patches of one image (and tile): ``"chebyshev"`` max(|Δrow|, |Δcolumn|), or ``"euclidean"``,
    binned to the nearest whole number; means use the exact one. ``queries`` are all patches or some of them (a ``Selection``); other
    arguments as for :func:`attention_mass`.

    Raises:
        InputError: a tower without patches among its positions, queries that are none, an unknown metric.
    """
    patterns = read(model, cache, tokens, tower, layers, step)
    places = grid_places(patterns, "distance_profile")
    if metric not in ("chebyshev", "euclidean"):
        raise InputError(f"Unknown metric {metric!r}; choose chebyshev or euclidean.")
    distance, bins, labels = _distances(patterns, places, metric)
    values: list[Tensor] = []
    means: list[Tensor] = []
    uniform: list[Tensor] = []
    uniform_means: list[Tensor] = []
    for number, (pattern, counted) in enumerate(patterns.each(queries)):
        there = _patch_queries(patterns, queries, number, places).any(0)
        alike = patterns.alike(pattern)[:, None]
        for source, profile, mean in ((pattern, values, means), (alike, uniform, uniform_means)):
            shares, average = _profile(source, counted, distance[:, there], bins[:, there], len(labels) + 1)
            profile.append(shares[..., :-1].transpose(-1, -2))
            mean.append(average)
    stacked = torch.stack(means)
    warn_undefined(stacked, "a row has no query that counts, or gives no attention to patches")
    return DistanceProfile(
        values=torch.stack(values),
        axes={**patterns.axes(values[0].shape[0]), "distance": labels, "example": patterns.example},
        provenance=patterns.provenance(f"distance_profile(metric={metric})", queries),
        tower=patterns.tower,
        metric=metric,
        mean_distance=stacked,
        uniform=torch.stack(uniform)[:, 0],
        uniform_distance=torch.stack(uniform_means)[:, 0],
        dead_layers=patterns.dead_layers(queries),
    )


def grid_places(patterns: Patterns, method: str) -> Tensor:
    """The places of a tower's own positions, which are all of its keys; InputError where they hold no patches."""
    places = patterns.places()
    own = len(patterns.blocks) == 1 and patterns.query_kind.shape == patterns.key_kind.shape
    if not own or not bool((places[..., 2] >= 0).any()):
        raise InputError(
            f"{method} compares patches with patches, and no query of this pass of the {patterns.tower} tower is a patch; "
            "read a vision tower, or the prompt of a language tower."
        )
    return places


def _distances(patterns: Patterns, places: Tensor, metric: str) -> tuple[Tensor, Tensor, list[Any]]:
    """Distance (NaN where there is none) and bin of every pair, ``[row query key]``, and the bins' labels."""
    patch, together = places[..., 2] >= 0, _together(places)
    offset = (places[:, :, None, 2:] - places[:, None, :, 2:]).abs().double()
    exact = offset.amax(-1) if metric == "chebyshev" else offset.norm(dim=-1)
    exact = exact.masked_fill(~together, float("nan"))
    rings = int(torch.nan_to_num(exact, nan=0.0).round().max()) + 1
    others = [kind for kind in dict.fromkeys(patterns.key_kind.flatten().tolist()) if kind not in ("patch", *ABSENT)]
    others += ["other patch"] if bool((patch[:, :, None] & patch[:, None, :] & ~together).any()) else []
    # Padding gets no attention; it is given a bin that is cut off.
    kind_bin = np.full(patterns.key_kind.shape, rings + len(others))
    for number, kind in enumerate(others):
        kind_bin[patterns.key_kind == ("patch" if kind == "other patch" else kind)] = rings + number
    bins = torch.where(together, exact.nan_to_num(0.0).round().long(), torch.from_numpy(kind_bin)[:, None])
    return exact, bins, [*range(rings), *others]


def _profile(
    pattern: Float[Tensor, "row head query key"],
    counted: Bool[Tensor, "row query"],
    distance: Float[Tensor, "row query key"],
    bins: Int[Tensor, "row query key"],
    n_bins: int,
) -> tuple[Float[Tensor, "head row bin"], Float[Tensor, "head row"]]:
    """Mean over queries of the mass in each bin, and the mean distance of what goes to patches; queries that do not count hold 0."""
    rows, heads = pattern.shape[:2]
    profile = torch.zeros(heads, rows, n_bins, dtype=pattern.dtype)
    covered, mass = torch.zeros(2, heads, rows, dtype=pattern.dtype)
    for row in range(rows):
        flat, far = pattern[row].flatten(1), distance[row].flatten()
        profile[:, row].index_add_(1, bins[row].flatten(), flat)
        covered[:, row] = flat @ far.nan_to_num(0.0).to(flat.dtype)
        mass[:, row] = flat @ (~torch.isnan(far)).to(flat.dtype)
    return profile / counted.sum(-1)[:, None], covered / mass


@dataclass(frozen=True, eq=False)
class PositionPattern(Result):
    """Mean attention by offset: ``values`` is ``[layer head drow dcol]``, NaN at offsets that no counted query can look at.

    ``drow`` and ``dcol`` are key minus query: (-1, 0) is the patch above. ``counts`` ``[layer drow dcol]`` is over how many pairs of a
    query and a key each mean goes; pairs beyond the border do not exist and are not counted. ``explained`` ``[layer head]`` is the share of
    the variance of the attention between patches that the offset alone explains: 1 is a head that looks at fixed offsets, whatever the image.
    ``chance`` ``[layer]`` is what it is expected to be for a pattern that knows nothing of offsets: with few rows it is not small.
    """

    tower: str = ""
    explained: Tensor = field(default_factory=lambda: torch.zeros(0))
    chance: Tensor = field(default_factory=lambda: torch.zeros(0))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))
    dead_layers: list[Any] = field(default_factory=list)

    def highlights(self) -> dict[str, str]:
        """The head that offsets explain best."""
        best = int(self.explained.double().nan_to_num(-1.0).argmax())
        layer, head = divmod(best, self.explained.shape[1])
        where = head_name(self.axes["layer"][layer], self.axes["head"][head], self.tower)
        return {
            "best explained by offsets": f"{where}: {float(self.explained[layer, head]):.1%} (chance {float(self.chance[layer]):.1%})"
        }


@with_provenance
def position_pattern(
    model: Wrapped,
    cache: ActivationCache | Mapping[str, Any],
    tokens: Mapping[str, TokenMap] | TokenMap | None = None,
    *,
    tower: str | None = None,
    queries: PositionsLike = "patch",
    layers: Any = None,
    step: int | None = None,
) -> PositionPattern:
    """Mean attention of each head to the patch at every offset from the query patch, over all rows and all queries for which that patch exists.

    ``explained = Σ_offset n (mean_offset − mean)² / Σ_pair (p − mean)²``. It is NaN, with a warning, for a head whose attention is the same
    between all patches. Give several images: offsets far from 0 occur in few pairs. Arguments as for :func:`distance_profile`.

    Raises:
        InputError: as for :func:`distance_profile`.
    """
    patterns = read(model, cache, tokens, tower, layers, step)
    places = grid_places(patterns, "position_pattern")
    offsets, (rows, columns) = _offsets(places)
    n_offsets = (2 * rows - 1) * (2 * columns - 1)
    values, explained, chance, counts = [], [], [], []
    for number, (pattern, counted) in enumerate(patterns.each(queries)):
        there = _patch_queries(patterns, queries, number, places).any(0)
        usable = patterns.visible(pattern) & counted[..., None] & (offsets[:, there] >= 0)
        index = offsets[:, there].masked_fill(~usable, n_offsets)
        n, means, share = _by_offset(pattern, index, n_offsets)
        values.append(means.reshape(-1, 2 * rows - 1, 2 * columns - 1).to(pattern.dtype))
        explained.append(share.to(pattern.dtype))
        chance.append((int((n > 0).sum()) - 1) / max(int(n.sum()) - 1, 1))
        counts.append(n.reshape(2 * rows - 1, 2 * columns - 1).long())
    warn_undefined(torch.stack(explained), "the attention of a head is the same between all patches")
    return PositionPattern(
        values=torch.stack(values),
        axes={
            "layer": patterns.layers,
            "head": list(range(values[0].shape[0])),
            "drow": list(range(1 - rows, rows)),
            "dcol": list(range(1 - columns, columns)),
        },
        provenance=patterns.provenance("position_pattern", queries),
        tower=patterns.tower,
        explained=torch.stack(explained),
        chance=torch.tensor(chance),
        counts=torch.stack(counts),
        dead_layers=patterns.dead_layers(queries),
    )


def _by_offset(
    pattern: Float[Tensor, "row head query key"], index: Int[Tensor, "row query key"], n_offsets: int
) -> tuple[Float[Tensor, " offset"], Float[Tensor, "head offset"], Float[Tensor, " head"]]:
    """Pairs at each offset, each head's mean there, and the share of variance between offsets; ``index`` is ``n_offsets`` where no pair counts."""
    heads = pattern.shape[1]
    n = torch.bincount(index.flatten(), minlength=n_offsets + 1).double()
    sums, squares = torch.zeros(2, heads, n_offsets + 1, dtype=torch.float64)
    for of_row, where in zip(pattern, index, strict=True):
        flat = of_row.flatten(1).double()
        sums.index_add_(1, where.flatten(), flat)
        squares.index_add_(1, where.flatten(), flat.square())
    n, sums, square = n[:-1], sums[:, :-1], squares[:, :-1].sum(-1)
    means = sums / n
    around = n.sum() * (sums.sum(-1) / n.sum()).square()
    total, between = square - around, (n * means.square()).nan_to_num(0.0).sum(-1) - around
    # Rounding leaves a constant pattern a little variance; a share of that says nothing.
    return n, means, (between / total).masked_fill(total <= 1e-10 * square, float("nan"))


def _offsets(places: Int[Tensor, "row pos 4"]) -> tuple[Int[Tensor, "row query key"], tuple[int, int]]:
    """The number of every pair's offset on the grid of offsets, −1 where they are no patches of one image; and the patch grid's size."""
    rows, columns = (places[..., 2:].flatten(0, 1).max(0).values + 1).tolist()
    offset = places[:, None, :, 2:] - places[:, :, None, 2:]
    numbers = (offset[..., 0] + rows - 1) * (2 * columns - 1) + offset[..., 1] + columns - 1
    return numbers.masked_fill(~_together(places), -1), (rows, columns)


def _together(places: Int[Tensor, "row pos 4"]) -> Bool[Tensor, "row query key"]:
    """Which pairs of positions are patches of one image and tile."""
    patch = places[..., 2] >= 0
    same = (places[:, :, None, :2] == places[:, None, :, :2]).all(-1)
    return same & patch[:, :, None] & patch[:, None, :]


def _patch_queries(
    patterns: Patterns, queries: PositionsLike, number: int, places: Tensor
) -> Bool[Tensor, "row query"]:
    selected = torch.from_numpy(patterns.queries(queries, number))
    if bool((selected & (places[..., 2] < 0)).any()):
        raise InputError("Only patches have a distance to patches; choose queries among them, e.g. queries='patch'.")
    return selected
