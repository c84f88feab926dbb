"""Edges told apart by where they carry something: those of an attribution by spans, as edges between parts at spans, such as
``v.m0@object->v.a1.h1@object<k>``.

What an edge carries at a span leads from its sender there to its slot there. Attention moves it on: what a key or a value slot reads at one span, the
head may write at any; so may a connector, and whoever looks at a group of keys and values. A query, and an MLP, stay at their span. Sums over spans
of an edge are the edge's score, and whatever works on edges — circuits, pruning, :func:`~circuitvision.circuits.discover` with its resamples and
certificates, graphs and files — works on these. What carries nothing in any example is no edge.

Not covered: runs of a model with such a circuit alone (masks are of edges at all positions).

Reference: Haklay et al. 2025 (ACL), position-aware automatic circuit discovery.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits.edge_graph import split_slot
from circuitvision.errors import InputError
from circuitvision.model.names import parse_id

if TYPE_CHECKING:
    from circuitvision.circuits.edge_attribution import EdgeAttribution


def at_spans(result: EdgeAttribution) -> EdgeAttribution:
    """The attribution whose edges are those of ``result`` at each of its spans. Raises InputError without spans."""
    if "span" not in result.axes:
        raise InputError("These edges are not told apart by spans: give edge_attribution spans=….")
    spans = [str(span) for span in result.axes["span"]]
    senders, slots = result.axes["sender"], result.axes["slot"]
    return dataclasses.replace(
        result,
        values=_apart(result.values),
        axes={
            **{name: labels for name, labels in result.axes.items() if name == "metric"},
            "sender": [f"{sender}@{span}" for sender in senders for span in spans],
            "slot": [_named(slot, span) for slot in slots for span in spans],
            "example": result.axes["example"],
        },
        reads={
            _named(slot, span): [f"{sender}@{at}" for sender in own for at in (spans if _moves(slot) else [span])]
            for slot, own in result.reads.items()
            for span in spans
        },
        nodes={f"{name}@{span}": known for name, known in result.nodes.items() for span in spans},
        provenance={**result.provenance, "edges": "at spans"},
    )


def _named(slot: str, span: str) -> str:
    """A slot at a span: the letter stays behind."""
    node, mark, letter = slot.partition("<")
    return f"{node}@{span}{mark}{letter}"


def _moves(slot: str) -> bool:
    """Whether what a slot reads at one position can be written at another."""
    node, letter = split_slot(slot)
    return letter in ("k", "v") or parse_id(node).kind == "connector"


def _apart(
    values: Float[Tensor, "*metric sender slot span example"],
) -> Float[Tensor, "*metric sender_at slot_at example"]:
    """Scores with senders and slots at every span: edges join the same span, and those that carry nothing are none."""
    senders, slots, spans, examples = values.shape[-4:]
    lead = values.shape[:-4]
    out = values.new_full((*lead, senders, spans, slots, spans, examples), float("nan"))
    for number in range(spans):
        own = values[..., number, :]
        silent = (own.nan_to_num() == 0).all(-1, keepdim=True)
        out[..., number, :, number, :] = own.masked_fill(silent, float("nan"))
    return out.reshape(*lead, senders * spans, slots * spans, examples)
