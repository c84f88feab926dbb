"""How a family packs images: which rows of the vision tower an image takes, which examples own it, and which patches every prompt position holds.

A family declares one :class:`Packing`; :class:`ImageRun` is that packing at work on the inputs of one run. Where prompt positions are a function of
patches (tiles, unpadding, interpolation, newlines), the model's own packing function is run on patch *indicators*, and the weights are read off:
the function is linear, so they are its weights, whatever it does. The weights found are compared with the function on random features.

Settings may be given with the call: they are read there first, then in the config (:func:`setting`).

Not covered: tiles packed together with class positions.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size

from circuitvision.errors import InputError
from circuitvision.model.patches import Array, Frame, PatchEmbedding
from circuitvision.model.settings import setting

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped

_AT_ONCE = 512
"""How many patches are told apart in one call of a packing function that mixes them freely."""


def _hands_on(model: Wrapped, name: str) -> bool:
    """Whether the model's forward gives a keyword to any function it calls: some versions take one and forget it."""
    code = inspect.unwrap(type(model.inner).forward).__code__
    return any(name in names for names in code.co_consts if isinstance(names, tuple))


def laid_out(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs whose prompts name every position that the model computes: image tokens where it puts patches into prompts by itself."""
    packing = getattr(model.family, "packing", None)
    return dict(inputs) if packing is None else packing.laid_out(model, dict(inputs))


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The prompt positions of one image, counted from 0: entry ``i`` says that ``position[i]`` holds ``weight[i]`` of position
    ``source_position[i]`` of the vision tower's row ``source_row[i]``. ``newline`` marks positions that hold the newline vector."""

    newline: Array
    position: Array
    source_row: Array
    source_position: Array
    weight: Array

    def __len__(self) -> int:
        return len(self.newline)


class ImageRun:
    """The images of one run: rows of the vision tower, the examples that own them, and the prompt positions they take.

    Raises InputError where the inputs do not say how the images are packed.
    """

    def __init__(self, model: Wrapped, inputs: Mapping[str, Any], tower: str = "") -> None:
        self.model, self.inputs = model, inputs
        self._tower = tower
        self.packing: Packing = model.family.packing
        pixels = inputs.get("pixel_values")
        reads = any(tower.stack.image for tower in model.towers.values())
        self.pixels: Tensor | None = pixels if reads and isinstance(pixels, Tensor) else None

    def setting(self, name: str) -> Any:
        """A setting of this call, where the model's forward hands it on; else that of the configuration."""
        return setting(self.model, self.inputs if _hands_on(self.model, name) else None, name)

    @property
    def tower(self) -> Tower:
        """The vision tower: of several, the one asked for, or the first."""
        if self._tower:
            return self.model.towers[self._tower]
        return next(tower for tower in self.model.towers.values() if tower.stack.image)

    @property
    def embedding(self) -> PatchEmbedding:
        """The vision tower's patch embedding."""
        embedding = self.tower.patch_embedding
        assert embedding is not None
        return embedding

    @cached_property
    def tiles(self) -> list[int]:
        """How many rows of the vision tower each image takes."""
        return [] if self.pixels is None else self.packing.tiles(self)

    @property
    def n_rows(self) -> int:
        """Rows of the vision tower."""
        return sum(self.tiles)

    @cached_property
    def firsts(self) -> list[int]:
        """The first row of each image."""
        return np.cumsum([0, *self.tiles])[:-1].tolist()

    def grid(self, row: int) -> tuple[int, int]:
        """Patch rows and columns of one row of the vision tower."""
        return self.packing.grid(self, row)

    def n_features(self, row: int) -> int:
        """Positions of a row of the vision tower that its patches and prefix take."""
        rows, columns = self.grid(row)
        return self.tower.cfg.n_prefix + rows * columns

    @property
    def n_dropped(self) -> int:
        """How many first positions of a row are left out on the way to the projector: of a family without a setting for it, those of no patch."""
        select = self.tower.spec.feature_select
        return self.tower.cfg.n_prefix if select is None else int(self.setting(select) == "default")

    @cached_property
    def present(self) -> list[bool]:
        """Whether each image is there: a camera that is masked is not."""
        return self.packing.present(self)

    @cached_property
    def placeholders(self) -> Tensor | None:
        """Which prompt positions an image feature replaces, ``[row pos]``; None without prompts."""
        token, ids = self.model.image_token_id, self.inputs.get("input_ids")
        if token is None:
            return None
        if ids is not None:
            return ids == token
        embeds = self.inputs.get("inputs_embeds")
        if embeds is None or self.pixels is None or not self.packing.fills_embeddings:
            return None
        # As the models find them: positions that hold the image token's embedding.
        table = self.model.module.get_input_embeddings()
        own = (
            table(torch.tensor(token, device=embeds.device))
            if token < table.weight.shape[0]
            else embeds.new_tensor(float("nan"))
        )
        return (embeds == own).all(-1)

    @cached_property
    def lengths(self) -> list[int]:
        """How many prompt positions each image takes."""
        return self.packing.lengths(self)

    @cached_property
    def tokens(self) -> list[ImageTokens]:
        """The prompt positions of every image."""
        return self.packing.tokens(self)

    @cached_property
    def owners(self) -> list[int]:
        """The example of every image, read off the image tokens of the prompts."""
        return self.packing.owners(self)

    @cached_property
    def numbers(self) -> list[int]:
        """The number of every image within its example."""
        seen: dict[int, int] = {}
        numbers = []
        for owner in self.owners:
            numbers.append(seen.get(owner, 0))
            seen[owner] = numbers[-1] + 1
        return numbers

    @property
    def pixel_rows(self) -> list[int]:
        """Where each row of the vision tower lies among the pictures of ``pixel_values``, tiles counted through."""
        assert self.pixels is not None
        if self.pixels.ndim != 5:
            return list(range(self.n_rows))
        per_image = self.pixels.shape[1]
        if len(self.tiles) == self.pixels.shape[0] * per_image:
            return list(range(self.n_rows))
        return [image * per_image + tile for image, count in enumerate(self.tiles) for tile in range(count)]

    def pixel_boxes(self, row: int) -> Array:
        """The pixels of its tensor that every patch of a row reads, ``[patch 4]``."""
        return self.embedding.boxes(self.grid(row), *self.packing.size(self, row))


class Packing:
    """One image is one row of the vision tower, and one example."""

    flat_images: ClassVar[bool] = False
    """Whether images of all examples stand one after the other, each owned by the example whose prompt holds its tokens."""
    fills_embeddings: ClassVar[bool] = True
    """Whether image features also replace placeholders among ``inputs_embeds``."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Inputs that must stand beside ``pixel_values``."""
    dims: ClassVar[tuple[int, ...]] = (4,)
    """How many axes ``pixel_values`` may have."""
    layout: ClassVar[str] = "[image, channel, height, width]"
    """The axes of ``pixel_values``, in words."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def tiles(self, run: ImageRun) -> list[int]:
        """How many rows of the vision tower each image takes."""
        assert run.pixels is not None
        return [1] * run.pixels.shape[0]

    def size(self, run: ImageRun, row: int) -> tuple[int, int]:
        """Height and width of a row's pixels."""
        assert run.pixels is not None
        return run.pixels.shape[-2], run.pixels.shape[-1]

    def grid(self, run: ImageRun, row: int) -> tuple[int, int]:
        """Patch rows and columns of a row."""
        return run.embedding.grid(*self.size(run, row))

    def row_length(self, run: ImageRun) -> int:
        """Positions of the rows of the vision tower, padding included."""
        return max(run.n_features(row) for row in range(run.n_rows))

    def present(self, run: ImageRun) -> list[bool]:
        """Whether each image is there."""
        return [True] * len(run.tiles)

    def lengths(self, run: ImageRun) -> list[int]:
        """How many prompt positions each image takes."""
        lengths = [run.n_features(first) - run.n_dropped for first in run.firsts]
        return [length if there else 0 for length, there in zip(lengths, run.present, strict=True)]

    def tokens(self, run: ImageRun) -> list[ImageTokens]:
        """Which features every prompt position of each image holds."""
        return [_in_order(first, length, run.n_dropped) for first, length in zip(run.firsts, run.lengths, strict=True)]

    def owners(self, run: ImageRun) -> list[int]:
        """The example of every image."""
        return list(range(len(run.tiles)))

    def frame(self, run: ImageRun, image: int, tile: int) -> Frame:
        """Where a row's pixels lie in the frame of boxes: by default that of its own tensor."""
        height, width = self.size(run, run.firsts[image] + tile)
        return Frame((float(height), float(width)))

    def tile_number(self, run: ImageRun, image: int, tile: int) -> int:
        """What token maps call a row: 0 is the whole image, tiles count from 1."""
        return tile

    def laid_out(self, model: Wrapped, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with prompts that name every position the model computes; as they are where prompts always do."""
        return inputs

    def channels(self, towers: Sequence[Tower]) -> int:
        """How many channels ``pixel_values`` has for these image towers."""
        return int(getattr(towers[0].config, "num_channels", 3))

    def check(self, run: ImageRun) -> None:
        """Raise InputError for pixels and settings that cannot be packed."""
        assert run.pixels is not None
        absent = [name for name in self.beside if run.inputs.get(name) is None]
        if absent:
            raise InputError(f"This tower reads {' and '.join(absent)} beside pixel_values; model.inputs makes them.")
        if run.pixels.ndim not in self.dims:
            raise InputError(f"pixel_values must be {self.layout}, got shape {tuple(run.pixels.shape)}.")

    def check_tokens(self, run: ImageRun) -> None:
        """Raise InputError if the prompts do not hold the image tokens that these images take."""
        placeholders = run.placeholders
        if placeholders is None:
            return
        found = placeholders.sum(-1).tolist()
        expected = [0] * len(found)
        for owner, length in zip(run.owners, run.lengths, strict=True):
            expected[owner] += length
        if found != expected:
            name = run.model.image_token or "the image token"
            where = "" if sum(found) != sum(expected) else f", by prompt {found} for {expected}"
            raise InputError(
                f"The prompts hold {sum(found)} image tokens, {len(run.tiles)} image(s) make {sum(expected)}{where}: "
                f"repeat {name} once per patch token (the processor does), and give as many images as the prompts name."
            )


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

    def check(self, run: ImageRun) -> None:
        """Also raises where the mask leaves other patches than the grid has."""
        super().check(run)
        cells, mask = run.inputs["spatial_shapes"].prod(-1), run.inputs["pixel_attention_mask"]
        inside = torch.arange(mask.shape[-1], device=mask.device)[None] < cells[:, None].to(mask.device)
        if not torch.equal(mask.bool(), inside):
            raise InputError(
                "pixel_attention_mask and spatial_shapes disagree: the mask must be 1 for the first rows × columns patches of every image, "
                "and 0 after them."
            )


class Flat(Packing):
    """Every image is one row of the vision tower, whose features stand in the prompt in their order."""

    flat_images = True

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


class Cameras(Flat):
    """``[example, camera, …]``: every camera is a row of the vision tower; those that are masked take no prompt position."""

    flat_images = False
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


class AnyRes(Flat):
    """An image is a thumbnail and tiles of the picture, packed by the model's ``pack_image_features``."""

    beside = ("image_sizes",)
    dims = (4, 5)
    layout = "[image, tile, channel, height, width]"

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

    def check(self, run: ImageRun) -> None:
        """Also raises for tiles that are missing, and for settings under which the model cannot lay tiles out."""
        self._need_sizes(run)
        super().check(run)
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


def _in_order(row: int, length: int, dropped: int) -> ImageTokens:
    at = np.arange(length)
    return ImageTokens(np.zeros(length, bool), at, np.full(length, row), at + dropped, np.ones(length))


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
