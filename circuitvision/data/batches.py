"""Raw examples as inputs of a model, some at a time, and the positions of two runs that belong together.

A batch is made when it is asked for and nothing keeps it, so the memory of a pass over a data set does not grow with the data set. Neighbours run
together unless they cannot: tensors made by hand of other shapes, or images that are compared with other texts.

Prompts of different lengths are filled up on the *right*, whatever the tokenizer does, and both runs of a batch to one length: position 5 is the same
token in every batch, and masked positions behind it change no number. Noise that a model starts from is drawn for each example from its number, so it
does not depend on the batch either, and is the same on both sides.

Not covered: filling up texts of dual encoders made by hand, and tensors with four-axis masks or caches (such examples run by themselves).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision import answers
from circuitvision.data.sides import Example, Side
from circuitvision.digests import of_json, of_tensor, plain
from circuitvision.errors import InputError

if TYPE_CHECKING:
    from circuitvision.data.pairs import Pairs

Align = str | Callable[[Any, Any], Any] | None
"""How positions of the other run are found: "kind", "index", "maps" (those the pairs hold), a function of two token maps, None (not at all)."""
BUDGET = 2**29
"""Bytes that a batch's activations may take where no device says how much it has."""
POSITIONS = 8192
"""How many positions an automatic batch has at most: beyond that, matrix products get no faster."""
SHARE = 0.2
"""The share of a GPU's free memory that they may take."""
_ABSENT = ("padding", "dropped")


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples as a model reads them.

    Attributes:
        inputs: the mapping for the model: of the side, or of the clean side of pairs.
        other: of pairs, the mapping of the corrupt side; rows and widths are those of ``inputs``.
        examples: their numbers in the data set.
        answers: per example an id (a list of ids where ``combine`` says how several are read; a number for models that act); None if there are none.
        foils: likewise.
        groups, boxes, masks: as in the data set.
        combine: how several ids become one number, see :class:`~circuitvision.data.Side`.
        maps: of pairs, per tower the positions of the other run ``[row pos]`` that belong to this run's.
    """

    inputs: dict[str, Any]
    examples: list[int]
    other: dict[str, Any] | None = None
    answers: list[Any] | None = None
    foils: list[Any] | None = None
    groups: list[Any] | None = None
    boxes: list[Any] | None = None
    masks: list[Any] | None = None
    combine: str | None = None
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name} {list(value.shape)}" if isinstance(value, Tensor) else name for name, value in self.inputs.items()
        )
        has = ["the corrupt side as other"] if self.other is not None else []
        has += [name for name in ("answers", "foils", "groups", "boxes", "masks") if getattr(self, name) is not None]
        return f"Batch({len(self)} examples: {shapes}{'; ' if has else ''}{', '.join(has)})"

    def matched(self, tower: str, value: Tensor, axes: Sequence[int] = (1,), dropped: int = 0) -> Tensor:
        """A value ``[row … pos …]`` of the other run, read at the positions that belong to this run's.

        Args:
            tower: whose positions.
            value: of one site; a value in which all positions agree is returned as it is.
            axes: which axes are positions of that tower (2 and 3 of a pattern).
            dropped: how many first positions of the tower the site lacks.
        """
        found = self.maps.get(tower)
        if found is None or (found == np.arange(found.shape[1])).all():
            return value
        index = torch.from_numpy(found[:, dropped:] - dropped).clamp(min=0).to(value.device)
        for axis in axes:
            shape = [len(index) if a == 0 else index.shape[1] if a == axis else 1 for a in range(value.ndim)]
            value = value.take_along_dim(index.view(shape), axis)
        return value


def side_batches(side: Side, model: Any, size: int | None, seed: int) -> Iterator[Batch]:
    """The batches of one side, see :meth:`Side.batches`."""
    for rows in _groups([side], model, size):
        yield _batch(side._taken(rows), model, inputs_of(model, side._taken(rows), seed), None, {})


def compared_batches(side: Side, model: Any, size: int | None, compared: str) -> Iterator[Batch]:
    """The batches of one side of a dual encoder in which examples are the "images", the "texts", or "both", one text per image; the other tower runs
    on what the first example has.

    Raises:
        InputError: examples with several texts, where texts are examples; tensors made by hand (give the mappings themselves).
    """
    if not len(side):
        raise InputError("The data set holds no example.")
    first = side.examples[0]
    if compared == "images":
        beside = side._with(
            examples=tuple(one.compared_with(first, model.family.packing.of_images) for one in side.examples)
        )
        yield from side_batches(beside, model, size, 0)
        return
    texts = [one.text if isinstance(one.text, str) else (one.text or ("",))[0] for one in side.examples]
    if any(one.tensors is not None or not one.text or _several(one.text) for one in side.examples):
        raise InputError("Texts are the examples of these sites: give one text per example, as a string.")
    size = size or automatic_size(model, side[0])
    for start in range(0, len(side), size):
        part = side[start : start + size]
        pictures = [one.pictures for one in part.examples] if compared == "both" else [first.pictures]
        yield _batch(part, model, model.inputs(images=pictures, text=texts[start : start + size]), None, {})


def _several(text: Any) -> bool:
    return not isinstance(text, str) and len(text) > 1


def pair_batches(pairs: Pairs, model: Any, size: int | None, align: Align, seed: int) -> Iterator[Batch]:
    """The batches of pairs, see :meth:`Pairs.batches`."""
    for rows in _groups([pairs.clean, pairs.corrupt], model, size):
        part = pairs._taken(rows)
        this, other = together(model, [part.clean, part.corrupt], seed)
        maps = {} if align is None else aligned(model.tokens(this), model.tokens(other), align, part)
        yield _batch(part.clean, model, this, other, maps)


def _batch(side: Side, model: Any, inputs: dict[str, Any], other: dict[str, Any] | None, maps: Any) -> Batch:
    listed = {
        key: None if getattr(side, key) is None else list(getattr(side, key)) for key in ("groups", "boxes", "masks")
    }
    answers, foils = (
        None if held is None else [answer_ids(one, model, side.combine) for one in held]
        for held in (side.answers, side.foils)
    )
    return Batch(inputs, list(side.numbers), other, answers, foils, combine=side.combine, maps=maps, **listed)


# -- which examples run together -----------------------------------------------------------------------------------------------------------


def _groups(sides: Sequence[Side], model: Any, size: int | None) -> Iterator[list[int]]:
    """Rows that run together, in order."""
    if not len(sides[0]):
        raise InputError("The data set holds no example.")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise InputError(f"size={size!r} is not understood: give the number of examples run at once, or None.")
    size = size or automatic_size(model, sides[0][0])
    rows: list[int] = []
    key: Any = None
    for row in range(len(sides[0])):
        own = [_key(side.examples[row], model) for side in sides]
        if rows and (len(rows) == size or own != key):
            yield rows
            rows = []
        rows, key = [*rows, row], own
    yield rows


def _key(example: Example, model: Any) -> str:
    """What must be equal for examples to run together."""
    fixed = {name: value for name, value in example.settings.items() if not _per_example(value)}
    if example.tensors is None:
        texts = example.text if model.is_dual else example.text is None
        return of_json(plain([texts, example.image is None, fixed, sorted(example.settings)]))
    held: dict[str, Any] = {}
    filled = _fills(example.tensors) and not model.is_dual
    of_images = model.family.packing.of_images
    for name, value in example.tensors.items():
        if not isinstance(value, (Tensor, np.ndarray)) or not value.ndim:
            held[name] = plain(value)
        elif model.is_dual and name not in of_images:
            held[name] = of_tensor(torch.as_tensor(value))
        else:
            shape = value.shape[1:] if name in of_images or not filled else value.shape[2:]
            held[name] = [str(value.dtype), list(shape)]
    return of_json([held, fixed])


def _per_example(value: Any) -> bool:
    """Whether a keyword is data of one example rather than a switch for all."""
    return isinstance(value, (Tensor, np.ndarray, list, tuple))


def automatic_size(model: Any, one: Side) -> int:
    """How many examples run at once, by the memory that all activations of one example take."""
    tokens = model.tokens(inputs_of(model, one, 0))
    positions = sum(found.kind.size for found in tokens.values())
    width = sum(
        tokens[name].kind.size * tower.cfg.n_layers * 12 * tower.cfg.d_model
        for name, tower in model.towers.items()
        if name in tokens
    )
    budget = BUDGET
    if model.device.type == "cuda":
        budget = int(SHARE * torch.cuda.mem_get_info(model.device)[0])
    return max(1, min(budget // max(1, width * model.dtype.itemsize), POSITIONS // max(1, positions), 256))


# -- inputs --------------------------------------------------------------------------------------------------------------------------------


def inputs_of(model: Any, side: Side, seed: int = 0) -> dict[str, Any]:
    """The inputs of examples that run together, prompts filled up on the right."""
    examples = side.examples
    made = (
        joined(model, [one.tensors for one in examples])
        if examples[0].tensors is not None
        else _processed(model, examples)
    )
    given = {*examples[0].settings, *(examples[0].tensors or ())}
    random = [name for name in model.family.required if name not in given]
    if random and model.family.drawn is not None:
        without = {name: value for name, value in made.items() if name not in random}
        drawn = [
            model.inputs(**model.family.packing.take(model, without, [row]), seed=seed + number)
            for row, number in enumerate(side.numbers)
        ]
        made |= {name: torch.cat([one[name] for one in drawn]) for name in random}
    return made


def _processed(model: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Pictures and texts through the model's processor."""
    first = examples[0]
    images = None if first.image is None else [one.pictures for one in examples]
    text: Any = None
    if first.text is not None:
        same = (first.text,) if isinstance(first.text, str) else first.text
        text = list(same) if model.is_dual else [one.text for one in examples]
    if text is not None and not all(isinstance(one, str) for one in text):
        raise InputError(
            "An example has several texts, and this model reads one prompt per example: give a string each."
        )
    alone = getattr(model.tokenizer, "pad_token", "") is None and len(examples) > 1 and not model.is_dual
    if alone and text is not None:
        # A tokenizer without a padding token refuses texts of different lengths.
        return joined(model, [_processed(model, [one]) for one in examples])
    settings = {name: _stacked([one.settings[name] for one in examples]) for name in first.settings}
    made = model.inputs(images=images, text=text, **settings)
    return made if model.is_dual else to_the_right(model, made)


def _stacked(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(list(values))
    return np.stack([np.asarray(one) for one in values]) if _per_example(first) else first


def joined(model: Any, parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Inputs of several examples as one mapping; prompts are filled up, texts of a dual encoder stand once.

    Raises:
        InputError: parts that hold different things.
    """
    packing = model.family.packing
    # Metrics read prompts that name every position.
    given = [
        packing.laid_out(model, {name: _placed(model, value) for name, value in (part or {}).items()}) for part in parts
    ]
    if any(part.keys() != given[0].keys() for part in given):
        raise InputError("Examples made by hand hold different inputs; give each of them the same names.")
    if not model.is_dual and all(_fills(part) for part in given):
        given = [to_the_right(model, part) for part in given]
        width = max(part["attention_mask"].shape[1] for part in given)
        given = [filled(model, part, width) for part in given]
    return packing.join(model, given, "images")


def _placed(model: Any, value: Any) -> Any:
    value = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


def _fills(inputs: Mapping[str, Any]) -> bool:
    """Whether the prompts of inputs can be filled up: their mask, if there is one, says which positions are there."""
    mask = inputs.get("attention_mask")
    read = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return read is not None and (mask is None or mask.ndim == 2) and inputs.get("past_key_values") is None


def along_text(model: Any, inputs: Mapping[str, Any]) -> list[str]:
    """The inputs that have the positions of the prompt as their second axis."""
    shape = inputs["attention_mask"].shape
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor)
        and name not in model.family.packing.of_images
        and value.shape[:2] == shape
        and value.ndim <= 3
    ]


def to_the_right(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Prompts with what fills them up behind them, and no longer than the longest; inputs without a prompt as they are."""
    if not _fills(inputs):
        return inputs
    made = dict(inputs)
    if made.get("attention_mask") is None:
        read = made.get("input_ids", made.get("inputs_embeds"))
        made["attention_mask"] = torch.ones(read.shape[:2], dtype=torch.long, device=read.device)  # type: ignore[union-attr]
    mask = made["attention_mask"].bool()
    first = mask.int().argmax(1)
    length = int((mask.shape[1] - mask.flip(1).int().argmax(1) - first).max())
    if not bool(first.any()) and length == mask.shape[1]:
        return made
    width = mask.shape[1]
    index = (torch.arange(width, device=mask.device) + first[:, None]) % width
    for name in along_text(model, made):
        value = made[name]
        moved = value.take_along_dim(index.view(*index.shape, *[1] * (value.ndim - 2)).to(value.device), 1)
        made[name] = moved[:, :length]
    return made


def filled(model: Any, inputs: dict[str, Any], width: int) -> dict[str, Any]:
    """Prompts filled up on the right to ``width`` positions."""
    more = width - inputs["attention_mask"].shape[1]
    if more <= 0:
        return inputs
    made = dict(inputs)
    for name in along_text(model, inputs):
        value = inputs[name]
        blank = value.new_zeros(len(value), more, *value.shape[2:])
        made[name] = torch.cat([value, blank + _pad_id(model) if name == "input_ids" else blank], 1)
    return made


def _pad_id(model: Any) -> int:
    """An id for positions that nothing reads."""
    found = getattr(model.tokenizer, "pad_token_id", None)
    found = (
        getattr(getattr(model.config, "text_config", model.config), "pad_token_id", None) if found is None else found
    )
    return int(found or 0)


def together(model: Any, sides: Sequence[Side], seed: int = 0) -> list[dict[str, Any]]:
    """The inputs of the same examples on several sides, prompts filled up to one length, so that rows and positions agree."""
    made = [inputs_of(model, side, seed) for side in sides]
    if model.is_dual or not all(_fills(inputs) for inputs in made):
        return made
    made = [to_the_right(model, inputs) for inputs in made]
    width = max(inputs["attention_mask"].shape[1] for inputs in made)
    return [filled(model, inputs, width) for inputs in made]


# -- answers -------------------------------------------------------------------------------------------------------------------------------


def answer_ids(answer: Any, model: Any, combine: str | None) -> Any:
    """The id of an answer, or a list of them for several tokens.

    Raises:
        InputError: a word of several tokens, or several answers, where ``combine`` does not say how they are read; an unknown word.
    """
    if answer is None or isinstance(answer, float):
        return answer
    several = isinstance(answer, (list, tuple))
    found: list[int] = []
    for one in answer if several else [answer]:
        try:
            found.append(int(answers.answer_ids(one, model)))  # type: ignore[arg-type]
        except InputError:
            pieces = None if combine is None or not isinstance(one, str) else _pieces(model, one)
            if not pieces:
                raise
            found += pieces
    if combine is None:
        if several:
            raise InputError(
                f"The answer {answer!r} is several: say combine='first', 'mean' or 'joint' for the data set."
            )
        return found[0]
    return found[0] if combine == "first" else found


def _pieces(model: Any, word: str) -> list[int]:
    if model.tokenizer is None:
        return []
    ids = [int(one) for one in model.tokenizer.encode(" " + word, add_special_tokens=False)]
    return [] if model.tokenizer.unk_token_id in ids else ids


# -- positions that belong together --------------------------------------------------------------------------------------------------------


def fits(this: Mapping[str, Any], other: Mapping[str, Any]) -> np.ndarray:
    """Which examples have as many positions of every kind in both runs, in every tower, bool ``[example]``; none where rows differ."""
    count = max((tokens.n_examples for tokens in this.values()), default=0)
    found = np.ones(count, bool)
    for name, tokens in this.items():
        twin = other.get(name)
        if twin is None or twin.n_rows != tokens.n_rows or twin.n_examples != tokens.n_examples:
            return np.zeros(count, bool)
        for row, example in enumerate(tokens.example):
            found[example] &= _counts(tokens.kind[row]) == _counts(twin.kind[row])
    return found


def _counts(kinds: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(kinds, return_counts=True)
    return {str(name): int(n) for name, n in zip(names, counts, strict=True) if name not in _ABSENT}


def aligned(this: Mapping[str, Any], other: Mapping[str, Any], align: Align, pairs: Pairs) -> dict[str, np.ndarray]:
    """Per tower, the position of the other run for every position of this one, ``[row pos]``.

    Raises:
        InputError: runs that do not fit together, a map that is not understood.
    """
    found: dict[str, np.ndarray] = {}
    for name, tokens in this.items():
        twin = other.get(name)
        if twin is None and align == "maps" and _unmapped(pairs, name):
            # One side has no picture, and the maps say which of the others belong together.
            continue
        if twin is None or twin.n_rows != tokens.n_rows:
            raise InputError(
                f"The two sides take different rows of the {name} tower ({tokens.n_rows} and {0 if twin is None else twin.n_rows}), so nothing "
                "says which belong together; pairs.answered(model) leaves such pairs out."
            )
        if align == "index":
            found[name] = _by_index(tokens, twin)
        elif align == "kind":
            found[name] = _by_kind(tokens, twin, pairs.numbers)
        elif align == "maps":
            found[name] = _given(tokens, twin, pairs)
        elif callable(align):
            made = align(tokens, twin)
            found[name] = _by_kind(tokens, twin, pairs.numbers) if made is None else _checked(made, tokens, twin)
        else:
            raise InputError(f"align={align!r} is not understood: 'kind', 'index', or a function of two token maps.")
    return found


def _unmapped(pairs: Pairs, tower: str) -> bool:
    """Whether the maps of pairs leave a tower out."""
    return pairs.maps is not None and all(isinstance(one, Mapping) and tower not in one for one in pairs.maps)


def _by_kind(tokens: Any, twin: Any, numbers: Sequence[int]) -> np.ndarray:
    found = _by_index(tokens, twin)
    for row in range(tokens.n_rows):
        kinds, others = tokens.kind[row], twin.kind[row]
        if len(kinds) == len(others) and (kinds == others).all():
            continue
        for kind in {**_counts(kinds), **_counts(others)}:
            here, there = np.flatnonzero(kinds == kind), np.flatnonzero(others == kind)
            if len(here) != len(there):
                example = int(tokens.example[row])
                number = numbers[example] if example < len(numbers) else example
                raise unequal(number, kind, len(here), len(there), f" in the {tokens.tower} tower")
            found[row, here] = there
    return found


def unequal(number: int, kind: str, here: int | None, there: int | None, where: str = "") -> InputError:
    """What is said of a pair whose two sides have other numbers of positions of a kind."""
    return InputError(
        f"Example {number} has {here} {kind} positions{where} on one side and {there} on the other, so they do not belong together one by one: "
        "pairs.answered(model) leaves such pairs out; or say which do with align='index', or with a function of the two token maps."
    )


def _given(tokens: Any, twin: Any, pairs: Pairs) -> np.ndarray:
    if pairs.maps is None:
        raise InputError("These pairs hold no position maps: give maps= when they are made, or align='kind'.")
    found = _by_index(tokens, twin)
    for row, example in enumerate(tokens.example):
        own: Any = pairs.maps[int(example)]
        own = (own if isinstance(own, Mapping) else {"language": own}).get(tokens.tower)
        if own is not None:
            found[row, : len(own)] = own
    return _checked(found, tokens, twin)


def _by_index(tokens: Any, twin: Any) -> np.ndarray:
    return np.broadcast_to(np.minimum(np.arange(tokens.n_positions), twin.n_positions - 1), tokens.kind.shape).copy()


def _checked(made: Any, tokens: Any, twin: Any) -> np.ndarray:
    found = np.asarray(made)
    if found.ndim == 1:
        found = np.broadcast_to(found, (tokens.n_rows, len(found)))
    if found.shape != tokens.kind.shape or found.dtype.kind not in "iu":
        raise InputError(
            f"A map of positions has one whole number for each of {tokens.n_positions} positions of the {tokens.tower} tower (or a row of them per "
            f"row), not {found.dtype} {list(found.shape)}."
        )
    if found.size and (found.min() < 0 or found.max() >= twin.n_positions):
        raise InputError(f"A map of positions names {found.max()}, and the other run has {twin.n_positions} positions.")
    return found
