"""Selections: sets of positions of one tower, named by what is there rather than by number.

``tokens.image(0).box(8, 8, 24, 24)`` is the set of image-0 patches whose pixels overlap a box. Selections are sets (``|``, ``&``, ``-``, ``~``),
differ from row to row where the rows do, and are what edits take as ``positions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError

if TYPE_CHECKING:
    from circuitvision.model.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class Selection:
    """A set of positions of every row of one tower: ``mask`` is bool ``[row, pos]``."""

    tokens: TokenMap
    mask: np.ndarray
    label: str = ""

    @property
    def tower(self) -> str:
        """The tower whose positions these are."""
        return self.tokens.tower

    @property
    def tensor(self) -> Tensor:
        """The set as a bool tensor ``[row pos]``."""
        return torch.from_numpy(self.mask.copy())

    def positions(self, row: int = 0) -> list[int]:
        """The selected positions of one row."""
        return np.flatnonzero(self.mask[row]).tolist()

    def box(self, left: float, top: float, right: float, bottom: float, buffer: int = 0) -> Selection:
        """Those patches whose pixels overlap a box, and with ``buffer`` their neighbours up to that many patches away.

        The box is in the frame of ``tokens.box``: pixels of the tensor the tower reads, or of the original image where there are tiles.
        """
        if right <= left or bottom <= top:
            raise InputError(
                f"A box is (left, top, right, bottom) with left < right and top < bottom, not {(left, top, right, bottom)}."
            )
        pixels = self.tokens.box
        with np.errstate(invalid="ignore"):
            hit = (
                (pixels[..., 0] < right) & (pixels[..., 2] > left) & (pixels[..., 1] < bottom) & (pixels[..., 3] > top)
            )
        hit &= self.mask & (self.tokens.kind == "patch")
        if buffer:
            hit = self._grown(hit, buffer) & self.mask
        return self._with(hit, f"box({left:g}, {top:g}, {right:g}, {bottom:g})")

    def _grown(self, hit: np.ndarray, buffer: int) -> np.ndarray:
        tokens, grown = self.tokens, hit.copy()
        for row, position in zip(*hit.nonzero(), strict=True):
            near = (tokens.kind[row] == "patch") & (tokens.image_number[row] == tokens.image_number[row, position])
            near &= tokens.tile[row] == tokens.tile[row, position]
            for axis in (tokens.patch_row[row], tokens.patch_col[row]):
                near &= np.abs(axis - axis[position]) <= buffer
            grown[row] |= near
        return grown

    def kind(self, kind: str | Sequence[str]) -> Selection:
        """Those of one or several kinds, see ``circuitvision.model.tokens.KINDS``."""
        found = self.tokens.mask(kind).numpy()
        return self._with(self.mask & found, kind if isinstance(kind, str) else "+".join(kind))

    def patch(self, row: int | None = None, col: int | None = None) -> Selection:
        """The patches of one row or column of the image's grid, or the one patch where both are given."""
        hit = self.mask & (self.tokens.kind == "patch")
        hit = hit if row is None else hit & (self.tokens.patch_row == row)
        hit = hit if col is None else hit & (self.tokens.patch_col == col)
        return self._with(hit, f"patch({row}, {col})")

    def last(self) -> Selection:
        """The last selected position of every row."""
        found = np.zeros_like(self.mask)
        rows = np.flatnonzero(self.mask.any(1))
        found[rows, self.mask.shape[1] - 1 - self.mask[rows, ::-1].argmax(1)] = True
        return self._with(found, "last")

    def _with(self, mask: np.ndarray, label: str) -> Selection:
        return Selection(self.tokens, mask, f"{self.label}.{label}" if self.label else label)

    def _other(self, other: Selection) -> np.ndarray:
        if not isinstance(other, Selection) or other.tower != self.tower or other.mask.shape != self.mask.shape:
            raise InputError("Only selections of the same tower and run can be combined.")
        return other.mask

    def __or__(self, other: Selection) -> Selection:
        return Selection(self.tokens, self.mask | self._other(other), f"({self.label} | {other.label})")

    def __and__(self, other: Selection) -> Selection:
        return Selection(self.tokens, self.mask & self._other(other), f"({self.label} & {other.label})")

    def __sub__(self, other: Selection) -> Selection:
        return Selection(self.tokens, self.mask & ~self._other(other), f"({self.label} - {other.label})")

    def __invert__(self) -> Selection:
        return Selection(self.tokens, ~self.mask & (self.tokens.kind != "padding"), f"~{self.label}")

    def __provenance__(self) -> dict[str, Any]:
        return {"selection": self.label, "tower": self.tower, "mask": self.mask}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and other.tower == self.tower and np.array_equal(self.mask, other.mask)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __repr__(self) -> str:
        return f"Selection({self.tower}: {self.label or 'all'}, {len(self)} positions in {self.mask.shape[0]} rows)"
