"""Edges of attention between spans as a graph of schema ``circuitvision.graph/1``: from the keys and values of a layer at one span to what the layer
writes at another, all heads together, with what each head has of it (*head loadings*).

Ids are ``v.kv1@object`` (keys and values of layer 1 there) and ``v.a1@last`` (what attention of layer 1 writes there); a slot says what was followed:
the value and the key at the first end, or the query at the second that looks there. The loadings of an edge add up to its score.

Reference: Haklay et al. 2025 (ACL) for the edges; head loadings as asked of attribution graphs (Kamath et al. 2025, transformer-circuits.pub).
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import networkx as nx
import torch

from circuitvision.circuits import schema
from circuitvision.circuits.edge_graph import COPIED
from circuitvision.errors import InputError
from circuitvision.model.names import NodeName, spelled
from circuitvision.statistics import standard_error

if TYPE_CHECKING:
    from circuitvision.circuits.attention_edges import AttentionEdges

REST = "rest"
_ROUNDING = 1e-12
"""Share of the largest score below which a sum is one of rounding."""


def graph_of(result: AttentionEdges, n: int | None = None, top: int = 8) -> nx.MultiDiGraph:
    """The graph of all edges, or of the ``n`` of largest mean score in size; see :meth:`AttentionEdges.to_networkx`."""
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise InputError(f"n={n!r} is not understood: how many edges, a whole number from 1 on.")
    values = (result.values[0] if "metric" in result.axes else result.values).double()
    # [layer slot query key head], and its sums over heads by example.
    loadings = values.mean(-1).movedim(1, -1)
    whole = values.sum(1)
    scores, errors = whole.mean(-1), standard_error(whole).nan_to_num(0.0)
    order = scores.abs().flatten().argsort(descending=True, stable=True).tolist()
    places = list(itertools.product(*map(range, scores.shape)))
    floor = _ROUNDING * float(scores.abs().max()) if scores.numel() else 0.0
    kept = [places[number] for number in order if abs(float(scores[places[number]])) > floor][:n]
    graph = schema.new_graph("component", **_attributes(result))
    ends = {}
    for place in kept:
        layer, _, query, key = (
            labels[index] for labels, index in zip((result.axes[name] for name in _AXES), place, strict=True)
        )
        ends[place] = (_node(result.tower, "kv", layer, key), _node(result.tower, "attn", layer, query))
    for node in sorted(
        {end for both in ends.values() for end in both}, key=lambda one: (one.layer, one.kind, str(one))
    ):
        where = f"@{node.span or node.pos}"
        schema.add_node(graph, node, label=f"{spelled(NodeName(node.tower, 'attn', layer=node.layer))}{where}")
    for place, (sender, receiver) in ends.items():
        letter = str(result.axes["slot"][place[1]])
        score, error = float(scores[place]), float(errors[place])
        told = json.dumps(_strongest(loadings[place], result.axes["head"], top))
        schema.add_edge(
            graph, str(sender), str(receiver), letter, score, se=error, n=len(result.examples), loadings_json=told
        )
    schema.rank_edges(graph)
    return graph


_AXES = ("layer", "slot", "query", "key")


def _node(tower: str, kind: str, layer: int, where: int | str) -> NodeName:
    if isinstance(where, str):
        return NodeName(tower, kind, layer=layer, span=where)
    return NodeName(tower, kind, layer=layer, pos=where)


def _strongest(loadings: torch.Tensor, heads: list[int], top: int) -> dict[str, float]:
    """The ``top`` largest loadings by head, largest in size first, and the sum of the others."""
    order = loadings.abs().argsort(descending=True, stable=True).tolist()
    found = {f"H{heads[number]}": float(loadings[number]) for number in order[:top]}
    return found if len(order) <= top else {**found, REST: float(loadings[order[top:]].sum())}


def _attributes(result: AttentionEdges) -> dict[str, object]:
    origin = result.provenance
    clean, corrupt = ("base", "source") if result.mode == "noise" else ("source", "base")
    means = {name: float(torch.atleast_1d(result.mean(quantity=name))[0]) for name in ("base", "source")}
    return {
        "name": f"{origin.get('model_id', '')}|{origin.get('metric', '')}|attention edges",
        "towers_json": json.dumps(origin.get("towers", {})),
        "metric_clean": means[clean],
        "metric_corrupt": means[corrupt],
        "sign": "patched_minus_clean" if result.mode == "noise" else "patched_minus_corrupt",
        "intervention": "interchange",
        "corruption": "paired run",
        "aggregation": "mean over examples, sum over heads",
        "n_examples": len(result.examples),
        "seed": -1 if origin.get("seed") is None else origin["seed"],
        "code_version": str(origin.get("versions", {}).get("circuitvision", "")),
        **{key: str(origin.get(key, "")) for key in COPIED},
    }
