"""The QK fix of edges into queries and keys: the pattern is computed again with the edge patched, and only what lies behind it is linearised.

    ``score(s → q of h) = Σ (A' - A) · ∂metric/∂A``,  ``A'`` the pattern of head ``h`` whose queries read ``x + Δa_s``

and likewise for keys, with all heads, and those of another tower, that look at them. Where the softmax is saturated, the gradient at the slot is
nearly 0 although a large change moves the pattern; this sees it.

One run for each sender gives the scores of all queries behind it, one those of all keys: every attention output is held at its base value, so that
each layer sees the base's stream; rotary, norms of queries and keys, masks and soft caps are the model's own.

Not covered: scores that a model does not show; saturation anywhere else than in the softmax.

Reference: Kramár et al. 2024 (arXiv 2403.00745).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.circuits.computational_graph import ComputationalGraph
from circuitvision.circuits.edge_runs import Interchange
from circuitvision.model.edits.base import Edit
from circuitvision.patching.estimates import wide
from circuitvision.patching.estimator import patterns_of, scores_of
from circuitvision.patching.gradient_run import GradientRun, rows_of, values_under


@dataclass(frozen=True)
class PatternGradients:
    """Gradients of a metric at patterns: of all examples, or of one; ``scores`` ``[example sender slot]`` are put right."""

    gradients: Mapping[str, Tensor]
    example: int | None
    scores: Float[Tensor, "example sender slot"]


class QKFix:
    """Scores of the edges into queries and keys of a graph, from patterns."""

    def __init__(self, model: Any, graph: ComputationalGraph) -> None:
        self.model, self.graph = model, graph
        self.letters = {one.slot.site: one.letter for one in graph.slots if one.letter in ("q", "k")}
        self.patterns = {site: patterns_of(model, site) for site in self.letters}

    @property
    def watched(self) -> list[str]:
        """The patterns whose gradients are taken."""
        return list(dict.fromkeys(pattern for found in self.patterns.values() for pattern in found))

    @property
    def recorded(self) -> list[str]:
        """What the base run records."""
        return [*self.watched, *map(scores_of, self.watched), *self._held]

    @property
    def _held(self) -> list[str]:
        """The outputs of attention that keep each layer's stream the base's."""
        found = [pattern.replace("hook_pattern", "hook_z") for pattern in self.watched]
        return [site for site in found if not self.model.is_dead(site)]

    def apply(
        self,
        run: GradientRun,
        base: Mapping[str, Tensor],
        source: Mapping[str, Tensor],
        found: Sequence[PatternGradients],
    ) -> None:
        """Put the scores of these edges in the place of those in ``found``; ``base`` and ``source`` are what senders write in the two runs."""
        values = {site: value.detach() for site, value in run.values.items()}
        held = [edits.replace(site, values[site]) for site in self._held]
        runs = Interchange(self.model, self.graph, run.inputs, source)
        queries = [site for site, letter in self.letters.items() if letter == "q"]
        keys = [site for site, letter in self.letters.items() if letter == "k"]
        for site in self.graph.sites:
            senders = self.graph.senders_at(site)
            with torch.no_grad():
                changes = runs.change(site, base[site], torch.eye(len(senders)).to(base[site]))
            for place, row in enumerate(senders):
                for slots in (queries, keys):
                    self._sender(run, row, changes[:, :, place], slots, held, values, found)

    def _sender(
        self,
        run: GradientRun,
        row: int,
        change: Float[Tensor, "row pos d_model"],
        slots: Sequence[str],
        held: Sequence[Edit],
        values: Mapping[str, Tensor],
        found: Sequence[PatternGradients],
    ) -> None:
        """The scores of one sender's edges into all queries, or all keys."""
        behind = [site for site in slots if bool(self.graph.edges[row, self.graph.slots_at(site)].all())]
        wanted = list(dict.fromkeys(scores_of(pattern) for site in behind for pattern in self.patterns[site]))
        if not wanted:
            return
        writes = [edits.steer(site, change.unsqueeze(-2)) for site in behind]
        patched = values_under(self.model, run.inputs, [*writes, *held], wanted)
        for site in behind:
            columns = torch.tensor(self.graph.slots_at(site))
            for one in found:
                if all(pattern in one.gradients for pattern in self.patterns[site]):
                    of = slice(None) if one.example is None else one.example
                    one.scores[of, row, columns] = 0.0
                    for pattern in self.patterns[site]:
                        name = scores_of(pattern)
                        moved = wide(patched[name]).softmax(-1) - wide(values[name]).softmax(-1)
                        self._add(run, pattern, (moved * wide(one.gradients[pattern])).sum((-2, -1)), row, columns, one)

    def _add(
        self,
        run: GradientRun,
        pattern: str,
        effect: Float[Tensor, "row head"],
        row: int,
        columns: Tensor,
        one: PatternGradients,
    ) -> None:
        """Add effects by head to a sender's scores; heads that share a key stand side by side."""
        rows = effect.detach().unflatten(1, (len(columns), -1)).sum(2)
        count = len(one.scores)
        into = (
            rows_of(run.model, run.inputs, pattern, len(rows), count)
            if one.example is None
            else torch.full((len(rows),), one.example)
        )
        whole = rows.new_zeros(count, len(columns)).index_add_(0, into.to(rows.device), rows)
        one.scores[:, row, columns] += whole.to(one.scores)
