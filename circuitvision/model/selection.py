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

    def box(
        self,
        left: float | Sequence[Any] | np.ndarray | Tensor,
        top: float | None = None,
        right: float | None = None,
        bottom: float | None = None,
        buffer: int = 0,
    ) -> Selection:
        """Those positions that hold a patch whose pixels overlap a box, and with ``buffer`` also its neighbours up to that many patches away.

        A position that mixes several patches belongs to the box if any of them does.

        One box ``(left, top, right, bottom)`` lies at the same place in every picture. ``box(boxes)`` gives each its own: an array ``[row, 4]`` or
        ``[example, 4]``, or a list of boxes in which None stands for none. The box is in the frame of ``tokens.box``: pixels of the tensor the tower
        reads, or of the original image where there are tiles.

        Raises InputError for boxes without area, or neither one per row nor one per example.
        """
        edges, label = self._edges(left, top, right, bottom)
        patches = self.mask & (self.tokens.kind == "patch")
        sets = self.tokens.patches
        own = np.broadcast_to(edges, (self.tokens.n_rows, 4))[sets.row]
        hit = self.tokens.overlapping(own) & patches[sets.row, sets.position]
        if buffer:
            hit = self._grown(hit, buffer)
        return self._with(sets.mask(hit, patches.shape) & patches, label)

    def _edges(self, first: Any, top: Any, right: Any, bottom: Any) -> tuple[np.ndarray, str]:
        """The box of every row, ``[row or 1, 4]`` (NaN: none), and how it was asked for."""
        if isinstance(first, Sequence) or (isinstance(first, np.ndarray | Tensor) and first.ndim > 0):
            if (top, right, bottom) != (None, None, None):
                raise InputError("Give one box as four numbers, or boxes as one array [row, 4].")
            edges = self._of_rows([(np.nan,) * 4 if box is None else box for box in first])
            label = f"boxes of {len(first)}"
        else:
            if None in (top, right, bottom):
                raise InputError("A box is four numbers, (left, top, right, bottom); boxes are an array [row, 4].")
            edges = np.array([[first, top, right, bottom]], dtype=float)
            label = f"box({', '.join(f'{float(edge):g}' for edge in edges[0])})"
        wrong = (edges[:, 2] <= edges[:, 0]) | (edges[:, 3] <= edges[:, 1])
        if wrong.any():
            box = tuple(edges[wrong][0].tolist())
            raise InputError(f"A box is (left, top, right, bottom) with left < right and top < bottom, not {box}.")
        return edges, label

    def _of_rows(self, boxes: Sequence[Any]) -> np.ndarray:
        """Boxes given per row or per example, per row."""
        try:
            edges = np.array([[float(edge) for edge in box] for box in boxes])
        except (TypeError, ValueError) as error:
            raise InputError(
                "Boxes are an array [row, 4], or a list of (left, top, right, bottom) and None; one box is box(*edges)."
            ) from error
        tokens = self.tokens
        if edges.shape[1:] != (4,) or len(edges) not in (tokens.n_rows, tokens.n_examples):
            raise InputError(
                f"There are boxes {list(edges.shape)} for {tokens.n_rows} rows of the {self.tower} tower and {tokens.n_examples} examples; "
                "give one box of four numbers for each."
            )
        if len(edges) == tokens.n_examples == tokens.n_rows and not tokens.rows_are_examples:
            raise InputError(
                f"{len(edges)} boxes may be one per example or one per row of the {self.tower} tower, which are in another order: select the rows of "
                "each image with tokens.image(number) and give boxes for an example with several images one after the other."
            )
        return edges if len(edges) == tokens.n_rows else edges[tokens.example]

    def _grown(self, hit: np.ndarray, buffer: int) -> np.ndarray:
        """The entries of patches up to ``buffer`` away from those that were hit, in the same row of the vision tower."""
        sets, grown = self.tokens.patches, hit.copy()
        places = np.stack([sets.row, sets.source_row, sets.patch_row, sets.patch_col], axis=1)
        for row, source_row, down, across in np.unique(places[hit], axis=0):
            near = (sets.row == row) & (sets.source_row == source_row)
            near &= (np.abs(sets.patch_row - down) <= buffer) & (np.abs(sets.patch_col - across) <= buffer)
            grown |= near
        return grown

    def kind(self, kind: str | Sequence[str]) -> Selection:
        """Those of one or several kinds, see ``circuitvision.model.tokens.KINDS``."""
        found = self.tokens.mask(kind).numpy()
        return self._with(self.mask & found, kind if isinstance(kind, str) else "+".join(kind))

    def patch(self, row: int | None = None, col: int | None = None) -> Selection:
        """The positions that hold a patch of one row or column of the image's grid, or the one patch where both are given.

        A position that mixes several patches belongs to each of them.
        """
        sets = self.tokens.patches
        hit = np.ones(len(sets.row), bool) if row is None else sets.patch_row == row
        hit = hit if col is None else hit & (sets.patch_col == col)
        patches = self.mask & (self.tokens.kind == "patch")
        return self._with(sets.mask(hit, patches.shape) & patches, f"patch({row}, {col})")

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
        return Selection(self.tokens, ~self.mask & self.tokens.present, f"~{self.label}")

    def __provenance__(self) -> dict[str, Any]:
        return {"selection": self.label, "tower": self.tower, "mask": self.mask}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and other.tower == self.tower and np.array_equal(self.mask, other.mask)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __repr__(self) -> str:
        return f"Selection({self.tower}: {self.label or 'all'}, {len(self)} positions in {self.mask.shape[0]} rows)"
