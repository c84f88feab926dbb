"""From positions of a tower that are patches to the pixels under them, whichever tower and tile they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.tokens import TokenMap
from circuitvision.readout.relevance.variables import Place, image_tower, rows_of_pixels


class Boxes:
    """From positions of a tower that are patches to the pixels of their boxes, in the shape of the pictures."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], place: Place, pixels: Tensor) -> None:
        self.pixels = pixels
        pictures: TokenMap = model.tokens(inputs)[image_tower(model)]
        self.rows = rows_of_pixels(model, inputs)
        patches = pictures.kind == "patch"
        rows = {
            (int(pictures.example[row]), int(pictures.image_number[row, first]), int(pictures.tile[row, first])): row
            for row, first in enumerate(patches.argmax(1).tolist())
        }
        self.grids = [
            (int(pictures.patch_row[row].max()) + 1, int(pictures.patch_col[row].max()) + 1)
            for row in range(pictures.n_rows)
        ]
        tokens, first = place.tokens, place.dropped
        self.cells: dict[tuple[int, int], tuple[int, int, int]] = {}
        for row, position in zip(*(place.kind == "patch").nonzero(), strict=True):
            at = (row, position + first)
            picture = rows[int(tokens.example[row]), int(tokens.image_number[at]), int(tokens.tile[at])]
            self.cells[int(row), int(position)] = (picture, int(tokens.patch_row[at]), int(tokens.patch_col[at]))

    def of(self, mask: Bool[Tensor, "row pos"]) -> Bool[Tensor, "*picture one height width"]:
        """The pixels of the selected positions, with a channel axis of one."""
        height, width = self.pixels.shape[-2:]
        inside = torch.zeros(self.pixels.shape[:-3].numel(), height, width, dtype=torch.bool)
        for row, position in mask.nonzero().tolist():
            if (row, position) not in self.cells:
                raise InputError("level='pixel' removes image patches; words have no pixels (kinds='patch').")
            picture, down, across = self.cells[row, position]
            rows, columns = self.grids[picture]
            high, wide_ = height // rows, width // columns
            inside[self.rows[picture], down * high : (down + 1) * high, across * wide_ : (across + 1) * wide_] = True
        return inside.view(*self.pixels.shape[:-3], 1, height, width).to(self.pixels.device)
