"""Head importance: what every head, MLP, group of key and value heads or group of neurons does to the answer, and how the strongest pass it on.

*Scores.* Every unit of every tower (:mod:`circuitvision.circuits.units`) is scored by one method, in units of the metric and per example:

* ``"patch"``: it takes its values in the other run of the pair; ``mode="denoise"`` puts clean values into the corrupt run, ``"noise"`` corrupt ones
  into the clean run. Exact, one run per unit.
* ``"zero"``, ``"mean"``, ``"resample"``: it is ablated in the clean run, see :func:`circuitvision.edits.ablate`; exact, ``metric(ablated) −
  metric(clean)``, so what carries the answer scores below 0. One run is enough: pairs may be a ``Side``. Connectors and inputs are put to their mean
  over all positions unless ablated to zero.
* ``"attribution"``: what ``"patch"`` would measure, estimated from one gradient (attribution patching).
* ``"direct"``: patched, with every other head and MLP held, so that only what it writes itself reaches the output. This is direct logit attribution
  of the difference between the two runs, with the final norm's statistics free.
* ``"information_gain"``: what of the Jensen–Shannon divergence between the outputs of the two runs (in nats) is gone once it is mean-ablated in both
  (CIGMA's score, for pairs of any kind); below 0 where the pair's difference needs the unit.

*Edges* run between the strongest units of each tower, the inputs of vision towers, the connectors and the answer, as one graph. They split a sender's
effect by the next selected node, and its slot, that carries it: with the sender changed, the slots ``r1, r2, …`` downstream of it are held at their
unchanged values one after another, in the order of computation (of a head ``q``, then ``k``, then ``v``), and

    ``edge(s -> r_i) = E(s | r_1 … r_{i-1} held) - E(s | r_1 … r_i held)``
    ``edge(s -> answer) = E(s | all held)``

so the edges out of a node add up to its own effect, whatever the model computes. They are effects of interventions, not compositions of weights.
Holding everything up to ``r_i`` leaves only what reaches ``r_i`` without passing an earlier selected node; units that were not selected count as part
of the way. Units of one layer are held in the order of their number, and slots in theirs, so where two of them interact the split between those two
depends on that order. Under the three estimates the edges are those of ``"patch"`` (of ``"information_gain"`` of the mean ablation).

*Controls.* ``together`` is the effect of all selected units at once, ``random_together`` that of random sets of as many of the same towers and kinds.
:func:`circuitvision.readout.rank_components` of a result gives those at or beyond mean + 2 sd.

Not covered: positions; heads of attention pooling and cross-attention.

Reference: activation patching (Wang et al. 2022, arXiv 2211.00593); holding receivers follows path patching (Goldowsky-Dill et al. 2023, arXiv
2304.05969); mean + 2 sd: Golovanevsky et al. 2024 (arXiv 2406.16320); information gain: CIGMA (Maliha et al., CVPR 2026).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits import schema
from circuitvision.circuits.path_effects import ANSWER, PathEffects, wholes
from circuitvision.circuits.unit_scores import METHODS, Asked, scores
from circuitvision.circuits.units import Unit, by_kind, connectors_of, hook_of, inputs_of, modality_of, units_of
from circuitvision.errors import InputError, checked_seed, warn
from circuitvision.metrics.effects import restored_error, restored_share
from circuitvision.model.edits.base import EditGroup
from circuitvision.model.names import NodeName, format_id, parse_id, spelled, unit_id
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.activation import warn_of_equal_runs
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

_COPIED = ("model_id", "weights_sha256", "dataset_sha256", "metric", "metric_units", "method", "dtype", "created")
_INTERVENTIONS = {
    "zero": "zero ablation",
    "mean": "mean ablation",
    "resample": "resample ablation",
    "information_gain": "mean ablation",
}


@dataclass(frozen=True, eq=False)
class HeadImportance(Result):
    """Scores of all heads (or units of other kinds), and the edges among the strongest and the connectors.

    ``values`` ``[tower layer head example]`` are changes of the metric, NaN where a tower has no such head; several metrics lead, ``[metric tower
    layer head example]``. With other units than heads the axis is ``unit``: ``"H3"``, ``"mlp"``, ``"kv0"``, ``"G2"``. ``base`` and ``source``
    ``[example]`` (``[metric example]``) are the metric of the run that was changed and of the other one (NaN where an ablation had none);
    :attr:`restored` is the share of their difference that a unit restores (``mode="denoise"``) or destroys (``"noise"``).

    Everything else is of the first metric. ``selected`` lists the ids of the units that edges were measured for, strongest first, and ``exact`` maps
    them to their measured effect, which an estimate misses; ``together`` ``[example]`` is the change of the metric with all of them changed at once,
    and :attr:`joint` its share; ``random_together`` ``[draw example]`` is that of each of ``random_sets``. ``connectors`` and ``inputs`` map the ids
    of connectors and of vision towers' inputs to their site, effect and share, ``neuron_groups`` those of groups of neurons to their numbers.
    ``edges`` is a list of ``{"sender", "receiver", "slot", "score", "se"}``, receiver ``"answer"`` for the output. ``dead`` lists sites that cannot
    reach the output. ``modalities`` says what the positions of each tower are. ``edits`` are the groups that were run, with values by digest: single
    units (where they are measured), the other nodes, all selected units together, random sets, and the edges' runs. ``groups`` says which examples
    belong together, where the data does.
    """

    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    selected: list[str] = field(default_factory=list)
    together: Tensor = field(default_factory=lambda: torch.zeros(0))
    connectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    edges: list[dict[str, Any]] = field(default_factory=list)
    neuron_groups: dict[str, list[int]] = field(default_factory=dict)
    exact: dict[str, float] = field(default_factory=dict)
    random_sets: list[list[str]] = field(default_factory=list)
    random_together: Tensor = field(default_factory=lambda: torch.zeros(0))
    method: str = "patch"
    mode: str = "denoise"
    answer_tower: str = ""
    dead: list[str] = field(default_factory=list)
    edits: list[EditGroup] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {
        "base": -1,
        "source": -1,
        "together": -1,
        "groups": 0,
        "random_together": -1,
    }

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
    def random_joint(self) -> Float[Tensor, " draw"]:
        """The share that each random set moves, of the first metric."""
        base, source = (run.expand(self.random_together.shape) for run in self._leading_runs())
        return restored_share(self.random_together, base, source)

    @property
    def p_random(self) -> float:
        """``(1 + #{random sets with at least the mean effect of the selected, in size}) / (1 + #random sets)``; NaN without random sets."""
        if not len(self.random_sets):
            return math.nan
        own, others = float(self.together.mean().abs()), self.random_together.mean(-1).abs()
        return (1 + int((others >= own).sum())) / (1 + len(others))

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
    def second_run(self) -> bool:
        """Whether there was another run that shares are of."""
        return bool(torch.isfinite(self.source).any())

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
        """Every unit that exists, as id and place."""
        axes = [labels for name, labels in self.axes.items() if name not in ("metric", "example")]
        there = torch.isfinite(self.effects).nonzero().tolist()
        return [(unit_id(*(labels[i] for labels, i in zip(axes, at, strict=True))), tuple(at)) for at in there]

    def place(self, name: str) -> tuple[int, ...]:
        """The index of a unit in :attr:`effects` and :attr:`shares`. Raises InputError for one that was not scored."""
        for known, at in self._cells():
            if known == name:
                return at
        raise InputError(f"{name} is no unit that was scored here.")

    def share_errors(self) -> dict[str, float]:
        """The standard error of every head's share over examples, by id; empty for a single example."""
        found = self.restored_error[0] if self.metrics else self.restored_error
        return {name: float(found[at]) for name, at in self._cells() if torch.isfinite(found[at])}

    def ranking(self) -> list[tuple[str, float, float]]:
        """Every unit as (id, share, effect in units of the metric), largest absolute effect first."""
        shares, effects = self.shares, self.effects
        found = [(name, float(shares[at]), float(effects[at])) for name, at in self._cells()]
        return sorted(found, key=lambda entry: -abs(entry[2]))

    def best(self) -> tuple[str, float]:
        """The head with the largest share, and that share."""
        name, share, _ = max(
            self.ranking(), key=lambda entry: (-math.inf if math.isnan(entry[1]) else entry[1], abs(entry[2]))
        )
        return name, share

    def to_networkx(self) -> nx.MultiDiGraph:
        """The graph of schema ``circuitvision.graph/1``, kind ``head_importance``.

        ``score`` is in units of the metric (of selected units the measured effect, which edges add up to), ``influence`` of a node its share. Units
        that were not selected are in it without edges, with ``in_circuit`` false.

        Raises:
            InputError: the runs do not differ in the metric over these examples, so that nothing has a share.
        """
        if self.second_run and bool(self.shares[torch.isfinite(self.effects)].isnan().any()):
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
            metric_corrupt=self.metric_corrupt if self.second_run else 0.0,
            sign="patched_minus_corrupt" if self.mode == "denoise" else "patched_minus_clean",
            intervention=_INTERVENTIONS.get(self.method, "interchange"),
            corruption="paired run" if self.second_run else "",
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
                score=self.exact.get(name, effect),
                influence=share if self.second_run else 0.0,
                in_circuit=name in self.selected,
                modality=self.modalities.get(node.tower, "text"),
                hook_out=hook_of(node),
            )
        for name, entry in {**self.inputs, **self.connectors}.items():
            label = parse_id(name).label or "image"
            given = {
                "score": entry["effect"],
                "influence": entry["share"] if self.second_run else 0.0,
                "hook_out": entry["site"],
                "modality": "image",
            }
            schema.add_node(graph, parse_id(name), label=label, **given)
        output = NodeName(self.answer_tower, "logits")
        schema.add_node(graph, output, label=str(origin.get("metric", ANSWER)), modality="none", hook_out="")
        for edge in self.edges:
            receiver = format_id(output) if edge["receiver"] == ANSWER else edge["receiver"]
            slot = edge.get("slot", "in")
            schema.add_edge(graph, edge["sender"], receiver, slot, edge["score"], se=edge["se"], n=self.n_examples)
        schema.rank_edges(graph)
        return graph


@with_provenance
def head_importance(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    method: str = "patch",
    units: str | Sequence[str] = "heads",
    neurons: Any = 8,
    top_k: int = 4,
    mode: str = "denoise",
    towers: Sequence[str] | None = None,
    n_random: int = 20,
    reference: Any = None,
    average: Any = "position",
    seed: int = 0,
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> HeadImportance:
    """Score every unit of every tower, split the effects of the strongest by where they go, and set random sets of as many beside them.

    Args:
        model: the hooked model.
        pairs: a data set of pairs, see :func:`circuitvision.patching.activation_patch`; for ablations a ``Side`` will do.
        metric: a metric, its name, or a mapping of several; edges are measured for the first. ``"information_gain"`` is its own.
        method: ``"patch"``, ``"zero"``, ``"mean"``, ``"resample"``, ``"attribution"``, ``"direct"`` or ``"information_gain"``, see the module.
        units: ``"heads"``, ``"mlps"``, ``"kv_heads"`` and ``"neurons"``, one or several.
        neurons: of ``"neurons"``, how many equal runs the neurons of an MLP are cut into, or groups of numbers.
        top_k: how many units of each tower get edges; those with the largest absolute score.
        mode: ``"denoise"`` or ``"noise"``, see :func:`circuitvision.patching.activation_patch`; ablations are of the clean run.
        towers: which towers; all by default.
        n_random: how many random sets are drawn at most, each of as many units of each tower and kind as are selected, disjoint from those.
        reference: the examples whose mean (or one of which) replaces what a unit writes; of pairs both sides, and ``pairs`` by default.
        average: what a mean goes over, see :func:`circuitvision.edits.ablate`.
        seed: of random sets and of ``"resample"``.
        clean, corrupt: in place of pairs, the inputs of the two runs, of the same shapes; an ablation needs ``clean`` alone.
        align, example_batch, save_to, resume, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: an unknown method or kind of unit, a metric that does not tell the two runs apart, units that a method does not define, no unit
            that can reach the output, or anything ``activation_patch`` and ``ablate`` refuse.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Head importance")
    _check_words(method, top_k, n_random)
    names = list(model.towers) if towers is None else [towers] if isinstance(towers, str) else list(towers)
    everything = units_of(model, names, [units] if isinstance(units, str) else list(units), neurons)
    asked = Asked(pairs, metric, clean, corrupt, mode, align, example_batch, reference, average, checked_seed(seed))
    runs = asked.runs(model, method)
    first = runs.first_inputs()
    dead = [site for site in dict.fromkeys(_sites(everything)) if model.is_dead(site, first)]
    live = [unit for unit in everything if not set(unit.sites) & set(dead)]
    if not live:
        raise InputError(f"No unit of {', '.join(names)} can reach the output in this run; towers= names others.")
    ends = [*inputs_of(model), *connectors_of(model)]
    change = asked.change(model, runs, method, list(dict.fromkeys(_sites([*live, *ends]))))
    options: dict[str, Any] = {"save_to": save_to, "resume": resume, "progress": progress}
    effects = PathEffects(model, runs, change, options)
    asked.check_apart(runs, method)
    found = scores(model, asked, method, live, effects, options)
    selected = _strongest(live, found[0].double().nanmean(-1), top_k)
    draws = random_units(live, selected, n_random, seed)
    if n_random and selected and not draws:
        warn(
            f"No random set stands beside the {len(selected)} selected units: a tower has fewer others of a kind than were selected. Take a smaller "
            "top_k, or n_random=0."
        )
    cells = [*([one] for one in (*ends, *selected)), selected, *draws]
    measured, changes = effects.effects([(changed, ()) for changed in cells], "nodes")
    measured = asked.told(measured, method)
    several = runs.metrics.several
    count, alone = len(ends), changes[0]
    axes, values = _laid_out(model, names, everything, live, found)
    nodes = sorted([*ends, *selected], key=lambda unit: unit.depth)
    result = HeadImportance(
        values if several else values[0],
        {**runs.metrics.axis, **axes, "example": measured.examples},
        provenance=describe(
            model,
            method=f"head_importance({method}, {mode})" if not asked.ablated(method) else f"head_importance({method})",
            metric=runs.metrics,
            towers=_sizes(model, names),
            seed=seed,
            **runs.described(),
        ),
        base=measured.base if several else measured.base[0],
        source=measured.source if several else measured.source[0],
        selected=[unit.id for unit in selected],
        exact={unit.id: float(effect.mean()) for unit, effect in zip(selected, alone[count:], strict=False)},
        together=alone[count + len(selected)],
        random_sets=[[unit.id for unit in draw] for draw in draws],
        random_together=alone[count + len(selected) + 1 :],
        connectors=wholes(ends, alone[:count], measured, "connector"),
        inputs=wholes(ends, alone[:count], measured, "input"),
        neuron_groups={
            unit.id: list(unit.places[0].neurons or ()) for unit in everything if unit.kind == "neuron_group"
        },
        edges=effects.edges(nodes),
        method=method,
        mode="noise" if asked.ablated(method) else mode,
        answer_tower=model.flow.answer if model.flow.answer in names else names[-1],
        modalities={name: modality_of(model.towers[name]) for name in names},
        dead=dead,
        edits=effects.groups,
        groups=measured.groups,
    )
    if result.second_run:
        warn_of_equal_runs(result, result.place(live[0].id))
    return result


def _sites(units: Iterable[Unit]) -> Iterable[str]:
    return (site for unit in units for site in unit.sites)


def _check_words(method: str, top_k: int, n_random: int) -> None:
    if method not in METHODS:
        raise InputError(f"method={method!r} is not understood: one of {', '.join(map(repr, METHODS))}.")
    for name, count in (("top_k", top_k), ("n_random", n_random)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise InputError(f"{name}={count!r} is not understood: a whole number from 0 on.")


def _strongest(units: Sequence[Unit], effects: Float[Tensor, " unit"], top_k: int) -> list[Unit]:
    """The ``top_k`` units of each tower with the largest absolute effect that is not zero, strongest first."""
    order = effects.abs().nan_to_num(0.0).argsort(descending=True, stable=True).tolist()
    chosen, taken = [], Counter[str]()
    for number in order:
        effect, unit = float(effects[number]), units[number]
        if effect == effect and effect != 0.0 and taken[unit.tower] < top_k:
            chosen.append(unit)
            taken[unit.tower] += 1
    return chosen


def random_units(units: Sequence[Unit], chosen: Sequence[Unit], count: int, seed: int) -> list[list[Unit]]:
    """Different sets of as many of the other units of each tower and kind, at most ``count``: none where a tower has too few others."""
    wanted = Counter((unit.tower, unit.kind) for unit in chosen)
    others = {key: [unit for unit in units if (unit.tower, unit.kind) == key and unit not in chosen] for key in wanted}
    possible = math.prod(math.comb(len(others[key]), size) for key, size in wanted.items()) if wanted else 0
    generator = np.random.default_rng(seed)
    found: dict[tuple[str, ...], list[Unit]] = {}
    while len(found) < min(count, possible):
        draw = [
            others[key][number]
            for key, size in wanted.items()
            for number in sorted(generator.choice(len(others[key]), size=size, replace=False).tolist())
        ]
        found[tuple(unit.id for unit in draw)] = draw
    return list(found.values())


def _laid_out(
    model: Any, towers: Sequence[str], units: Sequence[Unit], live: Sequence[Unit], found: Tensor
) -> tuple[dict[str, list[Any]], Float[Tensor, "metric tower layer unit example"]]:
    """Scores at their places: NaN where there is no such unit, 0 where it cannot reach the output."""
    heads = all(unit.kind == "head" for unit in units)
    labels: dict[str, list[Any]] = {
        "tower": list(towers),
        "layer": list(range(max(model.towers[name].cfg.n_layers for name in towers))),
        "head" if heads else "unit": list(dict.fromkeys(_label(unit, heads) for unit in by_kind(units))),
    }
    values = torch.full((len(found), *map(len, labels.values()), found.shape[-1]), math.nan, dtype=found.dtype)
    scored = {unit.id: number for number, unit in enumerate(live)}
    columns = list(labels.values())[-1]
    for unit in units:
        column = columns.index(_label(unit, heads))
        at = (slice(None), towers.index(unit.tower), unit.layer, column)
        values[at] = found[:, scored[unit.id]] if unit.id in scored else 0.0
    return labels, values


def _label(unit: Unit, heads: bool) -> int | str:
    """A head's number, where there are heads alone; else what it is called among units of several kinds."""
    return int(unit.label.removeprefix("H")) if heads else unit.label


def _sizes(model: Any, towers: Sequence[str]) -> dict[str, dict[str, int]]:
    cfgs = {name: model.towers[name].cfg for name in towers}
    return {name: {"n_layers": cfg.n_layers, "n_heads": cfg.n_heads} for name, cfg in cfgs.items()}
