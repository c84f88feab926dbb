"""Runs in which chosen edges of the computational graph carry what their senders write in another run: the one mechanism of masks on edges.

With a mask ``m`` ``[sender slot]`` slot ``d`` reads

    ``x_d + Σ_s m_sd (a_s(source) - a_s(this run))``

in place of the stream ``x_d``. A masked edge (1) carries the value of the source run, exactly; an edge that is left (0) carries what its sender
writes in this very run, from inputs that masks may have changed. Without a mask this is the base run, with every edge masked the source run, with
all edges out of a node masked the base run with that node patched. Masks in between interpolate, and have gradients. Where a norm follows a branch,
its heads are mixed before the norm, as it sees them together.

:class:`Interchange` makes the edits of such runs (interchange interventions on a circuit: mask everything that is not in it), :class:`EdgeEdits`
those that mask one edge after another: there everything before the slot is the base run's, so that one ordinary edit of one slot is enough, and a
sweep computes what lies behind it alone.

Not covered: other values than those of a source run; masks that differ by position.

Reference: Goldowsky-Dill et al. 2023 (arXiv 2304.05969), Hanna et al. 2024 (arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision import edits
from circuitvision.circuits.computational_graph import ComputationalGraph, Sender
from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError
from circuitvision.model.branches import branch_at
from circuitvision.model.edits.base import Edit
from circuitvision.patching.runs import Sides

Mask = Float[Tensor, "sender slot"] | Bool[Tensor, "sender slot"]


class Source(dict[str, Tensor]):
    """What the sites of a graph hold in a source run; runs that share it share its digest."""

    @cached_property
    def digest(self) -> str:
        """The digest of all values."""
        return of_json(plain(dict(self)))


class Interchange:
    """Edits of runs of a model on some inputs, in which masked edges carry the source's values.

    ``source`` holds what the sites of ``graph`` have in the source run, at the base run's positions. ``reads`` keeps, of the last run, what every
    slot's site read, and ``writes`` what every sender's site held. While it runs, what each sender would change is held as well, for all slots behind
    it: one stream per sender, ``row × pos × d_model × senders``, let go when the last slot has read.
    """

    def __init__(
        self, model: Any, graph: ComputationalGraph, inputs: Mapping[str, Any], source: Mapping[str, Tensor]
    ) -> None:
        self.model, self.graph, self.inputs = model, graph, inputs
        self.source = source if isinstance(source, Source) else Source(source)
        self.tokens = model.tokens(inputs)
        self.writes: dict[str, Tensor] = {}
        self.reads: dict[str, Tensor] = {}
        self._changes: dict[str, tuple[Tensor, Tensor]] = {}

    def edits(self, mask: Mask) -> tuple[Edit, ...]:
        """One group of edits: the run with this mask.

        Raises:
            InputError: a mask of another shape, or one that masks what is no edge.
        """
        if tuple(mask.shape) != tuple(self.graph.edges.shape):
            raise InputError(
                f"A mask is [sender slot], {list(self.graph.edges.shape)}; this one is {list(mask.shape)}."
            )
        held = mask.detach().to("cpu") != 0
        beside = held & ~self.graph.edges
        if bool(beside.any()):
            row, column = beside.nonzero()[0].tolist()
            raise InputError(
                f"The mask holds {self.graph.sender_ids[row]}->{self.graph.slot_ids[column]}, which is no edge."
            )
        # The gradient of a mask is asked for where it is 0, too.
        held = self.graph.edges if mask.requires_grad else held
        found: list[Edit] = [
            edits.apply(site, self._kept(site))
            for site in self.graph.sites
            if bool(held[self.graph.senders_at(site)].any())
        ]
        mixed = {}
        for site in dict.fromkeys(one.slot.site for one in self.graph.slots):
            numbers = self.graph.slots_at(site)
            read = [one for one in self.graph.sites if bool(held[self.graph.senders_at(one)][:, numbers].any())]
            if read:
                mixed[site] = read
        last = {one: site for site, read in mixed.items() for one in read}
        found += [
            edits.apply(site, self._mixed(site, read, mask[:, self.graph.slots_at(site)], last))
            for site, read in mixed.items()
        ]
        return tuple(found)

    def _kept(self, site: str) -> _Written:
        return _Written(self, site)

    def _mixed(
        self, site: str, read: Sequence[str], mask: Float[Tensor, "sender slot"], last: Mapping[str, str]
    ) -> _Mixed:
        return _Mixed(self, site, tuple(read), mask, frozenset(one for one in read if last[one] == site))

    def change(
        self, site: str, value: Tensor, mask: Float[Tensor, "sender slot"]
    ) -> Float[Tensor, "row pos slot d_model"]:
        """What masked senders at a site add to the streams of some slots, in the place of ``value``."""
        senders = [self.graph.senders[number] for number in self.graph.senders_at(site)]
        tower = self.model.towers[senders[0].tower]
        if senders[0].node.head is not None and branch_at(tower, site)[0].then.normed:
            # Heads are mixed before the norm, as it sees them together.
            away = self.source[site].to(value) - value
            mixed = value.unsqueeze(2) + mask.T[None, None, :, :, None] * away.unsqueeze(2)
            return tower.written(site, mixed) - tower.written(site, value).unsqueeze(2)
        return mask.T @ self._alone(site, value, senders)

    def _alone(self, site: str, value: Tensor, senders: Sequence[Sender]) -> Float[Tensor, "row pos sender d_model"]:
        """What each sender at a site adds to the stream in the place of ``value``, alone; computed once for all slots that read it."""
        known = self._changes.get(site)
        if known is not None and known[0] is value:
            return known[1]
        away, tower = self.source[site].to(value) - value, self.model.towers[senders[0].tower]
        if senders[0].node.head is not None:
            branch, _ = branch_at(tower, site)
            found = tower.head_tangents(branch.block.layer, value, away, branch.name)
        else:
            found = torch.stack([away * images_of(self.tokens, sender).to(away) for sender in senders], 2)
        self._changes[site] = value, found
        return found


@dataclass(frozen=True, eq=False)
class _Written:
    """Keeps what a site holds."""

    runs: Interchange
    site: str

    def __call__(self, value: Tensor, hook: Any) -> None:
        self.runs.writes[self.site] = value

    def __provenance__(self) -> dict[str, Any]:
        return {"keeps": self.site}


@dataclass(frozen=True, eq=False)
class _Mixed:
    """Puts what masked senders wrote in the source run in the place of what they wrote in this one.

    What the senders of ``done`` would change is let go: no slot behind this one reads it.
    """

    runs: Interchange
    site: str
    read: tuple[str, ...]
    mask: Float[Tensor, "sender slot"]
    done: frozenset[str]

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        runs, added = self.runs, None
        for one in self.read:
            part = runs.change(one, runs.writes[one], self.mask[runs.graph.senders_at(one)].to(value))
            # In place: one stream per slot is held, and not one per slot and site.
            added = part if added is None else added.add_(part)
            if one in self.done:
                runs._changes.pop(one, None)
        assert added is not None
        new = value + (added if value.ndim == 4 else added.squeeze(2)).to(value)
        runs.reads[self.site] = new
        return new

    def __provenance__(self) -> dict[str, Any]:
        return {"slot": self.site, "mask": self.mask, "source": self.runs.source.digest}


def images_of(tokens: Mapping[str, Any], sender: Sender) -> Float[Tensor, "row pos 1"]:
    """1 at the positions that a sender writes: all, those of images (a connector), or all others."""
    if sender.images is None:
        return torch.ones(1, 1, 1)
    number = torch.from_numpy(tokens[sender.tower].image_number)
    return ((number >= 0) == sender.images).unsqueeze(-1)


class EdgeEdits:
    """The groups of edits that mask one edge of a mask after another, made for one batch of examples."""

    def __init__(self, model: Any, graph: ComputationalGraph, mask: Bool[Tensor, "sender slot"]) -> None:
        self.model, self.graph, self.mask = model, graph, mask & graph.edges

    def __provenance__(self) -> dict[str, Any]:
        return {"graph": self.graph, "mask": self.mask}

    def __call__(self, sides: Sides) -> list[tuple[Edit, ...]]:
        """One group for each edge, by sender, then slot."""
        with torch.no_grad():
            base = self.model._values_at(sides.inputs, self.graph.sites)[1]
            runs = Interchange(self.model, self.graph, sides.inputs, sides.source)
            found: list[tuple[Edit, ...]] = []
            for site in self.graph.sites:
                senders = self.graph.senders_at(site)
                if not bool(self.mask[senders].any()):
                    continue
                # Each sender alone: as many slots as there are senders, each of which reads one of them.
                changes = runs.change(site, base[site], torch.eye(len(senders)).to(base[site]))
                runs._changes.clear()
                for place, row in enumerate(senders):
                    found += [
                        self._edit(column, changes[:, :, place])
                        for column in self.mask[row].nonzero().flatten().tolist()
                    ]
            return found

    def _edit(self, column: int, change: Float[Tensor, "row pos d_model"]) -> tuple[Edit, ...]:
        slot = self.graph.slots[column].slot
        if slot.has_heads:
            return (edits.steer(slot.site, change.unsqueeze(-2), heads=[slot.head]),)
        return (edits.steer(slot.site, change),)
