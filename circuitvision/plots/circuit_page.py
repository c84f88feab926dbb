"""A circuit graph as one HTML file that loads nothing: a slider for the number of edges, hovering, and the attention of the head that is clicked.

The file holds the graph as JSON, a style sheet and a script (``circuit_page.css`` and ``circuit_page.js`` beside this module), which draws as SVG; a
content security policy forbids it the network. Texts of the graph reach the page as text, never as markup. Colours follow the reader's scheme until
the button is pressed. Behind ``#`` the address takes ``theme=dark``, ``n=200`` and ``node=v.a0.h1``.

Attention is kept in 256 levels of each head's largest value, for one example.

Not covered: editing the circuit; graphs beyond some ten thousand edges, whose file is slow to open.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitvision.circuits.routes import is_link
from circuitvision.errors import InputError
from circuitvision.files import write_text
from circuitvision.findings_of_graphs import spoken
from circuitvision.plots import patches, style
from circuitvision.plots.circuits import Drawing, curve, drawing, same_tower, short, sign_words

if TYPE_CHECKING:
    import networkx as nx

    from circuitvision.circuits.node_attention import NodeAttention

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_EDGE = ("slot", "score", "weight", "se", "ci_low", "ci_high", "n", "inclusion", "verified", "effect_verified")
_LARGEST_PICTURE = 512


def write(
    graph: nx.MultiDiGraph,
    path: str | Path,
    *,
    n: int | None = None,
    share: float = 0.9,
    title: str | None = None,
    attention: NodeAttention | None = None,
    picture: Any = None,
    example: Any = None,
) -> Path:
    """Write the page, complete or not at all; returns the path. See :func:`circuitvision.plots.write_circuit`."""
    drawn = drawing(graph, n, share)
    if attention is None and (picture is not None or example is not None):
        raise InputError(
            "picture= and example= say what attention= is laid over; give it too (cv.circuits.attention_of)."
        )
    data = content(drawn, attention, picture, example)
    heading = drawn.lead if title is None else title
    return write_text(path, page(heading, drawn.note, data))


def content(drawn: Drawing, attention: NodeAttention | None, picture: Any, example: Any) -> dict[str, Any]:
    """All that the script draws, as JSON can hold it; ``edges`` are by size, the first ``count`` of which are shown at first."""
    graph, places = drawn.graph, drawn.places
    numbers = {node: number for number, node in enumerate(places.at)}
    links = [edge for edge in graph.edges(keys=True) if is_link(graph, edge)]
    nodes = [
        {
            "id": node,
            "name": spoken(graph, node),
            "short": short(graph, node),
            **{key: graph.nodes[node][key] for key in ("kind", "tower", "label", "score")},
            "x": round(x, 4),
            "y": round(y, 4),
        }
        for node, (x, y) in places.at.items()
    ]

    def listed(edge: tuple[str, str, str]) -> dict[str, Any]:
        corners = [[round(x, 3), round(y, 3)] for x, y in curve(places, edge, same_tower(graph, edge))]
        known = {key: graph.edges[edge][key] for key in _EDGE}
        return {"from": numbers[edge[0]], "to": numbers[edge[1]], **known, "line": corners}

    return {
        "nodes": nodes,
        "edges": [listed(edge) for edge in drawn.edges],
        "links": [listed(edge) for edge in links],
        "count": drawn.count,
        "height": places.height,
        "columns": [
            {"tower": one.tower, "left": one.left, "right": one.right, "rows": [[y, name] for y, name in one.rows.items()]} for one in places.columns
        ],
        "sign": sign_words(graph),
        "units": graph.graph["metric_units"],
        "about": {key: value for key, value in graph.graph.items() if key != "towers_json" and value not in ("", -1)},
        "attention": {} if attention is None else _maps(drawn, attention, example),
        "queries": {} if attention is None else attention.queries,
        "picture": "" if picture is None else _picture(picture),
    }  # fmt: skip


def _maps(drawn: Drawing, attention: NodeAttention, example: Any) -> dict[str, dict[str, Any]]:
    """Every head's map in bytes, 255 its largest value, by id; those of other graphs' heads are left out."""
    entry, found = attention.entries(example)[0], {}
    for number, node in enumerate(attention.axes["node"]):
        if node not in drawn.graph:
            continue
        grid = attention.grid(node, example).double().nan_to_num(0.0).numpy()
        largest = float(grid.max())
        levels = np.rint(255 * grid / largest if largest > 0 else grid * 0).clip(0, 255).astype(np.uint8)
        found[node] = {
            "rows": grid.shape[0],
            "columns": grid.shape[1],
            "largest": largest,
            "sum": float(grid.sum()),
            "extent": attention.extents[entry, number].tolist(),
            "levels": base64.b64encode(levels.tobytes()).decode(),
        }
    if not found:
        raise InputError("attention= is of another graph: none of its heads is a node of this one.")
    return found


def _picture(picture: Any) -> str:
    """A picture as an address that holds it, large ones reduced."""
    from PIL import Image

    image = Image.fromarray(patches.as_picture(picture))
    if max(image.size) > _LARGEST_PICTURE:
        image.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(heading: str, note: str, data: dict[str, Any]) -> str:
    """The whole page."""
    here = Path(__file__)
    css, script = (here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    # Inside a script element only "</" and "<!--" end what JSON may hold.
    embedded = json.dumps(data, allow_nan=False, ensure_ascii=True).replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(heading)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>:root {{ --for: {style.FOR}; --against: {style.AGAINST}; --font: {style.FONT}; }}\n{css}</style></head>\n<body>"
        f"<header><div><h1>{html.escape(heading)}</h1><p>{html.escape(note)}</p></div>"
        '<button id="theme" type="button">light / dark</button></header>\n'
        '<div id="controls"><label for="count">edges</label><input id="count" type="range" min="0" max="1000" step="1">'
        '<input id="number" type="number" min="0" aria-label="number of edges"><output id="said"></output></div>\n'
        '<div id="legend"></div><main><div id="chart"><svg id="circuit" role="img"></svg></div><aside id="panel"></aside></main>'
        '<div id="tip" hidden></div>\n'
        f'<script type="application/json" id="graph">{embedded}</script>\n<script>{script}</script></body></html>\n'
    )
