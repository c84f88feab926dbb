"""Runs of a model in which a circuit alone works as in the clean run: what is measured of circuits, one mechanism for all methods.

Edges of the circuit carry what their senders write in this very run; every other edge carries what it would carry without the information
(:mod:`circuitvision.circuits.edge_runs`). What that is, ``ablation`` says:

* ``"interchange"``: the corrupt run's values of the same pair;
* ``"mean"``: the mean over the clean and corrupt runs of all examples (or of ``reference``), position by position;
* ``"zero"``: nothing.

So with all edges in the circuit the run is the clean one, with none it is the *empty* one: the corrupt run, or the one in which everything is
ablated. The share of their difference that a circuit keeps is its faithfulness, ``(m(C) - m(empty)) / (m(clean) - m(empty))``.

Not covered: values that are fitted (optimal ablation); masks between 0 and 1.

Reference: Wang et al. 2022 (arXiv 2211.00593); Hanna et al. 2024 (arXiv 2403.17806); Miller et al. 2024 (arXiv 2407.08734) on what ablations change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.computational_graph import ComputationalGraph, computational_graph
from circuitvision.circuits.edge_runs import Interchange, Source
from circuitvision.errors import InputError
from circuitvision.model.averages import Layout, Seen, Tally, check_one_thing
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.runs import Groups, Runs, Sides, two_runs
from circuitvision.provenance import hash_weights

ABLATIONS = ("interchange", "mean", "zero")


@dataclass(frozen=True)
class CircuitScores:
    """The metric of runs in which a circuit alone works: ``values`` ``[metric circuit example]``; ``clean`` and ``empty`` ``[metric example]`` are
    those with all edges and with none, ``corrupt`` the corrupt run's."""

    values: Float[Tensor, "metric circuit example"]
    clean: Float[Tensor, "metric example"]
    empty: Float[Tensor, "metric example"]
    corrupt: Float[Tensor, "metric example"]
    examples: list[Any]


class CircuitRuns:
    """A model, the two sides of a data set, and a metric: what circuits are measured with.

    Args:
        model: the hooked model.
        pairs: a data set of pairs; ``clean`` and ``corrupt`` in their place are inputs of the same shapes.
        metric: a metric, its name, or a mapping of several.
        align, allow_wrong, example_batch: as of :func:`circuitvision.patching.activation_patch`.
        reference: pairs whose mean ``"mean"`` takes; None: these.

    Raises:
        InputError: neither pairs nor inputs, no metric, dropout in training mode.
        UnsupportedModelError: a model whose parts do not read sums of what others write.
    """

    def __init__(
        self,
        model: Any,
        pairs: Any = None,
        metric: Any = None,
        *,
        clean: Mapping[str, Any] | None = None,
        corrupt: Mapping[str, Any] | None = None,
        align: Any = "kind",
        allow_wrong: bool = False,
        example_batch: int | None = None,
        reference: Any = None,
    ) -> None:
        refuse_unwrapped(model)
        refuse_random(model.module, "A circuit")
        self.model = model
        self.runs: Runs = two_runs(model, pairs, metric, clean, corrupt, "noise", align, example_batch, allow_wrong)
        self.graph: ComputationalGraph = computational_graph(model, self.runs.first_inputs())
        self._reference = None
        if reference is not None:
            self._reference = two_runs(model, reference, metric, None, None, "noise", align, example_batch, True)

    def mask(self, circuit: Circuit) -> Bool[Tensor, "sender slot"]:
        """A circuit's edges on this model. Raises InputError for one that was found in other weights, or has edges this model has not."""
        found = circuit.attribution.provenance.get("weights_sha256", "")
        if found and found != hash_weights(self.model.module):
            raise InputError(
                "The circuit was found in a model with other weights: wrap that model, or find the circuit again in this one."
            )
        return circuit.mask_on(self.graph)

    def measure(
        self, masks: Sequence[Bool[Tensor, "sender slot"]], ablation: str = "interchange", *, progress: bool = True
    ) -> CircuitScores:
        """The metric with the edges of each mask alone, over the data set.

        Raises:
            InputError: an unknown ablation; ``"mean"`` over examples whose positions do not line up.
        """
        if ablation not in ABLATIONS:
            raise InputError(f"Unknown ablation {ablation!r}; choose one of {', '.join(map(repr, ABLATIONS))}.")
        others = [torch.zeros_like(self.graph.edges), *masks]
        made = _Masked(self, others, ablation)
        found = self.runs.measure_made(made, self.graph.sites, progress=progress)
        return CircuitScores(found.values[:, 1:], found.base, found.values[:, 0], found.source, found.examples)

    @cached_property
    def means(self) -> dict[str, Tally]:
        """The mean of what senders write, position by position, over both runs of all examples."""
        tallies = {site: Tally(site, "position") for site in self.graph.sites}
        seen = {self._tower(site): Seen() for site in self.graph.sites}
        for batch in (self._reference or self.runs).batches(self.graph.sites):
            with torch.no_grad():
                own = self.model._values_at(batch.inputs, self.graph.sites)[1]
            tokens = self.model.tokens(batch.inputs)
            for tower, what in seen.items():
                what.add(Layout.of_tokens(tokens[tower]))
                for position, names in what.names.items():
                    check_one_thing(position, names)
            for site, tally in tallies.items():
                layout = Layout.of_tokens(tokens[self._tower(site)])
                for values in (own, batch.values):
                    tally.add(values[site], layout)
        return tallies

    def _tower(self, site: str) -> str:
        return self.graph.senders[self.graph.senders_at(site)[0]].tower

    def source(self, sides: Sides, ablation: str) -> dict[str, Tensor]:
        """What ablated edges carry in a batch, at every site of the graph."""
        if ablation == "interchange":
            return dict(sides.source)
        if ablation == "zero":
            return {site: torch.zeros_like(value) for site, value in sides.source.items()}
        tokens = self.model.tokens(sides.inputs)
        found = {}
        for site, value in sides.source.items():
            mean, _ = self.means[site].source(Layout.of_tokens(tokens[self._tower(site)]))
            found[site] = mean.to(value).expand_as(value)
        return found


class _Masked:
    """The groups of edits that leave the edges of each mask alone, made for one batch of examples."""

    def __init__(self, runs: CircuitRuns, masks: Sequence[Bool[Tensor, "sender slot"]], ablation: str) -> None:
        self.runs, self.masks, self.ablation = runs, list(masks), ablation

    def __provenance__(self) -> dict[str, Any]:
        return {"graph": self.runs.graph, "masks": torch.stack(self.masks), "ablation": self.ablation}

    def __call__(self, sides: Sides) -> Groups:
        """One group for each mask."""
        model, graph = self.runs.model, self.runs.graph
        source = Source(self.runs.source(sides, self.ablation))
        # Every run keeps what its senders wrote by itself.
        return [Interchange(model, graph, sides.inputs, source).edits(graph.edges & ~mask.cpu()) for mask in self.masks]
