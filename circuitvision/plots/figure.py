"""The class of every figure made here: a Plotly figure that shows a PNG of itself beside its interactive form, and can be written as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from circuitvision.plots import png


def adopted(figure: go.Figure) -> go.Figure:
    """The same figure, as one that carries a PNG; widgets, which must stay what they are, are left alone."""
    if type(figure) is go.Figure:
        figure.__class__ = Figure
    return figure


class Figure(go.Figure):
    """A Plotly figure that carries a PNG where it is shown in a notebook, so that it is seen on code hosts and in nbconvert.

    Nothing is rendered before it is shown. See :mod:`circuitvision.plots.png` for what that needs.
    """

    def write_png(self, path: str | Path, width: int = 800, dark: bool = False, scale: float = 1.0) -> Path:
        """Write the figure as a PNG of that width, on a white page or a dark one; returns the path.

        Raises:
            InputError: there is no Chromium or no kaleido; the message says what to install.
        """
        path = Path(path)
        path.write_bytes(png.render(self, width, dark, scale))
        return path

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, validate: bool = True, **more: Any) -> Any:
        bundle = dict(super()._repr_mimebundle_(include, exclude, validate, **more) or {})
        if "image/png" not in bundle and png.beside():
            import base64

            try:
                bundle["image/png"] = base64.b64encode(png.render(self)).decode()
            except Exception as error:  # a browser that does not start must not keep a figure from being shown
                png.failed(error)
        return bundle

    def _ipython_display_(self) -> None:
        import plotly.io as pio

        bundle = self._repr_mimebundle_() if pio.renderers.render_on_display and pio.renderers.default else {}
        if not any(kind.startswith(("application/", "text/html")) for kind in bundle):
            # Outside notebooks: a browser window, or nothing.
            super()._ipython_display_()
            return
        from IPython.display import publish_display_data

        publish_display_data(bundle)
