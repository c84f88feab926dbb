"""A circuit: a set of edges of a computational graph, as a mask over one matrix of scores.

``mask`` ``[sender slot]`` says which edges are in it; the scores, and everything else that is known of the edges, stay in the
:class:`~circuitvision.circuits.edge_attribution.EdgeAttribution` that all circuits made of it share, so that a thousand circuits of one model cost a
thousand masks. A circuit never changes: sets of edges are made of others (``|``, ``&``, ``-``, :meth:`Circuit.without`, :meth:`Circuit.pruned`).

An edge that is named but was not scored cannot be in a circuit; :func:`circuit_of_graph` takes the edges of a graph that was read from a file as the
whole of what is known.

Not covered: weights of edges between 0 and 1; nodes without edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision.circuits import connectivity
from circuitvision.circuits.computational_graph import ARROW, ComputationalGraph
from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.circuits.edge_graph import graph_of, split_slot
from circuitvision.errors import InputError
from circuitvision.model.names import parse_id

Edges = Bool[Tensor, "sender slot"]
Chosen = Iterable[str] | Tensor | int


@dataclass(frozen=True, eq=False)
class Circuit:
    """The edges ``mask`` ``[sender slot]`` of what ``attribution`` scored; ``inclusion`` is the share of resampled circuits that hold each edge.

    ``len(circuit)`` is how many edges it has, iterating gives their names (``"v.a0.h1->v.m1"``). Two circuits are equal if their edges are.

    Raises:
        InputError: a mask of another shape, or one that holds what is no edge.
    """

    attribution: EdgeAttribution
    mask: Edges
    inclusion: Tensor | None = None

    def __post_init__(self) -> None:
        edges = self.attribution.edges
        if tuple(self.mask.shape) != tuple(edges.shape):
            raise InputError(
                f"A circuit's mask is [sender slot], {list(edges.shape)}; this one is {list(self.mask.shape)}."
            )
        mask = self.mask.detach().cpu().bool()
        beside = mask & ~edges
        if bool(beside.any()):
            row, column = beside.nonzero()[0].tolist()
            raise InputError(
                f"The mask holds {self.senders[row]}{ARROW}{self.slots[column]}, which is no edge of this model."
            )
        object.__setattr__(self, "mask", mask)

    @classmethod
    def of(cls, attribution: EdgeAttribution, edges: Chosen) -> Circuit:
        """The circuit of some edges: their names, a mask ``[sender slot]``, or how many of the largest mean score in size.

        Raises:
            InputError: no such edge (the nearest is named), or more edges than there are.
        """
        if isinstance(edges, Tensor):
            return cls(attribution, edges)
        if isinstance(edges, int):
            if not 0 <= edges <= attribution.n_edges:
                raise InputError(
                    f"{edges} edges cannot be taken: there are {attribution.n_edges}; give a number from 0 on."
                )
            edges = [name for name, _ in attribution.ranking(edges)] if edges else []
        if isinstance(edges, str):
            raise InputError(f"Give the names of edges as a list, [{edges!r}].")
        mask = torch.zeros_like(attribution.edges)
        for name in edges:
            mask[attribution.place(name)] = True
        return cls(attribution, mask)

    # -- what is in it -----------------------------------------------------------------------------------------------------------------------

    @property
    def senders(self) -> list[str]:
        """The ids of the senders, in the order of the mask."""
        return self.attribution.axes["sender"]

    @property
    def slots(self) -> list[str]:
        """The ids of the slots, in the order of the mask."""
        return self.attribution.axes["slot"]

    @property
    def edges(self) -> list[str]:
        """The names of its edges, by sender, then slot."""
        return [f"{self.senders[row]}{ARROW}{self.slots[column]}" for row, column in self.mask.nonzero().tolist()]

    @property
    def nodes(self) -> list[str]:
        """The ids of the nodes at the ends of its edges, in the order of the axes."""
        ends = [self.senders[row] for row in self.mask.any(1).nonzero().flatten().tolist()]
        ends += [split_slot(self.slots[column])[0] for column in self.mask.any(0).nonzero().flatten().tolist()]
        return list(dict.fromkeys(ends))

    @property
    def share(self) -> float:
        """The share of the model's edges that are in it."""
        return len(self) / max(self.attribution.n_edges, 1)

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.edges)

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, str) and bool(self.mask[self.attribution.place(edge)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self._same_graph(other) and bool((self.mask == other.mask).all())

    def __hash__(self) -> int:
        return hash((tuple(self.senders), tuple(self.slots), self.mask.numpy().tobytes()))

    def __repr__(self) -> str:
        return f"Circuit({len(self)} of {self.attribution.n_edges} edges, {len(self.nodes)} nodes)"

    def _repr_html_(self) -> str:
        return f"<code>{self!r}</code>"

    def __provenance__(self) -> dict[str, Any]:
        return {"edges": self.edges, "of": self.attribution}

    # -- others made of it -------------------------------------------------------------------------------------------------------------------

    def __or__(self, other: Circuit) -> Circuit:
        return self._with(self.mask | self._mask_of(other))

    def __and__(self, other: Circuit) -> Circuit:
        return self._with(self.mask & self._mask_of(other))

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with(self.mask & ~self._mask_of(other))

    def complement(self) -> Circuit:
        """All edges that are not in it."""
        return self._with(self.attribution.edges & ~self.mask)

    def without(self, *edges: str) -> Circuit:
        """The circuit without some of its edges. Raises InputError for one that is not in it."""
        mask = self.mask.clone()
        for name in edges:
            place = self.attribution.place(name)
            if not bool(mask[place]):
                raise InputError(f"{name!r} is not in the circuit.")
            mask[place] = False
        return self._with(mask)

    def adding(self, *edges: str) -> Circuit:
        """The circuit with some more edges."""
        return self | Circuit.of(self.attribution, edges)

    def pruned(self) -> Circuit:
        """The edges that lie on a path of the circuit from what enters the model to its output."""
        return self._with(connectivity.pruned(self.mask, self.reads))

    @property
    def connected(self) -> bool:
        """Whether every edge lies on a path of the circuit from what enters the model to its output."""
        return len(self.pruned()) == len(self)

    def jaccard(self, other: Circuit) -> float:
        """Edges in both, of the edges in either; NaN for two empty circuits."""
        mask = self._mask_of(other)
        either = int((self.mask | mask).sum())
        return int((self.mask & mask).sum()) / either if either else float("nan")

    def precision(self, known: Circuit | Iterable[str]) -> float:
        """The share of its edges that are in a known circuit (names of edges do too); NaN for an empty circuit."""
        return len(self & self._known(known)) / len(self) if len(self) else float("nan")

    def recall(self, known: Circuit | Iterable[str]) -> float:
        """The share of a known circuit's edges that are in it; NaN where that is empty. Raises InputError for names that are no edges."""
        other = self._known(known)
        return len(self & other) / len(other) if len(other) else float("nan")

    def _known(self, known: Circuit | Iterable[str]) -> Circuit:
        return known if isinstance(known, Circuit) else Circuit.of(self.attribution, list(known))

    @cached_property
    def reads(self) -> Bool[Tensor, "slot sender"]:
        """Which senders are made of what a slot reads."""
        numbers = {name: number for number, name in enumerate(self.senders)}
        found = torch.zeros(len(self.slots), len(self.senders), dtype=torch.bool)
        for row, slot in enumerate(self.slots):
            for name in self.attribution.reads.get(slot, []):
                found[row, numbers[name]] = True
        return found

    # -- elsewhere ---------------------------------------------------------------------------------------------------------------------------

    def mask_on(self, graph: ComputationalGraph) -> Edges:
        """Its mask on the computational graph of a model, by names.

        Raises:
            InputError: an edge that the model does not have.
        """
        if (graph.sender_ids, graph.slot_ids) == (self.senders, self.slots) and bool((self.mask <= graph.edges).all()):
            return self.mask
        return graph.mask(self.edges)

    def to_networkx(self) -> nx.MultiDiGraph:
        """The graph of schema ``circuitvision.graph/1``, kind ``component``: all edges of the circuit with their mean scores.

        Raises:
            UnsupportedModelError: a part that ids have no form for is among the nodes.
        """
        graph = graph_of(self.attribution, edges=self.edges)
        if self.inclusion is not None:
            for row, column in self.mask.nonzero().tolist():
                receiver, slot = split_slot(self.slots[column])
                graph.edges[self.senders[row], receiver, slot]["inclusion"] = float(self.inclusion[row, column])
        return graph

    def _with(self, mask: Edges) -> Circuit:
        return Circuit(self.attribution, mask, self.inclusion)

    def _same_graph(self, other: Circuit) -> bool:
        return self.attribution is other.attribution or (self.senders, self.slots) == (other.senders, other.slots)

    def _mask_of(self, other: Circuit) -> Edges:
        if not isinstance(other, Circuit):
            raise InputError(
                f"A circuit is combined with another circuit, not with a {type(other).__name__}; "
                "Circuit.of(circuit.attribution, [names]) makes one of names of edges."
            )
        if not self._same_graph(other):
            raise InputError("The two circuits are of different graphs: their senders and slots differ.")
        return other.mask


def circuit_of_graph(graph: nx.MultiDiGraph) -> Circuit:
    """The circuit of a graph of schema ``circuitvision.graph/1``, kind ``component``: its edges with ``in_circuit`` true.

    All edges of the graph are what is known; scores are the graph's, of one example.

    Raises:
        InputError: a graph of another kind.
    """
    if graph.graph.get("kind") != "component":
        raise InputError(
            f"A circuit is made of a graph of kind 'component', whose edges lead into slots, not of {graph.graph.get('kind')!r}."
        )
    every = list(graph.edges(keys=True))
    # What leads from a group's keys and values to a head says what the head is made of, and is no edge of the computational graph.
    links = [edge for edge in every if parse_id(edge[0]).kind == "kv_head"]
    edges = [edge for edge in every if parse_id(edge[0]).kind != "kv_head"]
    labels = [receiver + ("" if key == "in" else f"<{key}>") for _, receiver, key in edges]
    begin = {sender for sender, _, _ in edges}
    senders, slots = [name for name in graph if name in begin], list(dict.fromkeys(labels))
    rows, columns = ({name: number for number, name in enumerate(names)} for names in (senders, slots))
    values = torch.full((len(senders), len(slots), 1), float("nan"), dtype=torch.float64)
    mask = torch.zeros(len(senders), len(slots), dtype=torch.bool)
    for edge, label in zip(edges, labels, strict=True):
        place = rows[edge[0]], columns[label]
        values[place], mask[place] = graph.edges[edge]["score"], graph.edges[edge]["in_circuit"]
    reads = {}
    for slot in slots:
        node, letter = split_slot(slot)
        heads = [second for first, second, key in links if first == node and key == letter]
        reads[slot] = [name for name in (heads or [node]) if name in rows]
    provenance = {key: graph.graph[key] for key in ("model_id", "weights_sha256", "dataset_sha256", "metric", "method")}
    found = EdgeAttribution(
        values=values,
        axes={"sender": senders, "slot": slots, "example": [0]},
        provenance=provenance,
        base=torch.tensor([graph.graph["metric_clean"]], dtype=torch.float64),
        source=torch.tensor([graph.graph["metric_corrupt"]], dtype=torch.float64),
        reads=reads,
        method=graph.graph["method"],
    )
    return Circuit(found, mask)
