"""What a graph of scored edges shows, as findings that are held against a control.

``few edges`` holds the share of ``Σ |score|`` of the largest edges against the share that as many of the largest would have if scores were Gaussian
noise around 0; ``strongest path`` asks of every edge on the path that its interval excludes 0, widened for the number of edges it was chosen from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

from circuitvision.circuits.routes import Edge, is_link, scored_edges, share_of, strongest_path
from circuitvision.findings import ALONE, Finding, around
from circuitvision.model.names import parse_id, spelled

if TYPE_CHECKING:
    import networkx as nx

_MOST_NAMES = 7


def few_edges(graph: nx.MultiDiGraph, edges: Sequence[Edge]) -> Finding:
    """Whether some edges, the largest, hold more of all ``|score|`` than the largest of noise would.

    Of Gaussian noise the largest share ``p`` holds ``exp(-z²/2)`` with ``z = Φ⁻¹(1 - p/2)`` of the sum of sizes; a tenth more is asked for.
    """
    total, value = len(scored_edges(graph)), share_of(graph, list(edges))
    about = {"edges": str(len(edges)), "of": str(total)}
    if value != value:
        return Finding(
            "few edges", None, value, "share", reason="all are 0" if total else "there are none", about=about
        )
    chance = noise_share(len(edges) / total)
    told = None if len(edges) == total else value - chance >= ALONE
    reason = "noise gives nearly as much" if told is False else ""
    return Finding("few edges", told, value, "share", chance=chance, reason=reason, about=about)


def noise_share(part: float) -> float:
    """What share of the sum of sizes of Gaussian noise its largest ``part`` holds."""
    if not 0 < part < 1:
        return float(part >= 1)
    return math.exp(-(NormalDist().inv_cdf(1 - part / 2) ** 2) / 2)


def main_path(graph: nx.MultiDiGraph) -> Finding:
    """The strongest path, and whether all its scores are apart from 0.

    ``value`` and ``interval`` are those of its edge of the smallest size, or, where one is not apart, of the one that is least so in standard errors.
    """
    path = strongest_path(graph)
    if not path:
        return Finding("strongest path", None, reason="none leads from an input to the answer")
    scored = [graph.edges[edge] for edge in path if not is_link(graph, edge)]
    tests = max(len(scored_edges(graph)), 1)
    weakest = min(scored, key=lambda data: data["weight"])
    apart = [_interval(data, tests) for data in scored]
    told = None if None in apart else all(one is not None and not one[0] <= 0 <= one[1] for one in apart)
    if told is False:
        weakest = min(scored, key=lambda data: data["weight"] / data["se"] if data["se"] else math.inf)
    names = [spoken(graph, node) for node in [path[0][0], *(edge[1] for edge in path)]]
    if len(names) > _MOST_NAMES:
        names = [*names[: _MOST_NAMES - 2], "…", *names[-1:]]
    reason = "an edge of it is not apart from 0" if told is False else ""
    unit, interval = graph.graph["metric_units"], _interval(weakest, tests)
    about = {"path": " → ".join(names)}
    return Finding("strongest path", told, weakest["score"], unit, interval, max(weakest["n"], 1), None, reason, about)


def _interval(data: dict[str, float], tests: int) -> tuple[float, float] | None:
    """95 % of a score by its standard error; None of a single example."""
    return around(data["score"], data["se"], tests) if data["n"] > 1 else None


def spoken(graph: nx.MultiDiGraph, node: str) -> str:
    """A node as figures print it: ``"vision L1H3"``, ``"vision input"``, a connector by its name, what is read out as ``"answer"``."""
    name, kind = parse_id(node), graph.nodes[node]["kind"]
    where = f"@{name.span or name.pos}" if name.span or name.pos >= 0 else ""
    if kind == "connector":
        return name.label + where
    if kind in ("input", "embed", "pos"):
        return f"{name.tower} {kind}{where}"
    if kind in ("logit", "action"):
        return "answer" if name.kind == "logits" else f"{kind} {name.feature}{where}"
    if kind == "kv_head":
        return f"{name.tower} L{name.layer}KV{name.head}{where}"
    return spelled(name) + (where if name.kind in ("head", "mlp", "neuron") else "")
