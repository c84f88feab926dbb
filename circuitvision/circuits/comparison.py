"""Where a circuit's weight lies, and how far two circuits agree.

*Layer matrix*: ``Λ_ij``, the sum of ``|score|`` of the edges that lead from layer ``i`` to layer ``j``, towers one after another; the sign of scores
is discarded, so a circuit that works against the answer weighs as much. What enters a tower is a place of its own (``in``), and so are connectors and
the output.

*Deep-to-shallow bias* (DDB), ``ln(Σ_{i deep} Λ_ij / Σ_{i shallow} Λ_ij)`` over the edges out of the blocks of one tower. The authors' code takes
layers ``≤ ⌊τ n⌋`` as shallow and ``≥ n − ⌊τ n⌋`` as deep, one layer more below than above, so that an even circuit of 12 layers has ``ln(3/4)`` at
``τ = .3``; ``bands="symmetric"`` takes ``⌊τ n⌋`` of each and gives 0. The layers are part of the result.

*Circuit shift* (CSS) between two circuits or scorings of one graph, over ``|mean score|`` of all edges (0 outside of a circuit): Spearman's rank
correlation, cosine, Euclidean distance, weighted Jaccard ``Σ min / Σ max``, and the distance of Laplacian spectra. The last is not defined further in
the paper's description; here it is the Euclidean distance of the sorted eigenvalues of ``I − D^{−½} W D^{−½}``, with ``W`` the undirected sum of the
weights between nodes.

Not covered: the KL divergence that the authors score edges by (give an attribution of ``cv.metrics.kl()`` made with ``method="eap-ig"``).

Reference: Peng et al. 2026 (Inside-Out, arXiv 2604.08192).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.circuits.circuit import Circuit
from circuitvision.circuits.edge_attribution import EdgeAttribution
from circuitvision.circuits.edge_graph import split_slot
from circuitvision.errors import InputError
from circuitvision.model.names import TOWER_LETTERS, parse_id
from circuitvision.provenance import with_provenance
from circuitvision.results import Result

BANDS = ("symmetric", "published")
TARGETS = ("all", "deep", "output")
ROUNDING = 1e-12
"""Share of the largest weight up to which a weight is rounding, and 0."""
Scored = Circuit | EdgeAttribution


@dataclass(frozen=True, eq=False)
class LayerMatrix(Result):
    """``values`` ``[from to]``: the weight of the edges that lead from one layer to another; ``"vision 3"``, ``"vision in"``, ``"projector"``,
    ``"output"``. ``edges`` counts them. Sums over each are ``values.sum()`` and ``edges.sum()``: shares are :attr:`share`."""

    edges: Tensor = field(default_factory=lambda: torch.zeros(0))

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The matrix."""
        return self.values, ()

    @property
    def share(self) -> Float[Tensor, "from to"]:
        """The share of all weight that each cell has; NaN of nothing."""
        return self.values / self.values.sum()

    @property
    def edge_share(self) -> Float[Tensor, "from to"]:
        """The share of all edges that each cell has; NaN of none."""
        return self.edges.double() / self.edges.sum()

    def depth_bias(
        self, tower: str = "vision", share: float = 0.3, *, bands: str = "symmetric", targets: str = "all"
    ) -> DepthBias:
        """The deep-to-shallow bias of one tower, see the module; ``+inf`` or ``−inf`` where one band has no weight, NaN where neither has.

        Args:
            tower: whose layers are told apart.
            share: ``τ``, the share of layers of a band.
            bands: ``"symmetric"``, or ``"published"`` as the authors' code takes them.
            targets: edges into everything, into deep layers alone, or into the output.

        Raises:
            InputError: a tower without layers here, a share that leaves a band empty or makes both meet, unknown bands or targets.
        """
        if bands not in BANDS or targets not in TARGETS:
            raise InputError(f"bands= is one of {', '.join(BANDS)}, targets= one of {', '.join(TARGETS)}.")
        rows = _layers(self.axes["from"], tower)
        columns = _layers(self.axes["to"], tower)
        count = max([*rows, *columns], default=-1) + 1
        if not count:
            raise InputError(f"No layers of a {tower} tower are in this matrix; it has {', '.join(self.axes['from'])}.")
        size = math.floor(share * count)
        low = list(range(size + (bands == "published")))
        high = list(range(count - size, count))
        if not size or low[-1] >= high[0]:
            raise InputError(
                f"share={share!r} of {count} layers leaves a band empty, or makes both meet; take another."
            )
        into = {
            "all": range(self.values.shape[1]),
            "deep": [columns[layer] for layer in high if layer in columns],
            "output": [number for number, name in enumerate(self.axes["to"]) if name == OUTPUT],
        }[targets]
        sums = [
            float(self.values[[rows[layer] for layer in band if layer in rows]][:, list(into)].sum())
            for band in (high, low)
        ]
        value = (
            math.log(sums[0] / sums[1])
            if all(sums)
            else math.nan
            if sums[0] == sums[1]
            else math.inf
            if sums[0]
            else -math.inf
        )
        return DepthBias(value, low, high, sums[1], sums[0], math.log(len(high) / len(low)))


OUTPUT = "output"


@dataclass(frozen=True)
class DepthBias:
    """A deep-to-shallow bias: ``value``, the layers of both bands, their weights, and what a circuit has whose layers weigh the same (``even``)."""

    value: float
    shallow: list[int]
    deep: list[int]
    shallow_weight: float
    deep_weight: float
    even: float

    def __str__(self) -> str:
        low, high = (f"{band[0]}–{band[-1]}" for band in (self.shallow, self.deep))
        return (
            f"ln(deep / shallow) = {self.value:.3f} (layers {high} against {low}; an even circuit has {self.even:.3f})"
        )


@dataclass(frozen=True)
class CircuitAgreement:
    """How far two circuits agree, see the module: 1 is the same for ``spearman``, ``cosine``, ``weighted_jaccard`` and ``jaccard``, 0 for the two
    distances. ``chance`` is the Jaccard index that two random sets of these sizes have in the mean (of expectations)."""

    spearman: float
    cosine: float
    distance: float
    weighted_jaccard: float
    spectra: float
    jaccard: float
    chance: float


@with_provenance
def layer_matrix(circuit: Scored, *, inputs: bool = True) -> LayerMatrix:
    """The weight of a circuit's edges (of all edges of an attribution) from layer to layer.

    ``inputs=False`` leaves out the edges out of what enters the towers, as the authors' code does.

    Raises:
        InputError: neither a circuit nor an attribution.
    """
    of, weights = _weights(circuit)
    mask = circuit.mask if isinstance(circuit, Circuit) else of.edges
    begin = [_place(name) for name in of.axes["sender"]]
    end = [_place(split_slot(label)[0]) for label in of.axes["slot"]]
    if not inputs:
        mask = mask & torch.tensor([not name.endswith(" in") for name in begin])[:, None]
    order = list(dict.fromkeys([*begin, *end]))
    rows, columns = [name for name in order if name in begin], [name for name in order if name in end]
    into = torch.tensor([[name == row for name in begin] for row in rows]).double()
    out = torch.tensor([[name == column for name in end] for column in columns]).double()
    return LayerMatrix(
        values=into @ (weights * mask) @ out.T,
        axes={"from": rows, "to": columns},
        provenance={key: value for key, value in of.provenance.items() if key != "call"},
        edges=(into @ mask.double() @ out.T).long(),
    )


def compare_circuits(first: Scored, second: Scored) -> CircuitAgreement:
    """How far two circuits, or two scorings, of one graph agree; ``(circuit_a, circuit_b)`` of different data, models of one shape, or methods.

    Raises:
        InputError: graphs with other senders or slots.
    """
    (of, one), (other_of, other) = _weights(first), _weights(second)
    if (of.axes["sender"], of.axes["slot"]) != (other_of.axes["sender"], other_of.axes["slot"]):
        raise InputError("The two circuits are of different graphs: their senders and slots differ.")
    every = of.edges | other_of.edges
    masks = [one_.mask if isinstance(one_, Circuit) else one_.edges for one_ in (first, second)]
    a, b = one[every], other[every]
    top, sizes = torch.maximum(a, b).sum(), [int(mask.sum()) for mask in masks]
    both, either = int((masks[0] & masks[1]).sum()), int((masks[0] | masks[1]).sum())
    expected = sizes[0] * sizes[1] / max(int(every.sum()), 1)
    return CircuitAgreement(
        spearman=_spearman(a, b),
        cosine=float(a @ b / (a.norm() * b.norm())),
        distance=float((a - b).norm()),
        weighted_jaccard=float(torch.minimum(a, b).sum() / top),
        spectra=float((_spectrum(of, one) - _spectrum(of, other)).norm()),
        jaccard=both / either if either else math.nan,
        chance=expected / (sum(sizes) - expected) if sum(sizes) else math.nan,
    )


def _weights(circuit: Scored) -> tuple[EdgeAttribution, Float[Tensor, "sender slot"]]:
    """The attribution of a circuit, and ``|mean score|`` of its edges, 0 elsewhere."""
    if not isinstance(circuit, Circuit | EdgeAttribution):
        raise InputError(f"A {type(circuit).__name__} is no circuit and no attribution of edges.")
    of = circuit.attribution if isinstance(circuit, Circuit) else circuit
    weights = of.scores.double().nan_to_num(0.0).abs()
    # Rounding has ranks, and normalised it has a spectrum.
    weights = weights.masked_fill(weights <= ROUNDING * weights.max(), 0.0)
    return of, weights * circuit.mask if isinstance(circuit, Circuit) else weights


def _spearman(first: Float[Tensor, " edge"], second: Float[Tensor, " edge"]) -> float:
    """The rank correlation; NaN where one has no differences."""
    from scipy.stats import rankdata

    a, b = (torch.from_numpy(rankdata(one.numpy())) for one in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else math.nan


def _spectrum(of: EdgeAttribution, weights: Float[Tensor, "sender slot"]) -> Float[Tensor, " node"]:
    """The eigenvalues of the normalised Laplacian of the undirected graph of nodes, from the smallest."""
    ends = [split_slot(label)[0] for label in of.axes["slot"]]
    numbers = {name: number for number, name in enumerate(dict.fromkeys([*of.axes["sender"], *ends]))}
    rows = torch.tensor([numbers[name] for name in of.axes["sender"]])
    columns = torch.tensor([numbers[name] for name in ends])
    half = torch.zeros(len(numbers), len(numbers), dtype=torch.float64)
    half.index_put_((rows[:, None].expand_as(weights), columns[None].expand_as(weights)), weights, accumulate=True)
    whole = half + half.T
    scale = whole.sum(1).clamp(min=1e-300).rsqrt() * (whole.sum(1) > 0)
    # A node without edges has the eigenvalue 0.
    laplacian = torch.diag((whole.sum(1) > 0).double()) - scale[:, None] * whole * scale[None]
    return torch.linalg.eigvalsh(laplacian)


def _place(name: str) -> str:
    """The place of a node in the layer matrix: ``"vision 3"``, ``"vision in"``, ``"projector"``, ``"output"``."""
    try:
        node = parse_id(name)
    except InputError:
        return name
    if node.kind == "logits":
        return OUTPUT
    if node.kind == "connector":
        return node.label
    return f"{node.tower} in" if node.layer < 0 else f"{node.tower} {node.layer}"


def _layers(names: list[str], tower: str) -> dict[int, int]:
    """Where each layer of a tower stands."""
    if tower not in TOWER_LETTERS:
        raise InputError(f"There is no {tower!r} tower; towers are {', '.join(TOWER_LETTERS)}.")
    found = {}
    for number, name in enumerate(names):
        own, _, layer = name.rpartition(" ")
        if own == tower and layer.isdigit():
            found[int(layer)] = number
    return found
