"""Head importance: what every attention head does to the answer, and how the strongest ones pass it on, as one graph.

*Nodes.* Every head of every tower is patched on its own (all positions of ``attn.hook_z``), as are the input of every
vision tower and every connector between towers; the score is the change of the metric. *Edges* run between the
strongest heads of each tower, the connectors and the answer. They split a sender's effect by the next selected node
that carries it: with the sender patched, the receivers ``r1, r2, …`` downstream of it are frozen at their unpatched
values one after another, in the order of computation, and

    ``edge(s -> r_i) = E(s | r_1 … r_{i-1} frozen) - E(s | r_1 … r_i frozen)``
    ``edge(s -> answer) = E(s | all frozen)``

so the edges out of a node add up to its own effect, whatever the model computes. Freezing everything up to ``r_i``
leaves only what reaches ``r_i`` without passing an earlier selected node; MLPs and heads that were not selected
count as part of the way. Heads of one layer are frozen in the order of their number, so where two of them interact
the split between those two depends on that order.

Not covered: which of q, k and v an edge enters (slot ``in``), positions, and nodes other than heads, vision inputs
and connectors.

Reference: activation patching (Wang et al. 2022, arXiv 2211.00593); freezing receivers follows path patching
(Goldowsky-Dill et al. 2023, arXiv 2304.05969).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits, metrics
from circuitvision.circuits import schema
from circuitvision.errors import InputError
from circuitvision.model.edits.base import EditGroup, by_digest
from circuitvision.model.names import NodeName, format_id, head_id, parse_id, site_of, spelled
from circuitvision.patching.activation import PatchingResult, activation_patch, check_same_shapes
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import standard_error

ANSWER = "answer"
ROUNDING = 3e-6
"""Share of the metric's size that float32 runs of different batches may differ by."""
_COPIED = ("model_id", "weights_sha256", "dataset_sha256", "metric", "metric_units", "method", "dtype", "created")
_MODALITY = {"vision": "image", "vision_2": "image", "action": "action"}


@dataclass(frozen=True, eq=False)
class HeadImportance(Result):
    """Effects of all heads and connectors, and the edges among the strongest.

    ``values`` are shares of the answer restored (``mode="denoise"``) or destroyed (``"noise"``), ``raw`` the same in
    units of the metric; axes tower, layer, head, example, with NaN where a tower has no such head. ``selected`` lists the ids
    of the heads that edges were measured for, strongest first; ``together`` ``[example]`` is the share that patching all of them at
    once moves. ``clean`` and ``corrupt`` ``[example]`` are the metric of the two runs. ``connectors`` and ``inputs`` map the ids of connectors and
    of vision towers' inputs to their site, effect and share. ``edges`` is a list of ``{"sender", "receiver", "score", "se"}``, receiver
    ``"answer"`` for the output. ``dead`` lists sites that cannot reach the output. ``edits`` are the groups that were run, with the values of both
    runs by digest: single heads, then the other nodes, all selected heads together, and the edges' runs.
    """

    raw: Tensor = field(default_factory=lambda: torch.zeros(0))
    selected: list[str] = field(default_factory=list)
    together: Tensor = field(default_factory=lambda: torch.zeros(0))
    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    corrupt: Tensor = field(default_factory=lambda: torch.zeros(0))
    connectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    edges: list[dict[str, Any]] = field(default_factory=list)
    mode: str = "denoise"
    answer_tower: str = ""
    dead: list[str] = field(default_factory=list)
    edits: list[EditGroup] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = dict.fromkeys(("raw", "together", "clean", "corrupt"), -1)

    @property
    def joint(self) -> float:
        """The mean share that patching all selected heads at once moves."""
        return float(self.mean(quantity="together"))

    @property
    def swing(self) -> Float[Tensor, " example"]:
        """How far the metric moves between the two runs, clean minus corrupt."""
        return self.clean - self.corrupt

    @property
    def metric_clean(self) -> float:
        """The mean metric of the clean run."""
        return float(self.mean(quantity="clean"))

    @property
    def metric_corrupt(self) -> float:
        """The mean metric of the corrupt run."""
        return float(self.mean(quantity="corrupt"))

    @property
    def n_examples(self) -> int:
        """How many examples were measured."""
        return len(self.examples)

    def ranking(self) -> list[tuple[str, float, float]]:
        """Every head as (id, mean share, mean effect in units of the metric), largest absolute effect first."""
        heads = []
        shares, effects = self.mean(), self.mean(quantity="raw")
        for index in torch.isfinite(effects).nonzero().tolist():
            tower, layer, head = (self.axes[name][i] for name, i in zip(("tower", "layer", "head"), index, strict=True))
            heads.append((head_id(tower, layer, head), float(shares[tuple(index)]), float(effects[tuple(index)])))
        return sorted(heads, key=lambda entry: -abs(entry[2]))

    def best(self) -> tuple[str, float]:
        """The head with the largest share, and that share."""
        name, share, _ = max(self.ranking(), key=lambda entry: entry[1])
        return name, share

    def to_networkx(self) -> nx.MultiDiGraph:
        """The graph of schema ``circuitvision.graph/1``, kind ``head_importance``.

        ``score`` is in units of the metric, ``influence`` of a node its share. Heads that were not selected are in
        it without edges, with ``in_circuit`` false.
        """
        origin = self.provenance
        graph = schema.new_graph(
            "head_importance",
            name=f"{origin.get('model_id', '')}|{origin.get('metric', '')}|head importance",
            towers_json=json.dumps(origin.get("towers", {})),
            metric_clean=self.metric_clean,
            metric_corrupt=self.metric_corrupt,
            sign="patched_minus_corrupt" if self.mode == "denoise" else "patched_minus_clean",
            intervention="interchange",
            corruption="paired run",
            aggregation="mean over examples",
            n_examples=self.n_examples,
            seed=-1 if origin.get("seed") is None else origin["seed"],
            code_version=str(origin.get("versions", {}).get("circuitvision", "")),
            **{key: str(origin.get(key, "")) for key in _COPIED},
        )
        for name, share, effect in self.ranking():
            node = parse_id(name)
            schema.add_node(
                graph,
                node,
                label=spelled(node),
                score=effect,
                influence=share,
                in_circuit=name in self.selected,
                modality=_MODALITY.get(node.tower, "text"),
                hook_out=_site(name),
            )
        for name, entry in {**self.inputs, **self.connectors}.items():
            label = parse_id(name).label or "image"
            given = {
                "score": entry["effect"],
                "influence": entry["share"],
                "hook_out": entry["site"],
                "modality": "image",
            }
            schema.add_node(graph, parse_id(name), label=label, **given)
        output = NodeName(self.answer_tower, "logits")
        schema.add_node(graph, output, label=str(origin.get("metric", ANSWER)), modality="none", hook_out="")
        for edge in self.edges:
            receiver = format_id(output) if edge["receiver"] == ANSWER else edge["receiver"]
            schema.add_edge(graph, edge["sender"], receiver, "in", edge["score"], se=edge["se"], n=self.n_examples)
        schema.rank_edges(graph)
        return graph


@with_provenance
def head_importance(
    model: Any,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any],
    metric: Any,
    *,
    top_k: int = 4,
    mode: str = "denoise",
    towers: Sequence[str] | None = None,
) -> HeadImportance:
    """Patch every head of every tower, then split the effects of the strongest by where they go.

    Args:
        model: the hooked model.
        clean: inputs whose answer the metric favours.
        corrupt: inputs of the same shapes whose answer differs.
        metric: ``metric(logits, inputs) -> [batch]``.
        top_k: how many heads of each tower get edges; those with the largest absolute effect.
        mode: ``"denoise"`` or ``"noise"``, see :func:`circuitvision.patching.activation_patch`.
        towers: which towers; all by default.

    Raises:
        InputError: no example in which the metric tells the two runs apart, or anything ``activation_patch`` refuses.
    """
    check_same_shapes(clean, corrupt)
    metric = metrics.bind(metric, model)
    names = list(model.towers) if towers is None else list(towers)
    patched = {}
    for tower in names:
        sites = f"{tower}.blocks.*.attn.hook_z"
        patched[tower] = activation_patch(model, clean, corrupt, metric, sites=sites, mode=mode)
    runs = next(iter(patched.values()))
    if bool(runs.values.isnan().all()):
        raise InputError("The metric hardly differs between the two runs, so no head can restore anything.")
    values, raw, axes = _stack(patched)
    selected = _strongest(raw, axes, top_k)
    base_inputs, source_inputs = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    freezer = _Freezer(model, metric, base_inputs, source_inputs, selected, runs)
    *singles, together = freezer.effects([*(([site], []) for site in freezer.ids), (list(selected), [])])
    wholes = {}
    for (site, name), effect in zip(freezer.ids.items(), singles, strict=True):
        share = float((effect / freezer.gap).nanmean())
        wholes[name] = {"site": site, "effect": float(effect.mean()), "share": share}
    edges = _edges(freezer, selected)
    ends = (runs.source, runs.base) if mode == "denoise" else (runs.base, runs.source)
    return HeadImportance(
        values=values,
        axes=axes,
        provenance=describe(
            model,
            method=f"head_importance(mode={mode})",
            metric=metric,
            inputs=(clean, corrupt),
            towers=_sizes(patched),
        ),
        raw=raw,
        selected=[name for name, _ in sorted(selected.items(), key=lambda entry: -abs(entry[1]))],
        together=together / freezer.gap,
        clean=ends[0],
        corrupt=ends[1],
        connectors={freezer.ids[site]: wholes[freezer.ids[site]] for site in freezer.connectors},
        inputs={freezer.ids[site]: wholes[freezer.ids[site]] for site in freezer.inputs},
        edges=edges,
        mode=mode,
        answer_tower=names[-1],
        dead=[site for result in patched.values() for site in result.dead],
        edits=[*(group for result in patched.values() for group in result.edits), *freezer.groups],
    )


class _Freezer:
    """Runs the base with some nodes patched to the source and others held at their base values."""

    def __init__(
        self,
        model: Any,
        metric: Any,
        base_inputs: Mapping[str, Any],
        source_inputs: Mapping[str, Any],
        selected: Mapping[str, float],
        measured: PatchingResult,
    ) -> None:
        self.model, self.metric, self.base_inputs, self.base = model, metric, base_inputs, measured.base
        # Examples in which the two runs hardly differ have no share; one cell of the measurement says which they are.
        one_cell = measured.values.flatten(0, -2)[0]
        self.gap = (measured.source - measured.base).masked_fill(one_cell.isnan(), float("nan"))
        self.groups: list[EditGroup] = []
        self.connectors, self.inputs = connector_sites(model), input_sites(model)
        self.ids = {site: format_id(NodeName(site.split(".")[0], "input")) for site in self.inputs}
        self.ids |= {site: _connector_id(site) for site in self.connectors}
        sites = [*sorted({_site(name) for name in selected}), *self.ids]
        with torch.no_grad():
            _, self.source_cache = model.run_with_cache(source_inputs, names_filter=sites)
            _, self.base_cache = model.run_with_cache(self.base_inputs, names_filter=sites)

    def effects(self, cells: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[Tensor]:
        """The change of the metric per example, in its own units, for each (patched, frozen) pair of node lists."""
        groups = [self._writes(patch, self.source_cache) + self._writes(hold, self.base_cache) for patch, hold in cells]
        self.groups += map(by_digest, groups)
        return list(self.model.sweep(self.base_inputs, groups, self.metric).values - self.base)

    def _writes(self, names: Sequence[str], cache: Mapping[str, Tensor]) -> list[edits.Edit]:
        """Nodes held at their values in another run: whole sites, or heads of one site together."""
        heads: dict[str, list[int]] = defaultdict(list)
        wholes = [edits.replace(name, cache[name]) for name in names if name in self.ids]
        for name in names:
            if name not in self.ids:
                heads[_site(name)].append(parse_id(name).head)
        return wholes + [edits.replace(site, cache[site], heads=chosen) for site, chosen in heads.items()]


def connector_sites(model: Any) -> list[str]:
    """The outputs of the modules that lead from one tower to another, for example ``projector.hook_out``."""
    outputs = [name for name in model.sites("**") if name.count(".") == 1 and name.endswith(".hook_out")]
    return [name for name in outputs if name.split(".")[0] not in model.towers]


def input_sites(model: Any) -> list[str]:
    """What enters block 0 of each vision tower: all that the tower knows of the image."""
    return [f"{tower}.hook_input" for tower in model.towers if tower.startswith("vision") and _offers(model, tower)]


def _offers(model: Any, tower: str) -> bool:
    return f"{tower}.hook_input" in model.sites("**")


def _connector_id(site: str) -> str:
    return format_id(NodeName("connector", "connector", label=site.split(".")[0]))


def _edges(freezer: _Freezer, selected: Mapping[str, float]) -> list[dict[str, Any]]:
    nodes = sorted(selected, key=lambda name: _depth(name, freezer))
    # Connectors come after every head of the vision towers and before all others.
    cut = sum(parse_id(name).tower.startswith("vision") for name in nodes)
    nodes[cut:cut] = freezer.connectors
    nodes[:0] = freezer.inputs
    cells: list[tuple[str, str, list[str]]] = []
    for number, sender in enumerate(nodes):
        frozen: list[str] = []
        cells.append((sender, "", []))
        for receiver in nodes[number + 1 :]:
            # A remaining effect of zero is no reason to stop here: paths of opposite sign may cancel in it.
            if receiver in freezer.inputs or _same_depth(sender, receiver, freezer):
                continue
            frozen = [*frozen, receiver]
            cells.append((sender, receiver, frozen))
    effects = freezer.effects([([sender], hold) for sender, _, hold in cells])
    edges = []
    for number, (sender, receiver, _) in enumerate(cells):
        if receiver:
            edges.append(_edge(freezer, sender, receiver, effects[number - 1] - effects[number]))
        if number + 1 == len(cells) or cells[number + 1][0] != sender:
            edges.append(_edge(freezer, sender, ANSWER, effects[number]))
    # Runs of different batches round differently: below that, a difference is no edge.
    floor = ROUNDING * float(freezer.gap.abs().nanmean() + freezer.base.abs().mean())
    return [edge for edge in edges if abs(edge["score"]) > floor]


def _edge(freezer: _Freezer, sender: str, receiver: str, scores: Tensor) -> dict[str, Any]:
    spread = float(standard_error(scores).nan_to_num(0.0))
    ends = {"sender": freezer.ids.get(sender, sender), "receiver": freezer.ids.get(receiver, receiver)}
    return {**ends, "score": float(scores.mean()), "se": spread}


def _depth(name: str, freezer: _Freezer) -> tuple[int, int, int]:
    node = parse_id(name)
    return list(freezer.model.towers).index(node.tower), node.layer, node.head


def _same_depth(sender: str, receiver: str, freezer: _Freezer) -> bool:
    if sender in freezer.ids or receiver in freezer.ids:
        return False
    return _depth(sender, freezer)[:2] == _depth(receiver, freezer)[:2]


def _site(name: str) -> str:
    return site_of(name)[0]


def _stack(patched: Mapping[str, PatchingResult]) -> tuple[Tensor, Tensor, dict[str, list[Any]]]:
    layers = max(len(result.axes["layer"]) for result in patched.values())
    heads = max(len(result.axes["head"]) for result in patched.values())
    dtype = next(iter(patched.values())).raw.dtype
    examples = next(iter(patched.values())).axes["example"]
    values = torch.full((len(patched), layers, heads, len(examples)), float("nan"), dtype=dtype)
    raw = values.clone()
    for number, result in enumerate(patched.values()):
        rows, columns, _ = result.values.shape
        values[number, :rows, :columns] = result.values
        raw[number, :rows, :columns] = result.raw
    axes: dict[str, list[Any]] = {
        "tower": list(patched),
        "layer": list(range(layers)),
        "head": list(range(heads)),
        "example": examples,
    }
    return values, raw, axes


def _strongest(raw: Tensor, axes: Mapping[str, list[Any]], top_k: int) -> dict[str, float]:
    """Id and effect of the ``top_k`` heads of each tower with the largest absolute effect that is not zero."""
    chosen: dict[str, float] = {}
    for number, tower in enumerate(axes["tower"]):
        flat = raw[number].nanmean(-1).flatten()
        for index in flat.abs().nan_to_num(0.0).argsort(descending=True, stable=True)[:top_k].tolist():
            effect = float(flat[index])
            if effect == effect and effect != 0.0:
                layer, head = divmod(index, raw.shape[2])
                chosen[head_id(tower, layer, head)] = effect
    return chosen


def _sizes(patched: Mapping[str, PatchingResult]) -> dict[str, dict[str, int]]:
    return {name: {"n_layers": len(r.axes["layer"]), "n_heads": len(r.axes["head"])} for name, r in patched.items()}
