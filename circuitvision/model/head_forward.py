"""What an output head computes: from a tower's residual stream to the family's own output, through the model's own modules.

``read`` pools as the family does: at the last layer (LLaVA: the feature layer) it is what the model returns, at other layers the same map is a lens.
``positions`` reads every position as if the family pooled that one alone, so that

* pooling at a position (CLS, end of text): the pooled position's reading is the output;
* pooling by a mean: the mean of the readings is the output (before an embedding is brought to unit length);
* DINOv2, whose head reads CLS beside the mean patch: CLS goes through its half of the head, other positions through the other half, each with
  the head's bias, so CLS plus the mean patch is the output plus the bias; DeiT's two heads read their own tokens, other positions go through
  the mean of the heads;
* attention pooling (SigLIP): the pooling head sees the position alone.

The final norm is applied once, with the statistics of the vector itself ("own"), of a reference residual ("frozen": all is then affine in the
residual, also behind the norm: an embedding is divided by the reference's length, a pooling head keeps the reference's pattern and MLP), or not at
all ("none"). A tower behind a connector is read by the head of the tower that it feeds; a projector of several layers is not frozen, its norms are.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.norms import frozen_norm
from circuitvision.model.points import substitute
from circuitvision.model.pooling import attention_pool, inputs_of_run, pool
from circuitvision.model.spec import Readout, require, resolve
from circuitvision.model.weights import embedding_weight, linear_weight, main_device, parameter, passes_gradient

if TYPE_CHECKING:
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Tower

NORM_POLICIES = ("own", "frozen", "none")


class HeadForward:
    """The output head of ``tower`` as a map, by itself or with the cache of a run.

    ``reference`` is the residual ``[row pos d_model]`` that frozen statistics are taken from. ``against`` are vectors that make the columns in place
    of the head's own: unit embeddings ``[column d_shared]`` that a dual encoder is compared with, elsewhere directions ``[column width]`` of what an
    embedding head gives, or of the normed stream. Without ``capped`` a soft cap on the logits is left out.

    Raises:
        InputError: an unknown norm, a frozen one without a reference.
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
        self.tower, self.context, self.norm, self.capped, self.against = tower, context, norm, capped, against
        self.reference = reference if norm == "frozen" else None
        self.table = tower.spec.readout or Readout()
        self.exists = tower.spec.readout is not None

    @property
    def kind(self) -> str:
        """What the columns are: "classes", "tokens", "texts", "images", "actions", "embedding", or "hidden" without a head.

        The vision tower of a vision-language model speaks in tokens: its read-out ends in the space that the language tower reads.
        """
        if not self.exists:
            return "hidden"
        if self.tower.connector is not None:
            return self.tower.reader.output_head.kind
        if self.table.finish == "contrast":
            return "texts" if self.tower.stack.image else "images"
        if self.table.head is None and self.table.tied_lens is None:
            return "hidden"
        if self.table.pool == "chunk":
            return "actions"
        if not self.tower.stack.image:
            return "tokens"
        return "classes" if self.tower.family.output == "logits" else "embedding"

    @property
    def compares(self) -> bool:
        """Whether it compares embeddings with those of the other tower of a dual encoder."""
        return self.kind in ("texts", "images")

    @property
    def pools(self) -> bool:
        """Whether the family pools positions before the head reads them."""
        return self.table.pool not in ("none", "chunk")

    @property
    def directed(self) -> bool:
        """Whether its columns are directions given in place of the family's own."""
        return self.against is not None and not self.compares

    @property
    def along_stream(self) -> bool:
        """Whether its columns are directions of the normed stream, so that its module reads nothing."""
        return self.directed and self.kind != "embedding"

    @property
    def module(self) -> nn.Module | None:
        """The linear head (the first of two), or the embedding it is tied to; None where the table names none."""
        if self.table.head is not None:
            return require(self.tower.module, self.table.head, "head")
        tied = self.table.tied_lens
        return None if tied is None else require(self.tower.module, tied, "tied embedding")

    @property
    def _second_head(self) -> nn.Module:
        return require(self.tower.module, self.table.second_head or "", "second head")

    # -- the family's own output -----------------------------------------------------------------------------------------------------------

    def read(self, resid: Float[Tensor, "row pos d_model"]) -> Tensor:
        """The family's output, pooled as the family pools; behind a connector what enters the tower that it feeds.

        Raises:
            UnsupportedModelError: a tower without a read-out. InputError: a run is needed, and none is given.
        """
        if not self.exists:
            if self.tower.family.output == "last_hidden_state":
                return self._norm(resid, self.reference)
            raise UnsupportedModelError(
                f"The {self.tower.name} tower has no read-out; project on a direction of your own instead."
            )
        if self.tower.connector is not None:
            return self.projected(resid)
        logits = self.logits(resid)
        return logits.T if self.kind == "images" and self.against is None else logits

    def logits(self, resid: Float[Tensor, "row pos d_model"]) -> Tensor:
        """:meth:`read` by the tower's own rows: of a dual encoder's text tower ``[text image]``."""
        out = self.embedding(resid)
        if self.table.finish != "contrast":
            return self.cap(out)
        free = type(self)(self.tower, self.context)
        return self._contrast(out, None if self.reference is None else free.embedding(self.reference))

    def embedding(self, resid: Float[Tensor, "row pos d_model"]) -> Tensor:
        """What the head makes of the pooled residual, before embeddings are compared or a soft cap is taken."""
        return self._headed(self.pooled(resid))

    def pooled(self, resid: Float[Tensor, "row pos d_model"]) -> Tensor:
        """What the head reads of a residual, normed and pooled: the site ``hook_readout``."""
        table, reference = self.table, self.reference
        first = table.normed and table.norm_first
        normed = self._norm(resid, reference) if first else resid
        if table.pool == "attention":
            frozen = None if reference is None else self._norm(reference, None)
            return attention_pool(self.tower, table.pool_module, normed, self.context, frozen)
        pooled = pool(self.tower, table.pool, normed, self.context)
        if not table.normed or first:
            return pooled
        return self._norm(pooled, None if reference is None else pool(self.tower, table.pool, reference, self.context))

    def _norm(self, value: Tensor, reference: Tensor | None) -> Tensor:
        norm = self.tower.final_norm
        if norm is None or self.norm == "none":
            return value
        return norm(value) if reference is None else frozen_norm(norm, value, reference)

    def _headed(self, pooled: Tensor) -> Tensor:
        """What the head makes of pooled vectors."""
        head = self.module
        if head is None:
            return pooled
        if self.table.head is None:
            return pooled @ embedding_weight(head, pooled.dtype, pooled.device).T
        if self.table.finish == "mean_heads":
            return (_called(head, pooled[:, 0]) + _called(self._second_head, pooled[:, 1])) / 2
        return _called(head, pooled)

    def cap(self, logits: Tensor) -> Tensor:
        """Logits under the family's soft cap, where it has one."""
        if not (self.capped and self.table.finish == "softcap" and _caps_logits(self.tower)):
            return logits
        cap = self.tower.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap

    def _contrast(self, embedding: Tensor, own: Tensor | None) -> Tensor:
        """Scaled cosines of embeddings with those of the other tower (last axis: its rows); ``own`` are embeddings whose lengths hold."""
        theirs = self.against if self.against is not None else self._other_embeddings()
        mine = _unit(embedding, embedding if own is None else own)
        theirs = theirs.to(mine)
        model: Any = self.tower.module
        # The model multiplies text by image: the same order of operands keeps the same bits.
        if self.tower.stack.image and mine.ndim == 2:
            logits = ((theirs @ mine.T) * parameter(model, "logit_scale").exp()).T
        else:
            logits = (mine @ theirs.T) * parameter(model, "logit_scale").exp()
        return logits if getattr(model, "logit_bias", None) is None else logits + parameter(model, "logit_bias")

    def _other_embeddings(self) -> Float[Tensor, "row d_shared"]:
        """The unit embeddings that the other tower of a dual encoder had in the run."""
        other = next(t for name, t in self.tower.siblings.items() if name != self.tower.name)
        inputs_of_run(self.context)
        assert self.context is not None
        # A cache may have been recorded on another device, or converted.
        theirs = _of_run(self.context, f"{other.name}.hook_readout").to(main_device(other.root), other.dtype)
        head = resolve(other.module, other.output_head.table.head)
        theirs = theirs if head is None else head(theirs)
        return _unit(theirs, theirs)

    # -- every position for itself ---------------------------------------------------------------------------------------------------------

    def positions(
        self, resid: Float[Tensor, "row pos d_model"], start: int = 0, reference: Tensor | None = None
    ) -> Float[Tensor, "row pos n_out"]:
        """What each position says by itself. ``start`` is the number of the first position given, ``reference`` that of these positions alone.

        Raises:
            UnsupportedModelError: a tower without a head of its own.
        """
        if self.along_stream:
            assert self.against is not None
            return self.normed(resid, reference) @ self.against.to(resid).T
        if self.tower.connector is not None or self.kind == "hidden":
            raise UnsupportedModelError(f"The {self.tower.name} tower has no head of its own.")
        frozen = self._frozen(reference)
        out = self._alone(resid, start, frozen)
        if self.directed:
            return out @ self.against.to(out).T  # type: ignore[union-attr]
        if self.table.finish != "contrast":
            return self.cap(out)
        return self._contrast(out, None if frozen is None else self._alone(frozen, start, None))

    def normed(self, resid: Float[Tensor, "row pos d_model"], reference: Tensor | None = None) -> Tensor:
        """The final norm of every position, where the family applies one before its head (or to its last hidden state)."""
        return self._norm(resid, self._frozen(reference)) if self.table.normed else resid

    def _frozen(self, reference: Tensor | None) -> Tensor | None:
        return (reference if reference is not None else self.reference) if self.norm == "frozen" else None

    def _alone(self, resid: Tensor, start: int, reference: Tensor | None) -> Tensor:
        """What the head makes of each position as if the family pooled that one alone."""
        normed = self._norm(resid, reference) if self.table.normed else resid
        if self.table.pool != "attention":
            return self._each_head(normed, start)
        single = normed.reshape(-1, 1, normed.shape[-1])
        held = None
        if reference is not None:
            held = (self._norm(reference, None) if self.table.normed else reference).reshape(single.shape)
        return attention_pool(self.tower, self.table.pool_module, single, None, held).view(*normed.shape[:2], -1)

    def _each_head(self, normed: Tensor, start: int) -> Tensor:
        """The head on every position, where it reads several pooled vectors at once: on the part that a position takes."""
        if self.table.pool not in ("cls+mean_patch", "cls+distillation"):
            return self._headed(normed)
        head: Any = self.module
        if self.table.pool == "cls+mean_patch":
            nothing = torch.zeros_like(normed)
            out = _called(head, torch.cat([nothing, normed], dim=-1))
            cls = _called(head, torch.cat([normed[:, :1], nothing[:, :1]], dim=-1))
            return torch.cat([cls, out[:, 1:]], dim=1) if start == 0 else out
        one, two = _called(head, normed), _called(self._second_head, normed)
        out = (one + two) / 2
        for index, own in ((0, one), (1, two)):
            if start <= index < start + normed.shape[1]:
                out = torch.cat([out[:, : index - start], own[:, index - start, None], out[:, index - start + 1 :]], 1)
        return out

    # -- behind a connector ----------------------------------------------------------------------------------------------------------------

    def reader(self) -> HeadForward:
        """The head that reads what leaves the tower: itself, or behind a connector that of the tower it feeds, frozen at the projected reference."""
        if self.tower.connector is None or self.directed:
            return self
        held = self.reference
        if held is not None:
            with torch.no_grad(), self.tower.hooks_disabled():
                held = type(self)(self.tower, self.context).projected(held)
        return self.behind(held)

    def behind(self, reference: Tensor | None) -> HeadForward:
        """The head of the tower that this one feeds, which reads as this one does, frozen at ``reference``; itself where there is no connector."""
        if self.tower.connector is None or self.directed:
            return self
        options: dict[str, Any] = {"norm": self.norm, "against": self.against, "capped": self.capped}
        return type(self)(self.tower.reader, self.context, reference=reference, **options)

    def projected(self, resid: Float[Tensor, "row pos d_model"], has_prefix: bool = True) -> Tensor:
        """What the connector makes of a residual at the feature layer (other feature layers, and other towers that feed it, are those of the run);
        the residual itself where there is none.

        ``has_prefix=False`` says that the residual is of patches alone, so that no CLS position is there to drop.
        """
        tower, connector = self.tower, self.tower.connector
        if connector is None or self.directed:
            return resid
        parts = []
        for source in connector.sources:
            if source == tower.name:
                parts += self._features(resid, has_prefix)
                continue
            if self.context is None:
                raise InputError(
                    f"{connector.name} joins what the {' and '.join(connector.sources)} towers give; give context=cache."
                )
            other = tower.siblings[source]
            last = other.residual_name(max(other.feature_layers_in(self.context.inputs)))
            parts += other.output_head.in_run(self.context)._features(_of_run(self.context, last).to(resid))
        joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return tower.connected(joined, None if self.context is None else self.context.inputs)

    def _features(self, resid: Tensor, has_prefix: bool = True) -> list[Tensor]:
        """What the tower gives to its connector, by feature layer."""
        tower, context = self.tower, self.context
        inputs = None if context is None else context.inputs
        layers = tower.feature_layers_in(inputs)
        parts = [resid]
        if len(layers) > 1:
            if not has_prefix:
                raise InputError(
                    f"This model concatenates the feature layers {layers}, which have a prefix; read a site that has it too."
                )
            if context is None:
                raise InputError(
                    f"This model concatenates the feature layers {layers}; give context=cache for the others."
                )
            others = [None if n == max(layers) else _of_run(context, tower.residual_name(n)) for n in layers]
            parts = [resid if other is None else other.to(resid) for other in others]
        held = None if self.reference is None else self.reference[:, -resid.shape[1] :]
        dropped = tower.n_dropped_in(inputs) if has_prefix else 0
        return [self.normed(part, held)[:, dropped:] for part in parts]


def _called(head: nn.Module, value: Tensor) -> Tensor:
    """What a head makes of ``value``; one that passes no gradient (dynamically quantised) gets that of its dequantised weight."""
    out = head(value)
    if not (torch.is_grad_enabled() and value.requires_grad) or passes_gradient(head):
        return out
    weight, bias = linear_weight(head, value.dtype, value.device)
    return substitute(out, value @ weight if bias is None else value @ weight + bias)


def _of_run(context: ActivationCache, name: str) -> Tensor:
    """A site of the run's first pass of its tower, as a tensor that may be tracked."""
    value = context.one_pass(name, 0)
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value


def _caps_logits(tower: Tower) -> bool:
    # Before 5.23, transformers left PaliGemma 2's logits uncapped: only the class itself says what it computes.
    configured = getattr(tower.config, "final_logit_softcapping", None) is not None
    return configured and "final_logit_softcapping" in inspect.getsource(type(tower.module))


def _unit(embedding: Tensor, measured: Tensor) -> Tensor:
    return embedding / measured.pow(2).sum(-1, keepdim=True).pow(0.5)
