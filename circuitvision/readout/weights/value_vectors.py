"""Value vectors: what each neuron, or each channel of a head, writes to the residual stream, read as classes, text, tokens or actions.

An MLP adds ``sum_i m_i w_i + b_out`` to the stream: ``m_i`` is ``mlp.hook_post`` of neuron ``i`` and ``w_i`` row ``i`` of ``W_out``, its value
vector. Projected, ``w_i @ W_U``, it says which outputs the neuron speaks for whenever it is positive, in every run, without running the model.
Neurons of a gated MLP, and the channels of a head, may be negative: there the lowest outputs count as much (``largest=False``).

Rows are taken *as written to the stream*: LayerScale is included. Where a sandwich norm follows (``normed=True`` in the result), its centring
and gain are included and its denominator, which depends on the input, is not: directions are right, lengths only within one layer's run.

Rows ``of``:

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
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.progress import track
from circuitvision.provenance import describe
from circuitvision.readout.weights.unembedding import (
    Prompts,
    Unembedding,
    column_number,
    model_of,
    through_norm,
    unembedding_matrix,
    wide,
)
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.model.tower import Tower

_ROWS = {"mlp": ("neuron",), "ov": ("head", "channel"), "ov_circuit": ("head", "coordinate")}
_CHUNK = 2**24
"""Numbers that a batch of projections may hold: 64 MiB in float32."""


@dataclass(frozen=True, eq=False)
class ValueVectors(Result):
    """Outputs that value vectors speak for.

    ``values`` is ``[layer neuron rank]`` (heads: ``[layer head channel rank]``), best first, and ``ids`` says whose values they are. With
    targets the last axis is ``target`` and ``ids`` lists them once. ``labels`` names the ids that occur. ``per_layer`` is how many value
    vectors a layer has, so that ``flat = layer * per_layer + index``.
    """

    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    labels: dict[str, str] = field(default_factory=dict)
    tower: str = ""
    of: str = "mlp"
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
        here = (self.axes["layer"].index(layer), *index)
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
        """The value vectors that speak for ``targets`` most.

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

    def to_frame(self) -> pd.DataFrame:
        """One row per value, with the id and the name of the output."""
        frame = super().to_frame()
        ids = (self.ids if self.ranked else self.ids.expand(self.values.shape)).reshape(-1).tolist()
        frame["id"], frame["output"] = ids, [self.label(column) for column in ids]
        return frame

    def _found(self, targets: Sequence[int | str]) -> Tensor:
        if isinstance(targets, str):
            raise InputError(f"Targets are a list; write [{targets!r}].")
        words = {t for t in targets if isinstance(t, str)}
        wanted = {column_number(t) for t in targets if not isinstance(t, str)}
        # Text pieces carry the mark of a leading space.
        wanted |= {int(i) for i, name in self.labels.items() if name in words or name.lstrip("▁Ġ ") in words}
        absent = [
            word for word in words if all(word not in (name, name.lstrip("▁Ġ ")) for name in self.labels.values())
        ]
        if absent and self.ranked:
            warnings.warn(
                f"No value vector holds {absent[0]!r} among its first {self.ids.shape[-1]} outputs.", stacklevel=3
            )
        found = torch.isin(self.ids, torch.tensor(sorted(wanted), dtype=torch.long))
        if self.ranked:
            return found
        if not bool(found.any()):
            held = ", ".join(self.label(column) for column in self.ids.tolist()[:12])
            raise InputError(f"None of the targets {list(targets)} was kept; this result holds {held}.")
        return found.expand(self.values.shape)


def value_vectors(
    tower: Tower,
    top_k: int = 10,
    *,
    layers: Sequence[int] | None = None,
    of: str = "mlp",
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
        of: ``"mlp"``, ``"ov"`` or ``"ov_circuit"`` (see the module).
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
    model = model_of(tower)
    _check(of, measure, top_k, batch_size)
    numbers = layers_of(tower, layers)
    outputs = outputs_of(tower, gain, prompts, matrix, part)
    chosen = None if targets is None else outputs.find(targets)
    sizes = _row_axes(tower, of)
    shape = (len(numbers), *(len(labels) for labels in sizes.values()))
    values, ids = [], []
    for layer in track(numbers, "value vectors"):
        rows = written_rows(tower, layer, of)
        best = _best_outputs(rows, outputs.matrix, chosen, top_k, largest, measure, batch_size)
        values.append(best[0])
        ids.append(best[1])
    kept = torch.stack(values).reshape(*shape, -1)
    kept_ids = torch.tensor(chosen) if chosen is not None else torch.stack(ids).reshape(*shape, -1)
    names = {str(column): outputs.label(column) for column in kept_ids.unique().tolist()}
    last: dict[str, list[Any]] = {"rank": list(range(1, kept.shape[-1] + 1))}
    if chosen is not None:
        last = {"target": [names[str(column)] for column in chosen]}
    kind = f"of={of}, gain={outputs.gain}, measure={measure}" + (f", part={outputs.part}" if outputs.part else "")
    return ValueVectors(
        values=kept,
        axes={"layer": numbers, **sizes, **last},
        provenance=describe(model, method=f"value_vectors(tower={tower.name}, {kind})"),
        ids=kept_ids,
        labels=names,
        tower=tower.name,
        of=of,
        measure=measure,
        largest=largest,
        gain=outputs.gain,
        part=outputs.part,
        normed=is_normed(tower, of),
        per_layer=math.prod(shape[1:]),
    )


def written_rows(tower: Tower, layer: int, of: str = "mlp") -> Float[Tensor, "row d_model"]:
    """The value vectors of one layer as they are written to the stream (see the module), in float32 at least; heads one after another."""
    block = tower.blocks[layer]
    with torch.no_grad(), tower.quiet():
        if of == "mlp":
            rows = block.W_out
        elif of == "ov":
            rows = block.W_O.flatten(0, 1)
        else:
            values = wide(block.W_V).repeat_interleave(tower.cfg.n_heads // tower.cfg.n_kv_heads, dim=0)
            rows = (values @ wide(block.W_O)).flatten(0, 1)
        return as_written(tower, layer, "mlp_add" if of == "mlp" else "attn_add", wide(rows.detach()))


def as_written(tower: Tower, layer: int, add: str, rows: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """Rows of an output projection through what follows it: LayerScale, or the linear part of a sandwich norm."""
    block = tower.blocks[layer]
    if not block.has(add):
        return rows
    module: Any = block.part(add)
    scale = getattr(module, "lambda1", None)
    return through_norm(module, rows) if scale is None else rows * wide(scale.detach()).to(rows)


def is_normed(tower: Tower, of: str) -> bool:
    """Whether a norm stands between these rows and the stream, so that their length there depends on the input."""
    block, add = tower.blocks[0], "mlp_add" if of == "mlp" else "attn_add"
    return block.has(add) and not hasattr(block.part(add), "lambda1")


def outputs_of(
    tower: Tower, gain: bool, prompts: Prompts | None, matrix: Tensor | Unembedding | None, part: str | None
) -> Unembedding:
    """The unembedding that these options ask for."""
    if isinstance(matrix, Unembedding):
        return matrix
    return unembedding_matrix(tower, gain=gain, prompts=prompts, matrix=matrix, part=part)


def projections(
    rows: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_model n_out"],
    measure: str = "logit",
    batch_size: int | None = None,
) -> Iterator[Float[Tensor, "batch n_out"]]:
    """``rows @ weight`` in batches; for ``measure="cosine"`` of unit rows and columns, NaN where one of them is zero."""
    step = batch_size or at_once(weight.shape[1])
    norms = weight.norm(dim=0) if measure == "cosine" else None
    for chunk in rows.split(step):
        chunk = chunk.to(weight)
        logits = chunk @ weight
        yield logits if norms is None else logits / (chunk.norm(dim=-1, keepdim=True) * norms)


def at_once(width: int) -> int:
    """How many rows (or columns) of ``width`` numbers a product may hold."""
    return max(1, _CHUNK // max(width, 1))


def layers_of(tower: Tower, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, all by default; raises InputError for one that is not there."""
    count = tower.cfg.n_layers
    numbers = list(range(count)) if layers is None else [int(layer) for layer in layers]
    if not numbers or any(not 0 <= layer < count for layer in numbers):
        raise InputError(f"layers={numbers}: the {tower.name} tower has layers 0 to {count - 1}.")
    return numbers


def action_bins(
    ids: Int[Tensor, "*batch token"], n_vocab: int, *, n_bins: int = 256, low: float = -1.0, high: float = 1.0
) -> Float[Tensor, "*batch token"]:
    """The action that a token of a discretising policy stands for; NaN for tokens that are no action.

    The last ``n_bins`` ids of the vocabulary (padding rows not counted) are the edges of ``linspace(low, high, n_bins)``, counted from the
    end: id ``t`` is bin ``n_vocab - t - 1``, clipped to the last of the ``n_bins - 1`` centres. Convention of OpenVLA (Kim et al. 2024, arXiv
    2406.09246).
    """
    edges = torch.linspace(low, high, n_bins, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    number = n_vocab - ids.cpu() - 1
    action = centres[number.clamp(0, n_bins - 2)].float()
    return torch.where((number >= 0) & (number < n_bins), action, torch.nan)


def _best_outputs(
    rows: Tensor,
    matrix: Tensor,
    chosen: list[int] | None,
    top_k: int,
    largest: bool,
    measure: str,
    batch_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Of every row, the values of the ``chosen`` outputs, or the ``top_k`` best values and whose they are."""
    weight = matrix if chosen is None else matrix[:, chosen]
    values, ids = [], []
    for logits in projections(rows, weight, measure, batch_size):
        if chosen is None:
            # A zero vector has no cosine: its NaNs must not win a ranking.
            sortable = logits.nan_to_num(nan=-torch.inf if largest else torch.inf)
            order = sortable.topk(min(top_k, weight.shape[1]), dim=-1, largest=largest).indices
            logits = logits.gather(-1, order)
            ids.append(order.cpu())
        values.append(logits.cpu())
    return torch.cat(values), torch.cat(ids) if ids else torch.zeros(0, dtype=torch.long)


def _row_axes(tower: Tower, of: str) -> dict[str, list[int]]:
    cfg = tower.cfg
    sizes = {"neuron": cfg.d_mlp, "head": cfg.n_heads, "channel": cfg.d_head, "coordinate": cfg.d_model}
    return {name: list(range(sizes[name])) for name in _ROWS[of]}


def _check(of: str, measure: str, top_k: int, batch_size: int | None) -> None:
    if of not in _ROWS:
        raise InputError(f"of={of!r}: choose one of {', '.join(_ROWS)}.")
    if measure not in ("logit", "cosine"):
        raise InputError(f"measure={measure!r}: choose 'logit' or 'cosine'.")
    if top_k < 1 or (batch_size is not None and batch_size < 1):
        raise InputError(f"top_k={top_k} and batch_size={batch_size} must be at least 1.")
