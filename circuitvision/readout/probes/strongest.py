"""The state of an index of maximally activating examples while a data set streams by: the strongest examples of every unit, and sums for the means.

Both parts have a ``merged`` or ``+`` that is associative, so any cutting of a data set into batches or halves gives the same index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName
from circuitvision.model.tokens import TokenMap
from circuitvision.readout.patch_coords import places_of
from circuitvision.readout.probes.collected import ByTower, chosen_at_site
from circuitvision.readout.probes.splitting import is_whole
from circuitvision.readout.probes.streaming import Batch

_TENSORS = ("values", "example", "position", "places", "boxes")


@dataclass(frozen=True)
class Best:
    """The strongest examples of every unit, strongest first; every field is ``[unit rank …]``."""

    values: Tensor
    example: Tensor
    position: Tensor
    places: Tensor
    boxes: Tensor
    tokens: np.ndarray

    def first(self, top_k: int) -> Best:
        """The ``top_k`` strongest, in order; of equal values the example with the lower number comes first."""
        by_number = self.example.sort(dim=1, stable=True).indices
        by_value = self.values.gather(1, by_number).sort(dim=1, descending=True, stable=True).indices
        order = by_number.gather(1, by_value)[:, :top_k]
        units = torch.arange(len(order))[:, None]
        tensors = {name: getattr(self, name)[units, order] for name in _TENSORS}
        return Best(**tensors, tokens=self.tokens[units.numpy(), order.numpy()])

    def merged(self, other: Best, top_k: int) -> Best:
        """The ``top_k`` strongest of two sets of examples."""
        return _together([self, other], 1).first(top_k)

    @classmethod
    def of_units(cls, parts: Sequence[Best]) -> Best:
        """The units of several sites, one after the other."""
        return _together(parts, 0)


def _together(parts: Sequence[Best], dim: int) -> Best:
    tensors = {name: torch.cat([getattr(part, name) for part in parts], dim) for name in _TENSORS}
    return Best(**tensors, tokens=np.concatenate([part.tokens for part in parts], dim))


@dataclass(frozen=True)
class Sums:
    """What means are made of: examples, positions, and per unit the sum and maximum of its values, how often it was active,
    and the sum of its positive values in every class."""

    count: int
    n_positions: int
    total: Float[Tensor, " unit"]
    maximum: Float[Tensor, " unit"]
    active: Int[Tensor, " unit"]
    by_class: Float[Tensor, "class unit"]
    class_counts: Int[Tensor, " class"]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count,
            self.n_positions + other.n_positions,
            self.total + other.total,
            torch.maximum(self.maximum, other.maximum),
            self.active + other.active,
            self.by_class + other.by_class,
            self.class_counts + other.class_counts,
        )

    @classmethod
    def of_units(cls, parts: Sequence[Sums]) -> Sums:
        """The units of several sites, one after the other; their examples are the same."""
        return Sums(
            parts[0].count,
            parts[0].n_positions,
            torch.cat([part.total for part in parts]),
            torch.cat([part.maximum for part in parts]),
            torch.cat([part.active for part in parts]),
            torch.cat([part.by_class for part in parts], 1),
            parts[0].class_counts,
        )


class Units:
    """What a unit of some sites is, and its activations.

    Raises:
        InputError: sites of several kinds or towers, units that are no list of whole numbers, directions for a site with heads.
    """

    def __init__(self, sites: Sequence[str], units: Sequence[int] | None, through: Any) -> None:
        names = [SiteName.parse(site) for site in sites]
        if len({(name.tower, name.site) for name in names}) > 1:
            raise InputError(f"An index is of one kind of site of one tower; found {', '.join(sites[:3])}.")
        self.sites, self.through = list(sites), through
        self.chosen = _numbers(units)
        self.heads = names[0].has_heads
        if through is not None and self.heads:
            raise InputError(f"{sites[0]} has heads, whose length is taken; directions and encoders read other sites.")
        if isinstance(through, (Tensor, np.ndarray)):
            self.through = torch.atleast_2d(torch.as_tensor(through))
            self.kind = "direction"
        elif through is not None:
            encode = getattr(through, "encode", through)
            if not callable(encode):
                raise InputError(
                    "through is a tensor of directions [unit d_in], a function of activations, or something with .encode(x)."
                )
            self.through, self.kind = encode, "feature"
        elif self.heads:
            self.kind = "head"
        else:
            self.kind = "neuron" if names[0].site.startswith("mlp.") else "coordinate"

    def activations(self, x: Float[Tensor, "pos ..."]) -> Float[Tensor, "pos unit"]:
        """The activation of every unit at some positions."""
        if self.kind == "feature":
            found = self.through(x)
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x):
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise InputError(f"Features of {len(x)} positions must be a tensor [pos feature]; encode gave {shape}.")
            x = found.detach()
        x = x if x.dtype == torch.float64 else x.float()
        if self.kind == "direction":
            if x.shape[-1] != self.through.shape[1]:
                raise InputError(f"Directions have {self.through.shape[1]} coordinates, the site {x.shape[-1]}.")
            x = x @ self.through.to(x).T
        if self.chosen is not None:
            if not all(0 <= unit < x.shape[1] for unit in self.chosen):
                raise InputError(f"Units {self.chosen} are not all among the {x.shape[1]} of this site.")
            x = x[:, self.chosen]
        return x.norm(dim=-1) if self.heads else x

    def labels(self, count: int) -> list[Any]:
        """A label per unit of all sites: its number, behind the layer where there are several sites."""
        own = list(range(count // len(self.sites))) if self.chosen is None else self.chosen
        if len(self.sites) == 1:
            return own
        return [f"{SiteName.parse(site).layer}.{unit}" for site in self.sites for unit in own]


def _numbers(units: Any) -> list[int] | None:
    """The numbers of the units asked for; None for all."""
    if units is None:
        return None
    listed = units.tolist() if isinstance(units, (Tensor, np.ndarray)) else units
    listed = [listed] if is_whole(listed) else list(listed)
    if not listed or not all(is_whole(unit) for unit in listed) or len(set(listed)) < len(listed):
        raise InputError(
            f"units={units!r}: name at least one unit by its number, each once, or leave units out for all."
        )
    return [int(unit) for unit in listed]


class UnitReader:
    """Reduces a site's activations in one batch to its :class:`Best` and :class:`Sums`."""

    def __init__(
        self,
        units: Units,
        pool: str,
        positions: ByTower,
        threshold: float,
        start: int,
        codes: Int[Tensor, " example"] | None,
        n_classes: int,
        top_k: int,
    ) -> None:
        self.top_k = top_k
        self.units, self.pool, self.positions, self.threshold, self.start = units, pool, positions, threshold, start
        self.codes, self.n_classes = codes, n_classes

    def __call__(self, site: str, value: Tensor, batch: Batch) -> tuple[Best, Sums]:
        """Pool every example's positions; raises InputError for activations that are not finite."""
        tokens, dropped = batch.layout(site, value)
        lost = dropped is None
        if dropped is None:
            mask, dropped = torch.from_numpy(tokens.present.any(1, keepdims=True)), 0
        else:
            mask = chosen_at_site(tokens, dropped, self.positions, batch.examples)
        pooled, position, row, active, counts = self._pooled(value, tokens, mask, dropped, len(batch.examples))
        if not bool(torch.isfinite(pooled).all()):
            example = batch.examples[int((~torch.isfinite(pooled)).any(1).nonzero()[0])]
            raise InputError(f"{site} is not finite on example {example + self.start}, so its units have no order.")
        # Cut to top_k before places are looked up: a batch of all units of all layers has many times the numbers that are kept.
        values, order = pooled.T.sort(dim=1, descending=True, stable=True)
        values, order = values[:, : self.top_k], order[:, : self.top_k]
        row, position = row.T.gather(1, order), position.T.gather(1, order)
        best = Best(
            values=values,
            example=order + batch.examples.start + self.start,
            position=torch.full_like(position, -1) if lost else position,
            places=torch.full((*position.shape, 4), -1) if lost else places_of(tokens)[row, position],
            boxes=torch.full((*position.shape, 4), torch.nan) if lost else box_shares(tokens)[row, position],
            tokens=np.full(position.shape, "", dtype=object)
            if lost
            else _labels(tokens)[row.numpy(), position.numpy()],
        )
        return best, self._sums(pooled, active, counts, batch)

    def _pooled(
        self, value: Tensor, tokens: TokenMap, mask: Tensor, dropped: int, examples: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Per example and unit: the value, and position and row of the most active place; per unit: how often active; positions per example."""
        best, total, position, row, active = (torch.zeros(0),) * 5
        counts = torch.zeros(examples, dtype=torch.long)
        for number in mask.any(1).nonzero().flatten().tolist():
            where = mask[number].nonzero().flatten().to(value.device)
            rows = value[number][None] if value.ndim == 2 else value[number]
            found = self.units.activations(rows[where - dropped])
            top = found.max(0)
            example = int(tokens.example[number])
            if not len(best):
                best = found.new_full((examples, found.shape[1]), -torch.inf)
                position, row = torch.zeros_like(best, dtype=torch.long), torch.zeros_like(best, dtype=torch.long)
                total, active = torch.zeros_like(best), torch.zeros_like(position[0])
            # Not "larger": a value that is no number must show.
            better = ~(top.values <= best[example])
            best[example] = torch.where(better, top.values, best[example])
            position[example] = torch.where(better, where[top.indices], position[example])
            row[example] = torch.where(better, number, row[example])
            total[example] += found.sum(0)
            active += (found > self.threshold).sum(0)
            counts[example] += len(where)
        pooled = best.cpu() if self.pool == "max" else total.cpu() / counts[:, None]
        return pooled, position.cpu(), row.cpu(), active.cpu(), counts

    def _sums(self, pooled: Tensor, active: Tensor, counts: Tensor, batch: Batch) -> Sums:
        exact = pooled.double()
        by_class = exact.new_zeros(self.n_classes, exact.shape[1])
        class_counts = torch.zeros(self.n_classes, dtype=torch.long)
        if self.codes is not None:
            if len(self.codes) < batch.examples.stop:
                raise InputError(f"The data set has more examples than the {len(self.codes)} labels.")
            own = self.codes[batch.examples.start : batch.examples.stop]
            by_class.index_add_(0, own, exact.clamp(min=0))
            class_counts = torch.bincount(own, minlength=self.n_classes)
        return Sums(len(pooled), int(counts.sum()), exact.sum(0), exact.max(0).values, active, by_class, class_counts)


def box_shares(tokens: TokenMap) -> Float[Tensor, "row pos 4"]:
    """(left, top, right, bottom) of every patch as shares of its image; NaN where a position is no patch."""
    sets = tokens.patches
    size = np.full((*tokens.kind.shape, 2), np.nan)
    size[sets.row, sets.position] = tokens.views.picture[sets.source_row][:, ::-1]
    shares = tokens.box / np.concatenate([size, size], -1)
    shares[tokens.kind != "patch"] = np.nan
    return torch.from_numpy(shares).float()


def _labels(tokens: TokenMap) -> np.ndarray:
    found = np.empty(tokens.kind.shape, dtype=object)
    for row in range(tokens.n_rows):
        found[row] = tokens.labels(row)
    return found
