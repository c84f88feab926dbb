"""Scores of all edges of a model from gradients at its slots: what each sender changes, times the gradient where it is read.

    ``score(s → d) = Σ_positions ⟨Δa_s, ∂metric/∂(input of d)⟩``

``Δa_s`` is what sender ``s`` adds to the stream in the source run minus what it adds in the base run; the gradient is taken at the base run
(``eap``), or is a weighted mean over several points of a path: that of the inputs from base to source, or that on which the masks of all edges grow
from 0 to 1 together, where ``Δa_s`` is taken to the run at each point.

No copy of the stream is made for each head: gradients at slots follow from those at the projections (:mod:`circuitvision.model.slots`), and what
heads add is made again from ``attn.hook_z``, layer by layer, when it is read. Of all that lies between, one layer's slots and one layer's senders are
alive at a time. Where a norm follows a branch, a head's change goes through the norm's derivative, so that scores are the gradients of masks on
edges there too.

Not covered: more than one batch's graph at a time; slots of branches that are neither attention nor MLP cost a copy of the stream each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits.computational_graph import ComputationalGraph
from circuitvision.circuits.edge_runs import Interchange, images_of
from circuitvision.circuits.qk_fix import PatternGradients, QKFix
from circuitvision.circuits.spans import Spans
from circuitvision.errors import InputError
from circuitvision.model.branches import branch_at
from circuitvision.model.slots import SlotGradients, slots_of
from circuitvision.patching.estimates import wide
from circuitvision.patching.estimator import differentiable, entries_of, path_edits
from circuitvision.patching.gradient_run import GradientRun, rows_of
from circuitvision.patching.runs import RunBatch

METHODS = ("eap", "eap-ig", "clean-corrupted", "mask-ig", "exact")
QUADRATURES = ("gauss", "midpoint", "left")
TOGETHER = 16
"""How many senders' changes are alive at a time, if one site has fewer."""
SLOTS = 96
"""How many slots' gradients are, if one layer has fewer."""
Scores = Float[Tensor, "example sender slot span"]


def path_points(method: str, steps: int, quadrature: str) -> list[tuple[float, float]]:
    """The points of the path from base (0) to source (1) where gradients are taken, with their weights, which add up to 1.

    ``"left"`` is the rule of EAP-IG's code: ``x' + α (x - x')`` with ``α = 0, 1/m, …``, from the source's end, which it takes, to the base's, which
    it leaves out.
    """
    if method == "eap":
        return [(0.0, 1.0)]
    if method == "clean-corrupted":
        return [(0.0, 0.5), (1.0, 0.5)]
    if quadrature == "gauss":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return [(float(point + 1) / 2, float(weight) / 2) for point, weight in zip(points, weights, strict=True)]
    shift = 0.5 if quadrature == "midpoint" else 0.0
    return [(1 - (number + shift) / steps, 1 / steps) for number in range(steps)]


@dataclass
class EdgeScores:
    """Scores ``[metric example sender slot span]`` of some examples, and the metrics of their runs ``[metric example]``."""

    values: Tensor
    base: Tensor
    source: Tensor
    gap: Tensor
    examples: list[Any]


class Changes:
    """What each sender adds in the source run minus what it adds in this one, made when it is asked for.

    ``source`` and ``base`` are the sites' values whose difference it is; norms behind branches are linearised at ``run``'s, moved by ``share`` of the
    difference.
    """

    def __init__(
        self,
        model: Any,
        graph: ComputationalGraph,
        inputs: Any,
        source: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        run: Mapping[str, Tensor],
        share: float = 0.0,
    ) -> None:
        self.model, self.graph, self.source, self.base, self.run, self.share = model, graph, source, base, run, share
        self.tokens = model.tokens(inputs)

    def of(self, site: str) -> Float[Tensor, "row pos sender d_model"]:
        """The changes of the senders at one site, in their order."""
        senders = [self.graph.senders[number] for number in self.graph.senders_at(site)]
        tower, away = self.model.towers[senders[0].tower], self.source[site] - wide(self.base[site].detach())
        if senders[0].node.head is not None:
            branch, _ = branch_at(tower, site)
            at = wide(self.run[site].detach())
            with torch.no_grad():
                return tower.head_tangents(
                    branch.block.layer, at + self.share * away if self.share else at, away, branch.name
                )
        return torch.stack([away * images_of(self.tokens, sender).to(away) for sender in senders], 2)


@dataclass
class _Point:
    """One run on a path, and what scores are made of there."""

    run: GradientRun
    changes: Changes
    reads: Mapping[str, Tensor]
    """The streams that slots read in place of the run's own, by the slots' sites."""
    spans: Mapping[str, Float[Tensor, "row pos span"]]
    """The spans of each tower's positions; empty where all positions are one."""

    @property
    def n_spans(self) -> int:
        """How many spans there are."""
        return next((masks.shape[-1] for masks in self.spans.values()), 1)


class EdgeEstimator:
    """The scores of all edges, batch by batch: gradients at ``points`` of a path of the inputs, or of the masks of all edges together."""

    def __init__(
        self,
        model: Any,
        graph: ComputationalGraph,
        first: Mapping[str, Any],
        points: Sequence[tuple[float, float]],
        path: str = "inputs",
        qk_fix: bool = False,
        spans: Spans | None = None,
    ) -> None:
        self.model, self.graph, self.points, self.path = model, graph, list(points), path
        self.spans = spans
        self.n_spans: int | None = None
        self.along = self.points != [(0.0, 1.0)]
        self.entries = entries_of(model, first) if self.along and path == "inputs" else []
        self.fix = QKFix(model, graph) if qk_fix else None
        self.slots = [_Slots.of(model, graph, tower, layers) for tower, layers in _layers(graph)]
        starting = [one.images is not True and one.node.place[0] < 0 for one in graph.senders]
        self.summed = torch.tensor(starting) if path == "inputs" else torch.ones(len(starting), dtype=torch.bool)
        """The senders whose edges add up to the metric's change along the path."""

    def read(self) -> list[str]:
        """The sites whose values in the source run are needed."""
        return list(dict.fromkeys([*self.graph.sites, *self.entries]))

    def batch(self, batch: RunBatch) -> EdgeScores:
        """The scores of one batch."""
        source = {site: wide(batch.values.pop(site)) for site in self.read()}
        base: Mapping[str, Tensor] = {}
        output = None
        # Reading patterns takes another kernel of attention: differences between runs are taken with one kernel.
        if self.along or self.fix:
            with torch.no_grad():
                output, base = self.model._values_at(batch.inputs, self.read())
        found: list[Scores] = []
        for point, weight in self.points:
            spans = self.spans.masks(self.model, batch.inputs, batch.rows, batch.count) if self.spans else {}
            at = self._at(batch.inputs, point, base, source, spans)
            output = at.run.output.detach() if output is None else output
            given = batch.metrics.against(output)
            scored = [weight * own for own in self._scored(at, differentiable(given, at.run), base, source)]
            found = [old + own for old, own in zip(found, scored, strict=True)] if found else scored
        assert output is not None
        given = batch.metrics.against(output)
        before, after, values = given(output, batch.inputs), batch.source(given), torch.stack(found)
        self._check_spans(values)
        gap = torch.zeros_like(before)
        if self.along:
            if self.entries:
                away = {site: source[site] - wide(base[site]) for site in self.entries}
                with torch.no_grad():
                    ended = self.model.run(batch.inputs, path_edits(base, away, self.entries, 1.0))
                end = given(ended, batch.inputs)
            gap = values[:, :, self.summed].sum((2, 3, 4)) - ((end if self.entries else after) - before)
        examples = list(range(before.shape[1])) if batch.examples is None else batch.examples
        return EdgeScores(values, before, after, gap, examples)

    def _check_spans(self, values: Tensor) -> None:
        """Raise InputError where positions are spans and their number differs from the first batch's."""
        count = values.shape[-1]
        if self.n_spans not in (None, count):
            raise InputError(
                f"Some examples have {count} positions and the first {self.n_spans}, so a position's number does not mean the same in all: name "
                "spans of positions, or take prompts of one length."
            )
        self.n_spans = count

    def _at(
        self,
        inputs: Any,
        point: float,
        base: Mapping[str, Tensor],
        source: Mapping[str, Tensor],
        spans: Mapping[str, Tensor],
    ) -> _Point:
        """The run at one point of the path."""
        watched = [site for layer in self.slots for site in layer.gradients]
        watched += self.fix.recorded if self.fix else []
        read = [*self.graph.sites, *(site for layer in self.slots for site in layer.streams.values())]
        between: Sequence[Any] = []
        masks = Interchange(self.model, self.graph, inputs, source)
        if point and self.path == "inputs":
            away = {site: source[site] - wide(base[site]) for site in self.entries}
            between = path_edits(base, away, self.entries, point)
        elif point:
            between = masks.edits(point * self.graph.edges.double())
        run = GradientRun(self.model, inputs, list(dict.fromkeys(watched)), between, read=list(dict.fromkeys(read)))
        fixed = base if self.entries or self.fix else run.values
        changes = Changes(self.model, self.graph, run.inputs, source, fixed, run.values, point if masks.reads else 0.0)
        return _Point(run, changes, {site: value.detach() for site, value in masks.reads.items()}, spans)

    def _scored(
        self, at: _Point, metrics: Sequence[Tensor], base: Mapping[str, Tensor], source: Mapping[str, Tensor]
    ) -> list[Scores]:
        patterns = self.fix.watched if self.fix else []
        gradients = list(dict.fromkeys([*(site for layer in self.slots for site in layer.gradients), *patterns]))
        kept = {*self.graph.sites, *(self.fix.recorded if self.fix else [])}
        kept |= {site for layer in self.slots for site in layer.streams.values()}
        forgotten = [site for site in gradients if site not in kept]
        fixed: list[PatternGradients] = []
        found = []
        for number, metric in enumerate(metrics):
            shape = (len(metric), len(self.graph.senders), len(self.graph.slots), at.n_spans)
            scores = torch.zeros(shape, dtype=torch.promote_types(metric.dtype, torch.float32))
            more = number < len(metrics) - 1
            for own, example in at.run.gradients(gradients, metric, more, [] if more else forgotten):
                for layer in self.slots:
                    if set(layer.gradients) <= set(own):
                        layer.score(at, own, example, scores)
                        # Nothing else reads them, but patterns.
                        for site in set(layer.gradients) - set(patterns):
                            del own[site]
                fixed.append(
                    PatternGradients({site: own[site] for site in patterns if site in own}, example, scores[..., 0])
                )
            found.append(scores)
        if self.fix:
            self.fix.apply(at.run, base, source, fixed)
        return found


def _layers(graph: ComputationalGraph) -> list[tuple[str, list[int]]]:
    """Layers of one tower that are scored together: of :data:`SLOTS` slots at most, or one."""
    counts = Counter((one.slot.tower, one.slot.place[0]) for one in graph.slots)
    found: list[tuple[str, list[int]]] = []
    held = 0
    for (tower, layer), count in counts.items():
        if not found or found[-1][0] != tower or held + count > SLOTS:
            found, held = [*found, (tower, [])], 0
        found[-1][1].append(layer)
        held += count
    return found


@dataclass(frozen=True)
class _Slots:
    """The slots of some blocks of a tower, and of what reads their ends."""

    model: Any
    graph: ComputationalGraph
    tower: str
    sites: tuple[str, ...]
    streams: Mapping[str, str]
    """The streams of those slots whose gradient follows from that at projections; of the others it is that of the site itself."""
    gradients: tuple[str, ...]
    """The sites whose gradients are taken."""

    @classmethod
    def of(cls, model: Any, graph: ComputationalGraph, tower: str, layers: Sequence[int]) -> _Slots:
        """The slots of some layers of a graph."""
        own = [one.slot.site for one in graph.slots if one.slot.tower == tower and one.slot.place[0] in layers]
        sites, streams, gradients = tuple(dict.fromkeys(own)), {}, []
        # A stream that is read whole needs one copy, whose gradient is the slot's.
        known = {
            f"{block.prefix}.{part}": (block, slot)
            for block in model.towers[tower].blocks
            for part, slot in slots_of(block).items()
            if slot.has_heads
        }
        for site in sites:
            if site in known:
                block, slot = known[site]
                streams[site] = f"{block.prefix}.{slot.stream}"
                gradients += [f"{block.prefix}.{read}" for read in slot.reads]
            else:
                gradients.append(site)
        return cls(model, graph, tower, sites, streams, tuple(dict.fromkeys(gradients)))

    def score(self, at: _Point, gradients: Mapping[str, Tensor], example: int | None, scores: Scores) -> None:
        """Add the scores of the edges into these slots."""
        numbers = [number for site in self.sites for number in self.graph.slots_at(site)]
        columns = torch.tensor(numbers)
        edges = self.graph.edges[:, numbers]
        reading: Tensor | None = None
        for sites in self._together(
            [site for site in self.graph.sites if bool(edges[self.graph.senders_at(site)].any())]
        ):
            senders = [number for site in sites for number in self.graph.senders_at(site)]
            parts = [at.changes.of(site) for site in sites]
            change = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
            del parts
            if reading is None:
                reading = self._reading(at, gradients)
            # A product of matrices at every position is many times faster than one contraction over positions and features.
            products = change.to(reading) @ reading
            rows = self._summed(at, products).masked_fill_(~edges[senders].to(reading.device).unsqueeze(-1), 0.0)
            into = (
                rows_of(at.run.model, at.run.inputs, sites[0], len(rows), len(scores))
                if example is None
                else torch.full((len(rows),), example)
            )
            whole = rows.new_zeros(len(scores), *rows.shape[1:]).index_add_(0, into.to(rows.device), rows)
            scores[:, torch.tensor(senders)[:, None], columns] += whole.to(scores)

    def _together(self, sites: Sequence[str]) -> list[list[str]]:
        """Sites whose senders are taken together: of one tower, :data:`TOGETHER` senders or one site."""
        found: list[list[str]] = []
        count = 0
        for site in sites:
            own = len(self.graph.senders_at(site))
            if not found or count + own > TOGETHER:
                found, count = [*found, []], 0
            found[-1].append(site)
            count += own
        return found

    def _summed(
        self, at: _Point, products: Float[Tensor, "row pos sender slot"]
    ) -> Float[Tensor, "row sender slot span"]:
        """Products summed over the positions, of all or of each span."""
        if not at.spans:
            return products.sum(1).unsqueeze(-1)
        return torch.einsum("rpsn,rpk->rsnk", products, at.spans[self.tower].to(products))

    def _reading(self, at: _Point, gradients: Mapping[str, Tensor]) -> Float[Tensor, "row pos d_model slot"]:
        """The gradients at all of these slots."""
        found: Tensor | None = None
        start = 0
        for own in self._gradients(at, gradients):
            if found is None:
                count = sum(len(self.graph.slots_at(site)) for site in self.sites)
                found = own.new_empty(*own.shape[:2], count, own.shape[-1])
            found[:, :, start : start + own.shape[2]] = own
            start += own.shape[2]
        assert found is not None
        return found.transpose(-1, -2)

    def _gradients(
        self, at: _Point, gradients: Mapping[str, Tensor]
    ) -> Iterator[Float[Tensor, "row pos slot d_model"]]:
        """The gradients at the slots, of all heads of a site together."""
        held = {f"{site}_grad": gradients[site] for site in self.gradients}
        held |= {site: at.run.values[site].detach() for site in self.streams.values()}
        for site, stream in self.streams.items():
            if site in at.reads:
                own = at.reads[site]
                held[stream] = own[:, :, 0] if own.ndim == 4 else own
        slots: Mapping[str, Tensor] = SlotGradients(self.model.towers[self.tower], held) if self.streams else {}
        for site in self.sites:
            found = wide(slots[site] if site in self.streams else gradients[site]).detach()
            yield found if found.ndim == 4 else found.unsqueeze(2)
