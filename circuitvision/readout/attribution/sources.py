"""What results over the source positions of heads share: which heads take most of an example, and how much of it from image patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from circuitvision.readout.patch_coords import named_positions
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd


class OverSources(Result):
    """Values ``[layer head position example]`` with ``places`` ``[example position 4]`` and ``words``; the fields are those of the result."""

    places: Tensor
    words: list[list[str]]

    def _long_frame(self) -> pd.DataFrame:
        """One row per value, with the ``token`` at each position."""
        return named_positions(self, super()._long_frame(), self.words)

    def strongest(self, count: int = 4, entry: int = 0) -> list[tuple[int, int]]:
        """The (layer, head) whose values over all positions are largest in size together, at a place of the axis ``example``."""
        size = self.values[..., entry].double().abs().sum(-1)
        order = size.flatten().nan_to_num(-1.0).argsort(descending=True)[:count].tolist()
        return [(self.axes["layer"][at // size.shape[1]], self.axes["head"][at % size.shape[1]]) for at in order]

    def taken(self, layer: Any, head: Any, entry: int = 0) -> Float[Tensor, " position"]:
        """What one head takes from every position."""
        return self.values[self.index_of("layer", layer), self.index_of("head", head), :, entry].double()

    def sums(self, layer: Any, head: Any, entry: int = 0) -> tuple[float, float]:
        """What one head takes from all positions, and from those among them that are image patches."""
        taken = self.taken(layer, head, entry)
        return float(taken.sum()), float(taken[self.places[entry, :, 2] >= 0].sum())
