"""One vector per example: which positions stand for an example, and their activations over a data set.

The vector of an example at a site is the mean over the chosen positions of all its rows (images, tiles and cameras are rows of a vision
tower). One chosen position in one row is that position's vector itself. Sites that a tower has pooled already are taken as they are.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.files import replacing
from circuitvision.model.selection import Selection
from circuitvision.model.tokens import ABSENT, KINDS, TokenMap
from circuitvision.provenance import describe, with_provenance, without_dates
from circuitvision.readout.probes.streaming import Batch, Reading

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel

_FORMAT, _META = "circuitvision.collected/1", "circuitvision_json"
Positions = str | int | Sequence[int] | Tensor | Callable[..., Selection] | Mapping[str, Any]
"""Which positions stand for an example, see :func:`chosen`."""


# -- positions -----------------------------------------------------------------------------------------------------------------------------


def chosen(tokens: TokenMap, positions: Positions, examples: range, dropped: int = 0) -> Bool[Tensor, "row pos"]:
    """The positions of every row that stand for its example.

    ``"whole"``: in image towers the class token, or all patches where there is none; elsewhere as ``"last"``. ``"last"``: the last that is not
    padding. ``"all"`` or ``"mean"``: all that are not padding. A kind (``"cls"``, ``"patch"``, ``"text"``, …) or ``"mean_patch"``: all of that
    kind. A number: that position. One number per example of the data set: its own position. A selection or a bool mask ``[example pos]`` of the
    data set, where every example is one row. A function of the token map, or of the token map and the numbers of the batch's examples, that
    returns a selection. A mapping: one of these per tower.

    Raises:
        InputError: not understood; a padding position; an example without such a position.
    """
    if isinstance(positions, Mapping):
        if tokens.tower not in positions:
            raise InputError(f"positions names {', '.join(positions)}, but a site of the {tokens.tower} tower is read.")
        positions = positions[tokens.tower]
    mask = _mask(tokens, positions, examples, dropped)
    there = torch.from_numpy(tokens.present)
    mask &= there.any(1, keepdim=True)
    if bool((mask & ~there).any()):
        raise InputError(f"Positions {positions!r} are padding in some row of the {tokens.tower} tower; take 'last'.")
    served = torch.zeros(len(examples), dtype=torch.bool)
    served[torch.from_numpy(tokens.example[mask.any(1).numpy()])] = True
    if not bool(served.all()):
        kinds = ", ".join(kind for kind in KINDS if (tokens.kind == kind).any())
        example = examples[int((~served).nonzero()[0])]
        raise InputError(
            f"Example {example} has none of the positions {position_label(positions)!r} in the {tokens.tower} tower; its kinds: {kinds}."
        )
    return mask


def chosen_at_site(tokens: TokenMap, dropped: int, positions: Positions, examples: range) -> Bool[Tensor, "row pos"]:
    """:func:`chosen` at a site that lacks the first ``dropped`` positions of its tower; ``"all"`` are all that it has.

    Raises:
        InputError: a position asked for is among those that the site lacks.
    """
    mask = chosen(tokens, positions, examples, dropped)
    if bool(mask[:, :dropped].any()):
        if not (isinstance(positions, str) and positions in ("all", "mean")):
            raise InputError(
                f"The site lacks the first {dropped} positions of the {tokens.tower} tower, and {position_label(positions)!r} names one of them."
            )
        mask[:, :dropped] = False
    return mask


def _mask(tokens: TokenMap, positions: Any, examples: range, dropped: int) -> Tensor:
    shape = tokens.kind.shape
    if isinstance(positions, str) and positions == "whole":
        positions = _whole(set(tokens.kind[:, dropped:].ravel().tolist()))
    if isinstance(positions, str):
        if positions in ("all", "mean"):
            return torch.from_numpy(tokens.present)
        if positions == "last":
            return _at(torch.as_tensor(tokens.last()), shape)
        kind = positions.removeprefix("mean_")
        if kind in KINDS and kind not in ABSENT:
            return tokens.mask(kind)
    elif callable(positions):
        found = positions(tokens, examples) if _takes_two(positions) else positions(tokens)
        if isinstance(found, Selection) and found.mask.shape == shape:
            return found.tensor
        raise InputError("A function of positions returns a selection of the map it gets, e.g. tokens.select('patch').")
    elif isinstance(positions, (int, np.integer)) and not isinstance(positions, bool):
        return _at(torch.full((shape[0],), int(positions)), shape)
    elif isinstance(positions, (Selection, Sequence, Tensor, np.ndarray)):
        own = positions.tensor if isinstance(positions, Selection) else torch.as_tensor(positions)
        if own.ndim == 2 and own.dtype == torch.bool and own.shape[1] == shape[1] and len(own) >= examples.stop:
            if shape[0] != len(examples):
                raise InputError(
                    f"Examples have several rows in the {tokens.tower} tower, so a mask [example pos] does not say which; give a function of "
                    "the token map, e.g. lambda tokens: tokens.select('patch')."
                )
            return own.cpu()[examples.start : examples.stop].clone()
        if own.ndim == 1 and not own.is_floating_point() and len(own) >= examples.stop:
            return _at(own.cpu()[torch.from_numpy(tokens.example) + examples.start], shape)
    raise InputError(
        f"Positions {position_label(positions)!r} are not understood: 'last', 'all', a kind ({', '.join(KINDS)}), a number, one number per "
        "example, a mask [example pos], or a function of the token map that returns a selection."
    )


def check_count(found: int | None, wanted: int | None, positions: Positions) -> None:
    """Raise InputError if a data set of ``found`` examples does not have ``wanted``, or the positions given one by one are not as many."""
    if found is None:
        return
    if wanted is not None and found != wanted:
        raise InputError(f"The data set has {found} examples and there are {wanted} labels; give one per example.")
    for own in positions.values() if isinstance(positions, Mapping) else (positions,):
        given = own.mask if isinstance(own, Selection) else own
        if isinstance(given, (Sequence, Tensor, np.ndarray)) and not isinstance(given, str) and len(given) != found:
            raise InputError(
                f"There are positions of {len(given)} examples for {found}; give one, or one row, per example."
            )


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def _whole(kinds: set[str]) -> str:
    """The position that stands for all others of a tower with these kinds."""
    if "cls" in kinds:
        return "cls"
    return "patch" if "patch" in kinds and "text" not in kinds else "last"


def _at(where: Tensor, shape: tuple[int, ...]) -> Tensor:
    outside = where[(where < 0) | (where >= shape[1])]
    if len(outside):
        raise InputError(f"Position {int(outside[0])} is outside the {shape[1]} positions of a row; they count from 0.")
    return torch.arange(shape[1]) == where[:, None]


def position_label(positions: Any) -> str:
    """A short name of a choice of positions, for provenance and messages."""
    if callable(positions):
        return getattr(positions, "__name__", type(positions).__name__)
    if isinstance(positions, Mapping):
        return ", ".join(f"{tower}: {position_label(own)}" for tower, own in positions.items())
    if isinstance(positions, Selection):
        return positions.label or "selection"
    listed = isinstance(positions, (Sequence, Tensor, np.ndarray)) and not isinstance(positions, str)
    return f"one per example ({type(positions).__name__})" if listed else str(positions)


# -- one vector per example ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Collected(Mapping[str, Tensor]):
    """One vector per example of every site: ``collected[site]`` is ``[example feature]`` (head axes flattened), on the CPU.

    One run serves many probes; :meth:`save` keeps it for another day.
    """

    vectors: dict[str, Tensor]
    positions: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Float[Tensor, "example feature"]:
        return self.vectors[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def __provenance__(self) -> dict[str, Any]:
        return {"collected": self.vectors, "positions": self.positions, "from": without_dates(self.provenance)}

    def save(self, path: str | Path) -> Path:
        """Write the vectors and where they came from to one ``.safetensors`` file, complete or not at all; returns the path.

        Raises:
            InputError: another suffix.
        """
        from safetensors.torch import save_file

        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"Collected vectors are saved as .safetensors, not {path.suffix or 'without a suffix'!r}.")
        header = json.dumps(
            {"format": _FORMAT, "sites": list(self), "positions": self.positions, "provenance": self.provenance}
        )
        with replacing(path) as temporary:
            save_file({site: x.contiguous().clone() for site, x in self.items()}, temporary, metadata={_META: header})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Collected:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: no such file, or another kind of file.
        """
        from safetensors import safe_open

        path = Path(path)
        if not path.is_file():
            raise InputError(f"There is no file {path}.")
        try:
            with safe_open(path, framework="pt") as handle:
                header = json.loads((handle.metadata() or {}).get(_META, "{}"))
                vectors = {site: handle.get_tensor(site) for site in header.get("sites", [])}
        except Exception as error:
            raise InputError(f"{path} holds no collected vectors: {error}") from error
        if header.get("format") != _FORMAT:
            raise InputError(f"{path} holds no collected vectors; those are what Collected.save writes.")
        return cls(vectors, header["positions"], header["provenance"])

    def __repr__(self) -> str:
        shapes = sorted({tuple(vector.shape) for vector in self.vectors.values()})
        return f"Collected({len(self)} sites of shape {', '.join(map(str, shapes))} at {self.positions})"


@with_provenance
def collect(
    model: HookedModel,
    dataset: Any,
    sites: str | Sequence[str],
    *,
    positions: Positions = "whole",
    batch_size: int = 32,
    count: int | None = None,
) -> Collected:
    """Run a data set and keep one vector per example and site; nothing else is kept.

    Args:
        model: the hooked model.
        dataset: an iterable of model inputs, or one mapping of many examples.
        sites: names or globs; not patterns or scores.
        positions: which positions stand for an example, see :func:`chosen`; their mean where there are several.
        batch_size: examples that run at once.
        count: how many examples there must be, known before anything runs where the data set has a length.

    Raises:
        InputError: an empty data set or one of another length, positions an example does not have, inputs that cannot be cut.
        UnknownSiteError: no such site.
    """
    names = model.sites(sites)

    def reduce(site: str, value: Tensor, batch: Batch) -> Tensor:
        return _vectors(site, value, positions, batch).cpu()

    reading = Reading(model, dataset, names, reduce, batch_size=batch_size, description="collect")
    check_count(reading.total, count, positions)
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for _, found in reading:
        for name, value in found.items():
            parts[name].append(value)
    check_count(reading.count, count, positions)
    label = position_label(positions)
    return Collected(
        {name: torch.cat(values) for name, values in parts.items()},
        label,
        describe(model, method=f"collect(positions={label})", dataset_sha256=reading.digest, examples=reading.count),
    )


def _vectors(site: str, value: Tensor, positions: Positions, batch: Batch) -> Float[Tensor, "example feature"]:
    tokens, dropped = batch.layout(site, value)
    exact = value if value.dtype == torch.float64 else value.float()
    owner = torch.from_numpy(tokens.example)
    if dropped is None:
        rows = torch.from_numpy(tokens.present.any(1))
        picked, owner = exact[rows.to(value.device)], owner[rows]
        if len(owner.unique()) < len(batch.examples):
            raise InputError(f"An example has nothing in the {tokens.tower} tower, so {site} says nothing of it.")
    else:
        mask = chosen_at_site(tokens, dropped, positions, batch.examples)
        picked = exact[mask[:, dropped:].to(value.device)]
        owner = owner[mask.nonzero()[:, 0]]
    flat, owner = picked.flatten(1), owner.to(value.device)
    sums = flat.new_zeros(len(batch.examples), flat.shape[1]).index_add_(0, owner, flat)
    return sums / torch.bincount(owner, minlength=len(batch.examples)).to(flat)[:, None]
