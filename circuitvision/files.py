"""Files that are either complete or absent.

A file is written under a temporary name in its own folder and renamed when it is complete, so an interrupted run
leaves the previous version (or nothing), never half a file. Not covered: groups of files that must change together.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from circuitvision.errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an exception.

    The temporary name keeps the suffix of ``path``, for writers that choose a format from it. Missing parent folders
    are made.

    Raises:
        InputError: ``path`` is a folder, or its parent cannot be one.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file inside it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{path.parent} is a file, so nothing can be written inside it; choose another folder."
        ) from error
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
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


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8 to ``path``, complete or not at all; returns the path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


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
