"""A dual encoder's score as a sum over pairs of terms: what each part of the image tower says to each part of the text tower.

With the norms of both towers and the lengths of both embeddings held at their values in this run, each unit embedding is a sum over the terms
of its stream, ``img = Σ_i a_i`` and ``txt = Σ_j b_j``, and the score is bilinear: ``logit = scale · Σ_ij <a_i, b_j> + bias``. Rows and columns
named ``bias`` hold what the norms' and heads' own biases (and the MLP of an attention-pooling head) add to an embedding.

Source: Gandelsman, Efros & Steinhardt 2024, arXiv 2310.05916 (decomposing CLIP's image representation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.columns import prompt_embeddings
from circuitvision.model.weights import parameter
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.attribution.direct import cached_for
from circuitvision.readout.attribution.rest import check_head_reads_stream
from circuitvision.readout.attribution.terms import Stream
from circuitvision.readout.recorded import chosen_tower
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.hooked import HookedModel
    from circuitvision.model.tower import Tower


@dataclass(frozen=True, eq=False)
class BilinearAttribution(Result):
    """``values [image_term text_term text example]`` in logits, an example being an image; they sum, with ``bias``, to ``total [text example]``.

    With prompts in place of the run's texts the text axis has one term, the whole embedding.
    """

    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    bias: float = 0.0

    _per_example: ClassVar[dict[str, int]] = {"total": -1}

    def highlights(self) -> dict[str, str]:
        """The strongest pairs of terms of the first image with the first text."""
        values = self.values[:, :, 0, 0].double()
        found = {}
        for flat in values.abs().nan_to_num(-1.0).flatten().argsort(descending=True)[:5].tolist():
            image, text = divmod(flat, values.shape[1])
            found[f"{self.axes['image_term'][image]} × {self.axes['text_term'][text]}"] = (
                f"{float(values[image, text]):+.4g}"
            )
        return {**found, "score of image 0 with text 0": f"{float(self.total[0, 0]):+.4g}"}

    def image_terms(self) -> Float[Tensor, "image_term text example"]:
        """What each term of the image tower adds, summed over the text tower's."""
        return self.values.sum(1)


@with_provenance
def bilinear_attribution(
    model: HookedModel,
    cache: ActivationCache | Mapping[str, Any],
    *,
    prompts: Sequence[str] | None = None,
    by: str = "component",
) -> BilinearAttribution:
    """Split ``logits_per_image`` over pairs of terms of the two towers.

    Args:
        model: a dual encoder (CLIP, SigLIP).
        cache: a cache of one run with all sites, or the inputs of one.
        prompts: texts to compare with instead of those of the run; their embeddings are not split.
        by: "component" or "head".

    Raises:
        InputError: no dual encoder, a cache without what is needed, another ``by``.
    """
    chosen_tower(model, None)
    kinds = [tower.output_head.kind for tower in model.towers.values()]
    if kinds != ["texts", "images"]:
        raise InputError(f"A bilinear form needs two towers that are compared; a {model.family.name} model has none.")
    if by not in ("component", "head"):
        raise InputError(f"Pairs of terms are split by 'component' or 'head', not by {by!r}.")
    embeddings = None if prompts is None else prompt_embeddings(model, prompts)
    if not isinstance(cache, ActivationCache):
        with torch.no_grad():
            cache = model.run_with_cache(cache)[1]
    cache = cached_for(model, cache, model.vision, by)
    module: Any = model.module
    with torch.no_grad():
        image_terms, images = embedding_terms(model.vision, cache, by)
        if embeddings is None:
            text_terms, texts = embedding_terms(model.text, cache, by)
            text_labels: list[Any] = list(range(texts.shape[1]))
        else:
            text_terms, texts, text_labels = ["text"], embeddings[None].to(images), list(prompts or ())
        scale = parameter(module, "logit_scale").exp().to(images)
        values = torch.einsum("amd,btd->abtm", images, texts) * scale
        has_bias = getattr(module, "logit_bias", None) is not None
        bias = float(parameter(module, "logit_bias")) if has_bias else 0.0
        total = (texts.sum(0) @ images.sum(0).T) * scale + bias
    return BilinearAttribution(
        values=values.cpu(),
        axes={
            "image_term": image_terms,
            "text_term": text_terms,
            "text": text_labels,
            "example": list(range(values.shape[3])),
        },
        provenance=describe(model, method=f"bilinear_attribution(by={by})", inputs=(cache.inputs,)),
        total=total.cpu(),
        bias=bias,
    )


def embedding_terms(
    tower: Tower, cache: ActivationCache, by: str = "component"
) -> tuple[list[str], Float[Tensor, "term row d_shared"]]:
    """The unit embedding of a tower of a dual encoder as a sum over the terms of its stream; the last term is ``bias``."""
    stream = Stream(tower, cache)
    check_head_reads_stream(stream)
    final = stream.final
    head = tower.output_head.in_run(cache)
    frozen = head.in_run(cache, norm="frozen", reference=final)
    with tower.hooks_disabled():
        length = head.embedding(final).pow(2).sum(-1, keepdim=True).sqrt()

        def embedded(resid: Tensor) -> Tensor:
            return frozen.embedding(resid) / length

        constant = embedded(torch.zeros_like(final))
        labels, parts = [], []
        for label, vector in stream.vectors(by):
            labels.append(label)
            parts.append(embedded(vector.to(final.dtype)) - constant)
    return [*labels, "bias"], torch.stack([*parts, constant])
