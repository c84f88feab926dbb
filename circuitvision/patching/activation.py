"""Activation patching: which part of one run, put into another, moves the answer.

Two runs of the same shape, *clean* and *corrupt*, differ in one thing. One run is the *base*; for every cell of the
requested axes one piece of it takes the value it had in the other run, the *source*, and the metric is read again:

    ``effect = (metric(patched) - metric(base)) / (metric(source) - metric(base))``

``mode="denoise"`` patches clean values into the corrupt run: 1 restores the clean answer, 0 does nothing (is this
piece *sufficient*?). ``mode="noise"`` patches corrupt values into the clean run: 1 destroys it completely (is it
*necessary*?). Effects may be negative or exceed 1, and they do not add up where pieces back each other up. Where
base and source hardly differ in the metric the ratio means nothing: such examples are NaN, announced by a warning,
and left out of the mean.

Every cell is one ``edits.replace``, and all cells are one ``model.sweep``: only what a cell can change is computed.
Not covered: runs of different lengths.

Reference: Wang et al. 2022 (arXiv 2211.00593); Zhang and Nanda 2023 (arXiv 2309.16042) on the two modes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits, metrics
from circuitvision.errors import InputError, warn
from circuitvision.model.edits.base import EditGroup, by_digest
from circuitvision.model.edits.values import TensorRef
from circuitvision.model.sites import SiteName
from circuitvision.model.state import refuse_random
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result

_BLOCK_SITE = re.compile(r"(?P<tower>\w+)\.blocks\.(?P<layer>\d+)\.(?P<leaf>.+)")
LEAST_GAP = 0.01
"""Share of the metric's size by which two runs differ at least where an effect is given as a share of that."""
_Cell = tuple[tuple[int, ...], str, int | None, int | None]
"""Index in the result, site, head or None for all, position or None for all."""
_AXES = ("tower", "layer", "site", "head", "position")


@dataclass(frozen=True, eq=False)
class PatchingResult(Result):
    """Effects of patching, ``[*axes example]``.

    ``values`` are normalised effects (see the module), ``raw`` the change of the metric in its own units, both with
    the same axes. ``base`` and ``source`` ``[example]`` are the metric of the two runs. Cells that do not exist (a tower with fewer layers or heads
    than another) are NaN in both. Sites listed in ``dead`` cannot reach the output: their effect is 0, without a run. ``sources`` is one
    edit for each site, with the whole of the source run's values there (by digest: the result does not keep them).
    """

    raw: Tensor = field(default_factory=lambda: torch.zeros(0))
    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    mode: str = "denoise"
    site: str = ""
    dead: list[str] = field(default_factory=list)
    sources: list[EditGroup] = field(default_factory=list)
    positions: dict[str, list[int]] = field(default_factory=dict)
    """The positions of its tower that each site holds, where positions are an axis."""

    _per_example: ClassVar[dict[str, int]] = {"raw": -1, "base": -1, "source": -1}

    @property
    def edits(self) -> list[EditGroup]:
        """The edit of every cell that was run, in row-major order; :func:`circuitvision.edits.restore` puts the source's values into them."""
        whole: dict[str, Any] = {edit.site: edit.values()["source"] for group in self.sources for edit in group}
        shapes = {site: source._tensor if isinstance(source, TensorRef) else source for site, source in whole.items()}
        axes = [axis for axis in self.axes if axis not in ("tower", "example")]
        cells = sorted(_plan(list(shapes), axes, shapes, self.positions)[1]) if shapes else []
        return [EditGroup([_patch(cell, whole[cell[1]])]) for cell in cells if cell[1] not in self.dead]

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """The effects; every axis but the examples is one of components."""
        return self.values, ("example",)

    def top(self, count: int = 10) -> list[tuple[dict[str, Any], float]]:
        """The cells with the largest absolute mean effect, as (labels, mean effect), strongest first."""
        flat, axes = self.mean().flatten().nan_to_num(0.0), [axis for axis in self.axes if axis != "example"]
        order = flat.abs().argsort(descending=True, stable=True)[:count].tolist()
        cells = [
            dict(zip(axes, labels, strict=True)) for labels in itertools.product(*(self.axes[name] for name in axes))
        ]
        return [(cells[index], float(flat[index])) for index in order]


@with_provenance
def activation_patch(
    model: Any,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any],
    metric: Any,
    *,
    sites: str | Sequence[str],
    axes: Sequence[str] = ("layer", "head"),
    mode: str = "denoise",
    min_gap: float | None = None,
) -> PatchingResult:
    """Patch every cell of ``axes`` of the matching sites, one at a time, and measure how much of the answer follows.

    Args:
        model: the hooked model.
        clean: inputs whose answer the metric favours.
        corrupt: inputs of the same shapes whose answer differs.
        metric: ``metric(logits, inputs) -> [batch]``, see :mod:`circuitvision.metrics`.
        sites: a glob or names, for example ``"vision.blocks.*.attn.hook_z"``; one kind of site at a time.
        axes: ``"layer"`` (or ``"site"`` for sites outside blocks), then ``"head"`` and ``"position"`` as wanted.
        What is not an axis is
            patched whole: ``("layer", "head")`` patches all positions of one head. Sites of several towers add the
            axis ``"tower"``.
        mode: ``"denoise"`` or ``"noise"``.
        min_gap: the smallest ``|metric(source) - metric(base)|`` that an effect is computed for, in units of the
        metric; by default a
            hundredth of the sum of their sizes, below which the ratio is one of rounding and noise.

    Raises:
        InputError: dropout in training mode, inputs of different shapes, axes the site does not have, several kinds of site, an unknown mode.
        UnknownSiteError: ``sites`` matches nothing.
    """
    if mode not in ("denoise", "noise"):
        raise InputError(
            f"Unknown mode {mode!r}; choose 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)."
        )
    refuse_random(model.module, "Patching")
    names = matching_sites(model, sites)
    _check_axes(names, axes)
    check_same_shapes(clean, corrupt)
    metric = metrics.bind(metric, model)
    base_inputs, source_inputs = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    dead = [name for name in names if model.is_dead(name, base_inputs)]
    with torch.no_grad():
        source_logits, cache = model.run_with_cache(source_inputs, names_filter=names)
        source = metrics.evaluate(metric, source_logits, source_inputs).cpu()
        values = {name: cache[name] for name in names}
        held = {name: model.positions(name, base_inputs) for name in names} if "position" in axes else {}
        without = [name for name, positions in held.items() if not positions]
        if without:
            raise InputError(f"{without[0]} has no positions in this model; leave 'position' out of axes.")
        labels, cells = _plan(names, axes, values, held)
        live = [cell for cell in cells if cell[1] not in dead]
        swept = model.sweep(base_inputs, [_patch(cell, values[cell[1]]) for cell in live], metric) if live else None
        base = metrics.evaluate(metric, model(base_inputs), base_inputs).cpu() if swept is None else swept.clean
    raw = torch.full((*(len(values) for values in labels.values()), len(base)), float("nan"), dtype=base.dtype)
    for index, name, _, _ in cells:
        raw[index] = 0.0 if name in dead else raw[index]
    for number, (index, _, _, _) in enumerate(live):
        assert swept is not None
        raw[index] = swept.values[number] - base
    return PatchingResult(
        values=raw / usable_gap(source - base, base, source, min_gap),
        axes={**labels, "example": list(range(len(base)))},
        provenance=describe(
            model, method=f"activation_patch(mode={mode})", metric=metric, inputs=(clean, corrupt), sites=_kind(names)
        ),
        raw=raw,
        base=base,
        source=source,
        mode=mode,
        site=_kind(names),
        positions={name: list(held[name]) for name in names if name in held},
        dead=dead,
        sources=[by_digest([edits.replace(name, value)]) for name, value in values.items()],
    )


def matching_sites(model: Any, sites: str | Sequence[str]) -> list[str]:
    """The names that a glob, or a list of names and globs, stands for, in the model's order and each once."""
    patterns = [sites] if isinstance(sites, str) else list(sites)
    if not patterns:
        raise InputError("No site was named; give a glob such as 'vision.blocks.*.attn.hook_z'.")
    return list(dict.fromkeys(name for pattern in patterns for name in model.sites(pattern)))


def check_same_shapes(clean: Mapping[str, Any], corrupt: Mapping[str, Any]) -> None:
    """Raise InputError unless two input mappings have the same tensors of the same shapes."""
    for name in sorted({*clean, *corrupt}):
        first, second = clean.get(name), corrupt.get(name)
        if isinstance(first, Tensor) != isinstance(second, Tensor):
            raise InputError(f"Only one of the two inputs has {name!r}; make both in the same way.")
        if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape != second.shape:
            raise InputError(
                f"{name} is {tuple(first.shape)} in the clean inputs and {tuple(second.shape)} in the corrupt ones. "
                "Patching puts values of one run into the other: prompts need one token length, images one size."
            )


def usable_gap(
    gap: Float[Tensor, " batch"], base: Tensor, source: Tensor, min_gap: float | None
) -> Float[Tensor, " batch"]:
    """The denominators of the effect, NaN where the two runs hardly differ (with a warning that says how many)."""
    floor = (base.abs() + source.abs()) * LEAST_GAP if min_gap is None else torch.full_like(gap, min_gap)
    usable = (gap.abs() > floor) & gap.isfinite()
    if not bool(usable.all()):
        warn(
            f"In {int((~usable).sum())} of {len(gap)} examples the metric hardly differs between the two runs, so "
            "their normalised effect is NaN. Choose a pair whose answers differ."
        )
    return torch.where(usable, gap, torch.full_like(gap, float("nan")))


def _kind(names: Sequence[str]) -> str:
    """What the sites have in common: ``attn.hook_z`` of several blocks, or the one name."""
    leaves = {match["leaf"] if (match := _BLOCK_SITE.fullmatch(name)) else name for name in names}
    return ", ".join(sorted(leaves))


def _check_axes(names: Sequence[str], axes: Sequence[str]) -> None:
    unknown = [axis for axis in axes if axis not in _AXES[1:]]
    if unknown or len(set(axes)) != len(axes) or ("layer" in axes) == ("site" in axes):
        raise InputError(
            f"axes {tuple(axes)} are not understood: 'layer' or 'site', then 'head' and 'position' as wanted."
        )
    blocks = [match for name in names if (match := _BLOCK_SITE.fullmatch(name))]
    if "layer" in axes and (len(blocks) != len(names) or len({match["leaf"] for match in blocks}) > 1):
        raise InputError(
            f"The axis 'layer' needs one kind of site inside blocks; found {_kind(names)}. Use the axis 'site'."
        )
    if "head" in axes:
        headless = [name for name in names if not SiteName.parse(name).has_heads]
        if headless:
            raise InputError(f"{headless[0]} has no heads; leave 'head' out of axes.")


def _dimension(name: str) -> int:
    """The axis of heads."""
    return 1 if SiteName.parse(name).is_pattern else 2


def _plan(
    names: Sequence[str], axes: Sequence[str], source: Mapping[str, Tensor], held: Mapping[str, Sequence[int]]
) -> tuple[dict[str, list[Any]], list[_Cell]]:
    """The labels of every axis, and for each existing cell (index, site, head or None, position of its tower or None)."""
    parsed = {name: _BLOCK_SITE.fullmatch(name) for name in names}
    towers = list(dict.fromkeys(match["tower"] for match in parsed.values() if match))
    labels: dict[str, list[Any]] = {}
    if "layer" in axes and len(towers) > 1:
        labels["tower"] = towers
    for axis in axes:
        if axis == "layer":
            labels["layer"] = sorted({int(match["layer"]) for match in parsed.values() if match})
        elif axis == "site":
            labels["site"] = list(names)
        elif axis == "position":
            labels["position"] = sorted({position for name in names for position in held[name]})
        else:
            labels[axis] = list(range(max(source[name].shape[_dimension(name)] for name in names)))
    cells = []
    for name in names:
        heads = source[name].shape[_dimension(name)] if "head" in axes else 0
        counts = {"head": range(heads), "position": held.get(name, ())}
        counts = {axis: numbers for axis, numbers in counts.items() if axis in axes}
        match = parsed[name]
        for chosen in itertools.product(*counts.values()):
            where: dict[str, Any] = {**dict(zip(counts, chosen, strict=True)), "site": name}
            if match:
                where |= {"tower": match["tower"], "layer": int(match["layer"])}
            index = tuple(labels[axis].index(where[axis]) for axis in labels)
            cells.append((index, name, where.get("head"), where.get("position")))
    return labels, cells


def _patch(cell: _Cell, source: Any) -> edits.Edit:
    """The edit that patches one cell: its head at its position, or all of what it does not name."""
    _, name, head, position = cell
    return edits.replace(name, source, heads=head, positions=position)
