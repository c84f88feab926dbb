"""What is known about a hand-built network: its circuit, and the exact effect of every edge of it.

Effects have the sign "patched minus clean": in the clean run one edge carries what it carries in the corrupt run, everything behind it runs freely,
and the metric changes by so much, in the mean over the pairs. An edge may be part of the circuit and have the effect 0 by itself: a branch of an OR,
whose other branch still carries the answer. Edges that are not listed have the effect 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError

if TYPE_CHECKING:
    from circuitvision.data import Pairs
    from circuitvision.hooked import HookedModel


@dataclass(frozen=True, eq=False)
class HandBuilt:
    """A network whose circuit is known.

    Attributes:
        name: its name in the table.
        model: the network, a transformers model under a hooked model, in float64.
        pairs: inputs of both runs, with answers.
        metric: the logit of class (or token) 1 minus that of 0.
        effects: exact single-edge effects of the edges of the circuit by id (``"v.input->v.a0.h0<k>"``), patched minus clean.
        clean, corrupt: the metric in both runs, in the mean over the pairs.
        noise: the standard deviation of what was added to the weights; effects are those of the network without it.
        seed: of the noise.
    """

    name: str
    model: HookedModel
    pairs: Pairs
    metric: Any
    effects: Mapping[str, float]
    clean: float
    corrupt: float
    noise: float = 0.0
    seed: int = 0

    @property
    def edges(self) -> frozenset[str]:
        """The ids of the edges of the circuit."""
        return frozenset(self.effects)

    def auroc(self, scores: Mapping[str, float]) -> float:
        """How well the size of scores tells the circuit's edges from the others: the area under the ROC curve of ``|score|``, ties counted half.

        Args:
            scores: a score for every edge of the model, by id.

        Raises:
            InputError: an edge of the circuit has no score, or every edge is one of the circuit.
        """
        from circuitvision.statistics import auroc  # loads torch: listing networks must not

        missing = sorted(self.edges - set(scores))
        if missing:
            raise InputError(f"Edges of the circuit have no score: {', '.join(missing[:3])}; give one for every edge.")
        return auroc([abs(score) for score in scores.values()], [edge in self.edges for edge in scores])
