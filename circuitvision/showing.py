"""``cv.show``: whatever can be looked at, in a notebook or outside one.

A figure is shown as it is, a result as its figure, scenes, pairs and pictures as pictures; of several things, each. In a notebook figures carry a
PNG beside their interactive form. Outside one, figures open in a browser window and pictures in the system's viewer. Not covered: models and
caches, which print themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from circuitvision.errors import InputError

_REPRS = ("_repr_mimebundle_", "_repr_html_", "_repr_png_")


def show(value: Any, **keywords: Any) -> None:
    """Show a figure, a result (keywords go to its ``plot``), a scene, pairs, a picture, or several of these one after the other.

    Raises:
        InputError: nothing that can be shown, or keywords for something that takes none.
    """
    from circuitvision.results import Result

    if isinstance(value, Result):
        value, keywords = value.plot(**keywords), {}
    if keywords:
        raise InputError(f"Only results take keywords; a {type(value).__name__} is shown as it is.")
    if any(hasattr(value, name) for name in _REPRS):
        _display(value)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        for one in value:
            show(one)
    else:
        raise InputError(
            f"A {type(value).__name__} cannot be shown; show takes figures, results, scenes, pairs and pictures."
        )


def _display(value: Any) -> None:
    if hasattr(value, "to_plotly_json"):
        from circuitvision.plots.figure import adopted

        value = adopted(value)
    if _in_notebook():
        from IPython.display import display

        display(value)
    elif hasattr(value, "to_plotly_json"):
        value.show()
    elif picture := getattr(value, "image", value if hasattr(value, "save") and hasattr(value, "resize") else None):
        picture.show()
    else:
        print(value)


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs this."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
