"""One look for every figure, legible on a light and on a dark page, and pages that need no network.

Figures have transparent backgrounds. A page written here carries plotly.js inside itself and a small script that
sets text and lines to the reader's colour scheme; elsewhere (a notebook) the text is a grey with enough contrast on
both.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from circuitvision.files import write_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

FOR = "#d9480f"
AGAINST = "#2f6fdb"
GREY = "#7a7a7a"
FAINT = "rgba(128,128,128,0.25)"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
Color = tuple[int, int, int]


def diverging(low: Color = (33, 87, 190), high: Color = (208, 63, 8)) -> list[list[float | str]]:
    """A colour scale between two colours whose middle is nearly transparent: zero looks like the page, whatever its colour."""
    stops = [(0.0, low, 1.0), (0.25, low, 0.6), (0.5, (128, 128, 128), 0.12), (0.75, high, 0.6), (1.0, high, 1.0)]
    return [[where, f"rgba({r},{g},{b},{alpha})"] for where, (r, g, b), alpha in stops]


def legible(signed: bool = False) -> list[list[float | str]]:
    """A colour scale without transparency, for cells with words on them: plotly picks the words' colour by the cell's, not by the page's."""
    if signed:
        return [[0.0, "rgb(33,87,190)"], [0.5, "rgb(236,232,229)"], [1.0, "rgb(208,63,8)"]]
    return [[0.0, "rgb(240,234,230)"], [0.5, "rgb(228,150,118)"], [1.0, "rgb(208,63,8)"]]


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


def tint(strength: float, colors: tuple[Color, Color] | None = None) -> dict[str, object]:
    """Background of a label whose value is ``strength`` (-1 … 1) of the scale :func:`diverging`, and a border where it is faint."""
    low, high = colors or ((33, 87, 190), (208, 63, 8))
    red, green, blue = high if strength >= 0 else low
    return {
        "bgcolor": f"rgba({red},{green},{blue},{min(abs(strength), 1.0) * 0.75:.2f})",
        "bordercolor": "rgba(128,128,128,0.4)",
        "borderwidth": 1,
    }


def which_row(row: int, rows: int, *more: str) -> str:
    """A small second line for a title: which of several rows a figure shows, and what else can be chosen; nothing where there is no choice."""
    parts = ([f"row {row} of {rows} (row= shows another)"] if rows > 1 else []) + [part for part in more if part]
    return f"<br><span style='font-size:12px'>{'; '.join(parts)}</span>" if parts else ""


def layout(figure: go.Figure, title: str, height: int, **more: object) -> go.Figure:
    """Give a figure the common look; returns it."""
    figure.update_layout(
        title={"text": title, "x": 0.0, "xanchor": "left", "xref": "paper", "font": {"size": 16, "color": GREY}},
        font={"family": FONT, "size": 13, "color": GREY},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        height=height,
        hoverlabel={"font": {"family": FONT}},
    )
    figure.update_layout(**more)
    return figure


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
