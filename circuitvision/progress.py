"""Progress bars that scripts can silence.

One switch for the whole library: bars are drawn when standard error is a terminal or a notebook is running, and never
after ``set_verbosity("quiet")``. Not covered: logging.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from circuitvision.errors import InputError

Item = TypeVar("Item")
_LEVELS = ("quiet", "normal")
_state = {"level": "normal"}


def set_verbosity(level: str) -> None:
    """Choose what the library prints while it works: ``"normal"`` (progress bars) or ``"quiet"`` (nothing).

    Raises:
        InputError: any other level.
    """
    if level not in _LEVELS:
        raise InputError(f"Unknown verbosity {level!r}; choose one of {', '.join(_LEVELS)}.")
    _state["level"] = level


@contextlib.contextmanager
def verbosity(level: str) -> Iterator[None]:
    """Inside, the library prints as after ``set_verbosity(level)``; afterwards as before."""
    before = _state["level"]
    set_verbosity(level)
    try:
        yield
    finally:
        _state["level"] = before


def verbosity_level() -> str:
    """What :func:`set_verbosity` chose."""
    return _state["level"]


def silent() -> bool:
    """Whether nothing is drawn: after ``set_verbosity("quiet")``, and where standard error goes to a file."""
    return _state["level"] == "quiet" or not ("ipykernel" in sys.modules or sys.stderr.isatty())


@contextlib.contextmanager
def match_verbosity() -> Iterator[None]:
    """Inside, transformers draws a bar only where this library would."""
    from transformers.utils import logging

    if not silent() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over ``items`` behind a progress bar named ``description`` (drawn unless :func:`silent`)."""
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=description, total=total, disable=silent(), leave=False, dynamic_ncols=True)


class Progress:
    """A progress bar that work of uneven steps advances itself (drawn unless :func:`silent` or ``shown=False``)."""

    def __init__(self, total: int, description: str, shown: bool = True) -> None:
        self.total, self.description, self.shown = total, description, shown
        self._bar: Any = None

    def __enter__(self) -> Progress:
        from tqdm.auto import tqdm

        disable = not self.shown or silent()
        self._bar = tqdm(total=self.total, desc=self.description, disable=disable, leave=False, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count some items as done."""
        self._bar.update(count)
