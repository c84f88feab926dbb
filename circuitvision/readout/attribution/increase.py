"""Log-probability increase: what a vector written to the stream does, by itself and at once, to the probability of an answer.

``increase(v) = log p(y | x + v) - log p(y | x)`` with ``p = softmax(head(norm(.)))``, where ``x`` is the stream that ``v`` is added to at the
position that is read (``resid_pre`` for heads and attention, ``resid_mid`` for an MLP and its neurons) and the norm's denominator is the final
one of this run for every vector. In nats; positive means towards the answer.

Unlike direct attribution it does not add up: softmax is not linear, and late writers find the answer already said. It is the score of the
paper for heads, source tokens of a head, and neurons.

Source: Yu & Ananiadou 2024, arXiv 2411.10950.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.links import Link, log_probabilities
from circuitvision.model.cache import ActivationCache
from circuitvision.model.columns import Columns, plain
from circuitvision.model.names import head_name
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.attribution.direct import cached_for, sources_of
from circuitvision.readout.attribution.direction import positions_read
from circuitvision.readout.attribution.rest import check_head_reads_stream, check_sources, spacing
from circuitvision.readout.attribution.sources import OverSources
from circuitvision.readout.attribution.terms import Stream
from circuitvision.readout.ranks import rank_components
from circuitvision.readout.recorded import chosen_layers, chosen_tower, examples_of
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.hooked import HookedModel
    from circuitvision.model.tower import Tower

_KINDS = ("component", "head", "neuron", "source")
_VECTORS = 4096
"""Vectors read at once."""


@dataclass(frozen=True, eq=False)
class LogProbIncrease(Result):
    """``values`` in nats: ``[layer part example]`` (attn, mlp), ``[layer head example]`` or ``[layer neuron example]``."""

    tower: str = ""
    answer: str = ""

    def highlights(self) -> dict[str, str]:
        """What moves the answer most, in nats, mean over examples."""
        return {**rank_components(self, by="size").highlights(), "answer": self.answer}


@dataclass(frozen=True, eq=False)
class SourceIncrease(OverSources, LogProbIncrease):
    """``values`` in nats, of what each head takes from each position: ``[layer head position example]``; they do not add up to the head's.

    ``places`` are those of the positions in the image (-1 elsewhere), ``words`` their tokens.
    """

    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    words: list[list[str]] = field(default_factory=list)
    kinds: list[list[str]] = field(default_factory=list)
    shares: Tensor = field(default_factory=lambda: torch.zeros(0))

    _per_example: ClassVar[dict[str, int]] = {"places": 0, "words": 0, "kinds": 0, "shares": 0}

    @property
    def direction(self) -> str:
        """What the values are of."""
        return f"log p({self.answer})"

    def highlights(self) -> dict[str, str]:
        """The sources that move the answer most, in nats, mean over examples."""
        mean = self.mean()
        order = mean.abs().nan_to_num(-1.0).flatten().argsort(descending=True)[:5].tolist()
        found = {}
        for flat in order:
            layer, head, position = (int(i) for i in torch.unravel_index(torch.tensor(flat), mean.shape))
            name = f"{head_name(self.axes['layer'][layer], head, self.tower)} from {position}"
            name += f" ({self.words[0][position]})" * (len(self.words) == 1)
            found[name] = f"{float(mean[layer, head, position]):+.4g}"
        return {**found, "answer": self.answer}


@with_provenance
def log_prob_increase(
    model: HookedModel,
    cache: ActivationCache | Mapping[str, Any],
    answer: Any,
    tower: str | None = None,
    *,
    by: str = "head",
    layers: int | Sequence[int] | None = None,
    position: Any = None,
    aggregation: str | None = None,
    step: int | None = None,
) -> LogProbIncrease:
    """Score every attention, MLP, head, neuron, or source position of a head by what it alone does to the answer's log-probability.

    Args:
        model: the hooked model.
        cache: a cache of one run (with patterns for ``by="source"``), or the inputs of one.
        answer: word, class or id, or a list with one per example.
        tower: a tower whose output is a distribution over tokens or classes read at one position.
        by: "component", "head", "neuron" or "source".
        layers: by default all.
        position: where the output is read; by default the last word, or the CLS position.
        aggregation: "first" for a word of several tokens.
        step: which pass of a cache of several.

    Raises:
        InputError: no such answer, a tower whose output is no distribution or pools over positions, another ``by``.
    """
    if by not in _KINDS:
        raise InputError(f"Scores are by {', '.join(_KINDS)}, not by {by!r}.")
    read_tower = chosen_tower(model, tower)
    _check(read_tower)
    chosen = _answer(read_tower, answer, aggregation)
    stream = Stream(read_tower, cached_for(model, cache, read_tower, by), step=step)
    check_head_reads_stream(stream)
    scorer = _Scorer(read_tower, stream, chosen, stream.final, _where(read_tower, stream, stream.final, position))
    numbers = chosen_layers(layers, stream.end)
    with torch.no_grad(), read_tower.hooks_disabled():
        _check_alike(read_tower, numbers)
        values = torch.stack([scorer.layer(layer, by) for layer in numbers])
    inner = {"component": "part", "source": "head"}.get(by, by)
    branches: list[Any] = [branch.name for branch in read_tower.blocks[numbers[0]].branches]
    parts = branches if by == "component" else list(range(values.shape[1]))
    axes: dict[str, list[Any]] = {"layer": numbers, inner: parts}
    examples = examples_of(stream.cache, read_tower.name, values.shape[2])[0].tolist()
    method = f"log_prob_increase(tower={read_tower.name}, by={by}, answer={answer})"
    provenance = describe(model, method=method, inputs=(stream.cache.inputs,))
    named = _called(chosen, answer)
    if by != "source":
        return LogProbIncrease(values.cpu(), {**axes, "example": examples}, provenance, read_tower.name, named)
    axes |= {"position": list(range(values.shape[3])), "example": examples}
    places, shares, words, kinds = sources_of(stream, values.shape[3])
    values = values.cpu().movedim(2, -1)
    return SourceIncrease(values, axes, provenance, read_tower.name, named, places, words, kinds, shares)


def _called(chosen: Columns, answer: Any) -> str:
    """The answer by name; a number by the word or class it stands for."""
    if isinstance(answer, str):
        return answer
    number = int(chosen.ids[0, 0, 0])
    return chosen.head.names([number])[str(number)] if chosen.ids.shape[1] == 1 else "each row's answer"


def _where(read_tower: Tower, stream: Stream, final: Tensor, position: Any) -> Int[Tensor, " row"]:
    """The one position of every row that is read."""
    default = 0 if read_tower.stack.image else "last"
    mask = positions_read(read_tower, stream.cache, default if position is None else position, final.shape[:2])
    if not bool((mask.sum(-1) == 1).all()):
        raise InputError("The score is taken at one position of each row; one per example is cv.regions.at(numbers).")
    return mask.int().argmax(-1).to(final.device)


def increase(
    before: Float[Tensor, "*batch n_out"],
    after: Float[Tensor, "*batch n_out"],
    answer: Tensor,
    link: Link = "softmax",
) -> Float[Tensor, "*batch"]:
    """``log p(after)[answer] - log p(before)[answer]`` under the head's link."""
    index = answer[..., None].expand(*after.shape[:-1], 1)
    said, was = (logits.expand_as(after).gather(-1, index)[..., 0] for logits in (after, before))
    if link == "sigmoid":
        return log_probabilities(said, link) - log_probabilities(was, link)
    return (said - after.logsumexp(-1)) - (was - before.logsumexp(-1))


def _answer(read_tower: Tower, answer: Any, aggregation: str | None) -> Columns:
    """One answer for all examples, or one each.

    Raises:
        InputError: several answers, a tensor that is no whole number, a pair, a metric, another ``aggregation``.
    """
    if aggregation not in (None, "first"):
        raise InputError(
            "The score is of one column of the output; for a word of several tokens choose aggregation='first'."
        )
    answer = answer if callable(answer) else plain(answer)
    if isinstance(answer, Tensor | tuple) or callable(answer):
        raise InputError(
            "The score is of one word, class or id (or a list, one per example), not of a direction, a pair or a metric; use direct_attribution."
        )
    if not isinstance(answer, str | int | list | Mapping):
        raise InputError(f"An answer is a word, class or id, not {answer!r}.")
    named = {"answer": answer} if isinstance(answer, list) else answer
    if isinstance(named, Mapping) and len(named) != 1:
        raise InputError("Give one answer: a word, class or id, or one per example.")
    return read_tower.output_head.columns(named, aggregation=aggregation)


def _check_alike(read_tower: Tower, layers: Sequence[int]) -> None:
    """Raise InputError for layers whose blocks have different branches: their scores do not fit into one table."""
    kinds = {layer: [branch.name for branch in read_tower.blocks[layer].branches] for layer in layers}
    other = next((layer for layer in layers if kinds[layer] != kinds[layers[0]]), None)
    if other is not None:
        raise InputError(
            f"Blocks {layers[0]} and {other} of the {read_tower.name} tower have different branches; choose with layers=."
        )


def _check(read_tower: Tower) -> None:
    head = read_tower.output_head
    if head.kind not in ("tokens", "classes") or read_tower.reader is not read_tower or head.link == "none":
        raise InputError(
            f"What the {read_tower.name} tower says is no distribution over words or classes; use direct_attribution."
        )
    if head.table.pool not in ("none", "cls"):
        raise InputError(
            f"The {read_tower.name} tower's output is pooled over positions ({head.table.pool}), so no single vector makes it; use "
            "direct_attribution."
        )


class _Scorer:
    """Scores vectors added to the stream at one position of every row.

    The frozen read-out is affine, so the logits of ``x + v`` are those of ``x`` plus the linear part of ``v``, taken at ``v``'s own size:
    added up in the stream first, small vectors would be lost in a half-precision ``x``.
    """

    def __init__(self, read_tower: Tower, stream: Stream, chosen: Columns, final: Tensor, where: Tensor) -> None:
        self.stream, self.where, self.head = stream, where, read_tower.output_head.in_run(stream.cache)
        self.link = self.head.link
        self.rows = torch.arange(final.shape[0], device=final.device)
        self.dtype = read_tower.dtype
        self.scale = final[self.rows, where][:, None].to(self.dtype)
        owners, count = examples_of(stream.cache, read_tower.name, len(self.rows))
        chosen.check(count)
        ids = chosen.ids[0, :, 0]
        self.answer = (ids.expand(len(self.rows)) if len(ids) == 1 else ids[owners]).to(final.device)

    def at(self, value: Tensor) -> Tensor:
        """A site at the position that is read, ``[row …]``."""
        return value[self.rows, self.where]

    def logits(self, vectors: Float[Tensor, "row n d_model"]) -> Float[Tensor, "row n n_out"]:
        """The read-out of vectors with the run's denominator, before a soft cap, in float32 at least."""
        head = self.head.in_run(self.stream.cache, norm="frozen", reference=self.scale, capped=False)
        vectors = vectors.to(self.dtype)
        out = head.positions(vectors, 1, self.scale.expand_as(vectors))
        return out if out.dtype == torch.float64 else out.float()

    def score(self, x: Float[Tensor, "row d_model"], vectors: Float[Tensor, "n row d_model"]) -> Float[Tensor, "n row"]:
        """The increase of each vector at ``x``."""
        cap = self.head.cap
        before, offset = self.logits(x[:, None]), self.logits(torch.zeros_like(x[:, None]))
        found = []
        width = max(1, _VECTORS // len(self.rows))
        for start in range(0, vectors.shape[0], width):
            piece = vectors[start : start + width].transpose(0, 1)
            after = cap(before + (self.logits(piece) - offset))
            found.append(increase(cap(before), after, self.answer[:, None].expand(after.shape[:2]), self.link).T)
        return torch.cat(found)

    def layer(self, layer: int, by: str) -> Tensor:
        """The scores of one layer."""
        stream = self.stream
        pre = self.at(stream.site(f"blocks.{layer}.hook_resid_pre"))
        block = stream.tower.blocks[layer]
        if by == "component":
            return torch.cat(
                [
                    self.score(
                        self.at(stream.site(f"blocks.{layer}.{branch.stream}")),
                        self.at(stream.site(f"blocks.{layer}.{branch.added}"))[None],
                    )
                    for branch in block.branches
                ]
            )
        if by == "head":
            return self.score(pre, stream.head_vectors(layer, self.rows, self.where))
        if by == "neuron":
            return self.neurons(layer, self.at(stream.site(f"blocks.{layer}.{block.mlp.stream}")))
        sources = stream.source_vectors(layer, self.rows, self.where)
        written = stream.head_vectors(layer, self.rows, self.where)
        check_sources(sources.movedim(1, -1).flatten(1, 2), written.flatten(1), layer, spacing(pre))
        heads, keys = sources.shape[:2]
        return self.score(pre, sources.flatten(0, 1)).unflatten(0, (heads, keys)).transpose(1, 2)

    def neurons(self, layer: int, mid: Tensor) -> Float[Tensor, "neuron row"]:
        """A few thousand neurons at a time: their vectors together would not fit."""
        post = self.at(self.stream.site(f"blocks.{layer}.mlp.hook_post"))
        width = max(1, _VECTORS // len(self.rows))
        found = [
            self.score(
                mid,
                self.stream.neuron_vectors(layer, post, range(start, min(start + width, post.shape[1])), self.where),
            )
            for start in range(0, post.shape[1], width)
        ]
        return torch.cat(found)
