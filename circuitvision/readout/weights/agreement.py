"""Do value vectors agree with classes (from weights), and do the value vectors that a run activates agree with its answers?

*Class-value agreement* (:func:`class_value_agreement`): for every class the largest cosine between its direction in the unembedding and a
value vector of the layer. The largest of hundreds of cosines is well above zero by chance, more so in narrow streams, so the same number is
taken for as many isotropic Gaussian rows (a cosine does not see their lengths), and :meth:`ClassValueAgreement.against` compares with another
model, say one of random weights. Both comparisons are one-sided Wilcoxon signed-rank tests over classes. Classes share value vectors and are
not independent: read p as a guide, and with ``n`` classes it cannot fall below ``2**-n``.

*Key-value agreement* (:func:`key_value_agreement`) is of a run. A neuron's *key* is how active it is at a token (``mlp.hook_post``; for heads
the channels of ``z``, all heads together), its *value vector* says which class it promotes (:mod:`circuitvision.readout.weights.value_vectors`).
"Most active" means the largest values, not the largest absolute values.

* With labels: does a token's ``n_keys`` most active keys include one of the ``n_values`` value vectors with the largest logit for the true
  class? Chance is the same for the other classes, averaged over all of them, so nothing is drawn.
* Without (*compositionality*): the share of the ``n_keys`` most active value vectors whose own top class is the top class of the whole layer's
  output at that token. Low means that the layer's answer is composed of vectors that each promote something else. Chance is the share of
  *all* value vectors of the layer with that top class. Both sides are read by the same linear map, without the biases of layer, norm and head.

Not covered: the whole final norm on branches, as in the paper; here its gain takes part only if the unembedding given holds it.

Reference: Vilas et al. 2023 (arXiv 2310.18969).
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
from circuitvision.model.output_head import model_of
from circuitvision.model.tokens import ABSENT, TokenMap
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.patch_coords import places_of
from circuitvision.readout.recorded import chosen_layers, chosen_tower, recorded, tokens_of
from circuitvision.readout.weights.rows import at_once, projections, written_rows
from circuitvision.readout.weights.unembedding import Unembedding, unembedding_matrix
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.hooked import HookedModel
    from circuitvision.model.tower import Tower

_SITES = {"mlp": ("mlp.hook_post", "hook_mlp_out"), "ov": ("attn.hook_z", "hook_attn_out")}


# -- weights -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClassValueAgreement(Result):
    """Class-value agreement: ``values`` ``[layer class]``, the largest cosine of the class with a value vector of the layer.

    ``index`` says which value vector that is (heads: ``head * d_head + channel``), ``random`` ``[draw class]`` is the largest cosine with
    random rows, ``p`` ``[layer]`` the one-sided p of exceeding their mean.
    """

    index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    random: Tensor = field(default_factory=lambda: torch.zeros(0))
    p: Tensor = field(default_factory=lambda: torch.zeros(0))
    tower: str = ""
    component: str = "mlp"

    def summary(self) -> pd.DataFrame:
        """One row per layer: agreement averaged over classes, that of random rows (and the largest mean of a draw), and p."""
        import pandas as pd

        _, middle, most = self.chance()
        random, agreement = {"random": middle, "random_max": most}, self.over_classes().tolist()
        return pd.DataFrame({"layer": self.axes["layer"], "agreement": agreement, **random, "p": self.p.tolist()})

    def over_classes(self) -> Float[Tensor, " layer"]:
        """The mean over classes."""
        return self.values.mean(-1)

    def chance(self) -> tuple[float, float, float]:
        """The mean over classes of random rows: that of the lowest draw, of all, and of the highest draw."""
        means = self.random.mean(-1)
        return float(means.min()), float(means.mean()), float(means.max())

    def against(self, other: ClassValueAgreement) -> Float[Tensor, " layer"]:
        """The one-sided p, per layer, that agreement here exceeds that of another model. Raises InputError for other layers or classes."""
        if self.axes != other.axes:
            raise InputError("The two agreements have different layers or classes; measure both with the same options.")
        return torch.tensor([signed_rank_p(one - two) for one, two in zip(self.values, other.values, strict=True)])


@with_provenance
def class_value_agreement(
    tower: Tower,
    *,
    component: str = "mlp",
    layers: int | Sequence[int] | None = None,
    targets: Sequence[int | str] | None = None,
    unembedding: Unembedding | None = None,
    draws: int = 20,
    seed: int = 0,
) -> ClassValueAgreement:
    """Class-value agreement of every layer, ``max_i cos(w_i, W_U[:, c])`` for every class ``c``, against random rows (see the module).

    Args:
        tower: the tower whose weights are read.
        component: rows of the ``"mlp"``, or of the heads' output projection, ``"ov"``.
        layers: only these layers.
        targets: only these outputs; give some where the output is a vocabulary.
        unembedding: the class directions; None takes the tower's head without the final norm's gain.
        draws: how many sets of random rows; ``seed`` draws them.

    Raises:
        InputError: no such layer, kind of row or output; a tower without a linear read-out; no draws.
    """
    model = model_of(tower)
    if component not in _SITES or draws < 1:
        raise InputError(f"component={component!r} must be 'mlp' or 'ov', and draws={draws} at least 1.")
    numbers = chosen_layers(layers, tower.cfg.n_layers)
    outputs, columns, weight = _directions(tower, unembedding, targets)
    found = [_closest(written_rows(tower, layer, component), weight) for layer in track(numbers, "agreement")]
    values, index = (torch.stack(kind) for kind in zip(*found, strict=True))
    n_rows = tower.cfg.d_mlp if component == "mlp" else tower.cfg.n_heads * tower.cfg.d_head
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(n_rows, len(weight), generator=generator, dtype=weight.dtype) for _ in range(draws))
    random = torch.stack([_closest(drawn, weight)[0] for drawn in track(rows, "random rows", draws)])
    method = f"class_value_agreement(tower={tower.name}, component={component}, gain={outputs.gain}, draws={draws})"
    return ClassValueAgreement(
        values=values,
        axes={"layer": numbers, "class": [outputs.label(column) for column in columns]},
        provenance=describe(model, method=method, seed=seed),
        index=index,
        random=random,
        p=torch.tensor([signed_rank_p(row - random.mean(0)) for row in values]),
        tower=tower.name,
        component=component,
    )


def signed_rank_p(difference: Float[Tensor, " sample"]) -> float:
    """One-sided p of the Wilcoxon signed-rank test that differences are above zero (``scipy.stats.wilcoxon``); zeros and NaN are dropped.

    NaN, with a warning, where no difference is left.
    """
    from scipy.stats import wilcoxon

    left = difference[difference.isfinite() & (difference != 0)].double().cpu()
    if not len(left):
        warn("No two values differ, so a signed-rank test says nothing; p is NaN.")
        return float("nan")
    return float(wilcoxon(left.numpy(), alternative="greater").pvalue)


def _closest(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of every column with a row, and which row; NaN for a column without a direction."""
    best = torch.full((weight.shape[1],), -torch.inf, dtype=weight.dtype, device=weight.device)
    index, start = torch.zeros_like(best, dtype=torch.long), 0
    for cosines in projections(rows, weight, "cosine"):
        value, where = cosines.nan_to_num(nan=-torch.inf).max(0)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, where + start, index)
        start += len(cosines)
    return best.where(best.isfinite(), torch.nan).cpu(), index.cpu()


def _directions(
    tower: Tower, unembedding: Unembedding | None, targets: Sequence[int | str] | None
) -> tuple[Unembedding, list[int], Tensor]:
    """The unembedding, the columns of it that count as classes, and their directions ``[d_model class]``."""
    outputs = unembedding or unembedding_matrix(tower, gain=False)
    if targets is None:  # The matrix of a large vocabulary must not be copied.
        return outputs, list(range(outputs.matrix.shape[1])), outputs.matrix
    columns = outputs.find(targets)
    return outputs, columns, outputs.matrix[:, columns]


# -- keys and values of a run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KeyValueAgreement(Result):
    """A rate per token and layer beside its chance level: ``values`` and ``chance`` ``[layer position example]``, NaN at padding.

    ``measure`` is ``"key_value_agreement"`` or ``"compositionality"``. ``kinds`` names every position of every row (``"cls"``, ``"patch"``, …),
    ``places`` ``[example position 4]`` is its image, tile, patch row and column.
    """

    chance: Tensor = field(default_factory=lambda: torch.zeros(0))
    kinds: list[list[str]] = field(default_factory=list)
    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    tower: str = ""
    component: str = "mlp"
    measure: str = ""

    _per_example: ClassVar[dict[str, int]] = {"chance": -1, "kinds": 0, "places": 0}

    def summary(self) -> pd.DataFrame:
        """One row per layer and kind of position: rate, chance, how many tokens."""
        import pandas as pd

        records: list[dict[str, Any]] = []
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
    model: HookedModel,
    cache: ActivationCache | Mapping[str, Any],
    labels: Sequence[int | str] | Tensor | None = None,
    tower: str | None = None,
    *,
    component: str = "mlp",
    layers: int | Sequence[int] | None = None,
    targets: Sequence[int | str] | None = None,
    unembedding: Unembedding | None = None,
    n_keys: int = 5,
    n_values: int = 5,
    step: int | None = None,
) -> KeyValueAgreement:
    """Whether a token's most active keys belong to value vectors of its true class, or without labels of the layer's own answer (see the module).

    Args:
        model: the hooked model.
        cache: a cache that holds ``mlp.hook_post`` (heads: ``attn.hook_z``) of the layers, and without labels ``hook_mlp_out``
            (``hook_attn_out``); or the inputs of a run.
        labels: the true class of every example, ids or names; None: the class that the layer's output names at the token.
        tower: the tower that is read; by default the language tower, or the only one there is.
        component: neurons of the ``"mlp"``, or channels of the heads, ``"ov"``.
        layers: only these layers.
        targets: the classes among which answers and chance are taken; the labels must be among them. All outputs by default.
        unembedding: the class directions; None takes the tower's head without the final norm's gain.
        n_keys: how many active keys a token has.
        n_values: how many value vectors a class has (with labels).
        step: which pass, in a cache that recorded several: one that reads all positions, such as the first of ``generate``.

    Raises:
        InputError: labels that do not fit the examples, sites that the cache lacks, counts below 1, a pass of other positions.
    """
    read = chosen_tower(model, tower)
    if component not in _SITES or n_keys < 1 or n_values < 1:
        raise InputError(
            f"component={component!r} must be 'mlp' or 'ov', n_keys={n_keys} and n_values={n_values} at least 1."
        )
    cache = _cached(model, cache, read, component)
    tokens = tokens_of(cache, read.name)
    numbers = chosen_layers(layers, read.cfg.n_layers)
    outputs, columns, weight = _directions(read, unembedding, targets)
    true = None if labels is None else _true_classes(labels, tokens, outputs, columns)
    if true is not None and len(columns) == 1:
        warn("With a single class there is no chance level; it is NaN.")
    measure = "compositionality" if true is None else "key_value_agreement"
    keys_site, written_site = _SITES[component]
    rates, chances = [], []
    for layer in track(numbers, measure.replace("_", " ")):
        keys = _site(cache, read, tokens, layer, keys_site, step).cpu()
        active = _active(keys if component == "mlp" else keys.flatten(-2), n_keys)
        rows = written_rows(read, layer, component)
        if true is None:
            rate, chance = _own_answer(active, rows, _site(cache, read, tokens, layer, written_site, step), weight)
        else:
            rate, chance = _true_answer(active, rows, true, weight, n_values)
        rates.append(rate)
        chances.append(chance)
    padding = torch.from_numpy(~tokens.present)
    values, levels = (torch.stack(kind).masked_fill(padding, torch.nan) for kind in (rates, chances))
    counts = f"n_keys={n_keys}" + ("" if true is None else f", n_values={n_values}")
    method = f"{measure}(component={component}, gain={outputs.gain}, {counts}) of {read.name}"
    return KeyValueAgreement(
        values=values.transpose(1, 2),
        axes={"layer": numbers, "position": list(range(values.shape[2])), "example": tokens.example.tolist()},
        provenance=describe(model, method=method, inputs=(cache.inputs,)),
        chance=levels.transpose(1, 2),
        kinds=tokens.kind.tolist(),
        places=places_of(tokens),
        tower=read.name,
        component=component,
        measure=measure,
    )


def _cached(model: HookedModel, cache: Any, tower: Tower, component: str) -> ActivationCache:
    """The cache, or that of a run of the inputs; InputError for a cache of another model."""
    if not isinstance(cache, Mapping):
        raise InputError(f"Give a cache of a run, or the inputs of one, not a {type(cache).__name__}.")
    if not isinstance(cache, ActivationCache):
        with torch.no_grad():
            return model.run_with_cache(cache, [f"{tower.name}.blocks.*.{site}" for site in _SITES[component]])[1]
    if cache.model is not None and cache.model.module is not model.module:
        raise InputError("The cache is of another model than the one given; record it with this model.")
    return cache


def _site(
    cache: ActivationCache, tower: Tower, tokens: TokenMap, layer: int, name: str, step: int | None
) -> Float[Tensor, "row pos ..."]:
    """A site of a layer; InputError where its positions are not those of the token map."""
    value = recorded(cache, f"{tower.name}.blocks.{layer}.{name}", step).detach()
    if tuple(value.shape[:2]) != (tokens.n_rows, tokens.n_positions):
        raise InputError(
            f"This pass has {value.shape[0]} rows of {value.shape[1]} positions, the token map of the {tower.name} tower {tokens.n_rows} of "
            f"{tokens.n_positions}; choose the pass that reads the prompt (step=0)."
        )
    return value


def _active(keys: Float[Tensor, "row pos key"], count: int) -> Bool[Tensor, "row pos key"]:
    order = keys.topk(min(count, keys.shape[-1]), dim=-1).indices
    return torch.zeros_like(keys, dtype=torch.bool).scatter(-1, order, True)


def _true_classes(
    labels: Sequence[int | str] | Tensor, tokens: TokenMap, outputs: Unembedding, columns: list[int]
) -> Tensor:
    """For every row, the number of its class among ``columns``."""
    wanted = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(wanted) != tokens.n_examples:
        raise InputError(f"There are {len(wanted)} labels for {tokens.n_examples} examples; give one each.")
    found = outputs.find(wanted)
    absent = [column for column in found if column not in columns]
    if absent:
        raise InputError(f"The label {outputs.label(absent[0])!r} is not among the targets; add it.")
    return torch.tensor([columns.index(column) for column in found])[torch.from_numpy(tokens.example)]


def _true_answer(
    active: Bool[Tensor, "row pos key"], rows: Tensor, true: Tensor, weight: Tensor, n_values: int
) -> tuple[Tensor, Tensor]:
    """Whether an active key is a value vector of the row's class, and the share of the other classes that have one."""
    mine, all_hits = torch.zeros(active.shape[:2]), torch.zeros(active.shape[:2])
    for first, hits in _hits(active, rows, weight, n_values):
        all_hits += hits.sum(-1)
        here = (true >= first) & (true < first + hits.shape[-1])
        mine[here] = hits[here, :, true[here] - first].float()
    others = weight.shape[1] - 1
    return mine, (all_hits - mine) / others if others else mine * torch.nan


def _hits(
    active: Bool[Tensor, "row pos key"], rows: Float[Tensor, "key d_model"], weight: Tensor, n_values: int
) -> Iterator[tuple[int, Bool[Tensor, "row pos column"]]]:
    """Whether an active key is among the value vectors that promote a class most: a few classes at a time, with the number of the first."""
    n_values = min(n_values, len(rows))
    width = at_once(max(len(rows), active.shape[0] * active.shape[1] * n_values))
    for first in range(0, weight.shape[1], width):
        logits = torch.cat(list(projections(rows, weight[:, first : first + width])))
        promoting = logits.topk(n_values, dim=0).indices.cpu()
        yield first, torch.stack([active[..., keys] for keys in promoting]).any(0)


def _own_answer(
    active: Bool[Tensor, "row pos key"], rows: Tensor, written: Float[Tensor, "row pos d_model"], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of active value vectors, and of all, whose top class is that of the layer's output."""
    own = _best(rows, weight)
    answer = _best(written.flatten(0, 1), weight).view(written.shape[:2])
    rate = (active * (own == answer[..., None])).sum(-1) / active.float().sum(-1)
    return rate, (torch.bincount(own, minlength=weight.shape[1]).float() / len(own))[answer]


def _best(rows: Float[Tensor, "row d_model"], weight: Float[Tensor, "d_model n_out"]) -> Tensor:
    """The highest column of every row."""
    return torch.cat([logits.argmax(-1) for logits in projections(rows, weight)]).cpu()
