"""What a family says of its inputs: one :class:`Packing` object.

It answers three questions. *Geometry*: which rows of the vision tower an image takes, and which patches every prompt position holds. *Checks*: what
pixels and prompts cannot be packed. *Batching*: which entries of every input belong to which example, from which inputs are taken apart
(:meth:`Packing.take`), repeated (:meth:`Packing.repeat`) and put together (:meth:`Packing.join`); nothing else in circuitvision slices inputs.

In a model that compares two towers, ``compared`` says whose inputs are taken apart: those of "images", of "texts", or "both"; the others stay whole.

Not covered: inputs that say for all examples at once where each begins (``cu_seqlens``): a packing with such an input writes its own ``take``,
``repeat`` and ``join``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.packing.batching import Entries, joined, repeated, taken
from circuitvision.model.packing.pictures import check_pictures
from circuitvision.model.packing.run import ImageRun, ImageTokens
from circuitvision.model.patches import Array, Frame

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped


Compared = Literal["both", "images", "texts"]


class Packing:
    """One image is one row of the vision tower, and one example."""

    of_images: tuple[str, ...] = ("pixel_values", "image_sizes", "pixel_attention_mask", "spatial_shapes")
    """Inputs that hold images, whose entries are those of :meth:`image_entries`."""
    per_example: ClassVar[tuple[str, ...]] = ()
    """Inputs with an entry per example that may be lists; tensors are that unless something else is known of them."""
    shared: ClassVar[tuple[str, ...]] = ("cache_position", "logits_to_keep")
    """Tensors that all examples share."""
    one_row: ClassVar[tuple[str, ...]] = ("position_ids", "attention_mask", "token_type_ids")
    """Beginnings of the names of inputs of which a single row serves all examples."""

    fills_embeddings: ClassVar[bool] = True
    """Whether image features also replace placeholders among ``inputs_embeds``."""
    beside: tuple[str, ...] = ()
    """Inputs that must stand beside ``pixel_values``."""
    dims: ClassVar[tuple[int, ...]] = (4,)
    """How many axes ``pixel_values`` may have."""
    rows_alone: ClassVar[bool] = True
    """Whether a row of an image tower is computed from its stream alone: no mask or shape that is made of the inputs says what it is."""
    in_sequence: ClassVar[bool] = False
    """Whether the image towers compute the positions of all rows in one sequence, without an axis of rows."""
    layout: ClassVar[str] = "[image, channel, height, width]"
    """The axes of ``pixel_values``, in words."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def tiles(self, run: ImageRun) -> list[int]:
        """How many rows of the vision tower each image takes."""
        assert run.pixels is not None
        return [1] * run.pixels.shape[0]

    def size(self, run: ImageRun, row: int) -> tuple[int, int]:
        """Height and width of a row's pixels."""
        assert run.pixels is not None
        return run.pixels.shape[-2], run.pixels.shape[-1]

    def grid(self, run: ImageRun, row: int) -> tuple[int, int]:
        """Patch rows and columns of a row."""
        return run.embedding.grid(*self.size(run, row))

    def order(self, run: ImageRun, row: int) -> Array:
        """Which patch of the grid, counted row by row, the tower has at each of a row's patch positions: by default in that order."""
        rows, columns = self.grid(run, row)
        return np.arange(rows * columns)

    def merges(self, site: str) -> bool:
        """Whether a site of the connector (``hook_in``, ``hook_out``) has fewer positions than the tower, each with several of its patches."""
        return False

    def sequences(self, run: ImageRun) -> dict[str, list[int]]:
        """Where ``in_sequence``: how many positions every row has, by image tower and by site of its connector."""
        return {}

    def row_length(self, run: ImageRun) -> int:
        """Positions of the rows of the vision tower, padding included."""
        return max(run.n_features(row) for row in range(run.n_rows))

    def present(self, run: ImageRun) -> list[bool]:
        """Whether each image is there."""
        return [True] * len(run.tiles)

    def lengths(self, run: ImageRun) -> list[int]:
        """How many prompt positions each image takes."""
        lengths = [run.n_features(first) - run.n_dropped for first in run.firsts]
        return [length if there else 0 for length, there in zip(lengths, run.present, strict=True)]

    def tokens(self, run: ImageRun) -> list[ImageTokens]:
        """Which features every prompt position of each image holds."""
        return [_in_order(first, length, run.n_dropped) for first, length in zip(run.firsts, run.lengths, strict=True)]

    def owners(self, run: ImageRun) -> list[int]:
        """The example of every image."""
        return list(range(len(run.tiles)))

    def frame(self, run: ImageRun, image: int, tile: int) -> Frame:
        """Where a row's pixels lie in the frame of boxes: by default that of its own tensor."""
        height, width = self.size(run, run.firsts[image] + tile)
        return Frame((float(height), float(width)))

    def tile_number(self, run: ImageRun, image: int, tile: int) -> int:
        """What token maps call a row: 0 is the whole image, tiles count from 1."""
        return tile

    def laid_out(self, model: Wrapped, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with prompts that name every position the model computes; as they are where prompts always do."""
        return inputs

    def channels(self, towers: Sequence[Tower]) -> int:
        """How many channels ``pixel_values`` has for these image towers."""
        return int(getattr(towers[0].config, "num_channels", 3))

    def check(self, run: ImageRun) -> None:
        """Raise InputError for pixels and settings that cannot be packed, and for pictures of a size that a tower cannot read."""
        self.check_layout(run)
        self.check_pictures(run)

    def check_layout(self, run: ImageRun) -> None:
        """Raise InputError for pixels and settings that cannot be packed."""
        assert run.pixels is not None
        absent = [name for name in self.beside if run.inputs.get(name) is None]
        if absent:
            raise InputError(f"This tower reads {' and '.join(absent)} beside pixel_values; model.inputs makes them.")
        if run.pixels.ndim not in self.dims:
            raise InputError(f"pixel_values must be {self.layout}, got shape {tuple(run.pixels.shape)}.")

    def check_pictures(self, run: ImageRun) -> None:
        """Raise InputError for pictures whose channels or size a tower cannot read."""
        check_pictures(run)

    def check_tokens(self, run: ImageRun) -> None:
        """Raise InputError if the prompts do not hold the image tokens that these images take."""
        placeholders = run.placeholders
        if placeholders is None:
            return
        found = placeholders.sum(-1).tolist()
        expected = [0] * len(found)
        for owner, length in zip(run.owners, run.lengths, strict=True):
            expected[owner] += length
        if found != expected:
            name = run.model.image_token or "the image token"
            where = "" if sum(found) != sum(expected) else f", by prompt {found} for {expected}"
            raise InputError(
                f"The prompts hold {sum(found)} image tokens, {len(run.tiles)} image(s) make {sum(expected)}{where}: "
                f"repeat {name} once per patch token (the processor does), and give as many images as the prompts name."
            )

    # -- which entries belong to which example ---------------------------------------------------------------------------------------------

    def is_on(self, name: str, compared: Compared) -> bool:
        """Whether an input belongs to a side of a model that compares two towers."""
        return compared == "both" or (name in self.of_images) == (compared == "images")

    def n_examples(self, model: Wrapped, inputs: Mapping[str, Any], compared: Compared = "both") -> int:
        """How many examples inputs hold: prompts, or images where there are none; in a dual encoder those of a side.

        Raises InputError where there are neither, and where both sides are asked for and differ.
        """
        return self._count(ImageRun(model, inputs), compared)

    def _count(self, run: ImageRun, compared: Compared) -> int:
        texts = run.inputs.get("input_ids", run.inputs.get("inputs_embeds"))
        counts = [len(texts)] if isinstance(texts, Tensor) else []
        if run.pixels is not None and (run.model.is_dual or not counts):
            counts.append(max(run.owners, default=-1) + 1)
        if not counts:
            raise InputError("An example needs pixel_values or input_ids; model.inputs(images=…, text=…) makes them.")
        if compared == "both" and len(set(counts)) > 1:
            raise InputError(f"{counts[1]} images and {counts[0]} texts are no examples of both; pair them one to one.")
        return counts[-1] if compared == "images" else counts[0]

    def image_entries(self, run: ImageRun, name: str, value: Any) -> Sequence[int]:
        """The example of every entry of an input of images, along its first axis."""
        return run.owners

    def entries(self, run: ImageRun, name: str, value: Any) -> Entries | None:
        """Along which axis an input holds examples, and the example of every entry there; None where all examples share it.

        Raises InputError for an input with another number of entries, and for a cache.
        """
        if name == "past_key_values" and value is not None:
            raise InputError("past_key_values hold all examples in one, and cannot be taken apart: leave them out.")
        listed = isinstance(value, (list, tuple)) and name in (*self.of_images, *self.per_example)
        if name in self.shared or not (listed or (isinstance(value, Tensor) and value.ndim)):
            return None
        # Rotary positions of several kinds come before the examples.
        axis = 1 if name == "position_ids" and value.ndim == 3 else 0
        found = len(value) if axis == 0 else value.shape[axis]
        owners: Sequence[int]
        if name in self.of_images and run.pixels is not None:
            owners = self.image_entries(run, name, value)
        else:
            owners = range(self._count(run, "texts"))
            if name.startswith(self.one_row) and found == 1 < len(owners):
                return None
        if found != len(owners):
            raise InputError(
                f"{name} has {found} entries, and these examples take {len(owners)}, so no single example can be taken out of them and they "
                "cannot be cut into batches: give a sequence of inputs, one mapping per example."
            )
        return Entries(owners, axis)

    def take(
        self, model: Wrapped, inputs: Mapping[str, Any], examples: Sequence[int], compared: Compared = "both"
    ) -> dict[str, Any]:
        """The inputs of some examples, in the order given; one may be asked for several times. What holds no image of them is left out.

        Raises InputError for inputs that cannot be taken apart.
        """
        cuts = self._cuts(model, inputs, compared)
        found = {name: taken(value, cuts[name], examples) for name, value in inputs.items()}
        return {name: value for name, value in found.items() if value is not None or inputs[name] is None}

    def repeat(
        self, model: Wrapped, inputs: Mapping[str, Any], copies: int, compared: Compared = "both"
    ) -> dict[str, Any]:
        """The inputs of all examples ``copies`` times, one copy after the other. Raises InputError for inputs that cannot be repeated."""
        cuts = self._cuts(model, inputs, compared)
        return {name: repeated(value, cuts[name], copies) for name, value in inputs.items()}

    def join(self, model: Wrapped, parts: Sequence[Mapping[str, Any]], compared: Compared = "both") -> dict[str, Any]:
        """Several inputs as those of one run, in their order; what all examples share must be the same in all of them.

        Raises InputError for inputs that do not go together.
        """
        if any(part.keys() != parts[0].keys() for part in parts):
            raise InputError("Inputs that hold different things do not join; give each of them the same names.")
        cuts = self._cuts(model, parts[0], compared)
        return {name: joined(name, [part[name] for part in parts], cut) for name, cut in cuts.items()}

    def _cuts(self, model: Wrapped, inputs: Mapping[str, Any], compared: Compared) -> dict[str, Entries | None]:
        run = ImageRun(model, inputs)
        whole = {name for name in inputs if model.is_dual and not self.is_on(name, compared)}
        return {name: None if name in whole else self.entries(run, name, value) for name, value in inputs.items()}

    def content(self, run: ImageRun, name: str, value: Tensor, example: int) -> list[Tensor]:
        """What an input of images holds of one example, without what only fills up a batch: one tensor per entry."""
        owners = self.image_entries(run, name, value)
        return [value[entry] for entry, owner in enumerate(owners) if owner == example]


def _in_order(row: int, length: int, dropped: int) -> ImageTokens:
    at = np.arange(length)
    return ImageTokens(np.zeros(length, bool), at, np.full(length, row), at + dropped, np.ones(length))
