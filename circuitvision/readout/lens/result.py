"""The result of a lens: values with named axes, the highest columns at every place, and where every position lies in the image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.tokens import ABSENT
from circuitvision.provenance import with_provenance
from circuitvision.readout.lens.summaries import LensSummaries
from circuitvision.readout.patch_coords import grid_of, named_positions, picture_of

if TYPE_CHECKING:
    import pandas as pd


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class LensResult(LensSummaries):
    """The lens at every site and position.

    ``values`` is ``[layer position target example]`` (``site`` in place of ``layer`` where several kinds were read, a ``head`` axis after it for
    sites with heads): layer ``"input"`` is what enters block 0, layer ``l`` is block ``l``. With ``top_k`` the axis ``rank`` stands in place of
    ``target``. ``ids`` ``[… rank example]`` are the highest columns at every place, ``names`` what they are called. With targets, ``ranks`` is 1
    plus how many columns are strictly higher, out of ``n_outputs`` (0 where there is none: no number, or the joint value of several subword tokens).
    ``pooled`` ``[layer target example]`` and ``pooled_ids`` are the same for the family's pooled output. ``places`` is ``[example position 4]``:
    image, tile, patch row and patch column, -1 where a position is no patch; ``words`` labels positions, ``columns`` says what the columns are
    (tokens, classes, actions, …), ``step`` which pass was read (None: there was one).
    """

    tower: str = ""
    measure: str = "logit"
    ids: Tensor = field(default_factory=_none)
    places: Tensor = field(default_factory=_none)
    shares: Tensor = field(default_factory=_none)
    norm: str = "own"
    ranks: Tensor = field(default_factory=_none)
    n_outputs: int = 0
    pooled: Tensor = field(default_factory=_none)
    pooled_ids: Tensor = field(default_factory=_none)
    pooled_ranks: Tensor = field(default_factory=_none)
    words: list[list[str]] = field(default_factory=list)
    kinds: list[list[str]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    columns: str = "tokens"
    step: int | None = None

    _per_example: ClassVar[dict[str, int]] = {
        **dict.fromkeys(("ids", "ranks", "pooled", "pooled_ids", "pooled_ranks"), -1),
        **dict.fromkeys(("places", "shares", "words", "kinds"), 0),
    }

    def _long_frame(self) -> pd.DataFrame:
        """As of every result, with the ``token`` at each position; by rank, the column ``output`` names what is at each rank."""
        frame = named_positions(self, super()._long_frame(), self.words)
        if "rank" in self.axes:
            frame["output"] = [self.names.get(str(number), str(number)) for number in self.ids.flatten().tolist()]
        return frame

    def highlights(self) -> dict[str, str]:
        """What stands highest in the first entries at the last layer: of the pooled output, or else of the last position that is no padding."""
        if "head" in self.axes or not self.ids.numel() or self.columns == "actions":
            return {}
        found = {}
        for row in range(min(len(self.axes["example"]), 3)):
            kinds = self.kinds[row] if self.kinds else [""]
            at = max((at for at, kind in enumerate(kinds) if kind not in ABSENT), default=-1)
            best = self.pooled_ids[-1, :, row] if self.pooled_ids.numel() else self.ids[-1, at, :, row]
            where = "" if self.pooled_ids.numel() else f" at position {self.axes['position'][at]}"
            words = [self.names.get(str(int(number)), str(int(number))) for number in best[:3]]
            found[f"example {self.axes['example'][row]}, highest{where}"] = ", ".join(words)
        return found

    @property
    def best(self) -> Int[Tensor, "layer position example"]:
        """The highest column at every place."""
        return self.ids[..., 0, :]

    @with_provenance
    def contrast(self, answer: Any, foil: Any) -> LensResult:
        """The value of one target minus another's: a result with the single target ``answer - foil``.

        Raises InputError for a target that is not there, or a lens read by rank.
        """
        if "target" not in self.axes:
            raise InputError(
                "A contrast is between two targets; this lens was read with top_k=. Read it with targets=(answer, foil)."
            )
        first, second = self.target(answer), self.target(foil)
        pooled = self.pooled[..., first, :] - self.pooled[..., second, :] if self.pooled.numel() else self.pooled
        return replace(
            self,
            values=(self.values[..., first, :] - self.values[..., second, :])[..., None, :],
            axes={**self.axes, "target": [f"{answer} - {foil}"]},
            pooled=pooled[..., None, :] if self.pooled.numel() else pooled,
            ranks=_none(),
            pooled_ranks=_none(),
        )

    def target(self, label: Any) -> int:
        """The index of a target by its label; by its place as well, where no label is a number. InputError if it is not there."""
        axis = "target" if "target" in self.axes else "rank"
        labels = self.axes[axis]
        numbered = any(isinstance(known, int) for known in labels)
        if (
            not numbered
            and isinstance(label, Integral)
            and not isinstance(label, bool)
            and int(label) in range(len(labels))
        ):
            return int(label)
        return self.index_of(axis, label)

    def patch_grid(
        self, layer: Any, example: Any = None, image: int | None = None, tile: int | None = None, target: Any = None
    ) -> Tensor:
        """One layer's values of a target (by label or place; None: the first) on the patch grid of an image: ``[rows columns]``.

        NaN where a patch has no position. ``None`` is the first example, image and tile (the whole image, where a model also reads it in parts).

        Raises:
            InputError: no such example, image or tile, or the lens has heads.
        """
        if "head" in self.axes:
            raise InputError("This lens has a head axis; read a site without heads to lay it over an image.")
        picture = picture_of(self, example, image, tile)
        index = 0 if target is None else self.target(target)
        return grid_of(self, self.values[self.index(layer), :, index, picture.entry], picture)

    def index(self, layer: Any) -> int:
        """The index of a layer or site on the first axis."""
        return self.index_of(next(iter(self.axes)), layer)
