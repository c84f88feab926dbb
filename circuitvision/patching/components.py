"""The components of a game of interventions: what counts as one, how it is spelled, and the edits that change or hold it.

A component is one or several *places*: a site with the heads, positions or neurons of it that are meant. It may also be edits made by hand, which say
themselves what is done where. Both are values without a model's state, so that each coalition is a tuple of edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.writes import width_of
from circuitvision.model.names import component, head_name, is_component, site_of, spelled
from circuitvision.model.sites import SiteName
from circuitvision.patching.activation import matching_sites

_WHERE = ("site", "heads", "positions", "neurons", "steps")


@dataclass(frozen=True)
class Place:
    """A site, and which heads, positions, neurons and steps of it are meant (None: all)."""

    site: str
    heads: tuple[int, ...] | None = None
    positions: Any = None
    neurons: tuple[int, ...] | None = None
    steps: Any = None

    def replaced(self, model: Any, source: Any) -> Edit:
        """The edit that puts the source's value here. Neurons are coordinates of the site: an interchange in the span of their axes."""
        where = {"positions": self.positions, "steps": self.steps}
        if self.neurons is None:
            return edits.replace(self.site, source, heads=self.heads, **where)
        width = width_of(model, self.site)
        if width is None or not all(0 <= neuron < width for neuron in self.neurons):
            raise InputError(
                f"{self.site} has {width or 'no known number of'} neurons, so not all of {list(self.neurons)}."
            )
        return edits.project(self.site, torch.eye(width)[:, list(self.neurons)], source, heads=self.heads, **where)

    def ablated(self, model: Any, method: Any, **options: Any) -> Edit:
        """The edit that removes what is here, see :func:`circuitvision.edits.ablate`."""
        where = {"heads": self.heads, "positions": self.positions, "steps": self.steps, "neurons": self.neurons}
        return edits.ablate(self.site, method, **options, **where)


@dataclass(frozen=True)
class Component:
    """What is intact or corrupted as one."""

    name: str
    parts: tuple[Place | Edit, ...]

    @property
    def places(self) -> list[Place]:
        """The parts that are places."""
        return [part for part in self.parts if isinstance(part, Place)]

    def edited(self, of_place: Callable[[Place], Edit]) -> list[Edit]:
        """The edits of all parts: of a place the one made here, of an edit itself."""
        return [of_place(part) if isinstance(part, Place) else part for part in self.parts]


def components_of(model: Any, given: Any) -> list[Component]:
    """The components that a caller named, see :func:`circuitvision.patching.interactions`.

    Raises:
        InputError: fewer than two, a name twice, something that is no component.
        UnknownSiteError: a site that the model does not have.
    """
    if isinstance(given, str | Edit) or is_component(given) or not isinstance(given, Iterable):
        raise InputError("components is a list, or a mapping of names to components, with two at least.")
    named = given.items() if isinstance(given, Mapping) else ((None, one) for one in given)
    found = []
    for name, one in named:
        parts, own = _read(model, one)
        found.append(Component(own if name is None else str(name), tuple(merged(parts))))
    if len(found) < 2:
        raise InputError(f"Interactions are between components: give two at least, not {len(found)}.")
    names = [one.name for one in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(
            f"{twice[0]!r} is given twice; each component stands once (a mapping gives them names of your own)."
        )
    return found


def _read(model: Any, part: Any) -> tuple[list[Place | Edit], str]:
    """The parts of a component, and what it is called."""
    if isinstance(part, Edit):
        return [part], repr(part)
    if isinstance(part, Mapping):
        return _where(model, part)
    if is_component(part):
        return _spelled(model, part)
    if isinstance(part, str):
        return [Place(name) for name in matching_sites(model, part)], part
    if isinstance(part, Iterable):
        read = [_read(model, one) for one in part]
        if not read:
            raise InputError("A component of several parts is empty.")
        return [one for parts, _ in read for one in parts], " & ".join(name for _, name in read)
    raise InputError(
        f"{part!r:.80} is no component: a head, an MLP, a site, a mapping with a 'site', an edit, or a list of these."
    )


def _spelled(model: Any, part: Any) -> tuple[list[Place | Edit], str]:
    """A head, MLP, attention layer or neuron in any spelling."""
    node = component(part)
    if node.kind == "neuron":
        site, number = f"{node.tower}.blocks.{node.layer}.mlp.hook_post".removeprefix("."), None
    else:
        site, number = site_of(part)
    names = matching_sites(model, site)
    if len(names) != 1:
        raise InputError(f"{part!r} is of no site of this model, or of several: {', '.join(names) or 'none'}.")
    (name,) = names
    tower = SiteName.parse(name).tower
    if node.kind == "neuron":
        return [Place(name, neurons=(node.feature,))], spelled(part) if node.tower else f"{tower} {spelled(part)}"
    called = head_name(node.layer, node.head, tower) if node.kind == "head" else spelled(part)
    return [Place(name, heads=None if number is None else (number,))], called


def _where(model: Any, part: Mapping[str, Any]) -> tuple[list[Place | Edit], str]:
    """A place in words: ``{"site": …, "positions": …}``."""
    unknown = [key for key in part if key not in _WHERE]
    if unknown or "site" not in part:
        raise InputError(
            f"A component given as a mapping has a 'site' and may have {', '.join(_WHERE[1:])}; got {', '.join(map(str, part))}."
        )
    if is_component(part["site"]):
        places, name = _spelled(model, part["site"])
    else:
        name = str(part["site"])
        places = [Place(one) for one in matching_sites(model, name)]
    own = {key: part[key] for key in ("positions", "steps") if key in part}
    for key in ("heads", "neurons"):
        if part.get(key) is not None:
            own[key] = _numbers(part[key])
    where = [Place(**{**vars(one), **own}) for one in places if isinstance(one, Place)]
    said = ", ".join(f"{key} {part[key]!r:.40}" for key in _WHERE[1:] if part.get(key) is not None)
    return [*where], f"{name} at {said}" if said else name


def _numbers(given: Any) -> tuple[int, ...]:
    return (int(given),) if not isinstance(given, Iterable) else tuple(int(one) for one in given)


def merged(parts: Sequence[Any]) -> list[Any]:
    """Heads of one site, and neurons of one site, in one place."""
    found: list[Any] = []
    for part in parts:
        for number, other in enumerate(found):
            union = _union(other, part)
            if union is not None:
                found[number] = union
                break
        else:
            found.append(part)
    return found


def _union(one: Place | Edit, other: Place | Edit) -> Place | None:
    if not (isinstance(one, Place) and isinstance(other, Place)):
        return None
    if one.site != other.site or one.positions is not other.positions or one.steps is not other.steps:
        return None
    for key, rest in (("heads", "neurons"), ("neurons", "heads")):
        mine, theirs = getattr(one, key), getattr(other, key)
        if mine is not None and theirs is not None and getattr(one, rest) is getattr(other, rest) is None:
            return Place(**{**vars(one), key: tuple(dict.fromkeys((*mine, *theirs)))})
    return None
