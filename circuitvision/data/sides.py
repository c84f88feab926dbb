"""One side of a data set: raw inputs of many examples with their answers, before any model has seen them.

An :class:`Example` is what one run of one example is made from: pictures, a text (or the texts an image is compared with), tensors made by hand,
and further keywords of ``model.inputs`` (a robot's state). A :class:`Side` is a sequence of them with the facts that stand beside: answers, foils,
groups, boxes, masks. Everything is immutable; a subset shares what it holds with the whole and keeps the numbers of its examples, so that results
of parts can be joined.

Pictures are files, PIL images, arrays or tensors; files, and columns of stored data sets, are opened when a batch needs them.

Not covered: videos, and answers that take several positions of the output (several tokens are all read at the same position).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError, UnknownExampleError, checked_seed

if TYPE_CHECKING:
    import pandas

    from circuitvision.data.batches import Batch
    from circuitvision.model.regions import Region

COMBINE = ("first", "mean", "joint")
"""How several tokens of one answer are read."""
ColumnsType = TypeVar("ColumnsType", bound="Columns")


@dataclass(frozen=True, eq=False)
class Stored:
    """A picture in a stored data set, fetched when it is needed."""

    dataset: Any
    row: int
    column: str

    def __call__(self) -> Any:
        return self.dataset[self.row][self.column]


@dataclass(frozen=True, eq=False)
class Example:
    """The raw input of one example.

    Attributes:
        image: a picture, or a list of several for one prompt; None for none.
        text: a prompt; a tuple of texts where an image is compared with several (dual encoders).
        tensors: in place of both, the model's inputs made by hand, of this one example.
        settings: further keywords of ``model.inputs``, of this one example (``state`` of a robot).
    """

    image: Any = None
    text: str | tuple[str, ...] | None = None
    tensors: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def compared_with(self, other: Example, of_images: Sequence[str]) -> Example:
        """This image beside the texts of another example (dual encoders); ``of_images`` are the names of inputs that hold images."""
        if self.tensors is None or other.tensors is None:
            return Example(self.image, other.text, None, self.settings)
        texts = {name: value for name, value in other.tensors.items() if name not in of_images}
        return Example(tensors={**{name: v for name, v in self.tensors.items() if name in of_images}, **texts})

    @property
    def pictures(self) -> Any:
        """``image`` with stored pictures fetched; files stay names."""
        return _each(self.image, lambda one: one() if isinstance(one, Stored) else one)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: pixels, texts, tensors; where a file lies does not count."""
        pixels = _each(self.image, lambda one: opened(one) if isinstance(one, (str, Path, Stored)) else one)
        return of_json(plain([pixels, self.text, self.tensors and dict(self.tensors), dict(self.settings)]))


def _each(image: Any, change: Any) -> Any:
    return [change(one) for one in image] if isinstance(image, (list, tuple)) else change(image)


def opened(picture: Any) -> Any:
    """A picture in memory: files are read and turned as their EXIF data say, stored pictures fetched.

    Raises:
        InputError: a file that is not there, or is no picture.
    """
    found = picture() if isinstance(picture, Stored) else picture
    if not isinstance(found, (str, Path)):
        return found
    if str(found).startswith(("http://", "https://", "data:")):
        # The name is all that is known before a batch needs it.
        return str(found)
    try:
        with Image.open(Path(found).expanduser()) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except OSError as error:
        raise InputError(f"{str(found)!r:.200} could not be read as a picture: {error}.") from error


def examples_of(images: Any, texts: Any, inputs: Any, settings: Any, side: str) -> tuple[Example, ...]:
    """Raw inputs given as columns, as examples. One text for all is repeated; so is a list of texts beside several images.

    Raises:
        InputError: nothing given, columns of different lengths, tensors that cannot be cut into examples.
    """
    if inputs is not None:
        if images is not None or texts is not None:
            raise InputError(f"The {side} side is given as inputs and as images or texts: give one of them.")
        made = _cut(inputs, side)
        rows = _settings(settings, len(made), side)
        return tuple(Example(tensors=one, settings=own) for one, own in zip(made, rows, strict=True))
    pictures = None if images is None else _listed(images, "images")
    texts = _texts(texts, None if pictures is None else len(pictures))
    if pictures is None and texts is None:
        raise InputError(f"The {side} side holds nothing: give images, texts, or inputs made by hand.")
    count = len(pictures if pictures is not None else texts or [])
    if texts is not None and len(texts) != count:
        raise InputError(f"The {side} side has {count} images and {len(texts)} texts; give one text, or one per image.")
    return tuple(
        Example(
            pictures[number] if pictures is not None else None, texts[number] if texts is not None else None, None, own
        )
        for number, own in enumerate(_settings(settings, count, side))
    )


def _listed(images: Any, name: str) -> list[Any]:
    if isinstance(images, (str, Path, Image.Image)) or not hasattr(images, "__len__"):
        raise InputError(f"{name} is a {type(images).__name__}; give a list, one entry per example.")
    return [images[number] for number in range(len(images))]


def _texts(texts: Any, count: int | None) -> list[str | tuple[str, ...]] | None:
    if texts is None:
        return None
    if isinstance(texts, str):
        if count is None:
            raise InputError(
                "texts is one string and there are no images to repeat it for; give a list, one per example."
            )
        return [texts] * count
    given = list(texts)
    wrong = [
        text
        for text in given
        if not isinstance(text, str)
        and not (isinstance(text, (list, tuple)) and text and all(isinstance(one, str) for one in text))
    ]
    if wrong:
        raise InputError(
            f"A text is a string, or a tuple of strings that an image is compared with, not {wrong[0]!r:.80}."
        )
    return [text if isinstance(text, str) else tuple(text) for text in given]


def _settings(settings: Any, count: int, side: str) -> list[Mapping[str, Any]]:
    """Keywords of every example: columns (``{"state": [example …]}``) or one mapping per example."""
    if settings is None:
        return [{}] * count
    if isinstance(settings, Mapping):
        for name, column in settings.items():
            if not hasattr(column, "__len__") or isinstance(column, str) or len(column) != count:
                raise InputError(
                    f"settings[{name!r}] of the {side} side must have one entry for each of {count} examples."
                )
        return [{name: column[number] for name, column in settings.items()} for number in range(count)]
    if len(settings) != count:
        raise InputError(f"There are settings of {len(settings)} examples for {count}; give one mapping per example.")
    return [dict(own) for own in settings]


def _cut(inputs: Any, side: str) -> list[Mapping[str, Any]]:
    """Tensors made by hand as one mapping per example."""
    if isinstance(inputs, (Tensor, np.ndarray)):
        inputs = {"pixel_values": inputs}
    if not isinstance(inputs, Mapping):
        made = list(inputs)
        wrong = [one for one in made if not isinstance(one, Mapping)]
        if wrong:
            raise InputError(f"inputs holds a {type(wrong[0]).__name__}; give one mapping of tensors per example.")
        return made
    batched = {name: v for name, v in inputs.items() if isinstance(v, (Tensor, np.ndarray)) and v.ndim}
    counts = {len(value) for value in batched.values()}
    if len(counts) != 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batched.items())
        raise InputError(
            f"The inputs of the {side} side cannot be cut into examples ({shapes or 'no tensor'}): give a list, one mapping per example."
        )
    return [
        {name: value[row : row + 1] if name in batched else value for name, value in inputs.items()}
        for row in range(counts.pop())
    ]


# -- a table of examples -------------------------------------------------------------------------------------------------------------------


def column(values: Any, count: int, name: str) -> tuple[Any, ...] | None:
    """A fact about every example; one string or number stands for all.

    Raises:
        InputError: another number of entries.
    """
    if values is None:
        return None
    if isinstance(values, (str, int, float)):
        return (values,) * count
    found = tuple(values.tolist() if isinstance(values, (Tensor, np.ndarray)) and values.ndim == 1 else values)
    if len(found) != count:
        raise InputError(f"There are {len(found)} {name} for {count} examples; give one per example.")
    return found


class Columns:
    """What data sets share: length, slices, shuffling, joining. Subclasses say how rows are taken and put together."""

    numbers: tuple[int, ...]

    def _taken(self: ColumnsType, rows: Sequence[int]) -> ColumnsType:
        raise NotImplementedError

    @classmethod
    def concat(cls: type[ColumnsType], parts: Iterable[ColumnsType]) -> ColumnsType:
        """Several data sets as one. Numbers of examples stay where they are all different (parts of one whole); else they count anew from 0."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name in ("images", "texts"):
            of = "" if isinstance(self, Side) else ".clean"
            raise AttributeError(
                f"A {type(self).__name__} holds raw examples: [one.{name[:-1]} for one in data{of}.examples]."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self: ColumnsType, index: Any) -> ColumnsType:
        """Some examples, by number in this order, slice, list of numbers or one truth value per example; their numbers stay."""
        return self._taken(_rows(index, len(self)))

    def __iter__(self: ColumnsType) -> Iterator[ColumnsType]:
        """Data sets of one example each."""
        return (self._taken([row]) for row in range(len(self)))

    def at(self: ColumnsType, numbers: Iterable[int]) -> ColumnsType:
        """The examples with these numbers, in the order asked for.

        Raises:
            InputError: a number that no example has.
        """
        rows = {number: row for row, number in enumerate(self.numbers)}
        asked = [int(number) for number in numbers]
        missing = [number for number in asked if number not in rows]
        if missing:
            raise InputError(f"There is no example {missing[0]} among the {len(self)} of this data set.")
        return self._taken([rows[number] for number in asked])

    def shuffled(self: ColumnsType, seed: int) -> ColumnsType:
        """The same examples in a random order."""
        return self._taken(np.random.default_rng(checked_seed(seed)).permutation(len(self)).tolist())

    def __add__(self: ColumnsType, other: ColumnsType) -> ColumnsType:
        return self.concat([self, other])


def _rows(index: Any, count: int) -> list[int]:
    if isinstance(index, slice):
        return list(range(count))[index]
    try:
        if not isinstance(index, (bool, Tensor, np.ndarray)) and hasattr(index, "__index__"):
            asked = [operator.index(index)]
        else:
            given = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
            if given.dtype == bool:
                if given.shape != (count,):
                    raise InputError(
                        f"There are truth values of shape {given.shape} for {count} examples; give one each."
                    )
                return np.flatnonzero(given).tolist()
            asked = [operator.index(row) for row in given.reshape(-1).tolist()]
    except TypeError as error:
        raise InputError(f"{index!r:.80} names no examples: give numbers, a slice, or one truth value each.") from error
    outside = [row for row in asked if not -count <= row < count]
    if outside:
        # The end of an iteration by number.
        raise UnknownExampleError(f"Example {outside[0]} is outside the {count} examples.")
    return [row % count for row in asked]


@dataclass(frozen=True, eq=False, init=False)
class Side(Columns):
    """A data set: raw inputs with their answers. One side of :class:`~circuitvision.data.Pairs` is one, and so is any labelled set of images.

    ``answers`` and ``foils`` of both sides of pairs are those of the pairs, so that a metric means the same on either.

    Attributes:
        examples: the raw inputs.
        numbers: the number of every example; subsets keep those of the whole.
        answers: per example a word, an id, a class label or a caption's column, or several of them (see ``combine``); a number that the action
            should have, for models that act.
        foils: what a wrong answer would be, likewise.
        groups: what belongs together (a scene, a photograph), for intervals and splits.
        boxes: per example a box (left, top, right, bottom) in pixels of the original picture, several, or a mapping of named ones.
        masks: per example a mask ``[height width]`` of the original picture, several, or a mapping of named ones.
        combine: how several tokens of an answer, all read at the same position, become one number: the "first" alone, the "mean" over them, or
            their "joint" value, the sum of their log-probabilities.
        name: "clean", "corrupt", or a word of your own: files of edits know a data set by it.
    """

    examples: tuple[Example, ...]
    numbers: tuple[int, ...]
    answers: tuple[Any, ...] | None = None
    foils: tuple[Any, ...] | None = None
    groups: tuple[Any, ...] | None = None
    boxes: tuple[Any, ...] | None = None
    masks: tuple[Any, ...] | None = None
    combine: str | None = None
    name: str = "data"

    def __init__(
        self,
        images: Any = None,
        texts: Any = None,
        *,
        inputs: Any = None,
        settings: Any = None,
        answers: Any = None,
        foils: Any = None,
        groups: Any = None,
        boxes: Any = None,
        masks: Any = None,
        combine: str | None = None,
        name: str = "data",
    ) -> None:
        """A data set from columns, one entry per example; one text, answer or foil stands for all.

        Args:
            images: pictures, or a list of them per example.
            texts: prompts; for a dual encoder a tuple of texts per image.
            inputs: in place of both, tensors made by hand: one mapping per example, or one mapping of them all.
            settings: further keywords of ``model.inputs``: ``{"state": [example 2]}``, or one mapping per example.
            answers, foils, groups, boxes, masks, combine, name: see the class.

        Raises:
            InputError: columns that do not fit together.
        """
        made = examples_of(images, texts, inputs, settings, name)
        if combine is not None and combine not in COMBINE:
            raise InputError(f"combine={combine!r} is not understood: {', '.join(map(repr, COMBINE))}.")
        facts = {"answers": answers, "foils": foils, "groups": groups, "boxes": boxes, "masks": masks}
        held = {key: column(value, len(made), key) for key, value in facts.items()}
        self._set(examples=made, numbers=tuple(range(len(made))), combine=combine, name=name, **held)

    def _set(self, **held: Any) -> None:
        for key, value in held.items():
            object.__setattr__(self, key, value)

    def _with(self, **changes: Any) -> Side:
        made = object.__new__(Side)
        made._set(**{one.name: getattr(self, one.name) for one in fields(self)} | changes)
        return made

    def _taken(self, rows: Sequence[int]) -> Side:
        return self._with(**{key: tuple(held[row] for row in rows) for key, held in self._held().items()})

    def _held(self) -> dict[str, tuple[Any, ...]]:
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {key: value for key, value in found.items() if isinstance(value, tuple)}

    @classmethod
    def concat(cls, parts: Iterable[Side]) -> Side:
        parts = list(parts)
        if not parts or any(set(part._held()) != set(parts[0]._held()) for part in parts):
            raise InputError("Data sets are joined if there is one, and all of them hold the same facts.")
        if any(part.combine != parts[0].combine for part in parts):
            raise InputError("Data sets that combine several tokens differently cannot be joined.")
        held = {key: tuple(one for part in parts for one in getattr(part, key)) for key in parts[0]._held()}
        if len(set(held["numbers"])) < len(held["numbers"]):
            held["numbers"] = tuple(range(len(held["numbers"])))
        return parts[0]._with(**held)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content and its order: pixels, texts, tensors, answers, and all that stands beside them; the same in every process."""
        facts = {key: value for key, value in self._held().items() if key not in ("examples", "numbers")}
        return of_json([[one.digest for one in self.examples], plain({**facts, "combine": self.combine})])

    def __provenance__(self) -> dict[str, Any]:
        return {"data": self.name, "examples": len(self), "sha256": self.digest}

    def batches(self, model: Any, size: int | None = None, *, seed: int = 0) -> Iterator[Batch]:
        """The examples as inputs of a model, some at a time; see :meth:`circuitvision.data.Pairs.batches`."""
        from circuitvision.data.batches import side_batches

        return side_batches(self, model, size, seed)

    def regions(self, *, size: Any = None, image: int = 0, threshold: float = 0.0) -> dict[str, Region]:
        """Boxes and masks as regions, by name, one per example of this data set: what stands wherever positions are asked for.

        What has no names of its own is called "box" and "mask"; an example without a box or mask of a name has none of it.

        Args:
            size: (height, width) of the original pictures, or one per example; None: that of pictures in files or of PIL, and otherwise as of
                :func:`circuitvision.regions.box`.
            image: which image of each example they are of.
            threshold: as of :func:`circuitvision.regions.box`.

        Raises:
            InputError: a data set without boxes and masks, or a name that both have.
        """
        from circuitvision import regions

        boxes, masks = _named_columns(self.boxes, "box"), _named_columns(self.masks, "mask")
        if not boxes and not masks:
            raise InputError("This data set holds no boxes and no masks: give boxes= or masks=.")
        both = sorted(set(boxes) & set(masks))
        if both:
            raise InputError(f"{both[0]!r} is the name of a box and of a mask; call one of them something else.")
        size = self._picture_sizes(image) if size is None else size
        shared = {"size": size, "image": image, "threshold": threshold}
        found = {name: regions.box(held, **shared).named(name) for name, held in boxes.items()}
        return found | {
            name: regions.mask([_united(one) for one in held], **shared).named(name) for name, held in masks.items()
        }

    def _picture_sizes(self, image: int) -> list[tuple[int, int]] | None:
        """Height and width of every example's picture; None where not all say it."""
        found = []
        for one in self.examples:
            listed = list(one.image) if isinstance(one.image, (list, tuple)) else [one.image]
            picture = opened(listed[image]) if image < len(listed) else None
            if not isinstance(picture, Image.Image):
                return None
            found.append((picture.height, picture.width))
        return found

    def to_frame(self) -> pandas.DataFrame:
        """One row per example: number, picture, text, answer, foil, group."""
        import pandas as pd

        from circuitvision.data.showing import described

        columns: dict[str, Any] = {"example": list(self.numbers)}
        columns["image"] = [described(one.image) for one in self.examples]
        columns["text"] = [one.text for one in self.examples]
        for key in ("answers", "foils", "groups"):
            if getattr(self, key) is not None:
                columns[key.removesuffix("s")] = list(getattr(self, key))
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return f"Side({self.name}: {len(self)} examples{_facts(self)})"

    def _repr_html_(self) -> str:
        from circuitvision.data.showing import html

        return html([self])


def _named_columns(column: Sequence[Any] | None, name: str) -> dict[str, list[Any]]:
    """One column per name, with None where an example lacks it; what has no name gets this one."""
    rows = [one if isinstance(one, Mapping) else {name: one} for one in column or ()]
    names = dict.fromkeys(key for row in rows for key in row)
    return {str(key): [row.get(key) for row in rows] for key in names}


def _united(masks: Any) -> Any:
    """One mask that holds what any of several holds."""
    if masks is None:
        return None
    given = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks).astype(bool)
    return given.any(0) if given.ndim == 3 else given


def _facts(side: Side) -> str:
    held = [key for key in ("answers", "foils", "groups", "boxes", "masks") if getattr(side, key) is not None]
    return f" with {', '.join(held)}" if held else ""


def same_as(one: Any, other: Any) -> bool:
    """Whether two values of settings are equal, tensors and arrays among them."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, (Tensor, np.ndarray)) and bool(one == other)
