"""Read-outs: from a tower's residual stream to the family's own output, through the model's own modules.

``readout(resid_post[last])`` equals what the model returns wherever the tower feeds the output; at other layers the same map is a lens. The
final norm is applied to the residual it is given, once.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.spec import Readout, require, resolve

if TYPE_CHECKING:
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Tower


def read_out(tower: Tower, resid: Tensor, context: ActivationCache | None) -> Tensor:
    """The family's output computed from a residual ``[row pos d_model]`` of ``tower``; see :meth:`Tower.readout`."""
    readout = tower.spec.readout
    if readout is None:
        if tower.family.output == "last_hidden_state":
            return _norm(tower, resid)
        raise UnsupportedModelError(
            f"The {tower.name} tower has no read-out; project on a direction of your own instead."
        )
    if readout.finish == "projector":
        return _through_projector(tower, readout, resid, context)
    pooled = _pool(tower, readout, resid, context)
    return _finish(tower, readout, pooled, context)


def _norm(tower: Tower, resid: Tensor) -> Tensor:
    return resid if tower.final_norm is None else tower.final_norm(resid)


def _through_projector(tower: Tower, readout: Readout, resid: Tensor, context: ActivationCache | None) -> Tensor:
    layers = tower.feature_layers
    parts = [resid]
    if len(layers) > 1:
        if context is None:
            raise InputError(f"This model concatenates the feature layers {layers}; give context=cache for the others.")
        deepest = max(range(len(layers)), key=lambda index: layers[index])
        parts = [
            resid if index == deepest else context[tower.residual_name(layer)] for index, layer in enumerate(layers)
        ]
    if readout.normed:
        parts = [_norm(tower, part) for part in parts]
    if tower.drops_cls:
        parts = [part[:, 1:] for part in parts]
    projector = require(tower.module, tower.family.projector or "", "projector")
    return projector(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])


def _pool(tower: Tower, readout: Readout, resid: Tensor, context: ActivationCache | None) -> Tensor:
    normed = _norm(tower, resid) if readout.normed and readout.norm_first else resid
    n_prefix = tower.cfg.n_prefix
    rule = readout.pool
    if rule == "none":
        pooled = normed
    elif rule == "cls":
        pooled = normed[:, 0]
    elif rule == "cls+distillation":
        pooled = normed[:, :2]
    elif rule == "cls+mean_patch":
        pooled = torch.cat([normed[:, 0], normed[:, n_prefix:].mean(dim=1)], dim=1)
    elif rule == "mean_patch":
        pooled = normed[:, n_prefix:].mean(dim=1)
    elif rule == "mean":
        pooled = _masked_mean(normed, context)
    elif rule == "last":
        pooled = normed[:, -1]
    elif rule == "chunk":
        pooled = normed[:, -int(tower.config_of_model.chunk_size) :]
    elif rule == "eos":
        pooled = normed[torch.arange(normed.shape[0], device=normed.device), eos_positions(tower, _inputs(context))]
    elif rule == "attention":
        pooled = _attention_pool(tower, readout, normed, context)
    else:
        raise UnsupportedModelError(f"Unknown pooling rule {rule!r} in the table of the {tower.family.name} family.")
    return _norm(tower, pooled) if readout.normed and not readout.norm_first else pooled


def _masked_mean(normed: Tensor, context: ActivationCache | None) -> Tensor:
    mask = None if context is None else context.inputs.get("pixel_attention_mask")
    if mask is None:
        return normed.mean(dim=1)
    weights = mask[..., None].to(normed.device)
    return (normed * weights).sum(dim=1) / weights.sum(dim=1)


def _attention_pool(tower: Tower, readout: Readout, normed: Tensor, context: ActivationCache | None) -> Tensor:
    head = require(tower.module, readout.pool_module or "", "pooling head")
    mask = None if context is None else context.inputs.get("pixel_attention_mask")
    return head(normed) if mask is None else head(normed, mask)


def _inputs(context: ActivationCache | None) -> dict[str, Any]:
    if context is None:
        raise InputError(
            "This read-out depends on the run (where the text ends, the other tower's embeddings); give context=cache."
        )
    return context.inputs


def eos_positions(tower: Tower, inputs: Any) -> Tensor:
    """Where CLIP's text tower is read: the argmax of the ids when the configured eos id is 2, else the first eos."""
    ids = inputs["input_ids"].to(torch.int)
    eos = tower.config.eos_token_id
    return ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)


def _finish(tower: Tower, readout: Readout, pooled: Tensor, context: ActivationCache | None) -> Tensor:
    head = resolve(tower.module, readout.head)
    if readout.finish == "mean_heads":
        second = require(tower.module, readout.second_head or "", "second head")
        assert head is not None
        return (head(pooled[:, 0]) + second(pooled[:, 1])) / 2
    if head is not None:
        out = head(pooled)
    elif readout.tied_lens is not None:
        table: Any = require(tower.module, readout.tied_lens, "tied embedding")
        out = pooled @ table.weight.T
    else:
        out = pooled
    if readout.finish == "contrast":
        return _contrast(tower, out, context)
    cap = tower.config.final_logit_softcapping if readout.finish == "softcap" and _caps_logits(tower) else None
    return out if cap is None else torch.tanh(out / cap) * cap


def _caps_logits(tower: Tower) -> bool:
    # Before 5.23, transformers left PaliGemma 2's logits uncapped: only the class itself says what it computes.
    configured = getattr(tower.config, "final_logit_softcapping", None) is not None
    return configured and "final_logit_softcapping" in inspect.getsource(type(tower.module))


def _contrast(tower: Tower, embedding: Tensor, context: ActivationCache | None) -> Tensor:
    other = next(t for name, t in tower.siblings.items() if name != tower.name)
    _inputs(context)
    assert context is not None
    theirs = context[f"{other.name}.hook_readout"]
    spec = other.spec.readout
    other_head = resolve(other.module, spec.head if spec else None)
    theirs = theirs if other_head is None else other_head(theirs)
    mine = embedding / embedding.pow(2).sum(-1, keepdim=True).pow(0.5)
    theirs = (theirs / theirs.pow(2).sum(-1, keepdim=True).pow(0.5)).to(mine.dtype)
    model: Any = tower.module
    image, text = (mine, theirs) if tower.name == "vision" else (theirs, mine)
    logits = (text @ image.T) * model.logit_scale.exp()
    bias = getattr(model, "logit_bias", None)
    return (logits if bias is None else logits + bias).T


def unembedding(tower: Tower) -> tuple[nn.Module, str] | None:
    """The linear head that reads this tower, and what kind of weight it is: "W_U" or "W_proj"."""
    readout = tower.spec.readout
    if readout is None or readout.second_head is not None:
        # The mean of two heads that read two positions is no single matrix.
        return None
    if readout.head is not None:
        return require(tower.module, readout.head, "head"), "W_proj" if readout.finish == "contrast" else "W_U"
    if readout.tied_lens is not None:
        return require(tower.module, readout.tied_lens, "tied embedding"), "tied"
    return None
