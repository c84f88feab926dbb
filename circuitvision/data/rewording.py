"""Texts of a data set with one word replaced by another of as many tokens: symmetric token replacement, edited questions and captions.

A corrupt prompt of another length cannot be patched position by position, and padding it would be a second difference. So an edit of a text is
taken only if
the two texts have as many tokens and exactly the tokens of what was replaced differ; everything else is refused with the name of the example.
Tokens are those of the text without its pictures, which are the same on both sides. :func:`changed_tokens` says the same of two mappings of inputs as
a model reads them, padded on either side.

Every function returns :class:`~circuitvision.data.Pairs` whose clean side is the one given.

Source: symmetric token replacement, NOTICE (Golovanevsky et al., arXiv 2406.16320). Wrong captions by rule are in
:mod:`circuitvision.data.captions`.

Not covered: finding a word that fits the meaning; words that a tokenizer cuts together with their neighbours (refused).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from circuitvision.data.masking import generator_of
from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Side
from circuitvision.errors import InputError

Words = str | Sequence[str]
"""One word for all examples, or one per example."""


def replace_words(
    side: Side,
    old: Words,
    new: Words,
    tokenizer: Any,
    *,
    which: int | None = None,
    foils: Any = None,
    answers: Any = None,
) -> Pairs:
    """Symmetric token replacement: the same examples with one word of their text replaced by another of as many tokens.

    Args:
        side: the data set; where an example has several texts, every one that holds the word is edited.
        old: the word that is replaced, one for all or one per example; as written, upper case and all.
        new: what stands in its place, likewise; :func:`draw_words` finds one per example.
        tokenizer: a hooked model or its tokenizer.
        which: of several places where the word stands the ``which``-th, from 0 or (negative) from the end.
        answers, foils: what is right on the clean and on the corrupt side; None: those of the side.

    Returns:
        Pairs: the clean text, and the one with the word replaced.

    Raises:
        InputError: a word that is not there, stands in several places (say ``which``), has another number of tokens, or changes tokens beside its
            own; the message names the example.
    """
    olds, news = (_each(side, words, name) for words, name in ((old, "old"), (new, "new")))
    examples = []
    for number, example, was, becomes in zip(side.numbers, side.examples, olds, news, strict=True):
        texts = _texts(example.text, number)
        holding = [any(_places(text, was)) for text in texts]
        if not any(holding):
            raise InputError(f"The text of example {number} does not hold the word {was!r}: {texts[0]!r:.120}.")
        made = []
        for text, holds in zip(texts, holding, strict=True):
            if not holds:
                made.append(text)
                continue
            try:
                made.append(_replaced(text, was, becomes, tokenizer, which))
            except InputError as error:
                raise InputError(f"Example {number}: {error}") from error
        examples.append(dataclasses.replace(example, text=made[0] if isinstance(example.text, str) else tuple(made)))
    return _beside(side, examples, answers, foils)


def equal_length_words(
    text: str, old: str, words: Iterable[str], tokenizer: Any, *, which: int | None = None
) -> list[str]:
    """Those of some words that can stand in place of ``old`` in a text: as many tokens, and no token beside them changes.

    Raises:
        InputError: a text that does not hold ``old``, or holds it in several places (say ``which``).
    """
    _span(text, old, which)
    found = []
    for word in dict.fromkeys(words):
        try:
            _replaced(text, old, word, tokenizer, which)
        except InputError:
            continue
        found.append(word)
    return found


def draw_words(
    side: Side, old: Words, words: Iterable[str], tokenizer: Any, *, seed: int = 0, which: int | None = None
) -> list[str]:
    """Per example one of the words that can stand in place of ``old`` (:func:`equal_length_words`), drawn by the seed and by what the example is.

    Raises:
        InputError: an example for which none of them can, naming it.
    """
    candidates: list[str] = list(words)
    found = []
    for number, example, was in zip(side.numbers, side.examples, _each(side, old, "old"), strict=True):
        text = next((one for one in _texts(example.text, number) if any(_places(one, was))), None)
        if text is None:
            raise InputError(f"The text of example {number} does not hold the word {was!r}.")
        fitting = equal_length_words(text, was, candidates, tokenizer, which=which)
        if not fitting:
            raise InputError(
                f"None of {len(candidates)} words can stand in place of {was!r} in example {number}: all have another number of tokens, or "
                f"are that word."
            )
        found.append(fitting[int(generator_of(seed, example.digest).integers(len(fitting)))])
    return found


def edit_texts(
    side: Side,
    texts: Callable[[str], str] | Sequence[Any],
    tokenizer: Any,
    *,
    most: int | None = None,
    foils: Any = None,
    answers: Any = None,
) -> Pairs:
    """The same examples under edited questions or captions of as many tokens.

    Args:
        side: the data set.
        texts: the edited texts, one per example as the side has them (a tuple for several), or a function of one text.
        tokenizer: a hooked model or its tokenizer.
        most: how many tokens of a text may differ; None: any number.
        answers, foils: what is right on the clean and on the corrupt side; None: those of the side.

    Raises:
        InputError: another number of tokens, more of them that differ than ``most``, or a text that stays as it was; the message names the
            example.
    """
    listed = None if callable(texts) else list(texts)
    if listed is not None and len(listed) != len(side):
        raise InputError(f"There are {len(listed)} texts for {len(side)} examples; give one per example.")
    examples = []
    for row, (number, example) in enumerate(zip(side.numbers, side.examples, strict=True)):
        before = _texts(example.text, number)
        after = [texts(text) for text in before] if callable(texts) else _texts(listed[row], number)  # type: ignore[index]
        if len(after) != len(before):
            raise InputError(f"Example {number} has {len(before)} texts and {len(after)} edited ones.")
        counts = [
            len(_differing(_ids(one, tokenizer), _ids(other, tokenizer), f"Example {number}"))
            for one, other in zip(before, after, strict=True)
        ]
        if not any(counts):
            raise InputError(f"The text of example {number} stays as it was: {before[0]!r:.120}.")
        if most is not None and max(counts) > most:
            raise InputError(f"In example {number} {max(counts)} tokens differ, more than most={most}.")
        examples.append(dataclasses.replace(example, text=after[0] if isinstance(example.text, str) else tuple(after)))
    return _beside(side, examples, answers, foils)


def changed_tokens(inputs: Mapping[str, Any], other: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
    """Per row of two mappings of inputs the positions (of this one, of the other) whose token ids differ, padding on either side left out.

    Positions are absolute, padding included, so that they name what hooks see; the ``n``-th token that is there belongs to the ``n``-th.

    Raises:
        InputError: a row that holds another number of tokens in the other mapping, or mappings without ``input_ids``.
    """
    if any(one.get("input_ids") is None for one in (inputs, other)):
        raise InputError("These inputs hold no input_ids: give what model.inputs(images, text) makes.")
    ids, twin = (torch.as_tensor(one["input_ids"]).cpu() for one in (inputs, other))
    if len(ids) != len(twin):
        raise InputError(f"The inputs hold {len(ids)} rows and {len(twin)}; give both for the same examples.")
    masks = [_mask(one, own) for one, own in ((inputs, ids), (other, twin))]
    found = []
    for row in range(len(ids)):
        here, there = (np.flatnonzero(mask[row]) for mask in masks)
        differ = _differing(ids[row][here].tolist(), twin[row][there].tolist(), f"Row {row}")
        found.append([(int(here[place]), int(there[place])) for place in differ])
    return found


def _mask(inputs: Mapping[str, Any], ids: torch.Tensor) -> np.ndarray:
    mask = inputs.get("attention_mask")
    return np.ones(ids.shape, bool) if mask is None else torch.as_tensor(mask).cpu().bool().numpy()


# -- one text ------------------------------------------------------------------------------------------------------------------------------


def _each(side: Side, words: Words, name: str) -> list[str]:
    if not len(side):
        raise InputError("The data set holds no example.")
    listed = [words] * len(side) if isinstance(words, str) else list(words)
    if len(listed) != len(side):
        raise InputError(
            f"{name} holds {len(listed)} words for {len(side)} examples; give one word, or one per example."
        )
    for number, word in zip(side.numbers, listed, strict=True):
        if not isinstance(word, str) or not word.strip():
            raise InputError(f"{name} holds {word!r} for example {number}, which is no word.")
    return listed


def _texts(text: Any, number: int) -> list[str]:
    found = [text] if isinstance(text, str) else list(text or ())
    if not found or not all(isinstance(one, str) for one in found):
        raise InputError(f"Example {number} has no text to edit.")
    return found


def _places(text: str, word: str) -> list[tuple[int, int]]:
    """Where a word stands in a text: no letter or digit touches it."""
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]


def _span(text: str, word: str, which: int | None) -> tuple[int, int]:
    places = _places(text, word)
    if not places:
        raise InputError(f"the text does not hold the word {word!r}: {text!r:.120}")
    if which is None and len(places) > 1:
        raise InputError(
            f"{word!r} stands in {len(places)} places of {text!r:.120}: say which=0, 1, … or -1 for the last"
        )
    number = 0 if which is None else which
    if not -len(places) <= number < len(places):
        raise InputError(f"{word!r} stands in {len(places)} places of the text, and which={number} was asked for")
    return places[number]


def _replaced(text: str, old: str, new: str, tokenizer: Any, which: int | None) -> str:
    """A text with one word replaced, if as many tokens stand there and no other one changes."""
    start, end = _span(text, old, which)
    made = text[:start] + new + text[end:]
    if made == text:
        raise InputError(f"{new!r} is the word that is there already")
    ids, twin = (_ids(one, tokenizer) for one in (text, made))
    differ = _differing(ids, twin, f"{new!r} in place of {old!r}")
    own, theirs = _tokens_of(text, start, end, tokenizer), _tokens_of(made, start, start + len(new), tokenizer)
    if not differ:
        raise InputError(f"{old!r} and {new!r} have the same tokens: the tokenizer does not know them apart")
    if own is None or theirs is None:
        # Without offsets: what differs is one stretch, as a replaced word is.
        beside = [place for place in differ if not differ[0] <= place <= differ[-1]]
    else:
        beside = [place for place in differ if place not in own] or sorted(own ^ theirs)
    if beside:
        raise InputError(
            f"{new!r} in place of {old!r} changes token {beside[0]} as well, which is not the word's: choose another word"
        )
    return made


def _plain(tokenizer: Any) -> Any:
    """The tokenizer of a model or processor, or what was given."""
    found = tokenizer
    for _ in range(2):
        if not callable(getattr(found, "convert_ids_to_tokens", None)):
            found = getattr(found, "tokenizer", None)
    if found is None:
        raise InputError("Texts are cut by a tokenizer: give one, or a model that was wrapped with its processor.")
    return found


def _ids(text: str, tokenizer: Any) -> list[int]:
    return [int(one) for one in _plain(tokenizer)(text)["input_ids"]]


def _tokens_of(text: str, start: int, end: int, tokenizer: Any) -> set[int] | None:
    """The tokens that read any of some characters; None where the tokenizer does not say."""
    found = _plain(tokenizer)
    if not getattr(found, "is_fast", False):
        return None
    offsets = found(text, return_offsets_mapping=True)["offset_mapping"]
    return {number for number, (first, last) in enumerate(offsets) if first < end and last > start and last > first}


def _differing(ids: Sequence[int], twin: Sequence[int], what: str) -> list[int]:
    if len(ids) != len(twin):
        raise InputError(
            f"{what}: {len(ids)} tokens on one side and {len(twin)} on the other, so positions do not belong together one by one: choose "
            f"words of as many "
            "tokens (equal_length_words finds them)."
        )
    return [place for place, (one, other) in enumerate(zip(ids, twin, strict=True)) if one != other]


def _beside(side: Side, examples: Sequence[Any], answers: Any, foils: Any) -> Pairs:
    from circuitvision.data.sides import column

    facts = {"answers": answers, "foils": foils}
    given = {name: column(value, len(side), name) for name, value in facts.items() if value is not None}
    clean = side._with(**given)
    return Pairs.from_sides(clean, clean._with(examples=tuple(examples)))
