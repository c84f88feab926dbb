"""Pictures of any resolution: a thumbnail and tiles, which the model's own function packs into prompts.

Where prompt positions are a function of patches (tiles, unpadding, interpolation, newlines), the model's packing function is run on patch
*indicators*, and the weights are read off: the function is linear, so they are its weights, whatever it does. The weights found are compared with the
function on random features.

Not covered: tiles packed together with class positions.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size

from circuitvision.errors import InputError
from circuitvision.model.packing.run import ImageRun, ImageTokens
from circuitvision.model.packing.standard import Flat
from circuitvision.model.patches import Array, Frame

_AT_ONCE = 512
"""How many patches are told apart in one call of a packing function that mixes them freely."""


class AnyRes(Flat):
    """An image is a thumbnail and tiles of the picture, packed by the model's ``pack_image_features``."""

    beside = ("image_sizes",)
    per_example = ("batch_num_images",)
    dims = (4, 5)
    layout = "[image, tile, channel, height, width]"

    def __init__(self) -> None:
        # The model's own function packs tiles, merged or not.
        super().__init__()

    def tiles(self, run: ImageRun) -> list[int]:
        """As the model counts them; an image among several of its prompt may be left whole."""
        self._need_sizes(run)
        count = _beside_model(run, "image_size_to_num_patches")
        sizes = run.inputs["image_sizes"]
        per_example = run.inputs.get("batch_num_images")
        tiled = [True] * len(sizes)
        if per_example is not None:
            tiled = [int(number) == 1 for number in per_example for _ in range(int(number))]
        if len(tiled) != len(sizes):
            raise InputError(f"batch_num_images counts {len(tiled)} images, image_sizes {len(sizes)}.")
        config: Any = run.model.config
        return [
            count(size, grid_pinpoints=config.image_grid_pinpoints, patch_size=config.vision_config.image_size)
            if cut
            else 1
            for size, cut in zip(sizes, tiled, strict=True)
        ]

    def _need_sizes(self, run: ImageRun) -> None:
        if run.inputs.get("image_sizes") is None:
            raise InputError("Tiled images need image_sizes [image, (height, width)] beside pixel_values.")

    def image_entries(self, run: ImageRun, name: str, value: Any) -> Sequence[int]:
        """Where tiles of all images stand one after the other, every tile is an entry."""
        if name == "pixel_values" and value.ndim == 4:
            return [owner for owner, tiles in zip(run.owners, run.tiles, strict=True) for _ in range(tiles)]
        return super().image_entries(run, name, value)

    def content(self, run: ImageRun, name: str, value: Tensor, example: int) -> list[Tensor]:
        """Without the tiles that only fill up a batch."""
        if name != "pixel_values" or value.ndim != 5:
            return super().content(run, name, value, example)
        return [value[image, : run.tiles[image]] for image, owner in enumerate(run.owners) if owner == example]

    def check_layout(self, run: ImageRun) -> None:
        """Also raises for tiles that are missing, and for settings under which the model cannot lay tiles out."""
        self._need_sizes(run)
        super().check_layout(run)
        assert run.pixels is not None
        shape, tiles = run.pixels.shape, run.tiles
        fits = shape[0] == sum(tiles) if run.pixels.ndim == 4 else shape[0] == len(tiles) and shape[1] >= max(tiles)
        if not fits:
            raise InputError(
                f"image_sizes say that the images take {tiles} tiles, pixel_values has the shape {tuple(shape)}: "
                "give both as the processor made them."
            )
        given = run.inputs.get("vision_aspect_ratio")
        if given is not None and given != run.setting("vision_aspect_ratio"):
            raise InputError(
                f"This version of {type(run.model.inner).__name__} reads vision_aspect_ratio from the config alone; set "
                f"model.config.vision_aspect_ratio = {given!r} instead."
            )
        rows, columns = run.grid(0)
        kept = run.n_features(0) - run.n_dropped
        if kept != rows * columns and max(tiles) > 1:
            raise InputError(
                f"{run.tower.spec.feature_select}={run.setting(run.tower.spec.feature_select or '')!r} keeps {kept} features of a tile of "
                f"{rows * columns} patches, and tiles are laid out from patches alone; take "
                f"{'default' if kept > rows * columns else 'full'!r}."
            )

    def lengths(self, run: ImageRun) -> list[int]:
        """As the model's packing function makes them."""
        return [len(packed) for packed in self._packed(run, lambda tiles, features: torch.zeros(tiles, features, 1))]

    def _packed(
        self, run: ImageRun, features: Callable[[int, int], Tensor], newline: Tensor | None = None
    ) -> list[Tensor]:
        made = [
            features(tiles, run.n_features(first) - run.n_dropped).double()
            for tiles, first in zip(run.tiles, run.firsts, strict=True)
        ]
        if not made:
            return []
        inner: Any = run.model.inner
        pack = inner.pack_image_features
        options: dict[str, Any] = {
            "image_newline": made[0].new_zeros(made[0].shape[-1]) if newline is None else newline
        }
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
            if name in inspect.signature(pack).parameters:
                options[name] = run.setting(name)
        return list(pack(made, run.inputs["image_sizes"], **options)[0])

    def tokens(self, run: ImageRun) -> list[ImageTokens]:
        """Read off the packing function by indicators, see the module."""
        found: dict[Any, ImageTokens] = {}
        out = []
        for image, (tiles, first) in enumerate(zip(run.tiles, run.firsts, strict=True)):
            key = (tiles, *run.inputs["image_sizes"][image].tolist())
            if key not in found:
                found[key] = self._image_tokens(run, image)
            one = found[key]
            out.append(
                ImageTokens(
                    one.newline, one.position, one.source_row + first, one.source_position + run.n_dropped, one.weight
                )
            )
        return out

    def _image_tokens(self, run: ImageRun, image: int) -> ImageTokens:
        tiles, (rows, columns) = run.tiles[image], run.grid(run.firsts[image])
        one = _OneImage(run, image)
        features = run.n_features(one.firsts[0]) - run.n_dropped
        size = len(self._packed(one, lambda t, f: torch.zeros(t, f, 1))[0])

        def pack(values: Tensor, newline: Tensor | None = None) -> Tensor:
            return self._packed(one, lambda t, f: values, newline)[0]

        newline = pack(torch.zeros(tiles, features, 1), torch.ones(1, dtype=torch.float64))[:, 0] > 0.5
        found = None
        if features == rows * columns:
            found = _separable(pack, tiles, self._tile_grid(run, image) if tiles > 1 else (1, 1), (rows, columns))
        if found is None or not _agrees(pack, found, (tiles, features), size):
            found = _one_by_one(pack, tiles, features)
        position, source, weight = found
        row, feature = np.divmod(source, features)
        return ImageTokens(newline.numpy(), position, row, feature, weight)

    def _tile_grid(self, run: ImageRun, image: int) -> tuple[int, int]:
        shape = _beside_model(run, "get_anyres_image_grid_shape")
        config: Any = run.model.config
        return shape(run.inputs["image_sizes"][image], config.image_grid_pinpoints, config.vision_config.image_size)

    def frame(self, run: ImageRun, image: int, tile: int) -> Frame:
        """In the original picture, as the processor resizes and pads it: the thumbnail is stretched, tiles share a canvas on which the picture
        lies in the middle, and an image that is not cut lies in the middle of a square."""
        height, width = (float(edge) for edge in run.inputs["image_sizes"][image])
        side = np.array(self.size(run, run.firsts[image] + tile), dtype=float)
        if run.tiles[image] == 1:
            square = max(height, width)
            before = np.array([(square - height) // 2, (square - width) // 2])
            step, origin = square / side, -before
        elif tile == 0:
            step, origin = np.array([height, width]) / side, np.zeros(2)
        else:
            rows, columns = self._tile_grid(run, image)
            canvas = side * [rows, columns]
            picture = np.broadcast_to(np.zeros(()), (1, int(height), int(width)))
            fitted = np.array(get_patch_output_size(picture, tuple(canvas.astype(int).tolist()), "channels_first"))
            step = np.array([height, width]) / fitted
            corner = side * np.divmod(tile - 1, columns)
            origin = (corner - (canvas - fitted) // 2) * step
        return Frame((height, width), tuple(origin.tolist()), tuple(step.tolist()))


class _OneImage(ImageRun):
    """One image of a run, by itself."""

    def __init__(self, run: ImageRun, image: int) -> None:
        super().__init__(run.model, {**run.inputs, "image_sizes": run.inputs["image_sizes"][image : image + 1]})
        self.tiles = [run.tiles[image]]


def _beside_model(run: ImageRun, name: str) -> Callable[..., Any]:
    """A function of the module that the model's code is in."""
    return getattr(sys.modules[type(run.model.inner).__module__], name)


Weights = tuple[Array, Array, Array]
"""Entries of a linear map: output position, input number, weight."""


def _separable(
    pack: Callable[..., Tensor], tiles: int, layout: tuple[int, int], grid: tuple[int, int]
) -> Weights | None:
    """The weights of a function that treats rows and columns of the canvas of all tiles, and of the thumbnail, apart."""
    rows, columns = grid
    tile = torch.arange(1, tiles)
    across = max(layout[1], 1)
    down_of = torch.cat([torch.arange(rows)[None], ((tile - 1) // across)[:, None] * rows + torch.arange(rows) + rows])
    across_of = torch.cat(
        [torch.arange(columns)[None], ((tile - 1) % across)[:, None] * columns + torch.arange(columns) + columns]
    )
    n_down, n_across = int(down_of.max()) + 1, int(across_of.max()) + 1
    indicator = torch.zeros(tiles, rows, columns, n_down + n_across, dtype=torch.float64)
    indicator.scatter_(3, down_of[:, :, None, None].expand(tiles, rows, columns, 1), 1.0)
    indicator.scatter_(3, n_down + across_of[:, None, :, None].expand(tiles, rows, columns, 1), 1.0)
    number = torch.full((n_down, n_across), -1)
    number[down_of[:, :, None].expand(-1, -1, columns), across_of[:, None, :].expand(-1, rows, -1)] = torch.arange(
        tiles * rows * columns
    ).view(tiles, rows, columns)
    packed = pack(indicator.flatten(1, 2))
    position, down, share = _entries(packed[:, :n_down])
    position_2, column, share_2 = _entries(packed[:, n_down:])
    first, last = np.searchsorted(position_2, position, "left"), np.searchsorted(position_2, position, "right")
    repeats = last - first
    at = np.repeat(np.arange(len(position)), repeats)
    other = np.arange(len(at)) - np.repeat(np.cumsum(repeats) - repeats, repeats) + np.repeat(first, repeats)
    source = number.numpy()[down[at], column[other]]
    if (source < 0).any():
        return None
    return position[at], source, share[at] * share_2[other]


def _one_by_one(pack: Callable[..., Tensor], tiles: int, features: int) -> Weights:
    """The weights of any linear function of the features."""
    parts = []
    for first in range(0, tiles * features, _AT_ONCE):
        count = min(_AT_ONCE, tiles * features - first)
        indicator = torch.zeros(tiles * features, count, dtype=torch.float64)
        indicator[first + torch.arange(count), torch.arange(count)] = 1.0
        position, source, weight = _entries(pack(indicator.view(tiles, features, count)))
        parts.append((position, source + first, weight))
    position, source, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((source, position))
    return position[order], source[order], weight[order]


def _entries(packed: Tensor) -> Weights:
    position, source = (packed.abs() > 1e-9).nonzero(as_tuple=True)
    return position.numpy(), source.numpy(), packed[position, source].numpy()


def _agrees(pack: Callable[..., Tensor], weights: Weights, shape: tuple[int, int], size: int) -> bool:
    """Whether the weights give what the function gives for random features."""
    features = torch.randn(*shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position, source, weight = (torch.from_numpy(part) for part in weights)
    found = torch.zeros(size, 3, dtype=torch.float64)
    found.index_add_(0, position, features.flatten(0, 1)[source] * weight[:, None])
    return torch.allclose(found, pack(features), rtol=0.0, atol=1e-8)
