"""The cells of a patching grid: every combination of the labels of some axes, and the edits that patch it.

Axes: ``layer``, ``site``, ``head``, ``position``, ``region``, ``neurons``, ``step``, and ``tower`` where sites of several towers match. What is no
axis is patched whole: all heads, all positions, every pass. A ``window`` makes a layer's cell stand for several layers patched together; the label
stays the layer's. A step is a pass of a site's tower in a run of several: a denoising step of an action tower, 0 of what runs once before them.

Not covered: tokens said behind the prompt of a generation, which differ from run to run.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.edits.values import Steps
from circuitvision.model.run_functions import per_pass
from circuitvision.model.sites import SiteName

AXES = ("layer", "site", "head", "position", "region", "neurons", "step")
ALL = "all"
WINDOWS = ("up to", "from")
_BLOCK_SITE = re.compile(r"(?P<tower>\w+)\.blocks\.(?P<layer>\d+)\.(?P<leaf>.+)")


@dataclass(frozen=True)
class Cell:
    """One cell: its place in the result, the sites patched together, and which of their entries (None: all)."""

    index: tuple[int, ...]
    sites: tuple[str, ...]
    head: int | None = None
    positions: Any = None
    basis: Tensor | None = None
    """Unit vectors of the coordinates ``[width neuron]``: an interchange in their span is one of those coordinates."""
    steps: Steps | None = None

    def patch(self, sources: Mapping[str, Any], dead: Sequence[str] = ()) -> tuple[edits.Edit, ...]:
        """The edits that give its entries the values of the sources, at the sites that reach the output; a list of values is one for each pass."""
        return tuple(edit for site in self.sites if site not in dead for edit in self._one(site, sources[site]))

    def _one(self, site: str, source: Any) -> list[edits.Edit]:
        if isinstance(source, list):
            return per_pass(self._edit(site, source[0]), {site: source})
        return [self._edit(site, source)]

    def _edit(self, site: str, source: Any) -> edits.Edit:
        where: dict[str, Any] = {"heads": self.head, "positions": self.positions, "steps": self.steps}
        if self.basis is None:
            return edits.replace(site, source, **where)
        return edits.project(site, self.basis, source, **where)


@dataclass(frozen=True)
class Grid:
    """What is patched: sites, the axes of the result, and what the axes ``region``, ``neurons`` and ``step`` hold.

    ``regions`` maps labels to positions in any spelling; ``neurons`` maps labels to coordinates of the sites' last axis, which is ``width`` wide.
    ``steps`` maps labels to passes.
    ``window`` is 1, a number of layers around each (the label's layer in the middle, or of an even number the first of the two), ``"up to"`` or
    ``"from"`` the layer.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]
    regions: Mapping[str, Any] = field(default_factory=dict)
    neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    width: int = 0
    window: int | str = 1
    steps: Mapping[Any, Steps] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What the sites have in common: ``attn.hook_z`` of several blocks, or the one name."""
        return ", ".join(sorted({_leaf(name) for name in self.names}))

    def check(self) -> None:
        """Raise InputError for axes that the sites do not have, or that lack what they hold."""
        axes = self.axes
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown or len(set(axes)) != len(axes) or not {"layer", "site"} & set(axes):
            raise InputError(
                f"axes {axes} are not understood: 'layer', 'site' or both, then 'head', 'position', 'region', 'neurons' and 'step' as wanted."
            )
        blocks = [name for name in self.names if _BLOCK_SITE.fullmatch(name)]
        if "layer" in axes and len(blocks) != len(self.names):
            raise InputError(f"The axis 'layer' needs sites inside blocks; found {self.kind}. Use the axis 'site'.")
        if "layer" in axes and "site" not in axes and len({_leaf(name) for name in blocks}) > 1:
            raise InputError(
                f"The axis 'layer' alone needs one kind of site; found {self.kind}. Use the axes 'site' and 'layer'."
            )
        headless = [name for name in self.names if not SiteName.parse(name).has_heads]
        if "head" in axes and headless:
            raise InputError(
                f"{headless[0]} has no heads; leave 'head' out of axes, which has it unless you say otherwise: axes=('layer', 'position')."
            )
        if "position" in axes and "region" in axes:
            raise InputError("A position is part of a region: take one of the axes 'position' and 'region'.")
        for axis, held in (("region", self.regions), ("neurons", self.neurons)):
            if (axis in axes) != bool(held):
                given = f"{axis.removesuffix('s')}s="
                raise InputError(f"The axis {axis!r} and {given} belong together: give both or neither.")
        layers_around(0, self.window, ())
        if self.window != 1 and "layer" not in axes:
            raise InputError("A window is of layers: take the axis 'layer'.")

    def laid_out(
        self,
        heads: Mapping[str, int],
        held: Mapping[str, Sequence[int]],
        passes: Mapping[str, int] | None = None,
    ) -> tuple[dict[str, list[Any]], list[Cell]]:
        """The labels of every axis, and every cell that exists.

        ``heads`` says how many heads each site has where they are an axis, ``held`` which positions where those are, ``passes`` how often each runs.
        """
        labels, cells = self._labels(heads, held), []
        bases = {label: torch.eye(self.width)[:, list(group)] for label, group in self.neurons.items()}
        for name in self.names:
            counts: dict[str, Sequence[Any]] = {
                "head": range(heads.get(name, 0)),
                "position": held.get(name, ()),
                "region": list(self.regions),
                "neurons": list(self.neurons),
                "step": [
                    label for label, own in self.steps.items() if any(map(own.acts, range((passes or {}).get(name, 1))))
                ],
            }
            counts = {axis: entries for axis, entries in counts.items() if axis in self.axes}
            match = _BLOCK_SITE.fullmatch(name)
            for chosen in itertools.product(*counts.values()):
                where: dict[str, Any] = {**dict(zip(counts, chosen, strict=True)), "site": self._site_label(name)}
                if match:
                    where |= {"tower": match["tower"], "layer": int(match["layer"])}
                region = where.get("region")
                cells.append(
                    Cell(
                        tuple(labels[axis].index(where[axis]) for axis in labels),
                        self._together(name),
                        where.get("head"),
                        where.get("position") if region is None else self.regions[region],
                        bases.get(str(where.get("neurons"))),
                        self.steps.get(where.get("step")),
                    )
                )
        return labels, cells

    def _labels(self, heads: Mapping[str, int], held: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        parsed = [match for name in self.names if (match := _BLOCK_SITE.fullmatch(name))]
        towers = list(dict.fromkeys(match["tower"] for match in parsed))
        made: dict[str, Any] = {
            "layer": lambda: sorted({int(match["layer"]) for match in parsed}),
            "site": lambda: list(dict.fromkeys(map(self._site_label, self.names))),
            "position": lambda: sorted({position for name in self.names for position in held[name]}),
            "head": lambda: list(range(max(heads.values()))),
            "region": lambda: list(self.regions),
            "neurons": lambda: list(self.neurons),
            "step": lambda: list(self.steps),
        }
        labels = {"tower": towers} if "layer" in self.axes and len(towers) > 1 else {}
        return labels | {axis: made[axis]() for axis in self.axes}

    def _site_label(self, name: str) -> str:
        return _leaf(name) if "layer" in self.axes else name

    def _together(self, name: str) -> tuple[str, ...]:
        """The sites that a layer's window holds, in the order of layers."""
        match = _BLOCK_SITE.fullmatch(name)
        if match is None or self.window == 1:
            return (name,)
        layer = int(match["layer"])
        found = {}
        for other in self.names:
            own = _BLOCK_SITE.fullmatch(other)
            if own and (own["tower"], own["leaf"]) == (match["tower"], match["leaf"]):
                found[int(own["layer"])] = other
        return tuple(found[number] for number in layers_around(layer, self.window, sorted(found)))


def layers_around(layer: int, window: int | str, there: Iterable[int]) -> tuple[int, ...]:
    """Which of the layers that are there a window holds: as many as it says around the layer (of an even number one more behind it than before),
    those ``"up to"`` it or ``"from"`` it on.

    Raises:
        InputError: a window that is neither.
    """
    if isinstance(window, int) and not isinstance(window, bool) and window >= 1:
        first = layer - (window - 1) // 2
        return tuple(number for number in there if first <= number < first + window)
    if window not in WINDOWS:
        raise InputError(
            f"window={window!r} is not understood: a number of layers from 1, 'up to' or 'from' the layer."
        )
    return tuple(number for number in there if (number <= layer if window == "up to" else number >= layer))


def step_groups(steps: Any, passes: int | None = None) -> dict[Any, Steps]:
    """Passes by label: None is each of them alone; of a number, a word or a list of these each by itself, ``"all"`` for all at once; of a mapping its
    own, each in any spelling of steps, or ``"all"``.

    Raises:
        InputError: no step, or one outside the ``passes`` there are, where their number is known.
    """
    given = range(passes or 0) if steps is None else [steps] if isinstance(steps, str | int) else steps
    labelled = dict(given) if isinstance(given, Mapping) else {step: step for step in given}
    found = {label: Steps.of(None if own == ALL else own) for label, own in labelled.items()}
    if not found:
        raise InputError("steps= names no step: give numbers, 'all', or leave it out for each of them.")
    for label, own in found.items():
        if passes is not None and any(number >= passes for number in own.numbers):
            raise InputError(f"There is no step {labelled[label]!r}: the sites run {passes} times, counted from 0.")
    return found


def _leaf(name: str) -> str:
    match = _BLOCK_SITE.fullmatch(name)
    return match["leaf"] if match else name


def neuron_groups(neurons: Any, width: int) -> dict[str, tuple[int, ...]]:
    """Groups of coordinates by label: of a mapping its own, of a list of groups their numbers or first to last, of a number that many equal runs.

    Raises:
        InputError: no group, an empty one, or a coordinate outside the site's ``width``.
    """
    if isinstance(neurons, int) and not isinstance(neurons, bool):
        if not 1 <= neurons <= width:
            raise InputError(f"neurons={neurons} groups cannot be made of {width} coordinates.")
        edges = [width * number // neurons for number in range(neurons + 1)]
        neurons = [range(low, high) for low, high in itertools.pairwise(edges)]
    if isinstance(neurons, bool) or not isinstance(neurons, Iterable):
        raise InputError(f"neurons={neurons!r}: give groups of coordinates, or how many equal runs.")
    if not isinstance(neurons, Mapping):
        neurons = {_run(group): group for group in (list(n) if isinstance(n, Iterable) else [n] for n in neurons)}
    try:
        found = {str(label): tuple(operator.index(n) for n in group) for label, group in neurons.items()}
    except TypeError as error:
        raise InputError(f"neurons= holds what is no group of whole numbers: {error}.") from error
    if not found or not all(found.values()):
        raise InputError("neurons= holds an empty group: give the coordinates of each.")
    twice = [label for label, group in found.items() if len(set(group)) < len(group)]
    if twice:
        raise InputError(f"The group {twice[0]!r} of neurons= holds a coordinate twice.")
    outside = [n for group in found.values() for n in group if not 0 <= n < width]
    if outside:
        raise InputError(f"There is no neuron {outside[0]} among the {width} of this site.")
    return found


def _run(group: Sequence[int]) -> str:
    """A label: the number, the first and last of a run, or all of them."""
    if len(group) == 1:
        return str(group[0])
    if group and list(group) == list(range(group[0], group[-1] + 1)):
        return f"{group[0]}…{group[-1]}"
    return ",".join(map(str, group))
