"""Maps of relevance, beside the picture they are about.

A figure takes one result or several of one kind, side by side. Maps of different methods have different units, so each is coloured by its own
largest absolute value, written below it: compare where they are strong, not how strong they are.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.plots import kit, patches, style
from circuitvision.readout.patch_coords import picture_of

if TYPE_CHECKING:
    from circuitvision.readout.relevance.result import Relevance

_PANEL = 210
_Which = tuple[Any, int | None, int | None]
"""The example, image and tile of a map."""


def relevance(
    result: Relevance | Sequence[Relevance],
    *,
    picture: Any = None,
    example: Any = None,
    image: int | None = None,
    tile: int | None = None,
    box: Any = None,
    beside: Relevance | Sequence[Relevance] = (),
    title: str | None = None,
) -> kit.Figure:
    """Maps over the patches (or pixels) of one example or several, a column per result; words as bars below.

    Args:
        result, beside: the results shown.
        picture: the picture ``[height width 3]`` of levels 0 … 255 (one per example), shown first and laid under the maps.
        example: the example (None: the first), or several, one below the other.
        image, tile: which image and tile of the example; None: the first.
        box: the object's box (left, top, right, bottom) in pixels of the picture or as shares of it (one per example), drawn over every panel.

    Raises:
        InputError: another number of pictures or boxes than of examples, a box in pixels without a picture, no such example, something that is no
        relevance of the same examples.
    """
    results = together(result, beside, "Relevance")
    several = isinstance(example, list | tuple | range)
    examples = list(example) if several else [example]
    pictures = [
        None if one is None else patches.as_picture(one) for one in _each(picture, examples, several, "picture")
    ]
    boxes = _each(box, examples, several, "box")
    boxes = [patches.as_shares(own, one) for own, one in zip(boxes, pictures, strict=True)]
    first = results[0].entries(examples[0])[0]
    for one, label in itertools.product(results, examples):
        one.entries(label)  # raises if there is none
    if not any(_has_patches(one, one.entries(examples[0])[0]) for one in results):
        return _words_alone(results, first, title)
    which: list[_Which] = [(label, image, tile) for label in examples]
    figure, column, with_words = _panels(results, len(examples), first, pictures[0] is not None)
    for row, (place, pixels, own) in enumerate(zip(which, pictures, boxes, strict=True), start=1):
        if pixels is not None:
            patches.draw(figure, row, 1, picture=pixels, box=own, color="#ffffff")
        for number, found in enumerate(results, start=column):
            _add_map(figure, found, place, pixels, own, row, number)
            if with_words:
                _add_words(figure, found, first, len(examples) + 1, number)
    lead = _found(results, which, boxes) if title is None else title
    heading = style.titled(lead, _legend(results), "" if several else kit.which(results[0], first))
    words = max(len(_words(one, first)[0]) for one in results) if with_words else 0
    shown = len(results) + (pictures[0] is not None)
    height = 60 + len(examples) * (min(_PANEL, 900 // shown) + 40) + (60 + 20 * words if words else 0)
    style.layout(figure, heading, height, above=44 if shown <= 3 else 66, margin={"l": 20, "b": 40}, showlegend=False)
    for number in range(1, len(examples) + 1):
        figure.update_xaxes(visible=False, row=number)
        figure.update_yaxes(visible=False, row=number)
    return figure


# -- maps ----------------------------------------------------------------------------------------------------------------------------------


def _panels(results: Sequence[Relevance], rows: int, entry: int, pictured: bool) -> tuple[kit.Figure, int, bool]:
    """The empty figure, the column of the first map, and whether there is a line of words below the maps."""
    words = max(len(_words(one, entry)[0]) for one in results)
    with_words, count = rows == 1 and words > 0, len(results) + pictured
    heights = [_PANEL] * rows + ([20 * words] if with_words else [])
    figure = kit.panels(
        rows=len(heights),
        columns=count,
        column_titles=["picture"] * pictured + [_heading(one, count) for one in results],
        row_heights=heights,
        horizontal_spacing=0.1 / count if with_words else 0.015,
        vertical_spacing=(0.09 if with_words else 0.2 / rows) if len(heights) > 1 else 0,
    )
    figure.update_annotations(font={"size": 12})
    return figure, 2 if pictured else 1, with_words


def _add_map(
    figure: kit.Figure, found: Relevance, which: _Which, picture: Any, box: patches.Box | None, row: int, column: int
) -> None:
    grid, entry = found.on_image(*which), picture_of(found, *which).entry
    limit = _limit(found, entry)
    patches.below(figure, f"full colour: ±{limit:.2g}{_undrawn(found, entry)}", row, column, style.TINY)
    # A grey picture leaves the colours to the map.
    pale = None if picture is None else (0.35 * picture.mean(-1, keepdims=True).repeat(3, -1) + 159).astype(np.uint8)
    patches.draw(
        figure, row, column, grid, pale, box=box, extent=found.extent(*which), color=style.AGAINST if pale is None else "#111111", opacity=0.75,
        unit=str(found.provenance.get("metric_units") or ""), colorscale=style.diverging(), zmin=-limit, zmax=limit, showscale=False,
    )  # fmt: skip


def _limit(found: Relevance, entry: int) -> float:
    """The largest absolute value of one example that is drawn, as patch or word: what full colour stands for."""
    if found.of_pixels:
        return max(float(found.values[..., entry].abs().nan_to_num(0.0).max()), 1e-12)
    drawn = found.per_position[:, entry][found.places[entry, :, 0] >= 0].abs().nan_to_num(0.0).tolist()
    return max([*drawn, *(abs(value) for value in _words(found, entry)[1]), 1e-12])


def _undrawn(found: Relevance, entry: int) -> str:
    """The strongest position that is neither patch nor word (a class token, a register), where it is stronger than all that is drawn."""
    if found.of_pixels or not found.labels:
        return ""
    values = found.per_position[:, entry].masked_fill(found.places[entry, :, 0] >= 0, 0.0).nan_to_num(0.0)
    at = int(values.abs().argmax())
    if abs(float(values[at])) <= _limit(found, entry):
        return ""
    return f"<br>not drawn: {kit.escaped(found.labels[entry][at])} {kit.number(values[at], 2)}"


def _has_patches(found: Relevance, entry: int) -> bool:
    return bool((found.places[entry, :, 2] >= 0).any())


def _words(found: Relevance, entry: int) -> tuple[list[str], list[float]]:
    """Text pieces that are no patch, with their values; none for towers that read images alone."""
    if found.of_pixels:
        return [], []
    values, labels = found.per_position[:, entry], found.labels[entry]
    text = (found.places[entry, :, 0] < 0) & ~values.isnan()
    shown = [at for at in text.nonzero().flatten().tolist() if not labels[at].startswith("[")]
    return [labels[at].strip("▁Ġ ") or "·" for at in shown], values[shown].tolist()


def _add_words(figure: kit.Figure, found: Relevance, entry: int, row: int, column: int) -> None:
    words, values = _words(found, entry)
    limit = _limit(found, entry)
    kit.add_bars(figure, [kit.escaped(word) for word in words], values, row=row, column=column)
    low = -limit if min(values, default=0.0) < -0.05 * limit else -0.03 * limit
    figure.update_xaxes(range=[low, 1.03 * limit], visible=False, row=row, col=column)


def _words_alone(results: Sequence[Relevance], entry: int, title: str | None) -> kit.Figure:
    """Bars of words, a panel per result, where nothing is over an image."""
    figure = kit.panels(1, len(results), column_titles=[_heading(one, len(results)) for one in results])
    figure.update_annotations(font={"size": 12})
    for column, found in enumerate(results, start=1):
        _add_words(figure, found, entry, 1, column)
    words, values = _words(results[0], entry)
    best = max(range(len(words)), key=lambda number: abs(values[number])) if words else 0
    lead = f"“{kit.escaped(words[best])}” matters most to {_metric(results[0])}" if words else "No word has a value"
    heading = style.titled(title or lead, _legend(results))
    style.layout(figure, heading, 40 + 24 * max(len(words), 1), above=40, margin={"l": 70, "b": 20}, showlegend=False)
    return figure


def _found(results: Sequence[Relevance], which: Sequence[_Which], boxes: Sequence[patches.Box | None]) -> str:
    """What the maps say: whether they peak on the object, or where the first one peaks."""
    lead = results[0]
    if any(box is None for box in boxes):
        noun = "pixel" if lead.of_pixels else "patch"
        return str(findings.stands_out(lead.on_image(*which[0]), _short(lead.method), noun, _metric(lead)))
    peaks = [[one.peak_in(box, *place) for place, box in zip(which, boxes, strict=True) if box] for one in results]
    hits, chances = zip(*itertools.chain(*peaks), strict=True)
    chance = sum(chances) / len(chances)
    told = findings.on_object(_short(lead.method), sum(hits), len(hits), chance)
    never = [name for name, own in zip(names_of(results), peaks, strict=True) if not any(hit for hit, _ in own)]
    but = (
        f"; {' and '.join(never)} {'do' if len(never) > 1 else 'does'} not" if told.holds and 0 < len(never) < 3 else ""
    )
    return f"{told}{but} (chance {kit.percent(chance)})"


def _legend(results: Sequence[Relevance]) -> str:
    unit = str(results[0].provenance.get("metric_units") or "")
    parts = [f"{_metric(results[0])}{f', {kit.escaped(unit)}' if unit else ''}"]
    parts.append(
        f"<span style='color:{style.FOR}'>supports it</span>, <span style='color:{style.AGAINST}'>works against it</span>"
    )
    return "; ".join(parts)


def _heading(found: Relevance, panels: int) -> str:
    """The method, its settings smaller below, broken where a panel ends."""
    name, bracket, more = found.method.partition(" (")
    wide = [textwrap.wrap(part, max(12, letters // panels)) for part, letters in ((name, 120), (more.rstrip(")"), 140))]
    lines = [[kit.escaped(line) for line in part] for part in wide]
    return f"{'<br>'.join(lines[0])}<br><span style='font-size:{style.TINY}px'>{'<br>'.join(lines[1]) if bracket else ' '}</span>"


def _short(method: str) -> str:
    """The method without its settings, with a capital letter."""
    name = kit.escaped(method.partition(" (")[0])
    return name[:1].upper() + name[1:]


def together(result: Any, beside: Any, kind: str) -> list[Any]:
    """The results that one figure compares; InputError if one is of another kind."""
    parts = [[*one] if isinstance(one, Sequence) else [one] for one in (result, beside)]
    found = [*parts[0], *parts[1]]
    for one in found:
        if kind not in {cls.__name__ for cls in type(one).__mro__}:
            raise InputError(f"This figure compares results of the kind {kind}; {type(one).__name__} is none.")
    return found


def names_of(results: Sequence[Any]) -> list[str]:
    """Short names of the methods; whole ones where short ones are shared."""
    short = [_short(one.method) for one in results]
    whole = [kit.escaped(one.method[:1].upper() + one.method[1:]) for one in results]
    found = [one if short.count(one) == 1 else more for one, more in zip(short, whole, strict=True)]
    return [name if found.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(found, start=1)]


def _metric(found: Relevance) -> str:
    return kit.escaped(str(found.provenance.get("metric") or "the metric"))


def _each(given: Any, examples: Sequence[Any], several: bool, name: str) -> list[Any]:
    """One of these per example; InputError for another number of them."""
    if given is None:
        return [None] * len(examples)
    found = list(given) if several else [given]
    if len(found) != len(examples):
        raise InputError(f"Give one {name} per example: there are {len(examples)} examples and {len(found)} of them.")
    return found
