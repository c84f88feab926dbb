"""Figures of attributions: bars of the strongest terms, what a head takes from where, scores of heads by layer, and pairs of terms of two towers.

Orange adds to the direction, blue takes from it. Bars are means over examples with standard errors; what is not shown is gathered in one bar, so
that the bars add up to the total in the subtitle.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitvision.errors import InputError
from circuitvision.model.names import Component, component, head_name, is_component, spelled
from circuitvision.plots import _check_keywords, kit, patches, style
from circuitvision.plots.lens_text import plain
from circuitvision.readout.patch_coords import extent_of, grid_of, picture_of

if TYPE_CHECKING:
    from circuitvision.readout.attribution.bilinear import BilinearAttribution
    from circuitvision.readout.attribution.direct import Attribution, SourceAttribution
    from circuitvision.readout.attribution.increase import LogProbIncrease, SourceIncrease
    from circuitvision.readout.ranks import Ranking


def attribution(result: Attribution, view: str = "bars", **keywords: Any) -> kit.Figure:
    """A figure of one attribution: ``view`` is "bars" or "heads" (see the functions of these names for keywords).

    Raises:
        InputError: no such view, a keyword that it does not take, or heads of an attribution that does not split them.
    """
    views: dict[str, Any] = {"bars": bars, "heads": heads}
    if view not in views:
        raise InputError(f"Unknown view {view!r}; choose one of {', '.join(views)}.")
    _check_keywords(views[view], f"{type(result).__name__} in the view {view!r}", keywords)
    return views[view](result, **keywords)


def heads(result: Attribution, example: Any = None, title: str | None = None) -> kit.Figure:
    """Layers × heads of direct attribution, of one example or the mean over examples.

    Raises:
        InputError: no such example, or an attribution by component, which has no heads.
    """
    shown = result if example is None else result.take(result.entries(example))
    terms = [component(term) if is_component(term) else None for term in result.axes["term"]]
    found = {
        (term.layer, term.head): value
        for term, value in zip(terms, shown.mean().tolist(), strict=True)
        if term is not None and term.kind == "head"
    }
    if not found:
        raise InputError("This attribution does not tell heads apart; make it with by='head'.")
    layers, across = (sorted({place[axis] for place in found}) for axis in (0, 1))
    grid = torch.tensor([[found.get((layer, head), math.nan) for head in across] for layer in layers])
    direction = kit.direction(result.direction)
    title = title or kit.nothing_found(grid, "head", f"adds anything to {direction}")
    if title is None:
        best = max(found, key=lambda place: abs(found[place]) if not math.isnan(found[place]) else -1.0)
        verb = "adds" if found[best] >= 0 else "takes"
        whole = float(shown.mean(quantity="total"))
        title = style.titled(
            f"{head_name(*best, result.tower)} {verb} most of all heads: {kit.signed(found[best])} of {direction}",
            f"all terms, MLPs and biases included, add up to {kit.signed(whole)}", kit.over(result, example),
        )  # fmt: skip
    return kit.grid(grid, ("layer", layers), ("head", across), title, unit="direct")


def bars(result: Attribution, count: int = 14, title: str | None = None) -> kit.Figure:
    """The ``count`` strongest terms as bars, the rest as one; mean over examples, whiskers are standard errors."""
    drawn, examples = result.gathered(count), len(result.examples)
    names, heights, errors = drawn.axes["term"], drawn.mean().tolist(), drawn.error().tolist()
    total = float(result.mean(quantity="total"))
    direction = kit.direction(result.direction)
    title = title or kit.nothing_found(result.mean(), "term", f"adds anything to {direction}")
    if title is None:
        part = heights[0] / total if total else 0.0
        share = f", {kit.percent(part)} of it" if 0 < part < 10 else ""
        verb = "adds" if heights[0] >= 0 else "takes"
        title = f"{html.escape(names[0])} {verb} most: {kit.signed(heights[0])} of {direction}{share}"
    cap = " before the soft cap" if result.is_capped else ""
    under = f" ({kit.signed(float(result.mean(quantity='capped')))} under it)" if cap else ""
    over = f"mean of {examples} examples ± standard error" if examples > 1 else ""
    heading = style.titled(title, f"all terms add up to {kit.signed(total)}{cap}{under}", over)
    return kit.bars(
        [html.escape(name) for name in names], heights, heading, f"{direction}, directly{cap}", errors=errors
    )


def ranked(result: Ranking, count: int = 14, title: str | None = None) -> kit.Figure:
    """The first ``count`` components of a ranking as bars; those that stand out (mean + 2 sd) are counted in the title."""
    names = [html.escape(name) for name in result.top(count)]
    scores = result.scores
    errors = result.error() if "example" in result.axes else torch.full_like(scores, math.nan)
    heights, spread = scores[:count].tolist(), errors[:count].nan_to_num(0.0).tolist()
    finite = bool(torch.isfinite(scores).any())
    outstanding = result.above_threshold() if finite and len(scores) > 1 else []
    title = title or kit.nothing_found(scores, "component", "has a score other than 0")
    title = title or f"{names[0]} comes first: {kit.signed(heights[0])}"
    note = f"{len(outstanding)} of {len(scores)} components at or beyond mean + 2 sd"
    return kit.bars(names, heights, style.titled(title, note), "score", errors=spread)


def sources(
    result: SourceAttribution | SourceIncrease,
    example: Any = None,
    heads: Sequence[Component] | None = None,
    picture: Any = None,
    box: patches.Box | None = None,
    image: int | None = None,
    title: str | None = None,
    tile: int | None = None,
) -> kit.Figure:
    """What the strongest heads (or those given, as ``(layer, head)`` or ``"L1H3"``) take from each image patch and word of one example.

    ``picture`` is ``[height width 3]`` or a PIL image; ``box`` (left, top, right, bottom) in its pixels or as shares of it. ``None`` is the first
    example, image and tile.

    Raises:
        InputError: no such example, image or tile, or no source position that is a patch.
    """
    if not bool((result.places[result.entries(example)[0], :, 2] >= 0).any()):
        raise InputError("No source position of this example is an image patch; use to_frame() for words.")
    at = picture_of(result, example, image, tile)
    shown = result.strongest(entry=at.entry) if heads is None else _given(heads, result)
    maps = [grid_of(result, result.taken(*head, at.entry), at) for head in shown]
    pixels = None if picture is None else patches.as_picture(picture)
    first = int(pixels is not None)
    headings = ["image"] * first + [head_name(*head, result.tower) for head in shown]
    figure = kit.panels(1, len(headings), column_titles=headings, horizontal_spacing=0.02)
    options: dict[str, Any] = {"box": patches.as_shares(box, pixels), "extent": extent_of(result, at)}
    if pixels is not None:
        patches.draw(figure, 1, 1, picture=pixels, **options)
    for column, (grid, head) in enumerate(zip(maps, shown, strict=True), start=1 + first):
        patches.draw(figure, 1, column, grid, **options)
        _add_word(figure, result, result.taken(*head, at.entry), at.entry, column)
    title = title or style.titled(_source_found(result, shown[0], at.entry), kit.which(result, at.entry))
    limit, margin = kit.largest(*maps), {"l": 10, "r": 40, "b": 50}
    return patches.finish(
        figure, title, int(90 + 640 / len(headings)), style.diverging(), -limit, limit, kit.direction(result.direction), above=26, margin=margin
    )  # fmt: skip


def _given(heads: Sequence[Component], result: SourceAttribution | SourceIncrease) -> list[tuple[int, int]]:
    """Heads as (layer, head); InputError for one that the result does not hold."""
    found = [component(head) for head in ([heads] if is_component(heads) else heads)]
    for node in found:
        there = (
            node.tower in ("", result.tower) and node.layer in result.axes["layer"] and node.head in result.axes["head"]
        )
        if node.kind != "head" or not there:
            raise InputError(f"{spelled(node)} is not among the heads of this result, of the {result.tower} tower.")
    return [(node.layer, node.head) for node in found]


def _source_found(result: SourceAttribution | SourceIncrease, head: tuple[int, int], entry: int) -> str:
    direction, taken, name = (
        kit.direction(result.direction),
        result.taken(*head, entry),
        head_name(*head, result.tower),
    )
    nothing = kit.nothing_found(taken, "source", f"of {name} adds anything to {direction}")
    if nothing is not None:
        return nothing
    if hasattr(result, "answer"):
        # Increases do not add up over sources: the strongest is named instead of a sum.
        at = int(taken.abs().nan_to_num(-1.0).argmax())
        patch = int(result.places[entry, at, 2]) >= 0
        source = "an image patch" if patch else kit.escaped(repr(result.words[entry][at]))
        return f"What {name} takes from {source} moves {direction} by {kit.signed(float(taken[at]))} nats"
    total, image = result.sums(*head, entry)
    part = f"{kit.percent(image / total)} of it from image patches" if total else "nothing"
    return f"{name} adds {kit.signed(total)} to {direction}, {part}"


def _add_word(
    figure: kit.Figure, result: SourceAttribution | SourceIncrease, taken: torch.Tensor, entry: int, column: int
) -> None:
    """Below a map, the word the head takes most from."""
    words = (result.places[entry, :, 2] < 0).nonzero().flatten()
    if len(words):
        best = int(words[taken[words].abs().nan_to_num(-1.0).argmax()])
        word = plain(result.words[entry][best]).strip() if result.words else ""
        text = f"{kit.escaped(repr(word)) if word else f'position {best}'} {kit.signed(float(taken[best]))}"
        patches.below(figure, text, 1, column)


def increase(result: LogProbIncrease, example: Any = None, title: str | None = None) -> kit.Figure:
    """Layers × heads (parts, or the strongest neurons) of log-probability increase, of one example or the mean over examples."""
    inner = list(result.axes)[1]
    values = (result if example is None else result.take(result.entries(example))).mean()
    labels = result.axes[inner]
    if inner == "neuron" and values.shape[1] > 24:
        keep = values.abs().nan_to_num(-1.0).max(0).values.argsort(descending=True)[:24].sort().values
        values, labels = values[:, keep], [labels[index] for index in keep.tolist()]
    best = divmod(int(values.abs().nan_to_num(-1.0).argmax()), values.shape[1])
    answer = f"log p({html.escape(result.answer)})"
    title = title or kit.nothing_found(values, inner, f"moves {answer}")
    where = f"{inner} {labels[best[1]]} of layer {result.axes['layer'][best[0]]}"
    title = title or f"{where} moves {answer} most: {kit.signed(float(values[best]))} nats"
    return kit.grid(values, ("layer", result.axes["layer"]), (inner, labels), title, unit="nats")


def bilinear(result: BilinearAttribution, example: Any = None, text: int = 0, title: str | None = None) -> kit.Figure:
    """Terms of the image tower × terms of the text tower for one image (``example``) and text, or terms × prompts where the texts are not split.

    Raises:
        InputError: no such example or text.
    """
    entry, texts = result.entries(example)[0], result.axes["text"]
    if text not in range(len(texts)):
        raise InputError(f"There is no text {text}; this result has {len(texts)}, counted from 0.")
    whole = len(result.axes["text_term"]) == 1
    values = (result.values[:, 0, :, entry] if whole else result.values[:, :, text, entry]).double()
    across, name = (texts, "prompt") if whole else (result.axes["text_term"], "text term")
    best = divmod(int(values.abs().nan_to_num(-1.0).argmax()), values.shape[1])
    title = title or kit.nothing_found(values, "term" if whole else "pair of terms", "adds anything")
    if title is None:
        first, second = result.axes["image_term"][best[0]], html.escape(str(across[best[1]]))
        value = kit.signed(float(values[best]))
        said = f"{first} with {second} adds most: {value} of {kit.signed(float(result.total[text, entry]))}"
        said = f"{first} moves {second!r} most: {value}" if whole else said
        prompt = "" if whole else f"text {kit.escaped(repr(str(texts[text])))} (text= shows another)"
        title = style.titled(said, kit.which(result, entry), prompt)
    return kit.grid(values, ("image term", result.axes["image_term"]), (name, across), title, unit="logit", listed=True)
