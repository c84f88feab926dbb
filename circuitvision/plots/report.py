"""The report of one circuit: the finding in a sentence, the two inputs, and the figures that show it, on one page without network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvision.files import write_text
from circuitvision.plots import style

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL import Image


@dataclass(frozen=True)
class Section:
    """A heading, what to see in the figure below it, and the figure."""

    heading: str
    text: str
    figure: go.Figure


@dataclass(frozen=True)
class Picture:
    """An input image and what the model makes of it."""

    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Report:
    """Everything the page shows, in order. All texts are plain; nothing is interpreted as HTML.

    ``asked`` is what the model is asked beside the pictures, as its name ("prompt") and its text; both are empty where it is asked nothing.
    """

    title: str
    finding: str
    asked: tuple[str, str]
    pictures: Sequence[Picture]
    sections: Sequence[Section]
    table_header: Sequence[str]
    table: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write(report: Report, path: str | Path) -> Path:
    """Write the page, complete or not at all; returns the path."""
    return write_text(path, style.page(report.title, body(report)))


def body(report: Report) -> str:
    """The page between ``<body>`` and ``</body>``."""
    say = html.escape
    parts = [f"<h1>{say(report.title)}</h1>"]
    parts += [f"<p class='caution'>{say(note)}</p>" for note in report.notes]
    parts.append(f"<p>{say(report.finding)}</p>")
    figures = "".join(
        f"<figure><img alt='{say(picture.caption)}' src='{_data_uri(picture.image)}'>"
        f"<figcaption>{say(picture.caption)}</figcaption></figure>"
        for picture in report.pictures
    )
    name, text = map(say, report.asked)
    prompt = f"<div class='prompt'><span class='soft'>{name}</span><br><code>{text}</code></div>" if text else ""
    parts.append(f"<div class='pair'>{figures}{prompt}</div>")
    for section in report.sections:
        parts.append(
            f"<h2>{say(section.heading)}</h2><p class='soft'>{say(section.text)}</p>{style.fragment(section.figure)}"
        )
    parts.append(f"<h2>The strongest heads</h2>{table(report.table_header, report.table)}")
    rows = [
        (key, value) for key, value in report.provenance.items() if isinstance(value, str | int | float) and value != ""
    ]
    parts.append(f"<details><summary>Where these numbers come from</summary>{table((), rows)}</details>")
    return _STYLE + "".join(parts)


_STYLE = """<style>
.pair { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-end; margin: 1.1rem 0; }
figure { margin: 0; } figure img { width: 230px; image-rendering: pixelated; border: 1px solid var(--line); display: block; }
figcaption { margin-top: .35rem; max-width: 230px; }
.prompt { max-width: 420px; } .prompt code { display: inline-block; margin-top: .3rem; white-space: pre-wrap; }
.caution { border-left: 4px solid #d03f08; padding-left: .8rem; font-weight: 600; }
summary { cursor: pointer; margin-top: 2rem; color: var(--soft); } details td { font-size: .85rem; overflow-wrap: anywhere; }
</style>"""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of plain texts; numbers stand right."""

    def cell(tag: str, value: Any) -> str:
        text = str(value)
        number = text.rstrip("%").replace("\N{MINUS SIGN}", "-").replace(".", "", 1).lstrip("+-").isdigit()
        return f"<{tag} class='number'>{html.escape(text)}</{tag}>" if number else f"<{tag}>{html.escape(text)}</{tag}>"

    head = "<tr>" + "".join(cell("th", name) for name in header) + "</tr>" if header else ""
    return (
        "<table>" + head + "".join("<tr>" + "".join(cell("td", v) for v in row) + "</tr>" for row in rows) + "</table>"
    )


def _data_uri(image: Image.Image, longest: int = 672) -> str:
    """The image inside the page; large photographs are reduced, small ones kept pixel for pixel."""
    image = image.convert("RGB")
    if max(image.size) > longest:
        image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
