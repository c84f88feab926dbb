"""What the figures of a lens call things: layers, targets, units, the words that stand highest; and which row and position are meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError

if TYPE_CHECKING:
    from circuitvision.readout.lens.result import LensResult


def number(value: Any) -> str:
    """A value in three digits."""
    return f"{float(value):.3g}".replace("-", "\N{MINUS SIGN}")


def layer_name(layer: Any) -> str:
    """What a label of the first axis is called."""
    return f"layer {layer}" if isinstance(layer, int) else str(layer)


def unit(result: LensResult) -> str:
    """What the values are counted in."""
    return "model units" if result.columns == "actions" else result.measure


def short(text: str, length: int = 22) -> str:
    """A text cut to a length."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def tower_and_pass(result: LensResult) -> str:
    """The tower, and which pass of it."""
    return result.tower if result.step is None else f"{result.tower}, pass {result.step}"


def tower_in_pass(result: LensResult) -> str:
    """The same inside a sentence."""
    return f"{result.tower} tower" if result.step is None else f"{result.tower} tower in pass {result.step}"


def plain(piece: str) -> str:
    """A token without its tokenizer's marks."""
    return piece.replace("▁", "").replace("Ġ", "").replace("</w>", "").replace("\n", "⏎")


def target_name(result: LensResult, index: int) -> str:
    """What a target is called."""
    if "target" not in result.axes:
        return "highest" if index == 0 else f"rank {result.axes['rank'][index]}"
    label = result.axes["target"][index]
    name = result.names.get(str(label), str(label)) if isinstance(label, int) else str(label)
    return name.replace(" - ", " \N{MINUS SIGN} ")


def highest(result: LensResult, layer: int, row: int, at: int) -> list[str]:
    """The names of the five highest columns at a place."""
    return [plain(result.names.get(str(int(number)), str(int(number)))) for number in result.ids[layer, at, :5, row]]


def n_rows(result: LensResult) -> int:
    """How many rows a lens has."""
    return len(result.axes["example"])


def checked_row(result: LensResult, row: int | None) -> int:
    """A row, by its number (None: the first).

    Raises:
        InputError: there is no such row, or the lens has heads, which no view shows.
    """
    if "head" in result.axes:
        raise InputError(
            "Figures of a lens show one value per layer and position; read it at a site without heads. "
            "For heads see direct_attribution(…).plot(view='heads')."
        )
    return 0 if row is None else result.row_number(row)


def place_of(result: LensResult, position: int | str, row: int = 0) -> int:
    """The index of a position by its number, or of a row's ``"last"`` that is no padding; InputError if it is not there."""
    numbers = result.axes["position"]
    if position == "last" and position not in numbers:
        kinds = result.kinds[row] if result.kinds else [""] * len(numbers)
        return max((at for at, kind in enumerate(kinds) if kind != "padding"), default=len(numbers) - 1)
    if position not in numbers:
        raise InputError(f"There is no position {position!r}; this lens has {numbers[0]} to {numbers[-1]}, or 'last'.")
    return numbers.index(position)
