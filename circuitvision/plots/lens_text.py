"""What the figures of a lens call things: layers, targets, units, the words that stand highest; and which example and position are meant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError
from circuitvision.plots import kit
from circuitvision.readout.patch_coords import entry_of

if TYPE_CHECKING:
    from circuitvision.readout.lens.result import LensResult


def unit(result: LensResult) -> str:
    """What the values are counted in."""
    return "model units" if result.columns == "actions" else result.measure


def short(text: str, length: int = 22) -> str:
    """A text cut to a length."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def tower_and_pass(result: LensResult, noun: bool = False) -> str:
    """The tower, and which pass of it; ``noun``: as it stands inside a sentence."""
    if noun:
        return f"{result.tower} tower" if result.step is None else f"{result.tower} tower in pass {result.step}"
    return result.tower if result.step is None else f"{result.tower}, pass {result.step}"


def plain(piece: str) -> str:
    """A token without its tokenizer's marks."""
    return piece.replace("▁", "").replace("Ġ", "").replace("</w>", "").replace("\n", "⏎")


def target_name(result: LensResult, index: int) -> str:
    """What a target is called."""
    if "target" not in result.axes:
        return "highest" if index == 0 else f"rank {result.axes['rank'][index]}"
    label = result.axes["target"][index]
    name = result.names.get(str(label), str(label)) if isinstance(label, int) else str(label)
    return name.replace(" - ", f" {kit.MINUS} ")


def highest(result: LensResult, layer: int, entry: int, at: int) -> list[str]:
    """The names of the five highest columns at a place."""
    return [plain(result.names.get(str(int(number)), str(int(number)))) for number in result.ids[layer, at, :5, entry]]


def layers(result: LensResult, most: int | None = None) -> list[str | int]:
    """The labels of the first axis; of more than ``most`` as many evenly spaced ones, both ends among them."""
    labels = next(iter(result.axes.values()))
    if most is None or len(labels) <= most:
        return list(labels)
    return [labels[round(i * (len(labels) - 1) / (most - 1))] for i in range(most)]


def entries(result: LensResult, example: Any, image: int | None, tile: int | None) -> list[int]:
    """Where examples stand on their axis (one, several, or None: all), of one image or tile alone where it is named."""
    asked = result.examples if example is None else example if isinstance(example, list | tuple | range) else [example]
    if not asked:
        raise InputError("Name at least one example.")
    if image is None and tile is None:
        return [entry for one in asked for entry in result.entries(one)]
    return [entry_of(result, one, image, tile) for one in asked]


def margin(result: LensResult, layer: int, position: int, entry: int) -> float:
    """How far the highest column of a lens by rank is above the second (of probabilities the ratio); NaN where a single one was kept."""
    best = result.values[layer, position, :, entry].double()
    if "rank" not in result.axes or len(best) < 2:
        return math.nan
    return float(best[0] / best[1]) if result.measure == "prob" else float(best[0] - best[1])


def check_heads(result: LensResult) -> None:
    """InputError for a lens with heads, which no view shows."""
    if "head" in result.axes:
        raise InputError(
            "Figures of a lens show one value per layer and position; read it at a site without heads. "
            "For heads see direct_attribution(…).plot(view='heads')."
        )


def place_of(result: LensResult, position: int | str, entry: int = 0) -> int:
    """The index of a position by its label, or of a prompt's ``"last"`` that is no padding; InputError if it is not there."""
    labels = result.axes["position"]
    if position == "last" and "last" not in labels:
        kinds = result.kinds[entry] if result.kinds else [""] * len(labels)
        return max((at for at, kind in enumerate(kinds) if kind != "padding"), default=len(labels) - 1)
    if position not in labels:
        raise InputError(f"There is no position {position!r}; this lens has {labels[0]} to {labels[-1]}, or 'last'.")
    return labels.index(position)


def position_name(result: LensResult, entry: int, at: int) -> str:
    """What stands at a position: its word, or its label (a number, or the name of a region)."""
    word = plain(result.words[entry][at]) if result.words else ""
    label = result.axes["position"][at]
    return word or (f"position {label}" if isinstance(label, int) else str(label))
