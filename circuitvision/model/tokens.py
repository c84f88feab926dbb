"""Token geometry: what every position of every tower is, and which pixels, words or cameras it came from.

A :class:`TokenMap` describes the rows of one tower in one run. Rows of a vision tower are images, tiles or cameras, not examples: ``example``
says which example a row belongs to. Where a model packs image tokens (tiles, unpadding, newline tokens), its own packing function is run on patch
*numbers* instead of features, so the map is the packing and not a copy of its arithmetic.

Pixel boxes are (left, top, right, bottom): in the pixels of the tensor the tower reads, or, for tiled images, in the pixels of the original image.
Not covered: processors that crop before the tensor exists; a box never leaves the tensor's frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.axes import holds_past, past_length
from circuitvision.model.selection import Selection
from circuitvision.model.settings import setting

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel
    from circuitvision.model.tower import Tower

KINDS = (
    "cls",
    "distillation",
    "register",
    "patch",
    "newline",
    "text",
    "state",
    "action",
    "padding",
    "dropped",
    "unknown",
)
ABSENT = ("padding", "dropped")
"""Kinds of positions that hold nothing: what fills up a row, a grid or a batch, and images that are not there."""
Array = np.ndarray


def present(kind: Array) -> Array:
    """Which positions of these kinds hold something: what averages, maxima and examples are taken over."""
    return ~np.isin(kind, ABSENT)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """What each position of one tower is; all arrays are ``[row, pos]`` (``box``: ``[row, pos, 4]``, ``example``: ``[row]``)."""

    tower: str
    kind: Array
    """One of ``KINDS``."""
    example: Array
    """Example of each row."""
    image_number: Array
    """Image of the example (0, 1, …) a position comes from; −1 for text and actions."""
    tile: Array
    """Tile of the image: 0 is the whole image, tiles count from 1; for robots the camera; −1 elsewhere."""
    patch_row: Array
    patch_col: Array
    box: Array
    """Pixels (left, top, right, bottom); NaN where there are none."""
    text: Array
    """Text piece of a position, "" without a tokenizer."""
    n_examples: int = 0
    """Examples of the run, those without a row in this tower too."""

    def __post_init__(self) -> None:
        if self.example.size:
            object.__setattr__(self, "n_examples", max(self.n_examples, int(self.example.max()) + 1))

    @property
    def present(self) -> Array:
        """Which positions hold something, ``[row pos]``: all but padding, empty cells of a grid, and images that are not there."""
        return present(self.kind)

    @property
    def rows_are_examples(self) -> bool:
        """Whether row ``i`` is example ``i``, and every example has one row."""
        return self.n_rows == self.n_examples and bool((self.example == np.arange(self.n_rows)).all())

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.kind.shape[0])

    @property
    def n_positions(self) -> int:
        """Number of positions of a row, padding included."""
        return int(self.kind.shape[1])

    def mask(
        self,
        kind: str | Sequence[str] | None = None,
        image: int | None = None,
        row: int | None = None,
        tile: int | None = None,
    ) -> Tensor:
        """Which positions are of a kind, and come from an image and tile: bool ``[row pos]`` (``[pos]`` with ``row``)."""
        kinds = [kind] if isinstance(kind, str) else kind
        unknown = set(kinds or ()) - set(KINDS)
        if unknown:
            raise InputError(f"Unknown kind {sorted(unknown)}; known: {', '.join(KINDS)}.")
        found = np.isin(self.kind, list(kinds)) if kinds is not None else np.ones(self.kind.shape, bool)
        found = found & (self.image_number == image) if image is not None else found
        found = found & (self.tile == tile) if tile is not None else found
        return torch.from_numpy(found if row is None else found[row])

    def positions(
        self, kind: str | Sequence[str] | None = None, image: int | None = None, row: int = 0, tile: int | None = None
    ) -> list[int]:
        """The positions of one row that :meth:`mask` selects."""
        return self.mask(kind, image, row, tile).nonzero().flatten().tolist()

    def select(self, kind: str | Sequence[str] | None = None) -> Selection:
        """The positions of a kind (None: all that hold something) as a set that edits take."""
        label = kind if isinstance(kind, str) else "+".join(kind or ())
        return Selection(self, self.present if kind is None else self.mask(kind).numpy(), label)

    def image(self, number: int = 0) -> Selection:
        """The positions that come from image ``number`` of their example; InputError if no example has that many images."""
        found = (self.image_number == number) & self.present
        if not found.any():
            raise InputError(f"No position of the {self.tower} tower comes from image {number}; images count from 0.")
        return Selection(self, found, f"image({number})")

    def piece(self, text: str) -> Selection:
        """The positions whose text piece is ``text``; InputError if there is none."""
        found = np.zeros(self.kind.shape, bool)
        for row in range(self.n_rows):
            found[row, self.find(text, row)] = True
        if not found.any():
            raise InputError(
                f"No position of the {self.tower} tower is the piece {text!r}; tokens.labels() lists them."
            )
        return Selection(self, found, f"piece({text!r})")

    def in_box(
        self, left: float, top: float, right: float, bottom: float, row: int = 0, image: int | None = None
    ) -> list[int]:
        """Patch positions of one row whose pixels overlap a box, in the frame of ``self.box``."""
        box = self.box[row]
        with np.errstate(invalid="ignore"):
            hit = (box[:, 0] < right) & (box[:, 2] > left) & (box[:, 1] < bottom) & (box[:, 3] > top)
        hit &= self.kind[row] == "patch"
        if image is not None:
            hit &= self.image_number[row] == image
        return np.flatnonzero(hit).tolist()

    def last(self, row: int | None = None) -> Any:
        """The last position that holds something: of one row, or of all rows (of a row that holds nothing the last one)."""
        width = self.n_positions
        last = width - 1 - np.argmax(self.present[:, ::-1], axis=1)
        return int(last[row]) if row is not None else last.tolist()

    def find(self, piece: str, row: int = 0) -> list[int]:
        """Positions of one row whose text piece is ``piece`` (leading space marks ignored)."""
        wanted = piece.strip()
        return [pos for pos, text in enumerate(self.text[row]) if _plain(text) == wanted]

    def labels(self, row: int = 0) -> list[str]:
        """A short label of every position: ``r3c7`` for patches, the text piece for text, the kind otherwise."""
        out = []
        for pos, kind in enumerate(self.kind[row]):
            if kind == "patch":
                out.append(f"r{self.patch_row[row, pos]}c{self.patch_col[row, pos]}")
            else:
                out.append(str(self.text[row, pos]) or f"[{kind}]")
        return out

    def __repr__(self) -> str:
        kinds, counts = np.unique(self.kind, return_counts=True)
        found = ", ".join(f"{n} {k}" for k, n in zip(kinds, counts, strict=True))
        return f"TokenMap({self.tower}: {self.n_rows} rows of {self.n_positions} positions: {found})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<span style='padding:1px 3px;border:1px solid #8884'>{label}</span> " for label in self.labels(0)[:200]
        )
        return f"<b>{self!r}</b><div>{cells}</div>"


def _plain(piece: str) -> str:
    return str(piece).replace("▁", " ").replace("Ġ", " ").replace("</w>", "").strip()


class _Builder:
    """Arrays of a TokenMap under construction."""

    def __init__(self, tower: str, rows: int, positions: int) -> None:
        self.tower = tower
        self.kind = np.full((rows, positions), "text", dtype="<U12")
        self.example = np.arange(rows)
        self.image_number = np.full((rows, positions), -1)
        self.tile = np.full((rows, positions), -1)
        self.patch_row = np.full((rows, positions), -1)
        self.patch_col = np.full((rows, positions), -1)
        self.box = np.full((rows, positions, 4), np.nan)
        self.text = np.full((rows, positions), "", dtype=object)

    def done(self) -> TokenMap:
        return TokenMap(**vars(self))


def token_maps(model: HookedModel, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
    """The token map of every tower that these inputs run; in a run that continues a cache, what the cache holds is of kind "unknown"."""
    from circuitvision.model.routes import is_dual

    maps: dict[str, TokenMap] = {}
    given, inputs = inputs, _new(inputs)
    packing = Packing(model, inputs)
    for name, tower in model.towers.items():
        if tower.stack.image:
            if inputs.get("pixel_values") is not None:
                maps[name] = _vision_map(tower, packing)
        elif name == "action":
            maps[name] = _action_map(model, tower, inputs)
        elif inputs.get("input_ids") is not None:
            maps[name] = _behind_past(_text_map(model, tower, inputs, packing), given)
    if not is_dual(model):
        count = max((tokens.n_examples for tokens in maps.values()), default=0)
        maps = {name: replace(tokens, n_examples=count) for name, tokens in maps.items()}
    return maps


def _new(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs with the ids and the mask of the positions that a run computes, where it continues a cache."""
    past, ids, mask = past_length(inputs), inputs.get("input_ids"), inputs.get("attention_mask")
    if not past or ids is None:
        return inputs
    ids = ids[:, past:] if holds_past(inputs) else ids
    new = {**inputs, "input_ids": ids, "past_key_values": None}
    if isinstance(mask, Tensor) and mask.ndim == 2:
        new["attention_mask"] = mask[:, mask.shape[1] - ids.shape[1] :]
    return new


def _behind_past(tokens: TokenMap, inputs: Mapping[str, Any]) -> TokenMap:
    """A token map with the positions that a cache holds before its own."""
    past, mask = past_length(inputs), inputs.get("attention_mask")
    if not past:
        return tokens
    build = _Builder(tokens.tower, tokens.n_rows, past + tokens.n_positions)
    build.kind[:, :past] = "unknown"
    if isinstance(mask, Tensor) and mask.ndim == 2:
        build.kind[:, :past][~mask[:, :past].bool().cpu().numpy()] = "padding"
    for name, whole in vars(build).items():
        if name == "example":
            build.example = tokens.example
        elif isinstance(whole, np.ndarray):
            whole[:, past:] = getattr(tokens, name)
    return build.done()


class Packing:
    """Which image, tile and camera every row of the vision tower is, and the order in which its patches enter the prompt."""

    def __init__(self, model: HookedModel, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.layout = model.family.image_layout
        self.pixels: Tensor | None = inputs.get("pixel_values")
        self.tiles = self._tiles_of_images()

    @property
    def tower(self) -> Tower:
        """The vision tower."""
        return next(tower for tower in self.model.towers.values() if tower.stack.image)

    def _tiles_of_images(self) -> list[int]:
        """Number of rows of the vision tower that each image takes."""
        if self.pixels is None:
            return []
        if self.layout == "anyres":
            return self._anyres_tiles()
        if self.layout == "cameras":
            return [1] * (self.pixels.shape[0] * self.pixels.shape[1])
        return [1] * self.pixels.shape[0]

    def _anyres_tiles(self) -> list[int]:
        import sys

        inner: Any = self.model.inner
        count = sys.modules[type(inner).__module__].image_size_to_num_patches  # type: ignore[attr-defined]
        if "image_sizes" not in self.inputs:
            raise InputError("Tiled images need image_sizes [image, (height, width)] beside pixel_values.")
        config = self.model.config
        per_example = self.inputs.get("batch_num_images")
        patched = [True] * len(self.inputs["image_sizes"])
        if per_example is not None:
            patched = [int(n) == 1 for n in per_example for _ in range(int(n))]
        return [
            count(
                image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=config.vision_config.image_size
            )
            if tiled
            else 1
            for size, tiled in zip(self.inputs["image_sizes"], patched, strict=True)
        ]

    def grid(self, row: int) -> tuple[int, int]:
        """Patch rows and columns of one row of the vision tower."""
        tower = self.tower
        if "spatial_shapes" in self.inputs:
            height, width = self.inputs["spatial_shapes"][row].tolist()
            return int(height), int(width)
        assert self.pixels is not None
        assert tower.cfg.patch_size is not None
        height, width = self.pixels.shape[-2:]
        return height // tower.cfg.patch_size, width // tower.cfg.patch_size

    def images_of_examples(self) -> list[int]:
        """Example index of every image, read off the image tokens of the prompts."""
        n_images = len(self.tiles)
        ids = self.inputs.get("input_ids")
        token = self.model.image_token_id
        if ids is None or token is None or self.layout in ("none", "single"):
            return list(range(n_images))
        if self.layout == "cameras":
            assert self.pixels is not None
            return [example for example in range(self.pixels.shape[0]) for _ in range(self.pixels.shape[1])]
        counts = (ids == token).sum(-1).tolist()
        owners, example, left = [], 0, counts[0] if counts else 0
        for image in range(n_images):
            length = len(self.order(image)[0])
            while left < length and example + 1 < len(counts):
                example += 1
                left = counts[example]
            owners.append(example)
            left -= length
        return owners

    def order(self, image: int) -> tuple[list[int], int]:
        """Patch numbers of an image in prompt order (−1 = newline), counted over its tiles; and the first row of the image."""
        if not hasattr(self, "_orders"):
            self._orders = self._compute_orders()
        return self._orders[image]

    def _compute_orders(self) -> list[tuple[list[int], int]]:
        firsts = np.cumsum([0, *self.tiles[:-1]]).tolist()
        sizes = [self.grid(first)[0] * self.grid(first)[1] for first in firsts]
        if (
            not self.tower.drops_cls_in(self.inputs)
            and self.tower.cfg.n_prefix
            and self.tower.spec.feature_select is not None
        ):
            sizes = [size + self.tower.cfg.n_prefix for size in sizes]
        if self.layout != "anyres":
            return [(list(range(size)), first) for size, first in zip(sizes, firsts, strict=True)]
        features = [
            torch.arange(count * size, dtype=torch.float64).view(count, size, 1)
            for count, size in zip(self.tiles, sizes, strict=True)
        ]
        packed = self._pack(features)
        orders = []
        for numbers in packed:
            flat = numbers.flatten().tolist()
            orders.append([-1 if number < 0 else round(number) for number in flat])
        return list(zip(orders, firsts, strict=True))

    def _pack(self, features: list[Tensor]) -> list[Tensor]:
        inner: Any = self.model.inner
        newline = torch.full((1,), -1.0, dtype=torch.float64)
        keywords: dict[str, Any] = {"image_newline": newline}
        names = inner.pack_image_features.__code__.co_varnames
        if "vision_feature_select_strategy" in names:
            keywords["vision_feature_select_strategy"] = setting(
                self.model, self.inputs, "vision_feature_select_strategy"
            )
        if "vision_aspect_ratio" in names:
            keywords["vision_aspect_ratio"] = setting(self.model, self.inputs, "vision_aspect_ratio")
        packed, _ = inner.pack_image_features(features, self.inputs["image_sizes"], **keywords)
        return packed

    def frame(self, image: int, tile: int) -> tuple[float, float, float, float]:
        """The pixels that a row of the vision tower covers: of its own tensor, or of the original image where there are tiles."""
        assert self.pixels is not None
        if self.layout != "anyres":
            if "spatial_shapes" in self.inputs:
                rows, cols = self.grid(image)
                patch = self.tower.cfg.patch_size or 1
                return 0.0, 0.0, float(cols * patch), float(rows * patch)
            height, width = self.pixels.shape[-2:]
            return 0.0, 0.0, float(width), float(height)
        full_height, full_width = (float(v) for v in self.inputs["image_sizes"][image])
        if tile == 0:
            return 0.0, 0.0, full_width, full_height
        import sys

        inner: Any = self.model.inner
        shape = sys.modules[type(inner).__module__].get_anyres_image_grid_shape  # type: ignore[attr-defined]
        config = self.model.config
        rows, cols = shape(
            self.inputs["image_sizes"][image], config.image_grid_pinpoints, config.vision_config.image_size
        )
        side = config.vision_config.image_size
        scale = min(cols * side / full_width, rows * side / full_height)
        left, top = (cols * side - full_width * scale) / 2, (rows * side - full_height * scale) / 2
        row, col = divmod(tile - 1, cols)
        return tuple(
            (edge - shift) / scale
            for edge, shift in zip(
                (col * side, row * side, (col + 1) * side, (row + 1) * side), (left, top, left, top), strict=True
            )
        )  # type: ignore[return-value]


def _vision_map(tower: Tower, packing: Packing) -> TokenMap:
    assert packing.pixels is not None
    rows = sum(packing.tiles)
    n_prefix = tower.cfg.n_prefix
    lengths = [packing.grid(row)[0] * packing.grid(row)[1] for row in range(rows)]
    padded = packing.pixels.shape[1] if "spatial_shapes" in packing.inputs else max(lengths)
    build = _Builder(tower.name, rows, n_prefix + padded)
    build.kind[:] = "padding"
    build.kind[:, :n_prefix] = tower.prefix_kinds
    owners = packing.images_of_examples()
    visible = packing.inputs.get("pixel_attention_mask") if packing.layout == "cameras" else None
    row = 0
    seen: dict[int, int] = {}
    for image, tiles in enumerate(packing.tiles):
        example = owners[image]
        number = seen.get(example, 0)
        seen[example] = number + 1
        for tile in range(tiles):
            n_rows, n_cols = packing.grid(row)
            end = n_prefix + n_rows * n_cols
            build.example[row] = example
            build.image_number[row, :end] = number
            build.tile[row, :end] = number if packing.layout == "cameras" else tile
            build.kind[row, n_prefix:end] = "patch"
            r, c = np.divmod(np.arange(n_rows * n_cols), n_cols)
            build.patch_row[row, n_prefix:end], build.patch_col[row, n_prefix:end] = r, c
            build.box[row, n_prefix:end] = _boxes(packing.frame(image, tile), n_rows, n_cols)
            if visible is not None and not bool(visible.flatten()[image]):
                build.kind[row] = "dropped"
            row += 1
    return build.done()


def _boxes(frame: tuple[float, float, float, float], rows: int, cols: int) -> Array:
    left, top, right, bottom = frame
    r, c = np.divmod(np.arange(rows * cols), cols)
    dx, dy = (right - left) / cols, (bottom - top) / rows
    return np.stack([left + c * dx, top + r * dy, left + (c + 1) * dx, top + (r + 1) * dy], axis=1)


def _text_map(model: HookedModel, tower: Tower, inputs: Mapping[str, Any], packing: Packing) -> TokenMap:
    ids: Tensor = inputs["input_ids"]
    build = _Builder(tower.name, *ids.shape)
    pieces = model.pieces(ids)
    if pieces is not None:
        build.text[:] = np.array(pieces, dtype=object)
    mask = inputs.get("attention_mask")
    token = model.image_token_id
    if token is not None and packing.tiles:
        _place_images(build, ids == token, packing)
    if mask is not None and mask.ndim == 2:
        build.kind[~mask.bool().cpu().numpy()] = "padding"
    return build.done()


def _place_images(build: _Builder, is_image: Tensor, packing: Packing) -> None:
    owners = packing.images_of_examples()
    free = [row.nonzero().flatten().tolist() for row in is_image.cpu()]
    used = [0] * len(free)
    seen: dict[int, int] = {}
    visible = packing.inputs.get("pixel_attention_mask") if packing.layout == "cameras" else None
    n_prefix = (
        0
        if packing.tower.drops_cls_in(packing.inputs) or packing.tower.spec.feature_select is None
        else packing.tower.cfg.n_prefix
    )
    for image in range(len(packing.tiles)):
        example = owners[image]
        number = seen.get(example, 0)
        seen[example] = number + 1
        if visible is not None and not bool(visible.flatten()[image]):
            continue
        order, first = packing.order(image)
        n_rows, n_cols = packing.grid(first)
        per_tile = n_rows * n_cols + n_prefix
        slots = free[example][used[example] : used[example] + len(order)]
        used[example] += len(order)
        boxes = {tile: _boxes(packing.frame(image, tile), n_rows, n_cols) for tile in range(packing.tiles[image])}
        for pos, patch in zip(slots, order, strict=False):
            build.image_number[example, pos] = number
            build.text[example, pos] = ""
            if patch < 0:
                build.kind[example, pos] = "newline"
                continue
            tile, index = divmod(patch, per_tile)
            build.tile[example, pos] = number if packing.layout == "cameras" else tile
            if index < n_prefix:
                build.kind[example, pos] = packing.tower.prefix_kinds[index]
                continue
            build.kind[example, pos] = "patch"
            build.patch_row[example, pos], build.patch_col[example, pos] = divmod(index - n_prefix, n_cols)
            build.box[example, pos] = boxes[tile][index - n_prefix]


def _action_map(model: HookedModel, tower: Tower, inputs: Mapping[str, Any]) -> TokenMap:
    rows = int(inputs["state"].shape[0])
    kinds = list(model.family.suffix_kinds)
    length = int(model.config.chunk_size) + len(kinds) - 1
    build = _Builder(tower.name, rows, length)
    build.kind[:] = kinds + [kinds[-1]] * (length - len(kinds))
    return build.done()
