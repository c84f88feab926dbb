"""Read-outs: from a tower's residual stream to the family's own output, through the model's own modules.

A :class:`Reading` is one way of doing it. Its ``output`` pools as the family does: at the last layer it equals what the model returns wherever
the tower feeds the output, at other layers the same map is a lens. Its ``positions`` reads every position as if the family pooled that one
alone, so that

* pooling at a position (CLS, end of text): the pooled position's reading is the output;
* pooling by a mean: the mean of the readings is the output (before an embedding is brought to unit length);
* DINOv2, whose head reads CLS beside the mean patch: CLS goes through its half of the head, other positions through the other half, each with
  the head's bias, so CLS plus the mean patch is the output plus the bias; DeiT's two heads read their own tokens, other positions go through
  the mean of the heads;
* attention pooling (SigLIP): the pooling head sees the position alone.

The final norm is applied once, with the statistics of the vector itself ("own"), of a reference residual ("frozen": the whole read-out is then
affine in the residual, also in what follows the norm: an embedding is divided by the reference's length, a pooling head keeps the reference's
pattern and MLP), or not at all ("none"). A projector of several layers is no part of that: frozen, its norms are held, its activation is not.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.links import Link
from circuitvision.model.norms import frozen_norm
from circuitvision.model.points import Call, PoolAttention, substitute
from circuitvision.model.settings import entries
from circuitvision.model.spec import Readout, require, resolve
from circuitvision.model.weights import (
    attention_weights,
    embedding_weight,
    linear_weight,
    main_device,
    parameter,
    passes_gradient,
)

if TYPE_CHECKING:
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Tower

NORM_POLICIES = ("own", "frozen", "none")
_AT_ONE_POSITION = ("cls", "last", "eos", "first_eos")


def read_out(tower: Tower, resid: Tensor, context: ActivationCache | None) -> Tensor:
    """The family's output computed from a residual ``[row pos d_model]`` of ``tower``; see :meth:`Tower.readout`."""
    return Reading(tower, context).output(resid)


class Reading:
    """One way of reading a tower's residual stream.

    ``reference`` is the residual ``[row pos d_model]`` that frozen statistics are taken from. ``against`` are unit embeddings ``[target
    d_shared]`` that a dual encoder is compared with, instead of those of the run. Without ``capped`` a soft cap on the logits is left out.

    Raises:
        InputError: a frozen norm without a reference.
    """

    def __init__(
        self,
        tower: Tower,
        context: ActivationCache | None = None,
        *,
        norm: str = "own",
        reference: Tensor | None = None,
        against: Tensor | None = None,
        capped: bool = True,
    ) -> None:
        if norm not in NORM_POLICIES:
            raise InputError(f"Unknown norm {norm!r}; choose one of {', '.join(NORM_POLICIES)}.")
        if norm == "frozen" and reference is None:
            raise InputError("A frozen norm takes its statistics from a residual of the run; give reference=.")
        self.tower, self.context, self.norm, self.capped = tower, context, norm, capped
        self.reference = reference if norm == "frozen" else None
        self.against = against
        self.readout = tower.spec.readout or Readout()
        self.headless = tower.spec.readout is None

    # -- the family's own output -----------------------------------------------------------------------------------------------------------

    def output(self, resid: Float[Tensor, "row pos d_model"]) -> Tensor:
        """The family's output, pooled as the family pools."""
        if self.headless:
            if self.tower.family.output == "last_hidden_state":
                return self._norm(resid, self.reference)
            raise UnsupportedModelError(
                f"The {self.tower.name} tower has no read-out; project on a direction of your own instead."
            )
        if self.tower.connector is not None:
            return through_projector(self.tower, self.readout, resid, self.context, reading=self)
        pooled = self._pooled(resid, self.reference)
        return self._finish(pooled, self._own())

    def embedding(self, resid: Float[Tensor, "row pos d_model"]) -> Tensor:
        """What the head makes of the pooled residual, before embeddings are compared or a soft cap is taken."""
        return self._headed(self._pooled(resid, self.reference))

    def _own(self) -> Float[Tensor, "... d_shared"] | None:
        """The reference's embedding, whose length a frozen reading divides by."""
        if self.reference is None or self.readout.finish != "contrast":
            return None
        return Reading(self.tower, self.context).embedding(self.reference)

    def _pooled(self, resid: Tensor, reference: Tensor | None) -> Tensor:
        readout = self.readout
        first = readout.normed and readout.norm_first
        normed = self._norm(resid, reference) if first else resid
        if readout.pool == "attention":
            frozen = None if reference is None else Reading(self.tower, self.context)._norm(reference, None)
            return _attention_pool(self.tower, readout, normed, self.context, frozen)
        pooled = pool(self.tower, readout.pool, normed, self.context)
        if not readout.normed or readout.norm_first:
            return pooled
        return self._norm(
            pooled, None if reference is None else pool(self.tower, readout.pool, reference, self.context)
        )

    def _norm(self, value: Tensor, reference: Tensor | None) -> Tensor:
        norm = self.tower.final_norm
        if norm is None or self.norm == "none":
            return value
        return norm(value) if reference is None else frozen_norm(norm, value, reference)

    def _headed(self, pooled: Tensor) -> Tensor:
        """What the head makes of pooled vectors."""
        readout, module = self.readout, self.tower.module
        head = resolve(module, readout.head)
        if readout.finish == "mean_heads":
            assert head is not None
            return (_called(head, pooled[:, 0]) + _called(_second_head(self.tower), pooled[:, 1])) / 2
        if head is not None:
            return _called(head, pooled)
        if readout.tied_lens is not None:
            table = require(module, readout.tied_lens, "tied embedding")
            return pooled @ embedding_weight(table, pooled.dtype, pooled.device).T
        return pooled

    def _finish(self, pooled: Tensor, own: Tensor | None) -> Tensor:
        out = self._headed(pooled)
        if self.readout.finish != "contrast":
            return self.cap(out)
        logits = self._contrast(out, own)
        return logits.T if self.against is None and not self.tower.stack.image else logits

    def cap(self, logits: Tensor) -> Tensor:
        """Logits under the family's soft cap, where it has one."""
        softcap = self.capped and self.readout.finish == "softcap" and _caps_logits(self.tower)
        if not softcap:
            return logits
        cap = self.tower.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap

    def _contrast(self, embedding: Tensor, own: Tensor | None) -> Tensor:
        """Scaled cosines of embeddings with those of the other tower, last axis: the other tower's rows."""
        theirs = self.against if self.against is not None else other_embeddings(self.tower, self.context)
        mine = _unit(embedding, embedding if own is None else own)
        theirs = theirs.to(mine)
        model: Any = self.tower.module
        # The model multiplies text by image: the same order of operands keeps the same bits.
        if self.tower.stack.image and mine.ndim == 2:
            logits = ((theirs @ mine.T) * parameter(model, "logit_scale").exp()).T
        else:
            logits = (mine @ theirs.T) * parameter(model, "logit_scale").exp()
        return logits if getattr(model, "logit_bias", None) is None else logits + parameter(model, "logit_bias")

    # -- every position for itself ---------------------------------------------------------------------------------------------------------

    def positions(
        self, resid: Float[Tensor, "row pos d_model"], start: int = 0, reference: Tensor | None = None
    ) -> Float[Tensor, "row pos n_out"]:
        """What each position says by itself. ``start`` is the number of the first position given, ``reference`` that of these positions alone.

        Raises:
            UnsupportedModelError: a tower without a head.
        """
        readout = self.readout
        if self.headless or self.tower.connector is not None or (readout.finish == "none" and not _has_head(readout)):
            raise UnsupportedModelError(f"The {self.tower.name} tower has no head of its own.")
        frozen = (reference if reference is not None else self.reference) if self.norm == "frozen" else None
        out = self._alone(resid, start, frozen)
        if readout.finish != "contrast":
            return self.cap(out)
        own = None if frozen is None else Reading(self.tower, self.context)._alone(frozen, start, None)
        return self._contrast(out, own)

    def normed(self, resid: Float[Tensor, "row pos d_model"], reference: Tensor | None = None) -> Tensor:
        """The final norm of every position, where the family applies one before its head (or to its last hidden state)."""
        frozen = (reference if reference is not None else self.reference) if self.norm == "frozen" else None
        return self._norm(resid, frozen) if self.readout.normed else resid

    def _alone(self, resid: Tensor, start: int, reference: Tensor | None) -> Tensor:
        """What the head makes of each position as if the family pooled that one alone."""
        normed = self._norm(resid, reference) if self.readout.normed else resid
        if self.readout.pool != "attention":
            return self._each_head(normed, start)
        single = normed.reshape(-1, 1, normed.shape[-1])
        held = None if reference is None else Reading(self.tower).normed(reference).reshape(single.shape)
        return _attention_pool(self.tower, self.readout, single, None, held).view(*normed.shape[:2], -1)

    def _each_head(self, normed: Tensor, start: int) -> Tensor:
        """The head on every position, where it reads several pooled vectors at once: on the part that a position takes."""
        if self.readout.pool not in ("cls+mean_patch", "cls+distillation"):
            return self._headed(normed)
        head: Any = require(self.tower.module, self.readout.head or "", "head")
        if self.readout.pool == "cls+mean_patch":
            nothing = torch.zeros_like(normed)
            out = _called(head, torch.cat([nothing, normed], dim=-1))
            cls = _called(head, torch.cat([normed[:, :1], nothing[:, :1]], dim=-1))
            return torch.cat([cls, out[:, 1:]], dim=1) if start == 0 else out
        second = _second_head(self.tower)
        one, two = _called(head, normed), _called(second, normed)
        out = (one + two) / 2
        for index, own in ((0, one), (1, two)):
            if start <= index < start + normed.shape[1]:
                out = torch.cat([out[:, : index - start], own[:, index - start, None], out[:, index - start + 1 :]], 1)
        return out


def _has_head(readout: Readout) -> bool:
    return readout.head is not None or readout.tied_lens is not None or readout.second_head is not None


def _called(head: nn.Module, value: Tensor) -> Tensor:
    """What a head makes of ``value``; one that passes no gradient (dynamically quantised) gets that of its dequantised weight."""
    out = head(value)
    if not (torch.is_grad_enabled() and value.requires_grad) or passes_gradient(head):
        return out
    weight, bias = linear_weight(head, value.dtype, value.device)
    return substitute(out, value @ weight if bias is None else value @ weight + bias)


def _second_head(tower: Tower) -> nn.Module:
    readout = tower.spec.readout
    return require(tower.module, (readout and readout.second_head) or "", "second head")


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
        return value[torch.arange(value.shape[0], device=value.device), eos_positions(tower, _inputs(context))]
    raise UnsupportedModelError(f"Unknown pooling rule {rule!r} in the table of the {tower.family.name} family.")


def _masked_mean(value: Tensor, context: ActivationCache | None) -> Tensor:
    mask = None if context is None else context.inputs.get("pixel_attention_mask")
    if mask is None:
        return value.mean(dim=1)
    weights = mask[..., None].to(value.device)
    return (value * weights).sum(dim=1) / weights.sum(dim=1)


def _attention_pool(
    tower: Tower, readout: Readout, normed: Tensor, context: ActivationCache | None, frozen: Tensor | None
) -> Tensor:
    """The pooling head's output. With ``frozen`` (normed as well) its pattern and all that follows its attention are those of ``frozen``: affine."""
    head: Any = require(tower.module, readout.pool_module or "", "pooling head")
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
    return weighted_values(attention, pattern, normed) + rest.detach()


def weighted_values(
    attention: Any, pattern: Float[Tensor, "row head 1 pos"], source: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row d_model"]:
    """What an ``nn.MultiheadAttention`` writes for one query when its pattern is given."""
    weight, bias, out, out_bias = attention_weights(attention)
    own = None if bias is None else bias.chunk(3)[2]
    v = nn.functional.linear(source, weight.chunk(3)[2], own).unflatten(-1, (attention.num_heads, -1))
    z = torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v).flatten(-2)
    return nn.functional.linear(z, out, out_bias)[:, 0]


def through_projector(
    tower: Tower,
    readout: Readout,
    resid: Tensor,
    context: ActivationCache | None,
    has_prefix: bool = True,
    reading: Reading | None = None,
) -> Tensor:
    """What the projector makes of a residual at the feature layer (other feature layers, and other towers that feed it, are those of the run).

    ``has_prefix=False`` says that the residual is of patches alone, so that no CLS position is there to drop. ``reading`` says how the tower's
    own final norm is taken, where it comes before the projector.
    """
    connector = tower.connector
    assert connector is not None
    parts = []
    for source in connector.sources:
        if source == tower.name:
            parts += _features(tower, readout, resid, context, has_prefix, reading)
            continue
        other = tower.siblings[source]
        if context is None:
            raise InputError(
                f"{connector.name} joins what the {' and '.join(connector.sources)} towers give; give context=cache."
            )
        last = _held(context, other.residual_name(max(other.feature_layers_in(context.inputs)))).to(resid)
        parts += _features(other, other.spec.readout or Readout(), last, context)
    joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return tower.connected(joined, None if context is None else context.inputs)


def _features(
    tower: Tower,
    readout: Readout,
    resid: Tensor,
    context: ActivationCache | None,
    has_prefix: bool = True,
    reading: Reading | None = None,
) -> list[Tensor]:
    """What a tower gives to its connector, by feature layer."""
    inputs = None if context is None else context.inputs
    layers = tower.feature_layers_in(inputs)
    if len(layers) > 1 and not has_prefix:
        raise InputError(
            f"This model concatenates the feature layers {layers}, which have a prefix; read a site that has it too."
        )
    parts = [resid]
    if len(layers) > 1:
        if context is None:
            raise InputError(f"This model concatenates the feature layers {layers}; give context=cache for the others.")
        parts = [
            resid if layer == max(layers) else _held(context, tower.residual_name(layer)).to(resid) for layer in layers
        ]
    if readout.normed:
        reading = Reading(tower, context) if reading is None else reading
        held = None if reading.reference is None else reading.reference[:, -resid.shape[1] :]
        parts = [reading.normed(part, held) for part in parts]
    dropped = tower.n_dropped_in(inputs) if has_prefix else 0
    return [part[:, dropped:] for part in parts]


def _held(context: ActivationCache, name: str) -> Tensor:
    """A site of the run's first pass of its tower, as a tensor that may be tracked."""
    value = context.one_pass(name, 0)
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value


def _inputs(context: ActivationCache | None) -> dict[str, Any]:
    if context is None:
        raise InputError(
            "This read-out depends on the run (where the text ends, the other tower's embeddings); give context=cache."
        )
    return context.inputs


def eos_positions(tower: Tower, inputs: Any) -> Tensor:
    """Where a text tower is read that reads the end of the text, by its pooling rule (see ``spec.POOLS``)."""
    ids = inputs["input_ids"].to(torch.int)
    eos = tower.config.eos_token_id
    by_highest = eos == 2 and tower.spec.readout is not None and tower.spec.readout.pool == "eos"
    return ids.argmax(-1) if by_highest else (ids == eos).int().argmax(-1)


def _caps_logits(tower: Tower) -> bool:
    # Before 5.23, transformers left PaliGemma 2's logits uncapped: only the class itself says what it computes.
    configured = getattr(tower.config, "final_logit_softcapping", None) is not None
    return configured and "final_logit_softcapping" in inspect.getsource(type(tower.module))


def _unit(embedding: Tensor, measured: Tensor) -> Tensor:
    return embedding / measured.pow(2).sum(-1, keepdim=True).pow(0.5)


def other_embeddings(tower: Tower, context: ActivationCache | None) -> Float[Tensor, "row d_shared"]:
    """The unit embeddings that the other tower of a dual encoder had in the run."""
    other = next(t for name, t in tower.siblings.items() if name != tower.name)
    _inputs(context)
    assert context is not None
    # A cache may have been recorded on another device, or converted.
    theirs = _held(context, f"{other.name}.hook_readout").to(main_device(other.root), other.dtype)
    spec = other.spec.readout
    other_head = resolve(other.module, spec.head if spec else None)
    theirs = theirs if other_head is None else other_head(theirs)
    return _unit(theirs, theirs)


def link(tower: Tower) -> Link:
    """What turns the numbers of a tower's head into probabilities: how the configuration says it was trained."""
    readout = tower.spec.readout
    if tower.connector is not None:
        return link(tower.reader)
    if readout is not None and readout.finish == "contrast":
        return "softmax" if getattr(tower.module, "logit_bias", None) is None else "sigmoid"
    if readout is None or readout.pool == "chunk" or not _has_head(readout):
        return "none"
    if not tower.stack.image:
        return "softmax"
    if tower.family.output != "logits":
        return "none"
    config = entries(tower.config_of_model)
    problem = config.get("problem_type")
    if problem is None and len(config.get("id2label") or ()) == 1:
        # transformers trains such a head by its squared error.
        problem = "regression"
    links: dict[Any, Link] = {"multi_label_classification": "sigmoid", "regression": "none"}
    return links.get(problem, "softmax")


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
