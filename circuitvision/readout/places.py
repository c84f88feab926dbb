"""Where the positions of a result lie in the image: the link between a value per position and a map over patches.

Results over positions keep a small tensor ``places`` beside their values, so that they can be drawn and saved without the
model: image, tile, patch row and patch column of every position, -1 where a position is no patch.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.tokens import TokenMap


def places_of(tokens: TokenMap, dropped: int = 0) -> Int[Tensor, "row pos 4"]:
    """Image, tile, patch row and patch column of every position of a tower, but for the first ``dropped``."""
    columns = np.stack([tokens.image_number, tokens.tile, tokens.patch_row, tokens.patch_col], axis=-1)[:, dropped:]
    columns = columns.copy()
    columns[tokens.kind[:, dropped:] != "patch"] = -1
    return torch.from_numpy(columns.astype(np.int64))


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
        raise InputError(f"No position of this row is a patch of image {image}, tile {tile}.")
    rows, columns = (places[here, 2:].max(0).values + 1).tolist()
    shown = values.detach().cpu()
    shown = shown if shown.is_floating_point() and shown.dtype == torch.float64 else shown.float()
    grid = torch.full((*shown.shape[:-1], rows, columns), float("nan"), dtype=shown.dtype)
    grid[..., places[here, 2], places[here, 3]] = shown[..., here]
    return grid
