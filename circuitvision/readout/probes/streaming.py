"""A data set through a model, batch by batch: what read-outs over many examples stand on.

A data set is one of :mod:`circuitvision.data` (a ``Side``; ``Pairs`` stand for their clean side), whose prompts are filled up as they need to be; or
a sequence or any iterable of model inputs, each of one or several examples; or one mapping that holds all examples, which is cut into batches (images
go with the example whose prompt they stand in). Neighbours that fit together run in one batch. A batch's activations are reduced while the model runs
and the rest is never kept, so memory goes by what is asked for; a run ends when the last asked-for site was read.

In dual encoders examples are images or texts, whichever the sites belong to; the other side runs
with its first row, which cannot reach them.

Not covered: collating model inputs of different lengths (they run one after the other), several passes (generation).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitvision.data import Batch as DataBatch
from circuitvision.data import Pairs, Side
from circuitvision.data.batches import compared_batches
from circuitvision.errors import InputError
from circuitvision.model.axes import map_of
from circuitvision.model.inputs import as_mapping
from circuitvision.model.packing.base import Compared
from circuitvision.model.registrations import Recorder, Registration
from circuitvision.model.sites import SiteName
from circuitvision.model.tokens import TokenMap
from circuitvision.progress import Progress
from circuitvision.provenance import hash_inputs

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

OTHER: dict[str, Compared] = {"images": "texts", "texts": "images"}


class _Enough(Exception):
    """Ends a forward pass whose asked-for sites were all read."""


class _Reducer(Recorder):
    """Hands every site's value on as it comes by, and keeps nothing."""

    def __init__(self, sites: Sequence[str], read: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.waiting, self.read = set(sites), read

    def record(self, name: str, value: Tensor) -> None:
        self.read(name, value.detach())
        self.waiting.discard(name)
        if not self.waiting:
            raise _Enough


@dataclass(frozen=True)
class Batch:
    """Some examples: their inputs, their places in the data set, and the token map of every tower; of a :class:`~circuitvision.data.Side` also what
    stands beside them."""

    inputs: dict[str, Any]
    examples: range
    tokens: dict[str, TokenMap]
    model: Wrapped
    data: DataBatch | None = None

    @property
    def numbers(self) -> list[int]:
        """The numbers of the examples: those that the data set gives them, or else their places."""
        return list(self.examples) if self.data is None else self.data.examples

    def layout(self, site: str, value: Tensor) -> tuple[TokenMap, int | None]:
        """The token map of a site's rows, and how many of its first positions the site lacks (None: it has no positions).

        Raises:
            InputError: the site's rows or positions are not those of its tower.
        """
        name = SiteName.parse(site)
        tokens = self.tokens.get(map_of(self.model, name))
        if name.is_pattern:
            raise InputError(f"{site} holds a number per query and key; read attn.hook_z, or a site of the stream.")
        if tokens is None or value.shape[0] != tokens.n_rows:
            raise InputError(f"The rows of {site} are not those of its tower; choose a site of one block.")
        length = value.shape[1] if value.ndim > 2 else 1
        if value.ndim == 2 or (length == 1 < tokens.n_positions):
            return tokens, None
        if length > tokens.n_positions:
            raise InputError(f"{site} has {length} positions, its tower {tokens.n_positions}; choose another site.")
        return tokens, tokens.n_positions - length


class Reading:
    """One pass over a data set: iterate to get ``(batch, {site: reduce(site, value, batch)})``.

    ``count`` and ``digest`` say afterwards how many examples went through, and which.

    Raises:
        InputError: no example, a batch size below 1, inputs that cannot be cut into examples.
    """

    def __init__(
        self,
        model: Wrapped,
        dataset: Any,
        sites: Sequence[str],
        reduce: Callable[[str, Tensor, Batch], Any],
        *,
        batch_size: int = 32,
        description: str = "read",
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r} is not understood: give the number of examples run at once.")
        self.model, self.sites, self.reduce = model, list(sites), reduce
        self.batch_size, self.description = batch_size, description
        self.side = _side(model, self.sites)
        self.count = 0
        self.data: Side | None = dataset.clean if isinstance(dataset, Pairs) else None
        self.data = dataset if isinstance(dataset, Side) else self.data
        self.total: int | None = None
        if self.data is not None:
            self.total = len(self.data)
            if not self.total:
                raise InputError("The data set holds no example.")
            return
        self._hashes, self._first, self._items = hashlib.sha256(), "", 0
        single = isinstance(dataset, (Mapping, Tensor))
        if not single and not isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__"):
            raise InputError(
                f"A data set is model inputs, or a sequence or iterable of them, not {type(dataset).__name__}."
            )
        self.items: Iterable[Any] = [dataset] if single else dataset
        if isinstance(self.items, (list, tuple)):
            self.total = sum(n_examples(model, as_mapping(model, item), self.side) for item in self.items)
            if self.total == 0:
                raise InputError("The data set holds no example.")

    @property
    def digest(self) -> str:
        """SHA-256 of the data set, or of the inputs given so far, whatever the batch size; for one mapping that of :func:`hash_inputs`."""
        if self.data is not None:
            return self.data.digest
        return self._hashes.hexdigest() if self._items > 1 else self._first

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        with Progress(self.total or 0, self.description, shown=(self.total or 2) > 1) as bar:
            for inputs, size, data in self._batches():
                yield self._run(inputs, range(self.count, self.count + size), data)
                self.count += size
                bar.advance(size)
        if self.count == 0:
            raise InputError("The data set holds no example.")

    def _batches(self) -> Iterator[tuple[dict[str, Any], int, DataBatch | None]]:
        if self.data is None:
            for inputs in _joined(self._pieces(), self.model, self.side, self.batch_size):
                yield inputs, n_examples(self.model, inputs, self.side), None
            return
        made = self.data.batches(self.model, self.batch_size)
        if self.model.is_dual:
            made = compared_batches(self.data, self.model, self.batch_size, self.side)
        for batch in made:
            yield batch.inputs, len(batch), batch

    def _pieces(self) -> Iterator[dict[str, Any]]:
        for item in self.items:
            mapping = as_mapping(self.model, item)
            self._note(hash_inputs(mapping))
            size = n_examples(self.model, mapping, self.side)
            if size <= self.batch_size and not self.model.is_dual:
                yield mapping
                continue
            for first in range(0, size, self.batch_size):
                yield _cut(self.model, mapping, self.side, first, min(first + self.batch_size, size))

    def _note(self, digest: str) -> None:
        self._hashes.update(digest.encode())
        self._first = self._first or digest
        self._items += 1

    def _run(
        self, inputs: dict[str, Any], examples: range, data: DataBatch | None = None
    ) -> tuple[Batch, dict[str, Any]]:
        device = self.model.device
        inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        batch = Batch(inputs, examples, self.model.tokens(inputs), self.model, data)
        found: dict[str, Any] = {}

        def read(site: str, value: Tensor) -> None:
            found[site] = self.reduce(site, value, batch)

        names = frozenset(self.sites)
        registration = Registration(recorder=_Reducer(self.sites, read), recorded=names, exact=names)
        with torch.no_grad(), self.model.engine.registered(registration), contextlib.suppress(_Enough):
            self.model(inputs)
        return batch, found


# -- cutting and joining inputs ------------------------------------------------------------------------------------------------------------


def _side(model: Wrapped, sites: Sequence[str]) -> Compared:
    """Whose rows are the examples: in a dual encoder "images", "texts" or "both"."""
    towers = {SiteName.parse(site).tower for site in sites}
    if not model.is_dual or len(towers) > 1:
        return "both"
    return "images" if model.towers[next(iter(towers))].stack.image else "texts"


def n_examples(model: Wrapped, inputs: Mapping[str, Any], side: Compared = "both") -> int:
    """How many examples an input mapping holds, see :meth:`Packing.n_examples`."""
    return model.family.packing.n_examples(model, inputs, side)


def _cut(model: Wrapped, inputs: Mapping[str, Any], side: Compared, first: int, last: int) -> dict[str, Any]:
    """The examples ``first`` … ``last − 1`` of an input mapping; of a dual encoder's other side the first row, which cannot reach them."""
    packing = model.family.packing
    found = packing.take(model, inputs, range(first, last), side)
    beside = OTHER.get(side)
    return found if beside is None else packing.take(model, found, [0], beside)


def _joined(
    pieces: Iterable[dict[str, Any]], model: Wrapped, side: Compared, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Neighbouring pieces that fit together as one batch of up to ``batch_size`` examples."""
    waiting: list[dict[str, Any]] = []
    held = 0
    for piece in pieces:
        size = n_examples(model, piece, side)
        if waiting and (held + size > batch_size or not _fit(waiting[0], piece)):
            yield _join(waiting, model, side)
            waiting, held = [], 0
        waiting.append(piece)
        held += size
    if waiting:
        yield _join(waiting, model, side)


def _fit(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    if first.keys() != second.keys():
        return False
    for name, one in first.items():
        two = second[name]
        if isinstance(one, Tensor) != isinstance(two, Tensor):
            return False
        if isinstance(one, Tensor):
            if one.ndim == 0 or one.shape[1:] != two.shape[1:] or (one.dtype, one.device) != (two.dtype, two.device):
                return False
        elif one is not two and not (isinstance(one, (bool, int, float, str)) and one == two):
            return False
    return True


def _join(pieces: Sequence[dict[str, Any]], model: Wrapped, side: Compared) -> dict[str, Any]:
    if len(pieces) == 1:
        return pieces[0]
    packing = model.family.packing
    # The other side of a dual encoder runs with the rows of the first piece.
    beside = {name: v for name, v in pieces[0].items() if model.is_dual and not packing.is_on(name, side)}
    return packing.join(model, [{**piece, **beside} for piece in pieces], side)
