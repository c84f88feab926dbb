"""The exceptions of circuitvision: one class per kind of mistake, each message naming the fix.

All derive from :class:`CircuitVisionError`, so a study can catch one type. What a caller can put right is an :class:`InputError`; a model that no
family describes is an :class:`UnsupportedModelError`. Those that a caller could already expect from Python's own vocabulary (a bad value, an unknown
key, attribute or number) also derive from that built-in type.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any


class CircuitVisionError(Exception):
    """Base of every error raised on purpose by circuitvision."""


class UnsupportedModelError(CircuitVisionError):
    """The model's class, or its structure, is not one a family table entry describes."""


class InputError(CircuitVisionError, ValueError):
    """What was given does not fit: image size, image tokens, mask length, unknown words."""


class UnknownSiteError(InputError, KeyError):
    """A site name or glob matches nothing in this model."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class UnknownAttributeError(InputError, AttributeError):
    """A model, a tower or the package has no attribute of that name."""


class UnknownExampleError(InputError, IndexError):
    """The number of an example outside a data set; ends an iteration by number, as Python's own lists do."""


class HookError(InputError):
    """A hook broke the contract of its site: shape, dtype, device, in-place change, or a site that did not fire once per pass."""


_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called circuitvision, however deep below it the reason was found.

    Python shows a warning once for each line: at a line in here, a second study with the same mistake would run without a word.
    """
    frame = found = sys._getframe(1)
    while frame.f_back is not None:
        inside, frame = frame.f_code.co_filename.startswith(_HERE), frame.f_back
        found = frame if inside else found
    registry = found.f_globals.setdefault("__warningregistry__", {})
    where = (found.f_code.co_filename, found.f_lineno, found.f_globals.get("__name__", "<unknown>"))
    warnings.warn_explicit(message, category, *where, registry)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` known names most similar to ``name``, best first."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.0)
    return close or known[:count]


def checked_seed(seed: Any) -> Any:
    """A seed, or a generator in place of one, as it is. Raises InputError for a number below 0, a fraction, and what is no number."""
    wrong = seed is None or isinstance(seed, (bool, float, str))
    if wrong or (hasattr(seed, "__index__") and seed.__index__() < 0):
        raise InputError(f"seed={seed!r} is no seed: give a whole number, 0 or more.")
    return seed
