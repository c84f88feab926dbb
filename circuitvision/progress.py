"""Progress of long work: bars on a terminal or in a notebook, now and then a line where there is neither.

One switch for the whole library: nothing is shown after ``set_verbosity("quiet")``. Where standard error is a file or a pipe, work that lasts longer
than :data:`EVERY` seconds writes a line with its rate and the time left, and no more often than that. Not covered: the ``logging`` module.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from circuitvision.errors import InputError

Item = TypeVar("Item")
EVERY = 30.0
"""Seconds between two lines where no bar can be drawn."""
_LEVELS = ("quiet", "normal")
_state = {"level": "normal"}


def set_verbosity(level: str) -> None:
    """Choose what the library prints while it works: ``"normal"`` (bars, or lines in files) or ``"quiet"`` (nothing).

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
    """Whether no bar is drawn: after ``set_verbosity("quiet")``, and where standard error goes to a file."""
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
    """Iterate over ``items`` behind a :class:`Progress` named ``description``."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with Progress(total, description) as bar:
        for item in items:
            yield item
            bar.advance()


class Progress:
    """Progress of work of uneven steps, which advances it itself; ``total`` 0 where the end is not known, nothing with ``shown=False``."""

    def __init__(self, total: int, description: str, shown: bool = True) -> None:
        self.total, self.description, self.shown = total, description, shown
        self.done = self.measured = 0
        self._bar: Any = None
        self._began = self._told = 0.0

    def __enter__(self) -> Progress:
        from tqdm.auto import tqdm

        self._began = self._told = time.monotonic()
        disable = not self.shown or silent()
        self._bar = tqdm(
            total=self.total or None, desc=self.description, disable=disable, leave=False, dynamic_ncols=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def describe(self, description: str) -> None:
        """Another name for what goes on, shown from now on."""
        self.description = description
        self._bar.set_description(description, refresh=False)

    def advance(self, count: int = 1, measured: bool = True) -> None:
        """Count some items as done; those that an earlier run did are not ``measured``: they say nothing of the rate."""
        self.done += count
        if measured:
            self.measured += count
            self._bar.update(count)
        elif not self._bar.disable:
            self._bar.initial += count
            self._bar.n += count
        now = time.monotonic()
        if now - self._told >= EVERY and self.shown and silent() and _state["level"] != "quiet":
            self._told = now
            print(self._line(now - self._began), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        rate = self.measured / seconds if seconds > 0 else 0.0
        pace = f"{rate:.3g} per second" if rate >= 1 or not rate else f"{1 / rate:.3g} seconds each"
        if not self.total:
            return f"{self.description}: {self.done}, {pace}"
        left = f", {_time(max(self.total - self.done, 0) / rate)} left" if rate else ""
        return f"{self.description}: {self.done} of {self.total} ({self.done / self.total:.0%}), {pace}{left}"


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes else f"{seconds:.0f} s"
