"""Files that are either complete or absent.

A file is written under a temporary name in its own folder and renamed when it is complete, so an interrupted run
leaves the previous version (or nothing), never half a file. Not covered: groups of files that must change together.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from circuitvision.errors import CircuitVisionError, InputError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an exception.

    The temporary name keeps the suffix of ``path``, for writers that choose a format from it. Missing parent folders
    are made.

    Raises:
        InputError: ``path`` is a folder, or its parent cannot be one, or nothing can be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file inside it.")
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:100]}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise InputError(
            f"Nothing can be written in {path.parent} ({error.strerror}); choose another folder."
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private to their owner; a finished result gets what an ordinary open() would have given
        # it.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those it lies in; InputError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder} is a file, so nothing can be written inside it; choose another folder.") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); choose another folder.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under their names to a ``.safetensors`` file, complete or not at all.

    Tensors without ``metadata`` are those of a text of edits, which lies beside them under the same stem and names them by digest.

    Raises:
        InputError: the file would take the place of the tensors of edits, or the tensors of edits that of anything else.
    """
    from safetensors.torch import save_file

    of_edits = metadata is None
    if path.is_file() and _holds_tensors_of_edits(path) != of_edits:
        beside = (
            "something else than tensors of edits"
            if of_edits
            else f"the tensors of the edits in {path.stem}.yaml or .json"
        )
        raise InputError(f"{path} holds {beside}, which would be lost: choose another name, or delete that file first.")
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(copies, temporary, metadata=None if metadata is None else dict(metadata))


def _holds_tensors_of_edits(path: Path) -> bool:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as archive:
            names, told = list(archive.keys()), archive.metadata()
    except Exception:  # damaged, or no file of tensors
        return False
    return bool(names) and not told and all(len(name) == 64 and set(name) <= set("0123456789abcdef") for name in names)


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8 to ``path``, complete or not at all; returns the path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Inside, whatever a reader raises about a damaged or foreign file is one InputError that names the file; the package's own errors stay.

    Readers of archives, headers and texts each fail in types of their own. ``what`` is what the file should hold, such as "a result".
    """
    try:
        yield
    except (CircuitVisionError, MemoryError):
        raise
    except ImportError as error:
        raise InputError(f"{path} needs what is not installed: {error}.") from error
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise InputError(f"{path} is not {what}, or damaged ({type(error).__name__}: {told}).") from error


def format_of(path: str | Path) -> str:
    """What a file is by its first bytes: "npz", "safetensors", "parquet", "text", or "" for anything else.

    Raises:
        InputError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    with path.open("rb") as handle:
        start = handle.read(4096)
    if start[:2] == b"PK":
        return "npz"
    if start[:4] == b"PAR1":
        return "parquet"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    return "" if b"\0" in start else "text"
