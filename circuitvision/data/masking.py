"""Pictures of a data set with a part of each replaced: foreground or background masking, blank pictures.

With a picture ``I``, a mask ``M`` in [0, 1] and a baseline ``B`` (:func:`blank_images` alone), a picture that keeps its foreground is
``M I + (1 − M) B`` and one that keeps its background ``(1 − M) I + M B``; both are rounded to 8 bits so that their sum less ``I`` is ``B`` in every
pixel, whatever the mask. Every function returns :class:`~circuitvision.data.Pairs`: the side as given is clean, the edited one corrupt; answers,
boxes
and masks stay. Pixels that a mask does not touch keep their levels, and a picture in which nothing changes is refused.

Sources: keep-image and mean colour, CIGMA (Maliha et al., CVPR 2026); noise in place of an object, Neo et al. 2025 (arXiv 2410.07149); a blank
picture of
the same size in place of none, He et al. 2025 (arXiv 2412.13949), because leaving the picture out moves every text token
(:func:`~circuitvision.data.without_images`).

Not covered: inpainting and other generated pictures (give them as ``fill``), finding a mask by optimisation, alpha channels that hide something.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from circuitvision.data.pairs import Pairs
from circuitvision.data.pictures import prepared
from circuitvision.data.sides import Example, Side, opened
from circuitvision.digests import of_array
from circuitvision.errors import InputError, checked_seed

FILLS = ("mean", "dataset", "blur", "noise")
"""Words for what stands where a picture is removed."""
KEEP = ("foreground", "background")
Levels = UInt8[np.ndarray, "height width channel"]
Shares = Float[np.ndarray, "height width"]


def mask_images(
    side: Side,
    masks: Any = None,
    *,
    keep: str = "foreground",
    fill: Any = "mean",
    image: int = 0,
    seed: int = 0,
    radius: float | None = None,
) -> Pairs:
    """Pictures of which the foreground or the background alone is left; see the module for the equation.

    Args:
        side: the data set.
        masks: what the foreground is. None: the side's masks, or else its boxes; a word: those of this name; a region made by
            :func:`circuitvision.regions.box` or ``mask``; or a mask per example ``[height width]``, truth values or shares 0 … 1 (a mask of another
            size is scaled to its picture, shares bilinearly).
        keep: "foreground" or "background".
        fill: what stands in place of the rest. "mean": the mean colour of the picture; "dataset": that of all pictures of the side; "blur": the
        picture
            blurred by ``radius``; "noise": normal noise of the picture's own mean and standard deviation of each channel; a grey level or a colour
            (0 … 255); another picture, one per example, or a :class:`~circuitvision.data.Side`, scaled to the size of the picture.
        image: which picture of each example.
        seed: of "noise", which depends on it and on what the picture is, so not on its place in the data set.
        radius: standard deviation of the blur in pixels; None: an eighth of the shorter edge.

    Returns:
        Pairs: as given, and masked.

    Raises:
        InputError: an example without a picture or mask, a mask that is empty or no share, a word that is not known, or a picture in which nothing
            changes; the message names the example.
    """
    if keep not in KEEP:
        raise InputError(f"keep={keep!r} is not understood: {' or '.join(map(repr, KEEP))}.")
    pictures = pictures_of(side, image)
    shares = shares_of(side, masks, pictures, image)
    baselines = baselines_of(side, fill, pictures, image, seed, radius)
    made = []
    for picture, share, baseline in zip(pictures, shares, baselines, strict=True):
        levels = levels_of(picture)
        # The background is what the foreground leaves of picture and baseline, so that no rounding is lost between them.
        front = np.floor(baseline + share[..., None] * (levels.astype(float) - baseline) + 0.5)
        kept = front if keep == "foreground" else levels.astype(float) + baseline - front
        made.append(kept.astype(np.uint8))
    return edited(side, made, pictures, image, name=f"{keep} alone")


def blank_images(
    side: Side, fill: Any = "mean", *, image: int | None = None, seed: int = 0, radius: float | None = None
) -> Pairs:
    """The same examples with nothing to see: pictures of the same size that are ``fill`` everywhere, so that no token moves.

    Args:
        side: the data set.
        fill: as of :func:`mask_images`: "mean", "dataset", "noise", "blur", a colour, or other pictures.
        image: which picture of each example; None: every one.
        seed, radius: as of :func:`mask_images`.

    Returns:
        Pairs: as given, and blank.

    Raises:
        InputError: as :func:`mask_images`.
    """
    corrupt = side
    for number in [image] if image is not None else range(_pictures_each(side)):
        pictures = pictures_of(side, number)
        made = [each.astype(np.uint8) for each in baselines_of(side, fill, pictures, number, seed, radius)]
        corrupt = edited(corrupt, made, pictures, number, name="blank").corrupt
    return Pairs.from_sides(side, corrupt)


# -- pictures as levels --------------------------------------------------------------------------------------------------------------------


def _pictures_each(side: Side) -> int:
    """How many pictures every example has. Raises InputError where examples have other numbers of them."""
    counts = [
        len(one.image) if isinstance(one.image, (list, tuple)) else int(one.image is not None) for one in side.examples
    ]
    other = next((row for row, count in enumerate(counts) if count != counts[0]), None)
    if other is not None:
        raise InputError(
            f"Example {side.numbers[other]} has {counts[other]} pictures and example {side.numbers[0]} {counts[0]}: say which is meant, image=0."
        )
    return max(1, counts[0]) if counts else 1


def pictures_of(side: Side, image: int = 0) -> list[Image.Image]:
    """One picture of every example in memory: mode "L" where it is grey, "RGB" else.

    Raises:
        InputError: an example without such a picture, naming it; a side that holds no example.
    """
    if not len(side):
        raise InputError("The data set holds no example.")
    found = []
    for number, one in zip(side.numbers, side.examples, strict=True):
        listed = list(one.image) if isinstance(one.image, (list, tuple)) else [one.image]
        if one.tensors is not None:
            raise InputError(f"Example {number} is tensors made by hand; give its picture, Side(images, texts).")
        if one.image is None or not -len(listed) <= image < len(listed):
            count = 0 if one.image is None else len(listed)
            raise InputError(f"Example {number} has no picture {image}: it has {count}.")
        found.append(opened(listed[image]))
    return _prepared(found, side.numbers)


def _prepared(given: Sequence[Any], numbers: Sequence[int]) -> list[Image.Image]:
    """Pictures as PIL images; an error names the first example that is refused."""
    try:
        made = prepared(list(given), 3)
    except InputError:
        for number, one in zip(numbers, given, strict=True):
            try:
                prepared(one, 3)
            except InputError as error:
                raise InputError(f"Example {number}: {error}") from error
        raise
    return [one.convert("L") if _is_grey(was) else one for was, one in zip(given, made, strict=True)]


def _is_grey(picture: Any) -> bool:
    if isinstance(picture, Image.Image):
        return picture.mode in ("L", "1", "LA")
    shape: tuple[int, ...] = tuple(getattr(picture, "shape", ()))
    return len(shape) == 2 or (len(shape) == 3 and 1 in (shape[0], shape[-1]))


def levels_of(picture: Image.Image) -> Levels:
    """The levels 0 … 255 of a picture of mode "L" or "RGB"."""
    found = np.asarray(picture)
    return found[..., None] if found.ndim == 2 else found


def edited(side: Side, made: Sequence[Levels], before: Sequence[Image.Image], image: int, *, name: str) -> Pairs:
    """A side beside itself with other pictures.

    Raises:
        InputError: a picture that is what it was, naming the example.
    """
    examples = []
    for number, one, levels, was in zip(side.numbers, side.examples, made, before, strict=True):
        if np.array_equal(levels, levels_of(was)):
            raise InputError(
                f"Nothing changes in the picture of example {number} ({name}): what is filled in is what was there. Give another fill or mask."
            )
        picture = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
        examples.append(_with_picture(one, picture, image))
    return Pairs.from_sides(side, side._with(examples=tuple(examples)))


def _with_picture(example: Example, picture: Image.Image, image: int) -> Example:
    if not isinstance(example.image, (list, tuple)):
        return dataclasses.replace(example, image=picture)
    listed = list(example.image)
    listed[image] = picture
    return dataclasses.replace(example, image=listed)


# -- what stands in place of a picture -----------------------------------------------------------------------------------------------------


def baselines_of(
    side: Side, fill: Any, pictures: Sequence[Image.Image], image: int, seed: int, radius: float | None
) -> list[Float[np.ndarray, "height width channel"]]:
    """What stands where a picture is removed, for every example: whole numbers 0 … 255 in the shape of its levels."""
    levels = [levels_of(one) for one in pictures]
    if isinstance(fill, str):
        if fill not in FILLS:
            raise InputError(f"fill={fill!r} is not understood: {', '.join(map(repr, FILLS))}, a colour, or pictures.")
        if fill == "blur":
            if radius is not None and not radius > 0:
                raise InputError(f"radius={radius!r} is not understood: a number of pixels above 0.")
            filters = [ImageFilter.GaussianBlur(radius or min(one.size) / 8) for one in pictures]
            blurred = [one.filter(each) for one, each in zip(pictures, filters, strict=True)]
            return [levels_of(one).astype(float) for one in blurred]
        if fill == "noise":
            return [_noise(one, seed) for one in levels]
        means = [one.mean((0, 1)) for one in levels]
        if fill == "dataset":
            whole = np.mean([np.broadcast_to(mean, 3) for mean in means], 0)
            means = [whole if len(mean) == 3 else whole.mean(keepdims=True) for mean in means]
        return [np.broadcast_to(np.round(mean), one.shape).copy() for mean, one in zip(means, levels, strict=True)]
    if _is_color(fill):
        return [np.broadcast_to(_color(fill, one.shape[-1]), one.shape).astype(float) for one in levels]
    return [
        _fitted(other, one, number)
        for other, one, number in zip(_others(side, fill, image), pictures, side.numbers, strict=True)
    ]


def _noise(levels: Levels, seed: int) -> np.ndarray:
    drawn = generator_of(seed, of_array(levels)).standard_normal(levels.shape)
    return np.round(levels.mean((0, 1)) + levels.std((0, 1)) * drawn).clip(0, 255)


def generator_of(seed: int, digest: str) -> np.random.Generator:
    """Draws for one example, by the seed and by what it is. Raises InputError for what is no seed."""
    if not hasattr(checked_seed(seed), "__index__"):
        raise InputError(f"seed={seed!r} is no seed: give a whole number, 0 or more.")
    return np.random.default_rng([int(seed), int(digest[:15], 16)])


def _is_color(fill: Any) -> bool:
    given = list(fill) if isinstance(fill, (list, tuple)) else [fill]
    return bool(given) and all(isinstance(one, (int, float, np.number)) and not isinstance(one, bool) for one in given)


def _color(fill: Any, channels: int) -> np.ndarray:
    given = np.round(np.asarray(fill, float).reshape(-1))
    if len(given) not in (1, 3) or given.min() < 0 or given.max() > 255:
        raise InputError(f"fill={fill!r} is no colour: one level, or red, green and blue, each 0 … 255.")
    if channels == 1 and len(given) == 3 and len(set(given.tolist())) > 1:
        raise InputError(f"fill={fill!r} is a colour, and some of these pictures are grey: give one level.")
    return given[:1] if channels == 1 else given


def _others(side: Side, fill: Any, image: int) -> list[Image.Image]:
    """Pictures to fill with, one per example."""
    if isinstance(fill, Pairs):
        fill = fill.clean
    single = isinstance(fill, Image.Image) or (isinstance(fill, (np.ndarray, Tensor)) and fill.ndim < 4)
    count = 1 if single else len(fill) if hasattr(fill, "__len__") else -1
    if count == -1:
        raise InputError(f"fill is a {type(fill).__name__}; give {', '.join(map(repr, FILLS))}, a colour, or pictures.")
    if not single and count != len(side):
        raise InputError(f"fill holds {count} pictures for {len(side)} examples; give one for all, or one per example.")
    if isinstance(fill, Side):
        return pictures_of(fill, image)
    listed = [opened(fill)] * len(side) if single else [opened(fill[row]) for row in range(count)]
    return _prepared(listed, side.numbers)


def _fitted(other: Image.Image, picture: Image.Image, number: int) -> np.ndarray:
    """Another picture in the size and channels of this one."""
    if picture.mode == "L" and other.mode != "L":
        raise InputError(
            f"The picture of example {number} is grey and what is filled in has colours; convert it: image.convert('L')."
        )
    if other.size != picture.size:
        other = other.resize(picture.size, Image.Resampling.BICUBIC)
    return levels_of(other.convert(picture.mode)).astype(float)


# -- masks ---------------------------------------------------------------------------------------------------------------------------------


def shares_of(side: Side, masks: Any, pictures: Sequence[Image.Image], image: int) -> list[Shares]:
    """How much of every pixel is foreground, 0 … 1, for every example.

    Raises:
        InputError: no mask, an empty one, or one that is no share; the message names the example.
    """
    sizes = [(one.height, one.width) for one in pictures]
    given = _chosen(side, masks, sizes, image) if masks is None or isinstance(masks, str) else masks
    if hasattr(given, "drawn"):
        known = dataclasses.replace(given, size=tuple(sizes))
        given = [known.drawn(row) for row in range(len(side))]
    elif hasattr(given, "where"):
        raise InputError(f"{given!r} is no box and no mask; give one of those, or masks [height width].")
    if isinstance(given, (np.ndarray, Tensor)) and given.ndim == 2:
        given = [given] * len(side)
    if not hasattr(given, "__len__") or len(given) != len(side):
        count = len(given) if hasattr(given, "__len__") else 1
        raise InputError(f"There are {count} masks for {len(side)} examples; give one per example.")
    return [_share(mask, size, number) for mask, size, number in zip(given, sizes, side.numbers, strict=True)]


def _chosen(side: Side, name: str | None, sizes: list[tuple[int, int]], image: int) -> Any:
    """The side's own masks, or boxes as a region."""
    held = [one for one in side.masks or () if one is not None and not isinstance(one, Mapping)]
    soft = [one for one in held if np.asarray(one.cpu() if isinstance(one, Tensor) else one).dtype.kind == "f"]
    if soft and name in (None, "mask"):
        # A region holds truth values; shares are used as they are.
        return list(side.masks or ())
    found = side.regions(size=sizes, image=image)
    if name is None and len(found) > 1:
        of_masks = [key for key in found if found[key].kind == "mask"]
        name = of_masks[0] if len(of_masks) == 1 else None
        if name is None:
            raise InputError(
                f"This data set holds several boxes and masks: say which is meant, masks={next(iter(found))!r}."
            )
    if name is not None and name not in found:
        raise InputError(f"No box or mask is called {name!r}; there are {', '.join(map(repr, found))}.")
    return found[name] if name is not None else next(iter(found.values()))


def _share(mask: Any, size: tuple[int, int], number: int) -> Shares:
    if mask is None:
        raise InputError(f"Example {number} has no box or mask: leave it out, or say what its foreground is.")
    found = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if found.ndim != 2 or not found.size:
        raise InputError(f"The mask of example {number} is [height width], not {list(found.shape)}.")
    hard = found.dtype.kind in "biu"
    found = found.astype(float)
    if not (found >= 0).all() or found.max() > 1:
        raise InputError(
            f"The mask of example {number} holds {found.min():g} … {found.max():g}; give truth values, or shares 0 … 1."
        )
    if not found.any():
        raise InputError(f"The mask of example {number} is empty: nothing of its picture is foreground.")
    if found.shape != size:
        kind = Image.Resampling.NEAREST if hard else Image.Resampling.BILINEAR
        found = np.asarray(Image.fromarray(found.astype(np.float32)).resize((size[1], size[0]), kind), float).clip(0, 1)
    return found
