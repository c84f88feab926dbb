"""Spans: named parts of the positions of a run, so that what happens at places of different number can be added up over examples.

A span is chosen as positions are everywhere (kinds, regions, numbers, ``"last"``, functions), for every tower, or for some by a mapping of towers.
What no span names is the span ``rest``, so that spans are a partition and sums over them are sums over all positions.

Not covered: positions in several spans.

Reference: Haklay et al. 2025 (ACL), position-aware automatic circuit discovery.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.digests import plain
from circuitvision.errors import InputError
from circuitvision.model.positions import Positions

REST = "rest"


class Spans:
    """A partition of the positions of every tower; ``given`` maps names to positions, or is ``"position"``: each a span of its own.

    Raises:
        InputError: no span, a name that is no word, or ``"rest"``.
    """

    def __init__(self, given: Mapping[str, Any] | str) -> None:
        self.each = isinstance(given, str)
        if isinstance(given, str):
            if given != "position":
                raise InputError(f"spans={given!r} is not understood: 'position', or a mapping of names to positions.")
            self.chosen: dict[str, dict[str, Positions]] = {}
            return
        wrong = [name for name in given if not isinstance(name, str) or not name or name == REST]
        if wrong or not given:
            raise InputError(
                f"Spans are a mapping of names to positions, {{'object': …}}; {wrong or 'none'} is no name ('{REST}' is what is left)."
            )
        self.chosen = {
            name: {tower: Positions.of(one) for tower, one in (own if isinstance(own, Mapping) else {"": own}).items()}
            for name, own in given.items()
        }

    def labels(self, count: int) -> list[Any]:
        """The labels of the axis, for so many positions at most."""
        return list(range(count)) if self.each else [*self.chosen, REST]

    def masks(
        self, model: Any, inputs: Any, rows: list[int] | None = None, count: int = 0, only: str = ""
    ) -> dict[str, Float[Tensor, "row pos span"]]:
        """1 where a position of a tower is in a span; ``rows`` are the places of the examples in a data set of ``count``; ``only`` one tower's.

        Raises:
            InputError: a position in two spans, a tower that did not run.
        """
        tokens = model.tokens(inputs)
        unknown = {tower for own in self.chosen.values() for tower in own} - {"", *tokens}
        if unknown:
            raise InputError(
                f"Spans name {', '.join(map(repr, sorted(unknown)))}, which is no tower of this run; those are {', '.join(tokens)}."
            )
        tokens = {name: own for name, own in tokens.items() if only in ("", name)}
        longest = max(one.n_positions for one in tokens.values())
        found = {}
        for tower, own in tokens.items():
            if self.each:
                found[tower] = torch.eye(longest)[: own.n_positions].expand(own.n_rows, -1, -1)
                continue
            parts = []
            for named in self.chosen.values():
                chosen = named.get(tower, named.get(""))
                if chosen is None or chosen.tower not in ("", tower):
                    parts.append(torch.zeros(own.n_rows, own.n_positions, dtype=torch.bool))
                else:
                    parts.append((chosen if rows is None else chosen.taken(rows, count)).resolve(own))
            masks = torch.stack(parts, -1)
            if bool((masks.sum(-1) > 1).any()):
                row, place = (masks.sum(-1) > 1).nonzero()[0].tolist()
                both = [name for name, on in zip(self.chosen, masks[row, place].tolist(), strict=True) if on]
                raise InputError(
                    f"Position {place} of the {tower} tower is in the spans {' and '.join(both)}: spans do not overlap."
                )
            found[tower] = torch.cat([masks, ~masks.any(-1, keepdim=True)], -1).float()
        return found

    def __provenance__(self) -> Any:
        return (
            "position"
            if self.each
            else {name: {tower: plain(one) for tower, one in own.items()} for name, own in self.chosen.items()}
        )
