"""Edge attribution: an estimate for every edge of the computational graph of what corrupting it alone would do to the answer.

    ``score(s → d) = Σ_positions ⟨a_s(source) - a_s(base), ∂metric/∂(input of d)⟩  ≈  metric(base with this edge corrupted) - metric(base)``

``a_s`` is what a sender adds to the residual stream, ``d`` a slot that reads it (:mod:`circuitvision.circuits.computational_graph`). With
``mode="noise"`` the base run is the clean one: a score is signed "patched minus clean", in units of the metric. Methods:

* ``"eap"``: the gradient at the base run (edge attribution patching). One run of each side and one backward pass score every edge of every tower.
  It is the gradient of a mask on the edge. The out-edges of a node add up to the node's own attribution; where the metric is linear in what the
  output is read from, the edges into the output add up to the change of the metric. ``qk_fix=True`` computes patterns again for edges into queries
  and keys (:mod:`circuitvision.circuits.qk_fix`): a saturated softmax hides nothing then.
* ``"eap-ig"``: the mean gradient along the straight path of the *inputs* from base to source (EAP-IG, inputs), at ``steps`` points: Gauss–Legendre
  nodes, midpoints, or the ends that EAP-IG's code takes. The edges out of what enters the towers add up to the change of the metric along the path;
  ``completeness_gap`` says how far they miss it. Elsewhere no sum is promised.
* ``"clean-corrupted"``: the mean of the gradients at the two ends of that path.
* ``"mask-ig"``: the mean gradient of the edges' masks along the path on which all are masked together, from none to all
  (:mod:`circuitvision.circuits.edge_runs`). The only one whose scores of all edges add up to the change of the metric between the two runs.
* ``"exact"``: the change itself, one run for each edge.

An edge is one of all positions together; ``spans`` tell apart what it carries at parts of them. At its own position a slot's score is the sum of what
it does at every position that looks there.

Not covered: edges from position to position; neurons.

Reference: Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import networkx as nx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.circuits.computational_graph import ARROW, ComputationalGraph, computational_graph
from circuitvision.circuits.edge_runs import EdgeEdits
from circuitvision.circuits.edge_scores import METHODS, QUADRATURES, EdgeEstimator, EdgeScores, path_points
from circuitvision.circuits.spans import Spans
from circuitvision.digests import plain
from circuitvision.errors import InputError, warn
from circuitvision.model.state import refuse_inference, refuse_random, refuse_unwrapped
from circuitvision.model.weights import check_gradients
from circuitvision.patching.attribution import check_metrics, graph_batch_size
from circuitvision.patching.kept_estimates import LARGEST_GAP
from circuitvision.patching.runs import Runs, two_runs
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.circuits.circuit import Circuit

_PATHS = ("eap-ig", "mask-ig")
"""The methods that take the mean over a path."""


@dataclass(frozen=True, eq=False)
class EdgeAttribution(Result):
    """Scores of edges: ``values`` ``[sender slot example]``, NaN where there is no edge; several metrics lead, ``[metric sender slot example]``.

    With ``spans`` there is an axis of them before ``example``; :attr:`totals` are the sums over it, and what everything that is said of edges reads.

    The axes bear the ids of senders and slots. ``reads`` names, for every slot, the senders that are made of what it reads. ``base`` and ``source``
    ``[example]`` (``[metric example]``) are the metric of the run whose edges are patched and of the one that patches them. ``completeness_gap``
    is by how much those edges miss the metric's change that add up to it: of ``"eap-ig"`` those out of the inputs, of ``"mask-ig"`` all.
    ``groups`` says which examples belong together, where the data does.
    """

    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    reads: dict[str, list[str]] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    mode: str = "noise"
    method: str = "eap"
    steps: int = 1
    quadrature: str = ""
    completeness_gap: Tensor = field(default_factory=lambda: torch.zeros(0))
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"base": -1, "source": -1, "groups": 0, "completeness_gap": -1}

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, where several were measured; else empty."""
        return list(self.axes.get("metric", []))

    @property
    def edges(self) -> Bool[Tensor, "sender slot"]:
        """Where there is an edge."""
        return self._there

    @cached_property
    def _there(self) -> Bool[Tensor, "sender slot"]:
        # An example without a score makes no edge disappear.
        found = ~self.totals.isnan().all(-1)
        return (found[0] if self.metrics else found).cpu()

    @property
    def totals(self) -> Float[Tensor, "... sender slot example"]:
        """The scores, summed over spans where there are any."""
        return self.values.sum(-2) if "span" in self.axes else self.values

    @property
    def cancellation(self) -> Float[Tensor, "sender slot"]:
        """``|Σ| / Σ|·|`` over spans of the mean scores of the first metric: 1 where all spans agree in sign, near 0 where they cancel.

        NaN where nothing is carried. Raises InputError without spans.
        """
        if "span" not in self.axes:
            raise InputError("Nothing can cancel without spans: give spans=….")
        found = self.mean()[0] if self.metrics else self.mean()
        return found.sum(-1).abs() / found.abs().sum(-1)

    @property
    def n_edges(self) -> int:
        """How many edges were scored."""
        return int(self.edges.sum())

    @property
    def scores(self) -> Float[Tensor, "sender slot"]:
        """The mean score over examples, of the first metric; NaN where there is no edge."""
        found = self.mean(quantity="totals")
        return found[0] if self.metrics else found

    @property
    def favour(self) -> float:
        """1 where edges with positive scores work for the clean run's answer, -1 where those with negative ones do.

        Scores are changes towards what patches: an edge works for the clean answer if its score has the sign of the whole change, source minus base.
        """
        base, source = (float(torch.atleast_1d(self.mean(quantity=name))[0]) for name in ("base", "source"))
        return 1.0 if source >= base else -1.0

    def place(self, name: str) -> tuple[int, int]:
        """The row and column of an edge, ``"v.a0.h1->v.m1"``.

        Raises:
            InputError: no such edge; the nearest ids are named.
        """
        first, arrow, second = name.partition(ARROW)
        row, column = self.index_of("sender", first), self.index_of("slot", second)
        if not arrow or not self._there[row, column]:
            raise InputError(f"{name!r} is no edge: {second} does not read what {first} writes.")
        return row, column

    def edge(self, name: str) -> Float[Tensor, "... example"]:
        """The scores of one edge over examples. Raises InputError as :meth:`place` does."""
        return self.values[(slice(None),) * len(self.metrics[:1]) + self.place(name)]

    def at_spans(self) -> EdgeAttribution:
        """The attribution whose edges are these at each of their spans, ``"v.m0@object->v.a1.h1@object<k>"``: see
        :mod:`circuitvision.circuits.span_edges`. Raises InputError without spans."""
        from circuitvision.circuits.span_edges import at_spans

        return at_spans(self)

    def circuit(self, edges: Any) -> Circuit:
        """The circuit of some edges: their names, a mask ``[sender slot]``, or how many of the largest mean score in size; see
        :class:`~circuitvision.circuits.circuit.Circuit`."""
        from circuitvision.circuits.circuit import Circuit

        return Circuit.of(self, edges)

    def node_scores(self) -> Float[Tensor, "... sender example"]:
        """The sum of each sender's out-edges: of ``"eap"`` its own attribution."""
        return self.totals.nansum(-2)

    def ranking(self, count: int | None = None) -> list[tuple[str, float]]:
        """Edges by name with their mean scores, the largest in size first; ties in the order of the axes."""
        scores, senders, slots = self.scores, self.axes["sender"], self.axes["slot"]
        places = self.edges.nonzero()
        sizes = scores[places[:, 0], places[:, 1]]
        order = torch.argsort(-sizes.abs(), stable=True)[:count]
        return [
            (f"{senders[row]}{ARROW}{slots[column]}", float(size))
            for (row, column), size in zip(places[order].tolist(), sizes[order].tolist(), strict=True)
        ]

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The scores. Raises InputError for several metrics."""
        if self.metrics:
            raise InputError(f"Several metrics were measured ({', '.join(self.metrics)}); rank the result of one.")
        return self.totals, ("example",)

    def _long_frame(self) -> pd.DataFrame:
        """The long form, without the pairs that are no edges."""
        frame = super()._long_frame()
        edges = self._spread(self.values.shape)
        return frame[edges.reshape(-1).numpy()].reset_index(drop=True)

    def mean_frame(self, *options: Any, **keywords: Any) -> pd.DataFrame:
        """As of :meth:`Result.mean_frame`, without the pairs that are no edges."""
        frame = super().mean_frame(*options, **keywords)
        return frame[self._spread(self.values.shape[:-1]).reshape(-1).numpy()].reset_index(drop=True)

    def _spread(self, shape: Sequence[int]) -> Tensor:
        """Where there is an edge, in a shape that ends as ``values`` does, or as their means."""
        first = 1 if self.metrics else 0
        edges = self.edges[(None,) * first + (...,) + (None,) * (len(shape) - first - 2)]
        return edges.expand(shape)

    def highlights(self) -> dict[str, str]:
        """The strongest edge."""
        best = self.ranking(1)
        return {"edges": str(self.n_edges), **({"strongest": f"{best[0][0]} ({best[0][1]:+.4g})"} if best else {})}

    def to_networkx(self, n: int | None = None) -> nx.MultiDiGraph:
        """The graph of schema ``circuitvision.graph/1``, kind ``component``: all edges, or the ``n`` of largest mean score in size (first metric).

        Nodes without an edge are left out. A node's ``score`` is the sum of its out-edges. Keys and values of a group are a node of their own; the
        links from it to the heads that look at them have score 0, because what a group passes on is not told apart by head.

        Raises:
            UnsupportedModelError: a part that ids have no form for is among the nodes.
        """
        from circuitvision.circuits.edge_graph import graph_of

        return graph_of(self, n)


@with_provenance
def edge_attribution(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    method: str = "eap",
    steps: int = 8,
    quadrature: str = "gauss",
    qk_fix: bool = False,
    spans: Mapping[str, Any] | str | None = None,
    mode: str = "noise",
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> EdgeAttribution:
    """Score every edge of the computational graph of a model, across its towers.

    Runs of a batch: ``"eap"`` one of each side and one backward pass per metric; ``"eap-ig"`` ``steps`` runs and backward passes beside one of each
    side and one of the path's end, ``"mask-ig"`` all but the last, ``"exact"`` one run per edge. Texts of a dual encoder take a backward pass per
    image.

    Args:
        model: the hooked model.
        pairs: a data set of pairs, run ``example_batch`` at a time (None: by memory), positions matched as ``align`` says.
        metric: a differentiable metric, its name, or a mapping of several.
        method: ``"eap"``, ``"eap-ig"``, ``"clean-corrupted"``, ``"mask-ig"`` or ``"exact"``, see :mod:`circuitvision.circuits.edge_attribution`.
        steps, quadrature: how many points of the path ``"eap-ig"`` and ``"mask-ig"`` take, and which: ``"gauss"``, ``"midpoint"``, or ``"left"`` as
            EAP-IG's code does.
        qk_fix: of ``"eap"``, whether edges into queries and keys are scored by the pattern itself; two more runs for each sender.
        spans: names of parts of the positions, ``{"object": region, "question": "text"}``, or ``"position"``: then scores are told apart by what the
            edge carries there (:mod:`circuitvision.circuits.spans`). Not for ``"exact"`` and the QK fix.
        mode: ``"noise"`` scores what corrupting edges of the clean run does (patched minus clean), ``"denoise"`` what restoring those of the corrupt
            run does.
        clean, corrupt: in place of pairs, the inputs of the two runs, of the same shapes.
        align, allow_wrong, example_batch, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: no pairs and no inputs, a metric without a gradient or that counts, an unknown method or quadrature.
        UnsupportedModelError: a model whose parts do not read sums of what others write, or through which no gradient passes.
    """
    refuse_unwrapped(model)
    _check_method(method, steps, quadrature, qk_fix)
    parts = None if spans is None else Spans(spans)
    if parts is not None and (method == "exact" or qk_fix):
        raise InputError("Edges are patched, and patterns computed, at all positions together: leave spans out.")
    refuse_random(model.module, "Edge attribution")
    if method != "exact":
        check_gradients(model.module)
        if pairs is not None and example_batch is None and hasattr(pairs, "clean"):
            example_batch = graph_batch_size(model, pairs)
    runs = two_runs(model, pairs, metric, clean, corrupt, mode, align, example_batch, allow_wrong)
    first = runs.first_inputs()
    graph = computational_graph(model, first)
    if method == "exact":
        return _result(model, graph, runs, _patched(model, graph, runs, progress), method, steps, quadrature, mode)
    check_metrics(runs.metrics, mode, "atp" if method == "eap" else "ig")
    refuse_inference(model.module, first)
    path = "masks" if method == "mask-ig" else "inputs"
    estimator = EdgeEstimator(model, graph, first, path_points(method, steps, quadrature), path, qk_fix, parts)
    found = _measured(estimator, runs, progress)
    if method in _PATHS:
        _warn_of_gap(found)
    return _result(model, graph, runs, found, method, steps, quadrature, mode, qk_fix, parts)


def _patched(model: Any, graph: ComputationalGraph, runs: Runs, progress: bool) -> EdgeScores:
    """The effect of every edge, from one run of each."""
    measured = runs.measure_made(EdgeEdits(model, graph, graph.edges), graph.sites, progress=progress)
    effects = (measured.values - measured.base[:, None]).movedim(1, -1)
    values = effects.new_zeros(*effects.shape[:2], *graph.edges.shape)
    values[:, :, graph.edges] = effects
    return EdgeScores(
        values.unsqueeze(-1), measured.base, measured.source, torch.zeros_like(measured.base), measured.examples
    )


def _result(
    model: Any,
    graph: ComputationalGraph,
    runs: Runs,
    found: EdgeScores,
    method: str,
    steps: int,
    quadrature: str,
    mode: str,
    qk_fix: bool = False,
    parts: Spans | None = None,
) -> EdgeAttribution:
    values = found.values.movedim(1, -1).masked_fill(~graph.edges[None, :, :, None, None], float("nan"))
    _check_finite(graph, values)
    several, along = runs.metrics.several, method in _PATHS
    told = f", steps={steps}, quadrature={quadrature}" if along else ", qk_fix=True" if qk_fix else ""
    spans = {} if parts is None else {"span": parts.labels(values.shape[-2])}
    values = values if spans else values.squeeze(-2)
    gap = found.gap if along else found.gap.new_zeros(0)
    result = EdgeAttribution(
        values=values if several else values[0],
        axes={
            **runs.metrics.axis,
            "sender": graph.sender_ids,
            "slot": graph.slot_ids,
            **spans,
            "example": found.examples,
        },
        provenance=describe(
            model,
            method=f"edge_attribution(method={method}, mode={mode}{told})",
            metric=runs.metrics,
            spans=plain(parts),
            **runs.described(),
        ),
        base=found.base if several else found.base[0],
        source=found.source if several else found.source[0],
        reads=_reads_of(graph),
        nodes=_nodes(model, graph),
        mode=mode,
        method=method,
        steps=steps if along else 1,
        quadrature=quadrature if along else "",
        completeness_gap=gap if several or not along else gap[0],
        groups=runs.groups,
    )
    if not bool((result.values.nan_to_num() != 0).any()):
        warn(
            "Every score is 0: what the two runs write does not differ, or the metric's gradient vanishes where it is taken."
        )
    return result


def result_of(
    model: Any, graph: ComputationalGraph, runs: Runs, measured: tuple[Tensor, Any], method: str, seed: int
) -> EdgeAttribution:
    """Scores ``[metric sender slot example]`` that another method gave, as a result; ``measured`` comes with the metric of both runs."""
    values, found = measured
    values = values.masked_fill(~graph.edges[None, :, :, None], float("nan"))
    return EdgeAttribution(
        values=values[0],
        axes={"sender": graph.sender_ids, "slot": graph.slot_ids, "example": found.examples},
        provenance=describe(model, method=method, metric=runs.metrics, seed=seed, **runs.described()),
        base=found.clean[0],
        source=found.corrupt[0],
        reads=_reads_of(graph),
        nodes=_nodes(model, graph),
        method=method.partition("(")[0],
        groups=runs.groups,
    )


def _reads_of(graph: ComputationalGraph) -> dict[str, list[str]]:
    """For every slot the senders that are made of what it reads."""
    return {
        name: [graph.sender_ids[column] for column in row.nonzero().flatten().tolist()]
        for name, row in zip(graph.slot_ids, graph.reads, strict=True)
    }


def _nodes(model: Any, graph: ComputationalGraph) -> dict[str, dict[str, Any]]:
    """The site of every sender, and what the positions of its stream are."""
    return {
        str(one): {"site": one.node.site, "modality": "image" if model.towers[one.tower].stack.image else "text"}
        for one in graph.senders
    }


def _check_method(method: str, steps: int, quadrature: str, qk_fix: bool) -> None:
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}; choose one of {', '.join(map(repr, METHODS))}.")
    if qk_fix and method != "eap":
        raise InputError(f"qk_fix=True belongs to method='eap'; {method} has no single pattern to compute again.")
    if quadrature not in QUADRATURES:
        raise InputError(f"Unknown quadrature {quadrature!r}; choose one of {', '.join(map(repr, QUADRATURES))}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r} is not understood: a whole number from 1 on.")


def _check_finite(graph: ComputationalGraph, values: Float[Tensor, "metric sender slot span example"]) -> None:
    wrong = (~torch.isfinite(values)).any(0).any(-1).any(-1) & graph.edges
    if bool(wrong.any()):
        raise InputError(
            f"{int(wrong.sum())} edges have scores that are no finite numbers, such as {graph.edge_names(wrong)[0]}: the model's activations or the "
            "metric overflow; run it in float32."
        )


def _measured(estimator: EdgeEstimator, runs: Runs, progress: bool) -> EdgeScores:
    """The scores of all batches."""
    parts: list[EdgeScores] = []
    with Progress(0, "edge attribution", progress) as bar:
        for batch in runs.batches(estimator.read()):
            parts.append(estimator.batch(batch))
            runs.look(parts[-1].base, parts[-1].source, parts[-1].examples, batch.number == 0)
            bar.advance(len(parts[-1].examples))
    runs.warn()
    values, base, source, gap = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("values", "base", "source", "gap")
    )
    return EdgeScores(values, base, source, gap, [label for part in parts for label in part.examples])


def _warn_of_gap(found: EdgeScores) -> None:
    missed = (found.gap.abs() > LARGEST_GAP * (found.source - found.base).abs()) & (
        found.gap.abs() > 1e-6 * (1 + found.base.abs())
    )
    if bool(missed.any()):
        warn(
            f"In {int(missed.sum())} of {missed.numel()} cases the edges that should add up to the metric's change along the path miss it by more "
            f"than {LARGEST_GAP:.0%}: take more steps."
        )
