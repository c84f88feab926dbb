"""What a direction of the output is, where it is read, and what it is at every position of the stream (:meth:`OutputHead.gradient`).

What a term of the stream contributes is its inner product with that gradient; contributions and constant (biases of norm and head) add up to the
output, whatever the family pools. A vision tower behind a projector of one linear map (PaliGemma, PI0) is read as the lens reads it: what the patches
at ``position`` say in the language tower's words, both norms held.

Not covered: towers behind a projector of more than one layer (give a direction of the stream).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision import metrics
from circuitvision.answers import contrast
from circuitvision.errors import InputError, warn
from circuitvision.model.cache import ActivationCache
from circuitvision.model.columns import Columns, plain
from circuitvision.model.output_head import LinearReadout
from circuitvision.model.positions import Positions, in_every_example, warn_of_empty
from circuitvision.readout.recorded import behind_cache, examples_of, tokens_of

if TYPE_CHECKING:
    from circuitvision.model.output_head import OutputHead
    from circuitvision.model.tokens import TokenMap
    from circuitvision.model.tower import Tower


def linear_readout(
    tower: Tower,
    cache: ActivationCache,
    final: Float[Tensor, "row pos d_model"],
    direction: Any,
    *,
    position: Any = None,
    aggregation: str | None = None,
) -> LinearReadout:
    """A direction (see :func:`direct_attribution` for its forms) as a linear function of the final residual of a run.

    Raises:
        InputError: a direction that does not fit the tower, no position where one is needed.
    """
    final = final.detach().to(torch.promote_types(final.dtype, torch.float32))
    rows, examples = examples_of(cache, tower.name, final.shape[0])
    position = in_every_example(position, examples)
    direction = direction_of(direction, examples)
    head = tower.output_head.in_run(cache)
    if isinstance(direction, Tensor) and not (head.compares and direction.shape[-1:] == (head.width,)):
        return _stream_direction(tower, cache, final, direction, position)
    position = _position_of(tower, direction, position)
    _check_readable(tower, position)
    chosen, label = _columns(head, direction, aggregation)
    chosen.check(examples)
    index = None if head.pools else positions_read(tower, cache, position, final.shape[:2])
    found = head.gradient(chosen, final, index, examples=rows)
    _warn_unless_finite(tower, found.value if index is None else found.value[index.any(1)])
    return replace(found, label=label)


def direction_of(direction: Any, examples: int) -> Any:
    """A direction of ``examples`` examples; a list as the answers, or answers and foils, of each.

    Raises:
        InputError: a list that may be meant as a contrast.
    """
    if isinstance(direction, metrics.Metric) or not isinstance(direction, list | np.ndarray | np.generic | Tensor):
        return direction if isinstance(direction, metrics.Metric) else plain(direction)
    found, listed = plain(direction), isinstance(direction, list)
    if not isinstance(found, list):
        return found
    answer, foil = contrast(found, None)
    if foil is not None:
        return {"answer": answer, "foil": foil}
    if listed and len(found) == examples == 2 and found[0] != found[1]:
        raise InputError(
            f"{found} with two examples can be read in two ways. The difference of the two answers is a tuple, ({found[0]!r}, {found[1]!r}); one "
            f"answer per example is {{'answer': {found}}}."
        )
    return {"answer": found}


def _check_readable(tower: Tower, position: Any) -> None:
    """Raises InputError where no position can be read, or none is given where the model does not choose one."""
    head, behind = tower.output_head, tower.reader is not tower
    if head.kind == "hidden" or (behind and head.linear_projector is None):
        raise InputError(
            f"The {tower.name} tower has no read-out that is affine in its stream; give a direction of the stream: a tensor "
            f"[{tower.cfg.d_model}] or one per row."
        )
    if head.pools and position is not None:
        raise InputError(f"The {tower.name} tower's output is pooled by the model; leave position= out.")
    if behind and position is None:
        raise InputError(
            f"Say which of the {tower.name} tower's patches speak: position= a number, or a selection (its mean is read)."
        )


def _columns(head: OutputHead, direction: Any, aggregation: str | None) -> tuple[Columns, str]:
    """The columns of the read-out that a direction is made of, one or the two of a difference, and what it is called."""
    if isinstance(direction, Tensor):
        chosen = head.columns(direction)
        if len(chosen.labels) != 1:
            raise InputError("A direction is one embedding, [d_shared].")
        return chosen, "embedding"
    answer, foil, label = _answers(direction)
    answer, foil = _from_end(answer, head), _from_end(foil, head)
    single = [item for item in (answer, foil) if isinstance(item, str | int)]
    chosen = head.columns({"answer": answer} if foil is None else (answer, foil), aggregation=aggregation)
    if not isinstance(direction, metrics.Metric) and len(single) == len(chosen.labels):
        names = head.names([item for item in single if isinstance(item, int)])
        label = " - ".join(names.get(str(item), str(item)) for item in single)
    return chosen, label


def _warn_unless_finite(tower: Tower, value: Tensor) -> None:
    lost = int((~value.isfinite()).sum())
    if lost:
        warn(
            f"What the {tower.name} tower says is not finite in {lost} of {len(value)} rows of this run, and so are the shares there. Eager "
            "attention in float64 makes NaN of left padding: pad on the right, or use float32."
        )


def _position_of(tower: Tower, direction: Any, position: Any) -> Any:
    """The position asked for, or the one that a metric reads.

    Raises:
        InputError: both are given, and differ.
    """
    own = None
    if isinstance(direction, metrics.LogitDiff):
        own = direction.position
    if isinstance(direction, metrics.ActionDim):
        size = int(tower.config_of_model.chunk_size)
        # The chunk stands at the end of the tower's positions.
        own = "all" if direction.step is None else direction.step % size - size
    if own is None or Positions.of(own).kind == "last":
        return position
    if position is not None and Positions.of(position) != Positions.of(own):
        raise InputError(
            f"The metric reads position {Positions.of(own).text} and position={Positions.of(position).text} is given; give one of them."
        )
    return own


def _from_end(answer: Any, head: OutputHead) -> Any:
    """A negative action dimension counted from the end, as metrics count it."""
    size = head.size
    if head.kind == "actions" and isinstance(answer, int) and size is not None and -size <= answer < 0:
        return answer + size
    return answer


def _answers(direction: Any) -> tuple[Any, Any, str]:
    """Answer, foil (or None) and label of a direction."""
    if isinstance(direction, metrics.LogitDiff):
        return direction.answer, direction.foil, direction.name
    if isinstance(direction, metrics.ActionDim):
        return direction.dim, None, direction.name
    if callable(direction):
        raise InputError(
            f"A direction is an answer, a pair (answer, foil), a tensor, or cv.metrics.logit_diff(…); {direction!r} is not linear in the logits."
        )
    if isinstance(direction, Mapping):
        if set(direction) - {"answer", "foil"} or "answer" not in direction:
            raise InputError("A mapping gives 'answer' and, for a difference, 'foil', each one per example.")
        foil = direction.get("foil")
        return direction["answer"], foil, "answer" if foil is None else "answer - foil"
    if isinstance(direction, tuple):
        answer, foil = contrast(direction, None)
        return answer, foil, f"{answer} - {foil}"
    if isinstance(direction, str | int):
        return direction, None, str(direction)
    raise InputError(
        f"A direction is an answer, a pair (answer, foil), a mapping, a metric or a tensor, not {direction!r}."
    )


def _stream_direction(
    tower: Tower, cache: ActivationCache, final: Tensor, direction: Tensor, position: Any
) -> LinearReadout:
    fits = direction.ndim == 1 or (direction.ndim == 2 and direction.shape[0] == final.shape[0])
    if not fits or direction.shape[-1] != tower.cfg.d_model:
        raise InputError(
            f"A direction of the stream is [{tower.cfg.d_model}] or one per row ({final.shape[0]}), not {tuple(direction.shape)}."
        )
    # A class token that the projector drops says nothing.
    if position is None and tower.stack.image and tower.n_dropped_in(cache.inputs) == tower.cfg.n_prefix:
        raise InputError("Say where the direction is read: position= a number, or a selection (its mean is read).")
    default = 0 if tower.stack.image else "last"
    index = positions_read(tower, cache, default if position is None else position, final.shape[:2])
    share = index.to(final) / index.sum(-1, keepdim=True).to(final)
    direction = direction.detach().to(final).expand(final.shape[0], -1)
    gradient = share[..., None] * direction[:, None]
    value = (gradient * final).flatten(1).sum(-1)
    return LinearReadout(gradient, torch.zeros_like(value), value, value, "direction")


def positions_read(
    tower: Tower, cache: ActivationCache, position: Any, shape: Sequence[int]
) -> Bool[Tensor, "row pos"]:
    """The positions read, whose mean is taken where there are several: by default the last of a row, for actions the first of the chunk.

    Positions are the tower's; in a later pass of ``generate`` those of the pass. A row in which a region is empty has none; in
    a run of some examples of a data set all may be so.

    Raises:
        InputError: positions of another tower or run, or outside what is read.
    """
    rows, length = shape
    chunk = tower.output_head.table.pool == "chunk"
    start = length - int(tower.config_of_model.chunk_size) if chunk else 0
    positions = Positions.of((start if chunk else "last") if position is None else position)
    behind = behind_cache(tower, cache, length)
    tokens = _map_of(tower, cache, rows, behind + length)
    if positions.kind in ("ints", "slice") or tokens is None:
        mask = _in_pass(tower, positions, rows, length, behind)
    else:
        mask = positions.resolve(tokens)[:, behind:]
        mask &= torch.from_numpy(tokens.present[:, behind:]) if positions.kind == "all" else torch.ones_like(mask)
    if positions.kind in ("all", "there", "slice"):
        mask[:, :start] = False
    read = mask.any(1)
    of_data = positions.examples is not None
    none = not bool(read.all() if not positions.may_be_empty else of_data or read.any())
    if bool(mask[:, :start].any()) or none:
        numbers = f"{behind + start}…{behind + length - 1}" + ", behind those of the cache" * bool(behind)
        raise InputError(
            f"Position {positions.text!r} is outside the {length - start} positions that are read here ({numbers})."
        )
    if not of_data:
        warn_of_empty({positions.text: int((~read).sum())}, rows)
    return mask


def _map_of(tower: Tower, cache: ActivationCache, rows: int, length: int) -> TokenMap | None:
    """The token map of a tower, if the pass read holds all of its positions: a later pass holds only what it generated, all of it real."""
    if cache.model is None or not cache.inputs:
        return None
    tokens = tokens_of(cache, tower.name)
    return tokens if tokens.n_positions == length and tokens.n_rows == rows else None


def _in_pass(tower: Tower, positions: Positions, rows: int, length: int, behind: int) -> Tensor:
    """Numbers, "last", a mask or all positions of one pass."""
    mask = torch.zeros(rows, length, dtype=torch.bool)
    if positions.tower not in ("", tower.name):
        raise InputError(f"The positions are of the {positions.tower} tower; select in {tower.name}.")
    if positions.kind in ("all", "there"):
        return ~mask
    if positions.kind == "mask" and positions.mask is not None and tuple(positions.mask.tensor.shape[-1:]) == (length,):
        return positions.mask.tensor.cpu().expand(rows, length).clone()
    if positions.kind not in ("ints", "slice", "last"):
        raise InputError(
            f"What the positions of this pass are is not known, so {positions.text!r} names none of them; give a number, or 'last'."
        )
    total = behind + length
    numbers = (
        range(total)[slice(*positions.bounds)]
        if positions.kind == "slice"
        else (*positions.ints, *[-1] * (positions.kind == "last"))
    )
    for number in numbers:
        at = number + total if number < 0 else number
        if not behind <= at < total:
            past = ", behind those of the cache" * bool(behind)
            raise InputError(
                f"Position {number} is outside the {length} positions that are read here ({behind}…{total - 1}{past})."
            )
        mask[:, at - behind] = True
    return mask
