"""Contrast of two queries' attention, and the areas of the image that stand out in it.

Attention to an image goes to some patches whatever is asked. Dividing the attention under a question by that under a generic instruction about
the same image leaves what the question adds: ``Â = A_Q / (A_G + λ)``, patch by patch, averaged over heads first and over layers (and generated
words, later ones weighing more) after. Areas are what remains of the image above a percentile, neighbouring patches together: regions
(:mod:`circuitvision.regions`) that stand wherever positions are asked for. :meth:`AttentionContrast.focus` cuts the picture down to them.

λ keeps patches that the generic query ignores from taking over. The paper's value is not known to us; the default is the mean generic
attention of a patch, which does not depend on how many patches there are. Not covered: edge and colour measures of how cluttered an image is.

Source: CARVE (Ge et al., arXiv 2509.06461).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.edits.values import TensorRef
from circuitvision.model.regions import Area
from circuitvision.provenance import with_provenance
from circuitvision.readout.attention.maps import AttentionMaps
from circuitvision.readout.attention.patterns import warn_undefined
from circuitvision.readout.patch_coords import PictureOf, extent_of, grid_of, picture_of
from circuitvision.results import Result


@dataclass(frozen=True, eq=False)
class AttentionContrast(Result):
    """``values`` is ``[key example]``: above 1 (for λ = 0) where the question looks more than the generic query; NaN where a key is no patch.

    ``places``, ``boxes``, ``shares``, ``frames`` and ``blocks`` say what each key is, as in :class:`AttentionMaps`. Positions that mix patches
    lie on no grid and are left out.
    """

    tower: str = ""
    epsilon: float = 0.0
    layers: list[Any] = field(default_factory=list)
    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0))
    shares: Tensor = field(default_factory=lambda: torch.zeros(0))
    frames: Tensor = field(default_factory=lambda: torch.zeros(0))
    blocks: list[list[Any]] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"places": 0, "boxes": 0, "shares": 0, "frames": 0}

    def highlights(self) -> dict[str, str]:
        """The strongest areas of the first example's first image."""
        if not bool(torch.isfinite(self.values[:, 0]).any()):
            return {}
        return {
            f"region {number}": f"{len(area.patches)} patches, box {tuple(round(edge) for edge in area.box)}"
            for number, area in enumerate(self.regions(), start=1)
        }

    def grid(
        self, example: Any = None, image: int | None = None, tile: int | None = None
    ) -> Float[Tensor, "grid_row grid_col"]:
        """One image's contrast on its patch grid (None: the first); InputError for an example, image or tile that is not there."""
        picture = picture_of(self, example, image, tile)
        return grid_of(self, self.values[:, picture.entry], picture)

    def regions(
        self,
        top_percent: float = 20.0,
        count: int = 3,
        *,
        example: Any = None,
        image: int | None = None,
        tile: int | None = None,
        diagonal: bool = False,
    ) -> list[Area]:
        """The connected areas among the ``top_percent`` of patches with the highest contrast, those with the largest sum (``mass``) first.

        Each is a region of the tower's positions in this example, with its ``box``, ``mass`` and ``patches``. At least one patch is kept, and
        patches equal to the last one kept are kept as well. Patches are neighbours along rows and columns, with ``diagonal`` at corners too.

        Raises:
            InputError: a share outside 0 … 100, a count below 1, an image that is not there.
        """
        if not 0 < top_percent <= 100 or not isinstance(count, Integral) or count < 1:
            raise InputError(
                f"regions takes a top_percent above 0 and up to 100, and a count from 1 on, not {top_percent} and {count}."
            )
        picture = picture_of(self, example, image, tile)
        grid = grid_of(self, self.values[:, picture.entry], picture)
        finite = grid[torch.isfinite(grid)]
        if not finite.numel():
            return []
        kept = max(1, math.ceil(finite.numel() * top_percent / 100 - 1e-9))
        marked = {(r, c) for r, c in (grid >= finite.topk(kept).values[-1]).nonzero().tolist()}
        steps = [(0, 1), (1, 0), *([(1, 1), (1, -1)] if diagonal else [])]
        graph = nx.Graph()
        graph.add_nodes_from(marked)
        graph.add_edges_from(
            ((r, c), (r + dr, c + dc)) for r, c in marked for dr, dc in steps if (r + dr, c + dc) in marked
        )
        found = [self._area(grid, sorted(part), picture) for part in nx.connected_components(graph)]
        return sorted(found, key=lambda area: (-area.mass, area.patches))[:count]

    def focus(
        self,
        picture: Any,
        top_percent: float = 20.0,
        count: int = 3,
        *,
        example: Any = None,
        image: int | None = None,
        tile: int | None = None,
        fill: int = 0,
    ) -> np.ndarray[Any, Any]:
        """The picture cut down to the box around its strongest areas, with ``fill`` (a level 0 … 255) at all patches of none: what CARVE asks
        about again.

        ``picture`` is what the model saw of the image or tile, of any size: a PIL image, or an array ``[height width 3]``. Its own processor will
        enlarge what is given back. Other arguments as for :meth:`regions`.

        Raises:
            InputError: as :meth:`regions`; a picture of another kind, or without an area.
        """
        found = self.regions(top_percent, count, example=example, image=image, tile=tile)
        if not found:
            raise InputError("This image has no contrast, so no region to look at.")
        pixels = np.array(picture.convert("RGB") if hasattr(picture, "convert") else picture)
        if pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise InputError(f"A picture is [height, width, 3] or a PIL image; this one is {list(pixels.shape)}.")
        rows, columns = self.grid(example, image, tile).shape
        extent = extent_of(self, picture_of(self, example, image, tile))
        marked = np.zeros((rows, columns), dtype=bool)
        marked[tuple(np.array([patch for area in found for patch in area.patches]).T)] = True
        # Every pixel belongs to the patch that holds its middle; those past the last patch to none, which is the extra row and column.
        down, across = (
            ((np.arange(size) + 0.5) * cells / (size * share)).clip(0, cells).astype(int)
            for size, cells, share in zip(pixels.shape[:2], (rows, columns), extent, strict=True)
        )
        kept = np.pad(marked, (0, 1))[np.ix_(down, across)]
        pixels[~kept] = fill
        (top, bottom), (left, right) = (np.flatnonzero(kept.any(axis))[[0, -1]] for axis in (1, 0))
        return pixels[top : bottom + 1, left : right + 1]

    def _area(self, grid: Tensor, patches: Sequence[tuple[int, int]], picture: PictureOf) -> Area:
        number, here = picture.entry, picture.here(self)
        places, boxes = self.places[number], self.boxes[number]
        inside = here.clone()
        inside[here] = torch.tensor([tuple(place) in set(patches) for place in places[here, 2:].tolist()])
        # Patches of padding have no pixels.
        corners = boxes[inside][boxes[inside].isfinite().all(-1)].reshape(-1, 4)
        edges = [*corners[:, :2].amin(0), *corners[:, 2:].amax(0)] if len(corners) else [float("nan")] * 4
        left, top, right, bottom = map(float, edges)
        mask = torch.zeros(len(self.places), len(inside), dtype=torch.bool)
        mask[number] = inside
        whole: list[Any] = [self.tower, 0, 0, len(inside)]
        held = (block for block in self.blocks if bool(inside[block[1] : block[1] + block[3]].any()))
        tower, start, first, count = next(held, whole)
        mask = torch.nn.functional.pad(mask[:, start : start + count], (first, 0))
        return Area(
            tower=tower,
            mask=TensorRef(mask),
            example=tuple(self.axes["example"]),
            how="contrast",
            box=(left, top, right, bottom),
            mass=float(sum(grid[r, c] for r, c in patches)),
            patches=tuple(patches),
        )


@with_provenance
def attention_contrast(
    question: AttentionMaps,
    generic: AttentionMaps,
    *,
    epsilon: float | None = None,
    layers: int | Iterable[Any] | None = None,
    weights: Sequence[float] | None = None,
) -> AttentionContrast:
    """``Σ_steps w_t · mean over layers of A_Q / (A_G + λ)`` for every patch, with attention averaged over heads and weights that sum to 1.

    The prompts may differ in length: patches are matched by their place.

    Args:
        question: maps of the run with the question (:func:`attention_maps`; with ``steps="decode"`` those of the generated words).
        generic: maps of a run with a generic instruction about the same image. One pass serves all steps of the question.
        epsilon: λ; None: the mean of ``A_G`` over patches, layers, steps and rows. With 0, a patch that the generic query ignores is NaN, with
            a warning.
        layers: those fused (the paper takes 20 to 25 of 32); None: all that the maps hold.
        weights: one per step; None: 1, 2, 3, … as in the paper.

    Raises:
        InputError: maps of different towers, images, rows, layers or numbers of steps; weights that do not fit; a negative λ.
    """
    _check(question, generic, epsilon)
    chosen = question.axes["layer"] if layers is None else list(layers) if isinstance(layers, Iterable) else [layers]
    a_q, a_g = _mean_head(question, chosen, "question"), _mean_head(generic, chosen, "generic")
    if a_g.shape[0] not in (1, a_q.shape[0]):
        raise InputError(
            f"The question has {a_q.shape[0]} steps and the generic query {a_g.shape[0]}; take as many, or one of the generic."
        )
    patch = (question.places[..., 2] >= 0).T
    matched = _matched(question, generic).T
    a_g = a_g.gather(-2, matched.expand(*a_g.shape[:2], *matched.shape))
    floor = float(a_g[..., patch].mean()) if epsilon is None else float(epsilon)
    step_weights = _step_weights(weights, a_q.shape[0]).to(a_q.dtype)
    bottom = a_g + floor
    ratio = torch.where(bottom > 0, a_q / bottom, float("nan")).mean(1)
    fused = torch.einsum("skr,s->kr", ratio, step_weights)
    warn_undefined(fused[patch], "the generic query gives a patch no attention; take epsilon > 0")
    method = f"attention_contrast(epsilon={floor:g}, layers={chosen})"
    same = ("tower", "places", "boxes", "shares", "frames", "blocks")
    return AttentionContrast(
        values=fused.masked_fill(~patch, float("nan")),
        axes={"key": question.axes["key"], "example": question.axes["example"]},
        provenance={**question.provenance, "method": method, "generic": generic.provenance},
        epsilon=floor,
        layers=list(chosen),
        **{name: getattr(question, name) for name in same},
    )


def _check(question: AttentionMaps, generic: AttentionMaps, epsilon: float | None) -> None:
    for name, maps in (("question", question), ("generic", generic)):
        if not isinstance(maps, AttentionMaps):
            raise InputError(f"{name} is a result of attention_maps, not {type(maps).__name__}.")
        if maps.measure != "attention":
            raise InputError(f"{name} holds a {maps.measure}; a contrast takes plain attention_maps.")
        if not bool(maps.patches().any()):
            raise InputError(f"No key of {name} is an image patch, so there is nothing to contrast.")
    if question.tower != generic.tower:
        raise InputError(f"question is of the {question.tower} tower, generic of {generic.tower}; read the same one.")
    if epsilon is not None and not (isinstance(epsilon, Real) and math.isfinite(epsilon) and epsilon >= 0):
        raise InputError(f"epsilon={epsilon!r} makes no sense; give a number from 0 on.")


def _mean_head(maps: AttentionMaps, layers: Sequence[Any], name: str) -> Float[Tensor, "step layer key example"]:
    if not layers:
        raise InputError(f"layers={list(layers)!r}: the maps of {name} hold layers {maps.axes['layer']}.")
    values = maps.values if "step" in maps.axes else maps.values[None]
    return values[:, [maps.index_of("layer", layer) for layer in layers]].mean(2)


def _matched(question: AttentionMaps, generic: AttentionMaps) -> Tensor:
    """For every key of the question the generic key at the same place (0 where it is no patch), ``[row key]``."""
    rows, others = len(question.axes["example"]), len(generic.axes["example"])
    if rows != others:
        raise InputError(f"question has {rows} rows and generic {others}; ask about the same images.")
    found = torch.zeros(question.places.shape[:2], dtype=torch.long)
    for row in range(rows):
        numbers = {tuple(place): key for key, place in enumerate(generic.places[row].tolist()) if place[2] >= 0}
        mine = [tuple(place) for place in question.places[row].tolist()]
        if {place for place in mine if place[2] >= 0} != set(numbers):
            raise InputError(
                f"question and generic have different image patches in row {row}; ask about the same images."
            )
        found[row] = torch.tensor([numbers.get(place, 0) for place in mine])
    return found


def _step_weights(weights: Sequence[float] | None, steps: int) -> Tensor:
    found = torch.arange(1, steps + 1) if weights is None else torch.as_tensor(weights)
    if found.shape != (steps,) or not bool((found >= 0).all()) or not bool(found.sum() > 0):
        raise InputError(f"weights={weights!r}: give {steps} numbers from 0 on, not all 0, one per step.")
    return found.double() / found.sum()
