"""Circuits drawn at random to compare a circuit with: connected ones of its size, and ones whose nodes have its degrees.

Connected ones are unions of random paths (:func:`circuitvision.circuits.connectivity.random_circuit`). Of *degree-matched* ones every node has as
many edges as in the circuit, out of it and into each of its slots, up to an exchange of heads: heads of one layer change places with all their edges
(together with the keys and values that they look at), and then two edges at a time exchange their ends (Maslov & Sneppen 2002), wherever both new
ones are edges of the model. They need not be connected.

Not covered: matching by the size of scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision.circuits.computational_graph import ComputationalGraph
from circuitvision.circuits.connectivity import pruned, random_circuit
from circuitvision.circuits.edge_graph import split_slot
from circuitvision.errors import InputError, checked_seed
from circuitvision.model.names import parse_id

SWAPS = 10
"""How many exchanges are tried per edge."""
Edges = Bool[Tensor, "sender slot"]


def connected_like(mask: Edges, graph: ComputationalGraph, count: int, seed: int) -> list[Edges]:
    """Masks of random connected circuits with as many edges; with all edges that lie on paths where the circuit has more.

    Raises:
        InputError: a mask without edges; a seed below 0.
    """
    wanted = int(mask.sum())
    size = min(wanted, int(pruned(graph.edges, graph.reads).sum()))
    generator = torch.Generator().manual_seed(checked_seed(seed))
    return [random_circuit(graph.edges, graph.reads, size, generator) for _ in range(count)]


def degree_matched(mask: Edges, graph: ComputationalGraph, count: int, seed: int) -> list[Edges]:
    """Masks of random circuits whose nodes have the circuit's degrees, up to an exchange of heads of one layer; see the module.

    Raises InputError for a seed below 0.
    """
    generator = torch.Generator().manual_seed(checked_seed(seed))
    return [_swapped(_relabelled(mask, graph, generator), graph.edges, generator) for _ in range(count)]


def _relabelled(mask: Edges, graph: ComputationalGraph, generator: torch.Generator) -> Edges:
    """The circuit with heads of every layer in each other's place; as it is, where that gives what are no edges."""
    places = _exchanges(graph.sender_ids, graph.slot_ids, generator)
    rows = [places.get(name, name) for name in graph.sender_ids]
    columns = []
    for label in graph.slot_ids:
        node, letter = split_slot(label)
        columns.append(f"{places[node]}<{letter}>" if node in places else label)
    if set(rows) != set(graph.sender_ids) or set(columns) != set(graph.slot_ids):
        return mask
    to_row, to_column = (
        [known.index(name) for name in names] for known, names in ((graph.sender_ids, rows), (graph.slot_ids, columns))
    )
    found = torch.zeros_like(mask)
    found[torch.tensor(to_row)[:, None], torch.tensor(to_column)[None]] = mask
    return found if bool((found <= graph.edges).all()) else mask


def _exchanges(senders: Sequence[str], slots: Sequence[str], generator: torch.Generator) -> dict[str, str]:
    """The new name of every head and group: groups of a layer exchange places, and heads within them."""
    heads: dict[tuple[str, int], list[str]] = {}
    groups: dict[tuple[str, int], list[str]] = {}
    for name in dict.fromkeys([*senders, *(split_slot(label)[0] for label in slots)]):
        node = parse_id(name) if _has_form(name) else None
        if node is not None and node.kind in ("head", "kv_head"):
            (heads if node.kind == "head" else groups).setdefault((node.tower, node.layer), []).append(name)
    found: dict[str, str] = {}
    for layer, names in heads.items():
        own = groups.get(layer, [])
        count = len(own) or len(names)
        if len(names) % count:
            continue
        size, order = len(names) // count, torch.randperm(count, generator=generator).tolist()
        found |= {own[number]: own[place] for number, place in enumerate(order) if own}
        for number, place in enumerate(order):
            inside = torch.randperm(size, generator=generator).tolist()
            found |= {names[number * size + one]: names[place * size + other] for one, other in enumerate(inside)}
    return found


def _has_form(name: str) -> bool:
    try:
        parse_id(name)
    except InputError:
        return False
    return True


def _swapped(mask: Edges, every: Edges, generator: torch.Generator) -> Edges:
    """Two edges at a time exchange their ends, where both new ones are edges of the model that are not there yet."""
    edges, there = [tuple(edge) for edge in mask.nonzero().tolist()], every.tolist()
    if len(edges) < 2:
        return mask
    held = set(edges)
    for first, second in torch.randint(len(edges), (SWAPS * len(edges), 2), generator=generator).tolist():
        (row, column), (other, end) = edges[first], edges[second]
        new = (row, end), (other, column)
        if there[row][end] and there[other][column] and not held & set(new):
            held -= {edges[first], edges[second]}
            held |= set(new)
            edges[first], edges[second] = new
    found = torch.zeros_like(mask)
    found[tuple(torch.tensor(edges).T)] = True
    return found
