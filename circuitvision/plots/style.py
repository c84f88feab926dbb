"""One look for every figure, legible on a light and on a dark page, and pages that need no network.

Figures have transparent backgrounds. A page written here carries plotly.js inside itself and a small script that
sets text and lines to the reader's colour scheme; elsewhere (a notebook) the text is a grey with enough contrast on
both.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvision.files import write_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

FOR = "#d9480f"
AGAINST = "#2f6fdb"
GREY = "#767676"
"""Text on a page whose colour is not known: 4.5 to 1 on white and on black."""
FAINT = "rgba(128,128,128,0.25)"
PALETTE = (FOR, AGAINST, "#2b8a3e", "#9c36b5", "#b27300", "#0c8599", "#c2255c", "#5f6368")
"""Colours of lines and groups, told apart on a light and on a dark page."""
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
TITLE, TEXT, SMALL, TINY = 16, 13, 12, 10
TOOLBAR = 34
"""Pixels above the title that the toolbar has for itself."""
_LINE, _WIDEST = 84, 108
"""Characters of a title and of a note that fit on one line of a notebook's page."""
Color = tuple[int, int, int]
Scale = list[list[Any]]
_LOW, _HIGH = (33, 87, 190), (208, 63, 8)


def diverging(low: Color = _LOW, high: Color = _HIGH) -> Scale:
    """A colour scale between two colours whose middle is nearly transparent: zero looks like the page, whatever its colour."""
    stops = [(0.0, low, 1.0), (0.25, low, 0.6), (0.5, (128, 128, 128), 0.12), (0.75, high, 0.6), (1.0, high, 1.0)]
    return [[where, f"rgba({r},{g},{b},{alpha})"] for where, (r, g, b), alpha in stops]


def sequential(over_picture: bool = False) -> Scale:
    """A colour scale to a colour from a faint grey, or over a picture from nothing."""
    red, green, blue = _HIGH
    lowest = f"rgba({red},{green},{blue},0)" if over_picture else "rgba(128,128,128,0.1)"
    return [[0.0, lowest], [0.3, f"rgba({red},{green},{blue},0.45)"], [1.0, f"rgba({red},{green},{blue},1)"]]


def legible(signed: bool = False) -> Scale:
    """A colour scale without transparency, for cells with words on them: their colour follows from the cell's (:func:`ink`), on any page."""
    if signed:
        return [[0.0, "rgb(33,87,190)"], [0.5, "rgb(236,232,229)"], [1.0, "rgb(208,63,8)"]]
    return [[0.0, "rgb(240,234,230)"], [0.5, "rgb(228,150,118)"], [1.0, "rgb(208,63,8)"]]


def color_at(scale: Scale, share: float) -> tuple[float, float, float, float]:
    """Red, green, blue (0 to 255) and opacity of a scale at ``share``, as Plotly interpolates."""
    stops = [(float(where), _numbers(color)) for where, color in scale]
    share = min(max(share, stops[0][0]), stops[-1][0])
    after = next(number for number, (where, _) in enumerate(stops) if where >= share)
    (low, first), (high, last) = stops[max(after - 1, 0)], stops[after]
    part = (share - low) / (high - low) if high > low else 0.0
    red, green, blue, alpha = (a + (b - a) * part for a, b in zip(first, last, strict=True))
    return red, green, blue, alpha


def _numbers(color: str) -> tuple[float, ...]:
    found = tuple(float(part) for part in color[color.index("(") + 1 : -1].split(","))
    return found if len(found) == 4 else (*found, 1.0)


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
    """Contrast of two opaque colours, 1 to 21 (WCAG 2.1, relative luminance)."""

    def luminance(color: Sequence[float]) -> float:
        parts = [level / 255 for level in color[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink(scale: Scale, share: float) -> str:
    """Black or white, whichever is easier to read on an opaque scale's colour: at least 4.58 to 1 on any colour there is."""
    color = color_at(scale, share)
    return "#000000" if contrast(color, (0, 0, 0)) >= contrast(color, (255, 255, 255)) else "#ffffff"


_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage", "resetScale2d"]]}
_THEME_SCRIPT = """
(function () {
  function paint() {
    var dark = window.matchMedia('(prefers-color-scheme: dark)').matches;
    var text = dark ? '#d6d6d6' : '#333333';
    document.querySelectorAll('.plotly-graph-div').forEach(function (figure) {
      if (figure.layout) { Plotly.relayout(figure, {'font.color': text, 'title.font.color': text}); }
    });
  }
  window.addEventListener('load', paint);
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', paint);
})();
"""

PAGE_STYLE = f"""
:root {{ color-scheme: light dark;
  --page: #ffffff; --text: #222222; --soft: #666666; --line: #dddddd; --card: #f6f6f4; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #16171a; --text: #e4e4e4; --soft: #a3a3a3; --line: #3a3c40; --card: #202226; }}
}}
body {{ background: var(--page); color: var(--text); font-family: {FONT}; line-height: 1.5; margin: 0 auto;
max-width: 1120px;
  padding: 28px 24px 60px; }}
h1 {{ font-size: 1.75rem; line-height: 1.25; margin: 0 0 .4rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .2rem; }}
p {{ margin: .3rem 0 .7rem; max-width: 78ch; }}
.soft {{ color: var(--soft); }}
code {{ background: var(--card); border-radius: 4px; padding: 1px 5px; font-size: .93em; }}
table {{ border-collapse: collapse; margin: .6rem 0; }}
th, td {{ text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
"""


def tint(strength: float, colors: tuple[Color, Color] | None = None) -> dict[str, Any]:
    """Background of a label whose value is ``strength`` (-1 … 1) of the scale :func:`diverging`, and a border where it is faint."""
    low, high = colors or ((33, 87, 190), (208, 63, 8))
    red, green, blue = high if strength >= 0 else low
    return {
        "bgcolor": f"rgba({red},{green},{blue},{min(abs(strength), 1.0) * 0.75:.2f})",
        "bordercolor": "rgba(128,128,128,0.4)",
        "borderwidth": 1,
    }


def titled(lead: str, *notes: str) -> str:
    """A title and, smaller below it, its notes; those that are empty are left out."""
    there = "; ".join(note for note in notes if note)
    return f"{lead}<br><span style='font-size:{SMALL}px'>{there}</span>" if there else lead


def layout(figure: go.Figure, title: str, height: int, *, above: int = 0, **more: Any) -> go.Figure:
    """Give a figure the common look; returns it. A plain Plotly figure becomes one that carries a PNG where it is shown.

    The title stands below the strip that the toolbar needs, its lines broken where a page ends; the figure's top margin is what it takes, and
    ``above`` more for the titles of panels. ``height`` is that of everything below the title.
    """
    from circuitvision.plots.figure import adopted

    figure = adopted(figure)
    title, taken = broken(title)
    top = TOOLBAR + taken + above + 12
    # Plotly lifts titles of several lines by the height of a capital.
    pad = TOOLBAR + (round(0.7 * TITLE) if "<br>" in title else 0)
    figure.update_layout(
        title={
            "text": title, "x": 0.0, "xanchor": "left", "xref": "container", "font": {"size": TITLE, "color": GREY},
            "y": 1.0, "yanchor": "top", "yref": "container", "pad": {"t": pad, "l": 12},
        },
        font={"family": FONT, "size": TEXT, "color": GREY},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "b": 50},
        height=height + top,
        hoverlabel={"font": {"family": FONT}},
    )  # fmt: skip
    figure.update_layout(**more)
    figure.update_layout(margin={"t": top})
    return figure


def broken(title: str) -> tuple[str, int]:
    """A title with its long lines broken, and the pixels it takes."""
    lead, mark, rest = title.partition("<br><span")
    style, _, note = rest.partition(">")
    lines = [line for part in lead.split("<br>") for line in _lines(part, _LINE)]
    notes = (
        [line for part in note.removesuffix("</span>").split("<br>") for line in _lines(part, _WIDEST)] if mark else []
    )
    found = "<br>".join(lines) + (f"<br><span{style}>{'<br>'.join(notes)}</span>" if mark else "")
    return found, round(1.3 * (TITLE * len(lines) + SMALL * len(notes)))


def _lines(text: str, width: int) -> list[str]:
    """A line broken between words; what is markup is left alone."""
    if len(re.sub(r"&\w+;", "x", text)) <= width or "<" in text:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [text]


def fragment(figure: go.Figure) -> str:
    """The figure as a piece of HTML for a page that has plotly.js already."""
    return figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)


def page(title: str, body: str) -> str:
    """A whole HTML page with plotly.js inside it once; it loads nothing."""
    from plotly.offline import get_plotlyjs

    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{PAGE_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n<script>{_THEME_SCRIPT}</script></head>\n"
        f"<body>{body}</body></html>\n"
    )


def write_figures(path: str | Path, title: str, figures: Sequence[go.Figure], intro: str = "") -> Path:
    """Write figures (or one) to one page, complete or not at all; ``intro`` is plain text above them."""
    figures = [figures] if hasattr(figures, "to_html") else figures
    text = f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>" + "".join(fragment(figure) for figure in figures)
    return write_text(path, page(title, text))


def signed_percent(share: float) -> str:
    """A share as a whole percentage with a proper minus sign."""
    rounded = round(share * 100)
    return f"{rounded}%" if rounded >= 0 else f"\N{MINUS SIGN}{-rounded}%"
