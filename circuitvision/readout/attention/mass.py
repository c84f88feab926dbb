"""Attention in numbers: how much of it goes where, and how spread out it is.

Everything is read off ``attn.hook_pattern`` of one run (asking for it makes the run eager). A pattern's row sums to 1: it is one query's
attention, in shares. Every number is first a mean over the queries that count, then kept per layer, head and row; rows of a vision tower are
images, so that an example may have several.

Which queries count, by default: the last position that is not padding in a tower that reads text in order, every position in the others, and
only positions whose attention can reach the output. Padding is no query, but where the family reads it (the last position of SigLIP's texts).

Beside each number stands ``uniform``, what a head would give that looked at all the keys it can see alike: a box of 4 of 16 patches gets 25%
of such a head. Attention says where a head looks, not what it does there: check by ablation before calling a head a cause.

Not covered: attention weighted by the length of what is moved; gradients of patterns.

Sources: mass per modality, "Beyond Semantics" (arXiv 2503.17349); entropy over image tokens, CARVE (2509.06461).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.names import head_name
from circuitvision.model.positions import Positions, PositionsLike, warn_of_empty, without_any
from circuitvision.model.tokens import ABSENT, TokenMap
from circuitvision.provenance import with_provenance
from circuitvision.readout.attention.cache import read
from circuitvision.readout.attention.patterns import EVERYTHING, Patterns, described, mean_query, warn_undefined
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

_NO_QUERY = "a row has no query that counts (padding never counts)"


@dataclass(frozen=True, eq=False)
class AttentionSummary(Result):
    """A number per head: ``values`` is ``[layer head span example]`` for masses, ``[layer head example]`` otherwise.

    ``uniform`` (the same without ``head``) is what a head gives that looks at every key it can see alike. ``dead_layers`` names the layers where no
    counted query can reach the output: attention there changes nothing.
    """

    tower: str = ""
    measure: str = "mass"
    """"mass" (share of attention), "entropy" (nats), "relative entropy" (share of the largest there could be) or "peak" (share of peaks)."""
    queries: str = ""
    uniform: Tensor = field(default_factory=lambda: torch.zeros(0))
    dead_layers: list[Any] = field(default_factory=list)

    _per_example: ClassVar[dict[str, int]] = {"uniform": -1}

    def highlights(self) -> dict[str, str]:
        """Of every span (or of the one measure) the head that stands out most from looking at all keys alike, in means over examples."""
        spans = self.axes.get("span", [self.measure])
        values, alike = self.mean(), self.mean(quantity="uniform")
        if "span" not in self.axes:
            values, alike = values[..., None], alike[..., None]
        narrow = -1.0 if "entropy" in self.measure else 1.0
        found = {}
        for number, span in enumerate(spans):
            above = (narrow * (values - alike[:, None]))[..., number].nan_to_num(-math.inf)
            layer, head = divmod(int(above.argmax()), above.shape[1])
            if math.isfinite(float(above[layer, head])) and span != EVERYTHING:
                shown = "{:.2f}" if self.measure == "entropy" else "{:.1%}"
                where = head_name(self.axes["layer"][layer], self.axes["head"][head], self.tower)
                value, uniform = (shown.format(float(x)) for x in (values[layer, head, number], alike[layer, number]))
                found[str(span)] = f"{where}: {value} (all keys alike: {uniform})"
        return found

    @with_provenance
    def over_heads(self) -> AttentionSummary:
        """The mean over heads that have a value, as a result without the axis ``head``."""
        axes = {key: labels for key, labels in self.axes.items() if key != "head"}
        values = self.values.double().nanmean(list(self.axes).index("head"))
        return dataclasses.replace(self, values=values, axes=axes)

    @with_provenance
    def span(self, name: str) -> AttentionSummary:
        """One span of several, as a result without the span axis; InputError for a span that was not measured."""
        index = self.index_of("span", name)
        axes = {key: labels for key, labels in self.axes.items() if key != "span"}
        return AttentionSummary(
            self.values[..., index, :],
            axes,
            {**self.provenance, "span": name},
            self.tower,
            self.measure,
            self.queries,
            self.uniform[..., index, :],
            self.dead_layers,
        )


@with_provenance
def attention_mass(
    model: Wrapped,
    cache: ActivationCache | Mapping[str, Any],
    tokens: Mapping[str, TokenMap] | TokenMap | None = None,
    *,
    tower: str | None = None,
    spans: Mapping[str, PositionsLike] | None = None,
    queries: PositionsLike = None,
    layers: Any = None,
    step: int | None = None,
) -> AttentionSummary:
    """Share of attention that each head's queries give to each span of keys: ``mean over queries of Σ_{key in span} pattern[query, key]``.

    Args:
        model: the hooked model.
        cache: inputs, which are run, or the cache of a run that holds patterns (``names_filter="{tower}.blocks.*.attn.hook_pattern"``).
        tokens: ``model.tokens(inputs)``, or the map of the tower to read; None: that of the inputs.
        tower: None: the last tower whose patterns are read that can look at image patches.
        spans: name → positions (kinds such as "patch", regions of :mod:`circuitvision.regions`, selections, …), see
            :mod:`circuitvision.model.positions`. None: every kind there is, which add up to 1, and "everything" but padding. Kinds and regions are
            looked for among all keys, cached ones of another tower too (PI0's prompt, for its action tower); numbers are the tower's own.
        queries: positions of the tower; None: see the module.
        layers: numbers, or "pool" for an attention pool; None: all in the cache that can reach the output.
        step: which pass, in a cache that recorded ``generate`` or ``sample_actions``.

    A row in which a kind does not occur gives it 0; where a region, selection or mask is empty for an example the mass is NaN, with a warning.

    Raises:
        InputError: no such patterns in the cache (the message says what to run), a span that is empty or of another tower.
    """
    patterns = read(model, cache, tokens, tower, layers, step)
    if spans is None:
        kinds = [kind for kind in dict.fromkeys(patterns.key_kind.flatten().tolist()) if kind not in ABSENT]
        spans = {**{kind: kind for kind in kinds}, EVERYTHING: EVERYTHING}
    if not spans:
        raise InputError("spans is empty; leave it out, or name at least one span.")
    members, absent = _members(patterns, spans)
    warn_of_empty(
        {name: len(own) for name, own in zip(spans, _empty(patterns, members, spans), strict=True)},
        patterns.own.n_examples,
    )
    values, uniform = [], []
    for pattern, counted in patterns.each(queries):
        mass = mean_query(pattern, counted) @ members.to(pattern.dtype)
        values.append(mass.masked_fill(absent[:, None], float("nan")).movedim(0, -1))
        alike = patterns.alike(pattern) @ members.to(pattern.dtype)
        uniform.append(mean_over(alike, counted).masked_fill(absent, float("nan")).movedim(0, -1))
    stacked = torch.stack(values)
    warn_undefined(stacked.masked_fill(absent.T, 0.0), _NO_QUERY)
    return _summary(patterns, "attention_mass", "mass", queries, stacked, torch.stack(uniform), {"span": list(spans)})


@with_provenance
def attention_entropy(
    model: Wrapped,
    cache: ActivationCache | Mapping[str, Any],
    tokens: Mapping[str, TokenMap] | TokenMap | None = None,
    *,
    tower: str | None = None,
    span: PositionsLike = None,
    renormalise: bool = True,
    relative: bool = False,
    queries: PositionsLike = None,
    layers: Any = None,
    step: int | None = None,
) -> AttentionSummary:
    """How spread out each head's attention is: ``mean over queries of −Σ_key p ln p``, in nats; 0 is one key, ln n is n keys alike.

    ``span`` restricts the keys, and ``p`` is then the attention renormalised over them (with ``renormalise=False`` it is taken as it is). A
    query that gives the span nothing has no entropy and is left out of the mean; where no query is left the value is NaN, with a warning.
    ``uniform`` is ln of the number of visible keys. Behind a causal mask early queries see few keys and cannot spread far: ``relative`` divides
    every query's entropy by ln of the number of keys it sees, 0 … 1, and leaves out those that see a single one. Other arguments as for
    :func:`attention_mass`.

    Raises:
        InputError: as for :func:`attention_mass`; ``relative`` without ``renormalise``.
    """
    if relative and not renormalise:
        raise InputError(
            "relative=True compares with keys that are looked at alike, whose shares sum to 1: leave renormalise on."
        )
    patterns = read(model, cache, tokens, tower, layers, step)
    keys = torch.from_numpy(patterns.keys(span, "span"))
    values, uniform = [], []
    for pattern, counted in patterns.each(queries):
        inside = keys[:, None, :, None].to(pattern.dtype)
        mass = (pattern @ inside)[..., 0]
        entropy = (torch.special.entr(pattern) @ inside)[..., 0]
        if renormalise:
            # -Σ p/m ln(p/m) = ln m - Σ p ln p / m; rounding may leave it just below 0.
            entropy = (entropy / mass + mass.log()).clamp_min(0.0)
        visible = patterns.visible(pattern)
        seen, count = (visible.sum(-1).to(pattern.dtype), (visible & keys[:, None]).sum(-1).to(pattern.dtype))
        # Of shares that are taken as they are, keys looked at alike have 1 / seen each.
        largest = count.log() if renormalise else count / seen * seen.log()
        some = counted & (count > (1 if relative else 0))
        if relative:
            entropy, largest = entropy / largest[:, None], torch.ones_like(largest)
        defined = (mass > 0) & some[:, None]
        total = torch.where(defined, entropy, 0.0).sum(-1)
        values.append((total / defined.sum(-1)).transpose(0, 1))
        uniform.append(mean_over(largest, some))
    stacked = torch.stack(values)
    why = "sees two keys of the span" if relative else "gives the span any attention"
    warn_undefined(stacked, f"no query that counts {why} (padding never counts)")
    measure = "relative entropy" if relative else "entropy"
    return _summary(patterns, "attention_entropy", measure, queries, stacked, torch.stack(uniform), {})


def _members(patterns: Patterns, spans: Mapping[str, PositionsLike]) -> tuple[Tensor, Tensor]:
    """Which keys each span holds, ``[row key span]``, and where a span given by positions is empty, ``[row span]``."""
    if not isinstance(spans, Mapping):
        raise InputError(
            "spans= maps names to kinds, selections or masks: {'image': 'patch', 'box': tokens.image(0).box(…)}."
        )
    masks = [patterns.keys(spec, name) for name, spec in spans.items()]
    members = torch.from_numpy(np.stack(masks, axis=-1))
    return members, ~members.any(1) & torch.tensor([_varies(spec) for spec in spans.values()])


def _varies(spec: PositionsLike) -> bool:
    return not (isinstance(spec, str) and spec == EVERYTHING) and Positions.of(spec).may_be_empty


def _empty(patterns: Patterns, members: Tensor, spans: Mapping[str, PositionsLike]) -> list[list[int]]:
    """For every span the examples in which it holds no key, where it says for itself which they are."""
    own = [_varies(spec) for spec in spans.values()]
    count = patterns.own.n_examples
    return [without_any(members[..., n], patterns.example, count) if own[n] else [] for n in range(len(own))]


def mean_over(values: Float[Tensor, "row query ..."], counted: Bool[Tensor, "row query"]) -> Float[Tensor, "row ..."]:
    """Mean over the queries that count, whatever the others hold."""
    where = counted.reshape(*counted.shape, *[1] * (values.ndim - 2))
    return torch.where(where, values, 0.0).sum(1) / where.sum(1)


def _summary(
    patterns: Patterns,
    method: str,
    measure: str,
    queries: PositionsLike,
    values: Tensor,
    uniform: Tensor,
    inner: dict[str, list[Any]],
) -> AttentionSummary:
    return AttentionSummary(
        values=values,
        axes={**patterns.axes(values.shape[1]), **inner, "example": patterns.example},
        provenance=patterns.provenance(method, queries),
        tower=patterns.tower,
        measure=measure,
        queries=described(queries),
        uniform=uniform,
        dead_layers=patterns.dead_layers(queries),
    )
