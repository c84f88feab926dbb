"""One model and one run, with what several checks of it need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from circuitvision.hooked import HookedModel
from circuitvision.model.block import Block
from circuitvision.model.sites import SiteName
from circuitvision.model.tower import Tower


class Trial:
    """One model and one run, with what several checks need."""

    def __init__(self, model: HookedModel, inputs: Mapping[str, Any], layers: Iterable[int] | None) -> None:
        self.model, self.inputs = model, dict(inputs)
        with torch.no_grad():
            self.output = model(self.inputs).detach()
            self.eager, self.cache = model.run_with_cache(self.inputs, "**")
        self.layers = None if layers is None else set(layers)

    @property
    def rounding(self) -> float:
        """How far two ways of computing one number may lie apart, relative to its size."""
        eps = torch.finfo(self.output.dtype).eps
        return max(2e3 * eps, 1e-5)

    def far(self, found: Tensor, expected: Tensor) -> bool:
        """Whether two tensors differ by more than rounding."""
        if found.shape != expected.shape:
            return True
        size = float(expected.abs().nan_to_num(0.0).amax().clamp_min(1e-6))
        gap = (found.double() - expected.double()).abs().nan_to_num(0.0)
        return float(gap.amax()) > self.rounding * size

    def value(self, site: str) -> Tensor | None:
        """What a site held; None where the run did not pass it, or more than once."""
        found = self.cache.get(site)
        if not isinstance(found, Tensor):
            return None
        filler = self._filler(SiteName.parse(site), found)
        return found if filler is None else found.masked_fill(filler, torch.nan)

    def _filler(self, name: SiteName, value: Tensor) -> Tensor | None:
        """Cells that only fill up rows of images that a tower computes in one sequence: nothing is computed there."""
        if not self.model.family.packing.in_sequence or name.tower not in self.model.towers or name.is_pattern:
            return None
        kinds = self.model.tokens(self.inputs)[name.tower].kind
        if not self.model.towers[name.tower].stack.image or value.shape[:2] != kinds.shape:
            return None
        padding = torch.from_numpy(kinds == "padding").to(value.device)
        return padding.view(*kinds.shape, *[1] * (value.ndim - 2))

    def blocks(self, tower: Tower) -> list[Block]:
        """The chosen blocks of a tower."""
        return [block for block in tower.blocks if block.layer in self._chosen(tower)]

    def _chosen(self, tower: Tower) -> set[int]:
        count = tower.cfg.n_layers
        return {0, count // 2, count - 1} if self.layers is None else self.layers

    def sites(self) -> list[str]:
        """The sites of the chosen layers, in the order of the pass; without a choice of the first, the middle and the last one of each tower."""
        found = []
        for name in self.model.sites():
            site = SiteName.parse(name)
            if site.layer is None or name not in self.cache:
                found += [name] if name in self.cache else []
                continue
            found += [name] if site.layer in self._chosen(self.model.towers[site.tower]) else []
        return found
