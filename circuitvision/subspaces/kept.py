"""The folder of a search that can be continued: the state of every training run at the end of its last epoch, and what finished places gave.

Manifest, lock and the refusal of another search are those of a sweep's folder (:class:`circuitvision.incremental.sweeps.store.Store`); beside them
stands one file for each training run or place, written complete or not at all. A search that is interrupted loses what it did since the end of an
epoch, and one that is continued gives the numbers of one that never was interrupted.

Not covered: what lies between two epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from circuitvision import provenance, storage
from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps.store import Store, orderly_stop

FORMAT = "circuitvision.fit/1"


class KeptRun:
    """The file of one training run or place: tensors, how many steps are done, and JSON ``beside`` them. Without a folder nothing is kept.

    ``every`` is how many steps lie between two states.
    """

    def __init__(self, path: Path | None = None, digest: str = "", begin: Callable[[], None] | None = None) -> None:
        self.path, self.digest, self._begin = path, digest, begin
        self.every = 1
        self.beside: dict[str, Any] = {}

    def read(self) -> tuple[dict[str, Tensor], int] | None:
        """Tensors and the steps done; None where nothing was kept. Raises InputError for a damaged file, or one of another search."""
        if self.path is None or not self.path.is_file():
            return None
        tensors, header = storage.read(self.path)
        if header.get("format") != FORMAT or header.get("digest") != self.digest:
            raise InputError(f"{self.path} belongs to another search: take it away, or give another folder.")
        self.beside = dict(header["beside"])
        return tensors, int(header["step"])

    def write(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Keep a state."""
        if self.path is None:
            return
        if self._begin is not None:
            self._begin()
        header = {"format": FORMAT, "digest": self.digest, "step": step, "beside": self.beside}
        storage.write(self.path, {name: one.detach().cpu().contiguous() for name, one in tensors.items()}, header)


class KeptRuns:
    """The runs of one search, by name."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store

    def run(self, name: str) -> KeptRun:
        """One run's file; a name holds letters, digits, dots, spaces and hyphens."""
        if self.store is None:
            return KeptRun()
        file = self.store.folder / f"fit-{name.replace(' ', '-')}.safetensors"
        return KeptRun(file, self.store.digest, lambda: self.store.begin({}) if self.store is not None else None)


@contextmanager
def kept_runs(save_to: str | Path | None, resume: bool, model: Any, search: Mapping[str, Any]) -> Iterator[KeptRuns]:
    """The folder of a search, for as long as it runs; ``search`` is what decides its numbers, beside the model.

    Raises:
        InputError: ``resume`` without a folder; a folder of another search, or of this one without ``resume``, or in use.
    """
    if resume and save_to is None:
        raise InputError("resume=True continues a search from its folder: name it, save_to=folder.")
    if save_to is None:
        yield KeptRuns()
        return
    told = provenance.told_of_model(model) | {name: of_json(plain(value)) for name, value in search.items()}
    with Store(save_to, told, resume) as store, orderly_stop():
        yield KeptRuns(store)
