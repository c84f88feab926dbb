"""The packings that most families have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.packing.base import Packing
from circuitvision.model.packing.run import ImageRun, ImageTokens
from circuitvision.model.patches import Array

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped


class Inserted(Packing):
    """One picture per example, with the channels of every image tower one after the other; the model puts its patches into the prompt by itself.

    Where, its ``with_image_positions(input_ids, attention_mask, pixel_values)`` says: ids and mask with an image token for every patch, which it
    reads as well. Runs are described in that form, so that ids, masks and what the model computes have the same positions.
    """

    fills_embeddings = False
    layout = "[example, channel (those of all image towers), height, width]"

    def laid_out(self, model: Wrapped, inputs: dict[str, Any]) -> dict[str, Any]:
        """With image tokens where the model puts patches. Raises InputError for other inputs that count positions without them."""
        ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
        if not isinstance(ids, Tensor) or not isinstance(pixels, Tensor):
            return inputs
        # Ids elsewhere than the model is are refused later.
        if ids.device != model.device or bool(torch.eq(ids, model.image_token_id or 0).any()):
            return inputs
        if inputs.get("position_ids") is not None or inputs.get("past_key_values") is not None:
            name = "position_ids" if inputs.get("position_ids") is not None else "past_key_values"
            raise InputError(
                f"{name} counts the patches too: give it with prompts that name them, ids, mask = "
                "model.module.with_image_positions(input_ids, attention_mask, pixel_values)."
            )
        inner: Any = model.inner
        made, mask = inner.with_image_positions(ids, inputs.get("attention_mask"), pixels)
        return {**inputs, "input_ids": made, **({} if mask is None else {"attention_mask": mask})}

    def channels(self, towers: Sequence[Tower]) -> int:
        """Those of all image towers."""
        return sum(int(getattr(tower.config, "num_channels", 3)) for tower in towers)


class Patches(Packing):
    """Pictures of any grid, cut into flattened patches and filled up to one length (SigLIP 2)."""

    beside = ("pixel_attention_mask", "spatial_shapes")
    rows_alone = False
    dims = (3,)
    layout = "[image, patch, values]"

    def grid(self, run: ImageRun, row: int) -> tuple[int, int]:
        """What ``spatial_shapes`` says."""
        rows, columns = run.inputs["spatial_shapes"][row].tolist()
        return int(rows), int(columns)

    def size(self, run: ImageRun, row: int) -> tuple[int, int]:
        """The pixels that the grid covers."""
        (rows, columns), (height, width) = self.grid(run, row), run.embedding.kernel
        return rows * height, columns * width

    def row_length(self, run: ImageRun) -> int:
        """What the tensor says."""
        assert run.pixels is not None
        return run.tower.cfg.n_prefix + run.pixels.shape[1]

    def check_layout(self, run: ImageRun) -> None:
        """Also raises where the mask leaves other patches than the grid has."""
        super().check_layout(run)
        cells, mask = run.inputs["spatial_shapes"].prod(-1), run.inputs["pixel_attention_mask"]
        inside = torch.arange(mask.shape[-1], device=mask.device)[None] < cells[:, None].to(mask.device)
        if not torch.equal(mask.bool(), inside):
            raise InputError(
                "pixel_attention_mask and spatial_shapes disagree: the mask must be 1 for the first rows × columns patches of every image, "
                "and 0 after them."
            )


NOTHING = ImageTokens(np.zeros(0, bool), np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), np.zeros(0))
"""The prompt positions of an image that is not there."""


class Flat(Packing):
    """Every image is one row of the vision tower, whose features stand in the prompt in their order.

    With ``merge=k`` every prompt position holds ``k``×``k`` neighbouring patches, block by block of the grid: the connector's module merges them, or,
    with ``merged_before``, what it is given is merged already. The weights of a position are equal shares (a connector may do more than add).
    """

    def __init__(self, merge: int = 1, merged_before: bool = False) -> None:
        if isinstance(merge, bool) or not isinstance(merge, int) or merge < 1:
            raise InputError(
                f"merge={merge!r} is not understood: how many patches in each direction make one position."
            )
        self.merge, self.merged_before = merge, merged_before

    def __repr__(self) -> str:
        before = ", merged_before=True" if self.merged_before else ""
        return f"{type(self).__name__}({f'merge={self.merge}{before}' if self.merge > 1 else ''})"

    def merges(self, site: str) -> bool:
        """What leaves the connector, and with ``merged_before`` also what enters it."""
        return self.merge > 1 and (site == "hook_out" or self.merged_before)

    def check_layout(self, run: ImageRun) -> None:
        """Also raises for grids that do not fall into whole blocks, and where other positions than patches would be merged."""
        super().check_layout(run)
        grids = {run.grid(first) for first in run.firsts} if self.merge > 1 else set()
        for rows, columns in sorted(grids):
            if rows % self.merge or columns % self.merge:
                raise InputError(
                    f"A grid of {rows}x{columns} patches does not fall into blocks of {self.merge}x{self.merge}, which this model merges: resize "
                    "the picture."
                )
        if self.merge > 1 and run.n_dropped != run.tower.cfg.n_prefix:
            raise InputError(
                f"The connector would get {run.tower.cfg.n_prefix - run.n_dropped} positions that are no patches, and it merges patches: let the "
                "call drop them."
            )

    def lengths(self, run: ImageRun) -> list[int]:
        """One position for every block of patches."""
        return [length // self.merge**2 for length in super().lengths(run)]

    def tokens(self, run: ImageRun) -> list[ImageTokens]:
        """The patches of every block."""
        if self.merge == 1:
            return super().tokens(run)
        return [self._blocks(run, image) if run.present[image] else NOTHING for image in range(len(run.tiles))]

    def _blocks(self, run: ImageRun, image: int) -> ImageTokens:
        row, merge = run.firsts[image], self.merge
        down, across = np.divmod(self.order(run, row), run.grid(row)[1])
        block = down // merge * (run.grid(row)[1] // merge) + across // merge
        source = np.argsort(block, kind="stable")
        return ImageTokens(
            np.zeros(run.lengths[image], bool),
            block[source],
            np.full(len(source), row),
            source + run.tower.cfg.n_prefix,
            np.full(len(source), 1.0 / merge**2),
        )

    def owners(self, run: ImageRun) -> list[int]:
        """The example of every image: features fill the image tokens of all prompts, one after the other."""
        if run.placeholders is None:
            return list(range(len(run.tiles)))
        counts = run.placeholders.sum(-1).tolist()
        owners, example, left = [], 0, counts[0] if counts else 0
        for length in run.lengths:
            while left <= 0 and example + 1 < len(counts):
                example += 1
                left = counts[example]
            owners.append(example)
            left -= length
        return owners


class Packed(Flat):
    """The patches of all images in one sequence, images of any grid (Qwen2-VL, NaViT): ``pixel_values`` ``[patch of all images, values]``.

    ``grids`` is the input that says every image's grid, ``[image, (rows, columns)]`` or ``[image, (frames, rows, columns)]``. The tower computes one
    sequence without an axis of rows; hooks see a row per image, see :mod:`circuitvision.model.packing.sequences`. With ``merge=k`` the patches of a
    block come one after the other, as their processor cuts them; with ``by_blocks=False`` row by row of the grid all the same.

    Not covered: several frames, patches in an order of windows.
    """

    in_sequence, rows_alone = True, False
    dims = (2,)
    layout = "[patch of all images, values]"

    def __init__(
        self,
        grids: str = "image_grid_thw",
        merge: int = 1,
        merged_before: bool = False,
        by_blocks: bool = True,
    ) -> None:
        super().__init__(merge, merged_before)
        self.grids, self.by_blocks = grids, by_blocks
        self.of_images, self.beside = ("pixel_values", grids), (grids,)

    def tiles(self, run: ImageRun) -> list[int]:
        """One row per image."""
        return [1] * len(run.inputs[self.grids])

    def grid(self, run: ImageRun, row: int) -> tuple[int, int]:
        """What ``grids`` says."""
        rows, columns = run.inputs[self.grids][row].tolist()[-2:]
        return int(rows), int(columns)

    def size(self, run: ImageRun, row: int) -> tuple[int, int]:
        """The pixels that the grid covers."""
        (rows, columns), (height, width) = self.grid(run, row), run.embedding.kernel
        return rows * height, columns * width

    def order(self, run: ImageRun, row: int) -> Array:
        """Block by block, where patches are merged."""
        rows, columns = self.grid(run, row)
        if self.merge == 1 or not self.by_blocks:
            return super().order(run, row)
        blocks = np.arange(rows * columns).reshape(rows // self.merge, self.merge, columns // self.merge, self.merge)
        return blocks.transpose(0, 2, 1, 3).reshape(-1)

    def sequences(self, run: ImageRun) -> dict[str, list[int]]:
        """All patches of a row; one for each block behind a merge."""
        whole = [run.n_features(row) for row in range(run.n_rows)]
        merged = [count // self.merge**2 for count in whole]
        found = {name: whole for name, tower in run.model.towers.items() if tower.stack.image}
        connector = run.model.flow.connector_of(run.tower.name)
        if connector is not None:
            found |= {
                f"{connector.name}.{site}": merged if self.merges(site) else whole for site in ("hook_in", "hook_out")
            }
        return found

    def image_entries(self, run: ImageRun, name: str, value: Any) -> Sequence[int]:
        """Every patch of an image belongs to its example."""
        if name != "pixel_values":
            return run.owners
        return [owner for row, owner in enumerate(run.owners) for _ in range(run.n_features(row))]

    def check_layout(self, run: ImageRun) -> None:
        """Also raises for grids that do not account for the patches, and for videos."""
        absent = run.inputs.get(self.grids) is None
        if absent:
            raise InputError(f"This tower reads {self.grids} [image, grid] beside pixel_values; model.inputs makes it.")
        grids = run.inputs[self.grids]
        if grids.shape[-1] == 3 and bool((grids[:, 0] != 1).any()):
            raise InputError(
                f"{self.grids} names images of several frames; videos are not covered, give one frame each."
            )
        assert run.pixels is not None
        cells = int(grids.prod(-1).sum())
        if run.pixels.ndim == 2 and len(run.pixels) != cells:
            raise InputError(
                f"pixel_values holds {len(run.pixels)} patches, {self.grids} says {cells} of {len(grids)} images: give both as the processor made "
                "them."
            )
        super().check_layout(run)

    def check_pictures(self, run: ImageRun) -> None:
        """Nothing: patches are cut out already, and grids may have any size."""


class Cameras(Flat):
    """``[example, camera, …]``: every camera is a row of the vision tower; those that are masked take no prompt position."""

    fills_embeddings = False
    dims = (5,)
    layout = "[example, camera, channel, height, width]"

    def tiles(self, run: ImageRun) -> list[int]:
        """One row per camera."""
        assert run.pixels is not None
        return [1] * (run.pixels.shape[0] * run.pixels.shape[1])

    def tile_number(self, run: ImageRun, image: int, tile: int) -> int:
        """The number of the camera."""
        return run.numbers[image]

    def present(self, run: ImageRun) -> list[bool]:
        """What the mask says."""
        mask = run.inputs.get("pixel_attention_mask")
        return super().present(run) if mask is None else mask.bool().flatten().tolist()

    def owners(self, run: ImageRun) -> list[int]:
        """The first axis of the pixels."""
        assert run.pixels is not None
        return [example for example in range(run.pixels.shape[0]) for _ in range(run.pixels.shape[1])]

    def image_entries(self, run: ImageRun, name: str, value: Any) -> Sequence[int]:
        """One entry holds all cameras of an example."""
        return range(len(value))
