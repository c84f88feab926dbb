"""Circuit graphs as the JSON of EAP-IG and of the MIB circuit track, one file for every tower.

A file holds ``cfg`` (``n_layers``, ``n_heads``, ``parallel_attn_mlp``, ``d_model``), ``nodes`` (``a0.h1`` → ``in_graph`` and, but for ``logits``,
``score``) and ``edges`` (``m0->a1.h1<k>`` → ``score`` and ``in_graph``). Names have no tower, so the tower is in the file's name
(``circuit.v.json``); edges between towers, connectors, and whatever else that format cannot hold lie in ``circuit.meta.json``, from which
:func:`load_eap` makes the same graph again. Scores are those of the tower's files: what was changed there counts.

Key and value heads that serve several query heads have no name there: an edge into one is written once for every head of its group.

Not covered: positions, features and neurons, which that format does not know.

Reference: Hanna et al. 2024 (arXiv 2403.17806); Mueller et al. 2025 (arXiv 2504.13151).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from circuitvision.circuits.schema import EDGE_DEFAULTS, GRAPH_DEFAULTS, NODE_DEFAULTS, validate
from circuitvision.errors import InputError
from circuitvision.files import reading, write_text
from circuitvision.model.names import TOWER_LETTERS, parse_id

_HELD = ("input", "head", "kv_head", "mlp", "logits")
META = "circuitvision.eap/1"


def export_eap(
    graph: nx.MultiDiGraph, folder: str | Path, towers: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Path]:
    """Write ``circuit.{tower}.json`` for every tower and ``circuit.meta.json`` to a folder; returns the towers' files.

    Args:
        graph: a circuit graph of heads, MLPs, inputs, logits and connectors.
        folder: where to write.
        towers: ``n_layers``, ``n_heads``, ``d_model``, ``parallel_attn_mlp`` and, where key heads are shared, ``n_kv_heads`` of every tower by its
            name. What is missing is taken from the graph's ``towers_json``, layers and heads else from the nodes.

    Raises:
        InputError: a graph that breaks the schema, or has parts that the format does not know; groups of key heads of unknown size.
    """
    validate(graph)
    folder = Path(folder)
    told = json.loads(graph.graph["towers_json"])
    configs = {}
    for name in dict.fromkeys(data["tower"] for _, data in graph.nodes(data=True) if data["kind"] != "connector"):
        configs[name] = _config(graph, name, {**told.get(name, {}), **(towers or {}).get(name, {})})
    for node in graph:
        name = parse_id(node)
        if name.kind not in (*_HELD, "connector") or name.pos >= 0 or name.span:
            raise InputError(
                f"EAP-IG's files hold inputs, heads, MLPs and logits over all positions; {node} is none of these."
            )
    meta = {
        "schema": META,
        "graph": graph.graph,
        "towers": configs,
        "nodes": {node: dict(data) for node, data in graph.nodes(data=True)},
        "edges": [dict(data) for _, _, data in graph.edges(data=True)],
    }
    files = {
        folder / f"circuit.{TOWER_LETTERS[name]}.json": _tower(graph, name, config) for name, config in configs.items()
    }
    for path, held in files.items():
        write_text(path, json.dumps(held, indent=1, allow_nan=False))
    write_text(folder / "circuit.meta.json", json.dumps(meta, indent=1, allow_nan=False))
    return list(files)


def _config(graph: nx.MultiDiGraph, tower: str, told: Mapping[str, Any]) -> dict[str, Any]:
    own = [data for _, data in graph.nodes(data=True) if data["tower"] == tower]
    seen = {
        "n_layers": 1 + max((data["layer"] for data in own), default=-1),
        "n_heads": 1 + max((data["head"] for data in own if data["kind"] == "head"), default=-1),
        "parallel_attn_mlp": False,
        "d_model": 0,
    }
    return {key: told.get(key, value) for key, value in seen.items()} | {
        k: told[k] for k in ("n_kv_heads",) if k in told
    }


def _tower(graph: nx.MultiDiGraph, tower: str, config: Mapping[str, Any]) -> dict[str, Any]:
    nodes: dict[str, Any] = {}
    for node, data in graph.nodes(data=True):
        if data["tower"] == tower and data["kind"] != "kv_head":
            score = {} if data["kind"] == "logit" else {"score": data["score"]}
            nodes[_short(node)] = {"in_graph": data["in_circuit"], **score}
    edges = {
        name: {"score": data["score"], "in_graph": data["in_circuit"]}
        for sender, receiver, data in graph.edges(data=True)
        for name in _names(graph, sender, receiver, data, tower, config)
    }
    cfg = {key: value for key, value in config.items() if key != "n_kv_heads"}
    return {"cfg": cfg, "nodes": nodes, "edges": edges}


def _names(
    graph: nx.MultiDiGraph, sender: str, receiver: str, data: Mapping[str, Any], tower: str, config: Mapping[str, Any]
) -> list[str]:
    """What an edge is called in a tower's file: nothing if it is not of the tower, several names if its key head serves several heads."""
    ends = [graph.nodes[sender], graph.nodes[receiver]]
    if any(end["tower"] != tower or end["kind"] == "connector" for end in ends) or ends[0]["kind"] == "kv_head":
        return []
    if ends[1]["kind"] != "kv_head":
        return [data["eap_name"]]
    groups = config.get("n_kv_heads")
    if not groups:
        raise InputError(
            f"How many heads share the keys of {receiver}? Give towers={{{tower!r}: {{'n_heads': …, 'n_kv_heads': …}}}}."
        )
    size = config["n_heads"] // groups
    heads = range(ends[1]["head"] * size, (ends[1]["head"] + 1) * size)
    return [f"{_short(sender)}->a{ends[1]['layer']}.h{head}<{data['slot']}>" for head in heads]


def _short(node: str) -> str:
    return node.partition(".")[2]


def load_eap(folder: str | Path) -> nx.MultiDiGraph:
    """Read a graph that :func:`export_eap` wrote, with the scores and circuits of the towers' files.

    Raises:
        InputError: a file is missing or damaged, or copies of an edge into shared keys disagree.
    """
    folder = Path(folder)
    path = folder / "circuit.meta.json"
    if not path.is_file():
        raise InputError(f"There is no {path}: it says which nodes and edges lie between the towers.")
    with reading(path, "what lies beside files of EAP-IG"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        graph = nx.MultiDiGraph(**{**GRAPH_DEFAULTS, **meta["graph"]})
        graph.add_nodes_from((node, {**NODE_DEFAULTS, **data}) for node, data in meta["nodes"].items())
        for data in meta["edges"]:
            sender, receiver, slot = data["uid"].split("|")
            graph.add_edge(sender, receiver, key=slot, **{**EDGE_DEFAULTS, **data})
        for name, config in meta["towers"].items():
            _take(graph, folder / f"circuit.{TOWER_LETTERS[name]}.json", name, config)
        validate(graph)
    return graph


def _take(graph: nx.MultiDiGraph, path: Path, tower: str, config: Mapping[str, Any]) -> None:
    """Put the scores of a tower's file on the graph."""
    with reading(path, "a file of EAP-IG"):
        held = json.loads(path.read_text(encoding="utf-8"))
        for node, data in graph.nodes(data=True):
            if data["tower"] == tower and data["kind"] != "kv_head":
                found = held["nodes"][_short(node)]
                data |= {"in_circuit": found["in_graph"], "score": found.get("score", data["score"])}
        for sender, receiver, data in graph.edges(data=True):
            copies = [held["edges"][name] for name in _names(graph, sender, receiver, data, tower, config)]
            if any(copy != copies[0] for copy in copies):
                raise InputError(
                    f"{path.name}: the copies of {data['uid']} disagree, but its heads share one key head."
                )
            if copies:
                score = float(copies[0]["score"])
                data |= {"score": score, "weight": abs(score), "in_circuit": copies[0]["in_graph"]}
