"""Why a head looks where it looks: its attention score at one query and key as a sum over what earlier components wrote.

What a head's query is made of is the stream ``x_t = Σ_i a_i,t``, its key ``x_s = Σ_j a_j,s``; with the denominators of the block's norm held at the
run's, both are affine in it, and the score before the softmax is bilinear in them:

    ``S_ts = Σ_ij q_i,tᵀ M_ts k_j,s + b_ts``,

``M`` the rotation of positions and the scale, read from the model itself as the second derivative of the score, ``b`` what is added by position alone
(masks, position biases). Biases and the constants of norms are a component of their own, ``"bias"``, so that the terms add up to the score exactly.
Where queries and keys pass norms of their own, their denominators are held as well.

A constant along a row of the pattern changes nothing. What a term does to the pattern is, to first order,

    ``dA_ts = A_ts (S^{ij}_ts − Σ_s' A_ts' S^{ij}_ts')``,

0 for a term that is the same at every key (:attr:`QKAttribution.on_pattern`); or compare with another key (``against``), whose terms are taken away.

Not covered: norms of queries and keys that add a bias; scores that are no product (soft caps); branches other than a block's own attention.

Reference: Kamath et al. 2025 (QK attributions, transformer-circuits.pub); Elhage et al. 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits.computational_graph import computational_graph
from circuitvision.circuits.edge_runs import images_of
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.branches import AttentionBranch, branch_at, in_features
from circuitvision.model.names import NodeName, heads_of
from circuitvision.model.norms import Norm, frozen_norm
from circuitvision.model.positions import Positions
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.gradient_run import GradientRun
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

BIAS = "bias"


@dataclass(frozen=True, eq=False)
class QKAttribution(Result):
    """The terms of a head's score: ``values`` ``[query key example]``, in units of the score before the softmax.

    Axes bear the ids of senders and ``"bias"``. ``score`` ``[example]`` is what they add up to, with ``position_bias`` ``[example]``; compared with
    another key, both are differences. ``pattern`` ``[example]`` is the weight of the attention from query to key, ``on_pattern`` ``[query key
    example]`` what each term does to it, see the module.
    """

    score: Tensor = field(default_factory=lambda: torch.zeros(0))
    position_bias: Tensor = field(default_factory=lambda: torch.zeros(0))
    pattern: Tensor = field(default_factory=lambda: torch.zeros(0))
    on_pattern: Tensor = field(default_factory=lambda: torch.zeros(0))
    head: str = ""
    query: str = ""
    key: str = ""
    against: str = ""
    """Which positions were asked about, in words; ``against`` is empty where no key was taken away."""

    _per_example: ClassVar[dict[str, int]] = {"score": -1, "position_bias": -1, "pattern": -1, "on_pattern": -1}

    @property
    def of_queries(self) -> Float[Tensor, "query example"]:
        """What each component contributes through the query, with the key as a whole."""
        return self.values.sum(1)

    @property
    def of_keys(self) -> Float[Tensor, "key example"]:
        """What each component contributes through the key, with the query as a whole."""
        return self.values.sum(0)

    def ranking(self, count: int | None = None, by: str = "score") -> list[tuple[str, str, float]]:
        """Terms as (query's component, key's component, mean), the largest in size first; ``by`` what they add to the ``"score"``, or do to the
        ``"pattern"``.

        Raises:
            InputError: another ``by``.
        """
        if by not in ("score", "pattern"):
            raise InputError(f"by={by!r} is not understood: 'score' or 'pattern'.")
        mean = self.mean() if by == "score" else self.mean(quantity="on_pattern")
        order = torch.argsort(-mean.abs().flatten(), stable=True)[:count].tolist()
        names = [(query, key) for query in self.axes["query"] for key in self.axes["key"]]
        return [(*names[place], float(mean.flatten()[place])) for place in order]

    def gathered(self, count: int) -> list[tuple[str, str, float, float]]:
        """The ``count`` terms of the largest mean size as (query's component, key's component, mean, standard error), and last, under ``("", "")``,
        the sum of all others with what position adds: together the score. Terms of no size are not listed; the error of a single example is NaN.
        """
        ranked = self.ranking(count)
        names = [(query, key) for query, key, mean in ranked if abs(mean) > 1e-6 * abs(ranked[0][2])]
        places = [(self.index_of("query", query), self.index_of("key", key)) for query, key in names]
        terms = self.values.new_zeros(0, self.values.shape[-1]).double()
        if places:
            terms = torch.stack([self.values[place] for place in places]).double()
        terms = torch.cat([terms, (self.score - terms.sum(0)).unsqueeze(0)])
        n = terms.shape[-1]
        errors = terms.std(-1) / n**0.5 if n > 1 else torch.full_like(terms[:, 0], torch.nan)
        means = terms.mean(-1).tolist()
        return [(*name, *one) for name, *one in zip([*names, ("", "")], means, errors.tolist(), strict=True)]

    def highlights(self) -> dict[str, str]:
        """The largest term."""
        query, key, value = self.ranking(1)[0]
        return {
            "head": self.head,
            "largest term": f"{query} × {key} ({value:+.4g})",
            "score": f"{float(self.score.mean()):+.4g}",
        }


@with_provenance
def qk_attribution(
    model: Any, inputs: Mapping[str, Any], head: Any, *, query: Any, key: Any, against: Any = None
) -> QKAttribution:
    """The score of a head at one query and key of every row, as terms of earlier components.

    Args:
        model: the hooked model.
        inputs: what it is run on.
        head: the head, in any spelling of :mod:`circuitvision.model.names`: ``"vision L1H2"``, ``"v.a1.h2"``.
        query, key: one position of every row, as positions are chosen everywhere (a number, ``"last"``, ``"cls"``, a region …).
        against: another key, whose terms are taken away.

    Raises:
        InputError: a selection of none or several positions in a row, a head that the model does not have.
        UnsupportedModelError: a head whose scores are no products of affine queries and keys.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "The attribution of a score")
    (name,) = heads_of([head], model.towers)
    tower = model.towers[name.tower]
    branch, _ = branch_at(tower, f"{name.tower}.blocks.{name.layer}.attn.hook_z")
    assert isinstance(branch, AttentionBranch)
    for norm in filter(None, map(branch.head_norm, "qk")):
        if Norm(norm).bias(torch.zeros(1)) is not None:
            raise UnsupportedModelError(
                "This model's norm of queries or keys adds a bias, which is not covered: score edges into them with edge_attribution."
            )
    if "k" not in branch.letters:
        raise UnsupportedModelError("This head reads keys of another tower, which is not covered.")
    places = [
        _one_position(model, inputs, name.tower, one) for one in (query, key, *([] if against is None else [against]))
    ]
    found = _Terms(model, inputs, name, branch)
    terms, score, position_bias, pattern, on_pattern = found.at(places[0], places[1])
    if against is not None:
        others, other_score, other_bias, _, _ = found.at(places[0], places[2])
        terms, score, position_bias = terms - others, score - other_score, position_bias - other_bias
    labels = [*found.labels, BIAS]
    return QKAttribution(
        values=terms,
        axes={"query": labels, "key": labels, "example": list(range(terms.shape[-1]))},
        provenance=describe(model, method="qk_attribution", inputs=(inputs,)),
        score=score,
        position_bias=position_bias,
        pattern=pattern,
        on_pattern=on_pattern,
        head=str(head),
        query=str(query),
        key=str(key),
        against="" if against is None else str(against),
    )


def _one_position(model: Any, inputs: Mapping[str, Any], tower: str, chosen: Any) -> Tensor:
    """The number of the chosen position in every row. Raises InputError where there is none, or several."""
    mask = Positions.of(chosen).resolve(model.tokens(inputs)[tower])
    if bool((mask.sum(1) != 1).any()):
        raise InputError(
            f"{chosen!r} must be one position of every row of the {tower} tower; it is {mask.sum(1).tolist()} of them."
        )
    return mask.int().argmax(1)


class _Terms:
    """One run, what earlier components wrote in it, and the head's queries and keys made of that."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], name: NodeName, branch: AttentionBranch) -> None:
        self.name, self.branch = name, branch
        tower, prefix = model.towers[name.tower], f"{name.tower}.blocks.{name.layer}"
        graph = computational_graph(model, inputs)
        slot = next(one for one in graph.slots_at(f"{prefix}.{branch.slot('q')}"))
        self.rows = graph.edges[:, slot].nonzero().flatten().tolist()
        self.labels = [graph.sender_ids[row] for row in self.rows]
        stream = f"{prefix}.{branch.stream}"
        inside = f"{prefix}.{branch.name}"
        # What scores are products of: behind a norm, where there is one.
        self.sites = {
            letter: f"{inside}.{letter}_norm.hook_normalized" if branch.head_norm(letter) else f"{inside}.hook_{letter}"
            for letter in "qk"
        }
        self.sites["scores"] = f"{inside}.hook_attn_scores"
        self.plain = {letter: f"{inside}.hook_{letter}" for letter in "qk"}
        written = list(dict.fromkeys(graph.senders[row].site for row in self.rows))
        self.run = GradientRun(model, inputs, list(self.sites.values()), read=[*written, stream, *self.plain.values()])
        with torch.no_grad():
            self.stream = self.run.values[stream].detach()
            parts = self._parts(model, graph, tower, model.tokens(inputs))
            self.q, self.k = (self._projected(parts, letter) for letter in "qk")

    def _parts(self, model: Any, graph: Any, tower: Any, tokens: Any) -> Float[Tensor, "row pos sender d_model"]:
        """What every sender wrote, and last what is left of the stream: biases."""
        found = []
        for site in dict.fromkeys(graph.senders[row].site for row in self.rows):
            senders = [graph.senders[row] for row in graph.senders_at(site)]
            value = self.run.values[site].detach()
            if senders[0].node.head is not None:
                source, _ = branch_at(tower, site)
                # Where a norm follows the branch, heads add up to the derivative, and what is left is with the biases.
                found.append(tower.head_tangents(source.block.layer, value, value, source.name))
            else:
                found.append(torch.stack([value * images_of(tokens, sender).to(value) for sender in senders], 2))
        written = torch.cat(found, 2)
        return torch.cat([written, (self.stream - written.sum(2)).unsqueeze(2)], 2)

    def _projected(
        self, parts: Float[Tensor, "row pos sender d_model"], letter: str
    ) -> Float[Tensor, "row pos sender d_head"]:
        """The head's queries or keys of every part; what is the same whatever was written goes to the last."""
        projection, heads = self.branch.projection(letter), self.branch.heads_of(letter)
        number = self.name.head * heads // self.branch.heads_of("q")
        weight, bias = projection.weight_and_bias(parts.dtype, parts.device)
        weight = weight.to(parts).unflatten(1, (heads, -1))[:, number]
        norm = self.branch.norm
        # One part at a time: the norm's denominator is that of the whole stream.
        with self.branch.block.tower.hooks_disabled():
            none = torch.zeros_like(self.stream)
            constant = none if norm is None else frozen_norm(norm, none, self.stream)
            moved = [
                part if norm is None else frozen_norm(norm, part, self.stream) - constant for part in parts.unbind(2)
            ]
        moved[-1] = moved[-1] + constant
        found = torch.stack(moved, 2) @ weight
        if bias is not None:
            found[:, :, -1] += bias.to(found).unflatten(0, (heads, -1))[number]
        return self._normed(found, letter, number)

    def _normed(self, parts: Tensor, letter: str, number: int) -> Float[Tensor, "row pos sender d_head"]:
        """The parts behind the norm of queries or keys, with its denominator held; its gain is in the form of the scores."""
        module = self.branch.head_norm(letter)
        if module is None:
            return parts
        norm, whole = Norm(module), self.run.values[self.plain[letter]].detach()
        if in_features(module) in (0, parts.shape[-1]):
            return norm.centred(parts) / norm.denominator(whole[:, :, number]).to(parts).unsqueeze(2)
        if norm.spec.centred:
            raise UnsupportedModelError(
                "A norm over all heads that takes away their mean is not covered: score edges with edge_attribution."
            )
        return parts / norm.denominator(whole.flatten(-2)).to(parts).unsqueeze(2)

    def at(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The terms ``[query key row]``, the score, what position alone adds, the pattern, and what the terms do to it, at a query and key of every
        row."""
        rows, head = torch.arange(len(query)), self.name.head or 0
        scores, q, k = (self.run.values[self.sites[part]] for part in ("scores", "q", "k"))
        group = head * k.shape[2] // q.shape[2]
        own = scores[rows, head, query]
        (first,) = torch.autograd.grad(own.sum(), q, create_graph=True, retain_graph=True)
        slope = first[rows, query, head]
        # The score at a key depends on that key alone, so one derivative of the sum holds the form at every key.
        form = torch.stack(
            [torch.autograd.grad(one.sum(), k, retain_graph=True)[0][:, :, group] for one in slope.unbind(-1)], 2
        ).detach()
        own_q, own_k = q.detach()[rows, query, head], k.detach()[:, :, group]
        if not torch.allclose(torch.einsum("rsde,rse->rd", form, own_k), slope.detach(), rtol=1e-3, atol=1e-5):
            raise UnsupportedModelError(
                "The scores of this head are no products of its queries and keys (a soft cap?), which is not covered."
            )
        looked = torch.einsum("rsde,rsje->rsdj", form, self.k)
        of_query = self.q[rows, query]
        terms = torch.einsum("rid,rdj->ijr", of_query, looked[rows, key])
        score, pattern = own.detach()[rows, key], own.detach().softmax(-1)
        whole = torch.einsum("rd,rde,re->r", own_q, form[rows, key], own_k[rows, key])
        usual = torch.einsum("rid,rdj->ijr", of_query, torch.einsum("rs,rsdj->rdj", pattern, looked))
        weight = pattern[rows, key]
        return terms, score, score - whole, weight, weight * (terms - usual)
