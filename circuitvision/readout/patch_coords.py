"""Where the positions of a result lie in the image: the link between a value per position and a map over patches.

Results over positions keep a small tensor ``places`` beside their values, so that they can be drawn and saved without the
model: image, tile, patch row and patch column of every position, -1 where a position is no patch. Of a position that mixes patches (interpolated
tiles) only the image is known, and the tile where it is one: it lies on no grid. Beside it stand ``shares``: where the position's pixels lie, as
shares of the picture the model read, because a patch grid need not cover all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.tokens import TokenMap
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd


def places_of(tokens: TokenMap, dropped: int = 0) -> Int[Tensor, "row pos 4"]:
    """Image, tile, patch row and patch column of every position of a tower, but for the first ``dropped``."""
    columns = np.stack([tokens.image_number, tokens.tile, tokens.patch_row, tokens.patch_col], axis=-1)[:, dropped:]
    columns = columns.copy()
    columns[tokens.kind[:, dropped:] != "patch"] = -1
    return torch.from_numpy(columns.astype(np.int64))


def shares_of(tokens: TokenMap, dropped: int = 0) -> Float[Tensor, "row pos 4"]:
    """(left, top, right, bottom) of every position but the first ``dropped``, as shares of the image or tile that the model read."""
    return torch.from_numpy(tokens.shares[:, dropped:].copy())


class PictureOf(NamedTuple):
    """One picture of a result: where its example stands on the axis ``example``, and which of its images and tiles it is."""

    entry: int
    image: int
    tile: int

    def here(self, result: Any) -> Bool[Tensor, " pos"]:
        """Which positions are patches of the picture."""
        return (result.places[self.entry] >= 0).all(-1) & (
            result.places[self.entry, :, :2] == torch.tensor([self.image, self.tile])
        ).all(-1)


def picture_of(result: Any, example: Any = None, image: int | None = None, tile: int | None = None) -> PictureOf:
    """Which picture of a result with ``places`` is meant; None: the first example, its first image, its first tile (the whole image, where a model
    also reads it in parts). An example whose images or tiles are entries of their own is looked through for the one that is asked for.

    Raises:
        InputError: no such example, or no position of it is a patch of that image and tile.
    """
    for name, number in (("image", image), ("tile", tile)):
        if number is not None and not hasattr(number, "__index__"):
            raise InputError(
                f"{name}= is the number of one of the example's {name}s, from 0, not a {type(number).__name__}; a picture to lay under is picture=."
            )
    entries = result.entries(example)
    for entry in entries if result.places.ndim == 3 else ():
        own = result.places[entry]
        found = sorted({(which, part) for which, part, down, _ in own.tolist() if down >= 0})
        fits = [(i, t) for i, t in found if image in (None, i) and tile in (None, t)]
        if fits:
            return PictureOf(entry, *fits[0])
    which = ", ".join(f"{name} {number}" for name, number in (("image", image), ("tile", tile)) if number is not None)
    raise InputError(
        f"No position of example {result.axes['example'][entries[0]]} is a patch{f' of {which}' if which else ''} by itself; positions that mix "
        "patches lie on no grid."
    )


def entry_of(result: Any, example: Any = None, image: int | None = None, tile: int | None = None) -> int:
    """Where an example stands on its axis: the first place, or the one that holds an image or tile; InputError as of :func:`picture_of`."""
    if image is None and tile is None:
        return result.entries(example)[0]
    return picture_of(result, example, image, tile).entry


def extent_of(result: Any, picture: PictureOf) -> tuple[float, float]:
    """How much of the height and of the width of a picture its patch grid covers; (1, 1) where a result does not know."""
    if result.shares.ndim != 3:
        return 1.0, 1.0
    across, down = result.shares[picture.entry, picture.here(result), 2:].amax(0).tolist()
    return down, across


def grid_of(result: Any, values: Float[Tensor, "*batch pos"], picture: PictureOf) -> Float[Tensor, "*batch row col"]:
    """Values of one entry's positions on the patch grid of one of its pictures; see :func:`on_grid`."""
    return on_grid(values, result.places[picture.entry], picture.image, picture.tile)


def on_grid(
    values: Float[Tensor, "*batch pos"], places: Int[Tensor, "pos 4"], image: int = 0, tile: int | None = None
) -> Float[Tensor, "*batch grid_row grid_col"]:
    """Values of one row's positions laid out on the patch grid of one of its images, NaN where a patch has no position.

    ``tile=None`` takes the first tile there is (the whole image, where a model also reads it in parts).

    Raises:
        InputError: no position is a patch of that image and tile.
    """
    here = (places[:, 0] == image) & (places[:, 2] >= 0)
    if bool(here.any()) and tile is None:
        tile = int(places[here, 1].min())
    here &= places[:, 1] == (-1 if tile is None else tile)
    if not bool(here.any()):
        raise InputError(
            f"No position of this row is a patch of image {image}, tile {tile}, by itself; positions that mix patches lie on no grid."
        )
    rows, columns = (places[here, 2:].max(0).values + 1).tolist()
    shown = values.detach().cpu()
    shown = shown if shown.is_floating_point() and shown.dtype == torch.float64 else shown.float()
    grid = torch.full((*shown.shape[:-1], rows, columns), float("nan"), dtype=shown.dtype)
    grid[..., places[here, 2], places[here, 3]] = shown[..., here]
    return grid


def named_positions(result: Result, frame: pd.DataFrame, words: Sequence[Sequence[str]]) -> pd.DataFrame:
    """The frame of a result with a column ``token`` behind ``position``: the piece of text, or the patch as "r0c2"; unchanged without names."""
    if "position" not in result.axes or {len(line) for line in words} != {len(result.axes["position"])}:
        return frame
    places = dict(zip(result.axes, np.indices(result.values.shape).reshape(result.values.ndim, -1), strict=True))
    tokens = [words[row][at] for row, at in zip(places["example"], places["position"], strict=True)]
    frame.insert(list(frame.columns).index("position") + 1, "token", tokens)
    return frame
