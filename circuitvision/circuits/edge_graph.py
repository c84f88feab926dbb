"""Scored edges as a NetworkX graph of schema ``circuitvision.graph/1``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch

from circuitvision.circuits import schema
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.names import parse_id, spelled

if TYPE_CHECKING:
    from circuitvision.circuits.edge_attribution import EdgeAttribution

COPIED = ("model_id", "weights_sha256", "dataset_sha256", "metric", "metric_units", "method", "dtype", "created")


def graph_of(result: EdgeAttribution, n: int | None = None, edges: Sequence[str] | None = None) -> nx.MultiDiGraph:
    """The graph of all edges, of the ``n`` of largest mean score, or of those named, with its nodes; see :meth:`EdgeAttribution.to_networkx`."""
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise InputError(f"n={n!r} is not understood: how many edges, a whole number from 1 on.")
    senders, slots = result.axes["sender"], result.axes["slot"]
    scores, errors = result.scores, result.error(quantity="totals")
    errors = errors[0] if result.metrics else errors
    chosen = [name.split("->") for name in ([name for name, _ in result.ranking(n)] if edges is None else edges)]
    graph = schema.new_graph("component", **_attributes(result))
    totals = scores.nansum(-1)
    links = _links(result, [second for _, second in chosen])
    for name in _nodes_of(result, chosen, links):
        node = parse_id(name)
        known = result.nodes.get(name, {})
        schema.add_node(
            graph,
            node,
            label=str(result.provenance.get("metric", name)) if node.kind == "logits" else spelled(node),
            score=float(totals[senders.index(name)]) if name in senders else 0.0,
            modality=str(known.get("modality", "none")),
            hook_out=str(known.get("site", "")),
        )
    for first, second in chosen:
        row, column = senders.index(first), slots.index(second)
        error = float(errors[row, column])
        reader, slot = split_slot(second)
        options: dict[str, Any] = {"se": 0.0 if error != error else error, "n": len(result.examples)}
        if result.method == "exact":
            options |= {"verified": True, "effect_verified": float(scores[row, column])}
        schema.add_edge(graph, first, reader, slot, float(scores[row, column]), **options)
    for first, second, slot in links:
        schema.add_edge(graph, first, second, slot, 0.0, n=len(result.examples))
    schema.rank_edges(graph)
    return graph


def split_slot(label: str) -> tuple[str, str]:
    """The node and the letter of a slot's id: ``"v.a1.h0<q>"`` is ``("v.a1.h0", "q")``; what bears no letter is read as ``"in"``."""
    node, mark, letter = label.rstrip(">").partition("<")
    return (node, letter if letter in ("q", "k", "v", "img", "txt") else "in") if mark else (label, "in")


def _links(result: EdgeAttribution, slots: list[str]) -> list[tuple[str, str, str]]:
    """What leads from a group's keys and values to the heads that look at them: (group, head, slot)."""
    found = []
    for label in dict.fromkeys(slots):
        node, letter = split_slot(label)
        if parse_id(node).kind == "kv_head":
            found += [(node, head, letter) for head in result.reads[label]]
    return found


def _nodes_of(result: EdgeAttribution, chosen: list[list[str]], links: list[tuple[str, str, str]]) -> list[str]:
    """The ids of the nodes of some edges, in the order of the axes. Raises UnsupportedModelError for parts that have none."""
    ends = [name for first, second in chosen for name in (first, split_slot(second)[0])]
    ends += [name for first, second, _ in links for name in (first, second)]
    order = [*result.axes["sender"], *(split_slot(label)[0] for label in result.axes["slot"])]
    for name in ends:
        try:
            parse_id(name)
        except InputError:
            raise UnsupportedModelError(
                f"Ids of circuit graphs have no form for {name!r}; take the scores as a table, result.to_frame()."
            ) from None
    return [name for name in dict.fromkeys(order) if name in set(ends)]


def _attributes(result: EdgeAttribution) -> dict[str, Any]:
    origin = result.provenance
    clean, corrupt = ("base", "source") if result.mode == "noise" else ("source", "base")
    means = {name: torch.atleast_1d(result.mean(quantity=name))[0] for name in ("base", "source")}
    return {
        "name": f"{origin.get('model_id', '')}|{origin.get('metric', '')}|edge attribution",
        "towers_json": json.dumps(origin.get("towers", {})),
        "metric_clean": float(means[clean]),
        "metric_corrupt": float(means[corrupt]),
        "sign": "patched_minus_clean" if result.mode == "noise" else "patched_minus_corrupt",
        "intervention": "interchange",
        "corruption": "paired run",
        "aggregation": "mean over examples, sum over positions",
        "steps": result.steps,
        "quadrature": result.quadrature,
        "n_examples": len(result.examples),
        "seed": -1 if origin.get("seed") is None else origin["seed"],
        "code_version": str(origin.get("versions", {}).get("circuitvision", "")),
        **{key: str(origin.get(key, "")) for key in COPIED},
    }
