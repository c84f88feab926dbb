"""What arrives at receivers through the allowed paths, and the edits that hand it to them: the two halves of a path patch.

*What arrives.* With the senders at their source values and every other head and branch held at its base value, but for those that paths may lead
through, a receiver's stream takes the value ``x_base + change``. It is computed in one of two ways, which agree:

* as a sum. On direct paths inside a tower whose branches are added to the stream, ``change = Σ written(source) - written(base)`` over the senders
  before the receiver, with ``tower.written``: output projection, LayerScale and sandwich norms included (heads of one branch together, as a norm
  behind them sees them). It costs no run.
* by a frozen run of the base: senders replaced by their source values, all others that could change by their base values, and the receivers' streams
  recorded. So go paths through chosen parts, paths from tower to tower (what lies between, connectors and keys that another tower reads, is
  computed by the model itself), and towers that normalise the sum. Frozen runs of several sets of senders are one batch of a prepared run,
  halved where memory runs out.

*What the receivers do with it* is an ordinary edit of the base run at the receivers' own sites, behind which everything runs freely; all cells are
one sweep.

Memory: the streams at the receivers of one batch of examples, once for each set of senders (of direct paths: one change for each of them).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.digests import plain
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps.batches import POSITIONS_PER_BATCH, halved, is_out_of_memory
from circuitvision.model.branches import AttentionBranch, Branch
from circuitvision.model.dead import last_live_block
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.windows import RunWindows
from circuitvision.model.positions import Positions
from circuitvision.patching.path_nodes import Node, Slot, changes, precedes
from circuitvision.patching.runs import Sides
from circuitvision.progress import Progress

Stream = Float[Tensor, "row pos d_model"]
Group = tuple[Edit, ...]


@dataclass(frozen=True)
class PathPlan:
    """What a path patch does: sets of senders and of receivers, and the pairs of them (by number) that a path can lead between."""

    senders: tuple[tuple[Node, ...], ...]
    receivers: tuple[tuple[Slot, ...], ...]
    cells: tuple[tuple[int, int], ...]
    through: frozenset[Node] = frozenset()
    positions: Any = None
    receiver_positions: Any = None
    joint: str = "add"

    def described(self) -> dict[str, Any]:
        """The plan in plain values: what must be equal for the numbers to be equal."""
        return {
            "senders": [list(map(str, one)) for one in self.senders],
            "receivers": [list(map(str, one)) for one in self.receivers],
            "cells": [list(cell) for cell in self.cells],
            "through": sorted(map(str, self.through)),
            "positions": plain(Positions.of(self.positions)),
            "receiver_positions": plain(Positions.of(self.receiver_positions)),
            "joint": self.joint,
        }

    @property
    def sites(self) -> list[str]:
        """The sites whose source values are read."""
        return list(dict.fromkeys(node.site for one in self.senders for node in one))

    def slots_behind(self, number: int) -> list[Slot]:
        """The slots that one set of senders is measured at."""
        return [slot for first, second in self.cells if first == number for slot in self.receivers[second]]


class PathEdits:
    """The groups of edits of a plan, made for one batch of examples: one group for each cell."""

    def __init__(self, model: Any, plan: PathPlan, progress: bool = False) -> None:
        self.model, self.plan, self.progress = model, plan, progress

    def __provenance__(self) -> dict[str, Any]:
        return self.plan.described()

    def __call__(self, sides: Sides) -> list[Group]:
        """The edits of every cell, in the order of the plan."""
        with torch.no_grad():
            arrivals = Arrivals(self.model, self.plan, sides, self.progress)
            return [tuple(self._edits(arrivals, first, second)) for first, second in self.plan.cells]

    def _edits(self, arrivals: Arrivals, first: int, second: int) -> Iterable[Edit]:
        receivers = self.plan.receivers[second]
        chained = len({(slot.tower, slot.place) for slot in receivers}) > 1
        together: dict[str, list[Slot]] = defaultdict(list)
        for slot in receivers:
            together[slot.site].append(slot)
        for site, slots in together.items():
            slot = slots[0]
            chosen = {one.head for one in slots if one.head is not None}
            heads = None if any(one.head is None for one in slots) else sorted(chosen)
            where: dict[str, Any] = {"heads": heads, "positions": arrivals.taken(self.plan.receiver_positions)}
            # Changes on top of what other receivers change; values where nothing else does, so that they arrive to the bit.
            if arrivals.is_sum(first) if not chained else self.plan.joint == "add":
                yield edits.steer(site, _beside_heads(slot, arrivals.change(first, slot)), **where)
            else:
                yield edits.replace(site, _beside_heads(slot, arrivals.value(first, slot)), **where)


def _beside_heads(slot: Slot, stream: Stream) -> Tensor:
    return stream.unsqueeze(-2) if slot.has_heads else stream


class Arrivals:
    """What arrives at every receiver from each set of senders, in one batch of examples."""

    def __init__(self, model: Any, plan: PathPlan, sides: Sides, progress: bool = False) -> None:
        self.model, self.plan, self.sides, self.progress = model, plan, sides, progress
        self.windows = RunWindows(model, sides.inputs)
        self._sums: dict[Any, Stream] = {}
        frozen = [number for number in dict.fromkeys(first for first, _ in plan.cells) if not self.is_sum(number)]
        held = {number: self._held(number) for number in frozen}
        names = [*plan.sites, *(slot.stream for one in plan.receivers for slot in one)]
        names += [site for sites in held.values() for site, _ in sites]
        self.base = model.run_with_cache(sides.inputs, names_filter=list(dict.fromkeys(names)))[1]
        self.source = {site: self._at_positions(site) for site in plan.sites}
        self._recorded = self._frozen_runs(held)

    def taken(self, positions: Any) -> Positions:
        """Positions as those of this batch's examples."""
        found = Positions.of(positions)
        return found if self.sides.rows is None else found.taken(self.sides.rows, self.sides.count)

    def change(self, number: int, slot: Slot) -> Stream:
        """What is added to the stream at a receiver."""
        if self.is_sum(number):
            before = tuple(node for node in self.plan.senders[number] if precedes(self.model, node, slot))
            return self._sum(before) if before else torch.zeros_like(self.base[slot.stream])
        return self._recorded[number][slot.stream] - self.base[slot.stream]

    def value(self, number: int, slot: Slot) -> Stream:
        """The stream at a receiver."""
        if self.is_sum(number):
            return self.base[slot.stream] + self.change(number, slot)
        return self._recorded[number][slot.stream]

    def _at_positions(self, site: str) -> Tensor:
        """The source's value of a site where senders take it, and the base's elsewhere."""
        source = self.sides.source[site]
        chosen = self.taken(self.plan.positions)
        if chosen.kind == "all":
            return source
        window = self.windows.of(site)
        if window is None:
            raise InputError(f"Positions of {site} are known only when the run gets there; leave positions out.")
        chosen.check(window, 0)
        mask = chosen.covers(window)[:, self.model.positions(site, self.sides.inputs)].to(source.device)
        base = self.base[site]
        return torch.where(mask.view(*mask.shape, *[1] * (base.ndim - 2)), source, base)

    # -- as a sum ------------------------------------------------------------------------------------------------------------------------------

    def is_sum(self, number: int) -> bool:
        """Whether what arrives from a set of senders is a sum of what they add."""
        senders, slots = self.plan.senders[number], self.plan.slots_behind(number)
        stages = {node.stage for node in senders} | {slot.tower for slot in slots}
        if self.plan.through or len(stages) > 1 or not stages <= set(self.model.towers):
            return False
        enters = any(node.place[0] < 0 and not node.site.endswith(".hook_input") for node in senders)
        blocks = self.model.towers[next(iter(stages))].blocks
        return not enters and not any(branch.sum_norm for block in blocks for branch in block.branches)

    def _sum(self, senders: tuple[Node, ...]) -> Stream:
        if senders not in self._sums:
            heads: dict[str, list[int]] = defaultdict(list)
            for node in senders:
                if node.head is not None:
                    heads[node.site].append(node.head)
            wholes = [node.site for node in senders if node.head is None]
            parts = [self.source[site] - self.base[site] for site in wholes]
            parts += [self._written(site, chosen) for site, chosen in heads.items() if not self._covered(site, wholes)]
            self._sums[senders] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return self._sums[senders]

    def _written(self, site: str, heads: Sequence[int]) -> Stream:
        """What some heads of a branch add in the source's place minus what they add in the base run."""
        tower, base = self.model.towers[site.partition(".")[0]], self.base[site]
        mixed = base.clone()
        mixed[:, :, list(heads)] = self.source[site][:, :, list(heads)].to(base)
        return tower.written(site, mixed) - tower.written(site, base)

    def _covered(self, site: str, wholes: Iterable[str]) -> bool:
        """Whether the whole of what a branch adds is a sender beside its heads."""
        return any(branch.added == whole.rpartition(".")[2] for branch, whole in _branches_at(self.model, site, wholes))

    # -- by a frozen run -----------------------------------------------------------------------------------------------------------------------

    def _held(self, number: int) -> list[tuple[str, tuple[int, ...] | None]]:
        """The sites, and their heads (None for all), that keep their base values while one set of senders is patched."""
        senders = self.plan.senders[number]
        found: list[tuple[str, tuple[int, ...] | None]] = []
        wholes = {node.site for node in (*senders, *self.plan.through) if node.head is None}
        free: dict[str, set[int]] = defaultdict(set)
        for node in (*senders, *self.plan.through):
            if node.head is not None:
                free[node.site].add(node.head)
        for prefix, branch in self._before(self.plan.slots_behind(number)):
            tower, added = branch.block.tower, f"{prefix}.{branch.added}"
            inner = f"{prefix}.{branch.inner}"
            if added in wholes or not any(
                changes(self.model, n, branch, tower.name, branch.block.layer) for n in senders
            ):
                continue
            if isinstance(branch, AttentionBranch) and free[inner]:
                rest = tuple(head for head in range(tower.cfg.n_heads) if head not in free[inner])
                found += [(inner, rest)] if rest else []
            else:
                found.append((added, None))
        return found

    def _before(self, slots: Sequence[Slot]) -> Iterable[tuple[str, Branch]]:
        """The branches that receivers can depend on, with the prefix of their block."""
        for name, tower in self.model.towers.items():
            if name not in self.windows.maps:
                continue
            last = last_live_block(tower, self.sides.inputs)
            ends = [slot.place for slot in slots if slot.tower == name]
            leads = any(self.model.flow.reaches(name, slot.tower) for slot in slots)
            for block in tower.blocks[: last + 1]:
                for branch in block.branches:
                    read = leads or any((block.layer, branch.number) < end for end in ends)
                    # What the last prefix block of a tower that is read by its keys alone adds goes nowhere.
                    if read and not self.model.is_dead(f"{block.prefix}.{branch.added}", self.sides.inputs):
                        yield block.prefix, branch

    def _frozen_runs(
        self, held: Mapping[int, Sequence[tuple[str, tuple[int, ...] | None]]]
    ) -> dict[int, dict[str, Stream]]:
        """The receivers' streams by set of senders."""
        found: dict[int, dict[str, Stream]] = {number: {} for number in held}
        if not held:
            return found
        first = {number: min((self._order(node), node.place) for node in self.plan.senders[number]) for number in held}
        numbers = sorted(held, key=first.__getitem__)
        size, waiting = self._batch_size(), numbers
        starts = list(dict.fromkeys(node.site for number in held for node in self.plan.senders[number]))
        with (
            self.model.prepared(self.sides.inputs, start=starts) as run,
            Progress(len(numbers), "frozen runs", self.progress) as bar,
        ):
            while waiting:
                part = waiting[:size]
                try:
                    run([self._frozen(number, held[number], found[number]) for number in part])
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    size = halved(len(part), error)
                    continue
                waiting = waiting[len(part) :]
                bar.advance(len(part))
        return found

    def _order(self, node: Node) -> int:
        return self.model.flow.stages.index(node.stage)

    def _batch_size(self) -> int:
        """How many frozen runs are one batch."""
        positions = max(tokens.n_rows * tokens.n_positions for tokens in self.windows.maps.values())
        return max(1, POSITIONS_PER_BATCH.get(self.model.device.type, POSITIONS_PER_BATCH["cpu"]) // positions)

    def _frozen(
        self, number: int, held: Sequence[tuple[str, tuple[int, ...] | None]], found: dict[str, Stream]
    ) -> list[Edit]:
        """Edits of a run in which one set of senders is patched, and which leaves the receivers' streams in ``found``."""
        senders = self.plan.senders[number]
        wholes = [node.site for node in senders if node.head is None]
        heads: dict[str, list[int]] = defaultdict(list)
        for node in senders:
            if node.head is not None and not self._covered(node.site, wholes):
                heads[node.site].append(node.head)
        group = [edits.replace(site, self.source[site]) for site in dict.fromkeys(wholes)]
        group += [edits.replace(site, self.source[site], heads=sorted(set(chosen))) for site, chosen in heads.items()]
        group += [edits.replace(site, self.base[site], heads=chosen) for site, chosen in held]
        streams = dict.fromkeys(slot.stream for slot in self.plan.slots_behind(number))
        return group + [edits.apply(stream, _into(found, stream)) for stream in streams]


def _branches_at(model: Any, site: str, wholes: Iterable[str]) -> Iterable[tuple[Branch, str]]:
    """The branch of a site of heads, with each of ``wholes`` that is of its block."""
    tower, _, rest = site.partition(".")
    layer, name = int(rest.split(".")[1]), rest.split(".", 2)[2]
    for branch in model.towers[tower].blocks[layer].branches:
        if branch.inner == name:
            yield from ((branch, whole) for whole in wholes if whole.startswith(f"{tower}.blocks.{layer}."))


def _into(found: dict[str, Stream], site: str) -> Callable[[Tensor, Any], None]:
    """A function that keeps what a run has at a site."""

    def keep(value: Tensor, hook: Any) -> None:
        found[site] = value.clone()

    return keep
