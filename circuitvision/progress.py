"""Progress bars that scripts can silence.

One switch for the whole library: bars are drawn on standard error when it is a terminal or a notebook is running,
and never after ``set_verbosity("quiet")``. Not covered: logging.
"""

from __future__ import annotations

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


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over ``items`` behind a progress bar named ``description`` (silent after ``set_verbosity("quiet")``)."""
    from tqdm.auto import tqdm

    yield from tqdm(
        items, desc=description, total=total, disable=_state["level"] == "quiet", leave=False, dynamic_ncols=True
    )


class Progress:
    """A progress bar that work of uneven steps advances itself (silent after ``set_verbosity("quiet")``, or with ``shown=False``)."""

    def __init__(self, total: int, description: str, shown: bool = True) -> None:
        self.total, self.description, self.shown = total, description, shown
        self._bar: Any = None

    def __enter__(self) -> Progress:
        from tqdm.auto import tqdm

        disable = not self.shown or _state["level"] == "quiet"
        self._bar = tqdm(total=self.total, desc=self.description, disable=disable, leave=False, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count some items as done."""
        self._bar.update(count)
