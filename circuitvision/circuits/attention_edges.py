"""Edges from position to position inside attention: what queries, keys and values do to the answer, told apart by where and between which positions.

For head ``h``, query position ``t`` and key position ``s``, at the base run, with ``A`` the pattern, ``S`` the scores, ``g_z`` the gradient at the
head's output ``z``, and ``Δ`` the difference to the source run:

    ``value edge (s → t) = A_ts Δv_s · g_z,t``
    ``key edge (s → t) = ∂metric/∂S_ts (q_t · Δk_s) / √d``,  ``query edge (s → t) = ∂metric/∂S_ts (Δq_t · k_s) / √d``

Sums are exact: value and key edges over queries are the effect of the slot at the key's position, query edges over keys that at the query's position
(what ``attribution_patch`` gives at ``attn.hook_v``, ``attn.hook_k`` and ``attn.hook_q``, by position; of a group, its heads together). Scores with
the source's queries, and keys, are the model's own, from one run each in which every attention output is held: rotary, scale and masks are in
them. Signed effects cancel over many positions, so ``sizes`` are added up beside them.

Not covered: towers joined by keys and values (PI0's prefix and action expert), norms over values; where scores are soft-capped the sums of query and
key edges are those of the scores' own change, not of its slope.

Reference: Haklay et al. 2025 (ACL), position-aware edge attribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.circuits.spans import Spans
from circuitvision.digests import plain
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.state import refuse_inference, refuse_random, refuse_unwrapped
from circuitvision.model.weights import check_gradients
from circuitvision.patching.attribution import check_metrics, graph_batch_size
from circuitvision.patching.estimates import wide
from circuitvision.patching.estimator import differentiable
from circuitvision.patching.gradient_run import GradientRun, rows_of, values_under
from circuitvision.patching.runs import RunBatch, two_runs
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

SLOTS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class AttentionEdges(Result):
    """Effects between positions: ``values`` ``[layer head slot query key example]``, ``slot`` "q", "k" or "v"; several metrics lead.

    ``query`` and ``key`` are positions or spans. ``sizes`` are the sums of absolute effects in the same cells. ``base`` and ``source`` are those of
    an :class:`EdgeAttribution`.
    """

    sizes: Tensor = field(default_factory=lambda: torch.zeros(0))
    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    tower: str = ""
    mode: str = "noise"
    groups: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"sizes": -1, "base": -1, "source": -1, "groups": 0}

    @property
    def cancellation(self) -> Float[Tensor, "... layer head slot"]:
        """``|Σ| / Σ|·|`` over all positions of the mean over examples: 1 where nothing cancels. NaN where nothing is carried."""
        return self.mean().sum((-2, -1)).abs() / self.mean(quantity="sizes").sum((-2, -1))

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """Effects of whole slots."""
        return self.values, ("example", "query", "key")

    def to_networkx(self, n: int | None = None) -> nx.MultiDiGraph:
        """The graph of schema ``circuitvision.graph/1``: from keys and values of a layer at one span to its attention at another, all heads together.

        Every edge carries its head loadings, ``loadings_json``: what each head has of the score, by name, the largest in size first, the others as
        ``"rest"``; they add up to it. ``n`` keeps the edges of largest mean score in size. Of several metrics the first.

        Raises:
            InputError: an ``n`` that is no number of edges, names of spans that ids have no form for.
        """
        from circuitvision.circuits.attention_graph import graph_of

        return graph_of(self, n)


@with_provenance
def attention_edges(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    tower: str | None = None,
    spans: Mapping[str, Any] | str = "position",
    mode: str = "noise",
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    progress: bool = True,
) -> AttentionEdges:
    """Split the effects of all query, key and value slots of a tower by the two positions that each edge of attention joins.

    A batch takes a run of each side, a backward pass per metric, and two runs more.

    Args:
        model: the hooked model.
        pairs, metric, mode, clean, corrupt, align, allow_wrong, example_batch, progress: as of :func:`edge_attribution`.
        tower: which tower; may be left out where there is one.
        spans: ``"position"``, or parts of the positions by name, as of :func:`edge_attribution`; effects are added up inside them.

    Raises:
        InputError: what ``edge_attribution`` refuses, an unknown tower.
        UnsupportedModelError: a tower whose keys another tower reads, or that reads another's; values that pass a norm.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Edge attribution")
    check_gradients(model.module)
    name = _tower(model, tower)
    parts = Spans(spans)
    if pairs is not None and example_batch is None and hasattr(pairs, "clean"):
        example_batch = graph_batch_size(model, pairs)
    runs = two_runs(model, pairs, metric, clean, corrupt, mode, align, example_batch, allow_wrong)
    check_metrics(runs.metrics, mode, "atp")
    first = runs.first_inputs()
    refuse_inference(model.module, first)
    split = _Split(model, name, first, parts)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    examples: list[Any] = []
    with Progress(0, "attention edges", progress) as bar:
        for batch in runs.batches(split.read):
            own, told = split.batch(batch)
            runs.look(own[2], own[3], told, batch.number == 0)
            found.append(own)
            examples += told
            bar.advance(len(told))
    runs.warn()
    if len({one[0].shape[-2:] for one in found}) > 1:
        raise InputError(
            "Examples differ in their number of positions: name spans of positions, or take prompts of one length."
        )
    values, sizes = (torch.cat([one[number] for one in found], 1).movedim(1, -1) for number in (0, 1))
    base, source = (torch.cat([one[number] for one in found], 1) for number in (2, 3))
    several, labels = runs.metrics.several, parts.labels(values.shape[-2])
    return AttentionEdges(
        values=values if several else values[0],
        axes={
            **runs.metrics.axis, "layer": split.layers, "head": list(range(values.shape[2])), "slot": list(SLOTS),
            "query": labels, "key": labels, "example": examples,
        },
        provenance=describe(model, method=f"attention_edges(mode={mode})", metric=runs.metrics, spans=plain(parts), **runs.described()),
        sizes=sizes if several else sizes[0],
        base=base if several else base[0],
        source=source if several else source[0],
        tower=name,
        mode=mode,
        groups=runs.groups,
    )  # fmt: skip


def _tower(model: Any, tower: str | None) -> str:
    name = next(iter(model.towers)) if tower is None and len(model.towers) == 1 else tower
    if name is None or name not in model.towers:
        raise InputError(f"tower={tower!r} is none of {', '.join(model.towers)}: name one.")
    if model.flow.feeds_cache(name) or model.flow.cache_of(name):
        raise UnsupportedModelError(
            f"Keys and values of the {name} tower are shared with another tower: its own positions are not all that is read."
        )
    if any(one.head_norm("v") is not None for block in model.towers[name].blocks for one in block.attentions):
        raise UnsupportedModelError(f"Values of the {name} tower pass a norm; value edges through it are not covered.")
    return name


class _Split:
    """The effects of one tower's slots by their two positions, batch by batch."""

    def __init__(self, model: Any, tower: str, first: Mapping[str, Any], spans: Spans) -> None:
        self.model, self.tower, self.spans = model, tower, spans
        blocks = model.towers[tower].blocks
        self.layers = [
            layer
            for layer, block in enumerate(blocks)
            if block.has("attn") and not model.is_dead(self._site(layer, "hook_z"), first)
        ]
        self.read = [self._site(layer, f"hook_{letter}") for layer in self.layers for letter in "qkv"]

    def _site(self, layer: int, part: str) -> str:
        return f"{self.tower}.blocks.{layer}.attn.{part}"

    def batch(self, batch: RunBatch) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Any]]:
        """Effects and sizes ``[metric example layer head slot query key]``, the metrics of both runs, and the examples."""
        watched = [
            self._site(layer, part)
            for layer in self.layers
            for part in ("hook_z", "hook_pattern", "hook_attn_scores", "hook_v")
        ]
        run = GradientRun(self.model, batch.inputs, watched)
        given = batch.metrics.against(run.output.detach())
        held = [
            edits.replace(self._site(layer, "hook_z"), run.values[self._site(layer, "hook_z")].detach())
            for layer in self.layers
        ]
        wanted = [self._site(layer, "hook_attn_scores") for layer in self.layers]
        moved = {}
        for letter in "qk":
            writes = [
                edits.replace(self._site(layer, f"hook_{letter}"), batch.values[self._site(layer, f"hook_{letter}")])
                for layer in self.layers
            ]
            moved[letter] = values_under(self.model, batch.inputs, [*writes, *held], wanted)
        masks = self.spans.masks(self.model, batch.inputs, batch.rows, batch.count, self.tower)[self.tower]
        measured, found = differentiable(given, run), []
        for number, value in enumerate(measured):
            sites = [self._site(layer, part) for layer in self.layers for part in ("hook_z", "hook_attn_scores")]
            whole: list[Tensor] = []
            for gradients, example in run.gradients(sites, value, number < len(measured) - 1):
                whole.append(
                    torch.stack(
                        [
                            self._layer(run, batch, moved, gradients, masks, layer, example, len(value))
                            for layer in self.layers
                        ],
                        2,
                    )
                )
            found.append(torch.stack(whole).sum(0))
        both = torch.stack(found, 1)
        base, source = given(run.output.detach(), run.inputs), batch.source(given)
        labels = list(range(base.shape[1])) if batch.examples is None else batch.examples
        return (both[0], both[1], base, source), labels

    def _layer(
        self,
        run: GradientRun,
        batch: RunBatch,
        moved: Mapping[str, Mapping[str, Tensor]],
        gradients: Mapping[str, Tensor],
        masks: Float[Tensor, "row pos span"],
        layer: int,
        example: int | None,
        count: int,
    ) -> Float[Tensor, "2 example head slot query key"]:
        """Effects and sizes of one layer."""
        z, scores, value = (self._site(layer, part) for part in ("hook_z", "hook_attn_scores", "hook_v"))
        pattern, here = wide(run.values[self._site(layer, "hook_pattern")].detach()), wide(run.values[scores].detach())
        away = wide(batch.values[value]) - wide(run.values[value].detach())
        heads = pattern.shape[1]
        away = away.repeat_interleave(heads // away.shape[2], 2)
        slope = wide(gradients[scores])
        # Masked entries hold the type's minimum in both, which nothing moves.
        parts = [slope * (wide(moved[letter][scores]) - here) for letter in "qk"]
        parts.append(pattern * torch.einsum("rshd,rthd->rhts", away, wide(gradients[z])))
        effects = torch.stack(parts, 2)
        own = masks.to(effects)
        rows = torch.stack([torch.einsum("rhots,rtk,rsl->rhokl", one, own, own) for one in (effects, effects.abs())])
        into = (
            rows_of(run.model, run.inputs, scores, rows.shape[1], count)
            if example is None
            else torch.full((rows.shape[1],), example)
        )
        return rows.new_zeros(2, count, *rows.shape[2:]).index_add_(1, into.to(rows.device), rows).cpu()
