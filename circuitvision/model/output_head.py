"""The output head of a tower: everything between its residual stream and the family's output, made of the family's table and the model's modules.

``tower.output_head`` says what its columns are, names them and gives their weights; ``tower.output_head.in_run(cache, …)`` reads residuals of a run
(:mod:`circuitvision.model.head_forward`) and carries directions back to the stream.

``matrix`` is the linear part ``W`` of ``logits = x W + b``: a row vector ``x`` of the stream moves the output by ``x @ W``, up to the positive number
by which the final norm divides. Soft caps, scales of logits and their biases are left out. *Parts*: ``"W_U"`` and ``"W_proj"`` are the module's own
weight, in its precision; where a head reads two positions, ``"cls"`` or ``"patch"`` (every patch at once), or ``"cls"``, ``"distillation"`` or
``"mean"`` (both at once) of two heads that are averaged; of an attention-pooling head, which is not linear, ``"value_path"`` is its value and output
projections, all heads attending to the position, without its MLP.

Not covered: linear parts of projectors of several layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitvision.errors import InputError, UnknownAttributeError
from circuitvision.links import Link
from circuitvision.model.columns import Columns, resolved
from circuitvision.model.head_forward import HeadForward
from circuitvision.model.norms import Norm, upcast
from circuitvision.model.settings import entries
from circuitvision.model.spec import require
from circuitvision.model.weights import attention_weights, embedding_weight, linear_bias, linear_weight, out_width

if TYPE_CHECKING:
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped

WEIGHTS = ("W_U", "W_proj")
_PARTS = {
    "cls+mean_patch": ("cls", "patch"),
    "cls+distillation": ("mean", "cls", "distillation"),
    "attention": ("value_path",),
}
_CHUNK = 2**24
"""Numbers of a matrix made at once."""


@dataclass(frozen=True)
class LinearReadout:
    """``value = Σ_pos gradient·resid + constant`` per row, and in words what it is. ``capped`` is the value under the family's soft cap, if any."""

    gradient: Float[Tensor, "row pos d_model"]
    constant: Float[Tensor, " row"]
    value: Float[Tensor, " row"]
    capped: Float[Tensor, " row"]
    label: str = ""


def model_of(tower: Tower) -> Wrapped:
    """The wrapped model of a tower; raises InputError if nothing holds it any more."""
    if not hasattr(tower, "owner"):
        raise InputError(f"Give a tower, such as model.vision or model.language, not a {type(tower).__name__}.")
    model = tower.owner()
    if model is None:
        raise InputError(
            "The wrapped model of this tower is gone; keep it in a variable: model = HookedModel(…), then model.vision."
        )
    return model


class OutputHead(HeadForward):
    """The output head of a tower: its columns, their weights, and gradients (see the module); as :class:`HeadForward` it reads."""

    # -- what it says ----------------------------------------------------------------------------------------------------------------------

    def in_run(self, context: ActivationCache | None, **options: Any) -> OutputHead:
        """The head as it reads residuals of a run: ``context`` is its cache, ``norm``, ``reference``, ``against`` and ``capped`` as of the class."""
        return OutputHead(self.tower, context, **options)

    @property
    def model(self) -> Wrapped:
        """The wrapped model; InputError if nothing holds it any more."""
        return model_of(self.tower)

    @property
    def weight_name(self) -> str | None:
        """What the weight of the module is called, ``"W_U"`` or ``"W_proj"``; None where no single one makes the output."""
        if self.module is None or self.table.second_head is not None:
            return None
        return "W_proj" if self.table.finish == "contrast" else "W_U"

    @property
    def width(self) -> int:
        """How many numbers the module gives: classes, tokens, or the width of the space in which a dual encoder compares its towers."""
        return self.tower.cfg.d_model if self.module is None else out_width(self.module)

    @property
    def size(self) -> int | None:
        """The number of columns; None where it depends on the run, or where there is no head."""
        if self.against is not None:
            return len(self.against)
        return None if self.compares or self.kind == "hidden" else self.tower.reader.output_head.width

    @property
    def link(self) -> Link:
        """What turns the numbers into probabilities: how the configuration says the head was trained."""
        tower, table = self.tower, self.table
        if tower.connector is not None:
            return tower.reader.output_head.link
        if table.finish == "contrast":
            return "softmax" if getattr(tower.module, "logit_bias", None) is None else "sigmoid"
        if table.pool == "chunk" or self.module is None:
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

    def columns(self, targets: Any, *, aggregation: str | None = None, own_columns: bool = False) -> Columns:
        """Targets by name, id, prompt, dimension or direction as columns; see :mod:`circuitvision.model.columns`.

        ``targets`` is one, for all examples; a list with one per example; a tuple, the first minus the second; a mapping of names to either
        (``{"red": "red", "answer": ["blue", "red"]}``); or a float tensor of embeddings or directions ``[target width]``. ``own_columns`` says that
        the caller brings a read-out of its own, whose columns have numbers only.

        Raises:
            InputError: no such class, word or column, a word of several tokens without ``aggregation``, an empty or too long prompt, a tower
            without a head.
        """
        return resolved(self, targets, aggregation, own_columns)

    def names(self, ids: Sequence[int], columns: Columns | None = None) -> dict[str, str]:
        """The word, class or prompt of columns, by the number as text (JSON has no other keys)."""
        if columns is not None and columns.against is not None:
            return {str(number): str(columns.names[number]) for number in ids}
        kind, model = self.kind, self.model
        if kind == "classes":
            known = getattr(model.config, "id2label", None) or {}
            return {str(number): str(known.get(number, number)) for number in ids}
        if kind == "tokens" and (model.tokenizer is not None or model.action_values):
            # A head may be wider than the vocabulary.
            tokens = model.words([int(number) for number in ids])
            return {str(n): str(n if token is None else token) for n, token in zip(ids, tokens, strict=True)}
        word = {"actions": "dim ", "texts": "text ", "images": "image "}.get(kind, "")
        return {str(number): f"{word}{number}" for number in ids}

    # -- its weights -----------------------------------------------------------------------------------------------------------------------

    def matrix(
        self, part: str | None = None, *, gain: bool = False, columns: slice | Tensor = slice(None)
    ) -> Float[Tensor, "d_model n_out"]:
        """The linear part of the read-out, in float32 at least, or (``"W_U"``, ``"W_proj"``) the weight of its module as it is; see the module.

        With ``against`` its columns are those vectors: ``W_proj @ e`` for an embedding ``e``, the cosine times the length of the image's embedding.

        Args:
            part: of a head that reads two positions; None takes the first (``"cls"``, ``"mean"``).
            gain: put the final norm's own linear part before it (centring, times ``offset + weight``); of a tower behind a connector both norms'.
            columns: only these.

        Raises:
            UnknownAttributeError: no single such weight. InputError: a part that is not there, a head or projector that is not linear.
        """
        with torch.no_grad(), self.tower.hooks_disabled():
            if part in WEIGHTS:
                if part != self.weight_name:
                    raise UnknownAttributeError(
                        f"The {self.tower.name} tower of {self.tower.family.name} has no {part}; tower.readout says how it reaches the output."
                    )
                return self._weight(self.module)[:, columns]
            if self.against is None:
                weight = upcast(self._linear(part, gain, columns))
            elif self.along_stream:
                weight = upcast(self.against[columns].T)
            else:
                weight = upcast(self._linear(part, gain, slice(None)))
                weight = weight @ self.against[columns].to(weight).T
            return (self.before_norm(weight) if gain else weight).contiguous()

    def chunks(
        self, size: int | None = None, part: str | None = None, *, gain: bool = False
    ) -> Iterator[tuple[slice, Float[Tensor, "d_model n_chunk"]]]:
        """:meth:`matrix`, ``size`` columns at a time (None: 2**24 numbers), so that a vocabulary is never held in float32 as a whole."""
        count = len(self.against) if self.against is not None else self.tower.reader.output_head.width
        size = size or max(1, _CHUNK // self.tower.cfg.d_model)
        for first in range(0, count, size):
            chunk = slice(first, min(first + size, count))
            yield chunk, self.matrix(part, gain=gain, columns=chunk)

    def bias(self, columns: slice | Tensor = slice(None)) -> Float[Tensor, " n_out"] | None:
        """What the head adds to ``x W`` (of two heads the mean), in its precision; None where it adds nothing."""
        if self.table.head is None or self.along_stream:
            return None
        heads = [self.module, *([self._second_head] if self.table.second_head is not None else [])]
        with self.tower.hooks_disabled(), torch.no_grad():
            biases = [linear_bias(head, self.tower.dtype) for head in heads if head is not None]
            found = [bias.detach() for bias in biases if bias is not None]
            if not found:
                return None
            bias = sum(found[1:], found[0]) / len(heads)
            return (bias if self.against is None else self.against.to(bias) @ bias)[columns]

    def part(self, part: str | None) -> str:
        """The part of the head that is meant: None is the first of those there are, "" where there are none.

        Raises InputError for one that is not there.
        """
        offered = _PARTS.get(self.table.pool, ())
        if part is not None and part not in offered:
            there = f"its parts are {', '.join(offered)}" if offered else "it has no parts"
            raise InputError(f"part={part!r} is none of the {self.tower.name} tower's head; {there}.")
        if part is None and self.table.pool == "attention":
            raise InputError(
                f"The {self.tower.name} tower is read by attention pooling and an MLP, which are not linear; part='value_path' takes "
                "the pooling's value and output projections alone, or give a matrix= of your own."
            )
        return part or (offered[0] if offered else "")

    def before_norm(self, weight: Float[Tensor, "d_model n_out"]) -> Float[Tensor, "d_model n_out"]:
        """The matrix that reads the stream before the final norm as ``weight`` reads it behind: centred for a LayerNorm, times the gain."""
        norm = self.tower.final_norm
        return weight if norm is None or not self.table.normed else Norm(norm).transposed(weight.T).T

    @property
    def linear_projector(self) -> nn.Module | None:
        """The one linear map that the tower's projector is made of, if it is made of one."""
        if self.tower.family.packing.merges("hook_out"):
            return None
        maps = _maps(self.tower.connector_module)
        return maps[0] if len(maps) == 1 and hasattr(maps[0], "in_features") else None

    def _linear(self, part: str | None, gain: bool, columns: slice | Tensor) -> Tensor:
        """The weight of a part of the head, behind the final norm."""
        name = self.tower.name
        part = self.part(part)
        if self.tower.connector is not None:
            projector = self.linear_projector
            if projector is None:
                raise InputError(
                    f"The {name} tower is read through {type(self.tower.connector_module).__name__}, which is not linear; give a matrix= "
                    f"[{self.tower.cfg.d_model}, n_out] of your own, or read activations with the logit lens."
                )
            inner = self.tower.reader.output_head.matrix(gain=gain, columns=columns)
            return upcast(self._weight(projector)).to(inner) @ inner
        if part == "value_path":
            pooling = require(self.tower.module, self.table.pool_module or "", "pooling head")
            weight, _, out, _ = attention_weights(require(pooling, "attention", "attention of the pooling head"))
            return (upcast(weight.detach().chunk(3)[2].T) @ upcast(out.detach().T))[:, columns]
        if self.module is None:
            raise InputError(f"The {name} tower has no head; give a matrix= [{self.tower.cfg.d_model}, n_out].")
        weight = self._weight(self.module)[:, columns]
        if self.table.second_head is not None:
            second = self._weight(self._second_head)[:, columns]
            return (weight + second) / 2 if part == "mean" else (second if part == "distillation" else weight) / 2
        return weight.chunk(2)[part == "patch"] if part else weight

    def _weight(self, module: nn.Module | None) -> Tensor:
        assert module is not None
        if self.table.head is None and module is self.module:
            return embedding_weight(module, self.tower.dtype).detach().T
        return linear_weight(module, self.tower.dtype)[0].detach()

    # -- back to the stream ----------------------------------------------------------------------------------------------------------------

    def gradient(
        self,
        direction: Columns | Float[Tensor, "*row n_out"],
        resid: Float[Tensor, "row pos d_model"],
        at: Bool[Tensor, "row pos"] | None = None,
        *,
        norm: str = "frozen",
        examples: Int[Tensor, " row"] | None = None,
    ) -> LinearReadout:
        """From a direction of the output to one at every position of the stream: the vector-Jacobian product of the read-out at ``resid``.

        Frozen, all statistics are those of ``resid`` (norm denominators, the length of an embedding, the pattern and MLP of a pooling head) and soft
        caps are left out: ``value = Σ_pos gradient·resid + constant`` is exact. With ``norm="own"`` it is the derivative of :meth:`read`.

        Args:
            direction: weights of the columns, for all rows or each; or columns, one or the two of a difference.
            resid: the residual that the tower's head reads.
            at: where the output is read, if the family does not pool: the mean over these positions.
            norm: "frozen" or "own".
            examples: the example of each row, for columns; one a row by default.

        Raises:
            InputError: no positions where the family pools none, positions where it does.
        """
        if self.pools != (at is None):
            raise InputError(
                f"Give at=, the positions that are read, where the family does not pool, and only there; pool={self.table.pool!r}."
            )
        examples = torch.arange(len(resid)) if examples is None else examples

        def said(value: Tensor, capped: bool) -> Tensor:
            against = direction.against if isinstance(direction, Columns) else self.against
            logits = self._at(value, at, {"norm": norm, "against": against, "capped": capped})
            if isinstance(direction, Columns):
                return direction.value(logits[:, None], examples)
            wide = upcast(logits)
            return (wide * direction.to(wide)).sum(-1)

        # Inference tensors cannot be tracked; a copy made here can.
        with torch.inference_mode(False), torch.enable_grad(), self.tower.hooks_disabled():
            tracked = resid.clone().requires_grad_(True)
            value = said(tracked, norm == "own")
            (gradient,) = torch.autograd.grad(value.sum(), tracked)
        capped = value = value.detach()
        if self.tower.reader.output_head.table.finish == "softcap":
            with torch.no_grad(), self.tower.hooks_disabled():
                capped = said(resid, True)
        return LinearReadout(gradient, value - (gradient * resid).flatten(1).sum(-1), value, capped)

    def _at(self, resid: Tensor, at: Tensor | None, options: dict[str, Any]) -> Float[Tensor, "row n_out"]:
        """The read-out at its own statistics: pooled, or the mean over the positions ``at`` of what each says."""
        dtype = self.tower.dtype
        if at is None:
            head = self.in_run(self.context, reference=resid.detach().to(dtype), **options)
            return head.logits(resid.to(dtype))
        # Where no row has a position, one is read for the shape of what is then NaN.
        there = at.any(0).nonzero().flatten() if bool(at.any()) else torch.zeros(1, dtype=torch.long)
        picked = resid[:, there].to(dtype)
        head = self.in_run(self.context, reference=picked.detach(), **options)
        entering = head.projected(picked, has_prefix=False)
        out = head.behind(entering.detach()).positions(entering)
        share = at[:, there].to(out)
        return torch.einsum("bp,bpk->bk", share / share.sum(-1, keepdim=True), out)


def _maps(module: nn.Module) -> list[nn.Module]:
    """The modules that map something: linear maps whole (an adapter's parts are inside), leaves otherwise."""
    children = list(module.children())
    if hasattr(module, "in_features") or not children:
        return [module]
    return [found for child in children for found in _maps(child)]
