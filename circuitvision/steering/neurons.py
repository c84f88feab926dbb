"""Sets of neurons that are steered together, and the random sets that they are held against.

A neuron ``(layer, i)`` of a tower writes ``m_i(x) w_i`` to the stream: ``m_i`` is entry ``i`` of ``mlp.hook_post``, ``w_i`` row ``i`` of ``W_out``,
its value vector. :func:`promoting_neurons` takes those whose value vectors raise chosen outputs most, ``w_i @ W_U`` (no final norm, as published).
Of a flow-matching action tower outputs are the dimensions of the *velocity*, which is noise minus action: what promotes ``−velocity`` moves the
action up.

:meth:`NeuronSet.edits` makes the edits: ``overwrite`` (``m_i := α``, as published), ``add`` (``m_i + α``) or ``scale`` (``α · m_i``), at every
position and step unless some are named. :func:`random_neurons` draws control sets of the same size in every layer.

Reference: Haon et al. 2025 (arXiv 2509.00328), whose flat index ``layer · d_mlp + neuron`` is :meth:`NeuronSet.from_flat`.

Not covered: experts of mixture layers; neurons of several towers in one set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError, checked_seed
from circuitvision.readout.recorded import chosen_layers
from circuitvision.readout.weights.rows import written_rows
from circuitvision.readout.weights.unembedding import Unembedding, model_of
from circuitvision.readout.weights.value_vectors import value_vectors

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower

METHODS = ("overwrite", "add", "scale")


@dataclass(frozen=True)
class NeuronSet:
    """Neurons of one tower as ``(layer, neuron)``, in the order given.

    Raises:
        InputError: none, or one twice.
    """

    tower: str
    places: tuple[tuple[int, int], ...]
    d_mlp: int
    name: str = ""

    def __post_init__(self) -> None:
        places = tuple((int(layer), int(neuron)) for layer, neuron in self.places)
        if not places or len(set(places)) < len(places):
            raise InputError("A set of neurons holds at least one (layer, neuron), and each of them once.")
        wrong = [place for place in places if place[0] < 0 or not 0 <= place[1] < self.d_mlp]
        if wrong:
            raise InputError(f"{wrong[0]} is no neuron of the {self.tower} tower, whose layers have {self.d_mlp}.")
        object.__setattr__(self, "places", places)

    @classmethod
    def of(cls, tower: Tower, places: Iterable[tuple[int, int]], name: str = "") -> NeuronSet:
        """Neurons ``(layer, neuron)`` of a tower. Raises InputError for a layer that the tower does not have."""
        found = cls(tower.name, tuple(places), tower.cfg.d_mlp, name)
        chosen_layers([layer for layer, _ in found.places], tower.cfg.n_layers)
        return found

    @classmethod
    def from_flat(cls, tower: Tower, flat: Iterable[int], name: str = "") -> NeuronSet:
        """Neurons by the flat index ``layer · d_mlp + neuron``, as clusters are released."""
        return cls.of(tower, [divmod(int(number), tower.cfg.d_mlp) for number in flat], name)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.places)

    def __str__(self) -> str:
        return self.name or ", ".join(f"{self.tower} L{layer}N{neuron}" for layer, neuron in self.places)

    @property
    def flat(self) -> list[int]:
        """The flat indices ``layer · d_mlp + neuron``."""
        return [layer * self.d_mlp + neuron for layer, neuron in self.places]

    @property
    def layers(self) -> dict[int, list[int]]:
        """The neurons of every layer, layers rising."""
        return {
            layer: [neuron for own, neuron in self.places if own == layer]
            for layer in sorted({own for own, _ in self.places})
        }

    @property
    def sites(self) -> dict[int, str]:
        """The site of every layer's neurons."""
        return {layer: f"{self.tower}.blocks.{layer}.mlp.hook_post" for layer in self.layers}

    def edits(
        self,
        value: float | Sequence[float] | Float[Tensor, " neuron"],
        method: str = "overwrite",
        *,
        positions: Any = None,
        steps: Any = None,
    ) -> list[edits.Edit]:
        """One edit per layer that gives these neurons a value: ``overwrite`` sets it, ``add`` adds it, ``scale`` multiplies by it.

        Args:
            value: one number, or one per neuron in the order of the set.
            method: see above.
            positions, steps: as of every edit; None is every position, generated ones too, and every pass.

        Raises:
            InputError: another method, or another number of values than neurons.
        """
        if method not in METHODS:
            raise InputError(f"method={method!r} is not understood: {', '.join(map(repr, METHODS))}.")
        given = torch.as_tensor(value).detach().double().cpu()
        if given.ndim and given.shape != (len(self),):
            raise InputError(
                f"Give one value, or one for each of the {len(self)} neurons, not the shape {tuple(given.shape)}."
            )
        values = given.expand(len(self))
        found, where = [], {"positions": positions, "steps": steps}
        for layer, neurons in self.layers.items():
            own = values[[number for number, (at, _) in enumerate(self.places) if at == layer]].float()
            site = self.sites[layer]
            if method == "overwrite":
                found.append(edits.overwrite(site, neurons, own, **where))
                continue
            vector = torch.full((self.d_mlp,), 1.0 if method == "scale" else 0.0)
            vector[neurons] = own
            made = edits.scale(site, vector, **where) if method == "scale" else edits.steer(site, vector, **where)
            found.append(made)
        return found


def live_layers(tower: Tower, layers: int | Sequence[int] | None = None) -> list[int]:
    """Layers whose neurons can reach the output; with ``layers`` those of them.

    Raises:
        InputError: none of them can.
    """
    model = model_of(tower)
    chosen = chosen_layers(layers, tower.cfg.n_layers)
    live = [layer for layer in chosen if not model.is_dead(f"{tower.name}.blocks.{layer}.mlp.hook_post")]
    if not live:
        raise InputError(f"No neuron of layers {chosen} of the {tower.name} tower can reach the output.")
    return live


def promoting_neurons(
    tower: Tower,
    targets: Sequence[int | str],
    count: int = 10,
    *,
    against: Sequence[int | str] = (),
    largest: bool = True,
    layers: int | Sequence[int] | None = None,
    gain: bool = False,
    measure: str = "logit",
    matrix: Float[Tensor, "d_model n_out"] | Unembedding | None = None,
    name: str = "",
) -> NeuronSet:
    """The ``count`` neurons whose value vectors raise the mean of ``targets`` most, best first: ``mean_t (w_i @ W_U)_t``.

    Layers that cannot reach the output (the last MLP of PI0's prefix) are left out.

    Args:
        tower: whose neurons.
        targets: outputs by id or name: words, action bins (``"action 0.5"``), dimensions of a velocity.
        count: how many, over all layers together.
        against: outputs whose mean is subtracted.
        largest: False takes those that lower it most.
        layers, gain, measure, matrix: as of :func:`~circuitvision.readout.value_vectors`.
        name: what the set is called; its targets if left out.

    Raises:
        InputError: an output that is not there, or more neurons than there are.
    """
    if isinstance(targets, str | int) or not len(targets):
        raise InputError(f"targets is a list of outputs, one at least, such as [{targets!r}], not {targets!r}.")
    live = live_layers(tower, layers)
    asked = [*targets, *against]
    columns = list(dict.fromkeys(asked))
    found = value_vectors(tower, layers=live, gain=gain, measure=measure, matrix=matrix, targets=columns)
    own = found.values[..., [columns.index(one) for one in targets]].double().mean(-1)
    if len(against):
        own = own - found.values[..., [columns.index(one) for one in against]].double().mean(-1)
    scores = own.flatten().nan_to_num(-torch.inf if largest else torch.inf)
    if not 1 <= count <= len(scores):
        raise InputError(f"count={count} is outside the {len(scores)} neurons of layers {live}.")
    order = scores.argsort(descending=largest, stable=True)[:count].tolist()
    places = [(live[number // tower.cfg.d_mlp], number % tower.cfg.d_mlp) for number in order]
    words = ", ".join(found.label(int(column)) for column in found.ids.tolist()[: len(targets)])
    return NeuronSet.of(tower, places, name or f"{'promote' if largest else 'lower'} {words}")


def random_neurons(
    tower: Tower, like: NeuronSet, count: int = 20, *, seed: int = 0, match: str = "layer", pool: int = 16
) -> list[NeuronSet]:
    """``count`` random sets with as many neurons of every layer as ``like`` has, none of which is in it.

    Args:
        tower: that of ``like``.
        like: the set that they are a control of.
        count: how many sets.
        seed: of the draws.
        match: ``"layer"`` draws any neurons of the layer; ``"norm"`` for each neuron of ``like`` one of the ``pool`` whose value vectors are
            nearest in length, which longer vectors alone cannot beat.
        pool: see ``match``.

    Raises:
        InputError: a layer with fewer other neurons than are asked for, another tower, an unknown ``match``.
    """
    if match not in ("layer", "norm"):
        raise InputError(f"match={match!r} is not understood: 'layer' or 'norm'.")
    if tower.name != like.tower or tower.cfg.d_mlp != like.d_mlp:
        raise InputError(f"The set is of the {like.tower} tower, with {like.d_mlp} neurons a layer; give that tower.")
    short = [layer for layer, neurons in like.layers.items() if 2 * len(neurons) > like.d_mlp]
    if short:
        raise InputError(f"Layer {short[0]} has no {len(like.layers[short[0]])} other neurons to draw as a control.")
    generator = np.random.default_rng(checked_seed(seed))
    norms = {layer: written_rows(tower, layer).norm(dim=-1).double().cpu().numpy() for layer in like.layers}
    found = []
    for number in range(count):
        places: list[tuple[int, int]] = []
        for layer, neurons in like.layers.items():
            places += [(layer, one) for one in _drawn(generator, norms[layer], neurons, match, pool)]
        found.append(NeuronSet.of(tower, places, f"random {number}"))
    return found


def _drawn(generator: np.random.Generator, norms: np.ndarray, neurons: list[int], match: str, pool: int) -> list[int]:
    """As many neurons of one layer, none of those given and none twice."""
    free = [one for one in range(len(norms)) if one not in set(neurons)]
    if match == "layer":
        return generator.choice(free, len(neurons), replace=False).tolist()
    chosen: list[int] = []
    for neuron in generator.permutation(neurons):
        left = np.array([one for one in free if one not in chosen])
        near = left[np.abs(norms[left] - norms[neuron]).argsort(kind="stable")[:pool]]
        chosen.append(int(generator.choice(near)))
    return chosen
