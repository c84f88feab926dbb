"""Regions: parts of pictures and texts as values, that stand wherever positions are asked for.

``positions=cv.regions.box(boxes)`` edits, reads or attributes at the patches under each example's box; several with names,
``{"object": region, "rest": cv.regions.others(region)}``, are an axis of the result. A region has a label for axes and figures (its own, or one given
with ``.named("object")``), a digest for provenance, and is stored with edits. The same grammar takes numbers, slices, "last", kinds ("patch",
"text", …), selections of a token map, booleans ``[pos]``, ``[row pos]`` or ``[example pos]``, and functions of a token map that return one of these.

Where a region is empty for an example there is no value: NaN, and one warning that says in how many examples.

Not covered: regions given as polygons (draw them into masks), regions that move during generation.

Sources: high-norm tokens, Darcet et al., "Vision transformers need registers" (arXiv 2309.16588) and Sun et al., "Massive activations" (2402.17762).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.model.edits.values import TensorRef
from circuitvision.model.regions import At, Box, HighNorm, Mask, Others, RandomLike, Region, Words, high_norm_mask

__all__ = ["Region", "at", "box", "high_norm", "mask", "others", "random_like", "words"]


def box(boxes: Any, *, size: Any = None, image: int | None = 0, threshold: float = 0.0) -> Region:
    """The patches under a box of every example.

    Args:
        boxes: (left, top, right, bottom) in pixels of the original picture, right and bottom one past the last pixel: one box for all examples, an
            array ``[example, 4]``, or a list with one per example, None for none, or several boxes.
        size: (height, width) of the original pictures, or one per example. None: boxes are in the frame of ``TokenMap.box``, which is the original
            picture of tiled images, and else the tensor that the model reads.
        image: which image of each example the boxes are of; None: all.
        threshold: a position belongs to a box if more than this share of what it reads lies inside; 0: if any of it does.

    Raises:
        InputError: what is no box, boxes given as shares of the picture, or a share outside 0 … 1; where it is used, pictures of another size than
            the run's. Boxes that reach outside pictures of known size get a warning.
    """
    found, shared = _boxes(boxes)
    sizes = _sizes(size)
    _check_extent(found, sizes)
    return Box(boxes=TensorRef(found), shared=shared, size=sizes, image=image, threshold=_share(threshold))


def mask(masks: Any, *, size: Any = None, image: int | None = 0, threshold: float = 0.0) -> Region:
    """The patches under a mask of every example.

    Args:
        masks: truth values ``[height width]`` over the whole original picture: one for all examples, an array ``[example height width]``, or a
            list with one per example, None for none.
        size: (height, width) of the original pictures, or one per example, where masks are of another resolution; None: that of the masks.
        image: as of :func:`box`. threshold: likewise.

    Raises:
        InputError: what is no mask, or a share outside 0 … 1; where it is used, pictures of another size than the run's.
    """
    arrays = (
        masks if isinstance(masks, list | tuple) else np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks)
    )
    shared = isinstance(arrays, np.ndarray) and arrays.ndim == 2
    listed = [arrays] if shared else list(arrays)
    held = []
    for number, one in enumerate(listed):
        whole = (
            None if one is None else torch.as_tensor(np.asarray(one.cpu() if isinstance(one, Tensor) else one).copy())
        )
        if whole is not None and (whole.ndim != 2 or not whole.numel()):
            raise InputError(f"Mask {number} is truth values [height width] or None, not {list(whole.shape)}.")
        held.append(None if whole is None else TensorRef(whole.bool()))
    if not held:
        raise InputError("masks holds no mask; give one per example.")
    return Mask(masks=tuple(held), shared=shared, size=_sizes(size), image=image, threshold=_share(threshold))


def words(text: str | Sequence[Any], *, which: int | None = None) -> Region:
    """The subword tokens of a word, or of several words in a row, wherever it stands in each example's text.

    Args:
        text: one word for all examples, or a list with one per example (or several, or None for none). Upper case counts as lower.
        which: of several places where it stands the ``which``-th, from 0 or (negative) from the end; None: all.

    Raises:
        InputError: what is no text.
    """
    shared = isinstance(text, str)
    listed = [text] if isinstance(text, str) else list(text)
    found = []
    for entry in listed:
        own = (entry,) if isinstance(entry, str) else () if entry is None else tuple(entry)
        if any(not isinstance(word, str) or not word.strip() for word in own):
            raise InputError(f"words takes text, such as 'circle', or a list with one per example, not {entry!r}.")
        found.append(own)
    if not found:
        raise InputError("words is empty; give a word, or one per example.")
    return Words(words=tuple(found), shared=shared, which=which)


def at(numbers: Iterable[int | None] | Tensor) -> Region:
    """A position of its own in every example (None for none); negative ones count from the end of the row, padding included.

    A plain list of numbers names several positions of every row.
    """
    listed = numbers.tolist() if isinstance(numbers, Tensor | np.ndarray) else list(numbers)
    if not listed or any(
        n is not None and (isinstance(n, bool) or not isinstance(n, int | np.integer)) for n in listed
    ):
        raise InputError(f"at takes one whole number (or None) per example, not {numbers!r}.")
    return At(numbers=tuple(None if n is None else int(n) for n in listed))


def others(region: Region) -> Region:
    """The positions of the same kinds and images outside a region; empty where the region is."""
    return Others(region=_region(region, "others"))


def random_like(region: Region, seed: int = 0) -> Region:
    """As many random positions as a region has, of the same kinds and images and outside it: a control of equal size.

    The draw goes by the seed and the number of the example in the data set. Empty in examples where less than that lies outside.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed={seed!r} is not understood: a whole number from 0 on.")
    return RandomLike(region=_region(region, "random_like"), seed=int(seed))


def high_norm(
    site: str,
    source: Any,
    *,
    tokens: Any = None,
    kinds: str | Sequence[str] | None = "patch",
    threshold: float | None = None,
    times: float = 3.0,
    count: int | None = None,
) -> HighNorm:
    """The positions whose activation has a high norm, as registers and attention sinks have, found in one run.

    The region says the ``threshold`` that it used and the ``counts`` per example.

    Args:
        site: where norms are taken, such as "vision.blocks.10.hook_resid_post".
        source: a cache that holds the site, or the norms ``[row pos]``.
        tokens: ``model.tokens(inputs)``; None: those of the cache's own inputs. Norms need it where rows are not examples, or for ``kinds``.
        kinds: among which kinds of positions; None: all but padding.
        threshold: the norm above which a position stands out; None: ``times`` the median over all positions of those kinds.
        times: see ``threshold``; 3 lies between the two humps of DINOv2's norms.
        count: take this many of each row instead, the highest.

    Raises:
        InputError: a cache without the site or its inputs, norms of another shape, a site without positions.
    """
    from circuitvision.model.axes import map_of
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.sites import SiteName

    tower = SiteName.parse(site).tower
    held: list[int] | None = None
    if isinstance(source, ActivationCache):
        value = source[site]
        if not isinstance(value, Tensor) or value.ndim != 3:
            raise InputError(
                f"{site} is not one vector per row and position of a single run; choose a site of the stream."
            )
        norms = value.detach().float().norm(dim=-1).cpu()
        if source.model is None or not source.inputs:
            raise InputError("This cache does not know its model and inputs; set cache.model and cache.inputs.")
        maps = source.model.tokens(source.inputs) if tokens is None else tokens
        held = source.model.positions(site, source.inputs)
        tower = map_of(source.model, SiteName.parse(site))
    else:
        norms, maps = torch.as_tensor(source).detach().cpu(), tokens
    if norms.ndim != 2 or not norms.is_floating_point():
        raise InputError(f"Norms are [row pos], not {norms.dtype} {list(norms.shape)}.")
    own = maps.get(tower) if isinstance(maps, Mapping) else maps
    if own is None and kinds is not None:
        raise InputError(
            "Norms alone do not say which positions are patches: give tokens=model.tokens(inputs), or kinds=None."
        )
    if own is not None and norms.shape != own.kind.shape:
        if held is None or norms.shape != (own.n_rows, len(held)):
            raise InputError(f"Norms {list(norms.shape)} are not those of the {tower} tower, {list(own.kind.shape)}.")
        whole = norms.new_full(own.kind.shape, float("nan"))
        whole[:, held] = norms
        norms = whole
    counted = torch.isfinite(norms)
    if own is not None:
        counted &= torch.from_numpy(own.present if kinds is None else own.mask(kinds).numpy())
    if not bool(counted.any()):
        raise InputError(f"No position of the {tower} tower is of kind {kinds!r}.")
    found, limit = high_norm_mask(norms, counted, threshold, times, count)
    example = range(len(norms)) if own is None else own.example.tolist()
    return HighNorm(
        tower=tower, mask=TensorRef(found), example=tuple(example), how=f"high norm at {site}", threshold=limit
    )


def _region(region: Any, function: str) -> Region:
    if not isinstance(region, Region):
        raise InputError(f"{function} takes a region of cv.regions, not {region!r}.")
    return region


def _share(threshold: float) -> float:
    if isinstance(threshold, bool) or not 0 <= threshold < 1:
        raise InputError(
            f"threshold={threshold!r} is a share, from 0 to below 1: a position belongs if more than it lies inside."
        )
    return float(threshold)


def _sizes(size: Any) -> tuple[tuple[int, int], ...] | None:
    if size is None:
        return None
    try:
        listed = [size] if len(size) == 2 and not hasattr(size[0], "__len__") else list(size)
        found = tuple((int(height), int(width)) for height, width in listed)
    except TypeError as error:
        raise InputError(f"size is (height, width) in pixels, or one per example, not {size!r}.") from error
    if not found or min(map(min, found)) < 1:
        raise InputError(f"size is (height, width) in pixels, or one per example, not {size!r}.")
    return found


def _check_extent(boxes: Tensor, sizes: tuple[tuple[int, int], ...] | None) -> None:
    """Refuse boxes given as shares of the picture, and warn of those that reach more than a pixel outside pictures of known size."""
    held = boxes[boxes.isfinite().all(-1)]
    if len(held) and bool((held >= 0).all() and (held <= 1).all()) and bool((held % 1 != 0).any()):
        raise InputError(
            "All boxes lie between 0 and 1: those are shares of the picture; multiply them by its width (left, right) and height (top, bottom)."
        )
    if sizes is None or (len(sizes) not in (1, len(boxes)) and len(boxes) != 1):
        return
    height, width = torch.tensor(sizes, dtype=torch.float64).T[..., None]
    left, top, right, bottom = boxes.unbind(-1)
    over = torch.stack(torch.broadcast_tensors(-left, -top, right - width, bottom - height)).amax(0)
    outside = (over > 1) & boxes.isfinite().all(-1)
    if bool(outside.any()):
        pictures = f"{sizes[0][0]} × {sizes[0][1]}" if len(set(sizes)) == 1 else "that size"
        warn(
            f"{int(outside.sum())} of {len(held)} boxes reach outside pictures of {pictures}, by up to {float(over[outside].max()):.0f} pixels: "
            "boxes are (left, top, right, bottom) in pixels of the original picture, and size is (height, width)."
        )


def _boxes(boxes: Any) -> tuple[Tensor, bool]:
    """``[example box 4]``, infinite where there are fewer, and whether one serves all."""
    given = boxes.tolist() if isinstance(boxes, Tensor | np.ndarray) else list(boxes)
    shared = len(given) == 4 and all(isinstance(edge, int | float | np.number) for edge in given)
    listed = [given] if shared else given
    per_example = []
    for entry in listed:
        entry = [] if entry is None else list(entry)
        several = entry and all(hasattr(one, "__len__") for one in entry)
        own = [list(one) for one in entry] if several else [entry] if entry else []
        for one in own:
            left, top, right, bottom = _edges(one)
            if np.isfinite([left, top, right, bottom]).all() and not (left < right and top < bottom):
                raise InputError(
                    f"A box is (left, top, right, bottom) with left < right and top < bottom, not {tuple(one)}."
                )
        per_example.append(own)
    if not per_example:
        raise InputError("boxes holds no box; give one per example.")
    found = torch.full((len(per_example), max(1, *map(len, per_example)), 4), float("inf"), dtype=torch.float64)
    for number, own in enumerate(per_example):
        for which, one in enumerate(own):
            found[number, which] = torch.tensor([float(edge) for edge in one], dtype=torch.float64)
    found[~found.isfinite().all(-1)] = float("inf")
    return found, shared


def _edges(box: Sequence[Any]) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(edge) for edge in box)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"A box is four numbers, (left, top, right, bottom), not {box!r}; boxes are [example, 4], or a list with None for none."
        ) from error
    return left, top, right, bottom
