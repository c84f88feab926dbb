"""Which vectors of a tower's stream its output head reads: pooling rules of the tables (``spec.POOLS``), and the attention of a pooling head.

Not covered: pooling heads that are no ``nn.MultiheadAttention`` and MLP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.points import Call, PoolAttention
from circuitvision.model.spec import require
from circuitvision.model.weights import attention_weights

if TYPE_CHECKING:
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Tower


def pool(tower: Tower, rule: str, value: Tensor, context: ActivationCache | None) -> Tensor:
    """The linear pooling rules: which positions the head reads, or their mean."""
    n_prefix = tower.cfg.n_prefix
    if rule == "none":
        return value
    if rule == "cls":
        return value[:, 0]
    if rule == "cls+distillation":
        return value[:, :2]
    if rule == "cls+mean_patch":
        return torch.cat([value[:, 0], value[:, n_prefix:].mean(dim=1)], dim=1)
    if rule == "mean_patch":
        return value[:, n_prefix:].mean(dim=1)
    if rule == "mean":
        return _masked_mean(value, context)
    if rule == "last":
        return value[:, -1]
    if rule == "chunk":
        return value[:, -int(tower.config_of_model.chunk_size) :]
    if rule in ("eos", "first_eos"):
        return value[torch.arange(value.shape[0], device=value.device), eos_positions(tower, inputs_of_run(context))]
    raise UnsupportedModelError(f"Unknown pooling rule {rule!r} in the table of the {tower.family.name} family.")


def _masked_mean(value: Tensor, context: ActivationCache | None) -> Tensor:
    mask = None if context is None else context.inputs.get("pixel_attention_mask")
    if mask is None:
        return value.mean(dim=1)
    weights = mask[..., None].to(value.device)
    return (value * weights).sum(dim=1) / weights.sum(dim=1)


def attention_pool(
    tower: Tower, path: Any, normed: Tensor, context: ActivationCache | None, frozen: Tensor | None
) -> Tensor:
    """The output of the pooling head at ``path``. With ``frozen`` (normed as well) its pattern and all that follows its attention are those of
    ``frozen``: affine."""
    head: Any = require(tower.module, path or "", "pooling head")
    mask = None if context is None else context.inputs.get("pixel_attention_mask")
    arguments = () if mask is None else (mask,)
    if frozen is None:
        return head(normed, *arguments)
    calls: list[Call] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(module, args, kwargs, output))

    attention = require(head, "attention", "attention of the pooling head")
    handle = attention.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            total = head(frozen, *arguments)
    finally:
        handle.remove()
    (call,) = calls
    pattern = PoolAttention("pattern", attention, "post", stage="hook_pattern").value(call).detach()
    rest = total - call.tensor()[:, 0]
    return _weighted_values(attention, pattern, normed) + rest.detach()


def _weighted_values(
    attention: Any, pattern: Float[Tensor, "row head 1 pos"], source: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row d_model"]:
    """What an ``nn.MultiheadAttention`` writes for one query when its pattern is given."""
    weight, bias, out, out_bias = attention_weights(attention)
    own = None if bias is None else bias.chunk(3)[2]
    v = nn.functional.linear(source, weight.chunk(3)[2], own).unflatten(-1, (attention.num_heads, -1))
    z = torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v).flatten(-2)
    return nn.functional.linear(z, out, out_bias)[:, 0]


def inputs_of_run(context: ActivationCache | None) -> dict[str, Any]:
    """The inputs of the run that a read-out depends on; InputError without one."""
    if context is None:
        raise InputError(
            "This read-out depends on the run (where the text ends, the other tower's embeddings); give context=cache."
        )
    return context.inputs


def eos_positions(tower: Tower, inputs: Any) -> Tensor:
    """Where a text tower is read that reads the end of the text, by its pooling rule (see ``spec.POOLS``)."""
    ids = inputs["input_ids"].to(torch.int)
    eos = tower.config.eos_token_id
    by_highest = eos == 2 and tower.output_head.table.pool == "eos"
    return ids.argmax(-1) if by_highest else (ids == eos).int().argmax(-1)
