"""PNGs of figures, made by a Chromium that is found on the machine; nothing here runs before a figure is shown or written as a PNG.

Kaleido drives the browser. It is started once, when the first PNG is made, and stays for the next ones. Where there is no browser, or no kaleido,
one warning says what to install, and figures are shown without a PNG. The environment variable ``CIRCUITVISION_PNG=0`` turns PNGs beside figures
off. Not covered: other browsers, PDF and SVG (``figure.write_image`` makes them).
"""

from __future__ import annotations

import functools
import io
import os
import shutil
from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError, warn
from circuitvision.plots import style

if TYPE_CHECKING:
    import plotly.graph_objects as go

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
_PAGES = {False: ("#ffffff", "#333333"), True: ("#16171a", "#d6d6d6")}
"""Page and text, light and dark."""


def browser() -> str | None:
    """The path of a Chromium or Chrome: that of ``BROWSER_PATH``, on the search path, or the one ``plotly_get_chrome`` installed."""
    named = os.environ.get("BROWSER_PATH")
    found = [named] if named else [shutil.which(name) for name in _NAMES]
    path = next((path for path in found if path and os.path.exists(path)), None)
    if path is None:
        try:
            from choreographer.browsers.chromium import Chromium

            path = Chromium.find_browser(skip_local=False)
        except Exception:  # not installed, or of another version
            return None
    return path


def missing() -> str:
    """What must be installed before PNGs can be made; nothing where all is there."""
    import importlib.util

    parts = [] if importlib.util.find_spec("kaleido") else ["pip install 'circuitvision[notebook]' (for kaleido)"]
    parts += [] if browser() else ["a Chromium (Debian: apt install chromium; elsewhere: plotly_get_chrome)"]
    return f"PNGs of figures need {' and '.join(parts)}." if parts else ""


def render(figure: go.Figure, width: int = 800, dark: bool = False, scale: float = 1.0) -> bytes:
    """A figure as the bytes of a PNG with few colours, on a white or a dark page.

    Raises:
        InputError: there is no browser or no kaleido; the message says what to install.
    """
    if lacking := missing():
        raise InputError(lacking)
    import kaleido

    _start()
    page = _on_page(figure, dark)
    options = {"format": "png", "width": width, "height": page["layout"].get("height", 450), "scale": scale}
    return _small(kaleido.calc_fig_sync(page, opts=options))


def beside() -> bool:
    """Whether figures are shown with a PNG; where they cannot be, one warning says why."""
    if os.environ.get("CIRCUITVISION_PNG", "1") == "0":
        return False
    lacking = missing()
    if lacking:
        _say(f"{lacking} Figures are shown without one.")
    return not lacking


def failed(error: Exception) -> None:
    """Say once that the browser does not work."""
    _say(f"No PNG could be made ({type(error).__name__}: {error}); CIRCUITVISION_PNG=0 turns them off.")


@functools.cache
def _say(text: str) -> None:
    warn(text)


@functools.cache
def _start() -> None:
    import atexit

    import kaleido

    kaleido.start_sync_server(n=1, path=browser(), silence_warnings=True)
    atexit.register(_stop)


def _stop() -> None:
    import time

    import kaleido

    kaleido.stop_sync_server(silence_warnings=True)
    # A browser that is still closing writes into the folder that is removed next.
    time.sleep(0.3)


def _on_page(figure: go.Figure, dark: bool) -> dict[str, Any]:
    """The figure as it looks on a page of that colour, without the strip of the toolbar and without sliders, which nobody can move."""
    page, text = _PAGES[dark]
    found = figure.to_dict()
    layout = found["layout"]
    font, title, pad = (
        dict(layout.get("font", {})),
        dict(layout.get("title", {})),
        layout.get("title", {}).get("pad", {}),
    )
    strip = min(style.TOOLBAR - 10, pad.get("t", 0))
    layout.update(font={**font, "color": text}, paper_bgcolor=page)
    layout["title"] = {
        **title,
        "font": {**title.get("font", {}), "color": text},
        "pad": {**pad, "t": pad.get("t", 0) - strip},
    }
    layout["margin"] = {**layout.get("margin", {}), "t": layout.get("margin", {}).get("t", 80) - strip}
    layout["height"] = layout.get("height", 450) - strip
    return found


def _small(image: bytes) -> bytes:
    """The same picture in 255 colours, a third of the size."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(
        buffer, format="PNG", optimize=True
    )
    return buffer.getvalue()
