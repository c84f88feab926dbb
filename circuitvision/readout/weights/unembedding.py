"""What a direction of a tower's residual stream says about the output: the linear part of the tower's read-out as one matrix.

A row vector ``w`` of the stream, written where the read-out looks, moves the output by ``w @ matrix``, up to the positive number by which
the final norm divides at that position: that number depends on the rest of the stream, so what is compared here are directions, not
effects. Biases, a soft cap, a logit scale and a logit bias are left out: they do not depend on ``w`` or do not change its ranking.

* *gain*: with ``gain=True`` the final norm's own linear part is in the matrix: centring for a LayerNorm, then multiplication by the gain
  (``offset + weight``). With ``gain=False`` it is the bare head. A tower whose read-out applies no norm is the same with both.
* *dual encoders* have one column per prompt: ``W_proj @ e`` for the unit-length embedding ``e`` of a text, the cosine similarity times the
  length of the image's embedding, before the logit scale.
* *vision towers of a VLM* go on through the projector into the language tower's unembedding, if the projector is linear; the gain then means
  both norms, the vision tower's and the language tower's.
* *parts*: where a head reads two positions, ``part`` says which one ``w`` is written to: ``"cls"`` or ``"patch"`` (every patch at once) of a
  head on the class token and the mean patch; ``"cls"``, ``"distillation"``, or ``"mean"`` (both at once) where two heads are averaged. An
  attention-pooling head is not linear; ``part="value_path"`` takes its value and output projections, all heads attending to the position,
  without its MLP.

Not covered: projectors with a non-linearity, for which a matrix of one's own can be given.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, nearest
from circuitvision.model.norms import Norm
from circuitvision.model.spec import Readout, require
from circuitvision.model.tower import Tower
from circuitvision.model.weights import attention_weights, embedding_weight, linear_weight
from circuitvision.readout.targets import names_of, output_kind, prompt_embeddings, word_ids

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel

_PARTS = {
    "cls+mean_patch": ("cls", "patch"),
    "cls+distillation": ("mean", "cls", "distillation"),
    "attention": ("value_path",),
}
Prompts = Sequence[str] | Tensor


@dataclass(frozen=True, eq=False)
class Unembedding:
    """A matrix from the residual stream to outputs, and what its columns are called."""

    matrix: Float[Tensor, "d_model n_out"]
    label: Callable[[int], str]
    """The name of a column: a class, a text piece, a prompt, an action's coordinate, or its number."""
    find: Callable[[Sequence[int | str]], list[int]]
    """The columns of ids or names; raises InputError for one that is not there."""
    gain: bool = False
    """Whether the final norm's centring and gain are in the matrix."""
    part: str = ""
    """Which position of a head that reads two; empty for all others."""


def unembedding_matrix(
    tower: Tower,
    *,
    gain: bool = True,
    prompts: Prompts | None = None,
    matrix: Float[Tensor, "d_model n_out"] | None = None,
    names: Sequence[str] | None = None,
    part: str | None = None,
) -> Unembedding:
    """The linear part of a tower's read-out, ``[d_model n_out]``, in float32 at least (see the module for conventions).

    Args:
        tower: the tower, of a wrapped model that is still held by a variable.
        gain: whether the final norm's centring and gain are part of the matrix.
        prompts: for dual encoders, the texts to read as, or embeddings in the shared space, ``[prompt d_shared]``.
        matrix: instead of the tower's own head, a matrix that reads the stream behind the final norm.
        names: what the columns of ``matrix`` are called; their numbers if left out.
        part: which position of a head that reads two; None takes the first (``"cls"``, ``"mean"``).

    Raises:
        InputError: a tower without a linear read-out, a dual encoder without prompts, prompts elsewhere, a part that is
        not there, a matrix of the wrong shape.
    """
    model = model_of(tower)
    with torch.no_grad(), tower.hooks_disabled():
        called: list[str] | None
        if matrix is not None:
            weight, chosen = wide(matrix.detach()).to(model.device), ""
            if weight.ndim != 2 or weight.shape[0] != tower.cfg.d_model:
                raise InputError(f"matrix has shape {tuple(weight.shape)}; it must be [{tower.cfg.d_model}, n_out].")
            called = [str(column) for column in range(weight.shape[1])] if names is None else list(names)
            if len(called) != weight.shape[1]:
                raise InputError(f"{len(called)} names were given for the {weight.shape[1]} columns of matrix.")
        else:
            weight, chosen = _head(tower, gain, part)
            weight, called = _read_as(tower, model, wide(weight), prompts)
        if gain:
            weight = _through_final_norm(tower, weight)
    return Unembedding(weight.contiguous(), *_labels(called, tower, model, weight.shape[1]), gain, chosen)


def model_of(tower: Tower) -> HookedModel:
    """The wrapped model of a tower; raises InputError if nothing holds it any more."""
    if not hasattr(tower, "owner"):
        raise InputError(f"Give a tower, such as model.vision or model.language, not a {type(tower).__name__}.")
    model = tower.owner()
    if model is None:
        raise InputError(
            "The wrapped model of this tower is gone; keep it in a variable: model = HookedModel(…), then model.vision."
        )
    return model


def column_number(target: Any) -> int:
    """A target given as a whole number of any kind (Python's, numpy's, a tensor's); InputError for anything else."""
    try:
        if not isinstance(target, bool):
            return operator.index(target)
    except TypeError:
        pass
    raise InputError(f"{target!r} is no output: outputs are whole numbers or names.")


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if that is what it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def before_norm(module: nn.Module, weight: Float[Tensor, "d_model n_out"]) -> Float[Tensor, "d_model n_out"]:
    """The matrix that reads a stream before a norm as ``weight`` reads it behind: centred for a LayerNorm, times the gain; not divided."""
    return Norm(module).transposed(weight.T).T


def _through_final_norm(tower: Tower, weight: Tensor) -> Tensor:
    readout = tower.spec.readout
    if tower.final_norm is None or (readout is not None and not readout.normed):
        return weight
    return before_norm(tower.final_norm, weight)


def _head(tower: Tower, gain: bool, part: str | None) -> tuple[Tensor, str]:
    """The head's weight and the part that was chosen."""
    readout = tower.spec.readout
    offered = _PARTS.get(readout.pool, ()) if readout is not None else ()
    if part is not None and part not in offered:
        there = f"its parts are {', '.join(offered)}" if offered else "it has no parts"
        raise InputError(f"part={part!r} is none of the {tower.name} tower's head; {there}.")
    if readout is None:
        raise InputError(f"The {tower.name} tower has no head; give a matrix= [{tower.cfg.d_model}, n_out].")
    if tower.connector is not None:
        return _projected(tower, gain), ""
    if readout.pool == "attention":
        return _value_path(tower, readout, part), part or ""
    if readout.second_head is not None:
        both = [
            _linear(tower, require(tower.module, path or "", "head")) for path in (readout.head, readout.second_head)
        ]
        part = part or offered[0]
        return (both[0] + both[1]) / 2 if part == "mean" else both[part == "distillation"] / 2, part
    if readout.head is not None:
        weight = _linear(tower, require(tower.module, readout.head, "head"))
        if not offered:
            return weight, ""
        part = part or offered[0]
        return weight.chunk(len(offered))[offered.index(part)], part
    if readout.tied_lens is not None:
        table = require(tower.module, readout.tied_lens, "tied embedding")
        return embedding_weight(table, tower.dtype).detach().T, ""
    raise InputError(f"The {tower.name} tower has no head; give a matrix= [{tower.cfg.d_model}, n_out].")


def _linear(tower: Tower, module: nn.Module) -> Tensor:
    return linear_weight(module, tower.dtype)[0].detach()


def _projected(tower: Tower, gain: bool) -> Tensor:
    found = linear_projector(tower)
    if found is None:
        projector = tower.connector_module
        raise InputError(
            f"The {tower.name} tower is read through {type(projector).__name__}, which is not linear; give a matrix= "
            f"[{tower.cfg.d_model}, n_out] of your own, or read activations with the logit lens."
        )
    inner = unembedding_matrix(tower.reader, gain=gain).matrix
    return wide(_linear(tower, found)).to(inner) @ inner


def linear_projector(tower: Tower) -> nn.Module | None:
    """The one linear map that a vision tower's projector is made of, if it is made of one."""
    if tower.family.packing.merges("hook_out"):
        return None
    maps = _maps(tower.connector_module)
    return maps[0] if len(maps) == 1 and hasattr(maps[0], "in_features") else None


def _maps(module: nn.Module) -> list[nn.Module]:
    """The modules that map something: linear maps whole (an adapter's parts are inside), leaves otherwise."""
    children = list(module.children())
    if hasattr(module, "in_features") or not children:
        return [module]
    return [found for child in children for found in _maps(child)]


def _value_path(tower: Tower, readout: Readout, part: str | None) -> Tensor:
    if part is None:
        raise InputError(
            f"The {tower.name} tower is read by attention pooling and an MLP, which are not linear; part='value_path' takes "
            "the pooling's value and output projections alone, or give a matrix= of your own."
        )
    pool = require(tower.module, readout.pool_module or "", "pooling head")
    weight, _, out, _ = attention_weights(require(pool, "attention", "attention of the pooling head"))
    return wide(weight.detach().chunk(3)[2].T) @ wide(out.detach().T)


def _read_as(
    tower: Tower, model: HookedModel, weight: Tensor, prompts: Prompts | None
) -> tuple[Tensor, list[str] | None]:
    """The head's columns as they are, or the shared space read by prompts, which then name them."""
    kind = output_kind(tower)
    if kind not in ("texts", "images", "embedding") and prompts is not None:
        raise InputError(
            f"The {tower.name} tower of {tower.family.name} does not end in a space shared with text; leave prompts out."
        )
    if prompts is None:
        if kind in ("texts", "images"):
            raise InputError(
                f"The {tower.name} tower ends in a space shared with the other one; give prompts=['a red circle', …] to read it."
            )
        return weight, None
    if isinstance(prompts, Tensor):
        embeddings, names = prompts, [f"prompt {number}" for number in range(len(prompts))]
    elif isinstance(prompts, str):
        raise InputError(f"prompts is a list of texts; write [{prompts!r}].")
    else:
        embeddings, names = prompt_embeddings(model, prompts), list(prompts)
    if embeddings.ndim != 2 or embeddings.shape[1] != weight.shape[1]:
        raise InputError(
            f"Embeddings of prompts have shape {tuple(embeddings.shape)}; they must be [prompt, {weight.shape[1]}]."
        )
    units = nn.functional.normalize(wide(embeddings.detach()).to(weight), dim=-1)
    return weight @ units.T, names


def _labels(
    names: list[str] | None, tower: Tower, model: HookedModel, n_out: int
) -> tuple[Callable[[int], str], Callable[[Sequence[int | str]], list[int]]]:
    """How columns are named and found: by ``names``, or as the tower's own outputs are."""

    def label(column: int) -> str:
        return names_of(model, tower, [int(column)])[str(int(column))] if names is None else names[column]

    def one(target: int | str) -> int:
        if not isinstance(target, str):
            column = column_number(target)
        elif names is None and output_kind(tower) in ("classes", "tokens"):
            column = word_ids(model, target)[0]
        else:
            known = names or [label(number) for number in range(n_out)]
            if target not in known:
                raise InputError(f"{target!r} is no output here; nearest: {', '.join(nearest(target, known))}.")
            column = known.index(target)
        if not 0 <= column < n_out:
            raise InputError(f"Output {column} is outside the {n_out} outputs of the {tower.name} tower.")
        return column

    def find(targets: Sequence[int | str]) -> list[int]:
        if isinstance(targets, str) or not len(targets):
            raise InputError(f"Targets are a list of one or more outputs, such as ['red', 'blue']; got {targets!r}.")
        return [one(target) for target in targets]

    return label, find
