"""Directions to steer along: vectors that point from activations of one kind to those of another, and how far they can be trusted.

A direction ``v`` points *toward* the first kind (of pairs the clean side) and *away* from the others, and its length is in units of the site:
``edits.steer(site, v, 1.0)`` moves activations by as much as the kinds differ along it. With ``h`` the activation of an example (the mean over its
chosen positions) and ``μ`` the mean of a kind,

* ``"mean_difference"``: ``v = μ₊ − μ₋`` (Turner et al. 2023, arXiv 2308.10248; Marks and Tegmark 2023, arXiv 2310.06824);
* ``"paired"``: the direction that most pairs share. ``u`` is the first principal direction, not centred, of ``Δ_i = h₊_i − h₋_i``, and
  ``v = (E[Δ] · u) u`` (after VTI, Liu et al. 2024, arXiv 2410.15778, whose sum of the mean and a unit component depends on the scale of the data);
* ``"pca"``: ``u`` is the first principal component of all activations together, whose kind is not told, and ``v = ((μ₊ − μ₋) · u) u``;
* ``"contrast"``: ``v = μ_k − mean_{j ≠ k} μ_j``, one kind against all others, each of which counts the same.

The sign is that of the kinds in all of them.

*Held out.* Examples are cut into random halves (a pair stays whole). ``cosines`` are those of the directions of two halves: 1 where both find the
same. ``values`` are coordinates ``(h − m) · u`` of every example in the half that did not make ``u``, with ``m`` half-way between the kinds: positive
on the side of the first. *Reference.* ``random_norms`` are lengths of directions from kinds that changed places at random: a mean difference of noise
has a length too.

Not covered: directions of several sites at once, or that differ from position to position; denoising steps behind the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.data import Pairs
from circuitvision.digests import of_json
from circuitvision.errors import InputError, checked_seed
from circuitvision.model.edits.writes import width_of
from circuitvision.model.sites import SiteName
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.probes.collected import collect
from circuitvision.results import Result
from circuitvision.statistics import seed_of_draw
from circuitvision.subspaces.bases import mean_difference, principal_components, random_basis
from circuitvision.subspaces.pairs import one_site

BUILDERS = ("mean_difference", "paired", "pca", "contrast")
MODES = ("add", "norm_preserving", "project_out")
FEWEST = 4
"""So many examples of each kind leave two in each half."""
Kinds = Mapping[str, Float[Tensor, "example d"]]


@dataclass(frozen=True, eq=False)
class Direction(Result):
    """A direction at a site, with held-out coordinates of its examples, ``values`` ``[example]``.

    ``vector`` ``[d]`` (of all heads of a site ``[head d]``) is what ``edits.steer`` takes. ``kinds`` says of which kind each example is; ``toward``
    is the first. ``cosines`` ``[split]`` and ``random_norms`` ``[draw]`` are the checks of the module. ``natural_norm`` is the mean length of an
    example's activation, ``natural_deviation`` its standard deviation along the direction within a kind.
    """

    vector: Tensor = field(default_factory=lambda: torch.zeros(0))
    site: str = ""
    heads: list[int] | None = None
    method: str = ""
    toward: str = ""
    kinds: list[str] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    cosines: Tensor = field(default_factory=lambda: torch.zeros(0))
    random_norms: Tensor = field(default_factory=lambda: torch.zeros(0))
    natural_norm: float = float("nan")
    natural_deviation: float = float("nan")
    name: str = ""

    _per_example: ClassVar[dict[str, int]] = {"kinds": 0, "groups": 0}

    @classmethod
    @with_provenance
    def of(cls, model: Any, site: Any, vector: Any, *, heads: Any = None, name: str = "given") -> Direction:
        """A vector of one's own at a site, such as a weight, a probe's, or a column of a basis.

        Raises:
            InputError: a vector that does not fit the site, has no length, or is not finite.
        """
        where, chosen = one_site(model, site, heads)
        given = torch.as_tensor(vector).detach().cpu()
        given = given if given.is_floating_point() else given.float()
        if given.ndim > 2 or not bool(given.isfinite().all()) or not float(given.double().norm()) > 0:
            raise InputError(
                f"A direction is a vector [d] of finite numbers, not all 0; this one is {list(given.shape)}."
            )
        width = width_of(model, where)
        if width is not None and given.shape[-1:] != (width,):
            raise InputError(f"A direction at {where} is [{width}], not {list(given.shape)}.")
        told = describe(model, method="Direction.of")
        return cls(
            torch.zeros(0),
            {"example": []},
            told,
            vector=given,
            site=where,
            heads=None if chosen is None else list(chosen),
            name=name,
        )

    def __len__(self) -> int:
        return self.vector.shape[-1]

    def __str__(self) -> str:
        return self.name or f"{self.method.replace('_', ' ')} toward {self.toward}"

    @property
    def tower(self) -> str:
        """The tower of the site."""
        return SiteName.parse(self.site).tower

    @property
    def norm(self) -> float:
        """The length of the vector, in units of the site."""
        return float(self.vector.double().norm())

    @property
    def unit(self) -> Float[Tensor, "*head d"]:
        """The vector at length 1."""
        return self.vector / self.norm

    @property
    def cosine(self) -> float:
        """The mean cosine of the directions of two halves; NaN of a vector of one's own."""
        return float(self.cosines.mean()) if len(self.cosines) else float("nan")

    @with_provenance
    def sides(self) -> Result:
        """Whether each held-out example lies on the side of its own kind, 1 or 0, ``[example]``: their mean is a share, .5 by chance."""
        first = torch.tensor([kind == self.toward for kind in self.kinds])
        right = (self.values > 0) == first
        return Result(right.double(), self.axes, {**self.provenance, "method": "sides of a direction"})

    def edits(
        self, scale: float = 1.0, mode: str = "add", *, positions: Any = None, steps: Any = None
    ) -> list[edits.Edit]:
        """The edit that steers along it, ``edits.steer(site, vector, scale, …)``, as a group of one."""
        where: dict[str, Any] = {"heads": self.heads, "positions": positions, "steps": steps, "mode": mode}
        return [edits.steer(self.site, self.vector, scale, **where)]

    def highlights(self) -> dict[str, str]:
        """Length beside chance, cosine of halves, and the share of held-out examples on their side."""
        if not len(self.cosines):
            return {"length": f"{self.norm:.3g}"}
        return {
            "length": f"{self.norm:.3g} (activations {self.natural_norm:.3g}, kinds exchanged {float(self.random_norms.mean()):.3g})",
            "cosine of halves": f"{self.cosine:.2f}",
            "held-out examples on their side": f"{float(self.sides().mean()):.0%}",
        }


@with_provenance
def steering_direction(
    model: Any,
    data: Any,
    site: Any,
    *,
    method: str = "mean_difference",
    positions: Any = None,
    heads: int | Sequence[int] | None = None,
    n_splits: int = 20,
    n_random: int = 100,
    seed: int = 0,
    example_batch: int = 32,
) -> Direction:
    """A direction at a site, from pairs or from inputs of several kinds: see the module.

    Args:
        model: the hooked model.
        data: pairs (toward the clean side, away from the corrupt one), or a mapping of kinds to data sets or inputs, toward the first.
        site: any site of any tower whose last axis is a vector; a head by its name.
        method: ``"mean_difference"``, ``"paired"``, ``"pca"`` or ``"contrast"``.
        positions: which positions are read, their mean where they are several; None is the one that stands for its example (see ``readout.collect``).
        heads: of a site of heads, which one; None is all of them, ``[head d]``.
        n_splits: how many cuts into halves.
        n_random: how many directions of exchanged kinds.
        seed: of both.
        example_batch: how many examples run at once.

    Raises:
        InputError: an unknown method, one kind alone, several with a method for two, fewer than four examples of a kind or two groups, pairs that are
            none, kinds that do not differ, several heads that are not all; a site that is no vector.
        UnknownSiteError: no such site.
    """
    where, chosen = one_site(model, site, heads)
    sets = {"clean": data.clean, "corrupt": data.corrupt} if isinstance(data, Pairs) else data
    _check(sets, method)
    kinds, groups, told = {}, {}, []
    shape: tuple[int, ...] = ()
    for kind, side in sets.items():
        found = collect(model, side, where, positions=positions, batch_size=example_batch)
        kinds[kind], shape = _of_heads(model, where, chosen, found[where].double())
        groups[kind] = found.groups
        told.append(found)
    few = [kind for kind, own in kinds.items() if len(own) < FEWEST]
    if few:
        raise InputError(f"The kind {few[0]!r} has {len(kinds[few[0]])} examples; halves need {FEWEST} of each.")
    paired = isinstance(data, Pairs) or method == "paired"
    if method == "paired" and len({len(own) for own in kinds.values()}) > 1:
        raise InputError(
            "Examples of both kinds belong together one by one, and there are not as many of one as of the other."
        )
    groups = _of_pairs(groups) if paired else groups
    alone = [kind for kind, own in groups.items() if n_splits and len(set(own)) < 2]
    if alone:
        raise InputError(
            f"All examples of the kind {alone[0]!r} belong to one group, and halves keep groups whole: give groups= that tell two apart at least, "
            "or n_splits=0."
        )
    vector = _vector(kinds, method)
    if not float(vector.norm()) > 0:
        raise InputError(f"The kinds do not differ at {where} along {method}, so there is no direction.")
    rng = np.random.default_rng(checked_seed(seed))
    halves = [_halves(groups, paired, rng) for _ in range(n_splits)]
    pairs = [[_vector(_taken(kinds, half), method) for half in _both(split)] for split in halves]
    cosines = [torch.nn.functional.cosine_similarity(one, other, dim=0) for one, other in pairs]
    norms = [_vector(_exchanged(kinds, paired, rng), method).norm() for _ in range(n_random)]
    labels = [(kind, number) for kind, found in zip(kinds, told, strict=True) for number in found.examples]
    pooled = torch.cat([own - own.mean(0) for own in kinds.values()])
    return Direction(
        values=_held_out(kinds, halves[0], method) if halves else torch.full((len(labels),), torch.nan),
        axes={"example": [f"{kind} {number}" for kind, number in labels]},
        provenance=describe(
            model,
            method=f"steering_direction(method={method}, positions={told[0].positions})",
            seed=seed,
            dataset_sha256=of_json([one.provenance["dataset_sha256"] for one in told]),
            site=where,
        ),
        vector=vector.float().reshape(shape),
        site=where,
        heads=None if chosen is None else list(chosen),
        method=method,
        toward=next(iter(kinds)),
        kinds=[kind for kind, _ in labels],
        groups=[group if paired else f"{kind} {group}" for kind, own in groups.items() for group in own],
        cosines=torch.tensor(cosines, dtype=torch.float64),
        random_norms=torch.tensor(norms, dtype=torch.float64),
        natural_norm=float(torch.cat(list(kinds.values())).norm(dim=1).mean()),
        natural_deviation=float((pooled @ (vector / vector.norm())).square().mean().sqrt()),
    )


@with_provenance
def random_directions(direction: Direction, count: int, seed: int = 0) -> list[Direction]:
    """Directions of the same length at the same site and heads, drawn from all alike (isotropic): what a claim about one is held against.
    A draw goes by the seed and its number, so that fewer are the first of more.

    Raises:
        InputError: fewer than none, what is no seed.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InputError(f"count={count!r}: how many random directions, 0 for none.")
    size = direction.vector.numel()
    drawn = [random_basis(size, 1, seed_of_draw(seed, number))[:, 0] for number in range(count)]
    return [
        dataclasses.replace(
            Direction(torch.zeros(0), {"example": []}, direction.provenance),
            vector=(direction.norm * one).to(direction.vector.dtype).reshape(direction.vector.shape),
            site=direction.site,
            heads=direction.heads,
            name=f"random {number}",
        )
        for number, one in enumerate(drawn)
    ]


def _check(sets: Any, method: str) -> None:
    if method not in BUILDERS:
        raise InputError(f"method={method!r} is not understood: {', '.join(map(repr, BUILDERS))}.")
    if not isinstance(sets, Mapping) or "input_ids" in sets or "pixel_values" in sets:
        raise InputError(
            f"A direction is between kinds: give pairs, or a mapping such as {{'red': side, 'blue': side}}, not a {type(sets).__name__}."
        )
    if len(sets) < 2 or (method != "contrast" and len(sets) > 2):
        wanted = "two or more kinds" if method == "contrast" else "two kinds; of several take method='contrast'"
        raise InputError(f"method={method!r} is of {wanted}, and there are {len(sets)}.")


def _of_heads(
    model: Any, site: str, heads: tuple[int, ...] | None, found: Float[Tensor, "example feature"]
) -> tuple[Float[Tensor, "example d"], tuple[int, ...]]:
    """The features of the chosen head, or of all, and the shape that a direction has there."""
    name = SiteName.parse(site)
    if not name.has_heads:
        return found, (found.shape[1],)
    cfg = model.towers[name.tower].cfg
    count = cfg.n_kv_heads if name.counts_key_heads else cfg.n_heads
    apart = found.unflatten(1, (count, -1))
    if heads is None:
        return found, tuple(apart.shape[1:])
    if len(heads) != 1 or not -count <= heads[0] < count:
        raise InputError(
            f"heads={list(heads)}: a direction is of one of the {count} heads of {site}, or of all (None)."
        )
    return apart[:, heads[0]], (apart.shape[2],)


def _vector(kinds: Kinds, method: str) -> Float[Tensor, " d"]:
    """The direction of some examples of each kind, toward the first."""
    first, *others = kinds.values()
    away = torch.stack([own.mean(0) for own in others]).mean(0)
    difference = mean_difference(away[None], first.mean(0, keepdim=True))
    if method in ("mean_difference", "contrast"):
        return difference
    if method == "paired":
        change = first - others[0]
        # Of changes and their opposites the mean is 0: principal components about the origin.
        varied = torch.cat([change, -change])
    else:
        varied = torch.cat([first, *others])
    if float((varied - varied.mean(0)).abs().max()) == 0:
        return torch.zeros_like(difference)
    unit = principal_components(varied, k=1)[0][:, 0]
    return (difference @ unit) * unit


def _of_pairs(groups: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The group of every pair, the same on both sides: pairs that share a group on either side are of one."""
    first, second = groups.values()
    joined: dict[Any, Any] = {}

    def group(name: Any) -> Any:
        while joined.setdefault(name, name) != name:
            name = joined[name]
        return name

    for one, other in zip(first, second, strict=True):
        joined[group(other)] = group(one)
    return {kind: [group(one) for one in first] for kind in groups}


def _halves(groups: Mapping[str, Sequence[Any]], paired: bool, rng: np.random.Generator) -> dict[str, Tensor]:
    """Which examples of each kind are in the first half: whole groups, and of pairs the same on both sides."""
    found, kept = {}, None
    for kind, own in groups.items():
        names = list(dict.fromkeys(own))
        if kept is None or not paired:
            order = rng.permutation(len(names))
            kept = {names[place] for place in order[: max(len(names) // 2, 1)]}
        found[kind] = torch.tensor([group in kept for group in own])
    return found


def _both(split: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    return split, {kind: ~mask for kind, mask in split.items()}


def _taken(kinds: Kinds, half: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {kind: own[half[kind]] for kind, own in kinds.items()}


def _exchanged(kinds: Kinds, paired: bool, rng: np.random.Generator) -> dict[str, Tensor]:
    """The same examples whose kinds changed places: of a pair its two, else among all."""
    if paired:
        (one, first), (other, second) = kinds.items()
        turn = torch.from_numpy(rng.integers(0, 2, len(first)).astype(bool))[:, None]
        return {one: torch.where(turn, second, first), other: torch.where(turn, first, second)}
    whole = torch.cat(list(kinds.values()))[torch.from_numpy(rng.permutation(sum(map(len, kinds.values()))))]
    return dict(zip(kinds, whole.split([len(own) for own in kinds.values()]), strict=True))


def _held_out(kinds: Kinds, split: Mapping[str, Tensor], method: str) -> Float[Tensor, " example"]:
    """The coordinate of every example along the unit direction of the other half, from half-way between its kinds."""
    found = {kind: torch.zeros(len(own), dtype=torch.float64) for kind, own in kinds.items()}
    both = _both(split)
    for here, there in (both, both[::-1]):
        made = _taken(kinds, here)
        vector = _vector(made, method)
        first, *others = (own.mean(0) for own in made.values())
        middle = (first + torch.stack(others).mean(0)) / 2
        for kind, own in kinds.items():
            found[kind][there[kind]] = (own[there[kind]] - middle) @ (vector / vector.norm().clamp_min(1e-300))
    return torch.cat(list(found.values()))
