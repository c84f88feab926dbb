"""What every relevance is: a value per position of a tower, or per pixel, with the places in the image beside it.

Positive values support the metric, negative ones work against it. Positions that were not measured are NaN. A result can be drawn, ranked and
laid over masks without the model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.model.edits.base import EditGroup
from circuitvision.provenance import with_provenance
from circuitvision.readout.patch_coords import entry_of, extent_of, grid_of, named_positions, picture_of
from circuitvision.readout.relevance.variables import PIXELS
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd


def warn_undefined(values: Tensor) -> None:
    """One warning where a relevance that was measured holds no number."""
    count = int(torch.isnan(values).sum())
    if count:
        warn(
            f"{count} of {values.numel()} values are NaN: the metric or its gradient is no number. Look at the output of model(inputs): prompts "
            "padded on the left give NaN in some models in float64."
        )


@dataclass(frozen=True, eq=False)
class Relevance(Result):
    """Relevance of every position of a tower, ``[position example]``, or of every pixel, ``[down across example]``.

    At sites with heads there is one more axis, ``head``, before the examples. Entries of ``example`` are the tower's: images, tiles or cameras of a
    vision tower, examples of a language tower. ``site`` is where the values were, or ``"pixels"``. Positions that were not measured are NaN.

    ``places`` (``[example position 4]``: image, tile, patch row, patch column, -1 where a position is no patch), ``labels`` and ``kinds`` name the
    positions; for pixels, those of the image tower's patches. ``shares`` (``[example position 4]``) is where each lies in the picture.
    ``edits`` are those that an occlusion ran, one group per removal.
    ``metric_value`` is the metric per example, ``baseline_value`` that of the baseline, and ``completeness_gap`` the sum of an
    example's values minus the difference of the two; both are empty where a method has none.
    """

    method: str = ""
    tower: str = ""
    site: str = ""
    metric_value: Tensor = field(default_factory=lambda: torch.zeros(0))
    baseline_value: Tensor = field(default_factory=lambda: torch.zeros(0))
    completeness_gap: Tensor = field(default_factory=lambda: torch.zeros(0))
    places: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 4, dtype=torch.long))
    shares: Tensor = field(default_factory=lambda: torch.zeros(0))
    labels: list[list[str]] = field(default_factory=list)
    kinds: list[list[str]] = field(default_factory=list)
    edits: list[EditGroup] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {
        **dict.fromkeys(("metric_value", "baseline_value", "completeness_gap"), -1),
        **dict.fromkeys(("places", "shares", "labels", "kinds"), 0),
    }

    @property
    def of_pixels(self) -> bool:
        """Whether the values are of pixels, not of positions."""
        return self.site == PIXELS

    @property
    def per_position(self) -> Float[Tensor, "position example"]:
        """Values summed over heads, and for pixels over each patch; what was not measured stays NaN."""
        if self.of_pixels:
            return self.on_patches().values
        return self.values if self.values.ndim == 2 else self.values.sum(-2)

    def top(self, count: int = 10, example: Any = None, image: int | None = None) -> list[tuple[str, float]]:
        """The labels of an example's ``count`` largest values in size, and the values; pixels are summed over patches.

        ``None`` is the first example; of a vision tower with an entry for every image, its first or the one that holds ``image``.

        Raises:
            InputError: no such example or image.
        """
        entry = entry_of(self, example, image)
        values = self.per_position[:, entry].nan_to_num(0.0)
        order = values.abs().argsort(descending=True, stable=True)[:count].tolist()
        return [(self.labels[entry][number], float(values[number])) for number in order]

    def _long_frame(self) -> pd.DataFrame:
        """One row per value, with the ``token`` at each position."""
        return named_positions(self, super()._long_frame(), self.labels)

    def highlights(self) -> dict[str, str]:
        """The strongest positions of the first example, and what the values should add up to."""
        if not self.labels or not self.values.numel():
            return {}
        first = self.axes["example"][0]
        found = {f"strongest in example {first}": ", ".join(f"{label} {value:+.3g}" for label, value in self.top(5))}
        if self.completeness_gap.numel():
            worst = self.completeness_gap.abs().max()
            found["largest completeness gap"] = f"{float(worst):.2g}"
        return found

    def on_image(
        self, example: Any = None, image: int | None = None, tile: int | None = None
    ) -> Float[Tensor, "down across"]:
        """One example's values on the patch grid of one of its images (``None``: the first), or its pixels; NaN where nothing was measured.

        Raises:
            InputError: no such example, or no position of it is a patch of that image and tile.
        """
        picture = picture_of(self, example, image, tile)
        if self.of_pixels:
            return self.values[..., picture.entry]
        return grid_of(self, self.per_position[:, picture.entry], picture)

    def peak_in(
        self,
        box: tuple[float, float, float, float],
        example: Any = None,
        image: int | None = None,
        tile: int | None = None,
    ) -> tuple[bool, float]:
        """Whether a cell of :meth:`on_image` with the largest value touches a box (left, top, right, bottom, as shares of the image), and the
        share of cells that do: chance. Of several cells with that value (a region removed whole) one is enough.
        """
        grid, (down, across) = self.on_image(example, image, tile), self.extent(example, image, tile)
        sizes = (grid.shape[1] / across, grid.shape[0] / down) * 2
        left, top, right, bottom = (edge * size for edge, size in zip(box, sizes, strict=True))
        rows, columns = torch.arange(grid.shape[0])[:, None], torch.arange(grid.shape[1])
        touched = (left < columns + 1) & (columns < right) & (top < rows + 1) & (rows < bottom)
        peaks = grid == grid.nan_to_num(-math.inf).max()
        return bool((peaks & touched).any()), float(touched.double().mean())

    def per_pixel(
        self,
        example: Any = None,
        size: tuple[int, int] = (224, 224),
        image: int | None = None,
        tile: int | None = None,
        smooth: bool = False,
    ) -> Float[Tensor, "height width"]:
        """The map of :meth:`on_image` scaled to ``size`` (height, width): every pixel has its patch's value, or with ``smooth`` one interpolated
        between patches. For showing and for masks; the values no longer add up to the metric.
        """
        grid, extent = self.on_image(example, image, tile), self.extent(example, image, tile)
        # Pixels past the last patch belong to none.
        covered = [round(edge * share) for edge, share in zip(size, extent, strict=True)]
        how = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
        found = torch.full(size, float("nan"), dtype=grid.dtype)
        found[: covered[0], : covered[1]] = torch.nn.functional.interpolate(grid[None, None], covered, **how)[0, 0]
        return found

    def extent(self, example: Any = None, image: int | None = None, tile: int | None = None) -> tuple[float, float]:
        """How much of the height and of the width of an example's image its map covers; all of it, where the values are of pixels."""
        return (1.0, 1.0) if self.of_pixels else extent_of(self, picture_of(self, example, image, tile))

    @with_provenance
    def on_patches(self) -> Relevance:
        """Pixels summed over each patch, exactly those that it reads; a relevance of positions is returned as it is.

        What the values add up to is kept, but for pixels that no patch reads.

        Raises:
            InputError: a result that does not know where its patches lie.
        """
        if not self.of_pixels:
            return self
        if self.shares.shape != self.places.shape:
            raise InputError("This relevance of pixels does not know where patches lie (shares); compute it again.")
        height, width = self.values.shape[:2]
        pixels = self.values.movedim(-1, 0).double()
        sums = torch.nn.functional.pad(pixels.cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        values = torch.full(self.places.shape[:2], float("nan"), dtype=self.values.dtype)
        here = self.places[..., 2] >= 0
        edges = (self.shares[here] * torch.tensor([width, height, width, height])).round().long()
        left, top, right, bottom = edges.unbind(-1)
        row = here.nonzero()[:, 0]
        found = sums[row, bottom, right] - sums[row, top, right] - sums[row, bottom, left] + sums[row, top, left]
        values[here] = found.to(values.dtype)
        axes = {"position": list(range(values.shape[1])), "example": self.axes["example"]}
        return dataclasses.replace(self, values=values.T, axes=axes, site=f"{PIXELS} of patches")
