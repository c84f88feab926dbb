"""Towers that run all images in one sequence without an axis of rows: their values as rows of images, and back.

Such a tower (Qwen2-VL's, NaViT) computes ``[position …]``, the positions of all images one after the other, and its attention keeps them apart by a
block-diagonal mask, ``[1 head position position]``. Hooks see the same numbers as any other tower's: ``[row pos …]``, a row per image, filled up to
the longest; patterns are the blocks on the diagonal. What fills up is 0 (denominators: 1; scores: the dtype's smallest number), and what a hook
writes there is dropped.

Not covered: attention that is called once for every image (its scores and patterns are refused), and rows of several images each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from circuitvision.errors import HookError
from circuitvision.model.points import Callback
from circuitvision.model.sites import SiteName


class Sequences:
    """Which stages compute one sequence, and how long every row of it is in the run at hand; the wrapper says both."""

    def __init__(self) -> None:
        self.stages: frozenset[str] = frozenset()
        """Towers and connectors."""
        self.lengths_of: Callable[[], Callable[[Mapping[str, Any]], dict[str, Sequence[int]]] | None] = _nobody
        """Gives what tells the lengths from the inputs of a run, by tower, and by site for connectors."""
        self.lengths: dict[str, Sequence[int]] = {}

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Note the lengths of a run."""
        if self.stages:
            found = self.lengths_of()
            self.lengths = {} if found is None or inputs.get("pixel_values") is None else found(inputs)

    def holds(self, site: str) -> bool:
        """Whether a site's values are one sequence."""
        return SiteName.parse(site).tower in self.stages

    def by_rows(self, site: str, fire: Callback) -> Callback:
        """The callback of a site, which gets rows where the value is one sequence."""
        if not self.holds(site):
            return fire
        name = SiteName.parse(site)
        split = _split_pattern if name.is_pattern else _split

        def fire_rows(value: Tensor) -> tuple[Tensor, bool]:
            lengths = self.lengths.get(name.tower, self.lengths.get(site))
            if lengths is None:
                raise HookError(
                    f"{site} ran, and nothing says how long its images are: give the model's inputs as keywords."
                )
            rows, back = split(name, value, lengths)
            new, changed = fire(rows)
            return (back(new), True) if changed else (value, False)

        return fire_rows


def _nobody() -> None:
    return None


Back = Callable[[Tensor], Tensor]


def _there(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which cells ``[row pos]`` hold something, and which entry of the sequence each holds (empty ones: any)."""
    count = torch.tensor(list(lengths), device=device)
    at = torch.arange(int(count.max()), device=device)
    there = at < count[:, None]
    entry = (at + (count.cumsum(0) - count)[:, None]).clamp(max=int(count.sum()) - 1)
    return there, entry


def as_rows(sequence: Tensor, lengths: Sequence[int], fill: float = 0.0) -> Tensor:
    """A sequence ``[position …]`` as rows ``[row pos …]``."""
    there, entry = _there(lengths, sequence.device)
    mask = there.view(*there.shape, *[1] * (sequence.ndim - 1))
    return torch.where(mask, sequence[entry], torch.full((), fill, dtype=sequence.dtype, device=sequence.device))


def as_sequence(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows ``[row pos …]`` as a sequence ``[position …]``, without what fills them up."""
    return rows[_there(lengths, rows.device)[0]]


def _split(name: SiteName, value: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Back]:
    axes, total = 4 if name.has_heads else 3, sum(lengths)
    batched = value.ndim == axes
    sequence = value[0] if batched else value
    if value.ndim not in (axes, axes - 1) or (batched and len(value) != 1) or len(sequence) != total:
        raise HookError(
            f"{name} is {list(value.shape)}, and the images of this run take {total} positions {list(lengths)} in one sequence: the packing of this "
            "family does not say what the tower computes."
        )
    rows = as_rows(sequence, lengths, 1.0 if name.stage == "hook_scale" else 0.0)
    return rows, lambda new: as_sequence(new, lengths)[None] if batched else as_sequence(new, lengths)


def _split_pattern(name: SiteName, value: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Back]:
    total = sum(lengths)
    if value.ndim != 4 or value.shape[0] != 1 or tuple(value.shape[2:]) != (total, total):
        raise HookError(
            f"{name} is {list(value.shape)}, and this tower runs {len(lengths)} images of {total} positions in one sequence: attention that is "
            "called for every image by itself has no pattern of all. Ask for other sites: names_filter='**.hook_z', for example."
        )
    there, entry = _there(lengths, value.device)
    both = (there[:, :, None] & there[:, None])[:, None]
    blocks = value[0][:, entry[:, :, None], entry[:, None]].transpose(0, 1)
    fill = torch.finfo(value.dtype).min if name.stage == "hook_attn_scores" else 0.0
    rows = torch.where(both, blocks, torch.full((), fill, dtype=value.dtype, device=value.device))

    def back(new: Tensor) -> Tensor:
        row, query, key = both[:, 0].nonzero(as_tuple=True)
        whole = value[0].clone()
        whole[:, entry[row, query], entry[row, key]] = new[row, :, query, key].T
        return whole[None]

    return rows, back
