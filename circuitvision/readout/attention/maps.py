"""Attention over the image: one map per head, as it comes or against the mean head, and whether it peaks inside a region.

A map is one query's attention to every key, with the place and pixels of each key beside it, so that it can be laid over the picture and saved
without the model. Maps of decoding passes keep the prompt's keys alone; what goes to generated words is missing from their sums.

Not covered: gradients of patterns; upsampling of maps to pixels.

Sources: attention minus the mean over heads and layers, NOTICE (Golovanevsky et al., arXiv 2406.16320); peaks inside an object, Kaduri et al.
(2411.17491).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.names import head_name
from circuitvision.model.positions import GENERATED, Positions, PositionsLike, warn_of_empty, without_any
from circuitvision.model.selection import Selection
from circuitvision.model.tokens import PatchSets, TokenMap, Views
from circuitvision.provenance import with_provenance
from circuitvision.readout.attention.cache import patterns_in, read
from circuitvision.readout.attention.mass import AttentionSummary, mean_over
from circuitvision.readout.attention.patterns import KeyBlock, Patterns, described, keys_of, mean_query, warn_undefined
from circuitvision.readout.patch_coords import PictureOf, grid_of, picture_of, places_of
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True, eq=False)
class AttentionMaps(Result):
    """The attention of one query per head: ``values`` is ``[layer head key example]``, of several passes ``[step layer head key example]``.

    ``places`` ``[row key 4]`` is image, tile, patch row and patch column of every key (−1 where it is no patch), ``boxes`` ``[row key 4]`` its
    pixels (NaN likewise), ``shares`` where it lies in the image or tile that the model read (as shares of it), ``frames`` the pixels that this
    image or tile covers, ``kinds`` its kind. Of a key that mixes patches only the image and the box are known.
    ``query_places`` ``[row 4]`` is the place of the query where it is a single patch. A row is an entry of ``example``. ``uniform`` (the same as
    ``values`` without ``head``) is what looking at every visible key alike would give.
    """

    tower: str = ""
    measure: str = "attention"
    """"attention" (shares), "difference" from the mean over heads and layers, or "rollout"."""
    query: str = ""
    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0))
    shares: Tensor = field(default_factory=lambda: torch.zeros(0))
    frames: Tensor = field(default_factory=lambda: torch.zeros(0))
    kinds: list[list[str]] = field(default_factory=list)
    blocks: list[list[Any]] = field(default_factory=list)
    """Which positions the keys are: ``[tower, first key, first position, count]`` for each tower they are of."""
    query_places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    uniform: Tensor = field(default_factory=lambda: torch.zeros(0))

    _per_example: ClassVar[dict[str, int]] = {
        "places": 0,
        "boxes": 0,
        "shares": 0,
        "frames": 0,
        "kinds": 0,
        "query_places": 0,
        "uniform": -1,
    }

    def highlights(self) -> dict[str, str]:
        """The query, and the heads that give most of its attention to image patches (of the first pass, in means over examples)."""
        found = {"query": self.query or "default", "shows": self.measure}
        if self.measure == "attention" and bool(self.patches().any()):
            share = self.share_of(self.patches()).mean()
            share = share[0] if "step" in self.axes else share
            for flat in share.nan_to_num(-1.0).flatten().argsort(descending=True)[:3].tolist():
                layer, head = divmod(flat, share.shape[1])
                name = head_name(self.axes["layer"][layer], self.axes["head"][head], self.tower)
                found[name] = f"{float(share[layer, head]):.1%} on image patches"
        return found

    def pass_values(self, step: int | None = None) -> Float[Tensor, "layer head key example"]:
        """The maps of one pass, by its number as in ``axes["step"]``; None: the first of those kept.

        Raises InputError for a pass that these maps do not hold.
        """
        if "step" not in self.axes:
            if step is not None:
                raise InputError("These maps are of one pass; leave step out, or give attention_maps several steps.")
            return self.values
        return self.values[0 if step is None else self.index_of("step", step)]

    def grid(
        self,
        layer: Any,
        head: Any,
        example: Any = None,
        image: int | None = None,
        tile: int | None = None,
        step: int | None = None,
    ) -> Float[Tensor, "grid_row grid_col"]:
        """One head's map on the patch grid of an example's image (None: the first); InputError for what is not there.

        ``step`` is the number of a pass, as in :meth:`pass_values`.
        """
        picture = picture_of(self, example, image, tile)
        values = self.pass_values(step)[self.index_of("layer", layer), self.index_of("head", head)]
        return grid_of(self, values[..., picture.entry], picture)

    def patches(self, image: int | None = None) -> Bool[Tensor, "row key"]:
        """Which keys are patches (of one image)."""
        found = self.places[..., 0] >= 0
        return found if image is None else found & (self.places[..., 0] == image)

    def keys(self, where: PositionsLike, tokens: Mapping[str, TokenMap] | None = None) -> Bool[Tensor, "row key"]:
        """Which keys these positions are; see :mod:`circuitvision.model.positions`.

        ``tokens`` (``model.tokens(inputs)``) is needed for what the maps do not hold: the text of positions, and where pictures lie in the tensors.

        Raises InputError if no key is one, in any row.
        """
        blocks = blocks_from(self, tokens)
        if isinstance(where, Selection):
            own = next((block.tokens for block in blocks if block.tower == where.tower), None)
            if own is not None and not np.array_equal(own.kind, where.tokens.kind[:, : own.n_positions]):
                raise InputError(f"{where!r} is of another run than these maps.")
        found = keys_of(Positions.of(where), blocks, self.tower, len(self.places), "The choice of keys")
        if not found.any():
            raise InputError(f"{described(where)!r} holds no key of these maps.")
        return torch.from_numpy(found)

    @with_provenance
    def share_of(self, keys: Bool[Tensor, "row key"]) -> AttentionSummary:
        """How much of its attention each head gives to some keys together, ``[layer head example]`` (behind ``step``, where there are passes).

        ``uniform`` is what looking at every visible key alike would give them; NaN of maps that do not know it.
        """
        axes = {name: labels for name, labels in self.axes.items() if name != "key"}
        alike = self.values[..., 0, :, :] * float("nan") if not self.uniform.numel() else self.uniform
        shares = [torch.where(keys.T, one.double(), 0.0).sum(-2) for one in (self.values, alike)]
        return AttentionSummary(shares[0], axes, self.provenance, self.tower, "mass", self.query, shares[1])

    def share_elsewhere(
        self, keys: Bool[Tensor, "row key"], picture: PictureOf, steps: Sequence[int] | None = None
    ) -> Float[Tensor, "layer head place"]:
        """How much of its attention each head gives to the same patches of a picture when they are moved to every other place of its grid (around its
        edges): what the share of a region, found as the largest of many heads, is held against. Of several passes (``steps``: all) the mean.
        """
        passes = [self.pass_values(step)[..., picture.entry] for step in steps or self.axes.get("step", [None])]
        grids = grid_of(self, torch.stack(passes).double().mean(0), picture).nan_to_num(0.0)
        inside = grid_of(self, keys[picture.entry].double(), picture).nan_to_num(0.0)
        rows, columns = inside.shape
        moved = [inside.roll((r, c), (0, 1)) for r in range(rows) for c in range(columns) if (r, c) != (0, 0)]
        return grids.flatten(-2) @ torch.stack([one.flatten() for one in moved or [inside * 0]]).T

    @with_provenance
    def head_contrast(self) -> AttentionMaps:
        """Each head's attention minus the mean over all heads and layers of these maps: what sets it apart, key by key (NOTICE).

        Values sum to 0 over heads and layers.

        Raises:
            InputError: not plain maps of several heads or layers.
        """
        if self.measure != "attention":
            raise InputError("head_contrast takes plain attention_maps; what it gives has the mean taken off already.")
        if self.values.shape[-4] * self.values.shape[-3] < 2:
            raise InputError("These maps hold a single head, which differs from the mean of all by nothing.")
        mean = self.values.mean(dim=(-4, -3), keepdim=True)
        provenance = {
            **self.provenance,
            "method": f"head_contrast of {self.provenance.get('method', 'attention_maps')}",
        }
        return dataclasses.replace(
            self,
            values=self.values - mean,
            measure="difference",
            provenance=provenance,
            uniform=torch.zeros_like(self.uniform),
        )

    @with_provenance
    def peak_in(
        self, where: PositionsLike, *, among: PositionsLike = "patch", tokens: Mapping[str, TokenMap] | None = None
    ) -> AttentionSummary:
        """Whether each head's attention peaks inside a region: ``values`` ``[layer head example]`` is 1 or 0; averaged, the share.

        The peak is sought ``among`` the patches, or other positions; equal peaks count in parts. ``uniform`` is the share of those keys that lies
        inside: chance. ``tokens`` as of :meth:`keys`.

        Raises:
            InputError: nothing lies in the region, or the maps have several passes.
        """
        if "step" in self.axes:
            raise InputError("peak_in takes maps of one pass; give attention_maps a single step.")
        sought = self.keys(among, tokens)
        inside = self.keys(where, tokens) & sought
        if not bool(inside.any()):
            raise InputError(f"{described(where)!r} holds none of the keys among which the peak is sought; see among=.")
        values = self.values.movedim(-1, 2).masked_fill(~sought, float("-inf"))
        peaks = (values == values.amax(-1, keepdim=True)) & sought
        share = (peaks & inside).sum(-1) / peaks.sum(-1)
        lost = ~inside.any(-1)
        rows = self.axes["example"]
        warn_of_empty({described(where): len(without_any(inside, rows, max(rows, default=-1) + 1))}, len(self.examples))
        warn_undefined(share.masked_fill(lost, 0.0), "a row has no map")
        chance = (inside.sum(-1) / sought.sum(-1)).masked_fill(lost, float("nan"))
        return AttentionSummary(
            values=share.masked_fill(lost, float("nan")),
            axes={name: labels for name, labels in self.axes.items() if name != "key"},
            provenance={**self.provenance, "method": f"peak_in of {self.provenance.get('method', 'attention_maps')}"},
            tower=self.tower,
            measure="peak",
            queries=self.query,
            uniform=chance.expand(share.shape[0], -1).clone(),
        )


def blocks_from(held: Any, tokens: Mapping[str, TokenMap] | None = None) -> list[KeyBlock]:
    """The keys of a result (maps, rollout) by tower: their token maps where given, or else as much of them as the result holds."""
    blocks = held.blocks or [[held.tower, 0, 0, len(held.axes["key"])]]
    return [
        KeyBlock(
            tower,
            tokens[tower] if tokens is not None and tower in tokens else _map_of(held, *block),
            start,
            first,
            count,
        )
        for block in blocks
        for tower, start, first, count in [block]
    ]


def _map_of(held: Any, tower: str, start: int, first: int, count: int) -> TokenMap:
    """Kinds, patches and boxes of some keys as a token map, without text; the positions before the first key are padding."""
    here = slice(start, start + count)
    kinds, example = np.array(held.kinds), np.array(held.axes["example"])
    rows, length = len(kinds), first + count

    def spread(values: Any, missing: Any) -> np.ndarray:
        values = np.asarray(values)[:, here]
        before = np.full((rows, first, *values.shape[2:]), missing, dtype=values.dtype)
        return np.concatenate([before, values], axis=1)

    kind, places, box = spread(kinds, "padding"), spread(held.places, -1), spread(held.boxes, np.nan).astype(float)
    row, position = np.nonzero(kind == "patch")
    edges, coords = box[row, position], places[row, position]
    none = np.full(len(row), -1)
    sets = PatchSets(
        row, position, none, none, coords[:, 2], coords[:, 3], np.ones(len(row)), edges, np.full_like(edges, np.nan)
    )
    text = np.full((rows, length), "", dtype=object)
    image, tile, down, across = np.moveaxis(places, -1, 0)
    return TokenMap(tower, kind, example, image, tile, down, across, box, text, sets, Views.none())


@with_provenance
def attention_maps(
    model: Wrapped,
    cache: ActivationCache | Mapping[str, Any],
    tokens: Mapping[str, TokenMap] | TokenMap | None = None,
    *,
    tower: str | None = None,
    query: PositionsLike = None,
    layers: Any = None,
    steps: int | str | Iterable[int] | None = None,
) -> AttentionMaps:
    """The attention of one query, or the mean over several, to every key: per layer, head and row.

    ``query`` is as ``queries`` of :func:`attention_mass`: "last", "cls", a position, a ``Selection`` (``tokens.image(0).patch(2, 3)``) …
    ``steps`` chooses passes of a cache that recorded ``generate`` or ``sample_actions``: a number, or several ("all", "decode": all but the
    first), which become a leading axis ``step``, over the keys that all of them have.

    Raises:
        InputError: as :func:`attention_mass`.
    """
    if isinstance(tokens, TokenMap) and tower is None:
        tower = tokens.tower
    cache = patterns_in(model, cache, tower)
    first, numbers = _first_pass(model, cache, tokens, tower, layers, steps)
    passes = [first, *(read(model, cache, tokens, first.tower, layers, step) for step in numbers[1:])]
    several = isinstance(steps, Iterable)
    # Passes counted from the end are named by their place, so that one label means one pass.
    numbers = [int(step) % first.n_passes for step in numbers] if several else numbers
    kept = [torch.from_numpy((one.key_kind != GENERATED).all(0)) for one in passes]
    if len({int(mask.sum()) for mask in kept}) > 1:
        raise InputError("These passes look at different numbers of the prompt's keys; choose steps one by one.")
    values, uniform = [], []
    for one, mask in zip(passes, kept, strict=True):
        of_pass, alike = [], []
        for pattern, counted in one.each(query):
            of_pass.append(mean_query(pattern, counted)[..., mask].movedim(0, -1))
            alike.append(mean_over(one.alike(pattern), counted)[..., mask].movedim(0, -1))
        values.append(torch.stack(of_pass))
        uniform.append(torch.stack(alike))
    stacked = torch.stack(values) if several else values[0]
    warn_undefined(stacked, "a row has no query that counts")
    mask = kept[0]
    axes = {**first.axes(stacked.shape[-3]), "key": (mask.nonzero().flatten() + first.blocks[0].first).tolist()}
    axes["example"] = first.example
    return AttentionMaps(
        values=stacked,
        axes={"step": numbers, **axes} if several else axes,
        provenance=first.provenance("attention_maps", query),
        tower=first.tower,
        query=described(query),
        places=first.places()[:, mask],
        boxes=first.boxes()[:, mask].float(),
        shares=first.shares()[:, mask],
        frames=first.frames()[:, mask],
        kinds=first.key_kind[:, mask.numpy()].tolist(),
        blocks=blocks_of(first),
        query_places=_query_places(first, query),
        uniform=torch.stack(uniform) if several else uniform[0],
    )


def _first_pass(
    model: Wrapped,
    cache: ActivationCache,
    tokens: Mapping[str, TokenMap] | TokenMap | None,
    tower: str | None,
    layers: Any,
    steps: int | str | Iterable[int] | None,
) -> tuple[Patterns, list[Any]]:
    """The first pass that is asked for, and the numbers of all."""
    if not isinstance(steps, Iterable):
        return read(model, cache, tokens, tower, layers, steps), [steps]
    if isinstance(steps, str):
        if steps not in ("all", "decode"):
            raise InputError(f"steps={steps!r} is not understood: numbers of passes, 'all' or 'decode'.")
        count = read(model, cache, tokens, tower, layers, 0).n_passes
        numbers = list(range(0 if steps == "all" else 1, count))
    else:
        numbers = list(steps)
    if not numbers:
        raise InputError(f"steps={steps!r} holds no pass of this cache.")
    return read(model, cache, tokens, tower, layers, numbers[0]), numbers


def blocks_of(patterns: Patterns) -> list[list[Any]]:
    """Which positions the keys are, in a form that results keep: ``[tower, first key, first position, count]``."""
    return [[one.tower, one.start, one.first, one.count] for one in patterns.blocks if one.tokens is not None]


def _query_places(patterns: Patterns, query: PositionsLike) -> Tensor:
    """The place of each row's query where it is a single patch, −1 elsewhere."""
    counted = torch.from_numpy(patterns.queries(query, 0))
    if counted.shape != patterns.own.kind.shape:
        return torch.full((counted.shape[0], 4), -1)
    return single_places(counted, places_of(patterns.own))


def single_places(counted: Bool[Tensor, "row pos"], places: Int[Tensor, "row pos 4"]) -> Int[Tensor, "row 4"]:
    """The place of each row's one counted position, −1 where there are several or none."""
    found = torch.full((counted.shape[0], 4), -1)
    single = counted.sum(-1) == 1
    found[single] = places[single][counted[single]]
    return found
