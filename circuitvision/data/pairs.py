"""Pairs of runs to compare: a clean and a corrupt input each, with the answer that is right for the one and the foil that is right for the other.

:class:`Pairs` holds raw examples (see :mod:`circuitvision.data.sides`) and no model. A model is handed in where one is needed:
:meth:`Pairs.answered` keeps the pairs that it tells apart, :meth:`Pairs.batches` makes its inputs, some pairs at a time, and says which positions of
the two runs belong together. What is not given for the corrupt side is as on the clean side: two pictures under one question, two questions about one
picture, two sets of captions.

Where inputs are wanted, pairs stand for their clean side.

Not covered: more than two sides (make pairs of each two).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from circuitvision.data.sides import Columns, Side, _facts, column
from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError

if TYPE_CHECKING:
    import pandas

    from circuitvision.data.batches import Align, Batch


@dataclass(frozen=True)
class Tally:
    """What became of the pairs that a model was asked about.

    Attributes:
        total: how many there were.
        dropped: the numbers of those left out, by reason.
        given: what the model gave in place of the right answer, by reason: how many times, the commonest first.
    """

    total: int
    dropped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    given: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """How many are left."""
        return self.total - sum(map(len, self.dropped.values()))

    @property
    def counts(self) -> dict[str, int]:
        """How many were left out, by reason."""
        return {reason: len(numbers) for reason, numbers in self.dropped.items()}

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} {reason}{self._mostly(reason)}" for reason, count in self.counts.items())
        return f"{self.kept} of {self.total} pairs kept" + (f" (left out: {reasons})" if reasons else "")

    def _mostly(self, reason: str) -> str:
        """What the model gave most often where a pair was left out for this reason, in words."""
        if reason.endswith("not one token"):
            return " (combine='first' or 'joint' reads several)"
        first = next(iter(self.given.get(reason, {}).items()), None)
        return "" if first is None else f", mostly {first[0]!r} ({first[1]})"


@dataclass(frozen=True, eq=False, init=False)
class Pairs(Columns):
    """A data set of pairs.

    Attributes:
        clean: the clean side, a data set in itself.
        corrupt: the corrupt side; its answers and foils are those of the pairs as well, so that a metric means the same on both.
        maps: per pair the position of the corrupt run for every position of the clean one, of the language tower or ``{tower: positions}``;
            None where positions are matched by their kind.
        records: per pair what it was made from (scenes, questions); None where it was given as it is.
        tally: what :meth:`answered` left out.
    """

    clean: Side
    corrupt: Side
    maps: tuple[Any, ...] | None = None
    records: tuple[Any, ...] | None = None
    tally: Tally | None = None

    def __init__(
        self,
        images: Any = None,
        texts: Any = None,
        *,
        corrupt_images: Any = None,
        corrupt_texts: Any = None,
        answers: Any = None,
        foils: Any = None,
        groups: Any = None,
        boxes: Any = None,
        corrupt_boxes: Any = None,
        masks: Any = None,
        corrupt_masks: Any = None,
        inputs: Any = None,
        corrupt_inputs: Any = None,
        settings: Any = None,
        corrupt_settings: Any = None,
        maps: Any = None,
        combine: str | None = None,
        records: Any = None,
    ) -> None:
        """Pairs from columns, one entry per pair; one text, answer or foil stands for all. What is not given with ``corrupt_`` is as clean.

        Args:
            images, texts: the clean inputs, see :class:`~circuitvision.data.Side`: pictures, and prompts or tuples of texts to compare with.
            corrupt_images, corrupt_texts: the corrupt ones.
            answers: what is right on the clean side: words, ids, class labels, columns of captions; several tokens per pair with ``combine``;
                numbers (floats) that an action should have.
            foils: what is right on the corrupt side.
            groups: what belongs together, such as the number of a scene.
            boxes, masks: where things are, in pixels of the original picture.
            inputs, corrupt_inputs: in place of images and texts, tensors made by hand.
            settings, corrupt_settings: further keywords of ``model.inputs`` per pair (a robot's ``state``).
            maps: position maps between the two runs, see the class.
            combine: "first", "mean" or "joint", see :class:`~circuitvision.data.Side`.
            records: what the pairs were made from.

        Raises:
            InputError: columns that do not fit together, or two sides that are the same.
        """
        shared = {"answers": answers, "foils": foils, "groups": groups, "combine": combine}
        clean = Side(images, texts, inputs=inputs, settings=settings, boxes=boxes, masks=masks, name="clean", **shared)
        corrupt = Side(
            images if corrupt_images is None else corrupt_images,
            texts if corrupt_texts is None else corrupt_texts,
            inputs=inputs if corrupt_inputs is None else corrupt_inputs,
            settings=settings if corrupt_settings is None else corrupt_settings,
            boxes=boxes if corrupt_boxes is None else corrupt_boxes,
            masks=masks if corrupt_masks is None else corrupt_masks,
            name="corrupt",
            **shared,
        )
        if all(part is None for part in (corrupt_images, corrupt_texts, corrupt_inputs, corrupt_settings)):
            raise InputError(
                "The two sides are the same: give corrupt_images, corrupt_texts, corrupt_inputs or corrupt_settings."
            )
        if len(clean) != len(corrupt):
            raise InputError(
                f"There are {len(clean)} clean examples and {len(corrupt)} corrupt ones; give as many of each."
            )
        self._set(
            clean=clean,
            corrupt=corrupt,
            maps=column(maps, len(clean), "maps"),
            records=column(records, len(clean), "records"),
            tally=None,
        )

    def _set(self, **held: Any) -> None:
        for key, value in held.items():
            object.__setattr__(self, key, value)

    def _with(self, **changes: Any) -> Pairs:
        made = object.__new__(Pairs)
        held = {key: getattr(self, key) for key in ("clean", "corrupt", "maps", "records", "tally")}
        made._set(**held | changes)
        return made

    @classmethod
    def from_sides(cls, clean: Side, corrupt: Side, *, maps: Any = None, records: Any = None) -> Pairs:
        """Pairs of two data sets, example by example; answers and all that is shared are those of the clean one.

        Raises:
            InputError: sides of different lengths.
        """
        if len(clean) != len(corrupt):
            raise InputError(
                f"There are {len(clean)} clean examples and {len(corrupt)} corrupt ones; give as many of each."
            )
        shared = {key: getattr(clean, key) for key in ("numbers", "answers", "foils", "groups", "combine")}
        made = object.__new__(cls)
        made._set(
            clean=clean._with(name="clean"),
            corrupt=corrupt._with(name="corrupt", **shared),
            maps=column(maps, len(clean), "maps"),
            records=column(records, len(clean), "records"),
            tally=None,
        )
        return made

    @classmethod
    def from_folder(
        cls, folder: Any, table: str = "pairs.csv", *, columns: Mapping[str, str | None] | None = None
    ) -> Pairs:
        """Pairs from a folder of pictures and a CSV or JSONL table, one row per pair; see :mod:`circuitvision.data.reading`.

        Columns are called image, corrupt_image, text, corrupt_text, answer, foil (in a CSV answer_id, foil_id for ids), group, box, corrupt_box,
        mask, corrupt_mask; what has no ``corrupt_`` column is the same on both sides. A box is four numbers in one cell: left, top, right, bottom.

        Args:
            folder: where the table is; pictures are named relative to it.
            table: the file, .csv or .jsonl.
            columns: our names to the table's, where it has others: ``{"image": "photo", "corrupt_image": "edited"}``; None: it has none.
        """
        from circuitvision.data.reading import from_folder

        return from_folder(folder, table, columns)

    @classmethod
    def from_dataset(cls, dataset: Any, *, columns: Mapping[str, str | None] | None = None) -> Pairs:
        """Pairs from a Hugging Face data set, or any sequence of mappings; see :func:`circuitvision.data.reading.from_dataset`."""
        from circuitvision.data.reading import from_dataset

        return from_dataset(dataset, columns)

    # -- what is there -----------------------------------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> tuple[int, ...]:  # type: ignore[override]
        """The number of every pair; subsets keep those of the whole."""
        return self.clean.numbers

    @property
    def answers(self) -> tuple[Any, ...] | None:
        """What is right on the clean side."""
        return self.clean.answers

    @property
    def foils(self) -> tuple[Any, ...] | None:
        """What is right on the corrupt side."""
        return self.clean.foils

    @property
    def groups(self) -> tuple[Any, ...] | None:
        """What belongs together."""
        return self.clean.groups

    @property
    def boxes(self) -> tuple[Any, ...] | None:
        """Boxes in the clean pictures."""
        return self.clean.boxes

    @property
    def masks(self) -> tuple[Any, ...] | None:
        """Masks of the clean pictures."""
        return self.clean.masks

    @property
    def combine(self) -> str | None:
        """How several tokens of an answer become one number."""
        return self.clean.combine

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of both sides and its order; the same in every process."""
        return of_json([self.clean.digest, self.corrupt.digest, plain(self.maps)])

    def __provenance__(self) -> dict[str, Any]:
        return {"data": "pairs", "examples": len(self), "sha256": self.digest}

    def _taken(self, rows: Sequence[int]) -> Pairs:
        held = {key: getattr(self, key) for key in ("maps", "records")}
        cut = {key: None if value is None else tuple(value[row] for row in rows) for key, value in held.items()}
        return self._with(clean=self.clean._taken(rows), corrupt=self.corrupt._taken(rows), tally=None, **cut)

    @classmethod
    def concat(cls, parts: Iterable[Pairs]) -> Pairs:
        """Several sets of pairs as one. Numbers stay where they are all different (parts of one whole); else they count anew from 0."""
        parts = list(parts)
        clean, corrupt = (Side.concat([getattr(part, side) for part in parts]) for side in ("clean", "corrupt"))
        held: dict[str, Any] = {}
        for key in ("maps", "records"):
            columns = [getattr(part, key) for part in parts]
            held[key] = None if any(one is None for one in columns) else tuple(item for one in columns for item in one)
        return parts[0]._with(clean=clean, corrupt=corrupt, tally=None, **held)

    # -- with a model ------------------------------------------------------------------------------------------------------------------------

    def batches(self, model: Any, size: int | None = None, align: Align = "kind", *, seed: int = 0) -> Iterator[Batch]:
        """The pairs as inputs of a model, some at a time; each batch is made when it is asked for.

        Args:
            model: the hooked model.
            size: how many pairs run at once; None: by memory.
            align: which position of the corrupt run belongs to each of the clean run. "kind": the n-th patch to the n-th patch, the n-th text
                token to the n-th (pairs that hold ``maps`` use those); "index": the same number; a function of the two token maps of a tower
                that returns positions of the second, ``[pos]`` or ``[row pos]``, or None for "kind"; None: not looked for.
            seed: of the noise that some models start from; each pair has its own, the same on both sides.

        Raises:
            InputError: runs whose positions do not fit together, naming the pair; an answer that is not one token.
        """
        from circuitvision.data.batches import pair_batches

        return pair_batches(self, model, size, "maps" if align == "kind" and self.maps is not None else align, seed)

    def answered(self, model: Any, metric: Any = None, *, size: int | None = None) -> Pairs:
        """The pairs that a model tells apart: its clean run gives the answer, its corrupt run the foil. What is left out is printed, and kept as
        :attr:`tally`.

        Without a ``metric`` a run gives what scores highest of all classes (or captions, or tokens at the last position; of several tokens
        combined, any of them). With one ("logit_diff", or a function of the logits) a pair is kept if it is above 0 on the clean side and below 0 on
        the corrupt side. Where answers are numbers (actions), the metric must be nearer to the answer on the clean side and to the foil on the
        corrupt one.

        Also left out: answers that are not one token, and pairs whose positions do not belong together one by one.

        Raises:
            InputError: pairs without answers; a model without classes or tokens and no metric.
        """
        from circuitvision.data.answered import answered

        return answered(self, model, metric, size)

    # -- to look at --------------------------------------------------------------------------------------------------------------------------

    def to_frame(self) -> pandas.DataFrame:
        """One row per pair: number, pictures, texts, answer, foil, group."""
        frame, other = self.clean.to_frame(), self.corrupt.to_frame()
        for name in ("text", "image"):
            frame.insert(list(frame.columns).index(name) + 1, f"corrupt_{name}", list(other[name]))
        return frame

    def __repr__(self) -> str:
        return f"Pairs({len(self)} pairs{_facts(self.clean)})"

    def _repr_html_(self) -> str:
        from circuitvision.data.showing import html

        return html([self.clean, self.corrupt])
