"""Token geometry: what every position of every tower is, and which pixels, words or cameras it came from.

A :class:`TokenMap` describes the rows of one tower in one run. Rows of a vision tower are images, tiles or cameras, not examples: ``example``
says which example a row belongs to. A position holds a weighted *set* of patches (:class:`PatchSets`): one in most models, several where tiles are
interpolated, or where a connector merges patches, whose positions then have a map of their own. What the model's packing
does is measured on the packing function itself, see :mod:`circuitvision.model.packing`.

Pixel boxes are (left, top, right, bottom): in the pixels of the tensor the tower reads, or, for tiled images, in the pixels of the original image.
They hold the pixels that are read and no others, and end where the picture ends: patches of padding have none. Of other images,
:func:`circuitvision.model.picture_boxes.boxes_in_pictures` finds the boxes in the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.axes import new_positions, past_length
from circuitvision.model.packing import ImageRun, ImageTokens
from circuitvision.model.patches import Array, Frame, union
from circuitvision.model.selection import Selection

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped

KINDS = (
    "cls",
    "distillation",
    "register",
    "patch",
    "newline",
    "text",
    "state",
    "action",
    "unknown",
    "padding",
    "dropped",
)
"""``unknown``: a position that was given as an embedding; ``dropped``: a row of the vision tower that no prompt reads (an absent camera)."""
ABSENT = ("padding", "dropped")
"""Kinds of positions that stand for nothing."""


@dataclass(frozen=True, eq=False)
class PatchSets:
    """Which patches every position of a tower holds, as entries sorted by row and position; every array is ``[entry]`` (boxes ``[entry, 4]``).

    Entry ``i`` says that position ``(row[i], position[i])`` holds ``weight[i]`` of a patch: position ``source_position[i]`` of row
    ``source_row[i]`` of the vision tower, which is patch ``(patch_row[i], patch_col[i])`` of that row's grid. Weights are those of the model's
    packing function, so a position is the weighted sum of projected patches.
    """

    row: Array
    position: Array
    source_row: Array
    source_position: Array
    patch_row: Array
    patch_col: Array
    weight: Array
    box: Array
    """In the frame of ``TokenMap.box``."""
    pixels: Array
    """In the pixels of the tensor that the row of the vision tower reads."""

    @classmethod
    def none(cls) -> PatchSets:
        """No patch anywhere."""
        whole, edges = np.zeros(0, int), np.zeros((0, 4))
        return cls(whole, whole, whole, whole, whole, whole, np.zeros(0), edges, edges)

    @classmethod
    def joined(cls, parts: Sequence[Sequence[Array]]) -> PatchSets:
        """Entries of several parts, each a tuple of the fields."""
        if not parts:
            return cls.none()
        found = cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        order = np.lexsort((found.source_position, found.source_row, found.position, found.row))
        return cls(*found.taken(order))

    def taken(self, entries: Array) -> tuple[Array, ...]:
        """All fields at some entries."""
        return tuple(value[entries] for value in vars(self).values())

    def of(self, row: int, position: int) -> list[tuple[int, int, int, float]]:
        """The patches of one position: (row of the vision tower, patch row, patch column, weight)."""
        here = (self.row == row) & (self.position == position)
        fields = (self.source_row, self.patch_row, self.patch_col, self.weight)
        return list(zip(*(value[here].tolist() for value in fields), strict=True))

    def mask(self, entries: Array, shape: tuple[int, ...]) -> Array:
        """The positions that hold any of some entries (bool ``[entry]``): bool ``[row, pos]``."""
        found = np.zeros(shape, bool)
        found[self.row[entries], self.position[entries]] = True
        return found

    def by_position(self, shape: tuple[int, ...]) -> Array:
        """The number of the last entry of every position, ``[row, pos]``; −1 where it holds no patch."""
        found = np.full(shape, -1)
        found[self.row, self.position] = np.arange(len(self.row))
        return found


@dataclass(frozen=True, eq=False)
class Views:
    """What each row of the vision tower shows; every array is ``[source_row, …]``."""

    image: Array
    """Number of the image within its example."""
    tile: Array
    """Tile of the image, as in ``TokenMap.tile``."""
    grid: Array
    """Patch rows and columns."""
    size: Array
    """Height and width of the row's tensor."""
    frame: Array
    """The pixels (left, top, right, bottom) that the whole tensor covers, in the frame of ``TokenMap.box``; padding lies beyond the picture."""
    picture: Array
    """Height and width of the picture that boxes are counted in."""

    @classmethod
    def none(cls) -> Views:
        """No row."""
        return cls(np.zeros(0, int), np.zeros(0, int), *(np.zeros((0, width)) for width in (2, 2, 4, 2)))


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
    """Tile of the image: 0 is the whole image, tiles count from 1; for robots the camera; −1 elsewhere, and where a position mixes tiles."""
    patch_row: Array
    """Row of the one patch that a position holds; −1 where it holds none or several."""
    patch_col: Array
    box: Array
    """Pixels (left, top, right, bottom) that the position's patches read, the smallest box around all; NaN where there are none."""
    text: Array
    """Text piece of a position, "" without a tokenizer."""
    patches: PatchSets
    """Which patches every position holds, with weights."""
    views: Views
    """What each row of the vision tower shows."""
    n_examples: int = 0
    """Examples of the run, those without a row in this tower too."""
    picture_frame: Callable[[tuple[int, int]], tuple[Frame | None, tuple[int, int]]] | None = None
    """Where the tensor of a picture of some size lies in it, and the tensor's size; None without a processor."""

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

    @property
    def tensor_box(self) -> Array:
        """As ``box``, in the pixels of the tensor that the vision tower reads, ``[row, pos, 4]``; tiles of an image are tensors of their own."""
        rows, positions = self.kind.shape
        groups = self.patches.row * positions + self.patches.position
        return union(self.patches.pixels, groups, rows * positions).reshape(rows, positions, 4)

    @property
    def shares(self) -> Array:
        """As ``tensor_box``, as shares of the tensor's width and height: where a position lies in the image or tile that the model read.

        NaN where a position mixes tiles.
        """
        return self._of_one_view(self.patches.pixels / self.views.size[self.patches.source_row][:, [1, 0, 1, 0]])

    @property
    def frames(self) -> Array:
        """The pixels that the image or tile of every position covers, in the frame of ``box``, ``[row, pos, 4]``; NaN for none and several."""
        return self._of_one_view(self.views.frame[self.patches.source_row])

    def _of_one_view(self, boxes: Array) -> Array:
        rows, positions = self.kind.shape
        groups = self.patches.row * positions + self.patches.position
        found = union(boxes, groups, rows * positions).reshape(rows, positions, 4)
        found[self.tile < 0] = np.nan
        return found

    def overlapping(self, box: Sequence[float] | Array) -> Array:
        """Which entries of ``patches`` read pixels inside a box (left, top, right, bottom), one for all or ``[entry, 4]``: bool ``[entry]``."""
        left, top, right, bottom = np.moveaxis(np.asarray(box, dtype=float), -1, 0)
        own = self.patches.box
        with np.errstate(invalid="ignore"):
            return (own[:, 0] < right) & (own[:, 2] > left) & (own[:, 1] < bottom) & (own[:, 3] > top)

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
        """Patch positions of one row that hold a patch whose pixels overlap a box, in the frame of ``self.box``."""
        hit = self.patches.mask(self.overlapping((left, top, right, bottom)), self.kind.shape)[row]
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
        """A short label of every position: ``r3c7`` for a patch (``[patches]`` for several), the text piece for text, the kind otherwise."""
        out = []
        for pos, kind in enumerate(self.kind[row]):
            if kind == "patch":
                r, c = self.patch_row[row, pos], self.patch_col[row, pos]
                out.append(f"r{r}c{c}" if r >= 0 else "[patches]")
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


def position_names(tokens: TokenMap, positions: Sequence[int]) -> list[str]:
    """What stands at positions of a tower, in every row: ``image[2, 5]`` for the patch of a row and column, the text piece, or else the kind.

    Of several images of an example the number is said, ``image 1[2, 5]``. Where rows differ it is the kind they share, or "".
    """
    several = bool((tokens.image_number > 0).any())

    def name(row: int, position: int) -> str:
        kind, piece = str(tokens.kind[row, position]), _plain(tokens.text[row, position])
        if kind != "patch":
            return piece or kind
        place = tokens.patch_row[row, position], tokens.patch_col[row, position]
        image = f"image {tokens.image_number[row, position]}" if several else "image"
        return f"{image}[{place[0]}, {place[1]}]" if min(place) >= 0 else image

    found = []
    for position in positions:
        names = {name(row, position) for row in range(tokens.n_rows)}
        kinds = set(map(str, tokens.kind[:, position]))
        found.append(names.pop() if len(names) == 1 else kinds.pop() if len(kinds) == 1 else "")
    return found


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
        self.patches = PatchSets.none()
        self.views = Views.none()

    def done(self) -> TokenMap:
        return TokenMap(**vars(self))


def token_maps(model: Wrapped, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
    """The token map of every tower that these inputs run; in a run that continues a cache, what the cache holds is of kind "unknown"."""
    maps: dict[str, TokenMap] = {}
    given, inputs = inputs, new_positions(inputs)
    run = ImageRun(model, inputs)
    pictures = None
    if run.pixels is not None and (run.packing.fills_embeddings or inputs.get("inputs_embeds") is None):
        pictures = _vision_map(run)
    for name, tower in model.towers.items():
        if tower.stack.image:
            if pictures is not None:
                maps[name] = pictures if name == run.tower.name else _vision_map(ImageRun(model, inputs, name))
                maps.update(_connector_map(run, pictures) if name == run.tower.name else {})
        elif tower.spec.runs == "per_denoising_step":
            maps[name] = _action_map(model, tower, inputs)
        elif inputs.get("input_ids") is not None or inputs.get("inputs_embeds") is not None:
            maps[name] = _behind_past(_text_map(model, tower, run, pictures), given)
    if not model.is_dual:
        count = max((tokens.n_examples for tokens in maps.values()), default=0)
        maps = {name: replace(tokens, n_examples=count) for name, tokens in maps.items()}
    if model.processor is not None and pictures is not None:
        from circuitvision.model.picture_boxes import picture_frame

        framed = functools.partial(picture_frame, model.processor)
        maps = {name: replace(tokens, picture_frame=framed) for name, tokens in maps.items()}
    return maps


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
        if isinstance(whole, np.ndarray) and name != "example":
            whole[:, past:] = getattr(tokens, name)
    build.example, build.views = tokens.example, tokens.views
    build.patches = replace(tokens.patches, position=tokens.patches.position + past)
    return build.done()


def _vision_map(run: ImageRun) -> TokenMap:
    tower, n_prefix = run.tower, run.tower.cfg.n_prefix
    build = _Builder(tower.name, run.n_rows, run.packing.row_length(run))
    build.kind[:] = "padding"
    parts, views = [], []
    for image, (first, tiles) in enumerate(zip(run.firsts, run.tiles, strict=True)):
        for tile in range(tiles):
            row = first + tile
            n_rows, n_cols = run.grid(row)
            end = n_prefix + n_rows * n_cols
            build.example[row] = run.owners[image]
            number = run.numbers[image], run.packing.tile_number(run, image, tile)
            build.image_number[row, :end], build.tile[row, :end] = number
            build.kind[row, :n_prefix] = tower.prefix_kinds
            build.kind[row, n_prefix:end] = "patch"
            if not run.present[image]:
                build.kind[row] = "dropped"
            order = run.packing.order(run, row)
            r, c = np.divmod(order, n_cols)
            build.patch_row[row, n_prefix:end], build.patch_col[row, n_prefix:end] = r, c
            pixels, frame, size = (
                run.pixel_boxes(row)[order],
                run.packing.frame(run, image, tile),
                run.packing.size(run, row),
            )
            build.box[row, n_prefix:end] = frame.boxes(pixels)
            views.append((*number, (n_rows, n_cols), size, frame.area(*size), frame.size))
            at = np.arange(n_prefix, end)
            same = np.full(len(at), row)
            parts.append((same, at, same, at, r, c, np.ones(len(at)), build.box[row, at], pixels))
    build.patches = PatchSets.joined(parts)
    build.views = Views(*(np.array(part) for part in zip(*views, strict=True)))
    return build.done()


def _connector_map(run: ImageRun, pictures: TokenMap) -> dict[str, TokenMap]:
    """The positions behind a connector that merges patches, which are not the tower's: a row for each of the tower's."""
    connector = run.model.flow.connector_of(run.tower.name)
    if connector is None or not run.packing.merges("hook_out"):
        return {}
    build = _Builder(connector.name, run.n_rows, max(map(len, run.tokens)))
    build.example, build.views = pictures.example, pictures.views
    of_pictures = pictures.patches.by_position(pictures.kind.shape)
    parts: list[Any] = []
    for row, number, there, tokens in zip(run.firsts, run.numbers, run.present, run.tokens, strict=True):
        build.image_number[row, : len(tokens)] = number
        build.kind[row] = "padding" if there else "dropped"
        _place(build, tokens, pictures, of_pictures, row, np.arange(len(tokens)), parts)
    build.patches = PatchSets.joined(parts)
    _describe(build)
    return {connector.name: build.done()}


def _text_map(model: Wrapped, tower: Tower, run: ImageRun, pictures: TokenMap | None) -> TokenMap:
    ids = run.inputs.get("input_ids")
    read: Tensor = run.inputs["inputs_embeds"] if ids is None else ids
    build = _Builder(tower.name, *read.shape[:2])
    pieces = None if ids is None else model.pieces(ids)
    if pieces is not None:
        build.text[:] = np.array(pieces, dtype=object)
    if ids is None:
        build.kind[:] = "unknown"
    if pictures is not None and run.placeholders is not None:
        _place_images(build, run, pictures)
    mask = run.inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        build.kind[~mask.bool().cpu().numpy()] = "padding"
    return build.done()


def _place_images(build: _Builder, run: ImageRun, pictures: TokenMap) -> None:
    """Image features fill the placeholders of the prompts in their order."""
    assert run.placeholders is not None
    free = [row.nonzero().flatten().numpy() for row in run.placeholders.cpu()]
    used = [0] * len(free)
    of_pictures = pictures.patches.by_position(pictures.kind.shape)
    parts: list[Any] = []
    for example, number, tokens in zip(run.owners, run.numbers, run.tokens, strict=True):
        slots = free[example][used[example] : used[example] + len(tokens)]
        used[example] += len(tokens)
        build.image_number[example, slots] = number
        build.text[example, slots] = ""
        build.kind[example, slots[tokens.newline[: len(slots)]]] = "newline"
        _place(build, tokens, pictures, of_pictures, example, slots, parts)
    build.patches, build.views = PatchSets.joined(parts), pictures.views
    _describe(build)


def _place(
    build: _Builder,
    tokens: ImageTokens,
    pictures: TokenMap,
    of_pictures: Array,
    own: int,
    slots: Array,
    parts: list[Any],
) -> None:
    """Say what the positions of one image hold, at ``slots`` of row ``own``; the patches are added to ``parts``."""
    held = tokens.position < len(slots)
    slot, row, at = slots[tokens.position[held]], tokens.source_row[held], tokens.source_position[held]
    build.kind[own, slot] = pictures.kind[row, at]
    build.tile[own, slot] = pictures.tile[row, at]
    entry = of_pictures[row, at]
    # A class position among the features is no patch.
    there = entry >= 0
    several = PatchSets.taken(pictures.patches, entry[there])
    parts.append((np.full(there.sum(), own), slot[there], *several[2:6], tokens.weight[held][there], *several[7:]))


def _describe(build: _Builder) -> None:
    """Boxes of every position, and the one patch it holds, where it holds one."""
    sets, shape = build.patches, build.kind.shape
    flat = sets.row * shape[1] + sets.position
    build.box = union(sets.box, flat, shape[0] * shape[1]).reshape(*shape, 4)
    counts = np.bincount(flat, minlength=shape[0] * shape[1])
    alone = counts[flat] == 1
    for name in ("patch_row", "patch_col"):
        getattr(build, name)[sets.row[alone], sets.position[alone]] = getattr(sets, name)[alone]
    tiles = np.unique(np.stack([flat, sets.source_row], axis=1), axis=0)[:, 0]
    mixed = np.flatnonzero(np.bincount(tiles, minlength=shape[0] * shape[1]) > 1)
    build.tile.reshape(-1)[mixed] = -1


def _action_map(model: Wrapped, tower: Tower, inputs: Mapping[str, Any]) -> TokenMap:
    assert model.family.suffix_kinds is not None
    kinds = model.family.suffix_kinds(model.config)
    build = _Builder(tower.name, model.family.packing.n_examples(model, inputs), len(kinds))
    build.kind[:] = list(kinds)
    return build.done()
