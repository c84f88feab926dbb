"""Gaussian noise at a site, drawn for each example by what it is: the corrupted run of causal tracing.

The ``n``-th position of an example that is there gets the same noise whichever batch the example runs in, however its prompt is filled up, and in
every edit of one site and seed. Noise is drawn for the positions of the prompt; tokens generated later keep their values.

Source: ROME (Meng et al. 2022, arXiv 2202.05262), which adds noise of three standard deviations of the embeddings to the subject's tokens.

Not covered: sites with heads or without positions, and noise drawn anew in every pass (denoising steps get the same).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from circuitvision.errors import InputError, checked_seed
from circuitvision.model.edits.base import Edit, EditContext, source_length
from circuitvision.model.edits.values import Steps, StepsLike
from circuitvision.model.edits.writes import width_of
from circuitvision.model.positions import Positions, PositionsLike, PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.tokens import TokenMap
    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True, repr=False)
class AddNoise(Edit):
    """See :func:`circuitvision.edits.add_noise`."""

    kind: ClassVar[str] = "add_noise"
    scale: float = 1.0
    seed: int = 0

    @property
    def does_nothing(self) -> bool:
        return self.scale == 0.0

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        name = SiteName.parse(site)
        absent = window is None or window.tokens is None or window.axis.absent
        if absent or name.has_heads or width_of(model, site) is None:
            raise InputError(
                f"noise is drawn for each position of a tower, and {site} is not [row pos d]: take the tower's hook_embed, or a site of its stream"
            )

    def source_end(self, site: str, ndim: int, given: Mapping[Any, Any]) -> int | None:
        length = source_length(given.get((self, site)), ndim)
        return None if length in (None, 1) else length

    def new(self, x: Tensor, at: EditContext) -> Any:
        """``x' = x + σ ε``."""
        return x + self.scale * at.pick(at.given[(self, at.site)], x)


def add_noise(
    site: str, scale: float, *, seed: int = 0, positions: PositionsLike = None, steps: StepsLike = None
) -> Edit:
    """Add Gaussian noise: ``x' = x + scale · ε`` with every coordinate of ``ε`` standard normal.

    ``scale`` is in the units of the site; ROME takes three times :func:`circuitvision.data.embedding_std`. Noise is drawn by the seed and by what the
    example is, so it is the same in every batch and at every filling of the prompt; another seed is another draw of all examples. At
    ``"language.hook_embed"`` with the positions of a word it corrupts that word; positions of pictures take their features
    behind that site, so noise on them belongs at ``"language.hook_input"``.

    Raises InputError for a scale below 0; before the run, at a site that is not ``[row pos d]`` (Meng et al. 2022, arXiv 2202.05262).
    """
    if not hasattr(checked_seed(seed), "__index__"):
        raise InputError(f"seed={seed!r} is no seed: give a whole number, 0 or more.")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.number, Tensor)) or not float(scale) >= 0:
        raise InputError(f"scale={scale!r} is not understood: a standard deviation from 0 on.")
    return AddNoise(site, None, Positions.of(positions), Steps.of(steps), float(scale), int(seed))


class Noise:
    """The standard normal numbers of one run, by site and seed."""

    def __init__(self, model: Wrapped, inputs: Mapping[str, Any], maps: Mapping[str, TokenMap]) -> None:
        self.model, self.inputs, self.maps = model, inputs, maps
        self._contents: dict[str, list[str]] = {}
        self._drawn: dict[tuple[str, int], Tensor] = {}

    def of(self, site: str, seed: int, tower: str, there: np.ndarray) -> Tensor:
        """``ε`` ``[row pos d]`` of a site, 0 where nothing is; ``there`` ``[row pos]`` are the positions of its own axis that hold something."""
        if (site, seed) not in self._drawn:
            width = width_of(self.model, site)
            assert width is not None
            found = np.zeros((*there.shape, width), np.float32)
            rows: dict[int, int] = {}
            for row, example in enumerate(self.maps[tower].example.tolist()):
                # Images of one example have noise of their own.
                rows[example] = rows.get(example, -1) + 1
                rng = np.random.default_rng([seed, int(self._content(tower)[example][:15], 16), rows[example]])
                found[row, there[row]] = rng.standard_normal((int(there[row].sum()), width), np.float32)
            self._drawn[site, seed] = torch.from_numpy(found).to(self.model.device)
        return self._drawn[site, seed]

    def _content(self, tower: str) -> list[str]:
        """What every example of a tower is."""
        from circuitvision.model.data_draws import content_of

        if tower not in self._contents:
            inputs, maps = self.inputs, self.maps
            if self.model.is_dual:
                # Examples of a dual encoder are the rows of one of its towers.
                of_images = self.model.family.packing.of_images
                images = self.model.towers[tower].stack.image
                inputs = {name: value for name, value in inputs.items() if (name in of_images) == images}
                maps = {tower: maps[tower]}
            count = max(tokens.n_examples for tokens in maps.values())
            self._contents[tower] = [content_of(self.model, inputs, maps, example) for example in range(count)]
        return self._contents[tower]
