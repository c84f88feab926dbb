"""Keys and values of a run: are the memories that a token activates those of its class, and does the layer say what they say?

A neuron's *key* is how active it is at a token (``mlp.hook_post``; for heads the channels of ``z``, all heads together), its *value vector*
says which class it speaks for (:mod:`circuitvision.readout.weights.value_vectors`). "Most active" means the largest values, not the largest
absolute values.

*Key-value agreement* (:func:`key_value_agreement`): does a token's ``n_keys`` most active keys include one of the ``n_values`` value vectors
with the largest logit for the true class? Chance is the same for the other classes, averaged over all of them, so nothing is drawn.

*Compositionality* (:func:`compositionality`): the share of the ``n_keys`` most active value vectors whose own top class is the top class of
the whole layer's output at that token. Low means that the layer's answer is composed of vectors that each say something else. Chance is the
share of *all* value vectors of the layer with that top class. Both sides are read by the same linear map, without the biases of layer, norm
and head.

Reference: Vilas et al. 2023 (arXiv 2310.18969), who pass branches through the whole final norm; here its gain takes part only if the
unembedding given holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.model.cache import ActivationCache
from circuitvision.model.tokens import ABSENT, TokenMap
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.places import places_of
from circuitvision.readout.recorded import chosen_layers, recorded, tokens_of
from circuitvision.readout.weights.rows import at_once, projections, written_rows
from circuitvision.readout.weights.unembedding import Unembedding, model_of, unembedding_matrix
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.model.tower import Tower

_SITES = {"mlp": ("mlp.hook_post", "hook_mlp_out"), "ov": ("attn.hook_z", "hook_attn_out")}


@dataclass(frozen=True, eq=False)
class TokenAgreement(Result):
    """A rate per token and layer beside its chance level: ``values`` and ``chance`` ``[layer position example]``, NaN at padding.

    ``kinds`` names every position of every row (``"cls"``, ``"patch"``, …), ``places`` ``[example position 4]`` is its image, tile, patch row and
    column.
    """

    chance: Tensor = field(default_factory=lambda: torch.zeros(0))
    kinds: list[list[str]] = field(default_factory=list)
    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    tower: str = ""
    of: str = "mlp"
    measure: str = ""

    _per_example: ClassVar[dict[str, int]] = {"chance": -1, "kinds": 0, "places": 0}

    def summary(self) -> pd.DataFrame:
        """One row per layer and kind of position: rate, chance, how many tokens."""
        import pandas as pd

        records = []
        for kind in dict.fromkeys(name for row in self.kinds for name in row if name not in ABSENT):
            here = torch.tensor([[name == kind for name in row] for row in self.kinds]).T
            for number, layer in enumerate(self.axes["layer"]):
                rate, chance = (float(part[number][here].mean()) for part in (self.values, self.chance))
                records.append(
                    {"layer": layer, "kind": kind, "rate": rate, "chance": chance, "tokens": int(here.sum())}
                )
        return pd.DataFrame(records).sort_values("layer", kind="stable", ignore_index=True)


@with_provenance
def key_value_agreement(
    cache: ActivationCache | Mapping[str, Any],
    tower: Tower,
    labels: Sequence[int | str] | Tensor,
    *,
    of: str = "mlp",
    layers: int | Sequence[int] | None = None,
    targets: Sequence[int | str] | None = None,
    unembedding: Unembedding | None = None,
    n_keys: int = 5,
    n_values: int = 5,
    step: int | None = None,
) -> TokenAgreement:
    """Whether a token's most active keys belong to value vectors of its true class: 1 or 0 per token and layer, with chance (see the module).

    Args:
        cache: a cache that holds ``mlp.hook_post`` (heads: ``attn.hook_z``) of the layers, or the inputs of a run.
        tower: the tower that is read.
        labels: the true class of every example, ids or names.
        of: neurons of the ``"mlp"``, or channels of the heads, ``"ov"``.
        layers: only these layers.
        targets: the classes among which chance is taken; the labels must be among them. All outputs by default.
        unembedding: the class directions; None takes the tower's head without the final norm's gain.
        n_keys: how many active keys a token has.
        n_values: how many value vectors a class has.
        step: which pass, in a cache that recorded several: one that reads all positions, such as the first of ``generate``.

    Raises:
        InputError: labels that do not fit the examples, sites that the cache lacks, counts below 1, a pass of other positions.
    """
    if n_values < 1:
        raise InputError(f"n_values={n_values} must be at least 1.")
    run = _run(cache, tower, of, step)
    numbers, weight, columns, outputs = _prepare(run, layers, targets, unembedding, n_keys)
    true = _true_classes(labels, run.tokens, outputs, columns)
    values, chance = [], []
    for layer in track(numbers, "key-value agreement"):
        active = _active(run.keys(layer), n_keys)
        mine, all_hits = torch.zeros(active.shape[:2]), torch.zeros(active.shape[:2])
        for first, hits in _hits(active, written_rows(tower, layer, of), weight, n_values):
            all_hits += hits.sum(-1)
            here = (true >= first) & (true < first + hits.shape[-1])
            mine[here] = hits[here, :, true[here] - first].float()
        values.append(mine)
        chance.append((all_hits - mine) / (len(columns) - 1) if len(columns) > 1 else mine * torch.nan)
    if len(columns) == 1:
        warn("With a single class there is no chance level; it is NaN.")
    method = f"key_value_agreement(of={of}, gain={outputs.gain}, n_keys={n_keys}, n_values={n_values})"
    return _result(run, numbers, values, chance, method)


@with_provenance
def compositionality(
    cache: ActivationCache | Mapping[str, Any],
    tower: Tower,
    *,
    of: str = "mlp",
    layers: int | Sequence[int] | None = None,
    targets: Sequence[int | str] | None = None,
    unembedding: Unembedding | None = None,
    n_keys: int = 5,
    step: int | None = None,
) -> TokenAgreement:
    """The share of a token's most active value vectors whose own top class is that of the layer's output there, with chance (see the module).

    Args:
        cache: a cache that holds ``mlp.hook_post`` and ``hook_mlp_out`` (heads: ``attn.hook_z`` and ``hook_attn_out``) of the layers, or the
            inputs of a run.
        tower, of, layers, targets, unembedding, n_keys, step: as in :func:`key_value_agreement`.

    Raises:
        InputError: sites that the cache lacks, ``n_keys`` below 1, a pass of other positions.
    """
    run = _run(cache, tower, of, step)
    numbers, weight, columns, outputs = _prepare(run, layers, targets, unembedding, n_keys)
    values, chance = [], []
    for layer in track(numbers, "compositionality"):
        own = _best(written_rows(tower, layer, of), weight)
        written = run.site(layer, _SITES[of][1])
        answer = _best(written.flatten(0, 1), weight).view(written.shape[:2])
        active = _active(run.keys(layer), n_keys).float()
        same = own == answer[..., None]
        values.append((active * same).sum(-1) / active.sum(-1))
        chance.append((torch.bincount(own, minlength=len(columns)).float() / len(own))[answer])
    method = f"compositionality(of={of}, gain={outputs.gain}, n_keys={n_keys})"
    return _result(run, numbers, values, chance, method)


@dataclass(frozen=True)
class _Run:
    """One pass of a cache, as the two scores read it."""

    cache: ActivationCache
    tower: Tower
    of: str
    tokens: TokenMap
    step: int | None

    def site(self, layer: int, name: str) -> Float[Tensor, "row pos ..."]:
        """A site of a layer; InputError where its positions are not those of the token map."""
        value = recorded(self.cache, f"{self.tower.name}.blocks.{layer}.{name}", self.step).detach()
        wanted = (self.tokens.n_rows, self.tokens.n_positions)
        if tuple(value.shape[:2]) != wanted:
            raise InputError(
                f"This pass has {value.shape[0]} rows of {value.shape[1]} positions, the token map of the {self.tower.name} "
                f"tower {wanted[0]} of {wanted[1]}; choose the pass that reads the prompt (step=0)."
            )
        return value

    def keys(self, layer: int) -> Float[Tensor, "row pos key"]:
        """How active every neuron, or channel of a head, is."""
        value = self.site(layer, _SITES[self.of][0])
        return (value if self.of == "mlp" else value.flatten(-2)).cpu()


def _run(cache: ActivationCache | Mapping[str, Any], tower: Tower, of: str, step: int | None) -> _Run:
    """The pass of a cache, or a run of the inputs; InputError for a cache of another model, or of unknown inputs."""
    model = model_of(tower)
    if of not in _SITES:
        raise InputError(f"of={of!r} must be 'mlp' or 'ov'.")
    if not isinstance(cache, Mapping):
        raise InputError(f"Give a cache of a run, or the inputs of one, not a {type(cache).__name__}.")
    if not isinstance(cache, ActivationCache):
        with torch.no_grad():
            cache = model.run_with_cache(cache, [f"{tower.name}.blocks.*.{site}" for site in _SITES[of]])[1]
    if cache.model is not None and cache.model.module is not model.module:
        raise InputError("The cache is of another model than the tower; give the tower of the model that was run.")
    return _Run(cache, tower, of, tokens_of(cache, tower.name), step)


def _prepare(
    run: _Run,
    layers: int | Sequence[int] | None,
    targets: Sequence[int | str] | None,
    unembedding: Unembedding | None,
    n_keys: int,
) -> tuple[list[int], Tensor, list[int], Unembedding]:
    """Layers, class directions and their columns, after everything that can be wrong was checked."""
    if n_keys < 1:
        raise InputError(f"n_keys={n_keys} must be at least 1.")
    outputs = unembedding or unembedding_matrix(run.tower, gain=False)
    # All columns are taken as they are: the matrix of a large vocabulary must not be copied.
    columns = list(range(outputs.matrix.shape[1])) if targets is None else outputs.find(targets)
    weight = outputs.matrix if targets is None else outputs.matrix[:, columns]
    return chosen_layers(layers, run.tower.cfg.n_layers), weight, columns, outputs


def _hits(
    active: Bool[Tensor, "row pos key"], rows: Float[Tensor, "key d_model"], weight: Tensor, n_values: int
) -> Iterator[tuple[int, Bool[Tensor, "row pos column"]]]:
    """Whether an active key is among the value vectors that speak most for a class: a few classes at a time, with the number of the first."""
    n_values = min(n_values, len(rows))
    width = at_once(max(len(rows), active.shape[0] * active.shape[1] * n_values))
    for first in range(0, weight.shape[1], width):
        some = weight[:, first : first + width]
        logits = torch.cat(list(projections(rows, some)))
        speakers = logits.topk(n_values, dim=0).indices.cpu()
        yield first, torch.stack([active[..., speaker] for speaker in speakers]).any(0)


def _best(rows: Float[Tensor, "row d_model"], weight: Float[Tensor, "d_model n_out"]) -> Tensor:
    """The highest column of every row."""
    return torch.cat([logits.argmax(-1) for logits in projections(rows, weight)]).cpu()


def _true_classes(
    labels: Sequence[int | str] | Tensor, tokens: TokenMap, outputs: Unembedding, columns: list[int]
) -> Tensor:
    """For every row, the number of its class among ``columns``."""
    wanted = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    n_examples = tokens.n_examples
    if len(wanted) != n_examples:
        raise InputError(f"There are {len(wanted)} labels for {n_examples} examples; give one each.")
    found = outputs.find(wanted)
    absent = [column for column in found if column not in columns]
    if absent:
        raise InputError(f"The label {outputs.label(absent[0])!r} is not among the targets; add it.")
    return torch.tensor([columns.index(column) for column in found])[torch.from_numpy(tokens.example)]


def _active(keys: Float[Tensor, "row pos key"], count: int) -> Bool[Tensor, "row pos key"]:
    order = keys.topk(min(count, keys.shape[-1]), dim=-1).indices
    return torch.zeros_like(keys, dtype=torch.bool).scatter(-1, order, True)


def _result(run: _Run, numbers: list[int], values: list[Tensor], chance: list[Tensor], method: str) -> TokenAgreement:
    padding = torch.from_numpy(~run.tokens.present)
    rates, levels = (torch.stack(kind).masked_fill(padding, torch.nan) for kind in (values, chance))
    axes = {"layer": numbers, "position": list(range(rates.shape[2])), "example": run.tokens.example.tolist()}
    return TokenAgreement(
        values=rates.transpose(1, 2),
        axes=axes,
        provenance=describe(run.cache.model, method=f"{method} of {run.tower.name}", inputs=(run.cache.inputs,)),
        chance=levels.transpose(1, 2),
        kinds=run.tokens.kind.tolist(),
        places=places_of(run.tokens),
        tower=run.tower.name,
        of=run.of,
        measure=method.split("(")[0],
    )
