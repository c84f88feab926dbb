"""The circuits of attention heads in the residual stream, from weights: OV, QK, their singular vectors, and composition between heads.

A head reads ``x`` (behind its norm) and works by two bilinear maps of rank ``d_head`` or less:

* **OV**, ``W_V W_O`` ``[d_model d_model]``: a position with ``x`` that is attended to fully adds ``x @ W_V W_O`` at the query;
* **QK**, ``W_Q W_K^T`` ``[d_model d_model]``: query ``x`` and key ``y`` score ``x @ W_Q W_K^T @ y``, before the scale ``1/√d_head`` (or what
  the model uses instead: ``scaled=True``). Rotary embeddings turn queries and keys by position between the two factors and are *not* included:
  in a rotary tower this is the score at distance zero.

Both are TransformerLens's ``FactoredMatrix``, in float32 at least, so nothing of size ``d_model²`` is formed. Where several query heads share
a key and value head, ``head`` counts query heads. Biases are left out. ``gain=True`` puts the linear part of the block's first norm (centring,
gain) before every matrix that reads; ``written=True`` puts LayerScale, or the linear part of a sandwich norm, after ``W_O``.

*Composition* of a head with a head of a later layer is ``‖W_A W_B‖_F / (‖W_A‖_F ‖W_B‖_F)`` with ``W_A`` the OV circuit of the earlier and
``W_B`` what the later one reads with: QK for ``"Q"``, its transpose for ``"K"``, OV for ``"V"``. Random matrices do not give zero: for a
randomly rotated ``W_A`` the mean square is exactly ``1/d_model``, whatever the spectra. The mean for Gaussian factors of the same shapes is
therefore subtracted.

Not covered: composition through MLPs, and between towers.

Reference: Elhage et al. 2021 (transformer-circuits.pub/2021/framework); Millidge & Black 2022 on singular vectors of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.names import Component, head_name, heads_of
from circuitvision.model.norms import Norm, upcast
from circuitvision.model.output_head import model_of
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.recorded import chosen_layers
from circuitvision.readout.weights.unembedding import Unembedding, unembedding_matrix
from circuitvision.results import Result

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix

    from circuitvision.model.block import Block
    from circuitvision.model.tower import Tower

_KINDS = ("Q", "K", "V")


@dataclass(frozen=True, eq=False)
class SingularVectors(Result):
    """The strongest directions of a factored matrix: ``values`` ``[direction]``, its singular values, largest first.

    An input along ``left[:, i]`` comes out along ``right[:, i]``, ``values[i]`` times as long. Signs of a pair are arbitrary; here the output
    of largest size is positive (without outputs: the coordinate of largest size of ``right``). ``top_ids`` and ``top_values`` ``[direction
    rank]`` are the highest outputs of ``right[:, i] @ unembedding``, ``labels`` their names; ``input_*`` the same for ``left`` if something to
    read it with was given. ``total`` is the squared Frobenius norm: the shares ``values² / total`` say how much is shown.
    """

    left: Tensor = field(default_factory=lambda: torch.zeros(0))
    right: Tensor = field(default_factory=lambda: torch.zeros(0))
    top_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    top_values: Tensor = field(default_factory=lambda: torch.zeros(0))
    input_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    input_values: Tensor = field(default_factory=lambda: torch.zeros(0))
    labels: dict[str, str] = field(default_factory=dict)
    input_labels: dict[str, str] = field(default_factory=dict)
    total: float = 0.0

    @property
    def shares(self) -> Float[Tensor, " direction"]:
        """How much of the squared Frobenius norm each direction holds; NaN for a matrix of zeros."""
        return self.values**2 / (self.total or float("nan"))

    def outputs(self, direction: int) -> list[tuple[str, float]]:
        """Names and values of the highest outputs of a right singular vector."""
        return _named(self.labels, self.top_ids, self.top_values, direction)

    def sources(self, direction: int) -> list[tuple[str, float]]:
        """Names and values of the highest inputs of a left singular vector."""
        return _named(self.input_labels, self.input_ids, self.input_values, direction)


@dataclass(frozen=True, eq=False)
class CompositionScores(Result):
    """How much the heads of later layers read of what heads of earlier layers write, ``[source_layer source_head layer head]``.

    ``values`` are scores minus ``random_mean``, the mean for random matrices of the same shapes (0 if none was subtracted), whose standard
    deviation is ``random_sd``; NaN where the source is not in an earlier layer.
    """

    kind: str = "V"
    tower: str = ""
    random_mean: float = 0.0
    random_sd: float = 0.0

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """The strongest pairs as (source, head, value), such as ``("vision L0H3", "vision L1H2", 0.21)``."""
        order = self.values.nan_to_num(nan=-torch.inf).flatten().argsort(descending=True, stable=True)
        found = []
        for flat in order[: min(count, int(self.values.isfinite().sum()))].tolist():
            at = [int(i) for i in torch.unravel_index(torch.tensor(flat), self.values.shape)]
            layers = self.axes["layer"]
            source, head = (head_name(layers[layer], number, self.tower) for layer, number in (at[:2], at[2:]))
            found.append((source, head, float(self.values[tuple(at)])))
        return found


def ov_circuit(
    tower: Tower,
    layer: int | Component,
    head: int | None = None,
    *,
    gain: bool | None = None,
    written: bool = False,
    tokens: bool = False,
    unembedding: Unembedding | None = None,
) -> FactoredMatrix:
    """``W_V W_O`` ``[d_model d_model]`` of one head: what it adds per unit of what it attends to (see the module).

    By default what :math:`attn.hook_result` is made of: ``result[q] = sum_k pattern[q, k] (x_k W_V + b_V) W_O``. With ``tokens=True``
    ``W_E W_V W_O W_U`` ``[n_in n_out]``: how attending to a token moves each output, by this head alone, as written to the stream. Embeddings
    are those of the table (a model that scales them is off by that factor), without positions and without what earlier blocks add.

    Args:
        tower: the tower whose weights are read.
        layer, head: two numbers, or one spelling of a head, ``"vision L1H3"``.
        gain: include the linear part of the block's norm, and with tokens of the final norm; None: with tokens only.
        written: include LayerScale, or the linear part of a sandwich norm; with tokens it always is.
        tokens: from tokens to outputs.
        unembedding: with tokens, in place of the tower's own.

    Raises:
        InputError: no such layer or head; with tokens, a tower that reads none or has no linear read-out.
    """
    from transformer_lens import FactoredMatrix

    from circuitvision.model.spec import resolve

    layer, head = _place(tower, layer, head)
    gain = tokens if gain is None else gain
    if tokens and not isinstance(resolve(tower.root, tower.stack.embed), nn.Embedding):
        raise InputError(f"The {tower.name} tower reads no tokens; leave tokens out, and use singular_vectors.")
    value, output = _ov(tower, layer, gain, written or tokens)
    circuit = FactoredMatrix(value[_kv_head(tower, head)], output[head])
    if not tokens:
        return circuit
    outputs = unembedding or unembedding_matrix(tower, gain=gain)
    return (upcast(tower.W_E).to(outputs.matrix.device) @ circuit) @ outputs.matrix


def qk_circuit(
    tower: Tower, layer: int | Component, head: int | None = None, *, gain: bool = False, scaled: bool = False
) -> FactoredMatrix:
    """``W_Q W_K^T`` ``[d_model d_model]`` of one head: score of a query (left) with a key (right), without rotary and biases (see the module).

    ``scaled=True`` multiplies by the factor that the model puts before its softmax, ``1/√d_head`` in most.

    Raises:
        InputError: no such head.
    """
    from transformer_lens import FactoredMatrix

    layer, head = _place(tower, layer, head)
    query, key = _qk(tower, layer, gain)
    factor = _score_scale(tower, layer) if scaled else 1.0
    return FactoredMatrix(query[head] * factor, key[_kv_head(tower, head)].mT)


@with_provenance
def singular_vectors(
    factored: FactoredMatrix | Float[Tensor, "d_in d_out"],
    k: int = 5,
    *,
    project_into: Unembedding | Tensor | None = None,
    read_with: Unembedding | Tensor | None = None,
    top_k: int = 10,
) -> SingularVectors:
    """The ``k`` strongest directions of a circuit: what it reads (left), what it promotes (right), and how much.

    Args:
        factored: a matrix without leading dimensions, such as :func:`ov_circuit` returns, or a dense one.
        k: how many directions.
        project_into: the unembedding that right singular vectors are read with, ``[d_model n_out]``.
        read_with: the same for left singular vectors.
        top_k: how many outputs to keep of each direction.

    Raises:
        InputError: leading dimensions, ``k`` or ``top_k`` below 1, an unembedding of the wrong width.
    """
    counts = isinstance(k, int) and isinstance(top_k, int)
    if getattr(factored, "ndim", 0) != 2 or not counts or k < 1 or top_k < 1:
        raise InputError(
            f"singular_vectors takes one matrix (this has shape {tuple(getattr(factored, 'shape', ()))}), k ≥ 1 and top_k ≥ 1."
        )
    left, values, right = (part.detach() for part in _svd(factored))
    total = float(values.double().square().sum())
    left, values, right = left[:, :k], values[:k], right[:, :k]
    out = _matrix(project_into, right, "project_into")
    seen = right if out is None else out.T @ right
    peak = seen.gather(0, seen.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(peak < 0, -1.0, 1.0).to(right)
    left, right = left * sign, right * sign
    tops = _top(out, right, project_into, top_k)
    inputs = _top(_matrix(read_with, left, "read_with"), left, read_with, top_k)
    return SingularVectors(
        values=values.cpu(),
        axes={"direction": list(range(len(values)))},
        provenance={"method": f"singular_vectors(k={k})"},
        left=left.cpu(),
        right=right.cpu(),
        top_ids=tops[0],
        top_values=tops[1],
        labels=tops[2],
        input_ids=inputs[0],
        input_values=inputs[1],
        input_labels=inputs[2],
        total=total,
    )


def _svd(matrix: FactoredMatrix | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, ``S`` and ``V`` (not its transpose) of a factored or dense matrix."""
    if not isinstance(matrix, Tensor):
        return matrix.svd()
    left, values, right = torch.linalg.svd(upcast(matrix), full_matrices=False)
    return left, values, right.mT


@with_provenance
def composition_scores(
    tower: Tower,
    kind: str = "V",
    *,
    layers: int | Sequence[int] | None = None,
    gain: bool = True,
    above_random: bool = True,
    draws: int = 16,
    seed: int = 0,
) -> CompositionScores:
    """Composition of every pair of heads of two layers of a tower, minus that of random matrices (see the module).

    Norms are computed from ``d_head × d_head`` products of QR factors, layer pair by layer pair.

    Args:
        tower: the tower.
        kind: what the later head reads with: ``"Q"``, ``"K"`` or ``"V"``.
        layers: only these layers; the result has them in ascending order.
        gain: include the linear part of the norm the later head reads through; LayerScale of the earlier one always is.
        above_random: subtract the mean of ``draws`` Gaussian matrices of the same shapes, drawn with ``seed``.

    Raises:
        InputError: another kind, no such layer, no draws.
    """
    if kind not in _KINDS or draws < 1:
        raise InputError(f"kind={kind!r} must be one of {', '.join(_KINDS)}, and draws={draws} at least 1.")
    model = model_of(tower)
    cfg = tower.cfg
    numbers = sorted(set(chosen_layers(layers, tower.cfg.n_layers)))
    values = torch.full((len(numbers), cfg.n_heads, len(numbers), cfg.n_heads), torch.nan)
    sources: list[Tensor] = []
    for column, layer in enumerate(track(numbers, f"{kind}-composition")):
        reading = _unit(_reading_factor(tower, layer, kind, gain))
        for row, source in enumerate(sources):
            values[row, :, column] = torch.einsum("aem,bmf->abef", source, reading.to(source)).norm(dim=(-2, -1)).cpu()
        if column < len(numbers) - 1:
            sources.append(_unit(_writing_factor(*_ov(tower, layer, gain=False, written=True))))
    mean, spread = random_composition(cfg.d_model, cfg.d_head, draws, seed) if above_random else (0.0, 0.0)
    heads = list(range(cfg.n_heads))
    return CompositionScores(
        values=values - mean,
        axes={"source_layer": numbers, "source_head": heads, "layer": numbers, "head": heads},
        provenance=describe(
            model,
            method=f"composition_scores(tower={tower.name}, kind={kind}, gain={gain}, draws={draws if above_random else 0})",
            seed=seed if above_random else None,
        ),
        kind=kind,
        tower=tower.name,
        random_mean=mean,
        random_sd=spread,
    )


def random_composition(d_model: int, d_head: int, draws: int = 16, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the composition score of heads with Gaussian weights; close to ``1/√d_model``."""
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        first, second, third, fourth = torch.randn(4, d_model, d_head, generator=generator)
        source = _unit(_writing_factor(first[None], second.T[None]))
        scores.append((source[0] @ _unit(third[None] @ _small(fourth[None]).mT)[0]).norm())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))


def _small(tall: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head d_head d_head"]:
    """``R`` of the QR factorisation: as long as the matrix, in every direction, and small."""
    return torch.linalg.qr(tall, mode="r").R


def _writing_factor(value: Tensor, output: Tensor) -> Float[Tensor, "head small d_model"]:
    """A matrix with the singular values, and the right side, of ``W_V W_O`` for every query head."""
    small = _small(value)
    return small.repeat_interleave(len(output) // len(small), dim=0) @ output


def _reading_factor(tower: Tower, layer: int, kind: str, gain: bool) -> Float[Tensor, "head d_model small"]:
    """A matrix with the singular values, and the left side, of what a head reads with."""
    if kind == "V":
        value, output = _ov(tower, layer, gain, written=True)
        return _per_query_head(tower, value) @ _small(output.mT).mT
    query, key = _qk(tower, layer, gain)
    if kind == "Q":
        return query @ _per_query_head(tower, _small(key)).mT
    return _per_query_head(tower, key) @ _small(query).mT


def _per_query_head(tower: Tower, weight: Float[Tensor, "kv_head ..."]) -> Float[Tensor, "head ..."]:
    return weight.repeat_interleave(tower.cfg.n_heads // tower.cfg.n_kv_heads, dim=0)


def _kv_head(tower: Tower, head: int) -> int:
    return head // (tower.cfg.n_heads // tower.cfg.n_kv_heads)


def _unit(factor: Float[Tensor, "head ..."]) -> Float[Tensor, "head ..."]:
    """Divided by its Frobenius norm: NaN for a head of zeros, which composes with nothing in a defined way."""
    return factor / factor.norm(dim=(-2, -1), keepdim=True)


def _ov(tower: Tower, layer: int, gain: bool, written: bool) -> tuple[Tensor, Tensor]:
    block = tower.blocks[layer]
    with torch.no_grad(), tower.hooks_disabled():
        value, output = upcast(block.W_V.detach()), upcast(block.W_O.detach())
        value = _behind_norm(tower, layer, value) if gain else value
        _check_bilinear(block, "v")
        return value, block.attn.then.linear(output) if written else output


def _qk(tower: Tower, layer: int, gain: bool) -> tuple[Tensor, Tensor]:
    block = tower.blocks[layer]
    with torch.no_grad(), tower.hooks_disabled():
        _check_bilinear(block, "qk")
        query, key = upcast(block.W_Q.detach()), upcast(block.W_K.detach())
        return (_behind_norm(tower, layer, query), _behind_norm(tower, layer, key)) if gain else (query, key)


def _behind_norm(tower: Tower, layer: int, weight: Float[Tensor, "head d_model d_head"]) -> Tensor:
    norm = tower.blocks[layer].attn.norm
    return weight if norm is None else torch.stack([Norm(norm).transposed(part.T).T for part in weight])


def _check_bilinear(block: Block, letters: str) -> None:
    """Raise UnsupportedModelError where queries and keys, or values, pass a norm: no product of weights says what heads compute then."""
    normed = [letter for letter in letters if block.attn.head_norm(letter) is not None]
    if normed:
        raise UnsupportedModelError(
            f"Block {block.layer} of the {block.tower.name} tower normalises {' and '.join(f'{letter}' for letter in normed)} of every head, so "
            "its QK or OV circuit is no product of weights. Compare runs instead: attn.hook_attn_scores, attn.hook_result."
        )


def _score_scale(tower: Tower, layer: int) -> float:
    attention: Any = tower.blocks[layer].attn.module
    found = getattr(attention, "scaling", None)
    found = getattr(attention, "scale", None) if found is None else found
    return float(tower.cfg.d_head**-0.5 if found is None else found)


def _place(tower: Tower, layer: int | Component, head: int | None) -> tuple[int, int]:
    """Layer and head, written as two numbers or as one spelling of a head."""
    spelling: Any = layer if head is None else (layer, head)
    (found,) = heads_of([spelling], {tower.name: tower}, tower.name)
    return found.layer, found.head


def _matrix(outputs: Unembedding | Tensor | None, vectors: Tensor, name: str) -> Tensor | None:
    if outputs is None:
        return None
    matrix = (outputs.matrix if isinstance(outputs, Unembedding) else outputs).to(vectors)
    if matrix.ndim != 2 or matrix.shape[0] != vectors.shape[0]:
        raise InputError(f"{name} has shape {tuple(matrix.shape)}; it must be [{vectors.shape[0]}, n_out].")
    return matrix


def _top(
    matrix: Tensor | None, vectors: Tensor, outputs: Unembedding | Tensor | None, count: int
) -> tuple[Tensor, Tensor, dict[str, str]]:
    if matrix is None:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0), {}
    best = (vectors.T @ matrix).topk(min(count, matrix.shape[1]), dim=-1)
    label = outputs.label if isinstance(outputs, Unembedding) else str
    return best.indices.cpu(), best.values.cpu(), {str(c): label(c) for c in best.indices.unique().tolist()}


def _named(labels: dict[str, str], ids: Tensor, values: Tensor, direction: int) -> list[tuple[str, float]]:
    if not ids.numel():
        return []
    here = zip(ids[direction].tolist(), values[direction].tolist(), strict=True)
    return [(labels.get(str(column), str(column)), value) for column, value in here]
