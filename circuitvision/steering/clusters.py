"""Clusters of value vectors: neurons that promote the same outputs, found by k-means.

Every value vector ``w_i`` (row of ``W_out`` as it reaches the stream) becomes a unit vector that says what it promotes, and scikit-learn's k-means
groups these. ``on="tokens"`` takes the mean of the unit columns of ``W_U`` of its ``top_k`` outputs (the embedding of its top tokens);
``on="outputs"`` its projection ``w_i @ W_U``, for heads of few outputs; ``on="vectors"`` ``w_i`` itself. The published clusters were picked by hand
out of the same lists of top tokens; ``.search(words)`` and :meth:`ValueVectorClusters.neurons` are that step.

k-means groups anything. The cohesion of a cluster, the mean cosine between two of its members, is therefore held against clusters that the same
procedure finds among random value vectors of the same lengths (Gaussian directions).

Reference: Haon et al. 2025 (arXiv 2509.00328); Geva et al. 2022 (arXiv 2203.14680) on value vectors.

Not covered: a number of clusters chosen from the data; hierarchical clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.errors import InputError, checked_seed
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.weights.rows import projections, written_rows
from circuitvision.readout.weights.unembedding import Unembedding, model_of
from circuitvision.readout.weights.value_vectors import outputs_of
from circuitvision.results import Result
from circuitvision.steering.neurons import NeuronSet, live_layers

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.model.tower import Tower

_FEATURES = ("tokens", "outputs", "vectors")


@dataclass(frozen=True, eq=False)
class ValueVectorClusters(Result):
    """The cluster of every neuron, ``values`` ``[layer neuron]``, numbered from 0, the most cohesive first.

    ``words`` are the outputs that the mean value vector of each cluster promotes most, best first, ``sizes`` how many neurons it has, ``cohesion``
    ``[cluster]`` the mean cosine between two members (NaN of one alone), ``random_cohesion`` ``[draw cluster]`` the same of clusters found among
    random value vectors.
    """

    words: list[list[str]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    cohesion: Tensor = field(default_factory=lambda: torch.zeros(0))
    random_cohesion: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    tower: str = ""
    on: str = "tokens"
    top_k: int = 10

    def neurons(self, cluster: int) -> NeuronSet:
        """The neurons of a cluster. Raises InputError for one that is not there."""
        if isinstance(cluster, bool) or not 0 <= int(cluster) < len(self.sizes):
            raise InputError(f"There is no cluster {cluster!r}; there are {len(self.sizes)}, counted from 0.")
        layers = self.axes["layer"]
        places = [(layers[row], neuron) for row, neuron in (self.values == cluster).nonzero().tolist()]
        name = f"cluster {cluster} ({', '.join(self.words[cluster][:3])})"
        return NeuronSet(self.tower, tuple(places), self.values.shape[1], name)

    def search(self, words: Sequence[str]) -> list[int]:
        """The clusters among whose words are any of these, those with most of them first, then by the rank of the first."""
        wanted = {word.lstrip("▁Ġ ") for word in words}
        ranks = {
            number: [at for at, word in enumerate(own) if word.lstrip("▁Ġ ") in wanted]
            for number, own in enumerate(self.words)
        }
        held = [number for number, found in ranks.items() if found]
        return sorted(held, key=lambda number: (-len(ranks[number]), ranks[number][0]))

    @property
    def cohesive(self) -> Bool[Tensor, " cluster"]:
        """Which clusters are more cohesive than every cluster found among random value vectors."""
        if not self.random_cohesion.numel():
            return torch.zeros(len(self.sizes), dtype=torch.bool)
        return self.cohesion > self.random_cohesion.nan_to_num(-torch.inf).max()

    def table(self) -> pd.DataFrame:
        """One row per cluster: size, cohesion, whether it beats random vectors, words."""
        import pandas as pd

        return pd.DataFrame(
            {
                "cluster": range(len(self.sizes)),
                "neurons": self.sizes,
                "cohesion": self.cohesion.tolist(),
                "beats random": self.cohesive.tolist(),
                "words": [" ".join(own) for own in self.words],
            }
        )

    def highlights(self) -> dict[str, str]:
        """The first clusters and their words."""
        return {f"cluster {number}": " ".join(own[:5]) for number, own in enumerate(self.words[:5])}


@with_provenance
def value_vector_clusters(
    tower: Tower,
    n_clusters: int,
    *,
    top_k: int = 10,
    on: str = "tokens",
    layers: int | Sequence[int] | None = None,
    gain: bool = False,
    matrix: Float[Tensor, "d_model n_out"] | Unembedding | None = None,
    draws: int = 5,
    seed: int = 0,
) -> ValueVectorClusters:
    """Group the value vectors of a tower by what they promote, see the module; layers that cannot reach the output are left out.

    Args:
        tower: whose MLPs.
        n_clusters: how many clusters.
        top_k: how many outputs say what a vector promotes (and are kept as words of a cluster).
        on: ``"tokens"``, ``"outputs"`` or ``"vectors"``.
        layers, gain, matrix: as of :func:`~circuitvision.readout.value_vectors`.
        draws: how many sets of random value vectors the clusters are held against.
        seed: of k-means and of the random vectors.

    Raises:
        InputError: another ``on``, fewer vectors than clusters, no linear read-out.
    """
    if on not in _FEATURES:
        raise InputError(f"on={on!r} is not understood: {', '.join(map(repr, _FEATURES))}.")
    live = live_layers(tower, layers)
    outputs = outputs_of(tower, gain, None, matrix, None)
    rows = torch.cat([written_rows(tower, layer) for layer in live]).to(outputs.matrix)
    if not 2 <= n_clusters <= len(rows):
        raise InputError(f"n_clusters={n_clusters} is outside 2 … {len(rows)}, the value vectors there are.")
    number, cohesion = _ordered(*_clusters(_features(rows, outputs.matrix, on, top_k), n_clusters, checked_seed(seed)))
    generator = torch.Generator().manual_seed(checked_seed(seed))
    random = []
    for draw in track(range(draws), "clusters of random vectors"):
        noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
        noise = noise * (rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        random.append(_ordered(*_clusters(_features(noise, outputs.matrix, on, top_k), n_clusters, seed + draw + 1))[1])
    means = torch.stack([rows[number == one].mean(0) for one in range(n_clusters)])
    best = (means @ outputs.matrix).topk(min(top_k, outputs.matrix.shape[1]), dim=-1).indices.tolist()
    return ValueVectorClusters(
        values=number.view(len(live), tower.cfg.d_mlp),
        axes={"layer": live, "neuron": list(range(tower.cfg.d_mlp))},
        provenance=describe(model_of(tower), method=f"value_vector_clusters(tower={tower.name}, on={on})", seed=seed),
        words=[[outputs.label(column) for column in own] for own in best],
        sizes=[int((number == one).sum()) for one in range(n_clusters)],
        cohesion=cohesion,
        random_cohesion=torch.stack(random) if random else torch.zeros(0, n_clusters, dtype=torch.float64),
        tower=tower.name,
        on=on,
        top_k=top_k,
    )


def _features(rows: Tensor, matrix: Tensor, on: str, top_k: int) -> Float[Tensor, "row feature"]:
    """Unit vectors that say what each value vector promotes; zeros stay zeros."""
    if on == "vectors":
        found = rows
    elif on == "outputs":
        found = torch.cat(list(projections(rows, matrix)))
    else:
        columns = torch.nn.functional.normalize(matrix, dim=0).T
        found = torch.cat(
            [
                columns[part.topk(min(top_k, part.shape[1]), dim=-1).indices].mean(1)
                for part in projections(rows, matrix)
            ]
        )
    return torch.nn.functional.normalize(found.double().cpu(), dim=-1)


def _clusters(features: Tensor, count: int, seed: int) -> tuple[Int[Tensor, " row"], Float[Tensor, " cluster"]]:
    """The cluster of every row, and of every cluster the mean cosine between two members: ``(n |mean|² − 1)/(n − 1)``."""
    from sklearn.cluster import KMeans

    number = torch.from_numpy(KMeans(count, n_init=10, random_state=seed % 2**32).fit_predict(features.numpy())).long()
    cohesion = []
    for one in range(count):
        own = features[number == one]
        size = len(own)
        total = own.sum(0).square().sum() - own.square().sum()
        cohesion.append(total / (size * (size - 1)) if size > 1 else torch.tensor(torch.nan, dtype=torch.float64))
    return number, torch.stack(cohesion)


def _ordered(number: Tensor, cohesion: Tensor) -> tuple[Tensor, Tensor]:
    """The same clusters numbered by falling cohesion, those without one last."""
    order = cohesion.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    return order.argsort()[number], cohesion[order]
