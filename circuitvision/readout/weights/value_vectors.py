"""Value vectors: what each neuron, or each channel of a head, writes to the residual stream, read as classes, text, tokens or actions.

An MLP adds ``sum_i m_i w_i + b_out`` to the stream: ``m_i`` is ``mlp.hook_post`` of neuron ``i`` and ``w_i`` row ``i`` of ``W_out``, its value
vector. Projected, ``w_i @ W_U``, it says which outputs the neuron promotes whenever it is positive, in every run, without running the model.
Neurons of a gated MLP, and the channels of a head, may be negative: there the lowest outputs count as much (``largest=False``).

Rows are taken *as written to the stream*: LayerScale is included. Where a sandwich norm follows (``normed=True`` in the result), its centring
and gain are included and its denominator, which depends on the input, is not: directions are right, lengths only within one layer's run.

Rows of a ``component``:

* ``"mlp"``: value vectors of neurons, axes layer and neuron; flat index ``layer * d_mlp + neuron``;
* ``"ov"``: rows of ``W_O``, what channel ``d`` of head ``h`` writes, axes layer, head and channel. The basis of a head's channels is
  arbitrary; for directions that are not, see :func:`circuitvision.readout.singular_vectors`;
* ``"ov_circuit"``: what head ``h`` writes per unit of residual coordinate ``m``, row ``m`` of ``W_V W_O``, axes layer, head and coordinate.

No norm is folded by default, as in the papers: with ``gain=True`` the final norm's gain takes part, which is what a model with uneven gain
reads.

Reference: Geva et al. 2022 (arXiv 2203.14680); Vilas et al. 2023 (arXiv 2310.18969) in vision transformers; Haon et al. 2025 (arXiv
2509.00328) in vision-language-action models, whose flat index and action bins these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.model.output_head import model_of
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.recorded import chosen_layers
from circuitvision.readout.weights.rows import is_normed, projections, written_rows
from circuitvision.readout.weights.unembedding import Prompts, Unembedding, column_number, unembedding_matrix
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.model.tower import Tower

_ROWS = {"mlp": ("neuron",), "ov": ("head", "channel"), "ov_circuit": ("head", "coordinate")}


@dataclass(frozen=True, eq=False)
class ValueVectors(Result):
    """Outputs that value vectors promote.

    ``values`` is ``[layer neuron rank]`` (heads: ``[layer head channel rank]``), best first, and ``ids`` says whose values they are. With
    targets the last axis is ``target`` and ``ids`` lists them once. ``labels`` names the ids that occur. ``per_layer`` is how many value
    vectors a layer has, so that ``flat = layer * per_layer + index``.
    """

    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    labels: dict[str, str] = field(default_factory=dict)
    tower: str = ""
    component: str = "mlp"
    measure: str = "logit"
    largest: bool = True
    gain: bool = False
    part: str = ""
    normed: bool = False
    per_layer: int = 0

    @property
    def ranked(self) -> bool:
        """Whether the last axis is a ranking; otherwise it is the targets."""
        return "rank" in self.axes

    def label(self, column: int) -> str:
        """The name of an output that occurs here, else its number."""
        return self.labels.get(str(column), str(column))

    def flat(self, layer: int, *index: int) -> int:
        """The flat index of a value vector: ``layer * per_layer + neuron``, for heads ``… + head * d_head + channel``.

        Raises:
            InputError: not one of this result.
        """
        sizes = self.values.shape[1:-1]
        if len(index) != len(sizes) or any(not 0 <= i < n for i, n in zip(index, sizes, strict=True)):
            raise InputError(f"{(layer, *index)} is not (layer, {', '.join(list(self.axes)[1:-1])}) of this result.")
        offset = 0
        for i, n in zip(index, sizes, strict=True):
            offset = offset * n + i
        return layer * self.per_layer + offset

    def place(self, flat: int) -> tuple[int, ...]:
        """Layer and neuron (heads: layer, head, channel) of a flat index."""
        layer, rest = divmod(int(flat), self.per_layer)
        where = torch.unravel_index(torch.tensor(rest), self.values.shape[1:-1])
        return (layer, *(int(i) for i in where))

    def outputs(self, layer: int, *index: int) -> list[tuple[str, float]]:
        """The outputs of one value vector and their values, in the order kept."""
        here = (self.index_of("layer", layer), *index)
        ids = (self.ids[here] if self.ranked else self.ids).tolist()
        return [(self.label(column), float(value)) for column, value in zip(ids, self.values[here], strict=True)]

    def share(self, targets: Sequence[int | str]) -> Float[Tensor, "layer *head row"]:
        """The share of each value vector's ranked outputs that are among ``targets``, 0 … 1.

        Raises:
            InputError: a result that keeps targets instead of a ranking.
        """
        if not self.ranked:
            raise InputError("share counts ranked outputs; call value_vectors without targets.")
        return self._found(targets).float().mean(-1)

    def search(self, targets: Sequence[int | str], count: int = 20) -> pd.DataFrame:
        """The value vectors that promote ``targets`` most.

        A ranking gives those that hold any of the targets, most of them first, then by the value of the best one held. With targets kept
        instead of a ranking, it gives the highest values of those targets over all value vectors.

        Returns:
            One row each: layer, neuron (or head and channel), ``flat``, ``found`` (targets held), ``value``, ``output`` (of the
            best one) and ``outputs`` (all that are kept, in order).

        Raises:
            InputError: targets that a result without a ranking does not hold.
        """
        import pandas as pd

        found = self._found(targets)
        sign = 1.0 if self.largest else -1.0
        score = torch.where(found, self.values * sign, -torch.inf)
        best, rank = (part.flatten() for part in score.max(-1))
        held = found.sum(-1).flatten()
        keep = (held > 0) & best.isfinite()
        order = sorted(keep.nonzero().flatten().tolist(), key=lambda i: (-int(held[i]), -float(best[i])))[:count]
        names = list(self.axes)[:-1]
        records = []
        for i in order:
            number, *index = (int(n) for n in torch.unravel_index(torch.tensor(i), self.values.shape[:-1]))
            layer = self.axes["layer"][number]
            outputs = self.outputs(layer, *index)
            entry: dict[str, Any] = dict(zip(names, (layer, *index), strict=True))
            entry |= {"flat": self.flat(layer, *index), "found": int(held[i]), "value": sign * float(best[i])}
            records.append(
                entry | {"output": outputs[int(rank[i])][0], "outputs": " ".join(name for name, _ in outputs)}
            )
        return pd.DataFrame(records, columns=[*names, "flat", "found", "value", "output", "outputs"])

    def _long_frame(self) -> pd.DataFrame:
        """One row per value, with the id and the name of the output."""
        frame = super()._long_frame()
        ids = (self.ids if self.ranked else self.ids.expand(self.values.shape)).reshape(-1).tolist()
        frame["id"], frame["output"] = ids, [self.label(column) for column in ids]
        return frame

    def highlights(self) -> dict[str, str]:
        """The value vectors with the largest values, each with the output it promotes."""
        score = self.values if self.largest else -self.values
        best, at = score.nan_to_num(-torch.inf).max(-1)
        found = {}
        for number in best.flatten().argsort(descending=True)[:5].tolist():
            place = tuple(int(n) for n in torch.unravel_index(torch.tensor(number), best.shape))
            names = [f"{axis} {labels[n]}" for (axis, labels), n in zip(self.axes.items(), place, strict=False)]
            output, value = self.outputs(self.axes["layer"][place[0]], *place[1:])[int(at[place])]
            found[", ".join(names)] = f"{output} {value:+.4g}"
        return found

    def _found(self, targets: Sequence[int | str]) -> Tensor:
        if isinstance(targets, str):
            raise InputError(f"Targets are a list; write [{targets!r}].")
        words = {t for t in targets if isinstance(t, str)}
        wanted = {column_number(t) for t in targets if not isinstance(t, str)}
        # Subword tokens carry the mark of a leading space.
        wanted |= {int(i) for i, name in self.labels.items() if name in words or name.lstrip("▁Ġ ") in words}
        absent = [
            word for word in words if all(word not in (name, name.lstrip("▁Ġ ")) for name in self.labels.values())
        ]
        if absent and self.ranked:
            warn(f"No value vector holds {absent[0]!r} among its first {self.ids.shape[-1]} outputs.")
        found = torch.isin(self.ids, torch.tensor(sorted(wanted), dtype=torch.long))
        if self.ranked:
            return found
        if not bool(found.any()):
            held = ", ".join(self.label(column) for column in self.ids.tolist()[:12])
            raise InputError(f"None of the targets {list(targets)} was kept; this result holds {held}.")
        return found.expand(self.values.shape)


@with_provenance
def value_vectors(
    tower: Tower,
    top_k: int = 10,
    *,
    layers: int | Sequence[int] | None = None,
    component: str = "mlp",
    gain: bool = False,
    targets: Sequence[int | str] | None = None,
    measure: str = "logit",
    largest: bool = True,
    prompts: Prompts | None = None,
    matrix: Float[Tensor, "d_model n_out"] | Unembedding | None = None,
    part: str | None = None,
    batch_size: int | None = None,
) -> ValueVectors:
    """Project every value vector of a tower onto its outputs, ``w_i @ W_U``, and keep the highest.

    Never holds more than ``batch_size`` rows of all outputs at once. Example: ``value_vectors(model.language).search(["red", "blue"])``.

    Args:
        tower: the tower whose weights are read.
        top_k: how many outputs to keep of each value vector.
        layers: only these layers.
        component: ``"mlp"``, ``"ov"`` or ``"ov_circuit"`` (see the module).
        gain: include the final norm's centring and gain (see :mod:`circuitvision.readout.weights.unembedding`).
        targets: instead of a ranking, keep the values of these outputs: ids or names.
        measure: ``"logit"``, or ``"cosine"`` between value vector and output direction, which long vectors do not win.
        largest: keep the highest; False keeps the lowest, lowest first.
        prompts: texts, or embeddings, that a dual encoder is read as.
        matrix: a matrix of one's own, ``[d_model n_out]``, or an :class:`Unembedding`, which is taken as it is.
        part: which position of a head that reads two.
        batch_size: value vectors per product; None lets a product hold 2**24 numbers.

    Raises:
        InputError: no such layer, kind of row, measure, output or linear read-out; top_k or batch_size below 1.
    """
    model_of(tower)
    _check(component, measure, top_k, batch_size)
    numbers = chosen_layers(layers, tower.cfg.n_layers)
    outputs = outputs_of(tower, gain, prompts, matrix, part)
    chosen = None if targets is None else outputs.find(targets)
    best = _Best(outputs.matrix, chosen, top_k, largest, measure, batch_size)
    found = [best.of(written_rows(tower, layer, component)) for layer in track(numbers, "value vectors")]
    values, ids = (torch.stack(part) for part in zip(*found, strict=True))
    return _result(tower, component, numbers, outputs, best, values, ids)


def _result(
    tower: Tower, component: str, numbers: list[int], outputs: Unembedding, best: _Best, values: Tensor, ids: Tensor
) -> ValueVectors:
    sizes = _row_axes(tower, component)
    shape = [len(numbers), *(len(labels) for labels in sizes.values())]
    values, ids = values.reshape(*shape, -1), ids.reshape(*shape, -1)
    ids = ids if best.chosen is None else torch.tensor(best.chosen)
    names = {str(column): outputs.label(column) for column in ids.unique().tolist()}
    last: dict[str, list[Any]] = {"rank": list(range(1, values.shape[-1] + 1))}
    if best.chosen is not None:
        last = {"target": [names[str(column)] for column in best.chosen]}
    kind = f"component={component}, gain={outputs.gain}, measure={best.measure}" + (
        f", part={outputs.part}" if outputs.part else ""
    )
    return ValueVectors(
        values=values,
        axes={"layer": numbers, **sizes, **last},
        provenance=describe(model_of(tower), method=f"value_vectors(tower={tower.name}, {kind})"),
        ids=ids,
        labels=names,
        tower=tower.name,
        component=component,
        measure=best.measure,
        largest=best.largest,
        gain=outputs.gain,
        part=outputs.part,
        normed=is_normed(tower, component),
        per_layer=math.prod(shape[1:]),
    )


def outputs_of(
    tower: Tower, gain: bool, prompts: Prompts | None, matrix: Tensor | Unembedding | None, part: str | None
) -> Unembedding:
    """The unembedding that these options ask for."""
    if isinstance(matrix, Unembedding):
        return matrix
    return unembedding_matrix(tower, gain=gain, prompts=prompts, matrix=matrix, part=part)


@dataclass(frozen=True)
class _Best:
    """Which outputs of a row are kept: the ``chosen`` ones, or the ``top_k`` best."""

    matrix: Tensor
    chosen: list[int] | None
    top_k: int
    largest: bool
    measure: str
    batch_size: int | None

    def of(self, rows: Float[Tensor, "row d_model"]) -> tuple[Tensor, Tensor]:
        """Values ``[row rank]`` and whose they are (of chosen outputs, which are known: as many zeros)."""
        weight = self.matrix if self.chosen is None else self.matrix[:, self.chosen]
        values, ids = [], []
        for logits in projections(rows, weight, self.measure, self.batch_size):
            order = torch.zeros_like(logits, dtype=torch.long)
            if self.chosen is None:
                # A zero vector has no cosine: its NaNs must not win a ranking.
                sortable = logits.nan_to_num(nan=-torch.inf if self.largest else torch.inf)
                order = sortable.topk(min(self.top_k, weight.shape[1]), dim=-1, largest=self.largest).indices
                logits = logits.gather(-1, order)
            values.append(logits.cpu())
            ids.append(order.cpu())
        return torch.cat(values), torch.cat(ids)


def _row_axes(tower: Tower, component: str) -> dict[str, list[int]]:
    cfg = tower.cfg
    sizes = {"neuron": cfg.d_mlp, "head": cfg.n_heads, "channel": cfg.d_head, "coordinate": cfg.d_model}
    return {name: list(range(sizes[name])) for name in _ROWS[component]}


def _check(component: str, measure: str, top_k: int, batch_size: int | None) -> None:
    if component not in _ROWS:
        raise InputError(f"component={component!r}: choose one of {', '.join(_ROWS)}.")
    if measure not in ("logit", "cosine"):
        raise InputError(f"measure={measure!r}: choose 'logit' or 'cosine'.")
    for name, number in (("top_k", top_k), ("batch_size", 1 if batch_size is None else batch_size)):
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{name}={number!r} must be a whole number of at least 1.")
