"""The studies of ``circuits.py``: scores of all edges from gradients, beside code that copies the stream for every head; edges one by one.

The split reference is what public code for edge attribution does (``use_split_qkv_input``, ``use_attn_result``): a layer's stream is copied for the
query, key and value of each head, each copy is normed and projected by itself, and what each head adds is kept, so that gradients of all slots come
out of one backward pass. It covers the swept tower alone: the vision tower of a LLaVA runs in it without scores, which is in its favour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from causal_studies import _has_aims, _sampled, model_of
from causal_tools import OURS, Arm, CausalStudy, Scene, check
from sweeps import slices
from torch import Tensor

from circuitvision.circuits import EdgeAttribution, edge_attribution
from circuitvision.circuits.computational_graph import computational_graph
from circuitvision.circuits.edge_runs import EdgeEdits, Interchange
from circuitvision.patching.runs import Sides

SPLIT, ONE_BY_ONE = "split q, k, v and results", "loop of single edges"
STEPS = 5
MEMORY = 1.3
"""How many times the memory of two forwards and a backward the scores of all edges may take."""


class Split:
    """The swept tower written out with a copy of the stream for every head's query, key and value, and every head's result."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        network = scene.network
        self.heads, self.kv_heads = network.heads, network.kv_heads
        self.rotary: Any = scene.module.model.language_model.rotary_emb if scene.text else None  # type: ignore[union-attr]

    def run(self, inputs: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The metric, what senders write ``[row pos sender d_model]`` layer by layer, and the slots, in order of reading."""
        scene = self.scene
        _, found = scene.reading({"in": (scene.block(0), "in")}, inputs)
        stream = found["in"].detach()
        return self.behind(stream)

    def behind(self, stream: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The same from what enters the tower."""
        senders, slots = [stream.unsqueeze(2)], []
        if torch.is_grad_enabled():
            stream = stream.clone().requires_grad_()
        for layer in range(self.scene.n_layers):
            copies = [
                stream.unsqueeze(2).repeat(1, 1, count, 1) for count in (self.heads, self.kv_heads, self.kv_heads)
            ]
            results = self._attention(layer, *copies)
            bias = self.scene.output(layer).bias
            middle = stream + results.sum(2) + (0 if bias is None else bias)
            inner = middle.clone()
            block = self.scene.block(layer)
            second = block.post_attention_layernorm if self.scene.text else block.layernorm_after
            added = block.mlp(second(inner))
            stream = middle + added
            slots += [*copies, inner]
            senders += [results, added.unsqueeze(2)]
        ended = stream.clone()
        return self.scene.metric(self.scene.tail(ended)), senders, [*slots, ended]

    def _attention(self, layer: int, *copies: Tensor) -> Tensor:
        """What every head adds, from its own copies: ``[row pos head d_model]``."""
        scene, attention = self.scene, self.scene.attention(layer)
        made = []
        for copy, name in zip(copies, "qkv", strict=True):
            projection = getattr(attention, f"{name}_proj")
            weight = projection.weight.unflatten(0, (copy.shape[2], -1))
            one = torch.einsum("rphd,hed->rhpe", scene.norm(layer)(copy), weight)
            made.append(one if projection.bias is None else one + projection.bias.unflatten(0, (copy.shape[2], 1, -1)))
        q, k, v = made
        if self.rotary is not None:
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

            cos, sin = self.rotary(v, torch.arange(q.shape[2], device=q.device)[None])
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        grouped = self.heads != self.kv_heads
        z = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=scene.causal, scale=attention.scaling, enable_gqa=grouped
        )
        return torch.einsum("rhpe,dhe->rphd", z, scene.output(layer).weight.unflatten(1, (self.heads, -1)))

    def scores(self, points: Sequence[float] = (0.0,)) -> Tensor:
        """EAP (or EAP-IG at points of the path of what enters the tower) of all edges ``[sender slot]``, 0 where there is none."""
        with torch.no_grad():
            _, there, _ = self.run(self.scene.source)
            _, here, _ = self.run(self.scene.base)
        away = torch.cat([one - other for one, other in zip(there, here, strict=True)], 2)
        start, end = here[0][:, :, 0], there[0][:, :, 0]
        counts = [one.shape[2] for one in here]
        del there, here
        total = None
        for point in points:
            found = self._of_point(start + point * (end - start), away, counts) / len(points)
            total = found if total is None else total + found
        assert total is not None
        return total

    def _of_point(self, stream: Tensor, away: Tensor, counts: Sequence[int]) -> Tensor:
        with torch.enable_grad():
            value, _, slots = self.behind(stream)
            columns: list[Tensor] = [torch.zeros(0)] * len(slots)
            for number, slot in enumerate(slots):
                layer, kind = divmod(number, 4)
                known = sum(counts[: 1 + 2 * layer + (kind == 3)])

                def score(gradient: Tensor, number: int = number, known: int = known) -> None:
                    gradient = gradient if gradient.ndim == 4 else gradient.unsqueeze(2)
                    own = torch.einsum("rpsd,rpnd->sn", away[:, :, :known], gradient)
                    columns[number] = torch.cat([own, own.new_zeros(away.shape[2] - known, own.shape[1])])

                slot.register_hook(score)
            value.sum().backward()
        return torch.cat(columns, 1)


def _of_tower(scene: Scene, result: EdgeAttribution) -> Tensor:
    """The scores of a result in the order of the split reference: what enters the tower as one sender, slots layer by layer."""
    letter = "l" if scene.text else "v"
    totals = result.totals[..., 0].nan_to_num()
    senders, slots = result.axes["sender"], result.axes["slot"]
    entering = [
        n for n, name in enumerate(senders) if name == f"{letter}.input" or (scene.text and name.startswith("x."))
    ]
    rows = [n for n, name in enumerate(senders) if name.startswith(f"{letter}.") and n not in entering]
    columns = [n for n, name in enumerate(slots) if name.startswith(f"{letter}.")]
    return torch.cat([totals[entering].sum(0, keepdim=True), totals[rows]])[:, columns]


def edges(scene: Scene, size: int, method: str = "eap") -> CausalStudy:
    """EAP, or EAP-IG at midpoints, of every edge of every tower."""
    model, split = model_of(scene), Split(scene)
    along = method == "eap-ig"
    points = [(number + 0.5) / STEPS for number in range(STEPS)] if along else [0.0]
    first = {0: (scene.block(0), "in")}

    def ours() -> EdgeAttribution:
        given = {"steps": STEPS, "quadrature": "midpoint"} if along else {}
        return edge_attribution(
            model, clean=scene.base, corrupt=scene.source, metric=scene.metric, method=method, progress=False, **given
        )

    def bare() -> None:
        with torch.no_grad():
            scene.module(**scene.source)
            if along:
                scene.module(**scene.base)
        for _ in points:
            with torch.enable_grad():
                logits, here = scene.reading(first, scene.base)
                torch.autograd.grad(scene.metric(logits).sum(), [here[0]])

    found = ours()
    if not along:
        largest = float(scene.metric(scene.module(**scene.base).logits).abs().max())
        check("edges", OURS, _of_tower(scene, found), split.scores(), largest)
    passes = f"{2 + along * 1} forwards + {len(points)} × (forward + backward)" if along else "2 forwards + 1 backward"
    reference = f"{'2 forwards' if along else '1 forward'} + {len(points)} × (forward + backward)"
    return CausalStudy(
        method,
        f"{'EAP-IG, 5 points' if along else 'EAP'}: {found.n_edges:,} edges",
        reference,
        {
            reference: Arm(bare),
            OURS: Arm(ours, passes=passes),
            SPLIT: Arm(
                lambda: split.scores(points),
                passes=f"the same, {_of_tower(scene, found).count_nonzero():,} edges of one tower",
            ),
        },
        SPLIT,
        aim=1.5 if _has_aims(scene) else None,
        memory=MEMORY if _has_aims(scene) and not along else None,
    )


def single_edges(scene: Scene, size: int) -> CausalStudy:
    """Exact patching of edges one by one: a share of all, drawn at random, in one sweep beside a loop of whole runs."""
    model = model_of(scene)
    graph = computational_graph(model, scene.base)
    cells = graph.edges.nonzero().tolist()
    drawn = slices(cells, min(256, len(cells)), seed=2)()
    with torch.no_grad():
        source = model._values_at(scene.source, graph.sites)[1]

    def mask(some: Sequence[Any]) -> Tensor:
        found = torch.zeros_like(graph.edges)
        for row, column in some:
            found[row, column] = True
        return found

    def ours() -> Tensor:
        groups = EdgeEdits(model, graph, mask(drawn))(Sides(scene.base, source))
        return model.sweep(scene.base, groups, scene.metric, progress=False).values[:, 0]

    def value(cell: Any) -> Tensor:
        edits = Interchange(model, graph, scene.base, source).edits(mask([cell]))
        return scene.metric(model.run(scene.base, edits))

    found, asked = ours(), sorted(drawn)
    largest = float(scene.metric(scene.module(**scene.base).logits).abs().max())
    some = list(range(0, len(asked), max(1, len(asked) // 5)))
    with torch.no_grad():
        clean = scene.metric(scene.module(**scene.base).logits)
        exact = torch.cat([value(asked[number]) for number in some])
    check("single edges", OURS, found[some] - clean, exact - clean, largest)
    return CausalStudy(
        "exact",
        f"exact patching of {len(drawn)} of {len(cells):,} edges",
        "bare forward",
        {
            "bare forward": Arm(lambda: scene.module(**scene.base), passes="1 forward"),
            OURS: Arm(ours, passes=f"1 forward + {len(drawn)} from the edge's end on"),
            ONE_BY_ONE: _sampled(value, drawn, size, "1 forward per edge"),
        },
        ONE_BY_ONE,
        unavoidable=_share(graph, asked, scene),
    )


def _share(graph: Any, cells: Sequence[Any], scene: Scene) -> float:
    """How many forwards the parts of the tower behind each edge's end are, by layers."""
    layers = scene.n_layers
    return sum(1 - min(max(graph.slots[column].slot.place[0], 0), layers) / layers for _, column in cells)


STUDIES = ("eap", "eap-ig", "exact")


def studies_of(
    scene: Scene, wanted: Sequence[str], chosen: Sequence[str], size: int
) -> dict[str, Callable[[], CausalStudy]]:
    """The studies that were asked for, each made when it is its turn."""
    made: dict[str, Callable[[], CausalStudy]] = {
        "eap": lambda: edges(scene, size),
        "eap-ig": lambda: edges(scene, size, "eap-ig"),
        "exact": lambda: single_edges(scene, size),
    }
    return {kind: made[kind] for kind in chosen}
