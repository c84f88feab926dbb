"""The images of one run: how many rows of the vision tower each takes, which example owns it, and the prompt positions it fills.

An :class:`ImageRun` is a family's :class:`~circuitvision.model.packing.base.Packing` at work on the inputs of one run; what it finds is worked out
once. Settings may be given with the call: they are read there first, then in the config (:func:`setting`).

Not covered: inputs of several runs at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.model.patches import Array, PatchEmbedding
from circuitvision.model.settings import setting

if TYPE_CHECKING:
    from circuitvision.model.packing.base import Packing
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped


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
