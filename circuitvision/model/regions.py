"""Regions: positions said by what is there, each example having its own.

A region is a value without a model: it meets the token map of a run (:meth:`Region.where`) and says which positions it holds there, ``[row pos]``.
Boxes and masks lie in the pixels of the original pictures. A position belongs to one by the share of what it reads that lies inside: its patch, or
the weighted mean over its patches where it mixes several. Where a patch lies in its picture is taken from the token map of tiled images, and of
others from the processor, which is run on coordinates (:mod:`circuitvision.model.picture_boxes`); without a processor the picture is taken to have
been resized as a whole.

Whatever is given per example is given for the data set; a run of some of its examples says which (``examples``), so that regions, random ones
among them, do not depend on batches.

Not covered: options that were given to the processor call by call; regions in video; words across two towers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError
from circuitvision.model.edits.values import TensorRef
from circuitvision.model.words import in_a_row, spans_of

if TYPE_CHECKING:
    from circuitvision.model.tokens import TokenMap

Array = np.ndarray
RegionType = TypeVar("RegionType", bound="Region")
REGIONS: dict[str, type[Region]] = {}
"""Kind of region -> its class; files name kinds so."""


@dataclass(frozen=True, repr=False)
class Region:
    """Positions of their own in every example; made by :mod:`circuitvision.regions`."""

    name: str = field(default="", compare=False, kw_only=True)
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.kind:
            REGIONS[cls.kind] = cls

    def where(self, tokens: TokenMap, examples: Sequence[int]) -> Array:
        """Which positions it holds, bool ``[row pos]``; ``examples`` are the numbers in the data set of the run's examples."""
        raise NotImplementedError

    @property
    def n_examples(self) -> int | None:
        """For how many examples it is given one by one; None where it serves any number."""
        return None

    @property
    def label(self) -> str:
        """What axes and figures call it: its name, or else how it was made."""
        return self.name or self._label()

    def _label(self) -> str:
        return self.kind

    def named(self: RegionType, name: str) -> RegionType:
        """The same region under a name."""
        return dataclasses.replace(self, name=name)

    @property
    def digest(self) -> str:
        """SHA-256 over what it is made of; its name is no part of it."""
        return of_json(plain(self))

    def __provenance__(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        return {"region": self.kind, **fields}

    def __repr__(self) -> str:
        count = "" if self.n_examples is None else f", {self.n_examples} examples"
        return f"Region({self.label}{count})"


def _own(items: Sequence[Any], number: int, what: str) -> Any:
    """The entry of an example of the data set; of a single one that serves all, that one."""
    if not 0 <= number < len(items):
        raise InputError(f"There are {what} of {len(items)} examples, and example {number} runs: give one per example.")
    return items[number]


# -- pictures ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class OfPictures(Region):
    """A part of each example's picture, in its pixels."""

    size: tuple[tuple[int, int], ...] | None = None
    """Height and width of the pictures, of one that serves all or of each; None: pixels are those of ``TokenMap.box``."""
    image: int | None = 0
    threshold: float = 0.0

    def cells(self, example: int) -> tuple[Array, Array, Array] | None:
        """The part as cells of a grid: edges down, edges across, and which cells are inside; None where the example has none."""
        raise NotImplementedError

    def size_of(self, example: int) -> tuple[int, int] | None:
        """Height and width of an example's picture."""
        if self.size is None:
            return None
        return self.size[0] if len(self.size) == 1 else _own(self.size, example, "picture sizes")

    def drawn(self, example: int) -> Tensor | None:
        """The part as truth values ``[height width]``; None where the example has none. InputError where the picture's size is not known."""
        size, part = self.size_of(example), self.cells(example)
        if part is None:
            return None
        if size is None:
            raise InputError(f"{self!r} does not say how large its pictures are: give size=(height, width).")
        down, across, inside = part
        middles = [
            np.searchsorted(edges, np.arange(n) + 0.5) - 1 for edges, n in zip((down, across), size, strict=True)
        ]
        ends = [(at >= 0) & (at < cells) for at, cells in zip(middles, inside.shape, strict=True)]
        found = inside[np.ix_(*(at.clip(0, cells - 1) for at, cells in zip(middles, inside.shape, strict=True)))] > 0
        return torch.from_numpy(found & ends[0][:, None] & ends[1][None])

    def where(self, tokens: TokenMap, examples: Sequence[int]) -> Array:
        sets, shape = tokens.patches, tokens.kind.shape
        is_patch = tokens.kind == "patch"
        if is_patch.any() and not len(sets.row):
            raise InputError(f"{self!r} needs to know where patches lie: give tokens=model.tokens(inputs).")
        inside, whole = np.zeros(shape), np.zeros(shape)
        held = is_patch[sets.row, sets.position]
        if self.image is not None:
            held &= tokens.image_number[sets.row, sets.position] == self.image
        owner = tokens.example[sets.row]
        for example, number in enumerate(examples):
            entries = np.flatnonzero(held & (owner == example))
            part = self.cells(number) if len(entries) else None
            if part is None:
                continue
            boxes = boxes_in_picture(tokens, entries, self.size_of(number))
            if self.size is None:
                self._check(part, boxes)
            there = np.isfinite(boxes).all(1)
            entries, boxes = entries[there], boxes[there]
            weight, at = np.abs(sets.weight[entries]), (sets.row[entries], sets.position[entries])
            np.add.at(inside, at, weight * share_inside(boxes, *part))
            np.add.at(whole, at, weight)
        # Rounding must not make a patch that lies outside touch the region.
        return (whole > 0) & (inside > (self.threshold + 1e-9) * whole)

    def _check(self, part: tuple[Array, Array, Array], boxes: Array) -> None:
        return


def boxes_in_picture(tokens: TokenMap, entries: Array, size: tuple[int, int] | None) -> Array:
    """The pixels of a picture of ``size`` (height, width) that entries of ``tokens.patches`` read, ``[entry 4]``; NaN for padding.

    Raises InputError where such a picture does not give a tensor of the size that the run has.
    """
    sets, views = tokens.patches, tokens.views
    if size is None:
        return sets.box[entries]
    if not len(views.size):
        raise InputError("Where pictures lie in the tensors is not known here: give tokens=model.tokens(inputs).")
    rows = sets.source_row[entries]
    found = np.full((len(entries), 4), np.nan)
    for row in np.unique(rows).tolist():
        own = rows == row
        tensor, picture = tuple(map(int, views.size[row])), views.picture[row]
        whole = np.allclose(views.frame[row], (0, 0, tensor[1], tensor[0])) and tuple(picture) == tensor
        frame, made = None, tensor
        if tokens.picture_frame is not None and whole:
            frame, made = tokens.picture_frame(size)
        if frame is not None and made == tensor:
            found[own] = frame.boxes(sets.pixels[entries[own]])
        elif frame is not None and size != tensor:
            raise InputError(
                f"A picture of {size[0]} × {size[1]} becomes a tensor of {made[0]} × {made[1]} in this model's processor, and the run reads one of "
                f"{tensor[0]} × {tensor[1]}: give size= of the pictures, or of the tensors if they were made without it."
            )
        else:
            down, across = size[0] / picture[0], size[1] / picture[1]
            found[own] = sets.box[entries[own]] * [across, down, across, down]
    return found


def share_inside(boxes: Array, down: Array, across: Array, cells: Array) -> Array:
    """The share of every box ``[n 4]`` that lies in the marked cells of a grid with these edges, exactly."""
    left, top, right, bottom = boxes.T[:, :, None]
    tall = (np.minimum(bottom, down[1:]) - np.maximum(top, down[:-1])).clip(0)
    wide = (np.minimum(right, across[1:]) - np.maximum(left, across[:-1])).clip(0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return ((tall @ cells) * wide).sum(1) / area


@dataclass(frozen=True, repr=False)
class Box(OfPictures):
    """See :func:`circuitvision.regions.box`."""

    kind = "box"
    boxes: TensorRef | None = None
    """``[example box 4]``, infinite where there are fewer; one entry where ``shared``."""
    shared: bool = False

    @property
    def n_examples(self) -> int | None:
        return None if self.shared or self.boxes is None else len(self.boxes.tensor)

    def _boxes(self, example: int) -> Array:
        assert self.boxes is not None
        all_boxes = self.boxes.tensor
        own = all_boxes[0] if self.shared else _own(list(all_boxes), example, "boxes")
        found = own.double().cpu().numpy()
        return found[np.isfinite(found).all(1)]

    def cells(self, example: int) -> tuple[Array, Array, Array] | None:
        boxes = self._boxes(example)
        if not len(boxes):
            return None
        across, down = np.unique(boxes[:, [0, 2]]), np.unique(boxes[:, [1, 3]])
        inside = np.zeros((len(down) - 1, len(across) - 1))
        for left, top, right, bottom in boxes:
            inside[np.ix_((down[:-1] >= top) & (down[1:] <= bottom), (across[:-1] >= left) & (across[1:] <= right))] = 1
        return down, across, inside

    def _check(self, part: tuple[Array, Array, Array], boxes: Array) -> None:
        down, across, _ = part
        known = boxes[np.isfinite(boxes).all(1)]
        if len(known) and (
            down[0] >= known[:, 3].max() or across[0] >= known[:, 2].max() or min(down[-1], across[-1]) <= 0
        ):
            raise InputError(
                f"The box ({across[0]:g}, {down[0]:g}, {across[-1]:g}, {down[-1]:g}) lies outside what is read, which ends at pixel "
                f"({known[:, 2].max():g}, {known[:, 3].max():g}): boxes are (left, top, right, bottom) in pixels of the pictures; "
                "say how large those are with size=(height, width)."
            )


@dataclass(frozen=True, repr=False)
class Mask(OfPictures):
    """See :func:`circuitvision.regions.mask`."""

    kind = "mask"
    masks: tuple[TensorRef | None, ...] = ()
    shared: bool = False

    @property
    def n_examples(self) -> int | None:
        return None if self.shared else len(self.masks)

    def _mask(self, example: int) -> Tensor | None:
        held = self.masks[0] if self.shared else _own(self.masks, example, "masks")
        return None if held is None else held.tensor

    def size_of(self, example: int) -> tuple[int, int] | None:
        mask = self._mask(example)
        own = None if mask is None else (int(mask.shape[0]), int(mask.shape[1]))
        return super().size_of(example) if self.size is not None else own

    def cells(self, example: int) -> tuple[Array, Array, Array] | None:
        mask, size = self._mask(example), self.size_of(example)
        if mask is None or size is None or not bool(mask.any()):
            return None
        down, across = (np.linspace(0, whole, cells + 1) for whole, cells in zip(size, mask.shape, strict=True))
        return down, across, mask.cpu().numpy().astype(float)


# -- words and numbers ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Words(Region):
    """See :func:`circuitvision.regions.words`."""

    kind = "words"
    words: tuple[Any, ...] = ()
    """Of every example its words; one entry where ``shared``."""
    shared: bool = True
    which: int | None = None

    @property
    def n_examples(self) -> int | None:
        return None if self.shared else len(self.words)

    def _label(self) -> str:
        return " or ".join(map(repr, self.words[0])) if self.shared else "words"

    def where(self, tokens: TokenMap, examples: Sequence[int]) -> Array:
        found = np.zeros(tokens.kind.shape, bool)
        texts = tokens.kind == "text"
        if texts.any() and not (tokens.text != "").any():
            raise InputError(
                f"{self!r} needs the text of positions, which takes a tokenizer: wrap the model with its processor."
            )
        for row, example in enumerate(tokens.example):
            words = self.words[0] if self.shared else _own(self.words, examples[example], "words")
            places, pieces = in_a_row(np.flatnonzero(texts[row]), tokens.text[row])
            spans = sorted({span for word in words for span in spans_of(word, pieces)})
            if self.which is not None:
                spans = spans[self.which : self.which + 1 or None]
            for first, last in spans:
                found[row, places[first : last + 1]] = True
        return found


@dataclass(frozen=True, repr=False)
class At(Region):
    """See :func:`circuitvision.regions.at`."""

    kind = "at"
    numbers: tuple[int | None, ...] = ()

    @property
    def n_examples(self) -> int | None:
        return len(self.numbers)

    def where(self, tokens: TokenMap, examples: Sequence[int]) -> Array:
        found, width = np.zeros(tokens.kind.shape, bool), tokens.n_positions
        for row, example in enumerate(tokens.example):
            number = _own(self.numbers, examples[example], "positions")
            if number is None:
                continue
            if not -width <= number < width:
                raise InputError(
                    f"position {number} of example {examples[example]} is outside the {width} positions of the {tokens.tower} tower"
                )
            found[row, number] = True
        return found


# -- made of others ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Others(Region):
    """See :func:`circuitvision.regions.others`."""

    kind = "others"
    region: Region | None = None

    @property
    def n_examples(self) -> int | None:
        assert self.region is not None
        return self.region.n_examples

    def _label(self) -> str:
        return f"others than {self.region.label}" if self.region else self.kind

    def where(self, tokens: TokenMap, examples: Sequence[int]) -> Array:
        assert self.region is not None
        inside = self.region.where(tokens, examples) & tokens.present
        return outside(tokens, inside)


def outside(tokens: TokenMap, inside: Array) -> Array:
    """The positions of the same kinds and images as those inside, example by example, that are not among them."""
    found = np.zeros_like(inside)
    for example in range(tokens.n_examples):
        rows = np.flatnonzero(tokens.example == example)
        kinds, images = tokens.kind[rows], tokens.image_number[rows]
        here = inside[rows]
        for kind, image in set(zip(kinds[here].tolist(), images[here].tolist(), strict=True)):
            found[rows] |= (kinds == kind) & (images == image) & ~here
    return found


@dataclass(frozen=True, repr=False)
class RandomLike(Region):
    """See :func:`circuitvision.regions.random_like`."""

    kind = "random_like"
    region: Region | None = None
    seed: int = 0

    @property
    def n_examples(self) -> int | None:
        assert self.region is not None
        return self.region.n_examples

    def _label(self) -> str:
        return f"random like {self.region.label} (seed {self.seed})" if self.region else self.kind

    def where(self, tokens: TokenMap, examples: Sequence[int]) -> Array:
        assert self.region is not None
        inside = self.region.where(tokens, examples) & tokens.present
        found = np.zeros_like(inside)
        for example, number in enumerate(examples):
            rows = tokens.example == example
            generator = np.random.default_rng([self.seed, number])
            for kind in np.unique(tokens.kind[inside & rows[:, None]]).tolist():
                own = inside & rows[:, None] & (tokens.kind == kind)
                free = np.flatnonzero(outside(tokens, own))
                # An example without room for as many has no control.
                if len(free) >= own.sum():
                    found.flat[generator.choice(free, int(own.sum()), replace=False)] = True
        whole = np.array(
            [found[tokens.example == n].sum() == inside[tokens.example == n].sum() for n in range(tokens.n_examples)]
        )
        return found & whole[tokens.example][:, None]


@dataclass(frozen=True, repr=False)
class Found(Region):
    """Positions that were found in one run, such as the patches that a map marks."""

    kind = "found"
    tower: str = ""
    mask: TensorRef | None = None
    """``[row pos]``, all positions of the tower."""
    example: tuple[int, ...] = ()
    """Example of each row."""
    how: str = ""

    @property
    def n_examples(self) -> int | None:
        return max(self.example) + 1 if self.example else 0

    @property
    def counts(self) -> tuple[int, ...]:
        """How many positions of each example belong to it."""
        assert self.mask is not None
        per_row = self.mask.tensor.sum(1).tolist()
        return tuple(
            sum(n for n, owner in zip(per_row, self.example, strict=True) if owner == example)
            for example in range(self.n_examples or 0)
        )

    def _label(self) -> str:
        return self.how or self.kind

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.counts[:8])) + ", …" * (len(self.counts) > 8)
        return f"Region({self.label}: {shown} positions)"

    def where(self, tokens: TokenMap, examples: Sequence[int]) -> Array:
        assert self.mask is not None
        mask = self.mask.tensor.cpu().numpy()
        if tokens.tower != self.tower:
            raise InputError(f"{self!r} was found in the {self.tower} tower, not in {tokens.tower}.")
        if mask.shape[1] != tokens.n_positions:
            raise InputError(
                f"{self!r} was found in rows of {mask.shape[1]} positions, and these have {tokens.n_positions}: find it in the same inputs."
            )
        owners, found = np.array(self.example), np.zeros(tokens.kind.shape, bool)
        for example, number in enumerate(examples):
            mine, theirs = np.flatnonzero(tokens.example == example), np.flatnonzero(owners == number)
            if len(mine) != len(theirs):
                raise InputError(
                    f"{self!r} has {len(theirs)} rows of example {number}, the run {len(mine)}: find it in the same inputs."
                )
            found[mine] = mask[theirs]
        return found


@dataclass(frozen=True, repr=False)
class HighNorm(Found):
    """See :func:`circuitvision.regions.high_norm`."""

    kind = "high_norm"
    threshold: float = 0.0
    """The norm above which positions belong to it."""

    def __repr__(self) -> str:
        return super().__repr__().removesuffix(")") + f", norm above {self.threshold:.4g})"


@dataclass(frozen=True, repr=False)
class Area(Found):
    """Connected patches of one image; see :meth:`circuitvision.readout.attention.contrast.AttentionContrast.regions`."""

    kind = "area"
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """The smallest box around them, in the frame of ``TokenMap.box``."""
    mass: float = 0.0
    patches: tuple[tuple[int, int], ...] = ()
    """Row and column of each on the patch grid."""


def high_norm_mask(
    norms: Tensor, counted: Tensor, threshold: float | None, times: float, count: int | None
) -> tuple[Tensor, float]:
    """The positions that stand out among those counted, ``[row pos]``, and the norm above which they do."""
    exact = norms.double()
    limit = times * float(exact[counted].median()) if threshold is None else float(threshold)
    if count is None:
        return counted & (exact > limit), limit
    ranked = exact.masked_fill(~counted, float("-inf"))
    found = (
        torch.zeros_like(counted).scatter_(1, ranked.topk(min(count, ranked.shape[1]), dim=1).indices, True) & counted
    )
    limit = float(exact[found].min()) if bool(found.any()) else limit
    return found, limit
