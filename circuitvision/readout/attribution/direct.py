"""Direct attribution: what every term of the residual stream adds to the output by itself, no later layer in between.

``Σ terms + bias = value``: the value of a logit, a difference, a class, a prompt or an action dimension, before a soft cap, with the
statistics of the final norm (and of an embedding's length, a pooling head's pattern and MLP) held at their values in this run. See
:mod:`circuitvision.readout.attribution.terms` for the terms and :mod:`circuitvision.readout.attribution.direction` for the direction. A
term's direct effect is not its importance: what it does through later layers is left out, and terms cancel. Even in the last layer, ablating a
term moves the statistics of the final norm too, which often takes back most of the effect.

A *direction* is what is explained:

* an answer: a word, class, prompt of a dual encoder, number or action dimension; a list has one per example;
* a pair ``(answer, foil)``, their difference; ``{"answer": …, "foil": …}`` and ``cv.metrics.logit_diff(…)`` say the same;
* a tensor ``[d_model]``, or one per row: a direction of the stream itself, which goes through no norm; of a dual encoder ``[d_shared]``, an
  embedding that it is compared with.

Shares are linear in the direction: for the mean of several words take the mean of their results. PaliGemma 2 caps its logits: its shares add up
to the logit before the cap, and the result holds what the model says beside it.

The sum is exact to rounding: 1e-11 in float64 for towers whose norms compute in float64, 1e-6 where the model's own norms round to float32
(Llama, Gemma), and 1e-2 in bfloat16, because there the model's own sum holds no better.

Sources: Elhage et al. 2021 (transformer circuits, direct logit attribution); Yu & Ananiadou 2024, arXiv 2411.10950 (source tokens of a head).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from circuitvision.answers import check_complete
from circuitvision.data import Batch, Side
from circuitvision.errors import InputError
from circuitvision.metrics import Metric
from circuitvision.model.cache import ActivationCache
from circuitvision.model.names import component, head_name, is_component, spelled
from circuitvision.model.output_head import LinearReadout
from circuitvision.model.positions import in_every_example
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.attribution.direction import direction_of, linear_readout
from circuitvision.readout.attribution.rest import (
    check_head_reads_stream,
    check_sources,
    is_rest,
    rest_of_stream,
    spacing,
)
from circuitvision.readout.attribution.sources import OverSources
from circuitvision.readout.attribution.terms import SPLITS, Stream
from circuitvision.readout.over_data import DataReading, answers_of, of_batch, over_data, side_of
from circuitvision.readout.patch_coords import places_of, shares_of
from circuitvision.readout.recorded import chosen_layers, chosen_tower, examples_of, tokens_of
from circuitvision.results import Result
from circuitvision.statistics import by_example

if TYPE_CHECKING:
    from circuitvision.hooked import HookedModel
    from circuitvision.model.tower import Tower


def _none() -> Tensor:
    return torch.zeros(0)


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """What each term adds to a direction: ``values [term example]`` in the direction's units (logits; a robot's own units for actions).

    ``total`` ``[example]`` is the value explained; ``values.sum(0) == total``. The term ``bias`` holds the biases of norm and head. In a run under
    hooks ``L{layer}.rest`` (behind the tower's name) is what they put into the stream of that block, which no attention and no MLP wrote. Where the
    family caps its logits (PaliGemma 2), ``total`` is the value before the cap, and ``capped`` ``[example]`` what the model says; elsewhere both are
    the same.
    """

    tower: str = ""
    direction: str = ""
    total: Tensor = field(default_factory=_none)
    capped: Tensor = field(default_factory=_none)

    _per_example: ClassVar[dict[str, int]] = {"total": -1, "capped": -1}

    def highlights(self) -> dict[str, str]:
        """The strongest terms, and what all add up to."""
        strongest = {name: f"{value:+.4g}" for name, value in self.top(5)}
        summed = f"{float(self.mean(quantity='total')):+.4g} ({self.direction})"
        if self.is_capped:
            summed += f" before the soft cap, {float(self.mean(quantity='capped')):+.4g} under it"
        return {**strongest, "all terms": summed}

    @property
    def is_capped(self) -> bool:
        """Whether a soft cap stands between what the terms add up to and what the model says."""
        return bool(self.capped.numel()) and not torch.equal(self.total, self.capped)

    def top(self, count: int = 10) -> list[tuple[str, float]]:
        """The terms with the largest mean share in size, with their signed means over examples."""
        mean = self.mean()
        order = mean.abs().argsort(descending=True)[:count].tolist()
        return [(self.axes["term"][index], float(mean[index])) for index in order]

    @with_provenance
    def gathered(self, count: int) -> Attribution:
        """The ``count`` terms with the largest mean share in size, and the sum of all others as one term; together they add up to the total."""
        order = self.mean().abs().nan_to_num(-1.0).argsort(descending=True)
        shown, rest = order[:count], order[count:]
        names, values = [self.axes["term"][index] for index in shown.tolist()], self.values.double()
        parts = [values[shown]]
        if len(rest):
            names.append(f"{len(rest)} others")
            parts.append(values[rest].sum(0, keepdim=True))
        return replace(self, values=torch.cat(parts), axes={**self.axes, "term": names})

    def __getitem__(self, term: str) -> Tensor:
        """One term's share ``[example]``; heads, neurons, MLPs and attention layers in any spelling, and without the tower."""
        return self.values[self.index_of("term", self._label(term))]

    def _label(self, term: Any) -> Any:
        """The label of a term in this result, where it is spelled otherwise."""
        if term in self.axes["term"]:
            return term
        node = component(term) if is_component(term) else None
        label = f"{self.tower} {term}" if node is None else spelled(replace(node, tower=node.tower or self.tower))
        return label if label in self.axes["term"] or str(term).startswith("L") else term


@dataclass(frozen=True, eq=False)
class SourceAttribution(OverSources):
    """What each head takes from each position: ``values [layer head position example]``; the sum over positions is the head's share.

    Positions count keys: cached ones of another tower first, where there are any. ``places`` are theirs in the image (-1 elsewhere), ``kinds``
    what they are.
    """

    tower: str = ""
    direction: str = ""
    places: Tensor = field(default_factory=_none)
    words: list[list[str]] = field(default_factory=list)
    kinds: list[list[str]] = field(default_factory=list)
    shares: Tensor = field(default_factory=_none)

    _per_example: ClassVar[dict[str, int]] = {"places": 0, "words": 0, "kinds": 0, "shares": 0}

    def highlights(self) -> dict[str, str]:
        """The heads that take most, and how much of it from image patches; mean over examples."""
        values, labels = self.values.double(), self.axes["example"]
        parts = (values, values.abs(), values * (self.places[..., 0] >= 0).T)
        heads, size, patches = (by_example(part.sum(-2), labels).mean(-1) for part in parts)
        found = {}
        for flat in size.nan_to_num(-1.0).flatten().argsort(descending=True)[:5].tolist():
            layer, head = divmod(flat, heads.shape[1])
            name = head_name(self.axes["layer"][layer], head, self.tower)
            found[name] = (
                f"{float(heads[layer, head]):+.4g}, {float(patches[layer, head]):+.4g} of it from image patches"
            )
        return {**found, "direction": self.direction}


@with_provenance
def direct_attribution(
    model: HookedModel,
    cache: ActivationCache | Mapping[str, Any],
    direction: Any = None,
    tower: str | None = None,
    *,
    by: str = "head",
    layers: int | Sequence[int] | None = None,
    position: Any = None,
    aggregation: str | None = None,
    step: int | None = None,
    batch_size: int | None = None,
) -> Attribution | DataReading:
    """Split a direction of the output into what every term of the stream adds to it.

    Args:
        model: the hooked model.
        cache: a cache of one run with all sites, or the inputs of one; or a data set (a :class:`~circuitvision.data.Side`, ``Pairs`` for their clean
            side), of which the shares of every example are kept.
        direction: what is explained: an answer ``"red"`` (word, class, prompt, number, action dimension); the tuple ``("red", "blue")``, answer
            minus foil; ``{"answer": [...], "foil": [...]}`` with one per example; a metric such as ``cv.metrics.logit_diff("red", "blue")``;
            a tensor ``[d_model]``. A *list* ``["red", "blue"]`` has one answer per example, and is no difference. Of a data set by default its
            answers minus its foils.
        tower: by default the last tower with a head (the action tower, the language tower, the classifier).
        by: "component" (attention and MLP of every layer), "head", or "neuron" (heads, and every neuron of ``layers``).
        layers: whose neurons are told apart; all by default.
        position: where the output is read: "last" (default of text), a number, or several positions, whose mean is read (see
            :mod:`circuitvision.model.positions`; one per example is ``cv.regions.at(numbers)``); for actions the step of the chunk. Read-outs that
            pool have no choice, patches of a vision tower behind a projector no default.
        aggregation: for a word of several tokens, "first" or "mean".
        step: which pass of a cache of several.
        batch_size: of a data set, how many examples run at once; None: by memory.

    Raises:
        InputError: a direction or position that does not exist, a cache without what is needed, a run whose final norm or head input was edited.
    """
    if by not in SPLITS:
        raise InputError(f"Terms are split by {', '.join(SPLITS)}, not by {by!r}.")
    side = side_of(cache)
    if side is not None:
        options = {
            "by": by,
            "layers": layers,
            "aggregation": aggregation or side.combine,
            "step": step,
        }
        return _over_data(model, side, direction, tower, position, batch_size, options)
    if direction is None:
        raise InputError("Say what is explained: an answer 'red', a contrast ('red', 'blue'), or a tensor [d_model].")
    read_tower = chosen_tower(model, tower)
    stream = Stream(read_tower, cached_for(model, cache, read_tower, by), step=step)
    check_head_reads_stream(stream)
    where: dict[str, Any] = {"position": position, "aggregation": aggregation}
    found = linear_readout(read_tower, stream.cache, stream.final, direction, **where)
    labels, shares = _shares(stream, found, by, layers)
    return Attribution(
        values=torch.stack([*shares, found.constant]).cpu(),
        axes={"term": [*labels, "bias"], "example": _examples(model, read_tower, stream.cache, found.value.shape[0])},
        provenance=describe(
            model,
            method=f"direct_attribution(tower={read_tower.name}, by={by}, direction={found.label})",
            inputs=(stream.cache.inputs,),
        ),
        tower=read_tower.name,
        direction=found.label,
        total=found.value.cpu(),
        capped=found.capped.cpu(),
    )


def _over_data(
    model: HookedModel,
    side: Side,
    direction: Any,
    tower: str | None,
    position: Any,
    batch_size: int | None,
    options: Mapping[str, Any],
) -> DataReading:
    """The shares of every example of a data set."""
    if direction is None:
        check_complete(side)
    if direction is None and side.answers is None:
        raise InputError(
            "This data set holds no answers, so say what is explained: an answer 'red' or ('red', 'blue')."
        )
    count = len(side)
    direction = direction_of(direction, count)
    where = in_every_example(position, count)

    def read(batch: Batch, rows: list[int]) -> Attribution:
        own: Any = direction
        if direction is None:
            own = answers_of(batch)
        elif isinstance(direction, Metric):
            own = direction.take(rows, count)
        else:
            own = of_batch(direction, rows, count)
        at = None if where is None else where.taken(rows, count)
        found = direct_attribution(model, batch.inputs, own, tower, position=at, **options)
        assert isinstance(found, Attribution)
        return found

    method = f"direct_attribution(by={options['by']})"
    return over_data(model, side, read, positions=where, batch_size=batch_size, method=method)


def _shares(
    stream: Stream, found: LinearReadout, by: str, layers: int | Sequence[int] | None
) -> tuple[list[str], list[Tensor]]:
    stream, gradient = stream.reading(found.gradient)

    def share(vector: Tensor) -> Tensor:
        return (vector[:, stream.here].to(gradient.dtype) * gradient).flatten(1).sum(-1)

    shares = {name: share(part) for name, part in stream.input_parts().items()}
    count, tower = stream.end, stream.tower.name
    told_apart = set(chosen_layers(layers, count))
    for layer in range(count):
        rest: list[Tensor] = []
        for branch, site in stream.added(layer).items():
            total = share(stream.site(site))
            splits = branch == "attn" or (branch == "mlp" and by == "neuron" and layer in told_apart)
            if by == "component" or not splits:
                shares[f"{tower} L{layer}.{branch}"] = total
                continue
            split = stream.head_shares if branch == "attn" else stream.neuron_shares
            parts, bias = split(layer, gradient)
            for number, value in enumerate(parts):
                name = head_name(layer, number, tower) if branch == "attn" else f"{tower} L{layer}N{number}"
                shares[name] = value
            shares[f"{tower} L{layer}.{branch}.bias"] = bias
            gap = total - parts.sum(0) - bias
            rest += [gap] if is_rest(stream, layer, branch, gap, parts.abs().sum(0) + bias.abs() + total.abs()) else []
        between = rest_of_stream(stream, layer)
        rest += [] if between is None else [(between.to(gradient.dtype) * gradient).flatten(1).sum(-1)]
        if rest:
            shares[f"{tower} L{layer}.rest"] = torch.stack(rest).sum(0)
    return list(shares), list(shares.values())


@with_provenance
def source_attribution(
    model: HookedModel,
    cache: ActivationCache | Mapping[str, Any],
    direction: Any,
    tower: str | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    position: Any = None,
    aggregation: str | None = None,
    step: int | None = None,
) -> SourceAttribution:
    """Split every head's share by source position: ``A_ij v_j W_O^h`` on the direction, summed over the queries ``i`` that are read.

    Arguments as of :func:`direct_attribution`; the cache must hold patterns (a run that records all sites does), which makes it the model's
    eager run.

    Raises:
        InputError: as there, or a cache without patterns.
    """
    read_tower = chosen_tower(model, tower)
    stream = Stream(read_tower, cached_for(model, cache, read_tower, "source"), step=step)
    check_head_reads_stream(stream)
    where: dict[str, Any] = {"position": position, "aggregation": aggregation}
    found = linear_readout(read_tower, stream.cache, stream.final, direction, **where)
    chosen = chosen_layers(layers, stream.end)
    there, gradient = stream.reading(found.gradient)
    values = torch.stack([_sources(there, layer, gradient) for layer in chosen])
    places, shares, words, kinds = sources_of(stream, values.shape[-1])
    return SourceAttribution(
        values=values.cpu().movedim(2, -1),
        axes={
            "layer": chosen,
            "head": list(range(values.shape[1])),
            "position": list(range(values.shape[3])),
            "example": _examples(model, read_tower, stream.cache, values.shape[2]),
        },
        provenance=describe(
            model,
            method=f"source_attribution(tower={read_tower.name}, direction={found.label})",
            inputs=(stream.cache.inputs,),
        ),
        tower=read_tower.name,
        direction=found.label,
        places=places,
        words=words,
        kinds=kinds,
        shares=shares,
    )


def _sources(stream: Stream, layer: int, gradient: Tensor) -> Tensor:
    """The shares of one layer's heads by source, which add up to the heads'."""
    found = stream.source_shares(layer, gradient)
    check_sources(found, stream.head_shares(layer, gradient)[0], layer, spacing(stream.final))
    return found


def sources_of(
    stream: Stream, count: int
) -> tuple[Int[Tensor, "row source 4"], Tensor, list[list[str]], list[list[str]]]:
    """Places in the image, shares of it, words and kinds of the ``count`` sources that a tower's attention reads: cached ones first."""
    tokens = tokens_of(stream.cache, stream.tower.name)
    places, shares, words = places_of(tokens), shares_of(tokens), [tokens.labels(row) for row in range(tokens.n_rows)]
    kinds = tokens.kind.tolist()
    feeder = next((t for t in stream.tower.siblings.values() if t.feeds_cache), None)
    more = count - tokens.n_positions
    if more > 0 and feeder is not None:
        before = tokens_of(stream.cache, feeder.name)
        places = torch.cat([places_of(before), places], dim=1)
        shares = torch.cat([shares_of(before), shares], dim=1)
        words = [before.labels(row) + words[row] for row in range(tokens.n_rows)]
        kinds = [first + own for first, own in zip(before.kind.tolist(), kinds, strict=True)]
    elif more > 0:
        places = torch.nn.functional.pad(places, (0, 0, 0, more), value=-1)
        shares = torch.nn.functional.pad(shares, (0, 0, 0, more), value=float("nan"))
        words = [row + [f"generated {number}" for number in range(1, more + 1)] for row in words]
        kinds = [row + ["generated"] * more for row in kinds]
    return places, shares, words, kinds


def cached_for(
    model: HookedModel, cache: ActivationCache | Mapping[str, Any], read_tower: Tower, by: str
) -> ActivationCache:
    """The cache given, or that of a run of the inputs, recording what a split ``by`` needs.

    Raises:
        InputError: a cache of another model, whose activations would be read by the wrong weights.
    """
    if isinstance(cache, ActivationCache):
        if cache.model is not None and cache.model.module is not model.module:
            raise InputError("The cache is of another model than the one given; record it with this model.")
        return cache
    parts = ["hook_resid_*"]
    parts += ["attn.hook_z"] if by != "component" else []
    parts += ["mlp.hook_post"] if by == "neuron" else []
    parts += ["attn.hook_v", "attn.hook_pattern"] if by == "source" else []
    names = [f"{read_tower.name}.hook_*", *(f"{read_tower.name}.blocks.*.{part}" for part in parts)]
    names += [f"{read_tower.name}.{site}" for n in range(read_tower.cfg.n_layers) for site in read_tower.added_in(n)]
    names += [f"{name}.hook_readout" for name in model.towers if f"{name}.hook_readout" in model.sites()]
    if by == "source":
        names += [f"{t.name}.blocks.*.attn.hook_v" for t in read_tower.siblings.values() if t.feeds_cache]
    with torch.no_grad():
        return model.run_with_cache(cache, names_filter=names)[1]


def _examples(model: HookedModel, tower: Tower, cache: ActivationCache, rows: int) -> list[int]:
    return examples_of(cache, tower.name, rows)[0].tolist()
