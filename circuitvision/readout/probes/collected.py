"""Vectors over a data set: one per example, or one per position, with the labels that probes are trained on.

The vector of an example at a site is the mean over the chosen positions of all its rows (images, tiles and cameras are rows of a vision
tower). One chosen position in one row is that position's vector itself. Sites that a tower has pooled already are taken as they are. With
``per_position`` every chosen position has a vector of its own, and may have a label of its own; the example that it belongs to stays known, so that
no example lies on both sides of a split (``groups=collected.groups``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.files import reading, write_tensors
from circuitvision.model.positions import Positions, PositionsLike, in_every_example, warn_of_empty
from circuitvision.model.tokens import KINDS, TokenMap
from circuitvision.provenance import describe, with_provenance, without_dates
from circuitvision.readout.probes.streaming import Batch, Reading

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

ByTower = PositionsLike | Positions | Mapping[str, PositionsLike | Positions]
"""Positions, or a mapping from towers to positions."""
_FORMAT, _META = "circuitvision.collected/1", "circuitvision_json"
_BESIDE = ("examples", "labels", "groups", "at")


# -- positions -----------------------------------------------------------------------------------------------------------------------------


def chosen(tokens: TokenMap, positions: ByTower, examples: range, dropped: int = 0) -> Bool[Tensor, "row pos"]:
    """The positions of every row that stand for its example; see :mod:`circuitvision.model.positions`.

    None: in image towers the class token, or all patches where there is none; elsewhere the last that is not padding. A mapping: one of these per
    tower. What is given per example is given for the data set.

    Raises:
        InputError: not understood; a padding position; an example without a position that every example must have (a number, a kind).
    """
    selected = _of_tower(positions, tokens, dropped)
    mask = selected.taken(examples).resolve(tokens)
    there = torch.from_numpy(tokens.present)
    mask &= there.any(1, keepdim=True)
    if bool((mask & ~there).any()):
        raise InputError(f"Positions {selected.text} are padding in some row of the {tokens.tower} tower; take 'last'.")
    served = torch.zeros(len(examples), dtype=torch.bool)
    served[torch.from_numpy(tokens.example[mask.any(1).numpy()])] = True
    if not selected.may_be_empty and not bool(served.all()):
        kinds = ", ".join(kind for kind in KINDS if (tokens.kind == kind).any())
        example = examples[int((~served).nonzero()[0])]
        raise InputError(
            f"Example {example} has none of the positions {selected.text} in the {tokens.tower} tower; its kinds: {kinds}."
        )
    return mask


def _of_tower(positions: ByTower, tokens: TokenMap, dropped: int) -> Positions:
    """The positions meant in one tower."""
    if isinstance(positions, Mapping):
        if tokens.tower not in positions:
            raise InputError(f"positions names {', '.join(positions)}, but a site of the {tokens.tower} tower is read.")
        positions = positions[tokens.tower]
    if positions is None:
        return Positions.of(_whole(set(tokens.kind[:, dropped:].ravel().tolist())))
    return Positions.of(positions)


def chosen_at_site(tokens: TokenMap, dropped: int, positions: ByTower, examples: range) -> Bool[Tensor, "row pos"]:
    """:func:`chosen` at a site that lacks the first ``dropped`` positions of its tower; ``"all"`` are all that it has.

    Raises:
        InputError: a position asked for is among those that the site lacks.
    """
    mask = chosen(tokens, positions, examples, dropped)
    if bool(mask[:, :dropped].any()):
        selected = _of_tower(positions, tokens, dropped)
        if selected.kind not in ("all", "there"):
            raise InputError(
                f"The site lacks the first {dropped} positions of the {tokens.tower} tower, and {selected.text} names one of them."
            )
        mask[:, :dropped] = False
    return mask


def positions_for(found: int | None, wanted: int | None, positions: ByTower) -> ByTower:
    """The positions for a data set of ``found`` examples; a list of numbers that may be meant as one per example warns, once.

    Raises:
        InputError: the data set does not have ``wanted`` examples, or positions given one by one are not as many.
    """
    if found is None:
        return positions
    if wanted is not None and found != wanted:
        raise InputError(f"The data set has {found} examples and there are {wanted} labels; give one per example.")
    for own in positions.values() if isinstance(positions, Mapping) else (positions,):
        count = Positions.of(own).n_examples
        if count not in (None, found):
            raise InputError(f"There are positions of {count} examples for {found}; give one, or one row, per example.")
    if isinstance(positions, Mapping):
        return {tower: in_every_example(own, found) for tower, own in positions.items()}
    return in_every_example(positions, found)


def _whole(kinds: set[str]) -> str:
    """The position that stands for all others of a tower with these kinds."""
    if "cls" in kinds:
        return "cls"
    return "patch" if "patch" in kinds and "text" not in kinds else "last"


def position_label(positions: Any) -> str:
    """A short name of a choice of positions, for provenance and messages."""
    if isinstance(positions, Mapping):
        return ", ".join(f"{tower}: {position_label(own)}" for tower, own in positions.items())
    return "each tower's own" if positions is None else Positions.of(positions).text


# -- one vector per example ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Collected(Mapping[str, Tensor]):
    """One vector per example, or per position of each, of every site: ``collected[site]`` is ``[vector feature]`` (head axes flattened), on the CPU.

    One run serves many probes; :meth:`save` keeps it for another day.

    Attributes:
        vectors: by site.
        positions: which positions were taken, in words.
        provenance: where they came from.
        examples: the number of the example of every vector.
        labels: of every vector; the data set's answers where none were given; empty where there are none.
        groups: of every vector, what belongs together: the data set's groups, or the examples.
        at: with ``per_position``, the row and the position of every vector in its tower ``[vector 2]`` (rows counted within the example); else empty.
    """

    vectors: dict[str, Tensor]
    positions: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    examples: list[int] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    at: list[tuple[int, int]] = field(default_factory=list)

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
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"Collected vectors are saved as .safetensors, not {path.suffix or 'without a suffix'!r}.")
        told = {name: getattr(self, name) for name in ("positions", "provenance", *_BESIDE)}
        try:
            header = json.dumps({"format": _FORMAT, "sites": list(self), **told})
        except TypeError as error:
            raise InputError(f"Labels and groups are saved as words and numbers: {error}.") from error
        write_tensors(path, self, {_META: header})
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
        with reading(path, "collected vectors"), safe_open(path, framework="pt") as handle:
            header = json.loads((handle.metadata() or {}).get(_META, "{}"))
            if header.get("format") != _FORMAT:
                raise InputError(f"{path} holds no collected vectors; those are what Collected.save writes.")
            vectors = {site: handle.get_tensor(site) for site in header["sites"]}
            beside = {name: list(header.get(name, [])) for name in _BESIDE}
            beside["at"] = [tuple(one) for one in beside["at"]]
            return cls(vectors, header["positions"], header["provenance"], **beside)

    def __repr__(self) -> str:
        shapes = sorted({tuple(vector.shape) for vector in self.vectors.values()})
        return f"Collected({len(self)} sites of shape {', '.join(map(str, shapes))} at {self.positions})"

    @classmethod
    def concat(cls, parts: Sequence[Collected]) -> Collected:
        """Vectors of several data sets, or parts of one, at the same sites and positions.

        Raises:
            InputError: none, or parts of other sites or positions.
        """
        if not parts or any(list(part) != list(parts[0]) or part.positions != parts[0].positions for part in parts):
            raise InputError("Collected vectors are joined where all parts have the same sites and positions.")
        beside = {name: [one for part in parts for one in getattr(part, name)] for name in _BESIDE}
        vectors = {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
        return cls(vectors, parts[0].positions, {"parts": [part.provenance for part in parts]}, **beside)


@with_provenance
def collect(
    model: Wrapped,
    dataset: Any,
    sites: str | Sequence[str],
    *,
    positions: ByTower = None,
    labels: Any = None,
    per_position: bool = False,
    batch_size: int = 32,
    count: int | None = None,
) -> Collected:
    """Run a data set and keep one vector per example (or position) and site; nothing else is kept.

    Args:
        model: the hooked model.
        dataset: a :class:`~circuitvision.data.Side` or ``Pairs`` (their clean side), an iterable of model inputs, or one mapping of many examples.
        sites: names or globs; not patterns or scores.
        positions: which positions stand for an example, see :func:`chosen`; their mean where there are several.
        labels: one per example. With ``per_position`` also one list per example, of a label for each of its chosen positions, or a function
            ``(tokens, batch)`` of the tower's token map and the batch (``batch.data.boxes``, ``batch.examples``) that returns labels ``[row pos]``;
            None and NaN leave a position out. By default the answers of the data set.
        per_position: one vector for every chosen position, not their mean.
        batch_size: examples that run at once.
        count: how many examples there must be, known before anything runs where the data set has a length.

    Raises:
        InputError: an empty data set or one of another length, positions an example does not have, inputs that cannot be cut, labels that do not
            fit, sites of which not all have the same positions (with ``per_position``).
        UnknownSiteError: no such site.
    """
    names = model.sites(sites)
    if callable(labels) and not per_position:
        raise InputError(
            "A function of labels gives one per position: say per_position=True, or give one label per example."
        )
    places: dict[str, _Places] = {}

    def reduce(site: str, value: Tensor, batch: Batch) -> Tensor:
        if not per_position:
            return _vectors(site, value, positions, batch).cpu()
        picked, places[site] = _each(site, value, positions, labels, batch)
        return picked.cpu()

    reading = Reading(model, dataset, names, reduce, batch_size=batch_size, description="collect")
    positions = positions_for(reading.total, _wanted(labels, count), positions)
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    beside = _Beside(labels, reading.data)
    for batch, found in reading:
        for name, value in found.items():
            parts[name].append(value)
        beside.add(batch, places)
    positions = positions_for(reading.count, _wanted(labels, count), positions)
    label = position_label(positions)
    how = f"collect(positions={label}{', per_position' if per_position else ''})"
    vectors = {name: torch.cat(values) for name, values in parts.items()}
    lost = torch.stack([vector.isnan().all(1) for vector in vectors.values()]).any(0)
    warn_of_empty({label: int(lost.sum())}, len(lost))
    return Collected(
        vectors,
        label,
        describe(model, method=how, dataset_sha256=reading.digest, examples=reading.count),
        **beside.columns(),
    )


def _wanted(labels: Any, count: int | None) -> int | None:
    return len(labels) if count is None and hasattr(labels, "__len__") else count


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the vectors of a batch come from: of each its example within the batch, its row and position ``[vector 2]``, and its label."""

    example: np.ndarray
    at: np.ndarray
    labels: list[Any] | None


class _Beside:
    """What stands beside every vector: its example, label and group."""

    def __init__(self, labels: Any, data: Any) -> None:
        self.own = None if labels is None or callable(labels) else [_plain(one) for one in labels]
        self.data = data
        self.examples: list[int] = []
        self.labels: list[Any] = []
        self.groups: list[Any] = []
        self.at: list[tuple[int, int]] = []

    def add(self, batch: Batch, places: Mapping[str, _Places]) -> None:
        """Note one batch."""
        first = next(iter(places.values()), None)
        index = np.arange(len(batch.examples)) if first is None else first.example
        if first is not None:
            same = all(np.array_equal(first.at, other.at) for other in places.values())
            if not same:
                raise InputError(
                    "The sites have different positions, so one label cannot stand for all: collect them apart."
                )
            starts = np.full(len(batch.examples), np.iinfo(int).max)
            np.minimum.at(starts, index, first.at[:, 0])
            self.at += list(zip((first.at[:, 0] - starts[index]).tolist(), first.at[:, 1].tolist(), strict=True))
        where = [batch.examples[int(one)] for one in index]
        self.examples += [batch.numbers[int(one)] for one in index]
        groups = None if self.data is None or self.data.groups is None else self.data.groups
        self.groups += [
            batch.numbers[int(one)] if groups is None else groups[at] for one, at in zip(index, where, strict=True)
        ]
        if first is not None and first.labels is not None:
            self.labels += first.labels
        elif self.own is not None:
            self.labels += [self.own[at] for at in where]
        elif self.data is not None and self.data.answers is not None:
            self.labels += [self.data.answers[at] for at in where]

    def columns(self) -> dict[str, Any]:
        """The columns of the result."""
        return {name: getattr(self, name) for name in _BESIDE}


def _plain(label: Any) -> Any:
    return label.tolist() if isinstance(label, (Tensor, np.ndarray, np.generic)) else label


def _each(
    site: str, value: Tensor, positions: ByTower, labels: Any, batch: Batch
) -> tuple[Float[Tensor, "vector feature"], _Places]:
    """The vector of every chosen position that has a label, example by example."""
    tokens, dropped = batch.layout(site, value)
    if dropped is None:
        raise InputError(f"{site} has no positions; leave per_position out.")
    mask = chosen_at_site(tokens, dropped, positions, batch.examples)
    row, position = (index.numpy() for index in mask.nonzero(as_tuple=True))
    order = np.lexsort((position, row, tokens.example[row]))
    row, position = row[order], position[order]
    example = tokens.example[row]
    own = _labels_at(labels, tokens, batch, example, row, position)
    if own is not None:
        there = np.array([not _missing(label) for label in own], dtype=bool)
        row, position, example = row[there], position[there], example[there]
        own = [label for label, kept in zip(own, there, strict=True) if kept]
    exact = value if value.dtype == torch.float64 else value.float()
    index = torch.from_numpy(row).to(value.device), torch.from_numpy(position - dropped).to(value.device)
    return exact[index].flatten(1), _Places(example, np.stack([row, position], 1), own)


def _labels_at(
    labels: Any, tokens: TokenMap, batch: Batch, example: np.ndarray, row: np.ndarray, position: np.ndarray
) -> list[Any] | None:
    """A label for each chosen position; None where labels are of examples."""
    if callable(labels):
        made = labels(tokens, batch)
        table = np.asarray(made.cpu() if isinstance(made, Tensor) else made)
        if table.shape != tokens.kind.shape:
            raise InputError(
                f"A function of labels returns one per position, {list(tokens.kind.shape)}, not {list(table.shape)}."
            )
        return [_plain(label) for label in table[row, position]]
    per_example = labels is not None and all(hasattr(one, "__len__") and not isinstance(one, str) for one in labels)
    if not per_example:
        return None
    found: list[Any] = []
    for number in range(len(batch.examples)):
        own, count = _plain(labels[batch.examples[number]]), int((example == number).sum())
        if len(own) != count:
            raise InputError(
                f"Example {batch.numbers[number]} has {count} chosen positions and {len(own)} labels; give one each."
            )
        found += list(own)
    return found


def _missing(label: Any) -> bool:
    return label is None or (isinstance(label, float) and np.isnan(label))


def _vectors(site: str, value: Tensor, positions: ByTower, batch: Batch) -> Float[Tensor, "example feature"]:
    tokens, dropped = batch.layout(site, value)
    exact = value if value.dtype == torch.float64 else value.float()
    example = torch.from_numpy(tokens.example)
    if dropped is None:
        rows = torch.from_numpy(tokens.present.any(1))
        picked, example = exact[rows.to(value.device)], example[rows]
        if len(example.unique()) < len(batch.examples):
            raise InputError(f"An example has nothing in the {tokens.tower} tower, so {site} says nothing of it.")
    else:
        mask = chosen_at_site(tokens, dropped, positions, batch.examples)
        picked = exact[mask[:, dropped:].to(value.device)]
        example = example[mask.nonzero()[:, 0]]
    flat, example = picked.flatten(1), example.to(value.device)
    sums = flat.new_zeros(len(batch.examples), flat.shape[1]).index_add_(0, example, flat)
    return sums / torch.bincount(example, minlength=len(batch.examples)).to(flat)[:, None]
