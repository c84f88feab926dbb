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

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.circuits import schema
from circuitvision.errors import InputError
from circuitvision.metric_set import MetricSet
from circuitvision.metrics.effects import restored_error, restored_share
from circuitvision.model.edits.base import EditGroup, by_digest
from circuitvision.model.names import NodeName, format_id, head_id, parse_id, site_of, spelled
from circuitvision.model.state import refuse_unwrapped
from circuitvision.patching.activation import PatchingResult, activation_patch
from circuitvision.patching.runs import Runs, two_runs
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.statistics import standard_error

ANSWER = "answer"
ROUNDING = 3e-6
"""Share of the metric's size that float32 runs of different batches may differ by."""
_COPIED = ("model_id", "weights_sha256", "dataset_sha256", "metric", "metric_units", "method", "dtype", "created")


@dataclass(frozen=True, eq=False)
class HeadImportance(Result):
    """Effects of all heads and connectors, and the edges among the strongest.

    ``values`` ``[tower layer head example]`` are the changes of the metric, NaN where a tower has no such head; several metrics lead, ``[metric tower
    layer head example]``. ``base`` and ``source`` ``[example]`` (``[metric example]``) are the metric of the run that was patched and of the one
    whose values it took; :attr:`restored` is the share of their difference that a head restores (``mode="denoise"``) or destroys (``"noise"``).

    Everything else is of the first metric. ``selected`` lists the ids of the heads that edges were measured for, strongest first;
    ``together`` ``[example]`` is the change of the metric with all of them patched at once, and :attr:`joint` its share. ``connectors`` and
    ``inputs`` map the ids of connectors and of vision towers' inputs to their site, effect and share. ``edges`` is a list of
    ``{"sender", "receiver", "score", "se"}``, receiver ``"answer"`` for the output. ``dead`` lists sites that cannot reach the output.
    ``modalities`` says what the positions of each tower are. ``edits`` are the groups that were run, with values by digest: single heads, then the
    other nodes, all selected heads together, and the edges' runs. ``groups`` says which examples belong together, where the data does.
    """

    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    selected: list[str] = field(default_factory=list)
    together: Tensor = field(default_factory=lambda: torch.zeros(0))
    connectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    edges: list[dict[str, Any]] = field(default_factory=list)
    mode: str = "denoise"
    answer_tower: str = ""
    dead: list[str] = field(default_factory=list)
    edits: list[EditGroup] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"base": -1, "source": -1, "together": -1, "groups": 0}

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, where several were measured; else empty."""
        return list(self.axes.get("metric", []))

    def _runs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The effects, and the metric of the base and of the source, in one shape."""
        lead = [len(self.metrics)] if self.metrics else []
        base, source = (found.view(*lead, 1, 1, 1, -1).expand(self.values.shape) for found in (self.base, self.source))
        return self.values, base, source

    @property
    def restored(self) -> Float[Tensor, "*metric tower layer head"]:
        """The share of the answer that each head moves, a ratio of means (see :mod:`circuitvision.patching.activation`); NaN where the runs do not
        differ."""
        return restored_share(*self._runs())

    @property
    def restored_error(self) -> Float[Tensor, "*metric tower layer head"]:
        """The standard error of :attr:`restored` over examples; NaN for a single one."""
        return restored_error(*self._runs())

    @property
    def shares(self) -> Float[Tensor, "tower layer head"]:
        """:attr:`restored` of the first metric."""
        return self.restored[0] if self.metrics else self.restored

    @property
    def effects(self) -> Float[Tensor, "tower layer head"]:
        """The mean change of the first metric, in its own units."""
        found = self.mean()
        return found[0] if self.metrics else found

    @property
    def joint(self) -> float:
        """The share that patching all selected heads at once moves, of the first metric."""
        return float(restored_share(self.together, *self._leading_runs()))

    @property
    def joint_error(self) -> float:
        """The standard error of :attr:`joint` over examples; NaN for a single one."""
        return float(restored_error(self.together, *self._leading_runs()))

    @property
    def swing(self) -> Float[Tensor, " example"]:
        """How far the first metric moves between the two runs, clean minus corrupt."""
        base, source = self._leading_runs()
        return source - base if self.mode == "denoise" else base - source

    @property
    def swing_error(self) -> float:
        """The standard error of the mean :attr:`swing` over examples; NaN for a single one."""
        return float(self.error(quantity="swing"))

    @property
    def metric_clean(self) -> float:
        """The mean of the first metric in the clean run."""
        return self._mean_of_run("source" if self.mode == "denoise" else "base")

    @property
    def metric_corrupt(self) -> float:
        """The mean of the first metric in the corrupt run."""
        return self._mean_of_run("base" if self.mode == "denoise" else "source")

    @property
    def n_examples(self) -> int:
        """How many examples were measured."""
        return len(self.examples)

    def _mean_of_run(self, run: str) -> float:
        found = self.mean(quantity=run)
        return float(found[0] if self.metrics else found)

    def _leading_runs(self) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
        """The first metric of the base and of the source."""
        return (self.base[0], self.source[0]) if self.metrics else (self.base, self.source)

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The effects. Raises InputError for several metrics."""
        if self.metrics:
            raise InputError(f"Several metrics were measured ({', '.join(self.metrics)}); rank the result of one.")
        return self.values, ("example",)

    def _cells(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every head that exists, as id and place."""
        axes = [self.axes[name] for name in ("tower", "layer", "head")]
        there = torch.isfinite(self.effects).nonzero().tolist()
        return [(head_id(*(labels[i] for labels, i in zip(axes, at, strict=True))), tuple(at)) for at in there]

    def share_errors(self) -> dict[str, float]:
        """The standard error of every head's share over examples, by id; empty for a single example."""
        found = self.restored_error[0] if self.metrics else self.restored_error
        return {name: float(found[at]) for name, at in self._cells() if torch.isfinite(found[at])}

    def ranking(self) -> list[tuple[str, float, float]]:
        """Every head as (id, share, effect in units of the metric), largest absolute effect first."""
        shares, effects = self.shares, self.effects
        heads = [(name, float(shares[at]), float(effects[at])) for name, at in self._cells()]
        return sorted(heads, key=lambda entry: -abs(entry[2]))

    def best(self) -> tuple[str, float]:
        """The head with the largest share, and that share."""
        name, share, _ = max(
            self.ranking(), key=lambda entry: (-math.inf if math.isnan(entry[1]) else entry[1], abs(entry[2]))
        )
        return name, share

    def to_networkx(self) -> nx.MultiDiGraph:
        """The graph of schema ``circuitvision.graph/1``, kind ``head_importance``.

        ``score`` is in units of the metric, ``influence`` of a node its share. Heads that were not selected are in
        it without edges, with ``in_circuit`` false.

        Raises:
            InputError: the runs do not differ in the metric over these examples, so that nothing has a share.
        """
        if bool(self.shares[torch.isfinite(self.effects)].isnan().any()):
            raise InputError(
                f"Over {self.n_examples} examples the metric does not differ between the two runs by more than two standard errors, so nothing has a "
                "share of the difference: take pairs that the model tells apart (pairs.answered(model)), or more of them."
            )
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
                modality=self.modalities.get(node.tower, "text"),
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
    pairs: Any = None,
    metric: Any = None,
    *,
    top_k: int = 4,
    mode: str = "denoise",
    towers: Sequence[str] | None = None,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> HeadImportance:
    """Patch every head of every tower, then split the effects of the strongest by where they go.

    Args:
        model: the hooked model.
        pairs: a data set of pairs, see :func:`circuitvision.patching.activation_patch`.
        metric: a metric, its name, or a mapping of several; edges are measured for the first.
        top_k: how many heads of each tower get edges; those with the largest absolute effect.
        mode: ``"denoise"`` or ``"noise"``, see :func:`circuitvision.patching.activation_patch`.
        towers: which towers; all by default.
        clean, corrupt: in place of pairs, the inputs of the two runs, of the same shapes.
        align, example_batch, save_to, resume, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: a metric that does not tell the two runs apart, or anything ``activation_patch`` refuses.
    """
    refuse_unwrapped(model)
    given = {"clean": clean, "corrupt": corrupt, "mode": mode, "align": align, "example_batch": example_batch}
    options: dict[str, Any] = {"resume": resume, "progress": progress}
    names = list(model.towers) if towers is None else list(towers)
    patched = {}
    for tower in names:
        sites, folder = f"{tower}.blocks.*.attn.hook_z", _inside(save_to, tower)
        # Whether the clean run gives the answer is a finding of the result.
        patched[tower] = activation_patch(
            model, pairs, metric, sites=sites, save_to=folder, allow_wrong=True, **given, **options
        )
    first = next(iter(patched.values()))
    values, axes = _stack(patched)
    lead = {"metric": first.metrics} if first.metrics else {}
    heads = HeadImportance(
        values, {**lead, **axes, "example": first.axes["example"]}, base=first.base, source=first.source
    )
    gap, size = (heads.source - heads.base).abs(), heads.source.abs() + heads.base.abs()
    if not bool((gap > ROUNDING * size).any()):
        raise InputError("The metric does not differ between the two runs, so no head can restore anything.")
    selected = _strongest(heads.effects, axes, top_k)
    leading = _leading(metric)
    runs = two_runs(model, pairs, leading, clean, corrupt, mode, align, example_batch, allow_wrong=True)
    freezer = _Freezer(model, runs, selected, {"save_to": save_to, **options})
    *singles, together = freezer.effects([*(([site], []) for site in freezer.ids), (list(selected), [])], "nodes")
    wholes = {
        name: {"site": site, "effect": float(effect.mean()), "share": freezer.share(effect)}
        for (site, name), effect in zip(freezer.ids.items(), singles, strict=True)
    }
    edges = _edges(freezer, selected)
    return dataclasses.replace(
        heads,
        provenance=describe(
            model,
            method=f"head_importance(mode={mode})",
            metric=MetricSet.of(metric).bind(model) if pairs is None else MetricSet.of(metric),
            towers=_sizes(patched),
            **runs.described(),
        ),
        selected=[name for name, _ in sorted(selected.items(), key=lambda entry: -abs(entry[1]))],
        together=together,
        connectors={freezer.ids[site]: wholes[freezer.ids[site]] for site in freezer.connectors},
        inputs={freezer.ids[site]: wholes[freezer.ids[site]] for site in freezer.inputs},
        edges=edges,
        mode=mode,
        answer_tower=model.flow.answer if model.flow.answer in names else names[-1],
        modalities={name: _modality(model.towers[name]) for name in names},
        dead=[site for result in patched.values() for site in result.dead],
        edits=[*(group for result in patched.values() for group in result.edits), *freezer.groups],
        groups=first.groups,
    )


def _inside(folder: str | Path | None, name: str) -> Path | None:
    return None if folder is None else Path(folder) / name


def _leading(metric: Any) -> Any:
    """The first of several metrics."""
    members = MetricSet.of(metric)
    return next(iter(members.members.values()))


class _Freezer:
    """Runs the base with some nodes patched to the source and others held at their base values."""

    def __init__(self, model: Any, runs: Runs, selected: Mapping[str, float], options: Mapping[str, Any]) -> None:
        self.model, self.runs, self.options = model, runs, dict(options)
        self.groups: list[EditGroup] = []
        self.connectors, self.inputs = connector_sites(model), input_sites(model)
        self.ids = {site: format_id(NodeName(site.split(".")[0], "input")) for site in self.inputs}
        self.ids |= {site: _connector_id(site) for site in self.connectors}
        sites = [*sorted({_site(name) for name in selected}), *self.ids]
        self.sources, self.held = runs.sources(sites), runs.holds(sites)
        self.base = self.source = torch.zeros(0)

    def effects(self, cells: Sequence[tuple[Sequence[str], Sequence[str]]], folder: str) -> list[Tensor]:
        """The change of the metric per example, in its own units, for each (patched, frozen) pair of node lists."""
        groups = [tuple(self._writes(patch, self.sources) + self._writes(hold, self.held)) for patch, hold in cells]
        self.groups += map(by_digest, groups)
        measured = self.runs.measure(groups, **{**self.options, "save_to": _inside(self.options["save_to"], folder)})
        self.base, self.source = measured.base[0], measured.source[0]
        return list(measured.values[0] - self.base)

    def share(self, effect: Tensor) -> float:
        """The share of the two runs' difference that an effect is."""
        return float(restored_share(effect, self.base, self.source))

    def _writes(self, names: Sequence[str], values: Mapping[str, Any]) -> list[edits.Edit]:
        """Nodes held at their values in another run: whole sites, or heads of one site together."""
        heads: dict[str, list[int]] = defaultdict(list)
        wholes = [edits.replace(name, values[name]) for name in names if name in self.ids]
        for name in names:
            if name not in self.ids:
                heads[_site(name)].append(parse_id(name).head)
        return wholes + [edits.replace(site, values[site], heads=chosen) for site, chosen in heads.items()]


def connector_sites(model: Any) -> list[str]:
    """The outputs of the modules that lead from one tower to another, for example ``projector.hook_out``."""
    outputs = [name for name in model.sites("**") if name.count(".") == 1 and name.endswith(".hook_out")]
    return [name for name in outputs if name.split(".")[0] not in model.towers]


def input_sites(model: Any) -> list[str]:
    """What enters block 0 of each tower that reads pictures: all that the tower knows of the image."""
    return [
        f"{name}.hook_input" for name, tower in model.towers.items() if reads_images(tower) and _offers(model, name)
    ]


def reads_images(tower: Any) -> bool:
    """Whether what a tower reads is a picture."""
    return bool(getattr(getattr(tower, "stack", None), "image", False))


def _modality(tower: Any) -> str:
    """What the positions of a tower are: "image", "text" or "action"."""
    if reads_images(tower):
        return "image"
    return "action" if getattr(getattr(tower, "spec", None), "runs", "") == "per_denoising_step" else "text"


def _offers(model: Any, tower: str) -> bool:
    return f"{tower}.hook_input" in model.sites("**")


def _connector_id(site: str) -> str:
    return format_id(NodeName("connector", "connector", label=site.split(".")[0]))


def _edges(freezer: _Freezer, selected: Mapping[str, float]) -> list[dict[str, Any]]:
    stages = freezer.model.flow.stages
    # A connector comes where it runs: behind every head of the towers that it reads.
    behind = {site: (stages.index(site.split(".")[0]), 0, 0) for site in freezer.connectors}
    nodes = sorted([*selected, *freezer.connectors], key=lambda name: behind.get(name) or _depth(name, freezer))
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
    effects = freezer.effects([([sender], hold) for sender, _, hold in cells], "edges")
    edges = []
    for number, (sender, receiver, _) in enumerate(cells):
        if receiver:
            edges.append(_edge(freezer, sender, receiver, effects[number - 1] - effects[number]))
        if number + 1 == len(cells) or cells[number + 1][0] != sender:
            edges.append(_edge(freezer, sender, ANSWER, effects[number]))
    # Runs of different batches round differently: below that, a difference is no edge.
    floor = ROUNDING * float((freezer.source - freezer.base).abs().mean() + freezer.base.abs().mean())
    return [edge for edge in edges if abs(edge["score"]) > floor]


def _edge(freezer: _Freezer, sender: str, receiver: str, scores: Tensor) -> dict[str, Any]:
    spread = float(standard_error(scores).nan_to_num(0.0))
    ends = {"sender": freezer.ids.get(sender, sender), "receiver": freezer.ids.get(receiver, receiver)}
    return {**ends, "score": float(scores.mean()), "se": spread}


def _depth(name: str, freezer: _Freezer) -> tuple[int, int, int]:
    node = parse_id(name)
    return freezer.model.flow.stages.index(node.tower), node.layer, node.head


def _same_depth(sender: str, receiver: str, freezer: _Freezer) -> bool:
    if sender in freezer.ids or receiver in freezer.ids:
        return False
    return _depth(sender, freezer)[:2] == _depth(receiver, freezer)[:2]


def _site(name: str) -> str:
    return site_of(name)[0]


def _stack(patched: Mapping[str, PatchingResult]) -> tuple[Tensor, dict[str, list[Any]]]:
    """The effects of all towers in one tensor, and the axes of the heads."""
    layers = max(len(result.axes["layer"]) for result in patched.values())
    heads = max(len(result.axes["head"]) for result in patched.values())
    first = next(iter(patched.values())).values
    lead, examples = first.shape[:-3], first.shape[-1]
    values = torch.full((*lead, len(patched), layers, heads, examples), math.nan, dtype=first.dtype)
    for number, result in enumerate(patched.values()):
        rows, columns = result.values.shape[-3:-1]
        values[..., number, :rows, :columns, :] = result.values
    return values, {"tower": list(patched), "layer": list(range(layers)), "head": list(range(heads))}


def _strongest(effects: Tensor, axes: Mapping[str, list[Any]], top_k: int) -> dict[str, float]:
    """Id and effect of the ``top_k`` heads of each tower with the largest absolute effect that is not zero."""
    chosen: dict[str, float] = {}
    for number, tower in enumerate(axes["tower"]):
        flat = effects[number].flatten()
        for index in flat.abs().nan_to_num(0.0).argsort(descending=True, stable=True)[:top_k].tolist():
            effect = float(flat[index])
            if effect == effect and effect != 0.0:
                layer, head = divmod(index, effects.shape[2])
                chosen[head_id(tower, layer, head)] = effect
    return chosen


def _sizes(patched: Mapping[str, PatchingResult]) -> dict[str, dict[str, int]]:
    return {name: {"n_layers": len(r.axes["layer"]), "n_heads": len(r.axes["head"])} for name, r in patched.items()}
