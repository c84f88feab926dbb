"""How the towers of a model feed each other: a graph of towers and connectors.

A :class:`Connector` takes what one or several towers give and hands it to another tower: as entries of its stream, through a module
(``via="stream"``: a projector), as what keys and values of some of its blocks are made of (``via="cross"``: cross-attention, through a module or
not), or block by block as keys and values themselves (``via="cache"``: PI0's prefix, which its action expert reads). A family lists its
connectors; a :class:`Flow` answers what follows from the list: the order in which things run, what a change can reach, whose keys a tower
sees. Towers without a connector between them do not feed each other: a dual encoder compares what both give.

Not covered: circles (a tower that feeds itself at the next step).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from circuitvision.errors import InputError

Path = str | tuple[str, ...]


@dataclass(frozen=True)
class Connector:
    """What leads from one or several towers to another."""

    sources: tuple[str, ...]
    target: str
    path: Path | None = None
    """The module that makes of what the sources give what the target reads; None where it reads their keys and values, or their stream."""
    name: str = "projector"
    """Prefix of its sites, ``{name}.hook_in`` and ``{name}.hook_out``."""
    via: Literal["stream", "cross", "cache"] = "stream"


class Flow:
    """The graph of one family's towers (in the order in which they run) and connectors.

    Raises:
        InputError: connectors that contradict the towers or each other.
    """

    def __init__(self, towers: Sequence[str], connectors: Sequence[Connector], answer: str = "") -> None:
        self.towers, self.connectors = tuple(towers), tuple(connectors)
        self.answer = answer or self.towers[-1]
        """The tower whose head gives the model's output."""
        if self.answer not in self.towers:
            raise InputError(f"answer={answer!r} is no tower; the towers are {', '.join(self.towers)}.")
        for number, connector in enumerate(self.connectors):
            problem = self._problem(connector, self.connectors[:number])
            if problem:
                raise InputError(f"{connector!r}: {problem}.")

    def _problem(self, connector: Connector, before: Sequence[Connector]) -> str:
        """What is wrong with a connector, in words; "" if nothing is."""
        if not isinstance(connector.sources, tuple) or not connector.sources:
            return "sources is a tuple of towers, one alone is written ('vision',)"
        unknown = [name for name in (*connector.sources, connector.target) if name not in self.towers]
        if unknown:
            return f"{unknown[0]!r} is no tower; the towers are {', '.join(self.towers)}"
        if max(map(self.towers.index, connector.sources)) >= self.towers.index(connector.target):
            return f"{connector.target} does not run after {' and '.join(connector.sources)}: towers are listed in the order in which they run"
        if connector.via == "cache":
            return (
                "keys and values are read from one source, without a module"
                if connector.path or len(connector.sources) > 1
                else ""
            )
        if connector.via not in ("stream", "cross"):
            return f"via={connector.via!r} is neither 'stream' nor 'cross' nor 'cache'"
        if not connector.path and (connector.via == "stream" or len(connector.sources) > 1):
            return "path is missing, the module that makes of what the sources give what the target reads"
        if not connector.path:
            return ""
        if connector.name in (*self.towers, *(one.name for one in before if one.path)):
            return f"the name {connector.name!r} is taken: give it another one, name=…"
        twice = [name for name in connector.sources if any(one.path and name in one.sources for one in before)]
        return f"{twice[0]} is read by another connector already" if twice else ""

    @property
    def is_dual(self) -> bool:
        """Whether there are several towers, which do not feed each other but are compared at the end."""
        return len(self.towers) > 1 and not self.connectors

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Towers and the connectors that are modules, in the order in which they run."""
        out: list[str] = []
        for tower in self.towers:
            out.append(tower)
            out += [one.name for one in self.modules if set(one.sources) <= set(out) and one.name not in out]
        return tuple(out)

    @cached_property
    def modules(self) -> tuple[Connector, ...]:
        """The connectors that are modules, with sites of their own."""
        return tuple(one for one in self.connectors if one.path)

    def connector(self, name: str) -> Connector | None:
        """The connector whose sites begin with a name; None for a tower's."""
        return next((one for one in self.modules if one.name == name), None)

    def connector_of(self, tower: str) -> Connector | None:
        """The connector that is a module and reads a tower; None if there is none."""
        return next((one for one in self.modules if tower in one.sources), None)

    def feeds_cache(self, tower: str) -> bool:
        """Whether a tower reaches what follows through its keys and values alone."""
        return any(one.via == "cache" and tower in one.sources for one in self.connectors)

    def cache_of(self, tower: str) -> str:
        """The tower whose keys and values a tower sees before its own; "" if there is none."""
        return next((one.sources[0] for one in self.connectors if one.via == "cache" and one.target == tower), "")

    def is_fed(self, tower: str) -> bool:
        """Whether entries of a tower's stream are made of what others give."""
        return any(one.target == tower and one.via == "stream" for one in self.connectors)

    def crossed_by(self, tower: str) -> Connector | None:
        """The connector through which blocks of other towers attend to a tower; None if there is none."""
        return next((one for one in self.connectors if one.via == "cross" and tower in one.sources), None)

    @property
    def only_streams(self) -> bool:
        """Whether towers feed each other through their streams alone."""
        return all(one.via == "stream" for one in self.connectors)

    def is_last(self, tower: str) -> bool:
        """Whether a stage is a tower that feeds no other one."""
        return tower in self.towers and not any(tower in one.sources for one in self.connectors)

    @cached_property
    def _reached(self) -> dict[str, frozenset[str]]:
        reached: dict[str, frozenset[str]] = {}
        for stage in reversed(self.stages):
            connector = self.connector(stage)
            if connector is not None:
                after = [connector.target]
            else:
                after = [one.name if one.path else one.target for one in self.connectors if stage in one.sources]
            reached[stage] = frozenset(after).union(*(reached[one] for one in after))
        return reached

    def reaches(self, stage: str, other: str) -> bool:
        """Whether a change in one tower or connector can change another one."""
        return other in self._reached[stage]

    def is_reached(self, stage: str, starts: Iterable[str]) -> bool:
        """Whether a change in any of the given towers or connectors can change another one."""
        return any(self.reaches(start, stage) for start in starts)

    def first_of(self, stages: Iterable[str]) -> list[str]:
        """Those of the given towers and connectors that no other of them reaches, in the order in which they run."""
        chosen = set(stages)
        return [stage for stage in self.stages if stage in chosen and not self.is_reached(stage, chosen - {stage})]

    def tower_of(self, stage: str) -> str:
        """The tower whose positions and passes a stage has: its own, or the first that a connector reads."""
        connector = self.connector(stage)
        return stage if connector is None else connector.sources[0]
