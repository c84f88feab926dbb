"""Effects of changing some units of a model while slots of others are held, and their split by the next selected node: see
:mod:`circuitvision.circuits.importance`.

One :class:`PathEffects` holds the runs, what a change of a unit is, and the values that held slots keep. All cells of a table are one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from circuitvision.circuits.units import Unit
from circuitvision.metrics.effects import restored_share
from circuitvision.model.edits.base import Edit, EditGroup, by_digest
from circuitvision.patching.components import Place, merged
from circuitvision.patching.runs import Measured, Runs
from circuitvision.statistics import standard_error

ANSWER = "answer"
ROUNDING = 3e-6
"""Share of the metric's size that float32 runs of different batches may differ by."""


class PathEffects:
    """Runs of the base in which some units are changed and slots of others held at their base values."""

    def __init__(
        self,
        model: Any,
        runs: Runs,
        change: Callable[[Place], Edit],
        options: Mapping[str, Any],
    ) -> None:
        self.model, self.runs, self.change, self.options = model, runs, change, dict(options)
        self.held: dict[str, Any] = {}
        self.groups: list[EditGroup] = []

    def effects(self, cells: Sequence[tuple[Sequence[Unit], Sequence[Place]]], folder: str) -> tuple[Measured, Tensor]:
        """What was measured, and the change of the metric ``[metric cell example]`` with some units changed and some places held, in each cell."""
        groups = [tuple(self._writes(changed, held)) for changed, held in cells]
        self.groups += map(by_digest, groups)
        save_to = self.options.get("save_to")
        inside = None if save_to is None else Path(save_to) / folder
        measured = self.runs.measure(groups, **{**self.options, "save_to": inside})
        return measured, measured.values - measured.base[:, None]

    def _writes(self, changed: Sequence[Unit], held: Sequence[Place]) -> list[Edit]:
        moved = [place for unit in changed for place in unit.places]
        kept = [place.replaced(self.model, self.held[place.site]) for place in merged(held)]
        return [self.change(place) for place in merged(moved)] + kept

    def edges(self, nodes: Sequence[Unit]) -> list[dict[str, Any]]:
        """The effects of nodes, which come in the order of computation, split by what carries them."""
        held = list(dict.fromkeys(site for node in nodes for site in node.held_sites))
        self.held = self.runs.holds(held) if held else {}
        cells: list[tuple[Unit, str, str, list[Place]]] = []
        for number, sender in enumerate(nodes):
            cells.append((sender, "", "", []))
            done: list[Place] = []
            for receiver in nodes[number + 1 :]:
                # A remaining effect of zero is no reason to stop here: paths of opposite sign may cancel in it.
                if not receiver.slots or receiver.depth == sender.depth:
                    continue
                for letter, places in receiver.slots:
                    cells.append((sender, receiver.id, letter, [*done, *places]))
                done += receiver.slots[-1][1]
        measured, changes = self.effects([([sender], held) for sender, _, _, held in cells], "edges")
        effects, found = changes[0], []
        for number, (sender, to, letter, _) in enumerate(cells):
            if to:
                found.append(_edge(sender.id, to, letter, effects[number - 1] - effects[number]))
            if number + 1 == len(cells) or cells[number + 1][0] is not sender:
                found.append(_edge(sender.id, ANSWER, "in", effects[number]))
        # Runs of different batches round differently: below that, a difference is no edge.
        floor = ROUNDING * float((measured.source - measured.base)[0].nan_to_num(0.0).abs().mean())
        floor += ROUNDING * float(measured.base[0].abs().mean())
        return [edge for edge in found if abs(edge["score"]) > floor]


def wholes(
    units: Iterable[Unit], effects: Iterable[Tensor], measured: Measured, kind: str
) -> dict[str, dict[str, Any]]:
    """Site, effect and share of the units of a kind, by id."""
    return {
        unit.id: {
            "site": unit.sites[0],
            "effect": float(effect.mean()),
            "share": float(restored_share(effect, measured.base[0], measured.source[0])),
        }
        for unit, effect in zip(units, effects, strict=True)
        if unit.kind == kind
    }


def _edge(sender: str, receiver: str, slot: str, scores: Tensor) -> dict[str, Any]:
    error = float(standard_error(scores).nan_to_num(0.0))
    return {"sender": sender, "receiver": receiver, "slot": slot, "score": float(scores.mean()), "se": error}
