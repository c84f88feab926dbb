"""Columns of an output head: how words, classes, prompts, dimensions and directions become columns of what it gives.

A head speaks about one kind of thing (``OutputHead.kind``): classes, tokens, the texts or images a dual encoder compares with, action
dimensions, or nothing with a name. Targets are given in the grammar of answers (:mod:`circuitvision.answers`): one for all examples, a list with
one per example, a tuple for a difference, a mapping that names columns (weights have no examples: there a list is several columns). Words are looked
up among the class names, then in the tokenizer; a word of several tokens needs ``aggregation``:

* ``"first"``: its first token;
* ``"mean"``: the mean of the measure over its tokens;
* ``"joint"``: ``Σ_i log p(token_i | context)``, all read at the same place (with the measure ``"prob"``, their product). The probability of
  saying the word is the chain ``Σ_i log p(token_i | context, token_1 … token_{i-1})``: the first terms agree, the others do not, and the joint
  reading is the same for any order of the tokens. It says which tokens a place has in mind, and compares words of equally many. For the chain,
  run the model with the word appended.

A dual encoder's prompts are strings: its text tower runs on them alone, and images are read against their embeddings. Not covered: sentences as
targets of a language model, several ids as one target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitvision.answers import contrast
from circuitvision.errors import InputError, UnsupportedModelError, warn
from circuitvision.model.norms import upcast

if TYPE_CHECKING:
    from circuitvision.model.output_head import OutputHead
    from circuitvision.model.wrapped import Wrapped

AGGREGATIONS = ("first", "mean", "joint")
MEASURES = ("logit", "logprob", "prob")


def prompt_embeddings(model: Wrapped, prompts: Sequence[str]) -> Float[Tensor, "prompt d_shared"]:
    """Unit embeddings of text prompts by a dual encoder's own text tower.

    Raises:
        InputError: a prompt that is empty or longer than the text tower reads, no processor. UnsupportedModelError: a model without text
        features.
    """
    module: Any = model.module
    if not model.is_dual or not hasattr(module, "get_text_features"):
        raise UnsupportedModelError(f"A {model.family.name} model has no text tower that embeds prompts.")
    if isinstance(prompts, str) or not prompts:
        raise InputError("Give a list of prompts, such as ['a photo of a cat', 'a photo of a dog'].")
    empty = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str) or not prompt.strip()]
    if empty:
        raise InputError(f"Prompt {empty[0]} is empty; a prompt is a text such as 'a red circle'.")
    limit = int(model.text.config.max_position_embeddings)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("This model was wrapped without a processor, so it cannot read prompts; give embeddings.")
    for prompt in prompts:
        length = len(tokenizer(prompt)["input_ids"])
        if length > limit:
            raise InputError(
                f"The prompt {prompt[:40]!r} takes {length} tokens, start and end included; this text tower reads {limit}. Shorten it."
            )
    _warn_of_unknown(tokenizer, prompts)
    inputs = model.inputs(text=list(prompts))
    with torch.no_grad(), model.text.hooks_disabled():
        found: Any = module.get_text_features(**inputs)
    found = found if isinstance(found, Tensor) else found.pooler_output
    return found / found.pow(2).sum(-1, keepdim=True).sqrt()


def _warn_of_unknown(tokenizer: Any, prompts: Sequence[str]) -> None:
    """A warning where words of a prompt are not in the vocabulary (where the end token stands for unknown ones, nothing can be told)."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id):
        return
    lost = {
        prompt: [word for word in prompt.split() if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]
        for prompt in prompts
    }
    lost = {prompt: words for prompt, words in lost.items() if words}
    if lost:
        prompt, words = next(iter(lost.items()))
        warn(
            f"{len(lost)} of {len(prompts)} prompts hold words that this tokenizer does not know, and reads all alike: "
            f"{', '.join(map(repr, words))} in {prompt!r}."
        )


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of an output head by name: ids ``[target example token]`` (-1 where there is none), or vectors that make them (``against``).

    The example axis has length 1 where every example has the same targets. ``names`` are those of the columns that ``against`` makes; ``listed``
    holds the entries of a list of several, until :meth:`check` has met the run's examples. Of a ``difference`` the second target is taken away.
    """

    labels: list[Any]
    ids: Int[Tensor, "target example token"]
    head: OutputHead
    aggregation: str = "first"
    against: Float[Tensor, "column width"] | None = None
    names: list[Any] = field(default_factory=list)
    listed: list[Any] = field(default_factory=list)
    difference: bool = False

    def weight(self, part: str | None = None, *, gain: bool = False) -> Float[Tensor, "target example d_model"]:
        """What each target reads of a vector ``x`` of the stream, by :meth:`OutputHead.matrix`: its logit is ``x · weight + bias``, of a dual encoder
        the cosine times the embedding's length.

        Raises InputError for a joint probability and for columns that are the run's own (texts by number), which have no weight.
        """
        if self.against is None and self.head.compares:
            raise InputError(
                f"The {self.head.kind} of a run have no weights; give prompts, or embeddings [target d_shared]."
            )
        found = self._read_by.matrix(part, gain=gain, columns=self.ids.clamp(min=0).flatten()).T
        return self._combined(found.unflatten(0, self.ids.shape))

    def bias(self) -> Float[Tensor, "target example"]:
        """What the head adds to each target, whatever it reads."""
        bias = self._read_by.bias(self.ids.clamp(min=0).flatten())
        found = torch.zeros(self.ids.numel()) if bias is None else upcast(bias)
        return self._combined(found.unflatten(0, self.ids.shape)[..., None])[..., 0]

    @property
    def _read_by(self) -> OutputHead:
        return self.head if self.against is None else self.head.in_run(None, against=self.against)

    def _combined(self, values: Float[Tensor, "target example token width"]) -> Tensor:
        self._check_linear()
        there = (self.ids >= 0).to(values)[..., None]
        found = (values * there).sum(-2) / there.sum(-2)
        return found[:1] - found[1:] if self.difference else found

    def value(self, logits: Float[Tensor, "row 1 n_out"], example: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The first target's logit, or that minus the second's, in float32 at least.

        Raises InputError if a target is beyond the columns, or a joint probability.
        """
        self._check_linear()
        self.check_columns(logits.shape[-1])
        values = self.read(upcast(logits), example.to(logits.device))[..., 0, :]
        return values[:, 0] - values[:, 1] if self.difference else values[:, 0]

    def _check_linear(self) -> None:
        if self.aggregation == "joint":
            raise InputError("A joint probability is not linear in the logits; choose aggregation='first' or 'mean'.")

    def read(
        self, measured: Float[Tensor, "row pos n_out"], example: Int[Tensor, " row"]
    ) -> Float[Tensor, "row pos target"]:
        """The value of every target, given the measure of every column and the example each row belongs to."""
        ids = self.ids.to(measured.device)
        chosen = ids.expand(-1, int(example.max()) + 1, -1)[:, example] if ids.shape[1] == 1 else ids[:, example]
        columns = []
        for target in chosen:
            there = (target >= 0)[:, None]
            found = measured.gather(-1, target.clamp(min=0)[:, None].expand(-1, measured.shape[1], -1))
            total = torch.where(there, found, torch.zeros_like(found)).sum(-1)
            columns.append(total / there.sum(-1) if self.aggregation == "mean" else total)
        return torch.stack(columns, dim=-1)

    def ranked(self, example: Int[Tensor, " row"]) -> Bool[Tensor, "row target"]:
        """Which targets can be ranked among single columns: not the joint log-probability of several subword tokens."""
        single = (self.ids >= 0).sum(-1) == 1
        single = single.expand(-1, int(example.max()) + 1) if single.shape[1] == 1 else single
        return single[:, example].T | (self.aggregation != "joint")

    def check_columns(self, size: int) -> None:
        """Raises InputError if a target is beyond the columns of the read-out."""
        if int(self.ids.max()) >= size:
            raise InputError(f"There is no column {int(self.ids.max())}: this read-out has {size}, from 0.")

    def check(self, examples: int) -> None:
        """Raises InputError unless there is one target for all examples, or one each; see :func:`per_example`."""
        per_example(self.listed, examples)
        if self.ids.shape[1] not in (1, examples):
            raise InputError(
                f"There are {examples} examples and targets for {self.ids.shape[1]}; give one per example. "
                "A difference of two that is the same for all examples is a tuple, ('red', 'blue')."
            )


def per_example(targets: Any, examples: int) -> Any:
    """Targets for ``examples`` examples: a list as the column of answers it is, everything else as it is.

    A list whose entries all differ could be meant as columns, and warns with both spellings.

    Raises:
        InputError: a list of neither one entry nor one per example.
    """
    if not isinstance(targets, list) or len(targets) < 2:
        return targets
    columns = "{" + ", ".join(f"{item!r}: {item!r}" for item in targets[:2]) + ", …" * (len(targets) > 2) + "}"
    if len(targets) != examples:
        raise InputError(
            f"A list has one target per example, and there are {len(targets)} for {examples} examples. Columns that are the same for all examples "
            f"are named by a mapping, {columns}; the difference of two is a tuple, ('red', 'blue')."
        )
    if len(set(map(repr, targets))) == examples and not any(isinstance(item, tuple) for item in targets):
        warn(
            f"targets={targets!r:.60} of {examples} examples has one target per example, which {{'answer': [...]}} says without this warning; "
            f"columns that are the same for all examples are named, {columns}."
        )
    return {"answer": targets}


def plain(targets: Any) -> Any:
    """Targets with numpy's and torch's whole numbers as Python's; everything else as it is.

    Raises:
        InputError: truth values.
    """
    if isinstance(targets, Tensor | np.ndarray):
        kind = targets.dtype.is_floating_point if isinstance(targets, Tensor) else targets.dtype.kind == "f"
        if kind:
            return torch.as_tensor(targets)
        targets = targets.tolist()
    if isinstance(targets, np.integer):
        return int(targets)
    if isinstance(targets, Mapping):
        return {name: plain(value) for name, value in targets.items()}
    if isinstance(targets, list | tuple):
        return type(targets)(plain(item) for item in targets)
    if isinstance(targets, bool):
        raise InputError("A target is a word, a number or a direction, not a truth value.")
    return targets


def resolved(head: OutputHead, targets: Any, aggregation: str | None, own_columns: bool = False) -> Columns:
    """Targets by name, id, prompt, dimension or direction as columns; see :meth:`OutputHead.columns`."""
    if aggregation is not None and aggregation not in AGGREGATIONS:
        raise InputError(f"Unknown aggregation {aggregation!r}; choose 'first', 'mean' or 'joint'.")
    targets = plain(targets)
    tower, kind = head.tower, "columns" if own_columns else head.kind
    if isinstance(targets, Tensor) and targets.is_floating_point():
        return _directions(head, kind, targets)
    if kind == "hidden":
        raise InputError(
            f"The {tower.name} tower of this {tower.family.name} model has no read-out, so it has no classes or words. Give targets as a tensor of "
            f"directions [target {tower.cfg.d_model}], or a read-out of your own: readout=fn(resid [row pos d_model]) -> [row pos n_out]."
        )
    difference = isinstance(targets, tuple)
    rows, labels, listed = _listed(named_pair(*contrast(targets, None)) if difference else targets)
    if not rows or any(not row for row in rows):
        raise InputError("Give at least one target.")
    examples = max(len(row) for row in rows)
    if any(len(row) not in (1, examples) for row in rows):
        raise InputError(f"Targets per example need one per example each; got {[len(row) for row in rows]}.")
    items = [item for row in rows for item in row]
    prompts: list[str] = []
    if kind == "texts" and all(isinstance(item, str) for item in items):
        prompts = list(dict.fromkeys(items))
        found = [[[prompts.index(item)] for item in row] for row in rows]
    else:
        found = [[_ids(head, kind, item, aggregation) for item in row] for row in rows]
    width = max(len(ids) for row in found for ids in row)
    table = torch.full((len(rows), examples, width), -1, dtype=torch.long)
    for index, row in enumerate(found):
        for example in range(examples):
            chosen = row[example if len(row) > 1 else 0]
            table[index, example, : len(chosen)] = torch.tensor(chosen)
    found_against = prompt_embeddings(head.model, prompts) if prompts else None
    how = "first" if prompts else aggregation or "first"
    return Columns(labels, table, head, how, found_against, prompts, listed, difference)


def named_pair(first: Any, second: Any) -> dict[Any, Any]:
    """The two targets of a difference by their names, or as answer and foil."""
    alike = not isinstance(first, str | int) or not isinstance(second, str | int) or first == second
    return dict(zip(("answer", "foil") if alike else (first, second), (first, second), strict=True))


def _listed(targets: Any) -> tuple[list[list[Any]], list[Any], list[Any]]:
    """The entries of every column, the columns' labels, and the entries of a bare list of several."""
    if isinstance(targets, Mapping):
        wrong = [own for own in targets.values() if not isinstance(own, str | int | list | tuple)]
        if wrong:
            raise InputError(
                f"A target is a word, class, prompt or number, or a list with one per example, not {wrong[0]!r}."
            )
        return [[own] if isinstance(own, str | int) else list(own) for own in targets.values()], list(targets), []
    items = [targets] if isinstance(targets, str | int) else list(targets)
    return ([items], ["answer"], items) if len(items) > 1 else ([[item] for item in items], items, [])


def _directions(head: OutputHead, kind: str, targets: Tensor) -> Columns:
    targets = targets[None] if targets.ndim == 1 else targets
    if targets.ndim != 2 or len(targets) == 0:
        raise InputError(f"Directions or embeddings are [target width]; got {tuple(targets.shape)}.")
    labels, name = [f"direction {index}" for index in range(len(targets))], head.tower.name
    wanted = {"texts": head.width, "images": head.width, "embedding": head.size, "columns": None}
    width = wanted.get(kind, head.tower.cfg.d_model)
    if width is not None and targets.shape[1] != width:
        what = (
            f"Embeddings that the {name} tower is compared with" if head.compares else f"Directions of the {name} tower"
        )
        raise InputError(f"{what} are [target {width}], not {tuple(targets.shape)}.")
    if kind in ("texts", "images"):
        # Embeddings of a dual encoder are compared by cosine, whatever their length.
        targets = targets / targets.pow(2).sum(-1, keepdim=True).sqrt()
    return Columns(labels, torch.arange(len(labels)).view(-1, 1, 1), head, "first", targets, labels)


def _ids(head: OutputHead, kind: str, target: Any, aggregation: str | None) -> list[int]:
    if isinstance(target, int) and not isinstance(target, bool):
        size = None if kind == "columns" else head.size
        if target < 0 or (size is not None and target >= size):
            raise InputError(f"There is no {_singular(kind)} {target}: this read-out has {size} {kind}, from 0.")
        return [target]
    if not isinstance(target, str):
        raise InputError(f"A target is a word, a number or a direction, not {target!r}.")
    if kind in ("images", "actions", "embedding", "columns"):
        raise InputError(
            f"{target!r} is a word, and the {head.tower.name} tower is read in {kind}; give the number of the {_singular(kind)}"
            + (", or embeddings [target d_shared]." if kind in ("images", "embedding") else ".")
        )
    if kind == "texts":
        raise InputError("Give prompts only, or numbers of the run's texts only.")
    return word_ids(head.model, target, aggregation)


def _singular(kind: str) -> str:
    return {"classes": "class"}.get(kind, kind.removesuffix("s"))


def word_ids(model: Wrapped, word: str, aggregation: str | None = None) -> list[int]:
    """The ids of a class name or word: one, or with ``aggregation`` as many as it takes (``"first"``: the first).

    Raises:
        InputError: an unknown word, or one of several tokens without ``aggregation``.
    """
    labels = getattr(model.config, "label2id", None) or {}
    if word in labels:
        return [int(labels[word])]
    try:
        return [model.token(word)]
    except InputError:
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise
        forms = [tokenizer.encode(form, add_special_tokens=False) for form in (" " + word, word)]
        known = [ids for ids in forms if tokenizer.unk_token_id not in ids and ids]
        if not known:
            raise
    ids = [int(number) for number in min(known, key=len)]
    if aggregation is None:
        names = " ".join(str(token) for token in tokenizer.convert_ids_to_tokens(ids))
        raise InputError(
            f"{word!r} takes {len(ids)} tokens ({names}). Choose aggregation='first' (its first token), 'mean' (the mean over its tokens) or 'joint' "
            "(the sum of their log-probabilities), or give the id of the token you mean."
        )
    return ids[:1] if aggregation == "first" else ids
