"""From positions of a tower that are patches to the pixels under them, whichever tower and tile they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.readout.relevance.variables import Place, rows_of_pixels


class Boxes:
    """From positions of a tower that are patches to the pixels that they read, in the shape of the pictures."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], place: Place, pixels: Tensor) -> None:
        self.pixels = pixels
        rows = rows_of_pixels(model, inputs)
        sets = place.tokens.patches
        self.cells: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
        edges = sets.pixels.round().astype(int).tolist()
        for row, position, source, box in zip(sets.row, sets.position, sets.source_row, edges, strict=True):
            self.cells.setdefault((int(row), int(position) - place.dropped), []).append((rows[source], box))

    def of(self, mask: Bool[Tensor, "row pos"]) -> Bool[Tensor, "*picture one height width"]:
        """The pixels of the selected positions, with a channel axis of one; of a position that mixes patches, those of all of them."""
        height, width = self.pixels.shape[-2:]
        inside = torch.zeros(self.pixels.shape[:-3].numel(), height, width, dtype=torch.bool)
        for row, position in mask.nonzero().tolist():
            if (row, position) not in self.cells:
                raise InputError("level='pixel' removes image patches; words have no pixels (kinds='patch').")
            for picture, (left, top, right, bottom) in self.cells[row, position]:
                inside[picture, top:bottom, left:right] = True
        return inside.view(*self.pixels.shape[:-3], 1, height, width).to(self.pixels.device)
