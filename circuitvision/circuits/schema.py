"""The graph schema ``circuitvision.graph/1``: what every circuit graph looks like, and a check that one does.

A circuit is an acyclic ``networkx.MultiDiGraph``; parallel edges are the slots of a receiver (``q``, ``k``, ``v`` of
a head; ``in`` of anything else; ``img`` and ``txt`` of a dual encoder's logits), and the edge key is the slot. Every
node and edge carries the same attributes, always of the same Python built-in type, with -1, "" and 0.0 where one
does not apply, so that a graph reads the same after GraphML or JSON and loads into a table without holes.

``score`` of an edge is signed and ``weight`` its absolute value, for layout programs and shortest paths. In graphs
of kind ``head_importance`` a head receives through the slot ``in`` where what enters through q, k and v was not told apart.

What a method did not compute stands at its default: an interval (``ci_low``, ``ci_high``) that is empty, ``inclusion`` (in how many of the
bootstrapped circuits an edge is) -1, ``verified`` false; ``effect_verified`` is what an intervention on the edge gave, ``loadings_json`` the head
loadings of an attention edge. Files that were written before an attribute existed are read with its default, see :data:`ADDED`.
"""

from __future__ import annotations

import json
import math
from typing import Any

import networkx as nx

from circuitvision.errors import InputError
from circuitvision.model.names import NodeName, format_id, parse_id

SCHEMA = "circuitvision.graph/1"
GRAPH_KINDS = ("component", "attribution", "head_importance")
SCORE_KINDS = ("effect", "attribution", "direct_weight")

NODE_DEFAULTS: dict[str, Any] = {
    "kind": "",
    "tower": "",
    "layer": -1,
    "sublayer": 0.0,
    "head": -1,
    "feature": -1,
    "pos": -1,
    "span": "",
    "patch_row": -1,
    "patch_col": -1,
    "image": -1,
    "modality": "none",
    "label": "",
    "score": 0.0,
    "activation": 0.0,
    "influence": 0.0,
    "influence_cum": 0.0,
    "in_circuit": True,
    "hook_out": "",
    "module": "",
}
EDGE_DEFAULTS: dict[str, Any] = {
    "slot": "",
    "score": 0.0,
    "weight": 0.0,
    "se": 0.0,
    "ci_low": 0.0,
    "ci_high": -1.0,
    "n": 0,
    "score_kind": "effect",
    "in_circuit": True,
    "rank": -1,
    "inclusion": -1.0,
    "effect_verified": 0.0,
    "verified": False,
    "loadings_json": "",
    "via": "",
    "boundary": False,
    "eap_name": "",
    "uid": "",
}
ADDED = frozenset({"span", "ci_low", "ci_high", "inclusion", "effect_verified", "verified", "loadings_json"})
"""Attributes that older files may lack."""
_NO_INTERVAL = (EDGE_DEFAULTS["ci_low"], EDGE_DEFAULTS["ci_high"])
GRAPH_DEFAULTS: dict[str, Any] = {
    "schema": SCHEMA,
    "kind": "component",
    "name": "",
    "model_id": "",
    "weights_sha256": "",
    "towers_json": "{}",
    "metric": "",
    "metric_units": "",
    "metric_clean": 0.0,
    "metric_corrupt": 0.0,
    "sign": "patched_minus_clean",
    "method": "",
    "steps": 0,
    "quadrature": "",
    "intervention": "",
    "corruption": "",
    "aggregation": "",
    "frozen": "",
    "n_examples": 0,
    "dataset_sha256": "",
    "seed": -1,
    "dtype": "",
    "code_version": "",
    "created": "",
    "edges_total": 0,
}
NODE_KINDS = (
    "input",
    "embed",
    "pos",
    "head",
    "kv_head",
    "attn",
    "kv",
    "mlp",
    "neuron",
    "neuron_group",
    "feature",
    "error",
    "bias",
    "connector",
    "logit",
    "action",
)
_HEAD_SLOTS = frozenset({"q", "k", "v"})
_SLOTS = {
    "head": _HEAD_SLOTS,
    "attn": _HEAD_SLOTS,
    "kv_head": frozenset({"k", "v"}),
    "logit": frozenset({"in", "img", "txt"}),
}
_SOURCES = frozenset({"input", "embed", "pos", "bias", "error"})
_KIND_OF = {"logits": "logit", "dictionary": "feature", "dictionary_error": "error"}
"""The kind of a node by the kind of its name, where they differ."""
_SUBLAYER = {"head": 0.0, "attn": 0.0, "kv_head": -0.25, "kv": -0.25, "bias": 0.0}


def new_graph(kind: str, **attributes: Any) -> nx.MultiDiGraph:
    """An empty graph with every graph-level attribute of the schema.

    Raises:
        InputError: an unknown kind, or an attribute the schema does not have or of another type.
    """
    if kind not in GRAPH_KINDS:
        raise InputError(f"Unknown graph kind {kind!r}; choose one of {', '.join(GRAPH_KINDS)}.")
    return nx.MultiDiGraph(**_filled(GRAPH_DEFAULTS, {"kind": kind, **attributes}, "graph"))


def add_node(graph: nx.MultiDiGraph, node: NodeName, **attributes: Any) -> str:
    """Add a node with every attribute of the schema, derived from its name where possible; returns its id.

    Raises:
        InputError: the node is there already, or an attribute does not fit the schema.
    """
    name = format_id(node)
    if name in graph:
        raise InputError(f"The graph has a node {name} already.")
    known = {
        "kind": _KIND_OF.get(node.kind, node.kind),
        "tower": node.tower,
        "layer": node.layer,
        "sublayer": -1.0
        if node.kind in ("input", "embed", "pos")
        else max(node.layer, 0) + _SUBLAYER.get(node.kind, 0.5),
        "head": node.head,
        "feature": node.feature,
        "pos": node.pos,
        "span": node.span,
        "label": name,
    }
    graph.add_node(name, **_filled(NODE_DEFAULTS, {**known, **attributes}, f"node {name}"))
    return name


def add_edge(graph: nx.MultiDiGraph, sender: str, receiver: str, slot: str, score: float, **attributes: Any) -> None:
    """Add a scored edge into one slot of the receiver, with every attribute of the schema.

    Raises:
        InputError: an end that is not in the graph, an edge that is there already, or an attribute that does not fit
        the schema.
    """
    for end in (sender, receiver):
        if end not in graph:
            raise InputError(f"Add the node {end} before its edges.")
    if graph.has_edge(sender, receiver, slot):
        raise InputError(f"The graph has an edge {sender} -> {receiver} in slot {slot} already.")
    marked = f"<{slot}>" if slot in _HEAD_SLOTS else ""
    known = {
        "slot": slot,
        "score": float(score),
        "weight": abs(float(score)),
        "boundary": graph.nodes[sender]["tower"] != graph.nodes[receiver]["tower"],
        "eap_name": f"{sender.partition('.')[2]}->{receiver.partition('.')[2]}" + marked,
        "uid": f"{sender}|{receiver}|{slot}",
    }
    data = _filled(EDGE_DEFAULTS, {**known, **attributes}, f"edge {sender} -> {receiver}")
    graph.add_edge(sender, receiver, key=slot, **data)


def rank_edges(graph: nx.MultiDiGraph) -> None:
    """Write ``rank`` (0 = largest ``weight``, ties by ``uid``) on every edge, and the number of edges on the graph."""
    edges = sorted(graph.edges(keys=True, data=True), key=lambda edge: (-edge[3]["weight"], edge[3]["uid"]))
    for rank, (_, _, _, data) in enumerate(edges):
        data["rank"] = rank
    graph.graph["edges_total"] = len(edges)


def validate(graph: nx.MultiDiGraph) -> None:
    """Check a graph against the schema.

    It must be acyclic; every id must parse and agree with the node's attributes; every attribute must be there with
    its type and be finite; slots must exist for their receiver; layers must not fall along an edge inside a tower;
    ``weight`` must be ``abs(score)``.

    Raises:
        InputError: naming the first few violations.
    """
    if not isinstance(graph, nx.MultiDiGraph):
        raise InputError(f"A circuit graph is a networkx.MultiDiGraph, not a {type(graph).__name__}.")
    problems = [f"graph: {text}" for text in _type_problems(GRAPH_DEFAULTS, graph.graph)]
    if graph.graph.get("schema") != SCHEMA:
        problems.append(f"graph: schema is {graph.graph.get('schema')!r}, not {SCHEMA!r}")
    if graph.graph.get("kind") not in GRAPH_KINDS:
        problems.append(f"graph: kind {graph.graph.get('kind')!r} is not one of {', '.join(GRAPH_KINDS)}")
    for node, data in graph.nodes(data=True):
        problems += [f"{node}: {text}" for text in _node_problems(node, data)]
    if not problems:
        for sender, receiver, key, data in graph.edges(keys=True, data=True):
            found = _edge_problems(graph, sender, receiver, key, data)
            problems += [f"{sender} -> {receiver} [{key}]: {text}" for text in found]
        problems += _sum_problems(graph)
    if not nx.is_directed_acyclic_graph(graph):
        problems.append("the graph has a cycle")
    if problems:
        more = f" … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"Not a graph of {SCHEMA}: " + "; ".join(problems[:5]) + more)


def _filled(defaults: dict[str, Any], given: dict[str, Any], what: str) -> dict[str, Any]:
    filled = {**defaults, **{key: _coerced(defaults.get(key), value) for key, value in given.items()}}
    problems = _type_problems(defaults, filled)
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}.")
    return filled


def _coerced(default: Any, value: Any) -> Any:
    # Numbers of numpy and torch, and whole numbers for floats, arrive here often; the rest must already be right.
    if type(value) is type(default):
        return value
    if isinstance(default, bool | str) or isinstance(value, str | bool) or value is None:
        return value
    try:
        if isinstance(default, float):
            return float(value)
        return int(value) if float(value) == int(value) else value
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return value


def _type_problems(defaults: dict[str, Any], data: dict[str, Any]) -> list[str]:
    problems = [f"{key} is missing" for key in defaults if key not in data]
    for key, value in data.items():
        if key not in defaults:
            problems.append(f"{key} is not an attribute of the schema")
        elif type(value) is not type(defaults[key]):
            problems.append(f"{key} is a {type(value).__name__}, not a {type(defaults[key]).__name__}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{key} is {value}")
    return problems


def _node_problems(node: str, data: dict[str, Any]) -> list[str]:
    problems = _type_problems(NODE_DEFAULTS, data)
    try:
        name = parse_id(node)
    except InputError as error:
        return [*problems, str(error)]
    if problems:
        return problems
    kind = _KIND_OF.get(name.kind, name.kind)
    if kind not in NODE_KINDS:
        problems.append(f"kind {kind!r} is unknown")
    expected: dict[str, Any] = {"kind": kind, "tower": name.tower}
    expected |= {key: getattr(name, key) for key in ("layer", "head", "feature", "pos", "span")}
    wrong = {key: value for key, value in expected.items() if data[key] != value}
    return problems + [f"{key} is {data[key]!r}, its id says {value!r}" for key, value in wrong.items()]


def _edge_problems(graph: nx.MultiDiGraph, sender: str, receiver: str, key: str, data: dict[str, Any]) -> list[str]:
    problems = _type_problems(EDGE_DEFAULTS, data)
    if problems:
        return problems
    start, end = graph.nodes[sender], graph.nodes[receiver]
    allowed = _SLOTS.get(end["kind"], frozenset({"in"}))
    if graph.graph.get("kind") == "head_importance" and end["kind"] in ("head", "kv_head"):
        # Where a model shows no queries and patterns, what enters was not told apart.
        allowed = allowed | {"in"}
    if key != data["slot"]:
        problems.append(f"its key is {key!r}, its slot {data['slot']!r}")
    if data["slot"] not in allowed:
        problems.append(f"a node of kind {end['kind']} has no slot {data['slot']!r}")
    if end["kind"] in _SOURCES:
        problems.append(f"a node of kind {end['kind']} receives nothing")
    if start["kind"] == "logit":
        problems.append("a logit sends nothing")
    if data["weight"] != abs(data["score"]):
        problems.append(f"weight {data['weight']} is not |score| of {data['score']}")
    if data["score_kind"] not in SCORE_KINDS:
        problems.append(f"score_kind {data['score_kind']!r} is not one of {', '.join(SCORE_KINDS)}")
    if data["boundary"] != (start["tower"] != end["tower"]):
        problems.append("boundary must be true between towers and only there")
    layered = start["tower"] == end["tower"] and min(start["layer"], end["layer"]) >= 0
    if layered and start["sublayer"] >= end["sublayer"]:
        problems.append(f"runs from layer {start['layer']} back or sideways to layer {end['layer']}")
    if data["uid"] != f"{sender}|{receiver}|{key}":
        problems.append(f"uid {data['uid']!r} does not name it")
    return problems + _extent_problems(data)


def _extent_problems(data: dict[str, Any]) -> list[str]:
    """What is said about a score: that its numbers can be what they are called."""
    problems = []
    if data["ci_low"] > data["ci_high"] and (data["ci_low"], data["ci_high"]) != _NO_INTERVAL:
        problems.append(f"its interval runs from {data['ci_low']} down to {data['ci_high']}")
    if data["inclusion"] != -1.0 and not 0.0 <= data["inclusion"] <= 1.0:
        problems.append(f"inclusion {data['inclusion']} is no share, and not -1")
    if data["se"] < 0 or data["n"] < 0:
        problems.append(f"se {data['se']} or n {data['n']} is below 0")
    if data["loadings_json"]:
        try:
            json.loads(data["loadings_json"])
        except ValueError:
            problems.append("loadings_json is not JSON")
    return problems


def _sum_problems(graph: nx.MultiDiGraph) -> list[str]:
    """In head-importance graphs the out-edges of a node split its own effect, so they must add up to it."""
    if graph.graph["kind"] != "head_importance":
        return []
    problems = []
    for node, data in graph.nodes(data=True):
        total = sum(edge["score"] for _, _, edge in graph.out_edges(node, data=True))
        scale = max(abs(graph.graph["metric_clean"] - graph.graph["metric_corrupt"]), abs(data["score"]), 1e-6)
        if graph.out_degree(node) and abs(total - data["score"]) > 1e-3 * scale:
            problems.append(f"{node}: its out-edges add up to {total:.6g}, its own effect is {data['score']:.6g}")
    return problems
