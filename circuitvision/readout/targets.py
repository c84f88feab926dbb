"""Targets: what a read-out is read for, and how words, classes, prompts, dimensions and directions become columns of it.

A tower speaks about one kind of thing (:func:`output_kind`): classes, tokens, the texts or images a dual encoder compares with, action
dimensions, or nothing with a name. Targets are given in the grammar of answers (:mod:`circuitvision.answers`): one for all examples, a list with
one per example, a mapping that names columns (weights have no examples: there a list is several columns). Words are looked up among the class
names, then in the tokenizer; a word of several tokens needs ``aggregation``:

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

from circuitvision.errors import InputError, UnsupportedModelError, warn
from circuitvision.model import heads
from circuitvision.model.weights import out_width

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped

AGGREGATIONS = ("first", "mean", "joint")
MEASURES = ("logit", "logprob", "prob")


def output_kind(tower: Tower) -> str:
    """What the columns of a tower's read-out are: "classes", "tokens", "texts", "images", "actions", "embedding", or "hidden" without a head.

    The vision tower of a vision-language model speaks in tokens: its read-out ends in the space that the language tower reads.
    """
    readout = tower.spec.readout
    if readout is None:
        return "hidden"
    if tower.connector is not None:
        return output_kind(tower.reader)
    if readout.finish == "contrast":
        return "texts" if tower.stack.image else "images"
    if readout.head is None and readout.tied_lens is None:
        return "hidden"
    if readout.pool == "chunk":
        return "actions"
    if not tower.stack.image:
        return "tokens"
    return "classes" if tower.family.output == "logits" else "embedding"


def output_size(tower: Tower) -> int | None:
    """The number of columns of a tower's read-out; None where it depends on the run, or where there is no head."""
    if output_kind(tower) in ("texts", "images", "hidden"):
        return None
    reader = tower.reader
    found = heads.unembedding(reader)
    head: Any = found[0] if found is not None else None
    if head is None:
        readout = reader.spec.readout
        assert readout is not None
        head = heads.resolve(reader.module, readout.head)
    return out_width(head)


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
class Targets:
    """Columns of a read-out by name: ids ``[target example token]`` (-1 where there is none), or embeddings or directions that make the columns.

    The example axis has length 1 where every example has the same targets. ``columns`` are the names of the columns that ``against`` makes;
    ``listed`` holds the entries of a list of several, until :meth:`check` has met the run's examples.
    """

    labels: list[Any]
    ids: Int[Tensor, "target example token"]
    aggregation: str = "first"
    against: Float[Tensor, "column width"] | None = None
    columns: list[Any] = field(default_factory=list)
    listed: list[Any] = field(default_factory=list)

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


def shared_width(tower: Tower) -> int:
    """The width of the space in which a dual encoder compares its towers."""
    found = heads.unembedding(tower)
    return tower.cfg.d_model if found is None else out_width(found[0])


def resolve_targets(
    model: Wrapped, tower: Tower, targets: Any, *, aggregation: str | None = None, own_columns: bool = False
) -> Targets:
    """Targets by name, id, prompt, dimension or direction as columns of a tower's read-out.

    ``targets`` is one, for all examples; a list with one per example; a mapping of names to either (``{"red": "red", "answer": ["blue", "red"]}``);
    or a float tensor of embeddings or directions ``[target width]``. ``own_columns`` says that the caller brings a read-out of its own, whose columns
    have numbers only.

    Raises:
        InputError: no such class, word or column, a word of several tokens without ``aggregation``, an empty or too long prompt, a tower without a
        head.
    """
    if aggregation is not None and aggregation not in AGGREGATIONS:
        raise InputError(f"Unknown aggregation {aggregation!r}; choose 'first', 'mean' or 'joint'.")
    targets = plain(targets)
    kind = "columns" if own_columns else output_kind(tower)
    if isinstance(targets, Tensor) and targets.is_floating_point():
        return _directions(tower, kind, targets)
    if kind == "hidden":
        raise InputError(
            f"The {tower.name} tower of this {tower.family.name} model has no read-out, so it has no classes or words. Give targets as a tensor of "
            f"directions [target {tower.cfg.d_model}], or a read-out of your own: readout=fn(resid [row pos d_model]) -> [row pos n_out]."
        )
    rows, labels, listed = _listed(targets)
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
        found = [[_ids(model, tower, kind, item, aggregation) for item in row] for row in rows]
    width = max(len(ids) for row in found for ids in row)
    table = torch.full((len(rows), examples, width), -1, dtype=torch.long)
    for index, row in enumerate(found):
        for example in range(examples):
            chosen = row[example if len(row) > 1 else 0]
            table[index, example, : len(chosen)] = torch.tensor(chosen)
    if prompts:
        return Targets(labels, table, "first", prompt_embeddings(model, prompts), prompts, listed)
    return Targets(labels, table, aggregation or "first", listed=listed)


def _listed(targets: Any) -> tuple[list[list[Any]], list[Any], list[Any]]:
    """The entries of every column, the columns' labels, and the entries of a bare list of several."""
    if isinstance(targets, Mapping):
        return [[own] if isinstance(own, str | int) else list(own) for own in targets.values()], list(targets), []
    items = [targets] if isinstance(targets, str | int) else list(targets)
    return ([items], ["answer"], items) if len(items) > 1 else ([[item] for item in items], items, [])


def _directions(tower: Tower, kind: str, targets: Tensor) -> Targets:
    targets = targets[None] if targets.ndim == 1 else targets
    if targets.ndim != 2 or len(targets) == 0:
        raise InputError(f"Directions or embeddings are [target width]; got {tuple(targets.shape)}.")
    labels = [f"direction {index}" for index in range(len(targets))]
    if kind in ("texts", "images"):
        if targets.shape[1] != shared_width(tower):
            raise InputError(
                f"Embeddings that the {tower.name} tower is compared with are [target {shared_width(tower)}], not {tuple(targets.shape)}."
            )
        # Embeddings of a dual encoder are compared by cosine, whatever their length.
        targets = targets / targets.pow(2).sum(-1, keepdim=True).sqrt()
    return Targets(labels, torch.arange(len(labels)).view(-1, 1, 1), "first", targets, labels)


def _ids(model: Wrapped, tower: Tower, kind: str, target: Any, aggregation: str | None) -> list[int]:
    if isinstance(target, int) and not isinstance(target, bool):
        size = None if kind == "columns" else output_size(tower)
        if target < 0 or (size is not None and target >= size):
            raise InputError(f"There is no {_singular(kind)} {target}: this read-out has {size} {kind}, from 0.")
        return [target]
    if not isinstance(target, str):
        raise InputError(f"A target is a word, a number or a direction, not {target!r}.")
    if kind in ("images", "actions", "embedding", "columns"):
        raise InputError(
            f"{target!r} is a word, and the {tower.name} tower is read in {kind}; give the number of the {_singular(kind)}"
            + (", or embeddings [target d_shared]." if kind in ("images", "embedding") else ".")
        )
    if kind == "texts":
        raise InputError("Give prompts only, or numbers of the run's texts only.")
    return word_ids(model, target, aggregation)


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


def names_of(model: Wrapped, tower: Tower, ids: Sequence[int], targets: Targets | None = None) -> dict[str, str]:
    """The word, class or prompt of columns of a read-out, by the number as text (JSON has no other keys)."""
    if targets is not None and targets.against is not None:
        return {str(number): str(targets.columns[number]) for number in ids}
    kind = output_kind(tower)
    if kind == "classes":
        known = getattr(model.config, "id2label", None) or {}
        return {str(number): str(known.get(number, number)) for number in ids}
    if kind == "tokens" and (model.tokenizer is not None or model.action_values):
        # A head may be wider than the vocabulary.
        tokens = model.words([int(number) for number in ids])
        return {str(number): str(number if token is None else token) for number, token in zip(ids, tokens, strict=True)}
    word = {"actions": "dim ", "texts": "text ", "images": "image "}.get(kind, "")
    return {str(number): f"{word}{number}" for number in ids}
