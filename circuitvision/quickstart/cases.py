"""What is asked of a model: two images, an answer that is right for the one, and a foil that is right for the other.

What an answer is, and what a case needs beside the images, goes by the kind of the model's output head, one row of :data:`KINDS` each: words of a
vocabulary are asked for by a prompt, classes by nothing, captions are the two texts that a dual encoder compares an image with. A case of one's own
and the pairs that an organism draws take the same way: both are :class:`~circuitvision.data.Pairs`.

Not covered: the other kinds of output heads (actions, hidden states), several images in one prompt, answers of several tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from circuitvision.data import Pairs, pictures
from circuitvision.errors import InputError, UnsupportedModelError, nearest


@dataclass(frozen=True)
class AnswerKind:
    """What a kind of output head answers with.

    ``noun`` and ``says`` are how sentences speak of it; ``needs`` are the parts of a case, beside the images, that must be given, and ``prompted``
    says whether there is a prompt; ``hint`` is how a case is given.
    """

    noun: str
    plural: str
    says: str
    needs: tuple[str, ...]
    prompted: bool
    hint: str


WORDS = AnswerKind(
    "word", "words", "says", ("prompt", "answer", "foil"), True, "a prompt, and answer and foil as words"
)
CLASSES = AnswerKind(
    "class",
    "classes",
    "says",
    (),
    False,
    "answer and foil as classes (by name or number; its own first choices if left out)",
)
CAPTIONS = AnswerKind("caption", "captions", "prefers", ("answer", "foil"), False, "answer and foil as two captions")
KINDS: dict[str, AnswerKind] = {"tokens": WORDS, "classes": CLASSES, "texts": CAPTIONS}
"""Kind of the output head that gives the answer -> what it answers with."""

Given = Mapping[str, Any]
PARTS = ("clean", "corrupt", "prompt", "answer", "foil")


@dataclass(frozen=True)
class Case:
    """Two images and what is asked about them; ``answer`` is right for ``clean``, ``foil`` for ``corrupt``; ``prompt`` is "" where there is none."""

    clean: Image.Image
    corrupt: Image.Image
    prompt: str
    answer: str
    foil: str
    kind: AnswerKind = WORDS

    @property
    def names(self) -> tuple[str, str]:
        """Short names of answer and foil: of captions that differ in a word or two, those words."""
        if self.kind is CAPTIONS:
            first, second = self.answer.split(), self.foil.split()
            differ = [both for both in zip(first, second, strict=False) if both[0] != both[1]]
            few = len(first) == len(second) and 0 < len(differ) <= 2
            one, other = (" … ".join(words) for words in zip(*differ, strict=True)) if few else ("", "")
        else:
            # Class names of large data sets are lists of synonyms.
            one, other = (text.split(",")[0].strip() for text in (self.answer, self.foil))
        return (
            (one, other) if one and other and one != other and max(len(one), len(other)) <= 24 else ("answer", "foil")
        )


def kind_of(model: Any) -> AnswerKind:
    """What a model answers with.

    Raises:
        UnsupportedModelError: a model that reads no images, or whose output is neither words, classes nor a comparison with texts.
    """
    kind = model.towers[model.flow.answer].output_head.kind
    if kind in KINDS and image_towers(model):
        return KINDS[kind]
    reason = "reads no images" if kind in KINDS else f"gives {kind if kind != 'hidden' else 'hidden states'}"
    raise UnsupportedModelError(
        f"The quickstart explains what a model answers about an image (a word, a class, one of two captions), and this {model.family.name} model "
        f"{reason}. Call circuitvision.circuits.head_importance with a metric of your own instead."
    )


def image_towers(model: Any) -> list[str]:
    """The towers that read images."""
    return [name for name, tower in model.towers.items() if tower.stack.image]


def reached_towers(model: Any) -> list[str]:
    """The towers that a change of the images alone can reach, in the order in which they run."""
    starts = image_towers(model)
    return [name for name in model.towers if name in starts or model.flow.is_reached(name, starts)]


def opened(clean: Any, corrupt: Any, **rest: Any) -> dict[str, Any] | None:
    """A case of one's own with its images opened; None where no part is given.

    Raises:
        InputError: one image without the other, a file that is no image, twice the same image.
    """
    given = {"clean": clean, "corrupt": corrupt, **rest}
    if all(value is None for value in given.values()):
        return None
    missing = [name for name in ("clean", "corrupt") if given[name] is None]
    if missing:
        raise InputError(f"A case of your own needs two images, clean and corrupt; missing: {', '.join(missing)}.")
    images = {name: pictures.prepared(given[name], channels=3) for name in ("clean", "corrupt")}
    first, second = (np.asarray(image.convert("RGB")) for image in images.values())
    if first.shape == second.shape and bool((first == second).all()):
        raise InputError("clean and corrupt are the same image, so nothing tells them apart: give two that differ.")
    return {**given, **images}


def given_pair(model: Any, given: Given) -> Pairs:
    """A case of one's own as a data set of one pair.

    Raises:
        InputError: parts missing that this model needs, a prompt where it reads none, an answer that it cannot give, answer and foil alike.
    """
    kind = kind_of(model)
    missing = [name for name in kind.needs if given[name] is None]
    if missing:
        raise InputError(f"This {model.family.name} model needs {kind.hint}; missing: {', '.join(missing)}.")
    if given["prompt"] is not None and not kind.prompted:
        raise InputError(f"This {model.family.name} model reads no prompt: leave prompt out and give {kind.hint}.")
    answer, foil = given["answer"], given["foil"]
    if kind is CLASSES:
        answer, foil = (_class_id(model, said, given[image]) for said, image in ((answer, "clean"), (foil, "corrupt")))
        if answer == foil and None in (given["answer"], given["foil"]):
            raise InputError(
                f"Answer and foil are both {_class_name(model, answer)!r} (what is left out is the model's first choice for its image): give answer "
                "and foil, two of its classes."
            )
    if answer == foil:
        raise InputError(f"answer and foil are the same, {given['answer']!r}: give two {kind.plural} to tell apart.")
    texts: list[Any] | None = None if given["prompt"] is None else [str(given["prompt"])]
    if kind is CAPTIONS:
        texts, (answer, foil) = [(str(answer), str(foil))], (0, 1)
    return Pairs([given["clean"]], texts, corrupt_images=[given["corrupt"]], answers=[answer], foils=[foil])


def _class_id(model: Any, said: Any, image: Image.Image) -> int:
    """A class by name or number; where nothing is said, the first choice for an image."""
    if said is None:
        with torch.no_grad():
            return int(model(model.inputs(images=image))[0].argmax())
    config = model.config
    known = {str(name): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    known |= {str(name): int(number) for number, name in (getattr(config, "id2label", None) or {}).items()}
    if str(said) in known:
        return known[str(said)]
    size = model.towers[model.flow.answer].output_head.size
    if str(said).isdecimal() and int(said) < size:
        return int(said)
    raise InputError(
        f"{said!r} is no class of this model; nearest: {', '.join(nearest(str(said), known))}. It has {size} classes, by name or by number from 0."
    )


def _class_name(model: Any, number: int) -> str:
    return model.towers[model.flow.answer].output_head.names([number])[str(number)]


def case_of(model: Any, pairs: Pairs) -> Case:
    """The first of some pairs, as it is spoken of."""
    kind = kind_of(model)
    clean, corrupt = pairs.clean.examples[0], pairs.corrupt.examples[0]
    assert pairs.answers is not None
    assert pairs.foils is not None
    said = [pairs.answers[0], pairs.foils[0]]
    if kind is CAPTIONS:
        said = [(clean.text or ())[number] for number in said]
    else:
        said = [one if isinstance(one, str) else _class_name(model, int(one)) for one in said]
    held = [one.pictures[0] if isinstance(one.pictures, list | tuple) else one.pictures for one in (clean, corrupt)]
    images = [pictures.prepared(one, channels=3) for one in held]
    prompt = str(clean.text) if kind.prompted else ""
    return Case(images[0], images[1], prompt, said[0], said[1], kind)
