"""The folder of a sweep that can be continued: a manifest, and one file for each finished part.

A part is a batch of groups of edits on a batch of examples. It is written when it is finished, complete or not at all, and says which study it
belongs to, so that a run that is killed loses what it was computing and nothing else. The manifest holds the digest of everything that must be equal
for the numbers to be equal: weights and state of the model, inputs, edits, metrics, versions. How many edits run at once and how a run is watched are
not in it. Another study is refused, and so is a second process in the folder while the first one works.

Not covered: a machine that loses power (files are not flushed to the disk one by one), and locks on file systems that have none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from torch import Tensor

from circuitvision.digests import of_json
from circuitvision.errors import InputError
from circuitvision.files import make_folder, replacing, write_text
from circuitvision.incremental.sweeps.plan import Plan, as_plain, from_plain

FORMAT = "circuitvision.sweep/1"
_MANIFEST, _LOCK, _META = "manifest.json", ".lock", "circuitvision_json"


@dataclass
class Part:
    """What one batch of groups measured on one batch of examples.

    ``values`` ``[metric group example]``, ``clean`` ``[metric example]``, ``unedited`` ``[group example]``: where a group's masks selected nothing.
    ``others`` ``[metric example]`` by name: the same metrics of further runs of these examples, the sources of edits.
    """

    batch: int
    examples: list[int]
    groups: list[int]
    values: Tensor
    clean: Tensor
    unedited: Tensor
    plan: list[Plan] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)


class Store:
    """One study's folder; use as a context, which holds the lock."""

    def __init__(self, folder: str | Path, study: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.study, self.resume = Path(folder), dict(study), resume
        self.digest = of_json(self.study)
        self.layout: dict[str, Any] = {}
        self._lock: IO[str] | None = None
        self._known = False
        """Whether the folder is this study's."""
        self._begun = False
        """Whether it became so here."""

    def __enter__(self) -> Store:
        """Look into the folder, and change nothing. Raises InputError for another study's, for a started one without ``resume``, and while another
        process works in it. A finished study is also read from a folder in which nothing can be written."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"save_to={str(self.folder)!r} is a file: give a folder.")
        manifest = self.folder / _MANIFEST
        if manifest.is_file():
            self._check(manifest)
            self._known = True
            self._lock = _locked(self.folder / _LOCK)
        elif self.folder.is_dir() and any(self.folder.glob("part-*")):
            raise InputError(f"{self.folder} holds parts of a sweep and no {_MANIFEST}: give another folder.")
        return self

    def begin(self, layout: Mapping[str, Any]) -> None:
        """Make the folder this study's, once all that can be checked before a run was found right.

        ``layout`` is how parts are cut, which every run in the folder keeps to.
        """
        make_folder(self.folder)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise InputError(
                f"Nothing can be written in {self.folder}, and the sweep is not finished: give another folder."
            )
        manifest = self.folder / _MANIFEST
        if not self._known:
            self._lock = _locked(self.folder / _LOCK)
            if manifest.is_file():
                raise InputError(
                    f"Another process began a study in {self.folder} meanwhile: wait for it and give resume=True, or give another folder."
                )
            told = {"format": FORMAT, "digest": self.digest, "study": self.study, "layout": dict(layout)}
            write_text(manifest, json.dumps(told, indent=1))
            self._known = self._begun = True

    def take_back(self) -> None:
        """Leave no trace of a study that was begun here and refused before anything was measured."""
        if not self._begun or any(self.folder.glob("part-*")):
            return
        self.__exit__()
        self._lock, self._known, self._begun = None, False, False
        for name in (_MANIFEST, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _check(self, manifest: Path) -> None:
        try:
            known = json.loads(manifest.read_text(encoding="utf-8"))
            form, there, self.layout = known["format"], dict(known["study"]), dict(known.get("layout", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest} is damaged ({error}): give another folder.") from error
        if form != FORMAT:
            raise InputError(
                f"{manifest} is of format {form!r}; this version continues {FORMAT!r}. Give another folder."
            )
        other = sorted(
            name for name in {*there, *self.study} if of_json(there.get(name)) != of_json(self.study.get(name))
        )
        if other:
            raise InputError(
                f"{self.folder} holds another study (its {', '.join(other)} {'are' if len(other) > 1 else 'is'} not those of this call), whose "
                "numbers cannot be joined with these: give another folder."
            )
        if not self.resume:
            raise InputError(f"{self.folder} holds this study already, in part or whole: resume=True continues it.")

    def parts(self) -> list[Part]:
        """The finished parts. Raises InputError for one that is damaged, of another study, or that measures something a second time."""
        found: list[Part] = []
        seen: set[tuple[int, int]] = set()
        for path in sorted(self.folder.glob("part-*.safetensors")):
            part = self._read(path)
            cells = {(part.batch, group) for group in part.groups}
            if cells & seen:
                raise InputError(f"{path} measures edits that another part measures as well: take one of them away.")
            seen |= cells
            found.append(part)
        return found

    def _read(self, path: Path) -> Part:
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as archive:
                header = json.loads((archive.metadata() or {})[_META])
                tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            study, plan = header["study"], [from_plain(one) for one in header["plan"]]
            others = {name.removeprefix("other."): t for name, t in tensors.items() if name.startswith("other.")}
            own = {name: tensors[name] for name in ("values", "clean", "unedited")}
            part = Part(header["batch"], header["examples"], header["groups"], plan=plan, others=others, **own)
            _check_shapes(part)
        except Exception as error:
            raise InputError(f"{path} is damaged ({error}): delete it, and it is measured again.") from error
        if study != self.digest:
            raise InputError(f"{path} belongs to another study: take it out of the folder.")
        return part

    def write(self, part: Part) -> Path:
        """Keep a finished part."""
        from safetensors.torch import save_file

        header = {
            "study": self.digest,
            "batch": part.batch,
            "examples": part.examples,
            "groups": part.groups,
            "plan": [as_plain(plan) for plan in part.plan],
        }
        tensors = {"values": part.values, "clean": part.clean, "unedited": part.unedited}
        tensors |= {f"other.{name}": tensor for name, tensor in part.others.items()}
        path = self.folder / f"part-{part.batch:06d}-{min(part.groups):07d}.safetensors"
        with replacing(path) as temporary:
            kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(kept, temporary, metadata={_META: json.dumps(header)})
        return path


def _check_shapes(part: Part) -> None:
    """Raise ValueError where the tensors of a part are not those of its groups and examples."""
    metrics, groups, examples = part.values.shape
    named = (len(part.groups), len(part.examples), len(part.plan))
    if named != (groups, examples, groups) or not groups or not examples:
        raise ValueError(f"{named[0]} edits of {named[1]} examples are named, and {groups} of {examples} measured")
    wrong = [tuple(one.shape) for one in (part.clean, *part.others.values()) if one.shape != (metrics, examples)]
    if wrong or part.unedited.shape != (groups, examples):
        raise ValueError(
            f"tensors of the shapes {[*wrong, tuple(part.unedited.shape)]} beside {tuple(part.values.shape)}"
        )
    numbers = [part.batch, *part.groups, *part.examples]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("batch, edits and examples are no numbers")


def open_lock(path: Path) -> IO[str]:
    """The lock file, made where there is none."""
    return path.open("a", encoding="utf-8")


def _locked(path: Path) -> IO[str] | None:
    """The lock file, held by this process until it is closed or the process ends; None where files cannot be locked."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        handle = open_lock(path)
    except OSError:
        # Nothing can be written here, by this process at least: reading needs no lock, and what writes says so.
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise InputError(
            f"Another process is working in {path.parent}: wait for it, or give another folder."
        ) from error
    except OSError:
        handle.close()
        return None
    return handle


@contextlib.contextmanager
def orderly_stop() -> Iterator[None]:
    """Inside, SIGTERM raises ``SystemExit(143)``, so that files and hooks are left in order; outside, and where a handler was set, it does what
    it did.

    Signals reach the main thread only: in another one nothing changes.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def joined(parts: Sequence[Part], groups: int, examples: int) -> dict[str, Tensor]:
    """Parts as whole tensors: ``values`` ``[metric group example]``, ``clean``, ``unedited``, ``done`` ``[group example]`` and those of other runs.

    What no part measured is NaN, and not done.
    """
    dtype = parts[0].values.dtype if parts else torch.float64
    for part in parts:
        dtype = torch.promote_types(dtype, part.values.dtype)
    metrics = parts[0].values.shape[0] if parts else 1
    values = torch.full((metrics, groups, examples), float("nan"), dtype=dtype)
    clean = torch.full((metrics, examples), float("nan"), dtype=dtype)
    unedited = torch.zeros(groups, examples, dtype=torch.bool)
    done = torch.zeros(groups, examples, dtype=torch.bool)
    others: dict[str, Tensor] = {}
    for part in parts:
        here = torch.tensor(part.examples)
        clean[:, here] = part.clean.to(dtype)
        for name, found in part.others.items():
            others.setdefault(f"other.{name}", torch.full_like(clean, float("nan")))[:, here] = found.to(dtype)
        if part.groups:
            rows = torch.tensor(part.groups)
            values[:, rows[:, None], here] = part.values.to(dtype)
            unedited[rows[:, None], here] = part.unedited
            done[rows[:, None], here] = True
    return {"values": values, "clean": clean, "unedited": unedited, "done": done, **others}
