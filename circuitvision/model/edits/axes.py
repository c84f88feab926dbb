"""The axes of a sweep, checked against what its edits carry: a grid whose labels are in another order names the wrong heads.

An axis called layer, head, position, query, key, neuron, step, tower or site says something that an edit itself knows. Where an edit and its label
disagree the sweep is refused, with the order that fits. Axes of other names, labels that are no numbers (``"3 red"``), and edits that name nothing
of the kind (all heads) are taken as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError
from circuitvision.model.edits.attention import AttentionEdit
from circuitvision.model.edits.base import Edit
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.edits.binding import CompiledEdits, EditCompiler

_NUMBERS = ("layer", "head", "position", "query", "key", "neuron", "step")
_KINDS = (*_NUMBERS, "tower", "site")
Facts = Mapping[str, set[Any] | None]


def check_axes(binder: EditCompiler, axes: Mapping[str, Sequence[Any]], groups: Sequence[CompiledEdits]) -> None:
    """Raise InputError if the labels of a grid contradict the groups of edits that fill it, the last axis varying fastest."""
    kinds = {name: _kind(name) for name in axes}
    known = {name: kind for name, kind in kinds.items() if kind}
    if not known:
        return
    facts = [_facts(binder, group) for group in groups]
    number = _contradicted(axes, known, facts)
    if number is None:
        return
    cell = dict(zip(axes, list(itertools.product(*axes.values()))[number], strict=True))
    said = ", ".join(f"{name} {cell[name]}" for name in known)
    carried = ", ".join(
        f"{name} {' or '.join(str(value) for value in sorted(found, key=str) if not (isinstance(value, int) and value < 0))}"
        for name, kind in known.items()
        if (found := facts[number][kind])
    )
    orders = itertools.permutations(axes)
    fits = [order for order in orders if _contradicted({name: axes[name] for name in order}, known, facts) is None]
    fix = f"axes in the order {', '.join(fits[0])} fit" if fits else "no order of these axes fits"
    raise InputError(
        f"The axes call edit {number} {said}, and it is of {carried}: {fix}. The last axis varies fastest; "
        "an axis that counts something else needs another name."
    )


def _contradicted(axes: Mapping[str, Sequence[Any]], known: Mapping[str, str], facts: Sequence[Facts]) -> int | None:
    """The first cell whose labels are not what its edits carry."""
    for number, labels in enumerate(itertools.product(*axes.values())):
        for name, label in zip(axes, labels, strict=True):
            if name in known and not _agrees(known[name], label, facts[number][known[name]]):
                return number
    return None


def _kind(axis: str) -> str:
    """What an axis of this name says of an edit; "" if nothing that can be checked."""
    word = axis.lower()
    return next((kind for kind in _KINDS if word in (kind, f"{kind}s")), "query" if word == "queries" else "")


def _agrees(kind: str, label: Any, carried: set[Any] | None) -> bool:
    if not carried:
        return True
    if kind in _NUMBERS:
        text = str(label)
        whole = not isinstance(label, bool) and text.lstrip("-").isdigit()
        return not whole or int(text) in carried
    if kind == "site":
        return any(name == label or name.endswith((f".{label}", f"hook_{label}")) for name in carried)
    return label in carried


def _facts(binder: EditCompiler, group: CompiledEdits) -> Facts:
    """What the edits of a group name, by kind; None where one of them names all there is. Negative numbers stand beside what they count to."""
    found: dict[str, set[Any] | None] = {kind: set() for kind in _KINDS}
    for edit in group.group:
        for kind, values in _named(binder, edit).items():
            here = found[kind]
            found[kind] = None if values is None or here is None else here | values
    return found


def _named(binder: EditCompiler, edit: Edit) -> dict[str, set[Any] | None]:
    names = edit.sites(binder.model)
    parsed = [SiteName.parse(name) for name in names]
    layers = {site.layer for site in parsed if site.layer is not None}
    window = binder.windows.of(names[0])
    length = None if window is None else window.prompt
    towers = {site.tower for site in parsed}
    positions = _counted(edit.positions.ints, length) if edit.positions.kind == "ints" else None
    found: dict[str, set[Any] | None] = {
        "layer": layers | {layer - binder.model.towers[site.tower].cfg.n_layers for site in parsed
                           if (layer := site.layer) is not None},
        "tower": set(towers),
        "site": set(names),
        "head": None if edit.heads is None else _counted(edit.heads, binder._n_heads(names[0])),
        "position": positions,
        "query": positions,
        "step": set(edit.steps.numbers) if edit.steps.kind == "numbers" else None,
        "neuron": set(getattr(edit, "neurons", None) or ()) or None,
        "key": None,
    }  # fmt: skip
    if isinstance(edit, AttentionEdit):
        found["key"] = set(edit.keys.ints) if edit.keys.kind == "ints" else None
    return found


def _counted(numbers: Sequence[int], count: int | None) -> set[Any]:
    """Numbers, and the same counted from the other end."""
    if count is None:
        return set(numbers)
    return {form for number in numbers for form in (number, number % count, number % count - count)}
